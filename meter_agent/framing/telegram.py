"""What the framings of meter telegrams share: a reading, a refusal, which OBIS codes make a counter. Pure.

OBIS codes (IEC 62056-61) name what a value is: 1.8.0 is the energy taken from the grid, over all tariffs, 1.8.1 that of
tariff 1; 2.8.x is the energy delivered to it; 16.7.0 the power with its sign, 1.7.0 and 2.7.0 the power taken and
delivered, 15.7.0 their sum without a sign.
"""

import re
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Final

IMPORT_GROUP: Final = "1.8"
EXPORT_GROUP: Final = "2.8"

MAX_TARIFFS: Final = 4
"""Tariff registers of a direction that are added up; meters of households have two, a few have four."""

_QUANTITY: Final = re.compile(r"([+ -]?)(\d{1,10})(?:\.(\d{1,7}))?\*(k?)(Wh|W)")


class MalformedTelegram(Exception):
    """A telegram that is not read: `reason` says what is wrong with it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class TelegramReading:
    """What a telegram says. Counters are sums over tariffs in mWh, None where the meter sends none.

    `power_w` is import positive, and None also where its sign is not sure. A register starts again at 0 when its digits
    are used up, which makes the sum drop by the rollover, in mWh.
    """

    import_mwh: int | None
    export_mwh: int | None
    power_w: int | None
    serial_number: str | None
    import_rollover_mwh: int | None = None
    export_rollover_mwh: int | None = None


@dataclass(frozen=True, slots=True)
class ObisChoice:
    """The codes that the operator chose, `C.D.E`, and that must be there; what is empty is found in the telegram."""

    imports: tuple[str, ...] = ()
    exports: tuple[str, ...] = ()
    power: str | None = None


AS_SENT: Final = ObisChoice()
"""Nothing chosen: totals where a meter sends them, else its tariffs."""


def counter_codes(present: Container[str], group: str, chosen: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The codes to add up for a counter: those chosen, else `group.0` if sent, else the tariffs that are sent.

    Empty if there is none. Raises MalformedTelegram where a chosen one is missing.
    """
    for code in chosen:
        if code not in present:
            raise MalformedTelegram(f"it has no {code}, which the config names")
    if chosen:
        return chosen
    if f"{group}.0" in present:
        return (f"{group}.0",)
    tariffs = (f"{group}.{tariff}" for tariff in range(1, MAX_TARIFFS + 1))
    return tuple(code for code in tariffs if code in present)


def power_codes(present: Container[str], chosen: str | None = None) -> tuple[str, ...]:
    """The codes that make the power: the one chosen, else 16.7.0, else 1.7.0 less 2.7.0, else 15.7.0 (without sign).

    Empty if there is none. Raises MalformedTelegram where the chosen one is missing.
    """
    if chosen is not None:
        if chosen not in present:
            raise MalformedTelegram(f"it has no {chosen}, which the config names")
        return (chosen,)
    for codes in (("16.7.0",), ("1.7.0", "2.7.0"), ("15.7.0",)):
        sent = tuple(code for code in codes if code in present)
        if sent:
            return sent
    return ()


def counter_sum(codes: tuple[str, ...], text: Callable[[str], str]) -> tuple[int | None, int | None]:
    """The counter that these codes make and its rollover, both in mWh; None where there is none.

    `text` gives the value of a code as `energy_mwh` reads it. Raises MalformedTelegram.
    """
    if not codes:
        return None, None
    counters = [energy_mwh(code, text(code)) for code in codes]
    rollovers_mwh = {rollover_mwh for _, rollover_mwh in counters}
    return sum(counter_mwh for counter_mwh, _ in counters), rollovers_mwh.pop() if len(rollovers_mwh) == 1 else None


def energy_mwh(code: str, text: str) -> tuple[int, int]:
    """`000123.456*kWh` as mWh, rounded down, and one more than its digits can show. Raises MalformedTelegram."""
    sign, whole, fraction, kilo = _quantity(code, text, "Wh")
    if sign:
        raise MalformedTelegram(f"{code} reads {text[:40]!r}: a counter has no sign")
    return _shifted(whole, fraction, 6 if kilo else 3), int(10 ** len(whole)) * (1_000_000 if kilo else 1_000)


def power_mw(code: str, text: str) -> int:
    """`-00.123*kW` as mW, rounded towards 0. Raises MalformedTelegram."""
    sign, whole, fraction, kilo = _quantity(code, text, "W")
    magnitude_mw = _shifted(whole, fraction, 6 if kilo else 3)
    return -magnitude_mw if sign == "-" else magnitude_mw


def whole_watts(milliwatts: int) -> int:
    """mW as W, rounded towards 0."""
    return milliwatts // 1_000 if milliwatts >= 0 else -(-milliwatts // 1_000)


def _quantity(code: str, text: str, unit: str) -> tuple[str, str, str, str]:
    found = _QUANTITY.fullmatch(text)
    if found is None or found.group(5) != unit:
        raise MalformedTelegram(f"{code} reads {text[:40]!r}, which is no number of {unit} or k{unit}")
    sign, whole, fraction, kilo, _ = found.groups()
    return sign, whole, fraction or "", kilo


def _shifted(whole: str, fraction: str, places: int) -> int:
    """whole.fraction × 10^places, rounded down."""
    shift = places - len(fraction)
    return int(whole + fraction) * int(10 ** max(shift, 0)) // int(10 ** max(-shift, 0))
