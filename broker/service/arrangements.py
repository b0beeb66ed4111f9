"""What this broker arranges with its neighbours for the next day: its wishes, its promises, and what it heard.

Wishes are said with the close of the interval that ends at 13:00 (UTC, market time), promises with that of the one
that ends at 14:00, or when this broker gets that far after an outage, as long as the day has not begun. Each is said
once: it stands in the store from the commit of that close on, and after a restart the same bytes are published again.
Orders are planned and served by what the store has of it, so a broker that was killed goes on with the same promises.
"""

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from broker.market.arrangements import (
    PROMISED_BEFORE_S,
    WISHED_BEFORE_S,
    Arranged,
    plan_wishes,
    read_rows,
    rows_of,
    share_out,
    shortages_of,
    surpluses_of,
)
from broker.market.windows import DAY_S
from broker.protocol.market_time import Interval, MarketCalendar
from broker.protocol.messages import Forecast, MessageType, Promises, Wishes
from broker.protocol.sources import Source
from broker.protocol.topics import Topics
from broker.service.orders_in import PartnerPolicy
from broker.service.outputs import Identity, Outputs
from broker.service.store import BrokerStore

Promised = dict[tuple[str, Source], int]
"""Wh of one interval by (neighbour, source)."""

_NOTHING: Final[Mapping[int, Promised]] = {}


class _Day(NamedTuple):
    """The promises that concern this broker on one day, by index of the interval."""

    start_s: int
    to_others: Mapping[int, Promised]
    by_others: Mapping[int, Promised]


class Arrangements:
    """Wishes and promises. The core calls `advance` once a turn; orders are served and planned by `to` and `by`."""

    def __init__(
        self,
        identity: Identity,
        calendar: MarketCalendar,
        topics: Topics,
        store: BrokerStore,
        outputs: Outputs,
        policies: Mapping[str, PartnerPolicy],
        *,
        is_on: bool,
    ) -> None:
        """`policies` has every neighbour. Unless `is_on`, nothing is said and nothing that was promised counts."""
        self._identity = identity
        self._calendar = calendar
        self._topics = topics
        self._store = store
        self._outputs = outputs
        self._policies = policies
        self.is_on = is_on and bool(policies)
        self._done: dict[MessageType, int] = {}
        """Start of the newest day of which wishes, or promises, need not be said any more."""
        self._day = _Day(-1, _NOTHING, _NOTHING)

    # What is arranged

    def to(self, start_s: int) -> Promised:
        """What this broker promised of an interval, by (requester, source)."""
        return dict(self._arranged_on(start_s).to_others.get(self._index(start_s), {}))

    def by(self, start_s: int) -> Promised:
        """What neighbours promised this broker of an interval, by (supplier, source)."""
        return dict(self._arranged_on(start_s).by_others.get(self._index(start_s), {}))

    def _index(self, start_s: int) -> int:
        return start_s % DAY_S // self._calendar.interval_s

    def _arranged_on(self, start_s: int) -> _Day:
        day_s = start_s - start_s % DAY_S
        if self._day.start_s != day_s:
            to_others: dict[int, Promised] = {}
            by_others: dict[int, Promised] = {}
            for supplier, promises in (_heard_promises(self._store, day_s) if self.is_on else {}).items():
                for (requester, source, index), energy_wh in promises.items():
                    if supplier == self._identity.name:
                        to_others.setdefault(index, {})[requester, source] = energy_wh
                    elif requester == self._identity.name:
                        by_others.setdefault(index, {})[supplier, source] = energy_wh
            self._day = _Day(day_s, to_others, by_others)
        return self._day

    # What is heard

    def hear(self, peer: str, message: Wishes | Promises, market_time_s: int) -> None:
        """A neighbour's wishes or promises for a day. Only those of this day and the next are kept."""
        if message.broker != peer:
            self._outputs.complain(f"{peer} arranges in the name of {message.broker}; it is ignored")
            return
        today_s = market_time_s - market_time_s % DAY_S
        if message.start_s in (today_s, today_s + DAY_S) and message.end_s == message.start_s + DAY_S:
            self._keep(message)

    def _keep(self, message: Wishes | Promises) -> None:
        self._store.set_heard(message.start_s, message.TYPE, message.broker, message.to_payload())
        if message.start_s == self._day.start_s:
            self._day = _Day(-1, _NOTHING, _NOTHING)

    # What is said

    def advance(
        self,
        current: Interval,
        forecast_of: Callable[[int], Forecast | None],
        trust_ppm: Callable[[int], Mapping[str, int]],
    ) -> None:
        """Say what is due now that everything before `current` is closed.

        `forecast_of` gives what this broker publishes of the day with that start, None if it has not forecast it;
        `trust_ppm`, as of an interval, the neighbours that may be asked and how far each is trusted.
        """
        day_s = current.start_s - current.start_s % DAY_S + DAY_S
        own = self._identity.name
        if forecast := self._due(MessageType.WISHES, day_s, WISHED_BEFORE_S, current, forecast_of):
            trust = trust_ppm(current.start_s)
            wishes = plan_wishes(shortages_of(forecast), self._heard_surpluses(day_s), trust)
            self._say(self._topics.wishes, Wishes(own, day_s, day_s + DAY_S, rows_of(wishes)))
        if forecast := self._due(MessageType.PROMISES, day_s, PROMISED_BEFORE_S, current, forecast_of):
            surplus_wh = surpluses_of(forecast, day_s, self._calendar.interval_s)
            promises = share_out(self._wishes_of_us(day_s), surplus_wh, self._most_wh())
            self._say(self._topics.promises, Promises(own, day_s, day_s + DAY_S, rows_of(promises)))

    def _due(
        self,
        kind: MessageType,
        day_s: int,
        before_s: int,
        current: Interval,
        forecast_of: Callable[[int], Forecast | None],
    ) -> Forecast | None:
        """The forecast from which wishes or promises for a day are to be made now; None if they are not."""
        if not self.is_on or current.start_s < day_s - before_s or self._done.get(kind) == day_s:
            return None
        self._done[kind] = day_s
        return None if self._identity.name in self._store.heard(day_s, kind) else forecast_of(day_s)

    def _say(self, topic_of: Callable[[str], str], message: Wishes | Promises) -> None:
        self._keep(message)
        topic = topic_of(self._identity.name)
        raw = self._identity.seal(message)
        self._store.set_announcement(topic, raw)
        self._outputs.publish(topic, raw, retain=True)

    def _heard_surpluses(self, day_s: int) -> dict[str, dict[tuple[Source, int], int]]:
        return {
            peer: surpluses_of(Forecast.from_payload(payload), day_s, self._calendar.interval_s)
            for peer, payload in self._store.heard(day_s, MessageType.FORECAST).items()
        }

    def _wishes_of_us(self, day_s: int) -> Arranged:
        """What neighbours wish of this broker, under their names."""
        return {
            (peer, source, index): energy_wh
            for peer, wishes in _heard_wishes(self._store, day_s).items()
            for (supplier, source, index), energy_wh in wishes.items()
            if supplier == self._identity.name
        }

    def _most_wh(self) -> dict[str, int]:
        return {name: policy.most_wh for name, policy in self._policies.items() if policy.is_served}


class ArrangedWish(NamedTuple):
    """Wh that a broker wished of another for one interval of a day, and what was promised; None if no word has come."""

    day_start_s: int
    supplier: str
    requester: str
    source: Source
    interval: int
    wished_wh: int
    promised_wh: int | None


def arranged_for(store: BrokerStore, own_name: str, day_s: int) -> list[ArrangedWish]:
    """What this broker wished of its neighbours and they of it, by supplier, requester, interval and source."""
    wishes, promises = _heard_wishes(store, day_s), _heard_promises(store, day_s)
    arranged = []
    for requester, wished in wishes.items():
        for (supplier, source, index), energy_wh in wished.items():
            if own_name in (supplier, requester):
                promised = promises.get(supplier)
                promised_wh = None if promised is None else promised.get((requester, source, index), 0)
                arranged.append(ArrangedWish(day_s, supplier, requester, source, index, energy_wh, promised_wh))
    return sorted(arranged, key=lambda one: (one.supplier, one.requester, one.interval, one.source))


def _heard_wishes(store: BrokerStore, day_s: int) -> dict[str, Arranged]:
    """Everybody's wishes for a day, this broker's own among them: by broker, what it wishes of whom."""
    heard = store.heard(day_s, MessageType.WISHES)
    return {broker: read_rows(Wishes.from_payload(payload).wishes) for broker, payload in heard.items()}


def _heard_promises(store: BrokerStore, day_s: int) -> dict[str, Arranged]:
    """Everybody's promises for a day, this broker's own among them: by broker, what it promises to whom."""
    heard = store.heard(day_s, MessageType.PROMISES)
    return {broker: read_rows(Promises.from_payload(payload).promises) for broker, payload in heard.items()}
