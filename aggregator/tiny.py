"""A small random Llama with a byte tokenizer, made on the spot: a base model for demos and tests that need no download.

What always holds:
- the same seed gives the same weights; the tokenizer depends on nothing at all;
- the vocabulary is the 256 bytes plus five marks, so any text can be written and read back, and the loss of the
  untrained model is close to ln(261) = 5.56 nats per token;
- the folder is an ordinary Hugging Face folder: safetensors, config, generation config, tokenizer with a chat template.

It knows nothing about language: its only use is to be trained and to be quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

MARKS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
HIDDEN_SIZE = 64
LAYERS = 2
HEADS = 4
INTERMEDIATE_SIZE = 512
MAX_TOKENS = 4096


def write_tiny_model(to: Path, *, seed: int = 0, tied: bool = True) -> None:
    """Write the model's folder.

    Args:
        to: the folder; it is made if need be, files of the same name are replaced.
        seed: of the weights.
        tied: whether the output head shares the embedding's weight.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    tokenizer = _byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INTERMEDIATE_SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=MAX_TOKENS,
        # Wider than the usual 0.02: with LoRA the embeddings and the head stay as they are, and at 0.02 so narrow a
        # model could never reach a confident logit.
        initializer_range=0.06,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(torch.float32)
    to.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)


def _byte_tokenizer() -> Any:
    """Byte-level BPE without a single merge: one token per byte, and one per mark."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*MARKS, *alphabet))}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        pad_token=MARKS[0],
        eos_token=MARKS[1],
        additional_special_tokens=list(MARKS[2:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )
