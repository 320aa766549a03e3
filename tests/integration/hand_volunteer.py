"""A volunteer made by hand: it speaks the real protocol to a real server, but sends whatever a test wants."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import safetensors.numpy

from rankup.delta import DeltaHeader, write_delta
from rankup.fixedpoint import Factors, quantise
from rankup.protocol import (
    ClaimRequest,
    DeviceProfile,
    EnrolRequest,
    EnrolStatement,
    LeaseGrant,
    LeaseState,
    LeaseView,
    SubmitRequest,
    SubmitStatement,
    UploadRequest,
)
from rankup.signing import generate_private_key, parse_private_key, public_key_hex, sign
from worker.client import GatewayClient
from worker.retry import RetryPolicy

VERDICT_S = 60.0


class HandVolunteer:
    """Enrols at once; then `claim`, `upload`, `submit`, `verdict`, in any order and with any content."""

    def __init__(self, url: str, invite: str, name: str) -> None:
        self.url = url
        self.key = parse_private_key(generate_private_key())
        self.client = GatewayClient(url, policy=RetryPolicy(patience_s=10.0), stop=threading.Event())
        statement = EnrolStatement(
            public_key=public_key_hex(self.key), name=name, invite=invite, device=DeviceProfile(), issued_at=time.time()
        )
        request = EnrolRequest(statement=statement, signature=sign(self.key, "enrol", statement))
        self.token = self.client.enrol(request).token
        self.client.use_token(self.token)

    def claim(self) -> LeaseGrant:
        """A lease; waits until a shard is free."""
        deadline = time.monotonic() + VERDICT_S
        while True:
            answer = self.client.claim(ClaimRequest())
            if answer.lease is not None:
                return answer.lease
            assert time.monotonic() < deadline, answer.reason
            time.sleep(0.2)

    def upload(self, lease: LeaseGrant, path: Path) -> None:
        data = path.read_bytes()
        wanted = UploadRequest(fence=lease.fence, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
        self.client.upload(lease.lease_id, wanted, path, progress=lambda _done, _total: None)

    def statement(self, lease: LeaseGrant, path: Path, **changes: Any) -> SubmitStatement:
        data = path.read_bytes()
        about: dict[str, Any] = {
            "round_id": lease.round_id,
            "lease_id": lease.lease_id,
            "fence": lease.fence,
            "base_manifest": lease.base_manifest,
            "sha256": hashlib.sha256(data).hexdigest(),
            "size_bytes": len(data),
            "tokens": 10,
            "steps": 1,
            "first_loss": 3.0,
            "last_loss": 2.0,
            "seconds": 1.0,
        }
        return SubmitStatement(**(about | changes))

    def submit(self, lease: LeaseGrant, path: Path, **changes: Any) -> LeaseView:
        statement = self.statement(lease, path, **changes)
        request = SubmitRequest(statement=statement, signature=sign(self.key, "submit", statement))
        return self.client.submit(lease.lease_id, request)

    def verdict(self, lease: LeaseGrant) -> LeaseView:
        deadline = time.monotonic() + VERDICT_S
        while True:
            view = self.client.lease(lease.lease_id)
            if view.state in (LeaseState.ACCEPTED, LeaseState.REJECTED):
                return view
            assert time.monotonic() < deadline, view
            time.sleep(0.1)

    def hand_in(self, lease: LeaseGrant, path: Path) -> LeaseView:
        """Upload, submit and wait for the verdict."""
        self.upload(lease, path)
        self.submit(lease, path)
        return self.verdict(lease)

    def post(self, path: str, body: bytes) -> httpx2.Response:
        """A raw call with this volunteer's token."""
        headers = {"authorization": f"Bearer {self.token}", "content-type": "application/json"}
        return httpx2.post(self.url + path, content=body, headers=headers, timeout=30)


def header_of(lease: LeaseGrant) -> DeltaHeader:
    return DeltaHeader(round_id=lease.round_id, lease_id=lease.lease_id, base_manifest=lease.base_manifest)


def random_factors(lease: LeaseGrant, *, seed: int, scale: float = 1e-3) -> dict[str, Factors]:
    rng = np.random.default_rng(seed)
    return {
        name: quantise(scale * rng.normal(size=(one.d_out, one.rank)), rng.normal(size=(one.rank, one.d_in)))
        for name, one in lease.targets.items()
    }


def good_delta(lease: LeaseGrant, folder: Path, *, seed: int) -> Path:
    path = folder / f"good-{seed}.delta"
    write_delta(path, header_of(lease), random_factors(lease, seed=seed))
    return path


def as_arrays(factors: Mapping[str, Factors]) -> dict[str, Any]:
    """The tensors of a delta file by their names in it."""
    arrays: dict[str, Any] = {}
    for name, part in factors.items():
        arrays[f"{name}.lora_B"], arrays[f"{name}.lora_A"] = part.b, part.a
        arrays[f"{name}.lora_scales"] = np.stack([part.b_exp, part.a_exp, part.b_max, part.a_max])
    return arrays


def raw_delta(lease: LeaseGrant, arrays: Mapping[str, Any], path: Path, *, header: DeltaHeader | None = None) -> Path:
    """A delta file written without any check."""
    about = (header or header_of(lease)).model_dump(mode="json")
    text = json.dumps(about, sort_keys=True, separators=(",", ":"))
    path.write_bytes(safetensors.numpy.save(dict(arrays), metadata={"rankup": text}))
    return path
