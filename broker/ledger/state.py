"""The ledger's state as rows under keys, and the overlay in which one batch works. Pure.

A key is a tuple (table, …) of ints, names and bytes, a row one of the named tuples below. Rows are never changed in
place: a batch puts new rows into its `Overlay`, which is dropped if the batch is refused. Rows are encoded as CBOR
arrays once a batch is through, however often it wrote them: ten thousand deliveries from one asset encode it once.

An asset's row keeps only the slices still *held*, which are few. Each delivered slice is a row of its own, so an asset
that is split over ten thousand consumers stays cheap. Keys start with the time where rows are many: one interval's rows
then lie together on disk.
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from hashlib import sha256
from heapq import merge
from itertools import islice
from typing import Any, Final, NamedTuple, Protocol

from broker.ledger.operations import AssetId
from broker.protocol import cbor
from broker.protocol.errors import MalformedMessage

PARTY: Final = 1
"""(PARTY, name) → PartyRow"""
KEY: Final = 2
"""(KEY, key id) → KeyRow"""
DEVICE: Final = 3
"""(DEVICE, name) → DeviceRow"""
MANDATES: Final = 4
"""(MANDATES, device) → MandatesRow"""
ASSET: Final = 5
"""(ASSET, start_s, device, carrier, revision) → AssetRow"""
SLICE: Final = 6
"""(SLICE, start_s, device, carrier, revision, from_wh) → SliceRow, one delivered slice"""
OWNED: Final = 7
"""(OWNED, owner, start_s, device, carrier, revision) → OwnedRow, where the owner holds a slice: an index"""
DEMAND: Final = 8
"""(DEMAND, start_s, pseudonym) → DemandRow"""
TOTAL: Final = 9
"""(TOTAL, start_s, source) → TotalRow"""
ORDER: Final = 10
"""(ORDER, requester, order id) → OrderRow"""
CLOSED: Final = 11
"""(CLOSED, broker, start_s) → ClosedRow"""
CLOCK: Final = 12
"""(CLOCK, broker) → ClockRow"""
APPLIED: Final = 13
"""(APPLIED, submitter, not_after_s, batch id) → AppliedRow, kept until the submitter's clock reaches not_after_s"""
METERED: Final = 14
"""(METERED, start_s, device, carrier) → MeteredRow, where the asset of revision 0 alone does not say the same"""
CARRY: Final = 15
"""(CARRY, device, carrier) → CarryRow, if it is not 0"""
VALIDATORS: Final = 16
"""(VALIDATORS, 0) → ValidatorsRow, the only one, from the first change on; before it the genesis says who they are"""
MANDATED: Final = 17
"""(MANDATED, broker, start_s, device, carrier, revision) → MandatedRow, where a provider still holds a slice of what
its own device made under that broker's mandate: an index"""
VALIDATOR_CHANGES: Final = 18
"""(VALIDATOR_CHANGES, sequence) → ValidatorChangeRow"""

Key = tuple[Any, ...]


class PartyRow(NamedTuple):
    role: int
    cose_key: bytes


class KeyRow(NamedTuple):
    """Whose key this is; `holder` is a KeyHolder, as names of parties and devices do not mix.

    A key that gave way to another serves only for intervals that start before `retired_from_s`, and only until the
    market clock reaches `grace_until_s`. A revoked one serves for nothing.
    """

    holder: int
    name: str
    cose_key: bytes
    retired_from_s: int | None
    grace_until_s: int | None
    revoked: bool


class DeviceRow(NamedTuple):
    owner: str
    meter_key: bytes
    source: int
    carrier: int
    capacity_w: int
    area: str
    place: str
    commissioned_s: int


class MandateSpan(NamedTuple):
    """One mandate: for production intervals that start in [from_s, end_s), open-ended while end_s is None."""

    broker: str
    from_s: int
    end_s: int | None


class MandatesRow(NamedTuple):
    spans: tuple[MandateSpan, ...]


class Held(NamedTuple):
    """A slice that an owner holds and has not delivered."""

    from_wh: int
    to_wh: int
    owner: str


class AssetRow(NamedTuple):
    """`held` is sorted, disjoint, and adjacent slices of one owner are joined. `deliveries` counts slices delivered."""

    source: int
    area: str
    issued_wh: int
    delivered_wh: int
    withdrawn_wh: int
    expired_wh: int
    held: tuple[Held, ...]
    deliveries: int


class SliceRow(NamedTuple):
    """`sequence` counts the deliveries from one asset: the newest has the highest."""

    to_wh: int
    broker: str
    pseudonym: bytes
    demand_start_s: int
    line: int
    sequence: int


class OwnedRow(NamedTuple):
    """`keeper`: the broker under whose mandate a provider holds what its own device made; None for all else."""

    source: int
    keeper: str | None


class DemandRow(NamedTuple):
    broker: str
    demanded_wh: int
    commitment: bytes
    delivered_wh: int
    revision: int


class TotalRow(NamedTuple):
    """Wh of one source made in one interval, and where they are now."""

    issued_wh: int
    held_wh: int
    delivered_wh: int
    withdrawn_wh: int
    expired_wh: int


class OrderRow(NamedTuple):
    """`content` is the id of the one Order message that this order id stands for; None if voided before any use."""

    content: bytes | None
    used_wh: int
    voided: bool


class ClosedRow(NamedTuple):
    """`lowered_wh`: by how much corrections of demands have lowered them since."""

    revision: int
    demands: int
    demanded_wh: int
    root: bytes
    lowered_wh: int


class ClockRow(NamedTuple):
    """The end of the last interval that the broker closed."""

    time_s: int


class AppliedRow(NamedTuple):
    """Nothing beyond its key."""


class MeteredRow(NamedTuple):
    """What a device metered in an interval according to its last `revision`, and what became of it.

    `high_water_wh` is where the range of the next revision's asset begins, `net_wh` what is issued and not withdrawn
    over all revisions.
    """

    revision: int
    energy_wh: int
    high_water_wh: int
    net_wh: int


class CarryRow(NamedTuple):
    """Wh of a device that the next issue adds; negative: that it takes off."""

    energy_wh: int


class Validator(NamedTuple):
    """One node that signs blocks and checkpoints, and its voting power."""

    name: str
    cose_key: bytes
    power: int


class ValidatorsRow(NamedTuple):
    """All validators by name, after the change with that sequence."""

    sequence: int
    validators: tuple[Validator, ...]


class ValidatorChangeRow(NamedTuple):
    """A change of validators as the registrars signed it, each of them one statement."""

    statements: tuple[bytes, ...]


class MandatedRow(NamedTuple):
    """Nothing beyond its key."""


Row = (
    PartyRow
    | KeyRow
    | DeviceRow
    | MandatesRow
    | AssetRow
    | SliceRow
    | OwnedRow
    | DemandRow
    | TotalRow
    | OrderRow
    | ClosedRow
    | ClockRow
    | AppliedRow
    | MeteredRow
    | CarryRow
    | ValidatorsRow
    | ValidatorChangeRow
    | MandatedRow
)

_ROWS: Final[Mapping[int, tuple[int, Any]]] = {
    # table: (items in a key, class of a row)
    PARTY: (2, PartyRow),
    KEY: (2, KeyRow),
    DEVICE: (2, DeviceRow),
    MANDATES: (2, MandatesRow),
    ASSET: (5, AssetRow),
    SLICE: (6, SliceRow),
    OWNED: (6, OwnedRow),
    DEMAND: (3, DemandRow),
    TOTAL: (3, TotalRow),
    ORDER: (3, OrderRow),
    CLOSED: (3, ClosedRow),
    CLOCK: (2, ClockRow),
    APPLIED: (4, AppliedRow),
    METERED: (4, MeteredRow),
    CARRY: (3, CarryRow),
    VALIDATORS: (2, ValidatorsRow),
    MANDATED: (6, MandatedRow),
    VALIDATOR_CHANGES: (2, ValidatorChangeRow),
}

_SCANNED: Final[Mapping[int, int]] = {APPLIED: 2, OWNED: 2, MANDATED: 2, SLICE: 5, VALIDATOR_CHANGES: 1}
"""table: items of the prefix with which it is scanned."""

ABSENT: Final = cbor.encode(None)
"""How a row that does not exist stands in the state hash."""


_UNWRITTEN: Final = object()


def asset_key(asset: AssetId) -> Key:
    """The state key of an asset; the start first, so that the assets of an interval stand together."""
    return (ASSET, asset.start_s, asset.device, int(asset.carrier), asset.revision)


def encode_key(key: Key) -> bytes:
    """The bytes of a key: the CBOR array of its items."""
    return _key_head(key[:-1]) + cbor.encode(key[-1])


@lru_cache(maxsize=4_096)
def _key_head(items: Key) -> bytes:
    # Thousands of keys in a row differ in the last item only, so the bytes of the others are remembered.
    return bytes((0x80 + len(items) + 1,)) + cbor.encode(items)[1:]


def encode_row(row: Row | None) -> bytes:
    """The bytes of a row, ABSENT for None."""
    return ABSENT if row is None else cbor.encode(row)


def decode_key(raw: bytes) -> Key:
    """A key from its bytes. Raises ValueError if these cannot be a key."""
    key = _items(raw)
    if type(key) is not list or not key or type(key[0]) is not int or len(key) != _ROWS.get(key[0], (0,))[0]:
        raise ValueError(f"{raw.hex()} is no state key")
    return tuple(key)


def decode_row(table: int, raw: bytes) -> Row:
    """A row of `table` from its bytes. Raises ValueError if these cannot be one."""
    try:
        items = _items(raw)
        if table == ASSET:
            items[6] = tuple([Held(*held) for held in items[6]])
        elif table == MANDATES:
            items[0] = tuple([MandateSpan(*span) for span in items[0]])
        elif table == VALIDATORS:
            items[1] = tuple([Validator(*validator) for validator in items[1]])
        elif table == VALIDATOR_CHANGES:
            items[0] = tuple(items[0])
        row: Row = _ROWS[table][1](*items)
    except (TypeError, IndexError, KeyError) as error:
        raise ValueError(f"{raw.hex()} is no row of table {table}") from error
    return row


def _items(raw: bytes) -> Any:
    try:
        return cbor.decode(raw, "ledger state", len(raw))
    except MalformedMessage as error:
        raise ValueError(str(error)) from error


def scan_bounds(prefix: Key, low: int, high: int) -> tuple[bytes, bytes]:
    """The encoded bounds [from, to) of all keys that begin with `prefix` and go on with an integer in [low, high)."""
    head = bytes((0x80 + _ROWS[prefix[0]][0],))
    items = cbor.encode(prefix)[1:]
    return head + items + cbor.encode(low), head + items + cbor.encode(high)


def prefix_bounds(prefix: Key) -> tuple[bytes, bytes]:
    """The encoded bounds [from, to) of all keys that begin with `prefix` and go on."""
    head = bytes((0x80 + _ROWS[prefix[0]][0],)) + cbor.encode(prefix)[1:]
    return head, head + b"\xff"  # No CBOR item of a key begins with 0xff.


def table_bounds(table: int) -> tuple[bytes, bytes]:
    """The encoded bounds [from, to) of all keys of a table."""
    head = bytes((0x80 + _ROWS[table][0],))
    return head + cbor.encode(table), head + cbor.encode(table + 1)


class State(Protocol):
    """Rows by key, as of some moment."""

    def get(self, key: Key) -> Any:
        """The row under `key`, None if there is none."""

    def scan(self, prefix: Key, low: int, high: int) -> Iterator[Key]:
        """The keys that begin with `prefix` and go on with an integer in [low, high), ascending by their bytes.

        Nothing may be written while it is read.
        """


class Overlay:
    """A state with changes on top: what one batch, or all batches since the last commit, have written."""

    __slots__ = ("_base", "_found", "_looked_at", "created", "written")

    def __init__(self, base: State) -> None:
        self._base = base
        # The written keys of tables that are scanned, by prefix: so many of the written ones have been looked at.
        self._found: dict[Key, list[Key]] = {}
        self._looked_at = 0
        self.written: dict[Key, Row | None] = {}
        self.created: set[Key] = set()

    def get(self, key: Key) -> Any:
        row = self.written.get(key, _UNWRITTEN)
        return self._base.get(key) if row is _UNWRITTEN else row

    def put(self, key: Key, row: Row | None) -> None:
        """Write a row; None deletes it."""
        self.written[key] = row

    def create(self, key: Key, row: Row) -> None:
        """Write a row that cannot be in the base, which spares looking for it, unless this overlay has deleted it."""
        if key not in self.written:
            self.created.add(key)
        self.written[key] = row

    def scan(self, prefix: Key, low: int, high: int) -> Iterator[Key]:
        written, at = self.written, len(prefix)
        if self._looked_at < len(written):
            # Keys are only ever added, at the end; so a batch full of scans looks at each written key once.
            for key in islice(written, self._looked_at, None):
                length = _SCANNED.get(key[0])
                if length is not None:
                    self._found.setdefault(key[:length], []).append(key)
            self._looked_at = len(written)
        mine = [key for key in self._found.get(prefix, ()) if written[key] is not None and low <= key[at] < high]
        base = (key for key in self._base.scan(prefix, low, high) if key not in written)
        return merge(sorted(mine, key=encode_key), base, key=encode_key) if mine else base


def changes_of(overlay: Overlay, base: State) -> list[tuple[bytes, bytes, bytes]]:
    """What a batch changed, as (key, old row, new row) in ascending order of the key's bytes; ABSENT for no row."""
    changes = []
    created = overlay.created
    for key, row in overlay.written.items():
        old = ABSENT if key in created else encode_row(base.get(key))
        new = encode_row(row)
        if old != new:
            changes.append((encode_key(key), old, new))
    changes.sort()
    return changes


def state_hash_after(previous: bytes, batch_id: bytes, changes: list[tuple[bytes, bytes, bytes]]) -> bytes:
    """SHA-256 of the hash before, the batch and every change. Each part delimits itself, being one CBOR item."""
    parts = [previous, batch_id]
    for change in changes:
        parts += change
    return sha256(b"".join(parts)).digest()
