"""What a node can be asked over ABCI Query (`abci_query` of CometBFT's RPC). Questions and answers are CBOR.

| path | question | answer |
|---|---|---|
| /genesis | – | the genesis |
| /head | – | [head (`chain.Head`), network height, rows digest] |
| /checkpoint | – | the sealed Checkpoint of the head, by this node's key |
| /blocks | [from height, bytes at most] | [height, [sealed block …]]; at least one block if there is any |
| /holdings | [party, cursor or null] | [height, [holding …], next cursor or null] |
| /signer | key id | [name, COSE_Key] of a registered party, or null |
| /prove | [query kind, place] | entries of a page (`proving.prove`); none if it cannot be proven |
| /made | [device, start] | entries of a page of kind made; none without such a device |
| /device | [device] | entries of a page of kind device; none without such a device |
| /result | batch id | [0, ledger height], [1, network height, operation or null, fault, reason], or null if not known |

Pages of holdings are of one height; where it changes between two pages, they begin anew. A refusal is remembered for a
while only.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from broker.ledger.admitted import admitted_of
from broker.ledger.chain import Head
from broker.ledger.cometbft.views import HoldingsViews
from broker.ledger.made import made_of
from broker.ledger.opening import party_signer
from broker.ledger.proving import prove
from broker.ledger.receipts import ProofFailed
from broker.ledger.store import Store
from broker.protocol import cbor
from broker.protocol.codec import Bytes, Choice, Name, Row, Unsigned
from broker.protocol.errors import MalformedMessage
from broker.protocol.keys import KEY_ID_BYTES
from broker.protocol.limits import MAX_BLOCK_BYTES
from broker.protocol.messages import Genesis, QueryKind

MAX_QUESTION_BYTES: Final = 512


class QueryError(Exception):
    """A question that cannot be answered; the text says why."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a batch was refused in block `network_height` of CometBFT. `operation` is None for the batch as a whole."""

    network_height: int
    operation: int | None
    fault: str
    reason: str


@dataclass(frozen=True, slots=True)
class Sources:
    """What the answers are made of, as of now."""

    store: Store
    genesis: Genesis
    head: Head
    network_height: int
    rows_digest: bytes
    refusals: Mapping[bytes, Refusal]
    checkpoint: bytes
    views: HoldingsViews


def answer_query(path: str, question: bytes, sources: Sources) -> bytes:
    """The answer's bytes. Raises QueryError."""
    answer = _ANSWERS.get(path)
    if answer is None:
        raise QueryError(f"no such path; ask one of {', '.join(_ANSWERS)}")
    try:
        return answer(sources, question)
    except MalformedMessage as error:
        raise QueryError(str(error)) from error


def _genesis(sources: Sources, _: bytes) -> bytes:
    return sources.genesis.to_bytes()


def _head(sources: Sources, _: bytes) -> bytes:
    return cbor.encode([sources.head.to_bytes(), sources.network_height, sources.rows_digest])


def _checkpoint(sources: Sources, _: bytes) -> bytes:
    return sources.checkpoint


_BLOCKS_QUESTION: Final = Row((Unsigned(minimum=1), Unsigned()))


def _blocks(sources: Sources, question: bytes) -> bytes:
    from_height, most = _BLOCKS_QUESTION.decode(_decoded(question), "question")
    blocks: list[bytes] = []
    size = 0
    for _, _, raw in sources.store.blocks(from_height):
        size += len(raw)
        if blocks and size > min(most, MAX_BLOCK_BYTES):
            break
        blocks.append(raw)
    return cbor.encode([sources.head.height, blocks])


def _holdings(sources: Sources, question: bytes) -> bytes:
    asked = _decoded(question)
    if type(asked) is not list or len(asked) != 2:
        raise MalformedMessage("question", "[party, cursor or null]")
    party = Name().decode(asked[0], "party")
    cursor = None if asked[1] is None else Bytes(1, 256).decode(asked[1], "cursor")
    page = sources.views.page(party, cursor)
    return cbor.encode([page.height, page.entries, page.next_cursor])


def _signer(sources: Sources, question: bytes) -> bytes:
    key_id = Bytes(KEY_ID_BYTES, KEY_ID_BYTES).decode(_decoded(question), "question")
    signer = party_signer(sources.store, key_id)
    return cbor.encode(None if signer is None else [signer.name, signer.key.cose_key])


_PROVE_QUESTION: Final = Row((Choice(QueryKind), Unsigned()))


def _prove(sources: Sources, question: bytes) -> bytes:
    kind, place = _PROVE_QUESTION.decode(_decoded(question), "question")
    try:
        return cbor.encode(prove(sources.store, sources.genesis.ledger, kind, place))
    except ProofFailed:
        return cbor.encode([])


_MADE_QUESTION: Final = Row((Name(), Unsigned()))


def _made(sources: Sources, question: bytes) -> bytes:
    device, start_s = _MADE_QUESTION.decode(_decoded(question), "question")
    made = made_of(sources.store, sources.head.height, device, start_s)
    return cbor.encode([] if made is None else [made.to_bytes()])


_DEVICE_QUESTION: Final = Row((Name(),))


def _device(sources: Sources, question: bytes) -> bytes:
    (device,) = _DEVICE_QUESTION.decode(_decoded(question), "question")
    admitted = admitted_of(sources.store, device)
    return cbor.encode([] if admitted is None else [admitted.to_bytes()])


def _result(sources: Sources, question: bytes) -> bytes:
    batch_id = Bytes(32, 32).decode(_decoded(question), "question")
    height = sources.store.height_of(batch_id)
    if height is not None:
        return cbor.encode([0, height])
    refusal = sources.refusals.get(batch_id)
    if refusal is None:
        return cbor.encode(None)
    return cbor.encode([1, refusal.network_height, refusal.operation, refusal.fault, refusal.reason])


def _decoded(question: bytes) -> Any:
    return cbor.decode(question, "question", MAX_QUESTION_BYTES)


_ANSWERS: Final[Mapping[str, Callable[[Sources, bytes], bytes]]] = {
    "/genesis": _genesis,
    "/head": _head,
    "/checkpoint": _checkpoint,
    "/blocks": _blocks,
    "/holdings": _holdings,
    "/signer": _signer,
    "/prove": _prove,
    "/made": _made,
    "/device": _device,
    "/result": _result,
}
