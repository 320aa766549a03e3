"""Which version teaches a round, and whether the base can learn from it: what every volunteer would stumble over is
said to the organiser instead.

What always holds: nothing is written; of the versions only their tokenizers' files are read, each of at most
`MAX_TOKENIZER_BYTES`. Where a version has no file that tells, its volunteers find out.
"""

from __future__ import annotations

import json
from typing import Any, Final

from coordinator.catalogue import read_manifest, read_pointer, read_version
from coordinator.fitting import chat_template
from rankup.errors import InputError, IntegrityError, NotFoundError
from rankup.protocol import RoundRequest, VersionRef
from rankup.records import DatasetCard, Manifest
from rankup.store import Store, get_blob
from rankup.versions import manifest_digest

MAX_TOKENIZER_BYTES: Final = 64 * 1024**2


def find_teacher(
    store: Store, request: RoundRequest, card: DatasetCard, base: Manifest, *, publisher_key: str | None
) -> VersionRef | None:
    """The version that answers the prompts, its manifest checked: the one that is asked for, else the model's latest.

    Raises:
        NotFoundError: no such model or version.
        InputError: it cannot read the dataset's conversations, or has another vocabulary than a base that is to learn
            its probabilities.
        IntegrityError: its manifest fails its checks, or a tokenizer cannot be read.
    """
    if request.teacher is None:
        return None
    pointer = read_pointer(store, request.teacher)
    teacher = read_manifest(store, pointer, publisher_key=publisher_key)
    wanted = pointer.version if request.teacher_version is None else request.teacher_version
    if wanted > pointer.version:
        raise NotFoundError(
            f"The teacher {request.teacher} has no version {wanted}; its latest is {pointer.version}.",
            remedy="Name an earlier teacher_version, or none for the latest one.",
        )
    if wanted < pointer.version:
        teacher = read_version(store, teacher, wanted, publisher_key=publisher_key)
    chat = card.shape == "messages" or card.shape.endswith(" chat")
    if chat and _has_tokenizer(teacher) and chat_template(store, teacher) is None:
        raise InputError(
            f"The dataset {card.dataset} holds conversations, but the teacher {request.teacher} has no chat template.",
            remedy="Choose a teacher with a chat template, or a dataset of plain prompts.",
        )
    if request.recipe.teacher_weight > 0:
        theirs, ours = vocabulary(store, teacher), vocabulary(store, base)
        if theirs is not None and ours is not None and theirs != ours:
            raise InputError(
                f"The teacher {request.teacher} has another vocabulary than {request.model}: its probabilities mean "
                "other tokens.",
                remedy="Set teacher_weight to 0: the base then learns its answers, whatever the tokenizer.",
            )
    return VersionRef(model=request.teacher, version=wanted, manifest=manifest_digest(teacher))


def _has_tokenizer(version: Manifest) -> bool:
    return any(file.path == "tokenizer_config.json" for file in version.files)


def vocabulary(store: Store, version: Manifest) -> dict[str, int] | None:
    """Token -> number, of the version's tokenizer.json; None where it has none. Raises IntegrityError."""
    file = next((file for file in version.files if file.path == "tokenizer.json"), None)
    if file is None:
        return None
    try:
        told: Any = json.loads(get_blob(store, file.sha256, max_bytes=MAX_TOKENIZER_BYTES))
        tokens = told["model"]["vocab"]
        # A unigram model has a list of pairs of token and score.
        found = tokens if isinstance(tokens, dict) else {pair[0]: number for number, pair in enumerate(tokens)}
        return {**found, **{added["content"]: added["id"] for added in told.get("added_tokens", ())}}
    except (NotFoundError, ValueError, LookupError, TypeError, AttributeError) as exc:
        raise IntegrityError(f"the tokenizer of {version.model} {version.version} cannot be read") from exc
