"""Compares two copies of one ledger and finds where they first differ. Read-only, also while engines run on them.

A block's id is the hash of its payload, and each block names the one before. So where two sound copies have the same
block at a height, they have the same history up to there, and the first difference is found by halving. A copy need not
be sound, so then every block below is compared as well, and the derived rows where both stand at the same height. The
signature around a block is not compared: every node of a network seals the same block with its own key.

This says where copies differ, not which one is right: that is for `verify.verify_ledger`.
"""

import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from itertools import zip_longest
from pathlib import Path
from typing import Any

from broker.ledger.chain import block_id_of, genesis_hash
from broker.ledger.inspect import opened
from broker.ledger.operations import decode_operation
from broker.ledger.state import decode_key
from broker.ledger.store import LedgerError, Store
from broker.protocol import envelope
from broker.protocol.errors import ProtocolError
from broker.protocol.messages import Batch, Block, Genesis


class Verdict(StrEnum):
    """How two copies relate."""

    SAME = "same"
    PREFIX = "prefix"
    """One ends earlier; up to there they are the same."""
    FORK = "fork"
    """Both have a block at one height, and it is another one."""
    DAMAGED = "damaged"
    """Both have the same blocks, but what is stored beside them differs: at least one copy is damaged."""
    OTHER_LEDGER = "other ledger"


class Difference(StrEnum):
    """What differs first."""

    GENESIS = "genesis"
    BATCH = "batch"
    """The blocks carry other batches."""
    ORDER = "order"
    """The blocks carry the same batches in another order."""
    BLOCK = "block"
    """A block is missing or cannot be read, or its batches are the same and what it says of itself is not."""
    STATE = "state"
    """The same batches led to another state."""


@dataclass(frozen=True, slots=True)
class CopyHead:
    """Where one copy stands."""

    path: Path
    height: int
    block_id: bytes


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came out. `common_height` is the last height up to which both are the same, 0 where only the genesis is.

    `difference` and `detail` say what differs first at the height after; None if nothing does.
    """

    first: CopyHead
    second: CopyHead
    verdict: Verdict
    common_height: int
    difference: Difference | None
    detail: str | None


class _Differs(Exception):
    """The first difference has been found."""

    def __init__(self, verdict: Verdict, common_height: int, difference: Difference, detail: str) -> None:
        super().__init__(detail)
        self.verdict = verdict
        self.common_height = common_height
        self.difference = difference
        self.detail = detail


def compare_ledgers(first: Path, second: Path) -> Comparison:
    """Compare the ledgers in two directories. Raises LedgerError where one of them holds no readable ledger."""
    with ExitStack() as stack:
        one, other = stack.enter_context(opened(first)), stack.enter_context(opened(second))
        heads = CopyHead(first, *_head(one)), CopyHead(second, *_head(other))
        try:
            common = _compare(one, other)
        except _Differs as found:
            return Comparison(*heads, found.verdict, found.common_height, found.difference, found.detail)
        except (sqlite3.Error, UnicodeDecodeError, OverflowError) as error:
            raise LedgerError(
                first, f"it or {second} cannot be read on: {error}; run `ledger verify` on both"
            ) from error
        verdict = Verdict.SAME if heads[0].height == heads[1].height else Verdict.PREFIX
        return Comparison(*heads, verdict, common, None, None)


def _head(store: Store) -> tuple[int, bytes]:
    last = store.last_block()
    return (0, genesis_hash(Genesis.from_bytes(store.meta("genesis") or b""))) if last is None else last[:2]


def _compare(one: Store, other: Store) -> int:
    """The height up to which both go, if they are the same up to there. Raises _Differs."""
    if one.meta("genesis") != other.meta("genesis"):
        raise _Differs(Verdict.OTHER_LEDGER, 0, Difference.GENESIS, "they were founded on different genesis files")
    common = min(one.height(), other.height())
    low, high = 0, common + 1  # The same at `low`; at `high` they differ, or one has ended.
    while high - low > 1:
        middle = (low + high) // 2
        if _id_at(one, middle) == _id_at(other, middle):
            low = middle
        else:
            high = middle
    # A block that was altered in the middle of a copy changes no later id, so the ones before are looked at too.
    for height, (left, right) in enumerate(zip_longest(one.blocks(upto=low), other.blocks(upto=low)), 1):
        if left is None or right is None or left[0] != height or right[0] != height or _id(left[2]) != _id(right[2]):
            _explain(one, other, height)
    if high <= common:
        _explain(one, other, high)
    if one.height() == other.height():
        _compare_rows(one, other, common)
    return common


def _id(raw: bytes) -> bytes | None:
    try:
        return block_id_of(raw)
    except (ProtocolError, TypeError):
        return None


def _id_at(store: Store, height: int) -> bytes | None:
    raw = _raw_at(store, height)
    return None if raw is None else _id(raw)


def _raw_at(store: Store, height: int) -> bytes | None:
    for _, _, raw in store.blocks(height, upto=height):
        return raw
    return None


def _explain(one: Store, other: Store, height: int) -> None:
    """Say what differs between the blocks of a height. Raises _Differs."""

    def differs(difference: Difference, detail: str) -> _Differs:
        return _Differs(Verdict.FORK, height - 1, difference, detail)

    blocks: list[Block] = []
    for name, store in (("first", one), ("second", other)):
        raw = _raw_at(store, height)
        if raw is None:
            raise differs(Difference.BLOCK, f"the {name} copy lacks the block")
        try:
            blocks.append(Block.from_payload(envelope.parse(raw).payload))
        except (ProtocolError, TypeError) as error:
            raise differs(Difference.BLOCK, f"the {name} copy's block cannot be read: {error}") from error
    left, right = blocks
    if left.batches != right.batches:
        shorter = min(len(left.batches), len(right.batches))
        if Counter(left.batches) == Counter(right.batches):
            moved = next(n for n in range(shorter) if left.batches[n] != right.batches[n])
            raise differs(Difference.ORDER, f"the same {shorter} batches, in another order from batch {moved} on")
        if left.batches[:shorter] == right.batches[:shorter]:
            name, longer = ("first", left) if len(left.batches) > shorter else ("second", right)
            more = len(longer.batches) - shorter
            raise differs(Difference.BATCH, f"after {shorter} same batches the {name} copy's block has {more} more")
        number = next(n for n in range(shorter) if left.batches[n] != right.batches[n])
        raise differs(
            Difference.BATCH, f"batch {number}: {_batches_differ(left.batches[number], right.batches[number])}"
        )
    if left.state_hash != right.state_hash:
        raise differs(Difference.STATE, f"the same batches, state {left.state_hash.hex()} and {right.state_hash.hex()}")
    names = [name for name in Block.__slots__ if getattr(left, name) != getattr(right, name)]
    raise differs(Difference.BLOCK, f"the same batches, but another {', '.join(names)}")


def _batches_differ(one: bytes, other: bytes) -> str:
    """Where two batches first differ."""
    try:
        sealed, others = envelope.parse(one), envelope.parse(other)
        left, right = Batch.from_payload(sealed.payload), Batch.from_payload(others.payload)
    except ProtocolError as error:
        return f"one of the two cannot be read: {error}"
    if sealed.key_id != others.key_id:
        return f"signed by key {sealed.key_id.hex()} and {others.key_id.hex()}"
    if left == right:
        return "the same, with two signatures"
    for number, (mine, theirs) in enumerate(zip_longest(left.operations, right.operations)):
        if mine != theirs:
            return f"operation {number}: {_operation(mine)} and {_operation(theirs)}"
    return f"not_after_s {left.not_after_s} and {right.not_after_s}"


def _operation(raw: bytes | None) -> str:
    if raw is None:
        return "none"
    try:
        return type(decode_operation(raw)).__name__.lower() + " " + raw.hex()
    except ProtocolError:
        return raw.hex()


def _compare_rows(one: Store, other: Store, height: int) -> None:
    """Both copies have the same blocks; what is derived from them must be the same too. Raises _Differs."""

    def rows(what: str, left: Iterator[Any], right: Iterator[Any]) -> None:
        for mine, theirs in zip_longest(left, right):
            if mine != theirs:
                keys = [row[0] for row in (mine, theirs) if row is not None]
                first = min(keys, key=lambda key: (str(type(key)), key))
                detail = f"the same blocks, but another {what} {_shown(first)}"
                raise _Differs(Verdict.DAMAGED, height, Difference.STATE, detail)

    rows("state row", one.state_rows(), other.state_rows())
    rows("batch index", one.batch_rows(), other.batch_rows())
    rows("Merkle node row", iter(one.node_rows()), iter(other.node_rows()))


def _shown(key: Any) -> str:
    try:
        return str(decode_key(key)) if type(key) is bytes else str(key)
    except ValueError:
        return repr(key)
