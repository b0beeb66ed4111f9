"""CometBFT's commits, checked without CometBFT: validators with more than two thirds of the power signed this header.

The input is what a node's RPC answers to `/commit` and `/validators`. The header is hashed again (a Merkle tree over
its encoded fields), its `validators_hash` must be that of the given set, and each signature is checked over the vote
that the validator must have signed for it. What comes out is the header's `app_hash`, for which the whole network then
stands, and which our application sets.

A header of height h carries the app hash that the application had after block h - 1.

Sources: CometBFT v0.38 `spec/core/data_structures.md`, `spec/core/encoding.md`,
`proto/tendermint/types/canonical.proto`; `types/block.go` (Header.Hash), `types/validator_set.go` (Hash),
`types/vote.go` (VoteSignBytes). Pure.
"""

import base64
import binascii
import calendar
import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any, Final

from broker.ledger.merkle import leaf_hash, root_of
from broker.ledger.receipts import ProofFailed
from broker.protocol import cbor
from broker.protocol.errors import MalformedMessage
from broker.protocol.keys import SIGNATURE_BYTES, PublicKey, public_key_from_cose

MAX_VALIDATORS: Final = 1_000
MAX_POWER: Final = 2**60
"""CometBFT's own limit on the power of a whole set (`types.MaxTotalVotingPower`)."""

MAX_JSON_CHARACTERS: Final = 2**20

_PRECOMMIT: Final = 2
_ABSENT: Final = 1
_COMMIT: Final = 2
_NIL: Final = 3
_TIME: Final = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z")


@dataclass(frozen=True, slots=True)
class Validator:
    """One of a set, in the set's order (as the RPC gives it: by falling power, then by address)."""

    key: PublicKey
    raw_key: bytes
    """The 32 bytes of the Ed25519 key."""
    power: int

    @property
    def address(self) -> bytes:
        return sha256(self.raw_key).digest()[:20]


@dataclass(frozen=True, slots=True)
class CertifiedHeader:
    """A header that validators with `signed_power` of `total_power` signed. `time_s` is the median of their clocks."""

    chain_id: str
    height: int
    time_s: int
    app_hash: bytes
    header_hash: bytes
    next_validators_hash: bytes
    signed_power: int
    total_power: int


def validator(raw_key: bytes, power: int) -> Validator:
    """A validator by its Ed25519 key. Raises MalformedMessage."""
    if type(power) is not int or not 0 < power <= MAX_POWER:
        raise MalformedMessage("validator power", f"1 to {MAX_POWER}")
    return Validator(public_key_from_cose(cbor.encode({1: 1, -1: 6, -2: raw_key})), raw_key, power)


def read_validators(text: str) -> tuple[Validator, ...]:
    """The set in an answer to `/validators` that holds all of it (ask with `per_page=100`). Raises MalformedMessage."""
    result = _result(text, "validators")
    items = result.get("validators")
    if type(items) is not list or not 0 < len(items) <= MAX_VALIDATORS:
        raise MalformedMessage("validators", f"a list of 1 to {MAX_VALIDATORS}")
    if result.get("total") != str(len(items)):
        raise MalformedMessage("validators", "the whole set in one answer")
    found = []
    for item in items:
        key = _entry(item, "pub_key", dict)
        if key.get("type") != "tendermint/PubKeyEd25519":
            raise MalformedMessage("validators", "Ed25519 keys")
        found.append(validator(_base64(key.get("value"), 32), _integer(item, "voting_power")))
    return tuple(found)


def validators_hash(validators: Sequence[Validator]) -> bytes:
    """What headers name the set by."""
    return root_of([leaf_hash(_field(1, _field(1, one.raw_key)) + _number(2, one.power)) for one in validators])


def verify_commit(text: str, validators: Sequence[Validator], chain_id: str) -> CertifiedHeader:
    """Check an answer to `/commit` against a trusted set of validators and the chain that it must be of.

    Raises ProofFailed with the reason if it does not hold, MalformedMessage for an answer of another shape.
    """
    signed = _entry(_result(text, "commit"), "signed_header", dict)
    header, commit = _entry(signed, "header", dict), _entry(signed, "commit", dict)
    if header.get("chain_id") != chain_id:
        raise ProofFailed(f"the commit is of chain {header.get('chain_id')!r}, not of {chain_id}")
    if not 0 < len(validators) <= MAX_VALIDATORS or len({one.raw_key for one in validators}) != len(validators):
        raise ProofFailed("the trusted set of validators is empty, too large, or names a validator twice")
    if _hex(header, "validators_hash") != validators_hash(validators):
        raise ProofFailed("the header was made by another set of validators than the trusted one")
    header_hash = hash_header(header)
    block_id = _entry(commit, "block_id", dict)
    height, round_ = _integer(header, "height"), commit.get("round")
    if _integer(commit, "height") != height or _hex(block_id, "hash") != header_hash:
        raise ProofFailed("the commit is for another header than the one beside it; the header was changed")
    if type(round_) is not int or not 0 <= round_ < 2**31:
        raise MalformedMessage("commit round", "an integer")
    signed_power = _signed_power(_entry(commit, "signatures", list), validators, chain_id, height, round_, block_id)
    total_power = sum(one.power for one in validators)
    if signed_power * 3 <= total_power * 2:
        raise ProofFailed(
            f"validators with {signed_power} of {total_power} signed height {height}; more than two thirds are needed"
        )
    return CertifiedHeader(
        chain_id,
        height,
        _time(header, "time")[0],
        _hex(header, "app_hash"),
        header_hash,
        _hex(header, "next_validators_hash"),
        signed_power,
        total_power,
    )


def hash_header(header: Mapping[str, Any]) -> bytes:
    """The hash of a header as the RPC gives it. Raises MalformedMessage."""
    version = _entry(header, "version", dict)
    chain_id = _entry(header, "chain_id", str).encode()
    fields = [
        _number(1, _integer(version, "block")) + _number(2, _integer(version, "app", missing=0)),
        _field(1, chain_id),
        _number(1, _integer(header, "height")),
        _timestamp(_time(header, "time")),
        _block_id(_entry(header, "last_block_id", dict)),
    ]
    for name in (
        "last_commit_hash",
        "data_hash",
        "validators_hash",
        "next_validators_hash",
        "consensus_hash",
        "app_hash",
        "last_results_hash",
        "evidence_hash",
        "proposer_address",
    ):
        fields.append(_bytes(1, _hex(header, name)))
    return root_of([leaf_hash(field) for field in fields])


def _signed_power(
    signatures: Sequence[Any],
    validators: Sequence[Validator],
    chain_id: str,
    height: int,
    round_: int,
    block_id: Mapping[str, Any],
) -> int:
    """The power of those that signed this block; a signature that does not verify fails the whole commit."""
    if len(signatures) != len(validators):
        raise ProofFailed(f"the commit has {len(signatures)} places for {len(validators)} validators")
    power = 0
    for entry, one in zip(signatures, validators, strict=True):
        flag = entry.get("block_id_flag") if type(entry) is dict else None
        if flag in (_ABSENT, _NIL):
            continue  # It did not vote, or voted for no block; its signature says nothing about this one.
        if flag != _COMMIT:
            raise MalformedMessage("commit signature", "a block id flag of 1, 2 or 3")
        signature = _base64(entry.get("signature"), SIGNATURE_BYTES)
        message = vote_sign_bytes(chain_id, height, round_, block_id, _time(entry, "timestamp"))
        if _hex(entry, "validator_address") != one.address or not one.key.verifies(signature, message):
            raise ProofFailed(f"the signature of validator {one.address.hex().upper()} does not verify")
        power += one.power
    return power


def vote_sign_bytes(
    chain_id: str, height: int, round_: int, block_id: Mapping[str, Any], time: tuple[int, int]
) -> bytes:
    """What a validator signs with its precommit: the CanonicalVote, with its length before it."""
    vote = b"".join(
        (
            _number(1, _PRECOMMIT),
            _fixed(2, height),
            _fixed(3, round_),
            _field(4, _block_id(block_id)),
            _field(5, _timestamp(time)),
            _bytes(6, chain_id.encode()),
        )
    )
    return _varint(len(vote)) + vote


# --- Protobuf: a field with its default value is left out, a message inside is not


def _varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _bytes(number: int, content: bytes) -> bytes:
    return _field(number, content) if content else b""


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value) if value else b""


def _fixed(number: int, value: int) -> bytes:
    return _varint(number << 3 | 1) + struct.pack("<q", value) if value else b""


def _timestamp(time: tuple[int, int]) -> bytes:
    return _number(1, time[0]) + _number(2, time[1])


def _block_id(block_id: Mapping[str, Any]) -> bytes:
    parts = _entry(block_id, "parts", dict)
    total = parts.get("total")
    if type(total) is not int or not 0 <= total < 2**32:
        raise MalformedMessage("block id", "a number of parts")
    return _bytes(1, _hex(block_id, "hash")) + _field(2, _number(1, total) + _bytes(2, _hex(parts, "hash")))


# --- JSON


def _result(text: str, where: str) -> dict[str, Any]:
    """The `result` of an answer, or the object itself where somebody has kept that alone."""
    if len(text) > MAX_JSON_CHARACTERS:
        raise MalformedMessage(where, f"at most {MAX_JSON_CHARACTERS} characters")
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedMessage(where, f"JSON ({error})") from error
    result = value.get("result", value) if type(value) is dict else None
    if type(result) is not dict:
        raise MalformedMessage(where, "an answer of a node's RPC")
    return result


def _entry(record: Any, name: str, kind: type[Any]) -> Any:
    value = record.get(name) if isinstance(record, Mapping) else None
    if type(value) is not kind:
        raise MalformedMessage(name, f"a {kind.__name__}")
    return value


def _integer(record: Any, name: str, missing: int | None = None) -> int:
    """An integer, which the RPC writes as text."""
    value = record.get(name, missing) if isinstance(record, Mapping) else None
    if type(value) is int and value == missing:
        return value
    if type(value) is not str or re.fullmatch(r"\d{1,19}", value, re.ASCII) is None or int(value) >= 2**63:
        raise MalformedMessage(name, "an integer as text")
    return int(value)


def _hex(record: Any, name: str) -> bytes:
    text = _entry(record, name, str)
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise MalformedMessage(name, "bytes in hex") from error


def _base64(text: Any, length: int) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True) if type(text) is str else b""
    except binascii.Error as error:
        raise MalformedMessage("base64", "base64") from error
    if len(raw) != length:
        raise MalformedMessage("base64", f"{length} bytes in base64")
    return raw


def _time(record: Any, name: str) -> tuple[int, int]:
    """(seconds since 1970, nanoseconds) of a time as CometBFT writes it: UTC, up to nine decimals."""
    found = _TIME.fullmatch(_entry(record, name, str))
    try:
        moment = datetime.fromisoformat(found[1]) if found else None
    except ValueError:
        moment = None
    if found is None or moment is None:
        raise MalformedMessage(name, "a UTC time")
    return calendar.timegm(moment.timetuple()), int((found[2] or "0").ljust(9, "0"))
