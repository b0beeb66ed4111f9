"""`energy-broker run`, `check-config`, `submit` and `list`: a broker and its tables."""

import argparse
from pathlib import Path
from typing import Any

from broker.commands.common import DONE, add_command, add_config_option, print_csv, print_row, read_statement
from broker.config import load_broker_config, load_genesis
from broker.protocol.keys import load_private_key
from broker.protocol.messages import NamedKey
from broker.protocol.mqtt_link import check_files
from firmware_config.loader import ConfigError


def add_commands(commands: Any) -> None:
    """`run`, `check-config`, `submit` and `list`."""
    from broker.service.registration import TABLES

    run = add_command(commands, "run", "Run the broker until it is told to stop (SIGTERM).", _run)
    add_config_option(run)
    run.add_argument(
        "--recover",
        action="store_true",
        help="the database was restored from a backup: take back from the ledger what this broker did since",
    )
    parser = add_command(commands, "check-config", "Check a config file and everything it names.", _check_config)
    parser.add_argument("config", type=Path, metavar="FILE", help="the broker's config file (TOML)")
    submit = add_command(commands, "submit", "Put signed statements on the ledger when the broker runs.", _submit)
    add_config_option(submit)
    submit.add_argument("statements", type=Path, nargs="+", metavar="FILE", help="signed statements")
    listing = add_command(commands, "list", "List or export a table of the broker.", _list)
    add_config_option(listing)
    listing.add_argument("table", choices=TABLES, help="which table")
    form = listing.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object a line")
    form.add_argument("--csv", action="store_true", help="CSV with a header")


def _run(options: argparse.Namespace) -> int:
    from broker.service.run import run_broker

    return run_broker(load_broker_config(options.config), recovers=options.recover)


def _check_config(options: argparse.Namespace) -> int:
    config = load_broker_config(options.config)
    load_private_key(config.broker.key_file)
    genesis = load_genesis(config.ledger.genesis_file)
    network = config.ledger.cometbft
    speaks_for = {"host": config.ledger.host, "cometbft.gateway": None if network is None else network.gateway}
    for section, named in speaks_for.items():
        if named is None:
            continue
        key = load_private_key(named.key_file)
        if NamedKey(named.validator, key.public.cose_key) not in genesis.validators:
            raise ConfigError(options.config, f"ledger.{section}.validator", "a validator of the genesis, with its key")
    if config.broker.clock == "conductor" and not genesis.simulated:
        raise ConfigError(options.config, "broker.clock", "'system', since this ledger is not simulated")
    for key_name in ("password_file", "ca_file", "certificate_file", "key_file"):
        path: Path | None = getattr(config.mqtt, key_name)
        if path is not None and not path.is_file():
            raise ConfigError(options.config, f"mqtt.{key_name}", f"a file that is there, not {path}")
    check_files(config.mqtt)
    print(f"{options.config}: broker {config.broker.name} on ledger {genesis.ledger}: fine")
    return DONE


def _submit(options: argparse.Namespace) -> int:
    from broker.service.registration import add_statement
    from broker.service.store import BrokerStore

    config = load_broker_config(options.config)
    store = BrokerStore(config.database)
    try:
        for path in options.statements:
            print(f"{path}: {add_statement(store, read_statement(path)).name.lower()}, kept for the ledger")
    finally:
        store.close()
    return DONE


def _list(options: argparse.Namespace) -> int:
    from broker.service.registration import rows_of
    from broker.service.store import BrokerStore

    config = load_broker_config(options.config)
    store = BrokerStore(config.database)
    try:
        rows = rows_of(store, options.table)
        if options.csv:
            print_csv(rows)
        else:
            for row in rows:
                print_row(row, as_json=options.json)
    finally:
        store.close()
    return DONE
