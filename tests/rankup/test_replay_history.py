"""Replaying histories in which versions were taken back: one version at a time, and everything since version 0."""

from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
from changed_history import LAST, MODEL, ROUNDS, SUMS, ChangedHistory, make_changed_history

from rankup.checkfiles import Report
from rankup.errors import InputError, IntegrityError, NotFoundError, RankupError
from rankup.foldrows import Law
from rankup.pull import PullProgress, StoreSource
from rankup.replay import verify_version
from rankup.replayround import GroupTarget
from rankup.sources import Patience
from rankup.store import blob_key
from rankup.versions import manifest_key, pointer_key

CHANGED = make_changed_history()


@pytest.fixture
def changed() -> ChangedHistory:
    return CHANGED.copy()


def replay(history: ChangedHistory, version: int | None, cache: Path, **options: Any) -> Report:
    patience = Patience(attempts=1)
    return verify_version(StoreSource(history.store), MODEL, version, cache=cache, patience=patience, **options)


@pytest.mark.parametrize("version", range(1, LAST + 1))
@pytest.mark.parametrize("tile_bytes", [64, 2**24])
def test_every_version_is_what_its_history_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, tile_bytes: int
) -> None:
    monkeypatch.setattr(Law, "__init__", partialmethod(Law.__init__, tile_bytes=tile_bytes))
    report = replay(CHANGED, version, tmp_path)
    assert (report.ok, report.level, report.tensors) == (True, "round", 6)
    before, after = CHANGED.manifests[version - 1].tensors, CHANGED.manifests[version].tensors
    assert report.changed == sum(before[name].master != after[name].master for name in after)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "nothing that was made on the way is left"


def test_a_revocation_reads_no_revoked_contribution(tmp_path: Path) -> None:
    assert replay(CHANGED, 10, tmp_path).contributions == 5
    gone = {CHANGED.contribution(1, 1), CHANGED.contribution(2, 2), CHANGED.contribution(5, 0)}
    kept = {CHANGED.contribution(of, number) for of, numbers in SUMS[10].items() for number in numbers}
    names = {path.name for path in tmp_path.iterdir()}
    assert (names & gone, names & kept) == (set(), kept)


@pytest.mark.parametrize("version", [3, 8, 10])
@pytest.mark.parametrize("side", ["master", "export", "momentum"])
def test_a_revocation_that_is_not_the_sum_without_is_found(
    changed: ChangedHistory, tmp_path: Path, version: int, side: str
) -> None:
    names = [name for name, entry in changed.manifests[version].tensors.items() if getattr(entry, side)]
    if side == "momentum" and version == 10:
        assert not names, "its last round keeps none"
        return
    tensors = changed.manifests[version].tensors
    forged = tensors[names[0]].model_copy(update={side: "ab" * 32})
    changed.manifests[version] = changed.manifests[version].model_copy(
        update={"tensors": {**tensors, names[0]: forged}}
    )
    changed.publish(changed.manifests[version], key=changed.signer(version))
    assert replay(changed, version, tmp_path).mismatches == (names[0],)


def test_a_revocation_that_took_out_nothing_is_found(changed: ChangedHistory, tmp_path: Path) -> None:
    same = {"tensors": changed.manifests[2].tensors, "groups": changed.manifests[2].groups}
    changed.reseal(3, **same)
    changed.reseal(6, **same)
    report = replay(changed, 3, tmp_path)
    assert report.mismatches == ("bias", "experts", "up"), "all that the revoked contribution had changed"


def test_a_rollback_or_rotation_with_other_tensors_is_refused(changed: ChangedHistory, tmp_path: Path) -> None:
    for version, other in ((6, 5), (4, 1)):
        same = {"tensors": changed.manifests[other].tensors, "groups": changed.manifests[other].groups}
        history = changed.copy()
        history.reseal(version, **same)
        with pytest.raises(IntegrityError, match="must have the tensors"):
            replay(history, version, tmp_path)


def test_a_revocation_with_a_forged_forerunner_is_refused(changed: ChangedHistory, tmp_path: Path) -> None:
    changed.reseal(1, licence="MIT")
    changed.publish(CHANGED.manifests[1], key=changed.signer(1))
    with pytest.raises(IntegrityError, match="does not follow"):
        replay(changed, 10, tmp_path)


# -- everything since version 0 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 1, 4, 8, None])
@pytest.mark.parametrize("keep", [True, False])
def test_a_whole_history_follows_from_version_0_and_the_contributions_alone(
    changed: ChangedHistory, tmp_path: Path, version: int | None, keep: bool
) -> None:
    newest = LAST if version is None else version
    genesis = {group.master.sha256 for group in changed.manifests[0].groups}
    wanted = {one.term.contribution for of in ROUNDS for one in changed.rounds[of]}
    kept = {ref for manifest in changed.manifests for file in manifest.files for ref in [file.sha256]}
    for key in list(changed.store.list("blobs/")):
        if key.rpartition("/")[2] not in genesis | wanted | kept:
            changed.store.delete(key)
    seen: list[PullProgress] = []
    report = replay(changed, version, tmp_path, level="all", keep=keep, progress=seen.append)
    assert (report.ok, report.level, report.versions) == (True, "all", newest + 1)
    assert report.tensors == 6 * (newest + 1)
    assert seen[-1].done_bytes == seen[-1].total_bytes == report.bytes
    names = {path.name for path in tmp_path.iterdir()}
    assert genesis <= names, "only what was made on the way is removed"
    assert bool(names & wanted) == (keep and newest > 0)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_version_without_the_masters_that_it_begins_with_can_still_be_proved_from_version_0(
    changed: ChangedHistory, tmp_path: Path
) -> None:
    master = changed.manifests[11].groups[0].master
    changed.store.delete(f"blobs/sha256/{master.sha256[:2]}/{master.sha256}")
    with pytest.raises(NotFoundError) as caught:
        replay(changed, 12, tmp_path)
    assert "version 11" in caught.value.cause
    assert "--level all" in caught.value.remedy
    assert replay(changed, 12, tmp_path, level="all").ok


@pytest.mark.parametrize("version", [1, 2, 3, 7, 10, 12])
@pytest.mark.parametrize("side", ["master", "export"])
def test_one_wrong_tensor_is_found_in_the_version_that_has_it(
    changed: ChangedHistory, tmp_path: Path, version: int, side: str
) -> None:
    tensors = changed.manifests[version].tensors
    changed.reseal(version, tensors={**tensors, "up": tensors["up"].model_copy(update={side: "ab" * 32})})
    assert replay(changed, version, tmp_path, level="all").mismatches == (f"version {version}: up",)


def test_a_forged_version_is_of_no_use_to_the_contributions_after_it(changed: ChangedHistory, tmp_path: Path) -> None:
    """Each names, under its own hash, the version that it was trained on: no history can be rewritten below them."""
    changed.reseal(1, licence="MIT")
    assert replay(changed, None, tmp_path, level="chain").ok
    with pytest.raises(IntegrityError, match="not one of this round"):
        replay(changed, None, tmp_path, level="all")


def test_a_version_0_whose_export_is_not_its_master_is_found(tmp_path: Path) -> None:
    history = make_changed_history(0)
    tensors = history.manifests[0].tensors
    history.reseal(0, tensors={**tensors, "up": tensors["up"].model_copy(update={"export": "ab" * 32})})
    assert replay(history, 0, tmp_path, level="all").mismatches == ("up",)


def test_a_damaged_intermediate_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = GroupTarget.finish

    def damaged(target: GroupTarget) -> None:
        finish(target)
        data = bytearray(target.state.master.read_bytes())
        data[-1] ^= 1
        target.state.master.write_bytes(data)

    monkeypatch.setattr(GroupTarget, "finish", damaged)
    with pytest.raises(IntegrityError, match="does not have the hash"):
        replay(CHANGED, 10, tmp_path)


def flip(history: ChangedHistory, key: str, place: int) -> None:
    data = bytearray(history.store.get(key, max_bytes=2**20))
    data[place % len(data)] ^= 1 << place % 8
    history.store.put(key, bytes(data))


STORED = {
    "master": CHANGED.manifests[0].groups[0].master.sha256,
    "delta": CHANGED.contribution(2, 1),
    "a revoked delta, from before it was": CHANGED.contribution(5, 0),
}


@pytest.mark.parametrize("digest", [pytest.param(digest, id=kind) for kind, digest in STORED.items()])
@pytest.mark.parametrize("place", [0, 77, -1])
def test_a_flipped_bit_in_what_a_history_is_made_of_is_noticed(
    changed: ChangedHistory, tmp_path: Path, digest: str, place: int
) -> None:
    flip(changed, blob_key(digest), place)
    with pytest.raises(IntegrityError, match=digest):
        replay(changed, 5, tmp_path, level="all")


@pytest.mark.parametrize("version", [0, 3, 4, 9, LAST])
@pytest.mark.parametrize("place", [3, 1234, -40, -2])
def test_a_flipped_bit_in_any_manifest_of_the_chain_is_noticed(
    changed: ChangedHistory, tmp_path: Path, version: int, place: int
) -> None:
    flip(changed, manifest_key(MODEL, version), place)
    with pytest.raises(IntegrityError):
        replay(changed, None, tmp_path, level="chain")


@pytest.mark.parametrize("level", ["chain", "round", "all"])
def test_a_pointer_that_went_back_is_noticed_where_the_latest_is_asked_for(
    changed: ChangedHistory, tmp_path: Path, level: Any
) -> None:
    changed.point(5)
    with pytest.raises(IntegrityError, match="the pointer went back") as caught:
        replay(changed, None, tmp_path, level=level)
    assert "toy@6" in caught.value.remedy
    assert replay(changed, 5, tmp_path, level=level).ok, "an older version may be asked for by its number"


def test_a_flipped_bit_in_the_pointer_leads_to_no_other_version(changed: ChangedHistory, tmp_path: Path) -> None:
    key = pointer_key(MODEL)
    data = changed.store.get(key, max_bytes=2**20)
    for place in range(len(data)):
        flip(changed, key, place)
        try:
            assert replay(changed, None, tmp_path, level="chain").manifest == changed.digest(LAST)
        except RankupError:
            continue
        finally:
            changed.store.put(key, data)


@pytest.mark.parametrize(
    ("version", "level", "states"),
    [
        pytest.param(10, "round", 1.9, id="what is read goes while the next is written"),
        pytest.param(LAST, "all", 3.0, id="and version 3 stays until version 8 has begun with it"),
    ],
)
def test_what_lies_on_disk_while_a_history_is_replayed_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, level: Any, states: float
) -> None:
    most: list[int] = []
    finish = GroupTarget.finish

    def counted(target: GroupTarget) -> None:
        finish(target)
        most.append(sum(path.stat().st_size for path in tmp_path.rglob(".replay-*/*/*")))

    monkeypatch.setattr(GroupTarget, "finish", counted)
    assert replay(CHANGED, version, tmp_path, level=level, keep=False).ok
    groups = CHANGED.manifests[3].groups
    state = sum(group.master.size_bytes + (group.momentum or group.master).size_bytes for group in groups)
    assert state < max(most) < states * state


def test_the_level_of_files_is_for_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pulled folder"):
        replay(CHANGED, None, tmp_path, level="files")


@pytest.mark.parametrize("level", ["chain", "round", "all"])
def test_what_was_proved_is_said_and_what_was_not(tmp_path: Path, level: Any) -> None:
    report = replay(CHANGED, None, tmp_path, level=level)
    assert report.proved
    assert any("losses" in sentence for sentence in report.unproved)
    assert any("tensors" in sentence for sentence in report.unproved) == (level == "chain")
