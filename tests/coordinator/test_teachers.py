"""Which version teaches a round, and what is refused before a round of distillation opens."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from gateway_world import add_dataset, make_manifest, publish

from coordinator.grants import grant_of
from coordinator.leases import Lease
from coordinator.ledger import Ledger
from coordinator.opening import open_round
from coordinator.teachers import find_teacher, vocabulary
from rankup.errors import InputError, IntegrityError, NotFoundError
from rankup.protocol import LeaseState, RoundRequest, VersionRef
from rankup.records import FileEntry, Manifest, RoundRecord
from rankup.signing import generate_private_key, parse_private_key, public_key_hex
from rankup.store import MemoryStore, put_blob
from rankup.versions import manifest_digest

if TYPE_CHECKING:
    from conftest import ValkeyServer

KEY, OTHER_KEY = (parse_private_key(generate_private_key()) for _ in range(2))
NOW = 1_000_000.0
END = [{"id": 0, "content": "</s>"}]
WORDS: dict[str, Any] = {"model": {"vocab": {"a": 1, "b": 2}}, "added_tokens": END}
SAME: dict[str, Any] = {"model": {"vocab": [["</s>", 0.0], ["a", -1.0], ["b", -2.5]]}}
OTHER: dict[str, Any] = {"model": {"vocab": {"a": 1, "c": 2}}, "added_tokens": END}
TEMPLATE = {"chat_template": "{{ messages }}"}


def version(store: MemoryStore, model: str, tokenizer: Any = WORDS, config: Any = TEMPLATE) -> Manifest:
    """Version 0 of a model; None leaves a file out."""
    entries = []
    for name, content in (("tokenizer", tokenizer), ("tokenizer_config", config)):
        if content is not None:
            ref = put_blob(store, content if isinstance(content, bytes) else json.dumps(content).encode())
            entries.append(FileEntry(path=f"{name}.json", sha256=ref.sha256, size_bytes=ref.size_bytes))
    return make_manifest(0, None, model=model).model_copy(update={"files": tuple(entries)})


def after(manifest: Manifest) -> Manifest:
    number = manifest.version + 1
    said = {
        "version": number,
        "parent": manifest_digest(manifest),
        "round_id": f"{manifest.model}-r{number:04d}-abcdef",
    }
    return manifest.model_copy(update=said)


def request(**changes: Any) -> RoundRequest:
    said = {"model": "tiny", "dataset": "pydocs", "shards": 2, "repeat": 9, "teacher": "sage"}
    return RoundRequest.model_validate(said | {"recipe": {"method": "distillation"}} | changes)


def found(store: MemoryStore, asked: RoundRequest, base: Manifest, *, shape: str = "", key: Any = KEY) -> Any:
    card = add_dataset(store, shards=5).model_copy(update={"shape": shape})
    return find_teacher(store, asked, card, base, publisher_key=public_key_hex(key))


@pytest.mark.parametrize(("asked", "number"), [(None, 1), (1, 1), (0, 0)])
def test_the_teacher_is_the_version_that_is_asked_for_else_the_latest(asked: int | None, number: int) -> None:
    store = MemoryStore()
    base, first = version(store, "tiny"), version(store, "sage")
    digests = [publish(store, KEY, first), publish(store, KEY, after(first))]
    expected = VersionRef(model="sage", version=number, manifest=digests[number])
    assert found(store, request(teacher_version=asked), base) == expected
    plain = RoundRequest(model="tiny", dataset="pydocs")
    assert found(store, plain, base) is None
    with pytest.raises(IntegrityError):
        found(store, request(teacher_version=asked), base, key=OTHER_KEY)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"teacher": "nobody"}, "no model nobody"), ({"teacher_version": 1}, "no version 1; its latest is 0")],
)
def test_a_teacher_that_is_not_there_is_named(changes: dict[str, Any], words: str) -> None:
    store = MemoryStore()
    publish(store, KEY, version(store, "sage"))
    with pytest.raises(NotFoundError, match=words):
        found(store, request(**changes), version(store, "tiny"))


FITS: dict[str, tuple[Any, Any, float, str, str | None]] = {
    "other words, answers only": (OTHER, TEMPLATE, 0.0, "", None),
    "other words": (OTHER, TEMPLATE, 0.5, "", "another vocabulary"),
    "the same words in another way": (SAME, TEMPLATE, 0.5, "", None),
    "words that nobody knows": (None, TEMPLATE, 0.5, "", None),
    "conversations": (WORDS, TEMPLATE, 0.0, "prompt-completion chat", None),
    "conversations without a template": (WORDS, {}, 0.0, "prompt-completion chat", "no chat template"),
    "messages without a template": (WORDS, {}, 0.0, "messages", "no chat template"),
    "plain prompts without a template": (WORDS, {}, 0.0, "prompt-completion", None),
    "a tokenizer of an older form": (None, None, 0.5, "messages", None),
}


@pytest.mark.parametrize("case", FITS)
def test_a_teacher_that_no_volunteer_could_learn_from_is_refused(case: str) -> None:
    tokenizer, config, weight, shape, refused = FITS[case]
    store = MemoryStore()
    publish(store, KEY, version(store, "sage", tokenizer, config))
    asked = request(recipe={"method": "distillation", "teacher_weight": weight})
    if refused is None:
        assert found(store, asked, version(store, "tiny"), shape=shape) is not None
        return
    with pytest.raises(InputError, match=refused):
        found(store, asked, version(store, "tiny"), shape=shape)


@pytest.mark.parametrize(
    "content", [b"[]", b"{", b"\xff", b'{"model": {"vocab": 3}}', b'{"model": {"vocab": [3]}}', b"{}"]
)
def test_a_vocabulary_that_cannot_be_read_is_an_error(content: bytes) -> None:
    store = MemoryStore()
    with pytest.raises(IntegrityError, match="tokenizer of sage 0"):
        vocabulary(store, version(store, "sage", content))


def test_every_round_of_a_campaign_has_a_teacher_and_its_leases_say_which(valkey: ValkeyServer) -> None:
    store = MemoryStore()
    publish(store, KEY, version(store, "tiny"))
    sage = version(store, "sage")
    first = publish(store, KEY, sage)
    add_dataset(store, shards=5)

    async def act() -> list[RoundRecord]:
        ledger = await Ledger.connect(valkey.ledger_settings)
        try:
            one = await open_round(ledger, store, request(), index=0, previous=None, now=NOW)
            publish(store, KEY, after(sage))
            two = await open_round(ledger, store, request(), index=1, previous=one, now=NOW + 1)
            kept = await open_round(ledger, store, request(teacher_version=0), index=2, previous=two, now=NOW + 2)
            return [one, two, kept]
        finally:
            await ledger.close()

    records = asyncio.run(act())
    assert [record.teacher.version for record in records if record.teacher is not None] == [0, 1, 0]
    assert records[0].teacher == records[2].teacher == VersionRef(model="sage", version=0, manifest=first)
    lease = Lease("lease-1", 1, records[1].round_id, 0, "w-1", LeaseState.GRANTED, NOW, NOW + 60)
    grant = grant_of(lease, records[1], shard_urls=("/s",), cap_bytes=10**9, heartbeat_s=5.0, voucher="")
    assert grant.teacher == records[1].teacher
