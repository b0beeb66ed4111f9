"""What a broker counts for its forecast, when it makes one, and to whom it says what."""

from pathlib import Path

import pytest
from support.ledger_world import key

from broker.market.contracts import ShortageChoice, contract_bytes, make_contract
from broker.market.forecast import HISTORY_S, HistoryKind
from broker.market.statements import Flow
from broker.protocol.envelope import parse, seal, sealed_id
from broker.protocol.market_time import Interval, MarketCalendar
from broker.protocol.messages import Carrier, Demand, Forecast, Hint, MessageType, Quality, Reading, SupplyLevel
from broker.protocol.sources import Source, SourceGroup
from broker.protocol.topics import Topics
from broker.service.foresight import Foresight, stored_expectations
from broker.service.outputs import Identity, Outputs
from broker.service.registration import RegistrationError, wish_hints
from broker.service.registry import Registry
from broker.service.store import BrokerStore, ConsumerRow, ContractRow, DeviceRow, TransferRow

LEDGER = "test-ledger"
HOUR_S = 3_600
DAY_S = 86_400
MONDAY_S = 1_770_000_000 // DAY_S * DAY_S
NOON_S = MONDAY_S + DAY_S // 2
FORECAST_TOPIC = "dengen/v1/brokers/east/forecast"


class Desk:
    """A broker's foresight over a store with the consumer `home` and the generating device `roof`."""

    def __init__(self, folder: Path, *, has_neighbours: bool = True) -> None:
        self.folder = folder
        self.has_neighbours = has_neighbours
        self.store = BrokerStore(folder / "broker.db")
        if self.store.consumer("home") is None:
            home, roof = key("home").public, key("roof").public
            contract = make_contract(
                0, [("solar", 333_333), ("renewable", 666_667)], ShortageChoice.UNMATCHED, area="north"
            )
            self.store.begin()
            self.store.add_consumer(ConsumerRow("home", home.cose_key, home.key_id, b"s" * 32, 0))
            self.store.add_contract("home", ContractRow(1, 0, contract_bytes(contract)))
            self.store.add_device(
                DeviceRow("roof", "ola", roof.cose_key, roof.key_id, int(Source.SOLAR), 4_000, "north", 100, 0)
            )
            self.store.commit()
        self.outputs = Outputs()
        self.foresight = Foresight(
            Identity("east", key("east"), LEDGER),
            MarketCalendar(HOUR_S, 300, 600),
            Topics(),
            self.store,
            Registry(self.store),
            self.outputs,
            has_neighbours=has_neighbours,
            keeps_for_windows=False,
        )

    def restarted(self) -> "Desk":
        """What is not committed is gone."""
        self.store.close()
        return Desk(self.folder, has_neighbours=self.has_neighbours)

    def accept(self, meter: str, start_s: int, energy_wh: int, revision: int = 0) -> None:
        kind = Demand if meter == "home" else Reading
        value = kind(meter, start_s, start_s + HOUR_S, revision, energy_wh, Quality.MEASURED, Carrier.ELECTRICITY, None)
        raw = seal(value, key(meter), LEDGER, meter)
        identity = sealed_id(raw, LEDGER, meter)
        self.store.begin()
        self.store.add_message(start_s, meter, value.TYPE, revision, identity, raw, energy_wh, None, None)
        self.foresight.count(value)

    def whole_days(self, first_s: int, days: int, roof_wh: int = 900, home_wh: int = 300) -> None:
        for start_s in range(first_s, first_s + days * DAY_S, HOUR_S):
            self.accept("roof", start_s, roof_wh)
            self.accept("home", start_s, home_wh)
        self.foresight.keep_counted()
        self.store.commit()

    def reach(self, start_s: int) -> None:
        """Everything before this interval is closed now."""
        self.store.begin()
        self.foresight.advance(Interval(start_s, start_s + HOUR_S))
        self.store.commit()

    def published(self) -> list[tuple[str, bytes]]:
        publications, self.outputs.publications = self.outputs.publications, []
        assert all(publication.retain for publication in publications)
        return [(publication.topic, publication.payload) for publication in publications]

    def history(self) -> list[tuple[int, int, int, int]]:
        return list(self.store.history(0, 2**53))


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_a_demand_counts_for_its_lines_to_the_millionth_of_a_wh(desk: Desk) -> None:
    desk.accept("home", MONDAY_S, 1)
    desk.accept("home", MONDAY_S + HOUR_S, 10)
    desk.accept("roof", MONDAY_S, 0)
    desk.foresight.keep_counted()
    demanded = int(HistoryKind.DEMANDED)
    assert desk.history() == [
        (MONDAY_S, int(HistoryKind.GENERATED), int(Source.SOLAR), 0),
        (MONDAY_S, demanded, int(Source.SOLAR), 333_333),
        (MONDAY_S, demanded, int(SourceGroup.RENEWABLE), 666_667),
        (MONDAY_S + HOUR_S, demanded, int(Source.SOLAR), 3_333_330),
        (MONDAY_S + HOUR_S, demanded, int(SourceGroup.RENEWABLE), 6_666_670),
    ]


def test_a_correction_counts_by_what_it_changes(desk: Desk) -> None:
    desk.accept("roof", MONDAY_S, 500)
    desk.accept("roof", MONDAY_S, 300, revision=2)
    desk.accept("roof", MONDAY_S, 400, revision=1)
    desk.foresight.keep_counted()
    ((_, _, _, energy_uwh),) = desk.history()
    assert energy_uwh == 300_000_000


def test_what_was_counted_and_not_committed_is_gone_with_the_message(desk: Desk) -> None:
    desk.accept("roof", MONDAY_S, 500)
    desk.foresight.keep_counted()
    desk = desk.restarted()
    assert desk.history() == []
    assert desk.store.message(MONDAY_S, "roof", MessageType.READING, 0) is None


def test_the_forecast_of_a_day_is_made_once_when_noon_before_it_is_closed(desk: Desk) -> None:
    desk.whole_days(MONDAY_S - 2 * DAY_S, 2)
    desk.reach(NOON_S - HOUR_S)
    ((_, raw),) = desk.published()  # This morning's day, which was due at noon yesterday.
    assert Forecast.from_payload(parse(raw).payload).start_s == MONDAY_S
    desk.reach(NOON_S)
    ((topic, raw),) = desk.published()
    forecast = Forecast.from_payload(parse(raw).payload)
    assert topic == FORECAST_TOPIC
    assert (forecast.start_s, forecast.group_shortages_wh) == (MONDAY_S + DAY_S, (0,) * 24)
    assert {(item.shortage_wh, item.surplus_wh) for item in forecast.outlooks} == {(0, 600)}
    desk.reach(NOON_S + HOUR_S)
    assert desk.published() == []
    assert desk.store.announcements() == [(FORECAST_TOPIC, raw)]
    desk = desk.restarted()
    desk.reach(NOON_S + HOUR_S)
    assert desk.published() == []
    assert desk.store.announcements() == [(FORECAST_TOPIC, raw)]


def test_what_came_after_noon_changes_no_forecast_of_that_noon(desk: Desk, tmp_path: Path) -> None:
    other = Desk(tmp_path / "other")
    for each in (desk, other):
        each.whole_days(MONDAY_S - DAY_S, 1)
    other.accept("roof", NOON_S, 3_000)
    other.foresight.keep_counted()
    # After an outage the broker gets to noon and beyond in one go.
    desk.reach(NOON_S)
    other.reach(NOON_S + 5 * HOUR_S)
    assert [raw for _, raw in desk.published()] == [raw for _, raw in other.published()]


def test_without_a_whole_day_on_record_there_is_no_forecast_and_no_hint(desk: Desk) -> None:
    wish_hints(desk.store, "home", wished=True)
    for start_s in range(MONDAY_S - DAY_S, MONDAY_S - HOUR_S, HOUR_S):
        desk.accept("roof", start_s, 100)
    desk.foresight.keep_counted()
    desk.reach(NOON_S)
    assert desk.published() == []
    assert not desk.foresight.unfinished


def test_a_broker_without_neighbours_tells_nobody_but_who_asked(tmp_path: Path) -> None:
    desk = Desk(tmp_path, has_neighbours=False)
    wish_hints(desk.store, "home", wished=True)
    desk.whole_days(MONDAY_S - DAY_S, 1)
    desk.reach(NOON_S)
    ((topic, raw),) = desk.published()
    assert topic == "dengen/v1/brokers/east/meters/home/hint"
    assert Hint.from_payload(parse(raw).payload).levels == (SupplyLevel.PLENTIFUL,) * 24
    # Again only where the server may have forgotten it, and never to who does not want it any more.
    desk.reach(NOON_S + HOUR_S)
    assert desk.published() == []
    desk.foresight.again()
    desk.reach(NOON_S + HOUR_S)
    assert desk.published() == [(topic, raw)]
    wish_hints(desk.store, "home", wished=False)
    desk.foresight.again()
    desk.reach(NOON_S + HOUR_S)
    assert desk.published() == []


def test_hints_are_for_registered_consumers(desk: Desk) -> None:
    with pytest.raises(RegistrationError, match="list consumers"):
        wish_hints(desk.store, "roof", wished=True)


def test_what_neighbours_gave_is_history_too(desk: Desk) -> None:
    desk.whole_days(MONDAY_S - DAY_S, 1)
    desk.store.begin()
    for hour, start_s in enumerate(range(MONDAY_S - DAY_S, MONDAY_S, HOUR_S)):
        order_id = bytes([hour] * 16)
        desk.store.add_transfers(
            [
                TransferRow(int(Flow.BOUGHT), "west", "mill", start_s, 0, 0, 50, int(Source.WIND), 1, order_id),
                TransferRow(int(Flow.BOUGHT), "west", "mill", start_s, 0, 50, 80, int(Source.WIND), 1, order_id),
                TransferRow(int(Flow.SOLD), "west", "roof", start_s, 0, 0, 9, int(Source.SOLAR), 1, order_id),
            ]
        )
    desk.store.commit()
    desk.reach(NOON_S)
    (expectation,) = stored_expectations(desk.store, HOUR_S)
    assert expectation.bought == {Source.WIND: (80,) * 24}


def test_history_is_kept_as_long_as_it_counts(desk: Desk) -> None:
    desk.whole_days(MONDAY_S - 30 * DAY_S, 31)
    desk.reach(NOON_S)
    assert min(start_s for start_s, *_ in desk.history()) == MONDAY_S + DAY_S - HISTORY_S
