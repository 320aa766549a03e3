"""Mirroring: a model's versions as a plain folder with the layout of the bucket, for any web server or USB stick.

    models/<model>/latest, models/<model>/retained.json, models/<model>/versions/<number>.json, blobs/sha256/…

What always holds:
- blobs come first, then the record of what the mirror does not have, then the sealed manifests, then the pointer: who
  reads from the folder at any moment finds all that the pointer names;
- every blob had its hash when it was put there, every manifest its signature and its place in the chain; the mirror's
  own pointer and manifests pin the publisher's key and guard against a history that was rewritten or goes back;
- every version in it can be had: where the source keeps no full files of the oldest one asked for, older versions come
  along until one has them;
- a killed run goes on where it stopped; nothing is ever removed but parts of blobs. One process at a time writes.

A folder may hold several models. The bytes are the source's own, so `rankup.sources.FolderSource` and `StaticSource`
read it, and who pulls from it checks everything again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rankup.download import Limit, OnProgress, PullProgress, fetch
from rankup.durable import sync_folder
from rankup.errors import NotFoundError
from rankup.folder import PARTIAL_NAME, disk_errors, folder_lock, sha256_of, write_durably
from rankup.keychain import require_trusted
from rankup.message import canonical_json
from rankup.protocol import Pointer
from rankup.records import BlobRef, KeyChange, Manifest, Part, Retained
from rankup.retained import lacking, parts_of
from rankup.sources import FolderSource, Patience, Source, patiently
from rankup.store import blob_key
from rankup.versions import History, manifest_key, open_envelope, pointer_key, require_asked, retained_key


@dataclass(frozen=True)
class Wish:
    """What of each version is mirrored besides manifest, files, exports and patches."""

    masters: bool = False
    """Float32 masters and the momenta of the outer step."""
    contributions: bool = False
    """Deltas with a part in the sum."""


@dataclass(frozen=True)
class Mirrored:
    """What lies in `folder` now. `publisher_key` (hex) signed `version`, whose digest is `manifest`."""

    model: str
    version: int
    manifest: str
    publisher_key: str
    versions: tuple[int, ...]
    """Those that this run made sure of, oldest first."""
    blobs: int
    total_bytes: int
    """Of the blobs of these versions."""
    fetched_bytes: int
    """Of those that were not there before."""
    folder: Path


@dataclass(frozen=True)
class _Link:
    """One version on the way into the mirror; the table of tensors is left to the envelope."""

    manifest: Manifest
    digest: str
    envelope: bytes


def mirror(
    source: Source,
    model: str,
    version: int | None,
    to: Path,
    *,
    history: int = 1,
    wish: Wish | None = None,
    publisher_key: str | None = None,
    check: bool = False,
    progress: OnProgress | None = None,
    parallel: int = 4,
    patience: Patience | None = None,
    limit: Limit | None = None,
) -> Mirrored:
    """Have version `version` of `model` (None: the latest) and the `history - 1` before it in the folder `to`.

    The newest must be signed by `publisher_key` (hex), where one is given, and by the key that signed what lies there
    already or one that its owner named as the next.
    `check` hashes the blobs that lie there already, instead of comparing their sizes.

    Raises:
        IntegrityError: a signature, hash, chain or pointer is not what it must be; the pointer stays where it is.
        NotFoundError: there is no such model or version, or the source lacks a blob that it should have.
        DiskFullError: no room; what has arrived is kept.
        StateError: another process writes to this folder.
        RetryableError: the source cannot be reached for longer than `patience`.
    """
    patience = patience or Patience()
    wish = wish or Wish()
    with folder_lock(to):
        here = FolderSource(to)
        mine = _Mine.read(here, model)
        number = version
        pointed = None
        if number is None:
            pointer = patiently(lambda: source.latest(model), patience)
            mine.seen.require_pointer(pointer)
            number, pointed = pointer.version, pointer.manifest
        gone = patiently(lambda: source.retained(model), patience).gone

        def read(wanted: int) -> bytes:
            return patiently(lambda: source.envelope(model, wanted), patience)

        links, key = mine.chain(read, number, pointed, publisher_key, history=history, gone=gone)
        newest = links[0]

        refs = {ref.sha256: ref for link in links for ref in _offered(link.manifest, wish, gone)}
        missing = [ref for ref in refs.values() if not _has(to, ref, check=check)]
        _forget_parts(to, missing)
        if missing:
            fetch(
                source,
                missing,
                to / PARTIAL_NAME,
                parallel=parallel,
                patience=patience,
                progress=progress,
                limit=limit,
            )
        total_bytes = sum(ref.size_bytes for ref in refs.values())
        if progress is not None:
            progress(PullProgress("installing", total_bytes, total_bytes))
        _install(to, missing)
        _write_records(to, here, links, mine.latest)
    return Mirrored(
        model=model,
        version=number,
        manifest=newest.digest,
        publisher_key=key,
        versions=tuple(sorted(link.manifest.version for link in links)),
        blobs=len(refs),
        total_bytes=total_bytes,
        fetched_bytes=sum(ref.size_bytes for ref in missing),
        folder=to,
    )


@dataclass(frozen=True)
class _Mine:
    """What the folder holds already: its pointer, the key and the changes of key of the manifest that this names."""

    here: FolderSource
    model: str
    latest: int | None
    key: str | None
    changes: tuple[KeyChange, ...]
    seen: History

    @classmethod
    def read(cls, here: FolderSource, model: str) -> _Mine:
        """Raises IntegrityError where pointer and manifest contradict each other."""
        try:
            pointer = here.latest(model)
        except NotFoundError:
            return cls(here, model, None, None, (), History())
        manifest, digest, key = open_envelope(here.envelope(model, pointer.version), publisher_key=None)
        require_asked(manifest, digest, model=model, version=pointer.version, pointed=pointer.manifest)
        seen = History(known={pointer.version: digest}, latest=pointer.version)
        return cls(here, model, pointer.version, key, manifest.keys, seen)

    def chain(
        self,
        read: Callable[[int], bytes],
        number: int,
        pointed: str | None,
        publisher_key: str | None,
        *,
        history: int,
        gone: Mapping[int, tuple[Part, ...]],
    ) -> tuple[list[_Link], str]:
        """The versions to mirror, newest first, each the parent of the one before it; and who signed the newest.

        It ends where `history` versions are there and the oldest of them has its full files at the source.
        """
        envelope = read(number)
        manifest, digest, key = open_envelope(
            envelope, publisher_key=publisher_key or self.key, known_changes=self.changes
        )
        if self.key is not None:
            require_trusted(self.key, key, manifest.keys, self.changes, version=manifest.version)
        require_asked(manifest, digest, model=self.model, version=number, pointed=pointed)
        links = [_Link(_slim(manifest), digest, envelope)]
        seen = self._with_stored(self.seen, number).admit(manifest, digest, as_latest=False)
        while manifest.parent is not None and (len(links) < history or "export" in gone.get(manifest.version, ())):
            parent, number = manifest.parent, manifest.version - 1
            envelope = read(number)
            manifest, digest, _ = open_envelope(envelope, publisher_key=key, known_changes=links[0].manifest.keys)
            require_asked(manifest, digest, model=self.model, version=number, pointed=parent)
            seen = self._with_stored(seen, number).admit(manifest, digest, as_latest=False)
            links.append(_Link(_slim(manifest), digest, envelope))
        return links, key

    def _with_stored(self, seen: History, number: int) -> History:
        """The history with the version of this number as it lies in the folder."""
        try:
            stored = self.here.envelope(self.model, number)
        except NotFoundError:
            return seen
        manifest, digest, _ = open_envelope(stored, publisher_key=None)
        return seen.admit(manifest, digest, as_latest=False)


def _slim(manifest: Manifest) -> Manifest:
    return manifest.model_copy(update={"tensors": {}})


def _offered(manifest: Manifest, wish: Wish, gone: Mapping[int, tuple[Part, ...]]) -> Iterable[BlobRef]:
    """What is wanted of a version and not said to be missing at the source."""
    missing = gone.get(manifest.version, ())
    yield from manifest.files
    for part, refs in parts_of(manifest).items():
        wanted = part in ("export", "patch") or (wish.contributions if part == "contributions" else wish.masters)
        if wanted and part not in missing:
            yield from refs


def _has(folder: Path, ref: BlobRef, *, check: bool) -> bool:
    path = folder / blob_key(ref.sha256)
    with disk_errors(path):
        if not path.is_file() or path.stat().st_size != ref.size_bytes:
            return False
        return not check or sha256_of(path) == ref.sha256


def _forget_parts(folder: Path, missing: Iterable[BlobRef]) -> None:
    """Parts of blobs that are no longer asked for only take room."""
    wanted = {ref.sha256 for ref in missing}
    partial = folder / PARTIAL_NAME
    with disk_errors(partial):
        for part in partial.iterdir() if partial.is_dir() else ():
            if part.name not in wanted:
                part.unlink()


def _install(folder: Path, arrived: Iterable[BlobRef]) -> None:
    """Move blobs to their places; when this returns they are there even after a power cut."""
    touched = set()
    with disk_errors(folder):
        for ref in arrived:
            place = folder / blob_key(ref.sha256)
            place.parent.mkdir(parents=True, exist_ok=True)
            (folder / PARTIAL_NAME / ref.sha256).replace(place)
            touched |= {place.parent, place.parent.parent, place.parent.parent.parent, folder}
        for each in touched:
            sync_folder(each)
        shutil.rmtree(folder / PARTIAL_NAME, ignore_errors=True)


def _write_records(to: Path, here: FolderSource, links: Sequence[_Link], latest: int | None) -> None:
    """The record of what is missing here, the manifests, and the pointer where it moves forward."""
    newest = links[0].manifest
    gone = dict(here.retained(newest.model).gone)
    for link in links:
        absent = lacking(link.manifest, lambda ref: _has(to, ref, check=False))
        gone.pop(link.manifest.version, None)
        if absent:
            gone[link.manifest.version] = absent
    retained = Retained(model=newest.model, gone=dict(sorted(gone.items())))
    _write(to / retained_key(newest.model), canonical_json(retained))
    for link in reversed(links):
        path = to / manifest_key(newest.model, link.manifest.version)
        if not path.exists():
            _write(path, link.envelope)
    if latest is None or latest < newest.version:
        pointer = Pointer(
            model=newest.model, version=newest.version, manifest=links[0].digest, updated_at=newest.created_at
        )
        _write(to / pointer_key(newest.model), canonical_json(pointer))


def _write(path: Path, data: bytes) -> None:
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, data)
