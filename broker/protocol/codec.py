"""How message fields become CBOR and back: a small declarative codec, strict in both directions.

A message class lists its fields as `Field(key, name, codec)`. Each codec checks type and range; decoding raises
MalformedMessage that names message and field. There is no coercion: what is accepted is exactly what would be written.
"""

import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, Protocol

from broker.protocol import cbor
from broker.protocol.errors import MalformedMessage
from broker.protocol.limits import MAX_INTEGER, MAX_NAME_CHARACTERS

_AS_IT_IS: Final = frozenset((int, str, bytes, bool))
"""What has one of these types, and not a subclass of it, is its own CBOR data whatever the codec."""

_NAME: Final = re.compile(rf"[a-z0-9][a-z0-9-]{{0,{MAX_NAME_CHARACTERS - 1}}}")


class Codec(Protocol):
    """Turns one field's value into CBOR data and back."""

    def encode(self, value: Any) -> Any: ...

    def decode(self, data: Any, where: str) -> Any: ...


def is_name(text: str) -> bool:
    """True for a name of a party, broker, meter or ledger: lower case, digits and hyphens; fit for topics and DNS."""
    return _NAME.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Unsigned:
    """An integer from `minimum` to `maximum`."""

    maximum: int = MAX_INTEGER
    minimum: int = 0

    def encode(self, value: Any) -> Any:
        return value

    def decode(self, data: Any, where: str) -> int:
        if type(data) is not int or not self.minimum <= data <= self.maximum:
            only = self.minimum == self.maximum
            raise MalformedMessage(
                where, str(self.minimum) if only else f"an integer from {self.minimum} to {self.maximum}"
            )
        return data


@dataclass(frozen=True, slots=True)
class Boolean:
    """True or false, never 1 or 0."""

    def encode(self, value: Any) -> Any:
        return value

    def decode(self, data: Any, where: str) -> bool:
        if type(data) is not bool:
            raise MalformedMessage(where, "true or false")
        return data


@dataclass(frozen=True, slots=True)
class Name:
    """The name of a party, broker, meter or ledger."""

    def encode(self, value: Any) -> Any:
        return value

    def decode(self, data: Any, where: str) -> str:
        if type(data) is not str or not is_name(data):
            raise MalformedMessage(where, f"a name of 1 to {MAX_NAME_CHARACTERS} characters a-z, 0-9 and -")
        return data


@dataclass(frozen=True, slots=True)
class Text:
    """Text for people, bounded."""

    max_characters: int

    def encode(self, value: Any) -> Any:
        return value

    def decode(self, data: Any, where: str) -> str:
        if type(data) is not str or len(data) > self.max_characters:
            raise MalformedMessage(where, f"text of at most {self.max_characters} characters")
        return data


@dataclass(frozen=True, slots=True)
class Bytes:
    """A byte string of `minimum` to `maximum` bytes."""

    minimum: int
    maximum: int

    def encode(self, value: Any) -> Any:
        return value

    def decode(self, data: Any, where: str) -> bytes:
        if type(data) is not bytes or not self.minimum <= len(data) <= self.maximum:
            raise MalformedMessage(where, f"{self.minimum} to {self.maximum} bytes")
        return data


@dataclass(frozen=True, slots=True)
class Choice:
    """A member of a closed set, sent as its number."""

    enum: type[IntEnum]

    def encode(self, value: Any) -> Any:
        return int(value)

    def decode(self, data: Any, where: str) -> IntEnum:
        # The lookup table behind an enum class, because calling the class costs ten times as much.
        member = self.enum._value2member_map_.get(data) if type(data) is int else None
        if member is None:
            raise MalformedMessage(where, "one of " + ", ".join(f"{m.value} ({m.name.lower()})" for m in self.enum))
        return member  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class Many:
    """An array of at most `maximum` equal items, as a tuple."""

    item: Codec
    maximum: int
    minimum: int = 0

    def encode(self, value: Any) -> Any:
        return tuple([self.item.encode(item) for item in value])

    def decode(self, data: Any, where: str) -> tuple[Any, ...]:
        if type(data) is not list or not self.minimum <= len(data) <= self.maximum:
            raise MalformedMessage(where, f"an array of {self.minimum} to {self.maximum} items")
        return tuple([self.item.decode(item, where) for item in data])


@dataclass(frozen=True, slots=True)
class Row:
    """A fixed array of different items, as the value class `into` (a dataclass with slots, or a named tuple), or as a
    tuple if that is None.
    """

    items: tuple[Codec, ...]
    into: Any = None

    def encode(self, value: Any) -> Any:
        if not isinstance(value, tuple):
            value = [getattr(value, name) for name in self.into.__slots__]
        # Arrays are tuples here: cbor2 takes a third less time over them than over lists.
        return tuple(
            [
                item if type(item) in _AS_IT_IS else codec.encode(item)
                for codec, item in zip(self.items, value, strict=True)
            ]
        )

    def decode(self, data: Any, where: str) -> Any:
        if type(data) is not list or len(data) != len(self.items):
            raise MalformedMessage(where, f"an array of {len(self.items)} items")
        values = [codec.decode(item, where) for codec, item in zip(self.items, data, strict=True)]
        return tuple(values) if self.into is None else self.into(*values)


@dataclass(frozen=True, slots=True)
class Field:
    """One entry of a message map. An optional field is absent when its value is None."""

    key: int
    name: str
    codec: Codec
    optional: bool = False


def encode_fields(fields: tuple[Field, ...], value: Any) -> dict[int, Any]:
    """The CBOR map of a value class; `fields` stand in ascending key order."""
    data = {}
    for field in fields:
        item = getattr(value, field.name)
        if item is not None or not field.optional:
            data[field.key] = item if type(item) in _AS_IT_IS else field.codec.encode(item)
    return data


def decode_fields(fields: tuple[Field, ...], data: Any, where: str) -> list[Any]:
    """The values of a CBOR map in the order of `fields`; absent optional ones are None.

    Raises MalformedMessage for a missing, unknown or wrong entry.
    """
    if type(data) is not dict:
        raise MalformedMessage(where, "a map")
    cbor.check_key_order(data, where)
    values = []
    seen = 0
    try:
        for field in fields:
            if field.key in data:
                values.append(field.codec.decode(data[field.key], field.name))
                seen += 1
            elif field.optional:
                values.append(None)
            else:
                raise MalformedMessage(field.name, "to be present")
    except MalformedMessage as error:
        # Named in full only now: nearly everything is well formed, and this is on the hot path.
        raise MalformedMessage(f"{where}.{error.where}", error.expected) from None
    if seen != len(data):
        known = {field.key for field in fields}
        raise MalformedMessage(where, f"no keys but {sorted(known)}, got {sorted(set(data) - known)}")
    return values
