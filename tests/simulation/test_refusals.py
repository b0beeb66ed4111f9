"""What is refused, by the ledger or by a broker, and neighbours that do not keep to the rules: the others go on."""

from dataclasses import replace
from pathlib import Path

import pytest
from support.ledger_world import key

from broker.market.sourcing import order_id_for
from broker.market.statements import Flow
from broker.protocol.envelope import seal
from broker.protocol.messages import AnswerStatus, MessageType, Order, OrderAnswer
from broker.protocol.sources import Source
from broker.service.orders_in import MAX_OPEN_ORDERS_IN
from broker.service.store import BrokerStore, TransferRow, WorkState
from simulation import audit
from simulation.plans import PAIR, TRIO
from simulation.simulated_mqtt import Message
from simulation.world import GATE_2_S, INTERVAL_S, LEDGER, T0, ConsumerPlan, DevicePlan, Plan, World


def order(**changes: object) -> Order:
    """West asks east for wind of the first interval."""
    values: dict[str, object] = {
        "order_id": b"o" * 16,
        "requester": "west",
        "source": Source.WIND,
        "start_s": T0,
        "end_s": T0 + INTERVAL_S,
        "energy_wh": 50,
        "highest_price": 1_000_000,
        "not_after_s": T0 + INTERVAL_S,
        "path": ("west", "east"),
    }
    return Order(**(values | changes))  # type: ignore[arg-type]


def sealed(message: Order | OrderAnswer, sender: str = "west") -> bytes:
    return seal(message, key(sender), LEDGER, sender)


def orders_in(world: World, broker: str) -> list[tuple[str, bytes, str]]:
    store = BrokerStore(world.brokers[broker].config.database)
    rows = [(row.requester, row.order_id, row.state) for row in store.orders_in(T0)]
    store.close()
    return rows


def test_assets_of_another_area_are_left_aside_and_others_delivered(folder: Path) -> None:
    """The ledger refuses a delivery across areas; without care the same batch would be made again for ever."""
    plan = Plan(
        ("east",),
        "east",
        (ConsumerPlan("anna", "east", (("solar", 100),), (100,)), ConsumerPlan("ben", "east", (("wind", 100),), (70,))),
        (
            DevicePlan("a-roof-far-away", "ola", "east", Source.SOLAR, (300,), area="away"),
            DevicePlan("roof", "ola", "east", Source.SOLAR, (300,)),
            DevicePlan("mill", "ola", "east", Source.WIND, (300,)),
        ),
    )
    world = World(plan, folder)
    world.run(T0 + INTERVAL_S + GATE_2_S)
    store = BrokerStore(world.brokers["east"].config.database)
    devices = {(row.meter, row.device): row.to_wh - row.from_wh for row in store.all_deliveries()}
    store.close()
    assert devices == {("anna", "roof"): 100, ("ben", "mill"): 70}


def test_a_registration_that_comes_after_the_mandates_is_not_held_up_by_them(folder: Path) -> None:
    world = World(PAIR, folder)
    store = BrokerStore(world.brokers["west"].config.database)
    registration = store.statements(WorkState.WAITING)[0]
    store.begin()
    store.set_statement(registration.number, WorkState.REFUSED, "not yet")
    store.commit()
    world.patience_s = 10.0
    world.may_wait = True
    world.run(T0 + 20)
    store.begin()
    store.set_statement(registration.number, WorkState.WAITING, None)
    store.commit()
    store.close()
    world.may_wait = False
    books = world.run()
    audit.check(world, books)


def test_energy_of_a_new_device_waits_for_its_mandate(folder: Path) -> None:
    """The batch with the mandate is lost on its way, the one with the reading would not be."""
    lost = []

    def lose_first_submissions(message: Message, subscriber: str) -> bool:
        if message.topic.endswith("/submit") and message.sender == "broker-west" and len(lost) < 3:
            lost.append(message)
            return True
        return False

    dam = next(device for device in PAIR.devices if device.device == "dam")
    world = World(replace(PAIR, devices=tuple(device for device in PAIR.devices if device != dam)), folder)
    world.run(T0 + INTERVAL_S - 60)
    world.add_device(dam)
    world.server.partition = lose_first_submissions
    books = world.run()
    audit.check(world, books)
    assert books.delivered_wh["cleo", T0, "hydro"] == 150


def test_an_order_in_another_brokers_name_is_refused_and_takes_nobodys_place(folder: Path) -> None:
    """East knows which ids west can use, and sends south orders with them first."""
    world = World(TRIO, folder, may_wait=True)
    world.patience_s = 5.0
    world.run(T0 + INTERVAL_S - 60)
    forged_ids = [order_id_for("west", Source.WIND, T0, number, "south") for number in range(8)]
    for forged_id in forged_ids:
        for message in (
            order(order_id=forged_id, path=("east", "south"), requester="east"),
            order(order_id=forged_id, path=("west", "south")),
        ):
            raw = sealed(message, "east")
            world.before_next_step(lambda raw=raw: world.say("x", world.topics.request("south"), raw))
    books = world.run()
    audit.check(world, books)
    assert books.bought_wh["west", T0, "wind"] >= 300
    served = [(requester, order_id) for requester, order_id, state in orders_in(world, "south") if state == "committed"]
    assert {("west", forged_id) for forged_id in forged_ids} & set(served)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"requester": "east"}, "in the name of east"),
        ({"path": ("west", "south")}, "does not lead"),
        ({"path": ("west", "east", "east")}, "does not lead"),
        ({"start_s": T0 + 7, "end_s": T0 + 7 + INTERVAL_S}, "no market interval"),
        ({"start_s": T0 + 9 * INTERVAL_S, "end_s": T0 + 10 * INTERVAL_S}, "has not begun"),
    ],
)
def test_an_order_that_cannot_be_served_is_answered_and_not_kept(
    changes: dict[str, object], reason: str, folder: Path
) -> None:
    world = World(PAIR, folder)
    answers = world.listen(world.topics.response("west", "east"))
    world.before_next_step(lambda: world.say("x", world.topics.request("east"), sealed(order(**changes))))
    world.run(T0 + 20)
    (answer,) = [message for message in map(world.opened, answers) if isinstance(message, OrderAnswer)]
    assert answer.status is AnswerStatus.REFUSED
    assert answer.reason is not None
    assert reason in answer.reason
    assert not orders_in(world, "east")


def test_a_flood_of_orders_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_OPEN_ORDERS_IN <= 10_000
    monkeypatch.setattr("broker.service.orders_in.MAX_OPEN_ORDERS_IN", 5)
    world = World(PAIR, folder, may_wait=True)
    world.patience_s = 3.0
    for number in range(50):
        raw = sealed(order(order_id=number.to_bytes(16, "big")))
        world.before_next_step(lambda raw=raw: world.say("x", world.topics.request("east"), raw))
    world.run(T0 + 20)
    assert len(orders_in(world, "east")) == 5


def test_another_order_under_a_used_id_is_ignored(folder: Path) -> None:
    world = World(PAIR, folder, may_wait=True)
    world.patience_s = 3.0
    for energy_wh in (50, 500):
        raw = sealed(order(energy_wh=energy_wh))
        world.before_next_step(lambda raw=raw: world.say("x", world.topics.request("east"), raw))
    world.run(T0 + 20)
    store = BrokerStore(world.brokers["east"].config.database)
    assert [row.energy_wh for row in store.orders_in(T0)] == [50]
    store.close()


def test_a_neighbour_that_says_done_and_did_nothing_costs_the_wait_and_no_more(folder: Path) -> None:
    """East lies: its answers say done, while its transfers never reach the ledger."""

    def keeps_away_supplies(message: Message, subscriber: str) -> bool:
        return message.topic == f"dengen/v1/ledger/{LEDGER}/submit" and message.sender == "broker-east"

    plan = replace(PAIR, host="west", devices=tuple(d for d in PAIR.devices if d.broker == "west"))
    world = World(plan, folder, may_wait=True)
    world.patience_s = 5.0
    world.run(T0 + INTERVAL_S - 60)
    world.server.partition = keeps_away_supplies
    wind = order_id_for("west", Source.WIND, T0, 1, "east")
    lie = sealed(OrderAnswer(wind, AnswerStatus.DONE, 300, b"b" * 32), "east")
    world.before_next_step(lambda: world.say("x", world.topics.response("west", "east"), lie))
    books = world.run()
    audit.check(world, books)
    assert books.unmatched_wh["ben", T0] == 300


def test_an_answer_to_an_order_that_was_not_sent_is_ignored(folder: Path) -> None:
    world = World(PAIR, folder)
    stranger = sealed(OrderAnswer(b"x" * 16, AnswerStatus.REFUSED, 0, None, "no"), "east")
    world.before_next_step(lambda: world.say("x", world.topics.response("west", "east"), stranger))
    books = world.run()
    audit.check(world, books)


def test_a_large_order_out_of_many_devices_goes_in_several_batches(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.service.batches.FULL_BATCH_OPERATIONS", 2)
    plan = Plan(
        ("east", "west"),
        "east",
        (ConsumerPlan("ben", "west", (("wind", 100),), (470,)),),
        tuple(DevicePlan(f"mill-{number}", "ola", "east", Source.WIND, (100,)) for number in range(5)),
    )
    world = World(plan, folder, kills=3, seed=4)
    books = world.run()
    audit.check(world, books)
    assert books.bought_wh == {("west", T0, "wind"): 470}
    assert books.unmatched_wh == {("ben", T0): 0}
    store = BrokerStore(world.brokers["east"].config.database)
    (row,) = store.orders_in(T0)
    store.close()
    assert (row.state, row.granted_wh) == ("committed", 470)


def test_energy_that_goes_to_a_neighbour_and_comes_back_is_counted_both_times(folder: Path) -> None:
    store = BrokerStore(folder / "broker.db")
    there = TransferRow(Flow.BOUGHT, "east", "mill", T0, 0, 0, 100, Source.WIND, 5, b"1" * 16)
    assert store.add_transfers([there]) == 1
    assert store.add_transfers([there]) == 0
    sold = there._replace(flow=Flow.SOLD, party="west", price=6)
    back = there._replace(party="west", price=7, order_id=b"2" * 16)
    assert store.add_transfers([sold, back]) == 2
    assert [row.price for row in store.acquisitions("mill", T0, 0, 50, 60)] == [7, 5]
    # What was sold had cost what was paid before, not what was paid to get it back.
    (settled,) = store.settled_sales(T0, T0 + 1)
    assert settled.paid == 5
    store.close()


def test_readings_that_the_ledger_refuses_are_noted_and_do_not_hold_up_others(folder: Path) -> None:
    """The mandate of one device is for another broker; its energy cannot be taken."""
    world = World(PAIR, folder)
    store = BrokerStore(world.brokers["west"].config.database)
    for row in store.statements(WorkState.WAITING):
        if row.kind == MessageType.MANDATE and b"burner" in row.raw:
            store.begin()
            store.set_statement(row.number, WorkState.REFUSED, "taken back")
            store.commit()
    store.close()
    world.run()
    store = BrokerStore(world.brokers["west"].config.database)
    readings = {(row.meter, row.start_s): row.refusal for row in store.all_messages(MessageType.READING)}
    store.close()
    reason = readings["burner", T0]
    assert reason is not None
    assert "mandate" in reason
    assert readings["dam", T0] is None
