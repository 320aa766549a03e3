"""What a worker will do, before it does it: which round, how much it takes, and how long until it counts.

    first credit = download + start + training of one shard + upload + admission

What always holds: every number comes from what was measured or what the server says, and stands with its origin; what
is not known is None and makes the sum None, never zero; the server hands out leases, so all of this is an estimate. The
order of the rounds is the server's, as far as it can be seen from outside: fewest volunteers first, then the oldest.

Pure: no file, no clock, no network here (`worker.planreader` reads).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from rankup.protocol import LeasesAtWork, RoundState, RoundView, tier_of
from rankup.recipe import Precision

START_S: Final = 15.0
"""Importing the libraries of a training, on a cold disk."""
READ_BYTES_S: Final = 500e6
"""How fast a base is read into memory."""
ADMISSION_S: Final = 30.0
"""The checks of a delta, with a few others in the queue."""
_GIB: Final = 2**30


@dataclass(frozen=True)
class Base:
    """What the versions that a round needs cost here: its base and, for distillation, its teacher."""

    fetch_bytes: int
    full_bytes: int
    """All of their files."""

    @property
    def origin(self) -> str:
        """Where the bytes come from."""
        if not self.fetch_bytes:
            return "all of it is here"
        return "whole" if self.fetch_bytes >= self.full_bytes else "patches, and what is not here"


@dataclass(frozen=True)
class Memory:
    """What a training takes; `trouble`: why it would not fit, and what to do."""

    needs_bytes: int | None = None
    precision: str = ""
    """Of the frozen base."""
    micro_batch: int = 0
    """Examples in memory at a time."""
    trouble: str = ""


@dataclass(frozen=True)
class Resources:
    """What this machine has for the work; None: unknown, or no limit where it is a limit."""

    memory_bytes: int
    """That a training may take now."""
    disk_free_bytes: int
    quota_bytes: int
    """For base versions."""
    up: float | None = None
    down: float | None = None
    """Bytes a second, the owner's limits applied."""
    daily_bytes: float | None = None
    models: tuple[str, ...] = ()
    """Those that its owner wants; empty: any."""
    precision: Precision | Literal["auto"] = "auto"
    """What its owner wants the base to be held in."""


@dataclass(frozen=True)
class Part:
    """One part of the time until the first credit; None: unknown."""

    name: str
    seconds: float | None
    origin: str


@dataclass(frozen=True)
class Task:
    """The work on one round."""

    round_id: str
    model: str
    base_version: int
    method: str
    rank: int
    tier: str
    """Why this rank."""
    steps: int
    """Of one shard."""
    licence: str
    teacher: str
    """Distillation: model and version; else empty."""
    deadline_at: float
    download_bytes: int | None
    download_origin: str
    disk_bytes: int | None
    memory: Memory
    upload_bytes: int
    """Of one lease."""
    parts: tuple[Part, ...]
    first_credit_s: float | None
    notes: tuple[str, ...] = ()
    """What the owner should know or do."""


@dataclass(frozen=True)
class Plan:
    """What will be done; without a task, why not and what happens instead."""

    task: Task | None
    waits: str = ""
    others: tuple[str, ...] = ()
    """Further rounds that the server may hand out instead."""
    refused: tuple[str, ...] = ()
    """Open rounds that this machine gets nothing of, and why."""


def sort_rounds(rounds: Sequence[RoundView], has: Resources) -> tuple[list[RoundView], list[str]]:
    """The open rounds that this machine may work on, likeliest first, and why it gets nothing of the others."""
    fitting: list[RoundView] = []
    refused: list[str] = []
    for view in rounds:
        if view.state is not RoundState.OPEN:
            continue
        if has.models and view.model not in has.models:
            refused.append(f"{view.round_id}: you train {' and '.join(has.models)} only (--model)")
        elif view.paused:
            refused.append(f"{view.round_id}: the organiser has paused it")
        elif view.tiers and tier_of(view.tiers, has.memory_bytes) is None:
            least = min(tier.min_memory_gib for tier in view.tiers)
            refused.append(
                f"{view.round_id}: it takes {least:g} GiB of memory, here are {has.memory_bytes / _GIB:.1f} free"
            )
        else:
            fitting.append(view)
    return sorted(fitting, key=lambda view: (not view.free, view.leased, view.opened_at, view.round_id)), refused


def rank_for(view: RoundView, memory_bytes: int) -> tuple[int, str]:
    """The rank of this machine's tier, and why it is that."""
    tier = tier_of(view.tiers, memory_bytes)
    if tier is None:
        return view.recipe.rank, "the same for everybody"
    above = [other.min_memory_gib for other in view.tiers if other.rank > tier.rank]
    why = f"for {tier.min_memory_gib:g} GiB of memory or more"
    return tier.rank, f"{why}; from {min(above):g} GiB on it would be higher" if above else why


def shard_seconds(view: RoundView, earlier: Sequence[RoundView], work: LeasesAtWork | None) -> tuple[float, str]:
    """How long one shard should take: as long as it took others in this round, in one of `earlier` ones (newest first)
    with the same model and steps, or takes those at work now; else what the organiser aims at."""
    if view.shard_s is not None:
        return view.shard_s, "as long as others took for a shard"
    for before in earlier:
        if before.shard_s is not None and (before.model, _tokens(before)) == (view.model, _tokens(view)):
            return before.shard_s, "as long as others took for a shard of the round before"
    took = [
        (lease.done_at - lease.granted_at) / lease.shards
        for lease in (work.leases if work is not None else ())
        if lease.done_at is not None and lease.done_at > lease.granted_at
    ]
    if took:
        return statistics.median(took), f"as long as {_volunteers(len(took))} at work now should take"
    return view.lease_target_s, "nobody has told yet, so what the organiser aims at for a lease"


def plan_task(
    view: RoundView,
    has: Resources,
    base: Base | None,
    memory: Memory,
    now: float,
    *,
    earlier: Sequence[RoundView] = (),
    work: LeasesAtWork | None = None,
) -> Task:
    """The work on this round. `base`: None where it could not be read. `now`: Unix time of the server. `earlier`,
    `work`: what tells how long a shard takes."""
    rank, tier = rank_for(view, has.memory_bytes)
    upload_bytes = math.ceil(view.delta_bytes * rank / view.recipe.rank)
    train_s, train_origin = shard_seconds(view, earlier, work)
    fetched = base.fetch_bytes + view.shard_bytes if base is not None else None
    parts = (
        _transfer("download", fetched, has.down),
        Part(
            "start", START_S + (base.full_bytes / READ_BYTES_S if base is not None else 0.0), "libraries, then the base"
        ),
        Part("training", train_s, train_origin),
        _transfer("upload", upload_bytes, has.up),
        Part("admission", ADMISSION_S, "the server checks the delta"),
    )
    seconds = [part.seconds for part in parts]
    first_credit_s = None if None in seconds else sum(second for second in seconds if second is not None)
    teacher = view.teacher
    return Task(
        round_id=view.round_id,
        model=view.model,
        base_version=view.base_version,
        method=view.recipe.method,
        rank=rank,
        tier=tier,
        steps=view.recipe.steps,
        licence=view.licence,
        teacher=f"{teacher.model} version {teacher.version}" if teacher is not None else "",
        deadline_at=view.deadline_at,
        download_bytes=fetched,
        download_origin=base.origin if base is not None else "",
        disk_bytes=base.full_bytes if base is not None else None,
        memory=memory,
        upload_bytes=upload_bytes,
        parts=parts,
        first_credit_s=first_credit_s,
        notes=tuple(_notes(view, has, base, memory, first_credit_s, now)),
    )


def _transfer(name: str, size_bytes: int | None, rate: float | None) -> Part:
    if size_bytes is None:
        return Part(name, None, "its size is not known")
    if rate is None:
        return Part(name, 0.0 if not size_bytes else None, "the link was not measured")
    return Part(name, size_bytes / rate, "as measured")


def _notes(
    view: RoundView, has: Resources, base: Base | None, memory: Memory, first_credit_s: float | None, now: float
) -> list[str]:
    notes = []
    if memory.trouble:
        notes.append(memory.trouble)
    if base is not None and base.fetch_bytes and base.full_bytes > has.disk_free_bytes:
        notes.append(
            f"the base takes {base.full_bytes / 1e9:.1f} GB, and {has.disk_free_bytes / 1e9:.1f} GB are free: make room"
        )
    if base is not None and base.full_bytes > has.quota_bytes:
        notes.append(
            f"the base takes {base.full_bytes / 1e9:.1f} GB; base versions may take {has.quota_bytes / 1e9:.1f}: only "
            "this one is kept, and the next one comes whole (disk_max_used_gb)"
        )
    if base is not None and has.daily_bytes is not None and base.fetch_bytes > has.daily_bytes:
        notes.append(f"the download is more than a day's {has.daily_bytes / 1e6:.0f} MB (daily_xfer_limit_mb)")
    if view.listed:
        notes.append("the round is for volunteers whom the organiser has named: the server says whether you are one")
    if not view.free:
        notes.append("every shard is handed out at the moment: you get one that comes back, or one of the next round")
    left_s = view.deadline_at - now
    if first_credit_s is not None and first_credit_s > left_s:
        notes.append("the round may close before your first delta is there; a later one of the campaign takes it then")
    return notes


def _tokens(view: RoundView) -> int:
    """The most that a shard of the round lets through."""
    return view.recipe.steps * view.recipe.batch_size * view.recipe.max_tokens


def _volunteers(count: int) -> str:
    return "one volunteer" if count == 1 else f"{count} volunteers"
