"""Programs that show a training's numbers to its owner, who asked for it with RANKUP_WORKER_REPORT_TO.

    tensorboard   files under `runs/` of the worker's home, one folder a lease; stays on this machine
    trackio       a database under `runs/trackio`; stays on this machine unless a Space is named in TRACKIO_SPACE_ID
    wandb         the owner's account at wandb.ai or WANDB_BASE_URL; with WANDB_MODE=offline it stays on this machine

What always holds: none is told anything that is not named; a lease is one run under its id in the project `rankup`, and
goes on as the same run, on the same axis of steps, after a pause, which ends the process. transformers speaks to them
(and writes TensorBoard's points as they come); here is only where and under which names. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rankup.errors import SetupError
from rankup.settings import Reporter

PROJECT = "rankup"


def require(reporters: Sequence[Reporter], there: Callable[[str], object | None] = find_spec) -> None:
    """Raise SetupError unless the package of each is installed; none is imported."""
    missing = [reporter for reporter in reporters if there(reporter) is None]
    if missing:
        raise SetupError(
            f"RANKUP_WORKER_REPORT_TO names {' and '.join(missing)}, which is not installed",
            remedy=f"Install it: pip install {' '.join(missing)}; or leave it out.",
        )


def run_folder(home: Path, lease_id: str) -> Path:
    """Where the files of one training lie."""
    return home / "runs" / lease_id


def environment(run: Path, present: Mapping[str, str]) -> dict[str, str]:
    """What tells each of them folder, project and run; the owner's own project and folder of wandb stay."""
    return {
        "TENSORBOARD_LOGGING_DIR": str(run),
        "TRACKIO_DIR": str(run.parent / "trackio"),
        "WANDB_DIR": present.get("WANDB_DIR", str(run)),
        "WANDB_PROJECT": present.get("WANDB_PROJECT", PROJECT),
        "WANDB_RUN_ID": run.name,
        "WANDB_RESUME": "allow",
        "WANDB_DISABLE_CODE": "true",
        "WANDB_DISABLE_GIT": "true",
        "WANDB_LOG_MODEL": "false",
        "WANDB_WATCH": "false",
    }


def arguments(reporters: Sequence[Reporter], run: Path | None) -> dict[str, Any]:
    """Arguments of transformers' trainer."""
    if not reporters or run is None:
        return {"report_to": "none"}
    return {"report_to": list(reporters), "run_name": run.name, "project": PROJECT}
