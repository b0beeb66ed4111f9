"""The interval cycle of one broker: gate 1 clears, gate 2 settles and closes, one interval after the other.

The cycle decides with the pure functions of `broker.market` and carries the decision out: it takes slices from stock,
writes what each demand got into the store, keeps the accounts, and makes the ledger batches. All of one decision is in
one commit, so after a crash a decision is either there with its batches or is made again from the same input.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from broker.ledger.limits import MAX_SLICES_OF_DELIVERY
from broker.ledger.merkle import leaf_hash, root_of
from broker.ledger.operations import (
    AssetId,
    Close,
    Deliver,
    DeliveredSlice,
    Void,
    Window,
    encode_operation,
)
from broker.market.clearing import Clearing, OpenDemand, Taken, fill_lines, settle
from broker.market.contracts import History
from broker.market.mix import quotas
from broker.market.stock import AssetKey, HeldSlice, Stock
from broker.market.tariff import Tariff
from broker.protocol.market_time import Interval, MarketCalendar
from broker.protocol.messages import Carrier, DeliveredLine, Delivery, DeliveryState, MessageType
from broker.protocol.sources import Source
from broker.protocol.topics import Topics
from broker.service.batches import FULL_BATCH_OPERATIONS, BatchDesk, in_batches
from broker.service.outputs import Identity, Outputs
from broker.service.registry import Account, Consumer, ContractVersion, Registry
from broker.service.store import (
    BatchKind,
    BatchRow,
    BrokerStore,
    DeliveryRow,
    IntervalState,
    MessageRow,
    encode_quotas,
)

KEEP_STOCK_S: Final = 7 * 86_400
"""So long own energy of a past interval is kept at hand for demands that come late."""


@dataclass(slots=True)
class ShortDemand:
    """A demand in clearing: who, how much, its quotas, and what it got so far."""

    row: MessageRow
    consumer: Consumer
    version: ContractVersion
    quotas: tuple[int, ...]
    taken: list[Taken] = field(default_factory=list)
    slices: int = 0
    """Delivery rows written so far; numbers the next."""
    delivered_wh: int = 0

    def open(self, account: Account) -> OpenDemand:
        """What the market's functions see of it."""
        return OpenDemand(
            self.row.meter,
            self.row.energy_wh,
            self.version.contract,
            self.quotas,
            account.history,
            tuple(self.taken),
        )


class Cycle:
    """Clears and closes intervals. `current` is the oldest that is not closed; everything is decided in that order."""

    def __init__(
        self,
        identity: Identity,
        calendar: MarketCalendar,
        area: str,
        topics: Topics,
        store: BrokerStore,
        registry: Registry,
        stock: Stock,
        desk: BatchDesk,
        outputs: Outputs,
        tariff: Tariff,
    ) -> None:
        self._identity = identity
        self._calendar = calendar
        self._area = area
        self._topics = topics
        self._store = store
        self._registry = registry
        self._stock = stock
        self._desk = desk
        self._outputs = outputs
        self._tariff = tariff
        self._short: dict[tuple[str, int], ShortDemand] = {}
        self._told: dict[bytes, list[tuple[str, bytes]]] = {}
        """By batch: sealed delivery messages with their meters, sent when the ledger has committed the batch."""
        self._reported = 0
        self.current: Interval | None = None
        self.first_start_s = 0
        """Start of the first interval that this broker served; the ledger takes no close of an earlier one."""
        self.state = IntervalState.OPEN
        self._resume()

    def _resume(self) -> None:
        """Find the oldest interval that is not closed, and the demands in it that are short."""
        closed_s = self._store.last_interval(IntervalState.CLOSED)
        known_s = self._store.first_interval()
        self.first_start_s = known_s or 0
        if closed_s is not None:
            self._enter(self._calendar.interval_at(closed_s + self._calendar.interval_s))
        elif known_s is not None:
            self._enter(self._calendar.interval_at(known_s))

    @property
    def stock_from_s(self) -> int:
        """Energy of intervals that begin earlier is kept no longer; 0 as long as no interval has been closed."""
        closed_s = self._store.last_interval(IntervalState.CLOSED)
        return 0 if closed_s is None else closed_s - KEEP_STOCK_S

    def start_at(self, market_time_s: int) -> None:
        """Begin with the interval of this moment, if this broker has never been running."""
        if self.current is None:
            interval = self._calendar.interval_at(market_time_s)
            self._store.set_interval(interval.start_s, IntervalState.OPEN, 0)
            self.first_start_s = interval.start_s
            self._enter(interval)

    def _enter(self, interval: Interval) -> None:
        self.current = interval
        self.state, _ = self._store.interval_state(interval.start_s)
        self._reported = self._store.message_count(interval.start_s)
        self._short.clear()
        if self.state is IntervalState.CLEARED:
            for row in self._store.short_demands(interval.start_s):
                self._short[row.meter, row.revision] = self._resumed(row)

    def _resumed(self, row: MessageRow) -> ShortDemand:
        """A short demand as it stood, from the store."""
        demand = self._short_demand(row)
        totals: dict[tuple[int, int], int] = {}
        for delivery in self._store.deliveries(row.start_s, row.meter):
            key = (delivery.line, delivery.source)
            totals[key] = totals.get(key, 0) + delivery.to_wh - delivery.from_wh
            demand.slices += 1
        demand.taken = [Taken(line, Source(source), energy_wh) for (line, source), energy_wh in totals.items()]
        demand.delivered_wh = row.delivered_wh
        return demand

    # What the core asks

    def everyone_reported(self) -> bool:
        """True when each registered meter has sent the current interval, or there is none: gate 1 comes early."""
        return self._registry.expected_meters <= self._reported

    def note_accepted(self, start_s: int) -> None:
        """A meter's message of that interval was accepted for the first time."""
        if self.current is not None and start_s == self.current.start_s:
            self._reported += 1

    def join_late(self, start_s: int, meter: str, revision: int) -> bool:
        """A demand was accepted. True if its interval is cleared already, so that it has to be filled separately.

        One of a closed interval is settled with the next close.
        """
        if self.is_closed(start_s):
            self._store.mark_late(start_s)
            return False
        if self.current is None or start_s != self.current.start_s or self.state is not IntervalState.CLEARED:
            return False
        row = self._store.message(start_s, meter, MessageType.DEMAND, revision)
        if row is None or not row.energy_wh:
            return False
        self._short[meter, revision] = self._short_demand(row)
        return True

    def is_closed(self, start_s: int) -> bool:
        return self.current is not None and start_s < self.current.start_s

    # Decisions

    def clear(self) -> Clearing:
        """Gate 1: fill the lines of all demands from own stock. Returns what is short."""
        assert self.current is not None
        start_s = self.current.start_s
        demands = [
            self._short_demand(row)
            for row in self._store.messages(start_s, MessageType.DEMAND)
            if row.energy_wh > 0 and row.refusal is None
        ]
        clearing = self._decide(demands, start_s, settling=False)
        for demand in demands:
            if demand.delivered_wh < demand.row.energy_wh:
                self._short[demand.row.meter, demand.row.revision] = demand
        self.state = IntervalState.CLEARED
        _, revision = self._store.interval_state(start_s)
        self._store.set_interval(start_s, IntervalState.CLEARED, revision)
        return clearing

    def fill_again(self) -> Clearing:
        """Between the gates, after energy has come in: fill what is still short."""
        assert self.current is not None
        clearing = self._decide(list(self._short.values()), self.current.start_s, settling=False)
        self._forget_filled()
        return clearing

    def close(self, voided_orders: Sequence[bytes]) -> None:
        """Gate 2: shortage choice, record what stays unmatched, close the interval, and settle late demands."""
        assert self.current is not None
        interval = self.current
        self._settle(list(self._short.values()), interval, [Void(order_id) for order_id in voided_orders])
        for start_s in self._store.late_intervals():
            rows = [row for row in self._store.short_demands(start_s) if row.quotas is None]
            late = Interval(start_s, start_s + self._calendar.interval_s)
            self._settle([self._resumed(row) for row in rows], late, [])
        self._stock.drop_before(interval.start_s - KEEP_STOCK_S)
        self._enter(Interval(interval.end_s, interval.end_s + self._calendar.interval_s))

    def _settle(self, demands: list[ShortDemand], interval: Interval, voids: list[Void]) -> None:
        self._decide(demands, interval.start_s, settling=True)
        _, revision = self._store.interval_state(interval.start_s)
        leaves = []
        demanded_wh = 0
        for pseudonym, commitment, energy_wh in self._store.commitments(interval.start_s):
            leaves.append(leaf_hash(pseudonym + commitment))
            demanded_wh += energy_wh
        operations = [encode_operation(void) for void in voids]
        close = Close(interval.start_s, interval.end_s, revision, len(leaves), demanded_wh, root_of(leaves))
        operations.append(encode_operation(close))
        self._store.set_interval(interval.start_s, IntervalState.CLOSED, revision + 1)
        self._desk.submit(BatchKind.CLOSE, interval.start_s, self._not_after(), operations)

    def _decide(self, demands: list[ShortDemand], start_s: int, *, settling: bool) -> Clearing:
        """Fill the lines of these demands, or settle them for good, and carry the outcome out."""
        accounts = {
            demand.row.meter: self._registry.account(demand.consumer, demand.version, start_s) for demand in demands
        }
        for demand in demands:
            if not demand.quotas:
                history = accounts[demand.row.meter].history
                demand.quotas = quotas(demand.version.contract.shares_ppm, history, demand.row.energy_wh)
        opened = [demand.open(accounts[demand.row.meter]) for demand in demands]
        available = self._stock.available(Interval(start_s, start_s + self._calendar.interval_s))
        clearing = settle(opened, available) if settling else fill_lines(opened, available)
        # By pseudonym, so that the order in a batch says nothing about who is who. Slices are cut in the same order:
        # each asset is then used up from its first Wh on, and the ledger never sees it held in many pieces.
        takings = sorted(zip(demands, clearing.taken, strict=True), key=lambda item: item[0].row.pseudonym or b"")
        # A batch's worth at a time, from slice to row, while all of it is in the processor's cache.
        for first in range(0, len(takings), FULL_BATCH_OPERATIONS):
            self._carry_out(takings[first : first + FULL_BATCH_OPERATIONS], accounts, start_s, settling=settling)
        return clearing

    def _carry_out(
        self,
        takings: Sequence[tuple[ShortDemand, Sequence[Taken]]],
        accounts: dict[str, Account],
        start_s: int,
        *,
        settling: bool,
    ) -> None:
        decided: list[tuple[ShortDemand, bytes, list[tuple[Taken, HeldSlice]]]] = []
        for demand, taken in takings:
            slices = [(item, held) for item in taken for held in self._stock.take(item.source, start_s, item.energy_wh)]
            # A demand that got nothing at all still goes on record, once, when it is settled.
            if not slices and not (settling and demand.slices == 0):
                continue
            for first in range(0, max(1, len(slices)), MAX_SLICES_OF_DELIVERY):
                part = slices[first : first + MAX_SLICES_OF_DELIVERY]
                decided.append((demand, self._deliver_operation(demand, start_s, part), part))
        changed: dict[str, Account] = {}
        delivered = []
        for demand, taken in takings:
            energy_wh = sum([item.energy_wh for item in taken])
            demand.taken.extend(taken)
            demand.delivered_wh += energy_wh
            short = demand.delivered_wh < demand.row.energy_wh
            if energy_wh:
                account = accounts[demand.row.meter]
                history = account.history.plus(*[(item.line, item.energy_wh) for item in taken])
                changed[demand.row.meter] = Account(account.period_start_s, account.version, history)
            if energy_wh or (short and demand.row.quotas != demand.quotas):
                stored_quotas = encode_quotas(demand.quotas) if short else None
                delivered.append((demand.delivered_wh, stored_quotas, start_s, demand.row.meter, demand.row.revision))
        self._store.set_delivered(delivered)
        self._registry.keep_accounts(changed)
        for run in in_batches(decided, [len(operation) for _, operation, _ in decided]):
            batch = self._desk.submit(
                BatchKind.DELIVER, start_s, self._not_after(), [operation for _, operation, _ in run]
            )
            self._note_deliveries(batch, start_s, run)

    def _deliver_operation(self, demand: ShortDemand, start_s: int, part: list[tuple[Taken, HeldSlice]]) -> bytes:
        row = demand.row
        assert row.pseudonym is not None
        assert row.commitment is not None
        slices = tuple(
            [DeliveredSlice(_asset_id(held.asset), held.from_wh, held.to_wh, item.line) for item, held in part]
        )
        return encode_operation(
            Deliver(
                row.pseudonym,
                start_s,
                start_s + self._calendar.interval_s,
                Window.INTERVAL,
                self._area,
                row.energy_wh,
                row.commitment,
                slices,
            )
        )

    def _note_deliveries(
        self,
        batch: BatchRow,
        start_s: int,
        run: list[tuple[ShortDemand, bytes, list[tuple[Taken, HeldSlice]]]],
    ) -> None:
        rows = []
        told = []
        for demand, _, part in run:
            for item, held in part:
                device, _, asset_start_s, revision = held.asset
                rows.append(
                    DeliveryRow(
                        start_s,
                        demand.row.meter,
                        demand.slices,
                        item.line,
                        int(item.source),
                        device,
                        asset_start_s,
                        revision,
                        held.from_wh,
                        held.to_wh,
                        self._tariff.for_consumers(held.price),
                        self._through(held),
                        batch.number,
                    )
                )
                demand.slices += 1
            whole = demand.delivered_wh == demand.row.energy_wh
            if whole or part:
                state = DeliveryState.FINAL if whole else DeliveryState.OPEN
                told.append(self._sealed(delivery_message(demand.row, demand.taken, state, self._calendar)))
        self._store.add_deliveries(rows)
        self._told[batch.batch_id] = told

    def _through(self, held: HeldSlice) -> str | None:
        """The neighbour that a slice came from; None for what own providers made."""
        device, _, asset_start_s, revision = held.asset
        if self._registry.device(device) is not None:
            return None
        acquired = self._store.acquisitions(device, asset_start_s, revision, held.from_wh, held.from_wh + 1)
        return acquired[0].party if acquired else None

    def _forget_filled(self) -> None:
        for key in [key for key, demand in self._short.items() if demand.delivered_wh == demand.row.energy_wh]:
            del self._short[key]

    def _short_demand(self, row: MessageRow) -> ShortDemand:
        consumer = self._registry.consumer(row.meter)
        version = consumer.contract_at(row.start_s) if consumer is not None else None
        # An accepted demand had both; registrations are never taken out of the store.
        assert consumer is not None
        assert version is not None
        return ShortDemand(row, consumer, version, row.quotas or ())

    def _not_after(self) -> int:
        """Batches of an interval are void once a later one is closed; resending one then could only do harm."""
        assert self.current is not None
        return self.current.end_s + self._calendar.interval_s

    # Results from the ledger

    def committed(self, batch: BatchRow) -> None:
        """Tell the meters what they got."""
        if batch.kind is BatchKind.DELIVER:
            told = self._told.pop(batch.batch_id, None)
            for meter, delivery in self._told_before(batch) if told is None else told:
                self._send_delivery(meter, delivery)
        elif batch.kind is BatchKind.CLOSE:
            for row in self._store.short_demands(batch.start_s):
                self._send_delivery(*self._sealed(self.delivery_for(row)))

    def _told_before(self, batch: BatchRow) -> list[tuple[str, bytes]]:
        """The deliveries of a batch that was made before a restart."""
        meters = {row.meter for row in self._store.deliveries_of_batch(batch.start_s, batch.number)}
        rows = [self._store.message(batch.start_s, meter, MessageType.DEMAND, 0) for meter in sorted(meters)]
        return [self._sealed(self.delivery_for(row)) for row in rows if row is not None]

    def refused(
        self, batch: BatchRow, deliveries: Sequence[Deliver], demand_at_fault: bytes | None, reason: str
    ) -> None:
        """Undo the deliveries of a batch that the ledger refused; its demands are open again.

        But not the one whose pseudonym is `demand_at_fault`: it stays as it is, with the reason on record.
        """
        self._told.pop(batch.batch_id, None)
        given_wh: dict[str, list[DeliveryRow]] = {}
        for delivery in self._store.deliveries_of_batch(batch.start_s, batch.number):
            given_wh.setdefault(delivery.meter, []).append(delivery)
        self._store.drop_deliveries_of_batch(batch.start_s, batch.number)
        pseudonyms = {delivery.pseudonym for delivery in deliveries}
        for row in list(self._store.messages(batch.start_s, MessageType.DEMAND)):
            if row.pseudonym in pseudonyms:
                self._undo(row, given_wh.get(row.meter, []))
                if row.pseudonym == demand_at_fault:
                    self._store.refuse_message(row.start_s, row.meter, MessageType.DEMAND, row.revision, reason)
        if self.current is not None and batch.start_s == self.current.start_s:
            self._enter(self.current)
        else:
            self._store.mark_late(batch.start_s)

    def _undo(self, row: MessageRow, deliveries: Sequence[DeliveryRow]) -> None:
        demand = self._short_demand(row)
        account = self._registry.account(demand.consumer, demand.version, row.start_s)
        by_line = list(account.history.by_line)
        for delivery in deliveries:
            if delivery.line < len(by_line):
                by_line[delivery.line] -= delivery.to_wh - delivery.from_wh
        energy_wh = sum(delivery.to_wh - delivery.from_wh for delivery in deliveries)
        history = History(tuple(by_line), account.history.total - energy_wh)
        # Without quotas a demand of a closed interval counts as late and is decided again.
        keep_quotas = row.quotas is not None and not self.is_closed(row.start_s)
        stored_quotas = encode_quotas(row.quotas or ()) if keep_quotas else None
        self._store.set_delivered([(row.delivered_wh - energy_wh, stored_quotas, row.start_s, row.meter, row.revision)])
        self._registry.keep_accounts({row.meter: Account(account.period_start_s, account.version, history)})

    def close_refused(self, batch: BatchRow) -> None:
        """The ledger refused a close: it is made again, with the same revision, after the next interval."""
        state, revision = self._store.interval_state(batch.start_s)
        self._store.set_interval(batch.start_s, state, max(0, revision - 1))
        self._store.mark_late(batch.start_s)

    def delivery_for(self, row: MessageRow) -> Delivery:
        """What a demand got so far, from the store."""
        taken = [
            Taken(item.line, Source(item.source), item.to_wh - item.from_wh)
            for item in self._store.deliveries(row.start_s, row.meter)
        ]
        final = row.delivered_wh == row.energy_wh or self.is_closed(row.start_s)
        state = DeliveryState.FINAL if final else DeliveryState.OPEN
        return delivery_message(row, taken, state, self._calendar)

    def answer_again(self, row: MessageRow) -> None:
        """A demand came again: besides its receipt the meter gets what is known of its delivery."""
        if self._desk.waits_for(BatchKind.DELIVER, row.start_s) or self._desk.waits_for(BatchKind.CLOSE, row.start_s):
            return  # The ledger may still refuse it. The meter is told when it is committed.
        if row.delivered_wh or self.is_closed(row.start_s):
            self._send_delivery(*self._sealed(self.delivery_for(row)))

    def _sealed(self, delivery: Delivery) -> tuple[str, bytes]:
        """The meter, and the message for it."""
        return delivery.meter, self._identity.seal(delivery)

    def _send_delivery(self, meter: str, delivery: bytes) -> None:
        # QoS 0: an agent that misses it sends its demand again and gets the same answer.
        self._outputs.publish(self._topics.meter(self._identity.name, meter, "delivery"), delivery, qos=0)


def delivery_message(
    row: MessageRow, taken: Iterable[Taken], state: DeliveryState, calendar: MarketCalendar
) -> Delivery:
    """The message for a meter: its lines, equal ones added up."""
    lines: list[DeliveredLine] = []
    delivered_wh = 0
    for line, source, energy_wh in sorted(taken):
        delivered_wh += energy_wh
        if lines and lines[-1][:2] == (line, source):
            energy_wh += lines.pop().energy_wh
        lines.append(DeliveredLine(line, source, energy_wh))
    return Delivery(
        row.meter,
        row.start_s,
        row.start_s + calendar.interval_s,
        row.revision,
        row.energy_wh,
        row.energy_wh - delivered_wh,
        state,
        tuple(lines),
    )


@lru_cache(maxsize=4_096)
def _asset_id(asset: AssetKey) -> AssetId:
    # Thousands of slices in a row are of the same asset.
    device, carrier, start_s, revision = asset
    return AssetId(device, Carrier(carrier), start_s, revision)
