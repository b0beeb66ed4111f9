"""Sharing out scarce goods of several kinds fairly among takers of whom not each can use every kind. Pure, integers.

The picture is a small graph: *rows* want amounts, *columns* have amounts, and each row can use certain columns. What
rows can get together is limited by cuts: some rows want more than all columns that they can use hold. `fair_amounts`
gives as much as any way of serving could give, and shares it out lexicographically fair: the largest fraction of their
wants at which all rows can be served; those that cannot get more keep it, and the others go on. `serve` then finds
which row takes from which column.

Theory. The amounts that rows can be given form a polymatroid (the rank of a set of rows is the largest flow into it),
so serving one rank of rows after the other, without ever taking back, loses nothing of the total. The fraction is
found by Newton's method on cuts: start with all that is wanted; while that cannot flow, the cut that stops it says
which fraction at most its rows can have. Fractions stay exact, since amounts are multiplied by the denominator.
Rounding goes down, and the units that are missing go to the largest remainders as far as they can flow.

The graph is meant to be small: callers put everybody with the same choice into one row, and everything that is open to
the same rows into one column.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Final

_NOBODY: Final = -1

_COST_OF_OTHERS: Final = 1_000
"""Of a column that a row does not prefer; places in an order of preference are far below it."""


class _Flow:
    """A flow from rows to columns, grown by paths that reroute but never take from a row what it has."""

    def __init__(self, columns_of: Sequence[Sequence[int]], capacities: Sequence[int]) -> None:
        self.columns_of = columns_of
        self.free = list(capacities)
        self.rows_in: list[dict[int, int]] = [{} for _ in capacities]
        """By column: row to amount."""
        self._closed = [False] * len(capacities)
        """Columns from which nothing free can be reached; that stays so, since flow into them never shrinks."""

    def push(self, row: int, amount: int) -> int:
        """Give a row up to `amount` more; returns what could not be given."""
        while amount:
            path = self._path(row)
            if not path:
                break
            part = min(amount, self.free[path[-1][1]])
            for (_, column), (other, _) in pairwise(path):
                part = min(part, self.rows_in[column][other])
            for index, (taker, column) in enumerate(path):
                self._add(column, taker, part)
                if index:
                    self._add(path[index - 1][1], taker, -part)
            self.free[path[-1][1]] -= part
            amount -= part
        return amount

    def _add(self, column: int, row: int, amount: int) -> None:
        rows = self.rows_in[column]
        rows[row] = rows.get(row, 0) + amount
        if not rows[row]:
            del rows[row]

    def _path(self, row: int) -> list[tuple[int, int]]:
        """The shortest way to a column with something free, as (row, column it takes from): each but the first row
        gives up as much in the column before. Empty if there is none."""
        came_from: dict[int, tuple[int, int]] = {}
        rows_seen = {row}
        waiting = deque([(row, _NOBODY)])
        while waiting:
            taker, left_column = waiting.popleft()
            for column in self.columns_of[taker]:
                if column in came_from or self._closed[column]:
                    continue
                came_from[column] = (taker, left_column)
                if self.free[column]:
                    path = []
                    while column != _NOBODY:
                        taker, before = came_from[column]
                        path.append((taker, column))
                        column = before
                    return path[::-1]
                for other in self.rows_in[column]:
                    if other not in rows_seen:
                        rows_seen.add(other)
                        waiting.append((other, column))
        for column in came_from:
            self._closed[column] = True
        return []

    def reached_from(self, rows: Sequence[int]) -> tuple[set[int], set[int]]:
        """The rows and columns that stand in the way of these rows getting more: all that a path from them reaches."""
        seen_rows, seen_columns = set(rows), set[int]()
        waiting = list(rows)
        while waiting:
            for column in self.columns_of[waiting.pop()]:
                if column not in seen_columns:
                    seen_columns.add(column)
                    new = [other for other in self.rows_in[column] if other not in seen_rows]
                    seen_rows.update(new)
                    waiting.extend(new)
        return seen_rows, seen_columns

    def rows_that_can_grow(self) -> set[int]:
        """Rows from which a path leads to something free."""
        users: list[list[int]] = [[] for _ in self.free]
        for row, columns in enumerate(self.columns_of):
            for column in columns:
                users[column].append(row)
        columns_held: list[list[int]] = [[] for _ in self.columns_of]
        for column, rows in enumerate(self.rows_in):
            for row in rows:
                columns_held[row].append(column)
        good_columns = {column for column, free in enumerate(self.free) if free}
        waiting = list(good_columns)
        good_rows: set[int] = set()
        while waiting:
            for row in users[waiting.pop()]:
                if row not in good_rows:
                    good_rows.add(row)
                    new = [column for column in columns_held[row] if column not in good_columns]
                    good_columns.update(new)
                    waiting.extend(new)
        return good_rows


def fair_amounts(
    wants: Sequence[int], ranks: Sequence[int], columns_of: Sequence[Sequence[int]], capacities: Sequence[int]
) -> list[int]:
    """What each row gets, at most its want. Rows of a lower rank are served before those of a higher one.

    Ties of remainders go to the row that comes first. All rows together get as much as can flow at all.
    """
    amounts = [0] * len(wants)
    served: list[int] = []
    for rank in sorted(set(ranks)):
        active = [row for row in range(len(wants)) if ranks[row] == rank and wants[row]]
        while active:
            above, below, tight = _largest_fraction(active, wants, served, amounts, columns_of, capacities)
            _give_rounded(tight, above, below, wants, served, amounts, columns_of, capacities)
            served.extend(tight)
            active = [row for row in active if row not in set(tight)]
    return amounts


def _filled(
    scale: int,
    rows: Sequence[tuple[int, int]],
    columns_of: Sequence[Sequence[int]],
    capacities: Sequence[int],
) -> tuple[_Flow, list[int]]:
    """A flow in which these (row, amount) are served in turn, capacities scaled; and the rows that lack something."""
    flow = _Flow(columns_of, [capacity * scale for capacity in capacities])
    return flow, [row for row, amount in rows if flow.push(row, amount)]


def _largest_fraction(
    active: Sequence[int],
    wants: Sequence[int],
    served: Sequence[int],
    amounts: Sequence[int],
    columns_of: Sequence[Sequence[int]],
    capacities: Sequence[int],
) -> tuple[int, int, list[int]]:
    """The largest fraction (above, below) of their wants that all active rows can have, and who cannot have more."""
    above, below = 1, 1
    while True:
        rows = [(row, amounts[row] * below) for row in served] + [(row, wants[row] * above) for row in active]
        flow, lacking = _filled(below, rows, columns_of, capacities)
        if not lacking:
            break
        cut_rows, cut_columns = flow.reached_from(lacking)
        above = sum([capacities[column] for column in cut_columns])
        above -= sum([amounts[row] for row in served if row in cut_rows])
        below = sum([wants[row] for row in active if row in cut_rows])
    if above >= below:
        return 1, 1, list(active)
    can_grow = flow.rows_that_can_grow()
    return above, below, [row for row in active if row not in can_grow]


def _give_rounded(
    tight: Sequence[int],
    above: int,
    below: int,
    wants: Sequence[int],
    served: Sequence[int],
    amounts: list[int],
    columns_of: Sequence[Sequence[int]],
    capacities: Sequence[int],
) -> None:
    """Give these rows their fraction, rounded down, and the missing units to the largest remainders that they fit."""
    remainders = {}
    for row in tight:
        amounts[row], remainders[row] = divmod(wants[row] * above, below)
    missing = sum(remainders.values()) // below
    if not missing:
        return
    flow, _ = _filled(1, [(row, amounts[row]) for row in (*served, *tight)], columns_of, capacities)
    # Sorting is stable: of equal remainders the row that comes first.
    for row in sorted(tight, key=remainders.__getitem__, reverse=True):
        if missing and remainders[row] and not flow.push(row, 1):
            amounts[row] += 1
            missing -= 1


def serve(
    amounts: Sequence[int],
    columns_of: Sequence[Sequence[int]],
    preferred_of: Sequence[Mapping[int, int]],
    capacities: Sequence[int],
    kinds: Sequence[int],
    pressures: Sequence[int],
) -> list[dict[int, int]]:
    """Which columns each row takes its amount from: by row, column to amount.

    `amounts` can flow, as those of `fair_amounts` do. `preferred_of` has by row the columns that it prefers with their
    place in its order, 0 for the first. As much as possible comes from them, and the first places are shared out fairly
    among the rows; else a row takes the column with the least of `pressures`, of equal ones what is most plentiful by
    the columns' `kinds`, ties by kind.
    """
    plan = _Plan(columns_of, preferred_of, capacities, kinds, pressures)
    if any(preferred_of):
        preferred_columns = [[column for column, place in sorted(of.items()) if not place] for of in preferred_of]
        with_preferred = fair_amounts(amounts, [0] * len(amounts), preferred_columns, capacities)
        flow, _ = _filled(1, list(enumerate(with_preferred)), preferred_columns, capacities)
        for column, rows in enumerate(flow.rows_in):
            for row, amount in rows.items():
                plan.take(row, column, amount)
    for row, amount in enumerate(amounts):
        plan.fill(row, amount - sum(plan.taken[row].values()))
    return plan.taken


class _Plan:
    """Who takes what from where, kept so that no other way of taking the same amounts follows the preferences better.

    Each filling goes the cheapest way (Bellman-Ford over the graph of what could still be moved, where a step into a
    column costs its place in the row's order, and a step out of it gains that back).
    """

    def __init__(
        self,
        columns_of: Sequence[Sequence[int]],
        preferred_of: Sequence[Mapping[int, int]],
        capacities: Sequence[int],
        kinds: Sequence[int],
        pressures: Sequence[int],
    ) -> None:
        self._columns_of = columns_of
        self._preferred_of = preferred_of
        self._anyone_prefers = any(preferred_of)
        self._free = list(capacities)
        self._kinds = kinds
        self._pressures = pressures
        self._free_of_kind: dict[int, int] = {}
        for kind, capacity in zip(kinds, capacities, strict=True):
            self._free_of_kind[kind] = self._free_of_kind.get(kind, 0) + capacity
        self._plenty: dict[int, int] = {}
        self.taken: list[dict[int, int]] = [{} for _ in columns_of]
        self._rows_in: list[set[int]] = [set() for _ in capacities]

    def take(self, row: int, column: int, amount: int) -> None:
        """The row takes so much more from the column (less, if it is negative)."""
        taken = self.taken[row].get(column, 0) + amount
        if taken:
            self.taken[row][column] = taken
            self._rows_in[column].add(row)
        else:
            self.taken[row].pop(column, None)
            self._rows_in[column].discard(row)
        self._free[column] -= amount
        self._free_of_kind[self._kinds[column]] -= amount

    def fill(self, row: int, amount: int) -> None:
        """Give the row so much more. Raises ValueError if it cannot flow, since then `amounts` was wrong."""
        # What is most plentiful at first is taken until it is used up, then the next.
        self._plenty = dict(self._free_of_kind)
        while amount:
            path = self._direct(row) or self._cheapest(row)
            if not path:
                raise ValueError(f"row {row} cannot be given {amount} more")
            part = min(amount, self._free[path[-1][1]])
            for (_, column), (other, _) in pairwise(path):
                part = min(part, self.taken[other][column])
            for index, (taker, column) in enumerate(path):
                self.take(taker, column, part)
                if index:
                    self.take(taker, path[index - 1][1], -part)
            amount -= part

    def _direct(self, row: int) -> list[tuple[int, int]]:
        """The most plentiful column that has something free; only where nobody's preference could speak against it."""
        free = [column for column in self._columns_of[row] if self._free[column]]
        if self._anyone_prefers or not free:
            return []
        return [(row, min(free, key=self._plenty_first))]

    def _plenty_first(self, column: int) -> tuple[int, int, int, int]:
        kind = self._kinds[column]
        return self._pressures[column], -self._plenty[kind], kind, column

    def _cost(self, row: int, column: int) -> int:
        return self._preferred_of[row].get(column, _COST_OF_OTHERS)

    def _cheapest(self, row: int) -> list[tuple[int, int]]:
        """The way as in `_Flow._path`, with the least cost, of these the shortest, then to what is most plentiful."""
        reached: dict[int, tuple[int, int]] = {}
        """By column: cost and number of steps of the best way found so far."""
        came_from: dict[int, tuple[int, int]] = {}
        waiting = deque([(row, _NOBODY)])
        while waiting:
            taker, left_column = waiting.popleft()
            cost, steps = reached[left_column] if left_column != _NOBODY else (0, 0)
            if left_column != _NOBODY:
                cost -= self._cost(taker, left_column)
            for column in self._columns_of[taker]:
                to_here = (cost + self._cost(taker, column), steps + 1)
                if column != left_column and (column not in reached or to_here < reached[column]):
                    reached[column] = to_here
                    came_from[column] = (taker, left_column)
                    waiting.extend([(other, column) for other in sorted(self._rows_in[column])])
        free = [column for column in reached if self._free[column]]
        if not free:
            return []
        column = min(free, key=lambda column: (reached[column], self._plenty_first(column)))
        path = []
        while column != _NOBODY:
            taker, before = came_from[column]
            path.append((taker, column))
            column = before
        return path[::-1]
