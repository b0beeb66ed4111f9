"""Whatever is lost, doubled, late or killed: the books come out as if nothing had happened, if it heals in time."""

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from simulation import audit
from simulation.plans import PAIR, RETAILER, TRIO
from simulation.simulated_mqtt import Faults, Message
from simulation.world import GATE_1_S, GATE_2_S, INTERVAL_S, T0, Books, World

FULL = os.environ.get("DENGEN_FULL") == "1"


@pytest.fixture(scope="module")
def undisturbed() -> Books:
    with tempfile.TemporaryDirectory() as path:
        world = World(PAIR, Path(path) / "world")
        books = world.run()
        audit.check(world, books)
        return books


def test_an_undisturbed_run_trades_and_balances(undisturbed: Books) -> None:
    assert undisturbed.bought_wh["west", T0, "wind"] == 300
    assert sum(undisturbed.unmatched_wh.values()) > 0


@pytest.mark.parametrize("seed", range(400 if FULL else 12))
def test_messages_lost_doubled_and_reordered_change_nothing(seed: int, folder: Path, undisturbed: Books) -> None:
    world = World(PAIR, folder, seed, faults=Faults(lost=30, doubled=50, reordered=30), disconnects=6)
    books = world.run()
    audit.check(world, books)
    assert books == undisturbed


@pytest.mark.parametrize("seed", range(600 if FULL else 16))
def test_brokers_killed_at_random_moments_change_nothing(seed: int, folder: Path, undisturbed: Books) -> None:
    world = World(PAIR, folder, seed, faults=Faults(lost=10, doubled=10, reordered=10), kills=8, disconnects=3)
    books = world.run()
    audit.check(world, books)
    assert books == undisturbed


@pytest.fixture(scope="module")
def undisturbed_trio() -> Books:
    with tempfile.TemporaryDirectory() as path:
        world = World(TRIO, Path(path) / "world")
        books = world.run()
        audit.check(world, books)
        return books


@pytest.mark.parametrize("seed", range(200 if FULL else 6))
def test_whatever_happens_to_three_brokers_changes_nothing(seed: int, folder: Path, undisturbed_trio: Books) -> None:
    world = World(TRIO, folder, seed, faults=Faults(lost=20, doubled=20, reordered=20), kills=10, disconnects=4)
    books = world.run()
    audit.check(world, books)
    assert books == undisturbed_trio


@pytest.mark.parametrize("moment", range(1, 1_300, 1 if FULL else 60))
def test_a_kill_before_or_after_any_commit_send_or_acknowledgement_changes_nothing(
    moment: int, folder: Path, undisturbed: Books
) -> None:
    """With seed 0 the same moments come in the same order every time; a run has about 1 250 of them."""
    world = World(PAIR, folder, kill_at=moment)
    books = world.run()
    audit.check(world, books)
    assert books == undisturbed


def test_one_seed_gives_one_ledger(folder: Path) -> None:
    faults = Faults(lost=20, doubled=20, reordered=20)
    heads = []
    for name in ("one", "two"):
        world = World(PAIR, folder / name, 7, faults=faults, kills=3, disconnects=3)
        world.run()
        heads.append((world.moments, audit.head_of(world)))
    assert heads[0] == heads[1]


# Partitions


class Cut:
    """Keeps away what brokers say to each other on topics that end in one of `leaves` (on all, if none is given).

    It begins when the first message that ends in `after` has gone through.
    """

    def __init__(self, after: str, *leaves: str) -> None:
        self._after = after
        self._leaves = set(leaves)
        self._begun = False

    def __call__(self, message: Message, subscriber: str) -> bool:
        levels = message.topic.split("/")
        between_brokers = message.sender.startswith("broker-") and subscriber.startswith("broker-")
        # Responses and results end in the name of whom they are for.
        ends = {levels[-1], levels[-2]}
        if self._begun:
            return between_brokers and (not self._leaves or bool(ends & self._leaves))
        self._begun = self._after in ends
        return False


CUTS = {
    "first request, the order": ("demand", "request"),
    "first request, the answer": ("demand", "response"),
    "first request, both ways": ("demand", "request", "response"),
    "second request, to the ledger": ("request", "submit"),
    "second request, from the ledger": ("request", "result", "feed", "checkpoint"),
    "second request, both ways": ("request", "submit", "result", "feed", "checkpoint"),
    "third request, to the ledger": ("response", "submit"),
    "third request, from the ledger": ("response", "result", "feed", "checkpoint"),
    "third request, both ways": ("response", "submit", "result", "feed", "checkpoint"),
    "announcements": ("demand", "cleared", "stock"),
    "everything, after the demands": ("demand",),
    "everything, after the order": ("request",),
    "everything, after the answer": ("response",),
}
"""When a partition begins, and what it cuts off."""

HEALS_AFTER_S = (INTERVAL_S + GATE_2_S, 2 * INTERVAL_S + GATE_1_S, 100 * INTERVAL_S)
"""Counted from T0: after gate 2 of the first interval, after gate 1 of the second, never."""


@pytest.mark.parametrize("seed", range(20 if FULL else 1))
@pytest.mark.parametrize("host", ["east", "west"])
@pytest.mark.parametrize("where", CUTS)
def test_a_partition_that_heals_before_the_gate_changes_nothing(
    where: str, host: str, seed: int, folder: Path, undisturbed: Books
) -> None:
    # The ledger is at the supplier (east) or at the requester (west): what is cut off is its way there.
    plan = replace(PAIR, host=host)
    world = World(plan, folder, seed, partition=Cut(*CUTS[where]), heals=lambda w: w.network_time_s > 12)
    books = world.run()
    audit.check(world, books)
    assert books == undisturbed


@pytest.mark.parametrize("seed", range(20 if FULL else 1))
@pytest.mark.parametrize("host", ["east", "west"])
@pytest.mark.parametrize("after_s", HEALS_AFTER_S if FULL else HEALS_AFTER_S[::2])
@pytest.mark.parametrize("where", CUTS)
def test_a_partition_that_heals_after_the_gate_or_never_leaves_everything_consistent(
    where: str, after_s: int, host: str, seed: int, folder: Path
) -> None:
    world = World(
        *(replace(RETAILER, host=host), folder, seed),
        partition=Cut(*CUTS[where]),
        heals=lambda w: w.market_time_s > T0 + after_s,
        may_wait=True,
    )
    world.patience_s = 35.0
    books = world.run()
    audit.check(world, books)
