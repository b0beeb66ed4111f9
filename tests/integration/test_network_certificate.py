"""A real network of four validators with a fifth node, first as an onlooker, then as a validator added by governance.

Its certificates, its directory under `ledger verify`, and a broker's client that follows the fifth node throughout.
"""

import base64
import json
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dengen_testing.cometbft import Network, Node
from dengen_testing.waiting import wait_until
from support.ledger_world import SET_UP, batch, counting_bytes, genesis, issue, key, set_validator, take

from broker import cli
from broker.ledger.certificate import CERTIFICATE_NAME, Certificate
from broker.ledger.client import BlockApplied, Event, LedgerClient, LedgerFault
from broker.ledger.cometbft.engine import CometbftLedger
from broker.ledger.cometbft.home import NODE_FILE, load_node_config, node_config_text
from broker.ledger.cometbft.rpc import HttpNode
from broker.ledger.cometbft.testnet import FILE_NAME, set_up
from broker.ledger.gateway import Gateway
from broker.ledger.operations import Void
from broker.ledger.trust import read_trust, trust_of
from broker.ledger.verify import verify_ledger
from broker.protocol.envelope import Signer
from broker.protocol.errors import ProtocolError
from broker.protocol.keys import save_private_key
from broker.protocol.messages import NamedKey
from broker.protocol.topics import Topics

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("cometbft")]

NAMES = ("v1", "v2", "v3", "v4")
FOUNDED = genesis(validators=tuple(NamedKey(name, key(name).public.cose_key) for name in NAMES))
FIVE = genesis(validators=tuple(NamedKey(name, key(name).public.cose_key) for name in (*NAMES, "v5")))


def found(folder: Path) -> None:
    """Homes of four validators and of v5, which the genesis does not name."""
    files = {}
    for name in (*NAMES, "v5"):
        files[name] = folder / f"{name}.pem"
        save_private_key(files[name], key(name))
    all_five = folder / "five.cbor"
    all_five.write_bytes(FIVE.to_bytes())
    genesis_file = folder / "genesis.cbor"
    genesis_file.write_bytes(FOUNDED.to_bytes())
    for node in set_up(folder, all_five, files):
        config = load_node_config(node.home)
        (node.home / NODE_FILE).write_text(node_config_text(replace(config, genesis_file=genesis_file)))
    assert (folder / FILE_NAME).is_file()


def commit(node: Node, raw: bytes) -> None:
    body = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "broadcast_tx_commit",
        "params": {"tx": base64.b64encode(raw).decode()},
    }
    request = urllib.request.Request(node.rpc, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        result = json.load(answer)["result"]
    assert result["tx_result"]["code"] == 0, result


class Onlooker:
    """A broker's ledger side: follows one node through the gateway in its own process."""

    def __init__(self, node: Node) -> None:
        own = Signer("b1", key("b1").public)
        self.engine = CometbftLedger(FOUNDED, [HttpNode(node.rpc, 5.0)], own)
        self.gateway = Gateway(self.engine, Topics(), "b1", key("b1"))
        self.client = LedgerClient(FOUNDED, "b1", key("b1"), counting_bytes(), load_holdings=False)
        self.events: list[Event] = []
        self.started_s = time.monotonic()
        self.client.on_connect()

    def turn(self) -> None:
        now_s = time.monotonic()
        self.engine.work_once(now_s)
        outgoing = self.gateway.commit()
        for payload in self.client.tick(now_s):
            outgoing += self.gateway.on_message(payload)
        for message in outgoing:
            try:
                self.client.on_message(Topics().split(message.topic)[2], message.payload, own_node=True)
            except ProtocolError as error:  # pragma: no cover - says why where it fails
                raise AssertionError(f"{message.topic}: {error}") from error
        self.events += self.client.events()

    def reaches(self, height: int) -> bool:
        self.turn()
        return self.client.height >= height


def certified(node: Node) -> bool:
    """True once the node's own certificate is of its last block."""
    file = node.ledger / CERTIFICATE_NAME
    return file.is_file() and Certificate.from_bytes(file.read_bytes()).block_id == node.head().head.block_id


def test_a_fifth_node_looks_on_joins_and_proves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found(tmp_path)
    network = Network(tmp_path)
    fifth, first = network.nodes[4], network.nodes[0]
    trust_file, of_another = tmp_path / "trust.json", tmp_path / "another.json"
    trust_file.write_text(json.dumps(trust_of(FOUNDED)))
    of_another.write_text(json.dumps(trust_of(FIVE)))
    early, late = tmp_path / "early.cbor", tmp_path / "late.cbor"
    certify = ["ledger", "certify", "--trust", str(trust_file), "--node"]
    try:
        network.start()
        onlooker = Onlooker(fifth)
        for raw in (*SET_UP, batch(issue("solar-1", 1_000), take("solar-1", 0, 1_000))):
            commit(first, raw)
        wait_until(lambda: onlooker.reaches(3), "the onlooker's broker to follow")
        assert cli.main([*certify, first.rpc, "--out", str(early)]) == 0
        wait_until(lambda: certified(fifth), "the fifth node's own certificate")
        report = verify_ledger(fifth.ledger)
        assert (report.errors, report.certified_height, report.height) == ((), 3, 3)
        # Under its own seal alone its blocks prove nothing: whoever has the disk could have made them.
        kept = (fifth.ledger / CERTIFICATE_NAME).rename(tmp_path / "kept.cbor")
        assert "is not registered here" in verify_ledger(fifth.ledger).errors[0]
        assert verify_ledger(fifth.ledger, certificate=kept).errors == ()

        commit(first, batch(set_validator("v5", 1)))
        commit(first, batch(Void(b"v" * 16)))
        # With one of the old ones gone nothing is decided without the fifth: more than two thirds of five are four.
        network.nodes[3].stop()
        for number in range(3):
            commit(first, batch(Void(bytes((number,)) * 16)))
        height = first.head().head.height
        assert height == 8
        wait_until(lambda: onlooker.reaches(height), "the broker to follow over the change")
        wait_until(lambda: certified(fifth), "a certificate by the new set")
        wait_until(lambda: certified(first), "a certificate of the first node's")
        assert cli.main([*certify, fifth.rpc, "--out", str(late)]) == 0
        assert {node.stop() for node in (fifth, first)} == {0}
    finally:
        network.stop()
    assert [event.height for event in onlooker.events if isinstance(event, BlockApplied)] == list(range(1, 9))
    assert not [event for event in onlooker.events if isinstance(event, LedgerFault)]
    for node in (fifth, first):
        report = verify_ledger(node.ledger)
        assert (report.errors, report.certified_height, report.height) == ((), 8, 8)

    # What the files say, checked by our own code alone.
    for file, total in ((early, 4), (late, 5)):
        assert cli.main(["ledger", "check-proof", str(file), "--trust", str(trust_file), "--json"]) == 0
        said: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert said["total_power"] == total
        assert 3 * said["signed_power"] > 2 * total
        assert cli.main(["ledger", "check-proof", str(file), "--trust", str(of_another)]) != 0
    made = Certificate.from_bytes(late.read_bytes())
    assert made.block_id == report.block_id
    place, moment, signature = made.votes[0]
    altered = replace(made, votes=((place, moment, signature[:-1] + bytes((signature[-1] ^ 1,))), *made.votes[1:]))
    for broken in (altered, replace(made, votes=made.votes[:3]), replace(made, votes=(made.votes[0], *made.votes))):
        with pytest.raises(ProtocolError):
            broken.check(read_trust(trust_file.read_text()))

    # A certificate beside a proof under the same head, and the trust file of the head.
    assert cli.main(["ledger", "trust", "--path", str(first.ledger)]) == 0
    trust_file.write_text(capsys.readouterr().out)
    proof = tmp_path / "proof.cbor"
    assert cli.main(["ledger", "prove", str(first.ledger), "--leaf", "0", "--out", str(proof)]) == 0
    check = ["ledger", "check-proof", str(proof), "--trust", str(trust_file), "--certificate"]
    assert cli.main([*check, str(late)]) == 0
    assert cli.main([*check, str(early)]) != 0
    # Without a certificate nobody but the node itself stands for what it sealed before it was a validator's: it is one
    # now, so its directory verifies all the same.
    (fifth.ledger / CERTIFICATE_NAME).unlink()
    assert verify_ledger(fifth.ledger).errors == ()
