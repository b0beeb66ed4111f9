"""The period that a command is asked about: a month, a day, or from one time to another."""

import argparse
from datetime import UTC, datetime
from typing import Final

from broker.market.windows import DAY_S, Span, Window, window_span
from broker.protocol.command_line import shown, time_s
from broker.protocol.market_time import Interval
from firmware_config.loader import WrongValue

_LAST_YEAR: Final = 9_998
"""So that the time after it is one, too."""


def add_period_options(parser: argparse.ArgumentParser) -> None:
    """`--month`, `--day`, or `--from` and `--to`."""
    parser.add_argument("--month", metavar="MONTH", help="a month in UTC, for example 2026-01")
    parser.add_argument("--day", metavar="DAY", help="a day in UTC, for example 2026-01-31")
    parser.add_argument(
        "--from",
        dest="from_s",
        type=time_s,
        metavar="TIME",
        help="in place of both: begin, for example 2026-01-31T00:00:00Z",
    )
    parser.add_argument("--to", dest="to_s", type=time_s, metavar="TIME", help="end, not included")


def period_of(options: argparse.Namespace) -> Span:
    """The period `[start_s, end_s)`. Raises WrongValue unless it is given in exactly one way."""
    given = [
        option
        for option, value in (("--month", options.month), ("--day", options.day), ("--from", options.from_s))
        if value is not None
    ]
    if len(given) != 1 or (options.from_s is None) != (options.to_s is None):
        raise WrongValue("--month", "a period: --month, or --day, or --from and --to")
    if options.month is not None:
        begin_s = _day_s("--month", f"{options.month}-01", "a month, for example 2026-01")
        return window_span(Window.MONTH, Interval(begin_s, begin_s + DAY_S))
    if options.day is not None:
        begin_s = _day_s("--day", options.day, "a day, for example 2026-01-31")
        return Span(begin_s, begin_s + DAY_S)
    return Span(options.from_s, options.to_s)


def _day_s(option: str, text: str, expected: str) -> int:
    try:
        day = datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        raise WrongValue(option, f"{expected}, got {shown(text)}") from None
    if not 1970 <= day.year <= _LAST_YEAR:
        raise WrongValue(option, f"a year from 1970 to {_LAST_YEAR}, got {day.year}")
    return int(day.timestamp())
