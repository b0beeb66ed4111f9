"""The command `meter-agent`. Each subcommand imports what it needs and no more: a gateway has little memory.

Exit codes: 0 it worked; 1 it failed while running (a meter that does not answer, a journal that cannot be written);
2 the command line or the config is wrong.
"""

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from broker.protocol.errors import KeyFileError
from firmware_config.loader import ConfigError, WrongValue
from meter_agent.config import AgentConfig, load_agent_config

if TYPE_CHECKING:
    from meter_agent.clock import AgentClock
    from meter_agent.readings import MeterReader, Sample

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2

_EXIT_CODES: Final = "exit codes: 0 it worked, 1 it failed while running, 2 wrong command line or config"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. argparse ends with SystemExit(2) for a wrong one."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.command(options)
    except (ConfigError, KeyFileError) as error:
        return _fail(str(error), EXIT_USAGE)
    return code


class _ShowVersion(argparse.Action):
    """Prints the version and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        # Imported where it is asked for, because it takes a start as long as all of the agent's own modules.
        from importlib.metadata import version

        print(f"meter-agent {version('dengen')}")
        parser.exit(EXIT_OK)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="meter-agent", description="Reads meters and reports their intervals to a broker.", epilog=_EXIT_CODES
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and end")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add(commands, "run", _run, "measure, seal intervals and report them, until SIGTERM or Ctrl-C")
    read = _add(commands, "read", _read, "read each meter once and print what it shows")
    read.add_argument("--meter", metavar="NAME", help="only this meter")
    read.add_argument("--json", action="store_true", help="one JSON object a line; energy in milli-watt-hours")
    _add(commands, "check-config", _check_config, "check config, keys and profiles without touching a meter")
    status = _add(commands, "status", _status, "show the newest intervals, deliveries and events of the journal")
    status.add_argument("--meter", metavar="NAME", help="only this meter")
    status.add_argument("--last", metavar="N", type=_count, default=10, help="how many of each (default 10)")
    return parser


def _add(commands: Any, name: str, command: Any, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=_EXIT_CODES
    )
    parser.add_argument("--config", metavar="FILE", type=Path, required=True, help="the agent's TOML file")
    parser.set_defaults(command=command)
    return parser


def _count(text: str) -> int:
    count = int(text)
    if not 1 <= count <= 100_000:
        raise ValueError(text)
    return count


def _run(options: argparse.Namespace) -> int:
    from meter_agent.clock import ConductorClock, SystemClock
    from meter_agent.journal import JournalError
    from meter_agent.service import Agent, ReaderDied

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(message)s")
    config = load_agent_config(options.config)
    clock: AgentClock = (
        SystemClock(config.agent.require_synchronised_clock) if config.agent.clock == "system" else ConductorClock()
    )
    _check_mqtt_files(options.config, config)
    readers = _readers(options.config, config, clock)
    try:
        agent = Agent(config, readers, clock)
    except JournalError as error:
        return _fail(str(error), EXIT_FAILED)
    except OSError as error:
        # What else can be wrong with certificates and keys: ssl says it as an OSError.
        return _fail(f"{options.config}: mqtt: {error}; check ca_file, certificate_file and key_file", EXIT_USAGE)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: agent.stop())
    try:
        agent.run()
    except (JournalError, ReaderDied) as error:
        return _fail(str(error), EXIT_FAILED)
    return EXIT_OK


def _read(options: argparse.Namespace) -> int:
    from meter_agent.clock import SystemClock
    from meter_agent.readings import ReadFailure

    config = load_agent_config(options.config)
    names = _chosen(options, config)
    readers = _readers(options.config, config, SystemClock(require_synchronised=False))
    code = EXIT_OK
    for name in names:
        try:
            sample = readers[name].sample()
        except ReadFailure as failure:
            code = _fail(str(failure), EXIT_FAILED)
        else:
            print(_sample_json(name, sample) if options.json else _sample_text(name, sample), flush=True)
        finally:
            readers[name].close()
    return code


def _check_config(options: argparse.Namespace) -> int:
    from broker.protocol.keys import load_private_key
    from meter_agent.clock import SystemClock

    config = load_agent_config(options.config)
    for meter in config.meters.values():
        load_private_key(meter.key_file)
    _check_mqtt_files(options.config, config)
    _readers(options.config, config, SystemClock(require_synchronised=False))
    print(f"{options.config}: fine; {len(config.meters)} meter(s): {', '.join(config.meters)}")
    return EXIT_OK


def _status(options: argparse.Namespace) -> int:
    from broker.protocol.envelope import parse
    from broker.protocol.messages import Delivery
    from meter_agent.journal import JournalError, JournalView

    config = load_agent_config(options.config)
    names = _chosen(options, config)
    try:
        journal = JournalView(config.agent.data_dir)
    except JournalError as error:
        return _fail(str(error), EXIT_FAILED)
    for name in names:
        for record in reversed(journal.intervals(name, options.last)):
            print(
                f"{name} interval {record.start_s} {record.energy_wh} Wh {record.quality.name.lower()} "
                f"{record.state.name.lower()}"
            )
        for raw in reversed(journal.deliveries(name, options.last)):
            delivery = Delivery.from_payload(parse(raw).payload)
            lines = ", ".join(f"{line.source.label} {line.energy_wh} Wh" for line in delivery.lines)
            print(
                f"{name} delivery {delivery.start_s} {delivery.state.name.lower()}: {lines or 'nothing'}; "
                f"unmatched {delivery.unmatched_wh} Wh"
            )
    for time_s, meter, kind, detail in reversed(journal.events(options.last)):
        print(f"{meter} event {time_s} {kind}: {detail}")
    journal.close()
    return EXIT_OK


def _chosen(options: argparse.Namespace, config: AgentConfig) -> list[str]:
    if options.meter is None:
        return list(config.meters)
    if options.meter not in config.meters:
        raise ConfigError(options.config, f"meters.{options.meter}", f"one of {', '.join(config.meters)}")
    return [options.meter]


def _readers(path: Path, config: AgentConfig, clock: "AgentClock") -> "dict[str, MeterReader]":
    """All readers; a profile that does not exist or fit is a mistake of the config file. Raises ConfigError."""
    from meter_agent.readers import create_readers

    try:
        return create_readers(config.named_meters, clock)
    except WrongValue as error:
        raise ConfigError(path, error.key, error.expected) from error


def _check_mqtt_files(path: Path, config: AgentConfig) -> None:
    """Raises ConfigError for a file that the MQTT settings name and that cannot be read."""
    for key in ("password_file", "ca_file", "certificate_file", "key_file"):
        file = getattr(config.mqtt, key)
        if file is not None and not os.access(file, os.R_OK):
            raise ConfigError(path, f"mqtt.{key}", f"a file that this user can read, and {file} is none")


def _sample_json(name: str, sample: "Sample") -> str:
    return json.dumps(
        {
            "meter": name,
            "time_s": int(sample.time_s),
            "import_mwh": sample.import_mwh,
            "export_mwh": sample.export_mwh,
            "power_w": sample.power_w,
            "serial_number": sample.serial_number,
        }
    )


def _sample_text(name: str, sample: "Sample") -> str:
    parts = [f"{name}:"]
    for label, mwh in (("import", sample.import_mwh), ("export", sample.export_mwh)):
        if mwh is not None:
            parts.append(f"{label} {mwh // 1_000_000}.{mwh % 1_000_000:06d} kWh")
    if sample.power_w is not None:
        parts.append(f"power {sample.power_w} W")
    if sample.serial_number is not None:
        parts.append(f"serial number {sample.serial_number}")
    return " ".join(parts)


def _fail(text: str, code: int) -> int:
    print(f"meter-agent: {text}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
