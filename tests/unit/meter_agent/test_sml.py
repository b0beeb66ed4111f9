"""SML: frames found in a dirty stream and read; damaged ones refused one by one; what meters get wrong, from captures.

Frames are written by hand in `support/telegrams.py`. The samples are bytes of real meters, which the tests need from
outside: `DENGEN_SAMPLES` names the folder that holds `sml/`.
"""

from contextlib import suppress
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.telegrams import (
    DZG,
    DZG_RIGHT,
    END,
    EXPORT_7_8_WH,
    GOOD_SML,
    IMPORT_12345_6_WH,
    ISK,
    SAMPLES,
    START,
    crc,
    entry,
    frame,
    maker,
    message,
    power,
    sml,
    value_list,
)

from meter_agent.framing.sml import (
    MAX_DEPTH,
    MAX_FIELDS,
    MAX_FRAME_BYTES,
    Crc,
    Integer,
    SmlFramer,
    parse_frame,
    parse_values,
    serial_number_of,
)
from meter_agent.framing.telegram import AS_SENT, MalformedTelegram, ObisChoice, TelegramReading

IMPORTING, EXPORTING = "65 001C0104", "65 001C0904"
"""Status words of DZG and Holley meters: bit 11 is the direction."""


def read_one(raw: bytes, choice: ObisChoice = AS_SENT) -> TelegramReading:
    framer = SmlFramer()
    (found,) = framer.feed(raw)
    assert (framer.refused, framer.held_bytes) == (0, 0)
    return parse_frame(found, choice)


@dataclass(frozen=True)
class Sample:
    """A row of the samples' README: good frames, damaged ones, and the last values in Wh and W."""

    file: str
    frames: int
    values: dict[str, str]
    reading: tuple[int | None, int | None, int | None]
    serial_number: str
    refused: int = 0


SAMPLE_TABLE = [
    Sample(
        "DZG_DVS-7420.2V.G2_mtr1",
        4,
        {"1.8.0": "2353656.9", "1.8.1": "38610.0", "1.8.2": "2315046.9", "2.8.0": "0", "16.7.0": "5.79"},
        (2_353_656_900, 0, 5),
        "1DZG0060694613",
    ),
    Sample("DrNeuhaus_SMARTY_ix-130", 12, {"2.8.0": "4373.0", "15.7.0": "0"}, (None, 4_373_000, 0), "1DNT0100008240"),
    Sample(
        # Its name, and bit 5 of its status word, say that this meter delivers the 126.5 W which it sends without sign.
        "EMH-ED300L_delivery",
        2,
        {"1.8.0": "17243675.6", "15.7.0": "126.5"},
        (17_243_675_600, None, -126),
        "06454d4801027156cd45",
    ),
    Sample(
        "EMH_eHZ-GW8E2A500AK2",
        16,
        {"1.8.1": "14798113.2", "1.8.2": "2012.4", "1.7.0": "14.4"},
        (14_800_125_600, None, 14),
        "02280816",
    ),
    Sample(
        # Three of its frames miss bytes.
        "EasyMeter_Q3A_A1064V1009",
        4,
        {"1.8.0": "2941647.1626", "2.8.0": "110073.1603", "16.7.0": "687.86"},
        (2_941_647_162, 110_073_160, 687),
        "1ESY1162232997",
        refused=3,
    ),
    Sample(
        "HOLLEY_DTZ541-ZDBA",
        7,
        {"1.8.1": "0", "1.8.2": "177361.3", "2.8.0": "314926.0", "16.7.0": "462"},
        (177_361_300, 314_926_000, 462),
        "1HLY0200239888",
    ),
    Sample(
        "ISKRA_MT175_eHZ", 10, {"1.8.0": "22462414.5", "16.7.0": "169"}, (22_462_414_500, None, 169), "1ISK0067362659"
    ),
    Sample(
        "ITRON_OpenWay-3.HZ_with_PIN",
        5,
        {"1.8.0": "25892776.7", "16.7.0": "542"},
        (25_892_776_700, None, 542),
        "1ITR0055046208",
    ),
]

needs_samples = pytest.mark.skipif(
    not SAMPLES.is_dir(),
    reason="the samples of real meters are not here; DENGEN_SAMPLES names the folder that has them",
)


def sample_bytes(sample: Sample) -> bytes:
    return (SAMPLES / f"{sample.file}.bin").read_bytes()


def decimal(raw: int, scaler: int) -> str:
    if scaler >= 0:
        return str(raw * 10**scaler)
    digits = str(raw).rjust(1 - scaler, "0")
    return f"{digits[:scaler]}.{digits[scaler:]}" if raw else "0"


@needs_samples
@pytest.mark.parametrize("sample", SAMPLE_TABLE, ids=lambda sample: sample.file)
def test_a_real_meter_gives_the_energy_and_power_of_the_table(sample):
    framer = SmlFramer()
    frames = framer.feed(sample_bytes(sample))
    assert (len(frames), framer.refused, framer.crc) == (sample.frames, sample.refused, Crc.X25)
    entries = parse_values(frames[-1]).entries
    for code, expected in sample.values.items():
        found = entries[f"1-0:{code}*255"]
        assert isinstance(found.value, Integer)
        shown = decimal(found.value.value, found.scaler)
        assert shown == expected or shown == f"{expected}.0"
    reading = parse_frame(frames[-1])
    assert (reading.import_mwh, reading.export_mwh, reading.power_w) == sample.reading
    assert reading.serial_number == sample.serial_number
    assert [parse_frame(frame).serial_number for frame in frames] == [sample.serial_number] * sample.frames


DAMAGE = {
    "cut at its start": lambda raw: raw[5:],
    "cut in the middle": lambda raw: raw[: len(raw) // 2] + raw[len(raw) // 2 + 3 :],
    "cut at its end": lambda raw: raw[:-5],
    "cut in its CRC": lambda raw: raw[:-1],
    "half of it doubled": lambda raw: raw[: len(raw) // 2] + raw,
    "a byte doubled": lambda raw: raw[: len(raw) // 2] + raw[len(raw) // 2 - 1 :],
    "four bytes doubled": lambda raw: raw[: len(raw) // 2] + raw[len(raw) // 2 - 4 :],
    "a bit flipped": lambda raw: raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :],
    "a bit of the padding flipped": lambda raw: raw[:-3] + bytes([raw[-3] ^ 2]) + raw[-2:],
    "a bit of the CRC flipped": lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
}


@needs_samples
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("sample", SAMPLE_TABLE, ids=lambda sample: sample.file)
def test_one_damaged_frame_of_a_real_meter_costs_that_frame_only(sample, damage):
    start, end = bytes.fromhex(START), bytes.fromhex(END)
    pieces = [start + piece[: piece.find(end) + 8] for piece in sample_bytes(sample).split(start)[1:]]
    good = [raw for raw in pieces if SmlFramer().feed(raw)]
    expected = [SmlFramer().feed(raw)[0] for raw in good]
    for index, raw in enumerate(good[:3]):
        framer = SmlFramer()
        found = framer.feed(b"".join([*good[:index], DAMAGE[damage](raw), *good[index + 1 :]]))
        lost = expected[:index] + expected[index + 1 :]
        # What was doubled in front of a whole frame is refused, and the frame itself is read.
        assert list(found) == (expected if damage == "half of it doubled" else lost)


def test_a_frame_is_read():
    assert read_one(GOOD_SML) == TelegramReading(12_345_600, 7_800, -30, "1ISK0067174915")


def test_the_checksums_are_those_of_the_catalogue_and_of_captured_messages():
    """https://reveng.sourceforge.io/crc-catalogue/16.htm; a Holley DTZ541's messages in SmlLib issue 22."""
    assert Crc.X25.of(b"123456789") == bytes.fromhex("6E90")
    assert Crc.KERMIT.of(b"123456789") == bytes.fromhex("2189")
    holley = "76040000016200620072650000010176010107 0000{} 0B0A01484C5902000159BB0101"
    assert Crc.KERMIT.of(bytes.fromhex(holley.format("0A583B80"))) == bytes.fromhex("565D")
    assert Crc.KERMIT.of(bytes.fromhex(holley.format("0A575852"))) == bytes.fromhex("547D")


@given(st.binary(max_size=60))
def test_the_checksums_agree_with_a_bit_by_bit_one(data):
    assert (Crc.X25.of(data), Crc.KERMIT.of(data)) == (crc(data), crc(data, "kermit"))


def test_both_checksums_are_found_and_the_one_that_fits_is_remembered():
    kermit = sml(IMPORT_12345_6_WH, kind="kermit")
    framer = SmlFramer()
    assert len(framer.feed(kermit)) == 1
    assert framer.crc is Crc.KERMIT
    assert framer.feed(GOOD_SML) == ()
    assert framer.last_refusal == "its CRC is of another kind than that of the frames before"
    assert len(framer.feed(GOOD_SML)) == 1  # another meter was plugged in
    assert framer.crc is Crc.X25


def test_escape_bytes_in_the_data_are_taken_back():
    value = entry("0100010800FF", "69 00 1B1B1B1B 000000")
    assert read_one(sml(value)).import_mwh == 0x001B1B1B1B000000 * 100
    assert b"\x1b" * 8 in sml(value)


@pytest.mark.parametrize("padding", range(4))
def test_all_lengths_of_padding_are_read(padding):
    lists = value_list(IMPORT_12345_6_WH, entry("0100600100FF", f"0{padding + 2}" + "41" * (padding + 1)))
    assert read_one(frame(lists)).import_mwh == 12_345_600


def test_a_total_is_taken_and_else_the_tariffs_are_added_up():
    tariffs = entry("0100010801FF", "62 0A"), entry("0100010802FF", "62 0F", scaler="52 FC")
    assert read_one(sml(*tariffs)).import_mwh == 1_001  # 1 Wh and 0.0015 Wh
    assert read_one(sml(*tariffs, IMPORT_12345_6_WH)).import_mwh == 12_345_600
    assert read_one(sml(*tariffs), ObisChoice(imports=("1.8.2",))).import_mwh == 1
    with pytest.raises(MalformedTelegram, match=r"it has no 1\.8\.3, which the config names"):
        read_one(sml(*tariffs), ObisChoice(imports=("1.8.3",)))


@pytest.mark.parametrize(
    ("value", "scaler", "mwh"),
    [
        ("62 FF", "52 FF", 25_500),
        ("63 FFFF", "52 00", 65_535_000),
        ("64 010000", "52 00", 65_536_000),
        ("66 0001000000", "52 FF", 1_677_721_600),
        ("68 00000000000001", "52 03", 1_000_000),
        ("59 000000000D637E08", "52 FF", 22_462_413_600),
        ("69 0000000000001F16", "52 03", 7_958_000_000),
        ("65 0001E240", "01", 123_456_000),
    ],
)
def test_numbers_of_any_width_are_exact(value, scaler, mwh):
    assert read_one(sml(entry("0100010800FF", value, scaler=scaler))).import_mwh == mwh


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (entry("0100010800FF", "55 FFFFFFFF"), "has no value"),
        (entry("0100010800FF", "65 FFFFFFFF"), "has no value"),
        (entry("0100010800FF", "59 7FFFFFFFFFFFFFFF"), "has no value"),
        (entry("0100010800FF", "01"), "no number of Wh"),
        (entry("0100010800FF", "05 31323334"), "no number of Wh"),
        (entry("0100010800FF", "65 0001E240", unit="62 1B"), "no number of Wh"),
        (entry("0100010800FF", "65 0001E240", unit="01"), "no number of Wh"),
        (entry("0100010800FF", "65 0001E240", scaler="52 0A"), "impossible scaler"),
        (IMPORT_12345_6_WH + entry("0100010800FF", "65 0001E241"), "two values"),
        ("76 07 0100010800FF 01 01 62 1E 52 FF 62 01", "not as it should be"),
        ("77 06 0100010800 01 01 62 1E 52 FF 62 01 01", "no OBIS code"),
    ],
)
def test_a_counter_that_is_not_sure_is_refused(bad, reason):
    entries = [bad] if bad.count("0100010800FF") < 2 else [IMPORT_12345_6_WH, bad.removeprefix(IMPORT_12345_6_WH)]
    with pytest.raises(MalformedTelegram, match=reason):
        read_one(sml(*entries))


def test_frames_without_counters_lists_or_with_two_meters_are_refused():
    with pytest.raises(MalformedTelegram, match="neither import"):
        read_one(sml(power("52 01"), entry("0100010800FE", "62 01")))
    with pytest.raises(MalformedTelegram, match="no list of values"):
        read_one(frame(message("72 63 0201 71 01")))
    with pytest.raises(MalformedTelegram, match="two meters"):
        read_one(frame(value_list(IMPORT_12345_6_WH) + value_list(EXPORT_7_8_WH, server_id=DZG)))


def test_a_wrong_checksum_inside_a_frame_is_refused():
    inner = bytearray(value_list(IMPORT_12345_6_WH))
    inner[-2] ^= 1
    with pytest.raises(MalformedTelegram, match="CRC of a message in it is wrong"):
        read_one(frame(bytes(inner)))


def test_a_checksum_that_lost_its_leading_zero_is_right():
    """Numbers may be sent without leading zero bytes; DZG meters do it to the CRC too."""
    for transaction in range(70_000):
        content = (
            bytes.fromhex("76 05") + transaction.to_bytes(4, "big") + bytes.fromhex("62 00 62 00 72 63 0201 71 01")
        )
        if crc(content)[0] == 0:
            break
    short = content + b"\x62" + crc(content)[1:] + b"\x00"
    assert read_one(frame(value_list(IMPORT_12345_6_WH) + short)).import_mwh == 12_345_600


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ("77 05 00112233", "no message"),
        ("76 05 0011", "after the end"),
        ("76 FF8F8F8F0F", "longer than 4095"),
        ("76" + "71" * (MAX_DEPTH + 1) + "01", "deep"),
        ("76 72 F10F 01", "after the end"),
        ("76 00 01 01 01", "after the end"),
        ("76 35 00112233 01 01 01", "unknown type"),
        ("76 6A 000000000000000000 01 01 01", "unknown type"),
        ("76 41 01 01 01", "unknown type"),
        ("76 01 01 01 01 63 BAD0 01", "end where it should"),
    ],
)
def test_a_frame_that_is_no_sml_is_refused(payload, reason):
    with pytest.raises(MalformedTelegram, match=reason):
        parse_frame(bytes.fromhex(payload))


def test_a_frame_of_nothing_but_fields_is_refused():
    fields = b"\x76" + bytes.fromhex("FF8F0F") + b"\x01" * (MAX_FIELDS + 10)
    with pytest.raises(MalformedTelegram, match="more than 4096 fields"):
        parse_frame(fields)


# Values of captures: libsml-testing pull/16 (+356.24 W as 53 8B28), pull/15 (-105.50 W as 53 D6CA), libsml issue 125.
@pytest.mark.parametrize(
    ("server_id", "status", "value", "power_w"),
    [
        (DZG, IMPORTING, "53 8B28", 356),
        (DZG, IMPORTING, "52 F0", 2),
        (DZG, IMPORTING, "54 FF0000", 167_116),
        (DZG, IMPORTING, "53 025C", 6),
        (DZG, EXPORTING, "55 FFFF88B8", -305),
        (DZG, EXPORTING, "53 8B28", None),
        (DZG, "01", "53 8B28", None),
        (DZG, "65 001C0105", "53 8B28", None),
        (DZG_RIGHT, EXPORTING, "53 D6CA", -105),
        (DZG_RIGHT, "64 1C6904", "53 D6CA", -105),
        (DZG_RIGHT, IMPORTING, "53 D6CA", None),
        (DZG_RIGHT, "01", "53 D6CA", None),
        (DZG_RIGHT, EXPORTING, "55 00FC9A4B", None),
        (DZG_RIGHT, IMPORTING, "55 00FC9A4B", 165_545),
    ],
)
def test_a_dzg_meter_that_cuts_signs_is_told_from_one_that_does_not(server_id, status, value, power_w):
    counter = entry("0100010800FF", "65 0001E240", status=status)
    reading = read_one(sml(maker("DZG"), counter, power(value), server_id=server_id))
    assert (reading.import_mwh, reading.power_w) == (12_345_600, power_w)


@pytest.mark.parametrize(
    ("letters", "status", "code", "value", "power_w"),
    [
        ("EMH", "63 01B0", "01000F0700FF", "55 000004F1", -126),
        ("EMH", "63 0182", "01000F0700FF", "55 0000055B", 137),
        ("EMH", "65 001C0104", "01000F0700FF", "55 000004F1", None),
        ("EMH", "01", "01000F0700FF", "55 000004F1", None),
        ("XYZ", "63 01B0", "01000F0700FF", "55 000004F1", None),
        ("XYZ", "01", "01000F0700FF", "65 00000000", 0),
        ("HLY", EXPORTING, "0100100700FF", "63 04F1", -126),
        ("HLY", IMPORTING, "0100100700FF", "63 04F1", 126),
        ("XYZ", IMPORTING, "0100100700FF", "63 04F1", None),
        ("XYZ", IMPORTING, "0100100700FF", "53 04F1", 126),
        ("XYZ", IMPORTING, "0100010700FF", "63 04F1", 126),
        ("XYZ", IMPORTING, "0100020700FF", "63 04F1", -126),
    ],
)
def test_power_without_a_sign_gets_that_of_the_status_word_or_is_left_out(letters, status, code, value, power_w):
    counter = entry("0100010800FF", "65 0001E240", status=status)
    assert read_one(sml(maker(letters), counter, power(value, "52 FF", code))).power_w == power_w


def test_power_in_another_unit_is_left_out():
    """A Honeywell AS2020 says Wh: https://www.mikrocontroller.net/topic/538936."""
    assert read_one(sml(IMPORT_12345_6_WH, entry("0100100700FF", "62 15"))).power_w is None
    sides = power("62 15", "52 00", "0100010700FF"), entry("0100020700FF", "62 15")
    assert read_one(sml(IMPORT_12345_6_WH, *sides)).power_w is None
    assert read_one(sml(IMPORT_12345_6_WH, *sides), ObisChoice(power="1.7.0")).power_w == 21


@pytest.mark.parametrize(
    ("server_id", "serial_number"),
    [
        (DZG, "1DZG0042082910"),
        ("09 01 31534B 00 04010203", "09013153 4b00 04010203"),
        ("31 32 41", "12A"),
        ("00", "00"),
    ],
)
def test_a_server_id_is_what_the_meter_shows(server_id, serial_number):
    assert serial_number_of(bytes.fromhex(server_id)) == serial_number.replace(" ", "")


MUTATIONS = {name: damage(GOOD_SML) for name, damage in DAMAGE.items() if name != "half of it doubled"} | {
    "two run into each other": GOOD_SML[:80] + GOOD_SML[:50],
    "a start in its middle": GOOD_SML[:40] + bytes.fromhex(START) + GOOD_SML[40:],
    "an end in its middle": GOOD_SML[:40] + bytes.fromhex("1B1B1B1B1A000000") + GOOD_SML[40:],
    "block transfer of version 2": bytes.fromhex("1B1B1B1B 02020202") + GOOD_SML[8:],
    "a block mark in it": GOOD_SML[:40] + bytes.fromhex("1B1B1B1B 02000000") + GOOD_SML[40:],
    "four bytes of padding": GOOD_SML[:-3] + b"\x04" + crc(GOOD_SML[:-3] + b"\x04"),
    "all padding": bytes.fromhex(START + "1B1B1B1B1A03") + crc(bytes.fromhex(START + "1B1B1B1B1A03")),
    "escapes": b"\x1b" * 500,
    "noise": bytes(range(256)) * 3,
    "silence": b"\x00" * 500,
    "too long": bytes.fromhex(START) + b"x" * (2 * MAX_FRAME_BYTES),
    "too long with an end": frame(b"x" * (MAX_FRAME_BYTES + 4)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutated_frame_is_refused_without_losing_the_next(name):
    framer = SmlFramer()
    (payload,) = framer.feed(GOOD_SML)
    assert framer.feed(MUTATIONS[name] + GOOD_SML) == (payload,)
    if bytes.fromhex(START) in MUTATIONS[name]:
        assert framer.refused >= 1
        assert framer.last_refusal


def test_frames_are_found_whatever_the_pieces_they_come_in():
    framer = SmlFramer()
    stream = b"tail\x1b\x1b" + GOOD_SML + b"\x1b" + sml(IMPORT_12345_6_WH)
    found = [payload for i in range(len(stream)) for payload in framer.feed(stream[i : i + 1])]
    assert [parse_frame(payload).export_mwh for payload in found] == [7_800, None]
    assert framer.refused == 0


PIECES = [GOOD_SML, GOOD_SML[:-1], b"\x1b" * 4, bytes.fromhex(START), bytes.fromhex("1B1B1B1B1A00"), b"\x1b"]


@given(st.lists(st.one_of(st.binary(max_size=300), st.sampled_from(PIECES)), max_size=30))
def test_any_stream_gives_frames_or_nothing_in_bounded_memory(chunks):
    framer = SmlFramer()
    for chunk in chunks:
        for payload in framer.feed(chunk):
            with suppress(MalformedTelegram):
                parse_frame(payload)
        assert framer.held_bytes <= MAX_FRAME_BYTES
    # Whatever came before, the second of two whole frames is found.
    framer.feed(GOOD_SML)
    assert parse_frame(framer.feed(GOOD_SML)[-1]).import_mwh == 12_345_600


@given(st.one_of(st.binary(max_size=400), st.integers(0, 300).map(lambda cut: SmlFramer().feed(GOOD_SML)[0][:cut])))
def test_any_payload_is_read_or_refused(payload):
    try:
        reading = parse_frame(payload)
    except MalformedTelegram:
        return
    assert reading.import_mwh is not None or reading.export_mwh is not None


@given(st.integers(0, len(GOOD_SML) - 1), st.integers(1, 255))
def test_no_single_damaged_byte_changes_what_is_read(position, flip):
    damaged = bytearray(GOOD_SML)
    damaged[position] ^= flip
    assert SmlFramer().feed(bytes(damaged)) == ()


def test_a_longer_list_than_fifteen_values_is_read():
    others = [entry(f"01005107{i:02x}FF", "62 01", unit="62 08") for i in range(20)]
    assert read_one(sml(*others, IMPORT_12345_6_WH, server_id=ISK)).import_mwh == 12_345_600
