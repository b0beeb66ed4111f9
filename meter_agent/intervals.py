"""From samples of a cumulative register to sealed market intervals. Pure: state and sample in, state and intervals out.

The register is differenced at interval boundaries. Its value at a boundary is measured if a sample falls exactly on it,
otherwise interpolated between the samples before and after; over an outage longer than an interval that spreads the
difference evenly, and the intervals are marked estimated. A boundary value is floored to whole Wh *before* it is
differenced: remainders carry into the next interval, and all intervals together are exactly what the register counted.

A sample that does not fit (a counter that went backwards or jumped beyond what the line can carry, another serial
number) is held back, and nothing is sealed. Then one of these is true, and the samples that follow tell which:

- a glitch: later samples fit again. Nothing has happened.
- a rollover, if the profile says where: counted over.
- a swap: another serial number, and two reads at least CONFIRM_AFTER_S apart that agree with each other.
- a reset, or a swap that shows no serial number: two such reads, between which the register has also moved. A value
  that only stands there, such as the 0 of an inverter that sleeps, is never believed.

At a swap or reset the count goes on from the new register's first value: what both registers counted is in the
intervals, nobody's lifetime ever is. Of the time between them nothing is known: intervals that lie in it are missing,
those that touch it estimated.

When the calendar is set, registers keep counting and their times are put right. An interval that was sealed before is
never sealed again. What was counted in times whose intervals were sealed already goes to the next interval, which says
since when it was counted; if that is more than an interval's worth it goes to none. Everything that was counted and
that no interval has (this, an outage of more than LONGEST_OUTAGE_S, what exceeds the line's capacity, a jump of one and
the same meter) adds up in `MeterState.unassigned_wh`.

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
"""A longer outage is not spread: its energy is unassigned, and its intervals are one event and no messages."""

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
    MAY_HAVE_GONE_ROUND = "may-have-gone-round"
    STUCK = "stuck"


class EventKind(Enum):
    """What is worth an entry in the journal."""

    FAULT = "fault"
    RECOVERED = "recovered"
    METER_SWAPPED = "meter-swapped"
    COUNTER_RESET = "counter-reset"
    COUNTER_JUMPED = "counter-jumped"
    ROLLED_OVER = "rolled-over"
    CLOCK_STEPPED = "clock-stepped"
    ABOVE_CAPACITY = "above-capacity"
    OUTAGE_TOO_LONG = "outage-too-long"
    UNASSIGNED = "unassigned"


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
    """A sample that is believed, or waits to be.

    `total_mwh` is `raw_mwh` with the rollovers added back, and goes on where the count of an earlier meter ended.
    `monotonic_us` is None when the anchor comes from before a restart.
    """

    time_us: int
    monotonic_us: int | None
    raw_mwh: int
    total_mwh: int
    serial_number: str | None


@dataclass(frozen=True, slots=True)
class Boundary:
    """The total at an interval boundary in whole Wh, and the times of the samples around it that it rests on.

    `quality` is the best that an interval can have that begins here. `set_s` is by how much the clock has been set
    since: the register had this value at `at_s + set_s`.
    """

    at_s: int
    total_wh: int
    quality: Quality
    before_s: int
    after_s: int
    set_s: int = 0

    @property
    def counted_s(self) -> int:
        """When the register had this value, by the clock as it is now."""
        return self.at_s + self.set_s


@dataclass(frozen=True, slots=True)
class MeterState:
    """Everything that is carried from sample to sample. A new meter starts with `MeterState()`.

    `boundary` is the end of the last sealed interval, None until a first boundary was passed; no interval before it is
    sealed again. `unassigned_wh` is what was counted since the first boundary and is in no interval: all intervals and
    this together are what the meters counted. `flat_wus` is the meter's own power in W × µs since its register last
    moved.
    """

    anchor: Anchor | None = None
    boundary: Boundary | None = None
    unassigned_wh: int = 0
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
    """What one sample led to. `keep`: the new state must be on disk before anything else happens."""

    state: MeterState
    sealed: tuple[SealedInterval, ...] = ()
    events: tuple[MeterEvent, ...] = ()
    keep: bool = False


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
    state, clock_events = _follow_clock(state, reading.anchor)
    step = _take(state, reading, rules)
    return replace(step, events=clock_events + step.events, keep=True) if clock_events else step


def next_boundary_s(time_s: float, interval_s: int) -> int:
    """The first boundary after `time_s`."""
    return (int(time_s) // interval_s + 1) * interval_s


def retimed(sample: Sample, monotonic_s: float, time_s: float) -> Sample:
    """The sample with the calendar time that it must have had, given what monotonic and calendar time are now.

    A time that the meter noted itself does not depend on the agent's clock.
    """
    if sample.own_time:
        return sample
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


def _follow_clock(state: MeterState, point: Anchor) -> tuple[MeterState, tuple[MeterEvent, ...]]:
    """Bring the times in the state to the clock of `point`, if the calendar was set since the last sample."""
    anchor, boundary, suspect = state.anchor, state.boundary, state.suspect
    assert anchor is not None
    if anchor.monotonic_us is None or point.monotonic_us is None or point.monotonic_us < anchor.monotonic_us:
        # After a restart nobody knows how long it was; if time seems to run backwards, one of the two was wrong.
        step_us = min(0, point.time_us - anchor.time_us)
    else:
        step_us = point.time_us - (point.monotonic_us - anchor.monotonic_us) - anchor.time_us
    if abs(step_us) <= CLOCK_TOLERANCE_S * _US:
        return state, ()
    if boundary is not None:
        boundary = replace(boundary, quality=max(boundary.quality, Quality.ESTIMATED))
        boundary = replace(boundary, set_s=boundary.set_s + step_us // _US)
    if suspect is not None:
        suspect = replace(suspect, time_us=suspect.time_us + step_us)
    event = MeterEvent(EventKind.CLOCK_STEPPED, f"the clock was set by {step_us // _US:+d} s since the last sample")
    anchor = replace(anchor, time_us=anchor.time_us + step_us)
    return replace(state, anchor=anchor, boundary=boundary, suspect=suspect), (event,)


def _take(state: MeterState, reading: _Reading, rules: MeterRules) -> Step:
    anchor = state.anchor
    assert anchor is not None
    point = reading.anchor
    elapsed_us = point.time_us - anchor.time_us
    if elapsed_us <= 0:
        return Step(state)
    judged = _judge(anchor, reading, rules)
    if isinstance(judged, Fault) or _follows_suspect_only(state, reading, rules):
        return _hold_back(state, reading, judged, rules)
    flat_wus = _flat_wus(state, judged, elapsed_us, reading.flow_w)
    if flat_wus > rules.stuck_after_wh * _WH_TO_WUS:
        # Treated like an outage: nothing is sealed until the register moves again.
        detail = f"the register stands at {point.raw_mwh} mWh while power added up to {flat_wus // _WH_TO_WUS} Wh"
        return _faulty(replace(state, flat_wus=flat_wus), Fault.STUCK, detail)
    step = _accept(replace(state, flat_wus=flat_wus), anchor, judged, rules)
    if point.raw_mwh < anchor.raw_mwh:
        detail = f"the register rolled over at {reading.rollover_mwh} mWh: {anchor.raw_mwh} to {point.raw_mwh} mWh"
        return replace(step, events=(MeterEvent(EventKind.ROLLED_OVER, detail), *step.events))
    return step


def _allowed_mwh(elapsed_us: int, rules: MeterRules) -> int:
    """Most that the register can have moved: 110 % of capacity × time, and one step of its resolution."""
    return rules.capacity_w * elapsed_us * 11 // 36_000_000 + rules.resolution_mwh


def _judge(last: Anchor, reading: _Reading, rules: MeterRules) -> Anchor | Fault:
    """The new anchor if `reading` can follow `last`, or why it cannot."""
    point, rollover_mwh = reading.anchor, reading.rollover_mwh
    if None not in (last.serial_number, point.serial_number) and last.serial_number != point.serial_number:
        return Fault.SERIAL_CHANGED
    moved_mwh = point.raw_mwh - last.raw_mwh
    allowed_mwh = _allowed_mwh(point.time_us - last.time_us, rules)
    if rollover_mwh is not None and allowed_mwh >= rollover_mwh:
        # A counter that may have gone round once or twice says nothing any more.
        return Fault.MAY_HAVE_GONE_ROUND
    if moved_mwh < 0:
        if rollover_mwh is None or not 0 <= moved_mwh + rollover_mwh <= allowed_mwh:
            return Fault.COUNTER_BACKWARDS
        moved_mwh += rollover_mwh
    if moved_mwh > allowed_mwh:
        return Fault.IMPOSSIBLE_JUMP
    return replace(point, total_mwh=last.total_mwh + moved_mwh, serial_number=point.serial_number or last.serial_number)


def _follows_suspect_only(state: MeterState, reading: _Reading, rules: MeterRules) -> bool:
    """True if a reading that could follow the anchor by now is rather the suspect's successor.

    The more time passes, the more a line could have carried: a value that was impossible at once must not become
    possible by standing there for an hour.
    """
    anchor, suspect = state.anchor, state.suspect
    assert anchor is not None
    if suspect is None or isinstance(_judge(suspect, reading, rules), Fault):
        return False
    other_meter = None not in (anchor.serial_number, suspect.serial_number) and (
        anchor.serial_number != suspect.serial_number
    )
    # A counter that was lower for a moment and is back where it was has recovered, though it also follows the suspect.
    return other_meter or suspect.raw_mwh > anchor.raw_mwh


def _hold_back(state: MeterState, reading: _Reading, judged: Anchor | Fault, rules: MeterRules) -> Step:
    """A sample that does not fit: wait for more, or go on from the suspect if enough of them agree with it."""
    anchor, suspect, point = state.anchor, state.suspect, reading.anchor
    assert anchor is not None
    fault = judged if isinstance(judged, Fault) else state.fault or Fault.IMPOSSIBLE_JUMP
    between = f"{anchor.raw_mwh} mWh (serial number {anchor.serial_number})"
    agreed: Anchor | Fault = fault
    if suspect is not None:
        # The total stands still over the gap: what flowed in it was counted by nobody.
        suspect = replace(suspect, total_mwh=anchor.total_mwh)
        agreed = _judge(suspect, reading, rules)
    if suspect is None or isinstance(agreed, Fault):
        detail = (
            f"{between} was followed after {(point.time_us - anchor.time_us) // _US} s by {point.raw_mwh} mWh "
            f"(serial number {point.serial_number}); nothing is sent until reads agree"
        )
        return _faulty(replace(state, suspect=point), fault, detail)
    counts = fault in (Fault.SERIAL_CHANGED, Fault.MAY_HAVE_GONE_ROUND) or point.raw_mwh != suspect.raw_mwh
    if not counts or point.time_us - suspect.time_us < CONFIRM_AFTER_S * _US:
        return Step(state)
    detail = (
        f"{fault.value} confirmed: counting ended at {between} and goes on from {suspect.raw_mwh} mWh (serial number "
        f"{agreed.serial_number}); what flowed in the {(suspect.time_us - anchor.time_us) // _US} s between is unknown"
    )
    first = _accept(replace(state, fault=None), anchor, suspect, rules, unknown=True)
    jumped_wh = (suspect.raw_mwh - anchor.raw_mwh) // 1_000
    after = first.state
    if fault is Fault.IMPOSSIBLE_JUMP and anchor.serial_number == suspect.serial_number is not None:
        # Known to be the same meter: it says that it counted this, and no interval can have it.
        after = replace(after, unassigned_wh=after.unassigned_wh + jumped_wh)
        detail += f"; {jumped_wh} Wh are in no interval"
    then = _accept(after, suspect, agreed, rules)
    events = (MeterEvent(_CONFIRMED[fault], detail), *first.events, *then.events)
    return Step(then.state, first.sealed + then.sealed, events, keep=True)


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


def _accept(state: MeterState, before: Anchor, point: Anchor, rules: MeterRules, *, unknown: bool = False) -> Step:
    """Believe `point` and seal every interval that ends between `before` and it.

    `unknown` says that between the two nobody counted, so that intervals inside are missing and others estimated.
    """
    events: list[MeterEvent] = []
    sealed: list[SealedInterval] = []
    boundary, unassigned_wh, at_s = _base(state, before, point, rules, events)
    while boundary is not None and (at_s := at_s + rules.interval_s) * _US <= point.time_us:
        value = _boundary_at(at_s, boundary, before, point, rules.interval_s)
        if unknown:
            value = replace(value, quality=Quality.ESTIMATED)
        nothing_known = unknown and boundary.at_s * _US >= before.time_us
        interval = _seal(boundary, value, rules, nothing_known, events)
        sealed.append(interval)
        unassigned_wh += value.total_wh - boundary.total_wh - interval.energy_wh
        boundary = value
    if boundary is not None and unknown:
        boundary = replace(boundary, quality=max(boundary.quality, Quality.ESTIMATED))
    if state.fault is not None:
        events.append(MeterEvent(EventKind.RECOVERED, f"no longer {state.fault.value}"))
    new_state = MeterState(point, boundary, unassigned_wh, None, None, state.flat_wus)
    return Step(new_state, tuple(sealed), tuple(events), keep=boundary != state.boundary)


def _base(
    state: MeterState, before: Anchor, point: Anchor, rules: MeterRules, events: list[MeterEvent]
) -> tuple[Boundary | None, int, int]:
    """The boundary that the next interval starts from, what is unassigned by then, and the boundary's time."""
    base = state.boundary
    last_s = point.time_us // _US // rules.interval_s * rules.interval_s
    if base is None:
        first_s = -(-before.time_us // (rules.interval_s * _US)) * rules.interval_s
        if first_s * _US > point.time_us:
            return None, 0, 0
        return _boundary_at(first_s, None, before, point, rules.interval_s), 0, first_s
    if last_s - base.at_s > LONGEST_OUTAGE_S:
        anew_s, kind, why = last_s, EventKind.OUTAGE_TOO_LONG, f"no intervals from {base.at_s} to {last_s}"
    elif base.set_s < -rules.interval_s and base.at_s <= last_s:
        why = f"intervals until {base.at_s} were sealed before their time"
        anew_s, kind = base.at_s, EventKind.UNASSIGNED
    else:
        return base, state.unassigned_wh, base.at_s
    anew = _boundary_at(anew_s, base, before, point, rules.interval_s)
    lost_wh = anew.total_wh - base.total_wh
    events.append(MeterEvent(kind, f"{why}; {lost_wh} Wh that were counted meanwhile are in no interval"))
    return anew, state.unassigned_wh + lost_wh, anew_s


def _boundary_at(at_s: int, last: Boundary | None, before: Anchor, after: Anchor, interval_s: int) -> Boundary:
    """The total at a boundary between the last one and `after`."""
    at_us = at_s * _US
    if last is not None and at_s <= last.counted_s:
        # The clock was set forward over it, so it passed while nothing was counted.
        set_s = last.counted_s - at_s
        return Boundary(at_s, last.total_wh, Quality.ESTIMATED, at_s, at_s, set_s)
    for exact in (before, after):
        if exact.time_us == at_us:
            return Boundary(at_s, exact.total_mwh // 1_000, Quality.MEASURED, at_s, at_s)
    from_us, from_mwh = before.time_us, before.total_mwh
    if last is not None and at_us < from_us:
        # Only after the clock was set: between the last boundary and a sample of before.
        from_us, from_mwh, after = last.counted_s * _US, last.total_wh * 1_000, before
    gap_us = after.time_us - from_us
    moved_mwh = (after.total_mwh - from_mwh) * (at_us - from_us) // gap_us
    quality = Quality.ESTIMATED if gap_us > interval_s * _US else Quality.INTERPOLATED
    return Boundary(at_s, (from_mwh + moved_mwh) // 1_000, quality, from_us // _US, -(-after.time_us // _US))


def _seal(
    start: Boundary, end: Boundary, rules: MeterRules, nothing_known: bool, events: list[MeterEvent]
) -> SealedInterval:
    energy_wh = end.total_wh - start.total_wh
    # The same limit as the ledger's: capacity × time × 1.1. It holds back what slipped through as a coarse step.
    if energy_wh * 36_000 > rules.capacity_w * rules.interval_s * 11:
        detail = (
            f"{energy_wh} Wh from {start.at_s} to {end.at_s} is more than 110 % of {rules.capacity_w} W; withheld, and "
            "in no interval"
        )
        events.append(MeterEvent(EventKind.ABOVE_CAPACITY, detail))
        return SealedInterval(start.at_s, end.at_s, 0, Quality.MISSING, None)
    if nothing_known or start.counted_s >= end.at_s:
        return SealedInterval(start.at_s, end.at_s, 0, Quality.MISSING, None)
    quality = max(start.quality, end.quality)
    sampled_s = None if quality is Quality.MEASURED else (start.before_s + start.set_s, end.after_s)
    return SealedInterval(start.at_s, end.at_s, energy_wh, quality, sampled_s)


_CONFIRMED: Final = {
    Fault.SERIAL_CHANGED: EventKind.METER_SWAPPED,
    Fault.COUNTER_BACKWARDS: EventKind.COUNTER_RESET,
    Fault.IMPOSSIBLE_JUMP: EventKind.COUNTER_JUMPED,
    Fault.MAY_HAVE_GONE_ROUND: EventKind.OUTAGE_TOO_LONG,
}
"""What it was, once reads have confirmed it."""
