"""The agent on a real mosquitto: a small broker in the test answers receipts, a stub in place of a meter is read.

What is shown: intervals arrive signed and once, nothing is forgotten when broker, server or agent go away, a resend is
the same bytes, and simulated time waits for the agent's receipts.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from dengen_testing.mosquitto import Mosquitto
from dengen_testing.waiting import wait_until
from support.fake_broker import BROKER_KEY, CONDUCTOR_KEY, LEDGER, T0, TOPICS, FakeBroker, accept, say_nothing

from broker.protocol.envelope import Signer, open_envelope, seal, sealed_id
from broker.protocol.keys import generate_private_key, save_private_key
from broker.protocol.messages import (
    Carrier,
    Delivery,
    DeliveryState,
    Demand,
    MeterStatus,
    Quality,
    Reading,
    ReceiptStatus,
    Report,
)
from broker.protocol.mqtt_link import MqttConfig
from meter_agent.clock import AgentClock, ConductorClock
from meter_agent.config import AgentConfig, AgentSettings, MeterConfig, P1Config, PartyKey
from meter_agent.intervals import Anchor, Boundary, MeterState, SealedInterval
from meter_agent.journal import Journal, JournalView, OutboxRow
from meter_agent.outbox import MAX_UNDER_WAY, OutboxState, Pace
from meter_agent.readings import MeterReader, ReadFailure, Sample
from meter_agent.service import Agent, ReaderDied

pytestmark = pytest.mark.integration


class StubReader:
    """A meter that draws a constant power, read through the agent's clock; it can be unplugged."""

    def __init__(self, name: str, clock: AgentClock, power_w: int = 1_000) -> None:
        self._name = name
        self._clock = clock
        self._power_w = power_w
        self.unplugged = False
        self.closed = False

    def sample(self) -> Sample:
        if self.unplugged:
            raise ReadFailure(self._name, "the serial port /dev/nowhere is missing; is the adapter plugged in?")
        time_s = self._clock.time_s()
        total_mwh = 10**9 + round((time_s - T0) * self._power_w * 1000 / 3600)
        # One look at the clock for both, because between two looks the fast clock runs on by minutes.
        return Sample(time_s, time_s, total_mwh, total_mwh)

    def close(self) -> None:
        self.closed = True


class FastClock:
    """Calendar time that runs so much faster than real time that an interval takes under a second."""

    def __init__(self, speed: int, synchronised: bool = True) -> None:
        self.synchronised = synchronised
        self._speed = speed
        self._start_s = time.monotonic()

    def monotonic_s(self) -> float:
        return self.time_s()

    def time_s(self) -> float:
        return T0 - 300 + (time.monotonic() - self._start_s) * self._speed

    def trusted(self) -> bool:
        return self.synchronised


class World:
    """A folder with keys, a broker, and agents that can be started and ended on the same journal."""

    def __init__(self, folder: Path, mqtt: MqttConfig, meters: dict[str, str]) -> None:
        self.folder = folder
        self.mqtt = mqtt
        self.keys = {name: generate_private_key() for name in meters}
        for name, key in self.keys.items():
            save_private_key(folder / f"{name}.pem", key)
        self.meters = meters
        self.broker = FakeBroker(mqtt, self.keys)

    def config(self, conductor: bool) -> AgentConfig:
        meters = {
            name: MeterConfig(
                direction="generation" if direction == "generation" else "consumption",
                key_file=self.folder / f"{name}.pem",
                capacity_w=100_000,
                reader=P1Config("p1", Path("/dev/null")),
                sample_period_s=0.1,
            )
            for name, direction in self.meters.items()
        }
        settings = AgentSettings(
            self.folder / "data",
            PartyKey("east", BROKER_KEY.public.cose_key.hex()),
            LEDGER,
            clock="conductor" if conductor else "system",
            conductor=PartyKey("conductor", CONDUCTOR_KEY.public.cose_key.hex()) if conductor else None,
        )
        return AgentConfig(settings, meters, self.mqtt)

    @contextmanager
    def agent(self, clock: AgentClock | None = None) -> Iterator[dict[str, StubReader]]:
        """A running agent; yields its stub readers."""
        conductor = clock is None
        clock = clock or ConductorClock()
        stubs = {name: StubReader(name, clock) for name in self.meters}
        readers: dict[str, MeterReader] = dict(stubs)
        agent = Agent(self.config(conductor), readers, clock, None if conductor else Pace(0.1, 1.0, 2.0))
        thread = threading.Thread(target=agent.run)
        thread.start()
        try:
            yield stubs
        finally:
            agent.stop()
            thread.join(10)
            assert not thread.is_alive()
        assert all(stub.closed for stub in stubs.values())

    def tick_and_settle(self, time_s: int) -> Report:
        """Tick, and wait until the agent has reported everything done."""
        self.broker.tick(time_s)
        wait_until(lambda: self.settled(time_s), f"the agent to settle {time_s - T0}")
        return self.broker.reports[-1]

    def settled(self, time_s: int) -> bool:
        reports = self.broker.reports
        return bool(reports) and reports[-1].time_s == time_s and reports[-1].idle


@pytest.fixture
def world(tmp_path: Path, mosquitto: Mosquitto) -> Iterator[World]:
    world = World(tmp_path, mosquitto.mqtt_config(), {"house": "consumption", "roof": "generation"})
    yield world
    world.broker.close()


def test_in_simulated_time_each_boundary_is_sealed_sent_and_waited_for(world: World) -> None:
    with world.agent():
        first = world.tick_and_settle(T0)
        assert (first.participant, first.next_wake_s) == ("house", T0 + 1800)
        assert world.broker.values == []
        for number in range(1, 6):
            assert world.tick_and_settle(T0 + 1800 * number).next_wake_s == T0 + 1800 * (number + 1)
    assert world.broker.energies("house") == {1800 * n: 500 for n in range(5)}
    assert {type(v) for v in world.broker.values if v.meter == "house"} == {Demand}
    assert {type(v) for v in world.broker.values if v.meter == "roof"} == {Reading}
    assert {v.quality for v in world.broker.values} == {Quality.MEASURED}
    # Busy is said before anything is sent, idle only after the receipts.
    third = world.broker.log.index("value 3600")
    assert world.broker.log[third - 1] == "busy"
    assert world.broker.log[third : third + 3] == ["value 3600", "value 3600", "idle"]


def test_a_tick_that_is_repeated_is_answered_again_and_sends_nothing(world: World) -> None:
    with world.agent():
        world.tick_and_settle(T0)
        world.tick_and_settle(T0 + 1800)
        reports, values = len(world.broker.reports), len(world.broker.values)
        world.broker.tick(T0 + 1800)
        wait_until(lambda: len(world.broker.reports) > reports, "the same report again")
        assert world.broker.reports[-1] == world.broker.reports[reports - 1]
        # Older ticks, and ticks that the conductor did not sign, are not time.
        world.broker.tick(T0)
        world.broker.tick(T0 + 36_000, key=BROKER_KEY)
        assert world.tick_and_settle(T0 + 3600).next_wake_s == T0 + 5400
        assert len(world.broker.values) == values + 2


def test_without_receipts_the_agent_stays_busy_and_sends_the_same_bytes_again(world: World) -> None:
    with world.agent():
        world.tick_and_settle(T0)
        world.broker.policy = say_nothing
        world.broker.tick(T0 + 1800)
        wait_until(lambda: len(world.broker.raw) >= 6, "two resends of two messages")
        assert not world.settled(T0 + 1800)
        assert len(set(world.broker.raw)) == 2
        world.broker.policy = accept
        wait_until(lambda: world.settled(T0 + 1800), "the receipts")


def test_a_killed_server_costs_nothing(world: World, mosquitto: Mosquitto) -> None:
    with world.agent():
        world.tick_and_settle(T0)
        world.broker.policy = say_nothing
        world.broker.tick(T0 + 1800)
        wait_until(lambda: len(world.broker.raw) >= 2, "the first sending")
        mosquitto.kill()
        world.broker.policy = accept
        mosquitto.restart()
        # The report is repeated on the new connection without a new tick.
        wait_until(lambda: world.settled(T0 + 1800), "the agent to catch up")
        world.tick_and_settle(T0 + 3600)
    assert world.broker.energies() == {0: 500, 1800: 500}
    assert len(set(world.broker.raw)) == 4


def test_a_restarted_agent_sends_the_stored_bytes_and_goes_on_without_a_gap(world: World) -> None:
    world.broker.policy = say_nothing
    with world.agent():
        world.tick_and_settle(T0)
        world.broker.tick(T0 + 1800)
        wait_until(lambda: len(world.broker.raw) >= 2, "the first sending")
    before = set(world.broker.raw)
    world.broker.policy = accept
    with world.agent():
        # The retained tick finds it.
        wait_until(lambda: world.settled(T0 + 1800), "the restarted agent to settle")
        assert set(world.broker.raw) == before
        world.tick_and_settle(T0 + 3600)
    assert world.broker.energies() == {0: 500, 1800: 500}


def test_a_conflict_is_kept_on_record_and_not_sent_again(world: World) -> None:
    world.broker.policy = lambda value: ReceiptStatus.CONFLICT if value.meter == "roof" else ReceiptStatus.ACCEPTED
    with world.agent():
        world.tick_and_settle(T0)
        world.tick_and_settle(T0 + 1800)
        world.broker.policy = accept
        world.tick_and_settle(T0 + 3600)
    with world.agent():
        world.tick_and_settle(T0 + 5400)
    assert [value.start_s - T0 for value in world.broker.values if value.meter == "roof"] == [0, 1800, 3600]
    view = JournalView(world.folder / "data")
    assert [record.state for record in view.intervals("roof", 9)] == [
        OutboxState.ACCEPTED,
        OutboxState.ACCEPTED,
        OutboxState.CONFLICT,
    ]
    assert {(meter, kind) for _, meter, kind, _ in view.events(9)} == {("roof", "conflict")}
    view.close()


def test_a_refused_interval_is_sent_again_as_it_was_at_the_next_start(world: World) -> None:
    world.broker.policy = lambda value: ReceiptStatus.REFUSED if value.meter == "roof" else ReceiptStatus.ACCEPTED
    with world.agent():
        world.tick_and_settle(T0)
        world.tick_and_settle(T0 + 1800)
        world.broker.policy = accept
        world.tick_and_settle(T0 + 3600)
    sent = zip(world.broker.raw, world.broker.values, strict=True)
    refused = next(raw for raw, value in sent if value.meter == "roof")
    with world.agent():
        world.tick_and_settle(T0 + 5400)
    assert world.broker.raw.count(refused) == 2
    assert sorted(value.start_s - T0 for value in world.broker.values if value.meter == "roof") == [0, 0, 1800, 3600]
    view = JournalView(world.folder / "data")
    assert {record.state for record in view.intervals("roof", 9)} == {OutboxState.ACCEPTED}
    assert [(meter, kind) for _, meter, kind, _ in view.events(9)] == [("roof", "refused")]
    view.close()


def test_a_meter_that_cannot_be_read_is_reported_and_the_others_go_on(world: World) -> None:
    with world.agent() as readers:
        world.tick_and_settle(T0)
        readers["roof"].unplugged = True
        world.broker.tick(T0 + 1800)
        wait_until(lambda: world.broker.energies("house") == {0: 500}, "the other meter's interval")
        wait_until(
            lambda: any(s.meter == "roof" and "/dev/nowhere" in (s.fault or "") for s in world.broker.statuses),
            "a status with the fault",
        )
        assert not world.settled(T0 + 1800)
        readers["roof"].unplugged = False
        wait_until(lambda: world.settled(T0 + 1800), "the meter to answer again")
        assert world.broker.energies("roof") == {0: 500}
        wait_until(
            lambda: [s.fault for s in world.broker.statuses if s.meter == "roof"][-1] is None, "a status without fault"
        )


def test_deliveries_are_kept_and_forged_messages_change_nothing(world: World) -> None:
    delivery = Delivery("house", T0, T0 + 1800, 0, 500, 500, DeliveryState.FINAL, ())
    with world.agent():
        world.tick_and_settle(T0)
        world.broker.say("house", "delivery", delivery, key=CONDUCTOR_KEY)
        world.broker.say("house", "receipt", delivery)
        world.broker.say("house", "delivery", delivery)
        world.tick_and_settle(T0 + 1800)
    view = JournalView(world.folder / "data")
    kept = [
        open_envelope(raw, LEDGER, lambda _: Signer("east", BROKER_KEY.public)) for raw in view.deliveries("house", 9)
    ]
    assert [opened.message for opened in kept] == [delivery]
    assert [kind for _, _, kind, _ in view.events(9)] == ["bad-message", "bad-message"]
    view.close()


def times_sent(world: World, start_s: int) -> int:
    """How often the house's demand of an interval was sent."""
    return len([value for value in world.broker.values if (value.meter, value.start_s) == ("house", T0 + start_s)])


def test_a_delivery_that_was_missed_is_asked_for_until_it_is_here(world: World) -> None:
    world.broker.clear_after_s = 600
    with world.agent():
        world.tick_and_settle(T0)
        world.tick_and_settle(T0 + 1800)
        world.tick_and_settle(T0 + 3600)
        wait_until(lambda: times_sent(world, 0) == 2, "the first interval to be sent again for its delivery")
        world.broker.say("house", "delivery", Delivery("house", T0, T0 + 1800, 0, 500, 500, DeliveryState.FINAL, ()))
        world.tick_and_settle(T0 + 5400)
        wait_until(lambda: times_sent(world, 1800) == 2, "the second interval to be sent again for its delivery")
    assert times_sent(world, 0) == 2
    assert len(set(world.broker.raw)) == len({(value.meter, value.start_s) for value in world.broker.values})


def test_on_a_new_connection_a_delivery_that_was_not_the_last_word_is_asked_for_too(world: World) -> None:
    world.broker.clear_after_s = 600
    open_one = Delivery("house", T0, T0 + 1800, 0, 500, 500, DeliveryState.OPEN, ())
    with world.agent():
        world.tick_and_settle(T0)
        world.tick_and_settle(T0 + 1800)
        world.broker.say("house", "delivery", open_one)
        world.tick_and_settle(T0 + 3600)
    assert times_sent(world, 0) == 1
    world.broker.policy = lambda _value: ReceiptStatus.REFUSED
    with world.agent():
        wait_until(lambda: times_sent(world, 0) == 2, "the first interval to be sent again for its delivery")
        world.broker.say("house", "delivery", replace(open_one, state=DeliveryState.FINAL))
        world.broker.policy = accept
        world.tick_and_settle(T0 + 5400)
    with world.agent():
        wait_until(lambda: times_sent(world, 1800) == 3, "the interval without any delivery to be sent again")
    assert times_sent(world, 0) == 2
    view = JournalView(world.folder / "data")
    # What the first receipt said stands.
    assert {record.state for record in view.intervals("house", 9)} == {OutboxState.ACCEPTED}
    view.close()


def test_on_a_running_clock_measuring_goes_on_without_a_server_and_catches_up(
    world: World, mosquitto: Mosquitto
) -> None:
    clock = FastClock(speed=6_000)
    with world.agent(clock):
        wait_until(lambda: any(s.online for s in world.broker.statuses), "the agent's status")
        mosquitto.kill()
        wait_until(lambda: clock.time_s() > T0 + 5 * 1800 + 600, "five intervals")
        mosquitto.restart()
        end_s = clock.time_s()
        wait_until(lambda: len(_without_gap(world.broker, end_s)) >= 4, "every interval of the outage", limit_s=30)
    starts = _without_gap(world.broker, end_s)
    # The power is constant, so what is interpolated is right to the Wh, and none is lost in sum.
    assert abs(sum(world.broker.energies()[start] for start in starts) - 500 * len(starts)) <= 1
    wait_until(lambda: not world.broker.statuses[-1].online, "the last status to say offline")


def _without_gap(broker: FakeBroker, end_s: float) -> list[int]:
    """The starts of all intervals from the first to the one that ended before `end_s`; empty if one of them lacks."""
    starts = sorted(broker.energies())
    expected = list(range(starts[0], int(end_s - T0) - 1800, 1800)) if starts else []
    return expected if set(expected) <= set(starts) else []


def test_nothing_is_sealed_before_the_clock_is_synchronised_and_then_nothing_is_lost(world: World) -> None:
    clock = FastClock(speed=2_000, synchronised=False)
    with world.agent(clock):
        wait_until(lambda: clock.time_s() > T0 + 3 * 1800, "three intervals")
        assert world.broker.values == []
        assert any("NTP" in (status.fault or "") for status in world.broker.statuses)
        clock.synchronised = True
        wait_until(lambda: len(world.broker.energies()) >= 3, "the intervals")
        # The first of them ended long before the clock was right.
        assert min(world.broker.energies()) <= 1800
        wait_until(lambda: world.broker.statuses[-1].fault is None, "a status without fault")
    # What was read meanwhile was kept, so the boundaries lie between close samples.
    assert {value.quality for value in world.broker.values} <= {Quality.INTERPOLATED, Quality.MEASURED}


def test_a_long_backlog_goes_through_a_short_memory(world: World) -> None:
    many = 2 * MAX_UNDER_WAY + 50
    journal = Journal(world.folder / "data", 92)
    rows = []
    for number in range(many):
        start_s = T0 + 1800 * number
        interval = SealedInterval(start_s, start_s + 1800, number, Quality.MEASURED, None)
        demand = Demand("house", start_s, start_s + 1800, 0, number, Quality.MEASURED, Carrier.ELECTRICITY)
        raw = seal(demand, world.keys["house"], LEDGER, "house")
        rows.append(OutboxRow(interval, 0, sealed_id(raw, LEDGER, "house"), raw))
    end_s = T0 + 1800 * many
    boundary = Boundary(end_s, 0, Quality.MEASURED, end_s, end_s)
    journal.seal("house", MeterState(Anchor(end_s * 1_000_000, None, 0, 0, None), boundary), rows)
    journal.close()
    with world.agent():
        wait_until(lambda: len(world.broker.energies()) == many, "all intervals")
        world.tick_and_settle(end_s)
    assert world.broker.energies() == {1800 * number: number for number in range(many)}
    journal = Journal(world.folder / "data", 92)
    assert journal.waiting_count("house") == 0
    journal.close()


def test_many_deliveries_between_two_intervals_do_not_block_the_receipts(world: World) -> None:
    with world.agent():
        world.tick_and_settle(T0)
        for number in range(60):
            start_s = T0 - 1800 * (number + 1)
            delivery = Delivery("house", start_s, start_s + 1800, 0, 5, 5, DeliveryState.FINAL, ())
            world.broker.say("house", "delivery", delivery)
        world.tick_and_settle(T0 + 1800)
    view = JournalView(world.folder / "data")
    assert len(view.deliveries("house", 100)) == 60
    view.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_reader_that_dies_by_an_unforeseen_error_ends_the_agent(world: World) -> None:
    class Broken(StubReader):
        def sample(self) -> Sample:
            raise ZeroDivisionError

    clock = FastClock(speed=6_000)
    readers = {name: Broken(name, clock) for name in world.meters}
    agent = Agent(world.config(False), readers, clock)
    with pytest.raises(ReaderDied, match="reader-"):
        agent.run()
    assert all(reader.closed for reader in readers.values())


def test_the_server_says_offline_for_an_agent_that_vanished(world: World) -> None:
    # The agent's process is this one, so its end is played by what the server knows: the will that was registered.
    agent = Agent(world.config(True), {n: StubReader(n, ConductorClock()) for n in world.meters}, ConductorClock())
    topic, payload = agent._will()
    assert topic == TOPICS.meter("east", "house", "status")
    opened = open_envelope(payload, LEDGER, lambda _: Signer("house", world.keys["house"].public))
    assert isinstance(opened.message, MeterStatus)
    assert not opened.message.online
    agent._link.close()
    agent._journal.close()
