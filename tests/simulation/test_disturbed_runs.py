"""Whatever is lost, doubled, late or killed: the books come out as if nothing had happened, if it heals in time."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.market.contracts import ShortageChoice
from broker.protocol.sources import Source
from simulation import audit
from simulation.simulated_mqtt import Faults
from simulation.world import T0, Books, ConsumerPlan, DevicePlan, Plan, World

FULL = os.environ.get("DENGEN_FULL") == "1"

PAIR = Plan(
    ("east", "west"),
    "east",
    (
        ConsumerPlan("anna", "east", (("solar", 40), ("wind", 30), ("any", 30)), (500, 300, 400, 250)),
        ConsumerPlan("ben", "west", (("wind", 100),), (300, 310, 320, 330)),
        ConsumerPlan(
            *("cleo", "west", (("renewable", 60), ("hydro", 40)), (200, 0, 201, 203)),
            *(ShortageChoice.SUBSTITUTES, ("natural_gas",)),
        ),
    ),
    (
        DevicePlan("roof", "ola", "east", Source.SOLAR, (700, 0, 150, 90)),
        DevicePlan("mill", "ola", "east", Source.WIND, (900, 700, 100, 500)),
        DevicePlan("dam", "pia", "west", Source.HYDRO, (150, 60, 300, 0)),
        DevicePlan("burner", "pia", "west", Source.NATURAL_GAS, (100, 100, 100, 100)),
    ),
)
"""Two brokers; west has no wind and orders it from east, which hosts the ledger."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Below memory where there is such a place: a run waits for the disk a thousand times."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="dengen-sim-", dir=memory if os.access(memory, os.W_OK) else None))
    yield path
    shutil.rmtree(path)


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
