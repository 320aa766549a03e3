"""Writing a GGUF file of a model's folder with the package gguf, tensor by tensor.

What always holds:
- weights keep their bits: rows may be reordered (`ggufmodel.interleave_heads`), nothing is computed but the asked-for
  change of type, rounded to nearest even;
- memory is a few pieces of `PIECE_BYTES` and the tokenizer, whatever the size of the model;
- the file appears under its name when it is complete and on disk. Whatever stops the writing leaves no part of it.

Its keys are those of `ggufkeys`.
"""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np

from rankup.bfloat16 import from_bfloat16, to_bfloat16
from rankup.download import OnProgress, PullProgress
from rankup.dtypes import STORED_AS, Array
from rankup.errors import InputError, SetupError
from rankup.export.ggufkeys import describe
from rankup.export.ggufmodel import ModelPlan, OutType, TensorPlan, interleave_heads, plan_model
from rankup.export.ggufsource import ModelFolder, Provenance
from rankup.export.ggufvocab import read_vocabulary
from rankup.export.newfile import new_file

if TYPE_CHECKING:
    from gguf import GGUFWriter

PIECE_BYTES: Final = 4 * 1024**2
"""How much of a tensor is read at once, about."""


@dataclass(frozen=True)
class GgufFile:
    """A finished file. `out` is the type of its weights in lower case: bf16, q4_k_m."""

    path: Path
    out: str
    architecture: str
    tensors: int
    parameters: int
    size_bytes: int
    provenance: Provenance | None
    warnings: tuple[str, ...]
    seconds: float


def write_gguf(
    model: ModelFolder,
    to: Path,
    *,
    out: OutType | None = None,
    force: bool = False,
    progress: OnProgress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> GgufFile:
    """Write the model as one GGUF file; `out` None keeps bfloat16 and float16 weights as they are.

    Raises:
        InputError: the model is of a kind that cannot be written exactly (`ggufmodel`, `ggufvocab`).
        IntegrityError: a tensor is not the one that the folder's manifest names.
        StateError: the file exists and `force` was not given.
        DiskFullError: no room.
        SetupError: the package gguf is missing, or the folder cannot be written to.
    """
    started = clock()
    require_gguf()
    plan = plan_model(model.config, model.tensors, out)
    vocabulary = read_vocabulary(model.folder, plan.vocab_size)
    total = sum(_nbytes(tensor) for tensor in plan.tensors)
    with _warnings() as warnings:
        writer = describe(model, plan, vocabulary)
        _add_tensors(writer, plan)
        with new_file(to, force=force, size_bytes=total) as fresh:
            _write(writer, model, plan, fresh, progress)
    return GgufFile(
        path=to,
        out=plan.out.lower(),
        architecture=plan.architecture,
        tensors=len(plan.tensors) + (plan.rope_factors is not None),
        parameters=plan.parameters,
        size_bytes=to.stat().st_size,
        provenance=model.provenance,
        warnings=tuple(warnings),
        seconds=clock() - started,
    )


def require_gguf() -> None:
    """Raise SetupError where the package gguf is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError as exc:
        raise SetupError(
            f"writing GGUF needs the Python package {exc.name!r}", remedy="Run: pip install 'rankup[gguf]'"
        ) from exc


def _add_tensors(writer: GGUFWriter, plan: ModelPlan) -> None:
    """Tell the writer names, shapes and types, in the order in which `_write` writes."""
    import gguf

    if plan.rope_factors is not None:
        writer.add_tensor_info(
            "rope_freqs.weight", plan.rope_factors.shape, plan.rope_factors.dtype, plan.rope_factors.nbytes
        )
    for tensor in plan.tensors:
        kind = gguf.GGMLQuantizationType[tensor.out]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float16), _nbytes(tensor), raw_dtype=kind)


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What the package gguf warns of within the block, instead of on stderr."""
    found: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    loggers = [logging.getLogger(name) for name in ("gguf", "metadata")]
    before = [logger.propagate for logger in loggers]
    collector = Collector(logging.WARNING)
    for logger in loggers:
        logger.addHandler(collector)
        logger.propagate = False
    try:
        yield found
    finally:
        for logger, propagated in zip(loggers, before, strict=True):
            logger.removeHandler(collector)
            logger.propagate = propagated


# -- tensors -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Streamed:
    """What GGUFWriter.write_tensor_data asks of an array: its size, and to write itself into a file."""

    nbytes: int
    pieces: Callable[[], Iterator[Array]]

    def tofile(self, file: IO[bytes]) -> None:
        for piece in self.pieces():
            piece.tofile(file)


def _write(writer: GGUFWriter, model: ModelFolder, plan: ModelPlan, fresh: Path, progress: OnProgress | None) -> None:
    total = sum(_nbytes(tensor) for tensor in plan.tensors)
    done = 0

    def pieces(tensor: TensorPlan) -> Iterator[Array]:
        nonlocal done
        for piece in converted(model, tensor):
            yield piece
            done += piece.nbytes
            if progress is not None:
                progress(PullProgress("writing", done, total))

    try:
        writer.write_header_to_file(fresh)
        try:
            writer.write_kv_data_to_file()
        except (AttributeError, TypeError, ValueError, struct.error) as exc:
            raise InputError(f"{model.folder} holds metadata that GGUF cannot: {exc}") from exc
        writer.write_ti_data_to_file()
        if plan.rope_factors is not None:
            writer.write_tensor_data(plan.rope_factors)
        for tensor in plan.tensors:
            streamed: Any = _Streamed(_nbytes(tensor), lambda tensor=tensor: pieces(tensor))  # type: ignore[misc]
            writer.write_tensor_data(streamed)
    finally:
        writer.close()


def converted(model: ModelFolder, tensor: TensorPlan) -> Iterator[Array]:
    """The tensor as the file holds it, in pieces of whole rows; bfloat16 as uint16 bit patterns."""
    dtype = model.tensors[tensor.source].dtype
    stored = STORED_AS[dtype]
    row_bytes = stored.itemsize * int(np.prod(tensor.shape[1:], dtype=np.int64))
    unit_bytes = row_bytes * (tensor.rope_head_rows or 1)
    for raw in model.read_pieces(tensor.source, unit_bytes * max(1, PIECE_BYTES // unit_bytes)):
        rows = np.frombuffer(raw, stored).reshape(-1, *tensor.shape[1:])
        if tensor.rope_head_rows is not None:
            rows = interleave_heads(rows, tensor.rope_head_rows)
        yield np.ascontiguousarray(_as(rows, dtype, tensor.out))


def _as(rows: Array, dtype: str, out: OutType) -> Array:
    if dtype == out:
        return rows
    wide = from_bfloat16(rows) if dtype == "BF16" else rows.astype("<f4")
    if out == "BF16":
        return to_bfloat16(wide)
    with np.errstate(over="ignore", under="ignore"):
        narrow = wide.astype(STORED_AS[out])
    if out == "F16" and not np.array_equal(np.isinf(narrow), np.isinf(wide)):
        raise InputError("a weight is too large for float16", remedy="Write bfloat16 instead: --type bf16")
    return narrow


def _nbytes(tensor: TensorPlan) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64)) * STORED_AS[tensor.out].itemsize
