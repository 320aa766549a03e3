"""Small signed model histories, made with the real formats.

Its arithmetic works on whole arrays, apart from the tiles of the fold and the replay.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from rankup.bfloat16 import to_bfloat16
from rankup.delta import DeltaHeader, write_delta
from rankup.exactsum import fold_tensor
from rankup.fixedpoint import Factors, quantise
from rankup.keychain import make_key_change
from rankup.message import canonical_json
from rankup.outer import outer_step
from rankup.patch import write_patch
from rankup.protocol import Pointer
from rankup.recipe import PLAIN_SUM, Aggregation, OuterStep, Recipe
from rankup.records import BlobRef, FileEntry, Group, KeyRotation, Manifest, Patch, Rollback, TensorEntry, Term
from rankup.refold import MOMENTUM_METADATA
from rankup.signing import Ed25519PrivateKey, generate_private_key, parse_private_key, public_key_hex
from rankup.store import MemoryStore, put_blob
from rankup.targets import Role
from rankup.tensorfile import write_tensor_file
from rankup.versions import manifest_digest, manifest_key, pointer_key, seal

MODEL = "toy"
SHAPES = {"layers.0.down.weight": (48, 96), "layers.0.up.weight": (96, 48), "layers.1.up.weight": (40, 24)}
GROUPS = (("layers.0.down.weight", "layers.0.up.weight"), ("layers.1.up.weight", "norm.weight", "steps"))
RANK = 4
DENOMINATOR_LOG2 = 16

EXPERTS, BIAS = "layers.1.experts", "layers.1.bias"
VARIED_SHAPES: Mapping[str, tuple[int, ...]] = {**SHAPES, EXPERTS: (3, 12, 8), BIAS: (10,)}
ROLES: Mapping[str, Role] = {**dict.fromkeys(SHAPES, "linear"), EXPERTS: "experts", BIAS: "vector"}
METADATA = {"master": {"format": "rankup.master/1"}, "model": {"format": "pt"}, "momentum": MOMENTUM_METADATA}
NESTEROV = OuterStep(learning_rate=0.75, momentum=0.875)


@dataclass
class History:
    """Published versions in a store; `manifests[n]` is version n."""

    store: MemoryStore
    key: Ed25519PrivateKey
    manifests: list[Manifest] = field(default_factory=list)
    deltas: dict[str, bytes] = field(default_factory=dict)
    patches: bool = False
    """Versions have patches."""

    @property
    def publisher_key(self) -> str:
        return public_key_hex(self.key)

    def publish(self, manifest: Manifest, *, key: Ed25519PrivateKey | None = None) -> None:
        """Store a sealed manifest under its number, over whatever was there."""
        self.store.put(manifest_key(manifest.model, manifest.version), seal(manifest, key or self.key))

    def point(self, version: int, *, digest: str | None = None) -> None:
        """Set `latest`, forwards or backwards."""
        named = digest or manifest_digest(self.manifests[version])
        pointer = Pointer(model=MODEL, version=version, manifest=named, updated_at=1.0)
        self.store.put(pointer_key(MODEL), canonical_json(pointer))

    def blob(self, ref: BlobRef) -> bytes:
        """The stored bytes."""
        return self.store.get(f"blobs/sha256/{ref.sha256[:2]}/{ref.sha256}", max_bytes=2**30)

    def roll_back(self, to: int) -> Manifest:
        """Publish a version with the files of an earlier one."""
        return self._change(self.manifests[to], change=Rollback(to=to))

    def rotate(self, key: Ed25519PrivateKey) -> Manifest:
        """Publish a version that `key` signs, with its parent's files."""
        parent = self.manifests[-1]
        change = make_key_change(self.key, public_key_hex(key), model=MODEL, from_version=parent.version + 1)
        self.key = key
        return self._change(parent, change=KeyRotation(), keys=(*parent.keys, change))

    def _change(self, like: Manifest, **fields: object) -> Manifest:
        parent = self.manifests[-1]
        none = {"round_id": None, "terms": (), "evaluation": None, "keys": parent.keys}
        numbers = {"version": parent.version + 1, "parent": manifest_digest(parent)}
        groups = tuple(self.patched(group, before) for group, before in zip(like.groups, parent.groups, strict=True))
        manifest = like.model_copy(update={**none, **numbers, "groups": groups, **fields})
        self.manifests.append(manifest)
        self.publish(manifest)
        self.point(manifest.version)
        return manifest

    def patched(self, group: Group, before: Group) -> Group:
        """The group with a patch from the parent's export file, where there is anything to patch."""
        if not self.patches or group.export.sha256 == before.export.sha256:
            return group.model_copy(update={"patch": None})
        with TemporaryDirectory() as folder:
            base, child, out = (Path(folder) / name for name in ("base", "child", "patch"))
            base.write_bytes(self.blob(before.export))
            child.write_bytes(self.blob(group.export))
            ref = write_patch(base, child, out)
            put_blob(self.store, out.read_bytes())
        if ref.size_bytes >= group.export.size_bytes:
            return group.model_copy(update={"patch": None})
        return group.model_copy(update={"patch": Patch(base=before.export.sha256, **ref.model_dump())})

    def replace_blob(self, ref: BlobRef, data: bytes) -> None:
        """Put other bytes under a digest, as a broken or hostile store would."""
        self.store.put(f"blobs/sha256/{ref.sha256[:2]}/{ref.sha256}", data)


def make_history(
    *, versions: int = 3, contributions: int = 3, filler_bytes: int = 0, seed: int = 1, patches: bool = False
) -> History:
    """Versions 0 to `versions - 1`, the last one `latest`. `filler_bytes` sizes a tensor that never changes; with
    `patches` every version but the first has patches of its files."""
    recipe = Recipe(rank=RANK, aggregation=Aggregation(outer=PLAIN_SUM))
    rng = np.random.default_rng(seed)
    return _make(SHAPES, [recipe] * (versions - 1), contributions, filler_bytes, rng, patches=patches)


def make_varied_history() -> History:
    """Versions 0 to 3 with everything that a round may have: an outer step with momentum (in rounds 1 and 2, not in 3),
    stacked experts, vectors, partial deltas of both widths, late deltas of an older base and, in round 3, of a round
    that made no version, terms of coefficient 0 whose blobs are gone."""
    recipe = Recipe(
        rank=RANK,
        target_parameters=("experts",),
        train_vectors=True,
        partial=True,
        aggregation=Aggregation(outer=PLAIN_SUM),
    )
    nesterov = recipe.model_copy(update={"aggregation": Aggregation(outer=NESTEROV, max_staleness=1)})
    return _make(VARIED_SHAPES, [nesterov, nesterov, recipe], 4, 0, np.random.default_rng(2))


def _make(
    shapes: Mapping[str, tuple[int, ...]],
    recipes: Sequence[Recipe],
    contributions: int,
    filler_bytes: int,
    rng: np.random.Generator,
    *,
    patches: bool = False,
) -> History:
    history = History(MemoryStore(), parse_private_key(generate_private_key()), patches=patches)
    masters: dict[str, np.ndarray] = {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    masters["norm.weight"] = rng.standard_normal(max(16, filler_bytes // 4)).astype(np.float32)
    masters["steps"] = np.arange(5, dtype=np.int64)
    momenta: dict[str, np.ndarray] = {}
    _publish(history, None, masters, momenta, ())
    for version, recipe in enumerate(recipes, start=1):
        made = [_contribute(history, rng, shapes, version, index, recipe) for index in range(contributions)]
        made.sort(key=lambda pair: pair[0].contribution)
        outer = recipe.aggregation.outer
        for name in shapes:
            pairs = [(term.coefficient, change[name]) for term, change in made if name in change and term.coefficient]
            if pairs or (outer.keeps_state and name in momenta):
                momentum = momenta.get(name)
                masters[name], new = _stepped(masters[name], momentum, pairs, outer)
                momenta |= {} if new is None else {name: new}
        if not outer.keeps_state:
            momenta.clear()
        _publish(history, recipe, masters, momenta, tuple(term for term, _ in made))
    history.point(len(recipes))
    return history


def _stepped(
    master: np.ndarray, momentum: np.ndarray | None, pairs: Sequence[tuple[int, list[Factors]]], outer: OuterStep
) -> tuple[np.ndarray, np.ndarray | None]:
    """The whole step of one tensor, slice by slice."""
    found = []
    matrices = master if master.ndim == 3 else master.reshape(1, len(master), -1)
    for number, matrix in enumerate(matrices):
        delta = fold_tensor(np.zeros_like(matrix), [(c, change[number]) for c, change in pairs], DENOMINATOR_LOG2)
        state = None if momentum is None else momentum.reshape(matrices.shape)[number]
        found.append(outer_step(matrix, delta, state, outer))
    new_master = np.stack([one for one, _ in found]).reshape(master.shape)
    states = [state for _, state in found if state is not None]
    return new_master, np.stack(states).reshape(master.shape) if states else None


def _contribute(
    history: History,
    rng: np.random.Generator,
    shapes: Mapping[str, tuple[int, ...]],
    version: int,
    index: int,
    recipe: Recipe,
) -> tuple[Term, dict[str, list[Factors]]]:
    """Where deltas may be partial, the last term counts for nothing, one is int8, and one is late and of an older
    base."""
    changes: dict[str, list[Factors]] = {}
    for place, (name, shape) in enumerate(sorted(shapes.items())):
        if recipe.partial and place % 4 == index:
            continue
        slices = shape[0] if len(shape) == 3 else 1
        d_out, d_in = (shape[0], 1) if len(shape) == 1 else shape[-2:]
        rank = 1 if len(shape) == 1 else RANK
        changes[name] = [
            quantise(
                0.02 * rng.standard_normal((d_out, rank)),
                rng.standard_normal((rank, d_in)),
                bits=8 if recipe.partial and index == 1 else 16,
            )
            for _ in range(slices)
        ]
    stale = recipe.partial and index == 2 and version > 1
    base = manifest_digest(history.manifests[version - 2 if stale else version - 1])
    made_for = f"round-{version - 1}" if stale else None
    if recipe.partial and (version, index) == (3, 0):
        made_for = "round-3-rejected"
    header = DeltaHeader(model=MODEL, round_id=made_for or f"round-{version}", lease_id=f"l{index}", base_manifest=base)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "delta"
        ref = write_delta(
            path, header, {name: change[0] if len(change) == 1 else change for name, change in changes.items()}
        )
        history.deltas[ref.sha256] = path.read_bytes()
    left_out = recipe.partial and index == 3
    if not left_out:
        put_blob(history.store, history.deltas[ref.sha256])
    term = Term(
        contribution=ref.sha256,
        size_bytes=ref.size_bytes,
        worker_id=f"w-{index}",
        worker_name=f"worker {index}",
        shard=index,
        shards=2 if stale else 1,
        tokens=1000 + index,
        coefficient=0 if left_out else 20000 + index,
        base_manifest=base if stale else None,
        round_id=made_for,
    )
    return term, changes


def _publish(
    history: History,
    recipe: Recipe | None,
    masters: Mapping[str, np.ndarray],
    momenta: Mapping[str, np.ndarray],
    terms: tuple[Term, ...],
) -> None:
    version = len(history.manifests)
    entries: dict[str, TensorEntry] = {}
    groups: list[Group] = []
    for number, names in enumerate(GROUPS, start=1):
        if number == 2:
            names = (*names, *sorted(masters.keys() - {name for group in GROUPS for name in group}))
        files: dict[str, dict[str, tuple[str, tuple[int, ...], bytes]]] = {"master": {}, "model": {}, "momentum": {}}
        for name in names:
            array = masters[name]
            floating = array.dtype == np.float32
            shape = tuple(array.shape)
            master = ("F32" if floating else "I64", shape, array.tobytes())
            export = ("BF16", shape, to_bfloat16(array).tobytes()) if floating else master
            files["master"][name], files["model"][name] = master, export
            if name in momenta:
                files["momentum"][name] = ("F32", shape, momenta[name].tobytes())
            entries[name] = TensorEntry(
                shape=shape,
                export_dtype="BF16" if floating else "I64",
                master=hashlib.sha256(master[2]).hexdigest(),
                export=hashlib.sha256(export[2]).hexdigest(),
                role=ROLES.get(name),
                momentum=hashlib.sha256(momenta[name].tobytes()).hexdigest() if name in momenta else None,
            )
        suffix = f"{number:05d}-of-{len(GROUPS):05d}.safetensors"
        stored = {
            kind: _store_tensors(history, f"{kind}-{suffix}", tensors, METADATA[kind])
            for kind, tensors in files.items()
            if tensors
        }
        group = Group(tensors=names, master=stored["master"], export=stored["model"], momentum=stored.get("momentum"))
        groups.append(history.patched(group, history.manifests[-1].groups[number - 1]) if version else group)
    others = {"config.json": b'{"model_type":"toy"}', "README.md": b"# toy, version %d\n" % version}
    if version == 0:
        others["old-tokenizer.json"] = b"{}"
    manifest = Manifest(
        model=MODEL,
        version=version,
        parent=manifest_digest(history.manifests[-1]) if version else None,
        round_id=f"round-{version}" if version else None,
        recipe=recipe,
        denominator_log2=DENOMINATOR_LOG2,
        terms=terms,
        tensors=entries,
        groups=tuple(groups),
        files=tuple(
            FileEntry(path=path, **put_blob(history.store, data).model_dump()) for path, data in sorted(others.items())
        ),
        base_model="toy",
        licence="Apache-2.0",
        created_at=float(version),
    )
    history.manifests.append(manifest)
    history.publish(manifest)


def _store_tensors(
    history: History,
    path: str,
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]],
    metadata: Mapping[str, str],
) -> FileEntry:
    buffer = BytesIO()
    write_tensor_file(buffer, tensors, metadata)
    return FileEntry(path=path, **put_blob(history.store, buffer.getvalue()).model_dump())
