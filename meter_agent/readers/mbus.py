"""Reads electricity meters on a wired M-Bus, behind a level converter on a serial port.

The library `pyMeterBus` (extra `mbus`) takes frames apart into records. Its values are products with floating-point
powers of ten, and it lets more pass than a bill can bear, so envelope and values are checked in `framing.mbus`.

A meter is reset (SND_NKE), acknowledges, and is then asked (REQ_UD2) until it has no more records. A request is sent
once. After an answer that did not come, or did not fit, the port is closed; it is emptied before it is used again, and
what comes late stands where an acknowledgement should, so it is never taken for an answer.
"""

import logging
import select
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

import serial

from firmware_config.loader import WrongValue
from meter_agent.config import MBusConfig, NamedMeter
from meter_agent.framing.mbus import (
    ACKNOWLEDGE,
    FRAME_COUNT_BIT,
    MAX_FRAME_BYTES,
    REQ_UD2,
    SND_NKE,
    Header,
    MalformedFrame,
    NoAnswer,
    Record,
    check_envelope,
    missing_bytes,
    read_records,
    short_frame,
)
from meter_agent.readers.extras import import_extra
from meter_agent.readers.serial_port import open_port, port_is_gone
from meter_agent.readings import Clock, ReadFailure, Sample

MAX_TELEGRAMS: Final = 8
"""Answers that a meter may spread its records over; real ones use up to three."""

_BITS_PER_BYTE: Final = 11


class MBusLine:
    """One serial port with all meters on it. One request at a time, from any thread."""

    def __init__(
        self,
        port: Path,
        baud: int,
        parity: Literal["N", "E", "O"],
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.port = port
        self.baud = baud
        self.parity = parity
        self._monotonic_s = monotonic_s
        self._handle: serial.Serial | None = None
        self.lock = threading.RLock()

    def exchange(self, meter: str, request: bytes, timeout_s: float) -> bytes:
        """Send a request and return the acknowledgement or long frame that answers it.

        Raises ReadFailure if the port cannot be used, MalformedFrame if no frame comes within `timeout_s`.
        """
        with self.lock:
            if self._handle is None:
                self._handle = open_port(meter, self.port, self.baud, self.parity)
            try:
                self._handle.reset_input_buffer()
                self._handle.write(request)
                return self._receive(self._handle, request, timeout_s)
            except (OSError, termios.error) as error:
                self.close()
                raise ReadFailure(meter, port_is_gone(str(self.port), error)) from error

    def close(self) -> None:
        """Let go of the port; the next exchange opens it again."""
        with self.lock:
            if self._handle is not None:
                self._handle.close()
                self._handle = None

    def _receive(self, handle: serial.Serial, request: bytes, timeout_s: float) -> bytes:
        longest_s = timeout_s + (len(request) + MAX_FRAME_BYTES) * _BITS_PER_BYTE / self.baud
        deadline_s = self._monotonic_s() + longest_s
        received = b""
        while True:
            # Some level converters echo what is sent.
            answer = received.removeprefix(request)
            missing = missing_bytes(answer)
            if missing == 0:
                return answer
            wait_s = min(timeout_s, max(0.0, deadline_s - self._monotonic_s()))
            readable, _, _ = select.select([handle.fileno()], [], [], wait_s)
            data: bytes = handle.read(missing) if readable else b""
            if not data:
                what = f"after {len(answer)} bytes" if answer else "at all"
                kind = MalformedFrame if answer else NoAnswer
                raise kind(f"no answer {what} within {timeout_s:g} s; check address, baud rate and wiring")
            received += data


class MBusReader:
    """Reads one meter. Implements MeterReader. `library` is the module meterbus."""

    def __init__(self, meter: str, config: MBusConfig, line: MBusLine, clock: Clock, library: Any) -> None:
        self._meter = meter
        self._config = config
        self._line = line
        self._clock = clock
        self._library = library

    def sample(self) -> Sample:
        """Ask the meter for all its records. Raises ReadFailure."""
        try:
            with self._line.lock:
                frames = self._ask()
            header, records = self._taken_apart(frames)
            reading = read_records(header, records, self._config.export_subunit)
        except MalformedFrame as error:
            self._line.close()
            raise ReadFailure(self._meter, error.reason) from error
        return Sample(
            monotonic_s=self._clock.monotonic_s(),
            time_s=self._clock.time_s(),
            import_mwh=reading.import_mwh,
            export_mwh=reading.export_mwh,
            power_w=reading.power_w,
            serial_number=reading.serial_number,
            import_rollover_mwh=reading.import_rollover_mwh,
            export_rollover_mwh=reading.export_rollover_mwh,
        )

    def close(self) -> None:
        """Let go of the port; whoever needs it opens it again."""
        self._line.close()

    def _ask(self) -> list[bytes]:
        """The frames of one answer; the line is ours meanwhile."""
        address = self._config.address
        if self._exchange(short_frame(SND_NKE, address)) != bytes([ACKNOWLEDGE]):
            raise MalformedFrame("the meter does not acknowledge; a late answer to an earlier request?")
        frames: list[bytes] = []
        control = REQ_UD2 | FRAME_COUNT_BIT
        while len(frames) < MAX_TELEGRAMS:
            frame = self._exchange(short_frame(control, address))
            check_envelope(frame, address)
            frames.append(frame)
            if not self._parsed(frame).more_records_follow:
                return frames
            control ^= FRAME_COUNT_BIT
        raise MalformedFrame(f"the meter's answer does not end after {MAX_TELEGRAMS} frames")

    def _exchange(self, request: bytes) -> bytes:
        return self._line.exchange(self._meter, request, self._config.timeout_s)

    def _parsed(self, frame: bytes) -> Any:
        try:
            return self._library.TelegramLong.parse(list(frame))
        except (self._library.exceptions.MBusError, LookupError, ValueError, UnboundLocalError) as error:
            # What it raises for records that end too early, besides its own errors.
            raise MalformedFrame(f"the answer's records cannot be taken apart ({type(error).__name__})") from error

    def _taken_apart(self, frames: list[bytes]) -> tuple[Header, list[Record]]:
        headers: set[Header] = set()
        records: list[Record] = []
        for frame in frames:
            telegram = self._parsed(frame)
            body = telegram.body.bodyHeader
            headers.add(
                Header(
                    telegram.manufacturer,
                    bytes(body.id_nr).hex(),
                    body.measure_medium_field.parts[0],
                    body.status_field.parts[0],
                )
            )
            records += [
                Record(bytes(record.dib.parts), bytes(record.vib.parts), bytes(record.dataField.parts))
                for record in telegram.records
            ]
        if len(headers) != 1:
            raise MalformedFrame("the frames of one answer are of different meters; do two have one address?")
        return headers.pop(), records


def create_mbus_reader(meter: NamedMeter, config: MBusConfig, clock: Clock, lines: dict[str, MBusLine]) -> MBusReader:
    """The reader of one meter, on the line that others may share. Opens nothing yet.

    Raises WrongValue where pyMeterBus is not installed, or meters set one line differently.
    """
    library = import_meterbus(meter.name)
    line = lines.setdefault(str(config.port), MBusLine(config.port, config.baud, config.parity))
    for key, ours, theirs in (("baud", config.baud, line.baud), ("parity", config.parity, line.parity)):
        if ours != theirs:
            raise WrongValue(f"meters.{meter.name}.reader.{key}", f"the same {key} for all meters on {config.port}")
    return MBusReader(meter.name, config, line, clock, library)


def import_meterbus(meter: str) -> Any:
    """The library. It sets up the root logger when it is imported, which is ours to do, so that is undone."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        return import_extra(meter, "meterbus", "mbus")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
