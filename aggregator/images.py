"""Held-out rows with images as tokens and pixels, made and masked as TRL's trainer of vision-language models does.

What always holds:
- as in `aggregator.encoding`: of a prompt with a completion the completion is scored, of `messages` everything but the
  first token, or the assistant's words alone; the places of images are never scored;
- rows are cut at the end; one whose images do not fit within the limit, or that its model's processor does not take, is
  left out, and so is one of which nothing is left to score;
- pixels are made anew whenever a row is scored, so memory holds those of one row.

It knows no model and no loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankup.errors import InputError
from rankup.images import require_pictured, row_images
from rankup.vision import placeholder_ids


@dataclass(frozen=True)
class Pictured:
    """A row with images and how it becomes the input of a model."""

    processor: Any
    row: Mapping[str, Any]
    max_tokens: int
    assistant_only: bool = False

    def scored(self) -> tuple[tuple[int, ...], tuple[bool, ...]] | None:
        """Its tokens, and which of them are predicted; None where nothing of it can be scored.

        Raises InputError: an image is damaged or beyond a limit, or the chat template does not take the row.
        """
        from jinja2 import TemplateError

        try:
            inputs, learned = self._inputs()
        except (TemplateError, TypeError) as exc:
            raise InputError(f"the model's chat template does not take this conversation: {exc}") from exc
        except ValueError:
            # Of processors: text that itself spells the place of an image.
            return None
        ids: list[int] = inputs["input_ids"][0].tolist()
        places = placeholder_ids(self.processor)
        if not places.isdisjoint(ids[self.max_tokens :]):
            return None
        ids = ids[: self.max_tokens]
        scored = [at > 0 and learned[at] and token not in places for at, token in enumerate(ids)]
        return (tuple(ids), tuple(scored)) if any(scored) else None

    def pixels(self) -> dict[str, Any]:
        """What the model is given beside the tokens: torch's tensors."""
        inputs, _ = self._inputs()
        shape = inputs["input_ids"].shape
        return {
            name: value[:, : self.max_tokens] if getattr(value, "shape", None) == shape else value
            for name, value in inputs.items()
            if name not in ("input_ids", "attention_mask")
        }

    def _inputs(self) -> tuple[dict[str, Any], Sequence[bool]]:
        """The processor's output for this row alone, uncut, and which tokens are learned."""
        require_pictured(self.row)
        images = row_images(self.row)
        if "messages" in self.row:
            return self._of_messages(images)
        return self._of_completion(images)

    def _of_messages(self, images: list[Any]) -> tuple[dict[str, Any], Sequence[bool]]:
        found = self.processor.apply_chat_template(
            _filled(self.row["messages"], images),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=self.assistant_only,
            processor_kwargs={"add_special_tokens": False},
        )
        inputs = dict(found)
        marks = inputs.pop("assistant_masks", None)
        tokens = inputs["input_ids"].shape[1]
        return inputs, [True] * tokens if marks is None else [bool(mark) for mark in marks[0]]

    def _of_completion(self, images: list[Any]) -> tuple[dict[str, Any], Sequence[bool]]:
        import torch

        prompt = _filled(self.row["prompt"], images)
        opening = self.processor.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        whole = self.processor.apply_chat_template([*prompt, *self.row["completion"]], tokenize=False)
        shared = next((at for at, (a, b) in enumerate(zip(opening, whole, strict=False)) if a != b), len(opening))
        opening = whole[:shared]
        how = {"add_special_tokens": False, "return_tensors": "pt"}
        asked = dict(self.processor(images=[images], text=[opening], **how))
        answered = self.processor(text=[whole[len(opening) :]], **how)
        tokens = asked["input_ids"].shape[1]
        answer = answered["input_ids"]
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in asked:
                behind = answered[name] if name == "token_type_ids" else torch.zeros_like(answer)
                asked[name] = torch.cat((asked[name], behind), dim=1)
        asked["input_ids"] = torch.cat((asked["input_ids"], answer), dim=1)
        return asked, [False] * tokens + [True] * answer.shape[1]


def _filled(messages: Sequence[Mapping[str, Any]], images: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages with each image in its place."""
    left = iter(images)
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": next(left)} if part["type"] == "image" else dict(part)
                for part in message["content"]
            ],
        }
        for message in messages
    ]
