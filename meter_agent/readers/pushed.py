"""Reads a serial port into which a meter pushes telegrams of its own accord, every second to every few minutes.

A thread reads whatever comes and keeps only the newest whole telegram: a kernel buffer holds 4 kB, so without it a read
every 10 s would find old telegrams at the front and the newest ones lost. `sample()` first takes everything that is
readable at that moment, so what the meter wrote before the call is never missed, and no telegram is given out twice.

What a telegram is and says is the business of a framing in `meter_agent/framing/`; P1, SML and pushed IEC 62056-21
differ in nothing else.
"""

import os
import select
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, Literal, Protocol, TypeVar

import serial

from meter_agent.framing.telegram import MalformedTelegram, TelegramReading
from meter_agent.readers.serial_port import open_port, port_is_gone
from meter_agent.readings import Clock, ReadFailure, Sample

CHUNK_BYTES: Final = 4_096
"""Read at most this much at once: the size of a Linux tty buffer."""

MAX_CHUNKS: Final = 16
"""Then the lock is given up for a moment, so that a line that never falls silent cannot keep `sample` waiting."""

FRESH_S: Final = 2.0
"""A telegram received within this time counts as the meter's state now; an older one is dated back to its arrival."""

T = TypeVar("T")
FramedT = TypeVar("FramedT", covariant=True)


class Framer(Protocol[FramedT]):
    """Cuts a stream of bytes into telegrams; `last_refusal` says why the last one that was not whole was refused."""

    last_refusal: str | None

    def feed(self, data: bytes) -> tuple[FramedT, ...]:
        """The telegrams that `data` completes, in order. Never raises, and holds a bounded number of bytes."""
        ...


@dataclass(frozen=True, slots=True)
class PushedProtocol(Generic[T]):
    """A framing: `parse` raises MalformedTelegram. `advice` is what the operator can do where nothing comes.

    Some meters send their counters only once an hour, and every few seconds a telegram without: for those `parse`
    returns None. If not even such a one comes within `silence_s`, waiting for counters is given up.
    """

    name: str
    make_framer: Callable[[], Framer[T]]
    parse: Callable[[T], TelegramReading | None]
    advice: str
    silence_s: float | None = None
    parity: Literal["N", "E", "O"] = "N"


class PushedReader(Generic[T]):
    """Reads one port. Implements MeterReader. `monotonic_s` is real time, as waiting for a wire always is."""

    def __init__(
        self,
        meter: str,
        port: Path,
        baud: int,
        timeout_s: float,
        protocol: PushedProtocol[T],
        clock: Clock,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._meter = meter
        self._path = port
        self._baud = baud
        self._timeout_s = timeout_s
        self._protocol = protocol
        self._clock = clock
        self._monotonic_s = monotonic_s
        self._port: _Port[T] | None = None

    def sample(self) -> Sample:
        """The newest telegram since the last call, or the next. Raises ReadFailure after the time limit without one."""
        if self._port is None:
            handle = open_port(self._meter, self._path, self._baud, self._protocol.parity)
            self._port = _Port(handle, self._protocol, self._monotonic_s)
        received = self._port.newest(self._timeout_s)
        if isinstance(received, str):
            if self._port.failed:
                self.close()
            raise ReadFailure(self._meter, received)
        reading, arrived_s = received
        age_s = self._monotonic_s() - arrived_s
        return sample_of(reading, self._clock, age_s if age_s > FRESH_S else 0.0)

    def close(self) -> None:
        """Let go of the port; the next `sample()` opens it again."""
        if self._port is not None:
            self._port.close()
            self._port = None


def sample_of(reading: TelegramReading, clock: Clock, age_s: float) -> Sample:
    """A reading as a sample that was taken `age_s` ago."""
    return Sample(
        monotonic_s=clock.monotonic_s() - age_s,
        time_s=clock.time_s() - age_s,
        import_mwh=reading.import_mwh,
        export_mwh=reading.export_mwh,
        power_w=reading.power_w,
        serial_number=reading.serial_number,
        import_rollover_mwh=reading.import_rollover_mwh,
        export_rollover_mwh=reading.export_rollover_mwh,
    )


class _Port(Generic[T]):
    """An open port, the thread that empties it, and the newest reading that came."""

    def __init__(self, handle: serial.Serial, protocol: PushedProtocol[T], monotonic_s: Callable[[], float]) -> None:
        self._handle = handle
        self._protocol = protocol
        self._monotonic_s = monotonic_s
        self._framer = protocol.make_framer()
        self._changed = threading.Condition()
        self._newest: tuple[TelegramReading, float] | None = None
        self._heard_s = monotonic_s()
        self._failure: str | None = None
        self._malformed: str | None = None
        self._wake_reader, self._wake_writer = os.pipe()
        self._thread = threading.Thread(target=self._run, name=f"{protocol.name} {handle.port}", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """True once the port itself has failed and must be opened again."""
        return self._failure is not None

    def newest(self, timeout_s: float) -> tuple[TelegramReading, float] | str:
        """The newest reading not yet given out and when it arrived, waiting for one; or why there is none."""
        with self._changed:
            self._drain()
            started_s = self._monotonic_s()
            while self._newest is None and not self.failed:
                limit_s, since_s = timeout_s, started_s
                if (
                    self._protocol.silence_s is not None
                    and self._heard_s + self._protocol.silence_s < since_s + limit_s
                ):
                    limit_s, since_s = self._protocol.silence_s, max(self._heard_s, started_s)
                left_s = since_s + limit_s - self._monotonic_s()
                if left_s <= 0:
                    return self._why_nothing(limit_s)
                self._changed.wait(left_s)
            if self._newest is not None:
                newest, self._newest = self._newest, None
                return newest
            return self._failure or self._why_nothing(timeout_s)

    def close(self) -> None:
        """Stop the thread and close the port."""
        os.close(self._wake_writer)
        self._thread.join()
        os.close(self._wake_reader)
        self._handle.close()

    def _run(self) -> None:
        while True:
            # Waits without the lock. The pipe becomes readable when `close` closes its other end.
            readable, _, _ = select.select([self._handle.fileno(), self._wake_reader], [], [])
            if self._wake_reader in readable:
                return
            with self._changed:
                self._drain()
                if self.failed:
                    return

    def _drain(self) -> None:
        """Take all bytes that can be read now. Called with the lock held."""
        if self.failed:
            return
        try:
            for _ in range(MAX_CHUNKS):
                data = self._handle.read(CHUNK_BYTES)
                if not data:
                    break
                self._take(data)
        except (OSError, termios.error) as error:
            self._failure = port_is_gone(self._handle.port, error)
            self._changed.notify_all()

    def _take(self, data: bytes) -> None:
        for telegram in self._framer.feed(data):
            try:
                reading = self._protocol.parse(telegram)
            except MalformedTelegram as error:
                self._malformed = error.reason
                continue
            self._heard_s = self._monotonic_s()
            if reading is not None:
                self._newest = (reading, self._heard_s)
            self._changed.notify_all()

    def _why_nothing(self, timeout_s: float) -> str:
        refusal = self._malformed or self._framer.last_refusal
        self._malformed = self._framer.last_refusal = None
        if refusal is not None:
            return f"no whole telegram within {timeout_s:g} s; the last one was refused: {refusal}"
        return f"no telegram within {timeout_s:g} s; {self._protocol.advice}"
