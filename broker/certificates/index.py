"""Where on a ledger stands what certificates are made of: an index beside the broker's database, in a file of its own.

Made from the blocks alone, and only ever of those that came since, so a certificate costs what is in it and not what
is on the ledger. It holds a row for each statement, reading and close, and one for each run of deliveries in a batch: a
broker sorts those by pseudonym, so the first and the last one of a run say whether it can hold a given one.

It may be removed at any time and is made anew then. Whatever is found by it is proven before it is believed
(`gather`), and is compared with the ledger's state, so a wrong index makes no wrong certificate.
"""

import sqlite3
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Final, NamedTuple

from broker.ledger.operations import (
    Close,
    Correct,
    CorrectDemand,
    Deliver,
    Issue,
    OperationCode,
    decode_operation,
    operation_code,
)
from broker.ledger.proofs import ProvenOperation
from broker.ledger.store import Store
from broker.protocol.envelope import parse
from broker.protocol.messages import PSEUDONYM_BYTES, Batch, Block, Reading

_SCHEMA: Final = """
CREATE TABLE progress (only INTEGER PRIMARY KEY CHECK (only = 1), genesis BLOB NOT NULL, height INTEGER NOT NULL,
    block_id BLOB NOT NULL);
CREATE TABLE statement (leaf INTEGER PRIMARY KEY, height INTEGER NOT NULL, batch INTEGER NOT NULL,
    number INTEGER NOT NULL);
CREATE TABLE reading (start_s INTEGER NOT NULL, device TEXT NOT NULL, leaf INTEGER NOT NULL, height INTEGER NOT NULL,
    batch INTEGER NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (start_s, device, leaf)) WITHOUT ROWID;
CREATE TABLE closed (start_s INTEGER NOT NULL, leaf INTEGER NOT NULL, height INTEGER NOT NULL, batch INTEGER NOT NULL,
    number INTEGER NOT NULL, PRIMARY KEY (start_s, leaf)) WITHOUT ROWID;
CREATE TABLE delivered (start_s INTEGER NOT NULL, leaf INTEGER NOT NULL, height INTEGER NOT NULL,
    batch INTEGER NOT NULL, number INTEGER NOT NULL, count INTEGER NOT NULL, first BLOB NOT NULL, last BLOB NOT NULL,
    PRIMARY KEY (start_s, leaf)) WITHOUT ROWID;
"""
_TABLES: Final = ("progress", "statement", "reading", "closed", "delivered")
_VERSION: Final = 1
_BLOCKS_AT_ONCE: Final = 256
_LOCK_TIMEOUT_S: Final = 60.0

_STATEMENTS: Final = (OperationCode.REGISTER, OperationCode.ADMIT, OperationCode.ROTATE_KEY)
_READINGS: Final = (OperationCode.ISSUE, OperationCode.CORRECT)
_DELIVERIES: Final = (OperationCode.DELIVER, OperationCode.CORRECT_DEMAND)

_PSEUDONYM_AT: Final = 4
"""Where the pseudonym stands in a Deliver or CorrectDemand: behind [code, [ and the head of a byte string of 16."""

_START_AT: Final = _PSEUDONYM_AT + PSEUDONYM_BYTES
_FOUR_BYTES: Final = 0x1A
"""The head of an integer of four bytes (RFC 8949 section 3): that of every start from 2 January 1970 to 2106."""


class Place(NamedTuple):
    """So many `operations` of a block's batch from `number` on; `leaf` is the place of the first among all."""

    leaf: int
    height: int
    batch: int
    number: int
    operations: int = 1


class LedgerIndex:
    """The index in `file`, of the ledger whose genesis has this hash. Every method raises sqlite3.Error."""

    def __init__(self, file: Path, genesis: bytes) -> None:
        self._genesis = genesis
        self._height = 0
        self._db = sqlite3.connect(file, isolation_level=None, timeout=_LOCK_TIMEOUT_S)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")

    def close(self) -> None:
        self._db.close()

    def take_in(self, ledger: Store) -> None:
        """Take in the blocks of `ledger` that have come since; what is looked up then is of no later ones.

        A block takes as long as it takes to read; two processes may do this at a time, each takes its part.
        """
        self._height = ledger.height()
        while self._take_in_some(ledger):
            pass

    def statements(self) -> list[Place]:
        """Registrations, admissions and rotations of keys, in the order of the ledger."""
        found = self._db.execute(
            "SELECT leaf, height, batch, number FROM statement WHERE height <= ? ORDER BY leaf", (self._height,)
        )
        return [Place(*row) for row in found]

    def readings(self, device: str, start_s: int) -> list[Place]:
        """Issue and corrections of a device's interval."""
        found = self._db.execute(
            "SELECT leaf, height, batch, number FROM reading WHERE start_s = ? AND device = ? AND height <= ?"
            " ORDER BY leaf",
            (start_s, device, self._height),
        )
        return [Place(*row) for row in found]

    def closes(self, start_s: int) -> list[Place]:
        """All closes of an interval, of whatever broker."""
        found = self._db.execute(
            "SELECT leaf, height, batch, number FROM closed WHERE start_s = ? AND height <= ? ORDER BY leaf",
            (start_s, self._height),
        )
        return [Place(*row) for row in found]

    def deliveries(self, start_s: int, pseudonym: bytes) -> list[Place]:
        """Where deliveries to a demand, and corrections of it, may stand: `is_about` tells which operations are."""
        found = self._db.execute(
            "SELECT leaf, height, batch, number, count FROM delivered WHERE start_s = ? AND first <= ? AND last >= ?"
            " AND height <= ? ORDER BY leaf",
            (start_s, pseudonym, pseudonym, self._height),
        )
        return [Place(*row) for row in found]

    # --- inside

    def _take_in_some(self, ledger: Store) -> bool:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            before = self._progress(ledger)
            height = before
            for height, block_id, raw in islice(ledger.blocks(before + 1), _BLOCKS_AT_ONCE):
                self._take_in_block(height, Block.from_payload(parse(raw).payload))
                progress = self._genesis, height, block_id
            if height > before:
                self._db.execute("INSERT OR REPLACE INTO progress VALUES (1, ?, ?, ?)", progress)
            self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        return height > before

    def _progress(self, ledger: Store) -> int:
        """The height up to which this ledger is taken in; an index of another one is emptied."""
        if self._db.execute("PRAGMA user_version").fetchone()[0] == _VERSION:
            row = self._db.execute("SELECT genesis, height, block_id FROM progress").fetchone()
            if row is None:
                return 0
            genesis, height, block_id = row
            known = [found for _, found, _ in ledger.blocks(height, height)]
            # A copy that ends earlier cannot contradict it.
            if genesis == self._genesis and known in ([], [block_id]):
                return int(height)
        for table in _TABLES:
            self._db.execute(f"DROP TABLE IF EXISTS {table}")
        for sentence in _SCHEMA.split(";")[:-1]:
            self._db.execute(sentence)
        self._db.execute(f"PRAGMA user_version={_VERSION}")
        return 0

    def _take_in_block(self, height: int, block: Block) -> None:
        batches = [Batch.from_payload(parse(batch).payload).operations for batch in block.batches]
        leaf = block.tree_size - sum(map(len, batches))
        statements, readings, closes, deliveries = [], [], [], []
        for at, operations in enumerate(batches):
            for number, raw in enumerate(operations):
                code = operation_code(raw)
                place = leaf + number, height, at, number
                if code in _STATEMENTS:
                    statements.append(place)
                elif code in _READINGS:
                    reading = reading_of(raw)
                    readings.append((reading.start_s, reading.meter, *place))
                elif code == OperationCode.CLOSE:
                    close = decode_operation(raw)
                    assert isinstance(close, Close)
                    closes.append((close.start_s, *place))
            deliveries += _runs(operations, leaf, height, at)
            leaf += len(operations)
        self._db.executemany("INSERT INTO statement VALUES (?, ?, ?, ?)", statements)
        self._db.executemany("INSERT INTO reading VALUES (?, ?, ?, ?, ?, ?)", readings)
        self._db.executemany("INSERT INTO closed VALUES (?, ?, ?, ?, ?)", closes)
        self._db.executemany("INSERT INTO delivered VALUES (?, ?, ?, ?, ?, ?, ?, ?)", deliveries)


class Operations:
    """Operations of a ledger's blocks by their places; the block that was read last is kept."""

    def __init__(self, ledger: Store) -> None:
        self._ledger = ledger
        self._height = 0
        self._batches: tuple[bytes, ...] = ()
        self._batch = -1
        self._operations: tuple[bytes, ...] = ()

    def at(self, places: Iterable[Place]) -> Iterator[ProvenOperation]:
        """The operations at these places. Raises LookupError for a place that is none, ProtocolError for a block."""
        for place in places:
            if place.height != self._height:
                raw = self._ledger.block(place.height)
                if raw is None:
                    raise LookupError(f"block {place.height} is not stored here")
                self._batches = Block.from_payload(parse(raw).payload).batches
                self._height, self._batch = place.height, -1
            if place.batch != self._batch:
                self._operations = Batch.from_payload(parse(self._batches[place.batch]).payload).operations
                self._batch = place.batch
            for number in range(place.operations):
                yield ProvenOperation(place.leaf + number, self._operations[place.number + number])


def is_about(operation: bytes, pseudonym: bytes) -> bool:
    """True of an encoded Deliver or CorrectDemand of the demand behind this pseudonym."""
    return operation[_PSEUDONYM_AT:_START_AT] == pseudonym


def reading_of(operation: bytes) -> Reading:
    """The reading inside an encoded Issue or Correct."""
    decoded = decode_operation(operation)
    assert isinstance(decoded, Issue | Correct)
    return Reading.from_payload(parse(decoded.statement).payload)


def _runs(operations: tuple[bytes, ...], leaf: int, height: int, batch: int) -> list[tuple[int | bytes, ...]]:
    """Rows of the runs of deliveries to one interval in a batch."""
    starts = [_start_of(raw) if operation_code(raw) in _DELIVERIES else None for raw in operations]
    rows: list[tuple[int | bytes, ...]] = []
    number = 0
    for start_s, same in groupby(starts):
        count = len(list(same))
        if start_s is not None:
            names = [raw[_PSEUDONYM_AT:_START_AT] for raw in operations[number : number + count]]
            rows.append((start_s, leaf + number, height, batch, number, count, min(names), max(names)))
        number += count
    return rows


def _start_of(raw: bytes) -> int:
    """The interval of an encoded Deliver or CorrectDemand."""
    if raw[_START_AT] == _FOUR_BYTES:
        return int.from_bytes(raw[_START_AT + 1 : _START_AT + 5], "big")
    operation = decode_operation(raw)
    assert isinstance(operation, Deliver | CorrectDemand)
    return operation.start_s
