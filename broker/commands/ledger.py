"""`energy-broker ledger`: found a ledger, and look into one."""

import argparse
import json
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from broker.commands import copies, ledger_audit, ledger_compare, ledger_network, ledger_proofs, ledger_verify, privacy
from broker.commands.common import DONE, WrongUse, add_command, add_group, named_key, plain, print_row
from broker.config import load_genesis
from broker.protocol.command_line import whole_number
from broker.protocol.errors import MalformedMessage
from broker.protocol.market_time import MarketCalendar
from broker.protocol.messages import Genesis
from firmware_config.loader import WrongValue


def add_commands(commands: Any) -> None:
    """The group `ledger`, to which other modules add more."""
    group = add_group(commands, "ledger", "Found a ledger, and look into one.")
    genesis = add_command(group, "genesis", "Write the genesis file that a ledger is founded on.", _ledger_genesis)
    genesis.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write it")
    genesis.add_argument("--ledger", required=True, metavar="ID", help="the ledger's name")
    genesis.add_argument(
        "--interval-s", type=whole_number(1), default=1800, help="market interval: 900, 1800 (default) or 3600"
    )
    genesis.add_argument("--gate-1-s", type=whole_number(0), default=600, help="gate 1, after the end of an interval")
    genesis.add_argument("--gate-2-s", type=whole_number(0), default=1200, help="gate 2, after the end of an interval")
    genesis.add_argument(
        "--correction-deadline-s",
        type=whole_number(0),
        default=90 * 86_400,
        help="until when readings can be corrected; default: 90 days",
    )
    genesis.add_argument("--currency", default="EUR", help="of all prices; default: EUR")
    genesis.add_argument(
        "--area",
        action="append",
        required=True,
        metavar="NAME",
        help="market area; may be repeated, a broker clears the first",
    )
    genesis.add_argument(
        "--registrar", action="append", required=True, metavar="NAME=KEY", help="admits parties; may be repeated"
    )
    genesis.add_argument("--validator", action="append", required=True, metavar="NAME=KEY", help="signs the blocks")
    genesis.add_argument(
        "--conductor", metavar="NAME=KEY", help="makes it a simulated ledger whose time this one ticks"
    )
    trust = add_command(
        group, "trust", "Print a ledger's trust file: its id, and the public keys of those to believe.", _ledger_trust
    )
    source = trust.add_mutually_exclusive_group(required=True)
    source.add_argument("--genesis", type=Path, metavar="FILE", help="the ledger's genesis file")
    source.add_argument(
        "--path",
        type=Path,
        metavar="DIR",
        help="the ledger's directory: names its validators as of now; run `ledger verify` on it before",
    )
    ledger_verify.add_commands(group)
    ledger_compare.add_commands(group)
    show = add_command(group, "show", "Print what stands on a ledger.", _ledger_show)
    show.add_argument("path", type=Path, metavar="PATH", help="the ledger's directory")
    show.add_argument(
        "what",
        choices=(
            "head",
            "blocks",
            "operations",
            "assets",
            "demands",
            "deliveries",
            "orders",
            "corrections",
            "carried",
            "keys",
            "validators",
        ),
        help="head is the last block with its hashes",
    )
    show.add_argument("--json", action="store_true", help="one JSON object a line")
    ledger_audit.add_commands(group)
    copies.add_ledger_commands(group)
    privacy.add_ledger_commands(group)
    ledger_proofs.add_commands(group)
    ledger_network.add_commands(group)


def _ledger_genesis(options: argparse.Namespace) -> int:
    try:
        MarketCalendar(options.interval_s, options.gate_1_s, options.gate_2_s)
    except ValueError as error:
        raise WrongUse(f"--interval-s and gates: {error}") from error
    genesis = Genesis(
        options.ledger,
        options.interval_s,
        options.gate_1_s,
        options.gate_2_s,
        options.correction_deadline_s,
        options.currency,
        tuple(options.area),
        tuple(named_key(text) for text in options.registrar),
        tuple(named_key(text) for text in options.validator),
        options.conductor is not None,
        named_key(options.conductor) if options.conductor is not None else None,
    )
    raw = genesis.to_bytes()
    try:
        Genesis.from_bytes(raw)
    except MalformedMessage as error:
        raise WrongValue(error.where, error.expected) from error
    options.out.write_bytes(raw)
    return DONE


def _ledger_trust(options: argparse.Namespace) -> int:
    from broker.ledger.inspect import trust_now
    from broker.ledger.trust import trust_of

    trust = trust_of(load_genesis(options.genesis)) if options.path is None else trust_now(options.path)
    print(json.dumps(trust, indent=2, sort_keys=True))
    return DONE


def _ledger_show(options: argparse.Namespace) -> int:
    from broker.ledger import inspect

    views: dict[str, Callable[[Path], Iterable[Any]]] = {
        "head": lambda path: deque(inspect.blocks(path), maxlen=1),
        "blocks": inspect.blocks,
        "operations": inspect.operations,
        "assets": inspect.assets,
        "demands": inspect.demands,
        "deliveries": inspect.deliveries,
        "orders": inspect.order_transfers,
        "corrections": inspect.metered,
        "carried": inspect.carried,
        "keys": inspect.keys,
        "validators": inspect.validators,
    }
    for row in views[options.what](options.path):
        print_row(plain(row), as_json=options.json)
    return DONE
