"""The trust file: what somebody needs to check a ledger, its checkpoints and proofs; nothing in it is secret. Pure."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from broker.ledger.chain import genesis_hash
from broker.protocol.codec import is_name
from broker.protocol.envelope import Signer
from broker.protocol.errors import MalformedMessage
from broker.protocol.keys import public_key_from_cose
from broker.protocol.messages import HASH_BYTES, Genesis

_MAX_CHARACTERS: Final = 65_536


@dataclass(frozen=True, slots=True)
class Trust:
    """Whom to believe about a ledger: signers by key id. A key stands for one ledger, by the hash of its genesis."""

    ledger: str
    genesis_hash: bytes
    validators: Mapping[bytes, Signer]
    registrars: Mapping[bytes, Signer]

    @property
    def issuer(self) -> str:
        """What the receipts of this ledger name as their issuer (RFC 8392 section 3.1.1)."""
        return issuer_of(self.ledger, self.genesis_hash)


def issuer_of(ledger: str, digest: bytes) -> str:
    """The issuer in receipts: `<ledger>/<hash of the genesis in hex>`, because two ledgers may share name and keys."""
    return f"{ledger}/{digest.hex()}"


def trust_of(genesis: Genesis) -> dict[str, Any]:
    """Ledger id, hash of the genesis, and public keys (COSE_Key in hex) by name, as JSON knows it."""
    return {
        "ledger": genesis.ledger,
        "genesis_sha256": genesis_hash(genesis).hex(),
        "simulated": genesis.simulated,
        "validators": {named.name: named.key.hex() for named in genesis.validators},
        "registrars": {named.name: named.key.hex() for named in genesis.registrars},
    }


def read_trust(text: str) -> Trust:
    """Read a trust file as `trust_of` makes it. Raises MalformedMessage naming the entry that is wrong."""
    if len(text) > _MAX_CHARACTERS:
        raise MalformedMessage("trust file", f"at most {_MAX_CHARACTERS} characters")
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedMessage("trust file", f"JSON as `energy-broker ledger trust` prints it ({error})") from error
    if type(value) is not dict:
        raise MalformedMessage("trust file", "an object, as `energy-broker ledger trust` prints it")
    ledger = value.get("ledger")
    if type(ledger) is not str or not is_name(ledger):
        raise MalformedMessage("trust file: ledger", "the ledger's name")
    digest = _from_hex(value.get("genesis_sha256"), "genesis_sha256")
    if len(digest) != HASH_BYTES:
        raise MalformedMessage("trust file: genesis_sha256", f"{HASH_BYTES} bytes in hex")
    return Trust(ledger, digest, _signers(value, "validators"), _signers(value, "registrars"))


def _signers(value: dict[str, Any], entry: str) -> dict[bytes, Signer]:
    named = value.get(entry)
    if type(named) is not dict or not named:
        raise MalformedMessage(f"trust file: {entry}", "public keys by name, at least one")
    signers = [Signer(name, public_key_from_cose(_from_hex(key, entry))) for name, key in named.items()]
    return {signer.key.key_id: signer for signer in signers}


def _from_hex(text: Any, entry: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except (ValueError, TypeError) as error:
        raise MalformedMessage(f"trust file: {entry}", "hex") from error
