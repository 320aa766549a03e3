"""`rankup.patch` from files to files for benchmarks/pull.py, and the entropy that it is measured by.

Time is that of the files of one version, one after the other, from the page cache, without imports. Digests are taken
as in a pull: what is written is hashed, and its hash compared.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
from aggregate_run import serve

from rankup.records import BlobRef
from rankup.tensorfile import TensorFile

EXPONENT_SHIFT: Final = 7
PIECE_BYTES: Final = 2**21


def patch_encode(child: list[str], base: list[str], out: list[str]) -> dict[str, Any]:
    """The product's patch of each file."""
    from rankup.patch import write_patch

    return _timed(lambda new, old, to: write_patch(Path(old), Path(new), Path(to)), child, base, out)


def patch_decode(packed: list[str], base: list[str], out: list[str], expected: list[str]) -> dict[str, Any]:
    """The files again, with the digests of those in `expected`; a manifest has them."""
    from rankup.patch import apply_patches

    def apply(patch: str, old: str, to: str, wanted: BlobRef, base_sha256: str) -> None:
        apply_patches(Path(old), [Path(patch)], Path(to), base_sha256=base_sha256, expected=wanted)

    wanted = [BlobRef(sha256=_sha256(path), size_bytes=Path(path).stat().st_size) for path in expected]
    answer = _timed(apply, packed, base, out, wanted, [_sha256(path) for path in base])
    copied = _timed(_copy_hashed, out, [f"{path}.copy" for path in out])
    return answer | {"copy_cpu_s": copied["cpu_s"]}


def _copy_hashed(source: str, to: str) -> None:
    """What any way to write a checked file costs: it is hashed on the way, and put on disk."""
    digest = hashlib.sha256()
    with Path(source).open("rb") as file, Path(to).open("wb") as target:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
            target.write(piece)
        target.flush()
        os.fsync(target.fileno())


def entropy(child: list[str], base: list[str]) -> dict[str, Any]:
    """Order-0 entropy, in bits a weight, of the difference of two bit patterns in the order of their numbers, as it is
    and where the old exponent is known, over all given files; tables cost nothing here."""
    plain = np.zeros(2**16, np.int64)
    given = np.zeros((256, 2**16), np.int64)
    for new, old in zip(child, base, strict=True):
        with TensorFile.open(Path(new)) as after, TensorFile.open(Path(old)) as before:
            for name in after:
                bits = _bits(before.read(name))
                step = (_ordered(_bits(after.read(name))) - _ordered(bits)).astype(np.int16).view(np.uint16)
                exponent = (bits >> EXPONENT_SHIFT) & 0xFF
                for value in np.unique(exponent):
                    given[value] += np.bincount(step[exponent == value], minlength=2**16)
    plain = given.sum(axis=0)
    total = plain.sum()
    return {
        "weights": int(total),
        "plain_bits": _bits_of(plain) / total,
        "given_exponent_bits": sum(_bits_of(row) for row in given if row.any()) / total,
    }


def _ordered(bits: Any) -> Any:
    """(n,) uint16 bit patterns -> (n,) int32 in the order of the numbers they stand for."""
    value = bits.astype(np.int32)
    return np.where(value & 0x8000, -(value & 0x7FFF), value)


def _bits_of(counts: Any) -> float:
    """Sum over all that were counted of -log2 of their share."""
    seen = counts[counts > 0].astype(np.float64)
    return float((seen * np.log2(seen.sum() / seen)).sum())


def _bits(data: bytes) -> Any:
    return np.frombuffer(data, np.uint16)


def _sha256(path: str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _timed(code: Callable[..., object], *files: Sequence[Any]) -> dict[str, Any]:
    started, cpu = time.perf_counter(), time.process_time()
    for one in zip(*files, strict=True):
        code(*one)
    return {
        "wall_s": time.perf_counter() - started,
        "cpu_s": time.process_time() - cpu,
        "versions": {name: version(name) for name in ("numpy", "pcodec")},
    }


WAYS: Final[dict[str, Any]] = {way.__name__: way for way in (patch_encode, patch_decode, entropy)}

if __name__ == "__main__":
    serve(lambda way, **arguments: WAYS[way](**arguments))
