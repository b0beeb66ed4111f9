"""The schedule of simulated time: when a tick counts as settled, and which one comes next."""

import pytest
from dengen_testing.conductor import Schedule
from hypothesis import given
from hypothesis import strategies as st

from broker.protocol.messages import Report, Stage, Tick

START_S = 1_800


def report(name: str, tick: Tick, *, idle: bool = True, wake_s: int | None = None, height: int | None = None) -> Report:
    return Report(name, tick.time_s, tick.stage, idle, wake_s, height)


def settle(schedule: Schedule, names: list[str], wake_s: int | None = None) -> Tick | None:
    for name in names:
        schedule.take(report(name, schedule.tick, wake_s=wake_s))
    return schedule.advance()


def test_the_world_moves_before_the_market() -> None:
    schedule = Schedule(START_S, 9_000, ["street"], ["agent"])
    assert schedule.tick == Tick(START_S, Stage.WORLD)
    assert settle(schedule, ["street"], 3_600) == Tick(START_S, Stage.MARKET)
    assert settle(schedule, ["agent"], 3_600) == Tick(3_600, Stage.WORLD)


def test_a_busy_participant_holds_time() -> None:
    schedule = Schedule(START_S, 9_000, [], ["agent", "broker"])
    schedule.take(report("agent", schedule.tick))
    schedule.take(report("broker", schedule.tick, idle=False))
    assert schedule.advance() is None
    schedule.take(report("broker", schedule.tick))
    assert schedule.advance() is not None


def test_whoever_becomes_busy_again_holds_time() -> None:
    schedule = Schedule(START_S, 9_000, [], ["agent", "broker"])
    schedule.take(report("agent", schedule.tick))
    schedule.take(report("agent", schedule.tick, idle=False))
    schedule.take(report("broker", schedule.tick))
    assert schedule.advance() is None


def test_a_report_for_an_earlier_tick_or_stage_does_not_count() -> None:
    schedule = Schedule(START_S, 9_000, ["street"], ["agent"])
    schedule.take(Report("agent", START_S, Stage.WORLD, True))
    settle(schedule, ["street"])
    assert schedule.tick.stage is Stage.MARKET
    assert schedule.advance() is None
    schedule.take(Report("agent", START_S - 1, Stage.MARKET, True))
    assert schedule.advance() is None


def test_time_waits_until_all_have_taken_in_the_same_ledger_height() -> None:
    schedule = Schedule(START_S, 9_000, [], ["agent", "east", "west"])
    schedule.take(report("agent", schedule.tick))
    schedule.take(report("east", schedule.tick, height=7))
    schedule.take(report("west", schedule.tick, height=6))
    assert schedule.advance() is None
    assert schedule.waiting() == ("west: idle at ledger height 6, others have taken in 7",)
    schedule.take(report("west", schedule.tick, height=7))
    assert schedule.advance() is not None


def test_the_world_stage_is_left_out_where_no_meter_wants_to_wake() -> None:
    schedule = Schedule(START_S, 9_000, ["street"], ["agent"])
    settle(schedule, ["street"], 3_600)
    assert settle(schedule, ["agent"], 1_860) == Tick(1_860, Stage.MARKET)
    assert settle(schedule, ["agent"], 3_660) == Tick(3_600, Stage.WORLD)


def test_the_last_tick_is_the_end_and_then_nothing_follows() -> None:
    schedule = Schedule(START_S, 5_000, [], ["agent"])
    assert settle(schedule, ["agent"], 9_000) == Tick(5_000, Stage.MARKET)
    assert settle(schedule, ["agent"], 9_000) is None
    assert schedule.finished


def test_idle_but_wanting_to_act_now_again_is_not_idle() -> None:
    schedule = Schedule(START_S, 5_000, [], ["agent"])
    assert settle(schedule, ["agent"], START_S) is None
    assert "next wake 1800" in schedule.waiting()[0]


def test_strangers_are_ignored() -> None:
    schedule = Schedule(START_S, 5_000, [], ["agent"])
    schedule.take(report("stranger", schedule.tick, idle=False))
    assert settle(schedule, ["agent"]) is not None


def test_after_a_lost_connection_everybody_has_to_report_again() -> None:
    schedule = Schedule(START_S, 5_000, [], ["agent", "broker"])
    schedule.take(report("agent", schedule.tick))
    schedule.forget_reports()
    schedule.take(report("broker", schedule.tick))
    assert schedule.advance() is None
    assert schedule.waiting() == ("agent: never reported",)


def test_the_stall_message_says_who_and_what_was_last_said() -> None:
    schedule = Schedule(START_S, 5_000, [], ["agent", "broker", "odd"])
    schedule.take(report("agent", schedule.tick, idle=False, wake_s=3_600))
    schedule.take_unreadable("odd", "no map")
    assert schedule.waiting() == (
        "agent: last reported busy at time 1800, stage MARKET, next wake 3600, ledger height None",
        "broker: never reported",
        "odd: sent an unreadable report (no map)",
    )


def test_a_participant_is_named_once() -> None:
    with pytest.raises(ValueError, match="each named once"):
        Schedule(0, 1, ["a"], ["a"])
    with pytest.raises(ValueError, match="at least one"):
        Schedule(0, 1, [], [])
    with pytest.raises(ValueError, match="before"):
        Schedule(2, 1, [], ["a"])


@given(st.lists(st.integers(1, 400), min_size=1, max_size=30), st.lists(st.integers(1, 400), min_size=1, max_size=30))
def test_time_never_goes_back_and_passes_over_no_wake(world_steps: list[int], market_steps: list[int]) -> None:
    end_s = 2_000
    schedule = Schedule(0, end_s, ["street"], ["agent"])
    steps = {"street": iter(world_steps), "agent": iter(market_steps)}
    wakes: dict[str, int | None] = {}
    seen = [schedule.tick]
    while not schedule.finished:
        name = "street" if schedule.tick.stage is Stage.WORLD else "agent"
        step = next(steps[name], None)
        wakes[name] = None if step is None else schedule.tick.time_s + step
        before_s = schedule.tick.time_s
        schedule.take(report(name, schedule.tick, wake_s=wakes[name]))
        tick = schedule.advance()
        if tick is not None:
            seen.append(tick)
            assert tick.time_s >= before_s
            due = [wake_s for wake_s in wakes.values() if wake_s is not None]
            assert tick.time_s <= min([*due, end_s])
    assert seen[-1].time_s == end_s


def waiting(name: str, tick: Tick, waits_for: tuple[bytes, ...], holds: tuple[bytes, ...]) -> Report:
    return Report(name, tick.time_s, tick.stage, True, tick.time_s + 600, None, waits_for, holds)


def test_time_goes_on_while_one_waits_for_another_that_waits_for_time() -> None:
    schedule = Schedule(START_S, 9_000, [], ["east", "west"])
    schedule.take(waiting("west", schedule.tick, (b"o" * 8,), ()))
    schedule.take(waiting("east", schedule.tick, (), (b"o" * 8,)))
    assert schedule.advance() == Tick(START_S + 600, Stage.MARKET)


def test_time_stands_still_while_what_somebody_waits_for_is_on_its_way() -> None:
    """East holds it no longer: it has answered, and west has not heard that yet."""
    schedule = Schedule(START_S, 9_000, [], ["east", "west"])
    schedule.take(waiting("west", schedule.tick, (b"o" * 8,), ()))
    schedule.take(waiting("east", schedule.tick, (), ()))
    assert schedule.advance() is None
    assert schedule.waiting() == ("west: waits for 1 things that nobody says to hold",)
    # Nor does it help that west itself says to hold it.
    schedule.take(waiting("west", schedule.tick, (b"o" * 8,), (b"o" * 8,)))
    assert schedule.advance() is None
