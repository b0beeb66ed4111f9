"""Brings a broker's copy of a remote ledger up to date over MQTT, beside the broker that runs, as a client of its own.

It listens to the broker's result topic, as the broker does itself: each passes over what the other has asked for.
"""

import logging
import os
import time
from pathlib import Path
from typing import Final

from broker.config import BrokerConfig, load_genesis
from broker.ledger.copying import LedgerCopy
from broker.ledger.store import LedgerError
from broker.protocol.errors import ProtocolError
from broker.protocol.keys import load_private_key
from broker.protocol.mqtt_link import MqttLink
from broker.protocol.topics import Topics
from broker.service.store import BrokerStore

LOG: Final = logging.getLogger("energy-broker")
COPY_NAME: Final = "ledger-copy"
PATIENCE_S: Final = 60.0
"""How long nothing may come: longer than the ledger's host needs to restart."""

_WAIT_S: Final = 0.5


def update_copy(config: BrokerConfig) -> Path:
    """The directory with the copy, as the ledger was a moment ago.

    Raises LedgerError, ConfigError, KeyFileError, and StoreError for the broker's database.
    """
    genesis = load_genesis(config.ledger.genesis_file)
    topics = Topics(config.mqtt.root)
    path = config.broker.data_dir / COPY_NAME
    name = config.broker.name
    store = BrokerStore(config.database)
    try:
        followed = store.ledger_cursor()
    finally:
        store.close()
    copy = LedgerCopy(path, genesis, name, load_private_key(config.broker.key_file), os.urandom, followed)
    link = MqttLink(config.mqtt, f"broker-{name}-copy", [(topics.ledger_result(genesis.ledger, name), 1)])
    try:
        until_s = time.monotonic() + PATIENCE_S
        connections = height = 0
        passed_over = ""
        while not copy.done:
            now_s = time.monotonic()
            if now_s >= until_s:
                why = passed_over or link.last_failure or "the ledger's host does not answer"
                raise LedgerError(path, f"could not be brought up to date over MQTT: {why}; try again later")
            if link.connections != connections:
                connections, passed_over = link.connections, ""
                copy.reconnected()
            if link.connected:
                for query in copy.tick(now_s):
                    link.publish(topics.ledger_submit(genesis.ledger), query)
            for incoming in link.poll(_WAIT_S):
                try:
                    copy.on_result(incoming.payload)
                except ProtocolError as error:
                    passed_over = f"an answer is passed over: {error}"
                    LOG.warning("of ledger %s %s", genesis.ledger, passed_over)
                link.acknowledge(incoming)
            if copy.height > height:
                height, until_s = copy.height, time.monotonic() + PATIENCE_S
    finally:
        link.close()
        copy.close()
    return path
