"""The whole state of a learner, published by one rename.

    checkpoints/step-00000040/   masters.safetensors · optimizer.safetensors · state.json (digests of the other two)

No pickle. The newest folder that proves sound is restored; a damaged one is left aside with a line in the log.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from blake3 import blake3
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.learner.policy import Policy
from services.learner.trainer import Trainer
from services.runtime.errors import CorruptObjectError
from services.runtime.failpoints import hit
from services.runtime.files import atomic_write, storage_errors, sync_directory
from services.runtime.log import get_logger

_FORMAT = 1
_MASTERS, _OPTIMIZER, _STATE = "masters.safetensors", "optimizer.safetensors", "state.json"
_RNG = "rng/cpu"

_log = get_logger("learner.checkpoint")


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where the run stands. `data` and `counters` are JSON values of the data side and of the app."""

    step: int
    version: int
    root: str
    trainer_steps: int
    data: Mapping[str, object]
    counters: Mapping[str, object]


class Checkpoints:
    """The folder of checkpoints. All methods block."""

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory = directory
        self._keep = keep
        with storage_errors(f"use folder {directory}"):
            directory.mkdir(parents=True, exist_ok=True)
            for left_over in directory.glob(".step-*"):
                shutil.rmtree(left_over, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps with a checkpoint, newest first, sound or not."""
        return sorted((int(path.name[5:]) for path in self._directory.glob("step-*")), reverse=True)

    def write(self, position: Position, policy: Policy, trainer: Trainer) -> Path:
        """Makes the checkpoint durable, then removes those beyond `keep`. Raises StorageError."""
        final = self._path(position.step)
        with storage_errors(f"write checkpoint {final}"):
            temporary = Path(tempfile.mkdtemp(dir=self._directory, prefix=f".{final.name}."))
            try:
                self._fill(temporary, position, policy, trainer)
                hit("checkpoint.before_rename")
                if final.exists():  # the same step again: after an end without a further step
                    shutil.rmtree(final)
                os.rename(temporary, final)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        sync_directory(self._directory)
        hit("checkpoint.after_rename")
        for step in self.steps()[self._keep :]:
            shutil.rmtree(self._path(step), ignore_errors=True)
        return final

    def restore(self, policy: Policy, trainer: Trainer) -> Position | None:
        """Loads the newest sound checkpoint into policy and trainer; None where there is none.

        Raises CorruptObjectError when there are checkpoints and none is sound: starting anew would lose the run.
        """
        steps = self.steps()
        for step in steps:
            path = self._path(step)
            try:
                return self._load(path, policy, trainer)
            except (CorruptObjectError, OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                _log.error("checkpoint_damaged", path=path, reason=error)
        if steps:
            raise CorruptObjectError(
                f"no checkpoint in {self._directory} is sound: restore one from a backup, or set another run.state_dir"
            )
        return None

    def _fill(self, folder: Path, position: Position, policy: Policy, trainer: Trainer) -> None:
        masters = {name: tensor.detach().cpu().contiguous() for name, tensor in policy.parameters().items()}
        save_file(masters, folder / _MASTERS)
        optimizer = {name: tensor.detach().cpu().contiguous() for name, tensor in trainer.state().items()}
        save_file({**optimizer, _RNG: torch.get_rng_state()}, folder / _OPTIMIZER)
        for name in (_MASTERS, _OPTIMIZER):
            _sync_file(folder / name)
        fields = {name: getattr(position, name) for name in Position.__dataclass_fields__}
        digests = {name: _digest(folder / name) for name in (_MASTERS, _OPTIMIZER)}
        text = json.dumps({"format": _FORMAT, **fields, "digests": digests}, indent=1)
        atomic_write(folder / _STATE, text.encode())

    def _load(self, path: Path, policy: Policy, trainer: Trainer) -> Position:
        fields = cast("dict[str, object]", json.loads((path / _STATE).read_bytes()))
        if fields.pop("format") != _FORMAT:
            raise CorruptObjectError(f"{path} is of another release's format")
        for name, digest in cast("Mapping[str, str]", fields.pop("digests")).items():
            if _digest(path / name) != digest:
                raise CorruptObjectError(f"{path / name} does not have its digest")
        position = Position(**fields)  # pyright: ignore[reportArgumentType] - checked by the digest-bearing writer
        masters = load_file(path / _MASTERS)
        parameters = policy.parameters()
        if masters.keys() != parameters.keys():
            raise CorruptObjectError(f"{path} is of another model")
        optimizer: dict[str, Tensor] = load_file(path / _OPTIMIZER)
        torch.set_rng_state(optimizer.pop(_RNG))
        with torch.no_grad():
            for name, tensor in masters.items():
                parameters[name].copy_(tensor)
        trainer.load_state(optimizer, position.trainer_steps)
        return position

    def _path(self, step: int) -> Path:
        return self._directory / f"step-{step:08d}"


def _digest(path: Path) -> str:
    hasher = blake3()
    with path.open("rb") as file:
        while block := file.read(8 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
