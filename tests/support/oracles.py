"""Environments of their own for libraries by others that judge our bytes and cannot live beside what we use ourselves.

Each is made on first use, in the checkout, by one test process at a time. Where it cannot be made (no network), the
test is skipped and says so.
"""

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"


def environment(name: str, packages: tuple[str, ...]) -> Path:
    """The interpreter of the environment `name` with exactly these packages; skips the test where it cannot be made."""
    folder = ROOT / name
    python = folder / "bin" / "python"
    made = folder / "made-with"
    with (ROOT / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists() or made.read_text() != " ".join(packages):
            for command in (
                [sys.executable, "-m", "venv", "--clear", str(folder)],
                [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages],
            ):
                try:
                    subprocess.run(command, check=True, capture_output=True, text=True, timeout=180)
                except subprocess.CalledProcessError as error:
                    pytest.skip(f"the environment for {packages[0]} cannot be made: {error.stderr.strip()[-300:]}")
                except subprocess.TimeoutExpired:
                    pytest.skip(f"the environment for {packages[0]} cannot be made: no answer from the package index")
            made.write_text(" ".join(packages))
    return python


def ask(python: Path, script: str, requests: list[dict[str, bytes]]) -> list[str]:
    """What the script in this folder answers to these requests, one text each."""
    finished = subprocess.run(
        [str(python), str(SUPPORT / script)],
        input=json.dumps([{name: value.hex() for name, value in request.items()} for request in requests]),
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    answers: list[str] = json.loads(finished.stdout)
    return answers
