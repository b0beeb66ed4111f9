"""What the home's own MQTT server is told of a meter: plain values, and Home Assistant's discovery message. Pure.

Format of the discovery message: https://www.home-assistant.io/integrations/mqtt/ ("Device discovery payload",
"Using availability topics"): a retained JSON object on `PREFIX/device/ID/config` with `device`, `origin` and one entry
of `components` for each value. Energy is a `total_increasing` sensor, which Home Assistant sums up over meter changes:
https://developers.home-assistant.io/docs/core/entity/sensor/ ("Available state classes").

Values are decimals made from integers. A value that the agent holds back is not told to the home either.
"""

import json
from dataclasses import dataclass
from typing import Any, Final

from meter_agent.hints import LEVEL_NAMES
from meter_agent.readings import Sample
from meter_agent.shown import kwh

ONLINE: Final = b"online"
OFFLINE: Final = b"offline"

_ENERGY: Final = {"device_class": "energy", "state_class": "total_increasing", "unit_of_measurement": "kWh"}
_POWER: Final = {"device_class": "power", "state_class": "measurement", "unit_of_measurement": "W"}
_SENSORS: Final[dict[str, dict[str, Any]]] = {
    "import_kwh": {"name": "Energy import", **_ENERGY},
    "export_kwh": {"name": "Energy export", **_ENERGY},
    "power_w": {"name": "Power", **_POWER},
    "supply": {"name": "Supply", "device_class": "enum", "options": LEVEL_NAMES},
    "next_plentiful": {"name": "Next plentiful supply", "device_class": "timestamp"},
}


@dataclass(frozen=True, slots=True)
class HomeTopics:
    """The topics of one agent: `root/agent/availability`, `root/agent/meter/{availability,import_kwh,…}`."""

    root: str
    discovery_prefix: str
    agent: str

    @property
    def agent_availability(self) -> str:
        """Where the agent's own presence stands; also its will."""
        return f"{self.root}/{self.agent}/availability"

    def meter(self, meter: str, leaf: str) -> str:
        """The topic of one value of a meter, or of its availability."""
        return f"{self.root}/{self.agent}/{meter}/{leaf}"

    def discovery(self, meter: str) -> str:
        """Where Home Assistant learns of the meter."""
        return f"{self.discovery_prefix}/device/{self.device_id(meter)}/config"

    def device_id(self, meter: str) -> str:
        """The name under which Home Assistant knows the meter; it stays the same when the meter is replaced."""
        return f"dengen-{self.agent}-{meter}"


def values(sample: Sample) -> dict[str, bytes]:
    """The plain values of a sample by the last level of their topics; only those that the meter has."""
    found = {}
    if sample.import_mwh is not None:
        found["import_kwh"] = kwh(sample.import_mwh).encode()
    if sample.export_mwh is not None:
        found["export_kwh"] = kwh(sample.export_mwh).encode()
    if sample.power_w is not None:
        found["power_w"] = str(sample.power_w).encode()
    return found


def discovery(topics: HomeTopics, meter: str, leaves: frozenset[str], serial_number: str | None) -> bytes:
    """The discovery message of a meter that has the values `leaves`."""
    device_id = topics.device_id(meter)
    device: dict[str, Any] = {"identifiers": [device_id], "name": meter}
    if serial_number is not None:
        device["serial_number"] = serial_number
    components = {
        leaf: {
            "platform": "sensor",
            "unique_id": f"{device_id}-{leaf}",
            "state_topic": topics.meter(meter, leaf),
            **sensor,
        }
        for leaf, sensor in _SENSORS.items()
        if leaf in leaves
    }
    message = {
        "device": device,
        "origin": {"name": "dengen meter-agent"},
        "components": components,
        "availability": [{"topic": topics.agent_availability}, {"topic": topics.meter(meter, "availability")}],
        "availability_mode": "all",
        "qos": 1,
    }
    return json.dumps(message, separators=(",", ":")).encode()
