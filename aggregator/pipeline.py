"""The pipeline: admission, fold, evaluation and publication of a round, as coroutines over Ray tasks.

What always holds:
- bytes move between tasks and object storage only; a task gets settings, records and numbers, and gives records back;
- every coroutine may be repeated after a crash at any point and then gives the same answer;
- errors of `rankup.errors` arrive as they were raised in the task; a task that died (killed, out of memory, node lost)
  arrives as a retryable UnreachableError;
- the object holds settings only, so it can be pickled into the actor that drives the rounds. The publisher's key is
  read from its file when it is needed and is never sent to a task.

It does not decide when anything happens, nor whether a version is released: the keeper does.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import tempfile
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

import ray
from pydantic import ValidationError

from aggregator.checkout import checkout, prune
from aggregator.fold import Folded, fold_group_task, next_tensors, store_from_wire
from aggregator.intake import admit
from aggregator.lowrank import coefficients
from aggregator.publish import carried_files, load_version, loadable_files, publish_manifest, version_files
from rankup.errors import IntegrityError, NotFoundError, RankupError, StateError, UnreachableError
from rankup.protocol import Pointer, Recipe
from rankup.records import DatasetCard, Evaluation, Manifest, Receipt, RoundRecord, Submission, Term
from rankup.settings import CoordinatorSettings, StoreSettings, state_home
from rankup.signing import load_private_key, public_key_hex
from rankup.store import Store
from rankup.versions import dataset_key, heldout_key, round_key

DENOMINATOR_LOG2 = 16
MAX_RECORD_BYTES = 256 * 1024**2
"""Cards and round records name every shard."""
MAX_HELDOUT_BYTES = 256 * 1024**2
EVALUATION_THREADS = 4


class Pipeline:
    """What the keeper needs done with a round. All times are Unix seconds."""

    def __init__(self, store_settings: StoreSettings, publisher_key_file: Path, settings: CoordinatorSettings) -> None:
        self._store_wire = store_settings.to_wire()
        self._publisher_key_file = publisher_key_file
        self._settings = settings
        self._cache = state_home() / "aggregator"

    async def admit(self, record: RoundRecord, submission: Submission, now: float) -> Receipt:
        """Judge a delta, keep it if it is good, and write the receipt: see `aggregator.intake.admit`."""
        receipt: Receipt = await _result(
            _admit_task.remote(self._store_wire, record, submission, self._settings.max_delta_bytes, now)
        )
        return receipt

    async def fold(self, record: RoundRecord, receipts: Sequence[Receipt], now: float) -> Manifest:
        """The next version's manifest, without evaluation and model card; its tensors and files are blobs by then.

        The same record, receipts and `now` give the same manifest, whatever the order of the receipts.
        Raises StateError (no accepted receipt), IntegrityError (a receipt of another round; the parent does not check
        out), and what object storage raises.
        """
        terms = weigh(record, receipts)
        parent = await asyncio.to_thread(self._parent, record)
        reference = await asyncio.to_thread(ray.put, parent)
        folded: list[Folded] = await asyncio.gather(
            *(
                _result(fold_group_task.remote(self._store_wire, reference, number, terms, DENOMINATOR_LOG2))
                for number in range(1, len(parent.groups) + 1)
            )
        )
        return await asyncio.to_thread(self._next_manifest, record, parent, terms, folded, now)

    async def evaluate(self, record: RoundRecord, manifest: Manifest) -> Evaluation:
        """Held-out loss of `manifest` and of its parent on the round's dataset, in nats per completion token."""
        parent = await asyncio.to_thread(self._parent, record)
        evaluation: Evaluation = await _result(
            _evaluate_task.remote(
                self._store_wire, record, manifest, parent, self._settings.heldout_examples, self._cache
            )
        )
        return evaluation

    async def publish(self, manifest: Manifest) -> Pointer:
        """Write the model card, then publish: see `aggregator.publish.publish_manifest`."""
        return await asyncio.to_thread(self._publish, manifest)

    def _store(self) -> Store:
        return store_from_wire(self._store_wire)

    def _parent(self, record: RoundRecord) -> Manifest:
        key = public_key_hex(load_private_key(self._publisher_key_file))
        model = record.request.model
        return load_version(self._store(), model, record.base_version, record.base_manifest, publisher_key=key)

    def _next_manifest(
        self, record: RoundRecord, parent: Manifest, terms: Sequence[Term], folded: Sequence[Folded], now: float
    ) -> Manifest:
        groups, tensors = next_tensors(folded)
        dataset = record.request.dataset
        draft = Manifest(
            model=parent.model,
            version=parent.version + 1,
            parent=record.base_manifest,
            round_id=record.round_id,
            recipe=record.request.recipe,
            denominator_log2=DENOMINATOR_LOG2,
            terms=tuple(terms),
            tensors=dict(tensors),
            groups=groups,
            files=carried_files(parent.files),
            base_model=parent.base_model,
            licence=parent.licence,
            datasets=parent.datasets if dataset in parent.datasets else (*parent.datasets, dataset),
            created_at=now,
        )
        return draft.model_copy(update={"files": loadable_files(self._store(), draft, draft.files)})

    def _publish(self, manifest: Manifest) -> Pointer:
        store = self._store()
        complete = manifest.model_copy(update={"files": version_files(store, manifest, manifest.files)})
        return publish_manifest(store, load_private_key(self._publisher_key_file), complete)


def weigh(record: RoundRecord, receipts: Sequence[Receipt]) -> tuple[Term, ...]:
    """The terms of a round's sum, sorted by contribution, with coefficients by the recipe's rule.

    Raises StateError when no receipt is an accepted one, IntegrityError for a receipt of another round or base.
    """
    accepted = {r.submission.statement.sha256: r for r in receipts if r.accepted}
    if not accepted:
        raise StateError(f"round {record.round_id} has no accepted contribution to fold")
    chosen = [accepted[digest] for digest in sorted(accepted)]
    for receipt in chosen:
        statement = receipt.submission.statement
        if (statement.round_id, statement.base_manifest) != (record.round_id, record.base_manifest):
            raise IntegrityError(f"contribution {statement.sha256[:12]}… belongs to another round or base")
    recipe = record.request.recipe
    weights = coefficients(
        [receipt.norm for receipt in chosen],
        [receipt.submission.statement.tokens for receipt in chosen],
        recipe.clip_norm_ratio,
        DENOMINATOR_LOG2,
    )
    return tuple(
        Term(
            contribution=receipt.submission.statement.sha256,
            size_bytes=receipt.submission.statement.size_bytes,
            worker_id=receipt.submission.worker_id,
            worker_name=receipt.submission.worker_name,
            shard=receipt.submission.shard,
            tokens=receipt.submission.statement.tokens,
            coefficient=weight,
        )
        for receipt, weight in zip(chosen, weights, strict=True)
    )


# -- tasks -------------------------------------------------------------------------------------------------------------


async def _result(reference: Awaitable[Any]) -> Any:
    """Await a Ray task; its own errors come out as they were raised, Ray's as retryable ones."""
    try:
        return await reference
    except ray.exceptions.RayTaskError as exc:
        # Ray raises a class of its own around the error, which hides our `cause` behind the original exception.
        if isinstance(exc.cause, RankupError):
            raise exc.cause from exc
        raise
    except ray.exceptions.RayError as exc:
        raise UnreachableError(
            f"an aggregation task died: {type(exc).__name__}",
            remedy="It is tried again; if that repeats, give the cluster more memory.",
        ) from exc


def _admit(store_wire: str, record: RoundRecord, submission: Submission, max_delta_bytes: int, now: float) -> Receipt:
    return admit(store_from_wire(store_wire), record, submission, max_delta_bytes=max_delta_bytes, now=now)


def _evaluate(
    store_wire: str, record: RoundRecord, manifest: Manifest, parent: Manifest, max_examples: int, folder: Path
) -> Evaluation:
    from aggregator.evaluate import heldout_loss

    store = store_from_wire(store_wire)
    dataset, recipe = record.request.dataset, record.request.recipe
    card = _read_card(store, dataset)
    rows = _read_heldout(store, card, max_examples)
    threads = min(EVALUATION_THREADS, os.cpu_count() or 1)
    blobs = folder / "blobs"

    def measure(version: Manifest) -> Any:
        with tempfile.TemporaryDirectory(dir=folder, prefix="version-") as path:
            checkout(store, version, blobs, Path(path))
            return heldout_loss(Path(path), rows, max_tokens=recipe.max_tokens, threads=threads)

    folder.mkdir(parents=True, exist_ok=True)
    loss = measure(manifest)
    known = _loss_known(store, parent, card, recipe, (loss.examples, loss.tokens))
    parent_loss = known if known is not None else measure(parent).loss
    prune(blobs, {file.sha256 for version in (manifest, parent) for file in version.export_files()})
    return Evaluation(
        heldout_loss=loss.loss, parent_heldout_loss=parent_loss, examples=loss.examples, tokens=loss.tokens
    )


_admit_task = ray.remote(num_cpus=1)(_admit)
_evaluate_task = ray.remote(num_cpus=1, max_retries=1)(_evaluate)


def _read_card(store: Store, dataset: str) -> DatasetCard:
    try:
        return DatasetCard.model_validate_json(store.get(dataset_key(dataset), max_bytes=MAX_RECORD_BYTES))
    except ValidationError as exc:
        raise IntegrityError(f"the card of dataset {dataset} cannot be read") from exc


def _read_heldout(store: Store, card: DatasetCard, max_examples: int) -> list[dict[str, Any]]:
    """The first `max_examples` held-out rows, hash-checked."""
    data = store.get(heldout_key(card.dataset, card.heldout.sha256), max_bytes=MAX_HELDOUT_BYTES)
    if hashlib.sha256(data).hexdigest() != card.heldout.sha256:
        raise IntegrityError(f"the held-out rows of {card.dataset} do not have the hash that its card gives")
    return [json.loads(line) for line in data.splitlines()[:max_examples] if line.strip()]


def _loss_known(
    store: Store, parent: Manifest, card: DatasetCard, recipe: Recipe, scored: tuple[int, int]
) -> float | None:
    """The parent's loss, when its own round measured it on the same rows, cut and scored in the same way."""
    before = parent.evaluation
    if before is None or parent.round_id is None or parent.recipe is None:
        return None
    try:
        data = store.get(round_key(parent.round_id), max_bytes=MAX_RECORD_BYTES)
        dataset = RoundRecord.model_validate_json(data).request.dataset
    except (NotFoundError, ValidationError):
        return None
    same_rows = dataset == card.dataset and card.created_at <= parent.created_at
    same_way = parent.recipe.max_tokens == recipe.max_tokens and (before.examples, before.tokens) == scored
    return before.heldout_loss if same_rows and same_way else None
