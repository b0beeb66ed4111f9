"""Arguments of command lines as values: what both programs take in the same way and refuse in the same words."""

import argparse
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Final

from broker.protocol.limits import MAX_INTEGER

_WHOLE: Final = re.compile(r"-?[0-9]{1,16}", re.ASCII)
_LONGEST_SHOWN: Final = 60


def whole_number(lowest: int = -MAX_INTEGER, highest: int = MAX_INTEGER) -> Callable[[str], int]:
    """An argument's type: a whole number from `lowest` to `highest`, both included."""

    def read(text: str) -> int:
        number = int(text) if _WHOLE.fullmatch(text) else None
        if number is None or not lowest <= number <= highest:
            raise argparse.ArgumentTypeError(f"expected a whole number {_span(lowest, highest)}, got {shown(text)}")
        return number

    return read


def _span(lowest: int, highest: int) -> str:
    return f"of {lowest} or more" if highest == MAX_INTEGER else f"from {lowest} to {highest}"


def time_s(text: str) -> int:
    """An argument's type: UTC epoch seconds of an ISO 8601 time with its zone, from 1970 on."""
    try:
        moment = datetime.fromisoformat(text)
        number = int(moment.timestamp())
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"expected a time as 2026-01-31T00:00:00Z, got {shown(text)}") from None
    if moment.tzinfo is None:
        raise argparse.ArgumentTypeError(f"expected a time with its zone, for example {moment.isoformat()}Z")
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected a time from 1970 on, got {shown(text)}")
    return number


def shown(text: str) -> str:
    """An argument as an error names it: quoted, and no longer than a line."""
    return repr(text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…")


def not_text(arguments: Sequence[str]) -> str | None:
    """What to tell about the first argument that is not UTF-8, and so fits in no file and no message; None if all are.

    Python hands such bytes on as lone surrogates (PEP 383).
    """
    for argument in arguments:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            return f"{shown(argument)} is not UTF-8; type it anew, or rename the file"
    return None
