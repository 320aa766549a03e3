"""The method sft: the next token of text, conversations, or completions of prompts, with TRL's `SFTTrainer`.

What always holds: tokens are those that the loss was taken over, counted batch by batch; examples that share a sequence
(`packing`) do not see each other, which is tried out on the base before it is trained. TRL is imported inside.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

from rankup.errors import InputError
from rankup.shapes import marks_assistant
from worker.lesson import Lesson, dataset_of, shared_arguments
from worker.pausing import going_on
from worker.precision import whole_logits

PACKED_TOKENS = 4096
"""Most tokens that go through the model at a time where examples are packed: without flash attention, time and memory
grow with the square of it."""
_TRIED_TOKENS = 16


def make_trainer(lesson: Lesson) -> Any:
    """The trainer of a lesson.

    Raises InputError: no example has a token to learn, the assistant's words are not marked, or the base cannot keep
    packed examples apart.
    """
    import torch
    import trl

    recipe = lesson.job.recipe
    arguments = shared_arguments(lesson)
    rows = [dict(row) for row in lesson.rows]
    if recipe.assistant_only:
        rows = _with_answers(rows, lesson.tokenizer)
        arguments["assistant_only_loss"] = True
    if recipe.packing:
        pieces = packed_pieces(arguments["per_device_train_batch_size"], recipe.max_tokens)
        arguments |= {
            "packing": True,
            "packing_strategy": "bfd",
            "per_device_train_batch_size": pieces,
            "gradient_accumulation_steps": recipe.batch_size // pieces,
        }
    trainer = trainer_class(lesson)(
        model=lesson.adapted.model,
        args=trl.SFTConfig(**arguments, completion_only_loss="prompt" in rows[0]),
        train_dataset=dataset_of(rows),
        processing_class=lesson.tokenizer,
    )
    labels = (label for example in trainer.train_dataset for label in example["labels"])
    if all(label == -100 for label in labels):
        raise InputError(
            f"no example of the shard has a token to learn within {recipe.max_tokens} tokens",
            remedy="The organiser should raise the recipe's max_tokens.",
        )
    if recipe.packing and not keeps_apart(torch, trainer.model, trainer.data_collator, lesson.fit.compute):
        raise InputError(
            "the base's attention looks across examples that are packed into one sequence",
            remedy="The organiser should set the recipe's packing to false for this model.",
        )
    return trainer


def trainer_class(lesson: Lesson) -> Any:
    """TRL's `SFTTrainer`, which goes on from the lesson's checkpoint and counts the tokens of the loss: labels after
    the shift by one that are not masked."""
    import torch
    import trl

    progress, base = lesson.progress, lesson.adapted.base
    vocabulary = base.config.get_text_config().vocab_size
    some = "logits_to_keep" in signature(base.forward).parameters

    class CountingTrainer(trl.SFTTrainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            progress.tokens += int((inputs["labels"][..., 1:] != -100).sum())
            # On a card its kernels are there, and elsewhere TRL's head saves the memory of many logits.
            if lesson.device == "cuda" or not whole_logits(inputs["labels"].numel(), vocabulary):
                return super().compute_loss(model, inputs, *args, **kwargs)
            return plain_loss(self, torch, model, inputs, kwargs.get("num_items_in_batch"), some=some)

    return going_on(CountingTrainer, torch, lesson.checkpoint)


def plain_loss(trainer: Any, torch: Any, model: Any, inputs: Any, items: Any, *, some: bool) -> Any:
    """The loss of TRL's `SFTTrainer` from whole logits: nats of the labels' tokens by `items`, the tokens of the batch.
    `some`: whether the model can leave out the logits of places at which no row of the batch has a label.

    TRL projects in tiles, which it computes once more on the way back, and measures entropy and accuracy: without its
    kernels for cards that makes a step of a small model a quarter longer.
    """
    wanted = {name: value for name, value in inputs.items() if name != "labels"}
    if trainer.aux_loss_enabled:
        wanted["output_router_logits"] = True
    labels = inputs["labels"][:, 1:]  # (rows, tokens - 1): the logits at one place are for the token at the next
    mask = labels != -100
    places = mask.any(0).nonzero().flatten()
    if some:
        wanted["logits_to_keep"] = places
    outputs = model(**wanted, use_cache=False)
    logits = outputs.logits if some else outputs.logits[:, places]  # (rows, places, vocabulary)
    nats = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels[:, places].flatten(), ignore_index=-100, reduction="sum"
    )
    loss = nats / (mask.sum().clamp(min=1) if items is None else items)
    if trainer.aux_loss_enabled and outputs.aux_loss is not None:
        pieces = 1 if items is None else trainer.current_gradient_accumulation_steps
        loss = loss + trainer.router_aux_loss_coef * outputs.aux_loss / pieces
    return loss


def packed_pieces(micro_batch: int, max_tokens: int) -> int:
    """The largest divisor of the micro-batch whose sequences have `PACKED_TOKENS` together; 1 where one has more."""
    return next(
        n for n in range(micro_batch, 0, -1) if micro_batch % n == 0 and (n == 1 or n * max_tokens <= PACKED_TOKENS)
    )


def keeps_apart(torch: Any, model: Any, collator: Any, compute: str) -> bool:
    """Whether an example gets the same logits whatever is packed before it. `compute`: torch's name of the dtype."""
    seen = []
    training = model.training
    model.eval()
    try:
        for first in (1, 2):
            ids = [first] * _TRIED_TOKENS + [3] * _TRIED_TOKENS
            batch = collator([{"input_ids": ids, "labels": ids, "seq_lengths": [_TRIED_TOKENS, _TRIED_TOKENS]}])
            inputs = {
                name: value.to(model.device) if hasattr(value, "to") else value
                for name, value in batch.items()
                if name != "labels"
            }
            with torch.no_grad():
                seen.append(model(**inputs, use_cache=False).logits[0, _TRIED_TOKENS:].float())
    except TypeError:  # an architecture that knows no positions
        return False
    finally:
        model.train(training)
    # What is masked counts exactly zero; experts may add up in another order.
    allowed = 16 * torch.finfo(getattr(torch, compute)).eps * seen[0].abs().max()
    return bool((seen[0] - seen[1]).abs().max() <= allowed)


def _with_answers(rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """The conversations in which the assistant says something. Raises InputError: none, or nothing marks its words."""
    if not marks_assistant(tokenizer.chat_template):
        raise InputError(
            "the base's chat template does not mark the assistant's words with {% generation %}",
            remedy="The organiser should set the recipe's assistant_only to false, or import a base with such a mark.",
        )
    answered = [row for row in rows if any(m.get("role") == "assistant" for m in row.get("messages") or ())]
    if not answered:
        raise InputError(
            "assistant_only is for conversations in messages, and in none of the shard's the assistant says anything",
            remedy="The organiser should set the recipe's assistant_only to false.",
        )
    return answered
