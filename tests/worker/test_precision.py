"""What fits where: the memory of a training as a formula, and the choice that follows from it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankup.errors import SetupError
from rankup.recipe import Precision, Recipe
from rankup.targets import Target
from worker.precision import (
    BaseShape,
    DoesNotFitError,
    Fit,
    Hardware,
    Task,
    choose,
    may_narrow,
    memory_bytes,
    whole_logits,
)

GIB = 1024**3
PAGE = Path(__file__).parents[2] / "docs" / "volunteering.md"


Shapes = dict[str, tuple[int, ...]]


def llama(layers: int, hidden: int, inner: int, keys: int, vocabulary: int, *, head: bool) -> Shapes:
    """Names and shapes of a Llama's weights."""
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    if head:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    for number in range(layers):
        layer = f"model.layers.{number}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.k_proj.weight": (keys, hidden),
            f"{layer}.self_attn.v_proj.weight": (keys, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
        }
    return shapes


MODELS = {
    "135M": llama(30, 576, 1536, 192, 49152, head=False),
    "1B": llama(16, 2048, 8192, 512, 128256, head=False),
    "3B": llama(28, 3072, 8192, 1024, 128256, head=False),
    "7B": llama(32, 4096, 11008, 4096, 32000, head=True),
    "13B": llama(40, 5120, 13824, 5120, 32000, head=True),
    "70B": llama(80, 8192, 28672, 1024, 32000, head=True),
}
BASES = {name: BaseShape.of(shapes) for name, shapes in MODELS.items()}
CARDS_GIB = (6, 8, 12, 16, 24)
TAKEN_BYTES = int(0.7 * GIB)
"""By the driver and a desktop."""
TARGETS = {
    model: {
        name: Target(d_out=shape[0], d_in=shape[1], rank=16)
        for name, shape in shapes.items()
        if ".layers." in name and len(shape) == 2
    }
    for model, shapes in MODELS.items()
}
PAGE_RECIPE = Recipe(rank=16, batch_size=4, max_tokens=1024)


def task_of(model: str, recipe: Recipe) -> Task:
    """Of a recipe that trains all linear layers."""
    return Task.of(recipe, TARGETS[model])


def ampere(free: float) -> Hardware:
    return Hardware("cuda", int(free * GIB), bfloat16=True, four_bit=True)


# -- what a base is ----------------------------------------------------------------------------------------------------


def test_the_shape_of_a_base_follows_from_names_and_shapes() -> None:
    shape = BASES["135M"]
    # A layer: q, o 576², k, v 192·576, three of 1536·576; in and out: 2·1152 + 2·768 + 3·2112.
    layer = 2 * 576**2 + 2 * 192 * 576 + 3 * 1536 * 576
    assert (shape.packed, shape.widths) == (30 * layer, 30 * (2 * 1152 + 2 * 768 + 3 * 2112))
    assert shape.weights == 30 * layer + 49152 * 576 + 61 * 576 == 134_515_008
    assert (shape.layers, shape.hidden, shape.vocabulary, shape.largest) == (30, 576, 49152, 1536 * 576)


EXPERTS: dict[str, tuple[Shapes, int]] = {
    "four stacked": ({"model.layers.0.mlp.experts.down_proj": (4, 32, 24)}, 4),
    "sixty-four stacked": ({"model.layers.0.mlp.experts.up": (64, 32, 24)}, 8),
    "sixteen numbered": ({f"model.layers.0.mlp.experts.{n}.w1.weight": (24, 32) for n in range(16)}, 8),
}


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_stay_in_16_bits_and_a_token_visits_eight_at_most(case: str) -> None:
    experts, counted = EXPERTS[case]
    shape = BaseShape.of({"wte.weight": (100, 32), **experts})
    assert (shape.packed, shape.layers) == (0, 1)
    assert shape.widths == counted * (24 + 32)


def test_the_memory_of_a_training_is_the_sum_that_the_docstring_writes() -> None:
    base = BaseShape(weights=1000, packed=800, largest=100, widths=64, layers=2, hidden=8, vocabulary=50)
    task = Task(trained=10, trained_matrices=0, batch=4, tokens=16, all_logits=False, four_bit=True)
    # 4·1000 + 16·10 + 16·(4·3·1.1·32 + 8·8 + 12·50) = 21542.4
    assert memory_bytes(base, task, ("float32", "float32", 1, False), gpu=False) == int(21542.4 * 1.05)
    # 2·1000 + 160 + 64·(2·(4·8 + 2·1.4·32) + 6·8) = 20796.8; on a processor all logits at once, 64·12·50, besides
    way = ("bfloat16", "bfloat16", 4, True)
    card = int(20796.8 * 1.05) + int(0.4 * GIB)
    assert memory_bytes(base, task, way, gpu=True) == card
    assert memory_bytes(base, task, way, gpu=False) == int((20796.8 + 64 * 12 * 50) * 1.05)
    # In nf4: 0.516·800 and 2·(200 + 100) in place of 2·1000.
    packed = memory_bytes(base, task, ("nf4", "bfloat16", 4, True), gpu=True) - card
    assert packed == pytest.approx(((0.5 + 1 / 64 + 4 / 16384) * 800 + 600 - 2000) * 1.05, abs=1)
    wide = Task(trained=10, trained_matrices=30, batch=4, tokens=16, all_logits=True, four_bit=True)
    assert memory_bytes(base, wide, way, gpu=True) - card == pytest.approx((64 * 12 * 50 + 10 * 30) * 1.05, abs=1)


def test_many_logits_are_computed_in_tiles_on_a_processor_too() -> None:
    assert whole_logits(4 * 128, 49_152)
    assert not whole_logits(4 * 1024, 49_152)


def test_what_a_recipe_trains_is_counted_with_ranks_slices_and_vectors() -> None:
    targets = {
        "a": Target(d_out=6, d_in=4, rank=2),
        "b": Target(role="experts", d_out=5, d_in=3, slices=4, rank=2),
        "c": Target(role="vector", d_out=7, d_in=1, rank=1),
        "h": Target(role="head", d_out=50, d_in=8, rank=1),
    }
    task = Task.of(Recipe(method="dpo", max_tokens=16), targets)
    assert (task.trained, task.trained_matrices, task.tokens) == (20 + 64 + 7 + 58, 400, 32)


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_activations_are_about_what_autograd_keeps(half: bool) -> None:
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shapes = llama(4, 256, 768, 128, 300, head=True)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
    )
    model: Any = LlamaForCausalLM(config).to(torch.bfloat16 if half else torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.enable_input_require_grads()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=half),
    ):
        hidden = model.get_base_model().model(input_ids=torch.zeros((1, 128), dtype=torch.long)).last_hidden_state
    assert hidden.requires_grad
    base, task = BaseShape.of(shapes), Task(0, 0, 1, 128, all_logits=False, four_bit=False)
    precision: Literal["float32", "bfloat16"] = "bfloat16" if half else "float32"
    nothing = Task(0, 0, 1, 0, all_logits=False, four_bit=False)
    modelled = memory_bytes(base, task, (precision, precision, 1, False), gpu=False)
    modelled -= memory_bytes(base, nothing, (precision, precision, 1, False), gpu=False)
    # The formula has one layer more, for gradients on their way, and the reserve.
    assert 1.0 < modelled / sum(kept.values()) < 1.5


# -- the choice --------------------------------------------------------------------------------------------------------

CHOICES: dict[str, tuple[str, Hardware, dict[str, Any], tuple[Precision, str, int, bool] | str]] = {
    "a processor": ("135M", Hardware("cpu", 8 * GIB), {}, ("float32", "float32", 4, False)),
    "a processor with little memory": ("135M", Hardware("cpu", 2 * GIB), {}, ("float32", "float32", 4, True)),
    "a processor never packs": ("7B", Hardware("cpu", 16 * GIB, four_bit=True), {}, "needs 27.8 GiB"),
    "memory that nobody knows": ("7B", Hardware("xpu"), {}, ("float32", "float32", 4, False)),
    "plenty": ("135M", ampere(24), {}, ("bfloat16", "bfloat16", 4, False)),
    "not plenty": ("7B", ampere(16), {}, ("bfloat16", "bfloat16", 4, True)),
    "in pieces": ("7B", ampere(15.0), {}, ("bfloat16", "bfloat16", 2, True)),
    "four bits": ("7B", ampere(8), {}, ("nf4", "bfloat16", 4, True)),
    "before Ampere": ("1B", Hardware("cuda", 6 * GIB, four_bit=True), {}, ("float16", "float16", 4, True)),
    "four bits before Ampere": ("7B", Hardware("cuda", 8 * GIB, four_bit=True), {}, ("nf4", "float16", 4, True)),
    "too small": ("13B", ampere(6), {}, "needs 9.1 GiB with the base in nf4, and 6.0 GiB are free"),
    "without bitsandbytes": ("7B", Hardware("cuda", 8 * GIB, bfloat16=True), {}, r"rankup\[cuda\]"),
    "four bits are not for this round": ("7B", ampere(8), {"four_bit": "never"}, "in bfloat16, and 8.0 GiB"),
    "after a failure": ("135M", ampere(24), {"micro_batch": 3}, ("bfloat16", "bfloat16", 2, True)),
    "what began in four bits": ("1B", ampere(24), {"begun_in": "nf4"}, ("nf4", "bfloat16", 4, False)),
    "what began wider": ("7B", ampere(8), {"begun_in": "bfloat16"}, ("nf4", "bfloat16", 4, True)),
    "what began on a processor": ("1B", ampere(24), {"begun_in": "float32"}, ("bfloat16", "bfloat16", 4, False)),
    "four bits by the owner's word": ("1B", ampere(24), {"wanted": "nf4"}, ("nf4", "bfloat16", 4, False)),
    "float32 by the owner's word": ("1B", ampere(24), {"wanted": "float32"}, ("float32", "float32", 4, False)),
    "four bits on a processor": (
        "1B",
        Hardware("cpu", 32 * GIB, four_bit=True),
        {"wanted": "nf4"},
        ("nf4", "float32", 4, False),
    ),
    "half on a processor": ("1B", Hardware("cpu", 32 * GIB), {"wanted": "float16"}, "needs a CUDA card"),
    "bfloat16 before Ampere": ("1B", Hardware("cuda", 32 * GIB), {"wanted": "bfloat16"}, "cannot compute"),
    "no bitsandbytes": ("1B", Hardware("cuda", 32 * GIB), {"wanted": "nf4"}, r"rankup\[cuda\]"),
    "no four bits": ("1B", ampere(24), {"wanted": "nf4", "four_bit": "never"}, "takes no training in 4 bits"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_best_that_fits_is_chosen(case: str) -> None:
    model, hardware, more, expected = CHOICES[case]
    recipe = Recipe(rank=16, batch_size=4, max_tokens=512, four_bit=more.pop("four_bit", "if_needed"))
    base, task = BASES[model], task_of(model, recipe)
    if isinstance(expected, str):
        with pytest.raises(SetupError) as failed:
            choose(base, task, hardware, **more)
        assert re.search(expected, f"{failed.value.cause} {failed.value.remedy}")
        return
    fit = choose(base, task, hardware, **more)
    assert (fit.precision, fit.compute, fit.micro_batch, fit.checkpointing) == expected
    assert hardware.free_bytes is None or fit.needs_bytes <= hardware.free_bytes


NARROWER: dict[str, tuple[dict[str, Any], bool]] = {
    "as allowed": ({}, True),
    "in float16": ({"held": "float16"}, True),
    "is in 4 bits": ({"held": "nf4"}, False),
    "a processor": ({"held": "float32"}, False),
    "the owner's word": ({"wanted": "bfloat16"}, False),
    "the round's word": ({"recipe": Recipe(four_bit="never")}, False),
    "no bitsandbytes": ({"there": lambda name: None}, False),
}


@pytest.mark.parametrize("case", NARROWER)
def test_four_bits_are_tried_where_they_may_be(case: str) -> None:
    changed, answer = NARROWER[case]
    usual = {"recipe": Recipe(), "wanted": "auto", "held": "bfloat16", "there": lambda name: name}
    assert may_narrow(**usual | changed) is answer


@given(
    model=st.sampled_from(sorted(MODELS)),
    free=st.integers(0, 200 * GIB),
    more=st.integers(0, 100 * GIB),
    batch=st.integers(1, 64),
    tokens=st.integers(8, 4096),
    wide=st.booleans(),
)
def test_pieces_divide_the_batch_and_more_memory_is_never_used_worse(
    model: str, free: int, more: int, batch: int, tokens: int, wide: bool
) -> None:
    base, task = BASES[model], task_of(model, Recipe(batch_size=batch, max_tokens=tokens))

    def at(memory: int) -> Fit | None:
        try:
            fit = choose(base, task, Hardware("cuda", memory, bfloat16=wide, four_bit=True))
        except DoesNotFitError:
            return None
        assert batch % fit.micro_batch == 0
        assert fit.needs_bytes <= memory
        return fit

    def worth(fit: Fit | None) -> tuple[bool, bool, bool, int]:
        return (
            (False, False, False, 0)
            if fit is None
            else (
                True,
                fit.precision != "nf4",
                not fit.checkpointing,
                fit.micro_batch,
            )
        )

    assert worth(at(free)) <= worth(at(free + more))


def test_the_page_shows_what_the_formula_says() -> None:
    """The table "What fits on my card" of docs/volunteering.md."""
    rows = []
    for model, base in BASES.items():
        cells = []
        for card in CARDS_GIB:
            try:
                fit = choose(base, task_of(model, PAGE_RECIPE), ampere(card - TAKEN_BYTES / GIB))
            except DoesNotFitError:
                cells.append("–")
                continue
            cells.append(f"{4 if fit.precision == 'nf4' else 16} bits, {fit.micro_batch}")
        rows.append(f"| {model} | {' | '.join(cells)} |")
    page = PAGE.read_text(encoding="utf-8")
    assert [row for row in rows if row not in page] == []
