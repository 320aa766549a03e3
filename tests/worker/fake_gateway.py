"""An in-process gateway and object store that follow `/v1` as a worker sees it, with the troubles a test asks for.

It checks what the real one checks about a worker (token, signatures, fence, size and hash of an upload) and keeps
everything it was told in plain attributes.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response

from rankup import problems, signing
from rankup.errors import DeniedError, NotFoundError, RankupError, StateError, UnauthenticatedError
from rankup.parts import cut
from rankup.protocol import (
    PROTOCOL_VERSION,
    BlobLink,
    ClaimAnswer,
    ClaimRequest,
    Enrolled,
    EnrolRequest,
    Heartbeat,
    HeartbeatAnswer,
    LeaseGrant,
    LeasesAtWork,
    LeaseState,
    LeaseView,
    LinkMeasured,
    PartTicket,
    Problem,
    RestoreRequest,
    ReturnRequest,
    Rounds,
    RoundView,
    ServerInfo,
    Standing,
    SubmitRequest,
    UploadRequest,
    UploadTicket,
    WorkerView,
)
from rankup.recipe import Recipe
from rankup.targets import Target

SHARD = b'{"text": "hello"}\n'
BASE_MANIFEST = hashlib.sha256(b"base").hexdigest()
TARGETS = {"layer.weight": Target(d_out=8, d_in=6)}
INVITE = "come in"
STEPS = 5


class FakeGateway:
    """`leases` are handed out in order; `verdict` judges a submission as soon as it is there."""

    def __init__(self) -> None:
        self.publisher_key = signing.public_key_hex(signing.parse_private_key(signing.generate_private_key()))
        self.tokens: dict[str, str] = {}
        """token -> public key"""
        self.names: dict[str, str] = {}
        self.teams: list[str] = []
        """Of every enrolment."""
        self.claims: list[ClaimRequest] = []
        self.standing = Standing.MEMBER
        self.waiting: list[str] = []
        self.granted: dict[str, LeaseGrant] = {}
        self.states: dict[str, LeaseState] = {}
        self.returned: dict[str, str] = {}
        self.uploads: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.part_puts: list[int] = []
        """Numbers of the parts that arrived whole, in their order."""
        self.on_part: Callable[[int], None] = lambda number: None
        """Called when one has arrived, before that is answered."""
        self.submissions: dict[str, list[SubmitRequest]] = {}
        self.beats: list[tuple[str, Heartbeat]] = []
        self.announced = self.shard = SHARD
        """What leases say that the shard is, and what is sent."""
        self.shards = self.links = 1
        """How many a lease says that it has, and how many links it brings."""
        self.targets = TARGETS
        self.recipe = Recipe(rank=2, steps=STEPS)
        self.max_delta_bytes = 10_000
        self.abandon: set[str] = set()
        self.refuse_submit: RankupError | None = None
        self.verdict = LeaseState.ACCEPTED
        self.outage_after_submit = 0
        self.outage = 0
        """So many of the next requests get a bare 503."""
        self.on_beat: Callable[[], None] = lambda: None
        self.vouchers = True
        self.forgotten: dict[str, LeaseGrant] = {}
        self.restored: list[str] = []
        self.refuse_restore: list[RankupError] = []
        """The answers to the next vouchers, first one first."""
        self.refuse_enrol: RankupError | None = None
        self.rounds: list[RoundView] = []
        self.measured: list[tuple[str, int]] = []
        """Direction and bytes of every measurement of the link."""
        self.url = ""

    def offer(self, *lease_ids: str) -> None:
        self.waiting += lease_ids

    def forget_tokens(self) -> None:
        self.tokens.clear()

    def forget_everything(self) -> None:
        """As a server does that lost its ledger; bytes that were uploaded are elsewhere."""
        self.forget_tokens()
        self.forgotten |= self.granted
        self.granted.clear()
        self.states.clear()

    # -- what the routes do ----------------------------------------------------------------------------------------

    def worker(self, request: Request) -> str:
        key = self.tokens.get(request.headers.get("authorization", "").removeprefix("Bearer "))
        if key is None:
            raise UnauthenticatedError("this server does not know the token")
        return key

    def grant(self, lease_id: str) -> LeaseGrant:
        return LeaseGrant(
            lease_id=lease_id,
            fence=7,
            round_id="round-1",
            model="tiny",
            base_version=3,
            base_manifest=BASE_MANIFEST,
            shard=len(self.granted),
            shards=self.shards,
            shard_links=(
                BlobLink(
                    sha256=hashlib.sha256(self.announced).hexdigest(),
                    size_bytes=len(self.announced),
                    url=f"{self.url}/storage/shard",
                ),
            )
            * self.links,
            recipe=self.recipe,
            seed=11,
            targets=self.targets,
            max_delta_bytes=self.max_delta_bytes,
            expires_at=time.time() + 60,
            heartbeat_s=0.1,
            voucher=voucher_of(lease_id) if self.vouchers else "",
        )

    def view(self, lease_id: str) -> LeaseView:
        if lease_id not in self.granted:
            raise NotFoundError(f"no lease {lease_id}")
        state = self.states[lease_id]
        return LeaseView(
            lease_id=lease_id,
            round_id="round-1",
            shard=0,
            worker_id="w-1",
            state=state,
            fence=7,
            expires_at=0.0,
            verdict="norm is above the limit" if state is LeaseState.REJECTED else "",
        )

    def require_fence(self, lease_id: str, fence: int) -> None:
        self.view(lease_id)
        if fence != 7:
            raise DeniedError("an old fence")

    def enrol(self, said: EnrolRequest) -> Enrolled:
        signing.verify(said.statement.public_key, "enrol", said.statement, said.signature)
        if self.refuse_enrol is not None:
            raise self.refuse_enrol
        if said.statement.invite != INVITE:
            raise DeniedError("wrong invite")
        token = f"token-{len(self.names)}-{time.monotonic_ns()}"
        self.tokens = {token: said.statement.public_key}
        self.names[said.statement.public_key] = said.statement.name
        self.teams.append(said.statement.team)
        worker_id = signing.worker_id_of(said.statement.public_key)
        return Enrolled(worker_id=worker_id, token=token, publisher_key=self.publisher_key, standing=self.standing)

    def claim(self, said: ClaimRequest) -> ClaimAnswer:
        self.claims.append(said)
        if self.standing is Standing.BANNED:
            raise DeniedError("the organiser has banned this machine", remedy="Ask the organiser.")
        if self.standing is Standing.WAITING:
            return ClaimAnswer(why="waiting", reason="The organiser approves each machine.", retry_after_s=0.05)
        if not self.waiting:
            return ClaimAnswer(reason="no open round", retry_after_s=0.05)
        lease_id = self.waiting.pop(0)
        self.granted[lease_id] = self.grant(lease_id)
        self.states[lease_id] = LeaseState.GRANTED
        return ClaimAnswer(lease=self.granted[lease_id])

    def beat(self, lease_id: str, beat: Heartbeat) -> HeartbeatAnswer:
        self.require_fence(lease_id, beat.fence)
        self.beats.append((lease_id, beat))
        self.on_beat()
        over = lease_id in self.abandon
        return HeartbeatAnswer(
            go_on=not over, reason="the round is over" if over else "", heartbeat_s=0.1, expires_at=time.time() + 60
        )

    def restore(self, lease_id: str, said: RestoreRequest) -> LeaseView:
        if self.refuse_restore:
            raise self.refuse_restore.pop(0)
        if said.voucher != voucher_of(lease_id):
            raise DeniedError("no voucher of this server")
        if lease_id not in self.granted:
            if lease_id not in self.forgotten:
                raise NotFoundError("no round round-1")
            self.granted[lease_id] = self.forgotten[lease_id]
            self.states[lease_id] = LeaseState.GRANTED
            self.restored.append(lease_id)
        return self.view(lease_id)

    def give_back(self, lease_id: str, said: ReturnRequest) -> LeaseView:
        self.require_fence(lease_id, said.fence)
        self.states[lease_id] = LeaseState.RETURNED
        self.returned[lease_id] = said.reason
        return self.view(lease_id)

    def ticket(self, lease_id: str, said: UploadRequest) -> UploadTicket:
        self.require_fence(lease_id, said.fence)
        url = f"{self.url}/storage/{lease_id}/{said.sha256}"
        headers = {"x-size": str(said.size_bytes)}
        there = said.sha256 in self.uploads
        if said.parts and not there:
            return self.ticket_in_parts(url, said)
        return UploadTicket(url=url, headers=headers, expires_at=time.time() + 60, already_there=there)

    def ticket_in_parts(self, url: str, said: UploadRequest) -> UploadTicket:
        held = {n: data for (delta, n), data in self.parts.items() if delta == said.sha256}
        missing = [part.number for part in cut(said.size_bytes) if part.number not in held]
        if not missing:
            self.uploads[said.sha256] = b"".join(held[number] for number in sorted(held))
        return UploadTicket(
            url="",
            headers={},
            expires_at=time.time() + 60,
            already_there=not missing,
            parts=tuple(
                PartTicket(number=n, url=f"{url}/parts/{n}", headers={"x-sha256": said.parts[n - 1]}) for n in missing
            ),
            there_bytes=sum(len(data) for data in held.values()),
        )

    def submit(self, lease_id: str, said: SubmitRequest, key: str) -> LeaseView:
        self.require_fence(lease_id, said.statement.fence)
        signing.verify(key, "submit", said.statement, said.signature)
        if self.refuse_submit is not None:
            raise self.refuse_submit
        if said.statement.sha256 not in self.uploads:
            raise StateError("upload first")
        self.submissions.setdefault(lease_id, []).append(said)
        self.states[lease_id] = self.verdict
        self.outage, self.outage_after_submit = self.outage_after_submit, 0
        return self.view(lease_id)


def voucher_of(lease_id: str) -> str:
    return f"{lease_id}.{hashlib.sha256(lease_id.encode()).hexdigest()}"


def make_app(fake: FakeGateway) -> FastAPI:
    app = FastAPI()

    @app.middleware("http")
    async def trouble(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        if fake.outage > 0:
            fake.outage -= 1
            return Response("no upstream", status_code=503)
        answer = await call_next(request)
        if fake.outage > 0:  # the submission was taken, but its answer is lost
            return Response("bad gateway", status_code=502)
        return answer

    @app.exception_handler(RankupError)
    async def problem(_: Request, exc: RankupError) -> Response:
        body = Problem(
            type=problems.TYPE_PREFIX + exc.code,
            title=exc.code,
            status=exc.http_status,
            detail=exc.cause,
            remedy=exc.remedy,
        )
        return Response(body.model_dump_json(), status_code=body.status, media_type=problems.MEDIA_TYPE)

    @app.get("/v1/info")
    def info() -> ServerInfo:
        return ServerInfo(
            protocol=PROTOCOL_VERSION,
            server_version="0",
            publisher_key=fake.publisher_key,
            models=("tiny",),
            invite_needed=True,
            max_delta_bytes=10_000,
        )

    @app.get("/v1/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/rounds")
    def rounds() -> Rounds:
        return Rounds(rounds=tuple(fake.rounds))

    @app.get("/v1/rounds/{round_id}/leases")
    def at_work(round_id: str) -> LeasesAtWork:
        return LeasesAtWork(round_id=round_id, at=time.time(), total=0, leases=())

    @app.put("/v1/link")
    async def link_up(request: Request) -> LinkMeasured:
        fake.measured.append(("up", len(await request.body())))
        return LinkMeasured(size_bytes=fake.measured[-1][1], seconds=0.0)

    @app.get("/v1/link")
    def link_down(size: int) -> Response:
        fake.measured.append(("down", size))
        return Response(bytes(size))

    @app.get("/v1/workers/me")
    def who_am_i(request: Request) -> WorkerView:
        key = fake.worker(request)
        if fake.standing is Standing.BANNED:
            raise DeniedError("the organiser has banned this machine", remedy="Ask the organiser.")
        return WorkerView(worker_id=signing.worker_id_of(key), name="ada", standing=fake.standing)

    @app.post("/v1/workers", status_code=201)
    def enrol(said: EnrolRequest) -> Enrolled:
        return fake.enrol(said)

    @app.post("/v1/leases")
    def claim(said: ClaimRequest, request: Request) -> ClaimAnswer:
        fake.worker(request)
        return fake.claim(said)

    @app.get("/v1/leases/{lease_id}")
    def lease(lease_id: str, request: Request) -> LeaseView:
        fake.worker(request)
        return fake.view(lease_id)

    @app.post("/v1/leases/{lease_id}/heartbeat")
    def beat(lease_id: str, said: Heartbeat, request: Request) -> HeartbeatAnswer:
        fake.worker(request)
        return fake.beat(lease_id, said)

    @app.post("/v1/leases/{lease_id}/restore")
    def restore(lease_id: str, said: RestoreRequest, request: Request) -> LeaseView:
        fake.worker(request)
        return fake.restore(lease_id, said)

    @app.post("/v1/leases/{lease_id}/return")
    def give_back(lease_id: str, said: ReturnRequest, request: Request) -> LeaseView:
        fake.worker(request)
        return fake.give_back(lease_id, said)

    @app.post("/v1/leases/{lease_id}/upload")
    def ticket(lease_id: str, said: UploadRequest, request: Request) -> UploadTicket:
        fake.worker(request)
        return fake.ticket(lease_id, said)

    @app.post("/v1/leases/{lease_id}/submit", status_code=202)
    def submit(lease_id: str, said: SubmitRequest, request: Request) -> LeaseView:
        return fake.submit(lease_id, said, fake.worker(request))

    @app.get("/storage/shard")
    def shard(request: Request) -> Response:
        return Response("a token" if "authorization" in request.headers else fake.shard)

    @app.put("/storage/{lease_id}/{sha256}")
    async def put(lease_id: str, sha256: str, request: Request) -> Response:
        data: Any = await request.body()
        exact = request.headers.get("content-length") == request.headers.get("x-size") == str(len(data))
        if not exact or hashlib.sha256(data).hexdigest() != sha256 or "authorization" in request.headers:
            return Response("BadDigest", status_code=400)
        fake.uploads[sha256] = data
        return Response()

    @app.put("/storage/{lease_id}/{sha256}/parts/{number}")
    async def put_part(lease_id: str, sha256: str, number: int, request: Request) -> Response:
        data: Any = await request.body()
        if hashlib.sha256(data).hexdigest() != request.headers.get("x-sha256") or "authorization" in request.headers:
            return Response("BadDigest", status_code=400)
        fake.parts[sha256, number] = data
        fake.part_puts.append(number)
        fake.on_part(number)
        return Response()

    return app


@contextmanager
def serve(fake: FakeGateway) -> Iterator[FakeGateway]:
    """Serve `fake` on a free port of loopback, in a thread."""
    server = uvicorn.Server(
        uvicorn.Config(make_app(fake), host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    fake.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield fake
    finally:
        server.should_exit = True
        thread.join()
