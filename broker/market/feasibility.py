"""Could a contract have been kept? What was left over in the last weeks, held against an expected consumption.

A hint for whoever signs a contract, made before there is any demand. It clears the expected consumption alone, from
what this broker and its neighbours had left after serving everybody else. So what it finds takes nothing from anyone;
in fact the new consumer would also get its part of what is scarce.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from broker.market.clearing import OpenDemand
from broker.market.contracts import Contract, History
from broker.market.lots import Lot
from broker.market.matching import clear_lots
from broker.market.mix import quotas
from broker.market.windows import Span, window_span
from broker.protocol.market_time import Interval
from broker.protocol.messages import NO_LINE
from broker.protocol.sources import Source, SourceGroup


@dataclass(frozen=True, slots=True)
class LineFeasibility:
    """What a line wanted in all, and how much of that could have been served."""

    target: Source | SourceGroup
    wanted_wh: int
    served_wh: int

    @property
    def served_percent(self) -> int:
        """Rounded down, so that 100 means all of it."""
        return 100 if not self.wanted_wh else 100 * self.served_wh // self.wanted_wh


def feasibility(
    contract: Contract, consumption: Sequence[tuple[Interval, int]], left_over: Mapping[Lot, int], margin: int = 0
) -> tuple[LineFeasibility, ...]:
    """By line of the contract. `consumption` is what is expected in each interval, in Wh, each interval once.

    `left_over` is what nobody used. Consumers pay `margin` µ-currency per kWh on top of its price.
    """
    by_span: dict[Span, list[OpenDemand]] = {}
    wanted = [0] * len(contract.lines)
    pledged = History.empty(contract)
    for interval, energy_wh in consumption:
        divided = quotas(contract.shares_ppm, pledged, energy_wh)
        # As if all of it were delivered: the shares are to be those of the contract over the whole time.
        pledged = pledged.plus(*enumerate(divided))
        wanted = [total_wh + quota_wh for total_wh, quota_wh in zip(wanted, divided, strict=True)]
        span = window_span(contract.window, interval)
        demand = OpenDemand("expected", energy_wh, contract, divided, pledged, (), interval.start_s, span)
        by_span.setdefault(span, []).append(demand)
    served = [0] * len(contract.lines)
    for span, demands in by_span.items():
        lots = {lot: wh for lot, wh in left_over.items() if span.start_s <= lot.start_s < span.end_s}
        for taken in clear_lots(demands, lots, margin=margin).taken:
            for item in taken:
                if item.line != NO_LINE:
                    served[item.line] += item.energy_wh
    return tuple(
        [
            LineFeasibility(line.target, wanted_wh, served_wh)
            for line, wanted_wh, served_wh in zip(contract.lines, wanted, served, strict=True)
        ]
    )
