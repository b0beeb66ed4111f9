"""The day ahead arranged among whole brokers: two are short of wind, one supplier has too little for both.

East has a mill, west and south want wind. By its history east will have 1 000 Wh left of each half hour, and either of
the others will lack 600. On the day the mill makes 700. Whoever east promised something is served first up to that.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from support.schema import schema_check

from broker.market.arrangements import PROMISED_BEFORE_S, WISHED_BEFORE_S
from broker.market.forecast import MADE_BEFORE_S, HistoryKind
from broker.protocol.messages import Message, NeighbourAmounts, Promises, Wishes
from broker.protocol.sources import Source
from broker.protocol.topics import Topics
from broker.service.store import BrokerStore
from simulation import audit
from simulation.simulated_mqtt import Faults
from simulation.simulated_mqtt import Message as MqttMessage
from simulation.world import GATE_2_S, INTERVAL_S, T0, Books, ConsumerPlan, DevicePlan, Plan, World

DAY_S = 86_400
DAY = T0 + 2 * INTERVAL_S + DAY_S
"""The day that is arranged; the runs begin an hour before the day before it."""

BEFORE = (DAY - T0) // INTERVAL_S
ON_THE_DAY = 2
EVERYBODY = frozenset(("east", "south", "west"))


def plan_of(west_wh: int = 600, south_wh: int = 600, mill_wh: int = 700) -> Plan:
    """The day before nothing is short, so that it says nothing of what neighbours do for each other."""
    nothing = (0,) * BEFORE
    return Plan(
        ("east", "south", "west"),
        "east",
        (
            ConsumerPlan("anna", "west", (("wind", 100),), (*nothing, *(west_wh,) * ON_THE_DAY)),
            ConsumerPlan("ben", "south", (("wind", 100),), (*nothing, *(south_wh,) * ON_THE_DAY)),
        ),
        (DevicePlan("mill", "ola", "east", Source.WIND, (*nothing, *(mill_wh,) * ON_THE_DAY)),),
    )


PLAN = plan_of()


@dataclass(frozen=True)
class Day:
    """A run: its books, and what was said on the topics of wishes and promises, in the order of the server."""

    world: World
    books: Books
    said: dict[tuple[str, str], list[bytes]]
    """By (broker, leaf): every payload that was published there."""

    def message(self, broker: str, leaf: str) -> Message:
        """What a broker said, however often."""
        (raw,) = set(self.said[broker, leaf])
        return self.world.opened(raw)

    @property
    def wind_wh(self) -> list[tuple[int, int]]:
        """What anna and ben got, interval by interval."""
        got = self.books.delivered_wh
        starts = range(DAY, DAY + ON_THE_DAY * INTERVAL_S, INTERVAL_S)
        return [(got.get(("anna", start_s, "wind"), 0), got.get(("ben", start_s, "wind"), 0)) for start_s in starts]


def world_of(
    folder: Path, plan: Plan, arrange: frozenset[str], **disturbed: Any
) -> tuple[World, dict[tuple[str, str], list[bytes]]]:
    """A world with its brokers' history, in which those of `arrange` do so; and where what is said will stand."""
    world = World(plan, folder, **disturbed)
    for name, process in world.brokers.items():
        market = replace(process.config.market, arranges_ahead=name in arrange)
        process.config = replace(process.config, market=market)
    remember(world, "east", HistoryKind.GENERATED, 1_000)
    for name in ("west", "south"):
        remember(world, name, HistoryKind.DEMANDED, 600)
    said: dict[tuple[str, str], list[bytes]] = {}

    def note(message: MqttMessage) -> None:
        match Topics().split(message.topic):
            case ("brokers", broker, ("wishes" | "promises") as leaf):
                assert message.retain
                said.setdefault((broker, leaf), []).append(message.payload)
            case _:
                pass

    world.server.listeners.append(note)
    return world, said


def remember(world: World, broker: str, kind: HistoryKind, energy_wh: int) -> None:
    """That so much was generated, or demanded of wind, in each half hour since the noon before the run."""
    store = BrokerStore(world.brokers[broker].config.database)
    store.begin()
    starts: Iterable[int] = range(DAY - DAY_S - MADE_BEFORE_S, DAY - MADE_BEFORE_S, INTERVAL_S)
    store.add_history([(start_s, int(kind), int(Source.WIND), energy_wh * 1_000_000) for start_s in starts])
    store.commit()
    store.close()


def day_of(folder: Path, plan: Plan = PLAN, *, arrange: frozenset[str] = EVERYBODY, **disturbed: Any) -> Day:
    """Run the day before and the beginning of the day."""
    world, said = world_of(folder, plan, arrange, **disturbed)
    return Day(world, world.run(), said)


@pytest.fixture(scope="module")
def arranged(tmp_path_factory: pytest.TempPathFactory) -> Day:
    """Everybody arranges: both wish 600 Wh, and each is promised 500."""
    return day_of(tmp_path_factory.mktemp("arranged"))


def of_whole_day(neighbour: str, message: NeighbourAmounts, energy_wh: int) -> bool:
    amounts = {(one.source, one.interval, one.energy_wh) for one in message.amounts}
    return message.neighbour == neighbour and amounts == {(Source.WIND, index, energy_wh) for index in range(48)}


def test_what_will_be_short_is_wished_and_the_surplus_is_promised_in_proportion(arranged: Day) -> None:
    for name in ("west", "south"):
        wishes = arranged.message(name, "wishes")
        assert isinstance(wishes, Wishes)
        assert (wishes.start_s, wishes.end_s) == (DAY, DAY + DAY_S)
        (of_east,) = wishes.wishes
        assert of_whole_day("east", of_east, 600)
        promises = arranged.message(name, "promises")
        assert isinstance(promises, Promises)
        assert promises.promises == ()
    promises = arranged.message("east", "promises")
    assert isinstance(promises, Promises)
    to_south, to_west = promises.promises
    assert of_whole_day("south", to_south, 500)
    assert of_whole_day("west", to_west, 500)
    for (broker, leaf), payloads in arranged.said.items():
        for payload in payloads:
            assert schema_check(f"dengen/v1/brokers/{broker}/{leaf}", payload) == leaf
    audit.check(arranged.world, arranged.books)


def test_two_with_equal_promises_share_too_little_as_without_any(arranged: Day, folder: Path) -> None:
    assert arranged.wind_wh == [(350, 350)] * ON_THE_DAY
    nobody = day_of(folder, arrange=frozenset())
    assert nobody.wind_wh == [(350, 350)] * ON_THE_DAY
    assert not nobody.said


@pytest.mark.parametrize(
    ("arrange", "expected"),
    [
        pytest.param({"east", "west"}, (600, 100), id="only west and east arrange"),
        pytest.param({"east", "south"}, (100, 600), id="only south and east arrange"),
        pytest.param({"south", "west"}, (350, 350), id="the supplier knows nothing of it"),
    ],
)
def test_who_holds_a_promise_gets_its_wh_before_the_other_shares_the_rest(
    arrange: set[str], expected: tuple[int, int], folder: Path
) -> None:
    day = day_of(folder, arrange=frozenset(arrange))
    audit.check(day.world, day.books)
    assert day.wind_wh == [expected] * ON_THE_DAY
    assert {broker for broker, _ in day.said} == arrange


def test_beyond_its_promise_an_order_shares_with_the_others(folder: Path) -> None:
    """Anna wants 1 400 Wh, not 600; the mill makes 1 000. Of what is left after 600 she and ben want 800 each."""
    day = day_of(folder, plan_of(west_wh=1_400, south_wh=800, mill_wh=1_000), arrange=frozenset(("east", "west")))
    audit.check(day.world, day.books)
    assert day.wind_wh == [(800, 200)] * ON_THE_DAY


def test_own_consumers_come_before_any_promise(folder: Path) -> None:
    cleo = ConsumerPlan("cleo", "east", (("wind", 100),), (*(0,) * BEFORE, *(450,) * ON_THE_DAY))
    plan = replace(PLAN, consumers=(*PLAN.consumers, cleo))
    day = day_of(folder, plan, arrange=frozenset(("east", "west")))
    audit.check(day.world, day.books)
    assert day.wind_wh == [(250, 0)] * ON_THE_DAY
    assert day.books.delivered_wh["cleo", DAY, "wind"] == 450


def test_who_is_not_served_is_promised_nothing(folder: Path) -> None:
    plan = replace(PLAN, policies={("east", "south"): {"is_served": False}, ("east", "west"): {"most_wh": 400}})
    day = day_of(folder, plan)
    audit.check(day.world, day.books)
    promises = day.message("east", "promises")
    assert isinstance(promises, Promises)
    (to_west,) = promises.promises
    assert of_whole_day("west", to_west, 400)
    assert day.wind_wh == [(400, 0)] * ON_THE_DAY


@pytest.mark.parametrize(("arrange", "supplier"), [(frozenset(), "south"), (frozenset(("east", "west")), "east")])
def test_at_one_price_who_promised_is_asked_first(arrange: frozenset[str], supplier: str, folder: Path) -> None:
    """South, which nothing was expected of, has more wind on the day than east, and at east's price."""
    windfall = DevicePlan("gust", "pia", "south", Source.WIND, (*(0,) * BEFORE, *(5_000,) * ON_THE_DAY))
    plan = replace(PLAN, consumers=PLAN.consumers[:1], devices=(*PLAN.devices, windfall))
    day = day_of(folder, plan, arrange=arrange)
    audit.check(day.world, day.books)
    assert asked_by_west(day) == [(supplier, 600)] * ON_THE_DAY


def asked_by_west(day: Day) -> list[tuple[str, int]]:
    store = BrokerStore(day.world.brokers["west"].config.database)
    asked = [(row.neighbour, row.energy_wh) for row in store.all_orders_out()]
    store.close()
    return asked


def test_what_has_come_is_taken_off_what_was_promised(folder: Path) -> None:
    """Anna's wind uses the promise up, so what cleo's group wants in a later round is asked of who has most."""
    cleo = ConsumerPlan("cleo", "west", (("renewable", 100),), (*(0,) * BEFORE, *(300,) * ON_THE_DAY))
    windfall = DevicePlan("gust", "pia", "south", Source.WIND, (*(0,) * BEFORE, *(5_000,) * ON_THE_DAY))
    plan = plan_of(mill_wh=2_000)
    plan = replace(plan, consumers=(*plan.consumers[:1], cleo), devices=(*plan.devices, windfall))
    day = day_of(folder, plan, arrange=frozenset(("east", "west")))
    audit.check(day.world, day.books)
    assert sorted(asked_by_west(day)) == [("east", 600)] * ON_THE_DAY + [("south", 300)] * ON_THE_DAY


def test_what_was_bought_for_another_is_not_taken_off(folder: Path) -> None:
    """West passes dan's 300 Wh on to east, which has most, and still has the whole promise for cleo's 500 Wh."""
    cleo = ConsumerPlan("cleo", "west", (("renewable", 100),), (*(0,) * BEFORE, *(500,) * ON_THE_DAY))
    dan = ConsumerPlan("dan", "far", (("wind", 100),), (*(0,) * BEFORE, *(300,) * ON_THE_DAY))
    almost = DevicePlan("gust", "pia", "south", Source.WIND, (*(0,) * BEFORE, *(1_900,) * ON_THE_DAY))
    plan = replace(
        plan_of(mill_wh=2_000),
        brokers=("east", "far", "south", "west"),
        links=(("east", "west"), ("south", "west"), ("far", "west")),
        consumers=(cleo, dan),
    )
    plan = replace(plan, devices=(*plan.devices, almost))
    day = day_of(folder, plan, arrange=frozenset(("east", "west")))
    audit.check(day.world, day.books)
    assert sorted(asked_by_west(day)) == [("east", 300)] * ON_THE_DAY + [("east", 500)] * ON_THE_DAY


def test_of_whom_is_not_asked_nothing_is_wished(folder: Path) -> None:
    day = day_of(folder, replace(PLAN, policies={("west", "east"): {"is_asked": False}}))
    wishes = day.message("west", "wishes")
    assert isinstance(wishes, Wishes)
    assert wishes.wishes == ()


@pytest.mark.parametrize("seed", range(3))
def test_brokers_that_are_killed_and_cut_off_arrange_the_same(seed: int, folder: Path) -> None:
    some = frozenset(("east", "west"))
    calm = day_of(folder / "calm", arrange=some)
    faults = Faults(lost=20, doubled=20, reordered=20)
    wild = day_of(folder / "wild", arrange=some, seed=seed, kills=60, disconnects=40, faults=faults)
    audit.check(wild.world, wild.books)
    assert wild.books == calm.books
    # What a broker said before it was killed is published again, byte for byte.
    assert {key: set(raws) for key, raws in wild.said.items()} == {key: set(raws) for key, raws in calm.said.items()}


def test_brokers_that_are_restarted_between_wishes_promises_and_the_day_keep_them(arranged: Day, folder: Path) -> None:
    """Each run of a world begins with new processes on the files of the one before."""
    world, said = world_of(folder, PLAN, frozenset(("east", "west")))
    for before_s in (MADE_BEFORE_S, WISHED_BEFORE_S, PROMISED_BEFORE_S, 0):
        world.run(DAY - before_s + GATE_2_S)
    day = Day(world, world.run(), said)
    audit.check(world, day.books)
    assert day.wind_wh == [(600, 100)] * ON_THE_DAY
    assert day.message("west", "wishes") == arranged.message("west", "wishes")


def test_wishes_that_come_too_late_leave_all_as_without(folder: Path) -> None:
    """West is away while the others wish and promise, and wishes when it is back."""
    world, said = world_of(folder, PLAN, frozenset(("east", "west")), may_wait=True)
    world.patience_s = 3.0
    world.run(DAY - WISHED_BEFORE_S)
    world.hold_down("west")
    world.run(DAY - PROMISED_BEFORE_S + INTERVAL_S + GATE_2_S)
    world.let_up("west")
    day = Day(world, world.run(), said)
    assert isinstance(day.message("west", "wishes"), Wishes)
    promises = day.message("east", "promises")
    assert isinstance(promises, Promises)
    assert promises.promises == ()
    assert day.wind_wh == [(350, 350)] * ON_THE_DAY


def test_the_same_seed_gives_the_same_bytes(arranged: Day, folder: Path) -> None:
    again = day_of(folder)
    assert again.said == arranged.said
    assert again.books == arranged.books
