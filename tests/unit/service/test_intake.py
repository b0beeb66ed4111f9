"""What a broker does with each reading and demand at its door: every refusal, and the answers that it gives."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.ledger_world import key

from broker.market.contracts import ShortageChoice, contract_bytes, contract_hash, make_contract
from broker.protocol import cbor
from broker.protocol.envelope import seal
from broker.protocol.market_time import MarketCalendar
from broker.protocol.messages import (
    Carrier,
    Delivery,
    Demand,
    Message,
    MessageType,
    Quality,
    Reading,
    Receipt,
    ReceiptStatus,
)
from broker.protocol.sources import Source
from broker.protocol.topics import Topics
from broker.service import intake as intake_module
from broker.service.intake import Accepted, Intake
from broker.service.outputs import Identity, Outputs
from broker.service.registry import Registry
from broker.service.store import BrokerStore, ConsumerRow, ContractRow, DeviceRow

LEDGER = "test-ledger"
T0 = 1_769_900_400
INTERVAL_S = 1_800
NOW_S = T0 + INTERVAL_S + 5
CAPACITY_W = 4_000


class Door:
    """An intake over a store with the consumer `home` and the generating device `roof`."""

    def __init__(self, folder: Path) -> None:
        self.store = BrokerStore(folder / "broker.db")
        home, roof = key("home").public, key("roof").public
        self.contract = make_contract(T0 - 10 * INTERVAL_S, [("solar", 1_000_000)], ShortageChoice.ANY, area="north")
        self.store.begin()
        self.store.add_consumer(ConsumerRow("home", home.cose_key, home.key_id, b"s" * 32, 0))
        self.store.add_contract("home", ContractRow(1, self.contract.valid_from_s, contract_bytes(self.contract)))
        self.store.add_device(
            DeviceRow("roof", "alice", roof.cose_key, roof.key_id, int(Source.SOLAR), CAPACITY_W, "north", 100, T0)
        )
        self.outputs = Outputs()
        self.intake = Intake(
            Identity("b1", key("b1"), LEDGER),
            MarketCalendar(INTERVAL_S, 300, 600),
            Topics(),
            self.store,
            Registry(self.store),
            self.outputs,
        )

    def take(self, raw: bytes, leaf: str = "demand", meter: str = "home", first_s: int = 0) -> Accepted | None:
        return self.intake.take(meter, leaf, raw, NOW_S, first_s)

    def receipts(self) -> list[Receipt]:
        from broker.protocol.envelope import Signer, open_envelope

        signer = Signer("b1", key("b1").public)
        opened = [
            open_envelope(item.payload, LEDGER, lambda _key_id: signer).message for item in self.outputs.publications
        ]
        return [message for message in opened if isinstance(message, Receipt)]

    def rows(self) -> int:
        return sum(len(list(self.store.all_messages(kind))) for kind in (MessageType.DEMAND, MessageType.READING))


@pytest.fixture
def door(tmp_path: Path) -> Door:
    return Door(tmp_path)


def demand(meter: str = "home", **changes: Any) -> Demand:
    value = Demand(meter, T0, T0 + INTERVAL_S, 0, 500, Quality.MEASURED, Carrier.ELECTRICITY)
    return replace(value, **changes)


def reading(meter: str = "roof", **changes: Any) -> Reading:
    value = Reading(meter, T0, T0 + INTERVAL_S, 0, 500, Quality.MEASURED, Carrier.ELECTRICITY)
    return replace(value, **changes)


def signed(message: Message, signer: str | None = None, ledger: str = LEDGER, name: str | None = None) -> bytes:
    meter: str = message.meter  # type: ignore[attr-defined]
    return seal(message, key(signer or meter), ledger, name or signer or meter)


def with_energy(energy_wh: int) -> bytes:
    """A demand whose payload holds that number, signed as it should be; no class of ours makes a negative one."""

    class Raw(Demand):
        __slots__ = ()

        def to_payload(self) -> bytes:
            fields = cbor.decode(Demand.to_payload(self), "demand", 1_000)
            fields[4] = energy_wh
            return cbor.encode(fields)

    good = demand()
    return signed(Raw(good.meter, good.start_s, good.end_s, 0, 500, good.quality, good.carrier))


def test_an_accepted_demand_is_kept_with_pseudonym_commitment_and_contract(door: Door) -> None:
    accepted = door.take(signed(demand()))
    assert accepted is not None
    assert not accepted.again
    (receipt,) = door.receipts()
    row = door.store.message(T0, "home", MessageType.DEMAND, 0)
    assert row is not None
    assert receipt.status is ReceiptStatus.ACCEPTED
    assert (receipt.pseudonym, receipt.commitment) == (row.pseudonym, row.commitment)
    assert receipt.contract_hash == contract_hash(door.contract)
    assert receipt.clear_by_s == T0 + INTERVAL_S + 600
    assert receipt.message_id == row.message_id == accepted.message_id


def test_an_accepted_reading_is_kept(door: Door) -> None:
    assert door.take(signed(reading()), "reading", "roof") is not None
    (receipt,) = door.receipts()
    assert (receipt.status, receipt.kind, receipt.pseudonym) == (ReceiptStatus.ACCEPTED, MessageType.READING, None)


@pytest.mark.parametrize(("message", "leaf"), [(demand(), "demand"), (reading(), "reading")])
def test_the_same_message_gets_the_same_bytes_whenever_it_comes(door: Door, message: Message, leaf: str) -> None:
    raw = signed(message)
    meter: str = message.meter  # type: ignore[attr-defined]
    assert door.take(raw, leaf, meter) is not None
    again = door.intake.take(meter, leaf, raw, NOW_S + 90 * 86_400, T0 + 100 * INTERVAL_S)
    assert again is not None
    assert again.again
    first, second = door.outputs.publications
    assert first == second
    assert door.rows() == 1


def test_another_payload_for_the_same_interval_is_a_conflict_that_is_kept_and_reported(door: Door) -> None:
    door.take(signed(demand()))
    other = signed(demand(energy_wh=501))
    assert door.take(other) is None
    assert door.take(other) is None
    receipts = door.receipts()
    assert [receipt.status for receipt in receipts[1:]] == [ReceiptStatus.CONFLICT] * 2
    assert receipts[1] == receipts[2]
    (conflict,) = door.store.conflicts()
    assert conflict == ("home", MessageType.DEMAND, T0, 0, receipts[1].message_id)
    assert "conflict" in door.outputs.complaints[0]
    row = door.store.message(T0, "home", MessageType.DEMAND, 0)
    assert row is not None
    assert row.energy_wh == 500


def test_conflicts_are_bounded(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake_module, "MAX_CONFLICTS_KEPT", 3)
    door.take(signed(demand()))
    for energy_wh in range(10):
        door.take(signed(demand(energy_wh=energy_wh)))
    assert len(door.store.conflicts()) == 3


REFUSALS = {
    "unknown meter": (signed(demand("stranger")), "demand", "stranger", "not registered"),
    "signature of another meter": (signed(demand(), "roof"), "demand", "home", "does not verify for home"),
    "signature for another ledger": (signed(demand(), ledger="other"), "demand", "home", "same ledger id"),
    "another meter's own message": (signed(reading()), "reading", "home", "does not verify for home"),
    "a payload that names another meter": (signed(demand("roof"), "home"), "demand", "home", "names meter roof"),
    "negative energy": (with_energy(-1), "demand", "home", "demand.energy_wh"),
    "energy beyond 2^53": (with_energy(2**53), "demand", "home", "demand.energy_wh"),
    "a reading on the demand's topic": (signed(reading("home")), "demand", "home", "takes a demand, not a reading"),
    "a demand of a generating device": (signed(demand("roof")), "demand", "roof", "generating device"),
    "a reading of a consumer": (signed(reading("home")), "reading", "home", "consumer's meter"),
    "an interval that is not over": (
        signed(demand(start_s=T0 + INTERVAL_S, end_s=T0 + 2 * INTERVAL_S)),
        *("demand", "home", "still to come"),
    ),
    "a misaligned interval": (
        signed(demand(start_s=T0 - 60, end_s=T0 - 60 + INTERVAL_S)),
        *("demand", "home", "no market interval"),
    ),
    "an interval of another length": (signed(demand(start_s=T0 - INTERVAL_S)), "demand", "home", "take 1800 s"),
    "a missing interval with energy": (signed(demand(quality=Quality.MISSING)), "demand", "home", "carries no energy"),
    "a demand from before the contract": (
        signed(demand(start_s=T0 - 20 * INTERVAL_S, end_s=T0 - 19 * INTERVAL_S)),
        *("demand", "home", "no contract"),
    ),
    "a reading from before the mandate": (
        signed(reading(start_s=T0 - INTERVAL_S, end_s=T0)),
        *("reading", "roof", f"begins at {T0}"),
    ),
    # 4 kW for half an hour is 2000 Wh; a tenth more is tolerated.
    "a reading above capacity": (signed(reading(energy_wh=2_201)), "reading", "roof", "above what roof"),
    "no CBOR at all": (b"hello", "demand", "home", "COSE_Sign1"),
    "a truncated message": (signed(demand())[:-1], "demand", "home", "signature"),
    "trailing bytes": (signed(demand()) + b"\0", "demand", "home", "trailing"),
    "a message that is too long": (b"\xd2\x84" + bytes(2_000), "demand", "home", "expected"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_refused_is_answered_with_the_reason_and_changes_nothing(door: Door, case: str) -> None:
    raw, leaf, meter, reason = REFUSALS[case]
    before = b"".join(repr(row).encode() for row in door.store.consumers())
    assert door.take(raw, leaf, meter) is None
    assert door.take(raw, leaf, meter) is None
    first, second = door.receipts()
    assert first == second
    assert first.status is ReceiptStatus.REFUSED
    assert first.meter == meter
    assert first.reason is not None
    assert reason in first.reason
    assert door.rows() == 0
    assert not door.store.conflicts()
    assert b"".join(repr(row).encode() for row in door.store.consumers()) == before
    assert reason in door.outputs.complaints[0]


def test_the_largest_reading_within_tolerance_is_accepted(door: Door) -> None:
    assert door.take(signed(reading(energy_wh=2_200)), "reading", "roof") is not None


def test_a_meters_clock_may_be_a_minute_ahead(door: Door) -> None:
    raw = signed(demand())
    assert door.intake.take("home", "demand", raw, T0 + INTERVAL_S - 61, 0) is None
    assert door.intake.take("home", "demand", raw, T0 + INTERVAL_S - 60, 0) is not None


def test_a_demand_from_before_the_first_interval_is_refused(door: Door) -> None:
    assert door.take(signed(demand()), first_s=T0 + INTERVAL_S) is None
    assert door.receipts()[0].reason == f"this broker serves demands of intervals from {T0 + INTERVAL_S} on"


def test_a_missing_interval_without_energy_is_accepted(door: Door) -> None:
    assert door.take(signed(demand(quality=Quality.MISSING, energy_wh=0))) is not None


def test_late_and_out_of_order_intervals_are_accepted(door: Door) -> None:
    for steps in (3, 1, 2):
        start_s = T0 - steps * INTERVAL_S
        assert door.take(signed(demand(start_s=start_s, end_s=start_s + INTERVAL_S))) is not None


def test_receipts_go_to_the_meter_at_qos_0(door: Door) -> None:
    door.take(signed(demand()))
    (publication,) = door.outputs.publications
    assert publication.topic == "dengen/v1/brokers/b1/meters/home/receipt"
    assert (publication.qos, publication.retain) == (0, False)
    assert not isinstance(door.receipts()[0], Delivery)
