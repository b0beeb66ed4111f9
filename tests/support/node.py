"""A node's ABCI application, driven by its messages without a socket, on a network of three validators."""

from pathlib import Path
from typing import Any

from broker.ledger.cometbft import abci
from broker.ledger.cometbft.application import SNAPSHOT_EVERY, NodeApplication
from broker.protocol import cbor
from broker.protocol.messages import NamedKey
from support.comet_driver import block, init_chain_request
from support.ledger_world import genesis, key

NODES = ("node", "node-2", "node-3")
NETWORK = genesis(validators=tuple(NamedKey(name, key(name).public.cose_key) for name in NODES))


class Node:
    """An application in a directory."""

    def __init__(self, path: Path, name: str = "node", every: int = SNAPSHOT_EVERY) -> None:
        self.path = path
        self.name = name
        self.every = every
        self.application = self.opened()

    def opened(self) -> NodeApplication:
        return NodeApplication(self.path, NETWORK, self.name, key(self.name), self.every)

    def ask(self, request: Any) -> Any:
        return self.application.handle(request)

    def init_chain(self) -> None:
        self.ask(init_chain_request(NETWORK, self.every))

    def make_block(self, *txs: bytes) -> abci.FinalizeBlockResponse:
        response: abci.FinalizeBlockResponse = self.ask(block(self.application.network_height + 1, *txs))
        self.ask(abci.CommitRequest())
        return response

    def query(self, path: str, question: Any = None) -> Any:
        answer = self.ask(abci.QueryRequest(b"" if question is None else cbor.encode(question), path))
        assert answer.code == 0, answer.log
        return cbor.decode(answer.value, "answer", 2**22)

    def restart(self) -> None:
        self.application.close()
        self.application = self.opened()
