"""Orders to neighbours: what came of them enters the neighbour's record once, however often the interval is closed."""

from pathlib import Path

from support.ledger_world import INTERVAL_S, LEDGER, key

from broker.market.partners import PartnerRecord
from broker.protocol.market_time import Interval, MarketCalendar
from broker.protocol.messages import AnswerStatus, OrderAnswer
from broker.protocol.sources import Source
from broker.protocol.topics import Topics
from broker.service.batches import BatchDesk
from broker.service.orders_out import OrdersOut
from broker.service.outputs import Identity, Outputs
from broker.service.store import BrokerStore

IDENTITY = Identity("west", key("west"), LEDGER)
INTERVAL = Interval(100 * INTERVAL_S, 101 * INTERVAL_S)


def orders_out(store: BrokerStore) -> OrdersOut:
    outputs = Outputs()
    calendar = MarketCalendar(INTERVAL_S, 600, 1_200)
    return OrdersOut(IDENTITY, calendar, Topics(), store, BatchDesk(IDENTITY, store, outputs), outputs, lambda: 0)


def test_what_came_of_an_interval_is_entered_into_the_record_once(tmp_path: Path) -> None:
    """An interval's close can take several batches, and a restored broker sees it again."""
    store = BrokerStore(tmp_path / "broker.db")
    out = orders_out(store)
    out.send("east", Source.WIND, 300, 1_000_000, INTERVAL, 1, 0.0)
    (row,) = store.orders_out(INTERVAL.start_s)
    assert out.take_answer("east", OrderAnswer(row.order_id, AnswerStatus.REFUSED, 0, None, "none left")) is not None
    out.note(INTERVAL.start_s)
    once = PartnerRecord(faded_s=INTERVAL.start_s).after_answer(300, 0)
    for again in (out, orders_out(store)):
        again.note(INTERVAL.start_s)
        assert again.record("east", INTERVAL.start_s) == once
        assert PartnerRecord.from_bytes(store.partner_records()["east"]) == once
