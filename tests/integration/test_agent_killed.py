"""Agent processes on real wires, killed again and again: every interval arrives, right to the Wh, as one payload."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from dengen_testing.conductor import Conductor
from dengen_testing.mosquitto import Mosquitto
from dengen_testing.processes import ManagedProcess, ProcessGroup, agent_process, street_process
from dengen_testing.waiting import wait_until
from dengen_testing.wire.street import read_ready_file
from support.fake_broker import BROKER_KEY, CONDUCTOR_KEY, LEDGER, T0, FakeBroker

from broker.protocol.keys import generate_private_key, save_private_key

pytestmark = pytest.mark.integration

INTERVALS = 40
KILLS = 9
METERS = {"house": ("p1", "dsmr"), "shop": ("modbus_rtu", "sdm120"), "roof": ("modbus_tcp", "iem3000")}


def _energies(name: str) -> list[int]:
    chance = random.Random(name)
    return [chance.choice((0, chance.randrange(2_000))) for _ in range(INTERVALS)]


def _street(folder: Path, mosquitto: Mosquitto) -> Path:
    meters = []
    for number, (name, (wire, kind)) in enumerate(METERS.items(), 1):
        direction = "export" if name == "roof" else "import"
        energies = {f"start_{direction}_wh": 5_000, f"{direction}_wh": _energies(name)}
        meters.append({"name": name, "wire": wire, "kind": kind, "device_id": number, "serial": number, **energies})
    description: dict[str, Any] = {
        "participant": "street",
        "interval_s": 1800,
        "origin_s": T0,
        "folder": "wire",
        "conductor": {"ledger": LEDGER, "name": "conductor", "key": CONDUCTOR_KEY.public.cose_key.hex()},
        "mqtt": {"host": "127.0.0.1", "port": mosquitto.port, "root": "dengen/v1"},
        "meters": meters,
    }
    file = folder / "street.json"
    file.write_text(json.dumps(description))
    return file


def _agent(folder: Path, name: str, address: dict[str, str | int], mosquitto: Mosquitto) -> ManagedProcess:
    serial_port, tcp_port = address.get("path"), address.get("port")
    reader = {
        "house": f'protocol = "p1"\nport = "{serial_port}"',
        "shop": f'protocol = "modbus_rtu"\nprofile = "eastron-sdm120"\nport = "{serial_port}"\ndevice_id = 2',
        "roof": f'protocol = "modbus_tcp"\nprofile = "schneider-iem3000"\nhost = "127.0.0.1"\nport = {tcp_port}\n'
        "device_id = 3",
    }[name]
    file = folder / f"{name}.toml"
    file.write_text(
        f"""
[agent]
data_dir = "{name}"
ledger = "{LEDGER}"
clock = "conductor"
broker = {{ name = "east", key = "{BROKER_KEY.public.cose_key.hex()}" }}
conductor = {{ name = "conductor", key = "{CONDUCTOR_KEY.public.cose_key.hex()}" }}

[mqtt]
host = "127.0.0.1"
port = {mosquitto.port}

[meters.{name}]
direction = "{"generation" if name == "roof" else "consumption"}"
key_file = "{name}.pem"
capacity_w = 10000

[meters.{name}.reader]
{reader}
"""
    )
    return agent_process(file)


def test_agents_killed_at_random_moments_lose_and_invent_nothing(
    tmp_path: Path, mosquitto: Mosquitto, processes: ProcessGroup
) -> None:
    keys = {name: generate_private_key() for name in METERS}
    for name, key in keys.items():
        save_private_key(tmp_path / f"{name}.pem", key)
    broker = FakeBroker(mosquitto.mqtt_config(), keys)
    processes.add(street_process(_street(tmp_path, mosquitto))).start()
    wait_until(lambda: read_ready_file(tmp_path / "wire") is not None, "the street")
    addresses = read_ready_file(tmp_path / "wire")
    assert addresses is not None
    agents = [processes.add(_agent(tmp_path, name, addresses[name], mosquitto)).start() for name in METERS]

    chance = random.Random(7)
    kills = 0

    def kill_sometimes() -> None:
        nonlocal kills
        for agent in agents:
            agent.check_running()
        if kills < KILLS and chance.random() < 0.1:
            kills += 1
            victim = chance.choice(agents)
            victim.kill()
            victim.start()

    end_s = T0 + 1800 * INTERVALS
    with Conductor(mosquitto.mqtt_config(), LEDGER, CONDUCTOR_KEY) as conductor:
        conductor.run(T0, end_s, world=["street"], market=list(METERS), while_waiting=kill_sometimes)
    broker.close()
    assert kills == KILLS
    for name in METERS:
        assert broker.energies(name) == {1800 * n: energy_wh for n, energy_wh in enumerate(_energies(name))}
    assert len(set(broker.raw)) == INTERVALS * len(METERS)
