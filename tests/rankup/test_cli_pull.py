"""`rankup pull` as a person and a program see it."""

import json
from pathlib import Path
from typing import Any

import pytest
from history import MODEL, History, make_history
from typer.testing import CliRunner

from rankup.cli import app
from rankup.cli.pull import parse_revision
from rankup.errors import IntegrityError, RankupError
from rankup.signing import generate_private_key, parse_private_key, public_key_hex
from rankup.versions import manifest_digest


@pytest.fixture(scope="module")
def history() -> History:
    return make_history(contributions=1, filler_bytes=100_000, patches=True)


@pytest.fixture(scope="module")
def served(history: History, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The history as a plain folder."""
    root = tmp_path_factory.mktemp("mirror")
    for key in history.store.list(""):
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(history.store.get(key, max_bytes=2**30))
    return root


def run(served: Path, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["pull", str(served), *arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def run_json(served: Path, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(served, *arguments, "--json"))
    return found


def test_a_pull_says_what_it_will_fetch_and_what_it_fetched(served: Path, tmp_path: Path) -> None:
    to = str(tmp_path)
    first = run(served, f"{MODEL}@1", "--to", to)
    assert "plan" in first
    assert "from_pretrained" in first
    second = run(served, MODEL, "--to", to)
    assert "2 by a patch" in second
    assert "instead of" in second
    assert "plan" not in run(served, MODEL, "--to", to)


def test_a_program_gets_the_plan_and_the_result(history: History, served: Path, tmp_path: Path) -> None:
    to = str(tmp_path)
    run(served, MODEL, "--to", to, "--revision", "1")
    dry = run_json(served, MODEL, "--to", to, "--dry-run")
    assert "fetched_bytes" not in dry
    found = run_json(served, MODEL, "--to", to, "--limit-rate", "50M", "--parallel", "2")
    assert found["plan"] == dry["plan"]
    assert (found["version"], found["manifest"]) == (2, manifest_digest(history.manifests[2]))
    assert found["fetched_bytes"] == found["plan"]["fetch_bytes"] < found["plan"]["full_bytes"]
    routes = {file["path"]: file["route"] for file in found["plan"]["files"]}
    assert routes["model-00001-of-00002.safetensors"] == "patches"
    assert routes["config.json"] == "here"
    assert (found["warnings"], found["folder"]) == ([], to)


def test_a_dry_run_prints_a_route_for_every_file(served: Path, tmp_path: Path) -> None:
    shown = run(served, MODEL, "--to", str(tmp_path / "none"), "--dry-run")
    assert "model-00002" in shown
    assert not (tmp_path / "none").exists()


def test_masters_come_from_the_rounds(served: Path, tmp_path: Path) -> None:
    to = str(tmp_path)
    run(served, f"{MODEL}@0", "--to", to, "--master")
    found = run_json(served, MODEL, "--to", to, "--master")
    assert (found["plan"]["rounds"], found["plan"]["contributions"]) == ([1, 2], 2)
    assert {file["route"] for file in found["plan"]["files"]} == {"rounds"}


def test_a_wrong_key_and_a_version_named_twice_are_refused(served: Path, tmp_path: Path) -> None:
    other = public_key_hex(parse_private_key(generate_private_key()))
    with pytest.raises(IntegrityError):
        run(served, MODEL, "--to", str(tmp_path), "--key", other)
    with pytest.raises(RankupError, match="twice"):
        run(served, f"{MODEL}@1", "--to", str(tmp_path), "--revision", "2")


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, None), ("latest", None), ("0", 0), ("12", 12), ("ABCDEF0123", "abcdef0123"), ("1234567", "1234567")],
)
def test_a_revision_is_a_number_or_the_beginning_of_a_digest(text: str | None, expected: int | str | None) -> None:
    assert parse_revision(text) == expected
