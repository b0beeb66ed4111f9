"""Case 7: a broker that is somebody else's program trades with ours by the published protocol alone.

`foreign_broker.py` is that program. Its neighbour `north` is one of ours.
"""

import ast
import json
import sys
from pathlib import Path

import pytest

from broker.protocol.messages import Demand, Reading
from cases.marketplace import Broker, MarketPlace, Meter

pytestmark = pytest.mark.integration

PROGRAM = Path(__file__).with_name("foreign_broker.py")


@pytest.fixture(scope="module")
def north(market: MarketPlace) -> Broker:
    north = market.open_broker("north", ["foreign"])
    north.takes_on_device("silent", "nuclear")  # Never reports, so gate 1 comes when it is time.
    return north


@pytest.fixture(scope="module")
def foreign(market: MarketPlace) -> Broker:
    """The foreign program, with the device `kite` (wind, of olga) and the consumer `ferry` (solar only)."""
    statements = [
        market.registration_of("foreign", "broker"),
        market.registration_of("olga", "provider"),
        market.admission_of("kite", "olga", "wind", 10_000),
        market.mandate_of("kite", "olga", "foreign"),
    ]
    config = market.folder / "foreign.json"
    config.write_text(
        json.dumps(
            {
                "name": "foreign",
                "root": market.topics.root,
                "port": market.server.port,
                "genesis": str(market.genesis),
                "key_file": str(market.key_file("foreign")),
                "statements": [path.read_bytes().hex() for path in statements],
                "neighbour": {"north": market.new_key("north")},
                "device": ["kite", "olga", 75_000],
                "consumer": ["ferry", 1],
                "meters": {"kite": market.new_key("kite"), "ferry": market.new_key("ferry")},
                "secret": "5a" * 32,
            }
        )
    )
    return market.take_in_stranger("foreign", [sys.executable, str(PROGRAM), str(config)])


@pytest.fixture(scope="module")
def kite(foreign: Broker) -> Meter:
    return Meter("kite", foreign, Reading)


@pytest.fixture(scope="module")
def ferry(foreign: Broker) -> Meter:
    return Meter("ferry", foreign, Demand)


def test_7_the_foreign_program_uses_nothing_of_ours() -> None:
    imported = set()
    for node in ast.walk(ast.parse(PROGRAM.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            imported.add(str(node.module).partition(".")[0])
    assert imported - sys.stdlib_module_names == {"paho", "cbor2", "cryptography"}


def test_7_it_registers_itself_and_takes_its_providers_energy(market: MarketPlace, kite: Meter) -> None:
    market.next_half_hour()
    kite.reports(500)
    market.gate_1()
    market.gate_2()
    assert market.holder_of("kite") == {"foreign": 500}
    assert market.closed_by(kite.broker) == (0, 0, 0)


def test_7_it_answers_an_order_of_ours_with_a_transfer_and_done(
    market: MarketPlace, north: Broker, kite: Meter
) -> None:
    gwen = north.takes_on_consumer("gwen", {"wind": 100})
    market.next_half_hour()
    kite.reports(500)
    gwen.reports(300)
    market.gate_1()
    market.gate_2()

    assert gwen.got() == {"wind": 300}
    (slice_,) = gwen.history()
    assert (slice_["device"], slice_["through"], slice_["price"]) == ("kite", "foreign", 75_000)
    assert [(row["neighbour"], row["state"]) for row in north.rows_now("orders")] == [("foreign", "seen")]
    assert market.holder_of("kite") == {"foreign": 200}
    market.check_books()


def test_7_it_refuses_what_it_has_not(market: MarketPlace, north: Broker, kite: Meter) -> None:
    hans = north.takes_on_consumer("hans", {"hydro": 100})
    market.next_half_hour()
    kite.reports(500)
    hans.reports(300)
    market.gate_1()
    market.gate_2()

    assert [row["state"] for row in north.rows_now("orders")] == ["refused"]
    assert hans.unmatched_wh() == 300
    assert market.holder_of("kite") == {"foreign": 500}


def test_7_it_orders_from_ours_and_delivers_to_its_own_consumer(
    market: MarketPlace, north: Broker, ferry: Meter
) -> None:
    roof = north.takes_on_device("roof", "solar")
    market.next_half_hour()
    roof.reports(900)
    receipt = ferry.reports(400)
    market.gate_1()
    market.gate_2()

    assert [(row["requester"], row["state"]) for row in north.rows_now("requests")] == [("foreign", "committed")]
    (delivery,) = [row for row in market.operations_now("deliver") if row["pseudonym"] == receipt.pseudonym.hex()]
    assert [(part["asset"]["device"], part["to_wh"]) for part in delivery["slices"]] == [("roof", 400)]
    assert market.closed_by(ferry.broker) == (1, 400, 400)
    assert [(line.source.label, line.energy_wh) for line in ferry.was_told().lines] == [("solar", 400)]
    assert market.holder_of("roof") == {"north": 500}
    market.check_books()


def test_7_what_ours_has_not_stays_unmatched_on_record_at_the_foreign_broker(
    market: MarketPlace, north: Broker, ferry: Meter
) -> None:
    market.next_half_hour()
    ferry.reports(400)
    market.gate_1()
    market.gate_2()

    assert [row["state"] for row in north.rows_now("requests")] == ["refused"]
    assert market.closed_by(ferry.broker) == (1, 400, 0)
    assert ferry.was_told().unmatched_wh == 400


def test_7_killed_it_asks_the_ledger_what_it_owns_and_serves_that(
    market: MarketPlace, north: Broker, kite: Meter
) -> None:
    ines = north.takes_on_consumer("ines", {"wind": 100})
    market.next_half_hour()
    kite.reports(500)
    market.settle()
    kite.broker.loses_power()
    kite.broker.comes_back()
    ines.reports(450)
    market.gate_1()
    market.gate_2()

    assert ines.got() == {"wind": 450}
    assert market.holder_of("kite") == {"foreign": 50}
    market.check_books()
