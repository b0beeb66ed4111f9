"""How close in time generation must match consumption: the window of a contract, and which intervals lie in it.

Days and months are those of UTC. All windows end at an interval's end, since a market interval divides the hour.
"""

from datetime import UTC, date, datetime
from enum import IntEnum
from functools import lru_cache
from typing import Final, NamedTuple

from broker.protocol.limits import MAX_INTEGER
from broker.protocol.market_time import Interval

DAY_S: Final = 86_400
EPOCH_DAY: Final = date(1970, 1, 1).toordinal()


class Window(IntEnum):
    """The span around a demand's interval from which energy may come. The number is the ledger's code for it."""

    INTERVAL = 0
    DAY = 1
    MONTH = 2

    @property
    def label(self) -> str:
        """The name in configs and pages, for example `day`."""
        return self.name.lower()


class Span(NamedTuple):
    """UTC epoch seconds `[start_s, end_s)`: what lies in it may serve a demand."""

    start_s: int
    end_s: int


ALWAYS: Final = Span(0, MAX_INTEGER)


def window_span(window: Window, interval: Interval) -> Span:
    """The span whose generation fits a demand of this interval."""
    if window is Window.INTERVAL:
        return Span(interval.start_s, interval.end_s)
    return _long_span(window, interval.start_s // DAY_S)


@lru_cache(maxsize=64)
def _long_span(window: Window, day: int) -> Span:
    if window is Window.DAY:
        return Span(day * DAY_S, (day + 1) * DAY_S)
    first = datetime.fromtimestamp(day * DAY_S, UTC).date().replace(day=1)
    after = first.replace(year=first.year + first.month // 12, month=first.month % 12 + 1)
    return Span((first.toordinal() - EPOCH_DAY) * DAY_S, (after.toordinal() - EPOCH_DAY) * DAY_S)
