"""How fast the embedded ledger is: run it by hand, it prints a table of CPU time per operation.

    python tests/bench/ledger_speed.py [--profile]

`deliver` is the broker's hot path: from the sealed batch to the durable commit (decoding, rules, state rows, state
hash, Merkle leaf, SQLite, block signature). `rules` leaves decoding and SQLite out. Signatures of batches and blocks
are included, those of statements inside operations are not, because a delivery has none.
"""

import cProfile
import pstats
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support import ledger_world as world

from broker.ledger.chain import Step, first_head
from broker.ledger.opening import open_batch
from broker.ledger.operations import Transfer
from broker.ledger.state import Overlay

BATCHES = 20
OPERATIONS = 1_000


def deliveries() -> list[bytes]:
    """Batches of one-slice deliveries from one asset per batch, sorted by pseudonym as brokers do."""
    made = []
    for number in range(BATCHES):
        start_s = world.T0 + number * world.INTERVAL_S
        made.append(
            world.batch(
                *(
                    world.deliver(number * OPERATIONS + i, 1, ("solar-1", i, i + 1), start_s=start_s)
                    for i in range(OPERATIONS)
                ),
                not_after_s=world.T0 + 10**9,
            )
        )
    return made


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        ledger = world.found(Path(directory))
        for number in range(BATCHES):
            start_s = world.T0 + number * world.INTERVAL_S
            raw = world.batch(
                world.issue("solar-1", OPERATIONS, start_s), world.take("solar-1", 0, OPERATIONS, start_s=start_s)
            )
            assert ledger.submit(raw) is None
        ledger.commit()

        # The rules alone, on an overlay that is dropped: one provider-owned Wh after the other changes hands.
        moves = world.World.set_up()
        moves.apply(world.issue("solar-1", 2_000))
        opened = open_batch(
            world.batch(
                *(Transfer(world.asset("solar-1"), i, i + 1, "alice", "b1", 1, None) for i in range(OPERATIONS))
            ),
            moves.state,
            world.CHARTER,
        )
        best = min(
            _cpu(lambda: Step(Overlay(moves.state), world.CHARTER, first_head(world.GENESIS)).apply(opened))
            for _ in range(5)
        )
        print(f"rules and state, transfer   {best / OPERATIONS * 1e6:6.1f} us   {OPERATIONS / best:10.0f} /s")

        raws = deliveries()
        profile = cProfile.Profile()
        timings = []
        for raw in raws:
            if "--profile" in sys.argv:
                profile.enable()
            before = time.process_time()
            ledger.submit(raw)
            committed = ledger.commit()
            timings.append(time.process_time() - before)
            profile.disable()
            assert committed.results[0].result.height, committed.results
        timings.sort()
        for name, value in (("best", timings[0]), ("median", timings[len(timings) // 2])):
            print(f"deliver and commit, {name:6}  {value / OPERATIONS * 1e6:6.1f} us   {OPERATIONS / value:10.0f} /s")
        if "--profile" in sys.argv:
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        ledger.close()


def _cpu(work: Callable[[], None]) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before


if __name__ == "__main__":
    main()
