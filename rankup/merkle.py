"""Merkle trees of RFC 9162 (Certificate Transparency 2.0), section 2.1: roots, and proofs that a leaf is in a tree.

    leaf hash = sha256(00 || leaf),  node hash = sha256(01 || left || right),  root of nothing = sha256("")

What always holds: a proof that checks means that this leaf stands at this index of the tree with this size and root;
leaves and nodes are hashed apart, so neither can pass for the other. Nothing here knows what a leaf means.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from rankup.errors import InputError


def leaf_hash(leaf: bytes) -> bytes:
    """32 bytes."""
    return hashlib.sha256(b"\x00" + leaf).digest()


def tree_root(hashes: Sequence[bytes]) -> bytes:
    """Root (32 bytes) of the tree over leaves with these hashes (`leaf_hash`), in order: MTH of the RFC."""
    if not hashes:
        return hashlib.sha256(b"").digest()
    level = list(hashes)
    while len(level) > 1:
        paired = [_node(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = [*paired, level[-1]] if len(level) % 2 else paired
    return level[0]


def inclusion_proof(hashes: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """The siblings from leaf `index` up to the root: PATH(m, D[n]) of RFC 9162, section 2.1.3.1.

    Raises InputError when there is no such leaf.
    """
    if not 0 <= index < len(hashes):
        raise InputError(f"there is no leaf {index} in a tree of {len(hashes)}")
    path = []
    level = list(hashes)
    while len(level) > 1:
        sibling = index ^ 1
        if sibling < len(level):
            path.append(level[sibling])
        paired = [_node(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = [*paired, level[-1]] if len(level) % 2 else paired
        index //= 2
    return tuple(path)


def root_of_proof(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes | None:
    """The root that `path` leads to from the leaf hash `leaf` at `index` of `size`; None where it cannot be a path.

    RFC 9162, section 2.1.3.2.
    """
    if not 0 <= index < size:
        return None
    first, last = index, size - 1
    root = leaf
    for sibling in path:
        if last == 0:
            return None
        if first % 2 or first == last:
            root = _node(sibling, root)
            while first % 2 == 0 and first:
                first //= 2
                last //= 2
        else:
            root = _node(root, sibling)
        first //= 2
        last //= 2
    return root if last == 0 else None


@dataclass(frozen=True)
class Peaks:
    """A tree that grows at its end: the roots of its perfect subtrees, from the largest to the smallest."""

    size: int = 0
    hashes: tuple[bytes, ...] = ()

    def with_leaf(self, leaf: bytes) -> Peaks:
        """The tree with one leaf hash more."""
        hashes = list(self.hashes)
        rest = self.size
        while rest % 2:
            leaf = _node(hashes.pop(), leaf)
            rest //= 2
        return Peaks(self.size + 1, (*hashes, leaf))

    def root(self) -> bytes:
        """Law: `tree_root` of the same leaves."""
        if not self.hashes:
            return hashlib.sha256(b"").digest()
        *others, root = self.hashes
        for peak in reversed(others):
            root = _node(peak, root)
        return root


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()
