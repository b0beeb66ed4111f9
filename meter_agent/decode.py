"""From the registers of a meter to exact integers: energy in mWh, power in W, the serial number as text.

Pure, and integers all the way: floating-point registers are taken as the shortest decimal number that rounds to the
same bits, because that is the number the meter meant to say: the float nearest to 12.345 kWh is exactly 12 345 000 mWh.
Whatever is not a number, or is the meter's way of saying "not available", raises UnusableValue and never becomes 0.
"""

from typing import Final, Literal

from meter_agent.profiles import Identity, Register, SerialNumber, words_in

MWH_PER_UNIT: Final = {"Wh": 1_000, "kWh": 1_000_000}
W_PER_UNIT: Final = {"W": 1, "kW": 1_000}
SCALE_FACTOR_NOT_IMPLEMENTED: Final = 0x8000
MAX_SCALE_EXPONENT: Final = 10
"""SunSpec allows scale factors from -10 to 10."""

LEAST_SHARE_OF_A_MWH: Final = 1_000_000
"""No counter counts in less than a millionth of a mWh. An integer taken for a float reads as about 10^-38."""

_FLOAT_LAYOUT: Final = {"f32": (8, 23, 9), "f64": (11, 52, 17)}
"""Bits of exponent and mantissa, and the decimal digits that are always enough to name one value."""


class UnusableValue(Exception):
    """Registers that hold no usable value; `reason` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def energy_mwh(register: Register, words: tuple[int, ...], scale_exponent: int = 0) -> int:
    """The cumulative energy in `words` (as received, 16 bits each) in mWh, rounded down.

    `scale_exponent` is the power of ten from a SunSpec scale factor. A signed counter that overflows goes on below
    zero, and is counted on if its profile says that it rolls over behind its positive half. Raises UnusableValue for
    any other energy below zero, for a count that the meter cannot show by its profile, and for a floating-point number
    so small that the registers must hold an integer.
    """
    numerator, denominator = _scaled(register, words, scale_exponent, MWH_PER_UNIT[register.unit])
    if numerator < 0:
        raise UnusableValue(f"the counter is negative ({_hex(words)})")
    if 0 < numerator * LEAST_SHARE_OF_A_MWH < denominator:
        raise UnusableValue(f"{_hex(words)} is no floating-point counter; is the meter set to send integers?")
    return numerator // denominator


def rollover_mwh(register: Register, scale_exponent: int = 0) -> int | None:
    """The energy in mWh at which this counter starts again at 0, None if its profile does not say."""
    if register.rollover is None:
        return None
    numerator, denominator = _to_unit(register, register.rollover, scale_exponent, MWH_PER_UNIT[register.unit])
    return numerator // denominator


def power_w(register: Register, words: tuple[int, ...], scale_exponent: int = 0) -> int:
    """The momentary power in `words` in W, import positive, rounded half up. Raises UnusableValue."""
    numerator, denominator = _scaled(register, words, scale_exponent, W_PER_UNIT[register.unit])
    rounded = (2 * numerator + denominator) // (2 * denominator)
    return -rounded if register.negate else rounded


def scale_exponent(word: int) -> int:
    """A SunSpec scale factor register as a power of ten. Raises UnusableValue if it is not implemented or too large."""
    if word == SCALE_FACTOR_NOT_IMPLEMENTED:
        raise UnusableValue("the scale factor is not implemented (8000)")
    exponent = _signed(word, 16)
    if abs(exponent) > MAX_SCALE_EXPONENT:
        raise UnusableValue(f"the scale factor {exponent} is outside -{MAX_SCALE_EXPONENT} to {MAX_SCALE_EXPONENT}")
    return exponent


def serial_number(serial: SerialNumber, words: tuple[int, ...]) -> str:
    """The serial number in `words`: a decimal number, hex digits, or text up to the first NUL. Raises UnusableValue."""
    return _number_or_text(serial, words, "serial number")


def model(identity: Identity, words: tuple[int, ...]) -> str | None:
    """The model that the meter says it is, None if the profile does not know its answer. Raises UnusableValue."""
    answer = _number_or_text(identity, words, "identity")
    if identity.type != "text":
        return identity.values.get(answer)
    # The longest first, so that "B23" does not hide "B23 112".
    for start in sorted(identity.values, key=len, reverse=True):
        if answer.startswith(start):
            return identity.values[start]
    return None


def shortest_decimal(bits: int, kind: Literal["f32", "f64"]) -> tuple[int, int]:
    """The decimal `digits × 10^exponent` of fewest digits that rounds to the IEEE 754 number with these bits.

    Raises UnusableValue for infinity and for what is not a number. Source of the rounding rules: IEEE 754-2019
    section 4.3.1 (round to nearest, ties to even).
    """
    exponent_bits, mantissa_bits, most_digits = _FLOAT_LAYOUT[kind]
    negative = bits >> (exponent_bits + mantissa_bits)
    biased = bits >> mantissa_bits & ((1 << exponent_bits) - 1)
    mantissa = bits & ((1 << mantissa_bits) - 1)
    if biased == (1 << exponent_bits) - 1:
        raise UnusableValue("infinite" if mantissa == 0 else "not a number")
    if biased == 0 and mantissa == 0:
        return 0, 0
    # Below a power of two the neighbours lie twice as close as above it.
    closer_below = mantissa == 0 and biased > 1
    if biased > 0:
        mantissa |= 1 << mantissa_bits
    exponent = max(biased, 1) - (1 << (exponent_bits - 1)) + 1 - mantissa_bits - 2
    shift_up, denominator = max(exponent, 0), 1 << max(-exponent, 0)
    value = 4 * mantissa << shift_up
    lowest = value - ((1 if closer_below else 2) << shift_up)
    highest = value + (2 << shift_up)
    both_ends_round_here = mantissa % 2 == 0
    leading = _decimal_magnitude(value, denominator)
    for digits in range(1, most_digits + 1):
        unit = leading - digits + 1
        up, down = 10 ** max(unit, 0), 10 ** max(-unit, 0)
        below = value * down // (denominator * up)
        fitting = []
        for candidate in (below, below + 1):
            scaled = candidate * up * denominator
            inside = lowest * down < scaled < highest * down
            if inside or (both_ends_round_here and scaled in (lowest * down, highest * down)):
                fitting.append((abs(scaled - value * down), candidate))
        if fitting:
            chosen = min(fitting)[1]
            return (-chosen if negative else chosen), unit
    raise AssertionError(f"{most_digits} digits name every {kind}")


def _number_or_text(place: SerialNumber | Identity, words: tuple[int, ...], what: str) -> str:
    if len(words) != place.count:
        raise UnusableValue(f"{len(words)} registers, expected {place.count}")
    if place.type == "number" or place.type == "hex":
        number = _joined(words)
        if number in (0, (1 << (16 * place.count)) - 1):
            raise UnusableValue(f"no {what} is set ({_hex(words)})")
        return str(number) if place.type == "number" else f"{number:0{4 * place.count}X}"
    if place.type == "text":
        raw = b"".join(word.to_bytes(2, "big") for word in words)
    else:
        raw = bytes(word & 0xFF for word in words)
    text = raw.split(b"\0", 1)[0].decode("ascii", errors="replace").strip()
    if not text or not text.isprintable() or "\ufffd" in text:
        raise UnusableValue(f"no printable {what} ({raw.hex()})")
    return text


def _scaled(register: Register, words: tuple[int, ...], exponent: int, per_unit: int) -> tuple[int, int]:
    """The value as an exact fraction (numerator, positive denominator) of the smallest unit."""
    number, decimal_exponent = _number(register, words)
    return _to_unit(register, number, exponent + decimal_exponent, per_unit)


def _to_unit(register: Register, number: int, exponent: int, per_unit: int) -> tuple[int, int]:
    numerator = number * register.multiply * per_unit * int(10 ** max(exponent, 0))
    return numerator, register.divide * int(10 ** max(-exponent, 0))


def _number(register: Register, words: tuple[int, ...]) -> tuple[int, int]:
    """What the registers say, as digits and a power of ten."""
    if len(words) != words_in(register.type):
        raise UnusableValue(f"{len(words)} registers, expected {words_in(register.type)}")
    if register.byte_order == "little":
        words = tuple((word >> 8) | (word & 0xFF) << 8 for word in words)
    bits = _joined(words if register.word_order == "big" else words[::-1])
    if bits in register.sentinel_bits:
        raise UnusableValue(f"the meter says that the value is not available ({_hex(words)})")
    if register.type == "f32" or register.type == "f64":
        return shortest_decimal(bits, register.type)
    number = _signed(bits, 16 * len(words)) if register.type.startswith("s") else bits
    if register.rollover is not None:
        half = 1 << (16 * len(words) - 1)
        if number < 0 and number + register.rollover >= half:
            number += register.rollover
        if number >= register.rollover:
            raise UnusableValue(f"{_hex(words)} is beyond the count at which the counter should start again")
    return number, 0


def _joined(words: tuple[int, ...]) -> int:
    number = 0
    for word in words:
        number = number << 16 | word
    return number


def _signed(bits: int, width: int) -> int:
    return bits - (1 << width) if bits >> (width - 1) else bits


def _decimal_magnitude(numerator: int, denominator: int) -> int:
    """The k for which 10^k <= numerator / denominator < 10^(k + 1)."""
    magnitude = len(str(numerator)) - len(str(denominator))
    if numerator * 10 ** max(-magnitude, 0) < denominator * 10 ** max(magnitude, 0):
        magnitude -= 1
    return magnitude


def _hex(words: tuple[int, ...]) -> str:
    return " ".join(f"{word:04X}" for word in words)
