"""A version on a hub, with the hub's real client: what arrives, what stays here, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_stand_in import TOKEN, Hub, Repository, running_hub
from version_folder import KEY, ONE_FILE, PUBLIC, TWO_FILES, publish_version, pulled

from rankup.errors import (
    BusyError,
    ConflictError,
    DeniedError,
    InputError,
    IntegrityError,
    NotFoundError,
    RankupError,
    SetupError,
    StateError,
    UnauthenticatedError,
    UnreachableError,
)
from rankup.export.hub import HubUpload, plan_upload, publish
from rankup.folder import ENVELOPE_NAME, LOCK_NAME, PARTIAL_NAME, STATE_NAME
from rankup.signing import generate_private_key, parse_private_key, public_key_hex
from rankup.store import MemoryStore
from rankup.versions import manifest_digest, open_envelope

REPO = "someone/toy"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The client reads its environment once, when it is imported: what it has read is changed here."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with running_hub() as running:
        yield running


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def folder(store: MemoryStore, tmp_path: Path) -> Path:
    """Version 1, in one file; version 0 is in two."""
    base = publish_version(store, 0, None, TWO_FILES)
    publish_version(store, 1, base, ONE_FILE)
    return pulled(store, tmp_path / "model")


def send(folder: Path, hub: Hub, **options: Any) -> HubUpload:
    return publish(plan_upload(folder), options.pop("repo", REPO), token=TOKEN, endpoint=hub.url, **options)


# -- what arrives ------------------------------------------------------------------------------------------------------


def test_a_version_arrives_whole_with_its_tag_and_nothing_else(folder: Path, hub: Hub) -> None:
    private = {"notes.txt": "mine", ".env": "SECRET=1", f"{PARTIAL_NAME}/x": "half"}
    for name, text in private.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    done = send(folder, hub, private=True)
    repository = hub.repositories[REPO]
    files = repository.files("v1") or {}
    assert set(files) - {".gitattributes"} == {
        ENVELOPE_NAME,
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    for name in set(files) - {".gitattributes"}:
        assert files[name] == (folder / name).read_bytes()
    assert not {STATE_NAME, LOCK_NAME, *private} & set(files)
    assert (done.repo, done.url, done.tag, done.uploaded) == (REPO, f"{hub.url}/{REPO}", "v1", True)
    assert repository.refs["v1"] == repository.refs["main"] == done.commit
    assert repository.private
    manifest, digest, key = open_envelope(files[ENVELOPE_NAME], publisher_key=PUBLIC)
    _, message, _ = repository.commits[-1]
    assert f"toy version 1 (manifest {digest[:16]})" in message
    assert f"manifest {digest}\nsigned by {key}" in message
    assert digest == manifest_digest(manifest)
    assert digest in repository.tags["v1"]


def test_the_hubs_own_download_gives_the_same_bytes(folder: Path, hub: Hub, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    send(folder, hub)
    there = Path(snapshot_download(REPO, revision="v1", endpoint=hub.url, token=TOKEN, local_dir=tmp_path / "again"))
    for file in plan_upload(folder).files:
        assert (there / file.path).read_bytes() == (folder / file.path).read_bytes()


def test_the_next_version_replaces_the_files_of_the_last_one(store: MemoryStore, hub: Hub, tmp_path: Path) -> None:
    """transformers would load model.safetensors before the files of an index, old or not."""
    first = publish_version(store, 0, None, ONE_FILE)
    send(pulled(store, tmp_path / "first"), hub)
    publish_version(store, 1, first, TWO_FILES)
    done = send(pulled(store, tmp_path / "second"), hub)
    assert done.deleted == ("model.safetensors",)
    assert hub.names("main") >= set(TWO_FILES)
    assert "model.safetensors" not in hub.names("main")
    assert "model.safetensors" in hub.names("v0")


def test_publishing_twice_is_publishing_once(folder: Path, hub: Hub) -> None:
    first = send(folder, hub)
    received = hub.received_bytes
    second = send(folder, hub)
    assert not second.uploaded
    assert second.commit == first.commit
    assert hub.received_bytes == received
    assert len(hub.repositories[REPO].commits) == 2


def test_after_an_interruption_only_what_is_missing_is_sent(folder: Path, hub: Hub) -> None:
    hub.fail = {r"POST /api/models/.*/commit/main": 500}
    with pytest.raises(UnreachableError):
        send(folder, hub)
    received = hub.received_bytes
    assert received > (folder / "model.safetensors").stat().st_size
    hub.fail = {r"POST /api/models/.*/tag/.*": 503}
    with pytest.raises(UnreachableError):
        send(folder, hub)
    assert hub.repositories[REPO].tags == {}
    hub.fail = {}
    assert send(folder, hub).uploaded
    assert hub.received_bytes == received
    assert len(hub.repositories[REPO].commits) == 2


def test_another_branch_leaves_main_as_it_is(folder: Path, hub: Hub) -> None:
    done = send(folder, hub, revision="candidates")
    assert done.revision == "candidates"
    assert hub.names("main") == {".gitattributes"}
    assert "model.safetensors" in hub.names("candidates") & hub.names("v1")


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "tokenizer.json"])
def test_a_folder_that_does_not_verify_is_refused_before_the_hub_is_asked(name: str, folder: Path, hub: Hub) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(IntegrityError, match=name):
        send(folder, hub)
    assert hub.requests == []


def test_a_forged_manifest_another_key_masters_and_empty_folders_are_refused(
    store: MemoryStore, folder: Path, hub: Hub, tmp_path: Path
) -> None:
    other = public_key_hex(parse_private_key(generate_private_key()))
    assert other != public_key_hex(KEY)
    with pytest.raises(IntegrityError):
        plan_upload(folder, publisher_key=other)
    (folder / ENVELOPE_NAME).write_bytes((folder / ENVELOPE_NAME).read_bytes()[:-9])
    with pytest.raises(IntegrityError):
        plan_upload(folder)
    with pytest.raises(StateError, match="masters"):
        plan_upload(pulled(store, tmp_path / "masters", want="master"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError):
        plan_upload(tmp_path / "empty")
    assert hub.requests == []


def test_a_repository_with_something_else_in_it_is_left_alone(folder: Path, hub: Hub) -> None:
    repository = hub.repositories[REPO] = Repository(private=False)
    repository.commit("main", "mine", {"README.md": b"# mine", "pytorch_model.bin": b"weights"})
    with pytest.raises(StateError, match=r"pytorch_model\.bin"):
        send(folder, hub)
    assert len(repository.commits) == 1
    assert send(folder, hub, repo="someone/other").uploaded


def test_the_tag_of_other_contents_is_never_moved(store: MemoryStore, folder: Path, hub: Hub, tmp_path: Path) -> None:
    send(folder, hub)
    rewritten = publish_version(store, 0, None, ONE_FILE)
    publish_version(store, 1, rewritten, ONE_FILE)
    before = dict(hub.repositories[REPO].refs)
    with pytest.raises(StateError, match="tag v1 already"):
        send(pulled(store, tmp_path / "forked"), hub)
    assert hub.repositories[REPO].refs == before


ARRIVES_WRONG = {
    "a file that .gitignore names": {"ignored": frozenset({"model.safetensors"})},
    "a small file that .gitignore names": {"ignored": frozenset({"config.json"})},
    "a changed byte": {"spoil": staticmethod(lambda data: data[:-1] + b"\n" if data else data)},
    "a byte too many": {"spoil": lambda data: data + b"\n"},
}


@pytest.mark.parametrize("case", ARRIVES_WRONG)
def test_what_does_not_arrive_as_it_was_sent_gets_no_tag(case: str, folder: Path, hub: Hub) -> None:
    for name, value in ARRIVES_WRONG[case].items():
        setattr(hub, name, getattr(value, "__func__", value))
    with pytest.raises(IntegrityError, match="does not hold"):
        send(folder, hub)
    assert hub.repositories[REPO].tags == {}


ANSWERS: dict[str, tuple[str, int, type[RankupError], str]] = {
    "no right to make it": ("POST /api/repos/create", 403, DeniedError, "write access"),
    "no right to write": (r"POST .*/commit/main", 403, DeniedError, "write access"),
    "a broken card": ("POST /api/validate-yaml", 400, InputError, "Correct"),
    "no such repository": (r"GET .*/refs", 404, NotFoundError, "name"),
    "somebody was faster": (r"POST .*/commit/main", 412, ConflictError, "minute"),
    "too many requests": (r"POST .*/commit/main", 429, BusyError, "minute"),
    "a fault of the hub": (r"POST .*/commit/main", 500, UnreachableError, "minute"),
    "storage refuses": (r"PUT /storage/.*", 403, DeniedError, "write access"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_what_the_hub_says_becomes_an_error_with_a_remedy(case: str, folder: Path, hub: Hub) -> None:
    pattern, status, error, remedy = ANSWERS[case]
    hub.fail = {pattern: status}
    with pytest.raises(RankupError) as caught:
        send(folder, hub)
    assert type(caught.value) is error
    assert remedy in caught.value.remedy
    assert TOKEN not in caught.value.cause
    assert "\n" not in caught.value.cause


def test_a_wrong_token_a_wrong_name_and_no_hub_are_told_apart(
    folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_upload(folder)
    with pytest.raises(UnauthenticatedError, match="token"):
        publish(plan, REPO, token="hf_wrong", endpoint=hub.url)
    for name in ("a/b/c", "-toy", "to--y", "ü"):
        with pytest.raises(InputError, match="no name of a repository"):
            publish(plan, name, token=TOKEN, endpoint=hub.url)
    with pytest.raises(UnreachableError):
        publish(plan, REPO, token=TOKEN, endpoint="http://127.0.0.1:9")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SetupError, match="offline"):
        publish(plan, REPO, token=TOKEN, endpoint=hub.url)


def test_a_hub_without_xet_is_told_apart(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hf_xet")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(UnreachableError) as caught:
        send(folder, hub)
    assert "HF_HUB_DISABLE_XET=1" in caught.value.remedy
    assert hub.repositories[REPO].tags == {}


def test_a_pull_into_the_folder_and_an_upload_exclude_each_other(folder: Path, hub: Hub) -> None:
    from rankup.folder import folder_lock

    plan = plan_upload(folder)
    with folder_lock(folder), pytest.raises(StateError, match="another process"):
        publish(plan, REPO, token=TOKEN, endpoint=hub.url)
    assert hub.requests == []


# -- the command -------------------------------------------------------------------------------------------------------

SCRIPT = """
import typer
from rankup.cli import publish
from rankup.cli.output import exit_for
app = typer.Typer()
publish.register(app)
app.command("other")(lambda: None)
try:
    raise SystemExit(app(standalone_mode=False))
except Exception as exc:
    raise SystemExit(exit_for(exc))
"""


def command(*args: object, hub: Hub) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": hub.url}
    environment |= {"HF_TOKEN": TOKEN, "PYTHONPATH": str(Path.cwd()), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, "publish-hub", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


@pytest.mark.slow
def test_the_command_lists_uploads_and_says_what_it_did(folder: Path, hub: Hub) -> None:
    listed = command(folder, "--repo", REPO, "--dry-run", hub=hub)
    assert listed.returncode == 0, listed.stderr
    assert "model.safetensors" in listed.stdout
    assert "5 files" in listed.stdout
    assert hub.requests == []
    done = command(folder, "--repo", REPO, "--json", hub=hub)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["url"], told["tag"], told["uploaded"]) == (f"{hub.url}/{REPO}", "v1", True)
    assert {file["path"] for file in told["files"]} == hub.names("v1") - {".gitattributes"}
    (folder / "config.json").write_text("{ }")
    refused = command(folder, "--repo", REPO, hub=hub)
    assert refused.returncode == 65
    assert "config.json" in refused.stderr
    assert "remedy: " in refused.stderr
