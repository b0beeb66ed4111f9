"""A year of one meter and its agent in seconds: no socket, no sleep, and every mishap from one seed.

The agent is the real one with its real journal on disk; only clock, meter and MQTT link are played. What happens to it:
power cuts (nothing is flushed, and the monotonic clock starts anew), reads that fail for days, single wrong values, an
inverter's zeros at night, meter swaps and resets (with the power on or off), rollovers, clocks that are set, and a
broker that is away for days, forgets to answer, or loses what it answered.

The account is kept beside it from what the meter really counted, not from what the agent made of it. Energy can only be
lost where nobody could still know it: what an old meter counted after the agent's last commit before a power cut in
which the meter was swapped, and what flowed between two meters.
"""

import random
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest

from broker.protocol.envelope import parse, seal, sealed_id
from broker.protocol.keys import PrivateKey, generate_private_key, save_private_key
from broker.protocol.messages import Demand, Receipt, ReceiptStatus
from broker.protocol.mqtt_link import Incoming, MqttConfig
from broker.protocol.topics import Topics
from meter_agent import service
from meter_agent.config import AgentConfig, AgentSettings, MeterConfig, P1Config, PartyKey
from meter_agent.journal import Journal, JournalView
from meter_agent.readings import ReadFailure, Sample

METER: Final = "house"
LEDGER: Final = "year"
T0: Final = 1_767_225_600
"""2026-01-01 00:00 UTC."""

DAY_S: Final = 86_400
CAPACITY_W: Final = 14_000
MOST_W: Final = 4_000
"""The household stays so far below its capacity that two intervals' energy fits into one."""

ROLLOVER_MWH: Final = 10_000_000_000
"""A register small enough to go round in a year: 10 000 kWh."""

FAR_MWH: Final = 2_000_000_000
"""Further from the truth than the line could carry in the longest outage: nobody can tell a nearer value from a right
one."""

CLEAN_S: Final = DAY_S // 2
"""After a mishap nothing else happens for so long, so that each can be told from the next."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What may happen in a year, as events a year; `set_s` is by how much a clock is set at most."""

    days: int = 365
    interval_s: int = 1_800
    period_s: int = 600
    power_cuts: int = 40
    swaps: int = 4
    resets: int = 2
    wrong_values: int = 200
    failed_reads: int = 30
    zero_nights: int = 20
    clock_steps: int = 25
    set_s: int = 1_500
    broker_away: int = 12


QUIET: Final = Plan(
    days=2,
    power_cuts=0,
    swaps=0,
    resets=0,
    wrong_values=0,
    failed_reads=0,
    zero_nights=0,
    clock_steps=0,
    broker_away=0,
)
"""Two days in which nothing happens."""


class Meter:
    """A meter by its true count. `total_mwh` goes on over swaps and resets, `shown_mwh` is what its register says."""

    def __init__(self, generator: random.Random) -> None:
        self._random = generator
        self._power_w = 300
        self._rest = 0
        self.total_mwh = 0
        self.shown_mwh = 9_000_000_000
        self.number = 1

    def run(self, duration_s: int) -> None:
        """Count on for some seconds, at a power that changes now and then."""
        if self._random.random() < 0.2:
            self._power_w = self._random.choice((0, 80, 300, 1_200, MOST_W))
        self._rest += self._power_w * duration_s * 1_000
        moved_mwh, self._rest = divmod(self._rest, 3_600)
        self.total_mwh += moved_mwh
        self.shown_mwh = (self.shown_mwh + moved_mwh) % ROLLOVER_MWH

    def swap(self) -> None:
        """Another meter, which has been used before or not."""
        self.number += 1
        self.shown_mwh = self._random.choice((0, self._random.randrange(ROLLOVER_MWH)))

    def reset(self) -> None:
        """The same meter from 0."""
        self.shown_mwh = 0


@dataclass(slots=True)
class PlayedClock:
    """The gateway's clocks. `offset_s` is by how much the calendar is wrong."""

    now_s: int = T0
    booted_s: int = T0
    offset_s: int = 0
    synchronised: bool = True

    def monotonic_s(self) -> float:
        """Since the last boot."""
        return float(self.now_s - self.booted_s)

    def time_s(self) -> float:
        """The calendar as the gateway believes it."""
        return float(self.now_s + self.offset_s)

    def trusted(self) -> bool:
        """Whether the kernel says so."""
        return self.synchronised


@dataclass(slots=True)
class PlayedLink:
    """What the agent takes for its MQTT link. It lives as long as the agent's process."""

    broker: "PlayedBroker"
    connected: bool = False
    connections: int = 0
    last_failure: str = ""
    ready: deque[Incoming] = field(default_factory=deque)

    def poll(self, timeout_s: float) -> list[Incoming]:
        """What has come, without waiting."""
        if self.connected == self.broker.away:
            self.connected = not self.broker.away
            self.connections += self.connected
            self.ready.clear()
        came = list(self.ready)
        self.ready.clear()
        return came

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        """To the broker, if it is there."""
        if self.connected and topic.endswith("/demand"):
            self.broker.take(payload, self)

    def acknowledge(self, incoming: Incoming) -> None:
        """The broker clears its books by itself."""

    def flush(self) -> None:
        """Nothing is buffered."""

    def wake(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing is held."""


class PlayedBroker:
    """Keeps one demand for each interval, answers most of them, and refuses to hear two different ones."""

    def __init__(self, generator: random.Random) -> None:
        self._random = generator
        self.key = generate_private_key()
        self.away = False
        self.raw: dict[int, bytes] = {}
        self.demands: dict[int, Demand] = {}

    def take(self, raw: bytes, link: PlayedLink) -> None:
        """A demand has come; its receipt is lost one time in ten."""
        demand = Demand.from_payload(parse(raw).payload)
        assert self.raw.setdefault(demand.start_s, raw) == raw, "the same interval came with two payloads"
        self.demands[demand.start_s] = demand
        if self._random.random() < 0.1:
            return
        message_id = sealed_id(raw, LEDGER, METER)
        receipt = Receipt(METER, Demand.TYPE, demand.start_s, demand.revision, ReceiptStatus.ACCEPTED, message_id)
        payload = seal(receipt, self.key, LEDGER, "east")
        topic = Topics().meter("east", METER, "receipt")
        link.ready.append(Incoming(topic, payload, False, 1, 1, link.connections))


@dataclass(slots=True)
class Account:
    """What must come out: the register at the first boundary, and what nobody could still know."""

    first_mwh: int = 0
    first_total_mwh: int = 0
    lost_mwh: int = 0
    power_cuts: int = 0
    swaps: int = 0


class Year:
    """The gateway, its meter and its broker. `run` once."""

    def __init__(self, folder: Path, plan: Plan, seed: int) -> None:
        self.plan = plan
        self._random = random.Random(seed)
        self.meter = Meter(random.Random(seed + 1))
        self.broker = PlayedBroker(random.Random(seed + 2))
        self.clock = PlayedClock()
        self.account = Account()
        self._folder = folder
        self._agent: Any = None
        self._busy_until_s = 0
        self._read_fails_until_s = 0
        self._zero_until_s = 0
        self._away_until_s = 0
        save_private_key(folder / "house.pem", generate_private_key())
        self._config = self._make_config(self.broker.key)

    def run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The whole year, and then a quiet day in which everything is delivered."""
        monkeypatch.setattr(service, "MqttLink", lambda *_a, **_k: PlayedLink(self.broker))
        # The agent's resends run on the time of the simulation too.
        monkeypatch.setattr(service, "time", SimpleNamespace(monotonic=lambda: float(self.clock.now_s)))
        self._busy(0)
        self._start()
        self._sample()
        self.account.first_mwh, self.account.first_total_mwh = self.meter.shown_mwh, self.meter.total_mwh
        end_s = T0 + self.plan.days * DAY_S
        while self.clock.now_s < end_s:
            self._pass(self.plan.period_s)
            self._happen()
            self._sample()
        self._settle()

    def unassigned_wh(self) -> int:
        """What the journal says that is in no interval."""
        return int(self._agent._meters[METER].state.unassigned_wh)

    def events(self) -> set[str]:
        """The kinds of everything that the journal has on record."""
        self._agent._journal.flush()
        view = JournalView(self._folder)
        kinds = {kind for _, _, kind, _ in view.events(10_000)}
        view.close()
        return kinds

    def close(self) -> None:
        """Stop properly."""
        self._agent._journal.close()

    # What happens

    def _happen(self) -> None:
        plan, now_s = self.plan, self.clock.now_s
        self.broker.away = now_s < self._away_until_s
        if self._chance(plan.broker_away):
            self._away_until_s = now_s + self._random.randrange(3_600, 5 * DAY_S)
        if not self.clock.synchronised and self._random.random() < 0.3:
            self._synchronise()
        if now_s < self._busy_until_s:
            return
        if self._chance(plan.power_cuts) and not self.clock.offset_s:
            self._power_cut(swap=False)
        elif self._chance(plan.swaps):
            if self._random.random() < 0.5 and not self.clock.offset_s:
                self._power_cut(swap=True)
            else:
                self._swap()
        elif self._chance(plan.resets) and self._far_from_rollover():
            self._reset()
        elif self._chance(plan.failed_reads):
            self._read_fails_until_s = now_s + self._random.choice((600, 7_200, 3 * DAY_S))
            self._busy(self._read_fails_until_s - now_s)
        elif self._chance(plan.zero_nights) and self._far_from_rollover():
            self._zero_until_s = now_s + self._random.randrange(600, 36_000)
            self._busy(self._zero_until_s - now_s)
        elif self._chance(plan.clock_steps) and not self.clock.offset_s:
            self.clock.offset_s = self._random.randrange(-plan.set_s, plan.set_s + 1)
            self._busy(0)
        elif self.clock.offset_s and self._random.random() < 0.02:
            # NTP puts it right.
            self.clock.offset_s = 0
            self._busy(0)

    def _power_cut(self, swap: bool) -> None:
        """The gateway is gone at once; the meter counts on, or is dark as well, or is another one afterwards."""
        self.account.power_cuts += 1
        self._die()
        if swap:
            self._forget_uncommitted()
            self.meter.swap()
            self.account.swaps += 1
        dark_s = self._random.choice((60, 900, 10_000, 2 * DAY_S))
        if not swap and self._random.random() < 0.5:
            self._pass(dark_s)
        else:
            self.clock.now_s += dark_s
        self.clock.booted_s = self.clock.now_s
        if self._random.random() < 0.5:
            # A gateway without a clock of its own wakes up in the past.
            self.clock.synchronised = False
            self.clock.offset_s = -self._random.randrange(10 * DAY_S)
        self._busy(0)
        self._start()
        self._sample()

    def _swap(self) -> None:
        """The gateway stays on, has read the old meter just before, and reads the new one as soon as it has power."""
        self._busy(0)
        self._sample()
        self.meter.swap()
        self.account.swaps += 1
        self.clock.now_s += self._random.choice((120, 4_000))
        self._sample()

    def _reset(self) -> None:
        self._busy(0)
        self._sample()
        self.meter.reset()
        self.clock.now_s += 60
        self._sample()

    def _forget_uncommitted(self) -> None:
        """What the old meter has counted since the agent's last commit is known to nobody any more."""
        journal = Journal(self._folder, 92)
        anchor = journal.load(METER).anchor
        journal.close()
        assert anchor is not None
        known_mwh = (self.meter.shown_mwh - anchor.raw_mwh) % ROLLOVER_MWH
        assert known_mwh <= MOST_W * (self.plan.interval_s + 2 * DAY_S) // 3_600 * 1_000
        self.account.lost_mwh += known_mwh

    def _synchronise(self) -> None:
        self.clock.synchronised = True
        self.clock.offset_s = 0

    def _settle(self) -> None:
        """A day without mishaps, to the end of an interval, until everything is answered."""
        self._away_until_s = self._read_fails_until_s = self._zero_until_s = 0
        self.broker.away = False
        self._synchronise()
        last_s = (self.clock.now_s // DAY_S + 2) * DAY_S
        while self.clock.now_s < last_s:
            self._pass(min(self.plan.period_s, last_s - self.clock.now_s))
            self._sample()
        for _ in range(2_000):
            if not self._agent._meters[METER].waiting:
                break
            self.clock.now_s += 60
            self._agent._turn()

    # The agent

    def _start(self) -> None:
        self._agent = service.Agent(self._config, {METER: self}, self.clock)

    def _die(self) -> None:
        """As in a power cut: what is on disk is there, and nothing else."""
        journal = self._agent._journal
        journal._db.close()
        journal._lock.close()

    def _sample(self) -> None:
        try:
            result: Sample | ReadFailure = self.sample()
        except ReadFailure as failure:
            result = failure
        self._agent._results.put(METER, result)
        self._agent._turn()

    def sample(self) -> Sample:
        """What the reader gives. Implements MeterReader."""
        now_s = self.clock.now_s
        if now_s < self._read_fails_until_s:
            raise ReadFailure(METER, "nobody answers")
        shown_mwh = self.meter.shown_mwh
        if now_s < self._zero_until_s:
            shown_mwh = 0
        elif now_s >= self._busy_until_s and self._chance(self.plan.wrong_values):
            shown_mwh = (shown_mwh + self._random.randrange(FAR_MWH, ROLLOVER_MWH - FAR_MWH)) % ROLLOVER_MWH
        return Sample(
            self.clock.monotonic_s(),
            self.clock.time_s(),
            shown_mwh,
            None,
            serial_number=f"meter-{self.meter.number}",
            import_rollover_mwh=ROLLOVER_MWH,
        )

    def _pass(self, duration_s: int) -> None:
        """Time in which the meter counts."""
        self.meter.run(duration_s)
        self.clock.now_s += duration_s

    def _chance(self, a_year: int) -> bool:
        return self._random.random() < a_year * self.plan.period_s / (365 * DAY_S)

    def _busy(self, duration_s: int) -> None:
        self._busy_until_s = self.clock.now_s + duration_s + CLEAN_S

    def _far_from_rollover(self) -> bool:
        """Close to it, a 0 is what a rollover looks like."""
        return FAR_MWH < self.meter.shown_mwh < ROLLOVER_MWH - FAR_MWH

    def _make_config(self, broker: PrivateKey) -> AgentConfig:
        meter = MeterConfig("consumption", self._folder / "house.pem", CAPACITY_W, P1Config("p1", Path("/dev/null")))
        key = PartyKey("east", broker.public.cose_key.hex())
        interval_s: Any = self.plan.interval_s
        settings = AgentSettings(self._folder, key, LEDGER, interval_s=interval_s, keep_days=3_660)
        return AgentConfig(settings, {METER: meter}, MqttConfig())
