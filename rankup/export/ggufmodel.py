"""From a Hugging Face config to GGUF: which tensors there must be, what they are called there, and the hyperparameters.

What always holds: every tensor of the folder is either written or known to be unnecessary (`rotary_emb.inv_freq`),
none is missing, and each has the shape that the config implies; what llama.cpp would compute in another way than
transformers is refused. Names come from the tables of the package gguf.

Rotary embeddings: transformers rotates the halves of a head, llama.cpp's "llama" rotates neighbouring pairs, so the
rows of each head of q and k are interleaved there (`TensorPlan.rope_head_rows`). Qwen's architectures keep the halves.

It reads no tensor and writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rankup.dtypes import Array
from rankup.errors import InputError
from rankup.tensorfile import TensorExtent

OutType = Literal["F32", "F16", "BF16"]
"""Types of tensors in a file that is not quantised."""

REMEDY: Final = "Convert it with llama.cpp's own converter: name its convert_hf_to_gguf.py with --converter."

_Count = Annotated[int, Field(ge=1, le=2**24)]
_ARCHITECTURES: Final[Mapping[str, str]] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_IGNORED_SUFFIX: Final = ".rotary_emb.inv_freq"
_SOURCE_DTYPES: Final = ("BF16", "F16", "F32")


class _Config(BaseModel):
    """The part of a config.json that matters here."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    architectures: Annotated[list[str], Field(min_length=1, max_length=1)]
    hidden_size: _Count
    intermediate_size: _Count
    num_hidden_layers: Annotated[int, Field(ge=1, le=4096)]
    num_attention_heads: _Count
    num_key_value_heads: _Count | None = None
    head_dim: _Count | None = None
    vocab_size: _Count
    max_position_embeddings: Annotated[int, Field(ge=1, le=2**31 - 1)]
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)]
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: Literal["silu"] = "silu"
    sliding_window: int | None = None
    use_sliding_window: bool | None = None
    layer_types: list[str] | None = None
    partial_rotary_factor: float | None = None
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    quantization_config: None = None


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the file. `shape` is row-major, as in safetensors; GGUF stores it reversed."""

    source: str
    """Its name in the folder."""
    name: str
    shape: tuple[int, ...]
    out: OutType
    rope_head_rows: int | None = None
    """Rows of one head, where the rows of each head are interleaved; None where all stay as they are."""


@dataclass(frozen=True)
class ModelPlan:
    """What the file of a model holds, apart from its tokenizer."""

    architecture: str
    """As GGUF calls it: llama, qwen2, qwen3."""
    out: OutType
    """Of the weights; norms and biases are always F32."""
    tensors: tuple[TensorPlan, ...]
    vocab_size: int
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    rms_eps: float
    rope_theta: float
    rope_linear_factor: float | None
    rope_factors: Array | None
    """(head_dim // 2,) float32: what llama.cpp divides each frequency by; None where nothing is divided."""

    @property
    def parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors)


def plan_model(config: Mapping[str, Any], tensors: Mapping[str, TensorExtent], out: OutType | None) -> ModelPlan:
    """Decide what the file will hold. `out` None keeps 16-bit weights as they are and makes F16 of F32 ones.

    Raises:
        InputError: an architecture or a variant that cannot be done exactly, or tensors that do not fit the config.
    """
    parsed = _parse(config)
    architecture = _ARCHITECTURES[parsed.architectures[0]]
    if out is None:
        first = next((extent.dtype for extent in tensors.values() if len(extent.shape) == 2), "F16")
        out = "BF16" if first == "BF16" else "F16"
    heads, kv_heads = parsed.num_attention_heads, parsed.num_key_value_heads or parsed.num_attention_heads
    head_dim = parsed.head_dim or parsed.hidden_size // heads
    if (parsed.head_dim is None and parsed.hidden_size % heads) or heads % kv_heads or head_dim % 2:
        raise InputError(f"{heads} heads ({kv_heads} of keys) do not divide a width of {parsed.hidden_size}")
    theta, linear, factors = _rope(parsed, architecture, head_dim)
    return ModelPlan(
        architecture=architecture,
        out=out,
        tensors=_plan_tensors(parsed, architecture, head_dim, kv_heads, tensors, out),
        vocab_size=parsed.vocab_size,
        layers=parsed.num_hidden_layers,
        hidden=parsed.hidden_size,
        feed_forward=parsed.intermediate_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context=parsed.max_position_embeddings,
        rms_eps=parsed.rms_norm_eps,
        rope_theta=theta,
        rope_linear_factor=linear,
        rope_factors=factors,
    )


def _parse(config: Mapping[str, Any]) -> _Config:
    named = config.get("architectures")
    known = [name for name in named if name in _ARCHITECTURES] if isinstance(named, list) else []
    if not known:
        raise InputError(
            f"the architecture {named!r} is not one of {', '.join(_ARCHITECTURES)}, which can be written here",
            remedy=REMEDY,
        )
    try:
        parsed = _Config.model_validate(config)
    except ValidationError as exc:
        fault = exc.errors()[0]
        field = ".".join(map(str, fault["loc"]))
        raise InputError(f"config.json: {field}: {fault['msg']}", remedy=REMEDY) from exc
    windowed = parsed.architectures[0].startswith("Mistral") or parsed.use_sliding_window
    if (windowed and parsed.sliding_window) or any("sliding" in kind for kind in parsed.layer_types or ()):
        raise InputError("the model attends to a sliding window, which GGUF's architecture does not", remedy=REMEDY)
    if parsed.partial_rotary_factor not in (None, 1.0):
        raise InputError("the model rotates a part of each head only", remedy=REMEDY)
    return parsed


# -- tensors -----------------------------------------------------------------------------------------------------------


def _plan_tensors(
    config: _Config,
    architecture: str,
    head_dim: int,
    kv_heads: int,
    tensors: Mapping[str, TensorExtent],
    out: OutType,
) -> tuple[TensorPlan, ...]:
    import gguf

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    expected, optional = _shapes(config, architecture, head_dim, kv_heads)
    planned: list[TensorPlan] = []
    for source, shape in expected.items():
        extent = tensors.get(source)
        if extent is None and source in optional:
            continue
        if extent is None:
            raise InputError(f"tensor {source!r} is missing", remedy="Pull the version again.")
        if extent.shape != shape or extent.dtype not in _SOURCE_DTYPES:
            found = f"{extent.dtype} {list(extent.shape)}"
            raise InputError(f"tensor {source!r} is {found}, but the config implies {list(shape)}", remedy=REMEDY)
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise InputError(f"GGUF has no name for tensor {source!r}", remedy=REMEDY)
        rotated = architecture == "llama" and (".q_proj." in source or ".k_proj." in source)
        planned.append(TensorPlan(source, name, shape, out if len(shape) > 1 else "F32", head_dim if rotated else None))
    unknown = sorted(name for name in tensors.keys() - expected.keys() if not name.endswith(_IGNORED_SUFFIX))
    if unknown:
        raise InputError(f"tensor {unknown[0]!r} belongs to no {config.architectures[0]}", remedy=REMEDY)
    return tuple(planned)


def _shapes(
    config: _Config, architecture: str, head_dim: int, kv_heads: int
) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Every tensor that the architecture may have -> its shape, and those that may be left out."""
    hidden, wide, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    q, kv = config.num_attention_heads * head_dim, kv_heads * head_dim
    linear = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    if architecture == "qwen2":
        biased = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
    else:
        biased = {name for name in linear if (config.attention_bias if "attn" in name else config.mlp_bias)}
    if architecture == "qwen3" and biased:
        raise InputError("llama.cpp knows no Qwen3 with biases", remedy=REMEDY)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        for name, shape in linear.items():
            shapes[f"{layer}.{name}.weight"] = shape
            if name in biased:
                shapes[f"{layer}.{name}.bias"] = shape[:1]
        if architecture == "qwen3":
            shapes |= {f"{layer}.self_attn.{side}_norm.weight": (head_dim,) for side in "qk"}
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    return shapes, {"lm_head.weight"} if config.tie_word_embeddings else set()


def interleave_heads(rows: Array, head_rows: int) -> Array:
    """(n·head_rows, …) -> the same rows; in each head, row i of the first half before row i of the second.

    The rotation of neighbouring pairs then does what the rotation of halves did before.
    """
    halves = rows.reshape(-1, 2, head_rows // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


# -- rotary embeddings -------------------------------------------------------------------------------------------------


def _rope(config: _Config, architecture: str, head_dim: int) -> tuple[float, float | None, Array | None]:
    """Base frequency, linear factor, factors by frequency."""
    scaling = dict(config.rope_parameters or config.rope_scaling or {})
    theta = scaling.get("rope_theta", config.rope_theta)
    theta = 10000.0 if theta is None else theta
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    try:
        theta = _positive(theta)
        match kind:
            case "default":
                return theta, None, None
            case "linear":
                return theta, _positive(scaling["factor"]), None
            case "llama3" if architecture == "llama":
                return theta, None, _llama3_factors(scaling, theta, head_dim)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as exc:
        raise InputError(f"the rotary parameters of config.json are not understood: {exc}", remedy=REMEDY) from exc
    raise InputError(f"rotary embeddings of type {kind!r} cannot be written here", remedy=REMEDY)


def _llama3_factors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> Array:
    """Llama 3.1's factors: long waves are divided by `factor`, short ones stay, those between are blended."""
    factor, low, high = (_positive(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = _positive(scaling["original_max_position_embeddings"])
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelengths = np.float32(2 * math.pi) * np.float32(theta) ** exponents
    smooth = (np.float32(context) / wavelengths - np.float32(low)) / np.float32(high - low)
    blended = 1 / ((1 - smooth) / np.float32(factor) + smooth)
    factors = np.where(wavelengths > context / low, np.float32(factor), blended)
    return np.where(wavelengths < context / high, np.float32(1), factors).astype("<f4")


def _positive(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{value!r} is not a positive number")
    return float(value)
