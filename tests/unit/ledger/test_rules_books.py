"""The last check of every batch, on rows that no rule would write, and the sender's key against the sender's name."""

from dataclasses import replace
from pathlib import Path

import pytest
from support.ledger_world import (
    CHARTER,
    GENESIS,
    INTERVAL_S,
    T0,
    Nothing,
    World,
    admit,
    asset,
    batch,
    close,
    correct,
    correct_demand,
    deliver,
    found,
    genesis,
    issue,
    key,
    mandate,
    order,
    revoke,
    rotate,
    seal,
    sell,
    set_validator,
    take,
)

from broker.ledger import state
from broker.ledger.faults import Fault, LedgerInvariantBroken, RuleViolation
from broker.ledger.opening import OpenedBatch, charter_of
from broker.ledger.operations import DeliveredSlice, ReturnedSlice, Transfer, Void, encode_operation
from broker.ledger.rules import apply_batch, delivery, generation, validators_now
from broker.ledger.rules import validators as rules_of_validators
from broker.ledger.rules.books import check_books
from broker.ledger.rules.step import Refused, Step
from broker.ledger.state import AssetRow, Held, Overlay, TotalRow, asset_key
from broker.protocol.messages import KeyHolder, NamedKey

ASSET = (state.ASSET, T0, "solar-1", 0, 0)
TOTAL = (state.TOTAL, T0, 1)
LAST_USE_S = 31 * 86_400 + GENESIS.correction_deadline_s
"""So long after the start of its own interval begins the interval whose close expires an asset."""
SOUND = AssetRow(1, "north", 10, 1, 2, 3, (Held(0, 4, "alice"),), 1)


def written(key: state.Key, row: state.Row | None) -> Overlay:
    overlay = Overlay(Nothing())
    overlay.put(key, row)
    return overlay


def test_books_that_balance_pass() -> None:
    check_books(written(ASSET, SOUND))
    check_books(written(TOTAL, TotalRow(10, 4, 1, 2, 3)))
    check_books(written(ASSET, None))


@pytest.mark.parametrize(
    "row",
    [
        SOUND._replace(issued_wh=11),
        SOUND._replace(delivered_wh=0),
        SOUND._replace(withdrawn_wh=3),
        SOUND._replace(expired_wh=2),
        SOUND._replace(held=(Held(0, 3, "alice"),)),
    ],
)
def test_an_asset_that_does_not_add_up_stops_the_ledger(row: AssetRow) -> None:
    with pytest.raises(LedgerInvariantBroken):
        check_books(written(ASSET, row))


@pytest.mark.parametrize("row", [TotalRow(9, 4, 1, 2, 3), TotalRow(10, 5, 1, 2, 3), TotalRow(0, -1, 1, 0, 0)])
def test_a_total_that_does_not_add_up_or_is_negative_stops_the_ledger(row: TotalRow) -> None:
    with pytest.raises(LedgerInvariantBroken):
        check_books(written(TOTAL, row))


@pytest.mark.parametrize("holder", ["b2", "solar-1"])
def test_a_batch_under_the_key_of_another_party_or_of_a_meter_is_refused(holder: str) -> None:
    """Opening finds the sender by the key; the rules do not rest on that."""
    world = World.set_up()
    encoded = encode_operation(Void(b"o" * 16))
    opened = OpenedBatch("b1", key(holder).public.key_id, b"i" * 32, T0, (Void(b"o" * 16),), (encoded,), b"")
    with pytest.raises(RuleViolation) as caught:
        apply_batch(Overlay(world.state), CHARTER, opened)
    assert caught.value.code is Fault.NOT_REGISTERED


@pytest.mark.parametrize(("late_intervals", "refused"), [(0, True), (-1, False)])
def test_an_asset_is_past_use_with_the_very_close_that_expires_it(late_intervals: int, refused: bool) -> None:
    """b1 parks what it holds with bob while it closes, and takes it back: that helps only before its time."""
    world = World.set_up()
    world.apply(issue("solar-1", 10), take("solar-1", 0, 10))
    after_all_s = T0 + 3 * LAST_USE_S
    world.apply(Transfer(asset("solar-1"), 0, 10, "b1", "bob", 1, None))
    world.apply(close(T0 + LAST_USE_S + late_intervals * INTERVAL_S))
    asked = seal(order(requester="b1", path=("b1", "bob"), not_after_s=after_all_s), "b1")
    world.apply(Transfer(asset("solar-1"), 0, 10, "bob", "b1", 1, asked), by="bob", not_after_s=after_all_s)
    hand_over = Transfer(asset("solar-1"), 0, 10, "b1", "alice", 1, None)
    if not refused:
        world.apply(hand_over, not_after_s=after_all_s)
        return
    with pytest.raises(RuleViolation) as caught:
        world.apply(hand_over, not_after_s=after_all_s)
    assert caught.value.code is Fault.ASSET_EXPIRED


def test_nothing_expires_before_there_was_time_for_it(tmp_path: Path) -> None:
    """In the first weeks of 1970 the time to look back is negative, which as a bound in SQLite is above all others."""
    ledger = found(tmp_path)
    operations = (mandate("solar-2", from_s=0), issue("solar-2", 10, 0), take("solar-2", 0, 10, start_s=0))
    for raw in (batch(admit("solar-2"), *operations), batch(close(0))):
        assert ledger.submit(raw) is None
        ledger.commit()
    view = ledger.open_view()
    assert len(view.page("b1").entries) == 1
    view.close()
    ledger.close()


def test_as_many_slices_may_come_back_as_the_limit_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "MAX_RETURNED_SLICES", 2)
    world = World.set_up()
    world.apply(issue("solar-1", 10), take("solar-1", 0, 10), deliver(1, 4, ("solar-1", 0, 4)))
    world.apply(correct_demand(1, 3, ("solar-1", 0, 3, 4)), deliver(2, 4, ("solar-1", 4, 8)))
    world.apply(correct_demand(2, 2, ("solar-1", 4, 6, 8)))
    assert [(held.from_wh, held.to_wh) for held in world.get(*asset_key(asset("solar-1"))).held] == [(3, 4), (6, 10)]


def test_a_correction_that_held_wh_can_meet_searches_no_deliveries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "MAX_SEARCHED_BY_BATCH", 1)
    world = World.set_up()
    world.apply(issue("solar-1", 10), take("solar-1", 0, 10), deliver(1, 4, ("solar-1", 0, 2), ("solar-1", 2, 4)))
    world.apply(correct("solar-1", 4))
    row = world.get(*asset_key(asset("solar-1")))
    assert (row.delivered_wh, row.withdrawn_wh, row.held) == (4, 6, ())


def test_deliveries_that_all_came_back_are_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "MAX_SEARCHED_BY_BATCH", 1)
    world = World.set_up()
    world.apply(issue("solar-1", 4), take("solar-1", 0, 4), deliver(1, 4, ("solar-1", 0, 4)), correct("solar-1", 8))
    newer = asset("solar-1", revision=1)
    slices = (DeliveredSlice(newer, 4, 6, 0), DeliveredSlice(newer, 6, 8, 0))
    returned = (ReturnedSlice(newer, 4, 4, 6), ReturnedSlice(newer, 6, 6, 8))
    world.apply(
        Transfer(newer, 4, 8, "alice", "b1", 100, None),
        replace(deliver(2, 4), slices=slices),
        replace(correct_demand(2, 0), returned=returned),
    )
    world.apply(correct("solar-1", 0, 2))
    assert world.get(*asset_key(asset("solar-1"))).withdrawn_wh == 4
    assert world.get(*asset_key(newer)).withdrawn_wh == 4


def test_a_registrars_key_is_nobody_elses() -> None:
    world = World.set_up()
    for operation in (admit("solar-2", meter_key="registrar"), rotate("solar-1", "registrar", holder=KeyHolder.DEVICE)):
        with pytest.raises(RuleViolation) as caught:
            world.apply(operation)
        assert caught.value.code is Fault.KEY_TAKEN


def test_the_only_validator_may_get_another_power_and_one_that_goes_need_not_name_its_key() -> None:
    world = World.set_up()
    world.apply(set_validator("node", 2))
    world.apply(set_validator("n2", 1, 2), set_validator("n2", 0, 3, validator_key="node"))
    assert [validator.name for validator in validators_now(world.state, CHARTER).validators] == ["node"]


def test_a_change_of_validators_is_kept_as_the_registrars_signed_it() -> None:
    world = World.set_up()
    changes = [set_validator("n2", 1), set_validator("n3", 1, 2)]
    world.apply(*changes)
    kept = [world.get(state.VALIDATOR_CHANGES, sequence).statements for sequence in (1, 2)]
    assert kept == [change.statements for change in changes]


def test_half_of_the_registrars_is_not_more_than_half() -> None:
    two = tuple(NamedKey(name, key(name).public.cose_key) for name in ("registrar", "other"))
    charter = charter_of(genesis(registrars=two))
    world = World.set_up()
    step = Step(Overlay(world.state), charter, "b1", is_broker=True)
    with pytest.raises(Refused) as caught:
        rules_of_validators.set_validator(step, set_validator("n2", 1))
    assert caught.value.code is Fault.VALIDATOR_MAJORITY
    rules_of_validators.set_validator(step, set_validator("n2", 1, by=("registrar", "other")))


def test_a_change_of_exactly_a_third_is_too_much() -> None:
    world = World.set_up()
    world.apply(set_validator("n2", 1), set_validator("n3", 2, 2), set_validator("n4", 2, 3))
    with pytest.raises(RuleViolation) as caught:
        world.apply(set_validator("n5", 2, 4))
    assert caught.value.code is Fault.VALIDATOR_THIRD
    world.apply(set_validator("n5", 1, 4))


def test_a_rotation_said_twice_changes_nothing() -> None:
    world = World.set_up()
    rotation = rotate("solar-1", "solar-1/new", by="registrar", holder=KeyHolder.DEVICE)
    world.apply(rotation)
    before = dict(world.state.written)
    world.apply(rotation, by="b2")
    changed = {found for found, row in world.state.written.items() if before.get(found) != row}
    assert {found[0] for found in changed} == {state.APPLIED}


def test_a_rotation_is_said_twice_only_if_the_old_key_is_the_same_holders_too() -> None:
    world = World.set_up()
    world.apply(rotate("bob", "bob/new"), rotate("alice", "alice/new"))
    with pytest.raises(RuleViolation) as caught:
        world.apply(rotate("alice", "alice/new", old_key="bob", by="registrar"))
    assert caught.value.code is Fault.ROTATION_OF_OLD_KEY


def test_a_revoked_key_puts_no_other_in_its_place() -> None:
    world = World.set_up()
    world.apply(revoke("alice"))
    with pytest.raises(RuleViolation) as caught:
        world.apply(rotate("alice", "alice/new"))
    assert caught.value.code is Fault.STATEMENT
    world.apply(rotate("alice", "alice/new", by="registrar"))


def test_a_mandate_covers_only_what_its_giver_holds_and_only_from_its_beginning() -> None:
    world = World.set_up()
    world.apply(
        admit("solar-2"), mandate("solar-2", from_s=T0 + INTERVAL_S), issue("solar-2", 10), issue("solar-1", 10)
    )
    world.apply(Transfer(asset("solar-1"), 0, 10, "alice", "bob", 1, None), by="alice")
    for operation in (take("solar-1", 0, 10, owner="bob"), take("solar-2", 0, 10)):
        with pytest.raises(RuleViolation) as caught:
            world.apply(operation)
        assert caught.value.code is Fault.NOT_MANDATED


@pytest.mark.parametrize(("later_s", "refused"), [(0, True), (1, False)])
def test_an_order_is_good_until_its_requesters_clock_reaches_its_end(later_s: int, refused: bool) -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 10), take("solar-1", 0, 10))
    world.apply(close(T0 - INTERVAL_S), by="b2")
    asked = seal(order(not_after_s=T0 + later_s), "b2")
    if not refused:
        world.apply(sell("solar-1", 0, 10, asked))
        return
    with pytest.raises(RuleViolation) as caught:
        world.apply(sell("solar-1", 0, 10, asked))
    assert caught.value.code is Fault.ORDER_EXPIRED
