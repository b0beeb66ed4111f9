"""The broker's stock: slices of assets that it owns and has not promised to anyone, kept in order for taking.

Stock follows the ledger's feed: what the feed says this broker now owns is added, what is withdrawn from it is removed,
and after a restart the ledger's holdings are added again. Taking is the broker's own reservation on the way to a
delivery or a transfer; if that is refused, the slices are added again.

Two stocks that hold the same Wh behave the same, whatever happened before: slices of one asset that touch and have the
lot are merged, and taking goes by device name, asset and range: over a whole source, or within given lots where it
matters whose energy it is. So a broker that was restarted in the middle of an interval decides as if it had not been.
"""

import heapq
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from broker.market.lots import Lot
from broker.protocol.market_time import Interval
from broker.protocol.sources import Source

AssetKey = tuple[str, int, int, int]
"""What names an asset on the ledger: (device, carrier, start_s, revision)."""


class StockError(Exception):
    """The stock was asked for what it does not hold, or given what it holds already: it and the ledger differ.

    `asset` names the asset, or the source where any asset would do.
    """

    def __init__(self, asset: AssetKey | Source, problem: str) -> None:
        name = asset.label if isinstance(asset, Source) else "/".join([str(part) for part in asset])
        super().__init__(f"{name}: {problem}; rebuild the stock from the ledger's holdings")
        self.asset = asset


class HeldSlice(NamedTuple):
    """The Wh `[from_wh, to_wh)` of an asset of the interval `[start_s, end_s)`, at µ-currency per kWh.

    `provider`, `reserved` and `only_for` are those of the lot that it belongs to (see `lots.Lot`). A named tuple,
    because each delivery makes several, and a frozen dataclass takes five times as long to make.
    """

    asset: AssetKey
    source: Source
    start_s: int
    end_s: int
    from_wh: int
    to_wh: int
    price: int
    provider: str = ""
    reserved: bool = False
    only_for: tuple[str, ...] = ()

    @property
    def lot(self) -> Lot:
        return Lot(self.source, self.start_s, self.provider, self.price, self.reserved, self.only_for)

    @property
    def energy_wh(self) -> int:
        return self.to_wh - self.from_wh


class _Shelf:
    """All slices of one source and interval.

    `by_asset` is what is there: per asset, disjoint slices by range. `order` is a heap of (asset, from_wh) that says
    what to take next; it may hold entries of slices that are gone, which are passed over. `order_in_lot` is the same
    for each lot, made when somebody first takes from a lot. `kept` is true once anything was here that is not for all.
    """

    __slots__ = ("by_asset", "energy_wh", "kept", "order", "order_in_lot")

    def __init__(self) -> None:
        self.by_asset: dict[AssetKey, list[HeldSlice]] = {}
        self.order: list[tuple[AssetKey, int]] = []
        self.energy_wh = 0
        self.order_in_lot: dict[Lot, list[tuple[AssetKey, int]]] | None = None
        self.kept = False

    def add(self, piece: HeldSlice) -> None:
        slices = self.by_asset.setdefault(piece.asset, [])
        at = bisect_left(slices, piece.from_wh, key=_from_wh)
        if (at > 0 and slices[at - 1].to_wh > piece.from_wh) or (at < len(slices) and slices[at].from_wh < piece.to_wh):
            raise StockError(piece.asset, f"some of [{piece.from_wh}, {piece.to_wh}) Wh is held already")
        self.energy_wh += piece.energy_wh
        self.kept = self.kept or piece.reserved
        if at < len(slices) and slices[at].from_wh == piece.to_wh and slices[at].lot == piece.lot:
            piece = _part(piece, piece.from_wh, slices.pop(at).to_wh)
        if at > 0 and slices[at - 1].to_wh == piece.from_wh and slices[at - 1].lot == piece.lot:
            slices[at - 1] = _part(piece, slices[at - 1].from_wh, piece.to_wh)
            return
        slices.insert(at, piece)
        self._put_in_order(piece)

    def _put_in_order(self, piece: HeldSlice) -> None:
        heapq.heappush(self.order, (piece.asset, piece.from_wh))
        if self.order_in_lot is not None:
            heapq.heappush(self.order_in_lot.setdefault(piece.lot, []), (piece.asset, piece.from_wh))

    def remove(self, asset: AssetKey, from_wh: int, to_wh: int) -> None:
        """Cut `[from_wh, to_wh)` out. Raises StockError, with nothing changed, if not all of it is here."""
        slices = self.by_asset.get(asset, [])
        cut = [piece for piece in slices if piece.from_wh < to_wh and from_wh < piece.to_wh]
        if sum([min(piece.to_wh, to_wh) - max(piece.from_wh, from_wh) for piece in cut]) != to_wh - from_wh:
            raise StockError(asset, f"not all of [{from_wh}, {to_wh}) Wh is held")
        kept = [piece for piece in slices if piece not in cut]
        if cut[0].from_wh < from_wh:
            kept.append(_part(cut[0], cut[0].from_wh, from_wh))
        if to_wh < cut[-1].to_wh:
            kept.append(_part(cut[-1], to_wh, cut[-1].to_wh))
            self._put_in_order(kept[-1])
        kept.sort(key=_from_wh)
        if kept:
            self.by_asset[asset] = kept
        else:
            del self.by_asset[asset]
        self.energy_wh -= to_wh - from_wh

    def take(self, energy_wh: int) -> list[HeldSlice]:
        """Remove the first `energy_wh` Wh in order; the caller has checked that they are here."""
        return self._take_in(self.order, None, energy_wh)

    def take_in_lot(self, lot: Lot, most_wh: int) -> list[HeldSlice]:
        """Remove up to `most_wh` Wh of one lot in order."""
        if self.order_in_lot is None:
            self.order_in_lot = {}
            for slices in self.by_asset.values():
                for piece in slices:
                    self.order_in_lot.setdefault(piece.lot, []).append((piece.asset, piece.from_wh))
            for order in self.order_in_lot.values():
                heapq.heapify(order)
        return self._take_in(self.order_in_lot.get(lot, []), lot, most_wh)

    def _take_in(self, order: list[tuple[AssetKey, int]], lot: Lot | None, most_wh: int) -> list[HeldSlice]:
        taken: list[HeldSlice] = []
        while most_wh and order:
            asset, from_wh = order[0]
            slices = self.by_asset.get(asset, [])
            # Nearly always the asset is used from its first Wh on, and the next slice is its first.
            at = 0 if slices and slices[0].from_wh == from_wh else bisect_left(slices, from_wh, key=_from_wh)
            if at == len(slices) or slices[at].from_wh != from_wh or (lot is not None and slices[at].lot != lot):
                heapq.heappop(order)
                continue
            piece = slices[at]
            if piece.energy_wh > most_wh:
                split_wh = from_wh + most_wh
                taken.append(_part(piece, from_wh, split_wh))
                slices[at] = _part(piece, split_wh, piece.to_wh)
                heapq.heapreplace(order, (asset, split_wh))
                if lot is not None:
                    heapq.heappush(self.order, (asset, split_wh))
                elif self.order_in_lot is not None:
                    heapq.heappush(self.order_in_lot.setdefault(piece.lot, []), (asset, split_wh))
            else:
                heapq.heappop(order)
                taken.append(slices.pop(at))
                if not slices:
                    del self.by_asset[asset]
            most_wh -= taken[-1].energy_wh
            self.energy_wh -= taken[-1].energy_wh
        return taken

    def set_provider(self, device: str, provider: str) -> None:
        of_device = [asset for asset in self.by_asset if asset[0] == device]
        for asset in of_device:
            self.by_asset[asset] = [piece._replace(provider=provider) for piece in self.by_asset[asset]]
        if of_device:
            self.order_in_lot = None

    def lots(self) -> dict[Lot, int]:
        totals: dict[Lot, int] = {}
        for slices in self.by_asset.values():
            for piece in slices:
                totals[piece.lot] = totals.get(piece.lot, 0) + piece.energy_wh
        return totals


class Stock:
    """What the broker owns and has not promised, by interval and source."""

    __slots__ = ("_held_back", "_shelves")

    def __init__(self) -> None:
        self._shelves: dict[int, dict[Source, _Shelf]] = {}
        self._held_back: dict[Lot, int] = {}

    def add(self, piece: HeldSlice) -> None:
        """Put a slice into stock. Raises StockError if some of it is there already, or if it makes no sense."""
        if not 0 <= piece.from_wh < piece.to_wh or piece.asset[2] != piece.start_s:
            raise StockError(piece.asset, f"[{piece.from_wh}, {piece.to_wh}) Wh at {piece.start_s} is no slice of it")
        self._shelves.setdefault(piece.start_s, {}).setdefault(piece.source, _Shelf()).add(piece)

    def remove(self, asset: AssetKey, from_wh: int, to_wh: int) -> None:
        """Take exactly these Wh of this asset out of stock. Raises StockError if not all of them are there."""
        if not 0 <= from_wh < to_wh:
            raise StockError(asset, f"[{from_wh}, {to_wh}) Wh is no slice of it")
        for shelf in self._shelves.get(asset[2], {}).values():
            if asset in shelf.by_asset:
                shelf.remove(asset, from_wh, to_wh)
                return
        raise StockError(asset, "it is not held")

    def available(self, interval: Interval) -> dict[Source, int]:
        """Wh of each source generated in this market interval; sources of which there is none are left out."""
        return {
            source: shelf.energy_wh
            for source, shelf in sorted(self._shelves.get(interval.start_s, {}).items())
            if shelf.energy_wh
        }

    def hold_back(self, held_back: Mapping[Lot, int]) -> None:
        """From now on so many Wh of these lots, and of no others, are not free for neighbours: demands wait for them.

        Where a lot has less by then, all of it is held back.
        """
        self._held_back = dict(held_back)

    def holds_back_of(self, provider: str) -> bool:
        """True if demands wait for energy of this provider; "" stands for those who are not known."""
        return any(lot.provider == provider for lot in self._held_back)

    def slices(self, interval: Interval) -> Iterator[HeldSlice]:
        """What was generated in this interval and is not held back, by source, asset and range; takes nothing."""
        held_back = {lot: wh for lot, wh in self._held_back.items() if lot.start_s == interval.start_s}
        for _, shelf in sorted(self._shelves.get(interval.start_s, {}).items()):
            if not held_back:
                for asset in sorted(shelf.by_asset):
                    yield from shelf.by_asset[asset]
                continue
            free_wh = {lot: max(0, wh - held_back.get(lot, 0)) for lot, wh in shelf.lots().items()}
            for asset in sorted(shelf.by_asset):
                for piece in shelf.by_asset[asset]:
                    part_wh = min(piece.energy_wh, free_wh[piece.lot])
                    free_wh[piece.lot] -= part_wh
                    if part_wh:
                        yield _part(piece, piece.from_wh, piece.from_wh + part_wh)

    def lots(self, from_s: int, until_s: int) -> dict[Lot, int]:
        """Wh of each lot, of the intervals that start in `[from_s, until_s)`; by interval, source and lot."""
        totals: dict[Lot, int] = {}
        for start_s in sorted([start_s for start_s in self._shelves if from_s <= start_s < until_s]):
            for _, shelf in sorted(self._shelves[start_s].items()):
                totals.update(sorted(shelf.lots().items()))
        return totals

    def holds_reserves(self, interval: Interval) -> bool:
        """True if energy of this interval may be kept for this broker's consumers, or for some of them."""
        return any(shelf.kept for shelf in self._shelves.get(interval.start_s, {}).values())

    def take(self, source: Source, interval_start_s: int, energy_wh: int) -> list[HeldSlice]:
        """Take `energy_wh` Wh out of stock: by device name, asset and range, splitting the last slice.

        Raises StockError, with nothing taken, if there is less.
        """
        shelf = self._shelves.get(interval_start_s, {}).get(source)
        held_wh = shelf.energy_wh if shelf else 0
        if not 0 <= energy_wh <= held_wh:
            raise StockError(source, f"{energy_wh} Wh of the interval at {interval_start_s} wanted, {held_wh} held")
        return shelf.take(energy_wh) if shelf else []

    def take_lots(self, lots: Sequence[Lot], energy_wh: int) -> list[HeldSlice]:
        """Take `energy_wh` Wh of these lots, one after the other. Raises StockError, with nothing taken, if they hold
        less."""
        taken: list[HeldSlice] = []
        missing_wh = energy_wh
        for lot in lots:
            shelf = self._shelves.get(lot.start_s, {}).get(lot.source)
            if shelf is not None and missing_wh:
                slices = shelf.take_in_lot(lot, missing_wh)
                taken.extend(slices)
                missing_wh -= sum([piece.energy_wh for piece in slices])
        if missing_wh:
            for piece in taken:
                self.add(piece)
            raise StockError(lots[0].source, f"{energy_wh} Wh of {len(lots)} lots wanted, {missing_wh} fewer held")
        return taken

    def holds(self, asset: AssetKey, from_wh: int, to_wh: int) -> bool:
        """True if all of these Wh of this asset are in stock."""
        for shelf in self._shelves.get(asset[2], {}).values():
            pieces = shelf.by_asset.get(asset, [])
            inside = [min(piece.to_wh, to_wh) - max(piece.from_wh, from_wh) for piece in pieces]
            if pieces:
                return sum([energy_wh for energy_wh in inside if energy_wh > 0]) == to_wh - from_wh
        return False

    def set_provider(self, device: str, provider: str) -> None:
        """It has become known whose device this is: all that it made is of lots of that provider."""
        for shelves in self._shelves.values():
            for shelf in shelves.values():
                shelf.set_provider(device, provider)

    def drop_all(self) -> None:
        """Forget everything, before the ledger's holdings are put in anew."""
        self._shelves.clear()

    def drop_made(self, device: str, start_s: int) -> None:
        """Forget all that a device made in one interval, before it is put in anew."""
        for shelf in self._shelves.get(start_s, {}).values():
            for asset in [asset for asset in shelf.by_asset if asset[0] == device]:
                shelf.energy_wh -= sum([piece.energy_wh for piece in shelf.by_asset.pop(asset)])

    def drop_before(self, start_s: int) -> None:
        """Forget all intervals that start before `start_s`: what is left of them expires on the ledger by rule."""
        for old_s in [old_s for old_s in self._shelves if old_s < start_s]:
            del self._shelves[old_s]


def _from_wh(piece: HeldSlice) -> int:
    return piece.from_wh


def _part(piece: HeldSlice, from_wh: int, to_wh: int) -> HeldSlice:
    """The same asset over another range (spelled out, because `_replace` costs three times as much)."""
    asset, source, start_s, end_s, _, _, price, provider, reserved, only_for = piece
    return HeldSlice(asset, source, start_s, end_s, from_wh, to_wh, price, provider, reserved, only_for)
