"""Backups that are put back: what goes on, and what must not."""

import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from support.ledger_world import key

from broker import cli
from broker.database_copy import CopyError
from broker.ledger.operations import Void, encode_operation
from broker.ledger.verify import verify_ledger
from broker.protocol.envelope import seal, sealed_id
from broker.protocol.messages import Batch, MessageType, Quality, Receipt, ReceiptStatus
from broker.protocol.sources import Source
from broker.service.backup import LEDGER_DIRECTORY, backup_broker
from broker.service.store import BatchKind, BatchRow, BrokerStore, StoreError, WorkState
from simulation import audit
from simulation.plans import PAIR
from simulation.world import GATE_1_S, GATE_2_S, INTERVAL_S, LEDGER, T0, ConsumerPlan, DevicePlan, Plan, World

ALONE = Plan(
    ("east",),
    "east",
    (ConsumerPlan("anna", "east", (("solar", 60), ("wind", 40)), (500, 300, 400, 250)),),
    (
        DevicePlan("roof", "ola", "east", Source.SOLAR, (700, 0, 150, 90)),
        DevicePlan("mill", "ola", "east", Source.WIND, (900, 700, 100, 500)),
    ),
)
SECOND_CLOSED_S = T0 + 2 * INTERVAL_S + GATE_2_S


def no_waiting(_seconds: float) -> None:
    raise AssertionError("a broker at rest has taken in its ledger")


def put_back(copy: Path, world: World, broker: str, *, with_ledger: bool) -> None:
    database = world.brokers[broker].config.database
    for leftover in (database, database.with_name("broker.db-wal"), database.with_name("broker.db-shm")):
        leftover.unlink(missing_ok=True)
    shutil.copy(copy / "broker.db", database)
    if with_ledger:
        shutil.rmtree(world.folder / "ledger")
        shutil.copytree(copy / LEDGER_DIRECTORY, world.folder / "ledger")


def test_database_and_ledger_of_one_backup_go_on_together(folder: Path) -> None:
    world = World(ALONE, folder / "world")
    world.run(SECOND_CLOSED_S)
    report = backup_broker(world.brokers["east"].config, folder / "copy", no_waiting)
    assert report.ledger is not None
    assert report.ledger.ok
    books = world.run()
    put_back(folder / "copy", world, "east", with_ledger=True)
    # Receipts that were given since the backup are void, so those meters have to be told; here they send once more.
    for member in (*ALONE.consumers, *ALONE.devices):
        name = member.meter if isinstance(member, ConsumerPlan) else member.device
        for index in (2, 3):
            value = world.meter_value(name, T0 + index * INTERVAL_S, member.energies_wh[index])
            world.send(name, value)
    assert world.run(T0 + (ALONE.intervals + 3) * INTERVAL_S) == books
    audit.check(world, books)


@pytest.mark.parametrize(("broker", "plan"), [("east", ALONE), ("east", PAIR), ("west", PAIR)])
def test_a_database_older_than_the_ledger_is_refused_before_anything_is_decided(
    folder: Path, broker: str, plan: Plan
) -> None:
    world = World(plan, folder / "world")
    world.run(SECOND_CLOSED_S)
    backup_broker(world.brokers[broker].config, folder / "copy", no_waiting)
    world.run()
    head = audit.head_of(world)
    put_back(folder / "copy", world, broker, with_ledger=False)
    store = BrokerStore(world.brokers[broker].config.database)
    batches = len(list(store.all_batches()))
    store.close()
    with pytest.raises(StoreError, match=r"older than the ledger: block .* Restore the newest backup"):
        world.run(T0 + (plan.intervals + 3) * INTERVAL_S)
    world.stop()
    assert audit.head_of(world) == head, "nothing new stands on the ledger"
    store = BrokerStore(world.brokers[broker].config.database)
    assert len(list(store.all_batches())) == batches
    store.close()


def test_a_ledger_that_was_put_back_alone_stops_the_broker(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    world = World(ALONE, folder / "world", may_wait=True)
    world.run(SECOND_CLOSED_S)
    backup_broker(world.brokers["east"].config, folder / "copy", no_waiting)
    world.run()
    shutil.rmtree(world.folder / "ledger")
    shutil.copytree(folder / "copy" / LEDGER_DIRECTORY, world.folder / "ledger")
    head = audit.head_of(world)
    world.patience_s = 3.0
    world.run(T0 + (ALONE.intervals + 2) * INTERVAL_S)
    assert "it has lost blocks" in caplog.text
    assert audit.head_of(world) == head


def test_a_backup_of_a_pair_that_does_not_fit_together_is_not_made(folder: Path) -> None:
    world = World(ALONE, folder / "world")
    world.run(SECOND_CLOSED_S)
    store = BrokerStore(world.brokers["east"].config.database)
    store.set_ledger_cursor(1, b"x" * 32)
    store.close()
    waits: list[float] = []
    with pytest.raises(CopyError, match="do not come to the same block"):
        backup_broker(world.brokers["east"].config, folder / "copy", waits.append)
    assert sum(waits) == pytest.approx(30)
    assert not (folder / "copy").exists()


@pytest.mark.parametrize("spoilt", ["broker.db", "ledger.sqlite3"])
def test_a_database_of_another_kind_is_named_and_not_the_disk(folder: Path, spoilt: str) -> None:
    world = World(ALONE, folder / "world")
    world.run(SECOND_CLOSED_S)
    config = world.brokers["east"].config
    assert config.ledger.host is not None
    file = config.database if spoilt == "broker.db" else config.ledger.host.path / "ledger.sqlite3"
    for log in file.parent.glob(f"{file.name}-*"):
        log.unlink()
    file.unlink()
    with closing(sqlite3.connect(file)) as other:
        other.execute("CREATE TABLE meta (name TEXT, value BLOB)")
    with pytest.raises(CopyError, match=rf"{file.name} is no "):
        backup_broker(config, folder / "copy", no_waiting)
    assert not (folder / "copy").exists()


def test_the_command_copies_both(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(ALONE, folder / "world")
    world.run(SECOND_CLOSED_S)
    config = world.brokers["east"].config
    assert config.ledger.host is not None
    (folder / "east.toml").write_text(
        f'[broker]\nname = "east"\nkey_file = "{config.broker.key_file}"\ndata_dir = "{config.broker.data_dir}"\n'
        f'[ledger]\ngenesis_file = "{config.ledger.genesis_file}"\n'
        f'[ledger.host]\npath = "{config.ledger.host.path}"\nvalidator = "node"\n'
        f'key_file = "{config.ledger.host.key_file}"\n'
    )
    assert cli.main(["backup", "--config", str(folder / "east.toml"), "--out", str(folder / "copy")]) == 0
    assert "which verifies; it holds the consumers' secrets" in capsys.readouterr().out
    assert (folder / "copy" / "broker.db").stat().st_mode & 0o077 == 0
    assert verify_ledger(folder / "copy" / LEDGER_DIRECTORY).ok


def send_again(world: World, broker: str, from_index: int, until_s: int = 2**40) -> None:
    """Have the broker's meters send once more what they sent for the intervals from that one on."""
    for member in (*world.plan.consumers, *world.plan.devices):
        name = member.meter if isinstance(member, ConsumerPlan) else member.device
        if member.broker == broker:
            for index, energy_wh in enumerate(member.energies_wh):
                start_s = T0 + index * INTERVAL_S
                if index >= from_index and start_s + INTERVAL_S <= until_s:
                    world.send(name, world.meter_value(name, start_s, energy_wh))


def restore_yesterdays(folder: Path, world: World, broker: str, until_s: int) -> None:
    """Back up, run on, lose the database, put the backup in its place, and have it recover at the next start."""
    backup_broker(world.brokers[broker].config, folder / "copy", no_waiting)
    world.run(until_s)
    put_back(folder / "copy", world, broker, with_ledger=False)
    world.brokers[broker].recovers = True


@pytest.mark.parametrize("copied_s", [T0 + 10, T0 + INTERVAL_S + GATE_1_S, SECOND_CLOSED_S])
@pytest.mark.parametrize(("broker", "plan"), [("east", ALONE), ("east", PAIR), ("west", PAIR)])
def test_an_older_database_takes_back_from_the_ledger_what_it_has_forgotten(
    folder: Path, broker: str, plan: Plan, copied_s: int
) -> None:
    books = World(plan, folder / "undisturbed").run()
    world = World(plan, folder / "world")
    world.run(copied_s)
    after_s = T0 + (plan.intervals + 3) * INTERVAL_S
    restore_yesterdays(folder, world, broker, T0 + (plan.intervals + 1) * INTERVAL_S + GATE_2_S)
    recovered = world.run(after_s)
    assert recovered.delivered_wh == books.delivered_wh
    assert recovered.bought_wh == books.bought_wh
    assert recovered.kept_wh == books.kept_wh
    # When the meters send once more what they sent since, nothing is missing: receipts and certificates included.
    send_again(world, broker, 0)
    world.brokers[broker].recovers = False
    assert world.run(after_s + INTERVAL_S) == books
    audit.check(world, books)
    audit.check_certificates(world, books)


@pytest.mark.parametrize("seed", range(4))
def test_recovery_goes_on_where_it_was_killed(folder: Path, seed: int) -> None:
    books = World(PAIR, folder / "undisturbed").run()
    world = World(PAIR, folder / "world", seed, may_wait=True)
    world.patience_s = 5.0
    world.run(T0 + INTERVAL_S + GATE_1_S)
    restore_yesterdays(folder, world, "west", T0 + (PAIR.intervals + 1) * INTERVAL_S + GATE_2_S)
    world._kills = 6
    after_s = T0 + (PAIR.intervals + 3) * INTERVAL_S
    send_again(world, "west", 0)
    world.run(after_s)
    assert world.run(after_s + INTERVAL_S) == books
    audit.check(world, books)


@pytest.mark.parametrize("lost_at_s", [GATE_1_S + 60, GATE_2_S + 60])
def test_what_was_lost_between_the_gates_is_decided_again_from_what_is_on_the_ledger(
    folder: Path, lost_at_s: int
) -> None:
    world = World(ALONE, folder / "world", may_wait=True)
    world.patience_s = 3.0
    world.run(T0 + INTERVAL_S + 60)
    lost_s = T0 + 2 * INTERVAL_S + lost_at_s
    restore_yesterdays(folder, world, "east", lost_s)
    send_again(world, "east", 0, until_s=lost_s)
    books = world.run()
    audit.check(world, books)
    assert books == World(ALONE, folder / "undisturbed").run()


def test_corrections_since_the_backup_come_back_too(folder: Path) -> None:
    def corrected(world: World, due_s: int) -> World:
        for meter, index, energy_wh in (("anna", 1, 200), ("anna", 0, 450), ("roof", 0, 650)):
            value = world.meter_value(meter, T0 + index * INTERVAL_S, energy_wh, revision=1)
            world.send(meter, value, due_s)
        return world

    corrected_s = T0 + 2 * INTERVAL_S + GATE_2_S + 60
    undisturbed = corrected(World(ALONE, folder / "undisturbed"), corrected_s).run()
    world = World(ALONE, folder / "world")
    world.run(T0 + INTERVAL_S + 60)
    corrected(world, corrected_s)
    restore_yesterdays(folder, world, "east", T0 + 6 * INTERVAL_S)
    world.run(T0 + 7 * INTERVAL_S)
    send_again(world, "east", 0)
    books = corrected(world, 0).run(T0 + 8 * INTERVAL_S)
    assert books == undisturbed
    audit.check(world, books)
    audit.check_certificates(world, books)


def test_a_demand_of_nothing_is_said_to_be_missing_until_its_meter_sends_it_again(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The ledger has only the count of them."""
    plan = replace(ALONE, consumers=(*ALONE.consumers, ConsumerPlan("ben", "east", (("wind", 100),), (10, 0, 0, 10))))
    world = World(plan, folder / "world")
    world.run(T0 + INTERVAL_S + GATE_2_S)
    restore_yesterdays(folder, world, "east", T0 + 4 * INTERVAL_S + GATE_2_S)
    world.run(T0 + 5 * INTERVAL_S)
    missing = [record.message for record in caplog.records if "known again" in record.message]
    assert [message.split(",")[0] for message in missing] == [
        f"the close of the interval at {T0 + index * INTERVAL_S} is over 2 demands of {wh} Wh"
        for index, wh in ((1, 300), (2, 400))
    ]
    assert "recovered from the ledger: " in caplog.text
    send_again(world, "east", 1)
    world.brokers["east"].recovers = False
    books = world.run(T0 + 7 * INTERVAL_S)
    audit.check(world, books)


def test_another_demand_than_the_one_on_the_ledger_is_not_put_in_its_place(folder: Path) -> None:
    world = World(ALONE, folder / "world")
    world.run(T0 + INTERVAL_S + 60)
    restore_yesterdays(folder, world, "east", T0 + 5 * INTERVAL_S)
    said_wh = ALONE.consumers[0].energies_wh[2]
    world.send("anna", world.meter_value("anna", T0 + 2 * INTERVAL_S, said_wh, quality=Quality.ESTIMATED))
    answers = world.listen(world.topics.meter("east", "anna", "receipt"))
    world.run(T0 + 6 * INTERVAL_S)
    (answer,) = map(world.opened, answers)
    assert isinstance(answer, Receipt)
    assert answer.status is ReceiptStatus.CONFLICT
    store = BrokerStore(world.brokers["east"].config.database)
    row = store.current_demand(T0 + 2 * INTERVAL_S, "anna")
    store.close()
    assert row is not None
    assert (row.raw, row.energy_wh) == (b"", said_wh)


def test_who_signed_up_after_the_backup_still_counts_in_the_closes_of_then(folder: Path) -> None:
    plan = replace(ALONE, consumers=(*ALONE.consumers, ConsumerPlan("ben", "east", (("wind", 100),), (0, 0, 90, 80))))
    world = World(plan, folder / "world")
    world.run(T0 + INTERVAL_S + 60)
    restore_yesterdays(folder, world, "east", T0 + 4 * INTERVAL_S + GATE_2_S)
    database = sqlite3.connect(world.brokers["east"].config.database)
    for table in ("consumer", "contract", "message", "account"):
        database.execute(f"DELETE FROM {table} WHERE meter = 'ben'")
    database.commit()
    database.close()
    world.run(T0 + 5 * INTERVAL_S)
    store = BrokerStore(world.brokers["east"].config.database)
    lost = [row for row in store.all_messages(MessageType.DEMAND) if row.meter.startswith("lost-")]
    assert [(row.start_s, row.energy_wh) for row in lost] == [(T0 + 2 * INTERVAL_S, 90), (T0 + 3 * INTERVAL_S, 80)]
    assert all(row.refusal is not None and "registered after the backup" in row.refusal for row in lost)
    assert [row.meter for row in store.consumers()] == ["anna"]
    store.close()
    accounts = audit._replay(world)
    for row in lost:
        assert accounts.closed["east", row.start_s][-1].demands == 2
        assert row.pseudonym is not None
        assert accounts.given_wh[row.start_s, row.pseudonym] == row.delivered_wh > 0


def test_a_batch_that_is_not_this_runs_own_is_refused_again_after_the_recovery(folder: Path) -> None:
    """Two brokers of one name would otherwise take over each other's decisions for ever."""
    world = World(ALONE, folder / "world")
    world.run(SECOND_CLOSED_S)
    restore_yesterdays(folder, world, "east", T0 + (ALONE.intervals + 1) * INTERVAL_S)
    other = Batch(T0 + 100 * INTERVAL_S, (encode_operation(Void(b"x" * 16)),))
    raw = seal(other, key("east"), LEDGER, "east")
    world.run(T0 + (ALONE.intervals + 2) * INTERVAL_S)
    world.before_next_step(lambda: world.say("x", world.topics.ledger_submit(LEDGER), raw))
    with pytest.raises(StoreError, match="older than the ledger"):
        world.run(T0 + (ALONE.intervals + 3) * INTERVAL_S)
    world.stop()


@pytest.mark.parametrize("recovers", [False, True])
def test_a_batch_that_was_refused_and_taken_later_is_told_or_taken_back(
    folder: Path, caplog: pytest.LogCaptureFixture, recovers: bool
) -> None:
    """Under way twice, it came again when nothing stood against it any more."""
    world = World(ALONE, folder / "world")
    world.run(SECOND_CLOSED_S)
    operation = encode_operation(Void(b"x" * 16))
    raw = seal(Batch(T0 + 100 * INTERVAL_S, (operation,)), key("east"), LEDGER, "east")
    batch_id = sealed_id(raw, LEDGER, "east")
    store = BrokerStore(world.brokers["east"].config.database)
    store.begin()
    store.add_batch(BatchRow(store.next_batch_number(), batch_id, BatchKind.VOID, 0, raw, WorkState.WAITING))
    store.set_batch(batch_id, WorkState.REFUSED, None, "order_ended: it was too early")
    store.commit()
    store.close()
    if recovers:
        backup_broker(world.brokers["east"].config, folder / "copy", no_waiting)
    world.before_next_step(lambda: world.say("x", world.topics.ledger_submit(LEDGER), raw))
    world.run(T0 + (ALONE.intervals + 1) * INTERVAL_S)
    assert "that the ledger had refused before; what it did is missing" in caplog.text
    if recovers:
        put_back(folder / "copy", world, "east", with_ledger=False)
        world.brokers["east"].recovers = True
        caplog.clear()
        world.run(T0 + (ALONE.intervals + 2) * INTERVAL_S)
        assert "recovered from the ledger" in caplog.text
        assert "had refused before" not in caplog.text
    store = BrokerStore(world.brokers["east"].config.database)
    assert store.batch_state(batch_id) is (WorkState.COMMITTED if recovers else WorkState.REFUSED)
    store.close()
