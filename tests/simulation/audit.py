"""Holds a finished run against the ledger's own blocks, with books kept here in the plainest way.

Nothing of `broker.ledger.rules` or its state is used: blocks are opened, operations are read, and every Wh is moved
through a dictionary. What the brokers' stores and the meters say must come to the same.
"""

import json
from collections import Counter
from dataclasses import dataclass, field

import pytest
from support.ledger_world import key

from broker.certificates.build import CertificateError
from broker.certificates.gather import issue_certificate
from broker.certificates.verify import verify_certificate
from broker.ledger.embedded import EmbeddedLedger
from broker.ledger.inspect import demands as demands_on_ledger
from broker.ledger.operations import (
    Close,
    Correct,
    CorrectDemand,
    Deliver,
    Issue,
    Operation,
    Transfer,
    Void,
    Window,
    decode_operation,
)
from broker.ledger.trust import read_trust, trust_of
from broker.market.statements import Books as BrokerBooks
from broker.market.statements import Flow, market_faults
from broker.market.windows import Span
from broker.protocol.envelope import Signer, open_envelope, parse
from broker.protocol.messages import Batch, Block, MessageType, Order, Reading
from broker.protocol.sources import Source
from broker.service.accounts import consumer_statement, ledger_faults, own_books, provider_statement
from broker.service.store import BrokerStore, IntervalState, Standing, WorkState
from simulation.world import INTERVAL_S, LEDGER, T0, Books, World, capacity_w

AssetName = tuple[str, int]
"""(device, start of the interval)."""

OrderName = tuple[str, bytes]
"""(requester, order id)."""


@dataclass(slots=True)
class Accounts:
    """Who owns each Wh, and what was said on the ledger. A Wh is (device, interval, number)."""

    owner: dict[tuple[str, int, int], str] = field(default_factory=dict)
    delivered_to: dict[tuple[str, int, int], bytes] = field(default_factory=dict)
    issued_wh: Counter[AssetName] = field(default_factory=Counter)
    demanded_wh: dict[tuple[int, bytes], int] = field(default_factory=dict)
    given_wh: Counter[tuple[int, bytes]] = field(default_factory=Counter)
    revisions: Counter[tuple[int, bytes]] = field(default_factory=Counter)
    """How often each demand was corrected."""
    under_order_wh: Counter[OrderName] = field(default_factory=Counter)
    orders: dict[OrderName, Order] = field(default_factory=dict)
    ended: set[OrderName] = field(default_factory=set)
    revision_of: dict[tuple[str, int, int], int] = field(default_factory=dict)
    """The reading's revision that made each Wh."""
    delivery_of: dict[tuple[str, int, int], tuple[int, tuple[int, bytes]]] = field(default_factory=dict)
    """Which slice, counted over all, and which demand each Wh was delivered with last."""
    slices: int = 0
    metered: dict[AssetName, tuple[int, int]] = field(default_factory=dict)
    """(revision, Wh) that the meter said last."""
    carried_wh: Counter[str] = field(default_factory=Counter)
    withdrawn_wh: Counter[AssetName] = field(default_factory=Counter)
    limit_wh: dict[str, int] = field(default_factory=dict)
    broker_of: dict[str, str] = field(default_factory=dict)
    clock_s: Counter[str] = field(default_factory=Counter)
    deadline_s: int = 0
    closed: dict[tuple[str, int], list[Close]] = field(default_factory=dict)

    def is_late(self, reading: Reading) -> bool:
        return self.clock_s[self.broker_of[reading.meter]] >= reading.end_s + self.deadline_s

    def standing_wh(self) -> Counter[str]:
        """Wh of each device that were issued and not withdrawn."""
        found: Counter[str] = Counter()
        for (device, start_s), energy_wh in self.issued_wh.items():
            found[device] += energy_wh - self.withdrawn_wh[device, start_s]
        return found

    def make(self, asset: AssetName, revision: int, energy_wh: int) -> None:
        """New Wh, numbered from where all before them ended."""
        first = self.issued_wh[asset]
        self.issued_wh[asset] += energy_wh
        for number in range(first, first + energy_wh):
            self.owner[(*asset, number)] = "provider"
            self.revision_of[(*asset, number)] = revision

    def withdraw(self, asset: AssetName, energy_wh: int) -> None:
        """The provider's first, then what others hold, then what was delivered, each time the newest Wh first."""

        def rank(wh: tuple[str, int, int]) -> tuple[int, int, int, int]:
            if wh in self.delivered_to:
                return 2, -self.revision_of[wh], -self.delivery_of[wh][0], -wh[2]
            return int(self.owner[wh] != "provider"), -self.revision_of[wh], 0, -wh[2]

        for wh in sorted([wh for wh in self.owner if wh[:2] == asset], key=rank)[:energy_wh]:
            del self.owner[wh]
            if self.delivered_to.pop(wh, None) is not None:
                self.given_wh[self.delivery_of[wh][1]] -= 1
        self.withdrawn_wh[asset] += energy_wh


def check(world: World, books: Books) -> Accounts:
    """All invariants of a run that is over and whose brokers are stopped. Raises AssertionError."""
    accounts = _replay(world)
    _check_demands(world, books, accounts)
    _check_receipts(world)
    _check_readings(world, accounts)
    _check_orders(world, accounts)
    _check_holdings(world, books, accounts)
    _check_closes(world, accounts)
    _check_money(world, books, accounts)
    return accounts


def check_certificates(world: World, books: Books) -> dict[str, bytes]:
    """Every consumer's certificate of all that its broker has closed is what books, statement and ledger say.

    Returns them by meter; a consumer without any demand has none, nor has one who waits for a whole interval's energy.
    """
    issued = {}
    for plan in world.plan.consumers:
        until_s = _closed_until_s(world, plan.broker)
        demanded_wh = {
            start_s: demand_wh
            for start_s, demand_wh in _demanded_wh(world, plan.meter, plan.broker).items()
            if start_s < until_s
        }
        if not any(demanded_wh.values()):
            continue
        if _has_open_demand(world, plan.meter, plan.broker, until_s):
            with pytest.raises(CertificateError, match="is still open and has been given nothing yet"):
                certificate_of(world, plan.meter, plan.broker, until_s)
            continue
        raw = certificate_of(world, plan.meter, plan.broker, until_s)
        issued[plan.meter] = raw
        contents = verify_certificate(raw, read_trust(json.dumps(trust_of(world.genesis)))).contents
        delivered_wh: Counter[tuple[int, str]] = Counter()
        for line in contents.lines:
            delivered_wh[line.start_s, contents.source_of(line).label] += line.energy_wh
        assert delivered_wh == {
            (start_s, source): energy_wh
            for (meter, start_s, source), energy_wh in books.delivered_wh.items()
            if meter == plan.meter and start_s < until_s and energy_wh
        }
        totals = contents.certificate.totals
        assert totals.demanded_wh == sum(demanded_wh.values())
        assert totals.unmatched_wh == sum(
            energy_wh
            for (meter, at_s), energy_wh in books.unmatched_wh.items()
            if meter == plan.meter and at_s < until_s
        )
        store = BrokerStore(world.brokers[plan.broker].config.database)
        statement = consumer_statement(store, world.genesis, plan.meter, Span(T0, until_s))
        store.close()
        assert (statement.demanded_wh, statement.unmatched_wh) == (totals.demanded_wh, totals.unmatched_wh)
        by_source: Counter[Source] = Counter()
        for charged in statement.accounts[0].lines:
            by_source[charged.source] += charged.energy_wh
        assert +by_source == {total.source: total.energy_wh for total in totals.by_source}
        assert contents.is_provisional == (until_s < contents.final_s)
    return issued


def certificate_of(world: World, meter: str, broker: str, until_s: int, from_s: int = T0) -> bytes:
    """A consumer's certificate, issued from its broker's database and the world's ledger. Raises CertificateError."""
    store = BrokerStore(world.brokers[broker].config.database)
    try:
        return issue_certificate(
            store,
            world.folder / "ledger",
            world.folder / broker / "index.db",
            world.genesis,
            broker,
            key(broker),
            meter,
            (from_s, until_s),
            until_s,
            (),
            "none",
        )
    finally:
        store.close()


def _closed_until_s(world: World, broker: str) -> int:
    store = BrokerStore(world.brokers[broker].config.database)
    closed_s = store.last_interval(IntervalState.CLOSED)
    store.close()
    assert closed_s is not None
    return closed_s + INTERVAL_S


def _has_open_demand(world: World, meter: str, broker: str, until_s: int) -> bool:
    """True if a demand with a longer window has not come to the ledger, since nothing was delivered to it yet."""
    on_ledger = {(demand.start_s, demand.pseudonym) for demand in demands_on_ledger(world.folder / "ledger")}
    store = BrokerStore(world.brokers[broker].config.database)
    rows = [row for row in store.open_demands() if row.meter == meter and row.start_s < until_s]
    store.close()
    return any((row.start_s, row.pseudonym) not in on_ledger for row in rows)


def _demanded_wh(world: World, meter: str, broker: str) -> dict[int, int]:
    store = BrokerStore(world.brokers[broker].config.database)
    try:
        return {
            row.start_s: row.energy_wh
            for row in store.all_messages(MessageType.DEMAND)
            if row.meter == meter and row.standing is Standing.CURRENT
        }
    finally:
        store.close()


def head_of(world: World) -> tuple[int, bytes]:
    """Height and state hash of a stopped world's ledger."""
    ledger = _ledger(world)
    try:
        return ledger.height, ledger.head.state_hash
    finally:
        ledger.close()


def _ledger(world: World) -> EmbeddedLedger:
    return EmbeddedLedger(world.folder / "ledger", world.genesis, "node", key("node"))


def _replay(world: World) -> Accounts:
    ledger = _ledger(world)
    accounts = Accounts(deadline_s=world.genesis.correction_deadline_s)
    for plan in world.plan.devices:
        accounts.limit_wh[plan.device] = capacity_w(plan) * INTERVAL_S * 11 // 36_000
        accounts.broker_of[plan.device] = plan.broker
    try:
        signer = Signer("node", key("node").public)
        for raw in ledger.blocks(1):
            block = open_envelope(raw, LEDGER, lambda _key_id: signer).message
            assert isinstance(block, Block)
            for raw_batch in block.batches:
                envelope = parse(raw_batch)
                sender = next(name for name in world.brokers if key(name).public.key_id == envelope.key_id)
                for encoded in Batch.from_payload(envelope.payload).operations:
                    _apply(accounts, sender, decode_operation(encoded))
    finally:
        ledger.close()
    return accounts


def _apply(accounts: Accounts, sender: str, operation: Operation) -> None:
    if isinstance(operation, Issue):
        reading = Reading.from_payload(parse(operation.statement).payload)
        asset = (reading.meter, reading.start_s)
        assert asset not in accounts.metered, f"{asset} is issued twice"
        wanted_wh = reading.energy_wh + accounts.carried_wh[reading.meter]
        net_wh = 0 if accounts.is_late(reading) else min(max(wanted_wh, 0), accounts.limit_wh[reading.meter])
        accounts.carried_wh[reading.meter] = wanted_wh - net_wh
        accounts.metered[asset] = (0, reading.energy_wh)
        accounts.make(asset, 0, net_wh)
    elif isinstance(operation, Correct):
        reading = Reading.from_payload(parse(operation.statement).payload)
        asset = (reading.meter, reading.start_s)
        revision, before_wh = accounts.metered.get(asset, (0, 0))
        assert reading.revision == revision + 1
        accounts.metered[asset] = (reading.revision, reading.energy_wh)
        difference_wh = reading.energy_wh - before_wh
        net_wh = accounts.issued_wh[asset] - accounts.withdrawn_wh[asset]
        target_wh = min(max(net_wh + difference_wh, 0), accounts.limit_wh[reading.meter])
        if accounts.is_late(reading):
            target_wh = net_wh
        accounts.carried_wh[reading.meter] += difference_wh - (target_wh - net_wh)
        if target_wh > net_wh:
            accounts.make(asset, reading.revision, target_wh - net_wh)
        else:
            accounts.withdraw(asset, net_wh - target_wh)
    elif isinstance(operation, Transfer):
        device, start_s = operation.asset.device, operation.asset.start_s
        owner_before = operation.sender if operation.sender == sender else "provider"
        for number in range(operation.from_wh, operation.to_wh):
            assert accounts.owner[device, start_s, number] == owner_before
            accounts.owner[device, start_s, number] = operation.receiver
        if operation.order is not None:
            order = Order.from_payload(parse(operation.order).payload)
            name = (order.requester, order.order_id)
            assert accounts.orders.setdefault(name, order) == order
            assert name not in accounts.ended, "a transfer under an order that had ended"
            accounts.under_order_wh[name] += operation.to_wh - operation.from_wh
            assert accounts.under_order_wh[name] <= order.energy_wh
    elif isinstance(operation, Deliver):
        demand = (operation.start_s, operation.pseudonym)
        assert accounts.demanded_wh.setdefault(demand, operation.demanded_wh) == operation.demanded_wh
        for item in operation.slices:
            # A day or a month: what that means is tested with the rules and the market.
            assert item.asset.start_s == operation.start_s or operation.window is not Window.INTERVAL
            for number in range(item.from_wh, item.to_wh):
                wh = (item.asset.device, item.asset.start_s, number)
                assert accounts.owner[wh] == sender, "delivered by somebody who does not own it"
                assert wh not in accounts.delivered_to, "delivered twice"
                accounts.delivered_to[wh] = operation.pseudonym
                accounts.delivery_of[wh] = (accounts.slices, demand)
            accounts.slices += 1
            accounts.given_wh[demand] += item.to_wh - item.from_wh
        assert accounts.given_wh[demand] <= operation.demanded_wh
    elif isinstance(operation, CorrectDemand):
        demand = (operation.start_s, operation.pseudonym)
        accounts.revisions[demand] += 1
        assert operation.revision == accounts.revisions[demand]
        accounts.demanded_wh[demand] = operation.demanded_wh
        for item in operation.returned:
            for number in range(item.from_wh, item.to_wh):
                wh = (item.asset.device, item.asset.start_s, number)
                assert accounts.delivered_to.pop(wh) == operation.pseudonym, "returned by somebody who was not given it"
            accounts.given_wh[demand] -= item.to_wh - item.from_wh
        assert accounts.given_wh[demand] <= operation.demanded_wh
    elif isinstance(operation, Close):
        revisions = accounts.closed.setdefault((sender, operation.start_s), [])
        assert operation.revision == len(revisions)
        if not revisions:
            accounts.clock_s[sender] = operation.end_s
        revisions.append(operation)
        for name, order in accounts.orders.items():
            if (order.requester, order.start_s) == (sender, operation.start_s):
                accounts.ended.add(name)
    elif isinstance(operation, Void):
        accounts.ended.add((sender, operation.order_id))


def _stores(world: World) -> dict[str, BrokerStore]:
    return {name: BrokerStore(process.config.database) for name, process in world.brokers.items()}


def _check_demands(world: World, books: Books, accounts: Accounts) -> None:
    """Delivered + unmatched = demanded, in the store, on the ledger and as the meter was told."""
    delivered_wh: Counter[tuple[str, int]] = Counter()
    for (meter, start_s, _), energy_wh in books.delivered_wh.items():
        delivered_wh[meter, start_s] += energy_wh
    seen = set()
    for store in _stores(world).values():
        for row in store.all_messages(MessageType.DEMAND):
            assert row.pseudonym is not None
            assert row.standing is not Standing.WAITING, f"{row.meter} at {row.start_s} waits for its correction"
            if row.standing is not Standing.CURRENT:
                continue
            place = (row.meter, row.start_s)
            on_ledger = (row.start_s, row.pseudonym)
            seen.add(on_ledger)
            assert delivered_wh[place] + books.unmatched_wh[place] == row.energy_wh, place
            assert accounts.given_wh[on_ledger] == delivered_wh[place], f"{place}: store and ledger differ"
            closed_s = store.last_interval(IntervalState.CLOSED)
            if row.energy_wh and closed_s is not None and row.start_s <= closed_s and row.open_until_s is None:
                assert accounts.demanded_wh[on_ledger] == row.energy_wh, f"{place} is not on the ledger"
                told = world.meters[row.meter].final.get(row.start_s)
                if told is not None and told.revision == row.revision:
                    assert told.unmatched_wh >= books.unmatched_wh[place]
        store.close()
    assert set(accounts.demanded_wh) <= seen, "the ledger has demands that no broker accepted"


def _check_receipts(world: World) -> None:
    """What a receipt was given for is in the store, once."""
    stores = _stores(world)
    for meter in world.meters.values():
        kept = [row for row in stores[meter.broker].all_messages(meter.kind) if row.meter == meter.name]
        assert {row.message_id for row in kept} >= set(meter.receipts), f"{meter.name}: receipted and lost"
        assert len({(row.start_s, row.revision) for row in kept}) == len(kept)
    for store in stores.values():
        store.close()


def _check_readings(world: World, accounts: Accounts) -> None:
    """Every accepted reading is issued, once and in full, and belongs to the broker under mandate or those after it."""
    for store in _stores(world).values():
        for row in store.all_messages(MessageType.READING):
            assert row.standing is not Standing.WAITING, f"{row.meter} at {row.start_s} waits for its correction"
            if row.refusal is None and row.revision >= accounts.metered.get((row.meter, row.start_s), (0, 0))[0]:
                on_ledger = accounts.metered.get((row.meter, row.start_s), (0, 0))
                assert on_ledger == (row.revision, row.energy_wh), f"{row.meter} at {row.start_s}"
        assert not store.waiting_batches()
        assert not store.statements(WorkState.WAITING)
        store.close()
    assert "provider" not in accounts.owner.values()
    for device in accounts.broker_of:
        metered_wh = sum(energy_wh for (name, _), (_, energy_wh) in accounts.metered.items() if name == device)
        made_wh = sum(energy_wh for (name, _), energy_wh in accounts.issued_wh.items() if name == device)
        gone_wh = sum(energy_wh for (name, _), energy_wh in accounts.withdrawn_wh.items() if name == device)
        assert metered_wh == made_wh - gone_wh + accounts.carried_wh[device]


def _check_orders(world: World, accounts: Accounts) -> None:
    """Every order has ended, once, and both sides saw what the ledger saw."""
    stores = _stores(world)
    for name, store in stores.items():
        for order in store.all_orders_out():
            assert order.state != "asked", f"{name}: an order to {order.neighbour} never ended"
            assert order.seen_wh == accounts.under_order_wh[name, order.order_id], f"{name}: {order.state}"
            other = next(
                (
                    row
                    for row in stores[order.neighbour].orders_in(order.start_s)
                    if (row.requester, row.order_id) == (name, order.order_id)
                ),
                None,
            )
            if other is not None:
                assert other.state in ("refused", "committed", "dead"), f"{order.neighbour}: {other.state}"
                assert (other.granted_wh if other.state == "committed" else 0) == order.seen_wh
    for store in stores.values():
        store.close()


def _check_holdings(world: World, books: Books, accounts: Accounts) -> None:
    """Issued = held + delivered for each asset, and the brokers' stocks are what the ledger says that they hold."""
    source_of = {plan.device: plan.source for plan in world.plan.devices}
    held: Counter[tuple[str, int, str]] = Counter()
    for (device, start_s, number), owner in accounts.owner.items():
        if (device, start_s, number) not in accounts.delivered_to:
            held[owner, start_s, Source(source_of[device]).label] += 1
    gone_wh = sum(accounts.withdrawn_wh.values())
    assert sum(accounts.issued_wh.values()) == sum(held.values()) + len(accounts.delivered_to) + gone_wh
    assert dict(held) == books.kept_wh


def _check_closes(world: World, accounts: Accounts) -> None:
    """The last close of each interval counts all its demands."""
    for name, store in _stores(world).items():
        for (broker, start_s), revisions in accounts.closed.items():
            if broker == name:
                demands = list(store.messages(start_s, MessageType.DEMAND))
                assert revisions[-1].demands == len(demands)
                assert revisions[-1].demanded_wh == sum(row.energy_wh for row in demands)
        store.close()


def _check_money(world: World, books: Books, accounts: Accounts) -> None:
    """Books balance to the µ over all parties in each period, and every transfer and delivery is the ledger's."""
    whole = Span(T0 - 1_000 * INTERVAL_S, T0 + 1_000 * INTERVAL_S)
    border_s = T0 + 2 * INTERVAL_S
    stores = _stores(world)
    for span in (whole, Span(whole.start_s, border_s), Span(border_s, whole.end_s)):
        all_books = [own_books(store, world.genesis, name, span)[0] for name, store in stores.items()]
        assert market_faults(all_books) == ()
        _check_purses(world, stores, all_books, span)
        if span is whole:
            _check_books_wh(world, books, accounts, all_books)
    for name, store in stores.items():
        assert ledger_faults(store, world.genesis, name, world.folder / "ledger", whole) == ()
        store.close()


def _check_purses(world: World, stores: dict[str, BrokerStore], all_books: list[BrokerBooks], span: Span) -> None:
    """What each party's own statement says it owes and gets comes to nothing over all of them."""
    purse_micro: Counter[str] = Counter()
    for plan in world.plan.consumers:
        statement = consumer_statement(stores[plan.broker], world.genesis, plan.meter, span)
        purse_micro[plan.meter] -= statement.accounts[0].amount_micro
    for owner, broker in {(plan.owner, plan.broker) for plan in world.plan.devices}:
        statement = provider_statement(stores[broker], world.genesis, owner, span)
        purse_micro[owner] += statement.accounts[0].amount_micro
    for one in all_books:
        purse_micro[one.broker] += sum(line.margin_micro - line.kept_micro + line.from_stock_micro for line in one.own)
    assert sum(purse_micro.values()) == 0


def _check_books_wh(world: World, books: Books, accounts: Accounts, all_books: list[BrokerBooks]) -> None:
    """What providers are paid for was made and not withdrawn; what brokers keep, the ledger holds for them."""
    kept: Counter[tuple[str, str]] = Counter()
    for (broker, _, source), energy_wh in books.kept_wh.items():
        kept[broker, source] += energy_wh
    said = {(one.broker, line.source.label): line.kept_wh for one in all_books for line in one.own if line.kept_wh}
    assert said == kept
    standing = accounts.standing_wh()
    provided: Counter[str] = Counter()
    for one in all_books:
        for account in one.accounts:
            if account.flow is Flow.PROVIDED:
                for line in account.lines:
                    provided[line.device] += line.energy_wh
    assert +provided == +standing
