"""Damage in SQLite's write-ahead log (https://www.sqlite.org/walformat.html), which SQLite itself does not report.

It takes a damaged frame for the end of the log and drops what follows without a word: a ledger would just be shorter.
"""

import fcntl
import os
import struct
from pathlib import Path
from typing import Final

from broker.ledger.store import FILE_NAME, LOCK_NAME

_WAL_HEADER: Final = struct.Struct(">8I")
_FRAME_HEADER: Final = struct.Struct(">6I")
_WAL_MAGIC: Final = 0x377F0682  # the lowest bit says in which byte order checksums are computed


def log_faults(path: Path) -> list[str]:
    """What is wrong with the log of the ledger in directory `path`; empty if nothing, or if there is none.

    Looked at only while no engine holds the directory: a running one has its log in memory and rewrites it.
    """
    log = path / (FILE_NAME + "-wal")
    if not log.is_file() or not log.stat().st_size or _is_in_use(path):
        return []
    raw = log.read_bytes()
    if len(raw) < _WAL_HEADER.size:
        return []  # Cut short while it was being made: nothing was committed into it.
    advice = (
        "if power failed while it was written, open the ledger once, which removes the unfinished rest; "
        "else blocks may be missing: compare the height with a checkpoint"
    )
    magic, _, page_bytes, _, salt_1, salt_2, check_1, check_2 = _WAL_HEADER.unpack_from(raw)
    order = ">" if magic & 1 else "<"
    checksum = _checksum(raw[:24], (0, 0), order)
    if magic & ~1 != _WAL_MAGIC or checksum != (check_1, check_2):
        return [f"{log.name}: its header is damaged; {advice}"]
    frame_bytes = _FRAME_HEADER.size + page_bytes
    valid = True
    for offset in range(_WAL_HEADER.size, len(raw) - frame_bytes + 1, frame_bytes):
        _, _, frame_salt_1, frame_salt_2, *expected = _FRAME_HEADER.unpack_from(raw, offset)
        # Frames left over from an earlier round carry two other salts; a single one that fits is a damaged pair.
        if frame_salt_1 != salt_1 and frame_salt_2 != salt_2:
            valid = False
            continue
        checksum = _checksum(raw[offset : offset + 8], checksum, order)
        checksum = _checksum(raw[offset + _FRAME_HEADER.size : offset + frame_bytes], checksum, order)
        if not valid or list(checksum) != expected or (frame_salt_1, frame_salt_2) != (salt_1, salt_2):
            number = (offset - _WAL_HEADER.size) // frame_bytes
            return [f"{log.name}: frame {number} is damaged; {advice}"]
    return []


def _checksum(data: bytes, start: tuple[int, int], order: str) -> tuple[int, int]:
    first, second = start
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for index in range(0, len(words), 2):
        first = (first + words[index] + second) & 0xFFFFFFFF
        second = (second + words[index + 1] + first) & 0xFFFFFFFF
    return first, second


def _is_in_use(path: Path) -> bool:
    try:
        descriptor = os.open(path / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
