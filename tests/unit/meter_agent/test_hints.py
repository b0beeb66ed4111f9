"""Hints at the agent: which are believed, which are kept, and what they say of a moment."""

from dataclasses import replace

import pytest

from broker.protocol.envelope import Signer, seal
from broker.protocol.errors import ProtocolError
from broker.protocol.keys import generate_private_key
from broker.protocol.messages import Hint, Message, MeterStatus, SupplyLevel
from meter_agent.hints import hints_json, home_values, level_at, next_plentiful_s, read_hint, with_hint

BROKER = generate_private_key()
DAY_S = 86_400
DAY = 20_000 * DAY_S
SCARCE, SHORT, ENOUGH, PLENTIFUL = SupplyLevel
LEVELS = (SCARCE,) * 8 + (ENOUGH, PLENTIFUL, PLENTIFUL, SHORT) + (SCARCE,) * 12
HINT = Hint("house", DAY, DAY + DAY_S, DAY - DAY_S // 2, LEVELS)


def read(message: Message, meter: str = "house", ledger: str = "demo") -> Hint:
    known = {BROKER.public.key_id: Signer("east", BROKER.public)}
    return read_hint(seal(message, BROKER, ledger, "east"), meter, "demo", known.get)


def test_a_hint_of_our_broker_for_this_meter_is_believed() -> None:
    assert read(HINT) == HINT


@pytest.mark.parametrize(
    ("message", "meter", "ledger"),
    [
        (HINT, "barn", "demo"),
        (HINT, "house", "other"),
        (MeterStatus("house", True, DAY, 0), "house", "demo"),
        (replace(HINT, end_s=DAY + DAY_S // 2), "house", "demo"),
        (replace(HINT, levels=(SCARCE,) * 25), "house", "demo"),
    ],
)
def test_anything_else_is_refused(message: Message, meter: str, ledger: str) -> None:
    with pytest.raises(ProtocolError):
        read(message, meter, ledger)


def test_a_hint_of_somebody_else_is_refused() -> None:
    raw = seal(HINT, generate_private_key(), "demo", "east")
    with pytest.raises(ProtocolError):
        read_hint(raw, "house", "demo", {BROKER.public.key_id: Signer("east", BROKER.public)}.get)


def test_two_days_are_kept_and_the_last_word_for_each() -> None:
    def day(number: int, made_s: int = 0) -> Hint:
        return replace(HINT, start_s=DAY + number * DAY_S, end_s=DAY + (number + 1) * DAY_S, made_s=made_s)

    hints = with_hint(with_hint((), day(0)), day(1))
    assert hints == (day(0), day(1))
    assert with_hint(hints, day(2)) == (day(1), day(2))
    assert with_hint(hints, day(1, 7)) == (day(0), day(1, 7))
    # What was said before, or an older day, is no news.
    assert with_hint((day(0), day(1, 7)), day(1)) == (day(0), day(1, 7))
    assert with_hint(hints, day(-1)) == hints


@pytest.mark.parametrize(
    ("time_s", "level", "plentiful_s"),
    [
        (DAY - 1, None, DAY + 9 * 3_600),
        (DAY, SCARCE, DAY + 9 * 3_600),
        (DAY + 9 * 3_600 - 0.5, ENOUGH, DAY + 9 * 3_600),
        (DAY + 9 * 3_600, PLENTIFUL, DAY + 9 * 3_600),
        (DAY + 10 * 3_600, PLENTIFUL, DAY + 10 * 3_600),
        (DAY + 11 * 3_600, SHORT, None),
        (DAY + DAY_S - 1, SCARCE, None),
        (DAY + DAY_S, None, None),
    ],
)
def test_what_hints_say_of_a_moment(time_s: float, level: SupplyLevel | None, plentiful_s: int | None) -> None:
    assert level_at((HINT,), time_s) is level
    assert next_plentiful_s((HINT,), time_s) == plentiful_s


def test_what_people_and_the_home_are_shown() -> None:
    assert hints_json((), DAY) is None
    assert home_values((), DAY) == {}
    shown = hints_json((HINT,), DAY + 8 * 3_600)
    assert shown is not None
    assert (shown["level"], shown["next_plentiful_s"]) == ("enough", DAY + 9 * 3_600)
    assert shown["days"][0]["levels"][8:12] == ["enough", "plentiful", "plentiful", "short"]
    assert home_values((HINT,), DAY) == {"supply": b"scarce", "next_plentiful": b"2024-10-04T09:00:00Z"}
    assert home_values((HINT,), DAY + DAY_S) == {"supply": b"None", "next_plentiful": b"None"}
