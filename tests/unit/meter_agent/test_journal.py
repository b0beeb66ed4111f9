"""The journal: an interval is there whole or not at all, wherever the power goes off; and it stays bounded."""

import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from broker.protocol.messages import Quality
from meter_agent.intervals import Anchor, Boundary, MeterState, SealedInterval
from meter_agent.journal import (
    FILE_NAME,
    MAX_EVENTS,
    MAX_NOTES,
    Journal,
    JournalError,
    JournalView,
    OutboxRow,
)
from meter_agent.outbox import OutboxState

T0 = 1_700_000_000 // 1800 * 1800


def _state(number: int) -> MeterState:
    at_s = T0 + 1800 * number
    return MeterState(
        Anchor(at_s * 1_000_000 + 5, None, number, number + 7, "serial"),
        Boundary(at_s, number * 100, Quality.INTERPOLATED, at_s - 3, at_s + 4, -number),
        number,
    )


def _row(number: int) -> OutboxRow:
    start_s = T0 + 1800 * (number - 1)
    interval = SealedInterval(start_s, start_s + 1800, 100, Quality.MEASURED, None)
    return OutboxRow(interval, 0, number.to_bytes(32, "big"), f"message {number}".encode())


def _seal(journal: Journal, number: int, meter: str = "house") -> None:
    journal.seal(meter, _state(number), [_row(number)])


def test_what_was_sealed_is_there_after_reopening(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 10)
    assert journal.load("house") == MeterState()
    _seal(journal, 1)
    journal.close()
    journal = Journal(tmp_path, 10)
    assert journal.load("house") == _state(1)
    assert [m.message for m in journal.waiting(["house"], 10)] == [b"message 1"]
    assert journal.waiting_count("house") == 1
    journal.close()


def test_a_state_without_boundary_is_kept_too(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 10)
    state = MeterState(Anchor(1, None, 2, 2, None))
    journal.seal("house", state, [])
    assert journal.load("house") == state
    journal.close()


def test_messages_wait_oldest_first_until_their_first_answer(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 10)
    for number in (2, 1, 3):
        _seal(journal, number)
    journal.note_answer("house", T0, 0, OutboxState.CONFLICT, b"first receipt")
    journal.note_answer("house", T0, 0, OutboxState.ACCEPTED, b"second receipt")
    assert [m.message for m in journal.waiting(["house"], 10)] == [b"message 2", b"message 3"]
    assert [m.message for m in journal.waiting(["house"], 1)] == [b"message 2"]
    journal.close()
    view = JournalView(tmp_path)
    assert [(r.state, r.receipt) for r in view.intervals("house", 10)] == [
        (OutboxState.WAITING, None),
        (OutboxState.WAITING, None),
        (OutboxState.CONFLICT, b"first receipt"),
    ]
    view.close()


def test_messages_of_a_meter_that_is_no_longer_configured_do_not_stand_in_the_way(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 10)
    _seal(journal, 1, "gone")
    _seal(journal, 2, "house")
    assert [m.message for m in journal.waiting(["house", "roof"], 1)] == [b"message 2"]
    journal.close()


def test_the_same_interval_is_never_stored_twice(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 10)
    _seal(journal, 1)
    with pytest.raises(JournalError, match="UNIQUE"):
        journal.seal("house", _state(2), [_row(1)])
    # Nothing of the refused transaction remains, and the journal goes on working.
    assert journal.load("house") == _state(1)
    _seal(journal, 2)
    journal.close()


def test_notes_are_written_with_the_next_interval_and_no_transaction_of_their_own(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 10)
    _seal(journal, 1)
    view = JournalView(tmp_path)
    journal.note_answer("house", T0, 0, OutboxState.ACCEPTED, b"receipt")
    journal.note_delivery("house", T0, 0, b"open")
    journal.note_delivery("house", T0, 0, b"final")
    journal.note_event(T0, "house", "fault", "text")
    assert (view.intervals("house", 1)[0].state, view.deliveries("house", 9)) == (OutboxState.WAITING, [])
    _seal(journal, 2)
    assert journal.notes == 0
    assert view.intervals("house", 9)[1].receipt == b"receipt"
    assert view.deliveries("house", 9) == [b"final"]
    assert view.events(9) == [(T0, "house", "fault", "text")]
    view.close()
    journal.close()


def test_notes_in_memory_are_bounded(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 10)
    for number in range(MAX_NOTES):
        journal.note_event(number, "house", "fault", "text")
    assert journal.notes == 0
    journal.close()


def test_accepted_intervals_are_forgotten_after_their_days_refused_and_waiting_ones_are_not(tmp_path: Path) -> None:
    journal = Journal(tmp_path, keep_days=1)
    for number in (1, 2, 3):
        _seal(journal, number)
    journal.note_answer("house", T0, 0, OutboxState.ACCEPTED, b"r")
    journal.note_answer("house", T0 + 1800, 0, OutboxState.REFUSED, b"r")
    journal.note_delivery("house", T0, 0, b"d")
    journal.flush()
    _seal(journal, 100)
    view = JournalView(tmp_path)
    assert [r.start_s for r in view.intervals("house", 9)] == [T0 + 1800 * 99, T0 + 3600, T0 + 1800]
    assert view.deliveries("house", 9) == []
    _seal(journal, 600)
    assert [r.state for r in view.intervals("house", 9)] == [OutboxState.WAITING] * 3
    view.close()
    journal.close()


def test_events_are_bounded(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 10)
    for number in range(MAX_EVENTS + 2 * MAX_NOTES):
        journal.note_event(number, "house", "fault", "text")
    journal.close()
    view = JournalView(tmp_path)
    assert len(view.events(10**6)) == MAX_EVENTS
    view.close()


def test_a_second_agent_on_the_same_folder_is_told(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 10)
    with pytest.raises(JournalError, match="another agent runs with this data_dir"):
        Journal(tmp_path, 10)
    journal.close()
    Journal(tmp_path, 10).close()


def test_a_file_that_is_no_journal_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"x" * 5000)
    with pytest.raises(JournalError, match=r"journal\.sqlite: file is not a database"):
        Journal(tmp_path, 10)
    with pytest.raises(JournalError, match="has the agent run"):
        JournalView(tmp_path / "nowhere")


def test_a_journal_of_a_later_agent_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path, 10).close()
    with sqlite3.connect(tmp_path / FILE_NAME) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(JournalError, match=r"is of schema 99, .* run the version that wrote it"):
        Journal(tmp_path, 10)
    with pytest.raises(JournalError, match=r"is of schema 99, .* run the version that wrote it"):
        JournalView(tmp_path)


def test_a_journal_of_the_first_schema_is_carried_over(tmp_path: Path) -> None:
    old = """
        CREATE TABLE meter (
            name TEXT PRIMARY KEY, anchor_time_us INTEGER NOT NULL, anchor_raw_mwh INTEGER NOT NULL,
            anchor_total_mwh INTEGER NOT NULL, serial_number TEXT, boundary_at_s INTEGER, boundary_total_wh INTEGER,
            boundary_quality INTEGER, boundary_before_s INTEGER, boundary_after_s INTEGER,
            sealed_until_s INTEGER NOT NULL
        ) WITHOUT ROWID;
        INSERT INTO meter VALUES ('counting', 5, 6000, 7000, 'a', 1800, 6, 1, 1799, 1801, 1800);
        INSERT INTO meter VALUES ('anew', 5, 6000, 7000, NULL, NULL, NULL, NULL, NULL, NULL, 1800);
        INSERT INTO meter VALUES ('new', 5, 6000, 7000, NULL, NULL, NULL, NULL, NULL, NULL, 0);
        PRAGMA user_version = 1;
    """
    Journal(tmp_path, 10).close()
    with sqlite3.connect(tmp_path / FILE_NAME) as database:
        database.executescript("DROP TABLE meter;" + old)
    database.close()
    journal = Journal(tmp_path, 10)
    anchor = Anchor(5, None, 6000, 7000, None)
    assert journal.load("counting") == MeterState(
        replace(anchor, serial_number="a"), Boundary(1800, 6, Quality.INTERPOLATED, 1799, 1801)
    )
    assert journal.load("anew") == MeterState(anchor, Boundary(1800, 7, Quality.ESTIMATED, 1800, 1800))
    assert journal.load("new") == MeterState(anchor)
    _seal(journal, 1)
    assert journal.load("house") == _state(1)
    journal.close()


def test_every_commit_is_synced_before_it_counts(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 10)
    assert journal._db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert journal._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    journal.close()


# Seals four intervals and kills itself before the Nth SQL statement; prints each interval once it is committed.
_CRASHER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_journal as t
from meter_agent.journal import Journal
from meter_agent.outbox import OutboxState
left = int(sys.argv[2])
journal = Journal(Path(sys.argv[1]), 10)
def count(_statement):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
journal._db.set_trace_callback(count)
for number in range(1, 5):
    t._seal(journal, number)
    print(number, flush=True)
    journal.note_answer("house", t.T0 + 1800 * (number - 1), 0, OutboxState.ACCEPTED, b"receipt")
journal.close()
"""


def test_after_a_kill_before_any_statement_counters_interval_and_message_agree(tmp_path: Path) -> None:
    script = _CRASHER.format(tests=str(Path(__file__).parent))
    survived = False
    step = 0
    while not survived:
        folder = tmp_path / str(step)
        done = subprocess.run(
            [sys.executable, "-c", script, str(folder), str(step)], capture_output=True, text=True, check=False
        )
        survived = done.returncode == 0
        assert survived or done.returncode == -signal.SIGKILL, done.stderr
        committed = len(done.stdout.split())
        journal = Journal(folder, 10)
        state = journal.load("house")
        view = JournalView(folder)
        records = view.intervals("house", 9)
        # What was told to the caller is there; at most the one that was being committed is there beyond it.
        assert committed <= len(records) <= committed + 1
        assert state == (_state(len(records)) if records else MeterState())
        assert [r.message for r in records] == [f"message {n}".encode() for n in range(len(records), 0, -1)]
        # Answers are written with the interval after them, whole.
        assert [r.state for r in records[1 if not survived else 0 :]] == [OutboxState.ACCEPTED] * (
            len(records) - (not survived and bool(records))
        )
        # And work goes on from there.
        _seal(journal, len(records) + 1)
        view.close()
        journal.close()
        # One statement after the other, but not each of the same kind: every third keeps the test short.
        step += 3
    assert os.path.exists(tmp_path / "3")
