"""What an engine offers, whichever it is: batches in, blocks and answers out."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from broker.protocol.envelope import Signer
from broker.protocol.messages import Result

BUSY: Final = "busy"
"""The code of a refusal that is no fault of the batch: send it again later."""


@dataclass(frozen=True, slots=True)
class ClientResult:
    """An answer and the party that it is for."""

    client: str
    result: Result


@dataclass(frozen=True, slots=True)
class Committed:
    """What a commit made: sealed blocks in order, and an answer for every batch that was queued."""

    blocks: tuple[bytes, ...]
    results: tuple[ClientResult, ...]


@dataclass(frozen=True, slots=True)
class HoldingsPage:
    """Encoded holdings of a party, true at `height`. `next_cursor` is None on the last page."""

    height: int
    entries: tuple[bytes, ...]
    next_cursor: bytes | None


class View(Protocol):
    """The holdings of all parties as of one height, while the engine goes on."""

    @property
    def height(self) -> int:
        """The height that every page is true at."""

    def page(self, party: str, cursor: bytes | None = None) -> HoldingsPage:
        """What `party` holds; go on with `next_cursor`. Raises MalformedMessage for a cursor that is none."""

    def close(self) -> None:
        """Let go of it; every view must be closed."""


class LedgerEngine(Protocol):
    """What a gateway needs of an engine."""

    @property
    def ledger(self) -> str:
        """The ledger's id."""

    @property
    def height(self) -> int:
        """The height of the last committed block, 0 before any."""

    def signer(self, key_id: bytes) -> Signer | None:
        """The registered party with that key, None if there is none."""

    def submit(self, raw_batch: bytes) -> ClientResult | None:
        """Check a batch and queue it; an answer only where there is one at once.

        Raises ProtocolError while nobody is known to have signed it; that must not be answered.
        """

    def commit(self) -> Committed:
        """Apply all queued batches in order and write them durably."""

    def open_view(self) -> View:
        """The holdings at the last committed block."""

    def blocks(self, from_height: int) -> Iterator[bytes]:
        """Sealed blocks from that height on, in order."""

    def checkpoint(self) -> bytes:
        """The sealed Checkpoint of the head."""
