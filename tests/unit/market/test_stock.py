"""Stock: what is taken, in which order, and that stocks with the same Wh behave the same."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.market.lots import Lot
from broker.market.stock import AssetKey, HeldSlice, Stock, StockError
from broker.protocol.market_time import Interval
from broker.protocol.sources import Source

FIRST, SECOND = Interval(0, 1_800), Interval(1_800, 3_600)
ROOF: AssetKey = ("roof", 0, 0, 0)
MILL: AssetKey = ("mill", 0, 0, 0)


def piece(
    asset: AssetKey, from_wh: int, to_wh: int, price: int = 10, source: Source = Source.SOLAR, of: Interval = FIRST
) -> HeldSlice:
    return HeldSlice(asset, source, of.start_s, of.end_s, from_wh, to_wh, price)


def stock_of(*pieces: HeldSlice) -> Stock:
    stock = Stock()
    for one in pieces:
        stock.add(one)
    return stock


def test_stock_is_counted_by_interval_and_by_source() -> None:
    later: AssetKey = ("roof", 0, SECOND.start_s, 0)
    stock = stock_of(
        piece(ROOF, 0, 100),
        piece(MILL, 50, 90, source=Source.WIND),
        piece(later, 0, 7, of=SECOND),
    )
    assert stock.available(FIRST) == {Source.SOLAR: 100, Source.WIND: 40}
    assert stock.available(SECOND) == {Source.SOLAR: 7}
    assert stock.available(Interval(3_600, 5_400)) == {}


def test_taking_goes_by_device_then_revision_then_range_and_splits_the_last_slice() -> None:
    corrected: AssetKey = ("mill", 0, 0, 1)
    stock = stock_of(piece(ROOF, 0, 100), piece(corrected, 30, 40), piece(MILL, 20, 30), piece(MILL, 0, 10))
    assert stock.take(Source.SOLAR, 0, 35) == [
        piece(MILL, 0, 10),
        piece(MILL, 20, 30),
        piece(corrected, 30, 40),
        piece(ROOF, 0, 5),
    ]
    assert stock.take(Source.SOLAR, 0, 95) == [piece(ROOF, 5, 100)]
    assert stock.available(FIRST) == {}


def test_a_stock_that_learns_late_whose_a_device_is_behaves_like_one_that_knew() -> None:
    known, late = Stock(), Stock()
    for asset, from_wh, to_wh, owner in ((ROOF, 0, 60, "ola"), (MILL, 10, 40, "pia"), (ROOF, 80, 100, "ola")):
        known.add(piece(asset, from_wh, to_wh)._replace(provider=owner))
        late.add(piece(asset, from_wh, to_wh))
    unknown = Lot(Source.SOLAR, 0, "", 10)
    # Taken and put back, so that the order within the lot has been looked up once.
    for held in late.take_lots([unknown], 5):
        late.add(held)
    late.hold_back({unknown: 20})
    assert late.holds_back_of("")
    late.set_provider("roof", "ola")
    late.set_provider("mill", "pia")
    late.add(piece(ROOF, 60, 80)._replace(provider="ola"))
    known.add(piece(ROOF, 60, 80)._replace(provider="ola"))
    assert (
        late.lots(0, 1)
        == known.lots(0, 1)
        == {Lot(Source.SOLAR, 0, "ola", 10): 100, Lot(Source.SOLAR, 0, "pia", 10): 30}
    )
    ola = [Lot(Source.SOLAR, 0, "ola", 10)]
    assert late.take_lots(ola, 70) == known.take_lots(ola, 70)
    assert late.take(Source.SOLAR, 0, 60) == known.take(Source.SOLAR, 0, 60)


def test_taking_nothing_gives_nothing() -> None:
    assert Stock().take(Source.SOLAR, 0, 0) == []
    assert stock_of(piece(ROOF, 0, 1)).take(Source.SOLAR, 0, 0) == []


@pytest.mark.parametrize(
    ("source", "start_s", "energy_wh"),
    [(Source.SOLAR, 0, 101), (Source.WIND, 0, 1), (Source.SOLAR, 1_800, 1), (Source.SOLAR, 0, -1)],
)
def test_taking_more_than_there_is_takes_nothing(source: Source, start_s: int, energy_wh: int) -> None:
    stock = stock_of(piece(ROOF, 0, 100))
    with pytest.raises(StockError, match="rebuild the stock"):
        stock.take(source, start_s, energy_wh)
    assert stock.available(FIRST) == {Source.SOLAR: 100}


def test_given_back_slices_are_taken_again_first_and_whole() -> None:
    stock = stock_of(piece(ROOF, 0, 100))
    for one in stock.take(Source.SOLAR, 0, 30):
        stock.add(one)
    assert stock.take(Source.SOLAR, 0, 60) == [piece(ROOF, 0, 60)]


@pytest.mark.parametrize("step", [1, -1])
def test_slices_of_different_prices_stay_apart(step: int) -> None:
    pieces = [piece(ROOF, 0, 10, price=1), piece(ROOF, 10, 20, price=2)]
    stock = stock_of(*pieces[::step])
    assert stock.take(Source.SOLAR, 0, 15) == [piece(ROOF, 0, 10, price=1), piece(ROOF, 10, 15, price=2)]


def test_removing_cuts_a_range_out_of_the_middle() -> None:
    stock = stock_of(piece(ROOF, 0, 50), piece(ROOF, 50, 100, price=11))
    stock.remove(ROOF, 40, 60)
    assert stock.available(FIRST) == {Source.SOLAR: 80}
    assert stock.take(Source.SOLAR, 0, 80) == [piece(ROOF, 0, 40), piece(ROOF, 60, 100, price=11)]


def test_removing_from_one_of_several_slices_leaves_all_others_in_order() -> None:
    stock = stock_of(piece(ROOF, 0, 10), piece(ROOF, 20, 30), piece(ROOF, 40, 50))
    stock.remove(ROOF, 22, 25)
    assert stock.take(Source.SOLAR, 0, 27) == [
        piece(ROOF, 0, 10),
        piece(ROOF, 20, 22),
        piece(ROOF, 25, 30),
        piece(ROOF, 40, 50),
    ]


@pytest.mark.parametrize(
    ("asset", "from_wh", "to_wh"),
    [(ROOF, 90, 101), (ROOF, 40, 60), (MILL, 0, 1), (("roof", 0, 1_800, 0), 0, 1), (ROOF, 5, 5), (ROOF, -1, 5)],
)
def test_removing_what_is_not_all_held_removes_nothing(asset: AssetKey, from_wh: int, to_wh: int) -> None:
    stock = stock_of(piece(ROOF, 0, 50), piece(ROOF, 55, 100))
    with pytest.raises(StockError):
        stock.remove(asset, from_wh, to_wh)
    assert stock.take(Source.SOLAR, 0, 95) == [piece(ROOF, 0, 50), piece(ROOF, 55, 100)]


@pytest.mark.parametrize(
    "wrong",
    [
        piece(ROOF, 0, 100),
        piece(ROOF, 99, 100),
        piece(ROOF, 0, 1),
        piece(ROOF, 50, 150),
        piece(ROOF, 200, 200),
        piece(ROOF, -5, 0),
        piece(ROOF, 200, 300, of=SECOND),
    ],
)
def test_adding_what_is_held_already_or_makes_no_sense_changes_nothing(wrong: HeldSlice) -> None:
    stock = stock_of(piece(ROOF, 0, 100))
    with pytest.raises(StockError):
        stock.add(wrong)
    assert stock.available(FIRST) == {Source.SOLAR: 100}
    assert stock.take(Source.SOLAR, 0, 100) == [piece(ROOF, 0, 100)]


def test_old_intervals_are_dropped() -> None:
    later: AssetKey = ("roof", 0, SECOND.start_s, 0)
    stock = stock_of(piece(ROOF, 0, 100), piece(later, 0, 7, of=SECOND))
    stock.drop_before(SECOND.start_s)
    assert (stock.available(FIRST), stock.available(SECOND)) == ({}, {Source.SOLAR: 7})


ASSETS: tuple[AssetKey, ...] = (ROOF, MILL, ("mill", 0, 0, 1))


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["add", "take", "back", "remove"]), st.randoms(use_true_random=False))))
def test_stock_agrees_with_a_set_of_single_wh_and_forgets_how_it_came_about(
    steps: list[tuple[str, random.Random]],
) -> None:
    stock = Stock()
    held: set[tuple[AssetKey, int]] = set()
    taken: list[HeldSlice] = []

    def wh_of(pieces: list[HeldSlice]) -> list[tuple[AssetKey, int]]:
        return [(one.asset, wh) for one in pieces for wh in range(one.from_wh, one.to_wh)]

    for step, chooser in steps:
        asset, from_wh = chooser.choice(ASSETS), chooser.randrange(20)
        to_wh = from_wh + chooser.randint(1, 10)
        wanted = {(asset, wh) for wh in range(from_wh, to_wh)}
        if step == "add" and not wanted & (held | set(wh_of(taken))):
            stock.add(piece(asset, from_wh, to_wh))
            held |= wanted
        elif step == "take":
            pieces = stock.take(Source.SOLAR, 0, chooser.randint(0, len(held)))
            assert wh_of(pieces) == sorted(held)[: len(wh_of(pieces))]
            held -= set(wh_of(pieces))
            taken.extend(pieces)
        elif step == "back" and taken:
            back = taken.pop(chooser.randrange(len(taken)))
            stock.add(back)
            held |= set(wh_of([back]))
        elif step == "remove" and wanted <= held:
            stock.remove(asset, from_wh, to_wh)
            held -= wanted
        assert stock.available(FIRST).get(Source.SOLAR, 0) == len(held)

    rebuilt = Stock()
    for asset, wh in sorted(held, reverse=True):
        rebuilt.add(piece(asset, wh, wh + 1))
    for energy_wh in (len(held) // 3, len(held) - len(held) // 3):
        assert stock.take(Source.SOLAR, 0, energy_wh) == rebuilt.take(Source.SOLAR, 0, energy_wh)


# --- lots


def of_lot(asset: AssetKey, from_wh: int, to_wh: int, provider: str, **more: Any) -> HeldSlice:
    return piece(asset, from_wh, to_wh)._replace(provider=provider, **more)


def test_lots_are_what_contracts_can_tell_apart() -> None:
    stock = stock_of(
        of_lot(ROOF, 0, 10, "ola", reserved=True, only_for=("anna",)),
        of_lot(ROOF, 10, 40, "ola", reserved=True),
        of_lot(ROOF, 40, 100, "ola"),
        of_lot(MILL, 0, 7, "ola"),
        of_lot(MILL, 7, 9, "pia"),
    )
    assert stock.lots(0, 1) == {
        Lot(Source.SOLAR, 0, "ola", 10): 67,
        Lot(Source.SOLAR, 0, "ola", 10, True): 30,
        Lot(Source.SOLAR, 0, "ola", 10, True, ("anna",)): 10,
        Lot(Source.SOLAR, 0, "pia", 10): 2,
    }
    assert stock.lots(1, 1_800) == {}


def test_taking_of_lots_goes_lot_by_lot_and_leaves_the_others_alone() -> None:
    stock = stock_of(of_lot(ROOF, 0, 50, "ola"), of_lot(MILL, 0, 50, "pia"), of_lot(MILL, 50, 60, "ola"))
    ola, pia = Lot(Source.SOLAR, 0, "ola", 10), Lot(Source.SOLAR, 0, "pia", 10)
    assert stock.take_lots([ola], 20) == [of_lot(MILL, 50, 60, "ola"), of_lot(ROOF, 0, 10, "ola")]
    assert stock.take_lots([pia, ola], 55) == [of_lot(MILL, 0, 50, "pia"), of_lot(ROOF, 10, 15, "ola")]
    assert stock.take(Source.SOLAR, 0, 35) == [of_lot(ROOF, 15, 50, "ola")]


def test_more_than_the_lots_hold_is_refused_and_nothing_is_taken() -> None:
    stock = stock_of(of_lot(ROOF, 0, 50, "ola"), of_lot(MILL, 0, 50, "pia"))
    with pytest.raises(StockError, match="51 Wh of 1 lots wanted, 1 fewer held"):
        stock.take_lots([Lot(Source.SOLAR, 0, "ola", 10)], 51)
    assert stock.available(FIRST) == {Source.SOLAR: 100}


def test_what_is_held_back_of_a_lot_is_not_free_and_can_be_taken_all_the_same() -> None:
    stock = stock_of(of_lot(ROOF, 0, 50, "ola"), of_lot(MILL, 0, 50, "pia"), of_lot(MILL, 50, 60, "ola"))
    ola = Lot(Source.SOLAR, 0, "ola", 10)
    stock.hold_back({ola: 25, Lot(Source.SOLAR, 0, "pia", 10): 60})
    assert list(stock.slices(FIRST)) == [of_lot(MILL, 50, 60, "ola"), of_lot(ROOF, 0, 25, "ola")]
    assert stock.take_lots([ola], 60) == [of_lot(MILL, 50, 60, "ola"), of_lot(ROOF, 0, 50, "ola")]
    assert list(stock.slices(FIRST)) == []
    stock.hold_back({})
    assert list(stock.slices(FIRST)) == [of_lot(MILL, 0, 50, "pia")]


def test_reserves_are_known_by_interval() -> None:
    stock = stock_of(of_lot(ROOF, 0, 50, "ola", reserved=True))
    assert stock.holds_reserves(FIRST)
    assert not stock.holds_reserves(SECOND)


@pytest.mark.parametrize("seed", range(50))
def test_however_lots_and_sources_are_taken_no_wh_is_lost_or_given_twice(seed: int) -> None:
    chooser = random.Random(seed)
    stock = Stock()
    left: dict[tuple[AssetKey, int], str] = {}
    for asset in (ROOF, MILL):
        at = 0
        for _ in range(4):
            size, provider = chooser.randint(1, 6), chooser.choice(["ola", "pia"])
            stock.add(of_lot(asset, at, at + size, provider))
            left.update({(asset, wh): provider for wh in range(at, at + size)})
            at += size
    while left:
        provider = chooser.choice(["ola", "pia", ""])
        mine = [key for key in left if not provider or left[key] == provider]
        wh = chooser.randint(0, min(5, len(mine)))
        lots = [Lot(Source.SOLAR, 0, provider, 10)]
        pieces = stock.take_lots(lots, wh) if provider else stock.take(Source.SOLAR, 0, wh)
        taken = [(one.asset, number) for one in pieces for number in range(one.from_wh, one.to_wh)]
        assert taken == sorted(mine)[:wh]
        for key in taken:
            del left[key]
        assert stock.available(FIRST).get(Source.SOLAR, 0) == len(left)
        if chooser.random() < 0.3:
            for one in pieces:
                stock.add(one)
                left.update({(one.asset, number): one.provider for number in range(one.from_wh, one.to_wh)})
