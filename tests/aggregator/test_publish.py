"""Publishing: the folder's files, what its cards are made from, and a pointer that only moves from parent to child."""

from __future__ import annotations

import json

import pytest
from card_world import child, dataset_card
from toy_world import NOW, World, random_model, store_model

from aggregator.cards import Chapter
from aggregator.openness import OPENNESS, OPENNESS_JSON
from aggregator.publish import (
    INDEX,
    README,
    carried_files,
    load_datasets,
    load_history,
    load_version,
    loadable_files,
    publish_manifest,
    version_files,
)
from rankup.errors import ConflictError, IntegrityError, UnreachableError
from rankup.lineage import CONTRIBUTIONS_NAME
from rankup.message import canonical_json
from rankup.protocol import Pointer
from rankup.records import ContributionList, FileEntry, Revocation, Rollback
from rankup.signing import generate_private_key, parse_private_key, public_key_hex
from rankup.store import MemoryStore, get_blob
from rankup.versions import dataset_key, manifest_digest, manifest_key, open_envelope, parse_pointer, pointer_key


def pointer(world: World) -> Pointer:
    return parse_pointer(world.store.get(pointer_key("toy"), max_bytes=4096), model="toy")


# -- files -------------------------------------------------------------------------------------------------------------


def paths(files: tuple[FileEntry, ...]) -> list[str]:
    return [file.path for file in files]


def test_config_is_carried_and_card_and_index_are_made_anew(world: World) -> None:
    next_version = child(world)
    files = version_files(world.store, next_version, world.parent.files)
    assert paths(files) == [OPENNESS, README, "config.json", INDEX, OPENNESS_JSON]
    assert carried_files(files) == carried_files(world.parent.files) != ()
    before, after = ({f.path: f.sha256 for f in m} for m in (world.parent.files, files))
    assert before[README] != after[README]
    assert before[INDEX] == after[INDEX]
    assert version_files(world.store, next_version, files) == files
    assert paths(loadable_files(world.store, next_version, files)) == ["config.json", INDEX]


def test_the_index_names_the_file_of_every_tensor(world: World) -> None:
    [entry] = [file for file in world.parent.files if file.path == INDEX]
    index = json.loads(get_blob(world.store, entry.sha256, max_bytes=10**6))
    assert index["weight_map"].keys() == world.parent.tensors.keys()
    for group in world.parent.groups:
        assert {index["weight_map"][name] for name in group.tensors} == {group.export.path}
    floats = sum(a.size for a in random_model().values()) - 8
    assert index["metadata"]["total_size"] == 2 * floats + 8 * 8


def test_a_single_group_needs_no_index() -> None:
    store = MemoryStore()
    manifest = store_model(store, random_model(), 10**6)
    assert paths(version_files(store, manifest, manifest.files)) == [OPENNESS, README, "config.json", OPENNESS_JSON]
    assert manifest.groups[0].export.path == "model.safetensors"


def test_the_log_of_contributions_is_written_and_never_carried(world: World) -> None:
    leaves = ContributionList(model="toy")
    files = version_files(world.store, child(world), world.parent.files, contributions=leaves)
    [entry] = [file for file in files if file.path == CONTRIBUTIONS_NAME]
    assert get_blob(world.store, entry.sha256, max_bytes=10**6) == canonical_json(leaves)
    assert CONTRIBUTIONS_NAME not in paths(version_files(world.store, child(world), files))


def test_the_cards_of_a_folder_are_made_from_history_and_dataset_cards(world: World) -> None:
    card = dataset_card()
    manifest = child(world)
    files = version_files(
        world.store, manifest, world.parent.files, history=[Chapter.of(world.parent)], datasets=[card]
    )
    text = {file.path: get_blob(world.store, file.sha256, max_bytes=10**6).decode() for file in files}
    assert "So far: 1 contribution by 1 contributor in 1 round." in text[README]
    assert card.shards[0].sha256 in text[OPENNESS_JSON]
    assert card.source in text[OPENNESS]


# -- what cards are made from ------------------------------------------------------------------------------------------


def test_history_is_followed_from_parent_to_parent(world: World) -> None:
    first = child(world)
    second = child(world, first, round_id="round-2")
    for manifest in (first, second):
        publish_manifest(world.store, world.publisher, manifest)
    third = child(world, second, round_id="round-3")
    key = public_key_hex(world.publisher)
    chapters = load_history(world.store, third, publisher_key=key)
    assert [(chapter.version, chapter.made_by) for chapter in chapters] == [(0, "base"), (1, "round"), (2, "round")]
    assert load_history(world.store, world.parent, publisher_key=key) == ()
    world.store.delete(manifest_key("toy", 0))
    assert [chapter.version for chapter in load_history(world.store, third, publisher_key=key)] == [1, 2]
    world.store.put(manifest_key("toy", 1), world.store.get(manifest_key("toy", 2), max_bytes=10**6))
    with pytest.raises(IntegrityError):
        load_history(world.store, third, publisher_key=key)


def test_datasets_without_a_card_are_left_out_and_a_broken_card_is_refused(world: World) -> None:
    manifest = child(world).model_copy(update={"datasets": ("docs", "gone")})
    assert load_datasets(world.store, manifest) == ()
    world.store.put(dataset_key("docs"), canonical_json(dataset_card()))
    assert load_datasets(world.store, manifest) == (dataset_card(),)
    world.store.put(dataset_key("gone"), b"{}")
    with pytest.raises(IntegrityError, match="gone"):
        load_datasets(world.store, manifest)


# -- the manifest and the pointer --------------------------------------------------------------------------------------


def test_a_child_is_sealed_and_the_pointer_moves_to_it(world: World) -> None:
    manifest = child(world)
    moved = publish_manifest(world.store, world.publisher, manifest)
    assert (
        moved == pointer(world) == Pointer(model="toy", version=1, manifest=manifest_digest(manifest), updated_at=NOW)
    )
    data = world.store.get(manifest_key("toy", 1), max_bytes=10**6)
    opened, digest, _ = open_envelope(data, publisher_key=public_key_hex(world.publisher))
    assert (opened, digest) == (manifest, moved.manifest)


def test_publishing_twice_is_publishing_once(world: World) -> None:
    manifest = child(world)
    first = publish_manifest(world.store, world.publisher, manifest)
    assert publish_manifest(world.store, world.publisher, manifest) == first == pointer(world)


def test_after_a_crash_before_the_pointer_the_stored_manifest_is_adopted(world: World) -> None:
    manifest = child(world)
    swap = world.store.swap

    def fail(*_: object, **__: object) -> str:
        raise UnreachableError("gone")

    world.store.swap = fail  # type: ignore[method-assign,assignment]
    with pytest.raises(UnreachableError):
        publish_manifest(world.store, world.publisher, manifest)
    assert pointer(world).version == 0
    world.store.swap = swap  # type: ignore[method-assign]
    again = manifest.model_copy(update={"created_at": NOW + 60})
    assert publish_manifest(world.store, world.publisher, again).manifest == manifest_digest(manifest)
    assert pointer(world).manifest == manifest_digest(manifest)


def test_the_pointer_never_goes_back(world: World) -> None:
    first = child(world)
    second = child(world, first, round_id="round-2")
    publish_manifest(world.store, world.publisher, first)
    latest = publish_manifest(world.store, world.publisher, second)
    assert publish_manifest(world.store, world.publisher, first).version == 1
    assert pointer(world) == latest


def test_two_rounds_cannot_become_the_same_version(world: World) -> None:
    publish_manifest(world.store, world.publisher, child(world))
    with pytest.raises(ConflictError, match="round-1"):
        publish_manifest(world.store, world.publisher, child(world, round_id="round-9"))
    assert pointer(world).manifest == manifest_digest(child(world))


def test_a_version_that_does_not_follow_the_latest_leaves_nothing_behind(world: World) -> None:
    orphan = child(world, child(world))
    with pytest.raises(ConflictError, match="does not follow"):
        publish_manifest(world.store, world.publisher, orphan)
    stranger = child(world).model_copy(update={"parent": "0" * 64})
    with pytest.raises(ConflictError, match="does not follow"):
        publish_manifest(world.store, world.publisher, stranger)
    assert list(world.store.list("models/toy/versions/")) == [manifest_key("toy", 0)]


def test_only_version_zero_may_come_without_a_pointer(world: World) -> None:
    world.store.delete(pointer_key("toy"))
    with pytest.raises(ConflictError, match="no pointer"):
        publish_manifest(world.store, world.publisher, child(world))
    assert publish_manifest(world.store, world.publisher, world.parent).version == 0


def test_a_lost_race_for_the_pointer_is_a_conflict(world: World) -> None:
    """Somebody moves the pointer between our read and our write."""
    put = world.store.put

    def meanwhile(key: str, data: bytes, **options: object) -> str:
        etag = put(key, data, **options)  # type: ignore[arg-type]
        put(pointer_key("toy"), world.store.get(pointer_key("toy"), max_bytes=4096) + b" ")
        return etag

    world.store.put = meanwhile  # type: ignore[method-assign,assignment]
    with pytest.raises(ConflictError):
        publish_manifest(world.store, world.publisher, child(world))


def test_a_version_is_loaded_only_with_the_digest_and_key_that_are_expected(world: World) -> None:
    key, digest = public_key_hex(world.publisher), manifest_digest(world.parent)
    assert load_version(world.store, "toy", 0, digest, publisher_key=key) == world.parent
    with pytest.raises(IntegrityError):
        load_version(world.store, "toy", 0, "0" * 64, publisher_key=key)
    other = public_key_hex(parse_private_key(generate_private_key()))
    with pytest.raises(IntegrityError):
        load_version(world.store, "toy", 0, digest, publisher_key=other)


def test_two_changes_with_the_same_tensors_cannot_become_the_same_version(world: World) -> None:
    """A rollback to the parent has the parent's tensors, and so has one that takes out what never counted."""
    first = child(world)
    publish_manifest(world.store, world.publisher, first)
    bare = {"round_id": None, "terms": (), "tensors": first.tensors, "change": Rollback(to=1, reason="spam")}
    rollback = child(world, first).model_copy(update=bare)
    publish_manifest(world.store, world.publisher, rollback)
    assert publish_manifest(world.store, world.publisher, rollback).manifest == manifest_digest(rollback)
    with pytest.raises(ConflictError, match="a rollback"):
        publish_manifest(
            world.store, world.publisher, rollback.model_copy(update={"change": Revocation(contributions=("ab" * 32,))})
        )
