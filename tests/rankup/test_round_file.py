"""A round's file: the template passes its own check, every field is explained, faults name line, cause and remedy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from rankup.cli import app
from rankup.cli.round_fields import described_schema, every_field, find_field
from rankup.cli.round_file import MAX_FILE_BYTES, Fault, faults_of, read_round_file, require_sound
from rankup.cli.round_template import template
from rankup.errors import InputError, UnreachableError
from rankup.protocol import RoundRequest

SMALLEST = "model: tiny\ndataset: docs\n"


def faults(tmp_path: Path, text: str) -> list[Fault]:
    path = tmp_path / "round.yaml"
    path.write_text(text)
    return faults_of(read_round_file(path))


# -- fields, template, schema ------------------------------------------------------------------------------------------


def test_every_field_has_a_meaning_and_says_what_is_allowed() -> None:
    for note in every_field():
        assert note.meaning.endswith((".", "`", ")", "peft")), note.dotted
        assert note.allowed, note.dotted


def test_numbers_tell_their_bounds_and_times_their_unit() -> None:
    told = {
        "grace_s": "a number from 0 to 604800, in seconds",
        "quorum": "a whole number from 1 to 1000000, or null",
        "tiers.rank": "a whole number from 1 to 1024",
        "recipe.learning_rate": "a number above 0 to 1",
        "recipe.mantissa_bits": "one of 16, 8",
        "recipe.aggregation.min_descent": "a number from 0 to below 1, or null",
        "recipe.aggregation.outer.momentum": "a number from 0 to below 1",
    }
    for dotted, allowed in told.items():
        note = find_field(tuple(dotted.split(".")))
        assert note is not None
        assert note.allowed == allowed


def test_the_template_asks_for_the_defaults_and_has_every_field(tmp_path: Path) -> None:
    text = template("tiny", "docs")
    assert RoundRequest.model_validate(yaml.safe_load(text)) == RoundRequest(model="tiny", dataset="docs")
    assert faults(tmp_path, text) == []
    for note in every_field():
        assert f"{note.name}:" in text
    assert max(map(len, text.splitlines())) <= 120


def test_the_schema_describes_every_field_and_bounds_every_number() -> None:
    schema = described_schema()

    def nodes(node: Any) -> Iterator[dict[str, Any]]:
        if isinstance(node, dict):
            yield node
            for below in node.values():
                yield from nodes(below)
        elif isinstance(node, list):
            for below in node:
                yield from nodes(below)

    described = [prop for node in nodes(schema) for prop in node.get("properties", {}).values()]
    assert len(described) > 40
    for prop in described:
        assert prop["description"]
    for node in nodes(schema):
        if node.get("type") in ("integer", "number") and "default" in node and "enum" not in node:
            assert {"minimum", "exclusiveMinimum"} & set(node)
            assert {"maximum", "exclusiveMaximum"} & set(node)
    json.dumps(schema)


# -- check -------------------------------------------------------------------------------------------------------------

CASES = {
    # name: (text, path, line, words in what is shown)
    "missing": ("model: tiny\n", "dataset", None, "is missing; allowed: a name"),
    "not a number": (SMALLEST + "deadline_s: soon\n", "deadline_s", 3, "'soon' does not fit; allowed: a number from 1"),
    "too large": (SMALLEST + "recipe:\n  rank: 2000\n", "recipe.rank", 4, "allowed: a whole number from 1 to 1024"),
    "near name": (SMALLEST + "grace: 5\n", "grace", 3, "did you mean grace_s?"),
    "wrong place": (SMALLEST + "steps: 5\n", "steps", 3, "did you mean recipe.steps?"),
    "inner near name": (SMALLEST + "recipe: {alpah: 3}\n", "recipe.alpah", 3, "did you mean recipe.alpha?"),
    "no near name": (SMALLEST + "zzz: 5\n", "zzz", 3, "there is no such field"),
    "twice": (SMALLEST + "shards: 2\nshards: 3\n", "shards", 4, "stands on line 3 too"),
    "in a list": (
        SMALLEST + "tiers:\n  - min_memory_gib: 8\n    rank: 0\n", "tiers[0].rank", 5, "0 does not fit"
    ),
    "missing in a list": (SMALLEST + "tiers:\n  - rank: 4\n", "tiers[0].min_memory_gib", 4, "is missing"),
    "entry of a list": (SMALLEST + "teams:\n  - blue\n  - ''\n", "teams[1]", 5, "at least 1 character"),
    "choice": (SMALLEST + "recipe: {lr_schedule: cos}\n", "recipe.lr_schedule", 3, "allowed: one of"),
    "union": (SMALLEST + "recipe: {target_modules: {a: 1}}\n", "recipe.target_modules", 3, "allowed: all-linear, or"),
    "own names": (SMALLEST + "recipe: {rank_pattern: {'a b': 1}}\n", "recipe.rank_pattern.a b", 3, "match pattern"),
    "across fields": (SMALLEST + "shards: 2\nquorum: 3\n", "", None, "quorum 3 can never be met"),
    "not a mapping": (SMALLEST + "recipe: 5\n", "recipe", 3, "5 does not fit; allowed: a mapping"),
    "infinite": (SMALLEST + "grace_s: .inf\n", "grace_s", 3, "finite"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "path", "line", "words"), CASES.values(), ids=CASES)
def test_a_fault_has_its_path_its_line_and_what_is_allowed(
    tmp_path: Path, text: str, path: str, line: int | None, words: str
) -> None:
    (fault,) = faults(tmp_path, text)
    assert (fault.path, fault.line) == (path, line)
    shown = fault.shown("round.yaml")
    assert words in shown
    assert shown.startswith("round.yaml:" if line is None else f"round.yaml:{line}:")


def test_all_faults_are_told_at_once_by_line(tmp_path: Path) -> None:
    text = "model: A\ndataset: docs\nshards: 0\nrecipe:\n  rank: x\n  alpah: 1\n"
    assert [fault.line for fault in faults(tmp_path, text)] == [1, 3, 5, 6]
    with pytest.raises(InputError) as caught:
        require_sound(read_round_file(tmp_path / "round.yaml"), "round.yaml")
    assert caught.value.cause.count("round.yaml:") == 4
    assert "rankup round template" in caught.value.remedy


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"- a\n- b\n",
        b"model: [",
        b"\xff\xfe\x00",
        b"model: !!python/object/apply:os.system ['true']\n",
        b"a: 1\n---\nb: 2\n",
        b"x" * (MAX_FILE_BYTES + 1),
        b"[" * 500,
    ],
    ids=["empty", "a list", "cut off", "not text", "a tag", "two documents", "too large", "deep"],
)
def test_what_is_no_mapping_in_plain_yaml_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "round.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_round_file(path)
    assert caught.value.remedy


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 2000) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    changes=st.dictionaries(
        st.sampled_from([note.name for note in every_field() if len(note.path) == 1] + ["rank", "unknown"]),
        _VALUES,
        max_size=4,
    )
)
def test_check_passes_exactly_what_the_model_takes(tmp_path_factory: pytest.TempPathFactory, changes: Any) -> None:
    data = {"model": "tiny", "dataset": "docs"} | changes
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(data))
    found = faults_of(read_round_file(path))
    try:
        RoundRequest.model_validate(data)
    except ValueError:
        assert found
    else:
        assert not found
    assert all(fault.cause and fault.shown("f") for fault in found)


# -- the commands ------------------------------------------------------------------------------------------------------


def rankup(*arguments: str, home: Path) -> Result:
    return CliRunner().invoke(app, ["round", *arguments], env={"RANKUP_HOME": str(home), "RANKUP_ORGANISER_TOKEN": "x"})


def test_what_the_template_command_writes_is_sound_and_a_fault_ends_with_2(tmp_path: Path) -> None:
    path = tmp_path / "round.yaml"
    path.write_text(rankup("template", "--model", "tiny", "--dataset", "docs", home=tmp_path).stdout)
    assert rankup("check", str(path), home=tmp_path).exit_code == 0
    assert json.loads(rankup("check", str(path), "--json", home=tmp_path).stdout) == {"ok": True, "faults": []}
    path.write_text(path.read_text().replace("shards: 3", "shards: none"))
    told = rankup("check", str(path), "--json", home=tmp_path)
    assert told.exit_code == 2
    (fault,) = json.loads(told.stdout)["faults"]
    assert (fault["path"], fault["cause"]) == ("shards", "'none' does not fit")
    assert json.loads(rankup("schema", home=tmp_path).stdout) == described_schema()


def test_options_go_over_the_file_and_nothing_is_sent_before_all_of_it_is_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[dict[str, Any]] = []

    def call(*_: str, body: dict[str, Any], **__: str) -> None:
        sent.append(body)
        raise UnreachableError("nobody is there")

    monkeypatch.setattr("rankup.cli.http.call", call)
    path = tmp_path / "round.yaml"
    path.write_text("dataset: docs\nshards: none\nrecipe: {rank: 4, aggregation: {rule: multi_krum}}\n")
    options = ["--server", "http://127.0.0.1:9", "--model", "tiny", "--steps", "7", "--momentum", "0.5"]
    refused = rankup("create", str(path), *options, home=tmp_path)
    assert isinstance(refused.exception, InputError)
    assert refused.exception.cause.endswith("shards: 'none' does not fit; allowed: a whole number from 1 to 1000000")
    assert sent == []
    assert isinstance(rankup("create", str(path), *options, "--shards", "3", home=tmp_path).exception, UnreachableError)
    aggregation = {"rule": "multi_krum", "outer": {"momentum": 0.5}}
    recipe = {"rank": 4, "steps": 7, "aggregation": aggregation}
    wanted = RoundRequest.model_validate({"model": "tiny", "dataset": "docs", "shards": 3, "recipe": recipe})
    assert RoundRequest.model_validate(sent[0]) == wanted
    taught = [*options, "--shards", "3", "--teacher", "sage", "--teacher-version", "4"]
    assert isinstance(rankup("create", str(path), *taught, home=tmp_path).exception, UnreachableError)
    distilled = wanted.recipe.model_copy(update={"method": "distillation"})
    more = {"teacher": "sage", "teacher_version": 4, "recipe": distilled}
    assert RoundRequest.model_validate(sent[1]) == wanted.model_copy(update=more)
