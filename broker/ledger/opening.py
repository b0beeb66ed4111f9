"""Opening what was signed: batches from the wire, and the statements that operations carry inside. Pure.

Opening says who signed and decodes; whether it may happen is for `rules` to judge.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from broker.ledger.faults import Fault, RuleViolation
from broker.ledger.limits import MAX_INTRODUCTION_BYTES
from broker.ledger.operations import Operation, Register, decode_operation
from broker.ledger.state import KEY, KeyRow, State
from broker.protocol import envelope
from broker.protocol.envelope import Opened, Signer
from broker.protocol.errors import MalformedMessage, UnknownKey
from broker.protocol.keys import PublicKey, public_key_from_cose
from broker.protocol.market_time import MarketCalendar
from broker.protocol.messages import Batch, Genesis, KeyHolder, Message, MessageType, NamedKey, Registration


@dataclass(frozen=True, slots=True)
class Charter:
    """What the rules need of a genesis, looked up rather than searched."""

    ledger: str
    calendar: MarketCalendar
    areas: frozenset[str]
    registrars: Mapping[bytes, Signer]
    registrar_names: frozenset[str]
    correction_deadline_s: int
    validators: tuple[NamedKey, ...]
    """Those of the genesis; `rules.validators_now` says who they are after changes."""
    verifies: envelope.SignatureCheck = PublicKey.verifies
    """How signatures are checked; the verifier puts in a check that is told beforehand which of them hold."""


@dataclass(frozen=True, slots=True)
class OpenedBatch:
    """A batch whose signature holds. `key_id` names the key that it was checked with."""

    sender: str
    key_id: bytes
    batch_id: bytes
    not_after_s: int
    operations: tuple[Operation, ...]
    leaves: tuple[bytes, ...]
    """The encoded operations, which become the leaves of the Merkle tree."""
    raw: bytes


def charter_of(genesis: Genesis) -> Charter:
    """Raises ValueError or MalformedMessage if the genesis has no sound calendar or a key that is none."""
    registrars = [Signer(registrar.name, public_key_from_cose(registrar.key)) for registrar in genesis.registrars]
    return Charter(
        genesis.ledger,
        MarketCalendar(genesis.interval_s, genesis.gate_1_s, genesis.gate_2_s),
        frozenset(genesis.areas),
        {signer.key.key_id: signer for signer in registrars},
        frozenset(signer.name for signer in registrars),
        genesis.correction_deadline_s,
        genesis.validators,
    )


def open_batch(raw: bytes, state: State, charter: Charter) -> OpenedBatch:
    """Check a batch's signature against the registered keys, then decode it.

    Raises ProtocolError (MalformedMessage, UnknownKey, BadSignature) while nobody is known to have signed it: it must
    not be answered, since an answer about a forged copy would be taken for one about the original. Raises
    RefusedBatch once the sender is certain.
    """
    parsed = envelope.parse(raw)
    if parsed.message_type is not MessageType.BATCH:
        raise MalformedMessage("ledger batch", f"a batch, got a {parsed.message_type.name.lower()}")
    signer = party_signer(state, parsed.key_id) or _introduced(parsed, charter)
    if signer is None:
        raise UnknownKey(parsed.key_id)
    batch_id = envelope.verify(parsed, signer, charter.ledger, charter.verifies)
    index = None
    try:
        batch = Batch.from_payload(parsed.payload)
        operations = []
        for index, encoded in enumerate(batch.operations):  # noqa: B007
            operations.append(decode_operation(encoded))
    except MalformedMessage as error:
        raise RefusedBatch(signer.name, batch_id, RuleViolation(index, Fault.MALFORMED, str(error))) from error
    return OpenedBatch(
        signer.name, parsed.key_id, batch_id, batch.not_after_s, tuple(operations), batch.operations, raw
    )


class RefusedBatch(Exception):
    """A batch of a known sender that cannot be decoded."""

    def __init__(self, sender: str, batch_id: bytes, violation: RuleViolation) -> None:
        super().__init__(str(violation))
        self.sender = sender
        self.batch_id = batch_id
        self.violation = violation


def _introduced(parsed: envelope.Envelope, charter: Charter) -> Signer | None:
    """Who a batch of an unknown key says it comes from: a party's first batch carries its own registration first.

    Only a registrar's signature is believed here, and only a small batch is looked into, so an unknown sender can make
    nobody work for more than that one check.
    """
    if len(parsed.raw) > MAX_INTRODUCTION_BYTES:
        return None
    first = decode_operation(Batch.from_payload(parsed.payload).operations[0])
    if not isinstance(first, Register):
        return None
    statement = envelope.open_envelope(
        first.statement, charter.ledger, charter.registrars.get, charter.verifies
    ).message
    if not isinstance(statement, Registration):
        return None
    key = public_key_from_cose(statement.key)
    return Signer(statement.party, key) if key.key_id == parsed.key_id else None


def party_signer(state: State, key_id: bytes) -> Signer | None:
    """The registered party with that key, None if there is none or the key is revoked."""
    return _signer(state, key_id, KeyHolder.PARTY)


def meter_signer(state: State, key_id: bytes) -> Signer | None:
    """The admitted device whose meter has that key, None if there is none or the key is revoked."""
    return _signer(state, key_id, KeyHolder.DEVICE)


def _signer(state: State, key_id: bytes, holder: KeyHolder) -> Signer | None:
    row: KeyRow | None = state.get((KEY, key_id))
    # What a revoked key signed is as good as unsigned, since anybody may have that key.
    if row is None or row.holder != holder or row.revoked:
        return None
    return Signer(row.name, public_key_from_cose(row.cose_key))


_Statement = TypeVar("_Statement", bound=Message)


def open_statement(
    raw: bytes, charter: Charter, lookup: envelope.KeyLookup, kind: type[_Statement]
) -> tuple[_Statement, Opened]:
    """Open a sealed statement inside an operation. Raises ProtocolError, also if it is another kind of message."""
    opened = envelope.open_envelope(raw, charter.ledger, lookup, charter.verifies)
    if not isinstance(opened.message, kind):
        raise MalformedMessage("statement", f"a sealed {kind.__name__}")
    return opened.message, opened
