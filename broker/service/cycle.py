"""The interval cycle of one broker: gate 1 clears, gate 2 settles and closes, one interval after the other.

The cycle decides with the pure functions of `broker.market` and carries the decision out: it takes slices from stock,
writes what each demand got into the store, keeps the accounts, and makes the ledger batches. All of one decision is in
one commit, so after a crash a decision is either there with its batches or is made again from the same input.

A demand whose contract has a longer window than its interval does not end at gate 2 of it: what it lacks stays *open*
until the window is over, and is settled with the close of the window's last interval. Until then it *waits*: it gets
only what surely costs nobody anything (`market.matching`), and what it would get besides is held back from neighbours.
Meanwhile the open quotas count as pledged when the consumer's next demand is divided, or else the lines that wait would
claim the same share again and again.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, NamedTuple

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
from broker.market.clearing import GROUPS, Clearing, OpenDemand, Taken, fill_lines, settle
from broker.market.contracts import History, history_start
from broker.market.forecast import Target
from broker.market.keeping import kept
from broker.market.lots import Lot
from broker.market.matching import are_plain, clear_lots
from broker.market.mix import apportion, quotas
from broker.market.stock import AssetKey, HeldSlice, Stock
from broker.market.tariff import Tariff
from broker.market.windows import DAY_S, Span, window_span
from broker.market.windows import Window as MarketWindow
from broker.protocol.market_time import Interval, MarketCalendar
from broker.protocol.messages import NO_LINE, Carrier, DeliveredLine, Delivery, DeliveryState, MessageType
from broker.protocol.sources import Source, SourceGroup
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
    Standing,
    encode_quotas,
)

MAX_WAITING: Final = 50_000
"""Open demands that wait for the end of their windows. Beyond it the oldest are given at once what is there, since all
that wait are matched anew in every clearing."""

KEEP_STOCK_S: Final = 7 * 86_400
"""So long own energy of a past interval is kept at hand for demands that come late."""


@dataclass(slots=True)
class ShortDemand:
    """A demand in clearing: who, how much, its quotas, and what it got so far."""

    row: MessageRow
    consumer: Consumer
    version: ContractVersion
    quotas: tuple[int, ...]
    span: Span
    """The contract's window around the demand's interval."""
    taken: list[Taken] = field(default_factory=list)
    slices: int = 0
    """Delivery rows written so far; numbers the next."""
    delivered_wh: int = 0
    final: bool = False
    """Its window is over; nothing more will come."""
    quiet: bool = False
    """It was settled without anything new for the ledger."""
    waits: bool = False
    """Its contract has a longer window, until whose end energy may be held back for it."""

    @property
    def key(self) -> "DemandKey":
        return self.row.start_s, self.row.meter, self.row.revision

    @property
    def is_short(self) -> bool:
        return self.delivered_wh < self.row.energy_wh

    @property
    def pledged(self) -> list[tuple[int, int]]:
        """(line, Wh) of the quotas that are not filled."""
        unfilled = list(self.quotas)
        for item in self.taken:
            if item.line != NO_LINE:
                unfilled[item.line] -= item.energy_wh
        return [(line, energy_wh) for line, energy_wh in enumerate(unfilled) if energy_wh > 0]

    def open(self, account: Account, *, with_groups: bool = True) -> OpenDemand:
        """What the market's functions see of it; without groups, a demand for the quotas of its other lines."""
        energy_wh, quotas_wh, taken = self.row.energy_wh, self.quotas, self.taken
        if not with_groups:
            lines = self.version.contract.lines
            single = [not isinstance(line.target, SourceGroup) for line in lines]
            pledged = dict(self.pledged)
            open_wh = [pledged.get(line, 0) if own else 0 for line, own in enumerate(single)]
            # Where lines were raised above their quotas or substitutes came, less is open than the quotas say.
            rest_wh = max(0, energy_wh - sum([item.energy_wh for item in taken]))
            if sum(open_wh) > rest_wh:
                open_wh = apportion(rest_wh, open_wh)
            taken = [item for item in taken if item.line != NO_LINE and single[item.line]]
            for item in taken:
                open_wh[item.line] += item.energy_wh
            quotas_wh, energy_wh = tuple(open_wh), sum(open_wh)
        return OpenDemand(
            self.row.meter,
            energy_wh,
            self.version.contract,
            quotas_wh,
            account.history,
            tuple(taken),
            self.row.start_s,
            self.span,
            self.waits,
        )


class Cut(NamedTuple):
    """The Wh of a delivery from `from_wh` on, which the demand has no longer."""

    delivery: DeliveryRow
    from_wh: int

    @property
    def energy_wh(self) -> int:
        return self.delivery.to_wh - self.from_wh


DemandKey = tuple[int, str, int]
"""(start_s, meter, revision)."""

AccountKey = tuple[str, int, int]
"""(meter, start of the period, contract version)."""


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
        *,
        own_groups_first: bool,
        will_want: Callable[[Interval], Mapping[Target, int]],
    ) -> None:
        """`own_groups_first`: energy is held back for own lines of groups before neighbours are served, too.

        `will_want`: Wh that own consumers will want, later in the day, of what is there in that interval.
        """
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
        self._own_groups_first = own_groups_first
        self._will_want = will_want
        self._short: dict[DemandKey, ShortDemand] = {}
        """Of the current interval."""
        self._open: dict[DemandKey, ShortDemand] = {}
        """Of intervals before, whose window is not over."""
        self._open_of: dict[str, set[DemandKey]] = {}
        """The keys of `_open` by meter."""
        self._told: dict[bytes, list[tuple[str, bytes]]] = {}
        """By batch: sealed delivery messages with their meters, sent when the ledger has committed the batch."""
        self._untold = store.untold()
        """(start_s, meter) of demands that changed after their meters had been told: until the final word is sent."""
        self._telling: set[tuple[int, str]] = set()
        """Those of them whose final word goes out with this turn, and below, those whose final word has gone out."""
        self._final_told: set[tuple[int, str]] = set()
        self._reported = 0
        self.current: Interval | None = None
        self.first_start_s = 0
        """Start of the first interval that this broker served; the ledger takes no close of an earlier one."""
        self.state = IntervalState.OPEN
        self._resume()

    def _resume(self) -> None:
        """Find the oldest interval that is not closed, and the demands in it and before that are short."""
        for row in self._store.open_demands():
            self._keep_open(self._resumed(row))
        closed_s = self._store.last_interval(IntervalState.CLOSED)
        known_s = self._store.first_interval()
        self.first_start_s = known_s or 0
        if closed_s is not None:
            self._enter(self._calendar.interval_at(closed_s + self._calendar.interval_s))
        elif known_s is not None:
            self._enter(self._calendar.interval_at(known_s))

    def look_again(self) -> None:
        """Intervals and demands have come into the store from elsewhere."""
        self._open.clear()
        self._open_of.clear()
        self.current = None
        self._resume()

    @property
    def stock_from_s(self) -> int:
        """Energy of intervals that begin earlier is kept no longer; 0 as long as no interval has been closed."""
        closed_s = self._store.last_interval(IntervalState.CLOSED)
        return 0 if closed_s is None else self._keep_stock_from(closed_s)

    def _keep_stock_from(self, start_s: int) -> int:
        """For late demands some days, and for open ones the whole of their windows."""
        return min([start_s - KEEP_STOCK_S, *{demand.span.start_s for demand in self._open.values()}])

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
                demand = self._resumed(row)
                self._short[demand.key] = demand

    def _keep_open(self, demand: ShortDemand) -> None:
        self._open[demand.key] = demand
        self._open_of.setdefault(demand.row.meter, set()).add(demand.key)

    def _end_open(self, key: DemandKey) -> None:
        if self._open.pop(key, None) is not None:
            keys = self._open_of[key[1]]
            keys.discard(key)
            if not keys:
                del self._open_of[key[1]]

    def _resumed(self, row: MessageRow) -> ShortDemand:
        """A short demand as it stood, from the store."""
        demand = self._short_demand(row)
        totals: dict[tuple[int, int], int] = {}
        for delivery in self._store.deliveries(row.start_s, row.meter):
            key = (delivery.line, delivery.source)
            totals[key] = totals.get(key, 0) + delivery.to_wh - delivery.from_wh
            # Not their number: some may have been given back.
            demand.slices = delivery.sequence + 1
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

    def join_late(self, start_s: int, meter: str) -> bool:
        """A demand has come to count. True if its interval is cleared already, so that it is filled separately.

        One of a closed interval is settled with the next close.
        """
        if self.is_closed(start_s):
            self._store.mark_late(start_s)
            return False
        if self.current is None or start_s != self.current.start_s or self.state is not IntervalState.CLEARED:
            return False
        row = self._store.current_demand(start_s, meter)
        if row is None or row.delivered_wh >= row.energy_wh:
            return False
        demand = self._resumed(row)
        self._short[demand.key] = demand
        return True

    def is_decided(self, start_s: int) -> bool:
        """True if the demands of that interval have been cleared, so that the ledger may know them."""
        if self.current is None or start_s > self.current.start_s:
            return False
        return start_s < self.current.start_s or self.state is not IntervalState.OPEN

    def put_in_place(self, old: MessageRow, new: MessageRow, cuts: Sequence["Cut"], batch: int) -> None:
        """Another revision of a demand counts from now on, without the slices that it has given back.

        `new` says what the ledger has of it. What it still lacks is decided again; a closed interval is closed anew.
        """
        self._end_open((old.start_s, old.meter, old.revision))
        self._short.pop((old.start_s, old.meter, old.revision), None)
        self._store.set_open_until([(None, old.start_s, old.meter, old.revision)])
        energy_wh = self._take_back(old, cuts, batch)
        self._store.set_standing(old.start_s, old.meter, old.revision, Standing.SUPERSEDED, old.ledger_revision)
        self._store.set_standing(new.start_s, new.meter, new.revision, Standing.CURRENT, new.ledger_revision)
        self._store.set_delivered(
            [
                (0, None, old.start_s, old.meter, old.revision),
                (old.delivered_wh - energy_wh, None, new.start_s, new.meter, new.revision),
            ]
        )

    def withdraw(self, start_s: int, meter: str, cuts: Sequence["Cut"]) -> None:
        """The ledger has taken these Wh back from a demand: it is decided again, and a closed interval closed anew."""
        row = self._store.current_demand(start_s, meter)
        assert row is not None  # It was delivered to.
        key = (row.start_s, row.meter, row.revision)
        self._end_open(key)
        self._short.pop(key, None)
        self._store.set_open_until([(None, *key)])
        energy_wh = self._take_back(row, cuts, 0)
        self._store.set_delivered([(row.delivered_wh - energy_wh, None, *key)])
        self.join_late(start_s, meter)
        after = self._store.current_demand(start_s, meter)
        assert after is not None
        self.tell(after)

    def _take_back(self, row: MessageRow, cuts: Sequence["Cut"], batch: int) -> int:
        """Take these Wh off a demand's deliveries and account. Returns how many."""
        if not cuts:
            return 0
        demand = self._short_demand(row)
        account = self._registry.account(demand.consumer, demand.version, row.start_s)
        by_line = list(account.history.by_line)
        energy_wh = 0
        for cut in cuts:
            self._store.take_back(cut.delivery, cut.from_wh, batch)
            energy_wh += cut.energy_wh
            if cut.delivery.line < len(by_line):
                by_line[cut.delivery.line] -= cut.energy_wh
        history = History(tuple(by_line), account.history.total - energy_wh)
        self._registry.keep_accounts([(row.meter, Account(account.period_start_s, account.version, history))])
        return energy_wh

    def undelivered(self, row: MessageRow) -> bytes:
        """The operation that puts a demand on record without any slice."""
        return self._deliver_operation(self._short_demand(row), row.start_s, [])

    def tell(self, row: MessageRow) -> None:
        """Send the meter what its demand has now, and whatever comes of it, since it was told something else before.

        An agent that has its delivery does not ask again. So who has to be told stands in the store, until the final
        word was handed to a server.
        """
        key = row.start_s, row.meter
        self._store.set_untold(*key)
        self._untold.add(key)
        self._final_told.discard(key)
        self._tell_changed(row)

    def tell_again(self) -> None:
        """A new connection, perhaps after a restart: what was sent before may not have got out."""
        self._telling.clear()
        self._final_told.clear()
        for start_s, meter in sorted(self._untold):
            row = self._store.current_demand(start_s, meter)
            # What the ledger may still refuse is told when it is committed.
            if row is not None and not self._is_waiting(start_s):
                self._tell_changed(row)

    def handed_over(self, *, connected: bool) -> None:
        """What this turn had to say went out, or was dropped because there is no connection."""
        if connected:
            self._final_told |= self._telling
        self._telling.clear()

    def keep_told(self) -> None:
        """Note in the store who has been told the final word."""
        if self._final_told:
            self._store.set_told(self._final_told)
            self._untold -= self._final_told
            self._final_told = set()

    def _tell_changed(self, row: MessageRow) -> None:
        delivery = self.delivery_for(row)
        if delivery.state is DeliveryState.FINAL:
            self._telling.add((row.start_s, row.meter))
        else:
            self._telling.discard((row.start_s, row.meter))
        self._send_delivery(*self._sealed(delivery), qos=1)

    def _is_waiting(self, start_s: int) -> bool:
        """True while the ledger has not answered to a delivery or close of that interval."""
        return self._desk.waits_for(BatchKind.DELIVER, start_s) or self._desk.waits_for(BatchKind.CLOSE, start_s)

    def is_closed(self, start_s: int) -> bool:
        return self.current is not None and start_s < self.current.start_s

    # Decisions

    def clear(self, *, with_groups: bool) -> Clearing:
        """Gate 1: fill the lines of all demands from own stock, or those of single sources. Returns what they lack."""
        assert self.current is not None
        start_s = self.current.start_s
        demands = [
            self._short_demand(row) for row in self._store.messages(start_s, MessageType.DEMAND) if row.refusal is None
        ]
        # Who needs nothing now may need something later in a longer window.
        demands = [demand for demand in demands if demand.row.energy_wh > 0 or demand.waits]
        clearing = self._decide([*demands, *self._open.values()], with_groups=with_groups, gives_early=True)
        for demand in demands:
            if demand.is_short:
                self._short[demand.key] = demand
        self._forget_filled()
        self.hold_back(with_groups=with_groups)
        self.state = IntervalState.CLEARED
        _, revision = self._store.interval_state(start_s)
        self._store.set_interval(start_s, IntervalState.CLEARED, revision)
        return clearing

    def fill(self, *, with_groups: bool) -> Clearing:
        """Between the gates: fill what is still short of the lines, or of those of single sources."""
        clearing = self._decide([*self._short.values(), *self._open.values()], with_groups=with_groups)
        self._forget_filled()
        self.hold_back(with_groups=with_groups)
        return clearing

    def groups_lack_wh(self) -> int:
        """How much of what lines of groups want stock does not have, prices, providers and windows left aside."""
        assert self.current is not None
        left = self._stock.available(self.current)
        wanted = dict.fromkeys(GROUPS, 0)
        for demand in (*self._short.values(), *self._open.values()):
            for line, energy_wh in demand.pledged:
                target = demand.version.contract.lines[line].target
                if isinstance(target, SourceGroup):
                    wanted[target] += energy_wh
        lacking_wh = 0
        unused_wh = sum(left.values())
        for group, wanted_wh in wanted.items():
            # In the order of GROUPS: `any`, which contains the others, comes last.
            here_wh = unused_wh if group is SourceGroup.ANY else sum([left.get(source, 0) for source in group.sources])
            filled_wh = min(wanted_wh, here_wh)
            unused_wh -= filled_wh
            lacking_wh += wanted_wh - filled_wh
        return lacking_wh

    def rehearse(self, offered: Mapping[Lot, int]) -> dict[Source, int]:
        """How much more of each source gate 2 would use if it had these lots of neighbours too. Changes nothing."""
        assert self.current is not None
        until_s = self.current.end_s
        opened = [
            demand.open(self._registry.account(demand.consumer, demand.version, demand.row.start_s))
            for demand in (*self._short.values(), *self._open.values())
        ]
        if not opened:
            return {}
        lots = self._stock.lots(min([demand.span.start_s for demand in opened]), until_s)
        with_offers = dict(lots)
        for lot, energy_wh in offered.items():
            with_offers[lot] = with_offers.get(lot, 0) + energy_wh
        used = [_used(clear_lots(opened, some, until_s, self._tariff.consumer_margin)) for some in (with_offers, lots)]
        # Where own stock would do as well, an offer may still be more plentiful; that is no reason to buy it.
        wanted_wh = sum(used[0].values()) - sum(used[1].values())
        more: dict[Source, int] = {}
        for source, energy_wh in sorted(used[0].items(), key=lambda item: used[1].get(item[0], 0) - item[1]):
            part_wh = min(wanted_wh, energy_wh - used[1].get(source, 0))
            if part_wh > 0:
                more[source] = part_wh
                wanted_wh -= part_wh
        return more

    def close(self, voided_orders: Sequence[bytes]) -> None:
        """Gate 2: shortage choice, record what stays unmatched, close the interval, and settle late demands."""
        assert self.current is not None
        interval = self.current
        demands = list(self._short.values())
        self._decide([*demands, *self._open.values()], settle_until_s=interval.end_s)
        self._forget_filled()
        self._end_windows(interval)
        self._leave_open(demands, interval)
        self._close_on_ledger(interval, [Void(order_id) for order_id in voided_orders])
        for start_s in self._store.late_intervals():
            late = [self._resumed(row) for row in self._store.short_demands(start_s) if row.quotas is None]
            if late:
                self._decide([*late, *self._open.values()], settle_until_s=interval.end_s)
            self._leave_open(late, interval)
            self._close_on_ledger(Interval(start_s, start_s + self._calendar.interval_s), [])
        self._stock.drop_before(self._keep_stock_from(interval.start_s))
        self._enter(Interval(interval.end_s, interval.end_s + self._calendar.interval_s))
        self.hold_back(with_groups=True)

    def _end_windows(self, interval: Interval) -> None:
        """Whose window is over is settled now. The meters hear it with their last delivery, or else here."""
        ended = [demand for demand in self._open.values() if demand.span.end_s <= interval.end_s]
        for demand in ended:
            self._end_open(demand.key)
        self._store.set_open_until([(None, *demand.key) for demand in ended])
        for demand in [demand for demand in ended if demand.quiet]:
            message = delivery_message(demand.row, demand.taken, DeliveryState.FINAL, self._calendar)
            self._send_delivery(*self._sealed(message))

    def _leave_open(self, demands: Iterable[ShortDemand], interval: Interval) -> None:
        """Keep those that are short and whose window goes on after this interval."""
        rows = []
        for demand in demands:
            if demand.is_short and demand.span.end_s > interval.end_s:
                self._keep_open(demand)
                rows.append((demand.span.end_s, *demand.key))
        self._store.set_open_until(rows)

    def _close_on_ledger(self, interval: Interval, voids: list[Void]) -> None:
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

    def _decide(
        self,
        demands: list[ShortDemand],
        settle_until_s: int | None = None,
        *,
        with_groups: bool = True,
        gives_early: bool = False,
    ) -> Clearing:
        """Fill the lines of these demands, settle those whose window ends by `settle_until_s`, and carry it out.

        `gives_early`: all demands of the current interval are among them, so that some can be given to who waits.
        """
        accounts: dict[AccountKey, Account] = {}
        opened = self._opened(demands, accounts, with_groups=with_groups)
        clearing = self._clear(opened, settle_until_s, gives_early=gives_early)
        # By pseudonym, so that the order in a batch says nothing about who is who. Slices are cut in the same order:
        # each asset is then used up from its first Wh on, and the ledger never sees it held in many pieces. A batch
        # serves demands of one interval.
        order = sorted(
            range(len(demands)), key=lambda index: (demands[index].row.start_s, demands[index].row.pseudonym or b"")
        )
        run: list[int] = []
        # A batch's worth at a time, from slice to row, while all of it is in the processor's cache.
        for index in order:
            if run and (len(run) == FULL_BATCH_OPERATIONS or demands[index].row.start_s != demands[run[0]].row.start_s):
                self._carry_out(run, demands, clearing, accounts, settle_until_s)
                run = []
            run.append(index)
        if run:
            self._carry_out(run, demands, clearing, accounts, settle_until_s)
        return clearing

    def _opened(
        self, demands: Sequence[ShortDemand], accounts: dict[AccountKey, Account], *, with_groups: bool
    ) -> list[OpenDemand]:
        """What the market's functions see of these demands; their accounts are added to `accounts`."""
        excess = max(0, len(self._open) - MAX_WAITING)
        for place, key in enumerate(sorted(self._open) if excess else self._open):
            self._open[key].waits = place >= excess
        opened = []
        for demand in demands:
            account = self._registry.account(demand.consumer, demand.version, demand.row.start_s)
            accounts.setdefault((demand.row.meter, account.period_start_s, account.version), account)
            if not demand.quotas:
                demand.quotas = self._divide(demand, account)
            opened.append(demand.open(account, with_groups=with_groups))
        return opened

    def hold_back(self, *, with_groups: bool) -> None:
        """Find out what of the stock waits for whom, of all lines or of those of single sources. Decides nothing.

        It comes to the same after a restart, because it looks at nothing but the stock, at demands that are short, and
        at what was forecast.
        """
        demands = [*self._short.values(), *self._open.values()]
        held_back: dict[Lot, int] = {}
        if any(demand.waits for demand in demands):
            opened = self._opened(demands, {}, with_groups=with_groups or self._own_groups_first)
            held_back = self._clear(opened, None, gives_early=False).held_back
        wanted_wh = self._will_want(self.current) if self.current is not None else {}
        if wanted_wh:
            assert self.current is not None
            day_s = self.current.start_s - self.current.start_s % DAY_S
            lots = self._stock.lots(day_s, self.current.end_s)
            free_wh = {lot: energy_wh - held_back.get(lot, 0) for lot, energy_wh in lots.items()}
            for lot, energy_wh in kept(wanted_wh, free_wh).items():
                held_back[lot] = held_back.get(lot, 0) + energy_wh
        self._stock.hold_back(held_back)

    def _divide(self, demand: ShortDemand, account: Account) -> tuple[int, ...]:
        """The quotas of a demand, by what was delivered and what is pledged under the same account."""
        history = account.history
        for key in self._open_of.get(demand.row.meter, ()):
            other = self._open[key]
            start_s = history_start(other.version.contract, other.row.start_s)
            if (start_s, other.version.version) == (account.period_start_s, account.version):
                history = history.plus(*other.pledged)
        return quotas(demand.version.contract.shares_ppm, history, demand.row.energy_wh)

    def _clear(self, opened: list[OpenDemand], settle_until_s: int | None, *, gives_early: bool) -> Clearing:
        """The market's decision over the stock that fits these demands."""
        assert self.current is not None
        starts = {demand.start_s for demand in opened}
        if len(starts) == 1:
            interval = self._calendar.interval_at(min(starts))
            if are_plain(opened) and not self._stock.holds_reserves(interval):
                available = self._stock.available(interval)
                return fill_lines(opened, available) if settle_until_s is None else settle(opened, available)
        # Energy of the intervals to come is for their own demands first.
        from_s = min([demand.span.start_s for demand in opened], default=0)
        lots = self._stock.lots(from_s, self.current.end_s) if opened else {}
        return clear_lots(opened, lots, settle_until_s, self._tariff.consumer_margin, gives_early=gives_early)

    def _carry_out(
        self,
        run: Sequence[int],
        demands: Sequence[ShortDemand],
        clearing: Clearing,
        accounts: dict[AccountKey, Account],
        settle_until_s: int | None,
    ) -> None:
        """Put into effect what these demands of one interval got, given by their places in `demands`."""
        start_s = demands[run[0]].row.start_s
        decided: list[tuple[ShortDemand, bytes, list[tuple[Taken, HeldSlice]]]] = []
        for index in run:
            demand = demands[index]
            slices = self._take_slices(clearing, index, start_s)
            settled = settle_until_s is not None and demand.span.end_s <= settle_until_s
            # A demand that got nothing at all still goes on record, once, when it is settled.
            demand.final = settled and demand.key in self._open
            if not slices and not (settled and demand.slices == 0):
                demand.quiet = demand.final
                continue
            for first in range(0, max(1, len(slices)), MAX_SLICES_OF_DELIVERY):
                part = slices[first : first + MAX_SLICES_OF_DELIVERY]
                decided.append((demand, self._deliver_operation(demand, start_s, part), part))
        changed: set[AccountKey] = set()
        delivered = []
        for index in run:
            demand, taken = demands[index], clearing.taken[index]
            energy_wh = sum([item.energy_wh for item in taken])
            demand.taken.extend(taken)
            demand.delivered_wh += energy_wh
            if energy_wh:
                period_start_s = history_start(demand.version.contract, start_s)
                key = (demand.row.meter, period_start_s, demand.version.version)
                history = accounts[key].history.plus(*[(item.line, item.energy_wh) for item in taken])
                accounts[key] = accounts[key]._replace(history=history)
                changed.add(key)
            if energy_wh or (demand.is_short and demand.row.quotas != demand.quotas):
                stored_quotas = encode_quotas(demand.quotas) if demand.is_short else None
                delivered.append((demand.delivered_wh, stored_quotas, *demand.key))
                if demand.is_short:
                    demand.row = demand.row._replace(quotas=demand.quotas)
        self._store.set_delivered(delivered)
        self._registry.keep_accounts([(key[0], accounts[key]) for key in sorted(changed)])
        for batch_run in in_batches(decided, [len(operation) for _, operation, _ in decided]):
            batch = self._desk.submit(
                BatchKind.DELIVER, start_s, self._not_after(), [operation for _, operation, _ in batch_run]
            )
            self._note_deliveries(batch, start_s, batch_run)

    def _take_slices(self, clearing: Clearing, index: int, start_s: int) -> list[tuple[Taken, HeldSlice]]:
        """Take what a demand got out of stock: any of the source, or of the lots that clearing picked."""
        taken = clearing.taken[index]
        if not clearing.picked:
            return [(item, held) for item in taken for held in self._stock.take(item.source, start_s, item.energy_wh)]
        return [
            (item, held)
            for item, column in zip(taken, clearing.picked[index], strict=True)
            for held in self._stock.take_lots(clearing.columns[column], item.energy_wh)
        ]

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
                Window(demand.version.contract.window),
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
            if whole or part or demand.final:
                state = DeliveryState.FINAL if whole or demand.final else DeliveryState.OPEN
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
        for key in [key for key, demand in self._short.items() if not demand.is_short]:
            del self._short[key]
        filled = [key for key, demand in self._open.items() if not demand.is_short]
        for key in filled:
            self._end_open(key)
        self._store.set_open_until([(None, *key) for key in filled])

    def _short_demand(self, row: MessageRow) -> ShortDemand:
        consumer = self._registry.consumer(row.meter)
        version = consumer.contract_at(row.start_s) if consumer is not None else None
        # An accepted demand had both; registrations are never taken out of the store.
        assert consumer is not None
        assert version is not None
        interval = Interval(row.start_s, row.start_s + self._calendar.interval_s)
        span = window_span(version.contract.window, interval)
        waits = version.contract.window is not MarketWindow.INTERVAL
        return ShortDemand(row, consumer, version, row.quotas or (), span, waits=waits)

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
                changed = self._changed(batch.start_s, meter)
                if changed is None:
                    self._send_delivery(meter, delivery)
                else:
                    self._tell_changed(changed)
        elif batch.kind is BatchKind.CLOSE:
            for row in self._store.short_demands(batch.start_s):
                if (row.start_s, row.meter) in self._untold:
                    self._tell_changed(row)
                else:
                    self._send_delivery(*self._sealed(self.delivery_for(row)))

    def _changed(self, start_s: int, meter: str) -> MessageRow | None:
        """The demand, if its meter was told something else of it before."""
        return self._store.current_demand(start_s, meter) if (start_s, meter) in self._untold else None

    def _told_before(self, batch: BatchRow) -> list[tuple[str, bytes]]:
        """The deliveries of a batch that was made before a restart."""
        meters = {row.meter for row in self._store.deliveries_of_batch(batch.start_s, batch.number)}
        rows = [self._store.current_demand(batch.start_s, meter) for meter in sorted(meters)]
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
                # Decided again as one that came late; if its window is not over, it becomes an open one then.
                key = (row.start_s, row.meter, row.revision)
                self._end_open(key)
                self._store.set_open_until([(None, *key)])
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
        self._registry.keep_accounts([(row.meter, Account(account.period_start_s, account.version, history))])

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
        # What a correction has opened again has no quotas until it is decided.
        settled = self.is_closed(row.start_s) and row.open_until_s is None and row.quotas is not None
        final = row.delivered_wh == row.energy_wh or settled
        state = DeliveryState.FINAL if final else DeliveryState.OPEN
        return delivery_message(row, taken, state, self._calendar)

    def answer_again(self, row: MessageRow) -> None:
        """A demand came again: besides its receipt the meter gets what is known of its delivery."""
        if self._is_waiting(row.start_s):
            return  # The ledger may still refuse it. The meter is told when it is committed.
        if row.delivered_wh or self.is_closed(row.start_s):
            self._send_delivery(*self._sealed(self.delivery_for(row)))

    def _sealed(self, delivery: Delivery) -> tuple[str, bytes]:
        """The meter, and the message for it."""
        return delivery.meter, self._identity.seal(delivery)

    def _send_delivery(self, meter: str, delivery: bytes, qos: int = 0) -> None:
        # QoS 0: an agent that misses it sends its demand again and gets the same answer.
        self._outputs.publish(self._topics.meter(self._identity.name, meter, "delivery"), delivery, qos=qos)


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


def _used(clearing: Clearing) -> dict[Source, int]:
    """Wh that a clearing gives, by source."""
    used: dict[Source, int] = {}
    for taken in clearing.taken:
        for item in taken:
            used[item.source] = used.get(item.source, 0) + item.energy_wh
    return used


@lru_cache(maxsize=4_096)
def _asset_id(asset: AssetKey) -> AssetId:
    # Thousands of slices in a row are of the same asset.
    device, carrier, start_s, revision = asset
    return AssetId(device, Carrier(carrier), start_s, revision)
