"""IEC 62056-21: telegrams of modes C and D found in a dirty stream and read; damaged ones refused one by one.

Published telegrams: EasyMeter Q3D (pushed; in `support/telegrams.py`), Landis+Gyr E350
(https://wiki.volkszaehler.org/hardware/channels/meters/power/edl-ehz/landisgyr_e350), Landis+Gyr ZMD120, ACE3000 and
Hager eHZ (https://github.com/volkszaehler/vzlogger tests/MeterD0.cpp), EMH eHZ
(https://demo.volkszaehler.org/pipermail/volkszaehler-dev/2012-March/001680.html), Iskra MT382
(https://github.com/mtdcr/pysml/issues/4), Logarex LK13 (https://github.com/ndokter/dsmr_parser/issues/90).
"""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.telegrams import EASYMETER, LANDIS_GYR, LANDIS_GYR_IDENTIFICATION, LANDIS_GYR_LINES, block, even

from meter_agent.framing.iec62056_21 import (
    BAUD_RATES,
    MAX_LINE_BYTES,
    MAX_TELEGRAM_BYTES,
    Identification,
    Iec62056Framer,
    SignOn,
    Telegram,
    acknowledgement,
    parse_telegram,
    with_parity,
)
from meter_agent.framing.telegram import AS_SENT, MalformedTelegram, ObisChoice, TelegramReading

PUSHED = even(EASYMETER.encode())
ASKED = even(LANDIS_GYR)


def read_one(raw: bytes, choice=AS_SENT, unit=None, parity="N") -> TelegramReading:
    framer = Iec62056Framer(parity)
    (telegram,) = framer.feed(raw)
    assert (framer.refused, framer.held_bytes) == (0, 0)
    return parse_telegram(telegram, choice, unit)


def pushed(*lines: str, identification: str = "/ESY5Q3DA1004 V3.04") -> bytes:
    return "\r\n".join([identification, "", *lines, "!", ""]).encode()


def asked(*lines: str, identification: str = "/LGZ52ZMD120APt.G03") -> bytes:
    return f"{identification}\r\n".encode() + block("\r\n".join([*lines, "!", ""]))


def test_a_pushed_telegram_of_an_easymeter_is_read():
    assert read_one(PUSHED, parity="E") == TelegramReading(
        26_107_703_423, None, 336, "1ESY1011003684", import_rollover_mwh=10**14
    )


def test_a_data_block_of_a_landis_gyr_e350_is_read():
    assert read_one(ASKED, parity="E") == TelegramReading(
        1_234_120_000, 0, 0, "LGZ12314330", import_rollover_mwh=10**12, export_rollover_mwh=10**12
    )


def test_a_data_block_of_a_landis_gyr_zmd120_is_read():
    lines = (
        "F.F(00000000)",
        "0.0.0(     20000)",
        "1.8.1(001846.0*kWh)",
        "1.8.2(000000.0*kWh)",
        "2.8.1(004329.6*kWh)",
        "2.8.2(000000.0*kWh)",
        "1.8.0(001846.0*kWh)",
        "2.8.0(004329.6*kWh)",
    )
    reading = read_one(asked(*lines))
    assert (reading.import_mwh, reading.export_mwh) == (1_846_000_000, 4_329_600_000)
    assert reading.serial_number == "LGZ20000"
    # The totals lost, its tariffs say the same.
    assert read_one(asked(*lines[:6])).import_mwh == 1_846_000_000


def test_an_iskra_mt382_with_eight_tariffs_is_read_by_its_total():
    reading = read_one(
        asked(
            "0-0:96.1.1(3141)",
            "1-0:0.9.2(210528)",
            "1-0:1.7.0(001.322*kW)",
            "1-0:2.7.0(000.000*kW)",
            "1-0:1.8.0(010192.57*kWh)",
            "1-0:1.8.1(006094.31*kWh)",
            "1-0:1.8.2(001410.19*kWh)",
            "1-0:1.8.3(000981.30*kWh)",
            "1-0:1.8.4(001706.76*kWh)",
            "1-0:1.8.5(000000.00*kWh)",
            identification=r"/ISK5\2MT382-1008",
        )
    )
    assert (reading.import_mwh, reading.power_w, reading.serial_number) == (10_192_570_000, 1_322, "ISK3141")


def test_a_logarex_lk13_is_read():
    """Its registers as documented, with values in them."""
    reading = read_one(
        pushed(
            "1-0:96.1.0*255(001LOG0065800041)",
            "1-0:1.8.0*255(000123.4567*kWh)",
            "1-0:1.8.1*255(000000.0000*kWh)",
            "1-0:1.8.2*255(000123.4567*kWh)",
            "1-0:2.8.0*255(000001.0000*kWh)",
            "1-0:16.7.0*255(-000061*W)",
            "1-0:72.7.0*255(228.8*V)",
            "1-0:81.7.1*255(000*deg)",
            "1-0:96.5.0*255(001C0104)",
            identification="/LOG5LK13BE803039",
        )
    )
    assert (reading.import_mwh, reading.export_mwh, reading.power_w) == (123_456_700, 1_000_000, -61)
    assert reading.serial_number == "001LOG0065800041"


def test_an_emh_ehz_that_counts_in_one_tariff_is_read_only_if_the_config_says_so():
    lines = pushed(
        "1-0:1.8.1*255(00887.25241)", "1-0:96.5.5*255(82)", "0-0:96.1.255*255(0002)", identification="/EMH5----eHZ-E"
    )
    with pytest.raises(MalformedTelegram, match=r"1\.8\.1 and 1\.8\.2 are not both there; if it has only 1\.8\.1"):
        read_one(lines, unit="kWh")
    assert read_one(lines, ObisChoice(imports=("1.8.1",)), "kWh").import_mwh == 887_252_410


def test_counters_without_a_unit_are_read_only_if_the_config_names_it():
    """Hager eHZ, ACE3000: kWh by their displays."""
    hager = pushed("1-0:1.8.0*255(000001.2963)", "1-0:1.7.0*255(000001.2964)", identification="/HAG5eHZ010C_EHZ1vA02")
    with pytest.raises(MalformedTelegram, match="without a unit; compare with the display and set `unit`"):
        read_one(hager)
    assert read_one(hager, unit="kWh") == TelegramReading(1_296_300, None, None, None, 10**12)
    ace = asked(
        "F.F(00)", "C.1(1126120053322353)", "C.5.0(00)", "1.8.0(013925.5*)", identification=r"/ACE0\3k260V01.19"
    )
    assert read_one(ace, unit="kWh").import_mwh == 13_925_500_000
    assert read_one(ace, unit="Wh").import_mwh == 13_925_500
    assert read_one(ace, unit="kWh").serial_number == "ACE1126120053322353"


def test_values_of_past_months_and_other_meters_are_not_taken():
    """Landis+Gyr ZMD405 (https://github.com/pwitab/iec62056-21/issues/16), and a gas meter behind it."""
    reading = read_one(
        asked(
            "1.8.1(0302.8260*kWh)",
            "1.8.1*12(0075.5341*kWh)",
            "1.8.1&12(0000.0000*kWh)",
            "1.8.1*00(0000.0000*kWh)",
            "1.8.0(0302.8260*kWh)",
            "1.8.0*12(0075.5341*kWh)",
            "1-0:1.8.0*01(0001.0000*kWh)",
            "2-1:1.8.0(0009.0000*kWh)",
            "C.1.0(54800102)",
        )
    )
    assert (reading.import_mwh, reading.serial_number) == (302_826_000, "LGZ54800102")


def test_a_blank_may_stand_where_a_powers_sign_would_but_not_before_a_counter():
    """Landis+Gyr ZMD310 sends `16.7.0( 000.03*kW)` beside `36.7.0(-000.82*kW)`."""
    lines = ("1-1:1.8.0(0000094.5*kWh)", "1-1:16.7.0( 000.03*kW)")
    assert read_one(asked(*lines)).power_w == 30
    assert read_one(asked(lines[0], lines[1].replace(" ", "-"))).power_w == -30
    with pytest.raises(MalformedTelegram, match="a counter has no sign"):
        read_one(asked(lines[0].replace("(0", "( "), lines[1]))


@pytest.mark.parametrize("text", ["F.F(01)", "F.F(00000080)", "0-0:97.97.0*255(00000001)", "F.F(DEAD)"])
def test_a_meter_that_reports_a_fatal_error_is_not_read(text):
    with pytest.raises(MalformedTelegram, match="fatal error"):
        read_one(asked(text, "1.8.0(0302.8260*kWh)"))


@pytest.mark.parametrize(
    ("lines", "power_w"),
    [
        (["16.7.0(-000.458*kW)", "1.7.0(9*kW)"], -458),
        (["16.7(001.25*kW)"], 1_250),
        (["1.7.0(1.5*kW)", "2.7.0(0.2*kW)"], 1_300),
        (["2.7.0(0.2*kW)"], -200),
        (["1.7.255(-000116.77*W)"], -116),
        (["15.7.0(0.2*kW)"], None),
        (["15.7.0(0.0*kW)"], 0),
        (["16.7.0(12)"], None),
        ([], None),
    ],
)
def test_power_has_its_sign_or_is_left_out(lines, power_w):
    assert read_one(asked("1.8.0(1*kWh)", *lines)).power_w == power_w


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["1.8.0(1*MWh)"], "no number of Wh"),
        (["1.8.0(-1*kWh)"], "no sign"),
        (["1.8.0(1,5*kWh)"], "no number"),
        (["1.8.0()"], "no number"),
        (["1.8.0(1*kWh)", "1.8.0(2*kWh)"], "two values"),
        (["1.8.0(1*kWh)", "16.7.0(x*W)"], "no number of W"),
        (["C.1.0(1)"], "neither import"),
    ],
)
def test_a_telegram_with_a_right_check_character_and_an_unreadable_value_is_refused(lines, reason):
    with pytest.raises(MalformedTelegram, match=reason):
        read_one(asked(*lines))


def test_codes_that_the_config_names_must_be_there():
    raw = asked("1.8.0(1*kWh)", "1.8.3(2*kWh)", "21.7.0(5*W)")
    assert read_one(raw, ObisChoice(imports=("1.8.3",), power="21.7.0")).import_mwh == 2_000_000
    for choice in (ObisChoice(imports=("1.8.9",)), ObisChoice(exports=("2.8.0",)), ObisChoice(power="1.7.0")):
        with pytest.raises(MalformedTelegram, match="which the config names"):
            read_one(raw, choice)


@pytest.mark.parametrize(
    "lines",
    [
        ("1.8.1(1*kWh)",),  # a lost line would look like a counter that dropped
        ("1.8.0(1*kWh)", "C.1.0(1"),
        ("1.8.0(1*kWh)", "garbage"),
        ("1.8.0(1*kWh)", "C.1.0(1)x"),
    ],
)
def test_a_telegram_without_check_character_is_read_strictly(lines):
    with pytest.raises(MalformedTelegram):
        read_one(pushed(*lines))


def flipped(raw: bytes, position: int, bits: int = 1) -> bytes:
    damaged = bytearray(raw)
    damaged[position] ^= bits
    return bytes(damaged)


MUTATIONS = {
    "cut at the start": lambda raw: raw[3:],
    "cut in a line": lambda raw: raw[:60],
    "cut at a line": lambda raw: raw[: raw.rindex(raw[-40:]) :],
    "cut before its end": lambda raw: raw[:-5],
    "a bit flipped": lambda raw: flipped(raw, 70),
    "a parity bit flipped": lambda raw: flipped(raw, 70, 0x80),
    "a bit of its identification flipped": lambda raw: flipped(raw, 0),
    "two run into each other": lambda raw: raw[:80] + raw[:50],
    "a P1 telegram": lambda raw: even(EASYMETER.replace("!", "!E47C").encode()),
    "noise": lambda raw: bytes(range(256)) * 3,
    "silence": lambda raw: b"\x00" * 500,
    "an endless line": lambda raw: raw[:60] + b"x" * (2 * MAX_LINE_BYTES),
    "endless lines": lambda raw: raw[:60] + even(b"\r\n" + b"1.8.0(1*kWh)\r\n" * (MAX_TELEGRAM_BYTES // 10)),
}
BLOCK_MUTATIONS = {
    "another check character": lambda raw: flipped(raw, -1, 0x81),
    "no check character": lambda raw: raw[:-1],
    "no ETX": lambda raw: raw[:-2] + raw[-1:],
    "neither": lambda raw: raw[:-2],
    "a line doubled": lambda raw: raw.replace(even(b"C.1.1(        )\r\n"), even(b"C.1.1(        )\r\n") * 2),
    "a line lost": lambda raw: raw.replace(even(b"1.8.0(001234.120*kWh)\r\n"), b""),
}


def whole(raw: bytes) -> list[TelegramReading]:
    """What a stream reads as, refused telegrams left out."""
    readings = []
    for telegram in Iec62056Framer("E").feed(raw):
        with suppress(MalformedTelegram):
            readings.append(parse_telegram(telegram))
    return readings


@pytest.mark.parametrize(
    ("name", "good"),
    [(name, good) for name in MUTATIONS for good in (PUSHED, ASKED)] + [(n, ASKED) for n in BLOCK_MUTATIONS],
)
def test_a_mutated_telegram_is_refused_without_losing_the_next(name, good):
    mutated = (MUTATIONS | BLOCK_MUTATIONS)[name](good)
    assert mutated != good
    assert whole(mutated + good) == whole(good)
    assert len(whole(good)) == 1


def test_refusals_are_counted_and_named():
    framer = Iec62056Framer("E")
    framer.feed(flipped(ASKED, 70))
    assert (framer.refused, framer.last_refusal) == (1, "its check character is 46, computed 68")
    framer.feed(flipped(PUSHED, 70))
    assert (framer.refused, framer.last_refusal) == (2, "a character has the wrong parity")
    framer.feed(MUTATIONS["a P1 telegram"](b""))
    assert framer.last_refusal == "it ends with b'!E47C\\r\\n', as a P1 telegram does"


def test_a_telegram_that_lost_its_stx_is_refused_where_others_have_one():
    framer = Iec62056Framer("E")
    without = ASKED.replace(even(b"\x02"), b"")
    assert [telegram.checked for telegram in framer.feed(without + ASKED + without)] == [False, True]
    assert framer.last_refusal == "it has no check character, as others on this line and all answers have"


def test_telegrams_are_found_whatever_the_pieces_they_come_in():
    framer = Iec62056Framer("E")
    stream = even(b"7.12(1*kWh)\r\n!\r\n") + PUSHED + PUSHED + ASKED
    found = [telegram for i in range(len(stream)) for telegram in framer.feed(stream[i : i + 1])]
    assert [telegram.identification.maker for telegram in found] == ["ESY", "ESY", "LGZ"]
    assert [telegram.checked for telegram in found] == [False, False, True]
    assert framer.refused == 0


@pytest.mark.parametrize("parity", ["N", "E", "O"])
def test_characters_go_out_and_come_in_with_their_parity(parity):
    text = EASYMETER.encode()
    sent = with_parity(text, parity)
    assert sent == {"N": text, "E": even(text), "O": bytes(byte ^ 0x80 for byte in even(text))}[parity]
    assert len(Iec62056Framer(parity).feed(sent)) == 1
    for other in {"N", "E", "O"} - {parity}:
        assert Iec62056Framer(other).feed(sent) == ()


def test_a_meter_is_asked_and_answers():
    conversation = SignOn("E", address="123", max_baud=9_600)
    assert conversation.request == even(b"/?123!\r\n")
    assert conversation.feed(even(b"/?123!\r\n" + LANDIS_GYR_IDENTIFICATION.encode()[:10])) is None  # with an echo
    answer = conversation.feed(even(LANDIS_GYR_IDENTIFICATION.encode()[10:]))
    assert answer == (even(b"\x06040\r\n"), 4_800)
    assert conversation.feed(even(b"\x06040\r\n")) is None
    telegram = conversation.feed(even(block(LANDIS_GYR_LINES)))
    assert isinstance(telegram, Telegram)
    assert telegram.identification == Identification("LGZ", "4", "ZMF100AC.M23")


def test_data_that_came_before_it_was_asked_for_is_not_taken():
    conversation = SignOn("N")
    assert conversation.feed(block(LANDIS_GYR_LINES)) is None
    assert conversation.feed(LANDIS_GYR_IDENTIFICATION.encode()) == (b"\x06040\r\n", 4_800)
    assert conversation.feed(LANDIS_GYR_LINES.encode()) is None  # not a block
    assert conversation.last_refusal == "it has no check character, as others on this line and all answers have"
    assert conversation.feed(block(LANDIS_GYR_LINES)) is None


@pytest.mark.parametrize(
    ("proposed", "max_baud", "answer"),
    [
        ("0", 19_200, (b"\x06000\r\n", 300)),
        ("5", 19_200, (b"\x06050\r\n", 9_600)),
        ("6", 9_600, (b"\x06050\r\n", 9_600)),
        ("6", 10_000, (b"\x06050\r\n", 9_600)),
        ("4", 300, (b"\x06000\r\n", 300)),
    ],
)
def test_the_rate_is_the_meters_or_the_next_lower_one_that_is_allowed(proposed, max_baud, answer):
    assert acknowledgement(Identification("LGZ", proposed, ""), max_baud) == answer


@pytest.mark.parametrize("character", ["A", "I", "9", "x"])
def test_a_meter_of_another_mode_is_refused(character):
    assert character not in BAUD_RATES
    with pytest.raises(MalformedTelegram, match="does not speak mode C"):
        SignOn("N").feed(f"/LGZ{character}X\r\n".encode())


PIECES = [PUSHED, ASKED, PUSHED[:90], ASKED[:-1], b"/", even(b"!\r\n"), even(b"/LGZ5x\r\n\x02"), b"\n", even(b"\x03")]


@given(st.lists(st.one_of(st.binary(max_size=300), st.sampled_from(PIECES)), max_size=30))
def test_any_stream_gives_telegrams_or_nothing_in_bounded_memory(chunks):
    framer = Iec62056Framer("E")
    for chunk in chunks:
        for telegram in framer.feed(chunk):
            with suppress(MalformedTelegram):
                parse_telegram(telegram)
        assert framer.held_bytes <= MAX_TELEGRAM_BYTES + MAX_LINE_BYTES
    # Whatever came before, the second of two whole telegrams is found.
    assert parse_telegram(framer.feed(ASKED + ASKED)[-1]).import_mwh == 1_234_120_000


@given(st.lists(st.text(st.characters(max_codepoint=127, exclude_characters="\n"), max_size=60)), st.booleans())
def test_any_lines_are_read_or_refused(lines, checked):
    try:
        reading = parse_telegram(Telegram(Identification("LGZ", "5", ""), tuple(lines), checked))
    except MalformedTelegram:
        return
    assert reading.import_mwh is not None or reading.export_mwh is not None


@given(st.sampled_from([PUSHED, ASKED]), st.data())
def test_no_single_flipped_bit_changes_what_is_read(good, data):
    position = data.draw(st.integers(0, len(good) - 1))
    damaged = flipped(good, position, 1 << data.draw(st.integers(0, 7)))
    assert whole(damaged) == []
