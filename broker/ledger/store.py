"""The ledger's SQLite file: state rows, blocks, the index of batches, Merkle nodes, the head. No rule is decided here.

Everything of one commit is written in one transaction, so the file always stands between two commits. Table `state`
holds one row per key (`WITHOUT ROWID`: the key is the tree, no second copy of it). Table `nodes` only grows: each row
holds the hashes of Merkle nodes from position `first` on, in the order in which the tree made them.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from broker.ledger.chain import Head
from broker.ledger.limits import CACHED_ROWS
from broker.ledger.state import SLICE, Key, Row, decode_key, decode_row, encode_key, scan_bounds
from broker.protocol.limits import MAX_INTEGER
from broker.protocol.messages import HASH_BYTES

FILE_NAME: Final = "ledger.sqlite3"
LOCK_NAME: Final = "ledger.lock"
FORMAT: Final = 2
SIGNED_HEAD: Final = "signed_head"
"""The row of `meta` with the head as a validator signed it (`receipts.SignedHead`); a copy without a key has none."""
NETWORK: Final = "network"
"""The row of `meta` in which a node of a network keeps where the network stands; no operation makes it."""

STALE: Final = b""
"""Stands for the digest of a bucket whose rows have changed since it was hashed."""

SEALERS: Final = "sealers"
"""CBOR [[name, COSE_Key] …]: under which keys, besides validators', a network's node has sealed the blocks here."""

BASE: Final = "base"
"""The row of `meta` in a restored ledger: SHA-256 of the manifest of the snapshot that it began with."""

_KEYS_PER_READ: Final = 500  # well under SQLite's limit of bound parameters

_SCHEMA: Final = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE state (key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE blocks (height INTEGER PRIMARY KEY, block_id BLOB NOT NULL, raw BLOB NOT NULL);
CREATE TABLE batches (batch_id BLOB PRIMARY KEY, height INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE nodes (first INTEGER PRIMARY KEY, hashes BLOB NOT NULL);
CREATE TABLE buckets (bucket BLOB PRIMARY KEY, digest BLOB NOT NULL) WITHOUT ROWID;
"""


class LedgerError(Exception):
    """A ledger directory that cannot be used as it is. `path` names it, the text says what to do."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


def other_format(written: bytes | None) -> str:
    """Why a ledger whose row `format` holds `written` is not used, and what to do."""
    found = "no format that is known here" if written is None or len(written) != 1 else f"format {written[0]}"
    return (
        f"it has {found}, and this program reads format {FORMAT} only; use the version of the program that wrote it,"
        " or a copy in this format"
    )


class Store:
    """One open ledger file. Reads go through a bounded cache, which only ever holds committed rows."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection
        # Two generations: rows in use move to the young one, and the old one is dropped when the young is full.
        self._young: dict[Key, Any] = {}
        self._old: dict[Key, Any] = {}

    @classmethod
    def create(cls, file: Path, genesis: bytes, head: Head, durable: bool = True) -> "Store":
        """Make a new ledger file; one that is not durable is for scratch only. Raises sqlite3.Error."""
        store = cls.open(file, durable)
        store._db.execute("BEGIN IMMEDIATE")
        for statement in _SCHEMA.split(";")[:-1]:
            store._db.execute(statement)
        meta = (("format", bytes((FORMAT,))), ("genesis", genesis), ("head", head.to_bytes()))
        store._db.executemany("INSERT INTO meta VALUES (?, ?)", meta)
        store._db.execute("COMMIT")
        return store

    @classmethod
    def open(cls, file: Path, durable: bool = True) -> "Store":
        """Open a ledger file for writing. Raises sqlite3.Error."""
        return cls(_connect(file, durable))

    @classmethod
    def open_read_only(cls, file: Path) -> "Store":
        """Open a ledger file for reading, also while an engine writes it. Raises sqlite3.Error.

        Raises LedgerError if another version of this program wrote it, before anything is taken for damage.
        """
        store = cls(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None))
        try:
            written = store.meta("format") if store.has_schema() else None
            if written is not None and len(written) == 1 and written[0] != FORMAT:
                raise LedgerError(file.parent, other_format(written))
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        self._db.close()

    # --- state, as the rules read it

    def get(self, key: Key) -> Any:
        """The committed row under `key`, None if there is none."""
        if key in self._young:
            return self._young[key]
        if key in self._old:
            row = self._old[key]
        else:
            found = self._db.execute("SELECT value FROM state WHERE key = ?", (encode_key(key),)).fetchone()
            row = None if found is None else decode_row(key[0], found[0])
        self._remember(key, row)
        return row

    def scan(self, prefix: Key, low: int, high: int) -> Iterator[Key]:
        """The keys that begin with `prefix` and go on with an integer in [low, high), in the order of their bytes."""
        for (key,) in self._db.execute(
            "SELECT key FROM state WHERE key >= ? AND key < ? ORDER BY key", scan_bounds(prefix, low, high)
        ):
            yield decode_key(key)

    def prefetch(self, keys: list[Key]) -> None:
        """Read rows into the cache in one go, absent ones too."""
        for key, row in self.read([key for key in keys if key not in self._young and key not in self._old]).items():
            self._remember(key, row)

    def read(self, keys: Iterable[Key]) -> dict[Key, Any]:
        """The committed rows under `keys` past the cache. One statement costs a fifth of so many single reads."""
        wanted = {encode_key(key): key for key in keys}
        encoded = sorted(wanted)
        rows: dict[Key, Any] = {}
        for start in range(0, len(encoded), _KEYS_PER_READ):
            part = encoded[start : start + _KEYS_PER_READ]
            marks = ",".join("?" * len(part))
            found = dict(self._db.execute(f"SELECT key, value FROM state WHERE key IN ({marks})", part))
            for raw in part:
                key = wanted[raw]
                rows[key] = decode_row(key[0], found[raw]) if raw in found else None
        return rows

    def keys_between(self, first: bytes, end: bytes, most: int) -> list[Key]:
        """At most so many keys whose bytes lie in [first, end), ascending."""
        found = self._db.execute(
            "SELECT key FROM state WHERE key >= ? AND key < ? ORDER BY key LIMIT ?", (first, end, most)
        )
        return [decode_key(raw) for (raw,) in found]

    def _remember(self, key: Key, row: Any) -> None:
        if len(self._young) >= CACHED_ROWS:
            self._old, self._young = self._young, {}
        self._young[key] = row

    # --- a commit

    def write(
        self,
        rows: dict[bytes, bytes | None],
        cache: dict[Key, Row | None],
        blocks: list[tuple[int, bytes, bytes]],
        batches: list[tuple[bytes, int]],
        head: Head,
        nodes: list[tuple[int, bytes]],
        notes: Mapping[str, bytes] = MappingProxyType({}),
        buckets: Mapping[bytes, bytes | None] = MappingProxyType({}),
    ) -> None:
        """Write one commit durably, with `notes` among the named values beside it.

        `buckets` are digests of buckets (`rows_digest`): STALE where rows have changed since, None where none are left.
        Raises sqlite3.Error, and then neither file nor cache has changed.
        """
        put = sorted((key, value) for key, value in rows.items() if value is not None)
        gone = sorted((key,) for key, value in rows.items() if value is None)
        database = self._db
        database.execute("BEGIN IMMEDIATE")
        try:
            database.executemany(
                "INSERT INTO state VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", put
            )
            database.executemany("DELETE FROM state WHERE key = ?", gone)
            database.executemany("INSERT INTO blocks VALUES (?, ?, ?)", blocks)
            database.executemany("INSERT INTO batches VALUES (?, ?)", batches)
            database.executemany("INSERT INTO nodes VALUES (?, ?)", nodes)
            meta = {"head": head.to_bytes(), **notes}
            database.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", meta.items())
            if blocks and SIGNED_HEAD not in notes:
                # What was signed is a head before this one: no proof of this file may end in it.
                database.execute("DELETE FROM meta WHERE name = ?", (SIGNED_HEAD,))
            kept = [(bucket, digest) for bucket, digest in buckets.items() if digest is not None]
            database.executemany("INSERT OR REPLACE INTO buckets VALUES (?, ?)", kept)
            emptied = [(bucket,) for bucket, digest in buckets.items() if digest is None]
            database.executemany("DELETE FROM buckets WHERE bucket = ?", emptied)
            database.execute("COMMIT")
        except sqlite3.Error:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise
        for key, row in cache.items():
            self._old.pop(key, None)
            # Delivered slices are not read again by the rules and would only push out what is.
            if key[0] == SLICE:
                self._young.pop(key, None)
            else:
                self._remember(key, row)

    def put_buckets(self, digests: Mapping[bytes, bytes]) -> None:
        """Add the digests of all buckets to a file that has none. Raises sqlite3.Error."""
        self._db.execute("BEGIN IMMEDIATE")
        self._db.executemany("INSERT INTO buckets VALUES (?, ?)", digests.items())
        self._db.execute("COMMIT")

    # --- filling a new file from a snapshot

    def put_state(self, rows: Iterable[tuple[bytes, bytes]]) -> None:
        """Add (key, row); these `put_*` are transactions of their own. Raises sqlite3.Error, also for a key twice."""
        self._put("INSERT INTO state VALUES (?, ?)", rows)

    def put_batches(self, rows: Iterable[tuple[bytes, int]]) -> None:
        """Add (batch id, height)."""
        self._put("INSERT INTO batches VALUES (?, ?)", rows)

    def put_base(
        self, nodes: list[tuple[int, bytes]], block: tuple[int, bytes, bytes], signed_head: bytes | None, base: bytes
    ) -> None:
        """Add what makes the file whole: Merkle nodes, the last block, the signed head, and the row BASE."""
        self._put("INSERT INTO nodes VALUES (?, ?)", nodes)
        meta = [(BASE, base)] if signed_head is None else [(BASE, base), (SIGNED_HEAD, signed_head)]
        self._put("INSERT INTO meta VALUES (?, ?)", meta)
        self._put("INSERT INTO blocks VALUES (?, ?, ?)", [block])

    def _put(self, statement: str, rows: Iterable[Any]) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.executemany(statement, rows)
            self._db.execute("COMMIT")
        except sqlite3.Error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    # --- everything else that is stored

    def meta(self, name: str) -> bytes | None:
        found = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return None if found is None else found[0]

    def empty_log(self) -> None:
        """Move what stands in the write-ahead log into the file, as far as no reader still needs the log."""
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    def has_schema(self) -> bool:
        """False for a file whose making was cut short."""
        return self._db.execute("SELECT 1 FROM sqlite_schema WHERE name = 'meta'").fetchone() is not None

    def height(self) -> int:
        """The height of the highest stored block, 0 without any."""
        height: int | None = self._db.execute("SELECT max(height) FROM blocks").fetchone()[0]
        return height or 0

    def last_block(self) -> tuple[int, bytes, bytes] | None:
        """(height, block id, sealed block) of the highest block."""
        found: tuple[int, bytes, bytes] | None = self._db.execute(
            "SELECT height, block_id, raw FROM blocks ORDER BY height DESC LIMIT 1"
        ).fetchone()
        return found

    def block(self, height: int) -> bytes | None:
        """The sealed block of that height, None if there is none."""
        found = self._db.execute("SELECT raw FROM blocks WHERE height = ?", (height,)).fetchone()
        return None if found is None else found[0]

    def height_of(self, batch_id: bytes) -> int | None:
        """The height of the block that carries this batch, None if there is none."""
        found = self._db.execute("SELECT height FROM batches WHERE batch_id = ?", (batch_id,)).fetchone()
        return None if found is None else found[0]

    def height_of_block(self, block_id: bytes) -> int | None:
        """The height of the block with that id, None if there is none. It looks through all of them."""
        found = self._db.execute("SELECT height FROM blocks WHERE block_id = ?", (block_id,)).fetchone()
        return None if found is None else found[0]

    def blocks(self, from_height: int = 1, upto: int = MAX_INTEGER) -> Iterator[tuple[int, bytes, bytes]]:
        """(height, block id, sealed block) of the heights from `from_height` to `upto`, in ascending order."""
        return self._db.execute(
            "SELECT height, block_id, raw FROM blocks WHERE height >= ? AND height <= ? ORDER BY height",
            (from_height, upto),
        )

    def merkle_node(self, position: int) -> bytes:
        """The Merkle node at a position (`merkle.node_position`). Raises IndexError where none is stored."""
        found = self._db.execute(
            f"SELECT substr(hashes, (? - first) * {HASH_BYTES} + 1, {HASH_BYTES}) FROM nodes"
            " WHERE first <= ? ORDER BY first DESC LIMIT 1",
            (position, position),
        ).fetchone()
        if found is None or len(found[0]) != HASH_BYTES:
            raise IndexError(f"Merkle node {position} is not stored here")
        node: bytes = found[0]
        return node

    def node_rows(self, first: int = 0, end: int = MAX_INTEGER) -> Iterator[tuple[int, bytes]]:
        """(position of the first, hashes) of the rows that begin in [first, end), ascending; all by default."""
        return self._db.execute(
            "SELECT first, hashes FROM nodes WHERE first >= ? AND first < ? ORDER BY first", (first, end)
        )

    def node_rows_outside(self, end: int) -> list[int]:
        """Where rows of nodes begin that a tree with so many nodes cannot have; no more than a few of them."""
        found = self._db.execute("SELECT first FROM nodes WHERE first < 0 OR first >= ? ORDER BY first LIMIT 9", (end,))
        return [first for (first,) in found]

    def bucket_rows(self) -> Iterator[tuple[bytes, bytes]]:
        """(bucket, digest or STALE), ascending by bucket. Only nodes of a network keep them."""
        return self._db.execute("SELECT bucket, digest FROM buckets ORDER BY bucket")

    def state_rows(self, first: bytes = b"", end: bytes = b"\xff") -> Iterator[tuple[bytes, bytes]]:
        """The state rows with keys in [first, end) as bytes, ascending by key; all by default."""
        return self._db.execute("SELECT key, value FROM state WHERE key >= ? AND key < ? ORDER BY key", (first, end))

    def batch_rows(self) -> Iterator[tuple[bytes, int]]:
        """(batch id, height), ascending by id."""
        return self._db.execute("SELECT batch_id, height FROM batches ORDER BY batch_id")

    def counts(self) -> tuple[int, int]:
        """How many state rows and batches there are."""
        found: tuple[int, int] = self._db.execute(
            "SELECT (SELECT count(*) FROM state), (SELECT count(*) FROM batches)"
        ).fetchone()
        return found

    def meta_rows(self) -> Iterator[tuple[str, bytes]]:
        return self._db.execute("SELECT name, value FROM meta ORDER BY name")

    def schema(self) -> Iterator[tuple[str, str | None]]:
        """(type and name, SQL) of everything that the file declares, ascending."""
        return self._db.execute("SELECT type || ' ' || name AS declared, sql FROM sqlite_schema ORDER BY declared")

    def begin_reading(self) -> None:
        """What is read from now on is of one moment, that of the first read, though an engine goes on writing."""
        self._db.execute("BEGIN")

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """What is read inside is of one moment, though an engine goes on writing."""
        self.begin_reading()
        try:
            yield
        finally:
            self._db.execute("ROLLBACK")

    def integrity_faults(self) -> list[str]:
        """What SQLite itself finds wrong with the file; empty if nothing."""
        return [text for (text,) in self._db.execute("PRAGMA integrity_check(10)") if text != "ok"]


def _connect(file: Path, durable: bool) -> sqlite3.Connection:
    connection = sqlite3.connect(file, isolation_level=None)
    # A commit that was answered survives a power cut: every commit waits for the disk.
    connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA cache_size = -32768")
    return connection
