"""What is around a lease's training: starting, loading, writing the delta, checking it; pausing and going on."""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version

import psutil
from results import Part, Say
from worker_part import LEASE_S, Scale, environment, job_of

from rankup.recipe import Precision
from worker.device import free_memory
from worker.job import PAUSE, Finished, Job, Line, Ready, StepDone, parse_line
from worker.training import check_result

PAUSE_GOAL_S = 5.0
SHARE_GOAL = 0.05


@dataclass
class Child:
    """A trainer, as the agent starts it, and when it said what."""

    process: subprocess.Popen[bytes]
    began: float
    lines: list[tuple[float, Line]] = field(default_factory=list)
    peak_bytes: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def read(self) -> None:
        assert self.process.stdout is not None
        for text in self.process.stdout:
            with self._changed:
                self.lines.append((time.perf_counter() - self.began, parse_line(text)))
                self._changed.notify_all()

    def at(self, kind: type[Line], number: int = 1) -> tuple[float, Line]:
        """The `number`-th line of a kind and when it came, seconds after the start; waited for."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._of(kind)) >= number, timeout=600):
                raise SystemExit(f"the trainer said no {kind.__name__}: {self.lines}")
            return self._of(kind)[number - 1]

    def say(self, order: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(order.encode() + b"\n")
        self.process.stdin.flush()

    def _of(self, kind: type[Line]) -> list[tuple[float, Line]]:
        return [(moment, line) for moment, line in self.lines if isinstance(line, kind)]


@contextmanager
def child_of(job: Job) -> Iterator[Child]:
    """The trainer of a job, until the block ends."""
    file = job.delta_file.with_name("job.json")
    file.write_text(job.model_dump_json())
    with job.delta_file.with_name("log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "worker.trainer", str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment(job),
        )
    child = Child(process, time.perf_counter())
    reader = threading.Thread(target=child.read, daemon=True)
    reader.start()
    try:
        yield child
    finally:
        process.kill()
        process.wait()
        reader.join()


def around(scale: Scale, say: Say) -> Part:
    part = Part("Around the training of a lease")
    short = replace(scale, steps=4)
    table = part.table(
        f"{scale.model}, seconds; a lease takes {LEASE_S:.0f} s of them",
        *("what", "s", "share of a lease"),
    )
    found: dict[str, list[float]] = {}
    for number in range(scale.repeat):
        say(f"a short lease, {number + 1} of {scale.repeat}")
        job = job_of(short, scale.scratch / f"around-{number}")
        with child_of(job) as child:
            _, ready = child.at(Ready)
            last, _ = child.at(StepDone, short.steps)
            done, finished = child.at(Finished)
            child.process.wait()
            gone = time.perf_counter() - child.began
        assert isinstance(ready, Ready)
        assert isinstance(finished, Finished)
        moment = time.perf_counter()
        check_result(job, finished, max_bytes=2**40)
        checked = time.perf_counter() - moment
        parts = {
            "start of the process, imports": ready.import_s,
            "loading base and shard": ready.setup_s,
            "quantising and writing the delta": done - last,
            "end of the process": gone - done,
            "checking the delta again, as admission will": checked,
        }
        for what, seconds in parts.items():
            found.setdefault(what, []).append(seconds)
    medians = {what: statistics.median(values) for what, values in found.items()}
    for what, seconds in medians.items():
        table.row(what, f"{seconds:.2f}", f"{seconds / LEASE_S:.2%}")
    total = sum(medians.values())
    table.row("all of it", f"{total:.2f}", f"{total / LEASE_S:.2%}")
    part.goal(
        f"less than {SHARE_GOAL:.0%} of a lease",
        f"{total / LEASE_S:.2%}",
        met=total / LEASE_S < SHARE_GOAL,
        why="starting takes too long on this machine",
    )
    warm = medians["start of the process, imports"] + medians["loading base and shard"]
    part.notes.append(
        f"A process that stayed between leases would save {warm:.1f} s, {warm / LEASE_S:.2%} of a lease of "
        f"{LEASE_S / 60:.0f} minutes, and keep its memory while nothing is trained."
    )
    part.notes.append(f"Medians of {scale.repeat} leases of {short.steps} steps; files lie in the page cache.")
    part.versions = {name: version(name) for name in ("torch", "transformers", "trl", "peft")}
    return part


def pauses(scale: Scale, say: Say) -> Part:
    part = Part("A pause, and going on")
    table = part.table(
        f"{scale.model}, seconds; the pause is asked for in the middle of a step",
        *(
            "pause",
            "until the process is gone",
            "gave back, MB",
            "of the card, MB",
            "from start to next step",
        ),
    )
    gone: list[float] = []
    precisions: tuple[Precision, ...] = ("bfloat16", "nf4") if scale.device == "cuda" else ("float32",)
    long = replace(scale, steps=4 + 4 * scale.pauses)
    for precision in precisions:
        job = job_of(long, scale.scratch / f"pauses-{precision}", checkpoint_every_s=3600, precision=precision)
        for number in range(scale.pauses + 1):
            say(f"{precision}, pause {number + 1} of {scale.pauses}")
            with child_of(job) as child:
                first, _ = child.at(StepDone)
                if number:
                    table.rows[-1][-1] = f"{first:.2f}"
                if number == scale.pauses:
                    break
                second, _ = child.at(StepDone, 2)
                time.sleep((second - first) / 2)
                memory, card = psutil.Process(child.process.pid).memory_info().rss, free_memory(scale.device)
                asked = time.perf_counter()
                child.say(PAUSE)
                child.process.wait()
                gone.append(time.perf_counter() - asked)
                back = (free_memory(scale.device) or 0) - (card or 0)
            of_card = f"{back / 1e6:.0f}" if scale.device == "cuda" else ""
            table.row(f"{precision}, {number + 1}", f"{gone[-1]:.2f}", f"{memory / 1e6:.0f}", of_card)
        assert job.checkpoint_file is not None
        part.notes.append(
            f"{precision}: the checkpoint has {job.checkpoint_file.stat().st_size / 1e6:.0f} MB: what is trained, and "
            "its AdamW state. Going on starts a process, loads the base, and trains the interrupted step again."
        )
    part.goal(
        f"gone within {PAUSE_GOAL_S:.0f} s",
        f"{max(gone):.2f} s at the longest of {len(gone)}",
        met=max(gone) <= PAUSE_GOAL_S,
        why="writing the checkpoint took too long",
    )
    if scale.device != "cuda":
        part.notes.append(
            "Not measured: the memory of a card, by precision, and the time until it is free; none is here."
        )
    return part
