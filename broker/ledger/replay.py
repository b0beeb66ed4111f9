"""Derives a stored ledger a second time: its blocks, in order, through the same rules, into a file of its own.

Nothing that the engine stored beside its blocks is used: every signature is checked, every rule applied, and after each
block the state hash, tree and chain must be what it says. Memory stays bounded, however long the history is.

The file can outlive the process. Then each write is a mark to go on from, and `Replay.resumed` holds against it what it
rests on: the stored blocks up to there must still be, byte for byte, the ones that were checked, and the derived rows
the ones that were written. That finds damage and mix-ups; whoever may write that file could also forge its digests, so
it belongs where only the person who verifies can write.
"""

import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from broker.ledger.certificate import Certificate, Proven
from broker.ledger.chain import Head, Step, block_id_of, first_head, genesis_hash
from broker.ledger.faults import LedgerInvariantBroken, RuleViolation
from broker.ledger.merkle import nodes_in
from broker.ledger.opening import Charter, RefusedBatch, charter_of, open_batch
from broker.ledger.receipts import ProofFailed
from broker.ledger.rules import keys_read
from broker.ledger.rules.validators import signers_now, validators_now
from broker.ledger.signatures import Helpers
from broker.ledger.state import ABSENT, State, ValidatorsRow
from broker.ledger.store import Store
from broker.ledger.trust import Trust
from broker.protocol import cbor, envelope
from broker.protocol.envelope import Signer
from broker.protocol.errors import ProtocolError
from broker.protocol.messages import Block, Genesis

_ROWS_PER_WRITE: Final = 8_192
"""Changed rows in memory until they are written; more would save little, since one write costs no wait for the disk."""

_MARK: Final = "verified"
_SUM_BYTES: Final = 32
_MAX_MARK_BYTES: Final = 8_192


class HistoryFault(Exception):
    """The history cannot be replayed further; what follows would only be wrong because of this."""


class CannotResume(Exception):
    """What an earlier run left cannot be gone on from; the text says why."""


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a replay has come, and what that rests on.

    `history` is the SHA-256 chained over all blocks and Merkle nodes as they should stand in the file. `rows_sum` is
    the sum of the SHA-256 of every derived row, modulo 2^256: the same whatever the order in which rows came and went.
    """

    head: Head
    batches: int
    operations: int
    history: bytes
    rows_sum: int

    def to_bytes(self, genesis: bytes) -> bytes:
        """These bytes name the ledger and the program as well, and end with their own hash."""
        fields = [genesis, version("dengen"), self.head.to_bytes(), self.batches, self.operations, self.history]
        body = cbor.encode([*fields, self.rows_sum.to_bytes(_SUM_BYTES, "big")])
        return body + sha256(body).digest()

    @classmethod
    def from_bytes(cls, raw: bytes, genesis: bytes) -> "Mark":
        """Raises CannotResume."""
        body, digest = raw[:-32], raw[-32:]
        if sha256(body).digest() != digest:
            raise CannotResume("its last mark is damaged")
        fields: Any = cbor.decode(body, "mark", _MAX_MARK_BYTES)
        if fields[0] != genesis:
            raise CannotResume("it belongs to another ledger")
        if fields[1] != version("dengen"):
            raise CannotResume(f"it was made by version {fields[1]} of this program")
        return cls(Head.from_bytes(fields[2]), fields[3], fields[4], fields[5], int.from_bytes(fields[6], "big"))


def first_mark(genesis: Genesis) -> Mark:
    """Where every replay begins."""
    return Mark(first_head(genesis), 0, 0, genesis_hash(genesis), 0)


class Replay:
    """The second derivation, in `rows`; `mark` says how far it has come."""

    proven: Proven | None = None
    """What a network's certificate stands for; it is checked where the replay comes to its block."""

    def __init__(self, genesis: Genesis, rows: Store, mark: Mark, marked: bool, helpers: Helpers) -> None:
        self._genesis = genesis
        self._charter = replace(charter_of(genesis), verifies=helpers.verifies)
        self._signers: dict[bytes, Signer] = {}
        self._signers_of: ValidatorsRow | None = None
        self._signers_at_end: dict[bytes, Signer] = {}
        self._helpers = helpers
        self._marked = marked
        self.mark = mark
        self.rows = rows

    @classmethod
    def begun(cls, genesis: Genesis, file: Path, marked: bool, helpers: Helpers) -> "Replay":
        """A replay from the genesis into a new file; `marked` if a later run shall be able to go on.

        Raises sqlite3.Error.
        """
        rows = Store.create(file, genesis.to_bytes(), first_head(genesis), durable=False)
        replay = cls(genesis, rows, first_mark(genesis), marked, helpers)
        replay._write(Step(rows, replay._charter, replay.mark.head), [])
        return replay

    @classmethod
    def begun_at(cls, genesis: Genesis, rows: Store, head: Head, helpers: Helpers) -> "Replay":
        """A replay from the height of a snapshot, which `rows` has been filled from. No later run goes on from it."""
        return cls(genesis, rows, replace(first_mark(genesis), head=head), False, helpers)

    @classmethod
    def resumed(cls, genesis: Genesis, file: Path, stored: Store, helpers: Helpers) -> "Replay":
        """Go on with the file of an earlier run, once what it rests on is checked. Raises CannotResume."""
        try:
            rows = Store.open(file, durable=False)
            try:
                return cls(genesis, rows, _sound_mark(genesis, rows, stored), True, helpers)
            except BaseException:
                rows.close()
                raise
        except (sqlite3.Error, ProtocolError, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise CannotResume(f"it cannot be read: {error}") from error

    def run(self, stored: Store, report: Callable[[Mark], None], complain: Callable[[str], None]) -> None:
        """Replay the blocks that are stored from here on; `report` hears after each how far it has come.

        `complain` hears of stored Merkle nodes that are others than the blocks make. Raises HistoryFault at the first
        block that does not hold. What was written before it stays.
        """
        self._signers_at_end = _signers_at_end(stored, self._charter)
        step = Step(self.rows, self._charter, self.mark.head)
        heights: list[tuple[bytes, int]] = []
        for row in stored.blocks(self.mark.head.height + 1):
            heights += self._block(row, step)
            if self.proven is not None and step.head.height == self.proven.height:
                self._check_certificate(self.proven.certificate, step.state)
            nodes, step.nodes = step.nodes, []
            before, end = self.mark, nodes_in(step.head.tree_size)
            found = list(stored.node_rows(nodes_in(before.head.tree_size), end))
            if found != nodes:
                _compare_nodes(dict(found), dict(nodes), complain)
            self.mark = replace(before, head=step.head, history=_history_after(before.history, row, nodes))
            report(self.mark)
            if len(step.rows) >= _ROWS_PER_WRITE:
                self._write(step, heights)
                step, heights = Step(self.rows, self._charter, self.mark.head), []
        self._write(step, heights)
        for first in stored.node_rows_outside(nodes_in(self.mark.head.tree_size)):
            complain(f"Merkle nodes from {first}: stored, but no operation made them")

    def _check_certificate(self, certificate: Certificate, state: State) -> None:
        """The validators before or after its block must have made it. Raises HistoryFault."""
        after = validators_now(state, self._charter)
        assert self._signers_of is not None
        trust = Trust.of(self._charter.ledger, genesis_hash(self._genesis), after, {})
        try:
            if not (certificate.is_of(self._signers_of) or certificate.is_of(after)):
                raise ProofFailed("it is of other validators than those of its height")
            certificate.check_votes(trust)
        except ProtocolError as error:
            raise HistoryFault(f"the network's certificate does not hold: {error}") from error

    def _signer(self, state: State, height: int) -> envelope.KeyLookup:
        """Who may have sealed the next block: the validators of that time.

        And those at the end: a node that joins a network later seals what it replays with its own key. And the node
        itself, where a certificate of the validators proves the block: its seal says no more than who keeps this copy.
        """
        now = validators_now(state, self._charter)
        if now != self._signers_of:
            self._signers_of, self._signers = now, signers_now(state, self._charter)
        sealers = {} if self.proven is None else self.proven.sealers_of(height)
        return lambda key_id: self._signers.get(key_id) or self._signers_at_end.get(key_id) or sealers.get(key_id)

    def _write(self, step: Step, heights: list[tuple[bytes, int]]) -> None:
        notes = {_MARK: self.mark.to_bytes(genesis_hash(self._genesis))} if self._marked else {}
        self.rows.write(step.rows, step.written(), [], heights, self.mark.head, [], notes)

    def _block(self, row: tuple[int, bytes, bytes], step: Step) -> list[tuple[bytes, int]]:
        """Check and apply one block; returns its batches for the index."""
        height, block_id, raw = row
        where = f"height {height}"
        if height != step.head.height + 1:
            raise HistoryFault(f"{where}: block {step.head.height + 1} is missing")
        self._helpers.look_ahead(height)
        try:
            lookup = self._signer(step.state, height)
            opened = envelope.open_envelope(raw, self._genesis.ledger, lookup, self._helpers.verifies)
        except (ProtocolError, TypeError) as error:
            raise HistoryFault(f"{where}: {error}") from error
        block = opened.message
        if not isinstance(block, Block) or block_id_of(raw) != block_id or block.height != height:
            raise HistoryFault(f"{where}: the stored block is another one than its row says")
        if block.previous != step.head.block_id:
            raise HistoryFault(f"{where}: does not follow on the block before it")
        found = []
        operations, rows_sum = 0, self.mark.rows_sum
        for number, raw_batch in enumerate(block.batches):
            try:
                batch = open_batch(raw_batch, step.state, self._charter)
                self.rows.prefetch(keys_read(batch))
                changes = step.apply(batch)
            except (ProtocolError, RuleViolation, RefusedBatch, LedgerInvariantBroken) as error:
                raise HistoryFault(f"{where}, batch {number}: {error}") from error
            found.append((batch.batch_id, height))
            operations += len(batch.operations)
            if self._marked:
                rows_sum += _sum_of_changes(changes) + _row_hash(batch.batch_id, cbor.encode(height))
        expected = step.block(block.batches)
        for name in ("tree_size", "root", "state_hash"):
            if getattr(block, name) != getattr(expected, name):
                raise HistoryFault(f"{where}: {name} is not what the operations up to here make")
        step.finish_block(raw)
        self.mark = replace(
            self.mark,
            batches=self.mark.batches + len(found),
            operations=self.mark.operations + operations,
            rows_sum=rows_sum % (1 << 8 * _SUM_BYTES),
        )
        return found


def _signers_at_end(stored: Store, charter: Charter) -> dict[bytes, Signer]:
    """The validators that the stored state ends with; none if that row is damaged, which the comparison finds."""
    try:
        return signers_now(stored, charter)
    except (ProtocolError, ValueError, TypeError):
        return {}


def _sound_mark(genesis: Genesis, rows: Store, stored: Store) -> Mark:
    """The last mark, if everything that it rests on is still there. Raises CannotResume, sqlite3.Error, ValueError."""
    mark = Mark.from_bytes(rows.meta(_MARK) or b"", genesis_hash(genesis))
    faults = rows.integrity_faults()
    if faults:
        raise CannotResume(f"SQLite says {faults[0]}")
    derived = sum(_row_hash(key, value) for key, value in rows.state_rows())
    derived += sum(_row_hash(batch_id, cbor.encode(height)) for batch_id, height in rows.batch_rows())
    if derived % (1 << 8 * _SUM_BYTES) != mark.rows_sum:
        raise CannotResume("its rows are not the ones that were derived")
    history = genesis_hash(genesis)
    tree_size = 0
    for row in stored.blocks(upto=mark.head.height):
        before, tree_size = tree_size, Block.from_payload(envelope.parse(row[2]).payload).tree_size
        history = _history_after(history, row, stored.node_rows(nodes_in(before), nodes_in(tree_size)))
    if history != mark.history:
        raise CannotResume(f"the blocks up to height {mark.head.height} are not the ones that were checked")
    return mark


def _compare_nodes(found: dict[int, bytes], made: dict[int, bytes], complain: Callable[[str], None]) -> None:
    for first in sorted(found.keys() | made.keys()):
        if first not in made:
            complain(f"Merkle nodes from {first}: stored, but no operation made them")
        elif first not in found:
            complain(f"Merkle nodes from {first}: missing")
        elif found[first] != made[first]:
            complain(f"Merkle nodes from {first}: stored with another value")


def _history_after(history: bytes, row: tuple[int, bytes, bytes], nodes: Iterable[tuple[int, bytes]]) -> bytes:
    height, block_id, raw = row
    digest = sha256(history + height.to_bytes(8, "big") + block_id + raw)
    for first, hashes in nodes:
        digest.update(first.to_bytes(8, "big") + hashes)
    return digest.digest()


def _sum_of_changes(changes: Iterable[tuple[bytes, bytes, bytes]]) -> int:
    total = 0
    for key, old, new in changes:
        if new != ABSENT:
            total += _row_hash(key, new)
        if old != ABSENT:
            total -= _row_hash(key, old)
    return total


def _row_hash(key: bytes, value: bytes) -> int:
    # A key is one CBOR item or an id of 32 bytes, so key and value cannot be cut in two ways.
    return int.from_bytes(sha256(key + value).digest(), "big")
