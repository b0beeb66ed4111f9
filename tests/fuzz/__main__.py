"""`python -m fuzz [TARGET …] --runs N --seconds S`: fuzz each target in a process of its own, and stop at a finding.

With atheris (coverage-guided; x86_64 only) inputs that reach new code are kept and changed further. Elsewhere
hypothesis makes inputs out of the seeds and random bytes. A finding is written to fuzz-out/ and the process fails. So
does one in which the number of Python's memory blocks keeps growing.
"""

import argparse
import importlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Final

OUT: Final = Path("fuzz-out")
MAX_INPUT_BYTES: Final = 20_000
MAX_RSS_MB: Final = 1_024

BATCH_INPUTS: Final = 1_000
"""Hypothesis makes so many before the time is looked at."""

WARM_UP_INPUTS: Final = 2_000
CHECK_EVERY_INPUTS: Final = 1_000
MAX_GROWN_BLOCKS: Final = 10_000
"""Caches (of regular expressions, of small integers) fill up in the first inputs; after that nothing may stay."""


def main() -> int:
    """Parse the arguments and fuzz. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__.split("\n\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="which ones (default: all)")
    parser.add_argument("--runs", type=int, default=20_000, help="inputs per target")
    parser.add_argument("--seconds", type=int, default=3_600, help="at most this long per target")
    parser.add_argument("--here", action="store_true", help="fuzz the one target in this process")
    arguments = parser.parse_args()
    if arguments.here:
        return fuzz(arguments.targets[0], arguments.runs, arguments.seconds)
    from fuzz.targets import TARGETS

    OUT.mkdir(exist_ok=True)
    for name in arguments.targets or TARGETS:
        print(f"fuzzing {name}", flush=True)
        limits = ["--runs", str(arguments.runs), "--seconds", str(arguments.seconds)]
        finished = subprocess.run(
            [sys.executable, "-m", "fuzz", name, *limits, "--here"], stderr=subprocess.PIPE, text=True, check=False
        )
        if finished.returncode != 0:
            print(finished.stderr[-6_000:], file=sys.stderr)
            print(f"{name}: a finding; its input is in {OUT}/", file=sys.stderr)
            return 1
        print(f"  {finished.stderr.strip().splitlines()[-1]}", flush=True)
    return 0


def fuzz(name: str, runs: int, seconds: int) -> int:
    """Fuzz one target in this process. With atheris this does not return."""
    if find_spec("atheris") is None:
        return fuzz_by_hypothesis(name, runs, seconds)
    import atheris

    with atheris.instrument_imports(include=["meter_agent.framing"]):
        targets = importlib.import_module("fuzz.targets")
    target = targets.TARGETS[name]
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(target.seeds):
            (Path(folder) / str(number)).write_bytes(seed)
        limits = [f"-runs={runs}", f"-max_total_time={seconds}", f"-rss_limit_mb={MAX_RSS_MB}", "-timeout=10"]
        options = [f"-max_len={MAX_INPUT_BYTES}", f"-artifact_prefix={OUT}/{name}-", "-print_final_stats=0", "-seed=1"]
        atheris.Setup(["fuzz", *limits, *options, folder], watched(target.run))
        atheris.Fuzz()
    return 0


def fuzz_by_hypothesis(name: str, runs: int, seconds: int) -> int:
    """The same without guidance by coverage: batches of inputs until there were `runs`, or `seconds` have passed."""
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis import strategies as st

    from fuzz.targets import TARGETS

    target = TARGETS[name]
    seeds = st.sampled_from(target.seeds)
    cut = st.tuples(seeds, st.integers(0, 600), st.integers(0, 600)).map(lambda found: found[0][found[1] : found[2]])
    pieces = st.lists(st.one_of(st.binary(max_size=40), seeds, cut), max_size=12).map(b"".join)
    ends_s = time.monotonic() + seconds
    done = 0
    while done < runs and time.monotonic() < ends_s:
        batch = min(BATCH_INPUTS, runs - done)

        @seed(done)
        @settings(
            max_examples=batch,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(pieces)
        def every_input(data: bytes) -> None:
            target.run(data)

        every_input()
        done += batch
    print(f"Done {done} runs by hypothesis", file=sys.stderr)
    return 0


def watched(run: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """`run`, but failing when memory blocks pile up from input to input."""
    seen = 0
    blocks_then = 0

    def run_and_count(data: bytes) -> None:
        nonlocal seen, blocks_then
        run(data)
        seen += 1
        if seen == WARM_UP_INPUTS:
            blocks_then = sys.getallocatedblocks()
        elif seen > WARM_UP_INPUTS and seen % CHECK_EVERY_INPUTS == 0:
            grown = sys.getallocatedblocks() - blocks_then
            if grown > MAX_GROWN_BLOCKS:
                raise MemoryError(f"{grown} memory blocks more than after {WARM_UP_INPUTS} inputs")

    return run_and_count


if __name__ == "__main__":
    sys.exit(main())
