"""The child process that trains a lease: `python -m worker.trainer JOB.json`, JSON lines out, a delta at the end.

What always holds:
- everything heavy (torch, transformers, peft, trl, datasets) is imported inside functions, so the agent can import this
  room without it, and the child's death gives all memory back;
- the delta holds exactly the job's targets (`worker.surgery` trains them and nothing else), with the scaling inside B,
  so it is B·A and nothing else;
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from pydantic import ValidationError

from rankup.chat import needs, require_template
from rankup.delta import DeltaHeader, write_delta
from rankup.errors import DeltaError, InputError
from worker.answers import answers_progress
from worker.checkpoint import Keeper
from worker.device import profile
from worker.distillation import taught
from worker.exits import exit_code, failed
from worker.job import Finished, Job, Line, Ready, TrainerExit, format_line
from worker.lesson import Lesson
from worker.loading import (
    choose_device,
    device_name,
    energy_meter,
    hardware_of,
    hide_quantisation,
    import_libraries,
    load_base,
    load_tokenizer,
    shape_of_base,
)
from worker.methods import make_trainer
from worker.orders import Orders, obey
from worker.pausing import checkpoint_of, pausing, resume_folder
from worker.precision import Task, choose
from worker.progress import NotFiniteError, Progress
from worker.shard import read_rows
from worker.surgery import adapt
from worker.tracking import environment


def train(
    job: Job, emit: Callable[[Line], None], *, started: float, scratch: Path, orders: Orders | None = None
) -> None:
    """Run one job, from its checkpoint on where there is one, and write its delta.

    `started`: `time.perf_counter()` at process start; `scratch`: a folder for temporary files. Raises `InputError`
    (shard or base do not fit), `NotFiniteError`, `SetupError` (a device or a library is missing), `DiskFullError`, and
    torch's own out-of-memory error.
    """
    rows = read_rows(job.shard_files, job.recipe.method)
    torch, transformers, peft = import_libraries()
    imported = time.perf_counter()
    torch.set_num_threads(job.threads)
    device = device_name(torch, job.device)
    tokenizer = load_tokenizer(transformers, job.base_folder, rows[0])
    require_template(tokenizer.chat_template, frozenset().union(*map(needs, rows)), whose="the base")
    progress = Progress(emit, job.steps, started=started, meter=energy_meter(torch, device, job.device))
    progress.read_meter()
    orders = orders or Orders(share_percent=job.share_percent)
    checkpoint = checkpoint_of(torch, job)
    if checkpoint is not None:
        checkpoint.restore_progress(progress)
    elif job.recipe.method == "distillation":
        progress.restore((), 0, answers_progress(job.answers_file)[1])
    teacher = None
    if job.recipe.method == "distillation":
        rows, teacher = taught(torch, transformers, job, rows, tokenizer, device, emit, orders)
    fit = choose(
        shape_of_base(job.base_folder),
        Task.of(job.recipe, job.targets),
        hardware_of(torch, device),
        wanted=job.precision,
        begun_in=checkpoint.meta.precision if checkpoint is not None else None,
        micro_batch=job.micro_batch,
    )
    base = load_base(transformers, torch, job.base_folder, device, fit)
    adapted = adapt(torch, transformers, peft, base, job)
    # TRL would round what is trained beside a quantised base to bfloat16, as AdamW's updates should not be.
    base.is_loaded_in_4bit = False
    keeper = None
    if job.checkpoint_file is not None:
        digest = job.training_digest()
        keeper = Keeper(
            torch, job.checkpoint_file, digest, progress, every_s=job.checkpoint_every_s, precision=fit.precision
        )
        orders.keeper = keeper
    if job.report_to and job.report_folder is not None:
        os.environ.update(environment(job.report_folder, os.environ))
    trainer = make_trainer(Lesson(job, adapted, tokenizer, rows, device, progress, scratch, checkpoint, fit, teacher))
    trainer.add_callback(pausing(transformers, torch, progress, keeper, checkpoint, orders))
    emit(
        Ready(
            device=device,
            examples=len(trainer.train_dataset),
            import_s=imported - started,
            setup_s=time.perf_counter() - imported,
            step=len(progress.losses),
            precision=fit.precision,
            micro_batch=fit.micro_batch,
            checkpointing=fit.checkpointing,
            pausable=keeper is not None,
        )
    )
    progress.begin()
    if len(progress.losses) < job.steps:
        trainer.train(resume_from_checkpoint=resume_folder(transformers, scratch, checkpoint, trainer.args))
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
            device=device,
            precision=fit.precision,
            tokens_per_s=progress.tokens_per_s(),
            grad_norm=progress.last_grad_norm(),
            energy_j=progress.energy_j(),
        )
    )


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
        if job.precision != "nf4" and profile(job.device).kind == "cpu":
            hide_quantisation()
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
