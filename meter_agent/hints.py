"""Hints from the broker: how well the consumer's contract will be supplied, interval by interval. Pure.

A hint speaks of one UTC day and comes the day before, so two are kept: today's and tomorrow's. What the broker made
later replaces what it made before for the same day. Hints decide nothing here; the home may shift its loads by them.
"""

from typing import Any, Final

from broker.protocol.envelope import KeyLookup, open_envelope
from broker.protocol.errors import MalformedMessage
from broker.protocol.messages import Hint, SupplyLevel
from meter_agent.shown import utc

MAX_KEPT: Final = 2
DAY_S: Final = 86_400
INTERVALS_OF_DAY: Final = (24, 48, 96)

LEVEL_NAMES: Final = tuple(level.name.lower() for level in SupplyLevel)
"""The levels as people see them, by their number."""

UNKNOWN: Final = b"None"
"""What tells Home Assistant that a sensor has no value now."""


def read_hint(raw: bytes, meter: str, ledger: str, lookup: KeyLookup) -> Hint:
    """A hint that came on this meter's topic. Raises ProtocolError unless our broker signed it, for this meter."""
    hint = open_envelope(raw, ledger, lookup).message
    if not isinstance(hint, Hint):
        raise MalformedMessage("hint", f"a hint, got a {hint.TYPE.name.lower()}")
    if hint.meter != meter:
        raise MalformedMessage("hint.meter", f"{meter}, got {hint.meter}")
    if hint.end_s - hint.start_s != DAY_S or len(hint.levels) not in INTERVALS_OF_DAY:
        raise MalformedMessage("hint.levels", "one for each market interval of one day")
    return hint


def with_hint(known: tuple[Hint, ...], hint: Hint) -> tuple[Hint, ...]:
    """The hints to keep, by their days: those of the last two, and for each day the one that was made last."""
    same = next((each for each in known if each.start_s == hint.start_s), None)
    if same is not None and same.made_s >= hint.made_s:
        return known
    others = [each for each in known if each.start_s != hint.start_s]
    return tuple(sorted([*others, hint], key=lambda each: each.start_s)[-MAX_KEPT:])


def level_at(hints: tuple[Hint, ...], time_s: float) -> SupplyLevel | None:
    """The level of the interval that contains this moment; None if no hint speaks of it."""
    for hint in hints:
        if hint.start_s <= time_s < hint.end_s:
            return hint.levels[int(time_s - hint.start_s) * len(hint.levels) // DAY_S]
    return None


def next_plentiful_s(hints: tuple[Hint, ...], time_s: float) -> int | None:
    """The start of the first plentiful interval that is not over; None if none is hinted at."""
    for hint in hints:
        interval_s = DAY_S // len(hint.levels)
        for index, level in enumerate(hint.levels):
            start_s = hint.start_s + index * interval_s
            if level is SupplyLevel.PLENTIFUL and start_s + interval_s > time_s:
                return start_s
    return None


def hints_json(hints: tuple[Hint, ...], time_s: float) -> dict[str, Any] | None:
    """For `meter-agent status`: the level now, when it will be plentiful, and the days; None without any hint."""
    if not hints:
        return None
    level = level_at(hints, time_s)
    return {
        "level": None if level is None else LEVEL_NAMES[level],
        "next_plentiful_s": next_plentiful_s(hints, time_s),
        "days": [
            {"start_s": hint.start_s, "end_s": hint.end_s, "levels": [LEVEL_NAMES[level] for level in hint.levels]}
            for hint in hints
        ],
    }


def home_values(hints: tuple[Hint, ...], time_s: float) -> dict[str, bytes]:
    """For the home, by the last level of the topic; nothing as long as no hint has come."""
    if not hints:
        return {}
    level, plentiful_s = level_at(hints, time_s), next_plentiful_s(hints, time_s)
    return {
        "supply": UNKNOWN if level is None else LEVEL_NAMES[level].encode(),
        "next_plentiful": UNKNOWN if plentiful_s is None else utc(plentiful_s).encode(),
    }
