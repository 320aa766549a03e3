"""The openness record: what is called open follows from the manifest and the dataset cards, and nothing else is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from card_world import child, dataset_card
from toy_world import World

from aggregator.openness import MAX_LISTED_SHARDS, OpennessRecord, assess, is_open
from rankup.records import DatasetCard, FileEntry, Manifest


def states(manifest: Manifest, *cards: DatasetCard) -> dict[str, str]:
    return {part.name: part.state for part in assess(manifest, cards).components}


def with_tokenizer(manifest: Manifest) -> Manifest:
    entry = FileEntry(sha256="1" * 64, size_bytes=1, path="tokenizer.json")
    return manifest.model_copy(update={"files": (*manifest.files, entry)})


def test_a_version_with_everything_described_is_open_but_for_what_is_secret_or_unknown(world: World) -> None:
    assert states(with_tokenizer(child(world)), dataset_card()) == {
        "Architecture": "open",
        "Weights": "open",
        "Training state": "open",
        "History": "open",
        "Contributions": "partly",
        "Training recipe": "open",
        "Training code": "open",
        "Training data": "open",
        "Data cleaning": "open",
        "Evaluation data": "closed",
        "Data of the base model": "closed",
        "Evaluation results": "partly",
        "Report": "partly",
    }


LESS: dict[str, tuple[Callable[[Manifest], Manifest], list[DatasetCard], dict[str, str]]] = {
    "no card": (lambda m: m, [], {"Training data": "closed", "Data cleaning": "closed"}),
    "another dataset's card": (lambda m: m, [dataset_card("other")], {"Training data": "closed"}),
    "a licence that is not on the list": (
        lambda m: m,
        [dataset_card(licence="cc-by-nc-4.0")],
        {"Training data": "partly", "Data cleaning": "open"},
    ),
    "one card of two": (
        lambda m: m.model_copy(update={"datasets": ("docs", "more")}),
        [dataset_card()],
        {"Training data": "partly", "Data cleaning": "partly"},
    ),
    "no steps": (
        lambda m: m,
        [dataset_card().model_copy(update={"pipeline": ()})],
        {"Training data": "open", "Data cleaning": "closed"},
    ),
    "no software": (
        lambda m: m.model_copy(update={"software": ""}),
        [dataset_card()],
        {"Training code": "closed", "Data cleaning": "partly"},
    ),
    "weights under other terms": (
        lambda m: m.model_copy(update={"licence": "llama3.2"}),
        [dataset_card()],
        {"Weights": "partly", "Training state": "partly", "History": "partly"},
    ),
    "an unknown licence": (lambda m: m.model_copy(update={"licence": "unknown"}), [], {"Weights": "partly"}),
    "not measured": (lambda m: m.model_copy(update={"evaluation": None}), [], {"Evaluation results": "closed"}),
    "no tokenizer": (
        lambda m: m.model_copy(update={"files": tuple(f for f in m.files if "tokenizer" not in f.path)}),
        [],
        {"Architecture": "partly"},
    ),
}


@pytest.mark.parametrize("case", LESS)
def test_what_is_not_shown_is_not_called_open(case: str, world: World) -> None:
    change, cards, expected = LESS[case]
    full = states(with_tokenizer(child(world)), dataset_card())
    found = states(change(with_tokenizer(child(world))), *cards)
    assert {name: found[name] for name in expected} == expected
    rank = ["open", "partly", "closed"]
    assert all(rank.index(found[name]) >= rank.index(full[name]) for name in full)


def test_the_base_has_only_the_parts_that_it_has(world: World) -> None:
    found = states(world.parent, dataset_card())
    assert found["Evaluation results"] == found["Data of the base model"] == "closed"
    assert not found.keys() & {"Training data", "Contributions", "Training recipe", "Training code", "Data cleaning"}
    assert assess(world.parent, [dataset_card()]).datasets == ()


def test_a_dataset_is_described_with_its_shards_and_their_hash(world: World) -> None:
    card = dataset_card()
    [source] = assess(child(world), [card, dataset_card("other")]).datasets
    assert source.shards == card.shards
    lines = "".join(f"{shard.sha256}\n" for shard in card.shards)
    assert source.shards_sha256 == hashlib.sha256(lines.encode()).hexdigest()
    assert (source.heldout_rows, source.heldout_sha256) == (64, card.heldout.sha256)
    many = card.model_copy(update={"shards": card.shards[:1] * (MAX_LISTED_SHARDS + 5)})
    [long] = assess(child(world), [many]).datasets
    assert (len(long.shards), long.shard_count) == (MAX_LISTED_SHARDS, MAX_LISTED_SHARDS + 5)


def test_the_record_is_json_that_reads_back(world: World) -> None:
    record = assess(child(world), [dataset_card()])
    data: dict[str, Any] = json.loads(json.dumps(record.model_dump(mode="json")))
    assert OpennessRecord.model_validate(data) == record
    assert data["software"] == "rankup 0.1.0"


@pytest.mark.parametrize(
    ("licence", "free"),
    [
        ("Apache-2.0", True),
        (" mit ", True),
        ("CC-BY-SA-4.0", True),
        ("cc-by-nc-4.0", False),
        ("cc-by-nd-4.0", False),
        ("llama3.2", False),
        ("openrail", False),
        ("other", False),
        ("unknown", False),
        ("", False),
    ],
)
def test_a_licence_is_open_only_if_it_is_on_the_list(licence: str, free: bool) -> None:
    assert is_open(licence) is free
