"""Taking stock: all that a bucket holds, every record read and every manifest checked, for `aggregator.retention`.

What always holds:
- a version counts only where the pointer and the parents' digests lead to it and the publisher signed it; what any
  other manifest names is kept all the same;
- an object under a key of no known kind is read for digests: what it names is kept;
- a record that cannot be read is an error: what it needs would not be known.

Nothing is written. Objects are read in pieces; what stays in memory are names, sizes and slim manifests.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Final

from aggregator.keeprules import ModelHistory
from aggregator.retention import Draft, Inventory, RoundTrace
from rankup.errors import IntegrityError, NotFoundError
from rankup.protocol import RoundState
from rankup.records import Manifest, Receipt, RoundEnd, RoundRecord
from rankup.retained import parts_of
from rankup.store import Store, StoredObject
from rankup.stored import read_record
from rankup.versions import (
    MAX_ENVELOPE_BYTES,
    MAX_POINTER_BYTES,
    manifest_key,
    open_envelope,
    parse_pointer,
    pointer_key,
    receipt_key,
    require_asked,
    round_end_key,
    round_key,
)

_PIECE_BYTES: Final = 8 * 1024**2

_NAME = r"([a-z0-9][a-z0-9._-]{0,63})"
_HEX = r"([0-9a-f]{64})"
_KINDS: Final = {
    kind: re.compile(pattern)
    for kind, pattern in {
        "blob": r"blobs/sha256/([0-9a-f]{2})/(\1[0-9a-f]{62})",
        "pointer": rf"models/{_NAME}/latest",
        "retained": rf"models/{_NAME}/retained\.json",
        "manifest": rf"models/{_NAME}/versions/(\d{{6,9}})\.json",
        "round": rf"rounds/{_NAME}/round\.json",
        "cohort": rf"rounds/{_NAME}/cohort\.json",
        "end": rf"rounds/{_NAME}/end\.json",
        "submission": rf"rounds/{_NAME}/submissions/{_NAME}\.json",
        "draft": rf"rounds/{_NAME}/(?:folded\.json|fold/[0-9a-f]{{64}}/\d{{5,9}}\.json)",
        "receipt": rf"rounds/{_NAME}/receipts/{_HEX}\.json",
        "card": rf"datasets/{_NAME}/card\.json",
        "heldout": rf"datasets/{_NAME}/heldout/{_HEX}\.jsonl",
        "upload": rf"uploads/{_NAME}/{_HEX}\.delta",
        "people": r"organiser/(?:actions|workers)/[^/]+\.json",
    }.items()
}
_DIGEST: Final = re.compile(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")


def digest_of_blob(key: str) -> str | None:
    """The digest in the key of a blob; None for any other key."""
    found = _KINDS["blob"].fullmatch(key)
    return found[2] if found else None


def is_retained(key: str) -> bool:
    """The key is that of a record of what is gone."""
    return _KINDS["retained"].fullmatch(key) is not None


def read_inventory(store: Store, *, publisher_key: str | None = None) -> Inventory:
    """All that object storage holds, with every manifest checked.

    Raises IntegrityError where a record cannot be read, or a version is missing, not signed or not in the chain.
    """
    return _Reading(store, publisher_key).inventory()


class _Reading:
    """One pass over a bucket."""

    def __init__(self, store: Store, publisher_key: str | None) -> None:
        self._store = store
        self._publisher_key = publisher_key
        self._found: dict[str, list[tuple[re.Match[str], StoredObject]]] = defaultdict(list)
        self._named: set[str] = set()
        unknown: list[StoredObject] = []
        for each in store.scan(""):
            kind, match = next(
                ((kind, found) for kind, pattern in _KINDS.items() if (found := pattern.fullmatch(each.key))),
                ("", None),
            )
            if match is None:
                unknown.append(each)
            else:
                self._found[kind].append((match, each))
        for each in unknown:
            self._named |= self._digests_in(each)

    def inventory(self) -> Inventory:
        models = self._models()
        rounds = self._rounds()
        shards = {digest for _, card in self._found["card"] for digest in self._digests_in(card)}
        return Inventory(
            blobs={match[2]: each for match, each in self._found["blob"]},
            models=models,
            rounds=rounds,
            shards=frozenset(shards),
            named=frozenset(self._named),
            judged=tuple(self._judged()),
        )

    def _digests_in(self, stored: StoredObject) -> set[str]:
        """Every digest that stands in an object, whatever else it says."""
        found: set[str] = set()
        rest = b""
        for start in range(0, stored.size_bytes, _PIECE_BYTES):
            piece = rest + self._store.get_range(stored.key, start, min(_PIECE_BYTES, stored.size_bytes - start))
            found.update(digest.decode() for digest in _DIGEST.findall(piece))
            rest = piece[-65:]
        return found

    # versions

    def _models(self) -> dict[str, ModelHistory]:
        numbers: dict[str, list[int]] = defaultdict(list)
        for match, _ in self._found["manifest"]:
            numbers[match[1]].append(int(match[2]))
        for match, _ in self._found["pointer"]:
            numbers[match[1]] += ()
        found = {model: self._history(model, sorted(listed)) for model, listed in sorted(numbers.items())}
        return {model: history for model, history in found.items() if history is not None}

    def _history(self, model: str, numbers: list[int]) -> ModelHistory | None:
        try:
            pointer = parse_pointer(self._store.get(pointer_key(model), max_bytes=MAX_POINTER_BYTES), model=model)
        except NotFoundError as exc:
            raise IntegrityError(
                f"{model} has manifests but no pointer: which of them count is not known",
                remedy="Restore the pointer of the model from its newest manifest.",
            ) from exc
        newest, key = self._open(model, pointer.version, pointer.manifest, self._publisher_key, None)
        chain, digests = [newest], [pointer.manifest]
        while (parent := chain[-1].parent) is not None:
            chain.append(self._open(model, chain[-1].version - 1, parent, key, newest)[0])
            digests.append(parent)
        chain.reverse()
        digests.reverse()
        for number in (number for number in numbers if number > pointer.version):
            # A publication that stopped before it moved the pointer; or what can never become a version.
            data = self._store.get(manifest_key(model, number), max_bytes=MAX_ENVELOPE_BYTES)
            manifest, digest, _ = open_envelope(data, publisher_key=key)
            require_asked(manifest, digest, model=model, version=number)
            if number == len(chain) and manifest.parent == digests[-1]:
                chain.append(_slim(manifest))
                digests.append(digest)
            else:
                self._keep_all(manifest)
        # Published since the listing: what was not listed must not be taken for missing.
        while chain and chain[-1].version not in numbers:
            self._keep_all(chain.pop())
        latest = min(pointer.version, len(chain) - 1)
        return ModelHistory(tuple(chain), tuple(digests[: len(chain)]), latest) if chain else None

    def _keep_all(self, manifest: Manifest) -> None:
        refs = (*manifest.files, *itertools.chain.from_iterable(parts_of(manifest).values()))
        self._named.update(ref.sha256 for ref in refs)

    def _open(
        self, model: str, version: int, digest: str, key: str | None, newest: Manifest | None
    ) -> tuple[Manifest, str]:
        try:
            data = self._store.get(manifest_key(model, version), max_bytes=MAX_ENVELOPE_BYTES)
        except NotFoundError as exc:
            raise IntegrityError(
                f"the manifest of version {version} of {model} is missing: what it needs is not known",
                remedy="Restore it, for example from a mirror.",
            ) from exc
        changes = () if newest is None else newest.keys
        manifest, found, signer = open_envelope(data, publisher_key=key, known_changes=changes)
        require_asked(manifest, found, model=model, version=version, pointed=digest)
        return _slim(manifest), signer

    # rounds

    def _rounds(self) -> dict[str, RoundTrace]:
        receipts, drafts = self._by_name("receipt"), self._by_name("draft")
        over = {match[1] for match, _ in self._found["end"] if self._came_to_nothing(match[1])}
        rounds: dict[str, RoundTrace] = {}
        for match, _ in self._found["round"]:
            name = match[1]
            record = read_record(self._store, round_key(name), RoundRecord)
            teacher = () if record.teacher is None else (record.teacher.manifest,)
            rounds[name] = RoundTrace(
                model=record.request.model,
                bases=frozenset((record.base_manifest, *record.older_bases, *teacher)),
                base_version=record.base_version,
                shards=frozenset(ref.sha256 for ref in record.shards),
                contributions=frozenset(found[2] for found, _ in receipts.pop(name, ())),
                drafts=tuple(Draft(each, frozenset(self._digests_in(each))) for _, each in drafts.pop(name, ())),
                ended=name in over,
            )
        # Of rounds that nobody knows: what they name stays.
        self._named.update(found[2] for left in receipts.values() for found, _ in left)
        self._named.update(digest for left in drafts.values() for _, each in left for digest in self._digests_in(each))
        return rounds

    def _came_to_nothing(self, name: str) -> bool:
        """The round was rejected or cancelled. Of one that made a version the pointer tells."""
        end = read_record(self._store, round_end_key(name), RoundEnd)
        if end.round_id != name:
            raise IntegrityError(f"the ending of round {name} names {end.round_id}")
        return end.state is not RoundState.PUBLISHED

    def _by_name(self, kind: str) -> dict[str, list[tuple[re.Match[str], StoredObject]]]:
        grouped: dict[str, list[tuple[re.Match[str], StoredObject]]] = defaultdict(list)
        for match, each in self._found[kind]:
            grouped[match[1]].append((match, each))
        return grouped

    def _judged(self) -> Iterator[StoredObject]:
        """Uploads whose own lease has a verdict: the same bytes under another lease wait for theirs."""
        rounds = defaultdict(list)
        for match, _ in self._found["receipt"]:
            rounds[match[2]].append(match[1])
        for match, upload in self._found["upload"]:
            if any(self._lease_of(name, match[2]) == match[1] for name in rounds.get(match[2], ())):
                yield upload

    def _lease_of(self, round_id: str, contribution: str) -> str:
        receipt = read_record(self._store, receipt_key(round_id, contribution), Receipt)
        return receipt.submission.statement.lease_id


def _slim(manifest: Manifest) -> Manifest:
    """Without the names of tensors: a long chain of a large model would not fit into memory."""
    groups = tuple(group.model_copy(update={"tensors": ()}) for group in manifest.groups)
    return manifest.model_copy(update={"tensors": {}, "groups": groups})
