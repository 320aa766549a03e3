"""A round that no volunteer could train is refused when it is opened."""

from __future__ import annotations

import json

import pytest
from gateway_world import add_dataset, make_manifest

from coordinator.fitting import chat_template, require_trainable
from rankup.errors import InputError, IntegrityError
from rankup.recipe import Recipe
from rankup.records import FileEntry, Manifest
from rankup.store import MemoryStore, put_blob

MARKED = "{% generation %}{{ messages }}{% endgeneration %}"


def version(store: MemoryStore, **files: str) -> Manifest:
    entries = []
    for name, text in files.items():
        ref = put_blob(store, text.encode())
        entries.append(FileEntry(path=name.replace("_dot_", "."), sha256=ref.sha256, size_bytes=ref.size_bytes))
    return make_manifest(0, None).model_copy(update={"files": tuple(entries)})


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, None),
        ({"tokenizer_config_dot_json": "{}"}, None),
        ({"tokenizer_config_dot_json": json.dumps({"chat_template": MARKED})}, MARKED),
        (
            {"tokenizer_config_dot_json": json.dumps({"chat_template": [{"name": "default", "template": MARKED}]})},
            {"default": MARKED},
        ),
        ({"chat_template_dot_json": json.dumps({"chat_template": MARKED}), "tokenizer_config_dot_json": "{}"}, MARKED),
        ({"chat_template_dot_jinja": MARKED, "tokenizer_config_dot_json": '{"chat_template": "old"}'}, MARKED),
    ],
)
def test_the_chat_template_of_a_version_is_found_in_its_files(files: dict[str, str], found: object) -> None:
    store = MemoryStore()
    assert chat_template(store, version(store, **files)) == found


@pytest.mark.parametrize("text", ["[]", "{", "\udcff", '{"chat_template": [{"name": "default"}]}'])
def test_a_tokenizer_that_cannot_be_read_is_an_error(text: str) -> None:
    store = MemoryStore()
    ref = put_blob(store, text.encode(errors="surrogateescape"))
    entry = FileEntry(path="tokenizer_config.json", sha256=ref.sha256, size_bytes=ref.size_bytes)
    with pytest.raises(IntegrityError, match="tokenizer of tiny 0"):
        chat_template(store, make_manifest(0, None).model_copy(update={"files": (entry,)}))


def test_the_assistants_words_can_be_learned_alone_only_where_the_template_marks_them() -> None:
    store = MemoryStore()
    card = add_dataset(store).model_copy(update={"shape": "messages"})
    recipe = Recipe(assistant_only=True)
    require_trainable(store, recipe, card, version(store, chat_template_dot_jinja=MARKED))
    with pytest.raises(InputError, match="does not mark"):
        require_trainable(store, recipe, card, version(store, chat_template_dot_jinja="{{ add_generation_prompt }}"))


def test_rows_with_tools_need_a_template_that_has_a_place_for_them() -> None:
    store = MemoryStore()
    card = add_dataset(store).model_copy(update={"shape": "messages", "needs": ("tool_calls", "tools")})
    templates = {"default": "{{ messages }}", "tool_use": "{{ tools, tool_calls }}"}
    several = [{"name": name, "template": template} for name, template in templates.items()]
    for template in ("{{ tools }}{{ messages[0].tool_calls }}", several):
        base = version(store, tokenizer_config_dot_json=json.dumps({"chat_template": template}))
        require_trainable(store, Recipe(), card, base)
        with pytest.raises(InputError, match="of which distillation makes no use"):
            require_trainable(store, Recipe(method="distillation"), card, base)
    for template in ("{{ tools_in_prompt }}{{ tool_calls }}", "{{ messages }}", None):
        base = version(store, tokenizer_config_dot_json=json.dumps({"chat_template": template}))
        with pytest.raises(InputError, match="tools, which the chat template of tiny leaves out"):
            require_trainable(store, Recipe(), card, base)


def test_the_shape_on_the_card_decides_which_methods_fit_and_a_card_without_one_fits_all() -> None:
    store = MemoryStore()
    card, base = add_dataset(store), version(store)
    require_trainable(store, Recipe(method="dpo"), card, base)
    require_trainable(store, Recipe(method="dpo"), card.model_copy(update={"shape": "preference"}), base)
    with pytest.raises(InputError, match="not on text"):
        require_trainable(store, Recipe(method="dpo"), card.model_copy(update={"shape": "text"}), base)


def test_images_need_a_model_that_sees() -> None:
    store = MemoryStore()
    card = add_dataset(store).model_copy(update={"shape": "image messages"})
    for name in ("processor_config_dot_json", "preprocessor_config_dot_json"):
        require_trainable(store, Recipe(), card, version(store, **{name: "{}"}))
    with pytest.raises(InputError, match="sees none"):
        require_trainable(store, Recipe(), card, version(store, tokenizer_config_dot_json="{}"))
    with pytest.raises(InputError, match="cannot be packed"):
        require_trainable(store, Recipe(packing=True), card, version(store, processor_config_dot_json="{}"))
    with pytest.raises(InputError, match="method dpo"):
        require_trainable(store, Recipe(method="dpo"), card, version(store, processor_config_dot_json="{}"))
