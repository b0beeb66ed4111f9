"""Sockets and pseudo-terminals around the pure protocol code: one class a kind of wire, all served by one selector.

A device never blocks and bounds what it keeps: connections are limited, and what a reader does not take is thrown away,
as on a real line. `unplug` and `plug_in` are the cable; `fault` is what the meter itself does wrong.
"""

import contextlib
import errno
import fcntl
import os
import selectors
import socket
import struct
import termios
import tty
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Final

from dengen_testing.wire import dsmr
from dengen_testing.wire.faults import Fault
from dengen_testing.wire.modbus import RegisterImage, RtuServer, TcpServer
from dengen_testing.wire.registers import MeterState

MAX_CONNECTIONS: Final = 8
"""Modbus TCP devices serve a few clients; a meter serves even fewer."""

RTU_END_OF_FRAME_S: Final = 0.02
"""Silence that ends an RTU frame. 3.5 characters at 9600 Bd are 4 ms; a pseudo-terminal has no such timing at all."""

PUSH_EVERY_S: Final = 0.25
"""A real DSMR 5 meter pushes each second; four times a second, nobody has to wait long for the next one."""

_PTY_ROOM_BYTES: Final = 3_500
"""A pseudo-terminal queues 4095 bytes. Before that, what nobody reads is flushed, so that what is read is fresh."""

_READ_BYTES: Final = 4_096
_P1_GARBAGE: Final = b"\xff\x00/\x81\x93\r\n!ZZZZ\r\n"


class WireDevice(ABC):
    """A meter at the end of a wire. All methods are for one thread at a time; the street sees to that."""

    def __init__(self, selector: selectors.BaseSelector, state: MeterState) -> None:
        self._selector = selector
        self._state = state
        self.fault = Fault.NONE
        self.plugged_in = False

    @abstractmethod
    def plug_in(self) -> None:
        """Make the meter reachable, at the same address as before."""

    @abstractmethod
    def unplug(self) -> None:
        """Take the meter off the wire: connections break, the port is gone."""

    @abstractmethod
    def address(self) -> dict[str, str | int]:
        """Where a reader finds it: host and port, or the path of a serial port."""

    def move_to(self, state: MeterState) -> None:
        """The meter has counted on."""
        self._state = state

    @abstractmethod
    def next_due_s(self) -> float | None:
        """When `tick` wants to be called, on the real clock; None for not at all."""

    @abstractmethod
    def tick(self, now_s: float) -> None:
        """Do what is due by real time."""


class ModbusTcpMeter(WireDevice):
    """A meter behind Modbus TCP on 127.0.0.1, on a port from the system that stays the same."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        state: MeterState,
        image: Callable[[MeterState], RegisterImage],
        device_id: int,
    ) -> None:
        super().__init__(selector, state)
        self._make_image = image
        self._image = image(state)
        self._device_id = device_id
        self._listener: socket.socket | None = None
        self._connections: dict[socket.socket, TcpServer] = {}
        self._port = 0

    def plug_in(self) -> None:
        if self._listener is not None:
            return
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self._port))
        listener.listen(MAX_CONNECTIONS)
        listener.setblocking(False)
        self._port = listener.getsockname()[1]
        self._listener = listener
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self.plugged_in = True

    def unplug(self) -> None:
        for connection in list(self._connections):
            self._close(connection)
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None
        self.plugged_in = False

    def address(self) -> dict[str, str | int]:
        return {"host": "127.0.0.1", "port": self._port, "device_id": self._device_id}

    def move_to(self, state: MeterState) -> None:
        super().move_to(state)
        self._image = self._make_image(state)

    def next_due_s(self) -> float | None:
        return None

    def tick(self, now_s: float) -> None:
        """Nothing is due by time on a TCP connection."""

    def _accept(self) -> None:
        assert self._listener is not None
        connection, _ = self._listener.accept()
        if len(self._connections) >= MAX_CONNECTIONS:
            connection.close()
            return
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connections[connection] = TcpServer(self._device_id)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._serve(connection))

    def _serve(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(_READ_BYTES)
            answer = self._connections[connection].receive(data, self._image, self.fault)
            if answer:
                connection.sendall(answer)
        except (OSError, ValueError):
            # Broken off, no Modbus, or a client that asks and never reads: a device drops the connection.
            self._close(connection)
            return
        if not data:
            self._close(connection)

    def _close(self, connection: socket.socket) -> None:
        del self._connections[connection]
        self._selector.unregister(connection)
        connection.close()


class _SerialMeter(WireDevice):
    """A meter behind a pseudo-terminal, which readers open by a path that stays the same (a symbolic link)."""

    def __init__(self, selector: selectors.BaseSelector, state: MeterState, path: Path) -> None:
        super().__init__(selector, state)
        self._path = path
        self._ours: int | None = None
        self._theirs: int | None = None

    def plug_in(self) -> None:
        if self._ours is not None:
            return
        ours, theirs = os.openpty()
        # Raw, so that no byte is echoed or translated. Our own descriptor of their side keeps the line up while nobody
        # has it open.
        tty.setraw(theirs)
        os.set_blocking(ours, False)
        self._ours, self._theirs = ours, theirs
        self._path.unlink(missing_ok=True)
        self._path.symlink_to(os.ttyname(theirs))
        self._selector.register(ours, selectors.EVENT_READ, self._readable)
        self.plugged_in = True

    def unplug(self) -> None:
        if self._ours is None or self._theirs is None:
            return
        self._selector.unregister(self._ours)
        self._path.unlink(missing_ok=True)
        os.close(self._ours)
        os.close(self._theirs)
        self._ours = self._theirs = None
        self.plugged_in = False

    def address(self) -> dict[str, str | int]:
        return {"path": str(self._path)}

    def _write(self, data: bytes) -> None:
        """Put bytes on the line; what nobody has read by now is thrown away if it is in the way."""
        if self._ours is None or self._theirs is None or not data:
            return
        (queued,) = struct.unpack("i", fcntl.ioctl(self._theirs, termios.FIONREAD, bytes(4)))
        if queued + len(data) > _PTY_ROOM_BYTES:
            termios.tcflush(self._ours, termios.TCOFLUSH)
            termios.tcflush(self._theirs, termios.TCIFLUSH)
        with contextlib.suppress(BlockingIOError):
            os.write(self._ours, data)

    def _readable(self) -> None:
        assert self._ours is not None
        try:
            data = os.read(self._ours, _READ_BYTES)
        except OSError as error:
            # EIO: the last one who had the line open is gone; EAGAIN: somebody else's wake-up.
            if error.errno in (errno.EIO, errno.EAGAIN):
                return
            raise
        self._received(data)

    @abstractmethod
    def _received(self, data: bytes) -> None:
        """Take what the reader wrote to the line."""


class ModbusRtuMeter(_SerialMeter):
    """A meter on a serial line that answers Modbus RTU requests."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        state: MeterState,
        path: Path,
        image: Callable[[MeterState], RegisterImage],
        device_id: int,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(selector, state, path)
        self._make_image = image
        self._image = image(state)
        self._device_id = device_id
        self._server = RtuServer(device_id)
        self._clock = clock
        self._silence_ends_s: float | None = None

    def unplug(self) -> None:
        super().unplug()
        self._server = RtuServer(self._device_id)
        self._silence_ends_s = None

    def address(self) -> dict[str, str | int]:
        return {**super().address(), "device_id": self._device_id}

    def move_to(self, state: MeterState) -> None:
        super().move_to(state)
        self._image = self._make_image(state)

    def next_due_s(self) -> float | None:
        return self._silence_ends_s

    def tick(self, now_s: float) -> None:
        if self._silence_ends_s is not None and now_s >= self._silence_ends_s:
            self._silence_ends_s = None
            self._write(self._server.line_idle(self._image, self.fault))

    def _received(self, data: bytes) -> None:
        self._write(self._server.receive(data, self._image, self.fault))
        self._silence_ends_s = self._clock() + RTU_END_OF_FRAME_S if self._server.waiting_for_more else None


class P1Meter(_SerialMeter):
    """A meter that pushes a DSMR telegram, at once when it has counted on and every `PUSH_EVERY_S` besides."""

    def __init__(
        self, selector: selectors.BaseSelector, state: MeterState, path: Path, clock: Callable[[], float]
    ) -> None:
        super().__init__(selector, state, path)
        self._telegram = dsmr.telegram(state)
        self._clock = clock
        self._next_push_s = clock()

    def plug_in(self) -> None:
        super().plug_in()
        self._push()

    def move_to(self, state: MeterState) -> None:
        super().move_to(state)
        if self.fault is not Fault.LATE:
            self._telegram = dsmr.telegram(state)
        self._push()

    def next_due_s(self) -> float | None:
        return self._next_push_s if self.plugged_in else None

    def tick(self, now_s: float) -> None:
        if self.plugged_in and now_s >= self._next_push_s:
            self._push()

    def _push(self) -> None:
        self._next_push_s = self._clock() + PUSH_EVERY_S
        self._write(_faulty(self._telegram, self.fault))

    def _received(self, data: bytes) -> None:
        """A P1 port has no receiving line."""


def _faulty(telegram: bytes, fault: Fault) -> bytes:
    if fault is Fault.SILENT:
        return b""
    if fault is Fault.GARBAGE:
        return _P1_GARBAGE
    if fault is Fault.SHORT:
        return telegram[: len(telegram) // 2]
    if fault is Fault.WRONG_CHECKSUM:
        good = telegram[-6:-2]
        return telegram[:-6] + (b"0000" if good != b"0000" else b"FFFF") + b"\r\n"
    return telegram
