"""Pulling over real HTTP, with everything that goes wrong there."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_server import Faults, Served, serve
from history import MODEL, History, make_history

from rankup import folder
from rankup.errors import (
    BusyError,
    DiskFullError,
    InputError,
    IntegrityError,
    NotFoundError,
    SetupError,
    StateError,
    UnreachableError,
)
from rankup.pull import GatewaySource, Pulled, PullProgress, StoreSource, pull
from rankup.records import FileEntry, Manifest
from rankup.signing import generate_private_key, parse_private_key, public_key_hex
from rankup.sources import Patience
from rankup.store import blob_key
from rankup.versions import manifest_digest

QUICK = Patience(attempts=4, first_pause_s=0.01, longest_pause_s=0.02)


@pytest.fixture
def served() -> Iterator[Served]:
    with serve(make_history()) as running:
        yield running


@pytest.fixture
def large() -> Iterator[Served]:
    """With one tensor of 3 MB, so that there is something to interrupt."""
    with serve(make_history(contributions=1, filler_bytes=6_000_000)) as running:
        yield running


def fetch(served: Served, to: Path, version: int | None = None, **options: Any) -> Pulled:
    with GatewaySource(served.url, timeout_s=10) as source:
        return pull(source, MODEL, version, to, patience=options.pop("patience", QUICK), **options)


def names(to: Path) -> set[str]:
    return {path.name for path in to.iterdir() if not path.name.startswith(".")}


def require_exactly(to: Path, history: History, files: tuple[FileEntry, ...]) -> None:
    """The folder holds these files with the right bytes, and nothing else that can be seen."""
    assert names(to) == {file.path for file in files}
    for file in files:
        assert (to / file.path).read_bytes() == history.blob(file), file.path
    assert not (to / folder.PARTIAL_NAME).exists()


def state_of(to: Path) -> folder.FolderState:
    state = folder.read_folder_state(to)
    assert state is not None
    return state


# -- what a pull does --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 1, 2, None])
def test_a_pull_leaves_exactly_the_files_of_the_version(served: Served, tmp_path: Path, version: int | None) -> None:
    pulled = fetch(served, tmp_path, version)
    manifest = served.history.manifests[2 if version is None else version]
    assert (pulled.manifest, pulled.digest) == (manifest, manifest_digest(manifest))
    require_exactly(tmp_path, served.history, manifest.export_files())
    state = state_of(tmp_path)
    assert (state.version, state.complete, state.publisher_key) == (manifest.version, True, pulled.publisher_key)


def test_masters_can_be_pulled_instead_of_exports(served: Served, tmp_path: Path) -> None:
    manifest = fetch(served, tmp_path, want="master").manifest
    require_exactly(tmp_path, served.history, tuple(group.master for group in manifest.groups))


def test_an_update_fetches_only_what_changed_and_removes_what_is_gone(served: Served, tmp_path: Path) -> None:
    fetch(served, tmp_path, 0)
    (tmp_path / "notes.txt").write_text("the user's own")
    served.object_requests.clear()
    manifest = fetch(served, tmp_path).manifest
    old = {file.sha256 for file in served.history.manifests[0].export_files()}
    asked = {path.lstrip("/") for path, _, _ in served.object_requests}
    assert asked == {file.sha256 for file in manifest.export_files()} - old
    assert names(tmp_path) == {file.path for file in manifest.export_files()} | {"notes.txt"}
    assert "old-tokenizer.json" not in names(tmp_path)


def test_pulling_again_fetches_nothing_and_mends_a_damaged_file(served: Served, tmp_path: Path) -> None:
    manifest = fetch(served, tmp_path).manifest
    served.object_requests.clear()
    fetch(served, tmp_path)
    assert served.object_requests == []
    broken = tmp_path / manifest.groups[0].export.path
    data = bytearray(broken.read_bytes())
    data[-1] ^= 1
    broken.write_bytes(data)
    fetch(served, tmp_path)
    assert len(served.object_requests) == 1
    require_exactly(tmp_path, served.history, manifest.export_files())


def test_two_files_with_the_same_bytes_are_fetched_once(served: Served, tmp_path: Path) -> None:
    history = served.history
    twin = history.manifests[2].files[0].model_copy(update={"path": "twin.md"})
    manifest = history.manifests[2].model_copy(update={"files": (*history.manifests[2].files, twin)})
    history.manifests[2] = manifest
    history.publish(manifest)
    history.point(2)
    fetch(served, tmp_path)
    require_exactly(tmp_path, history, manifest.export_files())
    assert len(served.object_requests) == len(manifest.export_files()) - 1


def test_progress_never_exceeds_the_total_and_ends_at_it(served: Served, tmp_path: Path) -> None:
    seen: list[PullProgress] = []
    manifest = fetch(served, tmp_path, progress=seen.append).manifest
    assert seen[-1].stage == "installing"
    downloads = [report for report in seen if report.stage == "downloading"]
    assert downloads[-1].done_bytes == sum(file.size_bytes for file in manifest.export_files())
    assert all(0 <= report.done_bytes <= report.total_bytes for report in seen)


def test_a_bucket_serves_the_same_version_as_the_gateway(served: Served, tmp_path: Path) -> None:
    one = fetch(served, tmp_path / "http")
    other = pull(StoreSource(served.history.store), MODEL, None, tmp_path / "store")
    assert one.digest == other.digest
    require_exactly(tmp_path / "store", served.history, one.manifest.export_files())


def test_the_bearer_token_goes_to_the_gateway_and_never_along_with_a_redirect(served: Served, tmp_path: Path) -> None:
    with GatewaySource(served.url, token="secret-token") as source:
        pull(source, MODEL, None, tmp_path)
    assert {authorization for _, authorization in served.gateway_requests} == {"Bearer secret-token"}
    assert {authorization for _, authorization, _ in served.object_requests} == {None}


# -- a network that fails ----------------------------------------------------------------------------------------------


def cut_once(faults: Faults) -> None:
    faults.cut_after, faults.cuts = 700, 1


FAULTS: list[tuple[str, Callable[[Faults], None]]] = [
    ("every connection is cut after 5000 bytes", lambda faults: setattr(faults, "cut_after", 5000)),
    ("one connection is cut", cut_once),
    ("the gateway is away for three requests", lambda faults: setattr(faults, "unavailable", 3)),
    ("no length is told", lambda faults: setattr(faults, "hide_length", True)),
    ("links run out", lambda faults: setattr(faults, "expired_links", 3)),
    ("one wrong byte, once", lambda faults: setattr(faults, "wrong_bytes", 1)),
    ("too many bytes, once", lambda faults: setattr(faults, "too_long", 1)),
]


@pytest.mark.parametrize("break_it", [pytest.param(change, id=name) for name, change in FAULTS])
def test_a_pull_rides_out(served: Served, tmp_path: Path, break_it: Callable[[Faults], None]) -> None:
    break_it(served.faults)
    manifest = fetch(served, tmp_path).manifest
    require_exactly(tmp_path, served.history, manifest.export_files())


def test_a_cut_connection_is_taken_up_at_the_byte_where_it_broke(large: Served, tmp_path: Path) -> None:
    large.faults.cut_after = 1_000_000
    manifest = fetch(large, tmp_path).manifest
    assert large.blob_bytes == sum(file.size_bytes for file in manifest.export_files())
    assert "bytes=1000000-" in {wanted for _, _, wanted in large.object_requests}


def test_a_server_that_ignores_range_is_read_from_the_start_but_nothing_is_written_twice(
    large: Served, tmp_path: Path
) -> None:
    large.faults.ignore_range = True
    large.faults.cut_after, large.faults.cuts = 1_000_000, 1
    manifest = fetch(large, tmp_path).manifest
    require_exactly(tmp_path, large.history, manifest.export_files())
    assert large.blob_bytes == 1_000_000 + sum(file.size_bytes for file in manifest.export_files())


BROKEN: list[tuple[str, Callable[[Served], None], type[Exception]]] = [
    ("wrong bytes for ever", lambda s: setattr(s.faults, "wrong_bytes", 10**6), IntegrityError),
    ("too long for ever", lambda s: setattr(s.faults, "too_long", 10**6), IntegrityError),
    ("truncated objects", lambda s: setattr(s.faults, "truncate", True), IntegrityError),
    ("connections that bring nothing", lambda s: setattr(s.faults, "cut_after", 0), UnreachableError),
    ("links that never work", lambda s: setattr(s.faults, "expired_links", 10**6), UnreachableError),
    ("a missing blob", lambda s: s.history.store.delete(blob_key(newest(s).files[0].sha256)), NotFoundError),
    ("a missing version", lambda s: s.history.store.delete(f"models/{MODEL}/versions/000002.json"), NotFoundError),
]


def newest(served: Served) -> Manifest:
    return served.history.manifests[-1]


@pytest.mark.parametrize(
    ("break_it", "error"), [pytest.param(change, error, id=name) for name, change, error in BROKEN]
)
def test_a_pull_that_cannot_finish_leaves_the_old_version_untouched(
    served: Served, tmp_path: Path, break_it: Callable[[Served], None], error: type[Exception]
) -> None:
    fetch(served, tmp_path, 0)
    break_it(served)
    with pytest.raises(error):
        fetch(served, tmp_path)
    assert state_of(tmp_path).version == 0
    assert state_of(tmp_path).complete
    for file in served.history.manifests[0].export_files():
        assert (tmp_path / file.path).read_bytes() == served.history.blob(file)


def test_no_part_grows_beyond_the_size_in_the_manifest(large: Served, tmp_path: Path) -> None:
    ref = newest(large).groups[1].export
    large.history.replace_blob(ref, large.history.blob(ref) * 2)
    large.faults.hide_length = True
    seen: list[PullProgress] = []
    with pytest.raises(IntegrityError, match=f"more than {ref.size_bytes} bytes"):
        fetch(large, tmp_path, progress=seen.append)
    assert all(report.done_bytes <= report.total_bytes for report in seen)
    assert not (tmp_path / folder.PARTIAL_NAME / ref.sha256).exists()


def test_a_server_that_is_not_there_is_unreachable_and_a_wrong_url_is_bad_input(tmp_path: Path) -> None:
    with GatewaySource("http://127.0.0.1:1") as source, pytest.raises(UnreachableError):
        pull(source, MODEL, None, tmp_path, patience=Patience(attempts=1))
    for url in ("", "rankup.example.org", "ftp://rankup.example.org", "file:///etc"):
        with pytest.raises(InputError):
            GatewaySource(url)


def test_pauses_double_stay_below_their_limit_and_obey_a_busy_server() -> None:
    steady = Patience(uniform=lambda: 0.0)
    waits = [steady.pause_s(failures, UnreachableError("away")) for failures in range(1, 12)]
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 30, 30]  # 181.5 s in all, at least half of that with jitter
    assert Patience(uniform=lambda: 1.0).pause_s(3, UnreachableError("away")) == 1.0
    assert steady.pause_s(1, BusyError("busy", retry_after_s=7)) == 7
    assert steady.pause_s(1, BusyError("busy", retry_after_s=10**6)) == 30


# -- trust -------------------------------------------------------------------------------------------------------------


def test_the_first_key_is_pinned_and_another_one_is_refused_until_it_is_named(served: Served, tmp_path: Path) -> None:
    fetch(served, tmp_path, 1)
    key = parse_private_key(generate_private_key())
    served.history.publish(newest(served), key=key)
    with pytest.raises(IntegrityError) as caught:
        fetch(served, tmp_path)
    assert "--key" in caught.value.remedy
    assert fetch(served, tmp_path, publisher_key=public_key_hex(key)).publisher_key == public_key_hex(key)
    assert fetch(served, tmp_path).manifest.version == 2


def test_a_key_that_was_named_counts_from_the_first_contact_on(served: Served, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError):
        fetch(served, tmp_path, publisher_key=public_key_hex(parse_private_key(generate_private_key())))
    assert names(tmp_path) == set()
    fetch(served, tmp_path, publisher_key=served.history.publisher_key)


def test_latest_does_not_go_back_but_an_older_version_may_be_asked_for(served: Served, tmp_path: Path) -> None:
    fetch(served, tmp_path)
    served.history.point(1)
    with pytest.raises(IntegrityError, match="was 2"):
        fetch(served, tmp_path)
    assert fetch(served, tmp_path, 1).manifest.version == 1
    with pytest.raises(IntegrityError, match="was 2"):
        fetch(served, tmp_path)


def test_a_version_that_changed_after_it_was_seen_is_refused(served: Served, tmp_path: Path) -> None:
    fetch(served, tmp_path)
    served.history.publish(newest(served).model_copy(update={"licence": "other"}))
    with pytest.raises(IntegrityError, match="rewritten"):
        fetch(served, tmp_path, 2)
    # The parent of a version that was seen is known too.
    served.history.publish(served.history.manifests[1].model_copy(update={"licence": "other"}))
    with pytest.raises(IntegrityError, match="rewritten"):
        fetch(served, tmp_path, 1)


def test_a_swapped_manifest_is_refused(served: Served, tmp_path: Path) -> None:
    store = served.history.store
    older = store.get(f"models/{MODEL}/versions/000001.json", max_bytes=2**20)
    store.put(f"models/{MODEL}/versions/000002.json", older)
    for version in (None, 2):
        with pytest.raises(IntegrityError, match="asked for version 2"):
            fetch(served, tmp_path, version)
    served.history.point(1, digest="ab" * 32)
    with pytest.raises(IntegrityError, match="pointer names"):
        fetch(served, tmp_path)


def test_a_folder_of_another_model_is_left_alone(served: Served, tmp_path: Path) -> None:
    fetch(served, tmp_path)
    with GatewaySource(served.url) as source, pytest.raises(StateError, match="toy"):
        pull(source, "other", None, tmp_path)


def test_a_damaged_state_file_is_named_and_never_ignored(served: Served, tmp_path: Path) -> None:
    fetch(served, tmp_path)
    (tmp_path / folder.STATE_NAME).write_bytes(b"{")
    with pytest.raises(StateError, match=r"\.rankup\.json"):
        fetch(served, tmp_path)


# -- this machine ------------------------------------------------------------------------------------------------------


def test_too_little_space_is_told_in_bytes_before_the_first_one(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    needed = sum(file.size_bytes for file in newest(served).export_files())
    with pytest.raises(DiskFullError, match=rf"{needed} bytes .* 100 are free"):
        fetch(served, tmp_path)
    assert served.object_requests == []


def test_a_disk_that_fills_up_keeps_what_has_arrived(large: Served, tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(DiskFullError):
            fetch(large, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    part = tmp_path / folder.PARTIAL_NAME / newest(large).groups[1].export.sha256
    assert part.stat().st_size == 1_000_000
    manifest = fetch(large, tmp_path).manifest
    require_exactly(tmp_path, large.history, manifest.export_files())


def test_a_folder_that_cannot_be_written_is_named(served: Served, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="file"):
        fetch(served, tmp_path / "file" / "model")


def test_a_folder_in_the_place_of_a_file_is_not_removed(served: Served, tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(StateError, match=r"config\.json"):
        fetch(served, tmp_path)


def test_two_pulls_into_one_folder_do_not_mix(large: Served, tmp_path: Path) -> None:
    large.faults.hang_after = 100_000
    results: list[Pulled] = []
    first = threading.Thread(target=lambda: results.append(fetch(large, tmp_path)))
    first.start()
    assert large.stalled.wait(20)
    with pytest.raises(StateError, match="another process"):
        fetch(large, tmp_path)
    large.faults.hang_after = None
    large.release.set()
    first.join(30)
    require_exactly(tmp_path, large.history, results[0].manifest.export_files())


# -- kill -9 -----------------------------------------------------------------------------------------------------------

PULL = """
import sys
from pathlib import Path
from rankup.pull import GatewaySource, pull
pull(GatewaySource(sys.argv[1]), "toy", None, Path(sys.argv[2]))
"""


def part_bytes(to: Path) -> int:
    partial = to / folder.PARTIAL_NAME
    return sum(part.stat().st_size for part in partial.iterdir()) if partial.is_dir() else 0


@pytest.mark.parametrize("at_bytes", [20_000, 1_200_000, 2_900_000])
def test_a_killed_pull_goes_on_and_no_byte_is_sent_twice(large: Served, tmp_path: Path, at_bytes: int) -> None:
    large.faults.hang_after = at_bytes
    child = subprocess.Popen([sys.executable, "-c", PULL, large.url, str(tmp_path)])
    try:
        assert large.stalled.wait(60)
        deadline = time.monotonic() + 20
        while part_bytes(tmp_path) < large.blob_bytes and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        child.kill()
        child.wait(20)
    arrived = part_bytes(tmp_path)
    assert 0 < arrived <= at_bytes + 4 * 16384  # four connections look at the limit without a lock
    assert names(tmp_path) == set()
    with serve(large.history) as again:
        manifest = fetch(again, tmp_path).manifest
    require_exactly(tmp_path, large.history, manifest.export_files())
    assert again.blob_bytes == sum(file.size_bytes for file in manifest.export_files()) - arrived


KILLED_WHILE_INSTALLING = """
import json, os, signal, sys
from pathlib import Path
from rankup.pull import GatewaySource, pull
url, to, kill_at = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
steps = 0
def dying(original):
    def step(self, *args, **options):
        global steps
        steps += 1
        if steps == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **options)
    return step
Path.replace, Path.unlink = dying(Path.replace), dying(Path.unlink)
pull(GatewaySource(url), "toy", None, to)
"""


@pytest.mark.slow
def test_a_pull_killed_at_any_step_of_installing_is_finished_by_the_next(served: Served, tmp_path: Path) -> None:
    old, new = served.history.manifests[0], newest(served)
    allowed = {file.path: {file.sha256} for file in old.export_files()}
    for file in new.export_files():
        allowed.setdefault(file.path, set()).add(file.sha256)
    for kill_at in range(1, 40):
        to = tmp_path / str(kill_at)
        fetch(served, to, 0)
        command = [sys.executable, "-c", KILLED_WHILE_INSTALLING, served.url, str(to), str(kill_at)]
        child = subprocess.run(command, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert child.returncode in (0, -signal.SIGKILL)
        state = state_of(to)
        for name in names(to):
            assert folder.sha256_of(to / name) in allowed[name]
        if state.complete:
            held = old if state.version == 0 else new
            for file in held.export_files():
                assert folder.sha256_of(to / file.path) == file.sha256, (kill_at, file.path)
        served.object_requests.clear()
        fetch(served, to)
        require_exactly(to, served.history, new.export_files())
        if child.returncode == 0:
            break
        assert kill_at == 1 or served.object_requests == []
    assert kill_at > 6
    assert json.loads((to / folder.STATE_NAME).read_bytes())["version"] == 2
