"""Routes of people: joining, tokens, the leaderboard; for the organiser invites, approvals, bans, and what was done.

What always holds:
- a worker joins with proof that it holds its key; a known one needs no invite and keeps its standing, a banned one gets
  no token;
- a call of the organiser that changes something is on record in object storage before it is answered (`audited`);
- who joined is on record there too, so an empty ledger gets its people back (`actions.replay`).
"""

from __future__ import annotations

import hashlib
import secrets
from contextlib import suppress
from dataclasses import replace
from typing import Annotated, Literal

import structlog
from fastapi import APIRouter, Depends, Path, Query, Request

from coordinator import actions
from coordinator import ledger_keys as keys
from coordinator.access import CallingWorker, Desk, DeskOf, require_organiser, same_secret, token_hash
from coordinator.audited import AuditedRoute, note_outcome
from coordinator.ledger import Ledger, Worker
from coordinator.metrics import ENROLMENTS
from coordinator.openapi import refusals
from coordinator.people import require_welcome
from rankup.errors import DeniedError, InputError, IntegrityError, RankupError
from rankup.membership import (
    MAX_NAMED,
    ActionLog,
    Approved,
    ApproveRequest,
    BanRequest,
    Enrolment,
    Invite,
    InviteRequest,
    Invites,
    Leaderboard,
    NewInvite,
    NewToken,
    PeoplePage,
    Person,
)
from rankup.message import Identifier, canonical_json
from rankup.protocol import PROTOCOL_VERSION, Enrolled, EnrolRequest, EnrolStatement, Standing, WorkerView
from rankup.signing import verify, worker_id_of

MAX_CLOCK_SKEW_S = 3600.0
"""An enrolment is signed with its time, so a recorded one cannot be used for ever."""
TOKEN_BYTES = 32
DAY_S = 86_400.0
MAX_PAGE = 1_000

WorkerId = Annotated[Identifier, Path(description="From the list of people.")]
InviteId = Annotated[Identifier, Path(description="From the list of invites.")]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]

log = structlog.get_logger(__name__)
router = APIRouter(prefix="/v1", tags=["people"], route_class=AuditedRoute)
organiser = Depends(require_organiser)

# -- joining -----------------------------------------------------------------------------------------------------------


@router.post("/workers", status_code=201, responses=refusals(400, 403))
async def enrol(request: EnrolRequest, desk: DeskOf) -> Enrolled:
    """Join with a new key, or get a new token for a known one; the old token stops working."""
    said, now = request.statement, desk.clock()
    _require_proof(request, now)
    people = (await desk.ledger()).people
    asked = Worker(
        worker_id=worker_id_of(said.public_key),
        name=said.name,
        public_key=said.public_key,
        device=said.device,
        enrolled_at=now,
    )
    known = await people.find(asked.worker_id)
    if known is not None:
        require_welcome(known)
    invite = await _invite_of(desk, said, known, asked.worker_id)
    standing = _standing_of(desk, said, invite, known)
    asked = replace(asked, standing=standing, team=await _team_of(desk, said, known, invite))
    if known is not None and standing is not known.standing:
        await people.set_standing(known.worker_id, standing, now)
    token = secrets.token_urlsafe(TOKEN_BYTES)
    worker = await people.enrol(asked, token_hash(token), now + desk.settings.token_days * DAY_S)
    await _record_enrolment(desk, worker, invite)
    desk.tally.add(ENROLMENTS, worker.standing.value if known is None else "again")
    log.info("worker_enrolled", worker_id=worker.worker_id, device=said.device.kind, standing=worker.standing.value)
    return Enrolled(worker_id=worker.worker_id, token=token, publisher_key=desk.publisher_key, standing=worker.standing)


def _require_proof(request: EnrolRequest, now: float) -> None:
    said = request.statement
    if said.protocol != PROTOCOL_VERSION:
        raise InputError(
            f"The server speaks protocol {PROTOCOL_VERSION}, the worker {said.protocol}.",
            remedy="Update the older of the two.",
        )
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


async def _invite_of(desk: Desk, said: EnrolStatement, known: Worker | None, worker_id: str) -> Invite | None:
    """The named invite that a worker joins with, or that takes a known one into another team, used; None without."""
    if not said.invite or _is_servers_own(desk, said):
        return None
    if known is not None and known.standing is not Standing.WAITING and said.team in ("", known.team):
        return None  # It may be over by now, and is not needed.
    try:
        return await (await desk.ledger()).people.invites.use(said.invite, worker_id, desk.clock())
    except DeniedError:
        if desk.settings.enrolment == "open":
            return None  # Nor is it needed here.
        raise


def _is_servers_own(desk: Desk, said: EnrolStatement) -> bool:
    kept = desk.settings.invite.get_secret_value()
    return bool(kept) and same_secret(said.invite, kept)


def _standing_of(desk: Desk, said: EnrolStatement, invite: Invite | None, known: Worker | None) -> Standing:
    """As it will be. Who waits is let in by an invite. Raises DeniedError for nobody's guest where one is needed."""
    if invite is not None or _is_servers_own(desk, said):
        return Standing.MEMBER
    if known is not None:
        return known.standing
    if desk.settings.enrolment == "open":
        return Standing.MEMBER
    if desk.settings.enrolment == "approval":
        return Standing.WAITING
    raise DeniedError("This server takes in new workers by invite only.", remedy="Ask the organiser for an invite.")


async def _team_of(desk: Desk, said: EnrolStatement, known: Worker | None, invite: Invite | None) -> str:
    """Raises DeniedError for a team that takes in nobody without an invite to it."""
    if invite is not None and invite.team:
        return invite.team
    if known is not None and said.team in ("", known.team):
        return known.team
    if said.team and await (await desk.ledger()).people.invites.is_closed(said.team):
        raise DeniedError(
            f"The team {said.team!r} takes in members by invite only.", remedy="Ask the organiser for an invite to it."
        )
    return said.team


async def _record_enrolment(desk: Desk, worker: Worker, invite: Invite | None) -> None:
    """Keep in object storage who this is, unless it stands there already."""
    people = (await desk.ledger()).people
    enrolment = Enrolment(
        worker_id=worker.worker_id,
        public_key=worker.public_key,
        name=worker.name,
        team=worker.team,
        device=worker.device,
        standing=Standing.WAITING if worker.standing is Standing.WAITING else Standing.MEMBER,
        invite_id=None if invite is None else invite.invite_id,
        enrolled_at=worker.enrolled_at,
    )
    # The invite is known only this time.
    digest = hashlib.sha256(canonical_json(enrolment.model_copy(update={"invite_id": None}))).hexdigest()
    if await people.recorded(worker.worker_id) != digest:
        await desk.in_thread(actions.keep_enrolment, desk.store, enrolment)
        await people.note_recorded(worker.worker_id, digest)


@router.get("/workers/me", responses=refusals(401, 403))
async def who_am_i(worker: CallingWorker) -> WorkerView:
    """The calling worker, and what the organiser says of it."""
    return WorkerView(worker_id=worker.worker_id, name=worker.name, team=worker.team, standing=worker.standing)


@router.post("/workers/me/token", status_code=201, responses=refusals(401, 403))
async def rotate_token(worker: CallingWorker, desk: DeskOf) -> NewToken:
    """Another token for the calling worker; the one that it called with is worth nothing from now on."""
    token, until = secrets.token_urlsafe(TOKEN_BYTES), desk.clock() + desk.settings.token_days * DAY_S
    await (await desk.ledger()).people.give_token(worker.worker_id, token_hash(token), until)
    log.info("token_rotated", worker_id=worker.worker_id)
    return NewToken(token=token, expires_at=until)


@router.get("/leaderboard", responses=refusals())
async def leaderboard(desk: DeskOf, by: Literal["worker", "team"] = "worker", limit: Limit = MAX_PAGE) -> Leaderboard:
    """Who has contributed what: by credit, then by accepted tokens."""
    scores = (await desk.ledger()).people.scores
    if by == "team":
        return Leaderboard(teams=tuple((await scores.teams())[:limit]))
    return Leaderboard(rows=tuple(await scores.leaderboard(limit)))


# -- for the organiser: invites ----------------------------------------------------------------------------------------


@router.post("/invites", status_code=201, dependencies=[organiser], responses=refusals(400, 401, 403))
async def make_invite(asked: InviteRequest, request: Request, desk: DeskOf) -> NewInvite:
    """An invite for so many new workers; its code is told here and nowhere else."""
    made = await (await desk.ledger()).people.invites.make(asked, desk.clock())
    note_outcome(request, made.invite.model_dump(mode="json"))
    return made


@router.get("/invites", dependencies=[organiser], responses=refusals(401, 403))
async def list_invites(desk: DeskOf) -> Invites:
    """Every invite but the server's own, newest first."""
    return Invites(invites=tuple(await (await desk.ledger()).people.invites.all()))


@router.post("/invites/{invite_id}/withdraw", dependencies=[organiser], responses=refusals(401, 403, 404))
async def withdraw_invite(invite_id: InviteId, desk: DeskOf) -> Invites:
    """Nobody joins with it any more; who did stays. Answers with those that are left."""
    invites = (await desk.ledger()).people.invites
    await invites.withdraw(invite_id)
    return Invites(invites=tuple(await invites.all()))


# -- for the organiser: workers ----------------------------------------------------------------------------------------


@router.get("/people", dependencies=[organiser], responses=refusals(401, 403))
async def list_people(
    desk: DeskOf,
    standing: Standing | None = None,
    limit: Limit = MAX_PAGE,
    offset: Annotated[int, Query(ge=0, le=10_000_000)] = 0,
) -> PeoplePage:
    """Everybody who joined, the last ones first; `offset` counts those before the page."""
    people = (await desk.ledger()).people
    found = await people.listed(standing, limit, offset)
    return PeoplePage(people=tuple(await people.scores.persons(found)))


@router.get("/people/{worker_id}", dependencies=[organiser], responses=refusals(401, 403, 404))
async def show_person(worker_id: WorkerId, desk: DeskOf) -> Person:
    """One worker."""
    return await _person(await desk.ledger(), worker_id)


async def _person(ledger: Ledger, worker_id: str) -> Person:
    worker, seen_at = await ledger.people.worker(worker_id), await ledger.people.seen_at(worker_id)
    [person] = await ledger.people.scores.persons([(worker, seen_at)])
    return person


@router.post("/people/approve", dependencies=[organiser], responses=refusals(400, 401, 403, 404))
async def approve(asked: ApproveRequest, request: Request, desk: DeskOf) -> Approved:
    """Let workers who wait begin. Those who do not wait are passed over."""
    if asked.everybody == bool(asked.workers):
        raise InputError("Name workers, or say everybody.", remedy="`rankup people waiting` shows who waits.")
    people, now = (await desk.ledger()).people, desk.clock()
    names = asked.workers
    if asked.everybody:
        names = tuple(worker.worker_id for worker, _ in await people.listed(Standing.WAITING, MAX_NAMED))
    found = [await people.worker(worker_id) for worker_id in names]
    waiting = [worker.worker_id for worker in found if worker.standing is Standing.WAITING]
    for worker_id in waiting:
        await people.set_standing(worker_id, Standing.MEMBER, now, durable=worker_id == waiting[-1])
    # A call that is repeated for want of its record must record the same.
    note_outcome(request, {"workers": [one.worker_id for one in found if one.standing is not Standing.BANNED]})
    return Approved(workers=tuple(waiting))


@router.post("/people/{worker_id}/ban", dependencies=[organiser], responses=refusals(400, 401, 403, 404))
async def ban(worker_id: WorkerId, asked: BanRequest, desk: DeskOf) -> Person:
    """Refuse every further call of a worker, and take its lease back; what was accepted of it stays."""
    ledger, now = await desk.ledger(), desk.clock()
    await ledger.people.set_standing(worker_id, Standing.BANNED, now, asked.reason)
    returned = await _take_lease_back(ledger, worker_id, now)
    log.info("worker_banned", worker_id=worker_id, returned=returned)
    return await _person(ledger, worker_id)


@router.post("/people/{worker_id}/unban", dependencies=[organiser], responses=refusals(401, 403, 404))
async def unban(worker_id: WorkerId, desk: DeskOf) -> Person:
    """Take a ban back: the worker is a member as before."""
    ledger = await desk.ledger()
    if (await ledger.people.worker(worker_id)).standing is Standing.BANNED:
        await ledger.people.set_standing(worker_id, Standing.MEMBER, desk.clock())
    return await _person(ledger, worker_id)


@router.post("/people/{worker_id}/revoke", dependencies=[organiser], responses=refusals(401, 403, 404))
async def revoke_token(worker_id: WorkerId, desk: DeskOf) -> Person:
    """Make a worker's token worth nothing at once; its key may enrol again."""
    ledger = await desk.ledger()
    await ledger.people.revoke_token(worker_id)
    return await _person(ledger, worker_id)


async def _take_lease_back(ledger: Ledger, worker_id: str, now: float) -> bool:
    """Return the live leases of a worker, so that others get their shards; whether there was one."""
    taken = False
    for held in (keys.LIVE, keys.DELIVERING):
        lease_id = await ledger.valkey.call("HGET", held, worker_id)
        # It may have been handed in, or have run out, a moment ago.
        with suppress(RankupError):
            if lease_id is not None:
                fence = (await ledger.lease(lease_id)).fence
                await ledger.give_back(lease_id, worker_id, fence, "the worker was banned", now)
                taken = True
    return taken


# -- for the organiser: what was done ----------------------------------------------------------------------------------


@router.get("/actions", dependencies=[organiser], responses=refusals(401, 403))
async def list_actions(desk: DeskOf, limit: Annotated[int, Query(ge=1, le=200)] = 50) -> ActionLog:
    """What the organiser did last, newest first."""
    found = await desk.in_thread(lambda: list(actions.read(desk.store, limit)))
    return ActionLog(actions=tuple(reversed(found)))
