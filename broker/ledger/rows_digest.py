"""One hash over all state rows, made of hashes of parts, so that only what has changed is hashed again. Pure.

The state hash of a block is a chain over *changes*: it cannot say whether a given set of rows is the right one. The
rows digest can, so a snapshot is checked with it. Rows are grouped into buckets that are one run of keys each:

- where a key goes on with a time (assets, slices, demands, totals): table and hour;
- where it goes on with a party and then a time (held slices, closes, applied batches): table, party and hour;
- orders: table and requester;
- else the whole table.

    bucket digest = SHA-256( key ‖ row ‖ key ‖ row … by ascending key )
    rows digest   = SHA-256( bucket ‖ digest ‖ bucket ‖ digest … by ascending bucket ), buckets without rows left out

Keys, rows and buckets are CBOR items and delimit themselves; a digest has 32 bytes.
"""

from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from typing import Final

from broker.ledger.state import (
    APPLIED,
    CLOSED,
    MANDATED,
    ORDER,
    OWNED,
    Key,
    decode_key,
    prefix_bounds,
    scan_bounds,
    table_bounds,
)
from broker.protocol import cbor

NO_DIGEST: Final = bytes(32)
"""What stands for the rows digest as long as none has been made."""

_SPAN_S: Final = 3_600
"""A million meters make some millions of rows an hour, which is what one changed row costs to hash again at most."""

_BY_PARTY: Final = frozenset((OWNED, MANDATED, ORDER, CLOSED, APPLIED))


def bucket_of(key: Key) -> bytes:
    """The bucket that a row's key belongs to."""
    length = 2 if key[0] in _BY_PARTY else 1
    if type(key[length]) is int:
        return cbor.encode([*key[:length], key[length] // _SPAN_S])
    return cbor.encode(key[:length])


def bounds_of(bucket: bytes) -> tuple[bytes, bytes]:
    """The bounds [from, to) of the encoded keys in a bucket."""
    *prefix, last = cbor.decode(bucket, "bucket", len(bucket))
    if prefix and type(last) is int:
        return scan_bounds(tuple(prefix), last * _SPAN_S, (last + 1) * _SPAN_S)
    return prefix_bounds((*prefix, last)) if prefix else table_bounds(last)


def bucket_digest(rows: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The digest of one bucket's rows (key, row), given by ascending key; None if there are none."""
    digest = None
    for key, row in rows:
        if digest is None:
            digest = sha256()
        digest.update(key)
        digest.update(row)
    return None if digest is None else digest.digest()


def bucket_digests(rows: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """The digests of all buckets, from all rows (key, row) of a state, given by ascending key.

    Raises ValueError for a key that is none, or one that is out of order.
    """
    digests: dict[bytes, bytes] = {}
    bucket, digest, last = b"", sha256(), b""
    for key, row in rows:
        if key <= last:
            raise ValueError(f"key {key.hex()} is out of order")
        last = key
        if (following := bucket_of(decode_key(key))) != bucket:
            if bucket:
                digests[bucket] = digest.digest()
            bucket, digest = following, sha256()
        digest.update(key)
        digest.update(row)
    if bucket:
        digests[bucket] = digest.digest()
    return digests


def rows_digest(digests: Mapping[bytes, bytes]) -> bytes:
    """The digest of all rows, from the digests of all buckets."""
    return sha256(b"".join([bucket + digests[bucket] for bucket in sorted(digests)])).digest()


def app_hash_of(block_id: bytes, rows_digest: bytes) -> bytes:
    """What a network's validators sign: the last block of the ledger, and the rows at the last snapshot height."""
    return sha256(block_id + rows_digest).digest()


def merged(
    stored: Iterable[tuple[bytes, bytes]], changes: Iterable[tuple[bytes, bytes | None]]
) -> Iterator[tuple[bytes, bytes]]:
    """Stored rows with changes on top (None for a deleted row), both by ascending key."""
    changed = iter(changes)
    change = next(changed, None)
    for key, row in stored:
        while change is not None and change[0] < key:
            if change[1] is not None:
                yield change[0], change[1]
            change = next(changed, None)
        if change is not None and change[0] == key:
            if change[1] is not None:
                yield key, change[1]
            change = next(changed, None)
        else:
            yield key, row
    while change is not None:
        if change[1] is not None:
            yield change[0], change[1]
        change = next(changed, None)
