"""Two broker processes arrange a day over a real mosquitto, are killed in between, and show what is arranged."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from dengen_testing.listener import Listener
from dengen_testing.market import energy_broker
from dengen_testing.mosquitto import Mosquitto
from dengen_testing.processes import ProcessGroup
from support.broker_desk import INTERVAL_S, PLAN, T0, BrokerDesk, totals
from support.schema import schema_check

from broker.market.forecast import HistoryKind
from broker.protocol.messages import ReceiptStatus
from broker.protocol.sources import Source
from broker.service.store import BrokerStore

pytestmark = pytest.mark.integration

HOUR_S = 3_600
DAY_S = 86_400
INDEX = DAY_S // INTERVAL_S
"""Of the arranged day's first interval after T0."""


def remember(desk: BrokerDesk, broker: str, kind: HistoryKind, energy_wh: int) -> None:
    """That so much wind was generated, or demanded, in each half hour of the day before noon."""
    store = BrokerStore(desk.workspace.folder / f"{broker}-data" / "broker.db")
    store.begin()
    starts = range(T0 - 12 * HOUR_S, T0 + 12 * HOUR_S, INTERVAL_S)
    store.add_history([(start_s, int(kind), int(Source.WIND), energy_wh * 1_000_000) for start_s in starts])
    store.commit()
    store.close()


def kill_and_start(desk: BrokerDesk, broker: str) -> None:
    desk.brokers[broker].kill()
    desk.brokers[broker].start()


def test_a_day_is_arranged_over_mqtt_and_survives_kills(
    tmp_path: Path, mosquitto: Mosquitto, processes: ProcessGroup, start_listener: Callable[..., Listener]
) -> None:
    listener = start_listener(mosquitto.mqtt_config(), ["dengen/v1/#"])
    desk = BrokerDesk(tmp_path / "market", mosquitto, listener, processes)
    for broker, kind in (("east", HistoryKind.GENERATED), ("west", HistoryKind.DEMANDED)):
        desk.brokers[broker].stop()
        with desk.workspace.config(broker).open("a") as config:
            config.write("\n[market]\narranges_ahead = true\n")
        remember(desk, broker, kind, 900)
        desk.brokers[broker].start()
    for hour in (12, 13, 14):
        desk.tick(T0 + hour * HOUR_S + PLAN.gate_2_s)
        for broker in PLAN.brokers:
            kill_and_start(desk, broker)
    topics = {desk.topics.wishes("west"): "wishes", desk.topics.promises("east"): "promises"}
    for topic, leaf in topics.items():
        said = {message.payload for message in listener.messages if message.topic == topic}
        assert len(said) == 1, "the same bytes before and after each kill"
        assert schema_check(topic, said.pop()) == leaf

    # On the day ben wants what was promised, and gets it.
    desk.tick(T0 + DAY_S + INTERVAL_S + 10)
    for meter, energy_wh in (("anna", 0), ("roof", 0), ("mill", 800), ("ben", 700), ("dam", 0)):
        assert desk.report(meter, energy_wh, INDEX).status is ReceiptStatus.ACCEPTED
    desk.tick(T0 + DAY_S + INTERVAL_S + PLAN.gate_2_s)
    assert totals(desk.table("west", "history")) == {"wind": 700}

    # Both sides show the same of it.
    arranged = []
    for broker in PLAN.brokers:
        shown = energy_broker("forecast", "--config", desk.workspace.config(broker), "--json")
        arranged.append([row for row in map(json.loads, shown.splitlines()) if "supplier" in row])
    assert arranged[0] == arranged[1]
    assert arranged[0][0] == {
        "supplier": "east",
        "requester": "west",
        "start_s": T0 + DAY_S,
        "target": "wind",
        "wished_wh": 900,
        "promised_wh": 900,
    }
    assert len(arranged[0]) == 48
