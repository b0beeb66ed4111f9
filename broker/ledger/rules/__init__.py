"""The ledger's rules: the only place where ledger state changes. Pure; every engine and the verifier call it.

`apply_batch` applies an opened batch to an overlay. Each guard is one `if` that raises Refused with a Fault of its own;
the comment above it says why it is there. A refused batch has changed nothing, because the caller drops the overlay.

The invariant behind it all, for every asset and for every source and interval, checked after each batch:
issued = held + delivered + withdrawn + expired.

    step.py         what every rule works with            books.py       slices, totals, who holds what
    parties.py      parties, devices, mandates            keys.py        rotated and revoked keys
    validators.py   who signs blocks                      generation.py  issue and correct
    transfer.py     transfer and void                     delivery.py    deliver and correct_demand
    closing.py      close and expiry
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from broker.ledger.faults import Fault, RuleViolation
from broker.ledger.opening import Charter, OpenedBatch
from broker.ledger.operations import (
    Admit,
    Close,
    Correct,
    CorrectDemand,
    Deliver,
    EndMandate,
    Issue,
    MandateOp,
    Register,
    RevokeKey,
    RotateKey,
    SetValidator,
    Transfer,
    Void,
)
from broker.ledger.rules.books import check_books
from broker.ledger.rules.closing import close
from broker.ledger.rules.delivery import correct_demand, deliver
from broker.ledger.rules.generation import correct, issue
from broker.ledger.rules.keys import is_key_of, require_serving, revoke_key, rotate_key
from broker.ledger.rules.parties import admit, end_mandate, mandate, register
from broker.ledger.rules.step import Refused, Step, clock_of, expired_to
from broker.ledger.rules.transfer import transfer, void
from broker.ledger.rules.validators import set_validator, validators_now
from broker.ledger.state import APPLIED, DEMAND, KEY, PARTY, AppliedRow, Key, KeyRow, Overlay, PartyRow
from broker.protocol.errors import ProtocolError
from broker.protocol.messages import KeyHolder, Role

__all__ = ["apply_batch", "keys_read", "validators_now"]


def apply_batch(overlay: Overlay, charter: Charter, batch: OpenedBatch) -> None:
    """Apply a whole batch, or raise RuleViolation; the caller then drops the overlay.

    Raises LedgerInvariantBroken if the books do not balance afterwards.
    """
    clock_s = clock_of(overlay, batch.sender)
    step = Step(overlay, charter, batch.sender, expired_to_s=expired_to(charter, clock_s))
    applied_key = (APPLIED, batch.sender, batch.not_after_s, batch.batch_id)
    # A party's first batch begins with its own registration, so there the sender is judged after the first operation.
    introduces = isinstance(batch.operations[0], Register)
    index = None
    try:
        _require_new(step, batch, clock_s, applied_key)
        if not introduces:
            _judge_sender(step, batch, clock_s)
        for index, operation in enumerate(batch.operations):  # noqa: B007
            _RULES[type(operation)](step, operation)
            if introduces:
                introduces = False
                _judge_sender(step, batch, clock_s)
    except Refused as refused:
        raise RuleViolation(index, refused.code, refused.reason) from None
    except ProtocolError as error:
        # A statement inside that is malformed, of an unknown or revoked key, or badly signed; the text says which.
        raise RuleViolation(index, Fault.STATEMENT, str(error)) from error

    # What is past its limit at the end of this very batch is refused as expired from now on and need not be kept.
    if batch.not_after_s > clock_of(overlay, batch.sender):
        overlay.put(applied_key, AppliedRow())
    check_books(overlay)


def keys_read(batch: OpenedBatch) -> list[Key]:
    """The keys of rows that are likely cold when this batch is applied, for a store to read in one go."""
    return [
        (DEMAND, item.start_s, item.pseudonym)
        for item in batch.operations
        if isinstance(item, (Deliver, CorrectDemand))
    ]


def _require_new(step: Step, batch: OpenedBatch, clock_s: int, applied_key: Key) -> None:
    # The submitter itself set this limit in market time, so that a batch which was lost for long does no late harm.
    if batch.not_after_s <= clock_s:
        raise Refused(Fault.EXPIRED, f"not_after_s {batch.not_after_s} is past: {batch.sender} closed up to {clock_s}")
    # Resends are normal; the second copy must change nothing.
    if step.overlay.get(applied_key) is not None:
        raise Refused(Fault.ALREADY_APPLIED, "this batch has been applied before; look for its block")


def _judge_sender(step: Step, batch: OpenedBatch, clock_s: int) -> None:
    """Whether the sender may submit with that key, and as what."""
    row: KeyRow | None = step.overlay.get((KEY, batch.key_id))
    # Only admitted parties write; with a key that counts now, whatever was when the batch came in.
    if row is None or row.revoked or not is_key_of(step.overlay, batch.key_id, KeyHolder.PARTY, batch.sender):
        raise Refused(Fault.NOT_REGISTERED, f"{batch.sender} is not registered with this key")
    party: PartyRow = step.overlay.get((PARTY, batch.sender))
    step.is_broker = party.role == Role.BROKER
    # A batch is of no single interval; without a market clock there is no grace that could end.
    require_serving(step.overlay, batch.key_id, 0, clock_s if step.is_broker else row.grace_until_s or 0)


_RULES: Final[Mapping[type, Callable[[Step, Any], None]]] = {
    Register: register,
    Admit: admit,
    MandateOp: mandate,
    EndMandate: end_mandate,
    Issue: issue,
    Transfer: transfer,
    Deliver: deliver,
    Close: close,
    Void: void,
    Correct: correct,
    CorrectDemand: correct_demand,
    RotateKey: rotate_key,
    RevokeKey: revoke_key,
    SetValidator: set_validator,
}
