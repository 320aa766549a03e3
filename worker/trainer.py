"""The child process that trains one shard: `python -m worker.trainer JOB.json`, JSON lines out, a delta at the end.

What always holds:
- everything heavy (torch, transformers, peft, trl, datasets) is imported inside functions, so the agent can import this
  room without it, and the child's death gives all memory back;
- the base folder is read with `local_files_only`, `trust_remote_code=False` and safetensors only; nothing is fetched;
- A comes from the job's seed alone (numpy's Philox, one stream a weight), the same on every device and for every
  version of torch; B starts at zero; the scaling is folded into B at the end, so the delta is B·A and nothing else;
- the delta holds exactly the job's targets; tokens are those that the loss was taken over, counted batch by batch;
- standard output carries only the lines of `worker.job`; what libraries print goes to stderr, which is the log;
- the process ends when the pipe to its standard input is closed, so it never outlives its agent.

It knows no server, no lease protocol and no signature.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from rankup.delta import DeltaHeader, write_delta
from rankup.errors import DeltaError, DiskFullError, InputError, RankupError, SetupError
from rankup.fixedpoint import Factors, quantise
from rankup.protocol import Recipe
from worker.disk import is_disk_full
from worker.job import Failed, Finished, Job, Line, Ready, StepDone, TrainerExit, format_line
from worker.shard import read_rows

_SPEED_WINDOW_STEPS = 8


class NotFiniteError(RankupError):
    """The loss or a factor became NaN or infinite: this shard cannot be trained with this recipe."""

    code = "not-finite"
    default_remedy = "Nothing to do here; if it happens to many, the organiser should lower the learning rate."


@dataclass
class Progress:
    """What the training loop measures; one instance a run."""

    emit: Callable[[Line], None]
    steps: int
    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    _recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_SPEED_WINDOW_STEPS + 1))

    def begin(self) -> None:
        """The first step starts now."""
        self._recent.append((time.perf_counter(), 0))

    def step_done(self, loss: float) -> None:
        """Count and report one optimiser step. Raises `NotFiniteError`."""
        if not math.isfinite(loss):
            raise NotFiniteError(f"the loss is {loss} at step {len(self.losses) + 1}")
        self.losses.append(loss)
        self._recent.append((time.perf_counter(), self.tokens))
        (start, before), (now, after) = self._recent[0], self._recent[-1]
        speed = (after - before) / max(now - start, 1e-9)
        self.emit(StepDone(step=len(self.losses), steps=self.steps, loss=loss, tokens=self.tokens, tokens_per_s=speed))

    def ends(self) -> tuple[float, float]:
        """Mean loss over the first and over the last steps: a fifth of all, at least one, at most five."""
        few = max(1, min(5, len(self.losses) // 5))
        return sum(self.losses[:few]) / few, sum(self.losses[-few:]) / few


def initial_a(seed: int, name: str, rank: int, d_in: int) -> npt.NDArray[np.float32]:
    """A of weight `name` before the first step: (rank, d_in) float32, uniform in ±1/sqrt(d_in).

    That is Kaiming-uniform with a = sqrt(5), the LoRA default (arXiv:2106.09685, as in peft), drawn from Philox keyed
    by sha256 of seed and name: no weight's values depend on another's or on any library's global state.
    """
    key = hashlib.sha256(f"rankup.lora_A/1:{seed}:{name}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
    bound = 1.0 / math.sqrt(d_in)
    return ((generator.random((rank, d_in)) * 2.0 - 1.0) * bound).astype(np.float32)


def scaling_of(recipe: Recipe) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732)."""
    return recipe.alpha / (math.sqrt(recipe.rank) if recipe.rslora else recipe.rank)


def choose_device(device: str) -> None:
    """Make exactly one device visible; must run before torch is imported, as torch reads this once."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif device.startswith("cuda:"):
        os.environ["CUDA_VISIBLE_DEVICES"] = device.partition(":")[2]
    elif visible is None or "," in visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = (visible or "0").split(",")[0]


def train(job: Job, emit: Callable[[Line], None], *, started: float, scratch: Path) -> None:
    """Run one job and write its delta.

    `started`: `time.perf_counter()` at process start; `scratch`: a folder for temporary files. Raises `InputError`
    (shard or base do not fit), `NotFiniteError`, `SetupError` (a device or a library is missing), `DiskFullError`, and
    torch's own out-of-memory error.
    """
    rows = read_rows(job.shard_file)
    torch, transformers, peft = _import_libraries()
    imported = time.perf_counter()
    torch.set_num_threads(job.threads)
    device = _device_name(torch, job.device)
    tokenizer = _load_tokenizer(transformers, job.base_folder, rows[0])
    base = _load_base(transformers, torch, job.base_folder, device)
    model = _add_factors(torch, peft, base, job)
    progress = Progress(emit, job.recipe.steps)
    trainer = _make_trainer(model, tokenizer, rows, job, device, progress, scratch)
    emit(
        Ready(
            device=device,
            examples=len(trainer.train_dataset),
            import_s=imported - started,
            setup_s=time.perf_counter() - imported,
        )
    )
    progress.begin()
    trainer.train()
    if len(progress.losses) != job.recipe.steps or progress.tokens < 1:
        raise InputError(f"{len(progress.losses)} of {job.recipe.steps} steps ran over {progress.tokens} tokens")
    header = DeltaHeader(model=job.model, round_id=job.round_id, lease_id=job.lease_id, base_manifest=job.base_manifest)
    try:
        ref = write_delta(job.delta_file, header, _factors(model, job))
    except DeltaError as exc:
        raise NotFiniteError(f"the trained factors cannot be written: {exc}") from exc
    first_loss, last_loss = progress.ends()
    emit(
        Finished(
            path=job.delta_file,
            sha256=ref.sha256,
            size_bytes=ref.size_bytes,
            tokens=progress.tokens,
            steps=len(progress.losses),
            first_loss=first_loss,
            last_loss=last_loss,
            seconds=time.perf_counter() - started,
        )
    )


def _import_libraries() -> tuple[Any, Any, Any]:
    try:
        import peft
        import torch
        import transformers
    except ImportError as exc:
        raise SetupError(
            f"the trainer needs {exc.name}, which is not installed", remedy="Install it: pip install 'rankup[worker]'."
        ) from exc
    transformers.utils.logging.disable_progress_bar()
    return torch, transformers, peft


def _device_name(torch: Any, wanted: str) -> str:
    kind = wanted.partition(":")[0]
    there = {
        "cuda": torch.cuda.is_available,
        "xpu": lambda: hasattr(torch, "xpu") and torch.xpu.is_available(),
        "mps": torch.backends.mps.is_available,
        "cpu": lambda: True,
    }
    if kind == "auto":
        return next(name for name, available in there.items() if available())
    if kind not in there or not there[kind]():
        raise SetupError(
            f"this machine has no {wanted} that torch can use",
            remedy="Choose another --device, or install the torch build for it.",
        )
    return kind


def _load_tokenizer(transformers: Any, folder: Path, row: Mapping[str, Any]) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    conversational = not isinstance(row.get("prompt", row.get("text")), str)
    if conversational and not tokenizer.chat_template:
        raise InputError("the shard holds conversations, but the base's tokenizer has no chat template")
    if tokenizer.eos_token is None:
        raise InputError("the base's tokenizer has no end-of-sequence token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padded places are masked out of attention and loss
    return tokenizer


def _load_base(transformers: Any, torch: Any, folder: Path, device: str) -> Any:
    half = device == "cuda" and torch.cuda.is_bf16_supported()
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.bfloat16 if half else torch.float32,
        )
    except (OSError, ValueError) as exc:
        raise InputError(f"the base version cannot be loaded: {exc}") from exc


def _add_factors(torch: Any, peft: Any, base: Any, job: Job) -> Any:
    """The base with one LoRA pair per target: lora_A from the seed, lora_B zero, both float32 on the CPU."""
    modules = {name: name.removesuffix(".weight") for name in job.targets}
    for name, target in job.targets.items():
        try:
            module = base.get_submodule(modules[name])
        except AttributeError as exc:
            raise InputError(f"the base has no module for the weight {name}") from exc
        if not isinstance(module, torch.nn.Linear) or not name.endswith(".weight"):
            raise InputError(f"{name} is not the weight of a linear layer")
        if tuple(module.weight.shape) != (target.d_out, target.d_in):
            raise InputError(f"{name} is {tuple(module.weight.shape)}, the round says {(target.d_out, target.d_in)}")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=job.recipe.rank,
        lora_alpha=job.recipe.alpha,
        use_rslora=job.recipe.rslora,
        lora_dropout=0.0,
        bias="none",
        target_modules=sorted(modules.values()),
    )
    model = peft.get_peft_model(base, config)
    pairs = _pairs(model)
    if pairs.keys() != job.targets.keys():
        raise InputError(f"peft adapts {sorted(pairs.keys() ^ job.targets.keys())[:3]} otherwise than the round says")
    with torch.no_grad():
        for name, layer in pairs.items():
            rank_by_d_in = initial_a(job.seed, name, job.recipe.rank, job.targets[name].d_in)
            layer.lora_A["default"].weight.copy_(torch.from_numpy(rank_by_d_in))
            layer.lora_B["default"].weight.zero_()
    return model


def _pairs(model: Any) -> dict[str, Any]:
    """Weight name -> its peft layer."""
    inner = model.get_base_model()
    return {f"{name}.weight": module for name, module in inner.named_modules() if hasattr(module, "lora_A")}


def _factors(model: Any, job: Job) -> dict[str, Factors]:
    """The trained pairs in fixed point, scaling folded into B: (d_out, r) and (r, d_in)."""
    found = {}
    scaling = scaling_of(job.recipe)
    for name, layer in _pairs(model).items():
        b = layer.lora_B["default"].weight.detach().float().cpu().numpy().astype(np.float64) * scaling
        a = layer.lora_A["default"].weight.detach().float().cpu().numpy()
        found[name] = quantise(b, a)
    return found


def _make_trainer(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    job: Job,
    device: str,
    progress: Progress,
    scratch: Path,
) -> Any:
    import datasets
    import torch
    import transformers
    import trl

    datasets.disable_caching()
    datasets.disable_progress_bars()
    recipe = job.recipe

    class CountingTrainer(trl.SFTTrainer):  # type: ignore[misc]
        """SFTTrainer that counts the tokens of the loss: labels after the shift by one that are not masked."""

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            progress.tokens += int((inputs["labels"][..., 1:] != -100).sum())
            return super().compute_loss(model, inputs, *args, **kwargs)

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                progress.step_done(float(logs["loss"]))

    config = trl.SFTConfig(
        output_dir=str(scratch / "out"),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        warmup_steps=min(recipe.warmup_steps, recipe.steps),
        lr_scheduler_type=recipe.lr_schedule,
        max_length=recipe.max_tokens,
        max_grad_norm=recipe.max_grad_norm,
        weight_decay=recipe.weight_decay,
        optim="adamw_torch",
        completion_only_loss="prompt" in rows[0],
        seed=job.seed % 2**32,
        data_seed=job.seed % 2**32,
        bf16=next(model.get_base_model().parameters()).dtype == torch.bfloat16,
        gradient_checkpointing=device == "cuda",
        use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda",
        dataset_num_proc=None,
        report_to="none",
        save_strategy="no",
        eval_strategy="no",
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
    )
    data = datasets.Dataset.from_list([dict(row) for row in rows])
    trainer = CountingTrainer(
        model=model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[Watch()]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    if len(trainer.train_dataset) == 0:
        raise InputError(
            f"no example of the shard has a token to learn within {recipe.max_tokens} tokens",
            remedy="The organiser should raise the recipe's max_tokens.",
        )
    return trainer


def _exit_code(error: BaseException) -> TrainerExit:
    if is_disk_full(error) or isinstance(error, DiskFullError):
        return TrainerExit.DISK_FULL
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower() or "can't allocate" in str(error):
        return TrainerExit.OUT_OF_MEMORY
    if isinstance(error, NotFiniteError):
        return TrainerExit.NOT_FINITE
    if isinstance(error, SetupError):
        return TrainerExit.MISSING_EXTRA
    return TrainerExit.BAD_JOB if isinstance(error, InputError) else TrainerExit.CRASHED


def _failed(error: BaseException, code: TrainerExit) -> Failed:
    if isinstance(error, RankupError):
        return Failed(cause=error.cause, remedy=error.remedy)
    if code is TrainerExit.OUT_OF_MEMORY:
        return Failed(
            cause="the training needs more memory than this machine has free",
            remedy="Close other programs, or join with a device that has more memory.",
        )
    if code is TrainerExit.DISK_FULL:
        return Failed(cause="no room left on the disk", remedy=DiskFullError.default_remedy)
    return Failed(cause=f"{type(error).__name__}: {error}"[:2000], remedy="The trainer's log has the details.")


def _end_with_agent() -> None:
    """Leave at once when standard input is closed: the agent is gone, and with it everybody who wants the result."""
    while os.read(0, 4096):
        pass
    os._exit(TrainerExit.CRASHED)


def main(arguments: Sequence[str]) -> int:
    """Run the job in the file `arguments[0]`; returns a `TrainerExit`. Lines go to the original standard output."""
    started = time.perf_counter()
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    threading.Thread(target=_end_with_agent, daemon=True).start()

    def emit(line: Line) -> None:
        lines.write(format_line(line))
        lines.flush()

    try:
        if len(arguments) != 1:
            raise InputError("usage: python -m worker.trainer JOB.json")
        try:
            job = Job.model_validate_json(Path(arguments[0]).read_bytes())
        except (OSError, ValidationError) as exc:
            raise InputError(f"{arguments[0]} is not a job: {exc}") from exc
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        choose_device(job.device)
        with tempfile.TemporaryDirectory(prefix="scratch-", dir=Path(arguments[0]).resolve().parent) as scratch:
            os.environ["HF_HOME"] = scratch
            train(job, emit, started=started, scratch=Path(scratch))
    except Exception as exc:  # noqa: BLE001 - the last line of a process: every failure becomes an exit code and words
        code = _exit_code(exc)
        if code is TrainerExit.CRASHED:
            import traceback

            traceback.print_exc()
        emit(_failed(exc, code))
        return code
    return TrainerExit.DONE


def _run() -> NoReturn:
    code = main(sys.argv[1:])
    sys.stderr.flush()
    # Interpreter shutdown with torch loaded takes about a second and can hang in a driver; all files are closed.
    os._exit(code)


if __name__ == "__main__":
    _run()
