"""Run many seeds and say which fail: `PYTHONPATH=tests .venv/bin/python -m simulation --help`.

Each run is the two-broker market of `plans.PAIR`, disturbed as the options say, and must end with the books of an
undisturbed run. `--moments` kills a broker once, at each moment of the run of seed 0 in turn.
"""

import argparse
import logging
import shutil
import tempfile
import traceback
from pathlib import Path

from simulation import audit
from simulation.plans import PAIR
from simulation.simulated_mqtt import Faults
from simulation.world import Books, World


def main() -> int:
    parser = argparse.ArgumentParser(prog="simulation", description="Run many seeds of a simulated market.")
    parser.add_argument("--first", type=int, default=0, help="first seed (or moment)")
    parser.add_argument("--count", type=int, default=100, help="how many")
    parser.add_argument("--step", type=int, default=1, help="distance between them")
    parser.add_argument("--kills", type=int, default=8, help="kills in a run")
    parser.add_argument("--disconnects", type=int, default=4, help="broken connections in a run")
    parser.add_argument("--moments", action="store_true", help="one kill at each moment instead")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    folder = Path(tempfile.mkdtemp(prefix="dengen-sim-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        undisturbed = World(PAIR, folder / "undisturbed")
        expected = undisturbed.run()
        numbers = range(options.first, options.first + options.count * options.step, options.step)
        if options.moments:
            numbers = range(options.first, min(numbers.stop, undisturbed.moments + 1), options.step)
        failures = sum(_failed(options, folder / "world", number, expected) for number in numbers)
    finally:
        shutil.rmtree(folder)
    print(f"{len(numbers)} runs, {failures} failed")
    return 1 if failures else 0


def _failed(options: argparse.Namespace, folder: Path, number: int, expected: Books) -> bool:
    if options.moments:
        world = World(PAIR, folder, kill_at=number)
    else:
        faults = Faults(lost=20, doubled=20, reordered=20)
        world = World(PAIR, folder, number, faults=faults, kills=options.kills, disconnects=options.disconnects)
    try:
        books = world.run()
        audit.check(world, books)
        if books != expected:
            raise AssertionError("the books differ from those of an undisturbed run")
    except Exception:
        print(f"{number}:", traceback.format_exc(limit=-3))
        return True
    finally:
        world.stop()
        shutil.rmtree(folder)
    return False


if __name__ == "__main__":
    raise SystemExit(main())
