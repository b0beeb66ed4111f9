"""Statements of account: what was traded with whom in a period, at what price, and that all of it balances.

An *account* is one flow of energy between a broker and one partner in a period: what a provider gave it, what a
neighbour sold it, what it sold to a neighbour, what it delivered to a consumer. The receiver pays. A period is
half-open, `[from_s, until_s)`; a transfer belongs to the interval in which its energy was generated, a delivery to the
one in which it was consumed.

What corrections took back stands on lines of its own, with negative Wh and amounts, in the period of what it takes
back: beside the line on which it was charged it is the credit note. Wh that were withdrawn after they had changed hands
several times are taken back from each of these hands, so the sums over all parties stay in balance.

Rounding. Wh times µ-currency per kWh are nano-currency, which add up exactly. Only an account's total is rounded, to
the nearest µ, half a µ up. Its lines then get their whole µ, and the µ that are still missing go one each to the
largest remainders, ties in the order of the lines: so lines add up to their total, and each is less than 1 µ off. A
line's intervals add up to the line in the same way. Both partners have the same rows and so the same amounts. A
broker's own account adds up its partners' totals, so nothing is lost between the parties. Two parts of a period can
differ from the whole by 1 µ an account.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

from broker.protocol.sources import Source

NANO_PER_MICRO: Final = 1_000


class Flow(IntEnum):
    """Which way energy goes between a broker and its partner. The numbers stand in the broker's database."""

    PROVIDED = 0
    """From a provider, under its mandate."""
    BOUGHT = 1
    """From a neighbour, under this broker's order."""
    SOLD = 2
    """To a neighbour, under its order."""
    DELIVERED = 3
    """To a consumer."""

    @property
    def into_broker(self) -> bool:
        """True where the broker receives the energy and pays."""
        return self in (Flow.PROVIDED, Flow.BOUGHT)


class Trade(NamedTuple):
    """`energy_wh` Wh that changed hands for one market interval at `price` µ-currency per kWh.

    `start_s` is the interval that it is settled in. `paid` is the price that the broker had paid for what it passes on,
    and `other_period` says that it was generated outside of the period; neither means anything where energy comes in.
    `taken_back`: a correction undid it, and the Wh are negative. A named tuple, because a period of a large broker has
    millions of them.
    """

    flow: Flow
    party: str
    start_s: int
    source: Source
    device: str
    price: int
    energy_wh: int
    paid: int = 0
    other_period: bool = False
    taken_back: bool = False


@dataclass(frozen=True, slots=True)
class IntervalLine:
    """A line's part in the interval that begins at `start_s`."""

    start_s: int
    energy_wh: int
    amount_micro: int


@dataclass(frozen=True, slots=True)
class Line:
    """Energy of one source at one price; `device` is named on a provider's account, elsewhere it is empty.

    `taken_back`: what corrections undid; Wh and amounts are negative.
    """

    source: Source
    device: str
    price: int
    taken_back: bool
    energy_wh: int
    amount_micro: int
    intervals: tuple[IntervalLine, ...]


@dataclass(frozen=True, slots=True)
class Account:
    """One flow between a broker and a partner in a period. `amount_micro` is what the receiver of the energy owes."""

    flow: Flow
    party: str
    lines: tuple[Line, ...]
    energy_wh: int
    amount_micro: int


@dataclass(frozen=True, slots=True)
class OwnLine:
    """What a broker did with the energy of one source.

    Wh: bought + from stock = passed on + kept. Amounts: bought and passed on are those of the accounts; `from_stock`
    (of other periods) and `kept` (still held, or expired) stand at the price paid; margin = passed on + kept - bought
    - from stock.
    """

    source: Source
    bought_wh: int
    bought_micro: int
    from_stock_wh: int
    from_stock_micro: int
    passed_on_wh: int
    passed_on_micro: int
    kept_wh: int
    kept_micro: int

    @property
    def margin_micro(self) -> int:
        """What the broker earned on what it passed on; it takes what rounding leaves."""
        return self.passed_on_micro + self.kept_micro - self.bought_micro - self.from_stock_micro


@dataclass(frozen=True, slots=True)
class Books:
    """A broker's accounts with all partners in a period, by flow and party, and its own, by source."""

    broker: str
    accounts: tuple[Account, ...]
    own: tuple[OwnLine, ...]

    def amount_micro(self, *flows: Flow) -> int:
        """The sum of the accounts of these flows."""
        return sum([account.amount_micro for account in self.accounts if account.flow in flows])

    def energy_wh(self, *flows: Flow) -> int:
        """The Wh of the accounts of these flows."""
        return sum([account.energy_wh for account in self.accounts if account.flow in flows])


_LineKey = tuple[Source, str, int, bool]
"""(source, device or "", price, taken back)."""


class _OpenAccount:
    """An account that is being added up: Wh by line and, where wanted, by interval."""

    __slots__ = ("wh_by_line",)

    def __init__(self) -> None:
        self.wh_by_line: defaultdict[_LineKey, defaultdict[int, int]] = defaultdict(lambda: defaultdict(int))

    def closed(self, flow: Flow, party: str, *, with_intervals: bool) -> Account:
        keys = sorted(self.wh_by_line)
        line_wh = [sum(self.wh_by_line[key].values()) for key in keys]
        nano = [energy_wh * key[2] for key, energy_wh in zip(keys, line_wh, strict=True)]
        total_micro = to_micro(sum(nano))
        lines = []
        for key, energy_wh, amount_micro in zip(keys, line_wh, rounded(nano, total_micro), strict=True):
            source, device, price, taken_back = key
            starts = sorted(self.wh_by_line[key]) if with_intervals else []
            interval_wh = [self.wh_by_line[key][start_s] for start_s in starts]
            amounts = rounded([part_wh * price for part_wh in interval_wh], amount_micro) if starts else []
            intervals = tuple(map(IntervalLine, starts, interval_wh, amounts))
            lines.append(Line(source, device, price, taken_back, energy_wh, amount_micro, intervals))
        return Account(flow, party, tuple(lines), sum(line_wh), total_micro)


class _OwnSums:
    """A source's row of the broker's own account while it is added up; costs in nano-currency."""

    __slots__ = ("bought_nano", "bought_wh", "here_nano", "here_wh", "other_nano", "other_wh")

    def __init__(self) -> None:
        self.bought_wh = self.bought_nano = 0
        self.here_wh = self.here_nano = 0
        self.other_wh = self.other_nano = 0

    def add(self, trade: Trade) -> None:
        if trade.flow.into_broker:
            self.bought_wh += trade.energy_wh
            self.bought_nano += trade.energy_wh * trade.price
        elif trade.other_period:
            self.other_wh += trade.energy_wh
            self.other_nano += trade.energy_wh * trade.paid
        else:
            self.here_wh += trade.energy_wh
            self.here_nano += trade.energy_wh * trade.paid


def account_of(flow: Flow, party: str, trades: Iterable[Trade]) -> Account:
    """One partner's account from the trades of that flow and party; others are passed over."""
    opened = _OpenAccount()
    for trade in trades:
        if trade.flow is flow and trade.party == party:
            opened.wh_by_line[_line_key(trade)][trade.start_s] += trade.energy_wh
    return opened.closed(flow, party, with_intervals=True)


def books_of(broker: str, trades: Iterable[Trade]) -> Books:
    """All accounts of a broker and its own. Lines hold no intervals here: memory goes with partners, not with time."""
    opened: dict[tuple[Flow, str], _OpenAccount] = {}
    sums: defaultdict[Source, _OwnSums] = defaultdict(_OwnSums)
    for trade in trades:
        account = opened.get((trade.flow, trade.party))
        if account is None:
            account = opened[trade.flow, trade.party] = _OpenAccount()
        account.wh_by_line[_line_key(trade)][0] += trade.energy_wh
        sums[trade.source].add(trade)
    accounts = tuple([opened[key].closed(*key, with_intervals=False) for key in sorted(opened)])
    return Books(broker, accounts, _own_lines(accounts, sums))


def _line_key(trade: Trade) -> _LineKey:
    return trade.source, trade.device if trade.flow is Flow.PROVIDED else "", trade.price, trade.taken_back


def _own_lines(accounts: Iterable[Account], sums: Mapping[Source, _OwnSums]) -> tuple[OwnLine, ...]:
    bought_micro: defaultdict[Source, int] = defaultdict(int)
    passed_on_micro: defaultdict[Source, int] = defaultdict(int)
    for account in accounts:
        amounts = bought_micro if account.flow.into_broker else passed_on_micro
        for line in account.lines:
            amounts[line.source] += line.amount_micro
    sources = sorted(sums)
    kept_nano = [sums[source].bought_nano - sums[source].here_nano for source in sources]
    other_nano = [sums[source].other_nano for source in sources]
    return tuple(
        [
            OwnLine(
                source,
                sums[source].bought_wh,
                bought_micro[source],
                sums[source].other_wh,
                to_micro(from_stock),
                sums[source].here_wh + sums[source].other_wh,
                passed_on_micro[source],
                sums[source].bought_wh - sums[source].here_wh,
                to_micro(kept),
            )
            for source, kept, from_stock in zip(sources, kept_nano, other_nano, strict=True)
        ]
    )


def to_micro(nano: int) -> int:
    """Nano-currency to the nearest µ-currency, half a µ up."""
    return (nano + NANO_PER_MICRO // 2) // NANO_PER_MICRO


def rounded(nano: Sequence[int], total_micro: int) -> list[int]:
    """Amounts in µ that add up to `total_micro`, each less than 1 µ from its exact amount in nano-currency.

    `total_micro` must be the sum of `nano` rounded down or up. Largest remainder, ties to the earlier one.
    """
    amounts = [exact // NANO_PER_MICRO for exact in nano]
    missing = total_micro - sum(amounts)
    by_remainder = sorted(range(len(nano)), key=lambda at: nano[at] % NANO_PER_MICRO, reverse=True)
    for at in by_remainder[:missing]:
        amounts[at] += 1
    return amounts


def book_faults(books: Books) -> tuple[str, ...]:
    """What does not add up in one broker's books, a sentence each; empty if all of it does."""
    faults = []
    for account in books.accounts:
        name = f"{books.broker}, {account.flow.name.lower()} {account.party}"
        if sum([line.energy_wh for line in account.lines]) != account.energy_wh:
            faults.append(f"{name}: the lines' Wh are not the total of {account.energy_wh}")
        if sum([line.amount_micro for line in account.lines]) != account.amount_micro:
            faults.append(f"{name}: the lines' amounts are not the total of {account.amount_micro}")
    for line in books.own:
        name = f"{books.broker}, {line.source.label}"
        if line.bought_wh + line.from_stock_wh != line.passed_on_wh + line.kept_wh:
            faults.append(f"{name}: Wh bought and from stock are not those passed on and kept")
        if line.kept_wh < 0:
            faults.append(f"{name}: {-line.kept_wh} Wh were passed on that were never bought")
    sums = {
        (Flow.PROVIDED, Flow.BOUGHT): (
            sum([line.bought_wh for line in books.own]),
            sum([line.bought_micro for line in books.own]),
        ),
        (Flow.SOLD, Flow.DELIVERED): (
            sum([line.passed_on_wh for line in books.own]),
            sum([line.passed_on_micro for line in books.own]),
        ),
    }
    for flows, of_sources in sums.items():
        of_accounts = books.energy_wh(*flows), books.amount_micro(*flows)
        if of_accounts != of_sources:
            what = " and ".join([flow.name.lower() for flow in flows])
            faults.append(f"{books.broker}: {what} come to {of_accounts} Wh and µ by account, {of_sources} by source")
    return tuple(faults)


def market_faults(all_books: Iterable[Books]) -> tuple[str, ...]:
    """What does not balance over all brokers of a market: their own books, and each trade between two of them.

    If it is empty, what consumers pay is, to the µ, what providers get and brokers keep.
    """
    books_by_broker = {books.broker: books for books in all_books}
    faults = [fault for books in books_by_broker.values() for fault in book_faults(books)]
    between: defaultdict[tuple[str, str], dict[Flow, tuple[int, int, tuple[Line, ...]]]] = defaultdict(dict)
    for books in books_by_broker.values():
        for account in books.accounts:
            said = (account.energy_wh, account.amount_micro, account.lines)
            if account.flow is Flow.SOLD:
                between[books.broker, account.party][Flow.SOLD] = said
            elif account.flow is Flow.BOUGHT:
                between[account.party, books.broker][Flow.BOUGHT] = said
    for (seller, buyer), sides in sorted(between.items()):
        if seller in books_by_broker and buyer in books_by_broker and sides.get(Flow.SOLD) != sides.get(Flow.BOUGHT):
            faults.append(f"{seller} and {buyer} do not say the same about what {seller} sold to {buyer}")
    return tuple(faults)
