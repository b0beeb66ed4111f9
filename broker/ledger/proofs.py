"""Proofs to hand over: small CBOR files that anybody checks with the ledger's trust file and nothing else. Pure.

`OperationsProof`: these operations stand on the ledger, at these places, under a signed checkpoint. However many they
are, nodes that their paths share are in it once; a proof of a single operation also carries its COSE Receipt.
`ConsistencyProof`: one signed checkpoint goes on from an earlier one; nothing that the earlier one covers was changed.

proof.cddl holds their shape, docs/ledger.md what they say and what they do not.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Final, NamedTuple

from broker.ledger.merkle import leaf_hash, root_from_multiproof
from broker.ledger.receipts import (
    MAX_RECEIPT_BYTES,
    ProofFailed,
    SignedRoot,
    verify_checkpoint,
    verify_consistency_receipt,
    verify_inclusion_receipt,
    verify_signed_root,
)
from broker.ledger.trust import Trust
from broker.protocol import cbor
from broker.protocol.codec import Bytes, Field, Many, Name, Row, Unsigned, decode_fields, encode_fields
from broker.protocol.errors import MalformedMessage
from broker.protocol.keys import SIGNATURE_BYTES
from broker.protocol.limits import (
    MAX_BATCH_BYTES,
    MAX_BATCH_OPERATIONS,
    MAX_BLOCK_BYTES,
    MAX_BROKER_MESSAGE_BYTES,
)
from broker.protocol.messages import HASH_BYTES, Checkpoint

MAX_PROOF_BYTES: Final = MAX_BLOCK_BYTES
"""As long as an entry of a page may be, so that a ledger can answer with a proof."""

MAX_OPERATIONS: Final = MAX_BATCH_OPERATIONS
"""Operations in one proof: as many as a batch has."""

_MAX_HASHES: Final = 65_536
_OPERATIONS_KIND: Final = 1
_CONSISTENCY_KIND: Final = 2
_CHECKPOINT: Final = Bytes(1, MAX_BROKER_MESSAGE_BYTES)


class ProvenOperation(NamedTuple):
    """An operation's bytes and its place among all operations of the ledger, counted from 0."""

    leaf: int
    operation: bytes


@dataclass(frozen=True, slots=True)
class OperationsProof:
    """Operations in the order of their places, the hashes of `merkle.multiproof`, a sealed Checkpoint, and the
    signature of its root that receipts carry: it names the ledger by the hash of its genesis.
    """

    ledger: str
    operations: tuple[ProvenOperation, ...]
    hashes: tuple[bytes, ...]
    checkpoint: bytes
    root: SignedRoot
    receipt: bytes | None = None
    """Of a single operation: its receipt (RFC 9942), for verifiers by others."""
    kind: int = _OPERATIONS_KIND

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "kind", Unsigned(_OPERATIONS_KIND, _OPERATIONS_KIND)),
        Field(1, "ledger", Name()),
        Field(2, "operations", Many(Row((Unsigned(), Bytes(2, MAX_BATCH_BYTES)), ProvenOperation), MAX_OPERATIONS, 1)),
        Field(3, "hashes", Many(Bytes(HASH_BYTES, HASH_BYTES), _MAX_HASHES)),
        Field(4, "checkpoint", _CHECKPOINT),
        Field(5, "root", Row((Bytes(1, 512), Bytes(SIGNATURE_BYTES, SIGNATURE_BYTES)), SignedRoot)),
        Field(6, "receipt", Bytes(1, MAX_RECEIPT_BYTES), optional=True),
    )

    def to_bytes(self) -> bytes:
        return cbor.encode(encode_fields(self.FIELDS, self))

    def check(self, trust: Trust) -> tuple[Checkpoint, str]:
        """The checkpoint that holds all these operations, and the validator that signed it.

        Raises ProtocolError (ProofFailed, BadSignature, …) saying what does not hold.
        """
        _check_ledger(self.ledger, trust)
        checkpoint, _ = verify_checkpoint(self.checkpoint, trust)
        leaves = [(proven.leaf, leaf_hash(proven.operation)) for proven in self.operations]
        root = root_from_multiproof(leaves, checkpoint.tree_size, self.hashes)
        if root != checkpoint.root:
            raise ProofFailed(
                f"these operations and hashes do not lead to the root of the checkpoint of height {checkpoint.height}; "
                "an operation, its place, or the proof was changed"
            )
        validator = verify_signed_root(self.root, checkpoint.root, trust)
        if self.receipt is not None:
            self._check_receipt(self.receipt, checkpoint, trust)
        return checkpoint, validator

    def _check_receipt(self, receipt: bytes, checkpoint: Checkpoint, trust: Trust) -> None:
        first = self.operations[0]
        included = verify_inclusion_receipt(receipt, first.operation, trust)
        if (included.index, included.size, included.root) != (first.leaf, checkpoint.tree_size, checkpoint.root):
            raise ProofFailed("the receipt is of another operation or height than the proof around it")


@dataclass(frozen=True, slots=True)
class ConsistencyProof:
    """Two sealed Checkpoints and the receipt (RFC 9942) that the older one's tree begins the newer one's."""

    ledger: str
    older: bytes
    newer: bytes
    receipt: bytes
    kind: int = _CONSISTENCY_KIND

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "kind", Unsigned(_CONSISTENCY_KIND, _CONSISTENCY_KIND)),
        Field(1, "ledger", Name()),
        Field(2, "older", _CHECKPOINT),
        Field(3, "newer", _CHECKPOINT),
        Field(4, "receipt", Bytes(1, MAX_RECEIPT_BYTES)),
    )

    def to_bytes(self) -> bytes:
        return cbor.encode(encode_fields(self.FIELDS, self))

    def check(self, trust: Trust) -> tuple[Checkpoint, Checkpoint]:
        """The older and the newer checkpoint. Raises ProtocolError saying what does not hold."""
        _check_ledger(self.ledger, trust)
        older, _ = verify_checkpoint(self.older, trust)
        newer, _ = verify_checkpoint(self.newer, trust)
        proven = verify_consistency_receipt(self.receipt, older.root, trust)
        if (proven.first, proven.second, proven.root) != (older.tree_size, newer.tree_size, newer.root):
            raise ProofFailed("the receipt is about other trees than those of the two checkpoints")
        if older.height > newer.height:
            raise ProofFailed(f"height {older.height} is called the older one, but {newer.height} comes before it")
        return older, newer


Proof = OperationsProof | ConsistencyProof


def read_proof(raw: bytes) -> Proof:
    """Read a proof; nothing of it is believed yet. Raises MalformedMessage."""
    data: Any = cbor.decode(raw, "proof", MAX_PROOF_BYTES)
    kind = data.get(0) if type(data) is dict else None
    if kind == _OPERATIONS_KIND:
        _, ledger, operations, hashes, checkpoint, root, receipt = decode_fields(OperationsProof.FIELDS, data, "proof")
        if receipt is not None and len(operations) != 1:
            raise MalformedMessage("proof.receipt", "to stand only beside a single operation")
        return OperationsProof(ledger, operations, hashes, checkpoint, root, receipt)
    if kind == _CONSISTENCY_KIND:
        _, ledger, older, newer, receipt = decode_fields(ConsistencyProof.FIELDS, data, "proof")
        return ConsistencyProof(ledger, older, newer, receipt)
    raise MalformedMessage("proof", "a map that says 1 (operations) or 2 (consistency) under key 0")


def _check_ledger(ledger: str, trust: Trust) -> None:
    if ledger != trust.ledger:
        raise ProofFailed(f"it is a proof of ledger {ledger}, and the trust file is of {trust.ledger}")
