"""Rollbacks, the publisher's own versions behind them, and rounds that meet them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from undo_world import (
    MODEL,
    NESTEROV,
    StumblingError,
    UndoWorld,
    bits,
    make_undo_world,
    oracle,
    steady,
    stumble_at,
)

from aggregator.cohort import DENOMINATOR_LOG2
from aggregator.fold import fold_digest
from aggregator.published import latest_version, leaves_in, load_version, outline, parent_of_round
from aggregator.revoke import revoke
from aggregator.undo import publish_change, roll_back
from rankup.errors import ConflictError, InputError, IntegrityError, NotFoundError
from rankup.lineage import CONTRIBUTIONS_NAME, leaves_of, log_of
from rankup.message import canonical_json
from rankup.protocol import Pointer
from rankup.records import EMPTY_TREE, Evaluation, FoldedGroup, Log, Manifest, Rollback
from rankup.replay import verify_version
from rankup.signing import generate_private_key, parse_private_key
from rankup.sources import StoreSource
from rankup.store import blob_key, get_blob, put_blob
from rankup.versions import fold_key, manifest_digest, manifest_key, parse_pointer, pointer_key, seal

NOW = 2e9


@pytest.fixture
def world(tmp_path: Path) -> UndoWorld:
    return make_undo_world(tmp_path)


def back(world: UndoWorld, to: int, reason: str = "") -> Manifest:
    return roll_back(world.store, world.key, model=MODEL, to=to, reason=reason, now=NOW)


def version(world: UndoWorld, number: int) -> Manifest:
    latest = latest_version(world.store, MODEL, publisher_key=world.public)
    chain = outline(world.store, latest.manifest, publisher_key=world.public)
    digest = latest.digest if number == latest.manifest.version else chain[number + 1].parent or ""
    return load_version(world.store, MODEL, number, digest, publisher_key=world.public)


def pointer(world: UndoWorld) -> Pointer:
    return parse_pointer(world.store.get(pointer_key(MODEL), max_bytes=4096), model=MODEL)


def all_is_well(world: UndoWorld) -> bool:
    return verify_version(StoreSource(world.store), MODEL, None, cache=world.folder / "all", level="all").ok


# -- rollback ----------------------------------------------------------------------------------------------------------


def test_a_rollback_is_a_new_version_with_the_tensors_files_and_log_of_the_old_one(world: UndoWorld) -> None:
    a, b = world.play(NESTEROV), world.play(NESTEROV)
    before = version(world, 2)
    world.play()
    made = back(world, 2, "the third round taught it nonsense")
    assert made.change == Rollback(to=2, reason="the third round taught it nonsense")
    assert (made.version, made.round_id, made.terms) == (4, None, ())
    assert made.parent == manifest_digest(version(world, 3))
    for field in ("tensors", "recipe", "log", "datasets", "licence", "base_model"):
        assert getattr(made, field) == getattr(before, field), field
    assert [g.model_copy(update={"patch": None}) for g in made.groups] == [
        g.model_copy(update={"patch": None}) for g in before.groups
    ]
    assert any(group.momentum is not None for group in made.groups)
    parent = version(world, 3)
    assert [g.patch and g.patch.base for g in made.groups] == [
        old.export.sha256 if old.export != new.export else None
        for old, new in zip(parent.groups, made.groups, strict=True)
    ]
    assert any(group.patch for group in made.groups)
    assert pointer(world).version == 4
    assert bits(made) == oracle([(a, ()), (b, ())])
    assert all_is_well(world)


def test_history_goes_on_from_where_it_was_rolled_back_to(world: UndoWorld) -> None:
    a, _ = world.play(NESTEROV), world.play(NESTEROV)
    back(world, 1)
    c = world.play(NESTEROV)
    assert world.latest().version == 4
    assert bits(world.latest()) == oracle([(a, ()), (c, ())])
    back(world, 0)
    assert (world.latest().recipe, world.latest().log) == (None, Log(size=0, root=EMPTY_TREE))
    d = world.play(NESTEROV)
    assert bits(world.latest()) == oracle([(d, ())])
    assert all_is_well(world)


def test_the_held_out_loss_of_the_old_version_is_that_of_the_new_one(world: UndoWorld) -> None:
    loss = Evaluation(heldout_loss=2.5, parent_heldout_loss=2.75, examples=4, tokens=40)
    world.publish(world.fold(world.open()).model_copy(update={"evaluation": loss}))
    world.play()
    assert back(world, 1).evaluation == loss.model_copy(update={"parent_heldout_loss": None})


def test_rolling_back_twice_is_rolling_back_once(world: UndoWorld) -> None:
    world.play()
    made = back(world, 0)
    assert back(world, 0) == made
    assert back(world, 1).version == 3


@pytest.mark.parametrize(("to", "why"), [(2, "latest is 2"), (9, "latest is 2"), (-1, "latest is 2")])
def test_only_an_older_version_can_be_rolled_back_to(world: UndoWorld, to: int, why: str) -> None:
    world.play()
    world.play()
    with pytest.raises(InputError, match=why):
        back(world, to)
    assert pointer(world).version == 2


def test_what_was_revoked_does_not_come_back(world: UndoWorld) -> None:
    a = world.play()
    world.play()
    revoke(world.store, world.key, model=MODEL, contributions=[a[0]], now=NOW)
    with pytest.raises(InputError, match="was revoked"):
        back(world, 1)
    assert back(world, 0).version == 4
    with pytest.raises(InputError, match="was revoked"):
        back(world, 2)


def test_a_version_that_nothing_leads_to_any_more_cannot_be_rolled_back_to(world: UndoWorld) -> None:
    for _ in range(3):
        world.play()
    gone = version(world, 1).groups[1].master.sha256
    world.store.delete(blob_key(gone))
    world.store.delete(blob_key(world.rounds[0][1]))
    with pytest.raises(NotFoundError, match="version 1 of toy cannot be made any more"):
        back(world, 1)
    assert pointer(world).version == 3
    assert back(world, 2).version == 4


def test_files_that_cannot_be_made_again_to_the_bit_are_not_published(world: UndoWorld) -> None:
    """What a broken machine remembers of a fold is found when its files are not those of the version."""
    world.play(NESTEROV)
    world.play(NESTEROV)
    for name in ("master", "momentum"):
        world.store.delete(blob_key(getattr(version(world, 1).groups[1], name).sha256))
    wrong = FoldedGroup(
        group=version(world, 2).groups[1],
        tensors={name: version(world, 2).tensors[name] for name in version(world, 2).groups[1].tensors},
    )
    first = version(world, 0)
    state = FoldedGroup(group=first.groups[1], tensors={name: first.tensors[name] for name in first.groups[1].tensors})
    terms = [term for term in world.rounds[0].terms if term.coefficient]
    digest = fold_digest(hashlib.sha256(canonical_json(state)).hexdigest(), terms, DENOMINATOR_LOG2, NESTEROV)
    world.store.put(fold_key(world.rounds[0].record.round_id, digest, 2), canonical_json(wrong))
    with pytest.raises(IntegrityError, match="made again, has other files"):
        back(world, 1)
    assert pointer(world).version == 2


def test_a_model_that_is_not_there_has_nothing_to_roll_back(world: UndoWorld) -> None:
    with pytest.raises(NotFoundError, match="no model absent"):
        roll_back(world.store, world.key, model="absent", to=0, now=NOW)


def test_another_key_than_the_publishers_publishes_nothing(world: UndoWorld) -> None:
    world.play()
    with pytest.raises(IntegrityError):
        roll_back(world.store, parse_private_key(generate_private_key()), model=MODEL, to=0, now=NOW)
    assert pointer(world).version == 1


# -- interrupted and overtaken -----------------------------------------------------------------------------------------


def test_a_rollback_that_was_killed_at_any_write_is_finished_by_the_same_command(tmp_path: Path) -> None:
    for write in range(0, 30, 4):
        world = make_undo_world(tmp_path / str(write))
        a = world.play(NESTEROV)
        world.play()
        stumble_at(world.store, write)
        killed = False
        try:
            back(world, 1)
        except StumblingError:
            killed = True
        steady(world.store)
        made = back(world, 1)
        assert (made.version, pointer(world).version, bits(made)) == (3, 3, oracle([(a, ())]))
        if not killed:
            break
    assert write > 6


def test_a_publication_that_stopped_before_the_pointer_is_finished_by_whoever_comes_next(world: UndoWorld) -> None:
    a = world.play()
    b = world.open()
    draft = world.fold(b)
    real, world.store.swap = world.store.swap, refuse  # type: ignore[method-assign]
    with pytest.raises(StumblingError):
        world.publish(draft)
    world.store.swap = real  # type: ignore[method-assign]
    assert pointer(world).version == 1
    made = back(world, 1)
    assert made.version == 3
    assert version(world, 2).round_id == b.record.round_id
    assert bits(made) == oracle([(a, ())])
    assert world.publish(draft) == 2


def refuse(*_: object, **__: object) -> str:
    raise StumblingError


def test_a_publisher_whose_pointer_somebody_else_moved_has_published(world: UndoWorld) -> None:
    draft = world.fold(world.open())
    real = world.store.swap

    def after_another(key: str, data: bytes, *, etag: str | None) -> str:
        world.store.swap = real  # type: ignore[method-assign]
        assert world.latest().version == 1
        return real(key, data, etag=etag)

    world.store.swap = after_another  # type: ignore[method-assign]
    assert world.publish(draft) == 1


def test_a_stray_manifest_of_another_history_is_not_the_next_version(world: UndoWorld) -> None:
    world.play()
    stray = version(world, 1).model_copy(update={"version": 2, "parent": "0" * 64})
    world.store.put(manifest_key(MODEL, 2), seal(stray, world.key))
    assert world.latest().version == 1
    with pytest.raises(ConflictError, match="8 tries"):
        back(world, 0)


def test_a_version_that_is_overtaken_each_time_gives_up(world: UndoWorld) -> None:
    world.play()
    base = world.latest()
    tries = []

    def draft(latest: object) -> Manifest:
        tries.append(latest)
        return base.model_copy(update={"version": 5, "round_id": None, "terms": (), "change": Rollback(to=0)})

    with pytest.raises(ConflictError, match="8 tries"):
        publish_change(world.store, world.key, MODEL, draft)
    assert len(tries) == 8


# -- rounds that meet them ---------------------------------------------------------------------------------------------


UNDONE: dict[str, Callable[[UndoWorld], object]] = {
    "a rollback": lambda world: back(world, 0),
    "a rollback and another": lambda world: (back(world, 0), back(world, 1)),
    "a revocation": lambda world: revoke(
        world.store, world.key, model=MODEL, contributions=[world.rounds[0][0]], now=NOW
    ),
}


@pytest.mark.parametrize("undo", UNDONE.values(), ids=UNDONE)
def test_a_round_that_was_open_meanwhile_is_added_to_the_latest_version(
    world: UndoWorld, undo: Callable[[UndoWorld], object]
) -> None:
    a, b = world.play(NESTEROV), world.open(NESTEROV)
    undo(world)
    parent = world.latest()
    made = world.fold(b)
    assert (made.version, made.parent) == (parent.version + 1, manifest_digest(parent))
    assert {term.base_manifest for term in made.terms} == {b.record.base_manifest}
    world.publish(made)
    assert world.fold(b) == made
    before = {"a rollback": [], "a rollback and another": [(a, ())], "a revocation": [(a, {a[0]})]}
    assert bits(made) == oracle([*before[next(name for name, one in UNDONE.items() if one is undo)], (b, ())])
    assert all_is_well(world)


def test_a_round_is_not_added_to_what_another_round_made_meanwhile(world: UndoWorld) -> None:
    slow = world.open()
    world.play()
    back(world, 0)
    with pytest.raises(InputError, match="made by round-2 while this round was open") as caught:
        world.fold(slow)
    assert "Cancel" in caught.value.remedy


def test_a_round_whose_base_is_no_version_of_the_chain_has_no_parent(world: UndoWorld) -> None:
    world.play()
    record = world.open().record
    for about in ({"base_manifest": "0" * 64}, {"base_version": 7}):
        with pytest.raises(IntegrityError, match="not the base"):
            parent_of_round(world.store, record.model_copy(update=about), publisher_key=world.public)


# -- the log -----------------------------------------------------------------------------------------------------------


def test_every_version_but_the_first_lists_its_contributions(world: UndoWorld) -> None:
    a, b = world.play(), world.play()
    latest = world.latest()
    chain = outline(world.store, latest, publisher_key=world.public)
    leaves = leaves_in(world.store, latest, publisher_key=world.public)
    assert tuple(leaves) == leaves_of(chain, 2)
    assert [leaf.contribution for leaf in leaves] == [*sorted((a[0], a[1], a[2])), *sorted((b[0], b[1], b[2]))]
    assert all(one.software.startswith("rankup ") for one in chain[1:])
    paths = [{file.path for file in version(world, number).files} for number in range(3)]
    assert [CONTRIBUTIONS_NAME in names for names in paths] == [False, True, True]


def test_the_log_of_a_history_from_before_there_were_logs_follows_from_its_chain(world: UndoWorld) -> None:
    a = world.play()
    old = world.latest()
    files = tuple(file for file in old.files if file.path != CONTRIBUTIONS_NAME)
    bare = old.model_copy(update={"log": Log(size=0, root=EMPTY_TREE), "files": files})
    world.store.put(manifest_key(MODEL, 1), seal(bare, world.key))
    moved = Pointer(model=MODEL, version=1, manifest=manifest_digest(bare), updated_at=1.0)
    world.store.put(pointer_key(MODEL), canonical_json(moved))
    b = world.play()
    latest = world.latest()
    assert latest.log.size == 6
    made = revoke(world.store, world.key, model=MODEL, contributions=[a[1]], now=NOW)
    assert made.log.size == 5
    assert bits(made) == oracle([(a, {a[1]}), (b, ())])


@pytest.mark.parametrize("fault", ["another list", "not a list", "another model's"])
def test_a_list_that_is_not_the_log_is_refused(world: UndoWorld, fault: str) -> None:
    world.play()
    latest = world.latest()
    [file] = [file for file in latest.files if file.path == CONTRIBUTIONS_NAME]
    data = get_blob(world.store, file.sha256, max_bytes=10**6)
    changed = {
        "another list": data.replace(b'"version":1', b'"version":2'),
        "not a list": data[:-1],
        "another model's": data.replace(b'"toy"', b'"boy"'),
    }[fault]
    assert changed != data
    ref = put_blob(world.store, changed)
    entry = file.model_copy(update={"sha256": ref.sha256, "size_bytes": ref.size_bytes})
    forged = latest.model_copy(update={"files": (entry,)})
    with pytest.raises(IntegrityError, match=CONTRIBUTIONS_NAME):
        leaves_in(world.store, forged, publisher_key=world.public)
    assert log_of(leaves_in(world.store, latest, publisher_key=world.public)) == latest.log
