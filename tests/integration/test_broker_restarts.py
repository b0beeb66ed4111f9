"""Brokers and the MQTT server that are killed and started again; registrations while a broker runs."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from dengen_testing.listener import Listener
from dengen_testing.market import energy_broker
from dengen_testing.mosquitto import Mosquitto
from dengen_testing.processes import ProcessGroup
from dengen_testing.waiting import wait_until
from support.broker_desk import INTERVAL_S, PLAN, T0, BrokerDesk, totals

from broker.protocol.envelope import parse
from broker.protocol.messages import BrokerStatus, ReceiptStatus

pytestmark = pytest.mark.integration


@pytest.fixture
def desk(
    tmp_path: Path, mosquitto: Mosquitto, processes: ProcessGroup, start_listener: Callable[..., Listener]
) -> BrokerDesk:
    listener = start_listener(mosquitto.mqtt_config(), ["dengen/v1/#"])
    return BrokerDesk(tmp_path / "market", mosquitto, listener, processes)


def online(status: bytes) -> bool:
    return BrokerStatus.from_payload(parse(status).payload).online


def report_all(desk: BrokerDesk, index: int = 0) -> None:
    for meter, energy_wh in (("anna", 500), ("roof", 300), ("mill", 900), ("ben", 400), ("dam", 10)):
        assert desk.report(meter, energy_wh, index).status is ReceiptStatus.ACCEPTED


def check_books(desk: BrokerDesk, intervals: int) -> None:
    assert totals(desk.table("east", "history")) == {"solar": 300 * intervals, "wind": 200 * intervals}
    assert totals(desk.table("west", "history")) == {"wind": 400 * intervals}
    assert {row["state"] for row in desk.table("west", "orders")} == {"seen"}
    assert len(desk.table("west", "purchases")) == intervals


@pytest.mark.parametrize("killed", [("east",), ("west",), ("east", "west")])
def test_brokers_killed_between_receipt_and_gate_go_on(desk: BrokerDesk, killed: tuple[str, ...]) -> None:
    desk.tick(T0 + INTERVAL_S + 10)
    raw = desk.signed(desk.value("anna", 500))
    first = desk.send(raw, "anna")
    for meter, energy_wh in (("roof", 300), ("mill", 900)):
        desk.report(meter, energy_wh)
    for name in killed:
        desk.brokers[name].kill()
        desk.brokers[name].start()
    assert desk.receipt(desk.send(desk.signed(desk.value("ben", 400)), "ben")).status is ReceiptStatus.ACCEPTED
    desk.report("dam", 10)
    assert desk.send(raw, "anna") == first, "the same answer, also after a restart"
    desk.tick(T0 + INTERVAL_S + PLAN.gate_2_s)
    check_books(desk, 1)


def test_a_killed_server_is_found_again_and_nothing_is_missing(desk: BrokerDesk, mosquitto: Mosquitto) -> None:
    desk.tick(T0 + INTERVAL_S + 10)
    report_all(desk)
    mosquitto.kill()
    mosquitto.start()
    connected = len(desk.listener.messages)
    desk.tick(T0 + INTERVAL_S + PLAN.gate_2_s)
    assert desk.brokers["east"].running
    assert desk.brokers["west"].running
    # What is retained is published again, since the server has lost it.
    retained = {message.topic for message in desk.listener.messages[connected:]}
    assert {desk.topics.broker_status("east"), desk.topics.cleared("west")} <= retained
    desk.tick(T0 + 2 * INTERVAL_S + 10)
    report_all(desk, 1)
    desk.tick(T0 + 2 * INTERVAL_S + PLAN.gate_2_s)
    check_books(desk, 2)


def test_a_broker_that_is_told_again_and_again_to_stop_ends_once_and_well(desk: BrokerDesk) -> None:
    process, topic = desk.brokers["east"], desk.topics.broker_status("east")

    def told_until_it_ends() -> bool:
        if process.pid is not None:
            os.kill(process.pid, signal.SIGTERM)
        return not process.running

    desk.wait_for(lambda message: message.topic == topic and online(message.payload), "east to be there")
    for _ in range(3):
        since = len(desk.listener.messages)
        wait_until(told_until_it_ends, "the broker to end", detail=process.log_tail)
        assert process.exit_code == 0, process.log_tail()
        desk.wait_for(lambda message: message.topic == topic and not online(message.payload), "east to be away", since)
        since = len(desk.listener.messages)
        process.start()
        desk.wait_for(lambda message: message.topic == topic and online(message.payload), "east to be back", since)


def test_a_consumer_is_added_while_the_broker_runs(desk: BrokerDesk) -> None:
    desk.tick(T0 + INTERVAL_S + 10)
    public = energy_broker("key", "new", desk.workspace.key("cleo")).strip()
    desk.broker_of["cleo"] = "west"
    raw = desk.signed(desk.value("anna", 70, meter="cleo"), "cleo")
    refused = desk.receipt(desk.send(raw, "cleo", "demand"))
    assert refused.status is ReceiptStatus.REFUSED
    energy_broker(
        *("consumer", "add", "--config", desk.workspace.config("west"), "--meter", "cleo", "--key", public),
        *("--line", "hydro=100"),
    )
    accepted = desk.receipt(desk.send(raw, "cleo", "demand"))
    assert accepted.status is ReceiptStatus.ACCEPTED, "a refusal is not for ever: the same bytes are good now"
    assert desk.report("dam", 100).status is ReceiptStatus.ACCEPTED
    desk.tick(T0 + INTERVAL_S + PLAN.gate_2_s)
    assert totals(desk.table("west", "history")) == {"hydro": 70}


def test_a_device_is_taken_on_while_the_broker_runs(desk: BrokerDesk) -> None:
    desk.tick(T0 + INTERVAL_S + 10)
    desk.take_on("weir", "pia", "west", "hydro")
    desk.broker_of["weir"] = "west"
    raw = desk.signed(desk.value("dam", 60, meter="weir"), "weir")
    assert desk.receipt(desk.send(raw, "weir", "reading")).status is ReceiptStatus.ACCEPTED
    desk.tick(T0 + INTERVAL_S + PLAN.gate_2_s)
    assert {row["state"] for row in desk.table("west", "submissions")} == {"committed"}
    assert [row["refusal"] for row in desk.table("west", "readings")] == [None]
    assert {row["state"] for row in desk.table("west", "batches")} == {"committed"}


def test_a_device_is_taken_on_while_the_broker_is_away(desk: BrokerDesk) -> None:
    """Its statements wait until the broker knows market time again, or the ledger would refuse them as expired."""
    desk.tick(T0 + INTERVAL_S + PLAN.gate_2_s)
    desk.brokers["west"].stop()
    desk.take_on("weir", "pia", "west", "hydro")
    desk.brokers["west"].start()
    desk.tick(T0 + INTERVAL_S + PLAN.gate_2_s + 1)
    assert {row["state"] for row in desk.table("west", "submissions")} == {"committed"}


def test_the_retained_status_says_whether_a_broker_is_there(desk: BrokerDesk) -> None:
    topic = desk.topics.broker_status("west")

    desk.wait_for(lambda message: message.topic == topic and online(message.payload), "west to be there")
    for end in (desk.brokers["west"].kill, desk.brokers["west"].stop):
        since = len(desk.listener.messages)
        end()
        desk.wait_for(lambda message: message.topic == topic and not online(message.payload), "west to be away", since)
        since = len(desk.listener.messages)
        desk.brokers["west"].start()
        desk.wait_for(lambda message: message.topic == topic and online(message.payload), "west to be back", since)


def test_a_broker_that_is_told_to_stop_ends_with_0(desk: BrokerDesk) -> None:
    assert desk.brokers["west"].stop() == 0
    assert desk.brokers["east"].stop() == 0
    assert energy_broker("ledger", "verify", desk.workspace.ledger)
