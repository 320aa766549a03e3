"""A whole round on each architecture: import, train, admit, fold, publish, pull, load, generate. Nothing is stood in
for but the network and the clock: the store is in memory, and the trainer runs in this process."""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import families
import numpy as np
import pytest
from families import FAMILIES, RELATIVES, Family

from aggregator.admission import judge
from aggregator.evaluate import heldout_loss
from aggregator.fold import fold_group, next_tensors
from aggregator.genesis import Base, make_version_zero
from aggregator.losses import heldout_losses
from aggregator.publish import carried_files, publish_manifest, version_files
from rankup.checkfiles import verify_files
from rankup.delta import DeltaReader
from rankup.fixedpoint import dequantise
from rankup.protocol import RoundRequest, SubmitStatement
from rankup.pull import pull
from rankup.recipe import PLAIN_SUM, Aggregation, Recipe
from rankup.records import BlobRef, Manifest, RoundRecord, Submission, Term
from rankup.signing import generate_private_key, parse_private_key, public_key_hex, sign, worker_id_of
from rankup.sources import StoreSource
from rankup.store import MemoryStore, put_blob_file
from rankup.targets import select_targets
from rankup.versions import manifest_digest
from worker import trainer
from worker.job import Finished, Job, Line
from worker.surgery import Adapted, adapt

PUBLISHER = parse_private_key(generate_private_key())
VOLUNTEER = parse_private_key(generate_private_key())
NOW = 1_750_000_000.0
ROWS = [{"text": f"the {n}th list of files"} for n in range(4)]
LOG2 = 16

Tensors: TypeAlias = dict[str, Any]
Change: TypeAlias = Callable[[Tensors], Tensors]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    import peft  # noqa: F401
    import trl  # noqa: F401

    folder = families.write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny")
    # Every training collects garbage, which takes as long as all the rest with what these libraries have made so far.
    gc.collect()
    gc.freeze()
    yield folder
    gc.unfreeze()


@dataclass(frozen=True)
class Trained:
    """A model in memory as a volunteer left it, and the delta that it wrote."""

    model: Any
    delta: Path
    finished: Finished


def recipe_of(family: Family, **more: Any) -> Recipe:
    fields = {
        "rank": 2,
        "alpha": 8,
        "steps": 2,
        "learning_rate": 3e-2,
        "batch_size": 2,
        "max_tokens": 24,
        "warmup_steps": 0,
        "train_vectors": True,
        "target_parameters": family.experts,
        "aggregation": Aggregation(outer=PLAIN_SUM),
    }
    return Recipe.model_validate(fields | more)


def round_on(manifest: Manifest, recipe: Recipe) -> RoundRecord:
    return RoundRecord(
        round_id="round-1",
        request=RoundRequest(model=manifest.model, dataset="lists", recipe=recipe, shards=1),
        index=0,
        base_version=0,
        base_manifest=manifest_digest(manifest),
        shards=(BlobRef(sha256=hashlib.sha256(b"lists").hexdigest(), size_bytes=1),),
        targets=select_targets(manifest.targets(), recipe),
        opened_at=NOW,
    )


def train(folder: Path, base: Path, record: RoundRecord) -> Trained:
    kept: list[Adapted] = []

    def keep(*arguments: Any) -> Adapted:
        kept.append(adapt(*arguments))
        return kept[0]

    shard = folder / "shard.jsonl"
    shard.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    job = Job(
        round_id=record.round_id,
        lease_id="lease-1",
        fence=1,
        model=record.request.model,
        base_manifest=record.base_manifest,
        base_folder=base,
        shard_files=(shard,),
        delta_file=folder / "finished.delta",
        recipe=record.request.recipe,
        seed=7,
        targets=record.targets,
        device="cpu",
    )
    lines: list[Line] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "adapt", keep)
        trainer.train(job, lines.append, started=time.perf_counter(), scratch=folder / "scratch")
    finished = lines[-1]
    assert isinstance(finished, Finished)
    return Trained(kept[0].base.eval(), job.delta_file, finished)


def submission_of(record: RoundRecord, finished: Finished) -> Submission:
    statement = SubmitStatement(
        round_id=record.round_id,
        lease_id="lease-1",
        fence=1,
        base_manifest=record.base_manifest,
        sha256=finished.sha256,
        size_bytes=finished.size_bytes,
        tokens=finished.tokens,
        steps=finished.steps,
        first_loss=finished.first_loss,
        last_loss=finished.last_loss,
        seconds=finished.seconds,
    )
    public = public_key_hex(VOLUNTEER)
    return Submission(
        statement=statement,
        signature=sign(VOLUNTEER, "submit", statement),
        public_key=public,
        worker_id=worker_id_of(public),
        worker_name="volunteer",
        shard=0,
        submitted_at=NOW,
    )


def publish_sum(store: MemoryStore, parent: Manifest, record: RoundRecord, submission: Submission) -> Manifest:
    """Version 1: version 0 and the whole delta."""
    term = Term(
        contribution=submission.statement.sha256,
        size_bytes=submission.statement.size_bytes,
        worker_id=submission.worker_id,
        worker_name=submission.worker_name,
        shard=0,
        tokens=submission.statement.tokens,
        coefficient=2**LOG2,
    )
    outer = record.request.recipe.aggregation.outer
    numbers = range(1, len(parent.groups) + 1)
    groups, tensors = next_tensors([fold_group(store, parent, n, [term], LOG2, outer=outer) for n in numbers])
    draft = parent.model_copy(
        update={
            "version": 1,
            "parent": manifest_digest(parent),
            "round_id": record.round_id,
            "recipe": record.request.recipe,
            "denominator_log2": LOG2,
            "terms": (term,),
            "tensors": dict(tensors),
            "groups": groups,
        }
    )
    manifest = draft.model_copy(update={"files": version_files(store, draft, carried_files(parent.files))})
    publish_manifest(store, PUBLISHER, manifest)
    return manifest


def load(folder: Path) -> Any:
    """As anybody loads a model. Every weight has to be in the files, and every weight in the files has to be used."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    assert not {name: found for name, found in info.items() if found}
    return model.eval()


def logits(model: Any) -> np.ndarray:
    import torch

    tokens = torch.arange(1, 41).reshape(2, 20) * 5 % 261
    with torch.no_grad():
        found: np.ndarray = model(input_ids=tokens).logits.double().numpy()
    return found


def added(model: Any, delta: Path) -> Any:
    """The model with every B·A of the delta added to the weight of that name."""
    import torch

    with torch.no_grad(), DeltaReader.open(delta) as reader:
        for name in reader.names:
            parameter = model.get_parameter(name)
            products = np.stack([np.matmul(*dequantise(reader.factors(name, n))) for n in range(reader.slices(name))])
            parameter.copy_(torch.from_numpy(parameter.double().numpy() + products.reshape(parameter.shape)))
    return model


def screened(base: Path, delta: Path) -> float:
    """The held-out loss of base and delta, as a cohort is measured: without summing."""
    with DeltaReader.open(delta) as reader:
        factors = {name: [reader.factors(name, n) for n in range(reader.slices(name))] for name in reader.names}
    _, (loss,) = heldout_losses(base, ROWS, [lambda name: factors[name]], list(factors), max_tokens=24, max_rows=9)
    return loss


def generated(model: Any, *, cached: bool) -> list[int]:
    import torch

    prompt = torch.tensor([[40, 90, 130, 200, 11, 12, 13, 14]])
    mask = torch.ones_like(prompt)
    found = model.generate(
        prompt, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=cached
    )
    return list(found[0].tolist())


def whole_round(
    family: Family,
    tokenizer: Path,
    tmp_path: Path,
    *,
    original: bool = False,
    stack_experts: bool = False,
    change: Change | None = None,
) -> None:
    """`original`: import a file with the names of published ones; `change`: what such files hold besides."""
    import torch
    from safetensors.torch import load_file, save_file

    source_model = families.build(family)
    folder = families.save(source_model, tokenizer, tmp_path / "base", original=original)
    if change is not None:
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, {"format": "pt"})

    store = MemoryStore()
    source = StoreSource(store)
    base = Base(folder, "tiny", "mit")
    zero = make_version_zero(
        store, PUBLISHER, model="tiny", base=base, group_bytes=40_000, now=NOW, stack_experts=stack_experts
    )
    held = pull(source, "tiny", 0, tmp_path / "held").folder
    record = round_on(zero, recipe_of(family))
    roles = [target.role for target in record.targets.values()]
    assert (roles.count("linear"), roles.count("experts") > 0) == (family.linear, bool(family.experts))
    trained = train(tmp_path, held, record)

    submission = submission_of(record, trained.finished)
    receipt = judge(trained.delta, record, submission, max_delta_bytes=2**24, seen=lambda digest: False, now=NOW)
    assert receipt.accepted, receipt.reason
    put_blob_file(store, trained.delta)
    one = publish_sum(store, zero, record, submission)
    pulled = pull(source, "tiny", None, tmp_path / "pulled").folder
    report = verify_files(pulled, publisher_key=public_key_hex(PUBLISHER))
    assert report.ok, report.mismatches

    before, whole = load(held), added(load(held), trained.delta)
    after = load(pulled)
    start, reached = logits(before), logits(trained.model)
    assert np.abs(start - logits(source_model)).max() < 1e-5
    moved = float(np.abs(reached - start).max())
    assert moved > 1e-2
    # The delta is what was trained, to its own precision; the version is base and delta, to that of the export.
    assert np.abs(logits(whole) - reached).max() < 1e-3 * moved
    for key, weight in after.state_dict().items():
        expected = whole.state_dict()[key].to(torch.bfloat16).float()
        assert torch.allclose(weight, expected, rtol=2**-7, atol=1e-9), key
    changed = {n for n, entry in one.tensors.items() if entry.master != zero.tensors[n].master}
    assert changed == set(record.targets)
    assert generated(after, cached=True) == generated(after, cached=False)
    measured = screened(held, trained.delta)
    assert measured < heldout_loss(held, ROWS, max_tokens=24).loss - 1e-3
    assert measured == pytest.approx(heldout_loss(pulled, ROWS, max_tokens=24).loss, rel=1e-2)


# -- rounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_round_makes_a_version_that_is_the_trained_model(name: str, tokenizer: Path, tmp_path: Path) -> None:
    whole_round(FAMILIES[name], tokenizer, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", RELATIVES)
def test_a_round_of_a_relative_makes_a_version_that_is_the_trained_model(
    name: str, tokenizer: Path, tmp_path: Path
) -> None:
    whole_round(RELATIVES[name], tokenizer, tmp_path)


def with_old_buffers(module: str) -> Change:
    """Masks and frequencies as the first files of a family hold them; the second one in float16 is infinite."""

    def change(tensors: Tensors) -> Tensors:
        import torch

        old = {"bias": torch.ones(1, 1, 8, 8, dtype=torch.bool), "masked_bias": torch.tensor(-1e9).half()}
        old["rotary_emb.inv_freq"] = torch.ones(4)
        return tensors | {
            f"{module.format(layer)}.{name}": tensor.clone() for layer in range(2) for name, tensor in old.items()
        }

    return change


def without(prefix: str) -> Change:
    return lambda tensors: {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def with_head(embedding: str) -> Change:
    return lambda tensors: tensors | {"lm_head.weight": tensors[embedding].clone()}


PUBLISHED: dict[str, tuple[str, bool, Change | None]] = {
    "gpt-neox, with masks and another name for the head": (
        "gpt-neox",
        False,
        with_old_buffers("gpt_neox.layers.{}.attention"),
    ),
    "gpt2, with masks and no prefix": (
        "gpt2",
        False,
        lambda tensors: with_old_buffers("h.{}.attn")(without("transformer.")(tensors)),
    ),
    "bloom without prefix": ("bloom", False, without("transformer.")),
    "falcon, with a head that is the embedding's": ("falcon", False, with_head("transformer.word_embeddings.weight")),
    "mixtral": ("mixtral", False, None),
    "mixtral, stacked": ("mixtral", True, None),
    "qwen2-moe, stacked": ("qwen2-moe", True, None),
    "deepseek-v3, stacked": ("deepseek-v3", True, None),
}
"""Family, whether experts are stacked, and what differs from how transformers saves a model now."""


@pytest.mark.slow
@pytest.mark.parametrize("case", PUBLISHED)
def test_a_round_on_a_file_as_it_is_published(case: str, tokenizer: Path, tmp_path: Path) -> None:
    name, stack_experts, change = PUBLISHED[case]
    family = FAMILIES[name] if stack_experts else replace(FAMILIES[name], experts=())
    whole_round(family, tokenizer, tmp_path, original=True, stack_experts=stack_experts, change=change)
