"""As what a device was admitted, and whose it is, as the ledger answers a query of kind DEVICE. Pure.

Contracts name providers, and an asset names its device only. A broker that follows the feed sees the admissions in it;
one that joined later, or loads its holdings at a start, asks about the devices whose energy it comes to hold. The
answer is what the registrar's admission says, but for the meter's key, which may have been rotated. It does not change
from one height to the next: a device's data stay as they are for ever (`rules.parties`).
"""

from dataclasses import dataclass
from typing import Final

from broker.ledger.state import DEVICE, DeviceRow, State
from broker.protocol import cbor
from broker.protocol.codec import Row
from broker.protocol.messages import Admission, Carrier
from broker.protocol.sources import Source

_MAX_BYTES: Final = 1_024
_ROW: Final = Row(tuple([field.codec for field in Admission.FIELDS if field.name != "meter_key"]))


@dataclass(frozen=True, slots=True)
class Admitted:
    """A device on the ledger: its `owner` is the provider of all that it makes."""

    device: str
    owner: str
    source: Source
    carrier: Carrier
    capacity_w: int
    area: str
    place: str
    commissioned_s: int

    def to_bytes(self) -> bytes:
        """`admitted` in schema/operations.cddl."""
        kind = [int(self.source), int(self.carrier), self.capacity_w]
        return cbor.encode([self.device, self.owner, *kind, self.area, self.place, self.commissioned_s])


def decode_admitted(raw: bytes) -> Admitted:
    """Raises MalformedMessage."""
    return Admitted(*_ROW.decode(cbor.decode(raw, "admitted", _MAX_BYTES), "admitted"))


def admitted_of(state: State, device: str) -> Admitted | None:
    """What the ledger has of this device. None: no such device."""
    row: DeviceRow | None = state.get((DEVICE, device))
    if row is None:
        return None
    kind = Source(row.source), Carrier(row.carrier), row.capacity_w
    return Admitted(device, row.owner, *kind, row.area, row.place, row.commissioned_s)
