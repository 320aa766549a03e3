"""One measured model of benchmarks/quantized.py in a process of its own: `python quantized_child.py ROLE REQUEST.json`.

Roles: `smollm2` makes the folder in bfloat16, `prepare` the windows of tokens, `torch` measures the folder in
transformers, `llama` a GGUF file in llama.cpp. The last needs llama-cpp-python and numpy only, so that its Python may
be another one. The answer is one JSON object on the last line.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

QUESTIONS = ("What is the capital of France?", "Write one sentence about the sea.")
ANSWER_TOKENS = 64


def smollm2(request: dict[str, Any]) -> dict[str, Any]:
    """SmolLM2 as a folder of sharded bfloat16, like a pulled version."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from aggregator.bases import fetch_base

    to = Path(request["folder"])
    source = fetch_base("smollm2", to.with_name("smollm2-float32")).folder
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(to, max_shard_size="100MB")
    AutoTokenizer.from_pretrained(source).save_pretrained(to)
    return {}


def prepare(request: dict[str, Any]) -> dict[str, Any]:
    """Documents (docstrings of the standard library), their tokens one by one, and windows over all of them."""
    from transformers import AutoTokenizer

    from coordinator.pydocs import rows

    tokenizer = AutoTokenizer.from_pretrained(request["folder"])
    documents = [row["completion"][0]["content"] for row in rows()]
    tokens = [tokenizer.encode(text, add_special_tokens=False) for text in documents]
    flat = [token for part in tokens for token in part]
    length, count = request["tokens"], request["windows"]
    step = max(length, len(flat) // count)
    windows = [flat[start : start + length] for start in range(0, len(flat) - length, step)][:count]
    Path(request["data"]).write_text(json.dumps({"windows": windows, "documents": documents, "tokens": tokens}))
    return {"documents": len(documents), "windows": len(windows), "tokens": length}


def torch_model(request: dict[str, Any]) -> dict[str, Any]:
    """The folder in transformers, with weights and arithmetic of one dtype."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(request["threads"])
    model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype=getattr(torch, request["dtype"])).eval()
    tokenizer = AutoTokenizer.from_pretrained(request["folder"])

    def logits(window: Sequence[int]) -> Any:
        with torch.inference_mode():
            return model(torch.tensor([window])).logits[0].float().numpy()

    def answer(question: str) -> tuple[str, int, float]:
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        started = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(**ids, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        new = out[0][ids["input_ids"].shape[1] :]
        return tokenizer.decode(new, skip_special_tokens=True).strip(), len(new), time.perf_counter() - started

    found = _measure(request, logits, answer, np)
    return found | {"versions": {name: version(name) for name in ("torch", "transformers")}}


def llama_model(request: dict[str, Any]) -> dict[str, Any]:
    """A GGUF file in llama.cpp, through llama-cpp-python, on the processor."""
    import llama_cpp
    import numpy as np

    llama = llama_cpp.Llama(
        model_path=request["gguf"],
        n_ctx=max(1024, request["tokens"]),
        n_batch=request["tokens"],
        n_threads=request["threads"],
        n_threads_batch=request["threads"],
        logits_all=True,
        verbose=False,
    )

    def logits(window: Sequence[int]) -> Any:
        llama.reset()
        llama.eval(list(window))
        return llama.scores[: len(window)]

    def answer(question: str) -> tuple[str, int, float]:
        llama.reset()
        started = time.perf_counter()
        messages = [{"role": "user", "content": question}]
        done: Any = llama.create_chat_completion(
            messages, temperature=0.0, max_tokens=ANSWER_TOKENS, repeat_penalty=1.0
        )
        seconds = time.perf_counter() - started
        return done["choices"][0]["message"]["content"].strip(), done["usage"]["completion_tokens"], seconds

    found = _measure(request, logits, answer, np)
    data = json.loads(Path(request["data"]).read_text())
    same = sum(
        llama.tokenize(text.encode(), add_bos=False, special=False) == tokens
        for text, tokens in zip(data["documents"], data["tokens"], strict=True)
    )
    found |= {"documents_tokenised_alike": same, "documents": len(data["documents"])}
    return found | {"versions": {"llama-cpp-python": version("llama_cpp_python")}}


def _measure(
    request: dict[str, Any],
    logits: Callable[[Sequence[int]], Any],
    answer: Callable[[str], tuple[str, int, float]],
    np: Any,
) -> dict[str, Any]:
    """Perplexity over the windows, agreement with the reference on the next token, speed, answers."""
    windows = json.loads(Path(request["data"]).read_text())["windows"]
    reference = Path(request["reference"])
    known = np.load(reference) if reference.exists() else None
    total, count, seconds = 0.0, 0, 0.0
    best = []
    logits(windows[0])  # what is done once is not counted
    for window in windows:
        started = time.perf_counter()
        rows = np.asarray(logits(window), dtype=np.float32)[:-1]
        seconds += time.perf_counter() - started
        best.append(rows.argmax(axis=1))
        rows = rows - rows.max(axis=1, keepdims=True)
        sums = np.log(np.exp(rows, dtype=np.float64).sum(axis=1))
        total += float((sums - rows[np.arange(len(rows)), window[1:]]).sum())
        count += len(rows)
    found = np.stack(best)
    if known is None:
        np.save(reference, found)
    answer(QUESTIONS[0])
    answers = [answer(question) for question in QUESTIONS]
    return {
        "perplexity": math.exp(total / count),
        "scored": count,
        "agreement": 1.0 if known is None else float((known == found).mean()),
        "read_per_s": len(windows) * len(windows[0]) / seconds,
        "written_per_s": sum(new for _, new, _ in answers) / sum(took for *_, took in answers),
        "answers": [text for text, *_ in answers],
    }


if __name__ == "__main__":
    roles = {"smollm2": smollm2, "prepare": prepare, "torch": torch_model, "llama": llama_model}
    print(json.dumps(roles[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))))
