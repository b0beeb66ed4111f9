"""Public vectors (tests/vectors/README.md names their origin) against the CBOR, the signatures and COSE_Sign1 here."""

import base64
import json
from pathlib import Path
from typing import Any

import cbor2
import pytest

from broker.protocol import cbor, envelope
from broker.protocol.errors import MalformedMessage
from broker.protocol.keys import P256_ORDER, Algorithm, PublicKey, public_key_from_cose

VECTORS = Path(__file__).parents[2] / "vectors"


def load(name: str) -> Any:
    return json.loads((VECTORS / name).read_text())


APPENDIX_A = load("cbor_appendix_a.json")

# Encodings of appendix A that are valid, but not the deterministic one: indefinite lengths and long floats.
NOT_DETERMINISTIC = {
    entry["hex"]
    for entry in APPENDIX_A
    if not entry["roundtrip"] or entry["hex"] in ("5f42010243030405ff", "7f657374726561646d696e67ff")
}


@pytest.mark.parametrize(
    "entry",
    [
        e
        for e in APPENDIX_A
        if "decoded" in e and e["hex"] not in NOT_DETERMINISTIC and not isinstance(e["decoded"], float)
    ],
    ids=lambda entry: entry["hex"],
)
def test_rfc_8949_examples_that_are_deterministic_decode_and_encode_to_themselves(entry: dict[str, Any]) -> None:
    raw = bytes.fromhex(entry["hex"])
    assert cbor.decode(raw, "example", 100) == entry["decoded"]
    assert cbor.encode(cbor.decode(raw, "example", 100)) == raw


@pytest.mark.parametrize("encoded", sorted(NOT_DETERMINISTIC))
def test_rfc_8949_examples_that_are_not_deterministic_are_refused(encoded: str) -> None:
    with pytest.raises(MalformedMessage):
        cbor.decode(bytes.fromhex(encoded), "example", 100)


@pytest.mark.parametrize("entry", APPENDIX_A, ids=lambda entry: entry["hex"])
def test_rfc_8949_examples_either_come_back_as_they_were_or_are_refused(entry: dict[str, Any]) -> None:
    raw = bytes.fromhex(entry["hex"])
    try:
        value = cbor.decode(raw, "example", 100)
    except MalformedMessage:
        return
    assert cbor.encode(value) == raw


def test_byte_strings_and_integer_maps_of_rfc_8949() -> None:
    """These stand in diagnostic notation in the vectors, since JSON cannot say them."""
    examples = {entry["hex"] for entry in APPENDIX_A}
    for encoded, value in {"40": b"", "4401020304": b"\1\2\3\4", "a201020304": {1: 2, 3: 4}}.items():
        assert encoded in examples
        assert cbor.decode(bytes.fromhex(encoded), "example", 100) == value


def ed25519(x: bytes) -> PublicKey:
    return public_key_from_cose(cbor2.dumps({1: 1, -1: 6, -2: x}))


def p256(x: bytes, y: bytes) -> PublicKey:
    return public_key_from_cose(cbor2.dumps({1: 2, -1: 1, -2: x, -3: y}))


def cases(name: str) -> list[Any]:
    return [
        pytest.param(bytes.fromhex(group["key"]), case, id=str(case["id"]))
        for group in load(name)
        for case in group["tests"]
    ]


@pytest.mark.parametrize(("key", "case"), cases("wycheproof_ed25519.json"))
def test_wycheproof_ed25519(key: bytes, case: dict[str, Any]) -> None:
    assert ed25519(key).verifies(bytes.fromhex(case["sig"]), bytes.fromhex(case["msg"])) is case["valid"]


@pytest.mark.parametrize(("key", "case"), cases("wycheproof_p256_sha256_p1363.json"))
def test_wycheproof_p256(key: bytes, case: dict[str, Any]) -> None:
    public, signature, message = p256(key[:32], key[32:]), bytes.fromhex(case["sig"]), bytes.fromhex(case["msg"])
    s = int.from_bytes(signature[32:], "big")
    high_s = len(signature) == 64 and s > P256_ORDER // 2
    assert public.verifies(signature, message) is (case["valid"] and not high_s)
    if case["valid"] and high_s:
        assert public.verifies(signature[:32] + (P256_ORDER - s).to_bytes(32, "big"), message)


def from_base64url(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


# The key "11" of the sign1-tests.
COSE_WG_P256 = p256(
    from_base64url("usWxHK2PmfnHKwXPS54m0kTcGJ90UiglWiGahtagnv8"),
    from_base64url("IBOL-C3BttVivg-lSreASjpkttcsz-1rb7btKLv8EX4"),
)


def low_s(signature: bytes) -> bytes:
    s = int.from_bytes(signature[32:], "big")
    return signature[:32] + min(s, P256_ORDER - s).to_bytes(32, "big")


def verify_cose_sign1(raw: bytes, key: PublicKey, external_aad: bytes, tag_required: bool) -> bytes:
    """A COSE_Sign1 verifier for any header, built on the Sig_structure and the keys of the protocol.

    It also takes the older algorithm numbers -8 (EdDSA) and -7 (ES256) in either header, which the protocol itself
    does not. Returns what was signed. Raises ValueError if the message is not a valid one of `key`.
    """
    item = cbor2.loads(raw)
    if isinstance(item, cbor2.CBORTag):
        if item.tag != 18:
            raise ValueError("another tag")
        item = item.value
    elif tag_required:
        raise ValueError("no tag")
    protected, unprotected, payload, signature = item
    header = dict(unprotected) | dict(cbor2.loads(protected) if protected else {})
    if header[1] not in {Algorithm.ED25519: (-19, -8), Algorithm.ESP256: (-9, -7)}[key.algorithm]:
        raise ValueError("another algorithm")
    # As RFC 9052 section 4.4 wants it: an empty protected header is signed as an empty string.
    signed = b"" if protected == b"\xa0" else protected
    to_be_signed = envelope._sig_head(signed, external_aad) + envelope._as_byte_string(payload)
    if not key.verifies(low_s(signature) if key.algorithm is Algorithm.ESP256 else signature, to_be_signed):
        raise ValueError("the signature does not fit")
    return to_be_signed


@pytest.mark.parametrize("example", load("cose_sign1.json"), ids=lambda example: example["title"])
def test_cose_wg_sign1_examples(example: dict[str, Any]) -> None:
    key = ed25519(bytes.fromhex(example["x"])) if "x" in example else COSE_WG_P256
    raw = bytes.fromhex(example["cbor"])
    external_aad = bytes.fromhex(example.get("external", ""))
    if example.get("fail"):
        with pytest.raises(ValueError, match=r"another (tag|algorithm)|does not fit"):
            verify_cose_sign1(raw, key, external_aad, tag_required=False)
    else:
        signed = verify_cose_sign1(raw, key, external_aad, tag_required=False)
        assert signed == bytes.fromhex(example["to_be_signed"])


@pytest.mark.parametrize("example", load("cose_sign1.json"), ids=lambda example: example["title"])
def test_no_foreign_cose_message_is_taken_for_one_of_the_protocol(example: dict[str, Any]) -> None:
    with pytest.raises(MalformedMessage):
        envelope.parse(bytes.fromhex(example["cbor"]))
