"""Do a ledger's rows add up? What can be said of a state without the operations that made it.

For every asset: issued = held + delivered + withdrawn + expired, its delivered slices are that many Wh, and no two of
its ranges overlap. For every source and interval: the total is the sum of its assets. Every holder stands in the index
of holders, and nobody else. Memory stays bounded: the tables are read side by side in the order of their keys.
"""

from collections import Counter
from collections.abc import Iterator

from broker.ledger.state import (
    ASSET,
    OWNED,
    SLICE,
    TOTAL,
    AssetRow,
    Key,
    Row,
    SliceRow,
    TotalRow,
    decode_key,
    decode_row,
    scan_bounds,
    table_bounds,
)
from broker.ledger.store import Store


def book_faults(store: Store) -> Iterator[str]:
    """What does not add up, one sentence each; nothing if all of it does."""
    slices = _Slices(store)
    start_s: int | None = None
    sums: dict[int, Counter[str]] = {}
    owners = totals = 0
    for key, asset in _rows(store, ASSET):
        assert isinstance(asset, AssetRow)
        if key[1] != start_s:
            yield from _total_faults(store, start_s, sums)
            totals += len(sums)
            start_s, sums = key[1], {}
        delivered, orphans = slices.of(key[1:])
        yield from (f"slice {orphan} belongs to no asset" for orphan in orphans)
        yield from _asset_faults(key, asset, delivered)
        holders = {held.owner for held in asset.held}
        owners += len(holders)
        found = store.read([(OWNED, holder, *key[1:]) for holder in holders])
        yield from (f"{missing} is missing in the index of holders" for missing, row in found.items() if row is None)
        total = sums.setdefault(asset.source, Counter())
        total["held_wh"] += sum([held.to_wh - held.from_wh for held in asset.held])
        for name in ("issued_wh", "delivered_wh", "withdrawn_wh", "expired_wh"):
            total[name] += getattr(asset, name)
    yield from _total_faults(store, start_s, sums)
    totals += len(sums)
    yield from (f"slice {orphan} belongs to no asset" for orphan in slices.rest())
    for table, expected, what in ((OWNED, owners, "holders"), (TOTAL, totals, "sources and intervals")):
        found_rows = sum(1 for _ in store.state_rows(*table_bounds(table)))
        if found_rows != expected:
            yield f"there are {found_rows} rows for {expected} {what}"


def _asset_faults(key: Key, asset: AssetRow, delivered: list[tuple[int, int]]) -> Iterator[str]:
    held = [(item.from_wh, item.to_wh) for item in asset.held]
    held_wh, delivered_wh = (sum([high - low for low, high in ranges]) for ranges in (held, delivered))
    if asset.issued_wh != held_wh + asset.delivered_wh + asset.withdrawn_wh + asset.expired_wh:
        yield f"asset {key}: {asset.issued_wh} Wh are issued, which is not what became of them"
    if asset.delivered_wh != delivered_wh:
        yield f"asset {key}: {asset.delivered_wh} Wh are delivered, its slices have {delivered_wh}"
    end = 0
    for low, high in sorted(held + delivered):
        if low < end or high <= low:
            yield f"asset {key}: [{low}, {high}) is there twice, or empty"
        end = high


def _total_faults(store: Store, start_s: int | None, sums: dict[int, Counter[str]]) -> Iterator[str]:
    """Compare the totals of one interval."""
    if start_s is None:
        return
    totals = store.state_rows(*scan_bounds((TOTAL,), start_s, start_s + 1))
    stored = {decode_key(key)[2]: decode_row(TOTAL, row) for key, row in totals}
    for source in sorted(stored.keys() | sums.keys()):
        total, expected = stored.get(source), sums.get(source, Counter())
        if not isinstance(total, TotalRow) or total._asdict() != {name: expected[name] for name in TotalRow._fields}:
            yield f"the total of source {source} at {start_s} is not the sum of its assets"


class _Slices:
    """The delivered slices in the order of their assets."""

    def __init__(self, store: Store) -> None:
        self._rows = _rows(store, SLICE)
        self._following = next(self._rows, None)

    def of(self, asset: Key) -> tuple[list[tuple[int, int]], list[Key]]:
        """The ranges of the next asset's slices, and the keys of slices before it, which have no asset."""
        ranges, orphans = [], []
        while self._following is not None and _not_after(self._following[0][1:5], asset):
            key, row = self._following
            assert isinstance(row, SliceRow)
            if key[1:5] == asset:
                ranges.append((key[5], row.to_wh))
            else:
                orphans.append(key)
            self._following = next(self._rows, None)
        return ranges, orphans

    def rest(self) -> Iterator[Key]:
        """The keys of slices after the last asset."""
        while self._following is not None:
            yield self._following[0]
            self._following = next(self._rows, None)


def _not_after(one: Key, other: Key) -> bool:
    """Whether `one` comes no later in the order of keys, in which shorter names come first."""
    return (one[0], len(one[1]), *one[1:]) <= (other[0], len(other[1]), *other[1:])


def _rows(store: Store, table: int) -> Iterator[tuple[Key, Row]]:
    for raw_key, raw in store.state_rows(*table_bounds(table)):
        yield decode_key(raw_key), decode_row(table, raw)
