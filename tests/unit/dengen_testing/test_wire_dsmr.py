"""The P1 telegram beside text that was written by hand after the P1 companion standard."""

import pytest
from dengen_testing.wire import dsmr
from dengen_testing.wire.registers import MeterState
from hypothesis import given
from hypothesis import strategies as st

# The DSMR 5 example in https://github.com/ndokter/dsmr_parser, test/example_telegrams.py: its CRC is 6EEE.
EXAMPLE_FOR_CRC = (
    b"/ISk5\\2MT382-1000\r\n\r\n1-3:0.2.8(50)\r\n0-0:1.0.0(170102192002W)\r\n"
    b"0-0:96.1.1(4B384547303034303436333935353037)\r\n1-0:1.8.1(000004.426*kWh)\r\n1-0:1.8.2(000002.399*kWh)\r\n"
    b"1-0:2.8.1(000002.444*kWh)\r\n1-0:2.8.2(000000.000*kWh)\r\n0-0:96.14.0(0002)\r\n1-0:1.7.0(00.244*kW)\r\n"
    b"1-0:2.7.0(00.000*kW)\r\n0-0:96.7.21(00013)\r\n0-0:96.7.9(00000)\r\n1-0:99.97.0(0)(0-0:96.7.19)\r\n"
    b"1-0:32.32.0(00000)\r\n1-0:52.32.0(00000)\r\n1-0:72.32.0(00000)\r\n1-0:32.36.0(00000)\r\n1-0:52.36.0(00000)\r\n"
    b"1-0:72.36.0(00000)\r\n0-0:96.13.0()\r\n1-0:32.7.0(0230.0*V)\r\n1-0:52.7.0(0230.0*V)\r\n1-0:72.7.0(0229.0*V)\r\n"
    b"1-0:31.7.0(0.48*A)\r\n1-0:51.7.0(0.44*A)\r\n1-0:71.7.0(0.86*A)\r\n1-0:21.7.0(00.070*kW)\r\n"
    b"1-0:41.7.0(00.032*kW)\r\n1-0:61.7.0(00.142*kW)\r\n1-0:22.7.0(00.000*kW)\r\n1-0:42.7.0(00.000*kW)\r\n"
    b"1-0:62.7.0(00.000*kW)\r\n0-1:24.1.0(003)\r\n0-1:96.1.0(3232323241424344313233343536373839)\r\n"
    b"0-1:24.2.1(170102161005W)(00000.107*m3)\r\n0-2:24.1.0(003)\r\n0-2:96.1.0()\r\n!"
)

TELEGRAM = (
    b"/DGN5\\2WIRE-LEVEL\r\n"
    b"\r\n"
    b"1-3:0.2.8(50)\r\n"
    b"0-0:1.0.0(110701000000S)\r\n"
    b"0-0:96.1.1(31303031)\r\n"
    b"1-0:1.8.1(001666.732*kWh)\r\n"
    b"1-0:1.8.2(003333.464*kWh)\r\n"
    b"1-0:2.8.1(000000.000*kWh)\r\n"
    b"1-0:2.8.2(000000.001*kWh)\r\n"
    b"0-0:96.14.0(0002)\r\n"
    b"1-0:1.7.0(00.392*kW)\r\n"
    b"1-0:2.7.0(00.000*kW)\r\n"
    b"0-0:96.7.21(00000)\r\n"
    b"0-0:96.7.9(00000)\r\n"
    b"1-0:99.97.0(0)(0-0:96.7.19)\r\n"
    b"1-0:32.32.0(00000)\r\n"
    b"1-0:32.36.0(00000)\r\n"
    b"0-0:96.13.0()\r\n"
    b"1-0:32.7.0(230.0*V)\r\n"
    b"1-0:31.7.0(002*A)\r\n"
    b"1-0:21.7.0(00.392*kW)\r\n"
    b"1-0:22.7.0(00.000*kW)\r\n"
    b"!6509\r\n"
)


def test_crc_of_public_examples() -> None:
    assert dsmr.crc16(EXAMPLE_FOR_CRC) == 0x6EEE
    # The check value of CRC-16/ARC in https://reveng.sourceforge.io/crc-catalogue/16.htm.
    assert dsmr.crc16(b"123456789") == 0xBB3D


def test_a_telegram_is_the_text_written_by_hand() -> None:
    # 2011-06-30 22:00 UTC is midnight of the first of July in Dutch summer time.
    state = MeterState(time_s=1_309_471_200, import_wh=5_000_196, export_wh=1, power_w=392, serial=1001)
    assert dsmr.telegram(state) == TELEGRAM


@pytest.mark.parametrize(
    ("time_s", "text"),
    [
        (1_301_187_599, "110327015959W"),  # the last second before summer time, 2011-03-27
        (1_301_187_600, "110327030000S"),
        (1_319_936_399, "111030025959S"),  # the last second before winter time, 2011-10-30
        (1_319_936_400, "111030020000W"),  # the same hour again
    ],
)
def test_the_hour_that_is_left_out_and_the_hour_that_comes_twice(time_s: int, text: str) -> None:
    assert dsmr.timestamp(time_s) == text


@given(st.integers(0, 999_999_999), st.integers(0, 999_999_999), st.integers(-99_999, 99_999))
def test_both_tariffs_add_up_and_the_crc_closes(import_wh: int, export_wh: int, power_w: int) -> None:
    raw = dsmr.telegram(MeterState(0, import_wh, export_wh, power_w, 7))
    values = {
        line.partition(b"(")[0]: int(line.partition(b"(")[2].partition(b"*")[0].replace(b".", b""))
        for line in raw.split(b"\r\n")
        if line.endswith(b"*kWh)")
    }
    assert values[b"1-0:1.8.1"] + values[b"1-0:1.8.2"] == import_wh
    assert values[b"1-0:2.8.1"] + values[b"1-0:2.8.2"] == export_wh
    assert int(raw[-6:-2], 16) == dsmr.crc16(raw[:-6])
