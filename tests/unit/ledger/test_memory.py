"""A longer ledger needs no more memory and no more work to start: what is kept in memory is bounded."""

import sqlite3
import tracemalloc
from pathlib import Path

import pytest
from support.ledger_world import GENESIS, INTERVAL_S, T0, batch, close, deliver, found, issue, key, take

from broker.ledger import store as store_module
from broker.ledger.embedded import EmbeddedLedger

SHORT, LONG = 6, 30
"""Intervals. The caches are made so small here that even the short one overflows them."""

DELIVERIES = 40


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "CACHED_ROWS", 64)


def grow(engine: EmbeddedLedger, from_interval: int, to_interval: int) -> None:
    for number in range(from_interval, to_interval):
        start_s = T0 + number * INTERVAL_S
        end_s = start_s + 2 * INTERVAL_S
        raws = [
            batch(issue("solar-1", 100, start_s), take("solar-1", 0, 100, start_s=start_s), not_after_s=end_s),
            batch(
                *[deliver(number * 100 + wh, 1, ("solar-1", wh, wh + 1), start_s=start_s) for wh in range(DELIVERIES)],
                not_after_s=end_s,
            ),
            batch(close(start_s), not_after_s=end_s),
        ]
        for raw in raws:
            assert engine.submit(raw) is None
        for answer in engine.commit().results:
            assert answer.result.height, answer


def of_length(path: Path, intervals: int) -> Path:
    engine = found(path)
    grow(engine, 0, intervals)
    engine.close()
    return path


def retained_bytes(path: Path, intervals: int) -> int:
    """What the engine keeps after it has been opened and has committed two intervals more."""
    engine = found(path)
    grow(engine, intervals, intervals + 1)  # What is loaded at first use is none of the ledger's.
    tracemalloc.start()
    again = EmbeddedLedger(path.parent / f"{path.name}-none", GENESIS, "node", key("node"))
    again.close()
    before = tracemalloc.get_traced_memory()[0]
    engine.close()
    engine = found(path)
    grow(engine, intervals + 1, intervals + 3)
    kept = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    store = engine._store
    assert len(store._young) <= 64
    assert len(store._old) <= 64
    assert engine.queued == 0
    engine.close()
    return kept


def test_an_engine_keeps_no_more_of_a_longer_ledger(tmp_path: Path) -> None:
    short = retained_bytes(of_length(tmp_path / "short", SHORT), SHORT)
    long = retained_bytes(of_length(tmp_path / "long", LONG), LONG)
    assert 0 < long < 1.25 * short + 65_536


def steps_to_start(path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many steps SQLite's machine takes while the engine is opened: rows that it reads, not time."""
    steps = 0
    connect = store_module._connect

    def counting(file: Path, durable: bool) -> sqlite3.Connection:
        connection = connect(file, durable)

        def counted() -> int:
            nonlocal steps
            steps += 1
            return 0

        connection.set_progress_handler(counted, 1)
        return connection

    with monkeypatch.context() as patched:
        patched.setattr(store_module, "_connect", counting)
        EmbeddedLedger(path, GENESIS, "node", key("node")).close()
    return steps


def test_a_start_reads_the_head_and_not_the_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = steps_to_start(of_length(tmp_path / "short", SHORT), monkeypatch)
    long = steps_to_start(of_length(tmp_path / "long", LONG), monkeypatch)
    assert 0 < long < 1.5 * short, "a tree may be a level deeper, but nothing is gone through"


def test_old_rows_are_found_again_past_the_cache(tmp_path: Path) -> None:
    engine = found(of_length(tmp_path / "ledger", LONG))
    assert engine.submit(batch(deliver(9_999, 5, ("solar-1", 60, 65)))) is None
    (answer,) = engine.commit().results
    assert answer.result.height == engine.height
    engine.close()
