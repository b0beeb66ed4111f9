"""Waiting for a condition with a limit: what tests and starters use in place of a sleep."""

import time
from collections.abc import Callable
from typing import Final

POLL_S: Final = 0.005
"""Short against everything that is waited for (processes start in tenths of a second), long against a check."""


class WaitedTooLong(Exception):
    """A condition did not come true in time. `what` says which."""

    def __init__(self, what: str, limit_s: float, detail: str = "") -> None:
        super().__init__(f"waited {limit_s:g} s for {what}" + (f"\n{detail}" if detail else ""))
        self.what = what


def wait_until(
    condition: Callable[[], bool], what: str, *, limit_s: float = 10.0, detail: Callable[[], str] | None = None
) -> None:
    """Return as soon as `condition()` is true. Raises WaitedTooLong, with `detail()` below it, after `limit_s`."""
    deadline_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() >= deadline_s:
            raise WaitedTooLong(what, limit_s, detail() if detail else "")
        time.sleep(POLL_S)
