"""What the worker will do: the choice of the round, the arithmetic of the first credit, and what its owner is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankup.errors import IntegrityError, UnreachableError
from rankup.protocol import LeaseProgress, LeasesAtWork, Rounds, RoundState, RoundView, Tier, VersionRef
from rankup.recipe import Recipe
from rankup.records import FileEntry, Group, Manifest, TensorEntry
from worker.plan import (
    ADMISSION_S,
    READ_BYTES_S,
    START_S,
    Base,
    Memory,
    Plan,
    Resources,
    plan_task,
    rank_for,
    shard_seconds,
    sort_rounds,
)
from worker.planreader import NO_ROUND, NONE_FITS, fit_memory, hardware_of, read_plan

GIB = 1024**3
NOW = 1_000_000.0
HAS = Resources(memory_bytes=12 * GIB, disk_free_bytes=100 * GIB, quota_bytes=50 * GIB, up=1e6, down=10e6)
BASE = Base(fetch_bytes=270_000_000, full_bytes=270_000_000)
TIERS = (Tier(min_memory_gib=6, rank=4), Tier(min_memory_gib=10, rank=8), Tier(min_memory_gib=24, rank=16))


def view(**about: Any) -> RoundView:
    usual: dict[str, Any] = {
        "round_id": "tiny-r0001-aaaaaa",
        "model": "tiny",
        "dataset": "pydocs",
        "state": RoundState.OPEN,
        "index": 0,
        "repeat": 1,
        "base_version": 0,
        "base_manifest": "3b" * 32,
        "recipe": Recipe(rank=16, steps=25),
        "shards": 8,
        "quorum": 8,
        "min_contributions": 1,
        "deadline_at": NOW + 86_400,
        "opened_at": NOW,
        "free": 8,
        "lease_target_s": 1200.0,
        "delta_bytes": 8_000_000,
        "shard_bytes": 1_000_000,
    }
    return RoundView(**usual | about)


def work(*took: tuple[float | None, int]) -> LeasesAtWork:
    leases = tuple(
        LeaseProgress(
            name="ada",
            shard=0,
            shards=shards,
            step=1,
            steps=2,
            granted_at=NOW,
            seen_at=NOW,
            done_at=None if seconds is None else NOW + seconds,
        )
        for seconds, shards in took
    )
    return LeasesAtWork(round_id="r", at=NOW, total=len(leases), leases=leases)


# -- which round -------------------------------------------------------------------------------------------------------


def test_the_round_with_the_fewest_volunteers_comes_first_then_the_oldest_and_one_without_shards_last() -> None:
    rounds = [
        view(round_id="full", free=0, leased=0),
        view(round_id="busy", leased=3),
        view(round_id="young", leased=1, opened_at=NOW + 5),
        view(round_id="old", leased=1),
        view(round_id="over", state=RoundState.PUBLISHED),
    ]
    fitting, refused = sort_rounds(rounds, HAS)
    assert ([found.round_id for found in fitting], refused) == (["old", "young", "busy", "full"], [])


REFUSED = {
    "another model": (view(model="big"), Resources(12 * GIB, 1, 1, models=("tiny",)), "you train tiny only"),
    "paused": (view(paused=True), HAS, "the organiser has paused it"),
    "too little memory": (view(tiers=TIERS), Resources(5 * GIB, 1, 1), "takes 6 GiB of memory, here are 5.0 free"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_round_that_gives_nothing_is_named_with_the_reason(name: str) -> None:
    one, has, words = REFUSED[name]
    fitting, refused = sort_rounds([one], has)
    assert fitting == []
    assert [words in line and line.startswith(one.round_id) for line in refused] == [True]


@pytest.mark.parametrize(
    ("gib", "rank", "words"),
    [(6, 4, "from 10 GiB on"), (10, 8, "from 24 GiB on"), (48, 16, "for 24 GiB of memory or more")],
)
def test_the_rank_is_that_of_the_tier(gib: int, rank: int, words: str) -> None:
    found, why = rank_for(view(tiers=TIERS), gib * GIB)
    assert (found, words in why) == (rank, True)
    assert rank_for(view(), gib * GIB) == (16, "the same for everybody")


# -- how long ----------------------------------------------------------------------------------------------------------

TIMES: dict[str, tuple[RoundView, list[RoundView], LeasesAtWork | None, float, str]] = {
    "others have told": (view(shard_s=60.0), [], work((900.0, 1)), 60.0, "others took"),
    "others have told of the round before": (view(), [view(shard_s=70.0)], None, 70.0, "the round before"),
    "of another model": (view(), [view(model="big", shard_s=70.0)], None, 1200.0, "aims at"),
    "of other shards": (view(), [view(recipe=Recipe(steps=9), shard_s=70.0)], None, 1200.0, "aims at"),
    "the median of those at work, by shard": (
        view(),
        [],
        work((100.0, 1), (400.0, 2), (9000.0, 1), (None, 1)),
        200.0,
        "3 volunteers at work now",
    ),
    "nobody": (view(), [], work(), 1200.0, "aims at"),
    "not known who": (view(lease_target_s=300.0), [], None, 300.0, "aims at"),
}


@pytest.mark.parametrize("name", TIMES)
def test_the_time_of_a_shard_comes_from_the_best_witness(name: str) -> None:
    about, earlier, at_work, seconds, words = TIMES[name]
    found, origin = shard_seconds(about, earlier, at_work)
    assert (found, words in origin) == (seconds, True), origin


def test_the_first_credit_is_the_sum_of_its_parts() -> None:
    # 270 MB and a shard of 1 MB at 10 MB/s; a delta of rank 8 of 16 is 4 MB, at 1 MB/s.
    task = plan_task(view(tiers=TIERS, shard_s=100.0), HAS, BASE, Memory(), NOW)
    seconds = {part.name: part.seconds for part in task.parts}
    start_s = START_S + 270e6 / READ_BYTES_S
    assert seconds == {
        "download": 27.1,
        "start": pytest.approx(start_s),
        "training": 100.0,
        "upload": 4.0,
        "admission": ADMISSION_S,
    }
    assert task.first_credit_s == pytest.approx(27.1 + start_s + 100.0 + 4.0 + ADMISSION_S)
    assert (task.rank, task.download_bytes, task.upload_bytes) == (8, 271_000_000, 4_000_000)
    assert task.notes == ()


@given(
    up=st.none() | st.floats(1e2, 1e9),
    down=st.none() | st.floats(1e2, 1e9),
    base=st.none() | st.builds(Base, st.integers(0, 10**12), st.integers(0, 10**12)),
    gib=st.integers(0, 100),
)
def test_what_is_not_known_is_never_counted_as_nothing(
    up: float | None, down: float | None, base: Base | None, gib: int
) -> None:
    has = Resources(gib * GIB, 0, 0, up=up, down=down)
    task = plan_task(view(), has, base, Memory(), NOW)
    known = up is not None and down is not None and base is not None
    assert (task.first_credit_s is not None) == known
    if known:
        assert task.first_credit_s == sum(part.seconds or 0.0 for part in task.parts)
    assert (task.download_bytes is None) == (base is None)


NOTES: dict[str, tuple[RoundView, Resources, Base, str]] = {
    "no room": (view(), Resources(12 * GIB, GIB // 10, 50 * GIB, 1e6, 1e6), BASE, "make room"),
    "above the quota": (view(), Resources(12 * GIB, 9 * GIB, GIB // 10, 1e6, 1e6), BASE, "disk_max_used_gb"),
    "above a day's megabytes": (
        view(),
        Resources(12 * GIB, 9 * GIB, GIB, 1e6, 1e6, daily_bytes=100e6),
        BASE,
        "daily_xfer_limit_mb",
    ),
    "chosen volunteers": (view(listed=True), HAS, BASE, "whom the organiser has named"),
    "nothing free": (view(free=0), HAS, BASE, "every shard is handed out"),
    "a deadline that is near": (view(deadline_at=NOW + 600), HAS, BASE, "may close before"),
}


@pytest.mark.parametrize("name", NOTES)
def test_its_owner_is_told_what_stands_in_the_way(name: str) -> None:
    about, has, base, words = NOTES[name]
    notes = plan_task(about, has, base, Memory(), NOW).notes
    assert [words in note for note in notes] == [True], notes


@pytest.mark.parametrize(
    ("base", "origin"),
    [
        (Base(0, 100), "all of it is here"),
        (Base(30, 100), "patches, and what is not here"),
        (Base(100, 100), "whole"),
    ],
)
def test_where_the_bytes_come_from(base: Base, origin: str) -> None:
    assert base.origin == origin


# -- read from a server ------------------------------------------------------------------------------------------------


class Server:
    """What the reader asks of a client."""

    def __init__(self, *rounds: RoundView, away: bool = False) -> None:
        self._rounds, self._away = rounds, away

    def rounds(self) -> Rounds:
        if self._away:
            raise UnreachableError("no answer")
        return Rounds(rounds=self._rounds)

    def leases_at_work(self, round_id: str) -> LeasesAtWork:
        raise UnreachableError("no answer")


def manifest() -> Manifest:
    shapes = {f"model.layers.{layer}.mlp.up_proj.weight": (2048, 512) for layer in range(4)}
    shapes["model.embed_tokens.weight"] = (8192, 512)
    file = FileEntry(path="model-00001.safetensors", sha256="5e" * 32, size_bytes=100)
    return Manifest(
        model="tiny",
        version=0,
        parent=None,
        round_id=None,
        recipe=None,
        tensors={
            name: TensorEntry(
                shape=shape,
                export_dtype="BF16",
                master="1a" * 32,
                export="2b" * 32,
                role="embedding" if "embed" in name else "linear",
            )
            for name, shape in shapes.items()
        },
        groups=(Group(tensors=tuple(shapes), master=file, export=file),),
        files=(),
        base_model="tiny",
        licence="apache-2.0",
        created_at=NOW,
    )


def read(*rounds: RoundView, away: bool = False, gib: float = 12.0, broken: bool = False) -> Plan:
    asked: list[VersionRef] = []

    def read_base(wanted: VersionRef) -> tuple[Base, Manifest]:
        asked.append(wanted)
        if broken:
            raise IntegrityError("its signature is not the publisher's")
        return Base(100, 1000), manifest()

    server: Any = Server(*rounds, away=away)
    has = Resources(int(gib * GIB), 100 * GIB, 50 * GIB, up=1e6, down=1e6)
    return read_plan(server, has, hardware_of("cuda", int(gib * GIB), (8, 6)), read_base, NOW)


def test_without_a_round_the_plan_is_to_wait() -> None:
    assert read() == Plan(None, waits=NO_ROUND)
    closed = read(view(paused=True))
    assert (closed.task, closed.waits, len(closed.refused)) == (None, NONE_FITS, 1)
    assert "cannot be read (no answer)" in read(away=True).waits


def test_a_teacher_is_downloaded_too() -> None:
    teacher = VersionRef(model="big", version=4, manifest="4c" * 32)
    alone = read(view()).task
    taught = read(view(teacher=teacher, recipe=Recipe(rank=16, method="distillation"))).task
    assert alone is not None
    assert taught is not None
    assert (alone.teacher, taught.teacher) == ("", "big version 4")
    assert (alone.disk_bytes, taught.disk_bytes) == (1000, 2000)
    assert taught.download_bytes == 200 + 1_000_000


def test_other_rounds_are_named_after_the_likeliest() -> None:
    plan = read(view(), view(round_id="other-r0001-bbbbbb", model="other", leased=4))
    assert plan.task is not None
    assert (plan.task.round_id, plan.others) == ("tiny-r0001-aaaaaa", ("other-r0001-bbbbbb (other)",))


def test_a_base_that_cannot_be_trusted_gives_no_numbers() -> None:
    task = read(view(), broken=True).task
    assert task is not None
    assert (task.download_bytes, task.disk_bytes, task.first_credit_s) == (None, None, None)
    assert ["its signature is not the publisher's" in note for note in task.notes] == [True]


def test_memory_is_planned_as_the_trainer_will_take_it() -> None:
    fits = read(view()).task
    assert fits is not None
    assert (fits.memory.precision, fits.memory.trouble) == ("bfloat16", "")
    assert fits.memory.needs_bytes is not None
    little = Resources(GIB // 10, 0, 0)
    tight = fit_memory(view(), little, manifest(), hardware_of("cuda", little.memory_bytes, (8, 6)))
    assert tight.needs_bytes is None
    assert "GiB are free" in tight.trouble
    asked = fit_memory(view(), replace(HAS, precision="float32"), manifest(), hardware_of("cuda", 12 * GIB, (8, 6)))
    assert asked.precision == "float32"
