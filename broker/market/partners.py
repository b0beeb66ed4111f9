"""What a broker remembers of each neighbour, to choose whom to ask: a small record that fades. Pure, integers.

Counts are kept in thousandths (COUNT_UNIT) and lose one part in FADE_PARTS with every market interval, so a record
tells of about the last day, and what was long ago is forgotten. `trust_ppm` is the part of what was asked that was
given, with a little good will added so that a stranger is tried.

A neighbour that let MAX_TIMEOUTS orders in a row run out of time is left alone: its circuit is open. After a while in
market time one order tries it again (half open); if that is answered the circuit closes, else the while is doubled.
"""

from dataclasses import astuple, dataclass, replace
from typing import Final, Self

from broker.protocol import cbor

COUNT_UNIT: Final = 1_000
FADE_PARTS: Final = 64
MAX_TIMEOUTS: Final = 3
FIRST_PAUSE_INTERVALS: Final = 2
MAX_PAUSE_INTERVALS: Final = 96
"""Two days of half hours: a neighbour that comes back is found within that time."""

_GOOD_WILL_WH: Final = 1_000
_FIELDS: Final = 10


@dataclass(frozen=True, slots=True)
class PartnerRecord:
    """How a neighbour has dealt with this broker's orders.

    `asked` to `timeouts` are counts of orders in thousandths and `asked_wh`, `given_wh` are Wh, all of them faded up to
    the interval that starts at `faded_s`. `in_a_row` are the orders that ran out of time since the last answer, and
    `pause_intervals` how long the circuit was opened the last time, until `open_until_s` (0: it is closed).
    """

    faded_s: int = 0
    asked: int = 0
    answered: int = 0
    refused: int = 0
    asked_wh: int = 0
    given_wh: int = 0
    timeouts: int = 0
    in_a_row: int = 0
    pause_intervals: int = 0
    open_until_s: int = 0

    def faded(self, start_s: int, interval_s: int) -> Self:
        """The record as of a later interval; the same if it is that or an earlier one."""
        intervals = min((start_s - self.faded_s) // interval_s, 64 * FADE_PARTS) if self.faded_s else 0
        values = [self.asked, self.answered, self.refused, self.asked_wh, self.given_wh, self.timeouts]
        for _ in range(intervals):
            if not any(values):
                break
            # Rounded up, so that the last unit goes too.
            values = [value - -(-value // FADE_PARTS) for value in values]
        return replace(
            self,
            faded_s=max(self.faded_s, start_s),
            asked=values[0],
            answered=values[1],
            refused=values[2],
            asked_wh=values[3],
            given_wh=values[4],
            timeouts=values[5],
        )

    def after_answer(self, asked_wh: int, given_wh: int) -> Self:
        """An order of `asked_wh` has ended with an answer, and `given_wh` (perhaps none) under it."""
        return replace(
            self,
            asked=self.asked + COUNT_UNIT,
            answered=self.answered + COUNT_UNIT,
            refused=self.refused + (0 if given_wh else COUNT_UNIT),
            asked_wh=self.asked_wh + asked_wh,
            given_wh=self.given_wh + min(given_wh, asked_wh),
            in_a_row=0,
            pause_intervals=0,
            open_until_s=0,
        )

    def after_timeout(self, asked_wh: int, start_s: int, interval_s: int) -> Self:
        """An order of the interval that starts at `start_s` ran out of time."""
        in_a_row = self.in_a_row + 1
        pause, open_until_s = self.pause_intervals, self.open_until_s
        # Several orders of one interval that run out are one failure of the probe.
        if in_a_row >= MAX_TIMEOUTS and start_s >= open_until_s:
            pause = min(max(FIRST_PAUSE_INTERVALS, 2 * pause), MAX_PAUSE_INTERVALS)
            open_until_s = start_s + (1 + pause) * interval_s
        return replace(
            self,
            asked=self.asked + COUNT_UNIT,
            asked_wh=self.asked_wh + asked_wh,
            timeouts=self.timeouts + COUNT_UNIT,
            in_a_row=in_a_row,
            pause_intervals=pause,
            open_until_s=open_until_s,
        )

    def is_left_alone(self, start_s: int) -> bool:
        """True if the circuit is open for the interval that starts at `start_s`: it is neither asked nor waited for."""
        return start_s < self.open_until_s

    @property
    def is_on_trial(self) -> bool:
        """True once a circuit has been open and no answer has come since: one order at a time tries it."""
        return self.pause_intervals > 0

    @property
    def trust_ppm(self) -> int:
        """How much of an order is to be expected, from 0 to 1 000 000."""
        return (self.given_wh + _GOOD_WILL_WH) * 1_000_000 // (self.asked_wh + _GOOD_WILL_WH)

    def to_bytes(self) -> bytes:
        """The stored form."""
        return cbor.encode(list(astuple(self)))

    @classmethod
    def from_bytes(cls, raw: bytes) -> Self:
        """Read the stored form. Raises MalformedMessage."""
        return cls(*cbor.decode(raw, "partner record", 1_024)[:_FIELDS])
