"""`energy-broker ledger compare`: where two copies of a ledger first differ."""

import argparse
import json
from pathlib import Path
from typing import Any

from broker.commands.common import DONE, FAILED, add_command


def add_commands(group: Any) -> None:
    """Add the command to the parsers of `energy-broker ledger`."""
    compare = add_command(
        group, "compare", "Find where two copies of a ledger first differ: exit 0 if nowhere.", _ledger_compare
    )
    compare.add_argument("first", type=Path, metavar="PATH", help="a ledger's directory")
    compare.add_argument("second", type=Path, metavar="OTHER", help="another one's")
    compare.add_argument(
        "--allow-prefix", action="store_true", help="exit 0 also if one copy just ends earlier, as a slower node does"
    )
    compare.add_argument("--json", action="store_true", help="one JSON object")


def _ledger_compare(options: argparse.Namespace) -> int:
    from broker.ledger.compare import Comparison, CopyHead, Verdict, compare_ledgers

    def copy(head: CopyHead) -> dict[str, Any]:
        return {"path": str(head.path), "height": head.height, "block_id": head.block_id.hex()}

    def sentence(found: Comparison) -> str:
        if found.verdict is Verdict.SAME:
            return f"the same up to height {found.common_height}, where both end"
        if found.verdict is Verdict.PREFIX:
            shorter, longer = sorted((found.first, found.second), key=lambda head: head.height)
            ends = f"where {shorter.path} ends; {longer.path} goes on to height {longer.height}"
            return f"the same up to height {found.common_height}, {ends}"
        if found.verdict is Verdict.FORK:
            return f"fork at height {found.common_height + 1}, {found.difference}: {found.detail}"
        return f"{found.difference} differs: {found.detail}"

    found = compare_ledgers(options.first, options.second)
    if options.json:
        record = {
            "verdict": found.verdict,
            "common_height": found.common_height,
            "difference": found.difference,
            "detail": found.detail,
            "first": copy(found.first),
            "second": copy(found.second),
        }
        print(json.dumps(record, separators=(",", ":")))
    else:
        print(f"{options.first} and {options.second}: {sentence(found)}")
    accepted = {Verdict.SAME, Verdict.PREFIX} if options.allow_prefix else {Verdict.SAME}
    return DONE if found.verdict in accepted else FAILED
