"""`rankup export gguf` and `rankup export ollama`: a pulled version for llama.cpp, Ollama and what builds on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rankup.export.ggufmodel import OutType
    from rankup.export.ggufwriter import GgufFile
    from rankup.pull import PullProgress

app = typer.Typer(
    help="A pulled version in the formats of other programs.", no_args_is_help=True, rich_markup_mode="markdown"
)

FOLDER = typer.Argument(help="Folder of the model: config.json, tokenizer, safetensors, as `rankup pull` writes it.")
TYPE = typer.Option("auto", "--type", help="Type of the weights: auto (16 bits, as they are), bf16, f16 or f32.")
CONVERTER = typer.Option(
    None,
    "--converter",
    help="llama.cpp's convert_hf_to_gguf.py, for models that Rankup cannot write itself. "
    "Default: that of the checkout in RANKUP_LLAMA_CPP, if it is set.",
)
FORCE = typer.Option(False, "--force", help="Replace what is there.")
JSON = typer.Option(False, "--json", help="Print JSON instead of text.")


@app.command("gguf")
def gguf(
    folder: Path = FOLDER,
    out: Path = typer.Option(..., "--out", help="The file to write."),
    quantize: list[str] = typer.Option(
        [],
        "--quantize",
        "-q",
        help="Smaller weights: q8_0, q6_k, q5_k_m, q4_k_m, … through llama.cpp. Several of them: one file each.",
    ),
    kind: str = TYPE,
    converter: Path = CONVERTER,
    force: bool = FORCE,
    as_json: bool = JSON,
) -> None:
    """Write a model as one GGUF file, for llama.cpp and the programs built on it.

    Llama, Mistral, Qwen2 and Qwen3 are written directly, with every bit of the weights; other models through
    llama.cpp's converter. The file says which version it is, if the folder was pulled. Memory stays small.

    **Examples**

    - `rankup export gguf ./model --out model.gguf`
    - `rankup export gguf ./model --out model.gguf --quantize q4_k_m`
    - `rankup export gguf ./model --out model.gguf -q q8_0 -q q4_k_m` writes model-q8_0.gguf and model-q4_k_m.gguf
    - `rankup export gguf ./phi --out phi.gguf --converter ~/llama.cpp/convert_hf_to_gguf.py`
    """
    from rankup.cli.output import print_json

    files = _export(folder, out, kind, quantize, converter, force=force, quiet=as_json)
    if as_json:
        print_json([_described(file) for file in files])
        return
    for file in files:
        _show(file)
    typer.echo(f"  run it    llama-cli -m {files[0].path}")


@app.command("ollama")
def ollama(
    folder: Path = FOLDER,
    to: Path = typer.Option(..., "--to", help="Folder for Modelfile and model.gguf."),
    quantize: str = typer.Option(None, "--quantize", "-q", help="Smaller weights: q8_0, q4_k_m, … through llama.cpp."),
    kind: str = TYPE,
    converter: Path = CONVERTER,
    force: bool = FORCE,
    as_json: bool = JSON,
) -> None:
    """Write a folder that `ollama create` takes: the GGUF file, and a Modelfile with template, stops and licence.

    The template is learned from what the model's own chat template renders. One that cannot be expressed for Ollama is
    left out, and a note says so.

    **Examples**

    - `rankup export ollama ./model --to ./for-ollama --quantize q4_k_m`
    - then: `ollama create my-model -f ./for-ollama/Modelfile && ollama run my-model`
    """
    from rankup.cli.output import print_json
    from rankup.export.ggufsource import open_folder
    from rankup.export.ollama import GGUF_NAME, make_modelfile, require_jinja, require_room, write_modelfile

    require_jinja()
    require_room(to, force=force)
    kinds = [quantize] if quantize else []
    [file] = _export(folder, to / GGUF_NAME, kind, kinds, converter, force=force, quiet=as_json)
    model = open_folder(folder)
    modelfile = make_modelfile(model, file)
    name = folder.resolve().name if model.provenance is None else model.provenance.manifest.model
    path = write_modelfile(to, modelfile)
    if as_json:
        shown = {"path": str(path.resolve()), "template": modelfile.template, "stops": modelfile.stops}
        print_json({"gguf": _described(file), "modelfile": shown, "notes": modelfile.notes})
        return
    _show(file)
    typer.echo(f"  Modelfile {path}: template {'found' if modelfile.template else 'left to Ollama'}")
    for note in modelfile.notes:
        typer.secho(f"note: {note}", fg="yellow", err=True)
    typer.echo(f"  run it    ollama create {name} -f {path} && ollama run {name}")


def _export(
    folder: Path, to: Path, kind: str, kinds: list[str], converter: Path | None, *, force: bool, quiet: bool
) -> list[GgufFile]:
    from rankup.cli.interrupt import interruptible
    from rankup.export.ggufconverter import find_converter
    from rankup.export.ggufexport import export_gguf
    from rankup.export.ggufsource import open_folder
    from rankup.export.quantize import require_kind

    wanted = _out_type(kind)
    quantisations = [require_kind(one) for one in kinds]
    script = find_converter(converter)
    with interruptible(), _progress(f"export {to.name}", quiet=quiet) as draw:
        return export_gguf(
            open_folder(folder), to, out=wanted, kinds=quantisations, converter=script, force=force, progress=draw
        )


def _out_type(kind: str) -> OutType | None:
    from rankup.errors import InputError

    types: dict[str, OutType | None] = {"auto": None, "bf16": "BF16", "f16": "F16", "f32": "F32"}
    if kind.lower() not in types:
        raise InputError(f"{kind!r} is no type of weights", remedy="Choose auto, bf16, f16 or f32.")
    return types[kind.lower()]


@contextmanager
def _progress(title: str, *, quiet: bool) -> Iterator[Callable[[PullProgress], None] | None]:
    from rankup.cli.transfer import transfer_bar

    with transfer_bar(title, quiet=quiet) as draw:
        yield draw


def _described(file: GgufFile) -> dict[str, Any]:
    origin = file.provenance
    return {
        "path": str(file.path.resolve()),
        "type": file.out,
        "architecture": file.architecture,
        "tensors": file.tensors,
        "parameters": file.parameters,
        "bytes": file.size_bytes,
        "model": None if origin is None else origin.manifest.model,
        "version": None if origin is None else origin.manifest.version,
        "manifest": None if origin is None else origin.digest,
        "warnings": file.warnings,
        "seconds": round(file.seconds, 3),
    }


def _show(file: GgufFile) -> None:
    from rankup.cli.output import human_bytes

    for warning in file.warnings:
        typer.secho(f"warning: {warning}", fg="yellow", err=True)
    origin = file.provenance
    what = "" if origin is None else f"{origin.manifest.model} version {origin.manifest.version}, "
    typer.secho(f"{file.path} is complete ({what}{file.out}, {human_bytes(file.size_bytes)})", fg="green")
    typer.echo(f"  tensors   {file.tensors}, {file.parameters:,} parameters, {file.architecture}")
    if origin is not None:
        typer.echo(f"  manifest  sha256:{origin.digest}")
    typer.echo(f"  written   in {file.seconds:.1f} s")
