"""M-Bus answers of real electricity meters, read in exact integers; what is not sure is refused.

The frames are from https://github.com/rscada/libmbus test/test-frames/: FIN-Finder-7E.23.8.230.0020.hex,
EMU_EMU-Professional-375-M-Bus.hex, electricity-meter-1, allmess_cf50.hex; and abb_xxx.hex (an ABB B24) of
https://github.com/ganehag/pyMeterBus tests/test-frames/. Their values are read off the bytes by hand.
"""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meter_agent.config import MBusConfig
from meter_agent.framing.mbus import Header, MalformedFrame, MBusReading, Record, check_envelope, read_records
from meter_agent.readers.mbus import MBusReader

meterbus = pytest.importorskip("meterbus")

FINDER = bytes.fromhex(
    "6838386808197207620023 2E19230292000000 8C100468281700 8C110468281700 02FDC9FF01E600 02FDDBFF010600"
    "02ACFF010900 8240ACFF01FDFF 5B16"
)
ABB_B24 = bytes.fromhex(
    "6885856808007272593800420420020C0000000E840007590000000004FFA0006400000004FFA1150000000004FFA2000500000004FFA315"
    "0000000007FFA600000000000000000007FFA700000000000000000007FFA800000000000000000007FFA90000000000000000000DFD8E00"
    "07302E34322E31420DFFAA000B3030312D333131203432421FBD16"
)
EMU_375 = bytes.fromhex(
    "68F4F468080072 29260300B5151002 02000000 0C7829260300 84100354050000 84200300000000 84904003AE1E0000"
    "84A0400300000000"
    "04ABFF01FEFFFFFF 04ABFF0200000000 04ABFF0300000000 042BFEFFFFFF 848040ABFF010E000000 848040ABFF0200000000"
    "848040ABFF0300000000 8480402B0E000000 02FDC8FF01D108 02FDC8FF020000 02FDC8FF030000 22FDC8FF015207 22FDC8FF020000"
    "22FDC8FF030000 12FDC8FF016A09 12FDC8FF020000 12FDC8FF030000 03FDD9FF01BEFFFF 03FDD9FF02000000 03FDD9FF03000000"
    "03FD59BEFFFF 01FFE1FF010D 01FFE1FF0200 01FFE1FF0300 02FF52F401 02FD603800 01FD1700 7416"
)
TWO_TARIFFS = bytes.fromhex(
    "68929268080172 3E020005434C1202 13000000 8C100452120000 8C110452120000 8C200433447701 8C210433447701"
    "02FDC9FF01ED00"
    "02FDDBFF012000 02ACFF014F00 8240ACFF01EEFF 02FDC9FF02E700 02FDDBFF022300 02ACFF025100 8240ACFF02F1FF"
    "02FDC9FF03E400 02FDDBFF034500 02ACFF03A000 8240ACFF03E0FF 02FF680000 02ACFF004001 8240ACFF00BFFF 01FF1304 D916"
)
HEAT_METER = bytes.fromhex(
    "683D3D6808017200512002824D02040088000004070000 00000C15030000000B2E0000000B3B0000000A5A88120A5E16050B6123770002"
    "6C8C110227370D0F600067 16"
)

REAL_METERS = {
    "Finder 7E.23": (FINDER, 0x19, MBusReading(1_728_680_000, None, None, "FIN-23006207", 10**12, None)),
    "ABB B24": (ABB_B24, 0, MBusReading(59_070_000, None, None, "ABB-00385972", 10**16, None)),
    "EMU Professional 375": (EMU_375, 0, MBusReading(1_364_000, None, -2, "EMU-00032629", None, None)),
    "two tariffs": (TWO_TARIFFS, 1, MBusReading(17_756_850_000, None, None, "SBC-0500023e", 10**12, None)),
}


def read(frame, address):
    check_envelope(frame, address)
    return read_records(*taken_apart(frame))


def taken_apart(frame):
    reader = MBusReader("m", MBusConfig("mbus", "tty"), None, None, meterbus)
    return reader._taken_apart([frame])


@pytest.mark.parametrize("name", REAL_METERS)
def test_a_real_meter_reads_as_its_display_says(name):
    frame, address, expected = REAL_METERS[name]
    assert read(frame, address) == expected


def test_a_heat_meter_is_no_electricity_meter():
    with pytest.raises(MalformedFrame, match="not for electricity"):
        read(HEAT_METER, 1)


@pytest.mark.parametrize("position", range(len(FINDER)))
def test_every_flipped_bit_is_noticed(position):
    for bit in range(8):
        damaged = bytearray(FINDER)
        damaged[position] ^= 1 << bit
        with pytest.raises(MalformedFrame):
            check_envelope(bytes(damaged), 0x19)


@pytest.mark.parametrize("cut", range(len(FINDER)))
def test_a_cut_frame_is_refused(cut):
    with pytest.raises(MalformedFrame):
        check_envelope(FINDER[:cut], 0x19)


@pytest.mark.parametrize("size", range(12))
def test_a_whole_frame_without_a_whole_header_is_refused(size):
    """Its checksum is right. Found by fuzzing: the library would raise an IndexError later on."""
    body = bytes([0x08, 1, 0x72]) + FINDER[7 : 7 + size]
    frame = bytes([0x68, len(body), len(body), 0x68]) + body + bytes([sum(body) & 0xFF, 0x16])
    with pytest.raises(MalformedFrame, match=r"before it says who answers|does not start"):
        read(frame, 1)


def test_the_frame_of_another_address_or_kind_is_refused():
    with pytest.raises(MalformedFrame, match="meter 25 answers where 3 was asked"):
        check_envelope(FINDER, 3)
    for position, byte, reason in ((4, 0x5B, "no meter sends"), (6, 0x73, "fixed structure")):
        other = bytearray(FINDER)
        other[position] = byte
        other[-2] = sum(other[4:-2]) & 0xFF
        with pytest.raises(MalformedFrame, match=reason):
            check_envelope(bytes(other), 0x19)


ELECTRIC = Header("ABC", "12345678", 0x02, 0)


def record(text):
    return Record(*(bytes.fromhex(part) for part in text.split("|")))


@pytest.mark.parametrize(
    ("records", "imported", "exported"),
    [
        (["04|00|01000000"], 1, None),
        (["04|07|01000000"], 10_000_000, None),
        (["04|FB00|01000000"], 100_000_000, None),
        (["04|FB01|02000000"], 2_000_000_000, None),
        (["07|03|0100000001000000"], 4_294_967_297_000, None),
        (["0E|03|214365870921"], 210_987_654_321_000, None),
        (["04|833B|05000000", "04|833C|07000000"], 5_000, 7_000),
        (["04|03|05000000", "8440|03|07000000"], 5_000, 7_000),
        (["8410|03|01000000", "8420|03|02000000"], 3_000, None),
        (["04|03|09000000", "8410|03|01000000", "8420|03|02000000"], 9_000, None),
        # Storage 1, a maximum, a phase and a volume are no counters.
        (["04|03|09000000", "44|03|01000000", "14|03|01000000", "04|83FF01|01000000", "04|13|01000000"], 9_000, None),
    ],
)
def test_counters_are_found_and_exact(records, imported, exported):
    reading = read_records(ELECTRIC, [record(text) for text in records], export_subunit=1)
    assert (reading.import_mwh, reading.export_mwh) == (imported, exported)


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        (["04|03|FFFFFFFF"], "reads -1"),
        (["0C|03|000000F1"], "reads -1000000"),
        (["0C|03|0A000000"], "which are no digits"),
        (["0C|03|EEEEEEEE"], "which are no digits"),
        (["04|03|010000"], "a record of 4 bytes has 3"),
        (["05|03|00000000"], "coded as 5"),
        (["04|8315|01000000"], "marks its counter of tariff 0 as faulty"),
        (["04|03|01000000", "04|03|02000000"], "tariff 0 has two counters"),
        (["44|03|01000000"], "no energy that it counts now"),
        ([], "no energy that it counts now"),
    ],
)
def test_a_counter_that_is_not_sure_is_refused(records, reason):
    with pytest.raises(MalformedFrame, match=reason):
        read_records(ELECTRIC, [record(text) for text in records])


@pytest.mark.parametrize("status", [0x01, 0x02, 0x06])
def test_a_busy_or_faulty_meter_is_not_believed(status):
    with pytest.raises(MalformedFrame, match="busy or faulty"):
        read_records(Header("ABC", "1", 2, status), [record("04|03|01000000")])


@given(st.binary(max_size=240))
def test_no_records_raise_anything_but_the_declared_error(payload):
    body = bytes([0x08, 1, 0x72]) + FINDER[7:19] + payload
    frame = bytes([0x68, len(body), len(body), 0x68]) + body + bytes([sum(body) & 0xFF, 0x16])
    with suppress(MalformedFrame):
        assert read(frame, 1).serial_number


@given(st.lists(st.tuples(st.integers(7, len(EMU_375) - 3), st.integers(0, 255)), min_size=1, max_size=5))
def test_damage_behind_a_right_checksum_raises_nothing_else_either(changes):
    damaged = bytearray(EMU_375)
    for position, byte in changes:
        damaged[position] = byte
    damaged[-2] = sum(damaged[4:-2]) & 0xFF
    with suppress(MalformedFrame):
        reading = read(bytes(damaged), 0)
        assert reading.import_mwh is None or reading.import_mwh >= 0
