"""What a broker says for the next day and when, whose word it keeps, and how it serves orders under its promises."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.ledger_world import LEDGER, key

from broker.market.arrangements import rows_of
from broker.market.stock import HeldSlice, Stock
from broker.market.tariff import Tariff
from broker.protocol.envelope import parse
from broker.protocol.market_time import Interval, MarketCalendar
from broker.protocol.messages import (
    ORDER_ID_BYTES,
    Carrier,
    Forecast,
    Genesis,
    MessageType,
    NamedKey,
    Order,
    Promises,
    SourceOutlook,
    Wishes,
)
from broker.protocol.sources import Source
from broker.protocol.topics import Topics
from broker.service.arrangements import ArrangedWish, Arrangements, arranged_for
from broker.service.batches import BatchDesk
from broker.service.core import Broker, Neighbour
from broker.service.orders_in import OrdersIn, PartnerPolicy
from broker.service.outputs import Identity, Outputs
from broker.service.store import BrokerStore, IntervalState

WIND, SOLAR = Source.WIND, Source.SOLAR
INTERVAL_S = 3_600
DAY_S = 86_400
DAY = 20_000 * DAY_S
ONE_O_CLOCK, TWO_O_CLOCK = DAY - 11 * 3_600, DAY - 10 * 3_600
IDENTITY = Identity("east", key("east"), LEDGER)
CALENDAR = MarketCalendar(INTERVAL_S, 300, 600)
POLICIES = {"north": PartnerPolicy(), "south": PartnerPolicy(is_served=False), "west": PartnerPolicy(most_wh=700)}
TRUSTED = {"north": 1_000_000, "south": 1_000_000}


def forecast(broker: str, *outlooks: SourceOutlook, day_s: int = DAY) -> Forecast:
    return Forecast(broker, day_s, day_s + DAY_S, outlooks, (0,) * 24)


OWN = forecast("east", SourceOutlook(WIND, 5, 0, 900), SourceOutlook(SOLAR, 5, 400, 0))


def wishes(broker: str, of: Mapping[tuple[str, Source, int], int], day_s: int = DAY) -> Wishes:
    return Wishes(broker, day_s, day_s + DAY_S, rows_of(dict(of)))


def promises(broker: str, to: Mapping[tuple[str, Source, int], int], day_s: int = DAY) -> Promises:
    return Promises(broker, day_s, day_s + DAY_S, rows_of(dict(to)))


@dataclass
class Desk:
    """East, which expects wind to be left and sun to be short in the interval at 05:00."""

    folder: Path
    is_on: bool = True
    outputs: Outputs = field(default_factory=Outputs)

    def __post_init__(self) -> None:
        self.store = BrokerStore(self.folder / "broker.db")
        self.arrangements = Arrangements(
            IDENTITY, CALENDAR, Topics(), self.store, self.outputs, POLICIES, is_on=self.is_on
        )

    def hear(self, message: Wishes | Promises, peer: str | None = None, at_s: int = ONE_O_CLOCK) -> None:
        self.arrangements.hear(peer or message.broker, message, at_s)

    def heard_forecast(self, message: Forecast) -> None:
        self.store.set_heard(message.start_s, MessageType.FORECAST, message.broker, message.to_payload())

    def reach(self, start_s: int, own: Forecast | None = OWN) -> list[Wishes | Promises]:
        """Everything before is closed: what is said then."""
        self.arrangements.advance(
            Interval(start_s, start_s + INTERVAL_S),
            lambda day_s: own if own is not None and own.start_s == day_s else None,
            lambda _start_s: TRUSTED,
        )
        published, self.outputs.publications = self.outputs.publications, []
        said: list[Wishes | Promises] = []
        for one in published:
            assert one.retain
            kind = Wishes if one.topic == "dengen/v1/brokers/east/wishes" else Promises
            assert kind is Wishes or one.topic == "dengen/v1/brokers/east/promises"
            assert (one.topic, one.payload) in self.store.announcements()
            said.append(kind.from_payload(parse(one.payload).payload))
        return said

    def restarted(self) -> "Desk":
        self.store.close()
        return Desk(self.folder, self.is_on)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_wishes_are_said_once_at_one_and_promises_once_at_two(desk: Desk) -> None:
    desk.heard_forecast(forecast("north", SourceOutlook(SOLAR, 5, 0, 300)))
    assert desk.reach(ONE_O_CLOCK - INTERVAL_S) == []
    assert desk.reach(ONE_O_CLOCK) == [wishes("east", {("north", SOLAR, 5): 300})]
    desk.hear(wishes("north", {("east", WIND, 5): 800, ("west", WIND, 5): 100}))
    assert desk.reach(ONE_O_CLOCK) == []
    desk = desk.restarted()
    assert desk.reach(TWO_O_CLOCK) == [promises("east", {("north", WIND, 5): 800})]
    desk.hear(wishes("north", {("east", WIND, 5): 100}))
    for again in (desk, desk.restarted()):
        assert again.reach(TWO_O_CLOCK) == []
        assert again.reach(DAY - INTERVAL_S) == []


def test_of_whom_nothing_may_be_wished_and_to_whom_nothing_is_promised(desk: Desk) -> None:
    for name in ("south", "stranger", "west"):
        desk.heard_forecast(forecast(name, SourceOutlook(SOLAR, 5, 0, 300)))
        desk.store.set_heard(DAY, MessageType.WISHES, name, wishes(name, {("east", WIND, 5): 900}).to_payload())
    # West is not trusted at all today, south is not served, and the store may know a broker that was a neighbour once.
    assert desk.reach(ONE_O_CLOCK) == [wishes("east", {("south", SOLAR, 5): 300})]
    assert desk.reach(TWO_O_CLOCK) == [promises("east", {("west", WIND, 5): 700})]


def test_who_comes_late_says_both_and_nothing_once_the_day_has_begun(desk: Desk) -> None:
    assert desk.reach(DAY - INTERVAL_S) == [wishes("east", {}), promises("east", {})]
    assert desk.reach(DAY) == []
    assert desk.reach(DAY + INTERVAL_S) == []


def test_without_a_forecast_of_the_day_nothing_is_said(desk: Desk) -> None:
    assert desk.reach(TWO_O_CLOCK, None) == []
    assert desk.reach(TWO_O_CLOCK, forecast("east", day_s=DAY - DAY_S)) == []


def test_who_does_not_arrange_says_nothing_and_keeps_no_promise(desk: Desk) -> None:
    desk.hear(wishes("north", {("east", WIND, 5): 800}))
    desk.reach(TWO_O_CLOCK)
    start_s = DAY + 5 * INTERVAL_S
    assert desk.arrangements.to(start_s) == {("north", WIND): 800}
    desk.is_on = False
    off = desk.restarted()
    assert off.arrangements.to(start_s) == {}
    assert off.reach(DAY + ONE_O_CLOCK % DAY_S, forecast("east", day_s=DAY + DAY_S)) == []


def test_what_is_promised_either_way_is_known_by_interval_until_the_day_is_over(desk: Desk) -> None:
    start_s = DAY + 5 * INTERVAL_S
    assert desk.arrangements.by(start_s) == {}
    desk.hear(promises("north", {("east", SOLAR, 5): 300, ("west", SOLAR, 5): 500, ("east", SOLAR, 6): 100}))
    desk.hear(promises("west", {("east", SOLAR, 5): 200}))
    desk.hear(wishes("north", {("east", WIND, 5): 800}))
    desk.reach(TWO_O_CLOCK)
    assert desk.arrangements.by(start_s) == {("north", SOLAR): 300, ("west", SOLAR): 200}
    assert desk.arrangements.by(start_s + INTERVAL_S) == {("north", SOLAR): 100}
    assert desk.arrangements.to(start_s) == {("north", WIND): 800}
    assert desk.arrangements.to(start_s + DAY_S) == desk.arrangements.by(start_s + DAY_S) == {}
    # Of what a neighbour says anew the newest counts.
    desk.hear(promises("west", {}), at_s=start_s)
    assert desk.arrangements.by(start_s) == {("north", SOLAR): 300}


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(promises("north", {("east", SOLAR, 5): 300}, DAY - 2 * DAY_S), id="a day that is over"),
        pytest.param(promises("north", {("east", SOLAR, 5): 300}, DAY + DAY_S), id="a day too far ahead"),
        pytest.param(promises("north", {("east", SOLAR, 5): 300}, DAY + 1), id="no day"),
        pytest.param(Promises("north", DAY, DAY + INTERVAL_S, ()), id="a part of a day"),
    ],
)
def test_what_is_not_about_today_or_tomorrow_is_not_kept(desk: Desk, message: Promises) -> None:
    desk.hear(message)
    assert desk.store.heard_of(MessageType.PROMISES) == []


def test_nobody_arranges_in_the_name_of_another(desk: Desk) -> None:
    desk.hear(promises("north", {("east", SOLAR, 5): 300}), "west")
    assert desk.store.heard_of(MessageType.PROMISES) == []
    assert desk.outputs.complaints == ["west arranges in the name of north; it is ignored"]


def test_what_is_arranged_is_listed_with_what_came_of_each_wish(desk: Desk) -> None:
    desk.heard_forecast(forecast("north", SourceOutlook(SOLAR, 5, 0, 300)))
    desk.reach(ONE_O_CLOCK)
    desk.hear(wishes("north", {("east", WIND, 5): 800, ("west", WIND, 5): 100}))
    desk.hear(wishes("west", {("east", WIND, 5): 900}))
    of_north = ArrangedWish(DAY, "north", "east", SOLAR, 5, 300, None)
    assert arranged_for(desk.store, "east", DAY) == [
        ArrangedWish(DAY, "east", "north", WIND, 5, 800, None),
        ArrangedWish(DAY, "east", "west", WIND, 5, 900, None),
        of_north,
    ]
    desk.reach(TWO_O_CLOCK)
    desk.hear(promises("north", {}))
    # Both wished more than there is: 900 Wh among 800 and the 700 that west may have.
    assert arranged_for(desk.store, "east", DAY) == [
        ArrangedWish(DAY, "east", "north", WIND, 5, 800, 480),
        ArrangedWish(DAY, "east", "west", WIND, 5, 900, 420),
        of_north._replace(promised_wh=0),
    ]
    assert arranged_for(desk.store, "east", DAY + DAY_S) == []


def broker_east(store: BrokerStore, *, arranges_ahead: bool) -> Broker:
    """The whole broker, with west for a neighbour, as it stands before it has learned market time."""
    registrar, node = (NamedKey(name, key(name).public.cose_key) for name in ("registrar", "node"))
    genesis = Genesis(LEDGER, INTERVAL_S, 300, 600, DAY_S, "EUR", ("home",), (registrar,), (node,), False)
    return Broker(
        *(IDENTITY, genesis, Topics(), store, {"west": Neighbour(key("west").public, PartnerPolicy())}, 10, Tariff()),
        passes_on=True,
        own_groups_first=False,
        keeps_for_windows=False,
        arranges_ahead=arranges_ahead,
        clock_waits=True,
        jitter=lambda: 0,
    )


def test_what_the_server_retained_may_come_before_market_time_is_known(desk: Desk) -> None:
    store = desk.store
    message = promises("west", {("east", SOLAR, 5): 300})
    levels, raw = ("brokers", "west", "promises"), Identity("west", key("west"), LEDGER).seal(message)
    # It has never run and knows no interval, so it has wished nothing either.
    broker_east(store, arranges_ahead=True).take_message(levels, raw)
    assert store.heard_of(MessageType.PROMISES) == []
    store.set_interval(ONE_O_CLOCK, IntervalState.OPEN, 0)
    broker_east(store, arranges_ahead=True).take_message(levels, raw)
    assert store.heard_of(MessageType.PROMISES) == [(DAY, "west", message.to_payload())]


def test_wishes_and_promises_belong_on_topics_of_their_own(desk: Desk) -> None:
    east = broker_east(desk.store, arranges_ahead=True)
    east.set_time(ONE_O_CLOCK)
    raw = Identity("west", key("west"), LEDGER).seal(promises("west", {}))
    for levels in (("brokers", "west", "wishes"), ("brokers", "north", "promises"), ("brokers", "west", "forecast")):
        east.take_message(levels, raw)
    assert len(east.outputs.complaints) == 3
    assert desk.store.heard_of(MessageType.PROMISES) == []


@pytest.mark.parametrize("arranges_ahead", [False, True])
def test_who_does_not_arrange_does_not_listen(desk: Desk, arranges_ahead: bool) -> None:
    topics = {topic for topic, _ in broker_east(desk.store, arranges_ahead=arranges_ahead).subscriptions()}
    assert {"dengen/v1/brokers/west/wishes", "dengen/v1/brokers/west/promises"} & topics == (
        {"dengen/v1/brokers/west/wishes", "dengen/v1/brokers/west/promises"} if arranges_ahead else set()
    )


class Counter:
    """East serving orders of one interval, of which north was promised 500 Wh of wind."""

    def __init__(self, folder: Path, there_wh: int) -> None:
        self.store = BrokerStore(folder / "broker.db")
        self.stock = Stock()
        self.start_s = DAY + 5 * INTERVAL_S
        self.has(there_wh)
        outputs = Outputs()
        self.orders = OrdersIn(
            *(IDENTITY, CALENDAR, Topics(), self.store, self.stock, BatchDesk(IDENTITY, self.store, outputs), outputs),
            *({"north": PartnerPolicy(), "west": PartnerPolicy()}, Tariff(), lambda _device: True),
            lambda start_s: {("north", WIND): 500} if start_s == self.start_s else {},
        )

    def has(self, energy_wh: int) -> None:
        asset = (f"mill-{energy_wh}", int(Carrier.ELECTRICITY), self.start_s, 0)
        self.stock.add(HeldSlice(asset, WIND, self.start_s, self.start_s + INTERVAL_S, 0, energy_wh, 5, "ola"))

    def serve(self, *asked: tuple[str, int], path: tuple[str, ...] = (), round_number: int = 1) -> list[int]:
        """What each order gets."""
        ids = []
        for number, (requester, energy_wh) in enumerate(asked):
            order = Order(
                bytes([round_number, number]) * (ORDER_ID_BYTES // 2),
                *(requester, WIND, self.start_s, self.start_s + INTERVAL_S, energy_wh, 10, self.start_s + INTERVAL_S),
                (*path, requester, "east"),
                bytes(ORDER_ID_BYTES) if path else None,
                round_number,
            )
            self.orders.take_order(requester, order, IDENTITY.seal(order), self.start_s + INTERVAL_S)
            ids.append((requester, order.order_id))
        self.orders.serve(self.orders.received(), lambda _row: False, with_bought=True)
        return [self.orders.row(*name).granted_wh for name in ids]


def test_an_order_under_a_promise_is_served_first(tmp_path: Path) -> None:
    assert Counter(tmp_path, 600).serve(("north", 500), ("west", 500)) == [500, 100]


def test_what_was_given_in_earlier_rounds_is_taken_off_a_promise(tmp_path: Path) -> None:
    counter = Counter(tmp_path, 300)
    assert counter.serve(("north", 300)) == [300]
    counter.has(400)
    # 200 Wh of the promise are left; of the other 200 north wants 100 and west 300.
    assert counter.serve(("north", 300), ("west", 300), round_number=3) == [250, 150]


def test_a_promise_does_not_serve_orders_that_are_passed_on(tmp_path: Path) -> None:
    counter = Counter(tmp_path, 600)
    assert counter.serve(("north", 500), ("west", 500), path=("far",), round_number=2) == [300, 300]
    # Nor does it use the promise up.
    counter.has(300)
    assert counter.serve(("north", 500), ("west", 500), round_number=3) == [300, 0]
