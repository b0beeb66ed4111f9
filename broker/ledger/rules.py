"""The ledger's rules: the only place where ledger state changes. Pure; every engine and the verifier call it.

`apply_batch` applies an opened batch to an overlay. Each guard is one `if` that raises with a Fault of its own, and the
comment above it says why it is there. A refused batch has changed nothing, because the caller drops the overlay.

The invariant behind it all, for every asset and for every source and interval, checked after each batch:
issued = held + delivered + withdrawn + expired.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from broker.ledger.faults import Fault, LedgerInvariantBroken, RuleViolation
from broker.ledger.limits import MAX_HELD_SLICES
from broker.ledger.opening import Charter, OpenedBatch, meter_signer, open_statement, party_signer
from broker.ledger.operations import (
    Admit,
    AssetId,
    Close,
    Deliver,
    DeliveredSlice,
    EndMandate,
    Issue,
    MandateOp,
    Register,
    Transfer,
    Void,
    Window,
)
from broker.ledger.state import (
    APPLIED,
    ASSET,
    CLOCK,
    CLOSED,
    DEMAND,
    DEVICE,
    KEY,
    KEY_OF_DEVICE,
    KEY_OF_PARTY,
    MANDATES,
    ORDER,
    OWNED,
    PARTY,
    SLICE,
    TOTAL,
    AppliedRow,
    AssetRow,
    ClockRow,
    ClosedRow,
    DemandRow,
    DeviceRow,
    Held,
    Key,
    KeyRow,
    MandateSpan,
    MandatesRow,
    OrderRow,
    Overlay,
    OwnedRow,
    PartyRow,
    SliceRow,
    State,
    TotalRow,
    asset_key,
)
from broker.protocol.errors import ProtocolError
from broker.protocol.keys import PublicKey, public_key_from_cose
from broker.protocol.messages import (
    Admission,
    EndOfMandate,
    Mandate,
    Order,
    Quality,
    Reading,
    Registration,
    Role,
)

_DAY_S: Final = 86_400


class _Refused(Exception):
    """Raised by the guards below; apply_batch adds the operation's index."""

    def __init__(self, code: Fault, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


@dataclass(frozen=True, slots=True)
class _Step:
    """What every rule may look at: the overlay, the charter, and the broker whose batch this is."""

    overlay: Overlay
    charter: Charter
    submitter: str


def apply_batch(overlay: Overlay, charter: Charter, batch: OpenedBatch) -> None:
    """Apply a whole batch, or raise RuleViolation; the caller then drops the overlay.

    Raises LedgerInvariantBroken if the books do not balance afterwards.
    """
    step = _Step(overlay, charter, batch.sender)
    clock_s = _clock(overlay, batch.sender)
    # The submitter itself set this limit in market time, so that a batch which was lost for long does no late harm.
    if batch.not_after_s <= clock_s:
        _refuse(None, Fault.EXPIRED, f"not_after_s {batch.not_after_s} is past: {batch.sender} closed up to {clock_s}")
    applied_key = (APPLIED, batch.sender, batch.not_after_s, batch.batch_id)
    # Resends are normal; the second copy must change nothing.
    if overlay.get(applied_key) is not None:
        _refuse(None, Fault.ALREADY_APPLIED, "this batch has been applied before; look for its block")

    # A broker's first batch begins with its own registration, so there the sender is judged after the first operation.
    introduces = isinstance(batch.operations[0], Register)
    if not introduces:
        _require_broker(step, batch)
    for index, operation in enumerate(batch.operations):
        try:
            _RULES[type(operation)](step, operation)
        except _Refused as refused:
            raise RuleViolation(index, refused.code, refused.reason) from None
        except ProtocolError as error:
            # A statement inside that is malformed, of an unknown key, or badly signed; the text says which.
            raise RuleViolation(index, Fault.STATEMENT, str(error)) from error
        if introduces and index == 0:
            _require_broker(step, batch)

    # What is past its limit at the end of this very batch is refused as expired from now on and need not be kept.
    if batch.not_after_s > _clock(overlay, batch.sender):
        overlay.put(applied_key, AppliedRow())
    _check_books(overlay)


def keys_read(batch: OpenedBatch) -> list[Key]:
    """The keys of rows that are likely cold when this batch is applied, for a store to read in one go."""
    return [(DEMAND, item.start_s, item.pseudonym) for item in batch.operations if isinstance(item, Deliver)]


def _refuse(index: int | None, code: Fault, reason: str) -> NoReturn:
    raise RuleViolation(index, code, reason)


def _require_broker(step: _Step, batch: OpenedBatch) -> None:
    party: PartyRow | None = step.overlay.get((PARTY, batch.sender))
    # Only admitted brokers write; with the key that is registered now, whatever was when the batch came in.
    if party is None or party.role != Role.BROKER or party.cose_key != batch.sender_key:
        _refuse(None, Fault.NOT_A_BROKER, f"{batch.sender} is not registered as a broker with this key")


def _clock(state: State, broker: str) -> int:
    """The broker's market clock: the end of the last interval that it closed, 0 before the first."""
    row: ClockRow | None = state.get((CLOCK, broker))
    return 0 if row is None else row.time_s


def _check_books(overlay: Overlay) -> None:
    for key, row in overlay.written.items():
        if key[0] == ASSET and isinstance(row, AssetRow):
            held_wh = sum([held.to_wh - held.from_wh for held in row.held])
            if row.issued_wh != held_wh + row.delivered_wh + row.withdrawn_wh + row.expired_wh:
                raise LedgerInvariantBroken(key, row)
        elif key[0] == TOTAL and isinstance(row, TotalRow):
            gone_wh = row.delivered_wh + row.withdrawn_wh + row.expired_wh
            if row.issued_wh != row.held_wh + gone_wh or min(row) < 0:
                raise LedgerInvariantBroken(key, row)


# --- Parties and devices


def _register(step: _Step, operation: Register) -> None:
    statement, _ = open_statement(operation.statement, step.charter, step.charter.registrars.get, Registration)
    key = public_key_from_cose(statement.key)
    # Who admits must not trade: a registrar could otherwise admit devices to its own advantage.
    if statement.party in step.charter.registrar_names or key.key_id in step.charter.registrars:
        raise _Refused(Fault.REGISTRAR_AS_PARTY, f"{statement.party} is a registrar and cannot be a party")
    row = PartyRow(int(statement.role), key.cose_key)
    known: PartyRow | None = step.overlay.get((PARTY, statement.party))
    if known == row:
        return  # Said twice: nothing to change, and no reason to refuse what comes with it.
    # A name stands for one party and key; changing the key is an operation of its own.
    if known is not None:
        raise _Refused(Fault.NAME_TAKEN, f"{statement.party} is registered already, with another key or role")
    _claim_key(step, key, KEY_OF_PARTY, statement.party)
    step.overlay.put((PARTY, statement.party), row)


def _admit(step: _Step, operation: Admit) -> None:
    statement, _ = open_statement(operation.statement, step.charter, step.charter.registrars.get, Admission)
    key = public_key_from_cose(statement.meter_key)
    row = DeviceRow(
        statement.owner,
        key.cose_key,
        int(statement.source),
        int(statement.carrier),
        statement.capacity_w,
        statement.area,
        statement.place,
        statement.commissioned_s,
    )
    known: DeviceRow | None = step.overlay.get((DEVICE, statement.device))
    if known == row:
        return
    # A device's data are behind assets that exist; they do not change under the same name.
    if known is not None:
        raise _Refused(Fault.DEVICE_TAKEN, f"{statement.device} is admitted already, with other data")
    # Assets are issued to the owner, and mandates need the owner's key.
    if step.overlay.get((PARTY, statement.owner)) is None:
        raise _Refused(Fault.UNKNOWN_OWNER, f"register {statement.owner} before admitting its devices")
    # A typo here would make assets that no demand can ever be given.
    if statement.area not in step.charter.areas:
        raise _Refused(Fault.UNKNOWN_AREA, f"area {statement.area} is not one of {sorted(step.charter.areas)}")
    _claim_key(step, key, KEY_OF_DEVICE, statement.device)
    step.overlay.put((DEVICE, statement.device), row)


def _claim_key(step: _Step, key: PublicKey, holder: int, name: str) -> None:
    # A key tells who signed; with two holders it would tell nothing. Registrars' keys count as taken.
    if step.overlay.get((KEY, key.key_id)) is not None or key.key_id in step.charter.registrars:
        raise _Refused(Fault.KEY_TAKEN, f"the key of {name} is in use already; every party and meter needs its own")
    step.overlay.put((KEY, key.key_id), KeyRow(holder, name, key.cose_key))


# --- Mandates


def _mandate(step: _Step, operation: MandateOp) -> None:
    statement, opened = open_statement(
        operation.statement, step.charter, lambda key: party_signer(step.overlay, key), Mandate
    )
    _require_owner(step, opened.sender, statement.owner, statement.device)
    broker: PartyRow | None = step.overlay.get((PARTY, statement.broker))
    # A mandate for somebody who cannot submit would lock the device out.
    if broker is None or broker.role != Role.BROKER:
        raise _Refused(Fault.MANDATE_BROKER, f"{statement.broker} is not a registered broker")
    _require_boundary(step, statement.from_s)
    span = MandateSpan(statement.broker, statement.from_s, None)
    spans = _mandates(step.overlay, statement.device)
    if span in spans:
        return
    # Exclusive per device: two brokers that may both take the same asset would race for it.
    if spans and (spans[-1].end_s is None or spans[-1].end_s > statement.from_s):
        raise _Refused(
            Fault.MANDATE_EXCLUSIVE,
            f"{statement.device} is mandated to {spans[-1].broker} from {spans[-1].from_s}; end that mandate first",
        )
    step.overlay.put((MANDATES, statement.device), MandatesRow((*spans, span)))


def _end_mandate(step: _Step, operation: EndMandate) -> None:
    statement, opened = open_statement(
        operation.statement, step.charter, lambda key: party_signer(step.overlay, key), EndOfMandate
    )
    _require_owner(step, opened.sender, statement.owner, statement.device)
    _require_boundary(step, statement.end_s)
    spans = _mandates(step.overlay, statement.device)
    # An end without a beginning is a mistake that the owner should hear of.
    if not spans or spans[-1].from_s >= statement.end_s:
        raise _Refused(Fault.NO_MANDATE, f"{statement.device} has no mandate that began before {statement.end_s}")
    last = spans[-1]
    if last.end_s == statement.end_s:
        return
    # What was promised to the next broker from that boundary on must hold.
    if last.end_s is not None:
        raise _Refused(Fault.MANDATE_ENDED, f"the mandate of {statement.device} ends at {last.end_s} already")
    # The broker has closed those intervals trusting in the mandate; it ends at a boundary still to come.
    if statement.end_s < _clock(step.overlay, last.broker):
        raise _Refused(Fault.MANDATE_PAST, f"{last.broker} has closed intervals after {statement.end_s} already")
    ended = MandateSpan(last.broker, last.from_s, statement.end_s)
    step.overlay.put((MANDATES, statement.device), MandatesRow((*spans[:-1], ended)))


def _require_owner(step: _Step, signer: str, owner: str, device: str) -> None:
    row: DeviceRow | None = step.overlay.get((DEVICE, device))
    # Nobody but the owner disposes of a device, whatever name the statement carries.
    if row is None or row.owner != owner or signer != owner:
        raise _Refused(Fault.NOT_THE_OWNER, f"{device} is no admitted device of {signer}")


def _require_boundary(step: _Step, time_s: int) -> None:
    # Mandates are judged by production interval, so they begin and end between two of them.
    if time_s % step.charter.calendar.interval_s:
        raise _Refused(Fault.MANDATE_BOUNDARY, f"{time_s} is no boundary of market intervals")


def _mandates(state: State, device: str) -> tuple[MandateSpan, ...]:
    row: MandatesRow | None = state.get((MANDATES, device))
    return () if row is None else row.spans


# --- Issue


def _issue(step: _Step, operation: Issue) -> None:
    # Every node checks the meter's signature here, so no broker can make energy up.
    reading, opened = open_statement(
        operation.statement, step.charter, lambda key: meter_signer(step.overlay, key), Reading
    )
    device: DeviceRow | None = step.overlay.get((DEVICE, reading.meter))
    # A meter speaks for its own device only.
    if device is None or opened.sender != reading.meter:
        raise _Refused(Fault.UNKNOWN_DEVICE, f"{opened.sender} reports for {reading.meter}, which is not its device")
    # One carrier's energy must not be sold as another's.
    if reading.carrier != device.carrier:
        raise _Refused(Fault.CARRIER, f"{reading.meter} is not admitted for {reading.carrier.name.lower()}")
    # Market intervals never overlap, so neither do a device's assets.
    if not step.charter.calendar.is_interval(reading.start_s, reading.end_s):
        raise _Refused(
            Fault.READING_INTERVAL, f"[{reading.start_s}, {reading.end_s}) is no market interval of this ledger"
        )
    # Corrections will be an operation of their own, with rules for what has been delivered already.
    if reading.revision != 0:
        raise _Refused(Fault.REVISION, f"revision {reading.revision} of a reading is a correction, not an issue")
    # A meter that does not know its energy has said so.
    if reading.quality is Quality.MISSING:
        raise _Refused(Fault.QUALITY, f"{reading.meter} has no value for the interval at {reading.start_s}")
    # An asset of nothing could never be moved; the broker leaves such readings out.
    if reading.energy_wh == 0:
        raise _Refused(Fault.NOTHING_TO_ISSUE, f"{reading.meter} made 0 Wh in the interval at {reading.start_s}")
    # Wh <= W x s / 3600 x 1.1, in integers. A tenth for the tolerance of meters and name plates.
    if reading.energy_wh * 36_000 > device.capacity_w * step.charter.calendar.interval_s * 11:
        raise _Refused(
            Fault.ABOVE_CAPACITY,
            f"{reading.energy_wh} Wh in one interval is above the capacity of {reading.meter}, {device.capacity_w} W",
        )
    asset = AssetId(reading.meter, reading.carrier, reading.start_s, reading.revision)
    # One issue per device, carrier, interval and revision, whoever submits it.
    if step.overlay.get(asset_key(asset)) is not None:
        raise _Refused(Fault.ISSUED_BEFORE, f"{reading.meter} has its asset for the interval at {reading.start_s}")
    energy_wh = reading.energy_wh
    held = (Held(0, energy_wh, device.owner),)
    step.overlay.put(asset_key(asset), AssetRow(device.source, device.area, energy_wh, 0, 0, 0, held))
    step.overlay.put(_owned_key(device.owner, asset), OwnedRow(device.source))
    total = _total(step.overlay, asset.start_s, device.source)
    step.overlay.put(
        (TOTAL, asset.start_s, device.source),
        total._replace(issued_wh=total.issued_wh + energy_wh, held_wh=total.held_wh + energy_wh),
    )


# --- Transfer


def _transfer(step: _Step, operation: Transfer) -> None:
    overlay, asset = step.overlay, operation.asset
    key = asset_key(asset)
    row: AssetRow | None = overlay.get(key)
    if row is None:
        raise _unknown_asset(asset)
    # Owners are names on the ledger; a slice given to nobody would be lost.
    receiver: PartyRow | None = overlay.get((PARTY, operation.receiver))
    if receiver is None:
        raise _Refused(Fault.UNKNOWN_RECEIVER, f"{operation.receiver} is not registered")
    # It would change nothing and yet stand in the books as trade.
    if operation.receiver == operation.sender:
        raise _Refused(Fault.TO_ITSELF, f"{operation.sender} cannot transfer to itself")
    if operation.sender != step.submitter:
        _require_mandate(step, operation)
    left = _taken(row, asset, operation.sender, operation.from_wh, operation.to_wh)
    if receiver.role == Role.BROKER and operation.receiver != step.submitter:
        _use_order(step, operation, row.source)
    # An order where none is needed would be counted by nobody.
    elif operation.order is not None:
        raise _Refused(Fault.ORDER_NOT_NEEDED, "only a transfer to a neighbour broker carries an order")
    held = _given(left, Held(operation.from_wh, operation.to_wh, operation.receiver))
    overlay.put(key, row._replace(held=held))
    if not _holds(row.held, operation.receiver):
        overlay.put(_owned_key(operation.receiver, asset), OwnedRow(row.source))
    if not _holds(held, operation.sender):
        overlay.put(_owned_key(operation.sender, asset), None)


def _require_mandate(step: _Step, operation: Transfer) -> None:
    asset = operation.asset
    device: DeviceRow | None = step.overlay.get((DEVICE, asset.device))
    # A mandate covers what its giver owns as the device's owner, in the production intervals that it names.
    if (
        device is None
        or device.owner != operation.sender
        or not any(
            span.broker == step.submitter
            and span.from_s <= asset.start_s
            and (span.end_s is None or asset.start_s < span.end_s)
            for span in _mandates(step.overlay, asset.device)
        )
    ):
        raise _Refused(
            Fault.NOT_MANDATED,
            f"{step.submitter} holds no mandate of {operation.sender} for {asset.device} at {asset.start_s}",
        )
    # The owner let this broker take ownership, not give the asset to others behind its back.
    if operation.receiver != step.submitter:
        raise _Refused(Fault.MANDATE_TAKES_ONLY, f"under a mandate {step.submitter} transfers to itself only")


def _use_order(step: _Step, operation: Transfer, source: int) -> None:
    """Check the receiver's order and count the transfer against it."""
    overlay, receiver, asset = step.overlay, operation.receiver, operation.asset
    # Nobody is made to take, and pay for, what they did not ask for.
    if operation.order is None:
        raise _Refused(Fault.ORDER_MISSING, f"a transfer to {receiver} needs its signed order inside")
    try:
        order, opened = open_statement(operation.order, step.charter, lambda key: party_signer(overlay, key), Order)
    # The order must be genuine, and signed for this very ledger: the ledger id is part of what is signed.
    except ProtocolError as error:
        raise _Refused(Fault.ORDER_STATEMENT, f"order: {error}") from error
    # Only the receiver itself can ask on its behalf.
    if opened.sender != receiver or order.requester != receiver:
        raise _Refused(Fault.ORDER_REQUESTER, f"the order is of {order.requester}, not of {receiver}")
    # An order is firm towards one supplier: the last broker of its path.
    if order.path[-1] != step.submitter:
        raise _Refused(Fault.ORDER_SUPPLIER, f"the order asks {order.path[-1]}, not {step.submitter}")
    # Source, interval and price are what was asked for.
    if order.source != source:
        raise _Refused(Fault.ORDER_SOURCE, f"the order asks for {order.source.label}")
    if not step.charter.calendar.is_interval(order.start_s, order.end_s) or order.start_s != asset.start_s:
        raise _Refused(Fault.ORDER_INTERVAL, f"the order asks for [{order.start_s}, {order.end_s})")
    if operation.price > order.highest_price:
        raise _Refused(Fault.ORDER_PRICE, f"price {operation.price} is above the order's {order.highest_price}")
    # After its close the requester has put the rest on record as unmatched and would pay for nothing.
    if overlay.get((CLOSED, receiver, order.start_s)) is not None:
        raise _Refused(Fault.ORDER_CLOSED, f"{receiver} has closed the interval at {order.start_s}")
    # The requester's own limit, in its market time.
    if order.not_after_s <= _clock(overlay, receiver):
        raise _Refused(Fault.ORDER_EXPIRED, f"the order was good until {order.not_after_s}")
    key = (ORDER, receiver, order.order_id)
    used: OrderRow = overlay.get(key) or OrderRow(opened.message_id, 0, False)
    # Given up by the requester, who may have asked somebody else for the same Wh since.
    if used.voided:
        raise _Refused(Fault.ORDER_VOID, f"{receiver} has given up this order")
    # Else a second order under the same id would double what may be delivered under it.
    if used.content != opened.message_id:
        raise _Refused(Fault.ORDER_CONTENT, "another order with this id has been used")
    used_wh = used.used_wh + operation.to_wh - operation.from_wh
    if used_wh > order.energy_wh:
        raise _Refused(Fault.ORDER_EXCEEDED, f"{used_wh} Wh exceed the order's {order.energy_wh} Wh")
    overlay.put(key, OrderRow(opened.message_id, used_wh, False))


def _void(step: _Step, operation: Void) -> None:
    # The row's key holds the submitter's name, so nobody can void an order but its requester.
    key = (ORDER, step.submitter, operation.order_id)
    used: OrderRow = step.overlay.get(key) or OrderRow(None, 0, False)
    step.overlay.put(key, OrderRow(used.content, used.used_wh, True))


# --- Deliver


def _deliver(step: _Step, operation: Deliver) -> None:
    overlay, submitter, start_s = step.overlay, step.submitter, operation.start_s
    # Consumption is settled by market interval.
    if not step.charter.calendar.is_interval(start_s, operation.end_s):
        raise _Refused(Fault.DEMAND_INTERVAL, f"[{start_s}, {operation.end_s}) is no market interval of this ledger")
    if operation.area not in step.charter.areas:
        raise _Refused(Fault.DEMAND_AREA, f"area {operation.area} is not one of {sorted(step.charter.areas)}")
    demand_key = (DEMAND, start_s, operation.pseudonym)
    demand: DemandRow | None = overlay.get(demand_key)
    delivered_wh = 0
    if demand is not None:
        # A pseudonym belongs to one consumer of one broker; others could only use up what is demanded.
        if demand.broker != submitter:
            raise _Refused(Fault.DEMAND_BROKER, f"this demand is served by {demand.broker}")
        # Else what is delivered could be raised to any amount afterwards.
        if demand.demanded_wh != operation.demanded_wh or demand.commitment != operation.commitment:
            raise _Refused(Fault.DEMAND_CHANGED, "the demand is on record with another amount or commitment")
        delivered_wh = demand.delivered_wh
    for item in operation.slices:
        delivered_wh += item.to_wh - item.from_wh
        asset = item.asset
        key = asset_key(asset)
        row: AssetRow | None = overlay.get(key)
        if row is None:
            raise _unknown_asset(asset)
        # How close in time generation must match consumption is the contract's promise.
        if asset.start_s != start_s and not _same_window(operation.window, asset.start_s, start_s):
            raise _Refused(
                Fault.OUTSIDE_WINDOW,
                f"generation at {asset.start_s} is outside the {operation.window.name.lower()} of {start_s}",
            )
        # Allocation between different areas is a known defect elsewhere: the energy could not have flowed.
        if row.area != operation.area:
            raise _Refused(Fault.OUTSIDE_AREA, f"{asset.device} feeds {row.area}, the demand is in {operation.area}")
        held = _taken(row, asset, submitter, item.from_wh, item.to_wh)
        _put_delivered(step, operation, item, key, row, held)
    # Nobody is given more than they used.
    if delivered_wh > operation.demanded_wh:
        raise _Refused(Fault.DEMAND_EXCEEDED, f"{delivered_wh} Wh exceed the demand of {operation.demanded_wh} Wh")
    overlay.put(demand_key, DemandRow(submitter, operation.demanded_wh, operation.commitment, delivered_wh))


def _put_delivered(
    step: _Step, operation: Deliver, item: DeliveredSlice, key: Key, row: AssetRow, held: tuple[Held, ...]
) -> None:
    overlay, asset, energy_wh = step.overlay, item.asset, item.to_wh - item.from_wh
    delivered_wh = row.delivered_wh + energy_wh
    overlay.put(
        key, AssetRow(row.source, row.area, row.issued_wh, delivered_wh, row.withdrawn_wh, row.expired_wh, held)
    )
    delivered = SliceRow(item.to_wh, step.submitter, operation.pseudonym, operation.start_s, item.line)
    # What was held until now has no row as a delivered slice.
    overlay.create((SLICE, *key[1:], item.from_wh), delivered)
    if not _holds(held, step.submitter):
        overlay.put(_owned_key(step.submitter, asset), None)
    total = _total(overlay, asset.start_s, row.source)
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


def _same_window(window: Window, one_s: int, other_s: int) -> bool:
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


# --- Close


def _close(step: _Step, operation: Close) -> None:
    overlay, broker = step.overlay, step.submitter
    # A broker's market clock runs in market intervals.
    if not step.charter.calendar.is_interval(operation.start_s, operation.end_s):
        raise _Refused(Fault.CLOSE_INTERVAL, f"[{operation.start_s}, {operation.end_s}) is no market interval")
    key = (CLOSED, broker, operation.start_s)
    before: ClosedRow | None = overlay.get(key)
    # Each revision follows the one before, so that none is missing from the record.
    if operation.revision != (0 if before is None else before.revision + 1):
        raise _Refused(
            Fault.CLOSE_REVISION,
            f"revision {operation.revision} of the close at {operation.start_s} does not follow what is on record",
        )
    if before is None:
        clock_s = _clock(overlay, broker)
        # Intervals are closed in order; market time does not run backwards.
        if operation.end_s <= clock_s:
            raise _Refused(Fault.CLOSE_ORDER, f"{broker} has closed up to {clock_s} already")
        overlay.put((CLOCK, broker), ClockRow(operation.end_s))
        for old in list(overlay.scan((APPLIED, broker), 0, operation.end_s + 1)):
            overlay.put(old, None)
    # Late demands add; what was committed to does not disappear.
    elif operation.demands < before.demands or operation.demanded_wh < before.demanded_wh:
        raise _Refused(Fault.CLOSE_LOWERED, "a later revision of a close cannot lower demands or demanded_wh")
    overlay.put(key, ClosedRow(operation.revision, operation.demands, operation.demanded_wh, operation.root))


# --- Slices and totals


def _taken(row: AssetRow, asset: AssetId, owner: str, from_wh: int, to_wh: int) -> tuple[Held, ...]:
    """The held slices without `[from_wh, to_wh)`, which `owner` must hold."""
    # Slices of nothing, or of less, would move sums without moving Wh.
    if from_wh >= to_wh:
        raise _Refused(Fault.EMPTY_SLICE, f"[{from_wh}, {to_wh}) of {asset.device} is no range of Wh")
    for index, held in enumerate(row.held):
        if held.owner == owner and held.from_wh <= from_wh and to_wh <= held.to_wh:
            rest = []
            if held.from_wh < from_wh:
                rest.append(Held(held.from_wh, from_wh, owner))
            if to_wh < held.to_wh:
                rest.append(Held(to_wh, held.to_wh, owner))
            # Every later move of the asset searches these slices, so their number is bounded.
            if len(row.held) - 1 + len(rest) > MAX_HELD_SLICES:
                raise _Refused(Fault.TOO_MANY_SLICES, f"an asset is held in at most {MAX_HELD_SLICES} slices")
            return (*row.held[:index], *rest, *row.held[index + 1 :])
    # Held by somebody else, delivered already, or beyond the asset: it is not the owner's to move.
    raise _Refused(Fault.NOT_HELD, f"{owner} does not hold [{from_wh}, {to_wh}) of {asset.device} at {asset.start_s}")


def _given(held: tuple[Held, ...], new: Held) -> tuple[Held, ...]:
    """The held slices with `new` in its place, joined with its neighbours where they have the same owner."""
    joined: list[Held] = []
    for item in sorted((*held, new)):
        if joined and joined[-1].owner == item.owner and joined[-1].to_wh == item.from_wh:
            item = Held(joined.pop().from_wh, item.to_wh, item.owner)
        joined.append(item)
    return tuple(joined)


def _holds(slices: tuple[Held, ...], owner: str) -> bool:
    for held in slices:  # noqa: SIM110  # A generator takes three times as long, and deliveries ask this most.
        if held.owner == owner:
            return True
    return False


def _owned_key(owner: str, asset: AssetId) -> Key:
    return (OWNED, owner, asset.start_s, asset.device, int(asset.carrier), asset.revision)


def _total(state: State, start_s: int, source: int) -> TotalRow:
    row: TotalRow | None = state.get((TOTAL, start_s, source))
    return TotalRow(0, 0, 0, 0, 0) if row is None else row


def _unknown_asset(asset: AssetId) -> _Refused:
    # A slice of something that was never issued.
    return _Refused(Fault.UNKNOWN_ASSET, f"no asset of {asset.device} at {asset.start_s}, revision {asset.revision}")


_RULES: Final[Mapping[type, Callable[[_Step, Any], None]]] = {
    Register: _register,
    Admit: _admit,
    MandateOp: _mandate,
    EndMandate: _end_mandate,
    Issue: _issue,
    Transfer: _transfer,
    Deliver: _deliver,
    Close: _close,
    Void: _void,
}
