"""Interval making: whatever the sample times, outages and rollovers, the intervals add up to the register.

The model of a meter here is a list of (time, true cumulative mWh); what it shows wraps at its rollover.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.protocol.messages import Quality
from meter_agent.intervals import (
    EventKind,
    Fault,
    MeterRules,
    MeterState,
    SealedInterval,
    Step,
    advance,
    next_boundary_s,
    retimed,
)
from meter_agent.readings import Sample

T0 = 1_700_001_000 // 1800 * 1800
RULES = MeterRules(interval_s=1800, register="import", capacity_w=10_000, resolution_mwh=1_000, stuck_after_wh=1_000)


def _sample(
    at_s: float, mwh: int | None, *, serial: str | None = None, power_w: int | None = None, rollover: int | None = None
) -> Sample:
    return Sample(at_s - T0 + 50.0, at_s, mwh, None, power_w, serial, rollover)


class _Run:
    """A meter's samples taken in one after the other."""

    def __init__(self, rules: MeterRules = RULES) -> None:
        self.rules = rules
        self.state = MeterState()
        self.sealed: list[SealedInterval] = []
        self.events: list[EventKind] = []

    def take(self, sample: Sample) -> Step:
        step = advance(self.state, sample, self.rules)
        self.state = step.state
        self.sealed += step.sealed
        self.events += [event.kind for event in step.events]
        return step

    def see(self, *samples: tuple[float, int]) -> None:
        """Each sample is (seconds after T0, mWh)."""
        for after_s, mwh in samples:
            self.take(_sample(T0 + after_s, mwh))

    def rows(self) -> list[tuple[int, int, str]]:
        """Each interval as (start after T0, Wh, quality)."""
        return [(s.start_s - T0, s.energy_wh, s.quality.name) for s in self.sealed]


@st.composite
def _histories(draw: st.DrawFn) -> list[tuple[float, int]]:
    """Samples at arbitrary times (some on boundaries, some after long outages), never faster than the capacity."""
    at_ms, mwh = T0 * 1000, draw(st.integers(0, 10**9))
    history = [(at_ms / 1000, mwh)]
    for gap_ms in draw(
        st.lists(st.one_of(st.integers(1, 20_000), st.integers(1, 10**7), st.just(0)), min_size=1, max_size=30)
    ):
        # 0 stands for: exactly at the next boundary.
        at_ms += gap_ms or 1_800_000 - at_ms % 1_800_000
        passed_ms = at_ms - round(history[-1][0] * 1000)
        mwh += draw(st.integers(0, 10_000 * passed_ms // 3_600))
        history.append((at_ms / 1000, mwh))
    last_ms = at_ms + 1_800_000 - at_ms % 1_800_000
    return [*history, (last_ms / 1000, mwh)]


@given(_histories(), st.integers(10**7, 10**9))
def test_intervals_add_up_to_the_register_difference(history: list[tuple[float, int]], rollover: int) -> None:
    run = _Run()
    for (earlier_s, _), (at_s, _) in pairwise([history[0], *history]):
        # An outage in which the counter may have gone round is not what this property is about.
        if 10_000 * (at_s - earlier_s) * 11 / 36 + 1_000 >= rollover:
            return
    for at_s, mwh in history:
        run.take(_sample(at_s, mwh % rollover, rollover=rollover))
    assert set(run.events) <= {EventKind.ROLLED_OVER}
    assert run.state.unassigned_wh == 0
    assert sum(s.energy_wh for s in run.sealed) == _floor(history[-1][1], history, rollover) - _floor(
        history[0][1], history, rollover
    )
    assert all(s.energy_wh >= 0 for s in run.sealed)
    assert [s.start_s for s in run.sealed] == list(range(T0, round(history[-1][0]), 1800))


def _floor(mwh: int, history: list[tuple[float, int]], rollover: int) -> int:
    """Whole Wh of a total that starts at what the meter first showed."""
    return (mwh - history[0][1] + history[0][1] % rollover) // 1000


@given(_histories())
def test_no_interval_is_off_by_more_than_what_the_samples_around_its_ends_leave_open(
    history: list[tuple[float, int]],
) -> None:
    run = _Run()
    for at_s, mwh in history:
        run.take(_sample(at_s, mwh))
    for interval in run.sealed:
        low = [max(v for t, v in history if t <= edge) for edge in (interval.start_s, interval.end_s)]
        high = [min(v for t, v in history if t >= edge) for edge in (interval.start_s, interval.end_s)]
        assert low[1] // 1000 - high[0] // 1000 <= interval.energy_wh <= high[1] // 1000 - low[0] // 1000
        if interval.quality is Quality.MEASURED:
            assert interval.energy_wh == high[1] // 1000 - low[0] // 1000
            assert interval.sampled_s is None
        else:
            assert interval.sampled_s is not None
            assert interval.sampled_s[0] <= interval.start_s < interval.end_s <= interval.sampled_s[1]


def test_samples_on_the_boundaries_are_measured() -> None:
    run = _Run()
    run.see((0, 5_999), (1800, 7_000), (3600, 7_999), (5400, 9_000))
    assert run.rows() == [(0, 2, "MEASURED"), (1800, 0, "MEASURED"), (3600, 2, "MEASURED")]


def test_the_first_boundary_sets_the_base_and_seals_nothing() -> None:
    run = _Run()
    run.see((-10, 5_000_000), (0, 5_001_000))
    assert run.rows() == []
    assert run.state.boundary is not None
    assert run.state.boundary.total_wh == 5001


def test_a_boundary_between_samples_is_interpolated_and_says_which_samples() -> None:
    run = _Run()
    run.see((0, 0), (1795, 1_000_000), (1805.5, 1_021_000), (3600, 2_000_000))
    assert run.rows() == [(0, 1010, "INTERPOLATED"), (1800, 990, "INTERPOLATED")]
    assert run.sealed[0].sampled_s == (T0, T0 + 1806)
    assert run.sealed[1].sampled_s == (T0 + 1795, T0 + 3600)


def test_an_outage_over_whole_intervals_is_spread_evenly_and_estimated() -> None:
    run = _Run()
    run.see((0, 0), (1800, 100_000), (4 * 1800, 401_000))
    assert run.rows() == [
        (0, 100, "MEASURED"),
        (1800, 100, "ESTIMATED"),
        (3600, 100, "ESTIMATED"),
        (5400, 101, "ESTIMATED"),
    ]


def test_a_rollover_is_counted_over() -> None:
    run = _Run()
    for after_s, shown in ((0, 838_860_000), (1800, 838_860_600), (3600, 900), (5400, 4_900)):
        run.take(_sample(T0 + after_s, shown, rollover=838_860_700))
    assert run.rows() == [(0, 0, "MEASURED"), (1800, 1, "MEASURED"), (3600, 4, "MEASURED")]
    assert run.events == [EventKind.ROLLED_OVER]


def test_an_outage_in_which_the_counter_may_have_gone_round_is_not_guessed() -> None:
    run = _Run()
    run.take(_sample(T0, 500_000, rollover=1_000_000))
    run.take(_sample(T0 + 7200, 600_000, rollover=1_000_000))
    assert (run.rows(), run.state.fault) == ([], Fault.MAY_HAVE_GONE_ROUND)
    run.take(_sample(T0 + 7260, 600_000, rollover=1_000_000))
    assert run.events == [EventKind.FAULT, EventKind.OUTAGE_TOO_LONG]
    assert run.rows() == [(1800 * i, 0, "MISSING") for i in range(4)]


def test_a_glitch_leaves_no_trace_in_the_energy() -> None:
    # home-assistant/core #138077: a late reply, 9113 kWh too high, once.
    run = _Run()
    run.see((0, 100_000), (900, 200_000), (910, 9_113_000_000), (920, 202_000), (1800, 300_000))
    assert run.rows() == [(0, 200, "MEASURED")]
    assert run.events == [EventKind.FAULT, EventKind.RECOVERED]


def test_a_counter_that_drops_to_zero_for_a_moment_and_comes_back_changes_nothing() -> None:
    # evcc #29286: the lifetime was booked as one interval.
    run = _Run()
    run.see((0, 9_000_000_000), (890, 9_000_100_000), (900, 0), (910, 0), (920, 0), (930, 9_000_100_000))
    run.see((1800, 9_000_200_000))
    assert run.rows() == [(0, 200, "MEASURED")]


def test_a_zero_that_only_stands_there_is_never_believed() -> None:
    # evcc #30267: an inverter that sleeps shows 0 all night and its lifetime again in the morning.
    run = _Run()
    run.see((0, 9_000_000_000), *((t, 0) for t in range(600, 1800, 30)))
    run.see(*((t, 9_000_100_000) for t in range(1800, 7201, 30)))
    assert run.events == [EventKind.FAULT, EventKind.RECOVERED]
    assert run.rows() == [(0, 100, "MEASURED")] + [(1800 * i, 0, "MEASURED") for i in (1, 2, 3)]


def test_a_counter_that_counts_from_zero_for_a_while_and_comes_back_never_books_its_lifetime() -> None:
    run = _Run()
    run.see((0, 9_000_000_000), *((t, t * 100) for t in range(600, 1800, 30)))
    run.see(*((t, 9_000_100_000 + t) for t in range(1800, 7201, 30)))
    assert EventKind.COUNTER_RESET in run.events
    assert EventKind.COUNTER_JUMPED in run.events
    # What it counted from its first 0 to its last, and from its return.
    assert run.rows()[0] == (0, 117, "ESTIMATED")
    assert sum(energy_wh for _, energy_wh, _ in run.rows()) == (177_000 - 60_000 + 5_400) // 1000


def test_a_reset_that_reads_confirm_goes_on_from_the_new_count() -> None:
    run = _Run()
    run.see((0, 5_000_000), (600, 5_100_000), (700, 3_000), (730, 4_000))
    assert run.events == [EventKind.FAULT]
    run.see((760, 5_000), (1800, 50_000), (3600, 150_000))
    assert run.events == [EventKind.FAULT, EventKind.COUNTER_RESET]
    # 100 Wh before and 47 Wh after; the 3 Wh that the new count began with are in no interval.
    assert run.rows() == [(0, 147, "ESTIMATED"), (1800, 100, "MEASURED")]


def test_a_swapped_meter_is_told_by_its_serial_number_even_if_the_new_count_would_fit() -> None:
    run = _Run()
    for after_s, mwh, serial in ((0, 1_000, "a"), (600, 2_000, "a"), (1200, 2_500, "b"), (1260, 2_600, "b")):
        run.take(_sample(T0 + after_s, mwh, serial=serial))
    assert run.events == [EventKind.FAULT, EventKind.METER_SWAPPED]
    run.take(_sample(T0 + 1800, 3_600, serial="b"))
    run.take(_sample(T0 + 3600, 4_600, serial="b"))
    assert run.rows() == [(0, 2, "ESTIMATED"), (1800, 1, "MEASURED")]


def test_a_swap_is_kept_at_once_because_the_old_meter_cannot_be_read_again() -> None:
    run = _Run()
    steps = [
        run.take(_sample(T0 + after_s, mwh, serial=serial))
        for after_s, mwh, serial in ((0, 1_000, "a"), (600, 2_000, "a"), (1200, 500, "b"), (1260, 600, "b"))
    ]
    assert [step.keep for step in steps] == [True, False, False, True]


def test_intervals_without_a_meter_are_missing_and_those_beside_them_estimated() -> None:
    run = _Run()
    for after_s, mwh, serial in ((0, 5_000, "a"), (600, 105_000, "a"), (6000, 7_000, "b"), (6060, 8_000, "b")):
        run.take(_sample(T0 + after_s, mwh, serial=serial))
    run.take(_sample(T0 + 7200, 57_000, serial="b"))
    assert run.rows() == [(0, 100, "ESTIMATED"), (1800, 0, "MISSING"), (3600, 0, "MISSING"), (5400, 50, "ESTIMATED")]


def test_a_swapped_meter_whose_serial_number_is_unreadable_once_is_not_taken_for_the_old_one() -> None:
    run = _Run()
    for after_s, mwh, serial in ((0, 1_000, "a"), (600, 2_000, "a"), (1200, 2_500, "b"), (1230, 2_600, None)):
        run.take(_sample(T0 + after_s, mwh, serial=serial))
    assert run.state.fault is Fault.SERIAL_CHANGED
    run.take(_sample(T0 + 1260, 2_700, serial="b"))
    assert run.events == [EventKind.FAULT, EventKind.METER_SWAPPED]


def test_a_confirmed_jump_of_the_same_meter_is_on_record_and_in_no_interval() -> None:
    run = _Run()
    for after_s, mwh in ((0, 5_000), (600, 6_000), (610, 2_006_500), (680, 2_007_000), (1800, 2_008_000)):
        run.take(_sample(T0 + after_s, mwh, serial="a"))
    assert run.events == [EventKind.FAULT, EventKind.COUNTER_JUMPED]
    assert run.rows() == [(0, 2, "ESTIMATED")]
    assert run.state.unassigned_wh == 2_000


def test_an_impossible_value_does_not_become_possible_by_standing_there() -> None:
    run = _Run()
    run.see((0, 1_000_000), *((t, 6_000_000) for t in range(10, 7201, 10)))
    # By now the line could have carried 5 kWh, but it was there in 10 s.
    assert run.rows() == []
    assert run.state.fault is Fault.IMPOSSIBLE_JUMP
    run.see((7210, 1_200_000), (9000, 1_300_000))
    assert run.events == [EventKind.FAULT, EventKind.RECOVERED]
    assert sum(energy_wh for _, energy_wh, _ in run.rows()) == 300


def test_reads_that_contradict_each_other_are_never_believed() -> None:
    run = _Run()
    run.see((0, 5_000_000), *((60 * i, 1_000 if i % 2 else 900_000_000) for i in range(1, 60)))
    assert run.rows() == []
    assert set(run.events) == {EventKind.FAULT}


def test_a_jump_beyond_capacity_is_withheld() -> None:
    run = _Run()
    run.see((0, 0), (1800, 5_502_000))
    assert (run.rows(), run.state.fault) == ([], Fault.IMPOSSIBLE_JUMP)
    run = _Run()
    run.see((0, 0), (1800, 5_500_000))
    assert run.rows() == [(0, 5500, "MEASURED")]


def test_an_interval_above_capacity_is_withheld_though_each_step_fits_the_resolution() -> None:
    run = _Run(replace(RULES, capacity_w=100, resolution_mwh=100_000))
    run.see((0, 0), (900, 100_000), (1800, 200_000), (3600, 255_000))
    assert run.rows() == [(0, 0, "MISSING"), (1800, 55, "MEASURED")]
    assert run.events == [EventKind.ABOVE_CAPACITY]
    assert run.state.unassigned_wh == 200


def test_a_reply_without_the_billed_register_is_a_fault() -> None:
    run = _Run()
    run.take(_sample(T0, None))
    assert run.state.fault is Fault.REGISTER_ABSENT
    run.see((10, 1_000))
    assert run.events == [EventKind.FAULT, EventKind.RECOVERED]


def test_a_register_that_stands_still_against_the_meters_own_power_is_stuck_until_it_moves() -> None:
    run = _Run()
    for after_s in range(0, 3601, 10):
        run.take(_sample(T0 + after_s, 7_000, power_w=4_000))
    assert run.state.fault is Fault.STUCK
    assert run.rows() == []
    run.take(_sample(T0 + 5400, 6_007_000, power_w=4_000))
    assert [quality for _, _, quality in run.rows()] == ["ESTIMATED"] * 3
    assert sum(s.energy_wh for s in run.sealed) == 6000
    assert run.events == [EventKind.FAULT, EventKind.RECOVERED]


def test_an_idle_meter_is_not_stuck() -> None:
    run = _Run()
    for after_s in range(0, 3601, 10):
        run.take(_sample(T0 + after_s, 7_000, power_w=-4_000))
    assert run.rows() == [(0, 0, "MEASURED"), (1800, 0, "MEASURED")]


def test_only_the_configured_register_counts() -> None:
    run = _Run(replace(RULES, register="export"))
    for after_s, exported in ((0, 1_000), (1800, 4_000)):
        run.take(Sample(after_s, T0 + after_s, 99, exported))
    assert run.rows() == [(0, 3, "MEASURED")]


def test_the_same_moment_twice_changes_nothing() -> None:
    run = _Run()
    run.see((0, 1_000), (1800, 2_000))
    before = run.state
    assert run.take(_sample(T0 + 1800, 5_000)) == Step(before)


def _set_clock(run: _Run, by_s: int, until_s: int) -> None:
    """100 Wh in the first interval, 1 Wh in 10 s; then the clock is set, and 500 mWh are counted a second."""
    run.see((0, 0), (1800, 100_000), (1810, 101_000))
    for later_s in range(10, until_s, 10):
        run.take(Sample(1860.0 + later_s, T0 + 1810 + by_s + later_s, 101_000 + 500 * later_s, None))


def test_a_clock_set_back_seals_no_interval_twice_and_the_next_one_says_since_when_it_counts() -> None:
    run = _Run()
    _set_clock(run, by_s=-900, until_s=4600)
    assert run.events == [EventKind.CLOCK_STEPPED]
    # The boundary at 1800 s was passed at what is now 900 s, and once more 890 s later.
    assert run.rows() == [(0, 100, "MEASURED"), (1800, 1 + 2690 * 500 // 1000, "ESTIMATED"), (3600, 900, "MEASURED")]
    assert run.sealed[1].sampled_s == (T0 + 900, T0 + 3600)
    assert run.state.unassigned_wh == 0


def test_a_clock_set_back_by_more_than_an_interval_leaves_what_is_counted_meanwhile_in_no_interval() -> None:
    run = _Run()
    _set_clock(run, by_s=-7200, until_s=12_000)
    assert run.events == [EventKind.CLOCK_STEPPED, EventKind.UNASSIGNED]
    assert run.rows() == [(0, 100, "MEASURED"), (1800, 900, "MEASURED"), (3600, 900, "MEASURED")]
    assert run.state.unassigned_wh == 1 + 7190 * 500 // 1000


def test_a_clock_set_forward_over_boundaries_makes_the_skipped_intervals_missing_and_keeps_the_energy() -> None:
    run = _Run()
    _set_clock(run, by_s=7200, until_s=3600)
    assert run.events == [EventKind.CLOCK_STEPPED]
    assert run.rows()[1:] == [(1800 * i, 0, "MISSING") for i in range(1, 5)] + [
        (9000, 1 + 1790 * 500 // 1000, "ESTIMATED"),
        (10800, 900, "MEASURED"),
    ]
    assert run.sealed[5].sampled_s == (T0 + 9000, T0 + 10_800)


def test_a_clock_set_forward_into_an_interval_counts_it_from_there() -> None:
    run = _Run()
    _set_clock(run, by_s=7500, until_s=1800)
    assert run.rows()[5] == (9000, 1 + 1490 * 500 // 1000, "ESTIMATED")
    assert run.sealed[5].sampled_s == (T0 + 9300, T0 + 10_800)


def test_a_boundary_before_the_first_sample_after_a_clock_step_lies_between_the_last_boundary_and_that_sample() -> None:
    run = _Run()
    run.see((0, 0), (1800, 100_000), (2700, 150_000))
    # Set forward by 1000 s: the last boundary is at 2800 s now, and the last sample at 3700 s, behind the next one.
    for later_s in (10, 1700):
        run.take(Sample(2750.0 + later_s, T0 + 3700 + later_s, 150_000 + 100 * later_s, None))
    assert run.rows()[1:] == [(1800, 44, "ESTIMATED"), (3600, 6 + 170, "INTERPOLATED")]


def test_a_small_clock_step_inside_an_interval_keeps_the_energy_together() -> None:
    run = _Run()
    run.see((0, 0), (600, 100_000))
    run.take(Sample(660.0, T0 + 910, 101_000, None))
    run.take(Sample(660.0 + 890, T0 + 1800, 201_000, None))
    assert run.events == [EventKind.CLOCK_STEPPED]
    assert run.rows() == [(0, 201, "ESTIMATED")]


def test_clock_steps_that_cancel_out_leave_the_energy_where_it_was() -> None:
    run = _Run()
    run.see((0, 0), (600, 100_000))
    run.take(Sample(660.0, T0 + 610 - 7200, 101_000, None))
    run.take(Sample(670.0, T0 + 620, 102_000, None))
    run.take(Sample(1850.0, T0 + 1800, 202_000, None))
    assert run.events == [EventKind.CLOCK_STEPPED] * 2
    assert run.rows() == [(0, 202, "ESTIMATED")]


def test_after_a_restart_with_an_earlier_clock_nothing_is_sealed_twice() -> None:
    run = _Run()
    run.see((0, 0), (1800, 100_000), (3600, 200_000))
    assert run.state.anchor is not None
    run.state = replace(run.state, anchor=replace(run.state.anchor, monotonic_us=None))
    for later_s in range(0, 7201, 600):
        run.take(Sample(float(later_s), T0 + later_s, 200_000 + 100 * later_s, None))
    assert [start for start, _, _ in run.rows()] == [0, 1800, 3600, 5400]
    assert EventKind.CLOCK_STEPPED in run.events


def test_an_outage_of_years_is_one_event_and_its_energy_is_in_no_interval() -> None:
    run = _Run()
    run.see((0, 0), (1800, 1_000), (3 * 365 * 86_400 + 900, 9_000), (3 * 365 * 86_400 + 1800, 10_000))
    assert run.rows() == [(0, 1, "MEASURED"), (3 * 365 * 86_400, 2, "ESTIMATED")]
    assert run.events == [EventKind.OUTAGE_TOO_LONG]
    assert run.state.unassigned_wh == 7


def test_a_sample_from_before_the_clock_was_right_gets_its_true_time() -> None:
    early = Sample(monotonic_s=10.0, time_s=0.0, import_mwh=1, export_mwh=None)
    assert retimed(early, monotonic_s=110.0, time_s=T0 + 100.0).time_s == T0


@pytest.mark.parametrize(("time_s", "expected"), [(T0 - 0.5, T0), (T0, T0 + 1800), (T0 + 1799.9, T0 + 1800)])
def test_next_boundary(time_s: float, expected: int) -> None:
    assert next_boundary_s(time_s, 1800) == expected
