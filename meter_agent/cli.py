"""The command `meter-agent`. Each subcommand imports what it needs and no more: a gateway has little memory.

Exit codes: 0 it worked; 1 it failed while running (a meter that does not answer, a journal that cannot be written);
2 the command line or the config is wrong. docs/agent.md describes every command.
"""

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from broker.protocol.command_line import not_text, shown, time_s, whole_number
from broker.protocol.errors import KeyFileError
from broker.protocol.files import refused_by_system
from firmware_config.loader import ConfigError, WrongValue
from meter_agent.config import AgentConfig, load_agent_config
from meter_agent.installer import commands
from meter_agent.shown import sample_json, sample_text, utc

if TYPE_CHECKING:
    from meter_agent.clock import AgentClock
    from meter_agent.readings import MeterReader

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2

_EXIT_CODES: Final = "exit codes: 0 it worked, 1 it failed while running, 2 wrong command line or config"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. argparse ends with SystemExit(2) for a wrong one."""
    given = sys.argv[1:] if arguments is None else arguments
    fault = not_text(given)
    if fault is not None:
        return _fail(fault, EXIT_USAGE)
    options = _parser().parse_args(given)
    try:
        code: int = options.command(options)
    except (ConfigError, KeyFileError, commands.WrongOptions) as error:
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
    adder = parser.add_subparsers(required=True, metavar="COMMAND")
    _add(adder, "run", _run, "measure, seal intervals and report them, until SIGTERM or Ctrl-C")
    read = _add(adder, "read", _read, "read each meter and print what it shows, once or with --watch again and again")
    read.add_argument("--meter", metavar="NAME", help="only this meter")
    read.add_argument("--watch", action="store_true", help="go on until Ctrl-C, a line a sample")
    read.add_argument("--every", metavar="S", type=_seconds, default=1.0, help="seconds between reads (default 1)")
    read.add_argument("--json", action="store_true", help="one JSON object a line; energy in milli-watt-hours")
    check = _add(adder, "check-config", _check_config, "check config, keys and profiles without touching a meter")
    check.add_argument("--json", action="store_true", help="the result as a JSON object, a mistake with file and key")
    status = _add(
        adder, "status", _status, "show readings, outbox, connection, clock and faults, from the agent and its journal"
    )
    status.add_argument("--meter", metavar="NAME", help="only this meter")
    status.add_argument(
        "--last", metavar="N", type=whole_number(1, 100_000), default=10, help="how many of each list (default 10)"
    )
    status.add_argument("--json", action="store_true", help="one JSON object")
    certificate = _add(
        adder, "certificate", _certificate, "ask the broker for the certificate of a consumer's meter, and write it"
    )
    certificate.add_argument("--meter", metavar="NAME", required=True, help="the consumer's meter")
    certificate.add_argument(
        "--from", dest="from_s", metavar="TIME", type=time_s, required=True, help="for example 2026-01-01T00:00:00Z"
    )
    certificate.add_argument("--to", dest="to_s", metavar="TIME", type=time_s, required=True, help="end, not included")
    certificate.add_argument("--out", metavar="FILE", type=Path, required=True, help="where to write the certificate")
    certificate.add_argument(
        "--timeout", metavar="S", type=_seconds, default=600.0, help="seconds to wait for it (default 600)"
    )
    again = _add(
        adder, "send-again", _send_again, "have accepted intervals sent once more, to a broker that lost its database"
    )
    again.add_argument(
        "--from", dest="from_s", metavar="TIME", type=time_s, required=True, help="for example 2026-01-01T00:00:00Z"
    )
    _add_scan(adder)
    _add_profiles(adder)
    _add_simulate(adder)
    return parser


def _add(adder: Any, name: str, command: Any, summary: str) -> argparse.ArgumentParser:
    parser = _add_bare(adder, name, command, summary)
    parser.add_argument("--config", metavar="FILE", type=Path, required=True, help="the agent's TOML file")
    return parser


def _add_bare(adder: Any, name: str, command: Any, summary: str) -> argparse.ArgumentParser:
    """A command that needs no config."""
    parser: argparse.ArgumentParser = adder.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=_EXIT_CODES
    )
    parser.set_defaults(command=command)
    return parser


def _add_scan(adder: Any) -> None:
    scan = _add_bare(
        adder,
        "scan",
        commands.scan,
        "find meters on a serial port or behind a TCP host and say which profile fits each; "
        "pulse outputs (S0) cannot be found",
    )
    scan.add_argument("--port", metavar="PORT", help="a serial port, or with --host a TCP port (default 502)")
    scan.add_argument("--host", metavar="HOST", help="a Modbus TCP meter or gateway")
    ids_help = "device ids to ask, for example 1-16,200 (default 1-247)"
    scan.add_argument("--ids", metavar="IDS", type=commands.device_ids, default="1-247", help=ids_help)
    scan.add_argument(
        "--baud",
        metavar="BAUD",
        type=whole_number(1, 4_000_000),
        help="only this baud rate (default: those of the profiles)",
    )
    scan.add_argument("--parity", choices=("N", "E", "O"), help="only this parity")
    scan.add_argument("--profile", metavar="NAME", help="try only this profile")
    scan.add_argument(
        "--timeout", metavar="S", type=_seconds, help="seconds to wait for a reply (default 0.5 serial, 1 TCP)"
    )
    scan.add_argument(
        "--device-time", metavar="S", type=_seconds, default=20.0, help="most seconds for one device (default 20)"
    )
    scan.add_argument(
        "--listen",
        metavar="S",
        type=_seconds_or_none,
        default=3.0,
        help="seconds to listen for telegrams that a meter pushes (default 3; 11 for DSMR 2 to 4; 0: do not)",
    )
    scan.add_argument(
        "--sign-on",
        metavar="S",
        type=_seconds_or_none,
        default=8.0,
        help="seconds for a meter that must be asked by IEC 62056-21 (default 8; 0: do not ask)",
    )
    scan.add_argument(
        "--wi-sun",
        metavar="S",
        type=_seconds_or_none,
        default=1.0,
        help="seconds for a Wi-SUN adapter of route B (default 1; 0: do not ask)",
    )
    scan.add_argument(
        "--mbus",
        metavar="S",
        type=_seconds_or_none,
        default=0.4,
        help="seconds to wait for each answer on a wired M-Bus (default 0.4; 0: do not ask)",
    )
    scan.add_argument("--json", action="store_true", help="one JSON object a line for each meter")


def _add_profiles(adder: Any) -> None:
    profiles = _add_bare(
        adder, "profiles", commands.profiles, "list the meters that can be read, search them, or show one profile"
    )
    profiles.add_argument(
        "words", metavar="WORD", nargs="*", help="words that must all occur; `show NAME` shows one profile whole"
    )
    profiles.add_argument("--json", action="store_true", help="one JSON object a line")


def _add_simulate(adder: Any) -> None:
    simulate = _add_bare(
        adder, "simulate", commands.simulate, "serve profiles as Modbus meters, for tests of gateways, until Ctrl-C"
    )
    simulate.add_argument(
        "meters", metavar="PROFILE[:ID]", nargs="+", help="a profile and its device id (default 1, 2, … in order)"
    )
    simulate.add_argument("--tcp", metavar="[HOST:]PORT", type=_tcp, help="serve Modbus TCP there (port 0: a free one)")
    simulate.add_argument("--pty", metavar="LINK", type=Path, help="serve Modbus RTU on a pseudo-terminal of this name")
    for counter, energy_wh in (("import", 1_234_000), ("export", 567_000)):
        start = f"what the {counter} counter shows at first (default {energy_wh})"
        simulate.add_argument(f"--{counter}-wh", metavar="WH", type=whole_number(0), default=energy_wh, help=start)
    simulate.add_argument(
        "--power-w", metavar="W", type=whole_number(), default=0, help="counts on by this power, negative for export"
    )
    simulate.add_argument("--serial", metavar="NUMBER", help="serial number (default 1000 + device id)")
    simulate.add_argument("--json", action="store_true", help="say where it serves as one JSON object")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.01 <= seconds <= 3_600:
        raise argparse.ArgumentTypeError(f"expected seconds from 0.01 to 3600, got {shown(text)}")
    return seconds


def _seconds_or_none(text: str) -> float:
    return 0.0 if text == "0" else _seconds(text)


def _tcp(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host or "127.0.0.1", whole_number(0, 65_535)(port)


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
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: agent.stop())
    try:
        agent.run()
    except (JournalError, ReaderDied) as error:
        return _fail(str(error), EXIT_FAILED)
    return EXIT_OK


def _read(options: argparse.Namespace) -> int:
    from meter_agent.clock import SystemClock

    config = load_agent_config(options.config)
    names = _chosen(options, config)
    readers = _readers(options.config, config, SystemClock(require_synchronised=False))
    chosen = {name: readers[name] for name in names}
    try:
        if not options.watch:
            return _read_once(chosen, options.json, False)
        with contextlib.suppress(KeyboardInterrupt):
            for _ in _rounds(options.every):
                _read_once(chosen, options.json, True)
    finally:
        for reader in chosen.values():
            reader.close()
    return EXIT_OK


def _rounds(every_s: float) -> Iterator[None]:
    """Again and again, at the pace asked for or as fast as the meters are."""
    while True:
        next_s = time.monotonic() + every_s
        yield
        time.sleep(max(0.0, next_s - time.monotonic()))


def _read_once(readers: "dict[str, MeterReader]", as_json: bool, with_time: bool) -> int:
    from meter_agent.readings import ReadFailure

    code = EXIT_OK
    for name, reader in readers.items():
        try:
            sample = reader.sample()
        except ReadFailure as failure:
            code = _fail(str(failure), EXIT_FAILED)
            continue
        if as_json:
            print(json.dumps({"meter": name, **sample_json(sample)}), flush=True)
        else:
            print(f"{utc(sample.time_s)} " * with_time + f"{name}: {sample_text(sample)}", flush=True)
    return code


def _check_config(options: argparse.Namespace) -> int:
    if not options.json:
        config = _checked_config(options.config)
        print(f"{options.config}: fine; {len(config.meters)} meter(s): {', '.join(config.meters)}")
        return EXIT_OK
    try:
        config = _checked_config(options.config)
    except (ConfigError, KeyFileError) as error:
        print(commands.wrong_config_json(error))
        return EXIT_USAGE
    print(json.dumps({"ok": True, "file": str(options.config), "meters": list(config.meters)}))
    return EXIT_OK


def _checked_config(path: Path) -> AgentConfig:
    """The config, with everything that it names looked at. Raises ConfigError, KeyFileError."""
    from broker.protocol.keys import load_private_key
    from meter_agent.clock import SystemClock

    config = load_agent_config(path)
    for meter in config.meters.values():
        load_private_key(meter.key_file)
    _check_mqtt_files(path, config)
    _readers(path, config, SystemClock(require_synchronised=False))
    return config


def _status(options: argparse.Namespace) -> int:
    config = load_agent_config(options.config)
    return commands.status(options, config, _chosen(options, config))


def _certificate(options: argparse.Namespace) -> int:
    from broker.protocol.keys import load_private_key
    from meter_agent.certificates import NoCertificate, fetch

    config = load_agent_config(options.config)
    (meter,) = _chosen(options, config)
    _check_mqtt_files(options.config, config)
    key = load_private_key(config.meters[meter].key_file)
    try:
        fetch(config, meter, key, (options.from_s, options.to_s), options.out, options.timeout)
    except NoCertificate as error:
        return _fail(str(error), EXIT_FAILED)
    except OSError as error:
        return _fail(refused_by_system(error), EXIT_FAILED)
    print(f"{options.out}: check it with `energy-broker certificate verify {options.out} --trust TRUST.json`")
    return EXIT_OK


def _send_again(options: argparse.Namespace) -> int:
    from meter_agent.journal import Journal, JournalError

    config = load_agent_config(options.config)
    try:
        journal = Journal(config.agent.data_dir, config.agent.keep_days)
        try:
            count = journal.send_again(options.from_s)
        finally:
            journal.close()
    except JournalError as error:
        return _fail(f"{error}; stop the agent for this, if it runs", EXIT_FAILED)
    print(f"{count} intervals wait to be sent again when the agent runs")
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
    """Raises ConfigError and KeyFileError for a file that the MQTT settings name and that cannot be used."""
    from broker.protocol.mqtt_link import check_files

    servers = {"mqtt": config.mqtt}
    if config.home_assistant is not None and config.home_assistant.mqtt is not None:
        servers["home_assistant.mqtt"] = config.home_assistant.mqtt
    for where, server in servers.items():
        for key in ("password_file", "ca_file", "certificate_file", "key_file"):
            file = getattr(server, key)
            if file is not None and not os.access(file, os.R_OK):
                raise ConfigError(path, f"{where}.{key}", f"a file that this user can read, and {file} is none")
        check_files(server)


def _fail(text: str, code: int) -> int:
    print(f"meter-agent: {text}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
