"""The folder that a merge writes: file by file from the base, resumable, recorded.

A merged folder has the base's files under their names, with the same tensors, dtypes and offsets: a header is copied
and what follows it is streamed, row by row, so memory does not grow with the model.

What always holds:
- a file under its own name is complete: it is written under another name first, and moved when it is on disk;
- a merge that was killed goes on with the finished files kept, and the same inputs give the same bytes;
- a folder that holds something else, or a merge of other inputs, is left alone;
- no code is copied: only the names in `SMALL_FILES`.

The arithmetic is `aggregator.merge`'s; `aggregator.mergecheck` compares a folder with the merge done again.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aggregator.adapters import Adapter
from aggregator.basemodel import BaseModel, WeightFile
from aggregator.merge import DENOMINATOR_LOG2, TILE_BYTES, Blend, Merge
from aggregator.mergerecord import (
    JOURNAL,
    RECORD,
    Journal,
    MergedAdapter,
    MergedFile,
    MergeRecord,
    read_journal,
    record_text,
)
from rankup import __version__
from rankup.durable import read_range, sync_folder
from rankup.errors import DiskFullError, InputError, IntegrityError
from rankup.folder import disk_errors, folder_lock, write_durably
from rankup.message import canonical_json

PARTIAL: Final = ".partial"
SMALL_FILES: Final = (
    *("config.json", "generation_config.json", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.spm", "*.tiktoken"),
    *("chat_template.json", "chat_template.jinja", "*processor_config.json"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*"),
)
MAX_SMALL_BYTES: Final = 256 * 1024 * 1024
_PIECE_BYTES: Final = 8 * 1024 * 1024

OnProgress = Callable[[int, int], None]
"""(bytes done, bytes in all)"""


@dataclass(frozen=True)
class MergeResult:
    record: MergeRecord
    warnings: tuple[str, ...]
    bytes_written: int
    """Less than the folder's size where finished files were kept."""
    seconds: float


def merge_folder(
    base_folder: Path,
    adapter_folders: Sequence[Path],
    out: Path,
    blend: Blend,
    *,
    tile_bytes: int = TILE_BYTES,
    progress: OnProgress | None = None,
) -> MergeResult:
    """Merge adapters into a copy of the base under `out`, or go on with a merge that was broken off there.

    Raises:
        InputError: base, adapter or blend cannot be merged; nothing was written.
        StateError: `out` holds something else, or a merge of other inputs.
        DiskFullError: too little space, where that can be told before the first byte; finished files are kept.
        IntegrityError: a file breaks its format, or changed while it was read.
    """
    began = time.monotonic()
    _require_apart(out, (base_folder, *adapter_folders))
    with opened(base_folder, adapter_folders) as (base, adapters):
        merge = Merge(base, adapters, blend)
        warnings = (*merge.warnings, *_warn_of_code(base))
        inputs = _identity(merge)
        read_journal(out, inputs)  # refuse a foreign folder before the lock is put into it
        with folder_lock(out):
            journal = read_journal(out, inputs)
            if journal is None:
                journal = Journal(inputs=inputs, coefficients=merge.coefficients)
            else:
                merge = Merge(base, adapters, blend, coefficients=journal.coefficients)
            writing = _Writing(merge, out, journal, tile_bytes, progress)
            writing.run()
            record = _record(merge, writing.journal.files)
            write_durably(out / RECORD, record_text(record))
    return MergeResult(record, tuple(warnings), writing.bytes_written, time.monotonic() - began)


# -- before the first byte ---------------------------------------------------------------------------------------------


@contextmanager
def opened(base_folder: Path, adapter_folders: Sequence[Path]) -> Iterator[tuple[BaseModel, list[Adapter]]]:
    with ExitStack() as stack:
        base = stack.enter_context(BaseModel(base_folder))
        yield base, [stack.enter_context(Adapter(folder)) for folder in adapter_folders]


def _require_apart(out: Path, inputs: Sequence[Path]) -> None:
    target = out.resolve()
    for folder in inputs:
        source = folder.resolve()
        if target == source or target in source.parents or source in target.parents:
            raise InputError(f"{out} and {folder} lie in each other", remedy="Choose another folder for --out.")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is no folder", remedy="Choose another folder for --out.")


def _identity(merge: Merge) -> str:
    """Hash of everything that decides the result; of the base only names, sizes and times, since it may be large."""
    base = merge.base
    small = [(name, (base.folder / name).stat().st_size) for name in small_files(base.folder)]
    facts = {
        "base": [(file.name, file.size_bytes, file.modified_ns) for file in base.files],
        "small": small,
        "adapters": merge.identities,
        "rule": merge.blend.rule,
        "clip": repr(merge.blend.clip),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def small_files(folder: Path) -> list[str]:
    """Names of the base's small files that belong to the result: configuration and tokenizer, no code."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file() and any(fnmatch.fnmatchcase(path.name, pattern) for pattern in SMALL_FILES)
    )


def _warn_of_code(base: BaseModel) -> tuple[str, ...]:
    if not base.config.get("auto_map"):
        return ()
    return (
        f"{base.name} brings code of its own (auto_map in config.json), which is not copied: copy it if you trust it",
    )


# -- the bytes of a file -----------------------------------------------------------------------------------------------


def contents(merge: Merge, file: WeightFile, tile_bytes: int) -> Iterator[tuple[str | None, bytes, bytes]]:
    """(tensor or None for the header, base's bytes, merged bytes), from the first byte of the file to the last."""
    yield from ((None, data, data) for data in _stored(file, 0, file.header_bytes))
    for tensor, extent in file.tensors.items():
        if tensor in merge.touched:
            yield from ((tensor, old, new) for old, new in merge.tiles(tensor, tile_bytes))
        else:
            yield from ((tensor, data, data) for data in _stored(file, extent.start, extent.stop))


def _stored(file: WeightFile, start: int, stop: int) -> Iterator[bytes]:
    for at in range(start, stop, _PIECE_BYTES):
        data = read_range(file.descriptor, at, min(_PIECE_BYTES, stop - at))
        if len(data) != min(_PIECE_BYTES, stop - at):
            raise IntegrityError(f"the base's {file.name} became shorter while it was read")
        yield data


class _Writing:
    """One run of a merge: writes what the journal does not have."""

    def __init__(self, merge: Merge, out: Path, journal: Journal, tile_bytes: int, progress: OnProgress | None) -> None:
        self.journal = journal
        self.bytes_written = 0
        self._merge = merge
        self._out = out
        self._tile_bytes = tile_bytes
        self._progress = progress
        self._small = small_files(merge.base.folder)
        self._total_bytes = sum(file.size_bytes for file in merge.base.files)
        self._done_bytes = 0

    def run(self) -> None:
        finished = {file.name: file for file in self.journal.files if self._is_there(file)}
        self.journal = self.journal.model_copy(update={"files": tuple(finished.values())})
        for path in self._out.glob(f".*{PARTIAL}"):
            path.unlink()
        weights = [file for file in self._merge.base.files if file.name not in finished]
        small = [name for name in self._small if name not in finished]
        needed = sum(file.size_bytes for file in weights)
        needed += sum((self._merge.base.folder / name).stat().st_size for name in small)
        free = shutil.disk_usage(self._out).free
        if needed > free:
            raise DiskFullError(f"{needed} bytes are needed in {self._out}, {free} are free")
        write_durably(self._out / JOURNAL, canonical_json(self.journal))
        self._report(self._total_bytes - sum(file.size_bytes for file in weights))
        for name in small:
            self._note(self._copy_small(name))
        for file in weights:
            self._note(self._write_weights(file))

    def _is_there(self, file: MergedFile) -> bool:
        path = self._out / file.name
        return path.is_file() and path.stat().st_size == file.size_bytes

    def _note(self, file: MergedFile) -> None:
        self.journal = self.journal.model_copy(update={"files": (*self.journal.files, file)})
        write_durably(self._out / JOURNAL, canonical_json(self.journal))

    def _report(self, more_bytes: int) -> None:
        self._done_bytes += more_bytes
        if self._progress is not None:
            self._progress(self._done_bytes, self._total_bytes)

    def _copy_small(self, name: str) -> MergedFile:
        source = self._merge.base.folder / name
        size_bytes = source.stat().st_size
        if size_bytes > MAX_SMALL_BYTES:
            raise InputError(f"{source} is larger than {MAX_SMALL_BYTES} bytes", remedy="Remove it from the base.")
        digest = hashlib.sha256()
        with source.open("rb") as file, self._fresh(name) as target:
            while data := file.read(_PIECE_BYTES):
                digest.update(data)
                target.put(data)
        return MergedFile(name=name, size_bytes=size_bytes, sha256=digest.hexdigest(), base_sha256=digest.hexdigest())

    def _write_weights(self, file: WeightFile) -> MergedFile:
        untouched = self._merge.touched.isdisjoint(file.tensors)
        old_digest = new_digest = hashlib.sha256()  # one and the same up to the first byte that differs
        changed: set[str] = set()
        size_bytes = 0
        with self._fresh(file.name) as target:
            for tensor, old, new in contents(self._merge, file, self._tile_bytes):
                if untouched:
                    target.take(file.descriptor, size_bytes, new)
                else:
                    target.put(new)
                if new is not old and new != old:
                    changed.add(tensor or "")
                    if new_digest is old_digest:
                        new_digest = old_digest.copy()
                old_digest.update(old)
                if new_digest is not old_digest:
                    new_digest.update(new)
                size_bytes += len(new)
                self._report(len(new))
            if size_bytes != file.size_bytes:
                raise IntegrityError(f"{file.name} came out with {size_bytes} bytes instead of {file.size_bytes}")
        return MergedFile(
            name=file.name,
            size_bytes=size_bytes,
            sha256=new_digest.hexdigest(),
            base_sha256=old_digest.hexdigest(),
            tensors_changed=len(changed),
        )

    @contextmanager
    def _fresh(self, name: str) -> Iterator[_Target]:
        """A file that gets its name when the block ends well, and vanishes when it does not."""
        partial = self._out / f".{name}{PARTIAL}"
        try:
            with disk_errors(partial):
                descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            target = _Target(partial, descriptor)
            try:
                yield target
                with disk_errors(partial):
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
                self.bytes_written += target.written_bytes
            with disk_errors(partial):
                partial.replace(self._out / name)
                sync_folder(self._out)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


class _Target:
    """A file that is being written from its first byte to its last."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.written_bytes = 0
        self._path = path
        self._descriptor = descriptor
        self._can_share = hasattr(os, "copy_file_range")

    def put(self, data: bytes) -> None:
        rest = memoryview(data)
        with disk_errors(self._path):
            while rest:
                count = os.write(self._descriptor, rest)
                rest = rest[count:]
                self.written_bytes += count

    def take(self, source: int, start: int, data: bytes) -> None:
        """Append `data`, which lies in the file `source` at `start`, without moving it through this process.

        File systems that can (btrfs, XFS, NFS 4.2) share the blocks; where the kernel will not, the bytes are written.
        """
        done = 0
        while self._can_share and done < len(data):
            try:
                count = os.copy_file_range(source, self._descriptor, len(data) - done, start + done)
            except OSError:
                count = 0
            self._can_share = count > 0
            done += count
            self.written_bytes += count
        self.put(data[done:])


def _record(merge: Merge, files: Sequence[MergedFile]) -> MergeRecord:
    adapters = tuple(
        MergedAdapter(
            name=adapter.name,
            sha256=adapter.sha256,
            config_sha256=adapter.config_sha256,
            coefficient=coefficient,
            scalings=tuple(sorted(placement.scalings)),
        )
        for adapter, coefficient, placement in zip(merge.adapters, merge.coefficients, merge.placements, strict=True)
    )
    return MergeRecord(
        rankup=__version__,
        base=merge.base.name,
        adapters=adapters,
        denominator_log2=DENOMINATOR_LOG2,
        rule=merge.blend.rule,
        clip=merge.blend.clip if merge.blend.clip < math.inf else None,
        tensors=merge.base.tensor_count,
        tensors_changed=sum(file.tensors_changed for file in files),
        files=tuple(sorted(files, key=lambda file: file.name)),
    )
