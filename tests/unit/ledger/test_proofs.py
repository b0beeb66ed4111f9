"""Receipts and proofs: each holds under its own ledger's trust file, and whatever is changed in it makes it fail."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ledger_world import (
    GENESIS,
    LEDGER,
    T0,
    batch,
    close,
    deliver,
    found,
    genesis,
    issue,
    key,
    seal,
    take,
)
from support.schema import require

from broker import cli
from broker.ledger.chain import genesis_hash
from broker.ledger.embedded import EmbeddedLedger
from broker.ledger.merkle import hashes_of, inclusion_proof, leaf_hash, root_of
from broker.ledger.operations import Register, encode_operation
from broker.ledger.proofs import ConsistencyProof, OperationsProof, read_proof
from broker.ledger.proving import Prover
from broker.ledger.receipts import (
    ProofFailed,
    consistency_receipt,
    inclusion_receipt,
    sign_root,
    verify_consistency_receipt,
    verify_inclusion_receipt,
)
from broker.ledger.store import FILE_NAME, Store
from broker.ledger.trust import Trust, issuer_of, read_trust, trust_of
from broker.ledger.verify import verify_ledger
from broker.protocol import cbor, envelope
from broker.protocol.errors import MalformedMessage, ProtocolError
from broker.protocol.keys import Algorithm, generate_private_key
from broker.protocol.messages import Batch, Checkpoint, Genesis, NamedKey, Registration, Role

HISTORY = (
    batch(issue("solar-1", 1_000), take("solar-1", 0, 1_000)),
    batch(*(deliver(number, 10, ("solar-1", 10 * number, 10 * number + 10)) for number in range(20))),
    batch(close()),
)


def trust(of: Genesis = GENESIS) -> Trust:
    return read_trust(json.dumps(trust_of(of)))


TRUST = trust()


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedLedger]:
    engine = found(tmp_path_factory.mktemp("ledger"))
    for raw in HISTORY:
        assert engine.submit(raw) is None
        assert engine.commit().blocks
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def prover(ledger: EmbeddedLedger) -> Prover:
    return Prover(ledger._store, LEDGER)


def all_operations(ledger: EmbeddedLedger) -> list[bytes]:
    found_operations: list[bytes] = []
    for raw in ledger.blocks(1):
        block = envelope.open_envelope(raw, LEDGER, TRUST.validators.get).message
        for raw_batch in block.batches:  # type: ignore[attr-defined]
            found_operations += Batch.from_payload(envelope.parse(raw_batch).payload).operations
    return found_operations


# --- Operations


def test_every_operation_has_a_proof_with_a_receipt(ledger: EmbeddedLedger, prover: Prover) -> None:
    operations = all_operations(ledger)
    for leaf, operation in enumerate(operations):
        proof = prover.operations([leaf])
        assert [(proven.leaf, proven.operation) for proven in proof.operations] == [(leaf, operation)]
        read = read_proof(proof.to_bytes())
        assert read == proof
        checkpoint, validator = proof.check(TRUST)
        assert (checkpoint, validator) == (ledger.head.checkpoint(), "node")
        assert proof.receipt is not None
        included = verify_inclusion_receipt(proof.receipt, operation, TRUST)
        assert (included.index, included.size, included.root) == (leaf, len(operations), checkpoint.root)


def test_many_operations_share_their_nodes(ledger: EmbeddedLedger, prover: Prover) -> None:
    size = ledger.head.tree_size
    proof = prover.operations(range(size))
    assert proof.hashes == ()
    assert proof.receipt is None
    proof.check(TRUST)
    half = prover.operations(range(0, size, 2))
    assert len(half.hashes) == size // 2
    half.check(TRUST)


def test_operations_are_found_by_block_and_by_batch(ledger: EmbeddedLedger, prover: Prover) -> None:
    operations = all_operations(ledger)
    batch_id = envelope.sealed_id(HISTORY[1], LEDGER, "b1")
    of_batch = prover.indices_of_batch(batch_id)
    assert [operations[index] for index in of_batch] == list(
        Batch.from_payload(envelope.parse(HISTORY[1]).payload).operations
    )
    assert prover.index_of(4, 3) == of_batch[3]
    with pytest.raises(ProofFailed, match="block 4 holds 20 operations"):
        prover.index_of(4, 20)
    with pytest.raises(ProofFailed, match="block 99 is not stored here"):
        prover.index_of(99, 0)
    with pytest.raises(ProofFailed, match="no batch"):
        prover.indices_of_batch(b"x" * 32)
    with pytest.raises(ProofFailed, match="counted from 0"):
        prover.operations([len(operations)])
    with pytest.raises(ProofFailed, match="of 1 to 4096 operations"):
        prover.operations([])


def test_a_changed_proof_fails_with_the_reason(prover: Prover) -> None:
    proof = prover.operations([5])
    other = prover.operations([6])
    proven = proof.operations[0]
    for changed, reason in (
        (
            replace(proof, operations=(proven._replace(operation=proven.operation + b"\x00"),)),
            "do not lead to the root",
        ),
        (replace(proof, operations=(proven._replace(leaf=6),)), "do not lead to the root"),
        (replace(proof, hashes=proof.hashes[:-1]), "do not lead to the root"),
        (replace(proof, root=replace(proof.root, signature=bytes(64))), "signature of node does not fit"),
        (replace(proof, receipt=other.receipt), "the signature of node does not fit"),
        (replace(proof, ledger="another"), "a proof of ledger another"),
    ):
        with pytest.raises(ProofFailed, match=reason):
            changed.check(TRUST)
    unsigned = bytearray(proof.checkpoint)
    unsigned[-1] ^= 1
    with pytest.raises(ProtocolError, match="does not verify"):
        replace(proof, checkpoint=bytes(unsigned)).check(TRUST)


@settings(max_examples=300)
@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_in_a_proof_is_found(prover: Prover, position: int, bit: int) -> None:
    raw = bytearray(prover.operations([7]).to_bytes())
    raw[position % len(raw)] ^= 1 << bit
    with pytest.raises(ProtocolError):
        read_proof(bytes(raw)).check(TRUST)


# --- Of another ledger


def other_ledger(path: Path, name: str) -> tuple[Genesis, OperationsProof, ConsistencyProof]:
    """Proofs of a ledger with the same validator and key, and nothing else in common but perhaps its name."""
    founded = genesis(ledger=name, currency="GBP")
    engine = EmbeddedLedger(path, founded, "node", key("node"))
    statement = seal(Registration("b1", Role.BROKER, key("b1").public.cose_key), "registrar", name)
    assert engine.submit(seal(Batch(T0, (encode_operation(Register(statement)),)), "b1", name)) is None
    assert engine.commit().blocks
    prover = Prover(engine._store, name)
    proofs = prover.operations([0]), prover.consistency_with(prover.checkpoint)
    engine.close()
    return founded, *proofs


@pytest.mark.parametrize("name", [LEDGER, "another-ledger"])
def test_proofs_of_another_ledger_with_the_same_key_fail(tmp_path: Path, name: str) -> None:
    founded, operations, consistency = other_ledger(tmp_path, name)
    operations.check(trust(founded))
    consistency.check(trust(founded))
    assert operations.receipt is not None
    raw = operations.operations[0].operation
    verify_inclusion_receipt(operations.receipt, raw, trust(founded))
    for check in (
        lambda: operations.check(TRUST),
        lambda: consistency.check(TRUST),
        lambda: replace(operations, ledger=LEDGER).check(TRUST),
        lambda: verify_inclusion_receipt(operations.receipt or b"", raw, TRUST),
        lambda: verify_consistency_receipt(consistency.receipt, operations.check(trust(founded))[0].root, TRUST),
    ):
        with pytest.raises(ProtocolError):
            check()
    with pytest.raises(ProofFailed, match="of another ledger"):
        verify_inclusion_receipt(operations.receipt, raw, TRUST)


def test_a_receipt_of_somebody_who_is_no_validator_fails() -> None:
    leaves = [leaf_hash(b"a"), leaf_hash(b"b")]
    signed = sign_root(root_of(leaves), key("b1"), TRUST.issuer)
    receipt = inclusion_receipt(signed, 0, 2, inclusion_proof(0, 2, hashes_of(leaves)))
    with pytest.raises(ProofFailed, match="no validator's in the trust file"):
        verify_inclusion_receipt(receipt, b"a", TRUST)


@pytest.mark.parametrize("algorithm", Algorithm)
def test_validators_may_have_either_kind_of_key(algorithm: Algorithm) -> None:
    private = generate_private_key(algorithm)
    founded = genesis(validators=(NamedKey("node", private.public.cose_key),))
    leaves = [leaf_hash(bytes([number])) for number in range(5)]
    issuer = issuer_of(LEDGER, genesis_hash(founded))
    signed = sign_root(root_of(leaves), private, issuer)
    receipt = inclusion_receipt(signed, 3, 5, inclusion_proof(3, 5, hashes_of(leaves)))
    assert verify_inclusion_receipt(receipt, b"\x03", trust(founded)).validator == "node"
    with pytest.raises(ProofFailed):
        verify_inclusion_receipt(receipt, b"\x02", trust(founded))


# --- The form of a receipt


def test_a_receipt_is_what_the_rfc_says(prover: Prover) -> None:
    proof = prover.operations([4])
    receipt = cbor2.loads(proof.receipt or b"")
    assert receipt.tag == 18
    protected, unprotected, payload, signature = receipt.value
    assert cbor2.loads(protected) == {
        1: -19,
        4: key("node").public.key_id,
        15: {1: f"{LEDGER}/{genesis_hash(GENESIS).hex()}"},
        395: 1,
    }
    assert payload is None
    assert len(signature) == 64
    ((label, proofs),) = unprotected.items()
    assert label == 396
    ((kind, (encoded,)),) = proofs.items()
    assert kind == -1
    size, leaf, path = cbor2.loads(encoded)
    checkpoint, _ = proof.check(TRUST)
    assert (size, leaf, len(path)) == (checkpoint.tree_size, 4, 6)


def _changed(receipt: bytes, **changes: object) -> bytes:
    protected, unprotected, payload, signature = cbor2.loads(receipt).value
    parts = {"protected": protected, "unprotected": unprotected, "payload": payload, "signature": signature} | changes
    return cbor2.dumps(cbor2.CBORTag(18, list(parts.values())))


def test_what_is_no_receipt_is_refused(prover: Prover) -> None:
    proof = prover.operations([4])
    raw, operation = proof.receipt or b"", proof.operations[0].operation
    encoded = cbor2.loads(raw).value[1][396][-1][0]
    size, leaf, path = cbor2.loads(encoded)
    for bad, reason in (
        (raw[1:], "a tagged COSE_Sign1"),
        (raw + b"\x00", "deterministic CBOR"),
        (_changed(raw, payload=b"r" * 32), "no payload"),
        (_changed(raw, unprotected={}), "one proof under 396, -1"),
        (_changed(raw, unprotected={396: {-1: [encoded, encoded]}}), "one proof under 396, -1"),
        (_changed(raw, unprotected={396: {-1: [encoded]}, 400: 1}), "nothing in its headers but"),
        (_changed(raw, unprotected={396: {-1: [encoded], -2: []}}), "nothing in its headers but"),
        (_changed(raw, unprotected={396: {-1: [cbor2.dumps([size, leaf])]}}), "an array of 3 items"),
        (_changed(raw, unprotected={396: {-1: [cbor2.dumps([True, leaf, path])]}}), "an integer from"),
        (_changed(raw, unprotected={396: {-2: [encoded]}}), "one proof under 396, -1"),
        (b"\xd2\x84" + bytes(5_000), "at most 4096 bytes"),
    ):
        with pytest.raises(MalformedMessage, match=reason):
            verify_inclusion_receipt(bad, operation, TRUST)
    short = _changed(raw, unprotected={396: {-1: [cbor2.dumps([size, leaf, path[:-1]])]}})
    with pytest.raises(ProofFailed, match="path is none for leaf 4"):
        verify_inclusion_receipt(short, operation, TRUST)


def test_a_proof_of_another_shape_is_refused(prover: Prover) -> None:
    proof = prover.operations([4, 5])
    with pytest.raises(MalformedMessage, match="only beside a single operation"):
        read_proof(replace(proof, receipt=prover.operations([4]).receipt).to_bytes())
    for raw in (b"", b"\x00", cbor.encode({0: 3}), cbor.encode([1])):
        with pytest.raises(MalformedMessage):
            read_proof(raw)


# --- Consistency


def test_the_ledger_goes_on_from_each_of_its_checkpoints(tmp_path: Path) -> None:
    engine = found(tmp_path)
    checkpoints = [engine.checkpoint()]
    for raw in HISTORY:
        engine.submit(raw)
        engine.commit()
        checkpoints.append(engine.checkpoint())
    prover = Prover(engine._store, LEDGER)
    for raw in checkpoints:
        proof = prover.consistency_with(raw)
        assert read_proof(proof.to_bytes()) == proof
        older, newer = proof.check(TRUST)
        assert newer == engine.head.checkpoint()
        assert older.height <= newer.height
    engine.close()


def test_a_checkpoint_of_a_rewritten_history_is_not_gone_on_from(
    tmp_path: Path, ledger: EmbeddedLedger, prover: Prover
) -> None:
    fork = found(tmp_path)
    fork.submit(batch(issue("solar-1", 7), take("solar-1", 0, 7)))
    fork.commit()
    proof = prover.consistency_with(fork.checkpoint())
    fork.close()
    with pytest.raises(ProofFailed, match="does not begin with"):
        proof.check(TRUST)
    with pytest.raises(ProofFailed, match="ask for the time when it held 1 to"):
        prover.consistency(0)
    with pytest.raises(ProofFailed, match="ask for the time"):
        prover.consistency(ledger.head.tree_size + 1)


def test_a_consistency_proof_between_other_checkpoints_fails(ledger: EmbeddedLedger, prover: Prover) -> None:
    head = ledger.head.checkpoint()
    proof = prover.consistency_with(prover.checkpoint)

    def signed(checkpoint: Checkpoint) -> bytes:
        return envelope.seal(checkpoint, key("node"), LEDGER, "node")

    with pytest.raises(ProofFailed, match="other trees"):
        replace(proof, older=signed(replace(head, tree_size=head.tree_size - 1))).check(TRUST)
    with pytest.raises(ProofFailed, match="called the older one"):
        replace(proof, older=signed(replace(head, height=head.height + 1))).check(TRUST)
    receipt = consistency_receipt(sign_root(head.root, key("node"), "another"), head.tree_size, head.tree_size, [])
    with pytest.raises(ProofFailed, match="of another ledger"):
        replace(proof, receipt=receipt).check(TRUST)


# --- The trust file


def test_a_trust_file_that_is_none_is_refused_with_its_entry() -> None:
    sound = trust_of(GENESIS)
    for changes, entry in (
        ({"ledger": "No Name"}, "ledger"),
        ({"genesis_sha256": "12"}, "genesis_sha256"),
        ({"genesis_sha256": None}, "genesis_sha256"),
        ({"validators": {}}, "validators"),
        ({"validators": {"node": "zz"}}, "validators"),
        ({"registrars": None}, "registrars"),
    ):
        with pytest.raises(MalformedMessage, match=entry):
            read_trust(json.dumps(sound | changes))
    for text in ("", "[]", "{", "[" * 70_000, "[" * 60_000, "9" * 10_000):
        with pytest.raises(MalformedMessage, match="trust file"):
            read_trust(text)


# --- Commands


def test_prove_and_check_proof(ledger: EmbeddedLedger, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(ledger._path)
    genesis_file, trust_file, other_trust = tmp_path / "genesis", tmp_path / "trust.json", tmp_path / "other.json"
    genesis_file.write_bytes(GENESIS.to_bytes())
    assert cli.main(["ledger", "trust", "--genesis", str(genesis_file)]) == 0
    trust_file.write_text(capsys.readouterr().out)
    other_trust.write_text(json.dumps(trust_of(genesis(currency="GBP"))))
    checkpoint = tmp_path / "checkpoint"
    assert cli.main(["ledger", "checkpoint", path, "--out", str(checkpoint)]) == 0
    assert checkpoint.read_bytes() == ledger.checkpoint()
    batch_id = envelope.sealed_id(HISTORY[1], LEDGER, "b1").hex()
    for number, (what, said) in enumerate(
        (
            (["--operation", "4/3"], "1 operation stands on ledger"),
            (["--leaf", "0"], "1 operation stands on ledger"),
            (["--batch", batch_id], "20 operations stand on ledger"),
            (["--since", str(checkpoint)], "goes on from height 5"),
        )
    ):
        file = tmp_path / f"proof-{number}"
        assert cli.main(["ledger", "prove", path, *what, "--out", str(file)]) == 0
        assert cli.main(["ledger", "check-proof", str(file), "--trust", str(trust_file)]) == 0
        assert said in capsys.readouterr().out
        assert cli.main(["ledger", "check-proof", str(file), "--trust", str(trust_file), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["root"] == ledger.head.checkpoint().root.hex()
        assert cli.main(["ledger", "check-proof", str(file), "--trust", str(other_trust)]) == 1
        assert "of another ledger" in capsys.readouterr().err
    assert cli.main(["ledger", "prove", path, "--leaf", "9999", "--out", str(tmp_path / "x")]) == 1
    assert cli.main(["ledger", "prove", path, "--operation", "4", "--out", str(tmp_path / "x")]) == 2
    assert cli.main(["ledger", "prove", path, "--batch", "zz", "--out", str(tmp_path / "x")]) == 2
    assert cli.main(["ledger", "prove", str(tmp_path), "--leaf", "0", "--out", str(tmp_path / "x")]) == 1
    assert not (tmp_path / "x").exists()


def test_a_file_of_another_kind_is_named_with_the_command_that_makes_the_right_one(
    ledger: EmbeddedLedger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = str(ledger._path), str(tmp_path / "out")
    trust, other = tmp_path / "trust.json", tmp_path / "other"
    trust.write_text(json.dumps(trust_of(GENESIS)))
    other.write_bytes(cbor2.dumps({0: 1, 1: b"\xff"}))
    wrong = {
        "a proof as `energy-broker ledger prove` writes it": ["check-proof", str(other), "--trust", str(trust)],
        "a trust file as `energy-broker ledger trust` prints it": ["check-proof", out, "--trust", str(other)],
        "the evidence that a broker wrote": ["evidence", str(other), "--trust", str(trust)],
        "a checkpoint as `energy-broker ledger checkpoint` writes it": [
            *("prove", path, "--since", str(other), "--out", out),
        ],
    }
    for sentence, words in wrong.items():
        assert cli.main(["ledger", *words]) == 2
        said = capsys.readouterr().err
        assert f"{other}: expected {sentence}" in said
        assert "from 3 to 3" not in said


def test_a_node_that_does_not_answer_is_told_with_the_next_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trust = tmp_path / "trust.json"
    trust.write_text(json.dumps(trust_of(GENESIS)))
    words = ["--node", "http://127.0.0.1:1", "--trust", str(trust), "--out", str(tmp_path / "x")]
    assert cli.main(["ledger", "certify", *words]) == 1
    assert "check --node, and that the node runs" in capsys.readouterr().err


def test_a_damaged_copy_hands_out_no_proof(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = found(tmp_path / "ledger")
    for raw in HISTORY:
        engine.submit(raw)
        engine.commit()
    engine.close()
    store = Store.open(tmp_path / "ledger" / FILE_NAME)
    store._db.execute("UPDATE nodes SET hashes = zeroblob(length(hashes)) WHERE first = 0")
    store.close()
    prove = ["ledger", "prove", str(tmp_path / "ledger"), "--leaf", "1", "--out", str(tmp_path / "proof")]
    assert cli.main(prove) == 1
    assert "do not lead to the root" in capsys.readouterr().err
    assert not verify_ledger(tmp_path / "ledger").ok
    assert not (tmp_path / "proof").exists()


def test_an_unsigned_copy_says_where_to_prove(tmp_path: Path) -> None:
    engine = found(tmp_path, set_up=False)
    with pytest.raises(ProofFailed, match="prove on a validator's copy"):
        Prover(engine._store, LEDGER)
    engine.close()


# --- The schema


def test_proofs_and_receipts_follow_their_cddl(prover: Prover) -> None:
    single, many = prover.operations([3]), prover.operations([2, 3, 9])
    consistency = prover.consistency_with(prover.checkpoint)
    for proof in (single, many, consistency):
        require("proof", proof.to_bytes(), "proof")
    for receipt, rule, label in ((single.receipt or b"", "inclusion", -1), (consistency.receipt, "consistency", -2)):
        require("cose-receipt", receipt, "receipt")
        protected, unprotected, _, _ = cbor2.loads(receipt).value
        require("receipt-header", protected, "header")
        require(rule, unprotected[396][label][0], rule)
