"""Small export files for tests of patches."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rankup.patch import apply_patches
from rankup.records import BlobRef
from rankup.tensorfile import write_tensor_file

Tensor = tuple[str, tuple[int, ...], bytes]


def ref_of(path: Path) -> BlobRef:
    data = path.read_bytes()
    return BlobRef(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))


def save(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    write_tensor_file(path, tensors, {"format": "pt"})
    return path


def apply(base: Path, patches: list[Path], out: Path, expected: Path | None = None, **options: Any) -> None:
    """Apply to the very base and expect the very file, whatever the patches say."""
    ref = ref_of(expected) if expected else ref_of(base)
    apply_patches(base, patches, out, base_sha256=ref_of(base).sha256, expected=ref, **options)


def weights(rows: int, columns: int, seed: int) -> npt.NDArray[np.uint16]:
    """bfloat16 bit patterns of weights as a model has them."""
    rng = np.random.default_rng(seed)
    return (rng.normal(0, 0.05, (rows, columns)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def nudged(bits: npt.NDArray[np.uint16], seed: int) -> npt.NDArray[np.uint16]:
    """Some of them, a few steps further."""
    rng = np.random.default_rng(seed)
    return bits + np.rint(rng.laplace(0, 0.6, bits.shape)).astype(np.int16).view(np.uint16)
