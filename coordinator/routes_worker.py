"""Routes of volunteers: enrol, claim a shard, report, give it back, upload a delta, hand it in.

What always holds:
- a worker reads and changes its own leases only;
- every call may be repeated after a lost answer: enrolling again gives a new token to the same worker, submitting again
  gives the present state of the lease, also after the verdict;
- a ticket signs length and sha256 of the bytes, and nothing counts before they lie in object storage. They go there
  straight or, where `transfer` is "proxied", through this gateway (routes_upload.py).
"""

from __future__ import annotations

import secrets
from typing import Annotated

import structlog
from fastapi import APIRouter, Path

from coordinator.access import CallingWorker, Desk, DeskOf, same_secret, token_hash
from coordinator.grants import (
    beat_interval_s,
    grant_of,
    require_own,
    require_submission,
    require_uploadable,
    shard_of,
)
from coordinator.leases import Lease
from coordinator.ledger import Ledger, NoWork, Worker
from coordinator.openapi import refusals
from coordinator.tickets import TICKET_TTL_S, Ticket
from rankup.errors import DeniedError, InputError, IntegrityError, StateError
from rankup.message import Answer, Identifier
from rankup.protocol import (
    PROTOCOL_VERSION,
    ClaimAnswer,
    ContributorRow,
    Enrolled,
    EnrolRequest,
    Heartbeat,
    HeartbeatAnswer,
    LeaseState,
    LeaseView,
    ReturnRequest,
    SubmitRequest,
    UploadRequest,
    UploadTicket,
)
from rankup.records import Submission
from rankup.signing import verify, worker_id_of
from rankup.store import blob_key
from rankup.versions import upload_key

MAX_CLOCK_SKEW_S = 3600.0
"""An enrolment is signed with its time, so a recorded one cannot be used for ever."""
TOKEN_BYTES = 32

LeaseId = Annotated[Identifier, Path(description="From the lease's grant.")]

log = structlog.get_logger(__name__)
router = APIRouter(prefix="/v1", tags=["worker"])


class Contributions(Answer):
    contributions: tuple[LeaseView, ...]


class Leaderboard(Answer):
    rows: tuple[ContributorRow, ...]


async def _own_lease(ledger: Ledger, lease_id: str, worker: Worker) -> Lease:
    lease = await ledger.lease(lease_id)
    require_own(lease, worker.worker_id)
    return lease


@router.post("/workers", status_code=201, responses=refusals(400, 403))
async def enrol(request: EnrolRequest, desk: DeskOf) -> Enrolled:
    """Join with a new key, or get a new token for a known one; the old token stops working."""
    said, now = request.statement, desk.clock()
    if said.protocol != PROTOCOL_VERSION:
        raise InputError(
            f"The server speaks protocol {PROTOCOL_VERSION}, the worker {said.protocol}.",
            remedy="Update the older of the two.",
        )
    invite = desk.settings.invite.get_secret_value()
    if invite and not same_secret(said.invite, invite):
        raise DeniedError("The invite is not the one of this server.")
    if abs(said.issued_at - now) > MAX_CLOCK_SKEW_S:
        raise InputError(
            f"The clock of this machine is {abs(said.issued_at - now) / 3600:.1f} hours off the server's.",
            remedy="Set the clock (for example `timedatectl set-ntp true`) and join again.",
        )
    try:
        verify(said.public_key, "enrol", said, request.signature)
    except (IntegrityError, InputError) as exc:
        raise DeniedError(
            "The enrolment is not signed by the key that it names.", remedy="Sign the statement with the worker's key."
        ) from exc
    worker = Worker(
        worker_id=worker_id_of(said.public_key),
        name=said.name,
        public_key=said.public_key,
        device=said.device,
        enrolled_at=now,
    )
    token = secrets.token_urlsafe(TOKEN_BYTES)
    await (await desk.ledger()).people.enrol(worker, token_hash(token))
    log.info("worker_enrolled", worker_id=worker.worker_id, device=said.device.kind)
    return Enrolled(worker_id=worker.worker_id, token=token, publisher_key=desk.publisher_key)


@router.post("/leases", responses=refusals(401, 403))
async def claim(worker: CallingWorker, desk: DeskOf) -> ClaimAnswer:
    """One shard of an open round, or when to ask again. A worker that holds a lease gets that one again."""
    ledger = await desk.ledger()
    found = await ledger.claim(worker.worker_id, desk.clock())
    if isinstance(found, NoWork):
        return ClaimAnswer(reason=found.reason, retry_after_s=desk.settings.poll_s)
    record = await ledger.record(found.round_id)
    shard = shard_of(record, found).sha256
    if desk.settings.transfer == "proxied":
        url = f"v1/blobs/{shard}"
    else:
        url = await desk.in_thread(desk.store.presign_get, blob_key(shard))
    grant = grant_of(
        found,
        record,
        shard_url=url,
        cap_bytes=desk.settings.max_delta_bytes,
        heartbeat_s=beat_interval_s(record.request.lease_s, desk.settings.heartbeat_s),
    )
    log.info("lease_granted", lease_id=found.lease_id, round_id=found.round_id, worker_id=worker.worker_id)
    return ClaimAnswer(lease=grant)


@router.get("/leases/{lease_id}", responses=refusals(401, 403, 404))
async def show_lease(lease_id: LeaseId, worker: CallingWorker, desk: DeskOf) -> LeaseView:
    """The present state of an own lease, with its verdict once there is one."""
    return (await _own_lease(await desk.ledger(), lease_id, worker)).view()


@router.post("/leases/{lease_id}/heartbeat", responses=refusals(401, 403, 404, 409))
async def heartbeat(lease_id: LeaseId, beat: Heartbeat, worker: CallingWorker, desk: DeskOf) -> HeartbeatAnswer:
    """Keep the lease alive and learn whether going on is still of use."""
    ledger = await desk.ledger()
    answer = await ledger.heartbeat(lease_id, worker.worker_id, beat, desk.clock())
    record = await ledger.record(answer.lease.round_id)
    return HeartbeatAnswer(
        go_on=answer.go_on,
        reason=answer.reason,
        heartbeat_s=beat_interval_s(record.request.lease_s, desk.settings.heartbeat_s),
        expires_at=answer.lease.expires_at,
    )


@router.post("/leases/{lease_id}/return", responses=refusals(401, 403, 404, 409))
async def give_back(lease_id: LeaseId, request: ReturnRequest, worker: CallingWorker, desk: DeskOf) -> LeaseView:
    """Give the shard back unfinished, so that somebody else gets it at once."""
    ledger = await desk.ledger()
    lease = await ledger.give_back(lease_id, worker.worker_id, request.fence, request.reason, desk.clock())
    return lease.view()


@router.post("/leases/{lease_id}/upload", responses=refusals(401, 403, 404, 409, 413))
async def ticket(lease_id: LeaseId, request: UploadRequest, worker: CallingWorker, desk: DeskOf) -> UploadTicket:
    """Where to PUT the delta: the address takes exactly these bytes, and only for a while."""
    ledger = await desk.ledger()
    lease = await _own_lease(ledger, lease_id, worker)
    status = await ledger.round(lease.round_id)
    require_uploadable(
        lease,
        status.record,
        round_state=status.facts.state,
        fence=request.fence,
        sha256=request.sha256,
        size_bytes=request.size_bytes,
        cap_bytes=desk.settings.max_delta_bytes,
    )
    key = upload_key(lease_id, request.sha256)
    there = lease.contribution is not None or await _is_uploaded(desk, key, request.size_bytes)
    if desk.tickets is not None:
        signed = Ticket(lease_id, request.sha256, request.size_bytes, int(desk.clock()) + TICKET_TTL_S)
        return UploadTicket(
            url=desk.tickets.address(signed),
            headers={"Content-Length": str(request.size_bytes)},
            expires_at=signed.expires_at,
            already_there=there,
        )
    put = await desk.in_thread(desk.store.presign_put, key, size_bytes=request.size_bytes, sha256=request.sha256)
    return UploadTicket(url=put.url, headers=put.headers, expires_at=put.expires_at, already_there=there)


@router.post("/leases/{lease_id}/submit", status_code=202, responses=refusals(400, 401, 403, 404, 409, 413))
async def submit(lease_id: LeaseId, request: SubmitRequest, worker: CallingWorker, desk: DeskOf) -> LeaseView:
    """Hand the uploaded delta in. The verdict comes later: ask for the lease."""
    ledger, said, now = await desk.ledger(), request.statement, desk.clock()
    lease = await _own_lease(ledger, lease_id, worker)
    record = await ledger.record(lease.round_id)
    require_submission(request, lease, record, public_key=worker.public_key, cap_bytes=desk.settings.max_delta_bytes)
    if lease.contribution == said.sha256 and lease.state is not LeaseState.SUBMITTED:
        return lease.view()  # After the verdict the upload may be gone; the answer is the same.
    # A submission that is repeated before its verdict goes through the ledger again: the first one may not be on disk.
    if lease.contribution is None and not await _is_uploaded(desk, upload_key(lease_id, said.sha256), said.size_bytes):
        raise StateError(
            f"Object storage has no upload of lease {lease_id} with this sha256 and {said.size_bytes} bytes.",
            remedy="Upload first: ask for a ticket, PUT the delta, then submit again.",
        )
    submission = Submission(
        statement=said,
        signature=request.signature,
        public_key=worker.public_key,
        worker_id=worker.worker_id,
        worker_name=worker.name,
        shard=lease.shard,
        submitted_at=now,
    )
    lease = await ledger.submit(lease_id, worker.worker_id, submission, now)
    log.info("delta_submitted", lease_id=lease_id, round_id=lease.round_id, contribution=said.sha256)
    return lease.view()


@router.get("/contributions", responses=refusals(401, 403))
async def contributions(worker: CallingWorker, desk: DeskOf) -> Contributions:
    """Every lease of the calling worker."""
    leases = await (await desk.ledger()).people.contributions(worker.worker_id)
    return Contributions(contributions=tuple(lease.view() for lease in leases))


@router.get("/leaderboard", responses=refusals())
async def leaderboard(desk: DeskOf) -> Leaderboard:
    """Who has contributed what."""
    return Leaderboard(rows=tuple(await (await desk.ledger()).people.leaderboard()))


async def _is_uploaded(desk: Desk, key: str, size_bytes: int) -> bool:
    info = await desk.in_thread(desk.store.head, key)
    return info is not None and info.size_bytes == size_bytes
