"""The embedded engine: one ledger in one directory, written by one process, with nothing to set up.

`submit` checks a batch's signature and queues it; `commit` applies everything queued in order, seals blocks, writes all
of it in one durable transaction and answers. The caller decides when to commit: after each message, or after as many
as have come in (group commit), since a commit costs one wait for the disk however much it carries.
"""

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from broker.ledger.admitted import admitted_of
from broker.ledger.chain import Head, Step, genesis_hash
from broker.ledger.directory import checked_head, locked, opened_store
from broker.ledger.engine import BUSY, ClientResult, Committed
from broker.ledger.faults import RuleViolation
from broker.ledger.holdings_view import HoldingsView
from broker.ledger.limits import (
    BATCH_HEAD_BYTES,
    BLOCK_HEAD_BYTES,
    MAX_BLOCK_BATCHES,
    MAX_QUEUED_BATCHES,
    MAX_QUEUED_BYTES,
)
from broker.ledger.made import made_of
from broker.ledger.opening import Charter, OpenedBatch, RefusedBatch, charter_of, open_batch, party_signer
from broker.ledger.proving import prove
from broker.ledger.receipts import SignedHead, sign_head
from broker.ledger.rules import keys_read, validators_now
from broker.ledger.state import State
from broker.ledger.store import FILE_NAME, SIGNED_HEAD, LedgerError
from broker.ledger.trust import issuer_of
from broker.protocol import envelope
from broker.protocol.envelope import Signer
from broker.protocol.keys import PrivateKey
from broker.protocol.limits import MAX_BLOCK_BYTES, MAX_REASON_CHARACTERS
from broker.protocol.messages import Block, Genesis, QueryKind, Result, ResultStatus


class EmbeddedLedger:
    """A ledger in the directory `path`, made there if it does not exist yet.

    `validator_name` and `validator_key` sign blocks and must be a validator's as of now. Raises LedgerError if the
    directory is in use, belongs to another genesis, or does not pass the start-up check.
    """

    def __init__(self, path: Path, genesis: Genesis, validator_name: str, validator_key: PrivateKey) -> None:
        self._path = path
        self._genesis = genesis
        self._charter: Charter = charter_of(genesis)
        self._validator_name = validator_name
        self._validator_key = validator_key
        self._queue: list[OpenedBatch] = []
        self._queued_bytes = 0
        path.mkdir(parents=True, exist_ok=True)
        self._lock = locked(path)
        try:
            self._store = opened_store(path, genesis)
            self._head = checked_head(path, self._store, self._genesis)
            if not self._seals(self._store):
                raise LedgerError(
                    path,
                    f"{validator_name} is no validator of ledger {genesis.ledger} with this key; check name and key",
                )
        except (sqlite3.Error, LedgerError) as error:
            os.close(self._lock)
            if isinstance(error, LedgerError):
                raise
            raise LedgerError(path, f"SQLite says {error}; restore the ledger from a copy") from error
        self._issuer = issuer_of(genesis.ledger, genesis_hash(genesis))
        self._signed = self._sign(self._head)

    @property
    def ledger(self) -> str:
        return self._charter.ledger

    @property
    def height(self) -> int:
        return self._head.height

    @property
    def head(self) -> Head:
        """The last committed block and state."""
        return self._head

    def close(self) -> None:
        """Close the file; what is queued and not committed is gone, and its clients send it again."""
        self._store.close()
        os.close(self._lock)

    def signer(self, key_id: bytes) -> Signer | None:
        """The registered party with that key, None if there is none."""
        return party_signer(self._store, key_id)

    def submit(self, raw_batch: bytes) -> ClientResult | None:
        """Check a batch and queue it for the next commit.

        Returns an answer only where there is one at once: a well-signed batch that is malformed, or a full queue.
        Raises ProtocolError while nobody is known to have signed it; that must not be answered.
        """
        try:
            batch = open_batch(raw_batch, self._store, self._charter)
        except RefusedBatch as refused:
            return ClientResult(refused.sender, _refusal(refused.batch_id, refused.violation))
        if len(self._queue) >= MAX_QUEUED_BATCHES or self._queued_bytes + len(raw_batch) > MAX_QUEUED_BYTES:
            reason = f"{BUSY}: the ledger's queue is full; send this batch again later"
            return ClientResult(batch.sender, Result(batch.batch_id, ResultStatus.REFUSED, reason=reason))
        self._queue.append(batch)
        self._queued_bytes += len(raw_batch)
        return None

    @property
    def queued(self) -> int:
        """Batches that wait for `commit`."""
        return len(self._queue)

    def commit(self) -> Committed:
        """Apply all queued batches in order and write them durably.

        Raises LedgerError if the disk refuses; then nothing is lost: the queue stays and `commit` can be tried again.
        """
        if not self._queue:
            return Committed((), ())
        step = Step(self._store, self._charter, self._head)
        blocks: list[tuple[int, bytes, bytes]] = []
        heights: dict[bytes, int] = {}
        results: list[ClientResult] = []
        waiting: list[bytes] = []
        waiting_bytes = BLOCK_HEAD_BYTES
        try:
            self._store.prefetch([key for batch in self._queue for key in keys_read(batch)])
            for batch in self._queue:
                height = heights.get(batch.batch_id) or self._store.height_of(batch.batch_id)
                if height is None:
                    if not waiting and not self._seals(step.state):
                        reason = f"{BUSY}: {self._validator_name} is no validator of the ledger any more"
                        results.append(
                            ClientResult(batch.sender, Result(batch.batch_id, ResultStatus.REFUSED, reason=reason))
                        )
                        continue
                    size = len(batch.raw) + BATCH_HEAD_BYTES
                    if waiting and (waiting_bytes + size > MAX_BLOCK_BYTES or len(waiting) >= MAX_BLOCK_BATCHES):
                        blocks.append(self._sealed(step, waiting))
                        waiting, waiting_bytes = [], BLOCK_HEAD_BYTES
                    try:
                        step.apply(batch)
                    except RuleViolation as violation:
                        results.append(ClientResult(batch.sender, _refusal(batch.batch_id, violation)))
                        continue
                    height = step.head.height + 1
                    heights[batch.batch_id] = height
                    waiting.append(batch.raw)
                    waiting_bytes += size
                results.append(
                    ClientResult(batch.sender, Result(batch.batch_id, ResultStatus.COMMITTED, height=height))
                )
            if waiting:
                blocks.append(self._sealed(step, waiting))
            signed = self._signed
            if blocks:
                signed = self._sign(step.head)
                self._store.write(
                    step.rows,
                    step.written(),
                    blocks,
                    list(heights.items()),
                    step.head,
                    step.nodes,
                    {SIGNED_HEAD: signed.to_bytes()},
                )
        except sqlite3.Error as error:
            raise LedgerError(self._path, f"SQLite says {error}; free disk space or replace the disk") from error
        self._head, self._signed = step.head, signed
        self._queue, self._queued_bytes = [], 0
        return Committed(tuple(raw for _, _, raw in blocks), tuple(results))

    def open_view(self, party: str | None = None) -> HoldingsView:
        """The holdings at the last committed block; close it when done."""
        return HoldingsView(self._path / FILE_NAME)

    def prove(self, kind: QueryKind, place: int) -> tuple[bytes, ...]:
        """The entries of a page that proves this. Raises ProofFailed where it cannot be."""
        return prove(self._store, self.ledger, kind, place)

    def made(self, device: str, start_s: int) -> tuple[bytes, ...]:
        """What became of one device's interval; nothing if there is no such device."""
        made = made_of(self._store, self.height, device, start_s)
        return () if made is None else (made.to_bytes(),)

    def device(self, device: str) -> tuple[bytes, ...]:
        """As what a device was admitted; nothing if there is no such device."""
        admitted = admitted_of(self._store, device)
        return () if admitted is None else (admitted.to_bytes(),)

    def blocks(self, from_height: int) -> Iterator[bytes]:
        """Sealed blocks from that height on, in order."""
        for _, _, raw in self._store.blocks(from_height):
            yield raw

    def checkpoint(self) -> bytes:
        """The sealed Checkpoint of the head."""
        return self._signed.checkpoint

    def _seals(self, state: State) -> bool:
        """True if this engine's key is a validator's in that state: then it may seal the block that follows."""
        own = self._validator_name, self._validator_key.public.cose_key
        return any(own == row[:2] for row in validators_now(state, self._charter).validators)

    def _sign(self, head: Head) -> SignedHead:
        return sign_head(head.checkpoint(), self._validator_key, self.ledger, self._validator_name, self._issuer)

    def _sealed(self, step: Step, batches: list[bytes]) -> tuple[int, bytes, bytes]:
        block: Block = step.block(tuple(batches))
        raw = envelope.seal(block, self._validator_key, self.ledger, self._validator_name)
        return block.height, step.finish_block(raw), raw


def _refusal(batch_id: bytes, violation: RuleViolation) -> Result:
    reason = f"{violation.code}: {violation.reason}"[:MAX_REASON_CHARACTERS]
    return Result(batch_id, ResultStatus.REFUSED, operation=violation.operation_index, reason=reason)
