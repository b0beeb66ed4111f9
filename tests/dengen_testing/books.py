"""The books of a market that has run: a summary of what the brokers' exports and the ledger say.

Nothing here looks at the plan's energies: consumption, deliveries, orders and issues are read back through
`energy-broker list`, `ledger show`, `ledger audit` and `ledger verify`.
"""

import csv
import io
import json
from collections import Counter
from typing import Any, Final, TypeAlias

from dengen_testing.market import CommandFailed, Workspace, energy_broker, table

Export: TypeAlias = dict[str, list[dict[str, Any]]]
"""The tables of one broker: rows by table name."""

_TABLES: Final = ("contracts", "demands", "history", "orders", "purchases")


def summarize(workspace: Workspace, engine: str, seconds: float) -> dict[str, Any]:
    """The summary of a stopped market, as deploy/demo/README.md describes it. Raises CommandFailed."""
    plan = workspace.plan
    exports = {name: {kind: list(table(workspace.config(name), kind)) for kind in _TABLES} for name in plan.brokers}
    consumers = [
        _consumer(exports[broker], contract["meter"], broker, contract["lines_ppm"])
        for broker in plan.brokers
        for contract in exports[broker]["contracts"]
    ]
    purchases = [row for export in exports.values() for row in export["purchases"]]
    return {
        "intervals": len({row["start_s"] for export in exports.values() for row in export["demands"]}),
        "readers": list(plan.readers),
        "brokers": sorted(plan.brokers),
        "consumers": sorted(consumers, key=lambda consumer: str(consumer["meter"])),
        "issued_wh": issued_wh(workspace),
        "neighbour_requests": len({row["order_id"] for export in exports.values() for row in export["orders"]}),
        "neighbour_transfers": len(purchases),
        "neighbour_wh": sum(row["energy_wh"] for row in purchases),
        "ledger": {"engine": engine, "height": _height(workspace), "verified": _verified(workspace)},
        "seconds": round(seconds, 1),
    }


def issued_wh(workspace: Workspace) -> dict[str, int]:
    """Wh of each source that the ledger has issued, over all intervals, from its audit."""
    issued: Counter[str] = Counter()
    for row in csv.DictReader(io.StringIO(energy_broker("ledger", "audit", "--csv", workspace.ledger))):
        issued[row["source"]] += int(row["issued_wh"])
    return dict(sorted(issued.items()))


def _consumer(export: Export, meter: str, broker: str, lines: dict[str, int]) -> dict[str, Any]:
    delivered: Counter[str] = Counter()
    for row in export["history"]:
        if row["meter"] == meter:
            delivered[row["source"]] += row["energy_wh"]
    demands = [row for row in export["demands"] if row["meter"] == meter]
    return {
        "meter": meter,
        "broker": broker,
        "contract": lines,
        "consumed_wh": sum(row["energy_wh"] for row in demands),
        "delivered_wh": dict(sorted(delivered.items())),
        "unmatched_wh": sum(row["unmatched_wh"] for row in demands),
    }


def _height(workspace: Workspace) -> int:
    (line,) = energy_broker("ledger", "show", workspace.ledger, "head", "--json").splitlines()
    height = json.loads(line)["height"]
    assert isinstance(height, int)
    return height


def _verified(workspace: Workspace) -> bool:
    try:
        energy_broker("ledger", "verify", workspace.ledger)
    except CommandFailed:
        return False
    return True
