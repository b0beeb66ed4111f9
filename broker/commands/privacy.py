"""`energy-broker disclose` and `energy-broker ledger check-disclosure`: one day of a consumer, opened to an auditor."""

import argparse
import sys
from pathlib import Path
from typing import Any

from broker.commands.common import (
    DONE,
    FAILED,
    MAX_INPUT_BYTES,
    WrongUse,
    add_command,
    add_config_option,
    counted,
    print_row,
)
from broker.config import load_broker_config, load_genesis
from broker.protocol.files import read_file
from firmware_config.loader import WrongValue


def add_commands(commands: Any) -> None:
    """The one at the top."""
    give = add_command(commands, "disclose", "Open one day of a consumer to an auditor, and no other day.", _disclose)
    add_config_option(give)
    give.add_argument("--meter", required=True, metavar="NAME", help="the consumer's meter")
    give.add_argument("--day", required=True, metavar="DAY", help="a UTC day, for example 2026-01-31")
    give.add_argument("--out", type=Path, metavar="FILE", help="a new file, readable by you only; default: print it")


def add_ledger_commands(group: Any) -> None:
    """The one below `energy-broker ledger`."""
    check = add_command(
        group, "check-disclosure", "Find what a disclosure opens on a ledger: exit 0 only if all of it fits.", _check
    )
    check.add_argument("file", type=Path, metavar="FILE", help="what `energy-broker disclose` gave out")
    check.add_argument("--ledger", type=Path, required=True, metavar="PATH", help="the ledger's directory")
    check.add_argument("--json", action="store_true", help="one JSON object a line")


def _disclose(options: argparse.Namespace) -> int:
    from broker.service.disclosure import DisclosureError, day_number, disclose
    from broker.service.store import BrokerStore

    config = load_broker_config(options.config)
    try:
        day = day_number(options.day)
    except DisclosureError as error:
        raise WrongUse(f"--day: {error}") from error
    store = BrokerStore(config.database)
    try:
        opened = disclose(store, load_genesis(config.ledger.genesis_file), config.broker.name, options.meter, day)
    finally:
        store.close()
    if options.out is None:
        print(opened.to_json())
        return DONE
    options.out.touch(mode=0o600, exist_ok=False)
    options.out.write_text(opened.to_json() + "\n")
    print(f"{options.out}: {len(opened.demands)} demands of {options.meter} on {options.day}; it opens that day only")
    return DONE


def _check(options: argparse.Namespace) -> int:
    from broker.service.disclosure import Disclosure, DisclosureError, check_disclosure, day_text

    try:
        disclosure = Disclosure.from_json(read_file(options.file, MAX_INPUT_BYTES).decode())
    except (DisclosureError, UnicodeDecodeError) as error:
        reason = str(error) if isinstance(error, DisclosureError) else "it is no text"
        raise WrongValue(str(options.file), f"what `energy-broker disclose` gave out ({reason})") from error
    report = check_disclosure(disclosure, options.ledger)
    for interval in report.intervals:
        row = {
            "start_s": interval.start_s,
            "pseudonym": interval.pseudonym.hex(),
            "demanded_wh": interval.demanded_wh,
            "delivered_wh": interval.delivered_wh,
            "deliveries": [
                {"line": item.line, "source": item.source.label, "device": item.device, "energy_wh": item.energy_wh}
                for item in interval.deliveries
            ],
        }
        print_row(row, as_json=options.json)
    for fault in report.faults:
        print(f"{options.file}: {fault}", file=sys.stderr)
    verdict = "all of it fits the ledger" if not report.faults else counted(len(report.faults), "fault")
    print(f"{options.file}: {report.meter} on {day_text(report.day)}: {verdict}", file=sys.stderr)
    return FAILED if report.faults else DONE
