"""Pulls that patch and fold what lies there, over real HTTP, with everything that can be wrong on the way."""

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_server import Served, serve
from history import MODEL, History, make_history, make_varied_history

from rankup import folder
from rankup.errors import DiskFullError, IntegrityError, NotFoundError
from rankup.message import canonical_json
from rankup.pull import GatewaySource, Pulled, PullProgress, StoreSource, plan_pull, pull
from rankup.records import BlobRef, FileEntry, Manifest, Patch, Retained
from rankup.signing import generate_private_key, parse_private_key
from rankup.sources import Patience
from rankup.store import blob_key
from rankup.versions import manifest_digest, manifest_key, retained_key

QUICK = Patience(attempts=3, first_pause_s=0.01, longest_pause_s=0.02)
FILLER = 100_000
"""Bytes of a tensor that never changes: the patches of its group are small."""


@pytest.fixture(scope="module")
def made() -> History:
    """Versions 0 to 5, each with a patch for each of its two model files."""
    return make_history(versions=6, contributions=1, filler_bytes=FILLER, patches=True)


@pytest.fixture
def history(made: History) -> History:
    """A copy that a test may break."""
    copy = History(type(made.store)(), made.key, list(made.manifests), made.deltas, patches=True)
    for key in made.store.list(""):
        copy.store.put(key, made.store.get(key, max_bytes=2**30))
    return copy


@pytest.fixture
def served(history: History) -> Iterator[Served]:
    with serve(history) as running:
        yield running


def fetch(served: Served, to: Path, version: int | None = None, **options: Any) -> Pulled:
    with GatewaySource(served.url, timeout_s=10) as source:
        return pull(source, MODEL, version, to, patience=QUICK, **options)


def from_store(history: History, to: Path, version: int | None = None, **options: Any) -> Pulled:
    return pull(StoreSource(history.store), MODEL, version, to, patience=QUICK, **options)


def require_exactly(to: Path, history: History, files: tuple[FileEntry, ...]) -> None:
    assert {path.name for path in to.iterdir() if not path.name.startswith(".")} == {file.path for file in files}
    for file in files:
        assert (to / file.path).read_bytes() == history.blob(file), file.path
    assert not (to / folder.PARTIAL_NAME).exists()


def kinds(pulled: Pulled) -> dict[str, tuple[str, int]]:
    """Model file -> kind of its route, and how many patches."""
    return {
        route.file.path: (route.kind, len(route.patches))
        for route in pulled.plan.routes
        if route.file.path.endswith(".safetensors")
    }


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def patches_of(manifest: Manifest) -> list[Patch]:
    return [group.patch for group in manifest.groups if group.patch is not None]


def asked(served: Served) -> set[str]:
    return {path.lstrip("/") for path, _, _ in served.object_requests}


# -- patches -----------------------------------------------------------------------------------------------------------


def test_an_update_fetches_patches_and_what_has_none(served: Served, tmp_path: Path) -> None:
    old, new = served.history.manifests[4], served.history.manifests[5]
    fetch(served, tmp_path, 4)
    served.object_requests.clear()
    served.blob_bytes = 0
    pulled = fetch(served, tmp_path)
    require_exactly(tmp_path, served.history, new.export_files())
    readme = {file.sha256 for file in new.files} - {file.sha256 for file in old.files}
    assert asked(served) == {patch.sha256 for patch in patches_of(new)} | readme
    assert pulled.fetched_bytes == pulled.plan.fetch_bytes == served.blob_bytes < pulled.plan.full_bytes / 5
    assert pulled.warnings == ()


@pytest.mark.parametrize(("version", "hops"), [(0, 5), (2, 3), (3, 2)])
def test_a_chain_of_patches_leads_to_the_same_bytes_as_the_whole_file(
    history: History, tmp_path: Path, version: int, hops: int
) -> None:
    from_store(history, tmp_path, version)
    pulled = from_store(history, tmp_path)
    assert kinds(pulled)[TWO] == ("patches", hops)
    require_exactly(tmp_path, history, history.manifests[5].export_files())


def test_after_a_rollback_either_side_is_patched(history: History, tmp_path: Path) -> None:
    """Version 6 has the files of version 2: from 5 it is one patch, from 1 it is the patch of version 2."""
    manifest = history.roll_back(2)
    for version, expected in ((5, ("patches", 1)), (1, ("patches", 1)), (2, ("here", 0))):
        to = tmp_path / str(version)
        from_store(history, to, version)
        assert kinds(from_store(history, to))[TWO] == expected
        require_exactly(to, history, manifest.export_files())


def test_a_plan_is_shown_before_the_first_byte_and_a_dry_one_writes_nothing(served: Served, tmp_path: Path) -> None:
    to = tmp_path / "model"
    with GatewaySource(served.url) as source:
        planned = plan_pull(source, MODEL, None, to)
    assert not to.exists()
    assert planned.plan.fetch_bytes == planned.plan.full_bytes > FILLER // 2
    fetch(served, to, 4)
    before = (to / folder.STATE_NAME).read_bytes()
    served.object_requests.clear()
    with GatewaySource(served.url) as source:
        planned = plan_pull(source, MODEL, None, to)
    assert ((to / folder.STATE_NAME).read_bytes(), served.object_requests) == (before, [])
    shown: list[tuple[int, int]] = []
    fetch(served, to, on_plan=lambda one: shown.append((one.plan.fetch_bytes, len(served.object_requests))))
    assert shown == [(planned.plan.fetch_bytes, 0)]


# -- routes that fail --------------------------------------------------------------------------------------------------


def republish(history: History, version: int, groups: Callable[[Manifest], Any]) -> None:
    """The version with other groups, and all later ones on top of it."""
    for number in range(version, len(history.manifests)):
        manifest = history.manifests[number]
        update: dict[str, Any] = {"parent": manifest_digest(history.manifests[number - 1])}
        if number == version:
            update["groups"] = groups(manifest)
        history.manifests[number] = manifest.model_copy(update=update)
        history.publish(history.manifests[number])
    history.point(len(history.manifests) - 1)


def patch_is_gone(history: History, to: Path) -> None:
    history.store.delete(blob_key(patches_of(history.manifests[5])[1].sha256))


def patch_is_flipped(history: History, to: Path) -> None:
    patch = patches_of(history.manifests[5])[1]
    data = bytearray(history.blob(patch))
    data[len(data) // 2] ^= 4
    history.replace_blob(patch, bytes(data))


def patch_is_cut(history: History, to: Path) -> None:
    patch = patches_of(history.manifests[5])[1]
    history.replace_blob(patch, history.blob(patch)[:-1])


def with_patch_of(other: int, base: int) -> Callable[[History, Path], None]:
    """Version 5 claims that the patch of another version leads to it."""

    def change(history: History, to: Path) -> None:
        foreign = patches_of(history.manifests[other])[1]
        update = {"base": history.manifests[base].groups[1].export.sha256}

        def groups(manifest: Manifest) -> Any:
            one, two = manifest.groups
            return (one, two.model_copy(update={"patch": foreign.model_copy(update=update)}))

        republish(history, 5, groups)

    return change


def base_is_edited(history: History, to: Path) -> None:
    path = to / TWO
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def old_manifest_is_forged(history: History, to: Path) -> None:
    history.publish(history.manifests[4], key=parse_private_key(generate_private_key()))


def old_manifest_is_another(history: History, to: Path) -> None:
    history.publish(history.manifests[4].model_copy(update={"licence": "other"}))


def old_manifest_is_gone(history: History, to: Path) -> None:
    history.store.delete(manifest_key(MODEL, 4))


WRONG = [
    ("a patch that is gone", 4, patch_is_gone, 1),
    ("a patch with a flipped bit", 4, patch_is_flipped, 1),
    ("a patch that is cut off", 4, patch_is_cut, 1),
    ("a patch that leads elsewhere", 4, with_patch_of(4, 4), 1),
    ("a patch with another parent", 4, with_patch_of(5, 3), 0),
    ("a patch that starts elsewhere", 3, with_patch_of(5, 3), 1),
    ("a base that its user edited", 4, base_is_edited, 0),
    ("a forged manifest in between", 3, old_manifest_is_forged, 1),
    ("a rewritten manifest in between", 3, old_manifest_is_another, 1),
    ("a missing manifest in between", 3, old_manifest_is_gone, 1),
]


@pytest.mark.parametrize(("version", "break_it", "warnings"), [pytest.param(*row[1:], id=row[0]) for row in WRONG])
def test_the_whole_file_is_fetched_in_the_place_of(
    history: History, tmp_path: Path, version: int, break_it: Callable[[History, Path], None], warnings: int
) -> None:
    from_store(history, tmp_path, version)
    break_it(history, tmp_path)
    pulled = from_store(history, tmp_path)
    require_exactly(tmp_path, history, history.manifests[5].export_files())
    assert len(pulled.warnings) == warnings
    whole = history.manifests[5].groups[1].export.size_bytes
    assert pulled.fetched_bytes >= whole


def test_where_the_whole_file_is_wrong_too_the_old_version_stays(history: History, tmp_path: Path) -> None:
    from_store(history, tmp_path, 4)
    patch_is_flipped(history, tmp_path)
    export = history.manifests[5].groups[1].export
    history.replace_blob(export, bytes(export.size_bytes))
    with pytest.raises(IntegrityError, match=export.sha256):
        from_store(history, tmp_path)
    for file in history.manifests[4].export_files():
        assert (tmp_path / file.path).read_bytes() == history.blob(file)
    history.store.delete(blob_key(export.sha256))
    with pytest.raises(NotFoundError):
        from_store(history, tmp_path)


def test_a_file_whose_whole_copy_is_gone_is_patched_up_from_an_older_one(
    made: History, history: History, tmp_path: Path
) -> None:
    """With nothing in the folder: by the record of what is gone, and without it."""
    for version in (4, 5):
        history.store.delete(blob_key(history.manifests[version].groups[1].export.sha256))
    pulled = from_store(history, tmp_path / "told by nobody")
    assert len(pulled.warnings) == 2
    require_exactly(tmp_path / "told by nobody", made, history.manifests[5].export_files())
    record = Retained(model=MODEL, gone={4: ("export",), 5: ("export",)})
    history.store.put(retained_key(MODEL), canonical_json(record))
    pulled = from_store(history, tmp_path / "told")
    assert (kinds(pulled)[TWO], pulled.warnings) == (("patches", 2), ())
    require_exactly(tmp_path / "told", made, history.manifests[5].export_files())


def test_a_record_of_what_is_gone_that_cannot_be_read_is_only_a_warning(history: History, tmp_path: Path) -> None:
    history.store.put(retained_key(MODEL), b"{")
    pulled = from_store(history, tmp_path)
    assert len(pulled.warnings) == 1
    require_exactly(tmp_path, history, history.manifests[5].export_files())


# -- this machine ------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from rankup.pull import GatewaySource, pull
url, to, kill_at = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
seen = 0
def progress(at):
    global seen
    seen += 1
    if seen == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
def dying(original):
    def step(self, *args, **options):
        progress(None)
        return original(self, *args, **options)
    return step
Path.replace, Path.unlink = dying(Path.replace), dying(Path.unlink)
pull(GatewaySource(url), "toy", None, to, progress=progress)
print(seen)
"""


@pytest.mark.slow
def test_a_pull_killed_while_it_patches_is_finished_by_the_next(served: Served, tmp_path: Path) -> None:
    old, new = served.history.manifests[3], served.history.manifests[5]
    allowed = {file.path: {file.sha256} for file in old.export_files()}
    for file in new.export_files():
        allowed.setdefault(file.path, set()).add(file.sha256)
    start = tmp_path / "start"
    fetch(served, start, 3)

    def run(name: str, kill_at: int) -> tuple[Path, subprocess.CompletedProcess[str]]:
        to = tmp_path / name
        shutil.copytree(start, to)
        command = [sys.executable, "-c", KILLED, served.url, str(to), str(kill_at)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return to, subprocess.run(command, check=False, env=environment, capture_output=True, text=True)

    _, whole = run("whole", 0)
    events = int(whole.stdout)
    for kill_at in sorted(random.Random(7).sample(range(6, events + 1), 3)):
        to, child = run(str(kill_at), kill_at)
        assert child.returncode == -signal.SIGKILL, kill_at
        for path in to.iterdir():
            assert path.name.startswith(".") or folder.sha256_of(path) in allowed[path.name]
        state = folder.read_folder_state(to)
        assert state is not None
        if state.complete:
            held = old if state.version == 3 else new
            assert all(folder.sha256_of(to / file.path) == file.sha256 for file in held.export_files())
        pulled = fetch(served, to)
        assert pulled.fetched_bytes <= pulled.plan.full_bytes / 5
        require_exactly(to, served.history, new.export_files())


def test_a_disk_that_fills_up_while_patching_loses_nothing(history: History, tmp_path: Path) -> None:
    import resource

    from_store(history, tmp_path, 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILLER // 4, hard))
    try:
        with pytest.raises(DiskFullError):
            from_store(history, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    for file in history.manifests[4].export_files():
        assert (tmp_path / file.path).read_bytes() == history.blob(file)
    assert from_store(history, tmp_path).fetched_bytes == 0
    require_exactly(tmp_path, history, history.manifests[5].export_files())


def test_room_is_asked_for_patches_and_for_what_they_make(
    history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_store(history, tmp_path, 4)
    plan = plan_pull(StoreSource(history.store), MODEL, None, tmp_path).plan
    needed = plan.fetch_bytes + sum(route.file.size_bytes for route in plan.routes if route.kind == "patches")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(DiskFullError, match=rf"{needed} bytes are needed .* {needed - 1} are free"):
        from_store(history, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    from_store(history, tmp_path)


def test_a_reader_keeps_the_file_that_it_has_open(history: History, tmp_path: Path) -> None:
    from_store(history, tmp_path, 4)
    with (tmp_path / TWO).open("rb") as reader:
        from_store(history, tmp_path)
        assert reader.read() == history.blob(history.manifests[4].groups[1].export)


def test_what_somebody_else_put_under_a_name_that_is_needed_is_set_aside(history: History, tmp_path: Path) -> None:
    for content in ("mine", "mine too"):
        (tmp_path / "README.md").write_text(content)
        (tmp_path / folder.STATE_NAME).unlink(missing_ok=True)
        pulled = from_store(history, tmp_path)
        assert len(pulled.warnings) == 1
    assert [(tmp_path / f"README.md.before-pull-{n}").read_text() for n in (1, 2)] == ["mine", "mine too"]
    (tmp_path / "README.md").write_text("an edit of what was pulled")
    assert from_store(history, tmp_path).warnings == ()
    assert len(list(tmp_path.glob("*.before-pull-*"))) == 2


def test_a_file_that_only_changed_its_name_is_not_fetched(history: History, tmp_path: Path) -> None:
    from_store(history, tmp_path)
    manifest = history.manifests[5]
    one, two = manifest.groups
    moved = one.model_copy(update={"export": one.export.model_copy(update={"path": "renamed.safetensors"})})
    history.manifests.append(
        manifest.model_copy(
            update={"version": 6, "parent": manifest_digest(manifest), "groups": (moved, two), "terms": ()}
        )
    )
    history.publish(history.manifests[6])
    history.point(6)
    assert from_store(history, tmp_path).fetched_bytes == 0
    require_exactly(tmp_path, history, history.manifests[6].export_files())


# -- other folders that lend their files -------------------------------------------------------------------------------


def test_what_another_folder_has_is_linked_or_patched_and_that_folder_stays_as_it_is(
    history: History, tmp_path: Path
) -> None:
    base, to = tmp_path / "base", tmp_path / "new"
    from_store(history, base, 4)
    pulled = from_store(history, to, bases=[base])
    assert kinds(pulled)[TWO] == ("patches", 1)
    assert (to / "config.json").samefile(base / "config.json")
    for place, version in ((base, 4), (to, 5)):
        require_exactly(place, history, history.manifests[version].export_files())


def test_a_linked_file_is_never_written_through(history: History, tmp_path: Path) -> None:
    """The link is a part of the new folder when the lender's file is broken, in place, by somebody."""
    base, to = tmp_path / "base", tmp_path / "new"
    from_store(history, base, 5)
    (to / folder.PARTIAL_NAME).mkdir(parents=True)
    export = history.manifests[5].groups[1].export
    os.link(base / TWO, to / folder.PARTIAL_NAME / export.sha256)
    with (base / TWO).open("r+b") as file:
        file.write(bytes(64))
    broken = (base / TWO).read_bytes()
    from_store(history, to)
    require_exactly(to, history, history.manifests[5].export_files())
    assert (base / TWO).read_bytes() == broken


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("vanishes", [True, False])
def test_a_lender_that_does_not_have_what_it_says_is_done_without(
    history: History, tmp_path: Path, version: int, vanishes: bool
) -> None:
    base, to = tmp_path / "base", tmp_path / "new"
    from_store(history, base, version)
    if vanishes:
        (base / TWO).unlink()
    else:
        (base / TWO).write_bytes(bytes(1000))
    pulled = from_store(history, to, bases=[base, tmp_path / "nothing"])
    assert len(pulled.warnings) == 1
    require_exactly(to, history, history.manifests[5].export_files())


# -- masters -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def varied() -> History:
    return make_varied_history()


def state_files(manifest: Manifest) -> tuple[FileEntry, ...]:
    momenta = tuple(group.momentum for group in manifest.groups if group.momentum is not None)
    return (*(group.master for group in manifest.groups), *momenta)


@pytest.mark.parametrize(("start", "end"), [(0, 1), (1, 2), (2, 3), (0, 2), (0, 3)])
def test_masters_and_momenta_are_made_again_from_the_rounds(
    varied: History, tmp_path: Path, start: int, end: int
) -> None:
    from_store(varied, tmp_path, start, want="master")
    parts: set[str] = set()

    def look(at: PullProgress) -> None:
        if at.stage == "applying":
            parts.clear()
            parts.update(part.name for part in (tmp_path / folder.PARTIAL_NAME).iterdir())

    pulled = from_store(varied, tmp_path, end, want="master", progress=look, parallel=1)
    assert {route.kind for route in pulled.plan.routes} == {"rounds"}
    terms = [term for manifest in varied.manifests[start + 1 : end + 1] for term in manifest.terms if term.coefficient]
    assert pulled.fetched_bytes == sum(term.size_bytes for term in terms)
    require_exactly(tmp_path, varied, state_files(varied.manifests[end]))
    # What lay there when the last group was made: nothing of the versions in between.
    deltas = {term.contribution for term in terms}
    assert parts == deltas | {file.sha256 for file in state_files(varied.manifests[end])}


def test_masters_that_rounds_cannot_give_are_fetched_whole(history: History, tmp_path: Path) -> None:
    """A contribution that is not what the manifest says; and one that is gone."""
    [term] = history.manifests[5].terms
    delta = BlobRef(sha256=term.contribution, size_bytes=term.size_bytes)
    for name, break_it in (
        ("wrong", lambda: history.replace_blob(delta, bytes(delta.size_bytes))),
        ("gone", lambda: history.store.delete(blob_key(delta.sha256))),
    ):
        from_store(history, tmp_path / name, 4, want="master")
        break_it()
        pulled = from_store(history, tmp_path / name, want="master")
        assert len(pulled.warnings) == 1
        require_exactly(tmp_path / name, history, state_files(history.manifests[5]))


def test_a_manifest_that_rounds_do_not_lead_to_is_believed_for_its_files(history: History, tmp_path: Path) -> None:
    """What the publisher signed is what is pulled; that it is not the sum is for `rankup verify` to say."""

    def groups(manifest: Manifest) -> Any:
        one, two = manifest.groups
        return (one.model_copy(update={"master": history.manifests[1].groups[0].master}), two)

    republish(history, 5, groups)
    from_store(history, tmp_path, 4, want="master")
    pulled = from_store(history, tmp_path, want="master")
    assert (len(pulled.warnings), pulled.plan.chain[0].version) == (1, 4)
    require_exactly(tmp_path, history, state_files(history.manifests[5]))


def test_a_master_and_a_momentum_of_one_name_are_refused(varied: History) -> None:
    manifest = varied.manifests[1]
    one, two = manifest.groups
    assert one.momentum is not None
    named = one.model_copy(update={"momentum": one.momentum.model_copy(update={"path": two.master.path.upper()})})
    with pytest.raises(IntegrityError, match="same name"):
        folder.wanted_files(manifest.model_copy(update={"groups": (named, two)}), "master")


def test_a_master_that_its_user_edited_is_fetched_whole(history: History, tmp_path: Path) -> None:
    from_store(history, tmp_path, 4, want="master")
    path = tmp_path / "master-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + bytes(4))
    pulled = from_store(history, tmp_path, want="master")
    assert [route.kind for route in pulled.plan.routes] == ["rounds", "full"]
    require_exactly(tmp_path, history, state_files(history.manifests[5]))
