"""The demo on four validators, one of which loses its power on the way: the same books as with one broker's ledger."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dengen_testing.books import summarize
from dengen_testing.market import Market, build_market
from dengen_testing.mosquitto import Mosquitto

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("cometbft")]

DEMO = Path(__file__).parents[2] / "deploy" / "demo" / "run.py"
GATEWAY = """
[ledger.cometbft.gateway]
validator = "validator-1"
key_file = "validator-1.pem"
"""
INTERVALS = 8


def run_demo(engine: str, out: Path) -> tuple[dict[str, Any], str]:
    command = [sys.executable, str(DEMO), "--ledger", engine, "--intervals", str(INTERVALS), "--out", str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads((out / "summary.json").read_text()), ended.stderr


def test_four_validators_keep_the_same_books_as_one_broker(tmp_path: Path) -> None:
    network, said = run_demo("cometbft", tmp_path / "network")
    embedded, _ = run_demo("embedded", tmp_path / "embedded")
    assert "validator-2 has lost its power" in said
    assert "validator-2 is started again" in said
    assert (network["ledger"].pop("engine"), embedded["ledger"].pop("engine")) == ("cometbft", "embedded")
    for summary in (network, embedded):
        del summary["seconds"], summary["ledger"]["height"]
    assert network == embedded
    assert network["ledger"] == {"verified": True}
    assert network["neighbour_transfers"] > 0
    trust = json.loads((tmp_path / "network" / "trust.json").read_text())
    assert sorted(trust["validators"]) == [f"validator-{number + 1}" for number in range(4)]


def test_a_broker_without_a_node_reaches_the_network_through_anothers_gateway(tmp_path: Path) -> None:
    """*east* has nodes and serves the ledger over MQTT; *west* has only MQTT, as with a hosted ledger."""
    plan = runpy.run_path(str(DEMO.with_name("scenario.py")))["demo_plan"](4, 4)
    with Mosquitto(tmp_path / "mosquitto") as mosquitto:
        mqtt = mosquitto.mqtt_config()
        workspace = build_market(plan, tmp_path / "work", tmp_path / "ledger", mqtt)
        east, west = workspace.config("east"), workspace.config("west")
        east.write_text(east.read_text().replace("[[neighbours]]", f"{GATEWAY}\n[[neighbours]]"))
        before, _, after = west.read_text().partition("[ledger.cometbft]")
        west.write_text(before + after.partition("\n\n")[2])
        assert "nodes" not in west.read_text()
        with Market(workspace, mqtt) as market:
            market.run()
    summary = summarize(workspace, "cometbft", 0)
    assert summary["ledger"]["verified"]
    assert summary["neighbour_transfers"] > 0
    for consumer in summary["consumers"]:
        assert sum(consumer["delivered_wh"].values()) + consumer["unmatched_wh"] == consumer["consumed_wh"]
