"""Tells the home's MQTT server what the meters show: a thread with a connection and a will of its own.

It is apart from the connection to the broker, because a home's server is often another one, a connection has only one
will, and nothing that the home does may hold up measuring. `show` and `failed` only leave a note; what is not sent yet
is replaced by what is newer.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from broker.protocol.mqtt_link import MqttConfig, MqttLink
from meter_agent.home_messages import OFFLINE, ONLINE, HomeTopics, discovery, values
from meter_agent.readings import Sample

LONGEST_WAIT_S: Final = 1.0

log = logging.getLogger("meter-agent")


@dataclass(slots=True)
class _Shown:
    """What is known of a meter, and what the server has been told on this connection."""

    sample: Sample | None = None
    hints: Mapping[str, bytes] = field(default_factory=dict)
    available: bool = False
    leaves: frozenset[str] = frozenset()
    told_leaves: frozenset[str] = frozenset()
    told_serial_number: str | None = None
    told_available: bool | None = None
    told: dict[str, bytes] = field(default_factory=dict)
    next_s: float = 0.0


class HomeLink:
    """Publishes from its own thread, from `start` to `close`."""

    def __init__(
        self,
        mqtt: MqttConfig,
        topics: HomeTopics,
        announce: bool,
        period_s: float,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`announce`: tell Home Assistant of the meters. Values go out at most every `period_s`. Raises OSError."""
        self._topics = topics
        self._announce = announce
        self._period_s = period_s
        self._monotonic_s = monotonic_s
        self._link = MqttLink(
            mqtt, f"agent-{topics.agent}-home", [], will=(topics.agent_availability, OFFLINE), receive_maximum=1
        )
        self._lock = threading.Lock()
        self._meters: dict[str, _Shown] = {}
        self._connection = 0
        self._logged_failure = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="home", daemon=True)

    def start(self) -> None:
        """Connect, and publish from now on."""
        self._thread.start()

    @property
    def connected(self) -> bool:
        """True while the home's server is reached."""
        return self._link.connected

    @property
    def last_failure(self) -> str:
        """Why it is not."""
        return self._link.last_failure

    def show(self, meter: str, sample: Sample, hints: Mapping[str, bytes]) -> None:
        """The meter shows this now, and the broker hints at that (values by the last level of their topics)."""
        with self._lock:
            shown = self._meters.setdefault(meter, _Shown())
            shown.sample, shown.hints, shown.available = sample, hints, True
            shown.leaves |= values(sample).keys() | hints.keys()

    def failed(self, meter: str) -> None:
        """The meter cannot be read."""
        with self._lock:
            self._meters.setdefault(meter, _Shown()).available = False

    def close(self) -> None:
        """Say that the agent is offline, and end."""
        self._stopping.set()
        self._link.wake()
        self._thread.join()
        self._link.publish(self._topics.agent_availability, OFFLINE, qos=1, retain=True)
        self._link.close()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._link.poll(min(LONGEST_WAIT_S, self._period_s))
            self._watch()
            if self._link.connected:
                with self._lock:
                    for meter, shown in self._meters.items():
                        self._publish(meter, shown)
                self._link.flush()

    def _watch(self) -> None:
        """A new connection, perhaps to a server that has forgotten everything, is told everything again."""
        if not self._link.connected:
            if self._link.last_failure != self._logged_failure:
                self._logged_failure = self._link.last_failure
                log.warning("the home's MQTT server: %s; the values wait", self._logged_failure)
            return
        if self._link.connections == self._connection:
            return
        self._connection = self._link.connections
        self._logged_failure = ""
        self._send(self._topics.agent_availability, ONLINE)
        with self._lock:
            for meter, shown in self._meters.items():
                self._meters[meter] = _Shown(shown.sample, shown.hints, shown.available, shown.leaves)

    def _publish(self, meter: str, shown: _Shown) -> None:
        if shown.available != shown.told_available:
            shown.told_available = shown.available
            self._send(self._topics.meter(meter, "availability"), ONLINE if shown.available else OFFLINE)
        sample = shown.sample
        if sample is None or self._monotonic_s() < shown.next_s:
            return
        new_device = (shown.leaves, sample.serial_number) != (shown.told_leaves, shown.told_serial_number)
        if self._announce and new_device:
            message = discovery(self._topics, meter, shown.leaves, sample.serial_number)
            self._send(self._topics.discovery(meter), message)
        shown.told_leaves, shown.told_serial_number = shown.leaves, sample.serial_number
        now = {**values(sample), **shown.hints}
        changed = {leaf: value for leaf, value in now.items() if shown.told.get(leaf) != value}
        if changed:
            shown.next_s = self._monotonic_s() + self._period_s
        for leaf, value in changed.items():
            self._send(self._topics.meter(meter, leaf), value)
        shown.told |= changed

    def _send(self, topic: str, payload: bytes) -> None:
        self._link.publish(topic, payload, qos=1, retain=True)
