"""A ledger network as processes: nodes that can be killed, paused, cut in half and started again, each by its pid.

A node is two processes: `energy-broker ledger node run`, which is the application and the supervisor, and the CometBFT
that it starts. `Network` runs those that `energy-broker ledger testnet --set-up-only` made.
"""

import contextlib
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from broker.ledger.chain import Head
from broker.ledger.cometbft.home import LEDGER_FOLDER, NODE_FILE, load_node_config, node_config_text
from broker.ledger.cometbft.node import PID_NAME
from broker.ledger.cometbft.rpc import HttpNode, NodeError
from broker.ledger.cometbft.testnet import TestnetNode, load_testnet, node_command
from broker.protocol import cbor
from dengen_testing.processes import ManagedProcess, ProcessGroup
from dengen_testing.relay import Relay
from dengen_testing.waiting import wait_until

START_LIMIT_S: Final = 60.0
ANSWER_LIMIT_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class NodeHead:
    """How far a node is: the ledger's head, and the height of CometBFT's last block."""

    head: Head
    network_height: int


class Node:
    """One node of a network on this machine."""

    def __init__(self, setup: TestnetNode, command: Sequence[str] | None = None) -> None:
        """`command` runs it in place of the usual one."""
        self.name = setup.name
        self.home = setup.home
        self.rpc = setup.rpc
        self.process = ManagedProcess(setup.name, command or node_command(setup.home), setup.home / "node.log")

    @property
    def ledger(self) -> Path:
        """What `energy-broker ledger verify` takes."""
        return self.home / LEDGER_FOLDER

    @property
    def cometbft_pid(self) -> int | None:
        """The process id of its CometBFT while one runs."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            pid = int((self.home / PID_NAME).read_text())
            if _is_cometbft(pid, self.home):
                return pid
        return None

    def start(self) -> Self:
        self.process.start()
        return self

    def stop(self) -> int:
        """SIGTERM; the application takes CometBFT down with it."""
        return self.process.stop(limit_s=20.0)

    def kill(self) -> None:
        """SIGKILL for both, as if the machine lost its power."""
        pid = self.cometbft_pid
        self.process.kill()
        if pid is not None:
            _signal(pid, signal.SIGKILL)
            wait_until(lambda: not _is_cometbft(pid, self.home), f"cometbft of {self.name} to be gone")

    def kill_application(self) -> None:
        """SIGKILL for the application alone; CometBFT has to notice by itself."""
        pid = self.cometbft_pid
        self.process.kill()
        if pid is not None:
            gone = f"cometbft of {self.name} to end without its application"
            wait_until(lambda: not _is_cometbft(pid, self.home), gone, limit_s=20.0)

    def kill_cometbft(self) -> None:
        """SIGKILL for CometBFT alone; the application stays and starts it again."""
        pid = self.cometbft_pid
        if pid is not None:
            _signal(pid, signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP for both: sockets stay open, and nobody answers."""
        self._signal_both(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal_both(signal.SIGCONT)

    def head(self) -> NodeHead:
        """Where it stands. Raises NodeError if it does not answer."""
        client = HttpNode(self.rpc, ANSWER_LIMIT_S)
        try:
            items: Any = cbor.decode(client.query("/head", b""), "head", 65_536)
        finally:
            client.close()
        return NodeHead(Head.from_bytes(items[0]), int(items[1]))

    def answers(self) -> bool:
        try:
            self.head()
        except NodeError:
            return False
        return True

    def _signal_both(self, number: signal.Signals) -> None:
        for pid in (self.process.pid, self.cometbft_pid):
            if pid is not None:
                _signal(pid, number)


class Network:
    """All nodes of a network that was set up in `folder`. Use it in a `with`: leaving it stops them."""

    def __init__(self, folder: Path, commands: dict[str, Sequence[str]] | None = None) -> None:
        """`commands` run the nodes of these names in place of the usual one."""
        chosen = commands or {}
        self.nodes = tuple(Node(setup, chosen.get(setup.name)) for setup in load_testnet(folder))
        self._processes = ProcessGroup()
        for node in self.nodes:
            self._processes.add(node.process)

    def start(self) -> Self:
        """Start all, and wait until each has made or heard of a block."""
        for node in self.nodes:
            node.start()
        for node in self.nodes:
            wait_until(
                lambda node=node: node.answers() and node.head().network_height > 0,  # type: ignore[misc]
                f"the first block of {node.name}",
                limit_s=START_LIMIT_S,
                detail=node.process.log_tail,
            )
        return self

    def stop(self) -> None:
        for node in self.nodes:
            node.resume()
        self._processes.stop()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class CutOff:
    """Puts relays between one node and all others, which `cut` ends and `mend` restores. Before the network starts.

    Close it after the network.
    """

    def __init__(self, folder: Path, name: str) -> None:
        setups = load_testnet(folder)
        (victim,) = [setup for setup in setups if setup.name == name]
        self._relays: list[Relay] = []
        inward = self._relay(victim.p2p)
        for setup in setups:
            config = load_node_config(setup.home)
            if setup is victim:
                replaced = {other.p2p: self._relay(other.p2p) for other in setups if other is not victim}
            else:
                replaced = {victim.p2p: inward}
            peers = []
            for peer in config.p2p.peers:
                node_id, _, address = peer.partition("@")
                peers.append(f"{node_id}@{replaced.get(address, address)}")
            changed = replace(config, p2p=replace(config.p2p, peers=tuple(peers)))
            (setup.home / NODE_FILE).write_text(node_config_text(changed))

    def cut(self) -> None:
        for relay in self._relays:
            relay.cut()

    def mend(self) -> None:
        for relay in self._relays:
            relay.mend()

    def close(self) -> None:
        for relay in self._relays:
            relay.close()

    def _relay(self, target: str) -> str:
        relay = Relay(target)
        self._relays.append(relay)
        return relay.address


def _is_cometbft(pid: int, home: Path) -> bool:
    """True if that process runs and is the CometBFT of this home: a pid may have gone to somebody else."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return str(home.resolve()).encode() in command
    return False


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
