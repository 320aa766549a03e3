"""Admission: good deltas pass, every named kind of bad one gets a receipt that says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from toy_world import MAX_DELTA_BYTES, NOW, RANK, World

from aggregator.admission import CHECKS, MAX_NORM, judge
from aggregator.lowrank import product_norm
from rankup.fixedpoint import quantise
from rankup.message import canonical_json
from rankup.records import BlobRef, Receipt, Submission
from rankup.signing import generate_private_key, parse_private_key, public_key_hex, worker_id_of

FIRST = "layer.0.down.weight"


def verdict(
    world: World, path: Path, submission: Submission, *, seen: bool = False, limit: int = MAX_DELTA_BYTES
) -> Receipt:
    return judge(path, world.record, submission, max_delta_bytes=limit, seen=lambda _: seen, now=NOW)


def test_a_good_delta_is_accepted_with_every_check_and_its_norm(world: World) -> None:
    factors = world.factors(1)
    path, ref = world.delta(1, factors)
    receipt = verdict(world, path, world.submission(1, ref))
    assert receipt.accepted, receipt.reason
    assert [check.name for check in receipt.checks] == [check.name for check in CHECKS]
    assert all(check.passed for check in receipt.checks)
    assert receipt.norm == pytest.approx(sum(product_norm(part) ** 2 for part in factors.values()) ** 0.5)
    assert receipt.judged_at == NOW
    assert Receipt.model_validate_json(canonical_json(receipt)) == receipt


@pytest.mark.parametrize("rank", [RANK - 1, 1], ids=["of its tier", "below it"])
def test_a_delta_of_a_lower_tier_over_several_shards_is_accepted(world: World, rank: int) -> None:
    path, ref = world.delta(2, world.factors(2, rank=rank))
    recipe = world.record.request.recipe
    tokens = 2 * recipe.steps * recipe.batch_size * recipe.max_tokens
    submission = world.submission(2, ref, tokens=tokens, steps=2 * recipe.steps)
    receipt = verdict(world, path, submission.model_copy(update={"shards": 2, "rank": RANK - 1}))
    assert receipt.accepted, receipt.reason
    assert not verdict(world, path, submission.model_copy(update={"rank": RANK - 1})).accepted, "it is for one shard"


def test_judging_twice_gives_the_same_receipt(world: World) -> None:
    path, ref = world.delta(1)
    submission = world.submission(1, ref)
    assert verdict(world, path, submission) == verdict(world, path, submission)


Bad = Callable[[World], tuple[Path, Submission]]


def _missing(world: World) -> tuple[Path, Submission]:
    factors = world.factors(1)
    del factors[FIRST]
    path, ref = world.delta(1, factors)
    return path, world.submission(1, ref)


def _foreign_name(world: World) -> tuple[Path, Submission]:
    factors = world.factors(1)
    factors["embed.weight"] = quantise(np.ones((40, 1)), np.ones((1, 16)))
    path, ref = world.delta(1, factors)
    return path, world.submission(1, ref)


def _shape(world: World) -> tuple[Path, Submission]:
    factors = world.factors(1)
    factors[FIRST] = quantise(np.ones((24, 1)), np.ones((1, 16)))
    path, ref = world.delta(1, factors)
    return path, world.submission(1, ref)


def _rank(world: World) -> tuple[Path, Submission]:
    path, ref = world.delta(1, world.factors(1, rank=RANK + 1))
    return path, world.submission(1, ref)


def _zero(world: World) -> tuple[Path, Submission]:
    path, ref = world.delta(1, world.factors(1, scale=0.0))
    return path, world.submission(1, ref)


def _cancelling(world: World) -> tuple[Path, Submission]:
    """B = [x, x], A = [y; -y] with a single entry each: no factor is zero, the product is, exactly."""

    factors = {}
    for name, target in world.record.targets.items():
        b, a = np.zeros((target.d_out, 2)), np.zeros((2, target.d_in))
        b[0], a[:, 0] = 1.0, (1.0, -1.0)
        factors[name] = quantise(b, a)
    path, ref = world.delta(1, factors)
    return path, world.submission(1, ref)


def _diverged(world: World) -> tuple[Path, Submission]:
    path, ref = world.delta(1, world.factors(1, scale=MAX_NORM))
    return path, world.submission(1, ref)


def _bytes(world: World, change: Callable[[bytearray], bytes]) -> tuple[Path, Submission]:
    """A changed file, signed for as it is."""
    import hashlib

    path, _ = world.delta(1)
    data = change(bytearray(path.read_bytes()))
    path.write_bytes(data)
    ref = BlobRef(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
    return path, world.submission(1, ref)


def _dtype(world: World) -> tuple[Path, Submission]:
    return _bytes(world, lambda data: bytes(data).replace(b'"I16"', b'"F16"', 1))


def _exponent(world: World) -> tuple[Path, Submission]:
    """int16 holds no NaN; what diverges is an exponent far outside. Scales of a weight lie last."""

    def change(data: bytearray) -> bytes:
        # rows of the last tensor: exponents of B, of A, maxima of B, of A, each of RANK int16
        data[-2 * 4 * RANK : -2 * 4 * RANK + 2] = (30_000).to_bytes(2, "little")
        return bytes(data)

    return _bytes(world, change)


def _maximum(world: World) -> tuple[Path, Submission]:
    """A stored maximum below the data's would break the exactness of the sum."""

    def change(data: bytearray) -> bytes:
        data[-2:] = (1).to_bytes(2, "little")
        return bytes(data)

    return _bytes(world, change)


def _pickle(world: World) -> tuple[Path, Submission]:
    import pickle

    return _bytes(world, lambda _: pickle.dumps({"weights": [0.0] * 100}))


def _header_bomb(world: World) -> tuple[Path, Submission]:
    return _bytes(world, lambda data: (2**40).to_bytes(8, "little") + bytes(data[8:]))


def _other_lease(world: World) -> tuple[Path, Submission]:
    path, ref = world.delta(1, lease_id="lease-2")
    return path, world.submission(1, ref)


def _wrong_hash(world: World) -> tuple[Path, Submission]:
    path, ref = world.delta(1)
    submission = world.submission(1, ref)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return path, submission


def _wrong_size(world: World) -> tuple[Path, Submission]:
    path, ref = world.delta(1)
    return path, world.submission(1, BlobRef(sha256=ref.sha256, size_bytes=ref.size_bytes + 1))


def _wrong_signature(world: World) -> tuple[Path, Submission]:
    """Someone raises the number of tokens after the worker signed."""
    path, ref = world.delta(1)
    submission = world.submission(1, ref)
    statement = submission.statement.model_copy(update={"tokens": submission.statement.tokens + 1})
    return path, submission.model_copy(update={"statement": statement})


def _stolen_name(world: World) -> tuple[Path, Submission]:
    path, ref = world.delta(1)
    other = public_key_hex(parse_private_key(generate_private_key()))
    return path, world.submission(1, ref).model_copy(update={"worker_id": worker_id_of(other)})


def _other_round(world: World) -> tuple[Path, Submission]:
    path, ref = world.delta(1)
    return path, world.submission(1, ref, round_id="round-2")


def _other_base(world: World) -> tuple[Path, Submission]:
    path, ref = world.delta(1)
    return path, world.submission(1, ref, base_manifest="0" * 64)


def _no_such_shard(world: World) -> tuple[Path, Submission]:
    path, ref = world.delta(1)
    return path, world.submission(1, ref).model_copy(update={"shard": len(world.record.shards)})


def _boast(world: World) -> tuple[Path, Submission]:
    path, ref = world.delta(1)
    recipe = world.record.request.recipe
    return path, world.submission(1, ref, tokens=recipe.steps * recipe.batch_size * recipe.max_tokens + 1)


def _overtime(world: World) -> tuple[Path, Submission]:
    path, ref = world.delta(1)
    return path, world.submission(1, ref, steps=world.record.request.recipe.steps + 1)


def _above_its_tier(world: World) -> tuple[Path, Submission]:
    path, ref = world.delta(1)
    return path, world.submission(1, ref).model_copy(update={"rank": RANK - 1})


def _too_old_a_round(world: World) -> tuple[Path, Submission]:
    path, ref = world.delta(1, round_id="round-0")
    return path, world.submission(1, ref, round_id="round-0")


def _late_of_another_base(world: World) -> tuple[Path, Submission]:
    world.record = world.record.model_copy(update={"earlier_rounds": ("round-0",)})
    path, ref = world.delta(1, round_id="round-0")
    return path, world.submission(1, ref, round_id="round-0", base_manifest="0" * 64)


def _too_many_shards(world: World) -> tuple[Path, Submission]:
    path, ref = world.delta(2)
    return path, world.submission(2, ref).model_copy(update={"shards": 3})


def _boast_of_two(world: World) -> tuple[Path, Submission]:
    path, ref = world.delta(2)
    recipe = world.record.request.recipe
    tokens = 2 * recipe.steps * recipe.batch_size * recipe.max_tokens + 1
    return path, world.submission(2, ref, tokens=tokens).model_copy(update={"shards": 2})


def _almost_cancelling(world: World) -> tuple[Path, Submission]:
    """Two components that are a million times larger than their sum: a small norm over a coarse grid."""
    factors = world.factors(1)
    rng = np.random.default_rng(0)
    column, row = rng.normal(size=(factors[FIRST].d_out, 1)), rng.normal(size=(1, factors[FIRST].d_in))
    small = 2.0**-13 * rng.normal(size=column.shape)
    factors[FIRST] = quantise(np.hstack([column, column + small]) * 2.0**10, np.vstack([row, -row]))
    path, ref = world.delta(1, factors)
    return path, world.submission(1, ref)


def _in_four_bits(world: World) -> tuple[Path, Submission]:
    request = world.record.request
    recipe = request.recipe.model_copy(update={"four_bit": "never"})
    world.record = world.record.model_copy(update={"request": request.model_copy(update={"recipe": recipe})})
    path, ref = world.delta(1)
    return path, world.submission(1, ref, precision="nf4")


BAD_DELTAS: dict[str, tuple[Bad, str, str]] = {
    "components that almost cancel each other": (_almost_cancelling, "cancellation", "cancel"),
    "a weight is missing": (_missing, "structure", "missing"),
    "a weight that may not change": (_foreign_name, "structure", "embed.weight"),
    "wrong shape": (_shape, "structure", "shape"),
    "wrong dtype": (_dtype, "structure", FIRST),
    "rank above the round's": (_rank, "structure", "rank 4"),
    "exponent out of range": (_exponent, "structure", "malformed"),
    "stored maximum too small": (_maximum, "structure", "malformed"),
    "a pickle": (_pickle, "structure", "malformed"),
    "a header of a terabyte": (_header_bomb, "structure", "header"),
    "made for another lease": (_other_lease, "structure", "lease"),
    "zero everywhere": (_zero, "structure", "zero"),
    "factors that cancel each other": (_cancelling, "norm", "zero"),
    "diverged": (_diverged, "norm", "diverged"),
    "other bytes than signed": (_wrong_hash, "digest", "sha256"),
    "other length than signed": (_wrong_size, "size", "signed"),
    "statement changed after signing": (_wrong_signature, "signature", "not good"),
    "above the rank of its tier": (_above_its_tier, "structure", "rank 3"),
    "of a round that this one does not take": (_too_old_a_round, "round", "round-0"),
    "late, and of no base of the round": (_late_of_another_base, "round", "base"),
    "shards beyond the round's last": (_too_many_shards, "round", "shard 4"),
    "more tokens than its shards allow": (_boast_of_two, "work", "tokens"),
    "someone else's name": (_stolen_name, "signature", "belongs"),
    "another round": (_other_round, "round", "round-2"),
    "another base": (_other_base, "round", "base"),
    "a shard that the round has not": (_no_such_shard, "round", "shard"),
    "more tokens than the recipe can process": (_boast, "work", "tokens"),
    "more steps than the recipe has": (_overtime, "work", "steps"),
    "beside a base in 4 bits that the recipe does not take": (_in_four_bits, "work", "4 bits"),
}


@pytest.mark.parametrize(("make", "name", "word"), BAD_DELTAS.values(), ids=BAD_DELTAS.keys())
def test_a_bad_delta_is_rejected_by_the_right_check_in_plain_words(
    world: World, make: Bad, name: str, word: str
) -> None:
    receipt = verdict(world, *make(world))
    assert not receipt.accepted
    assert receipt.checks[-1].name == name, receipt.reason
    assert not receipt.checks[-1].passed
    assert word in receipt.reason
    assert receipt.norm == 0
    assert all(check.passed for check in receipt.checks[:-1])
    json.loads(canonical_json(receipt))


def test_an_oversized_delta_is_not_even_hashed(world: World) -> None:
    path, ref = world.delta(1)
    receipt = verdict(world, path, world.submission(1, ref), limit=ref.size_bytes - 1)
    assert [check.name for check in receipt.checks] == ["size"]
    assert "limit" in receipt.reason


def test_a_delta_that_was_accepted_under_another_lease_is_a_duplicate(world: World) -> None:
    path, ref = world.delta(1)
    receipt = verdict(world, path, world.submission(1, ref), seen=True)
    assert receipt.checks[-1].name == "duplicate"
    assert not receipt.accepted


def test_rotating_the_factors_does_not_change_the_norm(world: World) -> None:
    """B -> B R, A -> R^-1 A with R a power of two: other mantissas' scales, the same product."""
    factors = world.factors(1)
    turned = {
        name: replace(part, b_exp=part.b_exp + np.int16(9), a_exp=part.a_exp - np.int16(9))
        for name, part in factors.items()
    }
    norms = []
    for made in (factors, turned):
        path, ref = world.delta(1, made)
        norms.append(verdict(world, path, world.submission(1, ref)).norm)
    assert norms[0] == norms[1] > 0
