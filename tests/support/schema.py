"""Holds captured MQTT traffic against the published schema (CDDL files and asyncapi.yaml), independently of the codec.

`validate_traffic([(topic, payload), …])` raises SchemaError for the first message that is on no known topic, of a type
that does not belong there, over its limit, or not of its CDDL rule. Batches, blocks and pages are opened, and what is
inside them is checked as well.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cbor2
import yaml

import broker.protocol
from support import cddl

SCHEMA_FOLDER = Path(broker.protocol.__file__).parent / "schema"
_ROOT = "dengen/v1/"


class SchemaError(AssertionError):
    """Traffic that the published schema does not allow."""


@dataclass(frozen=True, slots=True)
class MessageRule:
    """What asyncapi.yaml says about a message: CDDL rule, type in the header (None: no envelope), limit."""

    name: str
    rule: str
    message_type: int | None
    max_bytes: int


@dataclass(frozen=True, slots=True)
class Channel:
    """One topic pattern with the messages that may stand there."""

    name: str
    pattern: re.Pattern[str]
    messages: tuple[MessageRule, ...]


@cache
def asyncapi() -> dict[str, Any]:
    """The AsyncAPI page as data."""
    page: dict[str, Any] = yaml.safe_load((SCHEMA_FOLDER / "asyncapi.yaml").read_text())
    return page


@cache
def channels() -> tuple[Channel, ...]:
    """All channels of the AsyncAPI page, addresses below the root."""
    page = asyncapi()
    described = page["components"]["messages"]
    found = []
    for name, channel in page["channels"].items():
        address = re.escape(channel["address"].removeprefix(_ROOT))
        pattern = re.compile(re.sub(r"\\\{\w+\\\}", "[a-z0-9][a-z0-9-]{0,62}", address))
        rules = tuple(
            MessageRule(key, described[key]["x-rule"], described[key]["x-type"], described[key]["x-max-bytes"])
            for key in channel["messages"]
        )
        found.append(Channel(name, pattern, rules))
    return tuple(found)


@cache
def cddl_text() -> str:
    """All CDDL files one after the other."""
    return "\n".join(path.read_text() for path in sorted(SCHEMA_FOLDER.glob("*.cddl")))


@cache
def _rules() -> dict[str, Any]:
    return cddl.parse_rules(cddl_text())


def require(rule: str, raw: bytes, where: str) -> None:
    """Raise SchemaError, saying why, unless the CBOR `raw` is of the CDDL rule of that name."""
    try:
        cddl.check(_rules(), rule, raw)
    except cddl.Mismatch as error:
        raise SchemaError(f"{where}: not a {rule}: {error}") from error


def follows(rule: str, raw: bytes) -> bool:
    """True if the CBOR `raw` is of the CDDL rule of that name."""
    try:
        require(rule, raw, rule)
    except SchemaError:
        return False
    return True


def schema_check(topic: str, payload: bytes, root: str = "dengen/v1") -> str:
    """Check one message and return the name of its channel. Raises SchemaError."""
    below = topic.removeprefix(root + "/") if topic.startswith(root + "/") else None
    channel = next((c for c in channels() if below is not None and c.pattern.fullmatch(below)), None)
    if channel is None:
        raise SchemaError(f"{topic}: no channel of asyncapi.yaml")
    by_type = {rule.message_type: rule for rule in channel.messages}
    if None in by_type:
        _check_size(by_type[None], payload, topic)
        require(by_type[None].rule, payload, topic)
        return channel.name
    message_type, inner = open_checked(payload, topic)
    if message_type not in by_type:
        raise SchemaError(f"{topic}: message type {message_type} does not belong here")
    _check_size(by_type[message_type], payload, topic)
    require(by_type[message_type].rule, inner, topic)
    _check_inside(by_type[message_type].rule, cbor2.loads(inner), topic)
    return channel.name


def validate_traffic(messages: Iterable[tuple[str, bytes]], root: str = "dengen/v1") -> dict[str, int]:
    """Check captured messages, and return how many there were on each channel. Raises SchemaError."""
    counts: dict[str, int] = {}
    for topic, payload in messages:
        channel = schema_check(topic, payload, root)
        counts[channel] = counts.get(channel, 0) + 1
    return counts


def open_checked(raw: bytes, where: str) -> tuple[int, bytes]:
    """Message type and payload of an envelope that follows envelope.cddl. Raises SchemaError."""
    require("envelope", raw, where)
    protected, _unprotected, payload, _signature = cbor2.loads(raw).value
    require("protected-header", protected, where)
    return cbor2.loads(protected)[16] - 65_000, payload


def _check_size(rule: MessageRule, payload: bytes, where: str) -> None:
    if len(payload) > rule.max_bytes:
        raise SchemaError(f"{where}: {len(payload)} bytes, at most {rule.max_bytes}")


def _check_inside(rule: str, message: dict[int, Any], where: str) -> None:
    if rule == "batch":
        for operation in message[1]:
            require("operation", operation, where)
            _check_statement(*cbor2.loads(operation), where)
    elif rule == "block":
        for batch in message[2]:
            _check_enclosed("batch", 11, batch, where)
    elif rule == "page" and message[1] == 2:
        for block in message[3]:
            _check_enclosed("block", 15, block, where)
    elif rule == "page" and message[1] in _ENTRIES:
        for entry in message[3]:
            require(_ENTRIES[message[1]], entry, where)


# By the kind of query that a page answers: what its entries are. Those of a proof of consistency are of two kinds.
_ENTRIES = {1: "holding", 3: "operations-proof", 5: "set-validator", 6: "made", 7: "admitted"}

# By the operation's code: the statement of somebody else that stands at that place in its body.
_STATEMENTS = {
    1: (0, "registration", 18),
    2: (0, "admission", 19),
    3: (0, "mandate", 20),
    4: (0, "end-of-mandate", 21),
    5: (0, "reading", 1),
    6: (6, "order", 6),
}


def _check_statement(code: int, body: list[Any], where: str) -> None:
    if code in _STATEMENTS:
        place, rule, message_type = _STATEMENTS[code]
        if body[place] is not None:
            _check_enclosed(rule, message_type, body[place], where)


def _check_enclosed(rule: str, message_type: int, raw: bytes, where: str) -> None:
    actual, inner = open_checked(raw, f"{where}, {rule} inside")
    if actual != message_type:
        raise SchemaError(f"{where}: message type {actual} inside, expected a {rule}")
    require(rule, inner, where)
    _check_inside(rule, cbor2.loads(inner), where)
