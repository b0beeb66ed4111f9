"""Whole copies of SQLite databases that are in use.

SQLite's backup interface copies all pages in one read transaction (https://www.sqlite.org/backup.html). In WAL mode a
writer goes on meanwhile and is not waited for; what it commits stays in its log until the copy is through. The copy is
checked, flushed to the disk and only then given its name, so a file of that name is always a whole one.
"""

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from broker.protocol.files import refused_by_system

_SOURCE_DAMAGED: Final = ("SQLITE_CORRUPT", "SQLITE_NOTADB")
"""What SQLite finds in what it reads, and never in the copy that it has just begun."""


class CopyError(Exception):
    """A database that could not be copied. The text says what to do."""


@contextmanager
def reading(source: Path) -> Iterator[sqlite3.Connection]:
    """The database as it is from now on, whoever goes on writing. Raises CopyError, sqlite3.Error."""
    if not source.is_file():
        raise CopyError(f"{source}: there is no such database; check the path")
    try:
        database = sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
    except sqlite3.Error as error:
        raise CopyError(f"{source}: {error}; check who may read it") from error
    try:
        try:
            database.execute("BEGIN")
            database.execute("SELECT 1 FROM sqlite_master").fetchone()
        except sqlite3.Error as error:
            raise CopyError(f"{source} cannot be read ({error}); restore it from an earlier copy") from error
        yield database
    finally:
        database.close()


def copy_database(source: sqlite3.Connection, target: Path) -> None:
    """Copy what `source` shows (see `reading`) to the new file `target`, readable by its owner only.

    Raises CopyError if there is a file already, if a disk refuses, or if the copy does not pass SQLite's own check.
    """
    if target.exists():
        raise CopyError(f"{target} exists already; a backup never replaces anything, give another name")
    partial = target.with_name(target.name + ".partial")
    try:
        # Left over from a copy that was killed; nothing but copies has this name.
        partial.unlink(missing_ok=True)
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        faults = _copied(source, partial)
        if faults:
            raise CopyError(f"{target}: the copy is damaged, and so is the original: {'; '.join(faults)}")
        flush_file(partial)
        partial.rename(target)
        flush_directory(target.parent)
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorname in _SOURCE_DAMAGED:
            raise CopyError(f"{target}: the original is damaged ({error}); restore it from an earlier copy") from error
        raise CopyError(f"cannot be copied to {target}: {error}; free disk space, or check the disk") from error
    except OSError as error:
        raise CopyError(f"cannot be copied: {refused_by_system(error)}") from error
    finally:
        partial.unlink(missing_ok=True)


def _copied(source: sqlite3.Connection, target: Path) -> list[str]:
    """Copy all pages; returns what SQLite finds wrong with the copy."""
    copy = sqlite3.connect(target, isolation_level=None)
    try:
        # In one step: a copy in several is begun anew whenever somebody commits between two of them.
        source.backup(copy, pages=-1)
        # Without a log of its own the copy is one file; whoever opens it for writing turns the log on again.
        copy.execute("PRAGMA journal_mode = DELETE")
        faults = [text for (text,) in copy.execute("PRAGMA integrity_check") if text != "ok"]
    finally:
        copy.close()
    # SQLite 3.40, which Debian 12 has, sees these in sound tables WITHOUT ROWID whose key is not their first columns.
    return [fault for fault in faults if not fault.startswith("NULL value in ")]


def flush_file(file: Path) -> None:
    """Make what stands in a file durable."""
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory that gets the name `out` when all went well, and is gone otherwise. Raises CopyError."""
    if out.exists():
        raise CopyError(f"{out} exists already; a backup never replaces anything, give another name")
    partial = out.with_name(out.name + ".partial")
    try:
        # Left over from a copy that was killed; nothing but copies has this name.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, mode=0o700)
        yield partial
        partial.rename(out)
        flush_directory(out.parent)
    except OSError as error:
        raise CopyError(f"{out} cannot be written: {refused_by_system(error)}") from error
    except sqlite3.Error as error:
        raise CopyError(f"{out} cannot be written: {error}; free disk space, or check the disk") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
