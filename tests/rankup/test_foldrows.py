"""Tiles of one tensor: the law on whole arrays, and the same bits however the rows are cut."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankup.dtypes import STORED_AS, Array, Dtype, export_of, master_dtype
from rankup.errors import DeltaError, InputError, IntegrityError
from rankup.exactsum import fold_tensor
from rankup.fixedpoint import Factors, quantise
from rankup.foldrows import Law, TensorTerm, Tile, TileHashes, fold_tiles
from rankup.outer import outer_step
from rankup.products import DGEMM
from rankup.recipe import OuterStep
from rankup.records import TensorEntry
from rankup.targets import Role

LOG2 = 16
NESTEROV = OuterStep(learning_rate=0.75, momentum=0.875)


def sha256(array: Array) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def entry_of(
    master: Array, role: Role | None = "linear", momentum: Array | None = None, dtype: Dtype = "BF16"
) -> TensorEntry:
    return TensorEntry(
        shape=master.shape,
        export_dtype=dtype,
        master=sha256(master),
        export=sha256(export_of(master, dtype)),
        role=role,
        momentum=None if momentum is None else sha256(momentum),
    )


def made_factors(rng: np.random.Generator, d_out: int, d_in: int, rank: int = 2) -> Factors:
    return quantise(0.01 * rng.standard_normal((d_out, rank)), rng.standard_normal((rank, d_in)))


def stack(coefficient: int, slices: Sequence[Factors]) -> TensorTerm:
    return TensorTerm(coefficient, lambda number: slices[number], len(slices))


def run(
    master: Array,
    terms: Sequence[TensorTerm] = (),
    law: Law | None = None,
    *,
    entry: TensorEntry | None = None,
    momentum: Array | None = None,
) -> tuple[Array, Array | None, TensorEntry]:
    """New master, new momentum, and the entry that the tiles give."""
    entry = entry or entry_of(master, momentum=momentum)
    raw, state = master.tobytes(), b"" if momentum is None else momentum.tobytes()
    tiles: list[Tile] = []
    hashes = TileHashes()
    for tile in fold_tiles(
        "w",
        entry,
        terms,
        law or Law(LOG2),
        master=lambda start, length: raw[start : start + length],
        momentum=None if momentum is None else lambda start, length: state[start : start + length],
    ):
        hashes.update(tile)
        tiles.append(tile)
    dtype = STORED_AS[master_dtype(entry.export_dtype)]
    joined = np.concatenate([np.empty(0, dtype), *(tile.master.reshape(-1) for tile in tiles)])
    states = [tile.momentum.reshape(-1) for tile in tiles if tile.momentum is not None]
    new_momentum = np.concatenate(states).reshape(entry.shape) if states else None
    result = joined.astype(dtype).reshape(entry.shape)
    made = hashes.entry(entry.shape, entry.export_dtype, entry.role)
    assert made == entry_of(result, entry.role, new_momentum, entry.export_dtype)
    return result, new_momentum, made


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 30), st.integers(8, 4000), st.integers(0, 2**32 - 1))
def test_the_plain_sum_is_fold_tensor_whatever_the_tiles(d_out: int, d_in: int, tile_bytes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    master = rng.standard_normal((d_out, d_in)).astype(np.float32)
    pairs = [(20_000 + i, made_factors(rng, d_out, d_in)) for i in range(3)]
    law = Law(LOG2, tile_bytes=tile_bytes)
    found, momentum, _ = run(master, [stack(c, [f]) for c, f in pairs], law)
    assert found.tobytes() == fold_tensor(master, pairs, LOG2).tobytes()
    assert momentum is None


@pytest.mark.parametrize("tile_bytes", [8, 100, 10**6])
@pytest.mark.parametrize("kernels", [None, (DGEMM,)])
def test_the_outer_step_follows_the_rounded_sum(tile_bytes: int, kernels: tuple[()] | None) -> None:
    rng = np.random.default_rng(1)
    master, state = rng.standard_normal((2, 30, 20)).astype(np.float32)
    factors = made_factors(rng, 30, 20)
    law = Law(LOG2, NESTEROV, tile_bytes=tile_bytes, **({} if kernels is None else {"kernels": kernels}))
    delta = fold_tensor(np.zeros_like(master), [(30_000, factors)], LOG2)
    for momentum in (state, None):
        expected = outer_step(master, delta, momentum, NESTEROV)
        found = run(master, [stack(30_000, [factors])], law, momentum=momentum)
        assert [a.tobytes() for a in found[:2] if a is not None] == [a.tobytes() for a in expected if a is not None]
        assert found[2].momentum is not None


def test_every_slice_of_stacked_experts_is_a_sum_of_its_own() -> None:
    rng = np.random.default_rng(2)
    master = rng.standard_normal((5, 12, 8)).astype(np.float32)
    # Very different scales: one grid for the whole stack would lose the small slices.
    terms = []
    for coefficient in (1000, 65_000):
        scaled = [
            quantise(10.0 ** (-4 * n) * rng.standard_normal((12, 2)), rng.standard_normal((2, 8))) for n in range(5)
        ]
        terms.append(stack(coefficient, scaled))
    for tile_bytes in (64, 10**6):
        found, _, made = run(master, terms, Law(LOG2, tile_bytes=tile_bytes), entry=entry_of(master, "experts"))
        for number in range(5):
            pairs = [(term.coefficient, term.factors(number)) for term in terms]
            assert found[number].tobytes() == fold_tensor(master[number], pairs, LOG2).tobytes()
        assert made.role == "experts"


def test_a_slice_without_a_change_keeps_its_bits_unless_a_momentum_moves_it() -> None:
    rng = np.random.default_rng(3)
    master = rng.standard_normal((2, 6, 4)).astype(np.float32)
    master[1] = -0.0
    zero = quantise(np.zeros((6, 1)), np.zeros((1, 4)))
    term = stack(7, [made_factors(rng, 6, 4), zero])
    entry = entry_of(master, "experts")
    found, _, _ = run(master, [term], entry=entry)
    assert found[1].tobytes() == master[1].tobytes()
    assert found[0].tobytes() != master[0].tobytes()
    stepped, momentum, _ = run(master, [term], Law(LOG2, NESTEROV), entry=entry)
    assert stepped[1].tobytes() == np.zeros((6, 4), np.float32).tobytes()
    assert momentum is not None
    assert not momentum[1].any()


def test_a_vector_is_a_matrix_of_one_column() -> None:
    rng = np.random.default_rng(4)
    master = rng.standard_normal(37).astype(np.float32)
    change = rng.standard_normal((37, 1))
    factors = quantise(change, np.ones((1, 1)))
    found, _, _ = run(master, [stack(2**LOG2, [factors])], Law(LOG2, tile_bytes=40), entry=entry_of(master, "vector"))
    np.testing.assert_allclose(found, master + change[:, 0], rtol=1e-4, atol=1e-4)
    assert found.tobytes() == fold_tensor(master[:, None], [(2**LOG2, factors)], LOG2).tobytes()


def test_a_state_without_a_term_goes_on_and_a_tensor_without_either_keeps_its_bits() -> None:
    rng = np.random.default_rng(5)
    master, state = rng.standard_normal((2, 6, 4)).astype(np.float32)
    found, momentum, _ = run(master, [], Law(LOG2, NESTEROV), momentum=state)
    assert momentum is not None
    assert momentum.tobytes() == (np.float32(0.875) * state).tobytes()
    assert found.tobytes() == (master + np.float32(0.75) * (np.float32(0.875) * momentum)).tobytes()
    master[0, 0] = -0.0
    for law in (Law(LOG2), Law(LOG2, NESTEROV)):
        assert run(master, [], law)[0].tobytes() == master.tobytes()


def test_a_state_is_dropped_where_the_step_keeps_none() -> None:
    rng = np.random.default_rng(6)
    master, state = rng.standard_normal((2, 6, 4)).astype(np.float32)
    found, momentum, made = run(master, [], Law(LOG2), momentum=state)
    assert found.tobytes() == master.tobytes()
    assert momentum is None
    assert made.momentum is None


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64", "I64", "BOOL"])
@pytest.mark.parametrize("shape", [(), (0, 4), (7,), (2, 3, 4, 5)])
def test_a_tensor_that_takes_no_delta_is_copied_in_pieces(dtype: Dtype, shape: tuple[int, ...]) -> None:
    values = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    master = np.asarray(values / 7 if master_dtype(dtype) == "F32" else values).astype(STORED_AS[master_dtype(dtype)])
    found, _, made = run(master, [], Law(LOG2, NESTEROV, tile_bytes=24), entry=entry_of(master, None, None, dtype))
    assert found.tobytes() == master.tobytes()
    assert made == entry_of(master, None, None, dtype)


def test_other_bytes_than_the_manifest_names_are_noticed_before_the_end() -> None:
    rng = np.random.default_rng(7)
    master, state = rng.standard_normal((2, 6, 4)).astype(np.float32)
    terms = [stack(9, [made_factors(rng, 6, 4)])]
    entry = entry_of(master, momentum=state)
    for wrong in ({"master": "0" * 64}, {"momentum": "0" * 64}):
        with pytest.raises(IntegrityError, match="hash that its manifest"):
            run(master, terms, Law(LOG2, NESTEROV), entry=entry.model_copy(update=wrong), momentum=state)
    with pytest.raises(IntegrityError, match="hash that its manifest"):
        run(master, [], entry=entry.model_copy(update={"master": "0" * 64}))
    with pytest.raises(IntegrityError, match="ends early"):
        run(master[:5], terms, entry=entry_of(master))


@pytest.mark.parametrize(
    ("shape", "role", "factors", "error", "words"),
    [
        ((6, 4), "linear", [(4, 6)], DeltaError, "does not fit"),
        ((6, 4), "linear", [(6, 4), (6, 4)], DeltaError, "number of slices"),
        ((2, 6, 4), "experts", [(6, 4)], DeltaError, "number of slices"),
        ((6, 4), None, [(6, 4)], IntegrityError, "does not let"),
    ],
)
def test_terms_that_do_not_fit_are_refused(
    shape: tuple[int, ...], role: Role | None, factors: list[tuple[int, int]], error: type[Exception], words: str
) -> None:
    rng = np.random.default_rng(8)
    master = rng.standard_normal(shape).astype(np.float32)
    term = stack(9, [made_factors(rng, *each) for each in factors])
    with pytest.raises(error, match=words):
        run(master, [term], entry=entry_of(master, role))


def test_a_state_must_be_given_and_a_tile_must_hold_something() -> None:
    master = np.ones((2, 2), np.float32)
    with pytest.raises(InputError, match="is needed"):
        run(master, [], Law(LOG2, NESTEROV), entry=entry_of(master, momentum=master))
    with pytest.raises(InputError, match="empty"):
        run(master, [], Law(LOG2, tile_bytes=4))
