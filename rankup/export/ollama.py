"""An Ollama model: a folder with a GGUF file and the Modelfile that `ollama create` reads.

What always holds: the Modelfile is written last, so a folder with one is complete; a TEMPLATE stands in it only if it
was found to render what the model's chat template renders (`chatparts`). Without one Ollama looks for a template of its
own that resembles the one in the GGUF file, and a note says so.

Ollama is not called, and need not be installed.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rankup.durable import write_file
from rankup.errors import SetupError, StateError
from rankup.export.chatparts import Case, ChatParts, learn_parts
from rankup.export.ggufsource import CHAT_TEMPLATE, TOKENIZER_CONFIG, ModelFolder, read_json
from rankup.export.ggufwriter import GgufFile
from rankup.folder import disk_errors

MODELFILE: Final = "Modelfile"
GGUF_NAME: Final = "model.gguf"
PROBE: Final = Path(__file__).with_name("chatprobe.py")

_PROBE_S: Final = 30
_MAX_ANSWER_BYTES: Final = 8 * 1024**2
_UNKNOWN_LICENCE: Final = "unknown"
_SPECIAL_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class Modelfile:
    """What goes into the folder, and what the user should know about it."""

    text: str
    template: str | None
    stops: tuple[str, ...]
    notes: tuple[str, ...]


def require_room(folder: Path, *, force: bool) -> None:
    """Raise StateError unless the folder is absent, empty, or may be written over."""
    if folder.exists() and not folder.is_dir():
        raise StateError(f"{folder} is a file", remedy="Choose another folder.")
    if not force and folder.is_dir() and any(folder.iterdir()):
        raise StateError(f"{folder} is not empty", remedy="Choose another folder, or write over it with --force.")


def require_jinja() -> None:
    """Raise SetupError where chat templates cannot be rendered."""
    if importlib.util.find_spec("jinja2") is None:
        raise SetupError(
            "reading a chat template needs the Python package 'jinja2'", remedy="Run: pip install 'rankup[gguf]'"
        )


def make_modelfile(model: ModelFolder, gguf: GgufFile) -> Modelfile:
    """The Modelfile for a finished GGUF file of the model, which will stand beside it as `gguf.path.name`.

    Raises:
        SetupError: jinja2 is missing.
    """
    require_jinja()
    facts = _read_facts(gguf.path)
    notes: list[str] = []
    template: str | None = None
    stops: tuple[str, ...] = ()
    source, variables = _read_template(model)
    if source is None:
        notes.append("the model has no chat template: Ollama will complete text instead of answering")
    else:
        parts = learn_parts(lambda cases: _render(source, variables, cases), variables.get("bos_token", ""))
        template = None if parts is None else parts.go_template(with_begin=not facts.adds_begin)
        if parts is None or template is None:
            notes.append("the chat template is not made of plain turns: Ollama takes it from the GGUF file, if it can")
        else:
            stops = _stops(parts, facts.special)
            notes += _remarks(parts, facts.adds_begin)
    lines = [f"FROM ./{gguf.path.name}"]
    lines += [] if template is None else [f'TEMPLATE """{template}"""']
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    licence = facts.licence if model.provenance is None else model.provenance.manifest.licence
    if licence and licence != _UNKNOWN_LICENCE and '"' not in licence:
        lines.append(f'LICENSE """{licence}"""')
    if model.provenance is not None:
        manifest = model.provenance.manifest
        lines.insert(0, f"# {manifest.model} version {manifest.version}, manifest sha256:{model.provenance.digest}")
    return Modelfile("\n".join(lines) + "\n", template, stops, tuple(notes))


def write_modelfile(folder: Path, modelfile: Modelfile) -> Path:
    """Put the Modelfile into the folder; returns its path."""
    path = folder / MODELFILE
    with disk_errors(path):
        write_file(path, modelfile.text.encode(), mode=0o644)
    return path


# -- what the model brings ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Facts:
    """What the GGUF file says: whether every prompt gets a mark at its beginning, control tokens, licence."""

    adds_begin: bool
    special: frozenset[str]
    licence: str


def _read_facts(path: Path) -> _Facts:
    import gguf

    reader = gguf.GGUFReader(path)

    def value(key: str, default: Any) -> Any:
        field = reader.get_field(key)
        return default if field is None else field.contents()

    # Without the key llama.cpp goes by the kind of tokenizer.
    by_kind = value("tokenizer.ggml.model", "") == "llama" or value("tokenizer.ggml.pre", "") in ("llama-bpe", "tekken")
    tokens = reader.get_field("tokenizer.ggml.tokens")
    kinds = value("tokenizer.ggml.token_type", [])
    control = [number for number, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL]
    special = frozenset() if tokens is None else frozenset(str(tokens.contents(number)) for number in control)
    return _Facts(bool(value("tokenizer.ggml.add_bos_token", by_kind)), special, str(value("general.license", "")))


def _read_template(model: ModelFolder) -> tuple[str | None, dict[str, str]]:
    """The chat template, if there is one, and the special tokens that it may name."""
    path = model.folder / TOKENIZER_CONFIG
    settings: Mapping[str, Any] = read_json(path) if path.is_file() else {}
    source = settings.get("chat_template")
    if isinstance(source, list):
        named = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}
        source = named.get("default")
    if (model.folder / CHAT_TEMPLATE).is_file():
        source = (model.folder / CHAT_TEMPLATE).read_text(encoding="utf-8", errors="replace")
    variables: dict[str, str] = {}
    for name in _SPECIAL_TOKENS:
        token = settings.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            variables[name] = text
    return source if isinstance(source, str) else None, variables


def _render(source: str, variables: Mapping[str, str], cases: Sequence[Case]) -> list[str | None]:
    """Render the cases in a child process; None for all of them where it broke its limits."""
    request = {
        "template": source,
        "variables": {**variables, "tools": None, "documents": None},
        "cases": [
            {
                "messages": [{"role": role, "content": text} for role, text in messages],
                "add_generation_prompt": generate,
            }
            for messages, generate in cases
        ],
    }
    nothing: list[str | None] = [None] * len(cases)
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(PROBE)],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=_PROBE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return nothing
    if done.returncode or len(done.stdout) > _MAX_ANSWER_BYTES:
        return nothing
    texts: list[str | None] = json.loads(done.stdout)
    return texts


def _stops(parts: ChatParts, special: frozenset[str]) -> tuple[str, ...]:
    """Control tokens that end an answer or begin a turn, in this order: no answer goes on behind one."""
    texts = (parts.assistant[1], parts.user[0], parts.assistant[0], *(parts.system or ()))
    found = [token for text in texts for token in sorted(special, key=text.find) if token in text]
    return tuple(token for token in dict.fromkeys(found) if token != parts.begin and '"' not in token)


def _remarks(parts: ChatParts, adds_begin: bool) -> list[str]:
    notes = []
    if parts.system is None:
        notes.append("the chat template takes no system message: Ollama will leave one out")
    if adds_begin and not parts.begin:
        notes.append("the tokenizer begins every prompt with its mark, which the chat template does not")
    return notes
