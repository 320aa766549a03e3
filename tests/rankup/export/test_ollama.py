"""An Ollama model's folder: what its Modelfile says, and when it says nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from gotemplate import render
from tinymodel import make_model, pull_model

from rankup.errors import StateError
from rankup.export.ggufsource import open_folder
from rankup.export.ggufwriter import write_gguf
from rankup.export.ollama import Modelfile, make_modelfile, require_room, write_modelfile


def modelfile_of(folder: Path, **settings: Any) -> Modelfile:
    """The Modelfile of a tiny model whose tokenizer_config.json has these settings besides."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    model = open_folder(folder)
    gguf = write_gguf(model, folder.parent / "out" / "model.gguf", force=True)
    return make_modelfile(model, gguf)


def commands(text: str) -> dict[str, list[str]]:
    """A Modelfile's instructions; values in triple quotes may hold line feeds."""
    found: dict[str, list[str]] = {}
    rest = text
    while rest:
        name, _, rest = rest.partition(" ")
        if rest.startswith('"""'):
            value, _, rest = rest[3:].partition('"""\n')
        else:
            value, _, rest = rest.partition("\n")
        found.setdefault(name, []).append(value)
    return found


def test_the_modelfile_names_file_template_stops_and_licence(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    manifest = pull_model(tmp_path / "model")
    model = open_folder(tmp_path / "model")
    gguf = write_gguf(model, tmp_path / "out" / "model.gguf")
    made = make_modelfile(model, gguf)
    first, _, rest = made.text.partition("\n")
    assert gguf.provenance is not None
    assert first == f"# tiny version 7, manifest sha256:{gguf.provenance.digest}"
    found = commands(rest)
    assert found["FROM"] == ["./model.gguf"]
    assert found["LICENSE"] == [manifest.licence]
    assert found["PARAMETER"] == ['stop "<|im_end|>"', 'stop "<|im_start|>"']
    assert made.notes == ()
    [template] = found["TEMPLATE"]
    talk = (("system", "Rhyme."), ("user", "One?"), ("assistant", "Two."), ("user", "Three?"))
    assert render(template, talk) == (
        "<|im_start|>system\nRhyme.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>\n"
        "<|im_start|>user\nThree?<|im_end|>\n<|im_start|>assistant\n"
    )
    path = write_modelfile(tmp_path / "out", made)
    assert path.read_text() == made.text


def test_a_template_in_a_file_of_its_own_comes_first(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + '> ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant> ' }}{% endif %}"
    )
    made = modelfile_of(tmp_path / "model")
    assert made.template is not None
    assert render(made.template, [("user", "One?")]) == "user> One?\nassistant> "
    assert made.stops == ()


BOS_FIRST = "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
NOTED: Mapping[str, tuple[dict[str, Any], str, bool]] = {
    "no template": ({"chat_template": None}, "no chat template", False),
    "a template that is more than turns": (
        {"chat_template": "{{ messages | length }}"},
        "not made of plain turns",
        False,
    ),
    "a beginning that only the tokenizer writes": ({"add_bos_token": True}, "begins every prompt", True),
    "no system messages": (
        {"chat_template": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('') }}{% endif %}" + BOS_FIRST},
        "takes no system message",
        True,
    ),
}


@pytest.mark.parametrize("case", NOTED)
def test_what_ollama_will_do_differently_is_noted(case: str, tmp_path: Path) -> None:
    settings, said, has_template = NOTED[case]
    make_model(tmp_path / "model")
    made = modelfile_of(tmp_path / "model", **settings)
    assert any(said in note for note in made.notes)
    assert ("TEMPLATE" in made.text) == has_template == (made.template is not None)


@pytest.mark.parametrize("adds", [True, False])
def test_the_beginning_is_written_once(adds: bool, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    made = modelfile_of(tmp_path / "model", chat_template=BOS_FIRST, add_bos_token=adds)
    assert made.template is not None
    assert render(made.template, [("user", "One?")]).startswith("<|im_start|>") != adds


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(StateError, match="not empty"):
        require_room(tmp_path, force=False)
    with pytest.raises(StateError, match="is a file"):
        require_room(tmp_path / "mine", force=True)
    require_room(tmp_path, force=True)
    require_room(tmp_path / "absent", force=False)
