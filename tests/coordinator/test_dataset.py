"""A dataset does not depend on how Ray splits the work, wrong rows are named, and nothing held out is trained on."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from coordinator import dataset as module
from coordinator.dataset import build_dataset
from coordinator.rowfiles import MAX_LINE_BYTES, Origin
from coordinator.rows import RowError, clean_row, clean_text, encode_row, features, parse_row
from rankup.errors import InputError, NotFoundError, SetupError, StateError, TooLargeError
from rankup.records import DatasetCard
from rankup.store import MemoryStore, get_blob
from rankup.versions import dataset_key, heldout_key

NOW = 1_750_000_000.0
WORDS = [f"word{number}" for number in range(5000)]


def prose(seed: int, words: int = 20) -> str:
    return " ".join(random.Random(seed).sample(WORDS, words))


def pair(prompt: str, answer: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def pairs(count: int) -> list[dict[str, Any]]:
    return [pair(f"Question {number}: {prose(number, 5)}?", prose(number + 10_000)) for number in range(count)]


def build(store: MemoryStore, rows: Any, **changes: Any) -> DatasetCard:
    options: dict[str, Any] = {
        "dataset": "toy",
        "source": "a test",
        "licence": "CC0-1.0",
        "shard_rows": 10,
        "heldout_rows": 8,
        "seed": 7,
        "now": NOW,
    }
    return build_dataset(store, rows=rows, **(options | changes))


def shards(store: MemoryStore, card: DatasetCard) -> list[list[dict[str, Any]]]:
    blobs = [get_blob(store, ref.sha256, max_bytes=10**6) for ref in card.shards]
    return [[json.loads(line) for line in blob.decode().splitlines()] for blob in blobs]


def heldout(store: MemoryStore, card: DatasetCard) -> list[dict[str, Any]]:
    data = store.get(heldout_key(card.dataset, card.heldout.sha256), max_bytes=10**6)
    return [json.loads(line) for line in data.decode().splitlines()]


def counts(card: DatasetCard) -> dict[str, tuple[int, int]]:
    return {step.name: (step.rows_in, step.rows_out) for step in card.pipeline}


# -- rows --------------------------------------------------------------------------------------------------------------

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"text": "t"}, "text"),
        ({"messages": [USER, ASSISTANT]}, "messages"),
        ({"prompt": "p", "completion": "c"}, "prompt-completion"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt-completion chat"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "preference"),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT]}, "preference chat"),
        ({"prompt": "p", "completion": "c", "label": False}, "unpaired"),
        ({"prompt": [USER], "completion": [ASSISTANT], "label": True}, "unpaired chat"),
        ({"text": "t", "id": 7, "url": None}, "text"),
    ],
)
def test_every_shape_of_trl_is_taken(row: dict[str, Any], shape: str) -> None:
    found, parsed, extra = parse_row(json.dumps(row))
    assert found == shape
    assert parsed == {name: value for name, value in row.items() if name not in ("id", "url")}
    assert extra == (("id",) if "id" in row else ())


OTHER = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("row", "plain"),
    [
        (
            {"chosen": "Q: Why? A: Sun.", "rejected": "Q: Why? A: Sand."},
            {"prompt": "Q: Why? A:", "chosen": " Sun.", "rejected": " Sand."},
        ),
        (
            {"chosen": "Go on\n\nand on", "rejected": "Go on\n\nand"},
            {"prompt": "Go on", "chosen": "\n\nand on", "rejected": "\n\nand"},
        ),
        (
            {"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
            {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]},
        ),
        (
            {"prompt": "q", "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
            {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]},
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            {"messages": [USER, ASSISTANT]},
        ),
        ({"conversations": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT]}),
        ({"prompt": "p", "completion": "c", "label": "spam"}, {"prompt": "p", "completion": "c"}),
    ],
)
def test_other_ways_to_write_a_row_become_the_plain_one(row: dict[str, Any], plain: dict[str, Any]) -> None:
    assert parse_row(json.dumps(row))[1] == plain


@given(st.text("ab \n", max_size=12), st.text("ab \n", max_size=6), st.text("ab \n", max_size=6))
def test_a_split_pair_is_the_pair_again_when_it_is_put_together(shared: str, one: str, other: str) -> None:
    try:
        _, row, _ = parse_row(json.dumps({"chosen": shared + one, "rejected": shared + other}))
    except RowError:
        return
    assert row["prompt"] + row["chosen"] == shared + one
    assert row["prompt"] + row["rejected"] == shared + other
    assert all(row[field] for field in ("prompt", "chosen", "rejected"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ('{"chosen": "abc", "rejected": "abd"}', "do not begin with one prompt"),
        ('{"chosen": "", "rejected": ""}', "do not begin with one prompt"),
        ('{"chosen": "a b", "rejected": []}', "must both be text"),
        ('{"conversations": [{"from": "narrator", "value": "x"}]}', r"messages\[0\].role"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "a list, not a JSON object"),
        ('{"question": "q"}', "question"),
        ('{"prompt": "p"}', "none of the shapes"),
        ('{"text": 7}', "field text: is a number"),
        ('{"text": ["x"]}', "field text: is a list"),
        ('{"messages": "x"}', "field messages: is text"),
        ('{"messages": []}', "field messages: has no message"),
        ('{"messages": ["x"]}', r"field messages\[0\]: is text"),
        ('{"messages": [{"role": "user"}]}', r"field messages\[0\].content: is null"),
        ('{"messages": [{"role": "root", "content": "x"}]}', r"field messages\[0\].role"),
        ('{"messages": [{"role": "user", "content": "x", "name": "me"}]}', "unknown field name"),
        ('{"prompt": "p", "completion": [{"role": "assistant", "content": "c"}]}', "must all be text"),
    ],
)
def test_a_wrong_row_is_refused_with_its_field(text: str, says: str) -> None:
    with pytest.raises(RowError, match=says):
        parse_row(text)


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("e\u0301", "\u00e9"),
        ("a\r\nb\rc\td", "a\nb\nc\td"),
        ("\ufeffa\x00b\x1b[0m\x7f\x85", "ab[0m"),
        ("half \ud83d of a pair", "half  of a pair"),
        ("e\x00\u0301", "\u00e9"),
        ("family 👩‍👩‍👧", "family 👩‍👩‍👧"),
    ],
)
def test_text_is_cleaned(dirty: str, clean: str) -> None:
    assert clean_text(dirty) == clean


@given(st.text(st.characters()))
def test_cleaning_twice_is_cleaning_once_and_gives_utf8(text: str) -> None:
    row = clean_row({"prompt": text, "completion": text})
    if row is not None:
        assert clean_row(row) == row
        encode_row(row).encode()


def test_the_space_between_a_plain_prompt_and_its_completion_stays() -> None:
    row = {"prompt": "  The sky is", "completion": " blue.\n\n"}
    assert clean_row(row) == {"prompt": "The sky is", "completion": " blue."}


@pytest.mark.parametrize(
    "row",
    [
        {"text": " \n\x00"},
        {"prompt": "p", "completion": " "},
        {"messages": [{"role": "user", "content": "\t"}]},
        {"prompt": "p", "completion": "", "label": True},
        {"prompt": "p", "chosen": "one answer", "rejected": "one answer\n"},
    ],
)
def test_a_row_with_nothing_left_is_dropped(row: dict[str, Any]) -> None:
    assert clean_row(row) is None


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        (pair("What is it?", prose(1)), pair("what  IS it", prose(2)), True),
        (pair("a", prose(1)), pair("b", prose(1).upper() + "!"), True),
        (pair("a", prose(1)), pair("b", "before " + prose(1) + " after"), True),
        (pair("a", prose(1)), {"text": f"quoted: {prose(1)}"}, True),
        (pair("a", prose(1)), pair("b", " ".join(prose(1).split()[:12])), False),
        (pair("a", "yes"), pair("b", "Yes."), False),
        (pair(prose(1), "b"), pair("a", prose(1)), False),
        (
            {"messages": [{"role": "system", "content": prose(1)}, {"role": "user", "content": "a"}]},
            {"messages": [{"role": "system", "content": prose(1)}, {"role": "user", "content": "b"}]},
            False,
        ),
    ],
    ids=["prompt", "answer", "ngram", "text counts as answer", "12 words", "short", "prompt vs answer", "system"],
)
def test_rows_are_alike_when_they_share_a_prompt_an_answer_or_thirteen_words(
    one: dict[str, Any], other: dict[str, Any], alike: bool
) -> None:
    assert (not features(one).isdisjoint(features(other))) == alike


# -- reading -----------------------------------------------------------------------------------------------------------


def _jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def _json(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def _parquet(path: Path, rows: list[Any]) -> Path:
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    ("name", "write"), [("a.jsonl", _jsonl), ("a.ndjson", _jsonl), ("a.json", _json), ("a.parquet", _parquet)]
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, write: Callable[[Path, list[Any]], Path]) -> None:
    rows = pairs(3)
    read = [(number, json.loads(text)) for number, text in Origin.of(write(tmp_path / name, rows)).read()]
    assert read == list(enumerate(rows, start=1))


def test_bytes_in_a_text_column_are_no_text(tmp_path: Path) -> None:
    [(_, text)] = Origin.of(_parquet(tmp_path / "a.parquet", [{"text": b"raw"}])).read()
    with pytest.raises(RowError, match="none of the shapes"):
        parse_row(text)


def test_lines_keep_their_numbers_across_empty_ones_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b"}')
    assert list(Origin.of(path).read()) == [(1, '{"text": "a"}'), (4, '{"text": "b"}')]


@pytest.mark.parametrize(
    ("name", "content", "error", "says"),
    [
        ("a.jsonl", None, NotFoundError, "no file"),
        ("a.csv", b"a,b", InputError, "csv"),
        ("a.json", b"{}", InputError, "no list"),
        ("a.json", b"[", InputError, "not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\xff\xfe', InputError, "line 2: is not UTF-8"),
        ("a.jsonl", b"\n" + b"x" * (MAX_LINE_BYTES + 1), TooLargeError, "line 2: longer"),
        ("a.parquet", b"PAR1 not really", InputError, "Parquet"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(
    tmp_path: Path, name: str, content: bytes | None, error: type[InputError], says: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=says):
        list(Origin.of(tmp_path / name).read())


def test_without_a_cluster_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(SetupError, match="Ray is not running"):
        build(MemoryStore(), pairs(30))


# -- the build ---------------------------------------------------------------------------------------------------------


@pytest.mark.stack
@pytest.mark.usefixtures("ray_cluster")
class TestBuild:
    def test_every_row_ends_in_one_shard_or_is_held_out(self) -> None:
        store, rows = MemoryStore(), pairs(50)
        card = build(store, rows)
        trained = [row for shard in shards(store, card) for row in shard]
        kept = heldout(store, card)
        assert (card.rows, card.heldout_rows, len(kept)) == (42, 8, 8)
        assert sorted(map(encode_row, trained + kept)) == sorted(map(encode_row, rows))
        assert [len(shard) for shard in shards(store, card)] == [10, 10, 10, 12]
        assert trained != [row for row in rows if row in trained]

    def test_the_card_says_what_a_chat_template_must_know(self) -> None:
        store, rows = MemoryStore(), pairs(50)
        assert build(store, rows).needs == ()
        rows[7]["tools"] = [{"name": "look", "parameters": {"type": "object"}}]
        rows[9]["completion"][0]["thinking"] = "Hm."
        card = build(store, rows, dataset="calling")
        assert card.needs == ("thinking", "tools")
        assert card.pipeline[0].detail == "shape: prompt-completion chat, with thinking, tools"

    def test_neither_the_order_of_rows_nor_the_size_of_blocks_matters(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first = build(MemoryStore(), pairs(200))
        for block_rows, seed in ((40, 1), (64, 2)):
            monkeypatch.setattr(module, "BLOCK_ROWS", block_rows)
            mixed = pairs(200)
            random.Random(seed).shuffle(mixed)
            assert build(MemoryStore(), mixed) == first

    def test_the_seed_changes_the_order_but_not_what_is_held_out(self) -> None:
        one, other = build(MemoryStore(), pairs(50)), build(MemoryStore(), pairs(50), seed=8)
        assert one.heldout == other.heldout
        assert one.shards != other.shards

    def test_few_held_out_rows_change_when_rows_are_added(self) -> None:
        store = MemoryStore()
        before = heldout(store, build(store, pairs(100)))
        after = heldout(store, build(store, pairs(110), dataset="more"))
        assert sum(row in after for row in before) >= 5

    def test_repetitions_and_empty_rows_go_and_the_card_counts_them(self) -> None:
        rows = pairs(30)
        dirty = [pair(f"  {row['prompt'][0]['content']}\r\n", row["completion"][0]["content"]) for row in rows[:5]]
        card = build(MemoryStore(), [*rows, *dirty, pair("q", " "), pair("\x00", "a")])
        assert counts(card) == {
            "read": (37, 37),
            "clean": (37, 35),
            "deduplicate": (35, 30),
            "hold out": (30, 22),
            "decontaminate": (22, 22),
            "shuffle": (22, 22),
            "shard": (22, 22),
        }

    def test_training_rows_that_resemble_held_out_ones_are_dropped(self) -> None:
        store = MemoryStore()
        rows = pairs(60)
        kept = heldout(store, build(store, rows))
        leaks = [
            pair(kept[0]["prompt"][0]["content"].upper(), prose(77)),
            pair("another question", kept[1]["completion"][0]["content"] + "!"),
            pair("a third question", f"see: {kept[2]['completion'][0]['content']} and {prose(78)}"),
        ]
        # A leak may be held out itself; then the row that it leaks is dropped from training instead.
        card = build(store, rows + leaks, dataset="leaky")
        held = set().union(*(features(row) for row in heldout(store, card)))
        trained = [row for shard in shards(store, card) for row in shard]
        assert all(held.isdisjoint(features(row)) for row in trained)
        before, after = counts(card)["decontaminate"]
        assert 1 <= before - after <= 3

    def test_a_template_that_all_rows_share_is_no_leak(self) -> None:
        template = (
            "Below is an instruction that describes a task. Write a response that completes the request in full: "
        )
        rows = [pair(template + prose(number, 6), prose(number + 500)) for number in range(60)]
        assert build(MemoryStore(), rows).rows == 52

    def test_preferences_make_a_dataset_of_their_shape_without_pairs_of_one_answer(self) -> None:
        store = MemoryStore()
        rows = [{"prompt": prose(n, 6), "chosen": prose(n + 100), "rejected": prose(n + 200)} for n in range(40)]
        whole = [{name: f"{rows[0]['prompt']} {prose(n)}" for n, name in enumerate(("chosen", "rejected"))}]
        same = [{"prompt": prose(n + 50, 6), "chosen": prose(n), "rejected": f"{prose(n)} "} for n in range(3)]
        card = build(store, rows[1:] + whole)
        assert card.shape == "preference"
        assert counts(card)["clean"] == (40, 40)
        assert all(row.keys() == {"prompt", "chosen", "rejected"} for row in heldout(store, card))
        assert counts(build(store, rows + same, dataset="more"))["clean"] == (43, 40)

    def test_labelled_answers_need_both_labels_among_those_held_out(self) -> None:
        store = MemoryStore()
        rows = [{"prompt": prose(n, 6), "completion": prose(n + 100), "label": n % 2 == 0} for n in range(40)]
        card = build(store, rows)
        assert card.shape == "unpaired"
        assert {row["label"] for row in heldout(store, card)} == {True, False}
        with pytest.raises(InputError, match="all good or all bad"):
            build(store, [row | {"label": True} for row in rows], dataset="praise")

    def test_other_fields_are_left_out_and_named(self) -> None:
        card = build(MemoryStore(), [{"text": prose(n), "id": n, "url": "x"} for n in range(30)])
        assert "id (30 rows), url (30 rows)" in card.pipeline[0].detail

    def test_the_first_wrong_line_is_named_and_nothing_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "BLOCK_ROWS", 16)
        rows: list[Any] = pairs(100)
        rows[40] = {"prompt": "p"}
        rows[90] = {"text": 7}
        store = MemoryStore()
        with pytest.raises(InputError, match=r"a.jsonl, line 41: has the fields"):
            build(store, _jsonl(tmp_path / "a.jsonl", rows))
        assert not list(store.list(""))

    def test_several_files_are_one_dataset_and_a_wrong_row_names_its_file(self, tmp_path: Path) -> None:
        rows = pairs(50)
        one, two = _jsonl(tmp_path / "one.jsonl", rows[:20]), _parquet(tmp_path / "two.parquet", rows[20:])
        assert build(MemoryStore(), [one, two]) == build(MemoryStore(), rows)
        bad = _json(tmp_path / "bad.json", [rows[0], {"prompt": "p"}])
        with pytest.raises(InputError, match=r"bad.json, line 2: has the fields"):
            build(MemoryStore(), [one, bad])

    @pytest.mark.parametrize(
        ("rows", "options", "says"),
        [
            ([{"text": "a"}, {"text": "b"}, {"prompt": "p", "completion": "c"}], {}, "row 3.*row 1"),
            (pairs(8), {}, "8 different rows are left"),
            ([], {}, "no row"),
            (pairs(30), {"shard_rows": 0}, "no dataset"),
            ([pair("the very same question", prose(n)) for n in range(4)], {"heldout_rows": 2}, "too like"),
        ],
    )
    def test_input_that_makes_no_dataset_is_refused(self, rows: list[Any], options: dict[str, Any], says: str) -> None:
        with pytest.raises(InputError, match=says):
            build(MemoryStore(), rows, **options)

    def test_more_rows_than_the_limit_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "MAX_ROWS", 20)
        with pytest.raises(TooLargeError, match="more than 20 rows"):
            build(MemoryStore(), pairs(21))

    def test_the_same_dataset_again_is_the_same_card_and_another_one_is_refused(self) -> None:
        store = MemoryStore()
        first = build(store, pairs(50))
        assert build(store, pairs(50), now=NOW + 60) == first
        with pytest.raises(StateError, match="exists already"):
            build(store, pairs(51))
        assert DatasetCard.model_validate_json(store.get(dataset_key("toy"), max_bytes=10**6)) == first

    def test_held_out_rows_are_not_among_the_blobs(self) -> None:
        store = MemoryStore()
        card = build(store, pairs(50))
        assert not [key for key in store.list("blobs/") if card.heldout.sha256 in key]

    def test_nothing_of_ray_data_is_printed_or_left_changed(self, capfd: pytest.CaptureFixture[str]) -> None:
        from ray.data import DataContext

        before = DataContext.get_current()
        build(MemoryStore(), pairs(50))
        assert DataContext.get_current() is before
        out, err = capfd.readouterr()
        assert out == ""
        assert "Running" not in err
        assert "Execution plan" not in err
