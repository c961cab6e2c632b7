"""The folder of the exported policy: what an export may take the place of, and when there is nothing to do.

No torch here: a start checks the folder before anything heavy is imported, since a run's end is too late to refuse it.
"""

import os
import shutil
import tempfile
from pathlib import Path

from services.runtime.errors import ConfigError
from services.runtime.files import storage_errors

CARD_NAME = "README.md"
MARK = "Trained with HeteroRL."
"""Of every export's model card. What has none is somebody else's, and is never replaced."""


def check_export_folder(directory: Path) -> None:
    """Raises ConfigError where an export to `directory` would replace anything but an earlier export."""
    with storage_errors(f"look into {directory}"):
        if not directory.exists() and not directory.is_symlink():
            return
        if directory.is_dir() and (not any(directory.iterdir()) or MARK in _card(directory)):
            return
    raise ConfigError(f"run.export_dir would replace {directory}, which is no earlier export: name a folder of its own")


def holds_export(directory: Path, root: str) -> bool:
    """Whether the weights of this root are exported there: what was added beside them then stays."""
    return f"`{root}`" in _card(directory) and any(directory.glob("*.safetensors"))


def replace_export(directory: Path, temporary: Path) -> None:
    """`temporary`, beside it, becomes `directory`. Raises ConfigError as `check_export_folder` does, OSError.

    A folder cannot be renamed over one that is not empty: the old one steps aside first.
    """
    check_export_folder(directory)
    if not directory.exists():
        os.rename(temporary, directory)
        return
    aside = new_folder(directory)
    os.rename(directory, aside / "old")
    os.rename(temporary, directory)
    shutil.rmtree(aside)


def new_folder(directory: Path) -> Path:
    """An empty one beside `directory`. Raises OSError."""
    return Path(tempfile.mkdtemp(dir=directory.parent, prefix=_beside(directory)))


def remove_left_over(directory: Path) -> None:
    """What exports to `directory` that were killed left beside it. Raises OSError."""
    prefix = _beside(directory)
    if directory.parent.is_dir():
        for path in directory.parent.iterdir():
            if path.name.startswith(prefix) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)


def _beside(directory: Path) -> str:
    return f".{directory.name}.export-"


def _card(directory: Path) -> str:
    try:
        return (directory / CARD_NAME).read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""
