"""The openness card: what of a version is open, where it is, and how anybody checks that.

`openness.json` is the record; `aggregator.cards` makes `OPENNESS.md` of it for readers. The parts follow the components
of the Model Openness Framework (White et al. 2024, arXiv:2403.13784): weights, training code, data, cleaning,
evaluation, reports; and what a community adds: contributions and a signed history.

What always holds:
- everything is computed from the manifest and from dataset cards; what these do not show is called closed, also where
  it may be public somewhere else;
- "open" needs a licence on `OPEN_LICENCES` wherever there is one to state: another one, or none, makes it "partly";
- held-out rows are secret, and the card says so.

It checks nothing itself: it names the command that does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Final, Literal

from pydantic import Field

from rankup.message import Digest, Identifier, Message
from rankup.records import BlobRef, DatasetCard, Manifest, PipelineStep, Text

OPENNESS: Final = "OPENNESS.md"
OPENNESS_JSON: Final = "openness.json"
OPEN_LICENCES: Final = frozenset(
    (
        *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "zlib", "unlicense", "psf-2.0", "python-2.0"),
        *("mpl-2.0", "lgpl-2.1", "lgpl-3.0", "gpl-2.0", "gpl-3.0", "agpl-3.0", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0"),
        *("odc-by", "odbl", "pddl", "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0"),
    )
)
"""Licences that let anybody use, change and pass on, for every purpose; spelled as on the hub, in lower case."""
MAX_LISTED_SHARDS: Final = 1000

State = Literal["open", "partly", "closed"]


class Component(Message):
    """One line of the card. `where` and `check` are written here; what comes from outside stands in `details` only."""

    name: str
    state: State
    what: str
    where: str
    check: str
    details: tuple[str, ...] = ()
    """Text from outside."""


class DataSource(Message):
    """One dataset, as its card has it."""

    dataset: Identifier
    source: Text
    licence: Text
    rows: int
    heldout_rows: int
    heldout_sha256: Digest
    """Of rows that are not given out."""
    shard_count: int
    shards_sha256: Digest
    """sha256 of the shards' digests in hex, one on each line."""
    shards: Annotated[tuple[BlobRef, ...], Field(max_length=MAX_LISTED_SHARDS)]
    """The first of them."""
    pipeline: tuple[PipelineStep, ...]


class OpennessRecord(Message):
    """`openness.json` of a version."""

    format: Literal["rankup.openness/1"] = "rankup.openness/1"
    model: Identifier
    version: int
    software: Text
    components: tuple[Component, ...]
    datasets: tuple[DataSource, ...]


def assess(manifest: Manifest, datasets: Sequence[DatasetCard]) -> OpennessRecord:
    """What is open of a version. `datasets`: the cards that there are of `manifest.datasets`."""
    cards = {card.dataset: card for card in datasets if card.dataset in manifest.datasets}
    added = (
        _contributions(manifest),
        _recipe(manifest),
        _training_code(manifest),
        _training_data(manifest, cards),
        _cleaning(manifest, cards),
        _evaluation_data(cards),
    )
    components = (
        _architecture(manifest),
        _weights(manifest),
        _masters(manifest),
        _history(manifest),
        *(added if manifest.parent is not None else ()),
        _base_data(manifest),
        _results(manifest),
        _report(),
    )
    sources = tuple(_source(cards[name]) for name in manifest.datasets if name in cards)
    return OpennessRecord(
        model=manifest.model,
        version=manifest.version,
        software=manifest.software,
        components=components,
        datasets=sources,
    )


# -- the components ----------------------------------------------------------------------------------------------------

_FOLDER: Final = "this folder"
_SERVER: Final = "the publisher's server (`/v1/blobs/SHA256`), while it keeps them"
_FILES: Final = "`rankup pull` checks every file's hash and the signature"


def is_open(licence: str) -> bool:
    """Whether the licence is on the list; spelled as on the hub, in upper or lower case."""
    return licence.strip().lower() in OPEN_LICENCES


def _closed(name: str, what: str) -> Component:
    return Component(name=name, state="closed", what=what, where="nowhere", check="nothing to check")


def _architecture(manifest: Manifest) -> Component:
    paths = {file.path for file in manifest.files}
    there = "config.json" in paths
    tokenizer = bool(paths & {"tokenizer.json", "tokenizer.model", "vocab.json"})
    what = "configuration and tokenizer" if there and tokenizer else "configuration" if there else "nothing"
    return Component(
        name="Architecture",
        state="open" if there and tokenizer else "partly" if there else "closed",
        what=what,
        where=_FOLDER if there else "nowhere",
        check="`from_pretrained` builds the model without code from the folder" if there else "nothing to check",
    )


def _weights(manifest: Manifest) -> Component:
    size = sum(group.export.size_bytes for group in manifest.groups)
    files = f"{len(manifest.groups)} safetensors file{'s' * (len(manifest.groups) != 1)}"
    free = is_open(manifest.licence)
    terms = "under an open licence" if free else "under terms that are not on the list of open licences, or unknown"
    return Component(
        name="Weights",
        state="open" if free else "partly",
        what=f"{len(manifest.tensors)} tensors in {files}, {size:,} bytes, {terms}",
        where=_FOLDER,
        check=_FILES,
        details=(f"licence: {manifest.licence}",),
    )


def _masters(manifest: Manifest) -> Component:
    momentum = any(group.momentum is not None for group in manifest.groups)
    what = "float32 masters of every tensor" + (" and the momentum of the outer step" if momentum else "")
    return Component(
        name="Training state",
        state="open" if is_open(manifest.licence) else "partly",
        what=f"{what}, named by their hashes in the manifest",
        where=_SERVER,
        check="`rankup verify` compares them with what the contributions give",
    )


def _history(manifest: Manifest) -> Component:
    earlier = (
        f"{manifest.version} earlier version{'s' * (manifest.version != 1)}" if manifest.version else "none before it"
    )
    return Component(
        name="History",
        state="open" if is_open(manifest.licence) else "partly",
        what=f"{earlier}; each signed manifest names its parent's hash",
        where="the publisher's server (`/v1/models/NAME/versions`)",
        check="`rankup verify` follows the chain of hashes",
    )


def _contributions(manifest: Manifest) -> Component:
    here = f"{len(manifest.terms)} in this round" if manifest.change is None else "none of its own"
    total = f"; {manifest.log.size} in the sum of all rounds" if manifest.log.size else ""
    return Component(
        name="Contributions",
        state="partly",
        what=f"{here}{total}. Delta files, named by their hashes; they state no licence",
        where=_SERVER,
        check="`rankup verify` adds them up again, bit for bit; with `--contribution` it proves that one is in the sum",
    )


def _recipe(manifest: Manifest) -> Component:
    if manifest.recipe is None:
        return _closed("Training recipe", "the base model's training is not described here")
    recipe = manifest.recipe
    return Component(
        name="Training recipe",
        state="open",
        what=f"LoRA of rank {recipe.rank}, {recipe.steps} steps of {recipe.batch_size} a shard, and all other settings",
        where="the signed manifest",
        check="the manifest's field `recipe`",
    )


def _training_code(manifest: Manifest) -> Component:
    if not manifest.software:
        return _closed("Training code", "the manifest does not say what made this version")
    return Component(
        name="Training code",
        state="open",
        what="it trains, adds up and measures; Apache-2.0. What ran on a volunteer's machine is not proven",
        where="the Python package of this name and version",
        check="`rankup verify` replays the sum; the training itself can be repeated, not replayed",
        details=(f"software: {manifest.software}",),
    )


def _training_data(manifest: Manifest, cards: Mapping[str, DatasetCard]) -> Component:
    name = "Training data"
    if not manifest.datasets:
        return _closed(name, "none was added")
    missing = [dataset for dataset in manifest.datasets if dataset not in cards]
    unfree = [dataset for dataset, card in cards.items() if not is_open(card.licence)]
    rows = sum(card.rows for card in cards.values())
    notes = [
        *([f"{len(missing)} without a card"] if missing else []),
        *([f"{len(unfree)} not under a licence on the list of open ones"] if unfree else []),
    ]
    what = f"{len(manifest.datasets)} dataset{'s' * (len(manifest.datasets) != 1)}, {rows:,} rows"
    return Component(
        name=name,
        state="closed" if not cards else "partly" if notes else "open",
        what="; ".join((what, *notes)),
        where="the publisher's server (`/v1/datasets`, `/v1/blobs/SHA256`)" if cards else "nowhere",
        check="sha256 of each shard against the list in openness.json" if cards else "nothing to check",
    )


def _cleaning(manifest: Manifest, cards: Mapping[str, DatasetCard]) -> Component:
    described = [card for card in cards.values() if card.pipeline]
    if not manifest.datasets or not described:
        return _closed("Data cleaning", "no steps are described")
    full = len(described) == len(manifest.datasets)
    return Component(
        name="Data cleaning",
        state="open" if full and manifest.software else "partly",
        what=f"every step with its rows in and out, of {len(described)} of {len(manifest.datasets)} datasets",
        where="below, and in the training code" if manifest.software else "below",
        check="run the same steps on the source; which rows are held out depends on a secret",
    )


def _base_data(manifest: Manifest) -> Component:
    return Component(
        name="Data of the base model",
        state="closed",
        what="what the base model was trained on is not known here",
        where="the base model's own card, if it says",
        check="nothing to check",
        details=(f"base model: {manifest.base_model}",),
    )


def _results(manifest: Manifest) -> Component:
    if manifest.evaluation is None:
        return _closed("Evaluation results", "this version was not measured")
    evaluation = manifest.evaluation
    of_preferences = manifest.recipe is not None and manifest.recipe.method in ("dpo", "kto")
    unit = "of preferences" if of_preferences else "nats per token"
    return Component(
        name="Evaluation results",
        state="partly",
        what=f"held-out loss {evaluation.heldout_loss:.4f} {unit}, on {evaluation.examples} examples",
        where="the signed manifest",
        check="only the publisher can measure it again: the rows are secret",
    )


def _evaluation_data(cards: Mapping[str, DatasetCard]) -> Component:
    rows = sum(card.heldout_rows for card in cards.values())
    what = f"{rows:,} held-out rows, kept secret so that nobody trains on them" if rows else "none"
    return Component(
        name="Evaluation data",
        state="closed",
        what=what,
        where="nowhere; their hash stands in openness.json" if rows else "nowhere",
        check="if the publisher ever shows the rows, their hash" if rows else "nothing to check",
    )


def _report() -> Component:
    return Component(
        name="Report",
        state="partly",
        what="the model card, made from the signed records; no paper comes with it",
        where="README.md in this folder",
        check="its numbers stand in the manifest",
    )


def _source(card: DatasetCard) -> DataSource:
    digests = "".join(f"{shard.sha256}\n" for shard in card.shards)
    return DataSource(
        dataset=card.dataset,
        source=card.source,
        licence=card.licence,
        rows=card.rows,
        heldout_rows=card.heldout_rows,
        heldout_sha256=card.heldout.sha256,
        shard_count=len(card.shards),
        shards_sha256=hashlib.sha256(digests.encode()).hexdigest(),
        shards=card.shards[:MAX_LISTED_SHARDS],
        pipeline=card.pipeline,
    )
