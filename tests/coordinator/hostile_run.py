"""Hostile uploads and requests against a whole gateway and real admission, in a process of its own, whose memory is
watched. Prints one JSON object: what came of each, and how far memory grew.

    python hostile_run.py LEDGER_SETTINGS FOLDER DAMAGED OVER_HTTP SEED
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import structlog
from gateway_world import (
    INVITE,
    ORGANISER_TOKEN,
    RATE_LIMITS,
    Volunteer,
    World,
    add_dataset,
    make_manifest,
    publish,
    serve,
    sha256,
)
from hostile_deltas import CRAFTED, Wanted, damaged, good_delta, is_delta
from hostile_requests import REQUESTS, Target
from pydantic import SecretStr

from aggregator.intake import admit
from coordinator.gateway import GatewayDeps, create_app
from coordinator.layers import BodyLimit
from coordinator.ledger import Ledger
from coordinator.spool import Spool
from rankup.protocol import LeaseGrant
from rankup.records import Receipt, RoundRecord, Submission
from rankup.settings import CoordinatorSettings, LedgerSettings
from rankup.signing import generate_private_key, parse_private_key, public_key_hex
from rankup.store import MemoryStore
from rankup.versions import upload_key

MIB = 1024**2
PATIENCE_S = 0.8
"""How long a silent sender is waited for; the server's own limits are in minutes."""
SHARDS = 4


@contextlib.contextmanager
def impatient_gateway(ledger_settings: LedgerSettings, folder: Path) -> Iterator[World]:
    publisher, store = parse_private_key(generate_private_key()), MemoryStore()
    settings = CoordinatorSettings(
        invite=SecretStr(INVITE),
        organiser_token=SecretStr(ORGANISER_TOKEN),
        max_body_bytes=16_384,
        transfer="proxied",
        spool_dir=folder,
        **dict.fromkeys(RATE_LIMITS, 0),
    )
    app = create_app(
        GatewayDeps(lambda: Ledger.connect(ledger_settings), store, settings, public_key_hex(publisher), time.time)
    )
    for layer in app.user_middleware:
        if layer.cls is BodyLimit:
            layer.kwargs["timeout_s"] = PATIENCE_S
    app.state.desk.spool = Spool(store, folder, silence_s=PATIENCE_S)
    publish(store, publisher, make_manifest(0, None, 3.4))
    add_dataset(store, shards=SHARDS)
    with serve(app) as url, httpx2.Client(base_url=url, timeout=20) as http:
        yield World(http, store, settings, publisher, ledger_settings)


class Siege:
    """One round of a gateway, and a volunteer who means no good."""

    def __init__(self, world: World, ledger: Ledger, runner: asyncio.Runner) -> None:
        self.world, self.ledger, self.runner = world, ledger, runner
        recipe = {"rank": 3, "steps": 5}
        self.round_id = world.open_round(
            shards=SHARDS, recipe=recipe, copies=1, max_shards_per_lease=1, lease_s=3600.0
        )["round_id"]
        self.record: RoundRecord = runner.run(ledger.record(self.round_id))
        self.mallory = world.join("mallory")

    def wanted(self, lease_id: str) -> Wanted:
        weights = {name: (target.d_out, target.d_in, target.rank) for name, target in self.record.targets.items()}
        return Wanted("tiny", self.round_id, lease_id, self.record.base_manifest, weights)

    def claim(self, who: Volunteer) -> LeaseGrant:
        return self.world.claim(who)

    def hand_in(self, who: Volunteer, lease: LeaseGrant, data: bytes) -> dict[str, Any]:
        """Ticket, upload, submission, verdict: the first refusal, or the verdict."""
        asked = {"fence": lease.fence, "sha256": sha256(data), "size_bytes": len(data)}
        ticket = self.world.http.post(f"/v1/leases/{lease.lease_id}/upload", json=asked, headers=who.auth)
        if ticket.status_code != 200:
            return refused("ticket", ticket)
        put = self.world.http.put("/" + ticket.json()["url"], content=data, headers=ticket.json()["headers"])
        if put.status_code != 204:
            return refused("upload", put)
        said = who.submission(lease, data)
        submitted = self.world.http.post(f"/v1/leases/{lease.lease_id}/submit", json=said, headers=who.auth)
        if submitted.status_code != 202:
            return refused("submit", submitted)
        [submission] = self.runner.run(self.ledger.pending(self.round_id))
        receipt = admit(
            self.world.store, self.record, submission, max_delta_bytes=lease.max_delta_bytes, now=time.time()
        )
        judged = self.runner.run(self.ledger.judge(lease.lease_id, receipt, time.time()))
        return {"state": judged.state.value, "reason": receipt.reason, "check": last_check(receipt)}

    def damaged_files(self, count: int, seed: int) -> dict[str, Any]:
        """Damaged deltas straight into admission; every fourth one was damaged on its way, after it was signed."""
        kinds: Counter[str] = Counter()
        checks: Counter[str] = Counter()
        wrong: list[str] = []
        for number in range(count):
            wanted = self.wanted(f"l-{number:016x}")
            kind, data, origin = damaged(number, wanted, seed)
            signed = origin if number % 4 == 3 else data
            receipt = self.judge(wanted.lease_id, data, signed)
            kinds[f"{kind}: {'accepted' if receipt.accepted else 'rejected'}"] += 1
            checks["accepted" if receipt.accepted else last_check(receipt)] += 1
            good = data == signed and is_delta(data, wanted)
            doubted = good and last_check(receipt) in ("norm", "cancellation")
            if not receipt.reason or (receipt.accepted != good and not doubted):
                wrong.append(f"{number} {kind}: {receipt.reason}")
        return {"count": count, "kinds": dict(sorted(kinds.items())), "checks": dict(checks), "wrong": wrong}

    def judge(self, lease_id: str, data: bytes, signed: bytes) -> Receipt:
        grant = self.example.model_copy(update={"lease_id": lease_id})
        said = self.mallory.submission(grant, signed)
        submission = Submission(
            **said,
            public_key=public_key_hex(self.mallory.key),
            worker_id=self.mallory.worker_id,
            worker_name="mallory",
            shard=0,
            submitted_at=time.time(),
        )
        key = upload_key(lease_id, sha256(signed))
        self.world.store.put(key, data)
        receipt = admit(self.world.store, self.record, submission, max_delta_bytes=MIB, now=time.time())
        self.world.store.delete(key)
        return receipt

    def besiege(self, damaged_count: int, over_http: int, seed: int) -> dict[str, Any]:
        honest = self.world.join("ada")
        self.example = self.claim(honest)
        found: dict[str, Any] = {"crafted": {}, "damaged over HTTP": []}
        found["honest"] = [self.hand_in(honest, self.example, good_delta(self.wanted(self.example.lease_id)))]
        before, peaks = resident_mib("VmRSS:"), []
        for name, (make, _) in CRAFTED.items():
            lease = self.claim(self.mallory)
            wanted = self.wanted(lease.lease_id)
            data = make(wanted)
            forget_peak()  # Making it may have cost more than refusing it may.
            verdict = self.hand_in(self.mallory, lease, data)
            peaks.append(resident_mib("VmHWM:"))
            found["crafted"][name] = verdict | {"is_delta": is_delta(data, wanted)}
        forget_peak()
        for number in range(over_http):
            lease = self.claim(self.mallory)
            wanted = self.wanted(lease.lease_id)
            kind, data, _ = damaged(number, wanted, seed)
            if not is_delta(data, wanted):  # Else nothing is wrong: a worker may hand in any numbers.
                found["damaged over HTTP"].append([kind, self.hand_in(self.mallory, lease, data)])
        lease = self.claim(self.mallory)
        found["requests"] = self.requests(lease)
        found["damaged"] = self.damaged_files(damaged_count, seed)
        peaks.append(resident_mib("VmHWM:"))
        found["honest"].append(self.hand_in(self.mallory, lease, good_delta(self.wanted(lease.lease_id))))
        found["accepted"] = self.runner.run(self.ledger.round(self.round_id)).facts.counts.accepted
        found["grown_mib"] = max(peaks) - before
        return found

    def requests(self, lease: LeaseGrant) -> dict[str, Any]:
        data = good_delta(self.wanted(lease.lease_id))
        asked = {"fence": lease.fence, "sha256": sha256(data), "size_bytes": len(data)}
        ticket = self.world.http.post(
            f"/v1/leases/{lease.lease_id}/upload", json=asked, headers=self.mallory.auth
        ).json()
        url = self.world.http.base_url
        target = Target(
            host=url.host,
            port=url.port or 80,
            worker=self.mallory.token,
            organiser=ORGANISER_TOKEN,
            lease_id=lease.lease_id,
            fence=lease.fence,
            ticket="/" + ticket["url"],
            delta=data,
        )
        answers = {}
        for name, (_, make) in REQUESTS.items():
            made = make(target)
            status, media, body = target.send([made] if isinstance(made, bytes) else made)
            answers[name] = {"status": status, "media": media, "body": body[:4096].decode("utf-8", "replace")}
        return answers


def refused(stage: str, answer: httpx2.Response) -> dict[str, Any]:
    return {"state": stage, "status": answer.status_code, "reason": answer.json().get("detail", ""), "check": stage}


def last_check(receipt: Receipt) -> str:
    return receipt.checks[-1].name if receipt.checks else "intake"


def forget_peak() -> None:
    """The peak of this process (VmHWM) is now what it has at this moment (proc(5))."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_mib(field: str) -> float:
    """VmRSS, or VmHWM: the most there ever was of this process (proc(5))."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


def main(ledger_settings: str, folder: str, damaged_count: str, over_http: str, seed: str) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    settings = LedgerSettings.from_wire(ledger_settings).model_copy(update={"require_fsync": False})
    with impatient_gateway(settings, Path(folder)) as world, asyncio.Runner() as runner:
        ledger = runner.run(Ledger.connect(settings))
        found = Siege(world, ledger, runner).besiege(int(damaged_count), int(over_http), int(seed))
        runner.run(ledger.close())
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
