"""Arrangements for the day ahead: what brokers would like to count on from each other, and what they promise.

Theory of operation. In the middle of a day each broker forecasts the next one and publishes what it expects to lack
and to have left (`broker.market.forecast`). An hour later each publishes its *wishes*: what it would like to have of
which neighbour, source and interval, planned from its own shortage and the others' surplus alone. An hour after that
each publishes its *promises*: its surplus, shared out among the wishes that it has heard. Each step rests on what
everybody published in the one before, so the order in which things arrive decides nothing. What is late, lost, or never
said by a program that knows nothing of this leaves so much unarranged, and no more.

A promise is of order, not of weather: it binds nobody to have the energy. When orders of the interval are shared out,
those of whoever holds a promise come first, up to what was promised (`sourcing.grants`), and at one price the neighbour
that promised is asked first (`sourcing.plan_orders`). It is for one UTC day and ends with it.

Everything is in Wh and independent of the order of its input; an interval is known by its index in the day.
"""

from collections.abc import Iterable, Mapping
from typing import Final

from broker.market.forecast import COARSE_WH
from broker.market.mix import apportion
from broker.market.windows import DAY_S
from broker.protocol.messages import MAX_ARRANGED_NEIGHBOURS, MAX_ARRANGED_ROWS, DayAmount, Forecast, NeighbourAmounts
from broker.protocol.sources import Source

WISHED_BEFORE_S: Final = 11 * 3_600
PROMISED_BEFORE_S: Final = 10 * 3_600
"""So long before the day begins wishes and promises are made, and forecasts an hour before them (`MADE_BEFORE_S`). An
hour of market time is one interval at least, in which what was published before reaches everybody."""

Place = tuple[Source, int]
"""A source, and the index of an interval in the day."""

Arranged = dict[tuple[str, Source, int], int]
"""Wh by (neighbour, source, index of the interval)."""


def shortages_of(forecast: Forecast) -> dict[Place, int]:
    """What a broker expects to lack for lines of a single source; groups find their energy without an arrangement."""
    return {(one.source, one.interval): one.shortage_wh for one in forecast.outlooks if one.shortage_wh}


def surpluses_of(forecast: Forecast, day_start_s: int, interval_s: int) -> dict[Place, int]:
    """What a broker expects to have left on that day; nothing if its forecast is of another, or of other intervals."""
    if forecast.start_s != day_start_s or len(forecast.group_shortages_wh) * interval_s != DAY_S:
        return {}
    return {(one.source, one.interval): one.surplus_wh for one in forecast.outlooks if one.surplus_wh}


def plan_wishes(
    short_wh: Mapping[Place, int], left_wh: Mapping[str, Mapping[Place, int]], trust_ppm: Mapping[str, int]
) -> Arranged:
    """What to wish of whom, in steps of COARSE_WH. Every short Wh is wished of one neighbour only, or of none.

    `left_wh` is what each neighbour published to have left, `trust_ppm` the part of earlier orders that each gave;
    whoever is not in it is not asked for anything. Those of whom most is to be expected (the product of the two) come
    first, each as far as its surplus goes.
    """
    wishes: Arranged = {}
    for (source, index), wanted_wh in short_wh.items():
        ranked = sorted(
            [
                (-energy_wh * trust_ppm[neighbour], neighbour, energy_wh)
                for neighbour, places in left_wh.items()
                if neighbour in trust_ppm and (energy_wh := _coarse(places.get((source, index), 0)))
            ]
        )
        missing_wh = _coarse(wanted_wh)
        for _, neighbour, energy_wh in ranked:
            part_wh = min(missing_wh, energy_wh)
            if part_wh:
                wishes[neighbour, source, index] = part_wh
                missing_wh -= part_wh
    return wishes


def _coarse(energy_wh: int) -> int:
    return energy_wh - energy_wh % COARSE_WH


def share_out(wishes: Arranged, left_wh: Mapping[Place, int], most_wh: Mapping[str, int]) -> Arranged:
    """What to promise to whom: to nobody more than was wished, to all together at most `left_wh`, in proportion.

    `most_wh` is what each neighbour may have of one interval, all sources together; whoever is not in it is promised
    nothing. Where that is less than it wished of the interval, its wishes are cut in proportion.
    """
    by_interval: dict[tuple[str, int], list[tuple[Source, int]]] = {}
    for (requester, source, index), energy_wh in sorted(wishes.items()):
        if requester in most_wh:
            by_interval.setdefault((requester, index), []).append((source, energy_wh))
    at_place: dict[Place, list[tuple[str, int]]] = {}
    for (requester, index), wished in sorted(by_interval.items()):
        energies_wh = [energy_wh for _, energy_wh in wished]
        allowed_wh = apportion(min(most_wh[requester], sum(energies_wh)), energies_wh)
        for (source, _), energy_wh in zip(wished, allowed_wh, strict=True):
            at_place.setdefault((source, index), []).append((requester, energy_wh))
    promises: Arranged = {}
    for (source, index), asked in at_place.items():
        energies_wh = [energy_wh for _, energy_wh in asked]
        shares_wh = apportion(min(left_wh.get((source, index), 0), sum(energies_wh)), energies_wh)
        for (requester, _), share_wh in zip(asked, shares_wh, strict=True):
            if share_wh:
                promises[requester, source, index] = share_wh
    return promises


def rows_of(arranged: Arranged) -> tuple[NeighbourAmounts, ...]:
    """As it stands in a message, by neighbour, interval and source.

    One message holds MAX_ARRANGED_ROWS amounts with MAX_ARRANGED_NEIGHBOURS neighbours; of more, the largest (of equal
    ones the earliest interval, then the lowest source, then the first name) are kept, and the rest is not arranged.
    """
    largest_first = sorted(arranged.items(), key=lambda item: (-item[1], item[0][2], item[0][1], item[0][0]))
    kept: dict[str, list[DayAmount]] = {}
    rows = 0
    for (neighbour, source, index), energy_wh in largest_first:
        if rows == MAX_ARRANGED_ROWS:
            break
        if neighbour in kept or len(kept) < MAX_ARRANGED_NEIGHBOURS:
            kept.setdefault(neighbour, []).append(DayAmount(source, index, energy_wh))
            rows += 1
    return tuple(
        [
            NeighbourAmounts(name, tuple(sorted(amounts, key=lambda one: (one.interval, one.source))))
            for name, amounts in sorted(kept.items())
        ]
    )


def read_rows(rows: Iterable[NeighbourAmounts]) -> Arranged:
    """What stands in a message. Of several amounts for the same the last one counts."""
    return {(one.neighbour, amount.source, amount.interval): amount.energy_wh for one in rows for amount in one.amounts}
