"""A provider's terms for a device: its price, what it keeps for this broker's consumers, and what only for some.

Of every asset the first Wh are the exclusive ones, the next the reserve, and the rest is free for everybody. So which
Wh are kept follows from the range alone, and a broker that was restarted keeps the same ones.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

from broker.market.tariff import MAX_PRICE
from broker.protocol.codec import is_name

MAX_EXCLUSIVE_CONSUMERS: Final = 64
"""Bounds a device's terms; who serves more keeps a reserve instead."""

_WHOLE_PPM: Final = 1_000_000


class TermsError(Exception):
    """Terms that cannot be accepted. The text says what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class DeviceTerms:
    """What a provider asks and keeps, as `make_terms` makes it. `price` is in µ-currency per kWh.

    `exclusive_ppm` of each interval's Wh go to the meters `exclusive_for` and to nobody else. `reserve_ppm` go to
    consumers of this broker, and not to neighbours.
    """

    price: int
    reserve_ppm: int = 0
    exclusive_ppm: int = 0
    exclusive_for: tuple[str, ...] = ()

    @property
    def keeps_nothing(self) -> bool:
        return not self.reserve_ppm and not self.exclusive_ppm


class Part(NamedTuple):
    """The Wh `[from_wh, to_wh)` of an asset, and whom they are for (see `lots.Lot`)."""

    from_wh: int
    to_wh: int
    reserved: bool
    only_for: tuple[str, ...]


def make_terms(
    price: int, *, reserve_ppm: int = 0, exclusive_ppm: int = 0, exclusive_for: Iterable[str] = ()
) -> DeviceTerms:
    """Terms from what a person chose. Raises TermsError."""
    meters = tuple(sorted(exclusive_for))
    if type(price) is not int or not 0 <= price <= MAX_PRICE:
        raise TermsError(f"price {price!r}; give a whole number from 0 to {MAX_PRICE} µ-currency per kWh")
    for what, share_ppm in (("reserve", reserve_ppm), ("exclusive share", exclusive_ppm)):
        if type(share_ppm) is not int or not 0 <= share_ppm <= _WHOLE_PPM:
            raise TermsError(f"the {what} is {share_ppm!r} ppm; give a whole number from 0 to {_WHOLE_PPM}")
    if reserve_ppm + exclusive_ppm > _WHOLE_PPM:
        raise TermsError(
            f"reserve and exclusive share are {reserve_ppm + exclusive_ppm} ppm together; lower them to {_WHOLE_PPM}"
        )
    if bool(meters) != bool(exclusive_ppm):
        raise TermsError("an exclusive share and the consumers that it is for belong together; give both or neither")
    if len(meters) > MAX_EXCLUSIVE_CONSUMERS or len(set(meters)) != len(meters):
        raise TermsError(
            f"{len(meters)} exclusive consumers, or one of them twice; name each once,"
            f" at most {MAX_EXCLUSIVE_CONSUMERS}"
        )
    for meter in meters:
        if not is_name(meter):
            raise TermsError(f"{meter!r} is no name of a meter; use a-z, 0-9 and -")
    return DeviceTerms(price, reserve_ppm, exclusive_ppm, meters)


def parts_of(terms: DeviceTerms, asset_wh: int, from_wh: int, to_wh: int) -> list[Part]:
    """Cut `[from_wh, to_wh)` of an asset of `asset_wh` where its terms change."""
    exclusive_wh = asset_wh * terms.exclusive_ppm // _WHOLE_PPM
    reserve_end_wh = exclusive_wh + asset_wh * terms.reserve_ppm // _WHOLE_PPM
    parts = [
        Part(max(from_wh, 0), min(to_wh, exclusive_wh), True, terms.exclusive_for),
        Part(max(from_wh, exclusive_wh), min(to_wh, reserve_end_wh), True, ()),
        Part(max(from_wh, reserve_end_wh), to_wh, False, ()),
    ]
    return [part for part in parts if part.from_wh < part.to_wh]
