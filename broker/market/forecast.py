"""Foresight: what a broker expects of the next UTC day, from what happened in the last four weeks.

The baseline is seasonal and plain. What an interval of the next day will bring is the weighted mean of the same
interval on past days: the newer a day the more it counts, and for demand the same day of the week counts double. A day
without any record of that interval is left out, so a gap changes weights and nothing else; if no day has it, there is
no forecast. docs/foresight.md gives the error on recorded data.

Everything is in integers and independent of the order of its input. `divide` is how the market will share out one
interval (single sources first, then groups from what is most plentiful); the quotas' catching-up is not foreseen.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

from broker.market.contracts import WHOLE_PPM, Line
from broker.market.windows import DAY_S
from broker.protocol.market_time import Interval
from broker.protocol.messages import Forecast, SourceOutlook, SupplyLevel
from broker.protocol.sources import Source, SourceGroup

Target = Source | SourceGroup

MADE_BEFORE_S: Final = DAY_S // 2
"""A forecast is made half a day before its day: the afternoon can still be planned, and it rests on this morning."""

HISTORY_S: Final = 28 * DAY_S + DAY_S
"""How far back from the day's start a forecast looks."""

COARSE_WH: Final = 100
"""Forecasts are published in steps of this, rounded down: enough to choose whom to ask by."""

SHORT_BELOW_PPM: Final = 950_000
SCARCE_BELOW_PPM: Final = 500_000
PLENTIFUL_FROM_PPM: Final = 1_500_000
"""Of what the lines' sources will be asked for, so much must be there."""

_MOST_ROOM_PPM: Final = 2 * WHOLE_PPM

_NEWER_COUNTS_MORE: Final = tuple((days, 15 - days) for days in range(1, 15))
_WEEKDAYS_COUNT_DOUBLE: Final = (*((days, 4 if days % 7 == 0 else 2) for days in range(1, 15)), (21, 3), (28, 2))


class HistoryKind(IntEnum):
    """What a row of history counts. The number is the code in the broker's database."""

    GENERATED = 0
    DEMANDED = 1
    BOUGHT = 2
    FLEXIBLE = 3
    """The part of what was demanded that energy of other intervals of the day may serve as well."""


_WEIGHTS: Final[Mapping[HistoryKind, tuple[tuple[int, int], ...]]] = {
    HistoryKind.GENERATED: _NEWER_COUNTS_MORE,
    HistoryKind.DEMANDED: _WEEKDAYS_COUNT_DOUBLE,
    HistoryKind.BOUGHT: _NEWER_COUNTS_MORE,
    HistoryKind.FLEXIBLE: _WEEKDAYS_COUNT_DOUBLE,
}
"""By kind (days back, weight): the sun knows no weekends."""


class HistoryRow(NamedTuple):
    """Wh of one market interval: generated or bought of a source, or demanded for what a contract line names."""

    start_s: int
    kind: HistoryKind
    target: Target
    energy_wh: int


@dataclass(frozen=True, slots=True)
class Expectation:
    """What is expected of the UTC day that begins at `day_start_s`: Wh of each interval, in their order.

    `bought` is what neighbours have been giving; `generated` and `bought` are by source, `demanded` by line target.
    `flexible` is the part of `demanded` by consumers whose window is longer than one interval.
    """

    day_start_s: int
    interval_s: int
    generated: Mapping[Source, tuple[int, ...]]
    demanded: Mapping[Target, tuple[int, ...]]
    bought: Mapping[Source, tuple[int, ...]]
    flexible: Mapping[Target, tuple[int, ...]]

    @property
    def intervals(self) -> range:
        """The indices of the day's intervals."""
        return range(DAY_S // self.interval_s)

    def supply(self, index: int, *, with_bought: bool) -> dict[Source, int]:
        """Wh of each source expected to be there in one interval."""
        supply = {source: energies[index] for source, energies in self.generated.items()}
        if with_bought:
            for source, energies in self.bought.items():
                supply[source] = supply.get(source, 0) + energies[index]
        return supply

    def demand(self, index: int) -> dict[Target, int]:
        """Wh expected to be demanded for each line target in one interval."""
        return {target: energies[index] for target, energies in self.demanded.items()}

    def flexible_demand(self, index: int) -> dict[Target, int]:
        """The part of `demand` that energy of other intervals may serve as well."""
        return {target: energies[index] for target, energies in self.flexible.items()}


class Division(NamedTuple):
    """How the supply of one interval is shared out: Wh that each target gets, and Wh that each source has left."""

    filled: Mapping[Target, int]
    left: Mapping[Source, int]


def expect(history: Iterable[HistoryRow], day_start_s: int, interval_s: int) -> Expectation | None:
    """The baseline for the UTC day that begins at `day_start_s`, from the rows of earlier intervals.

    An interval of which there is any row counts as recorded: what has no row in it was 0. None if some interval of the
    day was recorded on none of the days that would count. Raises ValueError for a negative energy.
    """
    recorded: set[int] = set()
    series: dict[HistoryKind, dict[Target, dict[int, int]]] = {kind: {} for kind in HistoryKind}
    for row in history:
        if row.energy_wh < 0:
            raise ValueError(f"{row.energy_wh} Wh at {row.start_s}: history has no negative energy")
        if row.start_s >= day_start_s:
            continue
        recorded.add(row.start_s)
        values = series[row.kind].setdefault(row.target, {})
        values[row.start_s] = values.get(row.start_s, 0) + row.energy_wh
    if not recorded:
        return None
    starts = range(day_start_s, day_start_s + DAY_S, interval_s)
    expected: dict[HistoryKind, dict[Target, tuple[int, ...]]] = {}
    for kind, by_target in series.items():
        days = [
            [(start_s - back * DAY_S, weight) for back, weight in _WEIGHTS[kind] if start_s - back * DAY_S in recorded]
            for start_s in starts
        ]
        if by_target and not all(days):
            return None
        expected[kind] = {target: _means(by_target[target], days) for target in sorted(by_target)}
    return Expectation(
        day_start_s,
        interval_s,
        _by_source(expected[HistoryKind.GENERATED]),
        expected[HistoryKind.DEMANDED],
        _by_source(expected[HistoryKind.BOUGHT]),
        expected[HistoryKind.FLEXIBLE],
    )


def _means(values: Mapping[int, int], days: Sequence[Sequence[tuple[int, int]]]) -> tuple[int, ...]:
    """For each interval the weighted mean of its past days, rounded down."""
    return tuple(
        [
            sum([weight * values.get(start_s, 0) for start_s, weight in past]) // sum([weight for _, weight in past])
            for past in days
        ]
    )


def _by_source(expected: Mapping[Target, tuple[int, ...]]) -> dict[Source, tuple[int, ...]]:
    return {target: energies for target, energies in expected.items() if isinstance(target, Source)}


def divide(supply: Mapping[Source, int], demand: Mapping[Target, int]) -> Division:
    """Share out one interval's supply as clearing does: single sources, then renewable, fossil and any.

    A group takes the source of which most is left, until that is used up, then the next; of equal ones the lower code.
    """
    left = {source: supply[source] for source in sorted(supply)}
    filled: dict[Target, int] = {}
    # The numbers of groups are above those of sources, and `any` is the highest.
    for target in sorted(demand):
        wanted_wh = demand[target]
        members = target.sources if isinstance(target, SourceGroup) else (target,)
        ranked = sorted([source for source in members if source in left], key=lambda source: (-left[source], source))
        for source in ranked:
            taken_wh = min(wanted_wh, left[source])
            left[source] -= taken_wh
            wanted_wh -= taken_wh
        filled[target] = demand[target] - wanted_wh
    return Division(filled, left)


def forecast_of(expectation: Expectation, broker: str, kept_wh: Sequence[Mapping[Source, int]] = ()) -> Forecast:
    """What a broker tells its neighbours: shortage and surplus of its own generation, in steps of COARSE_WH.

    `kept_wh`: for each interval, Wh by source of what is left that neighbours will not get; empty if there is none.
    """
    outlooks: list[SourceOutlook] = []
    group_shortages = []
    for index in expectation.intervals:
        demand = expectation.demand(index)
        division = divide(expectation.supply(index, with_bought=False), demand)
        short_wh = {target: wanted_wh - division.filled[target] for target, wanted_wh in demand.items()}
        group_shortages.append(
            _coarse(sum([energy_wh for target, energy_wh in short_wh.items() if isinstance(target, SourceGroup)]))
        )
        kept = kept_wh[index] if kept_wh else {}
        for source in Source:
            surplus_wh = division.left.get(source, 0) - kept.get(source, 0)
            outlook = SourceOutlook(source, index, _coarse(short_wh.get(source, 0)), _coarse(surplus_wh))
            if outlook.shortage_wh or outlook.surplus_wh:
                outlooks.append(outlook)
    start_s = expectation.day_start_s
    return Forecast(broker, start_s, start_s + DAY_S, tuple(outlooks), tuple(group_shortages))


def _coarse(energy_wh: int) -> int:
    return energy_wh - energy_wh % COARSE_WH


def supply_levels(expectation: Expectation, lines: Sequence[Line]) -> tuple[SupplyLevel, ...]:
    """For each interval of the day: how well a contract with these lines will be supplied.

    What neighbours have been giving counts as supply here, because it is what the consumer got.
    """
    return tuple([_level(expectation, lines, index) for index in expectation.intervals])


def _level(expectation: Expectation, lines: Sequence[Line], index: int) -> SupplyLevel:
    demand = expectation.demand(index)
    division = divide(expectation.supply(index, with_bought=True), demand)
    filled_ppm = room_ppm = 0
    for line in lines:
        members = line.target.sources if isinstance(line.target, SourceGroup) else (line.target,)
        left_wh = sum([division.left.get(source, 0) for source in members])
        wanted_wh, filled_wh = demand.get(line.target, 0), division.filled.get(line.target, 0)
        filled_ppm += line.share_ppm * _part_ppm(filled_wh, wanted_wh, left_wh)
        room_ppm += line.share_ppm * min(_MOST_ROOM_PPM, _part_ppm(filled_wh + left_wh, wanted_wh, left_wh))
    if filled_ppm < SCARCE_BELOW_PPM * WHOLE_PPM:
        return SupplyLevel.SCARCE
    if filled_ppm < SHORT_BELOW_PPM * WHOLE_PPM:
        return SupplyLevel.SHORT
    return SupplyLevel.PLENTIFUL if room_ppm >= PLENTIFUL_FROM_PPM * WHOLE_PPM else SupplyLevel.ENOUGH


def _part_ppm(energy_wh: int, wanted_wh: int, left_wh: int) -> int:
    """`energy_wh` in ppm of what is wanted; where nobody is expected to want any, all or nothing."""
    if wanted_wh == 0:
        return WHOLE_PPM if left_wh else 0
    return WHOLE_PPM * energy_wh // wanted_wh


def expected_surplus(forecast: Forecast, source: Source, interval: Interval) -> int:
    """Wh of a source that the broker of this forecast expects to have left in an interval; 0 if it does not say.

    For ranking whom to ask, and nothing else: the broker may have less by then, or give it to others.
    """
    if not forecast.start_s <= interval.start_s < interval.end_s <= forecast.end_s:
        return 0
    index, beside_s = divmod(interval.start_s - forecast.start_s, interval.length_s)
    if beside_s or len(forecast.group_shortages_wh) * interval.length_s != DAY_S:
        return 0  # It speaks of intervals of another length, so of none that is known here.
    for outlook in forecast.outlooks:
        if outlook.source is source and outlook.interval == index:
            return outlook.surplus_wh
    return 0
