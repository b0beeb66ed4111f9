"""Twenty brokers in a ring and in a star: shares, money, idle energy, and what the order of messages changes.

`make test` has 200 meters; DENGEN_FULL=1 has 2 000 meters and a week of half hours.
"""

import os
from collections import Counter
from dataclasses import astuple
from pathlib import Path

import pytest

from simulation import audit
from simulation.many import ManyPlan, ManyWorld, many_plan, ring, star
from simulation.many_checks import Fulfilment, check_fulfilment, check_money, digest, every_statement, money
from simulation.world import Books, Plan

FULL = os.environ.get("DENGEN_FULL") == "1"
BROKERS = 20
METERS, INTERVALS = (2_000, 336) if FULL else (200, 48)
REPEATED_INTERVALS = 48 if FULL else 3
"""Of the runs that are made several times."""

SHAPES = {"ring": ring, "star": star}


@pytest.mark.parametrize("shape", SHAPES)
def test_shares_keep_their_bound_books_balance_and_no_asset_idles(shape: str, folder: Path) -> None:
    many = many_plan(SHAPES[shape](BROKERS), METERS, INTERVALS)
    world = ManyWorld(many, folder)
    books = world.run()
    demanded = sum(1 for consumer in many.plan.consumers for energy_wh in consumer.energies_wh)
    assert world.heard.accepted == demanded + sum(len(device.energies_wh) for device in many.plan.devices)
    _check_conservation(many.plan, books)
    statements = every_statement(world)
    check_money(world, statements)
    found = check_fulfilment(world, books)
    assert found.demands == demanded
    # Of these every line has all it wants at the own broker, whatever becomes of the others'.
    assert many.ample <= found.never_short
    assert found.ample_demands > found.demands // 3
    assert found.furthest_wh > 0
    assert (found.idle_here_wh, found.idle_next_wh) == (0, 0), found.idle_where
    _check_against_optimum(world, found)
    assert sum(books.unmatched_wh.values()) > 0, "nothing was short, so nothing was shown"
    assert sum(books.bought_wh.values()) > 0, "no broker bought anything of another"


def _check_against_optimum(world: ManyWorld, found: Fulfilment) -> None:
    intervals = found.in_quotas.against_optimum(world.links).values()
    delivered_wh, best_wh = (sum(column) for column in zip(*map(astuple, intervals), strict=True))
    print(f"{delivered_wh} of {best_wh} Wh inside quotas; {found.idle_choices_next_wh} Wh idle for raised lines")
    assert all(one.delivered_wh <= one.best_wh for one in intervals), "the optimum is none"
    assert 100 * delivered_wh >= 99 * best_wh, f"{delivered_wh} of {best_wh} Wh"
    assert 100 * found.idle_choices_next_wh < best_wh, "raised lines or substitutes could use what idles"


def _check_conservation(plan: Plan, books: Books) -> None:
    """Of each source all that was generated was delivered or is kept; of each consumer all that was demanded."""
    generated: Counter[str] = Counter()
    for device in plan.devices:
        generated[device.source.label] += sum(device.energies_wh)
    found: Counter[str] = Counter()
    for entries in (books.delivered_wh, books.kept_wh):
        for (_, _, label), energy_wh in entries.items():
            found[label] += energy_wh
    assert found == generated
    delivered: Counter[str] = Counter()
    for (meter, _, _), energy_wh in books.delivered_wh.items():
        delivered[meter] += energy_wh
    for (meter, _), energy_wh in books.unmatched_wh.items():
        delivered[meter] += energy_wh
    assert delivered == Counter({one.meter: sum(one.energies_wh) for one in plan.consumers})


def _repeated(shape: str) -> ManyPlan:
    return many_plan(SHAPES[shape](BROKERS), METERS, REPEATED_INTERVALS)


def test_one_seed_gives_the_same_ledger_and_statements_to_the_byte(folder: Path) -> None:
    found = []
    for name in ("one", "two"):
        world = ManyWorld(_repeated("ring"), folder / name, 7)
        world.run()
        found.append((audit.head_of(world), digest(world, every_statement(world))))
    assert found[0] == found[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_order_of_arrival_changes_no_delivery_and_no_statement(shape: str, folder: Path) -> None:
    found = []
    for seed in range(3):
        world = ManyWorld(_repeated(shape), folder / str(seed), seed)
        books = world.run()
        found.append((books, money(every_statement(world))))
    assert found[0] == found[1] == found[2]
