"""The broker's event loop: one thread, one turn after the other.

A turn takes in the messages that have come, lets the broker decide, commits its store once, then hands batches to the
ledger (its own, if it hosts one, is committed in the same turn), publishes what the turn made, and only then
acknowledges what it took in. So nothing is acknowledged or answered before its effect is on disk, and one disk
synchronisation serves a whole turn.
"""

import contextlib
import gc
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final, Protocol

from broker.config import BrokerConfig, CometbftSection, load_genesis, parse_public_key
from broker.ledger.chain import genesis_hash
from broker.ledger.client import BlockApplied, LedgerClient, LedgerFault, TooManyPending
from broker.ledger.embedded import EmbeddedLedger
from broker.ledger.gateway import Gateway, Outgoing
from broker.market.tariff import Tariff
from broker.protocol.envelope import Signer, open_envelope
from broker.protocol.errors import ProtocolError
from broker.protocol.keys import load_private_key, public_key_from_cose
from broker.protocol.messages import MAX_WAITS, BrokerStatus, Genesis, Report, Stage, Tick, Witness
from broker.protocol.mqtt_link import Incoming, MqttConfig, MqttLink
from broker.protocol.topics import Topics
from broker.service.certificates import CertificateDesk, CertificateProcess
from broker.service.core import Broker, Neighbour
from broker.service.orders_in import PartnerPolicy
from broker.service.outputs import Identity, Publication
from broker.service.store import BrokerStore
from firmware_config.loader import ConfigError

if TYPE_CHECKING:
    from broker.ledger.cometbft.engine import CometbftLedger

LOG: Final = logging.getLogger("energy-broker")
LONGEST_WAIT_S: Final = 1.0
"""The loop looks at clocks and at the store's other writers at least this often."""

STATUS_EVERY_S: Final = 60.0

WITNESS_EVERY_S: Final = 10.0
"""How often a broker co-signs the ledger's head: soon enough to find a fork, and nothing beside its other messages."""

GARBAGE_THRESHOLDS: Final = (50_000, 20, 50)
"""When Python looks for reference cycles (`gc.set_threshold`). A turn makes many values and no cycles, and by default a
tenth of the broker's time goes into looking at them all the same.
"""

_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


def run_broker(config: BrokerConfig, *, recovers: bool = False) -> int:
    """Run until SIGTERM or SIGINT; returns the exit code.

    `recovers`: the database may be an older one, and takes back from the ledger what it has forgotten.
    """
    genesis = load_genesis(config.ledger.genesis_file)
    if config.broker.clock == "conductor" and genesis.conductor is None:
        raise ConfigError(config.ledger.genesis_file, "simulated", "a simulated ledger with a conductor")
    with contextlib.ExitStack() as stack:
        service = BrokerService(config, genesis, stack, recovers=recovers)
        stopping: list[int] = []

        def stop(number: int, _frame: FrameType | None) -> None:
            stopping.append(number)
            service.wake()

        for number in _STOP_SIGNALS:
            signal.signal(number, stop)
        LOG.info("broker %s runs on ledger %s", config.broker.name, genesis.ledger)
        gc.freeze()  # What is there by now stays, so it need not be looked at again.
        gc.set_threshold(*GARBAGE_THRESHOLDS)
        while not stopping:
            service.turn()
        # Asked once is enough: a second word must not break off the end, nor change how it is reported.
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        service.say_goodbye()
    return 0


class Link(Protocol):
    """What the loop needs of an `MqttLink`."""

    connected: bool
    connections: int

    @property
    def last_failure(self) -> str: ...

    def poll(self, timeout_s: float) -> list[Incoming]: ...

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None: ...

    def acknowledge(self, incoming: Incoming) -> None: ...

    def flush(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


class OpenLink(Protocol):
    """Makes the link: MQTT configuration, client id, subscriptions with QoS, and topic and payload of the will."""

    def __call__(
        self, config: MqttConfig, client_id: str, subscriptions: list[tuple[str, int]], *, will: tuple[str, bytes]
    ) -> Link: ...


class BrokerService:
    """Wires a Broker to MQTT, clock, store and ledger.

    `monotonic_s` is for time-outs, `calendar_s` is market time where no conductor ticks it. These, link and randomness
    come from outside, so that a simulation can put its own in their place.
    """

    def __init__(
        self,
        config: BrokerConfig,
        genesis: Genesis,
        stack: contextlib.ExitStack,
        *,
        open_link: OpenLink = MqttLink,
        monotonic_s: Callable[[], float] = time.monotonic,
        calendar_s: Callable[[], float] = time.time,
        random_bytes: Callable[[int], bytes] = os.urandom,
        clock_waits: bool = False,
        recovers: bool = False,
    ) -> None:
        """`clock_waits`: `calendar_s` stands still while this broker is not idle, as a conductor's time does."""
        key = load_private_key(config.broker.key_file)
        self._name = config.broker.name
        self._topics = Topics(config.mqtt.root)
        self._identity = Identity(self._name, key, genesis.ledger)
        self._genesis = genesis
        self._simulated = config.broker.clock == "conductor"
        self._store = BrokerStore(config.database)
        stack.callback(self._store.close)
        neighbours = {
            neighbour.name: Neighbour(
                parse_public_key(neighbour.key),
                PartnerPolicy(neighbour.is_served, neighbour.is_asked, neighbour.most_wh),
            )
            for neighbour in config.neighbours
        }
        self._store.begin()
        self._broker = Broker(
            self._identity,
            genesis,
            self._topics,
            self._store,
            neighbours,
            config.market.highest_price,
            Tariff(config.market.consumer_margin, config.market.neighbour_margin),
            passes_on=config.market.passes_on,
            own_groups_first=config.market.own_groups_first,
            keeps_for_windows=config.market.keeps_for_windows,
            arranges_ahead=config.market.arranges_ahead,
            clock_waits=clock_waits or self._simulated,
            jitter=lambda: random_bytes(1)[0],
            recovers=recovers,
        )
        self._store.commit()
        self._monotonic_s = monotonic_s
        self._calendar_s = calendar_s
        self._cursor = self._store.ledger_cursor()
        if recovers and self._cursor is None:
            # Copied before it ran for the first time: what it has forgotten begins with the first block.
            self._cursor = 0, genesis_hash(genesis)
        self._client = LedgerClient(
            genesis, self._name, key, random_bytes, resume=self._cursor, holdings_from_s=self._broker.stock_from_s
        )
        self._network: CometbftLedger | None = None
        self._gateway = self._open_gateway(config, genesis, stack)
        self._serves = config.ledger.host is not None or (
            config.ledger.cometbft is not None and config.ledger.cometbft.gateway is not None
        )
        will = self._identity.seal(BrokerStatus(self._name, False, 0, version("dengen")))
        self._link = open_link(
            config.mqtt,
            f"broker-{self._name}",
            self._subscriptions(),
            will=(self._topics.broker_status(self._name), will),
        )
        stack.callback(self._link.close)
        if self._network is not None:
            self._network.start(self._link.wake)
        process = CertificateProcess(config, self._link.wake)
        stack.callback(process.close)
        self._certificates = CertificateDesk(self._identity, self._topics, self._store, process.make)
        self._conductor = self._conductor_signer(genesis)
        self._tick: Tick | None = None
        self._report: Report | None = None
        self._unsent: deque[bytes] = deque()
        self._connections = 0
        self._told_failure = ""
        self._next_status_s = 0.0
        self._evidence_folder = config.database.parent
        self._co_signed: bytes | None = None
        self._next_witness_s = 0.0
        self._busy = True

    def _open_gateway(self, config: BrokerConfig, genesis: Genesis, stack: contextlib.ExitStack) -> Gateway | None:
        if config.ledger.cometbft is not None:
            return self._join_network(config.ledger.cometbft, genesis, stack)
        host = config.ledger.host
        if host is None:
            return None
        key = load_private_key(host.key_file)
        engine = EmbeddedLedger(host.path, genesis, host.validator, key)
        stack.callback(engine.close)
        gateway = Gateway(engine, self._topics, host.validator, key)
        stack.callback(gateway.close)
        return gateway

    def _join_network(self, network: CometbftSection, genesis: Genesis, stack: contextlib.ExitStack) -> Gateway:
        from broker.ledger.cometbft.engine import CometbftLedger
        from broker.ledger.cometbft.rpc import HttpNode

        nodes = [HttpNode(url, network.timeout_s) for url in network.nodes]
        own = Signer(self._name, self._identity.key.public)
        known_height = 0 if self._cursor is None else self._cursor[0]
        self._network = CometbftLedger(genesis, nodes, own, known_height=known_height)
        stack.callback(self._network.close)
        if network.gateway is None:
            # Only this broker hears it, so it may sign its answers as itself.
            gateway = Gateway(self._network, self._topics, self._name, self._identity.key)
        else:
            key = load_private_key(network.gateway.key_file)
            gateway = Gateway(self._network, self._topics, network.gateway.validator, key)
        stack.callback(gateway.close)
        return gateway

    def _conductor_signer(self, genesis: Genesis) -> Signer | None:
        if not self._simulated or genesis.conductor is None:
            return None
        return Signer(genesis.conductor.name, public_key_from_cose(genesis.conductor.key))

    def _subscriptions(self) -> list[tuple[str, int]]:
        filters = [*self._broker.subscriptions(), (self._topics.meter(self._name, "+", "certificate"), 1)]
        ledger = self._genesis.ledger
        if self._gateway is None:
            filters.append((self._topics.ledger_result(ledger, self._name), 1))
            filters.append((self._topics.ledger_feed(ledger), 1))
            filters.append((self._topics.ledger_checkpoint(ledger), 1))
        elif self._serves:
            filters.append((self._topics.ledger_submit(ledger), 1))
        filters.append((self._topics.ledger_witness(ledger, "+"), 0))
        if self._simulated:
            filters.append((self._topics.time, 1))
        return filters

    def wake(self) -> None:
        """Make a waiting `turn` return; for signal handlers."""
        self._link.wake()

    def turn(self) -> None:
        """Wait for something to do, do it, commit, answer, acknowledge."""
        incoming = self._link.poll(0.0 if self._busy else self._wait_s())
        now_s = self._monotonic_s()
        if self._store.changed_by_others():
            self._broker.registrations_changed()
        self._store.begin()
        answers: list[Outgoing] = []
        if self._link.connections != self._connections:
            self._connections = self._link.connections
            self._on_connect(now_s, answers)
        self._tell_failure()
        if not self._simulated:
            self._broker.set_time(int(self._calendar_s()))
        for message in incoming:
            self._take(message, answers)
        self._take_ledger_events()
        if self._resend_due(now_s):
            self._broker.send_again(now_s)
        self._broker.advance(now_s)
        self._store.commit()
        outputs: list[Publication] = []
        self._broker.outputs.hand_over(outputs.append, self._unsent.append, LOG.warning)
        submissions = self._submissions(now_s)
        if submissions or not self._broker.idle:
            # Before anything that this work causes can reach others: docs/architecture.md, simulated time. A turn that
            # leaves nothing open has only answered those who are still at work themselves.
            self._publish_busy()
        self._feed_ledger(submissions, answers)
        self._publish([*outputs, *self._certificates.publications()], answers)
        self._broker.handed_over(connected=self._link.connected)
        self._publish_witness(now_s)
        for message in incoming:
            self._link.acknowledge(message)
        self._busy = self._client.has_events or self._certificates.has_more or self._broker.unfinished
        if not self._client.has_events:
            self._publish_report()
        if now_s >= self._next_status_s:
            self._publish_status(online=True)
        self._link.flush()

    def _wait_s(self) -> float:
        resend_at_s = self._broker.next_resend_at_s()
        if resend_at_s is None:
            return LONGEST_WAIT_S
        return min(LONGEST_WAIT_S, max(0.0, resend_at_s - self._monotonic_s()))

    def _resend_due(self, now_s: float) -> bool:
        resend_at_s = self._broker.next_resend_at_s()
        return resend_at_s is not None and resend_at_s <= now_s

    def _tell_failure(self) -> None:
        """Say once why there is no connection; it is tried again and again without another word."""
        failure = "" if self._link.connected else self._link.last_failure
        if failure and failure != self._told_failure:
            LOG.warning("no connection to MQTT: %s; trying again, what is stored is sent then", failure)
        self._told_failure = failure

    def _on_connect(self, now_s: float, answers: list[Outgoing]) -> None:
        LOG.info("connected to MQTT")
        self._broker.reconnected(now_s)
        self._client.on_connect()
        if self._gateway is not None:
            answers.extend(self._gateway.start())
        self._report = None
        self._next_status_s = 0.0

    def _take(self, message: Incoming, answers: list[Outgoing]) -> None:
        levels = self._topics.split(message.topic)
        match levels:
            case ("time",):
                self._take_tick(message.payload)
            case ("brokers", self._name, "meters", meter, "certificate"):
                self._take_certificate_request(meter, message.payload)
            case ("ledger", _, "submit") if self._gateway is not None:
                self._take_submission(message.payload, answers)
            case ("ledger", _, "checkpoint", party):
                self._take_witness(party, message.payload)
            case ("ledger", _, "feed" | "checkpoint" as leaf) | ("ledger", _, "result" as leaf, _):
                self._take_from_ledger(leaf, message.payload)
            case _:
                self._broker.take_message(levels, message.payload)

    def _take_certificate_request(self, meter: str, payload: bytes) -> None:
        try:
            self._certificates.take(meter, payload)
        except ProtocolError as error:
            LOG.warning("a request for a certificate on %s's topic is ignored: %s", meter, error)

    def _take_tick(self, payload: bytes) -> None:
        if self._conductor is None:
            return
        conductor = self._conductor
        try:
            opened = open_envelope(
                payload, self._genesis.ledger, lambda key_id: conductor if key_id == conductor.key.key_id else None
            )
        except ProtocolError as error:
            LOG.warning("a tick is ignored: %s", error)
            return
        tick = opened.message
        if isinstance(tick, Tick) and tick.stage is Stage.MARKET:
            if tick == self._tick:
                self._report = None  # Sent again, so whoever asks has not heard our report.
            self._tick = tick
            self._broker.set_time(tick.time_s)

    def _take_submission(self, payload: bytes, answers: list[Outgoing]) -> None:
        assert self._gateway is not None
        try:
            answers.extend(self._gateway.on_message(payload))
        except ProtocolError as error:
            LOG.warning("a message about the ledger is ignored: %s", error)

    def _take_from_ledger(self, leaf: str, payload: bytes, own_node: bool = False) -> None:
        try:
            self._client.on_message(leaf, payload, own_node)
        except ProtocolError as error:
            LOG.warning("a message about the ledger is ignored: %s", error)

    def _take_witness(self, party: str, payload: bytes) -> None:
        """Another party says to which head of the ledger it was led; the client compares it with its own."""
        if party == self._name:
            return
        try:
            self._client.on_witness(payload)
        except ProtocolError as error:
            LOG.warning("what %s witnesses is ignored: %s", party, error)

    def _publish_witness(self, now_s: float) -> None:
        """Co-sign the head that this broker's own following led to, at most every WITNESS_EVERY_S."""
        checkpoint = self._client.witnessed
        if checkpoint is None or checkpoint == self._co_signed or now_s < self._next_witness_s:
            return
        if not self._link.connected:
            return
        topic = self._topics.ledger_witness(self._genesis.ledger, self._name)
        self._link.publish(topic, self._identity.seal(Witness(checkpoint)), qos=0, retain=True)
        self._co_signed, self._next_witness_s = checkpoint, now_s + WITNESS_EVERY_S

    def _keep_evidence(self, fault: LedgerFault) -> None:
        """Write what convicts the ledger beside the database, before anything else can go wrong."""
        if fault.evidence is None:
            return
        path = self._evidence_folder / f"evidence-{self._genesis.ledger}-{fault.height}.cbor"
        if not path.exists():
            _write_durably(path, fault.evidence.to_bytes())
        LOG.error(
            "%s holds two contradicting messages that validators of ledger %s signed; show it to the other parties,"
            " who check it with `energy-broker ledger evidence`",
            path,
            self._genesis.ledger,
        )

    def _take_ledger_events(self) -> None:
        """Take in what the ledger client saw; how far it got is in the same commit as what came of it."""
        events = self._client.events()
        for event in events:
            if isinstance(event, LedgerFault):
                self._keep_evidence(event)
            self._broker.take_event(event)
        if self._client.loaded or any(isinstance(event, BlockApplied) for event in events):
            self._keep_cursor()

    def _keep_cursor(self) -> None:
        """After a restart the events of the blocks from here on come again, and none before."""
        cursor = self._client.height, self._client.block_id
        if cursor != self._cursor:
            self._store.set_ledger_cursor(*cursor)
            self._cursor = cursor

    def _submissions(self, now_s: float) -> list[bytes]:
        """What is to be said to the ledger now: new batches, questions, and what is overdue."""
        for device, start_s in self._broker.questions:
            self._client.ask_made(device, start_s)
        self._broker.questions.clear()
        unknown = self._broker.unknown_devices
        while unknown:
            try:
                self._client.ask_device(unknown[0])
            except TooManyPending:
                break
            del unknown[0]
        while self._unsent:
            try:
                self._client.submit(self._unsent[0])
            except TooManyPending:
                break  # They are stored; the next turns submit them as answers come in.
            self._unsent.popleft()
        return self._client.tick(now_s)

    def _feed_ledger(self, submissions: list[bytes], answers: list[Outgoing]) -> None:
        """Submit; where the ledger is here, commit it and take its word in at once."""
        if self._gateway is None:
            topic = self._topics.ledger_submit(self._genesis.ledger)
            for raw in submissions:
                self._link.publish(topic, raw)
            return
        for raw in submissions:
            self._take_submission(raw, answers)
        answers.extend(self._gateway.commit())
        for outgoing in self._own_answers(answers):
            own_node = self._network is not None
            self._take_from_ledger(self._topics.split(outgoing.topic)[2], outgoing.payload, own_node)

    def _own_answers(self, answers: list[Outgoing]) -> Iterator[Outgoing]:
        """What the ledger here says to everyone or to this broker."""
        own = self._topics.ledger_result(self._genesis.ledger, self._name)
        prefix = self._topics.ledger_result(self._genesis.ledger, "")
        for outgoing in answers:
            if outgoing.topic == own or not outgoing.topic.startswith(prefix):
                yield outgoing

    def _publish(self, outputs: list[Publication], answers: list[Outgoing]) -> None:
        own = self._topics.ledger_result(self._genesis.ledger, self._name)
        for outgoing in answers:
            if self._serves and outgoing.topic != own:
                self._link.publish(outgoing.topic, outgoing.payload, qos=outgoing.qos, retain=outgoing.retain)
        for publication in outputs:
            self._link.publish(publication.topic, publication.payload, qos=publication.qos, retain=publication.retain)

    # Simulated time

    def _publish_busy(self) -> None:
        if self._tick is not None and (self._report is None or self._report.idle):
            self._send_report(idle=False)

    def _publish_report(self) -> None:
        """Tell the conductor where this broker stands, if it has changed."""
        if self._tick is None:
            return
        self._send_report(idle=self._broker.idle and not self._unsent)

    def _send_report(self, *, idle: bool) -> None:
        tick = self._tick
        if tick is None:
            return
        waits_for, holds = sorted(self._broker.waits_for), sorted(self._broker.holds)
        report = Report(
            self._name,
            tick.time_s,
            tick.stage,
            # Who waits for more than a report can say has to be waited for.
            idle and len(waits_for) <= MAX_WAITS,
            self._broker.next_wake_s(),
            self._client.height,
            tuple(waits_for[:MAX_WAITS]),
            tuple(holds[:MAX_WAITS]),
        )
        if report != self._report and self._link.connected:
            # QoS 0: the conductor asks again each second.
            self._link.publish(self._topics.report(self._name), report.to_bytes(), qos=0, retain=True)
            self._report = report

    # Status

    def _publish_status(self, *, online: bool) -> None:
        status = BrokerStatus(self._name, online, self._broker.market_time_s or 0, version("dengen"))
        self._link.publish(self._topics.broker_status(self._name), self._identity.seal(status), retain=True)
        self._next_status_s = self._monotonic_s() + STATUS_EVERY_S

    def say_goodbye(self) -> None:
        """Before a proper stop: the retained status says that this broker is away."""
        self._publish_status(online=False)
        self._link.flush()


def _write_durably(path: Path, content: bytes) -> None:
    """The file is there whole, or not at all. Raises OSError."""
    beside = path.with_name(path.name + ".new")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
