"""Deterministic CBOR (RFC 8949 section 4.2): the one way in and out.

All map keys in the project are small integers, so bytewise and length-first key order agree and a map written in
ascending key order is deterministic. Decoding accepts only bytes that encode to themselves again: that alone refuses
non-minimal integers, indefinite lengths, duplicate keys and trailing bytes. Key order is checked by `check_key_order`,
called by the message decoder for each map it reads.
"""

from collections.abc import Iterable
from typing import Any, Final

import cbor2

from broker.protocol.errors import MalformedMessage
from broker.protocol.limits import MAX_NESTING


def encode(value: Any) -> bytes:
    """Encode ints, bytes, text, bools, None, lists, tuples and dicts whose keys already stand in ascending order."""
    return cbor2.dumps(value)


def decode(raw: bytes, where: str, max_bytes: int) -> Any:
    """Decode one deterministic CBOR item that fills `raw` exactly.

    Raises MalformedMessage (naming `where`) for anything else, including floats and tags, whose re-encoding differs or
    which the message decoder refuses by type.
    """
    if len(raw) > max_bytes:
        raise MalformedMessage(where, f"at most {max_bytes} bytes, got {len(raw)}")
    try:
        value = cbor2.loads(raw, max_depth=MAX_NESTING)
        same = cbor2.dumps(value) == raw
    # ArithmeticError: older versions turn tagged decimals into numbers while they read.
    except (cbor2.CBORError, RecursionError, ValueError, TypeError, ArithmeticError, MemoryError) as error:
        raise MalformedMessage(where, f"well-formed CBOR ({type(error).__name__})") from error
    if not same:
        raise MalformedMessage(where, "deterministic CBOR (minimal lengths, no duplicate keys, no trailing bytes)")
    return value


def check_key_order(keys: Iterable[Any], where: str) -> None:
    """Raise MalformedMessage unless `keys` are integers 0 to 23 in strictly ascending order."""
    previous = -1
    for key in keys:
        if type(key) is not int or not previous < key <= 23:
            raise MalformedMessage(where, "integer keys from 0 to 23 in ascending order")
        previous = key


_LEAST_LENGTH: Final = {0x58: 24, 0x59: 0x100, 0x5A: 0x10000}
"""From the first byte of a byte string to the least length that needs so long a head."""


def byte_string_head(length: int) -> bytes:
    """The head of a definite-length byte string (RFC 8949 section 3, major type 2), for lengths below 2^32."""
    if length < 24:
        return bytes((0x40 | length,))
    if length < 0x100:
        return bytes((0x58, length))
    if length < 0x10000:
        return b"\x59" + length.to_bytes(2, "big")
    return b"\x5a" + length.to_bytes(4, "big")


def read_byte_string(raw: bytes, at: int, where: str) -> tuple[bytes, int]:
    """The byte string whose encoding begins at `at`, and the position after it.

    Raises MalformedMessage unless it is a definite-length byte string with the shortest head that ends within `raw`.
    """
    first = raw[at] if at < len(raw) else None
    if first is None or not 0x40 <= first <= 0x5A:
        raise MalformedMessage(where, "a byte string of definite length")
    start, length, least = at + 1, first - 0x40, 0
    if first >= 0x58:
        # The length follows in 1, 2 or 4 bytes (RFC 8949 section 3) if it is too long for the head that is shorter.
        start += 1 << (first - 0x58)
        length = int.from_bytes(raw[at + 1 : start], "big")
        least = _LEAST_LENGTH[first]
    end = start + length
    if end > len(raw) or length < least:
        raise MalformedMessage(where, "a whole byte string behind the shortest head")
    return raw[start:end], end
