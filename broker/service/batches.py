"""The broker's way to the ledger: makes signed batches, keeps their bytes until their result is known.

A batch is stored in the same commit as the decision that it carries and submitted after it, so a crash at any moment
leaves either nothing or a batch that is submitted again; the ledger applies each batch once.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, TypeVar

from broker.protocol.envelope import sealed_id
from broker.protocol.limits import MAX_BATCH_BYTES
from broker.protocol.messages import Batch
from broker.service.outputs import Identity, Outputs
from broker.service.store import BatchKind, BatchRow, BrokerStore, WorkState

T = TypeVar("T")

FULL_BATCH_BYTES: Final = MAX_BATCH_BYTES - 65_536
"""A batch is closed below the limit of the wire, so that its own envelope always fits."""

FULL_BATCH_OPERATIONS: Final = 512
"""Enough that signature, block and commit cost next to nothing for each; what more of them need no longer fits into a
processor's cache. A refused batch holds up no more than these.
"""


class BatchDesk:
    """Open batches by id. Results are reported to `finish`."""

    def __init__(self, identity: Identity, store: BrokerStore, outputs: Outputs) -> None:
        self._identity = identity
        self._store = store
        self._outputs = outputs
        self._next_number = store.next_batch_number()
        self._waiting = {row.batch_id: row for row in store.waiting_batches()}

    @property
    def waiting(self) -> tuple[BatchRow, ...]:
        """Batches without a result, oldest first."""
        return tuple(self._waiting.values())

    def waits_for(self, kind: BatchKind, start_s: int | None = None) -> bool:
        """True if a batch of that kind (and interval) has no result yet."""
        return any(row.kind is kind and start_s in (None, row.start_s) for row in self._waiting.values())

    def waits_before(self, start_s: int) -> bool:
        """True if a batch of an interval before that one has no result yet."""
        return any(row.start_s < start_s and row.kind is not BatchKind.STATEMENTS for row in self._waiting.values())

    def submit(self, kind: BatchKind, start_s: int, not_after_s: int, operations: Sequence[bytes]) -> BatchRow:
        """Sign, store and hand over one batch of encoded operations."""
        raw = self._identity.seal(Batch(not_after_s, tuple(operations)))
        batch_id = sealed_id(raw, self._identity.ledger, self._identity.name)
        row = BatchRow(self._next_number, batch_id, kind, start_s, raw, WorkState.WAITING)
        known = self._waiting.get(batch_id)
        if known is not None:
            return known
        self._next_number += 1
        self._store.add_batch(row)
        self._waiting[batch_id] = row
        self.hand_over([row])
        return row

    def take_back(self, batch_id: bytes, kind: BatchKind, start_s: int, height: int) -> BatchRow:
        """Note a batch of ours that the store has forgotten and the ledger has."""
        row = BatchRow(self._next_number, batch_id, kind, start_s, b"", WorkState.COMMITTED, height)
        self._next_number += 1
        self._store.add_batch(row)
        self._store.set_batch(batch_id, WorkState.COMMITTED, height, None)
        return row

    def hand_over(self, rows: Iterable[BatchRow]) -> None:
        """Submit these batches, or leave them until all statements are on the ledger.

        What rests on a mandate must not arrive before it: it would be refused for good.
        """
        held_back = self.waits_for(BatchKind.STATEMENTS)
        for row in rows:
            if row.kind is BatchKind.STATEMENTS or not held_back:
                self._outputs.submit(row.raw)

    def finish(self, batch_id: bytes, state: WorkState, height: int | None, reason: str | None) -> BatchRow | None:
        """Note a result. Returns the batch, or None if it has one already or is not ours."""
        row = self._waiting.pop(batch_id, None)
        if row is not None:
            self._store.set_batch(batch_id, state, height, reason)
            if row.kind is BatchKind.STATEMENTS:
                self.hand_over(self.waiting)
        return row


def in_batches(items: Iterable[T], sizes: Iterable[int]) -> Iterator[list[T]]:
    """Split items, each of that many bytes, into runs that fit into one batch."""
    run: list[T] = []
    run_bytes = 0
    for item, size in zip(items, sizes, strict=True):
        if run and (len(run) >= FULL_BATCH_OPERATIONS or run_bytes + size > FULL_BATCH_BYTES):
            yield run
            run, run_bytes = [], 0
        run.append(item)
        run_bytes += size
    if run:
        yield run
