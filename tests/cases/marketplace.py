"""A market of real processes, in the words of the field: brokers, consumers, devices, half hours, gates.

What a person or an operator would do is done with the commands that they would use. What a meter says is signed with
its key and sent over MQTT until there is a receipt. Time is said by a conductor, which waits until all brokers have
committed everything that the moment asked for.
"""

import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self

from dengen_testing.cometbft import Network
from dengen_testing.conductor import Conductor
from dengen_testing.listener import Listener
from dengen_testing.market import energy_broker, table
from dengen_testing.mosquitto import Mosquitto
from dengen_testing.processes import ManagedProcess, ProcessGroup, broker_process
from dengen_testing.waiting import WaitedTooLong, wait_until

from broker.ledger.cometbft.home import LEDGER_FOLDER
from broker.ledger.cometbft.testnet import load_testnet
from broker.ledger.operations import Deliver, Transfer, decode_operation
from broker.protocol.envelope import Signer, open_envelope, parse, seal
from broker.protocol.keys import PublicKey, load_private_key
from broker.protocol.messages import (
    MESSAGE_CLASSES,
    Carrier,
    Delivery,
    Demand,
    Message,
    Quality,
    Reading,
    Receipt,
    ReceiptStatus,
    Stage,
    Tick,
)
from broker.protocol.mqtt_link import Incoming
from broker.protocol.topics import Topics
from cases.line import Line

LEDGER: Final = "island"
AREA: Final = "home"
HALF_HOUR_S: Final = 1_800
GATE_1_S: Final = 600
GATE_2_S: Final = 1_200
FIRST_S: Final = 1_769_904_000
"""2026-02-01T00:00:00Z, when the market opens."""

HARBOUR: Final = "harbour"
"""The broker that serves the ledger over MQTT: hosted by itself, or as the gateway of a network. It trades nothing."""

VALIDATORS: Final = 4
SEND_AGAIN_S: Final = 0.25
SENDS: Final = 80


@dataclass
class Meter:
    """A consumer's meter or a generating device, under the broker that it is registered with."""

    name: str
    broker: "Broker"
    kind: type[Demand] | type[Reading]

    def reports(self, energy_wh: int, **changes: Any) -> Receipt:
        """Send what was counted in the last half hour, until there is a receipt, which must accept it."""
        receipt = self.answer_to(self.signed(energy_wh, **changes))
        assert receipt.status is ReceiptStatus.ACCEPTED, receipt
        return receipt

    def signed(self, energy_wh: int, **changes: Any) -> bytes:
        """The reading or demand as the meter seals it."""
        market = self.broker.market
        values: dict[str, Any] = {
            "meter": self.name,
            "start_s": market.half_hour_s,
            "end_s": market.half_hour_s + HALF_HOUR_S,
            "revision": 0,
            "energy_wh": energy_wh,
            "quality": Quality.MEASURED,
            "carrier": Carrier.ELECTRICITY,
        }
        return market.sealed_by(self.name, self.kind(**(values | changes)))

    def answer_to(self, raw: bytes) -> Receipt:
        """Send these bytes until there is a receipt for them."""
        market, topics = self.broker.market, self.broker.market.topics
        said = topics.meter(self.broker.name, self.name, self.kind.TYPE.name.lower())
        answered = topics.meter(self.broker.name, self.name, "receipt")
        heard = market.said_until(lambda: market.publish(said, raw), answered)
        receipt = market.opened(heard)
        assert isinstance(receipt, Receipt)
        return receipt

    def got(self) -> dict[str, int]:
        """Wh by source that this consumer got in the last half hour, as its broker has it in its history."""
        sums: dict[str, int] = {}
        for row in self.history():
            sums[row["source"]] = sums.get(row["source"], 0) + row["energy_wh"]
        return sums

    def history(self) -> list[dict[str, Any]]:
        """Each slice that it got in the last half hour: of which device, for which line, through whom."""
        rows = self.broker.table("history")
        return [row for row in rows if row["meter"] == self.name and row["start_s"] == self.broker.market.half_hour_s]

    def unmatched_wh(self) -> int:
        """What its broker has on record as unmatched in the last half hour."""
        rows = self.broker.table("demands")
        (row,) = [row for row in rows if row["meter"] == self.name and row["start_s"] == self.broker.market.half_hour_s]
        wh: int = row["unmatched_wh"]
        return wh

    def was_told(self) -> Delivery:
        """The last delivery message that came to it for the last half hour."""
        market = self.broker.market
        topic = market.topics.meter(self.broker.name, self.name, "delivery")
        told = [market.opened(message) for message in market.heard(topic)]
        last = [message for message in told if message.start_s == market.half_hour_s][-1]
        assert isinstance(last, Delivery)
        return last


@dataclass
class Broker:
    """One `energy-broker run`, and the commands that its operator uses."""

    name: str
    market: "MarketPlace"
    process: ManagedProcess
    line: Line
    meters: dict[str, Meter] = field(default_factory=dict)

    def takes_on_consumer(
        self, meter: str, shares: Mapping[str, float], *options: str, shortage: str = "unmatched"
    ) -> Meter:
        """A consumer signs up with a contract, shares in percent; while the broker runs."""
        lines = [text for target, percent in shares.items() for text in ("--line", f"{target}={percent}")]
        energy_broker(
            *("consumer", "add", "--config", self.config, "--meter", meter, "--key", self.market.new_key(meter)),
            *(*lines, "--shortage", shortage, *options),
        )
        return self._with(Meter(meter, self, Demand))

    def takes_on_device(
        self, device: str, source: str, *, owner: str = "", price: int = 80_000, capacity_w: int = 10_000
    ) -> Meter:
        """A registrar admits a device, its owner mandates this broker, and the broker takes it on."""
        owner = owner or f"{device}-owner"
        market = self.market
        statements = [
            market.registration_of(owner, "provider"),
            market.admission_of(device, owner, source, capacity_w),
            market.mandate_of(device, owner, self.name),
        ]
        energy_broker("provider", "add", "--config", self.config, "--price", str(price), *statements)
        return self._with(Meter(device, self, Reading))

    def _with(self, meter: Meter) -> Meter:
        self.meters[meter.name] = meter
        return meter

    @property
    def config(self) -> Path:
        return self.market.folder / f"{self.name}.toml"

    def table(self, name: str) -> list[dict[str, Any]]:
        """What `energy-broker list NAME` shows."""
        return list(table(self.config, name))

    def rows_now(self, name: str) -> list[dict[str, Any]]:
        """The rows of that table about the last half hour."""
        return [row for row in self.table(name) if row["start_s"] == self.market.half_hour_s]

    def loses_power(self) -> None:
        self.process.kill()

    def comes_back(self, *options: str) -> None:
        """It runs again; `options` are for this start alone."""
        usual = self.process.command
        self.process.command = (*usual, *options)
        self.process.start()
        self.process.command = usual


class MarketPlace:
    """The MQTT server, the ledger with its harbour, and all brokers that are opened. Use it in a `with`."""

    def __init__(self, folder: Path, engine: str) -> None:
        """`engine` is `embedded` or `cometbft`."""
        self.folder = folder
        self.engine = engine
        self.topics = Topics()
        self.server = Mosquitto(folder / "mosquitto")
        self.network: Network | None = None
        self.brokers: dict[str, Broker] = {}
        self.half_hour_s = FIRST_S
        self.now_s = FIRST_S + 1
        self._processes = ProcessGroup()
        self._lines: list[Line] = []
        self._stopped_pids: list[int] = []

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.server.start()
        mqtt = self.server.mqtt_config()
        self._listener = Listener(mqtt, [f"{mqtt.root}/#"]).connect()
        self._found_ledger()
        self._conductor = Conductor(mqtt, LEDGER, load_private_key(self.key_file("conductor")))
        self.open_broker(HARBOUR)
        return self

    def __exit__(self, *_error: object) -> None:
        self.ledger_goes_on()
        self._processes.stop()
        if self.network is not None:
            self.network.stop()
        self._conductor.close()
        self._listener.close()
        for line in self._lines:
            line.close()
        self.server.stop()

    # Time

    def next_half_hour(self) -> None:
        """A half hour of the market has just ended: `half_hour_s` is when it began. Meters may report it now."""
        self.half_hour_s = self.now_s - self.now_s % HALF_HOUR_S
        self.time_passes_until(self.half_hour_s + HALF_HOUR_S + 10)

    def gate_1(self) -> None:
        """Gate 1 of the half hour: brokers clear their own stock and ask their neighbours."""
        self.time_passes_until(self.half_hour_s + HALF_HOUR_S + GATE_1_S)

    def gate_2(self) -> None:
        """Gate 2: shortage choices apply, what is unmatched goes on record, brokers close the half hour."""
        self.time_passes_until(self.half_hour_s + HALF_HOUR_S + GATE_2_S)

    def time_passes_until(self, time_s: int) -> None:
        """Finish what is under way, then let time pass; returns when all brokers are done with everything."""
        self._conductor.run(self.now_s + 1, time_s, market=list(self.brokers), while_waiting=self._check_processes)
        self.now_s = time_s

    def settle(self) -> None:
        """Wait until all brokers have committed everything that is under way."""
        self.time_passes_until(self.now_s + 2)

    def gate_1_passes(self) -> None:
        """Gate 1, without waiting for brokers to be done: for what cannot be finished yet."""
        self._say_time(self.half_hour_s + HALF_HOUR_S + GATE_1_S)

    def gate_2_passes(self) -> None:
        """Gate 2, while something is unfinished."""
        self._say_time(self.half_hour_s + HALF_HOUR_S + GATE_2_S)

    def _say_time(self, time_s: int) -> None:
        self.now_s = time_s
        tick = self.sealed_by("conductor", Tick(time_s, Stage.MARKET))
        self.publish(self.topics.time, tick, retain=True)

    def _check_processes(self) -> None:
        for broker in self.brokers.values():
            broker.process.check_running()

    # Brokers

    def open_broker(self, name: str, neighbours: Sequence[str] = ()) -> Broker:
        """Register a broker, write its config and start it. `neighbours` may be opened later."""
        line = Line(self.server.port)
        self._lines.append(line)
        config = self.folder / f"{name}.toml"
        config.write_text(self._broker_config(name, line.port, neighbours))
        energy_broker("submit", "--config", config, self.registration_of(name, "broker"))
        process = self._processes.add(broker_process(config)).start()
        self.brokers[name] = Broker(name, self, process, line)
        return self.brokers[name]

    def take_in_stranger(self, name: str, command: Sequence[str]) -> Broker:
        """Somebody else's program takes part as the broker `name`."""
        line = Line(self.server.port)
        self._lines.append(line)
        process = self._processes.add(ManagedProcess(name, command, self.folder / f"{name}.log")).start()
        self.brokers[name] = Broker(name, self, process, line)
        return self.brokers[name]

    def close_brokers(self, *names: str) -> None:
        """These end, and time goes on without them."""
        for name in names:
            self.brokers.pop(name).process.stop()

    def _broker_config(self, name: str, port: int, neighbours: Sequence[str]) -> str:
        text = f"""[broker]
name = "{name}"
key_file = "{self.key_file(name, make=True).name}"
data_dir = "{name}-data"
clock = "conductor"

[mqtt]
host = "127.0.0.1"
port = {port}

[ledger]
genesis_file = "genesis.cbor"
"""
        if self.network is not None and name in (HARBOUR, "east"):
            # These two are operators with a node; all others reach the ledger over MQTT.
            text += f"\n[ledger.cometbft]\nnodes = {json.dumps([node.rpc for node in self.network.nodes])}\n"
        if name == HARBOUR:
            section = "ledger.host" if self.network is None else "ledger.cometbft.gateway"
            text += f'\n[{section}]\nvalidator = "validator-1"\nkey_file = "validator-1.pem"\n'
            if self.network is None:
                text += 'path = "ledger"\n'
        for neighbour in neighbours:
            text += f'\n[[neighbours]]\nname = "{neighbour}"\nkey = "{self.new_key(neighbour)}"\n'
        return text

    # The ledger

    def _found_ledger(self) -> None:
        validators = [f"validator-{number + 1}" for number in range(1 if self.engine == "embedded" else VALIDATORS)]
        energy_broker(
            *("ledger", "genesis", "--out", self.genesis, "--ledger", LEDGER, "--area", AREA),
            *("--interval-s", str(HALF_HOUR_S), "--gate-1-s", str(GATE_1_S), "--gate-2-s", str(GATE_2_S)),
            *("--registrar", f"registrar={self.new_key('registrar')}"),
            *(text for name in validators for text in ("--validator", f"{name}={self.new_key(name)}")),
            *("--conductor", f"conductor={self.new_key('conductor')}"),
        )
        self.ledger = self.folder / "ledger"
        if self.engine == "cometbft":
            nodes = self.folder / "network"
            energy_broker(
                *("ledger", "testnet", "--path", nodes, "--genesis", self.genesis, "--keys", self.folder),
                "--set-up-only",
            )
            self.ledger = load_testnet(nodes)[0].home / LEDGER_FOLDER
            self.network = Network(nodes).start()

    @property
    def genesis(self) -> Path:
        return self.folder / "genesis.cbor"

    def on_ledger(self, what: str) -> list[dict[str, Any]]:
        """`energy-broker ledger show` of `operations`, `assets`, `deliveries`, …"""
        lines = energy_broker("ledger", "show", self.ledger, what, "--json").splitlines()
        return [json.loads(line) for line in lines]

    def operations_now(self, kind: str) -> list[dict[str, Any]]:
        """The operations of that kind about the last half hour, oldest first; an `issue` with its `reading`."""
        found = [row for row in self.on_ledger("operations") if row["operation"] == kind]
        for row in found:
            if kind == "issue":
                row["reading"] = content(bytes.fromhex(row["statement"]))
        return [row for row in found if _start_of(row) == self.half_hour_s]

    def batches_now(self, kind: type[Deliver] | type[Transfer]) -> list[bytes]:
        """The batches with such operations about the last half hour, as the feed of blocks shows them."""
        found = []
        for message in self.heard(self.topics.ledger_feed(LEDGER)):
            for raw in content(message.payload).batches:
                said = [decode_operation(operation) for operation in content(raw).operations]
                if any(isinstance(operation, kind) and _is_about(operation, self.half_hour_s) for operation in said):
                    found.append(raw)
        return found

    def has_closed(self, broker: Broker) -> bool:
        """True if the ledger shows that this broker has closed the last half hour."""
        return self._close_of(broker) is not None

    def closed_by(self, broker: Broker) -> tuple[int, int, int]:
        """What stands on the ledger about that broker's half hour: demands, their Wh, and the Wh delivered to them."""
        row = self._close_of(broker)
        assert row is not None, f"{broker.name} has not closed"
        return row["demands"], row["demanded_wh"], row["delivered_wh"]

    def _close_of(self, broker: Broker) -> dict[str, Any] | None:
        lines = energy_broker("ledger", "audit", "--by", "closes", "--json", self.ledger).splitlines()
        named = {(row["broker"], row["start_s"]): row for row in map(json.loads, lines)}
        return named.get((broker.name, self.half_hour_s))

    def holder_of(self, device: str) -> dict[str, int]:
        """Who holds how many undelivered Wh of what that device made in the last half hour."""
        assets = [row for row in self.on_ledger("assets") if row["asset"]["device"] == device]
        held: dict[str, int] = {}
        for part in [part for row in assets if row["asset"]["start_s"] == self.half_hour_s for part in row["held"]]:
            held[part["owner"]] = held.get(part["owner"], 0) + part["to_wh"] - part["from_wh"]
        return held

    def check_books(self) -> None:
        """Every sum of the ledger balances, and all of it verifies from the first block."""
        energy_broker("ledger", "audit", self.ledger)
        energy_broker("ledger", "verify", self.ledger)

    def ledger_stands_still(self) -> None:
        """Nothing is committed any more: the host is suspended, or two of the four nodes."""
        if self.network is None:
            pids = [self.brokers[HARBOUR].process.pid]
        else:
            pids = [pid for node in self.network.nodes[2:] for pid in (node.process.pid, node.cometbft_pid)]
        self._stopped_pids = [pid for pid in pids if pid is not None]
        for pid in self._stopped_pids:
            os.kill(pid, signal.SIGSTOP)

    def ledger_goes_on(self) -> None:
        for pid in self._stopped_pids:
            os.kill(pid, signal.SIGCONT)
        self._stopped_pids = []

    # Keys and signed statements

    def key_file(self, name: str, *, make: bool = False) -> Path:
        if make:
            self.new_key(name)
        return self.folder / f"{name}.pem"

    def new_key(self, name: str) -> str:
        """The public key of that party or meter in hex; it is made when it is first asked for."""
        path = self.key_file(name)
        return energy_broker("key", "show" if path.exists() else "new", path).strip()

    def public_key(self, name: str) -> PublicKey:
        return load_private_key(self.key_file(name)).public

    def registration_of(self, party: str, role: str) -> Path:
        out = self.folder / f"{party}.registration"
        if not out.exists():
            energy_broker(
                *("registrar", "register", *self._signing("registrar"), "--party", party, "--role", role),
                *("--party-key", self.new_key(party), "--out", out),
            )
        return out

    def admission_of(self, device: str, owner: str, source: str, capacity_w: int) -> Path:
        out = self.folder / f"{device}.admission"
        energy_broker(
            *("registrar", "admit", *self._signing("registrar"), "--device", device, "--owner", owner),
            *("--meter-key", self.new_key(device), "--source", source, "--capacity-w", str(capacity_w)),
            *("--area", AREA, "--commissioned", "2010-01-01T00:00:00Z", "--out", out),
        )
        return out

    def mandate_of(self, device: str, owner: str, broker: str) -> Path:
        out = self.folder / f"{device}.mandate"
        energy_broker(
            *("provider", "mandate", *self._signing(owner), "--device", device, "--broker", broker),
            *("--from", "2011-01-01T00:00:00Z", "--out", out),
        )
        return out

    def _signing(self, name: str) -> tuple[str | Path, ...]:
        return "--genesis", self.genesis, "--name", name, "--key", self.key_file(name, make=True)

    # What is said

    def sealed_by(self, name: str, message: Message) -> bytes:
        return seal(message, load_private_key(self.key_file(name)), LEDGER, name)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        self._listener.publish(topic, payload, retain=retain)

    def said_until(self, say: Callable[[], None], answer_topic: str) -> Incoming:
        """Say it again and again until something comes on that topic: nothing that is sent once is sure to arrive."""
        since = len(self._listener.messages)
        for attempt in range(SENDS):
            say()
            try:
                return self._listener.wait_for(
                    lambda message: message.topic == answer_topic, answer_topic, limit_s=SEND_AGAIN_S, since=since
                )
            except WaitedTooLong:
                if attempt + 1 == SENDS:
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    def wait_until(self, condition: Callable[[], bool], what: str, limit_s: float = 20.0) -> None:
        wait_until(condition, what, limit_s=limit_s)

    def heard(self, topic: str) -> list[Incoming]:
        """All that was said on a topic so far, oldest first."""
        self._take_in()
        return [message for message in self._listener.messages if message.topic == topic]

    def _take_in(self) -> None:
        """Everything that was said before now is in `messages`: the server keeps the order in which it was said."""
        since = len(self._listener.messages)
        mark = f"{self.topics.root}/mark"
        self.publish(mark, b"")
        self._listener.wait_for(lambda message: message.topic == mark, "what was said so far", since=since)

    def opened(self, message: Incoming) -> Any:
        """The verified message of a broker of this market."""
        signers = {self.public_key(name).key_id: Signer(name, self.public_key(name)) for name in self.brokers}
        return open_envelope(message.payload, LEDGER, signers.get).message


def content(raw: bytes) -> Any:
    """What a sealed message says, without a look at who signed it."""
    envelope = parse(raw)
    return MESSAGE_CLASSES[envelope.message_type].from_payload(envelope.payload)


def _is_about(operation: Deliver | Transfer, start_s: int) -> bool:
    return (operation.asset if isinstance(operation, Transfer) else operation).start_s == start_s


def _start_of(operation: dict[str, Any]) -> int | None:
    """The half hour that an operation is about; None for those about none."""
    if "reading" in operation:
        start_s: int = operation["reading"].start_s
        return start_s
    about = operation.get("asset", operation)
    return about.get("start_s")


def utc(time_s: int) -> str:
    """A moment as the commands want it, for example 2026-02-01T00:30:00Z."""
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
