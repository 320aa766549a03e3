"""Version 0 of a model: a base model's weights as float32 masters and bfloat16 exports, published like any version.

What always holds:
- weights are those of `aggregator.baseweights`, read and written tensor by tensor;
- only files with the names in `CARRIED` go into the version, and nothing in them asks for foreign code or a quantiser;
- making the same version 0 twice is making it once.

It does not download anything (`aggregator.bases` does).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from aggregator.bases import Base, fetch_base, require_safetensors
from aggregator.baseweights import Weight, open_weights
from aggregator.groups import Layout, open_group_writer, plan_groups
from aggregator.publish import publish_manifest, version_files
from aggregator.published import SOFTWARE, latest_version
from aggregator.skeleton import Skeleton
from rankup.errors import InputError, NotFoundError, StateError
from rankup.records import FileEntry, Group, Manifest, TensorEntry
from rankup.signing import Ed25519PrivateKey, public_key_hex
from rankup.store import Store, put_blob
from rankup.versions import MAX_ENVELOPE_BYTES, manifest_key, open_envelope

__all__ = ["Base", "fetch_base", "linear_weights", "make_version_zero"]

CARRIED = (
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    "NOTICE.txt",
    "USE_POLICY.md",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
)
SETTINGS = frozenset(
    {"tokenizer_config.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"}
)
"""Of those, what is read to make input for the model."""
TEMPLATE = "chat_template.jinja"
MAX_CARRIED_BYTES = 256 * 1024 * 1024
Progress = Callable[[int, int], None]
"""Called with the bytes of masters done, and of all masters."""


def make_version_zero(
    store: Store,
    private_key: Ed25519PrivateKey,
    *,
    model: str,
    base: Base,
    group_bytes: int,
    now: float,
    licence: str | None = None,
    stack_experts: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Publish the base model as version 0 of `model`; where it is published already, return that.

    Args:
        group_bytes: most bytes of float32 masters in one file; a larger tensor gets a file of its own.
        now: Unix seconds, becomes `created_at`.
        licence: instead of the base's.
        stack_experts: make one tensor of a layer's experts that are stored one by one, so that they can be trained.

    Raises:
        StateError: `model` has a version 0 with other tensors, or without the chat template that the base is given.
        InputError: the base is quantised, has no tokenizer, a value that bfloat16 cannot hold, or linear layers whose
            weights have other names, shapes or types than its config asks for.
        IntegrityError: a weights file is damaged, or the stored version 0 is not signed by this key.
        NotFoundError: a file that the index names is missing.
    """
    carried = _read_carried(base)
    with open_weights(base.folder, stack_experts=stack_experts) as weights:
        total_bytes = sum(weight.master_bytes for weight in weights.values())
        done_bytes = 0

        def advance(weight: Weight) -> None:
            nonlocal done_bytes
            done_bytes += weight.master_bytes
            if progress is not None:
                progress(done_bytes, total_bytes)

        there = _published(store, private_key, model)
        if there is not None:
            _require_same(there, weights, advance)
            _require_template(there, base.chat_template)
            # A crash may have come between the manifest and the pointer.
            publish_manifest(store, private_key, there)
            return there
        plan = _plan(weights, group_bytes)
        groups: list[Group] = []
        entries: dict[str, TensorEntry] = {}
        for number, names in enumerate(plan, start=1):
            with open_group_writer(number, len(plan), {name: weights[name].layout for name in names}) as writer:
                for name in names:
                    writer.write(name, weights[name].tiles())
                    advance(weights[name])
                group, part = writer.finish(store)
            groups.append(group)
            entries |= part
    manifest = Manifest(
        model=model,
        version=0,
        parent=None,
        round_id=None,
        recipe=None,
        tensors=entries,
        groups=tuple(groups),
        files=(),
        base_model=base.name,
        licence=licence or base.licence,
        software=SOFTWARE,
        created_at=now,
    )
    files = [_store_file(store, path, data) for path, data in sorted(carried.items())]
    manifest = manifest.model_copy(update={"files": version_files(store, manifest, files)})
    publish_manifest(store, private_key, manifest)
    return manifest


def _plan(weights: Mapping[str, Weight], group_bytes: int) -> list[tuple[str, ...]]:
    """Tensors that most recipes train ("all-linear") apart from the others: files of the latter mostly stay the same
    from version to version, so nobody writes, stores or pulls them twice."""
    sizes: dict[bool, dict[str, int]] = {True: {}, False: {}}
    for name, weight in weights.items():
        sizes[weight.layout.role == "linear"][name] = weight.master_bytes
    return [names for trained in (True, False) for names in plan_groups(sizes[trained], group_bytes)]


def _published(store: Store, private_key: Ed25519PrivateKey, model: str) -> Manifest | None:
    try:
        data = store.get(manifest_key(model, 0), max_bytes=MAX_ENVELOPE_BYTES)
    except NotFoundError:
        return None
    key = public_key_hex(private_key)
    try:
        changes = latest_version(store, model, publisher_key=key).manifest.keys
    except NotFoundError:
        changes = ()  # The import stopped before it moved the pointer.
    manifest, _, _ = open_envelope(data, publisher_key=key, known_changes=changes)
    return manifest


def _require_same(there: Manifest, weights: Mapping[str, Weight], advance: Callable[[Weight], None]) -> None:
    """Raise StateError unless the published tensors are those of the base, by name, shape, role and hash."""
    same = there.tensors.keys() == weights.keys()
    for name in sorted(weights) if same else ():
        entry, weight = there.tensors[name], weights[name]
        found = Layout(entry.shape, entry.export_dtype, entry.role)
        same = found == weight.layout and weight.digest() == entry.master
        if not same:
            break
        advance(weight)
    if not same:
        raise StateError(
            f"{there.model} has a version 0 already, made from {there.base_model}, with other tensors",
            remedy="Choose another name for the model, or go on with what is there.",
        )


def _require_template(there: Manifest, wanted: str | None) -> None:
    """Raise StateError if a chat template is wanted that the published version does not have."""
    found = next((file.sha256 for file in there.files if file.path == TEMPLATE), None)
    if wanted is not None and found != hashlib.sha256(wanted.encode()).hexdigest():
        raise StateError(
            f"{there.model} has a version 0 already, with another chat template",
            remedy="Choose another name for the model, or go on with what is there.",
        )


def linear_weights(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes, as stored, of the weights that "all-linear" trains. Raises InputError: no model is there."""
    parameters = Skeleton.of(folder).parameters
    return {name: parameter.shape for name, parameter in parameters.items() if parameter.role == "linear"}


# -- the other files ---------------------------------------------------------------------------------------------------


def _read_carried(base: Base) -> dict[str, bytes]:
    """Config and tokenizer files, ready to publish: file name -> bytes."""
    folder = base.folder
    require_safetensors(folder)
    carried: dict[str, bytes] = {}
    for name in CARRIED:
        path = folder / name
        if not path.is_file():
            continue
        if path.stat().st_size > MAX_CARRIED_BYTES:
            raise InputError(f"{path} has more than {MAX_CARRIED_BYTES} bytes")
        carried[name] = path.read_bytes()
    if not carried.keys() & {"tokenizer.json", "vocab.json", "vocab.txt"}:
        if "tokenizer.model" in carried:
            raise InputError(
                f"the tokenizer of {folder} is a tokenizer.model alone, which volunteers lack a package for",
                remedy="pip install sentencepiece, load it with AutoTokenizer, and save it with save_pretrained there.",
            )
        raise InputError(f"{folder} has no tokenizer", remedy="Copy the tokenizer's files into the model's folder.")
    config = _parse_object(folder, "config.json", carried["config.json"])
    if config.get("quantization_config"):
        raise InputError(
            f"{folder} is a quantised model; its weights cannot be added to",
            remedy="Choose the model as it was before it was quantised, or a .gguf file, which is dequantised.",
        )
    for name in ("quantization_config", "torch_dtype", "auto_map", "_name_or_path"):
        config.pop(name, None)
    config["dtype"] = "bfloat16"
    carried["config.json"] = _encode(config)
    for file in sorted(carried.keys() & SETTINGS):
        settings = _parse_object(folder, file, carried[file])
        # Both name things on the importing machine, or code that would have to be trusted. A processor's settings hold
        # those of its parts.
        for part in (settings, *(value for value in settings.values() if isinstance(value, dict))):
            for name in ("auto_map", "name_or_path"):
                part.pop(name, None)
        if base.chat_template is not None:
            settings.pop("chat_template", None)
        carried[file] = _encode(settings)
    if base.chat_template is not None:
        # Where processors of older days keep theirs.
        carried.pop("chat_template.json", None)
        carried[TEMPLATE] = base.chat_template.encode()
    return carried


def _parse_object(folder: Path, name: str, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as exc:
        raise InputError(f"{folder / name} is not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise InputError(f"{folder / name} is not a JSON object")
    return value


def _encode(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _store_file(store: Store, path: str, data: bytes) -> FileEntry:
    ref = put_blob(store, data)
    return FileEntry(sha256=ref.sha256, size_bytes=ref.size_bytes, path=path)
