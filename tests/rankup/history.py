"""A small signed model history, made with the real arithmetic and formats: three versions, two rounds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from rankup.bfloat16 import to_bfloat16
from rankup.delta import DeltaHeader, write_delta
from rankup.exactsum import fold_tensor
from rankup.fixedpoint import Factors, quantise
from rankup.protocol import Pointer, Recipe, canonical_json
from rankup.records import BlobRef, FileEntry, Group, Manifest, TensorEntry, Term
from rankup.signing import Ed25519PrivateKey, generate_private_key, parse_private_key, public_key_hex
from rankup.store import MemoryStore, put_blob
from rankup.tensorfile import write_tensor_file
from rankup.versions import manifest_digest, manifest_key, pointer_key, seal

MODEL = "toy"
SHAPES = {"layers.0.down.weight": (48, 96), "layers.0.up.weight": (96, 48), "layers.1.up.weight": (40, 24)}
GROUPS = (("layers.0.down.weight", "layers.0.up.weight"), ("layers.1.up.weight", "norm.weight", "steps"))
RANK = 4
DENOMINATOR_LOG2 = 16


@dataclass
class History:
    """Published versions in a store; `manifests[n]` is version n."""

    store: MemoryStore
    key: Ed25519PrivateKey
    manifests: list[Manifest] = field(default_factory=list)
    deltas: dict[str, bytes] = field(default_factory=dict)

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

    def replace_blob(self, ref: BlobRef, data: bytes) -> None:
        """Put other bytes under a digest, as a broken or hostile store would."""
        self.store.put(f"blobs/sha256/{ref.sha256[:2]}/{ref.sha256}", data)


def make_history(*, versions: int = 3, contributions: int = 3, filler_bytes: int = 0, seed: int = 1) -> History:
    """Versions 0 to `versions - 1`, the last one `latest`. `filler_bytes` sizes a tensor that never changes."""
    rng = np.random.default_rng(seed)
    history = History(MemoryStore(), parse_private_key(generate_private_key()))
    masters: dict[str, np.ndarray] = {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()
    }
    masters["norm.weight"] = rng.standard_normal(max(16, filler_bytes // 4)).astype(np.float32)
    masters["steps"] = np.arange(5, dtype=np.int64)
    for version in range(versions):
        terms: tuple[Term, ...] = ()
        if version:
            base = manifest_digest(history.manifests[-1])
            made = [_contribute(history, rng, f"round-{version}", f"l{index}", base) for index in range(contributions)]
            made.sort(key=lambda pair: pair[0].sha256)
            terms = tuple(
                Term(
                    contribution=ref.sha256,
                    size_bytes=ref.size_bytes,
                    worker_id=f"w-{index}",
                    worker_name=f"worker {index}",
                    shard=index,
                    tokens=1000 + index,
                    coefficient=20000 + index,
                )
                for index, (ref, _) in enumerate(made)
            )
            for name in SHAPES:
                pairs = [(term.coefficient, factors[name]) for term, (_, factors) in zip(terms, made, strict=True)]
                masters[name] = fold_tensor(masters[name], pairs, DENOMINATOR_LOG2)
        manifest = _manifest(history, version, masters, terms)
        history.manifests.append(manifest)
        history.publish(manifest)
    history.point(versions - 1)
    return history


def _contribute(
    history: History, rng: np.random.Generator, round_id: str, lease_id: str, base: str
) -> tuple[BlobRef, dict[str, Factors]]:
    factors = {
        name: quantise(0.02 * rng.standard_normal((d_out, RANK)), rng.standard_normal((RANK, d_in)))
        for name, (d_out, d_in) in SHAPES.items()
    }
    header = DeltaHeader(model=MODEL, round_id=round_id, lease_id=lease_id, base_manifest=base)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "delta"
        ref = write_delta(path, header, factors)
        history.deltas[ref.sha256] = path.read_bytes()
    put_blob(history.store, history.deltas[ref.sha256])
    return ref, factors


def _manifest(history: History, version: int, masters: Mapping[str, np.ndarray], terms: tuple[Term, ...]) -> Manifest:
    entries: dict[str, TensorEntry] = {}
    groups: list[Group] = []
    for number, names in enumerate(GROUPS, start=1):
        master: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
        export: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
        for name in names:
            array = masters[name]
            floating = array.dtype == np.float32
            shape = tuple(array.shape)
            master[name] = ("F32" if floating else "I64", shape, array.tobytes())
            export[name] = ("BF16", shape, to_bfloat16(array).tobytes()) if floating else master[name]
            entries[name] = TensorEntry(
                shape=shape,
                export_dtype="BF16" if floating else "I64",
                master=hashlib.sha256(master[name][2]).hexdigest(),
                export=hashlib.sha256(export[name][2]).hexdigest(),
                lora=name in SHAPES,
            )
        suffix = f"{number:05d}-of-{len(GROUPS):05d}.safetensors"
        groups.append(
            Group(
                tensors=names,
                master=_store_tensors(history, f"master-{suffix}", master),
                export=_store_tensors(history, f"model-{suffix}", export),
            )
        )
    files = {"config.json": b'{"model_type":"toy"}', "README.md": b"# toy, version %d\n" % version}
    if version == 0:
        files["old-tokenizer.json"] = b"{}"
    return Manifest(
        model=MODEL,
        version=version,
        parent=manifest_digest(history.manifests[-1]) if version else None,
        round_id=f"round-{version}" if version else None,
        recipe=Recipe(rank=RANK) if version else None,
        denominator_log2=DENOMINATOR_LOG2,
        terms=terms,
        tensors=entries,
        groups=tuple(groups),
        files=tuple(
            FileEntry(path=path, **put_blob(history.store, data).model_dump()) for path, data in sorted(files.items())
        ),
        base_model="toy",
        licence="Apache-2.0",
        created_at=float(version),
    )


def _store_tensors(history: History, path: str, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> FileEntry:
    buffer = BytesIO()
    write_tensor_file(buffer, tensors, {"format": "pt"})
    return FileEntry(path=path, **put_blob(history.store, buffer.getvalue()).model_dump())
