"""The method distillation: a teacher answers the prompts of the shards, and the base learns its answers.

Sequence-level distillation (Kim & Rush, arXiv:1606.07947): the answers are text, so teacher and pupil may differ in
architecture and tokenizer. With a `teacher_weight` w the loss of an answer's token is

    (1 - w) · -ln p(token) + w · KL(teacher ‖ pupil)

over the whole vocabulary, which then must be the same (Hinton et al., arXiv:1503.02531, without softening).

What always holds:
- the teacher is loaded before the base and gone when the base comes, but for w > 0, where both are in memory;
- an answer depends on teacher, prompt and seed; on others in its batch only in the last bits;
- a pupil learns that an answer ends where the teacher ended it, not where it was cut;
- what is answered is on the disk (`worker.answers`): whatever ends the process, no prompt is answered twice.

Torch, transformers and trl are imported inside or handed in.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rankup.errors import InputError
from rankup.protocol import DeviceKind
from rankup.recipe import Recipe
from worker import sft
from worker.answers import Answer, AnswersFile, Prompt, asked_rows, batches, prompt_of
from worker.job import Answered, Job, Line
from worker.lesson import Lesson, dataset_of, shared_arguments
from worker.loading import load_tokenizer
from worker.orders import Orders
from worker.pausing import going_on
from worker.teacher import Teacher, chat_ids, load_teacher, prompt_ids, room_for

Tokens = dict[str, list[int]]
"""An example as TRL takes it when nothing is to be prepared: `input_ids`, and `labels` with -100 where nothing is
learned."""


def taught(
    torch: Any,
    transformers: Any,
    job: Job,
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    device: DeviceKind,
    emit: Callable[[Line], None],
    orders: Orders,
) -> tuple[list[Tokens], Any]:
    """The prompts that the job's steps reach with the teacher's answers, in the tokens of `tokenizer`, the pupil's; and
    the teacher, where the loss needs it, else None.

    Answers that are in the job's file are taken from there; the teacher is loaded only for the others.
    Raises InputError: no teacher, one that does not fit (chat template, vocabulary), or no prompt that leaves room for
    an answer; DoesNotFitError; and torch's out-of-memory error where one prompt alone is too much.
    """
    folder, recipe = job.teacher_folder, job.recipe
    if folder is None:
        raise InputError("the lease has no teacher to learn from")
    theirs = _teachers_tokenizer(transformers, folder, recipe, rows[0], tokenizer)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or recipe.max_tokens
    limit = min(recipe.max_tokens, context)
    prompts: dict[int, Prompt] = {}
    asked_ids: dict[int, list[int]] = {}

    def fits(row: int) -> bool:
        prompts[row] = prompt_of(rows[row])
        asked_ids[row] = prompt_ids(theirs, prompts[row])
        return len(asked_ids[row]) < limit and len(prompt_ids(tokenizer, prompts[row])) < recipe.max_tokens

    asked = asked_rows(len(rows), job.steps * recipe.batch_size, job.seed, fits)
    if not asked:
        raise InputError(
            f"no prompt of the shard leaves room for an answer within {limit} tokens",
            remedy="The organiser should raise the recipe's max_tokens.",
        )
    lengths = {row: len(asked_ids[row]) for row in asked}
    fit, model = room_for(torch, job, folder, device, limit), None
    with AnswersFile(job.answers_file, job.training_digest()) as file:
        todo = [batch for batch in batches(lengths, fit.micro_batch) if not file.answers.keys() >= set(batch)]
        if todo:
            emit(Answered(done=len(file.answers), total=len(asked)))
            model = load_teacher(transformers, torch, folder, device, fit)
            teacher = Teacher(torch, transformers, model, theirs, job, limit=limit, orders=orders)
            for batch in todo:
                began = time.perf_counter()
                open_rows = {row: asked_ids[row] for row in batch if row not in file.answers}
                answers = teacher.answer(open_rows, plain=isinstance(prompts[batch[0]], str))
                file.add(answers, time.perf_counter() - began)
                emit(Answered(done=len(file.answers), total=len(asked)))
            del teacher
        told = [(prompts[row], file.answers[row]) for row in asked]
    examples = [tokens_of(tokenizer, prompt, answer, recipe.max_tokens) for prompt, answer in told]
    if not any(examples):
        raise InputError("the teacher has no answer to any prompt of the shard")
    if recipe.teacher_weight == 0:
        model = None
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    elif model is None:
        model = load_teacher(transformers, torch, folder, device, fit)
    return [example for example in examples if example is not None], model


def _teachers_tokenizer(transformers: Any, folder: Path, recipe: Recipe, row: Mapping[str, Any], pupils: Any) -> Any:
    try:
        theirs = load_tokenizer(transformers, folder, row)
    except InputError as exc:
        raise InputError(f"the teacher cannot answer: {exc.cause}", remedy=exc.remedy) from exc
    if recipe.teacher_weight > 0 and theirs.get_vocab() != pupils.get_vocab():
        raise InputError(
            "the teacher has another vocabulary than the base, so its probabilities cannot be compared",
            remedy="The organiser should set the recipe's teacher_weight to 0: the answers alone are learned then.",
        )
    return theirs


def tokens_of(tokenizer: Any, prompt: Prompt, answer: Answer, max_tokens: int) -> Tokens | None:
    """Prompt and answer as the pupil learns them, cut to `max_tokens`; None where nothing of the answer is left.

    The answer begins where the tokens of the prompt and those of both first differ. Its end is learned if it has one.
    """
    if not answer.text and not answer.ended:
        return None
    if isinstance(prompt, str):
        end = tokenizer.eos_token if answer.ended else ""
        whole = list(tokenizer(text=prompt + answer.text + end, verbose=False)["input_ids"])
    else:
        said = [*prompt, {"role": "assistant", "content": answer.text}]
        whole = chat_ids(tokenizer, said, continue_final_message=not answer.ended)
    opening = prompt_ids(tokenizer, prompt)
    shared = next((n for n, (a, b) in enumerate(zip(opening, whole, strict=False)) if a != b), len(opening))
    whole = whole[:max_tokens]
    if shared >= len(whole):
        return None
    return {"input_ids": whole, "labels": [-100] * shared + whole[shared:]}


def make_trainer(lesson: Lesson) -> Any:
    """The trainer of a lesson whose rows and teacher are those of `taught`. Raises InputError as `worker.sft` does."""
    if lesson.teacher is None:
        return sft.make_trainer(lesson)
    import torch
    import trl

    progress, teacher, weight = lesson.progress, lesson.teacher, lesson.job.recipe.teacher_weight

    class Pupil(trl.SFTTrainer):  # type: ignore[misc]
        """SFTTrainer with the teacher's probabilities in its loss; what keeps experts in balance is not part of it."""

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels = inputs["labels"]
            progress.tokens += int((labels[..., 1:] != -100).sum())
            seen = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            with torch.no_grad():
                theirs = teacher(**seen, use_cache=False).logits
            outputs = model(**seen, use_cache=False)
            total = blended(torch, outputs.logits, theirs, labels, weight)
            count = (labels[..., 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
            loss = total / torch.as_tensor(count).clamp(min=1)
            return (loss, outputs) if return_outputs else loss

    return going_on(Pupil, torch, lesson.checkpoint)(
        model=lesson.adapted.model,
        args=trl.SFTConfig(**shared_arguments(lesson), completion_only_loss=False),
        train_dataset=dataset_of(lesson.rows),
        processing_class=lesson.tokenizer,
    )


def blended(torch: Any, ours: Any, theirs: Any, labels: Any, weight: float) -> Any:
    """Sum over the learned tokens of (1 - weight) · -ln p(token) + weight · KL(teacher ‖ pupil), in nats.

    `ours`, `theirs` (rows, tokens, vocabulary): logits, whose vocabularies may be filled up to different sizes: the
    divergence is over what both have. `labels` (rows, tokens): -100 where nothing is learned.
    """
    functional = torch.nn.functional
    learned = labels[:, 1:] != -100  # the logits at one place are for the token at the next
    ours, theirs = ours[:, :-1][learned].float(), theirs[:, :-1][learned].float()  # (learned tokens, vocabulary)
    nats = functional.cross_entropy(ours, labels[:, 1:][learned], reduction="sum")
    common = min(ours.shape[-1], theirs.shape[-1])
    ours, theirs = (functional.log_softmax(logits[:, :common], dim=-1) for logits in (ours, theirs))
    divergence = functional.kl_div(ours, theirs, reduction="sum", log_target=True)
    return (1.0 - weight) * nats + weight * divergence
