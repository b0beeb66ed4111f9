"""Four validators and everything that happens to machines: nothing is lost, nothing is doubled, all agree.

Two brokers work all the while. After each fault the hurt node has to stand where the others stand, with the same state
hash; at the end a node's ledger is verified from its first block. DENGEN_FULL=1 does more of everything.
"""

import os
import random
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dengen_testing.cometbft import CutOff, Network, Node
from dengen_testing.waiting import wait_until
from support import dying_node, ledger_world
from support.network_desk import TwoDesks, heads_agree, make_network

from broker.ledger.audit import audit_ledger
from broker.ledger.cometbft.rpc import HttpNode
from broker.ledger.state import DEVICE, encode_key
from broker.ledger.store import FILE_NAME
from broker.ledger.verify import verify_ledger
from broker.protocol import cbor

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("cometbft")]

FULL = bool(os.environ.get("DENGEN_FULL"))
SEED = 20_261
PAUSE_S = 10.0 if FULL else 3.0
CATCH_UP_LIMIT_S = 60.0
STEPS = ("before", "in", "after", "finalize")


class Bench:
    """A running network with two brokers at work; v4's links to the others can be cut."""

    def __init__(self, folder: Path, commands: dict[str, list[str]] | None = None) -> None:
        make_network(folder)
        self.links = CutOff(folder, "v4")
        self.network = Network(folder, commands or {}).start()
        self.desks = TwoDesks(self.network)

    @property
    def nodes(self) -> tuple[Node, ...]:
        return self.network.nodes

    def work_until(self, condition: Callable[[], bool], what: str, limit_s: float = CATCH_UP_LIMIT_S) -> None:
        """Keep the brokers at work until `condition` holds."""

        def worked() -> bool:
            if sum(desk.open for desk in self.desks.desks) < 8:
                self.desks.work()
            self.desks.pump()
            return condition()

        wait_until(worked, what, limit_s=limit_s)

    def work_for(self, rounds: int) -> None:
        """`rounds` pieces of work of each broker, seen in blocks."""
        for _ in range(rounds):
            self.desks.work()
            self.desks.pump()
        self.desks.settle()

    def agree(self, nodes: tuple[Node, ...] | None = None) -> None:
        """Wait until these nodes stand at one height, and see that they hold one state."""
        chosen = nodes or self.nodes
        self.desks.settle()
        wait_until(
            lambda: all(node.answers() for node in chosen) and heads_agree(chosen),
            "all nodes to agree",
            limit_s=CATCH_UP_LIMIT_S,
            detail=lambda: "\n".join(f"{node.name}: {node.process.log_tail()[-800:]}" for node in chosen),
        )

    def close(self) -> None:
        self.desks.close()
        self.network.stop()
        self.links.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def assert_nothing_lost_or_doubled(bench: Bench) -> None:
    """The stopped nodes' ledgers hold each piece of work exactly once, down to the Wh."""
    reports = [verify_ledger(node.ledger) for node in bench.nodes[: 4 if FULL else 1]]
    assert [report.errors for report in reports] == [()] * len(reports)
    assert {report.operations for report in reports} == {bench.desks.operations}
    books = audit_ledger(bench.nodes[-1].ledger)
    assert books.faults == ()
    assert sum(line.issued_wh for line in books.sources) == bench.desks.delivered_wh
    assert sum(line.delivered_wh for line in books.sources) == bench.desks.delivered_wh


def test_nodes_that_are_killed_paused_restarted_cut_off_and_halved_come_back_to_the_same_state(bench: Bench) -> None:
    chance = random.Random(SEED)

    def restart(node: Node) -> None:
        node.stop()
        node.start()

    def killed(node: Node) -> None:
        node.kill()
        bench.work_for(2)
        node.start()

    def paused(node: Node) -> None:
        node.pause()
        ended_s = _after(PAUSE_S)
        bench.work_until(ended_s, f"{PAUSE_S} s")
        node.resume()

    def halved(node: Node) -> None:
        node.kill_application()
        bench.work_for(1)
        node.start()

    def headless(node: Node) -> None:
        before = node.cometbft_pid
        node.kill_cometbft()
        bench.work_until(lambda: node.cometbft_pid not in (None, before), "CometBFT to be started again")

    def cut_off(_: Node) -> None:
        bench.links.cut()
        ended_s = _after(PAUSE_S)
        bench.work_until(ended_s, f"{PAUSE_S} s")
        bench.links.mend()

    faults = [killed, paused, restart, halved, headless, cut_off]
    for _ in range(5 if FULL else 1):
        chance.shuffle(faults)
        for fault in faults:
            bench.work_for(1)
            fault(bench.nodes[3] if fault is cut_off else chance.choice(bench.nodes))
            bench.agree()
    bench.network.stop()
    assert_nothing_lost_or_doubled(bench)


@pytest.mark.parametrize("step", STEPS)
def test_an_application_that_dies_at_any_step_of_a_commit_goes_on_where_the_others_are(
    tmp_path: Path, step: str
) -> None:
    home = tmp_path / "v4"
    dying = [sys.executable, str(Path(dying_node.__file__)), str(home), step]
    bench = Bench(tmp_path, {"v4": [*dying, "12"]})
    try:
        victim = bench.nodes[3]
        for count in range(4 if FULL else 1):
            bench.work_until(lambda: not victim.process.running, f"v4 to die {step} a commit")
            assert victim.process.exit_code == -9
            bench.work_for(1)
            at = bench.nodes[0].head().network_height + 6 if count < 3 and FULL else 10**9
            victim.process.command = (*dying, str(at))
            victim.start()
            if at == 10**9:
                bench.agree()
        bench.network.stop()
        assert_nothing_lost_or_doubled(bench)
    finally:
        bench.close()


def test_two_of_four_down_halt_the_ledger_and_nothing_is_lost_when_they_are_back(bench: Bench) -> None:
    first, second = bench.nodes[2:]
    first.kill()
    second.kill()
    height = bench.nodes[0].head().head.height
    bench.desks.work(3)
    ended_s = _after(3.0)
    wait_until(lambda: bench.desks.pump() or ended_s(), "3 s without a block")
    assert all(node.head().head.height <= height + 1 for node in bench.nodes[:2])
    assert sum(desk.open for desk in bench.desks.desks) == 6
    first.start()
    bench.desks.settle()
    second.start()
    bench.agree()
    bench.network.stop()
    assert_nothing_lost_or_doubled(bench)


def test_one_altered_row_stops_its_node_and_no_other_and_the_node_comes_back_from_nothing(bench: Bench) -> None:
    bench.work_for(1)
    bench.agree()
    victim, others = bench.nodes[3], bench.nodes[:3]
    victim.stop()
    _alter_capacity(victim.ledger / FILE_NAME)
    victim.start()
    bench.work_until(lambda: not victim.process.running, "the altered node to stop")
    assert victim.process.exit_code == 1
    assert "another state than two thirds" in victim.process.log_tail()
    bench.work_for(2)
    bench.agree(others)
    # What the message says: everything but what this validator has signed goes, and the others have all of it.
    shutil.rmtree(victim.ledger)
    for part in (victim.home / "data").iterdir():
        if part.name != "priv_validator_state.json":
            shutil.rmtree(part) if part.is_dir() else part.unlink()
    victim.start()
    bench.agree()
    bench.network.stop()
    assert_nothing_lost_or_doubled(bench)


def test_the_same_batch_at_every_node_at_once_and_again_later_counts_once(bench: Bench) -> None:
    raw = ledger_world.batch(
        ledger_world.issue("solar-1", 50, ledger_world.T0 - ledger_world.INTERVAL_S),
        not_after_s=ledger_world.T0 + 10**9,
    )
    clients = [HttpNode(node.rpc, 5.0) for node in bench.nodes]
    for client in clients:
        client.submit(raw)
    bench.work_for(1)
    codes = {(checked.code, checked.known) for checked in (client.submit(raw) for client in clients)}
    assert codes <= {(0, True), (4, False)}
    bench.work_for(1)
    bench.agree()
    for client in clients:
        client.close()
    bench.network.stop()
    report = verify_ledger(bench.nodes[0].ledger)
    assert (report.errors, report.operations) == ((), bench.desks.operations + 1)


def _after(seconds: float) -> Callable[[], bool]:
    """True from so long after now on."""
    end_s = time.monotonic() + seconds
    return lambda: time.monotonic() >= end_s


def _alter_capacity(file: Path) -> None:
    """One row of the node's database says now that the device can make 1 W: its next reading will not fit."""
    key = encode_key((DEVICE, "solar-1"))
    database = sqlite3.connect(file)
    with database:
        ((value,),) = database.execute("SELECT value FROM state WHERE key = ?", (key,)).fetchall()
        row = cbor.decode(value, "row", 4_096)
        row[row.index(ledger_world.CAPACITY_W)] = 1
        database.execute("UPDATE state SET value = ? WHERE key = ?", (cbor.encode(row), key))
    database.close()
