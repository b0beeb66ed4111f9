"""Demands that turn out to have been another amount: the ledger is told, then what was decided is mended.

A meter sends a demand anew under a higher revision. As long as its interval is not cleared, the new one simply counts.
After that the ledger may know the demand, so it is corrected there first: down, the Wh beyond the new amount come back,
those delivered last first; up, what is missing is decided by further deliveries. Until the ledger has answered nothing
else is decided, so no delivery can quote the old amount behind the correction's back. All that waits is in the store.

An estimate is the agent's to make and to sign. Of a demand that is missing (or says so) this broker assumes nothing: it
counts 0 Wh until the meter sends a value, which then comes late or as a correction.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from broker.ledger.client import BatchRefused
from broker.ledger.faults import Fault
from broker.ledger.operations import AssetId, CorrectDemand, Deliver, Operation, ReturnedSlice, encode_operation
from broker.protocol.messages import Carrier, MessageType
from broker.service.batches import BatchDesk, in_batches
from broker.service.cycle import Cut, Cycle
from broker.service.store import BatchKind, BatchRow, BrokerStore, DeliveryRow, MessageRow, Standing

_PASSING: Final = frozenset((Fault.EXPIRED, Fault.RETURNED_AMOUNT, Fault.RETURNED_SLICE))
"""The correction is made again: a withdrawal, which is in the blocks before, may have changed what was delivered."""


class DemandCorrections:
    """Revisions of demands on their way into effect. `put_back` takes what is returned into stock."""

    def __init__(
        self,
        store: BrokerStore,
        desk: BatchDesk,
        cycle: Cycle,
        put_back: Callable[[AssetId, int, int], None],
    ) -> None:
        self._store = store
        self._desk = desk
        self._cycle = cycle
        self._put_back = put_back
        self._waiting = set(store.waiting_demands())
        self._unrecorded: set[tuple[int, str]] = set()
        """Demands of which the ledger has said that it does not know them."""

    @property
    def pending(self) -> bool:
        """True while a revision is not in effect: nothing else is decided then."""
        return bool(self._waiting)

    def note(self, start_s: int, meter: str) -> None:
        """A later revision of a demand was accepted."""
        self._waiting.add((start_s, meter))

    def advance(self, not_after_s: int) -> bool:
        """Put into effect, or submit, what can be. True if demands have to be filled again."""
        refill = False
        ready: list[tuple[int, list[bytes]]] = []
        under_way = self._desk.waits_for(BatchKind.CORRECT_DEMAND)
        for start_s, meter in sorted(self._waiting):
            rows = self._store.messages_of(start_s, meter, MessageType.DEMAND)
            waiting = [row for row in rows if row.standing is Standing.WAITING]
            if not waiting:
                self._waiting.discard((start_s, meter))  # A later revision had come before it.
                continue
            new = max(waiting, key=lambda row: row.revision)
            old = next((row for row in rows if row.standing is Standing.CURRENT), None)
            if old is None or not self._cycle.is_decided(start_s):
                refill |= self._replace(old, new)
            elif not under_way and not self._desk.waits_for(BatchKind.DELIVER, start_s):
                ready.append((start_s, self._operations(old, new)))
        if ready:
            self._submit(ready, not_after_s)
        return refill

    def _replace(self, old: MessageRow | None, new: MessageRow) -> bool:
        """The new revision counts without a word to the ledger, which does not know the demand."""
        if old is not None:
            self._store.set_standing(old.start_s, old.meter, old.revision, Standing.SUPERSEDED, 0)
        self._store.set_standing(new.start_s, new.meter, new.revision, Standing.CURRENT, 0)
        self._settle(new)
        return self._cycle.join_late(new.start_s, new.meter)

    def _settle(self, new: MessageRow) -> None:
        """Revisions up to this one wait no longer."""
        rows = self._store.messages_of(new.start_s, new.meter, MessageType.DEMAND)
        for row in rows:
            if row.standing is Standing.WAITING and row.revision < new.revision:
                self._store.set_standing(row.start_s, row.meter, row.revision, Standing.SUPERSEDED, 0)
        if all(row.standing is not Standing.WAITING or row.revision <= new.revision for row in rows):
            self._waiting.discard((new.start_s, new.meter))

    def _operations(self, old: MessageRow, new: MessageRow) -> list[bytes]:
        assert new.pseudonym is not None
        assert new.commitment is not None
        cuts = cuts_of(self._store.deliveries(old.start_s, old.meter), max(0, old.delivered_wh - new.energy_wh))
        returned = tuple(
            ReturnedSlice(_asset_of(cut.delivery), cut.delivery.from_wh, cut.from_wh, cut.delivery.to_wh)
            for cut in cuts
        )
        amount = (new.pseudonym, new.start_s, old.ledger_revision + 1, new.energy_wh, new.commitment)
        operation = encode_operation(CorrectDemand(*amount, returned))
        if (old.start_s, old.meter) in self._unrecorded:
            # A close may have counted it, and only what a correction lowers may be missing from the next one.
            return [self._cycle.undelivered(old), operation]
        return [operation]

    def _submit(self, ready: Sequence[tuple[int, list[bytes]]], not_after_s: int) -> None:
        for start_s in sorted({start_s for start_s, _ in ready}):
            groups = [group for at_s, group in ready if at_s == start_s]
            for run in in_batches(groups, [sum(map(len, group)) for group in groups]):
                operations = [operation for group in run for operation in group]
                self._desk.submit(BatchKind.CORRECT_DEMAND, start_s, not_after_s, operations)

    # Results from the ledger

    def committed(self, batch: BatchRow, operations: Iterable[Operation], *, in_stock: bool) -> None:
        """The new amounts stand on the ledger. `in_stock`: the loaded holdings include what has come back."""
        demands = {row.pseudonym: row for row in self._store.messages(batch.start_s, MessageType.DEMAND)}
        for operation in operations:
            if not isinstance(operation, CorrectDemand):
                continue
            old = demands[operation.pseudonym]
            new = self._revision(old, operation.commitment)
            given = {(_asset_of(row), row.from_wh): row for row in self._store.deliveries(old.start_s, old.meter)}
            cuts = [Cut(given[item.asset, item.slice_from_wh], item.from_wh) for item in operation.returned]
            new = new._replace(ledger_revision=operation.revision)
            self._cycle.put_in_place(old, new, cuts, batch.number)
            if not in_stock:
                for item in operation.returned:
                    self._put_back(item.asset, item.from_wh, item.to_wh)
            self._settle(new)
            self._unrecorded.discard((new.start_s, new.meter))
            self._cycle.join_late(new.start_s, new.meter)
            row = self._store.current_demand(new.start_s, new.meter)
            if row is not None and (row.delivered_wh or row.delivered_wh == row.energy_wh):
                self._cycle.tell(row)

    def refused(self, batch: BatchRow, operations: Sequence[Operation], event: BatchRefused) -> None:
        """What the ledger finds fault with is given up, with its reason on record; the rest is submitted again."""
        if event.code in _PASSING:
            return
        at_fault = operations if event.operation is None else [operations[event.operation]]
        demands = {row.pseudonym: row for row in self._store.messages(batch.start_s, MessageType.DEMAND)}
        for operation in at_fault:
            if not isinstance(operation, CorrectDemand | Deliver):
                continue
            old = demands[operation.pseudonym]
            if event.code == Fault.UNKNOWN_DEMAND:
                self._unrecorded.add((old.start_s, old.meter))
                continue
            waiting = [
                row
                for row in self._store.messages_of(old.start_s, old.meter, MessageType.DEMAND)
                if row.standing is Standing.WAITING
            ]
            for row in waiting:
                if isinstance(operation, Deliver) or row.commitment == operation.commitment:
                    reason = f"{event.code}: {event.reason}"
                    self._store.refuse_message(row.start_s, row.meter, MessageType.DEMAND, row.revision, reason)
                    self._store.set_standing(row.start_s, row.meter, row.revision, Standing.SUPERSEDED, 0)
                    self._settle(row)

    def _revision(self, old: MessageRow, commitment: bytes) -> MessageRow:
        rows = self._store.messages_of(old.start_s, old.meter, MessageType.DEMAND)
        return next(row for row in rows if row.commitment == commitment)


def cuts_of(deliveries: Sequence[DeliveryRow], excess_wh: int) -> list[Cut]:
    """What goes back of a demand's deliveries, `excess_wh` in all: the newest first, of each the highest Wh first."""
    cuts: list[Cut] = []
    left_wh = excess_wh
    for delivery in reversed(deliveries):
        if not left_wh:
            break
        cut_wh = min(left_wh, delivery.to_wh - delivery.from_wh)
        cuts.append(Cut(delivery, delivery.to_wh - cut_wh))
        left_wh -= cut_wh
    return cuts


def _asset_of(delivery: DeliveryRow) -> AssetId:
    return AssetId(delivery.device, Carrier.ELECTRICITY, delivery.asset_start_s, delivery.asset_revision)
