"""What must hold in a market of many brokers: read from stores and ledger of a `ManyWorld` whose run is over."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from hashlib import sha256

from broker.market.clearing import Clearing, OpenDemand, Taken, fill_lines, settle
from broker.market.contracts import WHOLE_PPM, Contract, History, contract_from_bytes, history_start
from broker.market.mix import quotas
from broker.market.statements import Books, Flow, book_faults, market_faults
from broker.market.windows import Span
from broker.protocol.messages import MessageType
from broker.protocol.sources import Source
from broker.service.accounts import (
    PartyStatement,
    consumer_statement,
    ledger_faults,
    neighbour_statement,
    own_books,
    provider_statement,
)
from broker.service.store import BrokerStore
from simulation.many import ManyWorld
from simulation.many_optimum import Books as QuotaBooks
from simulation.world import INTERVAL_S, T0
from simulation.world import Books as Business

SHARE_BOUND_WH = 2


def stores(world: ManyWorld) -> Iterator[tuple[str, BrokerStore]]:
    """One after the other; each is closed when the next is asked for."""
    for name, process in world.brokers.items():
        with closing(BrokerStore(process.config.database)) as store:
            yield name, store


def span_of(world: ManyWorld) -> Span:
    return Span(T0, T0 + (world.plan.intervals + 1) * INTERVAL_S)


# Money


def every_statement(world: ManyWorld) -> list[tuple[str, PartyStatement]]:
    """Those of all consumers, providers and neighbours, each of its broker."""
    span = span_of(world)
    found = []
    for name, store in stores(world):
        for consumer in world.plan.consumers:
            if consumer.broker == name:
                found.append((name, consumer_statement(store, world.genesis, consumer.meter, span)))
        for owner in sorted({device.owner for device in world.plan.devices if device.broker == name}):
            found.append((name, provider_statement(store, world.genesis, owner, span)))
        found += [(name, neighbour_statement(store, world.genesis, other, span)) for other in world.links[name]]
    return found


def money(statements: Iterable[tuple[str, PartyStatement]]) -> dict[tuple[str, str], object]:
    """Wh and amounts of each party's account, line by line, without the height of the ledger that they were read at."""
    return {
        (broker, statement.party): (statement.accounts, statement.demanded_wh, statement.unmatched_wh)
        for broker, statement in statements
    }


def check_money(world: ManyWorld, statements: Iterable[tuple[str, PartyStatement]]) -> None:
    """Consumers pay to the µ what providers get and brokers keep, and each broker's two ends of a trade agree."""
    span = span_of(world)
    books: dict[str, Books] = {}
    for name, store in stores(world):
        books[name] = own_books(store, world.genesis, name, span)[0]
        assert book_faults(books[name]) == ()
        assert ledger_faults(store, world.genesis, name, world.folder / "ledger", span) == ()
    assert market_faults(books.values()) == ()
    paid = received = 0
    between: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for broker, statement in statements:
        for account in statement.accounts:
            if account.flow is Flow.DELIVERED:
                paid += account.amount_micro
            elif account.flow is Flow.PROVIDED:
                received += account.amount_micro
            else:
                pair = (broker, statement.party) if account.flow is Flow.SOLD else (statement.party, broker)
                between[pair].append((account.energy_wh, account.amount_micro))
    assert all(len(ends) == 2 and ends[0] == ends[1] for ends in between.values())
    margins_and_stock = sum(line.margin_micro - line.kept_micro for one in books.values() for line in one.own)
    assert paid == received + margins_and_stock
    assert paid > 0


# Shares and idle energy


@dataclass(slots=True)
class Standing:
    """One consumer's account in the period, kept here from what was delivered."""

    contract: Contract
    period_start_s: int = -1
    by_line: list[int] = field(default_factory=list)
    total_wh: int = 0
    ample: bool = True
    """So far in this period each line got its quota."""


@dataclass(slots=True)
class Fulfilment:
    """What `check_fulfilment` counts."""

    demands: int = 0
    ample_demands: int = 0
    """Of consumers who had all they wanted of every line so far in the period."""
    furthest_wh: float = 0.0
    """From its share, of any line of these."""
    never_short: set[str] = field(default_factory=set)
    idle_here_wh: int = 0
    """What unmatched demands could have had of their own broker's energy of the interval, lines and choices."""
    idle_next_wh: int = 0
    """What their lines could have had of a direct neighbour's."""
    idle_choices_next_wh: int = 0
    """What raised lines and substitutes could have had there."""
    idle_where: list[tuple[str, int, str]] = field(default_factory=list)
    """(broker, interval, meter) of the first few that a line could have had."""
    in_quotas: QuotaBooks = field(default_factory=QuotaBooks.empty)


def check_fulfilment(world: ManyWorld, business: Business) -> Fulfilment:
    """Read all demands again, in order of time, and hold them against the contracts and against what was left over."""
    kept: dict[tuple[str, int], dict[Source, int]] = defaultdict(dict)
    labels = {source.label: source for source in Source}
    for (broker, start_s, label), energy_wh in business.kept_wh.items():
        kept[broker, start_s][labels[label]] = energy_wh
    found = Fulfilment(never_short={consumer.meter for consumer in world.plan.consumers})
    for name, store in stores(world):
        standings = {
            row.meter: Standing(contract_from_bytes(store.contracts(row.meter)[-1].contract))
            for row in store.consumers()
        }
        given: dict[tuple[int, str], list[Taken]] = defaultdict(list)
        for row in store.all_deliveries():
            given[row.start_s, row.meter].append(Taken(row.line, Source(row.source), row.to_wh - row.from_wh))
        waiting: dict[int, list[OpenDemand]] = defaultdict(list)
        for row in store.all_messages(MessageType.DEMAND):
            taken = given.get((row.start_s, row.meter), [])
            demand = _account_for(standings[row.meter], row.meter, row.start_s, row.energy_wh, taken, found)
            _note_quotas(name, demand, found.in_quotas)
            if row.delivered_wh < row.energy_wh:
                waiting[row.start_s].append(demand)
        for start_s, demands in waiting.items():
            _look_for_idle(name, start_s, demands, kept, world.links[name], found)
    for device in world.plan.devices:
        for index, energy_wh in enumerate(device.energies_wh):
            found.in_quotas.made[T0 + index * INTERVAL_S][device.broker, device.source] += energy_wh
    return found


def _note_quotas(broker: str, demand: OpenDemand, books: QuotaBooks) -> None:
    got = [0] * len(demand.quotas)
    for item in demand.taken:
        if item.line < len(got):
            got[item.line] += item.energy_wh
    for line, quota_wh, got_wh in zip(demand.contract.lines, demand.quotas, got, strict=True):
        books.wants[demand.start_s][broker, line.target] += quota_wh
        books.delivered_wh[demand.start_s] += min(quota_wh, got_wh)


def _account_for(
    standing: Standing, meter: str, start_s: int, energy_wh: int, taken: list[Taken], found: Fulfilment
) -> OpenDemand:
    contract = standing.contract
    shares = [line.share_ppm for line in contract.lines]
    if standing.period_start_s != history_start(contract, start_s):
        standing.period_start_s = history_start(contract, start_s)
        standing.by_line, standing.total_wh, standing.ample = [0] * len(shares), 0, True
    history = History(tuple(standing.by_line), standing.total_wh)
    wanted = quotas(shares, history, energy_wh)
    got = [0] * len(shares)
    for item in taken:
        standing.total_wh += item.energy_wh
        if item.line < len(shares):
            got[item.line] += item.energy_wh
    for line, of_line_wh in enumerate(got):
        standing.by_line[line] += of_line_wh
    found.demands += 1
    if tuple(got) != wanted:
        standing.ample = False
        found.never_short.discard(meter)
    if standing.ample:
        found.ample_demands += 1
        for delivered_wh, share in zip(standing.by_line, shares, strict=True):
            off = abs(delivered_wh * WHOLE_PPM - share * standing.total_wh)
            assert off < SHARE_BOUND_WH * WHOLE_PPM, f"{meter} at {start_s}: {standing}"
            found.furthest_wh = max(found.furthest_wh, off / WHOLE_PPM)
    return OpenDemand(meter, energy_wh, contract, wanted, history, tuple(taken), start_s)


def _look_for_idle(
    broker: str,
    start_s: int,
    demands: list[OpenDemand],
    kept: Mapping[tuple[str, int], dict[Source, int]],
    neighbours: Iterable[str],
    found: Fulfilment,
) -> None:
    """Would the pure clearing give these demands any of what was left over?"""

    def more(clearing: Clearing) -> int:
        return sum(item.energy_wh for taken in clearing.taken for item in taken)

    found.idle_here_wh += more(settle(demands, kept.get((broker, start_s), {})))
    for other in neighbours:
        there = kept.get((other, start_s), {})
        clearing = fill_lines(demands, there)
        lines_wh = more(clearing)
        found.idle_next_wh += lines_wh
        found.idle_choices_next_wh += more(settle(demands, there)) - lines_wh
        if lines_wh and len(found.idle_where) < 20:
            first = next(demand.meter for demand, taken in zip(demands, clearing.taken, strict=True) if taken)
            found.idle_where.append((broker, start_s, f"{first} from {other}: {lines_wh} Wh"))


def digest(world: ManyWorld, statements: Iterable[tuple[str, PartyStatement]]) -> bytes:
    """Of all statements, to the byte, heights included."""
    return sha256(repr(list(statements)).encode()).digest()
