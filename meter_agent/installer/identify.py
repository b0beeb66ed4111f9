"""Which profile fits a meter that answered: pure judgement over what each profile could read from it.

Register maps overlap, so a profile that reads something need not be the right one. Judged are, in this order: the
meter's own word (an identity register, or SunSpec's mark and model), whether every register of the profile answers, and
whether the values could be those of a meter. Registers that hold zero say nothing: many meters answer every address
with it. Where two profiles fit equally well both are named, because only the meter's label can tell them apart.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from meter_agent.profiles import MeterProfile, Quantity
from meter_agent.readings import Sample

PLAUSIBLE_MWH: Final = 5_000_000_000_000
"""5 GWh, 57 years of a 10 kW line. Numbers taken for another type are mostly above: 1.0 as an integer is 0x3F800000."""

PLAUSIBLE_W: Final = 2_000_000
"""More power than any meter shows that has its registers read by such a gateway."""

_POINTS_COUNTER: Final = 4
_POINTS_POWER: Final = 2
_POINTS_SERIAL_NUMBER: Final = 1


class Fit(IntEnum):
    """How well a profile fits, from not at all to by the meter's own word."""

    NONE = 0
    POSSIBLE = 1
    LIKELY = 2
    CERTAIN = 3


@dataclass(frozen=True, slots=True)
class Look:
    """What one profile read from a meter. `model` is by its identity register; `doubt` says why there is none.

    `contradicted`: the register answered, with something that the profile does not know. Old firmware often has no such
    register, so that it does not answer weighs less.
    """

    profile: MeterProfile
    sample: Sample | None
    model: str | None = None
    doubt: str = ""
    contradicted: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """How well a profile fits and why, in words; `points` order verdicts of the same fit."""

    profile: str
    fit: Fit
    points: int
    model: str | None
    reasons: tuple[str, ...]
    sample: Sample | None


def judge(look: Look) -> Verdict:
    """The verdict on one profile."""
    sample, profile = look.sample, look.profile
    if sample is None:
        return Verdict(profile.name, Fit.NONE, 0, look.model, ("the registers do not answer",), None)
    values: dict[Quantity, int | None] = {
        "import": sample.import_mwh,
        "export": sample.export_mwh,
        "power": sample.power_w,
    }
    missing = [quantity for quantity in _quantities(profile) if values[quantity] is None]
    counters = [value for quantity, value in values.items() if quantity != "power" and value is not None]
    implausible = any(value > PLAUSIBLE_MWH for value in counters) or abs(values["power"] or 0) > PLAUSIBLE_W
    points = _POINTS_COUNTER * sum(value > 0 for value in counters) + _POINTS_POWER * bool(values["power"])
    points += _POINTS_SERIAL_NUMBER * (sample.serial_number is not None) - _POINTS_POWER * (
        len(missing) + bool(look.doubt)
    )
    reasons = _reasons(look, missing, counters, implausible)
    if not profile.confirmed and not implausible:
        fit = Fit.POSSIBLE
    elif look.model is not None or (profile.sunspec is not None and not implausible):
        fit = Fit.CERTAIN
    elif implausible:
        fit = Fit.NONE
    elif look.contradicted or missing or not any(counters) or _lacks_serial_number(look):
        fit = Fit.POSSIBLE
    else:
        fit = Fit.LIKELY
    return Verdict(profile.name, fit, points, look.model, reasons, sample)


def ranked(verdicts: Iterable[Verdict]) -> tuple[Verdict, ...]:
    """Those that fit at all and none of which another one beats in kind, the best first."""
    fitting = [verdict for verdict in verdicts if verdict.fit is not Fit.NONE]
    best = max((verdict.fit for verdict in fitting), default=Fit.NONE)
    kept = [verdict for verdict in fitting if verdict.fit is best]
    return tuple(sorted(kept, key=lambda verdict: (-verdict.points, verdict.profile)))


def equally_good(verdicts: tuple[Verdict, ...]) -> tuple[str, ...]:
    """The profiles that fit as well as the first one, itself included."""
    return tuple(verdict.profile for verdict in verdicts if verdict.points == verdicts[0].points)


def _quantities(profile: MeterProfile) -> list[Quantity]:
    return list(profile.registers) if profile.registers is not None else []


def _lacks_serial_number(look: Look) -> bool:
    assert look.sample is not None
    return look.profile.serial_number is not None and look.sample.serial_number is None


def _reasons(look: Look, missing: list[Quantity], counters: list[int], implausible: bool) -> tuple[str, ...]:
    reasons = []
    if look.model is not None:
        reasons.append(f"it says that it is a {look.model}")
    if look.profile.sunspec is not None:
        reasons.append("it carries SunSpec's mark and a model of this profile")
    if not look.profile.confirmed:
        reasons.append("the profile is unconfirmed, compare with the display")
    if look.doubt:
        reasons.append(look.doubt)
    if missing:
        reasons.append(f"it has no {' and no '.join(missing)}")
    if implausible:
        reasons.append("its values are too large to be true")
    elif not any(counters):
        reasons.append("its counters are zero, which says little")
    elif not missing and not look.doubt:
        reasons.append("all registers answer with plausible values")
    return tuple(reasons)
