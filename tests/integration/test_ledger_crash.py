"""A process that commits to a ledger in a loop is killed at random moments, again and again."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.ledger_world import found

from broker.ledger.verify import verify_ledger

pytestmark = pytest.mark.integration

# Commits batch after batch and says so only when the commit has returned.
COMMITTER = """
import sys
from pathlib import Path
from support.ledger_world import batch, found
from broker.ledger.operations import Void

ledger = found(Path(sys.argv[1]))
number = ledger.height
while True:
    number += 1
    assert ledger.submit(batch(*(Void(number.to_bytes(14, "big") + bytes((0, i))) for i in range(20)))) is None
    (answer,) = ledger.commit().results
    print(answer.result.height, flush=True)
"""


@pytest.mark.parametrize("kills", [6, pytest.param(60, marks=pytest.mark.long)])
def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path, kills: int) -> None:
    choose = random.Random(kills)
    acknowledged = 0
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", COMMITTER, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert process.stdout is not None
        # The moment is chosen in commits and, within one, by how far the next has come when the signal arrives.
        for _ in range(choose.randrange(1, 25)):
            line = process.stdout.readline()
            assert line, "the committer ended by itself"
            acknowledged = int(line)
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
        process.wait(timeout=10)
        process.stdout.close()
        if rest:
            acknowledged = int(rest[-1])
        engine = found(tmp_path)
        assert engine.height in (acknowledged, acknowledged + 1), "at most one commit was under way"
        acknowledged = engine.height
        engine.close()
        report = verify_ledger(tmp_path)
        assert report.errors == ()
        assert report.height == acknowledged
