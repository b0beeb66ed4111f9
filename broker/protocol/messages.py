"""Every message of the protocol as a frozen value class with its wire form.

The number of a MessageType is part of what is signed and never changes. Payload maps have integer keys 0 to 23; the
CDDL files in `schema/` say the same thing for other programs, and the tests hold the two against each other.
Energy is in whole Wh, power in W, time in UTC epoch seconds, prices in µ-currency per kWh.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Final, NamedTuple, Self

from broker.protocol import cbor
from broker.protocol.codec import (
    Boolean,
    Bytes,
    Choice,
    Field,
    Many,
    Name,
    Row,
    Text,
    Unsigned,
    decode_fields,
    encode_fields,
)
from broker.protocol.keys import KEY_ID_BYTES
from broker.protocol.limits import (
    CERTIFICATE_PART_BYTES,
    MAX_BATCH_BYTES,
    MAX_BLOCK_BYTES,
    MAX_BROKER_MESSAGE_BYTES,
    MAX_CERTIFICATE_PARTS,
    MAX_METER_MESSAGE_BYTES,
    MAX_PATH_BROKERS,
    MAX_REASON_CHARACTERS,
)
from broker.protocol.sources import Source

HASH_BYTES: Final = 32
PSEUDONYM_BYTES: Final = 16
ORDER_ID_BYTES: Final = 16
WAIT_TOKEN_BYTES: Final = 8
MAX_WAITS: Final = 1_024
REQUEST_ID_BYTES: Final = 8
MAX_REGISTRARS: Final = 16
MAX_VALIDATORS: Final = 64
MAX_VALIDATOR_POWER: Final = 1_000
_COSE_KEY: Final = Bytes(40, 128)
_KEY_ID: Final = Bytes(KEY_ID_BYTES, KEY_ID_BYTES)
_HASH: Final = Bytes(HASH_BYTES, HASH_BYTES)
_REASON: Final = Text(MAX_REASON_CHARACTERS)


class MessageType(IntEnum):
    """What a signed message is; stands in its protected header and in what is signed."""

    READING = 1
    DEMAND = 2
    RECEIPT = 3
    DELIVERY = 4
    METER_STATUS = 5
    ORDER = 6
    ORDER_ANSWER = 7
    CLEARED = 8
    BROKER_STATUS = 9
    STOCK = 10
    BATCH = 11
    RESULT = 12
    QUERY = 13
    PAGE = 14
    BLOCK = 15
    CHECKPOINT = 16
    TICK = 17
    REGISTRATION = 18
    ADMISSION = 19
    MANDATE = 20
    END_OF_MANDATE = 21
    KEY_ROTATION = 22
    KEY_REVOCATION = 23
    VALIDATOR_CHANGE = 24
    WITNESS = 25
    # 26 tells a certificate, which is a file and no message (docs/certificates.md).
    FORECAST = 27
    HINT = 28
    CERTIFICATE_REQUEST = 29
    CERTIFICATE_PART = 30
    WISHES = 31
    PROMISES = 32


class Quality(IntEnum):
    """How the energy of an interval became known."""

    MEASURED = 0
    INTERPOLATED = 1
    ESTIMATED = 2
    MISSING = 3


class Carrier(IntEnum):
    """Energy carrier of an asset."""

    ELECTRICITY = 0


class Role(IntEnum):
    """What a registered party is on the ledger."""

    BROKER = 1
    PROVIDER = 2


class KeyHolder(IntEnum):
    """Whose key it is: names of parties and of devices do not mix."""

    PARTY = 0
    DEVICE = 1


class ReceiptStatus(IntEnum):
    """ACCEPTED means durably accepted, nothing more. CONFLICT: another payload for the same interval and revision."""

    ACCEPTED = 0
    REFUSED = 1
    CONFLICT = 2


class DeliveryState(IntEnum):
    """OPEN: more may come until gate 2. FINAL: the interval is closed and the rest is on record as unmatched."""

    OPEN = 0
    FINAL = 1


class AnswerStatus(IntEnum):
    """DONE: the supplier saw its transfer on the ledger. REFUSED: nothing will come under this order.

    PASSED_ON: as DONE for what it had itself, perhaps nothing; it asks others for the rest and answers again.
    """

    DONE = 0
    REFUSED = 1
    PASSED_ON = 2


class ResultStatus(IntEnum):
    """COMMITTED: the batch stands in a block. REFUSED: nothing of it does; the same batch may be submitted again."""

    COMMITTED = 0
    REFUSED = 1


class QueryKind(IntEnum):
    """HOLDINGS: all assets that the asking broker owns. BLOCKS: the ledger's blocks from a height on.

    OPERATION: the proof of one operation. CONSISTENCY: the proof that the ledger goes on from an earlier tree size.
    VALIDATORS: the changes of validators after the one with that sequence, as the registrars signed them.
    MADE: what became of one device's energy of an interval; `cursor` is the device's name, `place` the start.
    DEVICE: as what one device was admitted, and whose it is; `cursor` is its name.
    """

    HOLDINGS = 1
    BLOCKS = 2
    OPERATION = 3
    CONSISTENCY = 4
    VALIDATORS = 5
    MADE = 6
    DEVICE = 7


class Message:
    """Base of all message classes. A subclass gives TYPE, FIELDS and MAX_BYTES (of the whole signed envelope)."""

    __slots__ = ()
    TYPE: ClassVar[MessageType]
    FIELDS: ClassVar[tuple[Field, ...]]
    MAX_BYTES: ClassVar[int] = MAX_BROKER_MESSAGE_BYTES

    def to_payload(self) -> bytes:
        """The deterministic CBOR map of this message."""
        return cbor.encode(encode_fields(self.FIELDS, self))

    @classmethod
    def from_payload(cls, payload: bytes) -> Self:
        """Read a payload. Raises MalformedMessage naming the field that is wrong."""
        where = cls.TYPE.name.lower()
        return cls(*decode_fields(cls.FIELDS, cbor.decode(payload, where, cls.MAX_BYTES), where))


@dataclass(frozen=True, slots=True)
class MeterValue(Message):
    """Energy that one meter counted in one market interval. Base of Reading and Demand, which look alike."""

    meter: str
    start_s: int
    end_s: int
    revision: int
    energy_wh: int
    quality: Quality
    carrier: Carrier
    sampled_s: tuple[int, int] | None = None
    """Times of the samples that the boundary values rest on, first and last, where they are not the boundaries."""

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "meter", Name()),
        Field(1, "start_s", Unsigned()),
        Field(2, "end_s", Unsigned()),
        Field(3, "revision", Unsigned(maximum=65_535)),
        Field(4, "energy_wh", Unsigned()),
        Field(5, "quality", Choice(Quality)),
        Field(6, "carrier", Choice(Carrier)),
        Field(7, "sampled_s", Row((Unsigned(), Unsigned())), optional=True),
    )
    MAX_BYTES: ClassVar[int] = MAX_METER_MESSAGE_BYTES


@dataclass(frozen=True, slots=True)
class Reading(MeterValue):
    """What a generating device fed in. The ledger's issue carries this message, signed by the meter, inside."""

    TYPE: ClassVar[MessageType] = MessageType.READING


@dataclass(frozen=True, slots=True)
class Demand(MeterValue):
    """What a consumer drew. Stays between meter and broker; the ledger sees a salted commitment to it."""

    TYPE: ClassVar[MessageType] = MessageType.DEMAND


@dataclass(frozen=True, slots=True)
class Receipt(Message):
    """The broker's answer to a reading or demand. The same message always gets the same answer."""

    meter: str
    kind: MessageType
    start_s: int
    revision: int
    status: ReceiptStatus
    message_id: bytes
    reason: str | None = None
    pseudonym: bytes | None = None
    commitment: bytes | None = None
    contract_hash: bytes | None = None
    clear_by_s: int | None = None

    TYPE: ClassVar[MessageType] = MessageType.RECEIPT
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "meter", Name()),
        Field(1, "kind", Choice(MessageType)),
        Field(2, "start_s", Unsigned()),
        Field(3, "revision", Unsigned(maximum=65_535)),
        Field(4, "status", Choice(ReceiptStatus)),
        Field(5, "message_id", _HASH),
        Field(6, "reason", _REASON, optional=True),
        Field(7, "pseudonym", Bytes(PSEUDONYM_BYTES, PSEUDONYM_BYTES), optional=True),
        Field(8, "commitment", _HASH, optional=True),
        Field(9, "contract_hash", _HASH, optional=True),
        Field(10, "clear_by_s", Unsigned(), optional=True),
    )
    MAX_BYTES: ClassVar[int] = MAX_METER_MESSAGE_BYTES


class DeliveredLine(NamedTuple):
    """Wh of one source that a demand got, for the contract line with that index (NO_LINE: a substitute)."""

    line: int
    source: Source
    energy_wh: int


NO_LINE: Final = 255
"""The line index of a substitute that stands in no line of the contract."""

MAX_LINES: Final = 32
"""Contract lines; more than every source and group there is."""


@dataclass(frozen=True, slots=True)
class Delivery(Message):
    """What a demand got, line by line. `unmatched_wh` is what no asset stands for (so far, while OPEN)."""

    meter: str
    start_s: int
    end_s: int
    revision: int
    demanded_wh: int
    unmatched_wh: int
    state: DeliveryState
    lines: tuple[DeliveredLine, ...]

    TYPE: ClassVar[MessageType] = MessageType.DELIVERY
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "meter", Name()),
        Field(1, "start_s", Unsigned()),
        Field(2, "end_s", Unsigned()),
        Field(3, "revision", Unsigned(maximum=65_535)),
        Field(4, "demanded_wh", Unsigned()),
        Field(5, "unmatched_wh", Unsigned()),
        Field(6, "state", Choice(DeliveryState)),
        Field(7, "lines", Many(Row((Unsigned(NO_LINE), Choice(Source), Unsigned()), DeliveredLine), 64)),
    )
    MAX_BYTES: ClassVar[int] = MAX_METER_MESSAGE_BYTES


@dataclass(frozen=True, slots=True)
class CertificateRequest(Message):
    """The consumer asks for the certificate of `[from_s, to_s)`. The same request may be sent again."""

    meter: str
    request_id: bytes
    from_s: int
    to_s: int

    TYPE: ClassVar[MessageType] = MessageType.CERTIFICATE_REQUEST
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "meter", Name()),
        Field(1, "request_id", Bytes(REQUEST_ID_BYTES, REQUEST_ID_BYTES)),
        Field(2, "from_s", Unsigned()),
        Field(3, "to_s", Unsigned()),
    )
    MAX_BYTES: ClassVar[int] = MAX_METER_MESSAGE_BYTES


@dataclass(frozen=True, slots=True)
class CertificatePart(Message):
    """Part `part` of `parts` of a certificate, counted from 0; or none at all, with the reason."""

    meter: str
    request_id: bytes
    part: int
    parts: int
    content: bytes
    reason: str | None = None

    TYPE: ClassVar[MessageType] = MessageType.CERTIFICATE_PART
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "meter", Name()),
        Field(1, "request_id", Bytes(REQUEST_ID_BYTES, REQUEST_ID_BYTES)),
        Field(2, "part", Unsigned(MAX_CERTIFICATE_PARTS)),
        Field(3, "parts", Unsigned(MAX_CERTIFICATE_PARTS)),
        Field(4, "content", Bytes(0, CERTIFICATE_PART_BYTES)),
        Field(5, "reason", _REASON, optional=True),
    )
    MAX_BYTES: ClassVar[int] = MAX_BATCH_BYTES


@dataclass(frozen=True, slots=True)
class MeterStatus(Message):
    """How an agent's meter fares; retained, and the agent's last will says `online = false`."""

    meter: str
    online: bool
    time_s: int
    waiting: int
    """Intervals in the outbox that have no receipt yet."""
    fault: str | None = None

    TYPE: ClassVar[MessageType] = MessageType.METER_STATUS
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "meter", Name()),
        Field(1, "online", Boolean()),
        Field(2, "time_s", Unsigned()),
        Field(3, "waiting", Unsigned()),
        Field(4, "fault", _REASON, optional=True),
    )
    MAX_BYTES: ClassVar[int] = MAX_METER_MESSAGE_BYTES


@dataclass(frozen=True, slots=True)
class Order(Message):
    """The first change request: a broker asks a neighbour for energy. Firm, and only for the last broker of `path`.

    Transfers under it never exceed `energy_wh`, and the ledger refuses them after the requester's close or void.
    `round_number` is the requester's round between the gates in which it is sent (docs/protocol.md); without one it is
    served at once. What is passed on is an order of its own and names its `parent`, the order that it is sent for.
    """

    order_id: bytes
    requester: str
    source: Source
    start_s: int
    end_s: int
    energy_wh: int
    highest_price: int
    not_after_s: int
    path: tuple[str, ...]
    parent: bytes | None = None
    round_number: int | None = None

    TYPE: ClassVar[MessageType] = MessageType.ORDER
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "order_id", Bytes(ORDER_ID_BYTES, ORDER_ID_BYTES)),
        Field(1, "requester", Name()),
        Field(2, "source", Choice(Source)),
        Field(3, "start_s", Unsigned()),
        Field(4, "end_s", Unsigned()),
        Field(5, "energy_wh", Unsigned(minimum=1)),
        Field(6, "highest_price", Unsigned()),
        Field(7, "not_after_s", Unsigned()),
        Field(8, "path", Many(Name(), MAX_PATH_BROKERS, minimum=2)),
        Field(9, "parent", Bytes(ORDER_ID_BYTES, ORDER_ID_BYTES), optional=True),
        Field(10, "round_number", Unsigned(), optional=True),
    )


@dataclass(frozen=True, slots=True)
class OrderAnswer(Message):
    """The neighbour's answer. DONE is a hint: the asker believes the ledger. `energy_wh` may be less than asked."""

    order_id: bytes
    status: AnswerStatus
    energy_wh: int
    batch_id: bytes | None = None
    reason: str | None = None

    TYPE: ClassVar[MessageType] = MessageType.ORDER_ANSWER
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "order_id", Bytes(ORDER_ID_BYTES, ORDER_ID_BYTES)),
        Field(1, "status", Choice(AnswerStatus)),
        Field(2, "energy_wh", Unsigned()),
        Field(3, "batch_id", _HASH, optional=True),
        Field(4, "reason", _REASON, optional=True),
    )


@dataclass(frozen=True, slots=True)
class SourceAmount:
    """Wh of one source."""

    source: Source
    energy_wh: int


@dataclass(frozen=True, slots=True)
class NeighbourCount:
    """How many orders of this interval go to one neighbour."""

    neighbour: str
    orders: int


@dataclass(frozen=True, slots=True)
class SourceOffer:
    """Coarse stock of one source (Wh, rounded down) and its price (µ per kWh)."""

    source: Source
    energy_wh: int
    price: int


@dataclass(frozen=True, slots=True)
class Cleared(Message):
    """A broker's rounds in an interval: it has cleared its own stock, what it lacks, and how many orders went to whom.

    Round 0 says that it has cleared; in each round after that orders are sent. A supplier that has a round from all its
    neighbours knows which orders it still has to wait for. `through` is what its own neighbours announced, at the price
    at which it would pass that on, from round 1 on. `asked` counts the orders of this interval up to this round,
    `open_wh` is what it may still order for its own consumers, `open_before_wh` what that was in the round before, and
    with `last` it has nothing more to announce. A broker that leaves out `round_number` takes no part in rounds: it is
    heard once, as if in its last.
    """

    broker: str
    start_s: int
    end_s: int
    shortages: tuple[SourceAmount, ...]
    asked: tuple[NeighbourCount, ...]
    round_number: int | None = None
    open_wh: int | None = None
    last: bool | None = None
    through: tuple[SourceOffer, ...] | None = None
    open_before_wh: int | None = None

    TYPE: ClassVar[MessageType] = MessageType.CLEARED
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "broker", Name()),
        Field(1, "start_s", Unsigned()),
        Field(2, "end_s", Unsigned()),
        Field(3, "shortages", Many(Row((Choice(Source), Unsigned()), SourceAmount), 16)),
        Field(4, "asked", Many(Row((Name(), Unsigned()), NeighbourCount), 256)),
        Field(5, "round_number", Unsigned(), optional=True),
        Field(6, "open_wh", Unsigned(), optional=True),
        Field(7, "last", Boolean(), optional=True),
        Field(8, "through", Many(Row((Choice(Source), Unsigned(), Unsigned()), SourceOffer), 16), optional=True),
        Field(9, "open_before_wh", Unsigned(), optional=True),
    )


@dataclass(frozen=True, slots=True)
class BrokerStatus(Message):
    """Retained; the broker's last will says `online = false`."""

    broker: str
    online: bool
    market_time_s: int
    version: str

    TYPE: ClassVar[MessageType] = MessageType.BROKER_STATUS
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "broker", Name()),
        Field(1, "online", Boolean()),
        Field(2, "market_time_s", Unsigned()),
        Field(3, "version", Text(32)),
    )


@dataclass(frozen=True, slots=True)
class Stock(Message):
    """What a broker had left of each source after its last clearing; retained and coarse, a hint for whom to ask."""

    broker: str
    start_s: int
    end_s: int
    offers: tuple[SourceOffer, ...]

    TYPE: ClassVar[MessageType] = MessageType.STOCK
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "broker", Name()),
        Field(1, "start_s", Unsigned()),
        Field(2, "end_s", Unsigned()),
        Field(3, "offers", Many(Row((Choice(Source), Unsigned(), Unsigned()), SourceOffer), 16)),
    )


MIN_INTERVALS_OF_DAY: Final = 24
MAX_INTERVALS_OF_DAY: Final = 96


@dataclass(frozen=True, slots=True)
class SourceOutlook:
    """What a broker expects of one source in the interval with that index of a day: Wh it will lack or have left."""

    source: Source
    interval: int
    shortage_wh: int
    surplus_wh: int


_OUTLOOK: Final = Row((Choice(Source), Unsigned(MAX_INTERVALS_OF_DAY - 1), Unsigned(), Unsigned()), SourceOutlook)


@dataclass(frozen=True, slots=True)
class Forecast(Message):
    """What a broker expects of the UTC day `[start_s, end_s)`, made the day before; retained and coarse.

    A hint for whom to ask: nobody owes what stands in it. `outlooks` leave out where neither is expected.
    `group_shortages_wh` is, for each interval, what will be lacking for contract lines that leave the source open.
    """

    broker: str
    start_s: int
    end_s: int
    outlooks: tuple[SourceOutlook, ...]
    group_shortages_wh: tuple[int, ...]

    TYPE: ClassVar[MessageType] = MessageType.FORECAST
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "broker", Name()),
        Field(1, "start_s", Unsigned()),
        Field(2, "end_s", Unsigned()),
        Field(3, "outlooks", Many(_OUTLOOK, len(Source) * MAX_INTERVALS_OF_DAY)),
        Field(4, "group_shortages_wh", Many(Unsigned(), MAX_INTERVALS_OF_DAY, minimum=MIN_INTERVALS_OF_DAY)),
    )


MAX_ARRANGED_NEIGHBOURS: Final = 256
MAX_ARRANGED_ROWS: Final = 3_072
"""Amounts in one message of wishes or promises: 13 bytes each at most, with 256 names of 63 characters 58 kB. All
eleven sources in all 96 quarters of an hour are 1 056 places, so each can be split over nearly three neighbours."""


@dataclass(frozen=True, slots=True)
class DayAmount:
    """Wh of one source in the interval with that index of a day."""

    source: Source
    interval: int
    energy_wh: int


@dataclass(frozen=True, slots=True)
class NeighbourAmounts:
    """What is wished of, or promised to, one neighbour."""

    neighbour: str
    amounts: tuple[DayAmount, ...]


_DAY_AMOUNT: Final = Row((Choice(Source), Unsigned(MAX_INTERVALS_OF_DAY - 1), Unsigned(minimum=1)), DayAmount)
_ARRANGED: Final = Many(
    Row((Name(), Many(_DAY_AMOUNT, len(Source) * MAX_INTERVALS_OF_DAY)), NeighbourAmounts), MAX_ARRANGED_NEIGHBOURS
)


@dataclass(frozen=True, slots=True)
class Wishes(Message):
    """What a broker would like to have of each neighbour on the UTC day `[start_s, end_s)`; retained.

    Made from the forecasts of that day. Nothing is ordered by it; a neighbour may answer with `Promises`.
    """

    broker: str
    start_s: int
    end_s: int
    wishes: tuple[NeighbourAmounts, ...]

    TYPE: ClassVar[MessageType] = MessageType.WISHES
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "broker", Name()),
        Field(1, "start_s", Unsigned()),
        Field(2, "end_s", Unsigned()),
        Field(3, "wishes", _ARRANGED),
    )


@dataclass(frozen=True, slots=True)
class Promises(Message):
    """Up to how many Wh of the UTC day `[start_s, end_s)` each neighbour's orders come before others'; retained.

    A promise of order and not of energy: there may be less by then.
    """

    broker: str
    start_s: int
    end_s: int
    promises: tuple[NeighbourAmounts, ...]

    TYPE: ClassVar[MessageType] = MessageType.PROMISES
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "broker", Name()),
        Field(1, "start_s", Unsigned()),
        Field(2, "end_s", Unsigned()),
        Field(3, "promises", _ARRANGED),
    )


class SupplyLevel(IntEnum):
    """How much of a consumer's contract is expected to be filled in an interval, and whether there will be more."""

    SCARCE = 0
    SHORT = 1
    ENOUGH = 2
    PLENTIFUL = 3


@dataclass(frozen=True, slots=True)
class Hint(Message):
    """For one consumer: how well its contract's sources will be supplied on the UTC day `[start_s, end_s)`.

    One level an interval. Retained on the meter's own topic; of two for the same day the one made later counts.
    """

    meter: str
    start_s: int
    end_s: int
    made_s: int
    levels: tuple[SupplyLevel, ...]

    TYPE: ClassVar[MessageType] = MessageType.HINT
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "meter", Name()),
        Field(1, "start_s", Unsigned()),
        Field(2, "end_s", Unsigned()),
        Field(3, "made_s", Unsigned()),
        Field(4, "levels", Many(Choice(SupplyLevel), MAX_INTERVALS_OF_DAY, minimum=MIN_INTERVALS_OF_DAY)),
    )
    MAX_BYTES: ClassVar[int] = MAX_METER_MESSAGE_BYTES


@dataclass(frozen=True, slots=True)
class Batch(Message):
    """Ledger operations, applied whole or refused whole. Each item is the CBOR of one operation (`ledger.operations`).

    `not_after_s` is market time: after the submitter's close of an interval that ends there or later, it is refused.
    """

    not_after_s: int
    operations: tuple[bytes, ...]

    TYPE: ClassVar[MessageType] = MessageType.BATCH
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "not_after_s", Unsigned()),
        Field(1, "operations", Many(Bytes(2, MAX_BATCH_BYTES), 4_096, minimum=1)),
    )
    MAX_BYTES: ClassVar[int] = MAX_BATCH_BYTES


@dataclass(frozen=True, slots=True)
class Result(Message):
    """What became of a batch. A refusal names the operation at fault and is not sticky."""

    batch_id: bytes
    status: ResultStatus
    height: int | None = None
    operation: int | None = None
    reason: str | None = None

    TYPE: ClassVar[MessageType] = MessageType.RESULT
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "batch_id", _HASH),
        Field(1, "status", Choice(ResultStatus)),
        Field(2, "height", Unsigned(), optional=True),
        Field(3, "operation", Unsigned(), optional=True),
        Field(4, "reason", _REASON, optional=True),
    )


@dataclass(frozen=True, slots=True)
class Query(Message):
    """A question to the ledger, answered with Pages. `cursor` is opaque and comes from the page before.

    `place` is the operation's index among all, from 0, the earlier tree size, or the last known sequence of validators.
    """

    request_id: bytes
    kind: QueryKind
    cursor: bytes | None = None
    from_height: int | None = None
    place: int | None = None

    TYPE: ClassVar[MessageType] = MessageType.QUERY
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "request_id", Bytes(REQUEST_ID_BYTES, REQUEST_ID_BYTES)),
        Field(1, "kind", Choice(QueryKind)),
        Field(2, "cursor", Bytes(1, 256), optional=True),
        Field(3, "from_height", Unsigned(), optional=True),
        Field(4, "place", Unsigned(), optional=True),
    )


@dataclass(frozen=True, slots=True)
class Page(Message):
    """Part of an answer: `entries` are blocks (envelopes) or holdings (CBOR rows), true at `height`.

    Or one operations proof; or the newer sealed checkpoint and the receipt of consistency; none if it cannot be proven.
    Or set_validator operations by ascending sequence; none if there are no later ones.
    """

    request_id: bytes
    kind: QueryKind
    height: int
    entries: tuple[bytes, ...]
    next_cursor: bytes | None = None

    TYPE: ClassVar[MessageType] = MessageType.PAGE
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "request_id", Bytes(REQUEST_ID_BYTES, REQUEST_ID_BYTES)),
        Field(1, "kind", Choice(QueryKind)),
        Field(2, "height", Unsigned()),
        Field(3, "entries", Many(Bytes(1, MAX_BLOCK_BYTES), 4_096)),
        Field(4, "next_cursor", Bytes(1, 256), optional=True),
    )
    MAX_BYTES: ClassVar[int] = 2 * MAX_BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class Block(Message):
    """One step of the ledger, signed by the node that made it. Its id is SHA-256 of its payload; the next one names it.

    `batches` are signed batch envelopes in the order applied. `tree_size` and `root` are the RFC 9162 tree over all
    operations so far; `state_hash` covers the operations and the state that they made.
    """

    height: int
    previous: bytes
    batches: tuple[bytes, ...]
    tree_size: int
    root: bytes
    state_hash: bytes

    TYPE: ClassVar[MessageType] = MessageType.BLOCK
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "height", Unsigned(minimum=1)),
        Field(1, "previous", _HASH),
        Field(2, "batches", Many(Bytes(1, MAX_BATCH_BYTES), 1_024, minimum=1)),
        Field(3, "tree_size", Unsigned()),
        Field(4, "root", _HASH),
        Field(5, "state_hash", _HASH),
    )
    MAX_BYTES: ClassVar[int] = MAX_BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class Checkpoint(Message):
    """The ledger's head, signed and retained: what an inclusion proof ends in and what two copies are compared by."""

    height: int
    block_id: bytes
    tree_size: int
    root: bytes
    state_hash: bytes

    TYPE: ClassVar[MessageType] = MessageType.CHECKPOINT
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "height", Unsigned()),
        Field(1, "block_id", _HASH),
        Field(2, "tree_size", Unsigned()),
        Field(3, "root", _HASH),
        Field(4, "state_hash", _HASH),
    )


@dataclass(frozen=True, slots=True)
class Witness(Message):
    """A party co-signs a validator's sealed Checkpoint: its own following of the ledger, block by block, led there.

    Retained, so that parties which a ledger shows different histories to find out by comparing.
    """

    checkpoint: bytes

    TYPE: ClassVar[MessageType] = MessageType.WITNESS
    FIELDS: ClassVar[tuple[Field, ...]] = (Field(0, "checkpoint", Bytes(1, 1_024)),)
    MAX_BYTES: ClassVar[int] = 2_048


class Stage(IntEnum):
    """Who acts at a tick: first the simulated world moves its meters, then agents and brokers read and trade."""

    WORLD = 0
    MARKET = 1


@dataclass(frozen=True, slots=True)
class Tick(Message):
    """Simulated calendar time, by the conductor that the genesis of a simulated ledger admits; retained."""

    time_s: int
    stage: Stage

    TYPE: ClassVar[MessageType] = MessageType.TICK
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "time_s", Unsigned()),
        Field(1, "stage", Choice(Stage)),
    )


@dataclass(frozen=True, slots=True)
class Registration(Message):
    """A registrar admits a party with its key. It signs; the sender is the registrar."""

    party: str
    role: Role
    key: bytes

    TYPE: ClassVar[MessageType] = MessageType.REGISTRATION
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "party", Name()),
        Field(1, "role", Choice(Role)),
        Field(2, "key", _COSE_KEY),
    )


@dataclass(frozen=True, slots=True)
class Admission(Message):
    """A registrar admits a generating device, named by the name of its meter."""

    device: str
    owner: str
    meter_key: bytes
    source: Source
    carrier: Carrier
    capacity_w: int
    area: str
    place: str
    commissioned_s: int

    TYPE: ClassVar[MessageType] = MessageType.ADMISSION
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "device", Name()),
        Field(1, "owner", Name()),
        Field(2, "meter_key", _COSE_KEY),
        Field(3, "source", Choice(Source)),
        Field(4, "carrier", Choice(Carrier)),
        Field(5, "capacity_w", Unsigned(minimum=1)),
        Field(6, "area", Name()),
        Field(7, "place", Text(64)),
        Field(8, "commissioned_s", Unsigned()),
    )


@dataclass(frozen=True, slots=True)
class Mandate(Message):
    """A provider lets one broker take ownership of what a device generates from `from_s` on. Exclusive per device."""

    device: str
    owner: str
    broker: str
    from_s: int

    TYPE: ClassVar[MessageType] = MessageType.MANDATE
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "device", Name()),
        Field(1, "owner", Name()),
        Field(2, "broker", Name()),
        Field(3, "from_s", Unsigned()),
    )


@dataclass(frozen=True, slots=True)
class EndOfMandate(Message):
    """The provider ends a mandate at a coming boundary. What the broker owns by then stays with it."""

    device: str
    owner: str
    end_s: int

    TYPE: ClassVar[MessageType] = MessageType.END_OF_MANDATE
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "device", Name()),
        Field(1, "owner", Name()),
        Field(2, "end_s", Unsigned()),
    )


@dataclass(frozen=True, slots=True)
class KeyRotation(Message):
    """A party's or a meter's key gives way to a new one. Signed by the old key itself, or by a registrar.

    The new key serves at once. The old one serves for intervals that start before `from_s`, and until the market clock
    reaches `grace_until_s`.
    """

    holder: KeyHolder
    name: str
    old_key_id: bytes
    new_key: bytes
    from_s: int
    grace_until_s: int

    TYPE: ClassVar[MessageType] = MessageType.KEY_ROTATION
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "holder", Choice(KeyHolder)),
        Field(1, "name", Name()),
        Field(2, "old_key_id", _KEY_ID),
        Field(3, "new_key", _COSE_KEY),
        Field(4, "from_s", Unsigned()),
        Field(5, "grace_until_s", Unsigned()),
    )
    MAX_BYTES: ClassVar[int] = MAX_METER_MESSAGE_BYTES


@dataclass(frozen=True, slots=True)
class KeyRevocation(Message):
    """Nothing that this key signed counts any more. Signed by that key, by its holder's current key or a registrar."""

    holder: KeyHolder
    name: str
    key_id: bytes

    TYPE: ClassVar[MessageType] = MessageType.KEY_REVOCATION
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "holder", Choice(KeyHolder)),
        Field(1, "name", Name()),
        Field(2, "key_id", _KEY_ID),
    )
    MAX_BYTES: ClassVar[int] = MAX_METER_MESSAGE_BYTES


@dataclass(frozen=True, slots=True)
class ValidatorChange(Message):
    """A validator comes, gets another key or power, or goes (power 0). Signed by registrars, one message each.

    `sequence` counts the changes of the whole set: the first is 1, each one more than the last.
    """

    name: str
    key: bytes
    power: int
    sequence: int

    TYPE: ClassVar[MessageType] = MessageType.VALIDATOR_CHANGE
    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "name", Name()),
        Field(1, "key", _COSE_KEY),
        Field(2, "power", Unsigned(MAX_VALIDATOR_POWER)),
        Field(3, "sequence", Unsigned(minimum=1)),
    )
    MAX_BYTES: ClassVar[int] = MAX_METER_MESSAGE_BYTES


@dataclass(frozen=True, slots=True)
class NamedKey:
    """A party's name and its COSE_Key."""

    name: str
    key: bytes


@dataclass(frozen=True, slots=True)
class Genesis:
    """What a ledger is founded on. Not signed: its hash is what everyone compares (`trust.json` carries it).

    `validators` sign blocks and checkpoints. `conductor` (only with `simulated`) may tick calendar time.
    """

    ledger: str
    interval_s: int
    gate_1_s: int
    gate_2_s: int
    correction_deadline_s: int
    currency: str
    areas: tuple[str, ...]
    registrars: tuple[NamedKey, ...]
    validators: tuple[NamedKey, ...]
    simulated: bool
    conductor: NamedKey | None = None

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "ledger", Name()),
        Field(1, "interval_s", Unsigned()),
        Field(2, "gate_1_s", Unsigned()),
        Field(3, "gate_2_s", Unsigned()),
        Field(4, "correction_deadline_s", Unsigned()),
        Field(5, "currency", Text(3)),
        Field(6, "areas", Many(Name(), 64, minimum=1)),
        Field(7, "registrars", Many(Row((Name(), _COSE_KEY), NamedKey), MAX_REGISTRARS, minimum=1)),
        Field(8, "validators", Many(Row((Name(), _COSE_KEY), NamedKey), MAX_VALIDATORS, minimum=1)),
        Field(9, "simulated", Boolean()),
        Field(10, "conductor", Row((Name(), _COSE_KEY), NamedKey), optional=True),
    )

    def to_bytes(self) -> bytes:
        return cbor.encode(encode_fields(self.FIELDS, self))

    @classmethod
    def from_bytes(cls, raw: bytes) -> Self:
        """Read a genesis. Raises MalformedMessage naming the field that is wrong."""
        return cls(*decode_fields(cls.FIELDS, cbor.decode(raw, "genesis", MAX_BROKER_MESSAGE_BYTES), "genesis"))


@dataclass(frozen=True, slots=True)
class Report:
    """A participant's answer to a tick, unsigned: it moves nothing but the simulation's clock.

    `idle`: everything that the tick (`time_s`, `stage`) caused is committed, and nothing of the participant's is under
    way. `next_wake_s`: the market time of its next own work. `height`: the ledger height that it has taken in.
    `waits_for` and `holds`: tokens of what it waits for from others, and of what others may wait for from it (MAX_WAITS
    at most). One that waits is idle only as long as somebody holds what it waits for.
    """

    participant: str
    time_s: int
    stage: Stage
    idle: bool
    next_wake_s: int | None = None
    height: int | None = None
    waits_for: tuple[bytes, ...] | None = None
    holds: tuple[bytes, ...] | None = None

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field(0, "participant", Name()),
        Field(1, "time_s", Unsigned()),
        Field(2, "stage", Choice(Stage)),
        Field(3, "idle", Boolean()),
        Field(4, "next_wake_s", Unsigned(), optional=True),
        Field(5, "height", Unsigned(), optional=True),
        Field(6, "waits_for", Many(Bytes(WAIT_TOKEN_BYTES, WAIT_TOKEN_BYTES), MAX_WAITS), optional=True),
        Field(7, "holds", Many(Bytes(WAIT_TOKEN_BYTES, WAIT_TOKEN_BYTES), MAX_WAITS), optional=True),
    )

    def to_bytes(self) -> bytes:
        return cbor.encode(encode_fields(self.FIELDS, self))

    @classmethod
    def from_bytes(cls, raw: bytes) -> Self:
        """Read a report. Raises MalformedMessage naming the field that is wrong."""
        return cls(*decode_fields(cls.FIELDS, cbor.decode(raw, "report", MAX_BROKER_MESSAGE_BYTES), "report"))


MESSAGE_CLASSES: Final[dict[MessageType, type[Message]]] = {
    message_class.TYPE: message_class
    for message_class in (
        Reading,
        Demand,
        Receipt,
        Delivery,
        CertificateRequest,
        CertificatePart,
        MeterStatus,
        Order,
        OrderAnswer,
        Cleared,
        BrokerStatus,
        Stock,
        Batch,
        Result,
        Query,
        Page,
        Block,
        Checkpoint,
        Tick,
        Registration,
        Admission,
        Mandate,
        EndOfMandate,
        KeyRotation,
        KeyRevocation,
        ValidatorChange,
        Witness,
        Forecast,
        Hint,
        Wishes,
        Promises,
    )
}
