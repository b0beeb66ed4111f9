"""What the accounts are made of: prices paid, by range and in time, and what was demanded."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.ledger_world import key

from broker.ledger.client import HoldingsLoaded
from broker.ledger.holding import Holding
from broker.ledger.operations import AssetId
from broker.market.statements import Flow
from broker.market.tariff import Tariff
from broker.protocol.market_time import Interval
from broker.protocol.messages import Carrier, Genesis, MessageType, NamedKey
from broker.protocol.sources import Source
from broker.protocol.topics import Topics
from broker.service.core import Broker
from broker.service.outputs import Identity
from broker.service.store import BrokerStore, IntervalState, Standing, TransferRow

T0 = 1_769_904_000
WEST_BUYS = TransferRow(Flow.BOUGHT, "east", "mill", T0, 0, 0, 50, Source.WIND, 5, b"1" * 16)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BrokerStore]:
    store = BrokerStore(tmp_path / "broker.db")
    yield store
    store.close()


def broker(store: BrokerStore) -> Broker:
    registrar, node = (NamedKey(name, key(name).public.cose_key) for name in ("registrar", "node"))
    genesis = Genesis("desk", 1_800, 600, 1_200, 86_400, "EUR", ("home",), (registrar,), (node,), False)
    return Broker(
        Identity("west", key("west"), "desk"),
        genesis,
        Topics(),
        store,
        {},
        1_000,
        Tariff(),
        passes_on=True,
        own_groups_first=False,
        keeps_for_windows=False,
        arranges_ahead=False,
        clock_waits=False,
        jitter=lambda: 0,
    )


def test_holdings_are_priced_range_by_range_by_what_was_paid_last(store: BrokerStore) -> None:
    """The ledger joins ranges of one owner, however dear each was."""
    store.add_transfers(
        [
            WEST_BUYS,
            WEST_BUYS._replace(from_wh=50, to_wh=80, price=7, order_id=b"2" * 16),
            WEST_BUYS._replace(flow=Flow.SOLD, party="south", from_wh=10, to_wh=20, price=6, order_id=b"3" * 16),
            WEST_BUYS._replace(party="south", from_wh=10, to_wh=20, price=9, order_id=b"4" * 16),
        ]
    )
    west = broker(store)
    asset = AssetId("mill", Carrier.ELECTRICITY, T0, 0)
    west.take_event(HoldingsLoaded(9, (Holding(asset, Source.WIND, "home", 0, 75),)))
    held = [(piece.from_wh, piece.to_wh, piece.price) for piece in west._stock.slices(Interval(T0, T0 + 1_800))]
    assert held == [(0, 10, 5), (10, 20, 9), (20, 50, 5), (50, 75, 7)]


def test_what_was_sold_had_cost_what_was_paid_before_that(store: BrokerStore) -> None:
    sold = WEST_BUYS._replace(flow=Flow.SOLD, party="south", from_wh=10, to_wh=20, price=6, order_id=b"3" * 16)
    back = sold._replace(flow=Flow.BOUGHT, price=9, order_id=b"4" * 16)
    unheard_of = sold._replace(device="dam", order_id=b"5" * 16)
    store.add_transfers([WEST_BUYS, sold, back, unheard_of])
    assert {row.device: row.paid for row in store.settled_sales(T0, T0 + 1)} == {"mill": 5, "dam": None}
    assert list(store.settled_sales(T0 + 1, T0 + 2)) == []


def test_a_demand_counts_once_with_the_revision_in_effect(store: BrokerStore) -> None:
    for start_s, revision, energy_wh in ((T0, 0, 100), (T0, 1, 90), (T0 + 1_800, 0, 50), (T0 + 3_600, 0, 7)):
        store.set_interval(start_s, IntervalState.CLOSED, 1)
        named = start_s, "home", MessageType.DEMAND, revision, bytes([revision]) + start_s.to_bytes(8)
        store.add_message(*named, b"raw", energy_wh, b"p", b"c")
    assert store.demanded_wh("home", T0, T0 + 3_600) == 150
    store.set_standing(T0, "home", 0, Standing.SUPERSEDED, 0)
    store.set_standing(T0, "home", 1, Standing.CURRENT, 1)
    store.add_message(T0, "other", MessageType.DEMAND, 0, b"x", b"raw", 1_000, b"q", b"c")
    store.add_message(T0, "home", MessageType.READING, 0, b"y", b"raw", 1_000, None, None)
    assert store.demanded_wh("home", T0, T0 + 3_600) == 140
    assert store.demanded_wh("home", T0 + 3_600, T0 + 7_200) == 7
    assert store.demanded_wh("nobody", T0, T0 + 7_200) == 0


def test_a_period_is_read_from_one_moment(store: BrokerStore, tmp_path: Path) -> None:
    store.begin_reading()
    assert list(store.transfers(Flow.BOUGHT)) == []
    running = BrokerStore(tmp_path / "broker.db")
    running.begin()
    running.add_transfers([WEST_BUYS])
    running.commit()
    running.close()
    assert list(store.transfers(Flow.BOUGHT)) == []
    store.commit()
    assert list(store.transfers(Flow.BOUGHT)) == [WEST_BUYS]
