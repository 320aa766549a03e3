"""A base that is imported with another chat template has that one alone, and one that cannot be used is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_genesis import folder_of, publish

from aggregator.bases import Base, fetch_base
from aggregator.chattemplate import MAX_BYTES, with_chat_template
from rankup.errors import InputError, NotFoundError, StateError
from rankup.store import MemoryStore

TEMPLATE = "{{ tools | tojson }}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return fetch_base("tiny", tmp_path / "tiny")


def written(folder: Path, template: str | bytes) -> Path:
    file = folder / "template.jinja"
    file.write_bytes(template if isinstance(template, bytes) else template.encode())
    return file


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_template_takes_the_place_of_the_bases_own(base: Base, tmp_path: Path, place: str) -> None:
    from transformers import AutoTokenizer

    own = base.folder / "chat_template.jinja"
    if place != own.name:
        settings = base.folder / place
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": own.read_text()}))
        own.unlink()
    before = {path.name: path.read_bytes() for path in base.folder.iterdir()}
    store = MemoryStore()
    manifest = publish(store, with_chat_template(base, written(tmp_path, TEMPLATE)))
    assert {path.name: path.read_bytes() for path in base.folder.iterdir()} == before
    tokenizer = AutoTokenizer.from_pretrained(folder_of(store, manifest, tmp_path / "out"))
    assert tokenizer.chat_template == TEMPLATE
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tools=[{"name": "look"}], tokenize=False)
    assert text == '[{"name": "look"}]Hi'


def test_a_name_that_is_taken_keeps_its_template(base: Base, tmp_path: Path) -> None:
    store = MemoryStore()
    given = with_chat_template(base, written(tmp_path, TEMPLATE))
    first = publish(store, given)
    assert publish(store, given) == publish(store, base) == first
    with pytest.raises(StateError, match="another chat template"):
        publish(store, with_chat_template(base, written(tmp_path, TEMPLATE + " ")))


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}", "does not take this conversation"),
        ("{{ raise_exception('no users') }}", "no users"),
        ("{{ messages[0].content.x.y }}", "does not take this conversation"),
        ("{{ ''.__class__.__mro__ }}", "does not take this conversation"),
        ("", "says nothing"),
        ("{# a remark #}", "says nothing"),
        (b"\xff\xfe", "UTF-8"),
        (b"x" * (MAX_BYTES + 1), "more than 1048576 bytes"),
    ],
)
def test_what_is_no_chat_template_is_refused(base: Base, tmp_path: Path, template: str | bytes, says: str) -> None:
    with pytest.raises(InputError, match=says):
        with_chat_template(base, written(tmp_path, template))


def test_a_missing_file_is_named(base: Base, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no file"):
        with_chat_template(base, tmp_path / "missing.jinja")
