"""The outbox's conversation: spread, resend, reconnect, and receipts that only the broker can give."""

from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest

from broker.protocol.envelope import Signer, seal, sealed_id
from broker.protocol.errors import BadSignature, MalformedMessage, UnknownKey
from broker.protocol.keys import Algorithm, generate_private_key
from broker.protocol.messages import (
    Carrier,
    Delivery,
    DeliveryState,
    Demand,
    Message,
    MessageType,
    Quality,
    Receipt,
    ReceiptStatus,
)
from meter_agent.outbox import (
    CONDUCTOR_PACE,
    DELIVERY_GRACE_S,
    MAX_ASKING,
    MAX_UNDER_WAY,
    AcceptedDemand,
    Outbox,
    OutboxState,
    Pace,
    WaitingMessage,
    is_missed,
)

LEDGER = "demo"
BROKER = generate_private_key()
METER = generate_private_key(Algorithm.ESP256)
PACE = Pace(spread_s=20.0, first_resend_s=10.0, longest_resend_s=40.0)


def _outbox(pace: Pace = PACE) -> Outbox:
    signer = Signer("east", BROKER.public)
    return Outbox(pace, Random(1), LEDGER, lambda key_id: signer if key_id == BROKER.public.key_id else None)


def _message(start_s: int = 0, meter: str = "house") -> WaitingMessage:
    demand = Demand(meter, start_s, start_s + 1800, 0, 7, Quality.MEASURED, Carrier.ELECTRICITY)
    raw = seal(demand, METER, LEDGER, meter)
    return WaitingMessage(meter, start_s, 0, sealed_id(raw, LEDGER, meter), raw)


def _receipt(message: WaitingMessage, status: ReceiptStatus, reason: str | None = None) -> Receipt:
    return Receipt(message.meter, MessageType.DEMAND, message.start_s, 0, status, message.message_id, reason)


def _from_broker(message: Message) -> bytes:
    return seal(message, BROKER, LEDGER, "east")


def test_meters_speak_at_seconds_of_their_own_and_always_the_same() -> None:
    firsts = set()
    for number in range(50):
        outbox = _outbox()
        outbox.add([_message(meter=f"meter-{number}")], 100.0)
        first = outbox.next_due_s()
        assert first is not None
        assert 100.0 <= first < 120.0
        again = _outbox()
        again.add([_message(1800, meter=f"meter-{number}")], 100.0)
        assert again.next_due_s() == first
        firsts.add(round(first))
    assert len(firsts) > 10


def test_a_message_without_receipt_is_sent_again_with_growing_pauses_and_the_same_bytes() -> None:
    outbox = _outbox()
    message = _message()
    outbox.add([message], 0.0)
    sent_at = []
    for _ in range(6):
        due_s = outbox.next_due_s()
        assert due_s is not None
        assert outbox.due(due_s - 0.001) == []
        assert outbox.due(due_s) == [message]
        sent_at.append(due_s)
    pauses = [later - earlier for earlier, later in pairwise(sent_at)]
    for pause, limit in zip(pauses, (10, 20, 40, 40, 40), strict=True):
        assert limit / 2 <= pause <= limit


def test_after_a_reconnect_everything_is_due_again_at_once() -> None:
    outbox = _outbox(CONDUCTOR_PACE)
    messages = [_message(start_s) for start_s in (0, 1800)]
    outbox.add(messages, 0.0)
    assert outbox.due(0.0) == messages
    assert outbox.due(0.1) == []
    outbox.reconnected(0.2)
    assert outbox.due(0.2) == messages


def test_an_accepted_message_is_never_sent_again() -> None:
    outbox = _outbox()
    message = _message()
    outbox.add([message], 0.0)
    outbox.due(20.0)
    answered = outbox.take_receipt(_from_broker(_receipt(message, ReceiptStatus.ACCEPTED)))
    assert answered is not None
    assert (answered.message, answered.state, answered.reason) == (message, OutboxState.ACCEPTED, None)
    outbox.reconnected(30.0)
    assert (len(outbox), outbox.next_due_s(), outbox.due(1e6)) == (0, None, [])
    # The same receipt again answers nothing.
    assert outbox.take_receipt(_from_broker(_receipt(message, ReceiptStatus.ACCEPTED))) is None


@pytest.mark.parametrize(
    ("status", "state"),
    [(ReceiptStatus.REFUSED, OutboxState.REFUSED), (ReceiptStatus.CONFLICT, OutboxState.CONFLICT)],
)
def test_refusals_and_conflicts_come_with_their_reason(status: ReceiptStatus, state: OutboxState) -> None:
    outbox = _outbox()
    message = _message()
    outbox.add([message], 0.0)
    answered = outbox.take_receipt(_from_broker(_receipt(message, status, "unknown meter")))
    assert answered is not None
    assert (answered.state, answered.reason) == (state, "unknown meter")


def test_only_the_brokers_own_receipts_count() -> None:
    outbox = _outbox()
    message = _message()
    outbox.add([message], 0.0)
    receipt = _receipt(message, ReceiptStatus.ACCEPTED)
    forged = bytearray(_from_broker(receipt))
    forged[-1] ^= 1
    with pytest.raises(BadSignature):
        outbox.take_receipt(bytes(forged))
    with pytest.raises(UnknownKey):
        outbox.take_receipt(seal(receipt, METER, LEDGER, "east"))
    with pytest.raises(BadSignature):
        outbox.take_receipt(seal(receipt, BROKER, "another-ledger", "east"))
    delivery = Delivery("house", 0, 1800, 0, 7, 7, DeliveryState.FINAL, ())
    with pytest.raises(MalformedMessage):
        outbox.take_receipt(_from_broker(delivery))
    with pytest.raises(MalformedMessage):
        outbox.read_delivery(_from_broker(receipt))
    assert outbox.read_delivery(_from_broker(delivery)) == delivery
    assert len(outbox) == 1


def test_a_receipt_for_another_message_of_the_same_interval_answers_nothing() -> None:
    outbox = _outbox()
    message = _message()
    outbox.add([message], 0.0)
    other = WaitingMessage("house", 0, 0, bytes(32), b"")
    assert outbox.take_receipt(_from_broker(_receipt(other, ReceiptStatus.ACCEPTED))) is None
    assert len(outbox) == 1


def _delivery(state: DeliveryState) -> Delivery:
    return Delivery("house", 0, 1800, 0, 7, 7, state, ())


@pytest.mark.parametrize(
    ("delivery", "seconds_after", "on_seal", "on_connection"),
    [
        (None, DELIVERY_GRACE_S - 1, False, False),
        (None, DELIVERY_GRACE_S, True, True),
        (_delivery(DeliveryState.OPEN), DELIVERY_GRACE_S, False, True),
        (_delivery(DeliveryState.FINAL), DELIVERY_GRACE_S, False, False),
    ],
)
def test_a_delivery_is_missed_once_it_should_be_here(
    delivery: Delivery | None, seconds_after: int, on_seal: bool, on_connection: bool
) -> None:
    message = _message()
    receipt = replace(_receipt(message, ReceiptStatus.ACCEPTED), clear_by_s=2400)
    demand = AcceptedDemand(message, receipt, delivery)
    assert is_missed(demand, 2400 + seconds_after, open_too=False) is on_seal
    assert is_missed(demand, 2400 + seconds_after, open_too=True) is on_connection


def test_of_a_broker_that_does_not_say_when_it_clears_nothing_is_missed() -> None:
    message = _message()
    demand = AcceptedDemand(message, _receipt(message, ReceiptStatus.ACCEPTED), None)
    assert not is_missed(demand, 2**40, open_too=True)


def test_what_is_asked_for_is_sent_until_a_receipt_comes_which_changes_nothing() -> None:
    outbox = _outbox(CONDUCTOR_PACE)
    message = _message()
    outbox.ask([message, message], 0.0)
    assert outbox.due(0.0) == outbox.due(10.0) == [message]
    assert outbox.take_receipt(_from_broker(_receipt(message, ReceiptStatus.REFUSED, "gone"))) is None
    assert outbox.due(100.0) == []


def test_intervals_without_a_receipt_go_before_those_that_ask_for_a_delivery() -> None:
    outbox = _outbox(CONDUCTOR_PACE)
    outbox.ask([_message(1800 * number) for number in range(MAX_UNDER_WAY)], 0.0)
    assert len(outbox) == MAX_ASKING
    assert outbox.add([_message(1800 * (MAX_UNDER_WAY + number)) for number in range(MAX_ASKING)], 0.0)


def test_what_finds_no_room_is_left_to_the_journal() -> None:
    outbox = _outbox()
    messages = [WaitingMessage("house", 1800 * i, 0, i.to_bytes(32, "big"), b"") for i in range(MAX_UNDER_WAY + 1)]
    assert outbox.add(messages[:-1], 0.0)
    assert outbox.add(messages[:1], 0.0)
    assert not outbox.add(messages[-1:], 0.0)
    assert len(outbox) == MAX_UNDER_WAY
