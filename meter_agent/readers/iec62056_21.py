"""Reads meters that speak IEC 62056-21: pushed telegrams (mode D), or after a request (mode C, optical heads).

In mode C each `sample()` is one conversation (`framing.iec62056_21.SignOn`): the request at 300 Bd, the meter's answer,
our acknowledgement, and the data at the rate that it names. The port stays open in between, because many heads draw
their power from it. Before a request its input is emptied; after a conversation that failed it is opened anew.
"""

import select
import termios
import time
from collections.abc import Callable
from functools import partial
from typing import Final

import serial

from meter_agent.config import Iec62056Config
from meter_agent.framing.iec62056_21 import Iec62056Framer, SignOn, Telegram, parse_telegram
from meter_agent.framing.telegram import MalformedTelegram
from meter_agent.readers.pushed import CHUNK_BYTES, PushedProtocol, PushedReader, sample_of
from meter_agent.readers.serial_port import open_port, port_is_gone
from meter_agent.readings import Clock, MeterReader, ReadFailure, Sample

BITS_PER_CHARACTER: Final = 10
"""Start bit, seven bits, parity, stop bit."""

SWITCH_MARGIN_S: Final = 0.015
"""Waited after the last bit of an acknowledgement, for adapters that buffer. Meters wait at least 20 ms, most 200."""


def create_iec62056_21_reader(meter: str, config: Iec62056Config, clock: Clock) -> MeterReader:
    """The reader of one port, by the config's mode. Opens nothing yet."""
    if config.mode == "C":
        return SignOnReader(meter, config, clock)
    protocol: PushedProtocol[Telegram] = PushedProtocol(
        "iec62056_21",
        partial(Iec62056Framer, config.parity),
        partial(parse_telegram, choice=config.obis, unit=config.unit),
        "does the optical head sit straight, are baud (often 9600, by the standard 2400) and parity right, or must the "
        'meter be asked (mode = "C")?',
    )
    return PushedReader(meter, config.port, config.start_baud, config.timeout_s, protocol, clock)


class SignOnReader:
    """Asks one meter in mode C. Implements MeterReader.

    `wait_s` and `monotonic_s` are real time, as waiting for a wire always is.
    """

    def __init__(
        self,
        meter: str,
        config: Iec62056Config,
        clock: Clock,
        wait_s: Callable[[float], None] = time.sleep,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._meter = meter
        self._config = config
        self._clock = clock
        self._wait_s = wait_s
        self._monotonic_s = monotonic_s
        self._handle: serial.Serial | None = None

    def sample(self) -> Sample:
        """Ask the meter. Raises ReadFailure after `timeout_s` without a whole answer."""
        config = self._config
        conversation = SignOn(config.parity, config.device_address, config.max_baud)
        try:
            telegram = self._converse(conversation)
            reading = parse_telegram(telegram, config.obis, config.unit)
        except (OSError, termios.error) as error:
            self.close()
            raise ReadFailure(self._meter, port_is_gone(str(config.port), error)) from error
        except MalformedTelegram as error:
            self.close()
            raise ReadFailure(self._meter, f"the meter's answer was refused: {error.reason}") from error
        except ReadFailure:
            self.close()
            raise
        return sample_of(reading, self._clock, 0.0)

    def close(self) -> None:
        """Let go of the port; the next `sample()` opens it again."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def _converse(self, conversation: SignOn) -> Telegram:
        """One conversation. Raises ReadFailure, MalformedTelegram, OSError and termios.error."""
        deadline_s = self._monotonic_s() + self._config.timeout_s
        if self._handle is None:
            self._handle = open_port(self._meter, self._config.port, self._config.start_baud)
        handle = self._handle
        handle.baudrate = self._config.start_baud
        handle.reset_input_buffer()
        handle.write(conversation.request)
        answered = False
        while (left_s := deadline_s - self._monotonic_s()) > 0:
            readable, _, _ = select.select([handle.fileno()], [], [], left_s)
            step = conversation.feed(handle.read(CHUNK_BYTES)) if readable else None
            if isinstance(step, Telegram):
                return step
            if step is not None:
                answered = True
                self._acknowledge(handle, *step)
        raise ReadFailure(self._meter, self._why_nothing(conversation, answered))

    def _acknowledge(self, handle: serial.Serial, answer: bytes, baud: int) -> None:
        """Send our answer at the old rate, and once its last bit has gone listen at the new one."""
        handle.write(answer)
        self._wait_s(len(answer) * BITS_PER_CHARACTER / handle.baudrate + SWITCH_MARGIN_S)
        handle.baudrate = baud

    def _why_nothing(self, conversation: SignOn, answered: bool) -> str:
        within = f"within {self._config.timeout_s:g} s"
        if conversation.last_refusal is not None:
            return f"no whole answer {within}; the last one was refused: {conversation.last_refusal}"
        if answered:
            return f"the meter answers and sends no data {within}; try a lower max_baud, or a longer timeout_s"
        return (
            f"no answer {within}; does the optical head sit straight, are parity and device_address right, "
            'or does the meter push without being asked (mode = "D")?'
        )
