"""The agent's config file as frozen dataclasses; `firmware_config/examples/agent.toml` shows every key.

Only values are checked here. Whether files exist, keys load and profiles are known is checked where they are used, and
by `meter-agent check-config`.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias

from broker.protocol.addresses import Host, Port, Topic
from broker.protocol.errors import MalformedMessage
from broker.protocol.keys import PublicKey, public_key_from_cose
from broker.protocol.mqtt_link import MqttConfig
from firmware_config.loader import Between, OneName, WrongValue, load_config
from meter_agent.framing.telegram import AS_SENT, ObisChoice

MAX_METERS: Final = 64
"""Meters of one agent: two full RS-485 segments. Each has its own journal rows and status message."""


@dataclass(frozen=True, slots=True)
class ModbusTcpConfig:
    """A meter behind Modbus TCP. `profile` names a file in `firmware_config/meters/`."""

    protocol: Literal["modbus_tcp"]
    profile: str
    host: Annotated[str, Host()]
    port: Annotated[int, Port()] = 502
    device_id: Annotated[int, Between(0, 255)] = 1
    timeout_s: Annotated[float, Between(0.05, 60)] = 2.0


@dataclass(frozen=True, slots=True)
class ModbusRtuConfig:
    """A meter on a serial line that speaks Modbus RTU. What is left out is taken from the profile."""

    protocol: Literal["modbus_rtu"]
    profile: str
    port: Path
    device_id: Annotated[int, Between(1, 247)] = 1
    baud: Annotated[int, Between(300, 921_600)] | None = None
    parity: Literal["N", "E", "O"] | None = None
    stop_bits: Literal[1, 2] | None = None
    timeout_s: Annotated[float, Between(0.05, 60)] = 1.0


@dataclass(frozen=True, slots=True)
class P1Config:
    """A DSMR P1 port. The meter pushes a telegram every 1 or 10 s, hence the long time limit.

    The key files are for a port that is encrypted (Luxembourg, parts of Austria): 32 hex digits from the grid operator.
    """

    protocol: Literal["p1"]
    port: Path
    baud: Annotated[int, Between(300, 921_600)] = 115_200
    encryption_key_file: Path | None = None
    authentication_key_file: Path | None = None
    timeout_s: Annotated[float, Between(0.05, 60)] = 15.0


@dataclass(frozen=True, slots=True)
class DlmsConfig:
    """A HAN port into which Aidon, Kaifa and Kamstrup meters push DLMS lists over HDLC.

    Some send their counters once an hour only, which `timeout_s` allows for; a list of any kind must come every
    `silence_s`. `energy_step_wh` is for meters that send no unit (Kamstrup). The key files hold 32 hex digits, as the
    utility gives them out for a port that is encrypted.
    """

    protocol: Literal["dlms"]
    port: Path
    baud: Annotated[int, Between(300, 921_600)] = 2_400
    parity: Literal["N", "E", "O"] = "E"
    energy_step_wh: Literal[1, 10] | None = None
    encryption_key_file: Path | None = None
    authentication_key_file: Path | None = None
    timeout_s: Annotated[float, Between(0.05, 86_400)] = 3_720.0
    silence_s: Annotated[float, Between(0.05, 3_600)] = 60.0


@dataclass(frozen=True, slots=True)
class BRouteConfig:
    """A Japanese smart meter over Wi-SUN route B, by an adapter on a serial port.

    Id and password come from the grid operator. `values`: what the meter noted at the last half hour, with its time, or
    the counters of the moment.
    """

    protocol: Literal["broute"]
    port: Path
    route_b_id: str
    password_file: Path
    baud: Annotated[int, Between(300, 921_600)] = 115_200
    values: Literal["half_hour", "present"] = "half_hour"


@dataclass(frozen=True, slots=True)
class MBusConfig:
    """A meter on a wired M-Bus, behind a level converter on a serial port; `address` is its primary address.

    `export_subunit` is for meters that count what is delivered in a subunit of their own instead of marking it.
    """

    protocol: Literal["mbus"]
    port: Path
    address: Annotated[int, Between(0, 250)] = 1
    baud: Annotated[int, Between(300, 38_400)] = 2_400
    parity: Literal["N", "E", "O"] = "E"
    export_subunit: Annotated[int, Between(1, 15)] | None = None
    timeout_s: Annotated[float, Between(0.05, 60)] = 1.0


@dataclass(frozen=True, slots=True)
class S0Config:
    """A pulse output (S0) on a GPIO line, counted by edge events.

    `pulses_per_kwh` stands on the meter. `state_file` keeps the count over a restart of the agent, and only over that.
    A contact to ground (the usual S0 wiring) pulls the line low: `active_low` with the internal pull-up.
    """

    protocol: Literal["s0"]
    pulses_per_kwh: Annotated[int, Between(1, 10_000_000)]
    state_file: Path
    line: Annotated[int, Between(0, 1_023)]
    chip: Path = Path("/dev/gpiochip0")
    active_low: bool = True
    bias: Literal["pull_up", "pull_down", "disabled"] = "pull_up"
    debounce_ms: Annotated[int, Between(0, 1_000)] = 10


@dataclass(frozen=True, slots=True)
class SmlConfig:
    """A German meter that pushes SML. OBIS codes are found in what it sends unless they are named.

    Several codes of a counter (`obis = { imports = ["1.8.1", "1.8.2"] }`) are added up.
    """

    protocol: Literal["sml"]
    port: Path
    baud: Annotated[int, Between(300, 921_600)] = 9_600
    timeout_s: Annotated[float, Between(0.05, 60)] = 15.0
    obis: ObisChoice = AS_SENT

    def __post_init__(self) -> None:
        _check_obis(self.obis)


@dataclass(frozen=True, slots=True)
class Iec62056Config:
    """A meter that speaks IEC 62056-21: mode D pushes, mode C is asked. OBIS codes as in `SmlConfig`.

    `baud` is the rate of mode D, or the one at which mode C starts; left out, it is 9600 or 300. `max_baud` is the most
    that the optical head can do in mode C. `unit` is that of counters which the meter sends without one.
    """

    protocol: Literal["iec62056_21"]
    port: Path
    mode: Literal["C", "D"]
    baud: Annotated[int, Between(300, 921_600)] | None = None
    parity: Literal["N", "E", "O"] = "E"
    max_baud: Annotated[int, Between(300, 19_200)] = 9_600
    device_address: str = ""
    unit: Literal["Wh", "kWh"] | None = None
    timeout_s: Annotated[float, Between(0.05, 180)] = 30.0
    obis: ObisChoice = AS_SENT

    def __post_init__(self) -> None:
        _check_obis(self.obis)
        if re.fullmatch(r"[0-9A-Za-z ]{0,32}", self.device_address) is None:
            raise WrongValue("device_address", f"at most 32 letters, digits and blanks, got {self.device_address!r}")

    @property
    def start_baud(self) -> int:
        """The rate at which the port is opened."""
        return self.baud or (300 if self.mode == "C" else 9_600)


def _check_obis(obis: ObisChoice) -> None:
    for key, codes in (("imports", obis.imports), ("exports", obis.exports), ("power", (obis.power or "1.7.0",))):
        for code in codes:
            if re.fullmatch(r"\d{1,3}\.\d{1,3}\.\d{1,3}", code) is None:
                raise WrongValue(f"obis.{key}", f"OBIS codes such as 1.8.0, got {code!r}")


ReaderConfig: TypeAlias = (
    ModbusTcpConfig
    | ModbusRtuConfig
    | P1Config
    | DlmsConfig
    | BRouteConfig
    | MBusConfig
    | S0Config
    | SmlConfig
    | Iec62056Config
)


@dataclass(frozen=True, slots=True)
class MeterConfig:
    """One meter: what it counts, how it is read, and the key that it signs with.

    `capacity_w` is the most that its line can carry or its generator make; a change of the register beyond 110 % of it
    is no reading. `resolution_wh` is the largest step in which the register counts. `stuck_after_wh`: a register that
    stands still while the meter's own power adds up to this much is stuck.
    """

    direction: Literal["consumption", "generation"]
    key_file: Path
    capacity_w: Annotated[int, Between(1, 10_000_000_000)]
    reader: ReaderConfig
    register: Literal["import", "export"] | None = None
    sample_period_s: Annotated[float, Between(0.1, 900)] = 10.0
    resolution_wh: Annotated[int, Between(1, 1_000_000)] = 100
    stuck_after_wh: Annotated[int, Between(1, 1_000_000_000)] = 1_000

    @property
    def register_name(self) -> Literal["import", "export"]:
        """The register that is billed: as configured, or import for consumption and export for generation."""
        if self.register is not None:
            return self.register
        return "import" if self.direction == "consumption" else "export"


@dataclass(frozen=True, slots=True)
class NamedMeter:
    """A meter with the name that it has in topics and messages: what a reader is made from."""

    name: str
    config: MeterConfig


@dataclass(frozen=True, slots=True)
class PartyKey:
    """A party of the protocol and its public key, a COSE_Key in hex digits as it stands in `trust.json`."""

    name: Annotated[str, OneName()]
    key: str

    def __post_init__(self) -> None:
        try:
            self.public_key()
        except (ValueError, MalformedMessage) as error:
            raise WrongValue("key", "the broker's public key in hex, as `energy-broker key show` prints it") from error

    def public_key(self) -> PublicKey:
        """The key itself."""
        return public_key_from_cose(bytes.fromhex(self.key))


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """The agent itself: where it keeps its journal, whom it reports to, where it takes time from.

    `name` is how it takes part in simulated time and what its MQTT client id is made of; the first meter's name unless
    given. With `require_synchronised_clock` no interval is sealed before the operating system says that its clock is
    synchronised. Acknowledged intervals are kept for `keep_days`. `hints`: listen for what the broker says of the next
    day to consumers' meters.
    """

    data_dir: Path
    broker: PartyKey
    ledger: Annotated[str, OneName()]
    name: Annotated[str, OneName()] | None = None
    interval_s: Literal[900, 1800, 3600] = 1800
    clock: Literal["system", "conductor"] = "system"
    conductor: PartyKey | None = None
    require_synchronised_clock: bool = True
    keep_days: Annotated[int, Between(1, 3_660)] = 92
    hints: bool = False

    def __post_init__(self) -> None:
        if self.clock == "conductor" and self.conductor is None:
            raise WrongValue("conductor", 'a table with name and key, because clock = "conductor"')
        if self.clock == "system" and self.conductor is not None:
            raise WrongValue("conductor", 'no table, because clock = "system"')


@dataclass(frozen=True, slots=True)
class HomeAssistantConfig:
    """The home's own MQTT server: plain retained values below `topic`, and Home Assistant's discovery messages.

    Values go out when they change, at most every `period_s`. Without a table `mqtt` it is the broker's server.
    """

    topic: Annotated[str, Topic()] = "dengen/home"
    discovery: bool = True
    discovery_prefix: Annotated[str, Topic()] = "homeassistant"
    period_s: Annotated[float, Between(0.1, 3_600)] = 10.0
    mqtt: MqttConfig | None = None


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """The whole file."""

    agent: AgentSettings
    meters: dict[Annotated[str, OneName()], MeterConfig]
    mqtt: MqttConfig = field(default_factory=MqttConfig)
    home_assistant: HomeAssistantConfig | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.meters) <= MAX_METERS:
            raise WrongValue("meters", f"1 to {MAX_METERS} tables [meters.NAME], got {len(self.meters)}")

    @property
    def name(self) -> str:
        """The agent's name."""
        return self.agent.name or next(iter(self.meters))

    @property
    def named_meters(self) -> tuple[NamedMeter, ...]:
        """All meters in the order of the file."""
        return tuple(NamedMeter(name, config) for name, config in self.meters.items())


def load_agent_config(path: Path) -> AgentConfig:
    """Read an agent's config file. Raises ConfigError."""
    return load_config(path, AgentConfig)
