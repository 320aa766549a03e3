"""Whole export files and the patches between them: a patch from two files, and a file from a chain of patches.

What always holds:
- a patch is only made between files with the same header;
- what `apply_patches` writes has the digest that its caller expects; otherwise it removes it again, and says which
  file is to blame;
- files are read and written block by block, a few blocks in memory, whatever their size and however long the chain.

The patch file itself is the subject of `rankup.patchfile`. Which patches to fetch, and what to do with the result, is
for others to say.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rankup.durable import read_range
from rankup.errors import DiskFullError, InputError, IntegrityError, NotFoundError, SetupError
from rankup.patchfile import OTHER_FILE, PatchReader, PatchWriter, Tensors
from rankup.records import BlobRef
from rankup.tensorfile import DTYPE_BYTES, Content, TensorFile
from rankup.weightcodec import Blocks, decode_block

__all__ = ["PatchWriter", "apply_patches", "write_patch"]

ReadAt = Callable[[int, int], bytes]


def write_patch(base: Path, child: Path, out: Path) -> BlobRef:
    """Write the patch from `base` to `child`, two export files with the same header, to `out`; returns its digest and
    size. No part of it is left where that fails.

    Raises:
        InputError: the headers differ, or `out` is one of the two.
        IntegrityError: one of the two is no valid tensor file.
        NotFoundError, DiskFullError, SetupError: the disk.
    """
    with _Source.open(base) as old, _Source.open(child) as new:
        if old.head() != new.head():
            raise InputError(f"{base} and {child} do not hold the same tensors", remedy="Use the whole file instead.")
        digests = hashlib.sha256(old.head()), hashlib.sha256(new.head())
        with _new_file(out, [base, child]) as file:
            writer = PatchWriter(file, old.tensors)
            for name, _, start, length in old.pieces():
                pieces = old.file.read_part(name, start, length), new.file.read_part(name, start, length)
                for digest, piece in zip(digests, pieces, strict=True):
                    digest.update(piece)
                writer.append(name, *pieces)
            return writer.finish(digests[0].hexdigest(), digests[1].hexdigest())


def apply_patches(
    base: Path,
    patches: Sequence[Path],
    out: Path,
    *,
    base_sha256: str,
    expected: BlobRef,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write to `out` what a chain of patches makes of `base`, in one pass; its data are on disk when the call returns.
    `progress` is told how many bytes more are written, block by block. No part of a result is left where that fails.

    Raises:
        IntegrityError: a patch is damaged, not well-formed or made for another file, or `base` is not the file with
            `base_sha256`; the message says which.
        InputError: no patches, or `out` is one of the other files.
        NotFoundError, DiskFullError, SetupError: the disk.
    """
    if not patches:
        raise InputError("there is no patch to apply")
    with ExitStack() as opened:
        source = opened.enter_context(_Source.open(base))
        chain = [opened.enter_context(_Patch.open(path, source.tensors)) for path in patches]
        _check_chain(source, chain, base_sha256, expected)
        file = opened.enter_context(_new_file(out, [base, *patches]))
        digest = hashlib.sha256()
        try:
            for piece in _rebuild(source, chain):
                file.write(piece)
                digest.update(piece)
                if progress is not None:
                    progress(memoryview(piece).nbytes)
            if digest.hexdigest() != expected.sha256:
                raise IntegrityError(f"{base} and its patches do not give the file that is expected")
        except IntegrityError as exc:
            raise _culprit(source, chain, base_sha256, exc) from exc


def _check_chain(source: _Source, chain: Sequence[_Patch], base_sha256: str, expected: BlobRef) -> None:
    reached = base_sha256
    for patch in chain:
        if patch.reader.base_sha256 != reached:
            raise IntegrityError(f"the patch {patch.path} is made for another file", remedy=OTHER_FILE)
        reached = patch.reader.result_sha256
    if (reached, source.size_bytes) != (expected.sha256, expected.size_bytes):
        raise IntegrityError(f"the patch {chain[-1].path} leads to another file", remedy=OTHER_FILE)


def _rebuild(source: _Source, chain: Sequence[_Patch]) -> Iterator[Content]:
    """The bytes of the result, block by block. Raises IntegrityError that names a patch."""
    yield source.head()
    for name, number, start, length in source.pieces():
        dtype, shape = source.tensors[name]
        blocks = Blocks.of(dtype, shape)
        block = start // (blocks.elements * DTYPE_BYTES[dtype])
        content: Content = source.file.read_part(name, start, length)
        for patch in chain:
            content = patch.decode(number, block, dtype, blocks.width, content)
        yield content


def _culprit(source: _Source, chain: Sequence[_Patch], base_sha256: str, error: IntegrityError) -> IntegrityError:
    """Which file is to blame for `error`: the base, or the first patch whose result is wrong. As slow as it is rare."""
    if _digest(_rebuild(source, [])) != base_sha256:
        return IntegrityError(
            f"{source.path} is not the file that its patches are made for: its bytes have changed",
            remedy="Fetch the whole file.",
        )
    for end, patch in enumerate(chain, start=1):
        try:
            if _digest(_rebuild(source, chain[:end])) != patch.reader.result_sha256:
                return IntegrityError(f"the patch {patch.path} does not give the file that it promises")
        except IntegrityError as exc:
            return exc
    return error


def _digest(pieces: Iterator[Content]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Source:
    """An export file whose bytes a patch starts from or leads to."""

    path: Path
    read_at: ReadAt
    size_bytes: int
    file: TensorFile
    tensors: Tensors

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[_Source]:
        with _opened(path) as (read_at, size_bytes):
            file = TensorFile(read_at, size_bytes)
            tensors = {name: (extent.dtype, extent.shape) for name, extent in file.entries.items()}
            yield cls(path, read_at, size_bytes, file, tensors)

    def head(self) -> bytes:
        """Everything ahead of the first tensor."""
        starts = [extent.start for extent in self.file.entries.values()]
        return self.read_at(0, starts[0] if starts else self.size_bytes)

    def pieces(self) -> Iterator[tuple[str, int, int, int]]:
        """Name and number of the tensor, first byte in it and length, for every block of the file in its order."""
        for number, (name, (dtype, shape)) in enumerate(self.tensors.items()):
            blocks = Blocks.of(dtype, shape)
            block_bytes = blocks.elements * DTYPE_BYTES[dtype]
            for start in range(0, blocks.size_bytes, block_bytes):
                yield name, number, start, min(block_bytes, blocks.size_bytes - start)


@dataclass(frozen=True)
class _Patch:
    """An open patch; its errors name its file."""

    path: Path
    reader: PatchReader

    @classmethod
    @contextmanager
    def open(cls, path: Path, tensors: Tensors) -> Iterator[_Patch]:
        with _opened(path) as (read_at, size_bytes):
            with _naming(path):
                reader = PatchReader(read_at, size_bytes, tensors)
            yield cls(path, reader)

    def decode(self, number: int, block: int, dtype: str, width: int, content: Content) -> Content:
        with _naming(self.path):
            return decode_block(dtype, width, content, self.reader.read(number, block))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except IntegrityError as exc:
        raise IntegrityError(f"{path}: {exc.cause}", remedy=exc.remedy) from exc


@contextmanager
def _opened(path: Path) -> Iterator[tuple[ReadAt, int]]:
    """A local file as `read_at(start, length) -> bytes`, and its size."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError as exc:
        raise NotFoundError(f"there is no file {path}", remedy="Pull the version again.") from exc
    except OSError as exc:
        raise InputError(f"cannot read {path}: {exc.strerror}") from exc

    def read_at(start: int, length: int) -> bytes:
        try:
            return read_range(descriptor, start, length)
        except OSError as exc:
            raise InputError(f"cannot read {path}: {exc.strerror}") from exc

    try:
        yield read_at, os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


@contextmanager
def _new_file(path: Path, others: Sequence[Path]) -> Iterator[IO[bytes]]:
    """A file that is on disk in the end, or not there at all."""
    if path.exists() and any(path.samefile(other) for other in others):
        raise InputError(f"{path} is to be read and written at once")
    try:
        file = path.open("wb")
    except OSError as exc:
        raise SetupError(f"cannot write {path}: {exc}", remedy="Check the folder and its permissions.") from exc
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException as exc:
        path.unlink(missing_ok=True)
        if not isinstance(exc, OSError):
            raise
        if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFullError(f"no room left for {path}") from exc
        raise SetupError(f"cannot write {path}: {exc}", remedy="Check the disk.") from exc
