"""Foresight: the baseline in tables, its rules for gaps, how an interval is shared out, and how far off it is."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.recorded import DEMO_DATA, recorded

from broker.market.contracts import Line
from broker.market.forecast import (
    MADE_BEFORE_S,
    Expectation,
    HistoryKind,
    HistoryRow,
    divide,
    expect,
    expected_surplus,
    forecast_of,
    supply_levels,
)
from broker.protocol.market_time import Interval
from broker.protocol.messages import Forecast, SourceOutlook, SupplyLevel
from broker.protocol.sources import Source, SourceGroup

DAY_S = 86_400
DAY = 20_000 * DAY_S
GENERATED, DEMANDED, BOUGHT, _ = HistoryKind
SOLAR, WIND, HYDRO, OIL = Source.SOLAR, Source.WIND, Source.HYDRO, Source.OIL
RENEWABLE, ANY = SourceGroup.RENEWABLE, SourceGroup.ANY


def days_of(
    kind: HistoryKind, by_day: dict[int, int], target: Source | SourceGroup = SOLAR, interval_s: int = 3_600
) -> list[HistoryRow]:
    """Days back and the Wh of each of that day's intervals."""
    return [
        HistoryRow(DAY - back * DAY_S + offset_s, kind, target, energy_wh)
        for back, energy_wh in by_day.items()
        for offset_s in range(0, DAY_S, interval_s)
    ]


@pytest.mark.parametrize(
    ("kind", "by_day", "expected_wh"),
    [
        (GENERATED, {1: 500}, 500),
        (GENERATED, {1: 100, 2: 200}, (14 * 100 + 13 * 200) // 27),
        # A day of which nothing is recorded changes weights and nothing else; one of zero is a day like others.
        (GENERATED, {1: 100, 3: 200}, (14 * 100 + 12 * 200) // 26),
        (GENERATED, {1: 100, 2: 0, 3: 200}, (14 * 100 + 12 * 200) // 39),
        (BOUGHT, {1: 100, 7: 800}, (14 * 100 + 8 * 800) // 22),
        # For demand the same weekday counts double, also three and four weeks back.
        (DEMANDED, {1: 100, 7: 800}, (2 * 100 + 4 * 800) // 6),
        (DEMANDED, {1: 100, 21: 900, 28: 700}, (2 * 100 + 3 * 900 + 2 * 700) // 7),
        (DEMANDED, {28: 700}, 700),
        # The sun of four weeks ago says nothing, and what is no day back is not known yet.
        (GENERATED, {1: 100, 21: 900}, 100),
        (GENERATED, {0: 900, 1: 100}, 100),
    ],
)
def test_the_baseline_is_a_weighted_mean_of_the_same_interval(
    kind: HistoryKind, by_day: dict[int, int], expected_wh: int
) -> None:
    expectation = expect(days_of(kind, by_day), DAY, 3_600)
    assert expectation is not None
    by_kind = {GENERATED: expectation.generated, DEMANDED: expectation.demanded, BOUGHT: expectation.bought}
    assert by_kind[kind] == {SOLAR: (expected_wh,) * 24}
    assert all(not other for name, other in by_kind.items() if name is not kind)


def test_each_interval_has_its_own_past() -> None:
    rows = [HistoryRow(DAY - DAY_S + index * 900, GENERATED, WIND, index) for index in range(96)]
    expectation = expect(rows, DAY, 900)
    assert expectation is not None
    assert expectation.generated[WIND] == tuple(range(96))


def test_an_interval_that_was_never_recorded_leaves_no_forecast() -> None:
    rows = days_of(GENERATED, {1: 100})
    assert expect(rows[1:], DAY, 3_600) is None
    assert expect([], DAY, 3_600) is None
    # Who only began at noon of the day before has a whole day a day later.
    assert expect([*rows[1:], HistoryRow(DAY - 2 * DAY_S, GENERATED, SOLAR, 7)], DAY, 3_600) is not None


def test_what_is_missing_in_a_recorded_interval_was_nothing() -> None:
    rows = days_of(GENERATED, {1: 100, 2: 100}) + days_of(DEMANDED, {1: 300}, ANY)
    expectation = expect(rows, DAY, 3_600)
    assert expectation is not None
    assert expectation.demanded[ANY] == (150,) * 24


def test_history_with_a_negative_energy_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 Wh"):
        expect([HistoryRow(DAY - DAY_S, GENERATED, SOLAR, -1)], DAY, 3_600)


@st.composite
def histories(draw: st.DrawFn) -> list[HistoryRow]:
    rows = days_of(GENERATED, {draw(st.integers(1, 14)): draw(st.integers(0, 5_000))})
    for _ in range(draw(st.integers(0, 30))):
        start_s = DAY + 3_600 * draw(st.integers(-24 * 35, 30))
        kind = draw(st.sampled_from(list(HistoryKind)))
        targets: list[Source | SourceGroup] = [*Source]
        if kind is DEMANDED:
            targets += [*SourceGroup]
        rows.append(HistoryRow(start_s, kind, draw(st.sampled_from(targets)), draw(st.integers(0, 10_000))))
    return rows


@given(histories(), st.randoms(use_true_random=False))
def test_the_order_of_history_changes_nothing_and_nothing_is_negative(rows: list[HistoryRow], random: object) -> None:
    expectation = expect(rows, DAY, 3_600)
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert expect(shuffled, DAY, 3_600) == expectation
    assert expectation is not None
    highest_wh = sum(row.energy_wh for row in rows)
    for by_target in (expectation.generated, expectation.demanded, expectation.bought):
        for energies in by_target.values():
            assert len(energies) == 24
            assert all(type(energy_wh) is int and 0 <= energy_wh <= highest_wh for energy_wh in energies)
    forecast = forecast_of(expectation, "east")
    assert Forecast.from_payload(forecast.to_payload()) == forecast
    assert all(item.shortage_wh == 0 or item.surplus_wh == 0 for item in forecast.outlooks)


@given(
    st.dictionaries(st.sampled_from(list(Source)), st.integers(0, 1_000)),
    st.dictionaries(st.sampled_from([*Source, *SourceGroup]), st.integers(0, 1_000)),
)
def test_sharing_out_neither_makes_nor_loses_energy(
    supply: dict[Source, int], demand: dict[Source | SourceGroup, int]
) -> None:
    division = divide(supply, demand)
    assert sum(division.filled.values()) + sum(division.left.values()) == sum(supply.values())
    for target, wanted_wh in demand.items():
        assert 0 <= division.filled[target] <= wanted_wh
        members = target.sources if isinstance(target, SourceGroup) else (target,)
        assert division.filled[target] == wanted_wh or not any(division.left.get(source) for source in members)


@pytest.mark.parametrize(
    ("supply", "demand", "filled", "left"),
    [
        ({SOLAR: 500}, {SOLAR: 200}, {SOLAR: 200}, {SOLAR: 300}),
        ({SOLAR: 500}, {SOLAR: 700, ANY: 100}, {SOLAR: 500, ANY: 0}, {SOLAR: 0}),
        # Groups come after single sources and take what is most plentiful.
        ({SOLAR: 500, WIND: 300}, {SOLAR: 400, ANY: 350}, {SOLAR: 400, ANY: 350}, {SOLAR: 50, WIND: 0}),
        # `any` comes last, since it can take what the others cannot.
        ({WIND: 300, OIL: 300}, {RENEWABLE: 200, ANY: 400}, {RENEWABLE: 200, ANY: 400}, {WIND: 0, OIL: 0}),
        ({OIL: 300}, {RENEWABLE: 200}, {RENEWABLE: 0}, {OIL: 300}),
    ],
)
def test_an_interval_is_shared_out_as_clearing_does(
    supply: dict[Source, int],
    demand: dict[Source | SourceGroup, int],
    filled: dict[Source | SourceGroup, int],
    left: dict[Source, int],
) -> None:
    assert divide(supply, demand) == (filled, left)


def expectation_of(
    generated: dict[Source, int], demanded: dict[Source | SourceGroup, int], bought: dict[Source, int] | None = None
) -> Expectation:
    """The same all day."""
    return Expectation(
        DAY,
        3_600,
        {source: (energy_wh,) * 24 for source, energy_wh in generated.items()},
        {target: (energy_wh,) * 24 for target, energy_wh in demanded.items()},
        {source: (energy_wh,) * 24 for source, energy_wh in (bought or {}).items()},
        {},
    )


def test_a_forecast_is_coarse_and_counts_what_neighbours_give_as_lacking() -> None:
    expectation = expectation_of({SOLAR: 1_250, HYDRO: 99}, {SOLAR: 700, WIND: 499, RENEWABLE: 900}, {WIND: 400})
    forecast = forecast_of(expectation, "east")
    assert (forecast.start_s, forecast.end_s) == (DAY, DAY + DAY_S)
    assert [item for item in forecast.outlooks if item.interval == 5] == [SourceOutlook(WIND, 5, 400, 0)]
    assert forecast.group_shortages_wh == (200,) * 24


@pytest.mark.parametrize(
    ("generated", "bought", "shares", "level"),
    [
        ({}, {}, {SOLAR: 100}, SupplyLevel.SCARCE),
        ({SOLAR: 499}, {}, {SOLAR: 100}, SupplyLevel.SCARCE),
        ({SOLAR: 500}, {}, {SOLAR: 100}, SupplyLevel.SHORT),
        ({SOLAR: 950}, {}, {SOLAR: 100}, SupplyLevel.ENOUGH),
        ({SOLAR: 1_499}, {}, {SOLAR: 100}, SupplyLevel.ENOUGH),
        ({SOLAR: 1_500}, {}, {SOLAR: 100}, SupplyLevel.PLENTIFUL),
        # What neighbours have been giving counts.
        ({}, {SOLAR: 1_000}, {SOLAR: 100}, SupplyLevel.ENOUGH),
        # Half of the contract without any wind, however much sun there is.
        ({SOLAR: 90_000}, {}, {SOLAR: 50, WIND: 50}, SupplyLevel.SHORT),
        ({SOLAR: 90_000}, {}, {SOLAR: 49, WIND: 51}, SupplyLevel.SCARCE),
        # Nobody has asked for hydro so far.
        ({HYDRO: 1}, {}, {HYDRO: 100}, SupplyLevel.ENOUGH),
    ],
)
def test_a_level_says_how_much_of_a_contract_will_be_filled(
    generated: dict[Source, int], bought: dict[Source, int], shares: dict[Source, int], level: SupplyLevel
) -> None:
    expectation = expectation_of(generated, {SOLAR: 1_000, WIND: 1_000}, bought)
    lines = [Line(target, percent * 10_000) for target, percent in shares.items()]
    assert supply_levels(expectation, lines) == (level,) * 24


def test_the_surplus_of_a_neighbours_forecast_is_that_of_the_interval() -> None:
    forecast = Forecast("west", DAY, DAY + DAY_S, (SourceOutlook(WIND, 3, 0, 700),), (0,) * 24)
    third = Interval(DAY + 3 * 3_600, DAY + 4 * 3_600)
    assert expected_surplus(forecast, WIND, third) == 700
    assert expected_surplus(forecast, SOLAR, third) == 0
    assert expected_surplus(forecast, WIND, Interval(third.end_s, third.end_s + 3_600)) == 0
    assert expected_surplus(forecast, WIND, Interval(third.start_s + DAY_S, third.end_s + DAY_S)) == 0
    # Somebody who reckons in other intervals says nothing about this one.
    assert expected_surplus(forecast, WIND, Interval(DAY + 3 * 1_800, DAY + 4 * 1_800)) == 0


# How far off it is


def errors_percent(path: Path, first_day: int) -> dict[str, tuple[int, int, int]]:
    """Of consumption and generation: absolute errors of all half hours in percent of the energy itself.

    (this forecast, the same half hour of the newest day that was known when it was made, their mean over all half
    hours so far: what one knows without the time of day).
    """
    values = recorded(path)
    midnights = [start_s for start_s in sorted(values) if start_s % DAY_S == 0]
    found = {}
    for column, kind in enumerate((DEMANDED, GENERATED)):
        totals = [0, 0, 0, 0]
        for day_s in midnights[first_day:]:
            made_s = day_s - MADE_BEFORE_S
            known = {start_s: pair[column] for start_s, pair in values.items() if start_s < made_s}
            expectation = expect([HistoryRow(at_s, kind, SOLAR, wh) for at_s, wh in known.items()], day_s, 1_800)
            assert expectation is not None
            energies = (expectation.demanded if kind is DEMANDED else expectation.generated)[SOLAR]
            mean_wh = sum(known.values()) // len(known)
            for index, energy_wh in enumerate(energies):
                start_s = day_s + index * 1_800
                if start_s not in values:
                    continue
                newest_s = start_s - DAY_S if start_s - DAY_S in known else start_s - 2 * DAY_S
                actual_wh = values[start_s][column]
                for place, guess_wh in enumerate((energy_wh, known[newest_s], mean_wh)):
                    totals[place] += abs(guess_wh - actual_wh)
                totals[3] += actual_wh
        found[kind.name.lower()] = (
            100 * totals[0] // totals[3],
            100 * totals[1] // totals[3],
            100 * totals[2] // totals[3],
        )
    return found


PAGE = Path(__file__).parents[3] / "docs/foresight.md"


@pytest.mark.parametrize("week", ["winter", "spring", "summer"])
def test_the_errors_on_recorded_days_are_those_of_the_page(week: str) -> None:
    """Not much better than yesterday: a week gives six days of history at most. The page has a whole year too."""
    errors = errors_percent(DEMO_DATA / f"{week}.csv", 2)
    row = re.search(rf"^\| {week} \|(.*)\|$", PAGE.read_text(), re.MULTILINE)
    assert row is not None
    assert [int(cell) for cell in row[1].split("|")] == [*errors["demanded"], *errors["generated"]]
    for ours, _yesterday, no_knowledge in errors.values():
        assert ours <= no_knowledge
