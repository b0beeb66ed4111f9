"""A party's own copy of a remote ledger: whole, checked block by block, and going on where it was left."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.ledger_world import (
    GENESIS,
    INTERVAL_S,
    LEDGER,
    T0,
    batch,
    close,
    counting_bytes,
    deliver,
    found,
    genesis,
    issue,
    key,
    seal,
    set_validator,
    take,
)

from broker.ledger import gateway as gateway_module
from broker.ledger.chain import block_id_of
from broker.ledger.compare import Verdict, compare_ledgers
from broker.ledger.copying import LedgerCopy, OldAnswer
from broker.ledger.embedded import EmbeddedLedger
from broker.ledger.gateway import Gateway
from broker.ledger.limits import RESEND_AFTER_S
from broker.ledger.store import LedgerError
from broker.ledger.verify import verify_ledger
from broker.protocol import envelope
from broker.protocol.errors import MalformedMessage, ProtocolError, UnknownKey
from broker.protocol.messages import Block, Page, QueryKind
from broker.protocol.topics import Topics

Change = Callable[[Page], Page | None]


class Host:
    """A ledger behind a gateway, and b2, which copies it. The first batches register b1 and b2."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engine: EmbeddedLedger = found(folder / "ledger")
        self.sealer = "node"
        self.now_s = 0.0
        self.asked: list[QueryKind] = []
        self.copy = self.open()

    def open(self, followed: tuple[int, bytes] | None = None) -> LedgerCopy:
        return LedgerCopy(self.folder / "copy", GENESIS, "b2", key("b2"), counting_bytes(), followed)

    def reopen(self) -> None:
        self.copy.close()
        self.copy = self.open()

    def close(self) -> None:
        self.copy.close()
        self.engine.close()

    def hand_over_to(self, validator: str) -> None:
        self.engine.close()
        self.sealer = validator
        self.engine = EmbeddedLedger(self.folder / "ledger", GENESIS, validator, key(validator))

    def put(self, *batches: bytes) -> None:
        """Each batch becomes a block."""
        for raw in batches:
            assert self.engine.submit(raw) is None
            assert len(self.engine.commit().blocks) == 1

    def trade(self, intervals: int, first: int = 0) -> None:
        for number in range(first, first + intervals):
            start_s = T0 + number * INTERVAL_S
            self.put(
                batch(issue("solar-1", 900, start_s), take("solar-1", 0, 900, start_s=start_s)),
                batch(
                    deliver(number, 50, ("solar-1", 0, 50), start_s=start_s), close(start_s, end_s=start_s + INTERVAL_S)
                ),
            )

    def answers(self, change: Change = lambda page: page) -> list[bytes]:
        """What the host says to all that is asked now, each page changed and sealed again."""
        gateway = Gateway(self.engine, Topics(), self.sealer, key(self.sealer))
        said = []
        for query in self.copy.tick(self.now_s):
            for outgoing in gateway.on_message(query):
                signer = envelope.Signer(self.sealer, key(self.sealer).public)
                opened = envelope.open_envelope(outgoing.payload, LEDGER, lambda _, signer=signer: signer)
                assert isinstance(opened.message, Page)
                self.asked.append(opened.message.kind)
                changed = change(opened.message)
                if changed is not None:
                    said.append(envelope.seal(changed, key(self.sealer), LEDGER, self.sealer))
        gateway.close()
        self.now_s += RESEND_AFTER_S
        return said

    def run(self, change: Change = lambda page: page, turns: int = 1_000) -> None:
        for _ in range(turns):
            if self.copy.done:
                return
            for payload in self.answers(change):
                self.copy.on_result(payload)
        raise AssertionError("the copy is not done")

    def same(self) -> None:
        """The copy holds by itself, and is the host's ledger, state, nodes and all."""
        report = verify_ledger(self.folder / "copy", helpers=0)
        assert report.ok, report.errors
        assert report.height == self.engine.height
        assert compare_ledgers(self.folder / "copy", self.folder / "ledger").verdict is Verdict.SAME


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    yield made
    made.close()


def blocks_only(change: Callable[[Page], Page | None]) -> Change:
    return lambda page: change(page) if page.kind is QueryKind.BLOCKS else page


def test_a_copy_is_the_whole_ledger_and_goes_on_where_it_was_left(host: Host) -> None:
    host.trade(3)
    host.run()
    host.same()
    host.reopen()
    host.asked.clear()
    host.run()
    assert host.asked == [QueryKind.VALIDATORS, QueryKind.OPERATION], "there was nothing new"
    host.trade(2, first=3)
    host.reopen()
    host.run()
    host.same()


def test_a_long_ledger_comes_in_many_pages_and_may_be_interrupted(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_module, "MAX_BLOCK_BYTES", 2_000)
    host.trade(6)
    for _ in range(5):
        for payload in host.answers():
            host.copy.on_result(payload)
    assert 0 < host.copy.height < host.engine.height
    host.reopen()
    host.run()
    host.same()
    assert host.asked.count(QueryKind.BLOCKS) >= 5


def test_what_there_is_of_a_copy_that_is_being_brought_up_to_date_verifies(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head that was signed when it was last done is none of its blocks' any more."""
    monkeypatch.setattr(gateway_module, "MAX_BLOCK_BYTES", 2_000)
    host.trade(2)
    host.run()
    done = host.copy.height
    host.reopen()
    host.trade(6, first=2)
    while host.copy.height == done:
        for payload in host.answers():
            host.copy.on_result(payload)
    assert host.copy.height < host.engine.height
    report = verify_ledger(host.folder / "copy", helpers=0)
    assert (report.errors, report.height) == ((), host.copy.height)


def test_a_ledger_that_goes_on_meanwhile_is_copied_up_to_the_head_that_was_signed_first(host: Host) -> None:
    host.trade(1)
    height = host.engine.height

    def go_on(page: Page) -> Page:
        if page.kind is QueryKind.OPERATION:
            host.trade(1, first=1)
        return page

    host.run(go_on)
    assert host.copy.height == height < host.engine.height
    assert verify_ledger(host.folder / "copy", helpers=0).ok


def test_validators_that_came_later_are_known_before_their_blocks(host: Host) -> None:
    host.trade(1)
    host.put(batch(set_validator("late", 1)), batch(set_validator("node", 0, 2)))
    host.hand_over_to("late")
    host.trade(1, first=1)
    host.run()
    host.same()


def test_what_is_lost_is_asked_for_again(host: Host) -> None:
    host.trade(1)
    assert len(host.copy.tick(0.0)) == 1
    assert host.copy.tick(RESEND_AFTER_S / 2) == []
    assert len(host.copy.tick(RESEND_AFTER_S)) == 1
    assert host.copy.tick(RESEND_AFTER_S + 0.1) == []
    host.copy.reconnected()
    assert len(host.copy.tick(RESEND_AFTER_S + 0.1)) == 1


def test_answers_to_others_questions_are_passed_over(host: Host) -> None:
    host.trade(1)
    assert host.answers(lambda page: Page(b"another.", page.kind, page.height, page.entries)) != []
    for payload in host.answers(lambda page: Page(b"another.", page.kind, page.height, page.entries)):
        host.copy.on_result(payload)
    assert host.copy.height == 0
    host.copy.on_result(seal(Block(1, b"p" * 32, (), 0, b"r" * 32, b"s" * 32), "node"))
    host.run()
    host.same()


def test_a_stranger_is_not_believed(host: Host) -> None:
    host.trade(1)
    for payload in host.answers():
        host.copy.on_result(payload)
    host.sealer = "mallory"
    (payload,) = host.answers()
    with pytest.raises(UnknownKey):
        host.copy.on_result(payload)
    host.sealer = "node"
    host.run()
    host.same()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda page: Page(page.request_id, page.kind, page.height, ()),
        lambda page: Page(page.request_id, page.kind, page.height, page.entries[1:]),
        lambda page: Page(page.request_id, page.kind, page.height, (page.entries[0], page.entries[0])),
        lambda page: Page(page.request_id, page.kind, page.height, (b"\xa0", *page.entries)),
    ],
    ids=["nothing", "the first is missing", "one twice", "no block"],
)
def test_a_page_of_other_blocks_changes_nothing_and_is_asked_for_again(host: Host, wrong: Change) -> None:
    host.trade(1)
    with pytest.raises(MalformedMessage):
        host.run(blocks_only(wrong))
    assert host.copy.height == 0
    host.run()
    host.same()


def test_a_proof_that_is_none_is_asked_for_again(host: Host) -> None:
    host.trade(1)

    def without(page: Page) -> Page:
        return Page(page.request_id, page.kind, page.height, ()) if page.kind is QueryKind.OPERATION else page

    with pytest.raises(ProtocolError, match="proof of the ledger's first operation"):
        host.run(without)
    host.run()
    host.same()


def forged(raw: bytes, **changes: object) -> bytes:
    """A block that the validator sealed, and that no honest one would have."""
    block = Block.from_payload(envelope.parse(raw).payload)
    values = {name: getattr(block, name) for name in Block.__slots__ if hasattr(block, name)}
    return seal(Block(**{**values, **changes}), "node")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"previous": b"p" * 32}, "there are two histories"),
        ({"state_hash": b"s" * 32}, "another state than its operations make"),
        ({"root": b"r" * 32}, "another state than its operations make"),
        ({"batches": (batch(issue("solar-1", 900, by="wind-1")),)}, "does not keep the ledger's rules"),
    ],
)
def test_blocks_that_a_validator_sealed_and_that_do_not_hold_stop_it(
    host: Host, changes: dict[str, object], reason: str
) -> None:
    host.trade(1)

    def wrong(page: Page) -> Page:
        entries = (*page.entries[:-1], forged(page.entries[-1], **changes))
        return Page(page.request_id, page.kind, page.height, entries)

    with pytest.raises(LedgerError, match=reason):
        host.run(blocks_only(wrong))
    assert host.copy.height == 0
    assert not host.copy.done


def test_another_head_than_the_blocks_lead_to_stops_it(host: Host, tmp_path: Path) -> None:
    """The proof is of a second history that the same validator keeps."""
    host.trade(1)
    other = Host(tmp_path / "other")
    other.put(batch(issue("wind-1", 1)), batch(close()))
    assert other.engine.height == host.engine.height
    proof = other.engine.prove(QueryKind.OPERATION, 0)
    other.close()

    def wrong(page: Page) -> Page:
        entries = proof if page.kind is QueryKind.OPERATION else page.entries
        return Page(page.request_id, page.kind, page.height, entries)

    with pytest.raises(LedgerError, match="the signed head of height 4 is another than its blocks lead to"):
        host.run(wrong)


def test_a_ledger_that_has_lost_blocks_is_told(host: Host, tmp_path: Path) -> None:
    host.trade(1)
    proof = host.engine.prove(QueryKind.OPERATION, 0)
    host.trade(1, first=1)
    host.run()
    host.reopen()

    def older(page: Page) -> Page:
        entries = proof if page.kind is QueryKind.OPERATION else page.entries
        return Page(page.request_id, page.kind, page.height, entries)

    with pytest.raises(LedgerError, match="it has lost blocks"):
        host.run(older)


def test_a_ledger_that_has_not_got_as_far_as_its_party_has_seen_is_told(host: Host) -> None:
    host.trade(1)
    host.copy.close()
    host.copy = host.open(followed=(host.engine.height + 1, b"i" * 32))
    with pytest.raises(LedgerError, match=r"the ledger was at height 5, .* it has lost blocks"):
        host.run()


def test_where_there_are_several_nodes_one_that_is_behind_is_asked_again_after_a_while(host: Host) -> None:
    host.put(batch(set_validator("late", 1)))
    host.trade(1)
    proof = host.engine.prove(QueryKind.OPERATION, 0)
    host.trade(1, first=1)
    host.copy.close()
    host.copy = host.open(followed=(host.engine.height, block_id_of(list(host.engine.blocks(1))[-1])))

    def older(page: Page) -> Page:
        entries = proof if page.kind is QueryKind.OPERATION else page.entries
        return Page(page.request_id, page.kind, page.height, entries)

    with pytest.raises(OldAnswer, match="the node that answers is at height 5, and 7 was seen before"):
        host.run(older)
    assert host.copy.tick(host.now_s - RESEND_AFTER_S) == [], "not at once"
    host.run()
    host.same()


def test_another_history_than_the_one_that_its_party_follows_is_not_copied(host: Host) -> None:
    host.trade(1)
    host.copy.close()
    host.copy = host.open(followed=(3, b"i" * 32))
    with pytest.raises(LedgerError, match="block 3 is another one than this broker has followed"):
        host.run()
    assert host.copy.height == 0


def test_a_copy_of_another_history_than_the_one_that_its_party_follows_is_not_gone_on_with(host: Host) -> None:
    host.trade(1)
    host.run()
    host.copy.close()
    with pytest.raises(LedgerError, match="block 3 is another one than this broker has followed"):
        host.open(followed=(3, b"i" * 32))
    host.copy = host.open()


def test_a_directory_in_use_or_of_another_ledger_is_refused(host: Host) -> None:
    with pytest.raises(LedgerError, match="in use"):
        host.open()
    host.copy.close()
    with pytest.raises(LedgerError, match="founded on another genesis"):
        LedgerCopy(host.folder / "copy", genesis(currency="GBP"), "b2", key("b2"), counting_bytes())
    host.copy = host.open()
