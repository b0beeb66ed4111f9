"""Neighbours' orders to this broker: accepted or not, served from what is left, passed on, and answered.

What is promised is taken out of stock in the same commit as the batch that transfers it, and comes back when the ledger
refuses that batch: a reservation ends with its order, by itself. An answer is stored with the order and given again
whenever the order comes again. Transitions are those of `broker.market.sourcing`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from broker.ledger.operations import AssetId, Transfer, encode_operation
from broker.market.rounds import is_for_passing_on
from broker.market.sourcing import (
    Grant,
    OpenOrder,
    SupplierEvent,
    SupplierState,
    grants,
    next_supplier_state,
    supplier_answer,
)
from broker.market.statements import Flow
from broker.market.stock import HeldSlice, Stock
from broker.market.tariff import Tariff
from broker.protocol.envelope import parse
from broker.protocol.limits import MAX_INTEGER, MAX_PATH_BROKERS, MAX_REASON_CHARACTERS
from broker.protocol.market_time import Interval, MarketCalendar
from broker.protocol.messages import AnswerStatus, Carrier, Order, OrderAnswer
from broker.protocol.sources import Source
from broker.protocol.topics import Topics
from broker.service.batches import BatchDesk, in_batches
from broker.service.outputs import Identity, Outputs
from broker.service.store import BatchKind, BatchRow, BrokerStore, OrderInRow, TransferRow

MAX_OPEN_ORDERS_IN: Final = 4_096
"""Orders of all neighbours that wait to be served; more are refused, so that a flood costs its sender."""


@dataclass(frozen=True, slots=True)
class PartnerPolicy:
    """What a neighbour may do here: if it is served and asked, and the most that it gets of one interval, in Wh."""

    is_served: bool = True
    is_asked: bool = True
    most_wh: int = MAX_INTEGER


@dataclass(slots=True)
class _Shelves:
    """What of an interval can be sold, by source and the price that a neighbour is asked for it."""

    stocks: dict[Source, dict[int, Stock]]
    offered_wh: dict[Source, dict[int, int]]


class OrdersIn:
    """Neighbours' orders that are not settled, and how they get served."""

    def __init__(
        self,
        identity: Identity,
        calendar: MarketCalendar,
        topics: Topics,
        store: BrokerStore,
        stock: Stock,
        desk: BatchDesk,
        outputs: Outputs,
        policies: Mapping[str, PartnerPolicy],
        tariff: Tariff,
        is_own_device: Callable[[str], bool],
        promised_to: Callable[[int], dict[tuple[str, Source], int]],
    ) -> None:
        """`is_own_device`: whether a device's energy comes to this broker from its provider.

        `promised_to`: by (requester, source), the Wh of the interval with that start that were promised a day ahead.
        """
        self._identity = identity
        self._calendar = calendar
        self._topics = topics
        self._store = store
        self._stock = stock
        self._desk = desk
        self._outputs = outputs
        self._policies = policies
        self._tariff = tariff
        self._is_own_device = is_own_device
        self._promised_to = promised_to
        # What is under way, so that a turn without any neighbour's business costs no query.
        self._received = {_key(row) for row in self._in_state(SupplierState.RECEIVED)}
        self._passed_on = {_key(row) for row in self._in_state(SupplierState.PASSED_ON)}

    def _in_state(self, state: SupplierState) -> list[OrderInRow]:
        return self._store.orders_in_state(_name(state))

    # What is there

    def received(self) -> list[OrderInRow]:
        """The orders that wait to be served, oldest interval first."""
        return self._in_state(SupplierState.RECEIVED) if self._received else []

    def passed_on(self) -> list[OrderInRow]:
        """The orders for which others are, or will be, asked."""
        return self._in_state(SupplierState.PASSED_ON) if self._passed_on else []

    def row(self, requester: str, order_id: bytes) -> OrderInRow:
        """A stored order."""
        row = self._store.order_in(requester, order_id)
        assert row is not None
        return row

    def counts(self, start_s: int) -> dict[str, int]:
        """How many orders of an interval are here, by requester."""
        received: dict[str, int] = {}
        for row in self._store.orders_in(start_s):
            received[row.requester] = received.get(row.requester, 0) + 1
        return received

    # Accepting

    def take_order(self, peer: str, order: Order, raw: bytes, market_time_s: int) -> None:
        """A neighbour's order: stored, and served when its round is; a repeated one is answered again."""
        known = self._store.order_in(peer, order.order_id)
        if known is not None:
            if known.raw != raw:
                self._outputs.complain(f"{peer} sent another order under an id that it used before; it is ignored")
            elif known.answer is not None:
                self._outputs.publish(self._topics.response(peer, self._identity.name), known.answer)
            return
        reason = self._fault(peer, order, market_time_s)
        if reason is not None:
            # Not stored: what cannot be served must not fill our disk, and a repetition gets the same answer anyway.
            self._publish_answer(peer, OrderAnswer(order.order_id, AnswerStatus.REFUSED, 0, None, _short(reason)))
            return
        row = OrderInRow(
            peer,
            order.order_id,
            order.start_s,
            int(order.source),
            order.energy_wh,
            order.highest_price,
            raw,
            _name(SupplierState.RECEIVED),
            0,
            None,
            order.round_number,
            len(order.path),
        )
        self._store.add_order_in(row)
        self._received.add(_key(row))
        if not self._policies[peer].is_served:
            self._decline(row, f"{self._identity.name} does not serve {peer}")

    def _fault(self, peer: str, order: Order, market_time_s: int) -> str | None:
        """Why an order makes no sense here; None if it can be considered."""
        if order.requester != peer:
            return f"{peer} signed an order in the name of {order.requester}"
        if order.path[-2:] != (peer, self._identity.name) or len(set(order.path)) != len(order.path):
            return f"the path {' → '.join(order.path)} does not lead from {peer} to {self._identity.name}"
        if (order.parent is None) != (len(order.path) == 2):
            return "an order with a longer path passes on another one, and only such an order names a parent"
        if not self._calendar.is_interval(order.start_s, order.end_s):
            return f"[{order.start_s}, {order.end_s}) is no market interval"
        # One interval of tolerance, because not all clocks are the same.
        if order.start_s > market_time_s:
            return f"the interval at {order.start_s} has not begun here; order when it is over"
        if len(self._received) >= MAX_OPEN_ORDERS_IN:
            return f"{MAX_OPEN_ORDERS_IN} orders are waiting here; ask again later"
        return None

    # Serving

    def serve(
        self, rows: Sequence[OrderInRow], can_pass_on: Callable[[OrderInRow], bool], *, with_bought: bool
    ) -> None:
        """Share out what is left of stock among waiting orders of one interval.

        `can_pass_on`: if others can be asked for what is not here. `with_bought`: sell what was bought as well.
        """
        start_s = rows[0].start_s
        interval = Interval(start_s, start_s + self._calendar.interval_s)
        shelves = self._shelves(interval, with_bought=with_bought)
        orders = [
            OpenOrder(row.order_id, row.requester, Source(row.source), wish_wh, row.highest_price, _passes_on(row))
            for row, wish_wh in zip(rows, self._wishes(rows), strict=True)
        ]
        granted = grants(orders, shelves.offered_wh, self._promised_left(start_s))
        for row, grant in zip(rows, granted, strict=True):
            self._carry_out(row, grant, shelves, interval, pass_on=can_pass_on(row))

    def _wishes(self, rows: Sequence[OrderInRow]) -> list[int]:
        """What each order asks for, within what its requester may have of the interval."""
        left_wh = {row.requester: self._policies[row.requester].most_wh for row in rows}
        for row in self._store.orders_in(rows[0].start_s):
            if row.requester in left_wh:
                left_wh[row.requester] -= row.granted_wh
        wishes = []
        for row in rows:
            wishes.append(min(row.energy_wh, max(0, left_wh[row.requester])))
            left_wh[row.requester] -= wishes[-1]
        return wishes

    def _promised_left(self, start_s: int) -> dict[tuple[str, Source], int]:
        """What was promised of an interval the day before and has not been given yet."""
        left_wh = self._promised_to(start_s)
        if left_wh:
            for row in self._store.orders_in(start_s):
                key = row.requester, Source(row.source)
                if key in left_wh and not _passes_on(row):
                    left_wh[key] = max(0, left_wh[key] - row.granted_wh)
        return left_wh

    def _shelves(self, interval: Interval, *, with_bought: bool) -> _Shelves:
        """What can be sold: nothing that a provider keeps for consumers of this broker. Takes nothing.

        Between two rounds of orders what was bought is for own consumers, who get it when the round is over. If it were
        sold, it would depend on what comes first: the energy or somebody's order.
        """
        stocks: dict[Source, dict[int, Stock]] = {}
        for held in self._stock.slices(interval):
            if held.reserved or (not with_bought and not self._is_own_device(held.asset[0])):
                continue
            price = self._tariff.for_neighbours(held.price)
            stocks.setdefault(held.source, {}).setdefault(price, Stock()).add(held)
        offered_wh = {
            source: {price: shelf.available(interval)[source] for price, shelf in by_price.items()}
            for source, by_price in stocks.items()
        }
        return _Shelves(stocks, offered_wh)

    def offers(self, interval: Interval, *, with_bought: bool) -> dict[Source, tuple[int, int]]:
        """By source: Wh that can be sold, and the lowest price of any."""
        offers = {}
        for source, by_price in self._shelves(interval, with_bought=with_bought).offered_wh.items():
            sold = {price: energy_wh for price, energy_wh in by_price.items() if energy_wh}
            if sold:
                # At the lowest price: whoever would pay that can get some, and an order's own limit decides how much.
                offers[source] = (sum(sold.values()), min(min(sold), MAX_INTEGER))
        return offers

    def _carry_out(
        self, row: OrderInRow, grant: Grant, shelves: _Shelves, interval: Interval, *, pass_on: bool
    ) -> None:
        source = Source(row.source)
        slices = [
            (price, held)
            for price, energy_wh in grant.parts
            for held in shelves.stocks[source][price].take(source, interval.start_s, energy_wh)
        ]
        for _, held in slices:
            self._stock.remove(held.asset, held.from_wh, held.to_wh)
        if slices:
            self._submit(row, slices)
        if pass_on and grant.energy_wh < row.energy_wh:
            row = self._move(row, SupplierEvent.ASKED_OTHERS, grant.energy_wh)
            if not slices:
                self._answer(row, None, None)
        elif slices:
            self._move(row, SupplierEvent.GRANTED, grant.energy_wh)
        else:
            self._decline(row, grant.reason or "nothing left")

    def _submit(self, row: OrderInRow, slices: Sequence[tuple[int, HeldSlice]]) -> None:
        """The second change request: the transfer to the neighbour, with its order inside."""
        operations = []
        for price, held in slices:
            device, carrier, start_s, revision = held.asset
            asset = AssetId(device, Carrier(carrier), start_s, revision)
            transfer = Transfer(asset, held.from_wh, held.to_wh, self._identity.name, row.requester, price, row.raw)
            operations.append(encode_operation(transfer))
        # Out of many small devices a large order takes more transfers than one batch holds.
        not_after_s = row.start_s + 2 * self._calendar.interval_s
        for run in in_batches(operations, [len(operation) for operation in operations]):
            self._desk.submit(BatchKind.SUPPLY, row.start_s, not_after_s, run)

    def hand_on(self, row: OrderInRow, held: HeldSlice) -> int:
        """Transfer to a requester what was bought for its order, at what was paid and the margin. Returns the Wh."""
        self._submit(row, [(self._tariff.for_neighbours(held.price), held)])
        self._store.set_order_in(row._replace(granted_wh=row.granted_wh + held.energy_wh))
        return held.energy_wh

    def nobody_left(self, row: OrderInRow) -> None:
        """All who were asked for an order that was passed on have answered, and no more are asked."""
        if self._under_way(row):
            self._move(row, SupplierEvent.GRANTED, row.granted_wh)
        elif row.granted_wh:
            self._answer(self._move(row, SupplierEvent.BATCH_COMMITTED, row.granted_wh), None, None)
        else:
            self._decline(row, f"nobody here has {Source(row.source).label}")

    def _decline(self, row: OrderInRow, reason: str) -> None:
        self._answer(self._move(row, SupplierEvent.DECLINED, 0), None, reason)

    def _under_way(self, row: OrderInRow) -> bool:
        """True while a batch under this order has no result."""
        return any(batch.kind is BatchKind.SUPPLY and row.raw in batch.raw for batch in self._desk.waiting)

    # The ledger's word

    def supply_finished(self, batch: BatchRow, transfers: Sequence[Transfer], refusal: str | None) -> OrderInRow:
        """The ledger's word on a batch of transfers to a neighbour; answers the order when it is the last of it.

        `refusal` is why the ledger refused it, None if it is committed. Returns the order.
        """
        raw = transfers[0].order
        assert raw is not None
        row = self.row(transfers[0].receiver, Order.from_payload(parse(raw).payload).order_id)
        if refusal is None:
            self._store.add_transfers(
                [transfer_row(Flow.SOLD, transfer, Source(row.source), row.order_id) for transfer in transfers]
            )
        else:
            row = row._replace(
                granted_wh=row.granted_wh - sum([transfer.to_wh - transfer.from_wh for transfer in transfers])
            )
        self._store.set_order_in(row)
        if self._under_way(row):
            return row
        batch_id = batch.batch_id if row.granted_wh else None
        if row.state == _name(SupplierState.PASSED_ON):
            if row.answer is None:
                self._answer(row, batch_id, None)
            return self.row(row.requester, row.order_id)
        event = SupplierEvent.BATCH_COMMITTED if row.granted_wh else SupplierEvent.BATCH_REFUSED
        self._answer(self._move(row, event, row.granted_wh), batch_id, refusal)
        return row

    def ended(self, row: OrderInRow) -> None:
        """A block holds the requester's void of the order, or its close of the interval."""
        if row.state in (_name(SupplierState.RECEIVED), _name(SupplierState.PASSED_ON)) and not self._under_way(row):
            # What stands on the ledger already was given in time.
            event = SupplierEvent.BATCH_COMMITTED if row.granted_wh else SupplierEvent.END_SEEN
            self._answer(self._move(row, event, row.granted_wh), None, None if row.granted_wh else "it has ended")

    # States and answers

    def _move(self, row: OrderInRow, event: SupplierEvent, granted_wh: int) -> OrderInRow:
        state = next_supplier_state(SupplierState[row.state.upper()], event)
        row = row._replace(state=_name(state), granted_wh=granted_wh)
        self._store.set_order_in(row)
        self._received.discard(_key(row))
        self._passed_on.discard(_key(row))
        if state is SupplierState.PASSED_ON:
            self._passed_on.add(_key(row))
        return row

    def _answer(self, row: OrderInRow, batch_id: bytes | None, reason: str | None) -> None:
        status = supplier_answer(SupplierState[row.state.upper()])
        assert status is not None
        answer = OrderAnswer(row.order_id, status, row.granted_wh, batch_id, None if reason is None else _short(reason))
        self._store.set_order_in(row._replace(answer=self._publish_answer(row.requester, answer)))

    def _publish_answer(self, peer: str, answer: OrderAnswer) -> bytes:
        raw = self._identity.seal(answer)
        self._outputs.publish(self._topics.response(peer, self._identity.name), raw)
        return raw


def _passes_on(row: OrderInRow) -> bool:
    """True if the requester orders for another broker. What was promised to it is for its own consumers.

    What it has been given for them is known when its next order for them comes; this can change in between.
    """
    return row.path_length > 2


def can_be_passed_on(row: OrderInRow) -> bool:
    """True if the path of an order leaves room for one more broker, and the next round is for passing it on."""
    has_round = row.round_number is not None and is_for_passing_on(row.round_number + 1)
    return has_round and row.path_length < MAX_PATH_BROKERS


def transfer_row(flow: Flow, transfer: Transfer, source: Source, order_id: bytes) -> TransferRow:
    """A committed transfer of ours as it is kept for the accounts."""
    asset = transfer.asset
    return TransferRow(
        int(flow),
        transfer.sender if flow.into_broker else transfer.receiver,
        asset.device,
        asset.start_s,
        asset.revision,
        transfer.from_wh,
        transfer.to_wh,
        int(source),
        transfer.price,
        order_id,
    )


def _name(state: SupplierState) -> str:
    return state.name.lower()


def _short(reason: str) -> str:
    return reason[:MAX_REASON_CHARACTERS]


def _key(row: OrderInRow) -> tuple[str, bytes]:
    return row.requester, row.order_id
