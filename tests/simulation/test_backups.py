"""Backups that are put back: what goes on, and what must not."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from broker import cli
from broker.database_copy import CopyError
from broker.ledger.verify import verify_ledger
from broker.protocol.sources import Source
from broker.service.backup import LEDGER_DIRECTORY, backup_broker
from broker.service.store import BrokerStore, StoreError
from simulation import audit
from simulation.plans import PAIR
from simulation.world import GATE_2_S, INTERVAL_S, T0, ConsumerPlan, DevicePlan, Plan, World

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
