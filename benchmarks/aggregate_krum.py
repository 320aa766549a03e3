"""Part 4 of benchmarks/aggregate.py: a Gram matrix and multi-Krum on low-rank contributions, whole model, timed.

Contributions are int16 deltas as a server has them. The time is that of `gram_of` over all weights of all layers (one
layer's contributions, taken as often as there are layers) and of the rule.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import numpy as np
from aggregate_run import MODELS, contribution, serve

from aggregator.lowrank import gram_of
from aggregator.rules import weights
from rankup.fixedpoint import dequantise, quantise


def measure(model: str, contributions: int, rank: int, passes: int) -> dict[str, Any]:
    """CPU seconds of each pass of the Gram matrix over one layer, and of multi-Krum."""
    shapes = MODELS[model].linear
    deltas = [
        {
            name: [quantise(*contribution(*shape, rank, seed=(1, place, i)))]
            for place, (name, shape) in enumerate(shapes.items())
        }
        for i in range(contributions)
    ]
    sources = [delta.__getitem__ for delta in deltas]
    gram_s = []
    for _ in range(passes):
        started = time.process_time()
        gram = gram_of(sources, shapes)
        gram_s.append(time.process_time() - started)
    tokens = [1000] * contributions
    started = time.process_time()
    weights("multi_krum", gram, tokens, clip_norm_ratio=1.5, byzantine_share=0.25)
    rule_s = time.process_time() - started
    name = "self_attn.k_proj"
    small = [np.matmul(*dequantise(delta[name][0])) for delta in deltas[:4]]
    dense = np.array([[np.sum(x * y) for y in small] for x in small])
    off = np.abs(gram_of([delta.__getitem__ for delta in deltas[:4]], [name]) - dense).max() / np.diagonal(dense).max()
    return {"gram_s": gram_s, "rule_s": rule_s, "off": float(off), "versions": {"numpy": version("numpy")}}


if __name__ == "__main__":
    serve(measure)
