"""A ledger that shows two histories is found out by whoever sees both, with evidence that convinces others.

No party can make another one stop by its own word.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.ledger_world import GENESIS, LEDGER, T0, batch, counting_bytes, found, genesis, issue, key, seal
from support.schema import require

from broker import cli
from broker.ledger.chain import block_id_of
from broker.ledger.client import LedgerClient, LedgerFault
from broker.ledger.embedded import EmbeddedLedger
from broker.ledger.gateway import Gateway
from broker.ledger.limits import MAX_WATCHED_HEIGHTS
from broker.ledger.proofs import ConsistencyProof, OperationsProof, read_proof
from broker.ledger.receipts import ProofFailed, verify_consistency_receipt
from broker.ledger.trust import Trust, read_trust, trust_of
from broker.ledger.witness import Equivocation, Statement, Watch, statement_of
from broker.protocol import envelope
from broker.protocol.errors import MalformedMessage, ProtocolError
from broker.protocol.messages import Block, Checkpoint, Page, Query, QueryKind, Tick, Witness
from broker.protocol.topics import Topics


def trust(of: object = GENESIS) -> Trust:
    return read_trust(json.dumps(trust_of(of)))  # type: ignore[arg-type]


TRUST = trust()


def head(height: int, block_id: bytes = b"i" * 32) -> Checkpoint:
    return Checkpoint(height, block_id, 0, b"r" * 32, b"s" * 32)


def signed(message: Checkpoint | Block | Tick, by: str = "node", ledger: str = LEDGER) -> bytes:
    return seal(message, by, ledger)


def said(raw: bytes) -> Statement:
    statement = statement_of(envelope.open_envelope(raw, LEDGER, TRUST.validators.get))
    assert statement is not None
    return statement


class Node:
    """A ledger with its gateway, and a party that follows it; everything in one place, without a wire."""

    def __init__(self, path: Path, party: str) -> None:
        self.engine = found(path)
        self.gateway = Gateway(self.engine, Topics(), "node", key("node"))
        self.client = LedgerClient(GENESIS, party, key(party), counting_bytes())
        self.now_s = 0.0
        self.settle()

    def say(self, raw: bytes) -> None:
        """Put a batch on the ledger, and tell the party about it."""
        assert self.engine.submit(raw) is None
        self.settle()

    def settle(self) -> None:
        messages = [*self.gateway.start(), *self.gateway.commit()]
        while messages:
            for message in messages:
                self.client.on_message(Topics().split(message.topic)[2], message.payload)
            self.now_s += 10
            messages = [out for payload in self.client.tick(self.now_s) for out in self.gateway.on_message(payload)]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    """Two ledgers with one beginning and one validator key, each followed by a party that does not see the other."""
    one, other = Node(tmp_path / "one", "b1"), Node(tmp_path / "other", "b2")
    yield one, other
    one.engine.close()
    other.engine.close()


def witness_of(node: Node, party: str) -> bytes:
    checkpoint = node.client.witnessed
    assert checkpoint is not None
    return seal(Witness(checkpoint), party)


def fault_of(client: LedgerClient) -> LedgerFault | None:
    return next((event for event in client.events() if isinstance(event, LedgerFault)), None)


def test_the_same_history_makes_nobody_stop(nodes: tuple[Node, Node]) -> None:
    one, other = nodes
    for _ in range(2):
        one.client.on_witness(witness_of(other, "b2"))
        other.client.on_witness(witness_of(one, "b1"))
        assert fault_of(one.client) is fault_of(other.client) is None
        for node in nodes:
            node.say(batch(issue("solar-1", 7)))
        assert said(one.client.witnessed or b"").height == 3


@pytest.mark.parametrize("longer_by", [0, 1, 3])
def test_a_fork_is_found_by_both_parties_with_evidence(
    nodes: tuple[Node, Node], longer_by: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = nodes
    one.say(batch(issue("solar-1", 7)))
    witnessed = [witness_of(one, "b1")]
    other.say(batch(issue("solar-1", 8)))
    for number in range(longer_by):
        other.say(batch(issue("solar-1", 9, T0 + (number + 1) * 1_800)))
    other.client.on_witness(witnessed[0])
    fault = fault_of(other.client)
    assert fault is not None
    assert fault.evidence is not None
    statements = fault.evidence.check(TRUST)
    assert {statement.height for statement in statements} == {3}
    # It goes on saying what it was shown, so that the other party finds out too.
    assert said(other.client.witnessed or b"").height == other.client.height
    one.client.on_message("checkpoint", one.engine.checkpoint())
    one.client.on_witness(witness_of(other, "b2"))
    assert (fault_of(one.client) is not None) is (longer_by == 0)

    # Where its own history is the shorter one, it finds out as soon as that has come to the other's height.
    file = tmp_path / "evidence"
    file.write_bytes(fault.evidence.to_bytes())
    require("equivocation", file.read_bytes(), "evidence")
    trust_file, other_trust = tmp_path / "trust", tmp_path / "other-trust"
    trust_file.write_text(json.dumps(trust_of(GENESIS)))
    other_trust.write_text(json.dumps(trust_of(genesis(ledger="another"))))
    assert cli.main(["ledger", "evidence", str(file), "--trust", str(trust_file)]) == 0
    assert "both cannot be true" in capsys.readouterr().out
    assert cli.main(["ledger", "evidence", str(file), "--trust", str(other_trust)]) == 1
    assert f"is evidence about ledger {LEDGER}" in capsys.readouterr().err


def test_a_statement_that_comes_before_its_block_is_compared_when_the_block_comes(nodes: tuple[Node, Node]) -> None:
    one, other = nodes
    one.say(batch(issue("solar-1", 7)))
    other.client.on_witness(witness_of(one, "b1"))
    assert fault_of(other.client) is None
    other.say(batch(issue("solar-1", 8)))
    fault = fault_of(other.client)
    assert fault is not None
    assert fault.evidence is not None
    fault.evidence.check(TRUST)
    assert fault.height == 3


def test_who_finds_out_first_tells_the_other(nodes: tuple[Node, Node]) -> None:
    """The block with which it finds out is not in a checkpoint yet; the next one goes to the others all the same."""
    one, other = nodes
    one.say(batch(issue("solar-1", 7)))
    other.client.on_witness(witness_of(one, "b1"))
    other.say(batch(issue("solar-1", 8)))
    assert fault_of(other.client) is not None
    one.client.on_witness(witness_of(other, "b2"))
    assert fault_of(one.client) is not None


def test_a_party_alone_can_make_nobody_stop(nodes: tuple[Node, Node]) -> None:
    one, _ = nodes
    lie = head(one.client.height)
    for payload in (
        seal(Witness(signed(lie, "b2")), "b2"),  # a checkpoint that only the party itself signed
        seal(Witness(b"\x00"), "b2"),
        seal(Witness(signed(Tick(0, 0), "node")), "b2"),  # type: ignore[arg-type]
        signed(lie),
        b"",
    ):
        with pytest.raises(ProtocolError):
            one.client.on_witness(payload)
    assert fault_of(one.client) is None
    # Signed by the validator it counts, whoever passes it on.
    one.client.on_witness(seal(Witness(signed(lie)), "stranger"))
    fault = fault_of(one.client)
    assert fault is not None
    assert fault.evidence is not None


def test_no_checkpoint_is_co_signed_that_was_not_followed_to(tmp_path: Path) -> None:
    node = Node(tmp_path, "b1")
    ahead = signed(head(node.client.height + 5))
    node.client.on_message("checkpoint", ahead)
    assert said(node.client.witnessed or b"").height == node.client.height
    node.engine.close()


# --- What contradicts what


def test_two_heads_of_one_height_contradict_each_other_in_any_field() -> None:
    one = head(7)
    for name, value in (("block_id", b"x" * 32), ("tree_size", 1), ("root", b"x" * 32), ("state_hash", b"x" * 32)):
        evidence = Equivocation(LEDGER, signed(one), signed(replace(one, **{name: value})))
        assert Equivocation.from_bytes(evidence.to_bytes()) == evidence
        evidence.check(TRUST)


def test_a_block_that_follows_on_another_one_is_evidence() -> None:
    operation = batch(issue("solar-1", 7))
    first = signed(Block(7, b"p" * 32, (operation,), 1, b"r" * 32, b"s" * 32))
    sound = signed(Block(8, block_id_of(first), (operation,), 2, b"r" * 32, b"s" * 32))
    torn = signed(Block(8, b"x" * 32, (operation,), 2, b"r" * 32, b"s" * 32))
    for one, other in ((first, torn), (torn, first)):
        Equivocation(LEDGER, one, other).check(TRUST)
        watch = Watch(LEDGER)
        assert watch.note(said(one)) is None
        assert watch.note(said(other)) == Equivocation(LEDGER, one, other)
    with pytest.raises(ProofFailed, match="can both be true"):
        Equivocation(LEDGER, first, sound).check(TRUST)


def test_evidence_of_nothing_is_refused() -> None:
    one, same, later = signed(head(7)), signed(head(7)), signed(head(8, b"x" * 32))
    for other in (same, later):
        with pytest.raises(ProofFailed, match="can both be true"):
            Equivocation(LEDGER, one, other).check(TRUST)
    contradicting = head(7, b"x" * 32)
    for other in (signed(contradicting, "b1"), signed(contradicting, ledger="another"), b"\x00"):
        with pytest.raises(ProtocolError):
            Equivocation(LEDGER, one, other).check(TRUST)
    with pytest.raises(MalformedMessage, match="two sealed blocks or checkpoints"):
        Equivocation(LEDGER, one, signed(Tick(0, 0))).check(TRUST)  # type: ignore[arg-type]
    with pytest.raises(ProofFailed, match="about ledger another"):
        Equivocation("another", one, signed(contradicting)).check(TRUST)
    for raw in (b"", b"\x80", read_nothing()):
        with pytest.raises(MalformedMessage):
            Equivocation.from_bytes(raw)


def read_nothing() -> bytes:
    """A proof of another kind."""
    return ConsistencyProof(LEDGER, b"o", b"n", b"r").to_bytes()


def test_the_watch_forgets_the_oldest_first() -> None:
    watch = Watch(LEDGER)
    template = said(signed(head(1)))
    for height in range(1, MAX_WATCHED_HEIGHTS + 11):
        assert watch.note(replace(template, height=height)) is None
    assert len(watch._noted) == MAX_WATCHED_HEIGHTS
    assert watch.note(replace(template, height=5, block_id=b"x" * 32)) is None
    assert watch.note(replace(template, height=500, block_id=b"x" * 32)) is not None
    large = replace(template, raw=bytes(2**20))
    for height in range(2_000, 2_040):
        watch.note(replace(large, height=height))
    assert sum(len(statement.raw) for statement in watch._noted.values()) <= 16 * 2**20


# --- Proofs for the asking


def asked(engine: EmbeddedLedger, kind: QueryKind, place: int) -> Page:
    gateway = Gateway(engine, Topics(), "node", key("node"))
    (answer,) = gateway.on_message(seal(Query(bytes(8), kind, place=place), "b1"))
    page = envelope.open_envelope(answer.payload, LEDGER, TRUST.validators.get).message
    assert isinstance(page, Page)
    return page


def test_a_party_can_ask_for_proofs(tmp_path: Path) -> None:
    engine = found(tmp_path)
    before = engine.head.checkpoint()
    engine.submit(batch(issue("solar-1", 7)))
    engine.commit()
    (raw,) = asked(engine, QueryKind.OPERATION, 4).entries
    proof = read_proof(raw)
    assert isinstance(proof, OperationsProof)
    checkpoint, _ = proof.check(TRUST)
    assert checkpoint == engine.head.checkpoint()
    newer, receipt = asked(engine, QueryKind.CONSISTENCY, before.tree_size).entries
    assert newer == engine.checkpoint()
    proven = verify_consistency_receipt(receipt, before.root, TRUST)
    assert (proven.second, proven.root) == (checkpoint.tree_size, checkpoint.root)
    for kind, place in ((QueryKind.OPERATION, 9_999), (QueryKind.CONSISTENCY, 0), (QueryKind.CONSISTENCY, 9_999)):
        assert asked(engine, kind, place).entries == ()
    engine.close()
