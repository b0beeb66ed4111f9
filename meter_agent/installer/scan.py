"""`meter-agent scan`: which meters hang on a serial port or behind a TCP host, and which profile fits each.

A list of probes looks one after the other. On a serial port the listeners come first, because a meter that pushes its
telegrams says by itself what it is, and nobody has to be asked. Then a Wi-SUN adapter is asked for, a meter that signs
on, the meters on an M-Bus, and at last the Modbus probe asks every device id at every line setting. The first probe
that finds something is the last: what it found has the line to itself or shares it with its like. A further protocol
is one more `Listener` in `listeners()`, or one more class with `look`.

What cannot be found: pulse outputs (S0), which say nothing, and whether a meter is in reach of a Wi-SUN adapter, which
takes route B's id and password.

An id where nobody answers costs two short requests, one that answers at most `ScanLimits.device_s`.
"""

import contextlib
import re
import termios
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import serial

from meter_agent import decode
from meter_agent.config import BRouteConfig, Iec62056Config, MBusConfig
from meter_agent.framing import hdlc, iec62056_21, p1, sml
from meter_agent.framing.dlms import parse_list
from meter_agent.framing.mbus import ACKNOWLEDGE, ANYBODY, SND_NKE, MalformedFrame, NoAnswer, short_frame
from meter_agent.framing.p1_encrypted import EncryptedFrameFinder
from meter_agent.framing.telegram import MalformedTelegram, TelegramReading
from meter_agent.installer.identify import Fit, Look, Verdict, equally_good, judge, ranked
from meter_agent.profiles import MeterProfile, Pauses, Quantity, SerialDefaults, load_profile, profile_names
from meter_agent.readers.iec62056_21 import create_iec62056_21_reader
from meter_agent.readers.mbus import MBusLine, MBusReader
from meter_agent.readers.modbus import LineFailure, ModbusLine, ModbusReader, SerialTarget, TcpTarget
from meter_agent.readings import Clock, ReadFailure, Sample
from meter_agent.request_plan import Span

READ_BYTES: Final = 4_096
_LISTEN_STEP_S: Final = 0.2
_PRESENCE: Final = (Span(3, 0, 2), Span(4, 0, 2))
"""Any meter answers one of these, with registers or with an exception. Two, because some demand pairs of registers."""

_PRESENCE_PAUSES: Final = Pauses(late_reply_ms=100)
_GATEWAY_EXCEPTIONS: Final = (10, 11)
"""The gateway speaks for a device that is not there."""

_MBUS_BAUD_RATES: Final = (2_400, 9_600, 300)

_SKVER: Final = b"SKVER\r\n"
_EVER: Final = re.compile(rb"EVER [0-9.]{1,20}(?=\r)")

Progress = Callable[[str], None]


class ScanFailed(Exception):
    """Nothing can be asked at all; the text says what to do."""


@dataclass(frozen=True, slots=True)
class ScanLimits:
    """How long to wait: for a reply, for all questions to one device, and for telegrams at one line setting."""

    reply_s: float
    device_s: float
    listen_s: float


@dataclass(slots=True)
class Found:
    """A meter that was found. `reader` is the table for the agent's config, `verdicts` are empty where none is needed.

    `device_ids` grows while the scan goes on, if the same meter answers to several.
    """

    where: str
    device_ids: list[int]
    reader: dict[str, Any]
    sample: Sample | None
    verdicts: tuple[Verdict, ...] = ()
    note: str = ""


class Probe(Protocol):
    """One way to look for meters on a port or host."""

    def look(self, progress: Progress) -> Iterator[Found]:
        """Yield what is found, as it is found. Raises ScanFailed."""
        ...


# Listening


class Framer(Protocol):
    """Cuts a stream into telegrams, whatever else is between them."""

    def feed(self, data: bytes) -> Sequence[Any]:
        """The telegrams that `data` completes. Never raises."""
        ...


@dataclass(frozen=True, slots=True)
class Listener:
    """A protocol whose meters push: its line, how its telegrams are found and read, and what its config says then.

    `parse` raises MalformedTelegram. `reader` is the table of the config without the port.
    """

    reader: dict[str, Any]
    line: SerialDefaults
    new_framer: Callable[[], Framer]
    parse: Callable[[Any], TelegramReading]
    note: str = "it pushes telegrams"


def listeners() -> tuple[Listener, ...]:
    """All protocols that are listened for, at the line settings of their standards."""
    even, none = SerialDefaults(2_400, "E"), SerialDefaults(2_400, "N")
    # The seven bits of IEC 62056-21 and their parity are checked by its framing.
    fast = {"protocol": "iec62056_21", "mode": "D", "baud": 9_600}
    slow = {"protocol": "iec62056_21", "mode": "D", "baud": 2_400}
    pushed = (iec62056_21.Iec62056Framer, iec62056_21.parse_telegram)
    return (
        Listener({"protocol": "p1", "baud": 115_200}, SerialDefaults(115_200, "N"), p1.P1Framer, p1.parse_telegram),
        Listener(
            {"protocol": "p1", "baud": 115_200, "encryption_key_file": "", "authentication_key_file": ""},
            SerialDefaults(115_200, "N"),
            EncryptedFrameFinder,
            lambda _frame: TelegramReading(None, None, None, None),
            "it pushes what looks like encrypted telegrams; the grid operator has the keys",
        ),
        Listener({"protocol": "sml", "baud": 9_600}, SerialDefaults(9_600, "N"), sml.SmlFramer, sml.parse_frame),
        Listener(fast, SerialDefaults(9_600, "N"), *pushed),
        Listener({"protocol": "dlms", "baud": 2_400, "parity": "E"}, even, hdlc.HdlcFramer, _dlms_reading),
        Listener({"protocol": "dlms", "baud": 2_400, "parity": "N"}, none, hdlc.HdlcFramer, _dlms_reading),
        Listener(slow, none, *pushed),
    )


def _dlms_reading(message: bytes) -> TelegramReading:
    """What a DLMS list says. One that cannot be read without the utility's key is a find all the same."""
    try:
        pushed = parse_list(message)
    except MalformedTelegram:
        return TelegramReading(None, None, None, None)
    return TelegramReading(pushed.import_mwh, pushed.export_mwh, pushed.power_w, pushed.meter_id)


class ListenProbe:
    """Listens at each line setting for telegrams that meters push by themselves."""

    def __init__(self, port: Path, known: Sequence[Listener], limits: ScanLimits, clock: Clock) -> None:
        self._port = port
        self._limits = limits
        self._clock = clock
        self._by_line: dict[SerialDefaults, list[Listener]] = {}
        for listener in known:
            self._by_line.setdefault(listener.line, []).append(listener)

    def look(self, progress: Progress) -> Iterator[Found]:
        """Ends at the first telegram: a line has one meter that pushes. Raises ScanFailed if no setting works."""
        failures = []
        for line, known in self._by_line.items():
            names = ", ".join(listener.reader["protocol"] for listener in known)
            progress(f"listening for {names} at {line_text(line)} for {self._limits.listen_s:g} s")
            try:
                found = self._listen(line, known)
            except ScanFailed as failure:
                # Not every adapter can do each of them.
                failures.append(failure)
                continue
            if found is not None:
                yield found
                return
        if len(failures) == len(self._by_line):
            raise failures[0]

    def _listen(self, line: SerialDefaults, known: list[Listener]) -> Found | None:
        framers = [(listener, listener.new_framer()) for listener in known]
        ends_s = self._clock.monotonic_s() + self._limits.listen_s
        with _opened(self._port, line) as handle:
            while self._clock.monotonic_s() < ends_s:
                data = _received(handle)
                for listener, framer in framers:
                    for telegram in framer.feed(data):
                        with contextlib.suppress(MalformedTelegram):
                            return self._found(listener, listener.parse(telegram))
        return None

    def _found(self, listener: Listener, reading: TelegramReading) -> Found:
        sample = Sample(
            self._clock.monotonic_s(),
            self._clock.time_s(),
            reading.import_mwh,
            reading.export_mwh,
            reading.power_w,
            reading.serial_number,
        )
        reader = {**listener.reader, "port": str(self._port)}
        return Found(f"{self._port} {line_text(listener.line)}", [], reader, sample, note=listener.note)


def _opened(port: Path, line: SerialDefaults) -> serial.Serial:
    try:
        return serial.Serial(
            str(port),
            baudrate=line.baud,
            bytesize=line.data_bits,
            parity=line.parity,
            stopbits=line.stop_bits,
            timeout=_LISTEN_STEP_S,
            exclusive=True,
        )
    except (OSError, ValueError, termios.error) as error:
        raise ScanFailed(SerialTarget(port, line).cannot_open()) from error


def _received(handle: serial.Serial) -> bytes:
    try:
        data: bytes = handle.read(1)
        return data + handle.read(min(handle.in_waiting, READ_BYTES)) if data else b""
    except (OSError, termios.error) as error:
        raise ScanFailed(f"the serial port {handle.port} is gone ({error}); is the adapter plugged in?") from error


# Asking


class SignOnProbe:
    """Asks for a meter that speaks IEC 62056-21 mode C: an optical head, or a meter with a current loop."""

    def __init__(self, port: Path, timeout_s: float, clock: Clock) -> None:
        """`timeout_s` is for a whole conversation, and that is what an empty line costs."""
        self._port = port
        self._timeout_s = timeout_s
        self._clock = clock

    def look(self, progress: Progress) -> Iterator[Found]:
        """Yields the meter that has answered with its data."""
        config = Iec62056Config("iec62056_21", self._port, "C", timeout_s=self._timeout_s)
        where = f"{self._port} {config.start_baud} 7E1"
        progress(f"{where}: asking for an iec62056_21 meter for {self._timeout_s:g} s")
        reader = create_iec62056_21_reader("scan", config, self._clock)
        try:
            sample = reader.sample()
        except ReadFailure:
            return
        finally:
            reader.close()
        table = {"protocol": "iec62056_21", "mode": "C", "port": str(self._port)}
        yield Found(where, [], table, sample, note="it answers a sign-on")


class WiSunProbe:
    """Asks for an adapter that speaks SKSTACK-IP, as Japanese meters need."""

    def __init__(self, port: Path, timeout_s: float, clock: Clock) -> None:
        self._port = port
        self._timeout_s = timeout_s
        self._clock = clock

    def look(self, progress: Progress) -> Iterator[Found]:
        """Yields the adapter; what the meter behind it shows only route B's id and password would tell."""
        config = BRouteConfig("broute", self._port, "", Path())
        where = f"{self._port} {config.baud} 8N1"
        progress(f"{where}: asking for a Wi-SUN adapter for {self._timeout_s:g} s")
        version = self._version(SerialDefaults(config.baud, "N"))
        if version is not None:
            note = f"a Wi-SUN adapter ({version}); fill in route B's id and password, and see `meter-agent read`"
            table = {"protocol": "broute", "port": str(self._port), "route_b_id": "", "password_file": ""}
            yield Found(where, [], table, None, note=note)

    def _version(self, line: SerialDefaults) -> str | None:
        """What it answers to SKVER, for example "EVER 1.2.10"."""
        received = b""
        ends_s = self._clock.monotonic_s() + self._timeout_s
        try:
            with _opened(self._port, line) as handle:
                handle.write(_SKVER)
                while self._clock.monotonic_s() < ends_s and len(received) < READ_BYTES:
                    received += _received(handle)
                    found = _EVER.search(received)
                    if found is not None:
                        return found[0].decode().strip()
        except (ScanFailed, OSError, termios.error):
            # Not every adapter can do this baud rate; the next probe says so if none can be opened at all.
            return None
        return None


class MBusProbe:
    """Asks each primary address on a wired M-Bus, if anybody there answers at all."""

    def __init__(
        self,
        port: Path,
        settings: Sequence[SerialDefaults],
        addresses: Sequence[int],
        timeout_s: float,
        clock: Clock,
        library: Any,
    ) -> None:
        """`library` is the module meterbus."""
        self._port = port
        self._settings = settings
        self._addresses = addresses
        self._timeout_s = timeout_s
        self._clock = clock
        self._library = library

    def look(self, progress: Progress) -> Iterator[Found]:
        """Yields each meter; a setting at which nobody answers costs one request."""
        for setting in self._settings:
            line = MBusLine(self._port, setting.baud, setting.parity, self._clock.monotonic_s)
            where = f"{self._port} {line_text(setting)}"
            found = 0
            try:
                progress(f"{where}: asking for anybody on an M-Bus")
                if not self._answers(line, ANYBODY):
                    continue
                for position, address in enumerate(self._addresses, start=1):
                    progress(f"{where}: asking M-Bus address {address} ({position} of {len(self._addresses)})")
                    if self._answers(line, address):
                        found += 1
                        yield self._read(line, where, address)
            except ReadFailure as failure:
                # Not every adapter can do each setting.
                progress(f"{where}: {failure.reason}")
            finally:
                line.close()
            if found:
                return

    def _answers(self, line: MBusLine, address: int) -> bool:
        """True if the meter acknowledges; of ANYBODY also if something comes that is two answers at once, perhaps."""
        try:
            answer = line.exchange("scan", short_frame(SND_NKE, address), self._timeout_s)
        except NoAnswer:
            return False
        except MalformedFrame:
            return address == ANYBODY
        return answer == bytes([ACKNOWLEDGE])

    def _read(self, line: MBusLine, where: str, address: int) -> Found:
        config = MBusConfig("mbus", self._port, address, line.baud, line.parity, timeout_s=self._timeout_s)
        table = {"protocol": "mbus", "port": str(self._port), "address": address}
        table |= {"baud": line.baud, "parity": line.parity}
        try:
            sample = MBusReader("scan", config, line, self._clock, self._library).sample()
        except ReadFailure as failure:
            return Found(where, [address], table, None, note=failure.reason)
        return Found(where, [address], table, sample, note="it answers on an M-Bus")


def mbus_settings(baud: int | None, parity: Any) -> list[SerialDefaults]:
    """The line settings to try for M-Bus: as given, else those of the standard, the commonest first."""
    return [SerialDefaults(each, parity or "E") for each in ((baud,) if baud is not None else _MBUS_BAUD_RATES)]


def line_settings(profiles: Iterable[MeterProfile], baud: int | None, parity: str | None) -> list[SerialDefaults]:
    """The line settings to try, the commonest first: as given, and what is left open as meters are delivered."""
    counts: dict[SerialDefaults, int] = {}
    for profile in profiles:
        line = profile.serial_line
        if line is not None and baud in (None, line.baud) and parity in (None, line.parity):
            counts[line] = counts.get(line, 0) + 1
    settings = sorted(counts, key=lambda line: -counts[line])
    if baud is not None:
        given: list[Any] = [parity] if parity is not None else ["N", "E"]
        # Installers change the baud rate more often than the parity.
        settings += [SerialDefaults(baud, each) for each in given if baud not in {line.baud for line in settings}]
    return settings


def line_text(line: SerialDefaults) -> str:
    """For example "9600 8N1"."""
    return f"{line.baud} {line.data_bits}{line.parity}{line.stop_bits}"


class ModbusProbe:
    """Asks each device id on one line or host, and tries every profile on those that answer."""

    def __init__(
        self,
        targets: Sequence[TcpTarget | SerialTarget],
        device_ids: Sequence[int],
        profiles: Sequence[MeterProfile],
        limits: ScanLimits,
        clock: Clock,
        new_line: Callable[[TcpTarget | SerialTarget], ModbusLine] = ModbusLine,
    ) -> None:
        """`targets` are one host, or one serial port with different line settings."""
        self._targets = targets
        self._device_ids = device_ids
        self._profiles = profiles
        self._limits = limits
        self._clock = clock
        self._new_line = new_line
        self._found: dict[int, Found] = {}

    def look(self, progress: Progress) -> Iterator[Found]:
        """Yields each device once; one that answers to several ids on TCP is told apart by its serial number.

        Raises ScanFailed if the port or host can be opened at no setting; not every adapter can do each of them.
        """
        failures = []
        for target in self._targets:
            line = self._new_line(target)
            try:
                yield from self._look_on(line, target, progress)
            except ScanFailed as failure:
                progress(f"{_place(target)}: {failure}")
                failures.append(failure)
            finally:
                line.close()
        if len(failures) == len(self._targets):
            raise failures[0]

    def _look_on(self, line: ModbusLine, target: TcpTarget | SerialTarget, progress: Progress) -> Iterator[Found]:
        where = _place(target)
        for position, device_id in enumerate(self._device_ids, start=1):
            # Found at another line setting already: a pseudo-terminal and some adapters have none.
            if device_id in self._found:
                continue
            progress(f"{where}: asking device {device_id} ({position} of {len(self._device_ids)})")
            if not self._answers(line, device_id):
                continue
            same = self._same_as(line, device_id) if isinstance(target, TcpTarget) else None
            if same is not None:
                progress(f"{where}: device {device_id} is the same meter as device {same.device_ids[0]}")
                same.device_ids.append(device_id)
                self._found[device_id] = same
                continue
            progress(f"{where}: device {device_id} answers; looking for its profile")
            found = self._identify(line, target, where, device_id)
            self._found[device_id] = found
            yield found

    def _answers(self, line: ModbusLine, device_id: int) -> bool:
        for request in _PRESENCE:
            try:
                line.read(device_id, request, _PRESENCE_PAUSES, self._limits.reply_s)
            except LineFailure as failure:
                if line.connections == 0:
                    raise ScanFailed(failure.reason) from failure
                if failure.exception_code is not None and failure.exception_code not in _GATEWAY_EXCEPTIONS:
                    return True
            else:
                return True
        return False

    def _same_as(self, line: ModbusLine, device_id: int) -> Found | None:
        """The meter found before that answers here as well: its profile reads the same serial number."""
        for other in self._found.values():
            if other.sample is None or other.sample.serial_number is None or not other.verdicts:
                continue
            sample = self._sample(line, device_id, load_profile(other.verdicts[0].profile))
            if sample is not None and sample.serial_number == other.sample.serial_number:
                return other
        return None

    def _identify(self, line: ModbusLine, target: TcpTarget | SerialTarget, where: str, device_id: int) -> Found:
        ends_s = self._clock.monotonic_s() + self._limits.device_s
        verdicts, untried = [], 0
        for profile in self._profiles:
            if self._clock.monotonic_s() > ends_s:
                untried += 1
                continue
            verdicts.append(judge(self._look_with(line, device_id, profile)))
        kept = ranked(verdicts)
        note = f"{untried} profiles were not tried, the meter is slow; raise --device-time" if untried else ""
        reader = _reader_table(target, device_id, kept[0].profile if kept else None)
        return Found(where, [device_id], reader, kept[0].sample if kept else None, kept, note)

    def _look_with(self, line: ModbusLine, device_id: int, profile: MeterProfile) -> Look:
        sample = self._sample(line, device_id, profile)
        identity = profile.identity
        if sample is None or identity is None:
            return Look(profile, sample)
        span = Span(identity.function_code, identity.address, identity.count)
        try:
            words = line.read(device_id, span, profile.pauses, self._limits.reply_s)
            model = decode.model(identity, words)
        except (LineFailure, decode.UnusableValue):
            return Look(profile, sample, doubt="it does not say its model where this family does")
        if model is None:
            return Look(profile, sample, doubt="it names a model that this profile does not know", contradicted=True)
        return Look(profile, sample, model)

    def _sample(self, line: ModbusLine, device_id: int, profile: MeterProfile) -> Sample | None:
        """What the profile reads, None if it has neither counter there."""
        counters: tuple[Quantity, ...] = ("import", "export")
        for counter in counters:
            if profile.registers is not None and counter not in profile.registers:
                continue
            billed: Any = counter
            reader = ModbusReader("scan", profile, billed, line, device_id, self._limits.reply_s, self._clock)
            try:
                return reader.sample()
            except ReadFailure:
                continue
        return None


def _place(target: TcpTarget | SerialTarget) -> str:
    return str(target) if isinstance(target, TcpTarget) else f"{target} {line_text(target.line)}"


def _reader_table(target: TcpTarget | SerialTarget, device_id: int, profile: str | None) -> dict[str, Any]:
    table: dict[str, Any]
    if isinstance(target, TcpTarget):
        table = {"protocol": "modbus_tcp", "host": target.host, "port": target.port}
    else:
        table = {"protocol": "modbus_rtu", "port": str(target.port), "baud": target.line.baud}
        table |= {"parity": target.line.parity, "stop_bits": target.line.stop_bits}
    table["device_id"] = device_id
    if profile is not None:
        table["profile"] = profile
    return table


def all_profiles() -> list[MeterProfile]:
    """Every installed profile. Raises ConfigError."""
    return [load_profile(name) for name in profile_names()]


class RealClock:
    """Real time, as waiting for a wire always is."""

    def monotonic_s(self) -> float:
        """Seconds that never step."""
        return time.monotonic()

    def time_s(self) -> float:
        """UTC epoch seconds."""
        return time.time()


def fit_text(found: Found) -> str:
    """Which profile fits, in words for a table."""
    if not found.verdicts:
        protocol: str = found.reader["protocol"]
        return "none fits" if found.sample is None and protocol.startswith("modbus") else protocol
    best = found.verdicts[0]
    names = " or ".join(equally_good(found.verdicts))
    word = {Fit.CERTAIN: "certain", Fit.LIKELY: "likely"}.get(best.fit, "perhaps")
    return f"{names} ({word})"
