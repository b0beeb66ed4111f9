"""How fast the embedded ledger is: transfers a second, and operations a second when a whole ledger is verified.

Transfers go in batches of a thousand through the engine as a broker's do: opened, applied, sealed into a block and
committed durably. The ledger that is verified has one issue for three transfers and three deliveries; every signature
in it is checked, every rule applied, every stored row compared; once by one process alone, once with helpers for
signatures on the other cores, so that the ratio of the two holds on a noisy machine.
"""

import statistics
import time
from pathlib import Path
from typing import Any, Final

from support import ledger_world as world

from broker.ledger.embedded import EmbeddedLedger
from broker.ledger.operations import Operation, Transfer
from broker.ledger.verify import verify_ledger

_BATCH: Final = 1_000
_SLICE_WH: Final = 300
_FAR_S: Final = world.T0 + 10**9
_DEVICES: Final = ("solar-1", "wind-1")


def ledger(folder: Path, batches: int, issues: int) -> dict[str, Any]:
    """The `ledger` figures: from so many batches of transfers, and a ledger of so many issues. Raises ValueError if a
    batch is refused or the ledger does not verify.
    """
    transfers_per_s = _transfers_per_s(folder / "transfers", batches)
    verified = folder / "verify"
    _fill(verified, issues)
    return {
        "embedded_transfers_per_s": round(transfers_per_s),
        "verify_per_s": round(_verify_per_s(verified, None)),
        "verify_alone_per_s": round(_verify_per_s(verified, 0)),
    }


def _transfers_per_s(folder: Path, batches: int) -> float:
    engine = world.found(folder)
    rates = []
    for number in range(batches):
        start_s = world.T0 + number * world.INTERVAL_S
        _commit(engine, world.batch(world.issue("solar-1", _BATCH, start_s), not_after_s=_FAR_S))
        asset = world.asset("solar-1", start_s)
        moves = [Transfer(asset, at, at + 1, "alice", "b1", 100, None) for at in range(_BATCH)]
        raw = world.batch(*moves, not_after_s=_FAR_S)
        began_s = time.perf_counter()
        _commit(engine, raw)
        rates.append(_BATCH / (time.perf_counter() - began_s))
    engine.close()
    return statistics.median(rates)


def _fill(folder: Path, issues: int) -> None:
    engine = world.found(folder)
    operations: list[Operation] = []
    for number in range(issues):
        device = _DEVICES[number % len(_DEVICES)]
        start_s = world.T0 + number // len(_DEVICES) * world.INTERVAL_S
        cuts = [(part * _SLICE_WH, (part + 1) * _SLICE_WH) for part in range(3)]
        operations.append(world.issue(device, 3 * _SLICE_WH, start_s))
        operations += [world.take(device, low, high, start_s=start_s) for low, high in cuts]
        operations += [
            world.deliver(3 * number + part, _SLICE_WH, (device, *cut), start_s=start_s)
            for part, cut in enumerate(cuts)
        ]
    for first in range(0, len(operations), _BATCH):
        _commit(engine, world.batch(*operations[first : first + _BATCH], not_after_s=_FAR_S))
    engine.close()


def _verify_per_s(folder: Path, helpers: int | None) -> float:
    began_s = time.perf_counter()
    report = verify_ledger(folder, helpers=helpers)
    seconds = time.perf_counter() - began_s
    if not report.ok:
        raise ValueError(f"the ledger does not verify: {report.errors[0]}")
    return report.operations / seconds


def _commit(engine: EmbeddedLedger, raw: bytes) -> None:
    answer = engine.submit(raw)
    committed = engine.commit()
    if answer is not None or committed.results[0].result.height is None:
        raise ValueError(f"the ledger refused a batch: {answer or committed.results[0]}")
