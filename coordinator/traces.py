"""What object storage tells of every round: looked for here, judged by `coordinator.evidence`.

    survey(store, publisher_key)      a Trace for each round, oldest first; receipts are counted, not read

What always holds:
- manifests count only where the pointer and the parents' digests lead to them and the publisher signed them;
- every object has a limit before it is read, and what cannot be read is an error that names it;
- a model has one campaign at a time: what is left of another one has ended.

Nothing is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from pydantic import ValidationError

from coordinator import actions
from coordinator.catalogue import read_manifest, read_pointer
from coordinator.ending import stored_end
from coordinator.evidence import ORDERS, Evidence, Made, cancelled, facts_from
from coordinator.opening import next_round_id
from coordinator.rounds import RoundFacts
from rankup.errors import IntegrityError, NotFoundError
from rankup.membership import Action
from rankup.protocol import Pointer
from rankup.records import Cohort, Manifest, RoundRecord
from rankup.store import Store
from rankup.stored import read_record
from rankup.versions import MAX_ENVELOPE_BYTES, cohort_key, draft_key, manifest_key, open_envelope, round_key


@dataclass(frozen=True)
class Trace:
    """One round as it was."""

    round_id: str
    model: str
    opened_at: float
    facts: RoundFacts
    """Counts are left empty: they follow from the receipts."""
    made: Made | None
    verdicts: int
    unjudged: int
    has_cohort: bool


@dataclass
class _Names:
    """What lies under `rounds/<round>/`."""

    has: set[str] = field(default_factory=set)
    verdicts: int = 0
    unjudged: int = 0


# -- reading -----------------------------------------------------------------------------------------------------------


def survey(
    store: Store, publisher_key: str | None, *, progress: Callable[[str, int], None] | None = None
) -> list[Trace]:
    """Every round of the bucket, oldest first. `progress` is told what is being read and how much of it there was.

    Raises:
        IntegrityError: a record cannot be read, or a version is not signed by the publisher.
        What the store raises.
    """
    return _Survey(store, publisher_key, progress or (lambda _what, _count: None)).traces()


def read_round(store: Store, round_id: str) -> RoundRecord:
    """The record of a round. Raises NotFoundError, IntegrityError."""
    record = read_record(store, round_key(round_id), RoundRecord)
    if record.round_id != round_id:
        raise IntegrityError(f"the record of round {round_id} names {record.round_id}")
    return record


def read_cohort(store: Store, round_id: str) -> Cohort:
    """The decision about a round's contributions. Raises NotFoundError, IntegrityError."""
    return read_record(store, cohort_key(round_id), Cohort)


def chain_of(store: Store, model: str, publisher_key: str | None) -> Iterator[tuple[Manifest, str]]:
    """Versions of a model with their digests, newest first, as far back as they are there.

    Raises NotFoundError (no pointer), IntegrityError.
    """
    pointer = read_pointer(store, model)
    newest = manifest = read_manifest(store, pointer, publisher_key=publisher_key)
    yield manifest, pointer.manifest
    while manifest.parent is not None:
        before = Pointer(
            model=model, version=manifest.version - 1, manifest=manifest.parent, updated_at=pointer.updated_at
        )
        try:
            manifest = read_manifest(store, before, publisher_key=publisher_key, known_changes=newest.keys)
        except NotFoundError:
            return
        yield manifest, before.manifest


class _Survey:
    """One pass over a bucket."""

    def __init__(self, store: Store, publisher_key: str | None, progress: Callable[[str, int], None]) -> None:
        self._store = store
        self._publisher_key = publisher_key
        self._progress = progress
        self._made: dict[str, Made] = {}
        self._newest: dict[str, Made] = {}
        """Model -> its newest version that a round made."""
        self._known: set[str] = set()

    def traces(self) -> list[Trace]:
        names = self._names()
        orders = self._orders()
        records = []
        for count, round_id in enumerate(sorted(round_id for round_id in names if "round.json" in names[round_id].has)):
            record = read_round(self._store, round_id)
            self._know_versions(record.request.model)
            # Their number is all that is needed of its shards, and they are what makes a record large.
            slim = {"shards": record.shards[:1] * len(record.shards), "targets": {}}
            records.append(record.model_copy(update=slim))
            self._progress("rounds", count + 1)
        records.sort(key=lambda record: (record.opened_at, record.index, record.round_id))
        found: dict[str, Trace] = {}
        for record in records:
            found[record.round_id] = self._trace(record, names[record.round_id], orders.get(record.round_id, ()), found)
        return self._one_campaign_each(list(found.values()))

    def _names(self) -> dict[str, _Names]:
        names: dict[str, _Names] = {}
        for count, key in enumerate(self._store.list("rounds/")):
            _, round_id, what, *rest = (*key.split("/"), "")
            found = names.setdefault(round_id, _Names())
            if what == "receipts":
                found.verdicts += 1
            elif what == "submissions":
                found.unjudged += 1
            elif rest == [""]:
                found.has.add(what)
            if count % 1000 == 0:
                self._progress("names", count)
        return names

    def _orders(self) -> dict[str, tuple[Action, ...]]:
        found: dict[str, list[Action]] = {}
        for action in actions.read(self._store):
            if action.what in ORDERS:
                found.setdefault(action.subject.get("round_id", ""), []).append(action)
        return {round_id: tuple(listed) for round_id, listed in found.items()}

    def _know_versions(self, model: str) -> None:
        """Which rounds made which versions of the model."""
        if model in self._known:
            return
        self._known.add(model)
        try:
            newest: tuple[Manifest, str] | None = None
            for manifest, digest in chain_of(self._store, model, self._publisher_key):
                newest = newest or (manifest, digest)
                self._note(manifest, digest, published=True)
                self._progress("versions", len(self._made))
        except NotFoundError:
            return  # A model without a pointer has no version that anybody may trust.
        if newest is not None:
            self._note_next(*newest)

    def _note_next(self, newest: Manifest, digest: str) -> None:
        """A publication that stopped before it moved the pointer."""
        try:
            data = self._store.get(manifest_key(newest.model, newest.version + 1), max_bytes=MAX_ENVELOPE_BYTES)
        except NotFoundError:
            return
        manifest, found, _ = open_envelope(data, publisher_key=self._publisher_key, known_changes=newest.keys)
        if (manifest.model, manifest.version, manifest.parent) == (newest.model, newest.version + 1, digest):
            self._note(manifest, found, published=False)

    def _note(self, manifest: Manifest, digest: str, *, published: bool) -> None:
        if manifest.round_id is None:
            return
        made = Made(manifest.version, digest, manifest.evaluation, manifest.created_at, published)
        self._made[manifest.round_id] = made
        if published:
            self._newest.setdefault(manifest.model, made)

    def _trace(self, record: RoundRecord, names: _Names, orders: Sequence[Action], found: dict[str, Trace]) -> Trace:
        round_id, model = record.round_id, record.request.model
        end = stored_end(self._store, round_id) if "end.json" in names.has else None
        made = self._made.get(round_id)
        evidence = Evidence(end=end, made=made, verdicts=names.verdicts, unjudged=names.unjudged, orders=tuple(orders))
        if end is None and (made is None or not made.published):
            newest = self._newest.get(model)
            overtaken = newest is not None and newest.version > record.base_version
            before = found.get(next_round_id(record, record.index - 1)) if record.index else None
            evidence = replace(
                evidence,
                overtaken=f"another round has made version {newest.version}" if overtaken and newest else "",
                folded=self._folded(round_id) if "folded.json" in names.has else None,
                decided_at=read_cohort(self._store, round_id).decided_at if "cohort.json" in names.has else None,
                starts_paused=before is not None and before.facts.paused,
            )
        facts = facts_from(record, evidence)
        return Trace(
            round_id,
            model,
            record.opened_at,
            facts,
            made,
            names.verdicts,
            names.unjudged,
            has_cohort="cohort.json" in names.has,
        )

    def _folded(self, round_id: str) -> tuple[str, float]:
        key = draft_key(round_id)
        data = self._store.get(key, max_bytes=MAX_ENVELOPE_BYTES)
        try:
            return hashlib.sha256(data).hexdigest(), Manifest.model_validate_json(data).created_at
        except ValidationError as exc:
            raise IntegrityError(f"{key} in object storage cannot be read", remedy="Move it away.") from exc

    def _one_campaign_each(self, traces: list[Trace]) -> list[Trace]:
        """A model has one campaign at a time: a round that is not of its newest one ended without a trace, or was never
        told to the ledger."""
        open_now = [trace for trace in traces if not trace.facts.state.ended]
        newest = {trace.model: trace.round_id for trace in open_now}
        return [
            trace
            if trace.facts.state.ended or newest[trace.model] == trace.round_id
            else replace(
                trace,
                facts=cancelled(
                    trace.facts, f"a newer round of the model is open: {newest[trace.model]}", trace.opened_at
                ),
            )
            for trace in traces
        ]
