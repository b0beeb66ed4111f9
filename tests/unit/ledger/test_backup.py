"""Backups of a ledger in use: whole, of one moment, verified, and never half there."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.ledger_world import batch, deliver, found, issue, take

from broker import cli, database_copy
from broker.database_copy import CopyError
from broker.ledger.backup import backup_ledger
from broker.ledger.embedded import EmbeddedLedger
from broker.ledger.store import FILE_NAME, LedgerError
from broker.ledger.verify import verify_ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[EmbeddedLedger]:
    engine = found(tmp_path / "ledger")
    commit(engine, batch(issue("solar-1", 100), take("solar-1", 0, 100)))
    yield engine
    engine.close()


def commit(engine: EmbeddedLedger, raw: bytes) -> None:
    assert engine.submit(raw) is None
    (answer,) = engine.commit().results
    assert answer.result.height, answer


def test_a_backup_of_a_running_ledger_goes_on_like_the_original(ledger: EmbeddedLedger, tmp_path: Path) -> None:
    report = backup_ledger(tmp_path / "ledger", tmp_path / "copy")
    assert (report.ok, report.height, report.block_id) == (True, 3, ledger.head.block_id)
    copy = found(tmp_path / "copy")
    for engine in (ledger, copy):
        commit(engine, batch(deliver(1, 60, ("solar-1", 0, 60))))
    assert copy.head == ledger.head
    copy.close()
    assert verify_ledger(tmp_path / "copy").ok


def test_commits_during_the_copy_are_neither_held_up_nor_in_it(
    ledger: EmbeddedLedger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = database_copy._copied

    def copied_while_the_engine_commits(source: sqlite3.Connection, target: Path) -> list[str]:
        commit(ledger, batch(deliver(1, 60, ("solar-1", 0, 60))))
        return copied(source, target)

    monkeypatch.setattr(database_copy, "_copied", copied_while_the_engine_commits)
    # Connections of the copy begin to read before it: the engine's commit falls into the middle.
    with database_copy.reading(tmp_path / "ledger" / FILE_NAME) as source:
        assert source.execute("SELECT max(height) FROM blocks").fetchone() == (3,)
        database_copy.copy_database(source, tmp_path / "copy.db")
    with database_copy.reading(tmp_path / "copy.db") as copy:
        assert copy.execute("SELECT max(height) FROM blocks").fetchone() == (3,)
    assert ledger.height == 4


def test_a_ledger_that_does_not_verify_gives_no_backup(tmp_path: Path) -> None:
    found(tmp_path / "ledger").close()
    with sqlite3.connect(tmp_path / "ledger" / FILE_NAME) as database:
        key = database.execute("SELECT key FROM state ORDER BY key LIMIT 1").fetchone()
        database.execute("DELETE FROM state WHERE key = ?", key)
    database.close()
    with pytest.raises(LedgerError, match="missing"):
        backup_ledger(tmp_path / "ledger", tmp_path / "copy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ledger"]


def test_a_backup_replaces_nothing_and_leaves_nothing_half(ledger: EmbeddedLedger, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(CopyError, match="exists already"):
        backup_ledger(tmp_path / "ledger", tmp_path / "taken")
    # What a killed backup left is no hindrance and no backup.
    (tmp_path / "copy.partial").mkdir()
    (tmp_path / "copy.partial" / FILE_NAME).write_bytes(b"half")
    assert backup_ledger(tmp_path / "ledger", tmp_path / "copy").ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "ledger", "taken"]
    assert [path.name for path in (tmp_path / "copy").iterdir()] == [FILE_NAME]


def test_a_directory_without_a_ledger_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="give the ledger's directory"):
        backup_ledger(tmp_path, tmp_path / "copy")


def test_an_original_that_cannot_be_read_is_named_and_not_the_disk(tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / FILE_NAME).write_bytes(b"no database" * 1_000)
    with pytest.raises(CopyError, match=rf"ledger/{FILE_NAME} cannot be read .*restore it from an earlier copy"):
        backup_ledger(tmp_path / "ledger", tmp_path / "copy")


def test_a_disk_that_refuses_is_said_plainly(ledger: EmbeddedLedger, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CopyError, match=r"file/copy cannot be written: .*Not a directory; check the path"):
        backup_ledger(tmp_path / "ledger", tmp_path / "file" / "copy")
    assert ledger.height == 3


def test_the_command_says_what_it_made(
    ledger: EmbeddedLedger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backup = ["ledger", "backup", str(tmp_path / "ledger"), "--out", str(tmp_path / "copy")]
    assert cli.main(backup) == 0
    assert f"height 3, head {ledger.head.block_id.hex()}: it verifies" in capsys.readouterr().out
    assert cli.main(backup) == 1
    assert "exists already" in capsys.readouterr().err
