"""The protobuf wire format, as far as CometBFT's messages use it. Pure.

A message is a frozen dataclass whose class says in `FIELDS` which attribute has which number and kind. Encoding is the
canonical one: fields by ascending number, nothing for a default value. So the bytes that CometBFT hashes (votes,
headers) come out as its own library writes them. Decoding passes over fields that a class does not name.

Source: https://protobuf.dev/programming-guides/encoding/
"""

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, ClassVar, Final, TypeVar

MAX_DEPTH: Final = 8
"""Messages inside messages. CometBFT's own go five deep."""

_VARINT: Final = 0
_FIXED_64: Final = 1
_LENGTH: Final = 2
_FIXED_32: Final = 5
_MAX_VARINT_BYTES: Final = 10
_UINT64: Final = 2**64


class MalformedProtobuf(ValueError):
    """Bytes that are no such message."""


class Kind(Enum):
    """How a field stands on the wire."""

    UNSIGNED = auto()
    """uint32, uint64 and enums"""
    SIGNED = auto()
    """int32 and int64: a negative number takes ten bytes"""
    BOOL = auto()
    BYTES = auto()
    TEXT = auto()


@dataclass(frozen=True, slots=True)
class Field:
    """One field. `kind` is a Kind, or the class of a message inside (None if absent); `repeated` ones are tuples."""

    number: int
    name: str
    kind: "Kind | type[Message]"
    repeated: bool = False


class Message:
    """What every message class offers; subclasses are dataclasses whose fields all have their protobuf default."""

    __slots__ = ()
    FIELDS: ClassVar[tuple[Field, ...]] = ()


_M = TypeVar("_M", bound=Message)


def encode(message: Message) -> bytes:
    """The canonical bytes of a message."""
    parts: list[bytes] = []
    for field in message.FIELDS:
        value = getattr(message, field.name)
        if field.repeated:
            if isinstance(field.kind, Kind) and field.kind not in (Kind.BYTES, Kind.TEXT):
                if value:
                    packed = b"".join([encode_varint(int(item) % _UINT64) for item in value])
                    parts += (encode_varint(field.number << 3 | _LENGTH), encode_varint(len(packed)), packed)
                continue
            for item in value:
                _append(parts, field, item)
        elif value or isinstance(value, Message):
            # A message inside is there or is None; one without content is still written, as gogoproto does.
            _append(parts, field, value)
    return b"".join(parts)


def decode(message_class: type[_M], raw: bytes | memoryview) -> _M:
    """A message from its bytes. Raises MalformedProtobuf."""
    return _decode(message_class, memoryview(raw), 0)


def wrapped(number: int, content: bytes) -> bytes:
    """A message whose only field is `content` under that number: how `oneof` envelopes look."""
    return encode_varint(number << 3 | _LENGTH) + encode_varint(len(content)) + content


def sole_field(raw: bytes) -> tuple[int, memoryview]:
    """Number and content of such a message's field. Raises MalformedProtobuf if it has another form."""
    view = memoryview(raw)
    tag, at = _varint(view, 0)
    content, at = _content(view, at, tag & 7)
    if not isinstance(content, memoryview) or at != len(view):
        raise MalformedProtobuf("an envelope that does not hold exactly one message")
    return tag >> 3, content


def encode_varint(value: int) -> bytes:
    """An unsigned varint of at most 64 bits."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def read_varint(raw: bytes | bytearray | memoryview, at: int) -> tuple[int, int] | None:
    """(value, position after it), None if the bytes end before it does. Raises MalformedProtobuf if it is too long."""
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        if at + index >= len(raw):
            return None
        byte = raw[at + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            if value >= _UINT64:
                break
            return value, at + index + 1
    raise MalformedProtobuf("a varint of more than 64 bits")


def _append(parts: list[bytes], field: Field, value: Any) -> None:
    kind = field.kind
    if isinstance(kind, Kind) and kind not in (Kind.BYTES, Kind.TEXT):
        parts += (encode_varint(field.number << 3 | _VARINT), encode_varint(int(value) % _UINT64))
        return
    if not isinstance(kind, Kind):
        content = encode(value)
    else:
        content = value.encode() if kind is Kind.TEXT else value
    parts += (encode_varint(field.number << 3 | _LENGTH), encode_varint(len(content)), content)


def _decode(message_class: type[_M], raw: memoryview, depth: int) -> _M:
    if depth > MAX_DEPTH:
        raise MalformedProtobuf(f"messages more than {MAX_DEPTH} deep")
    by_number = {field.number: field for field in message_class.FIELDS}
    values: dict[str, Any] = {}
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        content, at = _content(raw, at, tag & 7)
        field = by_number.get(tag >> 3)
        if field is None:
            continue
        if not field.repeated:
            values[field.name] = _value(field.kind, content, depth)
        elif isinstance(content, memoryview) and field.kind in (Kind.UNSIGNED, Kind.SIGNED):
            values[field.name] = values.get(field.name, ()) + _packed(field.kind, content)
        else:
            values.setdefault(field.name, []).append(_value(field.kind, content, depth))
    return message_class(**{name: tuple(value) if type(value) is list else value for name, value in values.items()})


def _content(raw: memoryview, at: int, wire_type: int) -> tuple[int | memoryview, int]:
    if wire_type == _VARINT:
        return _varint(raw, at)
    if wire_type == _LENGTH:
        length, at = _varint(raw, at)
    elif wire_type == _FIXED_64:
        length = 8
    elif wire_type == _FIXED_32:
        length = 4
    else:
        raise MalformedProtobuf(f"wire type {wire_type}")
    if at + length > len(raw):
        raise MalformedProtobuf("a field that is longer than its message")
    return raw[at : at + length], at + length


def _value(kind: Any, content: int | memoryview, depth: int) -> Any:
    if isinstance(content, int):
        if kind is Kind.UNSIGNED:
            return content
        if kind is Kind.SIGNED:
            return content - _UINT64 if content >= _UINT64 // 2 else content
        if kind is Kind.BOOL:
            return bool(content)
    elif kind is Kind.BYTES:
        return bytes(content)
    elif kind is Kind.TEXT:
        try:
            return str(content, "utf-8")
        except UnicodeDecodeError as error:
            raise MalformedProtobuf("a text that is not UTF-8") from error
    elif not isinstance(kind, Kind):
        return _decode(kind, content, depth + 1)
    raise MalformedProtobuf("a field of another wire type than its kind has")


def _packed(kind: Kind, content: memoryview) -> tuple[int, ...]:
    values = []
    at = 0
    while at < len(content):
        value, at = _varint(content, at)
        values.append(_value(kind, value, 0))
    return tuple(values)


def _varint(raw: memoryview, at: int) -> tuple[int, int]:
    found = read_varint(raw, at)
    if found is None:
        raise MalformedProtobuf("bytes that end inside a number")
    return found
