"""What the ledger says became of a device's interval: the same after the wire, as the schema has it, and checked."""

from typing import Any

import pytest
from support.ledger_world import (
    INTERVAL_S,
    T0,
    World,
    batch,
    close,
    correct,
    correct_demand,
    deliver,
    issue,
    order,
    seal,
    sell,
    take,
)
from support.schema import require

from broker.ledger import made
from broker.ledger.made import HeldRange, Made, WithdrawnRange, decode_made, made_of
from broker.ledger.operations import AssetId
from broker.protocol import cbor
from broker.protocol.errors import MalformedMessage
from broker.protocol.messages import Carrier

ASSET = AssetId("roof", Carrier.ELECTRICITY, 1_800, 2)
MADE = Made(
    9,
    "roof",
    Carrier.ELECTRICITY,
    1_800,
    -40,
    (HeldRange(ASSET, 0, 5, "ola"), HeldRange(ASSET, 7, 9, "east")),
    (WithdrawnRange(ASSET, 9, 12),),
)


def test_it_is_the_same_after_the_wire_and_follows_the_schema() -> None:
    require("made", MADE.to_bytes(), "made")
    assert decode_made(MADE.to_bytes()) == MADE


@pytest.mark.parametrize(
    ("place", "wrong"), [(0, -1), (1, "Roof"), (2, 99), (4, "x"), (4, 2**53), (5, [[0, 1]]), (6, [1]), (6, [[0, 1]])]
)
def test_what_is_no_answer_is_refused(place: int, wrong: object) -> None:
    items = cbor.decode(MADE.to_bytes(), "made", 1_024)
    items[place] = wrong
    with pytest.raises(MalformedMessage):
        decode_made(cbor.encode(items))


def withdrawn(world: World) -> list[tuple[int, int, int]]:
    found = made_of(world.state, 1, "solar-1", T0)
    assert found is not None
    return [(item.asset.revision, item.from_wh, item.to_wh) for item in found.withdrawn]


def traded(*operations: Any) -> World:
    """900 Wh: 300 sold to b2, which delivered 200; 100 delivered by b1; 500 with b1."""
    world = World.set_up()
    world.apply_raw(batch(issue("solar-1", 900), take("solar-1", 0, 900)))
    world.apply_raw(batch(sell("solar-1", 0, 300, seal(order(), "b2")), deliver(1, 100, ("solar-1", 300, 400))))
    world.apply_raw(batch(deliver(2, 200, ("solar-1", 0, 200)), by="b2"))
    for operation in operations:
        world.apply_raw(batch(operation))
    return world


def test_nothing_is_withdrawn_where_nothing_was_corrected() -> None:
    assert withdrawn(traded()) == []
    assert withdrawn(traded(correct_demand(1, 40, ("solar-1", 300, 340, 400)))) == []


def test_everybody_is_told_what_was_withdrawn_from_whomever() -> None:
    """First of what is held, the highest Wh first; then of what was delivered last."""
    assert withdrawn(traded(correct("solar-1", 450))) == [(0, 450, 900)]
    assert withdrawn(traded(correct("solar-1", 350))) == [(0, 250, 300), (0, 400, 900)]
    assert withdrawn(traded(correct("solar-1", 250))) == [(0, 150, 300), (0, 400, 900)]
    assert withdrawn(traded(correct("solar-1", 0))) == [(0, 0, 900)]


def test_each_revision_has_its_own_range() -> None:
    world = traded(correct("solar-1", 600), correct("solar-1", 1_000, revision=2), correct("solar-1", 700, revision=3))
    assert withdrawn(world) == [(0, 600, 900), (2, 1_000, 1_300)]


def test_what_cannot_be_told_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    world = traded(correct("solar-1", 450))
    monkeypatch.setattr(made, "MAX_SEARCHED_BY_BATCH", 1)
    assert withdrawn(world) == [(0, 450, 900)]
    monkeypatch.setattr(made, "MAX_SEARCHED_DELIVERIES", 1)
    assert withdrawn(world) == []
    monkeypatch.undo()
    assert withdrawn(world) == [(0, 450, 900)]
    long_after_s = T0 + 70 * 86_400
    world.apply_raw(batch(close(long_after_s, end_s=long_after_s + INTERVAL_S), not_after_s=long_after_s))
    assert withdrawn(world) == []
