"""The most that a market of many brokers could have delivered inside its lines' quotas, by linear programming.

Interval by interval, since contracts there have windows of one interval: what each broker's lines wanted (the quotas as
the run itself came to them), what was generated, and who can reach whom. An order passes three brokers at most, so a
broker can have what is at most two links away.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import lil_matrix

from broker.protocol.sources import Source, SourceGroup

REACH_LINKS = 2

Wants = dict[tuple[str, Source | SourceGroup], int]
"""Wh by broker and line target."""

Made = dict[tuple[str, Source], int]
"""Wh by broker and source."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Wh inside quotas, of one interval."""

    delivered_wh: int
    best_wh: int


def reachable(links: Mapping[str, Sequence[str]], broker: str) -> set[str]:
    """The brokers whose energy can come to that one, itself included."""
    found = {broker}
    edge = found
    for _ in range(REACH_LINKS):
        edge = {other for name in edge for other in links[name]}
        found = found | edge
    return found


def best_wh(wants: Wants, made: Made, links: Mapping[str, Sequence[str]]) -> int:
    """The optimum of one interval."""
    lines = [(key, energy_wh) for key, energy_wh in wants.items() if energy_wh]
    stocks = [(key, energy_wh) for key, energy_wh in made.items() if energy_wh]
    near = {broker: reachable(links, broker) for broker in links}
    pairs = [
        (row, column)
        for row, ((broker, target), _) in enumerate(lines)
        for column, ((owner, source), _) in enumerate(stocks)
        if owner in near[broker] and source in (target.sources if isinstance(target, SourceGroup) else (target,))
    ]
    if not pairs:
        return 0
    limits = lil_matrix((len(lines) + len(stocks), len(pairs)))
    for place, (row, column) in enumerate(pairs):
        limits[row, place] = limits[len(lines) + column, place] = 1
    most = [energy_wh for _, energy_wh in (*lines, *stocks)]
    return round(-linprog(-np.ones(len(pairs)), A_ub=limits.tocsr(), b_ub=most).fun)


@dataclass(slots=True)
class Books:
    """What is gathered from a run, by start of the interval."""

    wants: dict[int, Wants]
    made: dict[int, Made]
    delivered_wh: dict[int, int]

    @classmethod
    def empty(cls) -> "Books":
        return cls(defaultdict(lambda: defaultdict(int)), defaultdict(lambda: defaultdict(int)), defaultdict(int))

    def against_optimum(self, links: Mapping[str, Sequence[str]]) -> dict[int, Comparison]:
        """Each interval's delivery beside the best possible."""
        return {
            start_s: Comparison(self.delivered_wh[start_s], best_wh(wants, self.made[start_s], links))
            for start_s, wants in sorted(self.wants.items())
        }
