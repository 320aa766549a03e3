"""Which prompts a teacher is asked, and the file that keeps its answers, without a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankup.errors import InputError
from worker.answers import Answer, AnswersFile, answers_progress, asked_rows, batches, prompt_of

TRAINING, OTHER = "ab" * 32, "cd" * 32
USER, SAID, AGAIN = (
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "so"},
    {"role": "user", "content": "and?"},
)


def answers(*rows: int) -> list[Answer]:
    return [Answer(row=row, text=f"answer {row}\u2028\n", ended=row % 2 == 0) for row in rows]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "What is 2?", "completion": "two"}, "What is 2?"),
        ({"prompt": [USER], "completion": [SAID]}, [USER]),
        ({"messages": [USER, SAID]}, [USER]),
        ({"messages": [USER, SAID, AGAIN, SAID]}, [USER, SAID, AGAIN]),
        ({"messages": [USER, SAID, AGAIN]}, [USER]),
        ({"messages": [USER]}, [USER]),
    ],
)
def test_the_teacher_is_asked_what_comes_before_the_last_answer(row: dict[str, Any], prompt: Any) -> None:
    assert prompt_of(row) == prompt


@pytest.mark.parametrize("row", [{"text": "once"}, {"prompt": ""}, {"messages": [SAID]}, {"messages": []}, {}])
def test_a_row_that_asks_nothing_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="asks a teacher nothing"):
        prompt_of(row)


@given(st.integers(0, 60), st.integers(1, 80), st.integers(0, 2**63 - 1))
def test_no_more_rows_are_asked_than_the_steps_have_examples_and_only_those_that_fit(
    rows: int, wanted: int, seed: int
) -> None:
    looked: list[int] = []

    def fits(row: int) -> bool:
        looked.append(row)
        return row % 3 != 0

    asked = asked_rows(rows, wanted, seed, fits)
    fitting = [row for row in range(rows) if row % 3 != 0]
    assert len(asked) == min(wanted, len(fitting))
    assert list(asked) == sorted(set(asked))
    assert set(asked) <= set(fitting)
    assert len(looked) == len(set(looked)), "each row is tokenised once"
    if wanted <= len(fitting):
        assert [row for row in looked if row % 3 != 0] == sorted(asked, key=looked.index), "and none in vain"
    assert asked_rows(rows, wanted, seed, lambda row: row % 3 != 0) == asked


def test_another_seed_asks_other_rows() -> None:
    drawn = {asked_rows(1000, 5, seed, lambda _: True) for seed in range(20)}
    assert len(drawn) == 20


@given(st.dictionaries(st.integers(0, 1000), st.integers(1, 99), min_size=1, max_size=40), st.integers(1, 9))
def test_batches_hold_every_row_once_and_prompts_of_about_one_length(lengths: dict[int, int], size: int) -> None:
    made = batches(lengths, size)
    assert sorted(row for batch in made for row in batch) == sorted(lengths)
    assert all(len(batch) == size for batch in made[:-1])
    assert 1 <= len(made[-1]) <= size
    in_order = [lengths[row] for batch in made for row in batch]
    assert in_order == sorted(in_order, reverse=True)


def test_answers_are_there_again_and_only_for_the_training_that_they_were_given_in(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    assert answers_progress(path) == (0, 0.0)
    with AnswersFile(path, TRAINING) as file:
        assert file.answers == {}
        file.add(answers(3, 1), 2.0)
        file.add(answers(7), 0.5)
    assert answers_progress(path) == (3, 2.5)
    with AnswersFile(path, TRAINING) as file:
        assert file.answers == {answer.row: answer for answer in answers(3, 1, 7)}
        file.add(answers(2), 1.0)
    assert answers_progress(path) == (4, 3.5)
    with AnswersFile(path, OTHER) as file:
        assert file.answers == {}
    assert answers_progress(path) == (0, 0.0)


def _cut(data: bytes) -> bytes:
    return data[:-3]


def _no_end(data: bytes) -> bytes:
    return data[:-1]


def _garbled(data: bytes) -> bytes:
    head, first, second, _ = data.split(b"\n")
    return b"\n".join([head, first, second.replace(b'"row"', b'"raw"'), first, b""])


@pytest.mark.parametrize("damage", [_cut, _no_end, _garbled])
def test_what_a_crash_left_half_written_is_dropped_and_written_again(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswersFile(path, TRAINING) as file:
        file.add(answers(0, 1), 1.0)
        file.add(answers(2, 3), 1.0)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert answers_progress(path) == (2, 1.0)
    with AnswersFile(path, TRAINING) as file:
        assert sorted(file.answers) == [0, 1]
        file.add(answers(2, 3), 1.0)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("data", [b"", b"{}\n", b'{"format":"rankup.answers/0","training":"%s"}\n' % (b"ab" * 32)])
def test_a_file_that_is_none_is_replaced(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(data)
    assert answers_progress(path) == (0, 0.0)
    with AnswersFile(path, TRAINING) as file:
        file.add(answers(1), 1.0)
    assert answers_progress(path) == (1, 1.0)
