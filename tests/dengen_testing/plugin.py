"""Pytest fixtures for tests against real servers and processes. Loaded by itself where the package is installed.

Nothing is started but what a test asks for, everything is stopped at its end, and files lie below its `tmp_path`.
docs/testing.md shows a whole test of somebody else's gateway.

Each `start_*` fixture is a function that starts one more of its kind; each without `start_` is a ready one.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest

from broker.protocol.keys import PrivateKey, generate_private_key
from broker.protocol.mqtt_link import MqttConfig
from dengen_testing.certificates import Authority
from dengen_testing.conductor import DEFAULT_STALL_LIMIT_S, Conductor
from dengen_testing.listener import Listener
from dengen_testing.mosquitto import Mosquitto
from dengen_testing.processes import ManagedProcess, ProcessGroup, agent_process, broker_process, street_process
from dengen_testing.waiting import wait_until
from dengen_testing.wire.config import load_street_config, street_config
from dengen_testing.wire.street import Street, read_ready_file


class StartConductor(Protocol):
    """The type of the fixture `start_conductor`."""

    def __call__(
        self, mqtt: MqttConfig, ledger: str, key: PrivateKey, *, stall_limit_s: float = DEFAULT_STALL_LIMIT_S
    ) -> Conductor: ...


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Mosquitto]:
    """A running mosquitto on a free port of 127.0.0.1; see `Mosquitto` for `kill` and `restart`."""
    with Mosquitto(tmp_path / "mosquitto") as server:
        yield server


@pytest.fixture
def tls_mosquitto(tmp_path: Path) -> Iterator[Mosquitto]:
    """The same with TLS 1.3, on a certificate of an authority made for this test (`mqtt_config().ca_file`)."""
    folder = tmp_path / "mosquitto-tls"
    folder.mkdir()
    with Mosquitto(folder, tls=Authority(folder)) as server:
        yield server


@pytest.fixture
def conductor_key() -> PrivateKey:
    """A key for the conductor of this test's ledger."""
    return generate_private_key()


@pytest.fixture
def start_conductor() -> Iterator[StartConductor]:
    """`start_conductor(mqtt_config, ledger, key)`: a `Conductor`, whose `run` lets simulated time pass."""
    started: list[Conductor] = []

    def start(
        mqtt: MqttConfig, ledger: str, key: PrivateKey, *, stall_limit_s: float = DEFAULT_STALL_LIMIT_S
    ) -> Conductor:
        conductor = Conductor(mqtt, ledger, key, stall_limit_s=stall_limit_s)
        started.append(conductor)
        return conductor

    yield start
    for conductor in started:
        conductor.close()


@pytest.fixture
def start_listener() -> Iterator[Callable[..., Listener]]:
    """`start_listener(mqtt_config, ["dengen/v1/#"])`: a connected `Listener`, which can publish too."""
    started: list[Listener] = []

    def start(mqtt: MqttConfig, filters: list[str]) -> Listener:
        listener = Listener(mqtt, filters, client_id=f"listener-{len(started)}")
        started.append(listener)
        return listener.connect()

    yield start
    for listener in started:
        listener.close()


@pytest.fixture
def start_street(tmp_path: Path) -> Iterator[Callable[[dict[str, Any]], Street]]:
    """`start_street({...})`: wire-level meters in this process, moved by hand with `move_to`; see `wire/config.py`.

    Their files and serial ports lie below `tmp_path`. A `conductor` in the description is not followed: use
    `start_process` with a street file for that.
    """
    started: list[Street] = []

    def start(description: dict[str, Any]) -> Street:
        config = street_config(description, tmp_path)
        street = Street(replace(config, conductor=None)).start()
        started.append(street)
        return street

    yield start
    for street in started:
        street.close()


@pytest.fixture
def processes() -> Iterator[ProcessGroup]:
    """Processes that are stopped at the end of the test, the last started first."""
    with ProcessGroup() as group:
        yield group


@pytest.fixture
def start_agent(processes: ProcessGroup) -> Callable[[Path], ManagedProcess]:
    """`start_agent(config_file)`: a `meter-agent run` of its own."""
    return lambda config: processes.add(agent_process(config)).start()


@pytest.fixture
def start_broker(processes: ProcessGroup) -> Callable[[Path], ManagedProcess]:
    """`start_broker(config_file)`: an `energy-broker run` of its own."""
    return lambda config: processes.add(broker_process(config)).start()


@pytest.fixture
def start_street_process(processes: ProcessGroup) -> Callable[[Path], ManagedProcess]:
    """`start_street_process(street_file)`: a street in a process of its own, which follows its conductor.

    It is ready when this returns; `read_ready_file` of `dengen_testing.wire.street` gives the addresses of its meters.
    """

    def start(config: Path) -> ManagedProcess:
        process = processes.add(street_process(config)).start()
        folder = load_street_config(config).folder

        def ready() -> bool:
            process.check_running()
            return read_ready_file(folder) is not None

        wait_until(ready, f"the meters of {config}", detail=process.log_tail)
        return process

    return start
