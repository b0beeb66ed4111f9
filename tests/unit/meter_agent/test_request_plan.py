"""Requests are as few as the meter allows, and carry every value whole."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meter_agent.profiles import RequestLimits
from meter_agent.request_plan import Span, SpanTooLong, plan_requests


def test_neighbouring_values_share_a_request():
    values = [Span(4, 0x4A, 2), Span(4, 0x48, 2)]
    assert plan_requests(values, RequestLimits()) == (Span(4, 0x48, 4),)


def test_a_gap_is_read_over_only_if_the_meter_allows_it():
    values = [Span(4, 0x34, 2), Span(4, 0x48, 2)]
    assert plan_requests(values, RequestLimits(max_gap=18)) == (Span(4, 0x34, 22),)
    assert plan_requests(values, RequestLimits(max_gap=17)) == tuple(values)


def test_a_forbidden_gap_is_never_touched():
    values = [Span(3, 10, 2), Span(3, 20, 2)]
    assert len(plan_requests(values, RequestLimits(max_gap=20, forbidden=((12, 12),)))) == 2
    assert len(plan_requests(values, RequestLimits(max_gap=20, forbidden=((19, 30),)))) == 2
    assert len(plan_requests(values, RequestLimits(max_gap=20, forbidden=((0, 9), (22, 30))))) == 1


def test_a_request_never_exceeds_the_meter_s_limit():
    values = [Span(3, 0, 4), Span(3, 4, 4), Span(3, 8, 4)]
    assert plan_requests(values, RequestLimits(max_registers=8)) == (Span(3, 0, 8), Span(3, 8, 4))


def test_input_and_holding_registers_are_never_mixed():
    assert len(plan_requests([Span(3, 0, 2), Span(4, 2, 2)], RequestLimits())) == 2


def test_a_value_longer_than_the_limit_is_refused():
    with pytest.raises(SpanTooLong):
        plan_requests([Span(3, 0, 4)], RequestLimits(max_registers=2))


def test_a_value_is_cut_out_of_the_reply():
    assert Span(4, 0x34, 6).cut(Span(4, 0x38, 2), (1, 2, 3, 4, 5, 6)) == (5, 6)


@given(
    st.lists(st.builds(Span, st.sampled_from([3, 4]), st.integers(0, 300), st.sampled_from([1, 2, 4])), min_size=1),
    st.integers(4, 125),
    st.integers(0, 125),
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 20)).map(lambda pair: (pair[0], pair[0] + pair[1]))),
)
def test_every_plan_carries_every_value_within_the_limits(values, max_registers, max_gap, forbidden):
    limits = RequestLimits(max_registers=max_registers, max_gap=max_gap, forbidden=tuple(forbidden))
    requests = plan_requests(values, limits)
    assert len(requests) <= len(set(values))
    assert all(any(request.contains(value) for request in requests) for value in values)
    wanted = {(value.function_code, address) for value in values for address in range(value.address, value.end)}
    for request in requests:
        assert request.count <= max_registers
        for address in range(request.address, request.end):
            in_a_gap = (request.function_code, address) not in wanted
            assert not (in_a_gap and any(first <= address <= last for first, last in forbidden))
