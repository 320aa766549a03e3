"""Files of rows, read one row after the other: JSON lines, JSON lists and Parquet.

| ending | content |
|---|---|
| `.jsonl`, `.ndjson` | one JSON object a line, UTF-8; empty lines are skipped |
| `.json` | one list of JSON objects |
| `.parquet` | one row a record |

What always holds: every row keeps a number by which a message can name its file and line; no line and no file that is
read whole exceeds its limit here. Rows come out as JSON text with their images in them (`coordinator.images`): what
they mean is the matter of `coordinator.rows`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from coordinator.images import with_images
from rankup.errors import InputError, NotFoundError, TooLargeError

MAX_LINE_BYTES = 4 * 1024 * 1024
MAX_JSON_BYTES = 1024 * 1024 * 1024
RECORDS_AT_ONCE = 4096
IMAGES_AT_ONCE = 64
"""Records with images, which may have megabytes each."""
LINES_OF_A_FILE = 2**40
"""Room for the lines of one file in the number of a row, file * LINES_OF_A_FILE + line; lines count from 1."""

Rows = Iterable[Mapping[str, Any]] | Path | str | Sequence[Path]


@dataclass(frozen=True)
class Origin:
    """Where rows come from: files, or (where there are none) rows at hand."""

    files: tuple[Path, ...]
    rows: Iterable[Mapping[str, Any]] = ()

    @classmethod
    def of(cls, rows: Rows) -> Origin:
        """Files or rows. Raises NotFoundError for a file that is not there."""
        if isinstance(rows, Path | str):
            rows = [Path(rows)]
        if not (isinstance(rows, list | tuple) and rows and all(isinstance(row, Path) for row in rows)):
            return cls((), cast("Iterable[Mapping[str, Any]]", rows))
        files = tuple(Path(row) for row in cast("Sequence[Path]", rows))
        for path in files:
            if not path.is_file():
                raise NotFoundError(f"there is no file {path}", remedy="Check the path of the rows.")
        return cls(files)

    def read(self) -> Iterator[tuple[int, str]]:
        """Yield (number, JSON text) of every row; empty lines are skipped.

        Raises InputError and TooLargeError as `build_dataset`.
        """
        if not self.files:
            yield from _encoded(self.rows)
        for index, path in enumerate(self.files):
            for line, text in _read_file(path):
                yield index * LINES_OF_A_FILE + line, text

    def place(self, number: int) -> str:
        """What to call the row with this number in a message."""
        index, line = divmod(number, LINES_OF_A_FILE)
        return f"{self.files[index].name}, line {line}" if self.files else f"row {line}"


def _read_file(path: Path) -> Iterator[tuple[int, str]]:
    try:
        match path.suffix.lower():
            case ".jsonl" | ".ndjson":
                yield from _lines(path)
            case ".json":
                yield from _encoded(_json_list(path), path)
            case ".parquet":
                yield from _encoded(_parquet(path), path)
            case other:
                raise InputError(f"{path} ends in {other!r}, not in .jsonl, .ndjson, .json or .parquet")
    except OSError as exc:
        raise InputError(f"cannot read {path}: {exc}") from exc


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise TooLargeError(f"{path}, line {number}: longer than {MAX_LINE_BYTES} bytes")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as exc:
                raise InputError(f"{path}, line {number}: is not UTF-8: {exc.reason}") from exc
            if text:
                yield number, _with_images(text, path, number) if '"image' in text else text


def _with_images(text: str, path: Path, number: int) -> str:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return text  # What is wrong with a row is said where rows are read.
    return next(_encoded([row], path, first=number))[1]


def _json_list(path: Path) -> list[Any]:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise TooLargeError(f"{path} is above {MAX_JSON_BYTES} bytes", remedy="Write it as JSON lines (.jsonl).")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as exc:
        raise InputError(f"{path} is not JSON: {exc}") from exc
    if not isinstance(value, list):
        raise InputError(f"{path} holds no list of rows", remedy="Write one list of objects, or JSON lines (.jsonl).")
    return value


def _parquet(path: Path) -> Iterator[Any]:
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            pictured = {"image", "images"} & set(file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=IMAGES_AT_ONCE if pictured else RECORDS_AT_ONCE):
                yield from batch.to_pylist()
    except pa.ArrowException as exc:
        raise InputError(f"{path} cannot be read as Parquet: {exc}") from exc


def _encoded(rows: Iterable[Any], path: Path | None = None, *, first: int = 1) -> Iterator[tuple[int, str]]:
    for number, row in enumerate(rows, start=first):
        where = f"row {number}" if path is None else f"{path}, line {number}"
        try:
            row = with_images(row, path.parent if path else None) if isinstance(row, dict) else row
        except InputError as exc:
            raise InputError(f"{where}: {exc}", remedy=exc.remedy) from exc
        try:
            # ASCII, because half a surrogate pair has no UTF-8; cleaning removes it. Columns that JSON cannot hold
            # (dates, bytes) become null: a text field must not silently hold their Python notation.
            text = json.dumps(row, ensure_ascii=True, default=lambda _: None)
        except (TypeError, ValueError, RecursionError) as exc:
            raise InputError(f"{where}: is not JSON: {exc}") from exc
        if len(text) > MAX_LINE_BYTES:
            raise TooLargeError(f"{where}: longer than {MAX_LINE_BYTES} bytes")
        yield number, text
