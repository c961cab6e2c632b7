"""Files that survive a crash, and folders that one process owns."""

import contextlib
import errno
import fcntl
import os
import secrets
import tempfile
from collections.abc import Generator, Iterable
from io import BufferedRandom
from pathlib import Path

from services.runtime.errors import DiskFullError, HeteroRLError, StorageError

LOCK_NAME = ".lock"
_LEFT_OVER = f".*.{'[0-9a-f]' * 16}.tmp"
"""What `atomic_write` was writing when its process was killed."""
_NO_ROOM = {errno.ENOSPC: ": free disk space, or inodes (df -i)", errno.EDQUOT: ": the quota is used up"}


@contextlib.contextmanager
def storage_errors(what: str) -> Generator[None]:
    """Turns OSError inside into StorageError, or its DiskFullError: "cannot WHAT: No space left on device: free disk
    space, or inodes (df -i)"."""
    try:
        yield
    except HeteroRLError:  # some are OSErrors too: a link that broke is no fault of the disk
        raise
    except OSError as error:
        advice = _NO_ROOM.get(error.errno or 0, "")
        kind = DiskFullError if advice else StorageError
        raise kind(f"cannot {what}: {error.strerror or error}{advice}") from error


def refusal_of(directory: Path) -> int:
    """Why nothing can be written there now, as an errno; 0 where a small file can."""
    try:
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(bytes(1 << 16))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def atomic_write(path: Path, data: bytes, mode: int = 0o666) -> None:
    """As atomic_write_blocks, of one block."""
    atomic_write_blocks(path, (data,), mode)


def atomic_write_blocks(
    path: Path, blocks: Iterable[bytes | memoryview], mode: int = 0o666, *, durable: bool = True
) -> None:
    """As `replaced`, of these blocks."""
    with replaced(path, mode, durable=durable) as file:
        file.writelines(blocks)


@contextlib.contextmanager
def replaced(path: Path, mode: int = 0o666, *, durable: bool = True) -> Generator[BufferedRandom]:
    """A new file that takes the place of `path` when the block ends well. Readers see the old content or the new one,
    and after a power loss too. Raises StorageError.

    The content is on disk before its name is (fsync, rename), and the name is when this returns (fsync of the folder).
    Not `durable`: until both are synced the name may stand for anything after a power loss. `mode` is what the
    process's umask leaves of it, as of any file.
    """
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.tmp")
    with storage_errors(f"write {path}"):
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            with os.fdopen(descriptor, "w+b") as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        if durable:
            sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Makes renames and removals in a folder durable. Raises StorageError."""
    with storage_errors(f"sync folder {directory}"):
        _sync(directory)


def sync_file(path: Path) -> None:
    """Makes what was written to a file durable. Raises StorageError."""
    with storage_errors(f"sync {path}"):
        _sync(path)


def sync_files(directory: Path) -> None:
    """Makes a folder of files durable, so that it may be given its name. Raises StorageError."""
    with storage_errors(f"sync folder {directory}"):
        for path in directory.iterdir():
            _sync(path)
        _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked_directory(directory: Path) -> Generator[None]:
    """Makes `directory` and owns it while the block runs. Raises StorageError if another process owns it.

    What somebody who was killed was writing there by `atomic_write` is removed. The kernel frees the lock when the
    process ends, however it ends: no stale lock, no manual step after a crash.
    """
    with storage_errors(f"use folder {directory}"):
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _take(directory, descriptor)
        with storage_errors(f"use folder {directory}"):
            for left_over in directory.glob(_LEFT_OVER):
                left_over.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)


def _take(directory: Path, descriptor: int) -> None:
    with storage_errors(f"lock folder {directory}"):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
            raise StorageError(
                f"folder {directory} is in use by process {owner}: stop that process, or set another folder"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
