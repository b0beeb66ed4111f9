"""Random valid messages for hypothesis, made from the FIELDS table of each message class."""

from typing import Any

from hypothesis import strategies as st

from broker.protocol.codec import Boolean, Bytes, Choice, Field, Many, Name, Row, Text, Unsigned
from broker.protocol.messages import MESSAGE_CLASSES, Genesis, Message, Report

ALL_CLASSES: tuple[type[Any], ...] = (*MESSAGE_CLASSES.values(), Report, Genesis)

_FIRST = "abcdefghijklmnopqrstuvwxyz0123456789"


def values(codec: Any) -> st.SearchStrategy[Any]:
    """Values that a field with this codec takes, limits included; long ones are kept small for speed."""
    match codec:
        case Unsigned(maximum=maximum, minimum=minimum):
            return st.one_of(st.integers(minimum, maximum), st.sampled_from([minimum, maximum]))
        case Boolean():
            return st.booleans()
        case Name():
            return st.builds(
                lambda first, rest: first + rest, st.sampled_from(_FIRST), st.text(_FIRST + "-", max_size=62)
            )
        case Text(max_characters=limit):
            return st.text(st.characters(exclude_categories=["Cs"]), max_size=min(limit, 40))
        case Bytes(minimum=minimum, maximum=maximum):
            return st.binary(min_size=minimum, max_size=min(maximum, minimum + 24))
        case Choice(enum=enum):
            return st.sampled_from(list(enum))
        case Many(item=item, maximum=maximum, minimum=minimum):
            return st.lists(values(item), min_size=minimum, max_size=min(maximum, minimum + 3)).map(tuple)
        case Row(items=items, into=into):
            cells = st.tuples(*(values(item) for item in items))
            return cells if into is None else cells.map(lambda row: into(*row))
    raise TypeError(f"no values for {codec!r}; add the codec here")


def _field_values(field: Field) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), values(field.codec)) if field.optional else values(field.codec)


def messages_of(message_class: type[Any]) -> st.SearchStrategy[Any]:
    """Random valid values of one message class, or of Report or Genesis."""
    fields: tuple[Field, ...] = message_class.FIELDS
    return st.tuples(*(_field_values(field) for field in fields)).map(lambda parts: message_class(*parts))


def any_message() -> st.SearchStrategy[Message]:
    """Random valid messages of all signed classes."""
    return st.one_of([messages_of(message_class) for message_class in MESSAGE_CLASSES.values()])


def payload_of(value: Any) -> bytes:
    """The encoded map of a message, Report or Genesis."""
    payload: bytes = value.to_payload() if isinstance(value, Message) else value.to_bytes()
    return payload


def read_payload(message_class: type[Any], payload: bytes) -> Any:
    """Decode what payload_of gave."""
    reader = message_class.from_payload if issubclass(message_class, Message) else message_class.from_bytes
    return reader(payload)
