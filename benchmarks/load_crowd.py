"""What one simulated volunteer does, call by call, over real HTTP; `load_volunteers.py` moves the whole crowd.

What always holds: keys, tokens, leases, uploads and signatures are real, only the training is pretended; every call is
counted with its time, from when it was due to the last byte of its answer, whatever became of it.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from load_deltas import Delta, make_delta

from rankup.protocol import DeviceProfile, EnrolStatement, SubmitStatement
from rankup.signing import Ed25519PrivateKey, generate_private_key, parse_private_key, public_key_hex, sign


@dataclass
class Volunteer:
    """One machine: who it is, and what it works on."""

    key_pem: str
    token: str = ""
    worker_id: str = ""
    lease: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    awaits: list[str] = field(default_factory=list)
    """Leases whose delta has no verdict yet."""

    @property
    def key(self) -> Ed25519PrivateKey:
        return parse_private_key(self.key_pem.encode())


class Refused(Exception):
    """The server answered with a refusal."""


class Crowd:
    """All volunteers and one HTTP client. `times` holds what every kind of call took, in seconds."""

    def __init__(self, url: str, http: aiohttp.ClientSession, people: list[Volunteer], *, seed: int) -> None:
        self.url = url
        self.seed = seed
        self.http = http
        self.people = people
        self.times: dict[str, list[float]] = {}
        self.errors: Counter[str] = Counter()
        self.late: list[float] = []
        self.waiting = 0
        """Requests without an answer when the last one of `rate` was sent."""
        self.lost: list[str] = []
        self.verdicts: Counter[str] = Counter()
        self.handed_in: list[str] = []
        self.pace_s = 0.0
        self.lease_s = 0.0
        """What a submission says that the training took."""

    async def call(
        self, kind: str, method: str, path: str, volunteer: Volunteer | None, body: Any, due: float | None = None
    ) -> Any:
        """The answer's JSON; the time from `due` (default: now) to its last byte is noted under `kind`."""
        start = time.perf_counter() if due is None else due
        headers = {"Content-Type": "application/json"}
        if volunteer is not None:
            headers["Authorization"] = f"Bearer {volunteer.token}"
        data = None if body is None else json.dumps(body).encode()
        try:
            async with self.http.request(method, self.url + path, data=data, headers=headers) as answer:
                text = await answer.read()
                status = answer.status
        except (aiohttp.ClientError, TimeoutError) as exc:
            self.errors[f"{kind}: {type(exc).__name__}"] += 1
            raise Refused from exc
        finally:
            self.times.setdefault(kind, []).append(time.perf_counter() - start)
        if status >= 300:
            self.errors[f"{kind}: {status}"] += 1
            raise Refused(text[:500].decode(errors="replace"))
        return json.loads(text)

    # -- what a volunteer does -----------------------------------------------------------------------------------------

    async def enrol(self, number: int) -> None:
        key = generate_private_key()
        volunteer, private = Volunteer(key.decode()), parse_private_key(key)
        said = EnrolStatement(
            public_key=public_key_hex(private),
            name=f"volunteer {number}",
            device=DeviceProfile(kind="cuda", memory_bytes=24 * 2**30, threads=8),
            issued_at=time.time(),
        )
        body = {"statement": said.model_dump(mode="json"), "signature": sign(private, "enrol", said)}
        answer = await self.call("enrol", "POST", "/v1/workers", None, body)
        volunteer.token, volunteer.worker_id = answer["token"], answer["worker_id"]
        self.people.append(volunteer)

    async def claim(self, volunteer: Volunteer, due: float | None = None) -> float:
        """Take a lease; what the server asks to be waited, where it has none."""
        answer = await self.call("claim", "POST", "/v1/leases", volunteer, {}, due)
        if answer["lease"] is None:
            return float(answer["retry_after_s"])
        volunteer.lease = {
            name: answer["lease"][name]
            for name in ("lease_id", "fence", "round_id", "base_manifest", "targets", "heartbeat_s")
        }
        volunteer.step = 0
        self.pace_s = answer["lease"]["heartbeat_s"]
        return 0.0

    async def beat(self, volunteer: Volunteer, due: float | None = None) -> float:
        """Report; how long the server asks to wait until the next one."""
        volunteer.step += 1
        body = {"fence": volunteer.lease["fence"], "step": volunteer.step, "loss": 2.5, "tokens_per_s": 900.0}
        path = f"/v1/leases/{volunteer.lease['lease_id']}/heartbeat"
        answer = await self.call("heartbeat", "POST", path, volunteer, body, due)
        if not answer["go_on"]:
            self.lost.append(volunteer.lease["lease_id"])
        self.pace_s = answer["heartbeat_s"]
        return float(answer["heartbeat_s"])

    async def hand_in(self, volunteer: Volunteer) -> None:
        lease, delta = volunteer.lease, make_delta(volunteer.lease, seed=self.seed + len(self.handed_in))
        path = f"/v1/leases/{lease['lease_id']}"
        asked = {"fence": lease["fence"], "sha256": delta.sha256, "size_bytes": len(delta.data)}
        ticket = await self.call("ticket", "POST", f"{path}/upload", volunteer, asked)
        await self.put(ticket, delta)
        said = SubmitStatement(
            round_id=lease["round_id"],
            lease_id=lease["lease_id"],
            fence=lease["fence"],
            base_manifest=lease["base_manifest"],
            sha256=delta.sha256,
            size_bytes=len(delta.data),
            tokens=100,
            steps=1,
            first_loss=3.0,
            last_loss=2.5,
            seconds=self.lease_s,
        )
        body = {"statement": said.model_dump(mode="json"), "signature": sign(volunteer.key, "submit", said)}
        await self.call("submit", "POST", f"{path}/submit", volunteer, body)
        volunteer.awaits.append(lease["lease_id"])
        self.handed_in.append(lease["lease_id"])

    async def put(self, ticket: dict[str, Any], delta: Delta) -> None:
        """The upload, straight to object storage."""
        start = time.perf_counter()
        url = ticket["url"] if "://" in ticket["url"] else f"{self.url}/{ticket['url']}"
        async with self.http.put(url, data=delta.data, headers=ticket["headers"]) as answer:
            await answer.read()
            if answer.status >= 300:
                self.errors[f"upload: {answer.status}"] += 1
                raise Refused
        self.times.setdefault("upload", []).append(time.perf_counter() - start)

    async def ask_verdicts(self, volunteer: Volunteer) -> None:
        for lease_id in list(volunteer.awaits):
            view = await self.call("verdict", "GET", f"/v1/leases/{lease_id}", volunteer, None)
            if view["state"] in ("accepted", "rejected"):
                volunteer.awaits.remove(lease_id)
                self.verdicts[view["state"]] += 1
