"""The ledger of a CometBFT network as an engine: what a broker's gateway uses in place of the embedded one.

All talk with nodes happens on one worker thread (`follower` says what it does there), so the broker's loop never waits
for the network. Between the two stand bounded queues: batches and questions one way, news the other. When there is
news the worker calls `wake`, and `commit` hands it over: blocks come at any time, other brokers' too. What must be
fetched first raises NotYet, and the gateway tries again after the next `commit`.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from broker.ledger.cometbft.follower import (
    Answer,
    BlocksFrom,
    BlocksPage,
    DeviceOf,
    Follower,
    HoldingsOf,
    MadeOf,
    News,
    ProofOf,
    Proven,
    Question,
    SignerOf,
)
from broker.ledger.cometbft.rpc import Node
from broker.ledger.engine import ClientResult, Committed, HoldingsPage, NotYet
from broker.ledger.limits import MAX_HOLDINGS_ON_PAGE, MAX_QUEUED_BATCHES, MAX_QUEUED_BYTES
from broker.protocol import cbor, envelope
from broker.protocol.codec import Row, Unsigned
from broker.protocol.envelope import Signer
from broker.protocol.messages import Genesis, QueryKind

MAX_BLOCKS_AHEAD: Final = 64
"""Blocks that wait for the broker's loop. Beyond it the worker asks for no more."""

MAX_ANSWERS_KEPT: Final = 256
"""Answers, and questions that an answer is wanted to. Who asked for an older one asks again."""

AHEAD_PAUSE_S: Final = 0.05
_CLOSE_LIMIT_S: Final = 10.0
_CURSOR: Final = Row((Unsigned(),))
"""How many entries of the holdings were on the pages before."""


class HoldingsOfParty:
    """The holdings of one party, fetched whole."""

    def __init__(self, party: str, holdings: HoldingsPage) -> None:
        self._party = party
        self._holdings = holdings

    @property
    def party(self) -> str:
        return self._party

    @property
    def height(self) -> int:
        return self._holdings.height

    def page(self, party: str, cursor: bytes | None = None) -> HoldingsPage:
        """What it holds; go on with `next_cursor`. Raises MalformedMessage for a cursor that is none."""
        assert party == self._party
        start = 0 if cursor is None else _CURSOR.decode(cbor.decode(cursor, "cursor", 16), "cursor")[0]
        end = start + MAX_HOLDINGS_ON_PAGE
        entries = self._holdings.entries
        return HoldingsPage(self.height, entries[start:end], cbor.encode([end]) if end < len(entries) else None)

    def close(self) -> None:
        """There is nothing to let go of."""


class CometbftLedger:
    """The ledger of `genesis`, followed through `nodes`, of which the first that answers is asked.

    `own` is the party whose broker this is: it is answered before it is registered. `known_height` is how far an
    earlier run has seen the ledger get: a node that has not got there is behind.
    """

    def __init__(
        self,
        genesis: Genesis,
        nodes: Sequence[Node],
        own: Signer | None = None,
        *,
        known_height: int = 0,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = genesis.ledger
        self._follower = Follower(genesis, nodes, own, known_height)
        self._monotonic_s = monotonic_s
        self._own: dict[bytes, Signer] = {} if own is None else {own.key.key_id: own}
        self._signers = dict(self._own)
        self._changed = threading.Condition()
        self._batches: dict[bytes, None] = {}
        self._batches_bytes = 0
        self._questions: dict[Question, None] = {}
        self._fetched: dict[Question, Answer] = {}
        self._answers: dict[Question, Answer] = {}
        self._awaited: dict[Question, None] = {}
        self._blocks: list[bytes] = []
        self._results: list[ClientResult] = []
        self._checkpoint: bytes | None = None
        self._keys_revoked = False
        self._blocks_height = 0
        self._height = 0
        self._wait_s = 0.0
        self._started = False
        self._closing = False
        self._wake: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._work, name="ledger-network", daemon=True)

    def start(self, wake: Callable[[], None]) -> None:
        """Begin to follow; `wake` is called, on another thread, whenever there is news."""
        self._wake = wake
        self._started = True
        self._thread.start()

    def close(self) -> None:
        """End the worker. What was not handed in is gone here, and its clients send it again."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._started:
            self._thread.join(_CLOSE_LIMIT_S)

    # --- what the gateway uses

    @property
    def ledger(self) -> str:
        return self._ledger

    @property
    def height(self) -> int:
        """The height up to which blocks or answers have been handed out, 0 before any."""
        return self._height

    def signer(self, key_id: bytes) -> Signer | None:
        """The registered party with that key, None if there is none. Raises NotYet."""
        known = self._signers.get(key_id)
        if known is not None:
            return known
        answer = self._answer(SignerOf(key_id))
        assert answer is None or isinstance(answer, Signer)
        if answer is not None:
            # A key belongs to one party until it is revoked.
            self._signers[key_id] = answer
        return answer

    def submit(self, raw_batch: bytes) -> ClientResult | None:
        """Queue a batch for the network; a node checks its signature. Its answer comes with some `commit`.

        With a full queue it is dropped without an answer: its client sends it again. Raises MalformedMessage.
        """
        envelope.parse(raw_batch)
        with self._changed:
            if raw_batch in self._batches:
                return None
            if len(self._batches) < MAX_QUEUED_BATCHES and self._batches_bytes + len(raw_batch) <= MAX_QUEUED_BYTES:
                self._batches[raw_batch] = None
                self._batches_bytes += len(raw_batch)
                self._changed.notify()
        return None

    def commit(self) -> Committed:
        """What has become known since the last call. Raises RuntimeError if the worker has died of its own fault.

        Whoever waits for an answer asks again now. One that nobody waits for any more is dropped: it would be old news
        to whoever asks the same another day.
        """
        if self._started and not self._thread.is_alive():
            raise RuntimeError("the thread that follows the ledger's network has ended; its traceback stands above")
        with self._changed:
            blocks, self._blocks = tuple(self._blocks), []
            results, self._results = tuple(self._results), []
            fetched, self._fetched = self._fetched, {}
            if self._keys_revoked:
                self._signers, self._keys_revoked = dict(self._own), False
            self._height = max(self._height, self._blocks_height)
        for question in self._answers:
            self._awaited.pop(question, None)
        self._answers = {question: answer for question, answer in fetched.items() if question in self._awaited}
        return Committed(blocks, results)

    def open_view(self, party: str) -> "HoldingsOfParty":
        """All that `party` holds, as of one height. Raises NotYet."""
        answer = self._answer(HoldingsOf(party))
        assert isinstance(answer, HoldingsPage)
        self._height = max(self._height, answer.height)
        return HoldingsOfParty(party, answer)

    def blocks(self, from_height: int) -> Iterator[bytes]:
        """A page of blocks from that height on. Raises NotYet."""
        answer = self._answer(BlocksFrom(from_height))
        assert isinstance(answer, BlocksPage)
        self._height = max(self._height, answer.height)
        return iter(answer.blocks)

    def prove(self, kind: QueryKind, place: int) -> tuple[bytes, ...]:
        """The entries of a page that proves this, as a node gave them. Raises NotYet."""
        answer = self._answer(ProofOf(kind, place))
        assert isinstance(answer, Proven)
        return answer.entries

    def made(self, device: str, start_s: int) -> tuple[bytes, ...]:
        """What became of one device's interval, as a node says. Raises NotYet."""
        answer = self._answer(MadeOf(device, start_s))
        assert isinstance(answer, Proven)
        return answer.entries

    def device(self, device: str) -> tuple[bytes, ...] | None:
        """As what a device was admitted, as a node says; None if it does not know the question. Raises NotYet."""
        answer = self._answer(DeviceOf(device))
        assert answer is None or isinstance(answer, Proven)
        return None if answer is None else answer.entries

    def checkpoint(self) -> bytes | None:
        """The sealed checkpoint of a node for the last block, None before one is known."""
        with self._changed:
            return self._checkpoint

    def _answer(self, question: Question) -> Answer:
        """An answer, handed out once: the next time it may be another one."""
        if question in self._answers:
            self._awaited.pop(question, None)
            return self._answers.pop(question)
        while len(self._awaited) >= MAX_ANSWERS_KEPT:
            del self._awaited[next(iter(self._awaited))]
        self._awaited[question] = None
        with self._changed:
            self._questions[question] = None
            self._changed.notify()
        raise NotYet(f"{question} is being fetched")

    # --- the worker

    @property
    def running(self) -> bool:
        """True while the worker runs."""
        return self._thread.is_alive()

    def work_once(self, now_s: float) -> None:
        """One turn of the worker. `start` has it done on a thread of its own, again and again."""
        with self._changed:
            if len(self._blocks) >= MAX_BLOCKS_AHEAD:
                self._wait_s = AHEAD_PAUSE_S
                return
            batches, self._batches, self._batches_bytes = self._batches, {}, 0
            questions, self._questions = self._questions, {}
        news = self._follower.turn(now_s, batches, questions)
        self._wait_s = self._follower.wait_s
        if news:
            self._hand_over(news)
            self._wake()

    def _work(self) -> None:
        while True:
            with self._changed:
                ahead = len(self._blocks) >= MAX_BLOCKS_AHEAD
                if not self._closing and (ahead or not (self._batches or self._questions)):
                    self._changed.wait(self._wait_s)
                if self._closing:
                    break
            self.work_once(self._monotonic_s())
        self._follower.close()

    def _hand_over(self, news: News) -> None:
        with self._changed:
            self._blocks += news.blocks
            self._results += news.results
            self._checkpoint = news.checkpoint or self._checkpoint
            self._blocks_height = self._follower.height
            if news.keys_revoked:
                self._keys_revoked = True
                self._fetched = {each: self._fetched[each] for each in self._fetched if not isinstance(each, SignerOf)}
            for question, answer in news.answers.items():
                while len(self._fetched) >= MAX_ANSWERS_KEPT:
                    del self._fetched[next(iter(self._fetched))]
                self._fetched[question] = answer
