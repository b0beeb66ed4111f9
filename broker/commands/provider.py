"""`energy-broker provider`: mandates of providers, and taking their devices on."""

import argparse
from pathlib import Path
from typing import Any

from broker.commands.common import (
    DONE,
    add_command,
    add_config_option,
    add_group,
    add_signing_options,
    ppm_of,
    read_statement,
    write_signed,
)
from broker.config import load_broker_config, load_genesis
from broker.market.terms import make_terms
from broker.protocol.command_line import time_s, whole_number
from broker.protocol.messages import EndOfMandate, Mandate


def add_commands(commands: Any) -> None:
    """The group `provider`."""
    group = add_group(commands, "provider", "Mandates of providers, and taking them on.")
    mandate = add_command(
        group, "mandate", "Sign a mandate: this broker may take what the device makes.", _provider_mandate
    )
    add_signing_options(mandate, "the owner")
    mandate.add_argument("--device", required=True, metavar="NAME", help="the device")
    mandate.add_argument("--broker", required=True, metavar="NAME", help="who may take its energy")
    mandate.add_argument(
        "--from", dest="from_s", type=time_s, required=True, metavar="TIME", help="an interval's beginning"
    )
    end = add_command(group, "end-mandate", "Sign the end of a mandate at a coming boundary.", _provider_end_mandate)
    add_signing_options(end, "the owner")
    end.add_argument("--device", required=True, metavar="NAME", help="the device")
    end.add_argument(
        "--at", dest="at_s", type=time_s, required=True, metavar="TIME", help="an interval's beginning, still to come"
    )
    add = add_command(group, "add", "Take devices under mandate from signed statements.", _provider_add)
    add_config_option(add)
    add.add_argument("--price", type=whole_number(0), required=True, metavar="PRICE", help="µ-currency per kWh")
    add.add_argument(
        "--reserve",
        default="0",
        metavar="PERCENT",
        help="this share is for consumers of this broker, not for neighbours",
    )
    add.add_argument("--exclusive", default="0", metavar="PERCENT", help="this share is only for --exclusive-for")
    add.add_argument(
        "--exclusive-for", action="append", default=[], metavar="METER", help="a consumer's meter, as often as needed"
    )
    add.add_argument(
        "statements", type=Path, nargs="+", metavar="FILE", help="registration, admissions and mandates, signed"
    )


def _provider_mandate(options: argparse.Namespace) -> int:
    return write_signed(options, Mandate(options.device, options.name, options.broker, options.from_s))


def _provider_end_mandate(options: argparse.Namespace) -> int:
    return write_signed(options, EndOfMandate(options.device, options.name, options.at_s))


def _provider_add(options: argparse.Namespace) -> int:
    from broker.service.registration import add_provider
    from broker.service.store import BrokerStore

    config = load_broker_config(options.config)
    terms = make_terms(
        options.price,
        reserve_ppm=ppm_of("--reserve", options.reserve),
        exclusive_ppm=ppm_of("--exclusive", options.exclusive),
        exclusive_for=options.exclusive_for,
    )
    store = BrokerStore(config.database)
    try:
        statements = [read_statement(path) for path in options.statements]
        genesis = load_genesis(config.ledger.genesis_file)
        devices = add_provider(store, genesis, config.broker.name, statements, terms)
    finally:
        store.close()
    print(f"taken on: {', '.join(devices)}")
    return DONE
