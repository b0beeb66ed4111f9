"""Two brokers as processes on a real mosquitto, and somebody who speaks for all meters and for the conductor."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from dengen_testing.conductor import unmet
from dengen_testing.listener import Listener
from dengen_testing.market import (
    ConsumerPlan,
    DevicePlan,
    MarketPlan,
    MeterPlan,
    Workspace,
    build_market,
    energy_broker,
    table,
)
from dengen_testing.mosquitto import Mosquitto
from dengen_testing.processes import ManagedProcess, ProcessGroup, broker_process
from dengen_testing.waiting import WaitedTooLong

from broker.protocol.envelope import Signer, open_envelope, seal
from broker.protocol.keys import load_private_key
from broker.protocol.messages import (
    Carrier,
    Delivery,
    Demand,
    Message,
    Quality,
    Reading,
    Receipt,
    Report,
    Stage,
    Tick,
)
from broker.protocol.mqtt_link import Incoming
from broker.protocol.topics import Topics

T0: Final = 1_769_904_000
"""2026-02-01T00:00:00Z."""

INTERVAL_S: Final = 1_800
LEDGER: Final = "desk"
ATTEMPTS: Final = 80
RETRY_S: Final = 0.25
T = TypeVar("T")


def _meter(name: str) -> MeterPlan:
    return MeterPlan(name, "modbus_tcp", "iem3000", (1_000,), 0)


PLAN: Final = MarketPlan(
    LEDGER,
    ("east", "west"),
    "east",
    (
        ConsumerPlan(_meter("anna"), "east", (("solar", 60), ("wind", 40)), "unmatched"),
        ConsumerPlan(_meter("ben"), "west", (("wind", 100),), "unmatched"),
    ),
    (
        DevicePlan(_meter("roof"), "ola", "east", "solar", 4_000, 90_000, "a roof"),
        DevicePlan(_meter("mill"), "ola", "east", "wind", 4_000, 80_000, "a hill"),
        DevicePlan(_meter("dam"), "pia", "west", "hydro", 4_000, 70_000, "a valley"),
    ),
    T0,
    4,
)


class BrokerDesk:
    """The brokers of PLAN, running. Everything is said and heard over MQTT."""

    def __init__(self, folder: Path, mosquitto: Mosquitto, listener: Listener, processes: ProcessGroup) -> None:
        self.workspace: Workspace = build_market(PLAN, folder, folder / "ledger", mosquitto.mqtt_config())
        self.listener = listener
        self.topics = Topics()
        self.broker_of = {member.meter.name: member.broker for member in PLAN.members}
        self.brokers: dict[str, ManagedProcess] = {}
        for name in PLAN.brokers:
            self.brokers[name] = processes.add(broker_process(self.workspace.config(name))).start()
        self._now_s = T0 + 5
        self._tick()

    # Time

    def tick(self, time_s: int) -> None:
        """Market time moves on, once everything that was going on is done; returns when what this causes is, too."""
        for moment_s in (self._now_s, time_s):
            self._now_s = moment_s
            self._tick()

    def _tick(self) -> None:
        """Say the time and wait for fresh reports; brokers answer every copy."""
        key = load_private_key(self.workspace.key("conductor"))
        raw = seal(Tick(self._now_s, Stage.MARKET), key, LEDGER, "conductor")
        since = len(self.listener.messages)
        try:
            _until_answered(
                lambda: self.listener.publish(self.topics.time, raw, retain=True),
                lambda limit_s: self._settle(self._now_s, since, limit_s),
            )
        except WaitedTooLong as error:
            raise AssertionError(f"{error}\n{self._reports(since)}") from error

    def _reports(self, since: int) -> str:
        """The last reports and log lines of the brokers, for the message of a failure."""
        reports = [
            Report.from_bytes(message.payload)
            for message in self.listener.messages[since:]
            if message.topic.startswith(f"{self.topics.time}/")
        ]
        logs = [f"{name}: {process.log_tail()}" for name, process in self.brokers.items()]
        return "\n".join([*map(repr, reports[-6:]), *logs])

    def _settle(self, time_s: int, since: int, limit_s: float) -> None:
        """Wait until both brokers are idle at that time, at one ledger height, and owe each other nothing."""
        latest: dict[str, Report] = {}

        def at_rest(message: Incoming) -> bool:
            if message.topic.startswith(f"{self.topics.time}/"):
                report = Report.from_bytes(message.payload)
                latest[report.participant] = report
            reports = [latest[name] for name in PLAN.brokers if name in latest]
            return (
                len(reports) == len(PLAN.brokers)
                and all(report.idle and report.time_s == time_s for report in reports)
                and len({report.height for report in reports}) == 1
                and not any(unmet(report.participant, reports) for report in reports)
            )

        self.listener.wait_for(at_rest, "both brokers at rest", limit_s=limit_s, since=since)

    # Set-up while brokers run

    def take_on(self, device: str, owner: str, broker: str, source: str) -> None:
        """Admit a further device and add it to a running broker, as a registrar, its owner and an operator would."""
        folder, genesis = self.workspace.folder, self.workspace.genesis
        public = energy_broker("key", "new", self.workspace.key(device)).strip()
        admission, mandate = folder / f"{device}.admission", folder / f"{device}.mandate"
        energy_broker(
            *("registrar", "admit", "--genesis", genesis, "--name", "registrar"),
            *("--key", self.workspace.key("registrar"), "--device", device, "--owner", owner, "--meter-key", public),
            *("--source", source, "--capacity-w", "4000", "--area", PLAN.area),
            *("--commissioned", "2010-01-01T00:00:00Z", "--out", admission),
        )
        energy_broker(
            *("provider", "mandate", "--genesis", genesis, "--name", owner, "--key", self.workspace.key(owner)),
            *("--device", device, "--broker", broker, "--from", "2011-01-01T00:00:00Z", "--out", mandate),
        )
        energy_broker(
            *("provider", "add", "--config", self.workspace.config(broker), "--price", "1", admission, mandate)
        )

    # Meters

    def value(self, meter: str, energy_wh: int = 500, index: int = 0, /, **changes: Any) -> Demand | Reading:
        """What a meter counted in interval `index` after T0."""
        start_s = T0 + index * INTERVAL_S
        kind = Demand if meter in {consumer.meter.name for consumer in PLAN.consumers} else Reading
        values: dict[str, Any] = {
            "meter": meter,
            "start_s": start_s,
            "end_s": start_s + INTERVAL_S,
            "revision": 0,
            "energy_wh": energy_wh,
            "quality": Quality.MEASURED,
            "carrier": Carrier.ELECTRICITY,
        } | changes
        return kind(**values)

    def signed(self, message: Demand | Reading, signer: str | None = None) -> bytes:
        signer = signer or message.meter
        return seal(message, load_private_key(self.workspace.key(signer)), LEDGER, signer)

    def send(self, raw: bytes, meter: str, leaf: str | None = None) -> bytes:
        """Send these bytes as that meter, until there is a receipt, and return its bytes."""
        broker = self.broker_of.get(meter, "east")
        if leaf is None:
            leaf = self.value(meter).TYPE.name.lower()
        since = len(self.listener.messages)
        answer = self.topics.meter(broker, meter, "receipt")
        return _until_answered(
            lambda: self.listener.publish(self.topics.meter(broker, meter, leaf), raw),
            lambda limit_s: (
                self.listener.wait_for(
                    lambda message: message.topic == answer, f"a receipt for {meter}", limit_s=limit_s, since=since
                ).payload
            ),
        )

    def report(self, meter: str, energy_wh: int, index: int = 0) -> Receipt:
        """A good reading or demand."""
        return self.receipt(self.send(self.signed(self.value(meter, energy_wh, index)), meter))

    def receipt(self, payload: bytes) -> Receipt:
        message = self._opened(payload)
        assert isinstance(message, Receipt)
        return message

    def deliveries(self, meter: str) -> list[Delivery]:
        """What the meter was told so far, oldest first."""
        topic = self.topics.meter(self.broker_of[meter], meter, "delivery")
        opened = [self._opened(message.payload) for message in self.listener.messages if message.topic == topic]
        return [message for message in opened if isinstance(message, Delivery)]

    def table(self, broker: str, name: str) -> list[dict[str, Any]]:
        return list(table(self.workspace.config(broker), name))

    def wait_for(self, wanted: Callable[[Incoming], bool], what: str, since: int = 0) -> Incoming:
        return self.listener.wait_for(wanted, what, since=since)

    def _opened(self, payload: bytes) -> Message:
        signers = {}
        for name in PLAN.brokers:
            public = load_private_key(self.workspace.key(name)).public
            signers[public.key_id] = Signer(name, public)
        return open_envelope(payload, LEDGER, signers.get).message


def _until_answered(say: Callable[[], None], answer: Callable[[float], T]) -> T:
    """Say it again and again until the answer has come: nothing that is sent once is sure to arrive."""
    for _ in range(ATTEMPTS - 1):
        say()
        try:
            return answer(RETRY_S)
        except WaitedTooLong:
            continue
    say()
    return answer(RETRY_S)


def totals(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Wh by source, of rows of the table `history`."""
    sums: dict[str, int] = {}
    for row in rows:
        sums[row["source"]] = sums.get(row["source"], 0) + row["energy_wh"]
    return sums
