"""Which buckets of the rows digest have changed since they were hashed, and the digest at a snapshot height.

The digests stand in the ledger file beside the rows and are written in the same transaction. They are a memory of work
done, nothing more: where there are none yet, after a restore, all rows are hashed once.
"""

import itertools
from collections.abc import Iterable, Mapping

from broker.ledger.rows_digest import bounds_of, bucket_digest, bucket_digests, bucket_of, merged, rows_digest
from broker.ledger.state import Key, decode_key
from broker.ledger.store import STALE, Store


class Buckets:
    """The buckets of the committed state in `store`. Raises sqlite3.Error."""

    def __init__(self, store: Store) -> None:
        self._store = store
        known = dict(store.bucket_rows())
        if not known:
            known = bucket_digests(store.state_rows())
            store.put_buckets(known)
        self._stale = {bucket for bucket, digest in known.items() if digest == STALE}

    def touched(self, keys: Iterable[Key]) -> dict[bytes, bytes | None]:
        """What to write for a block that changed the rows under `keys`."""
        return dict.fromkeys({bucket_of(key) for key in keys} - self._stale, STALE)

    def digested(
        self, rows: Mapping[bytes, bytes | None], touched: Mapping[bytes, bytes | None]
    ) -> tuple[bytes, dict[bytes, bytes | None]]:
        """The digest over all rows, with the changed `rows` of a block on top, and what to write for it."""
        changes: dict[bytes, list[tuple[bytes, bytes | None]]] = {}
        by_key = sorted(rows.items())
        for bucket, group in itertools.groupby(by_key, lambda item: bucket_of(decode_key(item[0]))):
            changes[bucket] = list(group)
        written: dict[bytes, bytes | None] = {}
        for bucket in sorted(self._stale | touched.keys()):
            written[bucket] = bucket_digest(merged(self._store.state_rows(*bounds_of(bucket)), changes.get(bucket, ())))
        every = dict(self._store.bucket_rows()) | written
        return rows_digest({bucket: digest for bucket, digest in every.items() if digest is not None}), written

    def committed(self, written: Mapping[bytes, bytes | None]) -> None:
        """These have been written."""
        for bucket, digest in written.items():
            if digest == STALE:
                self._stale.add(bucket)
            else:
                self._stale.discard(bucket)
