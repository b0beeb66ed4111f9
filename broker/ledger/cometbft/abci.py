"""The messages between CometBFT v0.38 and its application (ABCI 2.0), with the fields that this application uses. Pure.

Requests keep only what is read here; what else CometBFT sends is passed over. Field numbers are those of
https://github.com/cometbft/cometbft/blob/v0.38.25/proto/tendermint/abci/types.proto; tests/vectors/abci.json holds
bytes that CometBFT's own library made of the same messages.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Final

from broker.ledger.cometbft.protobuf import Field, Kind, MalformedProtobuf, Message, decode, encode, sole_field, wrapped


class CheckType(IntEnum):
    """Whether a transaction is new or was checked before."""

    NEW = 0
    RECHECK = 1


class ProposalStatus(IntEnum):
    """The answer to a proposed block."""

    ACCEPT = 1
    REJECT = 2


class VoteStatus(IntEnum):
    """The answer to a vote extension."""

    ACCEPT = 1
    REJECT = 2


class OfferResult(IntEnum):
    """What becomes of an offered snapshot."""

    ACCEPT = 1
    ABORT = 2
    REJECT = 3
    REJECT_FORMAT = 4
    REJECT_SENDER = 5


class ChunkResult(IntEnum):
    """What becomes of a snapshot's chunk."""

    ACCEPT = 1
    ABORT = 2
    RETRY = 3
    RETRY_SNAPSHOT = 4
    REJECT_SNAPSHOT = 5


# --- parts


@dataclass(frozen=True, slots=True)
class PublicKey(Message):
    """A validator's key: 32 bytes of Ed25519. Another kind of key comes as empty bytes."""

    ed25519: bytes = b""

    FIELDS: ClassVar[tuple[Field, ...]] = (Field(1, "ed25519", Kind.BYTES),)


@dataclass(frozen=True, slots=True)
class ValidatorUpdate(Message):
    """A validator and its voting power; 0 removes it."""

    public_key: PublicKey = PublicKey()
    power: int = 0

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(1, "public_key", PublicKey),
        Field(2, "power", Kind.SIGNED),
    )


@dataclass(frozen=True, slots=True)
class BlockParams(Message):
    """The most that a block may hold."""

    max_bytes: int = 0
    max_gas: int = 0

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(1, "max_bytes", Kind.SIGNED),
        Field(2, "max_gas", Kind.SIGNED),
    )


@dataclass(frozen=True, slots=True)
class VersionParams(Message):
    """The version of the rules that all nodes run."""

    app: int = 0

    FIELDS: ClassVar[tuple[Field, ...]] = (Field(1, "app", Kind.UNSIGNED),)


@dataclass(frozen=True, slots=True)
class ConsensusParams(Message):
    """What the application sets of them; None leaves a part as it is."""

    block: BlockParams | None = None
    version: VersionParams | None = None

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(1, "block", BlockParams),
        Field(4, "version", VersionParams),
    )


@dataclass(frozen=True, slots=True)
class TxResult(Message):
    """What became of one transaction. Validators agree on `code` and `data`; `log` is for people."""

    code: int = 0
    data: bytes = b""
    log: str = ""

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(1, "code", Kind.UNSIGNED),
        Field(2, "data", Kind.BYTES),
        Field(3, "log", Kind.TEXT),
    )


@dataclass(frozen=True, slots=True)
class Snapshot(Message):
    """A snapshot by the height at which it was taken."""

    height: int = 0
    format: int = 0
    chunks: int = 0
    hash: bytes = b""
    metadata: bytes = b""

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(1, "height", Kind.UNSIGNED),
        Field(2, "format", Kind.UNSIGNED),
        Field(3, "chunks", Kind.UNSIGNED),
        Field(4, "hash", Kind.BYTES),
        Field(5, "metadata", Kind.BYTES),
    )


# --- requests


@dataclass(frozen=True, slots=True)
class EchoRequest(Message):
    """Asks for the same text back."""

    message: str = ""

    FIELDS: ClassVar[tuple[Field, ...]] = (Field(1, "message", Kind.TEXT),)


@dataclass(frozen=True, slots=True)
class FlushRequest(Message):
    """Whatever was answered so far must be sent now."""


@dataclass(frozen=True, slots=True)
class InfoRequest(Message):
    """Asks where the application stands; sent at each start."""

    version: str = ""

    FIELDS: ClassVar[tuple[Field, ...]] = (Field(1, "version", Kind.TEXT),)


@dataclass(frozen=True, slots=True)
class InitChainRequest(Message):
    """Sent once, before the first block, and again while none is committed. `app_state` is the JSON of genesis.json."""

    chain_id: str = ""
    validators: tuple[ValidatorUpdate, ...] = ()
    app_state: bytes = b""
    initial_height: int = 0

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(2, "chain_id", Kind.TEXT),
        Field(4, "validators", ValidatorUpdate, repeated=True),
        Field(5, "app_state", Kind.BYTES),
        Field(6, "initial_height", Kind.SIGNED),
    )


@dataclass(frozen=True, slots=True)
class QueryRequest(Message):
    """A question of somebody at the RPC."""

    data: bytes = b""
    path: str = ""
    height: int = 0
    prove: bool = False

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(1, "data", Kind.BYTES),
        Field(2, "path", Kind.TEXT),
        Field(3, "height", Kind.SIGNED),
        Field(4, "prove", Kind.BOOL),
    )


@dataclass(frozen=True, slots=True)
class CheckTxRequest(Message):
    """May this transaction wait in the mempool?"""

    tx: bytes = b""
    type: int = CheckType.NEW

    FIELDS: ClassVar[tuple[Field, ...]] = (Field(1, "tx", Kind.BYTES), Field(2, "type", Kind.UNSIGNED))


@dataclass(frozen=True, slots=True)
class CommitRequest(Message):
    """Make what FinalizeBlock did durable."""


@dataclass(frozen=True, slots=True)
class ListSnapshotsRequest(Message):
    """Which snapshots are there?"""


@dataclass(frozen=True, slots=True)
class OfferSnapshotRequest(Message):
    """A snapshot of some peer. `app_hash` is the one that the light client has verified for its height."""

    snapshot: Snapshot = Snapshot()
    app_hash: bytes = b""

    FIELDS: ClassVar[tuple[Field, ...]] = (Field(1, "snapshot", Snapshot), Field(2, "app_hash", Kind.BYTES))


@dataclass(frozen=True, slots=True)
class LoadSnapshotChunkRequest(Message):
    """Asks for a chunk that a peer wants."""

    height: int = 0
    format: int = 0
    chunk: int = 0

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(1, "height", Kind.UNSIGNED),
        Field(2, "format", Kind.UNSIGNED),
        Field(3, "chunk", Kind.UNSIGNED),
    )


@dataclass(frozen=True, slots=True)
class ApplySnapshotChunkRequest(Message):
    """A chunk of the snapshot that was accepted."""

    index: int = 0
    chunk: bytes = b""
    sender: str = ""

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(1, "index", Kind.UNSIGNED),
        Field(2, "chunk", Kind.BYTES),
        Field(3, "sender", Kind.TEXT),
    )


@dataclass(frozen=True, slots=True)
class PrepareProposalRequest(Message):
    """What the mempool holds, for the block that this node is to propose."""

    max_tx_bytes: int = 0
    txs: tuple[bytes, ...] = ()
    height: int = 0

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(1, "max_tx_bytes", Kind.SIGNED),
        Field(2, "txs", Kind.BYTES, repeated=True),
        Field(5, "height", Kind.SIGNED),
    )


@dataclass(frozen=True, slots=True)
class ProcessProposalRequest(Message):
    """Another node's proposal."""

    txs: tuple[bytes, ...] = ()
    hash: bytes = b""
    height: int = 0

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(1, "txs", Kind.BYTES, repeated=True),
        Field(4, "hash", Kind.BYTES),
        Field(5, "height", Kind.SIGNED),
    )


@dataclass(frozen=True, slots=True)
class ExtendVoteRequest(Message):
    """Asks for what to add to a vote."""

    hash: bytes = b""
    height: int = 0

    FIELDS: ClassVar[tuple[Field, ...]] = (Field(1, "hash", Kind.BYTES), Field(2, "height", Kind.SIGNED))


@dataclass(frozen=True, slots=True)
class VerifyVoteExtensionRequest(Message):
    """What another node added to its vote."""

    hash: bytes = b""
    validator_address: bytes = b""
    height: int = 0
    vote_extension: bytes = b""

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(1, "hash", Kind.BYTES),
        Field(2, "validator_address", Kind.BYTES),
        Field(3, "height", Kind.SIGNED),
        Field(4, "vote_extension", Kind.BYTES),
    )


@dataclass(frozen=True, slots=True)
class FinalizeBlockRequest(Message):
    """A decided block. `hash` names it; its time, votes and proposer are left out, since no rule may read them."""

    txs: tuple[bytes, ...] = ()
    hash: bytes = b""
    height: int = 0

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(1, "txs", Kind.BYTES, repeated=True),
        Field(4, "hash", Kind.BYTES),
        Field(5, "height", Kind.SIGNED),
    )


# --- responses


@dataclass(frozen=True, slots=True)
class ExceptionResponse(Message):
    """CometBFT stops when it gets this."""

    error: str = ""

    FIELDS: ClassVar[tuple[Field, ...]] = (Field(1, "error", Kind.TEXT),)


@dataclass(frozen=True, slots=True)
class EchoResponse(Message):
    """The same text."""

    message: str = ""

    FIELDS: ClassVar[tuple[Field, ...]] = (Field(1, "message", Kind.TEXT),)


@dataclass(frozen=True, slots=True)
class FlushResponse(Message):
    """Everything before it has been sent."""


@dataclass(frozen=True, slots=True)
class InfoResponse(Message):
    """Where the application stands; CometBFT replays what is missing."""

    data: str = ""
    version: str = ""
    app_version: int = 0
    last_block_height: int = 0
    last_block_app_hash: bytes = b""

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(1, "data", Kind.TEXT),
        Field(2, "version", Kind.TEXT),
        Field(3, "app_version", Kind.UNSIGNED),
        Field(4, "last_block_height", Kind.SIGNED),
        Field(5, "last_block_app_hash", Kind.BYTES),
    )


@dataclass(frozen=True, slots=True)
class InitChainResponse(Message):
    """What the application sets of the parameters, and the app hash before the first block."""

    consensus_params: ConsensusParams | None = None
    validators: tuple[ValidatorUpdate, ...] = ()
    app_hash: bytes = b""

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(1, "consensus_params", ConsensusParams),
        Field(2, "validators", ValidatorUpdate, repeated=True),
        Field(3, "app_hash", Kind.BYTES),
    )


@dataclass(frozen=True, slots=True)
class QueryResponse(Message):
    """`code` is 0 where there is an answer."""

    code: int = 0
    log: str = ""
    key: bytes = b""
    value: bytes = b""
    height: int = 0

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(1, "code", Kind.UNSIGNED),
        Field(3, "log", Kind.TEXT),
        Field(6, "key", Kind.BYTES),
        Field(7, "value", Kind.BYTES),
        Field(9, "height", Kind.SIGNED),
    )


@dataclass(frozen=True, slots=True)
class CheckTxResponse(Message):
    """`code` is 0 for a transaction that may wait."""

    code: int = 0
    data: bytes = b""
    log: str = ""

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(1, "code", Kind.UNSIGNED),
        Field(2, "data", Kind.BYTES),
        Field(3, "log", Kind.TEXT),
    )


@dataclass(frozen=True, slots=True)
class CommitResponse(Message):
    """CometBFT may drop its blocks below `retain_height`; 0 keeps all."""

    retain_height: int = 0

    FIELDS: ClassVar[tuple[Field, ...]] = (Field(3, "retain_height", Kind.SIGNED),)


@dataclass(frozen=True, slots=True)
class ListSnapshotsResponse(Message):
    """The snapshots that peers may fetch."""

    snapshots: tuple[Snapshot, ...] = ()

    FIELDS: ClassVar[tuple[Field, ...]] = (Field(1, "snapshots", Snapshot, repeated=True),)


@dataclass(frozen=True, slots=True)
class OfferSnapshotResponse(Message):
    """Whether to fetch it."""

    result: int = 0

    FIELDS: ClassVar[tuple[Field, ...]] = (Field(1, "result", Kind.UNSIGNED),)


@dataclass(frozen=True, slots=True)
class LoadSnapshotChunkResponse(Message):
    """The chunk; empty if it is not there."""

    chunk: bytes = b""

    FIELDS: ClassVar[tuple[Field, ...]] = (Field(1, "chunk", Kind.BYTES),)


@dataclass(frozen=True, slots=True)
class ApplySnapshotChunkResponse(Message):
    """What became of the chunk, and what to fetch again."""

    result: int = 0
    refetch_chunks: tuple[int, ...] = ()
    reject_senders: tuple[str, ...] = ()

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(1, "result", Kind.UNSIGNED),
        Field(2, "refetch_chunks", Kind.UNSIGNED, repeated=True),
        Field(3, "reject_senders", Kind.TEXT, repeated=True),
    )


@dataclass(frozen=True, slots=True)
class PrepareProposalResponse(Message):
    """The transactions of the block to propose."""

    txs: tuple[bytes, ...] = ()

    FIELDS: ClassVar[tuple[Field, ...]] = (Field(1, "txs", Kind.BYTES, repeated=True),)


@dataclass(frozen=True, slots=True)
class ProcessProposalResponse(Message):
    """Whether this node votes for it."""

    status: int = 0

    FIELDS: ClassVar[tuple[Field, ...]] = (Field(1, "status", Kind.UNSIGNED),)


@dataclass(frozen=True, slots=True)
class ExtendVoteResponse(Message):
    """What is added: nothing."""

    vote_extension: bytes = b""

    FIELDS: ClassVar[tuple[Field, ...]] = (Field(1, "vote_extension", Kind.BYTES),)


@dataclass(frozen=True, slots=True)
class VerifyVoteExtensionResponse(Message):
    """Whether that is sound."""

    status: int = 0

    FIELDS: ClassVar[tuple[Field, ...]] = (Field(1, "status", Kind.UNSIGNED),)


@dataclass(frozen=True, slots=True)
class FinalizeBlockResponse(Message):
    """What a block did: a result for each transaction in order, changed validators, and the app hash after it."""

    tx_results: tuple[TxResult, ...] = ()
    validator_updates: tuple[ValidatorUpdate, ...] = ()
    app_hash: bytes = b""

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(2, "tx_results", TxResult, repeated=True),
        Field(3, "validator_updates", ValidatorUpdate, repeated=True),
        Field(5, "app_hash", Kind.BYTES),
    )


# --- the two envelopes: a message with one field of many

_REQUESTS: Final[dict[int, type[Message]]] = {
    1: EchoRequest,
    2: FlushRequest,
    3: InfoRequest,
    5: InitChainRequest,
    6: QueryRequest,
    8: CheckTxRequest,
    11: CommitRequest,
    12: ListSnapshotsRequest,
    13: OfferSnapshotRequest,
    14: LoadSnapshotChunkRequest,
    15: ApplySnapshotChunkRequest,
    16: PrepareProposalRequest,
    17: ProcessProposalRequest,
    18: ExtendVoteRequest,
    19: VerifyVoteExtensionRequest,
    20: FinalizeBlockRequest,
}

_RESPONSES: Final[dict[int, type[Message]]] = {
    1: ExceptionResponse,
    2: EchoResponse,
    3: FlushResponse,
    4: InfoResponse,
    6: InitChainResponse,
    7: QueryResponse,
    9: CheckTxResponse,
    12: CommitResponse,
    13: ListSnapshotsResponse,
    14: OfferSnapshotResponse,
    15: LoadSnapshotChunkResponse,
    16: ApplySnapshotChunkResponse,
    17: PrepareProposalResponse,
    18: ProcessProposalResponse,
    19: ExtendVoteResponse,
    20: VerifyVoteExtensionResponse,
    21: FinalizeBlockResponse,
}

_REQUEST_NUMBERS: Final = {message_class: number for number, message_class in _REQUESTS.items()}
_RESPONSE_NUMBERS: Final = {message_class: number for number, message_class in _RESPONSES.items()}


def encode_request(message: Message) -> bytes:
    """A Request envelope around one of the request messages."""
    return wrapped(_REQUEST_NUMBERS[type(message)], encode(message))


def decode_request(raw: bytes) -> Message:
    """The message in a Request envelope. Raises MalformedProtobuf, also for one that this version does not have."""
    return _unwrapped(_REQUESTS, raw)


def encode_response(message: Message) -> bytes:
    """A Response envelope around one of the response messages."""
    return wrapped(_RESPONSE_NUMBERS[type(message)], encode(message))


def decode_response(raw: bytes) -> Message:
    """The message in a Response envelope. Raises MalformedProtobuf."""
    return _unwrapped(_RESPONSES, raw)


def _unwrapped(classes: dict[int, type[Message]], raw: bytes) -> Message:
    number, content = sole_field(raw)
    if number not in classes:
        raise MalformedProtobuf(f"a message of kind {number}, which CometBFT v0.38 does not have")
    return decode(classes[number], content)
