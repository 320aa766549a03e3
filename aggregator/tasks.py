"""What the aggregator runs on the cluster: each step of a round as a Ray task over object storage.

What always holds:
- bytes move between tasks and object storage only; a task gets settings, records and numbers, and gives records back;
- errors of `rankup.errors` arrive as they were raised in the task; a task that died (killed, out of memory, node lost)
  arrives as a retryable UnreachableError;
- a task may be run twice: what it writes is content-addressed or written once.

This is the only module of the room that imports ray.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial, wraps
from pathlib import Path
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

import numpy as np
import ray
import structlog
from numpy.typing import NDArray

from aggregator import kernels
from aggregator.audit import agreement, judge
from aggregator.checkout import checkout, prune
from aggregator.cohort import DENOMINATOR_LOG2, Measured, StoredDelta, bucket_gram, factors_of
from aggregator.fold import fold_digest, fold_group
from aggregator.intake import admit
from rankup.delta import DeltaReader
from rankup.errors import FatalError, IntegrityError, NotFoundError, RankupError, UnreachableError
from rankup.logs import configure_server
from rankup.products import KERNELS
from rankup.recipe import Recipe
from rankup.records import (
    BlobRef,
    Check,
    DatasetCard,
    Evaluation,
    FoldedGroup,
    Manifest,
    Receipt,
    RoundRecord,
    Submission,
    Term,
)
from rankup.settings import StoreSettings
from rankup.store import Store, open_store
from rankup.stored import read_record
from rankup.versions import dataset_key, fold_key, heldout_key, manifest_digest, round_key

log = structlog.get_logger(__name__)

"""Cards and round records name every shard."""
MAX_HELDOUT_BYTES = 256 * 1024**2
EVALUATION_THREADS = 4

Purpose = Literal["loss", "descent"]
"""What contributions are measured for: see `aggregator.losses` and `aggregator.descent`."""

Retrain = Callable[[Store, RoundRecord, Submission, Path, Path | None, Path], Path]
"""(store, record, submission, folder of the base, of its teacher, for scratch): trains a lease's shards again; the
delta's path."""


class TrainedIn(NamedTuple):
    """What a delta was trained in and on."""

    record: RoundRecord
    base: Manifest
    teacher: Manifest | None = None


P = ParamSpec("P")
R = TypeVar("R")


NICENESS = 10
"""Of task processes: the gateway comes first."""


@lru_cache(maxsize=1)
def _settle_in() -> None:
    """Once in a worker process."""
    configure_server("task")
    os.nice(max(0, NICENESS - os.nice(0)))


def _logged(function: Callable[P, R]) -> Callable[P, R]:
    """A task whose log events carry the ids of the round and of the submission that it is given."""

    @wraps(function)
    def task(*args: P.args, **kwargs: P.kwargs) -> R:
        _settle_in()
        ids: dict[str, str] = {}
        for given in (*args, *kwargs.values()):
            if isinstance(given, RoundRecord):
                ids["round_id"] = given.round_id
            elif isinstance(given, Submission):
                said = given.statement
                ids |= {"round_id": said.round_id, "lease_id": said.lease_id, "contribution": said.sha256}
        with structlog.contextvars.bound_contextvars(**ids):
            return function(*args, **kwargs)

    return task


@lru_cache(maxsize=2)
def store_from_wire(wire: str) -> Store:
    """The store of `StoreSettings.to_wire`; one client for all tasks of a worker process."""
    return open_store(StoreSettings.from_wire(wire))


async def result_of(reference: Awaitable[Any]) -> Any:
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


def share(value: Any) -> Any:
    """Put a value into the cluster's object store once, for many tasks."""
    return ray.put(value)


def gpu_share() -> float:
    """What a fold asks of a GPU: a quarter, where the cluster has one."""
    return 0.25 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0


# -- admission ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _record_of(store_wire: str, round_id: str) -> RoundRecord:
    """Read once in a worker process: it names every shard of the round, too much to travel along with each delta."""
    record = stored_round(store_from_wire(store_wire), round_id)
    if record is None:
        raise NotFoundError(f"object storage has no record of round {round_id}")
    return record


@_logged
def _admit(
    store_wire: str,
    round_id: str,
    submission: Submission,
    max_delta_bytes: int,
    now: float,
    trained_in: TrainedIn | None,
    retrain: Retrain | None,
    folder: Path,
) -> Receipt:
    """`trained_in` and `retrain` are given where the delta is to be audited: the round that it was trained for, earlier
    than `round_id` where it is late, and the versions that it was trained on and with."""
    store, record = store_from_wire(store_wire), _record_of(store_wire, round_id)
    audit = None
    if trained_in is not None and retrain is not None:
        audit = partial(_audit, store, trained_in, submission, retrain, folder)
    return admit(store, record, submission, max_delta_bytes=max_delta_bytes, now=now, audit=audit)


def _audit(
    store: Store,
    trained_in: TrainedIn,
    submission: Submission,
    retrain: Retrain,
    folder: Path,
    delta: Path,
) -> Check:
    folder.mkdir(parents=True, exist_ok=True)
    record = trained_in.record
    with tempfile.TemporaryDirectory(dir=folder, prefix="audit-") as scratch:
        base = _checked_out(store, trained_in.base, folder, Path(scratch) / "base")
        teacher = None
        if trained_in.teacher is not None:
            teacher = _checked_out(store, trained_in.teacher, folder, Path(scratch) / "teacher")
        try:
            again = retrain(store, record, submission, base, teacher, Path(scratch))
        except FatalError as exc:
            # Trouble of this machine (no room, a missing library) is no verdict on the volunteer's work.
            log.warning("audit_failed", contribution=submission.statement.sha256, cause=exc.cause)
            return Check(name="audit", passed=True, detail=f"the shards could not be trained again: {exc.cause}"[:4096])
        with DeltaReader.open(delta) as left, DeltaReader.open(again) as right:
            return judge(agreement(factors_of(left), factors_of(right), sorted(record.targets)))


def _checked_out(store: Store, version: Manifest, cache: Path, folder: Path) -> Path:
    folder.mkdir()
    checkout(store, version, cache / "blobs", folder)
    return folder


# -- the cohort --------------------------------------------------------------------------------------------------------


@_logged
def _gram(store_wire: str, contributions: Sequence[BlobRef], names: Sequence[str]) -> NDArray[np.float64]:
    return bucket_gram(store_from_wire(store_wire), contributions, names)


@_logged
def _measure(
    store_wire: str,
    record: RoundRecord,
    parent: Manifest,
    contributions: Sequence[BlobRef],
    purpose: Purpose,
    max_rows: int,
    folder: Path,
) -> Measured:
    """Held-out losses of the base with each delta, or how fast the loss falls along each at first."""
    from aggregator.descent import heldout_descents
    from aggregator.losses import heldout_losses

    store, names = store_from_wire(store_wire), sorted(record.targets)
    rows, deltas = _drawn_rows(store, record, purpose), _fetched(store, contributions, names)
    recipe = record.request.recipe
    limits: dict[str, Any] = {"max_tokens": recipe.max_tokens, "max_rows": max_rows, "threads": _threads()}
    limits["assistant_only"] = recipe.assistant_only
    digests = [ref.sha256 for ref in contributions]
    with _base(store, parent, folder) as base:
        if purpose == "descent":
            found = heldout_descents(base, rows, deltas, names, **limits)
            return Measured(descents=dict(zip(digests, found, strict=True)))
        base_loss, losses = heldout_losses(base, rows, deltas, names, **limits)
        return Measured(base_loss, dict(zip(digests, losses, strict=True)))


@contextmanager
def _base(store: Store, parent: Manifest, folder: Path) -> Iterator[Path]:
    """The version that the round is on, as a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="version-") as base:
        checkout(store, parent, folder / "blobs", Path(base))
        yield Path(base)


def _drawn_rows(store: Store, record: RoundRecord, purpose: Purpose) -> list[dict[str, Any]]:
    """The held-out rows in an order that nobody knows before the round has its name: each round looks at other ones."""
    rows = _read_heldout(store, read_record(store, dataset_key(record.request.dataset), DatasetCard))
    seed = f"{record.round_id}|{purpose}|"
    return [rows[n] for n in sorted(range(len(rows)), key=lambda n: hashlib.sha256(f"{seed}{n}".encode()).digest())]


def _fetched(store: Store, contributions: Sequence[BlobRef], names: Sequence[str]) -> Iterator[StoredDelta]:
    """One delta after the other, read in one request each."""
    for ref in contributions:
        delta = StoredDelta(store, ref)
        delta.fetch(names)
        yield delta


# -- fold and evaluation -----------------------------------------------------------------------------------------------


@_logged
def _fold_group(
    store_wire: str, parent: Manifest, record: RoundRecord, number: int, terms: Sequence[Term]
) -> FoldedGroup:
    recipe = record.request.recipe
    outer = recipe.aggregation.outer
    digest = fold_digest(manifest_digest(parent), terms, DENOMINATOR_LOG2, outer)
    # Loading torch costs a second and 300 MB: worth it for what numpy cannot multiply as fast.
    with_torch = recipe.mantissa_bits == 8 or bool(ray.get_gpu_ids())
    return fold_group(
        store_from_wire(store_wire),
        parent,
        number,
        terms,
        DENOMINATOR_LOG2,
        outer=outer,
        record_key=fold_key(record.round_id, digest, number),
        kernels=kernels.available() if with_torch else KERNELS,
    )


@_logged
def _evaluate(
    store_wire: str, record: RoundRecord, manifest: Manifest, parent: Manifest, max_examples: int, folder: Path
) -> Evaluation:
    from aggregator.evaluate import heldout_loss

    store = store_from_wire(store_wire)
    dataset, recipe = record.request.dataset, record.request.recipe
    card = read_record(store, dataset_key(dataset), DatasetCard)
    rows = _read_heldout(store, card)[:max_examples]
    blobs = folder / "blobs"

    def measure(version: Manifest) -> Any:
        with tempfile.TemporaryDirectory(dir=folder, prefix="version-") as path:
            checkout(store, version, blobs, Path(path))
            return heldout_loss(
                Path(path),
                rows,
                max_tokens=recipe.max_tokens,
                assistant_only=recipe.assistant_only,
                threads=_threads(),
            )

    folder.mkdir(parents=True, exist_ok=True)
    loss = measure(manifest)
    known = _loss_known(store, parent, card, recipe, (loss.examples, loss.tokens))
    parent_loss = known if known is not None else measure(parent).loss
    prune(blobs, {file.sha256 for version in (manifest, parent) for file in version.export_files()})
    return Evaluation(
        heldout_loss=loss.loss, parent_heldout_loss=parent_loss, examples=loss.examples, tokens=loss.tokens
    )


def _threads() -> int:
    return min(EVALUATION_THREADS, os.cpu_count() or 1)


def _read_heldout(store: Store, card: DatasetCard) -> list[dict[str, Any]]:
    """The held-out rows, hash-checked."""
    data = store.get(heldout_key(card.dataset, card.heldout.sha256), max_bytes=MAX_HELDOUT_BYTES)
    if hashlib.sha256(data).hexdigest() != card.heldout.sha256:
        raise IntegrityError(f"the held-out rows of {card.dataset} do not have the hash that its card gives")
    return [json.loads(line) for line in data.splitlines() if line.strip()]


def _loss_known(
    store: Store, parent: Manifest, card: DatasetCard, recipe: Recipe, scored: tuple[int, int]
) -> float | None:
    """The parent's loss, when its own round measured it on the same rows, cut and scored in the same way."""
    before = parent.evaluation
    if before is None or parent.round_id is None or parent.recipe is None:
        return None
    its_round = stored_round(store, parent.round_id)
    if its_round is None:
        return None
    same_rows = its_round.request.dataset == card.dataset and card.created_at <= parent.created_at
    same_way = parent.recipe.max_tokens == recipe.max_tokens and (before.examples, before.tokens) == scored
    return before.heldout_loss if same_rows and same_way else None


def stored_round(store: Store, round_id: str) -> RoundRecord | None:
    """The record of a round; None where there is none that can be read."""
    try:
        return read_record(store, round_key(round_id), RoundRecord)
    except (NotFoundError, IntegrityError):
        return None


admit_task = ray.remote(num_cpus=1)(_admit)
gram_task = ray.remote(num_cpus=1)(_gram)
measure_task = ray.remote(num_cpus=1, max_retries=1)(_measure)
fold_group_task = ray.remote(num_cpus=1)(_fold_group)
evaluate_task = ray.remote(num_cpus=1, max_retries=1)(_evaluate)
