"""A round of a model that sees: import, train, measure, fold, publish, pull, load, and say what is in an image."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from test_families import NOW, PUBLISHER, publish_sum, round_on, submission_of
from tiny_vision import COLOURS, PATCH, QUESTION, SIDE, colour_rows, image_file, in_base64, save_tiny_vision

from aggregator.admission import judge
from aggregator.descent import heldout_descents
from aggregator.encoding import encode
from aggregator.evaluate import heldout_loss, load_tokenizer
from aggregator.genesis import Base, make_version_zero
from aggregator.losses import heldout_losses
from rankup.checkfiles import verify_files
from rankup.delta import DeltaReader
from rankup.errors import InputError
from rankup.pull import pull
from rankup.recipe import PLAIN_SUM, Aggregation, Recipe
from rankup.records import RoundRecord
from rankup.signing import public_key_hex
from rankup.sources import StoreSource
from rankup.store import MemoryStore, put_blob_file
from worker import trainer
from worker.job import Finished, Job, Ready, StepDone
from worker.vision import make_collator, pictured

MAX_TOKENS = 32
PLACES = (SIDE // PATCH) ** 2
RECIPE = Recipe(
    rank=8,
    alpha=16,
    steps=25,
    learning_rate=1e-2,
    batch_size=8,
    max_tokens=MAX_TOKENS,
    warmup_steps=2,
    aggregation=Aggregation(outer=PLAIN_SUM),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision") / "base"
    save_tiny_vision(folder)
    return folder


@pytest.fixture(scope="module")
def processor(base: Path) -> Any:
    return load_tokenizer(base, colour_rows(1))


def job_of(folder: Path, base: Path, record: RoundRecord, rows: list[dict[str, Any]]) -> Job:
    folder.mkdir(exist_ok=True)
    shard = folder / "shard.jsonl"
    shard.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Job(
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


def run(job: Job) -> tuple[Ready, list[float], Finished]:
    lines: list[Any] = []
    trainer.train(job, lines.append, started=time.perf_counter(), scratch=job.delta_file.parent / "scratch")
    return lines[0], [line.loss for line in lines if isinstance(line, StepDone)], lines[-1]


def load(folder: Path) -> Any:
    """As anybody loads a model that sees. Every weight has to be in the files and of use."""
    import torch
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.bfloat16, local_files_only=True, output_loading_info=True
    )
    assert not {name: found for name, found in info.items() if found}
    return model.eval()


def said(folder: Path, colour: tuple[int, int, int]) -> str:
    """What a pulled model, with the processor that was pulled along, says of an image."""
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    image = Image.new("RGB", (40, 30), colour)
    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    model = load(folder).float()
    found = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return str(processor.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.slow
def test_a_round_teaches_a_model_to_see(base: Path, tmp_path: Path) -> None:
    store = MemoryStore()
    zero = make_version_zero(
        store, PUBLISHER, model="tiny", base=Base(base, "tiny", "mit"), group_bytes=200_000, now=NOW
    )
    held = pull(StoreSource(store), "tiny", 0, tmp_path / "held").folder
    record = round_on(zero, RECIPE)
    # The language model and what joins it to the eyes are trained, the eyes are not.
    parts = {name.removeprefix("model.").partition(".")[0] for name in record.targets}
    assert parts == {"language_model", "multi_modal_projector"}
    assert not any(entry.role for name, entry in zero.tensors.items() if "vision_tower" in name)

    ready, losses, finished = run(job_of(tmp_path / "lease", held, record, colour_rows(32)))
    assert ready.examples == 32
    assert losses[-1] < 0.1 < 4 < losses[0]
    # The letters of the colours and the end mark, and nothing of question or image.
    letters = sum(len(name) for name in COLOURS) / len(COLOURS)
    assert abs(finished.tokens / (25 * 8) - letters - 1) < 0.2
    submission = submission_of(record, finished)
    delta = tmp_path / "lease" / "finished.delta"
    receipt = judge(delta, record, submission, max_delta_bytes=2**24, seen=lambda digest: False, now=NOW)
    assert receipt.accepted, receipt.reason
    put_blob_file(store, delta)
    publish_sum(store, zero, record, submission)
    pulled = pull(StoreSource(store), "tiny", None, tmp_path / "pulled").folder
    assert verify_files(pulled, publisher_key=public_key_hex(PUBLISHER)).ok

    unseen = colour_rows(8, first=32)
    before = heldout_loss(held, unseen, max_tokens=MAX_TOKENS)
    after = heldout_loss(pulled, unseen, max_tokens=MAX_TOKENS)
    assert after.loss < 0.1 < 4 < before.loss
    assert (after.examples, after.tokens) == (8, 2 * sum(len(name) + 1 for name in COLOURS))
    # With the eyes on another image it does not know the answers.
    blind = [row | {"images": unseen[0]["images"]} for row in unseen]
    assert heldout_loss(pulled, blind, max_tokens=MAX_TOKENS).loss > 1
    limits: dict[str, Any] = {"max_tokens": MAX_TOKENS, "max_rows": 8}
    with DeltaReader.open(delta) as reader:
        names = sorted(record.targets)
        deltas = [lambda name: [reader.factors(name)]]
        found = heldout_losses(held, unseen, deltas, names, **limits)
        (descent,) = heldout_descents(held, unseen, deltas, names, **limits)
    assert found[0] == pytest.approx(before.loss, abs=1e-12)
    assert found[1][0] == pytest.approx(after.loss, abs=0.01)
    assert descent > 0
    assert {name: said(pulled, colour) for name, colour in COLOURS.items()} == {name: name for name in COLOURS}


@pytest.mark.parametrize("tied", [False, True])
def test_a_version_has_the_bits_of_the_base_under_the_names_of_its_model(tied: bool, tmp_path: Path) -> None:
    import torch

    save_tiny_vision(tmp_path / "base", tied=tied)
    store = MemoryStore()
    zero = make_version_zero(
        store, PUBLISHER, model="tiny", base=Base(tmp_path / "base", "tiny", "mit"), group_bytes=200_000, now=NOW
    )
    pulled = pull(StoreSource(store), "tiny", 0, tmp_path / "pulled").folder
    one, other = load(tmp_path / "base").state_dict(), load(pulled).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one.keys() - zero.tensors.keys() == ({"lm_head.weight"} if tied else set())
    assert zero.tensors.keys() <= one.keys()
    card = (pulled / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "AutoModelForImageTextToText.from_pretrained(folder)" in card


def test_nothing_in_a_version_asks_for_the_code_of_a_processor(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((base / "processor_config.json").read_text())
    settings["auto_map"] = settings["image_processor"]["auto_map"] = {"AutoProcessor": "evil.Processor"}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    store = MemoryStore()
    make_version_zero(store, PUBLISHER, model="tiny", base=Base(folder, "tiny", "mit"), group_bytes=200_000, now=NOW)
    pulled = pull(StoreSource(store), "tiny", 0, tmp_path / "pulled").folder
    assert json.loads((pulled / "processor_config.json").read_text()) == json.loads(
        (base / "processor_config.json").read_text()
    )


# -- what is learned is what is measured -------------------------------------------------------------------------------


def talk(*turns: str, images: int = 1) -> dict[str, Any]:
    """A conversation of the shape image messages: a user's words and an assistant's in turn, all images at first."""
    files = [in_base64(image_file(colour)) for colour in list(COLOURS.values())[:images]]
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[at % 2], "content": [{"type": "text", "text": words}]}
        for at, words in enumerate(turns)
    ]
    messages[0]["content"][:0] = [{"type": "image"}] * images
    return {"images": files, "messages": messages}


@pytest.mark.parametrize("max_tokens", [MAX_TOKENS, PLACES + 12])
@pytest.mark.parametrize(
    "row", [colour_rows(1)[0], talk("what?", "red"), talk("both?", "red and green", "sure?", "yes", images=2)]
)
def test_a_held_out_row_has_the_tokens_that_the_trainer_learns(
    processor: Any, row: dict[str, Any], max_tokens: int
) -> None:
    import torch

    collator = make_collator(processor, max_tokens=max_tokens, completion_only="prompt" in row)
    batch = collator([pictured(row)])
    (example,) = encode(processor, row, max_tokens)
    assert list(example.ids) == batch["input_ids"][0].tolist()
    assert [False, *(batch["labels"][0, 1:] != -100).tolist()] == list(example.scored)
    assert example.pictured is not None
    pixels = example.pictured.pixels()
    assert pixels.keys() == batch.keys() - {"input_ids", "attention_mask", "labels"}
    assert all(torch.equal(pixels[name], batch[name]) for name in pixels)


def test_the_places_of_images_are_not_learned(processor: Any) -> None:
    row = talk("hm?", "red", images=2)
    (example,) = encode(processor, row, MAX_TOKENS)
    place = processor.image_token_id
    assert [token for token, scored in zip(example.ids, example.scored, strict=True) if token == place and scored] == []
    assert example.ids.count(place) == 2 * PLACES
    assert example.tokens == len(example.ids) - 2 * PLACES - 1


@pytest.mark.parametrize(
    "row",
    [
        talk("what is to be seen?", "red", images=4) | {"name": "images do not fit"},
        talk("the word <image> is a place", "red") | {"name": "text that spells a place"},
    ],
    ids=lambda row: row["name"],
)
def test_a_row_that_no_processor_can_take_is_left_out(
    base: Path, processor: Any, row: dict[str, Any], tmp_path: Path
) -> None:
    assert encode(processor, row, 4 * PLACES) == ()
    record = RoundRecord.model_validate(
        round_on(make_zero(base), RECIPE.model_copy(update={"steps": 1, "max_tokens": 4 * PLACES})).model_dump()
    )
    rows = [row, talk("?", "red")]
    ready, _, finished = run(job_of(tmp_path, base, record, rows))
    assert ready.examples == 1
    assert finished.steps == 1
    with pytest.raises(InputError, match="no example of the shard has a token to learn within 16 tokens"):
        run(job_of(tmp_path, base, record, rows[:1]))


def make_zero(base: Path) -> Any:
    return make_version_zero(
        MemoryStore(), PUBLISHER, model="tiny", base=Base(base, "tiny", "mit"), group_bytes=200_000, now=NOW
    )


def test_a_damaged_image_ends_the_training_with_words(base: Path, tmp_path: Path) -> None:
    rows = [*colour_rows(1), colour_rows(1)[0] | {"images": [in_base64(b"<svg/>")]}]
    with pytest.raises(InputError, match="image 1 is neither PNG nor JPEG nor WebP"):
        run(job_of(tmp_path, base, round_on(make_zero(base), RECIPE), rows))


def test_images_for_a_model_without_eyes_are_refused_with_words(tmp_path: Path) -> None:
    from aggregator.tiny import write_tiny_model

    write_tiny_model(tmp_path / "blind")
    with pytest.raises(InputError, match="the rows have images, but the model sees none"):
        heldout_loss(tmp_path / "blind", colour_rows(1), max_tokens=MAX_TOKENS)


def test_a_model_that_sees_learns_from_text_as_well(base: Path, tmp_path: Path) -> None:
    record = round_on(make_zero(base), RECIPE.model_copy(update={"steps": 4}))
    rows = [{"prompt": "Which?", "completion": name} for name in COLOURS]
    before = heldout_loss(base, rows, max_tokens=MAX_TOKENS)
    ready, losses, finished = run(job_of(tmp_path, base, record, rows))
    assert ready.examples == 4
    assert losses[0] == pytest.approx(before.loss, abs=1e-3)
    assert losses[-1] < losses[0] - 0.1
    assert finished.tokens == 4 * before.tokens
