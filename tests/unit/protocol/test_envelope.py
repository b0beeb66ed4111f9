"""The envelope: what is signed, who is believed, and that no changed byte anywhere passes."""

import dataclasses
import tracemalloc
from hashlib import sha256

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.messages import any_message

from broker.protocol.envelope import Opened, Signer, open_envelope, parse, seal, sealed_id
from broker.protocol.errors import BadSignature, MalformedMessage, ProtocolError, UnknownKey
from broker.protocol.keys import P256_ORDER, Algorithm, PrivateKey, generate_private_key, public_key_from_cose
from broker.protocol.limits import MAX_METER_MESSAGE_BYTES
from broker.protocol.messages import MESSAGE_CLASSES, Batch, Carrier, Demand, MeterStatus, Quality, Reading

LEDGER = "ledger-1"
READING = Reading("meter-1", 0, 1800, 0, 500, Quality.MEASURED, Carrier.ELECTRICITY)
KEYS = {algorithm: generate_private_key(algorithm) for algorithm in Algorithm}
BOTH = pytest.mark.parametrize("key", KEYS.values(), ids=[algorithm.name for algorithm in KEYS])
ED25519 = KEYS[Algorithm.ED25519]
P256 = KEYS[Algorithm.ESP256]


def registered(key_id: bytes) -> Signer | None:
    for key in KEYS.values():
        if key.public.key_id == key_id:
            return Signer("meter-1", key.public)
    return None


def opened(raw: bytes) -> Opened:
    return open_envelope(raw, LEDGER, registered)


def with_parts(raw: bytes, **changes: object) -> bytes:
    """The envelope with protected, unprotected, payload or signature replaced, encoded as cbor2 does."""
    parts = dict(zip(("protected", "unprotected", "payload", "signature"), cbor2.loads(raw[1:]), strict=True))
    return cbor2.dumps(cbor2.CBORTag(18, list((parts | changes).values())))


def with_header(raw: bytes, **changes: object) -> bytes:
    """The envelope with entries of its protected header replaced (k1, k4, k16) or removed (None), signed again."""
    header = cbor2.loads(parse(raw).protected)
    for key, value in changes.items():
        header.pop(int(key[1:]), None) if value is None else header.update({int(key[1:]): value})
    return with_parts(raw, protected=cbor2.dumps(header))


@BOTH
def test_a_sealed_message_opens_with_its_sender_and_bytes(key: PrivateKey) -> None:
    raw = seal(READING, key, LEDGER, "meter-1")
    got = opened(raw)
    assert (got.message, got.sender, got.raw) == (READING, "meter-1", raw)
    assert got.message_id == sealed_id(raw, LEDGER, "meter-1")


def test_the_envelope_is_cose_sign1_over_what_rfc_9052_says() -> None:
    """Taken apart and verified by hand: nothing of envelope.py but seal() takes part."""
    raw = seal(READING, ED25519, LEDGER, "meter-1")
    tagged = cbor2.loads(raw)
    protected, unprotected, payload, signature = tagged.value
    assert tagged.tag == 18
    assert dict(unprotected) == {}
    assert cbor2.loads(protected) == {1: -19, 4: ED25519.public.key_id, 16: 65_001}
    assert payload == READING.to_payload()
    external_aad = cbor2.dumps([1, LEDGER, "meter-1"])
    to_be_signed = cbor2.dumps(["Signature1", protected, external_aad, payload])
    assert ED25519.public.verifies(signature, to_be_signed)
    assert sealed_id(raw, LEDGER, "meter-1") == sha256(to_be_signed).digest()


@given(any_message(), st.sampled_from(list(KEYS.values())))
def test_every_message_opens_as_it_was_sealed(message: object, key: PrivateKey) -> None:
    raw = seal(message, key, LEDGER, "meter-1")  # type: ignore[arg-type]
    if len(raw) <= type(message).MAX_BYTES:  # type: ignore[attr-defined]
        assert opened(raw).message == message


@BOTH
def test_a_message_sealed_again_is_the_same_bytes(key: PrivateKey) -> None:
    assert seal(READING, key, LEDGER, "meter-1") == seal(READING, key, LEDGER, "meter-1")


def test_the_id_does_not_depend_on_the_signature() -> None:
    raw = seal(READING, P256, LEDGER, "meter-1")
    other = with_parts(raw, signature=bytes(64))
    assert other != raw
    assert sealed_id(other, LEDGER, "meter-1") == sealed_id(raw, LEDGER, "meter-1")


def test_the_id_depends_on_type_ledger_sender_key_and_payload() -> None:
    demand = Demand(**{field.name: getattr(READING, field.name) for field in dataclasses.fields(READING)})
    ids = {
        sealed_id(seal(message, key, ledger, sender), ledger, sender)
        for message in (READING, demand, dataclasses.replace(READING, energy_wh=501))
        for key in KEYS.values()
        for ledger in (LEDGER, "ledger-2")
        for sender in ("meter-1", "meter-2")
    }
    assert len(ids) == 3 * 2 * 2 * 2


@BOTH
def test_a_message_for_another_ledger_is_refused(key: PrivateKey) -> None:
    with pytest.raises(BadSignature, match="same ledger id"):
        opened(seal(READING, key, "ledger-2", "meter-1"))


@BOTH
def test_a_message_that_another_sender_signed_is_refused(key: PrivateKey) -> None:
    with pytest.raises(BadSignature):
        opened(seal(READING, key, LEDGER, "meter-2"))


def test_a_message_that_claims_another_type_is_refused() -> None:
    """Reading and demand have equal payloads; the type in header and aad tells them apart."""
    with pytest.raises(BadSignature):
        opened(with_header(seal(READING, ED25519, LEDGER, "meter-1"), k16=65_002))


def test_an_unregistered_key_is_named() -> None:
    stranger = generate_private_key()
    with pytest.raises(UnknownKey, match=stranger.public.key_id.hex()):
        opened(seal(READING, stranger, LEDGER, "meter-1"))


def test_a_key_id_of_somebody_else_does_not_help() -> None:
    raw = seal(READING, generate_private_key(), LEDGER, "meter-1")
    with pytest.raises(BadSignature):
        opened(with_header(raw, k4=ED25519.public.key_id))


def test_the_algorithm_must_be_that_of_the_key() -> None:
    """A P-256 signer whose header says Ed25519 is refused, though the signature fits the bytes."""
    raw = with_header(seal(READING, P256, LEDGER, "meter-1"), k1=int(Algorithm.ED25519))
    envelope = parse(raw)
    external_aad = cbor2.dumps([1, LEDGER, "meter-1"])
    to_be_signed = cbor2.dumps(["Signature1", envelope.protected, external_aad, envelope.payload])
    with pytest.raises(BadSignature):
        opened(with_parts(raw, signature=P256.sign(to_be_signed)))


def test_the_high_s_twin_of_a_p256_signature_is_refused() -> None:
    raw = seal(READING, P256, LEDGER, "meter-1")
    signature = parse(raw).signature
    twin = signature[:32] + (P256_ORDER - int.from_bytes(signature[32:], "big")).to_bytes(32, "big")
    with pytest.raises(BadSignature):
        opened(with_parts(raw, signature=twin))


@BOTH
def test_every_flipped_bit_is_refused(key: PrivateKey) -> None:
    raw = seal(READING, key, LEDGER, "meter-1")
    for position in range(len(raw) * 8):
        flipped = bytearray(raw)
        flipped[position // 8] ^= 1 << (position % 8)
        with pytest.raises(ProtocolError):
            opened(bytes(flipped))


@BOTH
def test_every_cut_and_every_trailing_byte_is_refused(key: PrivateKey) -> None:
    raw = seal(READING, key, LEDGER, "meter-1")
    for length in range(len(raw)):
        with pytest.raises(MalformedMessage):
            parse(raw[:length])
    for extra in range(256):
        with pytest.raises(MalformedMessage):
            parse(raw + bytes((extra,)))


RAW = seal(READING, ED25519, LEDGER, "meter-1")
PARTS = cbor2.loads(RAW[1:])


MISSHAPEN = [
    b"",
    RAW[1:],
    cbor2.dumps(cbor2.CBORTag(98, PARTS)),
    b"\xd8\x12" + RAW[1:],
    b"\xd9\xd9\xf7" + RAW,
    b"\xd2\x98\x04" + RAW[2:],
    b"\xd2\x9f" + RAW[2:] + b"\xff",
    b"\xd2\x83" + RAW[2:],
    b"\xd2\x85" + RAW[2:] + b"\x00",
    with_parts(RAW, unprotected={4: b"x"}),
    with_parts(RAW, unprotected=[]),
    with_parts(RAW, unprotected=None),
    RAW.replace(b"\xa0", b"\xbf\xff", 1),
    with_parts(RAW, payload=None),
    with_parts(RAW, payload="text"),
    with_parts(RAW, protected={}),
    with_parts(RAW, protected=b""),
    with_parts(RAW, protected=b"\xa0"),
    with_parts(RAW, protected=b"\x80"),
    with_parts(RAW, protected=b"\x81" * 64),
    with_parts(RAW, protected=bytes(65)),
    with_parts(RAW, signature=bytes(63)),
    with_parts(RAW, signature=bytes(65)),
    with_parts(RAW, signature=b""),
    with_header(RAW, k1=None),
    with_header(RAW, k4=None),
    with_header(RAW, k16=None),
    with_header(RAW, k1=-8),
    with_header(RAW, k1=-7),
    with_header(RAW, k1=-19.0),
    with_header(RAW, k1="Ed25519"),
    with_header(RAW, k4=bytes(15)),
    with_header(RAW, k4=bytes(17)),
    with_header(RAW, k4="x" * 16),
    with_header(RAW, k16=65_000),
    with_header(RAW, k16=65_000 + max(MESSAGE_CLASSES) + 1),
    with_header(RAW, k16=65_001.0),
    with_header(RAW, k16="application/cose"),
    with_header(RAW, k2=[1]),
    with_parts(RAW, protected=cbor2.dumps({4: ED25519.public.key_id, 1: -19, 16: 65_001})),
    with_parts(RAW, protected=cbor2.dumps({True: -19, 4: ED25519.public.key_id, 16: 65_001})),
    with_parts(RAW, protected=parse(RAW).protected + b"\x00"),
]


# Numbered, because names made of the bytes would hold random keys and differ from process to process.
@pytest.mark.parametrize("wrong", MISSHAPEN, ids=[str(number) for number in range(len(MISSHAPEN))])
def test_a_misshapen_envelope_is_refused_before_any_key_is_looked_up(wrong: bytes) -> None:
    with pytest.raises(MalformedMessage):
        open_envelope(wrong, LEDGER, lambda key_id: pytest.fail("looked up"))


def test_a_message_over_the_limit_of_its_type_is_refused_before_any_key_is_looked_up() -> None:
    status = MeterStatus("meter-1", True, 0, 0, "f" * 400)
    assert len(seal(status, ED25519, LEDGER, "meter-1")) < MAX_METER_MESSAGE_BYTES
    padded = with_parts(RAW, payload=bytes(MAX_METER_MESSAGE_BYTES))
    with pytest.raises(MalformedMessage, match="reading: expected at most 1024 bytes"):
        open_envelope(padded, LEDGER, lambda key_id: pytest.fail("looked up"))
    batch = seal(Batch(0, (bytes(2_000),)), ED25519, LEDGER, "meter-1")
    assert isinstance(opened(batch).message, Batch)


def test_a_message_over_the_largest_limit_of_all_is_not_even_taken_apart() -> None:
    largest = max(message_class.MAX_BYTES for message_class in MESSAGE_CLASSES.values())
    with pytest.raises(MalformedMessage, match=f"^envelope: expected at most {largest} bytes"):
        parse(bytes(largest + 1))


def test_the_payload_is_decoded_only_after_the_signature_is_checked() -> None:
    unsigned = with_parts(RAW, payload=b"\xff")
    with pytest.raises(BadSignature):
        opened(unsigned)


def test_a_registered_sender_cannot_send_a_malformed_payload_either() -> None:
    class Nonsense(Reading):
        __slots__ = ()

        def to_payload(self) -> bytes:
            return b"\xa1\x18\x00\x00"

    fields = {field.name: getattr(READING, field.name) for field in dataclasses.fields(READING)}
    with pytest.raises(MalformedMessage):
        opened(seal(Nonsense(**fields), ED25519, LEDGER, "meter-1"))


@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        opened(raw)


@given(st.binary(max_size=80), st.binary(max_size=80), st.binary(max_size=80))
def test_arbitrary_bytes_in_the_shape_of_an_envelope_are_refused(
    protected: bytes, middle: bytes, payload: bytes
) -> None:
    strings = cbor2.dumps(protected), middle, cbor2.dumps(payload), cbor2.dumps(bytes(64))
    with pytest.raises(ProtocolError):
        opened(b"\xd2\x84" + b"".join(strings))
    with pytest.raises(ProtocolError):
        opened(with_parts(RAW, protected=protected))


@given(
    st.lists(st.tuples(st.integers(0, len(RAW) - 1), st.integers(0, 255)), min_size=1, max_size=6),
    st.sampled_from(["set", "insert", "delete"]),
)
def test_a_mutated_envelope_is_refused(changes: list[tuple[int, int]], kind: str) -> None:
    mutated = bytearray(RAW)
    for position, value in changes:
        if kind == "set":
            mutated[position] = value
        elif kind == "insert":
            mutated.insert(position, value)
        else:
            del mutated[position % len(mutated)]
    if bytes(mutated) != RAW:
        with pytest.raises(ProtocolError):
            opened(bytes(mutated))


@pytest.mark.parametrize(
    "inside",
    [
        b"\x81" * 1_000_000,
        b"\x9a\x00\x1e\x84\x80" + b"\x80" * 2_000_000,
        b"\x9b\x7f\xff\xff\xff\xff\xff\xff\xff",
        b"\x5b\x7f\xff\xff\xff\xff\xff\xff\xff",
        b"\x5a\xff\xff\xff\xff",
        b"\xbb\x7f\xff\xff\xff\xff\xff\xff\xff",
    ],
    ids=lambda raw: raw[:9].hex(),
)
def test_a_stranger_cannot_make_the_receiver_use_memory(inside: bytes) -> None:
    """In place of each part: what a bomb of the largest size costs stays below a few times its own bytes."""
    tail = cbor2.dumps(b"") + cbor2.dumps(bytes(64))
    bombs = [
        b"\xd2\x84" + inside + b"\xa0" + tail,
        b"\xd2\x84" + cbor2.dumps(parse(RAW).protected) + inside + tail,
        b"\xd2\x84" + cbor2.dumps(inside) + b"\xa0" + tail,
        with_parts(RAW, payload=inside),
    ]
    tracemalloc.start()
    try:
        for bomb in bombs:
            with pytest.raises(ProtocolError):
                opened(bomb)
        _now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(inside) + 100_000


@BOTH
def test_a_public_key_that_was_read_back_verifies_the_same_messages(key: PrivateKey) -> None:
    signer = Signer("meter-1", public_key_from_cose(key.public.cose_key))
    raw = seal(READING, key, LEDGER, "meter-1")
    assert open_envelope(raw, LEDGER, {key.public.key_id: signer}.get).message == READING
