"""A library for COSE Receipts by others verifies ours, and refuses what ours refuses.

`scitt-cose` knows the algorithm numbers -7 and -8 and not the fully specified ones (RFC 9864) that the ledger uses. So
the receipts that it gets are signed once more with the older number of the same algorithm; proof, header and structure
stay what they are. It lives in an environment of its own, .venv-scitt, which the first run makes.
"""

from pathlib import Path

import cbor2
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from support import oracles

from broker.ledger.merkle import consistency_proof, hashes_of, inclusion_proof, leaf_hash, root_of
from broker.ledger.receipts import inclusion_receipt, sign_root
from broker.protocol import cbor, envelope
from broker.protocol.keys import Algorithm, PrivateKey, generate_private_key

OLDER_NUMBER = {Algorithm.ED25519: -8, Algorithm.ESP256: -7}
OPERATIONS = [bytes([number]) * 3 for number in range(13)]
LEAVES = [leaf_hash(operation) for operation in OPERATIONS]


@pytest.fixture(scope="module")
def oracle_python() -> Path:
    return oracles.environment(".venv-scitt", ("scitt-cose==0.5.0",))


def with_the_older_number(receipt: bytes, root: bytes, key: PrivateKey) -> bytes:
    protected, unprotected, payload, _ = cbor2.loads(receipt).value
    header = dict(cbor2.loads(protected)) | {1: OLDER_NUMBER[key.public.algorithm]}
    protected = cbor.encode(header)
    signature = key.sign(envelope.signature_structure(protected, b"", root))
    return cbor2.dumps(cbor2.CBORTag(18, [protected, unprotected, payload, signature]))


def request(size: int, leaf: int, key: PrivateKey) -> dict[str, bytes]:
    """A receipt of ours for that leaf in the tree of that size."""
    root = root_of(LEAVES[:size])
    path = inclusion_proof(leaf, size, hashes_of(LEAVES[:size]))
    receipt = inclusion_receipt(sign_root(root, key, "ledger-1/00"), leaf, size, path)
    pem = key.public._key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return {"receipt": with_the_older_number(receipt, root, key), "operation": OPERATIONS[leaf], "pem": pem}


@pytest.mark.parametrize("algorithm", Algorithm)
def test_another_library_takes_our_receipts_and_refuses_changed_ones(oracle_python: Path, algorithm: Algorithm) -> None:
    key, other = generate_private_key(algorithm), generate_private_key(algorithm)
    places = [(size, leaf) for size in (2, 3, 7, 8, 13) for leaf in range(size)]
    sound = [request(size, leaf, key) for size, leaf in places]
    expected = [f"{leaf} {size} {root_of(LEAVES[:size]).hex()}" for size, leaf in places]
    assert oracles.ask(oracle_python, "scitt_oracle.py", sound) == expected

    one = sound[-1]
    changed = [
        one | {"operation": OPERATIONS[0]},
        one | {"pem": request(2, 0, other)["pem"]},
        one | {"receipt": sound[0]["receipt"]},
        one | {"receipt": one["receipt"][:-1] + bytes([one["receipt"][-1] ^ 1])},
    ]
    answers = oracles.ask(oracle_python, "scitt_oracle.py", changed)
    assert [answer.partition(":")[0] for answer in answers] == ["refused"] * len(changed)


def test_another_library_takes_our_consistency_proofs(oracle_python: Path) -> None:
    requests, expected = [], []
    for second in range(2, len(LEAVES) + 1):
        for first in range(1, second):
            path = consistency_proof(first, second, hashes_of(LEAVES[:second]))
            given = {
                "first": first.to_bytes(8, "big"),
                "second": second.to_bytes(8, "big"),
                "first_root": root_of(LEAVES[:first]),
                "second_root": root_of(LEAVES[:second]),
                "path": b"".join(path),
            }
            requests += [given, given | {"first_root": bytes(32)}]
            expected += ["consistent", "refused"]
    assert oracles.ask(oracle_python, "scitt_oracle.py", requests) == expected
