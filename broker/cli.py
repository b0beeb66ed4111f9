"""The command `energy-broker`: run a broker, register whom it serves, and look into ledgers.

Exit codes: 0 done, 1 it could not be done, 2 wrong usage, config or input; the reason is one line on stderr. The
subcommands stand in `broker/commands/`, one module a group.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib.metadata import version

from broker.commands import (
    broker,
    certificate,
    consumer,
    copies,
    forecast,
    key,
    ledger,
    privacy,
    provider,
    registrar,
    statement,
)
from broker.commands.common import DONE, FAILED, USAGE, Command, WrongUse
from broker.market.contracts import ContractError
from broker.market.terms import TermsError
from broker.protocol.command_line import not_text
from broker.protocol.errors import KeyFileError, ProtocolError
from broker.protocol.files import refused_by_system
from firmware_config.loader import ConfigError, WrongValue


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    fault = not_text(given)
    if fault is not None:
        return _say(USAGE, fault)
    options = _parser().parse_args(given)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    # Imported here, because these bring in SQLite, which a plain --help does not need.
    from broker.database_copy import CopyError
    from broker.ledger.store import LedgerError
    from broker.service.accounts import AccountsError
    from broker.service.registration import RegistrationError
    from broker.service.store import StoreError

    command: Command = options.command
    try:
        return command(options)
    except BrokenPipeError:
        return DONE  # Whoever read our output, `head` for one, has seen enough.
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        return _say(USAGE, refused_by_system(error))
    except (ConfigError, WrongUse, WrongValue, ContractError, TermsError, RegistrationError, KeyFileError) as error:
        return _say(USAGE, error)
    except (ProtocolError, StoreError, LedgerError, CopyError, AccountsError) as error:
        return _say(FAILED, error)
    except OSError as error:
        return _say(FAILED, refused_by_system(error))


def _say(code: int, what: object) -> int:
    print(f"energy-broker: {what}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="energy-broker",
        description="A lightweight energy broker: resolves demands against a ledger of energy assets.",
        epilog="Exit codes: 0 done, 1 it could not be done, 2 wrong usage, config or input. See docs/broker.md.",
    )
    parser.add_argument("--version", action="version", version=f"energy-broker {version('dengen')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    groups = (broker, copies, key, ledger, registrar, provider, consumer, statement, forecast, certificate, privacy)
    for group in groups:
        group.add_commands(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
