"""Foresight through whole brokers: a forecast for the neighbour, hints for who asked, the same after a restart."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from support.schema import schema_check

from broker.market.forecast import expected_surplus
from broker.protocol.market_time import Interval
from broker.protocol.messages import Forecast, Hint, Message, MessageType, SourceOutlook, SupplyLevel
from broker.protocol.sources import Source
from broker.service.foresight import heard_forecasts, stored_expectations
from broker.service.store import BrokerStore
from simulation.world import INTERVAL_S, T0, ConsumerPlan, DevicePlan, Plan, World

DAY_S = 86_400
INTERVALS = 75
"""From 23:00 on: until noon of the second day every time of day has been closed once."""

FORECAST_DAY_S = T0 + 2 * INTERVAL_S + 2 * DAY_S


def solar_wh(index: int) -> int:
    """By day only: from 08:00 to 16:00 UTC."""
    hour = (T0 + index * INTERVAL_S) % DAY_S // 3_600
    return 2_000 if 8 <= hour < 16 else 0


PLAN = Plan(
    ("east", "west"),
    "east",
    (
        ConsumerPlan("anna", "east", (("solar", 100),), (500,) * INTERVALS),
        ConsumerPlan("ben", "west", (("solar", 50), ("wind", 50)), (1_000,) * INTERVALS),
        ConsumerPlan("cleo", "west", (("wind", 100),), (400,) * INTERVALS),
    ),
    (
        DevicePlan("roof", "ola", "east", Source.SOLAR, tuple(solar_wh(index) for index in range(INTERVALS))),
        DevicePlan("mill", "pia", "west", Source.WIND, (700,) * INTERVALS),
    ),
)


def store_of(world: World, broker: str) -> BrokerStore:
    return BrokerStore(world.brokers[broker].config.database)


def wish(world: World, broker: str, meter: str) -> None:
    store = store_of(world, broker)
    store.begin()
    store.set_hint_wish(meter, wished=True)
    store.commit()
    store.close()


@dataclass(frozen=True)
class Watched:
    """A world, and the payloads on each topic that a forecast or hint may stand on, since `forget`."""

    world: World
    heard: dict[str, list[bytes]]

    def forecasts(self, broker: str) -> list[Message]:
        return [self.world.opened(raw) for raw in self.heard[self.world.topics.forecast(broker)]]

    def hints(self, broker: str, meter: str) -> list[bytes]:
        return self.heard[self.world.topics.meter(broker, meter, "hint")]

    def again(self) -> None:
        """Start the brokers anew and listen afresh."""
        for payloads in self.heard.values():
            payloads.clear()
        self.world.run(self.world.market_time_s)


def watch(folder: Path, *, kills: int = 0, disconnects: int = 0) -> Watched:
    """PLAN, run to its end; anna and ben have asked for hints."""
    world = World(PLAN, folder, kills=kills, disconnects=disconnects)
    for broker, meter in (("east", "anna"), ("west", "ben")):
        wish(world, broker, meter)
    topics = [world.topics.forecast(broker) for broker in PLAN.brokers]
    topics += [world.topics.meter(consumer.broker, consumer.meter, "hint") for consumer in PLAN.consumers]
    watched = Watched(world, {topic: world.listen(topic) for topic in topics})
    world.run()
    return watched


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    return watch(tmp_path_factory.mktemp("foresight"))


def test_each_broker_forecasts_the_next_day_once_and_the_neighbour_keeps_it(watched: Watched) -> None:
    (east,) = watched.forecasts("east")
    (west,) = watched.forecasts("west")
    assert isinstance(east, Forecast)
    assert isinstance(west, Forecast)
    assert (east.start_s, east.end_s) == (FORECAST_DAY_S, FORECAST_DAY_S + DAY_S)
    noon = Interval(FORECAST_DAY_S + DAY_S // 2, FORECAST_DAY_S + DAY_S // 2 + INTERVAL_S)
    assert expected_surplus(east, Source.SOLAR, noon) == 1_500
    assert {(item.source, item.shortage_wh) for item in west.outlooks if item.interval == 24} == {
        (Source.SOLAR, 500),
        (Source.WIND, 200),
    }
    store = store_of(watched.world, "west")
    assert heard_forecasts(store) == [east]
    (expectation,) = stored_expectations(store, INTERVAL_S)
    store.close()
    # What east has been giving is known from the ledger, though the lines' demand is by plain shares.
    assert expectation.bought[Source.SOLAR][24] > 0
    assert expectation.demanded == {Source.SOLAR: (500,) * 48, Source.WIND: (900,) * 48}


def test_who_asked_gets_a_hint_and_nobody_else(watched: Watched) -> None:
    hint = watched.world.opened(watched.hints("east", "anna")[-1])
    assert isinstance(hint, Hint)
    assert (hint.meter, hint.start_s, hint.made_s) == ("anna", FORECAST_DAY_S, FORECAST_DAY_S - DAY_S // 2)
    by_hour = {index // 2: level for index, level in enumerate(hint.levels)}
    assert by_hour[7] is SupplyLevel.SCARCE
    assert by_hour[8] is by_hour[15] is SupplyLevel.PLENTIFUL
    assert by_hour[16] is SupplyLevel.SCARCE
    assert watched.hints("west", "ben")
    assert not watched.hints("west", "cleo")
    for name, payloads in watched.heard.items():
        for payload in payloads:
            assert schema_check(name, payload) in ("forecast", "hint")


def test_brokers_that_are_killed_and_cut_off_foresee_the_same(watched: Watched, folder: Path) -> None:
    disturbed = watch(folder, kills=60, disconnects=60)
    assert {topic: set(payloads) for topic, payloads in disturbed.heard.items()} == {
        topic: set(payloads) for topic, payloads in watched.heard.items()
    }


def test_a_restart_says_the_same_bytes_again_and_forecasts_nothing_anew(watched: Watched) -> None:
    before = {topic: set(payloads) for topic, payloads in watched.heard.items()}
    # Who asks while the broker is away gets the hint of the forecast that there is.
    wish(watched.world, "west", "cleo")
    watched.again()
    late = watched.world.topics.meter("west", "cleo", "hint")
    assert {topic: set(payloads) for topic, payloads in watched.heard.items() if topic != late} == {
        topic: payloads for topic, payloads in before.items() if topic != late
    }
    assert len(watched.heard[late]) == 1


def test_hints_go_out_a_few_at_a_time_and_all_of_them(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    wish(watched.world, "west", "cleo")
    monkeypatch.setattr("broker.service.foresight.HINTS_A_TURN", 1)
    watched.again()
    assert watched.hints("west", "ben")
    assert watched.hints("west", "cleo")


# What a neighbour's forecast is good for


@pytest.mark.parametrize(("forecast_by", "asked_first"), [(None, "east"), ("east", "east"), ("south", "south")])
def test_of_neighbours_that_announce_nothing_the_one_that_forecast_more_is_asked_first(
    forecast_by: str | None, asked_first: str, folder: Path
) -> None:
    """Neither has any wind; they might know somebody who has. Without any forecast their names decide."""
    plan = Plan(
        ("east", "south", "west"),
        "west",
        (ConsumerPlan("ben", "west", (("wind", 100),), (300,)),),
        (DevicePlan("dam", "ola", "east", Source.HYDRO, (60,)),),
        links=(("east", "west"), ("south", "west")),
    )
    world = World(plan, folder)
    day_s = T0 - T0 % DAY_S
    if forecast_by is not None:
        outlook = SourceOutlook(Source.WIND, (T0 - day_s) // INTERVAL_S, 0, 700)
        forecast = Forecast(forecast_by, day_s, day_s + DAY_S, (outlook,), (0,) * (DAY_S // INTERVAL_S))
        store = store_of(world, "west")
        store.begin()
        store.set_heard(day_s, MessageType.FORECAST, forecast_by, forecast.to_payload())
        store.commit()
        store.close()
    world.run()
    store = store_of(world, "west")
    assert [row.neighbour for row in store.orders_out(T0) if row.round_number == 1] == [asked_first]
    store.close()
