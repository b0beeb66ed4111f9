"""A client follows who the validators are: through blocks, at its start, and after it was away. And asks for proofs.

One engine whose validator is changed by the registrar: `node` gives way to `late`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.ledger_world import (
    GENESIS,
    LEDGER,
    World,
    batch,
    counting_bytes,
    found,
    genesis,
    issue,
    key,
    seal,
    set_validator,
    take,
)

from broker import cli
from broker.ledger import limits, proving
from broker.ledger.client import (
    BlockApplied,
    ConsistencyProven,
    Event,
    LedgerClient,
    LedgerFault,
    NotProven,
    OperationProven,
    TooManyPending,
)
from broker.ledger.embedded import EmbeddedLedger
from broker.ledger.engine import BUSY
from broker.ledger.gateway import Gateway, Outgoing
from broker.ledger.limits import MAX_PROOF_REQUESTS, PROOF_TIMEOUT_S, RESEND_AFTER_S
from broker.ledger.operations import Void, encode_operation
from broker.ledger.receipts import ProofFailed, verify_checkpoint
from broker.ledger.rules.validators import first_set
from broker.ledger.store import LedgerError
from broker.ledger.trust import read_trust, trust_of
from broker.ledger.validator_set import sets_after
from broker.ledger.verify import verify_ledger
from broker.protocol import envelope
from broker.protocol.errors import BadSignature, ProtocolError, UnknownKey
from broker.protocol.messages import Block, Checkpoint, NamedKey, Page, Query, QueryKind, Witness
from broker.protocol.topics import Topics

REGISTRARS = {key("registrar").public.key_id: envelope.Signer("registrar", key("registrar").public)}
ADD = (set_validator("late", 1),)
REMOVE = (set_validator("node", 0, 2),)


class Desk:
    """An engine with its gateway, and a party that follows it; everything in one place, without a wire."""

    def __init__(self, path: Path, name: str = "node") -> None:
        self.path = path
        self.now_s = 0.0
        self.open(name)
        self.client = LedgerClient(GENESIS, "b1", key("b1"), counting_bytes())

    def open(self, name: str) -> None:
        self.engine = EmbeddedLedger(self.path, GENESIS, name, key(name))
        self.gateway = Gateway(self.engine, Topics(), name, key(name))

    def close(self) -> None:
        self.gateway.close()
        self.engine.close()

    def follow(self, client: LedgerClient) -> list[Event]:
        """Let another client follow until nobody has anything to say."""
        self.client = client
        self.settle()
        return client.events()

    def say(self, *raws: bytes) -> list[Outgoing]:
        for raw in raws:
            assert self.engine.submit(raw) is None
        return self.gateway.commit()

    def settle(self, messages: list[Outgoing] | None = None) -> None:
        """Hand over messages and all that follows on them. What is not understood is dropped, as the shell does."""
        messages = [*(messages or []), *self.gateway.start()]
        for _ in range(20):
            for message in messages:
                levels = Topics().split(message.topic)
                if levels[2] != "result" or levels[3] == "b1":
                    try:
                        self.client.on_message(levels[2], message.payload)
                    except UnknownKey:
                        continue
            self.now_s += RESEND_AFTER_S
            messages = [out for payload in self.client.tick(self.now_s) for out in self.gateway.on_message(payload)]
            if not messages:
                return
        raise AssertionError("gateway and client never come to rest")


def faults(events: list[Event]) -> list[Event]:
    return [event for event in events if isinstance(event, LedgerFault)]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    found(tmp_path / "ledger").close()
    made = Desk(tmp_path / "ledger")
    yield made
    made.close()


def hand_over(desk: Desk) -> None:
    """`late` becomes a validator, `node` goes, and `late` runs the ledger from there on."""
    desk.say(batch(*ADD))
    desk.say(batch(*REMOVE))
    desk.close()
    desk.open("late")


# Following


def test_a_client_follows_the_change_through_the_blocks(desk: Desk) -> None:
    desk.settle()
    desk.settle(desk.say(batch(*ADD)))
    (block, *_) = desk.say(batch(*REMOVE))
    desk.client.on_message("feed", block.payload)
    desk.close()
    desk.open("late")
    desk.settle(desk.say(batch(Void(b"v" * 16), by="b2")))
    events = desk.client.events()
    assert faults(events) == []
    assert desk.client.height == desk.engine.height == 5
    assert verify_ledger(desk.path).errors == ()
    # The one who went is not believed any more.
    head = desk.engine.head.checkpoint()
    with pytest.raises(UnknownKey):
        desk.client.on_message("checkpoint", seal(head, "node"))
    other = seal(Checkpoint(5, b"x" * 32, head.tree_size, head.root, head.state_hash), "node")
    with pytest.raises(UnknownKey):
        desk.client.on_witness(seal(Witness(other), "b2"))
    assert desk.client.events() == []
    desk.client.on_witness(seal(Witness(seal(head, "late")), "b2"))


def test_a_change_in_a_batch_of_ones_own_counts_too(desk: Desk) -> None:
    desk.settle()
    desk.client.submit(batch(Void(b"v" * 16), *ADD))
    desk.settle()
    desk.settle(desk.gateway.commit())
    assert desk.client.pending == 0
    assert set(desk.client._validators) == {key("node").public.key_id, key("late").public.key_id}


def test_a_client_that_begins_later_is_given_the_changes(desk: Desk) -> None:
    hand_over(desk)
    late = desk.follow(LedgerClient(GENESIS, "b1", key("b1"), counting_bytes()))
    assert faults(late) == []
    assert desk.client.loaded
    assert desk.client.height == desk.engine.height
    # And one that wants the whole history: its first blocks are sealed by somebody who is no validator any more.
    whole = desk.follow(LedgerClient(GENESIS, "b1", key("b1"), counting_bytes(), load_holdings=False))
    assert [event.height for event in whole if isinstance(event, BlockApplied)] == [1, 2, 3, 4]


def test_a_client_that_was_away_catches_up_over_the_change(desk: Desk) -> None:
    desk.settle()
    cursor = desk.client.height, desk.client.block_id
    hand_over(desk)
    desk.say(batch(Void(b"v" * 16), by="b2"))
    events = desk.follow(LedgerClient(GENESIS, "b1", key("b1"), counting_bytes(), resume=cursor))
    assert [event.height for event in events if isinstance(event, BlockApplied)] == [3, 4, 5]
    assert faults(events) == []


def test_more_changes_than_a_page_holds(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proving, "MAX_CHANGES_ON_PAGE", 1)
    hand_over(desk)
    desk.say(batch(set_validator("third", 5, 3)))
    desk.follow(LedgerClient(GENESIS, "b1", key("b1"), counting_bytes()))
    assert desk.client.height == desk.engine.height
    assert set(desk.client._validators) == {key("late").public.key_id, key("third").public.key_id}


def test_only_registrars_change_who_is_believed(desk: Desk) -> None:
    desk.settle()
    (query,) = [Query(b"q" * 8, QueryKind.VALIDATORS, place=0)]
    forged = encode_operation(set_validator("mallory", 1, by=("b2",)))
    sound = encode_operation(set_validator("late", 1))
    with pytest.raises(UnknownKey):
        desk.client.on_message("checkpoint", seal(desk.engine.head.checkpoint(), "late"))
    (raw,) = desk.client.tick(desk.now_s + RESEND_AFTER_S)
    asked = Query.from_payload(envelope.parse(raw).payload)
    assert (asked.kind, asked.place) == (QueryKind.VALIDATORS, 0)
    for page, by in (
        (Page(asked.request_id, asked.kind, 2, (forged,)), "mallory"),
        (Page(asked.request_id, asked.kind, 2, (forged,)), "node"),
        (Page(asked.request_id, asked.kind, 2, (encode_operation(Void(b"v" * 16)),)), "node"),
        (Page(asked.request_id, asked.kind, 2, ()), "mallory"),
        (Page(query.request_id, asked.kind, 2, (sound,)), "late"),
        (Page(asked.request_id, QueryKind.BLOCKS, 2, (sound,)), "late"),
    ):
        with pytest.raises(ProtocolError):
            desk.client.on_message("result", seal(page, by))
        assert set(desk.client._validators) == {key("node").public.key_id}
    # What the registrars signed counts, whoever hands it over, here a validator that is one because of it.
    desk.client.on_message("result", seal(Page(asked.request_id, asked.kind, 2, (sound,)), "late"))
    assert set(desk.client._validators) == {key("node").public.key_id, key("late").public.key_id}


def test_a_block_with_a_change_that_registrars_did_not_sign_stops_the_client(desk: Desk) -> None:
    desk.settle()
    desk.client.events()
    forged = batch(set_validator("mallory", 1, by=("b2",)), by="b2")
    block = Block(desk.client.height + 1, desk.client.block_id, (forged,), 12, b"r" * 32, b"s" * 32)
    desk.client.on_message("feed", seal(block, "node"))
    (fault,) = desk.client.events()
    assert isinstance(fault, LedgerFault)


def test_a_nodes_own_party_takes_blocks_under_a_seal_that_is_no_validators(desk: Desk) -> None:
    """A node need not be a validator. What it says goes to its own broker only, and never counts as evidence."""
    desk.settle()
    desk.client.events()
    head = desk.client.height, desk.client.block_id
    block = Block(head[0] + 1, head[1], (batch(Void(b"v" * 16), by="b2"),), 12, b"r" * 32, b"s" * 32)
    raw = seal(block, "observer")
    with pytest.raises(UnknownKey):
        desk.client.on_message("feed", raw)
    desk.client.on_message("feed", raw, own_node=True)
    assert desk.client.height == head[0] + 1
    assert faults(desk.client.events()) == []
    said = Checkpoint(block.height, desk.client.block_id, 12, b"r" * 32, b"s" * 32)
    witnessed = desk.client.witnessed
    desk.client.on_message("checkpoint", seal(said, "observer"), own_node=True)
    assert desk.client.witnessed == witnessed, "only what a validator signed is worth showing to others"
    with pytest.raises(BadSignature):
        desk.client.on_message("feed", seal(block, "node")[:-1] + b"x", own_node=True)
    following = Block(head[0] + 2, b"x" * 32, (batch(Void(b"w" * 16), by="b2"),), 12, b"r" * 32, b"s" * 32)
    desk.client.on_message("feed", seal(following, "observer"), own_node=True)
    (fault,) = desk.client.events()
    assert isinstance(fault, LedgerFault)
    assert fault.evidence is None


# The engine


def test_an_engine_whose_validator_has_gone_seals_no_more_blocks(desk: Desk) -> None:
    answers = desk.say(batch(*ADD), batch(*REMOVE))
    assert desk.engine.height == 3
    assert len(answers) == 4, "a block, two answers, a checkpoint"
    refused = desk.engine
    assert refused.submit(batch(Void(b"v" * 16))) is None
    (result,) = refused.commit().results
    assert result.result.reason is not None
    assert result.result.reason.startswith(f"{BUSY}: node is no validator")
    assert refused.height == 3
    desk.close()
    with pytest.raises(LedgerError, match="node is no validator of ledger test-ledger with this key"):
        desk.open("node")
    desk.open("late")
    assert verify_ledger(desk.path).errors == ()


# Sets and trust files


def test_sets_follow_from_what_registrars_signed() -> None:
    first = first_set(GENESIS.validators)
    changes = [encode_operation(set_validator("late", 3)), encode_operation(set_validator("node", 0, 2))]
    sets = sets_after(first, changes, LEDGER, REGISTRARS)
    assert [(each.sequence, [validator[::2] for validator in each.validators]) for each in sets] == [
        (1, [("late", 3), ("node", 1)]),
        (2, [("late", 3)]),
    ]
    assert sets_after(sets[0], changes, LEDGER, REGISTRARS) == sets[1:], "what is known is passed over"
    for unsound in (
        changes[1:],
        [encode_operation(set_validator("late", 3, by=("b2",)))],
        [encode_operation(set_validator("nobody", 0))],
        [b"\x82\x0e\x80"],
    ):
        with pytest.raises(ProtocolError):
            sets_after(first, unsound, LEDGER, REGISTRARS)
    with pytest.raises(ProtocolError):
        sets_after(first, changes, "another-ledger", REGISTRARS)


def test_the_rules_keep_each_change_as_it_was_signed() -> None:
    founded = genesis(
        registrars=tuple(NamedKey(name, key(name).public.cose_key) for name in ("registrar", "second", "third"))
    )
    world = World.set_up(founded)
    by = ("third", "registrar")
    operation = set_validator("late", 1, by=by)
    world.apply(operation)
    from broker.ledger.validator_set import changes_since

    assert list(changes_since(world.state, 0)) == [encode_operation(operation)]
    assert list(changes_since(world.state, 1)) == []


def test_a_trust_file_of_the_head_names_those_who_sign_now(
    desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hand_over(desk)
    desk.say(batch(set_validator("third", 7, 3)))
    assert cli.main(["ledger", "trust", "--path", str(desk.path)]) == 0
    text = capsys.readouterr().out
    said = json.loads(text)
    assert (said["from_height"], said["sequence"], said["powers"]) == (5, 3, {"late": 1, "third": 7})
    trust = read_trust(text)
    assert set(trust.validators) == {key("late").public.key_id, key("third").public.key_id}
    assert [validator.power for validator in trust.now.validators] == [1, 7]
    of_genesis = read_trust(json.dumps(trust_of(GENESIS)))
    (proof_file, trust_file) = tmp_path / "proof", tmp_path / "trust.json"
    assert cli.main(["ledger", "prove", str(desk.path), "--leaf", "3", "--out", str(proof_file)]) == 0
    trust_file.write_text(text)
    assert cli.main(["ledger", "check-proof", str(proof_file), "--trust", str(trust_file)]) == 0
    trust_file.write_text(json.dumps(trust_of(GENESIS)))
    assert cli.main(["ledger", "check-proof", str(proof_file), "--trust", str(trust_file)]) != 0
    # Whom somebody trusts from a height on need not have been honest before.
    checkpoint = desk.engine.head.checkpoint()
    early = Checkpoint(4, checkpoint.block_id, checkpoint.tree_size, checkpoint.root, checkpoint.state_hash)
    with pytest.raises(ProofFailed, match="use an older trust file"):
        verify_checkpoint(seal(early, "late"), trust)
    with pytest.raises(UnknownKey):
        verify_checkpoint(seal(early, "late"), of_genesis)


@pytest.mark.parametrize(
    "changes",
    [
        {"powers": {"node": 0}},
        {"powers": {"node": 1_001}},
        {"powers": {"node": True}},
        {"powers": {"other": 1}},
        {"powers": []},
        {"sequence": -1},
        {"from_height": "5"},
    ],
)
def test_a_trust_file_with_unsound_numbers_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="trust file"):
        read_trust(json.dumps(trust_of(GENESIS) | changes))


def test_a_trust_file_without_powers_means_the_genesis() -> None:
    old = {
        name: value for name, value in trust_of(GENESIS).items() if name not in ("powers", "sequence", "from_height")
    }
    assert read_trust(json.dumps(old)) == read_trust(json.dumps(trust_of(GENESIS)))


# Proofs on request


def stocked(desk: Desk) -> None:
    desk.settle(desk.say(batch(issue("solar-1", 100), take("solar-1", 0, 100))))
    desk.client.events()


def test_a_client_asks_for_the_proof_of_an_operation(desk: Desk) -> None:
    stocked(desk)
    request_id = desk.client.prove_operation(10)
    desk.settle()
    (event,) = desk.client.events()
    assert isinstance(event, OperationProven)
    assert (event.request_id, event.checkpoint) == (request_id, desk.engine.head.checkpoint())
    assert [proven.leaf for proven in event.proof.operations] == [10]
    missing = desk.client.prove_operation(99)
    desk.settle()
    assert desk.client.events() == [NotProven(missing, answered=True)]


def test_a_client_asks_whether_the_ledger_goes_on(desk: Desk) -> None:
    older = desk.engine.checkpoint()
    stocked(desk)
    request_id = desk.client.prove_consistency(older)
    desk.settle()
    (event,) = desk.client.events()
    assert isinstance(event, ConsistencyProven)
    assert (event.request_id, event.older.height, event.newer.height) == (request_id, 2, 3)
    with pytest.raises(UnknownKey):
        desk.client.prove_consistency(seal(event.older, "stranger"))


def test_requests_are_sent_again_and_given_up_in_time(desk: Desk) -> None:
    desk.settle()
    desk.client.events()
    start_s = desk.now_s + 100.0
    request_id = desk.client.prove_operation(0)
    (first,) = desk.client.tick(start_s)
    assert desk.client.tick(start_s + RESEND_AFTER_S / 2) == []
    assert desk.client.tick(start_s + RESEND_AFTER_S) == [first]
    desk.client.on_connect()
    assert desk.client.tick(start_s + RESEND_AFTER_S) == [first]
    assert desk.client.tick(start_s + PROOF_TIMEOUT_S) == []
    assert desk.client.events() == [NotProven(request_id, answered=False)]
    (answer,) = desk.gateway.on_message(first)
    desk.client.on_message("result", answer.payload)
    assert desk.client.events() == [], "too late"
    for number in range(MAX_PROOF_REQUESTS):
        desk.client.prove_operation(number)
    with pytest.raises(TooManyPending):
        desk.client.prove_operation(0)
    assert limits.MAX_PROOF_REQUESTS == MAX_PROOF_REQUESTS


def test_an_answer_that_does_not_hold_is_no_answer(desk: Desk) -> None:
    older = desk.engine.checkpoint()
    stocked(desk)
    for kind in (QueryKind.OPERATION, QueryKind.CONSISTENCY):
        operation = kind is QueryKind.OPERATION
        request_id = desk.client.prove_operation(10) if operation else desk.client.prove_consistency(older)
        (answer,) = desk.gateway.on_message(desk.client.tick(desk.now_s)[0])
        page = Page.from_payload(envelope.parse(answer.payload).payload)
        other = desk.engine.prove(QueryKind.OPERATION, 9)
        for entries in (other, (page.entries[0][:-1] + b"x", *page.entries[1:]), page.entries * 2):
            if entries == page.entries * 2 and page.kind is QueryKind.OPERATION:
                continue  # What stands behind the proof is not looked at.
            with pytest.raises(ProtocolError):
                desk.client.on_message("result", seal(Page(request_id, page.kind, 3, entries), "node"))
        assert desk.client.events() == []
        desk.client.on_message("result", answer.payload)
        (event,) = desk.client.events()
        assert isinstance(event, (OperationProven, ConsistencyProven))


def test_a_proof_of_another_history_stops_the_client(desk: Desk, tmp_path: Path) -> None:
    stocked(desk)
    other = found(tmp_path / "other")
    assert other.submit(batch(issue("solar-1", 99), take("solar-1", 0, 99))) is None
    other.commit()
    request_id = desk.client.prove_operation(10)
    page = Page(request_id, QueryKind.OPERATION, 3, other.prove(QueryKind.OPERATION, 10))
    other.close()
    desk.client.on_message("result", seal(page, "node"))
    proven, fault = desk.client.events()
    assert isinstance(proven, OperationProven)
    assert isinstance(fault, LedgerFault)
    assert fault.evidence is not None
    assert fault.evidence.check(read_trust(json.dumps(trust_of(GENESIS))))
