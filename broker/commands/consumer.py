"""`energy-broker consumer`: consumers and their contracts."""

import argparse
import sys
import time
from typing import Any

from broker.commands.common import DONE, add_command, add_config_option, add_group
from broker.commands.consumer_contract import add_contract_options, contract_of, contract_sentence
from broker.config import load_broker_config, load_genesis, parse_public_key
from broker.market.contracts import Contract
from broker.protocol.command_line import whole_number


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
        add_contract_options(parser, from_required=parser is contract)
    add.add_argument(
        "--expect-wh-a-day",
        type=whole_number(0),
        default=10_000,
        metavar="WH",
        help="consumption to hold the contract against what was left over lately; default 10000",
    )
    add.add_argument("--hints", action="store_true", help="send it hints when its sources will be plentiful or short")
    hints = add_command(group, "hints", "Send a consumer hints of the next day, or stop doing so.", _consumer_hints)
    add_config_option(hints)
    hints.add_argument("--meter", required=True, metavar="NAME", help="the consumer's meter")
    hints.add_argument("--off", action="store_true", help="send none any more")
    add.add_argument("--key", required=True, metavar="KEY", help="the meter's public key (`meter-agent` signs with it)")


def _consumer_add(options: argparse.Namespace) -> int:
    from broker.service.outlook import DAYS, contract_outlook
    from broker.service.registration import add_consumer, wish_hints
    from broker.service.store import BrokerStore

    config = load_broker_config(options.config)
    genesis = load_genesis(config.ledger.genesis_file)
    contract = contract_of(options, genesis)
    store = BrokerStore(config.database)
    try:
        add_consumer(store, genesis, options.meter, parse_public_key(options.key), contract, int(time.time()))
        if options.hints:
            wish_hints(store, options.meter, wished=True)
        day_wh = options.expect_wh_a_day
        lines = contract_outlook(store, genesis, contract, day_wh, config.market.consumer_margin)
    finally:
        store.close()
    _print_contract(options.meter, contract)
    for line in lines:
        if line.served_wh < line.wanted_wh:
            print(
                f"warning: of {line.target.label}, {line.served_percent} % of what {day_wh} Wh a day need was left over"
                f" in the last {DAYS} days ({line.served_wh} of {line.wanted_wh} Wh), here and at neighbours",
                file=sys.stderr,
            )
    return DONE


def _consumer_contract(options: argparse.Namespace) -> int:
    from broker.service.registration import change_contract
    from broker.service.store import BrokerStore

    config = load_broker_config(options.config)
    genesis = load_genesis(config.ledger.genesis_file)
    contract = contract_of(options, genesis)
    store = BrokerStore(config.database)
    try:
        change_contract(store, genesis, options.meter, contract)
    finally:
        store.close()
    return _print_contract(options.meter, contract)


def _consumer_hints(options: argparse.Namespace) -> int:
    from broker.service.registration import wish_hints
    from broker.service.store import BrokerStore

    store = BrokerStore(load_broker_config(options.config).database)
    try:
        wish_hints(store, options.meter, wished=not options.off)
    finally:
        store.close()
    print(f"{options.meter}: {'no hints' if options.off else 'hints of each next day'}")
    return DONE


def _print_contract(meter: str, contract: Contract) -> int:
    print(f"{meter}: {contract_sentence(contract)}")
    return DONE
