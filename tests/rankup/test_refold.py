"""A round's files made again from its parent's, outside of any pull."""

from pathlib import Path

import pytest
from history import History, make_history, make_varied_history

from rankup.errors import IntegrityError
from rankup.folder import sha256_of, wanted_files
from rankup.lineage import contributions_of
from rankup.records import BlobRef, Manifest
from rankup.refold import RoundSum, refold_group


@pytest.fixture(scope="module")
def varied() -> History:
    return make_varied_history()


def lay_down(history: History, to: Path) -> Path:
    """Every master, momentum and contribution as a file named after its digest."""
    for manifest in history.manifests:
        for ref in (*wanted_files(manifest, "master"), *contributions_of(manifest)):
            (to / ref.sha256).write_bytes(history.blob(ref))
    return to


def make(history: History, version: int, files: Path, **options: frozenset[str]) -> list[tuple[str, str | None]]:
    """Digests of master and momentum of every group."""
    before = history.manifests[version - 1]
    round_ = RoundSum(history.manifests[version], lambda digest: files / digest, **options)
    made = []
    for group in before.groups:
        master, momentum = refold_group(
            round_,
            {name: before.tensors[name] for name in group.tensors},
            files / group.master.sha256,
            None if group.momentum is None else files / group.momentum.sha256,
            new_master=files / "master",
            new_momentum=files / "momentum",
        )
        assert sha256_of(files / "master") == master.sha256
        assert momentum is None or sha256_of(files / "momentum") == momentum.sha256
        made.append((master.sha256, None if momentum is None else momentum.sha256))
    return made


def stated(manifest: Manifest) -> list[tuple[str, str | None]]:
    return [(g.master.sha256, None if g.momentum is None else g.momentum.sha256) for g in manifest.groups]


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_round_gives_the_files_of_its_version(varied: History, tmp_path: Path, version: int) -> None:
    assert make(varied, version, lay_down(varied, tmp_path)) == stated(varied.manifests[version])


def test_without_every_contribution_a_plain_round_changes_nothing(tmp_path: Path) -> None:
    history = make_history()
    files = lay_down(history, tmp_path)
    terms = history.manifests[2].terms
    everything = frozenset(term.contribution for term in terms)
    assert contributions_of(history.manifests[2], everything) == ()
    assert make(history, 2, files, revoked=everything) == stated(history.manifests[1])
    without_one = make(history, 2, files, revoked=frozenset({terms[0].contribution}))
    assert without_one not in (stated(history.manifests[1]), stated(history.manifests[2]))


def test_a_contribution_of_another_round_is_refused(varied: History, tmp_path: Path) -> None:
    files = lay_down(varied, tmp_path)
    [first, *_] = contributions_of(varied.manifests[2])
    [other, *_] = contributions_of(varied.manifests[1])
    (files / first.sha256).write_bytes(varied.blob(other))
    with pytest.raises(IntegrityError, match="not one of this round"):
        make(varied, 2, files)


@pytest.mark.parametrize("round_id", [None, "round-0"])
@pytest.mark.parametrize("late", [2, 0], ids=["of an older base", "of a round without a version"])
def test_a_late_delta_is_only_that_of_the_round_that_its_term_names(
    varied: History, tmp_path: Path, late: int, round_id: str | None
) -> None:
    files, manifest = lay_down(varied, tmp_path), varied.manifests[3]
    assert next(term.round_id for term in manifest.terms if term.shard == late) is not None
    terms = tuple(
        term.model_copy(update={"round_id": round_id}) if term.shard == late else term for term in manifest.terms
    )
    with pytest.raises(IntegrityError, match="not one of this round: the delta is for round_id"):
        RoundSum(manifest.model_copy(update={"terms": terms}), lambda digest: files / digest)


def test_files_that_do_not_hold_the_group_or_its_bytes_are_refused(varied: History, tmp_path: Path) -> None:
    files = lay_down(varied, tmp_path)
    one, two = varied.manifests[1].groups

    def replace(ref: BlobRef | None, data: bytes) -> None:
        assert ref is not None
        (files / ref.sha256).write_bytes(data)

    for broken, like, message in (
        (one.master, two.master, "in the master file or in its group"),
        (one.master, varied.manifests[0].groups[0].master, "does not have the hash"),
        (one.momentum, varied.manifests[2].groups[0].momentum, "does not have the hash"),
        (one.momentum, two.momentum, "does not hold tensor"),
    ):
        assert like is not None
        replace(broken, varied.blob(like))
        with pytest.raises(IntegrityError, match=message):
            make(varied, 2, files)
        lay_down(varied, tmp_path)
