"""Routes of volunteers: claim a lease, report, give it back, take it up again, upload a delta, hand it in.

What always holds:
- a worker reads and changes its own leases only;
- every call may be repeated after a lost answer: submitting again gives the present state of the lease, also after the
  verdict;
- a ticket signs length and sha256 of the bytes, and nothing counts before they lie in object storage. They go there
  straight or, where `transfer` is "proxied", through this gateway (routes_upload.py).
"""

from __future__ import annotations

from typing import Annotated, Final

import structlog
from fastapi import APIRouter, Path

from coordinator.access import (
    CallingWorker,
    Credentials,
    Desk,
    DeskOf,
    require_worker,
    token_hash,
    token_of,
)
from coordinator.adopting import adopt, being_restored
from coordinator.grants import grant_of, require_own, require_submission, require_uploadable, shards_of
from coordinator.leases import TAKES_SUBMISSIONS, Lease
from coordinator.ledger import Ledger, NoWork, Worker
from coordinator.matching import Seeker
from coordinator.openapi import refusals
from coordinator.pace import beat_interval_s, retry_after_s
from coordinator.tickets import TICKET_TTL_S, Ticket
from coordinator.unjudged import keep_submission
from coordinator.uploads import ticket_in_parts
from coordinator.vouchers import wrong_voucher
from rankup.errors import NotFoundError, StateError
from rankup.message import Answer, Identifier
from rankup.protocol import (
    ClaimAnswer,
    ClaimRequest,
    Heartbeat,
    HeartbeatAnswer,
    LeaseState,
    LeaseView,
    RestoreRequest,
    ReturnRequest,
    SubmitRequest,
    UploadRequest,
    UploadTicket,
)
from rankup.records import Submission
from rankup.store import blob_key
from rankup.versions import round_key, upload_key

ANYTHING: Final = ClaimRequest()
LeaseId = Annotated[Identifier, Path(description="From the lease's grant.")]

log = structlog.get_logger(__name__)
router = APIRouter(prefix="/v1", tags=["worker"])


class Contributions(Answer):
    contributions: tuple[LeaseView, ...]


async def _own_lease(ledger: Ledger, lease_id: str, worker: Worker) -> Lease:
    lease = await ledger.lease(lease_id)
    require_own(lease, worker.worker_id)
    return lease


@router.post("/leases", responses=refusals(401, 403))
async def claim(worker: CallingWorker, desk: DeskOf, asked: ClaimRequest = ANYTHING) -> ClaimAnswer:
    """Shards of an open round that fit the volunteer, or why there are none and when to ask again.

    A worker that holds a lease gets that one again; while it delivers the delta of one, it gets another.
    """
    ledger, now = await desk.ledger(), desk.clock()
    found = await ledger.claim(worker.worker_id, now, _seeker(worker, asked), delivering=asked.delivering or "")
    if isinstance(found, NoWork):
        pause_s = retry_after_s(found.why, found.idle, desk.settings)
        return ClaimAnswer(why=found.why, reason=found.reason, retry_after_s=pause_s)
    record = await ledger.record(found.round_id)
    digests = [shard.sha256 for shard in shards_of(record, found)]
    if desk.settings.transfer == "proxied":
        urls = [f"v1/blobs/{digest}" for digest in digests]
    else:
        urls = await desk.in_thread(lambda: [desk.store.presign_get(blob_key(digest)) for digest in digests])
    grant = grant_of(
        found,
        record,
        shard_urls=urls,
        cap_bytes=desk.settings.max_delta_bytes,
        heartbeat_s=beat_interval_s(await ledger.live_leases(now), record.request.lease_s, desk.settings),
        voucher=desk.vouchers.write(found) if desk.vouchers is not None else "",
    )
    log.info(
        "lease_granted",
        lease_id=found.lease_id,
        round_id=found.round_id,
        worker_id=worker.worker_id,
        shard=found.shard,
        shards=found.shards,
    )
    return ClaimAnswer(lease=grant)


def _seeker(worker: Worker, asked: ClaimRequest) -> Seeker:
    return Seeker(
        memory_bytes=worker.device.memory_bytes if asked.memory_bytes is None else asked.memory_bytes,
        available_s=asked.available_s,
        models=asked.models,
        team=worker.team,
        standing=worker.standing,
    )


@router.get("/leases/{lease_id}", responses=refusals(401, 403, 404))
async def show_lease(lease_id: LeaseId, worker: CallingWorker, desk: DeskOf) -> LeaseView:
    """The present state of an own lease, with its verdict once there is one."""
    return (await _own_lease(await desk.ledger(), lease_id, worker)).view()


@router.post("/leases/{lease_id}/heartbeat", responses=refusals(401, 403, 404, 409))
async def heartbeat(lease_id: LeaseId, beat: Heartbeat, desk: DeskOf, credentials: Credentials) -> HeartbeatAnswer:
    """Keep the lease alive and learn whether going on is still of use."""
    ledger, now = await desk.ledger(), desk.clock()
    taken = await ledger.take_beat(token_hash(token_of(credentials)), lease_id, beat, now)
    if taken is not None:
        pause_s = beat_interval_s(await ledger.live_leases(now), taken.lease_s, desk.settings)
        return HeartbeatAnswer(go_on=True, heartbeat_s=pause_s, expires_at=taken.expires_at)
    worker = await require_worker(desk, credentials)
    answer = await ledger.heartbeat(lease_id, worker.worker_id, beat, now)
    record = await ledger.record(answer.lease.home)
    return HeartbeatAnswer(
        go_on=answer.go_on,
        reason=answer.reason,
        heartbeat_s=beat_interval_s(await ledger.live_leases(now), record.request.lease_s, desk.settings),
        expires_at=answer.lease.expires_at,
    )


@router.post("/leases/{lease_id}/restore", responses=refusals(401, 403, 404, 409))
async def restore(lease_id: LeaseId, request: RestoreRequest, worker: CallingWorker, desk: DeskOf) -> LeaseView:
    """Take a lease up again that the server has forgotten, by the voucher that came with its grant.

    One that the server knows is shown as it is. 429 while the server's data is being restored.
    """
    if desk.vouchers is None:
        raise wrong_voucher()
    told = desk.vouchers.read(request.voucher)
    if told.lease_id != lease_id:
        raise wrong_voucher()
    require_own(told, worker.worker_id)
    try:
        lease = await adopt(await desk.ledger(), told, desk.clock())
    except NotFoundError:
        if await desk.in_thread(desk.store.head, round_key(told.round_id)) is None:
            raise
        raise being_restored(told.round_id) from None
    log.info("lease_restored", lease_id=lease_id, round_id=lease.round_id, state=lease.state.value)
    return lease.view()


@router.post("/leases/{lease_id}/return", responses=refusals(401, 403, 404, 409))
async def give_back(lease_id: LeaseId, request: ReturnRequest, worker: CallingWorker, desk: DeskOf) -> LeaseView:
    """Give the lease back unfinished, so that somebody else gets its shards at once."""
    ledger = await desk.ledger()
    lease = await ledger.give_back(lease_id, worker.worker_id, request.fence, request.reason, desk.clock())
    return lease.view()


@router.post("/leases/{lease_id}/upload", responses=refusals(401, 403, 404, 409, 413))
async def ticket(lease_id: LeaseId, request: UploadRequest, worker: CallingWorker, desk: DeskOf) -> UploadTicket:
    """Where to PUT the delta: the address takes exactly these bytes, and only for a while.

    One that is named by its parts gets an address for each of the next ones that are missing. Ask again after them;
    when all are there, they are put together, and the answer says that the delta is there.
    """
    ledger = await desk.ledger()
    lease = await _own_lease(ledger, lease_id, worker)
    status = await ledger.round(lease.home)
    taken = lease.contribution is not None or status.facts.state in TAKES_SUBMISSIONS
    require_uploadable(
        lease,
        status.record,
        taken=taken or await ledger.takes_late(lease),
        fence=request.fence,
        sha256=request.sha256,
        size_bytes=request.size_bytes,
        cap_bytes=desk.settings.max_delta_bytes,
    )
    key = upload_key(lease_id, request.sha256)
    there = lease.contribution is not None or await _is_uploaded(desk, key, request.size_bytes)
    if request.parts and not there:
        asked = (desk.store, lease_id, request)
        return await desk.in_thread(ticket_in_parts, *asked, signer=desk.tickets, now=desk.clock())
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
    record = await ledger.record(lease.home)
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
        shards=lease.shards,
        rank=lease.rank,
        submitted_at=now,
    )
    lease = await ledger.submit(lease_id, worker.worker_id, submission, now)
    if lease.state is LeaseState.SUBMITTED:
        # Before it is acknowledged: a ledger that loses its data queues it again from there.
        await desk.in_thread(keep_submission, desk.store, lease.round_id, submission)
    log.info("delta_submitted", lease_id=lease_id, round_id=lease.round_id, contribution=said.sha256)
    return lease.view()


@router.get("/contributions", responses=refusals(401, 403))
async def contributions(worker: CallingWorker, desk: DeskOf) -> Contributions:
    """Every lease of the calling worker."""
    leases = await (await desk.ledger()).people.contributions(worker.worker_id)
    return Contributions(contributions=tuple(lease.view() for lease in leases))


async def _is_uploaded(desk: Desk, key: str, size_bytes: int) -> bool:
    info = await desk.in_thread(desk.store.head, key)
    return info is not None and info.size_bytes == size_bytes
