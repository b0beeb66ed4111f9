"""What devices made: readings become assets, and corrections add to them or take away. Pure.

For each device over all time: Wh metered = Wh issued - Wh withdrawn + Wh carried. A correction that comes too late, or
that finds nothing left to withdraw, is carried: the device's next issue is so much more or less.
"""

from broker.ledger.faults import Fault
from broker.ledger.limits import MAX_REVISION, MAX_SEARCHED_BY_BATCH, MAX_SEARCHED_DELIVERIES, MAX_WITHDRAWN_SLICES
from broker.ledger.opening import meter_signer, open_statement
from broker.ledger.operations import AssetId, Correct, Issue
from broker.ledger.rules.books import put_asset
from broker.ledger.rules.keys import require_serving
from broker.ledger.rules.step import Refused, Step, clock_of, is_settled, responsible_broker
from broker.ledger.state import (
    CARRY,
    DEMAND,
    DEVICE,
    METERED,
    SLICE,
    AssetRow,
    CarryRow,
    DemandRow,
    DeviceRow,
    Held,
    Key,
    MeteredRow,
    SliceRow,
    asset_key,
)
from broker.protocol.limits import MAX_INTEGER
from broker.protocol.messages import Quality, Reading


def issue(step: Step, operation: Issue) -> None:
    """A meter's first reading of an interval becomes an asset of its device's owner."""
    reading, device, is_late = _checked(step, operation.statement)
    # What follows revision 0 is a correction, with rules for what has been delivered already.
    if reading.revision != 0:
        raise Refused(Fault.REVISION, f"revision {reading.revision} of a reading is a correction, not an issue")
    asset = AssetId(reading.meter, reading.carrier, reading.start_s, 0)
    metered_key = _metered_key(reading)
    # One issue per device, carrier and interval, whoever submits it.
    if step.overlay.get(asset_key(asset)) is not None or step.overlay.get(metered_key) is not None:
        raise Refused(Fault.ISSUED_BEFORE, f"{reading.meter} is on record for the interval at {reading.start_s}")
    carried_wh = _carried(step, reading)
    # An asset of nothing could never be moved; the broker leaves such readings out.
    if reading.energy_wh == 0 and (is_late or carried_wh <= 0):
        raise Refused(Fault.NOTHING_TO_ISSUE, f"{reading.meter} made 0 Wh in the interval at {reading.start_s}")
    wanted_wh = reading.energy_wh + carried_wh
    net_wh = 0 if is_late else min(max(wanted_wh, 0), _limit_wh(step, device))
    _put_carried(step, reading, wanted_wh - net_wh)
    if net_wh:
        _put_new_asset(step, asset, device, 0, net_wh)
    if net_wh != reading.energy_wh:
        step.overlay.put(metered_key, MeteredRow(0, reading.energy_wh, net_wh, net_wh))


def correct(step: Step, operation: Correct) -> None:
    """A meter's later revision: the difference is added, withdrawn, or carried to what the device makes next."""
    reading, device, is_late = _checked(step, operation.statement)
    before = _metered(step, reading)
    # Each revision follows the one before, so that none is missing from the record and none counts twice.
    if reading.revision != before.revision + 1:
        raise Refused(
            Fault.CORRECTION_REVISION,
            f"revision {reading.revision} of {reading.meter} at {reading.start_s} does not follow {before.revision}",
        )
    # Every correction looks at the assets of all revisions before it.
    if reading.revision > MAX_REVISION:
        raise Refused(Fault.TOO_MANY_REVISIONS, f"an interval is corrected at most {MAX_REVISION} times")
    difference_wh = reading.energy_wh - before.energy_wh
    high_water_wh, net_wh = before.high_water_wh, before.net_wh
    target_wh = net_wh if is_late else min(max(net_wh + difference_wh, 0), _limit_wh(step, device))
    if target_wh > net_wh:
        asset = AssetId(reading.meter, reading.carrier, reading.start_s, reading.revision)
        _put_new_asset(step, asset, device, high_water_wh, high_water_wh + target_wh - net_wh)
        high_water_wh += target_wh - net_wh
        net_wh = target_wh
    elif target_wh < net_wh:
        net_wh -= _withdraw(step, reading, device.owner, before.revision, net_wh - target_wh)
    _put_carried(step, reading, _carried(step, reading) + difference_wh - (net_wh - before.net_wh))
    step.overlay.put(_metered_key(reading), MeteredRow(reading.revision, reading.energy_wh, high_water_wh, net_wh))


def _checked(step: Step, statement: bytes) -> tuple[Reading, DeviceRow, bool]:
    """A meter's reading, its device, and whether it comes after the correction deadline."""
    # Every node checks the meter's signature here, so no broker can make energy up.
    reading, opened = open_statement(statement, step.charter, lambda key: meter_signer(step.overlay, key), Reading)
    device: DeviceRow | None = step.overlay.get((DEVICE, reading.meter))
    # A meter speaks for its own device only.
    if device is None or opened.sender != reading.meter:
        raise Refused(Fault.UNKNOWN_DEVICE, f"{opened.sender} reports for {reading.meter}, which is not its device")
    # One carrier's energy must not be sold as another's.
    if reading.carrier != device.carrier:
        raise Refused(Fault.CARRIER, f"{reading.meter} is not admitted for {reading.carrier.name.lower()}")
    # Market intervals never overlap, so neither do a device's assets.
    if not step.charter.calendar.is_interval(reading.start_s, reading.end_s):
        raise Refused(
            Fault.READING_INTERVAL, f"[{reading.start_s}, {reading.end_s}) is no market interval of this ledger"
        )
    # What a meter counted on the bench or for another plant is not this device's.
    if reading.start_s < device.commissioned_s:
        raise Refused(Fault.NOT_COMMISSIONED, f"{reading.meter} is commissioned from {device.commissioned_s} on")
    # A meter that does not know its energy has said so.
    if reading.quality is Quality.MISSING:
        raise Refused(Fault.QUALITY, f"{reading.meter} has no value for the interval at {reading.start_s}")
    # A meter that counts ten times what its plant can make is set to the wrong unit.
    if reading.energy_wh > _limit_wh(step, device):
        raise Refused(
            Fault.ABOVE_CAPACITY,
            f"{reading.energy_wh} Wh in one interval is above the capacity of {reading.meter}, {device.capacity_w} W",
        )
    broker = responsible_broker(step.overlay, reading.meter, reading.start_s)
    clock_s = 0 if broker is None else clock_of(step.overlay, broker)
    require_serving(step.overlay, opened.key_id, reading.start_s, clock_s)
    return reading, device, is_settled(step.charter, reading.start_s, clock_s)


def _limit_wh(step: Step, device: DeviceRow) -> int:
    """What the device can make in an interval: W x s / 3600 x 1.1; a tenth for tolerances of meter and name plate."""
    return min(device.capacity_w * step.charter.calendar.interval_s * 11 // 36_000, MAX_INTEGER)


# --- What is on record


def _metered_key(reading: Reading) -> Key:
    return (METERED, reading.start_s, reading.meter, int(reading.carrier))


def _metered(step: Step, reading: Reading) -> MeteredRow:
    row: MeteredRow | None = step.overlay.get(_metered_key(reading))
    if row is not None:
        return row
    asset: AssetRow | None = step.overlay.get(asset_key(AssetId(reading.meter, reading.carrier, reading.start_s, 0)))
    energy_wh = 0 if asset is None else asset.issued_wh
    return MeteredRow(0, energy_wh, energy_wh, energy_wh)


def _carried(step: Step, reading: Reading) -> int:
    row: CarryRow | None = step.overlay.get((CARRY, reading.meter, int(reading.carrier)))
    return 0 if row is None else row.energy_wh


def _put_carried(step: Step, reading: Reading, energy_wh: int) -> None:
    if energy_wh != _carried(step, reading):
        step.overlay.put((CARRY, reading.meter, int(reading.carrier)), CarryRow(energy_wh) if energy_wh else None)


def _put_new_asset(step: Step, asset: AssetId, device: DeviceRow, from_wh: int, to_wh: int) -> None:
    held = (Held(from_wh, to_wh, device.owner),)
    put_asset(step, asset, None, AssetRow(device.source, device.area, to_wh - from_wh, 0, 0, 0, held, 0))


# --- Withdrawing


def _withdraw(step: Step, reading: Reading, owner: str, last_revision: int, wanted_wh: int) -> int:
    """Take up to `wanted_wh` back: from the device's owner, then from other holders, then what is delivered.

    Each time the newest first, and of a slice the highest Wh first. Returns the Wh withdrawn.
    """
    assets: list[tuple[AssetId, AssetRow]] = []
    for revision in range(last_revision, -1, -1):
        asset = AssetId(reading.meter, reading.carrier, reading.start_s, revision)
        row: AssetRow | None = step.overlay.get(asset_key(asset))
        if row is not None:
            assets.append((asset, row))
    changed = dict(assets)
    left_wh = wanted_wh
    for of_owner in (True, False):
        for asset, row in changed.items():
            held, cut_wh = _cut_held(row.held, owner, of_owner, left_wh)
            changed[asset] = row._replace(held=held, withdrawn_wh=row.withdrawn_wh + cut_wh)
            left_wh -= cut_wh
    rows_left, searches_left = MAX_WITHDRAWN_SLICES, MAX_SEARCHED_DELIVERIES
    for asset, row in changed.items():
        if not left_wh or not row.delivered_wh or row.deliveries > searches_left:
            continue
        searches_left -= row.deliveries
        cut_wh, rows = _cut_delivered(step, asset, row, left_wh, rows_left)
        changed[asset] = row._replace(delivered_wh=row.delivered_wh - cut_wh, withdrawn_wh=row.withdrawn_wh + cut_wh)
        left_wh -= cut_wh
        rows_left -= rows
    for asset, before in assets:
        if changed[asset] != before:
            put_asset(step, asset, before, changed[asset])
    return wanted_wh - left_wh


def _cut_held(held: tuple[Held, ...], owner: str, of_owner: bool, wanted_wh: int) -> tuple[tuple[Held, ...], int]:
    """The slices without up to `wanted_wh` of what the owner holds, or of what others hold; and the Wh cut off."""
    kept: list[Held] = []
    left_wh = wanted_wh
    for item in reversed(held):
        cut_wh = min(left_wh, item.to_wh - item.from_wh) if (item.owner == owner) == of_owner else 0
        left_wh -= cut_wh
        if item.from_wh < item.to_wh - cut_wh:
            kept.append(Held(item.from_wh, item.to_wh - cut_wh, item.owner))
    return tuple(reversed(kept)), wanted_wh - left_wh


def _cut_delivered(step: Step, asset: AssetId, row: AssetRow, wanted_wh: int, most_rows: int) -> tuple[int, int]:
    """Take up to `wanted_wh` out of the newest deliveries; their demands are open again. Returns Wh and rows."""
    overlay = step.overlay
    step.searched += row.deliveries
    # All nodes do this work within one step of consensus.
    if step.searched > MAX_SEARCHED_BY_BATCH:
        raise Refused(Fault.TOO_MUCH_SEARCHED, "this batch corrects too much that is delivered; submit two")
    prefix = (SLICE, *asset_key(asset)[1:])
    found: list[tuple[SliceRow, Key]] = [
        (overlay.get(key), key) for key in list(overlay.scan(prefix, 0, MAX_INTEGER + 1))
    ]
    found.sort(key=lambda entry: entry[0].sequence, reverse=True)
    left_wh, rows = wanted_wh, 0
    for item, key in found[:most_rows]:
        if not left_wh:
            break
        from_wh = key[5]
        cut_wh = min(left_wh, item.to_wh - from_wh)
        left_wh -= cut_wh
        rows += 1
        kept = item._replace(to_wh=item.to_wh - cut_wh)
        overlay.put(key, kept if from_wh < kept.to_wh else None)
        demand_key = (DEMAND, item.demand_start_s, item.pseudonym)
        demand: DemandRow = overlay.get(demand_key)
        overlay.put(demand_key, demand._replace(delivered_wh=demand.delivered_wh - cut_wh))
    return wanted_wh - left_wh, rows
