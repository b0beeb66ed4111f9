"""Many brokers and meters in one process: `World` with a network that is quick to carry messages, and large markets.

`World` looks at everybody before each of its steps, which suits a handful of parties. Here only those who have
something to do are looked at, meters are told their answers at once, and their messages are signed when they are due.
Nothing is lost, doubled or killed; what the seed decides is the order in which everything arrives.

The markets follow the recorded home of the demo (deploy/demo/data): each consumer is that home in one of three weeks,
shifted by some hours and scaled; sun is its recorded roof, the other sources are the formulas below.
"""

import contextlib
import csv
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from decimal import ROUND_HALF_EVEN, Decimal
from functools import cache, lru_cache
from pathlib import Path
from typing import Final

from support.ledger_world import key

from broker.config import BrokerConfig
from broker.market.contracts import ShortageChoice
from broker.protocol.envelope import Signer, open_envelope
from broker.protocol.keys import PublicKey
from broker.protocol.messages import Delivery, MessageType, Receipt, ReceiptStatus
from broker.protocol.mqtt_link import Incoming
from broker.protocol.sources import Source
from simulation.simulated_mqtt import Faults, Message, SimulatedLink, SimulatedServer
from simulation.world import (
    GATE_1_S,
    GATE_2_S,
    INTERVAL_S,
    LEDGER,
    T0,
    Books,
    BrokerProcess,
    ConsumerPlan,
    DevicePlan,
    Meter,
    Plan,
    World,
)

DATA: Final = Path(__file__).parents[2] / "deploy" / "demo" / "data"
WEEK: Final = 336
"""Half hours."""

OWN_SOURCES: Final = (Source.WIND, Source.SOLAR, Source.BIOMASS, Source.NATURAL_GAS)
"""Besides hydro, which every broker has, the broker of number i has the source i modulo 4."""

# The recorded weeks


@cache
def recorded_wh(week: str, column: str) -> tuple[int, ...]:
    """Wh in each half hour of a recorded week: GC is consumption, GG solar generation, both mean kW in the file."""
    with (DATA / f"{week}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return tuple(int((Decimal(row[column]) * 500).quantize(Decimal(1), ROUND_HALF_EVEN)) for row in rows)


def household_wh(number: int, intervals: int) -> tuple[int, ...]:
    """A recorded week of the home, up to two hours earlier or later, half to one and a half times as large."""
    week = recorded_wh(("winter", "spring", "summer")[number % 3], "GC")
    shift, percent = number * 7 % 9 - 4, 50 + number * 37 % 101
    return tuple(week[(index + shift) % WEEK] * percent // 100 for index in range(intervals))


def generated_wh(source: Source, mean_wh: int, number: int, intervals: int) -> tuple[int, ...]:
    """A device of about `mean_wh` in each half hour."""
    if source is Source.SOLAR:
        week = recorded_wh(("spring", "summer")[number % 2], "GG")
        total_wh = sum(week)
        # The first interval is an hour before midnight (UTC); the recorded days begin at midnight.
        return tuple(week[(index - 2) % WEEK] * mean_wh * WEEK // total_wh for index in range(intervals))
    if source is Source.WIND:
        # Fronts that come every three days, from almost none to twice the mean.
        return tuple(
            mean_wh * (5 + abs((index + 17 * number) % 144 - 72) * 190 // 72) // 100 for index in range(intervals)
        )
    return tuple(mean_wh * (98 + (index + number) % 5) // 100 for index in range(intervals))


# Markets


@dataclass(frozen=True, slots=True)
class ManyPlan:
    """A market and who knows whom."""

    plan: Plan
    links: dict[str, tuple[str, ...]]
    """Neighbours of each broker."""
    ample: frozenset[str]
    """Consumers whose lines are always in ample supply at their own broker."""


def ring(brokers: int) -> dict[str, tuple[str, ...]]:
    names = _names(brokers)
    return {name: (names[index - 1], names[(index + 1) % brokers]) for index, name in enumerate(names)}


def star(brokers: int) -> dict[str, tuple[str, ...]]:
    hub, *others = _names(brokers)
    return {hub: tuple(others)} | dict.fromkeys(others, (hub,))


def _names(brokers: int) -> list[str]:
    return [f"b{index:02}" for index in range(brokers)]


def many_plan(links: dict[str, tuple[str, ...]], meters: int, intervals: int) -> ManyPlan:
    """A tenth of the meters are devices, at least two a broker; the others are consumers of six kinds in turn.

    Each broker's hydro is half as much again as its consumers can ever ask of it. Its other source is about what its
    own consumers and its neighbours' want on average; sun and wind are short at times and plenty at others.
    """
    names = sorted(links)
    of_each = meters // len(names)
    devices_of_each = max(2, of_each // 10)
    consumers: list[ConsumerPlan] = []
    devices: list[DevicePlan] = []
    ample = set()
    for place, name in enumerate(names):
        second = OWN_SOURCES[place % 4]
        own = []
        for index in range(of_each - devices_of_each):
            shares, shortage, substitutes = _contract(index % 6, second, OWN_SOURCES[(place + 1) % 4])
            energies_wh = household_wh(place * of_each + index, intervals)
            meter = f"{name}-c{index:03}"
            own.append(ConsumerPlan(meter, name, shares, energies_wh, shortage, substitutes))
            if index % 6 == 0:
                ample.add(meter)
        consumers += own
        most_wh = max(sum(plan.energies_wh[index] for plan in own) for index in range(intervals))
        mean_wh = sum(sum(plan.energies_wh) for plan in own) // intervals
        hydros = devices_of_each // 2
        for index in range(devices_of_each):
            source = Source.HYDRO if index < hydros else second
            size_wh = most_wh * 3 // 2 // hydros if index < hydros else mean_wh // 2 // (devices_of_each - hydros)
            energies_wh = generated_wh(source, size_wh, place + index, intervals)
            devices.append(DevicePlan(f"{name}-d{index:02}", f"{name}-o{index % 3}", name, source, energies_wh))
    return ManyPlan(Plan(tuple(names), names[0], tuple(consumers), tuple(devices)), links, frozenset(ample))


def _contract(
    kind: int, second: Source, next_to: Source
) -> tuple[tuple[tuple[str, int], ...], ShortageChoice, tuple[str, ...]]:
    """Shares in percent, what to do in a shortage, substitutes."""
    match kind:
        case 0:
            return (("hydro", 60), ("any", 40)), ShortageChoice.UNMATCHED, ()
        case 1:
            return ((second.label, 50), ("hydro", 50)), ShortageChoice.UNMATCHED, ()
        case 2:
            return ((next_to.label, 40), ("hydro", 60)), ShortageChoice.ANY, ()
        case 3:
            return (("solar", 40), ("wind", 30), ("any", 30)), ShortageChoice.UNMATCHED, ()
        case 4:
            return ((next_to.label, 100),), ShortageChoice.SUBSTITUTES, ("biomass", "natural_gas")
        case _:
            return (("renewable", 70), ("fossil", 30)), ShortageChoice.UNMATCHED, ()


# The network


@dataclass(slots=True)
class QuickLink(SimulatedLink):
    """Messages on their way keep their order by sender and topic only. `poll` takes all that are there, or some."""

    under_way: dict[tuple[str, str], deque[tuple[Message, bool]]] = field(default_factory=dict)

    def poll(self, timeout_s: float) -> list[Incoming]:
        return [self.ready.popleft() for _ in range(self.random.randint(min(1, len(self.ready)), len(self.ready)))]

    def arrive(self) -> None:
        """Of somebody's messages, the first."""
        kinds = list(self.under_way)
        kind = kinds[self.random.randrange(len(kinds))]
        message, retained = self.under_way[kind].popleft()
        if not self.under_way[kind]:
            del self.under_way[kind]
        self.numbered += 1
        self.ready.append(
            Incoming(message.topic, message.payload, retained, message.qos, self.numbered, self.connections)
        )


class QuickServer(SimulatedServer):
    """Knows who has subscribed to a topic, and hands meters their answers at once."""

    def __init__(self, generator: random.Random) -> None:
        super().__init__(generator, Faults())
        self.answer: dict[str, Callable[[bytes], None]] = {}
        """By topic."""
        self.touched: Callable[[str], None] = lambda _name: None
        """Called with the name of a link that messages are under way to."""
        self._subscribers: dict[str, list[QuickLink]] = {}

    def add(self, link: SimulatedLink) -> None:
        super().add(link)
        self._subscribers.clear()

    def connect(self, name: str) -> None:
        super().connect(name)
        link = self.links[name]
        assert isinstance(link, QuickLink)
        for message, retained in link.waiting:
            self._send_to(link, message, retained)
        link.waiting.clear()

    def route(self, message: Message) -> None:
        answer = self.answer.get(message.topic)
        if answer is not None:
            answer(message.payload)
            return
        if message.retain:
            self.retained[message.topic] = message
        for link in self._subscribers_of(message.topic):
            if link.connected:
                self._send_to(link, message, False)

    def _subscribers_of(self, topic: str) -> list[QuickLink]:
        if topic not in self._subscribers:
            links = [link for link in self.links.values() if self._subscribed(link, topic)]
            self._subscribers[topic] = [link for link in links if isinstance(link, QuickLink)]
        return self._subscribers[topic]

    def _send_to(self, link: QuickLink, message: Message, retained: bool) -> None:
        link.under_way.setdefault((message.sender, message.topic), deque()).append((message, retained))
        self.touched(link.name)


class _Ready:
    """Names of which one is drawn at random, in constant time."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._places: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._names)

    def add(self, name: str) -> None:
        if name not in self._places:
            self._places[name] = len(self._names)
            self._names.append(name)

    def draw(self, generator: random.Random) -> str:
        place = generator.randrange(len(self._names))
        name, last = self._names[place], self._names.pop()
        if name != last:
            self._names[place] = last
            self._places[last] = place
        del self._places[name]
        return name


@dataclass(slots=True)
class Heard:
    """What meters were told, added up; the messages themselves would fill the memory in a week."""

    accepted: int = 0
    unmatched_wh: dict[tuple[str, int], int] = field(default_factory=dict)


@contextlib.contextmanager
def verified_once() -> Iterator[None]:
    """Twenty brokers in one process verify each block's signature; what the first has found holds for the others.

    A signature is right or wrong whoever looks at it, so this changes how long a run takes and nothing else.
    """
    original = PublicKey.verifies

    @lru_cache(maxsize=4_096)
    def verifies(public: PublicKey, signature: bytes, message: bytes) -> bool:
        return original(public, signature, message)

    def shared(public: PublicKey, signature: bytes, message: bytes) -> bool:
        return verifies(public, signature, message)

    PublicKey.verifies = shared  # type: ignore[method-assign]
    try:
        yield
    finally:
        PublicKey.verifies = original  # type: ignore[method-assign]


class ManyWorld(World):
    """A `World` of many; only undisturbed runs."""

    link_type = QuickLink

    def __init__(self, many: ManyPlan, folder: Path, seed: int = 0) -> None:
        self.links = many.links
        self._energies_wh: dict[str, tuple[int, ...]] = {}
        self._ready = _Ready()
        """Links that messages are under way to, and meters that have something to say."""
        self._due = _Ready()
        """Brokers that have a turn to take."""
        self._link_names: dict[str, str] = {}
        self._to_send: dict[str, bytes] = {}
        self._sent_intervals = 0
        self.heard = Heard()
        super().__init__(many.plan, folder, seed)
        self._signers = {name: Signer(name, key(name).public) for name in self.brokers}
        server = QuickServer(self.random)
        server.touched = self._touch
        for meter in self.meters.values():
            for leaf in ("receipt", "delivery"):
                server.answer[self.topics.meter(meter.broker, meter.name, leaf)] = self._answer_to(meter)
        self.server: QuickServer = server

    def _config(self, name: str) -> BrokerConfig:
        config = super()._config(name)
        return replace(config, neighbours=tuple(one for one in config.neighbours if one.name in self.links[name]))

    def _add_meter(self, name: str, broker: str, kind: MessageType, energies_wh: Iterable[int]) -> None:
        link = SimulatedLink(f"agent-{name}", [], lambda _what: None, self.random)
        self.meters[name] = Meter(name, broker, kind, link)
        self._energies_wh[name] = tuple(energies_wh)

    def _moment(self, process: BrokerProcess, what: str) -> None:
        """Nobody is killed."""

    def _touch(self, name: str) -> None:
        self._ready.add(name)

    # Meters

    def _send_due(self) -> None:
        """Each interval that is over: all meters have something to say."""
        while T0 + (self._sent_intervals + 1) * INTERVAL_S <= self.market_time_s:
            index = self._sent_intervals
            for name, energies_wh in self._energies_wh.items():
                if index < len(energies_wh):
                    value = self.meter_value(name, T0 + index * INTERVAL_S, energies_wh[index])
                    self._to_send[name] = self.signed(value, name)
                    self._ready.add(name)
            self._sent_intervals += 1

    def _next_time_s(self) -> int:
        now = self.market_time_s
        boundary = now - now % INTERVAL_S
        steps = (GATE_1_S, (GATE_1_S + GATE_2_S) // 2, GATE_2_S, INTERVAL_S)
        return next(boundary + step for step in steps if boundary + step > now)

    def _answer_to(self, meter: Meter) -> Callable[[bytes], None]:
        signer = Signer(meter.broker, key(meter.broker).public)

        def take(payload: bytes) -> None:
            message = open_envelope(payload, LEDGER, lambda _key_id: signer).message
            if isinstance(message, Delivery):
                delivered_wh = sum(line.energy_wh for line in message.lines)
                assert delivered_wh + message.unmatched_wh == message.demanded_wh
                self.heard.unmatched_wh[meter.name, message.start_s] = message.unmatched_wh
            else:
                assert isinstance(message, Receipt)
                assert message.status is ReceiptStatus.ACCEPTED, message
                self.heard.accepted += 1

        return take

    # The run

    def run(self, until_s: int | None = None) -> Books:
        with verified_once():
            return super().run(until_s)

    def _at_rest(self) -> bool:
        services = [process.service for process in self.brokers.values() if process.service is not None]
        return all(self._rests(service) for service in services) and self._wait_for_each_other(services)

    def _turn_for_all(self) -> None:
        for process in self.brokers.values():
            process.wants_turn = True
            self._due.add(process.name)

    def _move_until_quiet(self) -> None:
        for process in self.brokers.values():
            if process.service is None:
                self._start(process)
                assert process.link is not None
                self._link_names[process.link.name] = process.name
                self._due.add(process.name)
                self.server.connect(process.link.name)
        while self._ready or self._due:
            # As between real processes, more than one message has come by the time somebody turns to them.
            if self._due and (not self._ready or self.random.randrange(8) == 0):
                self._turn(self.brokers[self._due.draw(self.random)])
            else:
                self._step(self._ready.draw(self.random))

    def _step(self, name: str) -> None:
        """A meter sends, or messages arrive at a broker."""
        raw = self._to_send.pop(name, None)
        if raw is not None:
            meter = self.meters[name]
            topic = self.topics.meter(meter.broker, name, meter.kind.name.lower())
            self.server.route(Message(f"agent-{name}", topic, raw, 1, False))
            return
        link = self.server.links[name]
        assert isinstance(link, QuickLink)
        link.arrive()
        if link.under_way:
            self._ready.add(name)
        self._due.add(self._link_names[name])

    def _turn(self, process: BrokerProcess) -> None:
        """A broker takes its turn, and what it says goes out."""
        assert process.service is not None
        assert process.link is not None
        process.service.turn()
        while process.link.outgoing:
            self.server.route(process.link.outgoing.popleft())
        if process.service._busy or process.link.ready:
            self._due.add(process.name)
