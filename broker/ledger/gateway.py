"""Serves a ledger engine over MQTT: messages on `ledger/<ledger>/submit` in, answers, blocks and checkpoints out.

The same for every engine, and without IO of its own: the shell gives it payloads, lets it commit when it has taken in
what was waiting, publishes what it returns, and only then acknowledges the messages. The broker that hosts a ledger
uses it like everybody else.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from broker.ledger.engine import ClientResult, LedgerEngine, NotYet, View
from broker.ledger.limits import MAX_BLOCKS_ON_PAGE, MAX_VIEW_AGE, MAX_VIEWS, MAX_WAITING_QUERIES
from broker.ledger.receipts import ProofFailed
from broker.protocol import cbor, envelope
from broker.protocol.codec import Bytes, Name, Row, Unsigned
from broker.protocol.errors import MalformedMessage, ProtocolError
from broker.protocol.keys import PrivateKey
from broker.protocol.limits import MAX_BLOCK_BYTES
from broker.protocol.messages import Message, MessageType, Page, Query, QueryKind
from broker.protocol.topics import Topics


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message to publish."""

    topic: str
    payload: bytes
    qos: int
    retain: bool


@dataclass(slots=True)
class _SharedView:
    """The ledger's holdings at one height, and the clients that have not come to their last page of it."""

    view: View
    clients: set[str] = field(default_factory=set)


_CURSOR: Final = Row((Unsigned(), Bytes(1, 200)))
"""The height of a view, and the engine's own cursor. So a client goes on where it was even after a restart of this
gateway, unless the ledger has gone on meanwhile."""


class Gateway:
    """Answers for `engine`, signing as the node `name` with `key`."""

    def __init__(self, engine: LedgerEngine, topics: Topics, name: str, key: PrivateKey) -> None:
        self._engine = engine
        self._topics = topics
        self._name = name
        self._key = key
        self._views: dict[tuple[int, str | None], _SharedView] = {}
        self._waiting: dict[bytes, None] = {}
        self._published: bytes | None = None

    def start(self) -> list[Outgoing]:
        """What to publish at start and after each reconnect: the retained checkpoint, if it is known."""
        return self._checkpoint()

    def close(self) -> None:
        """Let go of everything that is being paged out; the clients begin again."""
        for shared in self._views.values():
            shared.view.close()
        self._views = {}

    def on_message(self, payload: bytes) -> list[Outgoing]:
        """Take in one payload of the `submit` topic: queue a batch, or answer a query.

        Raises ProtocolError if nobody registered is known to have signed it. There is no answer then, because it might
        reach somebody in whose name a stranger wrote; acknowledge the message and log the error.
        """
        message_type = envelope.parse(payload).message_type
        if message_type is MessageType.BATCH:
            refused = self._engine.submit(payload)
            return [] if refused is None else [self._result(refused)]
        if message_type is not MessageType.QUERY:
            raise MalformedMessage("ledger submit", f"a batch or a query, got a {message_type.name.lower()}")
        try:
            return self._answers(payload)
        except NotYet:
            # What is displaced is asked again by its client.
            while len(self._waiting) >= MAX_WAITING_QUERIES:
                del self._waiting[next(iter(self._waiting))]
            self._waiting[payload] = None
            return []

    def _answers(self, payload: bytes) -> list[Outgoing]:
        opened = envelope.open_envelope(payload, self._engine.ledger, self._engine.signer)
        assert isinstance(opened.message, Query)
        page = self._page(opened.sender, opened.message)
        return [] if page is None else [self._to(opened.sender, page)]

    def commit(self) -> list[Outgoing]:
        """Commit what is queued; returns blocks for the feed, the answers, and the new checkpoint.

        Queries that the engine could not answer at once are tried again. Raises LedgerError if the disk refuses; what
        was queued stays queued.
        """
        committed = self._engine.commit()
        feed = self._topics.ledger_feed(self._engine.ledger)
        outgoing = [Outgoing(feed, block, 1, False) for block in committed.blocks]
        outgoing += [self._result(result) for result in committed.results]
        if self._engine.checkpoint() != self._published:
            # Also where no block is new here: a network goes on without this gateway, and its clients must learn it.
            outgoing += self._checkpoint()
        if committed.blocks:
            self._drop_old_views()
        waiting, self._waiting = self._waiting, {}
        for payload in waiting:
            with suppress(ProtocolError):  # Nobody registered has signed it, as has turned out now.
                outgoing += self.on_message(payload)
        return outgoing

    def _result(self, answer: ClientResult) -> Outgoing:
        return self._to(answer.client, answer.result)

    def _to(self, client: str, message: Message) -> Outgoing:
        raw = envelope.seal(message, self._key, self._engine.ledger, self._name)
        return Outgoing(self._topics.ledger_result(self._engine.ledger, client), raw, 1, False)

    def _checkpoint(self) -> list[Outgoing]:
        topic = self._topics.ledger_checkpoint(self._engine.ledger)
        raw = self._published = self._engine.checkpoint()
        # QoS 0: the next one says more, and a new connection is told the last.
        return [] if raw is None else [Outgoing(topic, raw, 0, True)]

    def _page(self, client: str, query: Query) -> Page | None:
        if query.kind is QueryKind.BLOCKS:
            height, entries = self._blocks(query.from_height or 1)
            return Page(query.request_id, query.kind, height, entries)
        if query.kind is QueryKind.HOLDINGS:
            return self._holdings(client, query)
        if query.kind is QueryKind.MADE:
            made = self._engine.made(_device_in(query), query.place or 0)
            return Page(query.request_id, query.kind, self._engine.height, made)
        if query.kind is QueryKind.DEVICE:
            admitted = self._engine.device(_device_in(query))
            return None if admitted is None else Page(query.request_id, query.kind, self._engine.height, admitted)
        return Page(query.request_id, query.kind, self._engine.height, self._proven(query))

    def _proven(self, query: Query) -> tuple[bytes, ...]:
        """What was asked to be proven, nothing if it cannot be: the client knows which operations there are."""
        try:
            return self._engine.prove(query.kind, query.place or 0)
        except ProofFailed:
            return ()

    def _blocks(self, from_height: int) -> tuple[int, tuple[bytes, ...]]:
        """As many blocks as fit in one page; the client asks again from the next height."""
        entries: list[bytes] = []
        size = 0
        for raw in self._engine.blocks(from_height):
            size += len(raw)
            if entries and (size > MAX_BLOCK_BYTES or len(entries) == MAX_BLOCKS_ON_PAGE):
                break
            entries.append(raw)
        return self._engine.height, tuple(entries)

    def _holdings(self, client: str, query: Query) -> Page | None:
        """One page of what the client holds; None while too many heights are being paged out.

        If the height of its cursor is gone, the answer is a first page again, which the client sees by its height.
        """
        height, position = None, None
        if query.cursor is not None:
            height, position = _CURSOR.decode(cbor.decode(query.cursor, "cursor", 256), "cursor")
        wanted = self._engine.height if height is None else height
        shared = self._views.get((wanted, None)) or self._views.get((wanted, client))
        if shared is None:
            self._leave(client)
            if len(self._views) >= MAX_VIEWS:
                return None
            shared = _SharedView(self._engine.open_view(client))
            self._views[shared.view.height, shared.view.party] = shared
        elif client not in shared.clients:
            self._leave(client)
        shared.clients.add(client)
        # Of another height the position would leave out what has come before it, and repeat what has gone behind.
        page = shared.view.page(client, position if height == shared.view.height else None)
        following = None
        if page.next_cursor is None:
            self._leave(client)
        else:
            following = cbor.encode([page.height, page.next_cursor])
        return Page(query.request_id, query.kind, page.height, page.entries, following)

    def _leave(self, client: str) -> None:
        """The client has its last page, or begins at another height. A view that nobody needs any more is closed."""
        for key, shared in list(self._views.items()):
            shared.clients.discard(client)
            if not shared.clients:
                shared.view.close()
                del self._views[key]

    def _drop_old_views(self) -> None:
        for key in [key for key in self._views if self._engine.height - key[0] > MAX_VIEW_AGE]:
            self._views.pop(key).view.close()


def _device_in(query: Query) -> str:
    """The name of the device that is asked about. Raises MalformedMessage."""
    return Name().decode((query.cursor or b"").decode("ascii", "replace"), "cursor")
