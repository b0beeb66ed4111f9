"""Clearing: which Wh of which source go to which consumer, for all consumers of a broker at once.

Two steps, both pure functions of what was accepted. `fill_lines` runs at gate 1, and again whenever a neighbour's
energy or late generation has come; it fills the quotas that the mix decision made. `settle` runs at gate 2: it fills
what can still be filled, and then applies what the contracts say about shortage. What even that leaves is unmatched.

Who is served when there is not enough, in this order:

1. Lines of a single source, source by source.
2. Lines of a group: `renewable` and `fossil` first, then `any`, which can use whatever is left. A group takes the
   source with most Wh left until that is used up, then the next. Since the groups contain one another or do not meet
   at all, this order fills as many Wh as any order could.
3. (Only `settle`.) Lines that are below their plain share of this demand because another line was catching up: what
   that line could not get is theirs, up to the plain share. A dark month of solar must not starve wind.
4. (Only `settle`.) Substitutes by their rank in each contract, then `any` for those who chose that. Such a Wh counts
   for the line that covers its source, or for none (NO_LINE).

This module is for the usual case, in which any energy of the right source and interval will do. `matching` does the
same for demands that do not take everything (providers, prices, windows), and hands what is plain to this one.

Wherever a source cannot serve everyone who stands at the same point, it is apportioned in proportion to what each still
wants, ties by meter name. Hence the order of the input changes nothing, and splitting a consumption over several meters
gains nothing but a rounded Wh.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from broker.market.contracts import Contract, History, ShortageChoice
from broker.market.lots import Lot
from broker.market.mix import apportion, plain_shares
from broker.market.windows import ALWAYS, Span
from broker.protocol.messages import NO_LINE
from broker.protocol.sources import Source, SourceGroup

GROUPS: Final = (SourceGroup.RENEWABLE, SourceGroup.FOSSIL, SourceGroup.ANY)
"""In the order of service: who can use less comes first."""

_LINE_OF_SOURCE: Final = -1
"""In a claim: the line is whichever one covers the source that is given."""


class Taken(NamedTuple):
    """Wh of one source for one contract line (NO_LINE: a substitute that no line covers).

    A named tuple like `market.stock.HeldSlice`, and for the same reason.
    """

    line: int
    source: Source
    energy_wh: int


@dataclass(frozen=True, slots=True)
class OpenDemand:
    """A demand that is not settled yet, with what it has been given so far.

    `quotas` is what `mix.quotas` made of `history` and `energy_wh`; all lines' quotas add up to `energy_wh`. Raises
    ValueError if they do not. `start_s` is the start of its interval and `span` that of its contract's window; they
    matter only to `matching`, which is given energy of several intervals. So does `waits`: its window goes on, so
    that energy is only held back for it, until it is clear who needs what.
    """

    meter: str
    energy_wh: int
    contract: Contract
    quotas: tuple[int, ...]
    history: History
    taken: tuple[Taken, ...] = ()
    start_s: int = 0
    span: Span = ALWAYS
    waits: bool = False

    def __post_init__(self) -> None:
        if len(self.quotas) != len(self.contract.lines) or sum(self.quotas) != self.energy_wh:
            raise ValueError(f"{self.meter}: quotas {self.quotas} do not divide {self.energy_wh} Wh over its lines")


@dataclass(frozen=True, slots=True)
class Clearing:
    """What one step gives, and what the lines still lacked before any shortage choice.

    `taken` has one entry per demand in the order of the input: what is new in this step, by line and source.
    `shortages` and `group_shortage_wh` say what neighbours should be asked for; nothing stands in them with 0 Wh.

    Where it matters whose energy a demand gets, `picked` has for each entry of `taken` the place in `columns` of the
    lots that it has to come from, and otherwise both are empty: then any energy of the source will do. `price_limits`
    has the sources of which nobody who lacks something takes any that the broker pays more for, in µ-currency per kWh.
    `held_back` has the Wh of lots that demands which wait would be given now.
    """

    taken: tuple[tuple[Taken, ...], ...]
    shortages: dict[Source, int]
    group_shortage_wh: dict[SourceGroup, int]
    columns: tuple[tuple[Lot, ...], ...] = ()
    picked: tuple[tuple[int, ...], ...] = ()
    price_limits: dict[Source, int] = field(default_factory=dict)
    held_back: dict[Lot, int] = field(default_factory=dict)


_Claim = tuple[int, int, int]
"""One consumer's wish at one point of the order: (index into the demands, line, Wh wanted).

A plain tuple, because a scarce interval makes several per demand and a frozen dataclass takes ten times as long.
"""

_Claims = dict[Source | SourceGroup, list[_Claim]]
"""Claims by what they are on, each list in the order of the meters' names."""


def fill_lines(demands: Sequence[OpenDemand], available: Mapping[Source, int]) -> Clearing:
    """Fill what is unfilled of the quotas from `available` Wh per source. Substitutes nothing.

    Raises ValueError if two demands are of the same meter, since its name decides ties.
    """
    _require_one_of_each_meter(demands)
    wanted = unfilled_quotas(demands)
    clearing = _fill_ample(demands, wanted, available)
    if clearing is not None:
        return clearing
    board = _Board(demands, wanted, available)
    return board.clearing(board.fill(wanted))


def settle(demands: Sequence[OpenDemand], available: Mapping[Source, int]) -> Clearing:
    """Fill the quotas, then raise other lines, then apply each contract's shortage choice.

    What a demand has after this less than `energy_wh` is unmatched. Raises ValueError like `fill_lines`.
    """
    _require_one_of_each_meter(demands)
    wanted = unfilled_quotas(demands)
    clearing = _fill_ample(demands, wanted, available)
    if clearing is not None:
        return clearing
    board = _Board(demands, wanted, available)
    lacking = board.fill(wanted)
    board.raise_to_plain_share()
    board.substitute()
    return board.clearing(lacking)


def _require_one_of_each_meter(demands: Sequence[OpenDemand]) -> None:
    if len({demand.meter for demand in demands}) != len(demands):
        raise ValueError("two demands of one meter in one clearing; merge them, since the meter's name decides ties")


def unfilled_quotas(demands: Sequence[OpenDemand]) -> list[Sequence[int]]:
    """Per demand and line, the Wh of the quota that nothing was taken for. They add up to the demand's own rest."""
    wanted: list[Sequence[int]] = []
    for demand in demands:
        if not demand.taken:
            wanted.append(demand.quotas)
            continue
        unfilled = list(demand.quotas)
        rest_wh = demand.energy_wh
        for taken in demand.taken:
            rest_wh -= taken.energy_wh
            if taken.line != NO_LINE:
                unfilled[taken.line] -= taken.energy_wh
        unfilled = [max(0, line_wh) for line_wh in unfilled]
        # Where other lines were raised or substitutes came, less is open than the quotas say.
        wanted.append(unfilled if sum(unfilled) == rest_wh else apportion(rest_wh, unfilled))
    return wanted


def _fill_ample(
    demands: Sequence[OpenDemand], wanted: Sequence[Sequence[int]], available: Mapping[Source, int]
) -> Clearing | None:
    """The short cut for when every line is served from one source that has enough; None where that is not so.

    Gives exactly what `_Board` would, without its claims, sorting and apportioning.
    """
    totals: dict[Source | SourceGroup, int] = dict.fromkeys((*Source, *SourceGroup), 0)
    for demand, wants in zip(demands, wanted, strict=True):
        for line, want_wh in zip(demand.contract.lines, wants, strict=True):
            totals[line.target] += want_wh
    left = {source: available.get(source, 0) - totals[source] for source in Source}
    if min(left.values()) < 0:
        return None
    served_by: dict[Source | SourceGroup, Source] = {source: source for source in Source}
    for group in GROUPS:
        served_by[group] = max(group.sources, key=left.__getitem__)
        left[served_by[group]] -= totals[group]
        if left[served_by[group]] < 0:
            return None
    taken = []
    for demand, wants in zip(demands, wanted, strict=True):
        new = []
        for index, line in enumerate(demand.contract.lines):
            if wants[index]:
                new.append(Taken(index, served_by[line.target], wants[index]))
        taken.append(tuple(new))
    return Clearing(tuple(taken), {}, {})


class _Board:
    """What one clearing works on: Wh left per source, and per demand what it was given and what it still lacks."""

    __slots__ = ("demands", "given", "in_name_order", "left", "rest_wh")

    def __init__(
        self, demands: Sequence[OpenDemand], wanted: Sequence[Sequence[int]], available: Mapping[Source, int]
    ) -> None:
        self.demands = demands
        self.left = {source: available.get(source, 0) for source in Source}
        self.given: list[list[tuple[int, Source, int]]] = [[] for _ in demands]
        self.rest_wh = [sum(wants) for wants in wanted]
        # Claims are made in this order and keep it, so that ties go by name wherever something is apportioned.
        self.in_name_order = sorted(range(len(demands)), key=[demand.meter for demand in demands].__getitem__)

    def fill(self, wanted: Sequence[Sequence[int]]) -> dict[Source | SourceGroup, int]:
        """Points 1 and 2 of the order. Says what each target lacks, where it lacks anything."""
        claims: _Claims = {}
        for demand in self.in_name_order:
            wants = wanted[demand]
            for index, line in enumerate(self.demands[demand].contract.lines):
                if wants[index]:
                    claims.setdefault(line.target, []).append((demand, index, wants[index]))
        return self._serve(claims)

    def raise_to_plain_share(self) -> None:
        """Point 3: give the rests to lines below their plain share, as far as there is anything for them.

        In rounds, because what one line cannot get falls to the demand's other lines. A round that leaves a claim open
        has used up a source, so there are at most as many rounds as sources, and one more.
        """
        lacking = True
        while lacking:
            supplied = self._supplied_targets()
            claims: _Claims = {}
            for demand in self.in_name_order:
                if not self.rest_wh[demand]:
                    continue
                wants = self._room_below_plain_share(demand, supplied)
                if sum(wants) > self.rest_wh[demand]:
                    wants = apportion(self.rest_wh[demand], wants)
                lines = self.demands[demand].contract.lines
                for index, want_wh in enumerate(wants):
                    if want_wh:
                        claims.setdefault(lines[index].target, []).append((demand, index, want_wh))
            lacking = bool(self._serve(claims))

    def substitute(self) -> None:
        """Point 4: apply the shortage choices to the rests."""
        short = [demand for demand in self.in_name_order if self.rest_wh[demand]]
        ranks = max([len(self.demands[demand].contract.substitutes) for demand in short], default=0)
        for rank in range(ranks):
            claims: _Claims = {}
            for demand in short:
                substitutes = self.demands[demand].contract.substitutes
                if rank < len(substitutes) and self.rest_wh[demand]:
                    claim = (demand, _LINE_OF_SOURCE, self.rest_wh[demand])
                    claims.setdefault(substitutes[rank], []).append(claim)
            self._serve(claims)
        of_any = [
            (demand, _LINE_OF_SOURCE, self.rest_wh[demand])
            for demand in short
            if self.demands[demand].contract.shortage is ShortageChoice.ANY and self.rest_wh[demand]
        ]
        self._serve({SourceGroup.ANY: of_any})

    def clearing(self, lacking: Mapping[Source | SourceGroup, int]) -> Clearing:
        """What was given, in canonical form: by line and source, each pair once."""
        return Clearing(
            tuple([_as_taken(given) for given in self.given]),
            {source: lacking[source] for source in Source if source in lacking},
            {group: lacking[group] for group in GROUPS if group in lacking},
        )

    def _serve(self, claims: _Claims) -> dict[Source | SourceGroup, int]:
        """Serve claims on single sources, then on groups; says what each target lacks, where it lacks anything."""
        lacking: dict[Source | SourceGroup, int] = {}
        for target in (*Source, *GROUPS):
            waiting = claims.get(target, [])
            if isinstance(target, SourceGroup):
                # Sorting is stable: of two equally plentiful sources the one with the lower code comes first.
                sources = sorted(target.sources, key=self.left.__getitem__, reverse=True)
            else:
                sources = [target]
            for source in sources:
                waiting = self._serve_from(source, waiting)
            if waiting:
                lacking[target] = sum([want_wh for _, _, want_wh in waiting])
        return lacking

    def _serve_from(self, source: Source, claims: list[_Claim]) -> list[_Claim]:
        """Give out what is left of `source`, pro rata if it is not enough; returns the claims that remain."""
        stock_wh = self.left[source]
        if not claims or not stock_wh:
            return claims
        shares = [want_wh for _, _, want_wh in claims]
        wanted_wh = sum(shares)
        remaining = []
        if wanted_wh > stock_wh:
            shares = apportion(stock_wh, shares)
            remaining = [
                (demand, line, want_wh - share_wh)
                for (demand, line, want_wh), share_wh in zip(claims, shares, strict=True)
                if share_wh < want_wh
            ]
        self.left[source] = max(0, stock_wh - wanted_wh)
        for (demand, line, _), share_wh in zip(claims, shares, strict=True):
            if share_wh:
                if line == _LINE_OF_SOURCE:
                    line = self.demands[demand].contract.line_for(source)
                self.given[demand].append((line, source, share_wh))
                self.rest_wh[demand] -= share_wh
        return remaining

    def _room_below_plain_share(self, demand: int, supplied: Container[Source | SourceGroup]) -> list[int]:
        """Per line, how many Wh it is below its plain share of this demand; zero where there is nothing left for it."""
        contract = self.demands[demand].contract
        room = room_below_plain_share(self.demands[demand], [(line, wh) for line, _, wh in self.given[demand]])
        return [
            room_wh if room_wh > 0 and line.target in supplied else 0
            for line, room_wh in zip(contract.lines, room, strict=True)
        ]

    def _supplied_targets(self) -> set[Source | SourceGroup]:
        """The sources, and the groups with a source, of which anything is left."""
        supplied: set[Source | SourceGroup] = {source for source in Source if self.left[source]}
        supplied.update([group for group in GROUPS if any(source in supplied for source in group.sources)])
        return supplied


def room_below_plain_share(demand: OpenDemand, given: Iterable[tuple[int, int]]) -> list[int]:
    """Per line, how many Wh it is below its plain share of this demand (less than 0 if above), after (line, Wh)."""
    room = list(plain_shares(demand.contract.shares_ppm, demand.energy_wh))
    for taken in demand.taken:
        if taken.line != NO_LINE:
            room[taken.line] -= taken.energy_wh
    for line, energy_wh in given:
        if line != NO_LINE:
            room[line] -= energy_wh
    return room


def _as_taken(given: list[tuple[int, Source, int]]) -> tuple[Taken, ...]:
    """Merged by line and source, and in that order."""
    given.sort()
    merged: list[Taken] = []
    for line, source, energy_wh in given:
        if merged and merged[-1].line == line and merged[-1].source is source:
            energy_wh += merged.pop().energy_wh
        merged.append(Taken(line, source, energy_wh))
    return tuple(merged)
