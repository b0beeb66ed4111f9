"""Single bits flipped and logs cut, anywhere in a ledger's files: it is said, or it changes nothing.

The ledger has a little of everything. It is damaged as a clean end leaves it (one database file), as a killed process
does (its last commits, or all of them, stand in SQLite's write-ahead log only), and where a snapshot was restored.
"""

import contextlib
import io
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.ledger_world import (
    INTERVAL_S,
    SET_UP,
    T0,
    admit,
    batch,
    close,
    correct,
    deliver,
    found,
    issue,
    mandate,
    order,
    rotate,
    seal,
    sell,
    set_validator,
    take,
)

from broker.cli import main
from broker.ledger.chain import Head
from broker.ledger.snapshot import BASE_FILE_NAME, restore_snapshot, take_snapshot
from broker.ledger.store import FILE_NAME, LedgerError
from broker.ledger.verify import verify_ledger
from broker.ledger.wal import LOG_NAME, log_fault
from broker.protocol.sources import Source

FLIPS = 10_000 if os.environ.get("DENGEN_FULL") == "1" else 200
PARTS = 8

BATCHES = (
    batch(issue("solar-1", 1_000), take("solar-1", 0, 1_000)),
    batch(sell("solar-1", 600, 1_000, seal(order(), "b2"))),
    batch(deliver(7, 300, ("solar-1", 600, 900)), deliver(8, 50), close(), by="b2"),
    batch(deliver(1, 700, ("solar-1", 0, 600)), close()),
    batch(admit("hydro-1", source=Source.HYDRO), mandate("hydro-1"), issue("hydro-1", 5, T0 + INTERVAL_S)),
    batch(correct("solar-1", 1_100), correct("solar-1", 950, 2), rotate("alice", "alice-2"), set_validator("late", 1)),
)


@dataclass(frozen=True)
class Acknowledged:
    """What the ledger had answered, and how long its log was then."""

    log_bytes: int
    head: Head


@dataclass(frozen=True)
class Killed:
    path: Path
    acknowledged: tuple[Acknowledged, ...]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """The files as a kill after the last commit leaves them, nothing of them moved from the log yet."""
    return killed_after(tmp_path_factory.mktemp("live"), tmp_path_factory.mktemp("killed"), SET_UP + BATCHES)


@pytest.fixture(scope="module")
def killed_again(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """The same where the process had been ended cleanly on the way, so that both files hold a part."""
    live = tmp_path_factory.mktemp("live")
    engine = found(live)
    engine.submit(BATCHES[0])
    engine.commit()
    engine.close()
    return killed_after(live, tmp_path_factory.mktemp("again"), BATCHES[1:])


def killed_after(live: Path, path: Path, batches: Sequence[bytes]) -> Killed:
    engine = found(live, set_up=False)
    acknowledged = []
    for raw in batches:
        assert engine.submit(raw) is None
        assert engine.commit().results[0].result.height
        acknowledged.append(Acknowledged((live / LOG_NAME).stat().st_size, engine.head))
    for name in (FILE_NAME, LOG_NAME):
        shutil.copy(live / name, path / name)
    engine.close()
    return Killed(path, tuple(acknowledged))


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("closed")
    engine = found(path)
    for raw in BATCHES:
        engine.submit(raw)
        engine.commit()
    engine.close()
    return path


@pytest.fixture(scope="module")
def restored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger that began with a snapshot, which it keeps, went on and was closed."""
    whole, path = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("restored") / "ledger"
    for directory, batches in ((whole, BATCHES[:3]), (path, BATCHES[3:])):
        if directory is path:
            take_snapshot(whole, whole / "snapshot")
            restore_snapshot(whole / "snapshot", path)
        engine = found(directory)
        for raw in batches:
            engine.submit(raw)
            assert engine.commit().results[0].result.height
        engine.close()
    return path


def audited(path: Path) -> tuple[object, ...]:
    """What `ledger audit` ends with and prints, in all its tables."""
    printed: list[object] = []
    for table in ("sources", "devices", "parties", "deliveries", "closes"):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            printed += [main(["ledger", "audit", str(path), "--by", table, "--csv"]), out.getvalue()]
    return tuple(printed)


def verifies(path: Path) -> bool:
    try:
        return verify_ledger(path).ok
    except LedgerError:
        return False


@contextlib.contextmanager
def copy_of(origin: Path, into: Path, name: str, content: bytes) -> Iterator[Path]:
    """The ledger with other content in one of its files; gone afterwards."""
    into.mkdir()
    for file in (FILE_NAME, LOG_NAME, BASE_FILE_NAME):
        if (origin / file).exists():
            shutil.copy(origin / file, into / file)
    (into / name).write_bytes(content)
    try:
        yield into
    finally:
        shutil.rmtree(into)


@pytest.mark.parametrize("part", range(PARTS))
def test_every_flipped_bit_is_found_or_changes_nothing_that_is_shown(
    closed: Path, killed: Killed, killed_again: Killed, restored: Path, tmp_path: Path, part: int
) -> None:
    """FLIPS in all, an eighth each."""
    origin, name = (
        (closed, FILE_NAME),
        (closed, FILE_NAME),
        (killed_again.path, FILE_NAME),
        (killed_again.path, LOG_NAME),
        (killed_again.path, LOG_NAME),
        (killed.path, LOG_NAME),
        (restored, FILE_NAME),
        (restored, BASE_FILE_NAME),
    )[part]
    choose = random.Random(part)
    raw = (origin / name).read_bytes()
    with copy_of(origin, tmp_path / "sound", name, raw) as path:
        assert verifies(path)
        before = audited(path)
    assert before[0] == 0
    assert "solar,1100,50,900,150,0" in str(before[1])
    found_out = 0
    for number in range(FLIPS // PARTS):
        changed = bytearray(raw)
        position, bit = choose.randrange(len(raw)), choose.randrange(8)
        changed[position] ^= 1 << bit
        with copy_of(origin, tmp_path / str(number), name, bytes(changed)) as path:
            if verifies(path):
                assert audited(path) == before, f"bit {bit} of byte {position} in {name}, {origin.name}"
            else:
                found_out += 1
    # A small file is mostly empty; of the file of a killed ledger most pages stand in the log, and count from there.
    assert found_out > FLIPS // PARTS // 10 or (origin, name) == (killed_again.path, FILE_NAME), "these bits matter"


def test_each_bit_of_the_log_s_headers_is_found(killed: Killed, tmp_path: Path) -> None:
    """The header of the log, and of a frame that begins a commit, one in the middle, one that ends it."""
    raw = (killed.path / LOG_NAME).read_bytes()
    frame_bytes = 24 + int.from_bytes(raw[8:12], "big")
    last = (len(raw) - 32) // frame_bytes - 1
    for first, length in ((0, 32), (32, 24), (32 + last // 2 * frame_bytes, 24), (32 + last * frame_bytes, 24)):
        for position in range(first, first + length):
            changed = bytearray(raw)
            changed[position] ^= 1 << position % 8
            with copy_of(killed.path, tmp_path / "flipped", LOG_NAME, bytes(changed)) as path:
                assert not verifies(path), f"byte {position}"


# --- The log cut


def cuts(killed: Killed) -> list[int]:
    """Lengths of every kind: none, within the header, at it, then for each frame within its header, behind it, within
    its page, one byte short, and whole.
    """
    raw = (killed.path / LOG_NAME).read_bytes()
    page_bytes = int.from_bytes(raw[8:12], "big")
    lengths = [0, 1, 24, 31, 32]
    for start in range(32, len(raw), 24 + page_bytes):
        lengths += [
            start + 1,
            start + 24,
            start + 24 + page_bytes // 2,
            start + 23 + page_bytes,
            start + 24 + page_bytes,
        ]
    assert lengths[-1] == len(raw)
    return lengths


def test_wherever_the_log_is_cut_nothing_is_lost_that_was_acknowledged_before(killed: Killed, tmp_path: Path) -> None:
    """And of what was acknowledged later, whole batches only: the ledger stands exactly at one of its heads."""
    raw = (killed.path / LOG_NAME).read_bytes()
    heights = set()
    for length in cuts(killed):
        with copy_of(killed.path, tmp_path / "cut", LOG_NAME, raw[:length]) as path:
            kept = [answer.head for answer in killed.acknowledged if answer.log_bytes <= length]
            engine = found(path, set_up=False)
            assert engine.height == len(kept), f"{length} bytes"
            if kept:
                assert engine.head == kept[-1]
            first_here = engine.height not in heights
            heights.add(engine.height)
            if first_here:
                # Once for each height: what was lost is sent again, as brokers do, and all is as it was.
                for sent in (SET_UP + BATCHES)[engine.height :]:
                    assert engine.submit(sent) is None
                    assert engine.commit().results[0].result.height
                assert engine.head.state_hash == killed.acknowledged[-1].head.state_hash
            engine.close()
            if first_here:
                assert verify_ledger(path).errors == ()
    assert heights == set(range(len(SET_UP + BATCHES) + 1))


def test_a_cut_log_verifies_as_the_shorter_ledger_that_it_is(killed: Killed, tmp_path: Path) -> None:
    """Unless the cut goes through a commit: then it is said that something is missing, until the ledger is started."""
    raw = (killed.path / LOG_NAME).read_bytes()
    ends = {answer.log_bytes: answer.head for answer in killed.acknowledged}
    for length in sorted(ends):
        with copy_of(killed.path, tmp_path / "cut", LOG_NAME, raw[:length]) as path:
            report = verify_ledger(path)
            assert report.ok
            assert (report.height, report.block_id) == (ends[length].height, ends[length].block_id)


# --- The start after damage


def frame_of(killed: Killed, commit: int) -> int:
    """Where the first frame of a commit begins."""
    return killed.acknowledged[commit - 1].log_bytes


@pytest.mark.parametrize("commit", [1, 3, 5])
def test_a_start_refuses_a_log_with_damage_before_its_last_commit(killed: Killed, tmp_path: Path, commit: int) -> None:
    """SQLite itself would go on without what comes after, though it was acknowledged."""
    raw = bytearray((killed.path / LOG_NAME).read_bytes())
    raw[frame_of(killed, commit) + 100] ^= 4
    with copy_of(killed.path, tmp_path / "damaged", LOG_NAME, bytes(raw)) as path:
        with pytest.raises(LedgerError, match=r"frame \d+ is damaged and committed blocks stand behind it"):
            found(path, set_up=False)
        assert (path / LOG_NAME).read_bytes() == bytes(raw), "nothing was removed"


def test_a_start_refuses_a_log_with_a_damaged_header(killed: Killed, tmp_path: Path) -> None:
    raw = (killed.path / LOG_NAME).read_bytes()
    for position in range(32):
        changed = bytearray(raw)
        changed[position] ^= 1
        with (
            copy_of(killed.path, tmp_path / "damaged", LOG_NAME, bytes(changed)) as path,
            pytest.raises(LedgerError, match="its header is damaged"),
        ):
            found(path, set_up=False)


def test_a_start_goes_on_behind_a_commit_that_a_power_cut_tore(killed: Killed, tmp_path: Path) -> None:
    """Pages of the last commit may reach the disk in any order; it was not acknowledged yet. The log is empty then."""
    raw = bytearray((killed.path / LOG_NAME).read_bytes())
    start = frame_of(killed, len(killed.acknowledged) - 1)
    raw[start : start + 24] = bytes(24)
    with copy_of(killed.path, tmp_path / "torn", LOG_NAME, bytes(raw)) as path:
        assert not verifies(path)
        engine = found(path, set_up=False)
        assert engine.head == killed.acknowledged[-2].head
        assert log_fault(path) is None
        assert (path / LOG_NAME).stat().st_size == 0
        engine.close()
        assert verifies(path)
