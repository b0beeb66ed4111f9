"""Rotated and revoked keys: what the old one still signs, what the new one does, and what neither does."""

import pytest
from support.ledger_world import (
    INTERVAL_S,
    T0,
    World,
    admit,
    batch,
    close,
    correct,
    deliver,
    end_mandate,
    genesis,
    issue,
    key,
    mandate,
    order,
    reading,
    register,
    revoke,
    rotate,
    seal,
    sell,
    set_validator,
    take,
)

from broker.ledger import state as rows
from broker.ledger.faults import Fault, RuleViolation
from broker.ledger.opening import meter_signer, party_signer
from broker.ledger.operations import Issue, Operation, Void
from broker.ledger.rules import validators_now
from broker.ledger.state import Validator
from broker.protocol.errors import UnknownKey
from broker.protocol.messages import KeyHolder, NamedKey, Role

NEXT = T0 + INTERVAL_S
LATER = 2**40
DEVICE = KeyHolder.DEVICE


def refusal(world: World, *operations: Operation, by: str = "b1", with_key: str | None = None) -> Fault:
    with pytest.raises(RuleViolation) as caught:
        world.apply(*operations, by=by, with_key=with_key, not_after_s=LATER)
    return caught.value.code


def issue_with(new_key: str, device: str, energy_wh: int, start_s: int) -> Issue:
    return Issue(seal(reading(device, energy_wh, start_s), device, with_key=new_key))


def test_a_rotated_meter_key_serves_earlier_intervals_until_the_grace_ends() -> None:
    world = World.set_up()
    world.apply(rotate("solar-1", "new", holder=DEVICE, from_s=NEXT, grace_until_s=NEXT + INTERVAL_S))
    assert refusal(world, issue("solar-1", 10, NEXT)) is Fault.KEY_RETIRED
    world.apply(issue("solar-1", 10))
    world.apply(issue_with("new", "solar-1", 10, NEXT))
    world.apply(close(), not_after_s=LATER)
    world.apply(correct("solar-1", 20), not_after_s=LATER)
    world.apply(close(NEXT), not_after_s=LATER)
    assert refusal(world, correct("solar-1", 30, 2)) is Fault.KEY_RETIRED
    world.apply(correct("solar-1", 30, 2, with_key="new"), not_after_s=LATER)


def test_the_new_meter_key_serves_at_once_and_for_every_interval() -> None:
    world = World.set_up()
    world.apply(rotate("solar-1", "new", holder=DEVICE), issue_with("new", "solar-1", 10, T0))
    assert world.get(rows.DEVICE, "solar-1").meter_key == key("new").public.cose_key


def test_without_a_mandate_a_meters_grace_has_no_clock_that_ends_it() -> None:
    world = World.set_up()
    world.apply(admit("solar-2"), rotate("solar-2", "new", holder=DEVICE), close(NEXT + INTERVAL_S))
    world.apply(issue("solar-2", 10), not_after_s=LATER)


def test_a_registrar_rotates_as_well() -> None:
    world = World.set_up()
    world.apply(rotate("solar-1", "new", holder=DEVICE, by="registrar"), rotate("alice", "newer", by="registrar"))
    assert world.get(rows.PARTY, "alice").cose_key == key("newer").public.cose_key


def test_rotations_follow_one_another() -> None:
    world = World.set_up()
    world.apply(rotate("alice", "new"))
    world.apply(rotate("alice", "newer", old_key="new", from_s=NEXT + INTERVAL_S, grace_until_s=LATER))
    assert world.get(rows.PARTY, "alice").cose_key == key("newer").public.cose_key
    before = dict(world.state.written)
    world.apply(rotate("alice", "new"), not_after_s=LATER)
    changed = {item[0] for item, row in world.state.written.items() if before.get(item) != row}
    assert changed == {rows.APPLIED}, "said twice changes nothing, even after the next one"


def test_the_same_rotation_with_other_times_is_another_one() -> None:
    world = World.set_up()
    world.apply(rotate("alice", "new"))
    assert refusal(world, rotate("alice", "new", grace_until_s=LATER)) is Fault.ROTATION_OF_OLD_KEY
    world.apply(rotate("bob", "bobs"))
    assert refusal(world, rotate("alice", "bobs")) is Fault.ROTATION_OF_OLD_KEY


def test_a_brokers_old_key_signs_batches_until_its_clock_reaches_the_grace() -> None:
    world = World.set_up()
    world.apply(rotate("b1", "new", grace_until_s=NEXT + INTERVAL_S))
    world.apply(Void(b"1" * 16))
    world.apply(Void(b"1" * 16), with_key="new")
    world.apply(close(), not_after_s=LATER)
    world.apply(close(NEXT), not_after_s=LATER)
    assert refusal(world, Void(b"1" * 16)) is Fault.KEY_RETIRED
    world.apply(Void(b"2" * 16), with_key="new", not_after_s=LATER)


def test_a_providers_old_key_signs_no_batches() -> None:
    world = World.set_up()
    world.apply(rotate("alice", "new"))
    assert refusal(world, issue("solar-1", 10), by="alice") is Fault.KEY_RETIRED
    world.apply(issue("solar-1", 10), by="alice", with_key="new")


def test_orders_of_an_old_key_count_for_earlier_intervals_until_the_grace_ends() -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 500), take("solar-1", 0, 500))
    world.apply(rotate("b2", "new", from_s=NEXT, grace_until_s=NEXT), by="b2")
    world.apply(sell("solar-1", 0, 10, seal(order(), "b2")))
    # The clock of b2 reaches the grace without closing the interval of the order.
    world.apply(close(T0 - INTERVAL_S), by="b2", with_key="new")
    world.apply(sell("solar-1", 10, 20, seal(order(), "b2")))
    world.apply(rotate("b2", "newer", old_key="new", from_s=T0, grace_until_s=T0), by="b2", with_key="new")
    asked = seal(order(order_id=b"q" * 16), "b2", with_key="new")
    assert refusal(world, sell("solar-1", 20, 30, asked)) is Fault.KEY_RETIRED


def test_mandates_of_an_old_key_count_for_earlier_boundaries() -> None:
    world = World.set_up()
    world.apply(admit("solar-2"), rotate("alice", "new"))
    world.apply(mandate("solar-2", from_s=T0))
    assert refusal(world, end_mandate("solar-2", NEXT)) is Fault.KEY_RETIRED


def test_configuration_said_again_after_a_rotation_changes_nothing() -> None:
    world = World.set_up()
    world.apply(end_mandate("wind-1", NEXT), mandate("wind-1", broker="b2", from_s=NEXT))
    world.apply(
        rotate("b1", "b1-new"), rotate("alice", "alice-new", from_s=T0), rotate("solar-1", "new", holder=DEVICE)
    )
    before = dict(world.state.written)
    world.apply(
        register("b1"),
        register("alice", Role.PROVIDER),
        admit("solar-1"),
        mandate("solar-1"),
        mandate("wind-1"),
        end_mandate("wind-1", NEXT),
        mandate("wind-1", broker="b2", from_s=NEXT),
        with_key="b1-new",
    )
    changed = {item[0] for item, row in world.state.written.items() if before.get(item) != row}
    assert changed == {rows.APPLIED}


def test_nothing_that_a_revoked_key_signed_is_accepted() -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 500), take("solar-1", 0, 500), revoke("solar-1", holder=DEVICE))
    assert refusal(world, correct("solar-1", 400)) is Fault.STATEMENT
    world.apply(revoke("b2"))
    assert refusal(world, sell("solar-1", 0, 10, seal(order(), "b2"))) is Fault.ORDER_STATEMENT
    with pytest.raises(UnknownKey):
        world.apply(Void(b"o" * 16), by="b2")
    assert party_signer(world.state, key("b2").public.key_id) is None
    assert meter_signer(world.state, key("solar-1").public.key_id) is None
    world.apply(deliver(1, 10, ("solar-1", 0, 10)))


def test_a_revocation_said_twice_is_accepted() -> None:
    world = World.set_up()
    world.apply(revoke("alice"))
    world.apply(revoke("alice"), revoke("alice", by="registrar"), by="b2")


def test_the_current_key_revokes_an_older_one_but_not_the_other_way_round() -> None:
    world = World.set_up()
    world.apply(rotate("alice", "new"), revoke("alice", revoked="alice", with_key="new"))
    assert refusal(world, revoke("alice", revoked="new", with_key="alice")) is Fault.REVOCATION_SIGNER
    assert world.get(rows.KEY, key("alice").public.key_id).revoked


def test_after_its_current_key_is_revoked_a_holder_gets_one_from_a_registrar_only() -> None:
    world = World.set_up()
    world.apply(revoke("b2"))
    assert refusal(world, rotate("b2", "new")) is Fault.STATEMENT
    world.apply(rotate("b2", "new", by="registrar"))
    world.apply(Void(b"o" * 16), by="b2", with_key="new")
    assert world.get(rows.KEY, key("b2").public.key_id).revoked, "rotated or not, it stays revoked"


def test_a_batch_in_the_queue_is_judged_by_the_keys_at_its_turn() -> None:
    world = World.set_up()
    raw = batch(Void(b"o" * 16), by="b2")
    world.apply(revoke("b2", by="registrar"))
    with pytest.raises(UnknownKey, match="revoked"):
        world.apply_raw(raw)


# Validators

TWO = ("registrar", "second")
FOUNDED = genesis(
    registrars=tuple(NamedKey(name, key(name).public.cose_key) for name in (*TWO, "third")),
    validators=tuple(NamedKey(name, key(name).public.cose_key) for name in ("n1", "n2", "n3", "n4")),
)


def powers(world: World) -> dict[str, int]:
    return {validator.name: validator.power for validator in validators_now(world.state, world.charter).validators}


def test_validators_are_those_of_the_genesis_until_a_change() -> None:
    world = World.set_up(FOUNDED)
    assert powers(world) == {"n1": 1, "n2": 1, "n3": 1, "n4": 1}
    assert validators_now(world.state, world.charter).sequence == 0


def test_more_than_half_of_the_registrars_change_the_validators() -> None:
    world = World.set_up(FOUNDED)
    world.apply(set_validator("n5", 1, by=TWO))
    world.apply(set_validator("n1", 0, 2, by=("third", "second")))
    world.apply(set_validator("n2", 1, 3, by=("registrar", "second", "third"), validator_key="n2-new"))
    row = validators_now(world.state, world.charter)
    assert row.sequence == 3
    assert row.validators == (
        Validator("n2", key("n2-new").public.cose_key, 1),
        Validator("n3", key("n3").public.cose_key, 1),
        Validator("n4", key("n4").public.cose_key, 1),
        Validator("n5", key("n5").public.cose_key, 1),
    )
    assert rows.decode_row(rows.VALIDATORS, rows.encode_row(row)) == row


def test_among_three_validators_any_power_may_move() -> None:
    world = World.set_up()
    world.apply(set_validator("second-node", 1), set_validator("third-node", 900, 2))
    world.apply(set_validator("node", 0, 3))
    assert powers(world) == {"second-node": 1, "third-node": 900}
