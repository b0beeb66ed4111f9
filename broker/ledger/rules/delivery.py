"""Demands: what consumers are given, and what goes back when a demand was less. Pure."""

from typing import Final

from broker.ledger.faults import Fault
from broker.ledger.limits import MAX_RETURNED_SLICES
from broker.ledger.operations import CorrectDemand, Deliver, DeliveredSlice, ReturnedSlice, Window
from broker.ledger.rules.books import given, holds, put_asset, put_loss, taken, total_of, unknown_asset
from broker.ledger.rules.step import Refused, Step, clock_of, is_settled, require_broker
from broker.ledger.state import (
    CLOSED,
    DEMAND,
    SLICE,
    TOTAL,
    AssetRow,
    ClosedRow,
    DemandRow,
    Held,
    Key,
    SliceRow,
    TotalRow,
    asset_key,
)

_DAY_S: Final = 86_400


def deliver(step: Step, operation: Deliver) -> None:
    """Slices of the submitter go to the consumer behind a pseudonym, for good."""
    require_broker(step)
    overlay, submitter, start_s = step.overlay, step.submitter, operation.start_s
    # Consumption is settled by market interval.
    if not step.charter.calendar.is_interval(start_s, operation.end_s):
        raise Refused(Fault.DEMAND_INTERVAL, f"[{start_s}, {operation.end_s}) is no market interval of this ledger")
    if operation.area not in step.charter.areas:
        raise Refused(Fault.DEMAND_AREA, f"area {operation.area} is not one of {sorted(step.charter.areas)}")
    demand_key = (DEMAND, start_s, operation.pseudonym)
    demand: DemandRow | None = overlay.get(demand_key)
    delivered_wh = revision = 0
    if demand is not None:
        _require_own(step, demand)
        # Else what is delivered could be raised to any amount afterwards.
        if demand.demanded_wh != operation.demanded_wh or demand.commitment != operation.commitment:
            raise Refused(Fault.DEMAND_CHANGED, "the demand is on record with another amount or commitment")
        delivered_wh, revision = demand.delivered_wh, demand.revision
    for item in operation.slices:
        delivered_wh += item.to_wh - item.from_wh
        asset = item.asset
        key = asset_key(asset)
        row: AssetRow | None = overlay.get(key)
        if row is None:
            raise unknown_asset(asset)
        # How close in time generation must match consumption is the contract's promise.
        if asset.start_s != start_s and not same_window(operation.window, asset.start_s, start_s):
            raise Refused(
                Fault.OUTSIDE_WINDOW,
                f"generation at {asset.start_s} is outside the {operation.window.name.lower()} of {start_s}",
            )
        # Allocation between different areas is a known defect elsewhere: the energy could not have flowed.
        if row.area != operation.area:
            raise Refused(Fault.OUTSIDE_AREA, f"{asset.device} feeds {row.area}, the demand is in {operation.area}")
        held = taken(step, row, asset, submitter, item.from_wh, item.to_wh)
        _put_delivered(step, operation, item, key, row, held)
    # Nobody is given more than they used.
    if delivered_wh > operation.demanded_wh:
        raise Refused(Fault.DEMAND_EXCEEDED, f"{delivered_wh} Wh exceed the demand of {operation.demanded_wh} Wh")
    overlay.put(demand_key, DemandRow(submitter, operation.demanded_wh, operation.commitment, delivered_wh, revision))


def _require_own(step: Step, demand: DemandRow) -> None:
    # A pseudonym belongs to one consumer of one broker; others could only use up what is demanded.
    if demand.broker != step.submitter:
        raise Refused(Fault.DEMAND_BROKER, f"this demand is served by {demand.broker}")


def _put_delivered(
    step: Step, operation: Deliver, item: DeliveredSlice, key: Key, row: AssetRow, held: tuple[Held, ...]
) -> None:
    overlay, asset, energy_wh = step.overlay, item.asset, item.to_wh - item.from_wh
    delivered_wh = row.delivered_wh + energy_wh
    count = row.deliveries
    overlay.put(
        key,
        AssetRow(row.source, row.area, row.issued_wh, delivered_wh, row.withdrawn_wh, row.expired_wh, held, count + 1),
    )
    delivered = SliceRow(item.to_wh, step.submitter, operation.pseudonym, operation.start_s, item.line, count)
    # What was held until now has no row as a delivered slice.
    overlay.create((SLICE, *key[1:], item.from_wh), delivered)
    if not holds(held, step.submitter):
        put_loss(step, step.submitter, asset)
    total = total_of(overlay, asset.start_s, row.source)
    overlay.put(
        (TOTAL, asset.start_s, row.source),
        TotalRow(
            total.issued_wh,
            total.held_wh - energy_wh,
            total.delivered_wh + energy_wh,
            total.withdrawn_wh,
            total.expired_wh,
        ),
    )


def same_window(window: Window, one_s: int, other_s: int) -> bool:
    """True if generation at the one time may serve a demand at the other."""
    if window is Window.INTERVAL:
        return one_s == other_s
    if window is Window.DAY:
        return one_s // _DAY_S == other_s // _DAY_S
    return _month_of(one_s) == _month_of(other_s)


def _month_of(time_s: int) -> tuple[int, int]:
    """Year and month (0 to 11) in UTC, in the proleptic Gregorian calendar, by integer arithmetic for any time."""
    # Years are counted from 1 March, so that the leap day comes last: 153 days make five months from there.
    day = time_s // _DAY_S + 719_468  # days from 0000-03-01 to 1970-01-01
    era, day_of_era = divmod(day, 146_097)  # 400 years
    year_of_era = (day_of_era - day_of_era // 1_460 + day_of_era // 36_524 - day_of_era // 146_096) // 365
    day_of_year = day_of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    month_from_march = (5 * day_of_year + 2) // 153
    year = 400 * era + year_of_era + (month_from_march >= 10)
    return year, (month_from_march + 2) % 12


# --- Another amount


def correct_demand(step: Step, operation: CorrectDemand) -> None:
    """The demand of a consumer of the submitter has another amount; what is too much comes back."""
    require_broker(step)
    overlay, start_s = step.overlay, operation.start_s
    demand_key = (DEMAND, start_s, operation.pseudonym)
    demand: DemandRow | None = overlay.get(demand_key)
    # What was never on record has nothing that could change; deliver puts it there.
    if demand is None:
        raise Refused(Fault.UNKNOWN_DEMAND, f"no demand of this pseudonym is on record at {start_s}")
    _require_own(step, demand)
    # Each revision follows the one before, so that none is missing from the record and none counts twice.
    if operation.revision != demand.revision + 1:
        raise Refused(
            Fault.DEMAND_REVISION, f"revision {operation.revision} of the demand does not follow {demand.revision}"
        )
    # Certificates become final.
    if is_settled(step.charter, start_s, clock_of(overlay, step.submitter)):
        raise Refused(Fault.DEMAND_SETTLED, f"the correction deadline of the interval at {start_s} is past")
    excess_wh = max(demand.delivered_wh - operation.demanded_wh, 0)
    # A consumer keeps no more than they used, and no less than they were given without need.
    if sum([item.to_wh - item.from_wh for item in operation.returned]) != excess_wh:
        raise Refused(
            Fault.RETURNED_AMOUNT,
            f"{demand.delivered_wh} Wh are delivered: exactly {excess_wh} Wh must be returned",
        )
    for item in operation.returned:
        _put_returned(step, operation, item)
    lowered_wh = demand.demanded_wh - operation.demanded_wh
    closed: ClosedRow | None = overlay.get((CLOSED, step.submitter, start_s))
    if closed is not None and lowered_wh > 0:
        lowered = closed._replace(lowered_wh=closed.lowered_wh + lowered_wh)
        overlay.put((CLOSED, step.submitter, start_s), lowered)
    overlay.put(
        demand_key,
        DemandRow(
            step.submitter,
            operation.demanded_wh,
            operation.commitment,
            demand.delivered_wh - excess_wh,
            operation.revision,
        ),
    )


def _put_returned(step: Step, operation: CorrectDemand, item: ReturnedSlice) -> None:
    overlay, asset, from_wh, to_wh = step.overlay, item.asset, item.from_wh, item.to_wh
    key = asset_key(asset)
    slice_key = (SLICE, *key[1:], item.slice_from_wh)
    delivered: SliceRow | None = overlay.get(slice_key)
    # Only what this very demand was given goes back, from the end of a slice, so that the rest stays one slice.
    if (
        delivered is None
        or (delivered.pseudonym, delivered.demand_start_s) != (operation.pseudonym, operation.start_s)
        or not item.slice_from_wh <= from_wh < to_wh == delivered.to_wh
    ):
        raise Refused(
            Fault.RETURNED_SLICE, f"[{from_wh}, {to_wh}) of {asset.device} is no tail of a slice of this demand"
        )
    overlay.put(slice_key, delivered._replace(to_wh=from_wh) if item.slice_from_wh < from_wh else None)
    row: AssetRow = overlay.get(key)
    held = given(row.held, Held(from_wh, to_wh, step.submitter))
    # Every later move of the asset searches these slices.
    if len(held) > MAX_RETURNED_SLICES:
        raise Refused(Fault.TOO_MANY_RETURNED, f"at most {MAX_RETURNED_SLICES} slices of an asset can be held")
    put_asset(step, asset, row, row._replace(delivered_wh=row.delivered_wh - (to_wh - from_wh), held=held))
