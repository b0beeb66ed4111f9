"""Operations of the ledger, built again from the parts that a certificate holds. Pure.

Issuer and verifier use the same functions. The issuer compares what they give with the ledger's own bytes, so whatever
could not be told by parts is noticed before a certificate is signed; the verifier hashes them as leaves.
"""

from typing import Final, NamedTuple

from broker.certificates.document import Given, SignedDemand, SignedReading
from broker.ledger.operations import (
    AssetId,
    Correct,
    Deliver,
    DeliveredSlice,
    Issue,
    encode_operation,
)
from broker.protocol import cbor
from broker.protocol.envelope import assemble
from broker.protocol.keys import PublicKey
from broker.protocol.messages import Carrier, MessageType

_ISSUE: Final = encode_operation(Issue(b""))[:-1]
_CORRECT: Final = encode_operation(Correct(b""))[:-1]
"""What stands before the statement in their bytes: a year has forty thousand of them to be written."""


class MeterSignature(NamedTuple):
    """A signature to be checked: `key` signed `message`. `what` names the message for people, `at_s` its interval."""

    key: PublicKey
    signature: bytes
    message: bytes
    what: str
    at_s: int


def demand_evidence(
    demand: SignedDemand, meter: str, key: PublicKey, ledger: str, start_s: int, interval_s: int
) -> tuple[bytes, MeterSignature]:
    """The sealed Demand, and the signature in it."""
    payload = _meter_value(
        meter, start_s, interval_s, demand.revision, demand.energy_wh, demand.quality, demand.sampled_s
    )
    raw, signed = assemble(MessageType.DEMAND, key, ledger, meter, payload, demand.signature)
    return raw, MeterSignature(key, demand.signature, signed, "demand", start_s)


def reading_evidence(
    reading: SignedReading, device: str, key: PublicKey, ledger: str, interval_s: int
) -> tuple[bytes, MeterSignature]:
    """The bytes of the Issue or Correct, and the meter's signature in it."""
    start_s = reading.number * interval_s
    payload = _meter_value(
        device, start_s, interval_s, reading.revision, reading.energy_wh, reading.quality, reading.sampled_s
    )
    raw, signed = assemble(MessageType.READING, key, ledger, device, payload, reading.signature)
    head = _CORRECT if reading.revision else _ISSUE
    return head + cbor.byte_string_head(len(raw)) + raw, MeterSignature(
        key, reading.signature, signed, "reading", start_s
    )


def delivery_evidence(
    given: Given,
    assets: list[AssetId],
    pseudonym: bytes,
    start_s: int,
    interval_s: int,
    area: str,
    demanded_wh: int,
    commitment: bytes,
) -> bytes:
    """The bytes of the Deliver; `assets` are those of its slices."""
    slices = [
        DeliveredSlice(asset, item.from_wh, item.to_wh, item.line)
        for asset, item in zip(assets, given.slices, strict=True)
    ]
    return encode_operation(
        Deliver(pseudonym, start_s, start_s + interval_s, given.window, area, demanded_wh, commitment, tuple(slices))
    )


def _meter_value(
    meter: str, start_s: int, interval_s: int, revision: int, energy_wh: int, quality: int, sampled_s: tuple[int, ...]
) -> bytes:
    """The payload of a Reading or Demand of electricity, written directly: a year has seventy thousand of them."""
    data = {
        0: meter,
        1: start_s,
        2: start_s + interval_s,
        3: revision,
        4: energy_wh,
        5: int(quality),
        6: int(Carrier.ELECTRICITY),
    }
    if sampled_s:
        data[7] = sampled_s
    return cbor.encode(data)
