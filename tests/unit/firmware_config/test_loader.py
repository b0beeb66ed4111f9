"""The config loader: what it reads, and that each mistake is named with file, key and what was expected."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from firmware_config.loader import Between, ConfigError, OneName, WrongValue, build, load_config


@dataclass(frozen=True, slots=True)
class Tcp:
    protocol: Literal["tcp"]
    host: str
    port: Annotated[int, Between(1, 65_535)] = 502


@dataclass(frozen=True, slots=True)
class Line:
    protocol: Literal["line", "serial"]
    device: Path


@dataclass(frozen=True, slots=True)
class Meter:
    reader: Tcp | Line
    scale: float = 1.0
    note: str | None = None

    def __post_init__(self) -> None:
        if self.scale == 0:
            raise WrongValue("scale", "a number other than 0")


@dataclass(frozen=True, slots=True)
class Register:
    address: int
    words: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Config:
    name: Annotated[str, OneName()]
    data_dir: Path
    mode: Literal["fast", "slow"] = "fast"
    active: bool = False
    limit: Annotated[int, Between(0, 10)] | None = None
    tags: tuple[str, ...] = ()
    registers: tuple[Register, ...] = ()
    meters: dict[Annotated[str, OneName()], Meter] = field(default_factory=dict)


FULL = """
name = "north"
data_dir = "data"
mode = "slow"
active = true
limit = 3
tags = ["a", "b"]

[[registers]]
address = 72
words = [1, 2]

[meters.house]
scale = 2
reader = { protocol = "tcp", host = "127.0.0.1" }

[meters.roof]
note = "on the roof"
reader = { protocol = "serial", device = "/dev/ttyS0" }
"""


def test_every_supported_hint_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(FULL)
    assert load_config(file, Config) == Config(
        name="north",
        data_dir=tmp_path / "data",
        mode="slow",
        active=True,
        limit=3,
        tags=("a", "b"),
        registers=(Register(72, (1, 2)),),
        meters={
            "house": Meter(Tcp("tcp", "127.0.0.1"), scale=2.0),
            "roof": Meter(Line("serial", Path("/dev/ttyS0")), note="on the roof"),
        },
    )


def test_an_unset_optional_key_is_none_even_without_a_default() -> None:
    @dataclass(frozen=True, slots=True)
    class Optional:
        serial: str | None

    assert build({}, Optional, Path("x.toml")).serial is None


@pytest.mark.parametrize(
    ("change", "key", "expected"),
    [
        ({"data_dir": "da\0ta"}, "data_dir", "a path, got"),
        ({"nmae": 1}, "nmae", "`name` perhaps"),
        ({"name": "Not A Name"}, "name", "a-z"),
        ({"name": 4}, "name", "text, got 4"),
        ({"data_dir": ""}, "data_dir", "a path"),
        ({"active": 1}, "active", "true or false"),
        ({"limit": True}, "limit", "an integer"),
        ({"limit": 11}, "limit", "from 0 to 10, got 11"),
        ({"mode": "warp"}, "mode", "'fast', 'slow', got 'warp'"),
        ({"tags": "a"}, "tags", "an array"),
        ({"tags": [1]}, "tags[0]", "text"),
        ({"registers": [{}]}, "registers[0].address", "the key is missing"),
        ({"registers": [{"address": 1, "words": [1]}]}, "registers[0].words", "2 items, got 1"),
        ({"registers": [3]}, "registers[0]", "a table"),
        ({"meters": []}, "meters", "a table of named entries"),
        ({"meters": {"A b": {}}}, "meters.A b", "a-z"),
        ({"meters": {"a": {"reader": 1}}}, "meters.a.reader", "a table"),
        ({"meters": {"a": {"reader": {"protocol": "udp"}}}}, "meters.a.reader.protocol", "'line', 'serial', got 'udp'"),
        ({"meters": {"a": {"reader": {}}}}, "meters.a.reader.protocol", "got nothing"),
        ({"meters": {"a": {"reader": {"protocol": "tcp", "hots": "h"}}}}, "meters.a.reader.hots", "`host` perhaps"),
        (
            {"meters": {"a": {"scale": 0, "reader": {"protocol": "tcp", "host": "h"}}}},
            "meters.a.scale",
            "other than 0",
        ),
    ],
)
def test_a_mistake_names_file_key_and_what_was_expected(change: dict[str, Any], key: str, expected: str) -> None:
    data = {"name": "north", "data_dir": "data"} | change
    with pytest.raises(ConfigError) as caught:
        build(data, Config, Path("agent.toml"))
    assert caught.value.file == Path("agent.toml")
    assert caught.value.key == key
    assert expected in caught.value.expected
    assert str(caught.value).startswith(f"agent.toml: {key}: expected ")


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "nothing.toml"
    with pytest.raises(ConfigError, match=r"nothing\.toml: expected a readable file \(No such file"):
        load_config(missing, Config)
    broken = tmp_path / "broken.toml"
    broken.write_text("name = \n")
    with pytest.raises(ConfigError, match=r"broken\.toml: expected TOML .*line 1"):
        load_config(broken, Config)
    broken.write_bytes(b"name = '\xff'")
    with pytest.raises(ConfigError, match=r"expected TOML, which is text in UTF-8, and byte 8 is not"):
        load_config(broken, Config)
    broken.write_bytes(b"name = " + b"[" * 5_000)
    with pytest.raises(ConfigError, match=r"expected TOML with fewer brackets within each other"):
        load_config(broken, Config)


def test_a_file_over_the_size_limit_is_refused(tmp_path: Path) -> None:
    huge = tmp_path / "huge.toml"
    huge.write_bytes(b"#" * 4_194_305)
    with pytest.raises(ConfigError, match="larger than 4194304 bytes"):
        load_config(huge, Config)
