"""Histories of a toy model, made by the publisher's own code but for Ray, and an oracle of whole arrays beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from toy_world import LORA, RANK, make_world, random_model

from aggregator.cohort import DENOMINATOR_LOG2
from aggregator.fold import fold_group
from aggregator.pipeline import Pipeline
from aggregator.published import latest_version, on_parent
from aggregator.tasks import Retrain
from rankup.bfloat16 import to_bfloat16
from rankup.delta import DeltaHeader, write_delta
from rankup.exactsum import fold_tensor
from rankup.fixedpoint import Factors, quantise
from rankup.protocol import RoundRequest
from rankup.recipe import PLAIN_SUM, Aggregation, OuterStep, Recipe
from rankup.records import Manifest, RoundRecord, TensorEntry, Term
from rankup.settings import CoordinatorSettings, StoreSettings
from rankup.signing import Ed25519PrivateKey, load_private_key, public_key_hex, save_private_key
from rankup.store import MemoryStore, Store, put_blob
from rankup.versions import manifest_digest

MODEL = "toy"
WRITES = ("put", "swap", "put_file")
NESTEROV = OuterStep(learning_rate=0.75, momentum=0.875)


class LocalPipeline(Pipeline):
    """The pipeline with a store of this process; folds are called without a cluster."""

    def __init__(self, store: Store, key_file: Path, retrain: Retrain | None = None) -> None:
        super().__init__(StoreSettings(), key_file, CoordinatorSettings(audits=retrain is not None), retrain)
        self.memory = store

    def _store(self) -> Store:
        return self.memory

    def fold_here(self, record: RoundRecord, terms: Sequence[Term]) -> Manifest:
        parent = self._parent(record)
        stated = on_parent(record, manifest_digest(parent), terms)
        outer = record.request.recipe.aggregation.outer
        folded = [
            fold_group(self.memory, parent, number, stated, DENOMINATOR_LOG2, outer=outer)
            for number in range(1, len(parent.groups) + 1)
        ]
        return self._next_manifest(record, parent, stated, folded, record.opened_at + 10)

    def publish_here(self, manifest: Manifest) -> int:
        return self._publish(manifest).version


@dataclass(frozen=True)
class Played:
    """A round with its contributions: what the oracle needs of it."""

    record: RoundRecord
    terms: tuple[Term, ...]
    factors: dict[str, dict[str, Factors]]
    """Contribution -> weight -> factors."""

    @property
    def outer(self) -> OuterStep:
        return self.record.request.recipe.aggregation.outer

    def __getitem__(self, index: int) -> str:
        return self.terms[index].contribution


@dataclass
class UndoWorld:
    folder: Path
    store: MemoryStore
    key_file: Path
    pipeline: LocalPipeline
    rounds: list[Played] = field(default_factory=list)

    @property
    def key(self) -> Ed25519PrivateKey:
        return load_private_key(self.key_file)

    @property
    def public(self) -> str:
        return public_key_hex(self.key)

    def latest(self) -> Manifest:
        return latest_version(self.store, MODEL, publisher_key=self.public).manifest

    def open(self, outer: OuterStep = PLAIN_SUM, count: int = 3) -> Played:
        """A round on the latest version with its accepted contributions; the last one has no part in the sum."""
        base = self.latest()
        number = len(self.rounds) + 1
        recipe = Recipe(rank=RANK, steps=5, max_tokens=16, partial=True, aggregation=Aggregation(outer=outer))
        targets = base.targets()
        record = RoundRecord(
            round_id=f"round-{number}",
            request=RoundRequest(model=MODEL, dataset="docs", recipe=recipe, shards=4),
            index=0,
            base_version=base.version,
            base_manifest=manifest_digest(base),
            shards=(),
            targets={name: target.model_copy(update={"rank": RANK}) for name, target in targets.items()},
            opened_at=1e9 + number,
        )
        made = sorted((self._contribute(record, shard) for shard in range(count + 1)), key=lambda one: one[0])
        terms = tuple(
            Term(
                contribution=digest,
                size_bytes=size,
                worker_id=f"w-{shard:016x}",
                worker_name=f"worker {shard}",
                shard=shard,
                tokens=100,
                coefficient=0 if shard == count else 15000 + 100 * number + shard,
            )
            for digest, size, shard, _ in made
        )
        counted = sorted(terms, key=lambda term: (term.coefficient == 0, term.contribution))
        played = Played(record, tuple(counted), {digest: factors for digest, _, _, factors in made})
        self.rounds.append(played)
        return played

    def _contribute(self, record: RoundRecord, shard: int) -> tuple[str, int, int, dict[str, Factors]]:
        rng = np.random.default_rng([len(self.rounds), shard])
        factors = {
            name: quantise(0.05 * rng.standard_normal((t.d_out, RANK)), rng.standard_normal((RANK, t.d_in)))
            for place, (name, t) in enumerate(record.targets.items())
            if place % 3 != shard % 3
        }
        header = DeltaHeader(
            model=MODEL, round_id=record.round_id, lease_id=f"lease-{shard}", base_manifest=record.base_manifest
        )
        path = self.folder / "delta"
        ref = write_delta(path, header, factors)
        put_blob(self.store, path.read_bytes())
        path.unlink()
        return ref.sha256, ref.size_bytes, shard, factors

    def fold(self, played: Played) -> Manifest:
        return self.pipeline.fold_here(played.record, sorted(played.terms, key=lambda term: term.contribution))

    def publish(self, manifest: Manifest) -> int:
        return self.pipeline.publish_here(manifest)

    def play(self, outer: OuterStep = PLAIN_SUM, count: int = 3) -> Played:
        """One whole round."""
        played = self.open(outer, count)
        self.publish(self.fold(played))
        return played


def make_undo_world(folder: Path) -> UndoWorld:
    world = make_world(folder)
    key_file = folder / "server" / "publisher.key"
    save_private_key(key_file, world.key_pem)
    return UndoWorld(folder, world.store, key_file, LocalPipeline(world.store, key_file))


def oracle(sums: Iterable[tuple[Played, Collection[str]]]) -> dict[str, tuple[str, str, str | None]]:
    """Weight -> hashes of master, export and momentum after these rounds, each without some contributions."""
    masters = {name: array for name, array in random_model().items() if name in LORA}
    momenta: dict[str, np.ndarray] = {}
    for played, without in sums:
        beta, rate = np.float32(played.outer.momentum), np.float32(played.outer.learning_rate)
        for name, master in masters.items():
            pairs = [
                (term.coefficient, played.factors[term.contribution][name])
                for term in played.terms
                if term.coefficient and term.contribution not in without and name in played.factors[term.contribution]
            ]
            momentum = momenta.get(name) if beta else None
            if not pairs and momentum is None:
                continue
            delta = fold_tensor(np.zeros_like(master), pairs, DENOMINATOR_LOG2)
            if beta:
                momenta[name] = (beta * momentum if momentum is not None else np.zeros_like(delta)) + delta
                delta = delta + beta * momenta[name]
            masters[name] = master + rate * delta
        if not beta:
            momenta.clear()
    return {
        name: (sha256(master), sha256(to_bfloat16(master)), sha256(momenta[name]) if name in momenta else None)
        for name, master in masters.items()
    }


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def bits(manifest: Manifest) -> dict[str, tuple[str, str, str | None]]:
    """The same of a version."""

    def of(entry: TensorEntry) -> tuple[str, str, str | None]:
        return entry.master, entry.export, entry.momentum

    return {name: of(entry) for name, entry in manifest.tensors.items() if name in LORA}


# -- processes that die ------------------------------------------------------------------------------------------------


class StumblingError(Exception):
    """What a killed process leaves is what was written before it."""


def stumble_at(store: Store, write: int) -> None:
    """Let the `write`-th write from now on, counted from 0, and all after it never happen."""
    count = 0

    def guarded(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count > write:
                raise StumblingError
            return real(*args, **options)

        return call

    for name in WRITES:
        setattr(store, name, guarded(getattr(store, name)))


def steady(store: Store) -> None:
    """Let writes happen again."""
    for name in WRITES:
        store.__dict__.pop(name, None)
