"""What an engine offers, whichever it is: batches in, blocks and answers out."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from broker.protocol.envelope import Signer
from broker.protocol.messages import QueryKind, Result

BUSY: Final = "busy"
"""The code of a refusal that is no fault of the batch: send it again later."""


@dataclass(frozen=True, slots=True)
class ClientResult:
    """An answer and the party that it is for."""

    client: str
    result: Result


@dataclass(frozen=True, slots=True)
class Committed:
    """What a commit made: sealed blocks in order, and answers to batches."""

    blocks: tuple[bytes, ...]
    results: tuple[ClientResult, ...]


@dataclass(frozen=True, slots=True)
class HoldingsPage:
    """Encoded holdings of a party, true at `height`. `next_cursor` is None on the last page."""

    height: int
    entries: tuple[bytes, ...]
    next_cursor: bytes | None


class NotYet(Exception):
    """What was asked is being fetched from elsewhere: ask again after the next `commit`."""


class View(Protocol):
    """Holdings as of one height, while the engine goes on."""

    @property
    def party(self) -> str | None:
        """The only party that it shows, None if it shows all."""

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
        """The registered party with that key, None if there is none. Raises NotYet."""

    def submit(self, raw_batch: bytes) -> ClientResult | None:
        """Check a batch and queue it; an answer only where there is one at once.

        Raises ProtocolError while nobody is known to have signed it; that must not be answered.
        """

    def commit(self) -> Committed:
        """Get queued batches on their way, and say what has become known since the last call.

        The embedded engine applies them and writes them durably at once; a network's blocks and answers come later, and
        those of others with them.
        """

    def open_view(self, party: str) -> View:
        """The holdings at the last committed block, at least those of `party`. Raises NotYet."""

    def prove(self, kind: QueryKind, place: int) -> tuple[bytes, ...]:
        """The entries of a page that proves this (`proving.prove`). Raises ProofFailed if it cannot be, or NotYet."""

    def made(self, device: str, start_s: int) -> tuple[bytes, ...]:
        """The entry of a page of kind MADE (`broker.ledger.made`); none without such a device.

        Raises NotYet.
        """

    def device(self, device: str) -> tuple[bytes, ...] | None:
        """The entry of a page of kind DEVICE (`broker.ledger.admitted`); none without such a device.

        None where the ledger's nodes are of a version that does not know this question. Raises NotYet.
        """

    def blocks(self, from_height: int) -> Iterator[bytes]:
        """Sealed blocks from that height on, in order. Raises NotYet."""

    def checkpoint(self) -> bytes | None:
        """The sealed Checkpoint of the head, None before it is known."""
