"""The child process that trains a lease: `python -m worker.trainer JOB.json`, JSON lines out, a delta at the end.

What always holds:
- everything heavy (torch, transformers, peft, trl, datasets) is imported inside functions, so the agent can import this
  room without it, and the child's death gives all memory back;
- the base folder is read with `local_files_only`, `trust_remote_code=False` and safetensors only; nothing is fetched;
- the delta holds exactly the job's targets (`worker.surgery` trains them and nothing else), with the scaling inside B,
  so it is B·A and nothing else; tokens are those that the loss was taken over, counted batch by batch;
- standard output carries only the lines of `worker.job`; what libraries print goes to stderr, which is the log;
- the process ends when the pipe to its standard input is closed, so it never outlives its agent;
- a pause is obeyed by the thread that hears it, whatever step is running: it takes as long as writing the checkpoint.

It knows no server, no lease protocol and no signature.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from rankup.delta import DeltaHeader, write_delta
from rankup.errors import DeltaError, InputError, SetupError
from worker.checkpoint import Checkpoint, CheckpointError, Keeper, read_checkpoint
from worker.exits import exit_code, failed
from worker.job import Finished, Job, Line, Ready, TrainerExit, format_line
from worker.orders import Orders, obey
from worker.progress import NotFiniteError, Progress
from worker.shard import read_rows
from worker.surgery import Adapted, adapt


def micro_batch_of(batch_size: int, wanted: int | None) -> int:
    """The largest divisor of the batch that is at most `wanted` (None: the batch), so batches stay what they are."""
    limit = min(batch_size, wanted or batch_size)
    return next(size for size in range(limit, 0, -1) if batch_size % size == 0)


def choose_device(device: str) -> None:
    """Make exactly one device visible; must run before torch is imported, as torch reads this once."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif device.startswith("cuda:"):
        os.environ["CUDA_VISIBLE_DEVICES"] = device.partition(":")[2]
    elif visible is None or "," in visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = (visible or "0").split(",")[0]


def train(
    job: Job, emit: Callable[[Line], None], *, started: float, scratch: Path, orders: Orders | None = None
) -> None:
    """Run one job, from its checkpoint on where there is one, and write its delta.

    `started`: `time.perf_counter()` at process start; `scratch`: a folder for temporary files. Raises `InputError`
    (shard or base do not fit), `NotFiniteError`, `SetupError` (a device or a library is missing), `DiskFullError`, and
    torch's own out-of-memory error.
    """
    rows = read_rows(job.shard_files)
    torch, transformers, peft = _import_libraries()
    imported = time.perf_counter()
    torch.set_num_threads(job.threads)
    device = _device_name(torch, job.device)
    tokenizer = _load_tokenizer(transformers, job.base_folder, rows[0])
    base = _load_base(transformers, torch, job.base_folder, device)
    adapted = adapt(torch, transformers, peft, base, job)
    progress = Progress(emit, job.steps, started=started)
    orders = orders or Orders(share_percent=job.share_percent)
    checkpoint = _checkpoint(torch, job)
    if checkpoint is not None:
        checkpoint.restore_progress(progress)
    keeper = None
    if job.checkpoint_file is not None:
        digest = job.training_digest()
        keeper = Keeper(torch, job.checkpoint_file, digest, progress, every_s=job.checkpoint_every_s)
        orders.keeper = keeper
    trainer = _make_trainer(adapted, tokenizer, rows, job, device, progress, scratch, checkpoint)
    trainer.add_callback(_pausing(transformers, torch, progress, keeper, checkpoint, orders))
    emit(
        Ready(
            device=device,
            examples=len(trainer.train_dataset),
            import_s=imported - started,
            setup_s=time.perf_counter() - imported,
            step=len(progress.losses),
            pausable=keeper is not None,
        )
    )
    progress.begin()
    if len(progress.losses) < job.steps:
        trainer.train(resume_from_checkpoint=_resume_folder(transformers, scratch, checkpoint, trainer.args))
    elif checkpoint is not None:
        checkpoint.restore(torch, trainer.model)
    if len(progress.losses) != job.steps or progress.tokens < 1:
        raise InputError(f"{len(progress.losses)} of {job.steps} steps ran over {progress.tokens} tokens")
    header = DeltaHeader(model=job.model, round_id=job.round_id, lease_id=job.lease_id, base_manifest=job.base_manifest)
    try:
        ref = write_delta(job.delta_file, header, adapted.factors(job.recipe.mantissa_bits))
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
            seconds=progress.seconds(),
        )
    )


def _checkpoint(torch: Any, job: Job) -> Checkpoint | None:
    """What to go on from; a checkpoint that cannot be used is told in the log and left to be replaced."""
    if job.checkpoint_file is None:
        return None
    try:
        return read_checkpoint(torch, job.checkpoint_file, job.training_digest())
    except CheckpointError as exc:
        sys.stderr.write(f"the training starts anew: {exc}\n")
        return None


def _resume_folder(transformers: Any, scratch: Path, checkpoint: Checkpoint | None, config: Any) -> str | None:
    """A folder from which transformers learns at which step, and so at which example, to go on."""
    if checkpoint is None:
        return None
    folder = scratch / "resume"
    folder.mkdir(parents=True)
    state = transformers.TrainerState(
        global_step=checkpoint.step, max_steps=config.max_steps, train_batch_size=config.per_device_train_batch_size
    )
    state.compute_steps(config, config.max_steps)
    state.save_to_json(str(folder / "trainer_state.json"))
    return str(folder)


def _pausing(
    transformers: Any,
    torch: Any,
    progress: Progress,
    keeper: Keeper | None,
    checkpoint: Checkpoint | None,
    orders: Orders,
) -> Any:
    """The callback that counts steps, restores a checkpoint, keeps new ones, and rests between steps."""

    class Pausing(transformers.TrainerCallback):  # type: ignore[misc]
        step_began = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            parts = kwargs["model"], kwargs["optimizer"], kwargs["lr_scheduler"]
            if checkpoint is not None:
                checkpoint.restore(torch, *parts)
            if keeper is not None:
                keeper.attach(*parts)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if orders.share_percent < 100 and self.step_began:
                took = time.perf_counter() - self.step_began
                time.sleep(took * (100.0 / orders.share_percent - 1.0))
            self.step_began = time.perf_counter()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if keeper is not None:
                keeper.before_update()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                progress.step_done(float(logs["loss"]))
                if keeper is not None:
                    keeper.after_update()

    return Pausing()


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


def _make_trainer(
    adapted: Adapted,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    job: Job,
    device: str,
    progress: Progress,
    scratch: Path,
    checkpoint: Checkpoint | None,
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

        def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            """The folder it is given holds a step only; what was trained comes back when the training begins."""

        def _load_rng_state(self, *args: Any, **kwargs: Any) -> None:
            """Called at the place where no iterator over the examples draws numbers any more."""
            if checkpoint is not None:
                checkpoint.restore_random(torch)

    micro_batch = micro_batch_of(recipe.batch_size, job.micro_batch)

    config = trl.SFTConfig(
        output_dir=str(scratch / "out"),
        max_steps=job.steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=recipe.batch_size // micro_batch,
        learning_rate=recipe.learning_rate,
        warmup_steps=min(recipe.warmup_steps, job.steps),
        lr_scheduler_type=recipe.lr_schedule,
        max_length=recipe.max_tokens,
        max_grad_norm=recipe.max_grad_norm,
        weight_decay=recipe.weight_decay,
        optim="adamw_torch",
        completion_only_loss="prompt" in rows[0],
        seed=job.seed % 2**32,
        data_seed=job.seed % 2**32,
        bf16=adapted.base.dtype == torch.bfloat16,
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
    trainer = CountingTrainer(model=adapted.model, args=config, train_dataset=data, processing_class=tokenizer)
    trainer.remove_callback(transformers.PrinterCallback)
    if len(trainer.train_dataset) == 0:
        raise InputError(
            f"no example of the shard has a token to learn within {recipe.max_tokens} tokens",
            remedy="The organiser should raise the recipe's max_tokens.",
        )
    return trainer


def main(arguments: Sequence[str]) -> int:
    """Run the job in the file `arguments[0]`; returns a `TrainerExit`. Lines go to the original standard output."""
    started = time.perf_counter()
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    one_line = threading.Lock()

    def emit(line: Line) -> None:
        with one_line:
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
        if job.nice:
            os.nice(job.nice)
        orders = Orders(share_percent=job.share_percent)
        with tempfile.TemporaryDirectory(prefix="scratch-", dir=Path(arguments[0]).resolve().parent) as scratch:
            threading.Thread(target=obey, args=(orders, emit, Path(scratch)), daemon=True).start()
            os.environ["HF_HOME"] = scratch
            train(job, emit, started=started, scratch=Path(scratch), orders=orders)
    except Exception as exc:  # noqa: BLE001 - the last line of a process: every failure becomes an exit code and words
        code = exit_code(exc)
        if code is TrainerExit.CRASHED:
            import traceback

            traceback.print_exc()
        emit(failed(exc, code))
        return code
    return TrainerExit.DONE


def _run() -> NoReturn:
    code = main(sys.argv[1:])
    sys.stderr.flush()
    # Interpreter shutdown with torch loaded takes about a second and can hang in a driver; all files are closed.
    os._exit(code)


if __name__ == "__main__":
    _run()
