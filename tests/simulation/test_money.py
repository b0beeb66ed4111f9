"""Statements of account of simulated markets: every party's, to the µ, with margins, and as the ledger has them."""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.ledger_world import key

from broker import cli
from broker.ledger.inspect import operations
from broker.ledger.operations import Transfer
from broker.market.statements import Books, Flow, book_faults, market_faults
from broker.market.windows import Span
from broker.protocol.envelope import parse
from broker.protocol.messages import Order
from broker.service.accounts import (
    AccountsError,
    Standing,
    consumer_statement,
    ledger_faults,
    neighbour_statement,
    own_books,
    provider_statement,
)
from broker.service.store import BrokerStore, DeliveryRow, TransferRow
from simulation import audit
from simulation.plans import PAIR, TRIO
from simulation.world import INTERVAL_S, T0, Plan, World

WHOLE = Span(T0, T0 + 4 * INTERVAL_S)
FIRST = Span(T0, T0 + INTERVAL_S)


def run(plan: Plan, folder: Path, *, consumer_margin: int = 0, neighbour_margin: int = 0, **options: Any) -> World:
    world = World(plan, folder, **options)
    for process in world.brokers.values():
        market = replace(process.config.market, consumer_margin=consumer_margin, neighbour_margin=neighbour_margin)
        process.config = replace(process.config, market=market)
    world.run()
    return world


def in_store(world: World, broker: str, what: Callable[[BrokerStore], Any]) -> Any:
    store = BrokerStore(world.brokers[broker].config.database)
    try:
        return what(store)
    finally:
        store.close()


def books_of(world: World, span: Span = WHOLE) -> dict[str, Books]:
    return {
        name: in_store(world, name, lambda store, name=name: own_books(store, world.genesis, name, span)[0])
        for name in world.brokers
    }


@pytest.mark.parametrize("plan", [PAIR, TRIO], ids=["pair", "trio"])
def test_what_consumers_pay_is_to_the_micro_what_providers_get_and_brokers_keep(plan: Plan, folder: Path) -> None:
    world = run(plan, folder, consumer_margin=1_237, neighbour_margin=411, seed=3)
    books = books_of(world)
    assert market_faults(books.values()) == ()
    paid = sum(one.amount_micro(Flow.DELIVERED) for one in books.values())
    received = sum(one.amount_micro(Flow.PROVIDED) for one in books.values())
    kept = sum(
        one.amount_micro(Flow.DELIVERED, Flow.SOLD) - one.amount_micro(Flow.PROVIDED, Flow.BOUGHT)
        for one in books.values()
    )
    assert paid > 0
    assert paid == received + kept
    margins = sum(line.margin_micro for one in books.values() for line in one.own)
    left = sum(line.kept_micro for one in books.values() for line in one.own)
    assert paid == received + margins - left
    assert sum(one.energy_wh(Flow.SOLD) for one in books.values()) > 0


def test_every_partys_statement_is_the_account_in_the_brokers_books(folder: Path) -> None:
    world = run(PAIR, folder, consumer_margin=1_237, neighbour_margin=411)
    makers = {
        Flow.DELIVERED: consumer_statement,
        Flow.PROVIDED: provider_statement,
        Flow.BOUGHT: neighbour_statement,
        Flow.SOLD: neighbour_statement,
    }
    for name, books in books_of(world).items():
        for account in books.accounts:
            statement = in_store(
                world, name, lambda store, a=account: makers[a.flow](store, world.genesis, a.party, WHOLE)
            )
            (found,) = [one for one in statement.accounts if one.flow is account.flow]
            assert (found.energy_wh, found.amount_micro) == (account.energy_wh, account.amount_micro)
            assert [(line.source, line.price, line.amount_micro) for line in found.lines] == [
                (line.source, line.price, line.amount_micro) for line in account.lines
            ]


def test_margins_are_on_each_transfer_and_delivery_and_no_order_is_sold_above_its_limit(folder: Path) -> None:
    world = run(PAIR, folder, consumer_margin=1_000, neighbour_margin=50)
    cost = {plan.device: 100 + plan.source for plan in PAIR.devices}
    between = 0
    for _, operation in operations(folder / "ledger"):
        if isinstance(operation, Transfer) and operation.order is None:
            assert operation.price == cost[operation.asset.device]
        elif isinstance(operation, Transfer) and operation.order is not None:
            between += 1
            assert operation.price == cost[operation.asset.device] + 50
            assert operation.price <= Order.from_payload(parse(operation.order).payload).highest_price
    assert between
    for name in world.brokers:
        for row in in_store(world, name, lambda store: list(store.all_deliveries())):
            assert row.price == cost[row.device] + 1_000 + (50 if row.through else 0)


def test_bought_energy_has_the_same_price_after_restarts(folder: Path) -> None:
    undisturbed = books_of(run(PAIR, folder / "calm", neighbour_margin=50))
    assert books_of(run(PAIR, folder / "killed", neighbour_margin=50, kills=6, disconnects=3, seed=11)) == undisturbed


def test_what_is_withdrawn_is_credited_by_everyone_that_it_went_through(folder: Path) -> None:
    """West bought 300 Wh of the mill's 900 for ben. Hours later the meter says that there were 100 in all."""
    world = World(PAIR, folder)
    late_s = T0 + 3 * INTERVAL_S
    world.send("mill", world.meter_value("mill", T0, 100, revision=1), late_s)
    ran = world.run(late_s - INTERVAL_S)
    before = books_of(world, FIRST)
    ran = world.run(T0 + 7 * INTERVAL_S)
    audit.check(world, ran)
    after = books_of(world, FIRST)

    def lines(books: dict[str, Books], broker: str, flow: Flow, party: str, source: str) -> list[tuple[int, bool]]:
        (account,) = [one for one in books[broker].accounts if (one.flow, one.party) == (flow, party)]
        return [(line.energy_wh, line.taken_back) for line in account.lines if line.source.label == source]

    provided = lines(before, "east", Flow.PROVIDED, "ola", "wind")
    assert provided == [(900, False)]
    assert lines(after, "east", Flow.PROVIDED, "ola", "wind") == [(900, False), (-800, True)]
    sold = lines(before, "east", Flow.SOLD, "west", "wind")
    assert lines(after, "east", Flow.SOLD, "west", "wind") == [*sold, (-sum(wh for wh, _ in sold), True)]
    assert lines(after, "west", Flow.BOUGHT, "east", "wind") == lines(after, "east", Flow.SOLD, "west", "wind")
    ben = lines(after, "west", Flow.DELIVERED, "ben", "wind")
    assert sum(energy_wh for energy_wh, _ in ben) == 0
    assert [taken_back for _, taken_back in ben] == [False, True]


def test_a_withdrawal_that_is_credited_otherwise_than_the_ledger_has_it_is_named(folder: Path) -> None:
    world = World(PAIR, folder)
    world.send("mill", world.meter_value("mill", T0, 200, revision=1), T0 + 3 * INTERVAL_S)
    world.run(T0 + 7 * INTERVAL_S)

    def faults() -> tuple[str, ...]:
        return in_store(
            world, "west", lambda store: ledger_faults(store, world.genesis, "west", folder / "ledger", WHOLE)
        )

    assert faults() == ()
    (gone,) = in_store(world, "west", lambda store: store.withdrawn("mill", T0))
    assert gone == (0, 200, 900)
    in_store(world, "west", lambda store: store.add_withdrawn("mill", T0, [(0, 201, 900)]))
    assert faults() == (f"withdrawn of mill at {T0}, revision 0: 700 Wh on the ledger, 699 in the database",)
    in_store(world, "west", lambda store: store.add_withdrawn("mill", T0, [(0, 199, 900)]))
    assert faults() == (f"withdrawn of mill at {T0}, revision 0: 700 Wh on the ledger, 701 in the database",)


def test_what_costs_more_than_an_orders_limit_is_not_sold(folder: Path) -> None:
    """A margin puts all of east's wind above what west pays."""
    world = run(PAIR, folder, neighbour_margin=1_000_000)
    books = books_of(world)
    assert books["east"].amount_micro(Flow.SOLD) == 0
    (row, *_) = in_store(world, "west", lambda store: list(store.all_orders_out()))
    assert row.state == "refused"


def test_the_parts_of_a_period_add_up_to_the_whole(folder: Path) -> None:
    world = run(PAIR, folder, consumer_margin=7)
    parts = [Span(T0 + at * INTERVAL_S, T0 + (at + 1) * INTERVAL_S) for at in range(4)]

    def amount(span: Span) -> int:
        statement = in_store(world, "east", lambda store: consumer_statement(store, world.genesis, "anna", span))
        assert statement.unmatched_wh == statement.demanded_wh - statement.accounts[0].energy_wh
        return int(statement.accounts[0].amount_micro)

    assert abs(sum(map(amount, parts)) - amount(WHOLE)) <= len(parts)


def test_the_database_and_the_ledger_say_the_same_until_one_is_changed(folder: Path) -> None:
    world = run(PAIR, folder, neighbour_margin=50)

    def faults(broker: str, **options: Any) -> tuple[str, ...]:
        return tuple(
            in_store(
                world,
                broker,
                lambda store: ledger_faults(store, world.genesis, broker, folder / "ledger", WHOLE, **options),
            )
        )

    assert faults("east") == faults("west") == ()
    store = BrokerStore(world.brokers["west"].config.database)
    store._db.execute("UPDATE transfer SET price = price + 1 WHERE number = (SELECT max(number) FROM transfer)")
    store._db.execute("DELETE FROM delivery WHERE meter = 'ben' AND sequence = 0 AND start_s = ?", (T0,))
    store.close()
    found = faults("west")
    assert [fault.split(":")[0] for fault in found] == ["not on the ledger", *["not in the database"] * 2]
    assert sum("µ/kWh" in fault for fault in found) == 2
    assert sum("delivered for" in fault for fault in found) == 1
    assert len(faults("west", flows=(Flow.DELIVERED,), party="ben")) == 1
    assert faults("west", flows=(Flow.DELIVERED,), party="cleo") == ()
    assert faults("east") == ()
    store = BrokerStore(world.brokers["east"].config.database)
    cursor = store.ledger_cursor()
    assert cursor is not None
    # A copy that ends too early is named, and what comes after the broker's own height does not count.
    store.set_ledger_cursor(cursor[0] + 1, cursor[1])
    (fault,) = faults("east")
    assert f"ends at height {cursor[0]}" in fault
    store.set_ledger_cursor(1, cursor[1])
    assert faults("east")
    assert all(fault.startswith("not on the ledger") for fault in faults("east"))
    store.close()
    other = replace(world.genesis, currency="JPY")
    (fault,) = in_store(world, "east", lambda s: ledger_faults(s, other, "east", folder / "ledger", WHOLE))
    assert "another genesis" in fault


def test_a_statement_is_final_when_neither_corrections_nor_windows_can_change_it(folder: Path) -> None:
    world = run(PAIR, folder)
    genesis = replace(world.genesis, correction_deadline_s=3_600)
    january, february = Span(T0, T0 + 2 * INTERVAL_S), Span(T0 + 2 * INTERVAL_S, T0 + 3 * INTERVAL_S)

    def standing(span: Span) -> Standing:
        return in_store(world, "east", lambda store: consumer_statement(store, genesis, "anna", span)).standing

    assert standing(january).closed_until_s == T0 + 5 * INTERVAL_S
    assert standing(january).provisional_until_s == january.end_s + 3_600
    # A window of a month is open to its last day.
    assert standing(february).provisional_until_s == february.start_s + 28 * 86_400


def test_energy_that_never_came_here_cannot_be_in_the_books(folder: Path) -> None:
    world = run(PAIR, folder)
    store = BrokerStore(world.brokers["west"].config.database)
    store._db.execute("DELETE FROM transfer WHERE device = 'dam'")
    with pytest.raises(AccountsError, match="never came here"):
        own_books(store, world.genesis, "west", WHOLE)
    store.close()


def test_only_what_the_ledger_has_committed_is_on_a_statement(folder: Path) -> None:
    world = run(PAIR, folder)
    store = BrokerStore(world.brokers["east"].config.database)
    before = consumer_statement(store, world.genesis, "anna", WHOLE)
    store._db.execute("INSERT INTO batch VALUES (9999, x'00', 2, ?, x'', 0, NULL, NULL)", (T0,))
    store.add_deliveries([DeliveryRow(T0, "anna", 999, 0, 1, "roof", T0, 0, 0, 50, 101, None, 9999)])
    assert consumer_statement(store, world.genesis, "anna", WHOLE) == before
    store.close()


# The command


@pytest.fixture
def said(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    run(PAIR, folder, consumer_margin=1_000)
    config = folder / "east.toml"
    west = key("west").public.cose_key.hex()
    config.write_text(
        '[broker]\nname = "east"\nkey_file = "east/key.pem"\ndata_dir = "east"\n'
        '[ledger]\ngenesis_file = "genesis.cbor"\n'
        f'[[neighbours]]\nname = "west"\nkey = "{west}"\n'
    )

    def command(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["statement", "--config", str(config), *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


SPAN = ("--from", "2026-01-31T23:00:00Z", "--to", "2026-02-01T01:00:00Z")


def test_a_statement_has_what_an_invoice_needs(said: Callable[..., tuple[int, str, str]], folder: Path) -> None:
    code, out, err = said("--consumer", "anna", *SPAN, "--json", "--check", str(folder / "ledger"))
    assert (code, err) == (0, "")
    record = json.loads(out)
    (account,) = record.pop("accounts")
    assert (account["payer"], account["payee"], account["flow"]) == ("anna", "east", "delivered")
    assert account["amount_micro"] == sum(line["amount_micro"] for line in account["lines"])
    assert account["energy_wh"] == sum(line["energy_wh"] for line in account["lines"])
    assert account["intervals"] == 4
    assert {line["source"]: line["price"] for line in account["lines"]}["solar"] == 1_101
    assert record["height"] > 0
    assert [record[name] for name in ("ledger", "currency", "broker", "party")] == ["sim-ledger", "EUR", "east", "anna"]
    assert [record[name] for name in ("from_s", "until_s", "interval_s")] == [T0, T0 + 4 * INTERVAL_S, INTERVAL_S]
    assert record["demanded_wh"] == 1_450 == account["energy_wh"] + record["unmatched_wh"]
    assert (record["complete"], record["provisional"]) == (True, True)
    assert record["provisional_until_s"] == record["until_s"] + 90 * 86_400


def test_intervals_add_up_to_the_lines(said: Callable[..., tuple[int, str, str]]) -> None:
    by_source = list(csv.DictReader(io.StringIO(said("--provider", "ola", *SPAN, "--csv")[1])))
    by_interval = list(csv.DictReader(io.StringIO(said("--provider", "ola", *SPAN, "--csv", "--by", "interval")[1])))
    assert {row["device"] for row in by_source} == {"roof", "mill"}
    sums: Counter[str] = Counter()
    for row in by_interval:
        sums[row["device"]] += int(row["amount_micro"])
    assert sums == {row["device"]: int(row["amount_micro"]) for row in by_source}


def test_tables_are_for_people(said: Callable[..., tuple[int, str, str]]) -> None:
    _, out, _ = said("--neighbour", "west", *SPAN)
    assert out.startswith(
        "east with west, 2026-01-31T23:00Z to 2026-02-01T01:00Z, in EUR\nledger sim-ledger at height "
    )
    assert "west owes east for energy sold:\nsource" in out
    assert "provisional until 2026-05-02T01:00Z" in out
    code, out, err = said("--own", *SPAN)
    assert (code, err) == (0, "")
    assert "east's own account" in out
    assert out.splitlines()[3].split()[0] == "source"
    _, out, _ = said("--own", "--month", "2026-01", "--json")
    record = json.loads(out)
    assert sum(line["bought_wh"] for line in record["own"]) == 2_300 == record["totals"]["bought_wh"]
    assert record["complete"] is False or record["until_s"] == T0 + 2 * INTERVAL_S


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("--consumer", "nobody", *SPAN), 1, "no consumer nobody"),
        (("--provider", "nobody", *SPAN), 1, "no device of nobody"),
        (("--own", "--month", "2026-13"), 2, "for example 2026-01"),
        (("--own", "--day", "yesterday"), 2, "for example 2026-01-31"),
        (("--own", "--from", "2026-01-31T23:00:00Z"), 2, "or --from and --to"),
        (("--own", "--day", "2026-01-31", "--to", "2026-01-31T23:00:00Z"), 2, "or --from and --to"),
        (("--own", "--from", "2026-01-31T23:10:00Z", "--to", "2026-02-01T01:00:00Z"), 2, "whole market intervals"),
        (("--own", "--day", "2026-01-31", "--by", "interval"), 2, "each partner's statement"),
        (("--own", *SPAN, "--check", "nowhere"), 1, "holds no"),
    ],
)
def test_what_is_wrong_is_a_sentence(
    said: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...], code: int, sentence: str
) -> None:
    ended, _, err = said(*arguments)
    assert ended == code
    assert sentence in err


def test_a_difference_from_the_ledger_ends_with_exit_code_1(
    said: Callable[..., tuple[int, str, str]], folder: Path
) -> None:
    store = BrokerStore(folder / "east" / "broker.db")
    store.add_transfers([TransferRow(Flow.PROVIDED, "ola", "mill", T0, 1, 900, 910, 3, 103)])
    assert book_faults(own_books(store, World(PAIR, folder / "other").genesis, "east", WHOLE)[0]) == ()
    store.close()
    code, _, err = said("--provider", "ola", *SPAN, "--check", str(folder / "ledger"))
    assert code == 1
    assert "not on the ledger: provided ola, mill" in err
