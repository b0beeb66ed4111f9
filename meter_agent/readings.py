"""What a meter reader gives to the rest of the agent: samples of cumulative registers, or a failure that says why.

This is the whole agreement between `readers/` (which know wires and protocols) and the core (which knows intervals).
"""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Sample:
    """One successful read of a meter's registers.

    `monotonic_s` and `time_s` (UTC epoch) are of the agent's clock at the moment the reply was complete. Cumulative
    registers are exact integers in milli-watt-hours; None is a register that this meter does not have. `power_w` is the
    momentary power, import positive, and takes no part in the accounting. The rollovers are the mWh at which a register
    starts again at 0, None if that is not known.

    With `own_time` the times are the meter's: it noted the registers at a full half hour, and is asked later. Its
    monotonic time then runs with its calendar, so that a step of the agent's clock does not move what it noted.
    """

    monotonic_s: float
    time_s: float
    import_mwh: int | None
    export_mwh: int | None
    power_w: int | None = None
    serial_number: str | None = None
    import_rollover_mwh: int | None = None
    export_rollover_mwh: int | None = None
    own_time: bool = False


class ReadFailure(Exception):
    """A read that gave no value that the reader is sure of: `meter` is the configured name, `reason` what to do."""

    def __init__(self, meter: str, reason: str) -> None:
        super().__init__(f"{meter}: {reason}")
        self.meter = meter
        self.reason = reason


class Clock(Protocol):
    """Where the agent takes time from; see `clock.py` for the system's and the conductor's."""

    def monotonic_s(self) -> float:
        """Seconds that never step, from an arbitrary start."""
        ...

    def time_s(self) -> float:
        """UTC epoch seconds: calendar time, simulated where a conductor ticks."""
        ...


class MeterReader(Protocol):
    """Reads one meter. Used by one thread at a time.

    Of a meter that pushes its telegrams, `sample` returns the newest complete one received since the last call, or
    waits for the next up to its time limit.
    """

    def sample(self) -> Sample:
        """Read now, blocking at most for the reader's own time limit.

        Raises ReadFailure rather than return a value that is not sure.
        """
        ...

    def close(self) -> None:
        """Let go of port and socket. A reader may be closed more than once."""
        ...
