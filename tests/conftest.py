"""What all tests share: hypothesis runs the same examples every time, and more of them with DENGEN_FULL=1.

The fixtures that start mosquitto, brokers, agents and meters come from the published plugin `dengen_testing`.
"""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from broker.ledger.cometbft.binary import CometbftMissing, find_cometbft

settings.register_profile(
    "quick", max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("full", max_examples=500, deadline=None, print_blob=True)
settings.load_profile("full" if os.environ.get("DENGEN_FULL") == "1" else "quick")


@pytest.fixture(autouse=True)
def _signal_handlers() -> Iterator[None]:
    """Commands that serve set handlers for signals; the next test finds those of the test runner again."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def cometbft() -> Path:
    """The CometBFT program. Without one a test is skipped, but not where it could have been built."""
    try:
        return find_cometbft()
    except CometbftMissing as error:
        if shutil.which("go"):
            pytest.fail(f"Go is here, so CometBFT can be: run deploy/setup/cometbft. {error}")
        pytest.skip(str(error))
