"""From values to the registers of a meter: the reverse of `decode`, for `meter-agent simulate`. Pure.

Made from the same profile that the agent reads by, so it shows how a gateway copes with a family of meters, and proves
nothing about the profile itself; the tests of profiles use images that were written by hand from manuals.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from dengen_testing.wire.modbus import Block, RegisterImage

from meter_agent.decode import MWH_PER_UNIT, W_PER_UNIT
from meter_agent.profiles import (
    Identity,
    MeterProfile,
    Quantity,
    Register,
    SerialNumber,
    SunSpecMap,
    SunSpecModel,
    words_in,
)
from meter_agent.request_plan import Span, plan_requests

MAX_EXPONENT: Final = 10
"""The largest power of ten that a SunSpec scale factor can hold."""

_SUNSPEC_MARK: Final = (0x5375, 0x6E53)
_SUNSPEC_COMMON_ID: Final = 1
_SUNSPEC_COMMON_LENGTH: Final = 66
_SUNSPEC_END: Final = (0xFFFF, 0)
_MWH_PER_KWH: Final = 1_000_000
_W_PER_KW: Final = 1_000
_BASES: Final = {"number": 10, "hex": 16}
_FLOAT_FORMATS: Final = {"f32": ">f", "f64": ">d"}


class CannotShow(Exception):
    """A value that this meter has no way to show; the text says which and why."""


@dataclass(frozen=True, slots=True)
class MeterValues:
    """What a simulated meter shows: counters in mWh, power in W (import positive), serial number."""

    import_mwh: int
    export_mwh: int
    power_w: int
    serial_number: str


def register_image(profile: MeterProfile, values: MeterValues) -> RegisterImage:
    """All registers of a meter of this family that shows `values`, rounded down to its steps. Raises CannotShow."""
    if profile.sunspec is not None:
        words = _sunspec_words(profile, profile.sunspec, values)
    else:
        assert profile.registers is not None
        words = _fixed_words(profile, profile.registers, values)
    return RegisterImage(tuple(_blocks(words)), max_registers=profile.requests.max_registers)


def register_words(register: Register, value: int, exponent: int = 0) -> tuple[int, ...]:
    """The registers that show `value` (mWh or W, by the register's unit). Raises CannotShow."""
    number, denominator = _raw(register, value, exponent)
    width = 16 * words_in(register.type)
    if register.type in _FLOAT_FORMATS:
        bits = int.from_bytes(struct.pack(_FLOAT_FORMATS[register.type], number / denominator), "big")
    else:
        bits = _integer_bits(register, _rounded(register, number, denominator), width)
    if bits in register.sentinel_bits:
        raise CannotShow(f"this meter says by {bits:#x} that it has no value; choose another one than {value}")
    words = tuple(bits >> shift & 0xFFFF for shift in range(width - 16, -16, -16))
    if register.word_order == "little":
        words = words[::-1]
    if register.byte_order == "little":
        words = tuple(word >> 8 | (word & 0xFF) << 8 for word in words)
    return words


def _raw(register: Register, value: int, exponent: int) -> tuple[int, int]:
    """The raw number that stands for `value`, as a fraction."""
    energy = register.unit in MWH_PER_UNIT
    per_unit = MWH_PER_UNIT[register.unit] if energy else W_PER_UNIT[register.unit]
    shown = -value if register.negate else value
    number = shown * register.divide * 10 ** max(-exponent, 0)
    return number, register.multiply * per_unit * 10 ** max(exponent, 0)


def _rounded(register: Register, number: int, denominator: int) -> int:
    """Counters round down, as meters do; powers to the nearest."""
    if register.unit in MWH_PER_UNIT:
        return number // denominator
    return (2 * number + denominator) // (2 * denominator)


def _integer_bits(register: Register, raw: int, width: int) -> int:
    signed = register.type.startswith("s")
    if register.unit in MWH_PER_UNIT:
        raw %= register.rollover or 1 << (width - 1 if signed else width)
    lowest, highest = (-(1 << (width - 1)), (1 << (width - 1)) - 1) if signed else (0, (1 << width) - 1)
    if not lowest <= raw <= highest:
        raise CannotShow(
            f"{raw} does not fit into the meter's {register.type}; choose another value (power is negative for export)"
        )
    return raw & ((1 << width) - 1)


def _value_of(values: MeterValues, quantity: Quantity) -> int:
    return {"import": values.import_mwh, "export": values.export_mwh, "power": values.power_w}[quantity]


def _fixed_words(
    profile: MeterProfile, registers: dict[Quantity, Register], values: MeterValues
) -> dict[tuple[int, int], int]:
    words: dict[tuple[int, int], int] = {}
    spans = [
        Span(profile.function_code, address, words_in(register.type))
        for register in registers.values()
        for address in register.addresses
    ]
    for request in plan_requests(spans, profile.requests):
        # What lies between the values of one request must be there to be read over.
        words.update({(request.function_code, address): 0 for address in range(request.address, request.end)})
    for quantity, register in registers.items():
        _put_value(words, profile.function_code, register, _value_of(values, quantity), 0)
    _put_names(words, profile, values, 0)
    return words


def _sunspec_words(profile: MeterProfile, sunspec: SunSpecMap, values: MeterValues) -> dict[tuple[int, int], int]:
    """The mark, the common model, the profile's first model and the end of the chain, one after the other."""
    code, base, model = profile.function_code, sunspec.bases[0], sunspec.models[0]
    common = base + len(_SUNSPEC_MARK)
    words: dict[tuple[int, int], int] = {}
    _put(words, code, base, _SUNSPEC_MARK)
    header = (_SUNSPEC_COMMON_ID, _SUNSPEC_COMMON_LENGTH)
    _put(words, code, common, header + (0,) * _SUNSPEC_COMMON_LENGTH)
    start = common + len(header) + _SUNSPEC_COMMON_LENGTH
    body = _sunspec_model(model, values)
    _put(words, code, start, body)
    _put(words, code, start + len(body), _SUNSPEC_END)
    _put_names(words, profile, values, common)
    return words


def _sunspec_model(model: SunSpecModel, values: MeterValues) -> tuple[int, ...]:
    """One model with id and length. Values that share a scale factor share it here too."""
    exponents: dict[int, int] = {}
    for quantity, register in model.registers.items():
        if register.scale_factor is not None:
            needed = _exponent(register, _value_of(values, quantity))
            exponents[register.scale_factor] = max(needed, exponents.get(register.scale_factor, 0))
    words: dict[tuple[int, int], int] = {}
    for quantity, register in model.registers.items():
        exponent = exponents[register.scale_factor] if register.scale_factor is not None else 0
        _put_value(words, 0, register, _value_of(values, quantity), exponent)
    for offset, exponent in exponents.items():
        _put(words, 0, offset, (exponent,))
    length = max(address for _, address in words) - 1
    return (model.ids[0], length) + tuple(words.get((0, offset), 0) for offset in range(2, length + 2))


def _exponent(register: Register, value: int) -> int:
    """The smallest scale factor with which a power fits; counters roll over instead. Raises CannotShow."""
    if register.unit in MWH_PER_UNIT:
        return 0
    for exponent in range(MAX_EXPONENT):
        try:
            register_words(register, value, exponent)
        except CannotShow:
            continue
        return exponent
    raise CannotShow(f"{value} W does not fit into the meter's {register.type} with any scale factor")


def _put_value(
    words: dict[tuple[int, int], int], function_code: int, register: Register, value: int, exponent: int
) -> None:
    """Put a value where it stands. Where it is a sum of tariffs or phases, each of them has its share."""
    # Whole kWh and kW, which every register can show; what is left over is in the first part.
    whole = _MWH_PER_KWH if register.unit in MWH_PER_UNIT else _W_PER_KW
    count = len(register.addresses)
    share = abs(value) // (count * whole) * whole * (-1 if value < 0 else 1)
    for part, address in enumerate(register.addresses):
        shown = share if part else value - (count - 1) * share
        _put(words, function_code, address, register_words(register, shown, exponent))


def _put_names(words: dict[tuple[int, int], int], profile: MeterProfile, values: MeterValues, base: int) -> None:
    """Serial number and identity, where the family has them."""
    if profile.serial_number is not None:
        _put_name(words, profile.serial_number, values.serial_number, base)
    if profile.identity is not None:
        _put_name(words, profile.identity, next(iter(profile.identity.values)), base)


def _put_name(words: dict[tuple[int, int], int], place: SerialNumber | Identity, text: str, base: int) -> None:
    length = 2 * place.count
    raw = _number_bytes(text, length, place.type) if place.type in _BASES else _text_bytes(text, length, place.type)
    shown = tuple(int.from_bytes(raw[offset : offset + 2], "big") for offset in range(0, length, 2))
    _put(words, place.function_code, base + place.address, shown)


def _number_bytes(text: str, length: int, kind: str) -> bytes:
    try:
        number = int(text, _BASES[kind])
    except ValueError:
        number = -1
    if not 0 <= number < 1 << 8 * length:
        digits = "decimal" if kind == "number" else "hex"
        raise CannotShow(f"the serial number of this meter is {digits} digits in {length} bytes, not {text!r}")
    return number.to_bytes(length, "big")


def _text_bytes(text: str, length: int, kind: str) -> bytes:
    raw = text.encode("ascii", errors="replace")
    if kind == "characters":
        # One a register, in its low byte.
        raw = b"".join(bytes((0, byte)) for byte in raw)
    if len(raw) > length:
        raise CannotShow(f"the serial number of this meter has room for {length} bytes, {text!r} needs {len(raw)}")
    return raw.ljust(length, b"\0")


def _put(words: dict[tuple[int, int], int], function_code: int, address: int, shown: Iterable[int]) -> None:
    for offset, word in enumerate(shown):
        words[function_code, address + offset] = word


def _blocks(words: dict[tuple[int, int], int]) -> Iterable[Block]:
    """Runs of addresses without a hole."""
    run: list[tuple[int, int]] = []
    for place in sorted(words):
        if run and place != (run[-1][0], run[-1][1] + 1):
            yield _block(run, words)
            run = []
        run.append(place)
    yield _block(run, words)


def _block(run: list[tuple[int, int]], words: dict[tuple[int, int], int]) -> Block:
    return Block(run[0][0], run[0][1], b"".join(words[place].to_bytes(2, "big") for place in run))
