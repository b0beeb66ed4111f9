"""One meter that counts in both directions, configured as two: one read serves both.

A house with a solar roof has one meter with an import and an export register, and two meters for its agent: one that
demands and one that provides. Both name the same reader, so it is made once, and each of them gets each sample once.
"""

import threading
from typing import Final

from meter_agent.readings import Clock, MeterReader, Sample

SHARED_FOR_S: Final = 1.0
"""A sample this old is handed on; whoever asks later gets a new one."""


class SharedReader:
    """Stands before the reader that several meters use. `view` gives each of them its own."""

    def __init__(self, reader: MeterReader, clock: Clock) -> None:
        self._reader = reader
        self._clock = clock
        # Held while the meter is read: who asks meanwhile gets the same sample.
        self._lock = threading.Lock()
        self._newest: Sample | None = None
        self._had_newest: set[str] = set()

    def view(self, meter: str) -> "SharedView":
        """What the meter of this name reads by."""
        return SharedView(self, meter)

    def sample(self, meter: str) -> Sample:
        """The newest sample, if it is fresh and this meter has not had it yet; else a new one. Raises ReadFailure."""
        with self._lock:
            sample = self._newest
            if (
                sample is None
                or meter in self._had_newest
                or self._clock.monotonic_s() - sample.monotonic_s > SHARED_FOR_S
            ):
                sample = self._newest = self._reader.sample()
                self._had_newest.clear()
            self._had_newest.add(meter)
            return sample

    def close(self) -> None:
        """Let go of the port; the next `sample` opens it again."""
        self._reader.close()


class SharedView:
    """The shared reader as one meter sees it. Implements MeterReader."""

    def __init__(self, shared: SharedReader, meter: str) -> None:
        self._shared = shared
        self._meter = meter

    def sample(self) -> Sample:
        """Each sample of the meter at most once. Raises ReadFailure."""
        return self._shared.sample(self._meter)

    def close(self) -> None:
        """Close the reader for all that share it."""
        self._shared.close()
