"""A holding: one slice that a party owns, as it travels in the ledger's answer to a HOLDINGS query."""

from dataclasses import dataclass
from typing import Final

from broker.ledger.operations import AssetId
from broker.protocol import cbor
from broker.protocol.codec import Choice, Name, Row, Unsigned
from broker.protocol.messages import Carrier
from broker.protocol.sources import Source

_MAX_BYTES: Final = 256
_CODEC: Final = Row(
    (Name(), Choice(Carrier), Unsigned(), Unsigned(maximum=65_535), Choice(Source), Name(), Unsigned(), Unsigned())
)


@dataclass(frozen=True, slots=True)
class Holding:
    """A held slice `[from_wh, to_wh)` of an asset, with what a broker needs to match it. `area` is the device's."""

    asset: AssetId
    source: Source
    area: str
    from_wh: int
    to_wh: int


def encode_holding(holding: Holding) -> bytes:
    """One flat array of eight; `holding` in schema/operations.cddl."""
    asset = holding.asset
    return cbor.encode(
        [
            asset.device,
            int(asset.carrier),
            asset.start_s,
            asset.revision,
            int(holding.source),
            holding.area,
            holding.from_wh,
            holding.to_wh,
        ]
    )


def decode_holding(raw: bytes) -> Holding:
    """Raises MalformedMessage."""
    device, carrier, start_s, revision, source, area, from_wh, to_wh = _CODEC.decode(
        cbor.decode(raw, "holding", _MAX_BYTES), "holding"
    )
    return Holding(AssetId(device, carrier, start_s, revision), source, area, from_wh, to_wh)
