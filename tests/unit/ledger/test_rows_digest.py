"""The rows digest: equal for equal rows however it was made, and different for anything else."""

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.ledger_world import T0, World, deliver, issue, take

from broker.ledger import rows_digest as digests
from broker.ledger import state as rows
from broker.ledger.state import decode_key, encode_key
from broker.protocol import cbor


def stored_rows(world: World) -> list[tuple[bytes, bytes]]:
    return sorted((key, row) for key, row in world.step.rows.items() if row is not None)


@pytest.fixture
def world() -> World:
    world = World.set_up()
    world.apply(issue("solar-1", 1_000), take("solar-1", 0, 1_000), deliver(1, 100, ("solar-1", 0, 100)))
    return world


def test_the_digest_is_the_documented_one(world: World) -> None:
    by_bucket: dict[bytes, list[bytes]] = {}
    for key, row in stored_rows(world):
        by_bucket.setdefault(digests.bucket_of(decode_key(key)), []).append(key + row)
    expected = b"".join(bucket + sha256(b"".join(parts)).digest() for bucket, parts in sorted(by_bucket.items()))
    assert digests.rows_digest(digests.bucket_digests(stored_rows(world))) == sha256(expected).digest()


def test_buckets_are_runs_of_keys_with_bounds_around_exactly_their_own(world: World) -> None:
    every = stored_rows(world)
    buckets = digests.bucket_digests(every)
    assert {cbor.decode(bucket, "bucket", 64)[0] for bucket in buckets} >= {
        rows.ASSET,
        rows.SLICE,
        rows.OWNED,
        rows.KEY,
    }
    for bucket, digest in buckets.items():
        first, end = digests.bounds_of(bucket)
        inside = [(key, row) for key, row in every if first <= key < end]
        assert {digests.bucket_of(decode_key(key)) for key, _ in inside} == {bucket}
        assert digests.bucket_digest(inside) == digest
    assert digests.bucket_digest([]) is None


@pytest.mark.parametrize(
    ("key", "bucket"),
    [
        ((rows.ASSET, T0 + 1_800, "roof", 1, 0), [rows.ASSET, T0 // 3_600]),
        ((rows.DEMAND, T0 + 3_600, b"p" * 16), [rows.DEMAND, T0 // 3_600 + 1]),
        ((rows.OWNED, "b1", T0, "roof", 1, 0), [rows.OWNED, "b1", T0 // 3_600]),
        ((rows.MANDATED, "b1", T0, "roof", 1, 0), [rows.MANDATED, "b1", T0 // 3_600]),
        ((rows.CARRY, "roof", 1), [rows.CARRY]),
        ((rows.VALIDATORS, 0), [rows.VALIDATORS, 0]),
        ((rows.ORDER, "b1", b"o" * 16), [rows.ORDER, "b1"]),
        ((rows.KEY, b"k" * 16), [rows.KEY]),
        ((rows.DEVICE, "roof"), [rows.DEVICE]),
    ],
)
def test_where_a_key_belongs(key: rows.Key, bucket: list[object]) -> None:
    assert digests.bucket_of(key) == cbor.encode(bucket)
    first, end = digests.bounds_of(digests.bucket_of(key))
    assert first <= encode_key(key) < end


def test_keys_out_of_order_are_refused(world: World) -> None:
    with pytest.raises(ValueError, match="out of order"):
        digests.bucket_digests(reversed(stored_rows(world)))


_KEYS = st.integers(0, 40).map(lambda number: encode_key((rows.TOTAL, T0 + number * 1_800, 1)))


@given(st.dictionaries(_KEYS, st.binary(max_size=3)), st.dictionaries(_KEYS, st.none() | st.binary(max_size=3)))
def test_merging_is_what_writing_would_do(stored: dict[bytes, bytes], changes: dict[bytes, bytes | None]) -> None:
    expected = {key: row for key, row in (stored | changes).items() if row is not None}
    assert list(digests.merged(sorted(stored.items()), sorted(changes.items()))) == sorted(expected.items())
