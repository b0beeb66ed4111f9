"""What a broker keeps, in one SQLite file: who it serves, what it accepted, what it decided, what it said and was told.

One group commit per turn of the event loop (WAL, `synchronous=FULL`); nothing is acknowledged or sent before it. Rows
that come every interval are keyed by the interval first, so that a turn writes to neighbouring pages. The command line
writes registrations into the same file while the broker runs; `changed_by_others` tells the broker to look again.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, NamedTuple

from broker.protocol import cbor
from broker.protocol.messages import MessageType

SCHEMA_VERSION: Final = 8

_SCHEMA: Final = """
CREATE TABLE consumer (
    meter TEXT PRIMARY KEY, cose_key BLOB NOT NULL, key_id BLOB NOT NULL UNIQUE, secret BLOB NOT NULL,
    registered_s INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE contract (
    meter TEXT NOT NULL, version INTEGER NOT NULL, valid_from_s INTEGER NOT NULL, contract BLOB NOT NULL,
    PRIMARY KEY (meter, version)
) WITHOUT ROWID;
CREATE TABLE device (
    device TEXT PRIMARY KEY, owner TEXT NOT NULL, cose_key BLOB NOT NULL, key_id BLOB NOT NULL UNIQUE,
    source INTEGER NOT NULL, capacity_w INTEGER NOT NULL, area TEXT NOT NULL, price INTEGER NOT NULL,
    from_s INTEGER NOT NULL, reserve_ppm INTEGER NOT NULL, exclusive_ppm INTEGER NOT NULL, exclusive_for BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE owner (device TEXT PRIMARY KEY, owner TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE statement (
    number INTEGER PRIMARY KEY, kind INTEGER NOT NULL, raw BLOB NOT NULL UNIQUE, state INTEGER NOT NULL, reason TEXT
);
CREATE TABLE message (
    start_s INTEGER NOT NULL, meter TEXT NOT NULL, kind INTEGER NOT NULL, revision INTEGER NOT NULL,
    message_id BLOB NOT NULL, raw BLOB NOT NULL, energy_wh INTEGER NOT NULL, pseudonym BLOB, commitment BLOB,
    delivered_wh INTEGER NOT NULL, quotas BLOB, refusal TEXT, open_until_s INTEGER,
    standing INTEGER NOT NULL, ledger_revision INTEGER NOT NULL,
    PRIMARY KEY (start_s, meter, kind, revision)
) WITHOUT ROWID;
CREATE INDEX message_open ON message (open_until_s) WHERE open_until_s IS NOT NULL;
CREATE INDEX message_waiting ON message (start_s) WHERE standing = 1;
CREATE TABLE conflict (
    number INTEGER PRIMARY KEY, meter TEXT NOT NULL, kind INTEGER NOT NULL, start_s INTEGER NOT NULL,
    revision INTEGER NOT NULL, message_id BLOB NOT NULL, raw BLOB NOT NULL, UNIQUE (message_id)
);
CREATE TABLE delivery (
    start_s INTEGER NOT NULL, meter TEXT NOT NULL, sequence INTEGER NOT NULL, line INTEGER NOT NULL,
    source INTEGER NOT NULL, device TEXT NOT NULL, asset_start_s INTEGER NOT NULL, asset_revision INTEGER NOT NULL,
    from_wh INTEGER NOT NULL, to_wh INTEGER NOT NULL, price INTEGER NOT NULL, through TEXT, batch INTEGER NOT NULL,
    PRIMARY KEY (start_s, meter, sequence)
) WITHOUT ROWID;
CREATE INDEX delivery_elsewhere ON delivery (asset_start_s, device) WHERE asset_start_s <> start_s;
CREATE TABLE unsure (device TEXT NOT NULL, start_s INTEGER NOT NULL, PRIMARY KEY (device, start_s)) WITHOUT ROWID;
CREATE TABLE untold (start_s INTEGER NOT NULL, meter TEXT NOT NULL, PRIMARY KEY (start_s, meter)) WITHOUT ROWID;
CREATE TABLE carried (device TEXT PRIMARY KEY, energy_wh INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE taken_back (
    number INTEGER PRIMARY KEY, start_s INTEGER NOT NULL, meter TEXT NOT NULL, device TEXT NOT NULL,
    asset_start_s INTEGER NOT NULL, asset_revision INTEGER NOT NULL, from_wh INTEGER NOT NULL, to_wh INTEGER NOT NULL,
    source INTEGER NOT NULL, price INTEGER NOT NULL, batch INTEGER NOT NULL
);
CREATE INDEX taken_back_interval ON taken_back (start_s);
CREATE TABLE withdrawn (
    asset_start_s INTEGER NOT NULL, device TEXT NOT NULL, asset_revision INTEGER NOT NULL, from_wh INTEGER NOT NULL,
    to_wh INTEGER NOT NULL, PRIMARY KEY (asset_start_s, device, asset_revision, from_wh)
) WITHOUT ROWID;
CREATE TABLE account (
    meter TEXT NOT NULL, period_start_s INTEGER NOT NULL, version INTEGER NOT NULL, total_wh INTEGER NOT NULL,
    by_line BLOB NOT NULL, PRIMARY KEY (meter, period_start_s, version)
) WITHOUT ROWID;
CREATE TABLE interval (
    start_s INTEGER PRIMARY KEY, state INTEGER NOT NULL, close_revision INTEGER NOT NULL,
    late INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX interval_late ON interval (start_s) WHERE late;
CREATE TABLE batch (
    number INTEGER PRIMARY KEY, batch_id BLOB NOT NULL UNIQUE, kind INTEGER NOT NULL, start_s INTEGER NOT NULL,
    raw BLOB NOT NULL, state INTEGER NOT NULL, height INTEGER, reason TEXT
);
CREATE INDEX batch_waiting ON batch (state) WHERE state = 0;
CREATE TABLE order_out (
    order_id BLOB PRIMARY KEY, start_s INTEGER NOT NULL, neighbour TEXT NOT NULL, source INTEGER NOT NULL,
    energy_wh INTEGER NOT NULL, raw BLOB NOT NULL, state TEXT NOT NULL, seen_wh INTEGER NOT NULL,
    answered_wh INTEGER, answer_status INTEGER, round INTEGER, parent_requester TEXT, parent BLOB, reason TEXT
) WITHOUT ROWID;
CREATE INDEX order_out_interval ON order_out (start_s);
CREATE INDEX order_out_open ON order_out (start_s) WHERE state IN ('asked', 'passed_on', 'coming');
CREATE INDEX order_out_parent ON order_out (parent) WHERE parent IS NOT NULL;
CREATE TABLE order_in (
    requester TEXT NOT NULL, order_id BLOB NOT NULL, start_s INTEGER NOT NULL, source INTEGER NOT NULL,
    energy_wh INTEGER NOT NULL, highest_price INTEGER NOT NULL, raw BLOB NOT NULL, state TEXT NOT NULL,
    granted_wh INTEGER NOT NULL, answer BLOB, round INTEGER, path_length INTEGER NOT NULL,
    PRIMARY KEY (requester, order_id)
) WITHOUT ROWID;
CREATE INDEX order_in_interval ON order_in (start_s);
CREATE INDEX order_in_state ON order_in (start_s) WHERE state IN ('received', 'passed_on');
CREATE TABLE partner (name TEXT PRIMARY KEY, record BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE transfer (
    number INTEGER PRIMARY KEY, flow INTEGER NOT NULL, party TEXT NOT NULL, device TEXT NOT NULL,
    asset_start_s INTEGER NOT NULL, asset_revision INTEGER NOT NULL, from_wh INTEGER NOT NULL, to_wh INTEGER NOT NULL,
    source INTEGER NOT NULL, price INTEGER NOT NULL, order_id BLOB NOT NULL,
    UNIQUE (asset_start_s, device, asset_revision, from_wh, flow, order_id)
);
CREATE TABLE ledger_cursor (only INTEGER PRIMARY KEY CHECK (only = 1), height INTEGER NOT NULL, block_id BLOB NOT NULL);
CREATE TABLE announcement (topic TEXT PRIMARY KEY, raw BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE heard (
    start_s INTEGER NOT NULL, kind INTEGER NOT NULL, broker TEXT NOT NULL, payload BLOB NOT NULL,
    PRIMARY KEY (start_s, kind, broker)
) WITHOUT ROWID;
CREATE TABLE history (
    start_s INTEGER NOT NULL, kind INTEGER NOT NULL, target INTEGER NOT NULL, energy_uwh INTEGER NOT NULL,
    PRIMARY KEY (start_s, kind, target)
) WITHOUT ROWID;
CREATE TABLE expected (
    kind INTEGER NOT NULL, target INTEGER NOT NULL, day_s INTEGER NOT NULL, energies_wh BLOB NOT NULL,
    PRIMARY KEY (day_s, kind, target)
) WITHOUT ROWID;
CREATE TABLE hint_wish (meter TEXT PRIMARY KEY, hinted_s INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX hint_wish_due ON hint_wish (hinted_s);
"""

_TRANSFER_COLUMNS: Final = "flow, party, device, asset_start_s, asset_revision, from_wh, to_wh, source, price, order_id"
_PAID: Final = (
    "SELECT price FROM transfer WHERE asset_start_s = {0}.asset_start_s AND device = {0}.device"
    " AND asset_revision = {0}.asset_revision AND from_wh <= {0}.from_wh AND to_wh > {0}.from_wh AND flow IN (0, 1){1}"
    " ORDER BY number DESC LIMIT 1"
)
"""The price at which the first Wh of a range last came here; a slice of stock has one price throughout."""


class StoreError(Exception):
    """The broker's database cannot be used. The text says what to do."""


class WorkState(IntEnum):
    """Life of a batch or statement on its way to the ledger."""

    WAITING = 0
    COMMITTED = 1
    REFUSED = 2


class BatchKind(IntEnum):
    """What a batch was made for; tells what its result changes."""

    STATEMENTS = 0
    PROVIDE = 1
    DELIVER = 2
    SUPPLY = 3
    CLOSE = 4
    CORRECT_DEMAND = 5
    CORRECT = 6
    TAKE_OVER = 7
    VOID = 8


class Standing(IntEnum):
    """Which revision of a demand counts: the CURRENT one, until a WAITING one has been put into effect.

    A reading's later revision is a difference to the one before: it waits until the ledger has it.
    """

    CURRENT = 0
    WAITING = 1
    SUPERSEDED = 2


_STANDINGS: Final = tuple(Standing)


class IntervalState(IntEnum):
    """OPEN until gate 1, CLEARED until gate 2, then CLOSED."""

    OPEN = 0
    CLEARED = 1
    CLOSED = 2


@dataclass(frozen=True, slots=True)
class ConsumerRow:
    meter: str
    cose_key: bytes
    key_id: bytes
    secret: bytes
    registered_s: int


@dataclass(frozen=True, slots=True)
class ContractRow:
    version: int
    valid_from_s: int
    contract: bytes


@dataclass(frozen=True, slots=True)
class DeviceRow:
    device: str
    owner: str
    cose_key: bytes
    key_id: bytes
    source: int
    capacity_w: int
    area: str
    price: int
    from_s: int
    reserve_ppm: int = 0
    exclusive_ppm: int = 0
    exclusive_for: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StatementRow:
    number: int
    kind: int
    raw: bytes
    state: WorkState
    reason: str | None


class MessageRow(NamedTuple):
    """An accepted reading or demand. Pseudonym and commitment are a demand's; `quotas` is set while it is short.

    `open_until_s` is the end of the window of a demand that is short although its own interval is closed. `revision` is
    the meter's own count, `ledger_revision` how often the ledger has seen the demand corrected.
    """

    start_s: int
    meter: str
    kind: int
    revision: int
    message_id: bytes
    raw: bytes
    energy_wh: int
    pseudonym: bytes | None
    commitment: bytes | None
    delivered_wh: int
    quotas: tuple[int, ...] | None
    refusal: str | None
    open_until_s: int | None = None
    standing: Standing = Standing.CURRENT
    ledger_revision: int = 0


class DeliveryRow(NamedTuple):
    """One slice that a demand got: from which device, through which neighbour (None: own stock), in which batch."""

    start_s: int
    meter: str
    sequence: int
    line: int
    source: int
    device: str
    asset_start_s: int
    asset_revision: int
    from_wh: int
    to_wh: int
    price: int
    through: str | None
    batch: int


class AccountRow(NamedTuple):
    meter: str
    period_start_s: int
    version: int
    total_wh: int
    by_line: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BatchRow:
    number: int
    batch_id: bytes
    kind: BatchKind
    start_s: int
    raw: bytes
    state: WorkState
    height: int | None = None
    reason: str | None = None


class OrderOutRow(NamedTuple):
    """An order to a neighbour. `round_number` is None outside the rounds; an order that is passed on has a parent."""

    order_id: bytes
    start_s: int
    neighbour: str
    source: int
    energy_wh: int
    raw: bytes
    state: str
    seen_wh: int
    answered_wh: int | None
    answer_status: int | None
    round_number: int | None
    parent_requester: str | None
    parent: bytes | None


class OrderInRow(NamedTuple):
    """A neighbour's order. Ids are the requester's own, so they identify only together with its name."""

    requester: str
    order_id: bytes
    start_s: int
    source: int
    energy_wh: int
    highest_price: int
    raw: bytes
    state: str
    granted_wh: int
    answer: bytes | None
    round_number: int | None
    path_length: int


class TransferRow(NamedTuple):
    """A range of an asset that came to or left this broker by a transfer on the ledger.

    `party` is the provider or neighbour on the other side; `order_id` is empty where a provider gave it.
    """

    flow: int
    party: str
    device: str
    asset_start_s: int
    asset_revision: int
    from_wh: int
    to_wh: int
    source: int
    price: int
    order_id: bytes = b""


class SettledRow(NamedTuple):
    """A range that was passed on, and what it had cost: the price of the transfer by which it last came here.

    `start_s` is a delivery's demand or the asset's interval. `paid` is None if it never came here.
    """

    party: str
    start_s: int
    device: str
    asset_start_s: int
    source: int
    price: int
    energy_wh: int
    paid: int | None


class BrokerStore:
    """The broker's database. Not thread-safe; writes join the open transaction until `commit`."""

    def __init__(self, path: Path) -> None:
        """Open or create. Raises StoreError if the file is of another version or not ours."""
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(path, isolation_level=None, cached_statements=256, timeout=10.0)
        except sqlite3.Error as error:
            raise StoreError(f"{path}: {error}; check that it is a file that this user may write") from error
        try:
            path.chmod(0o600)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA busy_timeout=10000")
            self._db.execute("PRAGMA cache_size=-65536")
            self._db.execute("BEGIN IMMEDIATE")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for sentence in _SCHEMA.split(";\n"):
                    if sentence.strip():
                        self._db.execute(sentence)
                self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            self._db.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise StoreError(f"{path}: {error}; move the file away or restore it from a backup") from error
        if version not in (0, SCHEMA_VERSION):
            self._db.close()
            raise StoreError(
                f"{path} is of schema {version}, written by another version of this program, and this one reads schema"
                f" {SCHEMA_VERSION} only; run the version that wrote it, or give this one an empty data_dir"
            )
        self._data_version = self._read_data_version()

    def close(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        self._db.close()

    def begin(self) -> None:
        """Open the turn's transaction if it is not open."""
        if not self._db.in_transaction:
            self._db.execute("BEGIN IMMEDIATE")

    def begin_reading(self) -> None:
        """Read all up to `commit` from one moment; nobody else is held up."""
        self._db.execute("BEGIN")

    def commit(self) -> None:
        """Make everything since `begin` durable."""
        if self._db.in_transaction:
            self._db.execute("COMMIT")

    def changed_by_others(self) -> bool:
        """True once after another process (the command line) has written. Call outside a transaction."""
        version = self._read_data_version()
        changed = version != self._data_version
        self._data_version = version
        return changed

    def _read_data_version(self) -> int:
        version: int = self._db.execute("PRAGMA data_version").fetchone()[0]
        return version

    # Consumers, contracts, devices, statements

    def add_consumer(self, row: ConsumerRow) -> None:
        """Raises StoreError if the meter or its key is registered already."""
        try:
            self._db.execute(
                "INSERT INTO consumer VALUES (?, ?, ?, ?, ?)",
                (row.meter, row.cose_key, row.key_id, row.secret, row.registered_s),
            )
        except sqlite3.IntegrityError as error:
            raise StoreError(f"meter {row.meter} or its key is registered already") from error

    def consumer(self, meter: str) -> ConsumerRow | None:
        row = self._db.execute("SELECT * FROM consumer WHERE meter = ?", (meter,)).fetchone()
        return ConsumerRow(*row) if row else None

    def consumer_by_key(self, key_id: bytes) -> ConsumerRow | None:
        row = self._db.execute("SELECT * FROM consumer WHERE key_id = ?", (key_id,)).fetchone()
        return ConsumerRow(*row) if row else None

    def consumers(self) -> Iterator[ConsumerRow]:
        return (ConsumerRow(*row) for row in self._db.execute("SELECT * FROM consumer ORDER BY meter"))

    def add_contract(self, meter: str, row: ContractRow) -> None:
        self._db.execute(
            "INSERT INTO contract VALUES (?, ?, ?, ?)", (meter, row.version, row.valid_from_s, row.contract)
        )

    def contracts(self, meter: str) -> list[ContractRow]:
        """All versions of a meter's contract, oldest first."""
        rows = self._db.execute(
            "SELECT version, valid_from_s, contract FROM contract WHERE meter = ? ORDER BY version", (meter,)
        )
        return [ContractRow(*row) for row in rows]

    def add_device(self, row: DeviceRow) -> None:
        """Raises StoreError if the device or its meter key is registered already."""
        try:
            self._db.execute(
                "INSERT INTO device VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    row.device,
                    row.owner,
                    row.cose_key,
                    row.key_id,
                    row.source,
                    row.capacity_w,
                    row.area,
                    row.price,
                    row.from_s,
                    row.reserve_ppm,
                    row.exclusive_ppm,
                    cbor.encode(list(row.exclusive_for)),
                ),
            )
        except sqlite3.IntegrityError as error:
            raise StoreError(f"device {row.device} or its meter key is registered already") from error

    def device(self, device: str) -> DeviceRow | None:
        row = self._db.execute("SELECT * FROM device WHERE device = ?", (device,)).fetchone()
        return _device_row(row) if row else None

    def device_by_key(self, key_id: bytes) -> DeviceRow | None:
        row = self._db.execute("SELECT * FROM device WHERE key_id = ?", (key_id,)).fetchone()
        return _device_row(row) if row else None

    def devices(self) -> Iterator[DeviceRow]:
        return (_device_row(row) for row in self._db.execute("SELECT * FROM device ORDER BY device"))

    def set_owner(self, device: str, owner: str) -> None:
        """Note whose device it is, as the ledger says of devices of other brokers' providers."""
        self._db.execute("INSERT OR REPLACE INTO owner VALUES (?, ?)", (device, owner))

    def owner_of(self, device: str) -> str | None:
        row = self._db.execute("SELECT owner FROM owner WHERE device = ?", (device,)).fetchone()
        return None if row is None else str(row[0])

    def expected_meters(self) -> int:
        """How many meters report every interval."""
        consumers = self._db.execute("SELECT count(*) FROM consumer").fetchone()[0]
        devices = self._db.execute("SELECT count(*) FROM device").fetchone()[0]
        return int(consumers) + int(devices)

    def add_statement(self, kind: int, raw: bytes) -> None:
        """A signed statement for the ledger; the same one twice is one."""
        self._db.execute(
            "INSERT OR IGNORE INTO statement (kind, raw, state) VALUES (?, ?, ?)", (kind, raw, WorkState.WAITING)
        )

    def statements(self, state: WorkState | None = None) -> list[StatementRow]:
        sentence = "SELECT number, kind, raw, state, reason FROM statement"
        if state is None:
            rows = self._db.execute(sentence + " ORDER BY number")
        else:
            rows = self._db.execute(sentence + " WHERE state = ? ORDER BY number", (int(state),))
        return [StatementRow(row[0], row[1], row[2], WorkState(row[3]), row[4]) for row in rows]

    def set_statement(self, number: int, state: WorkState, reason: str | None) -> None:
        self._db.execute("UPDATE statement SET state = ?, reason = ? WHERE number = ?", (int(state), reason, number))

    # Readings and demands

    def message(self, start_s: int, meter: str, kind: int, revision: int) -> MessageRow | None:
        row = self._db.execute(
            "SELECT * FROM message WHERE start_s = ? AND meter = ? AND kind = ? AND revision = ?",
            (start_s, meter, kind, revision),
        ).fetchone()
        return _message_row(row) if row else None

    def messages_of(self, start_s: int, meter: str, kind: MessageType) -> list[MessageRow]:
        """All revisions of a meter's message about one interval, oldest first."""
        rows = self._db.execute(
            "SELECT * FROM message WHERE start_s = ? AND meter = ? AND kind = ? ORDER BY revision",
            (start_s, meter, int(kind)),
        )
        return [_message_row(row) for row in rows]

    def add_message(
        self,
        start_s: int,
        meter: str,
        kind: int,
        revision: int,
        message_id: bytes,
        raw: bytes,
        energy_wh: int,
        pseudonym: bytes | None,
        commitment: bytes | None,
    ) -> bool:
        """Keep an accepted message. False, and nothing has changed, if there is one for that interval and revision.

        A later revision waits to be put into effect; an earlier demand than is known counts for nothing.
        """
        standing = int(Standing.WAITING if revision else Standing.CURRENT)
        cursor = self._db.execute(
            "INSERT INTO message SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, 0, NULL, NULL, NULL,"
            " CASE WHEN ?3 = 2 AND EXISTS (SELECT 1 FROM message WHERE start_s = ?1 AND meter = ?2 AND kind = ?3"
            " AND revision > ?4) THEN 2 ELSE ?10 END, 0 WHERE true ON CONFLICT DO NOTHING",
            (start_s, meter, kind, revision, message_id, raw, energy_wh, pseudonym, commitment, standing),
        )
        return cursor.rowcount == 1

    def put_message(self, start_s: int, meter: str, revision: int, message_id: bytes, raw: bytes) -> None:
        """Put the message to a demand that was known from the ledger alone."""
        self._db.execute(
            "UPDATE message SET message_id = ?, raw = ? WHERE start_s = ? AND meter = ? AND kind = 2 AND revision = ?",
            (message_id, raw, start_s, meter, revision),
        )

    def waiting_demands(self) -> list[tuple[int, str]]:
        """(start_s, meter) of the demands that have a revision which is not in effect yet."""
        return self._db.execute(
            "SELECT DISTINCT start_s, meter FROM message WHERE standing = 1 AND kind = 2 ORDER BY start_s, meter"
        ).fetchall()

    def waiting_readings(self) -> list[tuple[int, str]]:
        """(start_s, meter) of the readings that have a revision which the ledger has not got yet."""
        return self._db.execute(
            "SELECT DISTINCT start_s, meter FROM message WHERE standing = 1 AND kind = 1 ORDER BY start_s, meter"
        ).fetchall()

    def set_reading_standing(self, start_s: int, meter: str, revision: int, standing: Standing) -> None:
        """Note that the ledger has a reading's revision, or has refused it."""
        self._db.execute(
            "UPDATE message SET standing = ? WHERE start_s = ? AND meter = ? AND kind = 1 AND revision = ?",
            (int(standing), start_s, meter, revision),
        )

    def has_stake(self, device: str, start_s: int) -> bool:
        """True if energy of that device and interval ever came to this broker."""
        row = self._db.execute(
            "SELECT 1 FROM transfer WHERE asset_start_s = ? AND device = ? AND flow IN (0, 1) LIMIT 1",
            (start_s, device),
        ).fetchone()
        return row is not None

    def unsure(self) -> list[tuple[str, int]]:
        """(device, start_s) of the intervals about which the ledger has to be asked."""
        return self._db.execute("SELECT device, start_s FROM unsure").fetchall()

    def set_unsure(self, device: str, start_s: int) -> None:
        self._db.execute("INSERT OR IGNORE INTO unsure VALUES (?, ?)", (device, start_s))

    def set_sure(self, device: str, start_s: int) -> None:
        self._db.execute("DELETE FROM unsure WHERE device = ? AND start_s = ?", (device, start_s))

    def untold(self) -> set[tuple[int, str]]:
        """(start_s, meter) of the demands whose meter may believe that it has what it has no longer."""
        return set(self._db.execute("SELECT start_s, meter FROM untold").fetchall())

    def set_untold(self, start_s: int, meter: str) -> None:
        self._db.execute("INSERT OR IGNORE INTO untold VALUES (?, ?)", (start_s, meter))

    def set_told(self, keys: Iterable[tuple[int, str]]) -> None:
        self._db.executemany("DELETE FROM untold WHERE start_s = ? AND meter = ?", keys)

    def carried(self) -> dict[str, int]:
        """By own device: Wh that its next issue adds or, negative, takes off; as the ledger said last."""
        return dict(self._db.execute("SELECT device, energy_wh FROM carried").fetchall())

    def set_carried(self, device: str, energy_wh: int) -> None:
        if energy_wh:
            self._db.execute("INSERT OR REPLACE INTO carried VALUES (?, ?)", (device, energy_wh))
        else:
            self._db.execute("DELETE FROM carried WHERE device = ?", (device,))

    def current_demand(self, start_s: int, meter: str) -> MessageRow | None:
        """The revision of a demand that counts."""
        row = self._db.execute(
            "SELECT * FROM message WHERE start_s = ? AND meter = ? AND kind = 2 AND standing = 0", (start_s, meter)
        ).fetchone()
        return _message_row(row) if row else None

    def set_standing(self, start_s: int, meter: str, revision: int, standing: Standing, ledger_revision: int) -> None:
        """Note which revision of a demand counts, and how often the ledger has seen the demand corrected."""
        self._db.execute(
            "UPDATE message SET standing = ?, ledger_revision = ? WHERE start_s = ? AND meter = ? AND kind = 2"
            " AND revision = ?",
            (int(standing), ledger_revision, start_s, meter, revision),
        )

    def refuse_message(self, start_s: int, meter: str, kind: int, revision: int, reason: str) -> None:
        """Note that the ledger refused what an accepted message asked for; it is not tried again."""
        self._db.execute(
            "UPDATE message SET refusal = ? WHERE start_s = ? AND meter = ? AND kind = ? AND revision = ?",
            (reason, start_s, meter, kind, revision),
        )

    def messages(self, start_s: int, kind: MessageType) -> Iterator[MessageRow]:
        """The accepted messages of that kind for one interval, by meter name; of demands those that count."""
        rows = self._db.execute(
            "SELECT * FROM message WHERE start_s = ? AND kind = ? AND standing = 0 ORDER BY meter, revision",
            (start_s, int(kind)),
        )
        return (_message_row(row) for row in rows)

    def commitments(self, start_s: int) -> Iterator[tuple[bytes, bytes, int]]:
        """(pseudonym, commitment, energy_wh) of all demands of one interval that count, by pseudonym."""
        return self._db.execute(
            "SELECT pseudonym, commitment, energy_wh FROM message WHERE start_s = ? AND kind = 2 AND standing = 0"
            " ORDER BY pseudonym",
            (start_s,),
        )

    def short_demands(self, start_s: int) -> list[MessageRow]:
        """Demands of one interval that are not delivered in full, by meter name; without those the ledger refused."""
        rows = self._db.execute(
            "SELECT * FROM message WHERE start_s = ? AND kind = 2 AND delivered_wh < energy_wh AND refusal IS NULL"
            " AND standing = 0 ORDER BY meter, revision",
            (start_s,),
        )
        return [_message_row(row) for row in rows]

    def has_demand_since(self, meter: str, start_s: int) -> bool:
        """True if a demand of that meter was accepted for an interval from `start_s` on."""
        row = self._db.execute(
            "SELECT 1 FROM message WHERE start_s >= ? AND meter = ? AND kind = 2 LIMIT 1", (start_s, meter)
        ).fetchone()
        return row is not None

    def all_messages(self, kind: MessageType) -> Iterator[MessageRow]:
        rows = self._db.execute("SELECT * FROM message WHERE kind = ? ORDER BY start_s, meter", (int(kind),))
        return (_message_row(row) for row in rows)

    def demanded_wh(self, meter: str, since_s: int, until_s: int) -> int:
        """Wh that a consumer demanded for the intervals that begin in `[since_s, until_s)`, as corrected."""
        row = self._db.execute(
            "SELECT coalesce(sum(said.energy_wh), 0) FROM interval CROSS JOIN message AS said"
            " ON said.start_s = interval.start_s AND said.meter = ? AND said.kind = 2"
            " WHERE interval.start_s >= ? AND interval.start_s < ? AND said.standing = 0",
            (meter, since_s, until_s),
        ).fetchone()
        return int(row[0])

    def message_count(self, start_s: int) -> int:
        """How many meters have reported that interval."""
        row = self._db.execute("SELECT count(*) FROM message WHERE start_s = ? AND revision = 0", (start_s,)).fetchone()
        return int(row[0])

    def set_delivered(self, rows: Iterable[tuple[int, bytes | None, int, str, int]]) -> None:
        """(delivered_wh, encoded quotas or None, start_s, meter, revision) of demands."""
        self._db.executemany(
            "UPDATE message SET delivered_wh = ?, quotas = ? WHERE start_s = ? AND meter = ? AND kind = 2"
            " AND revision = ?",
            rows,
        )

    def set_open_until(self, rows: Iterable[tuple[int | None, int, str, int]]) -> None:
        """(end of the window, or None if nothing is open any more, start_s, meter, revision) of demands."""
        self._db.executemany(
            "UPDATE message SET open_until_s = ? WHERE start_s = ? AND meter = ? AND kind = 2 AND revision = ?", rows
        )

    def open_demands(self) -> list[MessageRow]:
        """Demands that stay open beyond their own interval, oldest first."""
        rows = self._db.execute(
            "SELECT * FROM message WHERE open_until_s IS NOT NULL AND refusal IS NULL ORDER BY start_s, meter, revision"
        )
        return [_message_row(row) for row in rows]

    def add_conflict(
        self, meter: str, kind: int, start_s: int, revision: int, message_id: bytes, raw: bytes, most: int
    ) -> None:
        """Keep another payload for something already accepted, at most `most` in all, as evidence."""
        self._db.execute(
            "INSERT OR IGNORE INTO conflict (meter, kind, start_s, revision, message_id, raw)"
            " SELECT ?, ?, ?, ?, ?, ? WHERE (SELECT count(*) FROM conflict) < ?",
            (meter, kind, start_s, revision, message_id, raw, most),
        )

    def conflicts(self) -> list[tuple[str, int, int, int, bytes]]:
        """(meter, kind, start_s, revision, message_id), oldest first."""
        return self._db.execute(
            "SELECT meter, kind, start_s, revision, message_id FROM conflict ORDER BY number"
        ).fetchall()

    # Deliveries and accounts

    def add_deliveries(self, rows: Sequence[DeliveryRow]) -> None:
        self._db.executemany("INSERT INTO delivery VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def deliveries(self, start_s: int, meter: str) -> list[DeliveryRow]:
        rows = self._db.execute(
            "SELECT * FROM delivery WHERE start_s = ? AND meter = ? ORDER BY sequence", (start_s, meter)
        )
        return [DeliveryRow(*row) for row in rows]

    def deliveries_from(self, device: str, asset_start_s: int) -> list[DeliveryRow]:
        """What was delivered of a device's interval, to demands of whatever intervals."""
        rows = self._db.execute(
            "SELECT * FROM delivery WHERE start_s = ?1 AND asset_start_s = ?1 AND device = ?2"
            " UNION ALL SELECT * FROM delivery WHERE asset_start_s = ?1 AND device = ?2 AND asset_start_s <> start_s",
            (asset_start_s, device),
        )
        return [DeliveryRow(*row) for row in rows]

    def take_back(self, row: DeliveryRow, from_wh: int, batch: int) -> None:
        """Note that a delivery gave back its Wh from `from_wh` on, in the batch of that number."""
        place = (row.start_s, row.meter, row.sequence)
        if from_wh == row.from_wh:
            self._db.execute("DELETE FROM delivery WHERE start_s = ? AND meter = ? AND sequence = ?", place)
        else:
            self._db.execute(
                "UPDATE delivery SET to_wh = ? WHERE start_s = ? AND meter = ? AND sequence = ?", (from_wh, *place)
            )
        self._db.execute(
            "INSERT INTO taken_back (start_s, meter, device, asset_start_s, asset_revision, from_wh, to_wh, source,"
            " price, batch) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(row.start_s, row.meter, row.device, row.asset_start_s, row.asset_revision, from_wh, row.to_wh),
                *(row.source, row.price, batch),
            ),
        )

    def taken_back(self, since_s: int, until_s: int) -> list[tuple[int, str, str, int, int, int, int]]:
        """(start_s, meter, device, asset_start_s, asset_revision, from_wh, to_wh) of what demands of
        `[since_s, until_s)` were given and no longer have, oldest first."""
        return self._db.execute(
            "SELECT start_s, meter, device, asset_start_s, asset_revision, from_wh, to_wh FROM taken_back"
            " WHERE start_s >= ? AND start_s < ? ORDER BY number",
            (since_s, until_s),
        ).fetchall()

    def settled_taken_back(self, since_s: int, until_s: int, meter: str | None = None) -> Iterator[SettledRow]:
        """The same with prices, of one consumer or of all: each stands for Wh that were delivered for a while."""
        rows = self._db.execute(
            "SELECT back.meter, back.start_s, back.device, back.asset_start_s, back.source, back.price,"
            f" back.to_wh - back.from_wh, ({_PAID.format('back', '')}) FROM taken_back AS back"
            " WHERE back.start_s >= ? AND back.start_s < ? AND coalesce(back.meter = ?, true)",
            (since_s, until_s, meter),
        )
        return (SettledRow(*row) for row in rows)

    def all_deliveries(self) -> Iterator[DeliveryRow]:
        rows = self._db.execute("SELECT * FROM delivery ORDER BY start_s, meter, sequence")
        return (DeliveryRow(*row) for row in rows)

    def committed_deliveries(self, since_s: int, until_s: int) -> Iterator[DeliveryRow]:
        """What the ledger has of deliveries to demands of `[since_s, until_s)`."""
        rows = self._db.execute(
            "SELECT given.* FROM delivery AS given JOIN batch ON batch.number = given.batch"
            f" WHERE given.start_s >= ? AND given.start_s < ? AND batch.state = {int(WorkState.COMMITTED)}"
            " ORDER BY given.start_s, given.meter, given.sequence",
            (since_s, until_s),
        )
        return (DeliveryRow(*row) for row in rows)

    def deliveries_of_batch(self, start_s: int, batch: int) -> list[DeliveryRow]:
        rows = self._db.execute(
            "SELECT * FROM delivery WHERE start_s = ? AND batch = ? ORDER BY meter, sequence", (start_s, batch)
        )
        return [DeliveryRow(*row) for row in rows]

    def drop_deliveries_of_batch(self, start_s: int, batch: int) -> None:
        self._db.execute("DELETE FROM delivery WHERE start_s = ? AND batch = ?", (start_s, batch))

    def account(self, meter: str, period_start_s: int, version: int) -> AccountRow | None:
        row = self._db.execute(
            "SELECT * FROM account WHERE meter = ? AND period_start_s = ? AND version = ?",
            (meter, period_start_s, version),
        ).fetchone()
        if row is None:
            return None
        return AccountRow(row[0], row[1], row[2], row[3], tuple(cbor.decode(row[4], "account", 1_024)))

    def set_accounts(self, rows: Iterable[AccountRow]) -> None:
        self._db.executemany(
            "INSERT INTO account VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
            " total_wh = excluded.total_wh, by_line = excluded.by_line",
            [(row.meter, row.period_start_s, row.version, row.total_wh, cbor.encode(row.by_line)) for row in rows],
        )

    # Intervals

    def interval_state(self, start_s: int) -> tuple[IntervalState, int]:
        """(state, revision of the next close) of an interval; OPEN and 0 where nothing is known."""
        row = self._db.execute("SELECT state, close_revision FROM interval WHERE start_s = ?", (start_s,)).fetchone()
        return (IntervalState(row[0]), int(row[1])) if row else (IntervalState.OPEN, 0)

    def set_interval(self, start_s: int, state: IntervalState, close_revision: int) -> None:
        """Note where an interval stands. Whatever came late for it counts as taken care of."""
        self._db.execute("INSERT OR REPLACE INTO interval VALUES (?, ?, ?, 0)", (start_s, int(state), close_revision))

    def mark_late(self, start_s: int) -> None:
        """Note that a closed interval has something left to settle, and so needs a further close."""
        self._db.execute("UPDATE interval SET late = 1 WHERE start_s = ?", (start_s,))

    def late_intervals(self) -> list[int]:
        """Closed intervals that need a further close, oldest first."""
        return [row[0] for row in self._db.execute("SELECT start_s FROM interval WHERE late ORDER BY start_s")]

    def first_interval(self) -> int | None:
        """Start of the first interval that this broker knew."""
        row = self._db.execute("SELECT min(start_s) FROM interval").fetchone()
        return None if row[0] is None else int(row[0])

    def last_interval(self, at_least: IntervalState) -> int | None:
        """Start of the newest interval in that state or beyond."""
        row = self._db.execute("SELECT max(start_s) FROM interval WHERE state >= ?", (int(at_least),)).fetchone()
        return None if row[0] is None else int(row[0])

    # Batches

    def next_batch_number(self) -> int:
        return int(self._db.execute("SELECT coalesce(max(number), 0) + 1 FROM batch").fetchone()[0])

    def add_batch(self, row: BatchRow) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO batch (number, batch_id, kind, start_s, raw, state) VALUES (?, ?, ?, ?, ?, ?)",
            (row.number, row.batch_id, int(row.kind), row.start_s, row.raw, int(row.state)),
        )

    def waiting_batches(self) -> list[BatchRow]:
        """Batches without a result, oldest first."""
        rows = self._db.execute(
            "SELECT number, batch_id, kind, start_s, raw, state FROM batch WHERE state = 0 ORDER BY number"
        )
        return [_batch_row(row) for row in rows]

    def all_batches(self) -> Iterator[BatchRow]:
        rows = self._db.execute(
            "SELECT number, batch_id, kind, start_s, raw, state, height, reason FROM batch ORDER BY number"
        )
        return (_batch_row(row) for row in rows)

    def set_batch(self, batch_id: bytes, state: WorkState, height: int | None, reason: str | None) -> None:
        """Note the result; the bytes of a finished batch stand on the ledger and are not kept twice."""
        self._db.execute(
            "UPDATE batch SET state = ?, height = ?, reason = ?, raw = x'' WHERE batch_id = ?",
            (int(state), height, reason, batch_id),
        )

    def batch_state(self, batch_id: bytes) -> WorkState | None:
        """What became of a batch, None if this broker did not make it."""
        row = self._db.execute("SELECT state FROM batch WHERE batch_id = ?", (batch_id,)).fetchone()
        return None if row is None else WorkState(row[0])

    # The ledger's blocks

    def ledger_cursor(self) -> tuple[int, bytes] | None:
        """(height, block id) up to which the ledger's blocks are taken in; None before the first."""
        row = self._db.execute("SELECT height, block_id FROM ledger_cursor").fetchone()
        return (int(row[0]), bytes(row[1])) if row else None

    def set_ledger_cursor(self, height: int, block_id: bytes) -> None:
        self._db.execute("INSERT OR REPLACE INTO ledger_cursor VALUES (1, ?, ?)", (height, block_id))

    # Orders

    def add_order_out(self, row: OrderOutRow) -> None:
        self._db.execute("INSERT INTO order_out VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)", row)

    def order_out(self, order_id: bytes) -> OrderOutRow | None:
        row = self._db.execute("SELECT * FROM order_out WHERE order_id = ?", (order_id,)).fetchone()
        return OrderOutRow(*row[:13]) if row else None

    def orders_out(self, start_s: int) -> list[OrderOutRow]:
        rows = self._db.execute("SELECT * FROM order_out WHERE start_s = ? ORDER BY order_id", (start_s,))
        return [OrderOutRow(*row[:13]) for row in rows]

    def orders_out_for(self, requester: str, order_id: bytes) -> list[OrderOutRow]:
        """The orders that pass on that order of a neighbour."""
        rows = self._db.execute(
            "SELECT * FROM order_out WHERE parent = ? AND parent_requester = ? ORDER BY order_id", (order_id, requester)
        )
        return [OrderOutRow(*row[:13]) for row in rows]

    def all_orders_out(self) -> Iterator[OrderOutRow]:
        rows = self._db.execute("SELECT * FROM order_out ORDER BY start_s, neighbour, source, order_id")
        return (OrderOutRow(*row[:13]) for row in rows)

    def open_orders_out(self) -> list[OrderOutRow]:
        """Orders that may still be served, oldest interval first."""
        rows = self._db.execute(
            "SELECT * FROM order_out WHERE state IN ('asked', 'passed_on', 'coming') ORDER BY start_s, order_id"
        )
        return [OrderOutRow(*row[:13]) for row in rows]

    def set_order_out(self, row: OrderOutRow, reason: str | None) -> None:
        """Note an order's state, what was seen under it and what was answered."""
        self._db.execute(
            "UPDATE order_out SET state = ?, seen_wh = ?, answered_wh = ?, answer_status = ?, reason = ?"
            " WHERE order_id = ?",
            (row.state, row.seen_wh, row.answered_wh, row.answer_status, reason, row.order_id),
        )

    def all_orders_in(self) -> Iterator[OrderInRow]:
        rows = self._db.execute("SELECT * FROM order_in ORDER BY start_s, requester, source, order_id")
        return (OrderInRow(*row) for row in rows)

    def add_order_in(self, row: OrderInRow) -> None:
        self._db.execute("INSERT INTO order_in VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def order_in(self, requester: str, order_id: bytes) -> OrderInRow | None:
        row = self._db.execute(
            "SELECT * FROM order_in WHERE requester = ? AND order_id = ?", (requester, order_id)
        ).fetchone()
        return OrderInRow(*row) if row else None

    def orders_in(self, start_s: int) -> list[OrderInRow]:
        rows = self._db.execute("SELECT * FROM order_in WHERE start_s = ? ORDER BY requester, order_id", (start_s,))
        return [OrderInRow(*row) for row in rows]

    def orders_in_state(self, state: str) -> list[OrderInRow]:
        rows = self._db.execute(
            "SELECT * FROM order_in WHERE state = ? AND state IN ('received', 'passed_on')"
            " ORDER BY start_s, requester, order_id",
            (state,),
        )
        return [OrderInRow(*row) for row in rows]

    def set_order_in(self, row: OrderInRow) -> None:
        """Note an order's state, what it was granted, and the last answer."""
        self._db.execute(
            "UPDATE order_in SET state = ?, granted_wh = ?, answer = ? WHERE requester = ? AND order_id = ?",
            (row.state, row.granted_wh, row.answer, row.requester, row.order_id),
        )

    def partner_records(self) -> dict[str, bytes]:
        """What is remembered of each neighbour (`broker.market.partners`)."""
        return dict(self._db.execute("SELECT name, record FROM partner ORDER BY name").fetchall())

    def set_partner_record(self, name: str, record: bytes) -> None:
        self._db.execute("INSERT OR REPLACE INTO partner VALUES (?, ?)", (name, record))

    # Transfers, and what was paid

    def add_transfers(self, rows: Iterable[TransferRow]) -> int:
        """Note transfers that stand on the ledger, in its order. Returns how many were not noted before."""
        before = self._db.total_changes
        self._db.executemany(
            f"INSERT OR IGNORE INTO transfer ({_TRANSFER_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows
        )
        return self._db.total_changes - before

    def acquisitions(
        self, device: str, asset_start_s: int, asset_revision: int, from_wh: int, to_wh: int
    ) -> list[TransferRow]:
        """The transfers by which any of these Wh of an asset came to this broker, newest first.

        More than one can have brought the same Wh: what a neighbour bought can be bought back.
        """
        rows = self._db.execute(
            f"SELECT {_TRANSFER_COLUMNS} FROM transfer WHERE asset_start_s = ? AND device = ? AND asset_revision = ?"
            " AND from_wh < ? AND to_wh > ? AND flow IN (0, 1) ORDER BY number DESC",
            (asset_start_s, device, asset_revision, to_wh, from_wh),
        )
        return [TransferRow(*row) for row in rows]

    def transfers(self, flow: int, since_s: int = 0, until_s: int = 2**53) -> Iterator[TransferRow]:
        """Transfers of one kind of assets whose interval begins in `[since_s, until_s)`, by interval, device, range."""
        rows = self._db.execute(
            f"SELECT {_TRANSFER_COLUMNS} FROM transfer WHERE asset_start_s >= ? AND asset_start_s < ? AND flow = ?"
            " ORDER BY asset_start_s, device, asset_revision, from_wh, number",
            (since_s, until_s, flow),
        )
        return (TransferRow(*row) for row in rows)

    def settled_sales(self, since_s: int, until_s: int) -> Iterator[SettledRow]:
        """What neighbours got of assets whose interval begins in `[since_s, until_s)`."""
        rows = self._db.execute(
            "SELECT sold.party, sold.asset_start_s, sold.device, sold.asset_start_s, sold.source, sold.price,"
            f" sold.to_wh - sold.from_wh, ({_PAID.format('sold', ' AND number < sold.number')}) FROM transfer AS sold"
            " WHERE sold.asset_start_s >= ? AND sold.asset_start_s < ? AND sold.flow = 2",
            (since_s, until_s),
        )
        return (SettledRow(*row) for row in rows)

    def settled_deliveries(self, since_s: int, until_s: int, meter: str | None = None) -> Iterator[SettledRow]:
        """What the ledger has of deliveries to demands of `[since_s, until_s)`, of one consumer or of all."""
        if meter is None:
            where = "FROM delivery AS given JOIN batch ON batch.number = given.batch WHERE given.start_s >= ?"
            values: tuple[int | str, ...] = (since_s, until_s)
        else:
            # Deliveries are found by interval first, so one consumer's are looked up interval by interval.
            where = (
                "FROM interval CROSS JOIN delivery AS given ON given.start_s = interval.start_s AND given.meter = ?"
                " JOIN batch ON batch.number = given.batch WHERE interval.start_s >= ?"
            )
            values = (meter, since_s, until_s)
        start = "given" if meter is None else "interval"
        rows = self._db.execute(
            "SELECT given.meter, given.start_s, given.device, given.asset_start_s, given.source, given.price,"
            f" given.to_wh - given.from_wh, ({_PAID.format('given', '')}) {where} AND {start}.start_s < ?"
            f" AND batch.state = {int(WorkState.COMMITTED)}",
            values,
        )
        return (SettledRow(*row) for row in rows)

    def add_withdrawn(self, device: str, asset_start_s: int, ranges: Iterable[tuple[int, int, int]]) -> None:
        """Note (revision, from_wh, to_wh) of a device's interval that corrections have withdrawn, of whoever had it.

        What is withdrawn stays so: the ranges of a revision contain those that were noted of it before.
        """
        rows = [(asset_start_s, device, *row) for row in ranges]
        self._db.executemany(
            "DELETE FROM withdrawn WHERE asset_start_s = ? AND device = ? AND asset_revision = ?",
            {row[:3] for row in rows},
        )
        self._db.executemany("INSERT INTO withdrawn VALUES (?, ?, ?, ?, ?)", rows)

    def withdrawn(self, device: str, asset_start_s: int) -> list[tuple[int, int, int]]:
        """(revision, from_wh, to_wh) of a device's interval that is known here to be withdrawn."""
        return self._db.execute(
            "SELECT asset_revision, from_wh, to_wh FROM withdrawn WHERE asset_start_s = ? AND device = ?"
            " ORDER BY asset_revision, from_wh",
            (asset_start_s, device),
        ).fetchall()

    def settled_withdrawals(self, flow: int, since_s: int, until_s: int) -> Iterator[SettledRow]:
        """What corrections withdrew of transfers of one kind, of assets whose interval begins in `[since_s, until_s)`.

        A Wh that changed hands several times is in each of these transfers.
        """
        rows = self._db.execute(
            "SELECT moved.party, moved.asset_start_s, moved.device, moved.asset_start_s, moved.source, moved.price,"
            " min(moved.to_wh, gone.to_wh) - max(moved.from_wh, gone.from_wh),"
            f" ({_PAID.format('moved', ' AND number < moved.number')})"
            " FROM withdrawn AS gone CROSS JOIN transfer AS moved ON moved.asset_start_s = gone.asset_start_s"
            " AND moved.device = gone.device AND moved.asset_revision = gone.asset_revision"
            " AND moved.from_wh < gone.to_wh AND moved.to_wh > gone.from_wh AND moved.flow = ?"
            " WHERE gone.asset_start_s >= ? AND gone.asset_start_s < ?",
            (flow, since_s, until_s),
        )
        return (SettledRow(*row) for row in rows)

    # What was announced and heard

    def set_announcement(self, topic: str, raw: bytes) -> None:
        """A retained message of ours, to be published again after a reconnect."""
        self._db.execute("INSERT OR REPLACE INTO announcement VALUES (?, ?)", (topic, raw))

    def announcements(self) -> list[tuple[str, bytes]]:
        return self._db.execute("SELECT topic, raw FROM announcement ORDER BY topic").fetchall()

    def set_heard(self, start_s: int, kind: MessageType, broker: str, payload: bytes) -> None:
        """The payload of a neighbour's verified announcement about one interval."""
        self._db.execute("INSERT OR REPLACE INTO heard VALUES (?, ?, ?, ?)", (start_s, int(kind), broker, payload))

    def heard(self, start_s: int, kind: MessageType) -> dict[str, bytes]:
        """By neighbour: the payload of its announcement of that kind about that interval."""
        rows = self._db.execute(
            "SELECT broker, payload FROM heard WHERE start_s = ? AND kind = ? ORDER BY broker", (start_s, int(kind))
        )
        return dict(rows.fetchall())

    def heard_of(self, kind: MessageType) -> list[tuple[int, str, bytes]]:
        """(start_s, broker, payload) of all kept announcements of that kind, oldest first."""
        return self._db.execute(
            "SELECT start_s, broker, payload FROM heard WHERE kind = ? ORDER BY start_s, broker", (int(kind),)
        ).fetchall()

    def forget_heard(self, before_s: int) -> None:
        """Drop what was heard about intervals that start before."""
        self._db.execute("DELETE FROM heard WHERE start_s < ?", (before_s,))

    def newest_heard(self, kind: MessageType) -> list[bytes]:
        """The payload of each neighbour's newest announcement of that kind, by neighbour."""
        # In SQLite the other columns beside a max() are those of the row that has it.
        rows = self._db.execute(
            "SELECT broker, payload, max(start_s) FROM heard WHERE kind = ? GROUP BY broker ORDER BY broker",
            (int(kind),),
        )
        return [row[1] for row in rows]

    # Foresight

    def add_history(self, rows: Iterable[tuple[int, int, int, int]]) -> None:
        """Add to the sums of (start_s, kind, target): energy_uwh, millionths of a Wh, the fourth of each row."""
        self._db.executemany(
            "INSERT INTO history VALUES (?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET energy_uwh = energy_uwh + excluded.energy_uwh",
            rows,
        )

    def history(self, since_s: int, until_s: int) -> Iterator[tuple[int, int, int, int]]:
        """The sums (start_s, kind, target, energy_uwh) of intervals that begin in `[since_s, until_s)`."""
        return self._db.execute("SELECT * FROM history WHERE start_s >= ? AND start_s < ?", (since_s, until_s))

    def forget_history(self, before_s: int) -> None:
        """Drop the sums of intervals that start before."""
        self._db.execute("DELETE FROM history WHERE start_s < ?", (before_s,))

    def transferred_wh(self, flow: int, since_s: int, until_s: int) -> list[tuple[int, int, int]]:
        """(start_s, source, Wh) of transfers of one kind, for each interval that begins in `[since_s, until_s)`."""
        return self._db.execute(
            "SELECT asset_start_s, source, sum(to_wh - from_wh) FROM transfer WHERE asset_start_s >= ?"
            " AND asset_start_s < ? AND flow = ? GROUP BY asset_start_s, source",
            (since_s, until_s, flow),
        ).fetchall()

    def set_expected(
        self, day_s: int, rows: Iterable[tuple[int, int, tuple[int, ...]]], *, forget_before_s: int
    ) -> None:
        """Keep what is expected of a day, as (kind, target, Wh of each interval), and drop earlier days."""
        self._db.execute("DELETE FROM expected WHERE day_s < ?", (forget_before_s,))
        self._db.executemany(
            "INSERT INTO expected VALUES (?, ?, ?, ?)",
            [(kind, target, day_s, cbor.encode(energies_wh)) for kind, target, energies_wh in rows],
        )

    def expected(self) -> list[tuple[int, int, int, tuple[int, ...]]]:
        """(day_s, kind, target, Wh of each interval) of the days that were forecast last, by day."""
        rows = self._db.execute("SELECT day_s, kind, target, energies_wh FROM expected ORDER BY day_s, kind, target")
        return [(day_s, kind, target, tuple(cbor.decode(raw, "expected", 4_096))) for day_s, kind, target, raw in rows]

    def set_hint_wish(self, meter: str, *, wished: bool) -> None:
        """Note whether a consumer wants hints."""
        if wished:
            self._db.execute("INSERT OR IGNORE INTO hint_wish VALUES (?, 0)", (meter,))
        else:
            self._db.execute("DELETE FROM hint_wish WHERE meter = ?", (meter,))

    def wishes_hints(self, meter: str) -> bool:
        return self._db.execute("SELECT 1 FROM hint_wish WHERE meter = ?", (meter,)).fetchone() is not None

    def hints_due(self, day_s: int, most: int) -> list[str]:
        """Meters that want hints and have not been sent that day's, at most so many."""
        rows = self._db.execute(
            "SELECT meter FROM hint_wish WHERE hinted_s < ? ORDER BY hinted_s, meter LIMIT ?", (day_s, most)
        )
        return [row[0] for row in rows]

    def set_hinted(self, meters: Iterable[str], day_s: int) -> None:
        """Note that these meters have been sent the hint of that day."""
        self._db.executemany("UPDATE hint_wish SET hinted_s = ? WHERE meter = ?", [(day_s, meter) for meter in meters])

    def forget_hinted(self) -> None:
        """Every hint has to be sent again."""
        self._db.execute("UPDATE hint_wish SET hinted_s = 0 WHERE hinted_s > 0")


def encode_quotas(quotas: Sequence[int]) -> bytes:
    """The stored form of a demand's quotas."""
    return cbor.encode(list(quotas))


def _device_row(row: Sequence[Any]) -> DeviceRow:
    return DeviceRow(*[*row[:-1], tuple(cbor.decode(row[-1], "consumers", 8_192))])


def _message_row(row: Sequence[Any]) -> MessageRow:
    # Spelled out, because rows are made for each demand of each interval and `_replace` costs three times as much.
    quotas = None if row[10] is None else tuple(cbor.decode(row[10], "quotas", 1_024))
    return MessageRow._make((*row[:10], quotas, *row[11:13], _STANDINGS[row[13]], row[14]))


def _batch_row(row: Sequence[Any]) -> BatchRow:
    return BatchRow(row[0], row[1], BatchKind(row[2]), row[3], row[4], WorkState(row[5]), *row[6:])
