"""Every part of `make bench` at tiny counts, so that it cannot rot. The figures mean nothing here; the counts do."""

import json
from pathlib import Path

import pytest
from bench.agent import RunningAgents, commits_per_interval
from bench.fleet import fleet
from bench.growth import growth
from bench.hot_path import STEPS, TURN, hot_path
from bench.ledger import ledger
from bench.ledger_memory import ledger_of
from bench.neighbour import neighbour
from bench.network import network
from bench.sampler import by_step
from bench.start import broker_start_s, filled_broker

from broker.protocol.sources import Source

pytestmark = pytest.mark.integration


def test_hot_path_and_its_profile(tmp_path: Path) -> None:
    samples = tmp_path / "samples.json"
    # More consumers than the ledger allows an asset to be in pieces.
    figures = hot_path(tmp_path, consumers=600, rounds=1, samples=samples)
    assert figures["cpu_us_per_demand"] > figures["floor_us"] > 0
    assert figures["ratio"] == pytest.approx(figures["cpu_us_per_demand"] / figures["floor_us"], rel=0.01)
    steps = by_step(json.loads(samples.read_text()), STEPS, TURN)
    assert steps["check the meter's signature"] > 0


def test_growth(tmp_path: Path) -> None:
    figures = growth(tmp_path, low=60, high=500, demands=50, rounds=1)
    assert figures["cpu_us_low"] > 0
    assert figures["cpu_us_high"] > 0


def test_fleet_loses_nothing_and_counts_nothing_twice(tmp_path: Path) -> None:
    figures = fleet(tmp_path, meters=150, seconds=4.0, rate=75.0)
    assert (figures["unanswered"], figures["duplicated"]) == (0, 0)
    assert 0 < figures["p50_s"] <= figures["p99_s"]


def test_neighbour(tmp_path: Path) -> None:
    figures = neighbour(tmp_path, devices=1, intervals=2)
    assert figures["orders"] == 2 * len(Source)
    assert figures["transfers_per_s"] > 0
    assert 0 < figures["p50_s"] <= figures["p99_s"]


def test_ledger(tmp_path: Path) -> None:
    figures = ledger(tmp_path, batches=1, issues=10)
    assert figures["embedded_transfers_per_s"] > 0
    assert figures["verify_per_s"] > 0


@pytest.mark.usefixtures("cometbft")
def test_network(tmp_path: Path) -> None:
    figures = network(tmp_path, batches=2)
    assert figures["cometbft_deliveries_per_s"] > 0
    assert figures["cometbft_p95_s"] > 0


def test_agents(tmp_path: Path) -> None:
    with RunningAgents(tmp_path / "agents") as agents:
        figures = agents.figures(0.5)
    assert figures["rss_p1_mb"] > 0
    assert agents.start_s > 0
    assert commits_per_interval(tmp_path / "commits", intervals=3) >= 1


def test_start_of_a_ledger(tmp_path: Path) -> None:
    opened = ledger_of(tmp_path / "ledger", operations=2_000)
    assert opened["start_ms"] > 0
    assert opened["working_mb"] > 0
    assert opened["holdings"] == 1 + 25


def test_start_of_a_broker(tmp_path: Path) -> None:
    broker = filled_broker(tmp_path / "broker", consumers=500)
    assert broker_start_s(broker, tmp_path / "start", consumers=500) > 0
