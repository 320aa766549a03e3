"""Smaller types of a GGUF file, through llama.cpp in a child process: its program `llama-quantize`, or its library.

Looked for in this order: RANKUP_LLAMA_CPP/build/bin/llama-quantize, `llama-quantize` on the PATH, llama-cpp-python in
the Python that RANKUP_LLAMA_PYTHON names, llama-cpp-python in this Python (the extra `rankup[llama]`).

What always holds: llama.cpp is never loaded into this process; all keys of the source stay, so the quantised file names
the same version; the file appears under its name when it is complete.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from rankup.download import OnProgress, PullProgress
from rankup.errors import InputError, SetupError
from rankup.export.childprocess import run_child
from rankup.export.ggufconverter import CHECKOUT_VARIABLE
from rankup.export.ggufwriter import GgufFile
from rankup.export.newfile import new_file

PYTHON_VARIABLE: Final = "RANKUP_LLAMA_PYTHON"
PROGRAM: Final = "llama-quantize"
CHILD: Final = Path(__file__).with_name("quantizechild.py")

QUANTISATIONS: Final[Mapping[str, int]] = {
    "q2_k": 10,
    "q3_k_s": 11,
    "q3_k_m": 12,
    "q3_k_l": 13,
    "q4_0": 2,
    "q4_1": 3,
    "iq4_nl": 25,
    "iq4_xs": 30,
    "q4_k_s": 14,
    "q4_k_m": 15,
    "q5_0": 8,
    "q5_1": 9,
    "q5_k_s": 16,
    "q5_k_m": 17,
    "q6_k": 18,
    "q8_0": 7,
}
"""llama.cpp's types that need no importance matrix -> their number there (enum llama_ftype), smallest first."""

_REMEDY: Final = (
    f"Run: pip install 'rankup[llama]' (it is compiled), or put {PROGRAM} of llama.cpp on the PATH, "
    f"or name a Python that has llama-cpp-python in {PYTHON_VARIABLE}."
)
_STEP: Final = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")


@dataclass(frozen=True)
class Quantiser:
    """How llama.cpp is reached: a program, or a Python with llama-cpp-python."""

    command: tuple[str, ...]
    is_program: bool

    def arguments(self, source: Path, to: Path, kind: str, threads: int) -> list[str]:
        """The command line for one file."""
        name = kind.upper() if self.is_program else str(QUANTISATIONS[kind])
        return [*self.command, str(source), str(to), name, str(threads)]


def require_kind(kind: str) -> str:
    """`kind` in lower case. Raises InputError where it is no known quantisation."""
    if kind.lower() not in QUANTISATIONS:
        raise InputError(f"there is no quantisation {kind!r} here", remedy=f"Choose from {', '.join(QUANTISATIONS)}.")
    return kind.lower()


def find_quantiser() -> Quantiser:
    """The first quantiser that is there, in the order of the module's docstring.

    Raises:
        SetupError: there is none.
    """
    checkout = os.environ.get(CHECKOUT_VARIABLE)
    built = Path(checkout) / "build" / "bin" / PROGRAM if checkout else None
    if built is not None and built.is_file():
        return Quantiser((str(built),), is_program=True)
    if found := shutil.which(PROGRAM):
        return Quantiser((found,), is_program=True)
    # -P: the child's own folder must not shadow modules that llama-cpp-python imports.
    if python := os.environ.get(PYTHON_VARIABLE):
        return Quantiser((python, "-P", str(CHILD)), is_program=False)
    if importlib.util.find_spec("llama_cpp") is not None:
        return Quantiser((sys.executable, "-P", str(CHILD)), is_program=False)
    raise SetupError("quantising needs llama.cpp, which is not here", remedy=_REMEDY)


def quantise(
    source: GgufFile,
    to: Path,
    kind: str,
    quantiser: Quantiser,
    *,
    force: bool = False,
    threads: int | None = None,
    progress: OnProgress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> GgufFile:
    """Write `source`, a file of 16- or 32-bit weights, as `kind` (a key of `QUANTISATIONS`).

    Raises:
        InputError: llama.cpp refused; its last lines stand in the message.
        StateError, DiskFullError, SetupError: as `write_gguf`.
    """
    started = clock()
    threads = threads or len(os.sched_getaffinity(0))
    steps: list[tuple[int, int]] = [(0, 1)]

    def watch(said: str) -> None:
        steps.extend((int(done), int(total)) for done, total in _STEP.findall(said)[-1:])
        done, total = steps[-1]
        if progress is not None and total:
            progress(PullProgress(kind, source.size_bytes * min(done, total) // total, source.size_bytes))

    with new_file(to, force=force) as fresh:
        command = quantiser.arguments(source.path, fresh, kind, threads)
        run_child(command, PROGRAM, remedy=_REMEDY, watch=watch)
        if not fresh.is_file():
            raise InputError(f"{PROGRAM} ended well, but wrote nothing", remedy=_REMEDY)
    return replace(source, path=to, out=kind, size_bytes=to.stat().st_size, seconds=clock() - started)
