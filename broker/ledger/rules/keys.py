"""Keys: whose they are, how one gives way to another, and how one is given up. Pure.

A holder (a party, or a device with its meter) has one current key. `rotate_key` puts a new one in its place, which
serves at once and for every interval. The old one goes on serving what is under way:

- a statement of an interval (reading, order, mandate) that begins before `from_s`, until the market clock that it is
  judged by reaches `grace_until_s`: for a reading that of the responsible broker, for a party its own. A provider has
  no market clock, so for its statements there is no such end.
- a broker's batches until its own clock reaches `grace_until_s`, so that those under way at the change arrive. A party
  without a market clock signs batches with its current key only.

`revoke_key` ends all of that: from then on the key is as good as unknown.
"""

from broker.ledger.faults import Fault
from broker.ledger.opening import Charter, open_statement
from broker.ledger.operations import RevokeKey, RotateKey
from broker.ledger.rules.step import Refused, Step
from broker.ledger.state import DEVICE, KEY, PARTY, DeviceRow, KeyRow, PartyRow, State
from broker.protocol.envelope import Signer
from broker.protocol.keys import PublicKey, public_key_from_cose
from broker.protocol.messages import KeyHolder, KeyRevocation, KeyRotation


def claim_key(step: Step, key: PublicKey, holder: KeyHolder, name: str) -> None:
    """Make this the key of that holder; nobody may have it yet."""
    # A key tells who signed; with two holders it would tell nothing. Registrars' keys count as taken.
    if step.overlay.get((KEY, key.key_id)) is not None or key.key_id in step.charter.registrars:
        raise Refused(Fault.KEY_TAKEN, f"the key of {name} is in use already; every party and meter needs its own")
    step.overlay.put((KEY, key.key_id), KeyRow(int(holder), name, key.cose_key, None, None, False))


def is_key_of(state: State, key_id: bytes, holder: KeyHolder, name: str) -> bool:
    """True if this is, or was, a key of that holder."""
    row: KeyRow | None = state.get((KEY, key_id))
    return row is not None and row.holder == holder and row.name == name


def require_serving(state: State, key_id: bytes, start_s: int, clock_s: int) -> None:
    """The key may speak for the interval that begins at `start_s`, by a market clock that shows `clock_s`."""
    row: KeyRow = state.get((KEY, key_id))
    retired_from_s, grace_until_s = row.retired_from_s, row.grace_until_s
    # After its time a key may lie in a drawer or on a scrapped meter, where nobody watches over it.
    if (
        retired_from_s is not None
        and grace_until_s is not None
        and (start_s >= retired_from_s or clock_s >= grace_until_s)
    ):
        raise Refused(
            Fault.KEY_RETIRED,
            f"this key of {row.name} served for intervals before {retired_from_s}, until {grace_until_s}",
        )


def rotate_key(step: Step, operation: RotateKey) -> None:
    """A holder's current key gives way to a new one."""
    overlay = step.overlay
    statement, opened = open_statement(
        operation.statement, step.charter, lambda key: _signer(overlay, step.charter, key), KeyRotation
    )
    current = _current_key(overlay, statement.holder, statement.name)
    new = public_key_from_cose(statement.new_key)
    old: KeyRow | None = overlay.get((KEY, statement.old_key_id))
    if (
        old is not None
        and (old.retired_from_s, old.grace_until_s) == (statement.from_s, statement.grace_until_s)
        and is_key_of(overlay, statement.old_key_id, statement.holder, statement.name)
        and is_key_of(overlay, new.key_id, statement.holder, statement.name)
    ):
        return
    # Two rotations of the same key would leave it open which one of the new keys speaks; and a holder that nobody
    # admitted has none.
    if old is None or statement.old_key_id != current:
        raise Refused(Fault.ROTATION_OF_OLD_KEY, f"this is not the current key of {statement.name}")
    # Nobody else puts a key into a holder's place.
    if opened.key_id != current and opened.key_id not in step.charter.registrars:
        raise Refused(Fault.ROTATION_SIGNER, f"only its own key or a registrar rotates a key of {statement.name}")
    # Every interval is one key's or the other's, and a grace that ends first would leave a gap.
    if statement.from_s % step.charter.calendar.interval_s or statement.grace_until_s < statement.from_s:
        raise Refused(
            Fault.ROTATION_TIMES, "from_s must be a boundary of market intervals, grace_until_s not before it"
        )
    claim_key(step, new, statement.holder, statement.name)
    overlay.put((KEY, current), old._replace(retired_from_s=statement.from_s, grace_until_s=statement.grace_until_s))
    if statement.holder is KeyHolder.PARTY:
        party: PartyRow = overlay.get((PARTY, statement.name))
        overlay.put((PARTY, statement.name), party._replace(cose_key=new.cose_key))
    else:
        device: DeviceRow = overlay.get((DEVICE, statement.name))
        overlay.put((DEVICE, statement.name), device._replace(meter_key=new.cose_key))


def revoke_key(step: Step, operation: RevokeKey) -> None:
    """A key counts for nothing from now on."""
    overlay = step.overlay
    # Revoked keys are looked up as well: the same revocation, sent again, must not be a fault.
    statement, opened = open_statement(
        operation.statement,
        step.charter,
        lambda key: _signer(overlay, step.charter, key, also_revoked=True),
        KeyRevocation,
    )
    row: KeyRow | None = overlay.get((KEY, statement.key_id))
    # Else a slip of the pen would end another holder's key.
    if row is None or not is_key_of(overlay, statement.key_id, statement.holder, statement.name):
        raise Refused(Fault.REVOCATION_KEY, f"{statement.name} has no key {statement.key_id.hex()}")
    # A stolen older key must not be able to end the current one, and neighbours end nobody's.
    if not (
        opened.key_id == statement.key_id
        or opened.key_id in step.charter.registrars
        or (
            opened.key_id == _current_key(overlay, statement.holder, statement.name)
            and not overlay.get((KEY, opened.key_id)).revoked
        )
    ):
        raise Refused(
            Fault.REVOCATION_SIGNER,
            f"only that key, the current key of {statement.name} or a registrar revokes a key of {statement.name}",
        )
    overlay.put((KEY, statement.key_id), row._replace(revoked=True))


def _current_key(state: State, holder: KeyHolder, name: str) -> bytes | None:
    """The id of the holder's current key, None if there is no such holder."""
    if holder is KeyHolder.PARTY:
        party: PartyRow | None = state.get((PARTY, name))
        return None if party is None else public_key_from_cose(party.cose_key).key_id
    device: DeviceRow | None = state.get((DEVICE, name))
    return None if device is None else public_key_from_cose(device.meter_key).key_id


def _signer(state: State, charter: Charter, key_id: bytes, also_revoked: bool = False) -> Signer | None:
    """Whoever has that key: a registrar, a party or a meter."""
    row: KeyRow | None = state.get((KEY, key_id))
    if row is None:
        return charter.registrars.get(key_id)
    if row.revoked and not also_revoked:
        return None
    return Signer(row.name, public_key_from_cose(row.cose_key))
