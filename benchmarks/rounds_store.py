"""Object storage as a folder, for benchmarks that make and publish versions: one file an object, under its key.

The folder is what a static web server serves, and what `rankup.sources.FolderSource` reads. One process writes to it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rankup.errors import ConflictError, InputError, NotFoundError
from rankup.store import ObjectInfo
from rankup.versions import MAX_ENVELOPE_BYTES


class FolderStore:
    """What making and publishing versions needs of `rankup.store.Store`: one file an object, under its key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        return self.folder / key

    def _found(self, key: str) -> Path:
        path = self.path(key)
        if not path.is_file():
            raise NotFoundError(f"there is no {key}")
        return path

    def get(self, key: str, *, max_bytes: int) -> bytes:
        return self._found(key).read_bytes()[: max_bytes + 1]

    def get_with_etag(self, key: str, *, max_bytes: int) -> tuple[bytes, str]:
        data = self.get(key, max_bytes=max_bytes)
        return data, hashlib.sha256(data).hexdigest()

    def get_range(self, key: str, start: int, length: int) -> bytes:
        with self._found(key).open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), length, start)
        if len(data) != length:
            raise InputError(f"{key} has no {length} bytes at {start}")
        return data

    def head(self, key: str) -> ObjectInfo | None:
        path = self.path(key)
        return ObjectInfo(path.stat().st_size, "") if path.is_file() else None

    def list(self, prefix: str) -> Iterator[str]:
        keys = (path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())
        yield from sorted(key for key in keys if key.startswith(prefix))

    def delete(self, key: str) -> None:
        self.path(key).unlink(missing_ok=True)

    def put(self, key: str, data: bytes, *, if_absent: bool = False, content_type: str = "") -> str:
        if if_absent and self.path(key).exists():
            raise ConflictError(f"{key} is there")
        with tempfile.NamedTemporaryFile(dir=self._room(key), delete=False) as file:
            file.write(data)
        Path(file.name).replace(self.path(key))
        return hashlib.sha256(data).hexdigest()

    def put_file(self, key: str, path: Path, *, progress: Any = None) -> None:
        fresh = self._room(key) / f".{path.name}.{os.getpid()}"
        shutil.copyfile(path, fresh)
        fresh.replace(self.path(key))

    def get_file(self, key: str, path: Path, *, progress: Any = None) -> None:
        shutil.copyfile(self._found(key), path)

    def swap(self, key: str, data: bytes, *, etag: str | None) -> str:
        present = self.get_with_etag(key, max_bytes=MAX_ENVELOPE_BYTES)[1] if self.path(key).exists() else None
        if present != etag:
            raise ConflictError(f"somebody else wrote {key} first")
        return self.put(key, data)

    def _room(self, key: str) -> Path:
        folder = self.path(key).parent
        folder.mkdir(parents=True, exist_ok=True)
        return folder
