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
from typing import Any, Final, NamedTuple

from broker.ledger.merkle import leaf_hash, root_of
from broker.ledger.receipts import ProofFailed
from broker.protocol import cbor
from broker.protocol.errors import MalformedMessage
from broker.protocol.keys import SIGNATURE_BYTES, PublicKey, public_key_from_cose

MAX_VALIDATORS: Final = 1_000
MAX_POWER: Final = 2**60
"""CometBFT's own limit on the power of a whole set (`types.MaxTotalVotingPower`)."""

MAX_JSON_CHARACTERS: Final = 2**20

HEADER_HASHES: Final = (
    "last_commit_hash",
    "data_hash",
    "validators_hash",
    "next_validators_hash",
    "consensus_hash",
    "app_hash",
    "last_results_hash",
    "evidence_hash",
    "proposer_address",
)
VALIDATORS_HASH: Final = HEADER_HASHES.index("validators_hash")
NEXT_VALIDATORS_HASH: Final = HEADER_HASHES.index("next_validators_hash")
APP_HASH: Final = HEADER_HASHES.index("app_hash")

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


class BlockId(NamedTuple):
    """How CometBFT names a block: by its header's hash, and by number and root of the parts that it travels in."""

    hash: bytes
    parts: int
    parts_hash: bytes

    def to_protobuf(self) -> bytes:
        return _bytes(1, self.hash) + _field(2, _number(1, self.parts) + _bytes(2, self.parts_hash))


class Header(NamedTuple):
    """The header of a block of CometBFT. `time` is (seconds since 1970, nanoseconds); `hashes` as in HEADER_HASHES."""

    version_block: int
    version_app: int
    chain_id: str
    height: int
    time: tuple[int, int]
    last_block_id: BlockId
    hashes: tuple[bytes, ...]

    @property
    def hash(self) -> bytes:
        fields = [
            _number(1, self.version_block) + _number(2, self.version_app),
            _field(1, self.chain_id.encode()),
            _number(1, self.height),
            _timestamp(self.time),
            self.last_block_id.to_protobuf(),
            *(_bytes(1, value) for value in self.hashes),
        ]
        return root_of([leaf_hash(field) for field in fields])


class Vote(NamedTuple):
    """One validator's precommit for the block. Without `address` its place alone says whose it is."""

    time: tuple[int, int]
    signature: bytes
    address: bytes | None = None


class Commit(NamedTuple):
    """The votes for a block: a place for each validator of the set in its order, None where it did not vote for it."""

    height: int
    round: int
    block_id: BlockId
    votes: tuple[Vote | None, ...]


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
    return check_commit(*read_commit(text), validators, chain_id)


def read_commit(text: str) -> tuple[Header, Commit]:
    """The header and the commit in an answer to `/commit`; nothing is checked yet. Raises MalformedMessage."""
    signed = _entry(_result(text, "commit"), "signed_header", dict)
    header, commit = _entry(signed, "header", dict), _entry(signed, "commit", dict)
    round_ = commit.get("round")
    if type(round_) is not int or not 0 <= round_ < 2**31:
        raise MalformedMessage("commit round", "an integer")
    votes = tuple(_vote(entry) for entry in _entry(commit, "signatures", list))
    block_id = _read_block_id(_entry(commit, "block_id", dict))
    return _read_header(header), Commit(_integer(commit, "height"), round_, block_id, votes)


def check_commit(header: Header, commit: Commit, validators: Sequence[Validator], chain_id: str) -> CertifiedHeader:
    """As `verify_commit`, of a header and its commit. Raises ProofFailed."""
    if header.chain_id != chain_id:
        raise ProofFailed(f"the commit is of chain {header.chain_id!r}, not of {chain_id}")
    if not 0 < len(validators) <= MAX_VALIDATORS or len({one.raw_key for one in validators}) != len(validators):
        raise ProofFailed("the trusted set of validators is empty, too large, or names a validator twice")
    if header.hashes[VALIDATORS_HASH] != validators_hash(validators):
        raise ProofFailed("the header was made by another set of validators than the trusted one")
    header_hash = header.hash
    if commit.height != header.height or commit.block_id.hash != header_hash:
        raise ProofFailed("the commit is for another header than the one beside it; the header was changed")
    signed_power = _signed_power(commit, validators, chain_id)
    total_power = sum(one.power for one in validators)
    if signed_power * 3 <= total_power * 2:
        raise ProofFailed(
            f"validators with {signed_power} of {total_power} signed height {commit.height};"
            " more than two thirds are needed"
        )
    return CertifiedHeader(
        chain_id,
        header.height,
        header.time[0],
        header.hashes[APP_HASH],
        header_hash,
        header.hashes[NEXT_VALIDATORS_HASH],
        signed_power,
        total_power,
    )


def hash_header(header: Mapping[str, Any]) -> bytes:
    """The hash of a header as the RPC gives it. Raises MalformedMessage."""
    return _read_header(header).hash


def _signed_power(commit: Commit, validators: Sequence[Validator], chain_id: str) -> int:
    """The power of those who voted for this block, each in its own place. Raises ProofFailed."""
    if len(commit.votes) != len(validators):
        raise ProofFailed(f"the commit has {len(commit.votes)} places for {len(validators)} validators")
    power = 0
    for vote, one in zip(commit.votes, validators, strict=True):
        if vote is None:
            continue  # It did not vote, or voted for no block; its signature says nothing about this one.
        message = vote_sign_bytes(chain_id, commit.height, commit.round, commit.block_id, vote.time)
        if vote.address not in (None, one.address) or not one.key.verifies(vote.signature, message):
            raise ProofFailed(f"the signature of validator {one.address.hex().upper()} does not verify")
        power += one.power
    return power


def vote_sign_bytes(chain_id: str, height: int, round_: int, block_id: BlockId, time: tuple[int, int]) -> bytes:
    """What a validator signs with its precommit: the CanonicalVote, with its length before it."""
    vote = b"".join(
        (
            _number(1, _PRECOMMIT),
            _fixed(2, height),
            _fixed(3, round_),
            _field(4, block_id.to_protobuf()),
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


# --- JSON


def _read_header(record: Mapping[str, Any]) -> Header:
    version = _entry(record, "version", dict)
    return Header(
        _integer(version, "block"),
        _integer(version, "app", missing=0),
        _entry(record, "chain_id", str),
        _integer(record, "height"),
        _time(record, "time"),
        _read_block_id(_entry(record, "last_block_id", dict)),
        tuple(_hex(record, name) for name in HEADER_HASHES),
    )


def _read_block_id(record: Mapping[str, Any]) -> BlockId:
    parts = _entry(record, "parts", dict)
    total = parts.get("total")
    if type(total) is not int or not 0 <= total < 2**32:
        raise MalformedMessage("block id", "a number of parts")
    return BlockId(_hex(record, "hash"), total, _hex(parts, "hash"))


def _vote(entry: Any) -> Vote | None:
    flag = entry.get("block_id_flag") if type(entry) is dict else None
    if flag in (_ABSENT, _NIL):
        return None
    if flag != _COMMIT:
        raise MalformedMessage("commit signature", "a block id flag of 1, 2 or 3")
    signature = _base64(entry.get("signature"), SIGNATURE_BYTES)
    return Vote(_time(entry, "timestamp"), signature, _hex(entry, "validator_address"))


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
