"""What energy costs when it leaves a broker: what the broker paid for it, and a margin.

A provider has a price for each device, and a neighbour's energy costs what stands on its transfer. Both are prices
paid, and stock is kept at them. Whoever gets the energy next, a consumer or a neighbour, pays that price and the
broker's margin for such customers. What stays unmatched has no price: nobody delivered it.

All prices are µ-currency per kWh. An amount of money is exact in nano-currency, since Wh · µ/kWh is nano; `statements`
says where it is rounded to µ.
"""

from dataclasses import dataclass
from typing import Final

MAX_PRICE: Final = 10**12
"""A million units of currency per kWh: enough for any currency, and sums of a few prices stay under 2^53."""


@dataclass(frozen=True, slots=True)
class Tariff:
    """A broker's margins, µ-currency per kWh, from 0 to MAX_PRICE each."""

    consumer_margin: int = 0
    neighbour_margin: int = 0

    def for_consumers(self, price_paid: int) -> int:
        """What a consumer pays for energy that the broker got at that price."""
        return price_paid + self.consumer_margin

    def for_neighbours(self, price_paid: int) -> int:
        """What a neighbour is asked for energy that the broker got at that price."""
        return price_paid + self.neighbour_margin
