"""Market time: intervals aligned to UTC and the two gates that follow each. Pure arithmetic on epoch seconds."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Interval:
    """A half-open span `[start_s, end_s)` of UTC epoch seconds."""

    start_s: int
    end_s: int

    @property
    def length_s(self) -> int:
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class MarketCalendar:
    """How market time runs on one ledger: fixed in its genesis.

    `gate_1_s` and `gate_2_s` count from the end of an interval; gate 2 comes no later than the end of the next
    interval, so intervals are cleared one after the other and a consumer's history is whole when the next is decided.
    """

    interval_s: int
    gate_1_s: int
    gate_2_s: int

    def __post_init__(self) -> None:
        if self.interval_s not in (900, 1800, 3600):
            raise ValueError(f"interval_s is {self.interval_s}, expected 900, 1800 or 3600")
        if not 0 < self.gate_1_s < self.gate_2_s <= self.interval_s:
            raise ValueError("expected 0 < gate_1_s < gate_2_s <= interval_s")

    def interval_at(self, time_s: int) -> Interval:
        """The interval that contains `time_s`."""
        start_s = time_s - time_s % self.interval_s
        return Interval(start_s, start_s + self.interval_s)

    def is_interval(self, start_s: int, end_s: int) -> bool:
        """True if `[start_s, end_s)` is one market interval."""
        return start_s % self.interval_s == 0 and end_s - start_s == self.interval_s

    def gate_1_of(self, interval: Interval) -> int:
        """The time at which the interval's own clearing happens at the latest."""
        return interval.end_s + self.gate_1_s

    def gate_2_of(self, interval: Interval) -> int:
        """The time at which the shortage choice applies and the interval is closed."""
        return interval.end_s + self.gate_2_s
