"""Whether a merged folder is what its inputs make: the merge is done again and compared bit by bit. Writes nothing."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from aggregator.merge import TILE_BYTES, Blend, Merge
from aggregator.mergedfolder import OnProgress, contents, opened, small_files
from aggregator.mergerecord import MergeRecord, read_record
from rankup.durable import read_range
from rankup.folder import sha256_of

COEFFICIENT_SLACK: Final = 2**10
"""How far, in units of 2^-30, a robust rule's weights may lie from the recorded ones on another machine."""


@dataclass
class MergeComparison:
    """What a merge done again says about a folder; `mismatches` are names of tensors and files."""

    record: MergeRecord
    mismatches: list[str] = field(default_factory=list)
    bytes_compared: int = 0
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.mismatches


def compare_folder(
    base_folder: Path,
    adapter_folders: Sequence[Path],
    out: Path,
    blend: Blend,
    *,
    tile_bytes: int = TILE_BYTES,
    progress: OnProgress | None = None,
) -> MergeComparison:
    """Do a merge again without writing, and compare it with the folder `out` bit for bit.

    Weights of a robust rule, or under a clip, are taken from the record if they lie within 2^-20 of what this machine
    finds. Raises StateError (no finished merge in `out`) and what `merge_folder` raises while reading.
    """
    began = time.monotonic()
    record = read_record(out)
    with opened(base_folder, adapter_folders) as (base, adapters):
        stated = tuple(adapter.coefficient for adapter in record.adapters)
        merge = Merge(base, adapters, blend, coefficients=stated if len(stated) == len(adapters) else None)
        comparison = MergeComparison(record)
        differ = comparison.mismatches
        for adapter, said in zip(merge.adapters, record.adapters, strict=False):
            if (adapter.sha256, adapter.config_sha256) != (said.sha256, said.config_sha256):
                differ.append(f"adapter {adapter.name}")
        if len(merge.adapters) != len(record.adapters):
            differ.append("number of adapters")
        if (record.rule, record.clip) != (blend.rule, blend.clip if blend.clip < math.inf else None):
            differ.append("rule")
        if not differ:
            slack = COEFFICIENT_SLACK if record.clip or record.rule not in ("sum", "mean") else 0
            found = merge.find_coefficients()
            if any(abs(a - b) > slack for a, b in zip(found, stated, strict=True)):
                differ.append("weights")
        if not differ:
            _compare_files(merge, out, comparison, tile_bytes, progress)
    comparison.seconds = time.monotonic() - began
    return comparison


def _compare_files(
    merge: Merge, out: Path, comparison: MergeComparison, tile_bytes: int, progress: OnProgress | None
) -> None:
    said = {file.name: file for file in comparison.record.files}
    small = small_files(merge.base.folder)
    expected = {*small, *(file.name for file in merge.base.files)}
    present = {path.name for path in out.glob("*.safetensors") if not path.name.startswith(".")}
    differ = comparison.mismatches
    differ.extend(sorted((expected ^ set(said)) | (present - expected)))
    for name in small:
        hashes = {sha256_of(path) if path.is_file() else "" for path in (merge.base.folder / name, out / name)}
        if name in said and hashes != {said[name].sha256}:
            differ.append(name)
    total_bytes = sum(file.size_bytes for file in merge.base.files)
    for file in merge.base.files:
        if file.name not in said:
            continue
        wrong: dict[str, None] = {}
        old_digest = hashlib.sha256()
        new_digest = hashlib.sha256()
        try:
            descriptor = os.open(out / file.name, os.O_RDONLY)
        except OSError:
            differ.append(file.name)
            continue
        try:
            at = 0
            for tensor, old, new in contents(merge, file, tile_bytes):
                if read_range(descriptor, at, len(new)) != new:
                    wrong[tensor or f"{file.name} (header)"] = None
                old_digest.update(old)
                new_digest.update(new)
                at += len(new)
                comparison.bytes_compared += len(new)
                if progress is not None:
                    progress(comparison.bytes_compared, total_bytes)
            if os.fstat(descriptor).st_size != at:
                wrong[f"{file.name} (size)"] = None
        finally:
            os.close(descriptor)
        if old_digest.hexdigest() != said[file.name].base_sha256:
            wrong[f"{file.name} (base)"] = None
        if new_digest.hexdigest() != said[file.name].sha256 and not wrong:
            wrong[f"{file.name} (record)"] = None
        differ.extend(wrong)
