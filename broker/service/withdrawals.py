"""Readings that are corrected, and whatever else makes an asset another than its reading says.

The ledger decides what a correction, or an issue with a deficit or surplus carried, comes to: its rules withdraw from
whoever has the energy, also after what happened among others. So such a reading goes to the ledger alone, and once it
stands in a block (whoever submitted it) this broker asks what became of that interval, mends stock, deliveries and
accounts, takes over what the provider holds, and has the demands that were reopened decided again. Until that is known
it decides nothing else. What is to be sent and to be asked stands in the store.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from broker.ledger.client import BatchRefused
from broker.ledger.faults import Fault
from broker.ledger.made import Made
from broker.ledger.operations import AssetId, Correct, Issue, Operation, Transfer, encode_operation
from broker.market.stock import Stock
from broker.protocol.envelope import parse
from broker.protocol.messages import MessageType, Reading
from broker.service.batches import BatchDesk
from broker.service.cycle import Cut, Cycle
from broker.service.outputs import Identity
from broker.service.registry import Registry
from broker.service.store import BatchKind, BatchRow, BrokerStore, Standing

MOST_AT_ONCE: Final = 16
"""Corrections in one batch, and intervals asked about at a time: the ledger looks through deliveries for each."""

_MOVING: Final = (BatchKind.DELIVER, BatchKind.SUPPLY, BatchKind.CORRECT_DEMAND, BatchKind.TAKE_OVER)


class Withdrawals:
    """`put_back` takes Wh into stock, `ask` asks the ledger what became of a device's interval."""

    def __init__(
        self,
        identity: Identity,
        store: BrokerStore,
        registry: Registry,
        stock: Stock,
        desk: BatchDesk,
        cycle: Cycle,
        put_back: Callable[[AssetId, int, int], None],
        ask: Callable[[str, int], None],
    ) -> None:
        self._identity = identity
        self._store = store
        self._registry = registry
        self._stock = stock
        self._desk = desk
        self._cycle = cycle
        self._put_back = put_back
        self._ask = ask
        self._most = MOST_AT_ONCE
        self._corrections = set(store.waiting_readings())
        self._unsure = set(store.unsure())
        self._asked: set[tuple[str, int]] = set()
        self._carried = store.carried()

    @property
    def pending(self) -> bool:
        """True while stock and deliveries may be other than the ledger's: nothing else is decided then."""
        return (
            bool(self._unsure)
            or self._desk.waits_for(BatchKind.CORRECT)
            or self._desk.waits_for(BatchKind.TAKE_OVER)
            or any(self._next(*place) is not None for place in self._corrections)
        )

    def is_plain(self, reading: Reading) -> bool:
        """True if the asset of this first reading will be just what it says."""
        return reading.meter not in self._carried

    def carried_wh(self, device: str) -> int:
        """What the device's next issue adds, as far as this broker has learned it."""
        return self._carried.get(device, 0)

    def note(self, device: str, start_s: int) -> None:
        """A later revision of a reading was accepted."""
        self._corrections.add((start_s, device))

    def issue(self, statements: Sequence[bytes], start_s: int, not_after_s: int) -> None:
        """Have first readings issued whose assets may be other than they say."""
        for first in range(0, len(statements), MOST_AT_ONCE):
            operations = [encode_operation(Issue(raw)) for raw in statements[first : first + MOST_AT_ONCE]]
            self._desk.submit(BatchKind.CORRECT, start_s, not_after_s, operations)

    def advance(self, not_after_s: int) -> None:
        """Submit corrections and ask about intervals, when nothing is under way that they could collide with."""
        if any(self._desk.waits_for(kind) for kind in _MOVING):
            return
        for device, start_s in sorted(self._unsure - self._asked)[:MOST_AT_ONCE]:
            self._asked.add((device, start_s))
            self._ask(device, start_s)
        # After its first reading, and each revision after the one before.
        if not self._corrections or self._desk.waits_for(BatchKind.PROVIDE) or self._desk.waits_for(BatchKind.CORRECT):
            return
        ready = [raw for raw in (self._next(*place) for place in sorted(self._corrections)) if raw is not None]
        if ready and not self._unsure:
            operations = [encode_operation(Correct(raw)) for raw in ready[: self._most]]
            start_s = min(place[0] for place in self._corrections)
            self._desk.submit(BatchKind.CORRECT, start_s, not_after_s, operations)

    def _next(self, start_s: int, device: str) -> bytes | None:
        """The revision of a reading that is to be submitted next; None while one before it is missing."""
        rows = self._store.messages_of(start_s, device, MessageType.READING)
        for row in rows:
            if row.standing is Standing.WAITING:
                before = {other.revision for other in rows if other.refusal is None}
                return row.raw if row.revision == 1 or row.revision - 1 in before else None
        return None

    # Results from the ledger

    def seen(self, operations: Iterable[Operation]) -> None:
        """Issues that are looked into, and corrections, that stand on the ledger, whoever submitted them."""
        for operation in operations:
            if not isinstance(operation, Issue | Correct):
                continue
            reading = Reading.from_payload(parse(operation.statement).payload)
            own = self._registry.device(reading.meter) is not None
            if own and isinstance(operation, Correct):
                self._finish(reading, Standing.CURRENT)
            if own or self._store.has_stake(reading.meter, reading.start_s):
                self._unsure.add((reading.meter, reading.start_s))
                self._asked.discard((reading.meter, reading.start_s))
                self._store.set_unsure(reading.meter, reading.start_s)

    def _finish(self, reading: Reading, standing: Standing) -> None:
        self._store.set_reading_standing(reading.start_s, reading.meter, reading.revision, standing)
        rows = self._store.messages_of(reading.start_s, reading.meter, MessageType.READING)
        if all(row.standing is not Standing.WAITING for row in rows):
            self._corrections.discard((reading.start_s, reading.meter))

    def refused(self, batch: BatchRow, operations: Sequence[Operation], event: BatchRefused, not_after_s: int) -> None:
        """What the ledger finds fault with is given up, with its reason on record; the rest is submitted again."""
        at_fault: Operation | None = None
        if event.code == Fault.TOO_MUCH_SEARCHED and len(operations) > 1:
            self._most = 1
        elif event.operation is not None:
            at_fault = operations[event.operation]
        for operation in operations:
            assert isinstance(operation, Issue | Correct)
            reading = Reading.from_payload(parse(operation.statement).payload)
            if operation is at_fault or (
                at_fault is None and event.code not in (Fault.EXPIRED, Fault.TOO_MUCH_SEARCHED)
            ):
                reason = f"{event.code}: {event.reason}"
                self._store.refuse_message(
                    reading.start_s, reading.meter, MessageType.READING, reading.revision, reason
                )
                if reading.revision:
                    self._finish(reading, Standing.SUPERSEDED)
            elif isinstance(operation, Issue):
                self.issue([operation.statement], batch.start_s, not_after_s)

    def taken_over_refused(self, operations: Iterable[Operation]) -> None:
        """What was to be taken over is not as it was thought: look again."""
        for operation in operations:
            assert isinstance(operation, Transfer)
            place = (operation.asset.device, operation.asset.start_s)
            self._unsure.add(place)
            self._asked.discard(place)
            self._store.set_unsure(*place)

    def known(self, made: Made, not_after_s: int) -> None:
        """What the ledger has of an interval now. Nothing of this broker's is under way to it."""
        place = (made.device, made.start_s)
        self._asked.discard(place)
        if place not in self._unsure:
            return
        self._unsure.discard(place)
        self._store.set_sure(*place)
        self._stock.drop_made(*place)
        if made.start_s >= self._cycle.stock_from_s:
            for item in made.held:
                if item.owner == self._identity.name:
                    self._put_back(item.asset, item.from_wh, item.to_wh)
        self._store.add_withdrawn(*place, [(item.asset.revision, item.from_wh, item.to_wh) for item in made.withdrawn])
        self._mend_deliveries(made)
        device = self._registry.device(made.device)
        if device is None:
            return
        if made.carried_wh:
            self._carried[made.device] = made.carried_wh
        else:
            self._carried.pop(made.device, None)
        self._store.set_carried(made.device, made.carried_wh)
        own, price = (device.owner, self._identity.name), device.price
        transfers = [
            encode_operation(Transfer(item.asset, item.from_wh, item.to_wh, *own, price, None))
            for item in made.held
            if item.owner == device.owner
        ]
        if transfers and made.start_s >= device.from_s:
            self._desk.submit(BatchKind.TAKE_OVER, made.start_s, not_after_s, transfers)

    def _mend_deliveries(self, made: Made) -> None:
        """Cut what was withdrawn off the deliveries. Of a slice that is its end: the highest Wh go first."""
        cuts: dict[tuple[int, str], list[Cut]] = {}
        for delivery in self._store.deliveries_from(made.device, made.start_s):
            lost = [
                max(item.from_wh, delivery.from_wh)
                for item in made.withdrawn
                if item.asset.revision == delivery.asset_revision
                and item.from_wh < delivery.to_wh
                and item.to_wh > delivery.from_wh
            ]
            if lost:
                cuts.setdefault((delivery.start_s, delivery.meter), []).append(Cut(delivery, min(lost)))
        for (start_s, meter), of_demand in sorted(cuts.items()):
            self._cycle.withdraw(start_s, meter, of_demand)
