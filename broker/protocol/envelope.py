"""The one envelope: COSE_Sign1 (RFC 9052 section 4.2) over deterministic CBOR.

Protected header: {1: algorithm, 4: key id, 16: type}; the type (RFC 9596) is the CoAP content format 65000 + message
type, from the range that is reserved for experiments. Unprotected header: empty. `external_aad` is the CBOR array
[message type, ledger id, sender]: not the topic or the receiver, so that ledger nodes, bridges and a consumer's next
broker can verify a message too. The sender is not sent; it is whoever the key id is registered for.

A message's id is the SHA-256 of its Sig_structure (protected header, aad and payload), not of the signature: of ECDSA
signatures there is more than one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Final, NamedTuple

from broker.protocol import cbor
from broker.protocol.errors import BadSignature, MalformedMessage, UnknownKey
from broker.protocol.keys import KEY_ID_BYTES, SIGNATURE_BYTES, Algorithm, PrivateKey, PublicKey
from broker.protocol.messages import MESSAGE_CLASSES, Message, MessageType

CONTENT_FORMAT_BASE: Final = 65_000
_HEAD: Final = b"\xd2\x84"  # tag 18, array of four
_EMPTY_MAP: Final = b"\xa0"
_SIGNATURE_HEAD: Final = cbor.byte_string_head(SIGNATURE_BYTES)
_SIG_CONTEXT: Final = b"\x84\x6aSignature1"


class Envelope(NamedTuple):
    """A parsed, not yet verified message. `raw` is exactly what came, and what is stored and sent on."""

    raw: bytes
    message_type: MessageType
    algorithm: Algorithm
    key_id: bytes
    protected: bytes
    payload: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Signer:
    """A registered sender: the name that stands in `external_aad`, and its key."""

    name: str
    key: PublicKey


@dataclass(frozen=True, slots=True)
class Opened:
    """A verified message, who sent it, its id, its bytes, and the key that it was verified with."""

    message: Message
    sender: str
    message_id: bytes
    raw: bytes
    key_id: bytes


KeyLookup = Callable[[bytes], Signer | None]
"""From a key id to the sender that it is registered for, or None."""

SignatureCheck = Callable[[PublicKey, bytes, bytes], bool]
"""Whether a key's signature of a message holds, as `PublicKey.verifies` says: something that was told so before may
answer in its place."""


def seal(message: Message, key: PrivateKey, ledger: str, sender: str) -> bytes:
    """Sign a message. The same message, key, ledger and sender always give the same bytes."""
    protected = _protected_header(message.TYPE, key.public.algorithm, key.public.key_id)
    payload = _as_byte_string(message.to_payload())
    signature = key.sign(_signed_head(protected, message.TYPE, ledger, sender) + payload)
    return b"".join((_HEAD, _as_byte_string(protected), _EMPTY_MAP, payload, _SIGNATURE_HEAD, signature))


def assemble(
    message_type: MessageType, key: PublicKey, ledger: str, sender: str, payload: bytes, signature: bytes
) -> tuple[bytes, bytes]:
    """A sealed message put together again from its parts, and what its signature is of; nothing is checked."""
    protected = _protected_header(message_type, key.algorithm, key.key_id)
    content = _as_byte_string(payload)
    raw = b"".join((_HEAD, _as_byte_string(protected), _EMPTY_MAP, content, _SIGNATURE_HEAD, signature))
    return raw, _signed_head(protected, message_type, ledger, sender) + content


def sealed_id(raw: bytes, ledger: str, sender: str) -> bytes:
    """The id of a message that this process sealed or verified before."""
    envelope = parse(raw)
    return message_id(envelope, ledger, sender)


def is_sealed(raw: bytes) -> bool:
    """True if these bytes begin as every sealed message does."""
    return raw.startswith(_HEAD)


def parse(raw: bytes) -> Envelope:
    """Take an envelope apart without trusting it. Raises MalformedMessage.

    The size is held against the limit of the type that the header claims; the encoding must be the deterministic one.
    """
    if len(raw) > _LARGEST:
        raise MalformedMessage("envelope", f"at most {_LARGEST} bytes, got {len(raw)}")
    if raw[:2] != _HEAD:
        raise MalformedMessage("envelope", "a tagged COSE_Sign1")
    # Read by hand: there is one valid encoding only, and a stranger's bytes build no objects before they are verified.
    protected, at = cbor.read_byte_string(raw, len(_HEAD), "envelope protected header")
    if raw[at : at + 1] != _EMPTY_MAP:
        raise MalformedMessage("envelope unprotected header", "an empty map")
    payload, at = cbor.read_byte_string(raw, at + 1, "envelope payload")
    signature, at = cbor.read_byte_string(raw, at, "envelope signature")
    if len(signature) != SIGNATURE_BYTES:
        raise MalformedMessage("envelope signature", f"{SIGNATURE_BYTES} bytes")
    if at != len(raw):
        raise MalformedMessage("envelope", "no trailing bytes")
    message_type, algorithm, key_id = _read_protected(protected)
    limit = MESSAGE_CLASSES[message_type].MAX_BYTES
    if len(raw) > limit:
        raise MalformedMessage(message_type.name.lower(), f"at most {limit} bytes, got {len(raw)}")
    return Envelope(raw, message_type, algorithm, key_id, protected, payload, signature)


def message_id(envelope: Envelope, ledger: str, sender: str) -> bytes:
    """The 32-byte id of the message inside."""
    return sha256(to_be_signed(envelope, ledger, sender)).digest()


def verify(envelope: Envelope, signer: Signer, ledger: str, verifies: SignatureCheck = PublicKey.verifies) -> bytes:
    """Check the signature and return the message id. Raises BadSignature."""
    message = to_be_signed(envelope, ledger, signer.name)
    key = signer.key
    if envelope.algorithm is not key.algorithm or not verifies(key, envelope.signature, message):
        raise BadSignature(signer.name, envelope.message_type.name.lower())
    return sha256(message).digest()


def open_envelope(raw: bytes, ledger: str, lookup: KeyLookup, verifies: SignatureCheck = PublicKey.verifies) -> Opened:
    """Parse, look up the sender, verify and decode. Raises MalformedMessage, UnknownKey or BadSignature.

    The signature is checked before the payload is decoded, so that only registered senders reach the decoder.
    """
    envelope = parse(raw)
    signer = lookup(envelope.key_id)
    if signer is None:
        raise UnknownKey(envelope.key_id)
    identity = verify(envelope, signer, ledger, verifies)
    message = MESSAGE_CLASSES[envelope.message_type].from_payload(envelope.payload)
    return Opened(message, signer.name, identity, raw, envelope.key_id)


@lru_cache(maxsize=4_096)
def _protected_header(message_type: MessageType, algorithm: Algorithm, key_id: bytes) -> bytes:
    return cbor.encode({1: int(algorithm), 4: key_id, 16: CONTENT_FORMAT_BASE + message_type})


@lru_cache(maxsize=65_536)
def _read_protected(protected: bytes) -> tuple[MessageType, Algorithm, bytes]:
    header = cbor.decode(protected, "protected header", 64)
    if type(header) is not dict or list(header) != [1, 4, 16]:
        raise MalformedMessage("protected header", "{1: algorithm, 4: key id, 16: type}")
    try:
        algorithm = Algorithm(header[1])
        message_type = MessageType(header[16] - CONTENT_FORMAT_BASE)
    except (ValueError, TypeError) as error:
        raise MalformedMessage("protected header", "a known algorithm and message type") from error
    if type(header[4]) is not bytes or len(header[4]) != KEY_ID_BYTES:
        raise MalformedMessage("protected header", f"a key id of {KEY_ID_BYTES} bytes")
    # In Python True and 1.0 equal 1, so only the bytes themselves say that no other type stood in for an integer.
    if protected != _protected_header(message_type, algorithm, header[4]):
        raise MalformedMessage("protected header", "integers for algorithm, labels and type")
    return message_type, algorithm, header[4]


@lru_cache(maxsize=65_536)
def _signed_head(protected: bytes, message_type: MessageType, ledger: str, sender: str) -> bytes:
    """The Sig_structure up to the payload: the same for all messages of one kind of one sender."""
    return _sig_head(protected, cbor.encode((int(message_type), ledger, sender)))


def signature_structure(protected: bytes, external_aad: bytes, payload: bytes) -> bytes:
    """What a COSE_Sign1 signs (RFC 9052 section 4.4), for the few that are no messages."""
    return _sig_head(protected, external_aad) + _as_byte_string(payload)


def _sig_head(protected: bytes, external_aad: bytes) -> bytes:
    return _SIG_CONTEXT + _as_byte_string(protected) + _as_byte_string(external_aad)


def to_be_signed(envelope: Envelope, ledger: str, sender: str) -> bytes:
    """The Sig_structure of RFC 9052 section 4.4: what a signature is made of and checked against."""
    head = _signed_head(envelope.protected, envelope.message_type, ledger, sender)
    return head + _as_byte_string(envelope.payload)


def _as_byte_string(content: bytes) -> bytes:
    return cbor.byte_string_head(len(content)) + content


_LARGEST: Final = max(message_class.MAX_BYTES for message_class in MESSAGE_CLASSES.values())
