"""The trainer as the agent starts it, on a random Llama of 60 thousand weights; its pure parts without torch."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import save_tiny_llama, write_rows

from rankup.delta import DeltaHeader, DeltaReader, check_structure
from rankup.errors import InputError, SetupError
from rankup.fixedpoint import dequantise
from rankup.recipe import Method, Recipe
from rankup.targets import Target, select_targets
from worker import surgery, trainer
from worker.exits import exit_code, failed
from worker.job import Failed, Finished, Job, Line, Ready, StepDone, TrainerExit, parse_line
from worker.shard import read_rows
from worker.trainer import Progress

ANSWER = "returns a list of the files in the folder, sorted by name"
CONVERSATIONS = [
    {
        "prompt": [{"role": "user", "content": f"What does list{n} do?"}],
        "completion": [{"role": "assistant", "content": f"list{n} {ANSWER}"}],
    }
    for n in range(16)
]
RECIPE = Recipe(rank=4, steps=20, learning_rate=2e-2, batch_size=4, max_tokens=96)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Target]]:
    folder = tmp_path_factory.mktemp("base")
    return folder, select_targets(save_tiny_llama(folder), RECIPE)


def make_job(folder: Path, base: tuple[Path, dict[str, Target]], rows: list[dict[str, Any]], **more: Any) -> Job:
    folder.mkdir(parents=True, exist_ok=True)
    fields: dict[str, Any] = {
        "round_id": "round-1",
        "lease_id": "lease-1",
        "fence": 1,
        "model": "tiny",
        "base_manifest": "ab" * 32,
        "base_folder": base[0],
        "shard_files": (write_rows(folder / "shard.jsonl", rows),),
        "delta_file": folder / "finished.delta",
        "recipe": RECIPE,
        "seed": 2**62 + 3,
        "targets": base[1],
        "device": "cpu",
        "threads": 1,
    }
    return Job(**fields | more)


def train(job: Job) -> tuple[int, list[Line]]:
    """Run the real child process; its standard input stays open until it has ended."""
    job_file = job.delta_file.with_name("job.json")
    job_file.write_text(job.model_dump_json())
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "worker.trainer", str(job_file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert child.stdout is not None
    lines = [parse_line(text) for text in child.stdout]
    return child.wait(), lines


@pytest.mark.slow
@pytest.mark.parametrize("rslora", [False, True], ids=["alpha over r", "rslora"])
def test_twenty_steps_lower_the_loss_and_leave_a_delta_that_is_what_peft_would_merge(
    base: tuple[Path, dict[str, Target]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rslora: bool
) -> None:
    job = make_job(tmp_path, base, CONVERSATIONS, recipe=RECIPE.model_copy(update={"rslora": rslora}))
    kept: list[Any] = []

    def adapt(*arguments: Any) -> Any:
        kept.append(surgery.adapt(*arguments))
        return kept[0]

    monkeypatch.setattr(trainer, "adapt", adapt)
    lines: list[Line] = []
    trainer.train(job, lines.append, started=time.perf_counter(), scratch=tmp_path / "scratch")
    assert isinstance(lines[0], Ready)
    steps = [line for line in lines if isinstance(line, StepDone)]
    assert [line.step for line in steps] == list(range(1, 21))
    result = lines[-1]
    assert isinstance(result, Finished)
    assert result.last_loss < result.first_loss - 0.3
    assert (result.steps, result.tokens) == (20, steps[-1].tokens)
    assert hashlib.sha256(job.delta_file.read_bytes()).hexdigest() == result.sha256
    assert job.delta_file.stat().st_size == result.size_bytes
    header = DeltaHeader(model="tiny", round_id="round-1", lease_id="lease-1", base_manifest="ab" * 32)
    with DeltaReader.open(job.delta_file) as reader:
        check_structure(reader, targets=job.targets, header=header)
        for name in job.targets:
            # What peft's own merge adds.
            layer = kept[0].base.get_submodule(name.removesuffix(".weight"))
            change = layer.get_delta_weight("default").detach().double().numpy()
            b, a = dequantise(reader.factors(name))
            assert np.linalg.norm(b @ a - change) < 1e-3 * np.linalg.norm(change), name


@pytest.mark.slow
def test_two_shards_of_a_lease_give_the_delta_of_one_shard_that_holds_both(
    base: tuple[Path, dict[str, Target]], tmp_path: Path
) -> None:
    one_shard = RECIPE.model_copy(update={"steps": 3, "warmup_steps": 2})
    both = one_shard.model_copy(update={"steps": 6})
    halves = (CONVERSATIONS[:9], CONVERSATIONS[9:])
    files = tuple(write_rows(tmp_path / f"shard-{n}.jsonl", rows) for n, rows in enumerate(halves))
    digests = []
    for name, more in (("apart", {"recipe": one_shard, "shard_files": files}), ("together", {"recipe": both})):
        lines: list[Line] = []
        job = make_job(tmp_path / name, base, CONVERSATIONS, **more)
        trainer.train(job, lines.append, started=time.perf_counter(), scratch=tmp_path / name / "scratch")
        assert isinstance(lines[-1], Finished)
        assert lines[-1].steps == 6
        digests.append(lines[-1].sha256)
    assert digests[0] == digests[1]


@pytest.mark.long
def test_the_same_job_on_one_thread_gives_the_same_delta(base: tuple[Path, dict[str, Target]], tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"steps": 6})
    results = {}
    for name, seed in (("first", 5), ("again", 5), ("other", 6)):
        code, lines = train(make_job(tmp_path / name, base, CONVERSATIONS, recipe=recipe, seed=seed))
        assert code == TrainerExit.DONE
        assert isinstance(lines[-1], Finished)
        results[name] = lines[-1].sha256
        left = sorted(path.name for path in (tmp_path / name).iterdir())
        assert left == ["finished.delta", "job.json", "shard.jsonl"]
    assert results["first"] == results["again"] != results["other"]


ROWS = {
    "text": {"text": "abc"},
    "prompt and completion": {"prompt": "abc", "completion": "def"},
    "messages": {"messages": [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "def"}]},
}
EXPECTED_TOKENS = {
    # "abc</s>": 3 of 4 tokens are predicted, for each of 2 examples
    "text": 2 * 3,
    # only "def</s>" counts
    "prompt and completion": 2 * 4,
    # "<user>abc</s><assistant>def</s>": 6+3+1 + 11+3+1 = 25 tokens, the first one is not predicted
    "messages": 2 * 24,
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", ROWS)
def test_every_row_shape_trains_and_counts_exactly_the_tokens_of_the_loss(
    base: tuple[Path, dict[str, Target]], tmp_path: Path, shape: str
) -> None:
    recipe = RECIPE.model_copy(update={"steps": 1, "batch_size": 2, "warmup_steps": 0})
    code, lines = train(make_job(tmp_path, base, [ROWS[shape]] * 2, recipe=recipe))
    assert code == TrainerExit.DONE
    assert isinstance(lines[-1], Finished)
    assert lines[-1].tokens == EXPECTED_TOKENS[shape]


@pytest.mark.slow
def test_a_base_of_another_shape_is_a_bad_job(base: tuple[Path, dict[str, Target]], tmp_path: Path) -> None:
    wrong = {**base[1], "model.layers.0.self_attn.q_proj.weight": Target(d_out=65, d_in=64, rank=4)}
    code, lines = train(make_job(tmp_path / "shape", base, CONVERSATIONS, targets=wrong))
    assert code == TrainerExit.BAD_JOB
    assert isinstance(lines[-1], Failed)
    assert "the round says (65, 64)" in lines[-1].cause


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), TrainerExit.OUT_OF_MEMORY),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), TrainerExit.OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), TrainerExit.OUT_OF_MEMORY),
        (OSError(errno.ENOSPC, "No space left on device"), TrainerExit.DISK_FULL),
        (trainer.NotFiniteError("the loss is nan"), TrainerExit.NOT_FINITE),
        (InputError("no such module"), TrainerExit.BAD_JOB),
        (SetupError("no torch"), TrainerExit.MISSING_EXTRA),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), TrainerExit.OUT_OF_MEMORY),
        (RuntimeError("CUDA error: unspecified launch failure"), TrainerExit.DEVICE_FAILED),
        (ZeroDivisionError(), TrainerExit.CRASHED),
    ],
)
def test_every_kind_of_failure_has_an_exit_code_and_words(error: Exception, code: TrainerExit) -> None:
    assert exit_code(error) == code
    said = failed(error, code)
    assert said.cause
    assert said.remedy


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_training(loss: float) -> None:
    progress = Progress(lambda line: None, steps=2)
    progress.begin()
    with pytest.raises(trainer.NotFiniteError, match="step 1"):
        progress.step_done(loss)


# -- without torch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("{", "line 1 of the shard is not JSON"),
        ("[]", "not a JSON object"),
        ('{"text": "a"}\n{"chosen": "a", "rejected": "b"}', "line 2 of the shard has"),
        ('{"text": "a"}\n{"messages": []}', "the lines before"),
    ],
)
def test_a_shard_that_cannot_be_used_is_told_by_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "shard.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        read_rows([path])


@pytest.mark.parametrize(
    ("method", "row", "words"),
    [
        ("sft", {"prompt": "p", "chosen": "a", "rejected": "b"}, "the method sft cannot use"),
        ("dpo", {"prompt": "p", "completion": "c", "label": True}, "the method dpo cannot use"),
        ("kto", {"text": "t"}, "the method kto cannot use"),
        ("distillation", {"text": "t"}, "the method distillation cannot use"),
    ],
)
def test_a_shard_of_another_methods_rows_is_refused(
    tmp_path: Path, method: Method, row: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        read_rows([write_rows(tmp_path / "shard.jsonl", [row])], method)


def test_preferences_are_read_whole(tmp_path: Path) -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    labelled = {"prompt": "p", "completion": "c", "label": False}
    assert read_rows([write_rows(tmp_path / "pairs", [pair | {"id": 1}])], "dpo") == [pair]
    assert read_rows([write_rows(tmp_path / "pairs", [pair])], "kto") == [pair]
    assert read_rows([write_rows(tmp_path / "labelled", [labelled])], "kto") == [labelled]


def test_several_shards_give_the_rows_of_one_file_and_faults_are_told_by_shard(tmp_path: Path) -> None:
    first, second, both = (tmp_path / name for name in ("first", "second", "both"))
    first.write_text('{"text": "a"}\n')
    second.write_text('{"text": "b"}\n{"text": "c"}\n')
    both.write_text(first.read_text() + second.read_text())
    assert read_rows([first, second]) == read_rows([both]) == [{"text": "a"}, {"text": "b"}, {"text": "c"}]
    second.write_text("\n{")
    with pytest.raises(InputError, match="line 2 of shard 2 of 2 is not JSON"):
        read_rows([first, second])
    first.write_text('{"text": "a"}')
    second.write_text('{"messages": []}')
    with pytest.raises(InputError, match=r"line 1 of shard 2 of 2 has \['messages'\], the lines before"):
        read_rows([first, second])
    empty = tmp_path / "empty"
    empty.write_text("\n")
    with pytest.raises(InputError, match="all 2 shards are empty"):
        read_rows([empty, empty])


def test_rows_keep_what_trl_knows_and_lines_end_only_at_newlines(tmp_path: Path) -> None:
    path = tmp_path / "shard.jsonl"
    rows = [{"text": "a\u2028b\x85", "source": "x", "tools": "[]"}, {"text": "c"}]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    assert read_rows([path]) == [{"text": "a\u2028b\x85"}, {"text": "c"}]


@pytest.mark.parametrize(("losses", "ends"), [([4.0], (4.0, 4.0)), ([5.0, 4, 3, 2, 1, 1, 1, 1, 1, 0], (4.5, 0.5))])
def test_first_and_last_loss_are_means_over_a_fifth_of_the_steps(
    losses: list[float], ends: tuple[float, float]
) -> None:
    progress = Progress(lambda line: None, steps=len(losses))
    progress.begin()
    for loss in losses:
        progress.step_done(loss)
    assert progress.ends() == ends
