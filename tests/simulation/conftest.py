"""Where simulated worlds keep their files."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def folder() -> Iterator[Path]:
    """Below memory where there is such a place: a run waits for the disk a thousand times."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="dengen-sim-", dir=memory if os.access(memory, os.W_OK) else None))
    yield path
    shutil.rmtree(path)
