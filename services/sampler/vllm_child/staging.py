"""Weights on their way to vLLM: a folder of the engine's own, in memory where there is room, else on disk."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from services.runtime.errors import StorageError
from services.runtime.files import LOCK_NAME, locked_directory, storage_errors
from services.wire.delta import BitTensor, Weights, write_weights

_MEMORY = Path("/dev/shm")
_PREFIX = "heterorl-vllm-"
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
_WEIGHT_INDEX = ".index.json"


class Staging:
    """`parent`: where the folder is made; None takes /dev/shm where twice the weights fit, else `fallback`.

    `as_in_files` gives whole blocks the names that vLLM knows: those of published checkpoints.
    """

    def __init__(
        self, parent: Path | None, fallback: Path, weight_bytes: int, as_in_files: Callable[[Weights], Weights]
    ) -> None:
        self._as_in_files = as_in_files
        place = parent or (_MEMORY if _free_bytes(_MEMORY) > 2 * weight_bytes else fallback)
        with storage_errors(f"make a folder for weights in {place}"):
            place.mkdir(parents=True, exist_ok=True)
            _remove_orphans(place)
            self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        self._lock = ExitStack()
        self._lock.enter_context(locked_directory(self.folder))

    def model_dir(self, source: Path, weights: Weights) -> Path:
        """A Hugging Face folder: config and tokenizer of `source`, these weights. Raises StorageError."""
        folder = self.folder / "model"
        with storage_errors(f"write {folder}"):
            folder.mkdir(exist_ok=True)
            for file in source.iterdir():
                link = folder / file.name
                if file.suffix not in _WEIGHT_SUFFIXES and not file.name.endswith(_WEIGHT_INDEX) and not link.exists():
                    link.symlink_to(file.absolute())
        write_weights(self._as_in_files(weights), self._model_weights)
        return folder

    def drop_model_weights(self) -> None:
        """vLLM has its own copy once it is ready."""
        self._model_weights.unlink(missing_ok=True)

    def update(self, tensors: Weights) -> Path:
        """A file with these tensors, of whole blocks; the one before is no longer there. Raises StorageError."""
        path = self.folder / "update.safetensors"
        write_weights(self._as_in_files(tensors), path)
        return path

    def drop_update(self) -> None:
        (self.folder / "update.safetensors").unlink(missing_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    @property
    def _model_weights(self) -> Path:
        return self.folder / "model" / "model.safetensors"


def touched(held: Weights, new: Weights) -> dict[str, BitTensor]:
    """The tensors of `new` whose group differs from `held` in any bit.

    A group is a whole block (`model.layers.3`), because vLLM fuses tensors within a block (q, k and v; gate and up;
    experts), and a part of a fused tensor would silently spoil its other parts.
    """
    differing = {_group(name) for name, tensor in new.items() if not _same(held.get(name), tensor)}
    return {name: tensor for name, tensor in new.items() if _group(name) in differing}


def weight_bytes(weights: Mapping[str, BitTensor]) -> int:
    return sum(tensor.nbytes for tensor in weights.values())


def _remove_orphans(place: Path) -> None:
    """Folders of processes that were killed: their lock is free. Left alone, they would fill the memory."""
    for folder in place.glob(f"{_PREFIX}*"):
        if (folder / LOCK_NAME).exists():
            with suppress(StorageError), locked_directory(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _same(held: BitTensor | None, new: BitTensor) -> bool:
    return held is new or (held is not None and held.same_bits(new))


def _group(name: str) -> str:
    """Up to the block's number; outside of the blocks the module."""
    parts = name.split(".")
    numbers: Iterable[int] = (index for index, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: next(iter(numbers), len(parts) - 2) + 1])


def _free_bytes(folder: Path) -> int:
    """0 where there is no such folder or it cannot be written."""
    if not os.access(folder, os.W_OK):
        return 0
    return shutil.disk_usage(folder).free
