"""Takes in readings and demands: checks each, keeps it, and answers with a receipt.

A receipt ACCEPTED means durably accepted, nothing more. The broker keeps one message per meter, kind, interval and
revision: the same payload again gets the same answer, whenever it comes; another payload is a conflict, which is kept
as evidence and refused. Late and out-of-order messages are accepted; numbers identify, they never refuse.
"""

from hashlib import sha256
from typing import Final, NamedTuple

from broker.protocol.envelope import Envelope, Signer, message_id, parse, verify
from broker.protocol.errors import BadSignature, MalformedMessage, ProtocolError, UnknownKey
from broker.protocol.limits import MAX_REASON_CHARACTERS
from broker.protocol.market_time import MarketCalendar
from broker.protocol.messages import (
    MESSAGE_CLASSES,
    Demand,
    MessageType,
    MeterValue,
    Quality,
    Reading,
    Receipt,
    ReceiptStatus,
)
from broker.protocol.topics import Topics
from broker.service.outputs import Identity, Outputs
from broker.service.pseudonyms import commitment, interval_key, pseudonym
from broker.service.registry import Registry
from broker.service.store import BrokerStore, MessageRow

MAX_CONFLICTS_KEPT: Final = 10_000
CLOCK_TOLERANCE_S: Final = 60
"""How far a meter's clock may be ahead of ours before an interval counts as not over yet."""

CAPACITY_MARGIN_PERCENT: Final = 110
"""A device may generate this much of its capacity at most; the ledger's rule is the same."""

_LEAVES: Final = {"reading": MessageType.READING, "demand": MessageType.DEMAND}


class RefusedInput(Exception):
    """A message that is refused for good; the text is the reason that goes back to the sender."""


class Accepted(NamedTuple):
    """A message that was accepted now, or (`again`) before."""

    value: MeterValue
    meter: str
    message_id: bytes
    raw: bytes
    again: bool


class Intake:
    """Readings and demands in, receipts out."""

    def __init__(
        self,
        identity: Identity,
        calendar: MarketCalendar,
        topics: Topics,
        store: BrokerStore,
        registry: Registry,
        outputs: Outputs,
    ) -> None:
        self._identity = identity
        self._calendar = calendar
        self._topics = topics
        self._store = store
        self._registry = registry
        self._outputs = outputs

    def take(
        self, meter: str, leaf: str, raw: bytes, market_time_s: int, first_start_s: int, settled_to_s: int = 0
    ) -> Accepted | None:
        """Handle one message that came on the meter's topic. Returns it if it is accepted, now or before.

        `first_start_s` is the start of the first interval that this broker serves demands of. Demands of intervals
        that end at `settled_to_s` or before are corrected no more.
        """
        kind = _LEAVES[leaf]
        try:
            envelope = parse(raw)
        except MalformedMessage as error:
            self._answer_unreadable(meter, kind, raw, error)
            return None
        try:
            return self._take_parsed(meter, kind, envelope, market_time_s, first_start_s, settled_to_s)
        except (ProtocolError, RefusedInput) as error:
            self._answer_refused(meter, kind, envelope, str(error))
            return None

    def _take_parsed(
        self,
        meter: str,
        kind: MessageType,
        envelope: Envelope,
        market_time_s: int,
        first_start_s: int,
        settled_to_s: int,
    ) -> Accepted | None:
        if envelope.message_type is not kind:
            raise RefusedInput(f"this topic takes a {kind.name.lower()}, not a {envelope.message_type.name.lower()}")
        signer = self._registry.signer(envelope.key_id)
        if signer is None:
            raise UnknownKey(envelope.key_id)
        if signer.name != meter:
            raise BadSignature(meter, kind.name.lower())
        identity = verify(envelope, signer, self._identity.ledger)
        value = MESSAGE_CLASSES[kind].from_payload(envelope.payload)
        assert isinstance(value, MeterValue)
        if value.meter != meter:
            raise RefusedInput(f"the message names meter {value.meter}, but {meter} signed it")
        refusal = None
        try:
            self._check_interval(value, market_time_s)
            if kind is MessageType.DEMAND:
                if value.revision and value.end_s <= settled_to_s:
                    raise RefusedInput("the correction deadline of this interval is past; its demand is settled")
                accepted = self._accept_demand(signer, value, identity, envelope.raw, first_start_s)
            else:
                accepted = self._accept_reading(signer, value, identity, envelope.raw)
            if accepted:
                return Accepted(value, meter, identity, envelope.raw, again=False)
        except RefusedInput as error:
            refusal = error
        # Asked only now, because nearly every message is new. What was accepted before keeps its answer for good, also
        # where it would be refused today.
        known = self._store.message(value.start_s, meter, kind, value.revision)
        if known is None:
            assert refusal is not None
            raise refusal
        if not known.raw and self._is_what_the_ledger_has(known, envelope):
            self._store.put_message(value.start_s, meter, value.revision, identity, envelope.raw)
            known = known._replace(message_id=identity, raw=envelope.raw)
        return self._take_again(known.message_id, known.raw, identity, value, kind, meter, envelope)

    def _take_again(
        self,
        known_id: bytes,
        known_raw: bytes,
        identity: bytes,
        value: MeterValue,
        kind: MessageType,
        meter: str,
        envelope: Envelope,
    ) -> Accepted | None:
        if known_id == identity:
            self._send_receipt(self.receipt_for(value, kind, identity, known_raw))
            return Accepted(value, meter, identity, known_raw, again=True)
        self._store.add_conflict(meter, kind, value.start_s, value.revision, identity, envelope.raw, MAX_CONFLICTS_KEPT)
        reason = f"another {kind.name.lower()} for this interval and revision was accepted before; send a new revision"
        self._send_receipt(
            Receipt(meter, kind, value.start_s, value.revision, ReceiptStatus.CONFLICT, identity, reason)
        )
        self._outputs.complain(f"{meter}: two different payloads for interval {value.start_s}, kept as a conflict")
        return None

    def _is_what_the_ledger_has(self, known: MessageRow, envelope: Envelope) -> bool:
        """True for the demand that this broker was committed to before its database was lost."""
        consumer = self._registry.consumer(known.meter)
        if consumer is None:
            return False
        k_interval = interval_key(consumer.day_key(known.start_s), known.start_s)
        return commitment(k_interval, envelope.raw) == known.commitment

    def _check_interval(self, value: MeterValue, market_time_s: int) -> None:
        if not self._calendar.is_interval(value.start_s, value.end_s):
            raise RefusedInput(
                f"[{value.start_s}, {value.end_s}) is no market interval; intervals take {self._calendar.interval_s} s"
            )
        if value.end_s > market_time_s + CLOCK_TOLERANCE_S:
            raise RefusedInput(
                f"the interval ends at {value.end_s}, which is still to come; check the clock of the gateway"
            )
        if value.quality is Quality.MISSING and value.energy_wh:
            raise RefusedInput("a missing interval carries no energy; send 0 Wh or another quality")

    def _accept_demand(
        self, signer: Signer, value: MeterValue, identity: bytes, raw: bytes, first_start_s: int
    ) -> bool:
        """Keep a demand and send its receipt; False if there is one already. Raises RefusedInput."""
        if value.start_s < first_start_s:
            raise RefusedInput(f"this broker serves demands of intervals from {first_start_s} on")
        consumer = self._registry.consumer(signer.name)
        if consumer is None:
            raise RefusedInput(f"{signer.name} is a generating device; it sends readings, not demands")
        version = consumer.contract_at(value.start_s)
        if version is None:
            raise RefusedInput(f"{signer.name} has no contract for this interval; add one that is valid from its start")
        k_interval = interval_key(consumer.day_key(value.start_s), value.start_s)
        alias = pseudonym(k_interval, consumer.key.key_id)
        bound = commitment(k_interval, raw)
        added = self._store.add_message(
            value.start_s, signer.name, MessageType.DEMAND, value.revision, identity, raw, value.energy_wh, alias, bound
        )
        if added:
            self._send_receipt(self._demand_receipt(value, identity, alias, bound, version.hash))
        return added

    def _accept_reading(self, signer: Signer, value: MeterValue, identity: bytes, raw: bytes) -> bool:
        """Keep a reading and send its receipt; False if there is one already. Raises RefusedInput."""
        device = self._registry.device(signer.name)
        if device is None:
            raise RefusedInput(f"{signer.name} is a consumer's meter; it sends demands, not readings")
        if value.start_s < device.from_s:
            raise RefusedInput(f"the mandate of {device.device} begins at {device.from_s}, after this interval")
        most_wh = device.capacity_w * (value.end_s - value.start_s) * CAPACITY_MARGIN_PERCENT // 360_000
        if value.energy_wh > most_wh:
            raise RefusedInput(
                f"{value.energy_wh} Wh is above what {device.device} with {device.capacity_w} W can generate"
                f" in the interval ({most_wh} Wh); check the meter's profile and scale"
            )
        added = self._store.add_message(
            value.start_s, signer.name, MessageType.READING, value.revision, identity, raw, value.energy_wh, None, None
        )
        if added:
            self._send_receipt(self.receipt_for(value, MessageType.READING, identity, raw))
        return added

    def receipt_for(self, value: MeterValue, kind: MessageType, identity: bytes, raw: bytes) -> Receipt:
        """The receipt of an accepted message, made from what is stored: the same one every time."""
        if kind is MessageType.READING:
            return Receipt(value.meter, kind, value.start_s, value.revision, ReceiptStatus.ACCEPTED, identity)
        consumer = self._registry.consumer(value.meter)
        version = consumer.contract_at(value.start_s) if consumer is not None else None
        if consumer is None or version is None:
            raise RefusedInput(f"{value.meter} is no longer registered here")
        k_interval = interval_key(consumer.day_key(value.start_s), value.start_s)
        alias = pseudonym(k_interval, consumer.key.key_id)
        return self._demand_receipt(value, identity, alias, commitment(k_interval, raw), version.hash)

    def _demand_receipt(
        self, value: MeterValue, identity: bytes, alias: bytes, bound: bytes, contract_hash: bytes
    ) -> Receipt:
        return Receipt(
            value.meter,
            MessageType.DEMAND,
            value.start_s,
            value.revision,
            ReceiptStatus.ACCEPTED,
            identity,
            None,
            alias,
            bound,
            contract_hash,
            value.end_s + self._calendar.gate_2_s,
        )

    def _answer_unreadable(self, meter: str, kind: MessageType, raw: bytes, error: MalformedMessage) -> None:
        """Bytes without a readable header have no id; their plain hash stands in for it."""
        reason = str(error)[:MAX_REASON_CHARACTERS]
        self._send_receipt(Receipt(meter, kind, 0, 0, ReceiptStatus.REFUSED, sha256(raw).digest(), reason))
        self._outputs.complain(f"{meter}: unreadable {kind.name.lower()}: {reason}")

    def _answer_refused(self, meter: str, kind: MessageType, envelope: Envelope, reason: str) -> None:
        start_s, revision = 0, 0
        try:
            value = (Demand if kind is MessageType.DEMAND else Reading).from_payload(envelope.payload)
            start_s, revision = value.start_s, value.revision
        except MalformedMessage:
            pass  # The reason says that it is malformed; an answer without the interval is still an answer.
        identity = message_id(envelope, self._identity.ledger, meter)
        self._send_receipt(
            Receipt(meter, kind, start_s, revision, ReceiptStatus.REFUSED, identity, reason[:MAX_REASON_CHARACTERS])
        )
        self._outputs.complain(f"{meter}: refused {kind.name.lower()}: {reason}")

    def _send_receipt(self, receipt: Receipt) -> None:
        # QoS 0: a lost receipt costs the agent a resend, which gets the same answer.
        topic = self._topics.meter(self._identity.name, receipt.meter, "receipt")
        self._outputs.publish(topic, self._identity.seal(receipt), qos=0)
