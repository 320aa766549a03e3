"""`rankup worker …`: what somebody does who lends a GPU."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

from rankup.cli import control, volunteer_doctor

app = typer.Typer(help="Lend this machine to a community round.", no_args_is_help=True)
control.register(app)
volunteer_doctor.register(app)


@app.command("join")
def join(
    url: str = typer.Argument(help="The server, as the organiser gave it: http://… or https://…"),
    invite: str = typer.Option("", "--invite", help="Invite that the organiser gave you."),
    name: str = typer.Option(None, "--name", help="How you are shown on the leaderboard; default: made up once."),
    team: str = typer.Option(None, "--team", help="Team whose credit your work adds to; kept until you name another."),
    models: list[str] = typer.Option(None, "--model", help="Train this model only; may be given several times."),
    max_leases: int = typer.Option(None, min=1, help="Stop after this many leases; default: go on until Ctrl-C."),
    threads: int = typer.Option(None, min=1, help="CPU threads of the trainer; default: all cores."),
    device: str = typer.Option(None, help="auto, cpu, cuda, cuda:1, mps or xpu."),
    dedicated: bool = typer.Option(
        None, "--dedicated", help="This machine does nothing else: work on batteries and while somebody uses it."
    ),
    check: bool = typer.Option(True, "--doctor/--no-doctor", help="First check this machine and say what it will do."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object per event on stdout."),
) -> None:
    """Join a server and train until Ctrl-C: claims shards, trains them, hands the deltas in.

    First it checks the machine, as `rankup worker doctor URL` does, and says what it found and what it will do; it goes
    on by itself where nothing failed.

    Ctrl-C gives the present shards back; a finished delta is kept and delivered next time. After a SIGTERM, a crash or
    a power cut the next `join` goes on where the training was, if the lease is still valid. `rankup worker limits` says
    when it works; `pause`, `resume`, `finish` and `leave` control it.

    **Examples**

    - `rankup worker join http://127.0.0.1:8420 --invite 4f0c…`
    - `rankup worker join https://rankup.example.org --invite 4f0c… --name ada --team harbour --threads 4`
    - `rankup worker join https://rankup.example.org --model smollm2 --model tiny`
    """
    from rankup.cli.interrupt import interruptible
    from rankup.settings import WorkerSettings
    from worker.agent import run
    from worker.display import open_display
    from worker.machine_probe import require_trainer

    require_trainer()
    options = {"threads": threads, "device": device, "dedicated": dedicated, "models": models or None}
    chosen = {name: value for name, value in options.items() if value is not None}
    settings = WorkerSettings.model_validate(WorkerSettings().model_dump() | chosen)
    if check:
        volunteer_doctor.before_join(settings, url, invite=invite, as_json=as_json)
    with interruptible() as stopped, _noticing_sigterm() as terminated, open_display(as_json=as_json) as report:
        summary = run(
            url,
            invite=invite,
            name=name,
            team=team,
            settings=settings,
            max_leases=max_leases,
            stop=stopped,
            report=report,
            keep_lease=terminated.is_set,
        )
    if not as_json:
        typer.echo(
            f"Handed in: {summary.submitted}, accepted: {summary.accepted}, tokens: {summary.tokens}, "
            f"still in the outbox: {summary.waiting}. Thank you."
        )


@contextmanager
def _noticing_sigterm() -> Iterator[threading.Event]:
    """Set the event on SIGTERM, then do what was done before: a service that is stopped will be started again."""
    terminated = threading.Event()
    before = signal.getsignal(signal.SIGTERM)

    def on_signal(number: int, frame: FrameType | None) -> None:
        terminated.set()
        if callable(before):
            before(number, frame)

    signal.signal(signal.SIGTERM, on_signal)
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, before)
