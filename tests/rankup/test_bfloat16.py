"""bfloat16 against torch, for every upper half and every kind of tie."""

from __future__ import annotations

import numpy as np
import pytest

from rankup import bfloat16
from rankup.bfloat16 import from_bfloat16, to_bfloat16
from rankup.errors import InputError


def test_bfloat16_is_that_of_torch_for_every_upper_half_and_every_kind_of_tie() -> None:
    torch = pytest.importorskip("torch")
    upper = np.arange(2**16, dtype=np.uint32) << np.uint32(16)
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    values = (upper[:, None] | lower[None, :]).view(np.float32)
    finite_or_infinite = ~np.isnan(values)
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    found = to_bfloat16(values)
    assert found.shape == values.shape
    assert np.array_equal(found[finite_or_infinite], expected[finite_or_infinite])
    back = from_bfloat16(found)
    assert np.isnan(back[~finite_or_infinite]).all()
    assert (found[~finite_or_infinite] & 0x40).all()
    assert np.array_equal(np.signbit(back), np.signbit(values))


def test_bfloat16_back_and_forth_changes_nothing_and_tiles_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(12).normal(size=(37, 29)).astype(np.float32)
    bits = to_bfloat16(values.T)
    assert bits.tobytes() == to_bfloat16(from_bfloat16(bits)).tobytes()
    monkeypatch.setattr(bfloat16, "_TILE", 10)
    assert to_bfloat16(values.T).tobytes() == bits.tobytes()


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1,)])
def test_bfloat16_keeps_the_shape(shape: tuple[int, ...]) -> None:
    assert to_bfloat16(np.ones(shape, dtype=np.float32)).shape == shape
    assert from_bfloat16(np.zeros(shape, dtype=np.uint16)).shape == shape


def test_bfloat16_of_other_types_is_refused() -> None:
    with pytest.raises(InputError):
        to_bfloat16(np.ones(2))  # type: ignore[arg-type]
    with pytest.raises(InputError):
        from_bfloat16(np.ones(2, dtype=np.int16))
