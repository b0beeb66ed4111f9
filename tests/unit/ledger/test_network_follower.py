"""How a broker follows a network through nodes that fail, lag, are full or lie: `cometbft.follower`, turn by turn."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ledger_world as world
from support.comet_network import FakeNetwork, FakeNode

from broker.ledger.cometbft import follower as following
from broker.ledger.cometbft import queries
from broker.ledger.cometbft.follower import BlocksFrom, BlocksPage, DeviceOf, Follower, HoldingsOf, News, SignerOf
from broker.ledger.engine import HoldingsPage
from broker.protocol import cbor, envelope
from broker.protocol.envelope import Signer
from broker.protocol.messages import Block, ResultStatus

B1, B2 = world.SET_UP
OWN = Signer("b1", world.key("b1").public)


@pytest.fixture
def network(tmp_path: Path) -> Iterator[FakeNetwork]:
    made = FakeNetwork(tmp_path, "v1", "v2", "v3", "v4")
    yield made
    made.close()


class Desk:
    """A follower and the time that it is told."""

    def __init__(self, network: FakeNetwork, *names: int, own: Signer | None = OWN, known_height: int = 0) -> None:
        self.nodes = [network.nodes[number] for number in names]
        self.follower = Follower(network.genesis, self.nodes, own, known_height)
        self.now_s = 100.0

    def turn(self, *batches: bytes, after_s: float = 0.1, ask: tuple[following.Question, ...] = ()) -> News:
        self.now_s += after_s
        return self.follower.turn(self.now_s, batches, ask)


def heights(news: News) -> list[int]:
    return [Block.from_payload(envelope.parse(raw).payload).height for raw in news.blocks]


def issue(number: int, energy_wh: int = 100) -> bytes:
    return world.batch(world.issue("solar-1", energy_wh, world.T0 + number * world.INTERVAL_S))


def test_a_batch_is_handed_in_and_its_block_result_and_checkpoint_come(network: FakeNetwork) -> None:
    desk = Desk(network, 0)
    assert not desk.turn(B1)
    network.make_block()
    news = desk.turn()
    assert heights(news) == [1]
    (answer,) = news.results
    assert answer.client == "b1"
    assert (answer.result.status, answer.result.height) == (ResultStatus.COMMITTED, 1)
    assert answer.result.batch_id == envelope.sealed_id(B1, world.LEDGER, "b1")
    assert news.checkpoint is not None
    assert desk.follower.pending == 0


def test_blocks_of_others_come_too(network: FakeNetwork) -> None:
    desk, other = Desk(network, 0), Desk(network, 1)
    desk.turn()
    other.turn(B1)
    network.make_block()
    news = desk.turn()
    assert heights(news) == [1]
    assert news.results == []


def test_it_begins_with_the_next_block_and_not_with_the_first(network: FakeNetwork) -> None:
    Desk(network, 0).turn(B1)
    network.make_block()
    late = Desk(network, 1)
    assert heights(late.turn()) == []
    Desk(network, 0).turn(B2)
    network.make_block()
    assert heights(late.turn()) == [2]


def test_a_refusal_is_told_with_its_fault(network: FakeNetwork) -> None:
    desk = Desk(network, 0)
    desk.turn(B1)
    network.make_block()
    desk.turn()
    wrong = issue(0, energy_wh=10**9)
    desk.turn(wrong)
    network.make_block()
    (answer,) = desk.turn().results
    assert answer.result.status is ResultStatus.REFUSED
    assert answer.result.operation == 0
    assert answer.result.reason is not None
    assert answer.result.reason.startswith("above_capacity: ")


def test_a_batch_that_is_handed_in_again_does_not_hear_its_old_refusal(network: FakeNetwork) -> None:
    desk = Desk(network, 0)
    desk.turn(B1)
    early = world.batch(world.take("solar-1", 0, 50))
    desk.turn(early)
    network.make_block()
    assert [answer.result.status for answer in desk.turn().results] == [ResultStatus.COMMITTED]
    desk.turn(early)
    network.make_block()
    assert [answer.result.status for answer in desk.turn().results] == [ResultStatus.REFUSED]
    desk.turn(issue(0))
    desk.turn(early)
    network.make_block()
    statuses = [answer.result.status for _ in range(3) for answer in desk.turn().results]
    assert statuses == [ResultStatus.COMMITTED, ResultStatus.COMMITTED]


def test_a_batch_from_before_a_restart_is_confirmed_without_a_new_block(network: FakeNetwork) -> None:
    Desk(network, 0).turn(B1)
    network.make_block()
    again = Desk(network, 1)
    (answer,) = again.turn(B1).results
    assert answer.result.height == 1


def test_a_batch_stays_until_it_stands_in_a_block_and_is_handed_in_again_meanwhile(network: FakeNetwork) -> None:
    desk = Desk(network, 0)
    desk.turn(B1)
    for _ in range(3):
        desk.turn(B1)
    assert network.nodes[0].given == [B1]
    desk.turn(after_s=following.HAND_IN_AGAIN_S)
    assert network.nodes[0].given == [B1, B1]
    assert network.mempool == [B1]


def test_when_a_node_goes_the_next_one_gets_everything_in_order(network: FakeNetwork) -> None:
    desk = Desk(network, 0, 1)
    desk.turn(B1)
    network.make_block()
    desk.turn()
    first, second, third = issue(0), world.batch(world.take("solar-1", 0, 50)), issue(1)
    network.nodes[0].cut_off = True  # It takes them, and they are gone with it.
    desk.turn(first, second)
    network.nodes[0].down = True
    desk.turn(third)
    assert network.nodes[1].given == [first, second, third]
    network.make_block()
    assert [answer.result.status for answer in desk.turn().results] == [ResultStatus.COMMITTED] * 3


def test_a_node_that_is_away_is_asked_less_and_less_often_and_welcome_when_back(
    network: FakeNetwork, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    desk = Desk(network, 0)
    network.nodes[0].down = True
    tried = 0
    for _ in range(100):
        before = network.nodes[0].asked
        desk.turn(B1)
        tried += network.nodes[0].asked - before
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    network.nodes[0].down = False
    desk.turn(after_s=max(following.BACK_OFF_S))
    assert network.mempool == [B1]
    assert "answers again" in caplog.messages[-1]


def test_a_node_that_is_behind_is_passed_over(network: FakeNetwork) -> None:
    desk = Desk(network, 0, 1)
    desk.turn(B1)
    network.nodes[1].cut_off = True
    network.make_block()
    assert heights(desk.turn()) == [1]
    network.nodes[0].down = True
    assert not desk.turn(ask=(BlocksFrom(1),))
    network.nodes[1].cut_off = False
    network.nodes[1].catch_up()
    news = desk.turn(after_s=1.0)
    assert isinstance(news.answers[BlocksFrom(1)], BlocksPage)
    assert news.blocks == []


def test_a_node_that_an_earlier_run_knows_to_be_behind_is_passed_over(network: FakeNetwork) -> None:
    desk = Desk(network, 0, known_height=1)
    assert not desk.turn(ask=(SignerOf(OWN.key.key_id),))
    Desk(network, 0).turn(B1)
    network.make_block()
    assert desk.turn(after_s=1.0).answers


def test_a_node_whose_blocks_do_not_follow_is_passed_over_loudly(
    network: FakeNetwork, caplog: pytest.LogCaptureFixture
) -> None:
    desk = Desk(network, 0, 1)
    desk.turn(B1)
    network.make_block()
    forged = envelope.seal(Block(1, b"x" * 32, (B1,), 9, b"r" * 32, b"s" * 32), world.key("v1"), world.LEDGER, "v1")
    network.nodes[0].forged["/blocks"] = cbor.encode([1, [forged]])
    news = desk.turn()
    assert heights(news) == [1]
    assert forged not in news.blocks
    assert any(record.levelname == "ERROR" and "does not follow" in record.message for record in caplog.records)


def test_a_node_of_another_ledger_is_passed_over_loudly(network: FakeNetwork, caplog: pytest.LogCaptureFixture) -> None:
    network.nodes[0].forged["/genesis"] = world.genesis(currency="JPY").to_bytes()
    desk = Desk(network, 0, 1)
    desk.turn(B1)
    assert network.nodes[0].given == []
    assert network.nodes[1].given == [B1]
    assert any(record.levelname == "ERROR" and "another ledger" in record.message for record in caplog.records)


@pytest.mark.parametrize("path", ["/genesis", "/head", "/blocks", "/checkpoint", "/holdings", "/signer", "/result"])
@pytest.mark.parametrize("answer", [b"", b"\xff", cbor.encode(["?"]), cbor.encode({1: 2})])
def test_a_node_that_talks_nonsense_is_passed_over(network: FakeNetwork, path: str, answer: bytes) -> None:
    desk = Desk(network, 0, 1, own=None)
    desk.turn(B1)
    network.nodes[0].forged[path] = answer
    network.make_block()
    questions = (HoldingsOf("b1"), SignerOf(OWN.key.key_id), BlocksFrom(1))
    news = [desk.turn(B1, ask=questions) for _ in range(2)]
    assert [height for each in news for height in heights(each)] == [1]
    answers = {question: answer for each in news for question, answer in each.answers.items()}
    assert isinstance(answers[HoldingsOf("b1")], HoldingsPage)
    assert answers[SignerOf(OWN.key.key_id)] == OWN


def test_a_node_that_does_not_know_a_question_is_kept_and_says_nothing(
    network: FakeNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a node of a version from before there were questions about devices."""
    monkeypatch.setattr(
        queries, "_ANSWERS", {path: each for path, each in queries._ANSWERS.items() if path != "/device"}
    )
    desk = Desk(network, 0, 1)
    news = desk.turn(B1, ask=(DeviceOf("solar-1"), BlocksFrom(1)))
    assert news.answers[DeviceOf("solar-1")] is None
    network.make_block()
    assert heights(desk.turn()) == [1]
    assert network.nodes[0].given == [B1]
    assert not network.nodes[1].asked


def test_a_silent_node_is_left_because_it_may_be_cut_off(network: FakeNetwork) -> None:
    desk = Desk(network, 0, 1)
    network.nodes[0].cut_off = True
    desk.turn(B1)
    desk.turn(after_s=following.SILENT_S)
    desk.turn()
    assert network.mempool == [B1]


def test_a_full_node_gets_the_batch_later_and_nothing_before_it(network: FakeNetwork) -> None:
    desk = Desk(network, 0)
    network.nodes[0].busy = True
    desk.turn(B1)
    network.nodes[0].busy = False
    desk.turn(B2, after_s=0.01)
    assert network.mempool == []
    desk.turn(after_s=following.BUSY_S)
    assert network.mempool == [B1, B2]


def test_a_batch_of_a_stranger_is_dropped_without_an_answer(network: FakeNetwork) -> None:
    desk = Desk(network, 0)
    news = desk.turn(world.batch(world.close(), by="stranger"))
    assert news.results == []
    assert desk.follower.pending == 0


def test_a_malformed_batch_of_a_known_party_is_refused_at_once(network: FakeNetwork) -> None:
    desk = Desk(network, 0, own=None)
    desk.turn(B1)
    network.make_block()
    desk.turn()
    malformed = world.seal(world.Batch(world.T0 + 86_400, (cbor.encode([99, []]),)), "b1")
    (answer,) = desk.turn(malformed).results
    assert answer.result.status is ResultStatus.REFUSED
    assert answer.result.reason is not None
    assert answer.result.reason.startswith("malformed: ")


def test_the_first_batch_of_an_unknown_broker_is_answered_by_the_name_in_its_registration(network: FakeNetwork) -> None:
    desk = Desk(network, 0, own=None)
    refused = world.batch(world.register("b2"), world.close(start_s=world.T0 + 1), by="b2")
    desk.turn(refused)
    network.make_block()
    (answer,) = desk.turn().results
    assert answer.client == "b2"
    assert answer.result.status is ResultStatus.REFUSED


def test_holdings_come_whole_and_of_one_height(network: FakeNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    from broker.ledger import holdings_view

    monkeypatch.setattr(holdings_view, "MAX_HOLDINGS_ON_PAGE", 2)
    desk = Desk(network, 0)
    desk.turn(B1)
    network.make_block()
    desk.turn(*(issue(number) for number in range(5)))
    moves = [world.take("solar-1", 0, 10, start_s=world.T0 + number * world.INTERVAL_S) for number in range(5)]
    desk.turn(world.batch(*moves))
    network.make_block()
    answer = desk.turn(ask=(HoldingsOf("b1"),)).answers[HoldingsOf("b1")]
    assert isinstance(answer, HoldingsPage)
    assert (answer.height, len(answer.entries), answer.next_cursor) == (2, 5, None)


def test_a_page_of_holdings_that_are_no_bytes_is_passed_over(network: FakeNetwork) -> None:
    desk = Desk(network, 0, 1)
    network.nodes[0].forged["/holdings"] = cbor.encode([0, [b"x", 2], None])
    assert desk.turn(ask=(HoldingsOf("b1"),)).answers[HoldingsOf("b1")] == HoldingsPage(0, (), None)


def test_the_checkpoint_of_the_last_block_is_asked_for_until_it_is_known(network: FakeNetwork) -> None:
    """Also of the one that it begins with, by which clients learn what they have missed."""
    Desk(network, 0).turn(B1)
    network.make_block()
    checkpoint = network.nodes[0].query("/checkpoint", b"")
    late = Desk(network, 0)
    network.nodes[0].forged["/checkpoint"] = b"?"
    assert late.turn().checkpoint is None
    del network.nodes[0].forged["/checkpoint"]
    assert late.turn(after_s=max(following.BACK_OFF_S)).checkpoint == checkpoint
    assert not late.turn()


def test_a_node_that_stays_behind_is_told_once(network: FakeNetwork, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    desk = Desk(network, 0, known_height=1)
    for _ in range(200):
        desk.turn(after_s=following.BEHIND_S)
    (warning,) = caplog.records
    assert "is behind: it has block 0, but 1 was seen before for 30 s" in warning.message
    Desk(network, 0).turn(B1)
    network.make_block()
    desk.turn(after_s=following.BEHIND_S)
    assert caplog.messages[1:] == ["ledger node http://v1 answers again"]


def test_no_more_than_so_many_batches_and_bytes_wait(network: FakeNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "MAX_QUEUED_BATCHES", 3)
    network.nodes[0].down = True
    desk = Desk(network, 0)
    desk.turn(B1, *(issue(number) for number in range(5)))
    assert desk.follower.pending == 3


def test_it_looks_less_often_when_nothing_happens(network: FakeNetwork) -> None:
    desk = Desk(network, 0)
    desk.turn(B1)
    assert desk.follower.wait_s == following.POLL_S
    network.make_block()
    desk.turn()
    desk.turn(after_s=following.ACTIVE_S)
    desk.turn(after_s=following.ACTIVE_S)
    assert desk.follower.wait_s == following.IDLE_POLL_S


def test_every_node_away_is_no_reason_to_fail(network: FakeNetwork) -> None:
    desk = Desk(network, 0, 1, 2, 3)
    for node in network.nodes:
        node.down = True
    assert not any(bool(desk.turn(B1)) for _ in range(20))
    _up(network.nodes)
    desk.turn(after_s=max(following.BACK_OFF_S))
    assert network.mempool == [B1]


def _up(nodes: tuple[FakeNode, ...]) -> None:
    for node in nodes:
        node.down = False
