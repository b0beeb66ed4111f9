"""The broker's foresight: it counts what is accepted, makes a forecast once a day, and gives hints to those who asked.

Every accepted reading and demand is added to the history of its interval in the same commit, so nothing has to look at
a month of messages at once and a restart neither loses nor repeats anything. When the interval that ends at noon (UTC,
market time) is closed, the next day is forecast from the history before that moment; what was forecast is kept, and
said again after a reconnect with the same bytes. Nothing here touches energy; what is kept for consumers by forecast
(`wanted_of_now`) is kept by the cycle.
"""

from typing import Final

from broker.market.contracts import Line
from broker.market.forecast import (
    HISTORY_S,
    MADE_BEFORE_S,
    Expectation,
    HistoryKind,
    HistoryRow,
    Target,
    expect,
    forecast_of,
    supply_levels,
)
from broker.market.keeping import kept_of_day, wanted_of_now
from broker.market.statements import Flow
from broker.market.windows import DAY_S, Window
from broker.protocol.market_time import Interval, MarketCalendar
from broker.protocol.messages import Forecast, Hint, MessageType, MeterValue, Reading, SupplyLevel
from broker.protocol.sources import Source, SourceGroup
from broker.protocol.topics import Topics
from broker.service.outputs import Identity, Outputs
from broker.service.registry import BoundedCache, Registry
from broker.service.store import BrokerStore

HINTS_A_TURN: Final = 256
"""A million hints take a minute of signing; other work goes on in between."""

_UWH: Final = 1_000_000
"""A demand counts for a line by its share in ppm, so history is kept in millionths of a Wh, and nothing is rounded."""

_MAX_CACHED_LEVELS: Final = 1_024


class Foresight:
    """History, the forecast of the next day, and hints. The core calls it once a turn."""

    def __init__(
        self,
        identity: Identity,
        calendar: MarketCalendar,
        topics: Topics,
        store: BrokerStore,
        registry: Registry,
        outputs: Outputs,
        *,
        has_neighbours: bool,
        keeps_for_windows: bool,
    ) -> None:
        """`keeps_for_windows`: neighbours do not get what own consumers will want later in the day."""
        self._identity = identity
        self._calendar = calendar
        self._topics = topics
        self._store = store
        self._registry = registry
        self._outputs = outputs
        self._has_neighbours = has_neighbours
        self._keeps_for_windows = keeps_for_windows
        self._counted_uwh: dict[tuple[int, HistoryKind, Target], int] = {}
        self._expectations = stored_expectations(store, calendar.interval_s)
        """Of the days that were forecast last, the newest at the end: the one before it is going on until midnight."""
        self._tried_day_s = self._expectations[-1].day_start_s if self._expectations else 0
        self._levels: BoundedCache[tuple[Line, ...], tuple[SupplyLevel, ...]] = self._fresh_levels()
        self._hints_due = True

    @property
    def unfinished(self) -> bool:
        """True while hints are left for the next turn."""
        return self._hints_due

    def again(self) -> None:
        """The connection is new, and the server may have forgotten what it retained: every hint is due again."""
        self._store.forget_hinted()
        self._hints_due = True

    def look_again(self) -> None:
        """Somebody may have asked for hints since."""
        self._hints_due = True

    def count(self, value: MeterValue) -> None:
        """A reading or demand was accepted for the first time. A correction counts by how far it changes the value."""
        change_wh = value.energy_wh
        if value.revision:
            known = self._store.messages_of(value.start_s, value.meter, value.TYPE)
            if known[-1].revision != value.revision:
                return  # A newer one was here before.
            change_wh -= known[-2].energy_wh if len(known) > 1 else 0
        if isinstance(value, Reading):
            device = self._registry.device(value.meter)
            if device is not None:
                self._add(value.start_s, HistoryKind.GENERATED, device.source, change_wh * _UWH)
            return
        consumer = self._registry.consumer(value.meter)
        version = consumer.contract_at(value.start_s) if consumer is not None else None
        if version is not None:
            for line in version.contract.lines:
                self._add(value.start_s, HistoryKind.DEMANDED, line.target, change_wh * line.share_ppm)
                if version.contract.window is not Window.INTERVAL:
                    self._add(value.start_s, HistoryKind.FLEXIBLE, line.target, change_wh * line.share_ppm)

    def _add(self, start_s: int, kind: HistoryKind, target: Target, energy_uwh: int) -> None:
        key = (start_s, kind, target)
        self._counted_uwh[key] = self._counted_uwh.get(key, 0) + energy_uwh

    def keep_counted(self) -> None:
        """Write what was counted in this turn, for the commit that accepts it."""
        if self._counted_uwh:
            self._store.add_history(
                [(start_s, int(kind), int(target), uwh) for (start_s, kind, target), uwh in self._counted_uwh.items()]
            )
            self._counted_uwh = {}

    def advance(self, current: Interval) -> None:
        """Make the forecast that is due now that everything before `current` is closed, and send some hints."""
        made_s = (current.start_s - MADE_BEFORE_S) // DAY_S * DAY_S + MADE_BEFORE_S
        day_s = made_s + MADE_BEFORE_S
        if day_s > self._tried_day_s:
            self._tried_day_s = day_s
            self._forecast(day_s, made_s)
        if self._hints_due:
            self._send_hints()

    def _forecast(self, day_s: int, made_s: int) -> None:
        expectation = expect(self._history(day_s - HISTORY_S, made_s), day_s, self._calendar.interval_s)
        self._store.forget_history(day_s - HISTORY_S)
        if expectation is None:
            return
        self._expectations = [*self._expectations[-1:], expectation]
        self._levels = self._fresh_levels()
        self._hints_due = True
        self._store.set_expected(day_s, _stored_rows(expectation), forget_before_s=self._expectations[0].day_start_s)
        if self._has_neighbours:
            topic = self._topics.forecast(self._identity.name)
            raw = self._identity.seal(self._told(expectation))
            self._store.set_announcement(topic, raw)
            self._outputs.publish(topic, raw, retain=True)

    def _told(self, expectation: Expectation) -> Forecast:
        """What neighbours are told of a day."""
        kept_wh = kept_of_day(expectation) if self._keeps_for_windows else ()
        return forecast_of(expectation, self._identity.name, kept_wh)

    def told_of(self, day_s: int) -> Forecast | None:
        """What neighbours are told of the UTC day that begins then; None if it is not forecast."""
        return next((self._told(each) for each in self._expectations if each.day_start_s == day_s), None)

    def wanted_of_now(self, interval: Interval) -> dict[Target, int]:
        """Wh by line target to keep for own consumers, who are expected to want it later that day.

        Nothing if that is not forecast, or if this broker does not keep anything.
        """
        for expectation in self._expectations if self._keeps_for_windows else ():
            index = (interval.start_s - expectation.day_start_s) // expectation.interval_s
            if index in expectation.intervals:
                return wanted_of_now(expectation, index)
        return {}

    def _history(self, since_s: int, until_s: int) -> list[HistoryRow]:
        rows = [
            HistoryRow(start_s, HistoryKind(kind), _target(target), uwh // _UWH)
            for start_s, kind, target, uwh in self._store.history(since_s, until_s)
        ]
        bought = self._store.transferred_wh(int(Flow.BOUGHT), since_s, until_s)
        rows += [HistoryRow(start_s, HistoryKind.BOUGHT, Source(source), wh) for start_s, source, wh in bought]
        return rows

    # Hints

    def _fresh_levels(self) -> BoundedCache[tuple[Line, ...], tuple[SupplyLevel, ...]]:
        """Contracts repeat, so equal lines share what was worked out for them."""
        return BoundedCache(_MAX_CACHED_LEVELS, self._levels_of)

    def _levels_of(self, lines: tuple[Line, ...]) -> tuple[SupplyLevel, ...] | None:
        return supply_levels(self._expectations[-1], lines) if self._expectations else None

    def _send_hints(self) -> None:
        if not self._expectations:
            self._hints_due = False
            return
        day_s = self._expectations[-1].day_start_s
        meters = self._store.hints_due(day_s, HINTS_A_TURN)
        for meter in meters:
            consumer = self._registry.consumer(meter)
            version = consumer.contract_at(day_s) if consumer is not None else None
            levels = self._levels.get(version.contract.lines) if version is not None else None
            if levels is not None:
                hint = Hint(meter, day_s, day_s + DAY_S, day_s - MADE_BEFORE_S, levels)
                topic = self._topics.meter(self._identity.name, meter, "hint")
                # QoS 0: what a broken connection swallows is sent again on the next one.
                self._outputs.publish(topic, self._identity.seal(hint), qos=0, retain=True)
        self._store.set_hinted(meters, day_s)
        self._hints_due = len(meters) == HINTS_A_TURN


def stored_expectations(store: BrokerStore, interval_s: int) -> list[Expectation]:
    """What was forecast of the last two days, as it was then, the newest at the end; less if there was less yet."""
    days: dict[int, dict[HistoryKind, dict[Target, tuple[int, ...]]]] = {}
    for day_s, kind, target, energies_wh in store.expected():
        by_kind = days.setdefault(day_s, {kind: {} for kind in HistoryKind})
        by_kind[HistoryKind(kind)][_target(target)] = energies_wh
    return [_expectation(day_s, interval_s, by_kind) for day_s, by_kind in days.items()]


def _expectation(day_s: int, interval_s: int, by_kind: dict[HistoryKind, dict[Target, tuple[int, ...]]]) -> Expectation:
    generated, bought = (
        {target: energies for target, energies in by_kind[kind].items() if isinstance(target, Source)}
        for kind in (HistoryKind.GENERATED, HistoryKind.BOUGHT)
    )
    demanded, flexible = by_kind[HistoryKind.DEMANDED], by_kind[HistoryKind.FLEXIBLE]
    return Expectation(day_s, interval_s, generated, demanded, bought, flexible)


def heard_forecasts(store: BrokerStore) -> list[Forecast]:
    """The newest forecast of each neighbour, by its name."""
    return [Forecast.from_payload(payload) for payload in store.newest_heard(MessageType.FORECAST)]


def _stored_rows(expectation: Expectation) -> list[tuple[int, int, tuple[int, ...]]]:
    kinds = (
        (HistoryKind.GENERATED, expectation.generated),
        (HistoryKind.DEMANDED, expectation.demanded),
        (HistoryKind.BOUGHT, expectation.bought),
        (HistoryKind.FLEXIBLE, expectation.flexible),
    )
    return [(int(kind), int(target), energies) for kind, by_target in kinds for target, energies in by_target.items()]


def _target(code: int) -> Target:
    return SourceGroup(code) if code >= SourceGroup.RENEWABLE else Source(code)
