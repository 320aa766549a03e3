"""GGUF through llama.cpp's own converter: for architectures and tokenizers that `ggufwriter` does not know.

What always holds: the converter is one that the user named (`--converter`, or a checkout of llama.cpp in
RANKUP_LLAMA_CPP); it runs as a child process of this Python and is never imported; a pulled folder is verified against
its manifest first, since the file will say which version it is.

The converter has no keys of Rankup's: name, version, base model and, as the description, the manifest's digest are
handed to it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from rankup.checkfiles import verify_files
from rankup.download import OnProgress, PullProgress
from rankup.errors import IntegrityError, NotFoundError
from rankup.export.childprocess import run_child
from rankup.export.ggufmodel import OutType
from rankup.export.ggufsource import ModelFolder, Provenance
from rankup.export.ggufwriter import GgufFile, require_gguf
from rankup.export.newfile import new_file

CHECKOUT_VARIABLE: Final = "RANKUP_LLAMA_CPP"
SCRIPT: Final = "convert_hf_to_gguf.py"


def find_converter(named: Path | None) -> Path | None:
    """The converter that was named, else that of the checkout in RANKUP_LLAMA_CPP, else None.

    Raises:
        NotFoundError: it is named, but not there.
    """
    checkout = os.environ.get(CHECKOUT_VARIABLE)
    path = named or (Path(checkout) / SCRIPT if checkout else None)
    if path is not None and path.is_dir():
        path = path / SCRIPT
    if path is not None and not path.is_file():
        raise NotFoundError(f"there is no {path}", remedy=f"Name {SCRIPT} of a checkout of llama.cpp.")
    return path


def convert_gguf(
    model: ModelFolder,
    to: Path,
    converter: Path,
    *,
    out: OutType | None = None,
    force: bool = False,
    progress: OnProgress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> GgufFile:
    """Let llama.cpp's converter write the model; `out` None lets it choose the 16-bit type that the weights have.

    Raises:
        InputError: the converter failed; its last lines stand in the message.
        IntegrityError: the folder was pulled and is not as its manifest says.
        StateError, DiskFullError, SetupError: as `write_gguf`.
    """
    started = clock()
    require_gguf()
    if model.provenance is not None:
        report = verify_files(model.folder, progress=progress)
        if not report.ok:
            raise IntegrityError(f"{model.folder} differs from its manifest in {report.mismatches[0]}")
    source_bytes = sum(extent.stop - extent.start for extent in model.tensors.values())
    with new_file(to, force=force, size_bytes=source_bytes) as fresh, tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, str(converter), str(model.folder), "--outfile", str(fresh)]
        command += ["--outtype", "auto" if out is None else out.lower()]
        if model.provenance is not None:
            metadata = Path(scratch) / "metadata.json"
            metadata.write_text(json.dumps(_metadata(model.provenance)))
            command += ["--metadata", str(metadata)]

        def watch(_said: str) -> None:
            if progress is not None and fresh.exists():
                progress(PullProgress("converting", min(fresh.stat().st_size, source_bytes), source_bytes))

        remedy = "Its own requirements must be installed in this Python: see requirements/ in llama.cpp."
        run_child(command, converter.name, remedy=remedy, environment={"HF_HUB_OFFLINE": "1"}, watch=watch)
        tensors, parameters, architecture, kind = _read(fresh)
    return GgufFile(
        path=to,
        out=kind,
        architecture=architecture,
        tensors=tensors,
        parameters=parameters,
        size_bytes=to.stat().st_size,
        provenance=model.provenance,
        warnings=(),
        seconds=clock() - started,
    )


def _metadata(provenance: Provenance) -> dict[str, object]:
    manifest = provenance.manifest
    return {
        "general.name": manifest.model,
        "general.version": str(manifest.version),
        "general.base_models": [{"name": manifest.base_model}],
        "general.datasets": [{"name": dataset} for dataset in manifest.datasets] or None,
        "general.license_name": manifest.licence,
        "general.description": f"{manifest.model} version {manifest.version}, manifest sha256:{provenance.digest}",
    }


def _read(path: Path) -> tuple[int, int, str, str]:
    """Tensors, parameters, architecture and type of what the converter wrote."""
    import gguf

    reader = gguf.GGUFReader(path)
    architecture, kind = reader.get_field("general.architecture"), reader.get_field("general.file_type")
    name = "" if kind is None else gguf.LlamaFileType(kind.contents()).name.partition("_")[2].lower()
    parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    return len(reader.tensors), parameters, "" if architecture is None else str(architecture.contents()), name
