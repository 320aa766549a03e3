"""A new key for the publisher: readers, rounds and old versions before, during and after."""

from __future__ import annotations

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

from aggregator.published import latest_version, outline
from aggregator.rotate import models_of, prepare_key, rotate_key, rotate_model
from aggregator.undo import roll_back
from rankup.errors import BusyError, ConflictError, InputError, IntegrityError, SetupError, StateError
from rankup.records import KeyRotation, Manifest
from rankup.replay import verify_version
from rankup.signing import generate_private_key, load_private_key, parse_private_key, public_key_hex
from rankup.sources import StoreSource
from rankup.versions import MAX_ENVELOPE_BYTES, manifest_digest, manifest_key, open_envelope

NOW = 2e9


@pytest.fixture
def world(tmp_path: Path) -> UndoWorld:
    return make_undo_world(tmp_path)


def rotate(world: UndoWorld, given: bytes | None = None) -> str:
    public, _ = rotate_key(world.store, world.key_file, given=given, reason="yearly", now=NOW)
    return public


def signer(world: UndoWorld, version: int, *, pinned: str | None = None) -> str:
    data = world.store.get(manifest_key(MODEL, version), max_bytes=MAX_ENVELOPE_BYTES)
    return open_envelope(data, publisher_key=pinned)[2]


def all_is_well(world: UndoWorld, pinned: str) -> bool:
    source, cache = StoreSource(world.store), world.folder / "all"
    return verify_version(source, MODEL, None, cache=cache, level="all", publisher_key=pinned).ok


def test_a_rotation_is_a_version_that_the_new_key_signs_and_the_old_one_vouches_for(world: UndoWorld) -> None:
    world.play(NESTEROV)
    before, old = world.latest(), world.public
    new = rotate(world)
    made = world.latest()
    assert made.change == KeyRotation(reason="yearly")
    assert (made.version, made.parent, made.tensors, made.log) == (
        2,
        manifest_digest(before),
        before.tensors,
        before.log,
    )
    assert all(group.patch is None for group in made.groups)
    [change] = made.keys
    assert (change.statement.old, change.statement.new, change.statement.from_version) == (old, new, 2)
    assert new == world.public != old
    assert signer(world, 2, pinned=old) == signer(world, 2, pinned=new) == new
    assert all_is_well(world, old)
    assert all_is_well(world, new)


def test_the_key_file_is_replaced_and_the_old_key_kept(world: UndoWorld) -> None:
    old = world.public
    given = generate_private_key()
    new = rotate(world, given)
    folder = world.key_file.parent
    assert world.key_file.read_bytes() == given
    assert {path.name for path in folder.iterdir()} == {"publisher.key", f"publisher.key.old-{old[:16]}"}
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder.iterdir())
    assert public_key_hex(load_private_key(folder / f"publisher.key.old-{old[:16]}")) == old
    assert public_key_hex(parse_private_key(given)) == new


def test_rounds_rollbacks_and_further_rotations_follow_under_the_new_key(world: UndoWorld) -> None:
    first = world.public
    a = world.play(NESTEROV)
    second = rotate(world)
    b = world.play(NESTEROV)
    third = rotate(world)
    c = world.play(NESTEROV)
    assert bits(world.latest()) == oracle([(a, ()), (b, ()), (c, ())])
    made = roll_back(world.store, world.key, model=MODEL, to=1, now=NOW)
    assert bits(made) == oracle([(a, ())])
    assert [change.statement.new for change in made.keys] == [second, third]
    assert [signer(world, number) for number in range(7)] == [first, first, second, second, third, third, third]
    chain = outline(world.store, world.latest(), publisher_key=third)
    assert [len(manifest.keys) for manifest in chain] == [0, 0, 1, 1, 2, 2, 2]
    for pinned in (first, second, third):
        assert all_is_well(world, pinned)


def test_a_round_that_was_open_during_a_rotation_is_added_after_it(world: UndoWorld) -> None:
    a, b = world.play(), world.open()
    draft = world.fold(b)
    rotate(world)
    with pytest.raises(ConflictError):
        world.publish(draft)
    world.publish(world.fold(b))
    assert world.latest().version == 3
    assert bits(world.latest()) == oracle([(a, ()), (b, ())])
    assert all_is_well(world, world.public)


def test_a_round_that_published_before_a_rotation_finds_its_version_afterwards(world: UndoWorld) -> None:
    draft = world.fold(world.open())
    assert world.publish(draft) == 1
    rotate(world)
    assert world.publish(draft) == 1


def test_the_old_key_publishes_nothing_that_readers_would_refuse(world: UndoWorld) -> None:
    world.play()
    new = prepare_key(world.key_file)
    rotate_model(world.store, world.key, new, model=MODEL, now=NOW)
    a = world.open()
    with pytest.raises(BusyError, match="not the one that signs") as caught:
        world.publish(world.fold(a))
    assert "rotate-key" in caught.value.remedy
    with pytest.raises(BusyError, match="not the one that signs"):
        roll_back(world.store, world.key, model=MODEL, to=0, now=NOW)
    rotate(world)
    assert world.publish(world.fold(a)) == 3


def test_every_model_of_the_store_gets_the_new_key(world: UndoWorld) -> None:
    from aggregator.publish import publish_manifest

    first = latest_version(world.store, MODEL, publisher_key=world.public).manifest
    publish_manifest(world.store, world.key, first.model_copy(update={"model": "another"}))
    assert models_of(world.store) == ["another", MODEL]
    late: list[Manifest] = []

    def import_one(made: Manifest) -> None:
        if not late:
            late.append(made)
            publish_manifest(world.store, world.key, first.model_copy(update={"model": "imported-meanwhile"}))

    new, made = rotate_key(world.store, world.key_file, now=NOW, done=import_one)
    assert [(one.model, one.version) for one in made] == [("another", 1), ("imported-meanwhile", 1), (MODEL, 1)]
    for model in models_of(world.store):
        latest = latest_version(world.store, model, publisher_key=new).manifest
        assert latest.keys[-1].statement.model == model


# -- interrupted -------------------------------------------------------------------------------------------------------


def test_a_rotation_that_was_killed_at_any_write_goes_on_with_the_same_new_key(tmp_path: Path) -> None:
    for write in range(0, 30, 2):
        world = make_undo_world(tmp_path / str(write))
        old = world.public
        stumble_at(world.store, write)
        killed = False
        try:
            rotate(world)
        except StumblingError:
            killed = True
        steady(world.store)
        following = world.key_file.with_name("publisher.key.next")
        if not killed:
            break
        assert world.public == old
        chosen = public_key_hex(load_private_key(following))
        assert rotate(world) == chosen == world.public
        assert not following.exists()
        assert (world.latest().version, len(world.latest().keys)) == (1, 1)
    assert write > 4


def test_a_rotation_that_was_killed_before_the_key_file_was_replaced_makes_no_second_version(
    world: UndoWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("aggregator.rotate.write_file", full)
        with pytest.raises(SetupError, match="No space left"):
            rotate(world)
    assert world.latest().version == 1
    assert rotate(world) == world.public
    assert world.latest().version == 1


# -- refused -----------------------------------------------------------------------------------------------------------


def test_the_old_key_is_no_new_key(world: UndoWorld) -> None:
    with pytest.raises(InputError, match="is the old one"):
        rotate(world, world.key_file.read_bytes())


def test_what_is_no_key_changes_nothing(world: UndoWorld) -> None:
    with pytest.raises(InputError, match="not a readable private key"):
        rotate(world, b"-----BEGIN NONSENSE-----")
    assert [path.name for path in world.key_file.parent.iterdir()] == ["publisher.key"]


def test_a_key_of_an_earlier_time_does_not_come_back(world: UndoWorld) -> None:
    first = world.key_file.read_bytes()
    rotate(world)
    with pytest.raises(InputError, match="signed by this key before"):
        rotate(world, first)
    assert world.latest().version == 1


def test_a_rotation_that_stopped_half_way_is_not_mixed_with_another(world: UndoWorld) -> None:
    waiting = public_key_hex(prepare_key(world.key_file))
    with pytest.raises(StateError, match="stopped half-way"):
        rotate(world, generate_private_key())
    assert rotate(world) == waiting


def test_whoever_knows_neither_key_is_not_convinced(world: UndoWorld) -> None:
    rotate(world)
    stranger = public_key_hex(parse_private_key(generate_private_key()))
    with pytest.raises(IntegrityError):
        signer(world, 1, pinned=stranger)
