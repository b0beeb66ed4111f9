"""`energy-broker ledger audit`: the books of a ledger, as tables, JSON or CSV, and whether they balance."""

import argparse
import sys
from pathlib import Path
from typing import Any, Final

from broker.commands.common import DONE, FAILED, add_command, plain, print_csv, print_row, print_table

_TABLES: Final = ("sources", "devices", "parties", "deliveries", "closes")


def add_commands(group: Any) -> None:
    """Add the command to the parsers of `energy-broker ledger`."""
    audit = add_command(
        group,
        "audit",
        "Print the books of a ledger: what became of every Wh. Exit 0 only if every sum balances.",
        _ledger_audit,
    )
    audit.add_argument("path", type=Path, metavar="PATH", help="the ledger's directory")
    audit.add_argument(
        "--by",
        choices=_TABLES,
        default="sources",
        help="sources (default): per source and interval; deliveries: per broker, interval and source; closes: per"
        " broker and interval",
    )
    form = audit.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object a line")
    form.add_argument("--csv", action="store_true", help="comma-separated values with a head line")
    form.add_argument("--export", type=Path, metavar="DIR", help="write all of them as CSV files into this directory")


def _ledger_audit(options: argparse.Namespace) -> int:
    from broker.ledger.audit import audit_ledger

    audit = audit_ledger(options.path)
    if options.export is not None:
        options.export.mkdir(parents=True, exist_ok=True)
        for name in _TABLES:
            with (options.export / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
                print_csv((plain(line) for line in getattr(audit, name)), file)
    else:
        rows = [plain(line) for line in getattr(audit, options.by)]
        if options.csv:
            print_csv(rows)
        elif options.json:
            for row in rows:
                print_row(row, as_json=True)
        else:
            print_table(rows)
    for fault in audit.faults:
        print(f"{options.path}: {fault}", file=sys.stderr)
    if audit.faults:
        print(f"{options.path}: the books do not balance; run `energy-broker ledger verify` on it", file=sys.stderr)
    return FAILED if audit.faults else DONE
