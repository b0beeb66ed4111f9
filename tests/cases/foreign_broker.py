"""A broker that is somebody else's program: written from docs/protocol.md and the CDDL files, on nothing of ours.

It serves one device and one consumer and has one neighbour. What it learns it keeps in memory, so after a restart it
asks the ledger what it owns and is told the time; a real one would keep the rest on disk, as the protocol demands.
Section numbers are those of docs/protocol.md. Run it with a JSON file: `python foreign_broker.py foreign.json`.
"""

import hashlib
import hmac
import json
import sys
import time
from pathlib import Path
from typing import Any

import cbor2
import paho.mqtt.client as paho
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from paho.mqtt.enums import CallbackAPIVersion

RECEIPT, DELIVERY, ORDER, ORDER_ANSWER, CLEARED, BROKER_STATUS, STOCK = 3, 4, 6, 7, 8, 9, 10
BATCH, RESULT, QUERY, PAGE, BLOCK, TICK = 11, 12, 13, 14, 15, 17
READING, DEMAND = 1, 2
HOLDINGS, BLOCKS = 1, 2
ELECTRICITY = 0
DONE, REFUSED = 0, 1
RESEND_S = 1.0
YEAR_S = 365 * 86_400


def cbor(value: Any) -> bytes:
    """Section 2: deterministic."""
    return cbor2.dumps(value, canonical=True)


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def keyed(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, "sha256")


def number(value: int) -> bytes:
    return value.to_bytes(8, "big")


class Envelope:
    """Section 3, for Ed25519 keys."""

    def __init__(self, ledger: str, name: str, key_file: Path) -> None:
        self.ledger = ledger
        self.name = name
        self.private = load_pem_private_key(key_file.read_bytes(), None)
        self.known: dict[bytes, tuple[str, Ed25519PublicKey]] = {}
        self.key_id = self.knows(name, self.private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))

    def knows(self, name: str, raw_key: bytes) -> bytes:
        """Remember a sender's key; returns its id."""
        key_id = sha256(cbor({1: 1, -1: 6, -2: raw_key}))[:16]
        self.known[key_id] = name, Ed25519PublicKey.from_public_bytes(raw_key)
        return key_id

    def seal(self, kind: int, message: dict[int, Any]) -> bytes:
        protected = cbor({1: -19, 4: self.key_id, 16: 65_000 + kind})
        payload = cbor(message)
        signed = self._to_be_signed(protected, kind, self.name, payload)
        return cbor(cbor2.CBORTag(18, [protected, {}, payload, self.private.sign(signed)]))

    def open(self, raw: bytes) -> tuple[int, str, bytes, bytes]:
        """Type, sender, message id and payload. Raises InvalidSignature, also if the key is nobody's."""
        protected, unprotected, payload, signature = cbor2.loads(raw).value
        header = cbor2.loads(protected)
        if unprotected or header[4] not in self.known:
            raise InvalidSignature
        sender, key = self.known[header[4]]
        kind = header[16] - 65_000
        signed = self._to_be_signed(protected, kind, sender, payload)
        key.verify(signature, signed)
        return kind, sender, sha256(signed), payload

    def _to_be_signed(self, protected: bytes, kind: int, sender: str, payload: bytes) -> bytes:
        return cbor(["Signature1", protected, cbor([kind, self.ledger, sender]), payload])


class ForeignBroker:
    """`turn` is its loop. Everything unanswered is sent again each second."""

    def __init__(self, config: dict[str, Any]) -> None:
        genesis = Path(config["genesis"]).read_bytes()
        charter = cbor2.loads(genesis)
        self.ledger, self.interval_s, self.gate_1_s, self.gate_2_s = charter[0], charter[1], charter[2], charter[3]
        self.area = charter[6][0]
        self.name: str = config["name"]
        self.root: str = config["root"]
        self.envelope = Envelope(self.ledger, self.name, Path(config["key_file"]))
        self.validators = [name for name, _ in charter[8]]
        self.conductor = charter[10][0]
        for name, cose_key in [*charter[8], charter[10], *config["neighbour"].items()]:
            self.envelope.knows(name, _raw_key(cose_key))
        (self.neighbour,) = config["neighbour"]
        self.device, self.owner, self.price = config["device"]
        self.consumer, self.source = config["consumer"]
        self.meter_key_ids = {
            name: self.envelope.knows(name, _raw_key(cose_key)) for name, cose_key in config["meters"].items()
        }
        self.secret = bytes.fromhex(config["secret"])
        self.statements = [bytes.fromhex(text) for text in config["statements"]]

        self.height, self.block_id = 0, sha256(genesis)
        self.time_s: int | None = None
        self.stage = 0
        self.stock: list[dict[str, Any]] = []
        self.loaded = False
        self.waiting: dict[bytes, bytes] = {}  # Batches by id that are in no block yet.
        self.orders_out: dict[bytes, dict[str, Any]] = {}
        self.orders_in: dict[bytes, tuple[dict[int, Any], bytes]] = {}
        self.answers: dict[bytes, bytes] = {}
        self.serving: dict[bytes, tuple[bytes, int]] = {}  # By batch: the order that it serves, and its Wh.
        self.demand: dict[str, Any] | None = None
        self.cleared_s = self.closed_s = 0
        self.reported: tuple[int, int, bool] | None = None
        self.resend_at = 0.0

        self.mqtt = paho.Client(CallbackAPIVersion.VERSION2, f"broker-{self.name}", protocol=paho.MQTTv5)
        self.mqtt.on_connect = lambda *_: self.connected()
        self.mqtt.on_message = lambda _client, _data, message: self.take(message.topic, message.payload)
        self.mqtt.will_set(
            self.topic("brokers", self.name, "status"), self.envelope.seal(BROKER_STATUS, self.status(False)), 1, True
        )
        self.mqtt.connect("127.0.0.1", config["port"])

    # MQTT (section 5)

    def topic(self, *levels: str) -> str:
        return "/".join((self.root, *levels))

    def connected(self) -> None:
        filters = [
            *(("brokers", self.name, "meters", "+", leaf) for leaf in ("reading", "demand")),
            ("brokers", self.name, "request"),
            ("brokers", self.name, "response", self.neighbour),
            ("ledger", self.ledger, "feed"),
            ("ledger", self.ledger, "result", self.name),
            ("time",),
        ]
        self.mqtt.subscribe([(self.topic(*levels), 1) for levels in filters])
        self.say("brokers", self.name, "status", kind=BROKER_STATUS, message=self.status(True), retain=True)
        self.resend_at = 0.0

    def status(self, online: bool) -> dict[int, Any]:
        return {0: self.name, 1: online, 2: self.time_s or 0, 3: "foreign"}

    def say(self, *levels: str, kind: int, message: dict[int, Any], retain: bool = False) -> bytes:
        raw = self.envelope.seal(kind, message)
        self.send(raw, *levels, retain=retain)
        return raw

    def send(self, raw: bytes, *levels: str, retain: bool = False) -> None:
        self.report(idle=False)
        self.mqtt.publish(self.topic(*levels), raw, 1, retain)

    def take(self, topic: str, raw: bytes) -> None:
        try:
            kind, sender, message_id, payload = self.envelope.open(raw)
        except InvalidSignature:
            return
        message = cbor2.loads(payload)
        levels = topic.removeprefix(self.root + "/").split("/")
        if kind == TICK and sender == self.conductor:
            self.take_tick(message)
        elif kind in (READING, DEMAND) and sender == levels[3] == message[0]:
            self.take_meter(kind, message, message_id, raw)
        elif kind == ORDER and sender == self.neighbour == message[1]:
            self.take_order(message, raw)
        elif kind == ORDER_ANSWER and sender == self.neighbour:
            self.take_answer(message)
        elif kind == BLOCK and sender in self.validators:
            self.take_block(payload)
        elif kind == RESULT and sender in self.validators:
            self.take_result(message)
        elif kind == PAGE and sender in self.validators:
            self.take_page(message)

    def turn(self) -> None:
        self.mqtt.loop(0.2)
        if self.time_s is None:
            return
        if time.monotonic() >= self.resend_at:
            self.resend_at = time.monotonic() + RESEND_S
            self.send_unanswered()
        if self.loaded:
            self.trade()
        self.report(idle=self.is_idle())

    def send_unanswered(self) -> None:
        if not self.loaded:
            query = {0: b"holdings", 1: HOLDINGS}
            self.say("ledger", self.ledger, "submit", kind=QUERY, message=query)
        for raw in self.waiting.values():
            self.send(raw, "ledger", self.ledger, "submit")
        for order in self.orders_out.values():
            if order["open"]:
                self.send(order["raw"], "brokers", self.neighbour, "request")

    # The ledger (section 7)

    def submit(self, operations: list[Any], not_after_s: int) -> bytes:
        """A batch, sent until its block has come."""
        raw = self.envelope.seal(BATCH, {0: not_after_s, 1: [cbor(operation) for operation in operations]})
        batch_id = self.envelope.open(raw)[2]
        self.waiting[batch_id] = raw
        self.send(raw, "ledger", self.ledger, "submit")
        return batch_id

    def take_result(self, result: dict[int, Any]) -> None:
        """The block says more; but that of a batch which the holdings know of already does not come any more."""
        committed = result[1] == 0
        if result[0] in self.waiting and self.loaded and (not committed or result[2] <= self.height):
            self.finish(result[0], committed=committed)
            if not committed:
                print(f"the ledger refused a batch: {result.get(4)}", file=sys.stderr, flush=True)

    def finish(self, batch_id: bytes, *, committed: bool) -> None:
        """The ledger has spoken about a batch of ours; who ordered under it is answered."""
        del self.waiting[batch_id]
        if batch_id in self.serving:
            order_id, energy_wh = self.serving.pop(batch_id)
            self.answer(order_id, DONE if committed else REFUSED, energy_wh if committed else 0, batch_id)

    def take_page(self, page: dict[int, Any]) -> None:
        if page[1] == BLOCKS:
            for raw in page[3]:
                _, _, _, payload = self.envelope.open(raw)
                self.take_block(payload)
        elif page[1] == HOLDINGS and not self.loaded:
            assert 4 not in page, "this broker owns less than a page"
            for entry in page[3]:
                device, carrier, start_s, revision, source, _, from_wh, to_wh = cbor2.loads(entry)
                self.own([device, carrier, start_s, revision], source, from_wh, to_wh)
            self.height, self.block_id, self.loaded = page[2], None, True

    def take_block(self, payload: bytes) -> None:
        """In order; each names the one before. A gap is asked for."""
        block = cbor2.loads(payload)
        if not self.loaded or block[0] <= self.height:
            return
        if block[0] > self.height + 1:
            query = {0: b"missing!", 1: BLOCKS, 3: self.height + 1}
            self.say("ledger", self.ledger, "submit", kind=QUERY, message=query)
            return
        assert self.block_id in (None, block[1]), "two histories"
        self.height, self.block_id = block[0], sha256(payload)
        for raw in block[2]:
            self.take_batch(raw)

    def take_batch(self, raw: bytes) -> None:
        """What a block says: our own batches are committed, and others' transfers to us are ours.

        The holdings may have come from a node that is behind, so a block may also tell of an earlier life of ours.
        """
        operations = [cbor2.loads(operation) for operation in cbor2.loads(cbor2.loads(raw).value[2])[1]]
        own = [batch_id for batch_id, waiting in self.waiting.items() if waiting == raw]
        for code, body in operations:
            if code == 6 and body[4] == self.name:
                asset, from_wh, to_wh, _, _, _, order = body
                self.own(asset, self.source_of(asset, order), from_wh, to_wh)
                order_id = None if order is None else cbor2.loads(cbor2.loads(order).value[2])[0]
                if order_id in self.orders_out:
                    self.orders_out[order_id]["open"] = False
            elif code == 6 and body[3] == self.name:
                self.give_up(body[0], body[1], body[2])
            elif code == 7:
                for *asset, from_wh, to_wh, _ in body[7]:
                    self.give_up(asset, from_wh, to_wh)
        for batch_id in own:
            self.finish(batch_id, committed=True)

    def source_of(self, asset: list[Any], order: bytes | None) -> int:
        if order is not None:
            return int(cbor2.loads(cbor2.loads(order).value[2])[2])
        return int(cbor2.loads(cbor2.loads(self.statements[2]).value[2])[3])  # Our device's admission.

    def own(self, asset: list[Any], source: int, from_wh: int, to_wh: int) -> None:
        self.stock.append({"asset": asset, "source": source, "from_wh": from_wh, "to_wh": to_wh})

    def give_up(self, asset: list[Any], from_wh: int, to_wh: int) -> None:
        """A range that is not ours any more; most often it is out of the stock already. We give from the front."""
        for held in self.stock:
            if held["asset"] == asset and held["from_wh"] <= from_wh < held["to_wh"]:
                held["from_wh"] = to_wh

    def take_from_stock(self, source: int, start_s: int, energy_wh: int) -> list[tuple[list[Any], int, int]]:
        """Ranges of that source and interval, up to so many Wh."""
        ranges = []
        for held in self.stock:
            part_wh = min(energy_wh, held["to_wh"] - held["from_wh"])
            if held["source"] == source and held["asset"][2] == start_s and part_wh:
                ranges.append((held["asset"], held["from_wh"], held["from_wh"] + part_wh))
                held["from_wh"] += part_wh
                energy_wh -= part_wh
        return ranges

    # Meters (section 6)

    def take_meter(self, kind: int, value: dict[int, Any], message_id: bytes, raw: bytes) -> None:
        receipt = {0: value[0], 1: kind, 2: value[1], 3: value[3], 4: 0, 5: message_id}
        again = False
        if kind == READING:
            operations = [[5, [raw]], [6, [[self.device, ELECTRICITY, value[1], value[3]], 0, value[4], self.owner]]]
            operations[1][1] += [self.name, self.price, None]
            batch = {0: value[2] + 2 * self.interval_s, 1: [cbor(operation) for operation in operations]}
            again = self.envelope.seal(BATCH, batch) in self.waiting.values() or any(
                held["asset"] == operations[1][1][0] for held in self.stock
            )
            if not again:
                self.submit(operations, batch[0])
        else:
            k_interval = keyed(keyed(self.secret, b"day" + number(value[1] // 86_400)), b"interval" + number(value[1]))
            pseudonym = keyed(k_interval, b"pseudonym" + self.meter_key_ids[value[0]])[:16]
            commitment = sha256(keyed(k_interval, b"commitment") + raw)
            again = self.demand is not None and self.demand["start_s"] == value[1]
            if not again:
                self.demand = {"start_s": value[1], "end_s": value[2], "demanded_wh": value[4], "delivered_wh": 0}
                self.demand |= {"pseudonym": pseudonym, "commitment": commitment, "on_record": False}
            receipt |= {7: pseudonym, 8: commitment, 10: value[2] + self.gate_2_s}
        self.say("brokers", self.name, "meters", value[0], "receipt", kind=RECEIPT, message=receipt)

    # Neighbours (section 6)

    def order(self, energy_wh: int, start_s: int) -> None:
        """The first change request. The same id after a restart."""
        order_id = sha256(cbor([self.name, self.source, start_s]))[:16]
        message = {0: order_id, 1: self.name, 2: self.source, 3: start_s, 4: start_s + self.interval_s, 5: energy_wh}
        message |= {6: 1_000_000, 7: start_s + self.interval_s, 8: [self.name, self.neighbour]}
        raw = self.say("brokers", self.neighbour, "request", kind=ORDER, message=message)
        self.orders_out[order_id] = {"raw": raw, "open": True}

    def take_answer(self, answer: dict[int, Any]) -> None:
        """*Refused* ends an order; *done* does not: the block does."""
        if answer[0] in self.orders_out and answer[1] == REFUSED:
            self.orders_out[answer[0]]["open"] = False

    def take_order(self, order: dict[int, Any], raw: bytes) -> None:
        if order[0] in self.answers:
            self.send(self.answers[order[0]], "brokers", self.neighbour, "response", self.name)
        elif order[8][-1] == self.name:
            self.orders_in.setdefault(order[0], (order, raw))

    def serve(self) -> None:
        """The second change request, for orders of intervals that are cleared here."""
        for order_id, (order, raw) in list(self.orders_in.items()):
            if order[3] > self.cleared_s:
                continue
            del self.orders_in[order_id]
            ranges = self.take_from_stock(order[2], order[3], order[5]) if self.price <= order[6] else []
            if not ranges:
                self.answer(order_id, REFUSED, 0, None)
                continue
            transfers = [
                [6, [asset, from_wh, to_wh, self.name, order[1], self.price, raw]] for asset, from_wh, to_wh in ranges
            ]
            energy_wh = sum(to_wh - from_wh for _, from_wh, to_wh in ranges)
            self.serving[self.submit(transfers, order[4] + self.interval_s)] = order_id, energy_wh

    def answer(self, order_id: bytes, status: int, energy_wh: int, batch_id: bytes | None) -> None:
        message = {0: order_id, 1: status, 2: energy_wh} | ({} if batch_id is None else {3: batch_id})
        levels = ("brokers", self.neighbour, "response", self.name)
        self.answers[order_id] = self.say(*levels, kind=ORDER_ANSWER, message=message)

    # An interval (section 6) and simulated time (section 8)

    def take_tick(self, tick: dict[int, Any]) -> None:
        if self.time_s is None:
            # What a batch carries as not-after must be after our own last close, so the time had to be known first.
            operations = [[code, [raw]] for code, raw in zip((1, 1, 2, 3), self.statements, strict=True)]
            self.time_s = tick[0]
            self.submit(operations, tick[0] + YEAR_S)
        self.time_s, self.stage = tick[0], tick[1]
        self.reported = None  # Every copy of a tick is answered.

    def trade(self) -> None:
        """Clear at gate 1, serve and deliver between the gates, close at gate 2."""
        assert self.time_s is not None
        end_s = self.time_s - self.time_s % self.interval_s
        start_s = end_s - self.interval_s
        if self.time_s >= end_s + self.gate_1_s and self.cleared_s < start_s and not self.waiting:
            self.clear(start_s)
        self.serve()
        self.deliver()
        if self.time_s >= end_s + self.gate_2_s and self.closed_s < start_s and not self.waiting:
            self.close(start_s)

    def clear(self, start_s: int) -> None:
        self.cleared_s = start_s
        self.deliver()
        short_wh = self.short_wh(start_s)
        if short_wh:
            self.order(short_wh, start_s)
        span = {0: self.name, 1: start_s, 2: start_s + self.interval_s}
        short = {3: [[self.source, short_wh]], 4: [[self.neighbour, 1]]} if short_wh else {3: [], 4: []}
        self.say("brokers", self.name, "cleared", kind=CLEARED, message=span | short, retain=True)
        left: dict[int, int] = {}
        for held in self.stock:
            if held["asset"][2] == start_s:
                left[held["source"]] = left.get(held["source"], 0) + held["to_wh"] - held["from_wh"]
        offers = [[source, energy_wh, self.price] for source, energy_wh in sorted(left.items())]
        self.say("brokers", self.name, "stock", kind=STOCK, message=span | {3: offers}, retain=True)

    def short_wh(self, start_s: int) -> int:
        if self.demand is None or self.demand["start_s"] != start_s:
            return 0
        return int(self.demand["demanded_wh"] - self.demand["delivered_wh"])

    def deliver(self, *, final: bool = False) -> None:
        """The third change request; at gate 2 also for a demand that got nothing."""
        demand = self.demand
        if demand is None or demand["start_s"] > self.cleared_s or self.closed_s >= demand["start_s"]:
            return
        ranges = self.take_from_stock(self.source, demand["start_s"], self.short_wh(demand["start_s"]))
        if ranges or (final and not demand["on_record"]):
            slices = [[*asset, from_wh, to_wh, 0] for asset, from_wh, to_wh in ranges]
            body = [demand["pseudonym"], demand["start_s"], demand["end_s"], 0, self.area, demand["demanded_wh"]]
            self.submit([[7, [*body, demand["commitment"], slices]]], demand["end_s"] + self.interval_s)
            demand["delivered_wh"] += sum(to_wh - from_wh for _, from_wh, to_wh in ranges)
            demand["on_record"] = True

    def close(self, start_s: int) -> None:
        """What nobody had is unmatched; unanswered orders are void; the interval is closed."""
        self.deliver(final=True)
        self.closed_s = start_s
        here = self.demand is not None and self.demand["start_s"] == start_s
        demanded_wh = self.demand["demanded_wh"] if here else 0
        root = sha256(b"\0" + self.demand["pseudonym"] + self.demand["commitment"]) if here else sha256(b"")
        voids = [[9, [order_id]] for order_id, order in self.orders_out.items() if order["open"]]
        for order in self.orders_out.values():
            order["open"] = False
        end_s = start_s + self.interval_s
        self.submit([*voids, [8, [start_s, end_s, 0, int(here), demanded_wh, root]]], end_s + self.interval_s)
        if here:
            delivered_wh = self.demand["delivered_wh"]
            lines = [[0, self.source, delivered_wh]] if delivered_wh else []
            told = {0: self.consumer, 1: start_s, 2: end_s, 3: 0, 4: demanded_wh, 5: demanded_wh - delivered_wh}
            self.say(
                *("brokers", self.name, "meters", self.consumer, "delivery"),
                kind=DELIVERY,
                message=told | {6: 1, 7: lines},
            )

    def is_idle(self) -> bool:
        return (
            self.loaded
            and not self.waiting
            and not any(order["open"] for order in self.orders_out.values())
            and not any(order[3] <= self.cleared_s for order, _ in self.orders_in.values())
        )

    def report(self, *, idle: bool) -> None:
        """Not signed, and without an envelope."""
        if self.time_s is None or self.reported == (self.time_s, self.stage, idle):
            return
        self.reported = self.time_s, self.stage, idle
        message = {0: self.name, 1: self.time_s, 2: self.stage, 3: idle, 5: self.height}
        self.mqtt.publish(self.topic("time", self.name), cbor(message), 0, True)


def _raw_key(cose_key: bytes | str) -> bytes:
    """The 32 bytes of an Ed25519 COSE_Key, as it stands in a genesis or in hex."""
    encoded = bytes.fromhex(cose_key) if isinstance(cose_key, str) else cose_key
    raw: bytes = cbor2.loads(encoded)[-2]
    return raw


def main() -> None:
    broker = ForeignBroker(json.loads(Path(sys.argv[1]).read_text()))
    while True:
        broker.turn()


if __name__ == "__main__":
    main()
