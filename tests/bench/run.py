"""`make bench`: all benchmarks in one run, a table on the screen and `bench-out/bench.json`.

    python -m bench.run [PART...]     (with PYTHONPATH=tests) only these parts; the others are absent from the file

BENCH_METERS (10 000) and BENCH_RATE (found by a probe) set the fleet, BENCH_FLEET_S (120) how long it runs, and
BENCH_AGENT_S (600) how long the agents run before they are looked at. They start before everything else and are looked
at last: they hardly use the CPU, and so their ten minutes cost the run only what the other parts leave of them. Each
part is written as soon as it is measured; a part that fails ends the run. docs/benchmarks.md explains every figure.
"""

import argparse
import contextlib
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from bench.agent import RunningAgents, commits_per_interval
from bench.fleet import fleet
from bench.growth import growth
from bench.hot_path import hot_path
from bench.ledger import ledger
from bench.ledger_memory import ledger_of
from bench.neighbour import neighbour
from bench.network import network
from bench.start import broker_start_s, filled_broker
from broker.ledger.cometbft.binary import CometbftMissing, find_cometbft

OUTPUT: Final = Path("bench-out")

Figures = dict[str, dict[str, Any]]


def main() -> int:
    parts: dict[str, Callable[[Path], Figures]] = {
        "hot_path": _hot_path,
        "growth": _growth,
        "fleet": _fleet,
        "neighbour": _neighbour,
        "ledger": _ledger,
        "network": _network,
        "start": _start,
    }
    names = [*parts, "agent"]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(names)}; all unless given")
    chosen = parser.parse_args().parts or names
    if not set(chosen) <= set(names):
        parser.error(f"unknown part; there are {', '.join(names)}")
    OUTPUT.mkdir(exist_ok=True)
    file = OUTPUT / "bench.json"
    file.unlink(missing_ok=True)
    figures: Figures = {}
    with contextlib.ExitStack() as stack:
        if "agent" in chosen:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dengen-bench-")))
            agents = stack.enter_context(RunningAgents(folder / "agents"))
            parts["agent"] = functools.partial(_agent, agents)
        for name in chosen:
            began_s = time.monotonic()
            with tempfile.TemporaryDirectory(prefix="dengen-bench-") as scratch:
                measured = parts[name](Path(scratch))
            for part, values in measured.items():
                figures.setdefault(part, {}).update(values)
            file.write_text(json.dumps(figures, indent=2) + "\n")
            _print(measured, time.monotonic() - began_s)
    print(f"written to {file}")
    return 0


def _hot_path(folder: Path) -> Figures:
    return {"hot_path": hot_path(folder, consumers=2_000, rounds=15)}


def _growth(folder: Path) -> Figures:
    return {"growth": growth(folder, low=1_000, high=100_000, demands=900, rounds=5)}


def _fleet(folder: Path) -> Figures:
    meters = int(os.environ.get("BENCH_METERS", "10000"))
    seconds = float(os.environ.get("BENCH_FLEET_S", "120"))
    rate = os.environ.get("BENCH_RATE")
    return {"fleet": fleet(folder, meters, seconds, float(rate) if rate else None)}


def _neighbour(folder: Path) -> Figures:
    return {"neighbour": neighbour(folder, devices=10, intervals=50)}


def _ledger(folder: Path) -> Figures:
    return {"ledger": ledger(folder, batches=30, issues=12_000)}


def _network(folder: Path) -> Figures:
    """Among the figures of the ledger. Without a CometBFT on this machine they are absent."""
    try:
        find_cometbft()
    except CometbftMissing as error:
        print(f"network: {error}", file=sys.stderr)
        return {}
    return {"ledger": network(folder, batches=80)}


def _start(folder: Path) -> Figures:
    consumers = 1_000_000
    broker_s = broker_start_s(filled_broker(folder / "large", consumers), folder / "start", consumers)
    opened = ledger_of(folder / "ledger", operations=50_000)
    return {
        "start": {
            "broker_1m_s": round(broker_s, 2),
            "ledger_ms": opened["start_ms"],
            "ledger_mb": opened["working_mb"],
        }
    }


def _agent(agents: RunningAgents, folder: Path) -> Figures:
    used = agents.figures(float(os.environ.get("BENCH_AGENT_S", "600")))
    used["commits_per_interval"] = commits_per_interval(folder, intervals=12)
    return {"agent": used, "start": {"agent_s": round(agents.start_s, 2)}}


def _print(figures: Figures, seconds: float) -> None:
    for part, values in figures.items():
        print(f"{part:10}" + "   ".join(f"{name} {value:,}" for name, value in values.items()), flush=True)
    print(f"{'':10}({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
