"""Whether a demand costs more where more consumers are registered: CPU per demand with few and with many in the store.

Two brokers on the same core, each with a mosquitto of its own, get the same number of demands in turn. With many
consumers the senders are spread evenly over all of them. Some consumers are silent in either case, so both brokers wait
for gate 1. The first round fills the caches and is not counted.
"""

import contextlib
import statistics
from pathlib import Path
from typing import Any, Final

from dengen_testing.mosquitto import Mosquitto

from bench.hot_path import check, send_job
from bench.processes import Helper, cpu_s, share_a_core
from bench.world import (
    FIRST_INTERVAL_S,
    GATE_1_S,
    GATE_2_S,
    INTERVAL_S,
    MAX_DEMAND_WH,
    RunningBroker,
    add_consumers,
    make_broker,
)
from broker.protocol.topics import DEFAULT_ROOT

LIMIT_S: Final = 60.0


class _Market:
    """One broker with its own server and load."""

    def __init__(self, folder: Path, consumers: int, demands: int, stack: contextlib.ExitStack) -> None:
        self.demands = demands
        self._step = consumers // demands
        server = stack.enter_context(Mosquitto(folder / "mosquitto"))
        broker = make_broker(folder / "east", server.mqtt_config(), 2 * demands * MAX_DEMAND_WH)
        add_consumers(broker, consumers, range(0, demands * self._step, self._step))
        self._running = stack.enter_context(RunningBroker(broker, server.mqtt_config()))
        self._load = stack.enter_context(Helper("bench.load", str(server.port), str(broker.key_file)))
        assert server.pid is not None
        share_a_core([self._running.pid], [self._load.pid, server.pid])
        self._running.tick(FIRST_INTERVAL_S)
        self._running.wait_idle(FIRST_INTERVAL_S)

    def cpu_of_interval_s(self, start_s: int) -> float:
        """Let one interval pass; the broker's CPU seconds."""
        running, load, end_s = self._running, self._load, start_s + INTERVAL_S
        load.run({"do": "sign", "start_s": [start_s], "first": 0, "count": self.demands, "step": self._step})
        before_s = cpu_s(running.pid)
        running.tick(end_s)
        running.wait_told(end_s)
        running.generate(start_s, self.demands * MAX_DEMAND_WH)
        load.run(send_job(DEFAULT_ROOT, start_s, deliveries=False))
        running.tick(end_s + GATE_1_S)
        check(load.run({"do": "collect", "limit_s": LIMIT_S}), self.demands, deliveries=True)
        running.tick(end_s + GATE_2_S)
        running.wait_idle(end_s + GATE_2_S)
        return cpu_s(running.pid) - before_s


def growth(folder: Path, low: int, high: int, demands: int, rounds: int) -> dict[str, Any]:
    """The `growth` figures. `demands` must be less than `low`. Raises HelperFailed if a demand was not delivered."""
    if not demands < low <= high:
        raise ValueError("someone must stay silent: fewer demands than consumers")
    with contextlib.ExitStack() as stack:
        markets = {count: _Market(folder / str(count), count, demands, stack) for count in (low, high)}
        used: dict[int, list[float]] = {low: [], high: []}
        for number in range(rounds + 1):
            for count, market in markets.items():
                used[count].append(market.cpu_of_interval_s(FIRST_INTERVAL_S + number * INTERVAL_S))
    cpu_us = {count: statistics.median(seconds[1:]) / demands * 1e6 for count, seconds in used.items()}
    return {
        "consumers_low": low,
        "consumers_high": high,
        "cpu_us_low": round(cpu_us[low], 1),
        "cpu_us_high": round(cpu_us[high], 1),
        "ratio": round(cpu_us[high] / cpu_us[low], 3),
    }
