"""Sharing out on a graph: as much as can flow, the fairest fractions, and preferences that cost nobody anything."""

import random
from fractions import Fraction
from itertools import chain, combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.market.flow import fair_amounts, serve

Graph = tuple[list[int], list[int], list[list[int]], list[int]]
"""wants, ranks, columns of each row, capacities."""


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    rows = draw(st.integers(1, 6))
    columns = draw(st.integers(1, 5))
    amount = st.integers(0, 40)
    return (
        draw(st.lists(amount, min_size=rows, max_size=rows)),
        draw(st.lists(st.integers(0, 2), min_size=rows, max_size=rows)),
        [sorted(draw(st.sets(st.integers(0, columns - 1)))) for _ in range(rows)],
        draw(st.lists(amount, min_size=columns, max_size=columns)),
    )


def most(rows: list[int], wants: list[int], columns_of: list[list[int]], capacities: list[int]) -> int:
    """What these rows can get together: the smallest cut, over all sets of rows."""
    sets = chain.from_iterable(combinations(rows, size) for size in range(len(rows) + 1))
    return min(
        sum(capacities[column] for column in {column for row in cut for column in columns_of[row]})
        + sum(wants[row] for row in rows if row not in cut)
        for cut in sets
    )


def slow_fair(graph: Graph) -> list[Fraction]:
    """The definition: by rank, the largest common fraction; freeze the rows of the cuts that it fills; go on."""
    wants, ranks, columns_of, capacities = graph
    share = [Fraction(0)] * len(wants)
    frozen: list[int] = []
    for rank in sorted(set(ranks)):
        active = [row for row in range(len(wants)) if ranks[row] == rank and wants[row]]
        while active:
            cuts = {}
            everyone = active + frozen
            for cut in chain.from_iterable(combinations(everyone, size) for size in range(1, len(everyone) + 1)):
                weight = sum(wants[row] for row in cut if row in active)
                if weight:
                    room = sum(capacities[column] for column in {column for row in cut for column in columns_of[row]})
                    cuts[cut] = (room - sum(share[row] for row in cut if row in frozen)) / Fraction(weight)
            fraction = min(min(cuts.values()), Fraction(1))
            tight = {row for cut, value in cuts.items() if value == fraction for row in cut if row in active}
            for row in tight or set(active):
                share[row] = fraction * wants[row]
            frozen += list(tight or set(active))
            active = [row for row in active if row not in frozen]
    return share


@settings(deadline=None, max_examples=200)
@given(graphs())
def test_rows_get_the_fairest_fractions_but_for_rounding(graph: Graph) -> None:
    wants, ranks, columns_of, capacities = graph
    amounts = fair_amounts(wants, ranks, columns_of, capacities)
    exact = slow_fair(graph)
    # What is rounded in one cut can move a unit or so in the next.
    assert all(abs(amount - share) < len(wants) for amount, share in zip(amounts, exact, strict=True))
    if len(set(ranks)) == 1 and len({tuple(columns) for columns in columns_of}) == 1:
        assert all(abs(amount - share) < 1 for amount, share in zip(amounts, exact, strict=True))


@settings(deadline=None, max_examples=200)
@given(graphs())
def test_every_rank_gets_as_much_as_can_flow_after_the_ranks_before(graph: Graph) -> None:
    wants, ranks, columns_of, capacities = graph
    amounts = fair_amounts(wants, ranks, columns_of, capacities)
    for rank in set(ranks):
        rows = [row for row in range(len(wants)) if ranks[row] <= rank]
        assert sum(amounts[row] for row in rows) == most(rows, wants, columns_of, capacities)
    assert all(0 <= amount <= want for amount, want in zip(amounts, wants, strict=True))


@settings(deadline=None, max_examples=200)
@given(graphs(), st.randoms(use_true_random=False))
def test_serving_gives_the_amounts_and_takes_no_more_than_there_is(graph: Graph, chooser: random.Random) -> None:
    wants, ranks, columns_of, capacities = graph
    amounts = fair_amounts(wants, ranks, columns_of, capacities)
    preferred = [
        {column: place for place, column in enumerate(chooser.sample(columns, chooser.randint(0, len(columns))))}
        for columns in columns_of
    ]
    taken = serve(
        amounts,
        columns_of,
        preferred,
        capacities,
        [column % 2 for column in range(len(capacities))],
        [0] * len(capacities),
    )
    assert [sum(row.values()) for row in taken] == amounts
    for row, columns in zip(taken, columns_of, strict=True):
        assert set(row) <= set(columns)
        assert all(amount > 0 for amount in row.values())
    for column, capacity in enumerate(capacities):
        assert sum(row.get(column, 0) for row in taken) <= capacity


def test_a_row_with_one_choice_is_served_by_rerouting_one_with_two() -> None:
    columns_of = [[0, 1], [0]]
    amounts = fair_amounts([10, 10], [0, 1], columns_of, [10, 10])
    assert amounts == [10, 10]
    assert serve(amounts, columns_of, [{0: 0}, {}], [10, 10], [0, 0], [0, 0]) == [{1: 10}, {0: 10}]


def test_a_preference_is_followed_as_far_as_it_costs_nobody_anything() -> None:
    taken = serve([10, 5], [[0, 1], [0]], [{0: 0}, {}], [10, 10], [0, 0], [0, 0])
    assert taken == [{0: 5, 1: 5}, {0: 5}]


def test_the_first_place_in_an_order_of_preference_comes_before_the_second() -> None:
    assert serve([10], [[0, 1, 2]], [{2: 0, 1: 1}], [10, 10, 4], [0, 0, 0], [0, 0, 0]) == [{2: 4, 1: 6}]


def test_who_prefers_the_same_gets_the_same_fraction_of_it() -> None:
    taken = serve([30, 10], [[0, 1], [0, 1, 2]], [{0: 0}, {0: 0}], [20, 30, 1], [0, 0, 0], [0, 0, 0])
    assert [row[0] for row in taken] == [15, 5]


def test_without_a_preference_a_row_takes_what_is_most_plentiful() -> None:
    assert serve([10], [[0, 1, 2]], [{}], [4, 6, 7], [1, 1, 2], [0, 0, 0]) == [{0: 4, 1: 6}]


def test_what_others_press_for_is_left_to_them_where_that_is_possible() -> None:
    assert serve([10], [[0, 1, 2]], [{}], [4, 6, 7], [1, 1, 2], [0, 3, 0]) == [{0: 4, 2: 6}]


def test_amounts_that_cannot_flow_are_refused() -> None:
    with pytest.raises(ValueError, match="row 0 cannot be given 1 more"):
        serve([11], [[0]], [{}], [10], [0], [0])
