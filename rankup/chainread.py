"""Reading versions of one publisher from a source, and a whole chain of them down to version 0.

What always holds: whatever leaves here was opened by the rules of `rankup.versions` with the reader's key, a later one
that it vouches for, or an earlier one that vouches for it; a chain has kept the rules of `rankup.chain` as well.

It keeps nothing on disk. A reader learns changes of key on the way, and forgets them at its end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rankup.chain import Chain
from rankup.errors import InputError, IntegrityError, NotFoundError
from rankup.records import KeyChange, Manifest
from rankup.sources import Patience, Source, patiently
from rankup.versions import open_envelope, require_asked


@dataclass(frozen=True)
class Opened:
    """A version that is trusted: its digest, the key (hex) that signed it, and the envelope that it came in."""

    manifest: Manifest
    digest: str
    key: str
    envelope: bytes


class VersionReader:
    """Versions of `model` by one publisher. Without `publisher_key` the first one's key is taken.

    It is not a `rankup.reader.Reader`: that one refuses what contradicts its memory as soon as it is read, while here
    `Chain` compares all versions, so that a broken chain is explained by the rule that it breaks.
    """

    def __init__(self, source: Source, model: str, *, publisher_key: str | None, patience: Patience) -> None:
        self._source = source
        self._model = model
        self._patience = patience
        self._pinned = publisher_key
        self._known: tuple[KeyChange, ...] = ()
        self._asked_latest = False

    def latest(self) -> Opened:
        """The version that the pointer names.

        Raises:
            IntegrityError: the version is not the one that the pointer names, or not to be trusted.
        """
        self._asked_latest = True
        pointer = patiently(lambda: self._source.latest(self._model), self._patience)
        return self.open(pointer.version, pointed=pointer.manifest)

    def open(self, version: int, *, pointed: str | None = None) -> Opened:
        """A version by its number.

        One that a key from before the reader's own signed is trusted if the latest version says so.

        Raises:
            IntegrityError: it is not to be trusted, or another one.
            NotFoundError: there is none.
        """
        envelope = patiently(lambda: self._source.envelope(self._model, version), self._patience)
        try:
            manifest, digest, key = self._open(envelope)
        except IntegrityError as exc:
            if self._pinned is None or self._asked_latest or not self._learn():
                raise
            try:
                manifest, digest, key = self._open(envelope)
            except IntegrityError:
                raise exc from None
        require_asked(manifest, digest, model=self._model, version=version, pointed=pointed)
        if self._pinned is None or len(manifest.keys) > len(self._known):
            self._pinned, self._known = key, manifest.keys
        return Opened(manifest, digest, key, envelope)

    def require_nothing_newer(self, version: int) -> None:
        """No version of this publisher follows `version`, which the pointer named: nobody moved it back.

        Raises:
            IntegrityError: there is one, and the pointer still does not name it.
        """
        try:
            newer = self.open(version + 1)
        except (IntegrityError, InputError):
            return
        if patiently(lambda: self._source.latest(self._model), self._patience).version > version:
            return
        raise IntegrityError(
            f"the latest version of {self._model} is said to be {version}, but version {newer.manifest.version} is "
            "signed and published: the pointer went back, or is about to move",
            remedy=f"Try again in a minute; if it stays, ask the publisher, or verify {self._model}@{version + 1}.",
        )

    def _open(self, envelope: bytes) -> tuple[Manifest, str, str]:
        return open_envelope(envelope, publisher_key=self._pinned, known_changes=self._known)

    def _learn(self) -> bool:
        """Read the changes of key up to the latest version; False where that cannot be trusted either."""
        try:
            self.latest()
        except (IntegrityError, NotFoundError):
            return False
        return True


def read_chain(reader: VersionReader, top: Opened, *, on_bytes: Callable[[int], None] = lambda count: None) -> Chain:
    """Every version from 0 to `top`, checked by all rules; `on_bytes` is told the size of each envelope.

    Raises:
        IntegrityError: a version is not to be trusted, or breaks a rule of the chain.
        NotFoundError: a version is not there.
    """
    chain = Chain()
    for number in range(top.manifest.version + 1):
        one = top if number == top.manifest.version else reader.open(number)
        chain.admit(one.manifest, one.digest, one.key, table_of=lambda version: reader.open(version).manifest)
        on_bytes(len(one.envelope))
    return chain
