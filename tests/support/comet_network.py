"""A network of applications without CometBFT: one order of transactions, nodes that can be away, busy or wrong.

What CometBFT would do between them is done here by hand, so a test says exactly when a block is made and who has it.
"""

from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from broker.ledger.cometbft import abci
from broker.ledger.cometbft.application import NodeApplication
from broker.ledger.cometbft.rpc import Checked, NodeBusy, NodeError, QueryRefused
from broker.protocol.messages import NamedKey
from support import ledger_world as world
from support.comet_driver import init_chain_request


@dataclass
class FakeNode:
    """One node as a follower sees it; `asked` counts its answers."""

    url: str
    application: NodeApplication
    network: "FakeNetwork"
    down: bool = False
    busy: bool = False
    cut_off: bool = False
    """It takes batches, and neither hands them on nor hears of blocks."""
    asked: int = 0
    blocks_done: int = 0
    given: list[bytes] = field(default_factory=list)
    forged: dict[str, bytes] = field(default_factory=dict)
    """Answers to give in place of the true ones, by path."""

    def query(self, path: str, data: bytes) -> bytes:
        self._answer()
        if path in self.forged:
            return self.forged[path]
        answer = self.application.handle(abci.QueryRequest(data, path))
        assert isinstance(answer, abci.QueryResponse)
        if answer.code:
            raise QueryRefused(self.url, answer.log)
        return answer.value

    def submit(self, raw_batch: bytes) -> Checked:
        self._answer()
        if self.busy:
            raise NodeBusy(self.url, "mempool is full")
        self.given.append(raw_batch)
        if raw_batch in self.network.seen:
            return Checked(0, "", known=True)
        answer = self.application.handle(abci.CheckTxRequest(raw_batch))
        assert isinstance(answer, abci.CheckTxResponse)
        if answer.code == 0 and not self.cut_off:
            self.network.seen.add(raw_batch)
            self.network.mempool.append(raw_batch)
        return Checked(answer.code, answer.log)

    def close(self) -> None:
        """The test closes the application."""

    def catch_up(self) -> None:
        for number, txs in enumerate(self.network.blocks[self.blocks_done :], self.blocks_done + 1):
            content = sha256(number.to_bytes(8, "big") + b"".join(txs)).digest()
            answer = self.application.handle(abci.FinalizeBlockRequest(tuple(txs), content, number))
            assert isinstance(answer, abci.FinalizeBlockResponse)
            self.application.handle(abci.CommitRequest())
            for raw, result in zip(txs, answer.tx_results, strict=True):
                if result.code:
                    self.network.seen.discard(raw)
        self.blocks_done = len(self.network.blocks)

    def _answer(self) -> None:
        if self.down:
            raise NodeError(self.url, "no answer (refused)")
        self.asked += 1


class FakeNetwork:
    """`names` are its validators. `make_block` decides what is in the mempool."""

    def __init__(self, folder: Path, *names: str) -> None:
        named = tuple(NamedKey(name, world.key(name).public.cose_key) for name in names)
        self.genesis = world.genesis(validators=named)
        self.mempool: list[bytes] = []
        self.seen: set[bytes] = set()
        self.blocks: list[list[bytes]] = []
        self.nodes = tuple(
            FakeNode(f"http://{name}", NodeApplication(folder / name, self.genesis, name, world.key(name)), self)
            for name in names
        )
        for node in self.nodes:
            node.application.handle(init_chain_request(self.genesis))
        self.make_block()

    def make_block(self) -> None:
        self.blocks.append(self.mempool)
        self.mempool = []
        for node in self.nodes:
            if not node.down and not node.cut_off:
                node.catch_up()

    def close(self) -> None:
        for node in self.nodes:
            node.application.close()
