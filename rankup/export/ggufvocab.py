"""The tokenizer of a folder as llama.cpp knows it: tokens, their kinds, merges, and the name of its pre-tokenizer.

GGUF stores no regular expression: `tokenizer.ggml.pre` names one that llama.cpp has built in. The name is found

1. by the vocabulary, for those whose `tokenizer.json` is often written without all of its pre-tokenizer (transformers
   does so when it reads one from a GGUF file);
2. by the pre-tokenizer itself: normaliser, regular expressions and flags must be exactly those that the name stands
   for.

Anything else is refused: with a wrong name every prompt would be cut into other tokens than those of the training.

What always holds: ids are those of the folder's tokenizer. It handles byte-level BPE only; SentencePiece vocabularies
need their own file and go through llama.cpp's converter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

from rankup.errors import InputError
from rankup.export.ggufmodel import REMEDY
from rankup.export.ggufsource import TOKENIZER, TOKENIZER_CONFIG, read_json

KNOWN_VOCABULARIES: Final[Mapping[str, str]] = {
    # SmolLM and SmolLM2: their real pre-tokenizer splits digits, which shows in the vocabulary as well.
    "dbe1b09d8bdb451c041a7c56b3198d51885142c56ac697f36cebb705f049ad68": "smollm",
}
"""`vocabulary_digest` -> name of the pre-tokenizer."""

_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES_BY_WORD: Final = ("ByteLevel", "words")
_BYTES: Final = ("ByteLevel", "")
_PRE_TOKENIZERS: Final[Mapping[tuple[str, tuple[tuple[str, str], ...], bool], str]] = {
    ("", (_BYTES_BY_WORD,), False): "gpt-2",
    ("", (("Digits", ""), _BYTES_BY_WORD), False): "smollm",
    ("NFC", (("Split", rf"{_CONTRACTIONS}\p{{N}}{_REST}"), _BYTES), False): "qwen2",
    ("", (("Split", rf"{_CONTRACTIONS}\p{{N}}{{1,3}}{_REST}"), _BYTES), True): "llama-bpe",
}
"""(normaliser, steps of the pre-tokenizer, whether whole words skip the merges) -> name."""

_MAX_TOKENS: Final = 2**21
_SPACE, _SPACE_IN_MERGES = " ", "Ġ"


@dataclass(frozen=True)
class Vocabulary:
    """`tokens`, `kinds`: one entry for each row of the embedding; kinds are gguf.TokenType. `merges`: "left right"."""

    pre: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    merges: tuple[str, ...]
    special: frozenset[str]
    """Tokens that never stand for text: ends of turns, beginnings of sequences."""
    add_space_prefix: bool | None
    """None where the folder does not say."""


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """The vocabulary of the folder, padded to the `rows` of the embedding.

    Raises:
        InputError: there is no tokenizer.json, or it is of a kind that llama.cpp is not known to have.
    """
    if not (folder / TOKENIZER).is_file():
        raise InputError(f"{folder} has no {TOKENIZER}", remedy=REMEDY)
    tokenizer = read_json(folder / TOKENIZER)
    settings = read_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("byte_fallback"):
        found = model.get("type") if isinstance(model, dict) else None
        raise InputError(f"the tokenizer ({found}) is not a byte-level BPE", remedy=REMEDY)
    if any(model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout")):
        raise InputError("the tokenizer marks parts of words, which llama.cpp does not", remedy=REMEDY)
    table = _token_table(model)
    merges = _merges(model)
    added = _added(tokenizer, settings)
    tokens, kinds, special = _with_added(table, added, rows)
    added_texts = {text for text, _ in added.values()}
    learned = {token: number for token, number in table.items() if token not in added_texts}
    prefix = settings.get("add_prefix_space")
    return Vocabulary(
        pre=_pre_tokenizer(tokenizer, model, learned, merges),
        tokens=tokens,
        kinds=kinds,
        merges=merges or (_idle_merge(table),),
        special=special,
        add_space_prefix=prefix if isinstance(prefix, bool) else None,
    )


def vocabulary_digest(table: Mapping[str, int]) -> str:
    """sha256 over the tokens (without added ones) in the order of their ids, each followed by a line feed."""
    digest = hashlib.sha256()
    for token in sorted(table, key=table.__getitem__):
        digest.update(f"{token}\n".encode())
    return digest.hexdigest()


# -- tokens ------------------------------------------------------------------------------------------------------------


def _token_table(model: Mapping[str, Any]) -> dict[str, int]:
    table = model.get("vocab")
    if not isinstance(table, dict) or not 0 < len(table) <= _MAX_TOKENS:
        raise InputError(f"{TOKENIZER} has no vocabulary, or one of more than {_MAX_TOKENS} tokens")
    numbers = set(table.values())
    if len(numbers) != len(table) or not all(type(number) is int and 0 <= number < _MAX_TOKENS for number in numbers):
        raise InputError(f"{TOKENIZER} gives ids that are no numbers, or one id twice")
    return table


def _added(tokenizer: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """id -> (text, whether it is special) of the tokens beside the BPE; both files may name them."""
    found: dict[int, tuple[str, bool]] = {}
    listed = tokenizer.get("added_tokens") or []
    decoder = settings.get("added_tokens_decoder") or {}
    try:
        rows = [*((item["id"], item) for item in listed), *((int(number), item) for number, item in decoder.items())]
        for number, item in rows:
            text, special = item["content"], item.get("special", False)
            if type(number) is not int or not isinstance(text, str) or not text or not isinstance(special, bool):
                raise ValueError(f"the entry of {text!r}")
            if found.setdefault(number, (text, special))[0] != text:
                raise ValueError(f"two tokens with the id {number}")
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise InputError(f"the added tokens cannot be read: {exc}") from exc
    return found


def _with_added(
    table: Mapping[str, int], added: Mapping[int, tuple[str, bool]], rows: int
) -> tuple[tuple[str, ...], tuple[int, ...], frozenset[str]]:
    """Texts and kinds of all `rows` tokens; rows without a token are unused."""
    from gguf import TokenType

    by_id = {number: token for token, number in table.items()}
    last = max([*by_id, *added])
    if last >= rows:
        raise InputError(f"the tokenizer has a token {last}, the model only {rows} rows", remedy="Pull it again.")
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(rows)]
    kinds = [int(TokenType.NORMAL if number in by_id else TokenType.UNUSED) for number in range(rows)]
    special: set[str] = set()
    for number, (text, is_special) in added.items():
        tokens[number] = text
        kinds[number] = int(TokenType.USER_DEFINED)
        if is_special or (text[:2], text[-2:]) in (("<|", "|>"), ("<｜", "｜>")) or text in ("<pad>", "<mask>"):
            kinds[number] = int(TokenType.CONTROL)
            special.add(text)
    return tuple(tokens), tuple(kinds), frozenset(special)


# -- merges ------------------------------------------------------------------------------------------------------------


def _merges(model: Mapping[str, Any]) -> tuple[str, ...]:
    """Every merge as "left right"; a space within a part is written as the byte-level alphabet writes it."""
    listed = model.get("merges") or []
    if not isinstance(listed, list) or len(listed) > _MAX_TOKENS:
        raise InputError(f"{TOKENIZER} has no list of at most {_MAX_TOKENS} merges")
    found: list[str] = []
    for merge in listed:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
            raise InputError(f"{TOKENIZER}: {merge!r} is no merge of two parts")
        found.append(" ".join(part.replace(_SPACE, _SPACE_IN_MERGES) for part in parts))
    return tuple(found)


def _idle_merge(table: Mapping[str, int]) -> str:
    """A merge that changes nothing, for a vocabulary of single bytes: llama.cpp opens no BPE without merges.

    Its result is no token, so llama.cpp falls back to the two bytes that it was made of.
    """
    letters = [chr(code) for code in range(0x21, 0x7F) if chr(code) in table]
    for left, right in product(letters, repeat=2):
        if left + right not in table:
            return f"{left} {right}"
    raise InputError("the tokenizer has no merges, which llama.cpp cannot open", remedy="Choose another tokenizer.")


# -- the pre-tokenizer -------------------------------------------------------------------------------------------------


def _pre_tokenizer(
    tokenizer: Mapping[str, Any], model: Mapping[str, Any], learned: Mapping[str, int], merges: Sequence[str]
) -> str:
    if name := KNOWN_VOCABULARIES.get(vocabulary_digest(learned)):
        return name
    steps = _steps(tokenizer.get("pre_tokenizer"))
    normaliser = tokenizer.get("normalizer")
    kind = normaliser.get("type", "?") if isinstance(normaliser, dict) else ""
    if not merges and not kind and steps in ((_BYTES,), (_BYTES_BY_WORD,)):
        return "gpt-2"  # single bytes stay single bytes, wherever the text is cut
    name = _PRE_TOKENIZERS.get((kind, steps, bool(model.get("ignore_merges"))))
    if name is None:
        raise InputError("the tokenizer splits text in a way that is not known to be one of llama.cpp's", remedy=REMEDY)
    return name


def _steps(pre_tokenizer: object) -> tuple[tuple[str, str], ...]:
    """The steps of a pre-tokenizer as (type, what it splits at); a flag of another value than usual gives "?"."""
    if not isinstance(pre_tokenizer, dict):
        return ()
    if pre_tokenizer.get("type") == "Sequence":
        inner = pre_tokenizer.get("pretokenizers")
        return tuple(step for one in inner for step in _steps(one)) if isinstance(inner, list) else ()
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(by_word)}:
            return (_BYTES_BY_WORD if by_word else _BYTES,)
        case {"type": "Digits", "individual_digits": True}:
            return (("Digits", ""),)
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False}:
            return (("Split", regex),)
    return ((str(pre_tokenizer.get("type")), "?"),)
