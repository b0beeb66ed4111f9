"""State sync: a new node begins from another one's snapshot, and from nothing that the validators did not sign."""

from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from support.ledger_world import SET_UP, batch, deliver, issue, take
from support.node import Node

from broker.ledger.cometbft import abci
from broker.ledger.cometbft.abci import ChunkResult, OfferResult
from broker.ledger.cometbft.snapshots import KEPT_SNAPSHOTS
from broker.ledger.snapshot import Manifest
from broker.ledger.store import LedgerError
from broker.ledger.verify import verify_ledger

EVERY = 3
BLOCKS = (
    SET_UP,
    (batch(issue("solar-1", 1_000), take("solar-1", 0, 1_000)),),
    (batch(*[deliver(n, 10, ("solar-1", 10 * n, 10 * n + 10)) for n in range(20)]),),
)
AFTER = batch(deliver(50, 10, ("solar-1", 500, 510)))


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path / "old", every=EVERY)
    node.init_chain()
    for txs in BLOCKS:
        node.make_block(*txs)
    node.application._shelf.wait()
    yield node
    node.application.close()


@pytest.fixture
def new(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path / "new", "node-2", EVERY)
    yield node
    node.application.close()


def listed(node: Node) -> list[abci.Snapshot]:
    found: abci.ListSnapshotsResponse = node.ask(abci.ListSnapshotsRequest())
    return list(found.snapshots)


def offer(node: Node, snapshot: abci.Snapshot, app_hash: bytes) -> int:
    result: int = node.ask(abci.OfferSnapshotRequest(snapshot, app_hash)).result
    return result


def app_hash(node: Node) -> bytes:
    found: bytes = node.ask(abci.InfoRequest()).last_block_app_hash
    return found


def chunks(node: Node, snapshot: abci.Snapshot) -> list[bytes]:
    return [
        node.ask(abci.LoadSnapshotChunkRequest(snapshot.height, snapshot.format, index)).chunk
        for index in range(snapshot.chunks)
    ]


def apply(node: Node, parts: list[bytes]) -> list[Any]:
    return [node.ask(abci.ApplySnapshotChunkRequest(index, chunk, "peer")).result for index, chunk in enumerate(parts)]


def test_a_new_node_goes_on_from_a_snapshot_as_the_others_do(old: Node, new: Node) -> None:
    (snapshot,) = listed(old)
    assert snapshot.height == EVERY
    assert offer(new, snapshot, app_hash(old)) == OfferResult.ACCEPT
    parts = chunks(old, snapshot)
    assert all(parts)
    assert apply(new, parts) == [ChunkResult.ACCEPT] * len(parts)
    info = new.ask(abci.InfoRequest())
    assert (info.last_block_height, info.last_block_app_hash) == (EVERY, app_hash(old))
    assert new.application.head == old.application.head
    new.restart()
    for txs in ((AFTER,), (), ()):
        assert new.make_block(*txs) == old.make_block(*txs)
    assert new.query("/holdings", ["b1", None]) == old.query("/holdings", ["b1", None])
    for node in (new, old):
        node.application._shelf.wait()
    assert listed(new)[0] == listed(old)[0]
    assert verify_ledger(new.path).errors == ()


def test_duplicates_have_the_same_result_on_a_node_that_knows_the_history_and_one_that_does_not(
    old: Node, new: Node
) -> None:
    (snapshot,) = listed(old)
    offer(new, snapshot, app_hash(old))
    apply(new, chunks(old, snapshot))
    new.application._store._db.execute("DELETE FROM batches")
    again = [raw for txs in BLOCKS for raw in txs]
    assert new.make_block(*again) == old.make_block(*again)


def test_a_snapshot_that_the_validators_did_not_sign_is_refused(old: Node, new: Node) -> None:
    (snapshot,) = listed(old)
    manifest = Manifest.from_bytes(snapshot.metadata)
    signed = app_hash(old)
    assert offer(new, snapshot, b"a" * 32) == OfferResult.REJECT
    other_rows = replace(manifest, rows_digest=b"r" * 32).to_bytes()
    other_head = replace(manifest, head=replace(manifest.head, block_id=b"b" * 32)).to_bytes()
    other_genesis = replace(manifest, genesis=replace(manifest.genesis, ledger="other")).to_bytes()
    for metadata in (other_rows, other_head, other_genesis, b"", b"\x80"):
        assert offer(new, replace(snapshot, metadata=metadata), signed) == OfferResult.REJECT
    assert offer(new, replace(snapshot, chunks=snapshot.chunks + 1), signed) == OfferResult.REJECT
    assert new.application.network_height == 0


def test_a_forged_head_or_forged_rows_end_in_a_refusal_and_an_empty_ledger(old: Node, new: Node) -> None:
    """Whatever the app hash does not cover by itself is bound to what it covers."""
    (snapshot,) = listed(old)
    signed = app_hash(old)
    parts = chunks(old, snapshot)
    manifest = Manifest.from_bytes(snapshot.metadata)
    forged_head = replace(manifest, head=replace(manifest.head, state_hash=b"s" * 32))
    assert offer(new, replace(snapshot, metadata=forged_head.to_bytes()), signed) == OfferResult.ACCEPT
    assert apply(new, parts)[-1] == ChunkResult.REJECT_SNAPSHOT
    rows = parts[0].replace(b"solar-1", b"solar-9")
    named = replace(manifest.chunks[0], digest=sha256(rows).digest())
    forged_rows = replace(manifest, chunks=(named, *manifest.chunks[1:]))
    assert offer(new, replace(snapshot, metadata=forged_rows.to_bytes()), signed) == OfferResult.ACCEPT
    assert ChunkResult.REJECT_SNAPSHOT in apply(new, [rows, *parts[1:]])
    assert new.application.network_height == 0
    new.init_chain()
    for txs in BLOCKS:
        new.make_block(*txs)
    assert app_hash(new) == signed


def test_a_damaged_chunk_is_fetched_from_somebody_else(old: Node, new: Node) -> None:
    (snapshot,) = listed(old)
    offer(new, snapshot, app_hash(old))
    parts = chunks(old, snapshot)
    answer = new.ask(abci.ApplySnapshotChunkRequest(0, parts[0][:-1] + b"\x00", "liar"))
    assert answer == abci.ApplySnapshotChunkResponse(ChunkResult.RETRY, (0,), ("liar",))
    assert new.ask(abci.ApplySnapshotChunkRequest(1, parts[1], "peer")).result == ChunkResult.RETRY_SNAPSHOT
    assert apply(new, parts) == [ChunkResult.ACCEPT] * len(parts)


def test_killed_while_it_is_filled_a_node_begins_anew(old: Node, new: Node) -> None:
    (snapshot,) = listed(old)
    offer(new, snapshot, app_hash(old))
    parts = chunks(old, snapshot)
    apply(new, parts[:-1])
    new.restart()
    assert new.ask(abci.ApplySnapshotChunkRequest(len(parts) - 1, parts[-1], "peer")).result == ChunkResult.ABORT
    assert offer(new, snapshot, app_hash(old)) == OfferResult.ACCEPT
    assert apply(new, parts)[-1] == ChunkResult.ACCEPT


def test_a_node_with_a_ledger_takes_no_snapshot(old: Node) -> None:
    (snapshot,) = listed(old)
    assert offer(old, snapshot, app_hash(old)) == OfferResult.ABORT


def test_only_the_last_snapshots_are_kept_and_found_again(old: Node) -> None:
    for _ in range(3 * EVERY):
        old.make_block()
        old.application._shelf.wait()
    assert [snapshot.height for snapshot in listed(old)] == [4 * EVERY, 3 * EVERY]
    assert len(listed(old)) == KEPT_SNAPSHOTS
    old.restart()
    assert [snapshot.height for snapshot in listed(old)] == [4 * EVERY, 3 * EVERY]
    assert old.ask(abci.LoadSnapshotChunkRequest(EVERY, 1, 0)).chunk == b""
    assert old.ask(abci.LoadSnapshotChunkRequest(4 * EVERY, 1, 999)).chunk == b""
    assert old.ask(abci.LoadSnapshotChunkRequest(4 * EVERY, 2, 0)).chunk == b""


def test_a_snapshot_finds_a_row_that_was_altered_in_a_part_that_nobody_touches(old: Node) -> None:
    old.application._store._db.execute("UPDATE state SET value = x'80' WHERE key = (SELECT min(key) FROM state)")
    for _ in range(EVERY):
        old.make_block()
    old.application._shelf.wait()
    with pytest.raises(LedgerError, match="others than those that were written"):
        old.make_block()


def test_an_idle_ledger_without_blocks_takes_no_snapshots(new: Node) -> None:
    new.init_chain()
    for _ in range(EVERY):
        new.make_block()
    assert listed(new) == []
