"""A verification that was ended goes on, from what it has checked first; helpers only save time."""

import io
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
from support.ledger_world import GENESIS, INTERVAL_S, T0, batch, close, deliver, found, issue, take
from support.ledger_world import seal as sealed

from broker.commands.ledger_verify import ProgressLines
from broker.ledger import replay as replay_module
from broker.ledger import signatures
from broker.ledger.chain import block_id_of
from broker.ledger.signatures import Helpers
from broker.ledger.store import FILE_NAME, LedgerError, Store
from broker.ledger.verify import WORK_FILE_NAME, Progress, verify_ledger
from broker.protocol import envelope
from broker.protocol.keys import PublicKey
from broker.protocol.messages import Block

INTERVALS = 6


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger of two blocks to set it up and three for each interval."""
    path = tmp_path_factory.mktemp("sound")
    engine = found(path)
    for number in range(INTERVALS):
        start_s = T0 + number * INTERVAL_S
        for operations in (
            (issue("solar-1", 900, start_s), take("solar-1", 0, 900, start_s=start_s)),
            (deliver(number, 400, ("solar-1", 100, 500), start_s=start_s),),
            (close(start_s),),
        ):
            assert engine.submit(batch(*operations)) is None
            assert engine.commit().results[0].result.height
    engine.close()
    return path


@pytest.fixture
def copied(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ledgers, so what is written after thousands of rows is written after a few."""
    monkeypatch.setattr(replay_module, "_ROWS_PER_WRITE", 6)


def killed_at(path: Path, work: Path, height: int) -> None:
    def stop(progress: Progress) -> None:
        if progress.height == height:
            raise Killed

    with pytest.raises(Killed):
        verify_ledger(path, resume=work, progress=stop)


@pytest.mark.parametrize("height", [1, 2, 7, 13, 2 + 3 * INTERVALS])
def test_it_goes_on_from_the_last_mark(sound: Path, tmp_path: Path, height: int) -> None:
    work = tmp_path / "work"
    killed_at(sound, work, height)
    seen = []
    report = verify_ledger(sound, resume=work, progress=seen.append)
    whole = verify_ledger(sound)
    assert report.ok
    assert report.started_over is None
    assert 0 <= height - report.resumed_height < 4
    assert seen[0].height == report.resumed_height + 1
    for name in ("height", "block_id", "state_hash", "root", "batches", "operations", "rows"):
        assert getattr(report, name) == getattr(whole, name)


def test_a_later_run_checks_what_has_come_since(copied: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    assert verify_ledger(copied, resume=work).ok
    engine = found(copied)
    start_s = T0 + INTERVALS * INTERVAL_S
    engine.submit(batch(issue("solar-1", 5, start_s)))
    engine.commit()
    report = verify_ledger(copied, resume=work)
    assert report.ok
    assert (report.resumed_height, report.height) == (2 + 3 * INTERVALS, 3 + 3 * INTERVALS)
    engine.close()


def test_blocks_that_were_changed_since_are_found(copied: Path, tmp_path: Path) -> None:
    """The run before found them sound; that it starts over is what finds them out."""
    work = tmp_path / "work"
    killed_at(copied, work, 13)
    database = sqlite3.connect(copied / FILE_NAME)
    raw = bytearray(database.execute("SELECT raw FROM blocks WHERE height = 4").fetchone()[0])
    raw[-1] ^= 1
    with database:
        database.execute("UPDATE blocks SET raw = ? WHERE height = 4", (bytes(raw),))
    database.close()
    report = verify_ledger(copied, resume=work)
    assert report.started_over is not None
    assert "not the ones that were checked" in report.started_over
    assert report.resumed_height == 0
    assert "height 4" in report.errors[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("UPDATE state SET value = x'00' WHERE key = (SELECT min(key) FROM state)", "not the ones that were derived"),
        ("DELETE FROM state WHERE key = (SELECT max(key) FROM state)", "not the ones that were derived"),
        ("INSERT INTO state VALUES (x'8201', x'00')", "not the ones that were derived"),
        ("UPDATE batches SET height = height + 1", "not the ones that were derived"),
        ("UPDATE meta SET value = zeroblob(200) WHERE name = 'verified'", "mark is damaged"),
        ("DELETE FROM meta WHERE name = 'verified'", "mark is damaged"),
        ("DROP TABLE state", "cannot be read"),
    ],
)
def test_it_does_not_go_on_from_damaged_work(sound: Path, tmp_path: Path, change: str, reason: str) -> None:
    work = tmp_path / "work"
    killed_at(sound, work, 13)
    database = sqlite3.connect(work / WORK_FILE_NAME)
    with database:
        database.execute(change)
    database.close()
    report = verify_ledger(sound, resume=work)
    assert report.ok
    assert report.resumed_height == 0
    assert report.started_over is not None
    assert reason in report.started_over


def test_work_on_another_ledger_or_by_another_program_is_not_gone_on_from(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    killed_at(sound, work, 13)
    with monkeypatch.context() as patch:
        patch.setattr(replay_module, "version", lambda _: "0.0")
        report = verify_ledger(sound, resume=work)
    assert report.started_over is not None
    assert "of this program" in report.started_over
    other = tmp_path / "other"
    genesis = GENESIS.to_bytes()
    Store.create(work / "new", genesis, replay_module.first_mark(GENESIS).head).close()
    other.mkdir()
    changed = genesis.replace(b"EUR", b"CHF")
    Store.create(other / FILE_NAME, changed, replay_module.first_mark(type(GENESIS).from_bytes(changed)).head).close()
    report = verify_ledger(other, resume=work)
    assert report.ok
    assert report.started_over is not None
    assert "another ledger" in report.started_over


def test_two_runs_do_not_share_their_work(sound: Path, tmp_path: Path) -> None:
    def again(_: Progress) -> None:
        with pytest.raises(LedgerError, match="another verification"):
            verify_ledger(sound, resume=tmp_path / "work")

    assert verify_ledger(sound, resume=tmp_path / "work", progress=again).ok


# --- Helpers


def started(path: Path, count: int) -> Helpers:
    """Helpers that have all come up, whether ready or lost."""
    helpers = Helpers(path, count)
    for helper in helpers._starting:
        signatures.select.select([helper._process.stdout], [], [], 60)
    return helpers


@pytest.mark.parametrize("count", [1, 2])
def test_helpers_check_nearly_every_signature(sound: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """All but those of the first block, during which they are told where to begin, and of the head."""
    monkeypatch.setattr("broker.ledger.verify.Helpers", started)
    by_hand: list[bytes] = []
    check = PublicKey.verifies

    def counted(key: PublicKey, signature: bytes, message: bytes) -> bool:
        by_hand.append(signature)
        return check(key, signature, message)

    monkeypatch.setattr(PublicKey, "verifies", counted)
    assert verify_ledger(sound, helpers=0).ok
    alone, by_hand[:] = len(by_hand), []
    assert verify_ledger(sound, helpers=count).ok
    # A block, its batch and what that carries; a registration that introduces its sender is looked at twice.
    first_block, second_block = 2 + 9 + 1, 2 + 1 + 1
    signed_head = 1
    rest = second_block + 2 * 3 * INTERVALS + INTERVALS
    assert (alone, len(by_hand)) == (first_block + rest + signed_head, first_block + signed_head)


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("sender", ["node", "b1", "solar-1"])
def test_a_forged_signature_is_found_with_helpers_and_without(
    copied: Path, monkeypatch: pytest.MonkeyPatch, count: int, sender: str
) -> None:
    """One bit of the signature of a block, of a batch or of a reading, all else signed anew around it."""
    monkeypatch.setattr("broker.ledger.verify.Helpers", started)
    start_s = T0 + INTERVALS * INTERVAL_S

    def spoilt(raw: bytes) -> bytes:
        return raw[:-1] + bytes((raw[-1] ^ 1,))

    reading = issue("solar-1", 7, start_s)
    if sender == "solar-1":
        reading = type(reading)(spoilt(reading.statement))
    raw_batch = batch(reading)
    if sender == "b1":
        raw_batch = spoilt(raw_batch)
    database = sqlite3.connect(copied / FILE_NAME)
    height, raw = database.execute("SELECT height, raw FROM blocks ORDER BY height DESC LIMIT 1").fetchone()
    last = Block.from_payload(envelope.parse(raw).payload)
    values = {name: getattr(last, name) for name in Block.__slots__} | {"batches": (raw_batch,)}
    forged = sealed(Block(**values), "node")
    if sender == "node":
        forged = spoilt(forged)
    row = (forged, block_id_of(forged), height)
    with database:
        database.execute("UPDATE blocks SET raw = ?, block_id = ? WHERE height = ?", row)
    database.close()
    report = verify_ledger(copied, helpers=count)
    assert f"height {height}" in report.errors[0]
    assert "signature" in report.errors[0]


def test_lost_helpers_cost_time_and_nothing_else(sound: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that cannot start, and one that dies on the way."""
    monkeypatch.setattr("broker.ledger.verify.Helpers", lambda _, count: started(tmp_path / "nothing here", count))
    assert verify_ledger(sound, helpers=2).ok
    made: list[Helpers] = []

    def kept(path: Path, count: int) -> Helpers:
        made.append(started(path, count))
        return made[0]

    def kill(progress: Progress) -> None:
        if progress.height == 6:
            made[0]._working[0]._process.kill()
            made[0]._working[0]._process.wait(timeout=10)

    monkeypatch.setattr("broker.ledger.verify.Helpers", kept)
    assert verify_ledger(sound, helpers=2, progress=kill).ok


def test_a_helper_that_says_nothing_is_given_up(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signatures, "_ANSWER_WITHIN_S", 0.05)
    helpers = started(sound, 1)
    helper = helpers._starting[0]
    assert helper.is_ready()
    assert list(helper.tokens(1)) == []
    assert helper._lost
    helpers.close()


def test_helpers_are_gone_afterwards(sound: Path) -> None:
    helpers = started(sound, 2)
    pids = [helper._process.pid for helper in helpers._starting]
    helpers.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


# --- What is said on the way


def test_progress_is_said_every_two_seconds() -> None:
    times = iter([0.0, 0.5, 1.0, 2.5, 3.0, 4.5])
    out = io.StringIO()
    lines = ProgressLines(out, False, lambda: next(times))
    for operations in (100, 600, 2_100, 2_500):
        lines(Progress(operations // 100, 40, operations, 0))
    lines(Progress(40, 40, 4_000, 17))
    lines.end()
    assert out.getvalue() == (
        "height 21 of 40, 2100 operations, 1000 a second\nheight 40 of 40, 4000 operations; 17 rows compared\n"
    )


def test_on_a_terminal_one_line_changes() -> None:
    times = iter([0.0, 0.0, 4.0])
    out = io.StringIO()
    lines = ProgressLines(out, True, lambda: next(times))
    lines(Progress(0, 40, 0, 0))
    lines(Progress(10, 40, 400, 0))
    lines.end()
    assert out.getvalue() == "\r\x1b[Kheight 10 of 40, 400 operations, 100 a second\n"
