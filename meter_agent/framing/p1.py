"""DSMR P1: telegrams out of a stream of bytes, and readings out of telegrams. Pure.

A telegram starts with `/`, ends with `!`, and from DSMR 4 on four hex digits of a CRC follow, then a line break. The
CRC-16 (polynomial 0xA001 reflected, start 0, no final inversion) covers everything from `/` to `!`, both included.
Source: DSMR P1 Companion Standard 5.0.2 (Netbeheer Nederland), sections 5.2, 5.12 and 6; the Belgian e-MUCS-P1 and the
Luxembourgish ports are the same apart from which objects they send.

A stream starts anywhere, loses bytes and repeats itself, so `P1Framer` resynchronises at every `/` and counts what it
refuses. It holds at most one unfinished telegram.
"""

import re
from dataclasses import dataclass
from typing import Final

from meter_agent.framing.telegram import (
    EXPORT_GROUP,
    IMPORT_GROUP,
    MalformedTelegram,
    TelegramReading,
    counter_codes,
    counter_sum,
    power_mw,
    whole_watts,
)

MAX_TELEGRAM_BYTES: Final = 8_192
"""Longest telegram taken: a DSMR 5 telegram has about 1 kB, and a text message may add 2 kB."""

MAX_TRAILER_BYTES: Final = 6
"""What may follow `!`: four hex digits, CR, LF."""

_START: Final = ord("/")
_END: Final = ord("!")
_LINE_FEED: Final = ord("\n")

_OBJECT: Final = re.compile(r"(\d{1,3}-\d{1,3}:\d{1,3}\.\d{1,3}\.\d{1,3})(?:\*255)?(\(.*\))")
_TEXT: Final = re.compile(r"\(([0-9A-Za-z]{1,96})\)")
_VERSIONS: Final = ("1-3:0.2.8", "0-0:96.1.4")
_EQUIPMENT_IDS: Final = ("0-0:96.1.1", "0-0:42.0.0")
"""The second one in Luxembourg."""


@dataclass(frozen=True, slots=True)
class Telegram:
    """One whole telegram as received, from `/` to `!`. `checked`: it carried a CRC, and the CRC is right."""

    raw: bytes
    checked: bool


class P1Framer:
    """Cuts a stream into telegrams. `refused` counts those that were not whole, `last_refusal` says why."""

    def __init__(self) -> None:
        self.refused = 0
        self.last_refusal: str | None = None
        self._buffer = bytearray()
        self._end: int | None = None
        self._crc_seen = False

    def feed(self, data: bytes) -> tuple[Telegram, ...]:
        """The telegrams that `data` completes, in order. Never raises."""
        telegrams = []
        for byte in data:
            telegram = self._take(byte)
            if telegram is not None:
                telegrams.append(telegram)
        return tuple(telegrams)

    @property
    def held_bytes(self) -> int:
        """Bytes of the unfinished telegram, at most MAX_TELEGRAM_BYTES + MAX_TRAILER_BYTES."""
        return len(self._buffer)

    def _take(self, byte: int) -> Telegram | None:
        if byte == _START:
            if self._buffer:
                self._refuse("another telegram began before its end")
            self._buffer.append(byte)
            return None
        if not self._buffer:
            return None
        self._buffer.append(byte)
        if self._end is None:
            if byte == _END:
                self._end = len(self._buffer)
            elif len(self._buffer) >= MAX_TELEGRAM_BYTES:
                self._refuse(f"it is longer than {MAX_TELEGRAM_BYTES} bytes")
            return None
        if byte == _LINE_FEED:
            return self._complete(self._end)
        if len(self._buffer) - self._end >= MAX_TRAILER_BYTES:
            self._refuse("no line break follows its end")
        return None

    def _complete(self, end: int) -> Telegram | None:
        raw, trailer = bytes(self._buffer[:end]), bytes(self._buffer[end:]).strip(b"\r\n")
        if not trailer:
            if self._crc_seen:
                self._refuse("it has no CRC, although others on this line have one")
                return None
            self._reset()
            return Telegram(raw, checked=False)
        if len(trailer) != 4 or any(digit not in b"0123456789ABCDEFabcdef" for digit in trailer):
            self._refuse(f"its CRC is not four hex digits ({trailer.hex()})")
            return None
        if int(trailer, 16) != crc16(raw):
            self._refuse(f"its CRC is {trailer.decode()}, computed {crc16(raw):04X}")
            return None
        self._crc_seen = True
        self._reset()
        return Telegram(raw, checked=True)

    def _refuse(self, reason: str) -> None:
        self.refused += 1
        self.last_refusal = reason
        self._reset()

    def _reset(self) -> None:
        self._buffer.clear()
        self._end = None


def crc16(data: bytes) -> int:
    """CRC-16 as in DSMR P1 5.0.2 section 5.2 (also called CRC-16/ARC)."""
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xA001 if crc & 1 else 0)
    return crc


def parse_telegram(telegram: Telegram) -> TelegramReading:
    """Read a telegram's counters, power and equipment id. Raises MalformedTelegram.

    A total (1.8.0, 2.8.0) is taken where the meter sends one; else the tariff registers 1.8.1 to 1.8.4 are added up.
    A telegram without CRC (DSMR 2.2, 3) is read only if every line looks as it should and tariffs 1 and 2 are both
    there, since a lost line would otherwise look like a counter that dropped.
    """
    objects = _objects(telegram)
    if not telegram.checked and any(version in objects for version in _VERSIONS):
        raise MalformedTelegram("it names a version that has a CRC, and has none")
    import_mwh, import_rollover_mwh = _energy(objects, IMPORT_GROUP, telegram.checked)
    export_mwh, export_rollover_mwh = _energy(objects, EXPORT_GROUP, telegram.checked)
    if import_mwh is None and export_mwh is None:
        raise MalformedTelegram("it has neither import (1.8.x) nor export (2.8.x) counters")
    return TelegramReading(
        import_mwh, export_mwh, _power(objects), _equipment_id(objects), import_rollover_mwh, export_rollover_mwh
    )


def _objects(telegram: Telegram) -> dict[str, str]:
    """OBIS code to value, in its parentheses. Continuation lines (a value alone: gas in DSMR 2.2) are skipped."""
    try:
        lines = telegram.raw.decode("ascii").split("\r\n")
    except UnicodeDecodeError as error:
        raise MalformedTelegram(f"it is not ASCII at byte {error.start}") from error
    objects: dict[str, str] = {}
    for line in lines[1:]:
        found = _OBJECT.fullmatch(line)
        if found is None:
            if line in ("", "!") or telegram.checked or (line.startswith("(") and line.endswith(")")):
                continue
            raise MalformedTelegram(f"a line is damaged: {line[:40]!r}")
        code, value = found.groups()
        if objects.setdefault(code, value) != value:
            raise MalformedTelegram(f"{code} has two values")
    return objects


def _energy(objects: dict[str, str], group: str, checked: bool) -> tuple[int | None, int | None]:
    """The counter of a direction and its rollover, both in mWh; None where there is none."""
    codes = counter_codes(objects, f"1-0:{group}")
    tariffs = (f"1-0:{group}.1", f"1-0:{group}.2")
    if not checked and codes and codes[0] != f"1-0:{group}.0" and codes[:2] != tariffs:
        raise MalformedTelegram(f"{tariffs[0]} and {tariffs[1]} are not both there")
    return counter_sum(codes, lambda code: _inside(objects[code]))


def _power(objects: dict[str, str]) -> int | None:
    """Import less export in W, None if the meter sends neither."""
    sides = [(code, objects.get(code)) for code in ("1-0:1.7.0", "1-0:2.7.0")]
    if all(value is None for _, value in sides):
        return None
    taken_mw, delivered_mw = (0 if value is None else power_mw(code, _inside(value)) for code, value in sides)
    return whole_watts(taken_mw - delivered_mw)


def _inside(value: str) -> str:
    """A value without its parentheses."""
    return value[1:-1]


def _equipment_id(objects: dict[str, str]) -> str | None:
    """Hex digits of ASCII text by the standard; what does not read so is given as it stands."""
    sent = (objects[code] for code in _EQUIPMENT_IDS if code in objects)
    found = _TEXT.fullmatch(next(sent, ""))
    if found is None:
        return None
    text = found.group(1)
    try:
        decoded = bytes.fromhex(text).decode("ascii")
    except ValueError:
        return text
    # Some fill it up with blanks.
    return decoded.rstrip() if decoded.isprintable() else text
