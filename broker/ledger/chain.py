"""The chain of blocks as pure steps: batches go in, rows to write and the next block come out.

Engines and the verifier drive the same `Step`, so what an engine writes and what a verifier expects cannot drift apart.
"""

from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

from broker.ledger.merkle import Frontier, nodes_in
from broker.ledger.opening import Charter, OpenedBatch
from broker.ledger.rules import apply_batch
from broker.ledger.state import ABSENT, Key, Overlay, Row, State, changes_of, state_hash_after
from broker.protocol import cbor, envelope
from broker.protocol.envelope import Signer
from broker.protocol.keys import public_key_from_cose
from broker.protocol.messages import Block, Checkpoint, Genesis


@dataclass(frozen=True, slots=True)
class Head:
    """Where a ledger stands. `block_id` is `block_id_of` the last block, or the hash of the genesis before any."""

    height: int
    block_id: bytes
    state_hash: bytes
    tree_size: int
    peaks: tuple[bytes, ...]

    def to_bytes(self) -> bytes:
        return cbor.encode([self.height, self.block_id, self.state_hash, self.tree_size, self.peaks])

    @classmethod
    def from_bytes(cls, raw: bytes) -> "Head":
        """Raises MalformedMessage or ValueError if these bytes are no head."""
        items: Any = cbor.decode(raw, "ledger head", 4_096)
        if type(items) is not list or len(items) != 5 or type(items[4]) is not list:
            raise ValueError("expected [height, block id, state hash, tree size, peaks]")
        return cls(items[0], items[1], items[2], items[3], tuple(items[4]))

    def checkpoint(self) -> Checkpoint:
        root = Frontier(self.tree_size, self.peaks).root()
        return Checkpoint(self.height, self.block_id, self.tree_size, root, self.state_hash)


def genesis_hash(genesis: Genesis) -> bytes:
    """What identifies a ledger: everyone who follows it compares this."""
    return sha256(genesis.to_bytes()).digest()


def first_head(genesis: Genesis) -> Head:
    """The head of a ledger without blocks."""
    digest = genesis_hash(genesis)
    return Head(0, digest, digest, 0, ())


def validators_of(genesis: Genesis) -> dict[bytes, Signer]:
    """Who signs blocks and checkpoints, by key id. Raises MalformedMessage for a key that is none."""
    signers = [Signer(validator.name, public_key_from_cose(validator.key)) for validator in genesis.validators]
    return {signer.key.key_id: signer for signer in signers}


def block_id_of(raw: bytes) -> bytes:
    """The id of a sealed block: SHA-256 of its payload. Raises MalformedMessage.

    Not of the envelope: every node of a network seals the same payload with its own key, and all copies have one id.
    """
    return sha256(envelope.parse(raw).payload).digest()


NODES_PER_ROW: Final = 120
"""Merkle nodes that are stored as one row: as many as fit a page of SQLite, so that reading one costs one page."""


class Step:
    """The batches applied on top of a committed state, until a commit takes them over.

    `rows` holds what to write: key bytes to row bytes, None to delete. `state` includes every batch so far. `nodes`
    holds the Merkle nodes of the finished blocks: position of the first one, and up to NODES_PER_ROW hashes in a row.
    """

    __slots__ = ("_charter", "_frontier", "head", "nodes", "rows", "state", "state_hash")

    def __init__(self, committed: State, charter: Charter, head: Head) -> None:
        self._charter = charter
        self._frontier = Frontier(head.tree_size, head.peaks)
        self.state = Overlay(committed)
        self.state_hash = head.state_hash
        self.rows: dict[bytes, bytes | None] = {}
        self.nodes: list[tuple[int, bytes]] = []
        self.head = head
        """The last finished block; `finish_block` moves it."""

    def apply(self, batch: OpenedBatch) -> list[tuple[bytes, bytes, bytes]]:
        """Apply one batch whole and return what it changed, as `changes_of` does.

        Raises RuleViolation, and then nothing has changed.
        """
        overlay = Overlay(self.state)
        apply_batch(overlay, self._charter, batch)
        changes = changes_of(overlay, self.state)
        self.state_hash = state_hash_after(self.state_hash, batch.batch_id, changes)
        for key, _, new in changes:
            self.rows[key] = None if new == ABSENT else new
        self.state.written.update(overlay.written)
        for leaf in batch.leaves:
            self._frontier.append(leaf)
        return changes

    def block(self, batches: tuple[bytes, ...]) -> Block:
        """The block that carries these batches, all of them applied since the last one."""
        head = self.head
        return Block(
            head.height + 1, head.block_id, batches, self._frontier.size, self._frontier.root(), self.state_hash
        )

    def finish_block(self, raw: bytes) -> bytes:
        """The block is sealed in these bytes; the next one builds on it. Returns its id."""
        block_id = block_id_of(raw)
        frontier = self._frontier
        made, frontier.made = frontier.made, []
        first = nodes_in(self.head.tree_size)
        for start in range(0, len(made), NODES_PER_ROW):
            self.nodes.append((first + start, b"".join(made[start : start + NODES_PER_ROW])))
        self.head = Head(self.head.height + 1, block_id, self.state_hash, frontier.size, tuple(frontier.peaks))
        return block_id

    def written(self) -> dict[Key, Row | None]:
        """All rows that the batches wrote, for a cache."""
        return self.state.written
