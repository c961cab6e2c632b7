"""Writing a safetensors file: what the disk says becomes an error of ours, which the library's own error is not."""

import errno
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from services.runtime.errors import StorageError
from services.runtime.files import storage_errors, sync_file

_NO_ROOM = {f"(os error {code})": code for code in (errno.ENOSPC, errno.EDQUOT)}


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes the file, durably. Raises DiskFullError, StorageError."""
    with storage_errors(f"write {path}"):
        try:
            save_file(dict(tensors), path, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:
            for words, code in _NO_ROOM.items():
                if words in str(error):
                    raise OSError(code, os.strerror(code)) from error
            raise StorageError(f"cannot write {path}: {error}") from error
        sync_file(path)
