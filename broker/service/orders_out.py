"""Orders of this broker to its neighbours: the first change request, what is answered, and what the ledger shows.

An order is for own consumers, or it passes on a neighbour's order (then it has a parent). Every transition goes through
the table of `broker.market.sourcing` and is stored with what it causes. What came of an interval's orders is entered
into the neighbours' records (`broker.market.partners`) when the interval is closed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from broker.ledger.operations import Void, encode_operation
from broker.market.partners import PartnerRecord
from broker.market.rounds import round_limit_s
from broker.market.sourcing import (
    RequesterEvent,
    RequesterState,
    next_requester_state,
    next_resend_s,
    order_id_for,
)
from broker.protocol.market_time import Interval, MarketCalendar
from broker.protocol.messages import AnswerStatus, Order, OrderAnswer
from broker.protocol.sources import Source
from broker.protocol.topics import Topics
from broker.service.batches import BatchDesk
from broker.service.outputs import Identity, Outputs
from broker.service.store import BatchKind, BrokerStore, OrderInRow, OrderOutRow


@dataclass(slots=True)
class _Waiting:
    """When an order was last sent, for time-outs in network time."""

    attempts: int
    resend_at_s: float


@dataclass(frozen=True, slots=True)
class Parent:
    """The neighbour's order that an order passes on."""

    requester: str
    order_id: bytes
    path: tuple[str, ...]
    not_after_s: int

    @classmethod
    def of(cls, row: OrderInRow, order: Order) -> "Parent":
        return cls(row.requester, row.order_id, order.path, order.not_after_s)


class OrdersOut:
    """Open orders by id, and the neighbours' records."""

    def __init__(
        self,
        identity: Identity,
        calendar: MarketCalendar,
        topics: Topics,
        store: BrokerStore,
        desk: BatchDesk,
        outputs: Outputs,
        jitter: Callable[[], int],
    ) -> None:
        """`jitter` gives 0 to 255 at random, for pauses between repetitions."""
        self._identity = identity
        self._calendar = calendar
        self._topics = topics
        self._store = store
        self._desk = desk
        self._outputs = outputs
        self._jitter = jitter
        # What is open, so that a turn without any neighbour's business costs no query.
        self._open = {row.order_id: _Waiting(0, 0.0) for row in store.open_orders_out()}
        self._records = {neighbour: PartnerRecord.from_bytes(raw) for neighbour, raw in store.partner_records().items()}

    # Sending

    @property
    def any_open(self) -> bool:
        """True while an order may still be served."""
        return bool(self._open)

    def open_rows(self) -> list[OrderOutRow]:
        """The orders that may still be served, oldest interval first."""
        return self._store.open_orders_out() if self._open else []

    def send(
        self,
        neighbour: str,
        source: Source,
        energy_wh: int,
        highest_price: int,
        interval: Interval,
        round_number: int | None,
        now_s: float,
        parent: Parent | None = None,
    ) -> None:
        """Store an order and send it."""
        own = self._identity.name
        # Outside the rounds, orders of an interval are told apart by how many there were before.
        number = round_number if round_number is not None else 1_000 + len(self._store.orders_out(interval.start_s))
        order = Order(
            order_id_for(own, source, interval.start_s, number, neighbour, parent.order_id if parent else b""),
            own,
            source,
            interval.start_s,
            interval.end_s,
            energy_wh,
            highest_price,
            # Earlier than the order that it is sent for.
            parent.not_after_s - 1 if parent else interval.end_s,
            (*parent.path, neighbour) if parent else (own, neighbour),
            parent.order_id if parent else None,
            round_number,
        )
        row = OrderOutRow(
            order.order_id,
            interval.start_s,
            neighbour,
            int(source),
            energy_wh,
            self._identity.seal(order),
            name_of(RequesterState.ASKED),
            0,
            None,
            None,
            round_number,
            parent.requester if parent else None,
            parent.order_id if parent else None,
        )
        self._store.add_order_out(row)
        self._publish(row, now_s)

    def _publish(self, row: OrderOutRow, now_s: float) -> None:
        waiting = self._open.setdefault(row.order_id, _Waiting(0, 0.0))
        waiting.attempts += 1
        waiting.resend_at_s = now_s + next_resend_s(waiting.attempts, self._jitter())
        self._outputs.publish(self._topics.request(row.neighbour), row.raw)

    def send_again(self, now_s: float, *, reconnected: bool) -> None:
        """Repeat orders whose answer is overdue, or all open ones after a reconnect."""
        due = [order_id for order_id, waiting in self._open.items() if reconnected or waiting.resend_at_s <= now_s]
        for order_id in due:
            self._publish(self._row(order_id), now_s)

    def next_resend_at_s(self) -> float | None:
        """Network time of the next repetition; None while no order is open."""
        return min((waiting.resend_at_s for waiting in self._open.values()), default=None)

    def _row(self, order_id: bytes) -> OrderOutRow:
        row = self._store.order_out(order_id)
        assert row is not None
        return row

    # What comes of them

    def take_answer(self, peer: str, answer: OrderAnswer) -> OrderOutRow | None:
        """A neighbour's answer. Whatever it says, only the ledger moves energy. Returns the order if this ended it."""
        row = self._store.order_out(answer.order_id)
        if row is None or row.neighbour != peer:
            self._outputs.complain(f"{peer} answers an order that it was not asked; the answer is ignored")
            return None
        passed_on = answer.status is AnswerStatus.PASSED_ON
        if passed_on and row.answer_status not in (None, int(AnswerStatus.PASSED_ON)):
            return None  # Overtaken by the last word.
        answered_wh = answer.energy_wh if answer.status is not AnswerStatus.REFUSED else row.seen_wh
        row = row._replace(answer_status=int(answer.status), answered_wh=answered_wh)
        all_seen = row.seen_wh >= answered_wh
        if passed_on:
            event = RequesterEvent.ANSWERED_PASSED_ON if all_seen else RequesterEvent.ANSWERED_DONE
        elif row.seen_wh and all_seen:
            event = RequesterEvent.ALL_SEEN
        elif answer.status is AnswerStatus.DONE and answered_wh:
            event = RequesterEvent.ANSWERED_DONE
        else:
            event = RequesterEvent.ANSWERED_REFUSED
        if RequesterState[row.state.upper()] is RequesterState.VOID and event is RequesterEvent.ALL_SEEN:
            event = RequesterEvent.ANSWERED_DONE  # Nothing was seen, whatever the answer says.
        return self._move(row, event, answer.reason)

    def transfer_seen(self, order_id: bytes, energy_wh: int) -> OrderOutRow | None:
        """The feed shows a transfer under an order. Returns the order if this ended it."""
        row = self._row(order_id)
        row = row._replace(seen_wh=row.seen_wh + energy_wh)
        answered = row.answered_wh is not None and row.seen_wh >= row.answered_wh
        if row.seen_wh >= row.energy_wh or (answered and row.answer_status == AnswerStatus.DONE):
            event = RequesterEvent.ALL_SEEN
        elif answered and row.answer_status == AnswerStatus.PASSED_ON:
            event = RequesterEvent.ANSWERED_PASSED_ON
        else:
            event = RequesterEvent.PART_SEEN
        return self._move(row, event, None)

    def ended(self, row: OrderOutRow, reason: str) -> OrderOutRow | None:
        """The ledger shows the end of an order of ours: nothing can be transferred under it any more."""
        event = RequesterEvent.ALL_SEEN if row.seen_wh else RequesterEvent.END_SEEN
        return self._move(row, event, reason)

    def _move(self, row: OrderOutRow, event: RequesterEvent, reason: str | None) -> OrderOutRow | None:
        before = RequesterState[row.state.upper()]
        state = next_requester_state(before, event)
        row = row._replace(state=name_of(state))
        self._store.set_order_out(row, reason)
        if not before.is_open or state.is_open:
            return None
        self._open.pop(row.order_id, None)
        return row

    # Time-outs

    def overdue(self, interval: Interval, market_time_s: int) -> list[OrderOutRow]:
        """Open orders of an interval whose round's time is up; one that was passed on has the next round's too."""
        return [
            row
            for row in self.open_rows()
            if row.start_s == interval.start_s
            and row.round_number is not None
            and market_time_s >= self._limit_s(interval, row.round_number + (row.state == _PASSED_ON))
        ]

    def _limit_s(self, interval: Interval, round_number: int) -> int:
        return round_limit_s(round_number, self._calendar.gate_1_of(interval), self._calendar.gate_2_of(interval))

    def void(self, rows: Sequence[OrderOutRow], interval: Interval) -> None:
        """Give orders up on the ledger before gate 2, so that others can be asked for the same Wh."""
        operations = [encode_operation(Void(row.order_id)) for row in rows]
        self._desk.submit(BatchKind.VOID, interval.start_s, interval.end_s + self._calendar.interval_s, operations)

    def give_up(self, start_s: int) -> list[bytes]:
        """Gate 2: stop waiting for the orders of an interval that are still open. Returns their ids, to be voided.

        They end when the ledger shows it (`ended`): until then a transfer under them may still stand before the void.
        """
        given_up = [row.order_id for row in self.open_rows() if row.start_s == start_s]
        for order_id in given_up:
            self._open.pop(order_id, None)
        return given_up

    # Records

    def record(self, neighbour: str, start_s: int) -> PartnerRecord:
        """What is remembered of a neighbour, as of an interval."""
        return self._records.get(neighbour, PartnerRecord()).faded(start_s, self._calendar.interval_s)

    def note(self, start_s: int) -> None:
        """All orders of an interval have ended: enter them into the neighbours' records, once.

        Not one by one, or what is planned in a round would depend on which answers came before it.
        """
        rows = self._store.orders_out(start_s)
        for neighbour in sorted({row.neighbour for row in rows}):
            if self._records.get(neighbour, PartnerRecord()).faded_s < start_s:
                record = self.record(neighbour, start_s)
                for row in rows:
                    if row.neighbour == neighbour:
                        record = self._after(record, row)
                self._records[neighbour] = record
                self._store.set_partner_record(neighbour, record.to_bytes())

    def _after(self, record: PartnerRecord, row: OrderOutRow) -> PartnerRecord:
        if row.state == name_of(RequesterState.VOID):
            return record.after_timeout(row.energy_wh, row.start_s, self._calendar.interval_s)
        return record.after_answer(row.energy_wh, row.seen_wh)


def name_of(state: RequesterState) -> str:
    """The state as it is stored and listed."""
    return state.name.lower()


_PASSED_ON = name_of(RequesterState.PASSED_ON)
