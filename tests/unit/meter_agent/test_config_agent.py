"""The agent's config file: the example loads, and mistakes are named."""

import json
import re
import sys
import tomllib
import types
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest

import firmware_config
from broker.protocol.keys import generate_private_key, save_private_key
from firmware_config.loader import ConfigError, build
from meter_agent import cli
from meter_agent.config import (
    AgentConfig,
    ModbusRtuConfig,
    ModbusTcpConfig,
    P1Config,
    ReaderConfig,
    load_agent_config,
)
from meter_agent.profiles import profile_names

KEY = generate_private_key().public.cose_key.hex()


EXAMPLES = Path(firmware_config.__file__).parent / "examples"


def _data(**agent: Any) -> dict[str, Any]:
    reader = {"protocol": "modbus_tcp", "profile": "sdm630", "host": "127.0.0.1"}
    meter = {"direction": "generation", "key_file": "roof.pem", "capacity_w": 5000, "reader": reader}
    settings = {"data_dir": "data", "broker": {"name": "east", "key": KEY}, "ledger": "demo"}
    return {"agent": settings | agent, "meters": {"roof": meter}}


def test_the_commented_example_loads() -> None:
    example = EXAMPLES / "agent.toml"
    config = load_agent_config(example)
    readers = [meter.config.reader for meter in config.named_meters]
    assert [type(reader) for reader in readers] == [P1Config, ModbusTcpConfig, ModbusRtuConfig]
    assert config.meters["roof"].register_name == "export"
    assert config.meters["workshop"].register_name == "import"
    for reader in readers:
        if not isinstance(reader, P1Config):
            assert reader.profile in profile_names()
    assert config.agent.data_dir == example.parent / "data"


def test_there_is_an_example_of_every_kind_of_reader_with_every_key() -> None:
    text = (EXAMPLES / "agent-readers.toml").read_text(encoding="utf-8")
    config = load_agent_config(EXAMPLES / "agent-readers.toml")
    assert sorted(type(meter.config.reader).__name__ for meter in config.named_meters) == sorted(
        kind.__name__ for kind in get_args(ReaderConfig)
    )
    for meter in config.named_meters:
        (table,) = re.findall(rf"^\[meters\.{meter.name}\.reader\]\n(.*?)(?=^\[|\Z)", text, re.MULTILINE | re.DOTALL)
        shown = set(re.findall(r"^(?:# )?([a-z0-9_]+) = ", table, re.MULTILINE))
        assert shown == {key.name for key in fields(meter.config.reader)}


def test_what_the_example_says_of_keys_that_are_left_out_is_true() -> None:
    """Each `# key = value` is put in, and nothing changes, but for the baud rate that depends on the mode."""
    file = EXAMPLES / "agent-readers.toml"
    text = file.read_text(encoding="utf-8")
    filled = re.sub(r"^# ([a-z0-9_]+ = )", r"\1", text.replace("# baud = 300\n", ""), flags=re.MULTILINE)
    assert filled.count("\ntimeout_s = ") > 5
    assert build(tomllib.loads(filled), AgentConfig, file) == load_agent_config(file)


@pytest.mark.parametrize("name", ["agent.toml", "agent-readers.toml"])
def test_check_config_is_content_with_the_examples(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    file = tmp_path / name
    file.write_text(text)
    for key in re.findall(r'^key_file = "(.*)"$', text, re.MULTILINE):
        save_private_key(tmp_path / key, generate_private_key())
    for secret in re.findall(r'^(?:\w+_key_file|password_file) = "(.*)"$', text, re.MULTILINE):
        (tmp_path / secret).write_text("00112233445566778899AABBCCDDEEFF")
    # Its wheels are for Linux with GPIO; what it is asked for only when the line is opened is not looked at here.
    monkeypatch.setitem(sys.modules, "gpiod", types.ModuleType("gpiod"))
    assert cli.main(["check-config", "--json", "--config", str(file)]) == 0
    assert len(json.loads(capsys.readouterr().out)["meters"]) == {"agent.toml": 3, "agent-readers.toml": 9}[name]


def test_defaults_are_filled_in() -> None:
    config = build(_data(), AgentConfig, Path("agent.toml"))
    assert config.name == "roof"
    assert config.agent.interval_s == 1800
    assert config.mqtt.host == "localhost"
    assert config.agent.broker.public_key().cose_key.hex() == KEY
    consumption = build(
        _data() | {"meters": {"a": {**_data()["meters"]["roof"], "direction": "consumption"}}},
        AgentConfig,
        Path("agent.toml"),
    )
    assert consumption.meters["a"].register_name == "import"


@pytest.mark.parametrize(
    ("agent", "key"),
    [
        ({"broker": {"name": "east", "key": "abcd"}}, "agent.broker.key"),
        ({"broker": {"name": "east", "key": "no hex"}}, "agent.broker.key"),
        ({"clock": "conductor"}, "agent.conductor"),
        ({"conductor": {"name": "conductor", "key": KEY}}, "agent.conductor"),
        ({"interval_s": 600}, "agent.interval_s"),
    ],
)
def test_wrong_settings_are_named(agent: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(_data(**agent), AgentConfig, Path("agent.toml"))
    assert caught.value.key == key


def test_an_agent_needs_a_meter() -> None:
    with pytest.raises(ConfigError, match="1 to 64 tables"):
        build(_data() | {"meters": {}}, AgentConfig, Path("agent.toml"))
