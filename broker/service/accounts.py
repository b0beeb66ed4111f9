"""Statements of account from the broker's database, and whether a ledger says the same.

What was traded is read from what the ledger has committed, at one moment of the database, also while the broker runs;
`broker.market.statements` makes accounts of it. Prices of transfers stand on the ledger and can be checked there. What
a consumer pays does not: there the broker's record says the price, and the ledger who got which Wh.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from broker.ledger import inspect
from broker.ledger.operations import AssetId, Deliver, Transfer
from broker.ledger.state import AssetRow, asset_key
from broker.market.statements import Account, Books, Flow, Trade, account_of, books_of
from broker.market.windows import Span, Window, window_span
from broker.protocol.envelope import parse
from broker.protocol.market_time import Interval
from broker.protocol.messages import Carrier, Genesis, MessageType, Order
from broker.protocol.sources import Source
from broker.service.store import BrokerStore, IntervalState, SettledRow

MAX_FAULTS: Final = 100
"""More differences than these say nothing new."""


class AccountsError(Exception):
    """A statement that cannot be made. The text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How final a statement is.

    `height` is the ledger's up to which it holds. Intervals that end up to `closed_until_s` are closed here; until
    `provisional_until_s` is closed, corrections and deliveries within a window can still change what the period holds.
    """

    height: int
    closed_until_s: int
    provisional_until_s: int


@dataclass(frozen=True, slots=True)
class PartyStatement:
    """One partner's accounts with the broker. The Wh of demands are a consumer's, and None for others."""

    party: str
    accounts: tuple[Account, ...]
    standing: Standing
    demanded_wh: int | None = None

    @property
    def unmatched_wh(self) -> int | None:
        """Wh of demands that nothing on the ledger was delivered for; they have no price."""
        delivered_wh = sum([account.energy_wh for account in self.accounts])
        return None if self.demanded_wh is None else self.demanded_wh - delivered_wh


def consumer_statement(store: BrokerStore, genesis: Genesis, meter: str, span: Span) -> PartyStatement:
    """What a consumer got. Raises AccountsError if there is no such consumer here."""
    if store.consumer(meter) is None:
        raise AccountsError(f"no consumer {meter} is registered here; see `energy-broker list consumers`")
    with _one_moment(store):
        demanded_wh = store.demanded_wh(meter, span.start_s, span.end_s)
        account = account_of(Flow.DELIVERED, meter, _delivered(store, span, meter))
        return PartyStatement(meter, (account,), _standing(store, genesis, span), demanded_wh)


def provider_statement(store: BrokerStore, genesis: Genesis, owner: str, span: Span) -> PartyStatement:
    """What a provider's devices gave. Raises AccountsError if none of its devices is under mandate here."""
    if all(row.owner != owner for row in store.devices()):
        raise AccountsError(f"no device of {owner} is taken on here; see `energy-broker list providers`")
    with _one_moment(store):
        account = account_of(Flow.PROVIDED, owner, _came_in(store, Flow.PROVIDED, span))
        return PartyStatement(owner, (account,), _standing(store, genesis, span))


def neighbour_statement(store: BrokerStore, genesis: Genesis, neighbour: str, span: Span) -> PartyStatement:
    """What was bought from a neighbour and sold to it; one that never traded has two empty accounts."""
    with _one_moment(store):
        accounts = (
            account_of(Flow.BOUGHT, neighbour, _came_in(store, Flow.BOUGHT, span)),
            account_of(Flow.SOLD, neighbour, _sold(store, span)),
        )
        return PartyStatement(neighbour, accounts, _standing(store, genesis, span))


def own_books(store: BrokerStore, genesis: Genesis, broker: str, span: Span) -> tuple[Books, Standing]:
    """The broker's accounts with everybody, and its own.

    Raises AccountsError if it passed something on that never came here.
    """
    with _one_moment(store):
        return books_of(broker, _all_trades(store, span)), _standing(store, genesis, span)


def _all_trades(store: BrokerStore, span: Span) -> Iterator[Trade]:
    for flow in (Flow.PROVIDED, Flow.BOUGHT):
        yield from _came_in(store, flow, span)
    yield from _sold(store, span)
    yield from _delivered(store, span)


def _came_in(store: BrokerStore, flow: Flow, span: Span) -> Iterator[Trade]:
    for row in store.transfers(flow, span.start_s, span.end_s):
        energy_wh = row.to_wh - row.from_wh
        yield Trade(flow, row.party, row.asset_start_s, Source(row.source), row.device, row.price, energy_wh)
    for gone in store.settled_withdrawals(flow, span.start_s, span.end_s):
        named = flow, gone.party, gone.start_s, Source(gone.source), gone.device, gone.price
        yield Trade(*named, -gone.energy_wh, taken_back=True)


def _sold(store: BrokerStore, span: Span) -> Iterator[Trade]:
    yield from _passed_on(Flow.SOLD, store.settled_sales(span.start_s, span.end_s), span)
    for trade in _passed_on(Flow.SOLD, store.settled_withdrawals(Flow.SOLD, span.start_s, span.end_s), span):
        yield _back(trade)


def _delivered(store: BrokerStore, span: Span, meter: str | None = None) -> Iterator[Trade]:
    """What was given, what of that came back as well, and that it came back: it was billed for a while."""
    yield from _passed_on(Flow.DELIVERED, store.settled_deliveries(span.start_s, span.end_s, meter), span)
    for trade in _passed_on(Flow.DELIVERED, store.settled_taken_back(span.start_s, span.end_s, meter), span):
        yield trade
        yield _back(trade)


def _back(trade: Trade) -> Trade:
    return trade._replace(energy_wh=-trade.energy_wh, taken_back=True)


def _passed_on(flow: Flow, rows: Iterator[SettledRow], span: Span) -> Iterator[Trade]:
    for row in rows:
        if row.paid is None:
            raise AccountsError(
                f"{row.energy_wh} Wh of {row.device} at {row.asset_start_s} went to {row.party} and never came here;"
                " compare this database with the ledger (`energy-broker statement --own --check`)"
            )
        other = not span.start_s <= row.asset_start_s < span.end_s
        source = Source(row.source)
        yield Trade(flow, row.party, row.start_s, source, row.device, row.price, row.energy_wh, row.paid, other)


def _standing(store: BrokerStore, genesis: Genesis, span: Span) -> Standing:
    cursor = store.ledger_cursor()
    closed_s = store.last_interval(IntervalState.CLOSED)
    closed_until_s = 0 if closed_s is None else closed_s + genesis.interval_s
    # A demand with the longest window can still be filled, until then, for an interval that is closed.
    last = Interval(span.end_s - genesis.interval_s, span.end_s)
    final_s = max(span.end_s + genesis.correction_deadline_s, window_span(Window.MONTH, last).end_s)
    return Standing(0 if cursor is None else cursor[0], closed_until_s, final_s)


@contextmanager
def _one_moment(store: BrokerStore) -> Iterator[None]:
    """All that is read inside is of one moment, whatever a running broker writes meanwhile."""
    store.begin_reading()
    try:
        yield
    finally:
        store.commit()


# Against the ledger


class _Moved(NamedTuple):
    """A transfer as both the database and the ledger know it."""

    flow: Flow
    party: str
    device: str
    start_s: int
    revision: int
    from_wh: int
    to_wh: int
    price: int
    order_id: bytes

    def __str__(self) -> str:
        what = f"{self.flow.name.lower()} {self.party}, {self.device} at {self.start_s}, revision {self.revision}"
        return f"{what}, Wh {self.from_wh} to {self.to_wh} at {self.price} µ/kWh"


class _Given(NamedTuple):
    """A delivered slice as both know it; the ledger has the pseudonym in place of the meter, and no price."""

    pseudonym: bytes
    start_s: int
    device: str
    asset_start_s: int
    revision: int
    from_wh: int
    to_wh: int

    def __str__(self) -> str:
        asset = f"{self.device} at {self.asset_start_s}, revision {self.revision}"
        return f"delivered for {self.start_s}, {asset}, Wh {self.from_wh} to {self.to_wh}"


def ledger_faults(
    store: BrokerStore,
    genesis: Genesis,
    broker: str,
    path: Path,
    span: Span,
    flows: Sequence[Flow] = tuple(Flow),
    party: str | None = None,
) -> tuple[str, ...]:
    """Where the broker's record of a period and a copy of the ledger differ, a sentence each; empty if nowhere.

    Looks at these flows, with one partner or with all: transfers with their prices and orders, and which Wh were
    delivered for which demand. Only blocks that the broker has taken in count. Raises LedgerError.
    """
    if inspect.genesis(path) != genesis:
        return (f"{path} is a ledger of another genesis than the broker's",)
    with _one_moment(store):
        cursor = store.ledger_cursor()
        height = 0 if cursor is None else cursor[0]
        recorded: Counter[_Moved | _Given] = Counter(_recorded_transfers(store, span, flows, party))
        withdrawn_wh = _recorded_withdrawals(store, recorded)
        meters: dict[tuple[int, bytes], str] = {}
        if Flow.DELIVERED in flows:
            meters = {
                (row.start_s, row.pseudonym): row.meter
                for start_s in range(span.start_s, span.end_s, genesis.interval_s)
                for row in store.messages(start_s, MessageType.DEMAND)
                if row.pseudonym is not None and party in (None, row.meter)
            }
            recorded.update(_recorded_deliveries(store, span, meters, party))
    on_ledger: Counter[_Moved | _Given] = Counter()
    recorded = _in_pieces(recorded)
    for at_height, operation in inspect.operations(path):
        if at_height > height:
            break
        if isinstance(operation, Transfer):
            moved = _moved(operation, broker)
            if (
                moved is not None
                and moved.flow in flows
                and party in (None, moved.party)
                and span.start_s <= moved.start_s < span.end_s
            ):
                on_ledger[moved] += 1
        elif isinstance(operation, Deliver) and (operation.start_s, operation.pseudonym) in meters:
            for item in operation.slices:
                asset = item.asset
                named = asset.device, asset.start_s, asset.revision, item.from_wh, item.to_wh
                on_ledger[_Given(operation.pseudonym, operation.start_s, *named)] += 1
    on_ledger = _in_pieces(on_ledger)
    faults = []
    reached = inspect.height(path)
    if reached < height:
        faults.append(f"{path} ends at height {reached}, this broker has followed to {height}; get a newer copy")
    faults += [f"not on the ledger: {entry}" for entry in sorted(map(str, (recorded - on_ledger).elements()))]
    faults += [f"not in the database: {entry}" for entry in sorted(map(str, (on_ledger - recorded).elements()))]
    faults += _withdrawal_faults(path, height, withdrawn_wh)
    return tuple(faults[:MAX_FAULTS])


def _recorded_transfers(store: BrokerStore, span: Span, flows: Sequence[Flow], party: str | None) -> Iterator[_Moved]:
    for flow in flows:
        for row in store.transfers(flow, span.start_s, span.end_s):
            if party in (None, row.party):
                named = row.device, row.asset_start_s, row.asset_revision, row.from_wh, row.to_wh
                yield _Moved(flow, row.party, *named, row.price, row.order_id)


def _recorded_withdrawals(store: BrokerStore, transfers: Iterable[_Moved | _Given]) -> dict[AssetId, int]:
    """Wh of each of these assets that the database knows to be withdrawn, from whomever."""
    assets = {
        AssetId(entry.device, Carrier.ELECTRICITY, entry.start_s, entry.revision)
        for entry in transfers
        if isinstance(entry, _Moved)
    }
    return {
        asset: sum(
            to_wh - from_wh
            for revision, from_wh, to_wh in store.withdrawn(asset.device, asset.start_s)
            if revision == asset.revision
        )
        for asset in sorted(assets, key=asset_key)
    }


def _withdrawal_faults(path: Path, height: int, recorded_wh: dict[AssetId, int]) -> Iterator[str]:
    """Where corrections took other Wh than are credited. What came after `height` may have taken more."""
    with inspect.opened(path) as ledger:
        goes_on = ledger.height() > height
        for asset, energy_wh in recorded_wh.items():
            row: AssetRow | None = ledger.get(asset_key(asset))
            withdrawn_wh = 0 if row is None else row.withdrawn_wh
            if energy_wh > withdrawn_wh or (energy_wh < withdrawn_wh and not goes_on):
                yield (
                    f"withdrawn of {asset.device} at {asset.start_s}, revision {asset.revision}: {withdrawn_wh} Wh on"
                    f" the ledger, {energy_wh} in the database"
                )


def _recorded_deliveries(
    store: BrokerStore, span: Span, meters: dict[tuple[int, bytes], str], party: str | None
) -> Iterator[_Given]:
    pseudonyms = {(start_s, meter): pseudonym for (start_s, pseudonym), meter in meters.items()}
    for row in store.committed_deliveries(span.start_s, span.end_s):
        if party in (None, row.meter):
            named = row.device, row.asset_start_s, row.asset_revision, row.from_wh, row.to_wh
            yield _Given(pseudonyms[row.start_s, row.meter], row.start_s, *named)
    # What a correction took back was delivered all the same.
    for start_s, meter, device, asset_start_s, revision, from_wh, to_wh in store.taken_back(span.start_s, span.end_s):
        if party in (None, meter):
            name = pseudonyms[start_s, meter]
            yield _Given(name, start_s, device, asset_start_s, revision, from_wh, to_wh)


def _in_pieces(entries: Counter[_Moved | _Given]) -> Counter[_Moved | _Given]:
    """The same with deliveries of one asset to one demand joined where they touch, and cut where they overlap.

    A correction may have cut the database's slices where the ledger's operation has them whole.
    """
    pieces: Counter[_Moved | _Given] = Counter()
    borders: dict[_Given, Counter[int]] = {}
    for entry, count in entries.items():
        if isinstance(entry, _Moved):
            pieces[entry] += count
            continue
        steps = borders.setdefault(entry._replace(from_wh=0, to_wh=0), Counter())
        steps[entry.from_wh] += count
        steps[entry.to_wh] -= count
    for name, steps in borders.items():
        covered, since_wh = 0, 0
        for border_wh, step in sorted(steps.items()):
            if step and covered:
                pieces[name._replace(from_wh=since_wh, to_wh=border_wh)] += covered
            if step:
                covered, since_wh = covered + step, border_wh
    return pieces


def _moved(transfer: Transfer, broker: str) -> _Moved | None:
    """The transfer from this broker's side; None if it has no part in it."""
    order_id = b"" if transfer.order is None else Order.from_payload(parse(transfer.order).payload).order_id
    if transfer.receiver == broker:
        flow, party = (Flow.PROVIDED if transfer.order is None else Flow.BOUGHT), transfer.sender
    elif transfer.sender == broker:
        flow, party = Flow.SOLD, transfer.receiver
    else:
        return None
    asset = transfer.asset
    named = asset.device, asset.start_s, asset.revision, transfer.from_wh, transfer.to_wh
    return _Moved(flow, party, *named, transfer.price, order_id)
