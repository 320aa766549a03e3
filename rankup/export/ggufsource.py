"""What an export reads: a Hugging Face folder, file by file, each with a limit, and where its bytes come from.

What always holds:
- nothing larger than its limit is parsed, and no file outside the folder is opened;
- `Provenance` is only there where the folder was pulled and its sealed manifest is signed by the pinned key. The small
  files that an export reads are then hashed at once, tensors while they are read (`read_pieces`), so that a file never
  claims to be a version whose bytes it does not have.

It knows nothing about architectures or GGUF.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rankup.checkfiles import sealed_manifest
from rankup.errors import InputError, IntegrityError, NotFoundError, StateError, TooLargeError
from rankup.folder import ENVELOPE_NAME, read_folder_state, sha256_of
from rankup.records import Manifest
from rankup.tensorfile import TensorExtent, TensorFile
from rankup.versions import open_envelope

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
CONFIG: Final = "config.json"
TOKENIZER: Final = "tokenizer.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
CHAT_TEMPLATE: Final = "chat_template.jinja"

_MIB: Final = 1024**2
FILE_LIMITS: Final[Mapping[str, int]] = {
    CONFIG: _MIB,
    INDEX: 64 * _MIB,
    TOKENIZER: 128 * _MIB,
    TOKENIZER_CONFIG: 32 * _MIB,
    CHAT_TEMPLATE: _MIB,
    "chat_template.json": _MIB,
    "generation_config.json": _MIB,
    "added_tokens.json": 16 * _MIB,
    "special_tokens_map.json": 16 * _MIB,
    "merges.txt": 64 * _MIB,
    "vocab.json": 64 * _MIB,
    "README.md": _MIB,
}
"""The small files that an export or a converter may read, and the most bytes that each may have."""

_MAX_PARTS: Final = 4096


@dataclass(frozen=True)
class Provenance:
    """Which version the folder holds: its manifest, the manifest's digest, and the key that signed it (hex)."""

    manifest: Manifest
    digest: str
    publisher_key: str


@dataclass(frozen=True)
class ModelFolder:
    """A folder whose headers were read; `tensors` maps a tensor's name to its dtype, shape and place in its file."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorExtent]
    provenance: Provenance | None
    _parts: Mapping[str, Path]
    """Tensor name -> the file that holds it. No file stays open: a large model has more than a process may open."""

    def read_pieces(self, name: str, piece_bytes: int) -> Iterator[bytes]:
        """The raw little-endian bytes of one tensor, in pieces of `piece_bytes`, the last one shorter.

        Raises:
            IntegrityError: the file ends early or was replaced, or the tensor is not the one that the manifest names;
                then the last piece was still handed out.
        """
        extent = self.tensors[name]
        size_bytes = extent.stop - extent.start
        digest = hashlib.sha256()
        with TensorFile.open(self._parts[name]) as file:
            if file.entries.get(name) != extent:
                raise IntegrityError(f"{self._parts[name]} was replaced while it was read", remedy="Export again.")
            for start in range(0, size_bytes, piece_bytes):
                piece = file.read_part(name, start, min(piece_bytes, size_bytes - start))
                if self.provenance is not None:
                    digest.update(piece)
                yield piece
        if self.provenance is None:
            return
        entry = self.provenance.manifest.tensors.get(name)
        if entry is None or entry.export != digest.hexdigest():
            raise _changed(f"tensor {name}", self.provenance)


def open_folder(folder: Path) -> ModelFolder:
    """Open a model's folder for an export.

    Raises:
        NotFoundError: no such folder, or a file of it is missing.
        InputError: it is no model, has no safetensors, or holds masters instead of an export.
        TooLargeError: a small file is above its limit.
        IntegrityError: it was pulled and a file is not the one that its manifest names.
        StateError: a pull into it has not finished.
    """
    if not folder.is_dir():
        raise NotFoundError(f"there is no folder {folder}", remedy="Pull a version first: rankup pull URL --to DIR")
    for name, limit in FILE_LIMITS.items():
        path = folder / name
        if path.is_file() and path.stat().st_size > limit:
            raise TooLargeError(f"{path} has {path.stat().st_size} bytes; the limit is {limit}")
    provenance = _read_provenance(folder)
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} has no {CONFIG}: it is not a model's folder", remedy="Give the model's folder.")
    config = read_json(folder / CONFIG)
    tensors: dict[str, TensorExtent] = {}
    parts: dict[str, Path] = {}
    for part in _part_names(folder):
        with TensorFile.open(folder / part) as file:
            for name, extent in file.entries.items():
                if name in tensors:
                    raise IntegrityError(f"tensor {name!r} lies in {part} and in another file of {folder}")
                tensors[name], parts[name] = extent, folder / part
    _require_indexed(folder, parts)
    return ModelFolder(folder, config, tensors, provenance, parts)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the folder; its size was checked by `open_folder`.

    Raises:
        InputError: it is not a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as exc:
        raise InputError(f"{path} cannot be read as JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object")
    return value


def _part_names(folder: Path) -> list[str]:
    """The safetensors files that the folder's index names, or the only one."""
    if not (folder / INDEX).is_file():
        if (folder / WEIGHTS).is_file():
            return [WEIGHTS]
        raise InputError(f"{folder} has neither {WEIGHTS} nor {INDEX}", remedy="Give a folder with safetensors.")
    names = sorted(set(_weight_map(folder).values()))
    if len(names) > _MAX_PARTS:
        raise TooLargeError(f"{INDEX} names {len(names)} files; the limit is {_MAX_PARTS}")
    return names


def _weight_map(folder: Path) -> dict[str, str]:
    table = read_json(folder / INDEX).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise InputError(f"{folder / INDEX} has no weight_map")
    for file in table.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise InputError(f"{folder / INDEX} names {file!r}, which is no safetensors file of this folder")
    return table


def _require_indexed(folder: Path, parts: Mapping[str, Path]) -> None:
    """Every tensor lies where the index says, and the index names every tensor."""
    if not (folder / INDEX).is_file():
        return
    table = _weight_map(folder)
    found = {name: part.name for name, part in parts.items()}
    if odd := sorted(name for name in table.keys() | found.keys() if table.get(name) != found.get(name)):
        raise IntegrityError(f"tensor {odd[0]!r} does not lie where {INDEX} says", remedy="Pull the version again.")


def _read_provenance(folder: Path) -> Provenance | None:
    state = read_folder_state(folder)
    if state is None:
        return None
    if not state.complete:
        raise StateError(f"a pull into {folder} has not finished", remedy="Run `rankup pull` into it again.")
    if state.want != "export":
        raise InputError(f"{folder} holds float32 masters", remedy="Pull the version itself into another folder.")
    manifest, digest, key = open_envelope(
        sealed_manifest(folder), publisher_key=state.publisher_key, known_changes=state.keys
    )
    provenance = Provenance(manifest, digest, key)
    if digest != state.manifest:
        raise _changed(ENVELOPE_NAME, provenance)
    named = {file.path: file.sha256 for file in manifest.files}
    for name in FILE_LIMITS:
        path = folder / name
        if path.is_file() != (name in named) or (path.is_file() and sha256_of(path) != named[name]):
            raise _changed(name, provenance)
    return provenance


def _changed(what: str, provenance: Provenance) -> IntegrityError:
    manifest = provenance.manifest
    return IntegrityError(
        f"{what} is not that of {manifest.model} version {manifest.version}, which was pulled into this folder",
        remedy="Pull again; or copy the files that you changed into a folder of their own, without the dot files.",
    )
