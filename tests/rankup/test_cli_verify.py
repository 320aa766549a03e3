"""`rankup verify` as a user types it: what it says, what it returns, and that it says no more than it has proved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from changed_history import LAST, MODEL, SUMS, make_changed_history
from typer.testing import CliRunner, Result

from rankup.cli import verify
from rankup.cli.output import exit_for
from rankup.folder import ENVELOPE_NAME
from rankup.pull import StoreSource, pull
from rankup.signing import generate_private_key, parse_private_key, public_key_hex

HISTORY = make_changed_history()
KEY = public_key_hex(HISTORY.keys[2])


def run(*args: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    app = typer.Typer()
    verify.register(app)
    result: Result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception is None or isinstance(result.exception, SystemExit):
        return result.exit_code, result.stdout, result.stderr
    assert isinstance(result.exception, Exception)
    return exit_for(result.exception), result.stdout, str(getattr(result.exception, "cause", ""))


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bucket as a plain folder."""
    top = tmp_path_factory.mktemp("mirror")
    for key in HISTORY.store.list(""):
        path = top / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(HISTORY.store.get(key, max_bytes=2**20))
    return top


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pull(StoreSource(HISTORY.store), MODEL, None, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("level", "proves"),
    [
        ("chain", "0 to 12 are signed"),
        ("round", "version 12 has the bits of its replay from version 11"),
        ("all", "versions 1 to 12 has the bits that follow"),
        (None, "version 12 has the bits of its replay from version 11"),
    ],
)
def test_a_level_says_what_it_proved_and_what_it_did_not(mirror: Path, level: str | None, proves: str) -> None:
    code, out, _ = run(mirror, MODEL, *(("--level", level) if level else ()))
    assert code == 0
    assert proves in " ".join(out.split())
    assert "not proved     the held-out losses" in out
    assert KEY in out


def test_json_has_the_same(mirror: Path, tmp_path: Path) -> None:
    code, out, _ = run(mirror, f"{MODEL}@10", "--json", "--cache", tmp_path, "--key", KEY)
    report: dict[str, Any] = json.loads(out)
    assert (code, report["ok"], report["level"], report["version"]) == (0, True, "round", 10)
    assert report["publisher_key"] == public_key_hex(HISTORY.keys[1]), "the key of version 10's time"
    assert report["proved"]
    assert report["unproved"]
    kept = {HISTORY.contribution(of, number) for of, numbers in SUMS[10].items() for number in numbers}
    assert kept <= {path.name for path in tmp_path.iterdir()}


def test_a_pulled_folder_is_verified_without_a_network(folder: Path) -> None:
    code, out, _ = run(folder)
    assert code == 0
    assert "every file of version 12 is here" in out
    readme = folder / "README.md"
    readme.write_text("# a better model")
    code, out, err = run(folder)
    assert (code, out) == (65, "")
    assert "differs from its manifest in: README.md" in err
    code, out, _ = run(folder, "--json")
    assert (code, json.loads(out)["mismatches"]) == (65, ["README.md"])


def test_a_folder_that_came_with_its_manifest_but_was_not_pulled_needs_the_key(folder: Path) -> None:
    (folder / ".rankup.json").unlink()
    code, _, err = run(folder)
    assert code != 0
    assert "no complete version" in err
    code, out, _ = run(folder, "--key", KEY)
    assert code == 0
    assert "every file of version 12 is here" in out
    (folder / "README.md").write_text("# a better model")
    assert run(folder, "--key", KEY)[0] == 65


WRONG: list[tuple[str, tuple[object, ...], int, str]] = [
    ("a level that is none", ("DIR", "--level", "some"), 2, "no level"),
    ("a folder has no chain", ("DIR", "--level", "chain"), 2, "pulled folder"),
    ("a folder has one version", ("DIR", "toy@3"), 2, "one version"),
    ("a proof of nothing", ("DIR", "--proof", "x"), 2, "proof is of a contribution"),
    ("a contribution that is not there", ("DIR", "--contribution", "absent"), 2, "neither a file nor"),
    ("a stranger's key", ("DIR", "--key", public_key_hex(parse_private_key(generate_private_key()))), 65, "key"),
]


@pytest.mark.parametrize(("args", "code", "says"), [pytest.param(a, c, s, id=i) for i, a, c, s in WRONG])
def test_a_wrong_call_is_explained(folder: Path, args: tuple[object, ...], code: int, says: str) -> None:
    found, _, err = run(*(folder if arg == "DIR" else arg for arg in args))
    assert found == code
    assert says in err


def test_a_contribution_is_proved_with_the_folder_and_then_with_the_manifest_alone(
    folder: Path, tmp_path: Path
) -> None:
    digest = HISTORY.contribution(2, 0)
    delta, proof = tmp_path / "mine.delta", tmp_path / "mine.proof"
    delta.write_bytes(HISTORY.deltas[digest])
    code, out, _ = run(folder, "--contribution", delta, "--write-proof", proof)
    assert code == 0
    assert f"{digest[:16]}… is in the sum of toy version {LAST}" in out
    assert "20000 / 2^16" in out
    manifest = folder / ENVELOPE_NAME
    code, out, _ = run(manifest, "--contribution", digest, "--proof", proof)
    assert code == 0
    assert "Compare the key" in out
    code, out, _ = run(manifest, "--contribution", digest, "--proof", proof, "--key", KEY, "--json")
    shown = json.loads(out)
    assert (code, shown["in_sum"], shown["leaf"]["version"], shown["pinned"]) == (0, True, 2, True)
    code, _, err = run(manifest, "--contribution", HISTORY.contribution(2, 1), "--proof", proof)
    assert code == 65
    assert "the proof is of the contribution" in err


def test_a_contribution_that_was_taken_out_is_not_proved(tmp_path: Path) -> None:
    pull(StoreSource(HISTORY.store), MODEL, 3, tmp_path)
    code, out, err = run(tmp_path, "--contribution", HISTORY.contribution(1, 1))
    assert (code, out) == (2, "")
    assert "was revoked" in err
