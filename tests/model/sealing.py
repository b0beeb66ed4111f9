"""What was said in the model's words, as the bytes that a ledger takes."""

from functools import lru_cache

from support.ledger_world import LEDGER

from broker.ledger.operations import (
    Admit,
    Correct,
    CorrectDemand,
    EndMandate,
    Issue,
    MandateOp,
    Operation,
    Register,
    ReturnedSlice,
    RevokeKey,
    RotateKey,
    SetValidator,
    Transfer,
    encode_operation,
)
from broker.protocol import envelope
from broker.protocol.messages import Batch
from model.ledger_model import DemandCorrection, Move, Said, SaidBatch, Say, SayTogether, Signed

_SAY = {
    "register": Register,
    "admit": Admit,
    "mandate": MandateOp,
    "end_mandate": EndMandate,
    "issue": Issue,
    "correct": Correct,
    "rotate_key": RotateKey,
    "revoke_key": RevokeKey,
}


@lru_cache(maxsize=4_096)
def sealed(signed: Signed) -> bytes:
    """The envelope of a statement."""
    return envelope.seal(signed.message, signed.key, LEDGER, signed.sender)


def operation_of(said: Said) -> Operation:
    """The ledger's operation."""
    if isinstance(said, Say):
        return _SAY[said.code](sealed(said.signed))
    if isinstance(said, SayTogether):
        return SetValidator(tuple(sealed(signed) for signed in said.signed))
    if isinstance(said, Move):
        order = None if said.order is None else sealed(said.order)
        return Transfer(said.asset, said.from_wh, said.to_wh, said.sender, said.receiver, said.price, order)
    if isinstance(said, DemandCorrection):
        returned = tuple(ReturnedSlice(*each) for each in said.returned)
        return CorrectDemand(said.pseudonym, said.start_s, said.revision, said.demanded_wh, said.commitment, returned)
    return said


def sealed_batch(batch: SaidBatch) -> bytes:
    """The batch as its sender puts it on the wire."""
    operations = tuple(encode_operation(operation_of(said)) for said in batch.operations)
    return envelope.seal(Batch(batch.not_after_s, operations), batch.key, LEDGER, batch.sender)
