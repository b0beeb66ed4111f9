"""A backup of a broker: its database, and with it the ledger that it hosts, both of one moment.

The two must fit together. A database that is older than the ledger has forgotten decisions that stand there, and the
broker refuses to go on with it; one that is newer knows of blocks that the ledger would then have lost.
"""

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from broker.config import BrokerConfig
from broker.database_copy import CopyError, copy_database, new_directory, reading
from broker.ledger.backup import copy_ledger
from broker.ledger.chain import Head
from broker.ledger.store import FILE_NAME
from broker.ledger.verify import VerifyReport
from broker.protocol.errors import MalformedMessage

LEDGER_DIRECTORY: Final = "ledger"
ATTEMPTS: Final = 600
PAUSE_S: Final = 0.05
"""Between two attempts to find database and ledger at the same block; thirty seconds in all."""


@dataclass(frozen=True, slots=True)
class BackupReport:
    """What was copied; `ledger` is None where the broker hosts none, or none yet."""

    database: Path
    ledger: VerifyReport | None


def backup_broker(config: BrokerConfig, out: Path, wait: Callable[[float], None]) -> BackupReport:
    """Copy the broker's database, and the ledger that it hosts, into the new directory `out`; also while it runs.

    `wait(seconds)` passes time. Raises CopyError, LedgerError; then nothing is left of the copy.
    """
    host = config.ledger.host
    file = host.path / FILE_NAME if host is not None else None
    with new_directory(out) as partial:
        if file is None or not file.is_file():
            with reading(config.database) as database:
                copy_database(database, partial / config.database.name)
            return BackupReport(out / config.database.name, None)
        for _ in range(ATTEMPTS):
            with reading(config.database) as database, reading(file) as ledger:
                if _taken_in(config.database, database) == _height(file, ledger):
                    copy_database(database, partial / config.database.name)
                    (partial / LEDGER_DIRECTORY).mkdir()
                    report = copy_ledger(file.parent, ledger, partial / LEDGER_DIRECTORY)
                    return BackupReport(out / config.database.name, report)
            wait(PAUSE_S)
        raise CopyError(
            f"{config.database} and the ledger in {file.parent} do not come to the same block: one of them may have"
            " been restored alone; run the broker, which will say so, or stop it and try again"
        )


def _taken_in(file: Path, database: sqlite3.Connection) -> int:
    """The height up to which the broker has taken in the ledger; 0 before any block."""
    try:
        row = database.execute("SELECT height FROM ledger_cursor").fetchone()
    except sqlite3.Error as error:
        raise CopyError(f"{file} is no broker's database ({error}); restore it from a backup") from error
    return 0 if row is None else int(row[0])


def _height(file: Path, ledger: sqlite3.Connection) -> int:
    try:
        row = ledger.execute("SELECT value FROM meta WHERE name = 'head'").fetchone()
        return Head.from_bytes(b"" if row is None else row[0]).height
    except (sqlite3.Error, MalformedMessage) as error:
        raise CopyError(
            f"{file} is no ledger, or damaged ({error}); run `energy-broker ledger verify {file.parent}`"
        ) from error
