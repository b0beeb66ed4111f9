"""The demo on four validators, one of which loses its power on the way: the same books as with one broker's ledger."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("cometbft")]

DEMO = Path(__file__).parents[2] / "deploy" / "demo" / "run.py"
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
