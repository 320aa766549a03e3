"""bfloat16 as uint16 bit patterns (numpy has no such dtype), in integer arithmetic that no rounding mode can change.

The export of a version is its float32 master rounded here, to nearest even.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from rankup.errors import InputError

Uint16Array: TypeAlias = npt.NDArray[np.uint16]
Float32Array: TypeAlias = npt.NDArray[np.float32]

_TILE: Final = 2**18


def to_bfloat16(values: Float32Array) -> Uint16Array:
    """float32 of any shape -> bfloat16 bit patterns, round to nearest even, in integer arithmetic.

    Infinities stay, too large values become infinite, subnormals are kept, a NaN stays a NaN with its sign and upper
    payload and is made quiet. Raises InputError where `values` is not float32.
    """
    if values.dtype != np.float32:
        raise InputError(f"bfloat16 is made from float32, not from {values.dtype}")
    source = np.ascontiguousarray(values).reshape(-1).view(np.uint32)
    result = np.empty(source.shape, dtype=np.uint16)
    for start in range(0, source.size, _TILE):
        bits = source[start : start + _TILE]
        target = result[start : start + _TILE]
        rounded = bits >> np.uint32(16)
        rounded &= np.uint32(1)
        rounded += np.uint32(0x7FFF)
        rounded += bits
        rounded >>= np.uint32(16)
        target[:] = rounded
        magnitude = bits & np.uint32(0x7FFFFFFF)
        if int(magnitude.max()) > 0x7F800000:
            nan = magnitude > np.uint32(0x7F800000)
            target[nan] = ((bits[nan] >> np.uint32(16)) | np.uint32(0x40)).astype(np.uint16)
    return result.reshape(values.shape)


def from_bfloat16(bits: Uint16Array) -> Float32Array:
    """bfloat16 bit patterns of any shape -> float32, exactly. Raises InputError where `bits` is not uint16."""
    if bits.dtype != np.uint16:
        raise InputError(f"bfloat16 bit patterns are uint16, not {bits.dtype}")
    wide: npt.NDArray[np.uint32] = np.ascontiguousarray(bits).astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32).reshape(bits.shape)
