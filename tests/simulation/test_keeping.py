"""A supplier keeps the day's last sun for its own consumers' evening, as far as the forecast says that they want it."""

from dataclasses import replace
from pathlib import Path

import pytest

from broker.market.windows import Window
from broker.protocol.sources import Source
from simulation import audit
from simulation.world import INTERVAL_S, T0, Books, ConsumerPlan, DevicePlan, Plan, World

DAY_S = 86_400
FIRST = 2 + 96
"""The index of the first interval of the first day that is forecast; see test_foresight."""

INTERVALS = FIRST + 48


def hour(index: int) -> int:
    return (T0 + index * INTERVAL_S) % DAY_S // 3_600


def by_hours(first: int, end: int, energy_wh: int) -> tuple[int, ...]:
    return tuple([energy_wh if first <= hour(index) < end else 0 for index in range(INTERVALS)])


PLAN = Plan(
    ("east", "west"),
    "east",
    (
        ConsumerPlan("dora", "east", (("solar", 100),), by_hours(17, 20, 500), choices={"window": Window.DAY}),
        ConsumerPlan("ben", "west", (("solar", 100),), by_hours(8, 12, 2_000)),
    ),
    (DevicePlan("roof", "ola", "east", Source.SOLAR, by_hours(8, 12, 1_000)),),
)
"""8 000 Wh of sun before noon, of which dora at east wants 3 000 in the evening, and ben at west all, at once."""


def run(folder: Path, *, keeps: bool, kills: int = 0) -> Books:
    world = World(PLAN, folder, kills=kills)
    for process in world.brokers.values():
        process.config = replace(process.config, market=replace(process.config.market, keeps_for_windows=keeps))
    books = world.run()
    audit.check(world, books)
    return books


def on_the_day(books: Books, meter: str) -> dict[int, int]:
    """What a consumer got on the day that was forecast, by hour of the demand."""
    got: dict[int, int] = {}
    for (name, start_s, _), energy_wh in books.delivered_wh.items():
        index = (start_s - T0) // INTERVAL_S
        if name == meter and index >= FIRST and energy_wh:
            got[hour(index)] = got.get(hour(index), 0) + energy_wh
    return got


@pytest.mark.parametrize("kills", [0, 60])
def test_what_the_evening_is_expected_to_want_no_neighbour_gets(folder: Path, kills: int) -> None:
    books = run(folder, keeps=True, kills=kills)
    assert on_the_day(books, "dora") == {17: 1_000, 18: 1_000, 19: 1_000}
    # Until later sun would no longer do for the evening, ben has it all.
    assert on_the_day(books, "ben") == {8: 2_000, 9: 2_000, 10: 1_000}


def test_without_it_a_neighbour_gets_all_that_nobody_here_wants_yet(folder: Path) -> None:
    books = run(folder, keeps=False)
    assert on_the_day(books, "dora") == {}
    assert on_the_day(books, "ben") == {8: 2_000, 9: 2_000, 10: 2_000, 11: 2_000}
