"""Runs the ledger's quick tests against a mutant, in a scratch copy of the package; the checkout is never touched."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Final

from mutate.mutants import Mutant, mutants

CHECKOUT: Final = Path(__file__).parents[2]
TESTS: Final = (
    "tests/unit/ledger/test_guards.py",
    "tests/unit/ledger/test_rules.py",
    "tests/unit/ledger/test_corrections.py",
    "tests/model/test_against_model.py::test_a_long_talk_leaves_both_with_the_same_books",
)
"""Plain tests first, since most mutants fall there."""
TIMEOUT_S: Final = 120
"""Far beyond what the tests take; a mutant that makes them hang is found."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`found_by` is the first test that failed, "time-out", or None for a survivor."""

    mutant: Mutant
    found_by: str | None
    seconds: float


def modules() -> list[Path]:
    """The rule modules, below the checkout."""
    folder = CHECKOUT / "broker" / "ledger"
    return sorted([*folder.glob("rules*.py"), *folder.glob("rules/*.py")])


def all_mutants() -> list[Mutant]:
    """Every mutant of every rule module, in the order of the source."""
    return [
        mutant
        for path in modules()
        for mutant in mutants(str(path.relative_to(CHECKOUT)), path.read_text(encoding="utf-8"))
    ]


def scratch_copy(folder: Path) -> Path:
    """A copy of the package, without compiled files."""
    shutil.copytree(CHECKOUT / "broker", folder / "broker", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def judge_all(chosen: Iterable[Mutant], folder: Path, workers: int) -> Iterator[Verdict]:
    """A verdict on each mutant, in their order. Scratch copies go below `folder`."""
    copies: SimpleQueue[Path] = SimpleQueue()
    for number in range(workers):
        copies.put(scratch_copy(folder / f"copy-{number}"))

    def judged(mutant: Mutant) -> Verdict:
        copy = copies.get()
        try:
            return _judge(mutant, copy)
        finally:
            copies.put(copy)

    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(judged, chosen)


def _judge(mutant: Mutant, copy: Path) -> Verdict:
    file = copy / mutant.module
    original = file.read_text(encoding="utf-8")
    began = time.monotonic()
    file.write_text(mutant.source, encoding="utf-8")
    try:
        return Verdict(mutant, found_by(copy), time.monotonic() - began)
    finally:
        file.write_text(original, encoding="utf-8")


def found_by(copy: Path) -> str | None:
    """The first test that fails against this copy, None if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["--rootdir", str(CHECKOUT), "-c", str(CHECKOUT / "setup.cfg")]
    # Python's own cache of a module goes by its time and size, which a mutant can share with the one before.
    environment = os.environ | {
        "PYTHONPATH": f"{copy}{os.pathsep}{CHECKOUT / 'tests'}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "DENGEN_FULL": "0",
    }
    try:
        done = subprocess.run(
            [*command, *(str(CHECKOUT / test) for test in TESTS)],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "time-out"
    if done.returncode == 0:
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0] if failed else "a crash of the tests"
