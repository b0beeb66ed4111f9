"""How fast brokers trade: from an order at a neighbour to its transfers on the ledger.

Two brokers as processes on a real mosquitto. West's consumers want each source, and only east has any, made by many
devices; so in each interval west sends east an order for every source, all at once, and east makes a transfer for every
device. West hosts the ledger: orders, batches and blocks all go over MQTT.

Everything is watched from outside. An order begins when it is seen on its topic, and is served when the ledger's feed
shows the last of its Wh. Between the intervals, time is moved on only when both brokers are idle.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from dengen_testing.conductor import unmet
from dengen_testing.market import CONDUCTOR, ConsumerPlan, DevicePlan, MarketPlan, MeterPlan, Workspace, build_market
from dengen_testing.mosquitto import Mosquitto
from dengen_testing.processes import ProcessGroup, broker_process
from dengen_testing.waiting import WaitedTooLong

from bench.world import FIRST_INTERVAL_S, GATE_2_S, INTERVAL_S, LEDGER
from broker.ledger.operations import Transfer, decode_operation
from broker.protocol.envelope import parse, seal
from broker.protocol.keys import load_private_key
from broker.protocol.messages import (
    Batch,
    Block,
    Carrier,
    Demand,
    Order,
    Quality,
    Reading,
    Report,
    Stage,
    Tick,
)
from broker.protocol.mqtt_link import Incoming, MqttConfig, MqttLink
from broker.protocol.sources import Source
from broker.protocol.topics import Topics

SELLER: Final = "east"
BUYER: Final = "west"
DEVICE_WH: Final = 200
"""What each device makes in an interval; all of it is ordered."""

_POLL_S: Final = 0.2
_LIMIT_S: Final = 60.0


def neighbour(folder: Path, devices: int, intervals: int) -> dict[str, Any]:
    """The `neighbour` figures, from so many intervals with so many devices of each source.

    Raises WaitedTooLong if an order is not served in full or a broker does not come to rest.
    """
    with Mosquitto(folder / "mosquitto") as server:
        mqtt = server.mqtt_config()
        workspace = build_market(_plan(devices), folder / "market", folder / "ledger", mqtt)
        with _Trade(workspace, mqtt) as trade:
            trade.tick(FIRST_INTERVAL_S)
            trade.wait_idle()
            for number in range(intervals):
                trade.interval(FIRST_INTERVAL_S + number * INTERVAL_S)
    cuts = statistics.quantiles(trade.latencies_s, n=100)
    return {
        "orders": len(trade.latencies_s),
        "transfers_per_s": round(trade.transfers / trade.trading_s),
        "p50_s": round(cuts[49], 3),
        "p99_s": round(cuts[98], 3),
    }


def _plan(devices: int) -> MarketPlan:
    def meter(name: str) -> MeterPlan:
        return MeterPlan(name, "modbus_tcp", "iem3000", (), 0)

    capacity_w = DEVICE_WH * 3_600 // INTERVAL_S
    return MarketPlan(
        LEDGER,
        (SELLER, BUYER),
        BUYER,
        tuple(ConsumerPlan(meter(f"home-{_spelled(one)}"), BUYER, ((one.label, 100),), "unmatched") for one in Source),
        tuple(
            DevicePlan(meter(f"{_spelled(one)}-{number}"), "provider", SELLER, one.label, capacity_w, 90_000, "a hill")
            for one in Source
            for number in range(devices)
        ),
        FIRST_INTERVAL_S,
        0,
        INTERVAL_S,
    )


def _spelled(source: Source) -> str:
    """As part of a meter's name."""
    return source.label.replace("_", "-")


class _Trade:
    """The two brokers, running, and who speaks for the conductor and all meters. Use it in a `with`."""

    def __init__(self, workspace: Workspace, mqtt: MqttConfig) -> None:
        plan = workspace.plan
        self._processes = ProcessGroup()
        self._brokers = [self._processes.add(broker_process(workspace.config(name))) for name in plan.brokers]
        self._topics = Topics(mqtt.root)
        names = (CONDUCTOR, *(meter.name for meter in plan.meters))
        self._keys = {name: load_private_key(workspace.key(name)) for name in names}
        self._homes = [consumer.meter.name for consumer in plan.consumers]
        self._devices = [device.meter.name for device in plan.devices]
        self._feed = self._topics.ledger_feed(LEDGER)
        heard = [self._feed, self._topics.request(SELLER), *(self._topics.report(name) for name in plan.brokers)]
        self._link = MqttLink(mqtt, "bench-conductor", [(topic, 1) for topic in heard])
        self._now_s = 0
        self._reports: dict[str, Report] = {}
        self._begun_s: dict[bytes, float] = {}
        """When an order was seen first, by its bytes."""
        self._left_wh: dict[bytes, int] = {}
        """What is still to come under each order."""
        self._intervals = 0
        self._first_s = self._last_s = 0.0
        """When the newest interval's first order was seen, and its last transfer."""
        self.latencies_s: list[float] = []
        self.transfers = 0
        self.trading_s = 0.0
        """From the first order of an interval to its last transfer, of all intervals."""

    def __enter__(self) -> Self:
        try:
            for broker in self._brokers:
                broker.start()
            self._until(lambda: self._link.connected, "the connection")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._link.close()
        self._processes.stop()

    def tick(self, time_s: int) -> None:
        """Let market time be `time_s`, and wait until both brokers have taken that in."""
        self._now_s = time_s
        raw = seal(Tick(time_s, Stage.MARKET), self._keys[CONDUCTOR], LEDGER, CONDUCTOR)
        self._link.publish(self._topics.time, raw, qos=1, retain=True)
        self._until(lambda: len(self._current()) == 2, f"the tick {time_s} to be taken in")

    def wait_idle(self) -> None:
        """Until both brokers have done all that the tick caused, and owe each other nothing."""

        def at_rest() -> bool:
            reports = self._current()
            return (
                len(reports) == 2
                and all(report.idle and not unmet(report.participant, reports) for report in reports)
                and len({report.height for report in reports}) == 1
            )

        self._until(at_rest, f"both brokers to be idle at {self._now_s}")

    def interval(self, start_s: int) -> None:
        """Let an interval pass, with all its readings and demands, orders, transfers, deliveries and the close."""
        values = (start_s, start_s + INTERVAL_S, 0)
        rest = (Quality.MEASURED, Carrier.ELECTRICITY)
        self._intervals += 1
        self.tick(start_s + INTERVAL_S)
        for name in self._homes:
            demand = Demand(name, *values, len(self._devices) // len(self._homes) * DEVICE_WH, *rest)
            self._send(BUYER, name, "demand", seal(demand, self._keys[name], LEDGER, name))
        for name in self._devices:
            reading = Reading(name, *values, DEVICE_WH, *rest)
            self._send(SELLER, name, "reading", seal(reading, self._keys[name], LEDGER, name))
        orders = self._intervals * len(Source)
        self._until(
            lambda: len(self._left_wh) == orders and not any(self._left_wh.values()), "an order for each source"
        )
        self.trading_s += self._last_s - self._first_s
        self.tick(start_s + INTERVAL_S + GATE_2_S)
        self.wait_idle()

    def _send(self, broker: str, meter: str, leaf: str, raw: bytes) -> None:
        self._link.publish(self._topics.meter(broker, meter, leaf), raw, qos=1)

    def _current(self) -> list[Report]:
        return [report for report in self._reports.values() if report.time_s == self._now_s]

    def _until(self, holds: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + _LIMIT_S
        while not holds():
            self._processes.check_running()
            if time.monotonic() > deadline_s:
                raise WaitedTooLong(what, _LIMIT_S, f"last reports: {self._reports}")
            self._link.flush()
            for incoming in self._link.poll(_POLL_S):
                self._take(incoming, time.monotonic())
                self._link.acknowledge(incoming)
        self._link.flush()

    def _take(self, incoming: Incoming, now_s: float) -> None:
        if incoming.topic == self._feed:
            for batch in Block.from_payload(parse(incoming.payload).payload).batches:
                for raw in Batch.from_payload(parse(batch).payload).operations:
                    operation = decode_operation(raw)
                    if isinstance(operation, Transfer) and operation.order is not None:
                        self._transferred(operation.order, operation.to_wh - operation.from_wh, now_s)
        elif incoming.topic == self._topics.request(SELLER):
            # One that is repeated began before.
            if incoming.payload not in self._begun_s:
                if len(self._begun_s) == (self._intervals - 1) * len(Source):
                    self._first_s = now_s
                self._begun_s[incoming.payload] = now_s
                self._left_wh[incoming.payload] = Order.from_payload(parse(incoming.payload).payload).energy_wh
        else:
            report = Report.from_bytes(incoming.payload)
            self._reports[report.participant] = report

    def _transferred(self, order: bytes, energy_wh: int, now_s: float) -> None:
        self.transfers += 1
        self._last_s = now_s
        self._left_wh[order] -= energy_wh
        if not self._left_wh[order]:
            self.latencies_s.append(now_s - self._begun_s[order])
