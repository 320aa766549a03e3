"""The weights of a base model as a version will hold them: the tensors of its safetensors files, by the names that its
model gives them, with their roles.

What always holds:
- tensors are read one by one; never is the whole model in memory;
- the master is the base's value as float32, exactly for bfloat16, float16 and float32; the export is that rounded once;
- a tensor gets the role that it has in the model (`aggregator.skeleton`), so any recipe can be chosen later; a tensor
  that is stored otherwise than the model holds it has no role and stays as it is. Experts that are stored one by one
  are such tensors, unless they are to be stacked: then a layer's become one, as transformers has them in memory;
- causal masks and rotary frequencies, which old files hold and nothing reads any more, are left out.

It writes nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, get_args

import numpy as np

from aggregator.basemodel import INDEX, WEIGHTS
from aggregator.bases import require_safetensors
from aggregator.groups import ADD_TILE_BYTES, Layout
from aggregator.skeleton import Skeleton
from rankup.bfloat16 import from_bfloat16
from rankup.dtypes import STORED_AS, Array, Dtype, export_of, is_floating, raw_bytes
from rankup.errors import InputError
from rankup.foldrows import Tile
from rankup.targets import Role
from rankup.tensorfile import TensorExtent, TensorFile

MAX_BFLOAT16: Final = float.fromhex("0x1.fep127")
_OLD_BUFFERS: Final = re.compile(r"\.(attn|attention)\.(masked_)?bias$|\.rotary_emb\.inv_freq$")
"""Of GPT-2, GPT-NeoX and their time, and of the first Llama: transformers makes them itself."""


@dataclass(frozen=True)
class Weight:
    """A tensor of version 0: where its rows lie in the base, in order, and what it will be."""

    parts: tuple[tuple[TensorFile, str], ...]
    """Files and names there: one, or one for each matrix of a stack."""
    layout: Layout

    @property
    def master_bytes(self) -> int:
        return int(np.prod(self.layout.shape, dtype=np.int64)) * STORED_AS[self.layout.master_dtype].itemsize

    def tiles(self) -> Iterator[Tile]:
        """The float32 master, or the tensor as it is where it is not floating point, piece by piece."""
        for file, name in self.parts:
            master = _master(file, name).reshape(-1)
            step = ADD_TILE_BYTES // master.dtype.itemsize
            for piece in (master[start : start + step] for start in range(0, master.size, step)):
                yield Tile(piece, export_of(piece, self.layout.export_dtype), None)

    def digest(self) -> str:
        """sha256 of the master's bytes."""
        digest = hashlib.sha256()
        for file, name in self.parts:
            digest.update(raw_bytes(_master(file, name)))
        return digest.hexdigest()


def _master(file: TensorFile, name: str) -> Array:
    extent = file.entries[name]
    raw: Array = np.frombuffer(file.read(name), dtype=STORED_AS[extent.dtype])
    raw = raw.reshape(extent.shape)
    if not is_floating(extent.dtype):
        return raw
    with np.errstate(over="ignore"):
        master = from_bfloat16(raw) if extent.dtype == "BF16" else raw.astype(np.float32)
    # The comparison is false for NaN too.
    if master.size and not max(float(master.max()), -float(master.min())) <= MAX_BFLOAT16:
        raise InputError(f"tensor {name} of the base holds NaN, infinity or a value above bfloat16")
    return master


@contextmanager
def open_weights(folder: Path, *, stack_experts: bool) -> Iterator[dict[str, Weight]]:
    """Every tensor of the base by the name that its model gives it, in sorted order; files are open for the block.

    Raises InputError: the weights are not those that the config asks for, a version cannot hold one, or there are no
    experts to stack. IntegrityError, NotFoundError: a file is damaged or missing.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(TensorFile.open(folder / name)) for name in _weight_files(folder)]
        skeleton = Skeleton.of(folder)
        stored = {name: file for file in files for name in file if not _is_old_buffer(skeleton, name)}
        names = {skeleton.model_name(name): name for name in stored}
        if len(names) < len(stored):
            raise InputError(f"{folder} holds the same weight under two names")
        head, embedding = names.get(skeleton.tied_head or ""), names.get(skeleton.embedding or "")
        if head is not None and embedding is not None:
            if stored[head].read(head) != stored[embedding].read(embedding):
                raise InputError(f"the config ties {head} to {embedding}, but {folder} holds different values for them")
            del names[skeleton.tied_head or ""]
        _require_fit(folder, skeleton, {name: stored[at].entries[at] for name, at in names.items()})
        roles = {name: parameter.role for name, parameter in skeleton.parameters.items()}
        weights = {
            name: Weight(((stored[at], at),), _layout(stored[at], at, role=roles.get(name)))
            for name, at in names.items()
        }
        stacks = _stacks(folder, skeleton, stored)
        if stack_experts:
            if not stacks:
                raise InputError(f"{folder} holds no experts one by one, so there is nothing to stack")
            alone = {skeleton.model_name(at) for weight in stacks.values() for _, at in weight.parts}
            weights = {name: weight for name, weight in weights.items() if name not in alone} | stacks
        yield dict(sorted(weights.items()))


def _require_fit(folder: Path, skeleton: Skeleton, extents: Mapping[str, TensorExtent]) -> None:
    for name, parameter in skeleton.parameters.items():
        extent = extents.get(name)
        # A linear layer that is not there would start from random numbers. The rest has old names in some files, and
        # transformers knows them.
        missing = extent is None and parameter.role == "linear"
        if missing or (extent and (extent.shape != parameter.shape or not is_floating(extent.dtype))):
            raise InputError(
                f"{folder} has no weight {name} of shape {list(parameter.shape)}, which its config asks for",
                remedy="Load the model with transformers, save it with save_pretrained and give that folder.",
            )


def _is_old_buffer(skeleton: Skeleton, name: str) -> bool:
    return _OLD_BUFFERS.search(name) is not None and skeleton.model_name(name) not in skeleton.names


def _stacks(folder: Path, skeleton: Skeleton, stored: Mapping[str, TensorFile]) -> dict[str, Weight]:
    """A layer's experts that are stored one by one -> what they become."""
    stacks = {}
    for name, parts in skeleton.stacks(stored).items():
        experts, rows, columns = shape = skeleton.parameters[name].shape
        one = (rows * experts // len(parts), columns)
        extents = [stored[part].entries[part] for part in parts]
        if len(parts) % experts or any(e.shape != one or not is_floating(e.dtype) for e in extents):
            raise InputError(
                f"{folder} has {len(parts)} matrices of experts for {name}, which do not make its {list(shape)}",
                remedy="Download the base again: a file is missing, or belongs to another model.",
            )
        stacks[name] = Weight(tuple((stored[part], part) for part in parts), Layout(shape, "BF16", "experts"))
    return stacks


def _weight_files(folder: Path) -> list[str]:
    require_safetensors(folder)
    if not (folder / INDEX).is_file():
        return [WEIGHTS]
    try:
        names = set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
        if any(Path(name).name != name for name in names):
            raise InputError(f"{INDEX} names files outside its folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise InputError(f"{folder / INDEX} is not readable: {exc}") from exc
    return sorted(names)


def _layout(file: TensorFile, name: str, *, role: Role | None) -> Layout:
    extent = file.entries[name]
    dtype: Dtype = "BF16" if is_floating(extent.dtype) else _dtype(extent.dtype)
    return Layout(extent.shape, dtype, role)


def _dtype(name: str) -> Dtype:
    for known in get_args(Dtype):
        if known == name:
            return known  # type: ignore[no-any-return]
    raise InputError(f"the base has a tensor of the dtype {name}, which versions do not hold")
