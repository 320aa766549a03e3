"""Records of object storage, read back: none larger than its kind may be, and none that is not what it should be.

What always holds: a record that is there and cannot be read is an error that names its key; it is never taken for one
that is not there. Manifests are signed and have a reader of their own (`rankup.versions`). Nothing is written here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeVar

from pydantic import BaseModel, ValidationError

from rankup.errors import IntegrityError, NotFoundError
from rankup.records import Cohort, DatasetCard, Receipt, RoundEnd, RoundRecord
from rankup.store import Store

MAX_BYTES: Final[Mapping[type[BaseModel], int]] = {
    DatasetCard: 256 * 1024**2,
    RoundRecord: 256 * 1024**2,
    Cohort: 256 * 1024**2,
    Receipt: 1024**2,
    RoundEnd: 64 * 1024,
}
"""What a record of each kind may have."""

Kind = TypeVar("Kind", bound=BaseModel)


def read_record(store: Store, key: str, kind: type[Kind]) -> Kind:
    """The record under `key`. Raises NotFoundError, IntegrityError (it cannot be read), and what the store raises."""
    return _parsed(key, kind, store.get(key, max_bytes=MAX_BYTES[kind]))


def find_record(store: Store, key: str, kind: type[Kind]) -> Kind | None:
    """As `read_record`; None where there is none."""
    try:
        return read_record(store, key, kind)
    except NotFoundError:
        return None


def find_record_with_etag(store: Store, key: str, kind: type[Kind]) -> tuple[Kind, str] | None:
    """As `find_record`, with the etag that a swap names."""
    try:
        data, etag = store.get_with_etag(key, max_bytes=MAX_BYTES[kind])
    except NotFoundError:
        return None
    return _parsed(key, kind, data), etag


def _parsed(key: str, kind: type[Kind], data: bytes) -> Kind:
    try:
        return kind.model_validate_json(data)
    except ValidationError as exc:
        raise IntegrityError(
            f"{key} in object storage cannot be read", remedy="Restore it from a backup, or move it away."
        ) from exc
