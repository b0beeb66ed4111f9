"""The ledger as CometBFT's application: it answers each ABCI request from the rules and one ledger directory.

What is checked where:

- CheckTx: a batch that parses, whose signer is known and whose signature holds. Not the rules: batches that build on
  each other would be refused, and every node would pay for them twice.
- PrepareProposal and ProcessProposal: what is no batch, or does not fit into one ledger block, is left out and refused.
- FinalizeBlock: the rules. A batch that they refuse becomes a result with a code; all others make one ledger block.
- Commit: the only place that writes, in one transaction. So a process killed at any moment stands between two blocks,
  and CometBFT hands the rest in again.

The app hash is SHA-256(id of the last ledger block ‖ rows digest). It changes only where a batch was applied (or where
a snapshot height takes in what was), so a network without work stops making blocks. Nothing of a CometBFT block but the
order of its batches is read: no time, proposer, vote or evidence.
"""

import json
import os
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from broker.ledger.chain import Head, Step, genesis_hash
from broker.ledger.cometbft import abci
from broker.ledger.cometbft.buckets import Buckets
from broker.ledger.cometbft.protobuf import Message
from broker.ledger.cometbft.queries import QueryError, Refusal, Sources, answer_query
from broker.ledger.cometbft.snapshots import (
    LOG,
    SnapshotShelf,
    StateSync,
    remove_left_over,
    sealed_last_block,
)
from broker.ledger.cometbft.views import HoldingsViews
from broker.ledger.directory import checked_head, locked, opened_store, read_sealers
from broker.ledger.faults import RuleViolation
from broker.ledger.limits import BATCH_HEAD_BYTES, BLOCK_HEAD_BYTES, MAX_BLOCK_BATCHES
from broker.ledger.opening import OpenedBatch, RefusedBatch, charter_of, open_batch, party_signer
from broker.ledger.receipts import SignedHead, sign_head
from broker.ledger.rows_digest import NO_DIGEST, app_hash_of
from broker.ledger.rules import keys_read
from broker.ledger.rules.validators import signers_now, validators_now
from broker.ledger.snapshot import SnapshotFault
from broker.ledger.state import State, Validator
from broker.ledger.store import FILE_NAME, NETWORK, SEALERS, SIGNED_HEAD, LedgerError
from broker.ledger.trust import Trust, issuer_of
from broker.protocol import cbor, envelope
from broker.protocol.envelope import Signer
from broker.protocol.errors import ProtocolError
from broker.protocol.keys import Algorithm, PrivateKey, public_key_from_cose
from broker.protocol.limits import MAX_BLOCK_BYTES
from broker.protocol.messages import Block, Genesis, MessageType

APP_VERSION: Final = 1
"""Goes up when the rules change: all nodes of a network must run the same."""

SNAPSHOT_EVERY: Final = 1_000
"""Blocks of CometBFT from one snapshot height to the next; the app hash depends on it. 0 for none at all."""

VALIDATOR_POWER: Final = 1
"""What each validator of the genesis weighs."""

MAX_REMEMBERED_REFUSALS: Final = 4_096
"""Refusals that `/result` can still name. They are not part of the state; who asks later submits once more."""

MAX_CHECKED_BYTES: Final = 2 * MAX_BLOCK_BYTES
"""Opened batches that wait for their block; in memory they take about ten times as much."""

_PROTO_ITEM_BYTES: Final = 6
"""What CometBFT counts beside a transaction's bytes: a tag and a length of at most five bytes."""


class TxCode:
    """The `code` of a transaction's result."""

    APPLIED: Final = 0
    REFUSED: Final = 1
    """By the rules; `data` is the CBOR [index of the operation or null, fault]."""
    UNKNOWN_SENDER: Final = 2
    """Nobody registered is known to have signed it, or it is no batch at all."""
    BLOCK_FULL: Final = 3
    """It does not fit into one ledger block; ProcessProposal keeps such blocks from being made."""
    COMMITTED_BEFORE: Final = 4
    """Only of CheckTx: it stands in a block already."""


class ApplicationStopped(Exception):
    """CometBFT asks for what this ledger cannot answer; the node must stop. The text says what to do."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where the network stands: the height of CometBFT's last block here, and the rows digest of the last snapshot."""

    height: int = 0
    rows_digest: bytes = NO_DIGEST

    def to_bytes(self) -> bytes:
        return cbor.encode([self.height, self.rows_digest])

    @classmethod
    def from_bytes(cls, raw: bytes) -> "Progress":
        """Raises MalformedMessage or ValueError if these bytes are none."""
        items: Any = cbor.decode(raw, "network progress", 64)
        if type(items) is not list or [type(item) for item in items] != [int, bytes] or len(items[1]) != 32:
            raise ValueError("expected [height, rows digest]")
        return cls(*items)


@dataclass(frozen=True, slots=True)
class _Executed:
    """A block that FinalizeBlock has carried out and Commit has not written yet."""

    hash: bytes
    response: abci.FinalizeBlockResponse
    step: Step
    blocks: list[tuple[int, bytes, bytes]]
    heights: list[tuple[bytes, int]]
    refusals: dict[bytes, Refusal]
    progress: Progress
    buckets: dict[bytes, bytes | None]


def app_state_of(genesis: Genesis, snapshot_every: int = SNAPSHOT_EVERY) -> dict[str, str | int]:
    """The `app_state` of CometBFT's genesis.json. Every node compares it with its own genesis and settings."""
    return {"genesis": genesis.to_bytes().hex(), "snapshot_every": snapshot_every}


def consensus_key(cose_key: bytes) -> bytes:
    """The 32 bytes of a validator's Ed25519 key as CometBFT knows it. Raises ValueError for another kind of key."""
    key = public_key_from_cose(cose_key)
    if key.algorithm is not Algorithm.ED25519:
        raise ValueError("CometBFT's validators need Ed25519 keys")
    return key.ed25519_bytes()


class NodeApplication:
    """The application over the ledger in directory `path`, made there if it does not exist yet.

    `validator_name` and `validator_key` seal this node's copies of the blocks. Raises LedgerError if the directory is
    in use, belongs to another genesis or engine, or does not pass the start-up check.
    """

    def __init__(
        self,
        path: Path,
        genesis: Genesis,
        validator_name: str,
        validator_key: PrivateKey,
        snapshot_every: int = SNAPSHOT_EVERY,
    ) -> None:
        self._path = path
        self._snapshot_every = snapshot_every
        self._genesis = genesis
        self._charter = charter_of(genesis)
        self._name = validator_name
        self._key = validator_key
        self._executed: _Executed | None = None
        self._refusals: dict[bytes, Refusal] = {}
        self._views = HoldingsViews(path / FILE_NAME)
        self._checked = _CheckedBatches()
        path.mkdir(parents=True, exist_ok=True)
        self._lock = locked(path)
        self._issuer = issuer_of(genesis.ledger, genesis_hash(genesis))
        try:
            remove_left_over(path)
            self._open()
        except (sqlite3.Error, LedgerError) as error:
            os.close(self._lock)
            if isinstance(error, LedgerError):
                raise
            raise LedgerError(path, f"SQLite says {error}; restore the ledger from a copy") from error
        self._shelf = SnapshotShelf(path)
        self._sync: StateSync | None = None
        self._handlers: Mapping[type[Message], Callable[[Any], Message]] = {
            abci.EchoRequest: lambda request: abci.EchoResponse(request.message),
            abci.FlushRequest: lambda _: abci.FlushResponse(),
            abci.InfoRequest: lambda _: self._info(),
            abci.InitChainRequest: self._init_chain,
            abci.QueryRequest: self._query,
            abci.CheckTxRequest: self._check_tx,
            abci.PrepareProposalRequest: self._prepare_proposal,
            abci.ProcessProposalRequest: self._process_proposal,
            abci.FinalizeBlockRequest: self._finalize_block,
            abci.CommitRequest: lambda _: self._commit(),
            abci.ExtendVoteRequest: lambda _: abci.ExtendVoteResponse(),
            abci.VerifyVoteExtensionRequest: self._verify_vote_extension,
            abci.ListSnapshotsRequest: lambda _: abci.ListSnapshotsResponse(self._shelf.listed()),
            abci.OfferSnapshotRequest: self._offer_snapshot,
            abci.LoadSnapshotChunkRequest: lambda request: abci.LoadSnapshotChunkResponse(
                self._shelf.chunk(request.height, request.format, request.chunk)
            ),
            abci.ApplySnapshotChunkRequest: self._apply_snapshot_chunk,
        }

    @property
    def head(self) -> Head:
        """The last committed ledger block and state."""
        return self._head

    @property
    def network_height(self) -> int:
        """The height of CometBFT's last committed block."""
        return self._progress.height

    def close(self) -> None:
        self._views.close()
        self._shelf.close()
        if self._sync is not None:
            self._sync.abandon()
        self._store.close()
        os.close(self._lock)

    def handle(self, request: Message) -> Message:
        """The answer to one request.

        Raises ApplicationStopped if the two do not fit together, LedgerError if the disk refuses, and
        LedgerInvariantBroken: after any of them the node must stop, and a restart replays what was not committed.
        """
        try:
            return self._handlers[type(request)](request)
        except sqlite3.Error as error:
            raise LedgerError(self._path, f"SQLite says {error}; free disk space or replace the disk") from error

    # --- start

    def _open(self) -> None:
        self._store = opened_store(self._path, self._genesis)
        self._sealers = read_sealers(self._store)
        own = {**self._sealers, self._key.public.key_id: Signer(self._name, self._key.public)}
        self._head = checked_head(self._path, self._store, self._genesis, own)
        self._progress = self._read_progress()
        self._buckets = Buckets(self._store) if self._snapshot_every else None
        self._signed = self._sign(self._head)

    def _read_progress(self) -> Progress:
        raw = self._store.meta(NETWORK)
        if raw is None:
            if self._head.height:
                raise LedgerError(self._path, "written by the embedded engine; give a node a directory of its own")
            return Progress()
        try:
            return Progress.from_bytes(raw)
        except (ProtocolError, ValueError) as error:
            raise LedgerError(
                self._path, f"where the network stands is damaged ({error}); restore it from a copy"
            ) from error

    def _info(self) -> Message:
        return abci.InfoResponse(
            f"dengen ledger {self._charter.ledger}",
            app_version=APP_VERSION,
            last_block_height=self._progress.height,
            last_block_app_hash=self._app_hash() if self._progress.height else b"",
        )

    def _app_hash(self) -> bytes:
        return app_hash_of(self._head.block_id, self._progress.rows_digest)

    def _init_chain(self, request: abci.InitChainRequest) -> Message:
        """The network begins. Whoever set it up must have used our genesis, or its nodes would never agree."""
        if self._progress.height:
            raise ApplicationStopped(
                f"CometBFT begins at its genesis, but the ledger in {self._path} stands at height"
                f" {self._progress.height}; restore CometBFT's data directory, or empty both"
            )
        advice = "make genesis.json anew from the ledger's genesis"
        try:
            app_state = json.loads(request.app_state)
        except ValueError:
            app_state = None
        if app_state != app_state_of(self._genesis, self._snapshot_every):
            raise ApplicationStopped(
                f"app_state of genesis.json is not that of ledger {self._charter.ledger} with genesis"
                f" {genesis_hash(self._genesis).hex()}; {advice}"
            )
        named = {consensus_key(validator.key): VALIDATOR_POWER for validator in self._genesis.validators}
        given = {update.public_key.ed25519: update.power for update in request.validators}
        if given != named or len(request.validators) != len(named):
            raise ApplicationStopped(
                "the validators of genesis.json are not those of the ledger's genesis, with power"
                f" {VALIDATOR_POWER} each; {advice}"
            )
        if request.initial_height > 1:
            raise ApplicationStopped(f"initial_height of genesis.json is not 1; {advice}")
        # A block of CometBFT becomes one block of the ledger, so it must not be larger.
        params = abci.ConsensusParams(abci.BlockParams(MAX_BLOCK_BYTES, -1), abci.VersionParams(APP_VERSION))
        return abci.InitChainResponse(params, app_hash=self._app_hash())

    # --- before a block is decided

    def _check_tx(self, request: abci.CheckTxRequest) -> Message:
        try:
            if request.type == abci.CheckType.RECHECK:
                batch_id = self._id_of_known(request.tx)
            else:
                batch = open_batch(request.tx, self._store, self._charter)
                batch_id = batch.batch_id
                self._checked.keep(batch, self._store)
        except RefusedBatch as refused:
            return abci.CheckTxResponse(TxCode.REFUSED, _refusal_data(refused.violation), str(refused.violation))
        except ProtocolError as error:
            return abci.CheckTxResponse(TxCode.UNKNOWN_SENDER, log=str(error))
        height = None if batch_id is None else self._store.height_of(batch_id)
        if height is not None:
            return abci.CheckTxResponse(TxCode.COMMITTED_BEFORE, log=f"stands in block {height}")
        return abci.CheckTxResponse()

    def _id_of_known(self, raw: bytes) -> bytes | None:
        """The id of a batch that passed the check before, None while its sender is not registered yet."""
        parsed = envelope.parse(raw)
        signer = party_signer(self._store, parsed.key_id)
        return None if signer is None else envelope.message_id(parsed, self._charter.ledger, signer.name)

    def _prepare_proposal(self, request: abci.PrepareProposalRequest) -> Message:
        """The transactions in the order of the mempool, as far as they are batches and fit."""
        chosen: list[bytes] = []
        room = _BlockRoom()
        proto_bytes = 0
        for raw in request.txs:
            proto_bytes += len(raw) + _PROTO_ITEM_BYTES
            if proto_bytes > request.max_tx_bytes or not room.takes(raw):
                break
            if _is_batch(raw):
                chosen.append(raw)
        return abci.PrepareProposalResponse(tuple(chosen))

    def _process_proposal(self, request: abci.ProcessProposalRequest) -> Message:
        room = _BlockRoom()
        sound = all(room.takes(raw) and _is_batch(raw) for raw in request.txs)
        return abci.ProcessProposalResponse(abci.ProposalStatus.ACCEPT if sound else abci.ProposalStatus.REJECT)

    def _verify_vote_extension(self, request: abci.VerifyVoteExtensionRequest) -> Message:
        return abci.VerifyVoteExtensionResponse(
            abci.VoteStatus.REJECT if request.vote_extension else abci.VoteStatus.ACCEPT
        )

    # --- a decided block

    def _finalize_block(self, request: abci.FinalizeBlockRequest) -> Message:
        self._shelf.check()
        if request.height != self._progress.height + 1:
            raise ApplicationStopped(
                f"CometBFT hands in block {request.height}, but the ledger in {self._path} stands at"
                f" {self._progress.height}; restore both from copies of one moment"
            )
        if self._executed is None or self._executed.hash != request.hash:
            self._executed = self._execute(request)
        return self._executed.response

    def _execute(self, request: abci.FinalizeBlockRequest) -> _Executed:
        """Carry out a decided block on top of what is committed, without writing any of it."""
        step = Step(self._store, self._charter, self._head)
        height = self._head.height + 1
        room = _BlockRoom()
        applied: list[bytes] = []
        heights: list[tuple[bytes, int]] = []
        refusals: dict[bytes, Refusal] = {}
        results: list[abci.TxResult] = []
        for raw in request.txs:
            if not room.takes(raw):
                results.append(abci.TxResult(TxCode.BLOCK_FULL, log="the ledger block is full; submit it again"))
                continue
            batch_id = None
            try:
                batch = self._checked.take(raw, step.state) or open_batch(raw, step.state, self._charter)
                batch_id = batch.batch_id
                self._store.prefetch(keys_read(batch))
                step.apply(batch)
            except ProtocolError as error:
                results.append(abci.TxResult(TxCode.UNKNOWN_SENDER, log=str(error)))
                continue
            except (RefusedBatch, RuleViolation) as error:
                violation = error.violation if isinstance(error, RefusedBatch) else error
                refused_id = error.batch_id if isinstance(error, RefusedBatch) else batch_id
                assert refused_id is not None
                refusals[refused_id] = Refusal(
                    request.height, violation.operation_index, str(violation.code), violation.reason
                )
                results.append(abci.TxResult(TxCode.REFUSED, _refusal_data(violation), str(violation)))
                continue
            applied.append(raw)
            heights.append((batch_id, height))
            results.append(abci.TxResult(TxCode.APPLIED, cbor.encode(height)))
        blocks = []
        if applied:
            sealed = envelope.seal(step.block(tuple(applied)), self._key, self._charter.ledger, self._name)
            blocks.append((height, step.finish_block(sealed), sealed))
        digest = self._progress.rows_digest
        buckets: dict[bytes, bytes | None] = {}
        if self._buckets is not None:
            buckets = self._buckets.touched(step.written())
            if request.height % self._snapshot_every == 0:
                digest, digested = self._buckets.digested(step.rows, buckets)
                buckets |= digested
        progress = Progress(request.height, digest)
        now, then = (validators_now(state, self._charter).validators for state in (self._store, step.state))
        response = abci.FinalizeBlockResponse(
            tuple(results), _validator_updates(now, then), app_hash_of(step.head.block_id, digest)
        )
        return _Executed(request.hash, response, step, blocks, heights, refusals, progress, buckets)

    def _commit(self) -> Message:
        executed = self._executed
        if executed is None:
            raise ApplicationStopped("CometBFT commits a block that it has not handed in; restart the node")
        step = executed.step
        # Only what is committed gets this node's signature.
        signed = self._sign(step.head) if executed.blocks else self._signed
        notes = {NETWORK: executed.progress.to_bytes()}
        if executed.blocks:
            notes[SIGNED_HEAD] = signed.to_bytes()
            notes |= self._stated(step.state)
        self._store.write(
            step.rows, step.written(), executed.blocks, executed.heights, step.head, step.nodes, notes, executed.buckets
        )
        if self._buckets is not None:
            self._buckets.committed(executed.buckets)
        self._head, self._signed, self._progress, self._executed = step.head, signed, executed.progress, None
        # A ledger without a block has nothing that a new node could not make from the genesis.
        if self._snapshot_every and self._progress.height % self._snapshot_every == 0 and self._head.height:
            self._shelf.take(self._progress.height, self._progress.rows_digest)
        self._views.drop_old(self._head.height)
        for batch_id, refusal in executed.refusals.items():
            self._refusals.pop(batch_id, None)
            self._refusals[batch_id] = refusal
        while len(self._refusals) > MAX_REMEMBERED_REFUSALS:
            del self._refusals[next(iter(self._refusals))]
        return abci.CommitResponse()

    def _stated(self, state: State) -> dict[str, bytes]:
        """That this node's key has sealed blocks, where it is no validator's: else nobody could check these seals."""
        own = self._key.public
        stated = [(signer.name, signer.key.cose_key) for signer in self._sealers.values()]
        if own.key_id in self._sealers or own.key_id in signers_now(state, self._charter):
            return {}
        self._sealers[own.key_id] = Signer(self._name, own)
        return {SEALERS: cbor.encode([*stated, (self._name, own.cose_key)])}

    def _sign(self, head: Head) -> SignedHead:
        return sign_head(head.checkpoint(), self._key, self._charter.ledger, self._name, self._issuer)

    # --- snapshots

    def _offer_snapshot(self, request: abci.OfferSnapshotRequest) -> Message:
        if self._progress.height:
            return abci.OfferSnapshotResponse(abci.OfferResult.ABORT)
        if self._sync is not None:
            self._sync.abandon()
            self._sync = None
        try:
            self._sync = StateSync(self._path, self._genesis, request.snapshot, request.app_hash)
        except SnapshotFault as fault:
            LOG.warning("snapshot %d is refused: %s", request.snapshot.height, fault)
            return abci.OfferSnapshotResponse(abci.OfferResult.REJECT)
        return abci.OfferSnapshotResponse(abci.OfferResult.ACCEPT)

    def _apply_snapshot_chunk(self, request: abci.ApplySnapshotChunkRequest) -> Message:
        sync = self._sync
        if sync is None:
            return abci.ApplySnapshotChunkResponse(abci.ChunkResult.ABORT)
        try:
            answer = sync.add(request)
            if sync.complete:
                self._begin_from(sync)
                self._sync = None
        except SnapshotFault as fault:
            LOG.warning("snapshot %d is refused: %s", sync.network_height, fault)
            sync.abandon()
            self._sync = None
            return abci.ApplySnapshotChunkResponse(abci.ChunkResult.REJECT_SNAPSHOT)
        return answer

    def _begin_from(self, sync: StateSync) -> None:
        """Put a whole snapshot in the place of the empty ledger. Raises SnapshotFault; the empty ledger stays then."""
        head = sync.manifest.head

        def seal(payload: bytes, _: Trust) -> tuple[bytes, bytes]:
            sealed = envelope.seal(Block.from_payload(payload), self._key, self._charter.ledger, self._name)
            return sealed_last_block(payload, sealed), self._sign(head).to_bytes()

        progress = Progress(sync.network_height, sync.manifest.rows_digest)
        # By the genesis: a validator that was added since states its key without need, and nothing rests on it.
        notes = {NETWORK: progress.to_bytes(), **self._stated(self._store)}
        self._views.close()
        self._store.close()
        try:
            sync.finish(seal, notes)
        finally:
            self._open()

    # --- reading

    def _query(self, request: abci.QueryRequest) -> Message:
        height = self._progress.height
        try:
            value = answer_query(request.path, request.data, self._sources())
        except QueryError as error:
            return abci.QueryResponse(1, str(error), height=height)
        return abci.QueryResponse(key=request.data, value=value, height=height)

    def _sources(self) -> Sources:
        return Sources(
            self._store,
            self._genesis,
            self._head,
            self._progress.height,
            self._progress.rows_digest,
            self._refusals,
            self._signed.checkpoint,
            self._views,
        )


class _CheckedBatches:
    """Batches that passed CheckTx and wait for their block, so that most are opened once and not twice.

    What was checked then holds for as long as the same key stands for the same sender; that alone is looked up again.
    """

    __slots__ = ("_batches", "_bytes")

    def __init__(self) -> None:
        self._batches: dict[bytes, tuple[OpenedBatch, Signer]] = {}
        self._bytes = 0

    def keep(self, batch: OpenedBatch, state: State) -> None:
        signer = party_signer(state, batch.key_id)
        if signer is None or batch.raw in self._batches:
            return  # One that brings its sender's registration along is looked at as a whole again.
        self._batches[batch.raw] = (batch, signer)
        self._bytes += len(batch.raw)
        while self._bytes > MAX_CHECKED_BYTES:
            oldest = next(iter(self._batches))
            del self._batches[oldest]
            self._bytes -= len(oldest)

    def take(self, raw: bytes, state: State) -> OpenedBatch | None:
        """The batch in these bytes; None if it is not here, or must be opened again in this state."""
        batch, signer = self._batches.pop(raw, (None, None))
        if batch is None:
            return None
        self._bytes -= len(raw)
        return batch if party_signer(state, batch.key_id) == signer else None


class _BlockRoom:
    """How much of a ledger block is left."""

    __slots__ = ("_batches", "_bytes")

    def __init__(self) -> None:
        self._batches = MAX_BLOCK_BATCHES
        self._bytes = MAX_BLOCK_BYTES - BLOCK_HEAD_BYTES

    def takes(self, raw: bytes) -> bool:
        """True if this batch still fits; it has its place then."""
        size = len(raw) + BATCH_HEAD_BYTES
        if not self._batches or size > self._bytes:
            return False
        self._batches -= 1
        self._bytes -= size
        return True


def _validator_updates(now: Sequence[Validator], then: Sequence[Validator]) -> tuple[abci.ValidatorUpdate, ...]:
    """What changes from one set of validators to the next, by ascending key; a key that goes has power 0."""
    before = {consensus_key(validator.cose_key): validator.power for validator in now}
    after = {consensus_key(validator.cose_key): validator.power for validator in then}
    powers = {key: after.get(key, 0) for key in sorted(before.keys() | after.keys())}
    return tuple(
        abci.ValidatorUpdate(abci.PublicKey(key), power) for key, power in powers.items() if power != before.get(key)
    )


def _is_batch(raw: bytes) -> bool:
    try:
        return envelope.parse(raw).message_type is MessageType.BATCH
    except ProtocolError:
        return False


def _refusal_data(violation: RuleViolation) -> bytes:
    """What the validators agree on of a refusal. The sentence is not in it, since libraries word their errors anew."""
    return cbor.encode([violation.operation_index, str(violation.code)])
