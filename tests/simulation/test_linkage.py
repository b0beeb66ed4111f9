"""What pseudonyms hide and what they do not, measured by an attacker (`linkage`) on the ledger of a recorded day."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from simulation.linkage import (
    WAYS,
    Sighting,
    as_sent,
    attack,
    attack_by_time,
    deliveries_of_batches,
    run_recorded,
)
from simulation.world import World

INTERVALS = 36
Market = tuple[World, list[Sighting], dict[tuple[int, bytes], str]]


@pytest.fixture(scope="module")
def market() -> Iterator[Market]:
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="dengen-linkage-", dir=memory if memory.is_dir() else None))
    yield run_recorded(folder, INTERVALS)
    shutil.rmtree(folder)


def test_the_attacker_has_enough_to_work_with(market: Market) -> None:
    _, found, known = market
    assert len(found) > 1_200
    assert all(attack(found, known, way).guesses > 1_100 for way in WAYS.values())


@pytest.mark.parametrize("way", ["pseudonym, bits in common", "pseudonym, as a number", "order in the batch"])
def test_pseudonyms_and_order_alone_are_no_better_than_chance(market: Market, way: str) -> None:
    _, found, known = market
    score = attack(found, known, WAYS[way])
    assert score.right <= score.bound, score


@pytest.mark.parametrize(
    "way", ["amount", "contract lines and sources", "provider", "price", "amount, lines and provider"]
)
def test_amounts_lines_and_providers_do_help_as_the_page_says(market: Market, way: str) -> None:
    _, found, known = market
    score = attack(found, known, WAYS[way])
    assert score.right > score.bound, score


def test_the_attack_by_order_works_where_deliveries_are_in_the_order_of_meters(market: Market) -> None:
    """Otherwise its failure above would say nothing."""
    _, found, known = market
    score = attack(as_sent(found, known), known, WAYS["order in the batch"])
    assert score.right > 0.8 * score.guesses


def test_the_attack_by_pseudonym_works_where_pseudonyms_stay(market: Market) -> None:
    _, found, known = market
    lasting = [
        Sighting(
            *(one.start_s, one.broker, known[one.start_s, one.pseudonym].encode().ljust(16), one.place, one.rank),
            *(one.demanded_wh, one.lines, one.providers, one.price),
        )
        for one in found
    ]
    names = {(one.start_s, one.pseudonym): one.pseudonym.decode() for one in lasting}
    score = attack(lasting, names, WAYS["pseudonym, bits in common"])
    assert score.right > 0.95 * score.guesses


def test_rounds_of_deliveries_are_counted_apart(market: Market) -> None:
    _, found, known = market
    score = attack_by_time(found, known)
    assert 0 < score.expected < score.guesses
    assert score.right > 0


def test_deliveries_of_a_batch_are_sorted_by_pseudonym(market: Market) -> None:
    world, _, _ = market
    batches = [[delivery.pseudonym for delivery in batch] for batch in deliveries_of_batches(world)]
    assert sum(len(batch) > 5 for batch in batches) > INTERVALS
    for pseudonyms in batches:
        assert pseudonyms == sorted(pseudonyms)


def test_no_pseudonym_comes_twice(market: Market) -> None:
    _, found, known = market
    assert len({one.pseudonym for one in found}) == len(found)
    assert len(set(known.values())) == 36
