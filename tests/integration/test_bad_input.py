"""Bad input over real MQTT: the reason reaches the sender, and the market goes on as if nothing had been said."""

from collections.abc import Callable
from pathlib import Path

import pytest
from dengen_testing.listener import Listener
from dengen_testing.market import energy_broker
from dengen_testing.mosquitto import Mosquitto
from dengen_testing.processes import ProcessGroup, broker_process
from support.broker_desk import INTERVAL_S, PLAN, T0, BrokerDesk, totals

from broker.protocol import cbor
from broker.protocol.envelope import seal
from broker.protocol.keys import generate_private_key
from broker.protocol.messages import Demand, Quality, ReceiptStatus

pytestmark = pytest.mark.integration


@pytest.fixture
def desk(
    tmp_path: Path, mosquitto: Mosquitto, processes: ProcessGroup, start_listener: Callable[..., Listener]
) -> BrokerDesk:
    listener = start_listener(mosquitto.mqtt_config(), ["dengen/v1/#"])
    return BrokerDesk(tmp_path / "market", mosquitto, listener, processes)


class NegativeDemand(Demand):
    """A demand that says less than nothing; the classes of the protocol cannot."""

    __slots__ = ()

    def to_payload(self) -> bytes:
        fields = cbor.decode(super().to_payload(), "demand", 1_000)
        fields[4] = -500
        return cbor.encode(fields)


def test_bad_input_is_answered_and_nothing_is_lost(desk: BrokerDesk) -> None:
    desk.tick(T0 + INTERVAL_S + 10)
    stranger = seal(desk.value("anna", meter="stranger"), generate_private_key(), "desk", "stranger")
    good = desk.value("anna")
    assert isinstance(good, Demand)
    negative = NegativeDemand(good.meter, good.start_s, good.end_s, 0, 1, good.quality, good.carrier)
    mill_for_anna = desk.signed(desk.value("mill", meter="anna"), "mill")
    cases = {
        "not registered": (stranger, "stranger", "demand"),
        "does not verify for anna": (desk.signed(good, "roof"), "anna", "demand"),
        "expected": (b"no COSE", "anna", "demand"),
        "energy_wh": (desk.signed(negative), "anna", "demand"),
        "above what roof": (desk.signed(desk.value("roof", 2_201)), "roof", "reading"),
        "still to come": (desk.signed(desk.value("anna", 500, 1)), "anna", "demand"),
        "no market interval": (desk.signed(desk.value("anna", start_s=T0 + 60)), "anna", "demand"),
        "generating device": (
            desk.signed(Demand("roof", T0, T0 + INTERVAL_S, 0, 5, Quality.MEASURED, good.carrier)),
            *("roof", "demand"),
        ),
        "anna": (mill_for_anna, "anna", "reading"),
    }
    for reason, (raw, meter, leaf) in cases.items():
        receipt = desk.receipt(desk.send(raw, meter, leaf))
        assert receipt.status is ReceiptStatus.REFUSED, reason
        assert receipt.reason is not None
        assert reason in receipt.reason
    assert desk.table("east", "demands") == desk.table("east", "readings") == []

    raw = desk.signed(good)
    first = desk.send(raw, "anna")
    assert desk.receipt(first).status is ReceiptStatus.ACCEPTED
    assert desk.send(raw, "anna") == first, "a resent message gets the same bytes"
    conflict = desk.receipt(desk.send(desk.signed(desk.value("anna", 501)), "anna"))
    assert conflict.status is ReceiptStatus.CONFLICT
    assert conflict.reason is not None
    (kept,) = desk.table("east", "conflicts")
    assert (kept["meter"], kept["message_id"]) == ("anna", conflict.message_id.hex())

    for meter, energy_wh in (("roof", 300), ("mill", 900), ("ben", 400), ("dam", 0)):
        assert desk.report(meter, energy_wh).status is ReceiptStatus.ACCEPTED
    desk.tick(T0 + INTERVAL_S + PLAN.gate_2_s)
    assert totals(desk.table("east", "history")) == {"solar": 300, "wind": 200}
    assert totals(desk.table("west", "history")) == {"wind": 400}
    assert {row["unmatched_wh"] for name in PLAN.brokers for row in desk.table(name, "demands")} == {0}
    assert desk.deliveries("anna")[-1].unmatched_wh == 0
    for process in desk.brokers.values():
        assert process.stop() == 0
    assert energy_broker("ledger", "verify", desk.workspace.ledger)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("data_dir", "data_dri", "broker.data_dri"),
        ('clock = "conductor"', 'clock = "sundial"', "broker.clock"),
        ("genesis.cbor", "gone.cbor", "gone.cbor"),
        ('key_file = "east.pem"', 'key_file = "gone.pem"', "energy-broker key new"),
    ],
)
def test_a_broker_with_a_bad_config_does_not_start_and_says_why(
    desk: BrokerDesk, processes: ProcessGroup, old: str, new: str, sentence: str
) -> None:
    config = desk.workspace.config("east")
    desk.brokers["east"].stop()
    config.write_text(config.read_text().replace(old, new))
    process = desk.brokers["east"].start()
    assert process.wait_ended(10.0) == 2
    last = process.log_tail().splitlines()[-1]
    assert last.startswith("energy-broker: ")
    assert sentence in last


def test_a_ledger_belongs_to_one_process(desk: BrokerDesk, processes: ProcessGroup) -> None:
    other = desk.workspace.folder / "second.toml"
    other.write_text(desk.workspace.config("east").read_text().replace("east-data", "second-data"))
    process = processes.add(broker_process(other)).start()
    assert process.wait_ended(10.0) == 1
    assert "in use by another process" in process.log_tail()
    desk.tick(T0 + 60)
