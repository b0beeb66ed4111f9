"""What comes late, early, or never: demands and readings out of time, meters that are silent, brokers that are away."""

from dataclasses import replace
from pathlib import Path

from broker.market.contracts import ShortageChoice, make_contract
from broker.protocol.messages import DeliveryState, ReceiptStatus
from broker.protocol.sources import Source
from broker.service.registration import change_contract
from broker.service.store import BrokerStore
from simulation import audit
from simulation.plans import PAIR, RETAILER, TRIO
from simulation.world import GATE_1_S, GATE_2_S, INTERVAL_S, T0, ConsumerPlan, DevicePlan, Plan, World

GREEDY = Plan(
    ("east",),
    "east",
    (
        ConsumerPlan("anna", "east", (("solar", 100),), (500, 300)),
        ConsumerPlan("ben", "east", (("solar", 100),), (40, 40)),
    ),
    (DevicePlan("roof", "ola", "east", Source.SOLAR, (700, 900)),),
)


def late(plan: Plan, meter: str, index: int, late_s: int) -> Plan:
    return replace(plan, late_s={**plan.late_s, (meter, index): late_s})


def test_a_demand_between_the_gates_is_served_before_gate_2(folder: Path) -> None:
    world = World(late(GREEDY, "ben", 0, GATE_1_S + 60), folder)
    books = world.run()
    audit.check(world, books)
    assert books.unmatched_wh["ben", T0] == 0


def test_a_demand_after_gate_2_is_settled_with_the_next_close(folder: Path) -> None:
    world = World(late(GREEDY, "ben", 0, GATE_2_S + 60), folder)
    books = world.run()
    accounts = audit.check(world, books)
    assert books.unmatched_wh["ben", T0] == 0
    first, second = accounts.closed["east", T0]
    assert (first.demands, first.demanded_wh) == (1, 500)
    assert (second.revision, second.demands, second.demanded_wh) == (1, 2, 540)


def test_a_demand_that_comes_hours_late_is_settled_from_what_was_kept(folder: Path) -> None:
    world = World(late(GREEDY, "ben", 0, 5 * INTERVAL_S), folder)
    books = world.run()
    audit.check(world, books)
    assert books.unmatched_wh["ben", T0] == 0


def test_a_reading_between_the_gates_still_serves_the_interval(folder: Path) -> None:
    world = World(late(GREEDY, "roof", 0, GATE_1_S + 60), folder)
    books = world.run()
    audit.check(world, books)
    assert not any(books.unmatched_wh.values())


def test_a_reading_after_gate_2_is_issued_and_kept(folder: Path) -> None:
    world = World(late(GREEDY, "roof", 0, GATE_2_S + 60), folder)
    books = world.run()
    audit.check(world, books)
    assert books.unmatched_wh["anna", T0] == 500
    assert books.kept_wh["east", T0, "solar"] == 700


def test_a_silent_meter_holds_nobody_up_beyond_the_gate(folder: Path) -> None:
    """West clears early and orders; east misses a meter and can serve only after its gate 1."""
    world = World(late(PAIR, "roof", 0, 100 * INTERVAL_S), folder, may_wait=True)
    books = world.run(T0 + 3 * INTERVAL_S)
    assert books.bought_wh["west", T0, "wind"] >= 300
    assert books.unmatched_wh["ben", T0] == 0


def test_meters_are_told_final_deliveries_that_are_on_the_ledger(folder: Path) -> None:
    world = World(PAIR, folder)
    books = world.run()
    for consumer in PAIR.consumers:
        for index, demanded_wh in enumerate(consumer.energies_wh):
            if demanded_wh:
                told = world.meters[consumer.meter].final[T0 + index * INTERVAL_S]
                assert told.state is DeliveryState.FINAL
                assert told.unmatched_wh == books.unmatched_wh[consumer.meter, told.start_s]


def test_a_demand_from_before_the_broker_served_is_refused_with_the_reason(folder: Path) -> None:
    world = World(GREEDY, folder)
    early = world.meter_value("anna", T0 - INTERVAL_S, 100)
    world.send("anna", early)
    books = world.run()
    audit.check(world, books)
    (receipt,) = world.meters["anna"].refused.values()
    assert receipt.status is ReceiptStatus.REFUSED
    assert receipt.reason is not None
    assert str(T0) in receipt.reason


def test_a_broker_that_was_away_for_hours_catches_up_interval_by_interval(folder: Path) -> None:
    world = World(PAIR, folder)
    world.run(T0 + INTERVAL_S + 60)
    world.market_time_s = T0 + 6 * INTERVAL_S
    books = world.run(T0 + 8 * INTERVAL_S)
    accounts = audit.check(world, books)
    assert [start_s for broker, start_s in accounts.closed if broker == "west"] == [
        T0 + index * INTERVAL_S for index in range(7)
    ]


def test_a_retailer_without_the_ledger_for_hours_loses_nothing(folder: Path) -> None:
    """West goes on taking in demands; what it decides waits for the ledger, in order."""
    world = World(RETAILER, folder, may_wait=True)
    world.run(T0 + INTERVAL_S + 60)
    world.hold_down("east")
    world.run(T0 + 4 * INTERVAL_S)
    world.let_up("east")
    books = world.run()
    audit.check(world, books)
    store = BrokerStore(world.brokers["west"].config.database)
    assert not store.late_intervals()
    store.close()


def test_after_a_refusal_the_next_neighbour_is_asked(folder: Path) -> None:
    world = World(TRIO, folder)
    books = world.run()
    audit.check(world, books)
    assert books.bought_wh["west", T0, "wind"] >= 300
    assert books.unmatched_wh["ben", T0] == 0


def test_who_gave_all_that_was_asked_is_asked_again(folder: Path) -> None:
    """Ben's wind is ordered first; cleo's renewables turn out to be nothing but wind as well."""
    plan = Plan(
        ("east", "west"),
        "east",
        (
            ConsumerPlan("ben", "west", (("wind", 100),), (100,)),
            ConsumerPlan("cleo", "west", (("renewable", 100),), (100,)),
        ),
        (DevicePlan("mill", "ola", "east", Source.WIND, (300,)),),
    )
    world = World(plan, folder)
    books = world.run()
    audit.check(world, books)
    assert not any(books.unmatched_wh.values())
    assert books.kept_wh == {("east", T0, "wind"): 100}


def test_a_contract_that_changes_during_the_run_counts_from_its_start(folder: Path) -> None:
    plan = Plan(
        ("east",),
        "east",
        (ConsumerPlan("anna", "east", (("solar", 100),), (100, 100, 100, 100)),),
        (
            DevicePlan("mill", "ola", "east", Source.WIND, (500, 500, 500, 500)),
            DevicePlan("roof", "ola", "east", Source.SOLAR, (500, 500, 500, 500)),
        ),
    )
    world = World(plan, folder)
    world.run(T0 + INTERVAL_S + 60)
    changed = make_contract(
        T0 + 2 * INTERVAL_S, [("wind", 500_000), ("solar", 500_000)], ShortageChoice.ANY, area="home"
    )
    store = BrokerStore(world.brokers["east"].config.database)
    change_contract(store, world.genesis, "anna", changed)
    store.close()
    books = world.run()
    audit.check(world, books)
    by_interval = [
        {source: wh for (_, start_s, source), wh in books.delivered_wh.items() if start_s == T0 + index * INTERVAL_S}
        for index in range(4)
    ]
    # A fresh start: 100 Wh of wind at once would be owed if the first two intervals counted.
    assert by_interval == [{"solar": 100}, {"solar": 100}, {"solar": 50, "wind": 50}, {"solar": 50, "wind": 50}]
