"""What the held-out loss of a set of rows is: a function of the log-probabilities of its answers.

With l_i the sum of ln p over the scored tokens of example i, and n_i their number (docs/numerics.md, "Held-out loss"):

    text, messages, completions    L = -sum l_i / sum n_i                                  nats per token
    pairs (chosen c, rejected r)   L = mean over pairs of -ln sigmoid(BETA (l_c - l_r))    nats per pair
    good and bad answers (g, b)    L = mean over all (g, b) of -ln sigmoid(l_g/n_g - l_b/n_b)

What always holds: lower is better, and losses of two versions on the same rows can be compared: no version is a
reference for another. Of preferences, ln 2 = 0.69 is the loss of a model that cannot tell them apart.

Log-probabilities are torch's; how a model gives them is `aggregator.evaluate`'s subject.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aggregator.encoding import Example, encode
from rankup.errors import InputError

BETA = 0.1
"""Of pairs: DPO's usual one, whatever the recipe's is, so that all rounds on a dataset are measured alike."""


@dataclass(frozen=True)
class Heldout:
    """Held-out rows as tokens, by their length: what shares a batch then needs little padding."""

    examples: tuple[Example, ...]
    rows: int
    """How many rows they are of."""
    kind: str
    """"tokens", "pairs" or "labels"."""

    @property
    def tokens(self) -> int:
        """How many tokens are scored in all."""
        return sum(example.tokens for example in self.examples)

    @property
    def is_linear(self) -> bool:
        """Whether the loss is a weighted sum of the log-probabilities, with weights that do not depend on them."""
        return self.kind == "tokens"

    def loss(self, log_probs: Any) -> Any:
        """The loss, float64 without dimensions, of ln p of each example over its tokens, (examples,) float64."""
        import torch

        softplus = torch.nn.functional.softplus
        if self.kind == "tokens":
            return -log_probs.sum() / self.tokens
        good = [place for place, example in enumerate(self.examples) if example.good]
        bad = [place for place, example in enumerate(self.examples) if not example.good]
        if self.kind == "pairs":
            good.sort(key=lambda place: self.examples[place].row)
            bad.sort(key=lambda place: self.examples[place].row)
            return softplus(-BETA * (log_probs[good] - log_probs[bad])).mean()
        each = log_probs / torch.tensor([example.tokens for example in self.examples], dtype=log_probs.dtype)
        return softplus(each[bad][None, :] - each[good][:, None]).mean()


def read_heldout(
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    max_tokens: int,
    max_rows: int | None = None,
    assistant_only: bool = False,
) -> Heldout:
    """The rows as tokens; with `max_rows` only so many, the first ones (of labelled rows, with one of each label).

    Raises InputError: no row has a token to score, the rows are of several kinds, or their answers are all good or all
    bad; and what `encode` raises.
    """
    chosen = rows if max_rows is None else first_rows(rows, max_rows)
    found = [
        encode(tokenizer, row, max_tokens, number=number, assistant_only=assistant_only)
        for number, row in enumerate(chosen)
    ]
    kinds = {_kind(row) for row, examples in zip(chosen, found, strict=True) if examples}
    if not kinds:
        raise InputError(f"none of the {len(chosen)} held-out rows has a token to score within {max_tokens} tokens")
    if len(kinds) > 1:
        raise InputError(f"held-out rows are of several kinds: {', '.join(sorted(kinds))}")
    examples = sorted(
        (example for each in found for example in each), key=lambda e: (len(e.ids), e.ids, e.scored, e.good)
    )
    if kinds == {"labels"} and len({example.good for example in examples}) == 1:
        raise InputError(
            "the answers of the held-out rows are all good or all bad: a model cannot tell one from the other",
            remedy="Build the dataset with more held-out rows.",
        )
    return Heldout(tuple(examples), sum(map(bool, found)), kinds.pop())


def first_rows(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """The first rows; where they have one label only, the last of them gives way to the first row of the other one."""
    chosen = list(rows[:count])
    labels = {row.get("label") for row in chosen}
    if chosen and count > 1 and len(labels) == 1 and labels != {None}:
        other = next((row for row in rows[count:] if row.get("label") not in labels), None)
        chosen = chosen if other is None else [*chosen[:-1], other]
    return chosen


def _kind(row: Mapping[str, Any]) -> str:
    if "chosen" in row:
        return "pairs"
    return "labels" if isinstance(row.get("label"), bool) else "tokens"
