"""A training that can stop between any two updates and go on in another process: what it consists of, as one file.

    trained parameters · optimiser state · schedule · random states · what was measured so far

What always holds:
- a checkpoint is taken between updates, also in the middle of a step: a step changes nothing but its own gradients
  until its update, so the step is simply done again;
- on the CPU with the same threads, a training that was stopped any number of times gives the same bits as one that was
  not; on a GPU it is as repeatable as the device is;
- the file is replaced as a whole and is on the disk when `save` returns; it is a strict safetensors file with JSON
  beside it, never a pickle;
- a checkpoint of another training, or a damaged one, is refused, not guessed at.

torch is handed in, so the agent can import this room without it. It knows no process and no lease.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, ValidationError

from rankup.durable import sync_folder
from rankup.errors import FatalError, InputError, IntegrityError
from rankup.message import Digest, Message
from rankup.recipe import Precision
from rankup.tensorfile import TensorFile, write_tensor_file
from worker.progress import Progress

FORMAT = "rankup.checkpoint/1"
MAX_META_BYTES = 8 * 1024**2
_DTYPES = {"F32": "float32", "F64": "float64", "BF16": "bfloat16", "F16": "float16", "I64": "int64", "U8": "uint8"}
_WAIT_FOR_UPDATE_S = 2.0


class CheckpointError(FatalError):
    """The checkpoint is damaged or belongs to another training."""

    code = "checkpoint"
    default_remedy = "Nothing to do: the training starts anew."


class _Meta(Message):
    """The JSON beside the tensors."""

    format: str
    training: Digest
    step: int
    tokens: int
    seconds: float
    training_s: float = 0.0
    energy_j: float | None = None
    precision: Precision = "float32"
    """Of the frozen base."""
    scaler: dict[str, int | float] = Field(default_factory=dict)
    """Of the loss, where it is computed in float16."""
    groups: list[dict[str, Any]]
    """The optimiser's parameter groups."""
    schedule: dict[str, Any]
    python: list[Any]
    numpy: list[Any]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it was read; tensors are torch's, on the CPU."""

    meta: _Meta
    tensors: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Optimiser steps that are done."""
        return self.meta.step

    def restore_progress(self, progress: Progress) -> None:
        """Hand over what was measured."""
        progress.restore(
            self.tensors["losses"].tolist(),
            self.meta.tokens,
            self.meta.seconds,
            grad_norms=self.tensors["grad_norms"].tolist(),
            training_s=self.meta.training_s,
            energy_j=self.meta.energy_j,
        )

    def restore(self, torch: Any, model: Any, optimizer: Any = None, scheduler: Any = None) -> None:
        """Put parameters, optimiser and schedule back. Raises `CheckpointError` when the model trains others."""
        trained = _trained(model)
        stored = {name.removeprefix("parameter."): t for name, t in self.tensors.items() if name.startswith("param")}
        if trained.keys() != stored.keys() or any(trained[name].shape != stored[name].shape for name in trained):
            raise CheckpointError("the checkpoint holds other parameters than those that are trained")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(stored[name])
        if optimizer is not None:
            state: dict[int, dict[str, Any]] = {}
            for name, tensor in self.tensors.items():
                kind, _, rest = name.partition(".")
                if kind == "optimiser":
                    number, _, key = rest.partition(".")
                    state.setdefault(int(number), {})[key] = tensor
            optimizer.load_state_dict({"state": state, "param_groups": self.meta.groups})
            scaler = getattr(optimizer, "scaler", None)
            if scaler is not None and self.meta.scaler:
                scaler.load_state_dict(self.meta.scaler)
        if scheduler is not None:
            scheduler.load_state_dict(dict(self.meta.schedule))

    def restore_random(self, torch: Any) -> None:
        """Put the states of python's, numpy's and torch's generators back."""
        version, words, gauss = self.meta.python
        random.setstate((version, tuple(words), gauss))
        name, keys, position, has_gauss, cached = self.meta.numpy
        np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
        torch.set_rng_state(self.tensors["random.cpu"])
        if "random.cuda" in self.tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.tensors["random.cuda"])


def read_checkpoint(torch: Any, path: Path, training: str) -> Checkpoint | None:
    """The checkpoint at `path`, or None where there is none. Raises `CheckpointError`."""
    _side(path).unlink(missing_ok=True)
    if not path.exists():
        return None
    try:
        with TensorFile.open(path) as file:
            meta = _read_meta(file, path)
            if meta.format != FORMAT or meta.training != training:
                raise CheckpointError(f"{path} belongs to another training")
            tensors = {}
            for name in file:
                extent = file.entries[name]
                dtype = getattr(torch, _DTYPES[extent.dtype])
                flat = torch.frombuffer(bytearray(file.read(name)), dtype=torch.uint8).view(dtype)
                tensors[name] = flat.reshape(extent.shape)
    except (OSError, InputError, IntegrityError, ValidationError, KeyError, RuntimeError) as exc:
        raise CheckpointError(f"{path} cannot be used: {exc}") from exc
    del tensors["meta"]
    return Checkpoint(meta, tensors)


def checkpoint_progress(path: Path) -> tuple[int, float]:
    """Steps and seconds of training in the checkpoint at `path`, without torch; zeros where there is none to use."""
    try:
        with TensorFile.open(path) as file:
            meta = _read_meta(file, path)
    except (OSError, InputError, IntegrityError, ValidationError, KeyError, CheckpointError):
        return 0, 0.0
    return meta.step, meta.seconds


def _read_meta(file: TensorFile, path: Path) -> _Meta:
    described = file.entries["meta"]
    if described.stop - described.start > MAX_META_BYTES:
        raise CheckpointError(f"{path} has a description of {described.stop - described.start} bytes")
    return _Meta.model_validate_json(file.read("meta"))


@dataclass(frozen=True)
class _Moment:
    """What belongs to the end of an update and moves on during the next step."""

    step: int
    tokens: int
    python: list[Any]
    numpy: list[Any]
    states: Mapping[str, Any]
    """Random states of torch."""


class Keeper:
    """Takes the checkpoints of one training. The training calls it around each update; `save` may come any time."""

    def __init__(
        self,
        torch: Any,
        path: Path,
        training: str,
        progress: Progress,
        *,
        every_s: float,
        precision: Precision = "float32",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._torch = torch
        self._path = path
        self._training = training
        self._progress = progress
        self._every_s = every_s
        self._precision: Precision = precision
        self._clock = clock
        self._saved_at = clock()
        self._updating = threading.Lock()
        self._parts: tuple[Any, Any, Any] | None = None
        self._at: _Moment | None = None

    def attach(self, model: Any, optimizer: Any, scheduler: Any) -> None:
        """What the checkpoints are taken of."""
        # The parameters themselves: a forward pass may put others in their places for a while.
        self._parts = (_trained(model), optimizer, scheduler)
        if self._progress.losses:
            self._note()

    def before_update(self) -> None:
        """The update begins: no checkpoint until `after_update`."""
        self._updating.acquire()

    def after_update(self) -> None:
        """The step is counted. Writes a checkpoint when the last one is older than `every_s`.

        One that cannot be written is told in the log: training goes on, only a crash would now cost more.
        """
        self._note()
        self._updating.release()
        if self._clock() - self._saved_at >= self._every_s:
            try:
                self.save()
            except OSError as exc:
                self._saved_at = self._clock()
                sys.stderr.write(f"no checkpoint could be written: {exc}\n")

    def save(self) -> int:
        """Write a checkpoint and return its step; 0 when there is nothing to keep. Never waits long for an update.

        An update that does not end leaves the checkpoint before it, whose step is not known here: 0 too.
        """
        if self._parts is None or not self._updating.acquire(timeout=_WAIT_FOR_UPDATE_S):
            return 0
        try:
            if self._at is None:
                return 0
            self._write(*self._parts, self._at)
            self._saved_at = self._clock()
            return self._at.step
        finally:
            self._updating.release()

    def _note(self) -> None:
        torch = self._torch
        version, words, gauss = random.getstate()
        name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        states = {"random.cpu": torch.get_rng_state()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            states["random.cuda"] = torch.cuda.get_rng_state()
        self._at = _Moment(
            step=len(self._progress.losses),
            tokens=self._progress.tokens,
            python=[version, list(words), gauss],
            numpy=[name, np.asarray(keys).tolist(), position, has_gauss, cached],
            states=states,
        )

    def _write(self, trained: Mapping[str, Any], optimizer: Any, scheduler: Any, at: _Moment) -> None:
        torch = self._torch
        state = optimizer.state_dict()
        tensors = {f"parameter.{name}": parameter for name, parameter in trained.items()}
        for number, entry in state["state"].items():
            tensors |= {f"optimiser.{number}.{key}": torch.as_tensor(value) for key, value in entry.items()}
        tensors["losses"] = torch.tensor(self._progress.losses[: at.step], dtype=torch.float64)
        tensors["grad_norms"] = torch.tensor(self._progress.grad_norms[: at.step], dtype=torch.float64)
        scaler = getattr(optimizer, "scaler", None)
        meta = _Meta(
            format=FORMAT,
            training=self._training,
            step=at.step,
            tokens=at.tokens,
            seconds=self._progress.seconds(),
            training_s=self._progress.training_s,
            energy_j=self._progress.energy_j(),
            precision=self._precision,
            scaler=scaler.state_dict() if scaler is not None else {},
            groups=state["param_groups"],
            schedule=scheduler.state_dict(),
            python=at.python,
            numpy=at.numpy,
        )
        text = meta.model_dump_json().encode()
        content = {name: _raw(torch, tensor) for name, tensor in {**tensors, **at.states}.items()}
        fresh = _side(self._path)
        try:
            with fresh.open("wb") as file:
                write_tensor_file(file, content | {"meta": ("U8", (len(text),), text)})
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self._path)
        finally:
            fresh.unlink(missing_ok=True)
        sync_folder(self._path.parent)


def _side(path: Path) -> Path:
    return path.with_name(path.name + ".fresh")


def _trained(model: Any) -> dict[str, Any]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _raw(torch: Any, tensor: Any) -> tuple[str, tuple[int, ...], bytes]:
    here = tensor.detach().cpu().contiguous()
    name = next(name for name, dtype in _DTYPES.items() if getattr(torch, dtype) is here.dtype)
    flat = here.reshape(-1).view(torch.uint8) if here.numel() else torch.empty(0, dtype=torch.uint8)
    return name, tuple(here.shape), flat.numpy().tobytes()
