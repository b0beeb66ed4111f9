"""What is remembered of a neighbour fades; who lets orders run out of time is left alone for a while."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from broker.market.partners import (
    FIRST_PAUSE_INTERVALS,
    MAX_PAUSE_INTERVALS,
    MAX_TIMEOUTS,
    PartnerRecord,
)

STEP_S = 1_800
T0 = 1_800_000_000 - 1_800_000_000 % STEP_S


def timed_out(record: PartnerRecord, times: int, start_s: int) -> PartnerRecord:
    for _ in range(times):
        record = record.faded(start_s, STEP_S).after_timeout(100, start_s, STEP_S)
    return record


def test_who_gives_what_is_asked_is_trusted_more() -> None:
    fresh = PartnerRecord().faded(T0, STEP_S)
    good, bad = fresh.after_answer(500, 500), fresh.after_answer(500, 0)
    assert bad.trust_ppm < good.trust_ppm == fresh.trust_ppm == 1_000_000
    assert (good.refused, bad.refused) == (0, 1_000)


def test_a_record_fades_to_nothing_and_in_the_same_way_in_one_step_or_many() -> None:
    record = PartnerRecord().faded(T0, STEP_S).after_answer(5_000, 100)
    stepwise = record
    for index in range(1, 49):
        stepwise = stepwise.faded(T0 + index * STEP_S, STEP_S)
    assert stepwise == record.faded(T0 + 48 * STEP_S, STEP_S)
    assert 4 * stepwise.asked_wh < 3 * record.asked_wh
    gone = record.faded(T0 + 2_000 * STEP_S, STEP_S)
    assert replace(gone, faded_s=0) == PartnerRecord()


def test_a_circuit_opens_after_some_time_outs_in_a_row_and_an_answer_closes_it() -> None:
    almost = timed_out(PartnerRecord(), MAX_TIMEOUTS - 1, T0)
    assert not almost.is_left_alone(T0 + STEP_S)
    record = timed_out(PartnerRecord(), MAX_TIMEOUTS, T0)
    pause_ends_s = T0 + (1 + FIRST_PAUSE_INTERVALS) * STEP_S
    assert record.is_left_alone(pause_ends_s - STEP_S)
    assert not record.is_left_alone(pause_ends_s)
    assert record.is_on_trial
    closed = record.after_answer(100, 0)
    assert not closed.is_on_trial
    assert not closed.is_left_alone(T0 + STEP_S)


def test_a_failed_trial_doubles_the_pause_up_to_its_limit() -> None:
    record = timed_out(PartnerRecord(), MAX_TIMEOUTS, T0)
    pauses = [record.pause_intervals]
    for _ in range(8):
        record = timed_out(record, 1, record.open_until_s)
        pauses.append(record.pause_intervals)
    assert pauses[:4] == [2, 4, 8, 16]
    assert pauses[-1] == MAX_PAUSE_INTERVALS


def test_further_orders_of_the_same_interval_are_one_failure() -> None:
    once = timed_out(PartnerRecord(), MAX_TIMEOUTS, T0)
    assert timed_out(once, 5, T0).open_until_s == once.open_until_s


@given(st.builds(PartnerRecord, *[st.integers(0, 2**40)] * 10))
def test_a_stored_record_is_read_back(record: PartnerRecord) -> None:
    assert PartnerRecord.from_bytes(record.to_bytes()) == record
