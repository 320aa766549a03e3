"""One model's folder to GGUF files: written or converted once, then quantised as often as asked for.

What always holds: every file that is asked for is whole or absent; the 16-bit file that quantising starts from is
removed unless it is what was asked for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from rankup.download import OnProgress
from rankup.errors import SetupError
from rankup.export.ggufconverter import convert_gguf
from rankup.export.ggufmodel import OutType
from rankup.export.ggufsource import ModelFolder
from rankup.export.ggufwriter import GgufFile, write_gguf
from rankup.export.newfile import require_absent
from rankup.export.quantize import find_quantiser, quantise


def export_gguf(
    model: ModelFolder,
    to: Path,
    *,
    out: OutType | None = None,
    kinds: Sequence[str] = (),
    converter: Path | None = None,
    force: bool = False,
    progress: OnProgress | None = None,
) -> list[GgufFile]:
    """Write `to`, or with `kinds` (see `quantize.require_kind`) one quantised file each.

    One kind is written to `to` itself; with several, each file has its kind before the suffix: model-q8_0.gguf.

    Raises:
        InputError, IntegrityError, StateError, DiskFullError, SetupError: as `write_gguf`, `convert_gguf`, `quantise`.
    """

    def write(path: Path, may_replace: bool) -> GgufFile:
        if converter is not None:
            return convert_gguf(model, path, converter, out=out, force=may_replace, progress=progress)
        return write_gguf(model, path, out=out, force=may_replace, progress=progress)

    targets = {kind: name_for(to, kind, alone=len(set(kinds)) == 1) for kind in kinds}
    for target in targets.values() or [to]:
        require_absent(target, force=force)
    if not targets:
        return [write(to, force)]
    quantiser = find_quantiser()
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=f".{to.stem}-", dir=to.parent)
    except OSError as exc:
        raise SetupError(f"cannot write to {to.parent}: {exc}", remedy="Check the folder and its permissions.") from exc
    with scratch as folder:
        source = write(Path(folder) / "source.gguf", False)
        return [
            quantise(source, target, kind, quantiser, force=force, progress=progress)
            for kind, target in targets.items()
        ]


def name_for(to: Path, kind: str, *, alone: bool) -> Path:
    """Where the file of one kind goes."""
    return to if alone else to.with_name(f"{to.stem}-{kind}{to.suffix or '.gguf'}")
