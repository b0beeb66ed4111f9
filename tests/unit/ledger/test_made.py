"""What the ledger says became of a device's interval: the same after the wire, as the schema has it, and checked."""

import pytest
from support.schema import require

from broker.ledger.made import GivenRange, HeldRange, Made, decode_made
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
    (GivenRange(ASSET, 5, 7, b"p" * 16, 3_600),),
)


def test_it_is_the_same_after_the_wire_and_follows_the_schema() -> None:
    require("made", MADE.to_bytes(), "made")
    assert decode_made(MADE.to_bytes()) == MADE


@pytest.mark.parametrize(
    ("place", "wrong"), [(0, -1), (1, "Roof"), (2, 99), (4, "x"), (4, 2**53), (5, [[0, 1]]), (6, [1])]
)
def test_what_is_no_answer_is_refused(place: int, wrong: object) -> None:
    items = cbor.decode(MADE.to_bytes(), "made", 1_024)
    items[place] = wrong
    with pytest.raises(MalformedMessage):
        decode_made(cbor.encode(items))
