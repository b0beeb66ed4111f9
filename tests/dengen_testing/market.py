"""A whole market on one machine: from a plan to keys, statements and configs, and to running processes.

`MarketPlan` says who takes part. `build_market` makes everything that a person would make, with the same commands
(`energy-broker key new`, `ledger genesis`, `registrar admit`, `consumer add`, …). `Market` runs it: a street of
wire-level meters, an agent process for each meter, a process for each broker, simulated time by the conductor.
"""

import contextlib
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from broker.cli import main as energy_broker_main
from broker.ledger.cometbft.home import LEDGER_FOLDER
from broker.ledger.cometbft.testnet import load_testnet
from broker.protocol.keys import load_private_key
from broker.protocol.messages import Tick
from broker.protocol.mqtt_link import MqttConfig
from dengen_testing.cometbft import Network
from dengen_testing.conductor import DEFAULT_STALL_LIMIT_S, Conductor
from dengen_testing.processes import ManagedProcess, ProcessGroup, agent_process, broker_process, street_process
from dengen_testing.waiting import wait_until
from dengen_testing.wire.config import Wire
from dengen_testing.wire.street import read_ready_file

REGISTRAR: Final = "registrar"
CONDUCTOR: Final = "conductor"
STREET: Final = "street"
LOOK_AFTER_PROCESSES_EVERY_S: Final = 0.5

_PROFILES: Final = {
    "iem3000": "schneider-iem3000",
    "sdm630": "eastron-sdm630",
    "sdm120": "eastron-sdm120",
    "abb_b23": "abb-b23",
    "sunspec_inverter": "sunspec-inverter",
}
"""Which of the agent's profiles reads which kind of wire-level meter."""


class CommandFailed(Exception):
    """A command of the set-up failed. The text has the command, its exit code and what it said."""

    def __init__(self, arguments: Sequence[str], code: int, said: str) -> None:
        super().__init__(f"energy-broker {' '.join(arguments)}: exit code {code}\n{said}")
        self.code = code


@dataclass(frozen=True, slots=True)
class MeterPlan:
    """How a meter looks at its wire, and what it counts in each interval. `kind` as in `wire/config.py`."""

    name: str
    wire: Wire
    kind: str
    energies_wh: tuple[int, ...]
    start_wh: int


@dataclass(frozen=True, slots=True)
class ConsumerPlan:
    """A consumer: its meter, its broker, its contract as (source or group, percent), and what to do when short."""

    meter: MeterPlan
    broker: str
    lines: tuple[tuple[str, int], ...]
    shortage: str


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """A generating device of a provider, under mandate to a broker. `price` is in µ-currency per kWh."""

    meter: MeterPlan
    owner: str
    broker: str
    source: str
    capacity_w: int
    price: int
    place: str


@dataclass(frozen=True, slots=True)
class MarketPlan:
    """Everybody who takes part, and when. `host` hosts the ledger, unless `validators` (a number of nodes) keep it.

    Brokers that have meters are each other's neighbours; one that has none is there for the ledger only.
    """

    ledger: str
    brokers: tuple[str, ...]
    host: str
    consumers: tuple[ConsumerPlan, ...]
    devices: tuple[DevicePlan, ...]
    origin_s: int
    intervals: int
    interval_s: int = 1_800
    gate_1_s: int = 600
    gate_2_s: int = 1_200
    area: str = "home"
    validators: int = 0

    @property
    def end_s(self) -> int:
        """Gate 2 of the last interval: everything is cleared and closed then."""
        return self.origin_s + self.intervals * self.interval_s + self.gate_2_s

    @property
    def meters(self) -> tuple[MeterPlan, ...]:
        return tuple(member.meter for member in self.members)

    @property
    def members(self) -> tuple[ConsumerPlan | DevicePlan, ...]:
        """Everybody with a meter: consumers first, then devices."""
        return self.consumers + self.devices

    @property
    def trading_brokers(self) -> tuple[str, ...]:
        """The brokers that have meters."""
        trading = {member.broker for member in self.members}
        return tuple(broker for broker in self.brokers if broker in trading)

    @property
    def validator_names(self) -> tuple[str, ...]:
        """Who signs the ledger's blocks."""
        if not self.validators:
            return (f"{self.host}-ledger",)
        return tuple(f"validator-{number + 1}" for number in range(self.validators))

    @property
    def readers(self) -> tuple[str, ...]:
        """The protocols by which meters are read, sorted."""
        return tuple(sorted({meter.wire for meter in self.meters}))


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where everything of one market lies: keys, statements, configs, databases and logs in `folder`.

    `ledger` is the directory that `ledger verify` takes: the hosting broker's, or the first node's of a network.
    """

    folder: Path
    ledger: Path
    genesis: Path
    plan: MarketPlan

    def config(self, name: str) -> Path:
        """The config file of a broker, agent or (JSON) the street."""
        return self.folder / (f"{name}.json" if name == STREET else f"{name}.toml")

    def key(self, name: str) -> Path:
        return self.folder / f"{name}.pem"

    @property
    def network(self) -> Path:
        """Where the nodes of a ledger network have their homes."""
        return self.folder / "network"


def energy_broker(*arguments: str | Path) -> str:
    """Run one `energy-broker` command and return what it printed. Raises CommandFailed.

    It runs in this process, because starting Python anew for each of some fifty commands would take longer than the
    demo; arguments, exit code and output are those of the command line.
    """
    texts = [str(argument) for argument in arguments]
    printed, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complained):
        code = energy_broker_main(texts)
    if code != 0:
        raise CommandFailed(texts, code, complained.getvalue())
    return printed.getvalue()


def table(config: Path, name: str) -> Iterator[dict[str, Any]]:
    """The rows of `energy-broker list NAME --json` of the broker with that config."""
    for line in energy_broker("list", name, "--config", config, "--json").splitlines():
        yield json.loads(line)


def build_market(plan: MarketPlan, folder: Path, ledger: Path, mqtt: MqttConfig) -> Workspace:
    """Make keys, genesis, statements, contracts and configs in `folder`. Raises CommandFailed.

    `ledger` is where the hosting broker will keep the ledger, if no network does; `mqtt` is the server for all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    workspace = Workspace(folder, ledger, folder / "genesis.cbor", plan)
    keys = _make_keys(workspace)
    _make_genesis(workspace, keys)
    if plan.validators:
        workspace = replace(workspace, ledger=_make_network(workspace))
    for broker in plan.brokers:
        workspace.config(broker).write_text(_broker_config(workspace, keys, broker, mqtt))
        # A broker has one registration of its own; those of its providers come with the mandates.
        energy_broker("submit", "--config", workspace.config(broker), _register(workspace, keys, broker, "broker"))
    for device in plan.devices:
        _take_on(workspace, keys, device)
    for consumer in plan.consumers:
        _add_consumer(workspace, keys, consumer)
    for member in plan.members:
        workspace.config(member.meter.name).write_text(_agent_config(workspace, keys, member, mqtt))
    workspace.config(STREET).write_text(json.dumps(_street(workspace, keys, mqtt)))
    return workspace


class Market:
    """A built market, running. Use it in a `with`: leaving it stops every process that it started."""

    def __init__(self, workspace: Workspace, mqtt: MqttConfig, *, stall_limit_s: float = DEFAULT_STALL_LIMIT_S) -> None:
        plan = workspace.plan
        self.workspace = workspace
        self.street = street_process(workspace.config(STREET))
        self.brokers = {name: broker_process(workspace.config(name)) for name in plan.brokers}
        self.agents = {meter.name: agent_process(workspace.config(meter.name)) for meter in plan.meters}
        self.network = Network(workspace.network) if plan.validators else None
        self._processes = ProcessGroup()
        self._looked_after_s = 0.0
        self._conductor = Conductor(
            mqtt, plan.ledger, load_private_key(workspace.key(CONDUCTOR)), name=CONDUCTOR, stall_limit_s=stall_limit_s
        )

    @property
    def processes(self) -> dict[str, ManagedProcess]:
        """All processes by participant name."""
        return {STREET: self.street, **self.brokers, **self.agents}

    def start(self) -> Self:
        """Start the ledger's network, if there is one, and the street, and when they answer, everybody else."""
        if self.network is not None:
            self.network.start()
        self._processes.add(self.street).start()
        wait_until(self._street_is_ready, "the street's meters", detail=self.street.log_tail)
        for meter in self.workspace.plan.meters:
            _complete_agent_config(self.workspace, meter)
        for process in (*self.brokers.values(), *self.agents.values()):
            self._processes.add(process).start()
        return self

    def run(
        self, on_progress: Callable[[Tick], None] | None = None, while_waiting: Callable[[], None] | None = None
    ) -> int:
        """Let simulated time run from the plan's origin to its end. Returns the number of ticks.

        Unless `while_waiting` looks after the processes, one that ends raises ProcessEnded.
        """
        return self._conductor.run(
            self.workspace.plan.origin_s,
            self.workspace.plan.end_s,
            world=[STREET],
            market=[*self.brokers, *self.agents],
            on_progress=on_progress,
            while_waiting=while_waiting or self._look_after_processes,
        )

    def stop(self) -> None:
        """Stop everything; brokers and ledger are then at rest on disk."""
        self._processes.stop()
        if self.network is not None:
            self.network.stop()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._conductor.close()

    def _look_after_processes(self) -> None:
        now_s = time.monotonic()
        if now_s - self._looked_after_s >= LOOK_AFTER_PROCESSES_EVERY_S:
            self._looked_after_s = now_s
            self._processes.check_running()

    def _street_is_ready(self) -> bool:
        self.street.check_running()
        return read_ready_file(self.workspace.folder / "wire") is not None


# Set-up, each step with the command that a person would use


def _make_keys(workspace: Workspace) -> dict[str, str]:
    """A private key for each party, meter and role; returns the public ones in hex."""
    plan = workspace.plan
    names = [REGISTRAR, CONDUCTOR, *plan.validator_names, *plan.brokers]
    names += sorted({device.owner for device in plan.devices})
    names += [meter.name for meter in plan.meters]
    return {name: energy_broker("key", "new", workspace.key(name)).strip() for name in names}


def _make_genesis(workspace: Workspace, keys: dict[str, str]) -> None:
    plan = workspace.plan
    energy_broker(
        *("ledger", "genesis", "--out", workspace.genesis, "--ledger", plan.ledger),
        *("--interval-s", str(plan.interval_s), "--gate-1-s", str(plan.gate_1_s), "--gate-2-s", str(plan.gate_2_s)),
        *("--area", plan.area, "--registrar", f"{REGISTRAR}={keys[REGISTRAR]}"),
        *(argument for name in plan.validator_names for argument in ("--validator", f"{name}={keys[name]}")),
        *("--conductor", f"{CONDUCTOR}={keys[CONDUCTOR]}"),
    )


def _make_network(workspace: Workspace) -> Path:
    """Homes for the nodes of a ledger network; returns the directory of the first one's ledger."""
    folder = workspace.network
    energy_broker(
        *("ledger", "testnet", "--path", folder, "--genesis", workspace.genesis),
        *("--keys", workspace.folder, "--set-up-only"),
    )
    return load_testnet(folder)[0].home / LEDGER_FOLDER


def _register(workspace: Workspace, keys: dict[str, str], party: str, role: str) -> Path:
    out = workspace.folder / f"{party}.registration"
    energy_broker(
        *("registrar", "register", "--genesis", workspace.genesis, "--name", REGISTRAR),
        *("--key", workspace.key(REGISTRAR), "--party", party, "--role", role, "--party-key", keys[party]),
        *("--out", out),
    )
    return out


def _take_on(workspace: Workspace, keys: dict[str, str], device: DevicePlan) -> None:
    name, genesis = device.meter.name, workspace.genesis
    admission, mandate = workspace.folder / f"{name}.admission", workspace.folder / f"{name}.mandate"
    energy_broker(
        *("registrar", "admit", "--genesis", genesis, "--name", REGISTRAR, "--key", workspace.key(REGISTRAR)),
        *("--device", name, "--owner", device.owner, "--meter-key", keys[name], "--source", device.source),
        *("--capacity-w", str(device.capacity_w), "--area", workspace.plan.area, "--place", device.place),
        *("--commissioned", "2010-01-01T00:00:00Z", "--out", admission),
    )
    energy_broker(
        *("provider", "mandate", "--genesis", genesis, "--name", device.owner, "--key", workspace.key(device.owner)),
        *("--device", name, "--broker", device.broker, "--from", "2011-01-01T00:00:00Z", "--out", mandate),
    )
    registration = _register(workspace, keys, device.owner, "provider")
    energy_broker(
        *("provider", "add", "--config", workspace.config(device.broker), "--price", str(device.price)),
        *(registration, admission, mandate),
    )


def _add_consumer(workspace: Workspace, keys: dict[str, str], consumer: ConsumerPlan) -> None:
    lines = [argument for target, percent in consumer.lines for argument in ("--line", f"{target}={percent}")]
    energy_broker(
        *("consumer", "add", "--config", workspace.config(consumer.broker), "--meter", consumer.meter.name),
        *("--key", keys[consumer.meter.name], *lines, "--shortage", consumer.shortage),
    )


def _broker_config(workspace: Workspace, keys: dict[str, str], broker: str, mqtt: MqttConfig) -> str:
    plan = workspace.plan
    text = f"""[broker]
name = "{broker}"
key_file = "{workspace.key(broker).name}"
data_dir = "{broker}-data"
clock = "conductor"

[mqtt]
host = "{mqtt.host}"
port = {mqtt.port}

[ledger]
genesis_file = "{workspace.genesis.name}"
"""
    if plan.validators:
        # Each broker has a node of its own first, and the others to turn to.
        first = plan.brokers.index(broker)
        urls = [node.rpc for node in load_testnet(workspace.network)]
        text += f"""
[ledger.cometbft]
nodes = {json.dumps(urls[first:] + urls[:first])}
"""
    elif broker == plan.host:
        (validator,) = plan.validator_names
        text += f"""
[ledger.host]
path = {json.dumps(str(workspace.ledger))}
validator = "{validator}"
key_file = "{workspace.key(validator).name}"
"""
    for neighbour in plan.trading_brokers:
        if broker in plan.trading_brokers and neighbour != broker:
            text += f'\n[[neighbours]]\nname = "{neighbour}"\nkey = "{keys[neighbour]}"\n'
    return text


def _agent_config(
    workspace: Workspace, keys: dict[str, str], member: ConsumerPlan | DevicePlan, mqtt: MqttConfig
) -> str:
    """All but the reader's address, which is known when the street runs."""
    meter, broker = member.meter, member.broker
    direction = "consumption" if isinstance(member, ConsumerPlan) else "generation"
    largest_wh = max(meter.energies_wh, default=0)
    return f"""[agent]
data_dir = "{meter.name}-data"
ledger = "{workspace.plan.ledger}"
interval_s = {workspace.plan.interval_s}
clock = "conductor"
require_synchronised_clock = false

[agent.broker]
name = "{broker}"
key = "{keys[broker]}"

[agent.conductor]
name = "{CONDUCTOR}"
key = "{keys[CONDUCTOR]}"

[mqtt]
host = "{mqtt.host}"
port = {mqtt.port}

[meters.{meter.name}]
direction = "{direction}"
key_file = "{workspace.key(meter.name).name}"
capacity_w = {max(1_000, 2 * largest_wh * 3_600 // workspace.plan.interval_s)}
"""


def _complete_agent_config(workspace: Workspace, meter: MeterPlan) -> None:
    """Add where the meter is found; ports come from the system when the street starts."""
    addresses = read_ready_file(workspace.folder / "wire")
    assert addresses is not None
    address = addresses[meter.name]
    lines = ["", f"[meters.{meter.name}.reader]", f'protocol = "{meter.wire}"']
    if meter.wire != "p1":
        lines += [f'profile = "{_PROFILES[meter.kind]}"', f"device_id = {address['device_id']}"]
    if meter.wire == "modbus_tcp":
        lines += [f'host = "{address["host"]}"', f"port = {address['port']}"]
    else:
        lines += [f"port = {json.dumps(address['path'])}"]
    if meter.wire == "modbus_rtu":
        # A pseudo-terminal has no parity; Linux refuses to set one.
        lines += ['parity = "N"']
    with workspace.config(meter.name).open("a") as file:
        file.write("\n".join([*lines, ""]))


def _street(workspace: Workspace, keys: dict[str, str], mqtt: MqttConfig) -> dict[str, Any]:
    plan = workspace.plan
    consumers = {consumer.meter.name for consumer in plan.consumers}
    meters = []
    for number, meter in enumerate(plan.meters):
        direction = "import" if meter.name in consumers else "export"
        meters.append(
            {
                "name": meter.name,
                "wire": meter.wire,
                "kind": meter.kind,
                "device_id": number + 1,
                "serial": 1_001 + number,
                f"start_{direction}_wh": meter.start_wh,
                f"{direction}_wh": list(meter.energies_wh),
            }
        )
    return {
        "participant": STREET,
        "interval_s": plan.interval_s,
        "origin_s": plan.origin_s,
        "folder": "wire",
        "conductor": {"ledger": plan.ledger, "name": CONDUCTOR, "key": keys[CONDUCTOR]},
        "mqtt": {"host": mqtt.host, "port": mqtt.port, "root": mqtt.root},
        "meters": meters,
    }
