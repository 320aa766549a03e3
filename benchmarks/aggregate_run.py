"""What all parts of benchmarks/aggregate.py share: shapes, random factors, and child processes that are measured.

What always holds: every measured way has a process of its own with one thread (`THREADS`), so nothing that one way
loads, caches or leaves in memory counts for another. CPU seconds and the peak of the resident set are the kernel's
account of that process (wait4); whoever wants to leave the making of data out takes the time inside.

It imports nothing heavy: the peak of a child is at least that of the process that starts it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

FOLDER: Final = Path(__file__).resolve().parent
if str(FOLDER) in sys.path:  # worker.py beside this file has the name of a package, which must come first.
    sys.path.remove(str(FOLDER))
    sys.path.append(str(FOLDER))
_LIBRARIES: Final = ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "RAYON")
THREADS: Final = {f"{library}_NUM_THREADS": "1" for library in _LIBRARIES}
RSS_UNIT: Final = 1 if sys.platform == "darwin" else 1024
"""Of ru_maxrss."""
SAMPLE_S: Final = 0.02
QUIET: Final = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "FLWR_TELEMETRY_ENABLED": "0"}


@dataclass(frozen=True)
class Model:
    """The linear layers of a Llama-like model, and what its config.json says besides."""

    name: str
    layers: int
    hidden: int
    kv: int
    intermediate: int
    heads: int
    vocabulary: int

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Name of a weight in a layer -> (d_out, d_in)."""
        hidden, kv, wide = self.hidden, self.kv, self.intermediate
        return {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
        }

    @property
    def entries(self) -> int:
        """Of all weights that an adapter changes."""
        return self.layers * sum(d_out * d_in for d_out, d_in in self.linear.values())


SMOLLM2: Final = Model("SmolLM2-135M", 30, 576, 192, 1536, 9, 49152)
TINYLLAMA: Final = Model("TinyLlama-1.1B", 22, 2048, 256, 5632, 32, 32000)
LLAMA_7B: Final = Model("Llama-7B", 32, 4096, 4096, 11008, 32, 32000)
ONE_LAYER: Final = Model("one layer of SmolLM2-135M", 1, 576, 192, 1536, 9, 512)
"""For a quick look."""
MODELS: Final = {model.name: model for model in (SMOLLM2, TINYLLAMA, LLAMA_7B, ONE_LAYER)}


class MissingError(Exception):
    """A way cannot run here: a package is not installed."""


@dataclass(frozen=True)
class Ran:
    answer: dict[str, Any]
    """The JSON object that the process printed last; empty where it printed none."""
    cpu_s: float
    wall_s: float
    peak_bytes: int
    """Largest resident set, pages of mapped files among them."""
    anonymous_bytes: int
    """Largest part of it that is no file's, as seen every 20 ms; 0 where that cannot be seen."""


def run(command: Sequence[str | Path], *, threads: Mapping[str, str] = THREADS) -> Ran:
    """Run one process to its end and measure it. Raises MissingError, RuntimeError (with what it wrote last)."""
    environment = {**os.environ, **QUIET, **threads}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.perf_counter()
        process = subprocess.Popen([str(part) for part in command], env=environment, stdout=out, stderr=err)
        try:
            anonymous, ended = 0, 0
            while not ended:
                ended, status, usage = os.wait4(process.pid, os.WNOHANG)
                if not ended:
                    anonymous = max(anonymous, _anonymous(process.pid))
                    time.sleep(SAMPLE_S)
        except BaseException:
            process.kill()
            process.wait()
            raise
        wall_s = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        lines = out.read().decode(errors="replace").strip().splitlines()
        answer = _last_object(lines)
        if "missing" in answer:
            raise MissingError(answer["missing"])
        if process.returncode:
            tail = "\n".join([*lines, *err.read().decode(errors="replace").splitlines()][-20:])
            raise RuntimeError(f"{' '.join(map(str, command[:3]))} … ended with {process.returncode}:\n{tail}")
    return Ran(answer, usage.ru_utime + usage.ru_stime, wall_s, usage.ru_maxrss * RSS_UNIT, anonymous)


def _anonymous(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def child(script: str, arguments: Mapping[str, Any], *, python: str | Path = sys.executable) -> Ran:
    """Run `main` of a file beside this one in a fresh process, as `serve` there answers."""
    return run([python, FOLDER / script, json.dumps(arguments)])


class Stream:
    """A process that answers line by line; the way's generator reads standard input. Use it in a `with` block."""

    def __init__(self, script: str, arguments: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self.peak_bytes = 0
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._process = subprocess.Popen(
            [sys.executable, FOLDER / script, json.dumps(arguments)],
            env={**os.environ, **QUIET, **THREADS, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def ask(self, question: Any) -> dict[str, Any]:
        """Raises RuntimeError where the process has ended instead."""
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(self._errors.read().decode(errors="replace")[-2000:])
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        status, usage = os.wait4(self._process.pid, 0)[1:]
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self._process.stdout.close()
        self._errors.close()
        self.peak_bytes = usage.ru_maxrss * RSS_UNIT


def serve(way: Callable[..., dict[str, Any]]) -> None:
    """The other end of `child`: call `way` with the arguments and print its answer."""
    try:
        print(json.dumps(way(**json.loads(sys.argv[1]))))
    except ModuleNotFoundError as exc:
        print(json.dumps({"missing": exc.name}))


def _last_object(lines: Sequence[str]) -> dict[str, Any]:
    if not lines or not lines[-1].startswith("{"):
        return {}
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


# -- random factors ----------------------------------------------------------------------------------------------------


def contribution(d_out: int, d_in: int, rank: int, seed: Sequence[int]) -> tuple[Any, Any]:
    """B (d_out, rank) and A (rank, d_in), float32, gaussian, of the sizes that training gives."""
    import numpy as np

    rng = np.random.default_rng(seed)
    b = rng.standard_normal((d_out, rank), dtype=np.float32) * np.float32(1e-3)
    return b, rng.standard_normal((rank, d_in), dtype=np.float32) * np.float32(0.02)


def master(d_out: int, d_in: int, seed: Sequence[int]) -> Any:
    """(d_out, d_in) float32."""
    import numpy as np

    return np.random.default_rng(seed).standard_normal((d_out, d_in), dtype=np.float32) * np.float32(0.02)


def shares(contributions: int, *, equal: bool) -> list[int]:
    """Integer coefficients over 2^16 that add up to it: equal, or as token counts that differ by some per cent."""
    tokens = [1 if equal else 900 + 37 * i % 211 for i in range(contributions)]
    parts = [(count << 16) // sum(tokens) for count in tokens]
    for i in range((1 << 16) - sum(parts)):
        parts[i] += 1
    return parts


# -- the machine -------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the numbers depend on; nothing that names the machine."""
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    flags = fields.get("flags", "").split()
    return {
        "cpu": fields.get("model name") or platform.processor(),
        "cpu_family": fields.get("cpu family", ""),
        "vector": next((name for name in ("avx512f", "avx2", "sse4_2") if name in flags), ""),
        "cores": os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
