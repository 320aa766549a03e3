"""Routes over made-up histories: which blobs a plan names, and what it costs."""

import hashlib
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankup.records import FileEntry, Group, KeyRotation, Manifest, Patch, Retained, Revocation, Rollback, Term
from rankup.roundroutes import plan_masters
from rankup.routes import MAX_HOPS, Plan, Stock, plan_exports

FULL = 1000
NOTHING_GONE = Retained(model="m")


def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def file(name: str, size: int = FULL) -> FileEntry:
    return FileEntry(path="model.safetensors", sha256=digest(name), size_bytes=size)


def version(
    number: int,
    export: str,
    patch: tuple[str, int] | None = None,
    *,
    change: Rollback | Revocation | KeyRotation | None = None,
    deltas: Sequence[int] = (),
    momentum: bool = False,
) -> Manifest:
    """A version with one group. `export` names its bytes; `patch`: (what it starts from, its size)."""
    group = Group(
        tensors=("w",),
        master=file(f"master of {export}"),
        export=file(export),
        momentum=file(f"momentum of {export}") if momentum else None,
        patch=patch and Patch(base=digest(patch[0]), sha256=digest(f"{patch[0]}>{export}"), size_bytes=patch[1]),
    )
    terms = tuple(
        Term(
            contribution=digest(f"delta {number} {index}"),
            size_bytes=size,
            worker_id="w-1",
            worker_name="one",
            shard=index,
            tokens=1,
            coefficient=1,
        )
        for index, size in enumerate(deltas)
    )
    return Manifest(
        model="m",
        version=number,
        parent=digest(str(number - 1)) if number else None,
        round_id=None,
        recipe=None,
        terms=terms,
        tensors={},
        groups=(group,),
        files=(),
        change=change,
        base_model="b",
        licence="l",
        created_at=0.0,
    )


class World:
    """Versions from 0 on, and which of their manifests were asked for."""

    def __init__(self, versions: Sequence[Manifest]) -> None:
        self.versions = {manifest.version: manifest for manifest in versions}
        self.asked: list[int] = []

    def manifest_of(self, number: int) -> Manifest | None:
        self.asked.append(number)
        return self.versions.get(number)

    def plan(
        self, held: Sequence[str] = (), *, retained: Retained = NOTHING_GONE, manifest_bytes: int = 1, **stock: object
    ) -> Plan:
        has = Stock(held=frozenset(digest(name) for name in held), **stock)  # type: ignore[arg-type]
        return plan_exports(self.newest, has, retained, self.manifest_of, manifest_bytes=manifest_bytes)

    def masters(self, held: Sequence[str] = (), *, retained: Retained = NOTHING_GONE, **stock: object) -> Plan:
        has = Stock(held=frozenset(digest(name) for name in held), **stock)  # type: ignore[arg-type]
        return plan_masters(self.newest, has, retained, self.manifest_of, manifest_bytes=1)

    @property
    def newest(self) -> Manifest:
        return self.versions[max(self.versions)]


def straight(*patch_bytes: int) -> World:
    """Version n has the file v<n>, and a patch of the n-th size from v<n-1>."""
    later = [version(n, f"v{n}", (f"v{n - 1}", size)) for n, size in enumerate(patch_bytes, start=1)]
    return World([version(0, "v0"), *later])


def summary(plan: Plan) -> tuple[str, int, int]:
    [route] = plan.routes
    return route.kind, len(route.patches), plan.fetch_bytes


# -- patches -----------------------------------------------------------------------------------------------------------

CHAINS = [
    ("nothing here", straight(10, 10), [], ("full", 0, FULL)),
    ("the file itself", straight(10, 10), ["v2"], ("here", 0, 0)),
    ("the version before", straight(10, 10), ["v1"], ("patches", 1, 10)),
    ("two versions before", straight(10, 10), ["v0"], ("patches", 2, 20)),
    ("both: the shorter chain", straight(10, 10), ["v0", "v1"], ("patches", 1, 10)),
    ("patches dearer than the file", straight(600, 600), ["v0"], ("full", 0, FULL)),
    ("patches as dear as the file", straight(400, 600), ["v0"], ("full", 0, FULL)),
    ("a version in between has no patch", World([version(0, "v0"), version(1, "v1"), version(2, "v2", ("v1", 10))]),
     ["v0"], ("full", 0, FULL)),
    ("a version in between changed nothing", World([version(0, "v0"), version(1, "v0"), version(2, "v2", ("v0", 10))]),
     ["v0"], ("patches", 1, 10)),
    ("unchanged since", World([version(0, "v0"), version(1, "v1", ("v0", 10)), version(2, "v1"), version(3, "v1")]),
     ["v0"], ("patches", 1, 10)),
    ("an unknown file", straight(10, 10), ["other"], ("full", 0, FULL)),
]  # fmt: skip


@pytest.mark.parametrize(("world", "held", "expected"), [pytest.param(*row[1:], id=row[0]) for row in CHAINS])
def test_the_cheapest_chain_is_taken_with(world: World, held: list[str], expected: tuple[str, int, int]) -> None:
    plan = world.plan(held)
    assert summary(plan) == expected
    assert plan.full_bytes == (0 if expected[0] == "here" else FULL)


def rolled_back() -> World:
    """Version 4 has the files of version 1 again."""
    world = straight(10, 20, 30)
    world.versions[4] = version(4, "v1", ("v3", 40), change=Rollback(to=1))
    return world


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        (["v3"], ("patches", 1, 40)),
        (["v0"], ("patches", 1, 10)),
        (["v2"], ("patches", 2, 70)),
        (["v1"], ("here", 0, 0)),
    ],
)
def test_after_a_rollback_the_way_leads_over_either_side(held: list[str], expected: tuple[str, int, int]) -> None:
    assert summary(rolled_back().plan(held)) == expected


def test_the_patches_of_a_chain_stand_in_the_order_in_which_they_are_applied() -> None:
    [route] = straight(10, 20, 30).plan(["v0"]).routes
    assert [patch.size_bytes for patch in route.patches] == [10, 20, 30]
    assert route.base == digest("v0")
    assert route.fetched == route.patches


def test_a_download_that_was_interrupted_counts_for_what_has_arrived() -> None:
    assert summary(straight(300).plan(["v0"], arrived={digest("v1"): 800})) == ("full", 0, 200)
    assert summary(straight(300).plan(["v0"], arrived={digest("v0>v1"): 200, digest("v1"): 800})) == ("patches", 1, 100)


def gone(**parts: str) -> Retained:
    return Retained(model="m", gone={int(number[1:]): (part,) for number, part in parts.items()})  # type: ignore[misc]


GONE = [
    ("a patch that is gone", gone(v2="patch"), ["v0"], ("full", 0, FULL)),
    ("a patch further back that is gone", gone(v1="patch"), ["v1"], ("patches", 1, 10)),
    ("the whole file, with a base here", gone(v2="export"), ["v0"], ("patches", 2, 20)),
    ("the whole file, with nothing here", gone(v2="export"), [], ("patches", 1, FULL + 10)),
    ("the whole file and its parent's", gone(v2="export", v1="export"), [], ("patches", 2, FULL + 20)),
    ("everything", gone(v2="export", v1="export", v0="export"), [], ("full", 0, FULL)),
]


@pytest.mark.parametrize(("retained", "held", "expected"), [pytest.param(*row[1:], id=row[0]) for row in GONE])
def test_a_plan_goes_round(retained: Retained, held: list[str], expected: tuple[str, int, int]) -> None:
    assert summary(straight(10, 10).plan(held, retained=retained)) == expected


def test_what_failed_is_not_planned_again() -> None:
    world = straight(10, 10)
    assert summary(world.plan(["v0"], avoid=frozenset({digest("v1>v2")}))) == ("full", 0, FULL)
    assert summary(world.plan(["v0"], whole=frozenset({digest("v2")}))) == ("full", 0, FULL)
    assert summary(world.plan([], avoid=frozenset({digest("v2")}))) == ("patches", 1, FULL + 10)


# -- manifests ---------------------------------------------------------------------------------------------------------


def test_no_manifest_is_asked_for_without_need() -> None:
    for held, asked in (([], []), (["v3"], []), (["v2"], []), (["v1"], [2])):
        world = straight(10, 10, 10)
        world.plan(held)
        assert world.asked == asked, held


def test_manifests_are_not_asked_for_behind_the_oldest_version_that_is_here() -> None:
    world = straight(*[1] * 9)
    world.plan(["something of version 6"], floor=6)
    assert world.asked == [8, 7]


def test_manifests_never_cost_more_than_the_files_that_they_may_save() -> None:
    world = straight(*[1] * 20)
    assert summary(world.plan(["v0"], manifest_bytes=100)) == ("full", 0, FULL)
    assert len(world.asked) == FULL // 100


def test_a_chain_has_an_end() -> None:
    enough, too_many = straight(*[1] * MAX_HOPS), straight(*[1] * (MAX_HOPS + 1))
    assert summary(enough.plan(["v0"])) == ("patches", MAX_HOPS, MAX_HOPS)
    assert summary(too_many.plan(["v0"])) == ("full", 0, FULL)


def test_a_manifest_that_cannot_be_had_ends_the_way() -> None:
    world = straight(10, 10, 10)
    del world.versions[2]
    assert summary(world.plan(["v1"])) == ("full", 0, FULL)


@given(
    patches=st.lists(st.none() | st.integers(1, 900), min_size=1, max_size=8),
    held=st.sets(st.integers(0, 8)),
    lost=st.sets(st.integers(0, 8)),
)
def test_no_chain_in_a_straight_history_is_cheaper_than_the_plan(
    patches: list[int | None], held: set[int], lost: set[int]
) -> None:
    versions = [version(0, "v0")]
    for number, size in enumerate(patches, start=1):
        versions.append(version(number, f"v{number}", size and (f"v{number - 1}", size)))
    world, top = World(versions), len(patches)
    avoid = {digest(f"v{number - 1}>v{number}") for number in lost}
    # By hand: what the file of each version costs, from the oldest on.
    cost: Mapping[int, int] = {}
    for number in range(top + 1):
        size = patches[number - 1] if number else None
        through = cost[number - 1] + size if size is not None and number not in lost else FULL
        cost = {**cost, number: 0 if number in held else min(FULL, through)}
    plan = world.plan([f"v{number}" for number in held], avoid=frozenset(avoid))
    assert plan.fetch_bytes == cost[top]


# -- rounds ------------------------------------------------------------------------------------------------------------


def rounds(*deltas: int, momentum: bool = False) -> World:
    later = [version(n, f"v{n}", deltas=[size], momentum=momentum) for n, size in enumerate(deltas, start=1)]
    return World([version(0, "v0"), *later])


def made(plan: Plan) -> tuple[set[str], int, list[int]]:
    return {route.kind for route in plan.routes}, plan.fetch_bytes, [one.version for one in plan.chain]


ROUNDS = [
    ("one round", rounds(10), ["master of v0"], ({"rounds"}, 10, [0, 1])),
    ("two rounds", rounds(10, 20), ["master of v0"], ({"rounds"}, 30, [0, 1, 2])),
    ("the later start", rounds(10, 20), ["master of v0", "master of v1"], ({"rounds"}, 20, [1, 2])),
    ("deltas dearer than the masters", rounds(600, 600), ["master of v0"], ({"full"}, FULL, [])),
    ("nothing here", rounds(10), [], ({"full"}, FULL, [])),
    ("everything here", rounds(10), ["master of v1"], ({"here"}, 0, [])),
    ("momenta made too", rounds(10, 10, momentum=True), ["master of v0"], ({"rounds"}, 20, [0, 1, 2])),
    ("a momentum that is not here", rounds(10, 10, momentum=True), ["master of v1"], ({"full"}, 2 * FULL, [])),
]  # fmt: skip


@pytest.mark.parametrize(("world", "held", "expected"), [pytest.param(*row[1:], id=row[0]) for row in ROUNDS])
def test_masters_are_had_with(world: World, held: list[str], expected: tuple[set[str], int, list[int]]) -> None:
    assert made(world.masters(held)) == expected


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (Rollback(to=0), "full"),
        (Revocation(contributions=(digest("delta 1 0"),)), "full"),
        (KeyRotation(), "rounds"),
    ],
)
def test_rounds_are_not_made_again_over(change: Rollback | Revocation | KeyRotation, kind: str) -> None:
    export = "v1" if isinstance(change, KeyRotation) else "v2"
    versions = [version(0, "v0"), version(1, "v1", deltas=[10]), version(2, export, change=change)]
    plan = World([*versions, version(3, "v3", deltas=[10])]).masters(["master of v0"])
    assert made(plan)[0] == {kind}


def test_contributions_that_are_gone_or_wrong_end_a_replay() -> None:
    world = rounds(10, 10)
    assert made(world.masters(["master of v0"], retained=gone(v1="contributions")))[0] == {"full"}
    assert made(world.masters(["master of v0"], avoid=frozenset({digest("delta 1 0")})))[0] == {"full"}
    assert made(world.masters(["master of v0"], whole=frozenset({digest("master of v2")})))[0] == {"full"}
    assert made(world.masters(["master of v1"], retained=gone(v1="contributions")))[0] == {"rounds"}
