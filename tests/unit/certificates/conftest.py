"""What several tests of certificates begin with."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.broker_on_disk import DiskBroker


@pytest.fixture
def served(tmp_path: Path) -> Iterator[DiskBroker]:
    """A broker with a ledger on disk that has served two intervals."""
    made = DiskBroker(tmp_path)
    made.serve_two_intervals()
    yield made
    made.close()
