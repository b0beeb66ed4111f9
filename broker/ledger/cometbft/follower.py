"""Follows a ledger network through one of its nodes, and hands batches in: what the engine's worker thread does.

One `turn` after the other, each with the time from outside and at most a few questions to one node; which node, how
often, and what to believe is decided here. A node that does not answer is left alone for a while, a longer one each
time, and the next is asked. Nothing goes back: a node that has not got as far as what was seen before is behind and is
passed over, and one whose blocks do not follow on the last one contradicts the ledger and is passed over loudly.

Batches are handed to one node in the order in which they came, since later ones build on earlier ones. They are handed
in again to every node that is turned to next, and after a while without news, until they stand in a block or are
refused. A node takes the same batch twice for one.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from broker.ledger.chain import Head, block_id_of
from broker.ledger.cometbft.application import TxCode
from broker.ledger.cometbft.rpc import Checked, Node, NodeBusy, NodeError, QueryRefused
from broker.ledger.engine import ClientResult, HoldingsPage
from broker.ledger.limits import MAX_INTRODUCTION_BYTES, MAX_QUEUED_BATCHES, MAX_QUEUED_BYTES
from broker.ledger.opening import Charter, RefusedBatch, charter_of, open_batch
from broker.ledger.operations import OperationCode
from broker.ledger.state import Key
from broker.protocol import cbor, envelope
from broker.protocol.envelope import Signer
from broker.protocol.errors import ProtocolError
from broker.protocol.keys import public_key_from_cose
from broker.protocol.limits import MAX_BLOCK_BYTES, MAX_REASON_CHARACTERS
from broker.protocol.messages import Block, Checkpoint, Genesis, MessageType, QueryKind, Result, ResultStatus

LOG: Final = logging.getLogger("energy-broker")

POLL_S: Final = 0.02
"""Between two looks at a node while something is going on. A look costs about a millisecond of CPU."""

IDLE_POLL_S: Final = 0.2
"""The same after nothing has happened for `ACTIVE_S`."""

ACTIVE_S: Final = 2.0

HAND_IN_AGAIN_S: Final = 4.0
"""After so long without a result a batch is handed in once more. Blocks take a second at most on a sound network."""

SILENT_S: Final = 5.0
"""With batches waiting and no new block for so long, the next node is tried: this one may be cut off from the rest."""

IDLE_SILENT_S: Final = 30.0
"""The same without batches waiting: there may just be nothing to hear."""

BACK_OFF_S: Final = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""How long a node is left alone, by how often in a row it has failed."""

BEHIND_S: Final = 0.5
BEHIND_TOLD_S: Final = 30.0
"""A node that is behind for longer is told to the operator: it may be cut off, or stand on another ledger's data."""

CONTRADICTION_S: Final = 60.0
BUSY_S: Final = 0.2
"""How long a node with a full queue is not given more."""

MAX_HANDED_IN_BYTES: Final = 2 * MAX_BLOCK_BYTES
"""Batches handed in during one turn, so that news do not wait behind them."""

MAX_BLOCK_PAGES: Final = 4
"""Pages of blocks taken in during one turn."""

MAX_RESULTS_ASKED: Final = 16
MAX_HOLDINGS_TRIES: Final = 5
MAX_QUESTIONS: Final = 64
_MAX_ANSWER_BYTES: Final = 2 * MAX_BLOCK_BYTES
_REVOCATION: Final = bytes((0x82, OperationCode.REVOKE_KEY, 0x81))
"""How every encoded revocation of a key begins."""


@dataclass(frozen=True, slots=True)
class HoldingsOf:
    """Asks for all that a party holds; the answer is one HoldingsPage."""

    party: str


@dataclass(frozen=True, slots=True)
class BlocksFrom:
    """Asks for a page of blocks; the answer is a BlocksPage."""

    height: int


@dataclass(frozen=True, slots=True)
class SignerOf:
    """Asks who has a key; the answer is a Signer or None."""

    key_id: bytes


@dataclass(frozen=True, slots=True)
class ProofOf:
    """Asks for a proof; the answer is a Proven."""

    kind: QueryKind
    place: int


@dataclass(frozen=True, slots=True)
class MadeOf:
    """Asks what became of one device's interval; the answer is a Proven with one entry, or none."""

    device: str
    start_s: int


@dataclass(frozen=True, slots=True)
class DeviceOf:
    """Asks as what a device was admitted; the answer is a Proven with one entry, or none.

    It is None where the node does not know the question: another one may.
    """

    device: str


Question = HoldingsOf | BlocksFrom | SignerOf | ProofOf | MadeOf | DeviceOf


@dataclass(frozen=True, slots=True)
class Proven:
    """The entries of a page that proves something; none where a node cannot."""

    entries: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class BlocksPage:
    """Sealed blocks in order, and the height of the ledger that they come from."""

    height: int
    blocks: tuple[bytes, ...]


Answer = HoldingsPage | BlocksPage | Proven | Signer | None


@dataclass(slots=True)
class News:
    """What a turn brought. `checkpoint` is sealed and of the last of the blocks."""

    blocks: list[bytes] = field(default_factory=list)
    results: list[ClientResult] = field(default_factory=list)
    checkpoint: bytes | None = None
    answers: dict[Question, Answer] = field(default_factory=dict)
    keys_revoked: bool = False
    """Who was known to have a key may not be believed to have it any more: some of the blocks revoke keys."""

    def __bool__(self) -> bool:
        return bool(self.blocks or self.results or self.checkpoint or self.answers)


class Contradiction(NodeError):
    """A node of another ledger, or whose blocks do not follow on those seen before: two histories, or damaged data."""


class Behind(NodeError):
    """A node that has not got as far as this ledger was seen before."""


@dataclass(slots=True)
class _Peer:
    node: Node
    failures: int = 0
    retry_at_s: float = 0.0
    ours: bool = False
    """It has shown that it keeps this ledger."""
    behind_since_s: float | None = None
    told_behind: bool = False


@dataclass(slots=True)
class _Pending:
    raw: bytes
    handed_in_s: float | None = None
    since: int | None = None
    """The network's height when it was handed in first; a refusal from before is an old one."""
    looked_at: int = -1
    """The network's height when its result was asked for last."""
    ask: bool = False
    """The node has hinted that there is a result."""


class Follower:
    """Follows the ledger of `genesis` through `nodes`, the first one that answers. `own` is known without asking."""

    def __init__(
        self, genesis: Genesis, nodes: Sequence[Node], own: Signer | None = None, known_height: int = 0
    ) -> None:
        self._genesis = genesis.to_bytes()
        self._charter: Charter = charter_of(genesis)
        self._peers = [_Peer(node) for node in nodes]
        self._at = 0
        self._own = {} if own is None else {own.key.key_id: own}
        self._signers = dict(self._own)
        self._pending: dict[bytes, _Pending] = {}
        self._pending_bytes = 0
        self._questions: dict[Question, None] = {}
        self._block_id: bytes | None = None
        self._network_height = 0
        self._answered_height = 0
        self._checkpoint_height = 0
        self._hold_until_s = 0.0
        self._active_s = 0.0
        self._heard_s: float | None = None
        self.height = known_height
        """Up to which blocks have been given."""
        self.wait_s = 0.0
        """When the next turn is due, unless there is something to do before."""

    @property
    def pending(self) -> int:
        """Batches without a result."""
        return len(self._pending)

    def turn(self, now_s: float, batches: Iterable[bytes], questions: Iterable[Question]) -> News:
        """Take in batches and questions, speak with a node, and say what is new. Raises nothing of a node's."""
        news = News()
        for raw in batches:
            self._take(raw)
        for question in questions:
            if len(self._questions) < MAX_QUESTIONS:
                self._questions[question] = None
        if self._heard_s is None:
            self._heard_s = now_s
        self.wait_s = POLL_S
        for _ in self._peers:
            peer = self._peers[self._at]
            if now_s < peer.retry_at_s:
                self._turn_to_next()
                continue
            try:
                self._check_ledger(peer)
                self._speak(peer.node, now_s, news)
            except NodeError as error:
                self._leave_alone(peer, error, now_s)
                continue
            if peer.failures or peer.told_behind:
                LOG.info("ledger node %s answers again", peer.node.url)
            peer.failures, peer.behind_since_s, peer.told_behind = 0, None, False
            break
        if news or self._pending or self._questions:
            self._active_s = now_s
        elif now_s - self._active_s >= ACTIVE_S:
            self.wait_s = IDLE_POLL_S
        return news

    def close(self) -> None:
        for peer in self._peers:
            peer.node.close()

    # --- which node

    def _turn_to_next(self) -> None:
        self._at = (self._at + 1) % len(self._peers)
        # The next node may know none of what waits, and must get it in order.
        for pending in self._pending.values():
            pending.handed_in_s = None

    def _leave_alone(self, peer: _Peer, error: NodeError, now_s: float) -> None:
        if isinstance(error, Contradiction):
            LOG.error("ledger node %s; compare its genesis and checkpoint with others before anything else", error)
            peer.retry_at_s = now_s + CONTRADICTION_S
        elif isinstance(error, Behind):
            LOG.debug("ledger node %s", error)
            peer.retry_at_s = now_s + BEHIND_S
            if peer.behind_since_s is None:
                peer.behind_since_s = now_s
            elif now_s - peer.behind_since_s >= BEHIND_TOLD_S and not peer.told_behind:
                peer.told_behind = True
                LOG.warning("ledger node %s for %d s; look whether it catches up", error, BEHIND_TOLD_S)
        else:
            if not peer.failures:
                LOG.warning("ledger node %s; trying the others, and this one again later", error)
            peer.retry_at_s = now_s + BACK_OFF_S[min(peer.failures, len(BACK_OFF_S) - 1)]
            peer.failures += 1
        self._turn_to_next()

    def _leave_if_silent(self, now_s: float) -> None:
        assert self._heard_s is not None
        limit_s = SILENT_S if self._pending else IDLE_SILENT_S
        if len(self._peers) > 1 and now_s - self._heard_s >= limit_s:
            self._heard_s = now_s
            self._turn_to_next()

    # --- one turn with one node

    def _speak(self, node: Node, now_s: float, news: News) -> None:
        height = self._look(node, now_s)
        self._hand_in(node, now_s, news)
        self._fetch(node, height, news)
        self._ask_results(node, news)
        self._answer_questions(node, news)
        self._leave_if_silent(now_s)

    def _check_ledger(self, peer: _Peer) -> None:
        if not peer.ours:
            if peer.node.query("/genesis", b"") != self._genesis:
                raise Contradiction(peer.node.url, f"keeps another ledger than {self._charter.ledger} of our genesis")
            peer.ours = True

    def _look(self, node: Node, now_s: float) -> int:
        """The node's ledger height, after a check that it is not behind."""
        head, network_height = _head(node)
        seen = max(self.height, self._answered_height)
        if head.height < seen or network_height < self._network_height:
            raise Behind(node.url, f"is behind: it has block {head.height}, but {seen} was seen before")
        if self._block_id is None:
            # Whoever needs what is before asks for it, and checks that it leads here.
            self.height, self._block_id = head.height, head.block_id
        if network_height > self._network_height:
            self._network_height = network_height
            self._heard_s = now_s
        return head.height

    def _take(self, raw: bytes) -> None:
        if raw in self._pending:
            return
        if len(self._pending) >= MAX_QUEUED_BATCHES or self._pending_bytes + len(raw) > MAX_QUEUED_BYTES:
            return  # Its client sends it again until it is answered.
        self._pending[raw] = _Pending(raw)
        self._pending_bytes += len(raw)

    def _drop(self, pending: _Pending) -> None:
        del self._pending[pending.raw]
        self._pending_bytes -= len(pending.raw)

    def _hand_in(self, node: Node, now_s: float, news: News) -> None:
        if now_s < self._hold_until_s:
            return
        handed_in = 0
        for pending in list(self._pending.values()):
            if pending.handed_in_s is not None and now_s - pending.handed_in_s < HAND_IN_AGAIN_S:
                continue
            if handed_in >= MAX_HANDED_IN_BYTES:
                self.wait_s = 0.0
                return
            if pending.since is None:
                pending.since = self._network_height
            try:
                checked = node.submit(pending.raw)
            except NodeBusy as busy:
                LOG.warning("ledger node %s; its queue is full, trying again", busy)
                self._hold_until_s = now_s + BUSY_S
                return
            handed_in += len(pending.raw)
            pending.handed_in_s = now_s
            self._take_check(node, pending, checked, news)

    def _take_check(self, node: Node, pending: _Pending, checked: Checked, news: News) -> None:
        match checked.code:
            case TxCode.APPLIED:
                pending.ask = checked.known
            case TxCode.COMMITTED_BEFORE:
                pending.ask = True
            case TxCode.UNKNOWN_SENDER:
                # No answer: it may be forged, or the sender's registration is still on its way. A client sends again.
                LOG.info("a batch is not taken by ledger node %s: %s", node.url, checked.log)
                self._drop(pending)
            case TxCode.REFUSED:
                self._drop(pending)
                identity = self._identity(node, pending.raw)
                if identity is not None:
                    self._refuse(news, *identity, None, f"malformed: {checked.log}")
            case code:
                raise NodeError(
                    node.url, f"unknown code {code} for a batch ({checked.log}); its program is another one"
                )

    def _fetch(self, node: Node, height: int, news: News) -> None:
        """Take in the blocks up to the node's height, as many as one turn may."""
        for _ in range(MAX_BLOCK_PAGES):
            if self.height >= height:
                break
            page = _blocks_page(node, self.height + 1)
            if not page.blocks:
                raise NodeError(node.url, f"it is at height {height}, but gives no block {self.height + 1}")
            for raw in page.blocks:
                self._take_block(node, raw, news)
        else:
            if self.height < height:
                self.wait_s = 0.0
        if self._checkpoint_height < self.height:
            # Also of a block from before this began: by it the clients learn what they have missed.
            news.checkpoint = self._checkpoint(node)

    def _take_block(self, node: Node, raw: bytes, news: News) -> None:
        try:
            parsed = envelope.parse(raw)
            block = Block.from_payload(parsed.payload) if parsed.message_type is MessageType.BLOCK else None
        except ProtocolError as error:
            raise NodeError(node.url, f"gives a block that is none ({error})") from error
        if block is None or block.height != self.height + 1 or block.previous != self._block_id:
            raise Contradiction(node.url, f"gives a block that does not follow on block {self.height} as seen before")
        for batch in block.batches:
            pending = self._pending.get(batch)
            if pending is not None:
                self._drop(pending)
                self._confirm(node, batch, block.height, news)
        if _revokes_keys(block.batches):
            self._signers, news.keys_revoked = dict(self._own), True
        self.height, self._block_id = block.height, block_id_of(raw)
        news.blocks.append(raw)

    def _checkpoint(self, node: Node) -> bytes | None:
        """The node's checkpoint, unless it is of a block that was not given yet."""
        raw = node.query("/checkpoint", b"")
        try:
            checkpoint = Checkpoint.from_payload(envelope.parse(raw).payload)
        except ProtocolError as error:
            raise NodeError(node.url, f"gives a checkpoint that is none ({error})") from error
        if checkpoint.height != self.height:
            return None
        self._checkpoint_height = self.height
        return raw

    def _ask_results(self, node: Node, news: News) -> None:
        """Ask what became of batches that no block has shown: refused, or committed before this began."""
        asked = 0
        for pending in list(self._pending.values()):
            if pending.handed_in_s is None or not (pending.ask or pending.looked_at < self._network_height):
                continue
            if asked == MAX_RESULTS_ASKED:
                return
            asked += 1
            hinted, pending.ask, pending.looked_at = pending.ask, False, self._network_height
            if not self._ask_result(node, pending, news) and not hinted:
                # Batches come to their turn in order, so those behind this one are still waiting too.
                return

    def _ask_result(self, node: Node, pending: _Pending, news: News) -> bool:
        """False if there is none yet."""
        identity = self._identity(node, pending.raw)
        if identity is None:
            return False
        items = _decoded(node, "/result", cbor.encode(identity[1]))
        if items is None:
            return False
        match items:
            case [0, int(height)]:
                if height <= self.height:
                    self._drop(pending)
                    self._confirm(node, pending.raw, height, news)
                return True
            case [1, int(network_height), operation, str(fault), str(reason)]:
                if pending.since is not None and network_height <= pending.since:
                    return False  # It was refused before, and has been handed in again since.
                self._drop(pending)
                self._refuse(news, *identity, operation, f"{fault}: {reason}")
                return True
        raise NodeError(node.url, "its answer to /result is none")

    def _confirm(self, node: Node, raw: bytes, height: int, news: News) -> None:
        identity = self._identity(node, raw)
        if identity is not None:
            client, batch_id = identity
            news.results.append(ClientResult(client, Result(batch_id, ResultStatus.COMMITTED, height=height)))

    @staticmethod
    def _refuse(news: News, client: str, batch_id: bytes, operation: int | None, reason: str) -> None:
        result = Result(batch_id, ResultStatus.REFUSED, operation=operation, reason=reason[:MAX_REASON_CHARACTERS])
        news.results.append(ClientResult(client, result))

    # --- whose batch it is

    def _identity(self, node: Node, raw: bytes) -> tuple[str, bytes] | None:
        """Sender and id of a batch that a node has taken, None while the sender is not known."""
        signer = self._signer(node, envelope.parse(raw).key_id)
        if signer is not None:
            return signer.name, envelope.sealed_id(raw, self._charter.ledger, signer.name)
        if len(raw) > MAX_INTRODUCTION_BYTES:
            return None
        try:
            opened = open_batch(raw, _NOBODY, self._charter)
        except RefusedBatch as refused:
            return refused.sender, refused.batch_id
        except ProtocolError:
            return None
        return opened.sender, opened.batch_id

    def _signer(self, node: Node, key_id: bytes) -> Signer | None:
        """Who has the key. It belongs to one party until it is revoked, so who is known need not be asked for again."""
        known = self._signers.get(key_id)
        if known is not None:
            return known
        items = _decoded(node, "/signer", cbor.encode(key_id))
        if items is None:
            return None
        try:
            name, cose_key = items
            signer = Signer(name, public_key_from_cose(cose_key))
        except (ProtocolError, ValueError, TypeError) as error:
            raise NodeError(node.url, f"its answer to /signer is none ({error})") from error
        self._signers[key_id] = signer
        return signer

    # --- questions

    def _answer_questions(self, node: Node, news: News) -> None:
        for question in list(self._questions):
            match question:
                case SignerOf(key_id):
                    answer: Answer = self._signer(node, key_id)
                case ProofOf(kind, place):
                    answer = _proven(node, kind, place)
                case MadeOf(device, start_s):
                    answer = _entries(node, "/made", [device, start_s])
                case DeviceOf(device):
                    answer = _admitted(node, device)
                case BlocksFrom(height):
                    answer = _blocks_page(node, height)
                case HoldingsOf(party):
                    answer = _holdings(node, party)
                    if answer is None:
                        continue  # The ledger went on between any two pages; the next turn tries again.
            if isinstance(answer, (BlocksPage, HoldingsPage)):
                if answer.height < self.height:
                    raise Behind(node.url, "is behind what it said itself")
                # It may be further than the blocks that were given. The next node has to be, too.
                self._answered_height = max(self._answered_height, answer.height)
            del self._questions[question]
            news.answers[question] = answer


class _Nobody:
    """The state of a ledger on which nobody is registered."""

    def get(self, key: Key) -> Any:
        return None

    def scan(self, prefix: Key, low: int, high: int) -> Iterator[Key]:
        return iter(())


_NOBODY: Final = _Nobody()


def _revokes_keys(batches: Iterable[bytes]) -> bool:
    """True if a key may be revoked in one of these batches; by chance now and then, which costs a question more."""
    return any(_REVOCATION in raw for raw in batches)


def _decoded(node: Node, path: str, question: bytes) -> Any:
    try:
        return cbor.decode(node.query(path, question), path, _MAX_ANSWER_BYTES)
    except ProtocolError as error:
        raise NodeError(node.url, f"its answer to {path} is no CBOR ({error})") from error


def _head(node: Node) -> tuple[Head, int]:
    match _decoded(node, "/head", b""):
        case [bytes(raw), int(network_height), *_]:
            try:
                return Head.from_bytes(raw), network_height
            except (ProtocolError, ValueError) as error:
                raise NodeError(node.url, f"its answer to /head is no head ({error})") from error
    raise NodeError(node.url, "its answer to /head is none")


def _proven(node: Node, kind: QueryKind, place: int) -> Proven:
    """A node's proof. Whoever asked checks it; the node need not be believed."""
    return _entries(node, "/prove", [int(kind), place])


def _admitted(node: Node, device: str) -> Proven | None:
    """A node of an earlier version is no worse for not knowing this question."""
    try:
        return _entries(node, "/device", [device])
    except QueryRefused as refused:
        LOG.info("ledger node %s", refused)
        return None


def _entries(node: Node, path: str, question: list[Any]) -> Proven:
    match _decoded(node, path, cbor.encode(question)):
        case list(entries) if all(type(raw) is bytes for raw in entries):
            return Proven(tuple(entries))
    raise NodeError(node.url, f"its answer to {path} is none")


def _blocks_page(node: Node, from_height: int) -> BlocksPage:
    match _decoded(node, "/blocks", cbor.encode([from_height, MAX_BLOCK_BYTES])):
        case [int(height), list(blocks)] if all(type(raw) is bytes for raw in blocks):
            return BlocksPage(height, tuple(blocks))
    raise NodeError(node.url, "its answer to /blocks is none")


def _holdings(node: Node, party: str) -> HoldingsPage | None:
    """All that a party holds at one height; None if the ledger went on between the pages, again and again."""
    for _ in range(MAX_HOLDINGS_TRIES):
        entries: list[bytes] = []
        first: int | None = None
        cursor: bytes | None = None
        while True:
            match _decoded(node, "/holdings", cbor.encode([party, cursor])):
                case [int(height), list(page), (bytes() | None) as cursor] if all(type(raw) is bytes for raw in page):
                    pass
                case _:
                    raise NodeError(node.url, "its answer to /holdings is none")
            first = height if first is None else first
            if height != first:
                break
            entries += page
            if cursor is None:
                return HoldingsPage(height, tuple(entries), None)
    return None
