"""The certificate as a file: its fields, its bytes, and the signature of the broker that issued it. Pure.

The file is a tagged COSE_Sign1 like every message (`broker.protocol.envelope`): protected {1: algorithm, 4: key id,
16: type}, unprotected empty, aad [26, ledger, broker]. It is no message, because a year of half hours has megabytes.

It holds each fact once. What the ledger's operations say is not copied into it but told by the parts from which they
are built again (`evidence`): a Merkle proof then fails wherever a part is another one. Indices lead from slices to
`issues`, and from those to the `Admit` operations, in the order in which they stand.
"""

from dataclasses import dataclass
from hashlib import sha256
from typing import ClassVar, Final, NamedTuple

from broker.ledger.operations import Window
from broker.ledger.proofs import ProvenOperation
from broker.ledger.receipts import ProofFailed, SignedRoot
from broker.protocol import cbor
from broker.protocol.codec import (
    Bytes,
    Choice,
    Codec,
    Field,
    Many,
    Name,
    Row,
    Text,
    Unsigned,
    decode_fields,
    encode_fields,
)
from broker.protocol.envelope import CONTENT_FORMAT_BASE, signature_structure
from broker.protocol.errors import MalformedMessage
from broker.protocol.keys import KEY_ID_BYTES, SIGNATURE_BYTES, Algorithm, PrivateKey, PublicKey
from broker.protocol.limits import MAX_BATCH_BYTES, MAX_BROKER_MESSAGE_BYTES
from broker.protocol.messages import HASH_BYTES, NO_LINE, PSEUDONYM_BYTES, Quality
from broker.protocol.sources import Source

TYPE: Final = 26
"""The number by which its header and what is signed tell it from every message; no message has it."""

VERSION: Final = 1

MAX_BYTES: Final = 128 * 2**20
"""A year of quarter hours at the 2 kB that an interval may take has 70 MB."""

MAX_INTERVALS: Final = 366 * 96
_MAX_ISSUES: Final = 16 * MAX_INTERVALS
_MAX_OPERATIONS: Final = 65_536
_MAX_SLICES: Final = 1_024
_MAX_FACTORS: Final = 16

_TAGGED: Final = b"\xd2\x84"
_EMPTY_MAP: Final = b"\xa0"


class SignedDemand(NamedTuple):
    """What makes a Demand of this meter and interval, with the meter's signature; `sampled_s` is empty or two times."""

    revision: int
    energy_wh: int
    quality: Quality
    sampled_s: tuple[int, ...]
    signature: bytes


class SignedReading(NamedTuple):
    """What makes an Issue, or from revision 1 on a Correct, and its place on the ledger.

    `device` counts the Admit operations, `number` market intervals since the epoch, `key` the meter's keys: 0 is the
    one it was admitted with, each rotation adds one.
    """

    device: int
    number: int
    revision: int
    energy_wh: int
    quality: Quality
    sampled_s: tuple[int, ...]
    key: int
    signature: bytes
    leaf: int


class GivenSlice(NamedTuple):
    """Wh `[from_wh, to_wh)` of the asset of `issues[issue]`, for a line of the contract."""

    issue: int
    from_wh: int
    to_wh: int
    line: int


class Given(NamedTuple):
    """What makes a Deliver, and its place on the ledger; `area` counts the areas of the genesis."""

    leaf: int
    window: Window
    area: int
    slices: tuple[GivenSlice, ...]


class Withdrawn(NamedTuple):
    """A correction of the device's reading took the end of a slice: what begins at `from_wh` ends at `to_wh` now."""

    issue: int
    from_wh: int
    to_wh: int


class CertifiedInterval(NamedTuple):
    """One interval in which the ledger has a demand of the consumer. `number` counts intervals since the epoch.

    `demands`: as the ledger knew it first, then after each CorrectDemand.
    """

    number: int
    pseudonym: bytes
    demands: tuple[SignedDemand, ...]
    deliveries: tuple[Given, ...]
    withdrawn: tuple[Withdrawn, ...]


class TimedKey(NamedTuple):
    """The key of a UTC day (`at` counts days) or of an interval (`at` is its start)."""

    at: int
    key: bytes


class ClosingProof(NamedTuple):
    """That the last interval is closed: the Close among `operations`, and the path of its demand to that root."""

    operation: int
    demand: int
    path: tuple[bytes, ...]


class Factor(NamedTuple):
    """mg CO2-equivalent per kWh of a source, or of what is unmatched (0)."""

    source: int
    mg_per_kwh: int


class SourceTotal(NamedTuple):
    """Wh of one source in the period, and of those what was made in the very interval of its use."""

    source: Source
    energy_wh: int
    same_interval_wh: int


class Totals(NamedTuple):
    """The sums that the certificate states. `co2_mg` covers all but `without_factor_wh`."""

    demanded_wh: int
    delivered_wh: int
    same_interval_wh: int
    unmatched_wh: int
    by_source: tuple[SourceTotal, ...]
    co2_mg: int
    without_factor_wh: int


def _rows(maximum: int, into: type, *items: Codec) -> Many:
    return Many(Row(items, into), maximum)


_WH: Final = Unsigned()
_REVISION: Final = Unsigned(65_535)
_SIGNATURE: Final = Bytes(SIGNATURE_BYTES, SIGNATURE_BYTES)
_SAMPLED: Final = Many(Unsigned(), 2)
_KEY: Final = Bytes(32, 32)
_HASH: Final = Bytes(HASH_BYTES, HASH_BYTES)
_SLICES: Final = _rows(_MAX_SLICES, GivenSlice, Unsigned(), _WH, _WH, Unsigned(NO_LINE))


@dataclass(frozen=True, slots=True)
class Certificate:
    """All that it says and all that proves it; docs/certificates.md has every field and what it is worth.

    `[from_s, to_s)` is the period. `settled_s`: by the broker's word, the earliest market clock on which corrections of
    anything in it still depend. `hashes` are those of `merkle.multiproof`, one behind the other.
    """

    genesis: bytes
    broker: str
    meter: str
    meter_key: bytes
    from_s: int
    to_s: int
    issued_s: int
    checkpoint: bytes
    root: SignedRoot
    hashes: bytes
    operations: tuple[ProvenOperation, ...]
    issues: tuple[SignedReading, ...]
    intervals: tuple[CertifiedInterval, ...]
    day_keys: tuple[TimedKey, ...]
    interval_keys: tuple[TimedKey, ...]
    closing: ClosingProof
    settled_s: int
    factors: tuple[Factor, ...]
    factors_source: str
    totals: Totals
    version: int = VERSION

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "version", Unsigned(VERSION, VERSION)),
        Field(1, "genesis", Bytes(1, MAX_BROKER_MESSAGE_BYTES)),
        Field(2, "broker", Name()),
        Field(3, "meter", Name()),
        Field(4, "meter_key", Bytes(40, 128)),
        Field(5, "from_s", Unsigned()),
        Field(6, "to_s", Unsigned()),
        Field(7, "issued_s", Unsigned()),
        Field(8, "checkpoint", Bytes(1, MAX_BROKER_MESSAGE_BYTES)),
        Field(9, "root", Row((Bytes(1, 512), _SIGNATURE), SignedRoot)),
        Field(10, "hashes", Bytes(0, MAX_BYTES)),
        Field(11, "operations", _rows(_MAX_OPERATIONS, ProvenOperation, Unsigned(), Bytes(2, MAX_BATCH_BYTES))),
        Field(
            12,
            "issues",
            _rows(
                _MAX_ISSUES,
                SignedReading,
                Unsigned(),
                Unsigned(),
                _REVISION,
                _WH,
                Choice(Quality),
                _SAMPLED,
                Unsigned(255),
                _SIGNATURE,
                Unsigned(),
            ),
        ),
        Field(
            13,
            "intervals",
            _rows(
                MAX_INTERVALS,
                CertifiedInterval,
                Unsigned(),
                Bytes(PSEUDONYM_BYTES, PSEUDONYM_BYTES),
                _rows(256, SignedDemand, _REVISION, _WH, Choice(Quality), _SAMPLED, _SIGNATURE),
                _rows(1_024, Given, Unsigned(), Choice(Window), Unsigned(255), _SLICES),
                _rows(65_536, Withdrawn, Unsigned(), _WH, _WH),
            ),
        ),
        Field(14, "day_keys", _rows(367, TimedKey, Unsigned(), _KEY)),
        Field(15, "interval_keys", _rows(MAX_INTERVALS, TimedKey, Unsigned(), _KEY)),
        Field(16, "closing", Row((Unsigned(), Unsigned(), Many(_HASH, 64)), ClosingProof)),
        Field(17, "settled_s", Unsigned()),
        Field(18, "factors", _rows(_MAX_FACTORS, Factor, Unsigned(max(Source)), Unsigned())),
        Field(19, "factors_source", Text(400)),
        Field(
            20,
            "totals",
            Row(
                (
                    _WH,
                    _WH,
                    _WH,
                    _WH,
                    _rows(len(Source), SourceTotal, Choice(Source), _WH, _WH),
                    Unsigned(),
                    _WH,
                ),
                Totals,
            ),
        ),
    )


@dataclass(frozen=True, slots=True)
class SealedCertificate:
    """A certificate with the signature that it came with; `check_signature` says whether it holds."""

    certificate: Certificate
    protected: bytes
    payload: bytes
    signature: bytes
    key_id: bytes

    def certificate_id(self, ledger: str) -> bytes:
        """What identifies it, as a message is identified: the hash of all that is signed."""
        return sha256(_to_be_signed(self.protected, ledger, self.certificate.broker, self.payload)).digest()

    def check_signature(self, key: PublicKey, ledger: str) -> None:
        """Raises ProofFailed unless the broker's key signed exactly this."""
        signed = _to_be_signed(self.protected, ledger, self.certificate.broker, self.payload)
        if self.protected != _protected(key) or not key.verifies(self.signature, signed):
            raise ProofFailed(
                f"the signature of {self.certificate.broker} does not fit: the certificate was changed after it was"
                " signed, or somebody else made it"
            )


def seal_certificate(certificate: Certificate, key: PrivateKey, ledger: str) -> bytes:
    """The file: the certificate signed by its broker."""
    payload = cbor.encode(encode_fields(Certificate.FIELDS, certificate))
    protected = _protected(key.public)
    signature = key.sign(_to_be_signed(protected, ledger, certificate.broker, payload))
    return b"".join(
        (_TAGGED, _byte_string(protected), _EMPTY_MAP, _byte_string(payload), _byte_string(signature)),
    )


def read_certificate(raw: bytes) -> SealedCertificate:
    """Take a file apart; nothing of it is believed yet. Raises MalformedMessage naming what is wrong."""
    where = "certificate"
    if len(raw) > MAX_BYTES:
        raise MalformedMessage(where, f"at most {MAX_BYTES} bytes, got {len(raw)}")
    if raw[:2] != _TAGGED:
        raise MalformedMessage(where, "a tagged COSE_Sign1, as `energy-broker certificate issue` writes it")
    protected, at = cbor.read_byte_string(raw, 2, f"{where} protected header")
    if raw[at : at + 1] != _EMPTY_MAP:
        raise MalformedMessage(f"{where} unprotected header", "an empty map")
    payload, at = cbor.read_byte_string(raw, at + 1, f"{where} payload")
    signature, at = cbor.read_byte_string(raw, at, f"{where} signature")
    if at != len(raw) or len(signature) != SIGNATURE_BYTES:
        raise MalformedMessage(where, f"a signature of {SIGNATURE_BYTES} bytes at its end")
    key_id = _key_id(protected)
    values = decode_fields(Certificate.FIELDS, cbor.decode(payload, where, MAX_BYTES), where)
    return SealedCertificate(Certificate(*values[1:]), protected, payload, signature, key_id)


def _to_be_signed(protected: bytes, ledger: str, broker: str, payload: bytes) -> bytes:
    return signature_structure(protected, cbor.encode((TYPE, ledger, broker)), payload)


def _protected(key: PublicKey) -> bytes:
    return _header(key.algorithm, key.key_id)


def _header(algorithm: Algorithm, key_id: bytes) -> bytes:
    return cbor.encode({1: int(algorithm), 4: key_id, 16: CONTENT_FORMAT_BASE + TYPE})


def _key_id(protected: bytes) -> bytes:
    header = cbor.decode(protected, "certificate protected header", 64)
    key_id = header.get(4) if type(header) is dict else None
    # Compared as bytes: for each key there is one header, and nothing beside it is left to read.
    if (
        type(key_id) is not bytes
        or len(key_id) != KEY_ID_BYTES
        or protected not in [_header(algorithm, key_id) for algorithm in Algorithm]
    ):
        raise MalformedMessage(
            "certificate protected header", f"{{1: algorithm, 4: key id, 16: {CONTENT_FORMAT_BASE + TYPE}}}"
        )
    return key_id


def _byte_string(content: bytes) -> bytes:
    return cbor.byte_string_head(len(content)) + content
