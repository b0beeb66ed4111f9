"""The conversation about sealed intervals: what to send when, and what an answer means. Pure: no socket, clock, disk.

A message stays until the broker's signed receipt for it comes. Until then it is sent again, always the same bytes,
after a back-off with jitter, and once more whenever the connection is new. The first sending of an interval waits by a
hash of the meter's name, so that a million agents do not speak in the same second.

A delivery is not acknowledged by anybody, so one may be missed. Whoever sends the demand again gets its receipt again,
and the delivery as it stands now: `is_missed` says when, and `ask` does it, whatever the second receipt says.
"""

import heapq
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from random import Random
from typing import Final

from broker.protocol.envelope import KeyLookup, open_envelope
from broker.protocol.errors import MalformedMessage
from broker.protocol.messages import Delivery, DeliveryState, Receipt, ReceiptStatus

MAX_UNDER_WAY: Final = 256
"""Messages held in memory; what is beyond waits in the journal."""

MAX_ASKING: Final = MAX_UNDER_WAY // 2
"""While so many are under way no message is sent again for its delivery: intervals without a receipt go first."""


class OutboxState(IntEnum):
    """Where a sealed interval stands: WAITING has no receipt yet, the others are what its receipt said."""

    WAITING = 0
    ACCEPTED = 1
    REFUSED = 2
    CONFLICT = 3


@dataclass(frozen=True, slots=True)
class WaitingMessage:
    """A stored message without a receipt."""

    meter: str
    start_s: int
    revision: int
    message_id: bytes
    message: bytes


_STATES: Final = {
    ReceiptStatus.ACCEPTED: OutboxState.ACCEPTED,
    ReceiptStatus.REFUSED: OutboxState.REFUSED,
    ReceiptStatus.CONFLICT: OutboxState.CONFLICT,
}


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast to send: first sendings within `spread_s`, resends after `first_resend_s`, doubling to the longest."""

    spread_s: float
    first_resend_s: float
    longest_resend_s: float


SYSTEM_PACE: Final = Pace(spread_s=20.0, first_resend_s=15.0, longest_resend_s=600.0)
"""In the field: receipts take seconds when a whole country reports, and the first gate is minutes away."""

CONDUCTOR_PACE: Final = Pace(spread_s=0.0, first_resend_s=1.0, longest_resend_s=2.0)
"""In simulated time everyone waits for everyone, so a lost message should be sent again soon."""


@dataclass(frozen=True, slots=True)
class AcceptedDemand:
    """A demand with its receipt, and the newest delivery for it, None if none has come."""

    message: WaitingMessage
    receipt: Receipt
    delivery: Delivery | None


DELIVERY_GRACE_S: Final = 60
"""A broker closes an interval at the moment that the receipt names, and takes a while to say what came of it."""


def is_missed(demand: AcceptedDemand, now_s: float, *, open_too: bool) -> bool:
    """True if a delivery should be here, and is not; with `open_too` also if what is here was not the last word."""
    clear_by_s = demand.receipt.clear_by_s
    if clear_by_s is None or now_s < clear_by_s + DELIVERY_GRACE_S:
        return False
    if demand.delivery is None:
        return True
    return open_too and demand.delivery.state is DeliveryState.OPEN


@dataclass(frozen=True, slots=True)
class Answered:
    """A message that has its receipt. `reason` is the broker's, for refusals and conflicts."""

    message: WaitingMessage
    state: OutboxState
    reason: str | None


@dataclass(slots=True)
class _Entry:
    """A message under way, when it is due, and how long to wait after that."""

    message: WaitingMessage
    due_s: float
    back_off_s: float
    asks: bool = False
    """It was answered before, and is sent for its delivery."""


class Outbox:
    """Messages under way. All times are one monotonic clock's, given by the caller."""

    def __init__(self, pace: Pace, random: Random, ledger: str, lookup: KeyLookup) -> None:
        """`random` gives the jitter; `lookup` knows the broker's key and no other."""
        self._pace = pace
        self._random = random
        self._ledger = ledger
        self._lookup = lookup
        self._entries: dict[bytes, _Entry] = {}
        # May hold outdated times of an entry; the entry itself knows its own.
        self._queue: list[tuple[float, int, bytes]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, messages: Iterable[WaitingMessage], now_s: float) -> bool:
        """Take in messages that are not under way yet. False if some found no room and have to be offered again."""
        for message in messages:
            if message.message_id in self._entries:
                continue
            if len(self._entries) >= MAX_UNDER_WAY:
                return False
            entry = _Entry(message, now_s + self._spread_s(message.meter), self._pace.first_resend_s)
            self._entries[message.message_id] = entry
            heapq.heappush(self._queue, (entry.due_s, message.start_s, message.message_id))
        return True

    def ask(self, messages: Iterable[WaitingMessage], now_s: float) -> None:
        """Send accepted messages again, as far as there is room; their receipts change nothing."""
        for message in messages:
            if message.message_id not in self._entries and len(self._entries) < MAX_ASKING:
                entry = _Entry(message, now_s + self._spread_s(message.meter), self._pace.first_resend_s, asks=True)
                self._entries[message.message_id] = entry
                heapq.heappush(self._queue, (entry.due_s, message.start_s, message.message_id))

    def reconnected(self, now_s: float) -> None:
        """The connection is new: whatever was sent on the old one may be lost, so everything is due again."""
        self._queue.clear()
        for message_id, entry in self._entries.items():
            entry.due_s = now_s + self._random.random() * self._pace.spread_s
            entry.back_off_s = self._pace.first_resend_s
            self._queue.append((entry.due_s, entry.message.start_s, message_id))
        heapq.heapify(self._queue)

    def due(self, now_s: float) -> list[WaitingMessage]:
        """What is to be sent now, earlier intervals first. Unless answered, each is due again after its back-off."""
        messages = []
        while self._queue and self._queue[0][0] <= now_s:
            due_s, start_s, message_id = heapq.heappop(self._queue)
            entry = self._entries.get(message_id)
            if entry is None or entry.due_s != due_s:
                continue
            messages.append(entry.message)
            entry.due_s = now_s + entry.back_off_s * self._random.uniform(0.5, 1.0)
            entry.back_off_s = min(2 * entry.back_off_s, self._pace.longest_resend_s)
            heapq.heappush(self._queue, (entry.due_s, start_s, message_id))
        return messages

    def next_due_s(self) -> float | None:
        """When `due` should be asked again (perhaps in vain), None if there is nothing to send."""
        return self._queue[0][0] if self._entries and self._queue else None

    def take_receipt(self, raw: bytes) -> Answered | None:
        """A receipt has come. None if it answers nothing that waits (a repeated one, or for another agent).

        Raises ProtocolError unless it is a receipt that our broker signed.
        """
        opened = open_envelope(raw, self._ledger, self._lookup)
        receipt = opened.message
        if not isinstance(receipt, Receipt):
            raise MalformedMessage("receipt", f"a receipt, got a {receipt.TYPE.name.lower()}")
        entry = self._entries.pop(receipt.message_id, None)
        if entry is None or entry.asks:
            return None
        return Answered(entry.message, _STATES[receipt.status], receipt.reason)

    def read_delivery(self, raw: bytes) -> Delivery:
        """A delivery has come. Raises ProtocolError unless it is one that our broker signed."""
        message = open_envelope(raw, self._ledger, self._lookup).message
        if not isinstance(message, Delivery):
            raise MalformedMessage("delivery", f"a delivery, got a {message.TYPE.name.lower()}")
        return message

    def _spread_s(self, meter: str) -> float:
        # Not Python's hash, which differs from start to start; the same meter should speak at the same second.
        return zlib.crc32(meter.encode()) / 2**32 * self._pace.spread_s
