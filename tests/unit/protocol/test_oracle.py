"""A COSE library by others verifies our envelopes, and ours opens what it signs.

`cwt` needs cbor2 before 6, so it lives in an environment of its own, .venv-oracle, which the first run makes. Where it
cannot be made (no network), the test is skipped and says so.
"""

from pathlib import Path

import cbor2
import pytest
from support import oracles
from support.oracles import environment

from broker.ledger.receipts import SignedRoot, sign_root
from broker.protocol.envelope import Signer, open_envelope, parse, seal
from broker.protocol.keys import P256_ORDER, Algorithm, PrivateKey, generate_private_key
from broker.protocol.messages import Carrier, Checkpoint, Quality, Reading, Witness

PACKAGES = ("cwt==3.3.0", "cbor2<6")
READING = Reading("meter-1", 0, 1800, 0, 500, Quality.MEASURED, Carrier.ELECTRICITY)
EXTERNAL_AAD = cbor2.dumps([1, "ledger-1", "meter-1"])


@pytest.fixture(scope="module")
def oracle_python() -> Path:
    """The interpreter of the oracle's environment."""
    return environment(".venv-oracle", PACKAGES)


def ask(python: Path, requests: list[dict[str, bytes]]) -> list[str]:
    return oracles.ask(python, "cwt_oracle.py", requests)


def key_map(key: PrivateKey) -> dict[int, object]:
    return cbor2.loads(key.public.cose_key) | {2: key.public.key_id, 3: int(key.public.algorithm)}


def private_part(key: PrivateKey) -> bytes:
    if key.public.algorithm is Algorithm.ED25519:
        return bytes(key._key.private_bytes_raw())
    return int(key._key.private_numbers().private_value).to_bytes(32, "big")


def test_another_cose_library_verifies_ours_and_we_open_its_messages(oracle_python: Path) -> None:
    keys = [generate_private_key(algorithm) for algorithm in Algorithm]
    sealed = [seal(READING, key, "ledger-1", "meter-1") for key in keys]
    public = [cbor2.dumps(key_map(key)) for key in keys]
    verified = ask(
        oracle_python,
        [{"key": key, "aad": EXTERNAL_AAD, "message": raw} for key, raw in zip(public, sealed, strict=True)],
    )
    assert verified == [READING.to_payload().hex()] * 2

    other_aad = cbor2.dumps([1, "ledger-2", "meter-1"])
    refused = ask(
        oracle_python,
        [{"key": key, "aad": other_aad, "message": raw} for key, raw in zip(public, sealed, strict=True)],
    )
    assert [answer.partition(":")[0] for answer in refused] == ["refused", "refused"]

    signed = ask(
        oracle_python,
        [
            {
                "key": cbor2.dumps(key_map(key) | {-4: private_part(key)}),
                "aad": EXTERNAL_AAD,
                "protected": parse(raw).protected,
                "payload": READING.to_payload(),
            }
            for key, raw in zip(keys, sealed, strict=True)
        ],
    )
    for key, answer in zip(keys, signed, strict=True):
        raw = bytes.fromhex(answer)
        if key.public.algorithm is Algorithm.ESP256:
            # cwt leaves s as it falls; the protocol wants the lower of the two.
            s = int.from_bytes(raw[-32:], "big")
            raw = raw[:-32] + min(s, P256_ORDER - s).to_bytes(32, "big")
        signer = Signer("meter-1", key.public)
        assert open_envelope(raw, "ledger-1", {key.public.key_id: signer}.get).message == READING


def test_another_cose_library_verifies_checkpoints_and_witnesses(oracle_python: Path) -> None:
    key = generate_private_key()
    checkpoint = seal(Checkpoint(7, bytes(32), 5, bytes(32), bytes(32)), key, "ledger-1", "node")
    witness = seal(Witness(checkpoint), key, "ledger-1", "east")
    public = cbor2.dumps(key_map(key))
    requests = [
        {"key": public, "aad": cbor2.dumps([16, "ledger-1", "node"]), "message": checkpoint},
        {"key": public, "aad": cbor2.dumps([25, "ledger-1", "east"]), "message": witness},
        {"key": public, "aad": cbor2.dumps([25, "ledger-2", "east"]), "message": witness},
    ]
    answers = ask(oracle_python, requests)
    assert answers[:2] == [parse(raw).payload.hex() for raw in (checkpoint, witness)]
    assert answers[2].startswith("refused")


def test_another_cose_library_verifies_the_signature_of_a_receipt(oracle_python: Path) -> None:
    """A receipt's payload is detached; with the root in its place it is an ordinary COSE_Sign1."""
    for key in [generate_private_key(algorithm) for algorithm in Algorithm]:
        root = bytes(range(32))
        signed = sign_root(root, key, "ledger-1/00")

        def attached(payload: bytes, signed: SignedRoot = signed) -> bytes:
            return cbor2.dumps(cbor2.CBORTag(18, [signed.protected, {}, payload, signed.signature]))

        requests = [
            {"key": cbor2.dumps(key_map(key)), "aad": b"", "message": attached(payload)}
            for payload in (root, bytes(32))
        ]
        holds, does_not = ask(oracle_python, requests)
        assert holds == root.hex()
        assert does_not.startswith("refused")
