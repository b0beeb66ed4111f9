"""The commands `scan`, `simulate`, `profiles` and `status` of `meter-agent`: from options to text and exit code."""

import argparse
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from broker.protocol.addresses import Host
from broker.protocol.command_line import shown, whole_number
from firmware_config.loader import ConfigError, WrongValue
from meter_agent.profiles import UnknownProfile, load_profile
from meter_agent.shown import kwh, sample_json

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2

MAX_DEVICE_ID: Final = 247
SERIAL_REPLY_S: Final = 0.5
TCP_REPLY_S: Final = 1.0
DEFAULT_TCP_PORT: Final = 502

_IDS: Final = re.compile(r"(\d{1,3})(?:-(\d{1,3}))?")
_METER: Final = re.compile(r"([a-z0-9-]+)(?::(\d{1,3}))?")


class WrongOptions(Exception):
    """Options that do not fit together; the text says what to change."""


def device_ids(text: str) -> list[int]:
    """An argument's type: `1-16,200` as numbers, each once and in order."""
    found: dict[int, None] = {}
    for part in text.split(","):
        match = _IDS.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match is not None else (-1, -1)
        if not 0 <= first <= last <= MAX_DEVICE_ID:
            raise argparse.ArgumentTypeError(f"expected ids up to {MAX_DEVICE_ID} as 1-16,200, got {shown(text)}")
        found.update(dict.fromkeys(range(first, last + 1)))
    return list(found)


# Profiles


def profiles(options: argparse.Namespace) -> int:
    """`profiles [WORD …]` and `profiles show NAME`. Raises ConfigError, WrongOptions."""
    from meter_agent.installer import listing

    if options.words[:1] == ["show"]:
        if len(options.words) != 2:
            raise WrongOptions("profiles show: expected one name of a profile; `meter-agent profiles` lists them")
        profile = _profile(options.words[1])
        print(json.dumps(listing.profile_json(profile)) if options.json else listing.description(profile))
        return EXIT_OK
    found = [entry for entry in listing.entries() if entry.matches(options.words)]
    if options.json:
        for entry in found:
            print(json.dumps(entry.as_json()))
    elif found:
        print(listing.table(found))
    if not found:
        print(f"meter-agent: no profile has {' and '.join(options.words)} in it; try fewer words", file=sys.stderr)
    return EXIT_OK if found else EXIT_FAILED


def _profile(name: str) -> Any:
    try:
        return load_profile(name)
    except UnknownProfile as error:
        raise WrongOptions(str(error)) from error


# Scan


def scan(options: argparse.Namespace) -> int:
    """`scan`: what is found goes to stdout at the end, progress to stderr. Raises ConfigError, WrongOptions."""
    from meter_agent.installer.scan import ScanFailed

    progress = _Progress()
    found: list[Any] = []
    try:
        for probe in _probes(options, progress.note):
            before = len(found)
            for meter in probe.look(progress.say):
                found.append(meter)
                progress.note(_found_text(meter))
            if len(found) > before:
                # Who pushes or signs on has the line to itself, and a bus has meters of one kind.
                break
    except KeyboardInterrupt:
        progress.note("stopped; this was found so far")
    except ScanFailed as error:
        progress.end()
        print(f"meter-agent: {error}", file=sys.stderr)
        return EXIT_FAILED
    progress.end()
    if options.json:
        for meter in found:
            print(json.dumps(_found_json(meter)))
    elif found:
        print(_found_table(found))
    if not found:
        print(
            "meter-agent: no meter found; check wiring, baud rate and ids, and that no agent runs here", file=sys.stderr
        )
    return EXIT_OK if found else EXIT_FAILED


def _probes(options: argparse.Namespace, note: Callable[[str], None]) -> Iterable[Any]:
    from meter_agent.installer.scan import (
        ListenProbe,
        MBusProbe,
        ModbusProbe,
        RealClock,
        ScanLimits,
        SignOnProbe,
        WiSunProbe,
        all_profiles,
        line_settings,
        listeners,
        mbus_settings,
    )
    from meter_agent.readers.mbus import import_meterbus
    from meter_agent.readers.modbus import SerialTarget, TcpTarget

    clock = RealClock()
    known = [_profile(options.profile)] if options.profile is not None else all_profiles()
    if options.host is not None:
        expected = Host().check(options.host)
        if expected is not None:
            raise WrongOptions(f"scan: --host: expected {expected}")
        if options.baud is not None or options.parity is not None:
            raise WrongOptions("scan: --baud and --parity are for a serial port, not for --host")
        try:
            port = whole_number(1, 65_535)(options.port or str(DEFAULT_TCP_PORT))
        except argparse.ArgumentTypeError as error:
            raise WrongOptions(f"scan: --port together with --host: {error}") from None
        limits = ScanLimits(options.timeout or TCP_REPLY_S, options.device_time, options.listen)
        yield ModbusProbe([TcpTarget(options.host, port)], options.ids, known, limits, clock)
        return
    if options.port is None:
        raise WrongOptions("scan: expected --port with a serial port, or --host")
    path = Path(options.port)
    limits = ScanLimits(options.timeout or SERIAL_REPLY_S, options.device_time, options.listen)
    if options.listen > 0:
        yield ListenProbe(path, listeners(), limits, clock)
    if options.wi_sun > 0:
        yield WiSunProbe(path, options.wi_sun, clock)
    if options.sign_on > 0:
        yield SignOnProbe(path, options.sign_on, clock)
    if options.mbus > 0:
        try:
            library = import_meterbus("scan")
        except WrongValue:
            note("M-Bus is not asked for; that needs `pip install 'dengen[mbus]'`")
        else:
            # Meters leave the factory with address 0.
            addresses = list(dict.fromkeys((0, *options.ids)))
            line_choices = mbus_settings(options.baud, options.parity)
            yield MBusProbe(path, line_choices, addresses, options.mbus, clock, library)
    settings = line_settings(known, options.baud, options.parity)
    if not settings:
        raise WrongOptions("scan: no profile says how this line is set; give --baud")
    yield ModbusProbe([SerialTarget(path, line) for line in settings], options.ids, known, limits, clock)


class _Progress:
    """One line on stderr that is written over on a terminal; a line each elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()

    def say(self, text: str) -> None:
        """What is being done right now."""
        print(f"\r\x1b[K{text}" if self._terminal else text, file=sys.stderr, end="" if self._terminal else "\n")
        sys.stderr.flush()

    def note(self, text: str) -> None:
        """Something that stays to be read."""
        self.end()
        print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the line free."""
        if self._terminal:
            print("\r\x1b[K", file=sys.stderr, end="", flush=True)


def _found_text(found: Any) -> str:
    from meter_agent.installer.scan import fit_text

    device = f" device {found.device_ids[0]}" if found.device_ids else ""
    return f"found: {found.where}{device}: {fit_text(found)}"


def _found_json(found: Any) -> dict[str, Any]:
    from meter_agent.installer.identify import equally_good

    return {
        "where": found.where,
        "device_ids": found.device_ids,
        "reader": found.reader,
        "fit": found.verdicts[0].fit.name.lower() if found.verdicts else None,
        "profiles": list(equally_good(found.verdicts)) if found.verdicts else [],
        "model": found.verdicts[0].model if found.verdicts else None,
        "reasons": list(found.verdicts[0].reasons) if found.verdicts else [],
        "reading": sample_json(found.sample) if found.sample is not None else None,
        "note": found.note,
    }


def _found_table(found: list[Any]) -> str:
    from meter_agent.installer.listing import columns
    from meter_agent.installer.scan import fit_text

    rows: list[tuple[str, ...]] = [("WHERE", "DEVICE", "PROFILE", "IMPORT", "EXPORT", "POWER", "SERIAL", "WHY")]
    for meter in found:
        sample, best = meter.sample, meter.verdicts[0] if meter.verdicts else None
        reasons = [*(best.reasons if best is not None else ()), *filter(None, [meter.note])]
        rows.append(
            (
                meter.where,
                _ids_text(meter.device_ids),
                fit_text(meter),
                _kwh_cell(sample.import_mwh if sample is not None else None),
                _kwh_cell(sample.export_mwh if sample is not None else None),
                f"{sample.power_w} W" if sample is not None and sample.power_w is not None else "-",
                (sample.serial_number if sample is not None else None) or "-",
                "; ".join(reasons),
            )
        )
    snippets = [_toml(number, meter.reader) for number, meter in enumerate(found, start=1)]
    return "\n\n".join([columns(rows), "For the agent's config:", *snippets])


def _kwh_cell(energy_mwh: int | None) -> str:
    return f"{kwh(energy_mwh)} kWh" if energy_mwh is not None else "-"


def _ids_text(ids: list[int]) -> str:
    if len(ids) > 2:
        return f"{ids[0]} (and {len(ids) - 1} more ids)"
    return ", ".join(map(str, ids)) or "-"


def _toml(number: int, reader: dict[str, Any]) -> str:
    # JSON writes text and numbers as TOML does.
    return "\n".join(
        [f"[meters.meter-{number}.reader]", *(f"{key} = {json.dumps(value)}" for key, value in reader.items())]
    )


# Simulate


def simulate(options: argparse.Namespace) -> int:
    """`simulate`: serves until SIGINT or SIGTERM. Raises ConfigError, WrongOptions."""
    from meter_agent.installer.encode import CannotShow
    from meter_agent.installer.simulator import CannotServe, Simulator, Wires

    if options.tcp is None and options.pty is None:
        raise WrongOptions("simulate: expected --tcp or --pty, or both")
    try:
        meters = _simulated_meters(options)
        with Simulator(meters, Wires(options.tcp, options.pty), _now_us) as simulator:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda _number, _frame: simulator.stop())
            _say_where(options, simulator.tcp, meters)
            simulator.read_commands(sys.stdin.fileno())
            simulator.serve()
    except CannotShow as error:
        raise WrongOptions(f"simulate: {error}") from error
    except CannotServe as error:
        print(f"meter-agent: {error}", file=sys.stderr, flush=True)
        return EXIT_FAILED
    return EXIT_OK


def _now_us() -> int:
    return time.monotonic_ns() // 1_000


def _simulated_meters(options: argparse.Namespace) -> list[Any]:
    from meter_agent.installer.encode import MeterValues
    from meter_agent.installer.simulator import SimulatedMeter

    meters: dict[int, SimulatedMeter] = {}
    for text in options.meters:
        match = _METER.fullmatch(text)
        if match is None:
            raise WrongOptions(f"simulate: {text}: expected PROFILE or PROFILE:ID, as eastron-sdm630:2")
        device_id = int(match[2]) if match[2] else max(meters, default=0) + 1
        if device_id in meters or not 1 <= device_id <= MAX_DEVICE_ID:
            raise WrongOptions(f"simulate: {text}: expected a device id from 1 to {MAX_DEVICE_ID}, each once")
        serial_number = options.serial if options.serial is not None else str(1_000 + device_id)
        values = MeterValues(1_000 * options.import_wh, 1_000 * options.export_wh, options.power_w, serial_number)
        meters[device_id] = SimulatedMeter(_profile(match[1]), device_id, values, _now_us())
    return list(meters.values())


def _say_where(options: argparse.Namespace, tcp: tuple[str, int] | None, meters: list[Any]) -> None:
    if options.json:
        served = [{"profile": meter.profile.name, "device_id": meter.device_id} for meter in meters]
        place = {"host": tcp[0], "port": tcp[1]} if tcp is not None else None
        print(
            json.dumps({"tcp": place, "pty": str(options.pty) if options.pty else None, "meters": served}), flush=True
        )
        return
    places = ([f"{tcp[0]}:{tcp[1]}"] if tcp is not None else []) + ([str(options.pty)] if options.pty else [])
    for meter in meters:
        print(f"{meter.profile.name} is device {meter.device_id} at {' and '.join(places)}", flush=True)
    print("type: [DEVICE] import WH | export WH | power W | serial NUMBER; Ctrl-C ends", flush=True)


# Status


def status(options: argparse.Namespace, config: Any, meters: list[str]) -> int:
    """`status` of one agent."""
    from meter_agent.installer.status import gather, text
    from meter_agent.journal import JournalError

    try:
        found = gather(config, meters, options.last, int(time.time()))
    except JournalError as error:
        print(f"meter-agent: {error}", file=sys.stderr, flush=True)
        return EXIT_FAILED
    print(json.dumps(found) if options.json else text(found))
    return EXIT_OK


def wrong_config_json(error: Exception) -> str:
    """What `check-config --json` says of a config that cannot be used."""
    place = (
        {"file": str(error.file), "key": error.key} if isinstance(error, ConfigError) else {"file": None, "key": None}
    )
    return json.dumps({"ok": False, **place, "error": str(error)})
