"""Splitting into batches, what waits for what, and the order in which a turn's outputs leave."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.ledger_world import LEDGER, key

from broker.protocol.limits import MAX_BATCH_BYTES, MAX_BATCH_OPERATIONS
from broker.service.batches import FULL_BATCH_BYTES, FULL_BATCH_OPERATIONS, BatchDesk, in_batches
from broker.service.outputs import Identity, Outputs
from broker.service.store import BatchKind, BrokerStore, WorkState

IDENTITY = Identity("b1", key("b1"), LEDGER)


@pytest.fixture
def store(tmp_path: Path) -> BrokerStore:
    return BrokerStore(tmp_path / "broker.db")


@given(st.lists(st.integers(1, FULL_BATCH_BYTES), max_size=40))
def test_batches_keep_the_order_and_stay_within_the_limits(sizes: list[int]) -> None:
    runs = list(in_batches(enumerate(sizes), sizes))
    assert [item for run in runs for item in run] == list(enumerate(sizes))
    assert all(run and sum(size for _, size in run) <= FULL_BATCH_BYTES for run in runs)


def test_batches_are_full_before_a_new_one_begins() -> None:
    runs = list(in_batches(range(FULL_BATCH_OPERATIONS * 2 + 1), [1] * (FULL_BATCH_OPERATIONS * 2 + 1)))
    assert [len(run) for run in runs] == [FULL_BATCH_OPERATIONS, FULL_BATCH_OPERATIONS, 1]


def test_a_full_batch_with_its_envelope_fits_the_wire(store: BrokerStore) -> None:
    desk = BatchDesk(IDENTITY, store, Outputs())
    operation = bytes(FULL_BATCH_BYTES // FULL_BATCH_OPERATIONS)
    row = desk.submit(BatchKind.DELIVER, 0, 1, [operation] * FULL_BATCH_OPERATIONS)
    assert len(row.raw) <= MAX_BATCH_BYTES
    # Issue and transfer are one item of two operations.
    assert 2 * FULL_BATCH_OPERATIONS <= MAX_BATCH_OPERATIONS


def test_a_batch_waits_across_a_restart_until_its_result_is_known(store: BrokerStore) -> None:
    row = BatchDesk(IDENTITY, store, Outputs()).submit(BatchKind.DELIVER, 1_800, 3_600, [b"\x82\x07"])
    desk = BatchDesk(IDENTITY, store, Outputs())
    assert [batch.batch_id for batch in desk.waiting] == [row.batch_id]
    assert desk.waits_for(BatchKind.DELIVER, 1_800)
    assert not desk.waits_for(BatchKind.DELIVER, 0)
    assert desk.waits_before(3_600)
    assert not desk.waits_before(1_800)
    finished = desk.finish(row.batch_id, WorkState.COMMITTED, 5, None)
    assert finished is not None
    assert desk.finish(row.batch_id, WorkState.COMMITTED, 5, None) is None
    assert not BatchDesk(IDENTITY, store, Outputs()).waiting


def test_the_same_batch_twice_is_one(store: BrokerStore) -> None:
    outputs = Outputs()
    desk = BatchDesk(IDENTITY, store, outputs)
    first = desk.submit(BatchKind.CLOSE, 0, 1, [b"\x82\x08"])
    assert desk.submit(BatchKind.CLOSE, 0, 1, [b"\x82\x08"]) is first
    assert len(outputs.batches) == 1


def test_everything_else_waits_for_statements(store: BrokerStore) -> None:
    outputs = Outputs()
    desk = BatchDesk(IDENTITY, store, outputs)
    statements = desk.submit(BatchKind.STATEMENTS, 0, 1, [b"\x82\x01"])
    provide = desk.submit(BatchKind.PROVIDE, 0, 1, [b"\x82\x05"])
    assert outputs.batches == [statements.raw]
    desk.finish(statements.batch_id, WorkState.REFUSED, None, "no")
    assert outputs.batches == [statements.raw, provide.raw]


def test_batches_leave_before_messages_and_complaints() -> None:
    outputs = Outputs()
    outputs.complain("a sentence")
    outputs.publish("topic", b"payload")
    outputs.submit(b"batch")
    seen: list[object] = []
    outputs.hand_over(lambda item: seen.append(item.topic), seen.append, seen.append)
    assert seen == [b"batch", "topic", "a sentence"]
    outputs.hand_over(seen.append, seen.append, seen.append)
    assert len(seen) == 3
