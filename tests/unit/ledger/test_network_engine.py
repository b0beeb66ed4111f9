"""The engine of a ledger network as a gateway uses it: nothing waits for the network, news wake the loop."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dengen_testing.waiting import wait_until
from support import ledger_world as world
from support.comet_network import FakeNetwork

from broker.ledger import gateway
from broker.ledger.client import (
    BatchCommitted,
    BatchRefused,
    BlockApplied,
    DeviceKnown,
    DeviceUnknown,
    Event,
    HoldingsLoaded,
    LedgerClient,
    LedgerFault,
    MadeKnown,
    NotProven,
)
from broker.ledger.cometbft import queries
from broker.ledger.cometbft.engine import CometbftLedger
from broker.ledger.cometbft.rpc import Checked
from broker.ledger.engine import NotYet
from broker.ledger.gateway import Gateway
from broker.ledger.limits import DEVICE_TIMEOUT_S
from broker.protocol import cbor, envelope
from broker.protocol.envelope import Signer
from broker.protocol.errors import ProtocolError, UnknownKey
from broker.protocol.messages import Block, Checkpoint, NamedKey, Page, Query, QueryKind
from broker.protocol.topics import Topics

B1, B2 = world.SET_UP
TOPICS = Topics("dengen/v1")


@pytest.fixture
def network(tmp_path: Path) -> Iterator[FakeNetwork]:
    made = FakeNetwork(tmp_path, "v1", "v2")
    yield made
    made.close()


class Turns:
    """An engine whose worker does not run: the test lets it take its turns, so nothing depends on threads."""

    def __init__(self, network: FakeNetwork, party: str = "b1", gateway_as: str | None = None) -> None:
        own = Signer(party, world.key(party).public)
        self.engine = CometbftLedger(network.genesis, network.nodes, own)
        self.gateway = Gateway(self.engine, TOPICS, gateway_as or party, world.key(gateway_as or party))
        self.client = LedgerClient(network.genesis, party, world.key(party), world.counting_bytes())
        self.events: list[Event] = []
        self.now_s = 0.0

    def turn(self) -> None:
        """One turn of a broker's loop, and one of the worker."""
        self.now_s += 0.1
        answers = []
        for raw in self.client.tick(self.now_s):
            answers += self.gateway.on_message(raw)
        answers += self.gateway.commit()
        for outgoing in answers:
            self.client.on_message(outgoing.topic.split("/")[4], outgoing.payload)
        self.events += self.client.events()
        self.engine.work_once(self.now_s)


def test_a_broker_loads_submits_and_follows_through_its_gateway(network: FakeNetwork) -> None:
    desk = Turns(network)
    for _ in range(4):
        desk.turn()
    assert desk.events == [HoldingsLoaded(0, ())]
    batch_id = desk.client.submit(B1)
    desk.turn()
    desk.turn()
    network.make_block()
    for _ in range(3):
        desk.turn()
    assert desk.events[1:] == [BatchCommitted(batch_id, 1), BlockApplied(1)]
    assert desk.client.pending == 0


def test_a_late_broker_begins_with_its_holdings_and_the_block_that_they_rest_on(network: FakeNetwork) -> None:
    first = Turns(network)
    first.client.submit(B1)
    first.turn()
    network.make_block()
    first.turn()
    first.client.submit(world.batch(world.issue("solar-1", 100), world.take("solar-1", 0, 60)))
    first.turn()
    network.make_block()
    late = Turns(network)
    for _ in range(8):
        late.turn()
    (loaded,) = [event for event in late.events if isinstance(event, HoldingsLoaded)]
    assert (loaded.height, [holding.to_wh for holding in loaded.holdings]) == (2, [60])
    assert late.client.loaded
    assert late.client.height == 2


def test_a_refused_batch_is_told_to_the_broker(network: FakeNetwork) -> None:
    desk = Turns(network)
    desk.client.submit(B1)
    desk.turn()
    network.make_block()
    desk.client.submit(world.batch(world.take("solar-1", 0, 60)))
    for _ in range(3):
        desk.turn()
        network.make_block()
    for _ in range(4):
        desk.turn()
    (refused,) = [event for event in desk.events if isinstance(event, BatchRefused)]
    assert not refused.transient


def test_a_broker_learns_over_its_node_what_a_correction_withdrew(network: FakeNetwork) -> None:
    desk = Turns(network)
    issued = world.batch(world.issue("solar-1", 100), world.take("solar-1", 0, 60))
    for raw in (B1, issued, world.batch(world.correct("solar-1", 30))):
        desk.client.submit(raw)
        desk.turn()
        network.make_block()
        for _ in range(3):
            desk.turn()
    desk.client.ask_made("solar-1", world.T0)
    for _ in range(6):
        desk.turn()
    (known,) = [event for event in desk.events if isinstance(event, MadeKnown)]
    # The provider's 40 Wh went first, then half of what the broker had taken.
    assert [(item.from_wh, item.to_wh, item.owner) for item in known.made.held] == [(0, 30, "b1")]
    assert [(item.from_wh, item.to_wh) for item in known.made.withdrawn] == [(30, 100)]


def asks_about_a_device(network: FakeNetwork) -> Turns:
    """A broker that has asked about two devices, of which there is one."""
    desk = Turns(network)
    desk.client.submit(B1)
    desk.turn()
    network.make_block()
    for _ in range(3):
        desk.turn()
    desk.client.ask_device("solar-1")
    desk.client.ask_device("solar-9")
    for _ in range(6):
        desk.turn()
    return desk


def test_a_broker_learns_over_its_node_whose_a_device_is(network: FakeNetwork) -> None:
    desk = asks_about_a_device(network)
    (known,) = [event for event in desk.events if isinstance(event, DeviceKnown)]
    assert (known.admitted.device, known.admitted.owner) == ("solar-1", "alice")
    assert [event for event in desk.events if isinstance(event, DeviceUnknown)] == [DeviceUnknown("solar-9", True)]


def test_where_nodes_do_not_know_the_question_the_broker_gives_it_up(
    network: FakeNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        queries, "_ANSWERS", {path: each for path, each in queries._ANSWERS.items() if path != "/device"}
    )
    desk = asks_about_a_device(network)
    assert not [event for event in desk.events if isinstance(event, DeviceKnown | DeviceUnknown)]
    # Between two repetitions the gateway does not go on asking by itself.
    assert not desk.gateway._waiting
    asked = network.nodes[0].asked
    desk.now_s += DEVICE_TIMEOUT_S
    desk.turn()
    assert [event for event in desk.events if isinstance(event, DeviceUnknown)] == [
        DeviceUnknown("solar-1", False),
        DeviceUnknown("solar-9", False),
    ]
    assert desk.client.tick(desk.now_s + 60.0) == []
    assert asked > 0


def test_what_must_be_fetched_is_answered_after_a_later_commit(network: FakeNetwork) -> None:
    desk = Turns(network, party="b2", gateway_as="v1")
    network.nodes[0].submit(B1)
    network.make_block()
    # A foreign broker asks over MQTT; who it is has to be asked first, then what it holds.
    query = envelope.seal(Query(b"q" * 8, QueryKind.HOLDINGS, None, None), world.key("b1"), world.LEDGER, "b1")
    assert desk.gateway.on_message(query) == []
    answers = []
    for _ in range(4):
        desk.engine.work_once(desk.now_s)
        answers += [outgoing for outgoing in desk.gateway.commit() if outgoing.topic.endswith("/result/b1")]
    assert len([outgoing for outgoing in answers if _kind(outgoing.payload) == "PAGE"]) == 1


def test_an_answer_that_nobody_waited_for_is_not_given_to_whoever_asks_the_same_later(
    network: FakeNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Turns(network, party="b1", gateway_as="b1")
    network.nodes[0].submit(B1)
    network.make_block()
    for _ in range(4):
        desk.turn()

    def asks(request_id: bytes) -> list[Page]:
        query = Query(request_id, QueryKind.HOLDINGS, None, None)
        return pages(desk.gateway.on_message(envelope.seal(query, world.key("b1"), world.LEDGER, "b1")))

    def pages(answers: list[gateway.Outgoing]) -> list[Page]:
        told = [answer.payload for answer in answers if answer.topic.endswith("/result/b1")]
        messages = [envelope.open_envelope(raw, world.LEDGER, desk.engine.signer).message for raw in told]
        return [message for message in messages if isinstance(message, Page)]

    # The loop goes on while the worker fetches: a client that asks twice leaves one answer more than it has questions.
    got: list[Page] = []
    meanwhile = [lambda: asks(b"question"[::-1]), lambda: pages(desk.gateway.commit())]
    query_node = network.nodes[0].query

    def query(path: str, data: bytes) -> bytes:
        if path == "/holdings" and meanwhile:
            got.extend(meanwhile.pop(0)())
        return query_node(path, data)

    monkeypatch.setattr(network.nodes[0], "query", query)
    got += asks(b"question")
    for _ in range(2):
        desk.engine.work_once(desk.now_s)
    got += pages(desk.gateway.commit())
    desk.engine.work_once(desk.now_s)
    got += pages(desk.gateway.commit())
    assert [page.height for page in got] == [1, 1]

    network.nodes[0].submit(world.batch(world.issue("solar-1", 100), world.take("solar-1", 0, 60)))
    network.make_block()
    later = asks(b"a day on")
    for _ in range(2):
        desk.engine.work_once(desk.now_s)
        later += pages(desk.gateway.commit())
    assert [(page.height, len(page.entries)) for page in later] == [(2, 1)]


def test_a_foreign_broker_follows_through_a_gateway_that_speaks_for_a_validator(network: FakeNetwork) -> None:
    host = Turns(network, gateway_as="v1")
    foreign = LedgerClient(network.genesis, "b2", world.key("b2"), world.counting_bytes())
    events: list[Event] = []
    for now in range(30):
        answers = [outgoing for raw in foreign.tick(now * 3.0) for outgoing in host.gateway.on_message(raw)]
        host.engine.work_once(float(now))
        answers += host.gateway.commit()
        for outgoing in answers:
            if not outgoing.topic.endswith("/result/b1"):
                foreign.on_message(outgoing.topic.split("/")[4], outgoing.payload)
        events += foreign.events()
        if now == 1:
            network.nodes[1].submit(B1)
            batch_id = foreign.submit(B2)
        if now == 3:
            network.make_block()
    assert BatchCommitted(batch_id, 1) in events
    assert foreign.loaded
    assert foreign.height == 1


def test_clients_hear_of_what_was_decided_while_their_gateway_was_away(network: FakeNetwork) -> None:
    """A hosted ledger stands still without its host; a network does not."""
    before, after = Turns(network, gateway_as="v1"), Turns(network, gateway_as="v1")
    foreign = LedgerClient(network.genesis, "b2", world.key("b2"), world.counting_bytes(), load_holdings=False)

    def turn(host: Turns) -> None:
        for raw in foreign.tick(host.now_s):
            host.gateway.on_message(raw)
        for outgoing in host.gateway.commit():
            if not outgoing.topic.endswith("/result/b1"):
                foreign.on_message(outgoing.topic.split("/")[4], outgoing.payload)
        host.now_s += 0.1
        host.engine.work_once(host.now_s)

    network.nodes[0].submit(B2)
    for _ in range(4):
        turn(before)
        network.make_block()
    for _ in range(4):
        turn(before)
    assert foreign.height == 1
    network.nodes[0].submit(B1)
    network.make_block()
    after.gateway.start()
    foreign.on_connect()
    for _ in range(4):
        turn(after)
    assert foreign.height == 2


def test_a_node_that_is_behind_an_answer_given_before_is_no_contradiction(
    network: FakeNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holdings are of a block that comes between two questions to the first node, which then fails."""
    first, second = network.nodes
    query_node = first.query

    def query(path: str, data: bytes) -> bytes:
        if path == "/holdings":
            network.nodes[0].submit(B1)
            second.cut_off = True
            network.make_block()
        answer = query_node(path, data)
        first.down = path == "/holdings"
        return answer

    monkeypatch.setattr(first, "query", query)
    late = Turns(network)
    for _ in range(20):
        late.turn()
    assert [type(event) for event in late.events] == [HoldingsLoaded]
    second.cut_off = False
    second.catch_up()
    for _ in range(20):
        late.turn()
    assert [type(event) for event in late.events] == [HoldingsLoaded]
    assert (late.client.loaded, late.client.height) == (True, 1)


def test_what_this_brokers_own_gateway_answers_is_believed_and_a_block_of_its_own_is_not(network: FakeNetwork) -> None:
    """Only validators speak for the ledger; the gateway inside a broker without a validator's key is that broker."""
    desk = Turns(network)
    block = Block(1, b"p" * 32, (B1,), 9, b"r" * 32, b"s" * 32)
    checkpoint = Checkpoint(0, b"p" * 32, 0, b"r" * 32, b"s" * 32)
    for leaf, message in (("feed", block), ("checkpoint", checkpoint)):
        with pytest.raises(UnknownKey):
            desk.client.on_message(leaf, envelope.seal(message, world.key("b1"), world.LEDGER, "b1"))
    stranger = envelope.seal(Page(b"q" * 8, QueryKind.BLOCKS, 0, ()), world.key("b2"), world.LEDGER, "b2")
    with pytest.raises(UnknownKey):
        desk.client.on_message("result", stranger)


@pytest.mark.parametrize(("validators", "stops"), [(("v1",), True), (("v1", "v2"), False)])
def test_an_answer_from_behind_is_a_contradiction_only_where_one_node_has_it_all(
    validators: tuple[str, ...], stops: bool
) -> None:
    named = tuple(NamedKey(name, world.key(name).public.cose_key) for name in validators)
    genesis = world.genesis(validators=named)
    client = LedgerClient(genesis, "b1", world.key("b1"), world.counting_bytes(), resume=(5, b"i" * 32))
    _, query = client.tick(0.0)
    asked = Query.from_payload(envelope.parse(query).payload)
    page = Page(asked.request_id, asked.kind, 4, ())
    client.on_message("result", envelope.seal(page, world.key("v1"), world.LEDGER, "v1"))
    assert [type(event) for event in client.events()] == ([LedgerFault] if stops else [])
    assert len(client.tick(10.0)) == (0 if stops else 2)


def test_a_node_that_is_behind_does_not_say_that_there_is_no_proof() -> None:
    client = LedgerClient(
        world.GENESIS, "b1", world.key("b1"), world.counting_bytes(), load_holdings=False, resume=(5, b"i" * 32)
    )
    request_id = client.prove_operation(9)
    client.tick(0.0)
    for height in (4, 5):
        page = Page(request_id, QueryKind.OPERATION, height, ())
        client.on_message("result", world.seal(page, "node"))
        assert client.events() == ([NotProven(request_id, answered=True)] if height == 5 else [])


@pytest.mark.parametrize("known", ["long ago", "a moment ago"])
def test_a_revoked_key_gets_no_more_answers(network: FakeNetwork, known: str) -> None:
    """The gateway knew whose it was, or its worker has just asked."""
    host = Turns(network, gateway_as="v1")
    for raw in (B1, B2):
        network.nodes[0].submit(raw)
    network.make_block()

    def ask(number: int) -> None:
        query = Query(bytes((number,)) * 8, QueryKind.BLOCKS, None, 1)
        host.gateway.on_message(envelope.seal(query, world.key("b2"), world.LEDGER, "b2"))

    def answered() -> bool:
        answers = []
        for _ in range(4):
            answers += host.gateway.commit()
            host.engine.work_once(host.now_s)
        return any(outgoing.topic.endswith("/result/b2") for outgoing in answers)

    host.engine.work_once(host.now_s)
    if known == "long ago":
        ask(1)
        assert answered()
    ask(2)
    host.engine.work_once(host.now_s)
    network.nodes[0].submit(world.batch(world.revoke("b2")))
    network.make_block()
    host.engine.work_once(host.now_s)
    assert not answered()


def test_no_more_than_so_many_questions_wait(network: FakeNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "MAX_WAITING_QUERIES", 2)
    desk = Turns(network)
    for number in range(5):
        query = Query(bytes((number,)) * 8, QueryKind.BLOCKS, None, 1)
        desk.gateway.on_message(envelope.seal(query, world.key("b1"), world.LEDGER, "b1"))
    desk.engine.work_once(1.0)
    answered = [outgoing for outgoing in desk.gateway.commit() if _kind(outgoing.payload) == "PAGE"]
    desk.engine.work_once(2.0)
    answered += [outgoing for outgoing in desk.gateway.commit() if _kind(outgoing.payload) == "PAGE"]
    assert len(answered) == 2


def test_a_strangers_question_ends_without_an_answer(network: FakeNetwork) -> None:
    desk = Turns(network)
    query = envelope.seal(Query(b"q" * 8, QueryKind.BLOCKS, None, 1), world.key("who"), world.LEDGER, "who")
    assert desk.gateway.on_message(query) == []
    desk.engine.work_once(1.0)
    assert desk.gateway.commit() == []
    desk.engine.work_once(2.0)
    assert desk.gateway.commit() == []


def test_what_is_no_message_is_refused_at_once(network: FakeNetwork) -> None:
    with pytest.raises(ProtocolError):
        Turns(network).engine.submit(b"nonsense")


class Canned:
    """A node of a ledger without blocks, to be asked from any thread. `broken`: it has a fault of this program."""

    url = "http://canned"

    def __init__(self, network: FakeNetwork, *, broken: bool = False) -> None:
        self._head = network.nodes[0].query("/head", b"")
        self._genesis = network.genesis.to_bytes()
        self._broken = broken

    def query(self, path: str, data: bytes) -> bytes:
        if self._broken:
            raise AssertionError("a fault of the program")
        answers = {"/head": self._head, "/genesis": self._genesis}
        return answers.get(path, cbor.encode([0, []]))

    def submit(self, raw_batch: bytes) -> Checked:
        return Checked(0, "")

    def close(self) -> None:
        """Nothing is open."""


def test_the_worker_wakes_the_loop_and_ends_when_it_is_closed(network: FakeNetwork) -> None:
    woken = threading.Event()
    engine = CometbftLedger(network.genesis, [Canned(network)], Signer("b1", world.key("b1").public))
    engine.start(woken.set)
    began_s = time.monotonic()
    with pytest.raises(NotYet):
        engine.blocks(1)
    assert time.monotonic() - began_s < 0.5
    assert woken.wait(5)
    engine.commit()
    assert list(engine.blocks(1)) == []
    engine.close()
    assert not engine.running


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_the_worker_ends_the_broker_and_is_not_waited_for(network: FakeNetwork) -> None:
    engine = CometbftLedger(network.genesis, [Canned(network, broken=True)])
    engine.start(lambda: None)
    wait_until(lambda: not engine.running, "the worker to fail")
    with pytest.raises(RuntimeError, match="has ended"):
        engine.commit()


def test_the_worker_stops_asking_while_nobody_takes_its_blocks(
    network: FakeNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    from broker.ledger.cometbft import engine as module

    monkeypatch.setattr(module, "MAX_BLOCKS_AHEAD", 2)
    desk = Turns(network)
    desk.engine.work_once(0.0)
    for number, raw in enumerate((B1, B2, world.batch(world.issue("solar-1", 5)))):
        network.nodes[1].submit(raw)
        network.make_block()
        desk.engine.work_once(number + 1.0)
    assert len(desk.engine.commit().blocks) == 2
    desk.engine.work_once(9.0)
    assert len(desk.engine.commit().blocks) == 1


def test_a_node_that_hangs_does_not_hold_up_the_loop(network: FakeNetwork) -> None:
    release = threading.Event()

    class Hanging:
        url = "http://hanging"

        def query(self, path: str, data: bytes) -> bytes:
            release.wait(5)
            return b""

        def submit(self, raw_batch: bytes) -> None:
            raise AssertionError

        def close(self) -> None:
            pass

    engine = CometbftLedger(network.genesis, [Hanging()])  # type: ignore[list-item]
    engine.start(lambda: None)
    began_s = time.monotonic()
    engine.submit(B1)
    assert engine.commit().blocks == ()
    assert time.monotonic() - began_s < 0.5
    release.set()
    engine.close()
    wait_until(lambda: not engine.running, "the worker to end")


def _kind(raw: bytes) -> str:
    return envelope.parse(raw).message_type.name
