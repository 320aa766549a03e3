"""The keys of a GGUF file: where the model comes from, its hyperparameters, its tokenizer.

The keys are those that llama.cpp's converter writes, through the same classes of the package gguf. A folder that was
pulled leaves its mark besides: `rankup.model`, `rankup.version`, `rankup.manifest` and `rankup.publisher_key` name the
version, and its manifest, not the folder's name, says what the model is called and whose licence it has.

It reads small files of the folder, whose sizes `ggufsource` has checked, and writes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rankup import __version__
from rankup.errors import InputError
from rankup.export.ggufmodel import ModelPlan
from rankup.export.ggufsource import ModelFolder
from rankup.export.ggufvocab import Vocabulary

if TYPE_CHECKING:
    from gguf import GGUFWriter

_PREFIX: Final = "rankup"
_WITHOUT_BOS_ROWS: Final = 49152
"""llama.cpp's converter tells Llama models whose text begins without a mark (SmolLM, Granite) by this many tokens."""


def describe(model: ModelFolder, plan: ModelPlan, vocabulary: Vocabulary) -> GGUFWriter:
    """A writer with every key, to which no tensor was added yet.

    Raises:
        InputError: the model card or the generation config holds values that GGUF cannot.
    """
    import gguf
    import yaml

    writer = gguf.GGUFWriter(path=None, arch=plan.architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    try:
        _add_general(writer, model, plan)
        _add_hyperparameters(writer, plan)
        _add_vocabulary(writer, model, plan, vocabulary)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError, yaml.YAMLError) as exc:
        raise InputError(f"{model.folder} holds metadata that GGUF cannot: {exc}") from exc
    return writer


def _add_general(writer: GGUFWriter, model: ModelFolder, plan: ModelPlan) -> None:
    import gguf

    metadata = gguf.Metadata.load(None, model.folder, None, plan.parameters)
    metadata.name = metadata.name or model.folder.resolve().name
    metadata.size_label = metadata.size_label or gguf.size_label(plan.parameters, plan.parameters, 0, 0)
    provenance = model.provenance
    if provenance is not None:
        manifest = provenance.manifest
        metadata.name, metadata.version, metadata.license = manifest.model, str(manifest.version), manifest.licence
        metadata.organization = metadata.basename = metadata.finetune = None
        metadata.base_models = [{"name": manifest.base_model}]
        metadata.datasets = [{"name": dataset} for dataset in manifest.datasets] or None
    metadata.set_gguf_meta_model(writer)
    if provenance is not None:
        writer.add_string(f"{_PREFIX}.model", provenance.manifest.model)
        writer.add_uint32(f"{_PREFIX}.version", provenance.manifest.version)
        writer.add_string(f"{_PREFIX}.manifest", provenance.digest)
        writer.add_string(f"{_PREFIX}.publisher_key", provenance.publisher_key)
    writer.add_string(f"{_PREFIX}.software", f"rankup {__version__}")


def _add_hyperparameters(writer: GGUFWriter, plan: ModelPlan) -> None:
    import gguf

    writer.add_block_count(plan.layers)
    writer.add_context_length(plan.context)
    writer.add_embedding_length(plan.hidden)
    writer.add_feed_forward_length(plan.feed_forward)
    writer.add_head_count(plan.heads)
    writer.add_head_count_kv(plan.kv_heads)
    if plan.architecture != "qwen2" or plan.head_dim * plan.heads != plan.hidden:
        writer.add_key_length(plan.head_dim)
        writer.add_value_length(plan.head_dim)
    writer.add_rope_freq_base(plan.rope_theta)
    writer.add_layer_norm_rms_eps(plan.rms_eps)
    if plan.rope_linear_factor is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(plan.rope_linear_factor)
    if plan.architecture == "llama":
        writer.add_vocab_size(plan.vocab_size)
        writer.add_rope_dimension_count(plan.head_dim)
    types = {"F32": gguf.LlamaFileType.ALL_F32, "F16": gguf.LlamaFileType.MOSTLY_F16}
    writer.add_file_type(types.get(plan.out, gguf.LlamaFileType.MOSTLY_BF16))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_vocabulary(writer: GGUFWriter, model: ModelFolder, plan: ModelPlan, vocabulary: Vocabulary) -> None:
    import gguf

    if plan.architecture == "llama" and vocabulary.add_space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    special = gguf.SpecialVocab(model.folder, n_vocab=plan.vocab_size)
    if plan.architecture == "llama" and plan.vocab_size == _WITHOUT_BOS_ROWS:
        special.add_special_token["bos"] = False
    special.add_to_gguf(writer, quiet=True)
