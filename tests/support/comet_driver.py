"""Plays CometBFT in front of the ledger's application: its messages over a real unix socket, without consensus."""

import json
import socket
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from dengen_testing.waiting import wait_until

from broker.ledger.cometbft import abci
from broker.ledger.cometbft.application import SNAPSHOT_EVERY, app_state_of, consensus_key
from broker.ledger.cometbft.framing import FrameReader, framed
from broker.ledger.cometbft.protobuf import Message
from broker.protocol import cbor
from broker.protocol.messages import Genesis
from support.ledger_world import GENESIS

_M = TypeVar("_M", bound=Message)


class Refused(Exception):
    """The application answered with an exception; a real CometBFT would stop."""


class HungUp(Exception):
    """The application closed the connection, or was killed."""


class CometDriver:
    """One connection of CometBFT."""

    def __init__(self, socket_path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(20)
        wait_until(lambda: _connects(self._socket, socket_path), "the application to listen", limit_s=20)
        self._reader = FrameReader()
        self._answers: list[Message] = []

    def close(self) -> None:
        self._socket.close()

    def ask(self, request: Message, answer_class: type[_M]) -> _M:
        """Send one request with a flush, as CometBFT does, and take both answers."""
        answer = self.ask_all(request, abci.FlushRequest())[0]
        assert isinstance(answer, answer_class)
        return answer

    def ask_all(self, *requests: Message) -> list[Message]:
        """Send requests in one go; their answers in order."""
        try:
            self._socket.sendall(b"".join(framed(abci.encode_request(request)) for request in requests))
            while len(self._answers) < len(requests):
                data = self._socket.recv(65_536)
                if not data:
                    raise HungUp
                self._answers += [abci.decode_response(frame) for frame in self._reader.feed(data)]
                for answer in self._answers:
                    if isinstance(answer, abci.ExceptionResponse):
                        raise Refused(answer.error)
        except ConnectionError as error:
            raise HungUp from error
        answers, self._answers = self._answers, []
        return answers

    def info(self) -> abci.InfoResponse:
        return self.ask(abci.InfoRequest("0.38.25"), abci.InfoResponse)

    def init_chain(self, genesis: Genesis = GENESIS, **changes: Any) -> abci.InitChainResponse:
        return self.ask(init_chain_request(genesis, **changes), abci.InitChainResponse)

    def finalize(self, height: int, *txs: bytes) -> abci.FinalizeBlockResponse:
        return self.ask(block(height, *txs), abci.FinalizeBlockResponse)

    def commit(self) -> abci.CommitResponse:
        return self.ask(abci.CommitRequest(), abci.CommitResponse)

    def make_block(self, height: int, *txs: bytes) -> abci.FinalizeBlockResponse:
        """Decide and commit one block."""
        response = self.finalize(height, *txs)
        self.commit()
        return response

    def query(self, path: str, question: Any = None) -> Any:
        """The decoded answer; raises Refused where the node has none."""
        data = b"" if question is None else cbor.encode(question)
        answer = self.ask(abci.QueryRequest(data, path), abci.QueryResponse)
        if answer.code:
            raise Refused(answer.log)
        return cbor.decode(answer.value, "answer", 2**22)


def init_chain_request(
    genesis: Genesis = GENESIS, every: int = SNAPSHOT_EVERY, **changes: Any
) -> abci.InitChainRequest:

    values: dict[str, Any] = {
        "chain_id": genesis.ledger,
        "validators": tuple(
            abci.ValidatorUpdate(abci.PublicKey(consensus_key(named.key)), 1) for named in genesis.validators
        ),
        "app_state": json.dumps(app_state_of(genesis, every)).encode(),
        "initial_height": 1,
    }
    return abci.InitChainRequest(**(values | changes))


def block(height: int, *txs: bytes) -> abci.FinalizeBlockRequest:
    """A decided block; its hash follows from its content."""
    content = sha256(height.to_bytes(8, "big") + b"".join(sha256(tx).digest() for tx in txs)).digest()
    return abci.FinalizeBlockRequest(txs, content, height)


def _connects(connecting: socket.socket, socket_path: Path) -> bool:
    try:
        connecting.connect(str(socket_path))
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    return True
