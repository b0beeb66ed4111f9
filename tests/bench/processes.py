"""What a process has used, from /proc, and a helper process that takes jobs over its standard input."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

TESTS_FOLDER: Final = Path(__file__).resolve().parents[1]
_STOP_LIMIT_S: Final = 10.0


def cpu_s(pid: int) -> float:
    """CPU seconds (user and system) that all threads of a running process have used.

    From schedstat, which counts nanoseconds; /proc/PID/stat counts in hundredths of a second only. Threads that have
    ended are not in it; the processes measured here end none while they are measured.
    """
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def rss_mb(pid: int) -> float:
    """Resident memory of a running process in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def share_a_core(measured: Iterable[int], others: Iterable[int]) -> None:
    """Put the measured processes on one core, and the others on the rest, if there is more than one.

    Cores of a virtual machine differ: on one, somebody else's work may be the other half of the same real core. What is
    compared has to run on the same one.
    """
    cores = sorted(os.sched_getaffinity(0))
    for pid in measured:
        os.sched_setaffinity(pid, cores[-1:])
    for pid in others:
        os.sched_setaffinity(pid, cores[:-1] or cores)


class HelperFailed(Exception):
    """A helper process ended, or its answer says what went wrong."""


class Helper:
    """`python -m MODULE ARGUMENTS` that reads a job a line (JSON) and answers each with a line. Use it in a `with`."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._name = " ".join((module, *arguments))
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(TESTS_FOLDER)},
            start_new_session=True,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, job: dict[str, Any]) -> None:
        """Give it a job; `answer` waits for the result."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The result of the oldest job without one. Raises HelperFailed if the process has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise HelperFailed(f"{self._name} ended with exit code {self._process.wait()}")
        result: dict[str, Any] = json.loads(line)
        return result

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        self.send(job)
        return self.answer()

    def close(self) -> None:
        """End it: it ends by itself when there are no more jobs."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
