"""How soon a broker with very many consumers works: from exec until it answers a demand.

The demand is sent again and again, the same bytes, until its receipt comes. The market tick that the broker needs to
accept it is retained on the server, as in real operation.
"""

import time
from pathlib import Path

from dengen_testing.mosquitto import Mosquitto

from bench.hot_path import send_job
from bench.processes import Helper
from bench.world import (
    FIRST_INTERVAL_S,
    INTERVAL_S,
    MAX_DEMAND_WH,
    BrokerFolder,
    RunningBroker,
    add_consumers,
    make_broker,
)
from broker.protocol.mqtt_link import MqttConfig
from broker.protocol.topics import DEFAULT_ROOT


def filled_broker(folder: Path, consumers: int) -> BrokerFolder:
    """A broker with so many consumers in its store, of whom the last can sign. Takes longer than what is measured."""
    broker = make_broker(folder, MqttConfig("127.0.0.1", 1), MAX_DEMAND_WH)
    add_consumers(broker, consumers, [consumers - 1])
    return broker


def broker_start_s(broker: BrokerFolder, folder: Path, consumers: int) -> float:
    """Seconds from exec to the receipt."""
    with Mosquitto(folder / "mosquitto") as server:
        mqtt = server.mqtt_config()
        broker.set_server(mqtt)
        with Helper("bench.load", str(server.port), str(broker.key_file)) as load:
            start_s = FIRST_INTERVAL_S
            load.run({"do": "sign", "start_s": [start_s], "first": consumers - 1, "count": 1, "step": 1})
            running = RunningBroker(broker, mqtt)
            running.connect()
            running.tick(start_s + INTERVAL_S)
            running.listen(0.1)
            began_s = time.monotonic()
            with running:
                job = send_job(DEFAULT_ROOT, start_s, deliveries=False) | {"resend_s": 0.05}
                load.run(job)
                return time.monotonic() - began_s
