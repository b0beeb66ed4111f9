"""The ledger's operations as value classes, and their bytes.

An operation is the CBOR array [code, body], the body an array in the order of the class's fields. The bytes are
deterministic: they are what a Merkle leaf hashes. Statements of others (registrar, owner, meter, requester) travel
inside as the sealed messages that those signed. Energy is in whole Wh, prices in µ-currency per kWh, times in UTC epoch
seconds, Wh ranges are half-open `[from_wh, to_wh)` and count from the first Wh of their asset.

Codes 15 and up are free for what comes later (`deliver_set`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any, Final, NamedTuple

from broker.ledger.limits import MAX_SLICES_OF_DELIVERY
from broker.protocol import cbor
from broker.protocol.codec import Bytes, Choice, Codec, Many, Name, Row, Unsigned
from broker.protocol.errors import MalformedMessage
from broker.protocol.limits import MAX_BATCH_BYTES, MAX_BROKER_MESSAGE_BYTES, MAX_METER_MESSAGE_BYTES
from broker.protocol.messages import HASH_BYTES, MAX_REGISTRARS, NO_LINE, ORDER_ID_BYTES, PSEUDONYM_BYTES, Carrier


class OperationCode(IntEnum):
    """The number of an operation on the ledger; it never changes."""

    REGISTER = 1
    ADMIT = 2
    MANDATE = 3
    END_MANDATE = 4
    ISSUE = 5
    TRANSFER = 6
    DELIVER = 7
    CLOSE = 8
    VOID = 9
    CORRECT = 10
    CORRECT_DEMAND = 11
    ROTATE_KEY = 12
    REVOKE_KEY = 13
    SET_VALIDATOR = 14


class Window(IntEnum):
    """How close in time generation must match consumption."""

    INTERVAL = 0
    DAY = 1
    MONTH = 2


@dataclass(frozen=True, slots=True)
class AssetId:
    """Names an asset: what one device made in the market interval that begins at `start_s`."""

    device: str
    carrier: Carrier
    start_s: int
    revision: int

    def __hash__(self) -> int:
        # Device and start tell nearly all assets apart; hashing the enum would cost more than the rest together.
        return hash((self.device, self.start_s))


class DeliveredSlice(NamedTuple):
    """Wh of an asset for one contract line of the consumer (`NO_LINE`: a substitute outside every line).

    A named tuple, because a ledger has more of these than of anything else, and a frozen dataclass takes five times as
    long to make.
    """

    asset: AssetId
    from_wh: int
    to_wh: int
    line: int


class ReturnedSlice(NamedTuple):
    """The tail `[from_wh, to_wh)` that a delivered slice gives back; the slice itself begins at `slice_from_wh`."""

    asset: AssetId
    slice_from_wh: int
    from_wh: int
    to_wh: int


@dataclass(frozen=True, slots=True)
class Register:
    """A registrar's sealed Registration of a party."""

    statement: bytes


@dataclass(frozen=True, slots=True)
class Admit:
    """A registrar's sealed Admission of a device."""

    statement: bytes


@dataclass(frozen=True, slots=True)
class MandateOp:
    """The owner's sealed Mandate for one broker."""

    statement: bytes


@dataclass(frozen=True, slots=True)
class EndMandate:
    """The owner's sealed EndOfMandate."""

    statement: bytes


@dataclass(frozen=True, slots=True)
class Issue:
    """A device's Reading, sealed by its meter: makes an asset that the device's owner owns."""

    statement: bytes


@dataclass(frozen=True, slots=True)
class Transfer:
    """Moves a slice. `order` is the receiver's sealed Order where the receiver is a neighbour broker, else None."""

    asset: AssetId
    from_wh: int
    to_wh: int
    sender: str
    receiver: str
    price: int
    order: bytes | None


@dataclass(frozen=True, slots=True)
class Deliver:
    """Gives slices that the submitter owns to the consumer behind `pseudonym`, for the demand of `[start_s, end_s)`.

    `commitment` stands for the signed demand that stays off the ledger. No slices: puts on record what is unmatched.
    """

    pseudonym: bytes
    start_s: int
    end_s: int
    window: Window
    area: str
    demanded_wh: int
    commitment: bytes
    slices: tuple[DeliveredSlice, ...]


@dataclass(frozen=True, slots=True)
class Close:
    """The submitter has finished an interval. `root` commits to all its demands."""

    start_s: int
    end_s: int
    revision: int
    demands: int
    demanded_wh: int
    root: bytes


@dataclass(frozen=True, slots=True)
class Void:
    """The submitter gives up an order of its own: nothing more may be transferred under it."""

    order_id: bytes


@dataclass(frozen=True, slots=True)
class Correct:
    """A device's Reading of revision 1 or more, sealed by its meter: what it metered in that interval was another."""

    statement: bytes


@dataclass(frozen=True, slots=True)
class CorrectDemand:
    """The demand behind `pseudonym` has another amount. What was delivered beyond it goes back to the submitter."""

    pseudonym: bytes
    start_s: int
    revision: int
    demanded_wh: int
    commitment: bytes
    returned: tuple[ReturnedSlice, ...]


@dataclass(frozen=True, slots=True)
class RotateKey:
    """A sealed KeyRotation, by the key that gives way or by a registrar."""

    statement: bytes


@dataclass(frozen=True, slots=True)
class RevokeKey:
    """A sealed KeyRevocation, by that key, by its holder's current key or by a registrar."""

    statement: bytes


@dataclass(frozen=True, slots=True)
class SetValidator:
    """The same ValidatorChange, sealed by one registrar each."""

    statements: tuple[bytes, ...]


Operation = (
    Register
    | Admit
    | MandateOp
    | EndMandate
    | Issue
    | Transfer
    | Deliver
    | Close
    | Void
    | Correct
    | CorrectDemand
    | RotateKey
    | RevokeKey
    | SetValidator
)


@dataclass(frozen=True, slots=True)
class _OrNull:
    """A value or null."""

    item: Codec

    def encode(self, value: Any) -> Any:
        return None if value is None else self.item.encode(value)

    def decode(self, data: Any, where: str) -> Any:
        return None if data is None else self.item.decode(data, where)


@dataclass(frozen=True, slots=True)
class _AssetCodec:
    """An AssetId as an array of four."""

    def encode(self, value: Any) -> Any:
        return value.device, int(value.carrier), value.start_s, value.revision

    def decode(self, data: Any, where: str) -> AssetId:
        if type(data) is not list or len(data) != 4:
            raise MalformedMessage(where, "an asset: [device, carrier, start_s, revision]")
        return _asset_of(data, where)


@dataclass(frozen=True, slots=True)
class _SliceCodec:
    """A DeliveredSlice as one flat array of seven, since every nested array costs more time than what it holds."""

    def encode(self, value: Any) -> Any:
        asset = value.asset
        return (
            asset.device,
            int(asset.carrier),
            asset.start_s,
            asset.revision,
            value.from_wh,
            value.to_wh,
            value.line,
        )

    def decode(self, data: Any, where: str) -> DeliveredSlice:
        if type(data) is not list or len(data) != 7:
            raise MalformedMessage(where, "a slice: [device, carrier, start_s, revision, from_wh, to_wh, line]")
        *asset, from_wh, to_wh, line = data
        return DeliveredSlice(
            _asset_of(asset, where),
            _WH.decode(from_wh, where),
            _WH.decode(to_wh, where),
            _LINE.decode(line, where),
        )


@dataclass(frozen=True, slots=True)
class _ReturnedCodec:
    """A ReturnedSlice as one flat array of seven, like a DeliveredSlice."""

    def encode(self, value: Any) -> Any:
        asset = value.asset
        return (
            asset.device,
            int(asset.carrier),
            asset.start_s,
            asset.revision,
            value.slice_from_wh,
            value.from_wh,
            value.to_wh,
        )

    def decode(self, data: Any, where: str) -> ReturnedSlice:
        if type(data) is not list or len(data) != 7:
            raise MalformedMessage(
                where, "a returned slice: [device, carrier, start_s, revision, slice_from_wh, from_wh, to_wh]"
            )
        *asset, slice_from_wh, from_wh, to_wh = data
        return ReturnedSlice(
            _asset_of(asset, where),
            _WH.decode(slice_from_wh, where),
            _WH.decode(from_wh, where),
            _WH.decode(to_wh, where),
        )


def _asset_of(data: list[Any], where: str) -> AssetId:
    if type(data[0]) is not str or type(data[1]) is not int or type(data[2]) is not int or type(data[3]) is not int:
        raise MalformedMessage(where, "an asset: [device, carrier, start_s, revision]")
    return _asset(*data)


@lru_cache(maxsize=4_096)
def _asset(device: str, carrier: int, start_s: int, revision: int) -> AssetId:
    # Thousands of operations in a row name the same asset, so what was checked once is remembered.
    asset: AssetId = _ASSET_ROW.decode([device, carrier, start_s, revision], "asset")
    return asset


_STATEMENT: Final = (Bytes(1, MAX_METER_MESSAGE_BYTES),)
_HASH: Final = Bytes(HASH_BYTES, HASH_BYTES)
_WH: Final = Unsigned()
_REVISION: Final = Unsigned(maximum=65_535)
_ASSET_ROW: Final = Row((Name(), Choice(Carrier), Unsigned(), _REVISION), AssetId)
_ASSET: Final = _AssetCodec()
_LINE: Final = Unsigned(maximum=NO_LINE)
_SLICE: Final = _SliceCodec()
_RETURNED: Final = _ReturnedCodec()

_BODIES: Final[Mapping[OperationCode, Row]] = {
    OperationCode.REGISTER: Row(_STATEMENT, Register),
    OperationCode.ADMIT: Row(_STATEMENT, Admit),
    OperationCode.MANDATE: Row(_STATEMENT, MandateOp),
    OperationCode.END_MANDATE: Row(_STATEMENT, EndMandate),
    OperationCode.ISSUE: Row(_STATEMENT, Issue),
    OperationCode.TRANSFER: Row(
        (_ASSET, _WH, _WH, Name(), Name(), Unsigned(), _OrNull(Bytes(1, MAX_BROKER_MESSAGE_BYTES))), Transfer
    ),
    OperationCode.DELIVER: Row(
        (
            Bytes(PSEUDONYM_BYTES, PSEUDONYM_BYTES),
            Unsigned(),
            Unsigned(),
            Choice(Window),
            Name(),
            _WH,
            _HASH,
            Many(_SLICE, MAX_SLICES_OF_DELIVERY),
        ),
        Deliver,
    ),
    OperationCode.CLOSE: Row((Unsigned(), Unsigned(), _REVISION, Unsigned(), _WH, _HASH), Close),
    OperationCode.VOID: Row((Bytes(ORDER_ID_BYTES, ORDER_ID_BYTES),), Void),
    OperationCode.CORRECT: Row(_STATEMENT, Correct),
    OperationCode.CORRECT_DEMAND: Row(
        (
            Bytes(PSEUDONYM_BYTES, PSEUDONYM_BYTES),
            Unsigned(),
            _REVISION,
            _WH,
            _HASH,
            Many(_RETURNED, MAX_SLICES_OF_DELIVERY),
        ),
        CorrectDemand,
    ),
    OperationCode.ROTATE_KEY: Row(_STATEMENT, RotateKey),
    OperationCode.REVOKE_KEY: Row(_STATEMENT, RevokeKey),
    OperationCode.SET_VALIDATOR: Row((Many(_STATEMENT[0], MAX_REGISTRARS, minimum=1),), SetValidator),
}
_CODES: Final[Mapping[type, OperationCode]] = {row.into: code for code, row in _BODIES.items()}
_KINDS: Final[Mapping[int, tuple[str, Row]]] = {int(code): (code.name.lower(), row) for code, row in _BODIES.items()}


def encode_operation(operation: Operation) -> bytes:
    """The deterministic bytes of an operation."""
    code = _CODES[type(operation)]
    return cbor.encode((int(code), _BODIES[code].encode(operation)))


def decode_operation(raw: bytes) -> Operation:
    """Read an operation, exactly as `encode_operation` writes it. Raises MalformedMessage naming the field."""
    data = cbor.decode(raw, "operation", MAX_BATCH_BYTES)
    if type(data) is not list or len(data) != 2 or type(data[0]) is not int or data[0] not in _KINDS:
        raise MalformedMessage(
            "operation", "[code, body] with a code of " + ", ".join(str(int(code)) for code in _BODIES)
        )
    name, row = _KINDS[data[0]]
    try:
        operation: Operation = row.decode(data[1], name)
    except MalformedMessage:
        # Only now is it worth naming the field: nearly all operations are well formed and this is the hot path.
        if type(data[1]) is list and len(data[1]) == len(row.items):
            for field_name, codec, item in zip(row.into.__slots__, row.items, data[1], strict=True):
                codec.decode(item, f"{name}.{field_name}")
        raise
    return operation


def operation_code(raw: bytes) -> int:
    """The code of an encoded operation without decoding it; -1 if these are no such bytes."""
    return raw[1] if len(raw) > 1 and raw[0] == 0x82 else -1
