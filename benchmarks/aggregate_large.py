"""Part 3 of benchmarks/aggregate.py: a fold of a model that is larger than memory, group by group, from files on disk.

`make_delta` and `make_groups` write what a fold starts from: the deltas once, and the float32 masters of one group at a
time. `fold` is one process for the whole model: it reads a line for each group, folds it with
`aggregator.fold.fold_group` over a store that is a folder, and answers with its seconds. The caller removes a group's
files before it asks for the next one, so a model needs the disk of one group.

What is not as in a real round: object storage is a folder (a blob is linked into it, and read by range), and masters
repeat their random values at other places.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import structlog
from aggregate_memory import base_tensors
from aggregate_run import MODELS, Model, serve, shares
from numpy.typing import NDArray

from aggregator.fold import fold_group
from aggregator.groups import MASTER_METADATA, master_path, plan_groups
from rankup.delta import DeltaHeader, write_delta
from rankup.errors import ConflictError, InputError, NotFoundError
from rankup.fixedpoint import Factors
from rankup.records import FileEntry, Group, Manifest, TensorEntry, Term
from rankup.settings import CoordinatorSettings
from rankup.store import ObjectInfo, blob_key
from rankup.tensorfile import TensorFileWriter

PATTERN: Final = 1 << 24
ZERO: Final = "0" * 64
PIECE_BYTES: Final = 8 * 1024**2


class FolderStore:
    """What a fold uses of `rankup.store.Store`, over a folder of the local disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, key: str) -> Path:
        return self._folder / key.replace("/", "_")

    def get(self, key: str, *, max_bytes: int) -> bytes:
        path = self.path(key)
        if not path.exists():
            raise NotFoundError(f"there is no {key}")
        return path.read_bytes()

    def get_range(self, key: str, start: int, length: int) -> bytes:
        with self.path(key).open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), length, start)
        if len(data) != length:
            raise InputError(f"{key} has no {length} bytes at {start}")
        return data

    def head(self, key: str) -> ObjectInfo | None:
        path = self.path(key)
        return ObjectInfo(path.stat().st_size, "") if path.exists() else None

    def put(self, key: str, data: bytes, *, if_absent: bool = False, content_type: str = "") -> str:
        if if_absent and self.path(key).exists():
            raise ConflictError(f"{key} is there")
        self.path(key).write_bytes(data)
        return ""

    def put_file(self, key: str, path: Path, *, progress: Any = None) -> None:
        with path.open("rb") as file:
            os.fsync(file.fileno())
        os.link(path, self.path(key))


# -- what a fold starts from -------------------------------------------------------------------------------------------


def plan(model: str) -> dict[str, Any]:
    """Names by group, as version 0 of a model has them: linear weights apart from the others. Bytes are of masters."""
    sizes = {name: 4 * int(np.prod(shape)) for name, shape in base_tensors(MODELS[model]).items()}
    linear = {name: size for name, size in sizes.items() if name.endswith("_proj.weight")}
    rest = {name: size for name, size in sizes.items() if name not in linear}
    limit = CoordinatorSettings().fold_group_bytes
    return {"groups": [*plan_groups(linear, limit), *plan_groups(rest, limit)], "bytes": sum(sizes.values())}


def make_delta(folder: str, model: str, rank: int, number: int) -> dict[str, Any]:
    """Write one contribution to every linear weight; mantissas are uniform."""
    shape = MODELS[model]
    rng = np.random.default_rng((3, number))
    factors = {}
    for layer in range(shape.layers):
        for name, (d_out, d_in) in shape.linear.items():
            b = rng.integers(-32767, 32767, (d_out, rank), dtype=np.int16, endpoint=True)
            a = rng.integers(-32767, 32767, (rank, d_in), dtype=np.int16, endpoint=True)
            factors[f"model.layers.{layer}.{name}.weight"] = Factors(
                b=b,
                b_exp=rng.integers(-27, -24, rank, dtype=np.int16),
                a=a,
                a_exp=rng.integers(-22, -20, rank, dtype=np.int16),
                b_max=np.abs(b).max(axis=0),
                a_max=np.abs(a).max(axis=1),
            )
    path = Path(folder) / f"delta-{number}"
    header = DeltaHeader(round_id="benchmark", lease_id=f"lease-{number}", base_manifest=ZERO)
    ref = write_delta(path, header, factors)
    path.rename(FolderStore(Path(folder)).path(blob_key(ref.sha256)))
    return {"sha256": ref.sha256, "size_bytes": ref.size_bytes}


def make_groups(folder: str, model: str) -> Iterator[dict[str, Any]]:
    """For each line of standard input, a list of names, write the master of one group; the answer has the manifest that
    a fold of it starts from."""
    pattern = (np.random.default_rng(4).standard_normal(PATTERN, dtype=np.float32) * np.float32(0.02)).view(np.uint8)
    for number, line in enumerate(sys.stdin):
        yield _make_group(Path(folder), MODELS[model], np.random.default_rng((4, number)), pattern, json.loads(line))


def _make_group(folder: Path, model: Model, rng: Any, pattern: NDArray[np.uint8], names: list[str]) -> dict[str, Any]:
    shapes = base_tensors(model)
    hashes = {name: hashlib.sha256() for name in names}
    path = folder / "master"
    with path.open("wb") as file:
        writer = TensorFileWriter(file, {name: ("F32", shapes[name]) for name in names}, MASTER_METADATA)
        for name in writer.order:
            left = 4 * int(np.prod(shapes[name]))
            while left:
                start = 4 * int(rng.integers(0, PATTERN))
                piece = pattern[start : start + min(left, PIECE_BYTES)]
                writer.append(name, piece.data)
                hashes[name].update(piece.data)
                left -= piece.nbytes
        ref = writer.finish()
        file.flush()
        os.fsync(file.fileno())
    blob = FolderStore(folder).path(blob_key(ref.sha256))
    path.rename(blob)
    master = FileEntry(sha256=ref.sha256, size_bytes=ref.size_bytes, path=master_path(1, 1))
    # A fold does not read its parent's export.
    export = FileEntry(sha256=ZERO, size_bytes=ref.size_bytes // 2, path="model.safetensors")
    manifest = Manifest(
        model="benchmark",
        version=0,
        parent=None,
        round_id=None,
        recipe=None,
        tensors={
            name: TensorEntry(
                shape=shapes[name],
                export_dtype="BF16",
                master=hashes[name].hexdigest(),
                export=ZERO,
                role="linear" if name.endswith("_proj.weight") else None,
            )
            for name in names
        },
        groups=(Group(tensors=tuple(sorted(names)), master=master, export=export),),
        files=(),
        base_model=model.name,
        licence="none",
        created_at=0.0,
    )
    return {"manifest": manifest.model_dump(mode="json"), "blob": str(blob), "bytes": ref.size_bytes}


# -- the fold ----------------------------------------------------------------------------------------------------------


def fold(folder: str, deltas: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """For each manifest that is read from standard input, the seconds of its fold and the files that it wrote."""
    store: Any = FolderStore(Path(folder))
    coefficients = shares(len(deltas), equal=False)
    terms = [
        Term(
            contribution=delta["sha256"],
            size_bytes=delta["size_bytes"],
            worker_id=f"worker-{number}",
            worker_name=f"worker {number}",
            shard=number,
            tokens=1,
            coefficient=coefficients[number],
        )
        for number, delta in enumerate(deltas)
    ]
    # Standard output is for the answers.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    for line in sys.stdin:
        manifest = Manifest.model_validate_json(line)
        before = manifest.groups[0].master.sha256
        cpu, wall = time.process_time(), time.perf_counter()
        folded = fold_group(store, manifest, 1, terms, 16)
        answer = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
        written = [file for file in (folded.group.master, folded.group.export) if file.sha256 not in (before, ZERO)]
        paths = [store.path(blob_key(file.sha256)) for file in written]
        yield answer | {"files": [str(path) for path in paths], "written": sum(file.size_bytes for file in written)}


WAYS: Final[dict[str, Any]] = {"plan": plan, "make_delta": make_delta}
STREAMS: Final[dict[str, Any]] = {"make_groups": make_groups, "fold": fold}

if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    if asked["way"] in STREAMS:
        for answer in STREAMS[asked.pop("way")](**asked):
            print(json.dumps(answer), flush=True)
    else:
        serve(lambda way, **arguments: WAYS[way](**arguments))
