"""The command `energy-broker`: run a broker, register whom it serves, and look into ledgers.

Exit codes: 0 done, 1 it could not be done, 2 wrong usage, config or input; the reason is one line on stderr.
"""

import argparse
import csv
import json
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from enum import IntEnum
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from broker.config import load_broker_config, load_genesis, parse_public_key
from broker.ledger.operations import Operation
from broker.market.contracts import Contract, ContractError, ShortageChoice, make_contract
from broker.protocol.envelope import seal
from broker.protocol.errors import KeyFileError, MalformedMessage, ProtocolError
from broker.protocol.keys import Algorithm, generate_private_key, load_private_key, save_private_key
from broker.protocol.market_time import MarketCalendar
from broker.protocol.messages import (
    Admission,
    Carrier,
    EndOfMandate,
    Genesis,
    Mandate,
    Message,
    NamedKey,
    Registration,
    Role,
)
from broker.protocol.sources import Source, SourceGroup, source_from_label
from firmware_config.loader import ConfigError, WrongValue

DONE: Final = 0
FAILED: Final = 1
USAGE: Final = 2

Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    # Imported here, because these bring in SQLite, which a plain --help does not need.
    from broker.ledger.store import LedgerError
    from broker.service.registration import RegistrationError
    from broker.service.store import StoreError

    command: Command = options.command
    try:
        return command(options)
    except BrokenPipeError:
        return DONE  # Whoever read our output, `head` for one, has seen enough.
    except FileNotFoundError as error:
        return _say(USAGE, f"{error.filename}: there is no such file; check the path")
    except (ConfigError, WrongValue, ContractError, RegistrationError, KeyFileError) as error:
        return _say(USAGE, error)
    except (ProtocolError, StoreError, LedgerError, OSError) as error:
        return _say(FAILED, error)


def _say(code: int, what: object) -> int:
    print(f"energy-broker: {what}", file=sys.stderr)
    return code


# Parsers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="energy-broker",
        description="A lightweight energy broker: resolves demands against a ledger of energy assets.",
        epilog="Exit codes: 0 done, 1 it could not be done, 2 wrong usage, config or input. See docs/broker.md.",
    )
    parser.add_argument("--version", action="version", version=f"energy-broker {version('dengen')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    _add_key(commands)
    _add_ledger(commands)
    _add_registrar(commands)
    _add_provider(commands)
    _add_consumer(commands)
    _add_listing(commands)
    return parser


def _add(commands: Any, name: str, text: str, command: Command) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=command)
    return parser


def _group(commands: Any, name: str, text: str) -> Any:
    return commands.add_parser(name, help=text, description=text).add_subparsers(required=True, metavar="COMMAND")


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the broker's config file (TOML)")


def _add_run(commands: Any) -> None:
    _add_config(_add(commands, "run", "Run the broker until it is told to stop (SIGTERM).", _run))
    parser = _add(commands, "check-config", "Check a config file and everything it names.", _check_config)
    parser.add_argument("config", type=Path, metavar="FILE", help="the broker's config file (TOML)")


def _add_key(commands: Any) -> None:
    group = _group(commands, "key", "Make and show signing keys.")
    new = _add(group, "new", "Make a private key, readable by you only, and print its public key.", _key_new)
    new.add_argument("file", type=Path, metavar="FILE", help="where to write it; an existing file is never overwritten")
    new.add_argument("--algorithm", choices=("ed25519", "p256"), default="ed25519", help="default: ed25519")
    show = _add(group, "show", "Print the public key (COSE_Key in hex) of a private key file.", _key_show)
    show.add_argument("file", type=Path, metavar="FILE", help="a private key file")


def _add_ledger(commands: Any) -> None:
    group = _group(commands, "ledger", "Found a ledger, and look into one.")
    genesis = _add(group, "genesis", "Write the genesis file that a ledger is founded on.", _ledger_genesis)
    genesis.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write it")
    genesis.add_argument("--ledger", required=True, metavar="ID", help="the ledger's name")
    genesis.add_argument("--interval-s", type=int, default=1800, help="market interval: 900, 1800 (default) or 3600")
    genesis.add_argument("--gate-1-s", type=int, default=600, help="gate 1, after the end of an interval")
    genesis.add_argument("--gate-2-s", type=int, default=1200, help="gate 2, after the end of an interval")
    genesis.add_argument(
        "--correction-deadline-s",
        type=int,
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
    trust = _add(group, "trust", "Print the trust file (ledger id and public keys) of a genesis file.", _ledger_trust)
    trust.add_argument("--genesis", type=Path, required=True, metavar="FILE", help="the ledger's genesis file")
    verify = _add(
        group, "verify", "Check a ledger from its first block: exit 0 only if all of it holds.", _ledger_verify
    )
    verify.add_argument("path", type=Path, metavar="PATH", help="the ledger's directory")
    show = _add(group, "show", "Print what stands on a ledger.", _ledger_show)
    show.add_argument("path", type=Path, metavar="PATH", help="the ledger's directory")
    show.add_argument(
        "what",
        choices=("head", "blocks", "operations", "assets", "demands", "deliveries", "orders"),
        help="head is the last block with its hashes",
    )
    show.add_argument("--json", action="store_true", help="one JSON object a line")
    audit = _add(group, "audit", "Print the books of a ledger: per source and interval, as CSV.", _ledger_audit)
    audit.add_argument("path", type=Path, metavar="PATH", help="the ledger's directory")


def _add_registrar(commands: Any) -> None:
    group = _group(commands, "registrar", "Sign who and what is admitted to a ledger.")
    register = _add(group, "register", "Sign the registration of a broker or provider.", _registrar_register)
    _add_signing(register, "the registrar")
    register.add_argument("--party", required=True, metavar="NAME", help="who is registered")
    register.add_argument("--role", required=True, choices=("broker", "provider"), help="what it may do")
    register.add_argument("--party-key", required=True, metavar="KEY", help="its public key, as `key show` prints it")
    admit = _add(group, "admit", "Sign the admission of a generating device.", _registrar_admit)
    _add_signing(admit, "the registrar")
    admit.add_argument("--device", required=True, metavar="NAME", help="also the name of its meter")
    admit.add_argument("--owner", required=True, metavar="NAME", help="the provider that it belongs to")
    admit.add_argument("--meter-key", required=True, metavar="KEY", help="the public key of its meter")
    admit.add_argument("--source", required=True, metavar="SOURCE", help=", ".join(source.label for source in Source))
    admit.add_argument("--capacity-w", required=True, type=int, metavar="W", help="what it can make at most")
    admit.add_argument("--area", required=True, metavar="NAME", help="the market area that it feeds")
    admit.add_argument("--place", default="", metavar="TEXT", help="where it stands; public, so coarse for a household")
    admit.add_argument(
        "--commissioned", required=True, metavar="TIME", help="since when it runs, for example 2020-01-31T00:00:00Z"
    )


def _add_signing(parser: argparse.ArgumentParser, who: str) -> None:
    parser.add_argument("--genesis", type=Path, required=True, metavar="FILE", help="the ledger's genesis file")
    parser.add_argument("--name", required=True, metavar="NAME", help=f"the name of {who}")
    parser.add_argument("--key", type=Path, required=True, metavar="FILE", help=f"the private key of {who}")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the signed statement")


def _add_provider(commands: Any) -> None:
    group = _group(commands, "provider", "Mandates of providers, and taking them on.")
    mandate = _add(group, "mandate", "Sign a mandate: this broker may take what the device makes.", _provider_mandate)
    _add_signing(mandate, "the owner")
    mandate.add_argument("--device", required=True, metavar="NAME", help="the device")
    mandate.add_argument("--broker", required=True, metavar="NAME", help="who may take its energy")
    mandate.add_argument("--from", dest="from_time", required=True, metavar="TIME", help="an interval's beginning")
    end = _add(group, "end-mandate", "Sign the end of a mandate at a coming boundary.", _provider_end_mandate)
    _add_signing(end, "the owner")
    end.add_argument("--device", required=True, metavar="NAME", help="the device")
    end.add_argument("--at", required=True, metavar="TIME", help="an interval's beginning, still to come")
    add = _add(group, "add", "Take devices under mandate from signed statements.", _provider_add)
    _add_config(add)
    add.add_argument("--price", type=_not_negative, required=True, metavar="PRICE", help="µ-currency per kWh")
    add.add_argument(
        "statements", type=Path, nargs="+", metavar="FILE", help="registration, admissions and mandates, signed"
    )


def _add_consumer(commands: Any) -> None:
    group = _group(commands, "consumer", "Consumers and their contracts.")
    add = _add(group, "add", "Register a consumer's meter with its contract.", _consumer_add)
    contract = _add(group, "contract", "Give a consumer a new contract from a coming time on.", _consumer_contract)
    for parser in (add, contract):
        _add_config(parser)
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


def _add_listing(commands: Any) -> None:
    from broker.service.registration import TABLES

    statement = _add(commands, "statement", "Put signed statements on the ledger when the broker runs.", _statement_add)
    _add_config(statement)
    statement.add_argument("statements", type=Path, nargs="+", metavar="FILE", help="signed statements")
    listing = _add(commands, "list", "List or export a table of the broker.", _list)
    _add_config(listing)
    listing.add_argument("table", choices=TABLES, help="which table")
    form = listing.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object a line")
    form.add_argument("--csv", action="store_true", help="CSV with a header")


# Commands


def _run(options: argparse.Namespace) -> int:
    from broker.service.run import run_broker

    return run_broker(load_broker_config(options.config))


def _check_config(options: argparse.Namespace) -> int:
    config = load_broker_config(options.config)
    load_private_key(config.broker.key_file)
    genesis = load_genesis(config.ledger.genesis_file)
    if config.ledger.host is not None:
        key = load_private_key(config.ledger.host.key_file)
        if NamedKey(config.ledger.host.validator, key.public.cose_key) not in genesis.validators:
            raise ConfigError(options.config, "ledger.host.validator", "a validator of the genesis, with its key")
    if config.broker.clock == "conductor" and not genesis.simulated:
        raise ConfigError(options.config, "broker.clock", "'system', since this ledger is not simulated")
    for key_name in ("password_file", "ca_file", "certificate_file", "key_file"):
        path: Path | None = getattr(config.mqtt, key_name)
        if path is not None and not path.is_file():
            raise ConfigError(options.config, f"mqtt.{key_name}", f"a file that is there, not {path}")
    print(f"{options.config}: broker {config.broker.name} on ledger {genesis.ledger}: fine")
    return DONE


def _key_new(options: argparse.Namespace) -> int:
    algorithm = Algorithm.ED25519 if options.algorithm == "ed25519" else Algorithm.ESP256
    key = generate_private_key(algorithm)
    save_private_key(options.file, key)
    print(key.public.cose_key.hex())
    return DONE


def _key_show(options: argparse.Namespace) -> int:
    print(load_private_key(options.file).public.cose_key.hex())
    return DONE


def _ledger_genesis(options: argparse.Namespace) -> int:
    try:
        MarketCalendar(options.interval_s, options.gate_1_s, options.gate_2_s)
    except ValueError as error:
        raise WrongValue("ledger genesis", str(error)) from error
    genesis = Genesis(
        options.ledger,
        options.interval_s,
        options.gate_1_s,
        options.gate_2_s,
        options.correction_deadline_s,
        options.currency,
        tuple(options.area),
        tuple(_named_key(text) for text in options.registrar),
        tuple(_named_key(text) for text in options.validator),
        options.conductor is not None,
        _named_key(options.conductor) if options.conductor is not None else None,
    )
    raw = genesis.to_bytes()
    try:
        Genesis.from_bytes(raw)
    except MalformedMessage as error:
        raise WrongValue(error.where, error.expected) from error
    options.out.write_bytes(raw)
    return DONE


def _ledger_trust(options: argparse.Namespace) -> int:
    from broker.ledger.trust import trust_of

    print(json.dumps(trust_of(load_genesis(options.genesis)), indent=2, sort_keys=True))
    return DONE


def _ledger_verify(options: argparse.Namespace) -> int:
    from broker.ledger.verify import verify_ledger

    report = verify_ledger(options.path)
    for error in report.errors:
        print(f"{options.path}: {error}", file=sys.stderr)
    verdict = "all of it holds" if report.ok else f"{len(report.errors)} faults; restore it from a copy that verifies"
    print(
        f"{options.path}: ledger {report.ledger}, height {report.height}, head {report.block_id.hex()},"
        f" state {report.state_hash.hex()}: {verdict}"
    )
    return DONE if report.ok else FAILED


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
    }
    for row in views[options.what](options.path):
        _print_row(_plain(row), as_json=options.json)
    return DONE


def _ledger_audit(options: argparse.Namespace) -> int:
    from broker.ledger import inspect

    _print_csv(_plain(row) for row in inspect.totals(options.path))
    return DONE


def _plain(value: Any) -> Any:
    """Values of the ledger's views as what JSON knows: records by name, bytes in hex, sources by their label."""
    if isinstance(value, (Source, SourceGroup)):
        return value.label
    if isinstance(value, IntEnum):
        return value.name.lower()
    if isinstance(value, bytes):
        return value.hex()
    if is_dataclass(value):
        record = {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
        return {"operation": type(value).__name__.lower(), **record} if isinstance(value, Operation) else record
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _plain(item) for name, item in value._asdict().items()}
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Operation):
        return {"height": value[0], **_plain(value[1])}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _registrar_register(options: argparse.Namespace) -> int:
    role = Role[options.role.upper()]
    return _write_signed(options, Registration(options.party, role, parse_public_key(options.party_key).cose_key))


def _registrar_admit(options: argparse.Namespace) -> int:
    try:
        source = source_from_label(options.source)
    except ValueError as error:
        raise WrongValue("--source", str(error)) from error
    admission = Admission(
        options.device,
        options.owner,
        parse_public_key(options.meter_key).cose_key,
        source,
        Carrier.ELECTRICITY,
        options.capacity_w,
        options.area,
        options.place,
        _time(options.commissioned),
    )
    return _write_signed(options, admission)


def _provider_mandate(options: argparse.Namespace) -> int:
    return _write_signed(options, Mandate(options.device, options.name, options.broker, _time(options.from_time)))


def _provider_end_mandate(options: argparse.Namespace) -> int:
    return _write_signed(options, EndOfMandate(options.device, options.name, _time(options.at)))


def _write_signed(options: argparse.Namespace, message: Message) -> int:
    """Sign a statement and write it, after a look at whether it would be accepted as a message."""
    try:
        type(message).from_payload(message.to_payload())
    except MalformedMessage as error:
        raise WrongValue(error.where, error.expected) from error
    genesis = load_genesis(options.genesis)
    key = load_private_key(options.key)
    options.out.write_bytes(seal(message, key, genesis.ledger, options.name))
    return DONE


def _provider_add(options: argparse.Namespace) -> int:
    from broker.service.registration import add_provider
    from broker.service.store import BrokerStore

    config = load_broker_config(options.config)
    store = BrokerStore(config.database)
    try:
        statements = [path.read_bytes() for path in options.statements]
        genesis = load_genesis(config.ledger.genesis_file)
        devices = add_provider(store, genesis, config.broker.name, statements, options.price)
    finally:
        store.close()
    print(f"taken on: {', '.join(devices)}")
    return DONE


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
    valid_from_s = _time(options.from_time) if options.from_time is not None else 0
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


def _named_key(text: str) -> NamedKey:
    name, _, key = text.partition("=")
    return NamedKey(name, parse_public_key(key).cose_key)


def _not_negative(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {number}")
    return number


def _time(text: str) -> int:
    """UTC epoch seconds of an ISO 8601 time with its zone."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise WrongValue("time", f"for example 2026-01-31T00:00:00Z, got {text!r}") from None
    if moment.tzinfo is None:
        raise WrongValue("time", f"a time with its zone, for example {text}Z")
    return int(moment.astimezone(UTC).timestamp())


def _statement_add(options: argparse.Namespace) -> int:
    from broker.service.registration import add_statement
    from broker.service.store import BrokerStore

    config = load_broker_config(options.config)
    store = BrokerStore(config.database)
    try:
        for path in options.statements:
            print(f"{path}: {add_statement(store, path.read_bytes()).name.lower()}, kept for the ledger")
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
            _print_csv(rows)
        else:
            for row in rows:
                _print_row(row, as_json=options.json)
    finally:
        store.close()
    return DONE


def _print_row(row: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(row, separators=(",", ":")))
    else:
        print("  ".join(f"{key}={value}" for key, value in row.items() if value is not None))


def _print_csv(rows: Iterable[dict[str, Any]]) -> None:
    writer = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(sys.stdout, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow({key: _in_a_cell(value) for key, value in row.items()})


def _in_a_cell(value: Any) -> Any:
    """Lists and tables within a row stand as JSON in their cell."""
    return json.dumps(value) if isinstance(value, dict | list) else value


if __name__ == "__main__":
    sys.exit(main())
