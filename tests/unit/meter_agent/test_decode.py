"""Registers to exact integers. Register images are hex as on the wire, with the expected value beside them."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meter_agent.decode import (
    UnusableValue,
    energy_mwh,
    model,
    power_w,
    scale_exponent,
    serial_number,
    shortest_decimal,
)
from meter_agent.profiles import Identity, Register, SerialNumber

LARGEST_F32 = float.fromhex("0x1.fffffep127")


def words(image: str) -> tuple[int, ...]:
    """Registers from hex digits."""
    raw = bytes.fromhex(image)
    return tuple(int.from_bytes(raw[i : i + 2], "big") for i in range(0, len(raw), 2))


@pytest.mark.parametrize(
    ("value_type", "unit", "divide", "image", "expected_mwh"),
    [
        ("f32", "kWh", 1, "4145 851F", 12_345_000),  # 12.345
        ("f32", "kWh", 1, "0000 0000", 0),
        ("f32", "kWh", 1, "3DCC CCCD", 100_000),  # 0.1
        ("f32", "kWh", 1, "47FF FFFF", 131_071_990_000),  # 131071.9921875, the shortest decimal is 131071.99
        ("f32", "Wh", 1, "4B80 0000", 16_777_216_000),  # 2^24
        ("f64", "Wh", 1, "40C8 1C80 0000 0000", 12_345_000),  # 12345
        ("u32", "kWh", 100, "0001 E240", 1_234_560_000),  # 123456 / 100
        ("u64", "kWh", 100, "0000 0000 0012 D687", 12_345_670_000),  # 1234567 / 100
        ("s64", "Wh", 1, "0000 0000 0012 D687", 1_234_567_000),
        ("acc32", "Wh", 1, "FFFF FFFF", 4_294_967_295_000),
        ("u16", "kWh", 10, "FFFF", 6_553_500_000),
    ],
)
def test_a_counter_is_read_exactly(value_type, unit, divide, image, expected_mwh):
    register = Register(address=0, type=value_type, unit=unit, divide=divide)
    value = energy_mwh(register, words(image))
    assert value == expected_mwh
    assert type(value) is int


@pytest.mark.parametrize(
    ("rollover", "image", "expected_mwh"),
    [
        (2**32, "7FFF FFFF", 2_147_483_647_000),
        (2**32, "8000 0000", 2_147_483_648_000),
        (2**32, "FFFF FFFF", 4_294_967_295_000),
        (2**31, "7FFF FFFF", 2_147_483_647_000),
        (8_388_608, "007F FFFF", 8_388_607_000),
    ],
)
def test_a_signed_counter_that_overflows_is_counted_on_if_its_profile_says_so(rollover, image, expected_mwh):
    assert energy_mwh(Register(address=0, type="s32", unit="Wh", rollover=rollover), words(image)) == expected_mwh


@pytest.mark.parametrize(
    ("rollover", "image"), [(None, "8000 0000"), (2**31, "8000 0000"), (2**31, "FFFF FFFF"), (8_388_608, "0080 0000")]
)
def test_a_count_that_the_meter_cannot_show_is_refused(rollover, image):
    with pytest.raises(UnusableValue):
        energy_mwh(Register(address=0, type="s32", unit="Wh", rollover=rollover), words(image))


@pytest.mark.parametrize(
    ("value_type", "unit", "divide", "image", "expected_w"),
    [
        ("f32", "W", 1, "C2F6 E979", -123),  # -123.456
        ("f32", "kW", 1, "3FA0 0000", 1_250),  # 1.25
        ("s32", "W", 100, "FFFF CFC7", -123),  # -12345 / 100 = -123.45
        ("s16", "W", 1, "FF85", -123),
        ("u16", "W", 10, "000F", 2),  # 1.5, rounded half up
    ],
)
def test_power_is_read_in_whole_watts(value_type, unit, divide, image, expected_w):
    assert power_w(Register(address=0, type=value_type, unit=unit, divide=divide), words(image)) == expected_w


def test_a_power_that_counts_export_is_turned_around():
    assert power_w(Register(address=0, type="s16", unit="W", negate=True), words("04D2")) == -1234


@pytest.mark.parametrize(
    ("word_order", "byte_order", "image"),
    [
        ("big", "big", "4145 851F"),
        ("little", "big", "851F 4145"),
        ("big", "little", "4541 1F85"),
        ("little", "little", "1F85 4541"),
    ],
)
def test_every_order_of_words_and_bytes_gives_the_same_value(word_order, byte_order, image):
    register = Register(address=0, type="f32", unit="kWh", word_order=word_order, byte_order=byte_order)
    assert energy_mwh(register, words(image)) == 12_345_000


@pytest.mark.parametrize("image", ["7FC0 0000", "FFC0 0000", "7F80 0000", "FF80 0000", "7F80 0001", "FFFF FFFF"])
def test_nan_and_infinity_are_never_a_number(image):
    for quantity, unit in ((energy_mwh, "kWh"), (power_w, "W")):
        with pytest.raises(UnusableValue):
            quantity(Register(address=0, type="f32", unit=unit), words(image))


def test_a_sentinel_is_never_a_number():
    register = Register(address=0, type="u32", unit="Wh", sentinels=("FFFF FFFF", "80000000"))
    for image in ("FFFF FFFF", "8000 0000"):
        with pytest.raises(UnusableValue, match="not available"):
            energy_mwh(register, words(image))
    assert energy_mwh(register, words("FFFF FFFE")) == 4_294_967_294_000


def test_a_sentinel_is_recognised_in_the_order_of_the_value():
    register = Register(address=0, type="s32", unit="W", word_order="little", sentinels=("7FFF FFFF",))
    with pytest.raises(UnusableValue):
        power_w(register, words("FFFF 7FFF"))


def test_a_negative_counter_is_refused():
    with pytest.raises(UnusableValue, match="negative"):
        energy_mwh(Register(address=0, type="s32", unit="Wh"), words("FFFF FFFF"))


@pytest.mark.parametrize("image", ["0001", "0001 0002 0003"])
def test_a_value_with_too_few_or_too_many_registers_is_refused(image):
    with pytest.raises(UnusableValue, match="expected 2"):
        energy_mwh(Register(address=0, type="u32", unit="Wh"), words(image))


@pytest.mark.parametrize(
    ("factor", "expected_mwh"), [("0000", 12_345_000), ("0002", 1_234_500_000), ("FFFD", 12_345), ("FFFA", 12)]
)
def test_a_scale_factor_moves_the_decimal_point(factor, expected_mwh):
    register = Register(address=0, type="acc32", unit="Wh", scale_factor=2)
    assert energy_mwh(register, words("0000 3039"), scale_exponent(words(factor)[0])) == expected_mwh


@pytest.mark.parametrize("factor", [0x8000, 0x000B, 0xFFF5, 0x7FFF])
def test_a_scale_factor_that_is_not_one_is_refused(factor):
    with pytest.raises(UnusableValue, match="scale factor"):
        scale_exponent(factor)


@pytest.mark.parametrize("raw", ["0012 D687", "0000 0001", "007F FFFF"])
def test_an_integer_is_not_taken_for_a_floating_point_counter(raw):
    """Meters that can be set to send integers send them in the same registers; read as floats they are next to 0."""
    with pytest.raises(UnusableValue, match="integers"):
        energy_mwh(Register(address=0, type="f32", unit="kWh"), words(raw))


def test_a_counter_at_zero_is_a_counter():
    assert energy_mwh(Register(address=0, type="f32", unit="kWh"), words("0000 0000")) == 0


def test_serial_numbers_are_text():
    number = SerialNumber(address=0, type="number", count=2, function_code=3)
    text = SerialNumber(address=0, type="text", count=4, function_code=3)
    assert serial_number(number, words("0135 2D5E")) == "20262238"
    assert serial_number(text, words("4142 3132 3300 0000")) == "AB123"
    digits = SerialNumber(address=0, type="hex", count=2, function_code=3)
    assert serial_number(digits, words("0506 0001")) == "05060001"
    characters = SerialNumber(address=0, type="characters", count=5, function_code=3)
    assert serial_number(characters, words("0042 FF4E 0031 0000 0000")) == "BN1"


@pytest.mark.parametrize(
    ("kind", "count", "image"),
    [
        ("number", 2, "0000 0000"),
        ("number", 2, "FFFF FFFF"),
        ("number", 2, "0001"),
        ("text", 2, "0000 4142"),
        ("text", 2, "FF41 4200"),
        ("text", 2, "4107 4200"),
    ],
)
def test_what_is_no_serial_number_is_refused(kind, count, image):
    with pytest.raises(UnusableValue):
        serial_number(SerialNumber(address=0, type=kind, count=count, function_code=3), words(image))


def test_a_meter_says_which_model_it_is():
    number = Identity(address=0, type="number", count=1, function_code=3, values={"1648": "EM24"})
    text = Identity(address=0, type="text", count=4, function_code=3, values={"B2": "B21 or B23", "B23 1": "B23 1xx"})
    assert model(number, words("0670")) == "EM24"
    assert model(number, words("0671")) is None
    assert model(text, words("4232 3320 3131 3200")) == "B23 1xx"
    assert model(text, words("4232 3120 3131 3200")) == "B21 or B23"
    assert model(text, words("4132 3120 3131 3200")) is None
    digits = Identity(address=0, type="hex", count=1, function_code=3, values={"200A": "PRO380"})
    assert model(digits, words("200A")) == "PRO380"
    assert model(digits, words("2007")) is None
    for nothing in ("0000", "FFFF", "0670 0670"):
        with pytest.raises(UnusableValue):
            model(number, words(nothing))


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_the_shortest_decimal_rounds_to_the_same_32_bit_float(value):
    bits = int.from_bytes(struct.pack(">f", value), "big")
    digits, exponent = shortest_decimal(bits, "f32")
    assert struct.pack(">f", float(f"{digits}e{exponent}")) == struct.pack(">f", value + 0.0 if value else 0.0)
    # Nothing shorter does: the nearest decimals with one digit fewer round elsewhere.
    significant = len(str(abs(digits)).rstrip("0"))
    for fewer in range(1, significant):
        rounded = float(f"{value:.{fewer}g}")
        # Beyond the largest 32-bit float a rounded number would be infinite, which is elsewhere too.
        assert abs(rounded) > LARGEST_F32 or struct.pack(">f", rounded) != struct.pack(">f", value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_the_shortest_decimal_of_a_64_bit_float_is_what_python_prints(value):
    digits, exponent = shortest_decimal(int.from_bytes(struct.pack(">d", value), "big"), "f64")
    assert float(f"{digits}e{exponent}") == value
    assert (
        len(str(abs(digits)).rstrip("0")) <= len(repr(abs(value)).split("e")[0].replace(".", "").strip("0"))
        or not value
    )


@given(st.integers(0, 8_191_999))
def test_a_float_counter_below_8192_kwh_shows_every_wh(energy_wh):
    """Hazard 8: from there on a 32-bit float steps by about 1 Wh and more."""
    image = struct.pack(">f", energy_wh / 1_000)
    register = Register(address=0, type="f32", unit="kWh")
    assert energy_mwh(register, words(image.hex())) == energy_wh * 1_000


@given(st.binary(min_size=8, max_size=8), st.sampled_from(["f32", "f64", "u64", "s64", "acc32", "u16"]))
def test_no_register_content_raises_anything_else(raw, value_type):
    register = Register(address=0, type=value_type, unit="kWh", divide=3)
    count = {"f32": 2, "acc32": 2, "u16": 1}.get(value_type, 4)
    try:
        value = energy_mwh(register, words(raw.hex())[:count])
    except UnusableValue:
        return
    assert type(value) is int
    assert value >= 0
