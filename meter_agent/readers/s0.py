"""Counts the pulses of a meter's S0 output on a GPIO line, by edge events: the kernel notes every edge, so none is
missed however busy the machine is, and nothing polls.

The library `gpiod` (extra `gpio`, LGPL, version 2) requests the line with the kernel's debounce. A thread takes edges
out of the kernel's queue as they come. The kernel numbers them: a gap in the numbers means that its queue ran over, and
then a new count starts, as it does after a crash or a power cut. See `framing.pulses`.

The state file is read and removed when the line is opened, and written when it is closed: a memory card is written
twice for a restart of the agent, and never in between.
"""

import os
import secrets
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from meter_agent.config import NamedMeter, S0Config
from meter_agent.framing.pulses import (
    MAX_STATE_BYTES,
    PulseCount,
    StoredCount,
    decode_state,
    encode_state,
    energy_mwh,
    resumed,
)
from meter_agent.readers.extras import import_extra
from meter_agent.readings import Clock, ReadFailure, Sample

QUEUED_EDGES: Final = 1_024
"""Edges that the kernel keeps for us. At 10 000 pulses a kWh and 30 kW that is 12 s."""

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class Edge(Protocol):
    """What is used of gpiod.EdgeEvent."""

    @property
    def line_seqno(self) -> int:
        """Numbers a line's edges from 1."""
        ...


class Line(Protocol):
    """What is used of gpiod.LineRequest: a line of which active edges are noted."""

    def fileno(self) -> int:
        """Readable when edges wait."""
        ...

    def read_edge_events(self) -> list[Any]:
        """The edges that wait, in order; blocks if there are none. Raises OSError."""
        ...

    def release(self) -> None:
        """Let go of the line."""
        ...


class S0Reader:
    """Counts one line. Implements MeterReader. `request_line` raises OSError; `boot_time_s` goes on during suspend."""

    def __init__(
        self,
        meter: str,
        register: Literal["import", "export"],
        config: S0Config,
        clock: Clock,
        request_line: Callable[[], Line],
        boot: Callable[[], str],
        boot_time_s: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
    ) -> None:
        self._meter = meter
        self._register = register
        self._config = config
        self._clock = clock
        self._request_line = request_line
        self._boot = boot
        self._boot_time_s = boot_time_s
        self._counter: _Counter | None = None

    def sample(self) -> Sample:
        """The count of now. The first call opens the line. Raises ReadFailure."""
        if self._counter is None:
            self._counter = self._opened()
        count = self._counter.read()
        if isinstance(count, str):
            self.close()
            raise ReadFailure(self._meter, count)
        counted_mwh = energy_mwh(count.pulses, self._config.pulses_per_kwh)
        return Sample(
            monotonic_s=self._clock.monotonic_s(),
            time_s=self._clock.time_s(),
            import_mwh=counted_mwh if self._register == "import" else None,
            export_mwh=counted_mwh if self._register == "export" else None,
            serial_number=count.serial_number,
        )

    def close(self) -> None:
        """Stop counting, and put the count down for a restart that comes soon."""
        if self._counter is None:
            return
        counter, self._counter = self._counter, None
        count = counter.stop()
        if isinstance(count, PulseCount):
            stored = StoredCount(count, self._boot(), self._boot_time_s(), self._config.pulses_per_kwh)
            new = self._config.state_file.with_name(self._config.state_file.name + ".new")
            # A count that cannot be put down costs one interval; the line must be let go all the same.
            with suppress(OSError):
                new.write_bytes(encode_state(stored))
                new.replace(self._config.state_file)

    def _opened(self) -> "_Counter":
        try:
            line = self._request_line()
        except OSError as error:
            reason = (
                f"GPIO line {self._config.line} of {self._config.chip} cannot be used ({error}); "
                "does it exist, is it free, and is this user in the group gpio?"
            )
            raise ReadFailure(self._meter, reason) from error
        return _Counter(line, self._resumed() or PulseCount(f"s0-{secrets.token_hex(4)}", 0))

    def _resumed(self) -> PulseCount | None:
        path = self._config.state_file
        try:
            with path.open("rb") as file:
                stored = decode_state(file.read(MAX_STATE_BYTES))
            # Good for one start: after a crash it must not be found again.
            path.unlink()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ReadFailure(self._meter, f"the state file {path} cannot be read and removed ({error})") from error
        return resumed(stored, self._boot(), self._boot_time_s(), self._config.pulses_per_kwh)


class _Counter:
    """An open line and the thread that counts its edges."""

    def __init__(self, line: Line, start: PulseCount) -> None:
        self._line = line
        self._count = start
        self._last_edge = 0
        self._failure: str | None = None
        self._lock = threading.Lock()
        self._wake_reader, self._wake_writer = os.pipe()
        self._thread = threading.Thread(target=self._run, name="s0", daemon=True)
        self._thread.start()

    def read(self) -> PulseCount | str:
        """The count with all edges that the kernel has noted so far, or why counting has ended."""
        with self._lock:
            self._take()
            return self._failure or self._count

    def stop(self) -> PulseCount | str:
        """Count what is left and let go of the line."""
        os.close(self._wake_writer)
        self._thread.join()
        os.close(self._wake_reader)
        last = self.read()
        self._line.release()
        return last

    def _run(self) -> None:
        while True:
            readable, _, _ = select.select([self._line.fileno(), self._wake_reader], [], [])
            if self._wake_reader in readable:
                return
            with self._lock:
                self._take()
                if self._failure is not None:
                    return

    def _take(self) -> None:
        """Count the edges that wait. Called with the lock held."""
        if self._failure is not None:
            return
        try:
            while select.select([self._line.fileno()], [], [], 0)[0]:
                for edge in self._line.read_edge_events():
                    self._note(edge)
        except OSError as error:
            self._failure = f"the GPIO line fails ({error})"

    def _note(self, edge: Edge) -> None:
        if edge.line_seqno != self._last_edge + 1:
            # Edges were lost: what was counted before does not connect to what comes.
            self._count = PulseCount(f"s0-{secrets.token_hex(4)}", 0)
        self._last_edge = edge.line_seqno
        self._count = PulseCount(self._count.serial_number, self._count.pulses + 1)


def create_s0_reader(meter: NamedMeter, config: S0Config, clock: Clock) -> S0Reader:
    """The reader of one line. Opens nothing yet. Raises WrongValue where gpiod is not installed."""
    gpiod = import_extra(meter.name, "gpiod", "gpio")

    def request_line() -> Line:
        settings = gpiod.LineSettings(
            direction=gpiod.line.Direction.INPUT,
            edge_detection=gpiod.line.Edge.RISING,
            active_low=config.active_low,
            bias=gpiod.line.Bias[config.bias.upper()],
            debounce_period=timedelta(milliseconds=config.debounce_ms),
        )
        line: Line = gpiod.request_lines(
            str(config.chip), {config.line: settings}, consumer="meter-agent", event_buffer_size=QUEUED_EDGES
        )
        return line

    register = meter.config.register_name
    return S0Reader(meter.name, register, config, clock, request_line, lambda: _BOOT_ID.read_text("ascii").strip())
