"""Clearing for demands that do not take everything: excluded and preferred providers, price ceilings, longer windows.

`clear_lots` is the door. Where nobody asks for more than a source and an interval it hands over to `clearing`, which is
quicker and gives what that page says. Otherwise it does the same steps in the same order, but on a graph: demands'
lines on the one side, grouped into rows that can use the same energy; lots on the other, grouped into columns that are
open to the same contracts. `flow` shares out fairly on it.

Who is served when there is not enough, in this order:

1. The demands whose window ends soonest, of these those with the shortest window; of them single sources, then
   `renewable` and `fossil`, then `any`. All lines together get as many Wh as any way of serving them could give.
2. (Of demands that are settled.) Lines below their plain share, substitutes by rank, and `any`, as in `clearing`.

Who stands at the same point gets the same fraction of what they want, as far as what they can use allows it. Preferred
providers come first where that costs nobody a Wh. Ties go by meter name and interval.

Demands whose window goes on may *wait*: they are matched with the others, but what they would get is only held back, so
that a later clearing can give it to somebody who can use nothing else. When the window ends, everything that was made
and is wanted in it is known, and the flow is the best there is. A waiting demand is given at once only what surely
costs nobody anything: energy that nobody else can use who could not just as well use all that this demand can. (Proof:
whatever is best later, if another one then has that energy, the two can exchange, and as many Wh flow.)
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from broker.market.clearing import (
    GROUPS,
    Clearing,
    OpenDemand,
    Taken,
    fill_lines,
    room_below_plain_share,
    settle,
    unfilled_quotas,
)
from broker.market.contracts import Contract, ShortageChoice
from broker.market.flow import fair_amounts, serve
from broker.market.lots import Lot
from broker.market.mix import apportion
from broker.market.windows import Span, Window
from broker.protocol.sources import Source, SourceGroup

_Target = Source | SourceGroup

_GROUP_RANK: Final = {SourceGroup.RENEWABLE: 1, SourceGroup.FOSSIL: 1, SourceGroup.ANY: 2}

MAX_KINDS_COMPARED: Final = 200
"""Kinds of lines with longer windows, by what they take. Each is compared with each; if there are more, all wait."""


def clear_lots(
    demands: Sequence[OpenDemand],
    lots: Mapping[Lot, int],
    settle_until_s: int | None = None,
    margin: int = 0,
    *,
    gives_early: bool = False,
) -> Clearing:
    """Fill what is unfilled of the quotas from these Wh, and settle the demands whose span ends by `settle_until_s`.

    Consumers pay `margin` µ-currency per kWh on top of a lot's price, and their price ceilings are on what they pay.
    For demands that wait and are not settled energy is held back. With `gives_early` they are given what surely costs
    nobody anything. For this all of an interval's demands have to be here, also those of 0 Wh: only of contracts that
    are here is it known what they take.

    Raises ValueError if two demands have the same meter and interval.
    """
    settled = [settle_until_s is not None and demand.span.end_s <= settle_until_s for demand in demands]
    if _is_plain(demands, lots) and (all(settled) or not any(settled)):
        available: dict[Source, int] = {}
        for lot, energy_wh in lots.items():
            available[lot.source] = available.get(lot.source, 0) + energy_wh
        return settle(demands, available) if any(settled) else fill_lines(demands, available)
    waits = [demand.waits and not now for demand, now in zip(demands, settled, strict=True)]
    board = _Board(demands, lots, margin, waits, gives_early=gives_early)
    lacking = board.fill(unfilled_quotas(demands))
    if any(settled):
        board.raise_to_plain_share(settled)
        board.substitute(settled)
    return board.clearing(lacking)


def are_plain(demands: Sequence[OpenDemand]) -> bool:
    """True if any energy of the right source and interval suits everybody."""
    # Equal contracts are mostly one object, and there are far fewer of them than demands.
    contracts = {id(demand.contract): demand.contract for demand in demands}
    return all(contract.is_plain for contract in contracts.values())


def _is_plain(demands: Sequence[OpenDemand], lots: Mapping[Lot, int]) -> bool:
    if not are_plain(demands) or any(lot.reserved for lot in lots):
        return False
    return len({demand.start_s for demand in demands} | {lot.start_s for lot in lots}) <= 1


@dataclass(frozen=True, slots=True)
class _Terms:
    """Which lots a contract takes in a span: their place in its order of preference, or _NO_PLACE; absent if it does
    not take them."""

    places: Mapping[Lot, int]


_NO_PLACE: Final = -1


def _terms(contract: Contract, span: Span, meter: str, lots: Iterable[Lot], margin: int) -> _Terms:
    excluded = frozenset(contract.excluded_providers)
    place_of = {provider: place for place, provider in enumerate(contract.preferred_providers)}
    limits = {source: contract.highest_price_of(source) for source in Source}
    places = {}
    for lot in lots:
        limit = limits[lot.source]
        if (
            span.start_s <= lot.start_s < span.end_s
            and (limit is None or lot.price + margin <= limit)
            # Of unknown providers nothing is known, so who excludes anybody does not take their energy.
            and (not excluded or (lot.provider != "" and lot.provider not in excluded))
            and (not lot.only_for or meter in lot.only_for)
        ):
            places[lot] = place_of.get(lot.provider, _NO_PLACE)
    return _Terms(places)


class _Reach(NamedTuple):
    """What a line takes, of what there is and of what may come. `meter` is "" unless something is kept for it."""

    terms_number: int
    sources: frozenset[Source]
    excluded: frozenset[str]
    limits: tuple[tuple[Source, int | None], ...]
    span: Span
    meter: str

    def takes_all_that(self, other: "_Reach") -> bool:
        """True if this line takes surely all that the other one takes."""
        limits = dict(self.limits)
        return (
            other.sources <= self.sources
            and self.excluded <= other.excluded
            and self.span.start_s <= other.span.start_s
            and other.span.end_s <= self.span.end_s
            and other.meter in ("", self.meter)
            and all(_reaches_price(limits[source], limit) for source, limit in other.limits)
        )


def _reaches_price(highest: int | None, price: int | None) -> bool:
    return highest is None or (price is not None and price <= highest)


class _Claim(NamedTuple):
    """One demand's wish: index into the demands, line (None: whichever covers the source), target, Wh."""

    demand: int
    line: int | None
    target: _Target
    want_wh: int


class _Board:
    """What one clearing works on: Wh left per column, and per demand what it was given and what it still lacks."""

    def __init__(
        self,
        demands: Sequence[OpenDemand],
        lots: Mapping[Lot, int],
        margin: int,
        waits: Sequence[bool],
        *,
        gives_early: bool,
    ) -> None:
        if len({(demand.meter, demand.start_s) for demand in demands}) != len(demands):
            raise ValueError("two demands of one meter and interval in one clearing; merge them")
        self._demands = demands
        self._lots = lots
        self._margin = margin
        self._waits = waits
        self._in_name_order = sorted(
            range(len(demands)), key=lambda index: (demands[index].meter, demands[index].start_s)
        )
        self._given: list[dict[tuple[int, Source, int], int]] = [{} for _ in demands]
        self._rest_wh = [demand.energy_wh - sum([taken.energy_wh for taken in demand.taken]) for demand in demands]
        self._price_limits: dict[Source, int | None] = {}
        self._make_terms([lot for lot in lots if lots[lot]])
        self._make_columns(lots)
        self._held_back_wh = [0] * len(self._columns)
        self._rivals = self._long_reaches() if gives_early and any(waits) else []
        self._is_sure: dict[tuple[int, _Target, int], bool] = {}
        self._pressures = self._make_pressures()

    def _make_pressures(self) -> list[int]:
        """By column: how much those who wait want of each Wh of it (in millionths), in so far as they take it.

        They are to be left what they press for most. It is the only hint at what the days to come will want: the same
        contracts will ask for the same again. Zero everywhere if nobody waits.
        """
        wants: dict[tuple[int, _Target], int] = {}
        for index, demand in enumerate(self._demands):
            if self._waits[index]:
                for line, want_wh in zip(demand.contract.lines, demand.quotas, strict=True):
                    key = (self._terms_of[index], line.target)
                    wants[key] = wants.get(key, 0) + want_wh
        pressures = [0] * len(self._columns)
        for (terms, target), want_wh in wants.items():
            sources = target.sources if isinstance(target, SourceGroup) else (target,)
            columns = [column for column in self._places[terms] if self._source_of[column] in sources]
            here_wh = sum([self._left[column] for column in columns])
            for column in columns:
                pressures[column] += 1_000_000 * want_wh // here_wh
        return pressures

    def _make_terms(self, lots: Sequence[Lot]) -> None:
        """Find out what demands take, once for all who have the same contract, span and claim on exclusive lots."""
        named = {meter for lot in lots for meter in lot.only_for}
        number_of: dict[tuple[int, Span, str], int] = {}
        self._terms: list[_Terms] = []
        self._terms_of: list[int] = []
        self._demand_with: list[tuple[int, str]] = []
        """By terms: a demand that has them, and its meter if something is kept for that."""
        for demand in self._demands:
            meter = demand.meter if demand.meter in named else ""
            key = (id(demand.contract), demand.span, meter)
            number = number_of.get(key)
            if number is None:
                number = number_of[key] = len(self._terms)
                self._demand_with.append((len(self._terms_of), meter))
                self._terms.append(_terms(demand.contract, demand.span, demand.meter, lots, self._margin))
            self._terms_of.append(number)

    def _make_columns(self, lots: Mapping[Lot, int]) -> None:
        """Put lots of one source that the same terms take in the same way into one column."""
        found: dict[tuple[Source, tuple[int | None, ...]], list[Lot]] = {}
        # What fewest can use goes first. Else nearest in time is best, so the newest first; then the cheapest.
        for lot in sorted(lots, key=lambda lot: (not lot.only_for, not lot.reserved, -lot.start_s, lot.price, lot)):
            if lots[lot]:
                places = tuple([terms.places.get(lot) for terms in self._terms])
                found.setdefault((lot.source, places), []).append(lot)
        ordered = sorted(found.items(), key=lambda item: (item[0][0], -item[0][1].count(None), min(item[1])))
        self._columns = [tuple(members) for _, members in ordered]
        self._left = [sum([lots[lot] for lot in members]) for members in self._columns]
        self._source_of = [source for (source, _), _ in ordered]
        self._places: list[dict[int, int]] = [{} for _ in self._terms]
        for column, ((_, places), _) in enumerate(ordered):
            for terms_number, place in enumerate(places):
                if place is not None:
                    self._places[terms_number][column] = place

    def _reach(self, terms_number: int, target: _Target) -> _Reach:
        index, meter = self._demand_with[terms_number]
        contract, span = self._demands[index].contract, self._demands[index].span
        sources = frozenset(target.sources if isinstance(target, SourceGroup) else (target,))
        limits = tuple([(source, contract.highest_price_of(source)) for source in sorted(sources)])
        return _Reach(terms_number, sources, frozenset(contract.excluded_providers), limits, span, meter)

    def _long_reaches(self) -> list[_Reach]:
        """What all lines with longer windows take, each kind once; empty if there are too many kinds to compare."""
        kinds: dict[tuple[object, ...], _Reach] = {}
        for terms_number, (index, _) in enumerate(self._demand_with):
            contract = self._demands[index].contract
            if contract.window is not Window.INTERVAL:
                for line in contract.lines:
                    reach = self._reach(terms_number, line.target)
                    kinds.setdefault(reach[1:], reach)
        return list(kinds.values()) if len(kinds) <= MAX_KINDS_COMPARED else []

    def _costs_nobody(self, claim: _Claim, column: int) -> bool:
        """True if whoever else takes this column takes all that the claim's line takes."""
        key = (self._terms_of[claim.demand], claim.target, column)
        sure = self._is_sure.get(key)
        if sure is None:
            reach = self._reach(key[0], claim.target)
            sure = self._is_sure[key] = bool(self._rivals) and all(
                rival.takes_all_that(reach)
                for rival in self._rivals
                if self._source_of[column] in rival.sources and column in self._places[rival.terms_number]
            )
        return sure

    # The steps

    def fill(self, wanted: Sequence[Sequence[int]]) -> dict[_Target, int]:
        """Fill the lines. Says what each target lacks, where it lacks anything."""
        claims = []
        for demand in self._in_name_order:
            for line, want_wh in zip(self._demands[demand].contract.lines, wanted[demand], strict=True):
                if want_wh:
                    index = self._demands[demand].contract.lines.index(line)
                    claims.append(_Claim(demand, index, line.target, want_wh))
        return self._serve(claims, note_prices=True)

    def raise_to_plain_share(self, settled: Sequence[bool]) -> None:
        """Give rests to lines below their plain share; in rounds, as what one line cannot get falls to the others."""
        lacking = True
        while lacking:
            claims = []
            for demand in self._in_name_order:
                if not settled[demand] or not self._rest_wh[demand]:
                    continue
                lines = self._demands[demand].contract.lines
                given = [(line, energy_wh) for (line, _, _), energy_wh in self._given[demand].items()]
                wants = [
                    room_wh if room_wh > 0 and self._open_columns(demand, line.target) else 0
                    for line, room_wh in zip(lines, room_below_plain_share(self._demands[demand], given), strict=True)
                ]
                if sum(wants) > self._rest_wh[demand]:
                    wants = apportion(self._rest_wh[demand], wants)
                for index, want_wh in enumerate(wants):
                    if want_wh:
                        claims.append(_Claim(demand, index, lines[index].target, want_wh))
            lacking = bool(self._serve(claims))

    def substitute(self, settled: Sequence[bool]) -> None:
        """Apply the shortage choices to the rests."""
        short = [demand for demand in self._in_name_order if settled[demand] and self._rest_wh[demand]]
        ranks = max([len(self._demands[demand].contract.substitutes) for demand in short], default=0)
        for rank in range(ranks):
            claims = []
            for demand in short:
                substitutes = self._demands[demand].contract.substitutes
                if rank < len(substitutes) and self._rest_wh[demand]:
                    claims.append(_Claim(demand, None, substitutes[rank], self._rest_wh[demand]))
            self._serve(claims)
        self._serve(
            [
                _Claim(demand, None, SourceGroup.ANY, self._rest_wh[demand])
                for demand in short
                if self._demands[demand].contract.shortage is ShortageChoice.ANY and self._rest_wh[demand]
            ]
        )

    def clearing(self, lacking: Mapping[_Target, int]) -> Clearing:
        """What was given, by line, source and column, each once."""
        taken, picked = [], []
        for given in self._given:
            entries = sorted(given.items())
            taken.append(tuple([Taken(line, source, energy_wh) for (line, source, _), energy_wh in entries]))
            picked.append(tuple([column for (_, _, column), _ in entries]))
        return Clearing(
            tuple(taken),
            {source: lacking[source] for source in Source if source in lacking},
            {group: lacking[group] for group in GROUPS if group in lacking},
            tuple(self._columns),
            tuple(picked),
            {source: max(0, limit - self._margin) for source, limit in self._price_limits.items() if limit is not None},
            self._held_back(),
        )

    def _held_back(self) -> dict[Lot, int]:
        """By lot: what is held back of a column are the last of its Wh that are not free, as it is used in order."""
        held_back: dict[Lot, int] = {}
        for column, energy_wh in enumerate(self._held_back_wh):
            free_wh = self._left[column]
            for lot in reversed(self._columns[column] if energy_wh else ()):
                lot_wh = max(0, self._lots[lot] - free_wh)
                free_wh = max(0, free_wh - self._lots[lot])
                part_wh = min(lot_wh, energy_wh)
                if part_wh:
                    held_back[lot] = part_wh
                    energy_wh -= part_wh
        return held_back

    # Serving claims

    def _open_columns(self, demand: int, target: _Target) -> dict[int, int]:
        """The columns that may serve this demand for this target and are not used up, with their places."""
        sources = target.sources if isinstance(target, SourceGroup) else (target,)
        places = self._places[self._terms_of[demand]]
        return {
            column: place
            for column, place in places.items()
            if self._left[column] and self._source_of[column] in sources
        }

    def _serve(self, claims: Sequence[_Claim], *, note_prices: bool = False) -> dict[_Target, int]:
        """Serve claims that stand at one step; says what each target lacks, where it lacks anything."""
        rows: dict[tuple[int, int, int, tuple[tuple[int, int], ...], bool], list[_Claim]] = {}
        columns_of_terms: dict[tuple[int, _Target], tuple[tuple[int, int], ...]] = {}
        for claim in claims:
            terms = (self._terms_of[claim.demand], claim.target)
            columns = columns_of_terms.get(terms)
            if columns is None:
                columns = tuple(sorted(self._open_columns(claim.demand, claim.target).items()))
                columns_of_terms[terms] = columns
            span = self._demands[claim.demand].span
            group_rank = _GROUP_RANK[claim.target] if isinstance(claim.target, SourceGroup) else 0
            key = (span.end_s, -span.start_s, group_rank, columns, self._waits[claim.demand])
            rows.setdefault(key, []).append(claim)
        points = {point: rank for rank, point in enumerate(sorted({key[:3] for key in rows}))}
        wants = [sum([claim.want_wh for claim in row]) for row in rows.values()]
        ranks = [points[key[:3]] for key in rows]
        columns_of = [[column for column, _ in key[3]] for key in rows]
        amounts = fair_amounts(wants, ranks, columns_of, self._left)
        preferred = [{column: place for column, place in key[3] if place != _NO_PLACE} for key in rows]
        # Single sources are placed before groups look for what is plentiful; and longer windows before shorter ones,
        # since these are given now what they are given, and should leave what the others may need.
        keys = list(rows)
        order = sorted(range(len(wants)), key=lambda row: (keys[row][2], -keys[row][0], keys[row][1]))
        from_columns = serve(
            [amounts[row] for row in order],
            [columns_of[row] for row in order],
            [preferred[row] for row in order],
            self._left,
            self._source_of,
            self._pressures,
        )
        lacking: dict[_Target, int] = {}
        members = list(rows.values())
        for row, taken in zip(order, from_columns, strict=True):
            for claim in self._give(members[row], taken):
                lacking[claim.target] = lacking.get(claim.target, 0) + claim.want_wh
                if note_prices:
                    self._note_price(claim)
        return lacking

    def _give(self, claims: list[_Claim], taken: Mapping[int, int]) -> list[_Claim]:
        """Share out what a row takes from its columns among its claims; returns what remains of them."""
        for column, energy_wh in sorted(taken.items()):
            self._left[column] -= energy_wh
            shares = apportion(energy_wh, [claim.want_wh for claim in claims])
            remaining = []
            for claim, share_wh in zip(claims, shares, strict=True):
                if share_wh and self._waits[claim.demand] and not self._costs_nobody(claim, column):
                    self._held_back_wh[column] += share_wh
                elif share_wh:
                    self._note_given(claim, column, share_wh)
                if share_wh < claim.want_wh:
                    remaining.append(claim._replace(want_wh=claim.want_wh - share_wh))
            claims = remaining
        return claims

    def _note_given(self, claim: _Claim, column: int, energy_wh: int) -> None:
        source = self._source_of[column]
        line = claim.line
        if line is None:
            line = self._demands[claim.demand].contract.line_for(source)
        given = self._given[claim.demand]
        key = (line, source, column)
        given[key] = given.get(key, 0) + energy_wh
        self._rest_wh[claim.demand] -= energy_wh

    def _note_price(self, claim: _Claim) -> None:
        """Remember the highest price at which what is lacking would be taken; None once anybody has no limit."""
        contract = self._demands[claim.demand].contract
        for source in claim.target.sources if isinstance(claim.target, SourceGroup) else (claim.target,):
            limit = contract.highest_price_of(source)
            known = self._price_limits.get(source, 0)
            self._price_limits[source] = None if known is None or limit is None else max(known, limit)
