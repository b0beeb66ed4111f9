"""The file that describes a street of wire-level meters. Pure but for `load_street_config`.

JSON, because programs write it (the demo, tests) and it carries long lists of Wh:

    {"participant": "street", "interval_s": 1800, "origin_s": 1309442400, "folder": "wire",
     "conductor": {"ledger": "demo", "name": "conductor", "key": "a301…"},
     "mqtt": {"host": "127.0.0.1", "port": 1883, "root": "dengen/v1"},
     "meters": [{"name": "house", "wire": "modbus_tcp", "kind": "iem3000", "device_id": 1, "serial": 1001,
                 "start_import_wh": 5000000, "start_export_wh": 0, "import_wh": [196, 289], "export_wh": []}]}

`conductor` and `mqtt` are left out together by a street whose time is moved by hand. `folder` is relative to the file.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

from broker.protocol.codec import is_name
from broker.protocol.errors import MalformedMessage
from broker.protocol.keys import PublicKey, public_key_from_cose
from broker.protocol.mqtt_link import MqttConfig
from broker.protocol.topics import DEFAULT_ROOT
from dengen_testing.wire.curve import EnergyCurve
from dengen_testing.wire.registers import REGISTER_IMAGES, MeterState

Wire: TypeAlias = Literal["modbus_tcp", "modbus_rtu", "p1"]

MAX_METERS: Final = 256
"""Each meter holds up to ten file descriptors, and 1024 is the usual limit of a process."""


class StreetConfigError(Exception):
    """A street file that cannot be used. `where` names the key."""

    def __init__(self, where: str, expected: str) -> None:
        super().__init__(f"{where}: expected {expected}")
        self.where = where


@dataclass(frozen=True, slots=True)
class WireMeter:
    """One meter: the wire it is on, what it is, and what its registers count over time.

    `kind` is a name of `registers.REGISTER_IMAGES`, or "dsmr" on a P1 wire.
    """

    name: str
    wire: Wire
    kind: str
    imported: EnergyCurve
    exported: EnergyCurve
    device_id: int = 1
    serial: int = 1

    def state(self, time_s: int) -> MeterState:
        """What it shows at that time."""
        return MeterState(
            time_s=time_s,
            import_wh=self.imported.total_wh(time_s),
            export_wh=self.exported.total_wh(time_s),
            power_w=self.imported.power_w(time_s) - self.exported.power_w(time_s),
            serial=self.serial,
        )

    def next_change_s(self, time_s: int) -> int | None:
        """When one of its registers reaches the next interval boundary, None if none counts any more."""
        changes = (self.imported.next_change_s(time_s), self.exported.next_change_s(time_s))
        return min((change_s for change_s in changes if change_s is not None), default=None)


@dataclass(frozen=True, slots=True)
class ConductorConfig:
    """Whose ticks the street follows."""

    ledger: str
    name: str
    key: PublicKey
    mqtt: MqttConfig


@dataclass(frozen=True, slots=True)
class StreetConfig:
    """A street of meters, and the conductor that moves them (None: moved by hand)."""

    participant: str
    origin_s: int
    folder: Path
    meters: tuple[WireMeter, ...]
    conductor: ConductorConfig | None = None


def load_street_config(path: Path) -> StreetConfig:
    """Read a street file. Raises StreetConfigError, and OSError for a file that cannot be read."""
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise StreetConfigError(str(path), f"JSON ({error})") from error
    return street_config(data, path.parent)


def street_config(data: Any, base: Path) -> StreetConfig:
    """Check a street description, with `folder` relative to `base`. Raises StreetConfigError."""
    top = _Table(data, "street")
    interval_s = top.integer("interval_s", 1)
    origin_s = top.integer("origin_s", 0)
    meters = tuple(
        _meter(_Table(item, f"meters[{index}]"), origin_s, interval_s)
        for index, item in enumerate(top.array("meters", MAX_METERS))
    )
    if not meters or len({meter.name for meter in meters}) != len(meters):
        raise StreetConfigError("meters", "at least one meter, each with a name of its own")
    conductor = _conductor(top) if "conductor" in top.left else None
    config = StreetConfig(top.name("participant"), origin_s, base / top.text("folder"), meters, conductor)
    top.finish()
    return config


class _Table:
    """A JSON object whose keys are taken out one by one, so that what is left over is a mistake."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise StreetConfigError(where, "a JSON object")
        self.where = where
        self.left = dict(data)

    def take(self, key: str) -> Any:
        if key not in self.left:
            raise StreetConfigError(f"{self.where}.{key}", "to be present")
        return self.left.pop(key)

    def integer(self, key: str, minimum: int, maximum: int = 2**53 - 1, default: int | None = None) -> int:
        value = self.left.pop(key, default) if default is not None else self.take(key)
        if type(value) is not int or not minimum <= value <= maximum:
            raise StreetConfigError(f"{self.where}.{key}", f"an integer from {minimum} to {maximum}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.left.pop(key, default) if default is not None else self.take(key)
        if not isinstance(value, str):
            raise StreetConfigError(f"{self.where}.{key}", "text")
        return value

    def name(self, key: str) -> str:
        value = self.text(key)
        if not is_name(value):
            raise StreetConfigError(f"{self.where}.{key}", "a name of characters a-z, 0-9 and -")
        return value

    def choice(self, key: str, choices: Sequence[str]) -> str:
        value = self.text(key)
        if value not in choices:
            raise StreetConfigError(f"{self.where}.{key}", f"one of {', '.join(choices)}")
        return value

    def array(self, key: str, maximum: int) -> list[Any]:
        value = self.take(key)
        if not isinstance(value, list) or len(value) > maximum:
            raise StreetConfigError(f"{self.where}.{key}", f"an array of at most {maximum} items")
        return value

    def curve(self, direction: str, origin_s: int, interval_s: int) -> EnergyCurve:
        start_wh = self.integer(f"start_{direction}_wh", 0, default=0)
        energies = self.left.pop(f"{direction}_wh", [])
        if not isinstance(energies, list) or not all(type(wh) is int and wh >= 0 for wh in energies):
            raise StreetConfigError(f"{self.where}.{direction}_wh", "an array of whole Wh, 0 or more")
        return EnergyCurve(origin_s, interval_s, tuple(energies), start_wh)

    def finish(self) -> None:
        if self.left:
            raise StreetConfigError(f"{self.where}.{next(iter(self.left))}", "no such key; wire/config.py shows all")


def _meter(table: _Table, origin_s: int, interval_s: int) -> WireMeter:
    wire = table.choice("wire", get_args(Wire))
    kinds = ("dsmr",) if wire == "p1" else tuple(REGISTER_IMAGES)
    meter = WireMeter(
        name=table.name("name"),
        wire=wire,  # type: ignore[arg-type]  # `choice` gives one of the Literal's own values
        kind=table.choice("kind", kinds),
        imported=table.curve("import", origin_s, interval_s),
        exported=table.curve("export", origin_s, interval_s),
        device_id=table.integer("device_id", 1, 247, default=1),
        serial=table.integer("serial", 0, 2**32 - 1, default=1),
    )
    table.finish()
    return meter


def _conductor(top: _Table) -> ConductorConfig:
    table, mqtt = _Table(top.take("conductor"), "conductor"), _Table(top.take("mqtt"), "mqtt")
    try:
        key = public_key_from_cose(bytes.fromhex(table.text("key")))
    except (ValueError, MalformedMessage) as error:
        raise StreetConfigError("conductor.key", f"the hex digits of a COSE_Key ({error})") from error
    config = ConductorConfig(
        ledger=table.name("ledger"),
        name=table.name("name"),
        key=key,
        mqtt=MqttConfig(
            host=mqtt.text("host", "127.0.0.1"),
            port=mqtt.integer("port", 1, 65_535),
            root=mqtt.text("root", DEFAULT_ROOT),
        ),
    )
    table.finish()
    mqtt.finish()
    return config
