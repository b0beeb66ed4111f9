"""Clearing: worked examples, what always holds, and the same Wh as a slow version written from the design's text."""

import random
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import chain, combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.market import clearing
from broker.market.clearing import Clearing, OpenDemand, Taken, fill_lines, settle
from broker.market.contracts import Contract, History, ShortageChoice, make_contract
from broker.market.mix import quotas
from broker.protocol.messages import NO_LINE
from broker.protocol.sources import Source, SourceGroup

SOLAR, WIND, HYDRO, NUCLEAR, COAL = Source.SOLAR, Source.WIND, Source.HYDRO, Source.NUCLEAR, Source.COAL
RENEWABLE, FOSSIL, ANY = SourceGroup.RENEWABLE, SourceGroup.FOSSIL, SourceGroup.ANY
UNMATCHED = ShortageChoice.UNMATCHED


def contract(
    *shares: tuple[str, int], shortage: ShortageChoice = UNMATCHED, substitutes: Sequence[str] = ()
) -> Contract:
    """A contract with shares in percent."""
    return make_contract(
        0, [(name, percent * 10_000) for name, percent in shares], shortage, area="home", substitutes=substitutes
    )


def demand(meter: str, energy_wh: int, of: Contract, quotas_wh: tuple[int, ...] | None = None) -> OpenDemand:
    history = History.empty(of)
    return OpenDemand(meter, energy_wh, of, quotas_wh or quotas(of.shares_ppm, history, energy_wh), history)


SOLAR_WIND = contract(("solar", 40), ("wind", 60))
SOLAR_ONLY = contract(("solar", 100))


# --- worked examples


def test_ample_supply_fills_every_quota() -> None:
    result = fill_lines([demand("a", 100, SOLAR_WIND)], {SOLAR: 1_000, WIND: 1_000})
    assert result == Clearing(((Taken(0, SOLAR, 40), Taken(1, WIND, 60)),), {}, {})


def test_a_line_of_which_there_is_nothing_is_a_shortage_and_nothing_replaces_it_before_gate_2() -> None:
    result = fill_lines([demand("a", 100, SOLAR_WIND)], {SOLAR: 1_000, COAL: 1_000})
    assert result == Clearing(((Taken(0, SOLAR, 40),),), {WIND: 60}, {})


def test_scarce_wh_are_shared_in_proportion_to_what_each_wants() -> None:
    demands = [demand("a", 300, SOLAR_ONLY), demand("b", 100, SOLAR_ONLY)]
    result = fill_lines(demands, {SOLAR: 200})
    assert result.taken == ((Taken(0, SOLAR, 150),), (Taken(0, SOLAR, 50),))
    assert result.shortages == {SOLAR: 200}


def test_the_odd_wh_goes_by_meter_name_and_not_by_place() -> None:
    demands = [demand("b", 10, SOLAR_ONLY), demand("a", 10, SOLAR_ONLY)]
    assert fill_lines(demands, {SOLAR: 11}).taken == ((Taken(0, SOLAR, 5),), (Taken(0, SOLAR, 6),))


def test_single_source_lines_come_before_groups() -> None:
    demands = [demand("a", 100, contract(("any", 100))), demand("b", 100, SOLAR_ONLY)]
    result = fill_lines(demands, {SOLAR: 100, COAL: 50})
    assert result.taken == ((Taken(0, COAL, 50),), (Taken(0, SOLAR, 100),))
    assert result.group_shortage_wh == {ANY: 50}


def test_narrow_groups_come_before_any() -> None:
    demands = [demand("a", 100, contract(("any", 100))), demand("b", 100, contract(("renewable", 100)))]
    result = fill_lines(demands, {HYDRO: 100, NUCLEAR: 40})
    assert result.taken == ((Taken(0, NUCLEAR, 40),), (Taken(0, HYDRO, 100),))
    assert result.group_shortage_wh == {ANY: 60}


def test_a_group_takes_what_is_most_plentiful_then_the_next() -> None:
    result = fill_lines([demand("a", 100, contract(("any", 100)))], {SOLAR: 20, WIND: 70, COAL: 50})
    assert result.taken == ((Taken(0, WIND, 70), Taken(0, COAL, 30)),)


def test_of_equally_plentiful_sources_a_group_takes_the_one_with_the_lower_code() -> None:
    result = fill_lines([demand("a", 50, contract(("any", 100)))], {COAL: 60, WIND: 60})
    assert result.taken == ((Taken(0, WIND, 50),),)


def test_what_was_taken_before_is_not_filled_again() -> None:
    before = demand("a", 100, SOLAR_WIND)
    again = OpenDemand("a", 100, SOLAR_WIND, before.quotas, before.history, (Taken(0, SOLAR, 40), Taken(1, WIND, 50)))
    assert fill_lines([again], {SOLAR: 500, WIND: 500}).taken == ((Taken(1, WIND, 10),),)


def test_a_dark_month_of_solar_does_not_starve_wind() -> None:
    """Solar is far behind, so that it claims the whole demand; as it is not there, wind still gets its 60 %."""
    dark = demand("a", 100, SOLAR_WIND, (100, 0))
    assert fill_lines([dark], {WIND: 500}).taken == ((),)
    result = settle([dark], {WIND: 500})
    assert result.taken == ((Taken(1, WIND, 60),),)
    assert result.shortages == {SOLAR: 100}


def test_what_one_line_cannot_get_of_the_rest_falls_to_the_other_lines() -> None:
    thirds = contract(("solar", 40), ("wind", 30), ("hydro", 30))
    result = settle([demand("a", 100, thirds, (70, 20, 10))], {WIND: 25, HYDRO: 500, SOLAR: 40})
    # 30 Wh of solar are missing; wind and hydro are 10 and 20 below their plain share, and wind has 5 left.
    assert result.taken == ((Taken(0, SOLAR, 40), Taken(1, WIND, 25), Taken(2, HYDRO, 30)),)


def test_a_line_that_runs_out_while_it_is_raised_leaves_its_part_to_the_next_round() -> None:
    lines = contract(("solar", 40), ("wind", 20), ("hydro", 20), ("nuclear", 20))
    # Wind and hydro are to share the 15 Wh that solar lacks as 8 and 7, but there are only 2 more Wh of wind.
    result = settle([demand("a", 100, lines, (30, 5, 5, 60))], {SOLAR: 15, WIND: 7, HYDRO: 500, NUCLEAR: 500})
    assert result.taken == ((Taken(0, SOLAR, 15), Taken(1, WIND, 7), Taken(2, HYDRO, 18), Taken(3, NUCLEAR, 60)),)


def test_raising_never_exceeds_what_the_short_line_left_over() -> None:
    lines = contract(("solar", 40), ("wind", 20), ("hydro", 20), ("nuclear", 20))
    # Nuclear catches up; solar gets 15 of its 30, so wind and hydro (15 below each) share 15.
    result = settle([demand("a", 100, lines, (30, 5, 5, 60))], {SOLAR: 15, WIND: 500, HYDRO: 500, NUCLEAR: 500})
    assert result.taken == ((Taken(0, SOLAR, 15), Taken(1, WIND, 13), Taken(2, HYDRO, 12), Taken(3, NUCLEAR, 60)),)


def test_substitutes_come_in_the_order_of_the_contract() -> None:
    of = contract(("solar", 100), shortage=ShortageChoice.SUBSTITUTES, substitutes=("hydro", "coal"))
    result = settle([demand("a", 100, of)], {SOLAR: 10, HYDRO: 30, COAL: 500, WIND: 500})
    assert result.taken == ((Taken(0, SOLAR, 10), Taken(NO_LINE, HYDRO, 30), Taken(NO_LINE, COAL, 60)),)


def test_a_substitute_that_a_line_covers_counts_for_that_line() -> None:
    of = contract(("solar", 50), ("any", 50), shortage=ShortageChoice.SUBSTITUTES, substitutes=("hydro",))
    result = settle([demand("a", 100, of)], {HYDRO: 100})
    assert result.taken == ((Taken(1, HYDRO, 100),),)


def test_any_takes_what_is_left_and_only_then_something_is_unmatched() -> None:
    of = contract(("solar", 100), shortage=ShortageChoice.ANY)
    result = settle([demand("a", 100, of)], {SOLAR: 10, COAL: 20, WIND: 30})
    assert result.taken == ((Taken(0, SOLAR, 10), Taken(NO_LINE, WIND, 30), Taken(NO_LINE, COAL, 20)),)


def test_who_wants_no_substitute_gets_none() -> None:
    assert settle([demand("a", 100, SOLAR_ONLY)], {SOLAR: 10, WIND: 500}).taken == ((Taken(0, SOLAR, 10),),)


def test_a_demand_of_nothing_gets_nothing() -> None:
    assert settle([demand("a", 0, SOLAR_WIND)], {SOLAR: 1}) == Clearing(((),), {}, {})
    assert settle([], {}) == Clearing((), {}, {})


def test_two_demands_of_one_meter_are_refused() -> None:
    with pytest.raises(ValueError, match="two demands of one meter"):
        fill_lines([demand("a", 1, SOLAR_ONLY), demand("a", 2, SOLAR_ONLY)], {SOLAR: 3})


@pytest.mark.parametrize("quotas_wh", [(50, 51), (50, 49), (100,)])
def test_quotas_that_do_not_divide_the_demand_are_refused(quotas_wh: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not divide 100 Wh"):
        demand("a", 100, SOLAR_WIND, quotas_wh)


# --- an independent slow version, from the text


def members(target: Source | SourceGroup) -> list[Source]:
    return list(target.sources) if isinstance(target, SourceGroup) else [target]


def slow_share(total: int, wants: dict[str, int]) -> dict[str, int]:
    """Everything wanted, or largest remainders by exact fractions; ties by name."""
    if sum(wants.values()) <= total:
        return dict(wants)
    exact = {name: Fraction(total * want, sum(wants.values())) for name, want in wants.items()}
    shares = {name: part.numerator // part.denominator for name, part in exact.items()}
    while sum(shares.values()) < total:
        name = min(
            (name for name in shares if shares[name] <= exact[name]),
            key=lambda name: (-(exact[name] - shares[name]), name),
        )
        shares[name] += 1
    return shares


class Slow:
    """The text of DESIGN.md and of clearing.py, one sentence after the other, without any thought of speed."""

    def __init__(self, demands: Sequence[OpenDemand], available: Mapping[Source, int]) -> None:
        self.demands = {one.meter: one for one in demands}
        self.left = {source: available.get(source, 0) for source in Source}
        self.new: dict[str, dict[tuple[int, Source], int]] = {one.meter: {} for one in demands}

    def got(self, meter: str, line: int | None = None) -> int:
        everything = [(taken.line, taken.energy_wh) for taken in self.demands[meter].taken]
        everything += [(new_line, wh) for (new_line, _), wh in self.new[meter].items()]
        return sum(wh for its_line, wh in everything if line is None or its_line == line)

    def rest(self, meter: str) -> int:
        return self.demands[meter].energy_wh - self.got(meter)

    def give(self, source: Source, wants: dict[str, int], line_of: Mapping[str, int]) -> None:
        for meter, wh in slow_share(self.left[source], wants).items():
            if wh:
                key = (line_of[meter], source)
                self.new[meter][key] = self.new[meter].get(key, 0) + wh
                self.left[source] -= wh

    def serve(self, wanted: dict[str, list[int]]) -> dict[Source | SourceGroup, int]:
        """Wh wanted by meter and line: single sources, then narrow groups, then any."""
        lacking: dict[Source | SourceGroup, int] = {}
        for target in [*Source, RENEWABLE, FOSSIL, ANY]:
            line_of = {
                meter: [line.target for line in self.demands[meter].contract.lines].index(target)
                for meter in wanted
                if target in [line.target for line in self.demands[meter].contract.lines]
            }
            open_wh = {meter: wanted[meter][line] for meter, line in line_of.items()}
            for source in sorted(members(target), key=lambda source: (-self.left[source], source)):
                before = {meter: self.got(meter) for meter in open_wh}
                self.give(source, open_wh, line_of)
                open_wh = {meter: wh - (self.got(meter) - before[meter]) for meter, wh in open_wh.items()}
            if sum(open_wh.values()):
                lacking[target] = sum(open_wh.values())
        return lacking

    def fill(self) -> dict[Source | SourceGroup, int]:
        wanted = {}
        for meter, one in self.demands.items():
            unfilled = [max(0, quota - self.got(meter, line)) for line, quota in enumerate(one.quotas)]
            names = {f"{line:03}": wh for line, wh in enumerate(unfilled)}
            wanted[meter] = [wh for _, wh in sorted(slow_share(self.rest(meter), names).items())]
        return self.serve(wanted)

    def raise_lines(self) -> None:
        while True:
            wanted = {}
            for meter, one in self.demands.items():
                room = {}
                for line, (its, _) in enumerate(zip(one.contract.lines, one.quotas, strict=True)):
                    plain = its.share_ppm * one.energy_wh // 1_000_000
                    supplied = any(self.left[source] for source in members(its.target))
                    room[f"{line:03}"] = max(0, plain - self.got(meter, line)) if supplied else 0
                wanted[meter] = [wh for _, wh in sorted(slow_share(self.rest(meter), room).items())]
            if not any(chain.from_iterable(wanted.values())):
                return
            self.serve(wanted)

    def choose(self) -> None:
        for rank in range(len(Source)):
            for source in Source:
                wants = {
                    meter: self.rest(meter)
                    for meter, one in self.demands.items()
                    if one.contract.substitutes[rank : rank + 1] == (source,)
                }
                self.give(source, wants, self.lines_for(source))
        for source in sorted(Source, key=lambda source: (-self.left[source], source)):
            wants = {
                meter: self.rest(meter)
                for meter, one in self.demands.items()
                if one.contract.shortage is ShortageChoice.ANY
            }
            self.give(source, wants, self.lines_for(source))

    def lines_for(self, source: Source) -> dict[str, int]:
        lines = {}
        for meter, one in self.demands.items():
            covering = [
                (len(members(line.target)), index)
                for index, line in enumerate(one.contract.lines)
                if source in members(line.target)
            ]
            lines[meter] = min(covering)[1] if covering else NO_LINE
        return lines

    def result(self) -> tuple[tuple[Taken, ...], ...]:
        return tuple(
            tuple(Taken(line, source, wh) for (line, source), wh in sorted(new.items())) for new in self.new.values()
        )


# --- properties

FEW = (SOLAR, WIND, HYDRO, NUCLEAR, Source.OIL, COAL)
TARGETS: tuple[Source | SourceGroup, ...] = (*FEW, RENEWABLE, FOSSIL, ANY)


@st.composite
def open_demands(draw: st.DrawFn, most: int = 5, largest_wh: int = 60) -> list[OpenDemand]:
    demands = []
    for meter in draw(st.lists(st.sampled_from("abcdefgh"), unique=True, min_size=1, max_size=most)):
        targets = draw(st.lists(st.sampled_from(TARGETS), unique=True, min_size=1, max_size=4))
        substitutes = draw(st.lists(st.sampled_from(FEW), unique=True, max_size=3))
        choice = ShortageChoice.SUBSTITUTES if substitutes else draw(st.sampled_from([UNMATCHED, ShortageChoice.ANY]))
        shares: list[tuple[str | Source | SourceGroup, int]] = [
            (target, draw(st.integers(1, 1_000_000 // len(targets)))) for target in targets
        ]
        of = make_contract(0, shares, choice, area="home", substitutes=substitutes)
        by_line = tuple(draw(st.integers(0, 200)) for _ in of.lines)
        history = History(by_line, sum(by_line) + draw(st.sampled_from([0, 0, 50])))
        energy_wh = draw(st.integers(0, largest_wh))
        demands.append(OpenDemand(meter, energy_wh, of, quotas(of.shares_ppm, history, energy_wh), history))
    return demands


AVAILABLE = st.dictionaries(st.sampled_from(FEW), st.integers(0, 100) | st.sampled_from([0, 1, 1_000]))


def after(demands: Sequence[OpenDemand], result: Clearing) -> list[OpenDemand]:
    return [
        OpenDemand(one.meter, one.energy_wh, one.contract, one.quotas, one.history, (*one.taken, *new))
        for one, new in zip(demands, result.taken, strict=True)
    ]


def all_lacking(result: Clearing) -> dict[Source | SourceGroup, int]:
    lacking: dict[Source | SourceGroup, int] = dict(result.shortages.items())
    for group, short_wh in result.group_shortage_wh.items():
        lacking[group] = short_wh
    return lacking


def used(result: Clearing) -> dict[Source, int]:
    totals = dict.fromkeys(Source, 0)
    for taken in chain.from_iterable(result.taken):
        totals[taken.source] += taken.energy_wh
    return totals


@settings(deadline=None, max_examples=300)
@given(open_demands(), AVAILABLE, AVAILABLE)
def test_the_same_wh_as_the_slow_version(
    demands: list[OpenDemand], available: dict[Source, int], more: dict[Source, int]
) -> None:
    """Gate 1, a neighbour's energy, gate 2."""
    for stock in (available, more):
        slow = Slow(demands, stock)
        lacking = slow.fill()
        fast = fill_lines(demands, stock)
        assert fast.taken == slow.result()
        assert all_lacking(fast) == lacking
        demands = after(demands, fast)
    slow = Slow(demands, available)
    lacking = slow.fill()
    slow.raise_lines()
    slow.choose()
    fast = settle(demands, available)
    assert fast.taken == slow.result()
    assert all_lacking(fast) == lacking


@settings(deadline=None)
@given(open_demands(most=8), AVAILABLE)
def test_nothing_is_given_that_is_not_there_or_not_wanted(
    demands: list[OpenDemand], available: dict[Source, int]
) -> None:
    result = settle(demands, available)
    for source, energy_wh in used(result).items():
        assert energy_wh <= available.get(source, 0)
    for one, new in zip(demands, result.taken, strict=True):
        assert sum(taken.energy_wh for taken in new) <= one.energy_wh
        for taken in new:
            assert taken.energy_wh > 0
            if taken.line == NO_LINE:
                assert one.contract.shortage is not UNMATCHED
            else:
                assert taken.source in members(one.contract.lines[taken.line].target)
        if one.contract.shortage is ShortageChoice.ANY and sum(taken.energy_wh for taken in new) < one.energy_wh:
            assert used(result) == {source: available.get(source, 0) for source in Source}


@settings(deadline=None)
@given(open_demands(most=8), AVAILABLE, st.randoms(use_true_random=False))
def test_the_order_of_the_input_changes_nothing(
    demands: list[OpenDemand], available: dict[Source, int], shuffler: random.Random
) -> None:
    shuffled = list(demands)
    shuffler.shuffle(shuffled)
    backwards = dict(reversed(available.items()))
    for step in (fill_lines, settle):
        result = step(demands, available)
        other = step(shuffled, backwards)
        by_meter = {one.meter: new for one, new in zip(shuffled, other.taken, strict=True)}
        assert [by_meter[one.meter] for one in demands] == list(result.taken)
        assert other.shortages == result.shortages
        assert other.group_shortage_wh == result.group_shortage_wh


@settings(deadline=None)
@given(open_demands(most=8), AVAILABLE)
def test_filling_again_with_what_is_left_gives_nothing_more(
    demands: list[OpenDemand], available: dict[Source, int]
) -> None:
    for step in (fill_lines, settle):
        result = step(demands, available)
        gone = used(result)
        left = {source: available.get(source, 0) - gone[source] for source in Source}
        assert not any(step(after(demands, result), left).taken)


@settings(deadline=None)
@given(open_demands(most=8), AVAILABLE)
def test_no_other_way_of_filling_the_quotas_could_fill_more(
    demands: list[OpenDemand], available: dict[Source, int]
) -> None:
    """Against the largest possible flow from sources to lines, by the smallest cut over all sets of sources."""
    wanted: dict[Source | SourceGroup, int] = {}
    for one in demands:
        for line, quota_wh in zip(one.contract.lines, one.quotas, strict=True):
            wanted[line.target] = wanted.get(line.target, 0) + quota_wh
    largest = min(
        sum(available.get(source, 0) for source in cut)
        + sum(wh for target, wh in wanted.items() if any(s in FEW and s not in cut for s in members(target)))
        for cut in chain.from_iterable(combinations(FEW, size) for size in range(len(FEW) + 1))
    )
    assert sum(used(fill_lines(demands, available)).values()) == largest


@settings(deadline=None)
@given(open_demands(most=8), AVAILABLE)
def test_the_short_cut_for_ample_supply_gives_what_the_general_way_gives(
    demands: list[OpenDemand], available: dict[Source, int]
) -> None:
    wanted = [one.quotas for one in demands]
    for stock in (available, dict.fromkeys(FEW, 10_000), {**dict.fromkeys(FEW, 500), **available}):
        board = clearing._Board(demands, wanted, stock)
        general = board.clearing(board.fill(wanted))
        short_cut = clearing._fill_ample(demands, wanted, stock)
        assert short_cut is None or short_cut == general
        if stock == dict.fromkeys(FEW, 10_000):
            assert short_cut is not None


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=6),
    st.integers(2, 300),
    st.data(),
)
def test_splitting_a_consumption_over_meters_gains_no_more_than_rounding(
    others_wh: list[int], whole_wh: int, data: st.DataObject
) -> None:
    part_wh = data.draw(st.integers(1, whole_wh - 1))
    available = {SOLAR: data.draw(st.integers(0, whole_wh + sum(others_wh)))}
    others = [demand(f"m{number}", wh, SOLAR_ONLY) for number, wh in enumerate(others_wh)]

    def gets(*parts_wh: int) -> int:
        mine = [demand(f"a{number}", wh, SOLAR_ONLY) for number, wh in enumerate(parts_wh)]
        result = fill_lines(mine + others, available)
        return sum(taken.energy_wh for new in result.taken[: len(mine)] for taken in new)

    assert gets(part_wh, whole_wh - part_wh) - gets(whole_wh) <= 2
