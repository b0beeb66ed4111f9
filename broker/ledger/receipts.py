"""COSE Receipts (RFC 9942) over the ledger's Merkle tree, and the signed head that they are made from. Pure.

A receipt is a tagged COSE_Sign1 (RFC 9052) without a payload: what is signed is the root of the tree, and the proof in
the unprotected header leads to it. So one signature for each head serves all receipts under it, and whoever has a copy
of the ledger can make receipts for every operation without a key.

    18([ << {1: algorithm, 4: key id, 15: {1: issuer}, 395: 1} >>, {396: {-1: [<< [size, index, path] >>]}}, nil, sig ])

395: 1 is RFC9162_SHA256; under 396 stand inclusion proofs (-1) or consistency proofs (-2: [first, second, path]). The
RFC leaves further protected labels to profiles: here the key id, and as CWT claims (RFC 9597) the issuer, which names
the ledger by the hash of its genesis. So a receipt of another ledger fails even if the same key serves both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from broker.ledger.merkle import leaf_hash, root_from_consistency, root_from_inclusion
from broker.ledger.trust import Trust
from broker.protocol import cbor, envelope
from broker.protocol.codec import Bytes, Many, Row, Unsigned
from broker.protocol.errors import MalformedMessage, ProtocolError
from broker.protocol.keys import SIGNATURE_BYTES, PrivateKey, PublicKey
from broker.protocol.limits import MAX_BROKER_MESSAGE_BYTES
from broker.protocol.messages import HASH_BYTES, Checkpoint

MAX_PATH: Final = 64
"""Hashes of one path: trees of more than 2^53 leaves do not exist here. A consistency path may have one more."""

MAX_RECEIPT_BYTES: Final = 4_096

_TAG_18: Final = b"\xd2"
_ALGORITHM: Final = 1
_KEY_ID: Final = 4
_CWT_CLAIMS: Final = 15
_ISSUER: Final = 1
_STRUCTURE: Final = 395
_PROOFS: Final = 396
_RFC9162_SHA256: Final = 1
_INCLUSION: Final = -1
_CONSISTENCY: Final = -2

_PROOF: Final = Row((Unsigned(), Unsigned(), Many(Bytes(HASH_BYTES, HASH_BYTES), MAX_PATH + 1)))
"""Of inclusion: tree size, leaf index, path. Of consistency: smaller size, larger size, path."""

_SIGNED_HEAD: Final = Row((Bytes(1, MAX_BROKER_MESSAGE_BYTES), Bytes(1, 512), Bytes(SIGNATURE_BYTES, SIGNATURE_BYTES)))


class ProofFailed(ProtocolError):
    """A proof, receipt or signed head that does not hold. The text says why and what to look at."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class SignedRoot:
    """A validator's signature of a root, as it stands in every receipt under that root."""

    protected: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class SignedHead:
    """A head as a validator signed it: the sealed Checkpoint, and the signature for receipts. Stored with the head."""

    checkpoint: bytes
    root: SignedRoot

    def to_bytes(self) -> bytes:
        return cbor.encode([self.checkpoint, self.root.protected, self.root.signature])

    @classmethod
    def from_bytes(cls, raw: bytes) -> "SignedHead":
        """Raises MalformedMessage."""
        data = cbor.decode(raw, "signed head", 2 * MAX_BROKER_MESSAGE_BYTES)
        checkpoint, protected, signature = _SIGNED_HEAD.decode(data, "signed head")
        return cls(checkpoint, SignedRoot(protected, signature))


@dataclass(frozen=True, slots=True)
class Included:
    """What a receipt of inclusion proves: the operation stands at `index` in the tree of `size` with this root."""

    size: int
    index: int
    root: bytes
    validator: str


@dataclass(frozen=True, slots=True)
class Consistent:
    """What a receipt of consistency proves: the tree of `first` leaves begins the one of `second` with this root."""

    first: int
    second: int
    root: bytes
    validator: str


# --- Making


def sign_head(checkpoint: Checkpoint, key: PrivateKey, ledger: str, validator: str, issuer: str) -> SignedHead:
    """Sign a head, as message and as root; `issuer` is `trust.issuer_of` the ledger."""
    sealed = envelope.seal(checkpoint, key, ledger, validator)
    return SignedHead(sealed, sign_root(checkpoint.root, key, issuer))


def sign_root(root: bytes, key: PrivateKey, issuer: str) -> SignedRoot:
    """Sign a root for the receipts under it."""
    protected = _protected(key.public, issuer)
    return SignedRoot(protected, key.sign(envelope.signature_structure(protected, b"", root)))


def inclusion_receipt(signed: SignedRoot, index: int, size: int, path: Sequence[bytes]) -> bytes:
    """The receipt of the operation at `index`; `path` from `merkle.inclusion_proof` in the tree that was signed."""
    return _receipt(signed, _INCLUSION, cbor.encode([size, index, list(path)]))


def consistency_receipt(signed: SignedRoot, first: int, second: int, path: Sequence[bytes]) -> bytes:
    """The receipt that the tree of `first` leaves begins the signed one of `second` (`merkle.consistency_proof`)."""
    return _receipt(signed, _CONSISTENCY, cbor.encode([first, second, list(path)]))


# --- Checking


def verify_inclusion_receipt(raw: bytes, operation: bytes, trust: Trust) -> Included:
    """Check that a validator of this very ledger signed a tree which holds `operation`. Raises ProofFailed.

    Raises MalformedMessage for bytes that are no receipt of inclusion. Exactly one proof is accepted in a receipt.
    """
    protected, proof, signature = _opened(raw, _INCLUSION)
    size, index, path = proof
    root = root_from_inclusion(leaf_hash(operation), index, size, path)
    if root is None:
        raise ProofFailed(f"the receipt's path is none for leaf {index} in a tree of {size}")
    validator = verify_signed_root(SignedRoot(protected, signature), root, trust)
    return Included(size, index, root, validator)


def verify_consistency_receipt(raw: bytes, first_root: bytes, trust: Trust) -> Consistent:
    """Check that a validator of this very ledger signed a tree which begins with the one of `first_root`.

    Raises ProofFailed, and MalformedMessage for bytes that are no receipt of consistency.
    """
    protected, proof, signature = _opened(raw, _CONSISTENCY)
    first, second, path = proof
    root = root_from_consistency(first, second, first_root, path)
    if root is None:
        raise ProofFailed(f"the tree of {second} does not begin with the tree of {first} whose root was given")
    validator = verify_signed_root(SignedRoot(protected, signature), root, trust)
    return Consistent(first, second, root, validator)


def verify_signed_root(signed: SignedRoot, root: bytes, trust: Trust) -> str:
    """The validator of this ledger that signed `root`. Raises ProofFailed or MalformedMessage."""
    header: Any = cbor.decode(signed.protected, "receipt protected header", 512)
    key_id = header.get(_KEY_ID) if type(header) is dict else None
    validator = trust.validators.get(key_id) if type(key_id) is bytes else None
    if validator is None:
        raise ProofFailed(
            "the receipt is signed with a key that is no validator's in the trust file; it is of another ledger, "
            "or the trust file is older than this validator"
        )
    # Compared as bytes: there is one header that this validator writes for this ledger, and nothing is left to read.
    if signed.protected != _protected(validator.key, trust.issuer):
        raise ProofFailed(f"the receipt's header is not one of ledger {trust.ledger}; it is of another ledger")
    if not validator.key.verifies(signed.signature, envelope.signature_structure(signed.protected, b"", root)):
        raise ProofFailed(
            f"the signature of {validator.name} does not fit the root that operation and path lead to; "
            "one of the three was changed"
        )
    return validator.name


def verify_checkpoint(raw: bytes, trust: Trust) -> tuple[Checkpoint, str]:
    """A sealed checkpoint of this ledger and the validator that signed it. Raises ProtocolError."""
    opened = envelope.open_envelope(raw, trust.ledger, trust.validators.get)
    if not isinstance(opened.message, Checkpoint):
        raise MalformedMessage("checkpoint", f"a checkpoint, got a {opened.message.TYPE.name.lower()}")
    if opened.message.height < trust.height:
        raise ProofFailed(
            f"the checkpoint is of height {opened.message.height}, and the trust file says who signs from height"
            f" {trust.height} on; use an older trust file"
        )
    return opened.message, opened.sender


# --- Inside


def _protected(key: PublicKey, issuer: str) -> bytes:
    return cbor.encode(
        {
            _ALGORITHM: int(key.algorithm),
            _KEY_ID: key.key_id,
            _CWT_CLAIMS: {_ISSUER: issuer},
            _STRUCTURE: _RFC9162_SHA256,
        }
    )


def _receipt(signed: SignedRoot, kind: int, proof: bytes) -> bytes:
    return _TAG_18 + cbor.encode([signed.protected, {_PROOFS: {kind: [proof]}}, None, signed.signature])


def _opened(raw: bytes, kind: int) -> tuple[bytes, tuple[int, int, tuple[bytes, ...]], bytes]:
    """(protected header, proof, signature) of a receipt of that kind, nothing of it verified."""
    where = "receipt of inclusion" if kind == _INCLUSION else "receipt of consistency"
    if raw[:1] != _TAG_18:
        raise MalformedMessage(where, "a tagged COSE_Sign1")
    parts: Any = cbor.decode(raw[1:], where, MAX_RECEIPT_BYTES)
    if type(parts) is not list or len(parts) != 4 or type(parts[0]) is not bytes or type(parts[3]) is not bytes:
        raise MalformedMessage(where, "[protected, unprotected, nil, signature]")
    protected, unprotected, payload, signature = parts
    if payload is not None:
        raise MalformedMessage(where, "no payload: the root follows from the proof")
    proofs = unprotected.get(_PROOFS) if type(unprotected) is dict else None
    blobs = proofs.get(kind) if type(proofs) is dict else None
    if type(blobs) is not list or len(blobs) != 1 or type(blobs[0]) is not bytes:
        raise MalformedMessage(where, f"one proof under {_PROOFS}, {kind}")
    proof = _PROOF.decode(cbor.decode(blobs[0], where, MAX_RECEIPT_BYTES), where)
    # What is not signed must not say anything besides: written again, it is the same bytes.
    if raw != _receipt(SignedRoot(protected, signature), kind, blobs[0]):
        raise MalformedMessage(where, "nothing in its headers but what a receipt has")
    return protected, proof, signature
