"""Manifests and dataset cards that cards are made from, on top of the toy world."""

from __future__ import annotations

import hashlib

from toy_world import NOW, World

from rankup.records import BlobRef, DatasetCard, Evaluation, Manifest, PipelineStep, Term
from rankup.versions import manifest_digest


def child(world: World, parent: Manifest | None = None, *, round_id: str = "round-1", name: str = "Ada") -> Manifest:
    """A next version; its tensors differ from the parent's in one hash that stands for all."""
    parent = parent if parent is not None else world.parent
    changed = parent.tensors["layer.0.up.weight"].model_copy(update={"master": f"{parent.version + 1:064x}"})
    term = Term(
        contribution="ab" * 32,
        size_bytes=10,
        worker_id="w-1",
        worker_name=name,
        shard=2,
        tokens=1234567,
        coefficient=65536,
    )
    return parent.model_copy(
        update={
            "version": parent.version + 1,
            "parent": manifest_digest(parent),
            "round_id": round_id,
            "recipe": world.record.request.recipe,
            "terms": (term,),
            "tensors": {**parent.tensors, "layer.0.up.weight": changed},
            "datasets": ("docs",),
            "evaluation": Evaluation(heldout_loss=2.5, parent_heldout_loss=2.75, examples=8, tokens=99),
            "software": "rankup 0.1.0",
            "created_at": NOW,
        }
    )


def dataset_card(
    name: str = "docs", *, licence: str = "CC-BY-4.0", source: str = "a thousand questions"
) -> DatasetCard:
    blobs = [BlobRef(sha256=hashlib.sha256(bytes([n])).hexdigest(), size_bytes=10 + n) for n in range(4)]
    return DatasetCard(
        dataset=name,
        source=source,
        licence=licence,
        rows=900,
        heldout_rows=64,
        shards=tuple(blobs[:3]),
        heldout=blobs[3],
        pipeline=(
            PipelineStep(name="read", rows_in=1000, rows_out=1000, detail="one file"),
            PipelineStep(name="deduplicate", rows_in=1000, rows_out=964, detail="by hash of the row"),
        ),
        created_at=NOW,
    )
