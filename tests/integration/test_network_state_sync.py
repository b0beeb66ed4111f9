"""State sync over a real network: the fourth validator comes late and begins with a snapshot that the others took."""

import base64
import json
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dengen_testing.cometbft import Network, Node
from dengen_testing.waiting import wait_until
from support.ledger_world import SET_UP, batch, deliver, genesis, issue, key, take

from broker.ledger.cometbft.home import NODE_FILE, SnapshotSection, load_node_config, node_config_text
from broker.ledger.cometbft.testnet import set_up
from broker.ledger.operations import Void
from broker.ledger.snapshot import BASE_FILE_NAME
from broker.ledger.verify import verify_ledger
from broker.protocol.keys import save_private_key
from broker.protocol.messages import NamedKey

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("cometbft")]

NAMES = ("v1", "v2", "v3", "v4")
EVERY = 6


def found(folder: Path) -> None:
    genesis_file = folder / "genesis.cbor"
    genesis_file.write_bytes(
        genesis(validators=tuple(NamedKey(name, key(name).public.cose_key) for name in NAMES)).to_bytes()
    )
    key_files = {name: folder / f"{name}.pem" for name in NAMES}
    for name, file in key_files.items():
        save_private_key(file, key(name))
    set_up(folder, genesis_file, key_files, snapshots=SnapshotSection(EVERY))


def ask(node: Node, method: str, **parameters: Any) -> Any:
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": parameters}).encode()
    request = urllib.request.Request(node.rpc, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)["result"]


def commit(node: Node, raw: bytes) -> None:
    answer = ask(node, "broadcast_tx_commit", tx=base64.b64encode(raw).decode())
    assert answer["tx_result"]["code"] == 0, answer


def test_a_validator_that_comes_late_begins_with_a_snapshot_and_votes(tmp_path: Path) -> None:
    found(tmp_path)
    network = Network(tmp_path)
    early, late = network.nodes[:3], network.nodes[3]
    try:
        for node in early:
            node.start()
        wait_until(lambda: all(node.answers() and node.head().network_height for node in early), "blocks", limit_s=60)
        for raw in (*SET_UP, batch(issue("solar-1", 1_000), take("solar-1", 0, 1_000))):
            commit(early[0], raw)
        number = 0
        # A light client needs two blocks on top of the one whose app hash it is to believe.
        while early[0].head().network_height < 2 * EVERY + 3:
            number += 1
            commit(early[number % 3], batch(deliver(number, 5, ("solar-1", 5 * number, 5 * number + 5))))
        trusted = ask(early[0], "commit", height="2")["signed_header"]["commit"]["block_id"]["hash"]
        config = load_node_config(late.home)
        joining = SnapshotSection(EVERY, tuple(node.rpc.removeprefix("http://") for node in early[:2]), 2, trusted)
        (late.home / NODE_FILE).write_text(node_config_text(replace(config, snapshots=joining)))
        late.start()
        wait_until(
            lambda: late.answers() and late.head().head == early[0].head().head,
            "the late validator to be where the others are",
            limit_s=60,
            detail=late.process.log_tail,
        )
        assert (late.ledger / BASE_FILE_NAME).exists(), "it must not have replayed the history"
        # With one of the others down, nothing is decided without the late one's vote.
        early[1].kill()
        commit(early[0], batch(Void(b"q" * 16)))
        assert late.stop() == early[0].stop() == 0
    finally:
        network.stop()
    whole, rest = verify_ledger(early[0].ledger), verify_ledger(late.ledger)
    assert (whole.errors, rest.errors) == ((), ())
    assert (rest.height, rest.state_hash, rest.block_id) == (whole.height, whole.state_hash, whole.block_id)
