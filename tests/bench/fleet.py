"""Many meters on one broker at a steady rate: how long a receipt takes, and whether a demand is lost or counted twice.

Real mosquitto, real signatures. Each interval of simulated time takes `meters / rate` seconds of real time, in which
every meter sends its demand of the interval before, spread evenly over nine tenths of it, whatever the broker does
meanwhile; then comes the next tick. What the broker does at its gates (clearing, ledger, deliveries) falls into the
same time and delays receipts: that is what the 99th percentile shows. Latency is from a demand's first publish to its
signed receipt, resends included.

The rate is fixed for the whole run. A short probe sends one interval as fast as the broker answers, which includes
clearing, ledger and deliveries; `RATE_PERCENT` of that is the rate.
"""

import itertools
import math
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

from dengen_testing.mosquitto import Mosquitto

from bench.hot_path import one_interval
from bench.processes import Helper, rss_mb
from bench.world import (
    FIRST_INTERVAL_S,
    INTERVAL_S,
    MAX_DEMAND_WH,
    BrokerFolder,
    RunningBroker,
    add_consumers,
    make_broker,
)
from broker.protocol.messages import MessageType
from broker.protocol.topics import DEFAULT_ROOT
from broker.service.store import BrokerStore

RATE_PERCENT: Final = 60
"""Of the probe's rate: load, mosquitto and broker share two cores, and a broker that is always busy has a queue."""

_SENDING_SHARE: Final = 0.9
_TICK_SHARE: Final = 0.98
"""Ticks come between the last demand of an interval and the first of the next."""

_BEGIN_AFTER_S: Final = 0.5
_RESEND_S: Final = 10.0
_GRACE_S: Final = 30.0


def fleet(folder: Path, meters: int, seconds: float, rate: float | None = None) -> dict[str, Any]:
    """The `fleet` figures over at least `seconds`; at `rate` demands a second, or at what the probe says."""
    with Mosquitto(folder / "mosquitto") as server:
        broker = make_broker(folder / "east", server.mqtt_config(), 2 * meters * MAX_DEMAND_WH)
        add_consumers(broker, meters, range(meters))
        with (
            RunningBroker(broker, server.mqtt_config()) as running,
            Helper("bench.load", str(server.port), str(broker.key_file)) as load,
        ):
            running.tick(FIRST_INTERVAL_S)
            running.wait_idle(FIRST_INTERVAL_S)
            per_s = rate or _probe(running, load, meters)
            first_s = FIRST_INTERVAL_S + 2 * INTERVAL_S
            windows = max(1, math.ceil(seconds * per_s / meters))
            starts = [first_s + number * INTERVAL_S for number in range(windows)]
            sent, peak_mb = _run(running, load, meters, starts, meters / per_s)
    latencies_s = sorted(sent["latencies_s"])
    cuts = statistics.quantiles(latencies_s, n=100)
    return {
        "meters": meters,
        "sending": meters,
        # From the first send to the last answer, or as long as it was planned: less than the rate if it fell behind.
        "sustained_per_s": round(meters * windows / max(windows * meters / per_s, sent["seconds"])),
        "p50_s": round(cuts[49], 3),
        "p99_s": round(cuts[98], 3),
        "broker_rss_mb": round(peak_mb, 1),
        "unanswered": meters * windows - sent["answered"],
        "duplicated": sent["extra_receipts"] + _counted_twice(broker, starts),
    }


def _probe(running: RunningBroker, load: Helper, meters: int) -> float:
    """Two intervals as fast as they go, the first to fill the caches; the rate to run at."""
    for number in range(2):
        start_s = FIRST_INTERVAL_S + number * INTERVAL_S
        load.run({"do": "sign", "start_s": [start_s], "first": 0, "count": meters, "step": 1})
        sent = one_interval(running, load, start_s, meters)
    return meters / float(sent["seconds"]) * RATE_PERCENT / 100


def _run(
    running: RunningBroker, load: Helper, meters: int, starts: list[int], window_s: float
) -> tuple[dict[str, Any], float]:
    """Send all intervals' demands by the clock. Returns the load's tally and the broker's largest resident memory."""
    load.run({"do": "sign", "start_s": starts, "first": 0, "count": meters, "step": 1})
    running.tick(starts[0] + INTERVAL_S)
    running.wait_told(starts[0] + INTERVAL_S)
    begin_s = time.monotonic() + _BEGIN_AFTER_S
    rounds = [{"start_s": start_s, "at_s": begin_s + index * window_s} for index, start_s in enumerate(starts)]
    load.send(
        {
            "do": "send",
            "root": DEFAULT_ROOT,
            "rounds": rounds,
            "over_s": _SENDING_SHARE * window_s,
            "window": meters * len(starts),
            "deliveries": True,
            "resend_s": _RESEND_S,
            "limit_s": _GRACE_S,
        }
    )
    peak_mb = 0.0
    for index, start_s in enumerate(starts):
        if index:
            # A little before the first meter sends, so that nobody is told that the interval is still to come.
            running.tick(start_s + INTERVAL_S)
        running.generate(start_s, meters * MAX_DEMAND_WH)
        for _ in itertools.count():
            peak_mb = max(peak_mb, rss_mb(running.pid))
            left_s = begin_s + (index + _TICK_SHARE) * window_s - time.monotonic()
            if left_s <= 0:
                break
            running.listen(min(left_s, 0.5))
    sent = load.answer()
    running.tick(starts[-1] + 2 * INTERVAL_S)
    running.wait_idle(starts[-1] + 2 * INTERVAL_S)
    return sent, max(peak_mb, rss_mb(running.pid))


def _counted_twice(broker: BrokerFolder, starts: list[int]) -> int:
    """Demands that the broker's books give more, or less, than was demanded."""
    wanted = set(starts)
    store = BrokerStore(broker.store)
    try:
        delivered: Counter[tuple[str, int]] = Counter()
        for row in store.all_deliveries():
            delivered[row.meter, row.start_s] += row.to_wh - row.from_wh
        return sum(
            delivered[row.meter, row.start_s] != row.energy_wh
            for row in store.all_messages(MessageType.DEMAND)
            if row.start_s in wanted
        )
    finally:
        store.close()
