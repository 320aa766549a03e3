"""Chat templates known by what they render, and the Ollama templates made from them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from gotemplate import render as render_stand_in
from gotemplate import run_go
from hypothesis import given, settings
from hypothesis import strategies as st

from rankup.export.chatparts import Case, ChatParts, Message, learn_parts
from rankup.export.ollama import PROBE

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES: Mapping[str, str] = {
    "chatml": CHATML,
    "chatml with a system message of its own": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}" + CHATML
    ),
    "headers": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|head|>' + m['role'] + '<|/head|>\n\n' + m['content'] + '<|eot|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
    ),
    "instructions with the system text in the first": (
        "{{ bos_token }}{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
        "{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}{{ '[INST] ' }}"
        "{% if loop.first and system %}{{ system + '\n\n' }}{% endif %}{{ m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
    ),
    "instructions with the system text in the last": (
        "{{ bos_token }}{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
        "{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}{{ '[INST] ' }}"
        "{% if loop.last and system %}{{ system + '\n\n' }}{% endif %}{{ m['content'] + '[/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
    ),
    "no system messages": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
        "{% for m in messages %}{{ '<turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
        "{{ m['content'] + '</turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
    ),
    "single braces": (
        "{% for m in messages %}{{ '{' + m['role'] + '}{' + m['content'] + '}' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '{assistant}{' }}{% endif %}"
    ),
    "braces and quotes": CHATML.replace("<|im_start|>", "{{ \"'\" + '{{' }}" and '{{"').replace("<|im_end|>", "}}"),
}
UNKNOWN: Mapping[str, str] = {
    "raises": "{{ raise_exception('no') }}",
    "counts its turns": "{% for m in messages %}{{ loop.index ~ ': ' + m['content'] + '\n' }}{% endfor %}",
    "drops old answers": CHATML.replace("{{'<|im_start|>'", "{% if loop.revindex > 2 %}{% continue %}{% endif %}{{'<'"),
    "shouts": CHATML.replace("message['content']", "message['content'].upper()"),
    "reaches for Python": "{{ messages.__class__.__mro__[1].__subclasses__() }}" + CHATML,
    "never ends": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" + CHATML,
    "is huge": "{{ 'x' * 100000000000 }}" + CHATML,
}
SYSTEM: Message = ("system", "Rhyme.")
TALK: tuple[Message, ...] = (("user", "One?"), ("assistant", "Two."), ("user", "Three?"))
CONVERSATIONS: tuple[tuple[Message, ...], ...] = (TALK[:1], TALK, (SYSTEM, *TALK[:1]), (SYSTEM, *TALK))


def rendered(template: str, cases: Sequence[Case], cpu_s: int = 10) -> list[str | None]:
    """What the template renders, by the child process that exports use."""
    request = {
        "template": template,
        "variables": {"bos_token": "<s>"},
        "cases": [
            {"messages": [{"role": r, "content": t} for r, t in messages], "add_generation_prompt": generate}
            for messages, generate in cases
        ],
    }
    script = f"import runpy, sys; sys.argv = ['probe']; module = runpy.run_path({str(PROBE)!r}); "
    script += f"module['main'].__globals__['CPU_S'] = {cpu_s}; module['main']()"
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(request).encode(), capture_output=True, check=False
    )
    return [None] * len(cases) if done.returncode else json.loads(done.stdout)


def learned(template: str) -> ChatParts:
    parts = learn_parts(lambda cases: rendered(template, cases), "<s>")
    assert parts is not None
    return parts


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_of_turns_renders_in_ollama_what_it_renders_in_transformers(name: str) -> None:
    parts = learned(TEMPLATES[name])
    go = parts.go_template(with_begin=True)
    assert go is not None
    expected = rendered(TEMPLATES[name], [(messages, True) for messages in CONVERSATIONS])
    for messages, text in zip(CONVERSATIONS, expected, strict=True):
        if text is None:
            assert parts.system is None
        else:
            assert render_stand_in(go, messages) == text


def test_the_beginning_is_left_to_a_tokenizer_that_writes_it() -> None:
    parts = learned(TEMPLATES["headers"])
    assert parts.begin == "<s>"
    assert "<s>" not in str(parts.go_template(with_begin=False))


def test_an_answer_that_was_begun_is_gone_on_with() -> None:
    go = learned(CHATML).go_template(with_begin=True)
    assert go is not None
    assert render_stand_in(go, TALK[:2]).endswith("<|im_start|>assistant\nTwo.")


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_template_that_is_more_than_turns_is_not_guessed(name: str) -> None:
    assert learn_parts(lambda cases: rendered(UNKNOWN[name], cases, cpu_s=1), "<s>") is None


def test_a_text_that_would_end_the_modelfiles_template_is_refused() -> None:
    parts = learned(CHATML.replace("<|im_end|>", '"""'))
    assert parts.go_template(with_begin=True) is None


words = st.text(st.characters(codec="ascii", exclude_characters="\0"), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(
    begin=words,
    no_system=words,
    system=st.one_of(st.none(), st.tuples(words, words)),
    user=st.tuples(words, words),
    assistant=st.tuples(words, words),
    generation=words,
    place=st.sampled_from(["turn", "first user", "last user"]),
)
def test_parts_are_found_again_in_what_they_render(place: str, **fields: object) -> None:
    if fields["system"] is None:
        place = "turn"
    parts = ChatParts(**fields, system_in=place)  # type: ignore[arg-type]
    texts = lambda cases: [  # noqa: E731
        None if parts.system is None and messages[0][0] == "system" else parts.render(messages, generate)
        for messages, generate in cases
    ]
    found = learn_parts(texts, parts.begin)
    if found is not None:  # parts may run into each other, but what is found says the same
        for messages in CONVERSATIONS:
            if parts.system is not None or messages[0][0] != "system":
                assert found.render(messages, True) == parts.render(messages, True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="no Go toolchain on the PATH")
def test_go_itself_agrees_with_the_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = shutil.which("go") or ""
    cases = []
    for template in TEMPLATES.values():
        made = learned(template).go_template(with_begin=True)
        assert made is not None
        cases += [(made, messages) for messages in (*CONVERSATIONS, TALK[:2], (SYSTEM, SYSTEM, *TALK))]
    monkeypatch.setenv("GOCACHE", str(tmp_path / "cache"))
    assert run_go(go, tmp_path, cases) == [render_stand_in(template, messages) for template, messages in cases]
