"""The demo: a week of real readings through agents, two brokers and a ledger, in less than a minute.

    python deploy/demo/run.py [--ledger embedded|cometbft] [--intervals N] [--out demo-out] [--serve]

Everything runs as a process of its own on this machine: a mosquitto, two brokers (one hosts the ledger, or four
validators keep it, of which one loses its power on the way), an agent for each meter, and a street of meters that are
simulated only at the wire. `scenario.py` says who takes part. Keys, genesis and contracts are made afresh. Results go
to `--out`: summary.json, statements/, certificates/, ledger/, trust.json. Exit codes: 0 all of it ran and the ledger
verifies, 1 not, 2 wrong usage or something missing on this machine.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Final

from dengen_testing.books import summarize
from dengen_testing.cometbft import Network
from dengen_testing.conductor import ConductorStalled
from dengen_testing.market import CommandFailed, Market, MarketPlan, Workspace, build_market, energy_broker
from dengen_testing.mosquitto import Mosquitto, MosquittoMissing
from dengen_testing.processes import ProcessEnded
from dengen_testing.statements import write_statements
from dengen_testing.waiting import WaitedTooLong
from scenario import INTERVALS, demo_plan
from table import progress_line, summary_table

from broker.ledger.cometbft.binary import CometbftMissing, find_cometbft
from broker.protocol.messages import Tick

LOCAL_TIME: Final = timezone(timedelta(hours=10))
VALIDATORS: Final = 4
PROGRESS_EVERY_S: Final = 0.5
PROGRESS_EVERY_S_IN_A_LOG: Final = 5.0


def main() -> int:
    options = _options()
    # So that every process is stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    plan = demo_plan(options.intervals, VALIDATORS if options.ledger == "cometbft" else 0)
    started_s = time.monotonic()
    _clear(options.out)
    with tempfile.TemporaryDirectory(prefix="dengen-demo-") as folder:
        try:
            if plan.validators:
                find_cometbft()
            summary = _run(plan, Path(folder), options.out, started_s, serve=options.serve)
        except (MosquittoMissing, CometbftMissing) as error:
            return _say(2, error)
        except (CommandFailed, ConductorStalled, ProcessEnded, WaitedTooLong) as error:
            # The work folder goes; what a reader of the message needs of it stays.
            kept = _keep_logs(Path(folder), options.out)
            return _say(1, f"{error}\nthe logs of all processes are in {kept}")
    return 0 if summary["ledger"]["verified"] else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--ledger", choices=("embedded", "cometbft"), default="embedded", help="the ledger's engine (default: embedded)"
    )
    parser.add_argument(
        "--intervals", type=int, default=INTERVALS, metavar="N", help="only the first N half hours (default: the week)"
    )
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where results go (default: demo-out)")
    parser.add_argument("--serve", action="store_true", help="keep everything running at the end, until Ctrl-C")
    options = parser.parse_args()
    if not 1 <= options.intervals <= INTERVALS:
        parser.error(f"--intervals: expected 1 to {INTERVALS}")
    return options


def _run(plan: MarketPlan, folder: Path, out: Path, started_s: float, *, serve: bool) -> dict[str, Any]:
    with Mosquitto(folder / "mosquitto") as mosquitto:
        mqtt = mosquitto.mqtt_config()
        workspace = build_market(plan, folder / "work", (out / "ledger").resolve(), mqtt)
        _write_trust(workspace, out)
        with Market(workspace, mqtt) as market:
            show = _progress(plan, started_s)
            market.run(on_progress=show if market.network is None else _with_a_power_cut(plan, market.network, show))
            print(file=sys.stderr)
            if serve:
                _serve(mosquitto)
    # The brokers have ended in good order, so their exports and the ledger are at rest.
    if plan.validators:
        shutil.copytree(workspace.ledger, out / "ledger")
        workspace = replace(workspace, ledger=out / "ledger")
    summary = summarize(workspace, "cometbft" if plan.validators else "embedded", time.monotonic() - started_s)
    write_statements(workspace, out / "statements")
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _write_certificates(workspace, out)
    print(summary_table(summary))
    results = ("summary.json", "statements", "certificates", "ledger", "trust.json")
    print("results        " + ", ".join(f"{out}/{name}" for name in results))
    return summary


def _clear(out: Path) -> None:
    """Remove what an earlier run left, and nothing else."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("ledger", "logs", "certificates", "statements"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("summary.json", "trust.json"):
        (out / name).unlink(missing_ok=True)


def _write_trust(workspace: Workspace, out: Path) -> None:
    (out / "trust.json").write_text(energy_broker("ledger", "trust", "--genesis", workspace.genesis))


def _write_certificates(workspace: Workspace, out: Path) -> None:
    """A certificate of the whole time for each consumer, by their broker, and the first one as a page to print."""
    plan, folder = workspace.plan, out / "certificates"
    folder.mkdir()
    begin, end = (
        datetime.fromtimestamp(time_s, UTC).isoformat()
        for time_s in (plan.origin_s, plan.origin_s + plan.intervals * plan.interval_s)
    )
    for consumer in plan.consumers:
        meter = consumer.meter.name
        energy_broker(
            *("certificate", "issue", "--config", workspace.config(consumer.broker), "--meter", meter),
            *("--from", begin, "--to", end, "--ledger", workspace.ledger, "--out", folder / f"{meter}.cbor"),
        )
    meter = plan.consumers[0].meter.name
    energy_broker(
        *("certificate", "export", folder / f"{meter}.cbor", "--format", "html", "--out", folder / f"{meter}.html")
    )


def _progress(plan: MarketPlan, started_s: float) -> Callable[[Tick], None]:
    """Shows how far simulated time is, on stderr: one line that changes on a terminal, a line now and then in a log."""
    terminal = sys.stderr.isatty()
    every_s = PROGRESS_EVERY_S if terminal else PROGRESS_EVERY_S_IN_A_LOG
    shown_s = 0.0

    def show(tick: Tick) -> None:
        nonlocal shown_s
        now_s = time.monotonic()
        if now_s - shown_s < every_s and tick.time_s < plan.end_s:
            return
        shown_s = now_s
        done = min(plan.intervals, max(0, (tick.time_s - plan.origin_s) // plan.interval_s))
        moment = datetime.fromtimestamp(tick.time_s, UTC).astimezone(LOCAL_TIME).strftime("%a %H:%M")
        line = progress_line(done, plan.intervals, now_s - started_s, moment)
        print(f"\r{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    return show


def _with_a_power_cut(plan: MarketPlan, network: Network, show: Callable[[Tick], None]) -> Callable[[Tick], None]:
    """Shows progress, and has one validator lose its power after a third of the time, for a twelfth of it."""
    victim = network.nodes[1]  # *west* asks it first, so it has to turn to another one.
    cut_s, back_s = (plan.origin_s + plan.intervals * plan.interval_s * twelfths // 12 for twelfths in (4, 5))
    off = False

    def on_tick(tick: Tick) -> None:
        nonlocal off
        show(tick)
        if not off and cut_s <= tick.time_s < back_s:
            off = True
            victim.kill()
            print(f"\n{victim.name} has lost its power", file=sys.stderr)
        elif off and tick.time_s >= back_s:
            off = False
            victim.start()
            print(f"\n{victim.name} is started again, and catches up", file=sys.stderr)

    return on_tick


def _serve(mosquitto: Mosquitto) -> None:
    """Keep everything running until Ctrl-C or SIGTERM."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    print(f"running on; MQTT is at 127.0.0.1:{mosquitto.port}; Ctrl-C ends it", file=sys.stderr)
    stopping.wait()


def _keep_logs(folder: Path, out: Path) -> Path:
    logs = out / "logs"
    logs.mkdir(exist_ok=True)
    for log in folder.rglob("*.log"):
        shutil.copy(log, logs)
    return logs


def _say(code: int, text: object) -> int:
    print(f"demo: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
