"""A party's own copy of a ledger that somebody else hosts, brought up to date by the messages that any party may send.

First it asks who the validators are, then for a proof, which comes with the signed head of that moment, then for the
blocks up to there. Each block is taken in as `ledger verify` would: sealed by a validator, following on the one before,
its batches applied by the rules, with the tree and state hash that it names; and in the end the head must be the signed
one. So the copy is a whole ledger directory, which proves and audits like the host's, and which believes nobody. What
the party has followed of the ledger it is held against: nobody is shown one history and copies another.

Sans-IO but for its directory: the shell publishes what `tick` gives and hands over every payload of the party's result
topic, also those that answer somebody else's questions.
"""

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Final

from broker.ledger.chain import Step, block_id_of, genesis_hash
from broker.ledger.directory import checked_head, locked, opened_store
from broker.ledger.faults import LedgerInvariantBroken, RuleViolation
from broker.ledger.limits import RESEND_AFTER_S
from broker.ledger.opening import RefusedBatch, charter_of, open_batch
from broker.ledger.proofs import OperationsProof, read_proof
from broker.ledger.receipts import SignedHead
from broker.ledger.rules import keys_read, validators_now
from broker.ledger.rules.validators import signers_of
from broker.ledger.store import SIGNED_HEAD, LedgerError
from broker.ledger.trust import Trust
from broker.ledger.validator_set import sets_after, signers_ever
from broker.protocol import envelope
from broker.protocol.errors import MalformedMessage, ProtocolError
from broker.protocol.keys import PrivateKey
from broker.protocol.messages import REQUEST_ID_BYTES, Block, Checkpoint, Genesis, MessageType, Page, Query, QueryKind

_FIRST_OPERATION: Final = 0
"""Any operation's proof carries the signed head; there is always a first one, the registration of a broker."""


class OldAnswer(ProtocolError):
    """A true answer of a node that is behind: of a lower height than the ledger was seen at before."""


class LedgerCopy:
    """The copy in the directory `path`, made there if it does not exist yet; `party` signs its questions with `key`.

    `followed` is height and id of the last block that the party knows by itself, None if it follows nothing. The copy
    goes at least that far. Raises LedgerError if the directory is in use, belongs to another genesis, or is damaged.
    """

    def __init__(
        self,
        path: Path,
        genesis: Genesis,
        party: str,
        key: PrivateKey,
        random_bytes: Callable[[int], bytes],
        followed: tuple[int, bytes] | None = None,
    ) -> None:
        self._path = path
        self._genesis = genesis
        self._party = party
        self._key = key
        self._random_bytes = random_bytes
        self._followed = followed
        self._charter = charter_of(genesis)
        path.mkdir(parents=True, exist_ok=True)
        self._lock = locked(path)
        try:
            self._store = opened_store(path, genesis)
            self._head = checked_head(path, self._store, genesis)
            self._compare_followed()
        except (sqlite3.Error, LedgerError) as error:
            os.close(self._lock)
            if isinstance(error, LedgerError):
                raise
            raise LedgerError(path, f"SQLite says {error}; remove the directory, it is made anew") from error
        self._set = validators_now(self._store, self._charter)
        self._sealers = signers_ever(self._store, self._charter)
        self._target: tuple[Checkpoint, SignedHead] | None = None
        self._query = self._question(QueryKind.VALIDATORS, place=self._set.sequence)
        self._sent_s: float | None = None
        self.done = False

    @property
    def height(self) -> int:
        """The last block that is in the copy."""
        return self._head.height

    def close(self) -> None:
        self._store.close()
        os.close(self._lock)

    def reconnected(self) -> None:
        """The link is up, perhaps anew: what was asked is asked again."""
        self._sent_s = None

    def tick(self, now_s: float) -> list[bytes]:
        """What to publish on the `submit` topic now; `now_s` is any monotonic clock in seconds."""
        if self.done or (self._sent_s is not None and now_s - self._sent_s < RESEND_AFTER_S):
            return []
        self._sent_s = now_s
        return [envelope.seal(self._query, self._key, self._genesis.ledger, self._party)]

    def on_result(self, payload: bytes) -> None:
        """Take in a message of the party's result topic.

        Raises ProtocolError for an answer that does not hold or is old, which is asked for again; log it. Raises
        LedgerError where a validator signed blocks that are no sound ledger: then an operator must look.
        """
        parsed = envelope.parse(payload)
        if self.done or parsed.message_type is not MessageType.PAGE:
            return
        page = Page.from_payload(parsed.payload)
        if (page.request_id, page.kind) != (self._query.request_id, self._query.kind):
            return
        if page.kind is QueryKind.VALIDATORS:
            # Changes count for the registrars' signatures in them, whoever hands them over.
            self._take_validators(page)
        envelope.open_envelope(payload, self._genesis.ledger, self._sealers.get)
        if page.kind is QueryKind.OPERATION:
            self._take_target(page)
        elif page.kind is QueryKind.BLOCKS:
            self._take_blocks(page)
        self._ask_next(page)

    # --- inside

    def _question(self, kind: QueryKind, from_height: int | None = None, place: int | None = None) -> Query:
        return Query(self._random_bytes(REQUEST_ID_BYTES), kind, from_height=from_height, place=place)

    def _ask_next(self, page: Page) -> None:
        self._sent_s = None
        if self._target is None:
            if page.kind is QueryKind.VALIDATORS and page.entries:
                self._query = self._question(QueryKind.VALIDATORS, place=self._set.sequence)
            else:
                self._query = self._question(QueryKind.OPERATION, place=_FIRST_OPERATION)
        elif self._head.height < self._target[0].height:
            self._query = self._question(QueryKind.BLOCKS, from_height=self._head.height + 1)
        else:
            self.done = True

    def _take_validators(self, page: Page) -> None:
        for row in sets_after(self._set, page.entries, self._genesis.ledger, self._charter.registrars):
            self._set = row
            self._sealers |= signers_of(row)

    def _take_target(self, page: Page) -> None:
        """The head up to which the copy is made, as a validator signed it."""
        proof = read_proof(page.entries[0]) if page.entries else None
        if not isinstance(proof, OperationsProof):
            raise MalformedMessage("ledger result", "the proof of the ledger's first operation")
        trust = Trust.of(self._genesis.ledger, genesis_hash(self._genesis), self._set, dict(self._charter.registrars))
        checkpoint, _ = proof.check(trust)
        seen = max(self._head.height, 0 if self._followed is None else self._followed[0])
        if checkpoint.height < seen:
            if len(self._set.validators) > 1:
                raise OldAnswer(f"the node that answers is at height {checkpoint.height}, and {seen} was seen before")
            raise LedgerError(
                self._path,
                f"the ledger was at height {seen}, and its validator signed height {checkpoint.height} now: it has"
                " lost blocks",
            )
        self._target = checkpoint, SignedHead(proof.checkpoint, proof.root)
        if checkpoint.height == self._head.height:
            self._finish([], Step(self._store, self._charter, self._head), [])

    def _take_blocks(self, page: Page) -> None:
        """As many blocks as the page has, up to the target; written as one commit."""
        assert self._target is not None
        step = Step(self._store, self._charter, self._head)
        blocks: list[tuple[int, bytes, bytes]] = []
        batches: list[tuple[bytes, int]] = []
        for raw in page.entries:
            if step.head.height == self._target[0].height:
                break
            batches += self._apply(raw, step)
            blocks.append((step.head.height, step.head.block_id, raw))
        if not blocks:
            raise MalformedMessage("ledger result", f"blocks from height {self._head.height + 1} on")
        if step.head.height == self._target[0].height:
            self._finish(blocks, step, batches)
        else:
            self._write(blocks, step, batches, {})

    def _apply(self, raw: bytes, step: Step) -> list[tuple[bytes, int]]:
        """Take in the block that follows; returns its batches for the index."""
        opened = envelope.open_envelope(raw, self._genesis.ledger, self._sealers.get)
        block, height = opened.message, step.head.height + 1
        if not isinstance(block, Block) or block.height != height:
            raise MalformedMessage("ledger result", f"block {height}")
        if block.previous != step.head.block_id:
            raise LedgerError(self._path, f"block {height} does not follow on the copy's; there are two histories")
        batches = []
        try:
            for raw_batch in block.batches:
                batch = open_batch(raw_batch, step.state, self._charter)
                self._store.prefetch(keys_read(batch))
                step.apply(batch)
                batches.append((batch.batch_id, height))
        except (RuleViolation, RefusedBatch, LedgerInvariantBroken, ProtocolError) as error:
            raise LedgerError(self._path, f"block {height} does not keep the ledger's rules: {error}") from error
        expected = step.block(block.batches)
        if (block.tree_size, block.root, block.state_hash) != (expected.tree_size, expected.root, expected.state_hash):
            raise LedgerError(self._path, f"block {height} names another state than its operations make")
        step.finish_block(raw)
        self._compare(height, step.head.block_id)
        return batches

    def _compare_followed(self) -> None:
        """Hold what is in the copy already against what the party has followed."""
        if self._followed is not None and 0 < self._followed[0] <= self._head.height:
            raw = self._store.block(self._followed[0])
            assert raw is not None  # A copy begins with the first block.
            self._compare(self._followed[0], block_id_of(raw))

    def _compare(self, height: int, block_id: bytes) -> None:
        if self._followed is not None and height == self._followed[0] and block_id != self._followed[1]:
            raise LedgerError(
                self._path,
                f"block {height} is another one than this broker has followed; there are two histories: compare this"
                " directory with the others' before it is removed",
            )

    def _finish(self, blocks: list[tuple[int, bytes, bytes]], step: Step, batches: list[tuple[bytes, int]]) -> None:
        """The last blocks, with the signature of the head that they lead to."""
        assert self._target is not None
        checkpoint, signed = self._target
        if step.head.checkpoint() != checkpoint:
            raise LedgerError(
                self._path, f"the signed head of height {checkpoint.height} is another than its blocks lead to"
            )
        self._write(blocks, step, batches, {SIGNED_HEAD: signed.to_bytes()})

    def _write(
        self,
        blocks: list[tuple[int, bytes, bytes]],
        step: Step,
        batches: list[tuple[bytes, int]],
        notes: dict[str, bytes],
    ) -> None:
        try:
            self._store.write(step.rows, step.written(), blocks, batches, step.head, step.nodes, notes)
        except sqlite3.Error as error:
            raise LedgerError(self._path, f"SQLite says {error}; is there room on the disk?") from error
        self._head = step.head
