"""`meter-agent simulate`: serves profiles as Modbus meters over TCP or on a pseudo-terminal, for tests of gateways.

Meters share the wire, each with a device id. They count on by their power, and take new values from typed lines
(`power 2300`, or `2 import 5000000` for the device 2). `SimulatedMeter` is pure; `Simulator` owns sockets and time.
"""

import contextlib
import os
import selectors
import socket
import sys
import tty
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dengen_testing.wire.modbus import MBAP_BYTES, RegisterImage, RtuServer, answer_pdu

from meter_agent.installer.encode import MeterValues, register_image
from meter_agent.profiles import MeterProfile

MAX_CONNECTIONS: Final = 16
MAX_LINE_BYTES: Final = 4_096
END_OF_FRAME_S: Final = 0.05
"""Silence on the serial line after which a frame that has begun is taken as it is."""

_READ_BYTES: Final = 4_096
_WUS_PER_MWH: Final = 3_600_000
"""Watt-microseconds in a milli-watt-hour."""

_TCP_GATEWAY_TARGET_FAILED: Final = 11
_TCP_LENGTHS: Final = range(2, 255)


class CannotServe(Exception):
    """A wire that cannot be made; the text says why and what to do."""


class SimulatedMeter:
    """One meter that counts by its power. Its clock is given with each call, in microseconds."""

    def __init__(self, profile: MeterProfile, device_id: int, values: MeterValues, now_us: int) -> None:
        """Raises CannotShow for values that the family has no registers for."""
        self.profile = profile
        self.device_id = device_id
        self._values = values
        self._since_us = now_us
        register_image(profile, values)

    def values(self, now_us: int) -> MeterValues:
        """What it shows now."""
        start = self._values
        moved_mwh = abs(start.power_w) * (now_us - self._since_us) // _WUS_PER_MWH
        drawn = start.power_w > 0
        return MeterValues(
            start.import_mwh + (moved_mwh if drawn else 0),
            start.export_mwh + (0 if drawn else moved_mwh),
            start.power_w,
            start.serial_number,
        )

    def image(self, now_us: int) -> RegisterImage:
        """All its registers now. Raises CannotShow when it has counted to a value that it cannot show."""
        return register_image(self.profile, self.values(now_us))

    def set(self, name: str, text: str, now_us: int) -> None:
        """Take one typed value: import or export in Wh, power in W, serial. Raises ValueError, CannotShow."""
        now = self.values(now_us)
        if name == "serial":
            changed = MeterValues(now.import_mwh, now.export_mwh, now.power_w, text)
        elif name == "power":
            changed = MeterValues(now.import_mwh, now.export_mwh, int(text), now.serial_number)
        elif name == "import" and int(text) >= 0:
            changed = MeterValues(1_000 * int(text), now.export_mwh, now.power_w, now.serial_number)
        elif name == "export" and int(text) >= 0:
            changed = MeterValues(now.import_mwh, 1_000 * int(text), now.power_w, now.serial_number)
        else:
            raise ValueError(f"{name} {text}: expected import WH, export WH, power W or serial NUMBER")
        register_image(self.profile, changed)
        self._values, self._since_us = changed, now_us


@dataclass(frozen=True, slots=True)
class Wires:
    """Where to serve: a TCP host and port (0: one from the system), a path for a pseudo-terminal, or both."""

    tcp: tuple[str, int] | None
    pty: Path | None


class Simulator:
    """Serves meters until stopped. Use it in a `with`."""

    def __init__(self, meters: list[SimulatedMeter], wires: Wires, now_us: Callable[[], int]) -> None:
        """Opens the wires. Raises CannotServe."""
        self._meters = {meter.device_id: meter for meter in meters}
        self._now_us = now_us
        self._selector = selectors.DefaultSelector()
        self._connections: dict[socket.socket, bytes] = {}
        self._rtu = [(RtuServer(device_id), meter) for device_id, meter in self._meters.items()]
        self._line: int | None = None
        self._line_ends: tuple[int, int] | None = None
        self._typed = b""
        self._stopping = False
        self._wake_read, self._wake_write = os.pipe()
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._woken)
        self.tcp: tuple[str, int] | None = None
        self.pty = wires.pty
        try:
            if wires.tcp is not None:
                self._listen(*wires.tcp)
            if wires.pty is not None:
                self._open_line(wires.pty)
        except CannotServe:
            self.close()
            raise

    def __enter__(self) -> "Simulator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_commands(self, descriptor: int) -> None:
        """Take typed lines from there as well; what cannot be waited for (a file, /dev/null) is left alone."""
        with contextlib.suppress(PermissionError, ValueError):
            self._selector.register(descriptor, selectors.EVENT_READ, lambda: self._commands(descriptor))

    def serve(self) -> None:
        """Answer until `stop`. Raises CannotShow when a meter counts to a value that it cannot show."""
        while not self._stopping:
            unfinished = any(server.waiting_for_more for server, _ in self._rtu)
            events = self._selector.select(END_OF_FRAME_S if unfinished else None)
            if not events and unfinished:
                self._line_idle()
            for key, _ in events:
                key.data()

    def stop(self) -> None:
        """End `serve` soon. From a signal handler or another thread."""
        self._stopping = True
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"\0")

    def close(self) -> None:
        """Take everything off the wires."""
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self._selector.close()
        if self._line_ends is not None:
            for descriptor in self._line_ends:
                os.close(descriptor)
            self._line_ends = None
            assert self.pty is not None
            self.pty.unlink(missing_ok=True)
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _woken(self) -> None:
        os.read(self._wake_read, _READ_BYTES)

    def _commands(self, descriptor: int) -> None:
        data = os.read(descriptor, _READ_BYTES)
        if not data:
            self._selector.unregister(descriptor)
            return
        *lines, self._typed = (self._typed + data)[-MAX_LINE_BYTES:].split(b"\n")
        for line in lines:
            try:
                self.command(line.decode("ascii", errors="replace"))
            except ValueError as error:
                print(f"meter-agent: {error}", file=sys.stderr, flush=True)

    def command(self, line: str) -> None:
        """Take one line: `[DEVICE] NAME VALUE`. Raises ValueError, CannotShow."""
        words = line.split()
        if not words:
            return
        if len(words) == 3 and words[0].isdigit() and int(words[0]) in self._meters:
            meters = [self._meters[int(words[0])]]
        elif len(words) == 2:
            meters = list(self._meters.values())
        else:
            raise ValueError(f"{line}: expected [DEVICE] import|export|power|serial VALUE")
        for meter in meters:
            meter.set(words[-2], words[-1], self._now_us())

    # TCP

    def _listen(self, host: str, port: int) -> None:
        try:
            listener = socket.create_server((host, port))
        except OSError as error:
            raise CannotServe(f"cannot listen on {host}:{port} ({error.strerror}); choose another port") from error
        listener.setblocking(False)
        name: tuple[str, int] = listener.getsockname()[:2]
        self.tcp = name
        self._selector.register(listener, selectors.EVENT_READ, lambda: self._accept(listener))

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        if len(self._connections) >= MAX_CONNECTIONS:
            connection.close()
            return
        connection.setblocking(False)
        self._connections[connection] = b""
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._serve_tcp(connection))

    def _serve_tcp(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(_READ_BYTES)
            received = self._connections[connection] + data
            while data and len(received) >= MBAP_BYTES:
                length = int.from_bytes(received[4:6], "big")
                if received[2:4] != b"\0\0" or length not in _TCP_LENGTHS:
                    raise ConnectionError
                if len(received) < 6 + length:
                    break
                connection.sendall(self._tcp_answer(received[: 6 + length]))
                received = received[6 + length :]
        except OSError:
            data = b""
        if data:
            self._connections[connection] = received
            return
        del self._connections[connection]
        self._selector.unregister(connection)
        connection.close()

    def _tcp_answer(self, frame: bytes) -> bytes:
        unit, request = frame[6], frame[7:]
        meter = self._meters.get(unit)
        if meter is None:
            pdu = bytes((request[0] | 0x80, _TCP_GATEWAY_TARGET_FAILED))
        else:
            pdu = answer_pdu(request, meter.image(self._now_us()))
        return frame[:4] + (1 + len(pdu)).to_bytes(2, "big") + bytes((unit,)) + pdu

    # Pseudo-terminal

    def _open_line(self, path: Path) -> None:
        if os.path.lexists(path):
            raise CannotServe(f"{path} is there already; remove it or choose another path")
        ours, theirs = os.openpty()
        # Raw, so that no byte is echoed or translated. Our own descriptor of their side keeps the line up while nobody
        # has it open.
        tty.setraw(theirs)
        os.set_blocking(ours, False)
        try:
            path.symlink_to(os.ttyname(theirs))
        except OSError as error:
            os.close(ours)
            os.close(theirs)
            raise CannotServe(f"cannot make {path} ({error.strerror}); choose another path") from error
        self._line, self._line_ends = ours, (ours, theirs)
        self._selector.register(ours, selectors.EVENT_READ, self._serve_line)

    def _serve_line(self) -> None:
        assert self._line is not None
        try:
            data = os.read(self._line, _READ_BYTES)
        except OSError:
            # The last reader has closed its side; the next one opens it again.
            return
        for server, meter in self._rtu:
            self._write(server.receive(data, meter.image(self._now_us())))

    def _line_idle(self) -> None:
        for server, meter in self._rtu:
            self._write(server.line_idle(meter.image(self._now_us())))

    def _write(self, data: bytes) -> None:
        # What nobody takes is lost, as on a real line.
        if data and self._line is not None:
            with contextlib.suppress(BlockingIOError):
                os.write(self._line, data)
