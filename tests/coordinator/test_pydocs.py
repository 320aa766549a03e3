"""The docstring dataset is the same every time, quiet, and of the shape that TRL takes."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from coordinator import pydocs


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return list(pydocs.rows())


def test_the_standard_library_gives_thousands_of_rows(rows: list[dict]) -> None:
    assert 2500 < len(rows) < 5000


def test_every_row_is_a_conversational_pair_of_a_useful_length(rows: list[dict]) -> None:
    for row in rows:
        assert list(row) == ["prompt", "completion"]
        (prompt,), (completion,) = row["prompt"], row["completion"]
        assert prompt["role"] == "user"
        assert completion["role"] == "assistant"
        assert pydocs.MIN_CHARACTERS <= len(completion["content"]) <= pydocs.MAX_CHARACTERS


def test_every_name_is_asked_about_once_in_sorted_order_and_none_is_private(rows: list[dict]) -> None:
    questions = [row["prompt"][0]["content"] for row in rows]
    names = [question.split("`")[1] for question in questions]
    assert names == sorted(set(names))
    assert not any(part.startswith("_") for name in names for part in name.split("."))


@pytest.mark.parametrize("name", ["os.path.join", "os.listdir", "json.dumps", "str.join", "asyncio.create_task"])
def test_well_known_names_are_there(rows: list[dict], name: str) -> None:
    wanted = name if name != "str.join" else "builtins.str.join"
    assert {"role": "user", "content": pydocs.question(wanted)} in [row["prompt"][0] for row in rows]


def test_nothing_is_printed_and_no_window_module_is_imported() -> None:
    script = (
        "import sys, coordinator.pydocs as p; n = len(p.documented()); assert n == len(list(p.rows()));"
        "assert not {'antigravity', 'this', 'turtle', 'tkinter', 'idlelib'} & set(sys.modules); assert n > 2500"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert time.monotonic() - began < 30


def test_the_same_python_gives_the_same_rows(rows: list[dict]) -> None:
    assert list(pydocs.rows()) == rows


def test_a_package_that_changes_the_standard_library_changes_no_row(
    rows: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit() -> None:
        """Somebody else's, and long enough to be a row of the dataset."""

    monkeypatch.setattr("logging.Logger.info_once", submit, raising=False)
    assert "logging.Logger.info_once" in pydocs.documented()
    assert list(pydocs.rows()) == rows
