"""Fixtures that start the other ends of wires, close readers, and find CometBFT."""

import shutil
from pathlib import Path

import pytest

from broker.ledger.cometbft.binary import CometbftMissing, find_cometbft


@pytest.fixture
def peers():
    """Starts peers and stops them at the end."""
    started = []

    def start(peer):
        started.append(peer.start())
        return peer

    yield start
    for peer in started:
        if peer._thread.is_alive():
            peer.stop()


@pytest.fixture
def closing():
    """Readers to close at the end."""
    readers = []

    def keep(reader):
        readers.append(reader)
        return reader

    yield keep
    for reader in readers:
        reader.close()


@pytest.fixture(scope="session")
def cometbft() -> Path:
    """The CometBFT program. Without one a test is skipped, but not where it could have been built."""
    try:
        return find_cometbft()
    except CometbftMissing as error:
        if shutil.which("go"):
            pytest.fail(f"Go is here, so CometBFT can be: run deploy/setup/cometbft. {error}")
        pytest.skip(str(error))
