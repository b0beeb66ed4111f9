"""The Merkle tree against the recursive definition of RFC 9162, written down here once more and naively."""

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.ledger.merkle import EMPTY_ROOT, Frontier, inclusion_proof, leaf_hash, root_of, verify_inclusion


def split(count: int) -> int:
    """The largest power of two smaller than `count`."""
    power = 1
    while power * 2 < count:
        power *= 2
    return power


def tree_head(entries: list[bytes]) -> bytes:
    """MTH of section 2.1.1."""
    if not entries:
        return sha256(b"").digest()
    if len(entries) == 1:
        return sha256(b"\x00" + entries[0]).digest()
    k = split(len(entries))
    return sha256(b"\x01" + tree_head(entries[:k]) + tree_head(entries[k:])).digest()


def path_of(index: int, entries: list[bytes]) -> list[bytes]:
    """PATH of section 2.1.3.1."""
    if len(entries) == 1:
        return []
    k = split(len(entries))
    if index < k:
        return [*path_of(index, entries[:k]), tree_head(entries[k:])]
    return [*path_of(index - k, entries[k:]), tree_head(entries[:k])]


# The inputs that Certificate Transparency's own tests use, and the root over all eight.
CT_ENTRIES = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
CT_ROOTS = {
    1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
}  # fmt: skip


@pytest.mark.parametrize(("count", "root"), CT_ROOTS.items())
def test_root_of_the_certificate_transparency_vectors(count: int, root: str) -> None:
    assert tree_head(CT_ENTRIES[:count]).hex() == root
    assert root_of([leaf_hash(entry) for entry in CT_ENTRIES[:count]]).hex() == root


@pytest.mark.parametrize("count", range(40))
def test_frontier_and_list_agree_with_the_definition(count: int) -> None:
    entries = [bytes([i]) * i for i in range(count)]
    frontier = Frontier()
    for entry in entries:
        frontier.append(entry)
    assert frontier.root() == root_of([leaf_hash(entry) for entry in entries]) == tree_head(entries)
    assert Frontier(frontier.size, frontier.peaks).root() == frontier.root()
    if not entries:
        assert frontier.root() == EMPTY_ROOT


def test_a_frontier_with_the_wrong_number_of_peaks_is_refused() -> None:
    with pytest.raises(ValueError, match="2 full subtrees"):
        Frontier(3, [b"x" * 32])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31])
def test_every_leaf_has_a_proof_that_verifies(count: int) -> None:
    entries = [bytes([i]) for i in range(count)]
    leaves = [leaf_hash(entry) for entry in entries]
    root = root_of(leaves)
    for index, leaf in enumerate(leaves):
        path = inclusion_proof(leaves, index)
        assert path == path_of(index, entries)
        assert verify_inclusion(leaf, index, count, path, root)


def test_no_proof_outside_the_tree() -> None:
    with pytest.raises(IndexError):
        inclusion_proof([leaf_hash(b"a")], 1)
    assert not verify_inclusion(leaf_hash(b"a"), 1, 1, [], leaf_hash(b"a"))


@given(count=st.integers(1, 40), data=st.data())
def test_a_changed_proof_does_not_verify(count: int, data: st.DataObject) -> None:
    leaves = [leaf_hash(bytes([i])) for i in range(count)]
    root = root_of(leaves)
    index = data.draw(st.integers(0, count - 1))
    path = inclusion_proof(leaves, index)
    other_index = data.draw(st.integers(0, count + 2))
    if other_index != index:
        assert not verify_inclusion(leaves[index], other_index, count, path, root)
    assert not verify_inclusion(leaf_hash(b"other"), index, count, path, root)
    assert not verify_inclusion(leaves[index], index, count, [*path, root], root)
    if path:
        assert not verify_inclusion(leaves[index], index, count, path[:-1], root)
        position = data.draw(st.integers(0, len(path) - 1))
        damaged = [*path[:position], leaf_hash(b"no"), *path[position + 1 :]]
        assert not verify_inclusion(leaves[index], index, count, damaged, root)
