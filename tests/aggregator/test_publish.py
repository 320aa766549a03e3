"""Publishing: the folder's files, a card that cannot be abused, and a pointer that only moves from parent to child."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from toy_world import NOW, World, make_world, random_model, store_model

from aggregator.publish import (
    INDEX,
    README,
    carried_files,
    load_version,
    loadable_files,
    model_card,
    publish_manifest,
    version_files,
)
from rankup.errors import ConflictError, IntegrityError, UnreachableError
from rankup.message import DisplayName
from rankup.protocol import Pointer
from rankup.records import Evaluation, FileEntry, Manifest, Term
from rankup.signing import generate_private_key, parse_private_key, public_key_hex
from rankup.store import MemoryStore, get_blob
from rankup.versions import manifest_digest, manifest_key, open_envelope, parse_pointer, pointer_key


def child(world: World, parent: Manifest | None = None, *, round_id: str = "round-1", name: str = "Ada") -> Manifest:
    """A next version; its tensors differ from the parent's in one hash that stands for all."""
    parent = parent if parent is not None else world.parent
    changed = parent.tensors["layer.0.up.weight"].model_copy(update={"master": f"{parent.version + 1:064x}"})
    term = Term(
        contribution="ab" * 32,
        size_bytes=10,
        worker_id="w-1",
        worker_name=name,
        shard=2,
        tokens=1234567,
        coefficient=65536,
    )
    return parent.model_copy(
        update={
            "version": parent.version + 1,
            "parent": manifest_digest(parent),
            "round_id": round_id,
            "terms": (term,),
            "tensors": {**parent.tensors, "layer.0.up.weight": changed},
            "datasets": ("docs",),
            "evaluation": Evaluation(heldout_loss=2.5, parent_heldout_loss=2.75, examples=8, tokens=99),
            "created_at": NOW,
        }
    )


def pointer(world: World) -> Pointer:
    return parse_pointer(world.store.get(pointer_key("toy"), max_bytes=4096), model="toy")


# -- files -------------------------------------------------------------------------------------------------------------


def paths(files: tuple[FileEntry, ...]) -> list[str]:
    return [file.path for file in files]


def test_config_is_carried_and_card_and_index_are_made_anew(world: World) -> None:
    next_version = child(world)
    files = version_files(world.store, next_version, world.parent.files)
    assert paths(files) == [README, "config.json", INDEX]
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
    assert paths(version_files(store, manifest, manifest.files)) == [README, "config.json"]
    assert manifest.groups[0].export.path == "model.safetensors"


# -- the card ----------------------------------------------------------------------------------------------------------


def front_matter(card: str) -> dict[str, object]:
    _, head, _ = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(head)  # type: ignore[no-any-return]


def test_the_card_tells_where_a_version_comes_from(world: World) -> None:
    card = model_card(child(world))
    assert front_matter(card) == {
        "base_model": "someone/toy",
        "datasets": ["docs"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "tags": ["rankup", "lora", "community-trained"],
    }
    for part in ("round-1", "| `Ada` | 2 | 1,234,567 | 65536/65536 |", "2.5000", "2.7500", "rankup verify URL toy@1"):
        assert part in card
    assert manifest_digest(world.parent) in card


def test_the_card_of_the_base_tells_that_it_is_the_base(world: World) -> None:
    card = model_card(world.parent)
    assert "before the first round" in card
    assert "Contributors" not in card
    assert "Held-out" not in card


def test_a_base_that_is_no_hub_name_and_a_licence_in_prose_stay_out_of_the_hubs_fields(world: World) -> None:
    manifest = world.parent.model_copy(update={"base_model": "/home/me/model.gguf", "licence": "Ask\n---\nme: first"})
    fields = front_matter(model_card(manifest))
    assert "base_model" not in fields
    assert fields["license"] == "other"
    assert fields["license_name"] == "Ask\ufffd---\ufffdme: first"


HOSTILE_NAMES = {
    "html": "<script>alert(1)</script>",
    "link": "[free money](https://evil.example)",
    "image": "![x](https://evil.example/pixel.png)",
    "end of the code span": "` <b>bold</b> `",
    "two backticks": "``x`` **y**",
    "new table cells": "a | b | c",
    "escaped pipe": "a\\| b",
    "backslash at the end": "a\\",
    "right-to-left override": "abc\u202ecba",
    "line separator": "a\u2028# heading",
    "next line": "a\u0085---",
    "front matter": "--- license: mit",
}


def check_card(card: str, plain: str) -> None:
    """The card with a hostile name has the same lines as with a plain one, but for one code span."""
    assert card.isprintable() or {c for c in card if not c.isprintable()} == {"\n"}
    assert len(card.splitlines()) == len(plain.splitlines())
    for line, expected in zip(card.splitlines(), plain.splitlines(), strict=True):
        if line != expected:
            assert line.count("`") == expected.count("`")
            assert line.count("|") == expected.count("|")
            assert re.sub(r"^\| `[^`|]*` \|", "| `Ada` |", line) == expected


@pytest.mark.parametrize("name", HOSTILE_NAMES.values(), ids=HOSTILE_NAMES.keys())
def test_a_hostile_name_stays_inside_its_code_span(world: World, name: str) -> None:
    check_card(model_card(child(world, name=name)), model_card(child(world)))


def is_display_name(text: str) -> bool:
    try:
        TypeAdapter(DisplayName).validate_python(text)
    except ValidationError:
        return False
    return True


def test_no_name_at_all_can_change_the_cards_shape(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    plain = model_card(child(world))

    @given(st.text(min_size=1, max_size=64))
    def law(name: str) -> None:
        assume(is_display_name(name))
        check_card(model_card(child(world, name=name)), plain)

    law()


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
