"""An example of each message that the API takes, and of the answers: what `/v1/openapi.json` shows beside the schemas.

What always holds: the examples are made of the protocol's own models, so they are valid; together they tell one story,
of one volunteer, one round and one shard. Nothing in them is a secret or a real key.
"""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel

import rankup
from rankup.membership import (
    Action,
    ActionLog,
    Approved,
    ApproveRequest,
    BanRequest,
    Invite,
    InviteRequest,
    Invites,
    Leaderboard,
    NewInvite,
    NewToken,
    PeoplePage,
    Person,
    TeamRow,
)
from rankup.message import Message
from rankup.protocol import (
    PROTOCOL_VERSION,
    BlobLink,
    ClaimAnswer,
    ClaimRequest,
    CloseRequest,
    ContributorRow,
    DeviceProfile,
    Enrolled,
    EnrolRequest,
    EnrolStatement,
    Heartbeat,
    HeartbeatAnswer,
    LeaseGrant,
    LeaseProgress,
    LeasesAtWork,
    LeaseState,
    LeaseView,
    LinkMeasured,
    Pointer,
    Problem,
    RestoreRequest,
    ReturnRequest,
    RoundRequest,
    RoundState,
    RoundView,
    ServerInfo,
    Standing,
    SubmitRequest,
    SubmitStatement,
    UploadRequest,
    UploadTicket,
    VersionView,
    WorkerView,
)
from rankup.recipe import Recipe
from rankup.records import BlobRef, DatasetCard, Retained
from rankup.targets import Target

_KEY, _DIGEST, _DELTA, _PARENT, _SIGNATURE = "d7" * 32, "3b" * 32, "5e" * 32, "1a" * 32, "9c" * 64
_ROUND, _LEASE, _WORKER = "tiny-r0001-9f3c2a", "l-4f2a9c1b7d3e5f60", "w-2b9d6c1e8f405a73"
_OPENED_AT = 1_767_225_600.0
_BYTES = 4_915_200
_VOUCHER = f"eyJmZW5jZSI6MywibGVhc2VfaWQiOiJsLTRmMmE5YzFiN2QzZTVmNjAifQ.{_PARENT}"
_RECIPE = Recipe(rank=8, steps=25)

EXAMPLES: Final[dict[str, Message]] = {
    "/v1/workers": EnrolRequest(
        statement=EnrolStatement(
            public_key=_KEY,
            name="ada",
            invite="spring-round",
            device=DeviceProfile(kind="cuda", name="RTX 3060", memory_bytes=12 * 1024**3, threads=8),
            issued_at=_OPENED_AT,
        ),
        signature=_SIGNATURE,
    ),
    "/v1/invites": InviteRequest(uses=20, team="lovelace", note="for the seminar"),
    "/v1/people/approve": ApproveRequest(workers=(_WORKER,)),
    "/v1/people/{worker_id}/ban": BanRequest(reason="copies of other people's deltas"),
    "/v1/leases": ClaimRequest(models=("tiny",), memory_bytes=8 * 1024**3, available_s=14_400.0),
    "/v1/leases/{lease_id}/heartbeat": Heartbeat(
        fence=3, step=12, loss=2.93, tokens_per_s=410.0, grad_norm=0.84, energy_j=5120.0
    ),
    "/v1/leases/{lease_id}/return": ReturnRequest(fence=3, reason="the machine is needed for a game"),
    "/v1/leases/{lease_id}/restore": RestoreRequest(voucher=_VOUCHER),
    "/v1/leases/{lease_id}/upload": UploadRequest(fence=3, sha256=_DELTA, size_bytes=_BYTES),
    "/v1/leases/{lease_id}/submit": SubmitRequest(
        statement=SubmitStatement(
            round_id=_ROUND,
            lease_id=_LEASE,
            fence=3,
            base_manifest=_DIGEST,
            sha256=_DELTA,
            size_bytes=_BYTES,
            tokens=9_800,
            steps=25,
            first_loss=3.41,
            last_loss=2.93,
            seconds=61.5,
        ),
        signature=_SIGNATURE,
    ),
    "/v1/rounds/{round_id}/close": CloseRequest(grace=True, last=False),
    "/v1/rounds": RoundRequest(model="tiny", dataset="pydocs", recipe=_RECIPE, shards=3, repeat=4),
}
"""Path of a POST -> a body for it."""

_GRANT = LeaseGrant(
    lease_id=_LEASE,
    fence=3,
    round_id=_ROUND,
    model="tiny",
    base_version=0,
    base_manifest=_DIGEST,
    shard=1,
    shard_links=(BlobLink(sha256=_PARENT, size_bytes=61_440, url=f"v1/blobs/{_PARENT}"),),
    recipe=_RECIPE,
    seed=1_234_567,
    targets={"layers.0.q_proj.weight": Target(role="linear", d_out=576, d_in=576)},
    max_delta_bytes=8_388_608,
    expires_at=_OPENED_AT + 1_260,
    heartbeat_s=15.0,
    voucher=_VOUCHER,
)
_LEASE_VIEW = LeaseView(
    lease_id=_LEASE,
    round_id=_ROUND,
    shard=1,
    worker_id=_WORKER,
    state=LeaseState.SUBMITTED,
    fence=3,
    expires_at=_OPENED_AT + 1_260,
    step=25,
    contribution=_DELTA,
)
_ROUND_VIEW = RoundView(
    round_id=_ROUND,
    model="tiny",
    dataset="pydocs",
    state=RoundState.OPEN,
    index=0,
    repeat=4,
    base_version=0,
    base_manifest=_DIGEST,
    recipe=_RECIPE,
    shards=3,
    quorum=3,
    min_contributions=1,
    deadline_at=_OPENED_AT + 86_400,
    opened_at=_OPENED_AT,
    free=1,
    leased=1,
    submitted=0,
    accepted=1,
    lease_target_s=1_200.0,
    shard_s=61.5,
    delta_bytes=_BYTES,
    shard_bytes=61_440,
)
_VERSION = VersionView(
    model="tiny",
    version=1,
    manifest=_DIGEST,
    parent=_PARENT,
    round_id=_ROUND,
    created_at=_OPENED_AT + 4_000,
    contributions=3,
    size_bytes=269_060_552,
    heldout_loss=2.93,
    parent_heldout_loss=3.46,
    latest=True,
)
_CARD = DatasetCard(
    dataset="pydocs",
    source="docstrings of the standard library",
    licence="PSF-2.0",
    rows=192,
    heldout_rows=64,
    shards=(BlobRef(sha256=_PARENT, size_bytes=61_440),),
    heldout=BlobRef(sha256=_DELTA, size_bytes=20_480),
    created_at=_OPENED_AT - 3_600,
)
_ROW = ContributorRow(
    worker_id=_WORKER,
    name="ada",
    accepted=12,
    rejected=1,
    tokens=117_600,
    team="lovelace",
    credit=98_000.0,
    escrow=9_800.0,
    reputation=7.5,
)
_PERSON = Person(
    **_ROW.model_dump(),
    standing=Standing.MEMBER,
    device=DeviceProfile(kind="cuda", name="RTX 3060", memory_bytes=12 * 1024**3, threads=8),
    enrolled_at=_OPENED_AT - 86_400,
    seen_at=_OPENED_AT,
    valid_in_a_row=11,
)
_INVITE = Invite(
    invite_id="i-4f2a9c1b",
    sha256=_PARENT,
    uses=20,
    left=17,
    team="lovelace",
    note="for the seminar",
    made_at=_OPENED_AT - 86_400,
    expires_at=_OPENED_AT + 518_400,
)
_ACTION = Action(
    what="ban",
    by="9c1b7d3e5f604f2a",
    address="192.0.2.7",
    request_id="5e2d9a7c31f0b846",
    subject={"worker_id": _WORKER},
    arguments={"reason": "copies of other people's deltas"},
    at=_OPENED_AT + 60,
)

PROBLEM: Final = Problem(
    type="https://rankup.dev/problems/wrong-state",
    title="Not in this state",
    status=409,
    detail=f"Lease {_LEASE} has handed in another delta.",
    remedy="Ask for its present state and act on that.",
)

_MODELS: Final[tuple[BaseModel, ...]] = (
    ServerInfo(
        protocol=PROTOCOL_VERSION,
        server_version=rankup.__version__,
        publisher_key=_KEY,
        models=("tiny",),
        invite_needed=True,
        max_delta_bytes=2 * 1024**3,
    ),
    Enrolled(worker_id=_WORKER, token="shown-once-and-then-only-its-hash-is-kept", publisher_key=_KEY),  # noqa: S106
    WorkerView(worker_id=_WORKER, name="ada", team="lovelace", standing=Standing.MEMBER),
    ClaimAnswer(lease=_GRANT),
    HeartbeatAnswer(go_on=True, heartbeat_s=15.0, expires_at=_OPENED_AT + 1_275),
    UploadTicket(
        url="https://s3.example.org/rankup/uploads/l-4f2a9c1b7d3e5f60/5e5e?X-Amz-Signature=0",
        headers={
            "Content-Length": str(_BYTES),
            "x-amz-checksum-sha256": "Xl5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl5eXl4=",
        },
        expires_at=_OPENED_AT + 3_600,
    ),
    _LEASE_VIEW,
    _ROUND_VIEW,
    LeasesAtWork(
        round_id=_ROUND,
        at=_OPENED_AT + 93.0,
        total=1,
        leases=(
            LeaseProgress(
                name="ada",
                shard=1,
                step=12,
                steps=25,
                loss=2.93,
                tokens_per_s=410.0,
                grad_norm=0.84,
                energy_j=5120.0,
                granted_at=_OPENED_AT + 60,
                seen_at=_OPENED_AT + 90,
                done_at=_OPENED_AT + 122.5,
            ),
        ),
    ),
    Pointer(model="tiny", version=1, manifest=_DIGEST, updated_at=_OPENED_AT + 4_000),
    Retained(model="tiny"),
    LinkMeasured(size_bytes=65_536, seconds=0.21),
    NewToken(token="shown-once-and-then-only-its-hash-is-kept", expires_at=_OPENED_AT + 7_776_000),  # noqa: S106
    NewInvite(code="i-4f2a9c1b-0f1e2d3c4b5a69788796", invite=_INVITE),
    Invites(invites=(_INVITE,)),
    Approved(workers=(_WORKER,)),
    _PERSON,
    PeoplePage(people=(_PERSON,)),
    ActionLog(actions=(_ACTION,)),
    Leaderboard(rows=(_ROW,), teams=(TeamRow(team="lovelace", members=3, credit=131_000.0),)),
)


def _json(model: BaseModel) -> Any:
    return model.model_dump(mode="json", exclude_none=True)


ANSWERS: Final[dict[str, Any]] = {
    **{type(model).__name__: _json(model) for model in _MODELS},
    "Health": {"status": "ok"},
    "Models": {"models": ["tiny"]},
    "Versions": {"versions": [_json(_VERSION)]},
    "Datasets": {"datasets": [_json(_CARD)]},
    "Rounds": {"rounds": [_json(_ROUND_VIEW)]},
    "Contributions": {"contributions": [_json(_LEASE_VIEW)]},
}
"""Name of an answer's model -> an example of it."""
