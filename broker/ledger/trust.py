"""The trust file: what somebody needs to check a ledger, its checkpoints and proofs; nothing in it is secret."""

from typing import Any

from broker.ledger.chain import genesis_hash
from broker.protocol.messages import Genesis


def trust_of(genesis: Genesis) -> dict[str, Any]:
    """Ledger id, hash of the genesis, and public keys (COSE_Key in hex) by name, as JSON knows it."""
    return {
        "ledger": genesis.ledger,
        "genesis_sha256": genesis_hash(genesis).hex(),
        "simulated": genesis.simulated,
        "validators": {named.name: named.key.hex() for named in genesis.validators},
        "registrars": {named.name: named.key.hex() for named in genesis.registrars},
    }
