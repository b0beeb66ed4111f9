"""The conductor: ticks simulated calendar time, and ticks again only when everybody has committed the last tick's work.

Theory of operation. A `Tick(time_s, stage)` is published retained on `time`; each participant answers on
`time/<participant>` with a retained `Report`. There are two lists of participants. Those of the *world* (simulated
meters) answer stage WORLD, those of the *market* (agents and brokers) stage MARKET:

    WORLD at t ──all idle──► MARKET at t ──all idle at one ledger height──► WORLD or MARKET at the smallest next_wake_s

A participant says `idle=False` before it sends anything that new work causes, and MQTT keeps the order of each sender.
So when all stand at `idle=True` for the tick, and at the same ledger height, nothing is under way. A broker that waits
for another (an answer, an announcement) is idle too, and says what it waits for; the other says what it has not said
yet (`Report.waits_for`, `holds`). As long as the two fit, both wait for time to pass; once they do not, the word is on
its way.

WORLD is left out where no participant of the world wants to wake. The last tick is sent again every second and after a
reconnect, and participants answer every copy, so whoever was restarted finds time and is found.

`Schedule` is the pure state of all that; `Conductor` is the thin shell that holds the MQTT connection.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from broker.protocol.envelope import seal
from broker.protocol.errors import MalformedMessage
from broker.protocol.keys import PrivateKey
from broker.protocol.messages import Report, Stage, Tick
from broker.protocol.mqtt_link import MqttConfig, MqttLink
from broker.protocol.topics import Topics

REPEAT_TICK_S: Final = 1.0
DEFAULT_STALL_LIMIT_S: Final = 30.0
"""Real time without a new tick after which the run is given up: longer than any restart, shorter than patience."""


class ConductorStalled(Exception):
    """Some participants did not report everything committed in time. `waiting` says for each what it last said."""

    def __init__(self, tick: Tick, limit_s: float, waiting: tuple[str, ...]) -> None:
        super().__init__(
            f"no progress for {limit_s:g} s at {_named(tick)}; look at the logs of those we wait for:\n  "
            + "\n  ".join(waiting)
        )
        self.tick = tick
        self.waiting = waiting


@dataclass(slots=True)
class _Participant:
    """The last report of one participant, and when it wants to wake as of its last settled tick."""

    report: Report | None = None
    next_wake_s: int | None = None
    unreadable: str | None = None


class Schedule:
    """Which tick comes next. Pure: reports go in, ticks come out."""

    def __init__(self, start_s: int, end_s: int, world: Sequence[str], market: Sequence[str]) -> None:
        """Time runs from `start_s` to `end_s`, both of them ticks. Names must be different, and at least one."""
        names = [*world, *market]
        if not names or len(set(names)) != len(names):
            raise ValueError("expected at least one participant, each named once in world or market")
        if end_s < start_s:
            raise ValueError(f"end_s {end_s} is before start_s {start_s}")
        self._world = {name: _Participant() for name in world}
        self._market = {name: _Participant() for name in market}
        self._end_s = end_s
        self.tick = Tick(start_s, Stage.WORLD if world else Stage.MARKET)
        self.finished = False

    def take(self, report: Report) -> None:
        """Note a report. Those of strangers are ignored."""
        participant = self._world.get(report.participant) or self._market.get(report.participant)
        if participant is not None:
            participant.report = report
            participant.unreadable = None

    def take_unreadable(self, name: str, reason: str) -> None:
        """Note that a participant sent something that is no report."""
        participant = self._world.get(name) or self._market.get(name)
        if participant is not None:
            participant.unreadable = reason

    def forget_reports(self) -> None:
        """The connection was lost: what was said before may be out of date, so everybody has to say it again."""
        for participant in (*self._world.values(), *self._market.values()):
            participant.report = None

    @property
    def settled(self) -> bool:
        """True when everybody of this stage has committed the work of this tick."""
        current = self._current()
        if not all(self._idle(participant) and not self._unmet(name) for name, participant in current.items()):
            return False
        return len(self._heights(current)) <= 1

    def advance(self) -> Tick | None:
        """The next tick if this one is settled, else None. After the last tick None, and `finished` is true."""
        if self.finished or not self.settled:
            return None
        for participant in self._current().values():
            assert participant.report is not None
            participant.next_wake_s = participant.report.next_wake_s
        if self.tick.stage is Stage.WORLD and self._market:
            self.tick = Tick(self.tick.time_s, Stage.MARKET)
            return self.tick
        if self.tick.time_s == self._end_s:
            self.finished = True
            return None
        next_s = min((*self._wakes(self._world), *self._wakes(self._market), self._end_s))
        world_wakes = any(wake_s <= next_s for wake_s in self._wakes(self._world))
        self.tick = Tick(next_s, Stage.WORLD if world_wakes or not self._market else Stage.MARKET)
        return self.tick

    def waiting(self) -> tuple[str, ...]:
        """For each participant that we wait for, a sentence with what it last said."""
        current = self._current()
        lines = [self._said(name, participant) for name, participant in current.items() if not self._idle(participant)]
        if not lines:
            lines = [
                f"{name}: waits for {len(self._unmet(name))} things that nobody says to hold"
                for name in current
                if self._unmet(name)
            ]
        heights = self._heights(current)
        if not lines and len(heights) > 1:
            lines = [
                f"{name}: idle at ledger height {participant.report.height}, others have taken in {max(heights)}"
                for name, participant in current.items()
                if participant.report is not None and participant.report.height not in (None, max(heights))
            ]
        return tuple(lines)

    def _current(self) -> dict[str, _Participant]:
        return self._world if self.tick.stage is Stage.WORLD else self._market

    def _idle(self, participant: _Participant) -> bool:
        report = participant.report
        return (
            report is not None
            and report.idle
            and report.time_s == self.tick.time_s
            and report.stage is self.tick.stage
            # Idle and yet wanting to act now again is a contradiction: better stopped than run second by second.
            and (report.next_wake_s is None or report.next_wake_s > self.tick.time_s)
        )

    def _unmet(self, name: str) -> set[bytes]:
        reports = [participant.report for participant in self._current().values() if participant.report is not None]
        return unmet(name, reports)

    def _said(self, name: str, participant: _Participant) -> str:
        report = participant.report
        if participant.unreadable is not None:
            return f"{name}: sent an unreadable report ({participant.unreadable})"
        if report is None:
            return f"{name}: never reported"
        state = "idle" if report.idle else "busy"
        at = _named(Tick(report.time_s, report.stage))
        return f"{name}: last reported {state} at {at}, next wake {report.next_wake_s}, ledger height {report.height}"

    @staticmethod
    def _heights(participants: dict[str, _Participant]) -> set[int]:
        reports = [participant.report for participant in participants.values()]
        return {report.height for report in reports if report is not None and report.height is not None}

    @staticmethod
    def _wakes(participants: dict[str, _Participant]) -> list[int]:
        wakes = [participant.next_wake_s for participant in participants.values()]
        return [wake_s for wake_s in wakes if wake_s is not None]


def unmet(name: str, reports: Sequence[Report]) -> set[bytes]:
    """What a participant waits for that nobody else holds: it is on its way, and will make it act."""
    waits_for: set[bytes] = set()
    held: set[bytes] = set()
    for report in reports:
        if report.participant == name:
            waits_for.update(report.waits_for or ())
        else:
            held.update(report.holds or ())
    return waits_for - held


class Conductor:
    """Runs simulated time over MQTT. Use it in a `with`; `run` may be called again for later time."""

    def __init__(
        self,
        mqtt: MqttConfig,
        ledger: str,
        key: PrivateKey,
        *,
        name: str = "conductor",
        stall_limit_s: float = DEFAULT_STALL_LIMIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`key` and `name` are those of the genesis of a simulated `ledger`. `clock` is real time, in seconds."""
        self._topics = Topics(mqtt.root)
        self._link = MqttLink(mqtt, f"{name}-{ledger}", [(self._topics.report("+"), 0)])
        self._ledger = ledger
        self._key = key
        self._name = name
        self._stall_limit_s = stall_limit_s
        self._clock = clock
        self._known_connections = 0

    def run(
        self,
        start_s: int,
        end_s: int,
        *,
        world: Sequence[str] = (),
        market: Sequence[str] = (),
        on_progress: Callable[[Tick], None] | None = None,
        while_waiting: Callable[[], None] | None = None,
    ) -> int:
        """Let time run from `start_s` until everybody has settled `end_s`. Returns the number of ticks.

        `on_progress` is called with each tick as it is sent, `while_waiting` at every turn of the loop (for looking
        after processes; what it raises ends the run). Raises ConductorStalled.
        """
        schedule = Schedule(start_s, end_s, world, market)
        sealed = self._send(schedule.tick, on_progress)
        ticks = 1
        sent_s = progress_s = self._clock()
        while not schedule.finished:
            now_s = self._clock()
            if now_s - progress_s >= self._stall_limit_s:
                raise ConductorStalled(schedule.tick, self._stall_limit_s, schedule.waiting())
            if now_s - sent_s >= REPEAT_TICK_S:
                self._publish(sealed)
                sent_s = now_s
            if while_waiting is not None:
                while_waiting()
            self._take_reports(schedule, max(0.0, sent_s + REPEAT_TICK_S - now_s))
            if self._link.connections != self._known_connections:
                if self._known_connections:
                    schedule.forget_reports()
                self._known_connections = self._link.connections
                self._publish(sealed)
            tick = schedule.advance()
            if tick is not None:
                sealed = self._send(tick, on_progress)
                ticks += 1
                sent_s = progress_s = self._clock()
        return ticks

    def close(self) -> None:
        self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take_reports(self, schedule: Schedule, timeout_s: float) -> None:
        for incoming in self._link.poll(timeout_s):
            name = incoming.topic.rpartition("/")[2]
            try:
                report = Report.from_bytes(incoming.payload)
            except MalformedMessage as error:
                schedule.take_unreadable(name, str(error))
                continue
            # A report is believed only on its own topic, or one participant could speak for another by mistake.
            if report.participant == name:
                schedule.take(report)
            else:
                schedule.take_unreadable(name, f"it names {report.participant}")

    def _send(self, tick: Tick, on_progress: Callable[[Tick], None] | None) -> bytes:
        sealed = seal(tick, self._key, self._ledger, self._name)
        self._publish(sealed)
        if on_progress is not None:
            on_progress(tick)
        return sealed

    def _publish(self, sealed: bytes) -> None:
        self._link.publish(self._topics.time, sealed, retain=True)
        self._link.flush()


def _named(tick: Tick) -> str:
    return f"time {tick.time_s}, stage {tick.stage.name}"
