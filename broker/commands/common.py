"""What the subcommands share: exit codes, parsers' parts, reading arguments, printing rows."""

import argparse
import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, TextIO, TypeVar

from broker.config import load_genesis, parse_public_key
from broker.ledger.operations import Operation
from broker.protocol.command_line import shown
from broker.protocol.envelope import parse, seal
from broker.protocol.errors import MalformedMessage
from broker.protocol.files import read_file
from broker.protocol.keys import load_private_key
from broker.protocol.messages import Message, NamedKey
from broker.protocol.sources import Source, SourceGroup
from firmware_config.loader import WrongValue

DONE: Final = 0
FAILED: Final = 1
USAGE: Final = 2

_NUMBER: Final = re.compile(r"-|-?[0-9]+(\.[0-9]+)?")

MAX_INPUT_BYTES: Final = 2**30
"""A certificate of a year and a proof of a large batch take some tens of megabytes."""

CHECKPOINT_FILE: Final = "a checkpoint as `energy-broker ledger checkpoint` writes it"
_WHOLE_PPM: Final = 1_000_000

_STATEMENT: Final = "a signed statement as `energy-broker registrar` and `energy-broker provider` write them"

T = TypeVar("T")

Command = Callable[[argparse.Namespace], int]


class WrongUse(Exception):
    """Arguments that are right one by one, and ask for what cannot be. The text says so, and what to give instead."""


def add_command(commands: Any, name: str, text: str, command: Command) -> argparse.ArgumentParser:
    """A subcommand that runs `command`; `text` is its help and its description."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=command)
    return parser


def add_group(commands: Any, name: str, text: str) -> Any:
    """A subcommand that has subcommands of its own."""
    return commands.add_parser(name, help=text, description=text).add_subparsers(required=True, metavar="COMMAND")


def add_config_option(parser: argparse.ArgumentParser) -> None:
    """The option that names the broker's config file."""
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the broker's config file (TOML)")


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """The option that names whom to believe; `load_trust` reads it."""
    parser.add_argument("--trust", type=Path, required=True, metavar="FILE", help="the ledger's trust file")


def add_signing_options(parser: argparse.ArgumentParser, who: str) -> None:
    """Options of a command that writes a signed statement; `who` signs it."""
    parser.add_argument("--genesis", type=Path, required=True, metavar="FILE", help="the ledger's genesis file")
    parser.add_argument("--name", required=True, metavar="NAME", help=f"the name of {who}")
    parser.add_argument("--key", type=Path, required=True, metavar="FILE", help=f"the private key of {who}")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the signed statement")


def write_signed(options: argparse.Namespace, message: Message) -> int:
    """Sign a statement and write it, after a look at whether it would be accepted as a message."""
    try:
        type(message).from_payload(message.to_payload())
    except MalformedMessage as error:
        raise WrongValue(error.where, error.expected) from error
    genesis = load_genesis(options.genesis)
    key = load_private_key(options.key)
    options.out.write_bytes(seal(message, key, genesis.ledger, options.name))
    return DONE


def named_key(text: str) -> NamedKey:
    """NAME=KEY as a named key. Raises ProtocolError for a key that is none."""
    name, _, key = text.partition("=")
    return NamedKey(name, parse_public_key(key).cose_key)


def read_as(path: Path, what: str, read: Callable[[bytes], T]) -> T:
    """What `read` makes of a file; `what` it should be, and the command that makes one, is for the error.

    Raises OSError, and WrongValue that names the file.
    """
    raw = read_file(path, MAX_INPUT_BYTES)
    try:
        return read(raw)
    except MalformedMessage as error:
        raise WrongValue(str(path), f"{what} ({error})") from error


def read_statement(path: Path) -> bytes:
    """A signed statement as it is, once it is known to be sealed. Raises OSError, WrongValue."""
    return read_as(path, _STATEMENT, _sealed)


def _sealed(raw: bytes) -> bytes:
    parse(raw)
    return raw


def ppm_of(option: str, percent: str) -> int:
    """A percentage as typed, in ppm; exact, because it has at most four decimals."""
    expected = f"a percentage from 0 to 100 with at most four decimals, got {shown(percent)}"
    try:
        ppm = Decimal(percent) * 10_000
    except InvalidOperation:
        raise WrongValue(option, expected) from None
    if not ppm.is_finite() or not 0 <= ppm <= _WHOLE_PPM or ppm != ppm.to_integral_value():
        raise WrongValue(option, expected)
    return int(ppm)


def counted(count: int, noun: str) -> str:
    """`1 operation`, `2 operations`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def print_row(row: dict[str, Any], *, as_json: bool) -> None:
    """One record on a line: JSON, or key=value without what is None."""
    if as_json:
        print(json.dumps(row, separators=(",", ":")))
    else:
        print("  ".join(f"{key}={value}" for key, value in row.items() if value is not None))


def print_csv(rows: Iterable[dict[str, Any]], out: TextIO | None = None) -> None:
    """Write rows with a head line, to standard output by default; no row, no head line."""
    writer = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(out or sys.stdout, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow({key: _in_a_cell(value) for key, value in row.items()})


def _in_a_cell(value: Any) -> Any:
    """Lists and tables within a row stand as JSON in their cell."""
    return json.dumps(value) if isinstance(value, dict | list) else value


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Columns under their names, numbers to the right, times in UTC."""
    if not rows:
        return
    names = list(rows[0])
    cells = [[name.removesuffix("_s") if name == "start_s" else name for name in names]]
    cells += [[_cell(name, row[name]) for name in names] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    is_number = [all(_NUMBER.fullmatch(line[column]) for line in cells[1:]) for column in range(len(names))]
    for line in cells:
        columns = zip(line, widths, is_number, strict=True)
        print("  ".join(text.rjust(width) if number else text.ljust(width) for text, width, number in columns).rstrip())


def _cell(name: str, value: Any) -> str:
    if name == "start_s":
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%dT%H:%MZ")
    return "-" if value is None else str(value)


def plain(value: Any) -> Any:
    """Values of the ledger's views as what JSON knows: records by name, bytes in hex, sources by their label."""
    if isinstance(value, (Source, SourceGroup)):
        return value.label
    if isinstance(value, IntEnum):
        return value.name.lower()
    if isinstance(value, bytes):
        return value.hex()
    if is_dataclass(value):
        record = {field.name: plain(getattr(value, field.name)) for field in fields(value)}
        return {"operation": type(value).__name__.lower(), **record} if isinstance(value, Operation) else record
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: plain(item) for name, item in value._asdict().items()}
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Operation):
        return {"height": value[0], **plain(value[1])}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value
