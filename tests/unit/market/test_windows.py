"""Windows: which generation fits a demand."""

from datetime import UTC, datetime

import pytest

from broker.ledger.operations import Window as LedgerWindow
from broker.market.windows import Span, Window, window_span
from broker.protocol.market_time import Interval


def utc(*when: int) -> int:
    return int(datetime(*when, tzinfo=UTC).timestamp())  # type: ignore[misc, arg-type]


def test_the_market_and_the_ledger_number_windows_alike() -> None:
    assert {window.name: int(window) for window in Window} == {window.name: int(window) for window in LedgerWindow}


@pytest.mark.parametrize(
    ("window", "span"),
    [
        (Window.INTERVAL, (utc(2024, 2, 29, 23, 30), utc(2024, 3, 1))),
        (Window.DAY, (utc(2024, 2, 29), utc(2024, 3, 1))),
        (Window.MONTH, (utc(2024, 2, 1), utc(2024, 3, 1))),
    ],
)
def test_days_and_months_are_those_of_utc(window: Window, span: tuple[int, int]) -> None:
    last = utc(2024, 2, 29, 23, 30)
    assert window_span(window, Interval(last, last + 1_800)) == Span(*span)


def test_december_ends_with_the_year() -> None:
    start_s = utc(2025, 12, 3)
    assert window_span(Window.MONTH, Interval(start_s, start_s + 900)) == Span(utc(2025, 12, 1), utc(2026, 1, 1))
