"""Intake: receipts are written once, accepted bytes are kept first, and a crash in between loses nothing."""

from __future__ import annotations

import pytest
from toy_world import MAX_DELTA_BYTES, NOW, World

from aggregator.intake import admit
from rankup.errors import TooLargeError, UnreachableError
from rankup.records import Receipt, Submission
from rankup.store import blob_key
from rankup.versions import receipt_key, upload_key


def bring(world: World, submission: Submission, *, now: float = NOW) -> Receipt:
    return admit(world.store, world.record, submission, max_delta_bytes=MAX_DELTA_BYTES, now=now)


def stored(world: World, digest: str) -> Receipt:
    data = world.store.get(receipt_key(world.record.round_id, digest), max_bytes=10**6)
    return Receipt.model_validate_json(data)


def test_an_accepted_delta_becomes_a_blob_with_a_receipt_and_the_upload_goes(world: World) -> None:
    path, ref = world.delta(1)
    submission = world.submission(1, ref)
    world.upload(submission, path)
    receipt = bring(world, submission)
    assert receipt.accepted, receipt.reason
    assert stored(world, ref.sha256) == receipt
    assert world.store.get(blob_key(ref.sha256), max_bytes=10**6) == path.read_bytes()
    assert world.store.head(upload_key("lease-1", ref.sha256)) is None


def test_the_first_receipt_wins(world: World) -> None:
    path, ref = world.delta(1)
    submission = world.submission(1, ref)
    world.upload(submission, path)
    first = bring(world, submission)
    world.upload(submission, path)
    assert bring(world, submission, now=NOW + 60) == first
    assert world.store.head(upload_key("lease-1", ref.sha256)) is None


def test_a_rejection_leaves_a_receipt_and_no_blob(world: World) -> None:
    path, ref = world.delta(1, world.factors(1, rank=9))
    submission = world.submission(1, ref)
    world.upload(submission, path)
    receipt = bring(world, submission)
    assert not receipt.accepted
    assert stored(world, ref.sha256) == receipt
    assert world.store.head(blob_key(ref.sha256)) is None
    assert world.store.head(upload_key("lease-1", ref.sha256)) is None


def test_a_delta_that_was_never_uploaded_is_rejected_in_plain_words(world: World) -> None:
    _, ref = world.delta(1)
    receipt = bring(world, world.submission(1, ref))
    assert (receipt.accepted, receipt.reason) == (False, "the delta was never uploaded")


@pytest.mark.parametrize("excess", [1, MAX_DELTA_BYTES], ids=["not the signed size", "above the limit"])
def test_an_upload_of_the_wrong_size_is_never_downloaded(world: World, excess: int) -> None:
    path, ref = world.delta(1)
    submission = world.submission(1, ref)
    world.store.put(upload_key("lease-1", ref.sha256), path.read_bytes() + bytes(excess))

    def refuse(*_: object, **__: object) -> None:
        raise TooLargeError("nothing may be downloaded")

    world.store.get_file = refuse  # type: ignore[method-assign]
    receipt = bring(world, submission)
    assert not receipt.accepted
    assert "bytes" in receipt.reason


def test_bytes_that_are_a_blob_already_need_no_upload(world: World) -> None:
    """The crash came after the blob and before the receipt, or the worker was told not to send them again."""
    path, ref = world.delta(1)
    world.store.put(blob_key(ref.sha256), path.read_bytes())
    assert bring(world, world.submission(1, ref)).accepted


def test_the_same_bytes_under_another_lease_never_replace_an_acceptance(world: World) -> None:
    path, ref = world.delta(1)
    first = world.submission(1, ref)
    world.upload(first, path)
    accepted = bring(world, first)
    copied = world.submission(2, ref)
    assert copied.statement.lease_id != first.statement.lease_id
    world.upload(copied, path)
    receipt = bring(world, copied)
    assert not receipt.accepted
    assert "accepted before" in receipt.reason
    assert stored(world, ref.sha256) == accepted


def test_a_copyist_who_comes_first_does_not_shut_out_the_author(world: World) -> None:
    path, ref = world.delta(1)
    copied, own = world.submission(2, ref), world.submission(1, ref)
    world.upload(copied, path)
    assert not bring(world, copied).accepted, "the delta names lease-1"
    world.upload(own, path)
    receipt = bring(world, own)
    assert receipt.accepted, receipt.reason
    assert stored(world, ref.sha256) == receipt


@pytest.mark.parametrize("broken", ["put", "delete", "head"])
def test_after_a_crash_anywhere_doing_it_again_accepts(world: World, broken: str) -> None:
    path, ref = world.delta(1)
    submission = world.submission(1, ref)
    world.upload(submission, path)
    works = getattr(world.store, broken)

    def fail(*_: object, **__: object) -> None:
        raise UnreachableError("gone")

    setattr(world.store, broken, fail)
    with pytest.raises(UnreachableError):
        bring(world, submission)
    setattr(world.store, broken, works)
    assert bring(world, submission, now=NOW + 5).accepted
    assert stored(world, ref.sha256).accepted
