"""Groups of tensors in object storage: a float32 master file, an export file and, where the outer step keeps a state, a
momentum file, all plain safetensors.

What always holds:
- the bytes of a file depend on its tensors alone (names, shapes, dtypes, values): see `rankup.tensorfile`;
- floating tensors are float32 in the master and are rounded once, from the master, into the export; all others are
  equal in both files; the momentum file holds the tensors that have a state, and no other;
- a group that follows from a parent's comes with the patch that makes its export file out of the parent's, where that
  has other bytes and the patch is smaller than the file;
- a writer holds a few tiles in memory and each byte once on disk, in the file that is stored; a reader fetches one
  header and then only the bytes it is asked for, either piece by piece or a stretch of neighbours ahead.

It does not check hashes on reading (`check_tensor` does, against a manifest's entry) and does not decide what a model
holds. Bfloat16 has no numpy dtype: it is held as its uint16 bit pattern.
"""

from __future__ import annotations

import errno
import hashlib
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from rankup.dtypes import STORED_AS, Array, Dtype, export_of, master_dtype, raw_bytes
from rankup.errors import DiskFullError, InputError, IntegrityError
from rankup.foldrows import Tile, TileHashes
from rankup.patchfile import PatchWriter
from rankup.records import BlobRef, FileEntry, Group, Patch, TensorEntry
from rankup.refold import MOMENTUM_METADATA
from rankup.store import Store, blob_key, put_blob_file
from rankup.targets import Role
from rankup.tensorfile import TensorFile, TensorFileWriter

MASTER_METADATA = {"format": "rankup.master/1"}
EXPORT_METADATA = {"format": "pt"}
"""What transformers asks of a file before it loads it."""

ADD_TILE_BYTES = 16 * 1024**2
"""A tensor that is at hand is rounded and written in pieces of this size."""


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


def momentum_path(number: int, total: int) -> str:
    """File name of the outer step's state of group `number` (from 1) of `total`."""
    return f"momentum-{number:05d}-of-{total:05d}.safetensors"


def tensor_digest(array: Array) -> str:
    """sha256 of the raw little-endian bytes of `array` in row-major order."""
    return hashlib.sha256(raw_bytes(array)).hexdigest()


def check_tensor(array: Array, digest: str, name: str) -> None:
    """Raise IntegrityError when `array` does not hash to `digest`."""
    if tensor_digest(array) != digest:
        raise IntegrityError(f"tensor {name} does not have the hash that its manifest gives")


@dataclass(frozen=True)
class Layout:
    """What a tensor looks like before its values are known."""

    shape: tuple[int, ...]
    export_dtype: Dtype
    role: Role | None = None

    @property
    def master_dtype(self) -> str:
        return master_dtype(self.export_dtype)


class GroupWriter:
    """Writes the files of one group, tensor by tensor, and stores them when the last one is there.

    Files are written where they stay until they are stored; nothing reaches the store before `finish`. A file is hashed
    on the way where tensors come in its own order (`order`), and read once more where not.
    """

    def __init__(
        self,
        folder: Path,
        number: int,
        total: int,
        layouts: Mapping[str, Layout],
        stateful: Collection[str],
        base: FileEntry | None,
    ) -> None:
        if not layouts:
            raise InputError("a group needs at least one tensor")
        self._folder = folder
        self._layouts = dict(layouts)
        self._stateful = frozenset(stateful)
        self._entries: dict[str, TensorEntry] = {}
        self._open = ExitStack()
        shapes = {name: layout.shape for name, layout in layouts.items()}
        masters = {name: (layout.master_dtype, layout.shape) for name, layout in layouts.items()}
        exports = {name: (layout.export_dtype, layout.shape) for name, layout in layouts.items()}
        momenta = {name: ("F32", shapes[name]) for name in stateful}
        self._master = self._start(master_path(number, total), masters, MASTER_METADATA)
        self._export = self._start(export_path(number, total), exports, EXPORT_METADATA)
        self._momentum = (
            self._start(momentum_path(number, total), momenta, MOMENTUM_METADATA) if self._stateful else None
        )
        self._base = base
        if base is not None:
            self._patch_file = self._open.enter_context((folder / "patch").open("w+b"))
            self._patch = PatchWriter(self._patch_file, {name: exports[name] for name in self._export[1].order})
        self.order = self._master[1].order
        """Names in the order of the master file: the cheapest order to write them in."""

    def add(self, name: str, master: Array) -> None:
        """Take a tensor that is at hand: float32 where it is floating, as it is where not. It has no momentum.

        Raises InputError when name, shape or dtype is not what the layout says; DiskFullError.
        """
        layout = self._layout(name)
        if tuple(master.shape) != layout.shape or master.dtype != STORED_AS[layout.master_dtype]:
            want = f"{layout.master_dtype} {list(layout.shape)}"
            raise InputError(f"tensor {name} is {master.dtype} {list(master.shape)}, not {want}")
        flat = np.ascontiguousarray(master).reshape(-1)
        step = ADD_TILE_BYTES // flat.dtype.itemsize
        pieces = (flat[start : start + step] for start in range(0, flat.size, step))
        self.write(name, (Tile(piece, export_of(piece, layout.export_dtype), None) for piece in pieces))

    def write(self, name: str, tiles: Iterable[Tile]) -> None:
        """Take a tensor in pieces, in order. Raises InputError (name, or too few or too many values), DiskFullError."""
        layout = self._layout(name)
        hashes = TileHashes()
        with _disk_errors(self._folder):
            for tile in tiles:
                hashes.update(tile)
                self._master[1].append(name, raw_bytes(tile.master))
                self._export[1].append(name, raw_bytes(tile.export))
                if self._base is not None and tile.before is not None:
                    before = export_of(tile.before, layout.export_dtype)
                    self._patch.append(name, raw_bytes(before), raw_bytes(tile.export))
                if (tile.momentum is not None) != (name in self._stateful):
                    raise InputError(
                        f"tensor {name} has a momentum in the plan of its group or in its rows, not in both"
                    )
                if tile.momentum is not None and self._momentum is not None:
                    self._momentum[1].append(name, raw_bytes(tile.momentum))
        self._entries[name] = hashes.entry(layout.shape, layout.export_dtype, layout.role)

    def finish(self, store: Store) -> tuple[Group, dict[str, TensorEntry]]:
        """Put the files into the store as blobs. Raises InputError when a tensor is missing; errors of the store."""
        missing = sorted(self._layouts.keys() - self._entries.keys())
        if missing:
            raise InputError(f"the group lacks {len(missing)} tensors, {missing[0]} among them")
        entries = {name: self._entries[name] for name in sorted(self._entries)}
        group = Group(
            tensors=tuple(entries),
            master=self._store_file(store, *self._master),
            export=self._store_file(store, *self._export),
            momentum=None if self._momentum is None else self._store_file(store, *self._momentum),
        )
        return group.model_copy(update={"patch": self._store_patch(store, group.export)}), entries

    def close(self) -> None:
        """Close the files. What cannot be written to them any more does not matter: `finish` has closed good ones."""
        with suppress(OSError):
            self._open.close()

    def _layout(self, name: str) -> Layout:
        layout = self._layouts.get(name)
        if layout is None or name in self._entries:
            raise InputError(f"tensor {name} does not belong to this group or was written before")
        return layout

    def _start(
        self, path: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> tuple[IO[bytes], TensorFileWriter]:
        with _disk_errors(self._folder):
            file = self._open.enter_context((self._folder / path).open("w+b"))
            return file, TensorFileWriter(file, tensors, metadata)

    def _store_file(self, store: Store, file: IO[bytes], writer: TensorFileWriter) -> FileEntry:
        path = Path(file.name)
        with _disk_errors(path):
            ref = writer.finish()
            file.close()
        put_blob_file(store, path, ref=ref)
        path.unlink()
        return FileEntry(sha256=ref.sha256, size_bytes=ref.size_bytes, path=path.name)

    def _store_patch(self, store: Store, export: FileEntry) -> Patch | None:
        """None where there is no parent's file, where that has the same bytes, or where a patch would not pay."""
        if self._base is None or self._base.sha256 == export.sha256:
            return None
        path = Path(self._patch_file.name)
        with _disk_errors(path):
            ref = self._patch.finish(self._base.sha256, export.sha256)
            self._patch_file.close()
        if ref.size_bytes >= export.size_bytes:
            return None
        put_blob_file(store, path, ref=ref)
        return Patch(sha256=ref.sha256, size_bytes=ref.size_bytes, base=self._base.sha256)


@contextmanager
def open_group_writer(
    number: int,
    total: int,
    layouts: Mapping[str, Layout],
    stateful: Collection[str] = (),
    *,
    base: FileEntry | None = None,
) -> Iterator[GroupWriter]:
    """A writer with a temporary folder of its own, removed at the end whatever happens. `stateful` names the tensors
    that have a momentum, `base` is the parent's export file, where the tiles know what they change."""
    with tempfile.TemporaryDirectory(prefix="rankup-group-") as folder:
        writer = GroupWriter(Path(folder), number, total, layouts, stateful, base)
        try:
            yield writer
        finally:
            writer.close()


def write_group(
    store: Store,
    number: int,
    total: int,
    tensors: Mapping[str, Array],
    export_dtypes: Mapping[str, Dtype],
    roles: Mapping[str, Role],
) -> tuple[Group, dict[str, TensorEntry]]:
    """Store one group whose tensors are at hand. `number` counts from 1; `roles` names the weights that a delta
    may change.

    Floating tensors must be float32 masters. Raises InputError for a dtype or shape that does not fit, and what the
    store raises.
    """
    layouts = {
        name: Layout(tuple(int(n) for n in array.shape), export_dtypes[name], roles.get(name))
        for name, array in tensors.items()
    }
    with open_group_writer(number, total, layouts) as writer:
        for name in writer.order:
            writer.add(name, tensors[name])
        return writer.finish(store)


Stretches = list[tuple[int, bytes]]
"""Bytes of a blob that were read ahead, each with its place."""


class ReadAhead:
    """One blob as `read_at(start, length)`: what was read ahead costs no request, anything else costs one.

    A request costs milliseconds whatever its size, so many small neighbours are better read as one stretch. `load` may
    run in another thread while the stretches in use are read; all else belongs to one thread.
    """

    def __init__(self, store: Store, digest: str) -> None:
        self._store = store
        self._key = blob_key(digest)
        self._stretches: Stretches = []

    def __call__(self, start: int, length: int) -> bytes:
        for first, stretch in self._stretches:
            if first <= start and start + length <= first + len(stretch):
                return stretch[start - first : start - first + length]
        return self._store.get_range(self._key, start, length)

    def load(self, extents: Iterable[tuple[int, int]]) -> Stretches:
        """Read the bytes of `extents` (start, stop), neighbours in one request."""
        runs: list[tuple[int, int]] = []
        for start, stop in sorted(extents):
            if runs and runs[-1][1] == start:
                runs[-1] = runs[-1][0], stop
            elif start < stop:
                runs.append((start, stop))
        return [(start, self._store.get_range(self._key, start, stop - start)) for start, stop in runs]

    def use(self, stretches: Stretches) -> None:
        """Read from these from now on, and forget those before."""
        self._stretches = stretches

    def fetch(self, extents: Iterable[tuple[int, int]]) -> None:
        """Forget what is in use, then `load` and `use`."""
        self._stretches = []
        self._stretches = self.load(extents)


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

    def load(self, names: Collection[str]) -> Stretches:
        """Read tensors ahead, neighbours in one request, for `use`. Unknown names are ignored."""
        extents = [self._file.entries[name] for name in names if name in self._file.entries]
        return self._read_at.load((extent.start, extent.stop) for extent in extents)

    def use(self, stretches: Stretches) -> None:
        """See `ReadAhead.use`."""
        self._read_at.use(stretches)

    @property
    def names(self) -> tuple[str, ...]:
        """What the file holds, in the order of its bytes."""
        return tuple(self._file.entries)

    def read(self, name: str) -> Array:
        """One tensor as it is stored, read-only (BF16 as uint16 bit patterns). Not hash-checked: see `check_tensor`.

        Raises NotFoundError when the file holds no such tensor.
        """
        raw = self._file.read(name)
        extent = self._file.entries[name]
        return np.frombuffer(raw, dtype=STORED_AS[extent.dtype]).reshape(extent.shape)

    def read_part(self, name: str, start: int, length: int) -> bytes:
        """Raw bytes of one tensor from its byte `start` on: see `rankup.tensorfile.TensorFile.read_part`."""
        return self._file.read_part(name, start, length)

    def require(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        """Raise IntegrityError unless the file holds `name` with this dtype and shape."""
        extent = self._file.entries.get(name)
        if extent is None or (extent.dtype, extent.shape) != (dtype, shape):
            raise IntegrityError(f"the stored file does not hold tensor {name} as {dtype} {list(shape)}")


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
