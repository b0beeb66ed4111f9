"""Gets a certificate of the ledger's newest block from a node of the network. Whoever uses it checks it."""

import time
from collections.abc import Callable
from typing import Final, Protocol

from broker.ledger.certificate import Certificate
from broker.ledger.chain import Head
from broker.ledger.cometbft.rpc import NodeError
from broker.ledger.commit import APP_HASH, BlockId, read_commit, read_validators
from broker.ledger.rows_digest import app_hash_of
from broker.protocol import cbor
from broker.protocol.errors import ProtocolError
from broker.protocol.limits import MAX_BLOCK_BYTES
from broker.protocol.messages import QueryKind

WAIT_S: Final = 0.2
_MAX_ANSWER_BYTES: Final = 2 * MAX_BLOCK_BYTES


class CommitNode(Protocol):
    """What is asked of a node."""

    @property
    def url(self) -> str: ...

    def query(self, path: str, data: bytes) -> bytes:
        """The application's answer to a query. Raises NodeError."""

    def call(self, method: str, parameters: dict[str, str]) -> str:
        """The result of one of CometBFT's own methods, as JSON. Raises NodeError."""


def certify(
    node: CommitNode,
    ledger: str,
    limit_s: float,
    *,
    monotonic_s: Callable[[], float] = time.monotonic,
    pause: Callable[[float], object] = time.sleep,
) -> Certificate:
    """A certificate of the last block of `ledger`, as soon as the validators have signed the header that carries it.

    Raises NodeError if the node does not give one within `limit_s`; nothing of what it gives is believed yet.
    """
    until_s = monotonic_s() + limit_s
    while True:
        try:
            found = _try(node, ledger)
        except ProtocolError as error:
            raise NodeError(node.url, f"its answer is none of a node's ({error})") from error
        if found is not None:
            return found
        if monotonic_s() >= until_s:
            raise NodeError(node.url, "the network has no certificate for the last block yet; try again")
        pause(WAIT_S)


def _try(node: CommitNode, ledger: str) -> Certificate | None:
    match cbor.decode(node.query("/head", b""), "/head", _MAX_ANSWER_BYTES):
        case [bytes(raw), int(network_height), bytes(rows_digest)]:
            head = Head.from_bytes(raw)
        case _:
            raise NodeError(node.url, "its answer to /head is none")
    if head.height == 0:
        return None
    app_hash = app_hash_of(head.block_id, rows_digest)
    # An idle network stops one block after the last change; a busy one has moved on already.
    for height in (network_height + 1, network_height):
        try:
            header, commit = read_commit(node.call("commit", {"height": str(height)}))
        except NodeError:
            continue  # Not there yet.
        if header.hashes[APP_HASH] != app_hash:
            continue
        validators = read_validators(node.call("validators", {"height": str(height), "per_page": "100"}))
        return Certificate(
            ledger,
            head.block_id,
            rows_digest,
            header,
            commit.round,
            BlockId(*commit.block_id),
            tuple((place, vote.time, vote.signature) for place, vote in enumerate(commit.votes) if vote is not None),
            tuple((one.raw_key, one.power) for one in validators),
            _changes(node),
        )
    return None


def _changes(node: CommitNode) -> tuple[bytes, ...]:
    found: list[bytes] = []
    while True:
        question = cbor.encode([int(QueryKind.VALIDATORS), len(found)])
        match cbor.decode(node.query("/prove", question), "/prove", _MAX_ANSWER_BYTES):
            case []:
                return tuple(found)
            case list(changes) if all(type(raw) is bytes for raw in changes):
                found += changes
            case _:
                raise NodeError(node.url, "its answer to /prove is none")
