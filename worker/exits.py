"""How the trainer ends: which exit code an error becomes, and which words the volunteer reads.

What always holds: every error has a code and words with a remedy. Libraries are told apart by what their errors say:
the same trouble comes as different types from different devices. Nothing here needs torch.
"""

from __future__ import annotations

from rankup.errors import DiskFullError, InputError, RankupError, SetupError
from worker.disk import is_disk_full
from worker.job import Failed, TrainerExit
from worker.precision import DoesNotFitError
from worker.progress import NotFiniteError

_MEMORY_WORDS = ("out of memory", "can't allocate", "cublas_status_alloc_failed")
_DRIVER_WORDS = ("CUDA error", "CUDA driver error", "cuDNN error", "CUBLAS_STATUS", "HIP error", "XPU error")


def exit_code(error: BaseException) -> TrainerExit:
    """What the agent is told by the process's end."""
    if is_disk_full(error) or isinstance(error, DiskFullError):
        return TrainerExit.DISK_FULL
    if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _MEMORY_WORDS):
        return TrainerExit.OUT_OF_MEMORY
    if isinstance(error, NotFiniteError):
        return TrainerExit.NOT_FINITE
    if isinstance(error, RuntimeError) and any(name in str(error) for name in _DRIVER_WORDS):
        return TrainerExit.DEVICE_FAILED
    if isinstance(error, DoesNotFitError):
        return TrainerExit.DOES_NOT_FIT
    if isinstance(error, SetupError):
        return TrainerExit.MISSING_EXTRA
    return TrainerExit.BAD_JOB if isinstance(error, InputError) else TrainerExit.CRASHED


def failed(error: BaseException, code: TrainerExit) -> Failed:
    """What the volunteer is told."""
    if isinstance(error, RankupError):
        return Failed(cause=error.cause, remedy=error.remedy)
    if code is TrainerExit.OUT_OF_MEMORY:
        return Failed(
            cause="the training needs more memory than this machine has free",
            remedy="Close other programs, or join with a device that has more memory.",
        )
    if code is TrainerExit.DISK_FULL:
        return Failed(cause="no room left on the disk", remedy=DiskFullError.default_remedy)
    if code is TrainerExit.DEVICE_FAILED:
        return Failed(
            cause=f"the device or its driver failed: {error}"[:2000],
            remedy="If it comes again, update the driver, or lower the card's clock or power limit.",
        )
    return Failed(cause=f"{type(error).__name__}: {error}"[:2000], remedy="The trainer's log has the details.")
