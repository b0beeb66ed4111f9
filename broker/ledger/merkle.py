"""The Merkle tree of RFC 9162 (section 2.1) with SHA-256, over the ledger's operations in the order applied. Pure.

`Frontier` grows the tree and keeps only the roots of its full subtrees, so appending and the root cost O(log n). The
nodes that it makes come out in the order made (post-order), which is also how a store keeps them: node `level` above
leaf number `last` stands at position `node_position`, and is never changed again. From those stored nodes, or from a
list of leaf hashes, the proofs here are made for the tree of any size that it ever had:

- `inclusion_proof`: this leaf stands at this index (section 2.1.3);
- `consistency_proof`: the smaller tree is the beginning of the larger one (section 2.1.4);
- `multiproof`: all these leaves stand at these indices; nodes that several paths share are given once.

Whatever makes proofs asks for the hashes of spans: `[low, high)` stands for the subtree over these leaves, one that
occurs in some tree of RFC 9162.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import pairwise
from typing import Final

EMPTY_ROOT: Final = sha256(b"").digest()

Span = tuple[int, int]
"""The leaves `[low, high)` of a subtree, which begins at a multiple of a power of two that is not below its length."""

SpanHash = Callable[[int, int], bytes]
"""Gives the hash of a span; it fails where the tree does not reach so far."""


def leaf_hash(data: bytes) -> bytes:
    """HASH(0x00 ‖ data)."""
    return sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """HASH(0x01 ‖ left ‖ right)."""
    return sha256(b"\x01" + left + right).digest()


class Frontier:
    """A growing tree: its size and the roots (`peaks`) of its full subtrees, the largest first.

    `made` collects the nodes in the order made, for whoever stores them and empties it.
    """

    __slots__ = ("made", "peaks", "size")

    def __init__(self, size: int = 0, peaks: Iterable[bytes] = ()) -> None:
        self.size = size
        self.peaks = list(peaks)
        self.made: list[bytes] = []
        if len(self.peaks) != size.bit_count():
            raise ValueError(f"a tree of {size} leaves has {size.bit_count()} full subtrees, got {len(self.peaks)}")

    def append(self, data: bytes) -> None:
        """Add one leaf with this data."""
        digest = leaf_hash(data)
        self.made.append(digest)
        below = self.size
        # Each one-bit at the low end of the size is a full subtree as large as what was just made: they join.
        while below & 1:
            digest = node_hash(self.peaks.pop(), digest)
            self.made.append(digest)
            below >>= 1
        self.peaks.append(digest)
        self.size += 1

    def root(self) -> bytes:
        """The root over all leaves so far."""
        return _joined(self.peaks)


def root_of(leaves: Sequence[bytes]) -> bytes:
    """The root over these leaf hashes."""
    if not leaves:
        return EMPTY_ROOT
    level = list(leaves)
    # Joining neighbours level by level, the odd one carried up, gives the same tree as splitting at powers of two.
    while len(level) > 1:
        joined = [node_hash(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        if len(level) % 2:
            joined.append(level[-1])
        level = joined
    return level[0]


# --- Where nodes are stored


def nodes_in(size: int) -> int:
    """How many nodes a Frontier has made once it has this many leaves: each leaf and each full subtree once."""
    return 2 * size - size.bit_count()


def node_position(level: int, index: int) -> int:
    """The position, in the order made, of the full subtree over leaves `[index << level, (index + 1) << level)`.

    It is made when its last leaf comes: after that leaf, and after the smaller subtrees which end there too.
    """
    last = ((index + 1) << level) - 1
    return nodes_in(last) + level


def peak_positions(size: int) -> list[int]:
    """The positions of the full subtrees of a tree of `size` leaves, the largest first: all that it needs to grow."""
    positions, low = [], 0
    while low < size:
        level = (size - low).bit_length() - 1
        positions.append(node_position(level, low >> level))
        low += 1 << level
    return positions


def hashes_from(read_node: Callable[[int], bytes]) -> SpanHash:
    """Span hashes from stored nodes: `read_node` gives the node at a position. A span costs O(log n) reads."""

    def hash_of(low: int, high: int) -> bytes:
        peaks = []
        while low < high:
            level = (high - low).bit_length() - 1
            peaks.append(read_node(node_position(level, low >> level)))
            low += 1 << level
        return _joined(peaks)

    return hash_of


def hashes_of(leaves: Sequence[bytes]) -> SpanHash:
    """Span hashes from a list of leaf hashes."""

    def hash_of(low: int, high: int) -> bytes:
        if high > len(leaves):
            raise IndexError(f"leaf {high - 1} is not among {len(leaves)} leaves")
        return root_of(leaves[low:high])

    return hash_of


def _joined(peaks: Sequence[bytes]) -> bytes:
    """The root over full subtrees, the largest first."""
    if not peaks:
        return EMPTY_ROOT
    digest = peaks[-1]
    for peak in reversed(peaks[:-1]):
        digest = node_hash(peak, digest)
    return digest


def _split(low: int, high: int) -> int:
    """Where the tree over `[low, high)` divides: at the largest power of two below its length (section 2.1.1)."""
    return low + (1 << (high - low - 1).bit_length() - 1)


# --- One leaf


def inclusion_proof(index: int, size: int, hash_of: SpanHash) -> list[bytes]:
    """The path from leaf `index` to the root of the tree of `size` leaves (section 2.1.3.1). Raises IndexError."""
    if not 0 <= index < size:
        raise IndexError(f"leaf {index} is not in a tree of {size} leaves")
    path: list[bytes] = []
    low, high = 0, size
    while high - low > 1:
        middle = _split(low, high)
        if index < middle:
            path.append(hash_of(middle, high))
            high = middle
        else:
            path.append(hash_of(low, middle))
            low = middle
    path.reverse()
    return path


def root_from_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes | None:
    """The root to which `path` leads from the leaf hash at `index` in a tree of `size` leaves (section 2.1.3.2).

    None if there is no such path: it is too long or too short, or the leaf is outside.
    """
    if not 0 <= index < size:
        return None
    node, last = index, size - 1
    digest = leaf
    for sibling in path:
        if last == 0:
            return None
        if node & 1 or node == last:
            digest = node_hash(sibling, digest)
            # A node at the right edge without a sibling moves up unchanged until it is a right child.
            while not node & 1 and node:
                node >>= 1
                last >>= 1
        else:
            digest = node_hash(digest, sibling)
        node >>= 1
        last >>= 1
    return digest if last == 0 else None


def verify_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes) -> bool:
    """True if `path` proves that the leaf hash `leaf` stands at `index` in the tree of `size` leaves with this root."""
    return root_from_inclusion(leaf, index, size, path) == root


# --- Two sizes of one tree


def consistency_proof(first: int, second: int, hash_of: SpanHash) -> list[bytes]:
    """The nodes which show that the tree of `first` leaves begins the one of `second` (section 2.1.4.1).

    Empty if `first` is 0 or `second`. Raises IndexError unless 0 <= first <= second.
    """
    if not 0 <= first <= second:
        raise IndexError(f"a tree of {first} leaves does not begin one of {second}")
    if first == 0:
        return []
    path: list[bytes] = []
    low, high = 0, second
    whole = True  # The smaller tree begins where this subtree does, so it may be this very one, which is known.
    while high != first:
        middle = _split(low, high)
        if first <= middle:
            path.append(hash_of(middle, high))
            high = middle
        else:
            path.append(hash_of(low, middle))
            low, whole = middle, False
    if not whole:
        path.append(hash_of(low, high))
    path.reverse()
    return path


def root_from_consistency(first: int, second: int, first_root: bytes, path: Sequence[bytes]) -> bytes | None:
    """The root of the tree of `second` leaves, if `path` shows that the one of `first` with `first_root` begins it.

    The algorithm of section 2.1.4.2. None if it does not. A tree of no leaves begins every other, which says nothing
    about the other's root: None too.
    """
    if not 0 < first <= second:
        return None
    if first == second:
        return first_root if not path else None
    nodes = list(path)
    if first & (first - 1) == 0:
        nodes.insert(0, first_root)  # A full tree is a node of the larger one, and is not sent.
    if not nodes:
        return None
    node, last = first - 1, second - 1
    while node & 1:
        node >>= 1
        last >>= 1
    old = new = nodes[0]
    for sibling in nodes[1:]:
        if last == 0:
            return None
        if node & 1 or node == last:
            old, new = node_hash(sibling, old), node_hash(sibling, new)
            while not node & 1 and node:
                node >>= 1
                last >>= 1
        else:
            new = node_hash(new, sibling)
        node >>= 1
        last >>= 1
    return new if last == 0 and old == first_root else None


def verify_consistency(first: int, second: int, first_root: bytes, second_root: bytes, path: Sequence[bytes]) -> bool:
    """True if `path` proves that the tree of `first` leaves with `first_root` begins the one of `second`."""
    if first == 0 < second:
        return first_root == EMPTY_ROOT and not path
    if first == second == 0:
        return first_root == second_root == EMPTY_ROOT and not path
    return root_from_consistency(first, second, first_root, path) == second_root


# --- Many leaves


def multiproof(indices: Iterable[int], size: int, hash_of: SpanHash) -> list[bytes]:
    """What is needed besides the leaves at `indices` to derive the root of the tree of `size` leaves.

    The hashes of the largest subtrees without any of these leaves, from left to right. Raises IndexError for an index
    outside the tree, ValueError for no index at all.
    """
    wanted = sorted(set(indices))
    if not wanted:
        raise ValueError("a proof of no leaf proves nothing; give at least one index")
    if wanted[0] < 0 or wanted[-1] >= size:
        raise IndexError(f"a leaf among {wanted[0]} to {wanted[-1]} is not in a tree of {size} leaves")
    hashes: list[bytes] = []
    # Subtrees still to be looked at, the leftmost on top, each with its part of `wanted`.
    waiting: list[tuple[int, int, int, int]] = [(0, size, 0, len(wanted))]
    while waiting:
        low, high, first, end = waiting.pop()
        if first == end:
            hashes.append(hash_of(low, high))
        elif high - low > 1:
            middle = _split(low, high)
            cut = bisect_left(wanted, middle, first, end)
            waiting.append((middle, high, cut, end))
            waiting.append((low, middle, first, cut))
    return hashes


def root_from_multiproof(leaves: Sequence[tuple[int, bytes]], size: int, hashes: Sequence[bytes]) -> bytes | None:
    """The root of the tree of `size` leaves that has these (index, leaf hash), given `hashes` of `multiproof`.

    None if indices do not ascend, lie outside, or the number of hashes is not exactly what the tree needs. Costs
    O(leaves × log size), however large the size that is claimed.
    """
    indices = [index for index, _ in leaves]
    if not leaves or indices[0] < 0 or indices[-1] >= size:
        return None
    if any(one >= other for one, other in pairwise(indices)):
        return None
    given = iter(hashes)
    done: list[bytes] = []
    # As in `multiproof`; a None joins the two subtrees that were finished last.
    waiting: list[tuple[int, int, int, int] | None] = [(0, size, 0, len(leaves))]
    while waiting:
        item = waiting.pop()
        if item is None:
            right = done.pop()
            done.append(node_hash(done.pop(), right))
            continue
        low, high, first, end = item
        if first == end:
            digest = next(given, None)
            if digest is None:
                return None
            done.append(digest)
        elif end - first == 1:
            digest = _single(*leaves[first], low, high, given)
            if digest is None:
                return None
            done.append(digest)
        else:
            middle = _split(low, high)
            cut = bisect_left(indices, middle, first, end)
            waiting += (None, (middle, high, cut, end), (low, middle, first, cut))
    return done[0] if next(given, None) is None else None


def _single(index: int, digest: bytes, low: int, high: int, given: Iterator[bytes]) -> bytes | None:
    """The hash of the span `[low, high)` in which only the leaf at `index` is known; None if `given` ends too soon.

    Most of a proof of scattered leaves is such paths, so they have no part in the bookkeeping of the others.
    """
    lefts: list[bytes | None] = []  # For each step down the sibling on the left, which comes before the leaf; or None.
    while high - low > 1:
        middle = low + (1 << (high - low - 1).bit_length() - 1)
        if index < middle:
            lefts.append(None)
            high = middle
        else:
            left = next(given, None)
            if left is None:
                return None
            lefts.append(left)
            low = middle
    while lefts:
        left = lefts.pop()
        if left is not None:
            digest = sha256(b"\x01" + left + digest).digest()
        else:
            right = next(given, None)
            if right is None:
                return None
            digest = sha256(b"\x01" + digest + right).digest()
    return digest
