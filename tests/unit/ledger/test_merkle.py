"""The Merkle tree against the recursive definition of RFC 9162, written down here once more and naively.

`vectors/merkle_proofs.json` holds proofs that others made and that others reject.
"""

import base64
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.ledger.merkle import (
    EMPTY_ROOT,
    Frontier,
    consistency_proof,
    hashes_from,
    hashes_of,
    inclusion_proof,
    leaf_hash,
    multiproof,
    node_position,
    nodes_in,
    root_from_consistency,
    root_from_inclusion,
    root_from_multiproof,
    root_of,
    verify_consistency,
    verify_inclusion,
)

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[2] / "vectors" / "merkle_proofs.json").read_text())


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


def subproof(first: int, entries: list[bytes], whole: bool) -> list[bytes]:
    """SUBPROOF of section 2.1.4.1."""
    if first == len(entries):
        return [] if whole else [tree_head(entries)]
    k = split(len(entries))
    if first <= k:
        return [*subproof(first, entries[:k], whole), tree_head(entries[k:])]
    return [*subproof(first - k, entries[k:], False), tree_head(entries[:k])]


def grown(entries: list[bytes]) -> Frontier:
    frontier = Frontier()
    for entry in entries:
        frontier.append(entry)
    return frontier


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
        path = inclusion_proof(index, count, hashes_of(leaves))
        assert path == path_of(index, entries)
        assert verify_inclusion(leaf, index, count, path, root)


def test_no_proof_outside_the_tree() -> None:
    with pytest.raises(IndexError):
        inclusion_proof(1, 1, hashes_of([leaf_hash(b"a")]))
    with pytest.raises(IndexError):
        inclusion_proof(0, 2, hashes_of([leaf_hash(b"a")]))
    assert not verify_inclusion(leaf_hash(b"a"), 1, 1, [], leaf_hash(b"a"))


@given(count=st.integers(1, 40), data=st.data())
def test_a_changed_proof_does_not_verify(count: int, data: st.DataObject) -> None:
    leaves = [leaf_hash(bytes([i])) for i in range(count)]
    root = root_of(leaves)
    index = data.draw(st.integers(0, count - 1))
    path = inclusion_proof(index, count, hashes_of(leaves))
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


@pytest.mark.parametrize("count", range(20))
def test_made_nodes_are_every_full_subtree_once_at_its_position(count: int) -> None:
    entries = [bytes([i]) for i in range(count)]
    made = grown(entries).made
    assert len(made) == nodes_in(count)
    expected = {
        node_position(level, index): tree_head(entries[index << level : (index + 1) << level])
        for level in range(count.bit_length())
        for index in range(count >> level)
    }
    assert [expected[position] for position in range(len(made))] == made
    assert len(expected) == len(made)


@given(size=st.integers(1, 70), data=st.data())
def test_proofs_of_every_earlier_size_come_from_stored_nodes(size: int, data: st.DataObject) -> None:
    entries = [bytes([i]) for i in range(70)]
    leaves = [leaf_hash(entry) for entry in entries]
    stored = hashes_from(grown(entries).made.__getitem__)
    index = data.draw(st.integers(0, size - 1))
    first = data.draw(st.integers(0, size))
    indices = data.draw(st.sets(st.integers(0, size - 1), min_size=1))
    assert inclusion_proof(index, size, stored) == inclusion_proof(index, size, hashes_of(leaves[:size]))
    assert consistency_proof(first, size, stored) == consistency_proof(first, size, hashes_of(leaves[:size]))
    assert multiproof(indices, size, stored) == multiproof(indices, size, hashes_of(leaves[:size]))


def test_a_proof_from_stored_nodes_reads_a_logarithm_of_the_tree() -> None:
    made = grown([b""] * 1_000).made
    reads: list[int] = []

    def read(position: int) -> bytes:
        reads.append(position)
        return made[position]

    inclusion_proof(777, 1_000, hashes_from(read))
    assert len(reads) <= 2 * 10
    reads.clear()
    consistency_proof(333, 1_000, hashes_from(read))
    assert len(reads) <= 2 * 10


@pytest.mark.parametrize("second", range(1, 24))
def test_consistency_of_all_sizes(second: int) -> None:
    entries = [bytes([i]) for i in range(second)]
    hash_of = hashes_of([leaf_hash(entry) for entry in entries])
    root = tree_head(entries)
    for first in range(1, second + 1):
        path = consistency_proof(first, second, hash_of)
        assert path == subproof(first, entries, True)
        assert root_from_consistency(first, second, tree_head(entries[:first]), path) == root
        assert verify_consistency(first, second, tree_head(entries[:first]), root, path)


def test_consistency_with_an_empty_tree_says_nothing() -> None:
    root = leaf_hash(b"a")
    assert consistency_proof(0, 1, hashes_of([root])) == []
    assert verify_consistency(0, 1, EMPTY_ROOT, root, [])
    assert not verify_consistency(0, 1, root, root, [])
    assert not verify_consistency(0, 1, EMPTY_ROOT, root, [root])
    assert verify_consistency(0, 0, EMPTY_ROOT, EMPTY_ROOT, [])
    assert not verify_consistency(0, 0, EMPTY_ROOT, root, [])
    assert root_from_consistency(0, 1, EMPTY_ROOT, []) is None
    with pytest.raises(IndexError):
        consistency_proof(2, 1, hashes_of([root]))


@given(second=st.integers(2, 40), data=st.data())
def test_a_tree_that_was_rewritten_is_not_consistent(second: int, data: st.DataObject) -> None:
    entries = [bytes([i]) for i in range(second)]
    first = data.draw(st.integers(1, second - 1))
    changed = data.draw(st.integers(0, first - 1))
    rewritten = [*entries[:changed], b"another", *entries[changed + 1 :]]
    path = consistency_proof(first, second, hashes_of([leaf_hash(entry) for entry in rewritten]))
    assert root_from_consistency(first, second, tree_head(entries[:first]), path) != tree_head(rewritten)
    assert not verify_consistency(first, second, tree_head(entries[:first]), tree_head(rewritten), path)
    assert not verify_consistency(first, second, tree_head(rewritten[:first]), tree_head(rewritten), [*path, path[0]])
    assert not verify_consistency(first, second, tree_head(rewritten[:first]), tree_head(rewritten), path[:-1])


@given(size=st.integers(1, 60), data=st.data())
def test_a_multiproof_leads_to_the_root_and_nothing_else_does(size: int, data: st.DataObject) -> None:
    entries = [bytes([i]) for i in range(size)]
    leaves = [leaf_hash(entry) for entry in entries]
    root = tree_head(entries)
    indices = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1)))
    hashes = multiproof(indices, size, hashes_of(leaves))
    proven = [(index, leaves[index]) for index in indices]
    assert root_from_multiproof(proven, size, hashes) == root
    # Never more hashes than the single paths have together.
    assert len(hashes) <= sum(len(path_of(index, entries)) for index in indices)

    spot = data.draw(st.integers(0, len(proven) - 1))
    index, leaf = proven[spot]
    assert root_from_multiproof([*proven[:spot], (index, leaf_hash(b"no")), *proven[spot + 1 :]], size, hashes) != root
    assert root_from_multiproof(proven, size, [*hashes, root]) is None
    assert root_from_multiproof(list(reversed(proven)), size, hashes) != root or len(proven) == 1
    assert root_from_multiproof([*proven, proven[-1]], size, hashes) is None
    assert root_from_multiproof([], size, hashes) is None
    assert root_from_multiproof([(size, leaf)], size, hashes) is None
    if hashes:
        assert root_from_multiproof(proven, size, hashes[:-1]) is None
        spot = data.draw(st.integers(0, len(hashes) - 1))
        damaged = [*hashes[:spot], leaf_hash(b"no"), *hashes[spot + 1 :]]
        assert root_from_multiproof(proven, size, damaged) != root
    free = sorted(set(range(size)) - set(indices))
    if free:
        moved = dict(proven)
        del moved[index]
        moved[data.draw(st.sampled_from(free))] = leaf
        assert root_from_multiproof(sorted(moved.items()), size, hashes) != root


def test_a_multiproof_of_nothing_or_outside_is_not_made() -> None:
    hash_of = hashes_of([leaf_hash(b"a")])
    with pytest.raises(ValueError, match="at least one"):
        multiproof([], 1, hash_of)
    with pytest.raises(IndexError):
        multiproof([0, 1], 1, hash_of)


def test_a_multiproof_that_claims_a_huge_tree_costs_little() -> None:
    assert root_from_multiproof([(2**52, leaf_hash(b"a"))], 2**53 - 1, []) is None


def _bytes(text: str | None) -> bytes:
    return base64.b64decode(text or "")


@pytest.mark.parametrize("case", VECTORS["inclusion"], ids=lambda case: case["id"])
def test_inclusion_vectors_of_others(case: dict[str, Any]) -> None:
    path = [_bytes(item) for item in case["proof"] or ()]
    holds = verify_inclusion(_bytes(case["leafHash"]), case["leafIdx"], case["treeSize"], path, _bytes(case["root"]))
    assert holds is not case["wantErr"]
    root = root_from_inclusion(_bytes(case["leafHash"]), case["leafIdx"], case["treeSize"], path)
    assert (root == _bytes(case["root"])) is holds


@pytest.mark.parametrize("case", VECTORS["consistency"], ids=lambda case: case["id"])
def test_consistency_vectors_of_others(case: dict[str, Any]) -> None:
    path = [_bytes(item) for item in case["proof"] or ()]
    holds = verify_consistency(case["size1"], case["size2"], _bytes(case["root1"]), _bytes(case["root2"]), path)
    assert holds is not case["wantErr"]
