"""What became of one device's energy of one interval, as the ledger answers a query of kind MADE. Pure.

A correction of a reading withdraws by rule, from whoever has the energy. Its operation does not say what: that follows
from all that happened to the asset before, also among others. So a broker that has a stake in it asks, and finds by the
ranges what was taken of its stock, of what it delivered and of what it sold. Everybody gets the same answer.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from broker.ledger.limits import MAX_REVISION, MAX_SEARCHED_BY_BATCH, MAX_SEARCHED_DELIVERIES
from broker.ledger.operations import AssetId
from broker.ledger.state import ASSET, CARRY, DEVICE, SLICE, AssetRow, CarryRow, DeviceRow, SliceRow, State
from broker.protocol import cbor
from broker.protocol.codec import Choice, Many, Name, Row, Unsigned
from broker.protocol.errors import MalformedMessage
from broker.protocol.limits import MAX_INTEGER
from broker.protocol.messages import Carrier

_MAX_BYTES: Final = 2 * 2**20
_HELD: Final = Row((Unsigned(MAX_REVISION), Unsigned(), Unsigned(), Name()))
_HEAD: Final = Row((Unsigned(), Name(), Choice(Carrier), Unsigned()))
_GONE: Final = Row((Unsigned(MAX_REVISION), Unsigned(), Unsigned()))
_LISTS: Final = Row((Many(_HELD, 65_535), Many(_GONE, 65_535)))


@dataclass(frozen=True, slots=True)
class HeldRange:
    """`[from_wh, to_wh)` of an asset, held by `owner`."""

    asset: AssetId
    from_wh: int
    to_wh: int
    owner: str


@dataclass(frozen=True, slots=True)
class WithdrawnRange:
    """`[from_wh, to_wh)` of an asset, which a correction has withdrawn from whoever had it."""

    asset: AssetId
    from_wh: int
    to_wh: int


@dataclass(frozen=True, slots=True)
class Made:
    """True at `height`. `carried_wh` is what the device's next issue adds (or takes off), of whatever interval.

    `withdrawn` may leave out an asset altogether (`made_of`), and then says nothing about it.
    """

    height: int
    device: str
    carrier: Carrier
    start_s: int
    carried_wh: int
    held: tuple[HeldRange, ...]
    withdrawn: tuple[WithdrawnRange, ...]

    def to_bytes(self) -> bytes:
        """`made` in schema/operations.cddl."""
        held = [[item.asset.revision, item.from_wh, item.to_wh, item.owner] for item in self.held]
        gone = [[item.asset.revision, item.from_wh, item.to_wh] for item in self.withdrawn]
        head = [self.height, self.device, int(self.carrier), self.start_s]
        return cbor.encode([*head, self.carried_wh, held, gone])


def decode_made(raw: bytes) -> Made:
    """Raises MalformedMessage."""
    data = cbor.decode(raw, "made", _MAX_BYTES)
    if type(data) is not list or len(data) != 7 or type(data[4]) is not int or abs(data[4]) > MAX_INTEGER:
        raise MalformedMessage("made", "[height, device, carrier, start_s, carried_wh, held, withdrawn]")
    height, device, carrier, start_s = _HEAD.decode(data[:4], "made")
    held, gone = _LISTS.decode(data[5:], "made")
    return Made(
        height,
        device,
        carrier,
        start_s,
        data[4],
        tuple(HeldRange(AssetId(device, carrier, start_s, row[0]), *row[1:]) for row in held),
        tuple(WithdrawnRange(AssetId(device, carrier, start_s, row[0]), *row[1:]) for row in gone),
    )


def made_of(state: State, height: int, device: str, start_s: int) -> Made | None:
    """What the ledger at `height` has of this device and interval. None: no such device.

    Withdrawn is what is neither held nor delivered to anybody. An asset is left out there if that cannot be told, and
    then no correction takes of its deliveries any more: what has expired since is past the deadline, and what is spread
    over so many deliveries is more than a correction looks through.
    """
    row: DeviceRow | None = state.get((DEVICE, device))
    if row is None:
        return None
    carrier = Carrier(row.carrier)
    held: list[HeldRange] = []
    gone: list[WithdrawnRange] = []
    first_wh = searched = 0
    for revision in range(MAX_REVISION + 1):
        name = (start_s, device, int(carrier), revision)
        asset: AssetRow | None = state.get((ASSET, *name))
        if asset is None:
            continue
        identity = AssetId(device, carrier, start_s, revision)
        held += [HeldRange(identity, item.from_wh, item.to_wh, item.owner) for item in asset.held]
        # Each revision's range begins where those before it end.
        begin_wh, first_wh = first_wh, first_wh + asset.issued_wh
        if not asset.withdrawn_wh or asset.expired_wh:
            continue
        if asset.deliveries > MAX_SEARCHED_DELIVERIES:
            searched += asset.deliveries
            if searched > MAX_SEARCHED_BY_BATCH:
                continue
        standing = [(item.from_wh, item.to_wh) for item in asset.held]
        for key in state.scan((SLICE, *name), 0, MAX_INTEGER + 1):
            item: SliceRow = state.get(key)
            standing.append((key[5], item.to_wh))
        gone += [WithdrawnRange(identity, *gap) for gap in _gaps(begin_wh, first_wh, standing)]
    carried: CarryRow | None = state.get((CARRY, device, int(carrier)))
    carried_wh = 0 if carried is None else carried.energy_wh
    return Made(height, device, carrier, start_s, carried_wh, tuple(held), tuple(gone))


def _gaps(begin_wh: int, end_wh: int, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What of `[begin_wh, end_wh)` none of these disjoint ranges covers."""
    for from_wh, to_wh in sorted(ranges):
        if begin_wh < from_wh:
            yield begin_wh, from_wh
        begin_wh = to_wh
    if begin_wh < end_wh:
        yield begin_wh, end_wh
