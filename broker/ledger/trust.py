"""The trust file: what somebody needs to check a ledger, its checkpoints and proofs; nothing in it is secret. Pure."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from broker.ledger.chain import genesis_hash
from broker.ledger.rules.validators import first_set, signers_of
from broker.ledger.state import Validator, ValidatorsRow
from broker.protocol.codec import is_name
from broker.protocol.envelope import Signer
from broker.protocol.errors import MalformedMessage
from broker.protocol.keys import public_key_from_cose
from broker.protocol.limits import MAX_INTEGER
from broker.protocol.messages import HASH_BYTES, MAX_VALIDATOR_POWER, Genesis

_MAX_CHARACTERS: Final = 65_536


@dataclass(frozen=True, slots=True)
class Trust:
    """Whom to believe about a ledger: signers by key id. A key stands for one ledger, by the hash of its genesis.

    `now` is the set of validators that is trusted from `height` on; what they sign about earlier heights is not.
    """

    ledger: str
    genesis_hash: bytes
    now: ValidatorsRow
    validators: Mapping[bytes, Signer]
    registrars: Mapping[bytes, Signer]
    height: int

    @classmethod
    def of(
        cls, ledger: str, genesis_hash: bytes, now: ValidatorsRow, registrars: Mapping[bytes, Signer], height: int = 0
    ) -> "Trust":
        """Raises MalformedMessage for a validator's key that is none."""
        return cls(ledger, genesis_hash, now, signers_of(now), registrars, height)

    @classmethod
    def at_head(cls, genesis: Genesis, before: ValidatorsRow, now: ValidatorsRow) -> "Trust":
        """Who may have sealed the last block or signed the head after it: the validators `before` it and of `now`."""
        return cls(genesis.ledger, genesis_hash(genesis), now, {**signers_of(before), **signers_of(now)}, {}, 0)

    @property
    def issuer(self) -> str:
        """What the receipts of this ledger name as their issuer (RFC 8392 section 3.1.1)."""
        return issuer_of(self.ledger, self.genesis_hash)


def issuer_of(ledger: str, digest: bytes) -> str:
    """The issuer in receipts: `<ledger>/<hash of the genesis in hex>`, because two ledgers may share name and keys."""
    return f"{ledger}/{digest.hex()}"


def trust_of(genesis: Genesis, now: ValidatorsRow | None = None, height: int = 0) -> dict[str, Any]:
    """Ledger id, hash of the genesis, and public keys (COSE_Key in hex) by name, as JSON knows it.

    `now` are the validators at `height`; None for those of the genesis.
    """
    now = first_set(genesis.validators) if now is None else now
    return {
        "ledger": genesis.ledger,
        "genesis_sha256": genesis_hash(genesis).hex(),
        "simulated": genesis.simulated,
        "from_height": height,
        "sequence": now.sequence,
        "validators": {validator.name: validator.cose_key.hex() for validator in now.validators},
        "powers": {validator.name: validator.power for validator in now.validators},
        "registrars": {named.name: named.key.hex() for named in genesis.registrars},
    }


def read_trust(text: str) -> Trust:
    """Read a trust file as `trust_of` makes it. Raises MalformedMessage naming the entry that is wrong."""
    if len(text) > _MAX_CHARACTERS:
        raise MalformedMessage("trust file", f"at most {_MAX_CHARACTERS} characters")
    try:
        value: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise MalformedMessage("trust file", f"JSON ({error})") from error
    except (ValueError, RecursionError) as error:
        # A number of thousands of digits, or thousands of brackets within each other.
        raise MalformedMessage("trust file", "JSON of ordinary depth and numbers") from error
    if type(value) is not dict:
        raise MalformedMessage("trust file", "an object")
    ledger = value.get("ledger")
    if type(ledger) is not str or not is_name(ledger):
        raise MalformedMessage("trust file: ledger", "the ledger's name")
    digest = _from_hex(value.get("genesis_sha256"), "genesis_sha256")
    if len(digest) != HASH_BYTES:
        raise MalformedMessage("trust file: genesis_sha256", f"{HASH_BYTES} bytes in hex")
    keys = _keys(value, "validators")
    powers = value.get("powers", dict.fromkeys(keys, 1))
    if type(powers) is not dict or powers.keys() != keys.keys():
        raise MalformedMessage("trust file: powers", "the power of each validator by name")
    validators = [
        Validator(name, key, _whole(powers[name], f"powers: {name}", 1, MAX_VALIDATOR_POWER))
        for name, key in keys.items()
    ]
    now = ValidatorsRow(_whole(value.get("sequence", 0), "sequence"), tuple(sorted(validators)))
    registrars = {
        signer.key.key_id: signer
        for signer in (Signer(name, public_key_from_cose(key)) for name, key in _keys(value, "registrars").items())
    }
    return Trust.of(ledger, digest, now, registrars, _whole(value.get("from_height", 0), "from_height"))


def _keys(value: dict[str, Any], entry: str) -> dict[str, bytes]:
    named = value.get(entry)
    if type(named) is not dict or not named:
        raise MalformedMessage(f"trust file: {entry}", "public keys by name, at least one")
    return {name: _from_hex(key, entry) for name, key in named.items()}


def _whole(number: Any, entry: str, lowest: int = 0, highest: int = MAX_INTEGER) -> int:
    if type(number) is not int or not lowest <= number <= highest:
        raise MalformedMessage(f"trust file: {entry}", f"a whole number from {lowest} to {highest}")
    return number


def _from_hex(text: Any, entry: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except (ValueError, TypeError) as error:
        raise MalformedMessage(f"trust file: {entry}", "hex") from error
