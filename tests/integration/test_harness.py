"""The harness itself: mosquitto, the conductor and a street as processes, and how they behave when they are ended."""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dengen_testing.conductor import ConductorStalled
from dengen_testing.listener import Listener
from dengen_testing.mosquitto import Mosquitto
from dengen_testing.plugin import StartConductor
from dengen_testing.processes import ManagedProcess, ProcessEnded
from dengen_testing.waiting import WaitedTooLong, wait_until

from broker.protocol.envelope import Signer, open_envelope
from broker.protocol.keys import PrivateKey
from broker.protocol.messages import Report, Stage, Tick
from broker.protocol.mqtt_link import MqttConfig, MqttLink
from broker.protocol.topics import Topics

pytestmark = pytest.mark.integration
TOPICS = Topics()


class StubParticipant(threading.Thread):
    """A market participant that answers every copy of a tick, busy first and then idle."""

    def __init__(self, mqtt: MqttConfig, name: str, step_s: int, key: PrivateKey, *, silent: bool = False) -> None:
        super().__init__(name=name, daemon=True)
        self._mqtt, self._step_s, self._silent = mqtt, step_s, silent
        self._signer = Signer("conductor", key.public)
        self._stopping = threading.Event()
        self.ticks: list[Tick] = []

    def run(self) -> None:
        link = MqttLink(self._mqtt, self.name, [(TOPICS.time, 0)])
        while not self._stopping.is_set():
            for incoming in link.poll(0.1):
                tick = open_envelope(incoming.payload, "demo", lambda _: self._signer).message
                assert isinstance(tick, Tick)
                if tick not in self.ticks:
                    self.ticks.append(tick)
                if tick.stage is Stage.MARKET and not self._silent:
                    for idle in (False, True):
                        report = Report(self.name, tick.time_s, tick.stage, idle, tick.time_s + self._step_s)
                        link.publish(TOPICS.report(self.name), report.to_bytes(), retain=True)
                    link.flush()
        link.close()

    def stop(self) -> None:
        self._stopping.set()
        self.join(10)


@pytest.fixture
def start_stub(mosquitto: Mosquitto, conductor_key: PrivateKey) -> Any:
    started: list[StubParticipant] = []

    def start(name: str, step_s: int, *, silent: bool = False) -> StubParticipant:
        stub = StubParticipant(mosquitto.mqtt_config(), name, step_s, conductor_key, silent=silent)
        stub.start()
        started.append(stub)
        return stub

    yield start
    for stub in started:
        stub.stop()


def test_mosquitto_carries_a_message_of_the_largest_size(
    mosquitto: Mosquitto, start_listener: Callable[..., Listener]
) -> None:
    listener = start_listener(mosquitto.mqtt_config(), ["large"])
    payload = bytes(2 * 2_097_152)
    listener.publish("large", payload)
    assert listener.wait_for(lambda message: message.topic == "large", "the large message").payload == payload


def test_mosquitto_comes_back_on_its_port_after_a_kill(
    mosquitto: Mosquitto, start_listener: Callable[..., Listener]
) -> None:
    listener = start_listener(mosquitto.mqtt_config(), ["after"])
    port = mosquitto.port
    mosquitto.kill()
    assert mosquitto.pid is None
    mosquitto.restart()
    assert mosquitto.port == port
    for _ in range(100):
        listener.publish("after", b"1")
        try:
            listener.wait_for(lambda message: message.topic == "after", "a message after the restart", limit_s=0.3)
        except WaitedTooLong:
            continue
        return
    pytest.fail("the listener did not come back")


def test_mosquitto_with_tls_serves_only_whoever_trusts_its_authority(
    tls_mosquitto: Mosquitto, start_listener: Callable[..., Listener]
) -> None:
    listener = start_listener(tls_mosquitto.mqtt_config(), ["secret"])
    listener.publish("secret", b"1")
    listener.wait_for(lambda message: message.topic == "secret", "the message over TLS")
    with pytest.raises(WaitedTooLong):
        Listener(MqttConfig(host="127.0.0.1", port=tls_mosquitto.port), ["secret"]).connect(limit_s=1.0)


def test_the_conductor_lets_time_run_when_everybody_is_idle(
    mosquitto: Mosquitto, conductor_key: PrivateKey, start_stub: Any, start_conductor: StartConductor
) -> None:
    start_stub("agent", 1_800)
    broker = start_stub("broker", 900)
    conductor = start_conductor(mosquitto.mqtt_config(), "demo", conductor_key)
    seen: list[Tick] = []
    assert conductor.run(0, 3_600, market=["agent", "broker"], on_progress=seen.append) == 5
    assert [tick.time_s for tick in seen] == [0, 900, 1_800, 2_700, 3_600]
    assert broker.ticks[: len(seen)] == seen
    assert conductor.run(4_500, 4_500, market=["broker"]) == 1


def test_the_conductor_names_who_holds_time(
    mosquitto: Mosquitto, conductor_key: PrivateKey, start_stub: Any, start_conductor: StartConductor
) -> None:
    start_stub("agent", 1_800)
    start_stub("sleeper", 1_800, silent=True)
    conductor = start_conductor(mosquitto.mqtt_config(), "demo", conductor_key, stall_limit_s=1.5)
    with pytest.raises(ConductorStalled) as caught:
        conductor.run(0, 3_600, market=["agent", "sleeper"])
    assert caught.value.waiting == ("sleeper: never reported",)


def test_time_goes_on_after_mosquitto_was_killed(
    mosquitto: Mosquitto, conductor_key: PrivateKey, start_stub: Any, start_conductor: StartConductor
) -> None:
    start_stub("agent", 60)
    conductor = start_conductor(mosquitto.mqtt_config(), "demo", conductor_key)
    killed: list[int] = []

    def kill_once(tick: Tick) -> None:
        if tick.time_s == 600 and not killed:
            killed.append(tick.time_s)
            mosquitto.kill()
            mosquitto.restart()

    assert conductor.run(0, 1_200, market=["agent"], on_progress=kill_once) == 21
    assert killed


def test_a_process_that_ended_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    process = ManagedProcess("short", [sys.executable, "-c", "print('last words'); exit(3)"], tmp_path / "short.log")
    process.start()
    assert process.wait_ended(10) == 3
    with pytest.raises(ProcessEnded, match="last words"):
        process.check_running()


def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    script = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True)\n"
        "while True: signal.pause()"
    )
    process = ManagedProcess("deaf", [sys.executable, "-c", script], tmp_path / "deaf.log").start()
    wait_until(lambda: "deaf" in process.log_tail(), "the process to be deaf")
    pid = process.pid
    assert pid is not None
    assert process.stop(limit_s=0.2) == -9
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
