"""What `rankup verify` will say of a version, before anybody can see it.

It is replayed by the readers' own code from the bytes that readers will get, through a source in which the version is
published already.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from rankup.download import OnProgress
from rankup.errors import IntegrityError
from rankup.protocol import Pointer
from rankup.records import BlobRef, Manifest, Retained
from rankup.replay import verify_version
from rankup.signing import Ed25519PrivateKey, public_key_hex
from rankup.sources import BlobStream, StoreSource
from rankup.store import Store
from rankup.versions import manifest_digest, seal


class _Unpublished:
    """A bucket as it will be once `manifest` is published."""

    def __init__(self, store: Store, manifest: Manifest, sealed: bytes) -> None:
        self._published = StoreSource(store)
        self._manifest = manifest
        self._sealed = sealed

    def latest(self, model: str) -> Pointer:
        manifest = self._manifest
        return Pointer(
            model=model,
            version=manifest.version,
            manifest=manifest_digest(manifest),
            updated_at=manifest.created_at,
        )

    def retained(self, model: str) -> Retained:
        return self._published.retained(model)

    def envelope(self, model: str, version: int) -> bytes:
        return self._sealed if version == self._manifest.version else self._published.envelope(model, version)

    def stream(self, ref: BlobRef, start: int) -> AbstractContextManager[BlobStream]:
        return self._published.stream(ref, start)


def rehearsal(
    store: Store, private_key: Ed25519PrivateKey, cache: Path, progress: OnProgress | None = None
) -> Callable[[Manifest], None]:
    """A check of a version that is to be published: it is replayed from what is published, as `rankup verify` will.

    `cache` is a folder for what is read. The check raises IntegrityError where a tensor has other bits.
    """

    def check(manifest: Manifest) -> None:
        source = _Unpublished(store, manifest, seal(manifest, private_key))
        report = verify_version(
            source,
            manifest.model,
            manifest.version,
            cache=cache,
            publisher_key=public_key_hex(private_key),
            progress=progress,
        )
        if not report.ok:
            raise IntegrityError(
                f"the replay of version {manifest.version} differs from it in: {', '.join(report.mismatches[:8])}",
                remedy="Nothing was published. Test the memory of this machine, and try on another.",
            )

    return check
