"""Expiry: what nobody can need any more goes at a close, the same however operations fall into batches."""

from typing import Any

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
    end_mandate,
    issue,
    mandate,
    order,
    seal,
    sell,
    take,
)

from broker.ledger import state as rows
from broker.ledger.operations import Operation, Transfer
from broker.ledger.rules import closing
from broker.ledger.state import Held, TotalRow
from broker.protocol.sources import Source

NEXT = T0 + INTERVAL_S
EXPIRY_S = 31 * 86_400 + GENESIS.correction_deadline_s
LATER = 2**40


def held(world: World, device: str = "solar-1", start_s: int = T0, revision: int = 0) -> tuple[Held, ...]:
    found: tuple[Held, ...] = world.get(*rows.asset_key(asset(device, start_s, revision))).held
    return found


def total(world: World, start_s: int = T0, source: Source = Source.SOLAR) -> TotalRow:
    found: TotalRow = world.get(rows.TOTAL, start_s, int(source))
    return found


def index(world: World, table: int) -> set[Any]:
    return {key[1:] for key, row in world.state.written.items() if key[0] == table and row is not None}


def test_a_close_expires_what_its_broker_and_its_providers_hold() -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 500), take("solar-1", 0, 300), deliver(1, 100, ("solar-1", 0, 100)))
    world.apply(close(T0 + EXPIRY_S - INTERVAL_S), not_after_s=LATER)
    assert held(world) == (Held(100, 300, "b1"), Held(300, 500, "alice"))
    world.apply(close(T0 + EXPIRY_S), not_after_s=LATER)
    assert held(world) == ()
    assert total(world) == TotalRow(500, 0, 100, 0, 400)
    assert index(world, rows.OWNED) == index(world, rows.MANDATED) == set()


def test_a_later_revision_of_a_close_expires_nothing() -> None:
    world = World.set_up()
    world.apply(close(T0 + EXPIRY_S - INTERVAL_S), not_after_s=LATER)
    world.apply(issue("solar-1", 500, T0 + INTERVAL_S), not_after_s=LATER)
    before = world.get(*rows.asset_key(asset("solar-1", NEXT)))
    world.apply(close(T0 + EXPIRY_S - INTERVAL_S, revision=1), not_after_s=LATER)
    assert world.get(*rows.asset_key(asset("solar-1", NEXT))) == before


def test_a_neighbours_slices_expire_at_its_own_close() -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 500), take("solar-1", 0, 500), sell("solar-1", 0, 200, seal(order(), "b2")))
    world.apply(close(T0 + EXPIRY_S), not_after_s=LATER)
    assert held(world) == (Held(0, 200, "b2"),)
    world.apply(close(T0 + EXPIRY_S), by="b2", not_after_s=LATER)
    assert held(world) == ()
    assert total(world).expired_wh == 500


def test_what_another_broker_is_mandated_for_is_not_expired() -> None:
    world = World.set_up()
    world.apply(end_mandate("solar-1", NEXT), mandate("solar-1", broker="b2", from_s=NEXT), admit("solar-2"))
    world.apply(issue("solar-1", 10), issue("solar-1", 20, NEXT), issue("solar-2", 30))
    world.apply(close(NEXT + EXPIRY_S), not_after_s=LATER)
    assert held(world) == ()
    assert held(world, start_s=NEXT) == (Held(0, 20, "alice"),)
    assert held(world, "solar-2") == (Held(0, 30, "alice"),)


def test_what_a_provider_got_back_expires_too() -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 10), take("solar-1", 0, 10), Transfer(asset("solar-1"), 0, 4, "b1", "alice", 0, None))
    assert index(world, rows.MANDATED) == {("b1", T0, "solar-1", 0, 0)}
    world.apply(close(T0 + EXPIRY_S), not_after_s=LATER)
    assert held(world) == ()


def test_a_corrections_asset_expires_with_its_interval() -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 10), correct("solar-1", 15), take("solar-1", 0, 10))
    world.apply(close(T0 + EXPIRY_S), not_after_s=LATER)
    assert total(world) == TotalRow(15, 0, 0, 0, 15)


def test_a_returned_slice_expires() -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 10), take("solar-1", 0, 10), deliver(1, 10, ("solar-1", 0, 10)))
    world.apply(correct_demand(1, 4, ("solar-1", 0, 4, 10)), close(T0 + EXPIRY_S), not_after_s=LATER)
    assert total(world) == TotalRow(10, 0, 4, 0, 6)


def test_a_late_correction_finds_nothing_to_withdraw_in_what_is_expired() -> None:
    world = World.set_up()
    world.apply(admit("solar-2"), issue("solar-2", 10))
    world.apply(mandate("solar-2", from_s=NEXT))
    world.apply(issue("solar-2", 10, NEXT))
    world.apply(close(NEXT + EXPIRY_S), not_after_s=LATER)
    world.apply(correct("solar-2", 4, start_s=NEXT), not_after_s=LATER)
    assert world.get(rows.CARRY, "solar-2", 0).energy_wh == -6
    assert total(world, NEXT) == TotalRow(10, 0, 0, 0, 10)


def test_the_oldest_expire_first_and_the_rest_at_the_next_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closing, "MAX_EXPIRED_ASSETS", 2)
    world = World.set_up()
    starts = [T0 + number * INTERVAL_S for number in range(3)]
    world.apply(*(issue(device, 10, start_s) for start_s in starts for device in ("solar-1", "wind-1")))
    world.apply(*(take("solar-1", 0, 5, start_s=start_s) for start_s in starts))
    for number in range(3):
        world.apply(close(starts[-1] + EXPIRY_S + number * INTERVAL_S), not_after_s=LATER)
        assert [held(world, "solar-1", start_s) == () for start_s in starts] == [later <= number for later in range(3)]
        assert [held(world, "wind-1", start_s) == () for start_s in starts] == [later <= number for later in range(3)]


def scenario() -> list[tuple[str, Operation]]:
    starts = [T0 + number * INTERVAL_S for number in range(4)]
    made = [issue(device, 40, start_s) for start_s in starts for device in ("solar-1", "wind-1")]
    moved = [take("solar-1", 0, 20, start_s=start_s) for start_s in starts]
    given = [deliver(number, 5, ("solar-1", 0, 5), start_s=start_s) for number, start_s in enumerate(starts)]
    closed = [close(starts[0] + EXPIRY_S + number * INTERVAL_S) for number in range(4)]
    return [("b1", operation) for operation in (*made, *moved, *given, *closed)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_expiry_is_the_same_however_batches_fall(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closing, "MAX_EXPIRED_ASSETS", 1)
    worlds = []
    for step in (size, 5):
        world = World.set_up()
        operations = [operation for _, operation in scenario()]
        for first in range(0, len(operations), step):
            world.apply(*operations[first : first + step], not_after_s=LATER)
        worlds.append({key: row for key, row in world.state.written.items() if key[0] != rows.APPLIED and row})
    assert worlds[0] == worlds[1]
