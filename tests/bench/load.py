"""A process of meters: signs demands, sends them, counts receipts and deliveries. A helper with jobs (see `Helper`).

    {"do": "sign", "start_s": [...], "first": 0, "count": 1000, "step": 1}   each interval's demands, signed and kept
    {"do": "send", "root": "dengen/v1", "rounds": [{"start_s": ..., "at_s": ...}], "over_s": 9.0, "window": 2000,
     "deliveries": true, "resend_s": 10.0, "limit_s": 60.0}

`at_s` is the monotonic time at which a round begins, whose demands are then spread evenly over `over_s`, whatever the
broker does meanwhile; 0 means at once, limited by `window` demands without a receipt. A demand without a receipt is
sent again, the same bytes, after `resend_s`. The job ends when every demand has its receipt (and, with `deliveries`,
its final delivery), or at `limit_s` after the last send was due.

    {"do": "collect", "limit_s": 60.0}     goes on after a send without `deliveries` until every delivery has come

Receipts are matched by the id of the message they answer; every 50th receipt's signature is checked.
"""

import gc
import json
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench.world import BROKER, INTERVAL_S, LEDGER, demand_wh, meter_key, meter_name
from broker.protocol.envelope import Signer, open_envelope, parse, seal, sealed_id
from broker.protocol.keys import PublicKey, public_key_from_cose
from broker.protocol.messages import (
    Carrier,
    Delivery,
    DeliveryState,
    Demand,
    MessageType,
    Quality,
    Receipt,
    ReceiptStatus,
)
from broker.protocol.mqtt_link import MqttConfig, MqttLink
from broker.protocol.topics import Topics

_CHECK_EVERY: Final = 50
_SENDS_A_TURN: Final = 256
_POLL_S: Final = 0.002


@dataclass(slots=True)
class _Meter:
    """One signed demand and what became of it."""

    name: str
    start_s: int
    energy_wh: int
    message_id: bytes
    raw: bytes
    sends: int = 0
    first_s: float = 0.0
    latency_s: float | None = None
    receipts: int = 0
    delivered: bool = False


@dataclass(slots=True)
class _Tally:
    """The answer to a send job."""

    sent: int = 0
    resent: int = 0
    answered: int = 0
    refused: int = 0
    delivered: int = 0
    wrong: int = 0
    """Deliveries that are not what was demanded, and receipts that answer nothing or are badly signed."""
    extra_receipts: int = 0
    latencies_s: list[float] = field(default_factory=list)
    seconds: float = 0.0
    """From the first send to the last awaited answer."""
    behind_s: float = 0.0
    """The most that a send came after it was due: how well the load itself kept up."""


class Load:
    """Meters behind one MQTT connection per topic root."""

    def __init__(self, port: int, broker_key: PublicKey) -> None:
        self._mqtt = MqttConfig("127.0.0.1", port)
        self._signer = Signer(BROKER, broker_key)
        self._links: dict[str, MqttLink] = {}
        self._signed: dict[int, list[_Meter]] = {}
        self._sending: _Sending | None = None

    def sign(self, job: dict[str, Any]) -> dict[str, Any]:
        self._signed = {start_s: [] for start_s in job["start_s"]}
        for index in range(job["count"]):
            number = job["first"] + index * job["step"]
            name, key = meter_name(number), meter_key(number)
            for start_s, meters in self._signed.items():
                energy_wh = demand_wh(number, start_s)
                demand = Demand(
                    name, start_s, start_s + INTERVAL_S, 0, energy_wh, Quality.MEASURED, Carrier.ELECTRICITY
                )
                raw = seal(demand, key, LEDGER, name)
                meters.append(_Meter(name, start_s, energy_wh, sealed_id(raw, LEDGER, name), raw))
        # A full collection over all these would stop the sending for a moment.
        gc.freeze()
        return {"signed": job["count"] * len(self._signed)}

    def send(self, job: dict[str, Any]) -> dict[str, Any]:
        topics = Topics(job["root"])
        sending = _Sending(self._link(topics), topics, self._signer, self._schedule(job))
        self._sending = sending
        last_due_s = max(due_s for due_s, _ in sending.schedule)
        give_up_s = max(last_due_s, time.monotonic()) + job["limit_s"]
        began_s = time.monotonic()
        while (now_s := time.monotonic()) < give_up_s and not sending.done(deliveries=job["deliveries"]):
            sending.send_due(now_s, job["window"], job["resend_s"])
            sending.take_answers()
        return sending.result(time.monotonic() - began_s)

    def collect(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self._sending is not None
        began_s = time.monotonic()
        while time.monotonic() < began_s + job["limit_s"] and not self._sending.done(deliveries=True):
            self._sending.take_answers()
        return self._sending.result(time.monotonic() - began_s)

    def close(self) -> None:
        for link in self._links.values():
            link.close()

    def _schedule(self, job: dict[str, Any]) -> list[tuple[float, _Meter]]:
        """(monotonic time, demand) in the order of sending; time 0 for those that are sent as fast as they go."""
        schedule = []
        for one in job["rounds"]:
            meters = self._signed[one["start_s"]]
            for index, meter in enumerate(meters):
                schedule.append((one["at_s"] + job["over_s"] * index / len(meters) if one["at_s"] else 0.0, meter))
        return schedule

    def _link(self, topics: Topics) -> MqttLink:
        link = self._links.get(topics.root)
        if link is None:
            filters = [(topics.meter(BROKER, "+", leaf), 0) for leaf in ("receipt", "delivery")]
            link = MqttLink(self._mqtt, f"load-{topics.root.replace('/', '-')}", filters)
            self._links[topics.root] = link
        deadline_s = time.monotonic() + 10.0
        while not link.connected and time.monotonic() < deadline_s:
            link.poll(0.1)
        return link


class _Sending:
    """One send job: what is to be sent when, and what has come back."""

    def __init__(self, link: MqttLink, topics: Topics, signer: Signer, schedule: list[tuple[float, _Meter]]) -> None:
        self._link = link
        self._topics = topics
        self._signer = signer
        self.schedule = schedule
        self._by_id = {meter.message_id: meter for _, meter in schedule}
        self._by_interval = {(meter.name, meter.start_s): meter for _, meter in schedule}
        self._following = 0
        self._waiting: deque[tuple[float, _Meter]] = deque()
        self._tally = _Tally()
        for _, meter in schedule:
            meter.sends, meter.receipts, meter.latency_s, meter.delivered = 0, 0, None, False

    def done(self, *, deliveries: bool) -> bool:
        """True when every demand has its receipt and, with `deliveries`, its final delivery."""
        tally = self._tally
        answered = tally.answered + tally.refused == len(self.schedule)
        return answered and (not deliveries or tally.delivered + tally.refused >= len(self.schedule))

    def send_due(self, now_s: float, window: int, resend_s: float) -> None:
        """Send what is due, at most as many as the window leaves, and again what has waited too long."""
        tally = self._tally
        for _ in range(_SENDS_A_TURN):
            if self._following == len(self.schedule) or self.schedule[self._following][0] > now_s:
                break
            if self._following - tally.answered - tally.refused >= window:
                break
            due_s, meter = self.schedule[self._following]
            self._following += 1
            meter.first_s = now_s
            tally.behind_s = max(tally.behind_s, now_s - due_s if due_s else 0.0)
            self._publish(meter, now_s + resend_s)
        while self._waiting and (self._waiting[0][0] <= now_s or self._waiting[0][1].receipts):
            _, meter = self._waiting.popleft()
            if not meter.receipts:
                tally.resent += 1
                self._publish(meter, now_s + resend_s)
        self._link.flush()

    def take_answers(self) -> None:
        """Wait a moment for receipts and deliveries."""
        for incoming in self._link.poll(_POLL_S):
            leaf = self._topics.split(incoming.topic)[-1]
            if leaf == "receipt":
                self._take_receipt(incoming.payload)
            elif leaf == "delivery":
                self._take_delivery(incoming.payload)

    def result(self, seconds: float) -> dict[str, Any]:
        """The answer to the job."""
        tally = self._tally
        tally.seconds = seconds
        tally.extra_receipts = sum(max(0, meter.receipts - meter.sends) for _, meter in self.schedule)
        tally.latencies_s = [meter.latency_s for _, meter in self.schedule if meter.latency_s is not None]
        return {name: getattr(tally, name) for name in tally.__slots__}

    def _publish(self, meter: _Meter, again_s: float) -> None:
        meter.sends += 1
        self._tally.sent += 1
        self._waiting.append((again_s, meter))
        self._link.publish(self._topics.meter(BROKER, meter.name, "demand"), meter.raw, qos=1)

    def _take_receipt(self, raw: bytes) -> None:
        tally, now_s = self._tally, time.monotonic()
        receipt = Receipt.from_payload(parse(raw).payload)
        if receipt.kind is not MessageType.DEMAND:
            return  # For a generating device, whose reading the conductor's hand sent.
        meter = self._by_id.get(receipt.message_id)
        if meter is None:
            tally.wrong += 1
            return
        meter.receipts += 1
        if meter.receipts > 1:
            return
        meter.latency_s = now_s - meter.first_s
        if receipt.status is ReceiptStatus.ACCEPTED:
            tally.answered += 1
        else:
            tally.refused += 1
        if tally.answered % _CHECK_EVERY == 0:
            open_envelope(raw, LEDGER, lambda _key_id: self._signer)

    def _take_delivery(self, raw: bytes) -> None:
        tally = self._tally
        delivery = Delivery.from_payload(parse(raw).payload)
        meter = self._by_interval.get((delivery.meter, delivery.start_s))
        if meter is None or delivery.demanded_wh != meter.energy_wh:
            tally.wrong += 1
        elif delivery.state is DeliveryState.FINAL and not meter.delivered:
            meter.delivered = True
            tally.delivered += 1
            tally.wrong += delivery.unmatched_wh > 0


def main() -> None:
    """Arguments: the port of the MQTT server and a file with the broker's COSE_Key in hex."""
    load = Load(int(sys.argv[1]), public_key_from_cose(bytes.fromhex(Path(sys.argv[2]).read_text())))
    jobs = {"sign": load.sign, "send": load.send, "collect": load.collect}
    try:
        for line in sys.stdin:
            job = json.loads(line)
            print(json.dumps(jobs[job["do"]](job)), flush=True)
    finally:
        load.close()


if __name__ == "__main__":
    main()
