"""The agent's config file: the example loads, and mistakes are named."""

from pathlib import Path
from typing import Any

import pytest

import firmware_config
from broker.protocol.keys import generate_private_key
from firmware_config.loader import ConfigError, build
from meter_agent.config import AgentConfig, ModbusRtuConfig, ModbusTcpConfig, P1Config, load_agent_config
from meter_agent.profiles import profile_names

KEY = generate_private_key().public.cose_key.hex()


def _data(**agent: Any) -> dict[str, Any]:
    reader = {"protocol": "modbus_tcp", "profile": "sdm630", "host": "127.0.0.1"}
    meter = {"direction": "generation", "key_file": "roof.pem", "capacity_w": 5000, "reader": reader}
    settings = {"data_dir": "data", "broker": {"name": "east", "key": KEY}, "ledger": "demo"}
    return {"agent": settings | agent, "meters": {"roof": meter}}


def test_the_example_shows_every_reader_and_loads() -> None:
    example = Path(firmware_config.__file__).parent / "examples" / "agent.toml"
    config = load_agent_config(example)
    readers = [meter.config.reader for meter in config.named_meters]
    assert [type(reader) for reader in readers] == [P1Config, ModbusTcpConfig, ModbusRtuConfig]
    assert config.meters["roof"].register_name == "export"
    assert config.meters["workshop"].register_name == "import"
    for reader in readers:
        if not isinstance(reader, P1Config):
            assert reader.profile in profile_names()
    assert config.agent.data_dir == example.parent / "data"


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
