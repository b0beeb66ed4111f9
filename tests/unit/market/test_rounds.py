"""Rounds between the gates: who is waited for, until when, and when there is nothing more to announce."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.market.rounds import LAST_ROUND, Heard, is_last, missing, round_limit_s


def heard(
    round_number: int, *, last: bool = False, asked: int = 0, open_wh: int = 0, open_before_wh: int | None = None
) -> Heard:
    return Heard(round_number, last, asked, open_wh, open_wh if open_before_wh is None else open_before_wh)


@pytest.mark.parametrize(
    ("round_number", "announced", "received", "waits"),
    [
        pytest.param(0, None, 0, True, id="who has not cleared"),
        pytest.param(0, heard(0), 0, False, id="who has cleared"),
        pytest.param(1, heard(0), 0, True, id="who is one round behind"),
        pytest.param(1, heard(1), 0, False, id="who is in the same round"),
        pytest.param(1, heard(1, asked=2), 1, True, id="who sent more orders than are here"),
        pytest.param(1, heard(1, asked=2), 2, False, id="whose orders are all here"),
        pytest.param(3, heard(1), 0, False, id="who fell behind when its time was up"),
        pytest.param(3, None, 0, False, id="who was never heard in this interval"),
        pytest.param(3, heard(1, last=True), 0, False, id="who has announced its last round"),
        pytest.param(3, heard(1, last=True, asked=1), 0, True, id="whose last round had an order that is not here"),
        pytest.param(1, heard(2, asked=5), 3, False, id="who is further, so has its answers of this round"),
    ],
)
def test_who_is_waited_for(round_number: int, announced: Heard | None, received: int, waits: bool) -> None:
    assert missing(round_number, {"east": announced}, {"east": received}) == (("east",) if waits else ())


def test_rounds_end_one_after_the_other_before_gate_2() -> None:
    limits = [round_limit_s(number, 600, 1_200) for number in range(LAST_ROUND + 2)]
    assert limits[:-1] == sorted(set(limits[:-1]))
    assert limits[0] > 600
    assert limits[-1] == limits[-2] < 1_200


def test_the_last_round_is_announced_when_nobody_can_ask_any_more() -> None:
    quiet = {"east": heard(0), "west": None}
    assert is_last(1, 0, 0, quiet)
    assert not is_last(0, 0, 0, quiet)
    assert is_last(0, 0, 0, {})
    assert not is_last(1, 5, 0, quiet)
    assert not is_last(1, 0, 1, quiet)
    assert not is_last(1, 0, 0, {"east": heard(0, open_wh=1)})
    # Whether a neighbour's word of this very round has come already or not makes no difference.
    assert not is_last(1, 0, 0, {"east": heard(1, open_wh=0, open_before_wh=1)})
    assert is_last(1, 0, 0, {"east": heard(1, open_wh=1, open_before_wh=0)})
    assert is_last(LAST_ROUND, 5, 1, {"east": heard(0, open_wh=1)})


@given(st.integers(2, 6), st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5))), st.randoms(use_true_random=False))
def test_brokers_in_step_never_wait_in_a_circle(count: int, links: set[tuple[int, int]], generator: Random) -> None:
    """Any network, any order of moves: everybody reaches the last round, never more than one ahead of a neighbour."""
    names = [f"broker-{number}" for number in range(count)]
    near: dict[str, set[str]] = {name: set() for name in names}
    for a, b in links:
        if a != b and max(a, b) < count:
            near[names[a]].add(names[b])
            near[names[b]].add(names[a])
    rounds = dict.fromkeys(names, 0)
    while min(rounds.values()) < LAST_ROUND:
        able = [
            name
            for name in names
            if rounds[name] < LAST_ROUND
            and not missing(rounds[name], {other: heard(rounds[other]) for other in near[name]}, {})
        ]
        assert able
        rounds[generator.choice(able)] += 1
        assert all(abs(rounds[name] - rounds[other]) <= 1 for name in names for other in near[name])
