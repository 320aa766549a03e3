"""Losses of base + delta equal those of really merged models, and the base is untouched afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.evaluate import heldout_loss
from aggregator.losses import added, balanced, heldout_losses, weight_places
from aggregator.tiny import _byte_tokenizer
from rankup.errors import InputError
from rankup.fixedpoint import Factors, dequantise, quantise

Delta = Mapping[str, Sequence[Factors]]
ROWS: list[dict[str, Any]] = [
    {"prompt": "The sky is", "completion": " blue."},
    {"text": "Good small data beats large data."},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
    {"text": "short"},
]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.08,
}


def llama(vocabulary: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocabulary, attention_bias=True, bos_token_id=None, eos_token_id=1, **SIZES)
    )


def gpt2(vocabulary: int) -> Any:
    """Conv1D layers, and an embedding that is the head too."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        initializer_range=0.08,
        bos_token_id=1,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config)


def mixtral(vocabulary: int) -> Any:
    """Stacked experts: one parameter of three dimensions."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=vocabulary, num_local_experts=4, num_experts_per_tok=2, bos_token_id=None, eos_token_id=1, **SIZES
    )
    return MixtralForCausalLM(config)


MODELS: dict[str, Callable[[int], Any]] = {"llama": llama, "gpt2": gpt2, "mixtral": mixtral}


@pytest.fixture(scope="module", params=MODELS, ids=MODELS.keys())
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = _byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[request.param](len(tokenizer))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # biases start at zero and scales at one, where mistakes could hide
                    parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def random_delta(model: Any, seed: int, chosen: Callable[[str], bool] = lambda name: True) -> Delta:
    """Factors for every weight whose name is `chosen`, large enough to change the loss."""
    rng = np.random.default_rng(seed)

    def product(d_out: int, d_in: int) -> Factors:
        rank = int(rng.integers(1, 5)) if d_in > 1 else 1
        b = rng.standard_normal((d_out, rank)) * 0.05
        return quantise(b, rng.standard_normal((rank, d_in)) if d_in > 1 else np.ones((1, 1)))

    result = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if chosen(name):
            slices, d_out, d_in = {1: (1, *shape, 1), 2: (1, *shape), 3: shape}[len(shape)]
            result[name] = [product(d_out, d_in) for _ in range(slices)]
    return result


def merged(folder: Path, delta: Delta, to: Path) -> Path:
    """The folder of the model with the delta added to its weights."""
    import torch
    from transformers import AutoTokenizer

    model = load(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in delta:
                change = np.stack([np.matmul(*dequantise(factors)) for factors in delta[name]])
                parameter.add_(torch.from_numpy(change.reshape(parameter.shape).astype(np.float32)))
    model.save_pretrained(to)
    AutoTokenizer.from_pretrained(folder).save_pretrained(to)
    return to


def losses_of(folder: Path, deltas: Sequence[Delta], **more: Any) -> tuple[float, list[float]]:
    names = sorted({name for delta in deltas for name in delta})
    sources = [lambda name, delta=delta: delta.get(name, ()) for delta in deltas]
    settings = {"max_tokens": 64, "max_rows": 100, "threads": 1} | more
    return heldout_losses(folder, ROWS, sources, names, **settings)


def test_losses_are_those_of_merged_models(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    deltas = [
        random_delta(model, 1),
        random_delta(model, 2, lambda name: "embed" in name or "wte" in name),
        random_delta(model, 3, lambda name: "embed" not in name and "wte" not in name),
        {},
    ]
    base, losses = losses_of(folder, deltas)
    assert base == heldout_loss(folder, ROWS, max_tokens=64, threads=1).loss
    for number, (delta, loss) in enumerate(zip(deltas[:3], losses[:3], strict=True)):
        expected = heldout_loss(merged(folder, delta, tmp_path / str(number)), ROWS, max_tokens=64, threads=1).loss
        assert loss == pytest.approx(expected, rel=1e-5)
        assert abs(loss - base) > 1e-3
    assert losses[3] == base


def test_every_weight_is_the_base_again_bit_for_bit_even_after_an_error(folder: Path) -> None:
    import torch

    model = load(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    delta = random_delta(model, 4)
    ids = torch.tensor([[5, 9, 33, 7]])
    with torch.inference_mode():
        plain = model(input_ids=ids).logits

        def fail_with_delta() -> None:
            with added(weight_places(model), lambda name: delta.get(name, ()), sorted(delta)):
                assert not torch.equal(model(input_ids=ids).logits, plain)
                raise KeyError

        with pytest.raises(KeyError):
            fail_with_delta()
        assert torch.equal(model(input_ids=ids).logits, plain)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    tokenizer = _byte_tokenizer()
    llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_deltas_are_asked_for_one_by_one_and_progress_is_told(small: Path) -> None:
    told: list[tuple[int, float]] = []
    name = "model.layers.0.mlp.up_proj.weight"
    delta = random_delta(load(small), 0, lambda found: found == name)

    def sources() -> Any:
        for number in (1, 2):
            assert len(told) == number
            yield lambda wanted: delta.get(wanted, ())

    base, losses = heldout_losses(
        small, ROWS, sources(), [name], max_tokens=64, max_rows=9, progress=lambda *step: told.append(step)
    )
    assert told == [(0, base), (1, losses[0]), (2, losses[1])]
    assert losses[0] == losses[1]


def test_only_the_first_rows_are_scored(small: Path) -> None:
    base, _ = losses_of(small, [], max_rows=2)
    assert base == heldout_loss(small, ROWS[:2], max_tokens=64, threads=1).loss
    assert base != losses_of(small, [])[0]


def test_a_delta_that_breaks_the_model_has_a_loss_that_is_not_finite(small: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    huge = {name: [quantise(np.full((48, 1), 2.0**100), np.full((1, 32), 2.0**100))]}
    base, losses = losses_of(small, [huge, {}])
    assert not math.isfinite(losses[0])
    assert losses[1] == base


def test_factors_outside_float32_keep_their_product() -> None:
    factors = quantise(np.full((3, 1), 1.5 * 2.0**-170), np.full((1, 2), 2.0**110))
    b, a = balanced(factors)
    np.testing.assert_array_equal(b @ a, np.full((3, 2), np.float32(1.5 * 2.0**-60)))


WRONG: dict[str, Delta] = {
    "no such weight": {"model.layers.9.mlp.up_proj.weight": [quantise(np.ones((48, 1)), np.ones((1, 32)))]},
    "transposed": {"model.layers.0.mlp.up_proj.weight": [quantise(np.ones((32, 1)), np.ones((1, 48)))]},
    "two slices of a matrix": {"model.layers.0.mlp.up_proj.weight": [quantise(np.ones((48, 1)), np.ones((1, 32)))] * 2},
    "a row for a vector": {"model.norm.weight": [quantise(np.ones((1, 1)), np.ones((1, 32)))]},
}


@pytest.mark.parametrize("delta", WRONG.values(), ids=WRONG.keys())
def test_factors_that_do_not_fit_the_base_are_refused(small: Path, delta: Delta) -> None:
    with pytest.raises(InputError):
        losses_of(small, [delta])


def test_rows_without_a_token_to_score_are_refused(small: Path) -> None:
    with pytest.raises(InputError):
        heldout_losses(small, [{"text": ""}], [], [], max_tokens=64, max_rows=5)
    with pytest.raises(InputError):
        losses_of(small, [], max_rows=0)
