"""What the agent must not forget in a power cut, in one SQLite file: counters, intervals, outbox, answers, events.

An interval is sealed in one transaction (`seal`): the counters that it rests on, the interval, and its signed message.
Either all of it is there after a crash or none, and then the next sample seals it again. A message that has no
receipt is waiting; sending it again is sending the stored bytes.

Receipts, deliveries and events are kept in memory by `note_*` and written with the next sealed interval (or by `flush`,
at MAX_NOTES, and on close), so that an SD card sees one transaction an interval. Losing them costs a resend.
"""

import contextlib
import fcntl
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from broker.protocol.envelope import parse
from broker.protocol.messages import Delivery, Quality, Receipt
from meter_agent.intervals import Anchor, Boundary, MeterState, SealedInterval
from meter_agent.outbox import AcceptedDemand, OutboxState, WaitingMessage

FILE_NAME: Final = "journal.sqlite"
SCHEMA_VERSION: Final = 2
MAX_NOTES: Final = 256
"""Receipts, deliveries and events that are held in memory at most."""

MAX_EVENTS: Final = 10_000
REFUSED_KEEP_FACTOR: Final = 10
"""Refused intervals stay this many times longer than accepted ones, because somebody has to look into them."""

_SCHEMA: Final = """
CREATE TABLE meter (
    name TEXT PRIMARY KEY, anchor_time_us INTEGER NOT NULL, anchor_raw_mwh INTEGER NOT NULL,
    anchor_total_mwh INTEGER NOT NULL, serial_number TEXT, boundary_at_s INTEGER, boundary_total_wh INTEGER,
    boundary_quality INTEGER, boundary_before_s INTEGER, boundary_after_s INTEGER, boundary_set_s INTEGER,
    unassigned_wh INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE interval (
    meter TEXT NOT NULL, start_s INTEGER NOT NULL, revision INTEGER NOT NULL, end_s INTEGER NOT NULL,
    energy_wh INTEGER NOT NULL, quality INTEGER NOT NULL, message_id BLOB NOT NULL, message BLOB NOT NULL,
    state INTEGER NOT NULL, receipt BLOB, PRIMARY KEY (meter, start_s, revision)
) WITHOUT ROWID;
CREATE INDEX interval_waiting ON interval (start_s) WHERE state = 0;
CREATE TABLE delivery (
    meter TEXT NOT NULL, start_s INTEGER NOT NULL, revision INTEGER NOT NULL, message BLOB NOT NULL,
    PRIMARY KEY (meter, start_s, revision)
) WITHOUT ROWID;
CREATE TABLE event (
    id INTEGER PRIMARY KEY, time_s INTEGER NOT NULL, meter TEXT NOT NULL, kind TEXT NOT NULL, detail TEXT NOT NULL
);
"""

# Version 1 forgot the boundary where counting started anew, and only knew until when it had sealed.
_FROM_VERSION_1: Final = """
ALTER TABLE meter ADD COLUMN boundary_set_s INTEGER;
ALTER TABLE meter ADD COLUMN unassigned_wh INTEGER NOT NULL DEFAULT 0;
UPDATE meter SET boundary_at_s = sealed_until_s, boundary_total_wh = anchor_total_mwh / 1000, boundary_quality = 2,
    boundary_before_s = sealed_until_s, boundary_after_s = sealed_until_s
    WHERE boundary_at_s IS NULL AND sealed_until_s > 0;
UPDATE meter SET boundary_set_s = 0 WHERE boundary_at_s IS NOT NULL;
ALTER TABLE meter DROP COLUMN sealed_until_s;
"""


class JournalError(Exception):
    """The journal cannot be used: `path`, and what to do."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """A sealed interval with its signed message, exactly as it is sent each time."""

    interval: SealedInterval
    revision: int
    message_id: bytes
    message: bytes


@dataclass(frozen=True, slots=True)
class IntervalRecord:
    """A sealed interval as it stands in the journal, for listings."""

    meter: str
    start_s: int
    end_s: int
    revision: int
    energy_wh: int
    quality: Quality
    state: OutboxState
    message: bytes
    receipt: bytes | None


@dataclass(frozen=True, slots=True)
class _Answer:
    """A receipt that is noted and not written yet."""

    meter: str
    start_s: int
    revision: int
    state: OutboxState
    receipt: bytes


class Journal:
    """The journal in one folder. Used by one thread at a time; only one Journal can write to a folder at a time."""

    def __init__(self, data_dir: Path, keep_days: int) -> None:
        """Open or create it. Raises JournalError."""
        self.path = data_dir / FILE_NAME
        self._keep_s = keep_days * 86_400
        self._answers: list[_Answer] = []
        self._deliveries: list[tuple[str, int, int, bytes]] = []
        self._events: list[tuple[int, str, str, str]] = []
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            # Held until the process ends, however it ends.
            self._lock = (data_dir / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JournalError(self.path, "another agent runs with this data_dir; give each its own") from error
        except OSError as error:
            raise JournalError(self.path, f"{error.strerror}; check `data_dir` and its permissions") from error
        with self._errors_named():
            self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            self._open()

    def _open(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA cache_size = -512")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version in (0, 1):
            with self._transaction():
                for statement in (_SCHEMA if version == 0 else _FROM_VERSION_1).split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        elif version != SCHEMA_VERSION:
            raise JournalError(self.path, _other_schema(version))

    @contextlib.contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise JournalError(self.path, f"{error}; is the disk full, read-only or failing?") from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors_named():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except sqlite3.Error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Write what is noted, and close the file. Raises JournalError."""
        try:
            self.flush()
        finally:
            self._db.close()
            self._lock.close()

    def load(self, meter: str) -> MeterState:
        """The state that the meter's last sealed interval left; an empty one for a new meter."""
        with self._errors_named():
            row = self._db.execute("SELECT * FROM meter WHERE name = ?", (meter,)).fetchone()
        if row is None:
            return MeterState()
        _, *counters, at_s, total_wh, quality, before_s, after_s, set_s, unassigned_wh = row
        time_us, raw_mwh, total_mwh, serial_number = counters
        boundary = Boundary(at_s, total_wh, Quality(quality), before_s, after_s, set_s) if at_s is not None else None
        # The monotonic clock of before the restart says nothing to us.
        return MeterState(Anchor(time_us, None, raw_mwh, total_mwh, serial_number), boundary, unassigned_wh)

    def seal(self, meter: str, state: MeterState, rows: Iterable[OutboxRow]) -> None:
        """Commit the meter's counters together with the intervals that were sealed from them, and everything noted."""
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO meter VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", _row(meter, state)
            )
            self._db.executemany(
                "INSERT INTO interval VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0, NULL)",
                [
                    (
                        meter,
                        row.interval.start_s,
                        row.revision,
                        row.interval.end_s,
                        row.interval.energy_wh,
                        int(row.interval.quality),
                        row.message_id,
                        row.message,
                    )
                    for row in rows
                ],
            )
            if state.boundary is not None:
                self._forget_old(meter, state.boundary.at_s)
            self._write_notes()
        self._clear_notes()

    def note_answer(self, meter: str, start_s: int, revision: int, state: OutboxState, receipt: bytes) -> None:
        """The broker's receipt for an interval has come; `receipt` is its signed bytes."""
        self._answers.append(_Answer(meter, start_s, revision, state, receipt))
        self._flush_if_full()

    def note_delivery(self, meter: str, start_s: int, revision: int, message: bytes) -> None:
        """What a demand got; a later delivery for the same interval takes its place."""
        self._deliveries.append((meter, start_s, revision, message))
        self._flush_if_full()

    def note_event(self, time_s: int, meter: str, kind: str, detail: str) -> None:
        """Something that an operator should know."""
        self._events.append((time_s, meter, kind, detail))
        self._flush_if_full()

    @property
    def notes(self) -> int:
        """How much is noted and not written yet."""
        return len(self._answers) + len(self._deliveries) + len(self._events)

    def flush(self) -> None:
        """Write what is noted, in a transaction of its own."""
        if self.notes:
            with self._transaction():
                self._write_notes()
            self._clear_notes()

    def waiting_count(self, meter: str) -> int:
        """Intervals of the meter without a receipt, as far as written."""
        with self._errors_named():
            row = self._db.execute("SELECT count(*) FROM interval WHERE state = 0 AND meter = ?", (meter,)).fetchone()
        count: int = row[0]
        return count

    def waiting(self, meters: Sequence[str], limit: int) -> list[WaitingMessage]:
        """Messages of these meters without a receipt, oldest intervals first, everything noted taken into account."""
        self.flush()
        places = ", ".join("?" * len(meters))
        with self._errors_named():
            rows = self._db.execute(
                "SELECT meter, start_s, revision, message_id, message FROM interval "
                f"WHERE state = 0 AND meter IN ({places}) ORDER BY start_s LIMIT ?",
                (*meters, limit),
            ).fetchall()
        return [WaitingMessage(*row) for row in rows]

    def accepted_demands(self, meters: Sequence[str], since_s: int, limit: int) -> list[AcceptedDemand]:
        """Accepted intervals of these meters that begin then or later, newest first, with what is known of each.

        Everything noted is taken into account.
        """
        self.flush()
        places = ", ".join("?" * len(meters))
        with self._errors_named():
            rows = self._db.execute(
                "SELECT meter, start_s, revision, message_id, message, receipt, (SELECT message FROM delivery WHERE"
                " delivery.meter = interval.meter AND delivery.start_s = interval.start_s AND delivery.revision >="
                " interval.revision ORDER BY delivery.revision DESC LIMIT 1) FROM interval"
                f" WHERE meter IN ({places}) AND start_s >= ? AND state = ? ORDER BY start_s DESC LIMIT ?",
                (*meters, since_s, int(OutboxState.ACCEPTED), limit),
            ).fetchall()
        return [
            AcceptedDemand(
                WaitingMessage(*message),
                Receipt.from_payload(parse(receipt).payload),
                Delivery.from_payload(parse(delivery).payload) if delivery is not None else None,
            )
            for *message, receipt, delivery in rows
            if receipt is not None
        ]

    def retry_refused(self) -> bool:
        """Make every refused interval wait again, in a transaction of its own. False if there is none.

        A refusal often ends by itself, for example when the operator registers the meter; then nothing must be lost.
        """
        self.flush()
        with self._errors_named():
            if self._db.execute("SELECT 1 FROM interval WHERE state = 2 LIMIT 1").fetchone() is None:
                return False
        with self._transaction():
            self._db.execute("UPDATE interval SET state = 0, receipt = NULL WHERE state = 2")
        return True

    def send_again(self, since_s: int) -> int:
        """Make every accepted interval that begins then or later wait again; returns how many.

        For a broker that has lost its database: it gives the same answer to what it still has.
        """
        self.flush()
        with self._transaction():
            return self._db.execute(
                "UPDATE interval SET state = 0, receipt = NULL WHERE state = 1 AND start_s >= ?", (since_s,)
            ).rowcount

    def _flush_if_full(self) -> None:
        if self.notes >= MAX_NOTES:
            self.flush()

    def _write_notes(self) -> None:
        # Only a waiting interval takes an answer: the first one counts.
        self._db.executemany(
            "UPDATE interval SET state = ?, receipt = ? WHERE meter = ? AND start_s = ? AND revision = ? AND state = 0",
            [(int(a.state), a.receipt, a.meter, a.start_s, a.revision) for a in self._answers],
        )
        self._db.executemany("INSERT OR REPLACE INTO delivery VALUES (?, ?, ?, ?)", self._deliveries)
        if self._events:
            self._db.executemany("INSERT INTO event (time_s, meter, kind, detail) VALUES (?, ?, ?, ?)", self._events)
            self._db.execute("DELETE FROM event WHERE id <= (SELECT max(id) FROM event) - ?", (MAX_EVENTS,))

    def _clear_notes(self) -> None:
        self._answers.clear()
        self._deliveries.clear()
        self._events.clear()

    def _forget_old(self, meter: str, now_s: int) -> None:
        accepted_before_s = now_s - self._keep_s
        refused_before_s = now_s - REFUSED_KEEP_FACTOR * self._keep_s
        self._db.execute(
            "DELETE FROM interval WHERE meter = ? AND start_s < ? AND state = ?",
            (meter, accepted_before_s, int(OutboxState.ACCEPTED)),
        )
        self._db.execute(
            "DELETE FROM interval WHERE meter = ? AND start_s < ? AND state > ?",
            (meter, refused_before_s, int(OutboxState.ACCEPTED)),
        )
        self._db.execute("DELETE FROM delivery WHERE meter = ? AND start_s < ?", (meter, accepted_before_s))


class JournalView:
    """Reads a journal, also while an agent writes it; what that agent has noted and not yet written is not seen."""

    def __init__(self, data_dir: Path) -> None:
        """Raises JournalError if there is no journal."""
        path = data_dir / FILE_NAME
        try:
            self._db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
            self._db.execute("SELECT 1 FROM meter LIMIT 1")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
        except sqlite3.Error as error:
            raise JournalError(path, f"{error}; has the agent run with this `data_dir` yet?") from error
        if version != SCHEMA_VERSION:
            self._db.close()
            raise JournalError(path, _other_schema(version))

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def waiting(self, meter: str) -> tuple[int, int | None]:
        """How many of the meter's intervals have no receipt yet, and the start of the oldest of them."""
        row: tuple[int, int | None] = self._db.execute(
            "SELECT count(*), min(start_s) FROM interval WHERE state = 0 AND meter = ?", (meter,)
        ).fetchone()
        return row

    def last_counted(self, meter: str) -> tuple[int, int] | None:
        """When the billed register was read for the last sealed interval, in s, and what it showed, in mWh."""
        row = self._db.execute(
            "SELECT anchor_time_us / 1000000, anchor_raw_mwh FROM meter WHERE name = ?", (meter,)
        ).fetchone()
        return None if row is None else (row[0], row[1])

    def intervals(self, meter: str, limit: int) -> list[IntervalRecord]:
        """The meter's newest intervals, newest first."""
        rows = self._db.execute(
            "SELECT meter, start_s, end_s, revision, energy_wh, quality, state, message, receipt FROM interval "
            "WHERE meter = ? ORDER BY start_s DESC, revision DESC LIMIT ?",
            (meter, limit),
        )
        return [
            IntervalRecord(
                name, start_s, end_s, revision, energy_wh, Quality(quality), OutboxState(state), message, receipt
            )
            for name, start_s, end_s, revision, energy_wh, quality, state, message, receipt in rows
        ]

    def deliveries(self, meter: str, limit: int) -> list[bytes]:
        """The signed delivery messages of the meter's newest intervals, newest first."""
        rows = self._db.execute(
            "SELECT message FROM delivery WHERE meter = ? ORDER BY start_s DESC, revision DESC LIMIT ?", (meter, limit)
        )
        return [row[0] for row in rows]

    def events(self, limit: int) -> list[tuple[int, str, str, str]]:
        """The newest events as (time_s, meter, kind, detail), newest first."""
        rows = self._db.execute("SELECT time_s, meter, kind, detail FROM event ORDER BY id DESC LIMIT ?", (limit,))
        return rows.fetchall()


def _row(meter: str, state: MeterState) -> tuple[str | int | None, ...]:
    """The meter's row in the table `meter`. The suspect and its fault are not kept: a restart looks again."""
    anchor, boundary = state.anchor, state.boundary
    if anchor is None:
        raise ValueError("a meter without a sample has nothing to keep")
    base = (
        (
            boundary.at_s,
            boundary.total_wh,
            int(boundary.quality),
            boundary.before_s,
            boundary.after_s,
            boundary.set_s,
        )
        if boundary is not None
        else (None,) * 6
    )
    counters = (anchor.time_us, anchor.raw_mwh, anchor.total_mwh, anchor.serial_number)
    return (meter, *counters, *base, state.unassigned_wh)


def _other_schema(version: int) -> str:
    return (
        f"is of schema {version}, written by another version of the agent, and this one works with schema"
        f" {SCHEMA_VERSION}; run the version that wrote it, because intervals that are not sent yet stand in it"
    )
