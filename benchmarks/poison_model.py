"""A small byte-level language model whose volunteers all train at once: the subject of the robustness benchmark.

A transformer of about 0.2 M parameters reads 7-bit bytes. The base is trained on the standard library's source code
without docstrings and comments; the rounds teach it the docstrings, English prose. Each volunteer trains LoRA factors
of its own on the frozen float32 masters. All of them share one forward and one backward pass: every tensor has a
leading volunteer dimension V, and the low-rank products are batched matrix products.

What always holds:
- the same seed gives the same bits on the same machine: one thread, seeded generators, no time;
- train, screening and test text are disjoint pieces of one shuffled list of docstrings;
- a volunteer starts a round with a fresh A, B = 0 and a fresh Adam state, and its gradient norm is clipped alone.

It knows no attack and no rule.
"""

from __future__ import annotations

import ast
import math
import os
import random
import sysconfig
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

VOCABULARY: Final = 128
WIDTH: Final = 96
HEADS: Final = 4
LAYERS: Final = 2
CONTEXT: Final = 64
RANK: Final = 4
LAYER_SHAPES: Final = {
    "qkv": (3 * WIDTH, WIDTH),
    "out": (WIDTH, WIDTH),
    "up": (4 * WIDTH, WIDTH),
    "down": (WIDTH, 4 * WIDTH),
}
TARGETS: Final = {f"{layer}.{name}": shape for layer in range(LAYERS) for name, shape in LAYER_SHAPES.items()}
"""(d_out, d_in) of every weight that takes a delta: all but the embeddings."""
SCALE: Final = 2.0
"""LoRA's alpha / r; multiplied into B before it leaves the volunteer."""
CACHE_VERSION: Final = 3

Weights = dict[str, Tensor]
Lora = Mapping[str, tuple[Tensor, Tensor]]
"""name -> B (V, d_out, r), A (V, r, d_in), scaling already in B."""


# -- text --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """Bytes as int64 tensors of rows: (n, CONTEXT + 1)."""

    train: Tensor
    screening: Tensor
    test: Tensor


def to_rows(pieces: list[str]) -> Tensor:
    """Texts, one after the other, cut into rows of CONTEXT + 1 bytes; what is not ASCII becomes '?'."""
    data = np.frombuffer("\n\n".join(pieces).encode("ascii", "replace"), dtype=np.uint8).astype(np.int64)
    count = data.size // (CONTEXT + 1)
    return torch.from_numpy(data[: count * (CONTEXT + 1)].reshape(count, CONTEXT + 1).copy())


def docstrings() -> Text:
    """The docstrings of the standard library without repeats, shuffled once for all seeds; 5 % test, 7 % screening."""
    from coordinator import pydocs

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pieces = sorted({row["completion"][0]["content"] for row in pydocs.rows()})
    random.Random(0).shuffle(pieces)
    test, screening = len(pieces) // 20, len(pieces) // 8
    return Text(to_rows(pieces[screening:]), to_rows(pieces[test:screening]), to_rows(pieces[:test]))


def source_code() -> Tensor:
    """The standard library's top-level modules without docstrings and comments: rows of code."""
    pieces = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if not isinstance(body, list):
                continue
            kept = [
                line
                for line in body
                if not (
                    isinstance(line, ast.Expr)
                    and isinstance(line.value, ast.Constant)
                    and isinstance(line.value.value, str)
                )
            ]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
        pieces.append(ast.unparse(tree))
    return to_rows(pieces)


# -- the model ---------------------------------------------------------------------------------------------------------


def fresh_weights(generator: torch.Generator) -> Weights:
    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    weights = {
        "bytes": normal(VOCABULARY, WIDTH, std=0.05),
        "places": normal(CONTEXT, WIDTH, std=0.02),
        "head": normal(VOCABULARY, WIDTH, std=0.05),
    }
    for name, (d_out, d_in) in TARGETS.items():
        shrink = 1 / math.sqrt(2 * LAYERS) if name.endswith(("out", "down")) else 1.0
        weights[name] = normal(d_out, d_in, std=shrink / math.sqrt(d_in))
    return weights


def logits_of(weights: Weights, tokens: Tensor, lora: Lora | None = None) -> Tensor:
    """tokens (V, n, t) int64 -> logits (V, n, t, VOCABULARY); volunteer v uses weights + B_v A_v."""
    volunteers, rows, length = tokens.shape
    flat = (volunteers, rows * length)

    def linear(name: str, x: Tensor) -> Tensor:  # (V, rows * length, d_in) -> (V, rows * length, d_out)
        y = functional.linear(x, weights[name])
        if lora is not None:
            b, a = lora[name]
            y = torch.baddbmm(y, torch.bmm(x, a.transpose(1, 2)), b.transpose(1, 2))
        return y

    x = (functional.embedding(tokens, weights["bytes"]) + weights["places"][:length]).view(*flat, WIDTH)
    for layer in range(LAYERS):
        qkv = linear(f"{layer}.qkv", functional.rms_norm(x, (WIDTH,)))
        q, k, v = qkv.view(volunteers * rows, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(f"{layer}.out", mixed.transpose(1, 2).reshape(*flat, WIDTH))
        x = x + linear(f"{layer}.down", functional.relu(linear(f"{layer}.up", functional.rms_norm(x, (WIDTH,)))))
    logits = functional.linear(functional.rms_norm(x, (WIDTH,)), weights["head"])
    return logits.view(volunteers, rows, length, VOCABULARY)


def losses(weights: Weights, inputs: Tensor, targets: Tensor, lora: Lora | None = None) -> Tensor:
    """Mean nats per byte of each volunteer: (V,). Targets of -1 do not count."""
    volunteers = inputs.shape[0]
    logits = logits_of(weights, inputs, lora)
    each = functional.cross_entropy(logits.view(-1, VOCABULARY), targets.reshape(-1), reduction="none", ignore_index=-1)
    return each.view(volunteers, -1).sum(1) / (targets >= 0).view(volunteers, -1).sum(1)


@torch.no_grad()
def evaluate(weights: Weights, rows: Tensor, lora: Lora | None = None, volunteers: int = 1, batch: int = 64) -> Tensor:
    """Loss of each of `volunteers` models on the same rows (n, CONTEXT + 1): (V,) nats per byte."""
    total = torch.zeros(volunteers, dtype=torch.float64)
    for start in range(0, rows.shape[0], batch):
        part = rows[start : start + batch].expand(volunteers, -1, -1)
        total += losses(weights, part[..., :-1], part[..., 1:].contiguous(), lora).double() * part.shape[1]
    return total / rows.shape[0]


def held_out_gradient(weights: Weights, rows: Tensor, batch: int = 32) -> Weights:
    """Gradient of the mean loss over rows (n, CONTEXT + 1) by every weight that takes a delta."""
    total = {name: torch.zeros(shape) for name, shape in TARGETS.items()}
    for start in range(0, rows.shape[0], batch):
        part = rows[start : start + batch].unsqueeze(0)
        leaves = {name: value.detach().requires_grad_(name in TARGETS) for name, value in weights.items()}
        loss = losses(leaves, part[..., :-1], part[..., 1:].contiguous()).sum() * (part.shape[1] / rows.shape[0])
        for name, gradient in zip(TARGETS, torch.autograd.grad(loss, [leaves[name] for name in TARGETS]), strict=True):
            total[name] += gradient
    return total


# -- training ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    steps: int = 8
    batch: int = 2
    learning_rate: float = 8e-3
    warmup: int = 2
    clip: float = 1.0


def train_lora(
    weights: Weights, inputs: Tensor, targets: Tensor, recipe: Recipe, seeds: list[int]
) -> dict[str, tuple[Tensor, Tensor]]:
    """One round of V volunteers at once: inputs and targets (V, steps, batch, CONTEXT), a seed of A for each.

    Returns B (V, d_out, r), with the scaling inside, and A (V, r, d_in) of every target. Gradients stay apart because
    the losses are summed over volunteers and no parameter is shared.
    """
    volunteers = inputs.shape[0]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    sizes = [size for d_out, d_in in TARGETS.values() for size in (RANK * d_in, RANK * d_out)]
    pieces = []
    for d_out, d_in in TARGETS.values():
        uniform = torch.stack([torch.rand(RANK * d_in, generator=generator) for generator in generators])
        pieces.append((uniform * 2 - 1) / math.sqrt(d_in))
        pieces.append(torch.zeros(volunteers, RANK * d_out))
    theta = torch.cat(pieces, dim=1).requires_grad_()  # (V, all factors of a volunteer)

    def factors() -> dict[str, tuple[Tensor, Tensor]]:
        parts = iter(theta.split(sizes, dim=1))
        return {
            name: (b.view(volunteers, d_out, RANK) * SCALE, a.view(volunteers, RANK, d_in))
            for (name, (d_out, d_in)), a, b in zip(TARGETS.items(), parts, parts, strict=True)
        }

    first, second = torch.zeros_like(theta), torch.zeros_like(theta)
    for step in range(recipe.steps):
        loss = losses(weights, inputs[:, step], targets[:, step], factors()).sum()
        (gradient,) = torch.autograd.grad(loss, theta)
        with torch.no_grad():
            norm = gradient.norm(dim=1, keepdim=True)
            gradient = gradient * (recipe.clip / (norm + 1e-6)).clamp(max=1.0)
            first.mul_(0.9).add_(gradient, alpha=0.1)
            second.mul_(0.99).addcmul_(gradient, gradient, value=0.01)
            rate = recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup)
            rate *= 1.0 - 0.9 * step / recipe.steps
            scale = (second / (1 - 0.99 ** (step + 1))).sqrt_().add_(1e-8)
            theta.sub_(rate / (1 - 0.9 ** (step + 1)) * first / scale)
    with torch.no_grad():
        return {name: (b.clone(), a.clone()) for name, (b, a) in factors().items()}


def train_base(rows: Tensor, steps: int, batch: int = 32, learning_rate: float = 3e-3) -> Weights:
    """Adam on all weights, warm-up and cosine: the model that the rounds start from."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: value.requires_grad_() for name, value in fresh_weights(generator).items()}
    optimiser = torch.optim.AdamW(weights.values(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        part = rows[torch.randint(rows.shape[0], (batch,), generator=generator)].unsqueeze(0)
        loss = losses(weights, part[..., :-1], part[..., 1:].contiguous()).sum()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimiser.step()
    return {name: value.detach() for name, value in weights.items()}


def load(steps: int, folder: Path | None = None) -> tuple[Weights, Text]:
    """The base model and the text of the rounds; made once, then read from a file in `folder`."""
    folder = folder or Path(tempfile.gettempdir()) / "rankup-poison"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"base-{CACHE_VERSION}-{LAYERS}x{WIDTH}-{steps}.pt"
    if not path.exists():
        text, weights = docstrings(), train_base(source_code(), steps)
        temporary = path.with_suffix(f".{os.getpid()}")
        torch.save({"weights": weights, "text": [text.train, text.screening, text.test]}, temporary)
        temporary.replace(path)
    stored = torch.load(path, weights_only=True)
    return stored["weights"], Text(*stored["text"])
