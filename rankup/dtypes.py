"""The dtypes of tensor files as numpy knows them, and the one rounding from a float32 master to its export.

What always holds: every floating tensor has a float32 master and an export of its own dtype, rounded from the master to
nearest even, once; any other tensor is its own master and its own export. Bfloat16 has no numpy dtype: it is held as
its uint16 bit pattern. Nothing here does I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from rankup.bfloat16 import to_bfloat16

Array = npt.NDArray[Any]
Dtype = Literal["BF16", "F16", "F32", "F64", "I8", "I16", "I32", "I64", "U8", "BOOL"]
"""What a tensor of an export may be."""

STORED_AS: Final[Mapping[str, np.dtype[Any]]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


def _to_float16(master: Array) -> Array:
    with np.errstate(over="ignore", under="ignore"):
        return master.astype("<f2")


_ROUND_TO: Final[Mapping[str, Callable[[Array], Array]]] = {
    "BF16": to_bfloat16,
    "F16": _to_float16,
    "F32": lambda master: master,
    "F64": lambda master: master.astype("<f8"),
}


def is_floating(dtype: str) -> bool:
    """Whether an export of `dtype` has a float32 master."""
    return dtype in _ROUND_TO


def master_dtype(export_dtype: str) -> str:
    """The dtype of the master behind an export."""
    return "F32" if is_floating(export_dtype) else export_dtype


def export_of(master: Array, export_dtype: str) -> Array:
    """The export that follows from a master, of any shape; where the dtypes are equal it is the master itself."""
    return _ROUND_TO[export_dtype](master) if is_floating(export_dtype) else master


def raw_bytes(array: Array) -> memoryview:
    """The array's little-endian bytes in row-major order, without a copy where it already lies so."""
    flat = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(-1)
    return flat.view(np.uint8).data
