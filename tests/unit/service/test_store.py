"""The broker's database: what goes in comes out, what is not committed is gone, and other files are not touched."""

import sqlite3
from pathlib import Path

import pytest

from broker.protocol.messages import MessageType
from broker.service.store import (
    SCHEMA_VERSION,
    AccountRow,
    BatchKind,
    BatchRow,
    BrokerStore,
    ConsumerRow,
    DeliveryRow,
    DeviceRow,
    IntervalState,
    OrderInRow,
    OrderOutRow,
    StoreError,
    WorkState,
    encode_quotas,
)

T0 = 1_800


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "broker.db"


def add_demand(store: BrokerStore, meter: str, start_s: int = T0, energy_wh: int = 10) -> None:
    store.add_message(start_s, meter, MessageType.DEMAND, 0, meter.encode(), b"raw", energy_wh, b"p", b"c")


def test_what_is_committed_survives_and_nothing_else(path: Path) -> None:
    store = BrokerStore(path)
    store.begin()
    add_demand(store, "kept")
    store.commit()
    store.begin()
    add_demand(store, "lost")
    store.close()
    store = BrokerStore(path)
    assert [row.meter for row in store.all_messages(MessageType.DEMAND)] == ["kept"]
    store.close()


def test_only_its_owner_can_read_the_secrets_in_it(path: Path) -> None:
    BrokerStore(path).close()
    assert path.stat().st_mode & 0o077 == 0


def test_writes_are_synchronous(path: Path) -> None:
    store = BrokerStore(path)
    assert store._db.execute("PRAGMA synchronous").fetchone()[0] == 2
    assert store._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


@pytest.mark.parametrize("version", [SCHEMA_VERSION - 1, SCHEMA_VERSION + 1])
def test_a_file_of_another_version_is_refused_and_left_alone(path: Path, version: int) -> None:
    BrokerStore(path).close()
    other = sqlite3.connect(path)
    other.execute(f"PRAGMA user_version={version}")
    other.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match=rf"is of schema {version}, .* run the version that wrote it, or give"):
        BrokerStore(path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database, but long enough to look at" * 100)
    with pytest.raises(StoreError, match="backup"):
        BrokerStore(path)


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="check that it is a file that this user may write"):
        BrokerStore(tmp_path)


def test_the_command_lines_writes_are_noticed_once(path: Path) -> None:
    running, command = BrokerStore(path), BrokerStore(path)
    assert not running.changed_by_others()
    command.begin()
    command.add_statement(1, b"statement")
    command.commit()
    assert running.changed_by_others()
    assert not running.changed_by_others()
    running.begin()
    add_demand(running, "own")
    running.commit()
    assert not running.changed_by_others()


def test_a_meter_or_key_is_registered_once(path: Path) -> None:
    store = BrokerStore(path)
    store.add_consumer(ConsumerRow("home", b"key", b"id", b"s" * 32, 0))
    with pytest.raises(StoreError, match="home"):
        store.add_consumer(ConsumerRow("home", b"other", b"other", b"s" * 32, 0))
    with pytest.raises(StoreError, match="barn"):
        store.add_consumer(ConsumerRow("barn", b"key", b"id", b"s" * 32, 0))
    store.add_device(DeviceRow("roof", "alice", b"k", b"i", 1, 1, "north", 1, 0))
    with pytest.raises(StoreError, match="roof"):
        store.add_device(DeviceRow("roof", "alice", b"k2", b"i2", 1, 1, "north", 1, 0))


def test_demands_with_their_quotas(path: Path) -> None:
    store = BrokerStore(path)
    for meter in ("b", "a", "c"):
        add_demand(store, meter)
    store.set_delivered([(10, None, T0, "a", 0), (4, encode_quotas((6, 4)), T0, "b", 0)])
    store.refuse_message(T0, "c", MessageType.DEMAND, 0, "demand_changed: why")
    assert [(row.meter, row.quotas) for row in store.short_demands(T0)] == [("b", (6, 4))]
    assert [row.meter for row in store.messages(T0, MessageType.DEMAND)] == ["a", "b", "c"]
    row = store.message(T0, "c", MessageType.DEMAND, 0)
    assert row is not None
    assert row.refusal == "demand_changed: why"
    assert store.message_count(T0) == 3
    assert store.has_demand_since("a", T0)
    assert not store.has_demand_since("a", T0 + 1)


def test_deliveries_of_a_batch(path: Path) -> None:
    store = BrokerStore(path)
    rows = [DeliveryRow(T0, "a", number, 0, 1, "roof", T0, 0, number, number + 1, 5, None, 7) for number in range(3)]
    store.add_deliveries(rows)
    assert store.deliveries(T0, "a") == rows
    assert store.deliveries_of_batch(T0, 7) == rows
    store.drop_deliveries_of_batch(T0, 7)
    assert not list(store.all_deliveries())


def test_accounts_are_replaced(path: Path) -> None:
    store = BrokerStore(path)
    store.set_accounts([AccountRow("a", 0, 1, 5, (2, 3))])
    store.set_accounts([AccountRow("a", 0, 1, 9, (4, 5))])
    assert store.account("a", 0, 1) == AccountRow("a", 0, 1, 9, (4, 5))
    assert store.account("a", 0, 2) is None


def test_intervals_and_late_demands(path: Path) -> None:
    store = BrokerStore(path)
    assert store.interval_state(T0) == (IntervalState.OPEN, 0)
    assert store.first_interval() is None
    store.set_interval(T0, IntervalState.CLOSED, 1)
    store.set_interval(2 * T0, IntervalState.CLEARED, 0)
    store.mark_late(T0)
    assert store.late_intervals() == [T0]
    assert store.first_interval() == T0
    assert store.last_interval(IntervalState.CLOSED) == T0
    assert store.last_interval(IntervalState.CLEARED) == 2 * T0
    store.set_interval(T0, IntervalState.CLOSED, 2)
    assert store.late_intervals() == []


def test_a_finished_batch_keeps_its_result_but_not_its_bytes(path: Path) -> None:
    store = BrokerStore(path)
    store.add_batch(BatchRow(1, b"one", BatchKind.DELIVER, T0, b"bytes", WorkState.WAITING))
    store.add_batch(BatchRow(2, b"two", BatchKind.CLOSE, T0, b"bytes", WorkState.WAITING))
    store.set_batch(b"one", WorkState.REFUSED, None, "expired: too late")
    assert [row.number for row in store.waiting_batches()] == [2]
    first = next(store.all_batches())
    assert (first.raw, first.state, first.reason) == (b"", WorkState.REFUSED, "expired: too late")
    assert store.next_batch_number() == 3


def test_orders_out_and_in(path: Path) -> None:
    store = BrokerStore(path)
    out = OrderOutRow(b"1", T0, "west", 3, 100, b"raw", "asked", 0, None, None, 1, None, None)
    store.add_order_out(out)
    assert store.open_orders_out() == [out]
    seen = out._replace(state="seen", seen_wh=80, answered_wh=90, answer_status=0)
    store.set_order_out(seen, None)
    assert not store.open_orders_out()
    assert store.order_out(b"1") == seen
    child = out._replace(order_id=b"2", parent_requester="north", parent=b"1")
    store.add_order_out(child)
    assert store.orders_out_for("north", b"1") == [child]
    assert not store.orders_out_for("west", b"1")
    # Two neighbours may use the same id.
    for requester in ("west", "north"):
        store.add_order_in(OrderInRow(requester, b"1", T0, 3, 100, 9, b"raw", "received", 0, None, 1, 2))
    row = store.order_in("north", b"1")
    assert row is not None
    store.set_order_in(row._replace(state="committed", granted_wh=50, answer=b"answer"))
    assert [(row.requester, row.state) for row in store.orders_in(T0)] == [("north", "committed"), ("west", "received")]
    assert [row.requester for row in store.orders_in_state("received")] == ["west"]


def test_announcements_and_what_was_heard(path: Path) -> None:
    store = BrokerStore(path)
    store.set_announcement("topic", b"1")
    store.set_announcement("topic", b"2")
    assert store.announcements() == [("topic", b"2")]
    store.set_heard(T0, MessageType.CLEARED, "west", b"old")
    store.set_heard(T0, MessageType.CLEARED, "west", b"new")
    assert store.heard(T0, MessageType.CLEARED) == {"west": b"new"}
    assert store.heard(T0, MessageType.STOCK) == {}
    store.forget_heard(T0 + 1)
    assert store.heard(T0, MessageType.CLEARED) == {}


def test_the_ledger_cursor(path: Path) -> None:
    store = BrokerStore(path)
    assert store.ledger_cursor() is None
    store.set_ledger_cursor(4, b"block")
    store.set_ledger_cursor(5, b"next")
    assert store.ledger_cursor() == (5, b"next")
