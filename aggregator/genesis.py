"""Version 0 of a model: a base model's weights as float32 masters and bfloat16 exports, published like any version.

What always holds:
- tensors are read one by one from the base's safetensors files; never is the whole model in memory;
- the master is the base's value as float32, exactly for bfloat16, float16 and float32; the export is that rounded once;
- a tensor gets the role that it has in the model (`aggregator.skeleton`), so any recipe can be chosen later; a tensor
  that is stored otherwise than the model holds it, such as experts one by one, has no role and stays as it is;
- only files with the names in `CARRIED` go into the version, and nothing in them asks for foreign code or a quantiser;
- making the same version 0 twice is making it once.

It does not download anything (`aggregator.bases` does), and converts no names: a mixture of experts whose file holds
each expert apart is imported as it is, and its experts cannot be trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from aggregator.basemodel import INDEX, WEIGHTS
from aggregator.bases import Base, fetch_base, require_safetensors
from aggregator.groups import Layout, open_group_writer, plan_groups, tensor_digest
from aggregator.publish import publish_manifest, version_files
from aggregator.published import SOFTWARE, latest_version
from aggregator.skeleton import Skeleton
from rankup.bfloat16 import from_bfloat16
from rankup.dtypes import STORED_AS, Array, Dtype, is_floating
from rankup.errors import InputError, NotFoundError, StateError
from rankup.records import FileEntry, Group, Manifest, TensorEntry
from rankup.signing import Ed25519PrivateKey, public_key_hex
from rankup.store import Store, put_blob
from rankup.targets import Role
from rankup.tensorfile import TensorFile
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
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
MAX_CARRIED_BYTES = 256 * 1024 * 1024
MAX_BFLOAT16 = float.fromhex("0x1.fep127")

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
    progress: Progress | None = None,
) -> Manifest:
    """Publish the base model as version 0 of `model`; where it is published already, return that.

    Args:
        group_bytes: most bytes of float32 masters in one file; a larger tensor gets a file of its own.
        now: Unix seconds, becomes `created_at`.
        licence: instead of the base's.

    Raises:
        StateError: `model` has a version 0 with other tensors.
        InputError: the base is quantised, has no tokenizer, a value that bfloat16 cannot hold, or linear layers whose
            weights have other names, shapes or types than its config asks for.
        IntegrityError: a weights file is damaged, or the stored version 0 is not signed by this key.
        NotFoundError: a file that the index names is missing.
    """
    carried = _read_carried(base.folder)
    with _open_weights(base.folder) as weights:
        total_bytes = sum(weight.master_bytes for weight in weights.values())
        done_bytes = 0

        def advance(weight: _Weight) -> None:
            nonlocal done_bytes
            done_bytes += weight.master_bytes
            if progress is not None:
                progress(done_bytes, total_bytes)

        there = _published(store, private_key, model)
        if there is not None:
            _require_same(there, weights, advance)
            # A crash may have come between the manifest and the pointer.
            publish_manifest(store, private_key, there)
            return there
        plan = _plan(weights, group_bytes)
        groups: list[Group] = []
        entries: dict[str, TensorEntry] = {}
        for number, names in enumerate(plan, start=1):
            with open_group_writer(number, len(plan), {name: weights[name].layout for name in names}) as writer:
                for name in names:
                    writer.add(name, weights[name].master())
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


def _plan(weights: Mapping[str, _Weight], group_bytes: int) -> list[tuple[str, ...]]:
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


def _require_same(there: Manifest, weights: Mapping[str, _Weight], advance: Callable[[_Weight], None]) -> None:
    """Raise StateError unless the published tensors are those of the base, by name, shape, role and hash."""
    same = there.tensors.keys() == weights.keys()
    for name in sorted(weights) if same else ():
        entry, weight = there.tensors[name], weights[name]
        found = Layout(entry.shape, entry.export_dtype, entry.role)
        same = found == weight.layout and tensor_digest(weight.master()) == entry.master
        if not same:
            break
        advance(weight)
    if not same:
        raise StateError(
            f"{there.model} has a version 0 already, made from {there.base_model}, with other tensors",
            remedy="Choose another name for the model, or go on with what is there.",
        )


def linear_weights(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes, as stored, of the weights that "all-linear" trains. Raises InputError: no model is there."""
    parameters = Skeleton.of(folder).parameters
    return {name: parameter.shape for name, parameter in parameters.items() if parameter.role == "linear"}


# -- weights -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weight:
    """A tensor of the base: where it lies, and what it will be."""

    file: TensorFile
    stored_name: str
    layout: Layout

    @property
    def master_bytes(self) -> int:
        return int(np.prod(self.layout.shape, dtype=np.int64)) * STORED_AS[self.layout.master_dtype].itemsize

    def master(self) -> Array:
        """The float32 master, or the tensor as it is where it is not floating point."""
        extent = self.file.entries[self.stored_name]
        raw: Array = np.frombuffer(self.file.read(self.stored_name), dtype=STORED_AS[extent.dtype])
        raw = raw.reshape(extent.shape)
        if not is_floating(extent.dtype):
            return raw
        with np.errstate(over="ignore"):
            master = from_bfloat16(raw) if extent.dtype == "BF16" else raw.astype(np.float32)
        # The comparison is false for NaN too.
        if master.size and not max(float(master.max()), -float(master.min())) <= MAX_BFLOAT16:
            raise InputError(f"tensor {self.stored_name} of the base holds NaN, infinity or a value above bfloat16")
        return master


@contextmanager
def _open_weights(folder: Path) -> Iterator[dict[str, _Weight]]:
    """Every tensor of the base by the name that its model gives it, in sorted order."""
    with ExitStack() as stack:
        files = [stack.enter_context(TensorFile.open(folder / name)) for name in _weight_files(folder)]
        stored = {name: file for file in files for name in file}
        skeleton = Skeleton.of(folder)
        names = {skeleton.model_name(name): name for name in stored}
        if len(names) < len(stored):
            raise InputError(f"{folder} holds the same weight under two names")
        head, embedding = names.get(skeleton.tied_head or ""), names.get(skeleton.embedding or "")
        if head is not None and embedding is not None:
            if stored[head].read(head) != stored[embedding].read(embedding):
                raise InputError(f"the config ties {head} to {embedding}, but {folder} holds different values for them")
            del names[skeleton.tied_head or ""]
        for name, parameter in skeleton.parameters.items():
            found = names.get(name)
            # A linear layer that is not there would start from random numbers. The rest has old names in some files,
            # and transformers knows them.
            missing = found is None and parameter.role == "linear"
            extent = None if found is None else stored[found].entries[found]
            if missing or (extent and (extent.shape != parameter.shape or not is_floating(extent.dtype))):
                raise InputError(
                    f"{folder} has no weight {name} of shape {list(parameter.shape)}, which its config asks for",
                    remedy="Load the model with transformers, save it with save_pretrained and give that folder.",
                )
        roles = {name: parameter.role for name, parameter in skeleton.parameters.items()}
        yield {
            name: _Weight(stored[at], at, _layout(stored[at], at, role=roles.get(name)))
            for name, at in sorted(names.items())
        }


def _weight_files(folder: Path) -> list[str]:
    require_safetensors(folder)
    if not (folder / INDEX).is_file():
        return [WEIGHTS]
    try:
        names = set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
        if any(Path(name).name != name for name in names):
            raise InputError(f"{INDEX} names files outside its folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise InputError(f"{folder / INDEX} is not readable: {exc}") from exc
    return sorted(names)


def _layout(file: TensorFile, name: str, *, role: Role | None) -> Layout:
    extent = file.entries[name]
    dtype: Dtype = "BF16" if is_floating(extent.dtype) else _dtype(extent.dtype)
    return Layout(extent.shape, dtype, role)


def _dtype(name: str) -> Dtype:
    for known in get_args(Dtype):
        if known == name:
            return known  # type: ignore[no-any-return]
    raise InputError(f"the base has a tensor of the dtype {name}, which versions do not hold")


# -- the other files ---------------------------------------------------------------------------------------------------


def _read_carried(folder: Path) -> dict[str, bytes]:
    """Config and tokenizer files, ready to publish: file name -> bytes."""
    require_safetensors(folder)
    carried: dict[str, bytes] = {}
    for name in CARRIED:
        path = folder / name
        if not path.is_file():
            continue
        if path.stat().st_size > MAX_CARRIED_BYTES:
            raise InputError(f"{path} has more than {MAX_CARRIED_BYTES} bytes")
        carried[name] = path.read_bytes()
    if not carried.keys() & {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"}:
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
    if "tokenizer_config.json" in carried:
        settings = _parse_object(folder, "tokenizer_config.json", carried["tokenizer_config.json"])
        # Both name things on the importing machine, or code that would have to be trusted.
        for name in ("auto_map", "name_or_path"):
            settings.pop(name, None)
        carried["tokenizer_config.json"] = _encode(settings)
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
