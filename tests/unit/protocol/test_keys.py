"""Keys: their names and encodings, deterministic signatures, and what their files may be."""

import base64
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import cbor2
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, x25519
from hypothesis import given
from hypothesis import strategies as st

from broker.protocol.errors import KeyFileError, MalformedMessage
from broker.protocol.keys import (
    P256_ORDER,
    Algorithm,
    generate_private_key,
    load_private_key,
    public_key_from_cose,
    save_private_key,
)

BOTH = pytest.mark.parametrize("algorithm", list(Algorithm), ids=lambda algorithm: algorithm.name)
ED25519_KEY = generate_private_key().public
P256_KEY = generate_private_key(Algorithm.ESP256).public


@BOTH
def test_a_public_key_comes_back_from_its_cose_key(algorithm: Algorithm) -> None:
    public = generate_private_key(algorithm).public
    assert public_key_from_cose(public.cose_key) == public
    assert public.algorithm is algorithm
    assert public.key_id == sha256(public.cose_key).digest()[:16]


def test_cose_keys_have_the_entries_of_rfc_9053() -> None:
    assert {key: type(value) for key, value in cbor2.loads(ED25519_KEY.cose_key).items()} == {
        1: int,
        -1: int,
        -2: bytes,
    }
    assert {1: 1, -1: 6}.items() <= cbor2.loads(ED25519_KEY.cose_key).items()
    assert {1: 2, -1: 1}.items() <= cbor2.loads(P256_KEY.cose_key).items()
    assert [len(cbor2.loads(P256_KEY.cose_key)[part]) for part in (-2, -3)] == [32, 32]


@BOTH
def test_the_same_message_always_gets_the_same_signature(algorithm: Algorithm) -> None:
    key = generate_private_key(algorithm)
    assert key.sign(b"message") == key.sign(b"message")
    assert len(key.sign(b"message")) == 64
    assert key.public.verifies(key.sign(b"message"), b"message")
    assert not key.public.verifies(key.sign(b"message"), b"massage")


@given(st.binary(max_size=64))
def test_p256_signatures_have_low_s_and_their_twins_are_refused(message: bytes) -> None:
    key = generate_private_key(Algorithm.ESP256)
    signature = key.sign(message)
    s = int.from_bytes(signature[32:], "big")
    assert s <= P256_ORDER // 2
    twin = signature[:32] + (P256_ORDER - s).to_bytes(32, "big")
    assert key.public.verifies(signature, message)
    assert not key.public.verifies(twin, message)


@BOTH
@pytest.mark.parametrize("length", [0, 63, 65, 128])
def test_a_signature_of_another_length_is_refused(algorithm: Algorithm, length: int) -> None:
    assert not generate_private_key(algorithm).public.verifies(bytes(length), b"message")


def test_a_leading_zero_that_was_cut_from_s_is_refused() -> None:
    """Read as a number it would be the same s; as bytes it is a second signature of the same message."""
    key = generate_private_key(Algorithm.ESP256)
    message = next(m for m in (str(n).encode() for n in range(100_000)) if key.sign(m)[32] == 0)
    signature = key.sign(message)
    assert key.public.verifies(signature, message)
    assert not key.public.verifies(signature[:32] + signature[33:], message)
    assert not key.public.verifies(signature[:32] + b"\x00" + signature[32:], message)


@BOTH
def test_extreme_signatures_are_refused(algorithm: Algorithm) -> None:
    public = generate_private_key(algorithm).public
    extremes = [0, 1, P256_ORDER - 1, P256_ORDER, P256_ORDER + 1, 2**256 - 1]
    for r in extremes:
        for s in extremes:
            assert not public.verifies(r.to_bytes(32, "big") + s.to_bytes(32, "big"), b"message")


X_OF_ED25519 = cbor2.loads(ED25519_KEY.cose_key)[-2]
X_OF_P256, Y_OF_P256 = (cbor2.loads(P256_KEY.cose_key)[part] for part in (-2, -3))


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        [],
        {1: 1, -1: 6},
        {1: 1, -1: 6, -2: X_OF_ED25519[:31]},
        {1: 1, -1: 6, -2: X_OF_ED25519 + b"\x00"},
        {1: 1, -1: 6, -2: 5},
        {1: 1, -1: 7, -2: X_OF_ED25519},
        {1: 2, -1: 6, -2: X_OF_ED25519},
        {1: True, -1: 6, -2: X_OF_ED25519},
        {1: 1.0, -1: 6, -2: X_OF_ED25519},
        {True: 1, -1: 6, -2: X_OF_ED25519},
        {-1: 6, 1: 1, -2: X_OF_ED25519},
        {1: 1, 3: -19, -1: 6, -2: X_OF_ED25519},
        {1: 1, -1: 6, -2: X_OF_ED25519, -4: bytes(32)},
        {1: 2, -1: 1, -2: X_OF_P256, -3: True},
        {1: 2, -1: 1, -2: X_OF_P256, -3: Y_OF_P256[:31]},
        {1: 2, -1: 1, -2: X_OF_P256 + b"\x00", -3: Y_OF_P256[:31]},
        {1: 2, -1: 1, -2: X_OF_P256, -3: bytes(32)},
        {1: 2, -1: 1, -2: Y_OF_P256, -3: X_OF_P256},
        {1: 2, -1: 2, -2: X_OF_P256, -3: Y_OF_P256},
        {1: 1, -1: 1, -2: X_OF_P256, -3: Y_OF_P256},
        b"bytes",
    ],
)
def test_what_is_no_key_of_ours_is_refused(wrong: object) -> None:
    with pytest.raises(MalformedMessage):
        public_key_from_cose(cbor2.dumps(wrong))


def test_a_key_in_another_encoding_is_refused() -> None:
    for encoded in (ED25519_KEY.cose_key + b"\x00", b"\xb8\x03" + ED25519_KEY.cose_key[1:], bytes(129)):
        with pytest.raises(MalformedMessage):
            public_key_from_cose(encoded)


@given(st.binary(max_size=130))
def test_arbitrary_bytes_are_no_key_and_nothing_else_happens(raw: bytes) -> None:
    with pytest.raises(MalformedMessage):
        public_key_from_cose(raw)


@BOTH
def test_a_key_file_is_private_comes_back_and_is_never_overwritten(algorithm: Algorithm, tmp_path: Path) -> None:
    key = generate_private_key(algorithm)
    path = tmp_path / "key.pem"
    save_private_key(path, key)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_private_key(path).public == key.public
    assert load_private_key(path).sign(b"message") == key.sign(b"message")
    with pytest.raises(FileExistsError):
        save_private_key(path, generate_private_key())
    assert load_private_key(path).public == key.public


def test_a_key_file_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    missing = tmp_path / "missing.pem"
    with pytest.raises(KeyFileError, match="energy-broker key new"):
        load_private_key(missing)
    pem = {
        "text": b"no key",
        "x25519": x25519.X25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        "p384": ec.generate_private_key(ec.SECP384R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        "encrypted": ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"pw")
        ),
    }
    expected = {"text": "not an unencrypted", "x25519": "Ed25519 or P-256", "p384": "P-256", "encrypted": "unencrypted"}
    for name, content in pem.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(KeyFileError, match=expected[name]) as refused:
            load_private_key(path)
        assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    "rewritten",
    [
        lambda pem: pem,
        lambda pem: pem.replace(b"\n", b"\r\n"),
        lambda pem: b"\n" + pem + b"\n\n",
        lambda pem: b"a comment before it\n" + pem,
    ],
    ids=["as written", "carriage returns", "empty lines", "comment"],
)
def test_a_key_file_is_the_same_key_however_it_is_wrapped(rewritten: Callable[[bytes], bytes], tmp_path: Path) -> None:
    key = generate_private_key()
    save_private_key(tmp_path / "a.pem", key)
    (tmp_path / "b.pem").write_bytes(rewritten((tmp_path / "a.pem").read_bytes()))
    assert load_private_key(tmp_path / "b.pem").public == key.public
    assert load_private_key(tmp_path / "b.pem").sign(b"x") == key.sign(b"x")


@pytest.mark.parametrize(
    "body",
    [
        b"!!!!",
        b"",
        base64.b64encode(bytes.fromhex("302e020100300506032b657004220420") + bytes(31)),
        base64.b64encode(bytes.fromhex("302e020100300506032b65700422") + bytes(34)),
        base64.b64encode(bytes(32)),
    ],
    ids=["no base64", "empty", "a byte short", "another beginning", "the bare bytes"],
)
def test_a_key_file_with_another_content_is_refused(body: bytes, tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(b"-----BEGIN PRIVATE KEY-----\n" + body + b"\n-----END PRIVATE KEY-----\n")
    with pytest.raises(KeyFileError):
        load_private_key(path)


def test_an_agents_key_is_read_without_the_readers_of_all_other_formats(tmp_path: Path) -> None:
    save_private_key(tmp_path / "key.pem", generate_private_key())
    code = (
        "import sys; from pathlib import Path; from broker.protocol.keys import load_private_key\n"
        f"load_private_key(Path({str(tmp_path / 'key.pem')!r}))\n"
        "assert 'cryptography.hazmat.primitives.serialization' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
