"""What contracts and providers choose beyond sources, from meter to ledger: windows, providers, prices, reserves.

T0 is an hour before a month ends: the first two intervals are the last of a day and of a month.
"""

import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broker.market.contracts import ShortageChoice, make_contract
from broker.market.terms import make_terms
from broker.market.windows import Window
from broker.protocol.messages import DeliveryState
from broker.protocol.sources import Source
from broker.service import cycle
from broker.service.outlook import contract_outlook
from broker.service.store import BrokerStore, DeliveryRow
from simulation import audit
from simulation.simulated_mqtt import Faults
from simulation.world import GATE_1_S, GATE_2_S, INTERVAL_S, T0, Books, ConsumerPlan, DevicePlan, Plan, World

FULL = os.environ.get("DENGEN_FULL") == "1"
SECOND = T0 + INTERVAL_S
THIRD = SECOND + INTERVAL_S


def consumer(meter: str, source: str, *energies_wh: int, broker: str = "east", **choices: Any) -> ConsumerPlan:
    return ConsumerPlan(meter, broker, ((source, 100),), energies_wh, choices=choices)


def roof(*energies_wh: int, owner: str = "ola", device: str = "roof", broker: str = "east", **more: Any) -> DevicePlan:
    return DevicePlan(device, owner, broker, Source.SOLAR, energies_wh, **more)


def run(folder: Path, *members: ConsumerPlan | DevicePlan, brokers: tuple[str, ...] = ("east",)) -> tuple[World, Books]:
    consumers = tuple([member for member in members if isinstance(member, ConsumerPlan)])
    devices = tuple([member for member in members if isinstance(member, DevicePlan)])
    world = World(Plan(brokers, "east", consumers, devices), folder)
    books = world.run()
    audit.check(world, books)
    return world, books


def world_deliveries(world: World) -> list[DeliveryRow]:
    store = BrokerStore(world.brokers["east"].config.database)
    rows = list(store.all_deliveries())
    store.close()
    return rows


def test_a_day_window_is_filled_by_the_next_interval_of_the_day_and_not_by_the_next_day(folder: Path) -> None:
    world, books = run(folder, consumer("anna", "solar", 300, 300, 0, window=Window.DAY), roof(0, 450, 900))
    assert books.delivered_wh == {("anna", T0, "solar"): 225, ("anna", SECOND, "solar"): 225}
    assert books.unmatched_wh["anna", T0] == 75
    assert books.kept_wh == {("east", THIRD, "solar"): 900}
    assert world.meters["anna"].final[T0].state is DeliveryState.FINAL
    assert world.meters["anna"].final[T0].unmatched_wh == 75


def test_left_over_energy_of_the_day_serves_a_later_demand(folder: Path) -> None:
    _, books = run(folder, consumer("anna", "solar", 0, 300, 300, window=Window.DAY), roof(500, 0, 0))
    assert books.delivered_wh == {("anna", SECOND, "solar"): 300}
    assert books.unmatched_wh["anna", THIRD] == 300


def test_interval_demands_come_before_longer_windows(folder: Path) -> None:
    _, books = run(
        folder,
        consumer("anna", "solar", 300, 0, window=Window.MONTH),
        consumer("ben", "solar", 300, 0, window=Window.DAY),
        consumer("cleo", "solar", 300, 0),
        roof(500, 300),
    )
    assert books.delivered_wh == {
        ("cleo", T0, "solar"): 300,
        ("ben", T0, "solar"): 300,
        ("anna", T0, "solar"): 200,
    }


def test_what_waits_is_not_claimed_again_by_the_next_demand(folder: Path) -> None:
    """Half solar by contract: the second demand asks for its own half only, since the first half still waits."""
    anna = ConsumerPlan("anna", "east", (("solar", 50), ("wind", 50)), (200, 200), choices={"window": Window.DAY})
    mill = DevicePlan("mill", "ola", "east", Source.WIND, (500, 500))
    _, books = run(folder, anna, roof(0, 500), mill)
    assert books.delivered_wh == {
        (meter, start_s, source): 100 for meter in ("anna",) for start_s in (T0, SECOND) for source in ("solar", "wind")
    }


def test_energy_that_may_serve_better_waits_for_the_end_of_the_window_and_no_neighbour_gets_it(folder: Path) -> None:
    """Anna takes anything; that ben would want the second sun of the day is known only when he does."""
    world, books = run(
        folder,
        ConsumerPlan("anna", "east", (("any", 100),), (300, 0), choices={"window": Window.DAY}),
        consumer("ben", "solar", 0, 300, window=Window.DAY, excluded_providers=["pia"]),
        ConsumerPlan("cleo", "west", (("any", 100),), (400, 0)),
        roof(300, 0),
        DevicePlan("mill", "ola", "east", Source.WIND, (0, 300)),
        brokers=("east", "west"),
    )
    assert books.delivered_wh == {("anna", T0, "wind"): 300, ("ben", SECOND, "solar"): 300}
    assert not books.bought_wh
    assert world.meters["anna"].final[T0].unmatched_wh == 0


@pytest.mark.parametrize(("most", "for_anna"), [(1, "wind"), (0, "solar")])
def test_when_too_many_demands_wait_the_oldest_are_given_at_once_what_is_there(
    most: int, for_anna: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ben's demand comes after gate 1 of the day's last interval. Who waits until gate 2 can leave the sun to him."""
    monkeypatch.setattr(cycle, "MAX_WAITING", most)
    anna = ConsumerPlan("anna", "east", (("any", 100),), (300, 0), choices={"window": Window.DAY})
    ben = consumer("ben", "solar", 0, 300, window=Window.DAY)
    cleo = consumer("cleo", "solar", 0, 0, window=Window.DAY)
    mill = DevicePlan("mill", "ola", "east", Source.WIND, (250, 50))
    late_s = {("ben", 1): (GATE_1_S + GATE_2_S) // 2, ("mill", 1): (GATE_1_S + GATE_2_S) // 2}
    world = World(Plan(("east",), "east", (anna, ben, cleo), (roof(300, 0), mill), late_s), folder)
    books = world.run()
    audit.check(world, books)
    assert books.delivered_wh["anna", T0, for_anna] == 300


def test_open_demands_survive_a_restart(folder: Path) -> None:
    plan = Plan(("east",), "east", (consumer("anna", "solar", 300, 0, window=Window.DAY),), (roof(0, 450),))
    world = World(plan, folder)
    world.run(SECOND + 60)
    books = world.run()
    audit.check(world, books)
    assert books.delivered_wh == {("anna", T0, "solar"): 300}


DISTURBED = Plan(
    ("east", "west"),
    "east",
    (
        consumer("anna", "solar", 300, 300, 300, broker="west", window=Window.DAY),
        consumer("ben", "solar", 200, 100, 100, window=Window.MONTH, excluded_providers=["pia"]),
        consumer("cleo", "solar", 50, 50, 50),
        ConsumerPlan("dora", "east", (("any", 100),), (80, 80, 80), choices={"window": Window.DAY}),
    ),
    (
        roof(60, 700, 200),
        roof(40, 40, 40, owner="pia", device="barn"),
        DevicePlan("mill", "ola", "east", Source.WIND, (30, 60, 100)),
    ),
)


@pytest.mark.parametrize("share", range(12))
def test_killed_at_any_moment_everybody_gets_the_same(share: int, folder: Path) -> None:
    calm = World(DISTURBED, folder / "calm")
    books = calm.run()
    audit.check(calm, books)
    world = World(DISTURBED, folder / "killed", kill_at=calm.moments * share // 12 + 1)
    assert world.run() == books
    audit.check(world, books)


def random_plan(chooser: random.Random) -> Plan:
    """One broker, and consumers of all windows, who can use several sources."""
    consumers = []
    for number in range(5):
        shares = chooser.choice([(("any", 100),), (("solar", 60), ("any", 40)), (("renewable", 50), ("wind", 50))])
        choices: dict[str, Any] = {"window": chooser.choice(list(Window))}
        if chooser.random() < 0.3:
            choices["excluded_providers"] = [chooser.choice(["ola", "pia"])]
        energies_wh = tuple([chooser.choice([0, 100, 250]) for _ in range(3)])
        shortage = chooser.choice([ShortageChoice.UNMATCHED, ShortageChoice.ANY])
        consumers.append(ConsumerPlan(f"c{number}", "east", shares, energies_wh, shortage, choices=choices))
    devices = [
        DevicePlan(
            f"d{number}",
            chooser.choice(["ola", "pia"]),
            "east",
            chooser.choice([Source.SOLAR, Source.WIND]),
            tuple([chooser.randrange(500) for _ in range(3)]),
        )
        for number in range(4)
    ]
    return Plan(("east",), "east", tuple(consumers), tuple(devices))


@pytest.mark.parametrize("seed", range(60 if FULL else 6))
def test_random_demands_of_all_windows_get_the_same_when_the_broker_is_killed(seed: int, folder: Path) -> None:
    chooser = random.Random(seed)
    plan = random_plan(chooser)
    calm = World(plan, folder / "calm")
    books = calm.run()
    audit.check(calm, books)
    killed = World(plan, folder / "killed", kill_at=chooser.randrange(1, calm.moments))
    assert killed.run() == books
    audit.check(killed, books)


@pytest.mark.parametrize("seed", range(6))
def test_lost_and_repeated_messages_change_nothing(seed: int, folder: Path) -> None:
    books = World(DISTURBED, folder / "calm").run()
    world = World(
        DISTURBED, folder / "faults", seed, faults=Faults(lost=20, doubled=20, reordered=20), kills=2, disconnects=2
    )
    assert world.run() == books
    audit.check(world, books)


def test_a_neighbour_fills_what_is_open(folder: Path) -> None:
    _, books = run(
        folder,
        consumer("anna", "solar", 300, 0, broker="west", window=Window.DAY),
        roof(0, 450),
        brokers=("east", "west"),
    )
    assert books.delivered_wh == {("anna", T0, "solar"): 300}
    assert books.bought_wh == {("west", SECOND, "solar"): 300}


def test_an_excluded_provider_is_left_alone_its_own_and_a_neighbours(folder: Path) -> None:
    _, books = run(
        folder,
        consumer("anna", "solar", 300, excluded_providers=["ola"]),
        roof(200),
        roof(100, owner="pia", device="barn"),
        roof(900, device="hall", broker="west"),
        brokers=("east", "west"),
    )
    assert books.delivered_wh == {("anna", T0, "solar"): 100}


def test_a_price_ceiling_holds_at_home_and_towards_neighbours(folder: Path) -> None:
    _, books = run(
        folder,
        consumer("anna", "solar", 300, highest_price=90),
        consumer("ben", "solar", 100),
        roof(200, terms=make_terms(91)),
        roof(50, device="barn", terms=make_terms(90)),
        roof(900, device="hall", broker="west", terms=make_terms(91)),
        brokers=("east", "west"),
    )
    assert books.delivered_wh == {("anna", T0, "solar"): 50, ("ben", T0, "solar"): 100}
    assert not books.bought_wh


def test_a_preferred_provider_comes_first(folder: Path) -> None:
    world, _ = run(
        folder,
        consumer("anna", "solar", 100, preferred_providers=["pia"]),
        consumer("ben", "solar", 100),
        roof(100),
        roof(100, owner="pia", device="zenith"),
    )
    got = {(row.meter, row.device) for row in world_deliveries(world)}
    assert got == {("anna", "zenith"), ("ben", "roof")}


def test_an_exclusive_share_goes_to_nobody_else_and_a_reserve_to_no_neighbour(folder: Path) -> None:
    kept = make_terms(100, reserve_ppm=300_000, exclusive_ppm=500_000, exclusive_for=["anna"])
    _, books = run(
        folder,
        consumer("anna", "solar", 400),
        consumer("ben", "solar", 100),
        consumer("cleo", "solar", 1_000, broker="west"),
        roof(1_000, terms=kept),
        brokers=("east", "west"),
    )
    # 500 Wh are anna's alone, 300 Wh are for anna and ben, 200 Wh for everybody.
    assert books.delivered_wh["anna", T0, "solar"] == 400
    assert books.delivered_wh["ben", T0, "solar"] == 100
    assert books.bought_wh == {("west", T0, "solar"): 200}


def test_a_contract_that_has_ended_serves_no_demand_any_more(folder: Path) -> None:
    world = World(
        Plan(("east",), "east", (consumer("anna", "solar", 100, 100, valid_until_s=SECOND),), (roof(100, 100),)), folder
    )
    books = world.run()
    assert books.delivered_wh == {("anna", T0, "solar"): 100}
    (refused,) = world.meters["anna"].refused.values()
    assert "no contract for this interval" in (refused.reason or "")


def test_the_shortage_choice_respects_prices_and_providers(folder: Path) -> None:
    anna = ConsumerPlan(
        "anna",
        "east",
        (("wind", 100),),
        (500,),
        ShortageChoice.ANY,
        choices={"highest_price": 100, "excluded_providers": ["pia"]},
    )
    _, books = run(
        folder,
        anna,
        roof(100, terms=make_terms(100)),
        roof(100, device="barn", terms=make_terms(101)),
        roof(100, device="hall", owner="pia", terms=make_terms(100)),
    )
    assert books.delivered_wh == {("anna", T0, "solar"): 100}


def test_a_new_contract_is_held_against_what_was_left_over(folder: Path) -> None:
    """East makes 1 000 Wh of sun and uses 300; west hears of the rest, and has nothing of its own."""
    world, _ = run(
        folder, consumer("anna", "solar", 300, 300), roof(1_000, 1_000, terms=make_terms(80)), brokers=("east", "west")
    )
    contract = make_contract(0, [("solar", 1_000_000)], ShortageChoice.UNMATCHED, area="home")
    for broker in ("east", "west"):
        store = BrokerStore(world.brokers[broker].config.database)
        # 48 intervals a day: 600 Wh and 900 Wh in each.
        served_wh = [
            contract_outlook(store, world.genesis, replace(contract, highest_price=limit), 48 * wh, 1)[0].served_wh
            for wh, limit in ((600, None), (900, None), (600, 80))
        ]
        store.close()
        # 700 Wh were left in two of the intervals; with a margin of 1 they cost 81.
        assert served_wh == [1_200, 1_400, 0]


def test_an_open_demand_is_decided_again_without_the_energy_that_the_ledger_refused(folder: Path) -> None:
    """Barn comes first by its name, but feeds another area, which only the ledger looks at."""
    anna = consumer("anna", "solar", 300, 0, window=Window.DAY)
    devices = (roof(0, 200), roof(0, 300, device="barn", area="away"))
    world = World(Plan(("east",), "east", (anna,), devices), folder)
    books = world.run()
    assert {(row.start_s, row.device): row.to_wh - row.from_wh for row in world_deliveries(world)} == {
        (T0, "roof"): 200
    }
    assert books.unmatched_wh["anna", T0] == 100
    assert world.meters["anna"].final[T0].unmatched_wh == 100
