"""`energy-broker backup` and `energy-broker ledger backup`: whole copies of what is in use."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from broker.commands.common import DONE, add_command, add_config_option
from broker.config import load_broker_config
from firmware_config.loader import WrongValue

if TYPE_CHECKING:
    from broker.ledger.snapshot import Manifest


def add_commands(commands: Any) -> None:
    """Subcommands of this module's group."""
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

    snapshot = add_command(
        group, "snapshot", "Write a ledger's present state to a file, without its history.", _ledger_snapshot
    )
    snapshot.add_argument("path", type=Path, metavar="PATH", help="the ledger's directory")
    snapshot.add_argument("--out", type=Path, required=True, metavar="FILE", help="a new file")
    restore = add_command(group, "restore", "Make a ledger directory that goes on from a snapshot.", _ledger_restore)
    restore.add_argument("file", type=Path, metavar="FILE", help="a snapshot")
    restore.add_argument("--path", type=Path, required=True, metavar="DIR", help="a new directory for the ledger")
    restore.add_argument(
        "--rows-digest",
        metavar="HEX",
        help="refuse the snapshot unless it has this digest, which `ledger snapshot` printed elsewhere",
    )


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


def _ledger_snapshot(options: argparse.Namespace) -> int:
    from broker.ledger.snapshot import take_snapshot

    print(f"{options.out}: {_described(take_snapshot(options.path, options.out))}")
    return DONE


def _ledger_restore(options: argparse.Namespace) -> int:
    from broker.ledger.snapshot import restore_snapshot

    expected = None
    if options.rows_digest is not None:
        try:
            expected = bytes.fromhex(options.rows_digest)
        except ValueError as error:
            raise WrongValue("--rows-digest", "the hex that `energy-broker ledger snapshot` prints") from error
    manifest = restore_snapshot(options.file, options.path, expected)
    print(f"{options.path}: {_described(manifest)}")
    missing = f"The blocks before height {manifest.head.height} are not in it."
    print(f"{missing} What they say can be verified and proven only with a copy that has them; keep one.")
    return DONE


def _described(manifest: "Manifest") -> str:
    head = manifest.head
    return (
        f"ledger {manifest.genesis.ledger} at height {head.height}, head {head.block_id.hex()},"
        f" rows digest {manifest.rows_digest.hex()}"
    )
