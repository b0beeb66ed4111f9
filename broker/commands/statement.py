"""`energy-broker statement`: what was traded with whom in a period, at what price, and what is owed for it."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from broker.commands.common import DONE, FAILED, add_command, add_config_option, print_csv, print_table
from broker.commands.period import add_period_options, period_of
from broker.config import load_broker_config, load_genesis
from broker.market.windows import Span
from broker.protocol.messages import Genesis
from firmware_config.loader import WrongValue

if TYPE_CHECKING:
    from broker.market.statements import Account, Books
    from broker.service.accounts import PartyStatement, Standing
    from broker.service.store import BrokerStore


def add_commands(commands: Any) -> None:
    """`statement`."""
    statement = add_command(
        commands,
        "statement",
        "Print a statement of account: energy, prices and amounts of a period. Takes and makes no payment.",
        _statement,
    )
    add_config_option(statement)
    whose = statement.add_mutually_exclusive_group(required=True)
    whose.add_argument("--consumer", metavar="METER", help="what a consumer got")
    whose.add_argument("--provider", metavar="NAME", help="what a provider's devices gave")
    whose.add_argument("--neighbour", metavar="NAME", help="what was bought from a neighbour and sold to it")
    whose.add_argument("--own", action="store_true", help="this broker's own account, with the totals of all others")
    add_period_options(statement)
    statement.add_argument(
        "--by",
        choices=("source", "interval"),
        default="source",
        help="source (default): a line for each source and price; interval: for each market interval, too",
    )
    statement.add_argument(
        "--check",
        type=Path,
        metavar="PATH",
        help="also compare with a ledger (its directory); exit 1 where they differ",
    )
    form = statement.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object")
    form.add_argument("--csv", action="store_true", help="CSV with a header, a row a line")


def _statement(options: argparse.Namespace) -> int:
    from broker.market.statements import Flow, book_faults
    from broker.service import accounts
    from broker.service.store import BrokerStore

    if options.own and options.by == "interval":
        raise WrongValue("--by", "source with --own; intervals are on each partner's statement")
    config = load_broker_config(options.config)
    genesis = load_genesis(config.ledger.genesis_file)
    span = _span(options, genesis)
    broker = config.broker.name
    party: str | None = options.consumer or options.provider or options.neighbour
    store = BrokerStore(config.database)
    try:
        faults: Sequence[str] = ()
        flows: tuple[Flow, ...] = tuple(Flow)
        if options.own:
            books, standing = accounts.own_books(store, genesis, broker, span)
            faults = book_faults(books)
            _print_own(options, books, _head(genesis, broker, None, span, standing))
        else:
            statement = _of_party(options, store, genesis, span)
            flows = tuple([account.flow for account in statement.accounts])
            _print_party(options, statement, _head(genesis, broker, party, span, statement.standing))
        if options.check is not None:
            faults = [*faults, *accounts.ledger_faults(store, genesis, broker, options.check, span, flows, party)]
    finally:
        store.close()
    for fault in faults:
        print(f"energy-broker: {fault}", file=sys.stderr)
    return FAILED if faults else DONE


def _of_party(options: argparse.Namespace, store: "BrokerStore", genesis: Genesis, span: Span) -> "PartyStatement":
    from broker.service import accounts

    if options.consumer is not None:
        return accounts.consumer_statement(store, genesis, options.consumer, span)
    if options.provider is not None:
        return accounts.provider_statement(store, genesis, options.provider, span)
    return accounts.neighbour_statement(store, genesis, options.neighbour, span)


def _span(options: argparse.Namespace, genesis: Genesis) -> Span:
    """The period that was asked for. Raises WrongValue unless it is made of whole market intervals."""
    span = period_of(options)
    if span.start_s >= span.end_s or span.start_s % genesis.interval_s or span.end_s % genesis.interval_s:
        raise WrongValue("--from", f"a period of whole market intervals of {genesis.interval_s} s, its end after it")
    return span


def _head(genesis: Genesis, broker: str, party: str | None, span: Span, standing: "Standing") -> dict[str, Any]:
    """What every form of a statement begins with."""
    return {
        "ledger": genesis.ledger,
        "currency": genesis.currency,
        "broker": broker,
        "party": party,
        "from_s": span.start_s,
        "until_s": span.end_s,
        "interval_s": genesis.interval_s,
        "height": standing.height,
        "complete": standing.closed_until_s >= span.end_s,
        "provisional": standing.closed_until_s < standing.provisional_until_s,
        "provisional_until_s": standing.provisional_until_s,
    }


def _print_party(options: argparse.Namespace, statement: "PartyStatement", head: dict[str, Any]) -> None:
    by_interval = options.by == "interval"
    broker = head["broker"]
    if options.json:
        record = dict(head)
        if statement.demanded_wh is not None:
            record |= {"demanded_wh": statement.demanded_wh, "unmatched_wh": statement.unmatched_wh}
        record["accounts"] = [
            {**_account_head(account, broker), "lines": list(_lines(account, by_interval=by_interval))}
            for account in statement.accounts
        ]
        print(json.dumps(record, separators=(",", ":")))
        return
    if options.csv:
        print_csv(
            {**_account_key(account, broker), "from_s": head["from_s"], "until_s": head["until_s"]}
            | {"currency": head["currency"], **line}
            for account in statement.accounts
            for line in _lines(account, by_interval=by_interval)
        )
        return
    _print_head(head)
    for account in statement.accounts:
        key = _account_key(account, broker)
        print(f"\n{key['payer']} owes {key['payee']} for energy {key['flow']}:")
        print_table([_readable(line) for line in _lines(account, by_interval=by_interval)])
        amount = f"{_decimal(account.amount_micro)} {head['currency']}"
        print(f"{account.energy_wh} Wh in {_interval_count(account)} intervals: {amount}")
    if statement.demanded_wh is not None:
        print(f"of {statement.demanded_wh} Wh demanded, {statement.unmatched_wh} unmatched, which cost nothing")


def _print_own(options: argparse.Namespace, books: "Books", head: dict[str, Any]) -> None:
    lines: list[dict[str, Any]] = [
        {
            "source": line.source.label,
            "bought_wh": line.bought_wh,
            "bought_micro": line.bought_micro,
            "from_stock_wh": line.from_stock_wh,
            "from_stock_micro": line.from_stock_micro,
            "passed_on_wh": line.passed_on_wh,
            "passed_on_micro": line.passed_on_micro,
            "kept_wh": line.kept_wh,
            "kept_micro": line.kept_micro,
            "margin_micro": line.margin_micro,
        }
        for line in books.own
    ]
    totals = {name: sum([line[name] for line in lines]) for name in (lines[0] if lines else {}) if name != "source"}
    partners = [
        {**_account_key(account, books.broker), "energy_wh": account.energy_wh, "amount_micro": account.amount_micro}
        for account in books.accounts
    ]
    if options.json:
        record = {**head, "own": lines, "totals": totals, "accounts": partners}
        del record["party"]
        print(json.dumps(record, separators=(",", ":")))
    elif options.csv:
        print_csv({"broker": books.broker, "currency": head["currency"], **line} for line in lines)
    else:
        _print_head(head)
        print()
        all_sources: list[dict[str, Any]] = [{"source": "all", **totals}] if lines else []
        print_table([_readable(line) for line in lines + all_sources])
        print()
        print_table([_readable(line) for line in partners])


def _account_key(account: "Account", broker: str) -> dict[str, Any]:
    payer, payee = (broker, account.party) if account.flow.into_broker else (account.party, broker)
    return {"flow": account.flow.name.lower(), "payer": payer, "payee": payee}


def _account_head(account: "Account", broker: str) -> dict[str, Any]:
    return {
        **_account_key(account, broker),
        "energy_wh": account.energy_wh,
        "amount_micro": account.amount_micro,
        "intervals": _interval_count(account),
    }


def _interval_count(account: "Account") -> int:
    return len({part.start_s for line in account.lines for part in line.intervals})


def _lines(account: "Account", *, by_interval: bool) -> Iterable[dict[str, Any]]:
    from broker.market.statements import Flow

    for line in account.lines:
        what = {"source": line.source.label} | ({"device": line.device} if account.flow is Flow.PROVIDED else {})
        what["kind"] = "taken back" if line.taken_back else "traded"
        if by_interval:
            for part in line.intervals:
                when = {"start_s": part.start_s, **what, "price": line.price}
                yield {**when, "energy_wh": part.energy_wh, "amount_micro": part.amount_micro}
        else:
            yield {**what, "price": line.price, "energy_wh": line.energy_wh, "amount_micro": line.amount_micro}


def _print_head(head: dict[str, Any]) -> None:
    whose = f"{head['broker']}'s own account" if head["party"] is None else f"{head['broker']} with {head['party']}"
    print(f"{whose}, {_time(head['from_s'])} to {_time(head['until_s'])}, in {head['currency']}")
    state = "" if head["complete"] else "; not all of its intervals are closed yet"
    until = f"provisional until {_time(head['provisional_until_s'])}" if head["provisional"] else "final"
    print(f"ledger {head['ledger']} at height {head['height']}; {until}{state}")


def _readable(line: dict[str, Any]) -> dict[str, Any]:
    """µ as decimals of the currency: amounts, and prices per kWh."""
    return {
        name.removesuffix("_micro"): _decimal(value) if name == "price" or name.endswith("_micro") else value
        for name, value in line.items()
    }


def _decimal(micro: int) -> str:
    whole, rest = divmod(abs(micro), 1_000_000)
    return f"{'-' if micro < 0 else ''}{whole}.{rest:06}"


def _time(time_s: int) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%dT%H:%MZ")
