"""The bare loop that the hot path is held against: what no broker can do without.

For each demand one receive with acknowledgement, one signature check, one row in a group commit (WAL,
`synchronous=FULL`, as the broker's store), one signed receipt at QoS 0. The receipt has all the fields that the
protocol asks for (constants where the broker's pseudonym, commitment and contract come in) and names the interval, by
which the row is found as well, so the payload is decoded. The same MQTT shell, envelope, keys and demands as the
broker; no market, no ledger, no registry.
"""

import signal
import sqlite3
import sys
from pathlib import Path
from types import FrameType
from typing import Final

from bench.world import BROKER, LEDGER, meter_key, meter_name
from broker.protocol.envelope import Signer, open_envelope, seal
from broker.protocol.keys import load_private_key
from broker.protocol.messages import (
    HASH_BYTES,
    PSEUDONYM_BYTES,
    Demand,
    MessageType,
    Receipt,
    ReceiptStatus,
)
from broker.protocol.mqtt_link import MqttConfig, MqttLink
from broker.protocol.topics import Topics

ROOT: Final = "floor/v1"
_PSEUDONYM: Final = bytes(PSEUDONYM_BYTES)
_HASH: Final = bytes(HASH_BYTES)


def main() -> None:
    """Arguments: the port of the MQTT server, the file to write rows to, the broker's key file, how many meters."""
    port, store, key_file, meters = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    topics = Topics(ROOT)
    key = load_private_key(key_file)
    signers = {}
    for number in range(meters):
        public = meter_key(number).public
        signers[public.key_id] = Signer(meter_name(number), public)
    database = sqlite3.connect(store, isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=FULL")
    database.execute(
        "CREATE TABLE demand (start_s INTEGER, meter TEXT, message_id BLOB, raw BLOB, PRIMARY KEY (start_s, meter))"
        " WITHOUT ROWID"
    )
    link = MqttLink(MqttConfig("127.0.0.1", port, root=ROOT), "floor", [(topics.meter(BROKER, "+", "demand"), 1)])
    stopping: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        stopping.append(number)
        link.wake()

    signal.signal(signal.SIGTERM, stop)
    while not stopping:
        incoming = link.poll(1.0)
        if not incoming:
            continue
        receipts = []
        database.execute("BEGIN")
        for message in incoming:
            opened = open_envelope(message.payload, LEDGER, signers.get)
            demand, identity = opened.message, opened.message_id
            assert isinstance(demand, Demand)
            database.execute(
                "INSERT INTO demand VALUES (?, ?, ?, ?)", (demand.start_s, demand.meter, identity, opened.raw)
            )
            receipt = Receipt(
                *(demand.meter, MessageType.DEMAND, demand.start_s, demand.revision, ReceiptStatus.ACCEPTED, identity),
                *(None, _PSEUDONYM, _HASH, _HASH, demand.end_s),
            )
            receipts.append((topics.meter(BROKER, demand.meter, "receipt"), seal(receipt, key, LEDGER, BROKER)))
        database.execute("COMMIT")
        for topic, payload in receipts:
            link.publish(topic, payload, qos=0)
        for message in incoming:
            link.acknowledge(message)
        link.flush()
    link.close()
    database.close()


if __name__ == "__main__":
    main()
