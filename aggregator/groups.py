"""Groups of tensors in object storage: one float32 master file and one export file each, both plain safetensors.

What always holds:
- the bytes of a file depend on its tensors alone (names, shapes, dtypes, values): see `rankup.tensorfile`;
- floating tensors are float32 in the master and are rounded once, from the master, into the export; all others are
  equal in both files;
- a writer holds one tensor in memory at a time, a reader fetches one header and then only the bytes it is asked for,
  either tensor by tensor or a stretch of neighbours ahead.

It does not check hashes on reading (`check_tensor` does, against a manifest's entry) and does not decide what a model
holds. Bfloat16 has no numpy dtype: it is held as its uint16 bit pattern.
"""

from __future__ import annotations

import errno
import hashlib
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rankup.bfloat16 import to_bfloat16
from rankup.errors import DiskFullError, InputError, IntegrityError
from rankup.records import BlobRef, FileEntry, Group, TensorEntry
from rankup.store import Store, blob_key, put_blob_file
from rankup.tensorfile import TensorFile, write_tensor_file

Dtype = Literal["BF16", "F16", "F32", "F64", "I8", "I16", "I32", "I64", "U8", "BOOL"]
Array = NDArray[Any]

MASTER_METADATA = {"format": "rankup.master/1"}
EXPORT_METADATA = {"format": "pt"}
"""What transformers asks of a file before it loads it."""

STORED_AS: dict[str, np.dtype[Any]] = {
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
_ROUND_TO: dict[str, Callable[[Array], Array]] = {
    "BF16": to_bfloat16,
    "F16": lambda master: master.astype("<f2"),
    "F32": lambda master: master,
    "F64": lambda master: master.astype("<f8"),
}


def plan_groups(sizes: Mapping[str, int], max_bytes: int) -> list[tuple[str, ...]]:
    """Split tensors into groups of at most `max_bytes` (name -> bytes of the master); a larger tensor gets its own
    group.

    Names are taken in sorted order and a group is closed when the next tensor would overfill it, so the plan depends on
    the arguments alone. Every name is in exactly one group.
    """
    groups: list[tuple[str, ...]] = []
    current: list[str] = []
    filled = 0
    for name in sorted(sizes):
        if current and filled + sizes[name] > max_bytes:
            groups.append(tuple(current))
            current, filled = [], 0
        current.append(name)
        filled += sizes[name]
    if current:
        groups.append(tuple(current))
    return groups


def master_path(number: int, total: int) -> str:
    """File name of the master of group `number` (from 1) of `total`."""
    return f"master-{number:05d}-of-{total:05d}.safetensors"


def export_path(number: int, total: int) -> str:
    """File name of the export of group `number` (from 1) of `total`, as `from_pretrained` expects it."""
    return "model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"


def tensor_digest(array: Array) -> str:
    """sha256 of the raw little-endian bytes of `array` in row-major order."""
    return hashlib.sha256(_raw(array)).hexdigest()


def check_tensor(array: Array, digest: str, name: str) -> None:
    """Raise IntegrityError when `array` does not hash to `digest`."""
    if tensor_digest(array) != digest:
        raise IntegrityError(f"tensor {name} does not have the hash that its manifest gives")


def is_floating(dtype: str) -> bool:
    """Whether an export of `dtype` has a float32 master."""
    return dtype in _ROUND_TO


@dataclass(frozen=True)
class Layout:
    """What a tensor looks like before its values are known."""

    shape: tuple[int, ...]
    export_dtype: Dtype
    lora: bool = False

    @property
    def master_dtype(self) -> str:
        return "F32" if is_floating(self.export_dtype) else self.export_dtype


class GroupWriter:
    """Collects the tensors of one group, in any order, and stores both files when the last one is there.

    Tensors wait in one spool file in `folder`; nothing reaches the store before `finish`.
    """

    def __init__(self, folder: Path, number: int, total: int, layouts: Mapping[str, Layout]) -> None:
        if not layouts:
            raise InputError("a group needs at least one tensor")
        self._folder = folder
        self._spool = folder / "spool"
        self._spooled_bytes = 0
        self._paths = (master_path(number, total), export_path(number, total))
        self._layouts = dict(layouts)
        self._entries: dict[str, TensorEntry] = {}
        self._places: dict[str, tuple[slice, slice]] = {}
        """Name -> where its master and its export lie in the spool."""

    def add(self, name: str, master: Array) -> None:
        """Take `name`: a float32 array for a floating tensor, the tensor as it is for any other.

        Raises InputError when name, shape or dtype is not what the layout says; DiskFullError.
        """
        layout = self._layouts.get(name)
        if layout is None or name in self._entries:
            raise InputError(f"tensor {name} does not belong to this group or was written before")
        if tuple(master.shape) != layout.shape or master.dtype != STORED_AS[layout.master_dtype]:
            want = f"{layout.master_dtype} {list(layout.shape)}"
            raise InputError(f"tensor {name} is {master.dtype} {list(master.shape)}, not {want}")
        place = self._append(master)
        if layout.export_dtype == layout.master_dtype:
            export, export_place = master, place
        else:
            export = _ROUND_TO[layout.export_dtype](master)
            export_place = self._append(export)
        self._places[name] = (place, export_place)
        self._entries[name] = TensorEntry(
            shape=layout.shape,
            export_dtype=layout.export_dtype,
            master=tensor_digest(master),
            export=tensor_digest(export),
            lora=layout.lora,
        )

    def finish(self, store: Store) -> tuple[Group, dict[str, TensorEntry]]:
        """Put both files into the store as blobs. Raises InputError when a tensor is missing; errors of the store."""
        missing = sorted(self._layouts.keys() - self._entries.keys())
        if missing:
            raise InputError(f"the group lacks {len(missing)} tensors, {missing[0]} among them")
        master_dtypes = {name: layout.master_dtype for name, layout in self._layouts.items()}
        export_dtypes = {name: layout.export_dtype for name, layout in self._layouts.items()}
        entries = {name: self._entries[name] for name in sorted(self._entries)}
        group = Group(
            tensors=tuple(entries),
            master=self._store_file(store, 0, master_dtypes, MASTER_METADATA),
            export=self._store_file(store, 1, export_dtypes, EXPORT_METADATA),
        )
        return group, entries

    def _append(self, array: Array) -> slice:
        raw = _raw(array)
        with _disk_errors(self._spool), self._spool.open("ab") as file:
            file.write(raw)
        start, self._spooled_bytes = self._spooled_bytes, self._spooled_bytes + raw.nbytes
        return slice(start, self._spooled_bytes)

    def _store_file(
        self, store: Store, which: int, dtypes: Mapping[str, str], metadata: Mapping[str, str]
    ) -> FileEntry:
        # An empty file cannot be mapped: a group of tensors without elements is legal.
        spool = np.memmap(self._spool, dtype=np.uint8, mode="r") if self._spooled_bytes else np.empty(0, np.uint8)
        tensors = {
            name: (dtypes[name], layout.shape, spool[self._places[name][which]].data)
            for name, layout in self._layouts.items()
        }
        path = self._folder / self._paths[which]
        with _disk_errors(path):
            ref = write_tensor_file(path, tensors, metadata)
        put_blob_file(store, path, ref=ref)
        path.unlink()
        return FileEntry(sha256=ref.sha256, size_bytes=ref.size_bytes, path=self._paths[which])


@contextmanager
def open_group_writer(number: int, total: int, layouts: Mapping[str, Layout]) -> Iterator[GroupWriter]:
    """A writer with a temporary folder of its own, removed at the end whatever happens."""
    with tempfile.TemporaryDirectory(prefix="rankup-group-") as folder:
        yield GroupWriter(Path(folder), number, total, layouts)


def write_group(
    store: Store,
    number: int,
    total: int,
    tensors: Mapping[str, Array],
    export_dtypes: Mapping[str, Dtype],
    lora: Collection[str],
) -> tuple[Group, dict[str, TensorEntry]]:
    """Store one group whose tensors are at hand. `number` counts from 1; `lora` names what a delta may change.

    Floating tensors must be float32 masters. Raises InputError for a dtype or shape that does not fit, and what the
    store raises.
    """
    layouts = {
        name: Layout(tuple(int(n) for n in array.shape), export_dtypes[name], name in lora)
        for name, array in tensors.items()
    }
    with open_group_writer(number, total, layouts) as writer:
        for name in sorted(tensors):
            writer.add(name, tensors[name])
        return writer.finish(store)


class ReadAhead:
    """One blob as `read_at(start, length)`: what `fetch` has fetched costs no request, anything else costs one.

    A request costs milliseconds whatever its size, so many small neighbours are better read as one stretch. Memory is
    that of the last stretch. One thread at a time.
    """

    def __init__(self, store: Store, digest: str) -> None:
        self._store = store
        self._key = blob_key(digest)
        self._start = 0
        self._stretch = b""

    def __call__(self, start: int, length: int) -> bytes:
        offset = start - self._start
        if offset >= 0 and offset + length <= len(self._stretch):
            return self._stretch[offset : offset + length]
        return self._store.get_range(self._key, start, length)

    def fetch(self, extents: Iterable[tuple[int, int]]) -> None:
        """Fetch the bytes of `extents` (start, stop) in one request and forget the stretch before.

        Where they leave gaps nothing is fetched: the bytes between could be any number.
        """
        ordered = sorted(extents)
        self._stretch = b""
        if ordered and all(left[1] == right[0] for left, right in pairwise(ordered)):
            start, stop = ordered[0][0], ordered[-1][1]
            self._start, self._stretch = start, self._store.get_range(self._key, start, stop - start)


class GroupReader:
    """Reads single tensors of one stored file by byte range; the header is fetched once, when it is made.

    Raises IntegrityError where the file breaks the rules of `rankup.tensorfile`, and what the store raises.
    """

    def __init__(self, store: Store, ref: BlobRef) -> None:
        self._read_at = ReadAhead(store, ref.sha256)
        self._file = TensorFile(self._read_at, ref.size_bytes)

    def size_bytes(self, name: str) -> int:
        """Bytes of one tensor as it is stored; 0 where the file holds no such tensor."""
        extent = self._file.entries.get(name)
        return extent.stop - extent.start if extent is not None else 0

    def fetch(self, names: Collection[str]) -> None:
        """Fetch the tensors that are read next, in one request where they are neighbours. Unknown names are ignored."""
        extents = [self._file.entries[name] for name in names if name in self._file.entries]
        self._read_at.fetch((extent.start, extent.stop) for extent in extents)

    @property
    def names(self) -> tuple[str, ...]:
        """What the file holds, sorted."""
        return tuple(sorted(self._file.entries))

    def read(self, name: str) -> Array:
        """One tensor as it is stored, read-only (BF16 as uint16 bit patterns). Not hash-checked: see `check_tensor`.

        Raises NotFoundError when the file holds no such tensor.
        """
        raw = self._file.read(name)
        extent = self._file.entries[name]
        return np.frombuffer(raw, dtype=STORED_AS[extent.dtype]).reshape(extent.shape)


def read_tensor(store: Store, ref: BlobRef, name: str) -> Array:
    """One tensor of a stored file: see `GroupReader.read`."""
    return GroupReader(store, ref).read(name)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(f"no room left for {path}") from exc
        raise


def _raw(array: Array) -> memoryview:
    """The array's little-endian bytes in row-major order, without a copy where it already lies so."""
    flat = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(-1)
    return flat.view(np.uint8).data
