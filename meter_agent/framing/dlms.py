"""DLMS/COSEM lists that meters push: energy registers out of the messages that `HdlcFramer` cuts. Pure.

A message is an LLC header (E6 E7 00), then a data-notification: tag 0F, four bytes of invoke id, a date (00 for none,
or 12 bytes behind 0C or 09 0C) and one value in A-XDR, a structure or an array. How registers stand in it differs:

- *self-describing* (Aidon in Norway and Sweden, Kaifa in Austria): each entry is a structure of OBIS code and value,
  for numbers with scaler and unit.
- *Kamstrup*: the list's name as text, then OBIS codes and values in turn, no units. Energy counts in steps of 10 Wh or
  of 1 Wh: that depends on how the utility set the meter and is not in the list, so `energy_step_wh` must be given.
- *Kaifa with codes* (Sweden): OBIS codes and values in turn, the list's name among them; Wh and W.
- *Kaifa by position* (Norway): bare values, where their number says what they are; Wh and W.

Where a list may come encrypted (tag DB; Denmark, Austria), `ciphering` undoes that with the utility's keys.

Sources: DLMS UA Green Book, chapters 9 and 10 (summary in IEC 62056-5-3); the lists of the three makers as collected at
https://github.com/roarfred/AmsToMqttBridge/tree/master/Samples and
https://github.com/UtilitechAS/amsreader-firmware/tree/main/frames; the factor of ten at
https://github.com/UtilitechAS/amsreader-firmware/issues/811 and /issues/239.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeAlias

from meter_agent.framing.ciphering import GENERAL_GLO_CIPHERING, MeterKeys, deciphered
from meter_agent.framing.telegram import MalformedTelegram

MAX_DEPTH: Final = 8
"""Structures in structures; lists have three."""

Data: TypeAlias = int | str | bytes | tuple["Data", ...] | None
"""A value in A-XDR. Octet strings, bit strings, dates and floating-point numbers stay bytes."""

_LLC_HEADERS: Final = (b"\xe6\xe7\x00", b"\xe6\xe6\x00")
_DATA_NOTIFICATION: Final = 0x0F
_DATE_BYTES: Final = 12

_INTEGERS: Final = {
    0x05: (4, True),
    0x06: (4, False),
    0x0D: (1, False),
    0x0F: (1, True),
    0x10: (2, True),
    0x11: (1, False),
    0x12: (2, False),
    0x14: (8, True),
    0x15: (8, False),
    0x16: (1, False),
    0x03: (1, False),
}
"""Type: bytes, signed. BCD (0D), enum (16) and boolean (03) included."""

_OPAQUE: Final = {0x17: 4, 0x18: 8, 0x19: 12, 0x1A: 5, 0x1B: 4}
"""float32, float64, date-time, date, time: not used for registers, so kept as bytes."""

_COLLECTIONS: Final = (0x01, 0x02)
_BIT_STRING: Final = 0x04
_OCTET_STRING: Final = 0x09
_TEXTS: Final = (0x0A, 0x0C)

_WH: Final = 30
_W: Final = 27
_MAX_SCALER: Final = 9
_NOT_AVAILABLE: Final = (0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF)

_OBIS_BYTES: Final = 6
_ENERGY_IMPORT: Final = (1, 8, 0)
_ENERGY_EXPORT: Final = (2, 8, 0)
_POWER_IMPORT: Final = (1, 7, 0)
_POWER_EXPORT: Final = (2, 7, 0)
_METER_IDS: Final = (b"\x00\x00\x60\x01\x00\xff", b"\x01\x01\x00\x00\x05\xff")
_KAIFA_LIST_NAME: Final = b"\x01\x00\x00\x02\x81\xff"

_KAIFA_POSITIONS: Final = {9: None, 13: None, 14: 10, 18: 14}
"""Number of values in a Kaifa list with a name: where the energy registers start. One and three phases."""


class Dialect(Enum):
    """How the registers stand in a list."""

    SELF_DESCRIBING = "self-describing"
    KAMSTRUP = "kamstrup"
    KAIFA_CODES = "kaifa-codes"
    KAIFA_POSITIONS = "kaifa-positions"


@dataclass(frozen=True, slots=True)
class PushedList:
    """What a list says. Energy in mWh, None where the list has none (most have not); `power_w` is import positive."""

    dialect: Dialect
    import_mwh: int | None
    export_mwh: int | None
    power_w: int | None
    meter_id: str | None

    @property
    def has_energy(self) -> bool:
        """True for the lists that come every hour; on some meters all lists have it."""
        return self.import_mwh is not None or self.export_mwh is not None


@dataclass(frozen=True, slots=True)
class _Register:
    """A number in a list; scaler and unit where they are sent with it."""

    value: Data
    scaler: int | None = None
    unit: int | None = None


def parse_list(message: bytes, keys: MeterKeys | None = None, energy_step_wh: int | None = None) -> PushedList:
    """Read one message, with its LLC header or without. Raises MalformedTelegram."""
    for header in _LLC_HEADERS:
        if message.startswith(header):
            message = message[len(header) :]
            break
    if message[:1] == bytes([GENERAL_GLO_CIPHERING]):
        message = deciphered(message, keys)
        if message[:1] != bytes([_DATA_NOTIFICATION]):
            raise MalformedTelegram("decrypting it gives no data-notification; check the port's encryption key")
    return _registers(_notification_body(message), energy_step_wh)


class _Cursor:
    """Reads A-XDR from the front."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def take(self, count: int) -> bytes:
        end = self._position + count
        if end > len(self._data):
            raise MalformedTelegram(f"it ends {end - len(self._data)} bytes too early")
        taken = self._data[self._position : end]
        self._position = end
        return taken

    def byte(self) -> int:
        return self.take(1)[0]

    def peek(self) -> int:
        first = self.byte()
        self._position -= 1
        return first

    def length(self) -> int:
        """A length: one byte up to 7F, else the number of bytes that hold it (at most two here)."""
        first = self.byte()
        if first < 0x80:
            return first
        if first not in (0x81, 0x82):
            raise MalformedTelegram(f"a length starts with {first:02X}")
        return int.from_bytes(self.take(first & 0x7F), "big")

    def end(self) -> None:
        if self._position != len(self._data):
            raise MalformedTelegram(f"{len(self._data) - self._position} bytes follow its end")

    def value(self, depth: int = 0) -> Data:
        """One value of any type."""
        kind = self.byte()
        if kind == 0x00:
            return None
        if kind in _INTEGERS:
            size, signed = _INTEGERS[kind]
            return int.from_bytes(self.take(size), "big", signed=signed)
        if kind in _COLLECTIONS:
            if depth == MAX_DEPTH:
                raise MalformedTelegram(f"it is nested deeper than {MAX_DEPTH}")
            # Each entry takes a byte at least, so a wrong count ends at the end of the message.
            return tuple(self.value(depth + 1) for _ in range(self.length()))
        if kind == _OCTET_STRING:
            return self.take(self.length())
        if kind in _TEXTS:
            return self.take(self.length()).decode("latin-1")
        if kind == _BIT_STRING:
            return self.take((self.length() + 7) // 8)
        if kind in _OPAQUE:
            return self.take(_OPAQUE[kind])
        raise MalformedTelegram(f"it has a value of unknown type {kind:02X}")


def _notification_body(apdu: bytes) -> Data:
    cursor = _Cursor(apdu)
    tag = cursor.byte()
    if tag != _DATA_NOTIFICATION:
        raise MalformedTelegram(f"it starts with {tag:02X}, not with a data-notification (0F)")
    cursor.take(4)
    if cursor.peek() == _OCTET_STRING:
        # Kaifa, and Kamstrup with old firmware, send the date as a tagged octet string.
        cursor.byte()
    date_bytes = cursor.byte()
    if date_bytes not in (0, _DATE_BYTES):
        raise MalformedTelegram(f"its date has {date_bytes} bytes")
    cursor.take(date_bytes)
    body = cursor.value()
    cursor.end()
    return body


def _registers(body: Data, energy_step_wh: int | None) -> PushedList:
    if not isinstance(body, tuple) or not body:
        raise MalformedTelegram("it is no list")
    first = body[0]
    if any(isinstance(entry, tuple) for entry in body):
        return _by_code(Dialect.SELF_DESCRIBING, _coded(body), None)
    if isinstance(first, str) and first.startswith("Kamstrup"):
        return _by_code(Dialect.KAMSTRUP, _coded(body[1:]), energy_step_wh)
    if isinstance(first, bytes) and len(first) == _OBIS_BYTES:
        registers = _coded(body)
        name = registers.get(_KAIFA_LIST_NAME)
        if name is None or not isinstance(name.value, bytes) or not name.value.startswith(b"KFM_"):
            raise MalformedTelegram("it has codes and values in turn, but is no list of Kaifa's")
        return _by_code(Dialect.KAIFA_CODES, registers, 1)
    if isinstance(first, bytes) and first.startswith(b"KFM_"):
        return _kaifa_positions(body)
    if len(body) == 1 and isinstance(first, int):
        return PushedList(Dialect.KAIFA_POSITIONS, None, None, first, None)
    raise MalformedTelegram("it is no list of Aidon's, Kaifa's or Kamstrup's; please report it with its bytes")


def _coded(entries: tuple[Data, ...]) -> dict[bytes, _Register]:
    """Registers by code, from structures and from codes and values in turn (an Austrian list starts with its clock so).

    Single-phase meters send null where a three-phase meter has a code and a value.
    """
    registers: dict[bytes, _Register] = {}
    code: bytes | None = None
    for entry in entries:
        match entry:
            case _ if code is not None and entry is not None and not isinstance(entry, tuple):
                _put(registers, code, _Register(entry))
                code = None
            case _ if code is not None:
                raise MalformedTelegram(f"the code {_dotted(code)} has no value")
            case None:
                pass
            case bytes():
                code = entry
            case (bytes() as own_code, int() as value, (int() as scaler, int() as unit)):
                _put(registers, own_code, _Register(value, scaler, unit))
            case (bytes() as own_code, value):
                _put(registers, own_code, _Register(value))
            case tuple():
                raise MalformedTelegram("an entry is not code, value and perhaps scaler and unit")
            case _:
                raise MalformedTelegram("a value stands where a code should be")
    if code is not None:
        raise MalformedTelegram(f"the code {_dotted(code)} has no value")
    return registers


def _put(registers: dict[bytes, _Register], code: bytes, register: _Register) -> None:
    if len(code) != _OBIS_BYTES:
        raise MalformedTelegram(f"a code has {len(code)} bytes")
    if registers.setdefault(code, register) != register:
        raise MalformedTelegram(f"{_dotted(code)} has two values")


def _dotted(code: bytes) -> str:
    return ".".join(str(byte) for byte in code)


def _by_code(dialect: Dialect, registers: dict[bytes, _Register], step_wh: int | None) -> PushedList:
    power_import, power_export = _power(registers, _POWER_IMPORT), _power(registers, _POWER_EXPORT)
    silent = power_import is None and power_export is None
    return PushedList(
        dialect,
        _energy(registers, _ENERGY_IMPORT, step_wh),
        _energy(registers, _ENERGY_EXPORT, step_wh),
        None if silent else (power_import or 0) - (power_export or 0),
        next((_text(registers[code].value) for code in _METER_IDS if code in registers), None),
    )


def _find(registers: dict[bytes, _Register], group: tuple[int, int, int]) -> tuple[bytes, _Register] | None:
    """Electricity register C.D.E of any channel, of the present billing period."""
    found = [
        (code, register)
        for code, register in registers.items()
        if code[0] == 1 and tuple(code[2:5]) == group and code[5] == 0xFF
    ]
    if len(found) > 1:
        raise MalformedTelegram(f"{_dotted(found[0][0])} and {_dotted(found[1][0])} are both there")
    return found[0] if found else None


def _energy(registers: dict[bytes, _Register], group: tuple[int, int, int], step_wh: int | None) -> int | None:
    found = _find(registers, group)
    if found is None:
        return None
    code, register = found
    value = _number(code, register)
    if register.unit is not None:
        return _scaled_mwh(code, value, register)
    if step_wh is None:
        raise MalformedTelegram(
            "its energy has no unit; set energy_step_wh to 10 or to 1, so that `meter-agent read` shows what the "
            "meter's display shows (Kamstrup: 10 in Norway and Denmark, 1 in much of Sweden)"
        )
    return value * step_wh * 1_000


def _number(code: bytes, register: _Register) -> int:
    if not isinstance(register.value, int) or register.value < 0:
        raise MalformedTelegram(f"{_dotted(code)} is no counter")
    if register.value in _NOT_AVAILABLE:
        raise MalformedTelegram(f"{_dotted(code)} is marked as not available")
    return register.value


def _scaled_mwh(code: bytes, value: int, register: _Register) -> int:
    scaler = register.scaler
    if register.unit != _WH or scaler is None or not -3 <= scaler <= _MAX_SCALER:
        raise MalformedTelegram(f"{_dotted(code)} has scaler {scaler} and unit {register.unit}, which is not Wh")
    return value * int(10 ** (3 + scaler))


def _power(registers: dict[bytes, _Register], group: tuple[int, int, int]) -> int | None:
    """In W, rounded down; None if it is not there, or not as power should be: it takes no part in the accounting."""
    found = _find(registers, group)
    if found is None or not isinstance(found[1].value, int):
        return None
    value, scaler, unit = found[1].value, found[1].scaler or 0, found[1].unit
    if unit not in (None, _W) or not -_MAX_SCALER <= scaler <= _MAX_SCALER:
        return None
    return value * int(10 ** max(scaler, 0)) // int(10 ** max(-scaler, 0))


def _kaifa_positions(body: tuple[Data, ...]) -> PushedList:
    if len(body) not in _KAIFA_POSITIONS:
        raise MalformedTelegram(f"it is a list of Kaifa's with {len(body)} values, which is not known")
    power_import, power_export = body[3], body[4]
    if not isinstance(power_import, int) or not isinstance(power_export, int):
        raise MalformedTelegram("its powers are no numbers")
    start = _KAIFA_POSITIONS[len(body)]
    energies: tuple[int | None, int | None] = (None, None)
    if start is not None:
        codes = (b"\x01\x00\x01\x08\x00\xff", b"\x01\x00\x02\x08\x00\xff")
        energies = (
            _number(codes[0], _Register(body[start])) * 1_000,
            _number(codes[1], _Register(body[start + 1])) * 1_000,
        )
    return PushedList(Dialect.KAIFA_POSITIONS, *energies, power_import - power_export, _text(body[1]))


def _text(value: Data) -> str | None:
    """A meter's id as text; what is not printable is given in hex."""
    if isinstance(value, bytes):
        text = value.decode("latin-1")
        return text if text.isprintable() and text.isascii() else value.hex()
    return value if isinstance(value, str) else None
