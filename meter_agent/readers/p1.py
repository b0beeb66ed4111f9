"""Reads a DSMR P1 port, into which the meter pushes a telegram every 1 or 10 seconds.

A thread reads whatever comes and keeps only the newest whole telegram: a kernel buffer holds 4 kB, so without it a read
every 10 s would find old telegrams at the front and the newest ones lost. `sample()` first takes everything that is
readable at that moment, so what the meter wrote before the call is never missed, and no telegram is given out twice.
"""

import os
import select
import termios
import threading
import time
from collections.abc import Callable
from typing import Final

import serial

from meter_agent.config import P1Config
from meter_agent.framing.p1 import MalformedTelegram, P1Framer, P1Reading, parse_telegram
from meter_agent.readings import Clock, ReadFailure, Sample

CHUNK_BYTES: Final = 4_096
"""Read at most this much at once: the size of a Linux tty buffer."""

MAX_CHUNKS: Final = 16
"""Then the lock is given up for a moment, so that a line that never falls silent cannot keep `sample` waiting."""

FRESH_S: Final = 2.0
"""A telegram received within this time counts as the meter's state now; an older one is dated back to its arrival."""


class P1Reader:
    """Reads one P1 port. Implements MeterReader. `monotonic_s` is real time, as waiting for a wire always is."""

    def __init__(
        self, meter: str, config: P1Config, clock: Clock, monotonic_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._meter = meter
        self._config = config
        self._clock = clock
        self._monotonic_s = monotonic_s
        self._port: _Port | None = None

    def sample(self) -> Sample:
        """The newest telegram since the last call, or the next. Raises ReadFailure after `timeout_s` without one."""
        if self._port is None:
            self._port = self._open()
        received = self._port.newest(self._config.timeout_s)
        if isinstance(received, str):
            if self._port.failed:
                self.close()
            raise ReadFailure(self._meter, received)
        reading, arrived_s = received
        age_s = self._monotonic_s() - arrived_s
        behind_s = age_s if age_s > FRESH_S else 0.0
        return Sample(
            monotonic_s=self._clock.monotonic_s() - behind_s,
            time_s=self._clock.time_s() - behind_s,
            import_mwh=reading.import_mwh,
            export_mwh=reading.export_mwh,
            power_w=reading.power_w,
            serial_number=reading.equipment_id,
            import_rollover_mwh=reading.import_rollover_mwh,
            export_rollover_mwh=reading.export_rollover_mwh,
        )

    def close(self) -> None:
        """Let go of the port; the next `sample()` opens it again."""
        if self._port is not None:
            self._port.close()
            self._port = None

    def _open(self) -> "_Port":
        port = self._config.port
        try:
            handle = serial.Serial(str(port), baudrate=self._config.baud, timeout=0, exclusive=True)
        except (OSError, termios.error) as error:
            if not port.exists():
                reason = f"the serial port {port} is missing; is the cable plugged in? (see /dev/serial/by-id)"
            else:
                reason = (
                    f"the serial port {port} cannot be opened ({error}); is it in use, and is this user in dialout?"
                )
            raise ReadFailure(self._meter, reason) from error
        try:
            handle.reset_input_buffer()
        except (OSError, termios.error) as error:
            handle.close()
            raise ReadFailure(self._meter, f"the serial port {port} failed while it was opened ({error})") from error
        return _Port(handle, self._monotonic_s)


class _Port:
    """An open port, the thread that empties it, and the newest reading that came."""

    def __init__(self, handle: serial.Serial, monotonic_s: Callable[[], float]) -> None:
        self._handle = handle
        self._monotonic_s = monotonic_s
        self._framer = P1Framer()
        self._changed = threading.Condition()
        self._newest: tuple[P1Reading, float] | None = None
        self._failure: str | None = None
        self._malformed: str | None = None
        self._wake_reader, self._wake_writer = os.pipe()
        self._thread = threading.Thread(target=self._run, name=f"p1 {handle.port}", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """True once the port itself has failed and must be opened again."""
        return self._failure is not None

    def newest(self, timeout_s: float) -> tuple[P1Reading, float] | str:
        """The newest reading not yet given out and when it arrived, waiting for one; or why there is none."""
        with self._changed:
            self._drain()
            self._changed.wait_for(lambda: self._newest is not None or self.failed, timeout_s)
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
            self._failure = f"the serial port {self._handle.port} is gone ({error}); is the cable plugged in?"
            self._changed.notify_all()

    def _take(self, data: bytes) -> None:
        for telegram in self._framer.feed(data):
            try:
                reading = parse_telegram(telegram)
            except MalformedTelegram as error:
                self._malformed = error.reason
                continue
            self._newest = (reading, self._monotonic_s())
            self._changed.notify_all()

    def _why_nothing(self, timeout_s: float) -> str:
        refusal = self._malformed or self._framer.last_refusal
        self._malformed = self._framer.last_refusal = None
        if refusal is not None:
            return f"no whole telegram within {timeout_s:g} s; the last one was refused: {refusal}"
        return (
            f"no telegram within {timeout_s:g} s; does the meter's P1 port need to be switched on, and is baud right?"
        )
