"""Opening a round: from what the organiser asked for to a record in object storage and an open round in the ledger.

What always holds:
- everything a worker could stumble over is checked before anything is written: model, dataset, number of shards,
  targets, size of a delta;
- a model has one campaign at a time (`require_no_campaign`), a server as many as there are models;
- the record is written to object storage before the ledger hears of the round, so a lost ledger loses no round;
- rounds of one campaign share the end of their names, and the name of the next one follows from the one before it:
  who opens round `index` twice (a keeper that was killed in between) opens it once, on the record that was written
  first.

It decides nothing about when a round opens; the gateway (first round) and the keeper (the others) do.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable

from coordinator.catalogue import read_card, read_manifest, read_pointer
from coordinator.fitting import require_trainable
from coordinator.grants import delta_bound_bytes
from coordinator.ledger import Ledger
from coordinator.rounds import OpenNext, owed
from coordinator.teachers import find_teacher
from rankup.errors import ConflictError, InputError, NotFoundError, StateError
from rankup.message import canonical_json
from rankup.protocol import MAX_LEASE_BYTES, Pointer, RoundRequest
from rankup.records import BlobRef, DatasetCard, Manifest, Revocation, Rollback, RoundRecord
from rankup.store import Store
from rankup.stored import read_record
from rankup.targets import select_targets
from rankup.versions import round_key

MAX_MODEL_CHARS = 48
"""Of the model's name in a round's name, which has 64 characters at most."""
NAME_ATTEMPTS = 8
MAX_LICENCE_CHARS = 256


async def open_round(
    ledger: Ledger,
    store: Store,
    request: RoundRequest,
    *,
    index: int,
    previous: RoundRecord | None,
    now: float,
    paused: bool = False,
    max_delta_bytes: int | None = None,
    publisher_key: str | None = None,
) -> RoundRecord:
    """Open round `index` (from 0) of a campaign; `previous` is the record of the round before it, None for the first.

    The shards go on where the previous round stopped and wrap around at the end of the dataset. The base is the model's
    latest version at this moment, signed by `publisher_key` where one is given; its licence is that of contributions
    where the request names none. A teacher is the version that the request names, else its model's latest at this
    moment, so it may move on within a campaign. As many earlier rounds of the campaign are named as the recipe's
    `max_staleness`: their late deltas are taken. A `paused` round grants nothing until it is resumed. Opening the same
    later round twice returns the record of the first time.

    Raises:
        NotFoundError: no such model, dataset or version of the teacher.
        IntegrityError: the stored manifest, card or record fails its checks.
        InputError: a method that does not fit the dataset, too many shards, a target that does not exist, or deltas
            above `max_delta_bytes`.
        UnreachableError: object storage or the ledger does not answer; call again.
    """
    after = previous.round_id if previous is not None else None
    if previous is not None:
        with contextlib.suppress(NotFoundError):
            known = await ledger.record(next_round_id(previous, index))
            return (await ledger.create_round(known, now, paused=paused, after=after)).record
    pointer = await asyncio.to_thread(read_pointer, store, request.model)
    manifest = await asyncio.to_thread(read_manifest, store, pointer, publisher_key=publisher_key)
    card = await asyncio.to_thread(read_card, store, request.dataset)
    await asyncio.to_thread(require_trainable, store, request.recipe, card, manifest)
    targets = select_targets(manifest.targets(), request.recipe)
    size = delta_bound_bytes(targets)
    if max_delta_bytes is not None and size > max_delta_bytes:
        raise InputError(
            f"A delta of rank {request.recipe.rank} may have {size} bytes; this server takes {max_delta_bytes}.",
            remedy="Choose a lower rank or fewer target_modules, or raise RANKUP_COORDINATOR_MAX_DELTA_BYTES.",
        )

    teacher = await asyncio.to_thread(find_teacher, store, request, card, manifest, publisher_key=publisher_key)
    older = await asyncio.to_thread(_older_bases, store, pointer, manifest, request, publisher_key)
    # A volunteer holds all shards of a lease in memory, and refuses more.
    largest = max((shard.size_bytes for shard in card.shards), default=0)
    most = max(1, MAX_LEASE_BYTES // max(1, largest))
    request = request.model_copy(
        update={
            "licence": request.licence or manifest.licence[:MAX_LICENCE_CHARS],
            "max_shards_per_lease": min(request.max_shards_per_lease, most),
        }
    )

    def record_named(round_id: str) -> RoundRecord:
        return RoundRecord(
            round_id=round_id,
            request=request,
            index=index,
            base_version=pointer.version,
            base_manifest=pointer.manifest,
            teacher=teacher,
            shards=pick_shards(card, count=request.shards, index=index),
            targets=targets,
            older_bases=older,
            earlier_rounds=earlier_rounds(previous, request),
            opened_at=now,
        )

    if previous is None:
        record = await _write_first(store, record_named, model=request.model, index=index)
    else:
        record = await asyncio.to_thread(_write_once, store, record_named(next_round_id(previous, index)))
    return (await ledger.create_round(record, now, paused=paused, after=after)).record


async def require_no_campaign(ledger: Ledger, model: str) -> None:
    """Return if no campaign of the model is under way: each round builds on the version before it, so two would not
    know of each other's.

    Raises:
        StateError: there is one; it names its round.
    """
    for status in await ledger.unfinished():
        if status.record.request.model != model:
            continue
        round_id, state = status.record.round_id, status.facts.state
        if not state.ended:
            raise StateError(
                f"Round {round_id} of model {model} is {state.value}; a model has one campaign at a time.",
                remedy=f"Wait until it has ended, or end it: rankup round close --last {round_id}, "
                f"or rankup round cancel {round_id}",
            )
        if any(isinstance(command, OpenNext) for command in owed(status.facts)):
            raise StateError(
                f"Round {round_id} of model {model} has ended, and the next one of its campaign opens in a moment.",
                remedy="Wait for it, then end the campaign with `rankup round close --last` or `rankup round cancel`.",
            )


def earlier_rounds(previous: RoundRecord | None, request: RoundRequest) -> tuple[str, ...]:
    """Rounds of the campaign whose late deltas are taken, newest first: one for each version that a base may be old."""
    if previous is None:
        return ()
    return (previous.round_id, *previous.earlier_rounds)[: request.recipe.aggregation.max_staleness]


def first_round_id(model: str, index: int = 0) -> str:
    """A fresh name, like `tiny-r0001-9f3c2a`: sortable within its campaign, whose mark is the end."""
    return _round_id(model, index, secrets.token_hex(3))


def next_round_id(previous: RoundRecord, index: int) -> str:
    """The one name that round `index` of the campaign of `previous` can have."""
    return _round_id(previous.request.model, index, previous.round_id.rpartition("-")[2])


def _round_id(model: str, index: int, campaign: str) -> str:
    return f"{model[:MAX_MODEL_CHARS]}-r{index + 1:04d}-{campaign}"


def pick_shards(card: DatasetCard, *, count: int, index: int) -> tuple[BlobRef, ...]:
    """`count` shards in the dataset's order, after those of the campaign's earlier rounds, around the end.

    Raises:
        InputError: the dataset has fewer than `count` shards.
    """
    total = len(card.shards)
    if count > total:
        raise InputError(
            f"The round asks for {count} shards; dataset {card.dataset} has {total}.",
            remedy=f"Ask for at most {total} shards, or build the dataset with more and smaller ones.",
        )
    start = index * count % total
    return tuple(card.shards[(start + place) % total] for place in range(count))


def _older_bases(
    store: Store, pointer: Pointer, manifest: Manifest, request: RoundRequest, publisher_key: str | None
) -> tuple[str, ...]:
    """Digests of the versions before the base that the recipe still welcomes deltas of, newest first; none from before
    a version that took something back."""
    older: list[str] = []
    changes = manifest.keys
    while manifest.parent is not None and len(older) < request.recipe.aggregation.max_staleness:
        if isinstance(manifest.change, Rollback | Revocation):
            break
        older.append(manifest.parent)
        pointer = pointer.model_copy(update={"version": pointer.version - 1, "manifest": manifest.parent})
        manifest = read_manifest(store, pointer, publisher_key=publisher_key, known_changes=changes)
    return tuple(older)


async def _write_first(
    store: Store, record_named: Callable[[str], RoundRecord], *, model: str, index: int
) -> RoundRecord:
    for _ in range(NAME_ATTEMPTS):
        record = record_named(first_round_id(model, index))
        try:
            await asyncio.to_thread(_write, store, record)
        except ConflictError:
            continue  # 24 random bits met an older campaign of the same model.
        return record
    raise ConflictError(f"no free name for a round of {model}", remedy="Try again.")


def _write(store: Store, record: RoundRecord) -> None:
    store.put(round_key(record.round_id), canonical_json(record), if_absent=True, content_type="application/json")


def _write_once(store: Store, record: RoundRecord) -> RoundRecord:
    """Write the record, or read the one that a caller before us wrote."""
    try:
        _write(store, record)
    except ConflictError:
        return read_record(store, round_key(record.round_id), RoundRecord)
    return record
