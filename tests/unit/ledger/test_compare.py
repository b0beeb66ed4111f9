"""Two copies of a ledger: the same, one behind the other, forked, or damaged, and where."""

import json
import shutil
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.ledger_world import GENESIS, batch, found, genesis, issue, key, seal, take

from broker.cli import main
from broker.ledger.chain import block_id_of
from broker.ledger.compare import Comparison, Difference, Verdict, compare_ledgers
from broker.ledger.embedded import EmbeddedLedger
from broker.ledger.operations import Void
from broker.ledger.store import FILE_NAME, LedgerError
from broker.protocol import envelope
from broker.protocol.messages import Block


def void(number: int) -> bytes:
    return batch(Void(bytes((number,)) * 16))


COMMON = (batch(issue("solar-1", 1_000), take("solar-1", 0, 1_000)), *(void(number) for number in range(12)))


def ledger(path: Path, commits: Sequence[Sequence[bytes]]) -> Path:
    """A ledger with one block for each commit, after the two of its set-up."""
    engine = found(path)
    for batches in commits:
        for raw in batches:
            assert engine.submit(raw) is None
        assert all(answer.result.height for answer in engine.commit().results)
    engine.close()
    return path


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ledger(tmp_path_factory.mktemp("common") / "ledger", [[raw] for raw in COMMON])


@pytest.fixture
def copied(common: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(common, tmp_path / "copy"))


def damage(path: Path, statement: str, *values: object) -> None:
    database = sqlite3.connect(path / FILE_NAME)
    with database:
        assert database.execute(statement, values).rowcount > 0
    database.close()


def resealed(path: Path, height: int, by: str = "node", **changes: Any) -> None:
    """Put another block in the place of one; the blocks after it stay."""
    database = sqlite3.connect(path / FILE_NAME)
    (raw,) = database.execute("SELECT raw FROM blocks WHERE height = ?", (height,)).fetchone()
    database.close()
    block = Block.from_payload(envelope.parse(raw).payload)
    forged = seal(Block(**{name: getattr(block, name) for name in Block.__slots__} | changes), by)
    damage(path, "UPDATE blocks SET raw = ?, block_id = ? WHERE height = ?", forged, block_id_of(forged), height)


def forked(path: Path, height: int, difference: Difference, found: Comparison) -> None:
    assert (found.verdict, found.difference, found.common_height) == (Verdict.FORK, difference, height - 1)
    assert found.second.path == path


def test_a_copy_is_the_same_also_while_both_run(common: Path, copied: Path) -> None:
    assert compare_ledgers(common, copied).verdict is Verdict.SAME
    engines = found(common), found(copied)
    same = compare_ledgers(common, copied)
    assert (same.verdict, same.common_height, same.difference, same.detail) == (Verdict.SAME, 15, None, None)
    for engine in engines:
        engine.close()


def test_block_signatures_of_other_validators_are_no_difference(common: Path, copied: Path) -> None:
    """Every node of a network seals the same block with its own key."""
    resealed(copied, 9, by="b2")
    assert compare_ledgers(common, copied).verdict is Verdict.SAME


@pytest.mark.parametrize("kept", [0, 1, 2, 7, 14])
def test_a_copy_that_ends_earlier_is_a_prefix(common: Path, tmp_path: Path, kept: int) -> None:
    shorter = tmp_path / "shorter"
    if kept < 2:
        engine = EmbeddedLedger(shorter, GENESIS, "node", key("node"))
        engine.close()
        if kept:
            shutil.rmtree(shorter)
            shutil.copytree(common, shorter)
            damage(shorter, "DELETE FROM blocks WHERE height > 1")
    else:
        ledger(shorter, [[raw] for raw in COMMON[: kept - 2]])
    for pair in ((common, shorter), (shorter, common)):
        prefix = compare_ledgers(*pair)
        assert (prefix.verdict, prefix.common_height, prefix.difference) == (Verdict.PREFIX, kept, None)


@pytest.mark.parametrize("height", [3, 4, 9, 14, 15])
@pytest.mark.parametrize("longer", [0, 3])
def test_a_fork_is_found_at_its_first_block(common: Path, tmp_path: Path, height: int, longer: int) -> None:
    after = [[void(100 + number)] for number in range(16 - height + longer)]
    other = ledger(tmp_path / "other", [[raw] for raw in COMMON[: height - 3]] + after)
    fork = compare_ledgers(common, other)
    forked(other, height, Difference.BATCH, fork)
    assert fork.detail is not None
    assert "batch 0: operation 0: " in fork.detail


def test_other_batches_and_another_order_are_told_apart(common: Path, tmp_path: Path) -> None:
    def pair(name: str, *batches: bytes) -> Path:
        return ledger(tmp_path / name, [[COMMON[0]], list(batches)])

    straight = pair("straight", void(1), void(2), void(3))
    turned = pair("turned", void(1), void(3), void(2))
    forked(turned, 4, Difference.ORDER, compare_ledgers(straight, turned))
    assert "from batch 1 on" in str(compare_ledgers(straight, turned).detail)
    fewer = pair("fewer", void(1), void(2))
    forked(fewer, 4, Difference.BATCH, compare_ledgers(straight, fewer))
    assert "after 2 same batches the first copy's block has 1 more" in str(compare_ledgers(straight, fewer).detail)
    later = pair("later", void(1), void(2), batch(Void(bytes((3,)) * 16), not_after_s=2_000_000_000))
    assert "batch 2: not_after_s" in str(compare_ledgers(straight, later).detail)
    signer = pair("signer", void(1), void(2), batch(Void(bytes((3,)) * 16), by="b2"))
    assert "batch 2: signed by key" in str(compare_ledgers(straight, signer).detail)
    more = pair("more", void(1), void(2), batch(Void(bytes((3,)) * 16), Void(bytes((4,)) * 16)))
    assert "operation 1: none and void" in str(compare_ledgers(straight, more).detail)


@pytest.mark.parametrize(
    ("changes", "difference", "detail"),
    [
        ({"state_hash": b"x" * 32}, Difference.STATE, "the same batches, state"),
        ({"root": b"x" * 32}, Difference.BLOCK, "another root"),
        ({"previous": b"x" * 32, "tree_size": 1}, Difference.BLOCK, "another previous, tree_size"),
        ({"batches": (void(200),)}, Difference.BATCH, "operation 0"),
    ],
)
def test_a_block_changed_in_the_middle_is_found_though_all_later_ones_agree(
    common: Path, copied: Path, changes: dict[str, Any], difference: Difference, detail: str
) -> None:
    resealed(copied, 5, **changes)
    fork = compare_ledgers(common, copied)
    forked(copied, 5, difference, fork)
    assert detail in str(fork.detail)


@pytest.mark.parametrize(
    ("statement", "detail"),
    [
        ("DELETE FROM blocks WHERE height = 5", "the second copy lacks the block"),
        ("UPDATE blocks SET raw = x'00' WHERE height = 5", "the second copy's block cannot be read"),
        ("UPDATE blocks SET raw = 'text' WHERE height = 5", "the second copy's block cannot be read"),
    ],
)
def test_a_block_that_is_missing_or_unreadable_is_named(
    common: Path, copied: Path, statement: str, detail: str
) -> None:
    damage(copied, statement)
    fork = compare_ledgers(common, copied)
    forked(copied, 5, Difference.BLOCK, fork)
    assert detail in str(fork.detail)


@pytest.mark.parametrize(
    ("statement", "detail"),
    [
        ("UPDATE state SET value = x'00' WHERE key = (SELECT max(key) FROM state)", "another state row ("),
        ("DELETE FROM state WHERE key = (SELECT min(key) FROM state)", "another state row ("),
        ("INSERT INTO state VALUES (x'8201', x'00')", "another state row b'"),
        ("UPDATE batches SET height = height + 1", "another batch index"),
        ("UPDATE nodes SET hashes = zeroblob(32) WHERE first = 0", "another Merkle node row 0"),
    ],
)
def test_same_blocks_with_other_rows_are_damage(common: Path, copied: Path, statement: str, detail: str) -> None:
    damage(copied, statement)
    damaged = compare_ledgers(common, copied)
    assert (damaged.verdict, damaged.difference) == (Verdict.DAMAGED, Difference.STATE)
    assert detail in str(damaged.detail)


def test_two_ledgers_are_not_copies_of_one(common: Path, tmp_path: Path) -> None:
    other = EmbeddedLedger(tmp_path / "other", genesis(currency="CHF"), "node", key("node"))
    other.close()
    comparison = compare_ledgers(common, tmp_path / "other")
    assert (comparison.verdict, comparison.difference) == (Verdict.OTHER_LEDGER, Difference.GENESIS)
    with pytest.raises(LedgerError, match="holds no ledger"):
        compare_ledgers(common, tmp_path)


def test_the_command_says_it_in_a_line_or_as_json(
    common: Path, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: object) -> tuple[int, str]:
        code = main(["ledger", "compare", *map(str, words)])
        return code, capsys.readouterr().out

    assert run(common, copied) == (0, f"{common} and {copied}: the same up to height 15, where both end\n")
    shorter = ledger(tmp_path / "shorter", [[raw] for raw in COMMON[:4]])
    code, text = run(common, shorter)
    assert (code, text.endswith(f"up to height 6, where {shorter} ends; {common} goes on to height 15\n")) == (1, True)
    assert run(common, shorter, "--allow-prefix")[0] == 0
    resealed(copied, 5, state_hash=b"x" * 32)
    code, text = run(common, copied)
    assert (code, "fork at height 5, state: the same batches" in text) == (1, True)
    code, text = run(common, copied, "--json", "--allow-prefix")
    record = json.loads(text)
    assert code == 1
    assert (record["verdict"], record["difference"], record["common_height"]) == ("fork", "state", 4)
    assert record["first"]["height"] == 15
    other = EmbeddedLedger(tmp_path / "other", genesis(currency="CHF"), "node", key("node"))
    other.close()
    assert run(common, tmp_path / "other")[1].endswith(
        "genesis differs: they were founded on different genesis files\n"
    )
    assert main(["ledger", "compare", str(common), str(tmp_path)]) == 1
