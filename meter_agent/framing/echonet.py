"""ECHONET Lite, class 0x0288 (low-voltage smart electric energy meter): from raw property values to energy. Pure.

The meter counts in steps of coefficient (D3) × unit (E1) and shows as many digits as D7 says, after which it starts
again at 0. At each full half hour of Japanese time it notes its counters: EA for energy taken, EB for energy delivered,
with the time. What it has no value for reads FFFFFFFE (energy) or 7FFFFFFE (power), which is never a number.
Source: ECHONET Lite APPENDIX, detailed requirements for ECHONET device objects, section 3.3.25 (release P).
"""

from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Final

NO_ENERGY: Final = 0xFFFF_FFFE
NO_POWER: Final = 0x7FFF_FFFE

HALF_HOUR_S: Final = 1_800

MAX_COEFFICIENT: Final = 999_999
MAX_DIGITS: Final = 8

EARLY_S: Final = 60
LATE_S: Final = 600
"""How far the meter's clock may be ahead of and behind ours. A half hour is asked for after it, and is gone with the
next: further off than this, one of the two clocks is wrong."""

JAPAN: Final = timezone(timedelta(hours=9))
"""No daylight saving."""

_UNITS_MWH: Final = {
    1: 1_000_000,
    0.1: 100_000,
    0.01: 10_000,
    0.001: 1_000,
    0.0001: 100,
    10: 10_000_000,
    100: 100_000_000,
    1_000: 1_000_000_000,
    10_000: 10_000_000_000,
}
"""E1 in kWh, as a library gives it, to mWh."""


class ImplausibleProperty(Exception):
    """A property that is no reading: `reason` says what is wrong with it, and what to do where that is known."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Scale:
    """What a count of the meter means: `step_mwh` each, from 0 again at `rollover_mwh` (None if not known)."""

    step_mwh: int
    rollover_mwh: int | None


def scale(unit_kwh: float, coefficient: int, digits: int | None) -> Scale:
    """From E1, D3 (1 where a meter has none) and D7. Raises ImplausibleProperty."""
    unit_mwh = _UNITS_MWH.get(unit_kwh)
    if unit_mwh is None:
        raise ImplausibleProperty(f"the meter counts in units of {unit_kwh} kWh, which ECHONET Lite does not know")
    if not 1 <= coefficient <= MAX_COEFFICIENT:
        raise ImplausibleProperty(f"the meter's coefficient (D3) reads {coefficient}")
    if digits is not None and not 1 <= digits <= MAX_DIGITS:
        raise ImplausibleProperty(f"the meter's number of digits (D7) reads {digits}")
    step_mwh = unit_mwh * coefficient
    return Scale(step_mwh, None if digits is None else int(10**digits) * step_mwh)


def energy_mwh(count: int | None, meter_scale: Scale) -> int | None:
    """A counter in mWh; None where the meter has no value. Raises ImplausibleProperty for more than its digits."""
    if count is None or count == NO_ENERGY:
        return None
    energy = count * meter_scale.step_mwh
    if count < 0 or (meter_scale.rollover_mwh is not None and energy >= meter_scale.rollover_mwh):
        raise ImplausibleProperty(f"a counter reads {count}, more than the meter has digits for")
    return energy


def power_w(power: int | None) -> int | None:
    """E7 in W, import positive; None where the meter has no value."""
    return None if power == NO_POWER else power


def half_hour_s(noted: datetime, now_s: float) -> int:
    """When the meter noted its counters (its own local time), as UTC epoch seconds.

    Raises ImplausibleProperty if that is no half hour, or cannot be the last one by our clock.
    """
    time_s = int(noted.replace(tzinfo=JAPAN).timestamp())
    if time_s % HALF_HOUR_S:
        raise ImplausibleProperty(f"the meter noted its counters at {noted:%H:%M:%S}, which is no half hour")
    if not -EARLY_S <= now_s - time_s <= HALF_HOUR_S + LATE_S:
        here = datetime.fromtimestamp(now_s, JAPAN)
        raise ImplausibleProperty(
            f"the meter's last half hour is {noted:%Y-%m-%d %H:%M}, but here it is {here:%Y-%m-%d %H:%M} "
            "(Japanese time); check this gateway's clock (timedatectl), and the meter's"
        )
    return time_s
