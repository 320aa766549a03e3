"""A gateway over a real Valkey and a store in memory, served by uvicorn in a thread, with one model and one dataset."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx2
import uvicorn
from pydantic import SecretStr

from coordinator.gateway import GatewayDeps, create_app
from coordinator.ledger import Ledger
from coordinator.rounds import Tick
from rankup.message import canonical_json
from rankup.protocol import DeviceProfile, EnrolStatement, LeaseGrant, Pointer, RoundRequest, SubmitStatement
from rankup.records import (
    BlobRef,
    Check,
    DatasetCard,
    Evaluation,
    FileEntry,
    Group,
    Manifest,
    Receipt,
    TensorEntry,
)
from rankup.settings import CoordinatorSettings, LedgerSettings
from rankup.signing import Ed25519PrivateKey, generate_private_key, parse_private_key, public_key_hex, sign
from rankup.store import MemoryStore, Store, put_blob
from rankup.versions import dataset_key, heldout_key, manifest_digest, manifest_key, pointer_key, seal, upload_key

INVITE = "spring-round"
ORGANISER_TOKEN = "the-organiser"
SHARDS = 4
RATE_LIMITS = (
    "enrols_per_min",
    "claims_per_min",
    "heartbeats_per_min",
    "deliveries_per_min",
    "links_per_min",
    "requests_per_min",
    "refusals_per_min",
)
"""All of them: the tests come from one address, faster than anybody. Who tests a limit sets it."""
T = TypeVar("T")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_manifest(version: int, parent: str | None, loss: float | None = None, *, model: str = "tiny") -> Manifest:
    """Two linear layers and a norm, as one group."""
    shapes = {
        "layers.0.q_proj.weight": (8, 16),
        "layers.0.up_proj.weight": (32, 8),
        "norm.weight": (8,),
    }
    digest = sha256(f"{model}-{version}".encode())
    return Manifest(
        model=model,
        version=version,
        parent=parent,
        round_id=None if version == 0 else f"{model}-r{version:04d}-abcdef",
        recipe=None,
        tensors={
            name: TensorEntry(
                shape=shape,
                export_dtype="BF16",
                master=digest,
                export=digest,
                role="linear" if len(shape) == 2 else None,
            )
            for name, shape in shapes.items()
        },
        groups=(
            Group(
                tensors=tuple(sorted(shapes)),
                master=FileEntry(path="master-00001.safetensors", sha256=digest, size_bytes=100),
                export=FileEntry(path="model-00001.safetensors", sha256=sha256(digest.encode()), size_bytes=50),
            ),
        ),
        files=(FileEntry(path="config.json", sha256=sha256(b"{}"), size_bytes=2),),
        evaluation=None if loss is None else Evaluation(heldout_loss=loss, examples=4, tokens=40),
        base_model="tiny",
        licence="apache-2.0",
        created_at=1_000.0 + version,
    )


def publish(store: Store, key: Ed25519PrivateKey, manifest: Manifest) -> str:
    """Write the sealed manifest and move the pointer; returns the manifest's digest."""
    digest = manifest_digest(manifest)
    store.put(manifest_key(manifest.model, manifest.version), seal(manifest, key), if_absent=True)
    pointer = Pointer(model=manifest.model, version=manifest.version, manifest=digest, updated_at=manifest.created_at)
    store.put(pointer_key(manifest.model), canonical_json(pointer))
    return digest


def add_dataset(store: Store, name: str = "pydocs", shards: int = SHARDS) -> DatasetCard:
    heldout = b'{"text":"secret"}\n'
    card = DatasetCard(
        dataset=name,
        source="made up",
        licence="cc0-1.0",
        rows=shards,
        heldout_rows=1,
        shards=tuple(put_blob(store, f'{{"text":"{name} {number}"}}\n'.encode()) for number in range(shards)),
        heldout=BlobRef(sha256=sha256(heldout), size_bytes=len(heldout)),
        created_at=1_000.0,
    )
    store.put(heldout_key(name, card.heldout.sha256), heldout)
    store.put(dataset_key(name), canonical_json(card))
    return card


@dataclass
class Volunteer:
    """A worker's key and, once it joined, its token."""

    name: str = "ada"
    key: Ed25519PrivateKey = field(default_factory=lambda: parse_private_key(generate_private_key()))
    token: str = ""
    worker_id: str = ""

    @property
    def auth(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def enrolment(self, now: float, **changes: Any) -> dict[str, Any]:
        statement = EnrolStatement(
            public_key=public_key_hex(self.key), name=self.name, invite=INVITE, device=DeviceProfile(), issued_at=now
        ).model_copy(update=changes)
        return {"statement": statement.model_dump(mode="json"), "signature": sign(self.key, "enrol", statement)}

    def submission(self, lease: LeaseGrant, delta: bytes, **changes: Any) -> dict[str, Any]:
        statement = SubmitStatement(
            round_id=lease.round_id,
            lease_id=lease.lease_id,
            fence=lease.fence,
            base_manifest=lease.base_manifest,
            sha256=sha256(delta),
            size_bytes=len(delta),
            tokens=100,
            steps=5,
            first_loss=3.0,
            last_loss=2.5,
            seconds=1.0,
        ).model_copy(update=changes)
        return {"statement": statement.model_dump(mode="json"), "signature": sign(self.key, "submit", statement)}


@dataclass
class World:
    http: httpx2.Client
    store: Store
    settings: CoordinatorSettings
    publisher: Ed25519PrivateKey
    ledger_settings: LedgerSettings

    @property
    def organiser(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {ORGANISER_TOKEN}"}

    def join(self, name: str = "ada") -> Volunteer:
        volunteer = Volunteer(name)
        answer = self.http.post("/v1/workers", json=volunteer.enrolment(time.time()))
        assert answer.status_code == 201, answer.text
        volunteer.token, volunteer.worker_id = answer.json()["token"], answer.json()["worker_id"]
        return volunteer

    def open_round(self, **changes: Any) -> dict[str, Any]:
        request = RoundRequest(model="tiny", dataset="pydocs", shards=SHARDS).model_dump(mode="json") | changes
        answer = self.http.post("/v1/rounds", json=request, headers=self.organiser)
        assert answer.status_code == 201, answer.text
        view: dict[str, Any] = answer.json()
        return view

    def claim(self, volunteer: Volunteer) -> LeaseGrant:
        answer = self.http.post("/v1/leases", json={}, headers=volunteer.auth)
        assert answer.status_code == 200, answer.text
        return LeaseGrant.model_validate(answer.json()["lease"])

    def upload(self, lease: LeaseGrant, delta: bytes) -> None:
        """What a PUT to the ticket's address does."""
        self.store.put(upload_key(lease.lease_id, sha256(delta)), delta)

    def hand_in(self, volunteer: Volunteer, lease: LeaseGrant, delta: bytes = b"a good delta") -> dict[str, Any]:
        """The whole honest way from a lease to a submission."""
        asked = {"fence": lease.fence, "sha256": sha256(delta), "size_bytes": len(delta)}
        ticket = self.http.post(f"/v1/leases/{lease.lease_id}/upload", json=asked, headers=volunteer.auth)
        assert ticket.status_code == 200, ticket.text
        self.upload(lease, delta)
        answer = self.http.post(
            f"/v1/leases/{lease.lease_id}/submit", json=volunteer.submission(lease, delta), headers=volunteer.auth
        )
        assert answer.status_code == 202, answer.text
        view: dict[str, Any] = answer.json()
        return view

    def with_ledger(self, act: Callable[[Ledger], Coroutine[Any, Any, T]]) -> T:
        """Run something on the ledger beside the gateway, as the keeper would."""

        async def run() -> T:
            ledger = await Ledger.connect(self.ledger_settings)
            try:
                return await act(ledger)
            finally:
                await ledger.close()

        return asyncio.run(run())

    def judge_all(self, round_id: str, *, accepted: bool = True) -> str:
        """Admission of everything pending and one look of the keeper; returns the round's state."""

        async def act(ledger: Ledger) -> str:
            for submission in await ledger.pending(round_id):
                receipt = Receipt(
                    submission=submission,
                    accepted=accepted,
                    reason="accepted" if accepted else "not finite",
                    checks=(Check(name="structure", passed=accepted),),
                    norm=1.0,
                    judged_at=time.time(),
                )
                await ledger.judge(submission.statement.lease_id, receipt, time.time())
            status, _ = await ledger.apply(round_id, Tick(), time.time())
            return status.facts.state.value

        return self.with_ledger(act)


@contextlib.contextmanager
def serve(app: Any) -> Iterator[str]:
    """Serve an ASGI application on a free local port until the block ends; gives its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


@contextlib.contextmanager
def gateway(
    ledger_settings: LedgerSettings,
    *,
    store: Store | None = None,
    clock: Callable[[], float] = time.time,
    changes: Mapping[str, Any] | None = None,
) -> Iterator[World]:
    """`changes` go over the settings."""
    publisher = parse_private_key(generate_private_key())
    store = store or MemoryStore()
    settings = CoordinatorSettings(
        invite=SecretStr(INVITE),
        organiser_token=SecretStr(ORGANISER_TOKEN),
        max_body_bytes=16_384,
        **dict.fromkeys(RATE_LIMITS, 0),
    ).model_copy(update=dict(changes or {}))

    async def connect_ledger() -> Ledger:
        return await Ledger.connect(ledger_settings)

    app = create_app(GatewayDeps(connect_ledger, store, settings, public_key_hex(publisher), clock))
    with serve(app) as url, httpx2.Client(base_url=url, timeout=20) as http:
        yield World(http, store, settings, publisher, ledger_settings)


@contextlib.contextmanager
def furnished_gateway(ledger_settings: LedgerSettings, **parts: Any) -> Iterator[World]:
    """A gateway with model `tiny` at version 0 and dataset `pydocs`."""
    with gateway(ledger_settings, **parts) as world:
        publish(world.store, world.publisher, make_manifest(0, None, 3.4))
        add_dataset(world.store)
        yield world
