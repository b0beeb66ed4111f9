"""IEC 62056-21: text telegrams out of a stream of bytes, readings out of telegrams, and how a meter is asked. Pure.

A telegram is an identification line (`/`, the maker's three letters, a baud rate character, the model) and lines of
data sets such as `1-0:1.8.0*255(001234.120*kWh)`, or `1.8.0(…)` in short, up to a line that is only `!`. Meters send it
of their own accord (mode D) or when they are asked for it (mode C): the request at 300 Bd brings the identification,
whose character proposes a faster rate, and the acknowledgement brings the data at the rate that it names. In a data
block STX stands before the data, and ETX and a check character (BCC) after it: the exclusive or of all after STX.
Source: IEC 62056-21:2002, clauses 5 and 6, and the telegrams that the tests name.

Characters have seven bits and a parity bit, which is checked here, as a telegram without a data block has no other
protection. So such a telegram is read strictly: every line must be whole.
"""

import re
from dataclasses import dataclass
from enum import Enum
from functools import reduce
from operator import xor
from typing import Final, Literal, TypeAlias

from meter_agent.framing.telegram import (
    AS_SENT,
    EXPORT_GROUP,
    IMPORT_GROUP,
    MalformedTelegram,
    ObisChoice,
    TelegramReading,
    counter_codes,
    counter_sum,
    power_codes,
    power_mw,
    whole_watts,
)

Parity: TypeAlias = Literal["N", "E", "O"]

MAX_TELEGRAM_BYTES: Final = 16_384
"""Longest telegram taken: industrial meters send past months too, 4 to 8 kB of them."""

MAX_LINE_BYTES: Final = 1_024
"""Longest line taken. By the standard a line has 78 characters; some meters send more."""

SIGN_ON_BAUD: Final = 300

BAUD_RATES: Final = {"0": 300, "1": 600, "2": 1_200, "3": 2_400, "4": 4_800, "5": 9_600, "6": 19_200}
"""What the baud rate character of mode C means."""

_STX, _ETX, _ACK, _LINE_FEED, _SLASH = 0x02, 0x03, 0x06, 0x0A, 0x2F

# A line that was cut off may stand before the next telegram's `/`, hence a search.
_IDENTIFICATION: Final = re.compile(rb"/([A-Za-z]{3})([0-9A-Za-z])([\x20-.0-~]{0,64})\r?\n\Z")
_DATA_LINE: Final = re.compile(r"(?:[!-'*-~]*\([ -'*-~]*\))+")
_DATA_SET: Final = re.compile(r"([!-'*-~]+)\(([ -'*-~]*)\)")
_CODE: Final = re.compile(
    r"(?:(\d{1,3})-(\d{1,3}):)?([0-9A-Z]{1,3})\.([0-9A-Z]{1,3})(?:\.(\d{1,3}))?(?:[*&](\d{1,3}))?"
)
_CHANNELS: Final = ((None, None), ("0", "0"), ("1", "0"), ("1", "1"))
_NUMBER_WITHOUT_UNIT: Final = re.compile(r"[+-]?\d+(?:\.\d+)?\*?")

_SERIAL_NUMBERS: Final = ("96.1.0", "C.1.0", "96.1.1", "0.0.0")
_FATAL_ERRORS: Final = ("F.F.0", "97.97.0")


class Step(Enum):
    """Where in a telegram the framer is."""

    LINES = "lines"
    ETX = "etx"
    BCC = "bcc"


@dataclass(frozen=True, slots=True)
class Identification:
    """Who sends: three letters of the maker, the character that proposes a baud rate, the maker's text."""

    maker: str
    baud_character: str
    model: str


@dataclass(frozen=True, slots=True)
class Telegram:
    """One whole telegram: its lines without line breaks. `checked`: it was a data block, and its BCC is right."""

    identification: Identification
    lines: tuple[str, ...]
    checked: bool


class Iec62056Framer:
    """Cuts a stream into telegrams. `refused` counts those that were not whole, `last_refusal` says why.

    `identification` is that of the telegram under way. After the first data block, or from the start with
    `only_blocks`, a telegram without check character is refused.
    """

    def __init__(self, parity: Parity = "E", only_blocks: bool = False) -> None:
        self.refused = 0
        self.last_refusal: str | None = None
        self.identification: Identification | None = None
        self._characters = _characters(parity)
        self._line = bytearray()
        self._lines: list[bytes] = []
        self._length = 0
        self._step = Step.LINES
        self._only_blocks = only_blocks

    def feed(self, data: bytes) -> tuple[Telegram, ...]:
        """The telegrams that `data` completes, in order. Never raises."""
        telegrams = []
        for byte in data.translate(self._characters):
            telegram = self._take(byte)
            if telegram is not None:
                telegrams.append(telegram)
        return tuple(telegrams)

    @property
    def held_bytes(self) -> int:
        """Bytes of the unfinished telegram, at most MAX_TELEGRAM_BYTES + MAX_LINE_BYTES."""
        return self._length + len(self._line)

    def _take(self, byte: int) -> Telegram | None:
        if self._step is Step.BCC:
            return self._complete(checked=True, bcc=byte)
        if self._step is Step.ETX:
            if byte == _ETX:
                self._step = Step.BCC
                return None
            self._refuse("its data block has no ETX")
        self._line.append(byte)
        if byte == _LINE_FEED:
            line = bytes(self._line)
            self._line.clear()
            return self._take_line(line)
        if len(self._line) >= MAX_LINE_BYTES:
            self._refuse(f"a line is longer than {MAX_LINE_BYTES} bytes")
        return None

    def _take_line(self, line: bytes) -> Telegram | None:
        found = _IDENTIFICATION.search(line)
        if found is not None:
            if self._lines:
                self._refuse("another telegram began before its end")
            maker, baud_character, model = (part.decode("ascii") for part in found.groups())
            self._reset()
            self.identification = Identification(maker, baud_character, model)
            return None
        if self.identification is None:
            return None
        if line[0] == _STX:
            # What stands before a data block is the echo of our own answer.
            self._lines.clear()
            self._length = 0
        self._lines.append(line)
        self._length += len(line)
        if self._length > MAX_TELEGRAM_BYTES:
            self._refuse(f"it is longer than {MAX_TELEGRAM_BYTES} bytes")
        elif line.strip(b"\r\n") == b"!":
            if not self._is_block:
                return self._complete(checked=False)
            self._step = Step.ETX
        elif line.startswith(b"!"):
            self._refuse(f"it ends with {line[:8]!r}, as a P1 telegram does")
        return None

    @property
    def _is_block(self) -> bool:
        return bool(self._lines) and self._lines[0][0] == _STX

    def _complete(self, checked: bool, bcc: int = 0) -> Telegram | None:
        assert self.identification is not None
        data = b"".join(self._lines)
        if checked:
            computed = reduce(xor, data[1:], _ETX)
            if bcc != computed:
                self._refuse(f"its check character is {bcc:02X}, computed {computed:02X}")
                if bcc == _SLASH:
                    # The check character was lost, and this is the next telegram's first.
                    self._line.append(bcc)
                return None
            data = data[1:]
        elif self._only_blocks:
            self._refuse("it has no check character, as others on this line and all answers have")
            return None
        if 0 in data:
            self._refuse("a character has the wrong parity")
            return None
        self._only_blocks |= checked
        lines = tuple(data.decode("ascii").replace("\r", "").split("\n")[:-2])
        telegram = Telegram(self.identification, lines, checked)
        self._reset()
        return telegram

    def _refuse(self, reason: str) -> None:
        if self.identification is not None:
            self.refused += 1
            self.last_refusal = reason
        self._reset()

    def _reset(self) -> None:
        self.identification = None
        self._line.clear()
        self._lines.clear()
        self._length = 0
        self._step = Step.LINES


def parse_telegram(
    telegram: Telegram, choice: ObisChoice = AS_SENT, unit: Literal["Wh", "kWh"] | None = None
) -> TelegramReading:
    """Read a telegram's counters, power and serial number. Raises MalformedTelegram.

    A total (1.8.0, 2.8.0) is taken where the meter sends one; else its tariffs are added up, of which 1 and 2 must both
    be there in a telegram that is not `checked`, as a lost line would look like a counter that dropped. `unit` is that
    of counters which are sent without one. The serial number is the maker's letters and the meter's number.
    """
    values = _Values(telegram)
    for code in _FATAL_ERRORS:
        if values.has(code) and values.text(code).strip("0 "):
            raise MalformedTelegram(f"the meter reports a fatal error (F.F is {values.text(code)[:40]!r})")
    import_mwh, import_rollover_mwh = _counter(values, IMPORT_GROUP, choice.imports, unit)
    export_mwh, export_rollover_mwh = _counter(values, EXPORT_GROUP, choice.exports, unit)
    if import_mwh is None and export_mwh is None:
        raise MalformedTelegram("it has neither import (1.8.x) nor export (2.8.x) counters")
    return TelegramReading(
        import_mwh,
        export_mwh,
        _power_w(values, choice.power),
        _serial_number(values),
        import_rollover_mwh,
        export_rollover_mwh,
    )


class SignOn:
    """One conversation of mode C, from the request to the data. `request` is what to send first, at SIGN_ON_BAUD."""

    def __init__(self, parity: Parity = "E", address: str = "", max_baud: int = 9_600) -> None:
        self.request = with_parity(b"/?" + address.encode("ascii") + b"!\r\n", parity)
        self._parity: Parity = parity
        self._max_baud = max_baud
        self._framer = Iec62056Framer(parity, only_blocks=True)
        self._acknowledged = False

    def feed(self, data: bytes) -> tuple[bytes, int] | Telegram | None:
        """What `data` leads to: an answer to send and the baud rate after it; or the telegram; or, so far, nothing.

        Data that was not asked for, such as the late answer to an earlier request, is not taken. Raises
        MalformedTelegram where the meter does not speak mode C.
        """
        telegrams = self._framer.feed(data)
        if self._acknowledged:
            return telegrams[-1] if telegrams else None
        identification = self._framer.identification or (telegrams[-1].identification if telegrams else None)
        if identification is None:
            return None
        answer, baud = acknowledgement(identification, self._max_baud)
        self._acknowledged = True
        return with_parity(answer, self._parity), baud

    @property
    def last_refusal(self) -> str | None:
        """Why the last telegram that was not whole was refused."""
        return self._framer.last_refusal


def acknowledgement(identification: Identification, max_baud: int) -> tuple[bytes, int]:
    """What to answer to a meter's identification, without parity, and the baud rate that the data then comes at.

    That is the rate which the meter proposes, or the next lower one that is at most `max_baud`. Raises
    MalformedTelegram where it does not speak mode C.
    """
    proposed = BAUD_RATES.get(identification.baud_character)
    if proposed is None:
        raise MalformedTelegram(
            f"the meter does not speak mode C (baud rate character {identification.baud_character!r})"
        )
    character, baud = max(
        (item for item in BAUD_RATES.items() if item[1] <= max(min(proposed, max_baud), SIGN_ON_BAUD)),
        key=lambda item: item[1],
    )
    return bytes([_ACK]) + f"0{character}0\r\n".encode("ascii"), baud


def with_parity(data: bytes, parity: Parity) -> bytes:
    """Characters of seven bits with their parity in the eighth."""
    if parity == "N":
        return data
    return bytes(byte | (byte.bit_count() & 1 ^ (parity == "O")) << 7 for byte in data)


def _characters(parity: Parity) -> bytes:
    """A table for bytes.translate: each byte without its parity bit; one whose parity is wrong becomes NUL."""
    good = {with_parity(bytes([character]), parity)[0]: character for character in range(128)}
    return bytes(good.get(byte, 0) for byte in range(256))


class _Values:
    """The present values of a telegram by `C.D.E`. Raises MalformedTelegram where a line without BCC is damaged."""

    def __init__(self, telegram: Telegram) -> None:
        self.maker = telegram.identification.maker
        self.checked = telegram.checked
        self._texts: dict[str, list[str]] = {}
        for line in telegram.lines:
            if line and not telegram.checked and _DATA_LINE.fullmatch(line) is None:
                raise MalformedTelegram(f"a line is damaged: {line[:40]!r}")
            for found in _DATA_SET.finditer(line):
                code = _short_code(found.group(1))
                if code is not None:
                    self._texts.setdefault(code, []).append(found.group(2))

    def has(self, code: object) -> bool:
        """Whether it was sent."""
        return code in self._texts

    __contains__ = has

    def text(self, code: str) -> str:
        """What stands between the parentheses."""
        first, *others = self._texts[code]
        if any(other != first for other in others):
            raise MalformedTelegram(f"{code} has two values")
        return first


def _short_code(code: str) -> str | None:
    """`1-0:1.8.0*255` as 1.8.0; a missing or 255 last group is 0 (EasyMeter, Landis+Gyr). None for past periods."""
    found = _CODE.fullmatch(code)
    if found is None:
        return None
    medium, channel, quantity, kind, tariff, history = found.groups()
    if (medium, channel) not in _CHANNELS or history not in (None, "255"):
        return None
    return f"{quantity}.{kind}.{0 if tariff in (None, '255') else int(tariff)}"


def _counter(values: _Values, group: str, chosen: tuple[str, ...], unit: str | None) -> tuple[int | None, int | None]:
    """The counter of a direction and its rollover, both in mWh; None where there is none."""
    codes = counter_codes(values, group, chosen)
    tariffs = (f"{group}.1", f"{group}.2")
    if codes and not (chosen or values.checked or codes[0] == f"{group}.0" or codes[:2] == tariffs):
        raise MalformedTelegram(
            f"{' and '.join(tariffs)} are not both there; if it has only {', '.join(codes)}, say so in the config"
        )
    return counter_sum(codes, lambda code: _with_unit(code, values.text(code), unit))


def _with_unit(code: str, text: str, unit: str | None) -> str:
    if _NUMBER_WITHOUT_UNIT.fullmatch(text) is None:
        return text
    if unit is None:
        raise MalformedTelegram(f"{code} reads {text[:40]!r} without a unit; compare with the display and set `unit`")
    return f"{text.rstrip('*')}*{unit}"


def _power_w(values: _Values, chosen: str | None) -> int | None:
    """Power in W, import positive; None if there is none, or it was sent without unit or without sign."""
    codes = power_codes(values, chosen)
    total_mw = 0
    for code in codes:
        text = values.text(code)
        side_mw = None if _NUMBER_WITHOUT_UNIT.fullmatch(text) else power_mw(code, text)
        if side_mw is None or (code == "15.7.0" and side_mw):
            return None
        total_mw += -side_mw if code == "2.7.0" else side_mw
    return whole_watts(total_mw) if codes else None


def _serial_number(values: _Values) -> str | None:
    for code in _SERIAL_NUMBERS:
        number = values.text(code).strip() if code in values else ""
        if number:
            return number if values.maker in number else values.maker + number
    return None
