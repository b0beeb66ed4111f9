"""A party's holdings page by page, all of one height, while the ledger goes on.

A view is a read transaction on the ledger's file: SQLite keeps showing it the state of the moment at which it was
opened. So a party with ten million holdings costs one page of memory, and the pages still fit together. What it does
cost is the write-ahead log, which cannot be recycled behind the oldest view; `gateway` bounds how long one may stay.
"""

import sqlite3
from pathlib import Path
from typing import Any, Final

from broker.ledger.chain import Head
from broker.ledger.engine import HoldingsPage
from broker.ledger.holding import Holding, encode_holding
from broker.ledger.limits import MAX_HOLDINGS_ON_PAGE
from broker.ledger.operations import AssetId
from broker.ledger.state import OWNED, Key, asset_key, encode_key, scan_bounds
from broker.ledger.store import LedgerError, Store
from broker.protocol import cbor
from broker.protocol.codec import Name, Row, Unsigned
from broker.protocol.limits import MAX_INTEGER
from broker.protocol.messages import Carrier
from broker.protocol.sources import Source

_POSITION: Final = Row((Unsigned(), Name(), Unsigned(), Unsigned()))
"""The asset that a page ended with: start_s, device, carrier, revision."""


class HoldingsView:
    """The holdings of all parties in a ledger file, as of one height. Raises LedgerError if it is no ledger."""

    def __init__(self, file: Path) -> None:
        try:
            self._store = Store.open_read_only(file)
            self._store.begin_reading()
            # The first read takes the snapshot; everything from here on is of that moment.
            self._height = Head.from_bytes(self._store.meta("head") or b"").height
        except (sqlite3.Error, ValueError) as error:
            raise LedgerError(file.parent, f"cannot be read: {error}; run `energy-broker ledger verify`") from error

    @property
    def party(self) -> None:
        """It shows all parties."""

    @property
    def height(self) -> int:
        """The height that every page is true at."""
        return self._height

    def close(self) -> None:
        self._store.close()

    def page(self, party: str, cursor: bytes | None = None) -> HoldingsPage:
        """What `party` holds, in the order of intervals; go on with `next_cursor`. An asset's slices stay together.

        Raises MalformedMessage for a cursor that is none.
        """
        first, end = scan_bounds((OWNED, party), 0, MAX_INTEGER)
        if cursor is not None:
            # A zero byte more than the last asset's key: the smallest key after it.
            first = encode_key((OWNED, party, *_POSITION.decode(cbor.decode(cursor, "cursor", 256), "cursor"))) + b"\0"
        # One asset more than fits, which tells whether there is another page.
        keys = self._store.keys_between(first, end, MAX_HOLDINGS_ON_PAGE + 1)
        assets = [AssetId(device, Carrier(carrier), start_s, rev) for _, _, start_s, device, carrier, rev in keys]
        rows = self._store.read([asset_key(asset) for asset in assets])
        entries: list[bytes] = []
        after: Key = ()
        for asset in assets:
            slices = _slices(asset, rows[asset_key(asset)], party)
            if entries and len(entries) + len(slices) > MAX_HOLDINGS_ON_PAGE:
                return HoldingsPage(self._height, tuple(entries), cbor.encode(after))
            entries += slices
            after = (asset.start_s, asset.device, int(asset.carrier), asset.revision)
        return HoldingsPage(self._height, tuple(entries), None)


def _slices(asset: AssetId, row: Any, party: str) -> list[bytes]:
    source = Source(row.source)
    return [
        encode_holding(Holding(asset, source, row.area, held.from_wh, held.to_wh))
        for held in row.held
        if held.owner == party
    ]
