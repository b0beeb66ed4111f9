"""Reads meters over Modbus TCP and Modbus RTU: a thin shell over pymodbus 3.16's synchronous clients.

What a meter says in which register comes from its profile, requests from `request_plan`, values from `decode`. This
module owns sockets, serial ports and waiting, and the rules that keep one reply from being taken for another:

- A request is sent once (`retries=0`). With pymodbus' own retries a late reply to the first request is taken as the
  reply to the next one, and everything stays shifted by one from then on.
- After a reply that did not come, or did not fit, a serial port is closed, left alone until the meter has certainly
  finished (`pauses.late_reply_ms` of its profile) and opened again; pymodbus empties the input before it sends. On TCP
  a fresh connection is enough.
- A reply must have the function code and the number of registers that were asked for; pymodbus checks neither.

Failures are reported once, as ReadFailure, with what the operator can do; the next `sample()` connects again.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import ClassVar, Final, Literal, TypeAlias

from pymodbus.client import ModbusSerialClient, ModbusTcpClient
from pymodbus.exceptions import ConnectionException, ModbusException
from pymodbus.pdu import ModbusPDU

from firmware_config.loader import WrongValue
from meter_agent import decode
from meter_agent.config import ModbusRtuConfig, ModbusTcpConfig, NamedMeter
from meter_agent.profiles import (
    MeterProfile,
    Pauses,
    Quantity,
    Register,
    SerialDefaults,
    SunSpecMap,
    SunSpecModel,
    UnknownProfile,
    load_profile,
    words_in,
)
from meter_agent.readings import Clock, ReadFailure, Sample
from meter_agent.request_plan import Span, plan_requests

log = logging.getLogger("meter-agent")

SERIAL_NUMBER_MAX_AGE_S: Final = 900
"""How often the serial number is read again while nothing happens, so that a swapped meter is noticed in time."""

MAX_SUNSPEC_MODELS: Final = 64
"""Longest chain of SunSpec models that is followed; real devices have up to about 30."""

MAX_BUFFERED_BYTES: Final = 1_024
"""A reply has at most 260 bytes. Who sends more than this without one in it is not answering us."""

_SUNSPEC_MARK: Final = (0x5375, 0x6E53)
_SUNSPEC_END: Final = 0xFFFF
_SUNSPEC_COMMON: Final = 1
_SUNSPEC_HEADER: Final = 2

_EXCEPTIONS: Final = {
    1: "illegal function: the profile is for another kind of meter",
    2: "illegal data address: the meter has no such register, so the profile does not fit it",
    3: "illegal data value: the meter refuses requests of this length",
    4: "device failure: the meter reports a fault of its own",
    5: "acknowledge: the meter is busy with a long command",
    6: "device busy: the meter works for another client",
    8: "memory parity error: the meter reports a fault of its own",
    10: "gateway path unavailable: the gateway's serial side is not set up",
    11: "gateway target did not respond: check the device id, and the wiring behind the gateway",
}


_NO_SUCH_REGISTERS: Final = (1, 2, 3)


class LineFailure(Exception):
    """A request without a usable reply. `refused`: the meter did answer, that it has no such registers.

    `exception_code` is the Modbus exception that came in place of registers, None if none did.
    """

    def __init__(self, reason: str, refused: bool = False, exception_code: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.refused = refused
        self.exception_code = exception_code


@dataclass(frozen=True, slots=True)
class TcpTarget:
    """Where a Modbus TCP server listens."""

    ADVICE: ClassVar[str] = "check the device id and, behind a gateway, its serial side"

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def cannot_open(self) -> str:
        """Why there is no connection, as far as we can tell."""
        return f"no Modbus TCP server answers at {self}; is it switched on, and are host and port right?"


@dataclass(frozen=True, slots=True)
class SerialTarget:
    """A serial port and how its line is set."""

    ADVICE: ClassVar[str] = "check device id, baud rate, parity and wiring"

    port: Path
    line: SerialDefaults

    def __str__(self) -> str:
        return str(self.port)

    def cannot_open(self) -> str:
        """Why the port cannot be opened, as far as we can tell."""
        if not os.path.exists(self.port):  # False, too, where the path itself is too long.
            return f"the serial port {self.port} is missing; is the adapter plugged in? (see /dev/serial/by-id)"
        return (
            f"the serial port {self.port} cannot be opened: another program has it, "
            "or this user is not in the group dialout"
        )


class _PromptSerialClient(ModbusSerialClient):
    """pymodbus' serial client, but waiting for bytes in the kernel instead of looking again every four characters."""

    def recv(self, size: int | None) -> bytes:
        """The bytes that are there, or the first ones to come; empty after the time limit."""
        if self.socket is None:
            raise ConnectionException(str(self))
        try:
            first: bytes = self.socket.read(size or 1)
            rest: bytes = self.socket.read(self.socket.in_waiting) if first and size is None else b""
        except OSError as error:
            self.close()  # type: ignore[no-untyped-call]
            raise ConnectionException(str(error)) from error
        return first + rest


class ModbusLine:
    """One TCP connection, or one serial port with all meters on it. One request at a time, from any thread.

    `wait_s` and `monotonic_s` are real time even where a conductor simulates the calendar: a wire takes its time.
    """

    def __init__(
        self,
        target: TcpTarget | SerialTarget,
        wait_s: Callable[[float], None] = time.sleep,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        # pymodbus logs every failure; the operator gets each of them once, as a ReadFailure.
        logging.getLogger("pymodbus.logging").setLevel(logging.CRITICAL + 1)
        self.target = target
        self._wait_s = wait_s
        self._monotonic_s = monotonic_s
        self._lock = threading.Lock()
        self._client: ModbusTcpClient | ModbusSerialClient | None = None
        self._quiet_until_s = monotonic_s()
        self._used = False
        self.connections = 0

    def read(self, device_id: int, request: Span, pauses: Pauses, timeout_s: float) -> tuple[int, ...]:
        """The `request.count` registers that the meter answers. Raises LineFailure."""
        with self._lock:
            return self._read(device_id, request, pauses, timeout_s)

    def close(self) -> None:
        """Let go of socket or port; the next read opens it again."""
        with self._lock:
            self._drop()

    def _read(self, device_id: int, request: Span, pauses: Pauses, timeout_s: float) -> tuple[int, ...]:
        if self._client is not None and self._client.comm_params.timeout_connect != timeout_s:
            self._drop()
        reused = self._client is not None and self._used
        try:
            reply = self._exchange(device_id, request, pauses, timeout_s)
        except (ConnectionException, OSError) as error:
            # The peer closed the connection, or the adapter went away. Nothing can come late on a new one, so if this
            # one had been standing idle (servers drop idle clients) it is worth one more attempt at once.
            self._drop()
            if not reused:
                raise LineFailure(f"{self.target} closed the connection without a reply") from error
            return self._read(device_id, request, pauses, timeout_s)
        except ModbusException as error:
            self._drop(pauses.late_reply_ms)
            raise LineFailure(
                f"no usable reply from device {device_id} at {self.target} within {timeout_s:g} s; {self.target.ADVICE}"
            ) from error
        self._used = True
        if reply.isError():
            code = int(reply.exception_code)
            raise LineFailure(
                f"device {device_id} at {self.target} answers exception {code} to {request.count} registers at "
                f"{request.address}: {_EXCEPTIONS.get(code, 'of the maker')}",
                refused=code in _NO_SUCH_REGISTERS,
                exception_code=code,
            )
        if reply.function_code != request.function_code or len(reply.registers) != request.count:
            # Either a broken meter or the late reply to another request; on a serial line nobody can tell.
            self._drop(pauses.late_reply_ms)
            raise LineFailure(
                f"asked device {device_id} for {request.count} registers at {request.address} with function "
                f"{request.function_code}, got {len(reply.registers)} with function {reply.function_code}"
            )
        return tuple(reply.registers)

    def _exchange(self, device_id: int, request: Span, pauses: Pauses, timeout_s: float) -> ModbusPDU:
        if self._client is None:
            self._open(pauses, timeout_s)
        client = self._client
        assert client is not None
        self._wait_until(self._quiet_until_s)
        read = client.read_holding_registers if request.function_code == 3 else client.read_input_registers
        try:
            return read(request.address, count=request.count, device_id=device_id)
        finally:
            self._quiet_until_s = self._monotonic_s() + pauses.between_requests_ms / 1000

    def _open(self, pauses: Pauses, timeout_s: float) -> None:
        self._wait_until(self._quiet_until_s)
        client = _new_client(self.target, timeout_s)
        if not client.connect():
            raise LineFailure(self.target.cannot_open())
        self._client = client
        self._used = False
        self.connections += 1
        self._wait_s(pauses.after_connect_ms / 1000)

    def _drop(self, late_reply_ms: int = 0) -> None:
        """Close. A serial port then stays closed for `late_reply_ms`, so that no late reply meets the next request."""
        if self._client is not None:
            self._client.close()  # type: ignore[no-untyped-call]
        self._client = None
        if isinstance(self.target, SerialTarget):
            self._quiet_until_s = max(self._quiet_until_s, self._monotonic_s() + late_reply_ms / 1000)

    def _wait_until(self, time_s: float) -> None:
        missing_s = time_s - self._monotonic_s()
        if missing_s > 0:
            self._wait_s(missing_s)


class ModbusReader:
    """Reads one meter by its profile. Implements MeterReader.

    `billed` is the counter that matters. The other values are given if the meter has them: of one profile there are
    variants without export, and those refuse its registers or say that it is not available.
    """

    def __init__(
        self,
        meter: str,
        profile: MeterProfile,
        billed: Literal["import", "export"],
        line: ModbusLine,
        device_id: int,
        timeout_s: float,
        clock: Clock,
    ) -> None:
        self._meter = meter
        self._profile = profile
        self._billed: Quantity = billed
        self._line = line
        self._device_id = device_id
        self._timeout_s = timeout_s
        self._clock = clock
        self._layout: _Layout | None = None
        self._serial_number: str | None = None
        self._serial_number_read_s: float | None = None
        self._connection = 0
        self._last_mwh: dict[Quantity, int] = {}

    def sample(self) -> Sample:
        """Read all registers of the profile now. Raises ReadFailure."""
        try:
            layout = self._layout or self._find_layout()
            if self._serial_number_is_old():
                self._read_serial_number(layout)
            layout, replies = self._read_registers(layout)
            self._layout = layout
            reading = self._decoded(layout, replies, self._clock.monotonic_s(), self._clock.time_s())
            if any(reading.values.get(quantity, last) < last for quantity, last in self._last_mwh.items()):
                # The core wants to know whether this is the same meter before it believes that a counter dropped.
                self._read_serial_number(layout)
        except LineFailure as failure:
            self._forget()
            raise ReadFailure(self._meter, failure.reason) from failure
        except decode.UnusableValue as failure:
            raise ReadFailure(self._meter, f"no sure value: {failure.reason}") from failure
        self._last_mwh = {quantity: value for quantity, value in reading.values.items() if quantity != "power"}
        return Sample(
            monotonic_s=reading.monotonic_s,
            time_s=reading.time_s,
            import_mwh=reading.values.get("import"),
            export_mwh=reading.values.get("export"),
            power_w=reading.values.get("power"),
            serial_number=self._serial_number,
            import_rollover_mwh=reading.rollovers_mwh.get("import"),
            export_rollover_mwh=reading.rollovers_mwh.get("export"),
        )

    def close(self) -> None:
        """Let go of the line. Other meters on it open it again by themselves."""
        self._line.close()

    def _read_registers(self, layout: "_Layout") -> tuple["_Layout", "_Replies"]:
        """The replies to all requests, and the layout less what the meter refuses. Raises LineFailure."""
        replies: _Replies = []
        for request in layout.requests:
            try:
                replies.append((request, self._read(request)))
            except LineFailure as failure:
                smaller = self._without(layout, request) if failure.refused else None
                if smaller is None:
                    raise
                return self._read_registers(smaller)
        return layout, replies

    def _without(self, layout: "_Layout", refused: Span) -> "_Layout | None":
        """The layout without the values of a refused request, the billed counter apart; None if nothing is left out."""
        if self._profile.registers is None:
            return None
        kept = {
            quantity: register
            for quantity, register in layout.registers.items()
            if quantity == self._billed
            or not any(refused.contains(span) for span in _spans(0, register, self._profile.function_code))
        }
        return _layout(self._profile, kept) if len(kept) < len(layout.registers) else None

    def _decoded(self, layout: "_Layout", replies: "_Replies", monotonic_s: float, time_s: float) -> "_Reading":
        """Raises UnusableValue if the billed counter has no value, LineFailure if the replies are of another layout."""
        if layout.header is not None and _cut(replies, layout.header) != layout.header_words:
            # Firmware updates move models about; the chain is walked again at the next attempt.
            raise LineFailure("the SunSpec models have moved; they are looked up again")
        if self._billed not in layout.registers:
            raise decode.UnusableValue(f"the profile {self._profile.name} has no {self._billed} counter")
        values: dict[Quantity, int] = {}
        rollovers_mwh: dict[Quantity, int | None] = {}
        for quantity, register in layout.registers.items():
            parts = [_cut(replies, span) for span in _spans(layout.base, register, self._profile.function_code)]
            try:
                exponent = self._scale_exponent(layout, register, replies)
                if quantity == "power":
                    values[quantity] = sum(decode.power_w(register, words, exponent) for words in parts)
                else:
                    values[quantity] = sum(decode.energy_mwh(register, words, exponent) for words in parts)
                    rollovers_mwh[quantity] = decode.rollover_mwh(register, exponent)
            except decode.UnusableValue:
                if quantity == self._billed:
                    raise
        return _Reading(values, rollovers_mwh, monotonic_s, time_s)

    def _scale_exponent(self, layout: "_Layout", register: Register, replies: "_Replies") -> int:
        if register.scale_factor is None:
            return 0
        place = Span(self._profile.function_code, layout.base + register.scale_factor, 1)
        return decode.scale_exponent(_cut(replies, place)[0])

    def _serial_number_is_old(self) -> bool:
        if self._serial_number_read_s is None or self._connection != self._line.connections:
            return True
        return self._clock.monotonic_s() - self._serial_number_read_s > SERIAL_NUMBER_MAX_AGE_S

    def _read_serial_number(self, layout: "_Layout") -> None:
        """Read it into `_serial_number`; None where the meter has no such register or has nothing in it."""
        place = self._profile.serial_number
        self._serial_number = None
        if place is not None:
            span = Span(place.function_code, layout.serial_number_base + place.address, place.count)
            try:
                self._serial_number = decode.serial_number(place, self._read(span))
            except LineFailure as failure:
                if not failure.refused:
                    raise
            except decode.UnusableValue:
                # Kept apart from the registers' values: a meter without a number still counts.
                self._serial_number = None
        self._serial_number_read_s = self._clock.monotonic_s()
        self._connection = self._line.connections

    def _find_layout(self) -> "_Layout":
        if self._profile.sunspec is not None:
            return self._walk_sunspec(self._profile.sunspec)
        assert self._profile.registers is not None
        return _layout(self._profile, self._profile.registers)

    def _walk_sunspec(self, sunspec: SunSpecMap) -> "_Layout":
        """Find the first model that the profile knows. Raises LineFailure."""
        common = None
        address = self._sunspec_start(sunspec)
        for _ in range(MAX_SUNSPEC_MODELS):
            model_id, length = self._read(Span(self._profile.function_code, address, _SUNSPEC_HEADER))
            if model_id == _SUNSPEC_COMMON:
                # Each common model begins another device: an inverter passes its meters on behind itself.
                common = address
            for model in sunspec.models:
                if model_id in model.ids:
                    return _sunspec_layout(self._profile, model, address, (model_id, length), common)
            address += _SUNSPEC_HEADER + length
            if model_id == _SUNSPEC_END or address > 0xFFFF - _SUNSPEC_HEADER:
                break
        wanted = sorted(model_id for model in sunspec.models for model_id in model.ids)
        raise LineFailure(f"the device has none of the SunSpec models {wanted}; it needs another profile")

    def _sunspec_start(self, sunspec: SunSpecMap) -> int:
        """The address of the first model, behind "SunS"."""
        for base in sunspec.bases:
            try:
                if self._read(Span(self._profile.function_code, base, 2)) == _SUNSPEC_MARK:
                    return base + 2
            except LineFailure as failure:
                if not failure.refused:
                    raise
        raise LineFailure(f"no SunSpec mark at any of {list(sunspec.bases)}; is SunSpec Modbus switched on?")

    def _read(self, request: Span) -> tuple[int, ...]:
        return self._line.read(self._device_id, request, self._profile.pauses, self._timeout_s)

    def _forget(self) -> None:
        """After a failure anything may have changed: another meter, other firmware."""
        self._serial_number_read_s = None
        self._layout = None


_Replies: TypeAlias = list[tuple[Span, tuple[int, ...]]]
"""Each request with the registers that came back."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """The decoded values of one round of requests: counters in mWh, power in W, and when the last reply was there."""

    values: dict[Quantity, int]
    rollovers_mwh: dict[Quantity, int | None]
    monotonic_s: float
    time_s: float


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a meter's values stand, and the requests that carry them. `base` is what addresses count from."""

    base: int
    registers: dict[Quantity, Register]
    requests: tuple[Span, ...]
    serial_number_base: int
    header: Span | None = None
    header_words: tuple[int, ...] = ()


def create_modbus_reader(meter: NamedMeter, clock: Clock, serial_lines: dict[str, ModbusLine]) -> ModbusReader:
    """The reader of a meter; `serial_lines` holds the serial lines made so far, by port, and gets new ones.

    Raises WrongValue for an unknown profile and for meters that set the same line differently, ConfigError for a wrong
    profile.
    """
    where, config = f"meters.{meter.name}.reader", meter.config.reader
    assert isinstance(config, ModbusTcpConfig | ModbusRtuConfig)
    try:
        profile = load_profile(config.profile)
    except UnknownProfile as error:
        raise WrongValue(f"{where}.profile", f"one of {', '.join(error.known)}, got {error.name!r}") from error
    if isinstance(config, ModbusTcpConfig):
        line = ModbusLine(TcpTarget(config.host, config.port))
    else:
        target = SerialTarget(config.port, _line_settings(config, profile, where))
        line = serial_lines.setdefault(str(config.port), ModbusLine(target))
        if line.target != target:
            raise WrongValue(where, f"the same baud, parity and stop_bits for all meters on {config.port}")
    if not profile.confirmed:
        log.warning(
            "%s: the profile %s is unconfirmed; compare `meter-agent read` with the display before you rely on it",
            meter.name,
            profile.name,
        )
    billed = meter.config.register_name
    return ModbusReader(meter.name, profile, billed, line, config.device_id, config.timeout_s, clock)


def _line_settings(config: ModbusRtuConfig, profile: MeterProfile, where: str) -> SerialDefaults:
    """The config's serial settings, and the profile's where it has none."""
    factory = profile.serial_line
    if factory is None:
        if config.baud is None or config.parity is None:
            raise WrongValue(f"{where}.baud", f"baud and parity, since the profile {profile.name} names none")
        return SerialDefaults(config.baud, config.parity, stop_bits=config.stop_bits or 1)
    return SerialDefaults(
        baud=config.baud or factory.baud,
        parity=config.parity or factory.parity,
        stop_bits=config.stop_bits or factory.stop_bits,
        data_bits=factory.data_bits,
    )


def _new_client(target: TcpTarget | SerialTarget, timeout_s: float) -> ModbusTcpClient | ModbusSerialClient:
    if isinstance(target, TcpTarget):
        return ModbusTcpClient(target.host, port=target.port, timeout=timeout_s, retries=0, trace_packet=_refuse_floods)
    return _PromptSerialClient(
        str(target.port),
        baudrate=target.line.baud,
        bytesize=target.line.data_bits,
        parity=target.line.parity,
        stopbits=target.line.stop_bits,
        timeout=timeout_s,
        retries=0,
        trace_packet=_refuse_floods,
    )


def _refuse_floods(sending: bool, data: bytes) -> bytes:
    """pymodbus keeps what it cannot read and tries again with more; this ends it."""
    if not sending and len(data) > MAX_BUFFERED_BYTES:
        raise ModbusException(f"{len(data)} bytes without a reply in them")
    return data


def _spans(base: int, register: Register, function_code: int) -> tuple[Span, ...]:
    return tuple(Span(function_code, base + address, words_in(register.type)) for address in register.addresses)


def _layout(profile: MeterProfile, registers: dict[Quantity, Register]) -> _Layout:
    spans = {quantity: _spans(0, register, profile.function_code) for quantity, register in registers.items()}
    requests = plan_requests(chain.from_iterable(spans.values()), profile.requests)
    counters = [span for quantity, parts in spans.items() if quantity != "power" for span in parts]
    # The sample's time is that of the last reply, so the counters come last.
    ordered = sorted(requests, key=lambda request: any(request.contains(span) for span in counters))
    return _Layout(0, registers, tuple(ordered), serial_number_base=0)


def _sunspec_layout(
    profile: MeterProfile, model: SunSpecModel, address: int, header_words: tuple[int, ...], common: int | None
) -> _Layout:
    """One request from the model's header to its last value, so that values and scale factors belong together."""
    ends = [
        address + words_in(register.type) for register in model.registers.values() for address in register.addresses
    ]
    ends += [register.scale_factor + 1 for register in model.registers.values() if register.scale_factor is not None]
    if max(ends) > _SUNSPEC_HEADER + header_words[1]:
        raise LineFailure(f"SunSpec model {header_words[0]} is only {header_words[1]} registers long")
    return _Layout(
        base=address,
        registers=model.registers,
        requests=(Span(profile.function_code, address, max(ends)),),
        serial_number_base=common if common is not None else address,
        header=Span(profile.function_code, address, _SUNSPEC_HEADER),
        header_words=header_words,
    )


def _cut(replies: "_Replies", wanted: Span) -> tuple[int, ...]:
    for request, words in replies:
        if request.contains(wanted):
            return request.cut(wanted, words)
    raise AssertionError(f"the plan carries {wanted}")
