"""How fast a ledger network is: deliveries a second on four validators, and how long one takes to be final.

Everything runs on this machine: four nodes (an application and a CometBFT each) and, in this process, two brokers, who
have signed their batches beforehand and keep a few of them on their way. A delivery is final when its broker has taken
in, and checked, the block that it stands in. All nodes must then hold the same state, and the first one's ledger every
delivery.
"""

import time
from collections import deque
from pathlib import Path
from typing import Any, Final

from dengen_testing.cometbft import Network
from dengen_testing.waiting import wait_until
from support import ledger_world as world
from support.network_desk import Desk, TwoDesks, hash_free_number, heads_agree, make_network

from bench.processes import cpu_s
from broker.ledger.audit import audit_ledger

_FAR_S: Final = world.T0 + 10**9
_ISSUED_WH: Final = 2_000
"""Of a device of 4 kW in half an hour."""

DELIVERIES_OF_BATCH: Final = 500
ON_THEIR_WAY: Final = 3
"""Batches of each broker that it does not wait for."""

_LIMIT_S: Final = 300.0


def network(folder: Path, batches: int) -> dict[str, Any]:
    """The figures of a network, from so many batches of each broker. Raises ValueError if a delivery is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    make_network(folder)
    with Network(folder) as running:
        desks = TwoDesks(running)
        work = [_prepared(desk, batches) for desk in desks.desks]
        for number in range(0, len(work[0][0]), 4):  # A few at a time, or the brokers' queues would overflow.
            for desk, (issues, _) in zip(desks.desks, work, strict=True):
                for raw in issues[number : number + 4]:
                    desk.submit(raw)
            desks.settle()
        pids = [pid for node in running.nodes for pid in (node.process.pid, node.cometbft_pid) if pid is not None]
        used_s = -sum(cpu_s(pid) for pid in pids)
        began_s = time.monotonic()
        latencies_s = _submitted(desks, [deque(delivers) for _, delivers in work])
        seconds = time.monotonic() - began_s
        used_s += sum(cpu_s(pid) for pid in pids)
        desks.close()
        wait_until(lambda: heads_agree(running.nodes), "all nodes to agree", limit_s=60.0)
    deliveries = 2 * batches * DELIVERIES_OF_BATCH
    found = sum(line.delivered_wh for line in audit_ledger(running.nodes[0].ledger).sources)
    if found != deliveries:
        raise ValueError(f"the ledger holds {found} deliveries of {deliveries}")
    latencies_s.sort()
    return {
        "cometbft_deliveries_per_s": round(deliveries / seconds),
        "cometbft_p95_s": round(latencies_s[len(latencies_s) * 95 // 100], 2),
        "cometbft_cpu_us_per_delivery": round(used_s / deliveries * 1e6),
    }


def _prepared(desk: Desk, batches: int) -> tuple[list[bytes], list[bytes]]:
    """Sealed batches that issue and take over, and sealed batches that deliver, 1 Wh to each of as many consumers."""
    issues, delivers = [], []
    for number in range(batches):
        interval, part = divmod(number, _ISSUED_WH // DELIVERIES_OF_BATCH)
        start_s = world.T0 + interval * world.INTERVAL_S
        if part == 0:
            issue = world.issue(desk.device, _ISSUED_WH, start_s)
            taken = world.take(desk.device, 0, _ISSUED_WH, owner=desk.owner, broker=desk.name, start_s=start_s)
            issues.append(world.batch(issue, taken, by=desk.name, not_after_s=_FAR_S))
        first = part * DELIVERIES_OF_BATCH
        operations = [
            world.deliver(hash_free_number(desk.name, at, 0), 1, (desk.device, at, at + 1), start_s=start_s)
            for at in range(first, first + DELIVERIES_OF_BATCH)
        ]
        delivers.append(world.batch(*operations, by=desk.name, not_after_s=_FAR_S))
    return issues, delivers


def _submitted(desks: TwoDesks, waiting: list[deque[bytes]]) -> list[float]:
    """Submit everything, with a bounded number on its way, and wait for the last; how long each batch took."""
    for desk in desks.desks:
        desk.latencies_s.clear()

    def done() -> bool:
        for desk, left in zip(desks.desks, waiting, strict=True):
            while left and desk.open < ON_THEIR_WAY:
                desk.submit(left.popleft())
        desks.pump()
        return not any(waiting) and not any(desk.open for desk in desks.desks)

    wait_until(done, "all deliveries to be final", limit_s=_LIMIT_S)
    if any(desk.refused for desk in desks.desks):
        raise ValueError(f"a batch was refused: {[desk.refused[:1] for desk in desks.desks]}")
    return [latency_s for desk in desks.desks for latency_s in desk.latencies_s]
