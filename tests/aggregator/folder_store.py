"""A store in a local folder, for tests that kill the process which writes to it: whole objects or none, as S3 does."""

from __future__ import annotations

import io
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rankup.errors import ConflictError, NotFoundError
from rankup.store import ObjectInfo, Progress

PIECE_BYTES = 2**20


class FolderStore:
    """What a fold needs of `rankup.store.Store`. What a killed writer leaves behind is never an object."""

    def __init__(self, folder: Path) -> None:
        self._objects = folder / "objects"
        self._unfinished = folder / "unfinished"
        for part in (self._objects, self._unfinished):
            part.mkdir(parents=True, exist_ok=True)

    def get(self, key: str, *, max_bytes: int) -> bytes:
        return self._path(key).read_bytes()[:max_bytes]

    def get_range(self, key: str, start: int, length: int) -> bytes:
        with self._path(key).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def head(self, key: str) -> ObjectInfo | None:
        try:
            return ObjectInfo(size_bytes=self._path(key).stat().st_size, etag="")
        except NotFoundError:
            return None

    def list(self, prefix: str) -> Iterator[str]:
        keys = (path.relative_to(self._objects).as_posix() for path in self._objects.rglob("*") if path.is_file())
        yield from sorted(key for key in keys if key.startswith(prefix))

    def put(self, key: str, data: bytes, *, if_absent: bool = False, content_type: str = "") -> str:
        self._write(key, io.BytesIO(data), len(data), if_absent=if_absent)
        return ""

    def put_file(self, key: str, path: Path, *, progress: Progress | None = None) -> None:
        with path.open("rb") as source:
            self._write(key, source, path.stat().st_size, watched=True)

    def _write(
        self, key: str, source: IO[bytes], size_bytes: int, *, if_absent: bool = False, watched: bool = False
    ) -> None:
        """Write beside the objects, then give it its name."""
        target = self._objects / key
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._unfinished / secrets.token_hex(8)
        with fresh.open("wb", buffering=0) as file:
            left = size_bytes // 2 if watched else size_bytes
            while piece := source.read(min(left, PIECE_BYTES)):
                file.write(piece)
                left -= len(piece)
            if watched:
                self.in_the_middle()
                shutil.copyfileobj(source, file)
        if not if_absent:
            fresh.replace(target)
            return
        try:
            os.link(fresh, target)
        except FileExistsError as exc:
            raise ConflictError(f"somebody else wrote {key} first") from exc
        finally:
            fresh.unlink()

    def in_the_middle(self) -> None:
        """Called when half of a file has been written."""

    def _path(self, key: str) -> Path:
        path = self._objects / key
        if not path.is_file():
            raise NotFoundError(f"there is no {path}")
        return path
