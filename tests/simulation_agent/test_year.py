"""Whatever happens in a year, all intervals together are what the register counted, to the Wh."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.protocol.messages import Quality
from simulation_agent.year import T0, Plan, Year

FULL = os.environ.get("DENGEN_FULL") == "1"
YEARS = [(interval_s, seed) for seed in range(10 if FULL else 1) for interval_s in (900, 1_800, 3_600)]
"""Interval length and seed of each year. In a quick run only the longer intervals, which take the least time."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where there is such a place: a year has 17 520 commits, and how a disk syncs them is not shown here."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as path:
        yield Path(path)


def _expected_wh(year: Year) -> int:
    """Whole Wh of a total that starts at what the register first showed."""
    account = year.account
    counted_mwh = year.meter.total_mwh - account.first_total_mwh - account.lost_mwh
    return (account.first_mwh + counted_mwh) // 1_000 - account.first_mwh // 1_000


@pytest.mark.parametrize(("interval_s", "seed"), YEARS if FULL else YEARS[1:])
def test_a_year_of_mishaps_loses_and_invents_no_wh(
    folder: Path, interval_s: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    year = Year(folder, Plan(interval_s=interval_s, set_s=interval_s - 300), seed)
    year.run(monkeypatch)
    demands = [year.broker.demands[start_s] for start_s in sorted(year.broker.demands)]
    assert [demand.start_s for demand in demands] == list(range(T0, demands[-1].end_s, interval_s))
    assert year.unassigned_wh() == 0
    assert sum(demand.energy_wh for demand in demands) == _expected_wh(year)
    assert all(demand.energy_wh == 0 for demand in demands if demand.quality is Quality.MISSING)
    assert {demand.quality for demand in demands} >= {Quality.INTERPOLATED, Quality.ESTIMATED}
    assert year.account.power_cuts > 10
    assert year.events() >= {"meter-swapped", "clock-stepped", "fault", "recovered", "read-failure"}
    year.close()


@pytest.mark.parametrize(("interval_s", "seed"), [(900, 101), (3_600, 102)])
def test_clocks_that_are_set_by_hours_cost_no_wh_either(
    folder: Path, interval_s: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is counted in hours whose intervals were sealed already is in no interval, and on record beside them."""
    year = Year(folder, Plan(days=365 if FULL else 60, interval_s=interval_s, clock_steps=100, set_s=20_000), seed)
    year.run(monkeypatch)
    demands = year.broker.demands
    assert sorted(demands) == list(range(T0, max(demands) + 1, interval_s))
    assert year.unassigned_wh() > 0
    assert sum(demand.energy_wh for demand in demands.values()) + year.unassigned_wh() == _expected_wh(year)
    assert "unassigned" in year.events()
    year.close()
