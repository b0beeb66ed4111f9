"""A broker finishes an interval: its market clock moves on, and what is long past use expires. Pure."""

from itertools import islice

from broker.ledger.faults import Fault
from broker.ledger.limits import MAX_EXPIRED_ASSETS
from broker.ledger.operations import AssetId, Close
from broker.ledger.rules.books import put_asset
from broker.ledger.rules.step import Refused, Step, clock_of, expired_to, require_broker
from broker.ledger.state import (
    APPLIED,
    CLOCK,
    CLOSED,
    DEVICE,
    MANDATED,
    OWNED,
    AssetRow,
    ClockRow,
    ClosedRow,
    DeviceRow,
    Key,
    asset_key,
    encode_key,
)
from broker.protocol.messages import Carrier


def close(step: Step, operation: Close) -> None:
    """The submitter has finished an interval: its clock moves on, old assets expire. Or it states an interval anew."""
    require_broker(step)
    overlay, broker = step.overlay, step.submitter
    # A broker's market clock runs in market intervals.
    if not step.charter.calendar.is_interval(operation.start_s, operation.end_s):
        raise Refused(Fault.CLOSE_INTERVAL, f"[{operation.start_s}, {operation.end_s}) is no market interval")
    key = (CLOSED, broker, operation.start_s)
    before: ClosedRow | None = overlay.get(key)
    # Each revision follows the one before, so that none is missing from the record.
    if operation.revision != (0 if before is None else before.revision + 1):
        raise Refused(
            Fault.CLOSE_REVISION,
            f"revision {operation.revision} of the close at {operation.start_s} does not follow what is on record",
        )
    if before is None:
        clock_s = clock_of(overlay, broker)
        # Intervals are closed in order; market time does not run backwards.
        if operation.end_s <= clock_s:
            raise Refused(Fault.CLOSE_ORDER, f"{broker} has closed up to {clock_s} already")
        overlay.put((CLOCK, broker), ClockRow(operation.end_s))
        for old in list(overlay.scan((APPLIED, broker), 0, operation.end_s + 1)):
            overlay.put(old, None)
        step.expired_to_s = expired_to(step.charter, operation.end_s)
        _expire(step)
    # Late demands add; what was committed to does not disappear, but by corrections that are on record.
    elif operation.demands < before.demands or operation.demanded_wh < before.demanded_wh - before.lowered_wh:
        raise Refused(
            Fault.CLOSE_LOWERED,
            f"a later close cannot lower demands, nor demanded_wh by more than corrections did: {before.lowered_wh} Wh",
        )
    overlay.put(key, ClosedRow(operation.revision, operation.demands, operation.demanded_wh, operation.root, 0))


def _expire(step: Step) -> None:
    """Take what the broker holds, and what providers hold under its mandates, of intervals long past; oldest first.

    What is beyond MAX_EXPIRED_ASSETS goes at the next closes. Nobody can use it meanwhile (`books.taken`).
    """
    if step.expired_to_s < 0:
        return
    found: dict[Key, list[str]] = {}
    for table in (OWNED, MANDATED):
        keys = step.overlay.scan((table, step.submitter), 0, step.expired_to_s + 1)
        for _, _, start_s, *rest in islice(keys, MAX_EXPIRED_ASSETS):
            device: DeviceRow = step.overlay.get((DEVICE, rest[0]))
            found.setdefault((start_s, *rest), []).append(step.submitter if table == OWNED else device.owner)
    for key in sorted(found, key=encode_key)[:MAX_EXPIRED_ASSETS]:
        start_s, device_name, carrier, revision = key
        asset = AssetId(device_name, Carrier(carrier), start_s, revision)
        row: AssetRow = step.overlay.get(asset_key(asset))
        kept = tuple([held for held in row.held if held.owner not in found[key]])
        expired_wh = sum([held.to_wh - held.from_wh for held in row.held if held.owner in found[key]])
        put_asset(step, asset, row, row._replace(held=kept, expired_wh=row.expired_wh + expired_wh))
