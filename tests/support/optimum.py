"""The most Wh that could be delivered, by linear programming: what any market has to be held against.

The program knows everything beforehand: all that was made, by lot and by the broker whose stock it came into, and all
that was wanted. It decides nothing about quotas; those are given, as the market under test divided its demands.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import pytest

from broker.market.contracts import Contract
from broker.market.lots import Lot
from broker.market.windows import Span
from broker.protocol.sources import Source, SourceGroup

optimize = pytest.importorskip("scipy.optimize", reason="no scipy for this platform")
sparse = pytest.importorskip("scipy.sparse", reason="no scipy for this platform")


class Wish(NamedTuple):
    """Wh that a demand can be given of a target, from the lots that its contract takes within its span."""

    contract: Contract
    target: Source | SourceGroup
    span: Span
    energy_wh: int
    broker: str = "home"


class Whole(NamedTuple):
    """Which demands' wishes together are given no more than what is used."""

    contract: Contract
    span: Span
    broker: str = "home"


def optimum(
    wishes: Sequence[Wish],
    supply: Mapping[tuple[str, Lot], int],
    neighbours: Mapping[str, Collection[str]] | None = None,
    at_most_wh: Mapping[Whole, int] | None = None,
) -> int:
    """The most Wh that can flow from lots to wishes. Equal wishes are added up, which changes nothing.

    `supply` is by broker and lot, prices as the consumers pay them. A consumer's broker can have the lots of its
    `neighbours`, who withhold nothing but what is reserved. `at_most_wh` limits what demands get by all their wishes.
    """
    wanted: dict[Wish, int] = {}
    for wish in wishes:
        key = wish._replace(energy_wh=0)
        wanted[key] = wanted.get(key, 0) + wish.energy_wh
    keys, places = list(wanted), list(supply)
    limits = [*wanted.values(), *supply.values()]
    row_of_whole: dict[Whole, int] = {}
    for whole, energy_wh in (at_most_wh or {}).items():
        row_of_whole[whole] = len(limits)
        limits.append(energy_wh)
    rows: list[int] = []
    columns: list[int] = []
    flows = 0
    for row, wish in enumerate(keys):
        sources = wish.target.sources if isinstance(wish.target, SourceGroup) else (wish.target,)
        excluded = wish.contract.excluded_providers
        reachable = {wish.broker, *(neighbours or {}).get(wish.broker, ())}
        whole_row = row_of_whole.get(Whole(wish.contract, wish.span, wish.broker))
        for place, (broker, lot) in enumerate(places):
            limit = wish.contract.highest_price_of(lot.source)
            if (
                wish.span.start_s <= lot.start_s < wish.span.end_s
                and lot.source in sources
                and lot.provider not in excluded
                and (limit is None or lot.price <= limit)
                and broker in reachable
                and (broker == wish.broker or not lot.reserved)
                and supply[broker, lot]
            ):
                ends = [row, len(keys) + place, *([] if whole_row is None else [whole_row])]
                rows += ends
                columns += [flows] * len(ends)
                flows += 1
    if not flows:
        return 0
    matrix = sparse.csr_matrix(([1.0] * len(rows), (rows, columns)), shape=(len(limits), flows))
    result = optimize.linprog([-1.0] * flows, A_ub=matrix, b_ub=limits, method="highs")
    assert result.status == 0
    return round(-result.fun)
