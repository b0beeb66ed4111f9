"""Registers made from values: the same as the images written by hand, and read back as what was put in."""

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.register_image import load_register_images

from meter_agent.decode import energy_mwh, power_w, serial_number
from meter_agent.installer.encode import CannotShow, MeterValues, register_image, register_words
from meter_agent.profiles import Register, load_profile, profile_names, words_in

IMAGES = Path(__file__).parent / "register_images"


@pytest.mark.parametrize("name", profile_names())
def test_counters_are_shown_as_in_the_images_written_by_hand(name: str) -> None:
    profile = load_profile(name)
    for image in load_register_images(IMAGES / f"{name}.toml").images:
        registers = profile.registers
        if profile.sunspec is not None:
            registers = next(model.registers for model in profile.sunspec.models if image.model in model.ids)
        assert registers is not None
        for quantity, value in image.expected.by_quantity().items():
            register = registers[quantity]
            if quantity == "power":
                continue
            exponent = image.words(register.scale_factor, 1)[0] if register.scale_factor is not None else 0
            exponent -= exponent >> 15 << 16
            if register.plus:
                continue
            written = image.words(register.address, words_in(register.type))
            assert energy_mwh(register, register_words(register, value, exponent), exponent) == value
            if register.type not in ("f32", "f64"):
                assert register_words(register, value, exponent) == written


@pytest.mark.parametrize("type_", ["u32", "s32", "u64", "s64", "f32", "f64"])
@pytest.mark.parametrize("word_order", ["big", "little"])
@pytest.mark.parametrize("byte_order", ["big", "little"])
@given(
    energy_wh=st.integers(1, 2**31 // 1_000), power=st.integers(-(2**20), 2**20), divide=st.sampled_from([1, 10, 1_000])
)
def test_what_is_shown_is_read_back(
    type_: str, word_order: str, byte_order: str, energy_wh: int, power: int, divide: int
) -> None:
    order = {"word_order": word_order, "byte_order": byte_order}
    counter = Register(0, type_, "Wh", divide=divide, **order)
    shown_mwh = energy_mwh(counter, register_words(counter, 1_000 * energy_wh))
    tolerance = Fraction(1_000 * energy_wh, 2**23) if type_ == "f32" else 0
    assert abs(shown_mwh - 1_000 * energy_wh) <= tolerance
    if not type_.startswith("u"):
        gauge = Register(0, type_, "W", negate=True, **order)
        assert power_w(gauge, register_words(gauge, power)) == power


def test_counters_round_down_and_roll_over() -> None:
    coarse = Register(0, "u32", "kWh", divide=10)
    assert energy_mwh(coarse, register_words(coarse, 199_999_999)) == 199_900_000
    rolling = Register(0, "u32", "Wh", rollover=1_000)
    assert energy_mwh(rolling, register_words(rolling, 1_234_000)) == 234_000
    assert energy_mwh(Register(0, "u16", "Wh"), register_words(Register(0, "u16", "Wh"), 65_537_000)) == 1_000


def test_what_a_register_cannot_hold_is_refused() -> None:
    with pytest.raises(CannotShow, match="does not fit"):
        register_words(Register(0, "s16", "W"), 32_768)
    with pytest.raises(CannotShow, match="does not fit"):
        register_words(Register(0, "u16", "W"), -1)
    with pytest.raises(CannotShow, match="no value"):
        register_words(Register(0, "u32", "Wh", sentinels=("0000 0000",)), 999)


def test_tariffs_and_phases_add_up() -> None:
    image = register_image(load_profile("sbc-ale3"), MeterValues(1_234_567_890, 0, 0, "1"))
    # 617 kWh in the second tariff at 31, the rest in the first at 27, both in steps of 10 Wh.
    assert image.read(3, 31, 2) == (61_700).to_bytes(4, "big")
    assert image.read(3, 27, 2) == (61_756).to_bytes(4, "big")


def test_a_scale_factor_grows_with_the_power() -> None:
    profile = load_profile("sunspec-inverter")
    image = register_image(profile, MeterValues(0, 1_000, -45_678, "1"))
    assert profile.sunspec is not None
    # "SunS", the common model with its 66 registers, then model 101: W at 14 in tens of watts, its factor at 15.
    assert image.read(3, 40_070, 1) == (101).to_bytes(2, "big")
    assert image.read(3, 40_070 + 14, 2) == bytes.fromhex("11D8 0001")


def test_a_serial_number_that_the_meter_cannot_have_is_refused() -> None:
    place = load_profile("abb-b23").serial_number
    assert place is not None
    for text in ("A1", str(2**32)):
        with pytest.raises(CannotShow, match="serial number"):
            register_image(load_profile("abb-b23"), MeterValues(1_000, 0, 0, text))
    with pytest.raises(CannotShow, match="room for 32 bytes"):
        register_image(load_profile("sunspec-inverter"), MeterValues(0, 1_000, 0, "x" * 33))
    image = register_image(load_profile("abb-b23"), MeterValues(1_000, 0, 0, "4711"))
    raw = image.read(place.function_code, place.address, place.count)
    assert isinstance(raw, bytes)
    assert serial_number(place, tuple(int.from_bytes(raw[i : i + 2], "big") for i in range(0, len(raw), 2))) == "4711"
