"""A COSE library by others verifies our envelopes, and ours opens what it signs.

`cwt` needs cbor2 before 6, so it lives in an environment of its own, .venv-oracle, which the first run makes. Where it
cannot be made (no network), the test is skipped and says so.
"""

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import cbor2
import pytest

from broker.protocol.envelope import Signer, open_envelope, parse, seal
from broker.protocol.keys import P256_ORDER, Algorithm, PrivateKey, generate_private_key
from broker.protocol.messages import Carrier, Quality, Reading

ROOT = Path(__file__).parents[3]
ENVIRONMENT = ROOT / ".venv-oracle"
PACKAGES = ("cwt==3.3.0", "cbor2<6")
READING = Reading("meter-1", 0, 1800, 0, 500, Quality.MEASURED, Carrier.ELECTRICITY)
EXTERNAL_AAD = cbor2.dumps([1, "ledger-1", "meter-1"])


@pytest.fixture(scope="module")
def oracle_python() -> Path:
    """The interpreter of the oracle's environment, made on first use (one test process at a time)."""
    python = ENVIRONMENT / "bin" / "python"
    made = ENVIRONMENT / "made-with"
    with (ROOT / ".venv-oracle.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists() or made.read_text() != " ".join(PACKAGES):
            for command in (
                [sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)],
                [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES],
            ):
                try:
                    subprocess.run(command, check=True, capture_output=True, text=True, timeout=180)
                except subprocess.CalledProcessError as error:
                    pytest.skip(f"the environment for cwt cannot be made: {error.stderr.strip()[-300:]}")
                except subprocess.TimeoutExpired:
                    pytest.skip("the environment for cwt cannot be made: no answer from the package index")
            made.write_text(" ".join(PACKAGES))
    return python


def ask(python: Path, requests: list[dict[str, bytes]]) -> list[str]:
    finished = subprocess.run(
        [str(python), str(ROOT / "tests" / "support" / "cwt_oracle.py")],
        input=json.dumps([{name: value.hex() for name, value in request.items()} for request in requests]),
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    answers: list[str] = json.loads(finished.stdout)
    return answers


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
