"""`meter-agent profiles`: everything that the agent can read, listed, searched and shown.

Modbus meters have a profile each. What describes itself on its wire (P1 telegrams and the like) needs none; those stand
in the list by the name that `protocol` has in a config.
"""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args, get_type_hints

from meter_agent import config
from meter_agent.profiles import MeterProfile, Register, load_profile, profile_names

MODBUS_WIRES = ("modbus_rtu", "modbus_tcp")
UNCONFIRMED = "unconfirmed: compare with the display"


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the list. `wires` are the values that `protocol` may have in a config for it.

    `confirmed` is False for a profile with fewer than two pages behind it that somebody has read.
    """

    name: str
    maker: str
    models: tuple[str, ...]
    wires: tuple[str, ...]
    line: str
    values: tuple[str, ...]
    caveats: tuple[str, ...]
    confirmed: bool = True

    @property
    def models_text(self) -> str:
        """The models, and a warning where the profile is unconfirmed."""
        return ", ".join(self.models) + ("" if self.confirmed else f" ({UNCONFIRMED})")

    def as_json(self) -> dict[str, Any]:
        """The same for `--json`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def matches(self, words: Sequence[str]) -> bool:
        """True if each word stands somewhere in it, in either case."""
        text = " ".join((self.name, self.maker, self.models_text, *self.wires, self.line, *self.caveats)).lower()
        return all(word.lower() in text for word in words)


def entries() -> list[Entry]:
    """All profiles, then all protocols without profile. Raises ConfigError for a profile that is wrong."""
    return [entry_of(load_profile(name)) for name in profile_names()] + list(_self_describing())


def entry_of(profile: MeterProfile) -> Entry:
    """The line of one profile."""
    return Entry(
        name=profile.name,
        maker=profile.maker,
        models=profile.models,
        wires=MODBUS_WIRES,
        line=serial_line_text(profile),
        values=tuple(sorted({quantity for _, registers in _register_sets(profile) for quantity in registers})),
        caveats=tuple(caveat.text for caveat in profile.caveats),
        confirmed=profile.confirmed,
    )


def serial_line_text(profile: MeterProfile) -> str:
    """The factory's serial settings, for example "9600 8N1"; empty if the profile names none."""
    line = profile.serial_line
    return f"{line.baud} {line.data_bits}{line.parity}{line.stop_bits}" if line is not None else ""


def table(found: Iterable[Entry]) -> str:
    """The list in columns."""
    rows = [("NAME", "MAKER", "WIRE", "VALUES", "MODELS")]
    for entry in found:
        wire = " ".join(filter(None, ("/".join(entry.wires), entry.line)))
        rows.append((entry.name, entry.maker, wire, ", ".join(entry.values), entry.models_text))
    return columns(rows)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text with aligned columns; the last one is as long as it likes."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def description(profile: MeterProfile) -> str:
    """Everything about one profile that an installer wants to know."""
    lines = [f"{profile.name}: {profile.maker} {', '.join(profile.models)}"]
    if not profile.confirmed:
        lines.append(f"  {UNCONFIRMED}")
    lines.append(f"  serial line as delivered: {serial_line_text(profile) or 'set it in the config'}")
    for title, registers in _register_sets(profile):
        lines.append(f"  {title}:")
        lines += [f"    {quantity}: {_register_text(register)}" for quantity, register in registers.items()]
    if profile.serial_number is not None:
        place = profile.serial_number
        lines.append(
            f"  serial number: {place.count} registers at {place.address:#06x}, function {place.function_code}"
        )
    for caveat in profile.caveats:
        lines.append(f"  caveat: {caveat.text}" + (f" ({caveat.url})" if caveat.url else ""))
    for reference in profile.references:
        doubt = " (unconfirmed)" if reference.unconfirmed else ""
        lines.append(f"  after {reference.url}{doubt}")
    return "\n".join(lines)


def profile_json(profile: MeterProfile) -> dict[str, Any]:
    """The whole profile as it stands in its file, every default filled in."""
    plain: dict[str, Any] = _plain(profile)
    return plain


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value) if field.init}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _register_sets(profile: MeterProfile) -> list[tuple[str, dict[Any, Register]]]:
    if profile.registers is not None:
        return [(f"registers, function {profile.function_code}", dict(profile.registers))]
    assert profile.sunspec is not None
    return [
        (f"SunSpec models {', '.join(map(str, model.ids))}, offsets from the model's id", dict(model.registers))
        for model in profile.sunspec.models
    ]


def _register_text(register: Register) -> str:
    text = f"{register.type} at {' + '.join(f'{address:#06x}' for address in register.addresses)}"
    scale = ""
    if register.multiply != 1:
        scale += f" × {register.multiply}"
    if register.divide != 1:
        scale += f" / {register.divide}"
    if register.scale_factor is not None:
        scale += f" × 10^(register at {register.scale_factor:#06x})"
    return f"{text}{scale} {register.unit}, {register.word_order} word order"


def _self_describing() -> Iterable[Entry]:
    for kind in get_args(config.ReaderConfig):
        if "profile" in {field.name for field in fields(kind)}:
            continue
        (protocol,) = get_args(get_type_hints(kind)["protocol"])
        what = (inspect.getdoc(kind) or "").partition("\n")[0]
        yield Entry(protocol, "", (what,), (protocol,), "", (), ())
