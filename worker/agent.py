"""One run of the worker for one server: what it opens and in which order, and how it ends.

    folder   of this server, locked; journal, outbox, counts of bytes
    governor limits, readings, orders; the socket and the page through which the owner speaks
    loop     `worker.workloop`, until it is done, or told to stop

What always holds: whatever ends a run, no trainer is left when `run` returns, and all that it opened is closed.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from rankup.errors import SetupError
from rankup.message import DisplayName, TeamName
from rankup.settings import WorkerSettings
from worker import device, identity, tracking
from worker.base import PullBase, pull_base
from worker.client import StopRequested
from worker.control import ControlServer, socket_path
from worker.desk import Desk
from worker.disk import full_disk_means_disk_full
from worker.events import PageOpened, Problem, Summary, WorkerEvent
from worker.governor import Governor
from worker.journal import Journal
from worker.outbox import Outbox
from worker.page import PageServer
from worker.readings import Machine, Sense
from worker.status import Board
from worker.tally import Tally
from worker.traffic import Traffic
from worker.training import TRAINER_COMMAND
from worker.workloop import WorkLoop


def run(
    url: str,
    *,
    invite: str = "",
    name: DisplayName | None = None,
    team: TeamName | None = None,
    settings: WorkerSettings,
    max_leases: int | None = None,
    stop: threading.Event,
    report: Callable[[WorkerEvent], None],
    trainer_command: Sequence[str] = TRAINER_COMMAND,
    pull: PullBase = pull_base,
    sense: Sense | None = None,
    keep_lease: Callable[[], bool] = lambda: False,
    verdict_wait_s: float = 60.0,
) -> Summary:
    """Work for the server at `url` until `stop` is set, Ctrl-C, or `max_leases` leases are done.

    `name`: how the leaderboard shows this machine (default: the one of the last time, or made up from its key).
    `team`: whose credit its work adds to (default: the one of the last time, or none). With `max_leases` the last
    verdicts are waited for, at most `verdict_wait_s`. `report` may be called from several threads, never at the same
    time. `sense` reads the machine for the limits (default: this machine).
    `keep_lease`, asked when a stop comes in the middle of a training: whether the lease stays ours, for the next run to
    go on, instead of going back.

    Raises `UnreachableError` (no answer for `patience_s`; the outbox keeps what is done), `DeniedError` (wrong invite,
    or the organiser wants no more work of this machine), `SetupError` (this machine or its version cannot work here),
    `IntegrityError` (publisher key changed), `DiskFullError`, and the error of the third failed lease in a row.
    """
    server = identity.normalise_url(url)
    try:
        tracking.require(settings.report_to)
        with ExitStack() as stack, full_disk_means_disk_full(settings.home):
            folder = identity.open_folder(settings.home, server)
            stack.enter_context(folder.lock())
            journal = Journal(folder.root, report)
            board = Board(server, journal)
            tally = Tally(board)
            outbox = stack.enter_context(Outbox(folder.outbox))
            traffic = Traffic(settings.home)
            graphics = device.profile(settings.device).kind != "cpu"
            governor = stack.enter_context(
                Governor(
                    settings.home,
                    folder.root,
                    traffic,
                    sense or Machine(device.gpu_number(settings.device)),
                    tally,
                    gpu=graphics,
                    dedicated=settings.dedicated,
                )
            )
            desk = Desk(settings.home, stop, governor, board, journal, outbox, traffic)
            try:
                stack.enter_context(ControlServer(socket_path(settings.home, server), desk.obey))
                if settings.page_port != "off":
                    page = stack.enter_context(PageServer(settings.home, settings.page_port, desk.obey, desk.show))
                    tally(PageOpened(page.address))
            except SetupError as exc:
                tally(Problem(exc))  # the work is worth more than being asked about it
            loop = WorkLoop(
                server,
                invite,
                name,
                team,
                settings,
                stop,
                tally,
                folder,
                outbox,
                governor,
                traffic,
                trainer_command,
                pull,
                keep_lease,
            )
            stack.callback(loop.close)
            try:
                loop.work(max_leases)
                if max_leases is not None:
                    loop.await_verdicts(verdict_wait_s)
            except (StopRequested, KeyboardInterrupt):
                stop.set()
            return tally.summary(outbox)
    except (OSError, sqlite3.Error) as exc:
        raise SetupError(
            f"the worker cannot use its folder: {exc}", remedy=f"Check {settings.home} and its permissions."
        ) from exc
