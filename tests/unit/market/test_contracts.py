"""Contracts: what people type becomes a whole contract or a clear refusal, and its bytes are always the same."""

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.market.contracts import (
    WHOLE_PPM,
    Contract,
    ContractError,
    History,
    Line,
    ShortageChoice,
    contract_bytes,
    contract_from_bytes,
    contract_hash,
    history_start,
    make_contract,
    period_start,
)
from broker.market.windows import Window
from broker.protocol import cbor
from broker.protocol.errors import MalformedMessage
from broker.protocol.messages import NO_LINE
from broker.protocol.sources import Source, SourceGroup

UNMATCHED = ShortageChoice.UNMATCHED
TARGETS = (*Source, *SourceGroup)


def utc(year: int, month: int, day: int, hour: int = 0, minute: int = 0, second: int = 0) -> int:
    return int(datetime(year, month, day, hour, minute, second, tzinfo=UTC).timestamp())


def test_what_a_person_leaves_open_becomes_a_line_any() -> None:
    contract = make_contract(0, [("solar", 400_000), ("wind", 300_000)], UNMATCHED, area="home")
    assert contract.lines == (Line(Source.SOLAR, 400_000), Line(Source.WIND, 300_000), Line(SourceGroup.ANY, 300_000))


def test_what_is_left_open_goes_into_an_any_line_that_is_there() -> None:
    contract = make_contract(0, [("any", 100_000), ("wind", 300_000)], UNMATCHED, area="home")
    assert contract.lines == (Line(SourceGroup.ANY, 700_000), Line(Source.WIND, 300_000))


def test_a_contract_that_says_nothing_takes_any_source() -> None:
    assert make_contract(0, [], UNMATCHED, area="home").lines == (Line(SourceGroup.ANY, WHOLE_PPM),)


def test_a_whole_contract_stays_as_it_is() -> None:
    shares = [("renewable", 500_000), ("nuclear", 500_000)]
    assert make_contract(0, shares, UNMATCHED, area="home").shares_ppm == (500_000, 500_000)


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        ([("solar", 600_000), ("wind", 400_001)], "1000001 ppm (100 %); lower them"),
        ([("solar", 700_000), ("wind", 700_000)], "140 %"),
        ([("solar", 1), ("solar", 1)], "solar stands in two lines"),
        ([("solar", 0)], "the share of solar is 0 ppm; give a whole number above 0"),
        ([("solar", -5)], "solar is -5"),
        ([("solar", 0.4)], "solar is 0.4"),
        ([("solar", True)], "solar is True"),
        ([("sun", 400_000)], "unknown source 'sun'; known: solar, "),
    ],
)
def test_shares_that_make_no_sense_are_refused_with_the_reason(shares: list[tuple[str, int]], says: str) -> None:
    with pytest.raises(ContractError) as caught:
        make_contract(0, shares, UNMATCHED, area="home")
    assert says in str(caught.value)
    assert caught.value.remedy in str(caught.value)


@pytest.mark.parametrize(
    ("shortage", "substitutes", "says"),
    [
        (ShortageChoice.SUBSTITUTES, [], "none is named"),
        (ShortageChoice.ANY, ["hydro"], "the shortage choice is any"),
        (ShortageChoice.SUBSTITUTES, ["hydro", "hydro"], "hydro is named twice"),
        (ShortageChoice.SUBSTITUTES, ["renewable"], "unknown source 'renewable'"),
    ],
)
def test_substitutes_must_fit_the_shortage_choice(shortage: ShortageChoice, substitutes: list[str], says: str) -> None:
    with pytest.raises(ContractError, match=says):
        make_contract(0, [("solar", WHOLE_PPM)], shortage, area="home", substitutes=substitutes)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"area": "Home Island"}, "'Home Island' is no name"),
        ({"preferred_providers": ["a b"]}, "'a b' is no name"),
        ({"preferred_providers": ["aoi", "aoi"]}, "name each once"),
        ({"preferred_providers": [f"p{n}" for n in range(9)]}, "at most 8"),
        ({"highest_price": -1}, "highest price -1"),
        ({"highest_price": 1.5}, "highest price 1.5"),
        ({"valid_from_s": -1}, "valid from -1"),
        ({"valid_from_s": 9, "valid_until_s": 9}, "valid from 9 until 9"),
        ({"excluded_providers": ["a b"]}, "'a b' is no name"),
        ({"excluded_providers": ["aoi", "aoi"]}, "excluded providers, or one of them twice"),
        ({"excluded_providers": [f"p{n}" for n in range(33)]}, "at most 32"),
        ({"preferred_providers": ["aoi"], "excluded_providers": ["aoi"]}, "aoi is preferred and excluded"),
        ({"price_ceilings": [("moon", 5)]}, "unknown source 'moon'"),
        ({"price_ceilings": [("renewable", 5)]}, "name a single source"),
        ({"price_ceilings": [("wind", -5)]}, "wind is -5"),
        ({"price_ceilings": [("wind", 5), ("wind", 6)]}, "wind has two price ceilings"),
        ({"price_ceilings": [("wind", 50)], "highest_price": 40}, "wind, 50, is above the highest price 40"),
    ],
)
def test_other_fields_that_make_no_sense_are_refused(changed: dict[str, object], says: str) -> None:
    fields: dict[str, object] = {"valid_from_s": 0, "area": "home"} | changed
    with pytest.raises(ContractError, match=says):
        make_contract(fields.pop("valid_from_s"), [("solar", 1)], UNMATCHED, **fields)  # type: ignore[arg-type]


@st.composite
def contracts(draw: st.DrawFn) -> Contract:
    targets = draw(st.lists(st.sampled_from(TARGETS), unique=True, max_size=14))
    shares = [(target, draw(st.integers(1, WHOLE_PPM // 14))) for target in targets]
    substitutes = draw(st.lists(st.sampled_from(Source), unique=True, max_size=4))
    choice = ShortageChoice.SUBSTITUTES if substitutes else draw(st.sampled_from([UNMATCHED, ShortageChoice.ANY]))
    return make_contract(
        draw(st.integers(0, 2**40)),
        shares,
        choice,
        area="home",
        substitutes=substitutes,
        highest_price=draw(st.none() | st.integers(0, 10**9)),
        preferred_providers=draw(st.lists(st.sampled_from(["aoi", "kaze", "mizu"]), unique=True)),
        excluded_providers=draw(st.lists(st.sampled_from(["sumi", "abura", "gasu"]), unique=True)),
        window=draw(st.sampled_from(Window)),
        valid_until_s=draw(st.none() | st.integers(2**40 + 1, 2**41)),
    )


@given(contracts())
def test_the_shares_of_every_contract_are_exactly_one_million(contract: Contract) -> None:
    assert sum(contract.shares_ppm) == WHOLE_PPM
    assert all(share > 0 for share in contract.shares_ppm)


@given(contracts())
def test_contract_bytes_read_back_as_the_same_contract(contract: Contract) -> None:
    raw = contract_bytes(contract)
    assert contract_from_bytes(raw) == contract
    assert contract_bytes(contract_from_bytes(raw)) == raw


def test_contract_bytes_and_hash_are_what_they_always_were() -> None:
    contract = make_contract(
        1_700_000_000,
        [("solar", 400_000), ("any", 600_000)],
        ShortageChoice.SUBSTITUTES,
        area="home",
        substitutes=["hydro", "coal"],
        highest_price=30_000_000,
        preferred_providers=["aoi"],
    )
    # map(7) {0: 1700000000, 1: [[1, 400000], [102, 600000]], 2: 2, 3: [6, 10], 4: 30000000, 5: ["aoi"], 6: "home"}
    expected = "a7001a6553f100018282011a00061a808218661a000927c002020382060a041a01c9c380058163616f690664686f6d65"
    assert contract_bytes(contract) == bytes.fromhex(expected)
    assert contract_hash(contract).hex() == "c924b3e76edb217319cbbd20eb6b0c09d462bf65857b8852f5924d8f21e4106f"


def test_any_change_of_a_contract_changes_its_hash() -> None:
    hashes = {
        contract_hash(contract)
        for contract in (
            make_contract(0, [("solar", 400_000)], UNMATCHED, area="home"),
            make_contract(1, [("solar", 400_000)], UNMATCHED, area="home"),
            make_contract(0, [("solar", 400_001)], UNMATCHED, area="home"),
            make_contract(0, [("solar", 400_000)], ShortageChoice.ANY, area="home"),
            make_contract(0, [("solar", 400_000)], UNMATCHED, area="away"),
            make_contract(0, [("solar", 400_000)], UNMATCHED, area="home", highest_price=0),
            make_contract(0, [("solar", 400_000)], UNMATCHED, area="home", preferred_providers=["aoi"]),
        )
    }
    assert len(hashes) == 7


def test_contract_bytes_of_an_unknown_source_or_an_open_share_are_refused() -> None:
    def raw(lines: list[list[int]]) -> bytes:
        return cbor.encode({0: 0, 1: lines, 2: 0, 3: [], 5: [], 6: "home"})

    assert contract_from_bytes(raw([[1, WHOLE_PPM]])).shares_ppm == (WHOLE_PPM,)
    with pytest.raises(MalformedMessage, match="number of a source or group"):
        contract_from_bytes(raw([[50, WHOLE_PPM]]))
    with pytest.raises(MalformedMessage, match="add up to 1000000 ppm"):
        contract_from_bytes(raw([[1, 999_999]]))
    with pytest.raises(ContractError, match="stands in two lines"):
        contract_from_bytes(raw([[1, 500_000], [1, 500_000]]))


@pytest.mark.parametrize(
    ("time_s", "start_s"),
    [
        (0, 0),
        (utc(2024, 2, 29, 23, 59, 59), utc(2024, 2, 1)),
        (utc(2024, 3, 1), utc(2024, 3, 1)),
        (utc(2023, 12, 31, 23, 30), utc(2023, 12, 1)),
        (utc(2024, 1, 1), utc(2024, 1, 1)),
    ],
)
def test_the_accounting_period_is_the_utc_month(time_s: int, start_s: int) -> None:
    assert period_start(time_s) == start_s


def test_history_counts_from_the_later_of_version_and_period() -> None:
    contract = make_contract(utc(2024, 3, 10), [("solar", WHOLE_PPM)], UNMATCHED, area="home")
    assert history_start(contract, utc(2024, 3, 20)) == utc(2024, 3, 10)
    assert history_start(contract, utc(2024, 4, 20)) == utc(2024, 4, 1)


def test_a_history_adds_up_and_substitutes_count_in_the_total_only() -> None:
    contract = make_contract(0, [("solar", 400_000)], UNMATCHED, area="home")
    history = History.empty(contract).plus((0, 10)).plus((1, 5), (NO_LINE, 7))
    assert history == History((10, 5), 22)


@pytest.mark.parametrize(("by_line", "total"), [((5, 6), 10), ((-1, 0), 10)])
def test_a_history_that_cannot_be_is_refused(by_line: tuple[int, ...], total: int) -> None:
    with pytest.raises(ValueError, match="cannot add up"):
        History(by_line, total)


@pytest.mark.parametrize(
    ("source", "line"),
    [(Source.SOLAR, 2), (Source.HYDRO, 1), (Source.COAL, 0), (Source.NUCLEAR, 0)],
)
def test_a_substitute_counts_for_the_most_exact_line_that_covers_it(source: Source, line: int) -> None:
    shares = [("any", 200_000), ("renewable", 300_000), ("solar", 500_000)]
    assert make_contract(0, shares, UNMATCHED, area="home").line_for(source) == line


def test_a_substitute_outside_all_lines_counts_for_none() -> None:
    contract = make_contract(0, [("solar", 500_000), ("fossil", 500_000)], UNMATCHED, area="home")
    assert contract.line_for(Source.WIND) == NO_LINE


def test_a_ceiling_for_what_no_line_takes_is_refused() -> None:
    with pytest.raises(ContractError, match="coal has a price ceiling, but no line or substitute takes it"):
        make_contract(0, [("solar", WHOLE_PPM)], UNMATCHED, area="home", price_ceilings=[("coal", 5)])
    substitutes = make_contract(
        0,
        [("solar", WHOLE_PPM)],
        ShortageChoice.SUBSTITUTES,
        area="home",
        substitutes=["coal"],
        price_ceilings=[("coal", 5)],
    )
    assert substitutes.highest_price_of(Source.COAL) == 5


def test_a_source_costs_at_most_its_ceiling_and_the_highest_price() -> None:
    contract = make_contract(0, [], UNMATCHED, area="home", highest_price=70, price_ceilings=[("wind", 60)])
    assert (contract.highest_price_of(Source.WIND), contract.highest_price_of(Source.SOLAR)) == (60, 70)
    assert make_contract(0, [], UNMATCHED, area="home").highest_price_of(Source.WIND) is None


@pytest.mark.parametrize(
    "choice",
    [
        {"window": Window.DAY},
        {"highest_price": 0},
        {"price_ceilings": [("wind", 5)]},
        {"excluded_providers": ["sumi"]},
        {"preferred_providers": ["aoi"]},
    ],
)
def test_a_contract_with_a_choice_of_its_own_is_not_plain(choice: dict[str, Any]) -> None:
    assert make_contract(0, [], UNMATCHED, area="home").is_plain
    chosen = make_contract(0, [], UNMATCHED, area="home", **choice)
    assert not chosen.is_plain
    assert contract_from_bytes(contract_bytes(chosen)) == chosen
    assert contract_hash(chosen) != contract_hash(make_contract(0, [], UNMATCHED, area="home"))


def test_the_order_in_which_a_person_excludes_and_limits_changes_nothing() -> None:
    one, other = (
        make_contract(
            0,
            [],
            UNMATCHED,
            area="home",
            excluded_providers=["sumi", "gasu"][::step],
            price_ceilings=[("wind", 5), ("solar", 6)][::step],
        )
        for step in (1, -1)
    )
    assert contract_bytes(one) == contract_bytes(other)


def test_bytes_that_say_what_goes_without_saying_are_refused() -> None:
    contract = make_contract(0, [], UNMATCHED, area="home")
    data = cbor.decode(contract_bytes(contract), "contract", 1_024)
    for key, value in ((7, []), (8, []), (9, 0)):
        with pytest.raises(MalformedMessage, match="nothing that goes unsaid"):
            contract_from_bytes(cbor.encode({**data, key: value}))
