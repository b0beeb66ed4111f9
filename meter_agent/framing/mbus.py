"""Wired M-Bus: what the records of an electricity meter say, in exact integers. Pure.

A record is a data information block (DIF, then DIFEs: coding, function, storage, tariff, subunit), a value information
block (VIF, then VIFEs: quantity, power of ten, and what else is to be known) and the data. A counter is an energy of
storage 0 (now) and function 0 (instantaneous): tariff 0 is the total, else tariffs are added up. What is delivered to
the grid is marked with VIFE 3C, or stands in a subunit that the operator names, since makers differ there.
Source: EN 13757-3:2018, clauses 6 and annex A; EN 13757-2 for the frame (as described at https://m-bus.com).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

ACKNOWLEDGE: Final = 0xE5
SHORT_START: Final = 0x10
LONG_START: Final = 0x68
STOP: Final = 0x16
MAX_FRAME_BYTES: Final = 261

SND_NKE: Final = 0x40
REQ_UD2: Final = 0x5B
FRAME_COUNT_BIT: Final = 0x20

ANYBODY: Final = 254
"""Every meter answers to this address; with several on the line their answers collide."""

ELECTRICITY: Final = 0x02

_RSP_UD: Final = (0x08, 0x18, 0x28, 0x38)
_VARIABLE_DATA: Final = (0x72, 0x76)
_HEADER_BYTES: Final = 12

_INTEGER_BYTES: Final = {1: 1, 2: 2, 3: 3, 4: 4, 6: 6, 7: 8}
_BCD_BYTES: Final = {9: 1, 10: 2, 11: 3, 12: 4, 14: 6}
_EXTENSION: Final = 0x80
_EXTENDED_VIF: Final = 0xFB
_ENERGY_WH: Final = range(0x08)
_ENERGY_MWH: Final = range(0x02)
_POWER_W: Final = range(0x28, 0x30)
_HARMLESS_VIFES: Final = (0x00, 0x3B)
_NEGATIVE_ONLY: Final = 0x3C
_MAKERS_OWN: Final = 0x7F
_ERROR_VIFES: Final = range(0x01, 0x20)

_BUSY: Final = 1
_APPLICATION_ERROR: Final = 2


class MalformedFrame(Exception):
    """An answer that is not read: `reason` says what is wrong with it, and what to do where something can be done."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class NoAnswer(MalformedFrame):
    """Nothing came at all."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record as it came: DIF and DIFEs, VIF and VIFEs, data with the low byte first."""

    information: bytes
    value_information: bytes
    data: bytes


@dataclass(frozen=True, slots=True)
class Header:
    """Who answers. `identification` are eight digits, `medium` what is measured, `status` the meter's faults."""

    manufacturer: str
    identification: str
    medium: int
    status: int


@dataclass(frozen=True, slots=True)
class MBusReading:
    """What a meter says. Counters in mWh, None where it has none; `power_w` import positive."""

    import_mwh: int | None
    export_mwh: int | None
    power_w: int | None
    serial_number: str
    import_rollover_mwh: int | None
    export_rollover_mwh: int | None


@dataclass(frozen=True, slots=True)
class _Counter:
    tariff: int
    export: bool
    energy_mwh: int
    rollover_mwh: int | None


def short_frame(control: int, address: int) -> bytes:
    """A request without data."""
    return bytes([SHORT_START, control, address, (control + address) & 0xFF, STOP])


def missing_bytes(answer: bytes) -> int:
    """How many bytes of an answer are still to come, as far as can be told; 0: it is complete.

    Raises MalformedFrame for what can be no frame.
    """
    if not answer:
        return 1
    if answer[0] == ACKNOWLEDGE:
        return 0
    if answer[0] != LONG_START:
        # Perhaps the echo of a request that is not complete yet.
        if len(answer) < 5 and answer[0] == SHORT_START:
            return 5 - len(answer)
        raise MalformedFrame(f"the answer starts with {answer[0]:02X}, as no frame does")
    if len(answer) < 4:
        return 4 - len(answer)
    return max(0, answer[1] + 6 - len(answer))


def check_envelope(frame: bytes, address: int) -> None:
    """Start, lengths, stop, checksum, direction, sender and kind of a long frame. Raises MalformedFrame.

    Stricter than pyMeterBus, which looks at one of the two lengths and at neither second start nor stop.
    """
    if len(frame) < 9 or frame[0] != LONG_START or frame[3] != LONG_START or frame[1] != frame[2]:
        raise MalformedFrame("the answer does not start as a long frame does")
    if len(frame) != frame[1] + 6 or frame[-1] != STOP:
        raise MalformedFrame("the answer is not as long as it says")
    if sum(frame[4:-2]) & 0xFF != frame[-2]:
        raise MalformedFrame("the answer's checksum is wrong")
    if frame[4] not in _RSP_UD:
        raise MalformedFrame(f"the answer's control byte is {frame[4]:02X}, which no meter sends")
    if frame[5] != address:
        raise MalformedFrame(f"meter {frame[5]} answers where {address} was asked; do two meters have one address?")
    if frame[6] not in _VARIABLE_DATA:
        raise MalformedFrame(f"the answer has the fixed structure or is an error ({frame[6]:02X}), which is not read")
    if len(frame) < 7 + _HEADER_BYTES + 2:
        raise MalformedFrame(f"the answer ends before it says who answers, after {len(frame)} bytes")


def read_records(header: Header, records: Iterable[Record], export_subunit: int | None = None) -> MBusReading:
    """The counters among all records of a meter. Raises MalformedFrame."""
    if header.medium != ELECTRICITY:
        raise MalformedFrame(f"the meter is not for electricity (medium {header.medium:02X}); check the address")
    if header.status & 0x03 in (_BUSY, _APPLICATION_ERROR):
        raise MalformedFrame(f"the meter reports that it is busy or faulty (status {header.status:02X})")
    counters: list[_Counter] = []
    power_w: int | None = None
    for record in records:
        counter = _counter(record, export_subunit)
        if counter is not None:
            counters.append(counter)
        elif power_w is None:
            power_w = _power_w(record)
    import_mwh, import_rollover_mwh = _total([c for c in counters if not c.export])
    export_mwh, export_rollover_mwh = _total([c for c in counters if c.export])
    if import_mwh is None and export_mwh is None:
        raise MalformedFrame("the meter's answer has no energy that it counts now")
    return MBusReading(
        import_mwh,
        export_mwh,
        power_w,
        f"{header.manufacturer}-{header.identification}",
        import_rollover_mwh,
        export_rollover_mwh,
    )


def _total(counters: list[_Counter]) -> tuple[int | None, int | None]:
    """Tariff 0 if it is there, else the sum of the tariffs; and the rollover where it is sure."""
    by_tariff: dict[int, _Counter] = {}
    for counter in counters:
        if by_tariff.setdefault(counter.tariff, counter) != counter:
            raise MalformedFrame(f"tariff {counter.tariff} has two counters")
    if 0 in by_tariff:
        return by_tariff[0].energy_mwh, by_tariff[0].rollover_mwh
    if not by_tariff:
        return None, None
    rollovers = {counter.rollover_mwh for counter in by_tariff.values()}
    total_mwh = sum(counter.energy_mwh for counter in by_tariff.values())
    return total_mwh, rollovers.pop() if len(rollovers) == 1 else None


def _counter(record: Record, export_subunit: int | None) -> _Counter | None:
    """The counter that a record is, or None."""
    function, storage, tariff, subunit = _addressed(record.information)
    power_of_ten, vifes = _energy_mwh(record.value_information)
    if power_of_ten is None or function or storage or subunit not in (0, export_subunit):
        return None
    if any(vife in _ERROR_VIFES for vife in vifes):
        raise MalformedFrame(f"the meter marks its counter of tariff {tariff} as faulty")
    if any(vife not in (*_HARMLESS_VIFES, _NEGATIVE_ONLY) for vife in vifes):
        return None
    step_mwh = int(10**power_of_ten)
    count, digits = _count(record)
    if count < 0:
        raise MalformedFrame(f"the counter of tariff {tariff} reads {count}")
    rollover_mwh = None if digits is None else int(10**digits) * step_mwh
    return _Counter(tariff, subunit != 0 or _NEGATIVE_ONLY in vifes, count * step_mwh, rollover_mwh)


def _addressed(information: bytes) -> tuple[int, int, int, int]:
    """Function, storage, tariff and subunit."""
    dif = information[0]
    storage, tariff, subunit = dif >> 6 & 1, 0, 0
    for i, dife in enumerate(information[1:]):
        storage |= (dife & 0x0F) << (1 + 4 * i)
        tariff |= (dife >> 4 & 0x03) << (2 * i)
        subunit |= (dife >> 6 & 1) << i
    return dif >> 4 & 0x03, storage, tariff, subunit


def _energy_mwh(value_information: bytes) -> tuple[int | None, tuple[int, ...]]:
    """The power of ten in mWh if it is an energy in Wh, and the VIFEs behind."""
    if not value_information:
        return None, ()
    if value_information[0] == _EXTENDED_VIF and len(value_information) > 1:
        vif, rest, known, offset = value_information[1] & ~_EXTENSION, value_information[2:], _ENERGY_MWH, 8
    else:
        vif, rest, known, offset = value_information[0] & ~_EXTENSION, value_information[1:], _ENERGY_WH, 0
    vifes = tuple(vife & ~_EXTENSION for vife in rest)
    if _MAKERS_OWN in vifes:
        # What follows it means what the maker likes.
        vifes = vifes[: vifes.index(_MAKERS_OWN) + 1]
    return (offset + vif if vif in known else None), vifes


def _power_w(record: Record) -> int | None:
    """Power of all phases now, in W rounded down, or None. It takes no part in the accounting."""
    if len(record.value_information) != 1 or record.value_information[0] not in _POWER_W:
        return None
    if any(_addressed(record.information)):
        return None
    exponent = record.value_information[0] - _POWER_W.start - 3
    count, _ = _count(record)
    return count * int(10 ** max(exponent, 0)) // int(10 ** max(-exponent, 0))


def _count(record: Record) -> tuple[int, int | None]:
    """The number, and how many digits it has where it is written in digits. Raises MalformedFrame."""
    coding = record.information[0] & 0x0F
    size = _INTEGER_BYTES.get(coding) or _BCD_BYTES.get(coding)
    if size is None:
        raise MalformedFrame(f"a counter is coded as {coding:X}, which is no integer")
    if len(record.data) != size:
        raise MalformedFrame(f"a record of {size} bytes has {len(record.data)}")
    if coding in _INTEGER_BYTES:
        return int.from_bytes(record.data, "little", signed=True), None
    digits = record.data[::-1].hex()
    negative = digits[0] == "f"
    if negative:
        digits = "0" + digits[1:]
    if not digits.isdecimal():
        raise MalformedFrame(f"a record reads {digits}, which are no digits")
    return -int(digits) if negative else int(digits), 2 * size
