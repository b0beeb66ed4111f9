"""Asks one CometBFT node over its JSON-RPC, one question at a time on a connection that stays open.

What a node answers is only read here; whether it is believed is for `follower` to say.
Source: https://docs.cometbft.com/v0.38/rpc/
"""

import base64
import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

from broker.protocol.files import reason_of
from firmware_config.loader import WrongValue

MAX_ANSWER_BYTES: Final = 16 * 2**20
"""A page of blocks in base64 is under 3 MB; a node that says more is not one of ours."""


class NodeError(Exception):
    """A node that did not answer, or not as a node does. `node` is its URL."""

    def __init__(self, node: str, reason: str) -> None:
        super().__init__(f"{node}: {reason}")
        self.node = node
        self.reason = reason


class NodeBusy(NodeError):
    """A node that answers, but takes no more batches now."""


class QueryRefused(NodeError):
    """A node that answers, but does not take this question: its program is of another version."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What a node says of a batch that it was given: the application's `code` of CheckTx and its `log`."""

    code: int
    log: str
    known: bool = False
    """It has seen these bytes before, and said nothing new."""


class Node(Protocol):
    """What a follower needs of a node."""

    @property
    def url(self) -> str: ...

    def query(self, path: str, data: bytes) -> bytes:
        """The application's answer to a query. Raises QueryRefused where it takes none, or else NodeError."""

    def submit(self, raw_batch: bytes) -> Checked:
        """Hand in a batch. Raises NodeBusy where it must be handed in again, NodeError if nobody knows."""

    def close(self) -> None: ...


class HttpNode:
    """A node at `url`, `http://HOST:PORT`. Every answer is waited for at most `timeout_s`."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url = url
        self._timeout_s = timeout_s
        self._connection = _connection(url, timeout_s)

    def query(self, path: str, data: bytes) -> bytes:
        result = self._call("abci_query", {"path": path, "data": data.hex()})
        try:
            response = result["response"]
            if response.get("code", 0) != 0:
                raise QueryRefused(self.url, f"it refuses the query {path}: {response.get('log')}")
            return base64.b64decode(response.get("value") or "", validate=True)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise NodeError(self.url, f"its answer to {path} is none of CometBFT's ({error!r})") from error

    def submit(self, raw_batch: bytes) -> Checked:
        try:
            result = self._call("broadcast_tx_sync", {"tx": base64.b64encode(raw_batch).decode()})
        except _Said as said:
            if "already exists in cache" in said.reason:
                return Checked(0, "", known=True)
            raise NodeBusy(self.url, said.reason) from said
        try:
            return Checked(int(result["code"]), str(result["log"]))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise NodeError(self.url, f"its answer to a batch is none of CometBFT's ({error!r})") from error

    def call(self, method: str, parameters: dict[str, str]) -> str:
        """The result of one of CometBFT's own methods, as JSON. Raises NodeError."""
        return json.dumps(self._call(method, parameters))

    def close(self) -> None:
        self._connection.close()

    def _call(self, method: str, parameters: Mapping[str, Any]) -> Any:
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": dict(parameters)})
        try:
            raw = self._exchanged(body)
            answer = json.loads(raw)
            if "error" in answer:
                error = answer["error"]
                raise _Said(self.url, f"{method}: {error.get('message')} {error.get('data')}")
            return answer["result"]
        except (OSError, http.client.HTTPException) as failure:
            self._connection.close()
            raise NodeError(self.url, f"no answer ({reason_of(failure)})") from failure
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as failure:
            self._connection.close()
            raise NodeError(self.url, f"its answer is no JSON-RPC ({failure!r})") from failure

    def _exchanged(self, body: str) -> bytes:
        fresh = self._connection.sock is None
        try:
            return self._exchange(body)
        except (ConnectionError, http.client.BadStatusLine):
            # An open connection may have been closed by the node between two questions; a new one has no such excuse.
            self._connection.close()
            if fresh:
                raise
            return self._exchange(body)

    def _exchange(self, body: str) -> bytes:
        self._connection.request("POST", "/", body, {"Content-Type": "application/json"})
        with self._connection.getresponse() as response:
            raw = response.read(MAX_ANSWER_BYTES + 1)
        if len(raw) > MAX_ANSWER_BYTES:
            raise ValueError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
        return raw


class _Said(NodeError):
    """A JSON-RPC error: the node is there and says no."""


def _connection(url: str, timeout_s: float) -> http.client.HTTPConnection:
    """A connection that is not opened yet. Raises WrongValue for a URL that is none."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise WrongValue("nodes", f"http://HOST:PORT of each node, got {url!r}") from error
    if parts.scheme not in ("http", "https") or host is None or parts.path not in ("", "/") or parts.query:
        raise WrongValue("nodes", f"http://HOST:PORT of each node, got {url!r}")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(host, port, timeout=timeout_s)
