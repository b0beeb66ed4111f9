"""A whole ledger network on one machine: for trying it out, for tests and for the demo, never for real money.

All validators' keys lie in one place here, which is what a real network must not have.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from broker.config import load_genesis
from broker.ledger.cometbft.home import (
    NODE_FILE,
    ConsensusSection,
    NodeConfig,
    P2pSection,
    RpcSection,
    SnapshotSection,
    node_config_text,
    read_node_id,
    write_node_key,
)
from broker.ledger.cometbft.rpc import HttpNode, NodeError
from broker.protocol import cbor
from broker.protocol.files import read_file
from broker.protocol.keys import generate_private_key
from firmware_config.loader import ConfigError

FILE_NAME: Final = "testnet.json"

ON_ONE_MACHINE: Final = ConsensusSection(propose_ms=400, vote_ms=200, commit_ms=20)
"""Messages travel in no time here. What takes long is the machine's work for all nodes at once."""

_STOP_LIMIT_S: Final = 20.0
_RESTART_AFTER_S: Final = 1.0
_ANSWER_LIMIT_S: Final = 2.0
_MAX_HEAD_BYTES: Final = 65_536
_MAX_LIST_BYTES: Final = 1_048_576


@dataclass(frozen=True, slots=True)
class TestnetNode:
    """One node: its validator's name, its home, where brokers reach it (a URL), and where nodes do (HOST:PORT)."""

    name: str
    home: Path
    rpc: str
    p2p: str


def set_up(
    folder: Path,
    genesis_file: Path,
    key_files: dict[str, Path],
    consensus: ConsensusSection | None = None,
    snapshots: SnapshotSection | None = None,
) -> tuple[TestnetNode, ...]:
    """Make a home below `folder` for each validator of the genesis, all of them each other's peers.

    `key_files` has the private key of each validator. Ports come from the system. Raises ConfigError, OSError, and
    FileExistsError where there is a network already.
    """
    genesis = load_genesis(genesis_file)
    names = [validator.name for validator in genesis.validators]
    ports = _free_ports(2 * len(names))
    nodes = []
    for number, name in enumerate(names):
        home = folder / name
        write_node_key(home, generate_private_key())
        rpc, p2p = (f"127.0.0.1:{port}" for port in ports[2 * number : 2 * number + 2])
        nodes.append(TestnetNode(name, home, f"http://{rpc}", p2p))
    for node in nodes:
        peers = tuple(f"{read_node_id(other.home)}@{other.p2p}" for other in nodes if other is not node)
        config = NodeConfig(
            genesis_file.resolve(),
            node.name,
            key_files[node.name].resolve(),
            P2pSection(node.p2p, peers),
            RpcSection(node.rpc.removeprefix("http://")),
            consensus or ON_ONE_MACHINE,
            snapshots or SnapshotSection(),
        )
        (node.home / NODE_FILE).write_text(node_config_text(config))
    listing = [{**asdict(node), "home": str(node.home.relative_to(folder))} for node in nodes]
    (folder / FILE_NAME).write_text(json.dumps(listing, indent=2) + "\n")
    return tuple(nodes)


def load_testnet(folder: Path) -> tuple[TestnetNode, ...]:
    """The nodes that `set_up` made. Raises OSError if there are none, ConfigError if their list is damaged."""
    file = folder / FILE_NAME
    try:
        listing = json.loads(read_file(file, _MAX_LIST_BYTES).decode())
        return tuple(TestnetNode(node["name"], folder / node["home"], node["rpc"], node["p2p"]) for node in listing)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(
            file, "", "the list of nodes that `ledger testnet` wrote; make a new one elsewhere"
        ) from error


def node_command(home: Path) -> list[str]:
    """The command line that runs the node in `home`, with this interpreter."""
    return [sys.executable, "-m", "broker.cli", "ledger", "node", "run", "--home", str(home)]


def run_testnet(nodes: Sequence[TestnetNode], stop: threading.Event, ready: Callable[[], None]) -> None:
    """Run all nodes until `stop` is set; one that ends is started again. Each has its log in its home.

    `ready` is called once, when every node has the first block.
    """
    told = False
    with ExitStack() as stack:
        children: dict[str, subprocess.Popen[bytes]] = {}
        stack.callback(_end, children)
        while not stop.is_set():
            for node in nodes:
                child = children.get(node.name)
                if child is None or child.poll() is not None:
                    children[node.name] = _started(node)
            if not told and all(_has_a_block(node) for node in nodes):
                told = True
                ready()
            stop.wait(_RESTART_AFTER_S)


def _has_a_block(node: TestnetNode) -> bool:
    client = HttpNode(node.rpc, _ANSWER_LIMIT_S)
    try:
        head = cbor.decode(client.query("/head", b""), "head", _MAX_HEAD_BYTES)
    except NodeError:
        return False
    finally:
        client.close()
    return bool(head[1] > 0)


def _started(node: TestnetNode) -> subprocess.Popen[bytes]:
    with (node.home / "node.log").open("ab") as log:
        return subprocess.Popen(
            node_command(node.home),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _end(children: dict[str, subprocess.Popen[bytes]]) -> None:
    for child in children.values():
        if child.poll() is None:
            os.kill(child.pid, signal.SIGTERM)
    for child in children.values():
        try:
            child.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody has now, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
