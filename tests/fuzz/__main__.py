"""`python -m fuzz [TARGET …] --runs N --seconds S`: fuzz each target in a process of its own, and stop at a finding.

With atheris (coverage-guided; x86_64 only) inputs that reach new code are kept and changed further. Elsewhere
hypothesis makes inputs out of the seeds and random bytes. A finding is written to fuzz-out/ and the process fails.

Then the inputs that were kept, which reach all code that was reached, are read again and again, without atheris
(whose own memory grows), and no memory block may stay behind.
"""

import argparse
import gc
import importlib
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Final

OUT: Final = Path("fuzz-out")
INSTRUMENTED: Final = ("meter_agent.framing", "meter_agent.readers", "meterbus", "momonga")
"""What guides the choice of inputs: our own reading, and the libraries that take some bytes apart for it."""

MAX_INPUT_BYTES: Final = 20_000
MAX_RSS_MB: Final = 1_024

BATCH_INPUTS: Final = 1_000
"""Hypothesis makes so many before the time is looked at."""

REPLAYS: Final = 30
"""How often all inputs are read between two counts of memory."""

MAX_COUNTS: Final = 12
"""Python's own caches settle within a few; a leak never does."""

MAX_GROWN_BLOCKS: Final = 25
"""Less than one block for each time that one of the inputs was read."""


def main() -> int:
    """Parse the arguments and fuzz. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__.split("\n\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="which ones (default: all)")
    parser.add_argument("--runs", type=int, default=20_000, help="inputs per target")
    parser.add_argument("--seconds", type=int, default=3_600, help="at most this long per target")
    parser.add_argument("--corpus", type=Path, help="fuzz the one target in this process, on the inputs in this folder")
    arguments = parser.parse_args()
    # A library that reports each refused answer would write more than it reads.
    logging.disable(logging.CRITICAL)
    if arguments.corpus is not None:
        return fuzz(arguments.targets[0], arguments.runs, arguments.seconds, arguments.corpus)
    from fuzz.targets import TARGETS

    OUT.mkdir(exist_ok=True)
    for name in arguments.targets or TARGETS:
        print(f"fuzzing {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for number, seed in enumerate(TARGETS[name].seeds):
                (Path(folder) / str(number)).write_bytes(seed)
            limits = ["--runs", str(arguments.runs), "--seconds", str(arguments.seconds)]
            finished = subprocess.run(
                [sys.executable, "-m", "fuzz", name, *limits, "--corpus", folder],
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
            if finished.returncode != 0:
                print(finished.stderr[-6_000:], file=sys.stderr)
                print(f"{name}: a finding; its input is in {OUT}/", file=sys.stderr)
                return 1
            grown = grown_blocks(TARGETS[name].run, [path.read_bytes() for path in Path(folder).iterdir()])
        if grown > MAX_GROWN_BLOCKS:
            print(f"{name}: {grown} memory blocks stay behind when inputs are read again", file=sys.stderr)
            return 1
        print(f"  {finished.stderr.strip().splitlines()[-1]}", flush=True)
    return 0


def fuzz(name: str, runs: int, seconds: int, corpus: Path) -> int:
    """Fuzz one target in this process, and keep interesting inputs in `corpus`. With atheris this does not return."""
    if find_spec("atheris") is None:
        return fuzz_by_hypothesis(name, runs, seconds)
    import atheris

    with atheris.instrument_imports(include=list(INSTRUMENTED)):
        targets = importlib.import_module("fuzz.targets")
    target = targets.TARGETS[name]
    limits = [f"-runs={runs}", f"-max_total_time={seconds}", f"-rss_limit_mb={MAX_RSS_MB}", "-timeout=10"]
    options = [f"-max_len={MAX_INPUT_BYTES}", f"-artifact_prefix={OUT}/{name}-", "-print_final_stats=0", "-seed=1"]
    atheris.Setup(["fuzz", *limits, *options, str(corpus)], target.run)
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


def grown_blocks(run: Callable[[bytes], None], inputs: list[bytes]) -> int:
    """Memory blocks of Python that stay behind each time that all inputs are read REPLAYS times more."""
    for data in inputs:
        run(data)
    gc.collect()
    grown = 0
    before = sys.getallocatedblocks()
    for _ in range(MAX_COUNTS):
        for _ in range(REPLAYS):
            for data in inputs:
                run(data)
        gc.collect()
        grown = sys.getallocatedblocks() - before
        if grown <= MAX_GROWN_BLOCKS:
            break
        before += grown
    return grown


if __name__ == "__main__":
    sys.exit(main())
