"""A PEFT adapter as a delta: the very file that it was converted from, or its factors in fixed point for a new one.

    restore(folder, out)             the delta that `aggregator.peftfolder` wrote the folder from, bit for bit
    requantise(folder, like, out)    any plain LoRA adapter, with the header, the weights and the width of another delta

What always holds:
- `restore` gives the file whose digest the folder's record names, or raises; with weights left out there is no such
  digest, and the result says so;
- `requantise` takes no weight that `like` does not have, or in another shape; peft's scaling goes into B;
- a tensor that is no pair of plain LoRA is refused, never passed over (`aggregator.adapters`).

Factors of the whole delta are in memory, as in the worker that writes one. No torch, no peft.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from pydantic import ValidationError

from aggregator.adapters import Adapter, Operand, Pair
from aggregator.layouts import CONV1D_LEAVES
from aggregator.peftfolder import MAX_RECORD_BYTES, RECORD, AdapterRecord, Converted
from aggregator.peftplaces import Place
from rankup.delta import DeltaHeader, DeltaReader, write_delta
from rankup.deltaheader import Layout
from rankup.errors import InputError, IntegrityError, NotFoundError, TooLargeError
from rankup.fixedpoint import MANTISSA_MAX, MANTISSA_MAX_INT8, Factors, Float64Array, Int16Array, quantise
from rankup.folder import disk_errors
from rankup.records import BlobRef

_LIKE_REMEDY: Final = "To write its factors in fixed point anew, as another contribution, name a delta with --like."


@dataclass(frozen=True)
class Restored:
    """A delta that was written. `identical`: it is the contribution that the adapter was converted from."""

    header: DeltaHeader
    ref: BlobRef
    identical: bool
    missing: tuple[str, ...]
    """Weights of the original, or of `like`, that are not in it."""


def read_record(folder: Path) -> AdapterRecord:
    """The record of a converted folder.

    Raises NotFoundError (there is none), TooLargeError, IntegrityError (it is not readable).
    """
    path = folder / RECORD
    try:
        with path.open("rb") as file:
            data = file.read(MAX_RECORD_BYTES + 1)
    except OSError as exc:
        raise NotFoundError(
            f"{folder} has no {RECORD}, so it does not say which delta it is", remedy=_LIKE_REMEDY
        ) from exc
    if len(data) > MAX_RECORD_BYTES:
        raise TooLargeError(f"{path} is larger than {MAX_RECORD_BYTES} bytes")
    try:
        return AdapterRecord.model_validate_json(data)
    except ValidationError as exc:
        raise IntegrityError(f"{path} is not a record of a converted delta", remedy="Convert the delta again.") from exc


def restore(folder: Path, out: Path) -> Restored:
    """Write the delta that the folder was converted from to `out`.

    Raises what `read_record` raises, InputError (no plain LoRA adapter), IntegrityError (the adapter's numbers are not
    those that were converted: rounded to bfloat16, or trained further) and what `write_delta` raises.
    """
    record = read_record(folder)
    with Adapter(folder) as adapter:
        pairs = _pairs(adapter)
        modules = {
            Place(name.removesuffix(".weight"), entry.kind).module: name for name, entry in record.weights.items()
        }
        if odd := sorted(modules.keys() ^ pairs.keys()):
            raise IntegrityError(
                f"{odd[0]} is in the adapter {folder} or in its {RECORD}, not in both", remedy=_LIKE_REMEDY
            )
        factors = {
            name: _exactly(name, *_stored(adapter, pairs[module], record.weights[name].kind != "linear"), record)
            for module, name in modules.items()
        }
    unchecked = out.with_name(f".{out.name}.unchecked")
    try:
        ref = write_delta(unchecked, record.header, factors)
        identical = ref == record.contribution
        if not identical and not record.left_out:
            raise _changed(f"the delta comes out as {ref.sha256[:16]}…, not as {record.contribution.sha256[:16]}…")
        with disk_errors(out):
            unchecked.replace(out)
    finally:
        unchecked.unlink(missing_ok=True)
    return Restored(record.header, ref, identical, tuple(record.left_out))


def requantise(folder: Path, like: Path, out: Path) -> Restored:
    """Write the adapter's factors in fixed point to `out`, as a delta for the lease that the delta `like` is for.

    Raises InputError (no plain LoRA adapter, a weight that `like` does not have, a shape that does not fit, an unclear
    orientation), DeltaError (a value too large) and what `DeltaReader.open` and `write_delta` raise.
    """
    with DeltaReader.open(like) as reader, Adapter(folder) as adapter:
        factors: dict[str, Factors] = {}
        for module, pair in _pairs(adapter).items():
            name = f"{module}.weight"
            if name not in reader.layouts:
                raise InputError(f"the adapter {folder} changes {name}, which {like} does not")
            layout = reader.layouts[name]
            b, a = _stored(adapter, pair, _is_transposed(adapter, pair, name, layout))
            factors[name] = quantise(b, a, bits=layout.bits)
        missing = tuple(name for name in reader.names if name not in factors)
        header = reader.header
    return Restored(header, write_delta(out, header, factors), False, missing)


def _pairs(adapter: Adapter) -> Mapping[str, Pair]:
    """Module -> its pair. Raises InputError where the adapter changes anything else."""
    if adapter.copies:
        raise InputError(
            f"the adapter {adapter.name} replaces {next(iter(adapter.copies))} as a whole; that is no low-rank change",
            remedy="Train without modules_to_save and bias.",
        )
    found: dict[str, Pair] = {}
    for pair in adapter.pairs:
        if pair.kind == "bias" or pair.depth or pair.module in found:
            raise InputError(
                f"the adapter {adapter.name} changes a bias or a stacked parameter of {pair.module}",
                remedy="Only linear, Conv1D and embedding layers are converted.",
            )
        found[pair.module] = pair
    return found


def _stored(adapter: Adapter, pair: Pair, transposed: bool) -> tuple[Float64Array, Float64Array]:
    """B (d_out, r) with the scaling inside and A (r, d_in), in the orientation of the stored weight."""
    scale = adapter.scaling(pair.module, adapter.shape(pair.a)[0])
    a, b = Operand(pair.a, scale=scale if transposed else 1.0), Operand(pair.b, scale=1.0 if transposed else scale)
    values = adapter.matrix(a), adapter.matrix(b)
    return (values[0].T, values[1].T) if transposed else (values[1], values[0])


def _exactly(name: str, b: Float64Array, a: Float64Array, record: AdapterRecord) -> Factors:
    """The mantissas that these values are with the record's exponents. Raises IntegrityError where they are not."""
    entry: Converted = record.weights[name]
    b_exp, a_exp = (np.array(exponents, dtype=np.int16) for exponents in (entry.b_exponents, entry.a_exponents))
    if b.shape[1:] != b_exp.shape or a.shape[:1] != a_exp.shape:
        raise _changed(f"{name} has another rank than its {RECORD} says")
    columns, b_max = _mantissas(name, b.T, b_exp, entry)
    rows, a_max = _mantissas(name, a, a_exp, entry)
    return Factors(b=np.ascontiguousarray(columns.T), b_exp=b_exp, a=rows, a_exp=a_exp, b_max=b_max, a_max=a_max)


def _mantissas(
    name: str, values: Float64Array, exponents: Int16Array, entry: Converted
) -> tuple[Int16Array, Int16Array]:
    """values: (r, d) -> mantissas (r, d) and the largest of each row; exact, or IntegrityError."""
    scaled = np.ldexp(values, -exponents.astype(np.int32)[:, None])
    limit, dtype = (MANTISSA_MAX, np.int16) if entry.bits == 16 else (MANTISSA_MAX_INT8, np.int8)
    if not (np.abs(scaled) <= limit).all() or not np.array_equal(np.rint(scaled), scaled):
        raise _changed(f"{name} holds values that are no mantissas of {entry.bits} bits with the recorded exponents")
    return np.ascontiguousarray(scaled.astype(dtype)), np.abs(scaled).max(axis=1).astype(np.int16)


def _changed(cause: str) -> IntegrityError:
    return IntegrityError(
        f"the adapter is not the delta that its {RECORD} names: {cause}",
        remedy="It was rounded to bfloat16 or trained further. " + _LIKE_REMEDY,
    )


def _is_transposed(adapter: Adapter, pair: Pair, name: str, layout: Layout) -> bool:
    """Whether the stored weight is (in, out). A square one is decided by what it is called and by the config."""
    shape = (layout.d_out, layout.d_in)
    (_, inner), (outer, _) = adapter.shape(pair.a), adapter.shape(pair.b)
    plain, transposed = (outer, inner) == shape, (inner, outer) == shape
    if layout.slices > 1 or not (plain or transposed) or (pair.kind == "embedding" and not transposed):
        raise InputError(f"the adapter's {outer} x {inner} of {name} is not the delta's {shape[0]} x {shape[1]}")
    if pair.kind == "embedding" or not plain:
        return True
    return transposed and name.split(".")[-2] in CONV1D_LEAVES and bool(adapter.config.get("fan_in_fan_out"))
