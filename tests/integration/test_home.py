"""The home sees its meter: plain values and Home Assistant's discovery on a real mosquitto; `meter-agent status`."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from dengen_testing.listener import Listener
from dengen_testing.mosquitto import Mosquitto
from dengen_testing.waiting import WaitedTooLong, wait_until

from broker.protocol.keys import generate_private_key, save_private_key
from broker.protocol.mqtt_link import MqttConfig
from meter_agent import cli
from meter_agent.clock import SystemClock
from meter_agent.config import AgentConfig, AgentSettings, HomeAssistantConfig, MeterConfig, P1Config, PartyKey
from meter_agent.home_link import HomeLink
from meter_agent.home_messages import HomeTopics
from meter_agent.readings import MeterReader, ReadFailure, Sample
from meter_agent.service import Agent

pytestmark = pytest.mark.integration

BROKER_KEY = generate_private_key().public.cose_key.hex()
NOWHERE = MqttConfig(host="127.0.0.1", port=1)


class Meter:
    """A meter that shows what the test says; its clock is real."""

    def __init__(self) -> None:
        self.import_mwh = 12_345_678
        self.export_mwh: int | None = None
        self.power_w: int | None = -250
        self.unplugged = False
        self.reads = 0
        self._clock = SystemClock(require_synchronised=False)

    def sample(self) -> Sample:
        self.reads += 1
        if self.unplugged:
            raise ReadFailure("house", "the cable is out")
        clock = self._clock
        return Sample(clock.monotonic_s(), clock.time_s(), self.import_mwh, self.export_mwh, self.power_w, "A1")

    def close(self) -> None:
        pass


def config(folder: Path, home: MqttConfig, broker: MqttConfig = NOWHERE) -> AgentConfig:
    save_private_key(folder / "house.pem", generate_private_key())
    meter = MeterConfig(
        "consumption", folder / "house.pem", 100_000, P1Config("p1", Path("/dev/null")), sample_period_s=0.1
    )
    settings = AgentSettings(folder / "data", PartyKey("east", BROKER_KEY), "demo", name="gateway")
    return AgentConfig(settings, {"house": meter}, broker, HomeAssistantConfig(period_s=0.1, mqtt=home))


@contextmanager
def running(settings: AgentConfig) -> Iterator[Meter]:
    meter = Meter()
    readers: dict[str, MeterReader] = {"house": meter}
    agent = Agent(settings, readers, SystemClock(require_synchronised=False))
    thread = threading.Thread(target=agent.run)
    thread.start()
    try:
        yield meter
    finally:
        agent.stop()
        thread.join(10)
        assert not thread.is_alive()


def last(listener: Listener, topic: str) -> str | None:
    """The newest payload on a topic, of all messages that have come by now."""
    with suppress(WaitedTooLong):
        listener.wait_for(lambda _: False, "nothing more", limit_s=0.05, since=len(listener.messages))
    payloads = [incoming.payload for incoming in listener.messages if incoming.topic == topic]
    return payloads[-1].decode() if payloads else None


def test_home_assistant_learns_of_the_meter_and_sees_its_values(
    tmp_path: Path, mosquitto: Mosquitto, start_listener: Callable[..., Listener]
) -> None:
    listener = start_listener(mosquitto.mqtt_config(), ["homeassistant/#", "dengen/home/#"])
    base = "dengen/home/gateway/house"
    with running(config(tmp_path, mosquitto.mqtt_config())) as meter:
        wait_until(lambda: last(listener, f"{base}/power_w") == "-250", "the power")
        assert last(listener, f"{base}/import_kwh") == "12.345678"
        assert last(listener, f"{base}/availability") == "online"
        assert last(listener, "dengen/home/gateway/availability") == "online"
        assert last(listener, f"{base}/export_kwh") is None

        text = last(listener, "homeassistant/device/dengen-gateway-house/config")
        assert text is not None
        discovery = json.loads(text)
        assert discovery["device"] == {"identifiers": ["dengen-gateway-house"], "name": "house", "serial_number": "A1"}
        assert discovery["origin"]["name"] == "dengen meter-agent"
        assert discovery["components"]["import_kwh"] == {
            "platform": "sensor",
            "unique_id": "dengen-gateway-house-import_kwh",
            "name": "Energy import",
            "state_topic": f"{base}/import_kwh",
            "device_class": "energy",
            "state_class": "total_increasing",
            "unit_of_measurement": "kWh",
        }
        power = discovery["components"]["power_w"]
        assert (power["device_class"], power["state_class"], power["unit_of_measurement"]) == (
            "power",
            "measurement",
            "W",
        )
        assert set(discovery["components"]) == {"import_kwh", "power_w"}
        assert {each["topic"] for each in discovery["availability"]} == {
            "dengen/home/gateway/availability",
            f"{base}/availability",
        }

        # A value that comes later gets a sensor of its own.
        meter.export_mwh = 5
        wait_until(lambda: last(listener, f"{base}/export_kwh") == "0.000005", "the export")
        text = last(listener, "homeassistant/device/dengen-gateway-house/config")
        assert text is not None
        assert set(json.loads(text)["components"]) == {"import_kwh", "export_kwh", "power_w"}

        meter.unplugged = True
        wait_until(lambda: last(listener, f"{base}/availability") == "offline", "the meter's absence")
    wait_until(lambda: last(listener, "dengen/home/gateway/availability") == "offline", "the agent's goodbye")
    # All of it is retained: who comes later sees it too.
    later = start_listener(mosquitto.mqtt_config(), ["homeassistant/#", "dengen/home/#"])
    wait_until(lambda: last(later, f"{base}/import_kwh") == "12.345678", "the retained value")
    assert all(incoming.retained for incoming in later.messages)


def test_what_the_agent_does_not_believe_is_not_shown(
    tmp_path: Path, mosquitto: Mosquitto, start_listener: Callable[..., Listener]
) -> None:
    listener = start_listener(mosquitto.mqtt_config(), ["dengen/home/#"])
    topic = "dengen/home/gateway/house/import_kwh"
    with running(config(tmp_path, mosquitto.mqtt_config())) as meter:
        wait_until(lambda: last(listener, topic) == "12.345678", "the value")
        meter.import_mwh = 9_113_000_000
        before = meter.reads
        wait_until(lambda: meter.reads > before + 5, "some reads")
        meter.import_mwh = 12_346_000
        wait_until(lambda: last(listener, topic) == "12.346000", "the next good value")
    shown = [incoming.payload for incoming in listener.messages if incoming.topic == topic]
    assert set(shown) == {b"12.345678", b"12.346000"}


def test_a_home_server_that_was_away_is_told_everything_again(
    tmp_path: Path, mosquitto: Mosquitto, start_listener: Callable[..., Listener]
) -> None:
    with running(config(tmp_path, mosquitto.mqtt_config())) as meter:
        first = start_listener(mosquitto.mqtt_config(), ["dengen/home/#"])
        wait_until(lambda: last(first, "dengen/home/gateway/house/import_kwh") is not None, "the value")
        mosquitto.kill()
        before = meter.reads
        wait_until(lambda: meter.reads > before + 3, "measuring to go on")
        # It has no persistence, so nothing retained is left.
        mosquitto.start()
        listener = start_listener(mosquitto.mqtt_config(), ["homeassistant/#", "dengen/home/#"])
        wait_until(lambda: last(listener, "dengen/home/gateway/house/import_kwh") == "12.345678", "the value again")
        wait_until(lambda: last(listener, "dengen/home/gateway/availability") == "online", "the agent's presence")
        wait_until(lambda: last(listener, "homeassistant/device/dengen-gateway-house/config") is not None, "discovery")


def test_values_go_out_at_most_once_a_period_and_without_discovery_if_so_wanted(
    mosquitto: Mosquitto, start_listener: Callable[..., Listener]
) -> None:
    listener = start_listener(mosquitto.mqtt_config(), ["homeassistant/#", "home/#"])
    now_s = [0.0]
    topics = HomeTopics("home", "homeassistant", "gateway")
    link = HomeLink(mosquitto.mqtt_config(), topics, announce=False, period_s=30, monotonic_s=lambda: now_s[0])
    link.start()
    sample = Meter().sample()
    link.show("house", sample, {})
    wait_until(lambda: last(listener, "home/gateway/house/power_w") == "-250", "the first value")
    for power_w in range(5):
        link.show("house", replace(sample, power_w=power_w), {})
    link.failed("house")
    # Presence is not held back, so the values that came before it have been looked at.
    wait_until(lambda: last(listener, "home/gateway/house/availability") == "offline", "the absence")
    assert last(listener, "home/gateway/house/power_w") == "-250"
    now_s[0] = 31.0
    wait_until(lambda: last(listener, "home/gateway/house/power_w") == "4", "the newest of them")
    link.close()
    powers = [incoming.payload for incoming in listener.messages if incoming.topic == "home/gateway/house/power_w"]
    assert powers == [b"-250", b"4"]
    assert not any(incoming.topic.startswith("homeassistant") for incoming in listener.messages)


def test_the_will_says_offline_for_an_agent_that_vanished(
    mosquitto: Mosquitto, start_listener: Callable[..., Listener]
) -> None:
    listener = start_listener(mosquitto.mqtt_config(), ["home/#"])
    link = HomeLink(mosquitto.mqtt_config(), HomeTopics("home", "homeassistant", "gateway"), True, 1.0)
    link.start()
    wait_until(lambda: last(listener, "home/gateway/availability") == "online", "the presence")
    client = link._link._client
    assert client is not None
    socket = client.socket()
    assert socket is not None
    socket.shutdown(2)  # type: ignore[call-arg]
    will = listener.wait_for(lambda message: message.payload == b"offline", "the will")
    assert will.topic == "home/gateway/availability"
    wait_until(lambda: last(listener, "home/gateway/availability") == "online", "the way back")
    link.close()


def test_status_asks_the_running_agent(
    tmp_path: Path, mosquitto: Mosquitto, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path, mosquitto.mqtt_config(), mosquitto.mqtt_config())
    file = tmp_path / "agent.toml"
    file.write_text(
        f"""
[agent]
name = "gateway"
data_dir = "data"
ledger = "demo"
require_synchronised_clock = false
broker = {{ name = "east", key = "{BROKER_KEY}" }}
[mqtt]
host = "127.0.0.1"
port = {mosquitto.port}
[home_assistant]
[meters.house]
direction = "consumption"
key_file = "house.pem"
capacity_w = 100000
reader = {{ protocol = "p1", port = "/dev/null" }}
"""
    )

    def status() -> dict[str, object]:
        assert cli.main(["status", "--config", str(file), "--json"]) == 0
        found: dict[str, object] = json.loads(capsys.readouterr().out)
        return found

    with running(settings) as meter:
        wait_until(lambda: meter.reads > 2, "some reads")

        def connected() -> bool:
            found = status()
            broker, home = found["broker"], found["home"]
            assert isinstance(broker, dict)
            assert isinstance(home, dict)
            return bool(broker["connected"] and home["connected"])

        wait_until(connected, "both connections")
        found = status()
        assert found["running"]
        assert found["clock"] == {"source": "system", "synchronised": True}
        (house,) = found["meters"]  # type: ignore[misc]
        assert house["reading"]["import_mwh"] == 12_345_678  # type: ignore[index]
        assert house["reading"]["serial_number"] == "A1"  # type: ignore[index]
        assert (house["fault"], house["waiting"]) == (None, 0)  # type: ignore[index]
        assert cli.main(["status", "--config", str(file)]) == 0
        text = capsys.readouterr().out
        assert "agent gateway: running" in text
        assert f"broker east at 127.0.0.1:{mosquitto.port}: connected" in text
        assert "import 12.345678 kWh power -250 W" in text

        meter.unplugged = True
        wait_until(lambda: "the cable is out" in json.dumps(status()["meters"]), "the fault")
        mosquitto.kill()

        def lost() -> bool:
            broker = status()["broker"]
            assert isinstance(broker, dict)
            return not broker["connected"] and bool(broker["failure"])

        wait_until(lost, "the lost connection")
    found = status()
    assert not found["running"]
    assert found["home"] is None
    assert "the cable is out" in json.dumps(found["events"])
