"""Holdings that a node is paging out: each party's pages are of one height, while the network goes on.

A view is a read transaction on the ledger's file (`holdings_view`). It is opened with a party's first page and closed
with its last one. A party that never comes back for the rest is displaced by others, or by age, because SQLite's log
grows behind the oldest view; whose view is gone gets a first page again, of another height, and sees it by that.
"""

from pathlib import Path
from typing import Final

from broker.ledger.engine import HoldingsPage
from broker.ledger.holdings_view import HoldingsView
from broker.ledger.limits import MAX_VIEW_AGE
from broker.protocol import cbor
from broker.protocol.codec import Bytes, Row, Unsigned

MAX_OPEN_VIEWS: Final = 8
"""Each with an open file and SQLite's two megabytes. A node serves its operator's brokers, which are few."""

_CURSOR: Final = Row((Unsigned(), Bytes(1, 200)))
"""The height of the view, and where its page ended."""


class HoldingsViews:
    """The views of the ledger in `file`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._open: dict[tuple[int, str], HoldingsView] = {}

    def page(self, party: str, cursor: bytes | None) -> HoldingsPage:
        """What `party` holds; go on with `next_cursor`. Raises MalformedMessage for a cursor that is none."""
        view, position = None, None
        if cursor is not None:
            height, position = _CURSOR.decode(cbor.decode(cursor, "cursor", 256), "cursor")
            view = self._open.pop((height, party), None)
        if view is None:
            view, position = HoldingsView(self._file), None
        try:
            page = view.page(party, position)
        except BaseException:
            view.close()
            raise
        if page.next_cursor is None:
            view.close()
            return page
        self._keep(party, view)
        return HoldingsPage(page.height, page.entries, cbor.encode([page.height, page.next_cursor]))

    def drop_old(self, height: int) -> None:
        """The ledger stands at `height` now: close views from too long ago."""
        for key in [key for key in self._open if height - key[0] > MAX_VIEW_AGE]:
            self._open.pop(key).close()

    def close(self) -> None:
        for view in self._open.values():
            view.close()
        self._open = {}

    def _keep(self, party: str, view: HoldingsView) -> None:
        """The one that was asked for longest ago goes first."""
        while len(self._open) >= MAX_OPEN_VIEWS:
            self._open.pop(next(iter(self._open))).close()
        displaced = self._open.pop((view.height, party), None)
        if displaced is not None:
            displaced.close()
        self._open[view.height, party] = view
