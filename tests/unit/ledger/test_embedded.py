"""The embedded engine: batches in, blocks and answers out, and the same again after a restart."""

import os
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from support.ledger_world import (
    GENESIS,
    INTERVAL_S,
    SET_UP,
    T0,
    admit,
    batch,
    close,
    deliver,
    found,
    genesis,
    issue,
    key,
    mandate,
    register,
    seal,
    take,
)

from broker.ledger import embedded, holdings_view, limits
from broker.ledger.chain import genesis_hash
from broker.ledger.embedded import EmbeddedLedger
from broker.ledger.engine import Committed
from broker.ledger.holding import Holding, decode_holding
from broker.ledger.merkle import leaf_hash, root_of
from broker.ledger.operations import Void
from broker.ledger.store import FILE_NAME, LedgerError
from broker.ledger.verify import verify_ledger
from broker.protocol import envelope
from broker.protocol.envelope import Signer
from broker.protocol.errors import BadSignature, MalformedMessage, UnknownKey
from broker.protocol.messages import Batch, Block, Checkpoint, Result, ResultStatus
from broker.protocol.sources import Source


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[EmbeddedLedger]:
    engine = found(tmp_path / "ledger")
    yield engine
    engine.close()


def node(key_id: bytes) -> Signer | None:
    return Signer("node", key("node").public)


def opened(raw: bytes) -> envelope.Opened:
    return envelope.open_envelope(raw, GENESIS.ledger, node)


def committed(ledger: EmbeddedLedger, *raws: bytes) -> list[Result]:
    for raw in raws:
        assert ledger.submit(raw) is None
    return [answer.result for answer in ledger.commit().results]


def test_blocks_are_chained_and_signed_over_all_operations(ledger: EmbeddedLedger) -> None:
    committed(ledger, batch(issue("solar-1", 100), take("solar-1", 0, 100)))
    previous = genesis_hash(GENESIS)
    leaves = []
    for height, raw in enumerate(ledger.blocks(1), start=1):
        message = opened(raw).message
        assert isinstance(message, Block)
        assert (message.height, message.previous) == (height, previous)
        previous = sha256(envelope.parse(raw).payload).digest()
        for raw_batch in message.batches:
            leaves += [leaf_hash(item) for item in Batch.from_payload(envelope.parse(raw_batch).payload).operations]
        assert (message.tree_size, message.root) == (len(leaves), root_of(leaves))
    assert height == ledger.height == 3
    checkpoint = opened(ledger.checkpoint()).message
    assert checkpoint == Checkpoint(3, previous, len(leaves), root_of(leaves), ledger.head.state_hash)


def test_an_empty_ledger_has_a_checkpoint(tmp_path: Path) -> None:
    engine = found(tmp_path, set_up=False)
    message = opened(engine.checkpoint()).message
    assert isinstance(message, Checkpoint)
    assert (message.height, message.block_id) == (0, genesis_hash(GENESIS))
    engine.close()


def test_many_batches_make_one_block_and_each_its_answer(ledger: EmbeddedLedger) -> None:
    good, bad, other = batch(issue("solar-1", 100)), batch(issue("solar-1", 99)), batch(issue("wind-1", 5))
    results = committed(ledger, good, bad, other, good)
    assert [result.status for result in results] == [
        ResultStatus.COMMITTED,
        ResultStatus.REFUSED,
        ResultStatus.COMMITTED,
        ResultStatus.COMMITTED,
    ]
    assert {result.height for result in results} == {3, None}
    assert results[1].operation == 0
    assert results[1].reason is not None
    assert results[1].reason.startswith("issued_before: ")
    assert results[0] == results[3]


def test_a_batch_that_was_applied_gets_the_same_answer_again(ledger: EmbeddedLedger) -> None:
    raw = batch(issue("solar-1", 100), close(), not_after_s=T0 + INTERVAL_S)
    first = committed(ledger, raw)
    committed(ledger, batch(issue("wind-1", 5)))
    head = ledger.head
    assert committed(ledger, raw) == first, "also when its not-after is past"
    assert ledger.head == head


def test_a_refusal_is_not_sticky(ledger: EmbeddedLedger) -> None:
    raw = batch(take("solar-1", 0, 100))
    assert committed(ledger, raw)[0].status is ResultStatus.REFUSED
    assert committed(ledger, batch(issue("solar-1", 100)), raw)[1].status is ResultStatus.COMMITTED


def test_a_refused_batch_leaves_no_block(ledger: EmbeddedLedger) -> None:
    head = ledger.head
    committed(ledger, batch(take("solar-1", 0, 100)))
    assert ledger.head == head
    assert ledger.commit() == Committed((), ())


def test_blocks_are_cut_at_their_limit(ledger: EmbeddedLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "MAX_BLOCK_BATCHES", 2)
    results = committed(ledger, *(batch(Void(bytes([i]) * 16)) for i in range(5)))
    assert [result.height for result in results] == [3, 3, 4, 4, 5]
    raws = [batch(Void(bytes([i]) * 16)) for i in range(5, 10)]
    monkeypatch.setattr(embedded, "MAX_BLOCK_BYTES", limits.BLOCK_HEAD_BYTES + 2 * (len(raws[0]) + 5))
    assert [result.height for result in committed(ledger, *raws)] == [6, 6, 7, 7, 8]
    assert verify_ledger(ledger_path(ledger)).ok


def ledger_path(ledger: EmbeddedLedger) -> Path:
    return ledger._path


def test_a_full_queue_says_come_again(ledger: EmbeddedLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "MAX_QUEUED_BATCHES", 1)
    first, second = batch(Void(b"1" * 16)), batch(Void(b"2" * 16))
    assert ledger.submit(first) is None
    answer = ledger.submit(second)
    assert answer is not None
    assert answer.client == "b1"
    assert answer.result.status is ResultStatus.REFUSED
    assert answer.result.reason is not None
    assert answer.result.reason.startswith("busy: ")
    ledger.commit()
    assert committed(ledger, second)[0].status is ResultStatus.COMMITTED
    monkeypatch.setattr(embedded, "MAX_QUEUED_BYTES", len(first) - 1)
    assert ledger.submit(batch(Void(b"3" * 16))) is not None


def test_nothing_unsigned_is_answered(ledger: EmbeddedLedger) -> None:
    raw = batch(Void(b"o" * 16))
    with pytest.raises(BadSignature):
        ledger.submit(raw[:-1] + bytes((raw[-1] ^ 1,)))
    with pytest.raises(UnknownKey):
        ledger.submit(batch(Void(b"o" * 16), by="b9"))
    with pytest.raises(MalformedMessage):
        ledger.submit(b"\xd2\x84")


def test_a_strangers_large_batch_is_not_looked_into(tmp_path: Path) -> None:
    engine = found(tmp_path, set_up=False)
    introduction = register("b1")
    with pytest.raises(UnknownKey):
        engine.submit(batch(introduction, *[introduction] * 40))
    assert engine.submit(batch(introduction)) is None
    engine.close()


def test_a_malformed_batch_of_a_broker_is_answered(ledger: EmbeddedLedger) -> None:
    answer = ledger.submit(seal(Batch(T0, (b"\x82\x01",)), "b1"))
    assert answer is not None
    assert answer.result.status is ResultStatus.REFUSED
    assert answer.result.operation == 0


def test_a_restart_goes_on_where_it_stopped(tmp_path: Path) -> None:
    engine = found(tmp_path)
    committed(engine, batch(issue("solar-1", 100), take("solar-1", 0, 100)))
    head = engine.head
    engine.submit(batch(issue("wind-1", 1)))
    engine.close()
    engine = found(tmp_path)
    assert engine.head == head, "what was queued and not committed is gone"
    committed(engine, batch(deliver(1, 10, ("solar-1", 0, 10))))
    engine.close()
    together = found(tmp_path / "other")
    committed(
        together,
        batch(issue("solar-1", 100), take("solar-1", 0, 100)),
        batch(deliver(1, 10, ("solar-1", 0, 10))),
    )
    assert together.head.state_hash == found(tmp_path).head.state_hash
    assert verify_ledger(tmp_path).ok


def test_holdings_come_in_pages_with_source_and_interval(
    ledger: EmbeddedLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = [T0 + number * INTERVAL_S for number in range(5)]
    committed(
        ledger,
        *(
            batch(issue(device, 100, start), take(device, 0, 60, start_s=start))
            for start in starts
            for device in ("wind-1", "solar-1")
        ),
    )
    committed(ledger, batch(deliver(1, 20, ("solar-1", 10, 30))))
    monkeypatch.setattr(holdings_view, "MAX_HOLDINGS_ON_PAGE", 3)
    view = ledger.open_view()
    found_holdings: list[Holding] = []
    cursor = None
    pages = 0
    while True:
        page = view.page("b1", cursor)
        assert page.height == ledger.height
        assert len(page.entries) <= 3
        found_holdings += [decode_holding(entry) for entry in page.entries]
        pages += 1
        if page.next_cursor is None:
            break
        cursor = page.next_cursor
    assert pages == 4
    assert len(found_holdings) == 11, "an asset in two slices is two holdings"
    assert [(h.from_wh, h.to_wh) for h in found_holdings if h.asset.start_s == T0 and h.source is Source.SOLAR] == [
        (0, 10),
        (30, 60),
    ]
    assert sum(h.to_wh - h.from_wh for h in found_holdings) == 10 * 60 - 20
    assert {h.area for h in found_holdings} == {"north"}
    monkeypatch.undo()
    assert [decode_holding(entry) for entry in view.page("b1").entries] == found_holdings
    assert len(view.page("alice").entries) == 10
    assert view.page("b2").entries == ()
    with pytest.raises(MalformedMessage):
        view.page("b1", b"\x01")
    committed(ledger, batch(deliver(2, 30, ("solar-1", 30, 60))))
    assert len(view.page("b1").entries) == 11, "a view stays as it was"
    view.close()
    view = ledger.open_view()
    assert len(view.page("b1").entries) == 10
    view.close()


def test_rows_that_left_the_cache_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.ledger.store.CACHED_ROWS", 2)
    engine = found(tmp_path)
    for number in range(20):
        start = T0 + number * INTERVAL_S
        committed(engine, batch(issue("solar-1", 100, start), take("solar-1", 0, 100, start_s=start)))
    for number in reversed(range(20)):
        start = T0 + number * INTERVAL_S
        deliveries = [deliver(i, 30, ("solar-1", 10 * i, 10 * i + 10), start_s=start) for i in range(3)]
        results = committed(engine, batch(*deliveries), batch(deliver(0, 30, ("solar-1", 50, 71), start_s=start)))
        assert [result.status for result in results] == [ResultStatus.COMMITTED, ResultStatus.REFUSED]
    engine.close()
    assert verify_ledger(tmp_path).ok


def test_one_process_at_a_time(ledger: EmbeddedLedger) -> None:
    with pytest.raises(LedgerError, match="in use by another process"):
        found(ledger_path(ledger))


def test_another_genesis_or_validator_is_refused(tmp_path: Path) -> None:
    found(tmp_path).close()
    with pytest.raises(LedgerError, match="another genesis"):
        EmbeddedLedger(tmp_path, genesis(currency="CHF"), "node", key("node"))
    with pytest.raises(LedgerError, match="no validator"):
        EmbeddedLedger(tmp_path, GENESIS, "node", key("b1"))
    found(tmp_path).close()


def test_a_file_that_was_being_made_when_the_power_went_is_made_again(tmp_path: Path) -> None:
    tmp_path.joinpath(FILE_NAME).touch()
    engine = found(tmp_path)
    assert engine.height == len(SET_UP)
    engine.close()


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        ("DELETE FROM blocks WHERE height = 2", "does not agree with block 1"),
        ("DELETE FROM blocks", "there are no blocks"),
        ("UPDATE blocks SET block_id = zeroblob(32) WHERE height = 2", "does not agree with block 2"),
        ("UPDATE blocks SET raw = zeroblob(9) WHERE height = 2", "head does not hold"),
        ("UPDATE meta SET value = zeroblob(9) WHERE name = 'head'", "head does not hold"),
        ("DELETE FROM meta WHERE name = 'head'", "head does not hold"),
        ("UPDATE blocks SET height = 9 WHERE height = 2", "does not agree with block 9"),
        (
            "UPDATE meta SET value = x'63' WHERE name = 'format'",
            "it has format 99, .* reads format 2 only; use",
        ),
        ("DELETE FROM meta WHERE name = 'format'", "it has no format that is known here"),
        ("UPDATE meta SET value = x'a0' WHERE name = 'genesis'", "founded on another genesis"),
        ("DELETE FROM nodes", "Merkle node .* is not stored"),
        ("DELETE FROM nodes WHERE first > 0", "Merkle node .* is not stored"),
        ("UPDATE nodes SET hashes = zeroblob(length(hashes)) WHERE first > 0", "Merkle nodes up to leaf"),
        ("UPDATE nodes SET hashes = zeroblob(length(hashes)) WHERE first = 0", "Merkle nodes up to leaf"),
        ("UPDATE nodes SET hashes = x'00'", "Merkle node .* is not stored"),
        ("DROP TABLE nodes", "restore the ledger"),
        ("DROP TABLE blocks", "restore the ledger"),
    ],
)
def test_a_head_that_does_not_agree_is_refused_at_start(tmp_path: Path, damage: str, complaint: str) -> None:
    found(tmp_path).close()
    with sqlite3.connect(tmp_path / FILE_NAME) as database:
        database.execute(damage)
    database.close()
    with pytest.raises(LedgerError, match=complaint):
        found(tmp_path)
    with pytest.raises(LedgerError, match=complaint):
        found(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"height": 3},
        {"block_id": b"x" * 32},
        {"state_hash": b"x" * 32},
        {"tree_size": 9, "peaks": (b"x" * 32, b"y" * 32)},
        {"peaks": (b"x" * 32, b"y" * 32)},
    ],
)
def test_a_head_with_other_content_is_refused_at_start(tmp_path: Path, changes: dict[str, Any]) -> None:
    engine = found(tmp_path)
    forged = replace(engine.head, **changes)
    engine.close()
    with sqlite3.connect(tmp_path / FILE_NAME) as database:
        database.execute("UPDATE meta SET value = ? WHERE name = 'head'", (forged.to_bytes(),))
    database.close()
    with pytest.raises(LedgerError, match="the head does not agree with block 2"):
        found(tmp_path)


@pytest.mark.parametrize(
    ("by", "complaint"), [("b2", "not registered"), ("node", "the signature"), ("other", "not registered")]
)
def test_a_last_block_that_no_validator_signed_is_refused_at_start(tmp_path: Path, by: str, complaint: str) -> None:
    engine = found(tmp_path)
    (raw,) = engine.blocks(2)
    engine.close()
    forged = envelope.seal(Block.from_payload(envelope.parse(raw).payload), key(by), GENESIS.ledger, by)
    if by == "node":
        forged = forged[:-1] + bytes((forged[-1] ^ 1,))
    with sqlite3.connect(tmp_path / FILE_NAME) as database:
        database.execute("UPDATE blocks SET raw = ? WHERE height = 2", (forged,))
    database.close()
    with pytest.raises(LedgerError, match=complaint):
        found(tmp_path)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    tmp_path.joinpath(FILE_NAME).write_bytes(os.urandom(8_192))
    with pytest.raises(LedgerError, match="restore the ledger"):
        found(tmp_path)


def test_a_disk_that_refuses_loses_nothing(ledger: EmbeddedLedger) -> None:
    raw = batch(issue("solar-1", 100))
    assert ledger.submit(raw) is None
    head = ledger.head
    pages = ledger._store._db.execute("PRAGMA page_count").fetchone()[0]
    ledger._store._db.execute(f"PRAGMA max_page_count = {pages}")
    ledger.submit(batch(*(admit(f"device-{i}") for i in range(60))))
    with pytest.raises(LedgerError, match="free disk space"):
        ledger.commit()
    assert (ledger.head, ledger.queued) == (head, 2)
    ledger._store._db.execute("PRAGMA max_page_count = 1000000")
    answers = ledger.commit().results
    assert {answer.result.status for answer in answers} == {ResultStatus.COMMITTED}
    assert verify_ledger(ledger_path(ledger)).ok


def test_registered_parties_are_found_by_key(ledger: EmbeddedLedger) -> None:
    assert ledger.signer(key("b1").public.key_id) == Signer("b1", key("b1").public)
    assert ledger.signer(key("solar-1").public.key_id) is None, "a meter is no party"
    assert ledger.signer(key("nobody").public.key_id) is None
    committed(ledger, batch(register("b3"), mandate("solar-1")))
    assert ledger.signer(key("b3").public.key_id) is not None
