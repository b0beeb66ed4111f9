"""The JSON schema of meter profiles, made from the dataclasses in `meter_agent/profiles.py`.

`python -m support.json_schema` (from `tests/`) writes `firmware_config/schema/meter-profile.schema.json` again after a
change of the classes. What each key means is written by hand into the `description`s there, and kept.
"""

import json
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import firmware_config
from broker.protocol.limits import MAX_NAME_CHARACTERS
from firmware_config.loader import Between, OneName
from meter_agent.profiles import MeterProfile

SCHEMA = Path(firmware_config.__file__).parent / "schema" / "meter-profile.schema.json"
_NAMES = {int: "integer", float: "number", str: "string", bool: "boolean"}

Schema = dict[str, Any]


def profile_schema(described: Schema | None = None) -> Schema:
    """The schema, with the descriptions of `described` where it has the same table and key."""
    definitions: dict[str, Schema] = {}
    root = _table(MeterProfile, definitions)
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **root,
        "$defs": dict(sorted(definitions.items())),
    }
    # JSON schema cannot take this from one class: __post_init__ demands exactly one of the two.
    schema["oneOf"] = [{"required": ["registers"]}, {"required": ["sunspec"]}]
    for table, old in [(schema, described or {})] + [
        (table, (described or {}).get("$defs", {}).get(name, {})) for name, table in definitions.items()
    ]:
        _keep_descriptions(table, old)
    return schema


def without_descriptions(schema: Any) -> Any:
    """The schema's rules alone."""
    if isinstance(schema, dict):
        return {
            key: without_descriptions(value)
            for key, value in schema.items()
            if key != "description" or isinstance(value, dict)
        }
    if isinstance(schema, list):
        return [without_descriptions(item) for item in schema]
    return schema


def _keep_descriptions(table: Schema, old: Schema) -> None:
    if "description" in old:
        table["description"] = old["description"]
    for key, value in table["properties"].items():
        value["description"] = old.get("properties", {}).get(key, {}).get("description", "")


def _table(cls: type, definitions: dict[str, Schema]) -> Schema:
    hints = get_type_hints(cls, include_extras=True)
    properties, required = {}, []
    for field in fields(cls):
        if not field.init:
            continue
        properties[field.name] = _value(hints[field.name], definitions)
        optional = NoneType in get_args(hints[field.name])
        if not optional and field.default is MISSING and field.default_factory is MISSING:
            required.append(field.name)
        if field.default is not MISSING and field.default not in (None, ()):
            properties[field.name]["default"] = field.default
    return {
        "title": cls.__name__,
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _value(hint: Any, definitions: dict[str, Schema]) -> Schema:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        schema = _value(arguments[0], definitions)
        for rule in arguments[1:]:
            schema |= _rule(rule)
        return schema
    if origin in (Union, UnionType):
        (member,) = (argument for argument in arguments if argument is not NoneType)
        return _value(member, definitions)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        if arguments[1] is Ellipsis:
            return {"type": "array", "items": _value(arguments[0], definitions)}
        items = [_value(argument, definitions) for argument in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if origin is dict:
        schema = {"type": "object", "additionalProperties": _value(arguments[1], definitions)}
        return schema if arguments[0] is str else schema | {"propertyNames": _value(arguments[0], definitions)}
    if is_dataclass(hint) and isinstance(hint, type):
        if hint.__name__ not in definitions:
            definitions[hint.__name__] = {}
            definitions[hint.__name__] |= _table(hint, definitions)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    return {"type": _NAMES[hint]}


def _rule(rule: object) -> Schema:
    if isinstance(rule, Between):
        return {"minimum": rule.lowest, "maximum": rule.highest}
    assert isinstance(rule, OneName)
    return {"pattern": "^[a-z0-9-]+$", "minLength": 1, "maxLength": MAX_NAME_CHARACTERS}


def main() -> None:
    """Write the schema again."""
    described = json.loads(SCHEMA.read_text()) if SCHEMA.exists() else None
    SCHEMA.write_text(json.dumps(profile_schema(described), indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
