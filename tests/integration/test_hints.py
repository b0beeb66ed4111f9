"""A broker's hint reaches agent, status and home over a real mosquitto; what others put in its place is refused."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
from dengen_testing.listener import Listener
from dengen_testing.mosquitto import Mosquitto
from dengen_testing.waiting import wait_until

from broker.protocol.envelope import seal
from broker.protocol.keys import PrivateKey, generate_private_key, save_private_key
from broker.protocol.messages import Hint, SupplyLevel
from broker.protocol.topics import Topics
from meter_agent.clock import SystemClock
from meter_agent.config import AgentConfig, AgentSettings, HomeAssistantConfig, MeterConfig, P1Config, PartyKey
from meter_agent.installer import status
from meter_agent.readings import MeterReader, Sample
from meter_agent.service import Agent

pytestmark = pytest.mark.integration

BROKER_KEY = generate_private_key()
LEDGER = "demo"
DAY_S = 86_400


class Meter:
    """A meter that always shows the same."""

    def __init__(self, clock: SystemClock) -> None:
        self._clock = clock

    def sample(self) -> Sample:
        return Sample(self._clock.monotonic_s(), self._clock.time_s(), 12_345_678, None, None)

    def close(self) -> None:
        pass


def meter(folder: Path, name: str, direction: Literal["consumption", "generation"]) -> MeterConfig:
    key_file = folder / f"{name}.pem"
    save_private_key(key_file, generate_private_key())
    reader = P1Config("p1", Path("/dev/null"))
    return MeterConfig(direction, key_file, 100_000, reader, sample_period_s=0.1, register="import")


def config(folder: Path, mosquitto: Mosquitto, *, hints: bool = True) -> AgentConfig:
    meters = {"house": meter(folder, "house", "consumption"), "roof": meter(folder, "roof", "generation")}
    broker = PartyKey("east", BROKER_KEY.public.cose_key.hex())
    settings = AgentSettings(folder / "data", broker, LEDGER, name="gateway", hints=hints)
    return AgentConfig(settings, meters, mosquitto.mqtt_config(), HomeAssistantConfig(period_s=0.1))


@contextmanager
def running(settings: AgentConfig) -> Iterator[None]:
    clock = SystemClock(require_synchronised=False)
    readers: dict[str, MeterReader] = {name: Meter(clock) for name in settings.meters}
    agent = Agent(settings, readers, clock)
    thread = threading.Thread(target=agent.run)
    thread.start()
    try:
        yield
    finally:
        agent.stop()
        thread.join(10)
        assert not thread.is_alive()


def shown(settings: AgentConfig, meter: str = "house") -> Any:
    """The meter's part of what `meter-agent status` shows."""
    return status.gather(settings, [meter], 50, 0)["meters"][0]


def events(settings: AgentConfig) -> str:
    return json.dumps(status.gather(settings, ["house"], 50, 0)["events"])


def hint(levels: SupplyLevel, *, made_s: int = 0, meter: str = "house") -> Hint:
    """The same level all day long, of the UTC day that is now."""
    start_s = int(SystemClock(require_synchronised=False).time_s()) // DAY_S * DAY_S
    return Hint(meter, start_s, start_s + DAY_S, made_s, (levels,) * 48)


def say(listener: Listener, message: Hint, key: PrivateKey = BROKER_KEY, *, topic_meter: str = "house") -> None:
    raw = seal(message, key, LEDGER, "east")
    listener.publish(Topics().meter("east", topic_meter, "hint"), raw, retain=True)


def test_a_hint_is_kept_shown_and_told_to_the_home(
    tmp_path: Path, mosquitto: Mosquitto, start_listener: Callable[..., Listener]
) -> None:
    listener = start_listener(mosquitto.mqtt_config(), ["homeassistant/#", "dengen/home/#"])
    # Said while the agent is away: the server keeps it.
    say(listener, hint(SupplyLevel.PLENTIFUL))
    settings = config(tmp_path, mosquitto)
    with running(settings):
        wait_until(lambda: shown(settings)["hint"] is not None, "the hint")
        found = shown(settings)["hint"]
        assert found["level"] == "plentiful"
        assert len(found["days"][0]["levels"]) == 48
        assert "supply plentiful now; plentiful from" in status.text(status.gather(settings, ["house"], 5, 0))
        told = listener.wait_for(lambda message: message.topic.endswith("house/supply"), "the level at home")
        assert told.payload == b"plentiful"
        told = listener.wait_for(lambda message: message.topic.endswith("house/next_plentiful"), "when")
        assert told.payload.endswith(b"Z")
        sensors = listener.wait_for(lambda message: b'"supply"' in message.payload, "the sensors")
        components = json.loads(sensors.payload)["components"]
        assert components["supply"]["device_class"] == "enum"
        assert components["supply"]["options"] == ["scarce", "short", "enough", "plentiful"]
        assert components["next_plentiful"]["device_class"] == "timestamp"
        # The broker thinks better of it.
        say(listener, hint(SupplyLevel.SHORT, made_s=1))
        wait_until(lambda: shown(settings)["hint"]["level"] == "short", "the newer hint")
        assert shown(settings)["hint"]["next_plentiful_s"] is None
        assert shown(settings, "roof")["hint"] is None
    assert shown(settings)["hint"] is None, "it is in no file; the server has it"


def test_forged_and_misplaced_hints_are_refused_and_reported(
    tmp_path: Path, mosquitto: Mosquitto, start_listener: Callable[..., Listener]
) -> None:
    listener = start_listener(mosquitto.mqtt_config(), ["nothing"])
    settings = config(tmp_path, mosquitto)
    with running(settings):
        say(listener, hint(SupplyLevel.SCARCE))
        wait_until(lambda: shown(settings)["hint"] is not None, "the hint")
        say(listener, hint(SupplyLevel.PLENTIFUL, made_s=1), generate_private_key())
        say(listener, hint(SupplyLevel.PLENTIFUL, made_s=1, meter="barn"))
        say(listener, hint(SupplyLevel.SHORT, made_s=2))
        wait_until(lambda: shown(settings)["hint"]["level"] == "short", "the next good hint")
    assert events(settings).count("bad-message") == 2


def test_an_agent_that_does_not_want_hints_hears_none(
    tmp_path: Path, mosquitto: Mosquitto, start_listener: Callable[..., Listener]
) -> None:
    listener = start_listener(mosquitto.mqtt_config(), ["dengen/home/#"])
    say(listener, hint(SupplyLevel.PLENTIFUL))
    settings = config(tmp_path, mosquitto, hints=False)
    with running(settings):
        listener.wait_for(lambda message: message.topic.endswith("house/import_kwh"), "the meter at home")
        assert shown(settings)["hint"] is None
    assert not any(message.topic.endswith("supply") for message in listener.messages)
