"""Messages survive the wire unchanged, and every guard of the codec refuses what it is there for."""

import dataclasses
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.messages import ALL_CLASSES, messages_of, payload_of, read_payload

from broker.protocol.errors import MalformedMessage
from broker.protocol.limits import MAX_INTEGER, MAX_NAME_CHARACTERS
from broker.protocol.messages import (
    MESSAGE_CLASSES,
    Carrier,
    DeliveredLine,
    Delivery,
    DeliveryState,
    Genesis,
    MessageType,
    MeterStatus,
    Order,
    Quality,
    Reading,
    Receipt,
    ReceiptStatus,
)
from broker.protocol.sources import Source

READING = Reading("meter-1", 0, 1800, 0, 500, Quality.MEASURED, Carrier.ELECTRICITY)
READING_MAP = {0: "meter-1", 1: 0, 2: 1800, 3: 0, 4: 500, 5: 0, 6: 0}


@pytest.mark.parametrize("message_class", ALL_CLASSES, ids=lambda c: c.__name__)
@given(data=st.data())
def test_every_message_comes_back_as_it_was(message_class: type[Any], data: st.DataObject) -> None:
    message = data.draw(messages_of(message_class))
    payload = payload_of(message)
    assert read_payload(message_class, payload) == message
    assert payload_of(read_payload(message_class, payload)) == payload


@pytest.mark.parametrize("message_class", ALL_CLASSES, ids=lambda c: c.__name__)
def test_fields_stand_in_key_order_and_name_the_attributes_in_order(message_class: type[Any]) -> None:
    keys = [field.key for field in message_class.FIELDS]
    assert keys == sorted(set(keys))
    assert [field.name for field in message_class.FIELDS] == [field.name for field in dataclasses.fields(message_class)]


def test_every_message_type_has_its_class() -> None:
    assert set(MESSAGE_CLASSES) == set(MessageType)
    assert all(message_class.TYPE is message_type for message_type, message_class in MESSAGE_CLASSES.items())


def test_a_reading_is_these_bytes() -> None:
    """Written by hand from RFC 8949, so that a change of the wire format cannot pass unseen."""
    assert (
        READING.to_payload().hex()
        == "a7" + "00676d657465722d31" + "0100" + "02190708" + "0300" + "041901f4" + "0500" + "0600"
    )


def changed(**entries: Any) -> dict[Any, Any]:
    return READING_MAP | {int(key[1:]): value for key, value in entries.items()}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (changed(k4=-1), "reading.energy_wh"),
        (changed(k4=MAX_INTEGER + 1), "reading.energy_wh"),
        (changed(k4=500.0), "reading.energy_wh"),
        (changed(k4=True), "reading.energy_wh"),
        (changed(k4="500"), "reading.energy_wh"),
        (changed(k4=None), "reading.energy_wh"),
        (changed(k4=cbor2.CBORTag(2, b"\x01")), "reading"),
        (changed(k3=65_536), "reading.revision"),
        (changed(k0=b"meter-1"), "reading.meter"),
        (changed(k0=""), "reading.meter"),
        (changed(k0="Meter-1"), "reading.meter"),
        (changed(k0="-meter"), "reading.meter"),
        (changed(k0="meter/1"), "reading.meter"),
        (changed(k0="meter+"), "reading.meter"),
        (changed(k0="meter-1\n"), "reading.meter"),
        (changed(k0="m" * (MAX_NAME_CHARACTERS + 1)), "reading.meter"),
        (changed(k5=4), "reading.quality"),
        (changed(k5=True), "reading.quality"),
        (changed(k5=0.0), "reading.quality"),
        (changed(k7=[0]), "reading.sampled_s"),
        (changed(k7=[0, 0, 0]), "reading.sampled_s"),
        (changed(k7=None), "reading.sampled_s"),
        (changed(k7={0: 0, 1: 0}), "reading.sampled_s"),
        (changed(k8=0), "reading"),
        (changed(k23=0), "reading"),
        (changed(k24=0), "reading"),
        ({key: READING_MAP[key] for key in (1, 0, 2, 3, 4, 5, 6)}, "reading"),
        ({key: READING_MAP[key] for key in (0, 1, 2, 3, 5, 6)}, "reading.energy_wh"),
        (list(READING_MAP.values()), "reading"),
        ({}, "reading.meter"),
        ({False: "meter-1"} | {k: v for k, v in READING_MAP.items() if k}, "reading"),
        ({"0": "meter-1"}, "reading"),
    ],
    ids=repr,
)
def test_a_wrong_entry_is_refused_by_name(wrong: Any, named: str) -> None:
    with pytest.raises(MalformedMessage) as refused:
        Reading.from_payload(cbor2.dumps(wrong))
    assert refused.value.where == named


def test_the_largest_integer_passes() -> None:
    largest = dataclasses.replace(READING, energy_wh=MAX_INTEGER)
    assert Reading.from_payload(largest.to_payload()) == largest


@pytest.mark.parametrize(
    ("message_class", "message", "key", "wrong"),
    [
        (Receipt, Receipt("m", MessageType.DEMAND, 0, 0, ReceiptStatus.ACCEPTED, bytes(32)), 5, bytes(31)),
        (Receipt, Receipt("m", MessageType.DEMAND, 0, 0, ReceiptStatus.ACCEPTED, bytes(32), "why"), 6, "x" * 401),
        (Receipt, Receipt("m", MessageType.DEMAND, 0, 0, ReceiptStatus.ACCEPTED, bytes(32), "why"), 6, None),
        (Order, Order(bytes(16), "a", Source.WIND, 0, 1800, 5, 1, 1, ("a", "b")), 5, 0),
        (Order, Order(bytes(16), "a", Source.WIND, 0, 1800, 5, 1, 1, ("a", "b")), 8, ["a"]),
        (Order, Order(bytes(16), "a", Source.WIND, 0, 1800, 5, 1, 1, ("a", "b")), 8, ["a", "b", "c", "d"]),
        (Order, Order(bytes(16), "a", Source.WIND, 0, 1800, 5, 1, 1, ("a", "b")), 2, 12),
        (MeterStatus, MeterStatus("m", True, 0, 0), 1, 1),
        (MeterStatus, MeterStatus("m", True, 0, 0), 1, None),
        (
            Delivery,
            Delivery("m", 0, 1800, 0, 5, 0, DeliveryState.FINAL, (DeliveredLine(0, Source.WIND, 5),)),
            7,
            [[256, 3, 5]],
        ),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_limits_of_other_fields_hold(message_class: type[Any], message: Any, key: int, wrong: Any) -> None:
    data = cbor2.loads(message.to_payload())
    assert message_class.from_payload(cbor2.dumps(data)) == message
    with pytest.raises(MalformedMessage):
        message_class.from_payload(cbor2.dumps(data | {key: wrong}))


def test_a_payload_over_its_limit_is_refused() -> None:
    with pytest.raises(MalformedMessage, match="at most 1024 bytes"):
        Reading.from_payload(READING.to_payload() + bytes(1024))


@pytest.mark.parametrize("message_class", ALL_CLASSES, ids=lambda c: c.__name__)
@given(raw=st.binary(max_size=120))
def test_arbitrary_payloads_are_refused_and_nothing_else_happens(message_class: type[Any], raw: bytes) -> None:
    try:
        message = read_payload(message_class, raw)
    except MalformedMessage:
        return
    assert payload_of(message) == raw


def test_a_genesis_is_no_larger_than_the_limit() -> None:
    with pytest.raises(MalformedMessage, match="at most 65536 bytes"):
        Genesis.from_bytes(bytes(65_537))
