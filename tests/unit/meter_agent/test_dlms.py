"""Pushed DLMS lists: every layout that Aidon, Kaifa and Kamstrup send, as other people recorded it from their meters.

Whole frames, with the check sequences that the meters put there:
- https://github.com/UtilitechAS/amsreader-firmware frames/: Aidon-TN-3p.raw, Aidon-Sweden.raw, Kamstrup-1p.raw,
  Kamstrup-Sweden.raw, KamstrupOmnipower_Bornholm_DK_5digitVoltage_9sep25.log (encrypted)
- https://github.com/talisker77/AmsToMqttBridge Samples/Kaifa/kaifa-60-min-data.txt, and
  https://github.com/roarfred/AmsToMqttBridge Samples/Kamstrup (list 1, old firmware with a tagged date)
Messages without HDLC: https://github.com/toreamun/amshan tests/test_kaifa.py (Sweden), frames/Kamstup-Encrypted.raw of
the first (Denmark, decrypted), https://github.com/fneur/smart-meter-tirol doc/EXAMPLE.md (Kaifa in Austria, encrypted,
with its key).
"""

from contextlib import suppress

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from meter_agent.framing.ciphering import MeterKeys
from meter_agent.framing.dlms import Dialect, PushedList, parse_list
from meter_agent.framing.hdlc import HdlcFramer, crc16_x25
from meter_agent.framing.telegram import MalformedTelegram

AIDON_NORWAY_HOURLY = bytes.fromhex(
    "7EA18A4108 8313EBFD E6E700 0F40000000 00 0112"
    "0202 090601010002 81FF 0A0B4149444F4E5F5630303031"
    "0202 09060000600100FF 0A1037333539393932383930343937393937"
    "0202 09060000600107FF 0A0436353334"
    "0203 09060100010700FF 060000096D 02020F00161B"
    "0203 09060100020700FF 0600000000 02020F00161B"
    "0203 09060100030700FF 0600000000 02020F00161D"
    "0203 09060100040700FF 060000025B 02020F00161D"
    "0203 090601001F0700FF 100011 02020FFF1621"
    "0203 09060100330700FF 100003 02020FFF1621"
    "0203 09060100470700FF 10005A 02020FFF1621"
    "0203 09060100200700FF 120904 02020FFF1623"
    "0203 09060100340700FF 120902 02020FFF1623"
    "0203 09060100480700FF 1208EC 02020FFF1623"
    "0202 09060000010000FF 090C07E50A1F00140000FF000000"
    "0203 09060100010800FF 0600569F52 02020F01161E"
    "0203 09060100020800FF 0600000000 02020F01161E"
    "0203 09060100030800FF 06000022D0 02020F011620"
    "0203 09060100040800FF 06000AF5EC 02020F011620"
    "51D77E"
)
"""5 676 882 × 10 Wh; 2413 W."""

AIDON_NORWAY_POWER = bytes.fromhex(
    "7EA02A410883130413E6E7000F40000000000101020309060100010700FF060000095602020F00161BAFA17E"
)

AIDON_SWEDEN = bytes.fromhex(
    "7EA2434108831385EBE6E7000F4000000000 011B"
    "0202 09060000010000FF 090C07E50C0A05103900FF8000FF"
    "0203 09060100010700FF 06000007E5 02020F00161B 0203 09060100020700FF 0600000000 02020F00161B"
    "0203 09060100030700FF 0600000000 02020F00161D 0203 09060100040700FF 0600000248 02020F00161D"
    "0203 090601001F0700FF 100009 02020FFF1621 0203 09060100330700FF 100025 02020FFF1621"
    "0203 09060100470700FF 10002E 02020FFF1621 0203 09060100200700FF 1208E3 02020FFF1623"
    "0203 09060100340700FF 1208D8 02020FFF1623 0203 09060100480700FF 1208DF 02020FFF1623"
    "0203 09060100150700FF 06000000D5 02020F00161B 0203 09060100160700FF 0600000000 02020F00161B"
    "0203 09060100170700FF 0600000000 02020F00161D 0203 09060100180700FF 0600000036 02020F00161D"
    "0203 09060100290700FF 060000030C 02020F00161B 0203 090601002A0700FF 0600000000 02020F00161B"
    "0203 090601002B0700FF 0600000121 02020F00161D 0203 090601002C0700FF 0600000000 02020F00161D"
    "0203 090601003D0700FF 06000003F9 02020F00161B 0203 090601003E0700FF 0600000000 02020F00161B"
    "0203 090601003F0700FF 0600000000 02020F00161D 0203 09060100400700FF 06000000E9 02020F00161D"
    "0203 09060100010800FF 0603C25A64 02020F00161E 0203 09060100020800FF 0600000000 02020F00161E"
    "0203 09060100030800FF 0600045D06 02020F001620 0203 09060100040800FF 0600B49D89 02020F001620"
    "1C907E"
)
"""63 068 772 Wh; 2021 W. All in one list every 10 s."""

KAIFA_NORWAY_HOURLY = bytes.fromhex(
    "7EA09B01020110EEAEE6E7000F40000000 090C07E6051D070D000AFF800000 0212"
    "09074B464D5F303031 091036393730363331343037393136323136 09084D41333034483345"
    "0600001072 0600000000 0600000000 06000002B5 060000424C 060000420B 0600000545 0600000946 0600000000 0600000950"
    "090C07E6051D070D000AFF800000 0602070BF9 0600000000 06000003E0 0600545E19 688E7E"
)
"""34 016 249 Wh; 4210 W."""

KAIFA_NORWAY_TEN_SECONDS = bytes.fromhex(
    "7EA0790102011080 93E6E7000F40000000 090C07E1090E04151F14FF800000 020D"
    "09074B464D5F303031 091036393730363331343031373533393835 09084D41333034483345"
    "060000040C 0600000000 0600000000 060000004E 06000007C1 0600000C9E 0600000D7E 060000095F 0600000000 0600000966"
    "87967E"
)

KAIFA_NORWAY_POWER = bytes.fromhex("7ea027010201105a87e6e7000f40000000090c07e1090c0217122aff80000002010600000528b80c7e")

KAIFA_SWEDEN_MESSAGE = bytes.fromhex(
    "e6e7000f40000000 00 0224"
    "09060100000281ff 09074b464d5f303031 09060000600100ff 091037333430373334303733343037333430"
    "09060000600107ff 09074d413330344834 09060100010700ff 0600000b00 09060100020700ff 0600000000"
    "09060100030700ff 0600000000 09060100040700ff 0600000042 090601001f0700ff 0600001a7d"
    "09060100330700ff 0600000316 09060100470700ff 06000017ed 09060100200700ff 0600000912"
    "09060100340700ff 06000008fc 09060100480700ff 06000008f1 09060000010000ff 090c07e509160311231effffc400"
    "09060100010800ff 0600490b23 09060100020800ff 0600000000 09060100030800ff 0600006674"
    "09060100040800ff 060008d3e0"
)
"""4 786 979 Wh; 2816 W."""

KAMSTRUP_TEN_SECONDS = bytes.fromhex(
    "7EA0E32B21139886E6E7000F00000000 090C07E10A1405032B1EFF800000 0219 0A0E4B616D73747275705F5630303031"
    "09060101000005FF 0A1035373036353637323734333839373032"
    "09060101600101FF 0A12363834313132 31424E323433313031303430"
    "09060101010700FF 06000005BC 09060101020700FF 0600000000 09060101030700FF 0600000000"
    "09060101040700FF 06000001CE 090601011F0700FF 0600000234 09060101330700FF 06000000CA"
    "09060101470700FF 06000001FF 09060101200700FF 1200E8 09060101340700FF 1200E4 09060101480700FF 1200E9 A1A57E"
)

KAMSTRUP_SINGLE_PHASE_HOURLY = bytes.fromhex(
    "7EA1042B2113776EE6E7000F00000000 0C07E60205060D0019FF800000 0223 0A0E4B616D73747275705F5630303031"
    "09060101000005FF 0A1035373036353637323731353333323037"
    "09060101600101FF 0A12363836313131 31424E323432313031303430"
    "09060101010700FF 060000026B 09060101020700FF 0600000000 09060101030700FF 0600000054"
    "09060101040700FF 0600000000 090601011F0700FF 0600000125 00000000 09060101200700FF 1200E1 00000000"
    "09060001010000FF 090C07E60205060D0019FF800000 09060101010800FF 060012CF93 09060101020800FF 0600000000"
    "09060101030800FF 0600008CCE 09060101040800FF 060005E504 7FE97E"
)
"""1 232 787 steps; 619 W."""

KAMSTRUP_SWEDEN = bytes.fromhex(
    "7EA12C2B2113FC04E6E7000F00000000 0C07E602120516 0023FF800000 0223 0A0E4B616D73747275705F5630303031"
    "09060101000005FF 0A1035373036353637333331333233353236"
    "09060101600101FF 0A12363834313133 31424E323435313031303932"
    "09060101010700FF 06000008DD 09060101020700FF 0600000000 09060101030700FF 0600000000"
    "09060101040700FF 0600000190 090601011F0700FF 060000011F 09060101330700FF 0600000257"
    "09060101470700FF 060000006A 09060101200700FF 1200F1 09060101340700FF 1200F0 09060101480700FF 1200F3"
    "09060001010000FF 090C07E6021205160023FF800000 09060101010800FF 0601E87F4E 09060101020800FF 0600000000"
    "09060101030800FF 060058718B 09060101040800FF 0600106023 B81C7E"
)
"""32 014 158 steps of 1 Wh: the reporter's meter showed 32 014 kWh, not ten times that (issue 239 there)."""

KAMSTRUP_DENMARK_MESSAGE = bytes.fromhex(
    "0F00000000 0C07E4050C020A1900FF800080 0241 0A0E4B616D73747275705F5630303031"
    "09060101010800FF 06001194CA 09060101020800FF 0600000000 09060101030800FF 060000127E"
    "09060101040800FF 060009550E 09060101000001FF 060144ADE1 09060101010700FF 06000005CC"
    "09060101020700FF 0600000000 09060101030700FF 0600000000 09060101040700FF 0600000017"
    "09060001010000FF 090C07E4050C020A1900FF800080 09060101200700FF 1200E5 09060101340700FF 1200E5"
    "09060101480700FF 1200E3 090601011F0700FF 060000004B 09060101330700FF 06000000AA"
    "09060101470700FF 06000001E4 09060101150700FF 0600000071 09060101290700FF 0600000154"
    "090601013D0700FF 0600000407 09060101210700FF 12004D 09060101350700FF 12005F 09060101490700FF 120062"
    "090601010D0700FF 120063 09060101160700FF 0600000000 090601012A0700FF 0600000000"
    "090601013E0700FF 0600000000 09060101160800FF 0600000000 090601012A0800FF 0600000000"
    "090601013E0800FF 0600000000 09060101150800FF 06000A8F97 09060101290800FF 060004C153"
    "090601013D0800FF 06000243E0"
)
"""1 152 202 steps of 10 Wh; its three phases add up to the same number. 1484 W."""

KAMSTRUP_DENMARK_ENCRYPTED = bytes.fromhex(
    "7EA1004103132F7AE6E700DB084B414D4501ABF43F8200E73000784A666DC658EEA909B2796B646AA713D7C7EA846248AAE658460782"
    "323174D129A0F1B0970EC496D2050F53089F90D235101003B5002B5DC3C0091F2E8FB0FB778FB57062D524042B0DA5C195DBF53231A6"
    "89D25BDB6222FF780571B1AD4DD66E551968F187A1CEF8D6F1C9B4DE6F470FE5612046AF9A1D3F694F8B4E5F54B3AEDDD953253A114E"
    "821B105CB155F665BB268E64EFE5B018711EC4B5D86A9505678CE29EA282B046A9B60C3A7D5796DD361D5C901ECDB9F1FD51BCEE664F"
    "1A307D880177D8D1621A31E93EDAE0171656DD153B3B0C37C3798987FBB201BAECCCA26DB3411EB8667E"
)

KAIFA_AUSTRIA_ENCRYPTED = bytes.fromhex(
    "DB084B464D10100000238201092100295B9AEFC1546E644A2C9E32EDD42CBD0F1B945B194D086885C4D8DF86DD52CB5B448854A6D548"
    "D5D270739B2A169D05B013F9015070089D3C5FA45CA05E92309A645CC83D7DA40FBC8F4CF9C225AFA69A25FF0B2AC9C2744550ABA53C"
    "E9143FD10B0AD85FD30BD6B6DFFEE65F8204DC9C5067CA73B62E299A39D50AA730B2B9AE3836BC2F3490FB41BE5B6F930D8495297636"
    "9DD7DABBB5A4354AECA1D2486CFF2EB0C6206380BA501D122AF75D716D3092C3960506A15E06FAB0EE5B7DFA3C2CDF0CAFD051B88E44"
    "B8B9FB8865F20CB89D1143CDC7EFEB07FB4C4898E764E9E3A32DDC3D1FB46961CE962B2C78050C96598C7E4D26658043F9CBCA78189B"
    "D01B139F8AE0F739"
)
KAIFA_AUSTRIA_KEY = bytes.fromhex("101112131415161718191A1B1C1D1E1F")

WHOLE_FRAMES = {
    "Aidon, Norway, hourly": (
        AIDON_NORWAY_HOURLY,
        PushedList(Dialect.SELF_DESCRIBING, 56_768_820_000, 0, 2_413, "7359992890497997"),
    ),
    "Aidon, Norway, every 2.5 s": (
        AIDON_NORWAY_POWER,
        PushedList(Dialect.SELF_DESCRIBING, None, None, 2_390, None),
    ),
    "Aidon, Sweden": (AIDON_SWEDEN, PushedList(Dialect.SELF_DESCRIBING, 63_068_772_000, 0, 2_021, None)),
    "Kaifa, Norway, hourly": (
        KAIFA_NORWAY_HOURLY,
        PushedList(Dialect.KAIFA_POSITIONS, 34_016_249_000, 0, 4_210, "6970631407916216"),
    ),
    "Kaifa, Norway, every 10 s": (
        KAIFA_NORWAY_TEN_SECONDS,
        PushedList(Dialect.KAIFA_POSITIONS, None, None, 1_036, "6970631401753985"),
    ),
    "Kaifa, Norway, every 2 s": (
        KAIFA_NORWAY_POWER,
        PushedList(Dialect.KAIFA_POSITIONS, None, None, 1_320, None),
    ),
    "Kamstrup, Norway, every 10 s": (
        KAMSTRUP_TEN_SECONDS,
        PushedList(Dialect.KAMSTRUP, None, None, 1_468, "5706567274389702"),
    ),
    "Kamstrup, single phase, hourly": (
        KAMSTRUP_SINGLE_PHASE_HOURLY,
        PushedList(Dialect.KAMSTRUP, 12_327_870_000, 0, 619, "5706567271533207"),
    ),
}


def read(frame: bytes, keys: MeterKeys | None = None, energy_step_wh: int | None = None) -> PushedList:
    framer = HdlcFramer()
    (message,) = framer.feed(frame)
    assert framer.refused == 0
    return parse_list(message, keys, energy_step_wh)


@pytest.mark.parametrize("name", WHOLE_FRAMES)
def test_a_frame_of_a_real_meter_reads_as_its_owner_says(name):
    captured, expected = WHOLE_FRAMES[name]
    assert read(captured, energy_step_wh=10) == expected


def test_a_swedish_kamstrup_counts_in_watt_hours():
    pushed = read(KAMSTRUP_SWEDEN, energy_step_wh=1)
    assert (pushed.import_mwh, pushed.power_w) == (32_014_158_000, 2_269)


@pytest.mark.parametrize("frame", [KAMSTRUP_SWEDEN, KAMSTRUP_SINGLE_PHASE_HOURLY])
def test_without_a_configured_step_kamstrup_energy_is_withheld(frame):
    """The same list means 10 Wh on one meter and 1 Wh on the next: a guess would be wrong by a factor of ten."""
    with pytest.raises(MalformedTelegram, match="set energy_step_wh"):
        read(frame)
    assert read(KAMSTRUP_TEN_SECONDS).power_w == 1_468


def test_a_swedish_kaifa_sends_codes_without_units():
    expected = PushedList(Dialect.KAIFA_CODES, 4_786_979_000, 0, 2_816, "7340734073407340")
    assert parse_list(KAIFA_SWEDEN_MESSAGE) == expected


def test_a_danish_kamstrup_as_its_owner_decrypted_it():
    pushed = parse_list(KAMSTRUP_DENMARK_MESSAGE, energy_step_wh=10)
    assert (pushed.import_mwh, pushed.export_mwh, pushed.power_w) == (11_522_020_000, 0, 1_484)


def test_an_encrypted_list_is_read_with_its_key():
    expected = PushedList(Dialect.SELF_DESCRIBING, 9_108_000, 0, 0, "1KFM0100000035")
    assert parse_list(KAIFA_AUSTRIA_ENCRYPTED, MeterKeys(KAIFA_AUSTRIA_KEY)) == expected


def test_an_encrypted_list_without_or_with_a_wrong_key_says_so():
    with pytest.raises(MalformedTelegram, match="it is encrypted; ask the utility"):
        parse_list(KAIFA_AUSTRIA_ENCRYPTED)
    with pytest.raises(MalformedTelegram, match="check the port's encryption key"):
        parse_list(KAIFA_AUSTRIA_ENCRYPTED, MeterKeys(bytes(16)))


def test_an_authenticated_frame_of_a_real_meter_is_whole_and_asks_for_both_keys():
    with pytest.raises(MalformedTelegram, match="name the port's authentication key"):
        read(KAMSTRUP_DENMARK_ENCRYPTED, MeterKeys(bytes(16)))
    with pytest.raises(MalformedTelegram, match="authentication tag is wrong"):
        read(KAMSTRUP_DENMARK_ENCRYPTED, MeterKeys(bytes(16), bytes(16)))


def encrypted(keys: MeterKeys, plain: bytes) -> bytes:
    """Made with AESGCM, whose 16-byte tag is cut to 12 as DLMS does."""
    title, counter, control = b"KAM\x45\x01\xac\x4d\x6e", b"\x00\x00\xa3\x2f", b"\x30"
    sealed = AESGCM(keys.encryption).encrypt(title + counter, plain, control + keys.authentication)[:-4]
    content = control + counter + sealed
    return b"\xdb\x08" + title + b"\x82" + len(content).to_bytes(2, "big") + content


def test_an_authenticated_list_is_read_and_every_flipped_bit_refused():
    keys = MeterKeys(bytes(range(16)), bytes(range(16, 32)))
    message = encrypted(keys, KAMSTRUP_DENMARK_MESSAGE)
    assert parse_list(message, keys, 10).import_mwh == 11_522_020_000
    for position in range(len(message)):
        damaged = bytearray(message)
        damaged[position] ^= 0x04
        with pytest.raises(MalformedTelegram):
            parse_list(bytes(damaged), keys, 10)


def message(body: str) -> bytes:
    return bytes.fromhex("E6E7000F4000000000" + body)


ENERGY = "0203 09060100010800FF 06 0022AB8A 02020F01161E"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("0101" + ENERGY.replace("0F01161E", "0F011620"), "unit 32, which is not Wh"),
        ("0101" + ENERGY.replace("0F01161E", "0FFC161E"), "scaler -4"),
        ("0101" + ENERGY.replace("0022AB8A", "FFFFFFFF"), "marked as not available"),
        ("0101" + ENERGY.replace("06 0022AB8A", "05 FFFFFFFE"), "is no counter"),
        ("0101" + ENERGY.replace("06 0022AB8A", "09 04 0022AB8A"), "not code, value"),
        ("0102" + ENERGY, "ends 1 bytes too early"),
        ("0101" + ENERGY + "00", "1 bytes follow its end"),
        ("0102" + ENERGY + ENERGY.replace("22AB8A", "22AB8B"), "has two values"),
        ("0102" + ENERGY + ENERGY.replace("0100010800", "0101010800"), "are both there"),
        ("0101" + ENERGY.replace("0906", "0905").replace("0100010800FF", "01000108FF"), "a code has 5 bytes"),
        ("01" * 2 * 12, "nested deeper"),
        ("1E00", "unknown type 1E"),
        ("00", "it is no list"),
        ("0100", "it is no list"),
        ("0983", "a length starts with 83"),
        ("0201 0A00", "please report it"),
        ("0202 09060100010800FF 0600000001", "no list of Kaifa's"),
        ("0203 0A084B616D7374727570 09060101010800FF 00", "has no value"),
        ("0203 0A084B616D7374727570 0600000000 00", "a value stands where a code"),
        ("0203 0A084B616D7374727570 0600000000 0600000000", "a value stands where a code"),
        ("020A 09044B464D5F" + "0600000000" * 9, "with 10 values"),
        ("020E 09044B464D5F" + "0A00" * 13, "its powers are no numbers"),
    ],
)
def test_a_list_that_is_not_right_is_refused_with_the_reason(body, reason):
    with pytest.raises(MalformedTelegram, match=reason):
        parse_list(message(body), energy_step_wh=10)


def test_other_messages_are_refused():
    with pytest.raises(MalformedTelegram, match="it starts with C4"):
        parse_list(bytes.fromhex("E6E700C401"))
    with pytest.raises(MalformedTelegram, match="ends 1 bytes too early"):
        parse_list(b"")
    with pytest.raises(MalformedTelegram, match="its date has 7 bytes"):
        parse_list(bytes.fromhex("0F00000000 07 00"))


def reframed(frame: bytes, changed: bytes) -> bytes:
    """The frame with other contents of the same length and a right check sequence."""
    body = frame[1:9] + changed
    return b"\x7e" + body + crc16_x25(body).to_bytes(2, "little") + b"\x7e"


def test_damaged_frames_are_refused_one_by_one_and_cost_no_other():
    framer = HdlcFramer()
    lists = []
    for i, (frame, _) in enumerate(WHOLE_FRAMES.values()):
        damaged = bytearray(frame)
        damaged[len(frame) // 2] ^= 1 << i
        messages = framer.feed(bytes(damaged) + frame + frame[: len(frame) // 3])
        lists += [parse_list(message, energy_step_wh=10) for message in messages]
    assert lists == [pushed for _, pushed in WHOLE_FRAMES.values()]
    assert framer.refused >= len(lists)


@given(st.binary(max_size=400))
def test_no_message_raises_anything_but_the_declared_error(noise):
    for start in (b"", b"\x0f\x00\x00\x00\x00\x00", b"\xdb\x08KAM12345"):
        with suppress(MalformedTelegram):
            pushed = parse_list(start + noise, MeterKeys(bytes(16), bytes(16)), 10)
            assert pushed.import_mwh is None or pushed.import_mwh >= 0


@given(
    st.sampled_from([frame for frame, _ in WHOLE_FRAMES.values()]),
    st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_a_list_damaged_behind_the_check_sequence_raises_nothing_else_either(frame, changes):
    contents = bytearray(frame[9:-3])
    for position, byte in changes:
        contents[position % len(contents)] = byte
    with suppress(MalformedTelegram):
        assert read(reframed(frame, bytes(contents)), energy_step_wh=10).dialect in Dialect
