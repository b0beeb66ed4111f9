"""The conversation with neighbouring brokers: asking for energy, being asked, and announcing.

Both sides' states and their legal transitions stand in `broker.market.sourcing`; here they are kept in the store and
carried out. A neighbour's *done* is a hint: energy counts only when the ledger's feed shows its transfer. What is open
is sent again, the stored bytes, after a reconnect or a time-out, and every repeated order gets the same answer.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from broker.ledger.operations import AssetId, Transfer, encode_operation
from broker.market.clearing import Clearing
from broker.market.sourcing import (
    NeighbourOffer,
    OpenOrder,
    RequesterEvent,
    RequesterState,
    SupplierEvent,
    SupplierState,
    grants,
    next_requester_state,
    next_resend_s,
    next_supplier_state,
    order_id_for,
    plan_orders,
    supplier_answer,
)
from broker.market.statements import Flow
from broker.market.stock import HeldSlice, Stock
from broker.market.tariff import Tariff
from broker.protocol import messages
from broker.protocol.envelope import parse
from broker.protocol.limits import MAX_INTEGER, MAX_REASON_CHARACTERS
from broker.protocol.market_time import Interval, MarketCalendar
from broker.protocol.messages import (
    AnswerStatus,
    Carrier,
    Cleared,
    MessageType,
    NeighbourCount,
    Order,
    OrderAnswer,
    SourceAmount,
    SourceOffer,
)
from broker.protocol.sources import Source
from broker.protocol.topics import Topics
from broker.service.batches import BatchDesk, in_batches
from broker.service.outputs import Identity, Outputs
from broker.service.store import BatchKind, BatchRow, BrokerStore, OrderInRow, OrderOutRow, TransferRow

MAX_OPEN_ORDERS_IN: Final = 4_096
"""Orders of all neighbours that wait to be served; more are refused, so that a flood costs its sender."""

COARSE_WH: Final = 100
"""Stock is announced in steps of this, rounded down: enough to choose whom to ask, too little to read off trades."""

KEEP_HEARD_S: Final = 14 * 86_400
"""Whom to ask needs what was said last; what a new contract can expect, what was left over in the last weeks."""


@dataclass(slots=True)
class _Waiting:
    """When an order was last sent, for time-outs in network time."""

    attempts: int
    resend_at_s: float


class Neighbours:
    """Orders out and in, and what is announced and heard."""

    def __init__(
        self,
        identity: Identity,
        calendar: MarketCalendar,
        topics: Topics,
        store: BrokerStore,
        stock: Stock,
        desk: BatchDesk,
        outputs: Outputs,
        names: tuple[str, ...],
        highest_price: int,
        tariff: Tariff,
    ) -> None:
        self._identity = identity
        self._calendar = calendar
        self._topics = topics
        self._store = store
        self._stock = stock
        self._desk = desk
        self._outputs = outputs
        self._names = names
        self._highest_price = highest_price
        self._tariff = tariff
        # What is under way, so that a turn without any neighbour's business costs no query.
        self._asked = {row.order_id: _Waiting(0, 0.0) for row in store.open_orders_out()}
        self._received = {_key(row) for row in store.orders_in_state(_name(SupplierState.RECEIVED))}
        self._submitted = {_key(row) for row in store.orders_in_state(_name(SupplierState.SUBMITTED))}

    # The requester's side

    @property
    def waits_for_answers(self) -> bool:
        """True while an order of ours may still be served."""
        return bool(self._asked)

    def ask(self, interval: Interval, clearing: Clearing, now_s: float) -> bool:
        """Order what a clearing lacks from neighbours that may have it. False if there is nobody left to ask.

        Call only while no order is open: what may still come must not be asked of anyone else.
        """
        before = self._store.orders_out(interval.start_s)
        planned = plan_orders(
            clearing.shortages,
            clearing.group_shortage_wh,
            self._names,
            self._offers_before(interval),
            self._highest_price,
            # Who gave all that was asked may have more.
            [(row.neighbour, Source(row.source)) for row in before if row.seen_wh < row.energy_wh],
            clearing.price_limits,
        )
        for plan in planned:
            order = Order(
                order_id_for(self._identity.name, plan.source, interval.start_s, len(before), plan.neighbour),
                self._identity.name,
                plan.source,
                interval.start_s,
                interval.end_s,
                plan.energy_wh,
                plan.highest_price,
                interval.end_s,
                (self._identity.name, plan.neighbour),
            )
            row = OrderOutRow(
                order.order_id,
                interval.start_s,
                plan.neighbour,
                int(plan.source),
                plan.energy_wh,
                self._identity.seal(order),
                _name(RequesterState.ASKED),
                0,
                None,
            )
            self._store.add_order_out(row)
            self._send_order(row, now_s)
        return bool(planned)

    def _offers_before(self, interval: Interval) -> list[NeighbourOffer]:
        """What neighbours announced after the interval before this one: all of them have spoken about that by now."""
        offers = []
        before_s = interval.start_s - self._calendar.interval_s
        for neighbour, payload in self._store.heard(before_s, MessageType.STOCK).items():
            for offer in messages.Stock.from_payload(payload).offers:
                offers.append(NeighbourOffer(neighbour, offer.source, offer.energy_wh, offer.price))
        return offers

    def _send_order(self, row: OrderOutRow, now_s: float) -> None:
        waiting = self._asked.setdefault(row.order_id, _Waiting(0, 0.0))
        waiting.attempts += 1
        waiting.resend_at_s = now_s + next_resend_s(waiting.attempts)
        self._outputs.publish(self._topics.request(row.neighbour), row.raw)

    def send_again(self, now_s: float, *, reconnected: bool) -> None:
        """Repeat orders whose answer is overdue, or all open ones after a reconnect."""
        due = [order_id for order_id, waiting in self._asked.items() if reconnected or waiting.resend_at_s <= now_s]
        for order_id in due:
            row = self._store.order_out(order_id)
            assert row is not None
            self._send_order(row, now_s)

    def next_resend_at_s(self) -> float | None:
        """Network time of the next repetition; None while no order is open."""
        return min((waiting.resend_at_s for waiting in self._asked.values()), default=None)

    def take_answer(self, peer: str, answer: OrderAnswer) -> bool:
        """A neighbour's answer. Whatever it says, only the ledger moves energy. True if it ends an open order."""
        row = self._store.order_out(answer.order_id)
        if row is None or row.neighbour != peer:
            self._outputs.complain(f"{peer} answers an order that it was not asked; the answer is ignored")
            return False
        was_open = row.order_id in self._asked
        if answer.status is AnswerStatus.DONE:
            self._move_out(row, RequesterEvent.ANSWERED_DONE, row.seen_wh, answer.energy_wh, None)
        else:
            self._move_out(row, RequesterEvent.ANSWERED_REFUSED, row.seen_wh, row.answered_wh, answer.reason)
        return was_open and row.order_id not in self._asked

    def transfer_seen(self, sender: str, transfer: Transfer, order: Order, *, in_stock: bool) -> None:
        """The feed shows a transfer to us under an order: the energy is ours.

        `in_stock`: the holdings that the ledger gave, or is giving, include it.
        """
        asset = transfer.asset
        if not self._store.add_transfers([transfer_row(Flow.BOUGHT, transfer, order.source, order.order_id)]):
            return
        if not in_stock:
            key = (asset.device, int(asset.carrier), asset.start_s, asset.revision)
            self._stock.add(
                HeldSlice(
                    key,
                    order.source,
                    order.start_s,
                    order.end_s,
                    transfer.from_wh,
                    transfer.to_wh,
                    transfer.price,
                    self._store.owner_of(asset.device) or "",
                )
            )
        asked = self._store.order_out(order.order_id)
        if asked is None:
            self._outputs.complain(f"{sender} transferred energy under an order that this broker does not know")
            return
        seen_wh = asked.seen_wh + transfer.to_wh - transfer.from_wh
        self._move_out(asked, RequesterEvent.TRANSFER_SEEN, seen_wh, asked.answered_wh, None)

    def give_up(self, start_s: int) -> list[bytes]:
        """Gate 2: stop waiting for the orders of an interval that are still open. Returns their ids, to be voided.

        They end when the ledger shows it (`ended`): until then a transfer under them may still stand before the void.
        """
        given_up = [row.order_id for row in self._store.orders_out(start_s) if row.order_id in self._asked]
        for order_id in given_up:
            del self._asked[order_id]
        return given_up

    def ended(self, start_s: int) -> None:
        """The ledger shows our close of that interval: nothing can be transferred under its orders any more."""
        for row in self._store.orders_out(start_s):
            if row.state == _name(RequesterState.ASKED):
                self._move_out(row, RequesterEvent.END_SEEN, row.seen_wh, row.answered_wh, "unanswered at gate 2")

    def _move_out(
        self, row: OrderOutRow, event: RequesterEvent, seen_wh: int, answered_wh: int | None, reason: str | None
    ) -> None:
        state = next_requester_state(RequesterState[row.state.upper()], event)
        self._store.set_order_out(row.order_id, _name(state), seen_wh, answered_wh, reason)
        if state is not RequesterState.ASKED:
            self._asked.pop(row.order_id, None)

    # The supplier's side

    @property
    def owes_answers(self) -> bool:
        """True while an order of a neighbour is neither refused nor settled on the ledger."""
        return bool(self._received or self._submitted)

    def take_order(self, peer: str, order: Order, raw: bytes, market_time_s: int) -> None:
        """A neighbour's order: stored, and served after the next apportioning; a repeated one is answered again."""
        known = self._store.order_in(peer, order.order_id)
        if known is not None:
            if known.raw != raw:
                self._outputs.complain(f"{peer} sent another order under an id that it used before; it is ignored")
            elif known.answer is not None:
                self._outputs.publish(self._topics.response(peer, self._identity.name), known.answer)
            return
        reason = self._refusal(peer, order, market_time_s)
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
        )
        self._store.add_order_in(row)
        self._received.add(_key(row))

    def _refusal(self, peer: str, order: Order, market_time_s: int) -> str | None:
        """Why an order cannot be served at all; None if it can be considered."""
        if order.requester != peer:
            return f"{peer} signed an order in the name of {order.requester}"
        if order.path[-1] != self._identity.name or order.path[0] != peer or len(set(order.path)) != len(order.path):
            return f"the path {' → '.join(order.path)} does not lead from {peer} to {self._identity.name}"
        if not self._calendar.is_interval(order.start_s, order.end_s):
            return f"[{order.start_s}, {order.end_s}) is no market interval"
        # One interval of tolerance, because not all clocks are the same.
        if order.start_s > market_time_s:
            return f"the interval at {order.start_s} has not begun here; order when it is over"
        if len(self._received) >= MAX_OPEN_ORDERS_IN:
            return f"{MAX_OPEN_ORDERS_IN} orders are waiting here; ask again later"
        return None

    def ready_to_serve(self, start_s: int) -> bool:
        """True when every neighbour has announced this interval and the orders that it announced are here."""
        if not self._received:
            return True
        heard = self._store.heard(start_s, MessageType.CLEARED)
        if any(name not in heard for name in self._names):
            return False
        received: dict[str, int] = {}
        for row in self._store.orders_in(start_s):
            received[row.requester] = received.get(row.requester, 0) + 1
        for neighbour, payload in heard.items():
            asked = {item.neighbour: item.orders for item in Cleared.from_payload(payload).asked}
            if received.get(neighbour, 0) < asked.get(self._identity.name, 0):
                return False
        return True

    def has_orders_up_to(self, start_s: int) -> bool:
        """True if unserved orders wait for that interval or an earlier one."""
        if not self._received:
            return False
        waiting = self._store.orders_in_state(_name(SupplierState.RECEIVED))
        return any(row.start_s <= start_s for row in waiting)

    def serve(self, up_to_start_s: int) -> None:
        """Share out what is left of stock among the waiting orders of intervals up to that one."""
        by_interval: dict[int, list[OrderInRow]] = {}
        for row in self._store.orders_in_state(_name(SupplierState.RECEIVED)):
            if row.start_s <= up_to_start_s:
                by_interval.setdefault(row.start_s, []).append(row)
        for start_s, rows in sorted(by_interval.items()):
            interval = Interval(start_s, start_s + self._calendar.interval_s)
            orders = [
                OpenOrder(row.order_id, row.requester, Source(row.source), row.energy_wh, row.highest_price)
                for row in rows
            ]
            shelves = self._by_asked_price(interval)
            offered = {
                source: {price: shelf.available(interval)[source] for price, shelf in by_price.items()}
                for source, by_price in shelves.items()
            }
            for row, grant in zip(rows, grants(orders, offered), strict=True):
                source = Source(row.source)
                slices = [
                    (price, held)
                    for price, energy_wh in grant.parts
                    for held in shelves[source][price].take(source, start_s, energy_wh)
                ]
                for _, held in slices:
                    self._stock.remove(held.asset, held.from_wh, held.to_wh)
                if slices:
                    self._supply(row, grant.energy_wh, slices, interval)
                else:
                    self._decline(row, grant.reason or "nothing left")

    def _for_neighbours(self, interval: Interval) -> Iterator[HeldSlice]:
        """What no provider keeps for consumers of this broker."""
        return (held for held in self._stock.slices(interval) if not held.reserved)

    def _by_asked_price(self, interval: Interval) -> dict[Source, dict[int, Stock]]:
        """What is in stock of an interval, by source and the price that a neighbour is asked for it. Takes nothing."""
        shelves: dict[Source, dict[int, Stock]] = {}
        for held in self._for_neighbours(interval):
            price = self._tariff.for_neighbours(held.price)
            shelves.setdefault(held.source, {}).setdefault(price, Stock()).add(held)
        return shelves

    def _supply(
        self, row: OrderInRow, energy_wh: int, slices: Sequence[tuple[int, HeldSlice]], interval: Interval
    ) -> None:
        """The second change request: the transfer to the neighbour, with its order inside."""
        operations = []
        for price, held in slices:
            device, carrier, start_s, revision = held.asset
            asset = AssetId(device, Carrier(carrier), start_s, revision)
            transfer = Transfer(asset, held.from_wh, held.to_wh, self._identity.name, row.requester, price, row.raw)
            operations.append(encode_operation(transfer))
        # Out of many small devices a large order takes more transfers than one batch holds.
        for run in in_batches(operations, [len(operation) for operation in operations]):
            self._desk.submit(BatchKind.SUPPLY, interval.start_s, interval.end_s + self._calendar.interval_s, run)
        state = next_supplier_state(SupplierState.RECEIVED, SupplierEvent.GRANTED)
        self._store.set_order_in(row.requester, row.order_id, _name(state), energy_wh, None)
        self._received.discard(_key(row))
        self._submitted.add(_key(row))

    def _decline(self, row: OrderInRow, reason: str) -> None:
        state = next_supplier_state(SupplierState.RECEIVED, SupplierEvent.DECLINED)
        self._received.discard(_key(row))
        self._answer(row, state, 0, None, reason)

    def supply_finished(self, batch: BatchRow, transfers: Sequence[Transfer], refusal: str | None) -> None:
        """The ledger's word on a batch of transfers to a neighbour; answers the order when it is the last of it.

        `refusal` is why the ledger refused it, None if it is committed.
        """
        raw = transfers[0].order
        assert raw is not None
        row = self._store.order_in(transfers[0].receiver, Order.from_payload(parse(raw).payload).order_id)
        assert row is not None
        granted_wh = row.granted_wh
        if refusal is None:
            sold = [transfer_row(Flow.SOLD, transfer, Source(row.source), row.order_id) for transfer in transfers]
            self._store.add_transfers(sold)
        else:
            granted_wh -= sum(transfer.to_wh - transfer.from_wh for transfer in transfers)
        if any(other.kind is BatchKind.SUPPLY and raw in other.raw for other in self._desk.waiting):
            self._store.set_order_in(row.requester, row.order_id, row.state, granted_wh, None)
            return
        event = SupplierEvent.BATCH_COMMITTED if granted_wh else SupplierEvent.BATCH_REFUSED
        state = next_supplier_state(SupplierState[row.state.upper()], event)
        self._submitted.discard(_key(row))
        self._answer(row, state, granted_wh, batch.batch_id if granted_wh else None, refusal)

    def _answer(
        self, row: OrderInRow, state: SupplierState, granted_wh: int, batch_id: bytes | None, reason: str | None
    ) -> None:
        status = supplier_answer(state)
        assert status is not None
        answer = OrderAnswer(row.order_id, status, granted_wh, batch_id, None if reason is None else _short(reason))
        raw = self._publish_answer(row.requester, answer)
        self._store.set_order_in(row.requester, row.order_id, _name(state), granted_wh, raw)

    def _publish_answer(self, peer: str, answer: OrderAnswer) -> bytes:
        raw = self._identity.seal(answer)
        self._outputs.publish(self._topics.response(peer, self._identity.name), raw)
        return raw

    # Announcements

    def announce(self, interval: Interval, clearing: Clearing) -> None:
        """Tell neighbours that this interval is cleared here, what is short, whom we ask, and coarsely what is left."""
        self._note_left_over(interval)
        if not self._names:
            return
        counts: dict[str, int] = {}
        for row in self._store.orders_out(interval.start_s):
            counts[row.neighbour] = counts.get(row.neighbour, 0) + 1
        cleared = Cleared(
            self._identity.name,
            interval.start_s,
            interval.end_s,
            tuple([SourceAmount(source, clearing.shortages[source]) for source in sorted(clearing.shortages)]),
            tuple([NeighbourCount(name, counts[name]) for name in sorted(counts)]),
        )
        self._publish_retained(self._topics.cleared(self._identity.name), self._identity.seal(cleared))
        stock = self._stock_message(
            interval, [(held, self._tariff.for_neighbours(held.price)) for held in self._for_neighbours(interval)]
        )
        self._publish_retained(self._topics.stock(self._identity.name), self._identity.seal(stock))

    def _stock_message(self, interval: Interval, priced: Iterable[tuple[HeldSlice, int]]) -> messages.Stock:
        """Coarsely what these slices are, at the lowest price of each source: whoever would pay that can get some, and
        an order's own limit decides how much.
        """
        cheapest: dict[Source, int] = {}
        offered_wh: dict[Source, int] = {}
        for held, price in priced:
            offered_wh[held.source] = offered_wh.get(held.source, 0) + held.energy_wh
            cheapest[held.source] = min(cheapest.get(held.source, MAX_INTEGER), price)
        offers = [
            SourceOffer(source, energy_wh - energy_wh % COARSE_WH, cheapest[source])
            for source, energy_wh in sorted(offered_wh.items())
            if energy_wh >= COARSE_WH
        ]
        return messages.Stock(self._identity.name, interval.start_s, interval.end_s, tuple(offers))

    def _note_left_over(self, interval: Interval) -> None:
        """Keep what own consumers left, at the prices paid, beside what neighbours say: new contracts are held against
        it. What is kept for certain consumers is not in it.
        """
        free = [(held, held.price) for held in self._stock.slices(interval) if not held.only_for]
        payload = self._stock_message(interval, free).to_payload()
        self._store.set_heard(interval.start_s, MessageType.STOCK, self._identity.name, payload)

    def _publish_retained(self, topic: str, raw: bytes) -> None:
        self._store.set_announcement(topic, raw)
        self._outputs.publish(topic, raw, retain=True)

    def hear(self, peer: str, announcement: Cleared | messages.Stock | messages.Forecast) -> None:
        """A neighbour's announcement about one interval, or about the day that begins then."""
        if announcement.broker != peer:
            self._outputs.complain(f"{peer} announces in the name of {announcement.broker}; it is ignored")
            return
        self._store.set_heard(announcement.start_s, announcement.TYPE, peer, announcement.to_payload())

    def forget(self, before_s: int) -> None:
        """Drop what was heard long before that interval."""
        self._store.forget_heard(before_s - KEEP_HEARD_S)


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


def _name(state: RequesterState | SupplierState) -> str:
    return state.name.lower()


def _short(reason: str) -> str:
    return reason[:MAX_REASON_CHARACTERS]


def _key(row: OrderInRow) -> tuple[str, bytes]:
    return row.requester, row.order_id
