"""Two brokers at work on a ledger network, in this process: what they submit, and whether the ledger shows it once.

Each has its own engine, gateway and client, as inside `energy-broker run`, and gives its nodes numbered pieces of work:
a reading issued, taken over and delivered to three consumers.
"""

import os
import threading
import time
from pathlib import Path

from dengen_testing.cometbft import Network, Node
from dengen_testing.waiting import wait_until

from broker.ledger.client import BatchCommitted, BatchRefused, LedgerClient, LedgerFault
from broker.ledger.cometbft.engine import CometbftLedger
from broker.ledger.cometbft.home import ConsensusSection
from broker.ledger.cometbft.rpc import HttpNode
from broker.ledger.cometbft.testnet import TestnetNode, set_up
from broker.ledger.gateway import Gateway
from broker.protocol.envelope import Signer
from broker.protocol.keys import save_private_key
from broker.protocol.messages import Genesis, NamedKey, Role
from broker.protocol.sources import Source
from broker.protocol.topics import Topics
from support import ledger_world as world

VALIDATORS = ("v1", "v2", "v3", "v4")
GENESIS: Genesis = world.genesis(
    validators=tuple(NamedKey(name, world.key(name).public.cose_key) for name in VALIDATORS)
)
ENERGY_WH = 300
_FAR_S = world.T0 + 10**9
_TOPICS = Topics("dengen/v1")


def make_network(folder: Path, consensus: ConsensusSection | None = None) -> tuple[TestnetNode, ...]:
    """Homes for the four validators below `folder`."""
    genesis_file = folder / "genesis.cbor"
    genesis_file.write_bytes(GENESIS.to_bytes())
    for name in VALIDATORS:
        save_private_key(folder / f"{name}.pem", world.key(name))
    return set_up(folder, genesis_file, {name: folder / f"{name}.pem" for name in VALIDATORS}, consensus)


class Desk:
    """One broker, with a device under mandate. `pump` is its event loop."""

    def __init__(self, name: str, device: str, owner: str, source: Source, urls: list[str]) -> None:
        self.name = name
        self.device = device
        self.owner = owner
        self._source = source
        nodes = [HttpNode(url, 2.0) for url in urls]
        key = world.key(name)
        self._engine = CometbftLedger(GENESIS, nodes, Signer(name, key.public))
        self._gateway = Gateway(self._engine, _TOPICS, name, key)
        self.client = LedgerClient(GENESIS, name, key, os.urandom)
        self._woken = threading.Event()
        self._submitted: dict[bytes, float] = {}
        self.latencies_s: list[float] = []
        self.committed: set[bytes] = set()
        self.refused: list[BatchRefused] = []
        self._engine.start(self._woken.set)

    def register(self) -> None:
        """The first batch, and what makes the device this broker's."""
        self.submit(
            world.batch(
                world.register(self.name),
                world.register(self.owner, Role.PROVIDER),
                world.admit(self.device, owner=self.owner, source=self._source),
                world.mandate(self.device, owner=self.owner, broker=self.name),
                by=self.name,
                not_after_s=_FAR_S,
            )
        )

    def work(self, number: int) -> None:
        """Submit piece of work `number`: five operations."""
        start_s = world.T0 + number * world.INTERVAL_S
        part_wh = ENERGY_WH // 3
        delivers = [
            world.deliver(
                hash_free_number(self.name, number, part),
                part_wh,
                (self.device, part * part_wh, (part + 1) * part_wh),
                start_s=start_s,
            )
            for part in range(3)
        ]
        self.submit(
            world.batch(
                world.issue(self.device, ENERGY_WH, start_s),
                world.take(self.device, 0, ENERGY_WH, owner=self.owner, broker=self.name, start_s=start_s),
                *delivers,
                by=self.name,
                not_after_s=_FAR_S,
            )
        )

    def submit(self, raw: bytes) -> None:
        self._submitted[self.client.submit(raw)] = time.monotonic()

    def pump(self, wait_s: float = 0.0) -> None:
        """One turn of the loop."""
        self._woken.wait(wait_s)
        self._woken.clear()
        outgoing = []
        for raw in self.client.tick(time.monotonic()):
            outgoing += self._gateway.on_message(raw)
        outgoing += self._gateway.commit()
        for message in outgoing:
            self.client.on_message(message.topic.split("/")[4], message.payload)
        for event in self.client.events():
            if isinstance(event, BatchCommitted):
                assert event.batch_id not in self.committed, "a batch was committed twice"
                self.committed.add(event.batch_id)
                submitted_s = self._submitted.pop(event.batch_id, None)
                if submitted_s is not None:  # Else a test has handed it in past this desk.
                    self.latencies_s.append(time.monotonic() - submitted_s)
            elif isinstance(event, BatchRefused):
                self.refused.append(event)
            else:
                assert not isinstance(event, LedgerFault), event

    @property
    def open(self) -> int:
        """Batches that have not been seen in a block."""
        return len(self._submitted)

    def close(self) -> None:
        self._engine.close()


def hash_free_number(name: str, number: int, part: int) -> int:
    """A consumer's number that is the same in every run and different for each broker."""
    return (number * 3 + part) * 8 + int(name[1:])


class TwoDesks:
    """b1 at the first node, b2 at the second; both know all nodes. They are registered when this returns."""

    def __init__(self, network: Network) -> None:
        urls = [node.rpc for node in network.nodes]
        self.desks = (
            Desk("b1", "solar-1", "alice", Source.SOLAR, urls),
            Desk("b2", "wind-1", "bob", Source.WIND, urls[1:] + urls[:1]),
        )
        self._next = 0
        for desk in self.desks:
            desk.register()
        self.settle()

    def work(self, pieces: int = 1) -> None:
        for _ in range(pieces):
            for desk in self.desks:
                desk.work(self._next)
            self._next += 1

    def pump(self, wait_s: float = 0.01) -> None:
        for desk in self.desks:
            desk.pump(wait_s)

    def settle(self, limit_s: float = 60.0) -> None:
        """Until every batch is in a block that the brokers have seen."""

        def settled() -> bool:
            self.pump()
            return not any(desk.open for desk in self.desks)

        wait_until(settled, "every batch to be committed", limit_s=limit_s, detail=self._said)
        assert [desk.refused for desk in self.desks] == [[], []]

    @property
    def delivered_wh(self) -> int:
        return self._next * len(self.desks) * ENERGY_WH

    @property
    def operations(self) -> int:
        """What the ledger must hold: the registrations, and five operations a piece of work."""
        return len(self.desks) * (4 + 5 * self._next)

    def close(self) -> None:
        for desk in self.desks:
            desk.close()

    def _said(self) -> str:
        return ", ".join(f"{desk.name}: {desk.open} open, {desk.client.pending} pending" for desk in self.desks)


def heads_agree(nodes: tuple[Node, ...]) -> bool:
    """True if all stand at one height with one state."""
    return len({node.head().head.to_bytes() for node in nodes}) == 1
