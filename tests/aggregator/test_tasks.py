"""Audits as the cluster makes them: the verdict, and what happens where the shard cannot be trained again."""

from __future__ import annotations

from pathlib import Path

from toy_world import World

from aggregator.tasks import TrainedIn, _audit
from rankup.errors import SetupError
from rankup.records import Check, RoundRecord, Submission
from rankup.store import Store


def audited(world: World, tmp_path: Path, again: int | None, *, taught: bool = False) -> Check:
    """The audit of delta 0, where training again gives delta `again`, or fails."""
    path, ref = world.delta(0)
    submission = world.submission(0, ref)

    def retrain(
        store: Store, record: RoundRecord, given: Submission, base: Path, teacher: Path | None, scratch: Path
    ) -> Path:
        assert (given, record) == (submission, world.record)
        assert (base / "config.json").is_file()
        assert taught == (teacher is not None)
        assert teacher is None or (teacher / "config.json").is_file()
        assert scratch.is_dir()
        if again is None:
            raise SetupError("no trainer here")
        return world.delta(9, world.factors(again))[0]

    trained_in = TrainedIn(world.record, world.parent, world.parent if taught else None)
    return _audit(world.store, trained_in, submission, retrain, tmp_path / "cache", path)


def test_the_same_delta_again_passes_and_another_one_does_not(world: World, tmp_path: Path) -> None:
    same, other = audited(world, tmp_path, 0), audited(world, tmp_path, 1, taught=True)
    assert (same.name, same.passed, round(same.value or 0, 6)) == ("audit", True, 1.0)
    assert not other.passed
    assert "cosine" in other.detail


def test_an_audit_that_cannot_be_made_is_no_verdict_and_says_so(world: World, tmp_path: Path) -> None:
    check = audited(world, tmp_path, None)
    assert (check.passed, check.value) == (True, None)
    assert "no trainer here" in check.detail
    assert not list((tmp_path / "cache").glob("audit-*")), "nothing is left behind"
