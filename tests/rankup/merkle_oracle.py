"""Merkle trees straight from the definitions of RFC 9162, section 2.1: recursive, splitting at a power of two."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def split(size: int) -> int:
    """k of the RFC: the largest power of two smaller than `size`."""
    k = 1
    while 2 * k < size:
        k *= 2
    return k


def mth(leaves: Sequence[bytes]) -> bytes:
    """MTH(D[n]), of the leaves themselves."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    k = split(len(leaves))
    return hashlib.sha256(b"\x01" + mth(leaves[:k]) + mth(leaves[k:])).digest()


def path(index: int, leaves: Sequence[bytes]) -> list[bytes]:
    """PATH(m, D[n])."""
    if len(leaves) == 1:
        return []
    k = split(len(leaves))
    if index < k:
        return [*path(index, leaves[:k]), mth(leaves[k:])]
    return [*path(index - k, leaves[k:]), mth(leaves[:k])]


def root_by_path(leaf: bytes, index: int, size: int, siblings: Sequence[bytes]) -> bytes | None:
    """The root that follows from the definition of PATH, taken apart from its end; None where lengths do not fit."""
    if size == 1:
        return hashlib.sha256(b"\x00" + leaf).digest() if not siblings else None
    if not siblings:
        return None
    *rest, last = siblings
    k = split(size)
    below = root_by_path(leaf, index, k, rest) if index < k else root_by_path(leaf, index - k, size - k, rest)
    if below is None:
        return None
    return hashlib.sha256(b"\x01" + (below + last if index < k else last + below)).digest()
