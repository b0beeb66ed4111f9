"""Whose devices are asked about, how many at a time, and what becomes of a ledger that does not answer."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.ledger.limits import MAX_DEVICES_ASKED
from broker.service import owners as owners_module
from broker.service.owners import Owners
from broker.service.store import BrokerStore


class Desk:
    def __init__(self, store: BrokerStore) -> None:
        self.asked: list[str] = []
        self.owners = Owners(store, self.asked.append)

    def asks(self, *devices: str) -> list[str]:
        """Look at energy of these devices, and say what is asked then."""
        assert [self.owners.of(device) for device in devices] == [""] * len(devices)
        self.asked.clear()
        self.owners.advance()
        return list(self.asked)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BrokerStore]:
    store = BrokerStore(tmp_path / "broker.db")
    yield store
    store.close()


@pytest.fixture
def desk(store: BrokerStore) -> Desk:
    return Desk(store)


def test_a_device_is_asked_about_once_and_the_answer_is_kept(desk: Desk, store: BrokerStore) -> None:
    assert not desk.owners.pending
    assert desk.asks("roof", "roof") == ["roof"]
    assert desk.asks("roof") == []
    assert desk.owners.pending
    assert desk.owners.answered("roof", "ola")
    assert not desk.owners.pending
    assert desk.owners.of("roof") == "ola"
    assert Owners(store, desk.asked.append).of("roof") == "ola"


def test_what_the_feed_shows_is_an_answer_too(desk: Desk) -> None:
    assert not desk.owners.seen("mill", "pia")
    assert desk.owners.of("mill") == "pia"
    desk.asks("roof")
    assert desk.owners.seen("roof", "ola")
    assert not desk.owners.pending
    assert not desk.owners.answered("roof", "ola")


def test_so_many_are_asked_about_at_a_time(desk: Desk) -> None:
    devices = [f"device-{number}" for number in range(MAX_DEVICES_ASKED + 3)]
    assert desk.asks(*devices) == devices[:MAX_DEVICES_ASKED]
    for device in devices[:MAX_DEVICES_ASKED]:
        desk.owners.answered(device, "ola")
    assert desk.owners.pending
    assert desk.asks() == devices[MAX_DEVICES_ASKED:]


def test_no_more_than_so_many_are_noted(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owners_module, "MAX_UNKNOWN", 2)
    assert desk.asks("a", "b", "c") == ["a", "b"]
    assert desk.asks("c") == ["c"]


def test_of_a_device_that_the_ledger_does_not_have_nothing_is_waited_for(desk: Desk) -> None:
    desk.asks("roof")
    assert not desk.owners.answered("roof", None)
    assert not desk.owners.pending
    assert desk.asks("roof") == []


def test_a_ledger_that_does_not_answer_is_asked_about_one_device_in_an_interval(desk: Desk) -> None:
    desk.asks("roof", "mill")
    assert desk.owners.unanswered("roof")
    assert not desk.owners.unanswered("mill")
    assert not desk.owners.pending
    assert desk.asks("barn") == []
    desk.owners.next_interval()
    assert desk.asks() == ["roof"]
    assert not desk.owners.pending
    desk.owners.next_interval()
    assert desk.asks() == []
    desk.owners.unanswered("roof")
    assert desk.asks() == []
    desk.owners.next_interval()
    assert desk.asks() == ["mill"]
    # Now it answers, and the others are asked about at once.
    assert desk.owners.answered("mill", "ola")
    assert desk.owners.pending
    assert desk.asks() == ["barn", "roof"]
