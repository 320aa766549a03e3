"""A bucket as a folder and back: what arrives, what is copied again, and what a killed or a careless run leaves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from rankup import backup
from rankup.backup import back_up, read_state
from rankup.errors import IntegrityError, NotFoundError, StateError
from rankup.givingback import restore
from rankup.store import MemoryStore, blob_key, put_blob
from rankup.versions import manifest_key, pointer_key, receipt_key, round_key, upload_key

NOW = 1_800_000_000.0
BLOBS = [f"blob {n}".encode() for n in range(5)]
RECORDS = {
    pointer_key("tiny"): b'{"version":1}',
    manifest_key("tiny", 0): b"manifest 0",
    manifest_key("tiny", 1): b"manifest 1",
    round_key("tiny-r0001-abcdef"): b"record",
    receipt_key("tiny-r0001-abcdef", "a" * 64): b"receipt",
    "datasets/docs/card.json": b"card",
    "somebody/else.txt": b"kept too",
}


def stocked() -> MemoryStore:
    store = MemoryStore(clock=lambda: NOW)
    for data in BLOBS:
        put_blob(store, data)
    for key, data in RECORDS.items():
        store.put(key, data)
    store.put("doctor/scratch", b"of no worth")
    return store


def contents(store: MemoryStore) -> dict[str, bytes]:
    return {key: store.get(key, max_bytes=10**6) for key in store.list("") if not key.startswith("doctor/")}


def back_up_now(store: MemoryStore, folder: Path, *, check: bool = False) -> backup.Copied:
    return back_up(store, folder, bucket="memory", clock=lambda: NOW, check=check)


def test_what_is_restored_into_an_empty_bucket_is_what_was_there(tmp_path: Path) -> None:
    store, empty = stocked(), MemoryStore()
    done = back_up_now(store, tmp_path)
    assert done.copied == len(BLOBS) + len(RECORDS)
    assert done.state.objects == {"blobs": 5, "datasets": 1, "models": 3, "rounds": 2, "somebody": 1}
    restore(empty, tmp_path)
    assert contents(empty) == contents(store)


def test_a_second_run_copies_only_what_is_new_or_changed(tmp_path: Path) -> None:
    store = stocked()
    back_up_now(store, tmp_path)
    assert back_up_now(store, tmp_path).copied == 0
    store.put(pointer_key("tiny"), b'{"version":2}')  # the same number of bytes
    put_blob(store, b"one more")
    assert back_up_now(store, tmp_path).copied == 2
    empty = MemoryStore()
    restore(empty, tmp_path)
    assert contents(empty) == contents(store)


class Dying(MemoryStore):
    """Fails at the `at`-th object that is read whole."""

    def __init__(self, at: int, but: Callable[[str], bool] = lambda _: True) -> None:
        super().__init__(clock=lambda: NOW)
        self.left = at

    def get_file(self, key: str, path: Path, *, progress: Callable[[int], None] | None = None) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError("killed")
        super().get_file(key, path, progress=progress)


@pytest.mark.parametrize("survived", range(0, 13, 2))
def test_a_run_that_is_killed_anywhere_leaves_the_backup_before_it_whole_and_the_next_goes_on(
    tmp_path: Path, survived: int
) -> None:
    store = stocked()
    back_up_now(store, tmp_path)
    before = contents(store)
    dying = Dying(survived)
    for key, data in before.items():
        dying.put(key, data)
    for number in range(6):
        put_blob(dying, f"new {number}".encode())
        dying.put(manifest_key("tiny", 2 + number), b"new manifest")
    dying.put(pointer_key("tiny"), b'{"version":7}')
    with pytest.raises(OSError, match="killed"):
        back_up_now(dying, tmp_path)
    old = MemoryStore()
    restore(old, tmp_path)
    assert contents(old).items() >= before.items()
    dying.left = 10**6
    back_up_now(dying, tmp_path)
    new = MemoryStore()
    restore(new, tmp_path)
    assert contents(new) == contents(dying)


def test_what_a_server_writes_while_it_is_copied_is_whole_in_the_folder(tmp_path: Path) -> None:
    """An upload is judged between two looks: its submission goes, its receipt and its blob come."""
    delta = b"a delta"
    digest = hashlib.sha256(delta).hexdigest()
    submission, upload = "rounds/r1/submissions/l-1.json", upload_key("l-1", digest)

    class Busy(MemoryStore):
        def get_file(self, key: str, path: Path, *, progress: Callable[[int], None] | None = None) -> None:
            if key == trigger:
                put_blob(self, delta)
                self.put(receipt_key("r1", digest), b"receipt")
                self.delete(upload)
                self.delete(submission)
                self.put(pointer_key("tiny"), b"moved on")
                self.put(manifest_key("tiny", 9), b"the next")
            super().get_file(key, path, progress=progress)

    for trigger in (pointer_key("tiny"), round_key("r1"), submission, upload, receipt_key("r0", "0" * 64)):
        store, folder = Busy(clock=lambda: NOW), tmp_path / hashlib.sha256(trigger.encode()).hexdigest()[:8]
        for key in (pointer_key("tiny"), round_key("r1"), submission, receipt_key("r0", "0" * 64)):
            store.put(key, b"as it was")
        store.put(upload, delta)
        back_up_now(store, folder)
        kept = {path.relative_to(folder / "bucket").as_posix() for path in (folder / "bucket").rglob("*.*")}
        judged = receipt_key("r1", digest) in kept and (folder / "bucket" / blob_key(digest)).exists()
        assert judged or {submission, upload} <= kept, trigger
        moved = (folder / "bucket" / pointer_key("tiny")).read_bytes() == b"moved on"
        assert not moved or manifest_key("tiny", 9) in kept, trigger


def test_a_blob_with_other_bytes_than_its_name_says_never_gets_into_the_backup(tmp_path: Path) -> None:
    store = stocked()
    key = blob_key(hashlib.sha256(BLOBS[0]).hexdigest())
    store.put(key, b"blob X")
    with pytest.raises(IntegrityError, match="another hash"):
        back_up_now(store, tmp_path)
    assert not (tmp_path / "bucket" / key).exists()


def test_a_blob_that_rots_in_the_folder_is_found_when_asked_for_and_before_it_is_given_back(tmp_path: Path) -> None:
    store = stocked()
    back_up_now(store, tmp_path)
    digest = hashlib.sha256(BLOBS[0]).hexdigest()
    path = tmp_path / "bucket" / blob_key(digest)
    path.write_bytes(b"blob X")
    empty = MemoryStore()
    with pytest.raises(IntegrityError, match="hash"):
        restore(empty, tmp_path)
    with pytest.raises(NotFoundError):
        empty.get(pointer_key("tiny"), max_bytes=100)
    assert back_up_now(store, tmp_path).copied == 0
    assert back_up_now(store, tmp_path, check=True).copied == 1
    assert path.read_bytes() == BLOBS[0]
    restore(empty, tmp_path)
    assert contents(empty) == contents(store)


def test_a_bucket_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    back_up_now(stocked(), tmp_path)
    other = MemoryStore()
    other.put(pointer_key("another"), b"in use")
    with pytest.raises(StateError, match="not empty"):
        restore(other, tmp_path)
    assert list(other.list("")) == [pointer_key("another")]


def test_an_object_of_the_same_size_with_other_bytes_is_never_overwritten(tmp_path: Path) -> None:
    back_up_now(stocked(), tmp_path)
    other = MemoryStore()
    other.put(pointer_key("tiny"), b'{"version":9}')
    with pytest.raises(StateError, match="not of this backup"):
        restore(other, tmp_path)
    assert other.get(pointer_key("tiny"), max_bytes=100) == b'{"version":9}'


def test_a_folder_without_a_finished_backup_gives_nothing_back(tmp_path: Path) -> None:
    dying = Dying(1)
    for data in BLOBS:
        put_blob(dying, data)
    with pytest.raises(OSError, match="killed"):
        back_up_now(dying, tmp_path)
    assert read_state(tmp_path) is None
    with pytest.raises(StateError, match="no backup"):
        restore(MemoryStore(), tmp_path)


def test_progress_ends_at_all_bytes(tmp_path: Path) -> None:
    store = stocked()
    seen: list[tuple[int, int]] = []
    back_up(store, tmp_path, bucket="memory", clock=lambda: NOW, progress=lambda *state: seen.append(state))
    assert seen[-1][0] == sum(map(len, [*BLOBS, *RECORDS.values()]))
    assert all(done <= total for done, total in seen)
