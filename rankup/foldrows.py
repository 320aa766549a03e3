"""One tensor of the next version, made tile by tile from the parent's bytes, the sum of the round and the outer step.

The fold and its replay are this one loop: they differ in where bytes come from and where tiles go.

What always holds:
- the result depends on the parent's bytes, the terms and the outer step alone: tiles, kernels and the order of the
  terms change no bit (docs/numerics.md);
- the parent's bytes are hashed on the way, and a tensor with another hash raises IntegrityError before the iteration
  ends: who shows nothing to anybody before the end shows nothing wrong;
- memory is a few tiles and the factors of the tensor, however large the tensor is. Of stacked experts one sum is held
  at a time.

It does not open files or choose which contributions count.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from rankup.bfloat16 import Float32Array
from rankup.dtypes import STORED_AS, Array, Dtype, export_of, master_dtype, raw_bytes
from rankup.errors import DeltaError, InputError, IntegrityError
from rankup.exactsum import Sum
from rankup.fixedpoint import Factors
from rankup.outer import outer_step
from rankup.products import KERNELS, Kernel
from rankup.recipe import PLAIN_SUM, OuterStep
from rankup.records import TensorEntry
from rankup.targets import Role, target_of

TILE_BYTES: Final = 8 * 2**20
"""Bytes of the master in one tile; a fold holds some fifteen times as much, besides the factors."""

ReadAt = Callable[[int, int], bytes]
"""(start, length) -> that many bytes of one tensor, from its byte `start` on. Asked in order, without gaps."""


@dataclass(frozen=True)
class TensorTerm:
    """One contribution's part in one tensor: `slices` products, each read when it is needed (`DeltaReader.factors`)."""

    coefficient: int
    factors: Callable[[int], Factors]
    """Slice, from 0 -> its factors. A matrix is its own slice 0; a vector is a matrix of one column."""
    slices: int = 1


@dataclass(frozen=True)
class Tile:
    """Some rows of the new tensor, in order; arrays in the dtypes of their files."""

    master: Array
    export: Array
    momentum: Float32Array | None
    path: str = ""
    """Name of the kernel that multiplied; empty where no sum was added."""
    before: Array | None = None
    """The same rows of the parent's master; None where the tensor keeps its bits."""


@dataclass(frozen=True)
class Law:
    """How a round's terms become a step: the same for every tensor of it."""

    denominator_log2: int
    outer: OuterStep = PLAIN_SUM
    kernels: Sequence[Kernel] = KERNELS
    """Change the time, never a bit."""
    tile_bytes: int = TILE_BYTES
    """Changes memory and requests, never a bit."""


def fold_tiles(
    name: str,
    before: TensorEntry,
    terms: Sequence[TensorTerm],
    law: Law,
    *,
    master: ReadAt,
    momentum: ReadAt | None = None,
) -> Iterator[Tile]:
    """The tiles of tensor `name`, whose entry in the parent is `before`.

    `terms` are those that change this tensor, with coefficients other than 0. `momentum` reads the state where the
    parent has one. With an outer step that keeps a state, a tensor that has terms or a state is stepped in every
    entry; any other keeps its bits.

    Raises IntegrityError (the parent's bytes do not have their hash or are not finite; terms for a tensor that takes
    none), DeltaError (factors that do not fit, results beyond float32), and what the readers raise.
    """
    if law.tile_bytes < 8:
        raise InputError(f"a tile of {law.tile_bytes} bytes is empty")
    if terms and before.role is None:
        raise IntegrityError(f"a contribution changes {name}, which its parent does not let a delta change")
    old_master = _Checked(master, before.master, f"tensor {name}")
    old_momentum = None
    if law.outer.keeps_state and before.momentum is not None:
        if momentum is None:
            raise InputError(f"the momentum of tensor {name} is needed and was not given")
        old_momentum = _Checked(momentum, before.momentum, f"the momentum of tensor {name}")
    if terms or old_momentum is not None:
        yield from _stepped(name, before, terms, law, old_master, old_momentum)
    else:
        yield from _copied(before, law, old_master)
    for part in (old_master, old_momentum):
        if part is not None:
            part.finish()


def _stepped(
    name: str,
    before: TensorEntry,
    terms: Sequence[TensorTerm],
    law: Law,
    old_master: _Checked,
    old_momentum: _Checked | None,
) -> Iterator[Tile]:
    if before.role is None or master_dtype(before.export_dtype) != "F32":
        raise IntegrityError(
            f"tensor {name} takes a step, but it is {before.export_dtype} and {before.role or 'fixed'}"
        )
    target = target_of(before.role, before.shape)
    shape = (target.d_out, target.d_in)
    step = max(1, law.tile_bytes // (4 * target.d_in))
    if any(term.slices != target.slices for term in terms):
        raise DeltaError(f"{name}: a delta has another number of slices than the weight's {target.slices}")
    for number in range(target.slices):
        total = _sum(name, [(term.coefficient, term.factors(number)) for term in terms], shape, law)
        for start in range(0, target.d_out, step):
            rows = slice(start, min(start + step, target.d_out))
            size = (rows.stop - rows.start) * target.d_in
            master = old_master.next(size).reshape(-1, target.d_in)
            momentum = None if old_momentum is None else old_momentum.next(size).reshape(-1, target.d_in)
            delta = None if total is None else total.delta(rows)
            new_master, new_momentum = outer_step(master, delta, momentum, law.outer)
            yield Tile(
                new_master,
                export_of(new_master, before.export_dtype),
                new_momentum,
                "" if total is None else total.path,
                master,
            )


def _sum(name: str, terms: list[tuple[int, Factors]], shape: tuple[int, int], law: Law) -> Sum | None:
    """None where nothing is added: then a master that no state moves keeps its bits."""
    if not terms:
        return None
    total = Sum(terms, law.denominator_log2, kernels=law.kernels)
    if total.shape != shape:
        raise DeltaError(f"{name}: a delta of shape {total.shape} does not fit a weight of shape {shape}")
    return None if total.is_zero else total


def _copied(before: TensorEntry, law: Law, old_master: _Checked) -> Iterator[Tile]:
    dtype = STORED_AS[master_dtype(before.export_dtype)]
    left = math.prod(before.shape)
    while left:
        count = min(left, law.tile_bytes // dtype.itemsize)
        values = old_master.next(count, dtype)
        yield Tile(values, export_of(values, before.export_dtype), None)
        left -= count


class _Checked:
    """A tensor of the parent, read in order and hashed on the way."""

    def __init__(self, read: ReadAt, digest: str, what: str) -> None:
        self._read = read
        self._want = digest
        self._what = what
        self._digest = hashlib.sha256()
        self._position = 0

    def next(self, count: int, dtype: np.dtype[np.generic] = STORED_AS["F32"]) -> Array:
        """The next `count` elements, flat and read-only, in the byte order of the machine."""
        length = count * dtype.itemsize
        raw = self._read(self._position, length)
        if len(raw) != length:
            raise IntegrityError(f"{self._what} ends early: {len(raw)} of {length} bytes at {self._position}")
        self._digest.update(raw)
        self._position += length
        values: Array = np.frombuffer(raw, dtype=dtype)
        return values.astype(dtype.newbyteorder("="), copy=False)

    def finish(self) -> None:
        if self._digest.hexdigest() != self._want:
            raise IntegrityError(f"{self._what} does not have the hash that its manifest gives")


class TileHashes:
    """The entry of a tensor in a manifest, from its tiles."""

    def __init__(self) -> None:
        self._master = hashlib.sha256()
        self._export = hashlib.sha256()
        self._momentum = hashlib.sha256()
        self._has_momentum = False

    def update(self, tile: Tile) -> None:
        """Tiles come in order, each once."""
        self._master.update(raw_bytes(tile.master))
        if tile.export is tile.master:
            self._export = self._master
        else:
            self._export.update(raw_bytes(tile.export))
        if tile.momentum is not None:
            self._has_momentum = True
            self._momentum.update(raw_bytes(tile.momentum))

    def entry(self, shape: tuple[int, ...], export_dtype: Dtype, role: Role | None) -> TensorEntry:
        """The entry of a tensor that had these tiles."""
        return TensorEntry(
            shape=shape,
            export_dtype=export_dtype,
            master=self._master.hexdigest(),
            export=self._export.hexdigest(),
            role=role,
            momentum=self._momentum.hexdigest() if self._has_momentum else None,
        )
