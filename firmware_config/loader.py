"""The one config loader: TOML in, frozen dataclasses out, by their type hints.

Supported hints: `int`, `float`, `str`, `bool`, `Path` (relative to the file that names it), `X | None`, `Literal[...]`,
`tuple[X, ...]`, `tuple[X, Y]`, `dict[str, X]` (named tables), nested dataclasses (tables), a union of dataclasses that
are told apart by a `Literal` field of the same name in each, and `Annotated` with `Between` or `OneName`. A field with
a default, or one that may be None, may be left out; every other key must be there, and no unknown key may.

Everything wrong raises ConfigError, which names the file, the key and what was expected. A dataclass may check more in
`__post_init__` and raise WrongValue.
"""

import tomllib
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from broker.protocol.codec import is_name
from broker.protocol.files import read_file
from broker.protocol.limits import MAX_NAME_CHARACTERS

T = TypeVar("T")

MAX_CONFIG_BYTES: Final = 4_194_304
"""A config with ten thousand consumers is about 2 MB; anything larger is not a config."""


class ConfigError(Exception):
    """A config that cannot be used: `file` and dotted `key` (empty for the file itself) say where, `expected` what."""

    def __init__(self, file: Path, key: str, expected: str) -> None:
        super().__init__(f"{file}: {key}: expected {expected}" if key else f"{file}: expected {expected}")
        self.file = file
        self.key = key
        self.expected = expected


class WrongValue(ValueError):
    """Raised by a config dataclass in `__post_init__`: `key` (relative to its table) should hold `expected`."""

    def __init__(self, key: str, expected: str) -> None:
        super().__init__(f"{key}: expected {expected}")
        self.key = key
        self.expected = expected


@dataclass(frozen=True, slots=True)
class Between:
    """A number from `lowest` to `highest`, both included."""

    lowest: float
    highest: float

    def check(self, value: Any) -> str | None:
        """None if `value` is fine, else what was expected."""
        if self.lowest <= value <= self.highest:
            return None
        return f"a number from {self.lowest} to {self.highest}, got {value}"


@dataclass(frozen=True, slots=True)
class OneName:
    """A name as it stands in topics: lower case, digits and hyphens."""

    def check(self, value: Any) -> str | None:
        """None if `value` is fine, else what was expected."""
        if is_name(value):
            return None
        return f"a name of 1 to {MAX_NAME_CHARACTERS} characters a-z, 0-9 and -, got {value!r}"


def load_config(path: Path, cls: type[T]) -> T:
    """Read the TOML file `path` as the dataclass `cls`. Raises ConfigError."""
    try:
        data = tomllib.loads(read_file(path, MAX_CONFIG_BYTES).decode())
    except OSError as error:
        raise ConfigError(
            path, "", f"a readable file ({error.strerror}); check the path and who may read it"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(path, "", f"TOML, which is text in UTF-8, and byte {error.start} is not") from error
    except RecursionError as error:
        raise ConfigError(path, "", "TOML with fewer brackets within each other") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(path, "", f"TOML ({error})") from error
    return build(data, cls, path)


def build(data: dict[str, Any], cls: type[T], file: Path) -> T:
    """Turn an already parsed table into the dataclass `cls`; `file` is named in errors and is where paths start.

    Raises ConfigError.
    """
    value: T = _table(data, cls, file, "")
    return value


def _table(data: Any, cls: type[Any], file: Path, key: str) -> Any:
    if type(data) is not dict:
        raise ConfigError(file, key, f"a table, got {_described(data)}")
    hints = get_type_hints(cls, include_extras=True)
    known = [field.name for field in fields(cls) if field.init]
    for name in data:
        if name not in known:
            raise ConfigError(file, _below(key, name), _known_keys(name, known))
    values = {}
    for field in fields(cls):
        if field.name in data:
            values[field.name] = _value(data[field.name], hints[field.name], file, _below(key, field.name))
        elif field.init and field.default is MISSING and field.default_factory is MISSING:
            if NoneType not in get_args(hints[field.name]):
                raise ConfigError(file, _below(key, field.name), f"{_hint_text(hints[field.name])}; the key is missing")
            values[field.name] = None
    try:
        return cls(**values)
    except WrongValue as error:
        raise ConfigError(file, _below(key, error.key), error.expected) from error


def _value(data: Any, hint: Any, file: Path, key: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        value = _value(data, arguments[0], file, key)
        for rule in arguments[1:]:
            expected = rule.check(value) if value is not None else None
            if expected is not None:
                raise ConfigError(file, key, expected)
        return value
    if origin in (Union, UnionType):
        return _one_of(data, [member for member in arguments if member is not NoneType], file, key)
    if origin is Literal:
        # Compared by type too, because in Python True equals 1.
        if not any(data == choice and type(data) is type(choice) for choice in arguments):
            raise ConfigError(file, key, f"{_hint_text(hint)}, got {_described(data)}")
        return data
    if origin is tuple:
        return _array(data, arguments, file, key)
    if origin is dict:
        if type(data) is not dict:
            raise ConfigError(file, key, f"a table of named entries, got {_described(data)}")
        return {
            _value(name, arguments[0], file, _below(key, name)): _value(item, arguments[1], file, _below(key, name))
            for name, item in data.items()
        }
    if is_dataclass(hint):
        return _table(data, hint, file, key)  # type: ignore[arg-type]
    if hint is Path and type(data) is str and data and "\0" not in data:
        return file.parent / data
    if hint is float and type(data) is int:
        return float(data)
    if hint in (int, float, str, bool) and type(data) is hint:
        return data
    raise ConfigError(file, key, f"{_hint_text(hint)}, got {_described(data)}")


def _array(data: Any, arguments: tuple[Any, ...], file: Path, key: str) -> tuple[Any, ...]:
    if type(data) is not list:
        raise ConfigError(file, key, f"an array, got {_described(data)}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_value(item, arguments[0], file, f"{key}[{i}]") for i, item in enumerate(data))
    if len(data) != len(arguments):
        raise ConfigError(file, key, f"an array of {len(arguments)} items, got {len(data)}")
    return tuple(
        _value(item, hint, file, f"{key}[{i}]") for i, (item, hint) in enumerate(zip(data, arguments, strict=True))
    )


def _one_of(data: Any, members: list[Any], file: Path, key: str) -> Any:
    """The value of a union: of one real member, of dataclasses told apart by a Literal field, or of simple types."""
    if len(members) == 1:
        return _value(data, members[0], file, key)
    if not all(is_dataclass(member) for member in members):
        for member in members:
            if member is type(data):
                return data
        raise ConfigError(file, key, f"{' or '.join(_hint_text(m) for m in members)}, got {_described(data)}")
    if type(data) is not dict:
        raise ConfigError(file, key, f"a table, got {_described(data)}")
    tag = _tag(members)
    choices: dict[Any, Any] = {}
    for member in members:
        for choice in get_args(get_type_hints(member)[tag]):
            choices[choice] = member
    chosen = choices.get(data.get(tag)) if isinstance(data.get(tag), str) else None
    if chosen is None:
        raise ConfigError(file, _below(key, tag), _choices_text(choices, data.get(tag)))
    return _table(data, chosen, file, key)


def _tag(members: list[Any]) -> str:
    """The Literal field that all dataclasses of a union have."""
    for field in fields(members[0]):
        if all(get_origin(get_type_hints(member).get(field.name)) is Literal for member in members):
            return field.name
    raise TypeError(f"{members} cannot be told apart: each needs a Literal field of the same name")


def _below(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _known_keys(name: str, known: list[str]) -> str:
    probable = _nearest(name, known)
    hint = f"`{probable}` perhaps" if probable is not None else "another key"
    return f"{hint}; this key is not known, the known ones are {', '.join(known)}"


def _choices_text(choices: dict[Any, Any], got: Any) -> str:
    return f"one of {', '.join(repr(choice) for choice in choices)}, got {_described(got)}"


def _nearest(name: str, known: list[str]) -> str | None:
    # Imported where a typo is explained, because a running agent never needs it and counts every kilobyte.
    from difflib import get_close_matches

    matches = get_close_matches(name, known, n=1, cutoff=0.5)
    return matches[0] if matches else None


def _described(data: Any) -> str:
    if data is None:
        return "nothing"
    if type(data) is dict:
        return "a table"
    if type(data) is list:
        return "an array"
    return repr(data)


def _hint_text(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _hint_text(arguments[0])
    if origin is Literal:
        return f"one of {', '.join(repr(choice) for choice in arguments)}"
    if origin in (Union, UnionType):
        return " or ".join(_hint_text(member) for member in arguments if member is not NoneType)
    if origin is tuple:
        return "an array"
    if origin is dict or is_dataclass(hint):
        return "a table"
    return {int: "an integer", float: "a number", str: "text", bool: "true or false", Path: "a path"}.get(
        hint, str(hint)
    )
