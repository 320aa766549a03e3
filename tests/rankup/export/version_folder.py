"""Small signed versions, pulled into a folder with the real pull."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from rankup.bfloat16 import to_bfloat16
from rankup.message import canonical_json
from rankup.protocol import Pointer
from rankup.pull import StoreSource, Want, pull
from rankup.records import FileEntry, Group, Manifest, TensorEntry
from rankup.signing import generate_private_key, parse_private_key, public_key_hex
from rankup.store import MemoryStore, put_blob
from rankup.tensorfile import write_tensor_file
from rankup.versions import manifest_digest, manifest_key, pointer_key, seal

KEY = parse_private_key(generate_private_key())
PUBLIC = public_key_hex(KEY)
MODEL = "toy"
SHAPES = {"up.weight": (96, 64), "down.weight": (16, 48)}
ONE_FILE = {"model.safetensors": ("down.weight", "up.weight")}
TWO_FILES = {"model-00001-of-00002.safetensors": ("up.weight",), "model-00002-of-00002.safetensors": ("down.weight",)}
README = "---\nlicense: mit\n---\n# toy, version {}\n"


def publish_version(
    store: MemoryStore, version: int, parent: Manifest | None, files: Mapping[str, Sequence[str]]
) -> Manifest:
    """Store a version whose tensors lie in these files."""
    groups, entries = [], {}
    for path, names in files.items():
        stored: dict[str, dict[str, Any]] = {"master": {}, "export": {}}
        for name in names:
            array = np.random.default_rng([version, len(name)]).standard_normal(SHAPES[name]).astype(np.float32)
            bits = to_bfloat16(array).tobytes()
            stored["master"][name] = ("F32", SHAPES[name], array.tobytes())
            stored["export"][name] = ("BF16", SHAPES[name], bits)
            entries[name] = TensorEntry(
                shape=SHAPES[name],
                export_dtype="BF16",
                master=hashlib.sha256(array.tobytes()).hexdigest(),
                export=hashlib.sha256(bits).hexdigest(),
                role="linear",
            )
        master, export = (_stored(store, prefix + path, stored[side]) for prefix, side in _SIDES)
        groups.append(Group(tensors=tuple(names), master=master, export=export))
    others = {"README.md": README.format(version), "config.json": "{}", "tokenizer.json": "[" + "0, " * 600 + "0]"}
    manifest = Manifest(
        model=MODEL,
        version=version,
        parent=None if parent is None else manifest_digest(parent),
        round_id=None if parent is None else f"round-{version}",
        recipe=None,
        tensors=entries,
        groups=tuple(groups),
        files=tuple(
            FileEntry(path=path, **put_blob(store, text.encode()).model_dump()) for path, text in sorted(others.items())
        ),
        base_model="someone/base",
        licence="mit",
        created_at=float(version),
    )
    store.put(manifest_key(MODEL, version), seal(manifest, KEY))
    pointer = Pointer(model=MODEL, version=version, manifest=manifest_digest(manifest), updated_at=1.0)
    store.put(pointer_key(MODEL), canonical_json(pointer))
    return manifest


_SIDES = (("master-", "master"), ("", "export"))


def _stored(store: MemoryStore, path: str, tensors: Mapping[str, Any]) -> FileEntry:
    buffer = BytesIO()
    write_tensor_file(buffer, tensors, {"format": "pt"})
    return FileEntry(path=path, **put_blob(store, buffer.getvalue()).model_dump())


def pulled(store: MemoryStore, to: Path, version: int | None = None, *, want: Want = "export") -> Path:
    pull(StoreSource(store), MODEL, version, to, want=want)
    return to
