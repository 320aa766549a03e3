"""What object storage may forget: a plan, made without any I/O, of what goes, what stays and why.

What always holds:
- what `aggregator.keeprules` asks for stays;
- manifests, their small files, patches, dataset cards, held-out rows, round records, decisions and receipts stay; so do
  shards of a card or an open round, uploads without a verdict, drafts and finished groups of an open round;
- whatever is younger than the grace period stays, and so does an object under a key that nobody knows, with every blob
  whose digest stands in it;
- what it calls gone is what is missing once the plan is carried out;
- the same arguments give the same plan; after it was carried out, in part or whole, another one still holds all this.

`aggregator.collect` reads what is there and carries the plan out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from aggregator.keeprules import ModelHistory, Rules, needed_blobs
from rankup.records import Manifest, Retained
from rankup.retained import lacking, parts_of
from rankup.store import StoredObject

Why = Literal[
    "export of an older version",
    "master of an older version",
    "momentum of an older version",
    "contribution beyond the promise",
    "shard of a dataset that was replaced",
    "draft of a round that has ended",
    "upload that was judged",
    "named by no record",
]


# -- what there is -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draft:
    """A folded manifest or a finished group of a fold: the object, and every digest that stands in it."""

    stored: StoredObject
    digests: frozenset[str]


@dataclass(frozen=True)
class RoundTrace:
    """What object storage holds of a round."""

    model: str
    bases: frozenset[str]
    """Digests of the manifests that its contributions may be trained on, and of its teacher's."""
    base_version: int
    shards: frozenset[str]
    contributions: frozenset[str]
    """Those with a verdict, good or bad."""
    drafts: tuple[Draft, ...] = ()
    ended: bool = False
    """It was rejected or cancelled, as its own record says."""


@dataclass(frozen=True)
class Inventory:
    """All that object storage holds."""

    blobs: Mapping[str, StoredObject]
    """Digest -> blob."""
    models: Mapping[str, ModelHistory]
    rounds: Mapping[str, RoundTrace]
    shards: frozenset[str]
    """Of dataset cards."""
    named: frozenset[str]
    """Digests that stand in objects of unknown kinds."""
    judged: tuple[StoredObject, ...]
    """Uploads on which there is a verdict."""


# -- what goes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Removal:
    """One object that goes."""

    key: str
    size_bytes: int
    why: Why


@dataclass(frozen=True)
class Plan:
    """What goes, in the order in which it has to: what names blobs before the blobs."""

    removals: tuple[Removal, ...]
    retained: Mapping[str, Retained]
    """Model -> what is gone once the plan is carried out."""
    needed: frozenset[str]
    """Blobs that the rules ask for, whether they are there or not."""
    kept_blobs: int
    kept_bytes: int


def plan_retention(inventory: Inventory, rules: Rules, *, now: float) -> Plan:
    """What may go. `now` is Unix seconds, by the clock that wrote `modified_at`.

    Raises IntegrityError where manifests contradict each other.
    """
    young = now - rules.grace_s
    ended = {name for name, trace in inventory.rounds.items() if _has_ended(name, trace, inventory.models)}
    open_rounds = [trace for name, trace in inventory.rounds.items() if name not in ended]
    bases = frozenset(base for trace in open_rounds for base in trace.bases)
    needed: set[str] = set(inventory.shards | inventory.named)
    drafts: list[Removal] = []
    for name, trace in inventory.rounds.items():
        if name not in ended:
            needed |= trace.shards
        if name not in ended or _is_promised(trace, inventory.models, rules):
            needed |= trace.contributions
        for draft in trace.drafts:
            if name in ended and draft.stored.modified_at < young:
                drafts.append(_removal(draft.stored, "draft of a round that has ended"))
            else:
                needed |= draft.digests
    for history in inventory.models.values():
        needed.update(ref.sha256 for ref in needed_blobs(history, rules, inventory.blobs, bases))
    kinds = _kinds(inventory)
    blobs = [
        _removal(blob, kinds.get(digest, "named by no record"))
        for digest, blob in inventory.blobs.items()
        if digest not in needed and blob.modified_at < young
    ]
    uploads = [_removal(upload, "upload that was judged") for upload in inventory.judged if upload.modified_at < young]
    removals = (*drafts, *uploads, *sorted(blobs, key=lambda removal: removal.key))
    going = {removal.key for removal in removals}
    staying = {digest: blob.size_bytes for digest, blob in inventory.blobs.items() if blob.key not in going}
    return Plan(
        removals=removals,
        retained={model: _retained(model, history.chain, staying) for model, history in inventory.models.items()},
        needed=frozenset(needed),
        kept_blobs=len(staying),
        kept_bytes=sum(staying.values()),
    )


def _removal(stored: StoredObject, why: Why) -> Removal:
    return Removal(stored.key, stored.size_bytes, why)


def _has_ended(name: str, trace: RoundTrace, models: Mapping[str, ModelHistory]) -> bool:
    """The round was rejected or cancelled, or made a version that the pointer has reached; or another one was faster,
    then it never can."""
    if trace.ended:
        return True
    history = models.get(trace.model)
    if history is None:
        return False
    return any(
        manifest.round_id == name or (manifest.round_id is not None and manifest.version > trace.base_version)
        for manifest in history.chain[: history.latest + 1]
    )


def _is_promised(trace: RoundTrace, models: Mapping[str, ModelHistory], rules: Rules) -> bool:
    """The contributions of this round are kept for their own sake."""
    history, window = models.get(trace.model), rules.keep_contributions
    return history is None or window is None or trace.base_version + 1 > len(history.chain) - 1 - window


def _kinds(inventory: Inventory) -> dict[str, Why]:
    """Blob -> why it would go. What is several things at once is called the first of them."""
    kinds: dict[str, Why] = {}

    def are(digests: Iterable[str], why: Why) -> None:
        for digest in digests:
            kinds.setdefault(digest, why)

    for history in inventory.models.values():
        for manifest in history.chain:
            parts = parts_of(manifest)
            are((ref.sha256 for ref in parts["export"]), "export of an older version")
            are((ref.sha256 for ref in parts["master"]), "master of an older version")
            are((ref.sha256 for ref in parts["momentum"]), "momentum of an older version")
            are((term.contribution for term in manifest.terms), "contribution beyond the promise")
    for trace in inventory.rounds.values():
        are(trace.contributions, "contribution beyond the promise")
        are(trace.shards, "shard of a dataset that was replaced")
    return kinds


def _retained(model: str, chain: Iterable[Manifest], staying: Mapping[str, int]) -> Retained:
    absent = {manifest.version: lacking(manifest, lambda ref: ref.sha256 in staying) for manifest in chain}
    return Retained(model=model, gone={version: parts for version, parts in absent.items() if parts})
