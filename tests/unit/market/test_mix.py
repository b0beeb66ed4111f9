"""The mix decision: worked examples, and what holds for every history and demand."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.market.contracts import WHOLE_PPM, History
from broker.market.mix import apportion, plain_shares, quotas
from broker.protocol.messages import NO_LINE

SOLAR_WIND_ANY = (400_000, 300_000, 300_000)
MANY = (90_910,) * 10 + (90_900,)


@pytest.mark.parametrize(
    ("total", "weights", "shares"),
    [
        (0, [1, 2], [0, 0]),
        (0, [0, 0], [0, 0]),
        (0, [], []),
        (10, [1, 1], [5, 5]),
        (10, [2, 1], [7, 3]),
        (1, [1, 1, 1], [1, 0, 0]),
        (2, [1, 1, 1], [1, 1, 0]),
        (5, [0, 3, 0, 7], [0, 2, 0, 3]),
        (100, [1, 1, 1], [34, 33, 33]),
        (7, [7, 0], [7, 0]),
    ],
)
def test_apportioning_by_largest_remainder(total: int, weights: list[int], shares: list[int]) -> None:
    assert apportion(total, weights) == shares


@pytest.mark.parametrize(("total", "weights"), [(1, [0, 0]), (1, []), (-1, [1])])
def test_apportioning_what_cannot_be_divided_is_refused(total: int, weights: list[int]) -> None:
    with pytest.raises(ValueError, match="cannot divide"):
        apportion(total, weights)


@given(st.integers(0, 2**53), st.lists(st.integers(0, 2**53), min_size=1, max_size=40).filter(any))
def test_apportioned_shares_add_up_and_are_within_one_of_the_exact_share(total: int, weights: list[int]) -> None:
    shares = apportion(total, weights)
    assert sum(shares) == total
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - Fraction(total * weight, sum(weights))) < 1
        assert share == 0 or weight > 0


@given(st.lists(st.integers(0, 1_000), min_size=1, max_size=20).filter(any), st.data())
def test_nobody_is_apportioned_more_than_wanted_while_there_is_not_enough(
    wants: list[int], data: st.DataObject
) -> None:
    total = data.draw(st.integers(0, sum(wants)))
    assert all(share <= want for share, want in zip(apportion(total, wants), wants, strict=True))


# Shares, Wh by line and total so far, demand: the quotas. docs/market.md explains the first ones step by step.
WORKED = {
    "nothing delivered yet: the plain shares": (SOLAR_WIND_ANY, (0, 0, 0), 0, 1_000, (400, 300, 300)),
    "the odd Wh goes to the line furthest behind": (SOLAR_WIND_ANY, (0, 0, 0), 0, 1, (1, 0, 0)),
    "the next one to the next, in contract order": (SOLAR_WIND_ANY, (1, 0, 0), 1, 1, (0, 1, 0)),
    "and then to the last": (SOLAR_WIND_ANY, (1, 1, 0), 2, 1, (0, 0, 1)),
    "no demand, no quota": (SOLAR_WIND_ANY, (5, 1, 9), 15, 0, (0, 0, 0)),
    "one line takes all": ((WHOLE_PPM,), (123,), 123, 77, (77,)),
    "solar by night: it stays behind, and the others are ahead until it comes": (
        SOLAR_WIND_ANY, (0, 3_000, 3_000), 6_000, 500, (500, 0, 0),
    ),
    "solar by day: it catches up first": (SOLAR_WIND_ANY, (2_400, 3_000, 3_000), 8_400, 500, (500, 0, 0)),
    "almost caught up: the others begin again": (SOLAR_WIND_ANY, (3_600, 3_000, 3_000), 9_600, 500, (440, 30, 30)),
    "one line ahead, two share what it leaves, the odd Wh to whoever is furthest behind": (
        SOLAR_WIND_ANY, (100, 500, 200), 800, 500, (345, 0, 155),
    ),
    "wind out for three weeks, replaced by substitutes outside the lines": (
        (400_000, 600_000), (40_000, 0), 100_000, 1_000, (6, 994),
    ),
    "a line that is far ahead gets nothing": ((500_000, 500_000), (1_000, 9_000), 10_000, 1_000, (1_000, 0)),
    "a contract changed after two years starts afresh": ((100_000, 900_000), (0, 0), 0, 480, (48, 432)),
    "without the fresh start the old mix would be paid back for years": (
        (100_000, 900_000), (7_000_000, 3_000_000), 10_000_000, 480, (0, 480),
    ),
    "eleven lines": (MANY, (0,) * 11, 0, 11, (1,) * 11),
    "eleven lines, fewer Wh than lines": (MANY, (0,) * 11, 0, 3, (1, 1, 1) + (0,) * 8),
    "a tiny share gets its Wh when its time has come": ((999_999, 1), (600_000, 0), 600_000, 1, (0, 1)),
    "and not before": ((999_999, 1), (400_000, 0), 400_000, 1, (1, 0)),
    "a year of a large factory": ((333_333, 666_667), (0, 0), 0, 2**52, (1501198374590290, 3002401252780206)),
}  # fmt: skip


@pytest.mark.parametrize("case", WORKED)
def test_worked_example(case: str) -> None:
    lines_ppm, by_line, total, demand_wh, expected = WORKED[case]
    assert quotas(lines_ppm, History(by_line, total), demand_wh) == expected


@st.composite
def shares_of_a_contract(draw: st.DrawFn) -> tuple[int, ...]:
    """1 to 14 shares (every source and group), among them very small and very large ones."""
    weights = draw(st.lists(st.sampled_from([1, 2, 5, 30, 400, 30_000]), min_size=1, max_size=14))
    weights = [weight * draw(st.integers(900, 1_100)) for weight in weights]
    return tuple(share + 1 for share in apportion(WHOLE_PPM - len(weights), weights))


@given(shares_of_a_contract(), st.lists(st.integers(0, 10**7), min_size=15, max_size=15), st.integers(0, 10**6))
def test_quotas_always_add_up_to_the_demand(lines_ppm: tuple[int, ...], wh: list[int], demand_wh: int) -> None:
    by_line = tuple(wh[: len(lines_ppm)])
    result = quotas(lines_ppm, History(by_line, sum(by_line) + wh[-1]), demand_wh)
    assert sum(result) == demand_wh
    assert min(result) >= 0


@given(shares_of_a_contract(), st.lists(st.integers(0, 10**5), min_size=14, max_size=14), st.integers(1, 10**4))
def test_a_line_that_is_ahead_of_its_share_gets_nothing(
    lines_ppm: tuple[int, ...], wh: list[int], demand_wh: int
) -> None:
    by_line = tuple(wh[: len(lines_ppm)])
    result = quotas(lines_ppm, History(by_line, sum(by_line)), demand_wh)
    for share_ppm, delivered_wh, quota_wh in zip(lines_ppm, by_line, result, strict=True):
        if WHOLE_PPM * delivered_wh >= share_ppm * (sum(by_line) + demand_wh):
            assert quota_wh == 0


def furthest_off(lines_ppm: tuple[int, ...], demands_wh: list[int]) -> Fraction:
    """Deliver every quota in full; the largest |h_l - p_l H| in Wh that stood at any moment."""
    history = History((0,) * len(lines_ppm), 0)
    furthest = 0
    for demand_wh in demands_wh:
        for line, quota_wh in enumerate(quotas(lines_ppm, history, demand_wh)):
            history = history.plus((line, quota_wh))
        for share_ppm, delivered_wh in zip(lines_ppm, history.by_line, strict=True):
            furthest = max(furthest, abs(WHOLE_PPM * delivered_wh - share_ppm * history.total))
    return Fraction(furthest, WHOLE_PPM)


DEMANDS_WH = st.one_of(
    st.lists(st.integers(0, 3), min_size=50, max_size=300),
    st.lists(st.integers(0, 60), min_size=50, max_size=200),
    st.lists(st.integers(0, 2_000), min_size=50, max_size=200),
    st.lists(st.sampled_from([0, 1, 2, 25, 1_000]), min_size=50, max_size=200),
)


@settings(deadline=None)
@given(shares_of_a_contract(), DEMANDS_WH)
def test_with_ample_supply_every_line_stays_within_two_wh_of_its_share(
    lines_ppm: tuple[int, ...], demands_wh: list[int]
) -> None:
    assert furthest_off(lines_ppm, demands_wh) < 2


def test_odd_wh_by_largest_remainder_would_not_keep_the_bound() -> None:
    """Why they go to whoever is furthest behind: eleven lines and 9 Wh a half hour end 4 Wh off within a day."""
    lines_ppm = (950_000,) + (5_000,) * 10
    demands_wh = [9] * 48
    assert furthest_off(lines_ppm, demands_wh) < 1

    history = History((0,) * len(lines_ppm), 0)
    furthest = 0
    for demand_wh in demands_wh:
        due_wh = history.total + demand_wh
        weights = [
            max(0, share_ppm * due_wh - WHOLE_PPM * delivered_wh)
            for share_ppm, delivered_wh in zip(lines_ppm, history.by_line, strict=True)
        ]
        for line, quota_wh in enumerate(apportion(demand_wh, weights)):
            history = history.plus((line, quota_wh))
        furthest = max(furthest, abs(WHOLE_PPM * history.by_line[0] - lines_ppm[0] * history.total))
    assert furthest > 4 * WHOLE_PPM


def after_three_weeks_without_solar(line_of_substitutes: int) -> History:
    """For 21 days of half hours at 400 Wh, 40 % solar is substituted; then everything is ample for 60 days."""
    history = History((0, 0, 0), 0)
    for _ in range(21 * 48):
        history = history.plus((1, 120), (2, 120)).plus((line_of_substitutes, 160))
    for _ in range(60 * 48):
        for line, quota_wh in enumerate(quotas(SOLAR_WIND_ANY, history, 400)):
            history = history.plus((line, quota_wh))
    return history


def test_what_was_short_for_weeks_is_caught_up_and_then_the_bound_holds_again() -> None:
    history = after_three_weeks_without_solar(line_of_substitutes=2)
    for share_ppm, delivered_wh in zip(SOLAR_WIND_ANY, history.by_line, strict=True):
        assert abs(WHOLE_PPM * delivered_wh - share_ppm * history.total) < 2 * WHOLE_PPM


def test_after_substitutes_outside_all_lines_the_lines_are_level_among_themselves() -> None:
    history = after_three_weeks_without_solar(line_of_substitutes=NO_LINE)
    for share_ppm, delivered_wh in zip(SOLAR_WIND_ANY, history.by_line, strict=True):
        assert abs(WHOLE_PPM * delivered_wh - share_ppm * sum(history.by_line)) < 2 * WHOLE_PPM


@pytest.mark.parametrize(
    ("lines_ppm", "demand_wh", "shares"),
    [
        (SOLAR_WIND_ANY, 500, (200, 150, 150)),
        (SOLAR_WIND_ANY, 1, (0, 0, 0)),
        (SOLAR_WIND_ANY, 9, (3, 2, 2)),
        ((WHOLE_PPM,), 9, (9,)),
        (SOLAR_WIND_ANY, 0, (0, 0, 0)),
    ],
)
def test_plain_shares_are_rounded_down(lines_ppm: tuple[int, ...], demand_wh: int, shares: tuple[int, ...]) -> None:
    assert plain_shares(lines_ppm, demand_wh) == shares


def test_a_history_with_another_number_of_lines_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        quotas(SOLAR_WIND_ANY, History((1, 2), 3), 5)
