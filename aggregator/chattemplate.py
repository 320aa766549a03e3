"""A chat template that a base is imported with instead of its own: for tools, or for marks of the assistant's words.

What always holds: the base's folder is not written to; a template that cannot be used is refused before anything is
published. It runs in transformers' sandbox, here as everywhere.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from aggregator.bases import Base
from aggregator.encoding import chat_ids
from rankup.errors import InputError, NotFoundError

MAX_BYTES: Final = 1024**2
TALK: Final = ({"role": "user", "content": "Is it warm?"}, {"role": "assistant", "content": "No, it is four degrees."})


def with_chat_template(base: Base, file: Path) -> Base:
    """The base with the template in `file`, tried on a question and its answer.

    Raises NotFoundError: there is no such file; InputError: it is too large, no text, or no template that takes them.
    """
    from transformers import AutoTokenizer

    if not file.is_file():
        raise NotFoundError(f"there is no file {file}", remedy="Check the path of the chat template.")
    if file.stat().st_size > MAX_BYTES:
        raise InputError(f"{file} has more than {MAX_BYTES} bytes: it is no chat template")
    try:
        template = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise InputError(f"{file} is not text in UTF-8: it is no chat template") from exc
    tokenizer = AutoTokenizer.from_pretrained(base.folder, local_files_only=True, trust_remote_code=False)
    tokenizer.chat_template = template
    try:
        shown = chat_ids(tokenizer, TALK) if template.strip() else []
    except InputError as exc:
        raise InputError(f"{file}: {exc.cause}", remedy="Correct the template, or import without it.") from exc
    if not shown:
        raise InputError(f"{file} says nothing of a conversation: it is no chat template")
    return replace(base, chat_template=template)
