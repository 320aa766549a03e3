"""What is stored for ever in object storage besides tensors: dataset cards, round records, receipts and manifests.

All of them are frozen pydantic messages written as `canonical_json`, so equal records are equal bytes and a digest
names one record. Whoever holds the bucket can rebuild every other state from these. Nothing here does I/O.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, StringConstraints

from rankup.message import Digest, DisplayName, Finite, Identifier, Message, PublicKey, Signature, TensorName
from rankup.protocol import RoundRequest, RoundState, SubmitStatement, VersionRef
from rankup.recipe import Recipe, Rule
from rankup.targets import Role, Target, target_of

RelativePath = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}$")]
"""A file name inside a version's folder: no separators, no leading dot."""
Text = Annotated[str, StringConstraints(max_length=4096)]
EMPTY_TREE: Final = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
"""Root of a Merkle tree without leaves: the sha256 of nothing."""


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
    shape: Annotated[str, StringConstraints(max_length=64)] = ""
    """Of every row, as `coordinator.rows` names it: which methods may train on it follows from this."""
    needs: Annotated[tuple[Annotated[str, StringConstraints(max_length=64)], ...], Field(max_length=1024)] = ()
    """What the chat template of a base must have a word for (`rankup.chat`)."""
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
    teacher: VersionRef | None = None
    """Distillation: the version that answers the prompts."""
    shards: tuple[BlobRef, ...]
    """Shard number within the round -> its bytes."""
    targets: dict[TensorName, Target]
    older_bases: Annotated[tuple[Digest, ...], Field(max_length=64)] = ()
    """Manifests before the base, newest first, that a delta may have been trained on too."""
    earlier_rounds: Annotated[tuple[Identifier, ...], Field(max_length=64)] = ()
    """Rounds of the campaign before this one, newest first, whose late deltas this one takes."""
    opened_at: Finite

    def staleness(self, base_manifest: str) -> int | None:
        """How many versions older than the round's base `base_manifest` is; None where it is no base of this round."""
        bases = (self.base_manifest, *self.older_bases)
        return bases.index(base_manifest) if base_manifest in bases else None


class Submission(Message):
    """A delta as its worker handed it in, with all that is needed to check the signature again."""

    statement: SubmitStatement
    signature: Signature
    public_key: PublicKey
    worker_id: Identifier
    worker_name: DisplayName
    shard: Annotated[int, Field(ge=0)]
    """The first one, of the round that the statement names."""
    shards: Annotated[int, Field(ge=1)] = 1
    rank: Annotated[int, Field(ge=1)] | None = None
    """Of the volunteer's tier, where that is not the recipe's."""
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


class Evaluation(Message):
    """Held-out loss, in nats per token; of preferences docs/numerics.md says what it is."""

    heldout_loss: Finite
    parent_heldout_loss: Finite | None = None
    examples: int
    tokens: int


class RoundEnd(Message):
    """How a round ended; written before the ledger forgets what it owes."""

    format: Literal["rankup.round-end/1"] = "rankup.round-end/1"
    round_id: Identifier
    state: Literal[RoundState.PUBLISHED, RoundState.REJECTED, RoundState.CANCELLED]
    reason: Text = ""
    published_version: Annotated[int, Field(ge=1)] | None = None
    evaluation: Evaluation | None = None
    closed_at: Finite | None = None
    rounds: Annotated[int, Field(ge=1)] = 1
    """How many its campaign has, as the organiser last said."""
    paused: bool = False
    """The next round of the campaign opens paused."""
    ended_at: Finite


class Member(Message):
    """What was found about one accepted contribution beside the others, and the weight that it got."""

    contribution: Digest
    checks: tuple[Check, ...] = ()
    coefficient: Annotated[int, Field(ge=0, le=2**31)]
    """Over 2**denominator_log2; 0 where a check failed or the rule left the contribution out."""


class Cohort(Message):
    """A round's accepted contributions, judged together; written once, before they are folded."""

    format: Literal["rankup.cohort/1"] = "rankup.cohort/1"
    round_id: Identifier
    rule: Rule
    denominator_log2: Annotated[int, Field(ge=0, le=30)]
    base_loss: Finite | None = None
    """Held-out loss of the base on the rows that contributions were measured on, in nats per scored token."""
    members: Annotated[tuple[Member, ...], Field(min_length=1)]
    """Sorted by contribution."""
    decided_at: Finite


# -- versions ----------------------------------------------------------------------------------------------------------


class TensorEntry(Message):
    """One tensor of a version: hashes of its raw little-endian bytes, in row-major order."""

    shape: Annotated[tuple[int, ...], Field(max_length=8)]
    export_dtype: Literal["BF16", "F16", "F32", "F64", "I8", "I16", "I32", "I64", "U8", "BOOL"]
    master: Digest
    """Hash of the float32 master (of the tensor as it is, where it is not floating point)."""
    export: Digest
    """Hash of what `from_pretrained` reads: bfloat16, round to nearest even, of the master."""
    role: Role | None = None
    """What the weight is to a recipe; None where no delta may change it."""
    momentum: Digest | None = None
    """Hash of the float32 momentum of the outer step, where there is one."""


class Patch(BlobRef):
    """What makes a group's export file out of its parent's: docs/formats.md, "The patch file"."""

    base: Digest
    """sha256 of the export file that it is made for."""


class Group(Message):
    """Tensors that are folded by one task and stored together: one master file, one export file."""

    tensors: Annotated[tuple[TensorName, ...], Field(min_length=1)]
    master: FileEntry
    export: FileEntry
    momentum: FileEntry | None = None
    """State of the outer step, for the tensors that have one: nobody but the aggregator and verifiers needs it."""
    patch: Patch | None = None
    """From the parent's export file, where that has other bytes and a patch is smaller than the file."""


class FoldedGroup(Message):
    """One group of the next version with its tensors: what a fold remembers of the work that it has finished."""

    group: Group
    tensors: dict[TensorName, TensorEntry]


class Term(Message):
    """One contribution in the sum."""

    contribution: Digest
    size_bytes: Annotated[int, Field(ge=1)]
    worker_id: Identifier
    worker_name: DisplayName
    shard: Annotated[int, Field(ge=0)]
    """The first one."""
    shards: Annotated[int, Field(ge=1)] = 1
    tokens: Annotated[int, Field(ge=1)]
    coefficient: Annotated[int, Field(ge=0, le=2**31)]
    """Integer weight over `2**denominator_log2` of the manifest; 0 for a contribution that was left out."""
    base_manifest: Digest | None = None
    """The version that it was trained on, where that is not the parent."""
    round_id: Identifier | None = None
    """The round that it was trained for, where that is an earlier one."""


class Rollback(Message):
    """The version has the tensors of an earlier one."""

    kind: Literal["rollback"] = "rollback"
    to: Annotated[int, Field(ge=0)]
    reason: Text = ""


class Revocation(Message):
    """The version is its parent without some contributions: `rankup.lineage` says what that is, to the bit."""

    kind: Literal["revocation"] = "revocation"
    contributions: Annotated[tuple[Digest, ...], Field(min_length=1)]
    """Sorted."""
    reason: Text = ""


class KeyRotation(Message):
    """The version has its parent's tensors and is the first one signed by the last of its `keys`."""

    kind: Literal["key-rotation"] = "key-rotation"
    reason: Text = ""


Change = Annotated[Rollback | Revocation | KeyRotation, Field(discriminator="kind")]
"""What made a version that no round made."""


class KeyStatement(Message):
    """From version `from_version` of the model on, `new` signs in the place of `old`."""

    model: Identifier
    old: PublicKey
    new: PublicKey
    from_version: Annotated[int, Field(ge=1)]


class KeyChange(Message):
    """The publisher's old key names its successor."""

    statement: KeyStatement
    signature: Signature
    """By the old key, of the statement as a "key-change"."""


class Log(Message):
    """A Merkle tree (RFC 9162, section 2.1) over every contribution in the sum: `rankup.lineage`."""

    size: Annotated[int, Field(ge=0)]
    root: Digest


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
    change: Change | None = None
    """What made this version, where no round did."""
    keys: Annotated[tuple[KeyChange, ...], Field(max_length=64)] = ()
    """Every change of the publisher's key up to this version, oldest first."""
    log: Log = Log(size=0, root=EMPTY_TREE)
    """The contributions in the sum; the leaves stand in the file `contributions.json`."""
    software: Text = ""
    """What made it: name and version."""
    base_model: Text
    licence: Text
    datasets: tuple[Identifier, ...] = ()
    created_at: Finite

    def targets(self) -> dict[str, Target]:
        """Every weight that a delta may change, with its shape."""
        return {
            name: target_of(entry.role, entry.shape)
            for name, entry in sorted(self.tensors.items())
            if entry.role is not None
        }

    def export_files(self) -> tuple[FileEntry, ...]:
        """Every file that `from_pretrained` needs."""
        return (*self.files, *(group.export for group in self.groups))


# -- what a version is the sum of --------------------------------------------------------------------------------------


class Leaf(Message):
    """One contribution in the sum of a version: a leaf of its log."""

    contribution: Digest
    version: Annotated[int, Field(ge=1)]
    """The version whose round it was in."""
    coefficient: Annotated[int, Field(ge=1, le=2**31)]
    denominator_log2: Annotated[int, Field(ge=0, le=30)]


class ContributionList(Message):
    """`contributions.json` in a version's folder: the leaves of its log, in order (version, then contribution)."""

    format: Literal["rankup.contributions/1"] = "rankup.contributions/1"
    model: Identifier
    leaves: tuple[Leaf, ...] = ()


# -- what is no longer kept --------------------------------------------------------------------------------------------


Part = Literal["master", "export", "momentum", "patch", "contributions"]


class Retained(Message):
    """What object storage no longer holds of a model's versions; a hint for whoever plans a download, not signed."""

    format: Literal["rankup.retained/1"] = "rankup.retained/1"
    model: Identifier
    gone: dict[int, tuple[Part, ...]] = Field(default_factory=dict)
    """Version -> its parts of which a file may be missing."""
