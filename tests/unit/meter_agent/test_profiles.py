"""Every profile is well-formed, names its evidence, and reads a register image made by hand from a page that it names.

The images are in `register_images/`, one file a profile; a new profile needs its file there and nothing here.
"""

import json
import re
import tomllib
from pathlib import Path

import jsonschema
import pytest
from support.json_schema import SCHEMA, profile_schema, without_descriptions
from support.register_image import load_register_images, words_of

from firmware_config.loader import ConfigError
from meter_agent.decode import UnusableValue, energy_mwh, model, power_w, scale_exponent, serial_number
from meter_agent.profiles import UnknownProfile, load_profile, profile_directory, profile_names, words_in
from meter_agent.request_plan import Span, plan_requests

IMAGES = Path(__file__).parent / "register_images"
FLOATS = ("f32", "f64")


def layouts(profile):
    """The profile's register tables with the SunSpec model that each is of (None without SunSpec)."""
    if profile.sunspec is None:
        return [(None, profile.registers)]
    return [(model_id, model.registers) for model in profile.sunspec.models for model_id in model.ids]


def layout_of(profile, model_id):
    return dict(layouts(profile))[model_id]


def decoded(register, words, exponent=0):
    return (power_w if register.unit in ("W", "kW") else energy_mwh)(register, words, exponent)


def test_there_is_an_image_for_each_profile_and_none_without():
    assert {path.stem for path in IMAGES.glob("*.toml")} == set(profile_names())


def test_the_guide_lists_each_profile():
    guide = (Path(__file__).parents[3] / "docs" / "meters.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([a-z0-9-]+)` \| .+ \| .+ \| .+ \|$", guide, re.MULTILINE)) == set(profile_names())


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_names_evidence_that_was_read(name):
    profile = load_profile(name)
    confirmed = {reference.url for reference in profile.references if not reference.unconfirmed}
    # A branch moves on, and then the quotation may not be found any more: welcome, but not one of the two.
    moving = re.compile(r"//(github\.com/[^/]+/[^/]+/blob|raw\.githubusercontent\.com/[^/]+/[^/]+)/(?![0-9a-f]{40}/)")
    fixed = {url for url in confirmed if not moving.search(url)}
    assert len(fixed) >= (2 if profile.confirmed else 1)
    for reference in profile.references:
        assert reference.url.startswith("http")
        assert len(reference.quote) >= 10
    assert profile.models
    assert profile.maker


def test_few_profiles_are_unconfirmed_and_the_guide_says_so():
    unconfirmed = {name for name in profile_names() if not load_profile(name).confirmed}
    assert unconfirmed == {"acrel-adw300"}
    rows = (Path(__file__).parents[3] / "docs" / "meters.md").read_text(encoding="utf-8").splitlines()
    assert {name for name in profile_names() for row in rows if f"| `{name}` |" in row and "unconfirmed" in row} == (
        unconfirmed
    )


@pytest.mark.parametrize("name", profile_names())
def test_a_register_image_made_by_hand_is_read_right(name):
    profile, file = load_profile(name), load_register_images(IMAGES / f"{name}.toml")
    assert file.images
    for image in file.images:
        assert image.page in {reference.url for reference in profile.references}
        registers = layout_of(profile, image.model)
        values = {}
        for quantity, register in registers.items():
            exponent = 0 if register.scale_factor is None else scale_exponent(*image.words(register.scale_factor, 1))
            values[quantity] = sum(
                decoded(register, image.words(address, words_in(register.type)), exponent)
                for address in register.addresses
            )
        assert values == image.expected.by_quantity()
        # A swap of import and export, or a zero that any address gives, would not be seen.
        assert len(set(values.values())) == len(values)
        assert 0 not in values.values()


@pytest.mark.parametrize("name", profile_names())
def test_each_register_table_has_an_image(name):
    """SunSpec models of one layout share one."""
    profile, file = load_profile(name), load_register_images(IMAGES / f"{name}.toml")
    shown = [layout_of(profile, image.model) for image in file.images]
    assert all(registers in shown for _, registers in layouts(profile))


@pytest.mark.parametrize("name", profile_names())
def test_what_a_meter_calls_not_available_is_never_a_number(name):
    profile, file = load_profile(name), load_register_images(IMAGES / f"{name}.toml")
    for unusable in file.unusable:
        with pytest.raises(UnusableValue, match=unusable.why):
            decoded(layout_of(profile, unusable.model)[unusable.quantity], words_of(unusable.registers))
    shown = {id(layout_of(profile, unusable.model)[unusable.quantity]) for unusable in file.unusable}
    for model_id, registers in layouts(profile):
        for quantity, register in registers.items():
            if register.sentinels or register.type in FLOATS:
                assert id(register) in shown, f"no unusable image for {quantity} of {model_id or name}"


@pytest.mark.parametrize("name", profile_names())
def test_every_sentinel_of_a_profile_is_refused(name):
    for _, registers in layouts(load_profile(name)):
        for register in registers.values():
            for sentinel in register.sentinels:
                with pytest.raises(UnusableValue):
                    decoded(register, on_the_wire(register, words_of(sentinel)))


def on_the_wire(register, most_significant_first):
    words = most_significant_first if register.word_order == "big" else most_significant_first[::-1]
    return words if register.byte_order == "big" else tuple(word >> 8 | (word & 0xFF) << 8 for word in words)


@pytest.mark.parametrize("name", profile_names())
def test_serial_number_and_identity_are_read_where_the_profile_says_so(name):
    profile, file = load_profile(name), load_register_images(IMAGES / f"{name}.toml")
    assert (profile.serial_number is None) == (file.serial_number is None)
    assert (profile.identity is None) == (file.identity is None)
    if file.serial_number is not None:
        assert (
            serial_number(profile.serial_number, words_of(file.serial_number.registers)) == file.serial_number.expected
        )
    if file.identity is not None:
        assert model(profile.identity, words_of(file.identity.registers)) == file.identity.expected


@pytest.mark.parametrize("name", profile_names())
def test_a_late_reply_cannot_pass_for_the_reply_to_the_next_request(name):
    """Replies differ in length, or the line is left alone for a second after a time-out."""
    profile = load_profile(name)
    if profile.registers is None:
        return
    spans = [
        Span(profile.function_code, address, words_in(register.type))
        for register in profile.registers.values()
        for address in register.addresses
    ]
    requests = plan_requests(spans, profile.requests)
    assert len({request.count for request in requests}) == len(requests) or profile.pauses.late_reply_ms >= 1000
    assert len(requests) <= 3


@pytest.mark.parametrize("name", profile_names())
def test_a_profile_fits_the_published_schema(name):
    raw = (profile_directory() / f"{name}.toml").read_text()
    assert raw.startswith("#:schema ../schema/meter-profile.schema.json\n")
    jsonschema.validate(tomllib.loads(raw), json.loads(SCHEMA.read_text()))


def test_the_published_schema_says_what_the_classes_say():
    """Regenerate with `python -m support.json_schema` from tests/, and describe what is new."""
    published = json.loads(SCHEMA.read_text())
    assert without_descriptions(published) == without_descriptions(profile_schema(published))


def test_the_published_schema_explains_every_key():
    published = json.loads(SCHEMA.read_text())
    tables = [published, *published["$defs"].values()]
    unexplained = [
        (table["title"], key)
        for table in tables
        for key, value in table["properties"].items()
        if len(value.get("description", "")) < 10
    ]
    assert unexplained == []


@pytest.mark.parametrize(
    "broken",
    [
        {"function_code": 6},
        {"registers": {"imports": {"address": 0, "type": "u32", "unit": "Wh"}}},
        {"registers": {"import": {"adress": 0, "type": "u32", "unit": "Wh"}}},
        {"registers": {"import": {"address": 65536, "type": "u32", "unit": "Wh"}}},
        {"registers": {"import": {"address": True, "type": "u32", "unit": "Wh"}}},
        {"name": None},
        {"models": "B23"},
    ],
)
def test_the_published_schema_refuses_mistakes(broken):
    good = tomllib.loads((profile_directory() / "abb-b23.toml").read_text())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(good | broken, json.loads(SCHEMA.read_text()))


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
[identity]
address = 11
type = "number"
count = 1
function_code = 3
values = { "1648" = "X1" }
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
        ('unit = "Wh"', 'unit = "Wh"\nplus = [2]\nrollover = 1000', "registers.import.rollover"),
        ('type = "number"\ncount = 1', 'type = "hex"\ncount = 2', "identity.values.1648"),
        ('unit = "Wh"', 'unit = "Wh"\ndivide = 0', "registers.import.divide"),
        ("address = 0", "address = 65536", "registers.import.address"),
        ('"1648" =', "0x670 =", "identity.values.0x670"),
        ('{ "1648" = "X1" }', "{}", "identity.values"),
        ('type = "number"', 'type = "bcd"', "identity.type"),
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


def test_two_quotations_of_one_page_are_one_claim_and_must_be_marked(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(GOOD.replace("example.org/b", "example.org/a"))
    with pytest.raises(ConfigError, match="`unconfirmed` on what") as error:
        load_profile("x", tmp_path)
    assert error.value.key == "references"
    path.write_text(GOOD.replace('quote = "two"', 'quote = "two", unconfirmed = true'))
    assert not load_profile("x", tmp_path).confirmed
    path.write_text(GOOD)
    assert load_profile("x", tmp_path).confirmed


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
