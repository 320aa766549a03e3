"""The record of what is no longer kept of a model's versions: how it is read, and what the parts of a version are.

What always holds: the record is a hint for whoever plans a download. Nobody signs it, so nothing may be trusted for its
sake. Nothing here does I/O.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from pydantic import ValidationError

from rankup.errors import IntegrityError, TooLargeError
from rankup.lineage import contributions_of
from rankup.records import BlobRef, Manifest, Part, Retained

MAX_RETAINED_BYTES: Final = 16 * 1024 * 1024
"""Some hundred thousand versions."""


def parse_retained(data: bytes, *, model: str) -> Retained:
    """The record of `model`.

    Raises:
        TooLargeError: above `MAX_RETAINED_BYTES`.
        IntegrityError: it is not such a record, or one of another model.
    """
    if len(data) > MAX_RETAINED_BYTES:
        raise TooLargeError(f"the record of what {model} no longer keeps has more than {MAX_RETAINED_BYTES} bytes")
    try:
        retained = Retained.model_validate_json(data)
    except ValidationError as exc:
        raise IntegrityError(f"the record of what {model} no longer keeps is not readable") from exc
    if retained.model != model:
        raise IntegrityError(f"the record of what {model} no longer keeps names the model {retained.model}")
    return retained


def parts_of(manifest: Manifest) -> dict[Part, list[BlobRef]]:
    """The blobs of each part of a version that may be missing. Contributions are those with a part in the sum."""
    groups = manifest.groups
    return {
        "export": [group.export for group in groups],
        "patch": [group.patch for group in groups if group.patch is not None],
        "master": [group.master for group in groups],
        "momentum": [group.momentum for group in groups if group.momentum is not None],
        "contributions": list(contributions_of(manifest)),
    }


def lacking(manifest: Manifest, has: Callable[[BlobRef], bool]) -> tuple[Part, ...]:
    """The parts of a version of which a blob is missing, given whether a blob is there."""
    return tuple(part for part, refs in parts_of(manifest).items() if not all(has(ref) for ref in refs))
