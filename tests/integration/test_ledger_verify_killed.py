"""`energy-broker ledger verify --resume` is killed on its way, again and again, and comes to its end all the same."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.ledger_world import INTERVAL_S, T0, batch, deliver, found, issue, take

from broker.ledger.verify import VerifyReport, verify_ledger

pytestmark = pytest.mark.integration

INTERVALS = 60

# Reports each block on standard output; small writes, so that there is much to go on from.
VERIFIER = """
import sys
from pathlib import Path
from broker.ledger import replay
from broker.ledger.verify import verify_ledger

replay._ROWS_PER_WRITE = 40
report = verify_ledger(
    Path(sys.argv[1]), resume=Path(sys.argv[2]), helpers=1, progress=lambda now: print(now.height, flush=True)
)
print("ends", report.resumed_height, report.started_over, *report.errors, flush=True)
"""


def ledger(path: Path) -> VerifyReport:
    engine = found(path)
    for number in range(INTERVALS):
        start_s = T0 + number * INTERVAL_S
        engine.submit(
            batch(issue("solar-1", 900, start_s), take("solar-1", 0, 900, start_s=start_s), not_after_s=2**40)
        )
        engine.commit()
        gifts = (deliver(number * 20 + i, 9, ("solar-1", i * 9, i * 9 + 9), start_s=start_s) for i in range(20))
        engine.submit(batch(*gifts, not_after_s=2**40))
        assert engine.commit().results[0].result.height
    engine.close()
    return verify_ledger(path)


@pytest.mark.parametrize("kills", [5, pytest.param(40, marks=pytest.mark.long)])
def test_kill_9_costs_what_was_not_written_yet_and_nothing_else(tmp_path: Path, kills: int) -> None:
    whole = ledger(tmp_path / "ledger")
    assert whole.errors == ()
    choose = random.Random(kills)
    killed = 0
    begun_at = []
    while True:
        process = subprocess.Popen(
            [sys.executable, "-c", VERIFIER, str(tmp_path / "ledger"), str(tmp_path / "work")],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert process.stdout is not None
        lines = []
        blocks = choose.randrange(1, 40)
        for line in process.stdout:
            lines.append(line.split())
            if killed < kills and len(lines) == blocks:
                process.send_signal(signal.SIGKILL)
                killed += 1
        process.wait(timeout=30)
        process.stdout.close()
        begun_at.append(int(lines[0][0]) if lines[0][0] != "ends" else whole.height)
        if lines[-1][0] == "ends":
            break
    assert lines[-1][2:] == ["None"], "no run found its work damaged, and the last one no fault"
    assert int(lines[-1][1]) > 0
    assert begun_at == sorted(begun_at), "what was written stays written"
    assert verify_ledger(tmp_path / "ledger", resume=tmp_path / "work").resumed_height == whole.height
