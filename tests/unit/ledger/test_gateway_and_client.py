"""Gateway and client against each other, without a network: what is lost, repeated, late or forged in between."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.ledger_world import (
    GENESIS,
    INTERVAL_S,
    T0,
    admit,
    batch,
    close,
    counting_bytes,
    deliver,
    found,
    genesis,
    issue,
    key,
    order,
    register,
    seal,
    sell,
    take,
)

from broker.ledger import client as client_module
from broker.ledger import embedded, holdings_view
from broker.ledger import gateway as gateway_module
from broker.ledger.admitted import Admitted
from broker.ledger.chain import genesis_hash
from broker.ledger.client import (
    BatchCommitted,
    BatchRefused,
    BlockApplied,
    DeviceKnown,
    DeviceUnknown,
    Event,
    ForeignBatch,
    HoldingsLoaded,
    LedgerClient,
    LedgerFault,
    TooManyPending,
)
from broker.ledger.gateway import Gateway, Outgoing
from broker.ledger.limits import DEVICE_TIMEOUT_S, MAX_DEVICES_ASKED, RESEND_AFTER_S
from broker.ledger.operations import AssetId, Close, Issue, Void
from broker.ledger.state import OWNED, AssetRow, Held, OwnedRow, asset_key, encode_key, encode_row
from broker.protocol import envelope
from broker.protocol.errors import BadSignature, MalformedMessage, ProtocolError, UnknownKey
from broker.protocol.messages import Admission, Block, Carrier, NamedKey, Page, Query, QueryKind, Result, ResultStatus
from broker.protocol.topics import Topics

TOPICS = Topics()


class Net:
    """One gateway and its clients; what the gateway publishes waits in `air` until `deliver` hands it on."""

    def __init__(self, path: Path, set_up: bool = True) -> None:
        self.path = path
        self.engine = found(path, set_up)
        self.gateway = Gateway(self.engine, TOPICS, "node", key("node"))
        self.clients: dict[str, LedgerClient] = {}
        self.air: list[Outgoing] = []
        self.seen: list[bytes] = []
        self.now_s = 0.0
        self.retained = self.gateway.start()

    def join(self, name: str, **options: Any) -> LedgerClient:
        client = LedgerClient(GENESIS, name, key(name), counting_bytes(), **options)
        self.clients[name] = client
        client.on_connect()
        for message in self.retained:
            client.on_message("checkpoint", message.payload)
        return client

    def close(self) -> None:
        self.gateway.close()
        self.engine.close()

    def restart(self) -> None:
        self.close()
        self.engine = found(self.path)
        self.gateway = Gateway(self.engine, TOPICS, "node", key("node"))
        self.retained = self.gateway.start()

    def send(self) -> None:
        """Everything that clients want to say reaches the gateway, which commits."""
        for client in self.clients.values():
            for payload in client.tick(self.now_s):
                self.seen.append(payload)
                try:
                    self.air += self.gateway.on_message(payload)
                except ProtocolError:
                    continue  # logged by the shell
        self.air += self.gateway.commit()

    def deliver(self, keep: Callable[[Outgoing], bool] = lambda message: True) -> None:
        air, self.air = self.air, []
        for message in air:
            if message.retain:
                self.retained = [message]
            if keep(message):
                self.hand_over(message)

    def hand_over(self, message: Outgoing) -> None:
        levels = TOPICS.split(message.topic)
        assert levels[:2] == ("ledger", GENESIS.ledger)
        for name, client in self.clients.items():
            if levels[2] != "result" or levels[3] == name:
                client.on_message(levels[2], message.payload)

    def settle(self) -> None:
        """Until nobody has anything to say."""
        for _ in range(50):
            self.send()
            if not self.air:
                return
            self.deliver()
        raise AssertionError("gateway and clients never come to rest")


@pytest.fixture
def net(tmp_path: Path) -> Any:
    made = Net(tmp_path)
    yield made
    made.close()


def stock(net: Net) -> None:
    """b1 owns 100 Wh of solar, without the clients' doing."""
    net.engine.submit(batch(issue("solar-1", 100), take("solar-1", 0, 100)))
    net.engine.commit()


def commit_elsewhere(net: Net, *raws: bytes) -> None:
    """The ledger goes on by the batches of others."""
    for raw in raws:
        net.air += net.gateway.on_message(raw)
    net.air += net.gateway.commit()


def kinds(events: list[Event]) -> list[type]:
    return [type(event) for event in events]


def test_a_client_loads_its_holdings_and_follows_from_there(net: Net) -> None:
    stock(net)
    client = net.join("b1")
    assert not client.loaded
    net.settle()
    assert client.loaded
    (loaded,) = client.events()
    assert isinstance(loaded, HoldingsLoaded)
    assert loaded.height == client.height == 3
    assert [(h.asset.device, h.from_wh, h.to_wh) for h in loaded.holdings] == [("solar-1", 0, 100)]
    assert client.block_id == net.engine.head.block_id

    raw = batch(deliver(1, 10, ("solar-1", 0, 10)))
    batch_id = client.submit(raw)
    assert client.submit(raw) == batch_id
    net.settle()
    assert client.events() == [BatchCommitted(batch_id, 4), BlockApplied(4)]
    assert client.pending == 0
    assert net.seen.count(raw) == 1


def test_an_empty_ledger_has_no_holdings_and_the_first_batch_introduces_the_broker(tmp_path: Path) -> None:
    net = Net(tmp_path, set_up=False)
    client = net.join("b1")
    net.settle()
    assert not client.loaded, "the ledger does not know who asks"
    batch_id = client.submit(batch(register("b1")))
    net.settle()
    events = client.events()
    assert client.loaded
    assert BatchCommitted(batch_id, 1) in events
    assert HoldingsLoaded(1, ()) in events
    assert client.pending == 0
    net.engine.close()


def test_what_others_do_is_decoded_except_their_deliveries(net: Net) -> None:
    stock(net)
    client = net.join("b2")
    net.settle()
    client.events()
    commit_elsewhere(
        net,
        batch(deliver(1, 10, ("solar-1", 0, 10)), close()),
        batch(sell("solar-1", 50, 60, seal(order(), "b2"))),
    )
    net.deliver()
    first, second, applied = client.events()
    assert isinstance(first, ForeignBatch)
    assert [type(operation) for operation in first.operations] == [Close]
    assert first.key_id == key("b1").public.key_id
    assert isinstance(second, ForeignBatch)
    assert second.operations == (sell("solar-1", 50, 60, seal(order(), "b2")),)
    assert applied == BlockApplied(4)


def test_own_batches_of_an_earlier_run_come_with_their_operations(net: Net) -> None:
    client = net.join("b1")
    net.settle()
    client.events()
    raw = batch(issue("solar-1", 100))
    commit_elsewhere(net, raw)
    net.deliver()
    committed, _ = client.events()
    assert isinstance(committed, BatchCommitted)
    assert [type(operation) for operation in committed.operations or ()] == [Issue]


def test_a_batch_committed_before_the_client_came_is_answered(net: Net) -> None:
    raw = batch(issue("solar-1", 100))
    commit_elsewhere(net, raw)
    net.air.clear()
    client = net.join("b1")
    batch_id = client.submit(raw)
    net.settle()
    loaded, committed = client.events()
    assert isinstance(loaded, HoldingsLoaded)
    assert committed == BatchCommitted(batch_id, 3)
    assert client.pending == 0


def test_a_refused_batch_can_be_submitted_again(net: Net) -> None:
    client = net.join("b1")
    net.settle()
    client.events()
    raw = batch(take("solar-1", 0, 100))
    batch_id = client.submit(raw)
    net.settle()
    (refused,) = client.events()
    assert isinstance(refused, BatchRefused)
    assert (refused.batch_id, refused.operation, refused.code, refused.transient) == (
        batch_id,
        0,
        "unknown_asset",
        False,
    )
    assert "solar-1" in refused.reason
    assert client.pending == 0
    client.submit(batch(issue("solar-1", 100)))
    assert client.submit(raw) == batch_id
    net.settle()
    assert BatchCommitted(batch_id, 3) in client.events()


def test_a_busy_ledger_is_a_passing_reason(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    client = net.join("b1")
    net.settle()
    client.events()
    monkeypatch.setattr(embedded, "MAX_QUEUED_BATCHES", 0)
    raw = batch(issue("solar-1", 100))
    client.submit(raw)
    net.settle()
    (refused,) = client.events()
    assert isinstance(refused, BatchRefused)
    assert refused.transient
    monkeypatch.undo()
    batch_id = client.submit(raw)
    net.settle()
    assert BatchCommitted(batch_id, 3) in client.events()


def test_a_repeated_old_refusal_does_not_hide_the_commit(net: Net) -> None:
    client = net.join("b1")
    net.settle()
    client.events()
    raw = batch(take("solar-1", 0, 100))
    client.submit(raw)
    net.send()
    (old_refusal,) = net.air
    net.deliver()
    client.submit(batch(issue("solar-1", 100)))
    batch_id = client.submit(raw)
    net.hand_over(old_refusal)
    assert client.pending == 1
    client.submit(raw)
    net.settle()
    assert BatchCommitted(batch_id, 3) in client.events()


@pytest.mark.parametrize("lost", ["result", "feed", "checkpoint", "all"])
def test_lost_messages_are_made_up_for(net: Net, lost: str) -> None:
    stock(net)
    client = net.join("b1")
    net.settle()
    client.events()
    batch_id = client.submit(batch(deliver(1, 10, ("solar-1", 0, 10))))
    net.send()
    net.deliver(lambda message: lost != "all" and f"/{lost}" not in message.topic)
    net.now_s += RESEND_AFTER_S
    net.settle()
    assert client.events() == [BatchCommitted(batch_id, 4), BlockApplied(4)]


def test_unanswered_batches_are_sent_again_after_a_while_and_after_a_reconnect(net: Net) -> None:
    client = net.join("b1")
    net.settle()
    first, second = batch(issue("solar-1", 100)), batch(issue("wind-1", 100))
    client.submit(first)
    client.submit(second)
    assert client.tick(0.0) == [first, second]
    assert client.tick(RESEND_AFTER_S - 0.1) == []
    assert client.tick(RESEND_AFTER_S) == [first, second], "in the order submitted"
    client.on_connect()
    assert client.tick(RESEND_AFTER_S + 0.1) == [first, second]


def test_too_many_unanswered_batches_are_refused_here(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "MAX_PENDING_BATCHES", 1)
    client = net.join("b1")
    raw = batch(issue("solar-1", 100))
    client.submit(raw)
    client.submit(raw)
    with pytest.raises(TooManyPending):
        client.submit(batch(issue("wind-1", 100)))


def test_an_observer_reads_the_whole_history(net: Net) -> None:
    stock(net)
    client = net.join("b2", load_holdings=False)
    net.settle()
    events = client.events()
    assert [event.height for event in events if isinstance(event, BlockApplied)] == [1, 2, 3]
    assert client.block_id == net.engine.head.block_id


def test_a_long_gap_is_fetched_page_by_page(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    client = net.join("b1")
    net.settle()
    client.events()
    for number in range(30):
        net.engine.submit(batch(issue("solar-1", 5, T0 + number * INTERVAL_S), by="b2"))
        net.engine.commit()
    monkeypatch.setattr(gateway_module, "MAX_BLOCK_BYTES", 2_000)
    monkeypatch.setattr(client_module, "MAX_EARLY_BLOCKS", 3)
    for message in net.gateway.start():
        client.on_message("checkpoint", message.payload)
    net.settle()
    assert [event.height for event in client.events() if isinstance(event, BlockApplied)] == list(range(3, 33))


def test_a_page_of_very_small_blocks_has_no_more_of_them_than_a_page_may(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = seal(Block(1, b"p" * 32, (batch(Void(b"v" * 16)),), 1, b"r" * 32, b"s" * 32), "node")
    monkeypatch.setattr(net.engine, "blocks", lambda _: iter([small] * 6_000))
    (answer,) = net.gateway.on_message(seal(Query(b"question", QueryKind.BLOCKS, from_height=1), "b1"))
    page = Page.from_payload(envelope.parse(answer.payload).payload)
    assert len(page.entries) == 4_096
    assert sum(map(len, page.entries)) < gateway_module.MAX_BLOCK_BYTES


def test_holdings_pages_fit_together_while_the_ledger_goes_on(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = [T0 + number * INTERVAL_S for number in range(7)]
    for start in starts:
        net.engine.submit(batch(issue("solar-1", 100, start), take("solar-1", 0, 100, start_s=start)))
    net.engine.commit()
    monkeypatch.setattr(holdings_view, "MAX_HOLDINGS_ON_PAGE", 2)
    client = net.join("b1")
    for start in starts:
        net.send()
        # Between any two pages an asset that may stand on the next one is delivered.
        commit_elsewhere(net, batch(deliver(1, 100, ("solar-1", 0, 100), start_s=start)))
        net.deliver()
    net.settle()
    loaded, *rest = client.events()
    assert isinstance(loaded, HoldingsLoaded)
    assert loaded.height == 3
    assert [h.asset.start_s for h in loaded.holdings] == starts
    assert [event.height for event in rest if isinstance(event, BlockApplied)] == [4, 5, 6, 7, 8, 9, 10]


def test_holdings_start_again_when_the_snapshot_is_gone(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = [T0 + number * INTERVAL_S for number in range(5)]
    for start in starts:
        net.engine.submit(batch(issue("solar-1", 100, start), take("solar-1", 0, 100, start_s=start)))
    net.engine.commit()
    monkeypatch.setattr(holdings_view, "MAX_HOLDINGS_ON_PAGE", 2)
    client = net.join("b1")
    net.send()
    net.deliver()
    net.engine.submit(batch(deliver(1, 100, ("solar-1", 0, 100))))
    net.engine.commit()
    net.restart()
    net.settle()
    (loaded,) = client.events()
    assert isinstance(loaded, HoldingsLoaded)
    assert (loaded.height, [h.asset.start_s for h in loaded.holdings]) == (4, starts[1:])


def owns_in(net: Net, intervals: int, device: str = "solar-1") -> list[int]:
    """b1 owns 100 Wh in each of so many intervals; one block for all of them."""
    starts = [T0 + number * INTERVAL_S for number in range(intervals)]
    for start in starts:
        net.engine.submit(batch(issue(device, 100, start), take(device, 0, 100, start_s=start)))
    net.engine.commit()
    return starts


def everything(_message: Outgoing) -> bool:
    return True


def nothing(_message: Outgoing) -> bool:
    return False


def page_of(net: Net, party: str, cursor: bytes | None = None) -> Page | None:
    """The gateway's answer to a question for holdings; None if there is none."""
    answers = net.gateway.on_message(seal(Query(b"12345678", QueryKind.HOLDINGS, cursor), party))
    if not answers:
        return None
    (answer,) = answers
    page = envelope.parse(answer.payload).payload
    return Page.from_payload(page)


def test_paging_goes_on_where_it_was_when_the_gateway_restarts(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = owns_in(net, 7)
    monkeypatch.setattr(holdings_view, "MAX_HOLDINGS_ON_PAGE", 2)
    client = net.join("b1")
    pages = 0
    while not client.loaded and pages < 20:
        net.send()
        pages += sum("result" in message.topic for message in net.air)
        net.deliver()
        net.restart()
    (loaded,) = client.events()
    assert isinstance(loaded, HoldingsLoaded)
    assert [h.asset.start_s for h in loaded.holdings] == starts
    assert pages == 1 + 4 + 1, (
        "the validators, four pages of holdings, none of them twice, and the block that they rest on"
    )


def test_holdings_that_are_too_old_to_be_of_use_are_passed_over(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = owns_in(net, 7)
    monkeypatch.setattr(holdings_view, "MAX_HOLDINGS_ON_PAGE", 2)
    client = net.join("b1", holdings_from_s=starts[3])
    net.settle()
    (loaded,) = client.events()
    assert isinstance(loaded, HoldingsLoaded)
    assert [h.asset.start_s for h in loaded.holdings] == starts[3:]


def test_clients_that_begin_at_one_height_share_a_view(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    owns_in(net, 4)
    sealed = seal(order(), "b2")
    net.engine.submit(batch(sell("solar-1", 0, 10, sealed), sell("solar-1", 20, 30, sealed)))
    net.engine.submit(batch(sell("solar-1", 40, 50, sealed)))
    net.engine.commit()
    opened: list[int] = []
    open_view = embedded.EmbeddedLedger.open_view
    monkeypatch.setattr(embedded.EmbeddedLedger, "open_view", lambda self, party: opened.append(1) or open_view(self))
    monkeypatch.setattr(holdings_view, "MAX_HOLDINGS_ON_PAGE", 2)
    first, second = net.join("b1"), net.join("b2")
    net.settle()
    for client, count in ((first, 6), (second, 3)):
        (loaded,) = client.events()
        assert isinstance(loaded, HoldingsLoaded)
        assert len(loaded.holdings) == count
    assert len(opened) == 1


def test_views_are_bounded_and_who_finds_no_place_comes_in_later(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    owns_in(net, 3)
    monkeypatch.setattr(holdings_view, "MAX_HOLDINGS_ON_PAGE", 1)
    monkeypatch.setattr(gateway_module, "MAX_VIEWS", 1)
    first = page_of(net, "b1")
    assert first is not None
    commit_elsewhere(net, batch(deliver(1, 100, ("solar-1", 0, 100))))
    assert page_of(net, "alice") is None, "the ledger has gone on, so alice would need a second view"
    following = page_of(net, "b1", first.next_cursor)
    assert following is not None
    assert (following.height, len(following.entries)) == (first.height, 1), "whoever is served already is not disturbed"
    last = page_of(net, "b1", following.next_cursor)
    assert last is not None
    assert last.next_cursor is None
    waiting = page_of(net, "alice")
    assert waiting is not None
    assert waiting.height == first.height + 1


def test_a_client_that_begins_again_gives_its_view_back(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    owns_in(net, 3)
    monkeypatch.setattr(holdings_view, "MAX_HOLDINGS_ON_PAGE", 1)
    monkeypatch.setattr(gateway_module, "MAX_VIEWS", 1)
    for number in range(3):
        page = page_of(net, "b1")
        assert page is not None
        assert page.height == net.engine.height
        commit_elsewhere(net, batch(deliver(number, 100, ("solar-1", 0, 100), start_s=T0 + number * INTERVAL_S)))


def test_a_view_is_dropped_when_the_ledger_has_left_it_far_behind(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = owns_in(net, 4)
    monkeypatch.setattr(holdings_view, "MAX_HOLDINGS_ON_PAGE", 2)
    monkeypatch.setattr(gateway_module, "MAX_VIEW_AGE", 1)
    client = net.join("b1")
    net.send()
    net.deliver()
    for start in starts[:2]:
        commit_elsewhere(net, batch(deliver(1, 100, ("solar-1", 0, 100), start_s=start)))
    net.settle()
    loaded = client.events()[0]
    assert isinstance(loaded, HoldingsLoaded)
    assert (loaded.height, [h.asset.start_s for h in loaded.holdings]) == (5, starts[2:])


def test_a_lost_or_repeated_page_changes_nothing(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = owns_in(net, 9)
    monkeypatch.setattr(holdings_view, "MAX_HOLDINGS_ON_PAGE", 2)
    client = net.join("b1")
    heard: list[Outgoing] = []
    turn = 0
    while not client.loaded and turn < 60:
        turn += 1
        net.now_s += RESEND_AFTER_S
        net.send()
        heard += net.air
        # Every second answer is lost, and everything that was ever said is said again.
        net.deliver(everything if turn % 2 == 0 else nothing)
        for message in heard:
            net.hand_over(message)
    (loaded,) = client.events()
    assert isinstance(loaded, HoldingsLoaded)
    assert [h.asset.start_s for h in loaded.holdings] == starts


def test_a_hundred_thousand_holdings_cost_the_gateway_one_page_of_memory(net: Net) -> None:
    """Rows as the rules make them, written past the rules, since 100 000 signed readings would take half a minute."""
    made: dict[Any, Any] = {}
    for number in range(100_000):
        start_s, device = T0 + number // 1_000 * INTERVAL_S, f"roof-{number % 1_000}"
        asset = AssetId(device, Carrier.ELECTRICITY, start_s, 0)
        values: dict[str, Any] = {"source": 1, "area": "north", "issued_wh": 100, "held": (Held(0, 100, "b1"),)}
        made[asset_key(asset)] = AssetRow(**(dict.fromkeys(AssetRow._fields, 0) | values))
        made[OWNED, "b1", start_s, device, int(Carrier.ELECTRICITY), 0] = OwnedRow(1, None)
    encoded: dict[bytes, bytes | None] = {encode_key(key_): encode_row(row) for key_, row in made.items()}
    net.engine._store.write(encoded, {}, [], [], net.engine.head, [])
    found_assets: set[bytes] = set()
    cursor, pages, most_bytes = None, 0, 0  # of the twelfth page
    while pages == 0 or cursor is not None:
        if pages == 12:
            tracemalloc.start()
        page = page_of(net, "b1", cursor)
        if pages == 12:
            most_bytes = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert page is not None
        pages += 1
        cursor = page.next_cursor
        found_assets.update(page.entries)
    assert (pages, len(found_assets)) == (25, 100_000)
    assert 0 < most_bytes < 16 * 2**20
    assert net.gateway._views == {}


def test_queries_of_strangers_and_other_messages_are_not_answered(net: Net) -> None:
    query = Query(b"12345678", QueryKind.HOLDINGS)
    with pytest.raises(UnknownKey):
        net.gateway.on_message(seal(query, "stranger"))
    with pytest.raises(BadSignature):
        net.gateway.on_message(seal(query, "b1", ledger="other-ledger"))
    with pytest.raises(MalformedMessage):
        net.gateway.on_message(seal(order(), "b2"))


def test_blocks_of_another_ledger_or_forged_ones_are_refused(net: Net) -> None:
    client = net.join("b1")
    net.settle()
    client.events()
    commit_elsewhere(net, batch(issue("solar-1", 100), by="b2"))
    (feed, *_) = net.air
    block = envelope.open_envelope(feed.payload, GENESIS.ledger, client._validators.get).message
    assert isinstance(block, Block)
    for forged, error in (
        (seal(block, "node", ledger="other-ledger"), BadSignature),
        (seal(block, "b2"), UnknownKey),
        (seal(block, "node", with_key="b2"), UnknownKey),
        (feed.payload[:-1] + bytes((feed.payload[-1] ^ 1,)), BadSignature),
    ):
        with pytest.raises(error):
            client.on_message("feed", forged)
    with pytest.raises(MalformedMessage):
        client.on_message("result", feed.payload)
    assert client.events() == []
    client.on_message("feed", feed.payload)
    client.on_message("feed", feed.payload)
    assert kinds(client.events()) == [ForeignBatch, BlockApplied]


def a_block(client: LedgerClient, **changes: Any) -> bytes:
    values: dict[str, Any] = {
        "height": client.height + 1,
        "previous": client.block_id,
        "batches": (batch(Void(b"v" * 16), by="b2"),),
        "tree_size": 99,
        "root": b"r" * 32,
        "state_hash": b"s" * 32,
    }
    return seal(Block(**(values | changes)), "node")


def test_a_block_is_the_same_whichever_validator_sealed_it(net: Net) -> None:
    """On a network every node seals a block with its own key; a client that changes nodes must not see a fork."""
    two = genesis(validators=tuple(NamedKey(name, key(name).public.cose_key) for name in ("node", "other")))
    client = LedgerClient(two, "b1", key("b1"), counting_bytes(), load_holdings=False)
    first = Block(1, genesis_hash(two), (batch(Void(b"v" * 16), by="b2"),), 1, b"r" * 32, b"s" * 32)
    sealed = [seal(first, name) for name in ("node", "other")]
    assert sealed[0] != sealed[1]
    for raw in sealed:
        client.on_message("feed", raw)
    assert kinds(client.events()) == [ForeignBatch, BlockApplied]
    following = Block(2, client.block_id, (batch(Void(b"w" * 16), by="b2"),), 2, b"r" * 32, b"s" * 32)
    client.on_message("feed", seal(following, "other"))
    assert client.height == 2


def test_a_ledger_that_contradicts_itself_stops_the_client(net: Net) -> None:
    def follower() -> LedgerClient:
        client = net.join("b1")
        net.settle()
        client.events()
        return client

    client = follower()
    client.on_message("feed", a_block(client, previous=b"x" * 32))
    (fault,) = client.events()
    assert isinstance(fault, LedgerFault)
    assert "does not follow" in fault.reason
    client.on_message("feed", a_block(client))
    assert client.events() == [], "it does not go on after that"

    client = follower()
    client.on_message("feed", a_block(client))
    assert kinds(client.events()) == [ForeignBatch, BlockApplied]
    client.on_message("feed", a_block(client, height=client.height, previous=b"x" * 32))
    assert kinds(client.events()) == [LedgerFault]

    client = follower()
    client.on_message("feed", a_block(client))
    client.events()
    checkpoint = net.engine.head.checkpoint()
    client.on_message("checkpoint", seal(type(checkpoint)(3, b"x" * 32, 1, b"r" * 32, b"s" * 32), "node"))
    assert kinds(client.events()) == [LedgerFault]

    client = follower()
    client.on_message("feed", a_block(client, batches=(b"no batch",)))
    (fault,) = client.events()
    assert isinstance(fault, LedgerFault)


def test_a_ledger_that_lost_blocks_stops_the_client(net: Net) -> None:
    client = net.join("b1")
    net.settle()
    client.on_message("feed", a_block(client))
    client.on_message("feed", a_block(client, height=5))
    client.events()
    net.settle()
    (fault,) = client.events()
    assert isinstance(fault, LedgerFault)
    assert "fewer blocks" in fault.reason


def test_whose_a_device_is_can_be_asked(net: Net) -> None:
    client = net.join("b1")
    net.settle()
    client.events()
    client.ask_device("solar-1")
    client.ask_device("solar-1")
    net.settle()
    (known,) = client.events()
    assert isinstance(known, DeviceKnown)
    admission = Admission.from_payload(envelope.parse(admit("solar-1").statement).payload)
    assert all(getattr(known.admitted, name) == getattr(admission, name) for name in Admitted.__slots__)
    assert client.tick(1_000.0) == []


def test_a_device_that_is_none_is_said_to_be_none_unless_the_node_may_be_behind(net: Net) -> None:
    client = net.join("b1")
    net.settle()
    client.events()
    client.ask_device("solar-9")
    (asked,) = client.tick(0.0)
    query = Query.from_payload(envelope.parse(asked).payload)
    before = Page(query.request_id, QueryKind.DEVICE, client.height - 1, ())
    client.on_message("result", seal(before, "node"))
    assert client.events() == []
    net.settle()
    net.now_s += RESEND_AFTER_S
    net.settle()
    assert client.events() == [DeviceUnknown("solar-9", answered=True)]


def test_an_answer_about_another_device_or_by_a_stranger_is_not_taken(net: Net) -> None:
    client = net.join("b1")
    net.settle()
    client.events()
    client.ask_device("solar-1")
    (asked,) = client.tick(0.0)
    query = Query.from_payload(envelope.parse(asked).payload)
    answers = {name: net.engine.device(name) for name in ("solar-1", "wind-1")}
    other = Page(query.request_id, QueryKind.DEVICE, 9, answers["wind-1"])
    with pytest.raises(MalformedMessage):
        client.on_message("result", seal(other, "node"))
    right = Page(query.request_id, QueryKind.DEVICE, 9, answers["solar-1"])
    with pytest.raises(UnknownKey):
        client.on_message("result", seal(right, "b2"))
    assert client.events() == []
    client.on_message("result", seal(right, "node"))
    assert kinds(client.events()) == [DeviceKnown]


def test_a_question_about_a_device_is_given_up_where_nobody_answers(net: Net) -> None:
    client = net.join("b1")
    net.settle()
    client.events()
    client.ask_device("solar-1")
    sent = [len(client.tick(float(now_s))) for now_s in range(100)]
    assert sum(sent) == DEVICE_TIMEOUT_S / RESEND_AFTER_S
    assert client.events() == [DeviceUnknown("solar-1", answered=False)]
    for number in range(MAX_DEVICES_ASKED):
        client.ask_device(f"device-{number}")
    client.ask_device("device-0")
    with pytest.raises(TooManyPending):
        client.ask_device("one-more")


def test_answers_to_questions_that_nobody_asked_are_passed_over(net: Net) -> None:
    client = net.join("b1")
    net.settle()
    client.events()
    client.on_message("result", seal(Page(b"x" * 8, QueryKind.BLOCKS, 9, ()), "node"))
    client.on_message("result", seal(Result(b"x" * 32, ResultStatus.COMMITTED, 9), "node"))
    client.on_message("result", seal(Result(b"x" * 32, ResultStatus.REFUSED, reason="busy: x"), "node"))
    assert client.events() == []
    assert client.tick(1.0) == []


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_the_network_does_every_batch_is_told_once(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    """Messages are lost, doubled and swapped, clients reconnect; in the end each knows the same ledger."""
    net = Net(tmp_path_factory.mktemp("ledger"))
    clients = [net.join("b1"), net.join("b2")]
    told: dict[str, list[Event]] = {"b1": [], "b2": []}
    submitted: dict[str, set[bytes]] = {"b1": set(), "b2": set()}
    for number in range(data.draw(st.integers(1, 12))):
        name = data.draw(st.sampled_from(["b1", "b2"]))
        net.now_s += data.draw(st.sampled_from([0.0, 1.0, RESEND_AFTER_S]))
        if data.draw(st.booleans()):
            raw = batch(Void(bytes([number]) * 16), by=name)
            submitted[name].add(net.clients[name].submit(raw))
        if data.draw(st.booleans()):
            net.clients[name].on_connect()
        net.send()
        net.air = [net.air[i] for i in data.draw(st.permutations(range(len(net.air))))]
        doubled = data.draw(st.booleans())
        net.air += net.air if doubled else []
        lost = data.draw(st.sets(st.integers(0, 10)))
        numbers = {id(message): index for index, message in enumerate(net.air)}
        net.deliver(lambda message, lost=lost, numbers=numbers: numbers[id(message)] not in lost)
    for _ in range(3):
        net.now_s += RESEND_AFTER_S
        net.air += net.gateway.start()
        net.settle()
        net.deliver()
    net.settle()
    for name, client in net.clients.items():
        told[name] += client.events()
        assert (client.height, client.block_id) == (net.engine.height, net.engine.head.block_id)
        committed = [event.batch_id for event in told[name] if isinstance(event, BatchCommitted)]
        assert len(committed) == len(set(committed))
        assert set(committed) >= submitted[name]
        heights = [event.height for event in told[name] if isinstance(event, BlockApplied)]
        loaded = [event for event in told[name] if isinstance(event, HoldingsLoaded)]
        assert len(loaded) == 1
        assert heights == list(range(loaded[0].height + 1, net.engine.height + 1))
        assert client.pending == 0
    assert clients
    net.engine.close()
