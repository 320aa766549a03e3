"""A contribution as a PEFT adapter: a folder that `PeftModel.from_pretrained` loads, and that leads back to the delta.

    adapter_config.json          plain LoRA with alpha = r, so peft's scaling is 1 and the product is the delta's B·A
    adapter_model.safetensors    the factors as float32, or rounded to bfloat16
    rankup.json                  `AdapterRecord`: the delta's header, its digest, and the exponents of every weight
    README.md                    the hub's card of an adapter

An int16 mantissa times a power of two is exact in float32, and an int8 one in bfloat16 too; so with the exponents the
mantissas, and the file with its digest, come back bit for bit (`aggregator.peftdelta`).

What always holds:
- the folder appears with everything in it, or not at all; one that holds something else is left alone;
- every weight of the delta is in the adapter, or stands in the record's `left_out` with its reason, which needs
  `partial`;
- the same delta, base and type give the same bytes; memory is that of one weight's factors.

`aggregator.peftplaces` says where a weight lands. No torch and no peft, unless the base is a folder but no version.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from aggregator.adapters import CONFIG, WEIGHTS
from aggregator.cards import HUB_NAME, code
from aggregator.peftplaces import Base, Kind, Place, place, read_base
from rankup.bfloat16 import to_bfloat16
from rankup.delta import DeltaHeader, DeltaReader
from rankup.deltaheader import Bits
from rankup.durable import sync_folder, write_file
from rankup.errors import InputError, StateError
from rankup.fixedpoint import Factors, Float64Array, dequantise
from rankup.folder import disk_errors, sha256_of
from rankup.message import Digest, Message, TensorName, canonical_json
from rankup.recipe import MAX_RANK
from rankup.records import BlobRef
from rankup.targets import MAX_TARGETS
from rankup.tensorfile import TensorFileWriter

RECORD: Final = "rankup.json"
README: Final = "README.md"
MAX_RECORD_BYTES: Final = 64 * 1024 * 1024

Values = Literal["F32", "BF16"]
_Exponents = Annotated[tuple[Annotated[int, Field(ge=-200, le=100)], ...], Field(min_length=1, max_length=MAX_RANK)]


class Converted(Message):
    """How to read the delta's factors of one weight out of the adapter's."""

    kind: Kind
    bits: Bits
    b_exponents: _Exponents
    a_exponents: _Exponents


class AdapterRecord(Message):
    """`rankup.json` of an adapter's folder."""

    format: Literal["rankup.adapter/1"] = "rankup.adapter/1"
    header: DeltaHeader
    """Of the delta."""
    contribution: BlobRef
    """The delta's file."""
    values: Values
    exact: bool
    """Whether the adapter holds every value of the delta as it is."""
    weights: Annotated[dict[TensorName, Converted], Field(min_length=1, max_length=MAX_TARGETS)]
    left_out: Annotated[dict[TensorName, str], Field(max_length=MAX_TARGETS)] = Field(default_factory=dict)
    """Weight of the delta -> why it is not in the adapter."""


@dataclass(frozen=True)
class Conversion:
    """A folder that was written. `base_manifest`: of the base's folder where that is a version's."""

    record: AdapterRecord
    size_bytes: int
    base_manifest: Digest | None


def to_peft(
    delta: Path,
    to: Path,
    *,
    base: str | None = None,
    base_name: str | None = None,
    values: Values = "F32",
    partial: bool = False,
) -> Conversion:
    """Write the delta as a PEFT adapter's folder `to`, which must be empty or not there yet.

    Args:
        base: folder or hub name of the model; without a folder, weights of Conv1D layers and embeddings are refused.
        base_name: what the adapter calls its base, where that is not `base`: a folder's path is of use on this machine
            only.
        values: type of the adapter's numbers. BF16 rounds int16 mantissas, and then there is no way back.
        partial: leave out what a LoRA adapter cannot express, instead of refusing.

    Raises:
        DeltaError, NotFoundError, TooLargeError: the delta cannot be read.
        InputError: a weight cannot be expressed, or is not one of the base's.
        StateError: `to` holds something.
        DiskFullError, SetupError: it cannot be written.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise StateError(f"{to} is not empty", remedy="Choose another folder, or remove that one.")
    facts = read_base(base)
    if base_name is not None:
        facts = replace(facts, name=base_name)
    with DeltaReader.open(delta) as reader:
        places, left_out = _places(reader, facts, partial=partial)
        contribution = BlobRef(sha256=sha256_of(delta), size_bytes=reader.size_bytes)
        with disk_errors(to):
            to.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{to.name}-", dir=to.parent) as scratch:
                folder = Path(scratch) / "adapter"
                folder.mkdir(mode=0o755)
                weights, exact = _write_weights(folder / WEIGHTS, reader, places, values)
                record = AdapterRecord(
                    header=reader.header,
                    contribution=contribution,
                    values=values,
                    exact=exact,
                    weights=weights,
                    left_out=left_out,
                )
                write_file(folder / CONFIG, _config(reader, places, facts), mode=0o644)
                write_file(folder / RECORD, canonical_json(record), mode=0o644)
                write_file(folder / README, _readme(record, facts).encode(), mode=0o644)
                size_bytes = sum(path.stat().st_size for path in folder.iterdir())
                folder.replace(to)
                sync_folder(to.parent)
    return Conversion(record, size_bytes, facts.manifest)


def _places(reader: DeltaReader, base: Base, *, partial: bool) -> tuple[dict[str, Place], dict[str, str]]:
    places: dict[str, Place] = {}
    left_out: dict[str, str] = {}
    for name, layout in reader.layouts.items():
        found = place(name, layout, base)
        if isinstance(found, Place):
            places[name] = found
        else:
            left_out[name] = found.reason
    if left_out and not partial:
        name, reason = next(iter(left_out.items()))
        raise InputError(
            f"a LoRA adapter cannot express {len(left_out)} of the delta's {len(reader.names)} weights, "
            f"such as {name}: {reason}",
            remedy="Give the base model's folder with --base if you have not; --partial leaves these weights out.",
        )
    if not places:
        raise InputError("a LoRA adapter cannot express any weight of this delta", remedy="Pull the version instead.")
    return places, left_out


# -- the files ---------------------------------------------------------------------------------------------------------


def _write_weights(
    path: Path, reader: DeltaReader, places: Mapping[str, Place], values: Values
) -> tuple[dict[str, Converted], bool]:
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, where in places.items():
        layout = reader.layouts[name]
        d_in, d_out = (layout.d_out, layout.d_in) if where.transposed else (layout.d_in, layout.d_out)
        a, b = where.tensors
        shapes[a], shapes[b] = (values, (layout.rank, d_in)), (values, (d_out, layout.rank))
    converted: dict[str, Converted] = {}
    exact = True
    with path.open("w+b") as file:
        writer = TensorFileWriter(file, shapes, {"format": "pt"})
        for name, where in places.items():
            factors = reader.factors(name)
            left, right = dequantise(factors)
            pair = (left.T, right.T) if where.transposed else (right, left)
            for tensor, matrix in zip(where.tensors, pair, strict=True):
                data, same = _encode(name, matrix, values)
                writer.append(tensor, data)
                exact &= same
            converted[name] = _converted(factors, where.kind)
        writer.finish()
        file.flush()
        os.fsync(file.fileno())
    return converted, exact


def _converted(factors: Factors, kind: Kind) -> Converted:
    return Converted(
        kind=kind,
        bits=16 if factors.b.dtype == np.int16 else 8,
        b_exponents=tuple(factors.b_exp.tolist()),
        a_exponents=tuple(factors.a_exp.tolist()),
    )


def _encode(name: str, matrix: Float64Array, values: Values) -> tuple[bytes, bool]:
    """The matrix in row-major order as float32 or bfloat16, and whether nothing was rounded."""
    narrow: npt.NDArray[np.float32] = np.ascontiguousarray(matrix).astype(np.float32)
    if not np.array_equal(narrow.astype(np.float64), matrix):
        raise InputError(
            f"{name} holds a value that float32 does not, below 2^-149", remedy="Such a delta is not worth converting."
        )
    if values == "F32":
        return narrow.astype("<f4", copy=False).tobytes(), True
    bits = to_bfloat16(narrow)
    return bits.astype("<u2", copy=False).tobytes(), not bool((narrow.view(np.uint32) & np.uint32(0xFFFF)).any())


def _config(reader: DeltaReader, places: Mapping[str, Place], base: Base) -> bytes:
    """`adapter_config.json`. The rank that most weights have is r; the others stand in the patterns, in full."""
    ranks = {where.module: reader.layouts[name].rank for name, where in places.items()}
    [(usual, _)] = Counter(ranks.values()).most_common(1)
    others = {"^" + module.replace(".", r"\."): rank for module, rank in ranks.items() if rank != usual}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": any(where.kind == "conv1d" for where in places.values()),
        "use_rslora": False,
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    return json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"


def _readme(record: AdapterRecord, base: Base) -> str:
    header, digest = record.header, record.contribution.sha256
    fields = ["library_name: peft", "tags:", "- rankup", "- lora"]
    if base.name is not None and HUB_NAME.fullmatch(base.name):
        fields.insert(0, f"base_model: {base.name}")
    left_out = f" {len(record.left_out)} weights that LoRA cannot express are left out." if record.left_out else ""
    blocks = [
        "---\n" + "\n".join(fields) + "\n---",
        f"# Contribution {code(digest[:16])}",
        f"What one volunteer trained for the model {code(header.model or 'unknown')} in the round "
        f"{code(header.round_id)}, as a LoRA adapter of {len(record.weights)} weights.{left_out} It was trained on the "
        f"version with the manifest {code(header.base_manifest)}. A version adds many of them up, each with a weight.",
        "```python\nfrom peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base_model, folder)\n```",
    ]
    if record.exact and not record.left_out:
        back = "`rankup delta from-peft folder --out my.delta` gives the contribution again"
        blocks.append(f"{back}, with the sha256 {code(digest)}.")
    return "\n\n".join(blocks) + "\n"
