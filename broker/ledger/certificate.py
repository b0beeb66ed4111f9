"""A network's certificate: validators with more than two thirds of the power stand for a block of the ledger. Pure.

It holds the block's id and the rows digest, whose hash is the app hash (`rows_digest.app_hash_of`); the header of
CometBFT that carries this app hash; the votes for that header; the set of validators that voted; and the changes by
which registrars made this set, for those whose trust file is older. The header of a block at CometBFT's height h
carries the app hash after block h - 1.

Each block of the ledger names the one before, so a certificate proves all blocks up to its own. proof.cddl holds its
shape.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from broker.ledger.commit import APP_HASH, BlockId, CertifiedHeader, Commit, Header, Validator, Vote, check_commit
from broker.ledger.commit import validator as network_validator
from broker.ledger.receipts import ProofFailed
from broker.ledger.rows_digest import app_hash_of
from broker.ledger.state import ValidatorsRow
from broker.ledger.trust import Trust
from broker.ledger.validator_set import sets_after
from broker.protocol import cbor
from broker.protocol.codec import Bytes, Field, Many, Name, Row, Text, Unsigned, decode_fields, encode_fields
from broker.protocol.envelope import Signer
from broker.protocol.keys import SIGNATURE_BYTES, Algorithm, public_key_from_cose
from broker.protocol.limits import MAX_BATCH_BYTES
from broker.protocol.messages import HASH_BYTES, MAX_VALIDATORS

CERTIFICATE_KIND: Final = 4
CERTIFICATE_NAME: Final = "certificate.cbor"
"""In a node's ledger directory: the newest one that the node has got from its network."""

MAX_UNCERTIFIED_BLOCKS: Final = 64
"""Blocks after a certificate's that a node may have sealed itself: what a busy network makes in ten seconds."""

MAX_CERTIFICATE_BYTES: Final = 2**20
_MAX_CHANGES: Final = 1_024
_CHAIN_ID_CHARACTERS: Final = 50
_HASH_CHARACTERS: Final = 16
_TIME: Final = Row((Unsigned(), Unsigned(10**9 - 1)))
_HASH: Final = Bytes(HASH_BYTES, HASH_BYTES)
_BLOCK_ID: Final = Row((Bytes(0, HASH_BYTES), Unsigned(2**32 - 1), Bytes(0, HASH_BYTES)), BlockId)
_HEADER: Final = Row(
    (
        Unsigned(),
        Unsigned(),
        Text(_CHAIN_ID_CHARACTERS),
        Unsigned(),
        _TIME,
        _BLOCK_ID,
        Row((Bytes(0, HASH_BYTES),) * 9),
    ),
    Header,
)
_VOTE: Final = Row((Unsigned(MAX_VALIDATORS - 1), _TIME, Bytes(SIGNATURE_BYTES, SIGNATURE_BYTES)))
"""The voter's place in the set, when it voted, and its signature."""

_VOTER: Final = Row((Bytes(32, 32), Unsigned(minimum=1)))


def chain_id_of(ledger: str, genesis_hash: bytes) -> str:
    """CometBFT's name of a ledger: at most 50 characters, different for each genesis."""
    room = _CHAIN_ID_CHARACTERS - 1 - _HASH_CHARACTERS
    return f"{ledger[:room]}-{genesis_hash.hex()[:_HASH_CHARACTERS]}"


@dataclass(frozen=True, slots=True)
class Certificate:
    """`votes` are (place in `validators`, time, signature), ascending; `validators` (raw Ed25519 key, power)."""

    ledger: str
    block_id: bytes
    rows_digest: bytes
    header: Header
    round: int
    certified: BlockId
    votes: tuple[tuple[int, tuple[int, int], bytes], ...]
    validators: tuple[tuple[bytes, int], ...]
    changes: tuple[bytes, ...]
    kind: int = CERTIFICATE_KIND

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "kind", Unsigned(CERTIFICATE_KIND, CERTIFICATE_KIND)),
        Field(1, "ledger", Name()),
        Field(2, "block_id", _HASH),
        Field(3, "rows_digest", _HASH),
        Field(4, "header", _HEADER),
        Field(5, "round", Unsigned(2**31 - 1)),
        Field(6, "certified", _BLOCK_ID),
        Field(7, "votes", Many(_VOTE, MAX_VALIDATORS)),
        Field(8, "validators", Many(_VOTER, MAX_VALIDATORS, 1)),
        Field(9, "changes", Many(Bytes(2, MAX_BATCH_BYTES), _MAX_CHANGES)),
    )

    def to_bytes(self) -> bytes:
        return cbor.encode(encode_fields(self.FIELDS, self))

    @classmethod
    def from_bytes(cls, raw: bytes) -> "Certificate":
        """Raises MalformedMessage."""
        data: Any = cbor.decode(raw, "certificate", MAX_CERTIFICATE_BYTES)
        _, *values = decode_fields(cls.FIELDS, data, "certificate")
        return cls(*values)

    def check(self, trust: Trust) -> CertifiedHeader:
        """The header that the validators signed, if they stand for `block_id` and `rows_digest` of this very ledger.

        The set that voted must be the trusted one, or one that the registrars made of it; then validators with more
        than a third of the trusted power must be among those who voted, as light clients of CometBFT ask for. Raises
        ProtocolError saying what does not hold.
        """
        if self.ledger != trust.ledger:
            raise ProofFailed(f"it is a certificate of ledger {self.ledger}, and the trust file is of {trust.ledger}")
        later = sets_after(trust.now, self.changes, trust.ledger, trust.registrars)
        self._check_set(trust.now, later)
        return self.check_votes(trust)

    def check_votes(self, trust: Trust) -> CertifiedHeader:
        """The same where it is known otherwise that `validators` is the right set. Raises ProofFailed."""
        voters = {place: Vote(time, signature) for place, time, signature in self.votes}
        if list(voters) != sorted(voters) or len(voters) != len(self.votes):
            raise ProofFailed("a vote stands twice in the certificate, or out of order")
        if voters and max(voters) >= len(self.validators):
            raise ProofFailed("a vote in the certificate is of nobody")
        places = tuple(voters.get(place) for place in range(len(self.validators)))
        validators: list[Validator] = [network_validator(raw_key, power) for raw_key, power in self.validators]
        commit = Commit(self.header.height, self.round, self.certified, places)
        found = check_commit(self.header, commit, validators, chain_id_of(trust.ledger, trust.genesis_hash))
        if app_hash_of(self.block_id, self.rows_digest) != self.header.hashes[APP_HASH]:
            raise ProofFailed("the header that was signed is of another block or other rows than the certificate says")
        return found

    def is_of(self, row: ValidatorsRow) -> bool:
        """True if exactly these validators, with their powers, are the certificate's set."""
        return len(self.validators) == len(row.validators) and dict(self.validators) == _powers(row)

    def _check_set(self, trusted: ValidatorsRow, later: list[ValidatorsRow]) -> None:
        if self.is_of(trusted):
            return
        if not any(self.is_of(row) for row in later):
            raise ProofFailed(
                "the certificate is of validators that the trust file does not name and its registrars did not make of"
                " those; use the trust file of that time"
            )
        powers = _powers(trusted)
        places = {place for place, _, _ in self.votes}
        voted = sum(powers.get(key, 0) for place, (key, _) in enumerate(self.validators) if place in places)
        if 3 * voted <= sum(powers.values()):
            raise ProofFailed(
                f"of the validators that the trust file names, a power of {voted} of {sum(powers.values())} has voted;"
                " more than a third must, so make a newer trust file"
            )


@dataclass(frozen=True, slots=True)
class Proven:
    """What a certificate proves of a copy of the ledger: every block up to `height`, whoever has sealed them.

    `sealers` are those, besides validators, whose seals are in order then. A node gets its certificate after the block,
    so the last few blocks may have its own seal alone.
    """

    height: int
    certificate: Certificate
    sealers: Mapping[bytes, Signer]

    def sealers_of(self, height: int) -> Mapping[bytes, Signer]:
        """Who may have sealed the block of that height, besides validators."""
        return self.sealers if height <= self.height + MAX_UNCERTIFIED_BLOCKS else {}


def is_certificate(raw: bytes) -> bool:
    """True for bytes that begin as every certificate does."""
    return len(raw) > 2 and 0xA0 <= raw[0] <= 0xBF and raw[1:3] == bytes((0, CERTIFICATE_KIND))


def _powers(row: ValidatorsRow) -> dict[bytes, int]:
    """Powers by Ed25519 key; a validator with another kind of key is on no network."""
    keys = [(public_key_from_cose(validator.cose_key), validator.power) for validator in row.validators]
    return {key.ed25519_bytes(): power for key, power in keys if key.algorithm is Algorithm.ED25519}
