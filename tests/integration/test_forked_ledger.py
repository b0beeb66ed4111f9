"""Two brokers are shown two histories of one ledger, signed with one validator key; over MQTT they find it out.

Each broker hosts a copy of the ledger of its own, as a cheating operator would run them. The brokers hear nothing of
each other's ledger but what the other one witnesses.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from dengen_testing.mosquitto import Mosquitto
from dengen_testing.waiting import wait_until
from support.ledger_world import GENESIS, LEDGER, key, register
from support.schema import validate_traffic

from broker import cli
from broker.config import BrokerConfig, BrokerSection, HostSection, LedgerSection
from broker.ledger.trust import read_trust, trust_of
from broker.ledger.witness import Equivocation
from broker.protocol import envelope
from broker.protocol.keys import save_private_key
from broker.protocol.messages import Genesis, Witness
from broker.protocol.mqtt_link import Incoming, MqttLink
from broker.protocol.topics import Topics
from broker.service.registration import add_statement
from broker.service.run import BrokerService
from broker.service.store import BrokerStore

pytestmark = pytest.mark.integration


def configured(folder: Path, name: str, ledger: Path, genesis: Genesis, mosquitto: Mosquitto) -> BrokerConfig:
    """A broker that hosts the ledger in that directory and has its registration to put there."""
    folder.mkdir()
    save_private_key(folder / "broker.pem", key(name))
    save_private_key(folder / "node.pem", key("node"))
    (folder / "genesis").write_bytes(genesis.to_bytes())
    config = BrokerConfig(
        BrokerSection(name, folder / "broker.pem", folder),
        LedgerSection(folder / "genesis", HostSection(ledger, "node", folder / "node.pem")),
        mosquitto.mqtt_config(),
    )
    store = BrokerStore(config.database)
    add_statement(store, register(name).statement)
    store.close()
    return config


def turn_until(services: list[BrokerService], condition: Callable[[], bool]) -> None:
    def turned() -> bool:
        for service in services:
            service.wake()
            service.turn()
        return condition()

    wait_until(turned, "what the brokers were to do", limit_s=20.0)


def evidence_of(config: BrokerConfig) -> list[Path]:
    return sorted(config.database.parent.glob("evidence-*.cbor"))


def test_two_histories_are_found_by_both_brokers(
    mosquitto: Mosquitto, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    configs = [
        configured(tmp_path / name, name, tmp_path / name / "ledger", GENESIS, mosquitto) for name in ("b1", "b2")
    ]
    with contextlib.ExitStack() as stack:
        services = [BrokerService(config, GENESIS, stack) for config in configs]
        turn_until(services, lambda: all(evidence_of(config) for config in configs))
        assert "the ledger contradicts itself at height 1" in caplog.text

    trust_file = tmp_path / "trust.json"
    trust_file.write_text(json.dumps(trust_of(GENESIS)))
    for config in configs:
        (file,) = evidence_of(config)
        one, other = Equivocation.from_bytes(file.read_bytes()).check(read_trust(trust_file.read_text()))
        assert one.height == other.height == 1
        assert one.block_id != other.block_id
        assert cli.main(["ledger", "evidence", str(file), "--trust", str(trust_file)]) == 0
        assert "node signed for height 1" in capsys.readouterr().out


def test_what_a_broker_followed_to_it_witnesses(mosquitto: Mosquitto, tmp_path: Path) -> None:
    config = configured(tmp_path / "b1", "b1", tmp_path / "b1" / "ledger", GENESIS, mosquitto)
    topic = Topics().ledger_witness(LEDGER, "b1")
    link = MqttLink(mosquitto.mqtt_config(), "listener", [(topic, 0)])
    heard: list[Incoming] = []
    with contextlib.ExitStack() as stack:
        stack.callback(link.close)
        service = BrokerService(config, GENESIS, stack)

        def has_heard() -> bool:
            heard.extend(link.poll(0.01))
            return bool(heard)

        turn_until([service], has_heard)
        opened = envelope.open_envelope(heard[0].payload, LEDGER, lambda _: envelope.Signer("b1", key("b1").public))
        assert isinstance(opened.message, Witness)
        assert heard[0].topic == topic
        validate_traffic([(heard[0].topic, heard[0].payload)])
        assert not evidence_of(config)
