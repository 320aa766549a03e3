"""A small world for the aggregator's tests: a random model in memory, a round on it, and workers with deltas."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from aggregator.groups import plan_groups, write_group
from aggregator.publish import publish_manifest, version_files
from rankup.delta import DeltaHeader, write_delta
from rankup.dtypes import Dtype
from rankup.fixedpoint import Factors, quantise
from rankup.protocol import RoundRequest, SubmitStatement
from rankup.recipe import Recipe
from rankup.records import BlobRef, FileEntry, Manifest, RoundRecord, Submission, TensorEntry
from rankup.signing import (
    Ed25519PrivateKey,
    generate_private_key,
    parse_private_key,
    public_key_hex,
    sign,
    worker_id_of,
)
from rankup.store import MemoryStore, Store, put_blob
from rankup.targets import Role, Target
from rankup.versions import manifest_digest, upload_key

SHAPES: Mapping[str, tuple[int, ...]] = {
    "embed.weight": (40, 16),
    "layer.0.down.weight": (16, 24),
    "layer.0.up.weight": (24, 16),
    "layer.1.down.weight": (16, 24),
    "layer.1.up.weight": (24, 16),
    "norm.weight": (16,),
    "position_ids": (8,),
}
LORA = frozenset(name for name in SHAPES if name.startswith("layer."))
RANK = 3
NOW = 1_750_000_000.0
MAX_DELTA_BYTES = 1024**2


def random_model(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    model: dict[str, np.ndarray] = {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items() if name != "position_ids"
    }
    model["position_ids"] = np.arange(8, dtype=np.int64)
    return model


def store_model(
    store: Store,
    tensors: Mapping[str, np.ndarray],
    group_bytes: int,
    roles: Mapping[str, Role] = dict.fromkeys(LORA, "linear"),
) -> Manifest:
    """A version 0 of these tensors in groups of `group_bytes`, not yet sealed."""
    dtypes: dict[str, Dtype] = {n: "I64" if a.dtype == np.int64 else "BF16" for n, a in tensors.items()}
    plan = plan_groups({name: array.nbytes for name, array in tensors.items()}, group_bytes)
    groups, entries = [], dict[str, TensorEntry]()
    for number, names in enumerate(plan, start=1):
        members = {name: tensors[name] for name in names}
        group, part = write_group(store, number, len(plan), members, dtypes, roles)
        groups.append(group)
        entries |= part
    config = put_blob(store, b'{"model_type": "toy"}')
    return Manifest(
        model="toy",
        version=0,
        parent=None,
        round_id=None,
        recipe=None,
        tensors=entries,
        groups=tuple(groups),
        files=(FileEntry(sha256=config.sha256, size_bytes=config.size_bytes, path="config.json"),),
        base_model="someone/toy",
        licence="Apache-2.0",
        created_at=NOW - 100,
    )


@dataclass
class World:
    """A published version 0, a round on it, and as many workers as a test asks for."""

    folder: Path
    store: MemoryStore
    key_pem: bytes
    parent: Manifest
    record: RoundRecord
    workers: dict[int, bytes] = field(default_factory=dict)

    @property
    def publisher(self) -> Ed25519PrivateKey:
        return parse_private_key(self.key_pem)

    def header(self, shard: int) -> DeltaHeader:
        return DeltaHeader(
            model="toy",
            round_id=self.record.round_id,
            lease_id=f"lease-{shard}",
            base_manifest=self.record.base_manifest,
        )

    def factors(self, seed: int, *, rank: int = RANK, scale: float = 0.01) -> dict[str, Factors]:
        rng = np.random.default_rng(seed)
        return {
            name: quantise(scale * rng.standard_normal((target.d_out, rank)), rng.standard_normal((rank, target.d_in)))
            for name, target in self.record.targets.items()
        }

    def delta(self, shard: int, factors: Mapping[str, Factors] | None = None, **header: str) -> tuple[Path, BlobRef]:
        path = self.folder / f"{shard}.delta"
        made = factors if factors is not None else self.factors(shard)
        return path, write_delta(path, self.header(shard).model_copy(update=header), made)

    def submission(self, shard: int, ref: BlobRef, *, tokens: int = 100, **changes: object) -> Submission:
        """A signed submission; `changes` go into the statement before it is signed."""
        private = parse_private_key(self.workers.setdefault(shard, generate_private_key()))
        statement = SubmitStatement(
            round_id=self.record.round_id,
            lease_id=f"lease-{shard}",
            fence=1,
            base_manifest=self.record.base_manifest,
            sha256=ref.sha256,
            size_bytes=ref.size_bytes,
            tokens=tokens,
            steps=5,
            first_loss=3.0,
            last_loss=2.0,
            seconds=10.0,
        ).model_copy(update=changes)
        public = public_key_hex(private)
        return Submission(
            statement=statement,
            signature=sign(private, "submit", statement),
            public_key=public,
            worker_id=worker_id_of(public),
            worker_name=f"worker {shard}",
            shard=shard,
            submitted_at=NOW,
        )

    def upload(self, submission: Submission, path: Path) -> None:
        self.store.put(upload_key(submission.statement.lease_id, submission.statement.sha256), path.read_bytes())


def make_world(folder: Path, *, group_bytes: int = 4000, shards: int = 4, seed: int = 0) -> World:
    store, pem = MemoryStore(), generate_private_key()
    draft = store_model(store, random_model(seed), group_bytes)
    parent = draft.model_copy(update={"files": version_files(store, draft, draft.files)})
    publish_manifest(store, parse_private_key(pem), parent)
    record = RoundRecord(
        round_id="round-1",
        request=RoundRequest(
            model="toy",
            dataset="docs",
            recipe=Recipe(rank=RANK, steps=5, batch_size=4, max_tokens=16),
            shards=shards,
        ),
        index=0,
        base_version=0,
        base_manifest=manifest_digest(parent),
        shards=tuple(BlobRef(sha256=hashlib.sha256(bytes([n])).hexdigest(), size_bytes=1) for n in range(shards)),
        targets={name: Target(d_out=SHAPES[name][0], d_in=SHAPES[name][1], rank=RANK) for name in sorted(LORA)},
        opened_at=NOW - 50,
    )
    return World(folder, store, pem, parent, record)
