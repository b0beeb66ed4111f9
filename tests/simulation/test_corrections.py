"""Demands and readings that turn out to have been another amount, with brokers that are killed on the way."""

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from broker.ledger import made
from broker.ledger.rules import generation
from broker.market.windows import Span, Window
from broker.protocol.messages import DeliveryState, Quality, ReceiptStatus
from broker.protocol.sources import Source
from broker.service.accounts import ledger_faults
from broker.service.store import BrokerStore
from simulation import audit
from simulation.plans import PAIR, TRIO
from simulation.simulated_mqtt import Faults
from simulation.world import (
    GATE_1_S,
    GATE_2_S,
    INTERVAL_S,
    T0,
    Books,
    BrokerProcess,
    ConsumerPlan,
    DevicePlan,
    Killed,
    Plan,
    World,
)

FULL = os.environ.get("DENGEN_FULL") == "1"
MINUTE_S = 60
SMALL = Plan(
    ("east",),
    "east",
    (
        ConsumerPlan("anna", "east", (("solar", 50), ("wind", 50)), (400, 300, 300)),
        ConsumerPlan("ben", "east", (("wind", 100),), (200, 100, 100)),
    ),
    (
        DevicePlan("mill", "ola", "east", Source.WIND, (700, 500, 500)),
        DevicePlan("roof", "ola", "east", Source.SOLAR, (700, 500, 500)),
    ),
)


def correct(world: World, meter: str, index: int, revision: int, energy_wh: int, at_s: int) -> None:
    """Have a meter send an interval anew, `at_s` after the interval's end."""
    start_s = T0 + index * INTERVAL_S
    value = world.meter_value(meter, start_s, energy_wh, revision=revision)
    world.send(meter, value, start_s + INTERVAL_S + at_s)


at_any_time = pytest.mark.parametrize(
    "at_s",
    [MINUTE_S, GATE_1_S + MINUTE_S, GATE_2_S + MINUTE_S, 3 * INTERVAL_S],
    ids=["before gate 1", "between the gates", "after gate 2", "hours later"],
)
"""When a correction comes, in seconds after the interval's end."""


def given_wh(books: Books, meter: str, start_s: int) -> int:
    return sum(wh for (name, at_s, _), wh in books.delivered_wh.items() if (name, at_s) == (meter, start_s))


@at_any_time
@pytest.mark.parametrize("energy_wh", [0, 130, 390, 400, 450, 900, 1_100])
def test_a_demand_is_corrected_at_any_time_and_to_any_amount(folder: Path, at_s: int, energy_wh: int) -> None:
    world = World(SMALL, folder)
    correct(world, "anna", 0, 1, energy_wh, at_s)
    books = world.run(T0 + 6 * INTERVAL_S)
    accounts = audit.check(world, books)
    audit.check_certificates(world, books)
    # Of 700 Wh of wind 200 are ben's.
    unmatched_wh = max(0, energy_wh // 2 - 500)
    assert books.unmatched_wh["anna", T0] == unmatched_wh
    assert given_wh(books, "anna", T0) == energy_wh - unmatched_wh
    last = accounts.closed["east", T0][-1]
    assert last.demanded_wh == energy_wh + 200
    told = world.meters["anna"].final[T0]
    assert (told.revision, told.demanded_wh) == (1, energy_wh)


def test_a_correction_of_a_demand_after_the_deadline_is_refused_with_the_reason(folder: Path) -> None:
    world = World(SMALL, folder)
    world.genesis = replace(world.genesis, correction_deadline_s=INTERVAL_S)
    (folder / "genesis.cbor").write_bytes(world.genesis.to_bytes())
    correct(world, "anna", 0, 1, 500, 3 * INTERVAL_S)
    books = world.run(T0 + 6 * INTERVAL_S)
    audit.check(world, books)
    (receipt,) = world.meters["anna"].refused.values()
    assert receipt.status is ReceiptStatus.REFUSED
    assert receipt.reason is not None
    assert "correction deadline" in receipt.reason


def test_a_revision_that_overtakes_the_ones_before_it_counts_and_they_do_not(folder: Path) -> None:
    plan = replace(SMALL, late_s={("anna", 0): 2 * INTERVAL_S})
    world = World(plan, folder)
    correct(world, "anna", 0, 2, 250, GATE_2_S + MINUTE_S)
    correct(world, "anna", 0, 1, 350, INTERVAL_S)
    books = world.run(T0 + 6 * INTERVAL_S)
    accounts = audit.check(world, books)
    audit.check_certificates(world, books)
    assert given_wh(books, "anna", T0) == 250
    assert accounts.closed["east", T0][-1].demanded_wh == 450


def test_a_missing_demand_counts_nothing_until_the_agent_sends_an_estimate(folder: Path) -> None:
    plan = replace(SMALL, consumers=(SMALL.consumers[1], replace(SMALL.consumers[0], energies_wh=())))
    world = World(plan, folder)
    missing = world.meter_value("anna", T0, 0, quality=Quality.MISSING)
    world.send("anna", missing, T0 + INTERVAL_S)
    estimated = world.meter_value("anna", T0, 320, quality=Quality.ESTIMATED, revision=1)
    world.send("anna", estimated, T0 + 3 * INTERVAL_S)
    books = world.run(T0 + 5 * INTERVAL_S)
    accounts = audit.check(world, books)
    audit.check_certificates(world, books)
    assert given_wh(books, "anna", T0) == 320
    assert [(close.demands, close.demanded_wh) for close in accounts.closed["east", T0]] == [(2, 200), (2, 520)]


@pytest.mark.parametrize("window", [Window.DAY, Window.MONTH])
def test_an_open_demand_without_any_slice_is_corrected_down_and_closed_with_less(folder: Path, window: Window) -> None:
    consumer = ConsumerPlan("anna", "east", (("hydro", 100),), (400, 0, 0, 0), choices={"window": window})
    world = World(replace(SMALL, consumers=(consumer,)), folder)
    correct(world, "anna", 0, 1, 250, GATE_2_S + MINUTE_S)
    books = world.run(T0 + 5 * INTERVAL_S)
    accounts = audit.check(world, books)
    audit.check_certificates(world, books)
    assert [close.demanded_wh for close in accounts.closed["east", T0]] == [400, 250]
    assert books.unmatched_wh["anna", T0] == 250


def random_corrections(world: World, members: Mapping[str, Sequence[int]], more_wh: int, seed: int) -> None:
    """Up to three revisions of each interval of these meters (Wh by interval), at any time in some hours."""
    chooser = random.Random(seed)
    for meter, energies_wh in members.items():
        for index, energy_wh in enumerate(energies_wh):
            for revision in range(1, chooser.randrange(4)):
                amount = chooser.choice((0, energy_wh // 2, energy_wh, energy_wh + more_wh, 2 * energy_wh))
                correct(world, meter, index, revision, amount, chooser.randrange(5 * INTERVAL_S))


def random_demand_corrections(world: World, seed: int) -> None:
    random_corrections(world, {plan.meter: plan.energies_wh for plan in world.plan.consumers}, 100, seed)


@pytest.mark.parametrize("seed", range(8))
def test_demands_corrected_at_random_with_brokers_killed_end_with_right_totals(folder: Path, seed: int) -> None:
    faults = Faults(lost=20, doubled=20, reordered=20)
    world = World(PAIR, folder, seed, faults=faults, kills=8, disconnects=4)
    random_demand_corrections(world, seed)
    books = world.run(T0 + 12 * INTERVAL_S)
    audit.check(world, books)
    audit.check_certificates(world, books)


@at_any_time
@pytest.mark.parametrize("energy_wh", [0, 150, 300, 690, 700, 710, 1_300])
def test_a_reading_is_corrected_at_any_time_and_to_any_amount(folder: Path, at_s: int, energy_wh: int) -> None:
    """Anna and ben take 400 of the 700 Wh of wind; what is withdrawn beyond the rest is missing from them."""
    world = World(SMALL, folder)
    correct(world, "mill", 0, 1, energy_wh, at_s)
    books = world.run(T0 + 6 * INTERVAL_S)
    accounts = audit.check(world, books)
    audit.check_certificates(world, books)
    wind_wh = sum(wh for (_, start_s, source), wh in books.delivered_wh.items() if (start_s, source) == (T0, "wind"))
    assert wind_wh == min(energy_wh, 400)
    assert books.kept_wh.get(("east", T0, "wind"), 0) == max(0, energy_wh - 400)
    assert books.unmatched_wh["anna", T0] + books.unmatched_wh["ben", T0] == max(0, 400 - energy_wh)
    assert not any(accounts.carried_wh.values())


class KilledBeforeItTells(World):
    """A broker is killed once, before the message of that number since it has had to tell of a loss."""

    kill_before: int
    messages = 0

    def _moment(self, process: BrokerProcess, what: str) -> None:
        super()._moment(process, what)
        if what == "publish" and process.service is not None and process.service._broker._cycle._untold:
            self.messages += 1
            if self.messages == self.kill_before:
                raise Killed


def test_a_loss_is_told_whenever_the_broker_is_killed_after_it_is_on_record(folder: Path) -> None:
    for kill_before in count(1):
        world = KilledBeforeItTells(SMALL, folder / str(kill_before))
        world.kill_before = kill_before
        correct(world, "mill", 0, 1, 150, GATE_2_S + MINUTE_S)
        books = world.run(T0 + 3 * INTERVAL_S)
        audit.check(world, books)
        for meter in ("anna", "ben"):
            told = world.meters[meter].final[T0]
            assert sum(line.energy_wh for line in told.lines) == given_wh(books, meter, T0), kill_before
            assert (told.unmatched_wh, told.state) == (books.unmatched_wh[meter, T0], DeliveryState.FINAL), kill_before
        store = BrokerStore(world.brokers["east"].config.database)
        assert store.untold() == set()
        store.close()
        if world.messages < kill_before:
            break  # Every moment there is has been tried.
    assert kill_before > 10


def test_what_a_correction_withdraws_is_delivered_again_from_what_is_left(folder: Path) -> None:
    """Anna takes any source, first what there is most of: the 300 Wh of wind that she loses come from the roof."""
    consumer = ConsumerPlan("anna", "east", (("renewable", 100),), (900, 0, 0))
    roof = DevicePlan("roof", "ola", "east", Source.SOLAR, (650, 0, 0))
    world = World(replace(SMALL, consumers=(consumer,), devices=(SMALL.devices[0], roof)), folder)
    correct(world, "mill", 0, 1, 400, GATE_2_S + MINUTE_S)
    books = world.run(T0 + 4 * INTERVAL_S)
    accounts = audit.check(world, books)
    audit.check_certificates(world, books)
    assert books.delivered_wh["anna", T0, "wind"] == 400
    assert books.delivered_wh["anna", T0, "solar"] == 500
    assert len(accounts.closed["east", T0]) == 2


def test_after_the_deadline_a_correction_is_carried_to_the_next_issues(folder: Path) -> None:
    plan = replace(
        SMALL, devices=(DevicePlan("mill", "ola", "east", Source.WIND, (700, 500, 500, 500, 500, 500, 500)),)
    )
    world = World(plan, folder)
    world.genesis = replace(world.genesis, correction_deadline_s=INTERVAL_S)
    (folder / "genesis.cbor").write_bytes(world.genesis.to_bytes())
    correct(world, "mill", 0, 1, 100, 3 * INTERVAL_S)
    books = world.run(T0 + 8 * INTERVAL_S)
    accounts = audit.check(world, books)
    audit.check_certificates(world, books)
    assert accounts.withdrawn_wh["mill", T0] == 0
    assert sorted(accounts.issued_wh.values()) == [0, 400, 500, 500, 500, 500, 700]
    assert not accounts.carried_wh["mill"]


def test_a_first_reading_after_the_deadline_is_carried(folder: Path) -> None:
    plan = replace(
        SMALL,
        devices=(DevicePlan("mill", "ola", "east", Source.WIND, (300, 500, 500, 500, 500, 500, 500)),),
        late_s={("mill", 0): 3 * INTERVAL_S},
    )
    world = World(plan, folder)
    world.genesis = replace(world.genesis, correction_deadline_s=INTERVAL_S)
    (folder / "genesis.cbor").write_bytes(world.genesis.to_bytes())
    books = world.run(T0 + 8 * INTERVAL_S)
    accounts = audit.check(world, books)
    audit.check_certificates(world, books)
    assert accounts.issued_wh["mill", T0] == 0
    assert max(accounts.issued_wh.values()) == 800
    assert not accounts.carried_wh["mill"]


def test_a_neighbours_correction_is_withdrawn_from_what_was_bought_of_it(folder: Path) -> None:
    """West bought 300 Wh of east's wind for ben; the meter then says that there were 350 Wh in all."""
    world = World(PAIR, folder)
    correct(world, "mill", 0, 1, 350, GATE_2_S + MINUTE_S)
    books = world.run(T0 + 7 * INTERVAL_S)
    accounts = audit.check(world, books)
    audit.check_certificates(world, books)
    assert accounts.withdrawn_wh["mill", T0] == 550


def random_reading_corrections(world: World, seed: int) -> None:
    random_corrections(world, {plan.device: plan.energies_wh for plan in world.plan.devices}, 50, seed)


@pytest.mark.parametrize("seed", range(8))
def test_readings_corrected_at_random_with_brokers_killed_end_with_right_totals(folder: Path, seed: int) -> None:
    faults = Faults(lost=20, doubled=20, reordered=20)
    world = World(PAIR, folder, seed, faults=faults, kills=8, disconnects=4)
    random_reading_corrections(world, seed)
    random_demand_corrections(world, seed)
    books = world.run(T0 + 12 * INTERVAL_S)
    audit.check(world, books)
    audit.check_certificates(world, books)


@pytest.mark.parametrize("seed", range(200, 260) if FULL else range(200, 206))
def test_histories_with_windows_deadlines_and_corrections_balance_and_are_certified(folder: Path, seed: int) -> None:
    """`audit.check` holds every statement of every party against each other and the ledger, in three periods."""
    chooser = random.Random(seed)
    plan = chooser.choice((PAIR, TRIO))
    windows = tuple(replace(one, choices={"window": chooser.choice(list(Window))}) for one in plan.consumers)
    faults = Faults(lost=10, doubled=10, reordered=10)
    world = World(
        replace(plan, consumers=windows), folder, seed, faults=faults, kills=chooser.randrange(4), disconnects=2
    )
    if chooser.random() < 0.5:
        world.genesis = replace(world.genesis, correction_deadline_s=INTERVAL_S * chooser.randrange(1, 4))
        (folder / "genesis.cbor").write_bytes(world.genesis.to_bytes())
    random_reading_corrections(world, seed)
    random_demand_corrections(world, seed)
    books = world.run(T0 + 12 * INTERVAL_S)
    audit.check(world, books)
    audit.check_certificates(world, books)


def test_deliveries_too_many_for_a_correction_to_look_through_stay_as_they_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger then takes only what nobody was given yet, and carries the rest; so must the broker."""
    monkeypatch.setattr(generation, "MAX_SEARCHED_DELIVERIES", 1)
    monkeypatch.setattr(made, "MAX_SEARCHED_DELIVERIES", 1)
    world = World(SMALL, folder)
    correct(world, "mill", 0, 1, 100, 3 * INTERVAL_S)
    books = world.run(T0 + 6 * INTERVAL_S)
    wind_wh = sum(wh for (_, start_s, source), wh in books.delivered_wh.items() if (start_s, source) == (T0, "wind"))
    assert wind_wh == 400
    store = BrokerStore(world.brokers["east"].config.database)
    assert store.withdrawn("mill", T0) == [(0, 400, 700)]
    assert ledger_faults(store, world.genesis, "east", folder / "ledger", Span(T0, T0 + 6 * INTERVAL_S)) == ()
    store.close()
    audit.check_certificates(world, books)
