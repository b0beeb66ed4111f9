"""A node whose application is killed at one step of a commit. A program: HOME STEP HEIGHT.

STEP is `before` Commit does anything, `in` the transaction that it writes, `after` it has written but before CometBFT
hears of it, or `finalize`, when a block was carried out and not yet answered. The first such step at HEIGHT of the
network or above ends the process by SIGKILL, as a power cut would.
"""

import os
import signal
import sys
from typing import Any

from broker.cli import main
from broker.ledger.cometbft.application import NodeApplication


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(step: str, height: int) -> None:
    commit, finalize = NodeApplication._commit, NodeApplication._finalize_block

    def due(application: NodeApplication) -> bool:
        return application.network_height + 1 >= height

    def dying_commit(self: NodeApplication) -> Any:
        if not due(self):
            return commit(self)
        if step == "before":
            _die()
        if step == "in":
            # Called before each statement: everything is written and nothing of it is committed yet.
            self._store._db.set_trace_callback(lambda sql: _die() if sql.startswith("COMMIT") else None)
        answer = commit(self)
        if step == "after":
            _die()
        return answer

    def dying_finalize(self: NodeApplication, request: Any) -> Any:
        armed = due(self)
        answer = finalize(self, request)
        if armed and step == "finalize":
            _die()
        return answer

    NodeApplication._commit = dying_commit  # type: ignore[method-assign]
    NodeApplication._finalize_block = dying_finalize  # type: ignore[method-assign]


if __name__ == "__main__":
    home, step, height = sys.argv[1:]
    _arm(step, int(height))
    sys.exit(main(["ledger", "node", "run", "--home", home]))
