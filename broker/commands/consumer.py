"""`energy-broker consumer`: consumers and their contracts."""

import argparse
import time
from decimal import Decimal, InvalidOperation
from typing import Any

from broker.commands.common import DONE, add_command, add_config_option, add_group, time_of
from broker.config import load_broker_config, load_genesis, parse_public_key
from broker.market.contracts import Contract, ShortageChoice, make_contract
from broker.protocol.messages import Genesis
from broker.protocol.sources import SourceGroup
from firmware_config.loader import WrongValue


def add_commands(commands: Any) -> None:
    """The group `consumer`."""
    group = add_group(commands, "consumer", "Consumers and their contracts.")
    add = add_command(group, "add", "Register a consumer's meter with its contract.", _consumer_add)
    contract = add_command(
        group, "contract", "Give a consumer a new contract from a coming time on.", _consumer_contract
    )
    for parser in (add, contract):
        add_config_option(parser)
        parser.add_argument("--meter", required=True, metavar="NAME", help="the consumer's meter")
        parser.add_argument(
            "--line",
            action="append",
            default=[],
            metavar="SOURCE=PERCENT",
            help="a source or one of " + ", ".join(group.label for group in SourceGroup) + "; what is left open is any",
        )
        parser.add_argument(
            "--shortage",
            default="unmatched",
            metavar="CHOICE",
            help="unmatched (default), any, or substitutes:SOURCE,SOURCE,…",
        )
        parser.add_argument("--area", metavar="NAME", help="default: the ledger's first area")
        parser.add_argument(
            "--from",
            dest="from_time",
            required=parser is contract,
            metavar="TIME",
            help="valid from then on, for example 2026-01-31T00:00:00Z",
        )
    add.add_argument("--key", required=True, metavar="KEY", help="the meter's public key (`meter-agent` signs with it)")


def _consumer_add(options: argparse.Namespace) -> int:
    from broker.service.registration import add_consumer
    from broker.service.store import BrokerStore

    config = load_broker_config(options.config)
    genesis = load_genesis(config.ledger.genesis_file)
    contract = _contract(options, genesis)
    store = BrokerStore(config.database)
    try:
        add_consumer(store, genesis, options.meter, parse_public_key(options.key), contract, int(time.time()))
    finally:
        store.close()
    return _print_contract(options.meter, contract)


def _consumer_contract(options: argparse.Namespace) -> int:
    from broker.service.registration import change_contract
    from broker.service.store import BrokerStore

    config = load_broker_config(options.config)
    genesis = load_genesis(config.ledger.genesis_file)
    contract = _contract(options, genesis)
    store = BrokerStore(config.database)
    try:
        change_contract(store, genesis, options.meter, contract)
    finally:
        store.close()
    return _print_contract(options.meter, contract)


def _print_contract(meter: str, contract: Contract) -> int:
    lines = ", ".join(f"{line.target.label} {line.share_ppm / 10_000:g} %" for line in contract.lines)
    print(f"{meter}: {lines}; when short: {contract.shortage.label}")
    return DONE


def _contract(options: argparse.Namespace, genesis: Genesis) -> Contract:
    shares = [_share(text) for text in options.line]
    choice, _, names = options.shortage.partition(":")
    try:
        shortage = ShortageChoice[choice.upper()]
    except KeyError:
        raise WrongValue("--shortage", "unmatched, any or substitutes:SOURCE,…") from None
    valid_from_s = time_of(options.from_time) if options.from_time is not None else 0
    substitutes = [name for name in names.split(",") if name]
    return make_contract(valid_from_s, shares, shortage, area=options.area or genesis.areas[0], substitutes=substitutes)


def _share(text: str) -> tuple[str, int]:
    """`solar=40` or `solar=33.3333` as (`solar`, ppm); exact, because a percentage has at most four decimals."""
    name, _, percent = text.partition("=")
    try:
        ppm = Decimal(percent) * 10_000
    except InvalidOperation:
        raise WrongValue("--line", f"SOURCE=PERCENT, got {text!r}") from None
    if not ppm.is_finite() or ppm != ppm.to_integral_value():
        raise WrongValue("--line", f"a percentage with at most four decimals, got {text!r}")
    return name, int(ppm)
