"""Revocation: to the bit the history in which a contribution had never been in the sum, whatever happens meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
from undo_world import (
    MODEL,
    NESTEROV,
    Played,
    StumblingError,
    UndoWorld,
    bits,
    make_undo_world,
    oracle,
    steady,
    stumble_at,
)

from aggregator.rehearsal import rehearsal
from aggregator.revoke import Chosen, choose, contributions_of, find, revoke
from aggregator.undo import roll_back
from rankup.errors import ConflictError, InputError, IntegrityError, NotFoundError
from rankup.lineage import CONTRIBUTIONS_NAME, log_of
from rankup.message import canonical_json
from rankup.patch import apply_patches
from rankup.recipe import PLAIN_SUM, OuterStep
from rankup.records import BlobRef, ContributionList, FoldedGroup, Group, Manifest, Revocation, Term
from rankup.replay import verify_version
from rankup.sources import StoreSource
from rankup.store import blob_key, get_blob
from rankup.versions import MAX_ENVELOPE_BYTES, manifest_digest, manifest_key, open_envelope

NOW = 2e9
Sums = list[tuple[Played, Collection[str]]]


@pytest.fixture
def world(tmp_path: Path) -> UndoWorld:
    return make_undo_world(tmp_path)


def take_out(world: UndoWorld, *contributions: str, **options: Any) -> Manifest:
    """Revoked, and found by the readers' replay to be what it says before it was published."""
    check = rehearsal(world.store, world.key, world.folder / "cache")
    options = {"check": check, "now": NOW} | options
    return revoke(world.store, world.key, model=MODEL, contributions=contributions, **options)


# -- to the bit --------------------------------------------------------------------------------------------------------


def rounds(world: UndoWorld, step: Callable[[int], OuterStep], count: int = 3) -> list[Played]:
    return [world.play(step(len(world.rounds) + 1)) for _ in range(count)]


def of_the_first_round(world: UndoWorld, step: Callable[[int], OuterStep]) -> Sums:
    a, b, c = rounds(world, step)
    take_out(world, a[1])
    return [(a, {a[1]}), (b, ()), (c, ())]


def of_the_middle_round(world: UndoWorld, step: Callable[[int], OuterStep]) -> Sums:
    a, b, c = rounds(world, step)
    take_out(world, b[0])
    return [(a, ()), (b, {b[0]}), (c, ())]


def of_the_last_round(world: UndoWorld, step: Callable[[int], OuterStep]) -> Sums:
    a, b, c = rounds(world, step)
    take_out(world, c[2])
    return [(a, ()), (b, ()), (c, {c[2]})]


def of_several_rounds(world: UndoWorld, step: Callable[[int], OuterStep]) -> Sums:
    a, b, c = rounds(world, step)
    take_out(world, c[0], a[0], a[2])
    return [(a, {a[0], a[2]}), (b, ()), (c, {c[0]})]


def a_whole_round(world: UndoWorld, step: Callable[[int], OuterStep]) -> Sums:
    a, b, c = rounds(world, step)
    gone = {b[0], b[1], b[2]}
    take_out(world, *gone)
    return [(a, ()), (b, gone), (c, ())]


def everything(world: UndoWorld, step: Callable[[int], OuterStep]) -> Sums:
    a, b = rounds(world, step, 2)
    gone = {one[n] for one in (a, b) for n in range(3)}
    take_out(world, *gone)
    return [(a, gone), (b, gone)]


def twice(world: UndoWorld, step: Callable[[int], OuterStep]) -> Sums:
    a, b, c = rounds(world, step)
    take_out(world, b[0])
    take_out(world, a[2])
    return [(a, {a[2]}), (b, {b[0]}), (c, ())]


def twice_with_a_round_between(world: UndoWorld, step: Callable[[int], OuterStep]) -> Sums:
    a, b = rounds(world, step, 2)
    take_out(world, a[0])
    c, d = rounds(world, step, 2)
    take_out(world, c[1])
    return [(a, {a[0]}), (b, ()), (c, {c[1]}), (d, ())]


def after_a_rollback(world: UndoWorld, step: Callable[[int], OuterStep]) -> Sums:
    a, b = rounds(world, step, 2)
    roll_back(world.store, world.key, model=MODEL, to=1, now=NOW)
    c = rounds(world, step, 1)[0]
    take_out(world, a[1])
    assert b[0] not in {
        one.term.contribution for one in contributions_of(world.store, MODEL, publisher_key=world.public)
    }
    return [(a, {a[1]}), (c, ())]


def before_a_rollback(world: UndoWorld, step: Callable[[int], OuterStep]) -> Sums:
    a, b = rounds(world, step, 2)
    revoked = take_out(world, b[1]).version
    rounds(world, step, 1)
    roll_back(world.store, world.key, model=MODEL, to=revoked, now=NOW)
    return [(a, ()), (b, {b[1]})]


def and_then_a_round(world: UndoWorld, step: Callable[[int], OuterStep]) -> Sums:
    a, b = rounds(world, step, 2)
    take_out(world, a[0])
    c = rounds(world, step, 1)[0]
    return [(a, {a[0]}), (b, ()), (c, ())]


STEPS: dict[str, Callable[[int], OuterStep]] = {
    "Nesterov": lambda _: NESTEROV,
    "plain sum": lambda _: PLAIN_SUM,
    "another in the second round": lambda number: PLAIN_SUM if number == 2 else NESTEROV,
}
HISTORIES = (
    of_the_first_round,
    of_the_middle_round,
    of_the_last_round,
    of_several_rounds,
    a_whole_round,
    everything,
    twice,
    twice_with_a_round_between,
    after_a_rollback,
    before_a_rollback,
    and_then_a_round,
)


CASES = {
    f"{history.__name__}, {name}": (history, step)
    for number, history in enumerate(HISTORIES)
    for place, (name, step) in enumerate(STEPS.items())
    if place == 0 or number % 4 == place
}


@pytest.mark.parametrize(("history", "step"), CASES.values(), ids=CASES)
def test_a_version_has_the_bits_of_a_history_in_which_the_revoked_had_never_been(
    world: UndoWorld,
    history: Callable[[UndoWorld, Callable[[int], OuterStep]], Sums],
    step: Callable[[int], OuterStep],
) -> None:
    sums = history(world, step)
    latest = world.latest()
    assert bits(latest) == oracle(sums)
    assert bits(latest) != oracle([(played, ()) for played, _ in sums])
    leaves = [
        (term.contribution, term.coefficient)
        for played, without in sums
        for term in sorted(played.terms, key=lambda term: term.contribution)
        if term.coefficient and term.contribution not in without
    ]
    assert [(leaf.contribution, leaf.coefficient) for leaf in listed(world, latest).leaves] == leaves
    report = verify_version(StoreSource(world.store), MODEL, None, cache=world.folder / "all", level="all")
    assert report.ok, report.mismatches
    assert report.version == latest.version


def listed(world: UndoWorld, manifest: Manifest) -> ContributionList:
    [file] = [file for file in manifest.files if file.path == CONTRIBUTIONS_NAME]
    found = ContributionList.model_validate_json(get_blob(world.store, file.sha256, max_bytes=10**6))
    assert log_of(found.leaves) == manifest.log
    return found


def test_a_revocation_says_what_and_why_and_who_made_it(world: UndoWorld) -> None:
    a, b = world.play(NESTEROV), world.play(PLAIN_SUM)
    before = world.latest()
    made = take_out(world, b[1], a[0], reason="copied from a test set")
    assert made == world.latest()
    assert made.change == Revocation(contributions=tuple(sorted((a[0], b[1]))), reason="copied from a test set")
    assert (made.version, made.parent, made.round_id, made.terms) == (3, manifest_digest(before), None, ())
    assert (made.recipe, made.evaluation, made.created_at) == (b.record.request.recipe, None, NOW)
    assert made.software.startswith("rankup ")
    assert made.datasets == before.datasets == ("docs",)


def test_patches_lead_from_the_parent_to_the_version(world: UndoWorld, tmp_path: Path) -> None:
    a, _ = world.play(), world.play()
    before, made = world.latest(), take_out(world, a[0])
    patched = 0
    for old, new in zip(before.groups, made.groups, strict=True):
        if old.export.sha256 == new.export.sha256:
            assert new.patch is None
            continue
        assert new.patch is not None
        assert new.patch.base == old.export.sha256
        for name, ref in (("base", old.export), ("patch", new.patch)):
            (tmp_path / name).write_bytes(get_blob(world.store, ref.sha256, max_bytes=10**6))
        expected = BlobRef(sha256=new.export.sha256, size_bytes=new.export.size_bytes)
        apply_patches(
            tmp_path / "base", [tmp_path / "patch"], tmp_path / "out", base_sha256=new.patch.base, expected=expected
        )
        (tmp_path / "out").unlink()
        patched += 1
    assert patched == 2


# -- interrupted and overtaken -----------------------------------------------------------------------------------------


def test_a_revocation_that_was_killed_at_any_write_is_finished_by_the_same_command(tmp_path: Path) -> None:
    write, killed = 0, True
    while killed:
        world = make_undo_world(tmp_path / str(write))
        a, b = world.play(NESTEROV), world.play(NESTEROV)
        stumble_at(world.store, write)
        options: dict[str, Any] = {"model": MODEL, "contributions": [a[0]], "parallel": 1, "now": NOW}
        try:
            revoke(world.store, world.key, **options)
            killed = False
        except StumblingError:
            pass
        steady(world.store)
        folds = set(folded(world))
        made = revoke(world.store, world.key, **options)
        assert (made.version, world.latest()) == (3, made)
        assert bits(made) == oracle([(a, {a[0]}), (b, ())])
        assert folds <= set(folded(world))
        write += 13
    assert write > 20


def folded(world: UndoWorld) -> list[str]:
    return [key for key in world.store.list("rounds/") if "/fold/" in key]


def test_groups_that_are_finished_are_not_summed_again(world: UndoWorld) -> None:
    a, _ = world.play(NESTEROV), world.play(NESTEROV)
    done: list[tuple[int, int]] = []

    def refuse(_: Manifest) -> None:
        raise IntegrityError("not yet")

    with pytest.raises(IntegrityError, match="not yet"):
        take_out(world, a[0], check=refuse)
    assert world.latest().version == 2
    world.store.put_file = refuse_files  # type: ignore[method-assign]
    made = take_out(world, a[0], progress=lambda now, total: done.append((now, total)))
    assert made.version == 3
    masters = sum(group.master.size_bytes for group in made.groups)
    assert done[-1][0] == done[-1][1] == 2 * masters


def refuse_files(key: str, path: Path, **_: object) -> None:
    raise AssertionError(f"{path.name} was made again")


def test_a_round_that_publishes_meanwhile_stays_and_the_revocation_follows_it(world: UndoWorld) -> None:
    a, b = world.play(NESTEROV), world.play(NESTEROV)
    c = world.open(NESTEROV)
    draft = world.fold(c)
    fine = rehearsal(world.store, world.key, world.folder / "cache")

    def in_between(manifest: Manifest) -> None:
        fine(manifest)
        if manifest.version == 3:
            world.publish(draft)

    made = take_out(world, a[0], check=in_between)
    assert made.version == 4
    assert bits(made) == oracle([(a, {a[0]}), (b, ()), (c, ())])


def test_a_round_that_was_folded_before_a_revocation_is_folded_again_after_it(world: UndoWorld) -> None:
    a, c = world.play(NESTEROV), world.open(NESTEROV)
    draft = world.fold(c)
    assert all(term.base_manifest is None for term in draft.terms)
    take_out(world, a[0])
    with pytest.raises(ConflictError):
        world.publish(draft)
    again = world.fold(c)
    assert again.version == 3
    assert {term.base_manifest for term in again.terms} == {c.record.base_manifest}
    world.publish(again)
    assert bits(world.latest()) == oracle([(a, {a[0]}), (c, ())])
    report = verify_version(StoreSource(world.store), MODEL, None, cache=world.folder / "all", level="all")
    assert report.ok, report.mismatches


def test_a_version_whose_replay_has_other_bits_is_not_published(world: UndoWorld) -> None:
    a = world.play()
    before = world.latest()

    def refuse(_: Manifest) -> None:
        raise IntegrityError("not yet")

    with pytest.raises(IntegrityError, match="not yet"):
        take_out(world, a[0], check=refuse)
    group = before.groups[1]
    wrong = FoldedGroup(group=group, tensors={name: before.tensors[name] for name in group.tensors})
    [record] = [key for key in folded(world) if key.endswith("00002.json")]
    world.store.put(record, canonical_json(wrong))
    with pytest.raises(IntegrityError, match="the replay of version 2 differs"):
        take_out(world, a[0])
    assert world.latest() == before


# -- what cannot be revoked --------------------------------------------------------------------------------------------


def test_what_is_not_in_the_sum_is_refused_and_nothing_is_published(world: UndoWorld) -> None:
    a = world.play()
    open_ = world.open()
    weightless = a[3]
    for one in (weightless, open_[0], "ab" * 32):
        with pytest.raises(InputError, match="not in the sum"):
            take_out(world, one)
    take_out(world, a[0])
    b = world.play()
    with pytest.raises(InputError, match="not in the sum"):
        take_out(world, a[0])
    assert world.latest().version == 3
    assert bits(world.latest()) == oracle([(a, {a[0]}), (b, ())])


@pytest.mark.parametrize("missing", ["a later round's delta", "version 0's masters"])
def test_what_is_no_longer_kept_cannot_be_summed_again(world: UndoWorld, missing: str) -> None:
    a, b = world.play(), world.play()
    gone = b[0] if missing == "a later round's delta" else version(world, 0).groups[1].master.sha256
    world.store.delete(blob_key(gone))
    with pytest.raises(NotFoundError, match="no longer kept") as caught:
        take_out(world, a[0])
    assert "Roll back" in caught.value.remedy
    assert world.latest().version == 2


@pytest.mark.parametrize("step", [NESTEROV, PLAIN_SUM], ids=["Nesterov", "plain sum"])
def test_what_a_sweep_dropped_is_made_again_from_version_0(world: UndoWorld, step: OuterStep) -> None:
    a, b, c, _ = (world.play(step) for _ in range(4))
    sweep(world)
    made = take_out(world, c[1])
    assert bits(made) == oracle([(a, ()), (b, ()), (c, {c[1]}), (world.rounds[3], ())])
    with pytest.raises(InputError, match="was revoked"):
        roll_back(world.store, world.key, model=MODEL, to=3, now=NOW)
    sweep(world)
    back = roll_back(world.store, world.key, model=MODEL, to=2, now=NOW)
    assert bits(back) == oracle([(a, ()), (b, ())])
    assert verify_version(StoreSource(world.store), MODEL, None, cache=world.folder / "all", level="all").ok
    assert all(world.store.head(blob_key(group.export.sha256)) for group in back.groups)


def sweep(world: UndoWorld) -> None:
    """Drop all files of tensors but the latest version's, and the masters of version 0."""
    latest = world.latest()
    kept = {ref.sha256 for group in latest.groups for ref in files_of(group)}
    kept |= {group.master.sha256 for group in version(world, 0).groups}
    for number in range(latest.version):
        for group in version(world, number).groups:
            for ref in files_of(group):
                if ref.sha256 not in kept:
                    world.store.delete(blob_key(ref.sha256))
    for key in folded(world):
        world.store.delete(key)


def files_of(group: Group) -> list[BlobRef]:
    return [file for file in (group.master, group.export, group.momentum) if file is not None]


def version(world: UndoWorld, number: int) -> Manifest:
    data = world.store.get(manifest_key(MODEL, number), max_bytes=MAX_ENVELOPE_BYTES)
    return open_envelope(data, publisher_key=world.public)[0]


def test_a_group_without_a_change_gets_its_dropped_export_back(world: UndoWorld) -> None:
    a = world.play()
    first = version(world, 0)
    for group in first.groups:
        world.store.delete(blob_key(group.export.sha256))
    embed = next(group for group in first.groups if group.tensors == ("embed.weight",))
    made = take_out(world, *(a[n] for n in range(3)))
    assert [group.export for group in made.groups] == [group.export for group in first.groups]
    for group in made.groups:
        get_blob(world.store, group.export.sha256, max_bytes=10**6)
    assert embed.master in [group.master for group in made.groups]


# -- who and what ------------------------------------------------------------------------------------------------------


def chosen(contribution: str, worker: str, name: str, version: int = 1) -> Chosen:
    term = Term(
        contribution=contribution,
        size_bytes=1,
        worker_id=worker,
        worker_name=name,
        shard=0,
        tokens=1,
        coefficient=1,
    )
    return Chosen(version, term)


PRESENT = [
    chosen("aaaaaaaaaaaa" + "1" * 52, "w-1", "Ada"),
    chosen("aaaaaaaaaaaa" + "2" * 52, "w-2", "Ben"),
    chosen("b" * 64, "w-1", "Ada", 2),
    chosen("c" * 64, "w-3", "Ada of Linz", 2),
    chosen("d" * 64, "w-4", "Ben", 3),
    chosen("e" * 64, "w-5", "w-1", 3),
]
CHOICES = {
    "a whole digest": (["b" * 64], "b"),
    "the beginning of one": (["c" * 12], "c"),
    "a worker with all contributions": (["w-1"], "ab"),
    "a name, exactly": (["Ada"], "ab"),
    "a longer name": (["Ada of Linz"], "c"),
    "several, in the order of the log": (["e" * 64, "w-1"], "abe"),
    "the same twice": (["b" * 64, "w-1"], "ab"),
}
REFUSED = {
    "a beginning of two": ("aaaaaaaaaaaa", "2 contributions begin"),
    "a beginning that is too short": ("bbbb", "nothing in the sum"),
    "a name of two": ("Ben", "w-2, w-4"),
    "another case": ("ada", "nothing in the sum"),
    "nobody": ("Eve", "nothing in the sum"),
}


@pytest.mark.parametrize(("names", "found"), CHOICES.values(), ids=CHOICES)
def test_contributions_are_named_by_digest_worker_or_exact_name(names: list[str], found: str) -> None:
    assert "".join(one.term.contribution[0] for one in choose(PRESENT, names)) == found


@pytest.mark.parametrize(("name", "why"), REFUSED.values(), ids=REFUSED)
def test_a_name_that_is_not_clear_is_refused(name: str, why: str) -> None:
    with pytest.raises(InputError, match=why) as caught:
        choose(PRESENT, ["w-1", name])
    assert caught.value.remedy


def test_a_contributor_is_found_in_the_latest_sum_and_again_right_after_the_revocation(world: UndoWorld) -> None:
    a, b = world.play(), world.play()
    by_two = sorted(t.contribution for one in (a, b) for t in one.terms if t.worker_name == "worker 2")
    found = find(world.store, MODEL, ["worker 2"], publisher_key=world.public)
    assert sorted(one.term.contribution for one in found) == by_two
    made = take_out(world, *by_two)
    assert find(world.store, MODEL, ["worker 2"], publisher_key=world.public) == found
    assert take_out(world, *by_two) == made
    world.play(count=1)
    with pytest.raises(InputError, match="nothing in the sum"):
        find(world.store, MODEL, ["worker 2"], publisher_key=world.public)
    assert len(contributions_of(world.store, MODEL, 1, publisher_key=world.public)) == 3
    with pytest.raises(NotFoundError, match="no version 9"):
        contributions_of(world.store, MODEL, 9, publisher_key=world.public)
