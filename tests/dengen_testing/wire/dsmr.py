"""The text of a DSMR 5 telegram, as a Dutch smart meter pushes it from its P1 port. Pure.

Source: "Dutch Smart Meter Requirements, P1 Companion Standard" 5.0.2 (Netbeheer Nederland): lines end in CR LF, the
telegram begins with "/" and ends with "!", after which the CRC-16 of everything from "/" to "!" stands in four
hexadecimal digits. Time is local Dutch time with S (summer) or W (winter).
"""

from datetime import UTC, datetime, timedelta
from typing import Final

from dengen_testing.wire.registers import MeterState

_IDENTIFICATION: Final = "/DGN5\\2WIRE-LEVEL"
_ONE_HOUR: Final = timedelta(hours=1)


def crc16(data: bytes) -> int:
    """CRC-16/ARC: reflected polynomial 0xA001, start value 0."""
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0xA001 if crc & 1 else crc >> 1
    return crc


def telegram(state: MeterState) -> bytes:
    """The whole telegram. Tariff 1 has a third of each counter and tariff 2 the rest, so both of them move."""
    import_low_wh, export_low_wh = state.import_wh // 3, state.export_wh // 3
    drawn_w, fed_in_w = max(0, state.power_w), max(0, -state.power_w)
    lines = (
        _IDENTIFICATION,
        "",
        "1-3:0.2.8(50)",
        f"0-0:1.0.0({timestamp(state.time_s)})",
        f"0-0:96.1.1({str(state.serial).encode().hex().upper()})",
        f"1-0:1.8.1({_kilo(import_low_wh, 6)}*kWh)",
        f"1-0:1.8.2({_kilo(state.import_wh - import_low_wh, 6)}*kWh)",
        f"1-0:2.8.1({_kilo(export_low_wh, 6)}*kWh)",
        f"1-0:2.8.2({_kilo(state.export_wh - export_low_wh, 6)}*kWh)",
        "0-0:96.14.0(0002)",
        f"1-0:1.7.0({_kilo(drawn_w, 2)}*kW)",
        f"1-0:2.7.0({_kilo(fed_in_w, 2)}*kW)",
        "0-0:96.7.21(00000)",
        "0-0:96.7.9(00000)",
        "1-0:99.97.0(0)(0-0:96.7.19)",
        "1-0:32.32.0(00000)",
        "1-0:32.36.0(00000)",
        "0-0:96.13.0()",
        "1-0:32.7.0(230.0*V)",
        f"1-0:31.7.0({(drawn_w + fed_in_w + 115) // 230:03d}*A)",
        f"1-0:21.7.0({_kilo(drawn_w, 2)}*kW)",
        f"1-0:22.7.0({_kilo(fed_in_w, 2)}*kW)",
        "!",
    )
    body = "\r\n".join(lines).encode("ascii")
    return body + b"%04X\r\n" % crc16(body)


def timestamp(time_s: int) -> str:
    """UTC epoch seconds as YYMMDDhhmmss in Dutch local time, with S or W."""
    utc = datetime.fromtimestamp(time_s, UTC)
    # Summer time in the EU runs from the last Sunday of March to that of October, 01:00 UTC (directive 2000/84/EC).
    summer = _last_sunday(utc.year, 3) + _ONE_HOUR <= utc < _last_sunday(utc.year, 10) + _ONE_HOUR
    local = utc + (2 if summer else 1) * _ONE_HOUR
    return f"{local:%y%m%d%H%M%S}{'S' if summer else 'W'}"


def _last_sunday(year: int, month: int) -> datetime:
    last = datetime(year, month, 31, tzinfo=UTC)
    return last - timedelta(days=last.isoweekday() % 7)


def _kilo(thousandths: int, digits: int) -> str:
    return f"{thousandths // 1_000:0{digits}d}.{thousandths % 1_000:03d}"
