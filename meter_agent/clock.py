"""Where the agent takes time from: the operating system, or the ticks of a conductor on a simulated ledger."""

import time
from typing import Final, Protocol

from meter_agent.readings import Clock

_ADJTIMEX_BYTES: Final = 512
"""`struct timex` is 208 bytes on 64-bit and 128 on 32-bit Linux; more than either, all zero, asks and sets nothing."""

_TIME_ERROR: Final = 5
"""adjtimex(2): the clock is not synchronised to a reliable server."""


class AgentClock(Clock, Protocol):
    """What the agent's loop needs to know of time."""

    def trusted(self) -> bool:
        """True if calendar time may be believed. Before that no interval is sealed."""
        ...


class SystemClock:
    """Calendar time and boot time of the operating system."""

    def __init__(self, require_synchronised: bool) -> None:
        """Without `require_synchronised` the calendar is believed from the start."""
        self._trusted = not require_synchronised

    def monotonic_s(self) -> float:
        """Seconds since boot, suspended time included."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def time_s(self) -> float:
        """UTC epoch seconds."""
        return time.time()

    def trusted(self) -> bool:
        """True once the kernel has said that the calendar is synchronised (a Pi has no clock while it is off)."""
        if not self._trusted:
            self._trusted = _kernel_clock_state() != _TIME_ERROR
        return self._trusted


class ConductorClock:
    """Calendar time as the conductor ticks it. Between ticks it stands still; it never goes back."""

    def __init__(self) -> None:
        self._time_s = 0

    def set(self, time_s: int) -> None:
        """Take in a tick."""
        self._time_s = max(self._time_s, time_s)

    def monotonic_s(self) -> float:
        """The same as `time_s`: simulated time has one clock only."""
        return float(self._time_s)

    def time_s(self) -> float:
        """UTC epoch seconds of the last tick, 0 before the first."""
        return float(self._time_s)

    def trusted(self) -> bool:
        """True once there was a tick."""
        return self._time_s > 0


def _kernel_clock_state() -> int:
    # Imported here, because an agent that need not ask (simulated time, a trusted clock) saves the memory.
    import ctypes

    buffer = ctypes.create_string_buffer(_ADJTIMEX_BYTES)
    state: int = ctypes.CDLL(None).adjtimex(buffer)
    return state
