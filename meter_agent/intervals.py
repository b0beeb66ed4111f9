"""From samples of a cumulative register to sealed market intervals. Pure: state and sample in, state and intervals out.

The register is differenced at interval boundaries. Its value at a boundary is measured if a sample falls exactly on it,
otherwise interpolated between the samples before and after; over an outage longer than an interval that spreads the
difference evenly, and the intervals are marked estimated. A boundary value is floored to whole Wh *before* it is
differenced: remainders carry into the next interval, and all intervals together are exactly what the register counted.

A sample that does not fit (a counter that went backwards or jumped beyond what the line can carry, another serial
number) is held back. If it was a glitch, later samples fit again and nothing has happened. If reads that are at least
CONFIRM_AFTER_S apart agree with each other, the meter was reset or swapped: counting starts anew from there, and the
intervals in between are sealed as missing, with no energy. So no meter's lifetime ever lands in an interval.

Times are integer microseconds inside, registers integer milli-watt-hours: no float takes part in a sum.
"""

from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, Literal

from broker.protocol.messages import Quality
from meter_agent.readings import Sample

CONFIRM_AFTER_S: Final = 60
"""A meter that was just switched on may count from 0 for some seconds; reads this far apart that agree are believed."""

CLOCK_TOLERANCE_S: Final = 2
"""Calendar and monotonic time that part by more than this between two samples: the clock was set."""

LONGEST_OUTAGE_S: Final = 31 * 86_400
"""A longer outage is not spread over intervals, and missing intervals are reported in one event and not sealed."""

LONGEST_POWER_GAP_S: Final = 60
"""Power times time says something about energy only between samples that are close."""

_US: Final = 1_000_000
_WH_TO_WUS: Final = 3_600 * _US


class Fault(Enum):
    """What is wrong with a meter at present. The value is the name in events and status messages."""

    REGISTER_ABSENT = "register-absent"
    COUNTER_BACKWARDS = "counter-backwards"
    IMPOSSIBLE_JUMP = "impossible-jump"
    SERIAL_CHANGED = "serial-changed"
    STUCK = "stuck"


class EventKind(Enum):
    """What is worth an entry in the journal."""

    FAULT = "fault"
    RECOVERED = "recovered"
    REBASED = "rebased"
    CLOCK_STEPPED = "clock-stepped"
    ABOVE_CAPACITY = "above-capacity"
    OUTAGE_TOO_LONG = "outage-too-long"


@dataclass(frozen=True, slots=True)
class MeterEvent:
    """Something that an operator should know, in a sentence."""

    kind: EventKind
    detail: str


@dataclass(frozen=True, slots=True)
class MeterRules:
    """What is known of a meter beforehand; see `config.MeterConfig`."""

    interval_s: int
    register: Literal["import", "export"]
    capacity_w: int
    resolution_mwh: int
    stuck_after_wh: int


@dataclass(frozen=True, slots=True)
class Anchor:
    """A sample that is believed, or waits to be. `total_mwh` is `raw_mwh` with the rollovers added back.

    `monotonic_us` is None when the anchor comes from before a restart.
    """

    time_us: int
    monotonic_us: int | None
    raw_mwh: int
    total_mwh: int
    serial_number: str | None


@dataclass(frozen=True, slots=True)
class Boundary:
    """The register at an interval boundary in whole Wh, and the times of the samples around it that it rests on."""

    at_s: int
    total_wh: int
    quality: Quality
    before_s: int
    after_s: int


@dataclass(frozen=True, slots=True)
class MeterState:
    """Everything that is carried from sample to sample. A new meter starts with `MeterState()`.

    `boundary` is the end of the last sealed interval, None until a first boundary was passed since the start or since
    counting started anew. No interval before `sealed_until_s` is sealed (again). `flat_wus` is the meter's own power
    in W × µs since its register last moved.
    """

    anchor: Anchor | None = None
    boundary: Boundary | None = None
    sealed_until_s: int = 0
    suspect: Anchor | None = None
    fault: Fault | None = None
    flat_wus: int = 0


@dataclass(frozen=True, slots=True)
class SealedInterval:
    """A finished interval. `sampled_s`: when its first and last sample were taken, if not at its boundaries."""

    start_s: int
    end_s: int
    energy_wh: int
    quality: Quality
    sampled_s: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Step:
    """What one sample led to."""

    state: MeterState
    sealed: tuple[SealedInterval, ...] = ()
    events: tuple[MeterEvent, ...] = ()


@dataclass(frozen=True, slots=True)
class _Reading:
    """The register of one sample, in integers."""

    anchor: Anchor
    rollover_mwh: int | None
    flow_w: int


def advance(state: MeterState, sample: Sample, rules: MeterRules) -> Step:
    """Take in one sample. Samples that bring nothing new (same or earlier time without a clock step) change nothing."""
    reading = _read(sample, rules)
    if reading is None:
        detail = f"the reply has no {rules.register} register; check `register` and the meter's profile"
        return _faulty(state, Fault.REGISTER_ABSENT, detail)
    if state.anchor is None:
        return _accept(state, reading.anchor, reading.anchor, rules)
    state, clock_events = _follow_clock(state, reading.anchor, rules)
    step = _take(state, reading, rules)
    return replace(step, events=clock_events + step.events)


def next_boundary_s(time_s: float, interval_s: int) -> int:
    """The first boundary after `time_s`."""
    return (int(time_s) // interval_s + 1) * interval_s


def retimed(sample: Sample, monotonic_s: float, time_s: float) -> Sample:
    """The sample with the calendar time that it must have had, given what monotonic and calendar time are now."""
    return replace(sample, time_s=time_s - (monotonic_s - sample.monotonic_s))


def _read(sample: Sample, rules: MeterRules) -> _Reading | None:
    power_w = sample.power_w or 0
    if rules.register == "import":
        raw_mwh, rollover_mwh, flow_w = sample.import_mwh, sample.import_rollover_mwh, max(0, power_w)
    else:
        raw_mwh, rollover_mwh, flow_w = sample.export_mwh, sample.export_rollover_mwh, max(0, -power_w)
    if raw_mwh is None or raw_mwh < 0:
        return None
    anchor = Anchor(round(sample.time_s * _US), round(sample.monotonic_s * _US), raw_mwh, raw_mwh, sample.serial_number)
    return _Reading(anchor, rollover_mwh, flow_w)


def _follow_clock(state: MeterState, point: Anchor, rules: MeterRules) -> tuple[MeterState, tuple[MeterEvent, ...]]:
    """Bring the state to the clock of `point`, if the calendar was set since the last sample."""
    anchor = state.anchor
    assert anchor is not None
    if anchor.monotonic_us is None or point.monotonic_us is None or point.monotonic_us < anchor.monotonic_us:
        if point.time_us >= anchor.time_us:
            return state, ()
        # After a restart nobody knows how long it was, only that one of the two times is wrong.
        true_us = point.time_us
    else:
        true_us = point.time_us - (point.monotonic_us - anchor.monotonic_us)
        if abs(true_us - anchor.time_us) <= CLOCK_TOLERANCE_S * _US:
            return state, ()
    step_s = (true_us - anchor.time_us) // _US
    event = MeterEvent(EventKind.CLOCK_STEPPED, f"the clock was set by {step_s:+d} s since the last sample")
    boundary = state.boundary
    # If the anchor leaves the interval that is not yet sealed, the base is lost and counting starts anew.
    if boundary is not None and not 0 <= true_us - boundary.at_s * _US < rules.interval_s * _US:
        boundary = None
    retimed_anchor = replace(anchor, time_us=true_us)
    return replace(state, anchor=retimed_anchor, boundary=boundary, suspect=None), (event,)


def _take(state: MeterState, reading: _Reading, rules: MeterRules) -> Step:
    anchor = state.anchor
    assert anchor is not None
    point = reading.anchor
    elapsed_us = point.time_us - anchor.time_us
    if elapsed_us <= 0:
        return Step(state)
    if _outage_too_long(elapsed_us, reading.rollover_mwh, rules):
        detail = f"no sample for {elapsed_us // _US} s; counting starts anew, the intervals in between are missing"
        event = MeterEvent(EventKind.OUTAGE_TOO_LONG, detail)
        step = _accept(_rebased(state), point, point, rules)
        return replace(step, events=(event, *step.events))
    judged = _judge(anchor, reading, rules)
    if isinstance(judged, Fault):
        return _hold_back(state, reading, judged, rules)
    flat_wus = _flat_wus(state, judged, elapsed_us, reading.flow_w)
    if flat_wus > rules.stuck_after_wh * _WH_TO_WUS:
        # Treated like an outage: nothing is sealed until the register moves again.
        detail = f"the register stands at {point.raw_mwh} mWh while power added up to {flat_wus // _WH_TO_WUS} Wh"
        return _faulty(replace(state, flat_wus=flat_wus), Fault.STUCK, detail)
    return _accept(replace(state, flat_wus=flat_wus), anchor, judged, rules)


def _outage_too_long(elapsed_us: int, rollover_mwh: int | None, rules: MeterRules) -> bool:
    # A counter that may have gone round once or twice says nothing any more.
    ambiguous = rollover_mwh is not None and _allowed_mwh(elapsed_us, rules) >= rollover_mwh
    return elapsed_us > LONGEST_OUTAGE_S * _US or ambiguous


def _allowed_mwh(elapsed_us: int, rules: MeterRules) -> int:
    """Most that the register can have moved: 110 % of capacity × time, and one step of its resolution."""
    return rules.capacity_w * elapsed_us * 11 // 36_000_000 + rules.resolution_mwh


def _judge(last: Anchor, reading: _Reading, rules: MeterRules) -> Anchor | Fault:
    """The new anchor if `reading` can follow `last`, or why it cannot."""
    point = reading.anchor
    if None not in (last.serial_number, point.serial_number) and last.serial_number != point.serial_number:
        return Fault.SERIAL_CHANGED
    moved_mwh = point.raw_mwh - last.raw_mwh
    allowed_mwh = _allowed_mwh(point.time_us - last.time_us, rules)
    if moved_mwh < 0:
        if reading.rollover_mwh is None or not 0 <= moved_mwh + reading.rollover_mwh <= allowed_mwh:
            return Fault.COUNTER_BACKWARDS
        moved_mwh += reading.rollover_mwh
    if moved_mwh > allowed_mwh:
        return Fault.IMPOSSIBLE_JUMP
    return replace(point, total_mwh=last.total_mwh + moved_mwh, serial_number=point.serial_number or last.serial_number)


def _hold_back(state: MeterState, reading: _Reading, fault: Fault, rules: MeterRules) -> Step:
    """A sample that does not fit: wait for more, or start anew if enough of them agree."""
    anchor, suspect, point = state.anchor, state.suspect, reading.anchor
    assert anchor is not None
    agreed = _judge(suspect, reading, rules) if suspect is not None else fault
    if suspect is None or isinstance(agreed, Fault):
        detail = (
            f"the register went from {anchor.raw_mwh} to {point.raw_mwh} mWh in "
            f"{(point.time_us - anchor.time_us) // _US} s, serial number {anchor.serial_number} to "
            f"{point.serial_number}; nothing is sent until reads agree"
        )
        return _faulty(replace(state, suspect=point), fault, detail)
    if point.time_us - suspect.time_us < CONFIRM_AFTER_S * _US:
        return Step(state)
    detail = (
        f"{fault.value} confirmed: the meter was reset or swapped; counting starts anew at {suspect.raw_mwh} mWh "
        f"(was {anchor.raw_mwh}), intervals until then are missing"
    )
    first = _accept(_rebased(state), suspect, suspect, rules)
    then = _accept(first.state, suspect, agreed, rules)
    events = (MeterEvent(EventKind.REBASED, detail), *first.events, *then.events)
    return Step(then.state, first.sealed + then.sealed, events)


def _rebased(state: MeterState) -> MeterState:
    """Only what was sealed is kept."""
    return MeterState(sealed_until_s=state.sealed_until_s)


def _faulty(state: MeterState, fault: Fault, detail: str) -> Step:
    """The state with that fault; an event only when it is another one than before."""
    if state.fault is fault:
        return Step(state)
    return Step(replace(state, fault=fault), (), (MeterEvent(EventKind.FAULT, f"{fault.value}: {detail}"),))


def _flat_wus(state: MeterState, point: Anchor, elapsed_us: int, flow_w: int) -> int:
    """The meter's own power in W × µs since its register last moved, `point` included."""
    assert state.anchor is not None
    if point.total_mwh != state.anchor.total_mwh:
        return 0
    close = elapsed_us <= LONGEST_POWER_GAP_S * _US
    return state.flat_wus + (flow_w * elapsed_us if close else 0)


def _accept(state: MeterState, before: Anchor, point: Anchor, rules: MeterRules) -> Step:
    """Believe `point` and seal every interval that ends between `before` and it."""
    events: list[MeterEvent] = []
    sealed: list[SealedInterval] = []
    boundary = state.boundary
    sealed_until_s = state.sealed_until_s
    if boundary is not None:
        at_s = boundary.at_s + rules.interval_s
    else:
        at_s = max(-(-before.time_us // (rules.interval_s * _US)) * rules.interval_s, sealed_until_s)
    while at_s * _US <= point.time_us:
        value = _boundary_at(at_s, before, point, rules.interval_s)
        if boundary is not None:
            sealed.append(_seal(boundary, value, rules, events))
        elif sealed_until_s:
            sealed.extend(_missing(sealed_until_s, at_s, rules.interval_s, events))
        boundary, sealed_until_s = value, at_s
        at_s += rules.interval_s
    if state.fault is not None:
        events.append(MeterEvent(EventKind.RECOVERED, f"no longer {state.fault.value}"))
    new_state = MeterState(point, boundary, sealed_until_s, None, None, state.flat_wus)
    return Step(new_state, tuple(sealed), tuple(events))


def _boundary_at(at_s: int, before: Anchor, after: Anchor, interval_s: int) -> Boundary:
    at_us = at_s * _US
    for exact in (before, after):
        if exact.time_us == at_us:
            return Boundary(at_s, exact.total_mwh // 1_000, Quality.MEASURED, at_s, at_s)
    gap_us = after.time_us - before.time_us
    moved_mwh = (after.total_mwh - before.total_mwh) * (at_us - before.time_us) // gap_us
    quality = Quality.ESTIMATED if gap_us > interval_s * _US else Quality.INTERPOLATED
    total_wh = (before.total_mwh + moved_mwh) // 1_000
    return Boundary(at_s, total_wh, quality, before.time_us // _US, -(-after.time_us // _US))


def _seal(start: Boundary, end: Boundary, rules: MeterRules, events: list[MeterEvent]) -> SealedInterval:
    energy_wh = end.total_wh - start.total_wh
    # The same limit as the ledger's: capacity × time × 1.1. It holds back what slipped through as a coarse step.
    if energy_wh * 36_000 > rules.capacity_w * rules.interval_s * 11:
        detail = f"{energy_wh} Wh from {start.at_s} to {end.at_s} is more than 110 % of {rules.capacity_w} W; withheld"
        events.append(MeterEvent(EventKind.ABOVE_CAPACITY, detail))
        return SealedInterval(start.at_s, end.at_s, 0, Quality.MISSING, None)
    quality = max(start.quality, end.quality)
    sampled_s = None if quality is Quality.MEASURED else (start.before_s, end.after_s)
    return SealedInterval(start.at_s, end.at_s, energy_wh, quality, sampled_s)


def _missing(from_s: int, until_s: int, interval_s: int, events: list[MeterEvent]) -> list[SealedInterval]:
    """Intervals of which nothing is known, unless they are too many to be worth a message each."""
    if until_s - from_s > LONGEST_OUTAGE_S:
        events.append(MeterEvent(EventKind.OUTAGE_TOO_LONG, f"no intervals from {from_s} to {until_s}"))
        return []
    return [
        SealedInterval(start_s, start_s + interval_s, 0, Quality.MISSING, None)
        for start_s in range(from_s, until_s, interval_s)
    ]
