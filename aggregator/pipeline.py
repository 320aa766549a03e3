"""The pipeline: admission, cohort, fold, evaluation and publication of a round, as coroutines over the cluster's tasks.

What always holds:
- every coroutine may be repeated after a crash at any point and then gives the same answer: verdicts and the decision
  about a cohort are written once, finished groups of a fold are found again;
- the object holds settings only, so it can be pickled into the actor that drives the rounds. The publisher's key is
  read from its file when it is needed and is never sent to a task.

It does not decide when anything happens, nor whether a version is released: the keeper does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from aggregator import tasks
from aggregator.audit import chosen
from aggregator.cohort import (
    DENOMINATOR_LOG2,
    Measured,
    accepted_receipts,
    blob_of,
    buckets,
    decide,
    settle,
    stored_cohort,
    terms_of,
)
from aggregator.fold import next_tensors
from aggregator.publish import carried_files, load_version, loadable_files, publish_manifest
from aggregator.published import (
    SOFTWARE,
    latest_version,
    leaves_in,
    on_parent,
    parent_of_round,
    published_already,
    require_signer,
    with_cards,
    with_log,
)
from aggregator.screening import MIN_COMPARED
from rankup.errors import ConflictError
from rankup.lineage import leaves_of_round
from rankup.protocol import Pointer
from rankup.records import BlobRef, Cohort, Evaluation, FoldedGroup, Manifest, Receipt, RoundRecord, Submission, Term
from rankup.settings import CoordinatorSettings, StoreSettings, state_home
from rankup.signing import load_private_key, public_key_hex, sign_bytes
from rankup.store import Store
from rankup.versions import manifest_digest

LOSSES_A_TASK = 16
"""Contributions whose losses one task measures: it loads the base once for all of them."""


class Pipeline:
    """What the keeper needs done with a round. All times are Unix seconds.

    `retrain` trains shards again where the settings ask for audits; None: nothing is audited.
    """

    def __init__(
        self,
        store_settings: StoreSettings,
        publisher_key_file: Path,
        settings: CoordinatorSettings,
        retrain: tasks.Retrain | None = None,
    ) -> None:
        self._store_wire = store_settings.to_wire()
        self._publisher_key_file = publisher_key_file
        self._settings = settings
        self._retrain = retrain if settings.audits else None
        self._cache = state_home() / "aggregator"

    async def admit(self, record: RoundRecord, submission: Submission, now: float, valid_in_a_row: int) -> Receipt:
        """Judge a delta, keep it if it is good, and write the receipt: see `aggregator.intake.admit`."""
        trained_in = await asyncio.to_thread(self._audited, record, submission, valid_in_a_row)
        receipt: Receipt = await tasks.result_of(
            tasks.admit_task.remote(
                self._store_wire,
                record.round_id,
                submission,
                self._settings.max_delta_bytes,
                now,
                trained_in,
                self._retrain,
                self._cache,
            )
        )
        return receipt

    async def fold(self, record: RoundRecord, receipts: Sequence[Receipt], now: float) -> Manifest:
        """The next version's manifest, without evaluation and model card; its tensors and files are blobs by then.

        It is added to the round's base or, where only undone and re-signed versions came since, to the latest version.
        The same record, receipts, `now` and parent give the same manifest, whatever the order of the receipts.
        Raises StateError (no accepted receipt), InputError (none passed the screening; another round was faster),
        IntegrityError (a receipt of another round; the parent does not check out), and what object storage raises.
        """
        members = accepted_receipts(record, receipts)
        parent = await asyncio.to_thread(self._parent, record)
        shared = await asyncio.to_thread(tasks.share, parent)
        cohort = await asyncio.to_thread(stored_cohort, self._store(), record.round_id)
        if cohort is None:
            cohort = await self._decide(record, members, shared, now)
        # Also of a decision that was found: a crash may have come before its checks were noted.
        cohort = await asyncio.to_thread(settle, self._store(), cohort)
        terms = on_parent(record, manifest_digest(parent), terms_of(record, cohort, members))
        fold_group = tasks.fold_group_task.options(num_gpus=tasks.gpu_share())
        folded: list[FoldedGroup] = await asyncio.gather(
            *(
                tasks.result_of(fold_group.remote(self._store_wire, shared, record, number, terms))
                for number in range(1, len(parent.groups) + 1)
            )
        )
        return await asyncio.to_thread(self._next_manifest, record, parent, terms, folded, now)

    async def evaluate(self, record: RoundRecord, manifest: Manifest) -> Evaluation:
        """Held-out loss of `manifest`, which `fold` made, and of its parent on the round's dataset, in nats per
        completion token."""
        parent = await asyncio.to_thread(self._before, manifest)
        evaluation: Evaluation = await tasks.result_of(
            tasks.evaluate_task.remote(
                self._store_wire, record, manifest, parent, self._settings.heldout_examples, self._cache
            )
        )
        return evaluation

    async def publish(self, manifest: Manifest) -> Pointer:
        """Write the cards, then publish: see `aggregator.publish.publish_manifest`.

        Raises ConflictError where the latest version is neither its parent nor this one: fold again, on that one.
        """
        return await asyncio.to_thread(self._publish, manifest)

    async def _decide(self, record: RoundRecord, members: Sequence[Receipt], parent: object, now: float) -> Cohort:
        refs = [blob_of(receipt) for receipt in members]
        names = sorted(record.targets)
        grams = asyncio.gather(
            *(
                tasks.result_of(tasks.gram_task.remote(self._store_wire, refs[part], names))
                for part in buckets(len(refs))
            )
        )
        measured = await self._measure(record, refs, parent)
        return await asyncio.to_thread(decide, record, members, await grams, measured, now)

    async def _measure(self, record: RoundRecord, refs: Sequence[BlobRef], parent: object) -> Measured:
        """Losses and slopes on held-out rows, where the recipe asks for them and there is a cohort to compare with."""
        aggregation = record.request.recipe.aggregation
        if len(refs) < MIN_COMPARED:
            return Measured()
        wanted: list[tuple[Sequence[BlobRef], tasks.Purpose, int]] = []
        if aggregation.max_loss_mads is not None:
            for start in range(0, len(refs), LOSSES_A_TASK):
                part = refs[start : start + LOSSES_A_TASK]
                wanted.append((part, "loss", self._settings.screening_examples))
        if aggregation.min_descent is not None:
            wanted.append((refs, "descent", self._settings.descent_examples))
        found: list[Measured] = await asyncio.gather(
            *(
                tasks.result_of(
                    tasks.measure_task.remote(self._store_wire, record, parent, part, purpose, rows, self._cache)
                )
                for part, purpose, rows in wanted
            )
        )
        return Measured(
            base_loss=next((part.base_loss for part in found if part.base_loss is not None), None),
            losses={digest: loss for part in found for digest, loss in part.losses.items()},
            descents={digest: value for part in found for digest, value in part.descents.items()},
        )

    def _audited(self, record: RoundRecord, submission: Submission, valid_in_a_row: int) -> tasks.TrainedIn | None:
        """If the delta is to be audited: the round that it was trained for, and the versions that it was trained on and
        with."""
        statement = submission.statement
        age = record.staleness(statement.base_manifest)
        if self._retrain is None or age is None:
            return None
        # Ed25519 signatures are deterministic: the same secret after a restart, and nobody else has it.
        secret = bytes.fromhex(sign_bytes(load_private_key(self._publisher_key_file), "audit", b""))
        if not chosen(secret, statement.sha256, valid_in_a_row):
            return None
        late = statement.round_id != record.round_id
        trained_in = tasks.stored_round(self._store(), statement.round_id) if late else record
        if trained_in is None:
            return None
        base = self._load(record.request.model, record.base_version - age, statement.base_manifest)
        taught_by = trained_in.teacher
        teacher = None if taught_by is None else self._load(taught_by.model, taught_by.version, taught_by.manifest)
        return tasks.TrainedIn(trained_in, base, teacher)

    def _store(self) -> Store:
        return tasks.store_from_wire(self._store_wire)

    def _public_key(self) -> str:
        return public_key_hex(load_private_key(self._publisher_key_file))

    def _parent(self, record: RoundRecord) -> Manifest:
        """What the round's sum is added to."""
        return parent_of_round(self._store(), record, publisher_key=self._public_key()).manifest

    def _before(self, manifest: Manifest) -> Manifest:
        return self._load(manifest.model, manifest.version - 1, manifest.parent or "")

    def _load(self, model: str, version: int, digest: str) -> Manifest:
        store, key = self._store(), self._public_key()
        keys = latest_version(store, model, publisher_key=key).manifest.keys
        return load_version(store, model, version, digest, publisher_key=key, known_changes=keys)

    def _next_manifest(
        self, record: RoundRecord, parent: Manifest, terms: Sequence[Term], folded: Sequence[FoldedGroup], now: float
    ) -> Manifest:
        store = self._store()
        groups, tensors = next_tensors(folded)
        dataset = record.request.dataset
        draft = Manifest(
            model=parent.model,
            version=parent.version + 1,
            parent=manifest_digest(parent),
            round_id=record.round_id,
            recipe=record.request.recipe,
            denominator_log2=DENOMINATOR_LOG2,
            terms=tuple(terms),
            tensors=dict(tensors),
            groups=groups,
            files=carried_files(parent.files),
            keys=parent.keys,
            software=SOFTWARE,
            base_model=parent.base_model,
            licence=parent.licence,
            datasets=parent.datasets if dataset in parent.datasets else (*parent.datasets, dataset),
            created_at=now,
        )
        leaves = (*leaves_in(store, parent, publisher_key=self._public_key()), *leaves_of_round(draft))
        files, log = with_log(store, draft.model, loadable_files(store, draft, draft.files), leaves)
        return draft.model_copy(update={"files": files, "log": log})

    def _publish(self, manifest: Manifest) -> Pointer:
        store, private_key = self._store(), load_private_key(self._publisher_key_file)
        key = public_key_hex(private_key)
        if (done := published_already(store, manifest, publisher_key=key)) is not None:
            return done
        require_signer(manifest, key)
        try:
            return publish_manifest(store, private_key, with_cards(store, manifest, publisher_key=key))
        except ConflictError:
            # Whoever found the manifest there may have moved the pointer to it already.
            if (done := published_already(store, manifest, publisher_key=key)) is None:
                raise
            return done
