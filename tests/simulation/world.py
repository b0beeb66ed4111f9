"""A small market in one process: brokers with their real stores and ledger on disk, meters, and a pretended network.

One seed decides everything that happens: which message moves next, what is lost, who is killed where and when. Time
stands still until nothing is left to do, and then goes on to the next gate, end of an interval or time-out. So a run
that is disturbed, but healed before the gates, must end with the same books as one that is not.

`World.run` gives the books; `audit.check` holds them against the ledger's own blocks.
"""

import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from support.ledger_world import key

from broker.config import BrokerConfig, BrokerSection, HostSection, LedgerSection, NeighbourSection
from broker.market.contracts import ShortageChoice, contract_bytes, make_contract
from broker.market.statements import Flow
from broker.market.terms import DeviceTerms
from broker.protocol.envelope import Signer, open_envelope, seal, sealed_id
from broker.protocol.keys import save_private_key
from broker.protocol.messages import (
    Admission,
    Carrier,
    Delivery,
    Demand,
    Genesis,
    Mandate,
    Message,
    MessageType,
    NamedKey,
    Quality,
    Reading,
    Receipt,
    ReceiptStatus,
    Registration,
    Role,
)
from broker.protocol.mqtt_link import MqttConfig
from broker.protocol.sources import Source
from broker.protocol.topics import Topics
from broker.service.run import BrokerService
from broker.service.store import BrokerStore, ConsumerRow, ContractRow, DeviceRow, Standing
from simulation.simulated_mqtt import Faults, Partition, SimulatedLink, SimulatedServer
from simulation.simulated_mqtt import Message as MqttMessage

LEDGER: Final = "sim-ledger"
INTERVAL_S: Final = 1_800
GATE_1_S: Final = 600
GATE_2_S: Final = 1_200
T0: Final = 1_769_900_400 - 1_769_900_400 % 86_400 + 86_400 - 2 * INTERVAL_S
"""An hour before the end of 31 January 2026 (UTC), so that runs cross into a new accounting period."""

METER_RESEND_S: Final = 5.0
PATIENCE_S: Final = 80.0
"""Network time after which a world that is not at rest counts as stuck: longer than any time-out."""


class Killed(BaseException):
    """The process ends here and now; nothing may catch it but the world."""


class Stuck(AssertionError):
    """Nothing moves any more, but somebody still waits."""


@dataclass(frozen=True, slots=True)
class ConsumerPlan:
    meter: str
    broker: str
    shares: tuple[tuple[str, int], ...]
    """(source or group, percent)."""
    energies_wh: tuple[int, ...]
    shortage: ShortageChoice = ShortageChoice.UNMATCHED
    substitutes: tuple[str, ...] = ()
    choices: dict[str, Any] = field(default_factory=dict)
    """What else `make_contract` takes: window, excluded_providers and so on."""


@dataclass(frozen=True, slots=True)
class DevicePlan:
    device: str
    owner: str
    broker: str
    source: Source
    energies_wh: tuple[int, ...]
    area: str = "home"
    terms: DeviceTerms | None = None
    """None: the price is 100 and the source's number, and nothing is kept."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Who takes part and what their meters count in each interval from T0 on."""

    brokers: tuple[str, ...]
    host: str
    consumers: tuple[ConsumerPlan, ...]
    devices: tuple[DevicePlan, ...]
    late_s: dict[tuple[str, int], int] = field(default_factory=dict)
    """(meter, index of the interval): how much later than its end the agent comes to send it."""
    links: tuple[tuple[str, str], ...] | None = None
    """Who is whose neighbour; None: everybody is everybody's."""

    policies: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    """(broker, neighbour): what the neighbour may do there, as in the config."""

    def neighbours_of(self, broker: str) -> tuple[str, ...]:
        """By name."""
        others = sorted(other for other in self.brokers if other != broker)
        if self.links is None:
            return tuple(others)
        return tuple(other for other in others if (broker, other) in self.links or (other, broker) in self.links)

    @property
    def intervals(self) -> int:
        return max(len(member.energies_wh) for member in (*self.consumers, *self.devices))


@dataclass(slots=True)
class Meter:
    """An agent: keeps each interval until its receipt has come. The same message must always get the same answer."""

    name: str
    broker: str
    kind: MessageType
    link: SimulatedLink
    outbox: dict[bytes, bytes] = field(default_factory=dict)
    sent_s: dict[bytes, float] = field(default_factory=dict)
    receipts: dict[bytes, bytes] = field(default_factory=dict)
    """The receipt's bytes by message id."""
    refused: dict[bytes, Receipt] = field(default_factory=dict)
    final: dict[int, Delivery] = field(default_factory=dict)
    connections: int = 0


@dataclass(slots=True)
class BrokerProcess:
    """A broker that can be killed and started again on the same files."""

    name: str
    config: BrokerConfig
    link: SimulatedLink | None = None
    service: BrokerService | None = None
    stack: contextlib.ExitStack | None = None
    wants_turn: bool = True
    held_down: bool = False
    recovers: bool = False

    @property
    def connected(self) -> bool:
        """True once the broker has taken in that it is connected."""
        return self.service is not None and self.service._connections > 0


@dataclass(frozen=True, slots=True)
class Books:
    """What a run comes to; equal for two runs that did the same business."""

    delivered_wh: dict[tuple[str, int, str], int]
    """(meter, interval, source) to Wh."""
    unmatched_wh: dict[tuple[str, int], int]
    bought_wh: dict[tuple[str, int, str], int]
    """(buying broker, interval, source) to Wh."""
    kept_wh: dict[tuple[str, int, str], int]
    """(broker, interval, source) to Wh that the ledger holds for it."""


class World:
    """A plan, a seed and a folder; `run` lets it happen."""

    link_type: type[SimulatedLink] = SimulatedLink
    """What brokers get for an MQTT link."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        seed: int = 0,
        *,
        faults: Faults | None = None,
        kills: int = 0,
        disconnects: int = 0,
        kill_at: int | None = None,
        partition: Partition | None = None,
        heals: Callable[["World"], bool] | None = None,
        may_wait: bool = False,
    ) -> None:
        """`kills` and `disconnects` happen at most so often, at random; `kill_at` is the number of one exact moment.

        `partition` holds until `heals(world)`; then every connection is made anew. `may_wait`: market time goes on
        even while a broker waits for somebody, as real time does.
        """
        self.plan = plan
        self.folder = folder
        self.random = random.Random(seed)
        self.server = SimulatedServer(self.random, faults or Faults())
        self.server.partition = partition
        self._heals = heals
        self._kills = kills
        self._disconnects = disconnects
        self._kill_at = kill_at
        self.may_wait = may_wait
        self.moments = 0
        """How many moments have passed at which a broker can be killed."""
        self.moment_names: list[str] = []
        self.patience_s = PATIENCE_S
        self.market_time_s = T0 + 10
        self.network_time_s = 0.0
        self.topics = Topics()
        self.genesis = _genesis(plan)
        self.complaints: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "genesis.cbor").write_bytes(self.genesis.to_bytes())
        self.brokers = {name: BrokerProcess(name, self._config(name)) for name in plan.brokers}
        self.meters: dict[str, Meter] = {}
        self._actions: list[Callable[[], None]] = []
        self._pending_sends: list[tuple[int, str, bytes]] = []
        for name in plan.brokers:
            self._register(name)
        for consumer in plan.consumers:
            self._add_meter(consumer.meter, consumer.broker, MessageType.DEMAND, consumer.energies_wh)
        for device in plan.devices:
            self._add_meter(device.device, device.broker, MessageType.READING, device.energies_wh)

    def add_device(self, plan: DevicePlan) -> None:
        """A further device, with its meter, as the command line would take it on while the broker runs or rests."""
        store = BrokerStore(self.brokers[plan.broker].config.database)
        store.begin()
        self._take_on(store, plan)
        store.commit()
        store.close()
        self.plan = replace(self.plan, devices=(*self.plan.devices, plan))
        self._add_meter(plan.device, plan.broker, MessageType.READING, plan.energies_wh)

    def say(self, sender: str, topic: str, payload: bytes) -> None:
        """A message of somebody who is no part of the plan."""
        self.server.route(MqttMessage(sender, topic, payload, 1, False))

    def before_next_step(self, action: Callable[[], None]) -> None:
        """Do this as soon as every broker is connected."""
        self._actions.append(action)

    def listen(self, topic: str) -> list[bytes]:
        """The payloads that will be published on a topic."""
        heard: list[bytes] = []
        self.server.listeners.append(lambda message: heard.append(message.payload) if message.topic == topic else None)
        return heard

    def opened(self, raw: bytes) -> Message:
        """A broker's message, verified."""
        signers = {key(name).public.key_id: Signer(name, key(name).public) for name in self.brokers}
        return open_envelope(raw, LEDGER, signers.get).message

    # Set-up

    def _config(self, name: str) -> BrokerConfig:
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "key.pem").exists():
            save_private_key(folder / "key.pem", key(name))
            save_private_key(folder / "node.pem", key("node"))
        host = HostSection(self.folder / "ledger", "node", folder / "node.pem") if name == self.plan.host else None
        neighbours = tuple(
            NeighbourSection(other, key(other).public.cose_key.hex(), **self.plan.policies.get((name, other), {}))
            for other in self.plan.neighbours_of(name)
        )
        return BrokerConfig(
            BrokerSection(name, folder / "key.pem", folder),
            LedgerSection(self.folder / "genesis.cbor", host),
            MqttConfig(),
            neighbours,
        )

    def _register(self, broker: str) -> None:
        store = BrokerStore(self.brokers[broker].config.database)
        store.begin()
        store.add_statement(MessageType.REGISTRATION, self.signed(_registration(broker, Role.BROKER), "registrar"))
        for plan in self.plan.devices:
            if plan.broker == broker:
                self._take_on(store, plan)
        for consumer in self.plan.consumers:
            if consumer.broker == broker:
                _sign_up(store, consumer)
        store.commit()
        store.close()

    def _take_on(self, store: BrokerStore, plan: DevicePlan) -> None:
        """Put a device with its admission and mandate into its broker's store."""
        meter = key(plan.device).public
        admission = Admission(
            plan.device,
            plan.owner,
            meter.cose_key,
            plan.source,
            Carrier.ELECTRICITY,
            capacity_w(plan),
            plan.area,
            "roof",
            0,
        )
        terms = plan.terms or DeviceTerms(100 + plan.source)
        mandate = Mandate(plan.device, plan.owner, plan.broker, T0 - 1_000 * INTERVAL_S)
        store.add_statement(
            MessageType.REGISTRATION, self.signed(_registration(plan.owner, Role.PROVIDER), "registrar")
        )
        store.add_statement(MessageType.ADMISSION, self.signed(admission, "registrar"))
        store.add_statement(MessageType.MANDATE, self.signed(mandate, plan.owner))
        store.add_device(
            DeviceRow(
                *(plan.device, plan.owner, meter.cose_key, meter.key_id, int(plan.source), capacity_w(plan), plan.area),
                *(terms.price, mandate.from_s, terms.reserve_ppm, terms.exclusive_ppm, terms.exclusive_for),
            )
        )

    def _add_meter(self, name: str, broker: str, kind: MessageType, energies_wh: Iterable[int]) -> None:
        subscriptions = [(self.topics.meter(broker, name, leaf), 1) for leaf in ("receipt", "delivery")]
        link = SimulatedLink(f"agent-{name}", subscriptions, lambda _what: None, self.random)
        self.server.add(link)
        self.meters[name] = Meter(name, broker, kind, link)
        for index, energy_wh in enumerate(energies_wh):
            start_s = T0 + index * INTERVAL_S
            due_s = start_s + INTERVAL_S + self.plan.late_s.get((name, index), 0)
            self.send(name, self.meter_value(name, start_s, energy_wh), due_s)

    def send(self, meter: str, message: Message, due_s: int = 0) -> None:
        """Have a meter's agent sign and send this at that market time (0: at once), until it is answered."""
        self._pending_sends.append((due_s, meter, self.signed(message, meter)))
        self._pending_sends.sort()

    def signed(self, message: Message, signer: str) -> bytes:
        return seal(message, key(signer), LEDGER, signer)

    def meter_value(self, meter: str, start_s: int, energy_wh: int, **changes: Any) -> Demand | Reading:
        values: dict[str, Any] = {
            "meter": meter,
            "start_s": start_s,
            "end_s": start_s + INTERVAL_S,
            "revision": 0,
            "energy_wh": energy_wh,
            "quality": Quality.MEASURED,
            "carrier": Carrier.ELECTRICITY,
        }
        kind = Demand if self.meters[meter].kind is MessageType.DEMAND else Reading
        return kind(**(values | changes))

    # The run

    def run(self, until_s: int | None = None) -> Books:
        """Let everything happen, by default until gate 2 of the interval after the last one is over. Raises Stuck.

        Can be called again: the brokers are started anew.
        """
        late_s = max(self.plan.late_s.values(), default=0)
        end_s = until_s or T0 + (self.plan.intervals + 1) * INTERVAL_S + GATE_2_S + late_s
        while True:
            self._send_due()
            self.settle()
            if self.market_time_s >= end_s:
                break
            self.market_time_s = min(end_s, self._next_time_s())
            self._turn_for_all()
        self._kills = self._disconnects = 0
        self.server.partition = None
        self.settle()
        books = self.books()
        self.stop()
        return books

    def _next_time_s(self) -> int:
        """The next gate, end of an interval, or late message."""
        times = [due_s for due_s, _, _ in self._pending_sends]
        now = self.market_time_s
        boundary = now - now % INTERVAL_S
        times += [boundary + step for step in (GATE_1_S, (GATE_1_S + GATE_2_S) // 2, GATE_2_S, INTERVAL_S)]
        return min(time_s for time_s in times if time_s > now)

    def settle(self) -> None:
        """Let everything happen that can happen at this market time."""
        waited_s = 0.0
        while True:
            self._move_until_quiet()
            if self._heals is not None and self._heals(self):
                self._heal()
                continue
            if self._at_rest():
                return
            if waited_s >= self.patience_s:
                if self.may_wait:
                    return
                raise Stuck(self.describe())
            waited_s += 1.0
            self.network_time_s += 1.0
            self._turn_for_all()

    def _heal(self) -> None:
        self._heals = None
        self.server.partition = None
        for name in list(self.server.links):
            self.server.disconnect(name)
        self._turn_for_all()

    def _at_rest(self) -> bool:
        """Nothing is left to do at this market time. As with a conductor, who waits for somebody who waits may rest."""
        up = [process for process in self.brokers.values() if not process.held_down]
        services = [process.service for process in up if process.service is not None and self._rests(process.service)]
        if len(services) < len(up) or any(meter.outbox for meter in self.meters.values()):
            return False
        return self._wait_for_each_other(services)

    @staticmethod
    def _wait_for_each_other(services: Sequence[BrokerService]) -> bool:
        """What these wait for is held by some of them, so nothing of it is on its way."""
        held = {token for service in services for token in service._broker.holds}
        return all(service._broker.waits_for <= held for service in services)

    @staticmethod
    def _rests(service: BrokerService) -> bool:
        return service._broker.idle and not service._busy and not service._unsent and service._client.loaded

    def _turn_for_all(self) -> None:
        for process in self.brokers.values():
            process.wants_turn = True

    def _move_until_quiet(self) -> None:
        while True:
            steps: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
            steps += [(self.server.carry, step) for step in self.server.steps()]
            steps += [(self._connect, (name,)) for name, link in self.server.links.items() if not link.connected]
            for process in self.brokers.values():
                if process.held_down:
                    continue
                if process.service is None:
                    steps.append((self._start, (process,)))
                elif process.wants_turn or (process.link is not None and process.link.ready):
                    steps.append((self._turn, (process,)))
            steps += [(self._meter_turn, (meter,)) for meter in self.meters.values() if self._meter_wants(meter)]
            if not steps:
                return
            if self._disconnects and self.random.randrange(60) == 0:
                self._disconnects -= 1
                self.server.disconnect(self.random.choice(sorted(self.server.links)))
                continue
            if self._actions and all(process.connected for process in self.brokers.values()):
                self._actions.pop(0)()
            step, arguments = steps[self.random.randrange(len(steps))]
            step(*arguments)

    def _connect(self, name: str) -> None:
        self.server.connect(name)
        for process in self.brokers.values():
            if process.link is not None and process.link.name == name:
                process.wants_turn = True

    # Brokers

    def _start(self, process: BrokerProcess) -> None:
        stack = contextlib.ExitStack()

        def open_link(
            config: MqttConfig, client_id: str, subscriptions: list[tuple[str, int]], *, will: tuple[str, bytes]
        ) -> SimulatedLink:
            link = self.link_type(client_id, subscriptions, lambda what: self._moment(process, what), self.random)
            process.link = link
            return link

        try:
            service = BrokerService(
                process.config,
                self.genesis,
                stack,
                open_link=open_link,
                monotonic_s=lambda: self.network_time_s,
                calendar_s=lambda: self.market_time_s,
                random_bytes=self.random.randbytes,
                clock_waits=not self.may_wait,
                recovers=process.recovers,
            )
        except BaseException:
            stack.close()
            raise
        _before_and_after(service._store, "commit", lambda what: self._moment(process, f"store {what}"))
        if service._gateway is not None:
            _before_and_after(service._gateway, "commit", lambda what: self._moment(process, f"ledger {what}"))
        process.service, process.stack, process.wants_turn = service, stack, True
        assert process.link is not None
        self.server.add(process.link)

    def _moment(self, process: BrokerProcess, what: str) -> None:
        """Something is about to happen, or has just happened, in this broker: is it killed here?"""
        self.moments += 1
        self.moment_names.append(f"{process.name}: {what}")
        if self.moments == self._kill_at:
            raise Killed
        if self._kills and self.random.randrange(40) == 0:
            self._kills -= 1
            raise Killed

    def _turn(self, process: BrokerProcess) -> None:
        assert process.service is not None
        process.wants_turn = False
        try:
            process.service.turn()
        except Killed:
            self.kill(process.name)
            return
        process.wants_turn = process.service._busy

    def kill(self, name: str) -> None:
        """SIGKILL: what is not committed is gone, connections break."""
        process = self.brokers[name]
        assert process.stack is not None
        assert process.link is not None
        if process.link.name in self.server.links:
            self.server.disconnect(process.link.name)
            del self.server.links[process.link.name]
        process.stack.close()
        process.service = process.stack = process.link = None

    def hold_down(self, name: str) -> None:
        """Keep a broker from starting, until `let_up`."""
        self.brokers[name].held_down = True
        if self.brokers[name].service is not None:
            self.kill(name)

    def let_up(self, name: str) -> None:
        self.brokers[name].held_down = False

    def stop(self) -> None:
        for process in self.brokers.values():
            if process.service is not None:
                self.kill(process.name)

    # Meters

    def _send_due(self) -> None:
        while self._pending_sends and self._pending_sends[0][0] <= self.market_time_s:
            _, name, raw = self._pending_sends.pop(0)
            self.meters[name].outbox[sealed_id(raw, LEDGER, name)] = raw

    def _meter_wants(self, meter: Meter) -> bool:
        if not meter.link.connected:
            return False
        return bool(meter.link.ready) or meter.connections != meter.link.connections or bool(self._overdue(meter))

    def _overdue(self, meter: Meter) -> list[bytes]:
        return [
            identity
            for identity in meter.outbox
            if meter.sent_s.get(identity, -METER_RESEND_S) <= self.network_time_s - METER_RESEND_S
        ]

    def _meter_turn(self, meter: Meter) -> None:
        for incoming in meter.link.poll(0.0):
            self._take_answer(meter, incoming.topic, incoming.payload)
        if meter.connections != meter.link.connections:
            meter.connections = meter.link.connections
            meter.sent_s.clear()
        leaf = meter.kind.name.lower()
        for identity in self._overdue(meter):
            meter.sent_s[identity] = self.network_time_s
            meter.link.publish(self.topics.meter(meter.broker, meter.name, leaf), meter.outbox[identity])

    def _take_answer(self, meter: Meter, topic: str, payload: bytes) -> None:
        signer = Signer(meter.broker, key(meter.broker).public)
        message = open_envelope(payload, LEDGER, lambda _key_id: signer).message
        if isinstance(message, Delivery):
            self._take_delivery(meter, message)
            return
        assert isinstance(message, Receipt)
        if message.status is not ReceiptStatus.ACCEPTED:
            meter.refused[message.message_id] = message
        else:
            before = meter.receipts.setdefault(message.message_id, payload)
            assert before == payload, f"{meter.name} got two different answers to one message"
        meter.outbox.pop(message.message_id, None)

    @staticmethod
    def _take_delivery(meter: Meter, delivery: Delivery) -> None:
        delivered_wh = sum(line.energy_wh for line in delivery.lines)
        assert delivered_wh + delivery.unmatched_wh == delivery.demanded_wh
        meter.final[delivery.start_s] = delivery

    # What it comes to

    def books(self) -> Books:
        """The books as the brokers' stores and stocks have them."""
        delivered: Counter[tuple[str, int, str]] = Counter()
        unmatched: dict[tuple[str, int], int] = {}
        bought: Counter[tuple[str, int, str]] = Counter()
        kept: dict[tuple[str, int, str], int] = {}
        source_of = {plan.device: plan.source for plan in self.plan.devices}
        for name, process in self.brokers.items():
            if process.service is None:
                continue
            store = process.service._store
            for row in store.all_deliveries():
                delivered[row.meter, row.start_s, Source(row.source).label] += row.to_wh - row.from_wh
            for message in store.all_messages(MessageType.DEMAND):
                if message.standing is not Standing.CURRENT:
                    continue
                unmatched[message.meter, message.start_s] = message.energy_wh - message.delivered_wh
            for purchase in store.transfers(Flow.BOUGHT):
                label = source_of[purchase.device].label
                bought[name, purchase.asset_start_s, label] += purchase.to_wh - purchase.from_wh
            for start_s, shelves in process.service._broker._stock._shelves.items():
                for source, shelf in shelves.items():
                    if shelf.energy_wh:
                        kept[name, start_s, source.label] = shelf.energy_wh
        return Books(dict(delivered), unmatched, dict(bought), kept)

    def describe(self) -> str:
        """Who waits for what, for the message of a failure."""
        lines = [f"market time {self.market_time_s} (T0 + {self.market_time_s - T0} s)"]
        for meter in self.meters.values():
            if meter.outbox:
                lines.append(f"meter {meter.name} waits for {len(meter.outbox)} receipts")
        for name, process in self.brokers.items():
            if process.service is None:
                lines.append(f"broker {name} is down")
                continue
            broker, client = process.service._broker, process.service._client
            batches = [row.kind.name for row in broker._desk.waiting]
            orders = f"{len(broker._neighbours._out._open)} out, {len(broker._neighbours._in._received)} in"
            lines.append(
                f"broker {name}: idle {broker.idle}, in work {broker._cycle.current} {broker._cycle.state.name},"
                f" batches {batches}, orders {orders}, client {client._phase.name} at {client.height},"
                f" pending {client.pending}, unsent {len(process.service._unsent)}"
            )
        return "\n".join(lines)


def capacity_w(plan: DevicePlan) -> int:
    """What a device is admitted for: twice of what it ever makes."""
    return 4 * max(1, *plan.energies_wh)


def _genesis(plan: Plan) -> Genesis:
    return Genesis(
        LEDGER,
        INTERVAL_S,
        GATE_1_S,
        GATE_2_S,
        90 * 86_400,
        "EUR",
        ("home", "away"),
        (NamedKey("registrar", key("registrar").public.cose_key),),
        (NamedKey("node", key("node").public.cose_key),),
        False,
    )


def _registration(party: str, role: Role) -> Registration:
    return Registration(party, role, key(party).public.cose_key)


def _sign_up(store: BrokerStore, plan: ConsumerPlan) -> None:
    public = key(plan.meter).public
    secret = plan.meter.encode().ljust(32, b".")
    contract = make_contract(
        0,
        [(name, percent * 10_000) for name, percent in plan.shares],
        plan.shortage,
        area="home",
        substitutes=plan.substitutes,
        **plan.choices,
    )
    store.add_consumer(ConsumerRow(plan.meter, public.cose_key, public.key_id, secret, 0))
    store.add_contract(plan.meter, ContractRow(1, 0, contract_bytes(contract)))


def _before_and_after(owner: Any, method: str, moment: Callable[[str], None]) -> None:
    """Call `moment` around a method of this one object."""
    original = getattr(owner, method)

    def wrapped() -> Any:
        moment(f"before {method}")
        result = original()
        moment(f"after {method}")
        return result

    setattr(owner, method, wrapped)
