"""Serves a ledger engine over MQTT: messages on `ledger/<ledger>/submit` in, answers, blocks and checkpoints out.

The same for every engine, and without IO of its own: the shell gives it payloads, lets it commit when it has taken in
what was waiting, publishes what it returns, and only then acknowledges the messages. The broker that hosts a ledger
uses it like everybody else.
"""

from dataclasses import dataclass
from typing import Final

from broker.ledger.engine import ClientResult, LedgerEngine
from broker.ledger.limits import MAX_HOLDINGS_ON_PAGE, MAX_SNAPSHOTS
from broker.protocol import cbor, envelope
from broker.protocol.codec import Row, Unsigned
from broker.protocol.errors import MalformedMessage
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


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """All holdings of a party at one height, so that its pages fit together while the ledger goes on."""

    height: int
    entries: tuple[bytes, ...]


_CURSOR: Final = Row((Unsigned(), Unsigned()))


class Gateway:
    """Answers for `engine`, signing as the node `name` with `key`."""

    def __init__(self, engine: LedgerEngine, topics: Topics, name: str, key: PrivateKey) -> None:
        self._engine = engine
        self._topics = topics
        self._name = name
        self._key = key
        self._snapshots: dict[str, _Snapshot] = {}

    def start(self) -> list[Outgoing]:
        """What to publish at start and after each reconnect: the retained checkpoint."""
        return [self._checkpoint()]

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
        opened = envelope.open_envelope(payload, self._engine.ledger, self._engine.signer)
        assert isinstance(opened.message, Query)
        return [self._page(opened.sender, opened.message)]

    def commit(self) -> list[Outgoing]:
        """Commit what is queued; returns blocks for the feed, the answers, and the new checkpoint.

        Raises LedgerError if the disk refuses; what was queued stays queued.
        """
        committed = self._engine.commit()
        feed = self._topics.ledger_feed(self._engine.ledger)
        outgoing = [Outgoing(feed, block, 1, False) for block in committed.blocks]
        outgoing += [self._result(result) for result in committed.results]
        if committed.blocks:
            outgoing.append(self._checkpoint())
        return outgoing

    def _result(self, answer: ClientResult) -> Outgoing:
        return self._to(answer.client, answer.result)

    def _to(self, client: str, message: Message) -> Outgoing:
        raw = envelope.seal(message, self._key, self._engine.ledger, self._name)
        return Outgoing(self._topics.ledger_result(self._engine.ledger, client), raw, 1, False)

    def _checkpoint(self) -> Outgoing:
        topic = self._topics.ledger_checkpoint(self._engine.ledger)
        # QoS 0: the next one says more, and a new connection is told the last.
        return Outgoing(topic, self._engine.checkpoint(), 0, True)

    def _page(self, client: str, query: Query) -> Outgoing:
        if query.kind is QueryKind.BLOCKS:
            height, entries = self._blocks(query.from_height or 1)
            return self._to(client, Page(query.request_id, query.kind, height, entries))
        height, entries, cursor = self._holdings(client, query.cursor)
        return self._to(client, Page(query.request_id, query.kind, height, entries, cursor))

    def _blocks(self, from_height: int) -> tuple[int, tuple[bytes, ...]]:
        """As many blocks as fit in one page; the client asks again from the next height."""
        entries: list[bytes] = []
        size = 0
        for raw in self._engine.blocks(from_height):
            size += len(raw)
            if entries and size > MAX_BLOCK_BYTES:
                break
            entries.append(raw)
        return self._engine.height, tuple(entries)

    def _holdings(self, client: str, cursor: bytes | None) -> tuple[int, tuple[bytes, ...], bytes | None]:
        """One page of the client's snapshot.

        If it is gone and the ledger has gone on since, the answer is a first page again, which the client sees by its
        height.
        """
        snapshot = self._snapshots.pop(client, None)
        height, start = (None, 0) if cursor is None else _CURSOR.decode(cbor.decode(cursor, "cursor", 32), "cursor")
        if snapshot is None or snapshot.height != height:
            snapshot = self._taken(client)
            if snapshot.height != height:
                start = 0
        end = start + MAX_HOLDINGS_ON_PAGE
        following = None
        if end < len(snapshot.entries):
            while len(self._snapshots) >= MAX_SNAPSHOTS:
                del self._snapshots[next(iter(self._snapshots))]
            self._snapshots[client] = snapshot
            following = cbor.encode([snapshot.height, end])
        return snapshot.height, snapshot.entries[start:end], following

    def _taken(self, client: str) -> _Snapshot:
        # No commit comes between these reads, because engine and gateway live on one thread.
        page = self._engine.holdings(client)
        entries = list(page.entries)
        while page.next_cursor is not None:
            page = self._engine.holdings(client, page.next_cursor)
            entries += page.entries
        return _Snapshot(page.height, tuple(entries))
