"""Does a ledger need more memory, or longer to start, the longer it is? Run by hand:

    PYTHONPATH=tests python -m bench.ledger_memory [--sizes 50000,200000,1000000] [--verify 200000]

One ledger grows through the sizes by the engine itself, with all rules and signatures and without waiting for the disk.
At each size a new process opens it, says how long that took and what it holds in memory then, commits a hundred batches
of deliveries, says what it holds after them, and pages out all holdings of a broker. Sizes up to `--verify` are
verified as well, in a process of their own. Memory is the resident set from /proc, in MB.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support import ledger_world as world

from broker.ledger.embedded import EmbeddedLedger
from broker.ledger.store import FILE_NAME
from broker.ledger.verify import verify_ledger

PER_INTERVAL = 2_000
"""Deliveries, of 1 Wh each: as many as the device of the test world can make Wh in an interval."""

PER_BATCH = 500
MEASURED_BATCHES = 100
LEFT_WH = 20
"""Wh of each interval that stay with the broker, so that its holdings grow with the ledger."""


def interval_batches(number: int) -> Iterator[bytes]:
    """All batches of one interval: energy, deliveries, close."""
    start_s = world.T0 + number * world.INTERVAL_S
    not_after_s = start_s + 2 * world.INTERVAL_S
    energy_wh = PER_INTERVAL + LEFT_WH
    yield world.batch(
        world.issue("solar-1", energy_wh, start_s),
        world.take("solar-1", 0, energy_wh, start_s=start_s),
        not_after_s=not_after_s,
    )
    for first in range(0, PER_INTERVAL, PER_BATCH):
        deliveries = [
            world.deliver(number * PER_INTERVAL + wh, 1, ("solar-1", wh, wh + 1), start_s=start_s)
            for wh in range(first, first + PER_BATCH)
        ]
        yield world.batch(*deliveries, not_after_s=not_after_s)
    yield world.batch(world.close(start_s, demands=PER_INTERVAL), not_after_s=not_after_s)


def grow(path: Path, from_interval: int, to_interval: int) -> None:
    ledger = world.found(path)
    ledger._store._db.execute("PRAGMA synchronous = OFF")
    for number in range(from_interval, to_interval):
        _commit(ledger, interval_batches(number))
    ledger.close()


def _commit(ledger: EmbeddedLedger, batches: Iterator[bytes]) -> None:
    for raw in batches:
        refused = ledger.submit(raw)
        assert refused is None, refused
    for answer in ledger.commit().results:
        assert answer.result.height, answer


def resident_mb() -> float:
    """The resident set of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1_024


def measured(path: Path, interval: int) -> dict[str, Any]:
    """What this process sees of the ledger, which has so many intervals."""
    before_mb = resident_mb()
    began_s = time.perf_counter()
    ledger = world.found(path)
    start_ms = (time.perf_counter() - began_s) * 1_000
    started_mb = resident_mb()
    ledger._store._db.execute("PRAGMA synchronous = OFF")
    for number in range(interval, interval + MEASURED_BATCHES * PER_BATCH // PER_INTERVAL):
        _commit(ledger, interval_batches(number))
    working_mb = resident_mb()
    view = ledger.open_view()
    holdings, cursor, pages = 0, None, 0
    while pages == 0 or cursor is not None:
        page = view.page("b1", cursor)
        holdings, cursor, pages = holdings + len(page.entries), page.next_cursor, pages + 1
    view.close()
    paged_mb = resident_mb()
    ledger.close()
    return {
        "start_ms": round(start_ms, 1),
        "python_mb": round(before_mb, 1),
        "started_mb": round(started_mb - before_mb, 1),
        "working_mb": round(working_mb - before_mb, 1),
        "paged_mb": round(paged_mb - before_mb, 1),
        "holdings": holdings,
    }


def ledger_of(path: Path, operations: int) -> dict[str, Any]:
    """A new ledger of that size, and what a new process that opens it measures."""
    intervals = operations // PER_INTERVAL
    grow(path, 0, intervals)
    return _in_a_process("--measure", path, intervals)


def _in_a_process(*words: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.ledger_memory", *map(str, words)]
    # What can be imported here can be there as well.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="ledger_memory")
    parser.add_argument("--sizes", default="50000,200000,1000000", help="operations, ascending")
    parser.add_argument("--verify", type=int, default=200_000, help="verify ledgers up to so many operations")
    parser.add_argument("--measure", nargs=2, metavar=("PATH", "INTERVAL"), help=argparse.SUPPRESS)
    parser.add_argument("--check", metavar="PATH", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(Path(options.measure[0]), int(options.measure[1]))))
        return
    if options.check:
        before_mb, began_s = resident_mb(), time.perf_counter()
        report = verify_ledger(Path(options.check), helpers=0)
        assert report.ok, report.errors
        print(json.dumps({"verify_mb": round(resident_mb() - before_mb, 1), "s": time.perf_counter() - began_s}))
        return
    with tempfile.TemporaryDirectory() as folder:
        path, reached = Path(folder) / "ledger", 0
        for size in map(int, options.sizes.split(",")):
            interval = max(reached, size // PER_INTERVAL)
            grow(path, reached, interval)
            size_mb = (path / FILE_NAME).stat().st_size / 2**20
            line = {"operations": interval * PER_INTERVAL, "file_mb": round(size_mb)}
            line |= _in_a_process("--measure", path, interval)
            reached = interval + MEASURED_BATCHES * PER_BATCH // PER_INTERVAL
            if size <= options.verify:
                line |= _in_a_process("--check", path)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
