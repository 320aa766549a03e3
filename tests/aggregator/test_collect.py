"""Collecting over real histories: what is kept can be pulled and replayed, however often the collector is killed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import aggregator.stocktaking
from aggregator.collect import collect
from aggregator.keeprules import Rules
from aggregator.revoke import revoke
from aggregator.stocktaking import read_inventory
from rankup.errors import ConflictError, InputError, IntegrityError, NotFoundError
from rankup.message import canonical_json
from rankup.protocol import RoundRequest, RoundState, SubmitStatement, VersionRef
from rankup.pull import pull
from rankup.records import BlobRef, DatasetCard, Receipt, Retained, RoundEnd, RoundRecord, Submission
from rankup.replay import verify_version
from rankup.retained import lacking
from rankup.settings import LedgerSettings, StoreSettings
from rankup.signing import generate_private_key, parse_private_key
from rankup.sources import StoreSource
from rankup.store import MemoryStore, blob_key, put_blob
from rankup.versions import (
    dataset_key,
    draft_key,
    fold_key,
    heldout_key,
    manifest_digest,
    manifest_key,
    pointer_key,
    receipt_key,
    retained_key,
    round_end_key,
    round_key,
    upload_key,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "rankup"))

from changed_history import make_changed_history
from history import MODEL, History, make_history, make_varied_history

RULES = Rules(keep_exports=2, keep_masters=2, checkpoint_every=4)
VERSIONS = 10
LATER_S = 30 * 86_400.0


NOW = time.time()


def later() -> float:
    return NOW + LATER_S


class Bucket(MemoryStore):
    """A store that can be copied, and that calls `before` ahead of every change."""

    def __init__(self, copied: MemoryStore | None = None) -> None:
        super().__init__()
        for found in copied.scan("") if copied is not None else ():
            self.put(found.key, copied.get(found.key, max_bytes=2**30))  # type: ignore[union-attr]
        self.before: Callable[[str], None] = lambda key: None

    def delete(self, key: str) -> None:
        self.before(key)
        super().delete(key)

    def swap(self, key: str, data: bytes, *, etag: str | None) -> str:
        self.before(key)
        return super().swap(key, data, etag=etag)

    def contents(self) -> dict[str, bytes]:
        return {found.key: self.get(found.key, max_bytes=2**30) for found in self.scan("")}


@pytest.fixture(scope="module")
def template() -> History:
    return make_history(versions=VERSIONS, contributions=2, filler_bytes=80_000, patches=True)


@pytest.fixture
def history(template: History) -> History:
    return History(Bucket(template.store), template.key, list(template.manifests), dict(template.deltas), patches=True)


def run(history: History, rules: Rules = RULES, **options: Any) -> Any:
    return collect(history.store, rules, clock=later, publisher_key=history.publisher_key, **options)


def require_all_pullable(history: History, to: Path) -> None:
    """Every version, by whatever way there is, into a folder that holds nothing."""
    for manifest in history.manifests:
        pulled = pull(StoreSource(history.store), MODEL, manifest.version, to / str(manifest.version))
        assert pulled.manifest == manifest
        assert not pulled.warnings


def holds(history: History, ref: BlobRef) -> bool:
    return history.store.head(blob_key(ref.sha256)) is not None


# -- what is kept works ------------------------------------------------------------------------------------------------


def test_every_version_can_still_be_pulled_and_what_is_promised_replayed(history: History, tmp_path: Path) -> None:
    done = run(history)
    assert done.removed == len(done.plan.removals) > 20
    assert done.removed_bytes == sum(one.size_bytes for one in done.plan.removals)
    source = StoreSource(history.store)
    missing = {manifest.version: lacking(manifest, lambda ref: holds(history, ref)) for manifest in history.manifests}
    assert source.retained(MODEL).gone == {version: parts for version, parts in missing.items() if parts}
    assert [v for v, parts in missing.items() if "export" not in parts] == [0, 4, 8, 9]
    assert [v for v, parts in missing.items() if "master" not in parts] == [0, 7, 8, 9]
    require_all_pullable(history, tmp_path / "pulled")
    for version in (8, 9):
        assert verify_version(source, MODEL, version, cache=tmp_path / "cache").ok


def test_momenta_stay_where_a_replay_begins(tmp_path: Path) -> None:
    history = make_varied_history()
    assert run(history, Rules(keep_exports=1, keep_masters=1, checkpoint_every=1)).removed > 0
    assert StoreSource(history.store).retained(MODEL).gone[1] == ("master", "momentum")
    assert verify_version(StoreSource(history.store), MODEL, None, cache=tmp_path).ok


@pytest.mark.parametrize("keep", [1, 5])
def test_revocations_rollbacks_and_changes_of_key_keep_their_replays(keep: int, tmp_path: Path) -> None:
    history = make_changed_history()
    assert run(history, Rules(keep_exports=1, keep_masters=keep, checkpoint_every=4)).removed > 0
    source = StoreSource(history.store)
    for manifest in history.manifests[-keep:]:
        assert verify_version(source, MODEL, manifest.version, cache=tmp_path / "cache").ok
    assert verify_version(source, MODEL, None, cache=tmp_path / "cache", level="all").ok
    require_all_pullable(history, tmp_path / "pulled")


def test_a_contribution_of_long_ago_can_still_be_revoked(tmp_path: Path) -> None:
    history = make_changed_history()
    run(history, Rules(keep_exports=1, keep_masters=1, checkpoint_every=6))
    assert "master" in StoreSource(history.store).retained(MODEL).gone[1]
    revoke(history.store, history.key, model=MODEL, contributions=[history.contribution(5, 1)], now=2.0)
    assert verify_version(StoreSource(history.store), MODEL, None, cache=tmp_path).ok


def test_what_was_given_up_goes_and_the_promise_still_holds(history: History, tmp_path: Path) -> None:
    run(history, Rules(keep_exports=2, keep_masters=1, checkpoint_every=4, keep_contributions=2))
    source = StoreSource(history.store)
    gone = source.retained(MODEL).gone
    assert [v for v in range(VERSIONS) if "contributions" not in gone.get(v, ())] == [0, 8, 9]
    assert "master" in gone[0]
    for version in (8, 9):
        assert verify_version(source, MODEL, version, cache=tmp_path / "cache").ok
    with pytest.raises(NotFoundError):
        verify_version(source, MODEL, 7, cache=tmp_path / "cache")
    require_all_pullable(history, tmp_path / "pulled")


def test_what_a_rollback_brought_back_stays(history: History) -> None:
    history.roll_back(5)
    run(history)
    assert all(holds(history, group.master) for group in history.manifests[5].groups)
    assert not any(holds(history, group.master) for group in history.manifests[3].groups)


def test_a_dry_run_says_the_same_and_changes_nothing(history: History) -> None:
    before = history.store.contents()
    said = run(history, dry_run=True)
    assert history.store.contents() == before
    done = run(history)
    assert [one.key for one in done.plan.removals] == [one.key for one in said.plan.removals]
    assert (said.removed, said.removed_bytes) == (0, 0)


def test_a_second_run_finds_nothing(history: History) -> None:
    run(history)
    after = history.store.contents()
    again = run(history)
    assert (again.removed, again.plan.removals) == (0, ())
    assert history.store.contents() == after


def test_nothing_young_goes(history: History) -> None:
    done = collect(history.store, RULES, clock=time.time, publisher_key=history.publisher_key)
    assert done.plan.removals == ()
    assert history.store.head(retained_key(MODEL)) is None


# -- kills and others at work ------------------------------------------------------------------------------------------


class Killed(BaseException):
    """No handler in the code under test may catch this."""


@pytest.mark.parametrize("changes", [0, 1, 2, 8, 15, 21])
def test_a_run_that_is_killed_anywhere_leaves_everything_in_reach_and_is_taken_up(
    history: History, template: History, changes: int, tmp_path: Path
) -> None:
    left = changes

    def die(key: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed

    history.store.before = die
    with pytest.raises(Killed):
        run(history)
    gone = StoreSource(history.store).retained(MODEL).gone
    for manifest in history.manifests:
        missing = lacking(manifest, lambda ref: holds(history, ref))
        assert set(missing) <= set(gone.get(manifest.version, ()))
    if changes in (2, 15):
        require_all_pullable(history, tmp_path / "pulled")
    history.store.before = lambda key: None
    run(history)
    whole = History(Bucket(template.store), template.key)
    run(whole)
    assert history.store.contents() == whole.store.contents()


def test_the_record_of_what_is_gone_comes_before_the_first_deletion(history: History) -> None:
    order: list[str] = []
    history.store.before = order.append
    run(history)
    assert order[0] == retained_key(MODEL)
    assert all(key.startswith("blobs/") for key in order[1:])


def test_a_version_that_appears_meanwhile_keeps_what_it_names(history: History, tmp_path: Path) -> None:
    """A rollback to version 2 is published after the plan was made and before anything was deleted."""

    def meanwhile(key: str) -> None:
        history.store.before = lambda key: None
        history.roll_back(2)

    history.store.before = meanwhile
    done = run(history)
    assert done.spared >= 4
    assert all(holds(history, group.master) and holds(history, group.export) for group in history.manifests[2].groups)
    require_all_pullable(history, tmp_path)


def test_a_version_that_appears_too_late_is_not_passed_over_in_silence(history: History) -> None:
    deleted: list[str] = []

    def too_late(key: str) -> None:
        deleted.append(key)
        if len(deleted) == 12:
            history.store.before = lambda key: None
            history.patches = False
            history.roll_back(2)

    history.store.before = too_late
    with pytest.raises(IntegrityError, match="asks for since"):
        run(history)


def test_two_collectors_at_once_do_not_overwrite_each_other(history: History) -> None:
    def other(key: str) -> None:
        history.store.before = lambda key: None
        history.store.put(key, canonical_json(Retained(model=MODEL, gone={3: ("master",)})))

    history.store.before = other
    with pytest.raises(ConflictError):
        run(history)


# -- what cannot be understood -----------------------------------------------------------------------------------------


def _forge(history: History) -> None:
    history.publish(history.manifests[3], key=parse_private_key(generate_private_key()))


def _put(key: str) -> Callable[[History], None]:
    return lambda history: history.store.put(key, b"{}") and None


BROKEN: dict[str, Callable[[History], None]] = {
    "a manifest is missing": lambda history: history.store.delete(manifest_key(MODEL, 3)),
    "a manifest is forged": _forge,
    "a manifest is another one": lambda history: history.publish(
        history.manifests[3].model_copy(update={"licence": "x"})
    ),
    "there is no pointer": lambda history: history.store.delete(pointer_key(MODEL)),
    "the pointer names nothing": lambda history: history.point(9, digest="0" * 64),
    "a manifest cannot be read": _put(manifest_key(MODEL, 10)),
    "a round cannot be read": _put(round_key("round-1")),
    "an ending cannot be read": _put(round_end_key("round-1")),
    "an ending is that of another round": lambda history: add_end(history, "round-1", named="round-2"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_where_a_record_cannot_be_trusted_nothing_is_deleted(fault: str, history: History) -> None:
    BROKEN[fault](history)
    before = history.store.contents()
    with pytest.raises(IntegrityError):
        run(history)
    assert history.store.contents() == before


def test_an_unknown_object_stays_with_all_that_it_names(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    lost, named = history.manifests[3].groups[0].master, history.manifests[2].groups[0].master
    monkeypatch.setattr(aggregator.stocktaking, "_PIECE_BYTES", 1000)
    split = b"x" * 970 + b'"' + named.sha256.encode() + b'"' + b"y" * 2000
    history.store.put("plugins/of/tomorrow.bin", split)
    history.store.put("blobs/sha256/zz/readme", b"?")
    run(history)
    assert (holds(history, lost), holds(history, named)) == (False, True)
    assert history.store.head("blobs/sha256/zz/readme") is not None


def test_a_manifest_beyond_the_pointer_keeps_what_it_names(history: History) -> None:
    """One is a publication that stopped half-way; one follows nothing."""
    stray = history.manifests[2].model_copy(update={"version": 12, "parent": "1" * 64})
    history.publish(stray)
    history.roll_back(5)
    history.point(9)
    inventory = read_inventory(history.store, publisher_key=history.publisher_key)
    assert [len(model.chain) for model in inventory.models.values()] == [11]
    run(history)
    for version in (2, 5):
        assert all(holds(history, group.master) for group in history.manifests[version].groups)
    assert not holds(history, history.manifests[3].groups[0].master)


# -- rounds, datasets and uploads --------------------------------------------------------------------------------------


def add_round(
    history: History, round_id: str, base: int, shards: tuple[BlobRef, ...], teacher: int | None = None
) -> None:
    taught_by = None
    if teacher is not None:
        digest = manifest_digest(history.manifests[teacher])
        taught_by = VersionRef(model=MODEL, version=teacher, manifest=digest)
    record = RoundRecord(
        round_id=round_id,
        request=RoundRequest(model=MODEL, dataset="data", shards=1),
        index=0,
        base_version=base,
        base_manifest=manifest_digest(history.manifests[base]),
        teacher=taught_by,
        shards=shards,
        targets=history.manifests[0].targets(),
        opened_at=1.0,
    )
    history.store.put(round_key(round_id), canonical_json(record))


def add_end(
    history: History, round_id: str, state: RoundState = RoundState.CANCELLED, *, named: str | None = None
) -> None:
    end = RoundEnd.model_validate({"round_id": named or round_id, "state": state, "ended_at": 2.0})
    history.store.put(round_end_key(round_id), canonical_json(end))


def add_receipt(history: History, round_id: str, lease_id: str, data: bytes) -> BlobRef:
    """An accepted contribution."""
    ref = put_blob(history.store, data)
    statement = SubmitStatement(
        round_id=round_id,
        lease_id=lease_id,
        fence=1,
        base_manifest="0" * 64,
        sha256=ref.sha256,
        size_bytes=ref.size_bytes,
        tokens=1,
        steps=1,
        first_loss=1.0,
        last_loss=1.0,
        seconds=1.0,
    )
    submission = Submission(
        statement=statement,
        signature="0" * 128,
        public_key="0" * 64,
        worker_id="w",
        worker_name="w",
        shard=0,
        submitted_at=1.0,
    )
    receipt = Receipt(submission=submission, accepted=True, reason="", checks=(), judged_at=1.0)
    history.store.put(receipt_key(round_id, ref.sha256), canonical_json(receipt))
    return ref


@pytest.mark.parametrize("ended", [False, True])
def test_a_version_that_teaches_an_open_round_stays(history: History, ended: bool) -> None:
    add_round(history, "round-12", 9, (), teacher=3)
    if ended:
        add_end(history, "round-12")
    run(history)
    assert all(holds(history, group.export) for group in history.manifests[3].groups) is not ended


def test_rounds_datasets_and_uploads_keep_what_they_need(history: History) -> None:
    store = history.store
    shards = [put_blob(store, f"shard {number}".encode()) for number in range(3)]
    held_out = BlobRef(sha256="9" * 64, size_bytes=5)
    card = DatasetCard(
        dataset="data",
        source="s",
        licence="l",
        rows=1,
        heldout_rows=1,
        shards=(shards[0],),
        heldout=held_out,
        created_at=1.0,
    )
    store.put(dataset_key("data"), canonical_json(card))
    store.put(heldout_key("data", held_out.sha256), b"hello")
    add_round(history, "round-9", 8, (shards[1],))
    add_round(history, "round-10", 9, (shards[2],))
    over, under_way = put_blob(store, b"left by a fold"), put_blob(store, b"made by a fold")
    for name, ref in (("round-9", over), ("round-10", under_way)):
        store.put(draft_key(name), json.dumps({"sha256": ref.sha256}).encode())
        store.put(fold_key(name, "1" * 64, 1), json.dumps({"sha256": ref.sha256}).encode())
    delta = add_receipt(history, "round-10", "lease-1", b"delta")
    uploads = {
        upload_key("lease-1", delta.sha256): "judged",
        upload_key("lease-2", delta.sha256): "the same bytes, under a lease that waits",
        upload_key("lease-3", "3" * 64): "waits",
    }
    for key in uploads:
        store.put(key, b"bytes")
    waste = put_blob(store, b"waste")

    done = run(history)
    why = {one.key: one.why for one in done.plan.removals}
    gone = {
        draft_key("round-9"): "draft of a round that has ended",
        fold_key("round-9", "1" * 64, 1): "draft of a round that has ended",
        blob_key(over.sha256): "named by no record",
        blob_key(waste.sha256): "named by no record",
        blob_key(shards[1].sha256): "shard of a dataset that was replaced",
        upload_key("lease-1", delta.sha256): "upload that was judged",
    }
    assert {key: found for key, found in why.items() if key in gone or " older " not in found} == gone
    assert not any(store.head(key) for key in gone)
    for kept in (shards[0], shards[2], under_way, delta):
        assert holds(history, kept)
    records = (dataset_key("data"), heldout_key("data", held_out.sha256), draft_key("round-10"), *list(uploads)[1:])
    assert all(store.head(key) for key in records)


@pytest.mark.parametrize("state", [RoundState.REJECTED, RoundState.CANCELLED, RoundState.PUBLISHED, None])
def test_a_round_that_came_to_nothing_needs_nothing_more(history: History, state: RoundState | None) -> None:
    """One whose record says that it made a version which the pointer does not know is another matter."""
    shard, left = put_blob(history.store, b"shard"), put_blob(history.store, b"left by a fold")
    add_round(history, "round-10", 9, (shard,))
    history.store.put(draft_key("round-10"), json.dumps({"sha256": left.sha256}).encode())
    if state is not None:
        add_end(history, "round-10", state)
    why = {one.key: one.why for one in run(history).plan.removals}
    found = [why.get(key) for key in (draft_key("round-10"), blob_key(left.sha256), blob_key(shard.sha256))]
    over = ["draft of a round that has ended", "named by no record", "shard of a dataset that was replaced"]
    assert found == (over if state in (RoundState.REJECTED, RoundState.CANCELLED) else [None] * 3)
    assert history.store.head(round_key("round-10"))
    assert (history.store.head(round_end_key("round-10")) is not None) is (state is not None)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dry_run", [True, False])
def test_the_command_says_what_goes_and_why(
    dry_run: bool, history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rankup.cli import gc, stack
    from rankup.signing import save_private_key

    private, public = generate_private_key(), history.publisher_key
    save_private_key(tmp_path / "key", private)
    access = stack.ServerAccess("", "", StoreSettings(), LedgerSettings(), "", tmp_path, tmp_path / "key")
    monkeypatch.setattr(stack.ServerAccess, "of_this_machine", classmethod(lambda cls: access))
    monkeypatch.setattr("rankup.store.open_store", lambda settings: history.store)
    monkeypatch.setattr("rankup.signing.public_key_hex", lambda key: public)
    monkeypatch.setattr("time.time", later)
    app = typer.Typer()
    gc.register(app)
    options = ["--keep-exports", "2", "--keep-masters", "2", "--checkpoint-every", "4"]
    before = history.store.contents()
    with pytest.raises(InputError, match="asked"):
        app(options, standalone_mode=False)
    assert history.store.contents() == before
    capsys.readouterr()
    app([*options, "--json", "--dry-run" if dry_run else "--yes"], standalone_mode=False)
    said = json.loads(capsys.readouterr().out)
    assert (said["dry_run"], said["removed"] == 0) == (dry_run, dry_run)
    assert said["planned_bytes"] == sum(one["size_bytes"] for one in said["removals"]) > 0
    assert "export" in said["retained"][MODEL]["gone"]["1"]
    app([*options, "--dry-run"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert ("master of an older version" in shown) == dry_run
    with pytest.raises(InputError):
        app(["--keep-contributions", "some"], standalone_mode=False)


def test_uploads_that_nobody_goes_on_with_are_ended_after_the_grace_period(history: History) -> None:
    store = history.store
    for lease, age_s in (("lease-1", RULES.grace_s + 60), ("lease-2", RULES.grace_s - 60)):
        store._clock = lambda age_s=age_s: later() - age_s
        store.begin_upload(upload_key(lease, "3" * 64))
    store.begin_upload("elsewhere/x")
    assert run(history, dry_run=True).unfinished == 1
    assert len(list(store.open_uploads("uploads/"))) == 2
    assert run(history).unfinished == 1
    assert [upload.key for upload in store.open_uploads("uploads/")] == [upload_key("lease-2", "3" * 64)]
    assert run(history).unfinished == 0
    assert len(list(store.open_uploads("elsewhere/"))) == 1
