"""What object storage holds, as readers ask for it: models, pointers, sealed manifests, versions, dataset cards, blobs.

What always holds:
- a sealed manifest is checked (signature, form, model and version) before anything out of it is told to anybody;
- manifests and cards of a given address never change or change rarely, pointers move: a manifest's row is cached for
  good, a pointer for at most `POINTER_TTL_S`, so a new version is seen by every replica within a second;
- only what exists is cached, in a bounded number of entries: asking for names that do not exist fills nothing;
- errors name models and versions, never keys, buckets or hosts.

All methods block; the caller runs them beside its event loop. Safe to share between threads.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import ValidationError

from rankup.errors import IntegrityError, NotFoundError, TooLargeError
from rankup.lineage import change_in_words
from rankup.protocol import Pointer, VersionView
from rankup.records import DatasetCard, KeyChange, Manifest
from rankup.store import Store, blob_key
from rankup.versions import (
    MAX_ENVELOPE_BYTES,
    MAX_POINTER_BYTES,
    dataset_key,
    manifest_key,
    open_envelope,
    parse_pointer,
    pointer_key,
    require_asked,
)

POINTER_TTL_S = 1.0
LIST_TTL_S = 1.0
CARD_TTL_S = 10.0
MAX_CARD_BYTES = 128 * 1024**2
MAX_CACHED_ENVELOPE_BYTES = 4 * 1024**2
"""Larger envelopes are read again each time: the cache stays below `ENVELOPES` times this."""
ENVELOPES = 32
VIEWS = 10_000

V = TypeVar("V")


@dataclass(frozen=True)
class SealedManifest:
    """The stored bytes of one version and their hash, which serves as its etag."""

    data: bytes
    sha256: str


class Recent(Generic[V]):
    """The most recently used values of a bounded number of names, each for `ttl_s` seconds (None: for good)."""

    def __init__(self, size: int, *, ttl_s: float | None, clock: Callable[[], float]) -> None:
        self._size = size
        self._ttl_s = ttl_s
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[object, tuple[float, V]] = OrderedDict()

    def get(self, name: object) -> V | None:
        with self._lock:
            found = self._kept.get(name)
            if found is None:
                return None
            kept_at, value = found
            # A clock that was set back must not keep an old value alive.
            if self._ttl_s is not None and not 0 <= self._clock() - kept_at < self._ttl_s:
                del self._kept[name]
                return None
            self._kept.move_to_end(name)
            return value

    def put(self, name: object, value: V) -> V:
        with self._lock:
            self._kept[name] = (self._clock(), value)
            self._kept.move_to_end(name)
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)
        return value


def read_pointer(store: Store, model: str) -> Pointer:
    """The pointer of a model, fresh. Raises NotFoundError, IntegrityError."""
    try:
        return parse_pointer(store.get(pointer_key(model), max_bytes=MAX_POINTER_BYTES), model=model)
    except NotFoundError as exc:
        raise NotFoundError(
            f"There is no model {model}.",
            remedy="GET /v1/models lists them; `rankup model import` adds one.",
        ) from exc


def read_manifest(
    store: Store, pointer: Pointer, *, publisher_key: str | None = None, known_changes: Sequence[KeyChange] = ()
) -> Manifest:
    """The manifest that a pointer names, checked against it. Raises NotFoundError, IntegrityError."""
    data = _read_envelope(store, pointer.model, pointer.version)
    manifest, digest, _ = open_envelope(data, publisher_key=publisher_key, known_changes=known_changes)
    require_asked(manifest, digest, model=pointer.model, version=pointer.version, pointed=pointer.manifest)
    return manifest


def read_version(store: Store, latest: Manifest, version: int, *, publisher_key: str | None = None) -> Manifest:
    """An older version of the model of `latest`, which was checked: earlier keys that it names may have signed it.

    Raises NotFoundError, IntegrityError.
    """
    data = _read_envelope(store, latest.model, version)
    manifest, digest, _ = open_envelope(data, publisher_key=publisher_key, known_changes=latest.keys)
    require_asked(manifest, digest, model=latest.model, version=version)
    return manifest


def read_card(store: Store, dataset: str) -> DatasetCard:
    """The card of a dataset, fresh. Raises NotFoundError, IntegrityError."""
    try:
        data = store.get(dataset_key(dataset), max_bytes=MAX_CARD_BYTES)
        card = DatasetCard.model_validate_json(data)
    except NotFoundError as exc:
        raise NotFoundError(
            f"There is no dataset {dataset}.",
            remedy="GET /v1/datasets lists them; `rankup dataset build` makes one.",
        ) from exc
    except (ValidationError, TooLargeError) as exc:
        raise IntegrityError(f"the card of dataset {dataset} is not readable") from exc
    if card.dataset != dataset:
        raise IntegrityError(f"the card of dataset {dataset} names {card.dataset}")
    return card


def _read_envelope(store: Store, model: str, version: int) -> bytes:
    try:
        return store.get(manifest_key(model, version), max_bytes=MAX_ENVELOPE_BYTES)
    except NotFoundError as exc:
        raise NotFoundError(
            f"There is no version {version} of model {model}.",
            remedy=f"GET /v1/models/{model}/versions lists them.",
        ) from exc
    except TooLargeError as exc:
        raise IntegrityError(f"the manifest of {model} version {version} is too large") from exc


class Catalogue:
    """Reads with caches, for one replica of the gateway."""

    def __init__(self, store: Store, publisher_key: str, *, clock: Callable[[], float]) -> None:
        self._store = store
        self._publisher_key = publisher_key
        self._pointers: Recent[Pointer] = Recent(256, ttl_s=POINTER_TTL_S, clock=clock)
        self._lists: Recent[tuple[str, ...]] = Recent(2, ttl_s=LIST_TTL_S, clock=clock)
        self._cards: Recent[DatasetCard] = Recent(32, ttl_s=CARD_TTL_S, clock=clock)
        self._envelopes: Recent[SealedManifest] = Recent(ENVELOPES, ttl_s=None, clock=clock)
        self._views: Recent[VersionView] = Recent(VIEWS, ttl_s=None, clock=clock)
        self._keys: Recent[tuple[KeyChange, ...]] = Recent(32, ttl_s=None, clock=clock)

    def models(self) -> tuple[str, ...]:
        """Names of the models that have a published version, sorted."""
        return self._names("models/", "latest")

    def datasets(self) -> tuple[DatasetCard, ...]:
        """Every dataset's card, sorted by name."""
        return tuple(self._card(name) for name in self._names("datasets/", "card.json"))

    def pointer(self, model: str) -> Pointer:
        """The pointer, at most `POINTER_TTL_S` old. Raises NotFoundError."""
        return self._pointers.get(model) or self._pointers.put(model, read_pointer(self._store, model))

    def envelope(self, model: str, version: int) -> SealedManifest:
        """The stored bytes of a version's sealed manifest. Raises NotFoundError."""
        kept = self._envelopes.get((model, version))
        if kept is not None:
            return kept
        data = _read_envelope(self._store, model, version)
        manifest, digest, _ = open_envelope(
            data, publisher_key=self._publisher_key, known_changes=self._key_changes(model, version)
        )
        require_asked(manifest, digest, model=model, version=version)
        self._views.put((model, version), _view_of(manifest, digest))
        sealed = SealedManifest(data, hashlib.sha256(data).hexdigest())
        return self._envelopes.put((model, version), sealed) if len(data) <= MAX_CACHED_ENVELOPE_BYTES else sealed

    def versions(self, model: str, *, limit: int) -> tuple[VersionView, ...]:
        """Up to `limit` versions, newest first, none above the pointer. Raises NotFoundError for an unknown model."""
        newest = self.pointer(model).version
        found: list[VersionView] = []
        measured_by_child: float | None = None
        for number in range(newest, max(-1, newest - limit), -1):
            view = self._view(model, number)
            if view is not None:
                loss = view.heldout_loss if view.heldout_loss is not None else measured_by_child
                found.append(view.model_copy(update={"latest": number == newest, "heldout_loss": loss}))
            measured_by_child = view.parent_heldout_loss if view is not None else None
        return tuple(found)

    def has_blob(self, digest: str) -> bool:
        return self._store.head(blob_key(digest)) is not None

    def _key_changes(self, model: str, version: int) -> tuple[KeyChange, ...]:
        """The changes of the publisher's key that the latest version repeats: an earlier key signed older ones."""
        pointer = self.pointer(model)
        if version >= pointer.version:
            return ()
        kept = self._keys.get(pointer.manifest)
        if kept is None:
            latest = read_manifest(self._store, pointer, publisher_key=self._publisher_key)
            kept = self._keys.put(pointer.manifest, latest.keys)
        return kept

    def _view(self, model: str, version: int) -> VersionView | None:
        kept = self._views.get((model, version))
        if kept is not None:
            return kept
        try:
            self.envelope(model, version)
        except NotFoundError:
            return None  # An old version may have been removed; the others are still worth showing.
        return self._views.get((model, version))

    def _card(self, dataset: str) -> DatasetCard:
        return self._cards.get(dataset) or self._cards.put(dataset, read_card(self._store, dataset))

    def _names(self, prefix: str, leaf: str) -> tuple[str, ...]:
        kept = self._lists.get(prefix)
        if kept is not None:
            return kept
        parts = (key.split("/") for key in self._store.list(prefix))
        return self._lists.put(prefix, tuple(sorted(part[1] for part in parts if len(part) == 3 and part[2] == leaf)))


def _view_of(manifest: Manifest, digest: str) -> VersionView:
    return VersionView(
        model=manifest.model,
        version=manifest.version,
        manifest=digest,
        parent=manifest.parent,
        round_id=manifest.round_id,
        created_at=manifest.created_at,
        contributions=len(manifest.terms),
        size_bytes=sum(file.size_bytes for file in manifest.export_files()),
        heldout_loss=manifest.evaluation.heldout_loss if manifest.evaluation is not None else None,
        parent_heldout_loss=manifest.evaluation.parent_heldout_loss if manifest.evaluation is not None else None,
        change=None if manifest.change is None else change_in_words(manifest.change),
        latest=False,
    )
