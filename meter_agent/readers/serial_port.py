"""Opens a serial port for one meter, or says why it cannot be opened.

Ports are opened with eight data bits, and no parity unless asked for. Seven bits and a parity bit, as optical heads
have them, are as long on the wire, so their framing sees the parity bit as the eighth and can check it. pyserial's own
setting does not: it has the kernel send parity and never look at it. With eight bits and parity (M-Bus) there is one
bit more, so it must be set; what the bytes are worth is for the frame's check sequence to say.
"""

import os
import termios
from pathlib import Path
from typing import Literal

import serial

from meter_agent.readings import ReadFailure


def open_port(meter: str, port: Path, baud: int, parity: Literal["N", "E", "O"] = "N") -> serial.Serial:
    """The port, exclusively, not blocking, its input emptied. Raises ReadFailure."""
    try:
        handle = serial.Serial(str(port), baudrate=baud, parity=parity, timeout=0, exclusive=True)
    except (OSError, termios.error) as error:
        if not os.path.exists(port):  # False, too, where the path itself is too long.
            reason = f"the serial port {port} is missing; is the cable plugged in? (see /dev/serial/by-id)"
        else:
            reason = f"the serial port {port} cannot be opened ({error}); is it in use, and is this user in dialout?"
        raise ReadFailure(meter, reason) from error
    try:
        handle.reset_input_buffer()
    except (OSError, termios.error) as error:
        handle.close()
        raise ReadFailure(meter, f"the serial port {port} failed while it was opened ({error})") from error
    return handle


def port_is_gone(port: str, error: Exception) -> str:
    """Why reads and writes fail on a port that was open."""
    return f"the serial port {port} is gone ({error}); is the cable plugged in?"
