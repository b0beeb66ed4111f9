"""Every profile is well-formed and reads a register image written by hand from the page that its test names."""

import pytest

from firmware_config.loader import ConfigError
from meter_agent.decode import UnusableValue, energy_mwh, power_w, scale_exponent, serial_number
from meter_agent.profiles import UnknownProfile, load_profile, profile_names, words_in
from meter_agent.request_plan import Span, plan_requests

# Wire bytes by address: what one reply with these registers carries, in hex.
SDM630 = {  # SDM630 protocol: 30053 total system power, 30073 import, 30075 export; floats, high word first.
    0x34: "C496 8000",  # -1204 W
    0x48: "4640 E6B7",  # 12345.679 kWh
    0x4A: "3F9D F3B6",  # 1.234 kWh
}
SDM120 = {  # SDM120 protocol: 30013 active power, 30073 import, 30075 export.
    0x0C: "4420 C000",  # 643 W
    0x48: "44C1 EBD7",  # 1551.37 kWh
    0x4A: "44A6 F614",  # 1335.69 kWh
}
ABB_B23 = {  # B23/B24 manual, mapping tables: 5000 active import, 5004 active export, 0,01 kWh; 5B14 power, 0,01 W.
    0x5000: "0000 0000 0012 D687",  # 1234567 -> 12345.67 kWh
    0x5004: "0000 0000 0000 0064",  # 100 -> 1 kWh
    0x5B14: "FFFE 1DC0",  # -123456 -> -1234.56 W
}
IEM3000 = {  # DOCA0005EN: 3204 import and 3208 export in Wh (Int64), 3060 power in kW; on the wire one less.
    0x0C83: "0000 0000 05F5 E0FF",  # 99999999 Wh
    0x0C87: "0000 0000 0000 002A",  # 42 Wh
    0x0BF3: "3F9E 0664",  # 1.23457 kW
}
FIXED = {
    "eastron-sdm630": (SDM630, {"import": 12_345_679_000, "export": 1_234_000, "power": -1204}),
    "eastron-sdm120": (SDM120, {"import": 1_551_370_000, "export": 1_335_690_000, "power": 643}),
    "abb-b23": (ABB_B23, {"import": 12_345_670_000, "export": 1_000_000, "power": -1235}),
    "schneider-iem3000": (IEM3000, {"import": 99_999_999_000, "export": 42_000, "power": 1235}),
}


def words(image):
    raw = bytes.fromhex(image)
    return tuple(int.from_bytes(raw[i : i + 2], "big") for i in range(0, len(raw), 2))


def test_the_meters_promised_in_the_documentation_are_there():
    assert set(profile_names()) >= {
        "abb-b23",
        "eastron-sdm120",
        "eastron-sdm630",
        "schneider-iem3000",
        "sunspec-inverter",
    }


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_names_evidence_that_was_read(name):
    profile = load_profile(name)
    confirmed = [reference for reference in profile.references if not reference.unconfirmed]
    assert len({reference.url for reference in confirmed}) >= 2
    assert all(reference.url.startswith("http") and len(reference.quote) >= 10 for reference in profile.references)
    assert profile.models
    assert profile.maker


@pytest.mark.parametrize("name", FIXED)
def test_a_register_image_from_the_manual_is_read_right(name):
    image, expected = FIXED[name]
    registers = load_profile(name).registers
    assert registers.keys() == expected.keys()
    for quantity, register in registers.items():
        decode = power_w if quantity == "power" else energy_mwh
        assert decode(register, words(image[register.address])) == expected[quantity], quantity


@pytest.mark.parametrize(
    ("name", "quantity", "image"),
    [
        ("abb-b23", "import", "FFFF FFFF FFFF FFFF"),
        ("abb-b23", "export", "FFFF FFFF FFFF FFFF"),
        ("abb-b23", "power", "7FFF FFFF"),
        ("schneider-iem3000", "export", "8000 0000 0000 0000"),
        ("schneider-iem3000", "power", "FFC0 0000"),
        ("eastron-sdm630", "import", "7FC0 0000"),
        ("eastron-sdm120", "power", "FFFF FFFF"),
    ],
)
def test_what_a_meter_calls_not_available_is_never_a_number(name, quantity, image):
    decode = power_w if quantity == "power" else energy_mwh
    with pytest.raises(UnusableValue):
        decode(load_profile(name).registers[quantity], words(image))


def test_sunspec_integer_models_are_read_with_their_scale_factors():
    """model_103.json: W 14, W_SF 15, WH 24, WH_SF 26, counted from the model's ID."""
    model = next(model for model in load_profile("sunspec-inverter").sunspec.models if 103 in model.ids)
    export, power = model.registers["export"], model.registers["power"]
    assert (power.address, power.scale_factor, export.address, export.scale_factor) == (14, 15, 24, 26)
    # WH = 123456 × 10^1 Wh; W = 3021 × 10^0 produced, which is -3021 W drawn.
    assert energy_mwh(export, words("0001 E240"), scale_exponent(0x0001)) == 1_234_560_000
    assert power_w(power, words("0BCD"), scale_exponent(0x0000)) == -3021
    for register, image in ((export, "0000 0000"), (power, "8000")):
        with pytest.raises(UnusableValue, match="not available"):
            (power_w if register is power else energy_mwh)(register, words(image))


def test_sunspec_float_models_are_read():
    """model_113.json: W 22, WH 32, float32."""
    model = next(model for model in load_profile("sunspec-inverter").sunspec.models if 113 in model.ids)
    export, power = model.registers["export"], model.registers["power"]
    assert (power.address, export.address) == (22, 32)
    assert energy_mwh(export, words("49C5 C100")) == 1_620_000_000
    assert power_w(power, words("453C D000")) == -3021


@pytest.mark.parametrize("name", profile_names())
def test_no_two_requests_of_a_meter_have_replies_of_the_same_length(name):
    """So the late reply to one can never pass for the reply to the other."""
    profile = load_profile(name)
    if profile.registers is None:
        return
    spans = [Span(profile.function_code, r.address, words_in(r.type)) for r in profile.registers.values()]
    requests = plan_requests(spans, profile.requests)
    assert len({request.count for request in requests}) == len(requests)
    assert len(requests) <= 2


@pytest.mark.parametrize("name", profile_names())
def test_serial_numbers_are_read_where_the_profile_says_so(name):
    place = load_profile(name).serial_number
    image = "4142 4331 3233" + "0000" * 13 if place.type == "text" else "0135 2D5E"
    assert serial_number(place, words(image)) == ("ABC123" if place.type == "text" else "20262238")


def test_an_unknown_profile_is_named_with_the_known_ones():
    with pytest.raises(UnknownProfile, match="eastron-sdm630") as error:
        load_profile("eastron-sdm631")
    assert error.value.name == "eastron-sdm631"


@pytest.mark.parametrize("name", ["../examples/agent", "/etc/passwd", ""])
def test_a_name_never_leads_out_of_the_folder(name):
    with pytest.raises(UnknownProfile):
        load_profile(name)


GOOD = """
name = "x"
maker = "X"
models = ["X1"]
function_code = 3
references = [{ url = "https://example.org/a", quote = "one" }, { url = "https://example.org/b", quote = "two" }]
[registers.import]
address = 0
type = "u32"
unit = "Wh"
"""


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('type = "u32"', 'type = "u33"', "registers.import.type"),
        ('unit = "Wh"', 'unit = "W"', "registers.import.unit"),
        ('unit = "Wh"', 'unit = "Wh"\nsentinels = ["FFFF"]', "registers.import.sentinels"),
        ('unit = "Wh"', 'unit = "Wh"\nsentinels = ["FFFF FFFG"]', "registers.import.sentinels"),
        ('unit = "Wh"', 'unit = "Wh"\nnegate = true', "registers.import.negate"),
        ('unit = "Wh"', 'unit = "Wh"\nscale_factor = 4', "registers.import.scale_factor"),
        ('unit = "Wh"', 'unit = "Wh"\ndivide = 0', "registers.import.divide"),
        ("address = 0", "address = 65536", "registers.import.address"),
        ("address = 0", "adress = 0", "registers.import.adress"),
        ("function_code = 3", "function_code = 6", "function_code"),
        ("[registers.import]", "[registers.imports]", "registers.imports"),
        ("[registers.import]", "[registers.power]", "registers"),
        (', { url = "https://example.org/b", quote = "two" }', "", "references"),
        ('name = "x"', 'name = "y"', "name"),
        ("[registers.import]", "[sunspec]\nbases = []\nmodels = []\n[registers.import]", "sunspec.bases"),
    ],
)
def test_a_mistake_in_a_profile_names_file_and_key(tmp_path, old, new, key):
    path = tmp_path / "x.toml"
    path.write_text(GOOD)
    assert load_profile("x", tmp_path).registers["import"].type == "u32"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ConfigError) as error:
        load_profile("x", tmp_path)
    assert error.value.file == path
    assert error.value.key == key
    assert error.value.expected


def test_registers_and_sunspec_exclude_each_other(tmp_path):
    body = GOOD.split("[registers.import]")
    sunspec = """
[sunspec]
bases = [40000]
[[sunspec.models]]
ids = [103]
[sunspec.models.registers.export]
address = 24
type = "acc32"
unit = "Wh"
"""
    (tmp_path / "x.toml").write_text(body[0] + sunspec)
    assert load_profile("x", tmp_path).registers is None
    for text in (body[0], GOOD + sunspec):
        (tmp_path / "x.toml").write_text(text)
        with pytest.raises(ConfigError) as error:
            load_profile("x", tmp_path)
        assert error.value.key == "registers"
