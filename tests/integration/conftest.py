"""Fixtures that start the other ends of wires and close readers."""

import pytest


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
