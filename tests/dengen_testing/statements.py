"""Statements of account of a market that has run: every party's, as `energy-broker statement` prints them."""

from datetime import UTC, datetime
from pathlib import Path

from dengen_testing.market import Workspace, energy_broker


def write_statements(workspace: Workspace, folder: Path) -> None:
    """Write one JSON file for each party of each broker, and each broker's own, which is compared with the ledger.

    Raises CommandFailed if a broker's books do not balance or are not those of the ledger.
    """
    plan = workspace.plan
    folder.mkdir(parents=True)
    period = (
        *("--from", _time(plan.origin_s)),
        *("--to", _time(plan.origin_s + plan.intervals * plan.interval_s)),
    )
    for broker in plan.brokers:
        parties = {
            "consumer": {consumer.meter.name for consumer in plan.consumers if consumer.broker == broker},
            "provider": {device.owner for device in plan.devices if device.broker == broker},
            "neighbour": set(plan.brokers) - {broker},
        }
        command = ("statement", "--config", workspace.config(broker), *period, "--json")
        (folder / f"{broker}-own.json").write_text(energy_broker(*command, "--own", "--check", workspace.ledger))
        for kind, names in parties.items():
            for name in sorted(names):
                (folder / f"{broker}-{kind}-{name}.json").write_text(energy_broker(*command, f"--{kind}", name))


def _time(time_s: int) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat()
