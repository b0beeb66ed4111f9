"""The broker's logic, put together: what a message, a moment of market time or a word of the ledger makes it do.

No sockets, no clocks: the shell (`run`) hands in messages, times and ledger events, commits the store, and then sends
what stands in `outputs`. Everything that decides about energy depends on market time and on what the store and the
ledger hold, so a broker that is killed at any moment goes on as if it had not been.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from broker.ledger.client import (
    BatchCommitted,
    BatchRefused,
    BlockApplied,
    DeviceKnown,
    DeviceUnknown,
    Event,
    ForeignBatch,
    HoldingsLoaded,
    LedgerFault,
    MadeKnown,
)
from broker.ledger.faults import Fault
from broker.ledger.holding import Holding
from broker.ledger.operations import (
    Admit,
    AssetId,
    Close,
    Deliver,
    EndMandate,
    Issue,
    MandateOp,
    Operation,
    Register,
    Transfer,
    Void,
    decode_operation,
    encode_operation,
)
from broker.market.statements import Flow
from broker.market.stock import HeldSlice, Stock
from broker.market.tariff import Tariff
from broker.market.terms import parts_of
from broker.protocol import messages
from broker.protocol.envelope import Signer, open_envelope, parse
from broker.protocol.errors import ProtocolError
from broker.protocol.keys import PublicKey, public_key_from_cose
from broker.protocol.market_time import Interval, MarketCalendar
from broker.protocol.messages import (
    Admission,
    Batch,
    Carrier,
    Cleared,
    Genesis,
    MessageType,
    Order,
    OrderAnswer,
    Reading,
    Registration,
)
from broker.protocol.sources import Source
from broker.protocol.topics import Topics
from broker.service.arrangements import Arrangements
from broker.service.batches import BatchDesk, in_batches
from broker.service.corrections import DemandCorrections
from broker.service.cycle import Cycle
from broker.service.foresight import Foresight
from broker.service.intake import Accepted, Intake
from broker.service.neighbours import Neighbours
from broker.service.orders_in import PartnerPolicy, transfer_row
from broker.service.outputs import Identity, Outputs
from broker.service.owners import Owners
from broker.service.recovery import Recovery
from broker.service.registry import Registry
from broker.service.store import (
    BatchKind,
    BatchRow,
    BrokerStore,
    IntervalState,
    StatementRow,
    StoreError,
    WorkState,
)
from broker.service.withdrawals import Withdrawals

_STATEMENT_OPERATIONS: Final[Mapping[MessageType, Callable[[bytes], Operation]]] = {
    MessageType.REGISTRATION: Register,
    MessageType.ADMISSION: Admit,
    MessageType.MANDATE: MandateOp,
    MessageType.END_OF_MANDATE: EndMandate,
}

_FAULTS_OF_DEMANDS: Final = frozenset(
    (Fault.DEMAND_INTERVAL, Fault.DEMAND_AREA, Fault.DEMAND_BROKER, Fault.DEMAND_CHANGED, Fault.DEMAND_EXCEEDED)
)
"""Refusals of a delivery that are not about its slices."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A neighbouring broker: its key, and what it may do here."""

    key: PublicKey
    policy: PartnerPolicy


class Broker:
    """One broker. The shell calls `take_*`, `set_time`, `advance`, and reads `idle`, `next_wake_s` and `outputs`."""

    def __init__(
        self,
        identity: Identity,
        genesis: Genesis,
        topics: Topics,
        store: BrokerStore,
        neighbours: Mapping[str, Neighbour],
        highest_price: int,
        tariff: Tariff,
        *,
        passes_on: bool,
        own_groups_first: bool,
        keeps_for_windows: bool,
        arranges_ahead: bool,
        clock_waits: bool,
        jitter: Callable[[], int],
        recovers: bool = False,
    ) -> None:
        """`passes_on`: ask others for what neighbours want. `own_groups_first`: own lines of groups are served before
        neighbours are. `keeps_for_windows`: neighbours do not get what own consumers are expected to want later in the
        day. `arranges_ahead`: say wishes and promises for the next day, and heed those that were said. `clock_waits`:
        market time stands still while this broker is not idle. `jitter` gives 0 to 255 at random. `recovers`: the store
        may be older than the ledger, and what it has forgotten is taken back from there.
        """
        self.outputs = Outputs()
        self.questions: list[tuple[str, int]] = []
        """(device, start_s) of intervals about which the shell has to ask the ledger."""
        self.unknown_devices: list[str] = []
        """Devices about which the shell has to ask the ledger."""
        self._identity = identity
        self._calendar = MarketCalendar(genesis.interval_s, genesis.gate_1_s, genesis.gate_2_s)
        self._topics = topics
        self._store = store
        self._signers = {one.key.key_id: Signer(name, one.key) for name, one in neighbours.items()}
        self._stock = Stock()
        self._desk = BatchDesk(identity, store, self.outputs)
        self._registry = Registry(store)
        self._owners = Owners(store, self.unknown_devices.append)
        self._intake = Intake(identity, self._calendar, topics, store, self._registry, self.outputs)
        self._foresight = Foresight(
            *(identity, self._calendar, topics, store, self._registry, self.outputs),
            has_neighbours=bool(neighbours),
            keeps_for_windows=keeps_for_windows,
        )
        self._cycle = Cycle(
            identity,
            self._calendar,
            genesis.areas[0],
            topics,
            store,
            self._registry,
            self._stock,
            self._desk,
            self.outputs,
            tariff,
            own_groups_first=own_groups_first,
            will_want=self._foresight.wanted_of_now,
        )
        policies = {name: one.policy for name, one in neighbours.items()}
        self._arrangements = Arrangements(
            identity, self._calendar, topics, store, self.outputs, policies, is_on=arranges_ahead
        )
        self._neighbours = Neighbours(
            identity,
            self._calendar,
            topics,
            store,
            self._stock,
            self._desk,
            self.outputs,
            policies,
            highest_price,
            tariff,
            self._arrangements,
            passes_on=passes_on,
            is_own_device=lambda device: self._registry.device(device) is not None,
            owner_of=self._owners.of,
            jitter=jitter,
        )
        self._corrections = DemandCorrections(store, self._desk, self._cycle, self._put_back)
        self._deadline_s = genesis.correction_deadline_s
        self._withdrawals = Withdrawals(
            *(identity, store, self._registry, self._stock, self._desk, self._cycle, self._put_back),
            lambda device, start_s: self.questions.append((device, start_s)),
        )
        self._recovery: Recovery | None = None
        if recovers:
            self._recovery = Recovery(identity, store, self._registry, self._desk, self.outputs, tariff)
        self._readings: list[Accepted] = []
        self._holdings_height: int | None = None
        self._own_groups_first = own_groups_first
        self._clock_waits = clock_waits
        self._held_back_blindly = False
        self._stopped = False
        self._refill = False
        self._offer_again = False
        self._statements_waiting = bool(store.statements(WorkState.WAITING))
        self.market_time_s: int | None = None
        self._desk.hand_over(self._desk.waiting)

    # What the shell asks

    @property
    def idle(self) -> bool:
        """True when all that market time and messages asked for is done and committed, as far as it can be before those
        that this broker `waits_for` have acted."""
        return (
            self._holdings_height is not None
            and not self._desk.waiting
            and not self._readings
            and not self._statements_waiting
            and not self._corrections.pending
            and not self._withdrawals.pending
            and not self._owners.pending
            and not self._foresight.unfinished
            and not self._due()
        )

    @property
    def unfinished(self) -> bool:
        """True if the next turn has something to do without anything coming in."""
        return self._may_decide and self._foresight.unfinished

    @property
    def _may_decide(self) -> bool:
        return not self._stopped and self._holdings_height is not None and self.market_time_s is not None

    @property
    def waits_for(self) -> set[bytes]:
        """Tokens of what neighbours have to say before this broker can go on (docs/architecture.md, simulated time)."""
        interval = self._cycle.current
        return set() if interval is None else self._neighbours.waits(interval)

    @property
    def holds(self) -> set[bytes]:
        """Tokens of what neighbours may wait for from this broker, and has not been said."""
        interval = self._cycle.current
        return set() if interval is None else self._neighbours.holds(interval)

    @property
    def stock_from_s(self) -> int:
        """Start of the oldest interval whose energy this broker still has a use for."""
        return self._cycle.stock_from_s

    def next_wake_s(self) -> int | None:
        """Market time of the next gate, or before that of the end of a round that is not over."""
        interval = self._cycle.current
        if interval is None or self.market_time_s is None:
            return None
        if self._cycle.state is IntervalState.OPEN:
            return self._calendar.gate_1_of(interval)
        gate_2_s = self._calendar.gate_2_of(interval)
        return min(gate_2_s, self._neighbours.next_wake_s(interval, self.market_time_s) or gate_2_s)

    def next_resend_at_s(self) -> float | None:
        """Network time at which `send_again` has something to do."""
        return self._neighbours.next_resend_at_s()

    def subscriptions(self) -> list[tuple[str, int]]:
        """Topic filters and QoS of everything that concerns a broker, but for the ledger and the conductor."""
        name = self._identity.name
        filters = [
            (self._topics.meter(name, "+", "reading"), 1),
            (self._topics.meter(name, "+", "demand"), 1),
            (self._topics.request(name), 1),
            (self._topics.response(name, "+"), 1),
        ]
        for signer in self._signers.values():
            filters.append((self._topics.cleared(signer.name), 1))
            filters.append((self._topics.stock(signer.name), 1))
            filters.append((self._topics.forecast(signer.name), 1))
            if self._arrangements.is_on:
                filters.append((self._topics.wishes(signer.name), 1))
                filters.append((self._topics.promises(signer.name), 1))
        return filters

    # What comes in

    def set_time(self, market_time_s: int) -> None:
        """Market time has reached this moment."""
        self.market_time_s = market_time_s
        self._cycle.start_at(market_time_s)

    def registrations_changed(self) -> None:
        """The command line has written into the store."""
        self._registry.forget()
        self._foresight.look_again()
        self._statements_waiting = bool(self._store.statements(WorkState.WAITING))

    def reconnected(self, now_s: float) -> None:
        """The MQTT link is up anew: say again what has no answer, and what is retained."""
        for topic, raw in self._store.announcements():
            self.outputs.publish(topic, raw, retain=True)
        self._neighbours.send_again(now_s, reconnected=True)
        self._foresight.again()
        self._cycle.tell_again()

    def handed_over(self, *, connected: bool) -> None:
        """What stood in `outputs` went out, or was dropped because there is no connection."""
        self._cycle.handed_over(connected=connected)

    def send_again(self, now_s: float) -> None:
        """Repeat what is overdue in network time."""
        self._neighbours.send_again(now_s, reconnected=False)

    def take_message(self, levels: tuple[str, ...], payload: bytes) -> None:
        """A message on one of `subscriptions`; `levels` are its topic's below the root."""
        match levels:
            case ("brokers", self._identity.name, "meters", meter, ("reading" | "demand") as leaf):
                self._take_meter_message(meter, leaf, payload)
            case ("brokers", _, _) | ("brokers", _, "response", _):
                self._take_broker_message(levels, payload)
            case _:
                self.outputs.complain(f"a message on {'/'.join(levels)}, which this broker does not know")

    def _take_meter_message(self, meter: str, leaf: str, payload: bytes) -> None:
        if self.market_time_s is None or self._recovery is not None:
            # Not known yet is the time, or what was said before; the agent sends again what has no receipt.
            return
        current = self._cycle.current
        # By the clock that the ledger has of this broker: the end of what it has closed.
        settled_to_s = current.start_s - self._deadline_s if current is not None else 0
        first_s = self._cycle.first_start_s
        accepted = self._intake.take(meter, leaf, payload, self.market_time_s, first_s, settled_to_s)
        if accepted is None:
            return
        value = accepted.value
        if isinstance(value, Reading):
            if not accepted.again and value.revision:
                self._withdrawals.note(meter, value.start_s)
            elif not accepted.again and (value.energy_wh or self._withdrawals.carried_wh(meter) > 0):
                self._readings.append(accepted)
        elif accepted.again:
            row = self._store.current_demand(value.start_s, meter)
            if row is not None:
                self._cycle.answer_again(row)
        elif value.revision:
            self._corrections.note(value.start_s, meter)
        elif self._cycle.join_late(value.start_s, meter):
            self._refill = True
        if not accepted.again and not value.revision:
            self._cycle.note_accepted(value.start_s)
            self._foresight.count(value)

    def _take_broker_message(self, levels: tuple[str, ...], payload: bytes) -> None:
        try:
            opened = open_envelope(payload, self._identity.ledger, self._signers.get)
        except ProtocolError as error:
            self.outputs.complain(f"a message on {'/'.join(levels)} is ignored: {error}")
            return
        message, peer = opened.message, opened.sender
        match levels, message:
            case ("brokers", self._identity.name, "request"), Order():
                if self.market_time_s is not None and self._recovery is None:  # Else it is sent again.
                    self._neighbours.take_order(peer, message, opened.raw, self.market_time_s)
            case ("brokers", self._identity.name, "response", sender), OrderAnswer() if sender == peer:
                if self._neighbours.take_answer(peer, message):
                    self._refill = True  # Somebody else may have what this one has not.
            case ("brokers", sender, "cleared"), Cleared() if sender == peer:
                self._neighbours.hear(peer, message)
            case ("brokers", sender, "stock"), messages.Stock() if sender == peer:
                if self._neighbours.hear(peer, message):
                    self._refill = True
            case ("brokers", sender, "forecast"), messages.Forecast() if sender == peer:
                self._neighbours.hear(peer, message)
            case ("brokers", sender, "wishes"), messages.Wishes() if sender == peer:
                self._hear_of_arrangement(peer, message)
            case ("brokers", sender, "promises"), messages.Promises() if sender == peer:
                self._hear_of_arrangement(peer, message)
            case _:
                self.outputs.complain(
                    f"a {message.TYPE.name.lower()} of {peer} does not belong on {'/'.join(levels)}; it is ignored"
                )

    def _hear_of_arrangement(self, peer: str, message: messages.Wishes | messages.Promises) -> None:
        current = self._cycle.current
        if self.market_time_s is not None:
            self._arrangements.hear(peer, message, self.market_time_s)
        elif current is not None:
            # What the server retained may come before the conductor's tick.
            self._arrangements.hear(peer, message, current.start_s)

    # The ledger's word

    def take_event(self, event: Event) -> None:
        """Something that the ledger client saw.

        Raises StoreError if the ledger knows of decisions of this broker that its store does not: the process must end.
        """
        match event:
            case HoldingsLoaded():
                self._end_recovery()
                self._load_stock(event.height, event.holdings)
            case BatchCommitted():
                self._committed(event)
            case BatchRefused():
                self._refused(event)
            case ForeignBatch():
                self._take_foreign(event)
            case MadeKnown():
                self._withdrawals.known(event.made, self._provide_by(0))
                self._refill = True
            case DeviceKnown():
                admitted = event.admitted
                if self._owners.answered(admitted.device, admitted.owner):
                    self._owner_learned(admitted.device, admitted.owner)
            case DeviceUnknown():
                if event.answered:
                    self._owners.answered(event.device, None)
                elif self._owners.unanswered(event.device):
                    self.outputs.complain(
                        f"the ledger does not say whose {event.device} is: its node is away, or of an earlier version."
                        " Consumers who exclude a provider get nothing of such devices meanwhile"
                    )
            case BlockApplied():
                pass
            case LedgerFault():
                self._stopped = True
                self.outputs.complain(
                    f"the ledger contradicts itself at height {event.height}: {event.reason}; this broker decides"
                    " nothing more until an operator has compared checkpoints and restarted it"
                )

    def _load_stock(self, height: int, holdings: tuple[Holding, ...]) -> None:
        """All that the ledger says we own, less what our unanswered batches give away."""
        self._stock.drop_all()
        for holding in holdings:
            for piece in self._as_slices(holding.asset, holding.source, holding.from_wh, holding.to_wh):
                self._stock.add(piece)
        for batch in self._desk.waiting:
            for asset, from_wh, to_wh in _given_away(_operations_of(batch.raw), self._identity.name):
                key = (asset.device, int(asset.carrier), asset.start_s, asset.revision)
                if self._stock.holds(key, from_wh, to_wh):
                    self._stock.remove(key, from_wh, to_wh)
        self._hold_back()
        self._holdings_height = height
        self._refill = True

    def _hold_back(self) -> None:
        interval = self._cycle.current
        self._cycle.hold_back(with_groups=interval is None or self._neighbours.has_reached_groups(interval))
        self._held_back_blindly = False

    def _owner_learned(self, device: str, owner: str) -> None:
        self._stock.set_provider(device, owner)
        # What is held back of a provider who was not known is another's now.
        self._held_back_blindly |= self._stock.holds_back_of("")
        self._refill = True

    def _in_holdings(self, height: int) -> bool:
        """True if what a block of that height did to our stock is, or will be, part of the loaded holdings."""
        return self._holdings_height is None or height <= self._holdings_height

    def _as_slices(self, asset: AssetId, source: Source, from_wh: int, to_wh: int) -> list[HeldSlice]:
        """These Wh of an asset at the prices that were paid for them; the ledger keeps only who owns them."""
        acquired = self._store.acquisitions(asset.device, asset.start_s, asset.revision, from_wh, to_wh)
        borders = {from_wh, to_wh}
        for row in acquired:
            borders.update([border for border in (row.from_wh, row.to_wh) if from_wh < border < to_wh])
        device = self._registry.device(asset.device)
        unknown = device.price if device is not None else 0
        slices = []
        for low, high in pairwise(sorted(borders)):
            price = next((row.price for row in acquired if row.from_wh <= low < row.to_wh), unknown)
            slices.extend(self._slices_at(asset, source, low, high, price))
        return slices

    def _slices_at(self, asset: AssetId, source: Source, from_wh: int, to_wh: int, price: int) -> list[HeldSlice]:
        """These Wh, all bought at one price, cut where the terms of an own provider change."""
        key = (asset.device, int(asset.carrier), asset.start_s, asset.revision)
        end_s = asset.start_s + self._calendar.interval_s
        device = self._registry.device(asset.device)
        if device is None:
            owner = self._owners.of(asset.device)
            return [HeldSlice(key, source, asset.start_s, end_s, from_wh, to_wh, price, owner)]
        if device.terms.keeps_nothing:
            return [HeldSlice(key, source, asset.start_s, end_s, from_wh, to_wh, price, device.owner)]
        # The terms speak of shares of the whole asset, which is what the meter reported.
        row = self._store.message(asset.start_s, asset.device, MessageType.READING, asset.revision)
        asset_wh = row.energy_wh if row is not None else to_wh
        return [
            HeldSlice(
                *(key, source, asset.start_s, end_s, part.from_wh, part.to_wh),
                *(price, device.owner, part.reserved, part.only_for),
            )
            for part in parts_of(device.terms, asset_wh, from_wh, to_wh)
        ]

    def _committed(self, event: BatchCommitted) -> None:
        batch = self._desk.finish(event.batch_id, WorkState.COMMITTED, event.height, None)
        if batch is None:
            known = self._store.batch_state(event.batch_id)
            if self._recovery is not None and known in (None, WorkState.REFUSED):
                self._take_back(self._recovery, event)
            else:
                self._require_known(event)
            return
        match batch.kind:
            case BatchKind.STATEMENTS:
                operations = _operations_of(batch.raw)
                self._note_owners(operations)
                self._finish_statements(operations, WorkState.COMMITTED, None)
            case BatchKind.PROVIDE:
                self._provided(_transfers(_operations_of(batch.raw)), in_stock=self._in_holdings(event.height))
                self._refill = True
                self._offer_again = self._cycle.state is IntervalState.CLEARED
            case BatchKind.SUPPLY:
                self._neighbours.supply_finished(batch, _transfers(_operations_of(batch.raw)), None)
            case BatchKind.DELIVER:
                self._cycle.committed(batch)
            case BatchKind.TAKE_OVER:
                operations = _operations_of(batch.raw)
                self._provided(_transfers(operations), in_stock=self._in_holdings(event.height))
                self._refill = True
            case BatchKind.CORRECT:
                self._withdrawals.seen(_operations_of(batch.raw))
            case BatchKind.CORRECT_DEMAND:
                in_stock = self._in_holdings(event.height)
                self._corrections.committed(batch, _operations_of(batch.raw), in_stock=in_stock)
                self._refill = True
            case BatchKind.CLOSE:
                self._neighbours.closed(batch.start_s)
                self._cycle.committed(batch)
            case BatchKind.VOID:
                self._neighbours.voided(
                    [operation.order_id for operation in _operations_of(batch.raw) if isinstance(operation, Void)]
                )
                self._refill = True

    def _require_known(self, event: BatchCommitted) -> None:
        """Every batch is stored before it is submitted, so one on the ledger that is not in the store was forgotten.

        With it are forgotten the demands that it served, and whoever went on would serve and close them differently.
        """
        state = self._store.batch_state(event.batch_id)
        if state is WorkState.REFUSED:
            # It was under way twice: what was refused at first was taken later, when nothing stood against it any more.
            self.outputs.complain(
                f"block {event.height} carries a batch ({event.batch_id.hex()}) that the ledger had refused before;"
                " what it did is missing in this broker's books: compare them with the ledger (statement --check). If"
                " they differ restore a backup of the database from before that block and run with --recover"
            )
        if state is None:
            raise StoreError(
                f"this broker's database is older than the ledger: block {event.height} carries a batch"
                f" ({event.batch_id.hex()}) of {self._identity.name} that it does not know. Restore the newest backup"
                " of the database that there is, then run with --recover (docs/broker.md, Backups)"
            )

    def _take_back(self, recovery: Recovery, event: BatchCommitted) -> None:
        """The same as at its commit then, but that the meters were told, and that the holdings include it all."""
        assert event.operations is not None  # It was not submitted by this run.
        operations = list(event.operations)
        batch = recovery.take_back(event.batch_id, event.height, operations)
        statements: list[Operation] = [
            each for each in operations if isinstance(each, Register | Admit | MandateOp | EndMandate)
        ]
        self._note_owners(statements)
        self._finish_statements(statements, WorkState.COMMITTED, None)
        match batch.kind:
            case BatchKind.CORRECT:
                self._withdrawals.seen(operations)
            case BatchKind.CORRECT_DEMAND:
                self._corrections.committed(batch, operations, in_stock=True)
            case BatchKind.CLOSE:
                self._neighbours.closed(batch.start_s)
            case BatchKind.VOID:
                self._neighbours.voided([each.order_id for each in operations if isinstance(each, Void)])

    def _end_recovery(self) -> None:
        """The ledger's holdings are reached: everything from here on is this run's own."""
        if self._recovery is None:
            return
        self._cycle.look_again()
        back, self._recovery = self._recovery.recovered, None
        self.outputs.complain(
            f"recovered from the ledger: {back.batches} batches with {back.closes} closes. {back.demands} demands are"
            f" without their signed message, {back.strangers} of them of consumers who are not in this database:"
            " have the meters send again what they have since the backup"
        )

    def _provided(self, transfers: list[Transfer], *, in_stock: bool) -> None:
        """The ledger has transferred own providers' energy to us. `in_stock`: the loaded holdings include it."""
        rows = []
        for transfer in transfers:
            device = self._registry.device(transfer.asset.device)
            assert device is not None  # Whose reading was accepted; registrations are never taken out of the store.
            rows.append(transfer_row(Flow.PROVIDED, transfer, device.source, b""))
            if not in_stock:
                wh = transfer.from_wh, transfer.to_wh
                for piece in self._slices_at(transfer.asset, device.source, *wh, transfer.price):
                    self._stock.add(piece)
        self._store.add_transfers(rows)

    def _refused(self, event: BatchRefused) -> None:
        waiting = {row.batch_id: row for row in self._desk.waiting}
        batch = waiting.get(event.batch_id)
        if batch is None:
            return
        if event.transient:
            self.outputs.submit(batch.raw)
            return
        reason = f"{event.code}: {event.reason}"
        self.outputs.complain(f"the ledger refused a batch ({batch.kind.name.lower()}): {reason}")
        self._desk.finish(event.batch_id, WorkState.REFUSED, None, reason)
        operations = _operations_of(batch.raw)
        match batch.kind:
            case BatchKind.STATEMENTS:
                self._statements_refused(operations, event.operation, reason)
            case BatchKind.PROVIDE:
                self._provide_refused(batch, operations, event.operation, event.code, reason)
            case BatchKind.SUPPLY:
                self._give_back(operations)
                self._neighbours.supply_finished(batch, _transfers(operations), reason)
            case BatchKind.DELIVER:
                self._deliveries_refused(batch, operations, event)
            case BatchKind.TAKE_OVER:
                self._withdrawals.taken_over_refused(operations)
            case BatchKind.CORRECT:
                self._withdrawals.refused(batch, operations, event, self._provide_by(0))
            case BatchKind.CORRECT_DEMAND:
                self._corrections.refused(batch, operations, event)
            case BatchKind.CLOSE:
                self._cycle.close_refused(batch)
            case BatchKind.VOID:
                pass  # The close of the interval ends its orders at the latest.

    def _deliveries_refused(self, batch: BatchRow, operations: list[Operation], event: BatchRefused) -> None:
        """Decide again, without what the ledger found fault with, so that it cannot refuse the same thing for ever.

        A demand at fault is left out for good, slices at fault until the holdings are loaded again. Where it is the
        batch as a whole, the next occasion is soon enough.
        """
        deliveries = [operation for operation in operations if isinstance(operation, Deliver)]
        at_fault = deliveries[event.operation] if event.operation is not None else None
        demand_at_fault = at_fault.pseudonym if at_fault is not None and event.code in _FAULTS_OF_DEMANDS else None
        slices_at_fault = at_fault if demand_at_fault is None else None
        self._give_back([operation for operation in operations if operation is not slices_at_fault])
        self._cycle.refused(batch, deliveries, demand_at_fault, f"{event.code}: {event.reason}")
        if at_fault is not None:
            self._refill = True

    def _give_back(self, operations: list[Operation]) -> None:
        """What a refused batch would have given away is still ours."""
        for asset, from_wh, to_wh in _given_away(operations, self._identity.name):
            if self._holdings_height is not None:
                self._put_back(asset, from_wh, to_wh)

    def _put_back(self, asset: AssetId, from_wh: int, to_wh: int) -> None:
        """These Wh are in stock again."""
        source = self._source_of(asset, from_wh)
        if source is not None:
            for piece in self._as_slices(asset, source, from_wh, to_wh):
                self._stock.add(piece)

    def _source_of(self, asset: AssetId, at_wh: int) -> Source | None:
        device = self._registry.device(asset.device)
        if device is not None:
            return device.source
        acquired = self._store.acquisitions(asset.device, asset.start_s, asset.revision, at_wh, at_wh + 1)
        return Source(acquired[0].source) if acquired else None

    def _take_foreign(self, event: ForeignBatch) -> None:
        """Of what others put on the ledger three things concern us: who owns the devices, since contracts name
        providers; transfers to us, the neighbour's second change request; and the ends of orders to us.
        """
        self._note_owners(event.operations)
        if self._recovery is not None:
            self._recovery.note_admissions(event.operations)
        self._withdrawals.seen(event.operations)
        signer = self._signers.get(event.key_id)
        for operation in event.operations:
            if isinstance(operation, Transfer) and operation.receiver == self._identity.name and operation.order:
                order = Order.from_payload(parse(operation.order).payload)
                in_stock = self._in_holdings(event.height)
                loaded = self._holdings_height is not None
                self._neighbours.transfer_seen(operation, order, in_stock=in_stock, loaded=loaded)
                self._refill = True
            elif signer is not None and isinstance(operation, Void):
                self._neighbours.order_void(signer.name, operation.order_id)
            elif signer is not None and isinstance(operation, Close):
                self._neighbours.interval_closed(signer.name, operation.start_s)

    def _note_owners(self, operations: Iterable[Operation]) -> None:
        for operation in operations:
            if isinstance(operation, Admit):
                admission = Admission.from_payload(parse(operation.statement).payload)
                if self._owners.seen(admission.device, admission.owner):
                    self._owner_learned(admission.device, admission.owner)

    # What is due

    def advance(self, now_s: float) -> None:
        """Do everything that can be done now. `now_s` is network time, for time-outs only."""
        self._submit_statements()
        self._provide()
        self._owners.advance()
        self._foresight.keep_counted()
        self._cycle.keep_told()
        if not self._may_decide:
            return
        self._withdrawals.advance(self._provide_by(0))
        if (
            self._corrections.pending
            and not self._withdrawals.pending
            and self._corrections.advance(self._provide_by(0))
        ):
            self._refill = True
        while self._step(now_s):
            pass
        assert self._cycle.current is not None  # Market time is known, and with it the interval in work.
        self._foresight.advance(self._cycle.current)
        self._arrangements.advance(self._cycle.current, self._foresight.told_of, self._neighbours.trust_of_candidates)

    def _due(self) -> bool:
        """True if a gate has been reached whose work is not done."""
        interval = self._cycle.current
        if interval is None or self.market_time_s is None:
            return True
        if self._cycle.state is IntervalState.OPEN:
            early = self.market_time_s >= interval.end_s and self._cycle.everyone_reported()
            return early or self.market_time_s >= self._calendar.gate_1_of(interval)
        return self.market_time_s >= self._calendar.gate_2_of(interval)

    def _step(self, now_s: float) -> bool:
        """One thing that is due. False if there is nothing, or if it has to wait for an answer."""
        interval = self._cycle.current
        assert interval is not None
        assert self.market_time_s is not None
        if self._readings or self._desk.waits_for(BatchKind.PROVIDE):
            return False  # Energy that was accepted must be in stock before anything is decided.
        if self._corrections.pending or self._withdrawals.pending:
            return False  # What is decided must be about the amounts that the ledger will know.
        if self._owners.pending and (self._clock_waits or not self._must_go_on(interval)):
            return False  # Or who excludes a provider would get less because an answer was slow.
        if self._held_back_blindly:
            self._hold_back()
        if self._cycle.state is IntervalState.OPEN:
            if not self._due():
                return self._neighbours.serve(interval, cleared=False, market_time_s=self.market_time_s)
            # Neighbours' lines of single sources come before own lines of groups, which others can fill too.
            clearing = self._cycle.clear(with_groups=self._own_groups_first or not self._signers)
            self._refill = False
            self._neighbours.begin(interval, clearing, self._cycle)
            return True
        if self._neighbours.serve(interval, cleared=True, market_time_s=self.market_time_s):
            return True
        if self.market_time_s < self._calendar.gate_2_of(interval):
            return self._between_the_gates(interval, now_s)
        if self._desk.waits_before(interval.start_s):
            return False  # A close must not overtake what belongs to intervals before: it would be too late for it.
        self._refill = False
        self._cycle.close(self._neighbours.give_up(interval.start_s))
        self._neighbours.finish(interval)
        self._owners.next_interval()
        return True

    def _must_go_on(self, interval: Interval) -> bool:
        """True if a gate has been reached, not only because everybody has reported, or a round is over."""
        assert self.market_time_s is not None
        if self._cycle.state is IntervalState.OPEN:
            return self.market_time_s >= self._calendar.gate_1_of(interval)
        round_is_over = self._neighbours.round_is_over(interval, self.market_time_s)
        return round_is_over or self.market_time_s >= self._calendar.gate_2_of(interval)

    def _between_the_gates(self, interval: Interval, now_s: float) -> bool:
        """One step of the rounds with neighbours, or of what comes after them. False if there is none now."""
        assert self.market_time_s is not None
        if self._neighbours.time_out(interval, self.market_time_s):
            return True
        if self._neighbours.may_go_on(interval, self.market_time_s):
            self._refill = False
            self._neighbours.go_on(interval, self._cycle, self.market_time_s, now_s)
            return True
        if self._refill and self._neighbours.is_through(interval):
            self._refill = False
            self._neighbours.ask_late(interval, self._cycle.fill(with_groups=True), now_s)
            if self._offer_again:
                self._offer_again = False
                self._neighbours.offer_again(interval)
            return True
        return False

    # Providers' energy

    def _provide(self) -> None:
        """Have the ledger issue what was accepted, and take it over under the mandate."""
        readings, self._readings = self._readings, []
        pairs = []
        for accepted in readings:
            value = accepted.value
            device = self._registry.device(accepted.meter)
            if device is None:
                continue
            if isinstance(value, Reading) and not self._withdrawals.is_plain(value):
                self._withdrawals.issue([accepted.raw], value.start_s, self._provide_by(value.end_s))
                continue
            asset = AssetId(device.device, Carrier(value.carrier), value.start_s, value.revision)
            issue = encode_operation(Issue(accepted.raw))
            transfer = encode_operation(
                Transfer(asset, 0, value.energy_wh, device.owner, self._identity.name, device.price, None)
            )
            pairs.append((value, issue, transfer))
        for run in in_batches(pairs, [len(issue) + len(transfer) for _, issue, transfer in pairs]):
            newest = max(value.end_s for value, _, _ in run)
            operations = [operation for _, issue, transfer in run for operation in (issue, transfer)]
            self._desk.submit(BatchKind.PROVIDE, run[0][0].start_s, self._provide_by(newest), operations)

    def _provide_by(self, end_s: int) -> int:
        """Late energy is taken as long as this broker has not gone far beyond; its clock is the interval in work."""
        interval = self._cycle.current
        current_end_s = interval.end_s if interval is not None else end_s
        return max(end_s, current_end_s) + 2 * self._calendar.interval_s

    def _provide_refused(
        self, batch: BatchRow, operations: list[Operation], at_fault: int | None, code: str, reason: str
    ) -> None:
        """Take the pair at fault out and submit the rest; alone, a pair is given up with its reason on record."""
        pairs = [operations[first : first + 2] for first in range(0, len(operations), 2)]
        bad = at_fault // 2 if at_fault is not None else None
        for index, pair in enumerate(pairs):
            if index == bad or (bad is None and len(pairs) == 1):
                issue = pair[0]
                assert isinstance(issue, Issue)
                reading = Reading.from_payload(parse(issue.statement).payload)
                if code in (Fault.NOT_HELD, Fault.UNKNOWN_ASSET):
                    # Something was carried, or it came after the deadline: what is issued is not what was metered.
                    self._withdrawals.issue([issue.statement], batch.start_s, self._provide_by(batch.start_s))
                    continue
                self._store.refuse_message(
                    reading.start_s, reading.meter, MessageType.READING, reading.revision, reason
                )
            else:
                encoded = [encode_operation(operation) for operation in pair]
                self._desk.submit(BatchKind.PROVIDE, batch.start_s, self._provide_by(batch.start_s), encoded)

    # Statements of registrars and owners

    def _submit_statements(self) -> None:
        """Registrations, admissions and mandates go to the ledger before anything else.

        Our own registration goes first and alone: of an unknown sender the ledger looks into small batches only.
        """
        # Until market time is known nobody can say until when a batch is good, and an expired one is refused for good.
        if not self._statements_waiting or self.market_time_s is None:
            return
        self._statements_waiting = False
        under_way = {
            _statement_of(operation)
            for batch in self._desk.waiting
            if batch.kind is BatchKind.STATEMENTS
            for operation in _operations_of(batch.raw)
        }
        rows = [row for row in self._store.statements(WorkState.WAITING) if row.raw not in under_way]
        far_s = self.market_time_s + 365 * 86_400
        for ours in (True, False):
            ranked = sorted((row for row in rows if self._is_own_registration(row) is ours), key=_statement_rank)
            operations = [encode_operation(_statement_operation(row)) for row in ranked]
            for run in in_batches(operations, [len(operation) for operation in operations]):
                self._desk.submit(BatchKind.STATEMENTS, 0, far_s, run)

    def _is_own_registration(self, row: StatementRow) -> bool:
        if row.kind != MessageType.REGISTRATION:
            return False
        registration = Registration.from_payload(parse(row.raw).payload)
        return public_key_from_cose(registration.key).key_id == self._identity.key.public.key_id

    def _statements_refused(self, operations: list[Operation], at_fault: int | None, reason: str) -> None:
        if at_fault is not None and at_fault < len(operations):
            self._finish_statements([operations[at_fault]], WorkState.REFUSED, reason)
        else:
            self._finish_statements(operations, WorkState.REFUSED, reason)
        self._statements_waiting = True

    def _finish_statements(self, operations: list[Operation], state: WorkState, reason: str | None) -> None:
        raws = {_statement_of(operation) for operation in operations}
        for row in self._store.statements(WorkState.WAITING):
            if row.raw in raws:
                self._store.set_statement(row.number, state, reason)
        self._statements_waiting = bool(self._store.statements(WorkState.WAITING))


def _statement_rank(row: StatementRow) -> tuple[int, int]:
    """Parties before their devices, devices before their mandates: the kinds are numbered in that order."""
    return row.kind, row.number


def _statement_operation(row: StatementRow) -> Operation:
    return _STATEMENT_OPERATIONS[MessageType(row.kind)](row.raw)


def _statement_of(operation: Operation) -> bytes:
    assert isinstance(operation, Register | Admit | MandateOp | EndMandate)
    return operation.statement


def _transfers(operations: list[Operation]) -> list[Transfer]:
    return [operation for operation in operations if isinstance(operation, Transfer)]


def _operations_of(raw_batch: bytes) -> list[Operation]:
    """The operations of a batch that this broker sealed itself."""
    return [decode_operation(encoded) for encoded in Batch.from_payload(parse(raw_batch).payload).operations]


def _given_away(operations: list[Operation], broker: str) -> list[tuple[AssetId, int, int]]:
    """The ranges that these operations take from the broker."""
    ranges = []
    for operation in operations:
        if isinstance(operation, Deliver):
            ranges.extend([(item.asset, item.from_wh, item.to_wh) for item in operation.slices])
        elif isinstance(operation, Transfer) and operation.sender == broker:
            ranges.append((operation.asset, operation.from_wh, operation.to_wh))
    return ranges
