"""A whole copy of a ledger, made while its engine runs, and verified before it counts.

A copy is a ledger directory like any other: `energy-broker ledger verify` takes it, and an engine goes on from it. An
engine must not go on from a copy where others have followed the original further: two different blocks of one height
would be signed, which is what every broker takes for cheating.
"""

import shutil
import sqlite3
from pathlib import Path

from broker.database_copy import copy_database, flush_file, new_directory, reading
from broker.ledger.certificate import CERTIFICATE_NAME
from broker.ledger.snapshot import BASE_FILE_NAME
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
    certificate = (path / CERTIFICATE_NAME).read_bytes() if (path / CERTIFICATE_NAME).is_file() else None
    copy_database(database, out / FILE_NAME)
    if (path / BASE_FILE_NAME).is_file():
        # What a restored ledger began with, without which it cannot be verified. It never changes.
        shutil.copyfile(path / BASE_FILE_NAME, out / BASE_FILE_NAME)
        flush_file(out / BASE_FILE_NAME)
    if certificate is not None:
        # What proves the blocks of a network's node that is no validator.
        (out / CERTIFICATE_NAME).write_bytes(certificate)
        flush_file(out / CERTIFICATE_NAME)
    try:
        report = verify_ledger(out)
    except LedgerError as error:
        raise LedgerError(path, f"its copy cannot be verified, since {error.reason}") from error
    if not report.ok:
        raise LedgerError(path, f"its copy does not verify: {report.errors[0]}; restore the ledger from another copy")
    return report
