"""What is said between this broker and its neighbours in an interval: announcements, rounds of orders, their ends.

`broker.market.rounds` says when the broker may serve and go on, `broker.market.sourcing` whom it asks and in which
states orders are. `OrdersOut` and `OrdersIn` keep the orders; this class brings them together, passes orders on, and
announces.
A neighbour's *done* is a hint: energy counts only when the ledger's feed shows its transfer. Everything that decides is
in the store, so a broker that was killed goes on in the round in which it was.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Final, Protocol

from broker.ledger.operations import Transfer
from broker.market.clearing import Clearing
from broker.market.forecast import expected_surplus
from broker.market.lots import Lot
from broker.market.mix import apportion
from broker.market.rounds import (
    CHOICES_FROM_ROUND,
    GROUPS_FROM_ROUND,
    LAST_ROUND,
    Heard,
    is_for_passing_on,
    is_last,
    missing,
    next_round,
    round_limit_s,
)
from broker.market.sourcing import NeighbourOffer, PlannedOrder, RequesterState, plan_orders
from broker.market.statements import Flow
from broker.market.stock import HeldSlice, Stock
from broker.market.tariff import Tariff
from broker.market.windows import DAY_S
from broker.protocol import cbor, messages
from broker.protocol.envelope import parse
from broker.protocol.limits import MAX_INTEGER
from broker.protocol.market_time import Interval, MarketCalendar
from broker.protocol.messages import (
    WAIT_TOKEN_BYTES,
    Cleared,
    MessageType,
    NeighbourCount,
    Order,
    OrderAnswer,
    SourceAmount,
    SourceOffer,
)
from broker.protocol.sources import Source, SourceGroup
from broker.protocol.topics import Topics
from broker.service.arrangements import Arrangements
from broker.service.batches import BatchDesk
from broker.service.orders_in import OrdersIn, PartnerPolicy, can_be_passed_on, transfer_row
from broker.service.orders_out import OrdersOut, Parent
from broker.service.outputs import Identity, Outputs
from broker.service.store import BatchKind, BatchRow, BrokerStore, OrderInRow, OrderOutRow

COARSE_WH: Final = 100
"""Stock is announced in steps of this, rounded down, but anything as one step at least: enough to choose whom to ask,
too little to read off trades. What is not announced is not there."""

KEEP_HEARD_S: Final = 14 * 86_400
"""Whom to ask needs what was said last; what a new contract can expect, what was left over in the last weeks."""


class OwnConsumers(Protocol):
    """What is asked about own consumers' demands of the interval in work (`broker.service.cycle`)."""

    def fill(self, *, with_groups: bool) -> Clearing:
        """Give them what is in stock for their lines, or for those of single sources. Returns what these lack."""

    def groups_lack_wh(self) -> int:
        """How much of what lines of groups want own stock does not have."""

    def rehearse(self, offered: Mapping[Lot, int]) -> Mapping[Source, int]:
        """Given what neighbours offer, how much more of each source gate 2 would use if it had that."""


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
        policies: Mapping[str, PartnerPolicy],
        highest_price: int,
        tariff: Tariff,
        arrangements: Arrangements,
        *,
        passes_on: bool,
        is_own_device: Callable[[str], bool],
        owner_of: Callable[[str], str],
        jitter: Callable[[], int],
    ) -> None:
        """`policies` has every neighbour. `passes_on`: ask others for what neighbours want and is not here.

        `owner_of` gives a foreign device's provider, empty if that is not known.
        `jitter` gives 0 to 255 at random.
        """
        self._identity = identity
        self._calendar = calendar
        self._topics = topics
        self._store = store
        self._stock = stock
        self._desk = desk
        self._outputs = outputs
        self._policies = policies
        self._names = tuple(sorted(policies))
        self._highest_price = highest_price
        self._tariff = tariff
        self._arrangements = arrangements
        self._passes_on = passes_on
        self._owner_of = owner_of
        self._out = OrdersOut(identity, calendar, topics, store, desk, outputs, jitter)
        self._in = OrdersIn(
            *(identity, calendar, topics, store, stock, desk, outputs, policies, tariff, is_own_device),
            arrangements.to,
        )
        self._own: tuple[int, Heard | None] | None = None
        """Start of an interval, and this broker's newest announcement about it."""
        self._renewed: set[tuple[str, Source]] = set()
        """(neighbour, source) that was announced anew, so that a refusal before counts no more."""

    # What others wait for

    @property
    def any_open(self) -> bool:
        """True while an order of ours may still be served."""
        return self._out.any_open

    def waits(self, interval: Interval) -> set[bytes]:
        """Tokens of what this broker waits for from neighbours: answers, and their announcements."""
        tokens = {_order_token(row.order_id, passed_on=row.state == _PASSED_ON) for row in self._out.open_rows()}
        own = self._own_round(interval.start_s)
        if own is None:
            return tokens
        rounds = {row.round_number for row in self._in.received() if row.start_s == interval.start_s}
        if not own.last:
            rounds.add(own.round_number)
        for round_number in rounds:
            if round_number is not None and (own.last or round_number <= own.round_number):
                for neighbour in self._missing(interval.start_s, round_number):
                    tokens.add(_round_token(neighbour, interval.start_s, round_number))
        return tokens

    def holds(self, interval: Interval) -> set[bytes]:
        """Tokens of what neighbours may wait for from this broker."""
        tokens = {_order_token(row.order_id, passed_on=False) for row in self._in.received()}
        tokens |= {_order_token(row.order_id, passed_on=True) for row in self._in.passed_on() if row.answer is not None}
        for start_s in (interval.start_s, interval.end_s):
            own = self._own_round(start_s)
            for round_number in range(LAST_ROUND + 1):
                if own is None or (not own.last and round_number > own.round_number):
                    tokens.add(_round_token(self._identity.name, start_s, round_number))
        return tokens

    def next_wake_s(self, interval: Interval, market_time_s: int) -> int | None:
        """Market time of the next end of a round, None if that would change nothing."""
        own = self._own_round(interval.start_s)
        if own is None or (own.last and not self._in.received() and not self.any_open):
            return None
        limits = [self._limit_s(interval, round_number) for round_number in range(LAST_ROUND + 1)]
        return min([limit_s for limit_s in limits if limit_s > market_time_s], default=None)

    def _limit_s(self, interval: Interval, round_number: int) -> int:
        return round_limit_s(round_number, self._calendar.gate_1_of(interval), self._calendar.gate_2_of(interval))

    # Announcements

    def _own_round(self, start_s: int) -> Heard | None:
        """This broker's newest announcement about an interval; None before its own clearing."""
        if self._own is None or self._own[0] != start_s:
            raw = self._store.heard(start_s, MessageType.CLEARED).get(self._identity.name)
            self._own = (start_s, _heard(Cleared.from_payload(raw), "") if raw is not None else None)
        return self._own[1]

    def _heard(self, start_s: int) -> dict[str, Heard | None]:
        """What each neighbour announced last about an interval; without those that are left alone and silent."""
        payloads = self._store.heard(start_s, MessageType.CLEARED)
        heard: dict[str, Heard | None] = {}
        for name in self._names:
            if name in payloads:
                heard[name] = _heard(Cleared.from_payload(payloads[name]), self._identity.name)
            elif not self._out.record(name, start_s).is_left_alone(start_s):
                heard[name] = None
        return heard

    def _missing(self, start_s: int, round_number: int) -> tuple[str, ...]:
        return missing(round_number, self._heard(start_s), self._in.counts(start_s))

    def begin(self, interval: Interval, clearing: Clearing, consumers: OwnConsumers) -> None:
        """Own lines of single sources are filled: announce round 0 and what is left."""
        if self._names:
            self._announce_stock(interval, with_bought=False)
            self._announce(interval, clearing, 0, sum(clearing.shortages.values()) + consumers.groups_lack_wh())

    def _announce(self, interval: Interval, clearing: Clearing, round_number: int, open_wh: int) -> bool:
        """Say how far this broker is. Returns if it is the last time for this interval."""
        before = self._own_round(interval.start_s)
        counts: dict[str, int] = {}
        for row in self._store.orders_out(interval.start_s):
            if row.round_number is not None:
                counts[row.neighbour] = counts.get(row.neighbour, 0) + 1
        under_way = len(self._out.open_rows()) + len(self._in.passed_on())
        under_way += len([row for row in self._in.received() if can_be_passed_on(row)])
        last = is_last(round_number, open_wh, under_way, self._heard(interval.start_s))
        cleared = Cleared(
            self._identity.name,
            interval.start_s,
            interval.end_s,
            tuple([SourceAmount(source, clearing.shortages[source]) for source in sorted(clearing.shortages)]),
            tuple([NeighbourCount(name, counts[name]) for name in sorted(counts)]),
            round_number,
            open_wh,
            last,
            self._through(interval.start_s) if round_number else None,
            before.open_wh if before is not None else None,
        )
        self._store.set_heard(interval.start_s, MessageType.CLEARED, self._identity.name, cleared.to_payload())
        self._own = None
        self._publish_retained(self._topics.cleared(self._identity.name), self._identity.seal(cleared))
        return last

    def _through(self, start_s: int) -> tuple[SourceOffer, ...]:
        """What this broker could pass on: all that its neighbours announced, at the lowest price of each source."""
        if not self._passes_on:
            return ()
        found: dict[Source, SourceOffer] = {}
        for offer in self._announced(start_s):
            price = min(self._tariff.for_neighbours(offer.price), MAX_INTEGER)
            known = found.get(offer.source, SourceOffer(offer.source, 0, price))
            energy_wh = min(known.energy_wh + offer.energy_wh, MAX_INTEGER)
            if offer.energy_wh:
                found[offer.source] = SourceOffer(offer.source, energy_wh, min(known.price, price))
        return tuple([found[source] for source in sorted(found)])

    def _announce_stock(self, interval: Interval, *, with_bought: bool) -> None:
        offers = {
            source: (max(COARSE_WH, energy_wh - energy_wh % COARSE_WH), price)
            for source, (energy_wh, price) in self._in.offers(interval, with_bought=with_bought).items()
        }
        stock = _stock_message(self._identity.name, interval, offers)
        self._publish_retained(self._topics.stock(self._identity.name), self._identity.seal(stock))

    def _note_left_over(self, interval: Interval) -> None:
        """Keep what nobody wanted, at the prices paid, beside what neighbours say: new contracts are held against it.

        What is kept for certain consumers is not in it.
        """
        left: dict[Source, tuple[int, int]] = {}
        for held in self._stock.slices(interval):
            if not held.only_for:
                energy_wh, price = left.get(held.source, (0, held.price))
                left[held.source] = (energy_wh + held.energy_wh, min(price, held.price))
        payload = _stock_message(self._identity.name, interval, left).to_payload()
        self._store.set_heard(interval.start_s, MessageType.STOCK, self._identity.name, payload)

    def offer_again(self, interval: Interval) -> None:
        """Energy came late: announce it to those who were refused in this interval."""
        refused = {
            Source(row.source) for row in self._store.orders_in(interval.start_s) if row.granted_wh < row.energy_wh
        }
        if any(source in refused for source in self._in.offers(interval, with_bought=True)):
            self._announce_stock(interval, with_bought=True)

    def _publish_retained(self, topic: str, raw: bytes) -> None:
        self._store.set_announcement(topic, raw)
        self._outputs.publish(topic, raw, retain=True)

    def hear(self, peer: str, announcement: Cleared | messages.Stock | messages.Forecast) -> bool:
        """A neighbour's announcement about an interval, or about the day that begins then.

        True if it has energy anew of which it had refused some.
        """
        if announcement.broker != peer:
            self._outputs.complain(f"{peer} announces in the name of {announcement.broker}; it is ignored")
            return False
        before = self._store.heard(announcement.start_s, announcement.TYPE).get(peer)
        if isinstance(announcement, Cleared):
            if before is None or (announcement.round_number or 0) >= (Cleared.from_payload(before).round_number or 0):
                self._store.set_heard(announcement.start_s, announcement.TYPE, peer, announcement.to_payload())
            return False
        self._store.set_heard(announcement.start_s, announcement.TYPE, peer, announcement.to_payload())
        if before is None or before == announcement.to_payload() or isinstance(announcement, messages.Forecast):
            return False
        before_wh = {offer.source: offer.energy_wh for offer in messages.Stock.from_payload(before).offers}
        renewed = {
            (peer, offer.source) for offer in announcement.offers if offer.energy_wh > before_wh.get(offer.source, 0)
        }
        self._renewed |= renewed
        return bool(renewed)

    def finish(self, interval: Interval) -> None:
        """An interval is closed: note what is left of it, and drop what was heard long before."""
        self._note_left_over(interval)
        self._store.forget_heard(interval.start_s - KEEP_HEARD_S)
        self._renewed.clear()

    # Rounds

    def may_go_on(self, interval: Interval, market_time_s: int) -> bool:
        """True if the next round can begin: all of this one is heard and served, and own orders are answered."""
        own = self._own_round(interval.start_s)
        if own is None or own.last:
            return False
        if any(self._desk.waits_for(kind, interval.start_s) for kind in (BatchKind.SUPPLY, BatchKind.VOID)):
            return False
        for row in self._out.open_rows():
            held_up = row.round_number is not None and row.round_number <= own.round_number
            if held_up and not (row.round_number == own.round_number and row.state == _PASSED_ON):
                return False
        time_is_up = market_time_s >= self._limit_s(interval, own.round_number)
        return time_is_up or not self._waits_for_neighbours(interval.start_s, own.round_number)

    def _waits_for_neighbours(self, start_s: int, round_number: int) -> bool:
        if self._missing(start_s, round_number):
            return True
        # In round 0 what is offered must be here as well; the two messages may overtake each other.
        stocks = self._store.heard(start_s, MessageType.STOCK)
        return round_number == 0 and any(
            name not in stocks for name, one in self._heard(start_s).items() if one is not None and not one.last
        )

    def go_on(self, interval: Interval, consumers: OwnConsumers, market_time_s: int, now_s: float) -> None:
        """Send the next round's orders, for what own consumers lack or for neighbours' orders, and announce it."""
        own = self._own_round(interval.start_s)
        assert own is not None
        gates = self._calendar.gate_1_of(interval), self._calendar.gate_2_of(interval)
        round_number = next_round(own.round_number, market_time_s, *gates)
        with_groups = round_number >= GROUPS_FROM_ROUND
        clearing = consumers.fill(with_groups=with_groups)
        if is_for_passing_on(round_number):
            self._pass_on(interval, round_number, now_s)
            open_wh = own.open_wh
        else:
            for row in self._not_passed_on(interval):
                self._in.nobody_left(row)  # The round for it is over; its time was up.
            open_wh = self._order(interval, clearing, consumers, round_number, now_s)
        last = self._announce(interval, clearing, round_number, open_wh)
        if last and not with_groups:
            consumers.fill(with_groups=True)

    def _order(
        self, interval: Interval, clearing: Clearing, consumers: OwnConsumers, round_number: int, now_s: float
    ) -> int:
        """Order what own consumers lack. Returns the Wh that may still be ordered, or come, for them.

        Where nobody is left to ask for the lines, what gate 2 would use is ordered, when everybody's lines have had
        their rounds.
        """
        with_groups = round_number >= GROUPS_FROM_ROUND
        board = self._board(interval.start_s, round_number)
        own_rows = [row for row in self._out.open_rows() if row.start_s == interval.start_s and row.parent is None]
        planned = self._plan_own(interval, clearing, own_rows, board, with_groups=with_groups)
        later_wh = 0
        if not planned and not own_rows and with_groups:
            rehearsed = self._plan_rehearsed(interval, consumers, board)
            if round_number < CHOICES_FROM_ROUND:
                later_wh = sum([plan.energy_wh for plan in rehearsed])
            else:
                planned = rehearsed
        for plan in planned:
            self._out.send(*_named(plan), interval, round_number, now_s)
        open_wh = sum([plan.energy_wh for plan in planned]) + sum([row.energy_wh for row in own_rows]) + later_wh
        if not with_groups:
            open_wh += sum(clearing.shortages.values()) + consumers.groups_lack_wh()
        return open_wh

    def round_is_over(self, interval: Interval, market_time_s: int) -> bool:
        """True if the time of the round that this broker is in is up, whoever has not been heard."""
        own = self._own_round(interval.start_s)
        return own is not None and not own.last and market_time_s >= self._limit_s(interval, own.round_number)

    def is_through(self, interval: Interval) -> bool:
        """True if this broker takes part in no further round of an interval and waits for nothing for its consumers."""
        own = self._own_round(interval.start_s)
        return (own is None or own.last) and not any(row.parent is None for row in self._out.open_rows())

    def has_reached_groups(self, interval: Interval) -> bool:
        """True unless this broker is in the rounds for lines of single sources."""
        own = self._own_round(interval.start_s)
        return own is None or own.last or own.round_number >= GROUPS_FROM_ROUND

    def ask_late(self, interval: Interval, clearing: Clearing, now_s: float) -> bool:
        """After the last round, something is short or was announced anew: order outside the rounds. False if not."""
        exhausted = self._exhausted(interval.start_s) - self._renewed
        # Outside the rounds, those are asked that offer something or never say what they have.
        offers = self._offers(interval.start_s)
        exhausted |= self._lacking(interval.start_s) | {key for key, offer in offers.items() if not offer.energy_wh}
        expected, promised = self._expected(interval.start_s), self._promised_left(interval.start_s)
        board = _Board(offers, [], exhausted, expected, promised)
        planned = self._plan_own(interval, clearing, [], board, with_groups=True)
        for plan in planned:
            self._out.send(*_named(plan), interval, None, now_s)
        self._renewed.clear()
        return bool(planned)

    # Planning

    def _board(self, start_s: int, round_number: int) -> "_Board":
        through = self._offers_through(start_s) if round_number > 1 else []
        exhausted = self._exhausted(start_s)
        if round_number > 1:
            # What neighbours could pass on is known by now, so there is nothing to guess any more.
            exhausted |= self._lacking(start_s)
        # Who could ask others may find more, unless nothing came of the newest order that it could have passed on.
        newest: dict[tuple[str, Source], OrderOutRow] = {}
        for row in self._store.orders_out(start_s):
            key = (row.neighbour, Source(row.source))
            if row.parent is None and (key not in newest or _round(newest[key]) < _round(row)):
                newest[key] = row
        for offer in through:
            key = (offer.neighbour, offer.source)
            if offer.energy_wh and (key not in newest or newest[key].seen_wh):
                exhausted.discard(key)
        expected, promised = self._expected(start_s), self._promised_left(start_s)
        return _Board(
            self._less_wanted(self._offers(start_s), start_s, round_number), through, exhausted, expected, promised
        )

    def _offers_through(self, start_s: int) -> list[NeighbourOffer]:
        """What neighbours say that they could pass on, less what came from others.

        It is said from round 1 on; who says it in the round in which it is first used may have been heard or not.
        """
        own_wh = {(offer.neighbour, offer.source): offer.energy_wh for offer in self._announced(start_s)}
        seen_wh: dict[tuple[str, Source], int] = {}
        for row in self._store.orders_out(start_s):
            key = (row.neighbour, Source(row.source))
            seen_wh[key] = seen_wh.get(key, 0) + row.seen_wh
        through = []
        for neighbour, payload in self._store.heard(start_s, MessageType.CLEARED).items():
            if neighbour in self._policies:
                for offer in Cleared.from_payload(payload).through or ():
                    key = (neighbour, offer.source)
                    from_others_wh = max(0, seen_wh.get(key, 0) - own_wh.get(key, 0))
                    left_wh = max(0, offer.energy_wh - from_others_wh)
                    through.append(NeighbourOffer(neighbour, offer.source, left_wh, offer.price))
        return through

    def _boards_for(self, start_s: int, round_number: int, parents: Sequence[OrderInRow]) -> list["_Board"]:
        """For each order that is passed on, what may be asked for it: of each offer a share, since all may want it."""
        offers = self._less_wanted(self._offers(start_s, round_number - 1), start_s, round_number)
        # Whoever is asked for a neighbour asks nobody else, so it has what it announced or nothing.
        exhausted = self._exhausted(start_s, round_number - 1) | self._lacking(start_s)
        shared: list[dict[tuple[str, Source], NeighbourOffer]] = [{} for _ in parents]
        for (neighbour, source), offer in offers.items():
            wants_wh = [
                row.energy_wh - row.granted_wh if row.source == source and row.requester != neighbour else 0
                for row in parents
            ]
            parts_wh = apportion(min(offer.energy_wh, sum(wants_wh)), wants_wh)
            for board, part_wh in zip(shared, parts_wh, strict=True):
                board[neighbour, source] = replace(offer, energy_wh=part_wh)
        expected = self._expected(start_s)
        # What was promised is for own consumers.
        return [_Board(board, [], exhausted, expected, {}) for board in shared]

    def _expected(self, start_s: int) -> dict[tuple[str, Source], int]:
        """Wh that neighbours forecast, the day before, to have left of the interval; where that is anything."""
        interval = Interval(start_s, start_s + self._calendar.interval_s)
        expected = {}
        for neighbour, payload in self._store.heard(start_s - start_s % DAY_S, MessageType.FORECAST).items():
            forecast = messages.Forecast.from_payload(payload)
            for source in Source if neighbour in self._policies else ():
                energy_wh = expected_surplus(forecast, source, interval)
                if energy_wh:
                    expected[neighbour, source] = energy_wh
        return expected

    def _promised_left(self, start_s: int) -> dict[tuple[str, Source], int]:
        """What neighbours promised of an interval the day before, less what came of orders for own consumers."""
        left_wh = self._arrangements.by(start_s)
        if left_wh:
            for row in self._store.orders_out(start_s):
                key = row.neighbour, Source(row.source)
                if key in left_wh and row.parent is None:
                    left_wh[key] = max(0, left_wh[key] - row.seen_wh)
        return left_wh

    def _announced(self, start_s: int) -> list[NeighbourOffer]:
        """What neighbours announced of an interval."""
        return [
            NeighbourOffer(neighbour, offer.source, offer.energy_wh, offer.price)
            for neighbour, payload in self._store.heard(start_s, MessageType.STOCK).items()
            if neighbour in self._policies
            for offer in messages.Stock.from_payload(payload).offers
        ]

    def _offers(self, start_s: int, known_before: int = LAST_ROUND + 1) -> dict[tuple[str, Source], NeighbourOffer]:
        """What neighbours announced for the interval, less what they gave; nothing of what they ran out of.

        What has come of orders of the round `known_before` may be known or not: of those, less what was asked for.
        """
        offers = {(offer.neighbour, offer.source): offer for offer in self._announced(start_s)}
        for row in self._store.orders_out(start_s):
            key = (row.neighbour, Source(row.source))
            if key in offers and key not in self._renewed:
                if _is_of(row, known_before):
                    left_wh = max(0, offers[key].energy_wh - row.energy_wh)
                else:
                    left_wh = 0 if _came_short(row) else max(0, offers[key].energy_wh - row.seen_wh)
                offers[key] = replace(offers[key], energy_wh=left_wh)
        return offers

    def _less_wanted(
        self, offers: dict[tuple[str, Source], NeighbourOffer], start_s: int, round_number: int
    ) -> dict[tuple[str, Source], NeighbourOffer]:
        """The offers without what a neighbour has ordered itself before this round: of that it has nothing left."""
        wanted = {
            (row.requester, Source(row.source))
            for row in self._store.orders_in(start_s)
            if row.round_number is not None and row.round_number < round_number
        }
        return {key: replace(offer, energy_wh=0) if key in wanted else offer for key, offer in offers.items()}

    def _exhausted(self, start_s: int, known_before: int = LAST_ROUND + 1) -> set[tuple[str, Source]]:
        """The (neighbour, source) that gave less than was asked for, or of the round `known_before` were asked for all
        that they announced.
        """
        announced_wh = {(offer.neighbour, offer.source): offer.energy_wh for offer in self._announced(start_s)}
        exhausted = set()
        for row in self._store.orders_out(start_s):
            key = (row.neighbour, Source(row.source))
            if row.energy_wh >= announced_wh.get(key, 0) if _is_of(row, known_before) else _came_short(row):
                exhausted.add(key)
        return exhausted

    def _lacking(self, start_s: int) -> set[tuple[str, Source]]:
        """The (neighbour, source) of which a neighbour has none: it announced what it has, and that is not in it."""
        announced = {(offer.neighbour, offer.source) for offer in self._announced(start_s)}
        speaking = self._store.heard(start_s, MessageType.STOCK)
        return {(name, source) for name in speaking for source in Source if (name, source) not in announced}

    def _candidates(self, start_s: int, path: Sequence[str] = ()) -> list[str]:
        """The neighbours that may be asked. One on trial gets one order in an interval."""
        asked = {row.neighbour for row in self._store.orders_out(start_s)}
        candidates = []
        for name in self._names:
            record = self._out.record(name, start_s)
            on_trial_again = record.is_on_trial and name in asked
            if (
                self._policies[name].is_asked
                and name not in path
                and not record.is_left_alone(start_s)
                and not on_trial_again
            ):
                candidates.append(name)
        return candidates

    def _trust_ppm(self, start_s: int) -> dict[str, int]:
        return {name: self._out.record(name, start_s).trust_ppm for name in self._names}

    def trust_of_candidates(self, start_s: int) -> dict[str, int]:
        """How far those neighbours are trusted that may be asked as of an interval, in ppm."""
        trust_ppm = self._trust_ppm(start_s)
        return {name: trust_ppm[name] for name in self._candidates(start_s)}

    def _highest_prices(self, clearing: Clearing) -> dict[Source, int]:
        """The most that is paid for each source: what those who lack it would pay, within the broker's own limit."""
        prices = {}
        for source in Source:
            limit = clearing.price_limits.get(source)
            price = self._highest_price
            if limit is not None:
                price = min(price, limit - self._tariff.consumer_margin)
            if price >= 0:
                prices[source] = price
        return prices

    def _plan_own(
        self,
        interval: Interval,
        clearing: Clearing,
        open_rows: Sequence[OrderOutRow],
        board: "_Board",
        *,
        with_groups: bool,
    ) -> tuple[PlannedOrder, ...]:
        """What own lines lack, less what neighbours are still asking others for."""
        shortages, groups = dict(clearing.shortages), dict(clearing.group_shortage_wh)
        for row in open_rows:
            _subtract(Source(row.source), row.energy_wh - row.seen_wh, shortages, groups)
        return board.plan(
            shortages,
            groups if with_groups else {},
            self._candidates(interval.start_s),
            self._highest_prices(clearing),
            self._trust_ppm(interval.start_s),
        )

    def _plan_rehearsed(self, interval: Interval, consumers: OwnConsumers, board: "_Board") -> tuple[PlannedOrder, ...]:
        """What gate 2 would use of neighbours' offers, for lines that are raised and for substitutes."""
        candidates = self._candidates(interval.start_s)
        offered: dict[Lot, int] = {}
        for (neighbour, source), offer in board.offers.items():
            if neighbour in candidates and (neighbour, source) not in board.exhausted and offer.energy_wh:
                # Whose energy it is, the neighbour does not say.
                lot = Lot(source, interval.start_s, "", offer.price)
                offered[lot] = offered.get(lot, 0) + offer.energy_wh
        if not offered:
            return ()
        wanted = consumers.rehearse(offered)
        prices = dict.fromkeys(Source, self._highest_price)
        return board.plan(wanted, {}, candidates, prices, self._trust_ppm(interval.start_s))

    def _not_passed_on(self, interval: Interval) -> list[OrderInRow]:
        """The orders of an interval for which others are to be asked, and have not been."""
        return [
            row
            for row in self._in.passed_on()
            if row.start_s == interval.start_s and not self._store.orders_out_for(row.requester, row.order_id)
        ]

    def _pass_on(self, interval: Interval, round_number: int, now_s: float) -> None:
        """Ask others for what neighbours' orders want and is not here: orders of our own, within their prices."""
        parents = self._not_passed_on(interval)
        for row, board in zip(parents, self._boards_for(interval.start_s, round_number, parents), strict=True):
            order = Order.from_payload(parse(row.raw).payload)
            source = Source(row.source)
            price = row.highest_price - self._tariff.neighbour_margin
            planned = board.plan(
                {source: row.energy_wh - row.granted_wh},
                {},
                self._candidates(interval.start_s, order.path),
                {source: price} if price >= 0 else {},
                self._trust_ppm(interval.start_s),
            )
            for plan in planned:
                self._out.send(*_named(plan), interval, round_number, now_s, Parent.of(row, order))
            if not planned:
                self._in.nobody_left(row)

    # Orders out

    def send_again(self, now_s: float, *, reconnected: bool) -> None:
        """Repeat orders whose answer is overdue, or all open ones after a reconnect."""
        self._out.send_again(now_s, reconnected=reconnected)

    def next_resend_at_s(self) -> float | None:
        """Network time of the next repetition; None while no order is open."""
        return self._out.next_resend_at_s()

    def take_answer(self, peer: str, answer: OrderAnswer) -> bool:
        """A neighbour's answer. True if it ends an order for own consumers."""
        return self._settled(self._out.take_answer(peer, answer))

    def transfer_seen(self, transfer: Transfer, order: Order, *, in_stock: bool, loaded: bool) -> None:
        """The feed shows a transfer to us under an order: the energy is ours.

        `in_stock`: the holdings that the ledger gave, or is giving, include it; `loaded`: it has given them.
        """
        asset = transfer.asset
        if not self._store.add_transfers([transfer_row(Flow.BOUGHT, transfer, order.source, order.order_id)]):
            return
        key = (asset.device, int(asset.carrier), asset.start_s, asset.revision)
        wh = transfer.from_wh, transfer.to_wh
        owner = self._owner_of(asset.device)
        held = HeldSlice(key, order.source, order.start_s, order.end_s, *wh, transfer.price, owner)
        if not in_stock:
            self._stock.add(held)
        row = self._store.order_out(order.order_id)
        if row is None:
            self._outputs.complain(
                f"{transfer.sender} transferred energy under an order that this broker does not know"
            )
            return
        if row.parent is not None:
            self._hand_on(row, held, loaded=loaded)
        self._settled(self._out.transfer_seen(order.order_id, held.energy_wh))

    def _hand_on(self, row: OrderOutRow, held: HeldSlice, *, loaded: bool) -> None:
        """What was bought for a neighbour's order goes to it, as far as it still wants any; the rest is stock."""
        assert row.parent_requester is not None
        assert row.parent is not None
        parent = self._in.row(row.parent_requester, row.parent)
        wanted_wh = min(held.energy_wh, parent.energy_wh - parent.granted_wh)
        if parent.state != _PASSED_ON or not wanted_wh:
            return
        piece = held._replace(to_wh=held.from_wh + wanted_wh)
        if self._stock.holds(piece.asset, piece.from_wh, piece.to_wh):
            self._stock.remove(piece.asset, piece.from_wh, piece.to_wh)
        elif loaded:
            return  # It has been used, between a restart and now.
        self._in.hand_on(parent, piece)

    def time_out(self, interval: Interval, market_time_s: int) -> bool:
        """Void the orders whose time is up, so that others can be asked. False if there are none."""
        if self._desk.waits_for(BatchKind.VOID, interval.start_s):
            return False
        overdue = self._out.overdue(interval, market_time_s)
        if overdue:
            self._out.void(overdue, interval)
        return bool(overdue)

    def give_up(self, start_s: int) -> list[bytes]:
        """Gate 2: the ids of the orders of an interval that are still open, to be voided with its close."""
        return self._out.give_up(start_s)

    def closed(self, start_s: int) -> None:
        """The ledger shows our close of that interval: nothing can be transferred under its orders any more."""
        for row in self._store.orders_out(start_s):
            if RequesterState[row.state.upper()].is_open:
                self._settled(self._out.ended(row, "unanswered at gate 2"))
        self._out.note(start_s)

    def voided(self, order_ids: Sequence[bytes]) -> None:
        """The ledger shows our voids of these orders."""
        for order_id in order_ids:
            row = self._store.order_out(order_id)
            if row is not None and RequesterState[row.state.upper()].is_open:
                self._settled(self._out.ended(row, "unanswered in its round"))

    def _settled(self, row: OrderOutRow | None) -> bool:
        """An order has ended (None: none has). True if it was for own consumers."""
        if row is None:
            return False
        if row.parent is None:
            return True
        assert row.parent_requester is not None
        parent = self._in.row(row.parent_requester, row.parent)
        children = self._store.orders_out_for(row.parent_requester, row.parent)
        if parent.state == _PASSED_ON and not any(RequesterState[child.state.upper()].is_open for child in children):
            self._in.nobody_left(parent)
        return False

    # Orders in

    def take_order(self, peer: str, order: Order, raw: bytes, market_time_s: int) -> None:
        """A neighbour's order: stored, and served when its round is; a repeated one is answered again."""
        self._in.take_order(peer, order, raw, market_time_s)

    def serve(self, interval: Interval, *, cleared: bool, market_time_s: int) -> bool:
        """Serve the waiting orders of one round whose time has come. False if there are none.

        `interval` is in work; `cleared`: own consumers have been served from it. Orders of earlier intervals, and those
        outside the rounds, get what is left at once.
        """
        rows = self._in.received()
        at_once = [row for row in rows if row.start_s < interval.start_s]
        current = [row for row in rows if row.start_s == interval.start_s] if cleared else []
        at_once += [row for row in current if row.round_number is None]
        if at_once:
            first = [row for row in at_once if row.start_s == at_once[0].start_s]
            self._in.serve(first, lambda _row: False, with_bought=True)
            return True
        if not current:
            return False
        own = self._own_round(interval.start_s)
        assert own is not None
        round_number = min([row.round_number for row in current if row.round_number is not None])
        time_is_up = market_time_s >= self._limit_s(interval, round_number)
        if not time_is_up:
            if not own.last and round_number > own.round_number:
                return False
            if self._missing(interval.start_s, round_number):
                return False
        of_round = [row for row in current if row.round_number == round_number]
        self._in.serve(of_round, lambda row: self._can_pass_on(row, own), with_bought=not own.open_wh)
        return True

    def _can_pass_on(self, row: OrderInRow, own: Heard) -> bool:
        """True if the next round is for it. If anybody has what it wants is decided there, when all know enough."""
        if not self._passes_on or own.last or own.round_number >= LAST_ROUND or not can_be_passed_on(row):
            return False
        return bool(self._candidates(row.start_s, Order.from_payload(parse(row.raw).payload).path))

    def supply_finished(self, batch: BatchRow, transfers: Sequence[Transfer], refusal: str | None) -> None:
        """The ledger's word on a batch of transfers to a neighbour; `refusal` is None if it is committed."""
        self._in.supply_finished(batch, transfers, refusal)

    def order_void(self, peer: str, order_id: bytes) -> None:
        """A block holds a neighbour's void of an order."""
        row = self._store.order_in(peer, order_id)
        if row is not None:
            self._in.ended(row)

    def interval_closed(self, peer: str, start_s: int) -> None:
        """A block holds a neighbour's close of an interval: its orders of it have ended."""
        for row in self._store.orders_in(start_s):
            if row.requester == peer:
                self._in.ended(row)


class _Board:
    """What a plan draws from: what neighbours offer, have through others, forecast and promised, and who is out."""

    def __init__(
        self,
        offers: dict[tuple[str, Source], NeighbourOffer],
        through: Sequence[NeighbourOffer],
        exhausted: set[tuple[str, Source]],
        expected_wh: dict[tuple[str, Source], int],
        promised_wh: dict[tuple[str, Source], int],
    ) -> None:
        self.offers = offers
        self.through = through
        self.exhausted = exhausted
        self.expected_wh = expected_wh
        self.promised_wh = promised_wh

    def plan(
        self,
        shortages: Mapping[Source, int],
        groups: Mapping[SourceGroup, int],
        candidates: Sequence[str],
        prices: Mapping[Source, int],
        trust_ppm: Mapping[str, int],
    ) -> tuple[PlannedOrder, ...]:
        """Whom to ask, as `plan_orders` says."""
        offers = tuple(self.offers.values())
        return plan_orders(
            *(shortages, groups, candidates, offers, prices, self.exhausted, trust_ppm, self.through),
            *(self.expected_wh, self.promised_wh),
        )


def _stock_message(broker: str, interval: Interval, offers: Mapping[Source, tuple[int, int]]) -> messages.Stock:
    """What there is: (Wh, lowest price) by source."""
    return messages.Stock(
        broker,
        interval.start_s,
        interval.end_s,
        tuple([SourceOffer(source, energy_wh, price) for source, (energy_wh, price) in sorted(offers.items())]),
    )


def _named(plan: PlannedOrder) -> tuple[str, Source, int, int]:
    return plan.neighbour, plan.source, plan.energy_wh, plan.highest_price


def _round(row: OrderOutRow) -> int:
    return row.round_number if row.round_number is not None else 0


def _is_of(row: OrderOutRow, round_number: int) -> bool:
    return row.round_number is not None and row.round_number >= round_number


def _came_short(row: OrderOutRow) -> bool:
    return not RequesterState[row.state.upper()].is_open and row.seen_wh < row.energy_wh


def _subtract(source: Source, energy_wh: int, shortages: dict[Source, int], groups: dict[SourceGroup, int]) -> None:
    """Take off what is still coming: of the source's own lines first, then of the groups that it is in."""
    part_wh = min(energy_wh, shortages.get(source, 0))
    if part_wh:
        shortages[source] -= part_wh
    for group in groups:
        if source in group.sources:
            more_wh = min(energy_wh - part_wh, groups[group])
            groups[group] -= more_wh
            part_wh += more_wh


def _heard(cleared: Cleared, own_name: str) -> Heard:
    """What an announcement says to the broker `own_name`. One without rounds is heard as a last one."""
    asked = sum([item.orders for item in cleared.asked if item.neighbour == own_name])
    if cleared.round_number is None:
        return Heard(0, True, asked, 0, 0)
    open_wh = cleared.open_wh or 0
    before_wh = cleared.open_before_wh if cleared.open_before_wh is not None else open_wh
    return Heard(cleared.round_number, bool(cleared.last), asked, open_wh, before_wh)


def _order_token(order_id: bytes, *, passed_on: bool) -> bytes:
    return _token(["order", order_id, passed_on])


def _round_token(broker: str, start_s: int, round_number: int) -> bytes:
    return _token(["round", broker, start_s, round_number])


def _token(named: list[str | bytes | int | bool]) -> bytes:
    return sha256(cbor.encode(named)).digest()[:WAIT_TOKEN_BYTES]


_PASSED_ON: Final = RequesterState.PASSED_ON.name.lower()
"""The name of the state is the same on both sides."""
