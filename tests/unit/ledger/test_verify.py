"""The verifier finds what was changed behind the engine's back, and the views show what is there."""

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.ledger_world import (
    GENESIS,
    INTERVAL_S,
    LEDGER,
    T0,
    admit,
    batch,
    close,
    deliver,
    found,
    issue,
    key,
    mandate,
    order,
    pseudonym,
    seal,
    sell,
    set_validator,
    take,
)

from broker.ledger import inspect
from broker.ledger.audit import audit_ledger
from broker.ledger.chain import Head, block_id_of, genesis_hash
from broker.ledger.compare import compare_ledgers
from broker.ledger.embedded import EmbeddedLedger
from broker.ledger.inspect import AssetLine, DemandLine
from broker.ledger.operations import AssetId, Void
from broker.ledger.receipts import sign_head
from broker.ledger.snapshot import take_snapshot
from broker.ledger.state import VALIDATORS, Held, encode_key
from broker.ledger.store import FILE_NAME, LedgerError
from broker.ledger.trust import issuer_of
from broker.ledger.verify import verify_ledger
from broker.protocol import cbor, envelope
from broker.protocol.messages import Block, Carrier
from broker.protocol.sources import Source

BATCHES = (
    batch(issue("solar-1", 1_000), take("solar-1", 0, 1_000)),
    batch(sell("solar-1", 600, 1_000, seal(order(), "b2"))),
    batch(deliver(7, 300, ("solar-1", 600, 900)), deliver(8, 50), close(), by="b2"),
    batch(deliver(1, 700, ("solar-1", 0, 600)), close()),
    batch(admit("hydro-1", source=Source.HYDRO), mandate("hydro-1"), issue("hydro-1", 5, T0 + INTERVAL_S)),
)

SET_SIGNED_HEAD = "UPDATE meta SET value = ? WHERE name = 'signed_head'"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger with a little of everything, closed."""
    path = tmp_path_factory.mktemp("sound")
    engine = found(path)
    for raw in BATCHES:
        assert engine.submit(raw) is None
        assert all(answer.result.height for answer in engine.commit().results)
    engine.close()
    return path


@pytest.fixture
def copied(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def damage(path: Path, statement: str, *values: object) -> None:
    database = sqlite3.connect(path / FILE_NAME)
    with database:
        assert database.execute(statement, values).rowcount > 0
    database.close()


def test_a_sound_ledger_verifies(sound: Path) -> None:
    report = verify_ledger(sound)
    assert report.errors == ()
    assert report.ok
    assert (report.ledger, report.genesis_hash) == (GENESIS.ledger, genesis_hash(GENESIS))
    assert (report.height, report.batches, report.operations) == (7, 7, 21)
    engine = found(sound)
    checkpoint = engine.head.checkpoint()
    engine.close()
    assert (report.block_id, report.state_hash, report.root) == (
        checkpoint.block_id,
        checkpoint.state_hash,
        checkpoint.root,
    )


def test_a_running_ledger_verifies_and_shows(copied: Path) -> None:
    engine = found(copied)
    engine.submit(batch(Void(b"q" * 16)))
    engine.commit()
    assert verify_ledger(copied).ok
    assert verify_ledger(copied).height == 8
    assert len(list(inspect.blocks(copied))) == 8
    engine.close()


def test_the_views(sound: Path) -> None:
    solar, following = AssetId("solar-1", Carrier.ELECTRICITY, T0, 0), T0 + INTERVAL_S
    hydro = AssetId("hydro-1", Carrier.ELECTRICITY, following, 0)
    assert list(inspect.assets(sound)) == [
        AssetLine(solar, Source.SOLAR, "north", 1_000, 900, 0, 0, (Held(900, 1_000, "b2"),)),
        AssetLine(
            hydro,
            Source.HYDRO,
            "north",
            5,
            0,
            0,
            0,
            (Held(0, 5, "alice"),),
        ),
    ]
    assert list(inspect.demands(sound)) == [
        DemandLine(T0, pseudonym(1), "b1", 700, 600, 0),
        DemandLine(T0, pseudonym(7), "b2", 300, 300, 0),
        DemandLine(T0, pseudonym(8), "b2", 50, 0, 0),
    ]
    (transfer,) = inspect.order_transfers(sound, b"o" * 16)
    assert (transfer.sender, transfer.receiver, transfer.from_wh, transfer.to_wh, transfer.height) == (
        "b1",
        "b2",
        600,
        1_000,
        4,
    )
    (delivery,) = transfer.delivered
    assert (delivery.from_wh, delivery.to_wh, delivery.broker, delivery.pseudonym) == (600, 900, "b2", pseudonym(7))
    assert list(inspect.order_transfers(sound, b"x" * 16)) == []
    assert sum(line.operations for line in inspect.blocks(sound)) == len(list(inspect.operations(sound))) == 21
    assert inspect.genesis(sound) == GENESIS


@pytest.mark.parametrize(
    ("statement", "complaint"),
    [
        ("DELETE FROM blocks WHERE height = 3", "height 4: block 3 is missing"),
        ("UPDATE blocks SET block_id = zeroblob(32) WHERE height = 3", "height 3: the stored block is another one"),
        ("UPDATE blocks SET height = 99 WHERE height = 7", "height 99: block 7 is missing"),
        ("DELETE FROM blocks WHERE height = 7", "state row"),
        ("DELETE FROM state WHERE key = (SELECT max(key) FROM state)", ": missing"),
        ("INSERT INTO state VALUES (x'8201', x'00')", "no operation made it"),
        ("UPDATE state SET value = x'00' WHERE key = (SELECT min(key) FROM state)", "stored with another value"),
        ("DELETE FROM batches", "batch"),
        ("UPDATE batches SET height = height + 1", "stored with another value"),
        ("UPDATE meta SET value = zeroblob(9) WHERE name = 'head'", "meta head: stored with another value"),
        ("UPDATE meta SET value = zeroblob(9) WHERE name = 'format'", "meta format"),
        ("UPDATE nodes SET hashes = zeroblob(length(hashes)) WHERE first = 0", "Merkle nodes from 0: stored with"),
        ("UPDATE nodes SET first = first + 1000 WHERE first > 0", "Merkle nodes from"),
        ("DELETE FROM nodes WHERE first = 0", "Merkle nodes from 0: missing"),
        ("INSERT INTO nodes VALUES (99999, zeroblob(32))", "Merkle nodes from 99999: stored, but no operation made"),
        ("UPDATE meta SET value = zeroblob(9) WHERE name = 'signed_head'", "meta signed_head"),
    ],
)
def test_changed_rows_are_named(copied: Path, statement: str, complaint: str) -> None:
    damage(copied, statement)
    report = verify_ledger(copied)
    assert not report.ok
    assert complaint in "\n".join(report.errors)


@pytest.mark.parametrize(
    "read",
    [
        verify_ledger,
        inspect.genesis,
        audit_ledger,
        lambda path: compare_ledgers(path, path),
        lambda path: take_snapshot(path, path / "snapshot"),
    ],
)
def test_a_ledger_of_another_format_is_named_as_that_and_not_as_damaged(
    copied: Path, read: Callable[[Path], Any]
) -> None:
    """Whatever reads it says the same sentence, with what to do."""
    damage(copied, "UPDATE meta SET value = x'01' WHERE name = 'format'")
    with pytest.raises(LedgerError, match=r"it has format 1, and this program reads format 2 only; use the version of"):
        read(copied)


def resealed(raw: bytes, **changes: object) -> bytes:
    """The block with other content, signed again by the validator itself."""
    opened = envelope.parse(raw)
    block = Block.from_payload(opened.payload)
    values = {name: getattr(block, name) for name in Block.__slots__}
    return envelope.seal(Block(**(values | changes)), key("node"), GENESIS.ledger, "node")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"state_hash": b"x" * 32}, "state_hash is not what"),
        ({"root": b"x" * 32}, "root is not what"),
        ({"tree_size": 1}, "tree_size is not what"),
        ({"previous": b"x" * 32}, "does not follow"),
        ({"height": 8}, "the stored block is another one"),
        ({"batches": (batch(issue("solar-1", 1_000), take("solar-1", 0, 999)),)}, "is not what"),
        ({"batches": (batch(take("solar-1", 0, 999)),)}, "batch 0: operation 0 refused, unknown_asset"),
        ({"batches": (BATCHES[0][:-1] + b"\x00",)}, "batch 0: the signature"),
        ({"batches": (batch(Void(b"q" * 16), by="b9"),)}, "is not registered"),
    ],
)
def test_a_validator_that_lies_is_found_out(copied: Path, changes: dict[str, object], complaint: str) -> None:
    engine = found(copied)
    raw = next(engine.blocks(3))
    engine.close()
    forged = resealed(raw, **changes)
    block_id = block_id_of(forged)
    damage(copied, "UPDATE blocks SET raw = ?, block_id = ? WHERE height = 3", forged, block_id)
    report = verify_ledger(copied)
    assert not report.ok
    assert "height 3" in report.errors[0]
    assert complaint in report.errors[0]


def test_a_signed_head_of_another_height_or_ledger_is_found(copied: Path) -> None:
    head = Head(7, b"x" * 32, b"y" * 32, 0, ()).checkpoint()
    issuer = issuer_of(LEDGER, genesis_hash(GENESIS))
    damage(copied, SET_SIGNED_HEAD, sign_head(head, key("node"), LEDGER, "node", issuer).to_bytes())
    assert "another head than the stored" in verify_ledger(copied).errors[0]
    damage(copied, SET_SIGNED_HEAD, sign_head(head, key("node"), LEDGER, "node", "another").to_bytes())
    assert "of another ledger" in verify_ledger(copied).errors[0]
    damage(copied, "DELETE FROM meta WHERE name = 'signed_head'")
    assert verify_ledger(copied).ok  # A copy made without a validator's key has none.


def test_a_block_of_somebody_else_is_found(copied: Path) -> None:
    engine = found(copied)
    raw = next(engine.blocks(3))
    engine.close()
    block = Block.from_payload(envelope.parse(raw).payload)
    damage(copied, "UPDATE blocks SET raw = ? WHERE height = 3", seal(block, "b2"))
    assert "not registered" in verify_ledger(copied).errors[0]


def test_what_is_no_ledger_is_said_so(tmp_path: Path, copied: Path) -> None:
    with pytest.raises(LedgerError, match="holds no ledger"):
        verify_ledger(tmp_path)
    with pytest.raises(LedgerError, match="holds no ledger"):
        list(inspect.assets(tmp_path))
    damage(copied, "UPDATE meta SET value = x'00' WHERE name = 'genesis'")
    with pytest.raises(LedgerError, match="genesis"):
        verify_ledger(copied)
    (tmp_path / FILE_NAME).write_bytes(b"no database" * 500)
    with pytest.raises(LedgerError):
        verify_ledger(tmp_path)
    with pytest.raises(LedgerError):
        list(inspect.assets(tmp_path))


def test_a_replaced_genesis_cannot_hide(copied: Path) -> None:
    """Somebody founds another ledger under the old blocks: nothing of it fits."""
    raw = GENESIS.to_bytes()
    other = cbor.encode({**cbor.decode(raw, "genesis", len(raw)), 5: "CHF"})
    damage(copied, "UPDATE meta SET value = ? WHERE name = 'genesis'", other)
    assert "height 1: does not follow" in verify_ledger(copied).errors[0]


# --- Validators that change


def network(path: Path, sealers: tuple[str, ...]) -> Path:
    """A ledger whose validator `node` gets `late` beside it in block 3 and leaves in block 5; sealed so."""
    engine = found(path)
    blocks = (
        (batch(set_validator("late", 1)),),
        (batch(issue("solar-1", 1_000)),),
        (batch(set_validator("node", 0, 2)),),
        (batch(take("solar-1", 0, 1_000)),),
        (batch(Void(b"q" * 16)),),
    )
    for number, (raw,) in enumerate(blocks):
        if number == 3:  # `node` may seal no more.
            engine.close()
            engine = EmbeddedLedger(path, GENESIS, "late", key("late"))
        assert engine.submit(raw) is None
        assert engine.commit().results[0].result.height
    head = engine.head
    engine.close()
    database = sqlite3.connect(path / FILE_NAME)
    with database:
        for height, name in enumerate(sealers, 1):
            (raw,) = database.execute("SELECT raw FROM blocks WHERE height = ?", (height,)).fetchone()
            again = seal(Block.from_payload(envelope.parse(raw).payload), name)
            database.execute("UPDATE blocks SET raw = ? WHERE height = ?", (again, height))
        signed = sign_head(
            head.checkpoint(), key("late"), GENESIS.ledger, "late", issuer_of(GENESIS.ledger, genesis_hash(GENESIS))
        )
        database.execute("UPDATE meta SET value = ? WHERE name = 'signed_head'", (signed.to_bytes(),))
    database.close()
    return path


@pytest.mark.parametrize(
    ("sealers", "complaint"),
    [
        (("node", "node", "node", "node", "node", "late", "late"), None),
        (("node", "node", "node", "late", "late", "late", "late"), None),
        (("late",) * 7, None),
        (("node", "node", "node", "node", "node", "node", "late"), "height 6: "),
        (("node", "node", "node", "node", "node", "late", "node"), "height 7: "),
        (("node", "node", "other", "node", "node", "late", "late"), "height 3: "),
    ],
)
def test_blocks_are_judged_by_the_validators_of_their_time(
    tmp_path: Path, sealers: tuple[str, ...], complaint: str | None
) -> None:
    """Before the change to it, after it, or by a node that came later and replayed all; never by one that had left."""
    report = verify_ledger(network(tmp_path / "ledger", sealers))
    if complaint is None:
        assert report.errors == ()
    else:
        assert complaint in report.errors[0]
        assert "not registered" in report.errors[0]


def test_a_head_is_signed_by_a_validator_of_its_height(tmp_path: Path) -> None:
    path = network(tmp_path / "ledger", ("late",) * 7)
    engine_head = verify_ledger(path)
    assert engine_head.ok
    database = sqlite3.connect(path / FILE_NAME)
    (head,) = database.execute("SELECT value FROM meta WHERE name = 'head'").fetchone()
    checkpoint = Head.from_bytes(head).checkpoint()
    signed = sign_head(
        checkpoint, key("node"), GENESIS.ledger, "node", issuer_of(GENESIS.ledger, genesis_hash(GENESIS))
    )
    with database:
        database.execute("UPDATE meta SET value = ? WHERE name = 'signed_head'", (signed.to_bytes(),))
    database.close()
    assert "meta signed_head" in verify_ledger(path).errors[0]


def test_a_damaged_row_of_validators_is_found(tmp_path: Path) -> None:
    path = network(tmp_path / "ledger", ("node", "node", "node", "node", "node", "late", "late"))
    row = encode_key((VALIDATORS, 0))
    for value in (b"\x00", b"\x82\x02\x81\x83\x64late\x41\x00\x01"):
        damage(path, "UPDATE state SET value = ? WHERE key = ?", value, row)
        assert "state row (16, 0): stored with another value" in verify_ledger(path).errors
