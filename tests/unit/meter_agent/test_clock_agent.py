"""The agent's clocks: when calendar time may be believed, and that simulated time never goes back."""

import time

import pytest

from meter_agent import clock
from meter_agent.clock import ConductorClock, SystemClock


def test_the_system_clock_is_believed_once_the_kernel_says_that_it_is_synchronised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    states = [5, 5, 0]
    monkeypatch.setattr(clock, "_kernel_clock_state", lambda: states.pop(0))
    system = SystemClock(require_synchronised=True)
    assert [system.trusted() for _ in range(4)] == [False, False, True, True]


def test_the_kernel_can_be_asked() -> None:
    # adjtimex(2): TIME_OK 0 to TIME_WAIT 4, or TIME_ERROR 5; -1 would be a refused call.
    assert 0 <= clock._kernel_clock_state() <= 5


def test_the_system_clock_is_believed_at_once_where_the_config_says_so() -> None:
    system = SystemClock(require_synchronised=False)
    assert system.trusted()
    assert abs(system.time_s() - time.time()) < 1
    assert system.monotonic_s() <= system.monotonic_s()


def test_the_conductors_clock_starts_with_the_first_tick_and_never_goes_back() -> None:
    simulated = ConductorClock()
    assert not simulated.trusted()
    simulated.set(1800)
    simulated.set(900)
    assert (simulated.trusted(), simulated.time_s(), simulated.monotonic_s()) == (True, 1800.0, 1800.0)
