"""The base model of a merge: a Hugging Face folder of safetensors files, opened for reading by ranges.

Files name tensors as the checkpoint was saved, an adapter names parameters as they are called in memory, and these
differ: a missing prefix (GPT-2 stores "h.0.…" for "transformer.h.0.…"), an output layer that is the embedding, experts
that are one parameter in memory and many tensors in the file. `BaseModel.parameter` bridges that. A stored tensor
counts as a matrix: a vector as one column, experts (E, m, k) as E matrices below each other.

What always holds: only headers are read up front, never a whole tensor; a name that could mean two tensors is refused.
It does not know adapters and writes nothing.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np

from rankup.bfloat16 import from_bfloat16
from rankup.durable import read_range
from rankup.errors import InputError, IntegrityError, NotFoundError
from rankup.exactsum import Float32Array
from rankup.tensorfile import DTYPE_BYTES, TensorExtent, TensorFile

INDEX: Final = "model.safetensors.index.json"
WEIGHTS: Final = "model.safetensors"
MAX_JSON_BYTES: Final = 64 * 1024 * 1024
HEADS: Final = ("lm_head.weight", "embed_out.weight", "output_projection.weight")
EMBEDDINGS: Final = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_EXPERT_PARTS: Final[Mapping[str, tuple[tuple[str, ...], ...]]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""One parameter in memory -> its tensors in the file, for each expert, joined along the rows."""
_TAIL_PARTS: Final = 3
_COMPARED_BYTES: Final = 8 * 1024 * 1024


@dataclass(frozen=True)
class WeightFile:
    """One safetensors file of the base: its header is the first `header_bytes` bytes."""

    name: str
    size_bytes: int
    modified_ns: int
    header_bytes: int
    tensors: Mapping[str, TensorExtent]
    descriptor: int


@dataclass(frozen=True)
class Piece:
    """Rows `first` to `last` of expert `expert` of a parameter lie in `tensor` from row `at` on."""

    tensor: str
    expert: int
    first: int
    last: int
    at: int


@dataclass(frozen=True)
class Parameter:
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """A stored tensor as a matrix: (rows, columns)."""
    if len(shape) < 2:
        return math.prod(shape), 1
    return math.prod(shape[:-1]), shape[-1]


class BaseModel:
    """The folder of a base model, opened for reading by ranges. Close it with `close` or a `with` block.

    Raises NotFoundError (no such folder), InputError (no safetensors model, or a quantised one), IntegrityError (a file
    breaks its format).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.resolve().name
        if not folder.is_dir():
            raise NotFoundError(
                f"there is no folder {folder}",
                remedy=f"Give the model's folder; one on the hub: hf download {folder} --local-dir my-model",
            )
        self.config = _read_json(folder, "config.json")
        text = self.config.get("text_config")
        self._configs = (self.config, text) if isinstance(text, dict) else (self.config,)
        if any(config.get("quantization_config") for config in self._configs):
            raise InputError(
                f"{folder} is a quantised model: its stored numbers are no weights to add to",
                remedy="Merge into the original, or load it dequantised in bfloat16, save that, and merge into it.",
            )
        self.files: list[WeightFile] = []
        self._homes: dict[str, WeightFile] = {}
        try:
            for name in _weight_names(folder):
                self._open(name)
            self._by_tail: dict[str, list[str]] = {}
            for tensor in self._homes:
                self._by_tail.setdefault(_tail(tensor), []).append(tensor)
            self._twins = self._find_twins()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        while self.files:
            os.close(self.files.pop().descriptor)

    def __enter__(self) -> BaseModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, name: str) -> None:
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY)
        except OSError as exc:
            raise InputError(
                f"cannot read {self.folder / name}: {exc.strerror}", remedy="Download the base model again."
            ) from exc
        try:
            status = os.fstat(descriptor)
            tensors = TensorFile(lambda at, count: read_range(descriptor, at, count), status.st_size).entries
        except BaseException as exc:
            os.close(descriptor)
            if isinstance(exc, IntegrityError):
                raise IntegrityError(f"{self.folder / name}: {exc.cause}", remedy=exc.remedy) from exc
            raise
        header_bytes = min((extent.start for extent in tensors.values()), default=status.st_size)
        file = WeightFile(name, status.st_size, status.st_mtime_ns, header_bytes, tensors, descriptor)
        self.files.append(file)
        for tensor in tensors:
            if tensor in self._homes:
                raise IntegrityError(f"{tensor!r} is stored twice: in {self._homes[tensor].name} and in {name}")
            self._homes[tensor] = file

    @property
    def tensor_count(self) -> int:
        return len(self._homes)

    def extent(self, tensor: str) -> TensorExtent:
        return self._homes[tensor].tensors[tensor]

    def has_type(self, names: Sequence[str]) -> bool:
        return any(config.get("model_type") in names for config in self._configs)

    @property
    def says_tied(self) -> bool:
        return any(config.get("tie_word_embeddings") is True for config in self._configs)

    def read(self, tensor: str, start: int, stop: int) -> bytes:
        """The stored bytes of rows `start` to `stop` of a tensor as a matrix."""
        extent = self.extent(tensor)
        line = matrix_shape(extent.shape)[1] * DTYPE_BYTES[extent.dtype]
        data = read_range(self._homes[tensor].descriptor, extent.start + start * line, (stop - start) * line)
        if len(data) != (stop - start) * line:
            raise IntegrityError(f"the base model ends inside its tensor {tensor!r}: it was changed while it was read")
        return data

    # -- names ---------------------------------------------------------------------------------------------------------

    def find(self, name: str) -> str | None:
        """The stored tensor that a parameter's name means: the same name, or the only one that differs by a prefix.

        Raises InputError where several do.
        """
        for wanted in (name, name.replace(".mlp.", ".block_sparse_moe.")):
            if wanted in self._homes:
                return wanted
            shorter = itertools.accumulate(wanted.split(".")[::-1], lambda tail, part: f"{part}.{tail}")
            found = {tail for tail in shorter if tail in self._homes and "." in tail}
            longer = self._by_tail.get(_tail(wanted), ()) if wanted.count(".") >= _TAIL_PARTS else self._homes
            found |= {stored for stored in longer if stored.endswith(f".{wanted}")}
            if len(found) > 1:
                raise InputError(
                    f"{name!r} could be any of {', '.join(sorted(found)[:4])} in the base model",
                    remedy="Give the base model that the adapter was trained on.",
                )
            if found:
                return found.pop()
        return None

    def tied_embedding(self, name: str) -> str | None:
        """The stored embedding that the output layer `name` shares, where the base stores no output layer."""
        if not name.endswith(HEADS):
            return None
        found = [stored for stored in self._homes if stored.endswith(EMBEDDINGS)]
        return found[0] if len(found) == 1 else None

    def parameter(self, name: str) -> Parameter | None:
        """Shape and place of a parameter; None where the base does not have it. Raises what `find` raises."""
        stored = self.find(name) or self.tied_embedding(name)
        if stored is None:
            return self._scattered(name)
        shape = self.extent(stored).shape
        count, rows = (shape[0], shape[1]) if len(shape) == 3 else (1, matrix_shape(shape)[0])
        pieces = [
            Piece(tensor, expert, 0, rows, expert * rows)
            for tensor in self._twins.get(stored, (stored,))
            for expert in range(count)
        ]
        return Parameter(shape, tuple(pieces))

    def is_shared(self, tensor: str) -> bool:
        """Whether a stored tensor is embedding and output layer at once."""
        alone = self.says_tied and tensor.endswith(EMBEDDINGS) and not any(t.endswith(HEADS) for t in self._homes)
        return alone or tensor in self._twins

    def _scattered(self, name: str) -> Parameter | None:
        """A parameter of all experts whose tensors are stored expert by expert: (E, rows of the parts, columns)."""
        module, _, leaf = name.rpartition(".")
        for parts in _EXPERT_PARTS.get(leaf, ()):
            pieces: list[Piece] = []
            shapes: set[tuple[tuple[int, ...], ...]] = set()
            for expert in itertools.count():
                stored = [self.find(f"{module}.{expert}.{part}.weight") for part in parts]
                tensors = [tensor for tensor in stored if tensor is not None]
                if len(tensors) < len(parts):
                    break
                shapes.add(tuple(self.extent(tensor).shape for tensor in tensors))
                first = 0
                for tensor in tensors:
                    rows = self.extent(tensor).shape[0]
                    pieces.append(Piece(tensor, expert, first, first + rows, 0))
                    first += rows
            if not pieces:
                continue
            if len(shapes) != 1 or any(len(shape) != 2 for shape in next(iter(shapes))):
                raise InputError(f"the experts of {module!r} are not of one shape in the base model")
            one = next(iter(shapes))
            count = len(pieces) // len(parts)
            return Parameter((count, sum(shape[0] for shape in one), one[0][1]), tuple(pieces))
        return None

    def _find_twins(self) -> Mapping[str, tuple[str, ...]]:
        """Embedding and output layer that are one in memory and stored twice with the same bytes."""
        heads = [name for name in self._homes if name.endswith(HEADS)]
        embeddings = [name for name in self._homes if name.endswith(EMBEDDINGS)]
        if not self.says_tied or len(heads) != 1 or len(embeddings) != 1:
            return {}
        pair = (embeddings[0], heads[0])
        one, other = (self.extent(name) for name in pair)
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return {}
        if any(self.read(pair[0], *rows) != self.read(pair[1], *rows) for rows in row_tiles(one.shape)):
            return {}
        return dict.fromkeys(pair, pair)


def _tail(name: str) -> str:
    """The last parts of a name: what a search for an ending looks up first."""
    return ".".join(name.rsplit(".", _TAIL_PARTS)[-_TAIL_PARTS:])


def row_tiles(shape: Sequence[int], tile_bytes: int = _COMPARED_BYTES) -> Iterator[tuple[int, int]]:
    """(start, stop) of stretches of rows that are about `tile_bytes` long as float32."""
    rows, columns = matrix_shape(shape)
    step = max(1, tile_bytes // (4 * max(1, columns)))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def decode(data: bytes, dtype: str, columns: int) -> Float32Array:
    """Stored bytes -> float32 (rows, columns), exactly."""
    if dtype == "BF16":
        return from_bfloat16(np.frombuffer(data, "<u2")).reshape(-1, columns)
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32, copy=False).reshape(-1, columns)


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path} is larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_bytes())
    except OSError as exc:
        raise InputError(f"{folder} has no readable {name}", remedy="Give the model's folder.") from exc
    except (ValueError, RecursionError) as exc:
        raise InputError(f"{path} is not JSON: {exc}", remedy="Download the base model again.") from exc
    if not isinstance(value, dict):
        raise InputError(f"{path} is not an object", remedy="Download the base model again.")
    return value


def _weight_names(folder: Path) -> list[str]:
    """The weights' files in the order of their names: those of the index, or the only one."""
    if not (folder / INDEX).is_file():
        if (folder / WEIGHTS).is_file():
            return [WEIGHTS]
        raise InputError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}",
            remedy="Pickled weights are not opened: save the model as safetensors, or download it in that form.",
        )
    table = _read_json(folder, INDEX).get("weight_map")
    names = set(table.values()) if isinstance(table, dict) and all(isinstance(v, str) for v in table.values()) else ()
    if not names or not all(re.fullmatch(r"[\w-][\w.-]*\.safetensors", name) for name in names):
        raise InputError(f"{folder / INDEX} names no files of weights", remedy="Download the base model again.")
    return sorted(names)
