"""Finding a ledger that shows different histories to different parties, and keeping the proof of it. Pure.

Whatever a validator signs about a height (a Block or a Checkpoint) is a statement about the one history. Two of them
that cannot both be true prove that somebody cheated, or that a validator's key is used in two places:

- two different heads of one height, or
- a block that names another block before it than the one that was signed for that height.

`Watch` remembers what was signed for the last heights and finds such pairs. `Equivocation` holds both signed messages:
evidence that anybody checks with the ledger's trust file, whoever hands it over. What parties witness only carries
statements of validators from one to the other; nobody can make a broker stop by a statement of its own.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Final

from broker.ledger.chain import block_id_of
from broker.ledger.limits import MAX_WATCHED_BYTES, MAX_WATCHED_HEIGHTS
from broker.ledger.receipts import ProofFailed
from broker.ledger.trust import Trust
from broker.protocol import cbor, envelope
from broker.protocol.codec import Bytes, Field, Name, Unsigned, decode_fields, encode_fields
from broker.protocol.envelope import KeyLookup, Opened
from broker.protocol.errors import MalformedMessage
from broker.protocol.limits import MAX_BLOCK_BYTES
from broker.protocol.messages import Block, Checkpoint

_EQUIVOCATION_KIND: Final = 3


@dataclass(frozen=True, slots=True)
class Statement:
    """What a validator signed about a height. `previous` is None for a Checkpoint, which does not say it."""

    height: int
    block_id: bytes
    tree_size: int
    root: bytes
    state_hash: bytes
    previous: bytes | None
    signer: str
    raw: bytes

    def contradicts(self, other: "Statement") -> bool:
        """True if no honest history holds both."""
        if self.height == other.height:
            return (self.block_id, self.tree_size, self.root, self.state_hash) != (
                other.block_id,
                other.tree_size,
                other.root,
                other.state_hash,
            )
        later, earlier = (self, other) if self.height > other.height else (other, self)
        follows = later.height == earlier.height + 1 and later.previous is not None
        return follows and later.previous != earlier.block_id


def statement_of(opened: Opened) -> Statement | None:
    """What a verified message of a validator says about the history; None for other messages."""
    message = opened.message
    if isinstance(message, Block):
        block_id, previous = block_id_of(opened.raw), message.previous
    elif isinstance(message, Checkpoint):
        block_id, previous = message.block_id, None
    else:
        return None
    return Statement(
        message.height,
        block_id,
        message.tree_size,
        message.root,
        message.state_hash,
        previous,
        opened.sender,
        opened.raw,
    )


@dataclass(frozen=True, slots=True)
class Equivocation:
    """Two sealed messages of validators that contradict each other: what a ledger cannot deny."""

    ledger: str
    one: bytes
    other: bytes
    kind: int = _EQUIVOCATION_KIND

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "kind", Unsigned(_EQUIVOCATION_KIND, _EQUIVOCATION_KIND)),
        Field(1, "ledger", Name()),
        Field(2, "one", Bytes(1, MAX_BLOCK_BYTES)),
        Field(3, "other", Bytes(1, MAX_BLOCK_BYTES)),
    )

    def to_bytes(self) -> bytes:
        return cbor.encode(encode_fields(self.FIELDS, self))

    @classmethod
    def from_bytes(cls, raw: bytes) -> "Equivocation":
        """Raises MalformedMessage."""
        data: Any = cbor.decode(raw, "evidence", 2 * MAX_BLOCK_BYTES + 1_024)
        kind, ledger, one, other = decode_fields(cls.FIELDS, data, "evidence")
        return cls(ledger, one, other, kind)

    def check(self, trust: Trust) -> tuple[Statement, Statement]:
        """The two statements that contradict each other. Raises ProtocolError if this proves nothing."""
        if self.ledger != trust.ledger:
            raise ProofFailed(f"it is evidence about ledger {self.ledger}, and the trust file is of {trust.ledger}")
        one, other = (self._statement(raw, trust.validators.get) for raw in (self.one, self.other))
        if not one.contradicts(other):
            raise ProofFailed(f"what is signed for height {one.height} and for height {other.height} can both be true")
        return one, other

    def _statement(self, raw: bytes, lookup: KeyLookup) -> Statement:
        statement = statement_of(envelope.open_envelope(raw, self.ledger, lookup))
        if statement is None:
            raise MalformedMessage("evidence", "two sealed blocks or checkpoints")
        return statement


class Watch:
    """What validators signed for the last heights, one statement a height, within fixed limits of number and bytes."""

    __slots__ = ("_bytes", "_ledger", "_noted")

    def __init__(self, ledger: str) -> None:
        self._ledger = ledger
        self._noted: dict[int, Statement] = {}
        self._bytes = 0

    def note(self, statement: Statement) -> Equivocation | None:
        """Remember a statement whose signature was verified; evidence if it contradicts one that is remembered."""
        for height in (statement.height, statement.height - 1, statement.height + 1):
            known = self._noted.get(height)
            if known is not None and known.contradicts(statement):
                return Equivocation(self._ledger, known.raw, statement.raw)
        known = self._noted.get(statement.height)
        # A block says more than a checkpoint (what it follows on), so it is what stays.
        if known is None or (known.previous is None and statement.previous is not None):
            self._keep(statement)
        return None

    def followed(self, height: int) -> bool:
        """True while the block of that height is remembered, and not only a checkpoint."""
        known = self._noted.get(height)
        return known is not None and known.previous is not None

    def _keep(self, statement: Statement) -> None:
        self._drop(statement.height)
        self._noted[statement.height] = statement
        self._bytes += len(statement.raw)
        while len(self._noted) > MAX_WATCHED_HEIGHTS or (self._bytes > MAX_WATCHED_BYTES and len(self._noted) > 1):
            self._drop(next(iter(self._noted)))

    def _drop(self, height: int) -> None:
        gone = self._noted.pop(height, None)
        if gone is not None:
            self._bytes -= len(gone.raw)
