"""The whole state of a learner, published by one rename.

    checkpoints/step-00000040/   masters.safetensors · optimizer.safetensors · state.json (digests of all three)

No pickle. The newest folder that proves sound is restored; a damaged one is left aside with a line in the log, until
the run that went on from an older one has a checkpoint of its own.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from blake3 import blake3
from safetensors import SafetensorError
from safetensors.torch import load_file

from services.learner.policy import Policy
from services.learner.tensor_file import save_tensors
from services.learner.trainer import Trainer
from services.runtime.errors import ConfigError, CorruptObjectError, StorageError
from services.runtime.failpoints import hit
from services.runtime.files import atomic_write, storage_errors, sync_directory
from services.runtime.log import get_logger

_FORMAT = 1
_MASTERS, _OPTIMIZER, _STATE = "masters.safetensors", "optimizer.safetensors", "state.json"
_RNG = "rng/cpu"
_DIGEST = "digest"
_DAMAGED = (CorruptObjectError, OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)
_INCOMPLETE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""The faults of a file that show a checkpoint to be damaged; others, such as its rights, may be mended."""
_NAME = re.compile(r"step-(\d{8,18})", re.ASCII)

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


_KEYS = {*Position.__dataclass_fields__, "digests"}
"""Of state.json, beside format and digest."""


class Checkpoints:
    """The folder of checkpoints. All methods block."""

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory = directory
        self._keep = keep
        with storage_errors(f"use folder {directory}"):
            directory.mkdir(parents=True, exist_ok=True)
            for left_over in directory.glob(".step-*"):
                shutil.rmtree(left_over, ignore_errors=True)
            for left_over in directory.glob("step-*/.*.tmp"):
                left_over.unlink(missing_ok=True)

    def steps(self) -> list[int]:
        """Steps with a checkpoint, newest first, sound or not. Copies under names of their own are somebody else's.

        Raises StorageError."""
        with storage_errors(f"read {self._directory}"):  # glob takes a folder that it may not read for an empty one
            found = [match for path in self._directory.iterdir() if (match := _NAME.fullmatch(path.name))]
        return sorted((int(match[1]) for match in found), reverse=True)

    def write(self, position: Position, policy: Policy, trainer: Trainer) -> Path:
        """Makes the checkpoint durable, then removes those beyond `keep`, and later ones: they were damaged, or the run
        would have gone on from there, and it has taken those steps anew. Raises StorageError."""
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
        steps = self.steps()
        now = steps.index(position.step)
        for step in (*steps[:now], *steps[now + self._keep :]):
            shutil.rmtree(self._path(step), ignore_errors=True)
        return final

    def write_again(self, position: Position) -> Path:
        """What changed beside policy and optimizer since this step's checkpoint was written or restored. Raises
        StorageError, ValueError or KeyError where somebody has damaged it meanwhile."""
        path = self._path(position.step)
        with storage_errors(f"write checkpoint {path}"):
            written = cast("Mapping[str, object]", json.loads((path / _STATE).read_bytes()))
            _write_state(path, position, cast("Mapping[str, str]", written["digests"]))
        return path

    def restore(self, policy: Policy, trainer: Trainer) -> Position | None:
        """Loads the newest sound checkpoint into policy and trainer; None where there is none.

        Raises CorruptObjectError when there are checkpoints and none is sound: starting anew would lose the run;
        StorageError for one that cannot be read; ConfigError for a sound one of another model or release.
        """
        steps, reason = self.steps(), ""
        for step in steps:
            path = self._path(step)
            try:
                return self._load(path, policy, trainer)
            except ConfigError:
                raise
            except _DAMAGED as error:
                if isinstance(error, OSError) and not isinstance(error, _INCOMPLETE):
                    raise StorageError(
                        f"checkpoint {path} cannot be read ({error.strerror or error}): mend that, or move it away to "
                        "go on from the one before"
                    ) from error
                _log.error("checkpoint_damaged", path=path, reason=error)
                reason = reason or f"{error}"
        if steps:
            raise CorruptObjectError(
                f"no checkpoint in {self._directory} is sound ({reason}): restore one from a backup, or set another "
                "run.state_dir"
            )
        return None

    def _fill(self, folder: Path, position: Position, policy: Policy, trainer: Trainer) -> None:
        masters = {name: tensor.detach().cpu().contiguous() for name, tensor in policy.parameters().items()}
        save_tensors(masters, folder / _MASTERS)
        optimizer = {name: tensor.detach().cpu().contiguous() for name, tensor in trainer.state().items()}
        save_tensors({**optimizer, _RNG: torch.get_rng_state()}, folder / _OPTIMIZER)
        _write_state(folder, position, {name: _digest(folder / name) for name in (_MASTERS, _OPTIMIZER)})

    def _load(self, path: Path, policy: Policy, trainer: Trainer) -> Position:
        fields = cast("dict[str, object]", json.loads((path / _STATE).read_bytes()))
        digest = fields.pop(_DIGEST, None)
        if digest not in (None, _digest_of(fields)):  # None: of a release that wrote none
            raise CorruptObjectError(f"{path / _STATE} does not have its digest")
        if fields.pop("format") != _FORMAT or (digest is not None and fields.keys() != _KEYS):
            # Not a damaged one: the run would go on from the one before it, and its next checkpoint remove this one.
            raise ConfigError(
                f"checkpoint {path} is of another release, and this one cannot read it: start that release, or restore "
                "run.state_dir from a backup made before it ran"
            )
        for name, digest in cast("Mapping[str, str]", fields.pop("digests")).items():
            if _digest(path / name) != digest:
                raise CorruptObjectError(f"{path / name} does not have its digest")
        position = Position(**fields)  # pyright: ignore[reportArgumentType] - checked by the digest-bearing writer
        masters = load_file(path / _MASTERS)
        parameters = policy.parameters()
        if {name: t.shape for name, t in masters.items()} != {name: p.shape for name, p in parameters.items()}:
            raise ConfigError(f"{path} is of another model than policy.path: set that back, or another run.state_dir")
        optimizer = load_file(path / _OPTIMIZER)
        torch.set_rng_state(optimizer.pop(_RNG))
        with torch.no_grad():
            for name, tensor in masters.items():
                parameters[name].copy_(tensor)
        policy.round_buffers()  # a release before wrote them as it had read them
        trainer.load_state(optimizer, position.trainer_steps)
        return position

    def _path(self, step: int) -> Path:
        return self._directory / f"step-{step:08d}"


def _write_state(folder: Path, position: Position, digests: Mapping[str, str]) -> None:
    fields = {name: getattr(position, name) for name in Position.__dataclass_fields__}
    state = cast("dict[str, object]", json.loads(json.dumps({"format": _FORMAT, **fields, "digests": digests})))
    atomic_write(folder / _STATE, json.dumps({**state, _DIGEST: _digest_of(state)}, indent=1).encode())


def _digest(path: Path) -> str:
    hasher = blake3()
    with path.open("rb") as file:
        while block := file.read(8 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def _digest_of(state: Mapping[str, object]) -> str:
    """Of state.json's other keys, however they are laid out."""
    return blake3(json.dumps(state, sort_keys=True).encode()).hexdigest()
