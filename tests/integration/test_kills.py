"""Twenty SIGKILLs over agents, brokers, the neighbour, the ledger's host and mosquitto leave the books as without.

Each kill comes while a message that concerns the victim is unanswered. To be sure of that, whoever would answer is
stopped (SIGSTOP) before the interval's work begins; the kill comes when the message has been seen on MQTT, and then
the stopped one goes on and the victim is started again. Which victim, in which interval and at which message, is drawn
from a seed. A broker of its own hosts the ledger, so that it can be killed apart from the other two.
"""

import os
import random
import runpy
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from dengen_testing.books import summarize
from dengen_testing.listener import Listener
from dengen_testing.market import Market, MarketPlan, Workspace, build_market, energy_broker
from dengen_testing.mosquitto import Mosquitto

from broker.protocol.messages import Stage, Tick
from broker.protocol.mqtt_link import MqttConfig
from broker.protocol.topics import Topics

pytestmark = pytest.mark.integration

KILLS = 20
SEED = 2011
MOSQUITTO = "mosquitto"
ROOT = Path(__file__).parents[2]
TOPICS = Topics()


@dataclass(frozen=True)
class Kill:
    """Kill `victim` at the `nth` message on a topic that ends in `leaf`, while `stopped` cannot answer.

    With `once_cleared`, what is seen first is that the victim has cleared: then it is stopped, and the others go on.
    """

    victim: str
    stopped: tuple[str, ...]
    topic_part: str
    leaf: str
    nth: int
    once_cleared: bool = False


def planned(plan: MarketPlan, seed: int) -> dict[int, Kill]:
    """The kills by the time of the tick at which they happen."""
    chance = random.Random(seed)
    homes = {member.meter.name: member.broker for member in plan.members}
    kills = []
    for number in range(KILLS):
        kind = ("agent", "east", "west", "ledger", MOSQUITTO)[number % 5]
        if kind == "agent":
            # The agent's message is out and its broker has not answered.
            name, broker = chance.choice(sorted(homes.items()))
            leaf = "demand" if name.startswith("home-") else "reading"
            kills.append(Kill(name, (broker,), f"/{broker}/meters/{name}/", leaf, 1))
        elif kind == "east":
            # Meters wait for their receipts.
            kills.append(Kill("east", ("east",), "/east/meters/", "reading", chance.randint(1, 3)))
        elif kind == "west":
            # The neighbour has been asked for wind and has not answered. It is asked only once it has cleared.
            kills.append(Kill("west", ("east",), "/west/", "request", 1, once_cleared=True))
        elif kind == "ledger":
            kills.append(Kill("vault", ("vault",), "/ledger/", "submit", chance.randint(1, 2)))
        else:
            kills.append(Kill(MOSQUITTO, ("east", "west"), "/meters/", "reading", chance.randint(1, 3)))
    chance.shuffle(kills)
    # The first interval's ends at origin + interval_s: before that there is nothing to say.
    ends = [plan.origin_s + (index + 1) * plan.interval_s for index in range(plan.intervals)]
    return dict(zip(sorted(chance.sample(ends, KILLS)), kills, strict=True))


class Killer:
    """Carries out the kills while the conductor runs."""

    def __init__(self, kills: dict[int, Kill], market: Market, mosquitto: Mosquitto, mqtt: MqttConfig) -> None:
        self._kills = dict(kills)
        self._market = market
        self._mosquitto = mosquitto
        self._mqtt = mqtt
        self._listener = self._listen()
        self.done: list[Kill] = []

    def _listen(self) -> Listener:
        return Listener(self._mqtt, [f"{TOPICS.root}/#"], client_id="killer").connect()

    def close(self) -> None:
        self._listener.close()

    def on_tick(self, tick: Tick) -> None:
        """All are idle at the world's tick: stop whoever must not answer. At the market's, the kill."""
        kill = self._kills.get(tick.time_s)
        if kill is None:
            return
        if tick.stage is Stage.WORLD:
            for name in kill.stopped:
                self._signal(name, signal.SIGSTOP)
            return
        del self._kills[tick.time_s]
        self._listener.messages.clear()
        if kill.once_cleared:
            self._await_message(f"/{kill.victim}/", "cleared", 1)
            self._signal(kill.victim, signal.SIGSTOP)
            for name in kill.stopped:
                self._signal(name, signal.SIGCONT)
        self._await_message(kill.topic_part, kill.leaf, kill.nth)
        if kill.victim == MOSQUITTO:
            self._mosquitto.kill()
            self._mosquitto.restart()
            self._listener.close()
            self._listener = self._listen()
        else:
            self._market.processes[kill.victim].kill()
        for name in kill.stopped:
            if name != kill.victim:
                self._signal(name, signal.SIGCONT)  # Without effect on one that goes on already.
        if kill.victim != MOSQUITTO:
            self._market.processes[kill.victim].start()
        self.done.append(kill)

    def _await_message(self, topic_part: str, leaf: str, nth: int) -> None:
        seen = 0

        def wanted(message: Any) -> bool:
            nonlocal seen
            if topic_part in message.topic and message.topic.endswith("/" + leaf) and not message.retained:
                seen += 1
            return seen == nth

        self._listener.wait_for(wanted, f"{leaf} number {nth} on …{topic_part}", limit_s=30)

    def _signal(self, name: str, number: signal.Signals) -> None:
        pid = self._market.processes[name].pid
        assert pid is not None, f"{name} does not run"
        os.kill(pid, number)


def books(workspace: Workspace) -> tuple[dict[str, Any], str]:
    """Summary and audit of a stopped market, without what two runs may differ in."""
    summary = summarize(workspace, "embedded", 0)
    assert summary["ledger"]["verified"]
    del summary["ledger"]["height"]
    return summary, energy_broker("ledger", "audit", workspace.ledger)


def run(plan: MarketPlan, folder: Path, kills: dict[int, Kill]) -> tuple[tuple[dict[str, Any], str], list[Kill]]:
    with Mosquitto(folder / "mosquitto") as mosquitto:
        mqtt = mosquitto.mqtt_config()
        workspace = build_market(plan, folder / "work", folder / "ledger", mqtt)
        with Market(workspace, mqtt, stall_limit_s=60) as market:
            killer = Killer(kills, market, mosquitto, mqtt)
            try:
                market.run(on_progress=killer.on_tick, while_waiting=lambda: None)
            finally:
                killer.close()
    return books(workspace), killer.done


def test_twenty_kills_leave_the_books_as_without_them(tmp_path: Path) -> None:
    plan: MarketPlan = runpy.run_path(str(ROOT / "deploy" / "demo" / "scenario.py"))["demo_plan"](24)
    plan = replace(plan, brokers=("east", "west", "vault"), host="vault")
    undisturbed, _ = run(plan, tmp_path / "undisturbed", {})
    disturbed, done = run(plan, tmp_path / "disturbed", planned(plan, SEED))
    assert len(done) == KILLS
    assert {kill.victim for kill in done} >= {"east", "west", "vault", MOSQUITTO}
    assert disturbed == undisturbed
