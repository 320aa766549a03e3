"""What a merged folder says about itself: the record of a finished merge, and the journal of one that is under way.

    rankup-merge.json     what went in and what came out, for everybody who gets the model
    .rankup-merge.json    which files are finished, for the next run of the same merge

What always holds: coefficients are integers over 2^denominator_log2; each file has the hash of its bytes, and of the
base's file that it was made from; the journal stays in a finished folder, so a run too many finds nothing to do. This
module reads and checks the two; it merges nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, Literal

from pydantic import ValidationError

from rankup.errors import StateError
from rankup.folder import LOCK_NAME
from rankup.message import Digest, Message

RECORD: Final = "rankup-merge.json"
JOURNAL: Final = ".rankup-merge.json"


class MergedFile(Message):
    """One file of the result, and the file of the base that it was made from."""

    name: str
    size_bytes: int
    sha256: Digest
    base_sha256: Digest
    tensors_changed: int = 0


class MergedAdapter(Message):
    name: str
    sha256: Digest
    """Of its weights."""
    config_sha256: Digest
    coefficient: int
    """The weight is coefficient / 2^denominator_log2."""
    scalings: tuple[float, ...]
    """alpha / r or alpha / sqrt(r), each that occurs."""


class MergeRecord(Message):
    """What went into a merge and what came out: `rankup-merge.json`."""

    format: Literal["rankup.merge/1"] = "rankup.merge/1"
    rankup: str
    base: str
    adapters: tuple[MergedAdapter, ...]
    denominator_log2: int
    rule: str
    clip: float | None
    """In median norms; None where nothing was clipped."""
    tensors: int
    tensors_changed: int
    files: tuple[MergedFile, ...]


class Journal(Message):
    """What a killed merge leaves: `.rankup-merge.json`."""

    format: Literal["rankup.merge.journal/1"] = "rankup.merge.journal/1"
    inputs: Digest
    coefficients: tuple[int, ...]
    files: tuple[MergedFile, ...] = ()


def read_journal(out: Path, inputs: str) -> Journal | None:
    """The journal of this merge in `out`; None where `out` is empty. Raises StateError where it holds anything else."""
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if JOURNAL not in held:
        if held - {LOCK_NAME}:
            raise StateError(
                f"{out} is not empty and holds no merge", remedy="Choose another folder for --out, or empty that one."
            )
        return None
    try:
        journal = Journal.model_validate_json((out / JOURNAL).read_bytes())
    except (OSError, ValidationError) as exc:
        raise StateError(f"{out / JOURNAL} is not readable", remedy="Empty the folder and merge again.") from exc
    if journal.inputs != inputs:
        raise StateError(
            f"{out} holds a merge of other inputs: another base, adapter, weight or rule, or files that have changed",
            remedy="Choose another folder for --out, or empty that one.",
        )
    return journal


def read_record(out: Path) -> MergeRecord:
    try:
        return MergeRecord.model_validate_json((out / RECORD).read_bytes())
    except (OSError, ValidationError) as exc:
        raise StateError(
            f"{out} holds no finished merge: {RECORD} is missing or not readable",
            remedy="Run the same command without --verify first.",
        ) from exc


def record_text(record: MergeRecord) -> bytes:
    return json.dumps(record.model_dump(mode="json"), indent=2).encode() + b"\n"
