"""Signing keys: Ed25519 (the default) and P-256, because TPMs and ATECC608 secure elements only do P-256.

A key travels as a COSE_Key (RFC 9052 section 7) and is named by the first 16 bytes of its SHA-256 thumbprint
(RFC 9679). Signatures are raw: 64 bytes of Ed25519 (RFC 8032), or r‖s of ECDSA with SHA-256, s in the lower half of the
group order and the nonce deterministic (RFC 6979), so that the same message signed twice gives the same bytes.
"""

import base64
import binascii
import os
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import cbor2
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, Hash

from broker.protocol import cbor
from broker.protocol.errors import KeyFileError, MalformedMessage
from broker.protocol.files import read_file

SIGNATURE_BYTES: Final = 64
KEY_ID_BYTES: Final = 16
_MAX_COSE_KEY_BYTES: Final = 128
_MAX_KEY_FILE_BYTES: Final = 65_536

# SEC 2, section 2.4.2: the order of the group of P-256.
P256_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551

# RFC 8410, section 7: what comes before the 32 bytes of an Ed25519 key in PKCS #8.
_ED25519_PKCS8: Final = bytes.fromhex("302e020100300506032b657004220420")
_PEM_START: Final = b"-----BEGIN PRIVATE KEY-----"
_PEM_END: Final = b"-----END PRIVATE KEY-----"


class Algorithm(IntEnum):
    """Fully specified COSE algorithms (RFC 9864)."""

    ED25519 = -19
    ESP256 = -9


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A verification key. `cose_key` is its deterministic COSE_Key encoding and the only thing that is stored."""

    algorithm: Algorithm
    cose_key: bytes
    key_id: bytes
    _key: Any = field(repr=False, compare=False, hash=False)

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """True if `signature` (64 raw bytes) is this key's signature of `message`; for P-256 only with low s."""
        if len(signature) != SIGNATURE_BYTES:
            return False
        try:
            if self.algorithm is Algorithm.ED25519:
                self._key.verify(signature, message)
                return True
            r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
            if not 0 < r < P256_ORDER or not 0 < s <= P256_ORDER // 2:
                return False
            self._key.verify(encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            return False
        return True

    def ed25519_bytes(self) -> bytes:
        """The 32 bytes of an Ed25519 key, as other programs write it. Raises ValueError for another algorithm."""
        if self.algorithm is not Algorithm.ED25519:
            raise ValueError("not an Ed25519 key")
        raw: bytes = self._key.public_bytes_raw()
        return raw


@dataclass(frozen=True, slots=True)
class PrivateKey:
    """A signing key with its public half."""

    public: PublicKey
    _key: Any = field(repr=False, compare=False, hash=False)

    def sign(self, message: bytes) -> bytes:
        """The raw 64-byte signature of `message`; the same message always gives the same bytes."""
        if self.public.algorithm is Algorithm.ED25519:
            signature: bytes = self._key.sign(message)
            return signature
        r, s = decode_dss_signature(self._key.sign(message, ec.ECDSA(hashes.SHA256(), deterministic_signing=True)))
        return r.to_bytes(32, "big") + min(s, P256_ORDER - s).to_bytes(32, "big")

    def ed25519_seed(self) -> bytes:
        """The 32 secret bytes of an Ed25519 key, for another program's key file. Raises ValueError for P-256."""
        if self.public.algorithm is not Algorithm.ED25519:
            raise ValueError("not an Ed25519 key")
        seed: bytes = self._key.private_bytes_raw()
        return seed


def generate_private_key(algorithm: Algorithm = Algorithm.ED25519) -> PrivateKey:
    """A new key from the operating system's random source."""
    if algorithm is Algorithm.ED25519:
        return _private(ed25519.Ed25519PrivateKey.generate())
    return _private(ec.generate_private_key(ec.SECP256R1()))


@lru_cache(maxsize=65_536)
def public_key_from_cose(cose_key: bytes) -> PublicKey:
    """Read a COSE_Key: OKP/Ed25519 {1: 1, -1: 6, -2: x} or EC2/P-256 {1: 2, -1: 1, -2: x, -3: y}.

    Raises MalformedMessage for any other key or encoding. Cached: loading a key costs about as much as using it.
    """
    value = cbor.decode(cose_key, "COSE_Key", _MAX_COSE_KEY_BYTES)
    if not isinstance(value, dict):
        raise MalformedMessage("COSE_Key", "a map")
    public = None
    try:
        if list(value) == [1, -1, -2]:
            public = _public(ed25519.Ed25519PublicKey.from_public_bytes(value[-2]))
        elif list(value) == [1, -1, -2, -3] and type(value[-2]) is type(value[-3]) is bytes:
            point = b"\x04" + value[-2] + value[-3]
            public = _public(ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point))
    except (ValueError, TypeError) as error:
        raise MalformedMessage("COSE_Key", "a point of its curve") from error
    # Key type and curve are compared with the rest, as bytes: in Python True and 1.0 equal 1 as well.
    if public is None or public.cose_key != cose_key:
        raise MalformedMessage("COSE_Key", "an Ed25519 or P-256 public key")
    return public


def save_private_key(path: Path, key: PrivateKey) -> None:
    """Write PKCS #8 PEM, readable by its owner only. Raises FileExistsError rather than overwrite a key."""
    from cryptography.hazmat.primitives import serialization

    pem = key._key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())


def load_private_key(path: Path) -> PrivateKey:
    """Read an Ed25519 or P-256 private key in PEM. Raises KeyFileError saying what is wrong and what to do."""
    try:
        raw = read_file(path, _MAX_KEY_FILE_BYTES)
    except FileNotFoundError as error:
        raise KeyFileError(str(path), f"{error.strerror}; make a key with `energy-broker key new {path}`") from error
    except OSError as error:
        raise KeyFileError(str(path), f"{error.strerror}; check the path and who may read it") from error
    usual = _usual_key(raw)
    if usual is not None:
        return _private(usual)
    from cryptography.hazmat.primitives import serialization

    try:
        key = serialization.load_pem_private_key(raw, password=None)
    except (ValueError, TypeError) as error:
        raise KeyFileError(
            str(path), "not an unencrypted private key in PEM, as `energy-broker key new` makes one"
        ) from error
    if isinstance(key, ed25519.Ed25519PrivateKey) or (
        isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1)
    ):
        return _private(key)
    raise KeyFileError(str(path), "expected an Ed25519 or P-256 key, as `energy-broker key new` makes one")


def _usual_key(pem: bytes) -> ed25519.Ed25519PrivateKey | None:
    """The Ed25519 key in a file as `save_private_key` writes it, None for any other file.

    The library's own reader brings all formats that keys and certificates ever had: 1.5 MB of an agent's memory.
    """
    text = pem.strip()
    if not text.startswith(_PEM_START) or not text.endswith(_PEM_END):
        return None
    try:
        der = base64.b64decode(text[len(_PEM_START) : -len(_PEM_END)].strip(), validate=True)
    except binascii.Error:
        return None
    seed = der.removeprefix(_ED25519_PKCS8)
    if len(seed) != 32 or len(der) != len(_ED25519_PKCS8) + 32:
        return None
    return ed25519.Ed25519PrivateKey.from_private_bytes(seed)


def _private(key: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> PrivateKey:
    return PrivateKey(_public(key.public_key()), key)


def _public(key: ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey) -> PublicKey:
    if isinstance(key, ed25519.Ed25519PublicKey):
        algorithm = Algorithm.ED25519
        cose_key = cbor2.dumps({1: 1, -1: 6, -2: key.public_bytes_raw()})
    else:
        algorithm = Algorithm.ESP256
        numbers = key.public_numbers()
        cose_key = cbor2.dumps({1: 2, -1: 1, -2: numbers.x.to_bytes(32, "big"), -3: numbers.y.to_bytes(32, "big")})
    digest = Hash(SHA256())
    digest.update(cose_key)
    return PublicKey(algorithm, cose_key, digest.finalize()[:KEY_ID_BYTES], key)
