"""Plain views of a ledger for people and exports: blocks, assets, demands, deliveries, orders. Read-only.

Each function opens the ledger directory, also while an engine runs on it, yields rows of one moment in a stable order,
and closes it again. They show what is stored row by row; `audit` adds it up, and whether it is right is for
`verify.verify_ledger` to say. All raise LedgerError for a directory without a readable ledger.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker.ledger.opening import charter_of
from broker.ledger.operations import AssetId, Operation, Transfer, decode_operation
from broker.ledger.rules import validators_now
from broker.ledger.state import (
    ASSET,
    CARRY,
    DEMAND,
    KEY,
    METERED,
    SLICE,
    AssetRow,
    CarryRow,
    DemandRow,
    Held,
    Key,
    KeyRow,
    MeteredRow,
    Row,
    SliceRow,
    decode_key,
    decode_row,
    table_bounds,
)
from broker.ledger.store import FILE_NAME, LedgerError, Store
from broker.ledger.trust import trust_of
from broker.protocol import envelope
from broker.protocol.errors import MalformedMessage
from broker.protocol.messages import Batch, Block, Carrier, Genesis, KeyHolder, Order
from broker.protocol.sources import Source


@dataclass(frozen=True, slots=True)
class BlockLine:
    """One block. `size` is its bytes, `tree_size` counts all operations so far."""

    height: int
    block_id: bytes
    batches: int
    operations: int
    tree_size: int
    state_hash: bytes
    size: int


@dataclass(frozen=True, slots=True)
class AssetLine:
    """One asset: where it came from, and what became of every Wh of it."""

    asset: AssetId
    source: Source
    area: str
    issued_wh: int
    delivered_wh: int
    withdrawn_wh: int
    expired_wh: int
    held: tuple[Held, ...]


@dataclass(frozen=True, slots=True)
class DemandLine:
    """A consumer's demand under its pseudonym; what is not delivered after the broker's close is unmatched."""

    start_s: int
    pseudonym: bytes
    broker: str
    demanded_wh: int
    delivered_wh: int
    revision: int


@dataclass(frozen=True, slots=True)
class DeliveryLine:
    """A delivered slice `[from_wh, to_wh)` of an asset."""

    asset: AssetId
    from_wh: int
    to_wh: int
    broker: str
    pseudonym: bytes
    demand_start_s: int
    line: int


@dataclass(frozen=True, slots=True)
class OrderTransfer:
    """A transfer under an order, in block `height`, and what became of those very Wh at its receiver."""

    height: int
    order_id: bytes
    requester: str
    asset: AssetId
    from_wh: int
    to_wh: int
    sender: str
    receiver: str
    price: int
    delivered: tuple[DeliveryLine, ...]


@dataclass(frozen=True, slots=True)
class MeteredLine:
    """What a device metered in an interval that was corrected, late or carried; `net_wh`: issued and not withdrawn."""

    device: str
    carrier: Carrier
    start_s: int
    revision: int
    energy_wh: int
    high_water_wh: int
    net_wh: int


@dataclass(frozen=True, slots=True)
class CarryLine:
    """Wh that a device's next issue adds, or takes off where it is negative."""

    device: str
    carrier: Carrier
    energy_wh: int


@dataclass(frozen=True, slots=True)
class KeyLine:
    """A key of a party or of a device's meter; one that gave way to another says until when it serves."""

    key_id: bytes
    holder: KeyHolder
    name: str
    retired_from_s: int | None
    grace_until_s: int | None
    revoked: bool


@dataclass(frozen=True, slots=True)
class ValidatorLine:
    """Who signs blocks, after the change of validators with that sequence (0: as the genesis says)."""

    sequence: int
    name: str
    cose_key: bytes
    power: int


def genesis(path: Path) -> Genesis:
    """What the ledger was founded on."""
    with opened(path) as store:
        return _genesis(store)


def height(path: Path) -> int:
    """The height of the last block; 0 before the first."""
    with opened(path) as store:
        last = store.last_block()
        return 0 if last is None else last[0]


def blocks(path: Path) -> Iterator[BlockLine]:
    """All blocks by height."""
    with opened(path) as store:
        for height, block_id, raw in store.blocks():
            block = _block(raw)
            operations = sum(len(_batch(batch).operations) for batch in block.batches)
            yield BlockLine(
                height, block_id, len(block.batches), operations, block.tree_size, block.state_hash, len(raw)
            )


def operations(path: Path) -> Iterator[tuple[int, Operation]]:
    """(height, operation) of every operation in the order applied."""
    with opened(path) as store:
        yield from _operations(store)


def assets(path: Path) -> Iterator[AssetLine]:
    """All assets by interval and device."""
    with opened(path) as store:
        for key, row in _rows(store, ASSET):
            assert isinstance(row, AssetRow)
            yield AssetLine(
                _asset(key),
                Source(row.source),
                row.area,
                row.issued_wh,
                row.delivered_wh,
                row.withdrawn_wh,
                row.expired_wh,
                row.held,
            )


def demands(path: Path) -> Iterator[DemandLine]:
    """All demands by interval and pseudonym."""
    with opened(path) as store:
        for key, row in _rows(store, DEMAND):
            assert isinstance(row, DemandRow)
            yield DemandLine(key[1], key[2], row.broker, row.demanded_wh, row.delivered_wh, row.revision)


def deliveries(path: Path) -> Iterator[DeliveryLine]:
    """All delivered slices by interval of generation, device and range."""
    with opened(path) as store:
        for key, row in _rows(store, SLICE):
            yield _delivery(key, row)


def metered(path: Path) -> Iterator[MeteredLine]:
    """Device intervals that were corrected, late or carried, by interval and device."""
    with opened(path) as store:
        for key, row in _rows(store, METERED):
            assert isinstance(row, MeteredRow)
            yield MeteredLine(key[2], Carrier(key[3]), key[1], *row)


def carried(path: Path) -> Iterator[CarryLine]:
    """What devices carry to their next issues."""
    with opened(path) as store:
        for key, row in _rows(store, CARRY):
            assert isinstance(row, CarryRow)
            yield CarryLine(key[1], Carrier(key[2]), row.energy_wh)


def keys(path: Path) -> Iterator[KeyLine]:
    """All keys of parties and meters, those that gave way or are revoked included."""
    with opened(path) as store:
        for key, row in _rows(store, KEY):
            assert isinstance(row, KeyRow)
            yield KeyLine(key[1], KeyHolder(row.holder), row.name, row.retired_from_s, row.grace_until_s, row.revoked)


def validators(path: Path) -> Iterator[ValidatorLine]:
    """Who signs blocks now, by name."""
    with opened(path) as store:
        row = validators_now(store, charter_of(_genesis(store)))
        for validator in row.validators:
            yield ValidatorLine(row.sequence, *validator)


def trust_now(path: Path) -> dict[str, Any]:
    """The trust file of the ledger as of its head (`trust.trust_of`): its validators of now, from this height on."""
    with opened(path) as store:
        genesis = _genesis(store)
        return trust_of(genesis, validators_now(store, charter_of(genesis)), store.height())


def order_transfers(path: Path, order_id: bytes | None = None) -> Iterator[OrderTransfer]:
    """Transfers under orders between brokers, of one order or of all, in the order applied."""
    with opened(path) as store:
        for height, operation in _operations(store):
            if not isinstance(operation, Transfer) or operation.order is None:
                continue
            order = Order.from_payload(envelope.parse(operation.order).payload)
            if order_id is not None and order.order_id != order_id:
                continue
            yield OrderTransfer(
                height,
                order.order_id,
                order.requester,
                operation.asset,
                operation.from_wh,
                operation.to_wh,
                operation.sender,
                operation.receiver,
                operation.price,
                tuple(_delivered_from(store, operation)),
            )


def _delivered_from(store: Store, transfer: Transfer) -> Iterator[DeliveryLine]:
    """The receiver's deliveries that lie in the transferred range, wholly or in part."""
    asset = transfer.asset
    prefix = (SLICE, asset.start_s, asset.device, int(asset.carrier), asset.revision)
    for key in store.scan(prefix, 0, transfer.to_wh):
        line = _delivery(key, store.get(key))
        if line.to_wh > transfer.from_wh and line.broker == transfer.receiver:
            yield line


def _delivery(key: Key, row: Row) -> DeliveryLine:
    assert isinstance(row, SliceRow)
    return DeliveryLine(_asset(key), key[5], row.to_wh, row.broker, row.pseudonym, row.demand_start_s, row.line)


def _asset(key: Key) -> AssetId:
    return AssetId(key[2], Carrier(key[3]), key[1], key[4])


def _rows(store: Store, table: int) -> Iterator[tuple[Key, Row]]:
    for raw_key, raw in store.state_rows(*table_bounds(table)):
        key = decode_key(raw_key)
        yield key, decode_row(table, raw)


def _operations(store: Store) -> Iterator[tuple[int, Operation]]:
    for height, _, raw in store.blocks():
        for batch in _block(raw).batches:
            for encoded in _batch(batch).operations:
                yield height, decode_operation(encoded)


def _block(raw: bytes) -> Block:
    return Block.from_payload(envelope.parse(raw).payload)


def _batch(raw: bytes) -> Batch:
    return Batch.from_payload(envelope.parse(raw).payload)


def _genesis(store: Store) -> Genesis:
    return Genesis.from_bytes(store.meta("genesis") or b"")


@contextmanager
def opened(path: Path) -> Iterator[Store]:
    """The ledger in directory `path`, to read what stands there at one moment. Raises LedgerError."""
    if not (path / FILE_NAME).is_file():
        raise LedgerError(path, f"holds no {FILE_NAME}; give the ledger's directory")
    try:
        store = Store.open_read_only(path / FILE_NAME)
        try:
            with store.snapshot():
                yield store
        finally:
            store.close()
    except (sqlite3.Error, MalformedMessage, ValueError, IndexError) as error:
        raise LedgerError(path, f"cannot be read: {error}; run `energy-broker ledger verify` on it") from error
