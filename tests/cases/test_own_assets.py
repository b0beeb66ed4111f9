"""Cases 1 and 3: what a broker owns, it knows from the ledger; and an asset of its own goes to its consumer."""

import pytest

from broker.ledger.holding import Holding, decode_holding
from broker.protocol.envelope import parse
from broker.protocol.messages import DeliveryState, MessageType, Page, QueryKind
from cases.marketplace import LEDGER, Broker, MarketPlace, content

pytestmark = pytest.mark.integration


def test_1_a_broker_asks_the_ledger_for_all_assets_that_it_owns(market: MarketPlace, west: Broker) -> None:
    """When it starts, and again if no answer came in time; the answer names each range of Wh with its source."""
    roof = west.takes_on_device("roof", "solar")
    mill = west.takes_on_device("mill", "wind")
    market.next_half_hour()
    roof.reports(700)
    mill.reports(300)
    market.settle()
    west.loses_power()
    already_answered = len(_pages_for(market, "west"))
    west.comes_back()
    market.settle()

    answers = _pages_for(market, "west")[already_answered:]
    holdings = [decode_holding(entry) for entry in answers[-1].entries]
    now = {(held.asset.device, held.source.label, held.to_wh) for held in holdings if _is_now(market, held)}
    assert now == {("roof", "solar", 700), ("mill", "wind", 300)}


def test_1_a_broker_without_memory_delivers_what_the_ledger_says_it_owns(market: MarketPlace, east: Broker) -> None:
    """Its stock is nowhere but on the ledger: killed between the reading and the demand, it serves from it."""
    hall = east.takes_on_device("hall", "solar")
    cora = east.takes_on_consumer("cora", {"solar": 100})
    market.next_half_hour()
    hall.reports(600)
    market.settle()
    assert market.holder_of("hall") == {"east": 600}
    east.loses_power()
    east.comes_back()
    cora.reports(450)
    market.gate_1()

    assert cora.got() == {"solar": 450}
    assert market.holder_of("hall") == {"east": 150}


def test_1_a_broker_keeps_itself_current_without_asking_again(market: MarketPlace, west: Broker) -> None:
    """Energy that comes after the start reaches its stock by the ledger's feed of blocks."""
    asked_before = len(_pages_for(market, "west"))
    barn = west.takes_on_device("barn", "biomass")
    dora = west.takes_on_consumer("dora", {"biomass": 100})
    for energy_wh in (400, 500):
        market.next_half_hour()
        barn.reports(energy_wh)
        dora.reports(energy_wh)
        market.gate_1()
        assert dora.got() == {"biomass": energy_wh}
        assert market.holder_of("barn") == {}
    assert len(_pages_for(market, "west")) == asked_before


def test_3_an_own_undelivered_asset_goes_from_the_broker_to_its_consumer(market: MarketPlace, east: Broker) -> None:
    dam = east.takes_on_device("dam", "hydro", owner="pia")
    emil = east.takes_on_consumer("emil", {"hydro": 100})
    market.next_half_hour()
    dam.reports(800)
    receipt = emil.reports(500)
    market.gate_1()
    market.gate_2()

    # The provider's reading became an asset, the asset the broker's, and 500 of its 800 Wh the consumer's.
    (issue,) = [row for row in market.operations_now("issue") if row["reading"].meter == "dam"]
    (taken,) = [row for row in market.operations_now("transfer") if row["asset"]["device"] == "dam"]
    assert (issue["reading"].energy_wh, taken["sender"], taken["receiver"], taken["to_wh"]) == (800, "pia", "east", 800)
    (delivery,) = [row for row in market.operations_now("deliver") if row["pseudonym"] == receipt.pseudonym.hex()]
    assert [(part["asset"]["device"], part["from_wh"], part["to_wh"]) for part in delivery["slices"]] == [
        ("dam", 0, 500)
    ]
    assert issue["height"] <= taken["height"] < delivery["height"]
    assert market.holder_of("dam") == {"east": 300}
    # The consumer is told, line by line, and nothing is left open.
    told = emil.was_told()
    assert told.state is DeliveryState.FINAL
    assert [(line.line, line.source.label, line.energy_wh) for line in told.lines] == [(0, "hydro", 500)]
    assert told.unmatched_wh == emil.unmatched_wh() == 0


def test_3_no_wh_is_delivered_twice(market: MarketPlace, east: Broker) -> None:
    """Two consumers want more than there is: what one got, the other did not."""
    weir = east.takes_on_device("weir", "hydro")
    fay = east.takes_on_consumer("fay", {"hydro": 100})
    gus = east.takes_on_consumer("gus", {"hydro": 100})
    market.next_half_hour()
    weir.reports(600)
    fay.reports(600)
    gus.reports(300)
    market.gate_1()
    market.gate_2()

    assert (fay.got(), gus.got()) == ({"hydro": 400}, {"hydro": 200})
    assert (fay.unmatched_wh(), gus.unmatched_wh()) == (200, 100)
    ranges = sorted((row["from_wh"], row["to_wh"]) for row in fay.history() + gus.history())
    assert [ranges[0][0], ranges[0][1], ranges[1][1]] == [0, ranges[1][0], 600]
    market.check_books()


def _pages_for(market: MarketPlace, broker: str) -> list[Page]:
    """The answers that the ledger gave this broker to questions for its holdings."""
    answers = market.heard(market.topics.ledger_result(LEDGER, broker))
    pages = [content(raw.payload) for raw in answers if parse(raw.payload).message_type is MessageType.PAGE]
    return [page for page in pages if page.kind is QueryKind.HOLDINGS]


def _is_now(market: MarketPlace, held: Holding) -> bool:
    return held.asset.start_s == market.half_hour_s
