"""From a file of rows to a dataset in object storage: checked, cleaned, without repetitions, split, shuffled, sharded.

The steps, each with its counts in the dataset's card:

    read -> clean -> deduplicate -> hold out -> decontaminate -> shuffle -> shard

What always holds:
- the same rows, seed and sizes give the same shards, byte for byte, whatever the order of the rows, the number of CPUs
  or the blocks that Ray makes: everything is decided by hashes of rows and a sort, never by arrival;
- which rows are held out depends on the rows alone, so adding rows moves few of them in or out;
- no training row has the prompt or the answer of a held-out row, nor 13 words in a row of it (`coordinator.rows`);
- the first wrong row ends the build with its line and field, before anything is written;
- the card is written last and never replaced: a dataset is there as a whole or not at all.

Ray Data does the work on rows; a Ray cluster must be connected (`coordinator.cluster` does that). Rows are of one shape
each dataset; they are not rated, filtered by language or checked for near-duplicates that share less than 13 words.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from coordinator.chatrows import RowError
from coordinator.imagerows import clean_row, features, parse_row
from coordinator.rowfiles import Origin, Rows
from coordinator.rows import digest, encode_row
from rankup.chat import needs
from rankup.errors import ConflictError, InputError, SetupError, StateError, TooLargeError
from rankup.message import canonical_json
from rankup.protocol import MAX_LEASE_BYTES
from rankup.records import BlobRef, DatasetCard, PipelineStep
from rankup.store import Store, put_blob
from rankup.versions import dataset_key, heldout_key

MAX_ROWS = 10_000_000
MAX_CARD_BYTES = 256 * 1024 * 1024
BLOCK_ROWS = 8192
BLOCK_BYTES = 16 * 1024 * 1024
BOILERPLATE_SHARE = 0.05
"""A sequence of words or a prompt that more than this share of the held-out rows have is a template, not a copy."""


def build_dataset(
    store: Store,
    *,
    dataset: str,
    rows: Rows,
    source: str,
    licence: str,
    shard_rows: int,
    heldout_rows: int,
    seed: int = 0,
    now: float,
) -> DatasetCard:
    """Build the dataset and store shards, held-out rows and card; returns the card.

    Args:
        rows: rows themselves, or one or several files (`coordinator.rowfiles` says of which kinds).
        source, licence: what the card says.
        shard_rows: rows in a shard; a last shard of less than half of it joins the one before.
        heldout_rows: rows that no volunteer sees.
        seed: of the order of training rows.
        now: Unix seconds, becomes `created_at`.

    The same dataset built again returns the card that is there.

    Raises:
        InputError: a row is wrong (line and field are named), rows have several shapes, too few are left, the file is
            not readable; NotFoundError: there is no such file; TooLargeError: above a limit of this module.
        StateError: a dataset with this name and another content exists.
        SetupError: no Ray cluster is connected.
    """
    import ray

    if shard_rows < 1 or heldout_rows < 1:
        raise InputError(f"a shard of {shard_rows} rows and {heldout_rows} held-out rows make no dataset")
    if not ray.is_initialized():
        raise SetupError("Ray is not running in this process", remedy="Run `rankup up` first, or use the command line.")
    key = dataset_key(dataset)
    origin = Origin.of(rows)
    with _quiet_ray_data():
        kind, steps, heldout, training = _select(origin, heldout_rows, seed)
        shards = tuple(
            put_blob(store, _limited(data, "shard_rows")) for data in _shards(training, steps[-1].rows_out, shard_rows)
        )
    heldout_ref = _put_heldout(store, dataset, heldout)
    kept = steps[-1].rows_out
    detail = f"{len(shards)} shards of {shard_rows} rows; the remainder is in the last one"
    steps.append(PipelineStep(name="shard", rows_in=kept, rows_out=kept, detail=detail))
    card = DatasetCard(
        dataset=dataset,
        source=source,
        licence=licence,
        rows=kept,
        heldout_rows=len(heldout),
        shape=kind.shape,
        needs=kind.needs,
        shards=shards,
        heldout=heldout_ref,
        pipeline=tuple(steps),
        created_at=now,
    )
    return _put_card(store, key, card)


# -- blocks and the tasks on them --------------------------------------------------------------------------------------


def _blocks(origin: Origin) -> Iterator[pa.Table]:
    """Arrow tables of number (int64) and text (large_string), of `BLOCK_ROWS` rows or `BLOCK_BYTES` characters."""
    numbers: list[int] = []
    texts: list[str] = []
    size = 0
    for count, (number, text) in enumerate(origin.read(), start=1):
        if count > MAX_ROWS:
            raise TooLargeError(f"more than {MAX_ROWS} rows", remedy="Split them into several datasets.")
        numbers.append(number)
        texts.append(text)
        size += len(text)
        if len(numbers) == BLOCK_ROWS or size >= BLOCK_BYTES:
            yield _table(number=numbers, text=texts)
            numbers, texts, size = [], [], 0
    if numbers:
        yield _table(number=numbers, text=texts)


def _table(**columns: list[Any]) -> pa.Table:
    types = {"number": pa.int64()}
    return pa.table({name: pa.array(values, types.get(name, pa.large_string())) for name, values in columns.items()})


def check_and_clean(block: pa.Table) -> pa.Table:
    """number, text -> number, row (JSON, "" if nothing was left), hash, bucket, shape, needs, extra, problem.

    A wrong row is a row with a `problem`, so that the first one of the whole input can be named, not of one block.
    """
    columns: dict[str, list[Any]] = {
        name: [] for name in ("number", "row", "hash", "bucket", "shape", "needs", "extra", "problem")
    }
    for number, text in zip(block["number"].to_pylist(), block["text"].to_pylist(), strict=True):
        row, shape, words, extra, problem = "", "", "", "", ""
        try:
            shape, parsed, names = parse_row(text)
            cleaned = clean_row(parsed)
            row, extra = ("" if cleaned is None else encode_row(cleaned)), ",".join(names)
            words = ",".join(sorted(needs(cleaned or {})))
        except RowError as exc:
            problem = str(exc)
        found = digest(row)
        # One hex digit: 16 buckets, within which equal rows are looked for. More tasks would cost more than they save.
        values = (number, row, found, found[0], shape, words, extra, problem)
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return _table(**columns)


def first_of_each(bucket: pa.Table) -> pa.Table:
    """One row of each hash; equal hashes are equal rows, so it does not matter which. Empty rows are left out."""
    pairs = dict(zip(bucket["hash"].to_pylist(), bucket["row"].to_pylist(), strict=True))
    kept = sorted((found, row) for found, row in pairs.items() if row)
    return _table(hash=[found for found, _ in kept], row=[row for _, row in kept])


@dataclass(frozen=True)
class Decontaminate:
    """hash, row -> order, row: each training row with its place in the shuffled order.

    Left out are the rows that are held out, and those that are too like one of them.
    """

    heldout: frozenset[str]
    """Hashes."""
    features: frozenset[bytes]
    seed: int

    def __call__(self, block: pa.Table) -> pa.Table:
        columns: dict[str, list[Any]] = {"order": [], "row": []}
        for found, row in zip(block["hash"].to_pylist(), block["row"].to_pylist(), strict=True):
            if found in self.heldout or not self.features.isdisjoint(features(json.loads(row))):
                continue
            columns["order"].append(digest(f"rankup shuffle {self.seed} {found}"))
            columns["row"].append(row)
        return _table(**columns)


# -- the pipeline ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    """What all rows are."""

    shape: str
    needs: tuple[str, ...]
    """Words that a chat template must have for one row or the other."""


def _select(origin: Origin, heldout_rows: int, seed: int) -> tuple[_Kind, list[PipelineStep], list[str], Iterator[str]]:
    """All steps up to the shuffle: the rows' kind, counts, rows that are held out, and those to train on, in order."""
    import ray

    refs = [ray.put(block) for block in _blocks(origin)]
    if not refs:
        raise InputError("there is no row to build a dataset from")
    cleaned = ray.data.from_arrow_refs(refs).map_batches(check_and_clean, **_BLOCKWISE).materialize()
    kind, steps = _checked(cleaned, origin)
    unique = (
        cleaned.select_columns(["hash", "bucket", "row"])
        .groupby("bucket")
        .map_groups(first_of_each, batch_format="pyarrow")
        .materialize()
    )
    left = unique.count()
    steps.append(
        PipelineStep(name="deduplicate", rows_in=steps[-1].rows_out, rows_out=left, detail="by hash of the row")
    )
    if left <= heldout_rows:
        raise InputError(
            f"{left} different rows are left, too few to hold out {heldout_rows} and train on the rest",
            remedy="Add rows, or hold out fewer.",
        )
    heldout = _held_out(unique, heldout_rows)
    if kind.shape.startswith("unpaired") and len({json.loads(row)["label"] for row in heldout.values()}) == 1:
        raise InputError(
            f"the {heldout_rows} held-out rows are all good or all bad: they cannot tell who knows one from the other",
            remedy="Hold out more rows, or add rows of the other label.",
        )
    steps.append(
        PipelineStep(name="hold out", rows_in=left, rows_out=left - heldout_rows, detail="lowest salted hashes of rows")
    )
    compare = Decontaminate(frozenset(heldout), _telling_features(heldout.values()), seed)
    training = unique.map_batches(compare, **_BLOCKWISE).sort("order").materialize()
    kept = training.count()
    if kept == 0:
        raise InputError(
            "every training row is too like a held-out row",
            remedy="Hold out fewer rows, or add rows that do not repeat the same prompts.",
        )
    overlap = "rows with the prompt or the answer of a held-out row, or 13 words in a row of it"
    steps.append(PipelineStep(name="decontaminate", rows_in=left - heldout_rows, rows_out=kept, detail=overlap))
    steps.append(PipelineStep(name="shuffle", rows_in=kept, rows_out=kept, detail=f"seed {seed}"))
    return kind, steps, list(heldout.values()), _texts(training)


_BLOCKWISE: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "zero_copy_batch": True}


def _checked(cleaned: Any, origin: Origin) -> tuple[_Kind, list[PipelineStep]]:
    """The rows' kind and the first two steps; raises InputError for the first wrong row, and for several shapes."""
    first_of_shape: dict[str, int] = {}
    needed: set[str] = set()
    left_out: Counter[str] = Counter()
    wrong: tuple[int, str] | None = None
    total = empty = 0
    columns = ["number", "shape", "needs", "extra", "problem", "hash"]
    nothing = digest("")
    for batch in cleaned.select_columns(columns).iter_batches(batch_size=None, batch_format="pyarrow"):
        total += batch.num_rows
        for number, shape, words, extra, problem, found in zip(
            *(batch[name].to_pylist() for name in columns), strict=True
        ):
            if problem:
                wrong = min(wrong or (number, problem), (number, problem))
                continue
            first_of_shape[shape] = min(first_of_shape.get(shape, number), number)
            needed.update(words.split(",") if words else ())
            left_out.update(extra.split(",") if extra else ())
            empty += found == nothing
    if wrong is not None:
        raise InputError(
            f"{origin.place(wrong[0])}: {wrong[1]}", remedy="Correct the row or remove it, then build again."
        )
    if len(first_of_shape) > 1:
        (shape, number), (other, later) = sorted(first_of_shape.items(), key=lambda item: item[1])[:2]
        raise InputError(
            f"{origin.place(later)}: is of the shape {other}, but {origin.place(number)} is of the shape {shape}",
            remedy="Make one dataset for each shape.",
        )
    (shape,) = first_of_shape
    names = ", ".join(f"{name} ({count} rows)" for name, count in sorted(left_out.items())[:16])
    detail = f"shape: {shape}" + (f", with {', '.join(sorted(needed))}" if needed else "")
    detail += f"; fields left out: {names}" if names else ""
    cleaning = (
        "Unicode NFC, no control characters, no space around; "
        "rows with an empty field, or with one answer as chosen and rejected, are dropped"
    )
    return _Kind(shape, tuple(sorted(needed))), [
        PipelineStep(name="read", rows_in=total, rows_out=total, detail=detail[:4096]),
        PipelineStep(name="clean", rows_in=total, rows_out=total - empty, detail=cleaning),
    ]


def _held_out(unique: Any, count: int) -> dict[str, str]:
    """hash -> row of the rows with the lowest salted hashes, in that order."""

    def salted() -> Iterator[tuple[str, str, str]]:
        for batch in unique.iter_batches(batch_size=None, batch_format="pyarrow"):
            for found, row in zip(batch["hash"].to_pylist(), batch["row"].to_pylist(), strict=True):
                yield digest(f"rankup held-out {found}"), found, row

    return {found: row for _, found, row in heapq.nsmallest(count, salted())}


def _telling_features(heldout: Iterable[str]) -> frozenset[bytes]:
    """Features of held-out rows, without those that so many of them have that they are a template."""
    rows = [features(json.loads(row)) for row in heldout]
    counts = Counter(feature for found in rows for feature in found)
    most = max(2, math.ceil(BOILERPLATE_SHARE * len(rows)))
    return frozenset(feature for feature, count in counts.items() if count <= most)


def _texts(training: Any) -> Iterator[str]:
    for batch in training.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from batch["row"].to_pylist()


def _shards(training: Iterator[str], total: int, shard_rows: int) -> Iterator[bytes]:
    """JSON lines of `shard_rows` rows; the last shard takes the remainder, or what is under half a shard as well."""
    full, rest = divmod(total, shard_rows)
    sizes = [shard_rows] * full
    if rest * 2 >= shard_rows or not sizes:
        sizes.append(rest)
    else:
        sizes[-1] += rest
    for size in sizes:
        yield _json_lines(next(training) for _ in range(size))


def _limited(data: bytes, setting: str) -> bytes:
    """The rows that one machine has to hold at once, which with images may be too large. Raises TooLargeError."""
    if len(data) > MAX_LEASE_BYTES:
        raise TooLargeError(
            f"as many rows as {setting} says make {len(data)} bytes; {MAX_LEASE_BYTES} is the most",
            remedy=f"Choose a lower {setting}, or make the images smaller.",
        )
    return data


def _json_lines(rows: Iterable[str]) -> bytes:
    return "".join(f"{row}\n" for row in rows).encode()


@contextlib.contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Ray Data without progress bars and chatter, keeping blocks in order; all of it as before afterwards."""
    from ray.data import DataContext
    from ray.data.context import ShuffleStrategy

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    # Hash shuffle starts actors that wait for CPUs; on a busy laptop that is slower than all the work.
    context.shuffle_strategy = ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with DataContext.current(context):
            yield
    finally:
        logger.setLevel(level)


# -- storing -----------------------------------------------------------------------------------------------------------


def _put_heldout(store: Store, dataset: str, rows: list[str]) -> BlobRef:
    data = _limited(_json_lines(rows), "heldout_rows")
    ref = BlobRef(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
    # The key holds the hash: what is there already is the same.
    with contextlib.suppress(ConflictError):
        store.put(heldout_key(dataset, ref.sha256), data, if_absent=True)
    return ref


def _put_card(store: Store, key: str, card: DatasetCard) -> DatasetCard:
    """Write the card once. A card that differs in nothing but its date is this one."""
    try:
        store.put(key, canonical_json(card), if_absent=True, content_type="application/json")
    except ConflictError:
        there = DatasetCard.model_validate_json(store.get(key, max_bytes=MAX_CARD_BYTES))
        if there != card.model_copy(update={"created_at": there.created_at}):
            raise StateError(
                f"a dataset {card.dataset} with other rows, sizes or source exists already",
                remedy="Give the new one another name: rounds refer to the old one.",
            ) from None
        return there
    return card
