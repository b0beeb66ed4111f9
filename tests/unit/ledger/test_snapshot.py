"""Snapshots: a ledger that goes on as the original would, and nothing that was altered gets in."""

import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.ledger_world import (
    GENESIS,
    INTERVAL_S,
    T0,
    batch,
    close,
    counting_bytes,
    deliver,
    found,
    genesis,
    issue,
    key,
    order,
    seal,
    sell,
    take,
)

from broker import cli
from broker.ledger import snapshot as snapshots
from broker.ledger.backup import backup_ledger
from broker.ledger.client import LedgerClient, LedgerFault
from broker.ledger.embedded import EmbeddedLedger
from broker.ledger.gateway import Gateway
from broker.ledger.inspect import blocks
from broker.ledger.rows_digest import bucket_digests, rows_digest
from broker.ledger.snapshot import (
    BASE_FILE_NAME,
    ChunkFault,
    Manifest,
    Restoring,
    SnapshotFault,
    SnapshotFile,
    restore_snapshot,
    take_snapshot,
)
from broker.ledger.state import ASSET, CLOCK, DEMAND, OWNED, SLICE, TOTAL, decode_key
from broker.ledger.store import FILE_NAME, LedgerError
from broker.ledger.verify import verify_ledger
from broker.protocol import cbor
from broker.protocol.messages import NamedKey
from broker.protocol.topics import Topics

STARTS = [T0 + number * INTERVAL_S for number in range(4)]


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedLedger]:
    """Some of everything, in chunks small enough that there are many."""
    monkeypatch.setattr(snapshots, "CHUNK_BYTES", 1_000)
    engine = found(tmp_path / "ledger")
    for device in ("solar-1", "wind-1"):
        commit(engine, *(batch(issue(device, 300, start), take(device, 0, 300, start_s=start)) for start in STARTS))
    commit(engine, *(batch(deliver(7, 90, ("solar-1", 0, 60), ("wind-1", 10, 40), start_s=start)) for start in STARTS))
    commit(engine, batch(sell("solar-1", 100, 150, seal(order(), "b2"))), batch(close()))
    yield engine
    engine.close()


def commit(engine: EmbeddedLedger, *raws: bytes) -> None:
    for raw in raws:
        assert engine.submit(raw) is None
    for answer in engine.commit().results:
        assert answer.result.height, answer


def stored(path: Path, statement: str) -> list[Any]:
    database = sqlite3.connect(path / FILE_NAME)
    rows = database.execute(statement).fetchall()
    database.close()
    return rows


def test_a_restored_ledger_goes_on_as_the_original(ledger: EmbeddedLedger, tmp_path: Path) -> None:
    taken = take_snapshot(tmp_path / "ledger", tmp_path / "file")
    assert len(taken.chunks) > 5
    restored_from = restore_snapshot(tmp_path / "file", tmp_path / "restored")
    assert restored_from == taken
    assert restored_from.head == ledger.head
    restored = found(tmp_path / "restored")
    assert restored.head == ledger.head
    later = [
        batch(deliver(8, 90, ("solar-1", 150, 200), start_s=T0)),
        batch(issue("solar-1", 5, STARTS[-1] + INTERVAL_S), take("solar-1", 0, 5, start_s=STARTS[-1] + INTERVAL_S)),
        batch(close(STARTS[1])),
    ]
    for raw in later:
        commit(ledger, raw)
        commit(restored, raw)
        assert restored.head == ledger.head
    restored.close()
    for table in ("state", "batches"):
        statement = f"SELECT * FROM {table} ORDER BY 1"
        assert stored(tmp_path / "restored", statement) == stored(tmp_path / "ledger", statement)
    heights = [line.height for line in blocks(tmp_path / "restored")]
    assert heights == list(range(taken.head.height, ledger.height + 1)), "the blocks before are lost"


def test_what_was_applied_before_the_snapshot_is_answered_as_before(ledger: EmbeddedLedger, tmp_path: Path) -> None:
    raw = batch(deliver(7, 90, ("solar-1", 0, 60), ("wind-1", 10, 40), start_s=STARTS[0]))
    take_snapshot(tmp_path / "ledger", tmp_path / "file")
    restore_snapshot(tmp_path / "file", tmp_path / "restored")
    restored = found(tmp_path / "restored")
    answers = []
    for engine in (ledger, restored):
        assert engine.submit(raw) is None
        (answer,) = engine.commit().results
        answers.append(answer)
    assert answers[0] == answers[1]
    assert restored.head == ledger.head
    restored.close()


def test_equal_ledgers_give_equal_manifests_and_the_digest_is_the_rows(ledger: EmbeddedLedger, tmp_path: Path) -> None:
    first = take_snapshot(tmp_path / "ledger", tmp_path / "file")
    restore_snapshot(tmp_path / "file", tmp_path / "restored", first.rows_digest)
    second = take_snapshot(tmp_path / "restored", tmp_path / "file-2")
    assert second.to_bytes() == first.to_bytes()
    rows = [(bytes(k), bytes(v)) for k, v in stored(tmp_path / "ledger", "SELECT key, value FROM state ORDER BY key")]
    assert first.rows_digest == rows_digest(bucket_digests(rows))
    assert first.rows == len(rows)
    assert max(chunk.length for chunk in first.chunks) < snapshots.MAX_CHUNK_BYTES
    assert Manifest.from_bytes(first.to_bytes()) == first


def test_a_snapshot_is_of_one_moment_while_the_engine_goes_on(
    ledger: EmbeddedLedger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = snapshots._chunks
    height = ledger.height

    def made_while_the_engine_commits(part: Any, items: Any) -> Any:
        commit(ledger, batch(deliver(int(part) + 20, 1, ("solar-1", 200 + part, 201 + part))))
        return made(part, items)

    monkeypatch.setattr(snapshots, "_chunks", made_while_the_engine_commits)
    manifest = take_snapshot(tmp_path / "ledger", tmp_path / "file")
    assert (manifest.head.height, ledger.height) == (height, height + 3)
    restore_snapshot(tmp_path / "file", tmp_path / "restored")


def test_an_empty_ledger_has_nothing_to_take(tmp_path: Path) -> None:
    found(tmp_path / "ledger", set_up=False).close()
    with pytest.raises(LedgerError, match="its genesis file is all there is"):
        take_snapshot(tmp_path / "ledger", tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["ledger"]


def test_a_snapshot_replaces_nothing(ledger: EmbeddedLedger, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(LedgerError, match="exists already"):
        take_snapshot(tmp_path / "ledger", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert not (tmp_path / "file.partial").exists()


def test_another_digest_than_the_expected_is_refused(ledger: EmbeddedLedger, tmp_path: Path) -> None:
    take_snapshot(tmp_path / "ledger", tmp_path / "file")
    with pytest.raises(LedgerError, match="not the expected one"):
        restore_snapshot(tmp_path / "file", tmp_path / "restored", bytes(32))
    assert not (tmp_path / "restored").exists()
    assert not (tmp_path / "restored.partial").exists()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_single_flipped_bit_is_found(ledger: EmbeddedLedger, tmp_path: Path, position: float, bit: int) -> None:
    file = tmp_path / "file"
    if not file.exists():
        take_snapshot(tmp_path / "ledger", file)
    raw = bytearray(file.read_bytes())
    raw[int(position * len(raw))] ^= 1 << bit
    (tmp_path / "flipped").write_bytes(raw)
    with pytest.raises(LedgerError):
        restore_snapshot(tmp_path / "flipped", tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


@pytest.mark.parametrize("kept", [0, 10, 100, -1, -30])
def test_a_file_that_is_cut_off_is_refused(ledger: EmbeddedLedger, tmp_path: Path, kept: int) -> None:
    take_snapshot(tmp_path / "ledger", tmp_path / "file")
    (tmp_path / "cut").write_bytes((tmp_path / "file").read_bytes()[:kept])
    with pytest.raises(LedgerError, match=r"cut off|no snapshot"):
        restore_snapshot(tmp_path / "cut", tmp_path / "restored")


# Somebody who alters rows and makes manifest and hashes anew, with all due care.


def altered(source: Path, out: Path, change: Callable[[list[tuple[bytes, bytes]]], None], **fields: Any) -> None:
    """The snapshot with changed rows, its hashes and the rows digest made to fit."""
    file = SnapshotFile(source)
    rows: list[tuple[bytes, bytes]] = []
    others: list[bytes] = []
    for index in range(len(file.manifest.chunks)):
        raw = file.chunk(index)
        part, *items = cbor.decode(raw, "chunk", len(raw))
        if part == snapshots.Part.ROWS:
            rows += zip(items[::2], items[1::2], strict=True)
        else:
            others.append(raw)
    change(rows)
    chunks = [cbor.encode([1, *[item for pair in rows for item in pair]]), *others]
    values: dict[str, Any] = {
        "genesis": file.manifest.genesis,
        "head": file.manifest.head,
        "rows_digest": rows_digest(bucket_digests(rows)),
        "rows": len(rows),
        "batches": file.manifest.batches,
        "chunks": tuple(snapshots.ChunkName(len(raw), sha256(raw).digest()) for raw in chunks),
    }
    manifest = Manifest(**(values | fields))
    tail = cbor.encode([manifest.to_bytes(), file.sealed_block, file.signed_head])
    file.close()
    out.write_bytes(
        snapshots.MAGIC
        + b"".join(chunks)
        + tail
        + sha256(tail).digest()
        + len(tail).to_bytes(8, "big")
        + snapshots.MAGIC
    )


def dropped(table: int) -> Callable[[list[tuple[bytes, bytes]]], None]:
    def change(rows: list[tuple[bytes, bytes]]) -> None:
        rows.remove(next(row for row in rows if decode_key(row[0])[0] == table))

    return change


def test_the_altering_itself_is_no_fault(ledger: EmbeddedLedger, tmp_path: Path) -> None:
    take_snapshot(tmp_path / "ledger", tmp_path / "file")
    altered(tmp_path / "file", tmp_path / "altered", lambda rows: None)
    restore_snapshot(tmp_path / "altered", tmp_path / "restored")


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        (ASSET, "books do not balance"),
        (SLICE, "books do not balance"),
        (TOTAL, "books do not balance"),
        (DEMAND, "books do not balance"),
        (OWNED, "is missing in the index"),
    ],
)
def test_books_that_do_not_balance_are_refused(ledger: EmbeddedLedger, tmp_path: Path, table: int, fault: str) -> None:
    take_snapshot(tmp_path / "ledger", tmp_path / "file")
    altered(tmp_path / "file", tmp_path / "altered", dropped(table))
    with pytest.raises(LedgerError, match=fault):
        restore_snapshot(tmp_path / "altered", tmp_path / "restored")


def test_what_only_the_digest_of_another_can_show(ledger: EmbeddedLedger, tmp_path: Path) -> None:
    """A missing clock upsets no sum: the limit of what one copy can be checked for, as the page says."""
    taken = take_snapshot(tmp_path / "ledger", tmp_path / "file")
    altered(tmp_path / "file", tmp_path / "altered", dropped(CLOCK))
    restore_snapshot(tmp_path / "altered", tmp_path / "restored")
    with pytest.raises(LedgerError, match="not the expected one"):
        restore_snapshot(tmp_path / "altered", tmp_path / "again", taken.rows_digest)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"rows_digest": bytes(32)}, "others than the rows digest"),
        ({"rows": 3}, "another number of rows"),
        ({"batches": 3}, "another number of rows or batches"),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(
    ledger: EmbeddedLedger, tmp_path: Path, fields: dict[str, Any], fault: str
) -> None:
    take_snapshot(tmp_path / "ledger", tmp_path / "file")
    altered(tmp_path / "file", tmp_path / "altered", lambda rows: None, **fields)
    with pytest.raises(LedgerError, match=fault):
        restore_snapshot(tmp_path / "altered", tmp_path / "restored")


def test_another_head_than_the_sealed_block_has_is_refused(ledger: EmbeddedLedger, tmp_path: Path) -> None:
    take_snapshot(tmp_path / "ledger", tmp_path / "file")
    for change, fault in (
        ({"block_id": bytes(32)}, "another one than its head names"),
        ({"state_hash": bytes(32)}, "does not agree with its last block"),
        ({"height": 5}, "does not agree with its last block"),
        ({"peaks": (*ledger.head.peaks[:-1], bytes(32))}, "does not agree with its last block"),
        ({"peaks": ledger.head.peaks[:-1]}, "full subtrees"),
    ):
        head = replace(ledger.head, **change)
        (tmp_path / "altered").unlink(missing_ok=True)
        altered(tmp_path / "file", tmp_path / "altered", lambda rows: None, head=head)
        with pytest.raises(LedgerError, match=fault):
            restore_snapshot(tmp_path / "altered", tmp_path / "restored")


def test_a_block_that_no_validator_sealed_is_refused(ledger: EmbeddedLedger, tmp_path: Path) -> None:
    take_snapshot(tmp_path / "ledger", tmp_path / "file")
    others = genesis(validators=(NamedKey("node", key("stranger").public.cose_key),))
    altered(tmp_path / "file", tmp_path / "altered", lambda rows: None, genesis=others)
    with pytest.raises(LedgerError, match="not registered"):
        restore_snapshot(tmp_path / "altered", tmp_path / "restored")


def test_chunks_come_in_order_and_whole(ledger: EmbeddedLedger, tmp_path: Path) -> None:
    take_snapshot(tmp_path / "ledger", tmp_path / "file")
    file = SnapshotFile(tmp_path / "file")
    restoring = Restoring(file.manifest, tmp_path / "new.sqlite3")
    with pytest.raises(ChunkFault):
        restoring.add(file.chunk(1))
    with pytest.raises(ChunkFault):
        restoring.add(file.chunk(0)[:-1])
    restoring.add(file.chunk(0))
    with pytest.raises(SnapshotFault, match="only 1 of its"):
        restoring.finish(lambda payload, _validators: (payload, None))
    restoring.abandon()
    (tmp_path / "half").mkdir()
    (tmp_path / "new.sqlite3").rename(tmp_path / "half" / FILE_NAME)
    with pytest.raises(LedgerError):
        EmbeddedLedger(tmp_path / "half", GENESIS, "node", key("node"))
    file.close()


def test_a_client_from_before_the_snapshot_is_told_and_does_not_ask_for_ever(
    ledger: EmbeddedLedger, tmp_path: Path
) -> None:
    take_snapshot(tmp_path / "ledger", tmp_path / "file")
    restore_snapshot(tmp_path / "file", tmp_path / "restored")
    restored = found(tmp_path / "restored")
    gateway = Gateway(restored, Topics(), "node", key("node"))
    client = LedgerClient(GENESIS, "b1", key("b1"), counting_bytes(), load_holdings=False)
    client.on_connect()
    for query in client.tick(0.0):
        (page,) = gateway.on_message(query)
        client.on_message("result", page.payload)
    (fault,) = client.events()
    assert isinstance(fault, LedgerFault)
    assert f"no blocks before {restored.height}" in fault.reason
    assert client.tick(100.0) == []
    gateway.close()
    restored.close()


def test_a_client_that_begins_now_takes_a_restored_ledger_for_any_other(ledger: EmbeddedLedger, tmp_path: Path) -> None:
    take_snapshot(tmp_path / "ledger", tmp_path / "file")
    restore_snapshot(tmp_path / "file", tmp_path / "restored")
    restored = found(tmp_path / "restored")
    gateway = Gateway(restored, Topics(), "node", key("node"))
    client = LedgerClient(GENESIS, "b1", key("b1"), counting_bytes())
    client.on_connect()
    while not client.loaded:
        for query in client.tick(0.0):
            for page in gateway.on_message(query):
                client.on_message("result", page.payload)
    assert client.height == restored.height
    gateway.close()
    restored.close()


# Verifying a ledger that began with a snapshot


def restored_and_gone_on(ledger: EmbeddedLedger, tmp_path: Path) -> Path:
    take_snapshot(tmp_path / "ledger", tmp_path / "file")
    restore_snapshot(tmp_path / "file", tmp_path / "restored")
    restored = found(tmp_path / "restored")
    commit(restored, batch(deliver(8, 90, ("solar-1", 150, 200), start_s=T0)))
    commit(restored, batch(close(STARTS[1])))
    restored.close()
    return tmp_path / "restored"


def test_a_restored_ledger_is_verified_from_the_snapshot_on_and_says_so(
    ledger: EmbeddedLedger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = restored_and_gone_on(ledger, tmp_path)
    report = verify_ledger(path)
    assert report.errors == ()
    assert (report.base_height, report.height, report.batches) == (ledger.height, ledger.height + 2, 2)
    assert cli.main(["ledger", "verify", str(path)]) == 0
    said = capsys.readouterr()
    assert f"began with a snapshot of height {ledger.height} and was verified from there on" in said.err
    assert verify_ledger(tmp_path / "ledger").base_height == 0


@pytest.mark.parametrize(
    ("statement", "fault"),
    [
        ("DELETE FROM state WHERE key = (SELECT max(key) FROM state)", "missing"),
        ("UPDATE meta SET value = zeroblob(32) WHERE name = 'base'", "another one than is on record"),
        ("DELETE FROM nodes WHERE first = (SELECT min(first) FROM nodes)", "Merkle nodes"),
        ("DELETE FROM blocks WHERE height = (SELECT min(height) FROM blocks)", "block"),
        ("DELETE FROM blocks WHERE height = (SELECT min(height) + 1 FROM blocks)", "is missing"),
        ("INSERT INTO blocks SELECT 1, block_id, raw FROM blocks LIMIT 1", "block"),
        ("DELETE FROM batches WHERE batch_id = (SELECT max(batch_id) FROM batches)", "batch"),
        ("DELETE FROM meta WHERE name = 'base'", "is missing"),
    ],
)
def test_what_is_altered_in_a_restored_ledger_is_found(
    ledger: EmbeddedLedger, tmp_path: Path, statement: str, fault: str
) -> None:
    path = restored_and_gone_on(ledger, tmp_path)
    with sqlite3.connect(path / FILE_NAME) as database:
        assert database.execute(statement).rowcount == 1
    database.close()
    assert fault in "\n".join(verify_ledger(path).errors)


def test_without_the_snapshot_a_restored_ledger_cannot_be_verified(ledger: EmbeddedLedger, tmp_path: Path) -> None:
    path = restored_and_gone_on(ledger, tmp_path)
    (path / BASE_FILE_NAME).unlink()
    (error,) = verify_ledger(path).errors
    assert "the snapshot that it began with" in error


def test_a_backup_of_a_restored_ledger_has_its_snapshot(ledger: EmbeddedLedger, tmp_path: Path) -> None:
    path = restored_and_gone_on(ledger, tmp_path)
    assert backup_ledger(path, tmp_path / "copy").ok
    assert (tmp_path / "copy" / BASE_FILE_NAME).read_bytes() == (path / BASE_FILE_NAME).read_bytes()


def test_the_commands_take_and_restore(
    ledger: EmbeddedLedger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["ledger", "snapshot", str(tmp_path / "ledger"), "--out", str(tmp_path / "file")]) == 0
    digest = capsys.readouterr().out.rsplit("rows digest ", 1)[1].strip()
    restore = ["ledger", "restore", str(tmp_path / "file"), "--path", str(tmp_path / "restored"), "--rows-digest"]
    assert cli.main([*restore, "nonsense"]) == 2
    assert cli.main([*restore, digest[2:] + "00"]) == 1
    assert cli.main([*restore, digest]) == 0
    assert f"The blocks before height {ledger.height} are not in it" in capsys.readouterr().out
    assert cli.main([*restore, digest]) == 1, "a directory is never replaced"
