"""Who takes part, which devices there are, and who may take what they make. Pure."""

from broker.ledger.faults import Fault
from broker.ledger.opening import open_statement, party_signer
from broker.ledger.operations import Admit, EndMandate, MandateOp, Register
from broker.ledger.rules.keys import claim_key, is_key_of, require_serving
from broker.ledger.rules.step import Refused, Step, clock_of, mandates_of
from broker.ledger.state import DEVICE, MANDATES, PARTY, DeviceRow, MandateSpan, MandatesRow, PartyRow
from broker.protocol.keys import public_key_from_cose
from broker.protocol.messages import Admission, EndOfMandate, KeyHolder, Mandate, Registration, Role


def register(step: Step, operation: Register) -> None:
    """A registrar admits a party with its key."""
    statement, _ = open_statement(operation.statement, step.charter, step.charter.registrars.get, Registration)
    key = public_key_from_cose(statement.key)
    # Who admits must not trade: a registrar could otherwise admit devices to its own advantage.
    if statement.party in step.charter.registrar_names or key.key_id in step.charter.registrars:
        raise Refused(Fault.REGISTRAR_AS_PARTY, f"{statement.party} is a registrar and cannot be a party")
    known: PartyRow | None = step.overlay.get((PARTY, statement.party))
    if (
        known is not None
        and known.role == statement.role
        and is_key_of(step.overlay, key.key_id, KeyHolder.PARTY, statement.party)
    ):
        return  # Said twice, perhaps of a key since rotated: nothing to change, no reason to refuse what comes with it.
    # A name stands for one party and key; changing the key is an operation of its own.
    if known is not None:
        raise Refused(Fault.NAME_TAKEN, f"{statement.party} is registered already, with another key or role")
    claim_key(step, key, KeyHolder.PARTY, statement.party)
    step.overlay.put((PARTY, statement.party), PartyRow(int(statement.role), key.cose_key))


def admit(step: Step, operation: Admit) -> None:
    """A registrar admits a device with its meter's key."""
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
    if (
        known is not None
        and known._replace(meter_key=row.meter_key) == row
        and is_key_of(step.overlay, key.key_id, KeyHolder.DEVICE, statement.device)
    ):
        return
    # A device's data are behind assets that exist; they do not change under the same name.
    if known is not None:
        raise Refused(Fault.DEVICE_TAKEN, f"{statement.device} is admitted already, with other data")
    # Assets are issued to the owner, and mandates need the owner's key.
    if step.overlay.get((PARTY, statement.owner)) is None:
        raise Refused(Fault.UNKNOWN_OWNER, f"register {statement.owner} before admitting its devices")
    # A typo here would make assets that no demand can ever be given.
    if statement.area not in step.charter.areas:
        raise Refused(Fault.UNKNOWN_AREA, f"area {statement.area} is not one of {sorted(step.charter.areas)}")
    claim_key(step, key, KeyHolder.DEVICE, statement.device)
    step.overlay.put((DEVICE, statement.device), row)


def mandate(step: Step, operation: MandateOp) -> None:
    """An owner lets one broker take what a device makes from a boundary on."""
    statement, opened = open_statement(
        operation.statement, step.charter, lambda key: party_signer(step.overlay, key), Mandate
    )
    _require_owner(step, opened.sender, statement.owner, statement.device)
    broker: PartyRow | None = step.overlay.get((PARTY, statement.broker))
    # A mandate for somebody who cannot submit would lock the device out.
    if broker is None or broker.role != Role.BROKER:
        raise Refused(Fault.MANDATE_BROKER, f"{statement.broker} is not a registered broker")
    _require_boundary(step, statement.from_s)
    spans = mandates_of(step.overlay, statement.device)
    if any((span.broker, span.from_s) == (statement.broker, statement.from_s) for span in spans):
        return  # Said twice, perhaps after its end.
    require_serving(step.overlay, opened.key_id, statement.from_s, clock_of(step.overlay, statement.owner))
    # Exclusive per device: two brokers that may both take the same asset would race for it.
    if spans and (spans[-1].end_s is None or spans[-1].end_s > statement.from_s):
        raise Refused(
            Fault.MANDATE_EXCLUSIVE,
            f"{statement.device} is mandated to {spans[-1].broker} from {spans[-1].from_s}; end that mandate first",
        )
    span = MandateSpan(statement.broker, statement.from_s, None)
    step.overlay.put((MANDATES, statement.device), MandatesRow((*spans, span)))


def end_mandate(step: Step, operation: EndMandate) -> None:
    """An owner ends the device's last mandate at a boundary to come."""
    statement, opened = open_statement(
        operation.statement, step.charter, lambda key: party_signer(step.overlay, key), EndOfMandate
    )
    _require_owner(step, opened.sender, statement.owner, statement.device)
    _require_boundary(step, statement.end_s)
    spans = mandates_of(step.overlay, statement.device)
    if any(span.end_s == statement.end_s for span in spans):
        return  # Said twice, perhaps after the next mandate began.
    # An end without a beginning is a mistake that the owner should hear of.
    if not spans or spans[-1].from_s >= statement.end_s:
        raise Refused(Fault.NO_MANDATE, f"{statement.device} has no mandate that began before {statement.end_s}")
    last = spans[-1]
    # What was promised to the next broker from that boundary on must hold.
    if last.end_s is not None:
        raise Refused(Fault.MANDATE_ENDED, f"the mandate of {statement.device} ends at {last.end_s} already")
    # The broker has closed those intervals trusting in the mandate; it ends at a boundary still to come.
    if statement.end_s < clock_of(step.overlay, last.broker):
        raise Refused(Fault.MANDATE_PAST, f"{last.broker} has closed intervals after {statement.end_s} already")
    require_serving(step.overlay, opened.key_id, statement.end_s, clock_of(step.overlay, statement.owner))
    ended = MandateSpan(last.broker, last.from_s, statement.end_s)
    step.overlay.put((MANDATES, statement.device), MandatesRow((*spans[:-1], ended)))


def _require_owner(step: Step, signer: str, owner: str, device: str) -> None:
    row: DeviceRow | None = step.overlay.get((DEVICE, device))
    # Nobody but the owner disposes of a device, whatever name the statement carries.
    if row is None or row.owner != owner or signer != owner:
        raise Refused(Fault.NOT_THE_OWNER, f"{device} is no admitted device of {signer}")


def _require_boundary(step: Step, time_s: int) -> None:
    # Mandates are judged by production interval, so they begin and end between two of them.
    if time_s % step.charter.calendar.interval_s:
        raise Refused(Fault.MANDATE_BOUNDARY, f"{time_s} is no boundary of market intervals")
