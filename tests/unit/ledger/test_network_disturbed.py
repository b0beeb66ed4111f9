"""Brokers on a network whose nodes are away, lag, or go on between two questions; gateways restart, messages get lost.

One order of batches, decided by hand (`FakeNetwork`), and a node of which nobody asks anything, to compare with: what
clients are told must be what that one has at the height that it is told for.
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
from support import ledger_world as world
from support.comet_network import FakeNetwork, FakeNode

from broker.ledger import gateway as gateway_module
from broker.ledger import holdings_view
from broker.ledger.client import (
    BatchCommitted,
    BatchRefused,
    BlockApplied,
    Event,
    HoldingsLoaded,
    LedgerClient,
    LedgerFault,
    MadeKnown,
)
from broker.ledger.cometbft import engine as engine_module
from broker.ledger.cometbft import follower as follower_module
from broker.ledger.cometbft.engine import CometbftLedger
from broker.ledger.cometbft.rpc import NodeError
from broker.ledger.copying import LedgerCopy
from broker.ledger.gateway import Gateway, Outgoing
from broker.ledger.holding import decode_holding
from broker.ledger.operations import Void
from broker.ledger.verify import verify_ledger
from broker.protocol import cbor
from broker.protocol.envelope import Signer, sealed_id
from broker.protocol.errors import ProtocolError
from broker.protocol.topics import Topics

SEEDS = range(100) if os.environ.get("DENGEN_FULL") else range(5)
STEPS = 350
TOPICS = Topics()


@dataclass
class Party:
    """A broker: its client, what it has stored, and what it was told since its last start."""

    name: str
    client: LedgerClient
    cursor: tuple[int, bytes] | None = None
    height: int | None = None
    loaded: bool = False
    stored: dict[bytes, bytes] = field(default_factory=dict)
    """Batches without an answer, by id."""
    committed: Counter[bytes] = field(default_factory=Counter)

    def submits(self, raw: bytes) -> None:
        self.stored[sealed_id(raw, world.LEDGER, self.name)] = raw
        self.client.submit(raw)


class Market:
    """b1 has nodes of its own; b2 reaches the ledger through a gateway, also for its copy."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.chance = Random(seed)
        self.network = FakeNetwork(folder, "v1", "v2", "v3", "onlooker")
        *self.nodes, self.onlooker = self.network.nodes
        for node in self.nodes:
            self._disturb(node)
        self.calm = False
        self.now_s = 0.0
        self.number = 0
        self.issued = False
        self.air: list[Outgoing] = []
        self.retained: list[Outgoing] = []
        self.made: dict[int, Any] = {}
        self.held: dict[tuple[int, str], list[Any]] = {}
        self._note()
        self.host = self._gateway("v1", None, 0)
        self.own = self._gateway("b1", Signer("b1", world.key("b1").public), 0)
        self.parties = {name: Party(name, self._client(name, None)) for name in ("b1", "b2")}
        self.b1, self.b2 = self.parties.values()
        for party, raw in zip((self.b1, self.b2), world.SET_UP, strict=True):
            party.submits(raw)
        self.copy_folder = folder / "copy"
        self.copy: LedgerCopy | None = None
        self.copies = 0
        self.followed_height = 0
        self.events: Counter[type] = Counter()

    def close(self) -> None:
        if self.copy is not None:
            self.copy.close()
        self.network.close()

    # What happens

    def step(self) -> None:
        """Something, by chance."""
        self.now_s += self.chance.choice((0.0, 0.02, 0.1, 0.5, 2.0))
        happenings = {
            self.somebody_submits: 14,
            self.somebody_asks: 7,
            self.decide: 10,
            self.a_node_goes_or_comes: 12,
            self.the_gateway_restarts: 3,
            self.somebody_restarts: 2,
            self.b2_reconnects: 3,
            self.work: 24,
            self.b1_turns: 6,
            self.b2_turns: 12,
            self.b2_copies: 3,
        }
        (happens,) = self.chance.choices(list(happenings), list(happenings.values()))
        happens()

    def somebody_submits(self) -> None:
        self.number += 1
        start_s = world.T0 + self.number * world.INTERVAL_S
        kind = self.chance.randrange(4)
        if kind == 0:
            moved = world.issue("wind-1", 900, start_s), world.take("wind-1", 0, 500, start_s=start_s)
            self.b1.submits(world.batch(*moved))
        elif kind == 1 and not self.issued:
            self.issued = True
            self.b1.submits(world.batch(world.issue("solar-1", 1_000), world.take("solar-1", 0, 1_000)))
        elif kind == 2:
            revision = self.chance.randrange(1, 9)
            self.b1.submits(world.batch(world.correct("solar-1", 100 + self.number, revision)))
        else:
            party = self.chance.choice((self.b1, self.b2))
            party.submits(world.batch(Void(self.number.to_bytes(16, "big")), by=party.name))

    def somebody_asks(self) -> None:
        self.chance.choice((self.b1, self.b2)).client.ask_made("solar-1", world.T0)

    def decide(self) -> None:
        self.network.make_block()
        self._note()

    def a_node_goes_or_comes(self) -> None:
        node = self.chance.choice(self.nodes)
        if self.chance.random() < 0.5:
            node.down = not node.down
        else:
            node.cut_off = not node.cut_off
        if not node.down and not node.cut_off and self.chance.random() < 0.7:
            node.catch_up()

    def the_gateway_restarts(self) -> None:
        """It knows how far it was itself, which may be less than what it had told others."""
        known = max([party.client.height for party in self.parties.values()])
        self.host[0].close()
        self.host[1].close()
        self.host = self._gateway("v1", None, max(0, known - self.chance.randrange(4)))
        self._publish(self.host[1].start())

    def somebody_restarts(self) -> None:
        party = self.chance.choice((self.b1, self.b2))
        party.client = self._client(party.name, party.cursor)
        party.height, party.loaded = (None if party.cursor is None else party.cursor[0]), False
        for raw in party.stored.values():
            party.client.submit(raw)
        if party is self.b1:
            self.own[0].close()
            self.own[1].close()
            self.own = self._gateway("b1", Signer("b1", world.key("b1").public), party.height or 0)
        self.b2_reconnects()

    def b2_reconnects(self) -> None:
        self.b2.client.on_connect()
        for message in self.retained:
            self._hand_over(self.b2, message)

    def work(self) -> None:
        self.chance.choice((self.host, self.own))[0].work_once(self.now_s)

    def b1_turns(self) -> None:
        self._take_events(self.b1)
        answers = [answer for raw in self.b1.client.tick(self.now_s) for answer in self.own[1].on_message(raw)]
        for message in [*answers, *self.own[1].commit()]:
            self._hand_over(self.b1, message)
        self._take_events(self.b1)

    def b2_turns(self) -> None:
        self._take_events(self.b2)
        self._say_to_gateway(self.b2.client.tick(self.now_s))
        self._publish(self.host[1].commit())
        if self.chance.random() < 0.6:
            air, self.air = self.air, []
            for message in air:
                if not self._lost():
                    self._hand_over(self.b2, message)
        self._take_events(self.b2)

    def b2_copies(self) -> None:
        if self.copy is None:
            followed = self.b2.cursor
            self.followed_height = 0 if followed is None else followed[0]
            self.copy = LedgerCopy(
                self.copy_folder, self.network.genesis, "b2", world.key("b2"), self.chance.randbytes, followed
            )
        self._say_to_gateway(self.copy.tick(self.now_s))
        if self.copy.done:
            assert self.copy.height >= self.followed_height
            self.copies += 1
            self.copy.close()
            self.copy = None

    # The end

    def come_to_rest(self) -> None:
        """All nodes are back and nothing is lost any more: everybody gets to the end of the ledger."""
        self.calm = True
        for node in self.nodes:
            node.down = node.cut_off = False
            node.catch_up()
        self.copies = 0
        for _ in range(800):
            self.now_s += 0.25
            for engine, _gateway in (self.host, self.own):
                engine.work_once(self.now_s)
            self.b1_turns()
            self.b2_copies()
            self.b2_turns()
            if self.network.mempool:
                self.decide()
            elif self.copies > 1 and all(self._is_through(party) for party in self.parties.values()):
                return
        told = [(party.name, party.height, len(party.stored)) for party in self.parties.values()]
        raise AssertionError(f"not at rest at height {self._height}: {told}")

    def _is_through(self, party: Party) -> bool:
        return party.client.loaded and party.height == self._height and not party.stored and not party.client.pending

    # Inside

    @property
    def _height(self) -> int:
        return self.onlooker.application.head.height

    def _disturb(self, node: FakeNode) -> None:
        """Between any two questions the ledger may go on; and an answer may get lost."""
        true = node.query

        def query(path: str, data: bytes) -> bytes:
            if not self.calm and self.chance.random() < 0.08:
                self.decide()
            if not self.calm and self.chance.random() < 0.03:
                raise NodeError(node.url, "no answer (lost)")
            return true(path, data)

        node.query = query  # type: ignore[method-assign]

    def _note(self) -> None:
        """What is true at this height."""
        self.made[self._height] = self._ask("/made", ["solar-1", world.T0])
        for name in ("b1", "b2"):
            _, entries, cursor = self._ask("/holdings", [name, None])
            while cursor is not None:
                _, page, cursor = self._ask("/holdings", [name, cursor])
                entries += page
            self.held[self._height, name] = entries

    def _ask(self, path: str, question: Any) -> Any:
        return cbor.decode(self.onlooker.query(path, cbor.encode(question)), path, 2**22)

    def _gateway(self, name: str, own: Signer | None, known: int) -> tuple[CometbftLedger, Gateway]:
        engine = CometbftLedger(
            self.network.genesis, self.chance.sample(self.nodes, len(self.nodes)), own, known_height=known
        )
        return engine, Gateway(engine, TOPICS, name, world.key(name))

    def _client(self, name: str, cursor: tuple[int, bytes] | None) -> LedgerClient:
        return LedgerClient(self.network.genesis, name, world.key(name), self.chance.randbytes, resume=cursor)

    def _lost(self) -> bool:
        return not self.calm and self.chance.random() < 0.1

    def _say_to_gateway(self, payloads: list[bytes]) -> None:
        for raw in payloads:
            if not self._lost():
                self._publish(self.host[1].on_message(raw))

    def _publish(self, messages: list[Outgoing]) -> None:
        self.retained = [message for message in messages if message.retain][-1:] or self.retained
        self.air += messages

    def _hand_over(self, party: Party, message: Outgoing) -> None:
        _, _, leaf, *receiver = TOPICS.split(message.topic)
        if receiver not in ([], [party.name]):
            return
        for listener in (party.client, self.copy if party is self.b2 and leaf == "result" else None):
            try:
                if isinstance(listener, LedgerClient):
                    listener.on_message(leaf, message.payload, own_node=party is self.b1)
                elif listener is not None:
                    listener.on_result(message.payload)
            except ProtocolError:
                continue  # Of a node that is behind: asked again.

    def _take_events(self, party: Party) -> None:
        events = party.client.events()
        for event in events:
            self.events[type(event)] += 1
            self._check(party, event)
        if party.client.loaded or any(isinstance(event, BlockApplied) for event in events):
            party.cursor = party.client.height, party.client.block_id

    def _check(self, party: Party, event: Event) -> None:
        match event:
            case LedgerFault():
                raise AssertionError(f"{party.name} has found {event}")
            case HoldingsLoaded():
                assert not party.loaded
                assert party.height in (None, event.height)
                party.loaded, party.height = True, event.height
                held = self.held[event.height, party.name]
                assert event.holdings == tuple(decode_holding(raw) for raw in held)
            case BlockApplied():
                assert party.height is not None
                party.height += 1
                assert event.height == party.height
            case MadeKnown():
                assert event.made.height == party.height
                assert self.made[event.made.height] == [event.made.to_bytes()]
            case BatchCommitted():
                party.committed[event.batch_id] += 1
                assert party.committed[event.batch_id] == 1
                party.stored.pop(event.batch_id, None)
            case BatchRefused():
                # Something that it builds on was not there; a broker of this test gives it up. It may be handed in
                # once more all the same, and be taken then.
                del party.stored[event.batch_id]


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_happens_to_nodes_gateway_and_messages_brokers_are_told_what_is_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    sizes = Random(seed)
    for module in (gateway_module, follower_module):
        monkeypatch.setattr(module, "MAX_BLOCK_BYTES", sizes.choice((2**21, 1_500)))
    for module in (holdings_view, engine_module):
        monkeypatch.setattr(module, "MAX_HOLDINGS_ON_PAGE", sizes.choice((4_096, 2, 1)))
    monkeypatch.setattr(engine_module, "MAX_BLOCKS_AHEAD", sizes.choice((64, 1)))
    monkeypatch.setattr(follower_module, "MAX_BLOCK_PAGES", sizes.choice((4, 1)))
    market = Market(tmp_path, seed)
    try:
        for _ in range(STEPS):
            market.step()
        market.come_to_rest()
        assert market.events[HoldingsLoaded] >= 2
    finally:
        market.close()
    report = verify_ledger(tmp_path / "copy", helpers=0)
    assert report.errors == ()
    assert report.height >= max(1, market.followed_height)
