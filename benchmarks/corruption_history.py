"""A small published history with every kind of file in it, for benchmarks/corruption.py.

The base is `aggregator.tiny`; two rounds of two contributions each are summed by `aggregator.fold` with Nesterov
momentum and published by `aggregator.publish`. The factors are random: what is measured is whether damage is found, not
what was learnt. It always has the same tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from rounds import DENOMINATOR_LOG2, next_version, publisher
from rounds_store import FolderStore

from aggregator.bases import fetch_base
from aggregator.genesis import make_version_zero
from rankup.delta import DeltaHeader, write_delta
from rankup.fixedpoint import quantise
from rankup.message import canonical_json
from rankup.recipe import Aggregation, OuterStep, Recipe
from rankup.records import Manifest, Retained, Term
from rankup.signing import public_key_hex
from rankup.store import blob_key, put_blob_file
from rankup.targets import select_targets
from rankup.versions import manifest_digest, manifest_key, pointer_key, retained_key

MODEL: Final = "tiny"
GROUP_BYTES: Final = 256 * 1024
RECIPE: Final = Recipe(
    rank=4,
    steps=1,
    aggregation=Aggregation(max_loss_mads=None, min_descent=None, outer=OuterStep(learning_rate=0.75, momentum=0.875)),
)


@dataclass(frozen=True)
class History:
    """Versions 0, 1 and 2 in `store`, whose folder is laid out as the bucket is."""

    store: FolderStore
    manifests: list[Manifest]
    publisher_key: str

    @property
    def files(self) -> Mapping[str, list[Path]]:
        """Kind -> what lies in object storage of it and is needed for version 2; of patches and deltas those of the
        last round, of masters and momenta those that it starts from."""
        last, parent = self.manifests[-1], self.manifests[-2]
        momenta = [group.momentum for group in parent.groups if group.momentum is not None]
        patches = [group.patch for group in last.groups if group.patch is not None]
        others = {file.path: [self._blob(file.sha256)] for file in last.files}
        return {
            "record of what is not kept": [self.store.path(retained_key(MODEL))],
            "pointer": [self.store.path(pointer_key(MODEL))],
            "manifest": [self.store.path(manifest_key(MODEL, last.version))],
            "manifest of the parent": [self.store.path(manifest_key(MODEL, parent.version))],
            "export": [self._blob(group.export.sha256) for group in last.groups],
            "patch": [self._blob(patch.sha256) for patch in patches],
            "master": [self._blob(group.master.sha256) for group in parent.groups],
            "momentum": [self._blob(momentum.sha256) for momentum in momenta],
            "delta": [self._blob(term.contribution) for term in last.terms],
            **others,
        }

    def _blob(self, sha256: str) -> Path:
        return self.store.path(blob_key(sha256))


def make_history(folder: Path) -> History:
    store: Any = FolderStore(folder / "store")
    key = publisher(folder)
    base = fetch_base("tiny", folder / "base")
    chain = [make_version_zero(store, key, model=MODEL, base=base, group_bytes=GROUP_BYTES, now=0.0)]
    rng = np.random.default_rng(0)
    for version in (1, 2):
        terms = [_contribution(folder, store, chain[-1], rng, number) for number in range(2)]
        ordered = tuple(sorted(terms, key=lambda term: term.contribution))
        chain.append(next_version(store, key, chain, ordered, RECIPE, round_id=_round_id(version)))
    gone = Retained(model=MODEL, gone={0: ("contributions",)})
    store.put(retained_key(MODEL), canonical_json(gone))
    return History(store, chain, public_key_hex(key))


def _round_id(version: int) -> str:
    return f"{MODEL}-{version}"


def _contribution(folder: Path, store: Any, parent: Manifest, rng: np.random.Generator, number: int) -> Term:
    factors = {
        name: quantise(
            5e-3 * rng.standard_normal((target.d_out, target.rank)), rng.standard_normal((target.rank, target.d_in))
        )
        for name, target in select_targets(parent.targets(), RECIPE).items()
    }
    path = folder / "contribution.delta"
    header = DeltaHeader(
        model=MODEL,
        round_id=_round_id(parent.version + 1),
        lease_id=f"lease-{number}",
        base_manifest=manifest_digest(parent),
    )
    ref = write_delta(path, header, factors)
    put_blob_file(store, path, ref=ref)
    path.unlink()
    return Term(
        contribution=ref.sha256,
        size_bytes=ref.size_bytes,
        worker_id=f"worker-{number}",
        worker_name=f"worker {number}",
        shard=number,
        tokens=1000,
        coefficient=(1 << DENOMINATOR_LOG2) // 2,
    )
