"""Only deterministic CBOR comes in, whatever stands in it, and nothing but MalformedMessage comes out for the rest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.protocol import cbor
from broker.protocol.errors import MalformedMessage
from broker.protocol.limits import MAX_NESTING

SCALARS = st.one_of(st.integers(-(2**64), 2**64 - 1), st.binary(max_size=40), st.text(max_size=40), st.booleans())
DATA = st.recursive(
    SCALARS | st.none(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.integers(0, 23), inner, max_size=4).map(lambda entries: dict(sorted(entries.items())))
    ),
    max_leaves=20,
)


@given(DATA)
def test_what_is_encoded_decodes_to_the_same(value: object) -> None:
    assert cbor.decode(cbor.encode(value), "test", 1_000_000) == value


@pytest.mark.parametrize(
    ("why", "encoded"),
    [
        ("integer in two bytes that fits in one", "1817"),
        ("integer in three bytes that fits in two", "1900ff"),
        ("integer in five bytes that fits in three", "1a0000ffff"),
        ("integer in nine bytes that fits in five", "1b00000000ffffffff"),
        ("negative integer in two bytes that fits in one", "3817"),
        ("byte string length in two bytes that fits in one", "580161"),
        ("text length in two bytes that fits in one", "780161"),
        ("array length in two bytes that fits in one", "980100"),
        ("map length in two bytes that fits in one", "b8010000"),
        ("indefinite array", "9f00ff"),
        ("indefinite map", "bf0000ff"),
        ("indefinite byte string", "5f4161ff"),
        ("indefinite text", "7f6161ff"),
        ("the same key twice", "a200010002"),
        ("trailing byte", "0000"),
        ("trailing break", "00ff"),
        ("single-precision float", "fa3fc00000"),
        ("a big number that fits an integer", "c24101"),
        ("a shared reference", "d81c80"),
        ("nothing", ""),
        ("cut short", "8200"),
        ("text that is no UTF-8", "61ff"),
        ("a decimal fraction with an absurd exponent", "c4821b7fffffffffffffff01"),
        ("a big float with an absurd exponent", "c5821b7fffffffffffffff01"),
        ("a length that no memory holds", "9b7fffffffffffffff"),
        ("a string length that no memory holds", "5b7fffffffffffffff"),
        ("a reserved head", "1c"),
        ("a lone break", "ff"),
    ],
)
def test_other_encodings_are_refused(why: str, encoded: str) -> None:
    with pytest.raises(MalformedMessage):
        cbor.decode(bytes.fromhex(encoded), "test", 1_000)


@pytest.mark.parametrize("opening", [b"\x81", b"\xa1\x00", b"\xc6"])
def test_a_nesting_bomb_is_refused(opening: bytes) -> None:
    with pytest.raises(MalformedMessage):
        cbor.decode(opening * 100_000 + b"\x00", "test", 1_000_000)


def test_nesting_ends_at_the_limit() -> None:
    """cbor2 5.9 counts the innermost value as a level, 6 does not; both refuse one beyond the limit."""
    cbor.decode(b"\x81" * (MAX_NESTING - 1) + b"\x00", "test", 1_000)
    with pytest.raises(MalformedMessage):
        cbor.decode(b"\x81" * (MAX_NESTING + 1) + b"\x00", "test", 1_000)


def test_size_is_checked_before_anything_is_read() -> None:
    assert cbor.decode(b"\x43abc", "test", 4) == b"abc"
    with pytest.raises(MalformedMessage, match=r"test: expected at most 3 bytes, got 4"):
        cbor.decode(b"\x43abc", "test", 3)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_either_decode_to_themselves_or_are_refused(raw: bytes) -> None:
    try:
        value = cbor.decode(raw, "test", 1_000)
    except MalformedMessage:
        return
    assert cbor.encode(value) == raw


@pytest.mark.parametrize(
    "keys", [[1, 0], [0, 0], [24], [-1], ["a"], [True], [1.0], [None], [b"a"]], ids=lambda keys: repr(keys)
)
def test_keys_out_of_order_or_range_are_refused(keys: list[object]) -> None:
    with pytest.raises(MalformedMessage):
        cbor.check_key_order(keys, "test")


def test_all_keys_in_order_pass() -> None:
    cbor.check_key_order(range(24), "test")


@pytest.mark.parametrize("length", [0, 1, 23, 24, 255, 256, 65_535, 65_536])
def test_byte_strings_are_read_as_they_are_written(length: int) -> None:
    encoded = cbor.encode(bytes(length))
    assert cbor.byte_string_head(length) + bytes(length) == encoded
    assert cbor.read_byte_string(b"\x00" + encoded + b"\x00", 1, "test") == (bytes(length), len(encoded) + 1)


@pytest.mark.parametrize(
    "encoded",
    ["", "00", "60", "5f40ff", "5b0000000000000000", "5817" + "00" * 23, "590001aa", "4100"[:2], "59", "5901"],
)
def test_a_byte_string_is_read_only_whole_and_with_the_shortest_head(encoded: str) -> None:
    with pytest.raises(MalformedMessage):
        cbor.read_byte_string(bytes.fromhex(encoded), 0, "test")
