"""A strict validator for the part of CDDL (RFC 8610) that the protocol's schema files use.

pycddl is the second opinion in the tests; by itself it lets too much through (in 0.6.4 a byte string passes for a range
of integers, and a number for `bstr .size (1..64)`). Understood here: rules, type choices, integers and ranges, bool,
null, tstr and bstr with .size and .regexp, maps with integer keys and optional entries, arrays with named items and
`n*m` occurrence, and one tag. Anything else in a file is a SyntaxError, so that no rule goes unread.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cbor2

_COMMENT = re.compile(r";[^\n]*")
_TOKEN = re.compile(
    r"""\s*(?:(?P<text>"[^"]*")|(?P<range>-?\d+\.\.-?\d+)|(?P<occurs>\d+\*\d+)|(?P<number>-?\d+)"""
    r"""|(?P<control>\.[a-z]+)|(?P<tag>\#6\.\d+)|(?P<name>[a-z][a-z0-9_-]*)|(?P<sign>[=/{}\[\]():,?]))\s*"""
)


class Mismatch(Exception):
    """A value that is not of its rule; the text names the place and what belongs there."""


@dataclass(frozen=True, slots=True)
class _Literal:
    low: int
    high: int

    def check(self, value: Any, rules: dict[str, Any], where: str) -> None:
        if type(value) is not int or not self.low <= value <= self.high:
            raise Mismatch(f"{where}: expected {self.low} to {self.high}, got {value!r}")


@dataclass(frozen=True, slots=True)
class _Plain:
    kind: type
    size: tuple[int, int] | None
    expression: str | None

    def check(self, value: Any, rules: dict[str, Any], where: str) -> None:
        if type(value) is not self.kind:
            raise Mismatch(f"{where}: expected {self.kind.__name__}, got {value!r}")
        if self.size is not None:
            length = len(value.encode() if isinstance(value, str) else value)
            if not self.size[0] <= length <= self.size[1]:
                raise Mismatch(f"{where}: expected {self.size[0]} to {self.size[1]} bytes, got {length}")
        if self.expression is not None and re.fullmatch(self.expression, value) is None:
            raise Mismatch(f"{where}: {value!r} does not match {self.expression}")


@dataclass(frozen=True, slots=True)
class _Reference:
    name: str

    def check(self, value: Any, rules: dict[str, Any], where: str) -> None:
        rules[self.name].check(value, rules, where)


@dataclass(frozen=True, slots=True)
class _Choice:
    options: tuple[Any, ...]

    def check(self, value: Any, rules: dict[str, Any], where: str) -> None:
        reasons = []
        for option in self.options:
            try:
                return option.check(value, rules, where)
            except Mismatch as reason:
                reasons.append(str(reason))
        raise Mismatch(" or ".join(reasons))


@dataclass(frozen=True, slots=True)
class _Map:
    entries: tuple[tuple[int, bool, Any], ...]

    def check(self, value: Any, rules: dict[str, Any], where: str) -> None:
        if not isinstance(value, Mapping):
            raise Mismatch(f"{where}: expected a map, got {value!r}")
        unknown = set(value) - {key for key, _optional, _kind in self.entries}
        if unknown:
            raise Mismatch(f"{where}: unknown entries {unknown}")
        for key, optional, kind in self.entries:
            if key in value:
                kind.check(value[key], rules, f"{where}.{key}")
            elif not optional:
                raise Mismatch(f"{where}: no entry {key}")


@dataclass(frozen=True, slots=True)
class _Array:
    items: tuple[tuple[int, int, Any], ...]

    def check(self, value: Any, rules: dict[str, Any], where: str) -> None:
        if not isinstance(value, list | tuple):
            raise Mismatch(f"{where}: expected an array, got {value!r}")
        rest = list(value)
        for low, high, kind in self.items:
            # Greedy is enough: an item that may repeat stands alone in its array in all of these files.
            take = min(high, len(rest))
            if take < low:
                raise Mismatch(f"{where}: expected at least {low} items")
            for index, item in enumerate(rest[:take]):
                kind.check(item, rules, f"{where}[{index}]")
            rest = rest[take:]
        if rest:
            raise Mismatch(f"{where}: {len(rest)} items too many")


@dataclass(frozen=True, slots=True)
class _Tagged:
    number: int
    kind: Any

    def check(self, value: Any, rules: dict[str, Any], where: str) -> None:
        if not isinstance(value, cbor2.CBORTag) or value.tag != self.number:
            raise Mismatch(f"{where}: expected tag {self.number}")
        self.kind.check(value.value, rules, where)


class _Parser:
    def __init__(self, text: str) -> None:
        text = _COMMENT.sub("", text).strip()
        self.tokens: list[tuple[str, str]] = []
        position = 0
        while position < len(text):
            found = _TOKEN.match(text, position)
            if found is None or found.lastgroup is None:
                raise SyntaxError(f"CDDL beyond the understood part: {text[position : position + 40]!r}")
            self.tokens.append((found.lastgroup, found.group(found.lastgroup)))
            position = found.end()
        self.at = 0

    def peek(self, ahead: int = 0) -> tuple[str, str]:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else ("end", "")

    def take(self, expected: str | None = None) -> str:
        _kind, text = self.peek()
        if expected is not None and text != expected:
            raise SyntaxError(f"CDDL: expected {expected!r}, got {text!r}")
        self.at += 1
        return text

    def rules(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while self.peek()[0] != "end":
            name = self.take()
            if name in found:
                raise SyntaxError(f"CDDL: {name} is defined twice")
            self.take("=")
            found[name] = self.choice()
        return found

    def choice(self) -> Any:
        options = [self.one()]
        while self.peek()[1] == "/":
            self.take()
            options.append(self.one())
        return options[0] if len(options) == 1 else _Choice(tuple(options))

    def one(self) -> Any:
        kind, text = self.peek()
        self.take()
        if kind == "range":
            low, high = text.split("..")
            return _Literal(int(low), int(high))
        if kind == "number":
            return _Literal(int(text), int(text))
        if kind == "tag":
            self.take("(")
            inside = self.choice()
            self.take(")")
            return _Tagged(int(text.removeprefix("#6.")), inside)
        if text == "{":
            return self.map_entries()
        if text == "[":
            return self.array_items()
        if text in ("tstr", "bstr", "bool", "null"):
            return self.plain({"tstr": str, "bstr": bytes, "bool": bool, "null": type(None)}[text])
        if kind == "name":
            return _Reference(text)
        raise SyntaxError(f"CDDL beyond the understood part: {text!r}")

    def plain(self, kind: type) -> _Plain:
        size, expression = None, None
        if self.peek()[0] == "control":
            control = self.take()
            if control == ".regexp":
                expression = self.take().strip('"')
            elif control == ".size" and self.peek()[1] == "(":
                self.take("(")
                low, high = self.take().split("..")
                size = (int(low), int(high))
                self.take(")")
            elif control == ".size":
                size = (int(self.peek()[1]), int(self.take()))
            else:
                raise SyntaxError(f"CDDL beyond the understood part: {control}")
        return _Plain(kind, size, expression)

    def map_entries(self) -> _Map:
        entries = []
        while self.peek()[1] != "}":
            optional = self.peek()[1] == "?"
            if optional:
                self.take("?")
            key = int(self.take())
            self.take(":")
            entries.append((key, optional, self.choice()))
            if self.peek()[1] == ",":
                self.take(",")
        self.take("}")
        return _Map(tuple(entries))

    def array_items(self) -> _Array:
        items = []
        while self.peek()[1] != "]":
            low, high = 1, 1
            if self.peek()[0] == "occurs":
                low, high = (int(part) for part in self.take().split("*"))
            if self.peek()[0] == "name" and self.peek(1)[1] == ":":
                self.take()
                self.take(":")
            items.append((low, high, self.choice()))
            if self.peek()[1] == ",":
                self.take(",")
        self.take("]")
        return _Array(tuple(items))


def parse_rules(text: str) -> dict[str, Any]:
    """All rules of a CDDL text by name. Raises SyntaxError for anything not understood, twice defined or undefined."""
    rules = _Parser(text).rules()
    used = set(re.findall(r"_Reference\(name='([^']+)'\)", repr(rules)))
    if used - set(rules):
        raise SyntaxError(f"CDDL: undefined rules {sorted(used - set(rules))}")
    return rules


def check(rules: dict[str, Any], rule: str, raw: bytes) -> None:
    """Raise Mismatch, saying where and why, unless the CBOR `raw` is of that rule."""
    try:
        value = cbor2.loads(raw)
    except (cbor2.CBORError, ValueError) as error:
        raise Mismatch(f"{rule}: not well-formed CBOR") from error
    rules[rule].check(value, rules, rule)
