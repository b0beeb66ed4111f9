"""Slices, totals and the index of who holds what: the arithmetic of the books. Pure."""

from broker.ledger.faults import Fault, LedgerInvariantBroken
from broker.ledger.limits import MAX_HELD_SLICES
from broker.ledger.operations import AssetId
from broker.ledger.rules.step import Refused, Step, responsible_broker
from broker.ledger.state import (
    DEVICE,
    MANDATED,
    OWNED,
    PARTY,
    TOTAL,
    AssetRow,
    DeviceRow,
    Held,
    Key,
    MandatedRow,
    Overlay,
    OwnedRow,
    PartyRow,
    State,
    TotalRow,
    asset_key,
)
from broker.protocol.messages import Role


def check_books(overlay: Overlay) -> None:
    """issued = held + delivered + withdrawn + expired in every row that was written; raises LedgerInvariantBroken."""
    for key, row in overlay.written.items():
        if isinstance(row, AssetRow):
            held_wh = sum([held.to_wh - held.from_wh for held in row.held])
            if row.issued_wh != held_wh + row.delivered_wh + row.withdrawn_wh + row.expired_wh:
                raise LedgerInvariantBroken(key, row)
        elif isinstance(row, TotalRow):
            gone_wh = row.delivered_wh + row.withdrawn_wh + row.expired_wh
            if row.issued_wh != row.held_wh + gone_wh or min(row) < 0:
                raise LedgerInvariantBroken(key, row)


# --- Slices of an asset


def taken(step: Step, row: AssetRow, asset: AssetId, owner: str, from_wh: int, to_wh: int) -> tuple[Held, ...]:
    """The held slices without `[from_wh, to_wh)`, which `owner` must hold."""
    # Slices of nothing, or of less, would move sums without moving Wh.
    if from_wh >= to_wh:
        raise Refused(Fault.EMPTY_SLICE, f"[{from_wh}, {to_wh}) of {asset.device} is no range of Wh")
    # A close expires what its broker holds; what was parked with somebody else over that time is not used either.
    if asset.start_s <= step.expired_to_s:
        raise Refused(Fault.ASSET_EXPIRED, f"what {asset.device} made at {asset.start_s} is expired")
    for index, held in enumerate(row.held):
        if held.owner == owner and held.from_wh <= from_wh and to_wh <= held.to_wh:
            rest = []
            if held.from_wh < from_wh:
                rest.append(Held(held.from_wh, from_wh, owner))
            if to_wh < held.to_wh:
                rest.append(Held(to_wh, held.to_wh, owner))
            # Every later move of the asset searches these slices, so their number is bounded. A whole slice may
            # always go, or an asset with many slices that came back could never be used up.
            if rest and len(row.held) - 1 + len(rest) > MAX_HELD_SLICES:
                raise Refused(Fault.TOO_MANY_SLICES, f"an asset is held in at most {MAX_HELD_SLICES} slices")
            return (*row.held[:index], *rest, *row.held[index + 1 :])
    # Held by somebody else, delivered already, or beyond the asset: it is not the owner's to move.
    raise Refused(Fault.NOT_HELD, f"{owner} does not hold [{from_wh}, {to_wh}) of {asset.device} at {asset.start_s}")


def given(held: tuple[Held, ...], new: Held) -> tuple[Held, ...]:
    """The held slices with `new` in its place, joined with its neighbours where they have the same owner."""
    joined: list[Held] = []
    for item in sorted((*held, new)):
        if joined and joined[-1].owner == item.owner and joined[-1].to_wh == item.from_wh:
            item = Held(joined.pop().from_wh, item.to_wh, item.owner)
        joined.append(item)
    return tuple(joined)


def holds(slices: tuple[Held, ...], owner: str) -> bool:
    """True if one of the slices is the owner's."""
    for held in slices:  # noqa: SIM110  # A generator takes three times as long, and deliveries ask this most.
        if held.owner == owner:
            return True
    return False


# --- Who holds what


def put_gain(step: Step, owner: str, asset: AssetId, source: int, is_new: bool = False) -> None:
    """The owner holds a slice of the asset, and held none before. `is_new`: the asset has just been made."""
    # What nobody can hold yet has no row in the index.
    put = step.overlay.create if is_new else step.overlay.put
    keeper = _keeper(step.overlay, owner, asset)
    put(_owned_key(owner, asset), OwnedRow(source, keeper))
    if keeper is not None:
        put(_mandated_key(keeper, asset), MandatedRow())


def put_loss(step: Step, owner: str, asset: AssetId) -> None:
    """The owner holds no slice of the asset any more."""
    key = _owned_key(owner, asset)
    row: OwnedRow = step.overlay.get(key)
    step.overlay.put(key, None)
    if row.keeper is not None:
        step.overlay.put(_mandated_key(row.keeper, asset), None)


def _keeper(state: State, owner: str, asset: AssetId) -> str | None:
    """The broker whose closes expire what a provider holds of its own device's assets: the one mandated for them."""
    device: DeviceRow = state.get((DEVICE, asset.device))
    if device.owner != owner:
        return None
    party: PartyRow = state.get((PARTY, owner))
    # A broker has closes of its own.
    return None if party.role == Role.BROKER else responsible_broker(state, asset.device, asset.start_s)


def _owned_key(owner: str, asset: AssetId) -> Key:
    return (OWNED, owner, asset.start_s, asset.device, int(asset.carrier), asset.revision)


def _mandated_key(broker: str, asset: AssetId) -> Key:
    return (MANDATED, broker, asset.start_s, asset.device, int(asset.carrier), asset.revision)


# --- Assets with all that follows from them


def total_of(state: State, start_s: int, source: int) -> TotalRow:
    """What is on record of one source in one interval; zeros if nothing is."""
    row: TotalRow | None = state.get((TOTAL, start_s, source))
    return TotalRow(0, 0, 0, 0, 0) if row is None else row


def put_asset(step: Step, asset: AssetId, before: AssetRow | None, after: AssetRow) -> None:
    """Write an asset's row, its share in the totals, and the index of those who hold it."""
    step.overlay.put(asset_key(asset), after)
    old = before or AssetRow(after.source, after.area, 0, 0, 0, 0, (), 0)
    total = total_of(step.overlay, asset.start_s, after.source)
    issued_wh = after.issued_wh - old.issued_wh
    delivered_wh = after.delivered_wh - old.delivered_wh
    withdrawn_wh = after.withdrawn_wh - old.withdrawn_wh
    expired_wh = after.expired_wh - old.expired_wh
    step.overlay.put(
        (TOTAL, asset.start_s, after.source),
        TotalRow(
            total.issued_wh + issued_wh,
            total.held_wh + issued_wh - delivered_wh - withdrawn_wh - expired_wh,
            total.delivered_wh + delivered_wh,
            total.withdrawn_wh + withdrawn_wh,
            total.expired_wh + expired_wh,
        ),
    )
    held_before = {held.owner for held in old.held}
    held_now = {held.owner for held in after.held}
    for owner in held_now - held_before:
        put_gain(step, owner, asset, after.source, is_new=before is None)
    for owner in held_before - held_now:
        put_loss(step, owner, asset)


def unknown_asset(asset: AssetId) -> Refused:
    """The refusal of an operation that names an asset which was never issued."""
    # A slice of something that was never issued.
    return Refused(Fault.UNKNOWN_ASSET, f"no asset of {asset.device} at {asset.start_s}, revision {asset.revision}")
