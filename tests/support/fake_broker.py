"""A small broker for tests of the agent: it collects what agents say, answers receipts, and can be the conductor."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from broker.protocol.envelope import Signer, open_envelope, seal
from broker.protocol.keys import PrivateKey, generate_private_key
from broker.protocol.messages import (
    Message,
    MeterStatus,
    MeterValue,
    Receipt,
    ReceiptStatus,
    Report,
    Stage,
    Tick,
)
from broker.protocol.mqtt_link import MqttConfig, MqttLink
from broker.protocol.topics import Topics

LEDGER = "demo"
T0 = 1_700_000_000 // 1800 * 1800
BROKER_KEY = generate_private_key()
CONDUCTOR_KEY = generate_private_key()
TOPICS = Topics()

Policy = Callable[[MeterValue], ReceiptStatus | None]


def accept(_value: MeterValue) -> ReceiptStatus:
    return ReceiptStatus.ACCEPTED


def say_nothing(_value: MeterValue) -> None:
    return None


@dataclass
class FakeBroker:
    """Collects what agents say, answers receipts by its policy, and can speak as the conductor."""

    mqtt: MqttConfig
    meter_keys: dict[str, PrivateKey]
    policy: Policy = accept
    clear_after_s: int | None = None
    """How long after an interval its receipt says that it will be cleared; None: it does not say."""
    raw: list[bytes] = field(default_factory=list)
    values: list[MeterValue] = field(default_factory=list)
    statuses: list[MeterStatus] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)

    def __post_init__(self) -> None:
        subscriptions = [(TOPICS.meter("east", "+", "+"), 1), (TOPICS.report("+"), 1)]
        self._link = MqttLink(self.mqtt, "east", subscriptions)
        self._stop = threading.Event()
        self._outgoing: list[tuple[str, bytes, bool]] = []
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def tick(self, time_s: int, key: PrivateKey = CONDUCTOR_KEY) -> None:
        self._send(TOPICS.time, seal(Tick(time_s, Stage.MARKET), key, LEDGER, "conductor"), retain=True)

    def say(self, meter: str, leaf: str, message: Message, key: PrivateKey = BROKER_KEY) -> None:
        self._send(TOPICS.meter("east", meter, leaf), seal(message, key, LEDGER, "east"))

    def energies(self, meter: str = "house") -> dict[int, int]:
        """Interval starts after T0 and their Wh, each interval once."""
        return {value.start_s - T0: value.energy_wh for value in list(self.values) if value.meter == meter}

    def close(self) -> None:
        self._stop.set()
        self._link.wake()
        self._thread.join()
        self._link.close()

    def _send(self, topic: str, payload: bytes, retain: bool = False) -> None:
        self._outgoing.append((topic, payload, retain))
        self._link.wake()

    def _work(self) -> None:
        while not self._stop.is_set():
            for incoming in self._link.poll(5.0):
                self._take(incoming.topic, incoming.payload)
                self._link.acknowledge(incoming)
            while self._outgoing and self._link.connected:
                topic, payload, retain = self._outgoing.pop(0)
                self._link.publish(topic, payload, retain=retain)
            self._link.flush()

    def _take(self, topic: str, payload: bytes) -> None:
        levels = TOPICS.split(topic)
        if levels[0] == "time":
            report = Report.from_bytes(payload)
            self.reports.append(report)
            self.log.append("idle" if report.idle else "busy")
        elif levels[-1] in ("reading", "demand", "status"):
            meter = levels[-2]
            key = self.meter_keys[meter].public
            opened = open_envelope(payload, LEDGER, lambda _key_id: Signer(meter, key))
            message = opened.message
            if isinstance(message, MeterStatus):
                self.statuses.append(message)
                return
            assert isinstance(message, MeterValue)
            assert levels[-1] == message.TYPE.name.lower()
            self.raw.append(payload)
            self.values.append(message)
            self.log.append(f"value {message.start_s - T0}")
            status = self.policy(message)
            if status is not None:
                reason = None if status is ReceiptStatus.ACCEPTED else "as the test says"
                receipt = Receipt(
                    meter, message.TYPE, message.start_s, message.revision, status, opened.message_id, reason
                )
                if self.clear_after_s is not None and levels[-1] == "demand":
                    receipt = replace(receipt, clear_by_s=message.end_s + self.clear_after_s)
                self.say(meter, "receipt", receipt)
