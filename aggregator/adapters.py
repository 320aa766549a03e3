"""Reading PEFT LoRA adapters: their configuration, their tensors, and what each tensor is.

An adapter is a folder with `adapter_config.json` and `adapter_model.safetensors`, as `PeftModel.save_pretrained` writes
it. A pair of tensors adds scaling · B·A to a weight (Hu et al., arXiv:2106.09685), with scaling = alpha / r, or
alpha / sqrt(r) for rsLoRA (arXiv:2312.03732); any other tensor is the whole new value of a parameter.

What always holds:
- every tensor of an adapter is understood or the adapter is refused: none is passed over in silence;
- a setting that changes the mathematics and is not known here is refused, with the setting's name;
- values come out finite, and pickles are never opened.

It does not know the base model: `aggregator.layouts` says where a pair lands in it. No torch, no peft.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, NoReturn

import numpy as np
import numpy.typing as npt

from rankup.bfloat16 import from_bfloat16
from rankup.durable import read_range
from rankup.errors import InputError, IntegrityError, NotFoundError, TooLargeError
from rankup.fixedpoint import Float64Array
from rankup.tensorfile import DTYPE_BYTES, TensorExtent, TensorFile

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
MAX_CONFIG_BYTES: Final = 1024 * 1024
MAX_RANK: Final = 8192
"""Above the rank of any adapter that is smaller than what it adapts; a limit on memory, not on mathematics."""
FLOATS: Final = ("F32", "F16", "BF16", "F64")

_PREFIX: Final = "base_model.model."
_PEFT_REMEDY: Final = "Merge it with peft's merge_and_unload, or train it again as a plain LoRA adapter."
_REFUSED: Final[Mapping[str, str]] = {
    "use_dora": "DoRA scales the columns of the merged weight, which is no sum",
    "use_qalora": "QA-LoRA pools the inputs in front of A",
    "use_bdlora": "block-diagonal factors are not read",
    "alora_invocation_tokens": "an activated LoRA (aLoRA) acts on some tokens only, so no merged weight is equal to it",
    "arrow_config": "Arrow routes between adapters at run time",
    "kasa_config": "KaSA changes the base weights",
    "monteclora_config": "MonteCLoRA samples its factors",
    "layer_replication": "the adapter repeats layers of the base",
    "trainable_token_indices": "single trained tokens (trainable_token_indices) are not read",
}
_HARMLESS_INITS: Final = ("gaussian", "eva", "orthogonal", "mica", "true", "false")
"""The other ones change the base weights before training, so the adapter belongs to weights that nobody stored."""
_REPEATS: Final = re.compile(r"[*+{]")
_OPTIONALS: Final = re.compile(r"(?<!\()\?")


@dataclass(frozen=True)
class Pair:
    """The two tensors of one layer. `a` and `b` are names in the adapter's file.

    linear: a (r, d_in), b (d_out, r). embedding: a (r, vocabulary), b (width, r), the delta is (B·A)'. bias: b (d_out)
    is added to the layer's bias, a only tells the rank. `depth` counts the wrappers around a module with several
    targeted parameters: 0 is the outermost.
    """

    module: str
    kind: Literal["linear", "embedding", "bias"]
    depth: int
    a: str
    b: str


@dataclass(frozen=True)
class Operand:
    """A matrix that is cut from one tensor of the adapter, transposed at the end, times `scale`.

    `tensor` None is the 1 x 1 matrix of one. A vector counts as one column.
    """

    tensor: str | None
    rows: slice = field(default_factory=lambda: slice(None))
    columns: slice = field(default_factory=lambda: slice(None))
    transpose: bool = False
    scale: float = 1.0


class Adapter:
    """One adapter folder, opened: `config`, `pairs`, `copies` (parameter -> tensor) and their values on demand."""

    def __init__(self, folder: Path) -> None:
        """Read configuration and header, hash the weights. Close it with `close` or a `with` block.

        Raises:
            NotFoundError: no such folder.
            InputError: no LoRA adapter, or one of a kind that cannot be merged exactly.
            IntegrityError: the tensor file breaks its format.
        """
        self.folder = folder
        self.name = folder.resolve().name
        config_bytes = _read_config(folder)
        self.config_sha256 = hashlib.sha256(config_bytes).hexdigest()
        self.config = _parse_config(self.name, config_bytes)
        try:
            self._descriptor = os.open(folder / WEIGHTS, os.O_RDONLY)
        except OSError as exc:
            raise InputError(f"cannot read {folder / WEIGHTS}: {exc.strerror}") from exc
        try:
            size_bytes = os.fstat(self._descriptor).st_size
            with os.fdopen(os.dup(self._descriptor), "rb") as whole:
                self.sha256 = hashlib.file_digest(whole, "sha256").hexdigest()
            try:
                file = TensorFile(lambda start, length: read_range(self._descriptor, start, length), size_bytes)
            except IntegrityError as exc:
                raise IntegrityError(f"{folder / WEIGHTS}: {exc.cause}", remedy=exc.remedy) from exc
            self.tensors: Mapping[str, TensorExtent] = file.entries
            self.pairs, self.copies = self._sort()
        except BaseException:
            self.close()
            raise
        self._recent: OrderedDict[str, npt.NDArray[Any]] = OrderedDict()

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Adapter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- values --------------------------------------------------------------------------------------------------------

    def shape(self, tensor: str) -> tuple[int, ...]:
        return self.tensors[tensor].shape

    def matrix(self, operand: Operand) -> Float64Array:
        """The operand's values, float64. Raises InputError that names the tensor where one is not finite."""
        if operand.tensor is None:
            return np.ones((1, 1))
        extent = self.tensors[operand.tensor]
        if operand.columns.step is not None:
            part = self._whole(operand.tensor)[operand.rows, operand.columns]
        else:
            width = extent.shape[1] if len(extent.shape) > 1 else 1
            line = width * DTYPE_BYTES[extent.dtype]
            start, stop, _ = operand.rows.indices(extent.shape[0])
            data = self._read(operand.tensor, extent.start + start * line, (stop - start) * line)
            part = _array(data, extent.dtype).reshape(-1, width)[:, operand.columns]
        values = _to_float(part, extent.dtype).astype(np.float64)
        self._require_finite(operand.tensor, values)
        values *= operand.scale
        return values.T if operand.transpose else values

    def rows(self, tensor: str, start: int, stop: int, width: int) -> npt.NDArray[Any]:
        """Rows `start` to `stop` of a tensor seen as a matrix of `width` columns: float32, float64 where it is F64."""
        extent = self.tensors[tensor]
        line = width * DTYPE_BYTES[extent.dtype]
        data = self._read(tensor, extent.start + start * line, (stop - start) * line)
        values = _to_float(_array(data, extent.dtype), extent.dtype).reshape(stop - start, width)
        self._require_finite(tensor, values)
        return values

    def _whole(self, tensor: str) -> npt.NDArray[Any]:
        """The tensor as it is stored. The last two are kept: experts take every E-th column, one after another."""
        if tensor not in self._recent:
            extent = self.tensors[tensor]
            while len(self._recent) >= 2:
                self._recent.popitem(last=False)
            data = self._read(tensor, extent.start, extent.stop - extent.start)
            self._recent[tensor] = _array(data, extent.dtype).reshape(extent.shape)
        self._recent.move_to_end(tensor)
        return self._recent[tensor]

    def _read(self, tensor: str, start: int, length: int) -> bytes:
        data = read_range(self._descriptor, start, length)
        if len(data) != length:
            raise IntegrityError(f"the adapter {self.name} ends inside its tensor {tensor!r}")
        return data

    def _require_finite(self, tensor: str, values: npt.NDArray[Any]) -> None:
        if not np.isfinite(values).all():
            raise InputError(
                f"the adapter {self.name} holds a value that is not finite in {tensor!r}",
                remedy="The training run diverged: take an earlier checkpoint, or leave this adapter out.",
            )

    # -- what the tensors are ------------------------------------------------------------------------------------------

    def _sort(self) -> tuple[tuple[Pair, ...], Mapping[str, str]]:
        """Tell pairs from whole parameters; every tensor ends in one of the two."""
        halves: dict[tuple[str, str], dict[str, str]] = {}  # (layer, kind) -> part -> tensor
        copies: dict[str, str] = {}
        for name, extent in self.tensors.items():
            if extent.dtype not in FLOATS:
                raise InputError(
                    f"the adapter {self.name} stores {name!r} as {extent.dtype}, not as one of {', '.join(FLOATS)}",
                    remedy="Save the adapter in float32 or bfloat16.",
                )
            if 0 in extent.shape:
                raise InputError(
                    f"the tensor {name!r} of the adapter {self.name} is empty: it was saved from a sharded model",
                    remedy="Gather the shards (DeepSpeed ZeRO-3, FSDP) before save_pretrained, and save again.",
                )
            path = name.removeprefix(_PREFIX)
            if found := re.fullmatch(r"(.+)\.lora_([AB])\.(weight|bias)", path):
                layer, part, leaf = found.groups()
                kind = "bias" if leaf == "bias" else "linear"
            elif found := re.fullmatch(r"(.+)\.lora_embedding_([AB])", path):
                (layer, part), kind = found.groups(), "embedding"
            elif "lora_" in path or "modules_to_save" in path or "token_adapter" in path:
                self._refuse_tensor(name)
            else:
                parameter = path.replace(".base_layer", "")
                if parameter in copies:
                    self._refuse_tensor(name)
                copies[parameter] = name
                continue
            if kind == "bias" and part == "A":
                self._refuse_tensor(name)
            halves.setdefault((layer, kind), {})[part] = name
        pairs = [
            self._pair(layer, kind, parts, halves.get((layer, "linear"), {}))
            for (layer, kind), parts in sorted(halves.items())
        ]
        if not pairs and not copies:
            raise InputError(f"the adapter {self.name} holds no tensor", remedy="Check that training has saved it.")
        return tuple(pairs), copies

    def _refuse_tensor(self, name: str) -> NoReturn:
        dora = " (a magnitude vector of DoRA)" if "magnitude" in name else ""
        raise InputError(
            f"the adapter {self.name} holds a tensor that plain LoRA does not know: {name!r}{dora}", remedy=_PEFT_REMEDY
        )

    def _pair(self, layer: str, kind: str, parts: Mapping[str, str], linear: Mapping[str, str]) -> Pair:
        if kind == "bias":
            if "A" not in linear or len(self.shape(parts["B"])) != 1:
                self._refuse_tensor(parts["B"])
            return Pair(layer, "bias", 0, linear["A"], parts["B"])
        if set(parts) != {"A", "B"}:
            raise InputError(
                f"the adapter {self.name} holds {next(iter(parts.values()))!r} without its other half",
                remedy="The file is incomplete: save or download the adapter again.",
            )
        a, b = self.shape(parts["A"]), self.shape(parts["B"])
        if len(a) != 2 or len(b) != 2:
            raise InputError(
                f"the adapter {self.name} adapts {layer!r}, which is no linear or embedding layer (factors {b}, {a})",
                remedy="Convolutions cannot be merged here. " + _PEFT_REMEDY,
            )
        if a[0] != b[1]:
            raise InputError(f"the factors of {layer!r} in the adapter {self.name} do not fit: {b} times {a}")
        module = layer
        while module.endswith(".base_layer"):
            module = module.removesuffix(".base_layer")
        depth = (len(layer) - len(module)) // len(".base_layer")
        return Pair(module, "embedding" if kind == "embedding" else "linear", depth, parts["A"], parts["B"])

    # -- settings ------------------------------------------------------------------------------------------------------

    def scaling(self, key: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r): what B·A is multiplied by, in float64.

        key: the module, or the parameter of `target_parameters`; `rank_pattern` and `alpha_pattern` are matched
        against it as peft does. Raises InputError where `rank` is not the one of the configuration.
        """
        stated = _matched(self.name, self.config.get("rank_pattern"), key, self.config.get("r", 8))
        alpha = _matched(self.name, self.config.get("alpha_pattern"), key, self.config.get("lora_alpha", 8))
        if stated != rank:
            raise InputError(
                f"the adapter {self.name} has rank {rank} in {key!r}, but its {CONFIG} says {stated:g}",
                remedy="The two files do not belong together: save or download the adapter again.",
            )
        if rank > MAX_RANK:
            raise TooLargeError(f"rank {rank} of {key!r} in the adapter {self.name} is above the limit of {MAX_RANK}")
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


# -- the configuration -------------------------------------------------------------------------------------------------


def _read_config(folder: Path) -> bytes:
    if not folder.is_dir():
        raise NotFoundError(
            f"there is no folder {folder}",
            remedy=f"Give the adapter's folder; one on the hub: hf download {folder} --local-dir my-adapter",
        )
    try:
        with (folder / CONFIG).open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as exc:
        raise InputError(
            f"{folder} has no readable {CONFIG}: it is not a PEFT adapter",
            remedy="Give the folder that PeftModel.save_pretrained wrote.",
        ) from exc
    if len(data) > MAX_CONFIG_BYTES:
        raise TooLargeError(f"{folder / CONFIG} is larger than {MAX_CONFIG_BYTES} bytes")
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise InputError(
            f"{folder} has no {WEIGHTS}" + (", only a pickled adapter_model.bin" if pickled else ""),
            remedy="Loading a pickle can run foreign code. Load the adapter with peft where you trust it, and save it "
            "with save_pretrained(safe_serialization=True)."
            if pickled
            else "Give the folder that PeftModel.save_pretrained wrote.",
        )
    return data


def _parse_config(name: str, data: bytes) -> Mapping[str, Any]:
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise InputError(f"the {CONFIG} of {name} is not JSON: {exc}") from exc
    if not isinstance(config, dict):
        raise InputError(f"the {CONFIG} of {name} is not an object")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{name} is an adapter of type {kind}; only LORA can be merged", remedy=_PEFT_REMEDY)
    for key, cause in _REFUSED.items():
        if config.get(key):
            raise InputError(f"the adapter {name} sets {key}: {cause}", remedy=_PEFT_REMEDY)
    init = config.get("init_lora_weights", True)
    if str(init).lower() not in _HARMLESS_INITS:
        raise InputError(
            f"the adapter {name} was initialised with {init!r}, which changes the base weights before training",
            remedy="Convert it to plain LoRA: save_pretrained(path_initial_model_for_weight_conversion=…) in peft.",
        )
    unknown = sorted(key for key, value in config.items() if value and key.startswith("use_") and key != "use_rslora")
    if unknown:
        raise InputError(f"the adapter {name} sets {unknown[0]}, which is not known here", remedy=_PEFT_REMEDY)
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(item, str) for item in parameters):
        raise InputError(f"target_parameters of the adapter {name} is no list of names")
    return config


def _matched(name: str, patterns: object, key: str, default: object) -> float:
    """The value of the first pattern that matches the end of `key`, as peft's `get_pattern_key` does."""
    value = default
    if patterns is not None and not isinstance(patterns, dict):
        raise InputError(f"a pattern of ranks or alphas of the adapter {name} is no table")
    for pattern, stated in (patterns or {}).items():
        if _safe(name, pattern).match(key):
            value = stated
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise InputError(f"the adapter {name} states {value!r} as rank or alpha of {key!r}")
    return float(value)


def _safe(name: str, pattern: str) -> re.Pattern[str]:
    """Compile a pattern from a foreign file, unless it could take for ever: a repeated group, or much that varies."""
    too_much = (
        len(pattern) > 512
        or len(_REPEATS.findall(pattern)) > 2
        or len(_OPTIONALS.findall(pattern)) > 4
        or re.search(r"\)[*+{?]", pattern)
    )
    try:
        if not too_much:
            return re.compile(rf"(.*\.)?({pattern})$")
    except re.error:
        pass
    raise InputError(
        f"the adapter {name} has the pattern {pattern[:80]!r}, which is not a simple regular expression",
        remedy="Write the layers out in rank_pattern and alpha_pattern of its configuration.",
    )


# -- values ------------------------------------------------------------------------------------------------------------

_STORED: Final[Mapping[str, str]] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def _array(data: bytes, dtype: str) -> npt.NDArray[Any]:
    return np.frombuffer(data, dtype=_STORED[dtype])


def _to_float(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """float32, or float64 where it is stored so; both hold every stored value exactly."""
    if dtype == "BF16":
        return from_bfloat16(values)
    return values.astype(np.float32) if dtype == "F16" else values
