"""Whose devices a neighbour's energy is from, for a broker that joined after they were admitted.

East has taken on its providers' roofs before west is started for the first time. Anna, at west, takes nothing of pia's.
"""

import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broker.ledger.gateway import Gateway, Outgoing
from broker.ledger.limits import DEVICE_TIMEOUT_S
from broker.ledger.operations import Admit, encode_operation
from broker.market.contracts import ShortageChoice
from broker.market.windows import Window
from broker.protocol.envelope import parse
from broker.protocol.market_time import Interval
from broker.protocol.messages import Batch, Cleared, MessageType, Query, QueryKind
from broker.protocol.sources import Source
from broker.service.store import BrokerStore, IntervalState
from simulation import audit
from simulation.world import GATE_2_S, INTERVAL_S, LEDGER, T0, ConsumerPlan, DevicePlan, Plan, World

FULL = os.environ.get("DENGEN_FULL") == "1"


def consumer(meter: str, *energies_wh: int, **choices: Any) -> ConsumerPlan:
    return ConsumerPlan(meter, "west", (("solar", 100),), energies_wh, choices=choices)


def roof(device: str, owner: str, *energies_wh: int) -> DevicePlan:
    return DevicePlan(device, owner, "east", Source.SOLAR, energies_wh)


JOINS = Plan(
    ("east", "west"),
    "east",
    (
        consumer("anna", 300, 300, excluded_providers=["pia"]),
        consumer("ben", 100, 100, preferred_providers=["pia"]),
    ),
    (roof("roof", "ola", 350, 350), roof("barn", "pia", 150, 150)),
)
MIXED = Plan(
    ("east", "west"),
    "east",
    (
        *JOINS.consumers,
        consumer("cleo", 120, 90, window=Window.DAY, excluded_providers=["ola"]),
        ConsumerPlan("dora", "west", (("any", 100),), (80, 80), ShortageChoice.ANY, choices={"window": Window.MONTH}),
        ConsumerPlan("emil", "east", (("renewable", 100),), (60, 60), choices={"window": Window.DAY}),
    ),
    (*JOINS.devices, DevicePlan("mill", "ola", "east", Source.WIND, (40, 120))),
)


def joined(plan: Plan, folder: Path, seed: int = 0, **options: Any) -> World:
    """West begins when all devices stand on the ledger."""
    world = World(plan, folder, seed, **options)
    world.hold_down("west")
    world.settle()
    world.let_up("west")
    return world


def providers_of(world: World) -> set[tuple[str, str]]:
    """(consumer of west, provider) of all that was delivered there."""
    owner_of = {plan.device: plan.owner for plan in world.plan.devices}
    store = BrokerStore(world.brokers["west"].config.database)
    pairs = {(row.meter, owner_of[row.device]) for row in store.all_deliveries()}
    store.close()
    return pairs


def test_who_excludes_a_provider_gets_a_neighbours_energy_of_another_who_was_there_before(folder: Path) -> None:
    world = joined(JOINS, folder)
    books = world.run()
    audit.check(world, books)
    for start_s in (T0, T0 + INTERVAL_S):
        assert books.delivered_wh["anna", start_s, "solar"] == 300
    # And who prefers one is served by that one.
    assert providers_of(world) == {("anna", "ola"), ("ben", "pia")}


def test_a_device_is_asked_about_once_also_after_restarts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = spy(monkeypatch)
    world = joined(JOINS, folder)
    world.run(T0 + INTERVAL_S + 1_500)
    world.run()
    assert sorted(set(asked)) == ["barn", "roof"]
    # A question is repeated only with the first words of a run, when everything counts as unsaid.
    assert len(asked) <= 4


@pytest.mark.parametrize("seed", range(40 if FULL else 4))
def test_when_a_broker_joins_changes_nothing(seed: int, folder: Path) -> None:
    """West sees the admissions in the feed, or has to ask, as chance will have it."""
    books = joined(MIXED, folder / "late").run()
    assert World(MIXED, folder / "at-once", seed).run() == books


@pytest.mark.parametrize("share", range(120 if FULL else 8))
def test_killed_at_any_moment_of_its_first_life_everybody_gets_the_same(share: int, folder: Path) -> None:
    calm = joined(MIXED, folder / "calm")
    before = calm.moments
    books = calm.run()
    audit.check(calm, books)
    moments = calm.moments - before
    world = joined(MIXED, folder / "killed", kill_at=before + 1 + moments * share // (120 if FULL else 8))
    assert world.run() == books
    audit.check(world, books)


def spy(monkeypatch: pytest.MonkeyPatch, answers: Callable[[str], bool] = lambda device: True) -> list[str]:
    """The devices that the ledger is asked about, each time. It says nothing where it does not answer about one."""
    asked: list[str] = []
    on_message = Gateway.on_message

    def taken(gateway: Gateway, payload: bytes) -> list[Outgoing]:
        envelope = parse(payload)
        if envelope.message_type is MessageType.QUERY:
            query = Query.from_payload(envelope.payload)
            if query.kind is QueryKind.DEVICE:
                device = (query.cursor or b"").decode()
                asked.append(device)
                if not answers(device):
                    return []
        return on_message(gateway, payload)

    monkeypatch.setattr(Gateway, "on_message", taken)
    return asked


def nothing(_device: str) -> bool:
    """What a ledger of an earlier version answers."""
    return False


def test_an_answer_that_takes_long_is_waited_for_and_changes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    books = joined(MIXED, folder / "calm").run()
    heard: Counter[str] = Counter()

    def at_last(device: str) -> bool:
        heard[device] += 1
        return heard[device] >= {"barn": 4, "roof": 9, "mill": 2}[device]

    spy(monkeypatch, at_last)
    world = joined(MIXED, folder / "slow")
    assert world.run() == books
    audit.check(world, books)
    assert heard["roof"] >= 9


def test_what_is_held_back_stays_so_when_it_becomes_known_whose_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cleo's 120 Wh have come after gate 1, so they wait for the end of her day; nobody else may have them."""
    plan = Plan(
        ("east", "west"), "east", (consumer("cleo", 120, 0, window=Window.DAY),), (roof("roof", "ola", 120, 0),)
    )
    with monkeypatch.context() as patched:
        spy(patched, nothing)
        world = joined(plan, folder)
        world.run(T0 + INTERVAL_S + GATE_2_S + 60)
    world.settle()
    service = world.brokers["west"].service
    assert service is not None
    stock = service._broker._stock
    assert {(lot.provider, energy_wh) for lot, energy_wh in stock.lots(T0, T0 + 1).items()} == {("ola", 120)}
    assert list(stock.slices(Interval(T0, T0 + INTERVAL_S))) == []
    world.stop()


def test_a_ledger_that_does_not_know_the_question_is_asked_a_few_times_and_holds_nothing_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = spy(monkeypatch, nothing)
    world = joined(JOINS, folder)
    books = world.run()
    audit.check(world, books)
    # As if nothing were known of the providers.
    assert not any(meter == "anna" for meter, _, _ in books.delivered_wh)
    assert books.delivered_wh["ben", T0, "solar"] == 100
    # Both devices once, then one of them in each interval that follows; a question is sent for half a minute.
    assert world.network_time_s < 3 * DEVICE_TIMEOUT_S
    assert len(asked) <= (2 + world.plan.intervals + 1) * (DEVICE_TIMEOUT_S // 2 + 1)


def test_a_ledger_that_answers_after_all_is_asked_again_in_the_next_interval(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose node was away, or has been brought up to date."""
    first_close_s = T0 + INTERVAL_S + GATE_2_S
    asked = spy(monkeypatch, lambda _device: world.market_time_s >= first_close_s)
    world = joined(JOINS, folder)
    books = world.run()
    audit.check(world, books)
    assert [start_s for meter, start_s, _ in books.delivered_wh if meter == "anna"] == [T0 + INTERVAL_S]
    assert set(asked) == {"barn", "roof"}


def test_an_admission_that_comes_by_again_says_whose_energy_in_stock_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger accepts it from any party. This one does not answer, so west knows from the feed alone."""
    spy(monkeypatch, nothing)
    plan = Plan(
        ("east", "west"),
        "east",
        (consumer("anna", 200, 0, window=Window.DAY, excluded_providers=["pia"]),),
        (roof("roof", "ola", 200, 0),),
    )
    world = joined(plan, folder)
    world.run(T0 + INTERVAL_S + GATE_2_S + 60)
    store = BrokerStore(world.brokers["east"].config.database)
    (admission,) = [row.raw for row in store.statements() if row.kind == MessageType.ADMISSION]
    store.close()
    batch = world.signed(Batch(T0 + 3 * INTERVAL_S, (encode_operation(Admit(admission)),)), "ola")
    world.before_next_step(lambda: world.say("ola", world.topics.ledger_submit(LEDGER), batch))
    assert world.run().delivered_wh == {("anna", T0, "solar"): 200}


def test_with_a_clock_that_goes_on_no_gate_waits_for_an_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = spy(monkeypatch, nothing)
    world = joined(JOINS, folder, may_wait=True)
    world.patience_s = 3.0
    announced = world.listen(world.topics.cleared("west"))
    books = world.run(T0 + INTERVAL_S + GATE_2_S)
    # An answer might still have come.
    assert asked
    assert world.network_time_s < DEVICE_TIMEOUT_S
    assert books.unmatched_wh == {("anna", T0): 300, ("ben", T0): 0}
    store = BrokerStore(world.brokers["west"].config.database)
    assert store.interval_state(T0)[0] is IntervalState.CLOSED
    store.close()
    # Nor are neighbours kept waiting beyond the end of a round.
    cleared = [world.opened(raw) for raw in announced]
    assert max([one.round_number or 0 for one in cleared if isinstance(one, Cleared) and one.start_s == T0]) > 1


def test_random_kills_of_both_brokers_change_nothing(folder: Path) -> None:
    books = joined(MIXED, folder / "calm").run()
    for seed in range(30 if FULL else 3):
        chooser = random.Random(seed)
        world = joined(MIXED, folder / str(seed), seed, kills=chooser.randrange(1, 7), disconnects=2)
        assert world.run() == books, seed
        audit.check(world, books)
