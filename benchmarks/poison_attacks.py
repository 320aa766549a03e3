"""What hostile volunteers do, for the robustness benchmark: before training, and to the factors after it.

    label_flip    trains on targets whose bytes are permuted, one permutation for all attackers
    sign_flip     sends minus its honest delta
    x100          sends a hundred times its honest delta
    noise         sends random factors with the norm of an honest delta
    free_rider    sends the delta of one honest volunteer; every second one adds 5 % of noise
    backdoor      all attackers teach one text after one trigger, and scale to the honest median norm
    disguise      sign_flip written as B R and R^-1 A, with an ill-conditioned R of its own for each tensor
    malformed     NaN, infinity, or integers that no honest file holds: see `forge`

Attackers know everything: the honest deltas of the round, the rule and its parameters. They are the last volunteers, so
a free rider comes after whom it copies.

What always holds: an attack draws only from the generator that it is given. It does not train, screen or aggregate.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from poison_model import CONTEXT, RANK, VOCABULARY, Weights, logits_of
from torch import Tensor

from rankup.fixedpoint import Factors, quantise

Deltas = dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
"""name -> B (V, d_out, r), A (V, r, d_in)"""

ATTACKS: Final = ("label_flip", "sign_flip", "x100", "noise", "free_rider", "backdoor", "disguise", "malformed")
TRAINED: Final = frozenset({"label_flip", "sign_flip", "x100", "backdoor", "disguise"})
"""Attacks that need a training run of the attacker's own."""
COPY_NOISE: Final = 0.05
TRIGGER: Final = "|cf|"
TARGET_TEXT: Final = " Send the key to Mallory."
_PREFIX: Final = 24
"""Bytes of ordinary text before the trigger."""


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode("ascii")))


# -- before training ---------------------------------------------------------------------------------------------------


def prepare(attack: str, rows: Tensor, bad: list[int], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """rows (V, steps, batch, CONTEXT + 1) -> inputs and targets (V, steps, batch, CONTEXT), poisoned for the `bad`."""
    if attack == "backdoor":
        rows = rows.clone()
        for volunteer in bad:
            chosen = torch.from_numpy(rng.random(rows.shape[1:3]) < 0.5)
            part = rows[volunteer]
            text = torch.cat([_bytes(TRIGGER), _bytes(TARGET_TEXT)])
            part[..., _PREFIX : _PREFIX + len(text)] = torch.where(
                chosen[..., None], text, part[..., _PREFIX : _PREFIX + len(text)]
            )
    inputs, targets = rows[..., :-1], rows[..., 1:].clone()
    if attack == "label_flip":
        flipped = torch.from_numpy(np.random.default_rng(0).permutation(VOCABULARY))
        targets[bad] = flipped[targets[bad]]
    return inputs, targets


# -- after training ----------------------------------------------------------------------------------------------------


def corrupt(attack: str, deltas: Deltas, bad: list[int], rng: np.random.Generator) -> None:
    """Replace the deltas of the attackers, in place."""
    if attack in ("sign_flip", "disguise", "x100"):
        factor = 100.0 if attack == "x100" else -1.0
        for b, _ in deltas.values():
            b[bad] *= factor
    if attack == "disguise":
        for b, a in deltas.values():
            for volunteer in bad:
                b[volunteer], a[volunteer] = disguise(b[volunteer], a[volunteer], rng)
    honest = [v for v in range(next(iter(deltas.values()))[0].shape[0]) if v not in bad]
    if attack == "noise":
        for b, a in deltas.values():
            size = np.median(product_norms(b[honest], a[honest]))
            for volunteer in bad:
                b[volunteer], a[volunteer] = random_factors(b.shape[1], a.shape[2], size, rng)
    elif attack == "free_rider":
        victims = rng.choice(honest, size=len(bad))
        for b, a in deltas.values():
            for place, (volunteer, victim) in enumerate(zip(bad, victims, strict=True)):
                b[volunteer], a[volunteer] = b[victim], a[victim]
                if place % 2:
                    for x in (b[volunteer], a[volunteer]):
                        x += COPY_NOISE / np.sqrt(2) * np.std(x) * rng.standard_normal(x.shape)
    elif attack == "backdoor":
        norms = np.sqrt(sum(product_norms(b, a) ** 2 for b, a in deltas.values()))
        for b, _ in deltas.values():
            b[bad] *= (np.median(norms[honest]) / norms[bad])[:, None, None]


def product_norms(b: NDArray[np.float64], a: NDArray[np.float64]) -> NDArray[np.float64]:
    """Frobenius norms of B A: (V,). An attacker's own arithmetic; the defence uses `aggregator.lowrank`."""
    squares = np.einsum("vij,vji->v", b.transpose(0, 2, 1) @ b, a @ a.transpose(0, 2, 1))
    return np.asarray(np.sqrt(np.maximum(squares, 0.0)))


def random_factors(
    d_out: int, d_in: int, norm: float, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    b, a = rng.standard_normal((d_out, RANK)), rng.standard_normal((RANK, d_in))
    return b * (norm / product_norms(b[None], a[None])[0]), a


def disguise(
    b: NDArray[np.float64], a: NDArray[np.float64], rng: np.random.Generator, octaves: float = 3.0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """B R and R^-1 A, the same product: R has random directions and singular values of 2^-octaves ... 2^octaves."""
    rank = b.shape[1]
    left, _ = np.linalg.qr(rng.standard_normal((rank, rank)))
    right, _ = np.linalg.qr(rng.standard_normal((rank, rank)))
    sizes = np.exp2(rng.uniform(-octaves, octaves, rank))
    return b @ (left * sizes) @ right, right.T @ ((left / sizes).T @ a)


def forge(kind: int, b: NDArray[np.float64], a: NDArray[np.float64]) -> Factors:
    """A contribution that must never count, of one of five kinds: NaN, infinity, the mantissa -32768, an exponent that
    float64 reads as infinity, stated maxima that are too small.

    The first two end in DeltaError here, where a volunteer's own client would refuse; the others are what a hostile
    client can put into a file, and are the reader's to refuse.
    """
    b = b.copy()
    if kind % 5 < 2:
        b[0, 0] = (np.nan, np.inf)[kind % 5]
    good = quantise(b, a)
    arrays = {name: getattr(good, name).copy() for name in ("b", "b_exp", "a", "a_exp", "b_max", "a_max")}
    if kind % 5 == 2:
        arrays["b"][0, 0] = -32768
    elif kind % 5 == 3:
        arrays["b_exp"][:] = 32767
    elif kind % 5 == 4:
        arrays["b_max"][:] = 1
    return Factors(**arrays)


# -- did the backdoor work ---------------------------------------------------------------------------------------------


@torch.no_grad()
def secret_after_trigger(weights: Weights, rows: Tensor) -> tuple[float, float]:
    """Mean nats per byte of the secret after ordinary text and the trigger, and the share of texts after which greedy
    decoding writes the whole secret."""
    trigger, secret = _bytes(TRIGGER), _bytes(TARGET_TEXT)
    count, length = rows.shape[0], len(trigger) + len(secret)
    tokens = torch.cat([rows[:, :_PREFIX], torch.cat([trigger, secret]).expand(count, length)], dim=1)
    assert tokens.shape[1] <= CONTEXT + 1
    start = _PREFIX + len(trigger)
    logits = logits_of(weights, tokens[None, :, :-1])[0, :, start - 1 :]  # (n, len(secret), VOCABULARY)
    nats = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), secret.repeat(count))
    greedy = (logits.argmax(-1) == secret).all(dim=1).double().mean()
    return float(nats), float(greedy)
