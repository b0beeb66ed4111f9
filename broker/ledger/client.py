"""What a broker holds of a ledger: submits batches, follows the blocks, and loads the broker's holdings at start.

Sans-IO: the shell gives it every message on `ledger/<ledger>/{result/<party>,feed,checkpoint}`, tells it of connects,
calls `tick` with a monotonic clock, publishes what that returns on `ledger/<ledger>/submit`, and takes `events`.

The feed is the truth. A batch counts as committed when it stands in a verified block, whatever was answered before; a
refusal is final only in that the client stops resending (`submit` the same bytes again where the reason was passing).
Blocks are taken in height by height: each must be signed by a validator and name the one before. What is missing is
fetched, what comes twice is passed over.

Who the validators are begins with the genesis. Changes come with the blocks; those from before the client began (or
while it was away) are asked for at the start, and whenever something comes under an unknown key. Either way a change
counts for the registrars' signatures that it carries (`validator_set`), not for who hands it over.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from broker.ledger.admitted import Admitted, decode_admitted
from broker.ledger.chain import block_id_of, genesis_hash
from broker.ledger.engine import BUSY
from broker.ledger.holding import Holding, decode_holding
from broker.ledger.limits import (
    DEVICE_TIMEOUT_S,
    MAX_DEVICES_ASKED,
    MAX_EARLY_BLOCKS,
    MAX_PENDING_BATCHES,
    MAX_PROOF_REQUESTS,
    PROOF_TIMEOUT_S,
    RESEND_AFTER_S,
    RESEND_TO_NEW_NODE_S,
)
from broker.ledger.made import Made, decode_made
from broker.ledger.operations import Operation, OperationCode, SetValidator, decode_operation, operation_code
from broker.ledger.proofs import ConsistencyProof, OperationsProof, read_proof
from broker.ledger.receipts import verify_checkpoint
from broker.ledger.rules.validators import first_set, signers_of
from broker.ledger.state import ValidatorsRow
from broker.ledger.trust import Trust
from broker.ledger.validator_set import changes_in, sequence_of, sets_after
from broker.ledger.witness import Equivocation, Watch, statement_of
from broker.protocol import envelope
from broker.protocol.envelope import Signer
from broker.protocol.errors import MalformedMessage, ProtocolError, UnknownKey
from broker.protocol.keys import PrivateKey, public_key_from_cose
from broker.protocol.messages import (
    MESSAGE_CLASSES,
    REQUEST_ID_BYTES,
    Batch,
    Block,
    Checkpoint,
    Genesis,
    MessageType,
    Page,
    Query,
    QueryKind,
    Result,
    ResultStatus,
    Witness,
)

_NO_VALIDATOR: Final = ""
"""The sender of what a party's own node says that is no validator."""


@dataclass(frozen=True, slots=True)
class HoldingsLoaded:
    """What the party owned at `height`, from the time on that was asked for.

    The events after it begin with block `height + 1`.
    """

    height: int
    holdings: tuple[Holding, ...]


@dataclass(frozen=True, slots=True)
class BatchCommitted:
    """A batch of the party's own stands in block `height`.

    `operations` is None for a batch that was submitted through this client: its maker knows it. Batches of an earlier
    run come with their operations.
    """

    batch_id: bytes
    height: int
    operations: tuple[Operation, ...] | None = None


@dataclass(frozen=True, slots=True)
class BatchRefused:
    """The ledger refused a batch whole. `code` is a `rules.Fault` or "busy"; `operation` the index at fault.

    `transient`: no fault of the batch; submit it again later.
    """

    batch_id: bytes
    operation: int | None
    code: str
    reason: str
    transient: bool


@dataclass(frozen=True, slots=True)
class ForeignBatch:
    """Operations of another broker's batch in block `height`, signed with the key `key_id`.

    Deliveries are left out: they move what the other broker owned to its own consumers and concern nobody else.
    """

    height: int
    key_id: bytes
    operations: tuple[Operation, ...]


@dataclass(frozen=True, slots=True)
class OperationProven:
    """The answer to `prove_operation`, checked: the operation stands on the ledger under `checkpoint`."""

    request_id: bytes
    proof: OperationsProof
    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True)
class ConsistencyProven:
    """The answer to `prove_consistency`, checked: the ledger at `newer` goes on from `older`."""

    request_id: bytes
    proof: ConsistencyProof
    older: Checkpoint
    newer: Checkpoint


@dataclass(frozen=True, slots=True)
class NotProven:
    """There is no proof: the ledger says so (`answered`), or nobody gave a sound one in time."""

    request_id: bytes
    answered: bool


@dataclass(frozen=True, slots=True)
class MadeKnown:
    """The answer to `ask_made`: true at the height of the last block before this event."""

    made: Made


@dataclass(frozen=True, slots=True)
class DeviceKnown:
    """The answer to `ask_device`."""

    admitted: Admitted


@dataclass(frozen=True, slots=True)
class DeviceUnknown:
    """There is no such device: the ledger says so (`answered`), or nobody told in time of any."""

    device: str
    answered: bool


@dataclass(frozen=True, slots=True)
class BlockApplied:
    """All events of block `height` have been given."""

    height: int


@dataclass(frozen=True, slots=True)
class LedgerFault:
    """The ledger contradicts itself: a validly signed block that does not fit the chain. The client stops following.

    An operator must compare checkpoints with others before going on. `evidence`, where there is some, holds both signed
    messages and convinces anybody with the ledger's trust file.
    """

    height: int
    reason: str
    evidence: Equivocation | None = None


Event = (
    HoldingsLoaded
    | BatchCommitted
    | BatchRefused
    | ForeignBatch
    | OperationProven
    | ConsistencyProven
    | NotProven
    | MadeKnown
    | DeviceKnown
    | DeviceUnknown
    | BlockApplied
    | LedgerFault
)


class TooManyPending(Exception):
    """The party has too many unanswered batches or questions; wait for answers before it makes more."""


class _Phase(Enum):
    LOADING = auto()  # holdings are being paged in
    ANCHORING = auto()  # the block at the holdings' height is being fetched, for its id
    FOLLOWING = auto()
    STOPPED = auto()  # after a LedgerFault


@dataclass(slots=True)
class _Pending:
    raw: bytes
    batch_id: bytes
    sent_s: float | None = None
    """When it was sent last, None while it is due at once."""
    height: int | None = None
    """The block that the ledger says it is in."""


@dataclass(slots=True)
class _Asked:
    query: Query
    height: int
    """Where the client stood when it asked. The ledger had these blocks, so its answer cannot know of fewer."""
    sent_s: float | None = None


@dataclass(slots=True)
class _Wanted:
    """A question beside the following of blocks: for a proof, for changes of validators, about a device."""

    query: Query
    older: bytes | None = None
    """Of a proof of consistency: the older sealed checkpoint."""
    sent_s: float | None = None
    made: Made | None = None
    """Of a question what became of an interval: the answer, until its height is reached."""
    until_s: float | None = None
    """When it is given up, None before it was sent first."""


class LedgerClient:
    """Follows ledger `genesis` for `party`, which signs its queries with `key`.

    `random_bytes(n)` gives request ids. `load_holdings=False` starts at the first block instead, for an observer that
    wants the whole history. `resume` is (height, block id) up to which an earlier run has taken in the blocks: then the
    events of the blocks since come first, and HoldingsLoaded in its place among them. Holdings of intervals before
    `holdings_from_s` are passed over: the ledger keeps them for months, and a party has no use for most of them.
    """

    def __init__(
        self,
        genesis: Genesis,
        party: str,
        key: PrivateKey,
        random_bytes: Callable[[int], bytes],
        load_holdings: bool = True,
        resume: tuple[int, bytes] | None = None,
        holdings_from_s: int = 0,
    ) -> None:
        self._ledger = genesis.ledger
        self._party = party
        self._key = key
        self._random_bytes = random_bytes
        self._genesis_hash = genesis_hash(genesis)
        self._registrars = {
            signer.key.key_id: signer
            for signer in (Signer(named.name, public_key_from_cose(named.key)) for named in genesis.registrars)
        }
        self._set = first_set(genesis.validators)
        self._validators = signers_of(self._set)
        self._sealers = dict(self._validators)
        """Everybody who was a validator at some time. Old blocks carry their seals."""
        self._pending: dict[bytes, _Pending] = {}
        self._own_raw: dict[bytes, bytes] = {}
        self._events: list[Event] = []
        self._early: dict[int, envelope.Opened] = {}
        self._holdings: list[Holding] = []
        self._holdings_from_s = holdings_from_s
        self._holdings_height: int | None = None
        self._height, self._block_id = resume if resume is not None else (0, self._genesis_hash)
        self._resumes = resume is not None
        self._awaited: HoldingsLoaded | None = None
        self._known_height = 0
        self._watch = Watch(genesis.ledger)
        self._offered: dict[int, bytes] = {}
        self._witnessed: bytes | None = None
        self._convicted = False
        self._node_came_up = False
        self._asked: _Asked | None = None
        self._wanted: dict[bytes, _Wanted] = {}
        self._phase = _Phase.LOADING if load_holdings else _Phase.FOLLOWING
        self._ask_validators()
        if load_holdings:
            self._ask(QueryKind.HOLDINGS)
        else:
            self._ask(QueryKind.BLOCKS, from_height=1)

    # --- what the broker does

    @property
    def height(self) -> int:
        """The height up to which events have been given, or the holdings' height."""
        return self._height

    @property
    def loaded(self) -> bool:
        """True once the holdings are known (or were not asked for) and blocks are being followed."""
        return self._phase is _Phase.FOLLOWING and self._awaited is None

    @property
    def has_events(self) -> bool:
        """True if `events` has something to give."""
        return bool(self._events)

    @property
    def block_id(self) -> bytes:
        """The id of the block at `height`."""
        return self._block_id

    @property
    def pending(self) -> int:
        """Batches without an answer."""
        return len(self._pending)

    def submit(self, raw_batch: bytes) -> bytes:
        """Send a sealed batch of this party until it is answered; returns its id. The same batch twice is sent once.

        The bytes must be stored first: this client forgets with its process. Raises TooManyPending.
        """
        batch_id = self._own_raw.get(raw_batch) or envelope.sealed_id(raw_batch, self._ledger, self._party)
        if batch_id not in self._pending:
            if len(self._pending) >= MAX_PENDING_BATCHES:
                raise TooManyPending(f"{MAX_PENDING_BATCHES} batches are without an answer of ledger {self._ledger}")
            self._pending[batch_id] = _Pending(raw_batch, batch_id)
            self._own_raw[raw_batch] = batch_id
        return batch_id

    def prove_operation(self, leaf: int) -> bytes:
        """Ask for the proof of the operation at that place among all, from 0; returns what its event is known by.

        The event is an OperationProven or a NotProven. Raises TooManyPending.
        """
        return self._want_proof(QueryKind.OPERATION, leaf, None)

    def prove_consistency(self, older: bytes) -> bytes:
        """Ask for the proof that the ledger goes on from a sealed checkpoint; returns what its event is known by.

        The event is a ConsistencyProven or a NotProven. Raises TooManyPending, and ProtocolError where no validator
        signed that checkpoint.
        """
        checkpoint, _ = verify_checkpoint(older, self._trust)
        return self._want_proof(QueryKind.CONSISTENCY, checkpoint.tree_size, older)

    def ask_made(self, device: str, start_s: int) -> None:
        """Ask what became of one device's interval, until it is answered: the event is a MadeKnown.

        Ask again once it has come; until then a second question about the same is the first.
        """
        place = (device.encode(), start_s)
        asked = [(wanted.query.cursor, wanted.query.place) for wanted in self._wanted.values()]
        if self._phase is not _Phase.STOPPED and place not in asked:
            query = Query(self._random_bytes(REQUEST_ID_BYTES), QueryKind.MADE, *(place[0], None, start_s))
            self._wanted[query.request_id] = _Wanted(query)

    def ask_device(self, device: str) -> None:
        """Ask as what a device was admitted: the event is a DeviceKnown or a DeviceUnknown.

        A second question about the same is the first, until that is answered. Raises TooManyPending.
        """
        asked = [each.query.cursor for each in self._wanted.values() if each.query.kind is QueryKind.DEVICE]
        if self._phase is _Phase.STOPPED or device.encode() in asked:
            return
        if len(asked) >= MAX_DEVICES_ASKED:
            raise TooManyPending(f"ledger {self._ledger} is asked about {MAX_DEVICES_ASKED} devices")
        query = Query(self._random_bytes(REQUEST_ID_BYTES), QueryKind.DEVICE, device.encode())
        self._wanted[query.request_id] = _Wanted(query)

    def events(self) -> list[Event]:
        """What has happened since the last call, in the order of the ledger."""
        events, self._events = self._events, []
        return events

    # --- what the shell does

    def on_connect(self) -> None:
        """The link is up, perhaps anew: everything unanswered is due at once."""
        for pending in self._pending.values():
            pending.sent_s = None
        self._ask_again()

    def tick(self, now_s: float) -> list[bytes]:
        """What to publish on the `submit` topic now; call it after messages and at least once a second.

        `now_s` is any monotonic clock in seconds.
        """
        outgoing = []
        resend_after_s = RESEND_TO_NEW_NODE_S if self._node_came_up else RESEND_AFTER_S
        self._node_came_up = False
        for pending in self._pending.values():
            if pending.sent_s is None or now_s - pending.sent_s >= resend_after_s:
                pending.sent_s = now_s
                outgoing.append(pending.raw)
        for wanted in list(self._wanted.values()):
            if wanted.until_s is None:
                is_device = wanted.query.kind is QueryKind.DEVICE
                wanted.until_s = now_s + (DEVICE_TIMEOUT_S if is_device else PROOF_TIMEOUT_S)
            elif now_s >= wanted.until_s and wanted.query.kind not in (QueryKind.VALIDATORS, QueryKind.MADE):
                self._give_up(wanted.query)
                continue
            if wanted.sent_s is None or now_s - wanted.sent_s >= resend_after_s:
                wanted.sent_s = now_s
                outgoing.append(self._sealed(wanted.query))
        # After the question who the validators are, so that the answer to this one is understood.
        asked = self._asked
        if asked is not None and (asked.sent_s is None or now_s - asked.sent_s >= resend_after_s):
            asked.sent_s = now_s
            outgoing.append(self._sealed(asked.query))
        return outgoing

    def on_message(self, leaf: str, payload: bytes, own_node: bool = False) -> None:
        """Take in a message of the ledger. `leaf` is `feed`, `result` or `checkpoint`.

        `own_node`: it comes from this party's own node, past any network. Such a node need not be a validator; its
        blocks must fit the chain all the same, but convince nobody else.
        Raises ProtocolError for what no validator of this ledger signed; nothing has changed then. Log it.
        """
        try:
            if leaf == "result":
                opened = self._open_answer(payload)
            else:
                opened = self._open_block(payload, self._validators, own_node)
        except UnknownKey:
            # Perhaps of a validator that was added while this client was not looking.
            self._ask_validators()
            raise
        message = opened.message
        if leaf == "feed" and isinstance(message, Block):
            self._on_block(opened)
        elif leaf == "result" and isinstance(message, Result):
            self._on_result(message)
        elif leaf == "result" and isinstance(message, Page):
            self._on_page(message, own_node)
        elif leaf == "checkpoint" and isinstance(message, Checkpoint):
            self._on_checkpoint(message, opened)
        else:
            raise MalformedMessage(f"ledger {leaf}", f"its kind of message, got a {type(message).__name__}")

    def on_witness(self, payload: bytes) -> None:
        """Compare what another party was shown with what is followed here.

        Only the validator's signature inside is asked about. Who passes the checkpoint on does not matter: against the
        validator it counts the same, and a party alone cannot make anybody stop. Raises ProtocolError.
        """
        parsed = envelope.parse(payload)
        if parsed.message_type is not MessageType.WITNESS:
            raise MalformedMessage("ledger witness", f"a witness, got a {parsed.message_type.name.lower()}")
        sealed = Witness.from_payload(parsed.payload).checkpoint
        try:
            opened = envelope.open_envelope(sealed, self._ledger, self._validators.get)
        except UnknownKey:
            self._ask_validators()
            raise
        if not isinstance(opened.message, Checkpoint):
            raise MalformedMessage("ledger witness", "a sealed checkpoint inside")
        self._compare(opened.message, opened)

    @property
    def witnessed(self) -> bytes | None:
        """The newest sealed checkpoint that the blocks followed here led to, for `Witness`; None before any.

        After a fault with evidence it is what this party is shown since, so that those who are shown the other history
        find out as well.
        """
        return self._witnessed

    # --- inside

    def _answerer(self, key_id: bytes) -> envelope.Signer | None:
        """Answers to this party come from a validator, or from the gateway inside this very broker."""
        if key_id == self._key.public.key_id:
            return envelope.Signer(self._party, self._key.public)
        return self._validators.get(key_id)

    def _sealed(self, query: Query) -> bytes:
        return envelope.seal(query, self._key, self._ledger, self._party)

    def _ask_again(self) -> None:
        """Everything that was asked is due at once."""
        if self._asked is not None:
            self._asked.sent_s = None
        for wanted in self._wanted.values():
            wanted.sent_s = None

    def _open_answer(self, payload: bytes) -> envelope.Opened:
        try:
            return envelope.open_envelope(payload, self._ledger, self._answerer)
        except UnknownKey:
            parsed = envelope.parse(payload)
            if parsed.message_type is not MessageType.PAGE:
                raise
            page = Page.from_payload(parsed.payload)
            wanted = self._wanted.get(page.request_id)
            if (
                wanted is None
                or wanted.query.kind is not QueryKind.VALIDATORS
                or page.kind is not wanted.query.kind
                or not page.entries
            ):
                raise
            # Changes carry the registrars' signatures. They may be what makes the signer of this very page a validator.
            self._take_changes(page)
            return envelope.open_envelope(payload, self._ledger, self._answerer)

    def _open_block(self, raw: bytes, signers: Mapping[bytes, Signer], own_node: bool) -> envelope.Opened:
        """A block or checkpoint that one of `signers` sealed; from the party's own node also under another seal."""
        parsed = envelope.parse(raw)
        if not own_node or parsed.key_id in signers:
            return envelope.open_envelope(raw, self._ledger, signers.get)
        message = MESSAGE_CLASSES[parsed.message_type].from_payload(parsed.payload)
        return envelope.Opened(message, _NO_VALIDATOR, envelope.message_id(parsed, self._ledger, ""), raw, b"")

    # --- proofs, and who the validators are

    @property
    def _trust(self) -> Trust:
        return Trust.of(self._ledger, self._genesis_hash, self._set, self._registrars)

    def _want_proof(self, kind: QueryKind, place: int, older: bytes | None) -> bytes:
        if self._phase is _Phase.STOPPED or len(self._wanted) >= MAX_PROOF_REQUESTS:
            raise TooManyPending(f"{MAX_PROOF_REQUESTS} proofs are asked of ledger {self._ledger}, or it has a fault")
        query = Query(self._random_bytes(REQUEST_ID_BYTES), kind, place=place)
        self._wanted[query.request_id] = _Wanted(query, older)
        return query.request_id

    def _ask_validators(self) -> None:
        """Ask for the changes after the set that is known here, unless that is asked already."""
        if self._phase is not _Phase.STOPPED and not any(
            wanted.query.kind is QueryKind.VALIDATORS for wanted in self._wanted.values()
        ):
            query = Query(self._random_bytes(REQUEST_ID_BYTES), QueryKind.VALIDATORS, place=self._set.sequence)
            self._wanted[query.request_id] = _Wanted(query)

    def _give_up(self, query: Query) -> None:
        del self._wanted[query.request_id]
        if query.kind is QueryKind.DEVICE:
            self._events.append(DeviceUnknown((query.cursor or b"").decode(), answered=False))
        else:
            self._events.append(NotProven(query.request_id, answered=False))

    def _on_wanted(self, wanted: _Wanted, page: Page) -> None:
        """An answer about validators, a device or a proof.

        Raises ProtocolError if it does not hold; the question stands then.
        """
        request_id = page.request_id
        if page.kind is QueryKind.VALIDATORS:
            self._take_changes(page)
            return
        if page.kind is QueryKind.MADE:
            self._take_made(wanted, page)
            return
        if page.kind is QueryKind.DEVICE:
            self._take_device(wanted.query, page)
            return
        if not page.entries:
            if page.height < self._height:
                return  # One of several nodes, and it is behind: it is asked again after a while.
            del self._wanted[request_id]
            self._events.append(NotProven(request_id, answered=True))
            return
        if page.kind is QueryKind.OPERATION:
            proof = read_proof(page.entries[0])
            if not isinstance(proof, OperationsProof) or [leaf for leaf, _ in proof.operations] != [wanted.query.place]:
                raise MalformedMessage("ledger result", "the proof of the operation that was asked for")
            checkpoint, _ = proof.check(self._trust)
            sealed = proof.checkpoint
            event: Event = OperationProven(request_id, proof, checkpoint)
        else:
            assert wanted.older is not None
            if len(page.entries) != 2:
                raise MalformedMessage("ledger result", "a sealed checkpoint and a receipt")
            goes_on = ConsistencyProof(self._ledger, wanted.older, *page.entries)
            older, newer = goes_on.check(self._trust)
            checkpoint, sealed = newer, goes_on.newer
            event = ConsistencyProven(request_id, goes_on, older, newer)
        del self._wanted[request_id]
        self._events.append(event)
        # What is proven is worth nothing if it is another history than the one followed here.
        self._compare(checkpoint, envelope.open_envelope(sealed, self._ledger, self._validators.get))

    def _take_made(self, wanted: _Wanted, page: Page) -> None:
        """An answer counts at its height: it is kept until that is reached, and asked for anew if that is past."""
        made = decode_made(page.entries[0]) if page.entries else None
        if made is None or (made.device.encode(), made.start_s) != (wanted.query.cursor, wanted.query.place):
            raise MalformedMessage("ledger result", "what became of the device's interval that was asked for")
        wanted.made = made
        self._give_made()

    def _give_made(self) -> None:
        if not self.loaded:
            return
        for request_id, wanted in list(self._wanted.items()):
            if wanted.made is None or wanted.made.height > self._height:
                continue
            if wanted.made.height == self._height:
                del self._wanted[request_id]
                self._events.append(MadeKnown(wanted.made))
            else:
                wanted.made = wanted.sent_s = None

    def _take_device(self, query: Query, page: Page) -> None:
        """What was admitted stays so: the answer is true at every height from that of the admission on."""
        device = (query.cursor or b"").decode()
        if not page.entries:
            if page.height < self._height:
                return  # One of several nodes, and it is behind: it is asked again after a while.
            event: Event = DeviceUnknown(device, answered=True)
        else:
            admitted = decode_admitted(page.entries[0])
            if admitted.device != device:
                raise MalformedMessage("ledger result", "the device that was asked about")
            event = DeviceKnown(admitted)
        del self._wanted[query.request_id]
        self._events.append(event)

    def _take_changes(self, page: Page) -> None:
        """Changes of validators, whoever hands them over. Raises ProtocolError if they do not hold."""
        self._adopt(sets_after(self._set, page.entries, self._ledger, self._registrars))
        del self._wanted[page.request_id]
        if page.entries:
            self._ask_validators()  # Perhaps there are more than one page holds.

    def _adopt(self, sets: Sequence[ValidatorsRow]) -> None:
        for row in sets:
            self._set, self._validators = row, signers_of(row)
            self._sealers |= self._validators

    def _changes_in(self, batches: Iterable[bytes]) -> list[ValidatorsRow]:
        """The sets that the changes of validators in a block lead to. Raises ProtocolError for unsound ones."""
        changes = changes_in(batches)
        if not changes:
            return []
        first = decode_operation(changes[0])
        assert isinstance(first, SetValidator)
        if sequence_of(first) > self._set.sequence + 1:
            # The changes before it stand in blocks that this client has not seen.
            self._ask_validators()
            return []
        return sets_after(self._set, changes, self._ledger, self._registrars)

    def _on_result(self, result: Result) -> None:
        pending = self._pending.get(result.batch_id)
        if pending is None:
            return
        if result.status is ResultStatus.COMMITTED:
            pending.height = result.height or 0
            if self._phase is _Phase.FOLLOWING:
                self._settle_past()
                self._learn_height(pending.height)
            else:
                # A registration may just have made this party known to the ledger, so what was asked is asked again.
                self._ask_again()
            return
        self._forget(pending)
        reason = result.reason or "refused without a reason"
        code, _, text = reason.partition(": ")
        self._events.append(BatchRefused(result.batch_id, result.operation, code, text or reason, code == BUSY))

    def _settle_past(self) -> None:
        """Batches whose blocks went by before this client began to follow: the holdings include them."""
        for pending in list(self._pending.values()):
            if pending.height is not None and pending.height <= self._height:
                self._forget(pending)
                self._events.append(BatchCommitted(pending.batch_id, pending.height))

    def _forget(self, pending: _Pending) -> None:
        del self._pending[pending.batch_id]
        del self._own_raw[pending.raw]

    def _compare(self, checkpoint: Checkpoint, opened: envelope.Opened) -> None:
        """Stop if a validator's checkpoint contradicts what validators signed before, or where this client stands."""
        reason = "a signed checkpoint names another block than the one followed here"
        if self._phase is _Phase.STOPPED or not self._note(opened, reason):
            return
        if (
            self._phase is _Phase.FOLLOWING
            and checkpoint.height == self._height
            and checkpoint.block_id != self._block_id
        ):
            self._stop(checkpoint.height, reason)

    def _note(self, opened: envelope.Opened, reason: str) -> bool:
        """Hold a validator's statement against the others; False if that has stopped this client, for `reason`."""
        statement = None if opened.sender == _NO_VALIDATOR else statement_of(opened)
        evidence = None if statement is None else self._watch.note(statement)
        if statement is not None and evidence is not None:
            self._stop(statement.height, reason, evidence)
        return evidence is None

    def _on_checkpoint(self, checkpoint: Checkpoint, opened: envelope.Opened) -> None:
        self._compare(checkpoint, opened)
        if self._phase is _Phase.STOPPED:
            if self._convicted:
                self._witnessed = opened.raw
            return
        if opened.sender != _NO_VALIDATOR:
            self._offered[checkpoint.height] = opened.raw
        while len(self._offered) > MAX_EARLY_BLOCKS:
            del self._offered[min(self._offered)]
        self._witness()
        if self._phase is _Phase.FOLLOWING and checkpoint.height == self._height:
            return
        # While loading, silence may mean that the node was not there yet when it was asked.
        self._node_came_up = self._phase in (_Phase.LOADING, _Phase.ANCHORING)
        self._learn_height(checkpoint.height)

    def _witness(self) -> None:
        """Where the followed block is the one of a checkpoint: `_note` has held them together, whichever came first."""
        if self._phase is _Phase.FOLLOWING and self._watch.followed(self._height) and self._height in self._offered:
            self._witnessed = self._offered[self._height]
            for height in [height for height in self._offered if height <= self._height]:
                del self._offered[height]

    def _learn_height(self, height: int) -> None:
        """The ledger is known to have reached `height`; fetch what is missing."""
        self._known_height = max(self._known_height, height)
        if self._phase is _Phase.FOLLOWING and self._known_height > self._height and self._asked is None:
            self._ask(QueryKind.BLOCKS, from_height=self._height + 1)

    def _on_page(self, page: Page, own_node: bool) -> None:
        wanted = self._wanted.get(page.request_id)
        if wanted is not None and page.kind is wanted.query.kind:
            self._on_wanted(wanted, page)
            return
        asked = self._asked
        if asked is None or page.request_id != asked.query.request_id or page.kind is not asked.query.kind:
            return
        if len(self._validators) > 1 and page.height < asked.height:
            return  # One of several nodes, and it is behind: it is asked again after a while.
        if page.kind is QueryKind.HOLDINGS:
            self._asked = None
            self._on_holdings(page)
            return
        # While these blocks are taken in, the question stands, so that none of them asks for the next one.
        # Who has sealed the page now stands for blocks under seals of former validators.
        blocks = [self._open_block(raw, self._sealers, own_node) for raw in page.entries]
        for opened in blocks:
            self._on_block(opened)
        self._asked = None
        first = blocks[0].message if blocks else None
        if isinstance(first, Block) and first.height > (asked.query.from_height or 0):
            # Asked again, it would give the same answer for ever.
            self._stop(
                asked.query.from_height or 0,
                f"the ledger began with a snapshot and has no blocks before {first.height}; follow a node that has",
            )
            return
        if self._phase is _Phase.STOPPED:
            return
        if page.height < asked.height:
            self._stop(page.height, f"the ledger answers with fewer blocks than the {asked.height} followed here")
        elif self._phase is _Phase.ANCHORING:
            self._stop(self._height, "the ledger does not give the block that its holdings rest on")
        else:
            self._learn_height(page.height)

    def _on_holdings(self, page: Page) -> None:
        if page.height != self._holdings_height:
            # The ledger went on between two pages and began anew with its first page.
            self._holdings = []
            self._holdings_height = page.height
        decoded = [decode_holding(entry) for entry in page.entries]
        self._holdings += [holding for holding in decoded if holding.asset.start_s >= self._holdings_from_s]
        if page.next_cursor is not None:
            self._ask(QueryKind.HOLDINGS, cursor=page.next_cursor)
            return
        loaded = HoldingsLoaded(page.height, tuple(self._holdings))
        self._holdings = []
        if self._resumes:
            self._catch_up(loaded)
            return
        self._events.append(loaded)
        self._height = page.height
        if page.height == 0:
            self._follow()
        else:
            self._phase = _Phase.ANCHORING
            self._ask(QueryKind.BLOCKS, from_height=page.height)

    def _catch_up(self, loaded: HoldingsLoaded) -> None:
        """Take in the blocks since the earlier run; the holdings are handed over when their height is reached."""
        if loaded.height < self._height:
            self._stop(loaded.height, f"it has lost blocks: this broker has followed it to height {self._height}")
            return
        self._awaited = loaded
        self._known_height = max(self._known_height, loaded.height)
        self._hand_over_holdings()
        self._follow()

    def _hand_over_holdings(self) -> None:
        if self._awaited is not None and self._awaited.height == self._height:
            self._events.append(self._awaited)
            self._awaited = None

    def _follow(self) -> None:
        self._phase = _Phase.FOLLOWING
        self._settle_past()
        self._drain()
        self._learn_height(self._known_height)

    def _on_block(self, opened: envelope.Opened) -> None:
        block = opened.message
        if not isinstance(block, Block) or self._phase is _Phase.STOPPED:
            return
        self._known_height = max(self._known_height, block.height)
        if self._phase is _Phase.ANCHORING and block.height == self._height:
            if self._note(opened, "another head is signed for this height than the block that holdings rest on"):
                self._block_id = block_id_of(opened.raw)
                self._follow()
                self._witness()
        elif block.height > self._height or self._phase is _Phase.LOADING:
            if len(self._early) >= MAX_EARLY_BLOCKS:
                # The furthest ones are fetched again later.
                del self._early[max(self._early)]
            self._early[block.height] = opened
            if self._phase is _Phase.FOLLOWING:
                self._drain()
                self._learn_height(self._known_height)
        else:
            reason = "two different blocks are signed for the same height"
            if not self._note(opened, reason):
                return
            if (
                self._phase is _Phase.FOLLOWING
                and block.height == self._height
                and block_id_of(opened.raw) != self._block_id
            ):
                self._stop(block.height, reason)

    def _drain(self) -> None:
        """Apply the blocks that follow on the last one."""
        for height in [height for height in self._early if height <= self._height]:
            del self._early[height]
        while self._phase is _Phase.FOLLOWING and self._height + 1 in self._early:
            self._apply(self._early.pop(self._height + 1))

    def _apply(self, opened: envelope.Opened) -> None:
        block = opened.message
        assert isinstance(block, Block)
        follows = block.previous == self._block_id
        reason = "another head is signed for the height of this block"
        if not follows:
            reason = "a signed block does not follow on the one before it"
        if not self._note(opened, reason):
            return
        if not follows:
            self._stop(block.height, reason)
            return
        try:
            sets = self._changes_in(block.batches)
            decoded = [None if raw in self._own_raw else self._decoded(raw, block.height) for raw in block.batches]
        except ProtocolError as error:
            self._stop(block.height, f"a signed block carries a batch that is none: {error}")
            return
        self._adopt(sets)
        for raw, event in zip(block.batches, decoded, strict=True):
            if event is not None:
                # Under another signature of ours it is still the same batch.
                if isinstance(event, BatchCommitted) and event.batch_id in self._pending:
                    self._forget(self._pending[event.batch_id])
                self._events.append(event)
                continue
            batch_id = self._own_raw[raw]
            self._forget(self._pending[batch_id])
            self._events.append(BatchCommitted(batch_id, block.height))
        self._height, self._block_id = block.height, block_id_of(opened.raw)
        self._events.append(BlockApplied(block.height))
        self._witness()
        self._hand_over_holdings()
        self._give_made()

    def _decoded(self, raw: bytes, height: int) -> Event:
        """The event of a batch that this client did not submit. The validator has checked its signature."""
        parsed = envelope.parse(raw)
        batch = Batch.from_payload(parsed.payload)
        own = parsed.key_id == self._key.public.key_id
        operations = tuple(
            decode_operation(encoded)
            for encoded in batch.operations
            if own or operation_code(encoded) != OperationCode.DELIVER
        )
        if own:
            batch_id = envelope.message_id(parsed, self._ledger, self._party)
            return BatchCommitted(batch_id, height, operations)
        return ForeignBatch(height, parsed.key_id, operations)

    def _ask(self, kind: QueryKind, cursor: bytes | None = None, from_height: int | None = None) -> None:
        query = Query(self._random_bytes(REQUEST_ID_BYTES), kind, cursor, from_height)
        self._asked = _Asked(query, self._height)

    def _stop(self, height: int, reason: str, evidence: Equivocation | None = None) -> None:
        self._phase = _Phase.STOPPED
        self._convicted = evidence is not None
        if self._convicted and self._offered:
            self._witnessed = self._offered[max(self._offered)]
        self._asked = None
        for wanted in list(self._wanted.values()):
            if wanted.query.kind not in (QueryKind.VALIDATORS, QueryKind.MADE):
                self._give_up(wanted.query)
        self._wanted = {}
        self._events.append(LedgerFault(height, reason, evidence))
