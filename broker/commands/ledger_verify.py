"""`energy-broker ledger verify`: check a ledger from its first block, and go on where an earlier run was ended."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

from broker.commands.common import DONE, FAILED, add_command, counted

if TYPE_CHECKING:
    from broker.ledger.verify import Progress

_LINE_EVERY_S: Final = 2.0


def add_commands(group: Any) -> None:
    """Add the command to the parsers of `energy-broker ledger`."""
    verify = add_command(
        group, "verify", "Check a ledger from its first block: exit 0 only if all of it holds.", _ledger_verify
    )
    verify.add_argument("path", type=Path, metavar="PATH", help="the ledger's directory")
    verify.add_argument(
        "--resume",
        type=Path,
        metavar="DIR",
        help="keep what is done in this directory and go on from it; it grows as large as the ledger's state",
    )
    verify.add_argument(
        "--certificate",
        type=Path,
        metavar="FILE",
        help="a network's certificate (`ledger certify`); by default the one that a node keeps in PATH",
    )
    verify.add_argument("--progress", action="store_true", help="say how far it is, also where nobody looks on")


def _ledger_verify(options: argparse.Namespace) -> int:
    from broker.ledger.verify import verify_ledger

    on_terminal = sys.stderr.isatty()
    lines = ProgressLines(sys.stderr, on_terminal, time.monotonic) if on_terminal or options.progress else None
    report = verify_ledger(options.path, resume=options.resume, progress=lines, certificate=options.certificate)
    if lines is not None:
        lines.end()
    if report.started_over is not None:
        print(f"{options.resume}: {report.started_over}; started over from the first block", file=sys.stderr)
    elif report.resumed_height:
        print(f"{options.resume}: went on from height {report.resumed_height}", file=sys.stderr)
    for error in report.errors:
        print(f"{options.path}: {error}", file=sys.stderr)
    if report.base_height:
        print(
            f"{options.path}: it began with a snapshot of height {report.base_height} and was verified from there on;"
            " what was before takes a copy with all blocks",
            file=sys.stderr,
        )
    if report.certified_height:
        print(
            f"{options.path}: more than two thirds of the validators' power stand for height"
            f" {report.certified_height} and all before",
            file=sys.stderr,
        )
    verdict = (
        "all of it holds"
        if report.ok
        else f"{counted(len(report.errors), 'fault')}; restore it from a copy that verifies"
    )
    print(
        f"{options.path}: ledger {report.ledger}, height {report.height}, head {report.block_id.hex()},"
        f" state {report.state_hash.hex()}: {verdict}"
    )
    return DONE if report.ok else FAILED


class ProgressLines:
    """Says now and then how far a verification is: on a terminal in one line that changes, else line by line."""

    def __init__(self, stream: TextIO, on_terminal: bool, clock: Callable[[], float]) -> None:
        self._stream = stream
        self._on_terminal = on_terminal
        self._clock = clock
        self._begun: tuple[float, int] | None = None
        self._said_s = clock()
        self._said_any = False

    def __call__(self, progress: "Progress") -> None:
        now_s = self._clock()
        # What an earlier run did is not to this one's credit, so the rate counts from the first report.
        if self._begun is None:
            self._begun = (now_s, progress.operations)
        if now_s - self._said_s < _LINE_EVERY_S:
            return
        self._said_s = now_s
        self._said_any = True
        line = f"height {progress.height} of {progress.stored_height}, {progress.operations} operations"
        if progress.rows:
            line += f"; {progress.rows} rows compared"
        elif now_s > self._begun[0]:
            line += f", {round((progress.operations - self._begun[1]) / (now_s - self._begun[0]))} a second"
        print(
            f"\r\x1b[K{line}" if self._on_terminal else line, end="" if self._on_terminal else "\n", file=self._stream
        )
        self._stream.flush()

    def end(self) -> None:
        """Leave the changing line, if there is one."""
        if self._on_terminal and self._said_any:
            print(file=self._stream)
