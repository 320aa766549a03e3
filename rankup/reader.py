"""One reader of one model at one source: the key that it has pinned, the versions that it has seen, the manifests that
it opens.

Every manifest, however old, is opened by the rules of `rankup.versions`, and what it says of its parent is kept; so
manifests that are read one after the other must form one chain, and a chain that was seen once must stay.

The pinned key follows the publisher: it becomes the key that signed the newest manifest, once signed changes of key
lead there from the pinned one. It never goes back: a version from before a change of key is read with the key of its
time, and pins nothing.

Nothing here writes to a disk: `remembered` is what a folder keeps of a reader.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from rankup.chainread import Opened
from rankup.errors import InputError, IntegrityError, NotFoundError, RankupError
from rankup.folder import FolderState
from rankup.records import KeyChange, Manifest
from rankup.sources import Patience, Source, patiently
from rankup.versions import MAX_KNOWN_VERSIONS, History, open_envelope, require_asked

_PREFIX: Final = re.compile(r"^[0-9a-f]{8,64}$")


class Reader:
    """`publisher_key` (hex) is pinned in the place of the one that `before` has; None for both pins the first seen.

    It is not a `rankup.chainread.VersionReader`: it reads a few versions, now and at the next pull, so what it has seen
    before stands in for the rest of the chain, and a version that contradicts it leaves no trace here.
    """

    def __init__(
        self,
        source: Source,
        model: str,
        before: FolderState | None = None,
        *,
        publisher_key: str | None = None,
        patience: Patience | None = None,
    ) -> None:
        self._source = source
        self._model = model
        self._patience = patience or Patience()
        self._before = before
        self._keys: tuple[KeyChange, ...] = ()
        self.pinned = publisher_key
        self.history = History()
        self.warnings: list[str] = []
        """Why older manifests could not be had."""
        if before is None:
            return
        succeeded = {change.statement.old for change in before.keys}
        if publisher_key is None or publisher_key == before.publisher_key or publisher_key in succeeded:
            # A key that is named, but has a successor that this reader knows, names the same publisher.
            self.pinned, self._keys = before.publisher_key, before.keys
            self.history = History(known=before.known, latest=before.latest)

    def open(self, version: int | None) -> Opened:
        """The manifest of `version`; None: the latest.

        Raises:
            IntegrityError: any rule of `rankup.versions` fails.
            NotFoundError: there is no such model or version.
            RetryableError: the source cannot be reached for longer than the patience lasts.
        """
        number, pointed = version, None
        if number is None:
            pointer = patiently(lambda: self._source.latest(self._model), self._patience)
            self.history.require_pointer(pointer)
            number, pointed = pointer.version, pointer.manifest
        try:
            opened = self._open(number, pointed)
        except IntegrityError:
            if version is None or self.pinned is None or not self._learns_changes():
                raise
            opened = self._open(number, pointed)
        self._keep(opened, as_latest=version is None)
        return opened

    def older(self, version: int) -> Manifest | None:
        """The manifest of a version that helps to make a plan; None, with a warning, where it is not to be had."""
        try:
            return self.open(version).manifest
        except RankupError as exc:
            self.warnings.append(f"version {version} cannot be used on the way: {exc.cause}")
            return None

    def find(self, prefix: str) -> int:
        """The number of the newest version whose manifest's digest begins with `prefix` (hex, 8 to 64 digits).

        Raises:
            InputError: no prefix of a digest.
            NotFoundError: no version among the last `MAX_KNOWN_VERSIONS` has such a digest.
        """
        if not _PREFIX.match(prefix):
            raise InputError(f"{prefix!r} is no beginning of a digest", remedy="Give 8 to 64 digits of 0-9 and a-f.")
        known = [version for version, digest in self.history.known.items() if digest.startswith(prefix)]
        if known:
            return max(known)
        opened = self.open(None)
        for _ in range(MAX_KNOWN_VERSIONS):
            number = opened.manifest.version
            if opened.digest.startswith(prefix):
                return number
            if opened.manifest.parent is None:
                break
            if opened.manifest.parent.startswith(prefix):
                return number - 1
            opened = self.open(number - 1)
        raise NotFoundError(
            f"no version of {self._model} has a manifest whose digest begins with {prefix}",
            remedy="`rankup versions` shows the digests.",
        )

    def require_prefix(self, opened: Opened, prefix: str) -> None:
        """Raise IntegrityError unless the manifest's digest begins with `prefix`."""
        if not opened.digest.startswith(prefix):
            raise IntegrityError(f"version {opened.manifest.version} is {opened.digest[:16]}…, not {prefix[:16]}…")

    def remembered(self, before: FolderState | None) -> FolderState:
        """`before` with what this reader knows now; the first manifest has been opened."""
        if self.pinned is None:
            raise InputError("nothing has been read yet, so there is no key to remember")
        state = before or FolderState(model=self._model, publisher_key=self.pinned)
        return state.model_copy(
            update={
                "publisher_key": self.pinned,
                "keys": self._keys,
                "known": dict(self.history.known),
                "latest": self.history.latest,
            }
        )

    def _learns_changes(self) -> bool:
        """Whether the latest version names changes of key that were not known: with them an old version may open."""
        known = self._keys
        try:
            self.open(None)
        except RankupError:
            return False
        return self._keys != known

    def _open(self, version: int, pointed: str | None) -> Opened:
        envelope = patiently(lambda: self._source.envelope(self._model, version), self._patience)
        manifest, digest, key = open_envelope(envelope, publisher_key=self.pinned, known_changes=self._keys)
        require_asked(manifest, digest, model=self._model, version=version, pointed=pointed)
        return Opened(manifest, digest, key, envelope)

    def _keep(self, opened: Opened, *, as_latest: bool) -> None:
        manifest = opened.manifest
        history, before = self.history, self._before
        olds = {change.statement.old for change in manifest.keys}
        if before is not None and not history.known and before.publisher_key in olds:
            # Another key was named, but changes lead to it from the one before: what was seen stays true.
            history = History(known=before.known, latest=before.latest)
        self.history = history.admit(manifest, opened.digest, as_latest=as_latest)
        if self.pinned is None or _follows(manifest.keys, self._keys):
            self.pinned, self._keys = opened.key, manifest.keys


def _follows(keys: Sequence[KeyChange], known: Sequence[KeyChange]) -> bool:
    """The changes go on where the known ones end; they may be the same."""
    if len(keys) < len(known):
        return False
    return all(one.statement == other.statement for one, other in zip(keys, known, strict=False))
