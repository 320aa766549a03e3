"""What is stored for ever in object storage besides tensors: dataset cards, round records, receipts and manifests.

All of them are frozen pydantic messages written as `canonical_json`, so equal records are equal bytes and a digest
names one record. Whoever holds the bucket can rebuild every other state from these. Nothing here does I/O.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from rankup.protocol import (
    Digest,
    DisplayName,
    Finite,
    Identifier,
    Message,
    PublicKey,
    Recipe,
    RoundRequest,
    Signature,
    SubmitStatement,
    Target,
    TensorName,
)

RelativePath = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}$")]
"""A file name inside a version's folder: no separators, no leading dot."""
Text = Annotated[str, StringConstraints(max_length=4096)]


class BlobRef(Message):
    """Content-addressed bytes: `blobs/sha256/<first two>/<digest>`."""

    sha256: Digest
    size_bytes: Annotated[int, Field(ge=0, le=2**50)]


class FileEntry(BlobRef):
    """A blob with its name in the version's folder."""

    path: RelativePath


# -- datasets ----------------------------------------------------------------------------------------------------------


class PipelineStep(Message):
    """One step of the cleaning pipeline and what it did."""

    name: str
    rows_in: int
    rows_out: int
    detail: Text = ""


class DatasetCard(Message):
    """A dataset as shards of JSON lines, every row of a shape that TRL takes."""

    dataset: Identifier
    source: Text
    licence: Text
    rows: int
    heldout_rows: int
    shards: Annotated[tuple[BlobRef, ...], Field(min_length=1, max_length=1_000_000)]
    heldout: BlobRef
    """Lies under the key of `versions.heldout_key`, never under `blobs/`: volunteers cannot fetch it."""
    pipeline: tuple[PipelineStep, ...] = ()
    created_at: Finite


# -- rounds and contributions ------------------------------------------------------------------------------------------


class RoundRecord(Message):
    """All that is fixed when a round opens."""

    round_id: Identifier
    request: RoundRequest
    index: Annotated[int, Field(ge=0)]
    """Place in its campaign, from 0."""
    base_version: Annotated[int, Field(ge=0)]
    base_manifest: Digest
    shards: tuple[BlobRef, ...]
    """Shard number within the round -> its bytes."""
    targets: dict[TensorName, Target]
    opened_at: Finite


class Submission(Message):
    """A delta as its worker handed it in, with all that is needed to check the signature again."""

    statement: SubmitStatement
    signature: Signature
    public_key: PublicKey
    worker_id: Identifier
    worker_name: DisplayName
    shard: Annotated[int, Field(ge=0)]
    submitted_at: Finite


class Check(Message):
    """One admission check: its name, its verdict and the value it measured."""

    name: str
    passed: bool
    value: Finite | None = None
    detail: Text = ""


class Receipt(Message):
    """The verdict on a submission; written to object storage before it counts."""

    submission: Submission
    accepted: bool
    reason: Text
    checks: tuple[Check, ...]
    norm: Annotated[Finite, Field(ge=0)] = 0.0
    """Frobenius norm of the whole delta: sqrt of the sum over tensors of |B A|^2."""
    judged_at: Finite


# -- versions ----------------------------------------------------------------------------------------------------------


class TensorEntry(Message):
    """One tensor of a version: hashes of its raw little-endian bytes, in row-major order."""

    shape: Annotated[tuple[int, ...], Field(max_length=8)]
    export_dtype: Literal["BF16", "F16", "F32", "F64", "I8", "I16", "I32", "I64", "U8", "BOOL"]
    master: Digest
    """Hash of the float32 master (of the tensor as it is, where it is not floating point)."""
    export: Digest
    """Hash of what `from_pretrained` reads: bfloat16, round to nearest even, of the master."""
    lora: bool = False
    """A linear layer that a delta may change."""


class Group(Message):
    """Tensors that are folded by one task and stored together: one master file, one export file."""

    tensors: Annotated[tuple[TensorName, ...], Field(min_length=1)]
    master: FileEntry
    export: FileEntry


class Term(Message):
    """One contribution in the sum."""

    contribution: Digest
    size_bytes: Annotated[int, Field(ge=1)]
    worker_id: Identifier
    worker_name: DisplayName
    shard: Annotated[int, Field(ge=0)]
    tokens: Annotated[int, Field(ge=1)]
    coefficient: Annotated[int, Field(ge=0, le=2**31)]
    """Integer weight over `2**denominator_log2` of the manifest."""


class Evaluation(Message):
    """Held-out loss in nats per completion token."""

    heldout_loss: Finite
    parent_heldout_loss: Finite | None = None
    examples: int
    tokens: int


class Manifest(Message):
    """One version of a model. The sha256 of its canonical bytes is the version's identity; the parent's is inside."""

    format: Literal["rankup.manifest/1"] = "rankup.manifest/1"
    model: Identifier
    version: Annotated[int, Field(ge=0)]
    parent: Digest | None
    round_id: Identifier | None
    recipe: Recipe | None
    denominator_log2: Annotated[int, Field(ge=0, le=30)] = 16
    terms: tuple[Term, ...] = ()
    """Sorted by contribution."""
    tensors: dict[TensorName, TensorEntry]
    groups: tuple[Group, ...]
    files: tuple[FileEntry, ...]
    """The rest of the Hugging Face folder: config, tokenizer, index, README."""
    evaluation: Evaluation | None = None
    base_model: Text
    licence: Text
    datasets: tuple[Identifier, ...] = ()
    created_at: Finite

    def targets(self) -> dict[str, Target]:
        """Every weight that a delta may change, with its shape."""
        return {
            name: Target(d_out=entry.shape[0], d_in=entry.shape[1])
            for name, entry in sorted(self.tensors.items())
            if entry.lora
        }

    def export_files(self) -> tuple[FileEntry, ...]:
        """Every file that `from_pretrained` needs."""
        return (*self.files, *(group.export for group in self.groups))
