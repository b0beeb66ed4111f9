"""Corrected readings and demands: what is added, withdrawn (and in which order), carried, returned and reopened."""

from dataclasses import replace

import pytest
from support.ledger_world import (
    GENESIS,
    INTERVAL_S,
    T0,
    World,
    admit,
    asset,
    close,
    correct,
    correct_demand,
    deliver,
    issue,
    order,
    pseudonym,
    seal,
    sell,
    take,
)

from broker.ledger import state as rows
from broker.ledger.faults import Fault, RuleViolation
from broker.ledger.operations import Transfer
from broker.ledger.rules import generation
from broker.ledger.state import CarryRow, Held, MeteredRow, TotalRow
from broker.protocol.sources import Source

NEXT = T0 + INTERVAL_S
DEADLINE_S = GENESIS.correction_deadline_s
LATER = 2**40
CAPACITY_WH = 2_200  # 4000 W, half an hour, and a tenth


def held(world: World, device: str = "solar-1", start_s: int = T0, revision: int = 0) -> tuple[Held, ...]:
    row = world.get(*rows.asset_key(asset(device, start_s, revision)))
    return () if row is None else row.held


def total(world: World, start_s: int = T0, source: Source = Source.SOLAR) -> TotalRow:
    found: TotalRow = world.get(rows.TOTAL, start_s, int(source))
    return found


def metered(world: World, device: str = "solar-1", start_s: int = T0) -> MeteredRow | None:
    found: MeteredRow | None = world.get(rows.METERED, start_s, device, 0)
    return found


def carried(world: World, device: str = "solar-1") -> int:
    row: CarryRow | None = world.get(rows.CARRY, device, 0)
    return 0 if row is None else row.energy_wh


def delivered(world: World, number: int, start_s: int = T0) -> int:
    energy_wh: int = world.get(rows.DEMAND, start_s, pseudonym(number)).delivered_wh
    return energy_wh


def close_up_to(world: World, clock_s: int, by: str = "b1") -> None:
    world.apply(close(clock_s - INTERVAL_S), by=by, not_after_s=LATER)


# --- Up


def test_a_reading_as_issued_needs_no_row_of_its_own() -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 1_000))
    assert metered(world) is None
    assert carried(world) == 0


def test_a_correction_up_is_another_range_of_the_same_interval() -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 1_000), take("solar-1", 0, 1_000), correct("solar-1", 1_300))
    assert held(world, revision=1) == (Held(1_000, 1_300, "alice"),)
    assert total(world) == TotalRow(1_300, 1_300, 0, 0, 0)
    assert metered(world) == MeteredRow(1, 1_300, 1_300, 1_300)
    world.apply(Transfer(asset("solar-1", revision=1), 1_000, 1_300, "alice", "b1", 1, None))
    assert held(world, revision=1) == (Held(1_000, 1_300, "b1"),)


def test_a_correction_may_come_before_its_reading() -> None:
    world = World.set_up()
    world.apply(correct("solar-1", 900))
    assert held(world, revision=1) == (Held(0, 900, "alice"),)
    assert metered(world) == MeteredRow(1, 900, 900, 900)
    with pytest.raises(RuleViolation) as caught:
        world.apply(issue("solar-1", 1_000))
    assert caught.value.code is Fault.ISSUED_BEFORE


def test_a_correction_of_the_quality_alone_counts_its_revision() -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 500), correct("solar-1", 500))
    assert metered(world) == MeteredRow(1, 500, 500, 500)
    assert world.get(*rows.asset_key(asset("solar-1", revision=1))) is None
    world.apply(correct("solar-1", 600, 2))
    assert held(world, revision=2) == (Held(500, 600, "alice"),)


def test_ranges_are_never_used_again() -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 500), correct("solar-1", 300), correct("solar-1", 400, 2), correct("solar-1", 450, 3))
    assert held(world) == (Held(0, 300, "alice"),)
    assert held(world, revision=2) == (Held(500, 600, "alice"),)
    assert held(world, revision=3) == (Held(600, 650, "alice"),)
    assert metered(world) == MeteredRow(3, 450, 650, 450)
    assert total(world) == TotalRow(650, 450, 0, 200, 0)


# --- Down


def test_a_correction_down_takes_first_from_the_owner_then_from_holders_then_from_deliveries_newest_first() -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 1_000), take("solar-1", 0, 900))
    world.apply(deliver(1, 300, ("solar-1", 300, 600)), deliver(2, 300, ("solar-1", 0, 300)))
    # alice holds 100, b1 300; delivered: first 300 to consumer 1, then 300 to consumer 2.
    world.apply(correct("solar-1", 950))
    assert held(world) == (Held(600, 900, "b1"), Held(900, 950, "alice"))
    world.apply(correct("solar-1", 750, 2))
    assert held(world) == (Held(600, 750, "b1"),)
    assert world.get(rows.OWNED, "alice", T0, "solar-1", 0, 0) is None
    world.apply(correct("solar-1", 500, 3))
    assert held(world) == ()
    assert (delivered(world, 1), delivered(world, 2)) == (300, 200)
    assert world.get(rows.SLICE, T0, "solar-1", 0, 0, 0).to_wh == 200
    world.apply(correct("solar-1", 250, 4))
    assert (delivered(world, 1), delivered(world, 2)) == (250, 0)
    assert world.get(rows.SLICE, T0, "solar-1", 0, 0, 0) is None
    assert world.get(rows.SLICE, T0, "solar-1", 0, 0, 300).to_wh == 550
    assert total(world) == TotalRow(1_000, 0, 250, 750, 0)
    assert carried(world) == 0


def test_the_newest_revision_is_withdrawn_first() -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 500), correct("solar-1", 800), correct("solar-1", 600, 2))
    assert held(world) == (Held(0, 500, "alice"),)
    assert held(world, revision=1) == (Held(500, 600, "alice"),)


def test_a_withdrawn_delivery_opens_its_demand_again_and_another_fills_it() -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 500), take("solar-1", 0, 500), deliver(1, 500, ("solar-1", 0, 500)), close())
    world.apply(issue("wind-1", 200), take("wind-1", 0, 200))
    with pytest.raises(RuleViolation) as caught:
        world.apply(deliver(1, 500, ("wind-1", 0, 200)))
    assert caught.value.code is Fault.DEMAND_EXCEEDED
    world.apply(correct("solar-1", 350))
    assert delivered(world, 1) == 350
    world.apply(deliver(1, 500, ("wind-1", 0, 150)))
    assert delivered(world, 1) == 500


def test_what_a_neighbour_holds_is_withdrawn_too_and_its_order_stays_used() -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 500), take("solar-1", 0, 500), sell("solar-1", 0, 500, seal(order(), "b2")))
    world.apply(correct("solar-1", 400))
    assert held(world) == (Held(0, 400, "b2"),)
    assert world.get(rows.ORDER, "b2", b"o" * 16).used_wh == 500
    world.apply(correct("solar-1", 0, 2))
    assert world.get(rows.OWNED, "b2", T0, "solar-1", 0, 0) is None


def test_what_cannot_be_found_among_too_many_deliveries_is_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "MAX_SEARCHED_DELIVERIES", 2)
    world = World.set_up()
    world.apply(issue("solar-1", 100), take("solar-1", 0, 100))
    world.apply(*(deliver(i, 10, ("solar-1", 10 * i, 10 * i + 10)) for i in range(3)))
    world.apply(correct("solar-1", 20))
    assert total(world) == TotalRow(100, 0, 30, 70, 0)
    assert carried(world) == -10
    assert metered(world) == MeteredRow(1, 20, 100, 30)


def test_a_correction_withdraws_a_bounded_number_of_deliveries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "MAX_WITHDRAWN_SLICES", 2)
    world = World.set_up()
    world.apply(issue("solar-1", 40), take("solar-1", 0, 40))
    world.apply(*(deliver(i, 10, ("solar-1", 10 * i, 10 * i + 10)) for i in range(4)))
    world.apply(correct("solar-1", 5))
    assert [delivered(world, i) for i in range(4)] == [10, 10, 0, 0]
    assert carried(world) == -15
    world.apply(correct("solar-1", 5, 2))
    assert carried(world) == -15, "the next correction takes only what it changes itself"


def test_a_search_counts_over_the_revisions_of_one_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "MAX_SEARCHED_DELIVERIES", 1)
    world = World.set_up()
    world.apply(issue("solar-1", 10), take("solar-1", 0, 10), deliver(1, 10, ("solar-1", 0, 10)))
    world.apply(correct("solar-1", 20))
    one = deliver(2, 10, ("solar-1", 10, 20))
    newest = asset("solar-1", revision=1)
    world.apply(
        Transfer(newest, 10, 20, "alice", "b1", 1, None),
        replace(one, slices=(one.slices[0]._replace(asset=newest),)),
    )
    world.apply(correct("solar-1", 5, 2))
    assert (delivered(world, 1), delivered(world, 2)) == (10, 0)
    assert carried(world) == -5


# --- Carried


def test_a_late_correction_moves_nothing_but_the_devices_next_issues() -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 1_000))
    close_up_to(world, NEXT + DEADLINE_S)
    world.apply(correct("solar-1", 700), not_after_s=LATER)
    assert held(world) == (Held(0, 1_000, "alice"),)
    assert metered(world) == MeteredRow(1, 700, 1_000, 1_000)
    assert carried(world) == -300
    start_s = NEXT + DEADLINE_S
    world.apply(issue("solar-1", 200, start_s), not_after_s=LATER)
    assert held(world, start_s=start_s) == ()
    assert metered(world, start_s=start_s) == MeteredRow(0, 200, 0, 0)
    assert carried(world) == -100
    world.apply(issue("solar-1", 500, start_s + INTERVAL_S), not_after_s=LATER)
    assert held(world, start_s=start_s + INTERVAL_S) == (Held(0, 400, "alice"),)
    assert metered(world, start_s=start_s + INTERVAL_S) == MeteredRow(0, 500, 400, 400)
    assert world.get(rows.CARRY, "solar-1", 0) is None


def test_the_interval_just_before_the_deadline_is_still_corrected() -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 1_000))
    close_up_to(world, DEADLINE_S + T0)
    world.apply(correct("solar-1", 700), not_after_s=LATER)
    assert held(world) == (Held(0, 700, "alice"),)


def test_a_late_reading_makes_no_asset_and_is_carried() -> None:
    world = World.set_up()
    close_up_to(world, NEXT + INTERVAL_S + DEADLINE_S)
    world.apply(issue("solar-1", 1_000), not_after_s=LATER)
    assert held(world) == ()
    assert carried(world) == 1_000
    with pytest.raises(RuleViolation) as caught:
        world.apply(issue("solar-1", 1_000), by="b2", not_after_s=LATER)
    assert caught.value.code is Fault.ISSUED_BEFORE
    with pytest.raises(RuleViolation) as caught:
        world.apply(issue("solar-1", 0, NEXT), not_after_s=LATER)
    assert caught.value.code is Fault.NOTHING_TO_ISSUE


def test_a_surplus_is_issued_up_to_the_capacity_and_even_by_an_idle_device() -> None:
    world = World.set_up()
    close_up_to(world, NEXT + DEADLINE_S)
    world.apply(issue("solar-1", 2_000), not_after_s=LATER)
    start_s = NEXT + DEADLINE_S
    world.apply(issue("solar-1", 1_500, start_s), not_after_s=LATER)
    assert held(world, start_s=start_s) == (Held(0, CAPACITY_WH, "alice"),)
    assert carried(world) == 1_300
    world.apply(issue("solar-1", 0, start_s + INTERVAL_S), not_after_s=LATER)
    assert held(world, start_s=start_s + INTERVAL_S) == (Held(0, 1_300, "alice"),)
    assert metered(world, start_s=start_s + INTERVAL_S) == MeteredRow(0, 0, 1_300, 1_300)
    assert carried(world) == 0
    with pytest.raises(RuleViolation) as caught:
        world.apply(issue("solar-1", 0, start_s + 2 * INTERVAL_S), not_after_s=LATER)
    assert caught.value.code is Fault.NOTHING_TO_ISSUE


def test_at_the_capacity_a_surplus_stays_carried_and_the_asset_says_it_all() -> None:
    world = World.set_up()
    close_up_to(world, NEXT + DEADLINE_S)
    world.apply(issue("solar-1", 100), not_after_s=LATER)
    start_s = NEXT + DEADLINE_S
    world.apply(issue("solar-1", CAPACITY_WH, start_s), not_after_s=LATER)
    assert metered(world, start_s=start_s) is None
    assert carried(world) == 100


def test_a_correction_up_stops_at_the_capacity_of_all_revisions_together() -> None:
    world = World.set_up()
    close_up_to(world, NEXT + DEADLINE_S)
    world.apply(issue("solar-1", 100), not_after_s=LATER)
    start_s = NEXT + DEADLINE_S
    world.apply(issue("solar-1", 2_150, start_s), not_after_s=LATER)
    assert carried(world) == 50
    world.apply(correct("solar-1", 2_190, start_s=start_s), not_after_s=LATER)
    assert metered(world, start_s=start_s) == MeteredRow(1, 2_190, CAPACITY_WH, CAPACITY_WH)
    assert carried(world) == 90


def test_the_deadline_is_that_of_the_broker_mandated_for_the_interval() -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 1_000))
    close_up_to(world, NEXT + DEADLINE_S, by="b2")
    world.apply(correct("solar-1", 700), by="b2", not_after_s=LATER)
    assert held(world) == (Held(0, 700, "alice"),)


def test_without_a_mandate_no_deadline_passes() -> None:
    world = World.set_up()
    world.apply(admit("solar-2"), issue("solar-2", 1_000))
    close_up_to(world, NEXT + DEADLINE_S)
    world.apply(correct("solar-2", 700), not_after_s=LATER)
    assert held(world, "solar-2") == (Held(0, 700, "alice"),)


# --- Demands


def test_a_demand_corrected_down_returns_the_excess_to_its_broker() -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 500), take("solar-1", 0, 500))
    world.apply(deliver(1, 300, ("solar-1", 0, 100), ("solar-1", 100, 300)), close(demanded_wh=300))
    assert held(world) == (Held(300, 500, "b1"),)
    world.apply(correct_demand(1, 60, ("solar-1", 100, 100, 300), ("solar-1", 0, 60, 100), commitment=b"n" * 32))
    assert held(world) == (Held(60, 500, "b1"),)
    assert world.get(rows.SLICE, T0, "solar-1", 0, 0, 100) is None
    assert world.get(rows.SLICE, T0, "solar-1", 0, 0, 0).to_wh == 60
    row = world.get(rows.DEMAND, T0, pseudonym(1))
    assert (row.demanded_wh, row.delivered_wh, row.revision, row.commitment) == (60, 60, 1, b"n" * 32)
    assert total(world) == TotalRow(500, 440, 60, 0, 0)
    world.apply(deliver(2, 240, ("solar-1", 100, 300), ("solar-1", 60, 100)))
    assert world.get(rows.SLICE, T0, "solar-1", 0, 0, 100).sequence == 2


def test_the_index_of_owners_knows_what_came_back() -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 500), take("solar-1", 0, 500), deliver(1, 500, ("solar-1", 0, 500)))
    assert world.get(rows.OWNED, "b1", T0, "solar-1", 0, 0) is None
    world.apply(correct_demand(1, 400, ("solar-1", 0, 400, 500)))
    assert world.get(rows.OWNED, "b1", T0, "solar-1", 0, 0) is not None


def test_a_slice_returned_and_delivered_again_in_one_batch_hashes_like_in_two() -> None:
    worlds = World.set_up(), World.set_up()
    back = correct_demand(1, 0, ("solar-1", 0, 0, 500)), deliver(2, 500, ("solar-1", 0, 500))
    for world in worlds:
        world.apply(issue("solar-1", 500), take("solar-1", 0, 500), deliver(1, 500, ("solar-1", 0, 500)))
    worlds[0].apply(*back)
    worlds[1].apply(back[0])
    worlds[1].apply(back[1])
    slice_key = (rows.SLICE, T0, "solar-1", 0, 0, 0)
    assert worlds[0].get(*slice_key) == worlds[1].get(*slice_key)


def test_a_demand_corrected_up_is_filled_by_deliveries_that_quote_it() -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 500), take("solar-1", 0, 500), deliver(1, 100, ("solar-1", 0, 100)))
    world.apply(correct_demand(1, 250, commitment=b"n" * 32))
    with pytest.raises(RuleViolation) as caught:
        world.apply(deliver(1, 100, ("solar-1", 100, 101)))
    assert caught.value.code is Fault.DEMAND_CHANGED
    world.apply(deliver(1, 250, ("solar-1", 100, 250), commitment=b"n" * 32))
    assert delivered(world, 1) == 250
    assert world.get(rows.DEMAND, T0, pseudonym(1)).revision == 1


def test_a_demand_that_was_short_anyway_returns_nothing() -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 500), take("solar-1", 0, 500), deliver(1, 400, ("solar-1", 0, 100)))
    world.apply(correct_demand(1, 100))
    assert delivered(world, 1) == 100


def test_a_close_follows_what_corrections_lowered_and_no_further() -> None:
    world = World.set_up()
    world.apply(deliver(1, 300), close(demanded_wh=300), correct_demand(1, 100))
    with pytest.raises(RuleViolation) as caught:
        world.apply(close(revision=1, demanded_wh=99))
    assert caught.value.code is Fault.CLOSE_LOWERED
    world.apply(close(revision=1, demanded_wh=100))
    with pytest.raises(RuleViolation):
        world.apply(close(revision=2, demanded_wh=99))


def test_what_was_lowered_before_the_first_close_does_not_count() -> None:
    world = World.set_up()
    world.apply(deliver(1, 300), correct_demand(1, 100), close(demanded_wh=100))
    with pytest.raises(RuleViolation):
        world.apply(close(revision=1, demanded_wh=99))


def test_slices_that_came_back_may_be_more_than_can_be_split_but_can_be_used_up() -> None:
    world = World.set_up()
    count = 300
    world.apply(issue("solar-1", 2 * count), take("solar-1", 0, 2 * count))
    world.apply(*(deliver(i, 2, ("solar-1", 2 * i, 2 * i + 2)) for i in range(count)))
    world.apply(*(correct_demand(i, 1, ("solar-1", 2 * i, 2 * i + 1, 2 * i + 2)) for i in range(count)))
    assert len(held(world)) == count
    world.apply(*(deliver(1_000 + i, 1, ("solar-1", 2 * i + 1, 2 * i + 2)) for i in range(count)))
    assert held(world) == ()
    assert total(world) == TotalRow(2 * count, 0, 2 * count, 0, 0)
