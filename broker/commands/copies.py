"""`energy-broker backup` and `energy-broker ledger backup`: whole copies of what is in use."""

import argparse
import time
from pathlib import Path
from typing import Any

from broker.commands.common import DONE, add_command, add_config_option
from broker.config import load_broker_config


def add_commands(commands: Any) -> None:
    backup = add_command(
        commands,
        "backup",
        "Copy the broker's database and the ledger that it hosts, also while it runs.",
        _backup,
    )
    add_config_option(backup)
    backup.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new directory; keep it secret")


def add_ledger_commands(group: Any) -> None:
    """The ones below `energy-broker ledger`."""
    backup = add_command(
        group, "backup", "Copy a whole ledger, also while its engine runs, and verify the copy.", _ledger_backup
    )
    backup.add_argument("path", type=Path, metavar="PATH", help="the ledger's directory")
    backup.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new directory for the copy")


def _backup(options: argparse.Namespace) -> int:
    from broker.service.backup import backup_broker

    report = backup_broker(load_broker_config(options.config), options.out, time.sleep)
    ledger = report.ledger
    with_ledger = "" if ledger is None else f", with ledger {ledger.ledger} at height {ledger.height}, which verifies"
    print(f"{options.out}: the broker's database{with_ledger}; it holds the consumers' secrets")
    return DONE


def _ledger_backup(options: argparse.Namespace) -> int:
    from broker.ledger.backup import backup_ledger

    report = backup_ledger(options.path, options.out)
    print(f"{options.out}: ledger {report.ledger}, height {report.height}, head {report.block_id.hex()}: it verifies")
    return DONE
