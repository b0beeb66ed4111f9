"""The running agent: one loop around the pure parts, and a thread for each meter.

    reader threads ──samples──► intervals.advance ──sealed──► journal (one transaction) ──► outbox ──► MQTT
                                                                     receipts, deliveries ◄──────────────┘

On the system's clock each meter has a thread that samples it and puts what it gets into one bounded queue. In simulated
time there are no such threads: at the conductor's tick of a boundary the loop samples every meter itself, seals, sends,
and reports idle when all receipts have come. Everything but reading meters happens in the loop's thread.

A meter that cannot be read is reported and tried again; the others go on. A server that is down changes nothing but
that messages wait in the journal. Only a journal that cannot be written ends the agent: a number that might be
forgotten must not be sent.
"""

import contextlib
import logging
import queue
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from broker.protocol.envelope import KeyLookup, Signer, open_envelope, seal, sealed_id
from broker.protocol.errors import MalformedMessage, ProtocolError
from broker.protocol.keys import PrivateKey, PublicKey, load_private_key
from broker.protocol.limits import MAX_REASON_CHARACTERS
from broker.protocol.messages import Carrier, Demand, Hint, MeterStatus, Reading, Report, Stage, Tick
from broker.protocol.mqtt_link import Incoming, MqttLink
from broker.protocol.topics import Topics
from meter_agent.clock import AgentClock, ConductorClock
from meter_agent.config import AgentConfig, AgentSettings, MeterConfig
from meter_agent.hints import hints_json, home_values, read_hint, with_hint
from meter_agent.intervals import MeterRules, MeterState, SealedInterval, advance, next_boundary_s, retimed
from meter_agent.journal import Journal, OutboxRow
from meter_agent.outbox import (
    CONDUCTOR_PACE,
    MAX_UNDER_WAY,
    SYSTEM_PACE,
    Outbox,
    OutboxState,
    Pace,
    WaitingMessage,
    is_missed,
)
from meter_agent.readings import MeterReader, ReadFailure, Sample
from meter_agent.shown import sample_json
from meter_agent.status_socket import StatusSocket

if TYPE_CHECKING:
    from meter_agent.home_link import HomeLink

MAX_QUEUED_SAMPLES: Final = 1_024
"""Samples that wait for the loop. Registers are cumulative, so one that finds no room costs precision, not energy."""

MAX_HELD_SAMPLES: Final = 1_024
"""Samples of a meter that wait for the clock to be synchronised; the newest are kept."""

MAX_UNACKNOWLEDGED: Final = 16
"""Messages that wait for the next commit. Half of what we let the server have under way to us, or it would stop."""

LONGEST_READ_BACK_OFF_S: Final = 60.0
FIRST_TICK_RETRY_S: Final = 0.2
LONGEST_TICK_RETRY_S: Final = 5.0
IDLE_WAIT_S: Final = 60.0
STATUS_PERIOD_S: Final = 900.0
RETRY_REFUSED_S: Final = 86_400.0
"""Refused intervals are sent again once a day and at each start: what was wrong may have been put right since."""

DELIVERIES_BACK_S: Final = 2 * 86_400
"""A delivery that never came is asked for as long; one that was not the last word, with windows of a month in mind,"""
OPEN_DELIVERIES_BACK_S: Final = 32 * 86_400
"""so long, but only on a new connection: while there is one, the last word comes by itself."""

MAX_DEMANDS_LOOKED_AT: Final = 512
"""The newest ones. Looking at all of a month would hold up a small gateway for seconds."""

_STOP_WAIT_S: Final = 1.0
_THEN: Final = {
    OutboxState.REFUSED: " and sent again tomorrow or at the next start",
    OutboxState.CONFLICT: " and not sent again",
}
_CLOCK_FAULT: Final = "the clock is not synchronised yet, so no interval is sealed; check NTP (timedatectl)"

log = logging.getLogger("meter-agent")


@dataclass(slots=True)
class _Meter:
    """One meter while the agent runs."""

    name: str
    config: MeterConfig
    rules: MeterRules
    key: PrivateKey
    reader: MeterReader
    state: MeterState
    waiting: int
    """Sealed intervals without a receipt."""
    read_failure: str | None = None
    newest: Sample | None = None
    """The last one that was read, whether it was believed or not."""
    held: list[Sample] = field(default_factory=list)
    hints: tuple[Hint, ...] = ()
    """What the broker says of today and tomorrow."""
    next_due_s: int | None = None
    """In simulated time: the next boundary at which the meter is sampled."""
    reported_fault: str | None = None
    """The fault that the last status message carried."""


@dataclass(slots=True)
class _TickState:
    """Where the agent stands with the conductor."""

    tick: Tick | None = None
    reported: Report | None = None
    retry_at_s: float | None = None
    retry_after_s: float = FIRST_TICK_RETRY_S


class ReaderThread(threading.Thread):
    """Samples one meter again and again, aligned to the clock so that samples fall on boundaries, until stopped."""

    def __init__(
        self,
        meter: str,
        reader: MeterReader,
        period_s: float,
        clock: AgentClock,
        results: "Results",
        stop: threading.Event,
    ) -> None:
        super().__init__(name=f"reader-{meter}", daemon=True)
        self._meter = meter
        self._reader = reader
        self._period_s = period_s
        self._clock = clock
        self._results = results
        self._stop_event = stop
        self.ended = False

    def run(self) -> None:
        try:
            self._work()
        finally:
            self._reader.close()
            self.ended = True
            self._results.wake()

    def _work(self) -> None:
        back_off_s = 0.0
        while not self._stop_event.is_set():
            try:
                self._results.put(self._meter, self._reader.sample())
                back_off_s = 0.0
            except ReadFailure as failure:
                self._results.put(self._meter, failure)
                back_off_s = min(max(self._period_s, 2 * back_off_s), max(self._period_s, LONGEST_READ_BACK_OFF_S))
            wait_s = back_off_s or self._period_s - self._clock.time_s() % self._period_s
            self._stop_event.wait(wait_s)


class Results:
    """The bounded queue between reader threads and the loop."""

    def __init__(self, link: MqttLink) -> None:
        self._queue: queue.Queue[tuple[str, Sample | ReadFailure]] = queue.Queue(MAX_QUEUED_SAMPLES)
        self._link = link

    def put(self, meter: str, result: Sample | ReadFailure) -> None:
        """From a reader thread. Dropped if there is no room."""
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait((meter, result))
            self._link.wake()

    def wake(self) -> None:
        """Make the loop look around."""
        self._link.wake()

    def take(self) -> list[tuple[str, Sample | ReadFailure]]:
        """Everything that has come so far, oldest first."""
        results: list[tuple[str, Sample | ReadFailure]] = []
        while len(results) < MAX_QUEUED_SAMPLES:
            try:
                results.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return results


class ReaderDied(Exception):
    """A reader thread ended by an error that nobody foresaw; its traceback stands in the log. `thread` names it."""

    def __init__(self, thread: str) -> None:
        super().__init__(f"{thread} ended by an unforeseen error; please report the traceback above")
        self.thread = thread


class Agent:
    """One agent process. `run` until `stop`."""

    def __init__(
        self, config: AgentConfig, readers: Mapping[str, MeterReader], clock: AgentClock, pace: Pace | None = None
    ) -> None:
        """Open keys and journal. `readers` are by meter name, `pace` fits the clock unless given.

        Raises KeyFileError, JournalError, or OSError for MQTT files that cannot be read.
        """
        self._settings: AgentSettings = config.agent
        self._name = config.name
        self._clock = clock
        self._conductor_clock = clock if isinstance(clock, ConductorClock) else None
        self._topics = Topics(config.mqtt.root)
        broker = config.agent.broker
        self._broker = broker.name
        keys = {name: load_private_key(meter.key_file) for name, meter in config.meters.items()}
        self._journal = Journal(config.agent.data_dir, config.agent.keep_days)
        self._journal.retry_refused()
        self._retry_refused_at_s = time.monotonic() + RETRY_REFUSED_S
        self._meters = {
            name: _Meter(
                name,
                meter,
                _rules(meter, config.agent.interval_s),
                keys[name],
                readers[name],
                self._journal.load(name),
                self._journal.waiting_count(name),
            )
            for name, meter in config.meters.items()
        }
        if pace is None:
            pace = SYSTEM_PACE if self._conductor_clock is None else CONDUCTOR_PACE
        self._broker_key = _only(broker.name, broker.public_key())
        self._outbox = Outbox(pace, random.Random(self._name), config.agent.ledger, self._broker_key)
        self._more_in_journal = True
        self._look_back_s: int | None = None
        """How far back to look for deliveries that are missing; None if that was done."""
        self._ticks = _TickState()
        self._connections_seen = 0
        self._unacknowledged: list[Incoming] = []
        self._stopping = threading.Event()
        self._next_status_s = 0.0
        self._link = MqttLink(
            config.mqtt,
            f"agent-{self._name}",
            self._subscriptions(),
            will=self._will(),
            receive_maximum=2 * MAX_UNACKNOWLEDGED,
        )
        self._results = Results(self._link)
        self._link_was_up = False
        self._logged_failure = ""
        self._home = _home_link(config)
        self._status_socket: StatusSocket | None = None

    def stop(self) -> None:
        """End `run` soon. From a signal handler or another thread, once or more often."""
        self._stopping.set()
        self._results.wake()

    def run(self) -> None:
        """Work until stopped. Raises JournalError if the journal cannot be written, and ReaderDied."""
        threads = self._start_readers() if self._conductor_clock is None else []
        if self._home is not None:
            self._home.start()
        try:
            self._status_socket = StatusSocket(self._settings.data_dir, self.snapshot)
        except OSError as error:
            # Not worth an agent that does not run: some file systems have no sockets.
            log.warning("`meter-agent status` will not see this agent: %s", error)
        try:
            while not self._stopping.is_set():
                self._turn()
                for thread in threads:
                    if thread.ended and not self._stopping.is_set():
                        # Better started anew as a whole than going on without a meter and nobody noticing.
                        raise ReaderDied(thread.name)
        finally:
            self._shut_down(threads)

    def snapshot(self) -> dict[str, Any]:
        """Where the agent stands, for `meter-agent status`. From any thread: it only looks."""
        home = self._home
        return {
            "agent": self._name,
            "time_s": int(self._clock.time_s()),
            "clock": {"source": self._settings.clock, "synchronised": self._clock.trusted()},
            "broker": {
                "name": self._broker,
                "connected": self._link.connected,
                "failure": self._link.last_failure or None,
            },
            "home": None if home is None else {"connected": home.connected, "failure": home.last_failure or None},
            "meters": {
                meter.name: {
                    "reading": None if meter.newest is None else sample_json(meter.newest),
                    "fault": self._fault_of(meter),
                    "waiting": meter.waiting,
                    "unassigned_wh": meter.state.unassigned_wh,
                    "hint": hints_json(meter.hints, self._clock.time_s()),
                }
                for meter in self._meters.values()
            },
        }

    def _start_readers(self) -> list[ReaderThread]:
        threads = [
            ReaderThread(
                meter.name, meter.reader, meter.config.sample_period_s, self._clock, self._results, self._stopping
            )
            for meter in self._meters.values()
        ]
        for thread in threads:
            thread.start()
        return threads

    def _shut_down(self, threads: list[ReaderThread]) -> None:
        self._stopping.set()
        if self._status_socket is not None:
            self._status_socket.close()
        if self._home is not None:
            self._home.close()
        for meter in self._meters.values():
            self._publish_status(meter, online=False)
        self._link.close()
        deadline_s = time.monotonic() + _STOP_WAIT_S
        for thread in threads:
            # Daemons: one that still waits for its meter does not hold up the end.
            thread.join(max(0.0, deadline_s - time.monotonic()))
        if not threads:
            for meter in self._meters.values():
                meter.reader.close()
        self._journal.close()

    def _turn(self) -> None:
        for incoming in self._link.poll(self._wait_s()):
            self._take(incoming)
        self._watch_link()
        for name, result in self._results.take():
            self._take_result(self._meters[name], result)
        self._retry_tick()
        self._retry_refused()
        self._refill()
        self._ask_for_deliveries()
        self._send_due()
        self._report()
        self._acknowledge()
        self._publish_statuses()
        self._link.flush()

    def _wait_s(self) -> float:
        """How long nothing has to be done unless something comes."""
        now_s = time.monotonic()
        times = [now_s + IDLE_WAIT_S, self._next_status_s if self._link.connected else None, self._ticks.retry_at_s]
        if self._link.connected:
            times.append(self._outbox.next_due_s())
        return max(0.0, min(moment for moment in times if moment is not None) - now_s)

    def _watch_link(self) -> None:
        if self._link.connected and not self._link_was_up:
            self._logged_failure = ""
            log.info("connected to the MQTT server")
        elif not self._link.connected and self._link.last_failure != self._logged_failure:
            self._logged_failure = self._link.last_failure
            log.warning("MQTT: %s; measuring goes on and messages wait", self._logged_failure)
        self._link_was_up = self._link.connected
        if self._link.connections == self._connections_seen or not self._link.connected:
            return
        self._connections_seen = self._link.connections
        self._unacknowledged.clear()
        self._outbox.reconnected(time.monotonic())
        self._ticks.reported = None
        self._look_back_s = OPEN_DELIVERIES_BACK_S
        for meter in self._meters.values():
            self._publish_status(meter, online=True)

    # What comes in

    def _subscriptions(self) -> list[tuple[str, int]]:
        topics = [
            (self._topics.meter(self._broker, name, leaf), 1)
            for name in self._meters
            for leaf in ("receipt", "delivery")
        ]
        if self._settings.hints:
            topics += [
                (self._topics.meter(self._broker, name, "hint"), 1)
                for name, meter in self._meters.items()
                if meter.config.direction == "consumption"
            ]
        return topics + ([(self._topics.time, 1)] if self._conductor_clock is not None else [])

    def _take(self, incoming: Incoming) -> None:
        levels = self._topics.split(incoming.topic)
        try:
            if levels == ("time",):
                self._take_tick(incoming.payload)
            elif levels[-1] == "receipt":
                self._take_receipt(incoming.payload)
            elif levels[-1] == "delivery":
                delivery = self._outbox.read_delivery(incoming.payload)
                self._journal.note_delivery(delivery.meter, delivery.start_s, delivery.revision, incoming.payload)
            elif levels[-1] == "hint":
                meter = self._meters[levels[-2]]
                hint = read_hint(incoming.payload, meter.name, self._settings.ledger, self._broker_key)
                meter.hints = with_hint(meter.hints, hint)
        except ProtocolError as error:
            # Not from our broker or conductor: nothing is changed by it, and the operator is told.
            self._note(levels[-2] if len(levels) > 2 else self._name, "bad-message", f"on {incoming.topic}: {error}")
        if incoming.qos:
            self._unacknowledged.append(incoming)

    def _take_receipt(self, raw: bytes) -> None:
        answered = self._outbox.take_receipt(raw)
        if answered is None:
            return
        message = answered.message
        self._journal.note_answer(message.meter, message.start_s, message.revision, answered.state, raw)
        self._meters[message.meter].waiting -= 1
        if answered.state is not OutboxState.ACCEPTED:
            self._note(
                message.meter,
                answered.state.name.lower(),
                f"the broker answered {answered.state.name.lower()} for the interval from {message.start_s}: "
                f"{answered.reason or 'no reason given'}; it is kept on record{_THEN[answered.state]}",
            )

    def _acknowledge(self) -> None:
        """Acknowledge what is on disk; write it first where too much would be under way otherwise."""
        if len(self._unacknowledged) >= MAX_UNACKNOWLEDGED:
            self._journal.flush()
        if not self._journal.notes:
            for incoming in self._unacknowledged:
                self._link.acknowledge(incoming)
            self._unacknowledged.clear()

    # Samples

    def _take_result(self, meter: _Meter, result: Sample | ReadFailure) -> None:
        if isinstance(result, ReadFailure):
            self._read_failed(meter, result)
            return
        self._read_worked(meter, result)
        if not self._clock.trusted():
            meter.held.append(result)
            del meter.held[:-MAX_HELD_SAMPLES]
            return
        now = self._clock.monotonic_s(), self._clock.time_s()
        for early in meter.held:
            self._take_sample(meter, retimed(early, *now))
        meter.held.clear()
        self._take_sample(meter, result)

    def _read_failed(self, meter: _Meter, failure: ReadFailure) -> None:
        if meter.read_failure is None:
            self._note(meter.name, "read-failure", failure.reason)
        meter.read_failure = failure.reason
        if self._home is not None:
            self._home.failed(meter.name)

    def _read_worked(self, meter: _Meter, sample: Sample) -> None:
        meter.newest = sample
        if meter.read_failure is not None:
            self._note(meter.name, "recovered", "the meter answers again")
        meter.read_failure = None

    def _take_sample(self, meter: _Meter, sample: Sample) -> None:
        step = advance(meter.state, sample, meter.rules)
        for event in step.events:
            self._note(meter.name, event.kind.value, event.detail)
        if step.keep:
            rows = [self._sign(meter, interval) for interval in step.sealed]
            self._journal.seal(meter.name, step.state, rows)
            meter.waiting += len(rows)
            self._look_back_s = self._look_back_s or DELIVERIES_BACK_S
            messages = [
                WaitingMessage(meter.name, row.interval.start_s, row.revision, row.message_id, row.message)
                for row in rows
            ]
            if not self._outbox.add(messages, time.monotonic()):
                self._more_in_journal = True
        meter.state = step.state
        # What the agent itself does not believe yet, the home is not told either.
        if self._home is not None and step.state.fault is None:
            self._home.show(meter.name, sample, home_values(meter.hints, self._clock.time_s()))

    def _sign(self, meter: _Meter, interval: SealedInterval) -> OutboxRow:
        message_class = Demand if meter.config.direction == "consumption" else Reading
        message = message_class(
            meter.name,
            interval.start_s,
            interval.end_s,
            0,
            interval.energy_wh,
            interval.quality,
            Carrier.ELECTRICITY,
            interval.sampled_s,
        )
        raw = seal(message, meter.key, self._settings.ledger, meter.name)
        return OutboxRow(interval, 0, sealed_id(raw, self._settings.ledger, meter.name), raw)

    # What goes out

    def _retry_refused(self) -> None:
        if time.monotonic() < self._retry_refused_at_s:
            return
        self._retry_refused_at_s = time.monotonic() + RETRY_REFUSED_S
        if self._journal.retry_refused():
            self._more_in_journal = True
            for meter in self._meters.values():
                meter.waiting = self._journal.waiting_count(meter.name)

    def _refill(self) -> None:
        if not self._more_in_journal or len(self._outbox) > MAX_UNDER_WAY // 2:
            return
        messages = self._journal.waiting(list(self._meters), MAX_UNDER_WAY)
        self._more_in_journal = len(messages) == MAX_UNDER_WAY
        self._outbox.add(messages, time.monotonic())

    def _ask_for_deliveries(self) -> None:
        """Send demands again whose deliveries should be here: this agent may have been away when they came."""
        consumption = [meter.name for meter in self._meters.values() if meter.config.direction == "consumption"]
        if self._look_back_s is None or not consumption or not self._link.connected or not self._clock.trusted():
            return
        back_s, self._look_back_s = self._look_back_s, None
        now_s = self._clock.time_s()
        demands = self._journal.accepted_demands(consumption, int(now_s) - back_s, MAX_DEMANDS_LOOKED_AT)
        missed = [
            demand.message for demand in demands if is_missed(demand, now_s, open_too=back_s == OPEN_DELIVERIES_BACK_S)
        ]
        self._outbox.ask(missed, time.monotonic())

    def _send_due(self) -> None:
        if not self._link.connected:
            return
        due = self._outbox.due(time.monotonic())
        if due:
            self._report()
        for message in due:
            leaf = "demand" if self._meters[message.meter].config.direction == "consumption" else "reading"
            self._link.publish(self._topics.meter(self._broker, message.meter, leaf), message.message, qos=1)

    def _fault_of(self, meter: _Meter) -> str | None:
        if meter.read_failure is not None:
            return meter.read_failure
        if meter.state.fault is not None:
            return meter.state.fault.value
        return None if self._clock.trusted() or self._conductor_clock is not None else _CLOCK_FAULT

    def _publish_statuses(self) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_status_s:
            self._next_status_s = now_s + STATUS_PERIOD_S
            for meter in self._meters.values():
                self._publish_status(meter, online=True)
        for meter in self._meters.values():
            if self._fault_of(meter) != meter.reported_fault:
                self._publish_status(meter, online=True)

    def _publish_status(self, meter: _Meter, online: bool) -> None:
        meter.reported_fault = self._fault_of(meter)
        self._link.publish(
            self._topics.meter(self._broker, meter.name, "status"), self._status(meter, online), qos=1, retain=True
        )

    def _status(self, meter: _Meter, online: bool) -> bytes:
        fault = self._fault_of(meter)
        reason = fault[:MAX_REASON_CHARACTERS] if fault is not None else None
        status = MeterStatus(meter.name, online, int(self._clock.time_s()), meter.waiting, reason)
        return seal(status, meter.key, self._settings.ledger, meter.name)

    def _will(self) -> tuple[str, bytes]:
        # A connection has one will: it speaks for the first meter, and so for the agent.
        meter = next(iter(self._meters.values()))
        return self._topics.meter(self._broker, meter.name, "status"), self._status(meter, online=False)

    def _note(self, meter: str, kind: str, detail: str) -> None:
        log.info("%s: %s: %s", meter, kind, detail)
        self._journal.note_event(int(self._clock.time_s()), meter, kind, detail)

    # Simulated time

    def _take_tick(self, raw: bytes) -> None:
        clock, conductor = self._conductor_clock, self._settings.conductor
        assert clock is not None
        assert conductor is not None
        opened = open_envelope(raw, self._settings.ledger, _only(conductor.name, conductor.public_key()))
        tick = opened.message
        if not isinstance(tick, Tick):
            raise MalformedMessage("time", f"a tick, got a {tick.TYPE.name.lower()}")
        last = self._ticks.tick
        # While the simulated world moves its meters, agents have nothing to say.
        if tick.stage is not Stage.MARKET or (last is not None and tick.time_s < last.time_s):
            return
        # Said again even if it is the same: a conductor that asks again has not heard us.
        self._ticks.reported = None
        if tick == last:
            return
        clock.set(tick.time_s)
        self._ticks.tick = tick
        self._ticks.retry_at_s = None
        self._ticks.retry_after_s = FIRST_TICK_RETRY_S
        for meter in self._meters.values():
            if meter.next_due_s is None:
                meter.next_due_s = _first_due_s(meter.state, tick.time_s, meter.rules.interval_s)
        if self._due_meters():
            self._report()
            self._sample_due_meters()

    def _due_meters(self) -> list[_Meter]:
        tick = self._ticks.tick
        if tick is None:
            return []
        return [m for m in self._meters.values() if m.next_due_s is not None and m.next_due_s <= tick.time_s]

    def _sample_due_meters(self) -> None:
        tick = self._ticks.tick
        assert tick is not None
        for meter in self._due_meters():
            try:
                sample = meter.reader.sample()
            except ReadFailure as failure:
                self._read_failed(meter, failure)
                self._ticks.retry_at_s = time.monotonic() + self._ticks.retry_after_s
                self._ticks.retry_after_s = min(2 * self._ticks.retry_after_s, LONGEST_TICK_RETRY_S)
                continue
            self._read_worked(meter, sample)
            self._take_sample(meter, sample)
            meter.next_due_s = next_boundary_s(tick.time_s, meter.rules.interval_s)

    def _retry_tick(self) -> None:
        """Nobody's time goes on before this agent has its readings, so a meter that failed is tried again soon."""
        retry_at_s = self._ticks.retry_at_s
        if retry_at_s is not None and time.monotonic() >= retry_at_s:
            self._ticks.retry_at_s = None
            self._sample_due_meters()

    def _report(self) -> None:
        """Tell the conductor where we stand, if that has changed since it was last told."""
        tick = self._ticks.tick
        if tick is None or not self._link.connected:
            return
        idle = not self._due_meters() and not len(self._outbox)
        next_due = [m.next_due_s for m in self._meters.values() if m.next_due_s is not None]
        report = Report(self._name, tick.time_s, tick.stage, idle, min(next_due) if idle else None)
        if report != self._ticks.reported:
            self._ticks.reported = report
            self._link.publish(self._topics.report(self._name), report.to_bytes(), qos=0, retain=True)


def _home_link(config: AgentConfig) -> "HomeLink | None":
    """The connection to the home's MQTT server, if the config wants one. Raises OSError."""
    home = config.home_assistant
    if home is None:
        return None
    # Imported where it is wanted: most agents have no memory to spare for it.
    from meter_agent.home_link import HomeLink
    from meter_agent.home_messages import HomeTopics

    topics = HomeTopics(home.topic, home.discovery_prefix, config.name)
    return HomeLink(home.mqtt or config.mqtt, topics, home.discovery, home.period_s)


def _rules(meter: MeterConfig, interval_s: int) -> MeterRules:
    return MeterRules(
        interval_s=interval_s,
        register=meter.register_name,
        capacity_w=meter.capacity_w,
        resolution_mwh=1_000 * meter.resolution_wh,
        stuck_after_wh=meter.stuck_after_wh,
    )


def _first_due_s(state: MeterState, time_s: int, interval_s: int) -> int:
    """The first boundary that a meter has to be sampled at: the one after the last sealed, or the next at all."""
    if state.boundary is not None:
        return state.boundary.at_s + interval_s
    return -(-time_s // interval_s) * interval_s


def _only(name: str, key: PublicKey) -> KeyLookup:
    """Knows one sender and nobody else."""
    signer = Signer(name, key)
    return lambda key_id: signer if key_id == key.key_id else None
