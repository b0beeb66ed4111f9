"""Damage in SQLite's write-ahead log (https://www.sqlite.org/walformat.html), which SQLite itself does not report.

It takes a damaged frame for the end of the log and drops what follows without a word: a ledger would just be shorter.

A log may end in frames that do not count without any damage: those of a commit that was cut off. Every commit waits for
the disk before the next one begins, and a start empties the log (`directory.opened_store`), so at most one end of a
commit stands among them. Two or more mean that a commit is lost which another one had followed.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from broker.ledger.store import FILE_NAME

LOG_NAME: Final = FILE_NAME + "-wal"

_HEADER: Final = struct.Struct(">8I")
_FRAME_HEADER: Final = struct.Struct(">6I")
_MAGIC: Final = 0x377F0682  # the lowest bit says in which byte order checksums are computed


@dataclass(frozen=True, slots=True)
class LogFault:
    """What SQLite passes over: `what` it is, and how many commits end in or behind it (see above)."""

    what: str
    commits: int


def log_fault(path: Path) -> LogFault | None:
    """The first frame, or the header, that does not count in the log of the ledger in directory `path`; None if all do.

    To be asked only while no engine runs: a running one rewrites its log.
    """
    log = path / LOG_NAME
    if not log.is_file():
        return None
    raw = log.read_bytes()
    if len(raw) < _HEADER.size:
        return None  # Cut short while it was being made: nothing was committed into it.
    magic, _, page_bytes, _, salt_1, salt_2, *expected = _HEADER.unpack_from(raw)
    order = ">" if magic & 1 else "<"
    checksum = _checksum(raw[:24], (0, 0), order)
    if magic & ~1 != _MAGIC or list(checksum) != expected:
        # The page size may be what is damaged, so nothing is counted. Frames are written once the header is on disk.
        written = len(raw) > _HEADER.size
        return LogFault(f"{LOG_NAME}: its header is damaged", 2 if written and _fits(raw, _HEADER.size) else 0)
    frame_bytes = _FRAME_HEADER.size + page_bytes
    fault: str | None = None
    commits, ended = 0, False
    for offset in range(_HEADER.size, len(raw) - frame_bytes + 1, frame_bytes):
        # Frames left over from an earlier round carry two other salts; a single one that fits is a damaged pair.
        if not _fits(raw, offset):
            ended = True
            continue
        _, pages_after, *frame_salts_and_sums = _FRAME_HEADER.unpack_from(raw, offset)
        checksum = _checksum(raw[offset : offset + 8], checksum, order)
        checksum = _checksum(raw[offset + _FRAME_HEADER.size : offset + frame_bytes], checksum, order)
        if ended or frame_salts_and_sums != [salt_1, salt_2, *checksum]:
            ended = True
            fault = fault or f"{LOG_NAME}: frame {(offset - _HEADER.size) // frame_bytes} is damaged"
            commits += pages_after != 0
    return LogFault(fault, commits) if fault else None


def _fits(raw: bytes, offset: int) -> bool:
    """True if the frame there carries one of the header's two salts."""
    salts = struct.unpack_from(">2I", raw, offset + 8) if len(raw) >= offset + 16 else (None, None)
    return any(one == other for one, other in zip(salts, struct.unpack_from(">2I", raw, 16), strict=True))


def _checksum(data: bytes, start: tuple[int, int], order: str) -> tuple[int, int]:
    first, second = start
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for index in range(0, len(words), 2):
        first = (first + words[index] + second) & 0xFFFFFFFF
        second = (second + words[index + 1] + first) & 0xFFFFFFFF
    return first, second
