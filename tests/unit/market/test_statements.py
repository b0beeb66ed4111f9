"""Statements of account: rounding as written down, and sums that balance over all parties whatever was traded."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.market.statements import (
    Books,
    Flow,
    Line,
    Trade,
    account_of,
    book_faults,
    books_of,
    market_faults,
    rounded,
    to_micro,
)
from broker.market.tariff import Tariff
from broker.protocol.sources import Source

SOLAR, WIND, HYDRO = Source.SOLAR, Source.WIND, Source.HYDRO
T0 = 1_800


def given_wh(energy_wh: int, price: int, source: Source = SOLAR, start_s: int = T0, party: str = "home") -> Trade:
    return Trade(Flow.DELIVERED, party, start_s, source, "roof", price, energy_wh)


@pytest.mark.parametrize(
    ("nano", "micro"), [(0, 0), (499, 0), (500, 1), (1_499, 1), (1_500, 2), (10**15 + 500, 10**12 + 1)]
)
def test_half_a_micro_is_rounded_up(nano: int, micro: int) -> None:
    assert to_micro(nano) == micro


@pytest.mark.parametrize(
    ("nano", "total", "amounts"),
    [
        # Three thirds of 1 µ: each line on its own would come to 0.
        ([333, 333, 334], 1, [0, 0, 1]),
        ([1_500, 1_500], 3, [2, 1]),
        ([700, 700, 700], 2, [1, 1, 0]),
        ([2_000, 0, 1_000], 3, [2, 0, 1]),
        ([999, 999, 999, 999], 4, [1, 1, 1, 1]),
        ([], 0, []),
    ],
)
def test_missing_micros_go_to_the_largest_remainders_and_then_to_the_first(
    nano: list[int], total: int, amounts: list[int]
) -> None:
    assert to_micro(sum(nano)) == total
    assert rounded(nano, total) == amounts


@given(st.lists(st.integers(0, 10**18)))
def test_rounded_amounts_add_up_and_are_less_than_a_micro_off(nano: list[int]) -> None:
    total = to_micro(sum(nano))
    amounts = rounded(nano, total)
    assert sum(amounts) == total
    assert all(abs(amount * 1_000 - exact) < 1_000 for amount, exact in zip(amounts, nano, strict=True))


def test_a_statement_worked_through() -> None:
    """7 Wh at 101 and 3 Wh at 99 µ/kWh are 707 and 297 nano: 1.004 µ, so 1 µ, and it goes to the 707."""
    account = account_of(
        Flow.DELIVERED,
        "home",
        [given_wh(4, 101), given_wh(3, 99, WIND), given_wh(3, 101, start_s=2 * T0), given_wh(1, 1, party="other")],
    )
    assert (account.energy_wh, account.amount_micro) == (10, 1)
    assert [(line.source, line.price, line.energy_wh, line.amount_micro) for line in account.lines] == [
        (SOLAR, 101, 7, 1),
        (WIND, 99, 3, 0),
    ]
    assert [(part.start_s, part.energy_wh, part.amount_micro) for part in account.lines[0].intervals] == [
        (T0, 4, 1),
        (2 * T0, 3, 0),
    ]


def test_a_providers_account_names_its_devices() -> None:
    account = account_of(
        Flow.PROVIDED,
        "ola",
        [Trade(Flow.PROVIDED, "ola", T0, SOLAR, device, 90_000, 1_000) for device in ("roof", "barn", "roof")],
    )
    assert [(line.device, line.energy_wh, line.amount_micro) for line in account.lines] == [
        ("barn", 1_000, 90_000),
        ("roof", 2_000, 180_000),
    ]


def test_the_margin_is_what_is_left_of_what_was_passed_on() -> None:
    """2 kWh bought at 0.09, 1 of them sold at 0.10, half of another from last month sold at 0.12 that had cost 0.08."""
    tariff = Tariff(consumer_margin=10_000, neighbour_margin=40_000)
    books = books_of(
        "east",
        [
            Trade(Flow.PROVIDED, "ola", T0, SOLAR, "roof", 90_000, 2_000),
            Trade(Flow.DELIVERED, "home", T0, SOLAR, "roof", tariff.for_consumers(90_000), 1_000, 90_000),
            Trade(Flow.SOLD, "west", T0, SOLAR, "roof", tariff.for_neighbours(80_000), 500, 80_000, other_period=True),
        ],
    )
    (line,) = books.own
    assert (line.bought_wh, line.from_stock_wh, line.passed_on_wh, line.kept_wh) == (2_000, 500, 1_500, 1_000)
    assert (line.bought_micro, line.from_stock_micro, line.passed_on_micro, line.kept_micro) == (
        *(180_000, 40_000),
        *(160_000, 90_000),
    )
    assert line.margin_micro == 10_000 + 20_000
    assert book_faults(books) == ()


# A market of three brokers: every Wh that one passes on had come to it, at some price, from somebody.

BROKERS = ("east", "south", "west")
SALES = st.tuples(
    st.sampled_from(["east", "south", "west", "home-1", "home-2"]), st.integers(1, 400), st.integers(0, 9)
)
MARKETS = st.lists(
    st.tuples(
        st.sampled_from(BROKERS),
        st.sampled_from([SOLAR, WIND, HYDRO]),
        st.integers(1, 1_000),
        st.integers(0, 300_000),
        st.integers(1, 3),
        st.lists(SALES, max_size=4),
    ),
    max_size=12,
)


def trades_of(market: list[tuple[str, Source, int, int, int, list[tuple[str, int, int]]]]) -> dict[str, list[Trade]]:
    """Each lot is provided to a broker, and then goes from hand to hand, in parts, a little dearer each time."""
    trades: dict[str, list[Trade]] = {name: [] for name in BROKERS}
    for number, (broker, source, energy_wh, price, interval, sales) in enumerate(market):
        start_s, device = interval * T0, f"device-{number}"
        trades[broker].append(Trade(Flow.PROVIDED, "ola", start_s, source, device, price, energy_wh))
        holder, held_wh = broker, energy_wh
        for receiver, most_wh, margin in sales:
            part_wh = min(most_wh, held_wh)
            if receiver == holder or not part_wh:
                continue
            paid, price = price, price + margin
            sold = (start_s, source, device, price, part_wh)
            if receiver in BROKERS:
                trades[holder].append(Trade(Flow.SOLD, receiver, *sold, paid))
                trades[receiver].append(Trade(Flow.BOUGHT, holder, *sold))
                holder, held_wh = receiver, part_wh
            else:
                trades[holder].append(Trade(Flow.DELIVERED, receiver, *sold, paid))
                held_wh -= part_wh
                price = paid
    return trades


@given(MARKETS, st.randoms(use_true_random=False))
def test_any_trades_balance_to_the_micro_over_all_parties(
    market: list[tuple[str, Source, int, int, int, list[tuple[str, int, int]]]], shuffler: object
) -> None:
    trades = trades_of(market)
    books = [books_of(name, trades[name]) for name in BROKERS]
    assert market_faults(books) == ()
    purse: Counter[str] = Counter()
    for one in books:
        for account in one.accounts:
            payer, payee = (one.broker, account.party) if account.flow.into_broker else (account.party, one.broker)
            # Between two brokers it stands in both books; one of them counts.
            if account.flow is not Flow.BOUGHT:
                purse[payer] -= account.amount_micro
                purse[payee] += account.amount_micro
    assert sum(purse.values()) == 0
    for one in books:
        earned = one.amount_micro(Flow.SOLD, Flow.DELIVERED) - one.amount_micro(Flow.PROVIDED, Flow.BOUGHT)
        assert purse[one.broker] == earned
        assert earned == sum(line.margin_micro - line.kept_micro for line in one.own)
    shuffled = {name: list(of_broker) for name, of_broker in trades.items()}
    for of_broker in shuffled.values():
        shuffler.shuffle(of_broker)  # type: ignore[attr-defined]
    assert [books_of(name, shuffled[name]) for name in BROKERS] == books


@given(MARKETS, st.integers(1, 4))
def test_two_parts_of_a_period_differ_from_the_whole_by_at_most_a_micro_an_account(
    market: list[tuple[str, Source, int, int, int, list[tuple[str, int, int]]]], border: int
) -> None:
    trades = trades_of(market)["east"]
    for flow, party in {(trade.flow, trade.party) for trade in trades}:
        whole = account_of(flow, party, trades)
        first = account_of(flow, party, [trade for trade in trades if trade.start_s < border * T0])
        second = account_of(flow, party, [trade for trade in trades if trade.start_s >= border * T0])
        assert first.energy_wh + second.energy_wh == whole.energy_wh
        assert abs(first.amount_micro + second.amount_micro - whole.amount_micro) <= 1


@given(MARKETS)
def test_an_accounts_intervals_add_up_to_its_lines(
    market: list[tuple[str, Source, int, int, int, list[tuple[str, int, int]]]],
) -> None:
    account = account_of(Flow.PROVIDED, "ola", trades_of(market)["east"])
    for line in account.lines:
        assert sum(part.energy_wh for part in line.intervals) == line.energy_wh
        assert sum(part.amount_micro for part in line.intervals) == line.amount_micro


def taken_back_after(
    market: list[tuple[str, Source, int, int, int, list[tuple[str, int, int]]]], back: list[int]
) -> dict[str, list[Trade]]:
    """Of each lot so many Wh are withdrawn that the last broker still has, and so from all hands before it."""
    trades = trades_of(market)
    for number, most_wh in enumerate(back[: len(market)]):
        chain = [
            (name, trade)
            for name, of_broker in trades.items()
            for trade in of_broker
            if trade.device == f"device-{number}" and trade.flow is not Flow.DELIVERED
        ]
        back_wh = min([most_wh, *(trade.energy_wh for _, trade in chain)])
        given = [(name, trade) for name in BROKERS for trade in trades[name] if trade.device == f"device-{number}"]
        passed_on_wh = sum(trade.energy_wh for _, trade in given if trade.flow is Flow.DELIVERED)
        kept_wh = min(trade.energy_wh for _, trade in chain) - passed_on_wh
        for name, trade in chain:
            if 0 < back_wh <= kept_wh:
                trades[name].append(trade._replace(energy_wh=-back_wh, taken_back=True))
    return trades


@given(MARKETS, st.lists(st.integers(0, 300), max_size=12))
def test_what_is_taken_back_keeps_everything_in_balance_on_lines_of_its_own(
    market: list[tuple[str, Source, int, int, int, list[tuple[str, int, int]]]], back: list[int]
) -> None:
    trades = taken_back_after(market, back)
    books = [books_of(name, trades[name]) for name in BROKERS]
    assert market_faults(books) == ()
    for name, one in zip(BROKERS, books, strict=True):
        for account in one.accounts:
            assert all((line.energy_wh < 0) == line.taken_back for line in account.lines)
            assert account.energy_wh == sum(
                trade.energy_wh for trade in trades[name] if (trade.flow, trade.party) == (account.flow, account.party)
            )
    provided, delivered = (sum(one.amount_micro(flow) for one in books) for flow in (Flow.PROVIDED, Flow.DELIVERED))
    assert delivered - provided == sum(
        one.amount_micro(Flow.SOLD, Flow.DELIVERED) - one.amount_micro(Flow.PROVIDED, Flow.BOUGHT) for one in books
    )


def test_a_credit_worked_through() -> None:
    """7 Wh at 101 are charged and 3 of them taken back: 707 and -303 nano, rounded down 0 and -1 µ. With the wind's
    100 µ they are 100.404, so 100 in all; the µ that is missing goes to the 707.
    """
    trades = [given_wh(7, 101), given_wh(-3, 101)._replace(taken_back=True), given_wh(1_000, 100, WIND)]
    account = account_of(Flow.DELIVERED, "home", trades)
    assert (account.energy_wh, account.amount_micro) == (1_004, 100)
    assert [(line.source, line.taken_back, line.energy_wh, line.amount_micro) for line in account.lines] == [
        (SOLAR, False, 7, 1),
        (SOLAR, True, -3, -1),
        (WIND, False, 1_000, 100),
    ]


# What does not balance is named


def two_brokers() -> tuple[Books, Books]:
    market = [("east", SOLAR, 1_000, 90_000, 1, [("home-1", 300, 5), ("west", 500, 9), ("home-2", 500, 1)])]
    trades = trades_of(market)
    return books_of("east", trades["east"]), books_of("west", trades["west"])


def test_brokers_that_say_different_things_are_named() -> None:
    east, west = two_brokers()
    assert market_faults([east, west]) == ()
    (account, *others) = west.accounts
    assert account.flow is Flow.BOUGHT
    line = account.lines[0]
    dearer: Line = replace(line, price=line.price + 1)
    changed = replace(west, accounts=(replace(account, lines=(dearer,)), *others))
    assert market_faults([east, changed]) == ("east and west do not say the same about what east sold to west",)
    forgotten = replace(west, accounts=tuple(others))
    assert any("east and west do not say the same" in fault for fault in market_faults([east, forgotten]))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"energy_wh": 1}, "the lines' Wh are not the total of 1"),
        ({"amount_micro": 1}, "the lines' amounts are not the total of 1"),
        ({"lines": ()}, "the lines' Wh are not the total"),
    ],
)
def test_an_account_that_does_not_add_up_is_named(change: dict[str, object], fault: str) -> None:
    east, _ = two_brokers()
    account = replace(east.accounts[0], **change)  # type: ignore[arg-type]
    assert any(fault in found for found in book_faults(replace(east, accounts=(account, *east.accounts[1:]))))


def test_energy_from_nowhere_is_named() -> None:
    books = books_of("east", [given_wh(10, 5)])
    assert book_faults(books) == ("east, solar: 10 Wh were passed on that were never bought",)
    east, _ = two_brokers()
    (line,) = east.own
    assert any(
        "bought and from stock" in fault for fault in book_faults(replace(east, own=(replace(line, kept_wh=1),)))
    )
    dearer = replace(line, bought_micro=line.bought_micro + 1)
    assert any("by account" in fault for fault in book_faults(replace(east, own=(dearer,))))
