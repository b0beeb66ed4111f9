"""The books of a ledger: what became of every Wh, by source, party, device, delivery and close. Read-only.

One pass over the state rows of one moment, also while an engine runs. On the way every sum is made again from the rows
beneath it and held against the one that is stored:

- issued = held + delivered + withdrawn + expired, for each asset and for each source and interval;
- a source's sums in an interval are those of its assets there;
- an asset's delivered Wh are its delivered slices, and no Wh of it stands in two slices;
- of one device and interval, all revisions together have issued, less what was withdrawn, what the METERED row says;
- over all time a device has metered what was issued to it, less what was withdrawn, plus what is carried on;
- a demand's delivered Wh are the slices that name it, and not more than it asked for.

Whether the rows themselves are right, from the first signature on, is for `verify.verify_ledger` to say. Memory holds
the sums that are reported, not the rows.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

from broker.ledger.inspect import opened
from broker.ledger.state import (
    ASSET,
    CARRY,
    CLOSED,
    DEMAND,
    DEVICE,
    METERED,
    PARTY,
    SLICE,
    TOTAL,
    Key,
    MeteredRow,
    SliceRow,
    decode_key,
    decode_row,
    encode_key,
    table_bounds,
)
from broker.ledger.store import Store
from broker.protocol.sources import Source

MAX_FAULTS: Final = 100
"""More faults than these say nothing new."""

_TABLE_BYTES: Final = 2
"""The head of a key's array, and the table's number."""


@dataclass(frozen=True, slots=True)
class SourceLine:
    """Wh of one source in the interval that begins at `start_s`: issued = held + delivered + withdrawn + expired."""

    start_s: int
    source: Source
    issued_wh: int
    held_wh: int
    delivered_wh: int
    withdrawn_wh: int
    expired_wh: int


@dataclass(frozen=True, slots=True)
class DeviceLine:
    """All that one device has made: in how many assets, and what became of it, whoever holds or delivered it.

    metered = issued - withdrawn + carried: corrections and capacity limits leave Wh for the next issues to add, or to
    take off where `carried_wh` is negative.
    """

    device: str
    owner: str
    source: Source
    assets: int
    metered_wh: int
    carried_wh: int
    issued_wh: int
    held_wh: int
    delivered_wh: int
    withdrawn_wh: int
    expired_wh: int


@dataclass(frozen=True, slots=True)
class PartyLine:
    """What one party's devices were issued and lost again, what it holds now, and what it has delivered as a broker."""

    party: str
    issued_wh: int
    withdrawn_wh: int
    expired_wh: int
    held_wh: int
    delivered_wh: int


@dataclass(frozen=True, slots=True)
class DeliveryLine:
    """What one broker delivered of one source to the demands of the interval that begins at `start_s`."""

    start_s: int
    broker: str
    source: Source
    slices: int
    delivered_wh: int


@dataclass(frozen=True, slots=True)
class CloseLine:
    """A broker's interval: what its close says, and what its demands on the ledger add up to.

    The ledger has only demands that something was delivered to or that are on record as unmatched, so it may have fewer
    than the close counts. `revision` to `root` are None while the interval is not closed.
    """

    start_s: int
    broker: str
    revision: int | None
    demands: int | None
    demanded_wh: int | None
    root: bytes | None
    recorded_demands: int
    recorded_wh: int
    delivered_wh: int


@dataclass(frozen=True, slots=True)
class Audit:
    """The books in stable order, and where they do not balance."""

    sources: tuple[SourceLine, ...]
    devices: tuple[DeviceLine, ...]
    parties: tuple[PartyLine, ...]
    deliveries: tuple[DeliveryLine, ...]
    closes: tuple[CloseLine, ...]
    faults: tuple[str, ...]


class _Sums(NamedTuple):
    issued_wh: int = 0
    held_wh: int = 0
    delivered_wh: int = 0
    withdrawn_wh: int = 0
    expired_wh: int = 0

    def plus(self, other: "_Sums") -> "_Sums":
        return _Sums(*[one + more for one, more in zip(self, other, strict=True)])

    def balances(self) -> bool:
        return min(self) >= 0 and self.issued_wh == sum(self[1:])


def audit_ledger(path: Path) -> Audit:
    """The books of the ledger in directory `path`. Raises LedgerError if it cannot be read."""
    with opened(path) as store:
        return audit_store(store)


def audit_store(store: Store) -> Audit:
    """The books of an open ledger. Raises sqlite3.Error, ValueError."""
    return _Books(store).audit()


class _Books:
    """The sums while the rows go by."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._faults: list[str] = []
        self._sources: defaultdict[tuple[int, int], _Sums] = defaultdict(_Sums)
        self._devices: defaultdict[str, _Sums] = defaultdict(_Sums)
        self._assets: Counter[str] = Counter()
        self._metered: Counter[str] = Counter()
        self._held: Counter[str] = Counter()
        self._delivered: Counter[str] = Counter()
        self._slices: Counter[tuple[int, str, int]] = Counter()
        self._slices_wh: Counter[tuple[int, str, int]] = Counter()
        self._recorded: defaultdict[tuple[int, str], tuple[int, int, int]] = defaultdict(lambda: (0, 0, 0))
        self._open_wh: Counter[tuple[int, bytes]] = Counter()
        """Delivered Wh of a demand by its slices less by its own row, where both are not seen yet."""

    def audit(self) -> Audit:
        self._read_assets()
        for (start_s, pseudonym), energy_wh in sorted(self._open_wh.items()):
            self._complain(
                f"demand {pseudonym.hex()} at {start_s}: its slices are {abs(energy_wh)} Wh"
                f" {'more' if energy_wh > 0 else 'less'} than it says was delivered"
            )
        sources = self._source_lines()
        owners = {key[1]: row for key, row in self._rows(DEVICE)}
        carried: Counter[str] = Counter()
        for key, row in self._rows(CARRY):
            carried[key[1]] += row.energy_wh
        for device in sorted(self._devices.keys() - owners.keys()):
            self._complain(f"device {device}: has assets and is not admitted")
        devices = tuple(
            DeviceLine(
                name,
                owners[name].owner,
                Source(owners[name].source),
                self._assets[name],
                self._metered[name],
                carried[name],
                *self._devices[name],
            )
            for name in sorted(owners)
        )
        for line in devices:
            if line.metered_wh != line.issued_wh - line.withdrawn_wh + line.carried_wh:
                self._complain(
                    f"device {line.device}: {line.metered_wh} Wh metered, but {line.issued_wh} issued"
                    f" - {line.withdrawn_wh} withdrawn + {line.carried_wh} carried"
                )
        return Audit(
            sources,
            devices,
            self._party_lines(devices),
            self._delivery_lines(),
            self._close_lines(),
            tuple(self._faults),
        )

    def _complain(self, fault: str) -> None:
        if len(self._faults) < MAX_FAULTS:
            self._faults.append(fault)

    def _rows(self, table: int) -> Iterator[tuple[Key, Any]]:
        for raw_key, raw in self._store.state_rows(*table_bounds(table)):
            yield decode_key(raw_key), decode_row(table, raw)

    def _read_assets(self) -> None:
        """Assets with their delivered slices and what was metered, which come in the same order, and the demands of the
        same time.
        """
        slices, metered, demands = self._slices_by_asset(), self._metered_rows(), self._rows(DEMAND)
        of_asset, of_interval, of_demand = next(slices, None), next(metered, None), next(demands, None)
        for interval, assets in groupby(self._rows(ASSET), key=lambda row: row[0][1:4]):
            revisions = list(assets)
            for key, row in revisions:
                raw_asset = encode_key(key)[_TABLE_BYTES:]
                while of_asset is not None and of_asset[0] < raw_asset:
                    self._complain_of_lost(of_asset[1])
                    of_asset = next(slices, None)
                own: list[tuple[Key, SliceRow]] = []
                if of_asset is not None and of_asset[0] == raw_asset:
                    own = of_asset[1]
                    of_asset = next(slices, None)
                self._read_asset(key, row, [(slice_key[5], item) for slice_key, item in own])
            raw_interval = encode_key((METERED, *interval))[_TABLE_BYTES:]
            while of_interval is not None and of_interval[0] < raw_interval:
                self._read_interval(of_interval[1][1:], of_interval[2], [])
                of_interval = next(metered, None)
            if of_interval is not None and of_interval[0] == raw_interval:
                self._read_interval(interval, of_interval[2], revisions)
                of_interval = next(metered, None)
            else:
                self._read_interval(interval, None, revisions)
            # A demand is settled once its slices were seen, so that only those of open windows wait.
            while of_demand is not None and of_demand[0][1] <= interval[0]:
                self._read_demand(*of_demand)
                of_demand = next(demands, None)
        while of_asset is not None:
            self._complain_of_lost(of_asset[1])
            of_asset = next(slices, None)
        while of_interval is not None:
            self._read_interval(of_interval[1][1:], of_interval[2], [])
            of_interval = next(metered, None)
        while of_demand is not None:
            self._read_demand(*of_demand)
            of_demand = next(demands, None)

    def _read_interval(self, interval: Key, metered: MeteredRow | None, revisions: list[tuple[Key, Any]]) -> None:
        """What a device metered in an interval, by its METERED row or else by its only asset, of revision 0."""
        start_s, device, _ = interval
        net_wh = sum(row.issued_wh - row.withdrawn_wh for _, row in revisions)
        if metered is None:
            if [key[4] for key, _ in revisions] != [0]:
                self._complain(f"{device} at {start_s}: corrected, and what it metered last is not on record")
            self._metered[device] += revisions[0][1].issued_wh
            return
        if metered.net_wh != net_wh:
            self._complain(
                f"{device} at {start_s}: {net_wh} Wh are issued and not withdrawn, on record {metered.net_wh}"
            )
        self._metered[device] += metered.energy_wh

    def _metered_rows(self) -> Iterator[tuple[bytes, Key, MeteredRow]]:
        return ((encode_key(key)[_TABLE_BYTES:], key, row) for key, row in self._rows(METERED))

    def _slices_by_asset(self) -> Iterator[tuple[bytes, list[tuple[Key, Any]]]]:
        """The delivered slices of one asset after the other, under what its key has behind the table.

        Both tables' keys begin with head and table and go on with the asset, so they come in the same order.
        """
        raw_rows = self._store.state_rows(*table_bounds(SLICE))
        rows = ((decode_key(raw_key), decode_row(SLICE, raw)) for raw_key, raw in raw_rows)
        for asset, group in groupby(rows, key=lambda row: row[0][1:5]):
            yield encode_key((ASSET, *asset))[_TABLE_BYTES:], list(group)

    def _complain_of_lost(self, slices: list[tuple[Key, Any]]) -> None:
        _, start_s, device, _, revision, _ = slices[0][0]
        self._complain(f"asset of {device} at {start_s}, revision {revision}: delivered, and there is no such asset")

    def _read_asset(self, key: Key, row: Any, slices: list[tuple[int, SliceRow]]) -> None:
        _, start_s, device, _, _ = key
        name = f"asset of {device} at {start_s}, revision {key[4]}"
        held_wh = sum(held.to_wh - held.from_wh for held in row.held)
        sums = _Sums(row.issued_wh, held_wh, row.delivered_wh, row.withdrawn_wh, row.expired_wh)
        if not sums.balances():
            self._complain(f"{name}: {_unbalanced(sums)}")
        delivered_wh = sum(item.to_wh - from_wh for from_wh, item in slices)
        if delivered_wh != row.delivered_wh:
            self._complain(f"{name}: its delivered slices are {delivered_wh} Wh, it says {row.delivered_wh}")
        ranges = [(held.from_wh, held.to_wh) for held in row.held] + [(low, item.to_wh) for low, item in slices]
        ranges.sort()
        if any(low >= high for low, high in ranges) or any(one[1] > other[0] for one, other in pairwise(ranges)):
            self._complain(f"{name}: some Wh of it stand in two slices")
        self._sources[start_s, row.source] = self._sources[start_s, row.source].plus(sums)
        self._devices[device] = self._devices[device].plus(sums)
        self._assets[device] += 1
        for held in row.held:
            self._held[held.owner] += held.to_wh - held.from_wh
        for from_wh, item in slices:
            energy_wh = item.to_wh - from_wh
            self._delivered[item.broker] += energy_wh
            self._slices[item.demand_start_s, item.broker, row.source] += 1
            self._slices_wh[item.demand_start_s, item.broker, row.source] += energy_wh
            self._settle((item.demand_start_s, item.pseudonym), energy_wh)

    def _read_demand(self, key: Key, row: Any) -> None:
        _, start_s, pseudonym = key
        if row.delivered_wh > row.demanded_wh:
            self._complain(
                f"demand {pseudonym.hex()} at {start_s}: {row.delivered_wh} of {row.demanded_wh} Wh are delivered"
            )
        self._settle((start_s, pseudonym), -row.delivered_wh)
        demands, demanded_wh, delivered_wh = self._recorded[start_s, row.broker]
        self._recorded[start_s, row.broker] = (
            demands + 1,
            demanded_wh + row.demanded_wh,
            delivered_wh + row.delivered_wh,
        )

    def _settle(self, demand: tuple[int, bytes], energy_wh: int) -> None:
        left_wh = self._open_wh[demand] + energy_wh
        if left_wh:
            self._open_wh[demand] = left_wh
        else:
            del self._open_wh[demand]

    def _source_lines(self) -> tuple[SourceLine, ...]:
        lines = []
        made = self._sources
        for key, row in self._rows(TOTAL):
            _, start_s, source = key
            sums = _Sums(row.issued_wh, row.held_wh, row.delivered_wh, row.withdrawn_wh, row.expired_wh)
            name = f"{Source(source).label} at {start_s}"
            if not sums.balances():
                self._complain(f"{name}: {_unbalanced(sums)}")
            if made.pop((start_s, source), _Sums()) != sums:
                self._complain(f"{name}: the sums are not those of its assets")
            lines.append(SourceLine(start_s, Source(source), *sums))
        for start_s, source in sorted(made):
            self._complain(f"{Source(source).label} at {start_s}: there are assets, but no sums")
        return tuple(lines)

    def _party_lines(self, devices: tuple[DeviceLine, ...]) -> tuple[PartyLine, ...]:
        own: defaultdict[str, list[DeviceLine]] = defaultdict(list)
        for line in devices:
            own[line.owner].append(line)
        names = {key[1] for key, _ in self._rows(PARTY)}
        for name in sorted((own.keys() | self._held.keys() | self._delivered.keys()) - names):
            self._complain(f"{name}: owns, holds or delivered, and is not registered")
            names.add(name)
        return tuple(
            PartyLine(
                name,
                sum(line.issued_wh for line in own[name]),
                sum(line.withdrawn_wh for line in own[name]),
                sum(line.expired_wh for line in own[name]),
                self._held[name],
                self._delivered[name],
            )
            for name in sorted(names)
        )

    def _delivery_lines(self) -> tuple[DeliveryLine, ...]:
        return tuple(
            DeliveryLine(start_s, broker, Source(source), self._slices[start_s, broker, source], energy_wh)
            for (start_s, broker, source), energy_wh in sorted(self._slices_wh.items())
        )

    def _close_lines(self) -> tuple[CloseLine, ...]:
        closed = {(key[2], key[1]): row for key, row in self._rows(CLOSED)}
        lines = []
        for start_s, broker in sorted(closed.keys() | self._recorded.keys()):
            row = closed.get((start_s, broker))
            recorded, recorded_wh, delivered_wh = self._recorded[start_s, broker]
            lines.append(
                CloseLine(
                    start_s,
                    broker,
                    None if row is None else row.revision,
                    None if row is None else row.demands,
                    None if row is None else row.demanded_wh,
                    None if row is None else row.root,
                    recorded,
                    recorded_wh,
                    delivered_wh,
                )
            )
        return tuple(lines)


def _unbalanced(sums: _Sums) -> str:
    parts = " + ".join(
        f"{value} {name.removesuffix('_wh')}" for name, value in sums._asdict().items() if name != "issued_wh"
    )
    return f"{sums.issued_wh} Wh issued, but {parts}"
