"""One node over HTTP: what counts as an answer, a refusal to take more, and silence."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from broker.ledger.cometbft import rpc
from broker.ledger.cometbft.rpc import HttpNode, NodeBusy, NodeError, QueryRefused
from firmware_config.loader import WrongValue


class Server:
    """Gives every request the same answer; keeps what it was asked."""

    def __init__(self) -> None:
        self.answer: Any = None
        self.asked: list[dict[str, Any]] = []
        self.close_after_each = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                raw = outer.answer if isinstance(outer.answer, bytes) else json.dumps(outer.answer).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)
                # Without a word beforehand, as a node that restarts does.
                self.close_connection = outer.close_after_each

            def log_message(self, *_: Any) -> None:
                """Not into the test's output."""

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def node(server: Server) -> Iterator[HttpNode]:
    made = HttpNode(server.url, 2.0)
    yield made
    made.close()


def test_a_query_and_its_answer(server: Server, node: HttpNode) -> None:
    server.answer = {"result": {"response": {"code": 0, "value": base64.b64encode(b"\x01\x02").decode()}}}
    assert node.query("/head", b"\xab") == b"\x01\x02"
    assert server.asked[0]["method"] == "abci_query"
    assert server.asked[0]["params"] == {"path": "/head", "data": "ab"}


def test_a_batch_that_a_node_takes(server: Server, node: HttpNode) -> None:
    server.answer = {"result": {"code": 0, "log": "", "hash": "AB"}}
    assert node.submit(b"batch") == rpc.Checked(0, "")
    assert server.asked[0]["params"] == {"tx": base64.b64encode(b"batch").decode()}


def test_a_batch_that_a_node_knows_already(server: Server, node: HttpNode) -> None:
    server.answer = {"error": {"code": -32603, "message": "Internal error", "data": "tx already exists in cache"}}
    assert node.submit(b"batch").known


def test_a_full_node(server: Server, node: HttpNode) -> None:
    server.answer = {"error": {"code": -32603, "message": "Internal error", "data": "mempool is full: number of txs"}}
    with pytest.raises(NodeBusy, match="mempool is full"):
        node.submit(b"batch")


def test_a_query_that_the_application_refuses(server: Server, node: HttpNode) -> None:
    server.answer = {"result": {"response": {"code": 1, "log": "no such path", "value": None}}}
    with pytest.raises(QueryRefused, match="no such path"):
        node.query("/nonsense", b"")


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>",
        b"[]",
        b"\xff",
        {},
        {"result": None},
        {"result": {"response": None}},
        {"result": {"response": {"value": 1}}},
        {"result": {"response": {"value": "é"}, "code": "é"}},
        b'{"result": {"code": Infinity, "log": ""}}',
        b"[" * 200_000,
    ],
    ids=lambda answer: str(answer)[:40],
)
def test_what_is_no_answer_of_a_node(server: Server, node: HttpNode, answer: Any) -> None:
    server.answer = answer
    with pytest.raises(NodeError):
        node.query("/head", b"")
    with pytest.raises(NodeError):
        node.submit(b"batch")


def test_an_endless_answer_is_cut_off(server: Server, node: HttpNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "MAX_ANSWER_BYTES", 100)
    server.answer = b" " * 101
    with pytest.raises(NodeError, match="more than 100 bytes"):
        node.query("/head", b"")


def test_a_connection_that_was_closed_between_two_questions_is_opened_again(server: Server, node: HttpNode) -> None:
    server.close_after_each = True
    server.answer = {"result": {"response": {"code": 0, "value": ""}}}
    assert [node.query("/head", b"") for _ in range(3)] == [b""] * 3


def test_nobody_there() -> None:
    server = Server()
    server.close()
    with pytest.raises(NodeError, match="no answer"):
        HttpNode(server.url, 2.0).query("/head", b"")


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:26657", "ftp://node", "http://", "http://node/path", "http://node:port"]
)
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(WrongValue):
        HttpNode(url, 1.0)
