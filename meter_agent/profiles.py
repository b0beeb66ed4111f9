"""Meter profiles: what a family of Modbus meters says in which register, as data.

One TOML file a family in `firmware_config/meters/`, read by the one config loader into the classes below, which
`firmware_config/schema/meter-profile.schema.json` repeats for editors. `docs/meters.md` shows how to add a meter. A
profile is a claim and names its evidence. DSMR P1 telegrams name their values themselves (OBIS codes) and need none.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final, Literal

import firmware_config
from firmware_config.loader import Between, ConfigError, OneName, WrongValue, load_config

ValueType = Literal["u16", "s16", "u32", "s32", "u64", "s64", "f32", "f64", "acc32"]
Quantity = Literal["import", "export", "power"]

MODBUS_MAX_REGISTERS: Final = 125
"""Most registers that one answer can carry: Modbus Application Protocol 1.1b3, section 6.3."""

_WORDS: Final = {"u16": 1, "s16": 1, "u32": 2, "s32": 2, "acc32": 2, "f32": 2, "u64": 4, "s64": 4, "f64": 4}


def words_in(value_type: ValueType) -> int:
    """Number of 16-bit registers of a value."""
    return _WORDS[value_type]


class UnknownProfile(Exception):
    """No profile has this name; `known` lists those that exist."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        super().__init__(f"no meter profile {name!r}; the known ones are {', '.join(known)}")
        self.name = name
        self.known = known


@dataclass(frozen=True, slots=True)
class Register:
    """One value: where it stands and how it reads.

    `address` is the protocol address from 0, in a SunSpec model the offset from the model's ID register. The value is
    raw × multiply / divide in `unit`, and, if `scale_factor` is given, × 10^(the s16 at that offset of the same model).
    `plus` are the addresses of further registers of the same kind that are added to it: tariffs, phases. `word_order`
    big means that the most significant register comes first; `byte_order` is the order inside a register. `sentinels`
    are raw values that mean "not available", in hex digits of the full width, most significant first. `negate` turns a
    power that counts export as positive into one that counts import as positive. `rollover` is the raw count at which
    the counter starts again at 0, if its maker says so.
    """

    address: Annotated[int, Between(0, 0xFFFF)]
    type: ValueType
    unit: Literal["Wh", "kWh", "W", "kW"]
    multiply: Annotated[int, Between(1, 1_000_000_000)] = 1
    divide: Annotated[int, Between(1, 1_000_000_000)] = 1
    plus: tuple[Annotated[int, Between(0, 0xFFFF)], ...] = ()
    scale_factor: Annotated[int, Between(2, 0xFFFF)] | None = None
    word_order: Literal["big", "little"] = "big"
    byte_order: Literal["big", "little"] = "big"
    sentinels: tuple[str, ...] = ()
    negate: bool = False
    rollover: Annotated[int, Between(2, 2**64)] | None = None
    sentinel_bits: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        digits = 4 * words_in(self.type)
        bits = []
        for text in self.sentinels:
            compact = text.replace(" ", "")
            if len(compact) != digits or not all(digit in "0123456789ABCDEFabcdef" for digit in compact):
                raise WrongValue("sentinels", f"{digits} hex digits for a {self.type}, got {text!r}")
            bits.append(int(compact, 16))
        object.__setattr__(self, "sentinel_bits", frozenset(bits))
        if self.plus and self.rollover is not None:
            # The sum drops by one part's rollover when that part rolls over, at no count of its own.
            raise WrongValue("rollover", "no rollover beside `plus`")

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the parts of the value stand: `address` and `plus`."""
        return (self.address, *self.plus)


@dataclass(frozen=True, slots=True)
class SerialNumber:
    """Where the serial number stands; `count` registers. It tells a meter swap from a reset.

    It is a number, hex digits (of meters that print them so, as a rule decimal digits in BCD), ASCII text, or
    characters: one ASCII character a register, in its low byte.
    In a SunSpec profile `address` is the offset from the ID register of the common model (model 1).
    """

    address: Annotated[int, Between(0, 0xFFFF)]
    type: Literal["number", "hex", "text", "characters"]
    count: Annotated[int, Between(1, 32)]
    function_code: Literal[3, 4]


@dataclass(frozen=True, slots=True)
class Identity:
    """Where the meter says what it is, and which answers mean that this profile fits.

    `count` registers, written as a number, hex digits or ASCII text. `values` maps each answer to the model that gives
    it: the number in decimal digits, the hex digits, or what the text starts with. A meter that answers something else
    may still have the same registers.
    """

    address: Annotated[int, Between(0, 0xFFFF)]
    type: Literal["number", "hex", "text"]
    count: Annotated[int, Between(1, 32)]
    function_code: Literal[3, 4]
    values: dict[str, str]

    def __post_init__(self) -> None:
        if not self.values:
            raise WrongValue("values", "at least one answer with its model")
        for value in self.values:
            if self.type == "number" and not (value.isascii() and value.isdigit()):
                raise WrongValue(f"values.{value}", "decimal digits, since the type is number")
            if self.type == "hex" and (len(value) != 4 * self.count or not set(value) <= set("0123456789ABCDEF")):
                raise WrongValue(f"values.{value}", f"{4 * self.count} hex digits in capitals, since the type is hex")
            if not value:
                raise WrongValue("values", "answers that are not empty")


@dataclass(frozen=True, slots=True)
class SunSpecModel:
    """SunSpec models of one layout: their ids, and the registers by offset from the model's ID register."""

    ids: tuple[Annotated[int, Between(1, 0xFFFE)], ...]
    registers: dict[Quantity, Register]

    def __post_init__(self) -> None:
        _check_registers(self.registers)


@dataclass(frozen=True, slots=True)
class SunSpecMap:
    """A self-describing map: "SunS" at one of `bases`, then models one after the other, each with id and length."""

    bases: tuple[Annotated[int, Between(0, 0xFFFF)], ...]
    models: tuple[SunSpecModel, ...]

    def __post_init__(self) -> None:
        if not self.bases:
            raise WrongValue("bases", "at least one address")
        if not self.models:
            raise WrongValue("models", "at least one model")


@dataclass(frozen=True, slots=True)
class SerialDefaults:
    """How the meter's serial line is set when it leaves the factory."""

    baud: Annotated[int, Between(300, 921_600)]
    parity: Literal["N", "E", "O"]
    data_bits: Literal[7, 8] = 8
    stop_bits: Literal[1, 2] = 1


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """How much one request may ask for.

    Values no more than `max_gap` registers apart are read together, if no address from `forbidden` (pairs first, last)
    comes between them: some meters answer exception 2 when a request touches a hole of their map.
    """

    max_registers: Annotated[int, Between(2, MODBUS_MAX_REGISTERS)] = MODBUS_MAX_REGISTERS
    max_gap: Annotated[int, Between(0, MODBUS_MAX_REGISTERS)] = 0
    forbidden: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Pauses:
    """Silence that the meter needs, and the longest time after which it may still answer an abandoned request."""

    after_connect_ms: Annotated[int, Between(0, 10_000)] = 0
    between_requests_ms: Annotated[int, Between(0, 10_000)] = 0
    late_reply_ms: Annotated[int, Between(0, 10_000)] = 500


@dataclass(frozen=True, slots=True)
class Caveat:
    """Something that surprised somebody, and where it is described."""

    text: str
    url: str | None = None


@dataclass(frozen=True, slots=True)
class Reference:
    """Evidence: a page, and a register line or half a sentence exactly as it stands there.

    `url` is at a fixed commit where that is possible. `unconfirmed`: nobody here could open the page and read it.
    """

    url: str
    quote: str
    unconfirmed: bool = False


@dataclass(frozen=True, slots=True)
class MeterProfile:
    """A family of meters. Exactly one of `registers` (fixed addresses) and `sunspec` is given."""

    name: Annotated[str, OneName()]
    maker: str
    models: tuple[str, ...]
    function_code: Literal[3, 4]
    references: tuple[Reference, ...]
    serial_line: SerialDefaults | None
    serial_number: SerialNumber | None
    identity: Identity | None
    registers: dict[Quantity, Register] | None
    sunspec: SunSpecMap | None
    requests: RequestLimits = field(default_factory=RequestLimits)
    pauses: Pauses = field(default_factory=Pauses)
    caveats: tuple[Caveat, ...] = ()

    def __post_init__(self) -> None:
        if (self.registers is None) == (self.sunspec is None):
            raise WrongValue("registers", "either [registers] or [sunspec], and not both")
        if self.registers is not None:
            _check_registers(self.registers)
            for quantity, register in self.registers.items():
                if register.scale_factor is not None:
                    raise WrongValue(f"registers.{quantity}.scale_factor", "a scale factor in SunSpec models only")
        if len(self.references) < 2:
            raise WrongValue("references", "at least two references, each with url and quote")
        if not self.confirmed and not any(reference.unconfirmed for reference in self.references):
            raise WrongValue("references", "two different pages that were read, or `unconfirmed` on what was not read")

    @property
    def confirmed(self) -> bool:
        """True if two pages were opened and read. If not, readings are to be compared with the display."""
        return len({reference.url for reference in self.references if not reference.unconfirmed}) >= 2


def profile_directory() -> Path:
    """The folder of the profiles that are installed with the agent."""
    return Path(firmware_config.__file__).parent / "meters"


def profile_names(directory: Path | None = None) -> tuple[str, ...]:
    """The names of all profiles, sorted."""
    return tuple(sorted(path.stem for path in (directory or profile_directory()).glob("*.toml")))


def load_profile(name: str, directory: Path | None = None) -> MeterProfile:
    """The profile called `name`. Raises UnknownProfile, or ConfigError naming file, key and what was expected."""
    known = profile_names(directory)
    # Looked up in the list rather than in the file system, so that no name can lead out of the folder.
    if name not in known:
        raise UnknownProfile(name, known)
    path = (directory or profile_directory()) / f"{name}.toml"
    profile = load_config(path, MeterProfile)
    if profile.name != name:
        raise ConfigError(path, "name", f"{name!r} as in the file's name, got {profile.name!r}")
    return profile


def _check_registers(registers: dict[Quantity, Register]) -> None:
    if "import" not in registers and "export" not in registers:
        raise WrongValue("registers", "an `import` or an `export` register")
    for quantity, register in registers.items():
        units = ("W", "kW") if quantity == "power" else ("Wh", "kWh")
        if register.unit not in units:
            raise WrongValue(f"registers.{quantity}.unit", f"{units[0]} or {units[1]}, got {register.unit!r}")
        if register.negate and quantity != "power":
            raise WrongValue(f"registers.{quantity}.negate", "negate with power only; counters never run backwards")
