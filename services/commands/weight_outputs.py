"""Where `heterorl weights` finds updates, and how it writes: all of a delta or checkpoint or nothing, over no input."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path

from services.runtime.errors import BadInputError, InputMissingError, UsageError
from services.runtime.files import atomic_write, storage_errors, sync_directory
from services.wire.delta.files import INDEX_NAME, SINGLE_NAME, SUFFIX, is_update, weight_files

_NUMBERED = re.compile(r"(.+)-\d{5,}-of-\d{5,}\.safetensors", re.DOTALL)
_IN_FOLDER = "delta"
_OTHER_WEIGHTS = (SUFFIX, ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")


def find_parts(path: Path) -> list[Path]:
    """The files of an update: `path` itself, the parts in a folder, or `NAME-00001-of-00003.safetensors` beside the
    missing `NAME.safetensors`. Raises InputMissingError, StorageError."""
    if path.is_file():
        return [path]
    if path.is_dir():
        parts = _numbered(path, _IN_FOLDER) or [file for file in _files(path) if file.name.endswith(SUFFIX)]
    else:
        parts = _numbered(path.parent, path.name.removesuffix(SUFFIX))
    if not parts:
        raise InputMissingError(f"there is no .safetensors file at {path}")
    return parts


def part_paths(path: Path, count: int) -> list[Path]:
    """Where the parts of an update go: one file at `path`, or numbered files beside it or in it."""
    if path.name.endswith(SUFFIX) and count == 1:
        return [path]
    folder, stem = _place_of(path)
    return [folder / f"{stem}-{number:05d}-of-{count:05d}{SUFFIX}" for number in range(1, count + 1)]


def refuse_inputs(outputs: Iterable[Path], inputs: Sequence[Path]) -> None:
    """Raises UsageError where an output would replace what is read."""
    for output in outputs:
        if output.exists() and any(output.samefile(path) for path in inputs):
            raise UsageError(f"{output} is read here: write somewhere else")


def write_parts(out: Path, paths: Sequence[Path], parts: Iterable[bytes]) -> None:
    """The parts of an update at `part_paths`. Those of an earlier one of this name go, once these are all there.

    Raises BadInputError where a file that is no update would be read as a part of this one, StorageError.
    """
    folder, stem = _place_of(out)
    with _folder(folder, make=not out.name.endswith(SUFFIX)):
        stale = _stale(folder, stem, paths)
        with (
            storage_errors(f"write {out}"),
            tempfile.TemporaryDirectory(dir=folder, prefix=f".{stem[:40]}.", suffix=".tmp") as name,
        ):
            staged = [Path(name) / path.name for path in paths]
            for path, part in zip(staged, parts, strict=True):
                atomic_write(path, part)
            for path, final in zip(staged, paths, strict=True):
                path.replace(final)
            for path in stale:
                path.unlink()
        sync_directory(folder)


def write_checkpoint(write: Callable[[Path], None], base: Path, out: Path) -> None:
    """A folder with the weights, which `write` puts into one file, and what BASE has beside its own. OUT may be BASE,
    whose weights go then.

    Raises UsageError where OUT holds another checkpoint, StorageError.
    """
    in_place = base.is_dir() and out.is_dir() and base.samefile(out)
    if not in_place and (out / INDEX_NAME).exists():
        raise UsageError(f"{out} holds another checkpoint, with {INDEX_NAME}: write to a new folder")
    replaced = weight_files(base) if in_place else []
    with _folder(out, make=True):
        with _copied_beside(base, out, really=base.is_dir() and not in_place):
            write(out / SINGLE_NAME)
        with storage_errors(f"remove the old weights of {out}"):
            if in_place:
                (out / INDEX_NAME).unlink(missing_ok=True)
            for path in replaced:
                if path.name != SINGLE_NAME:
                    path.unlink()


def _place_of(out: Path) -> tuple[Path, str]:
    """Folder and first word of numbered parts."""
    return (out.parent, out.name.removesuffix(SUFFIX)) if out.name.endswith(SUFFIX) else (out, _IN_FOLDER)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    with storage_errors(f"read the folder {folder}"):
        return sorted(path for path in folder.iterdir() if path.is_file())


def _numbered(folder: Path, stem: str) -> list[Path]:
    return [path for path in _files(folder) if (match := _NUMBERED.fullmatch(path.name)) and match[1] == stem]


def _stale(folder: Path, stem: str, paths: Sequence[Path]) -> list[Path]:
    """What would be read instead of these parts, or as some of them."""
    found = [path for path in (*_numbered(folder, stem), folder / f"{stem}{SUFFIX}") if path not in paths]
    stale: list[Path] = []
    for path in found:
        if not path.is_file():
            continue
        try:
            if is_update(path):
                stale.append(path)
                continue
        except BadInputError:
            pass  # not even safetensors
        if paths[0].name != f"{stem}{SUFFIX}":
            raise BadInputError(
                f"{path} is no weight update, and would be taken for one: remove it or use another name"
            )
    return stale


@contextlib.contextmanager
def _folder(path: Path, make: bool) -> Generator[None]:
    """`path`, which is removed again where what is done in it fails, and it was not there before."""
    made = make and not path.exists()
    if make:
        with storage_errors(f"make the folder {path}"):
            path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextlib.contextmanager
def _copied_beside(base: Path, out: Path, really: bool) -> Generator[None]:
    """Configuration and tokenizer go with the weights: everything at the top of BASE that is not weights."""
    copied: list[Path] = []
    try:
        with storage_errors(f"copy {base} to {out}"):
            for path in _files(base) if really else ():
                target = out / path.name
                if path.name.endswith(_OTHER_WEIGHTS) or (target.exists() and target.samefile(path)):
                    continue
                if not target.exists():
                    copied.append(target)
                shutil.copy2(path, target)
        yield
    except BaseException:
        for target in copied:
            with contextlib.suppress(OSError):
                os.unlink(target)
        raise
