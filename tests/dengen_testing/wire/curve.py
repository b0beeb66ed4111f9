"""Energy over time: what a meter's cumulative register shows at any moment, from the Wh of each interval. Pure."""

from itertools import accumulate


class EnergyCurve:
    """A register that counts whole Wh, evenly within each interval; before the first and after the last it rests."""

    def __init__(self, origin_s: int, interval_s: int, energies_wh: tuple[int, ...], start_wh: int = 0) -> None:
        """`energies_wh[i]` is counted in `[origin_s + i·interval_s, origin_s + (i + 1)·interval_s)`.

        `start_wh` is what the register shows at `origin_s`. Raises ValueError for negative energy or interval.
        """
        if interval_s <= 0 or start_wh < 0 or any(energy_wh < 0 for energy_wh in energies_wh):
            raise ValueError("expected an interval above 0 and energies of 0 Wh or more")
        self._origin_s = origin_s
        self._interval_s = interval_s
        self._energies_wh = energies_wh
        self._boundaries_wh = tuple(accumulate(energies_wh, initial=start_wh))

    def total_wh(self, time_s: int) -> int:
        """The register at `time_s`."""
        index, within_s = divmod(time_s - self._origin_s, self._interval_s)
        if index < 0:
            return self._boundaries_wh[0]
        if index >= len(self._energies_wh):
            return self._boundaries_wh[-1]
        return self._boundaries_wh[index] + self._energies_wh[index] * within_s // self._interval_s

    def power_w(self, time_s: int) -> int:
        """The mean power of the interval that contains `time_s`, rounded down."""
        index = (time_s - self._origin_s) // self._interval_s
        if not 0 <= index < len(self._energies_wh):
            return 0
        return self._energies_wh[index] * 3_600 // self._interval_s

    def next_change_s(self, time_s: int) -> int | None:
        """The next interval boundary after `time_s`, or None when nothing will be counted any more."""
        if time_s < self._origin_s:
            return self._origin_s
        boundary = (time_s - self._origin_s) // self._interval_s + 1
        if boundary > len(self._energies_wh):
            return None
        return self._origin_s + boundary * self._interval_s
