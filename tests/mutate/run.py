"""Runs the ledger's quick tests against each mutant, in a process forked off after pytest has collected them.

In the fork the functions of one rule module get the mutant's code, in place, so every module that holds them has the
mutant too. The first failing test ends it. Nothing is written: the checkout stays as it is, and a mutant costs the time
of the tests alone, not that of starting Python and importing everything again.
"""

import ast
import importlib
import os
import select
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, Final

import pytest
from _pytest.runner import runtestprotocol

from mutate.mutants import Mutant, mutants

CHECKOUT: Final = Path(__file__).parents[2]
TESTS: Final = (
    "tests/unit/ledger/test_guards.py",
    "tests/unit/ledger/test_rules.py",
    "tests/unit/ledger/test_rules_books.py",
    "tests/unit/ledger/test_corrections.py",
    *(f"tests/model/test_against_model.py::test_a_long_talk_leaves_both_with_the_same_books[{n}]" for n in range(6)),
)
"""Plain tests first, since most mutants fall there."""
NOT_ASKED: Final = "test_every_guard_is_needed"
"""Looks at the source itself, and so fails for any missing guard whether or not it can be noticed."""
TIMEOUT_S: Final = 300.0
"""Far beyond what the tests take; a mutant that makes them hang is found."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`found_by` is the first test that failed, "time-out", "a crash", or None for a survivor."""

    mutant: Mutant
    found_by: str | None


class BaselineFails(Exception):
    """A test fails without any mutant; then the run would say nothing."""


def modules() -> list[Path]:
    """The rule modules."""
    return sorted((CHECKOUT / "broker" / "ledger" / "rules").glob("*.py"))


def all_mutants() -> list[Mutant]:
    """Every mutant of every rule module, in the order of the source."""
    return [
        mutant
        for path in modules()
        for mutant in mutants(str(path.relative_to(CHECKOUT)), path.read_text(encoding="utf-8"))
    ]


def judge_all(chosen: Sequence[Mutant], workers: int, report: Callable[[Verdict], None]) -> None:
    """Call `report` with a verdict on each mutant as it comes. Raises BaselineFails."""
    judge = _Judge(chosen, workers, report)
    arguments = ["-q", "--tb=no", "--no-header", "--no-summary", "-p", "no:cacheprovider", "-p", "no:xdist"]
    arguments += ["-k", f"not {NOT_ASKED}", "--rootdir", str(CHECKOUT)]
    arguments += ["-c", str(CHECKOUT / "setup.cfg"), *(str(CHECKOUT / test) for test in TESTS)]
    code = pytest.main(arguments, plugins=[judge])
    if judge.baseline is not None:
        raise BaselineFails(f"{judge.baseline} fails on the rules as they are; mend it first")
    if code != pytest.ExitCode.OK:
        raise BaselineFails(f"pytest could not collect the tests: {code!r}")


class _Judge:
    """A pytest plugin that judges mutants in place of running the tests once."""

    def __init__(self, chosen: Iterable[Mutant], workers: int, report: Callable[[Verdict], None]) -> None:
        self._waiting = list(reversed(list(chosen)))
        self._workers = workers
        self._report = report
        self.baseline: str | None = None

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed or not session.items:
            return False
        # Without a mutant first: what fails then has nothing to do with mutants.
        self.baseline = next(self._found(session, [None], 1))[1]
        if self.baseline is None:
            for mutant, found_by in self._found(session, self._waiting, self._workers):
                self._report(Verdict(mutant, found_by))
        return True

    def _found(self, session: pytest.Session, waiting: list[Any], workers: int) -> Iterator[tuple[Any, str | None]]:
        running: dict[int, tuple[Any, int, float]] = {}
        while waiting or running:
            while waiting and len(running) < workers:
                mutant = waiting.pop()
                pipe, pid = _forked(session, mutant)
                running[pipe] = (mutant, pid, time.monotonic() + TIMEOUT_S)
            ready, _, _ = select.select(list(running), [], [], 1.0)
            for pipe, (mutant, pid, until) in list(running.items()):
                if pipe in ready:
                    said = os.read(pipe, 4_096).decode()
                    found_by = None if said == "none" else said or "a crash"
                elif time.monotonic() > until:
                    os.kill(pid, signal.SIGKILL)
                    found_by = "time-out"
                else:
                    continue
                os.waitpid(pid, 0)
                os.close(pipe)
                del running[pipe]
                yield mutant, found_by


def _forked(session: pytest.Session, mutant: Mutant | None) -> tuple[int, int]:
    """Start the tests against a mutant: the pipe on which the first failing test comes, and the process."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return reader, pid
    status = 1
    try:
        if mutant is not None:
            _become(mutant)
        os.write(writer, (_first_failure(session) or "none").encode())
        status = 0
    finally:
        # Nothing of the parent's, pytest's end least of all, may run a second time.
        os._exit(status)


def _become(mutant: Mutant) -> None:
    """Give the functions of the mutant's module the mutant's code."""
    name = mutant.module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    module = importlib.import_module(name)
    scratch: dict[str, Any] = {"__name__": "mutant"}
    exec(compile(ast.parse(mutant.source), f"mutant of {name}", "exec"), scratch)
    for function_name, function in vars(module).items():
        if isinstance(function, FunctionType) and function.__module__ == name:
            function.__code__ = scratch[function_name].__code__


def _first_failure(session: pytest.Session) -> str | None:
    items = session.items
    for item, following in zip(items, [*items[1:], None], strict=True):
        for report in runtestprotocol(item, nextitem=following, log=False):
            if report.failed:
                return item.nodeid
    return None
