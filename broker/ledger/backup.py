"""A whole copy of a ledger, made while its engine runs, and verified before it counts.

A copy is a ledger directory like any other: `energy-broker ledger verify` takes it, and an engine goes on from it. An
engine must not go on from a copy where others have followed the original further: two different blocks of one height
would be signed, which is what every broker takes for cheating.
"""

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from broker.database_copy import CopyError, copy_database, flush_directory, reading
from broker.ledger.store import FILE_NAME, LedgerError
from broker.ledger.verify import VerifyReport, verify_ledger


def backup_ledger(path: Path, out: Path) -> VerifyReport:
    """Copy the ledger in directory `path` into the new directory `out` and derive all of the copy again.

    Raises LedgerError if there is no ledger or the copy does not verify, CopyError if `out` exists or a disk refuses;
    then nothing is left of the copy.
    """
    if not (path / FILE_NAME).is_file():
        raise LedgerError(path, f"holds no {FILE_NAME}; give the ledger's directory")
    with new_directory(out) as partial, reading(path / FILE_NAME) as database:
        return copy_ledger(path, database, partial)


def copy_ledger(path: Path, database: sqlite3.Connection, out: Path) -> VerifyReport:
    """Copy the ledger that `database` shows into directory `out`, and verify it. Raises LedgerError, CopyError."""
    copy_database(database, out / FILE_NAME)
    report = verify_ledger(out)
    if not report.ok:
        raise LedgerError(path, f"its copy does not verify: {report.errors[0]}; restore the ledger from another copy")
    return report


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
    except (OSError, sqlite3.Error) as error:
        raise CopyError(f"{out} cannot be written: {error}; free disk space, or check the disk") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
