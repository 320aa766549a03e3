"""The messages of `/v1`: what volunteers, organisers and readers exchange with the gateway, as frozen pydantic models.

What always holds:
- every model is frozen; what a client sends has no unknown field (`Message`), and answers may have ones that an older
  client ignores (`Answer`), so a server may add to them within one PROTOCOL_VERSION;
- every string, list and number that comes from outside has a bound here, so a parsed message is a bounded message;
- digests are lower-case hex sha256 of the bytes they name; times are Unix seconds (float, UTC); sizes are bytes.

Nothing here does I/O.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints, field_validator, model_validator

from rankup.message import (
    Answer,
    Digest,
    DisplayName,
    Finite,
    Identifier,
    Message,
    PublicKey,
    Signature,
    TeamName,
    canonical_json,
)
from rankup.parts import MAX_PARTS, cut
from rankup.recipe import MAX_RANK, Precision, Recipe
from rankup.targets import Target

PROTOCOL_VERSION = 1
MAX_TOKENS = 2**40
MAX_SHARDS_PER_LEASE = 256
MAX_LINK_BYTES = 1024**2
"""Of one body that measures the way to the server."""
MAX_LEASE_BYTES = 256 * 1024**2
"""Of all shards of a lease: a volunteer holds them in memory."""
Voucher = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,1024}\.[0-9a-f]{64}$")]
"""What a lease is, signed by its server, for a server that has forgotten it. A worker only keeps it."""


class Tier(Message):
    """What volunteers with this much memory train: a lower rank needs less."""

    min_memory_gib: Annotated[Finite, Field(ge=0, le=65_536)]
    """Of the GPU, or of the machine where it trains on the CPU."""
    rank: Annotated[int, Field(ge=1, le=MAX_RANK)]
    """At most the recipe's; alpha shrinks with it, so that the scaling of the product stays."""


def tier_of(tiers: Iterable[Tier], memory_bytes: int) -> Tier | None:
    """The highest tier that this much memory allows; None where it allows none, or there are no tiers."""
    fitting = [tier for tier in tiers if tier.min_memory_gib * 2**30 <= memory_bytes]
    return max(fitting, key=lambda tier: (tier.min_memory_gib, tier.rank), default=None)


class VersionRef(Message):
    """One version of a model, by the digest of its manifest."""

    model: Identifier
    version: Annotated[int, Field(ge=0, le=2**53)]
    manifest: Digest


class RoundRequest(Message):
    """What an organiser asks for: `repeat` rounds of one model on one dataset, each on the version before it."""

    model: Identifier
    """What is trained, as named by `rankup model import`; the base is its latest version when a round opens."""
    dataset: Identifier
    """What it is trained on, as named by `rankup dataset build`."""
    teacher: Identifier | None = None
    """Distillation: the model whose version answers the prompts; another architecture and tokenizer are fine."""
    teacher_version: Annotated[int, Field(ge=0, le=2**53)] | None = None
    """Default: its latest when a round opens."""
    recipe: Recipe = Recipe()
    """How a shard is trained, and how contributions become a version."""
    shards: Annotated[int, Field(ge=1, le=1_000_000)] = 3
    """How many shards of the dataset one round hands out; the next round goes on after them and wraps around."""
    quorum: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Shards with an accepted contribution that close the round; default: all. Fewer than all is over-provisioning: the
    round does not wait for its slowest volunteers."""
    min_contributions: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    """Shards with an accepted contribution without which the deadline does not close the round but moves."""
    deadline_s: Annotated[Finite, Field(ge=1, le=31_536_000)] = 86_400.0
    """How long a round is open at most; a pause does not count."""
    grace_s: Annotated[Finite, Field(ge=0, le=604_800)] = 300.0
    """How long a round that closes still waits for volunteers who are training."""
    lease_s: Annotated[Finite, Field(ge=1, le=604_800)] = 1_200.0
    """How long a lease lives without a heartbeat."""
    lease_target_s: Annotated[Finite, Field(ge=1, le=604_800)] = 1_200.0
    """How long a lease should take: who is faster gets more shards at once."""
    max_shards_per_lease: Annotated[int, Field(ge=1, le=MAX_SHARDS_PER_LEASE)] = 16
    """Of neighbouring shards, trained together as one contribution; with 1 each is a contribution of its own."""
    copies: Annotated[int, Field(ge=1, le=8)] = 2
    """How many volunteers may train one shard at a time, once none is free and a second one would be faster."""
    tiers: Annotated[tuple[Tier, ...], Field(max_length=16)] = ()
    """Empty: everybody trains the recipe's rank. Else nobody with less memory than the lowest tier gets a lease."""
    workers: Annotated[tuple[Identifier, ...], Field(max_length=10_000)] = ()
    """Ids of those who may take part; with `teams` empty too, everybody may."""
    teams: Annotated[tuple[TeamName, ...], Field(max_length=1_000)] = ()
    """Teams whose members may take part."""
    priority: Annotated[Finite, Field(gt=0, le=1_000)] = 1.0
    """Share of the volunteers that a round gets where several are open."""
    licence: Annotated[str, StringConstraints(max_length=256)] = ""
    """Under which contributions are given, as volunteers are told; empty: that of the model."""
    repeat: Annotated[int, Field(ge=1, le=10_000)] = 1
    """How many rounds the campaign has, each on the version that the one before it made."""
    max_loss_increase: Annotated[Finite, Field(ge=0, le=10)] = 0.02
    """Release gate: the new held-out loss may exceed the parent's by at most this, in nats per token."""

    @model_validator(mode="after")
    def _quorum_within_shards(self) -> RoundRequest:
        if self.quorum is not None and self.quorum > self.shards:
            raise ValueError(f"quorum {self.quorum} can never be met: the round has {self.shards} shards")
        quorum = self.quorum or self.shards
        if self.min_contributions > quorum:
            raise ValueError(f"min_contributions {self.min_contributions} is above the quorum {quorum}")
        return self

    @model_validator(mode="after")
    def _teacher_where_there_is_a_pupil(self) -> RoundRequest:
        if (self.recipe.method == "distillation") != (self.teacher is not None):
            raise ValueError("a teacher and the method distillation come together")
        if self.teacher is None and self.teacher_version is not None:
            raise ValueError("teacher_version without a teacher")
        return self

    @model_validator(mode="after")
    def _tiers_below_the_recipe(self) -> RoundRequest:
        if any(tier.rank > self.recipe.rank for tier in self.tiers):
            raise ValueError(f"a tier has a higher rank than the recipe ({self.recipe.rank})")
        ladder = sorted((tier.min_memory_gib, tier.rank) for tier in self.tiers)
        for (less, lower), (more, higher) in pairwise(ladder):
            if less == more or lower >= higher:
                raise ValueError(
                    f"tiers from {less:g} GiB (rank {lower}) and {more:g} GiB (rank {higher}): more memory "
                    "must mean a higher rank"
                )
        return self


class CloseRequest(Message):
    """How a round closes early."""

    grace: bool = True
    """Wait up to the round's `grace_s` for those who are training."""
    last: bool = False
    """Open no further round of the campaign."""


class RoundState(StrEnum):
    DRAFT = "draft"
    OPEN = "open"
    CLOSING = "closing"
    AGGREGATING = "aggregating"
    EVALUATING = "evaluating"
    PUBLISHED = "published"
    REJECTED = "rejected"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (RoundState.PUBLISHED, RoundState.REJECTED, RoundState.CANCELLED)


class LeaseState(StrEnum):
    GRANTED = "granted"
    SUBMITTED = "submitted"
    ACCEPTED = "accepted"
    REJECTED = "rejected"
    EXPIRED = "expired"
    RETURNED = "returned"


class RoundView(Answer):
    """A round as everybody may see it."""

    round_id: Identifier
    model: Identifier
    dataset: Identifier
    state: RoundState
    paused: bool = False
    """No leases are granted until it is resumed; what is being trained goes on."""
    reason: str = ""
    index: int
    """Place in its campaign, from 0."""
    repeat: int
    base_version: int
    base_manifest: Digest
    recipe: Recipe
    shards: int
    quorum: int
    min_contributions: int
    deadline_at: float
    opened_at: float
    closed_at: float | None = None
    free: int = 0
    """Shards."""
    leased: int = 0
    """Leases under way; one may hold several shards."""
    submitted: int = 0
    """Contributions that await their verdict."""
    accepted: int = 0
    """Shards with an accepted contribution."""
    contributions: int = 0
    """Accepted contributions, late ones of earlier rounds included."""
    rejected: int = 0
    """Contributions."""
    licence: str = ""
    teacher: VersionRef | None = None
    """Distillation: who answers the prompts; volunteers need it beside the base."""
    tiers: tuple[Tier, ...] = ()
    """Empty: everybody trains the recipe's rank."""
    listed: bool = False
    """It is for volunteers or teams whom the organiser has named."""
    lease_target_s: float = 0.0
    """How long a lease should take."""
    shard_s: float | None = None
    """Seconds of training that a shard took, on the mean of what was handed in; None: nothing was."""
    delta_bytes: int = 0
    """About what a delta weighs at the recipe's rank."""
    shard_bytes: int = 0
    """Of the largest shard."""
    published_version: int | None = None
    heldout_loss: float | None = None
    parent_heldout_loss: float | None = None

    def whereabouts(self) -> dict[str, int]:
        """Where the shards are: accepted, submitted, training, free. They add up to all of them.

        A lease may hold several, so what is neither free nor accepted is split by the numbers of deltas and leases.
        """
        accepted = min(self.accepted, self.shards)
        free = min(self.free, self.shards - accepted)
        held, hands = self.shards - accepted - free, self.submitted + self.leased
        submitted = round(held * self.submitted / hands) if hands else 0
        return {"accepted": accepted, "submitted": submitted, "training": held - submitted, "free": free}


class Rounds(Answer):
    rounds: tuple[RoundView, ...]
    """Newest first; the list may be cut."""


# -- the volunteer -----------------------------------------------------------------------------------------------------


DeviceKind = Literal["cuda", "mps", "xpu", "cpu"]


class DeviceProfile(Message):
    """What a volunteer's machine can do, as measured by the worker."""

    kind: DeviceKind = "cpu"
    name: Annotated[str, StringConstraints(max_length=128)] = ""
    memory_bytes: Annotated[int, Field(ge=0, le=2**50)] = 0
    threads: Annotated[int, Field(ge=1, le=4096)] = 1


class Standing(StrEnum):
    """What the organiser says of a worker."""

    MEMBER = "member"
    WAITING = "waiting"
    """For the organiser's approval: no leases yet."""
    BANNED = "banned"


class EnrolStatement(Message):
    """Signed by the worker's new key: proof that who enrols holds it."""

    public_key: PublicKey
    name: DisplayName
    invite: Annotated[str, StringConstraints(max_length=256)] = ""
    team: TeamName | Literal[""] = ""
    device: DeviceProfile = DeviceProfile()
    protocol: int = PROTOCOL_VERSION
    issued_at: Annotated[Finite, Field(ge=0, le=1e11)]


class EnrolRequest(Message):
    statement: EnrolStatement
    signature: Signature
    """Over `signing_bytes("enrol", statement)`."""


class Enrolled(Answer):
    worker_id: Identifier
    token: str
    """Bearer token for every further call; shown once, stored by the server only as a hash."""
    publisher_key: PublicKey
    """The key that signs every version: the worker pins it."""
    standing: Standing = Standing.MEMBER


class WorkerView(Answer):
    """A worker as the server knows it, for itself."""

    worker_id: Identifier
    name: str
    team: str = ""
    standing: Standing


class BlobLink(Answer):
    """Bytes to fetch: check the digest after, whatever the URL says. It may be relative to the gateway's address."""

    sha256: Digest
    size_bytes: int
    url: str


class ClaimRequest(Message):
    """What a volunteer asks for."""

    models: Annotated[tuple[Identifier, ...], Field(max_length=64)] = ()
    """Empty: any."""
    memory_bytes: Annotated[int, Field(ge=0, le=2**50)] | None = None
    """What a training may take now; None: all that the device had when its worker enrolled."""
    available_s: Annotated[Finite, Field(ge=0, le=31_536_000)] | None = None
    """How long the volunteer's own limits leave it to work; None: they set no end."""
    delivering: Identifier | None = None
    """The lease whose delta is on its way: training is done, so another one may begin beside the upload."""


class LeaseGrant(Answer):
    """Neighbouring shards of one round for one worker."""

    lease_id: Identifier
    fence: int
    """Above that of every earlier grant of any of its shards; each later message about the lease repeats it."""
    round_id: Identifier
    model: Identifier
    base_version: int
    base_manifest: Digest
    shard: int
    """The first one."""
    shards: Annotated[int, Field(ge=1)] = 1
    """How many: `shard`, `shard + 1`, …; their examples are trained together, in `shards` times the steps."""
    shard_links: Annotated[tuple[BlobLink, ...], Field(min_length=1)]
    recipe: Recipe
    """With the rank of the volunteer's tier, and the steps of one shard."""
    seed: int
    """Seeds A and the order of examples; derived from round and lease, so an audit can repeat it."""
    teacher: VersionRef | None = None
    """Distillation: who answers the prompts of the shards."""
    targets: dict[str, Target]
    """Weight name -> shape: exactly what the delta must hold."""
    max_delta_bytes: int
    expires_at: float
    heartbeat_s: float
    voucher: Voucher | Literal[""] = ""
    """Empty: this server writes none."""


NoWorkCode = Literal[
    "no_round",
    "all_handed_out",
    "paused",
    "too_little_memory",
    "too_little_time",
    "other_models",
    "not_listed",
    "waiting",
    "busy",
]
"""Why a volunteer gets no lease, for programs; people read the reason."""


class ClaimAnswer(Answer):
    """A lease, or why there is none and when to ask again."""

    lease: LeaseGrant | None = None
    why: NoWorkCode | None = None
    reason: str = ""
    retry_after_s: float = 0.0


class Heartbeat(Message):
    fence: Annotated[int, Field(ge=0, le=2**53)]
    step: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    loss: Finite | None = None
    tokens_per_s: Annotated[Finite, Field(ge=0)] | None = None
    grad_norm: Annotated[Finite, Field(ge=0)] | None = None
    """Of the last step, before it is cut to the recipe's `max_grad_norm`."""
    energy_j: Annotated[Finite, Field(ge=0)] | None = None
    """What the card has used for this lease so far, in joules; None: it does not tell."""


class HeartbeatAnswer(Answer):
    go_on: bool
    """False: abandon the lease, somebody else has the shard or the round is over."""
    reason: str = ""
    heartbeat_s: float
    expires_at: float


class ReturnRequest(Message):
    fence: Annotated[int, Field(ge=0, le=2**53)]
    reason: Annotated[str, StringConstraints(max_length=512)] = ""


class RestoreRequest(Message):
    """The server has forgotten the lease: here is what it is."""

    voucher: Voucher


class UploadRequest(Message):
    """What is to be uploaded; asked again after every interruption, and once more when all parts are there."""

    fence: Annotated[int, Field(ge=0, le=2**53)]
    sha256: Digest
    size_bytes: Annotated[int, Field(ge=1, le=2**40)]
    parts: Annotated[tuple[Digest, ...], Field(max_length=MAX_PARTS)] = ()
    """sha256 of every part that `rankup.parts.cut` makes of the file; empty: it goes in one piece."""

    @model_validator(mode="after")
    def _one_digest_for_each_part(self) -> UploadRequest:
        if self.parts and len(self.parts) != len(cut(self.size_bytes)):
            raise ValueError(
                f"{len(self.parts)} parts; {self.size_bytes} bytes are cut into {len(cut(self.size_bytes))}"
            )
        return self


class PartTicket(Answer):
    """Where to PUT one part; as `UploadTicket` otherwise."""

    number: int
    url: str
    headers: dict[str, str]


class UploadTicket(Answer):
    """Where to PUT the delta, without a token. The URL signs length and sha256: other bytes are refused. It may be
    relative to the gateway's address."""

    url: str
    """Of the whole; empty where it goes in parts."""
    headers: dict[str, str]
    """To be sent as they are."""
    expires_at: float
    already_there: bool = False
    """The object store has these bytes: submit without uploading."""
    parts: tuple[PartTicket, ...] = ()
    """The next parts that are missing; ask again after them. With the last one there, asking puts them together."""
    there_bytes: int = 0
    """Of parts that have arrived: they are not sent again."""


class SubmitStatement(Message):
    """What the worker signs about its delta; kept in the receipt for ever."""

    round_id: Identifier
    lease_id: Identifier
    fence: Annotated[int, Field(ge=0, le=2**53)]
    base_manifest: Digest
    sha256: Digest
    size_bytes: Annotated[int, Field(ge=1, le=2**40)]
    tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    """Tokens that contributed to the loss: the weight of the contribution."""
    steps: Annotated[int, Field(ge=1, le=1_000_000)]
    first_loss: Finite
    last_loss: Finite
    seconds: Annotated[Finite, Field(ge=0, le=31_536_000)]
    device: DeviceKind = "cpu"
    precision: Precision = "float32"
    """Of the frozen base while it was trained."""
    tokens_per_s: Annotated[Finite, Field(ge=0)] | None = None
    """While it trained, without what comes before and after."""
    grad_norm: Annotated[Finite, Field(ge=0)] | None = None
    """Mean over the last steps, as `last_loss`."""
    energy_j: Annotated[Finite, Field(ge=0)] | None = None
    """What the card used, in joules; None: it does not tell."""


class SubmitRequest(Message):
    statement: SubmitStatement
    signature: Signature
    """Over `signing_bytes("submit", statement)`."""


class LeaseView(Answer):
    lease_id: Identifier
    round_id: Identifier
    shard: int
    shards: int = 1
    worker_id: Identifier
    state: LeaseState
    fence: int
    expires_at: float
    step: int = 0
    contribution: Digest | None = None
    verdict: str = ""
    """In plain words, once there is one."""


class ContributorRow(Answer):
    worker_id: Identifier
    name: str
    accepted: int
    rejected: int
    tokens: int
    """Accepted."""
    team: str = ""
    credit: float = 0.0
    """Tokens that went into published versions, by the weight that they got."""
    escrow: float = 0.0
    """Accepted tokens whose round has not been published yet."""
    reputation: float | None = None
    """Lower bound of its rating among the contributors (mu - 3 sigma); None before the first comparison."""


class LeaseProgress(Answer):
    """A lease under way, as everybody may see it."""

    name: str
    """Its volunteer's, as chosen by the volunteer."""
    shard: int
    shards: int = 1
    step: int
    """By the last heartbeat."""
    steps: int
    """Of the whole lease."""
    loss: float | None = None
    tokens_per_s: float | None = None
    grad_norm: float | None = None
    energy_j: float | None = None
    """Joules so far."""
    granted_at: float
    seen_at: float
    """When it was heard of last."""
    done_at: float | None = None
    """When it will be done at its pace so far; None before its first step."""


class LeasesAtWork(Answer):
    round_id: Identifier
    at: float
    """The server's clock when this was read."""
    total: int
    """All leases under way; the list may be cut."""
    leases: tuple[LeaseProgress, ...]
    """Those that were heard of last first."""


# -- versions ----------------------------------------------------------------------------------------------------------


class Pointer(Message):
    """The one small object that moves: `models/<model>/latest`."""

    model: Identifier
    version: Annotated[int, Field(ge=0, le=2**53)]
    manifest: Digest
    updated_at: Finite


class VersionView(Answer):
    model: Identifier
    version: int
    manifest: Digest
    parent: Digest | None
    round_id: str | None
    created_at: float
    contributions: int
    size_bytes: int
    heldout_loss: float | None
    """Nats per completion token; a base's own is what its first round measured of it."""
    parent_heldout_loss: float | None = None
    change: str | None = None
    """What made the version where no round did: "rollback to 3", "revocation of 1 contribution", "key rotation"."""
    latest: bool


class LinkMeasured(Answer):
    """What arrived of a body that was sent to measure the way; nothing of it is kept."""

    size_bytes: int
    seconds: float
    """From its first bytes to its last."""


class ServerInfo(Answer):
    protocol: int
    server_version: str
    publisher_key: PublicKey
    models: tuple[str, ...]
    invite_needed: bool
    max_delta_bytes: int


# -- errors and signatures ---------------------------------------------------------------------------------------------


class Problem(Answer):
    """`application/problem+json` (RFC 9457). The last part of `type` is the `code` of `rankup.errors`."""

    type: str
    title: str
    status: int
    detail: str
    remedy: str
    retry_after_s: float | None = None
    errors: tuple[dict[str, Any], ...] = ()
    """Where validation failed: location and message of each field."""

    @field_validator("type")
    @classmethod
    def _uri(cls, value: str) -> str:
        if "/" not in value:
            raise ValueError("must be a URI reference")
        return value


def payload_type(kind: str) -> str:
    """Media type that goes into a signature, so that a signature for one kind never serves for another."""
    return f"application/vnd.rankup.{kind}.v1+json"


def pre_authentication_encoding(kind: str, payload: bytes) -> bytes:
    """DSSE v1 pre-authentication encoding (secure-systems-lab/dsse, protocol.md): what Ed25519 really signs."""
    media_type = payload_type(kind).encode()
    return b"DSSEv1 %d %s %d %s" % (len(media_type), media_type, len(payload), payload)


def signing_bytes(kind: str, message: BaseModel) -> bytes:
    """What a key signs to vouch for `message` as a `kind` ("enrol", "submit", "manifest", "receipt")."""
    return pre_authentication_encoding(kind, canonical_json(message))
