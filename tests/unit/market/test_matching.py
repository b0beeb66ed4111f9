"""Clearing of demands that do not take everything: worked examples, and what always holds."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.market.clearing import Clearing, OpenDemand, Taken, fill_lines, settle
from broker.market.contracts import Contract, History, ShortageChoice, make_contract
from broker.market.lots import Lot
from broker.market.matching import _Board, clear_lots
from broker.market.mix import quotas
from broker.market.windows import Window, window_span
from broker.protocol.market_time import Interval
from broker.protocol.messages import NO_LINE
from broker.protocol.sources import Source, SourceGroup

SOLAR, WIND, HYDRO, COAL = Source.SOLAR, Source.WIND, Source.HYDRO, Source.COAL
H = 3_600
DAY = 24 * H


def contract(*shares: tuple[str, int], **choices: Any) -> Contract:
    """Shares in percent."""
    choices.setdefault("shortage", ShortageChoice.UNMATCHED)
    return make_contract(0, [(name, percent * 10_000) for name, percent in shares], area="home", **choices)


def demand(meter: str, energy_wh: int, of: Contract, start_s: int = 0, *, waits: bool = False) -> OpenDemand:
    history = History.empty(of)
    span = window_span(of.window, Interval(start_s, start_s + H))
    divided = quotas(of.shares_ppm, history, energy_wh)
    return OpenDemand(meter, energy_wh, of, divided, history, (), start_s, span, waits)


def lot(source: Source, provider: str = "ola", price: int = 100, start_s: int = 0, **more: Any) -> Lot:
    return Lot(source, start_s, provider, price, **more)


def gets(result: Clearing) -> list[dict[Source, int]]:
    totals: list[dict[Source, int]] = []
    for taken in result.taken:
        by_source: dict[Source, int] = {}
        for item in taken:
            by_source[item.source] = by_source.get(item.source, 0) + item.energy_wh
        totals.append(by_source)
    return totals


SOLAR_ONLY = contract(("solar", 100))


def test_who_excludes_a_provider_gets_what_the_others_can_do_without() -> None:
    picky = contract(("solar", 100), excluded_providers=["ola"])
    result = clear_lots(
        [demand("a", 100, SOLAR_ONLY), demand("b", 100, picky)], {lot(SOLAR): 100, lot(SOLAR, "pia"): 100}
    )
    assert gets(result) == [{SOLAR: 100}, {SOLAR: 100}]
    assert [result.columns[picked[0]][0].provider for picked in result.picked] == ["ola", "pia"]


def test_energy_of_an_unknown_provider_is_not_for_those_who_exclude_somebody() -> None:
    picky = contract(("solar", 100), excluded_providers=["ola"])
    assert gets(clear_lots([demand("a", 100, picky)], {lot(SOLAR, ""): 100})) == [{}]


def test_what_both_can_use_is_shared_so_that_both_get_the_same_fraction() -> None:
    picky = contract(("solar", 100), excluded_providers=["pia"])
    result = clear_lots(
        [demand("a", 100, SOLAR_ONLY), demand("b", 100, picky)], {lot(SOLAR): 60, lot(SOLAR, "pia"): 20}
    )
    assert gets(result) == [{SOLAR: 40}, {SOLAR: 40}]


def test_a_price_ceiling_holds_for_its_source_and_is_told_to_whom_looks_for_more() -> None:
    of = contract(("solar", 50), ("wind", 50), price_ceilings=[("solar", 90)])
    result = clear_lots([demand("a", 100, of)], {lot(SOLAR, price=91): 100, lot(WIND, price=500): 10})
    assert gets(result) == [{WIND: 10}]
    assert (result.shortages, result.price_limits) == ({SOLAR: 50, WIND: 40}, {SOLAR: 90})


def test_the_price_told_is_the_highest_that_anybody_would_pay() -> None:
    cheap, dear = (contract(("solar", 100), highest_price=price) for price in (50, 70))
    demands = [demand("a", 10, cheap), demand("b", 10, dear)]
    assert clear_lots(demands, {}).price_limits == {SOLAR: 70}
    assert clear_lots([*demands, demand("c", 10, SOLAR_ONLY)], {}).price_limits == {}


def test_a_substitute_respects_providers_and_prices() -> None:
    of = contract(("wind", 100), shortage=ShortageChoice.ANY, highest_price=100, excluded_providers=["pia"])
    lots = {lot(SOLAR): 10, lot(SOLAR, "pia"): 10, lot(COAL, price=101): 10}
    result = clear_lots([demand("a", 100, of)], lots, H)
    assert result.taken == ((Taken(NO_LINE, SOLAR, 10),),)


def test_a_line_is_raised_from_what_it_may_take_only() -> None:
    of = contract(("solar", 40), ("wind", 60), excluded_providers=["pia"])
    dark = replace(demand("a", 100, of), quotas=(100, 0))
    result = clear_lots([dark], {lot(WIND): 20, lot(WIND, "pia"): 500}, H)
    assert result.taken == ((Taken(1, WIND, 20),),)


def test_exclusive_energy_goes_to_those_named_and_first() -> None:
    lots = {lot(SOLAR): 100, lot(SOLAR, reserved=True, only_for=("b",)): 50}
    result = clear_lots([demand("a", 100, SOLAR_ONLY), demand("b", 100, SOLAR_ONLY)], lots)
    assert gets(result) == [{SOLAR: 75}, {SOLAR: 75}]
    assert not any(result.columns[column][0].only_for for column in result.picked[0])


def test_windows_that_end_sooner_are_served_first() -> None:
    demands = [
        demand("a", 100, contract(("solar", 100), window=window), 23 * H) for window in (Window.MONTH, Window.DAY)
    ]
    demands = [replace(one, meter=name) for one, name in zip(demands, "ab", strict=True)]
    interval = demand("c", 100, SOLAR_ONLY, 23 * H)
    assert gets(clear_lots([*demands, interval], {lot(SOLAR, start_s=23 * H): 150})) == [{}, {SOLAR: 50}, {SOLAR: 100}]


def test_energy_serves_the_demands_whose_window_it_lies_in() -> None:
    of_day, of_month = (contract(("solar", 100), window=window) for window in (Window.DAY, Window.MONTH))
    demands = [demand("a", 100, of_day, DAY), demand("b", 100, of_month, DAY), demand("c", 100, SOLAR_ONLY, DAY)]
    assert gets(clear_lots(demands, {lot(SOLAR, start_s=0): 150})) == [{}, {SOLAR: 100}, {}]
    assert gets(clear_lots(demands, {lot(SOLAR, start_s=DAY + H): 150})) == [{SOLAR: 100}, {SOLAR: 50}, {}]


def test_only_demands_whose_window_ends_are_settled() -> None:
    of_day = contract(("solar", 100), window=Window.DAY, shortage=ShortageChoice.ANY)
    early, last = demand("a", 10, of_day, 0), demand("a", 10, of_day, 23 * H)
    assert gets(clear_lots([early], {lot(WIND): 50}, H)) == [{}]
    assert gets(clear_lots([early, last], {lot(WIND): 50}, 24 * H)) == [{WIND: 10}, {WIND: 10}]


ANY_OF_DAY = contract(("any", 100), window=Window.DAY)
SOLAR_OF_DAY = contract(("solar", 100), window=Window.DAY)


def test_a_demand_that_waits_leaves_its_energy_to_one_that_can_use_nothing_else() -> None:
    waiting = demand("a", 100, ANY_OF_DAY, waits=True)
    lots = {lot(SOLAR): 100, lot(WIND): 100}
    first = clear_lots([waiting], lots)
    assert (first.taken, first.held_back) == (((),), {lot(SOLAR): 100})
    later = demand("b", 100, SOLAR_OF_DAY, H, waits=True)
    assert gets(clear_lots([waiting, later], lots, 24 * H)) == [{WIND: 100}, {SOLAR: 100}]


def test_what_surely_costs_nobody_anything_is_given_to_a_demand_that_waits() -> None:
    """Whoever may want the sun could just as well take all that a demand for the sun can."""
    demands = [demand("a", 60, SOLAR_OF_DAY, waits=True), demand("b", 60, ANY_OF_DAY, waits=True)]
    result = clear_lots(demands, {lot(SOLAR): 100}, gives_early=True)
    assert (gets(result), result.held_back) == ([{SOLAR: 60}, {}], {lot(SOLAR): 40})
    # Who else there is has to be known.
    assert gets(clear_lots(demands, {lot(SOLAR): 100})) == [{}, {}]


@pytest.mark.parametrize(
    "rival",
    [
        contract(("solar", 100), window=Window.DAY, excluded_providers=["pia"]),
        contract(("solar", 100), window=Window.DAY, highest_price=100),
        contract(("coal", 50), ("solar", 50), window=Window.DAY, price_ceilings=[("solar", 100)]),
    ],
    ids=["another provider", "a lower price", "a lower ceiling"],
)
def test_energy_that_somebody_pickier_may_want_is_held_back(rival: Contract) -> None:
    demands = [demand("a", 60, SOLAR_OF_DAY, waits=True), demand("b", 0, rival, waits=True)]
    assert gets(clear_lots(demands, {lot(SOLAR): 60}, gives_early=True)) == [{}, {}]
    # The picky one itself can be given it: the other one takes all that it takes.
    demands = [demand("a", 0, SOLAR_OF_DAY, waits=True), demand("b", 60, rival, waits=True)]
    assert gets(clear_lots(demands, {lot(SOLAR): 60}, gives_early=True))[1] == {
        SOLAR: 60 if rival.lines[0].target is SOLAR else 30
    }


def test_a_month_gives_way_to_the_day_until_the_day_is_over() -> None:
    of_month = contract(("solar", 100), window=Window.MONTH)
    lots = {lot(SOLAR): 100}
    for rival_start_s, given_wh in ((H, 0), (DAY, 100)):
        demands = [demand("a", 100, of_month, waits=True), demand("b", 0, SOLAR_OF_DAY, rival_start_s, waits=True)]
        result = clear_lots(demands, lots, gives_early=True)
        assert sum(gets(result)[0].values()) == given_wh
        assert result.held_back == ({} if given_wh else {lot(SOLAR): 100})


def test_a_demand_that_waits_is_settled_when_its_window_ends() -> None:
    last = demand("a", 100, ANY_OF_DAY, 23 * H, waits=True)
    result = clear_lots([last], {lot(SOLAR, start_s=H): 70}, 24 * H)
    assert (gets(result), result.held_back) == ([{SOLAR: 70}], {})


def test_a_substitute_does_not_take_what_is_held_back() -> None:
    short = demand("a", 100, contract(("wind", 100), shortage=ShortageChoice.ANY), 0)
    waiting = demand("b", 60, contract(("solar", 100), window=Window.DAY), 0, waits=True)
    result = clear_lots([short, waiting], {lot(SOLAR): 100}, H)
    assert (gets(result), result.held_back) == ([{SOLAR: 40}, {}], {lot(SOLAR): 60})


def test_who_can_choose_leaves_what_those_who_wait_want_most() -> None:
    """There is more sun than wind, and neither is lacking yet; but somebody waits for the sun."""
    waiting = demand("a", 50, contract(("solar", 100), window=Window.DAY), waits=True)
    anything = demand("b", 50, contract(("any", 100)))
    assert gets(clear_lots([waiting, anything], {lot(SOLAR): 200, lot(WIND): 60}))[1] == {WIND: 50}


def test_two_demands_of_one_meter_are_fine_in_different_intervals_only() -> None:
    of_day = contract(("solar", 100), window=Window.DAY)
    with pytest.raises(ValueError, match="one meter and interval"):
        clear_lots([demand("a", 1, of_day), demand("a", 2, of_day)], {})


# --- properties

FEW = (SOLAR, WIND, HYDRO, COAL)
TARGETS: tuple[Source | SourceGroup, ...] = (*FEW, *SourceGroup)
PROVIDERS = ("ola", "pia", "quim")


@st.composite
def contracts(draw: st.DrawFn) -> Contract:
    targets = draw(st.lists(st.sampled_from(TARGETS), unique=True, min_size=1, max_size=3))
    substitutes = draw(st.lists(st.sampled_from(FEW), unique=True, max_size=2))
    choice = draw(st.sampled_from([ShortageChoice.UNMATCHED, ShortageChoice.ANY]))
    providers = draw(st.permutations(PROVIDERS))
    cut = draw(st.integers(0, 2))
    return make_contract(
        0,
        [(target, 1_000_000 // len(targets)) for target in targets],
        ShortageChoice.SUBSTITUTES if substitutes else choice,
        area="home",
        substitutes=substitutes,
        excluded_providers=providers[:cut],
        preferred_providers=providers[cut : cut + draw(st.integers(0, 1))],
        highest_price=draw(st.none() | st.sampled_from([50, 100])),
        window=draw(st.sampled_from(Window)),
    )


@st.composite
def markets(draw: st.DrawFn) -> tuple[list[OpenDemand], dict[Lot, int]]:
    tariffs = draw(st.lists(contracts(), min_size=1, max_size=4))
    demands = [
        demand(meter, draw(st.integers(0, 60)), draw(st.sampled_from(tariffs)), draw(st.sampled_from([0, H])))
        for meter in draw(st.lists(st.sampled_from("abcdefgh"), unique=True, min_size=1))
    ]
    if draw(st.booleans()):
        demands = [replace(one, waits=one.contract.window is not Window.INTERVAL) for one in demands]
    lots = {}
    for _ in range(draw(st.integers(0, 8))):
        kept = draw(st.sampled_from([(False, ()), (False, ()), (True, ()), (True, ("a", "c"))]))
        key = Lot(
            draw(st.sampled_from(FEW)),
            draw(st.sampled_from([0, H])),
            draw(st.sampled_from(PROVIDERS)),
            draw(st.sampled_from([50, 100, 150])),
            *kept,
        )
        lots[key] = draw(st.integers(0, 80))
    return demands, lots


def takes(one: OpenDemand, from_lot: Lot) -> bool:
    limit = one.contract.highest_price
    return (
        one.span.start_s <= from_lot.start_s < one.span.end_s
        and from_lot.provider not in one.contract.excluded_providers
        and (limit is None or from_lot.price <= limit)
        and (not from_lot.only_for or one.meter in from_lot.only_for)
    )


@settings(deadline=None, max_examples=200)
@given(markets(), st.sampled_from([None, H, 2 * H, 24 * H]), st.booleans())
def test_everybody_gets_only_what_they_take_and_nothing_twice(
    market: tuple[list[OpenDemand], dict[Lot, int]], settle_until_s: int | None, gives_early: bool
) -> None:
    demands, lots = market
    result = clear_lots(demands, lots, settle_until_s, gives_early=gives_early)
    if not result.picked:
        return  # Any energy of the source will do; `test_clearing` is about that.
    used = [0] * len(result.columns)
    for one, taken, picked in zip(demands, result.taken, result.picked, strict=True):
        assert sum(item.energy_wh for item in taken) <= one.energy_wh
        for item, column in zip(taken, picked, strict=True):
            used[column] += item.energy_wh
            assert all(takes(one, member) and member.source is item.source for member in result.columns[column])
            if item.line != NO_LINE:
                target = one.contract.lines[item.line].target
                assert item.source in (target.sources if isinstance(target, SourceGroup) else (target,))
    for number, column in enumerate(result.columns):
        used[number] += sum(result.held_back.get(member, 0) for member in column)
        assert used[number] <= sum(lots[member] for member in column)
    assert all(0 < held_wh <= lots[held] for held, held_wh in result.held_back.items())
    # No asset idles while a line that it fits lacks it.
    for one, taken in zip(demands, result.taken, strict=True):
        if one.waits:
            continue  # What is held back may be for it.
        for line, quota_wh in enumerate(one.quotas):
            target = one.contract.lines[line].target
            if sum(item.energy_wh for item in taken if item.line == line) < quota_wh and settle_until_s is None:
                for column, used_wh in zip(result.columns, used, strict=True):
                    if takes(one, column[0]) and used_wh < sum(lots[member] for member in column):
                        sources = target.sources if isinstance(target, SourceGroup) else (target,)
                        assert column[0].source not in sources


@settings(deadline=None)
@given(markets(), st.sampled_from([None, H, 24 * H]), st.randoms(use_true_random=False))
def test_the_order_of_the_input_changes_nothing(
    market: tuple[list[OpenDemand], dict[Lot, int]], settle_until_s: int | None, shuffler: random.Random
) -> None:
    demands, lots = market
    shuffled = list(demands)
    shuffler.shuffle(shuffled)
    result = clear_lots(demands, lots, settle_until_s, gives_early=settle_until_s is None)
    other = clear_lots(shuffled, dict(reversed(lots.items())), settle_until_s, gives_early=settle_until_s is None)
    by_meter = {
        one.meter: (taken, number) for number, (one, taken) in enumerate(zip(shuffled, other.taken, strict=True))
    }
    assert [by_meter[one.meter][0] for one in demands] == list(result.taken)
    assert other.columns == result.columns
    if result.picked:
        assert [other.picked[by_meter[one.meter][1]] for one in demands] == list(result.picked)
    assert (other.shortages, other.group_shortage_wh) == (result.shortages, result.group_shortage_wh)
    assert other.held_back == result.held_back


def totals_by_line(result: Clearing) -> list[dict[int, int]]:
    totals: list[dict[int, int]] = []
    for taken in result.taken:
        by_line: dict[int, int] = {}
        for item in taken:
            by_line[item.line] = by_line.get(item.line, 0) + item.energy_wh
        totals.append(by_line)
    return totals


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=6),
    st.dictionaries(st.sampled_from(FEW), st.integers(0, 100)),
    st.booleans(),
)
def test_where_nobody_restricts_anything_it_is_the_plain_market(
    energies_wh: Sequence[int], available: dict[Source, int], settling: bool
) -> None:
    tariffs = [contract(("solar", 40), ("wind", 30)), contract(("renewable", 60), ("coal", 40)), SOLAR_ONLY]
    demands = [demand(f"m{n}", wh, tariffs[n % 3]) for n, wh in enumerate(energies_wh)]
    lots = {lot(source): wh for source, wh in available.items()}
    result = clear_lots(demands, lots, H if settling else None)
    assert result == (settle(demands, available) if settling else fill_lines(demands, available))
    # The general way serves the same lines with as much in all, and single sources to the Wh.
    board = _Board(demands, lots, 0, [False] * len(demands), gives_early=False)
    lacking = board.fill([one.quotas for one in demands])
    plain = fill_lines(demands, available)
    general = board.clearing(lacking)
    assert (general.shortages, general.group_shortage_wh) == (plain.shortages, plain.group_shortage_wh)
    for one, by_line, plainly in zip(demands, totals_by_line(general), totals_by_line(plain), strict=True):
        for line, item in enumerate(one.contract.lines):
            if isinstance(item.target, Source):
                assert by_line.get(line, 0) == plainly.get(line, 0)


@settings(deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=5), st.integers(2, 300), st.data())
def test_splitting_a_consumption_over_meters_gains_no_more_than_rounding(
    others_wh: list[int], whole_wh: int, data: st.DataObject
) -> None:
    part_wh = data.draw(st.integers(1, whole_wh - 1))
    lots = {lot(SOLAR, provider): data.draw(st.integers(0, 400)) for provider in PROVIDERS}
    picky = [contract(("solar", 100), excluded_providers=[provider]) for provider in PROVIDERS]
    others = [demand(f"m{number}", wh, picky[number % 3]) for number, wh in enumerate(others_wh)]

    def mine(*parts_wh: int) -> int:
        demands = [demand(f"a{number}", wh, picky[0]) for number, wh in enumerate(parts_wh)]
        result = clear_lots(demands + others, lots)
        return sum(item.energy_wh for taken in result.taken[: len(parts_wh)] for item in taken)

    assert mine(part_wh, whole_wh - part_wh) - mine(whole_wh) <= 2


def test_the_example_of_the_market_page() -> None:
    anna, ben, cleo = (
        contract(("solar", 100)),
        contract(("solar", 100), excluded_providers=["ola"]),
        contract(("solar", 100), preferred_providers=["pia"]),
    )
    demands = [demand("anna", 60, anna), demand("ben", 60, ben), demand("cleo", 60, cleo)]
    result = clear_lots(demands, {lot(SOLAR): 90, lot(SOLAR, "pia"): 30})
    assert gets(result) == [{SOLAR: 45}, {SOLAR: 30}, {SOLAR: 45}]
    assert [[result.columns[column][0].provider for column in picked] for picked in result.picked] == [
        ["ola"],
        ["pia"],
        ["ola"],
    ]
