"""A pretended MQTT server: delays, mixes, loses and doubles messages as one random generator tells it. No sockets.

Each client has a `SimulatedLink`, which looks to its owner like `broker.protocol.mqtt_link.MqttLink`. A message goes
two hops, from the sender's `outgoing` to the server and from there into each subscriber's `waiting`; who asks the
server to `carry` decides when. What a real server and TCP promise holds here too: messages of one sender on one topic
to one subscriber keep their order, and QoS 1 messages are lost only with a connection, after which the client has a new
one and its subscriptions are answered with the retained messages.
"""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from broker.protocol.mqtt_link import Incoming


@dataclass(frozen=True, slots=True)
class Faults:
    """How badly the network behaves, in percent of messages."""

    lost: int = 0
    """Of QoS 0 messages."""
    doubled: int = 0
    reordered: int = 0
    """Overtaken by a message of another topic."""


@dataclass(frozen=True, slots=True)
class Message:
    """What is under way: sender, topic, payload, and how it was published."""

    sender: str
    topic: str
    payload: bytes
    qos: int
    retain: bool


Partition = Callable[[Message, str], bool]
"""Whether a message cannot reach this subscriber."""


@dataclass(slots=True)
class SimulatedLink:
    """One client's connection."""

    name: str
    subscriptions: list[tuple[str, int]]
    before: Callable[[str], None]
    """Called with the name of what the owner is about to do: where a process can be killed."""
    random: random.Random
    connected: bool = False
    connections: int = 0
    outgoing: deque[Message] = field(default_factory=deque)
    waiting: list[tuple[Message, bool]] = field(default_factory=list)
    """Messages on their way here, and whether each is a retained one that answers a subscription."""
    ready: deque[Incoming] = field(default_factory=deque)
    numbered: int = 0
    last_failure: str = ""

    def poll(self, timeout_s: float) -> list[Incoming]:
        """Some of the messages that are there, oldest first; never waits."""
        count = self.random.randint(1, 8)
        return [self.ready.popleft() for _ in range(min(count, len(self.ready)))]

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        self.before("publish")
        if self.connected:
            self.outgoing.append(Message(self.name, topic, payload, qos, retain))

    def acknowledge(self, incoming: Incoming) -> None:
        self.before("acknowledge")

    def flush(self) -> None:
        """Nothing is buffered."""

    def wake(self) -> None:
        """Nothing ever waits."""

    def close(self) -> None:
        """The server forgets the client when it is disconnected."""


class SimulatedServer:
    """Carries messages between links, one step at a time."""

    def __init__(self, generator: random.Random, faults: Faults) -> None:
        self.random = generator
        self.faults = faults
        self.links: dict[str, SimulatedLink] = {}
        self.retained: dict[str, Message] = {}
        self.partition: Partition | None = None
        self.listeners: list[Callable[[Message], None]] = []

    def add(self, link: SimulatedLink) -> None:
        """A client, not connected yet; one of the same name is gone."""
        self.links[link.name] = link

    def connect(self, name: str) -> None:
        """A fresh connection with a clean start."""
        link = self.links[name]
        link.connected = True
        link.connections += 1
        for message in self.retained.values():
            if self._subscribed(link, message.topic) and not self._kept_away(message, name):
                link.waiting.append((message, True))

    def disconnect(self, name: str) -> None:
        """The connection breaks: what is under way to the client is lost, of what it sent only a beginning arrives."""
        link = self.links[name]
        link.connected = False
        for _ in range(self.random.randint(0, len(link.outgoing))):
            self.route(link.outgoing.popleft())
        link.outgoing.clear()
        link.waiting.clear()
        link.ready.clear()

    def steps(self) -> list[tuple[str, str]]:
        """What `carry` could do now: ("out" or "in", client)."""
        possible = []
        for name, link in self.links.items():
            if link.outgoing:
                possible.append(("out", name))
            if link.waiting:
                possible.append(("in", name))
        return possible

    def carry(self, direction: str, name: str) -> None:
        """Move one message on."""
        link = self.links[name]
        if direction == "out":
            self.route(link.outgoing.popleft())
            return
        message, retained = link.waiting.pop(self._next(link))
        if message.qos == 0 and self._chance(self.faults.lost):
            return
        link.numbered += 1
        incoming = Incoming(message.topic, message.payload, retained, message.qos, link.numbered, link.connections)
        link.ready.append(incoming)
        if self._chance(self.faults.doubled):
            link.ready.append(incoming)

    @property
    def quiet(self) -> bool:
        """True when nothing is under way."""
        return not any(link.outgoing or link.waiting or link.ready for link in self.links.values())

    def _next(self, link: SimulatedLink) -> int:
        """The first message, or now and then the first of another sender or topic."""
        if not self._chance(self.faults.reordered):
            return 0
        chosen = self.random.randrange(len(link.waiting))
        kind = (link.waiting[chosen][0].sender, link.waiting[chosen][0].topic)
        return next(index for index, (message, _) in enumerate(link.waiting) if (message.sender, message.topic) == kind)

    def route(self, message: Message) -> None:
        """The server has a message: it goes to all subscribers."""
        for listener in self.listeners:
            listener(message)
        if message.retain:
            self.retained[message.topic] = message
        for link in self.links.values():
            if link.connected and self._subscribed(link, message.topic) and not self._kept_away(message, link.name):
                link.waiting.append((message, False))

    def _kept_away(self, message: Message, subscriber: str) -> bool:
        return self.partition is not None and self.partition(message, subscriber)

    def _chance(self, percent: int) -> bool:
        return percent > 0 and self.random.randrange(100) < percent

    @staticmethod
    def _subscribed(link: SimulatedLink, topic: str) -> bool:
        levels = topic.split("/")
        for pattern, _ in link.subscriptions:
            wanted = pattern.split("/")
            if len(wanted) == len(levels) and all(
                want in ("+", level) for want, level in zip(wanted, levels, strict=True)
            ):
                return True
        return False
