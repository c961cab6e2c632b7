"""What a process leaves on disk that is killed, or whose machine loses power, at any point of a piece of work.

While `watching` a folder it is copied before each operation that makes, renames, removes or syncs something in it: each
copy is the state of a process that is killed there. What was written to a file since it was synced is lost at a power
loss; what was there before the block is taken for synced, and so are SQLite's files, which sync themselves. (Names that
were not synced are kept: journalling file systems do so.)
"""

import os
import shutil
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True, slots=True, kw_only=True)
class CrashState:
    """`promised` is what the work had promised by then."""

    before: str
    promised: int
    killed: Path
    power_lost: Path


@dataclass(slots=True, kw_only=True)
class CrashPoints:
    """`promised` is set by the work: what must be there from now on."""

    folder: Path
    copies: Path
    promised: int = 0
    states: list[CrashState] = field(default_factory=list[CrashState])
    _synced: dict[int, tuple[int, int]] = field(default_factory=dict[int, tuple[int, int]])
    """Size and time of the last write, when a file was synced; by inode."""
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _copying: bool = False

    def reached(self, operation: str, path: Path) -> None:
        """The operation comes next."""
        with self._lock:
            if self._copying or not path.is_relative_to(self.folder) or not self.folder.is_dir():
                return
            self._copying = True
            try:
                killed, lost = self._copies(self.copies / f"{len(self.states):04d}")
            finally:
                self._copying = False
            before = f"{operation} {path.relative_to(self.folder)}"
            self.states.append(CrashState(before=before, promised=self.promised, killed=killed, power_lost=lost))

    def _copies(self, place: Path) -> tuple[Path, Path]:
        """Of the folder. Other threads go on meanwhile: what they remove may be missing."""
        killed, lost = place / "killed" / self.folder.name, place / "lost" / self.folder.name
        for copy in (killed, lost):
            with suppress(shutil.Error):
                shutil.copytree(self.folder, copy)
        for original in self.folder.rglob("*"):
            with suppress(FileNotFoundError):
                if original.is_file() and ".sqlite3" not in original.name:
                    self._lose(lost / original.relative_to(self.folder), original.stat())
        return killed, lost

    def _lose(self, copy: Path, original: os.stat_result) -> None:
        """Back to the bytes that were there when the file was synced, as far as it was only appended to since."""
        size_bytes, written_ns = self._synced.get(original.st_ino, (0, 0))
        if written_ns != original.st_mtime_ns:
            os.truncate(copy, min(size_bytes, original.st_size))

    def synced(self, facts: os.stat_result) -> None:
        with self._lock:
            self._synced[facts.st_ino] = facts.st_size, facts.st_mtime_ns


@contextmanager
def watching(folder: Path, copies: Path) -> Generator[CrashPoints]:
    """The points that the block's work passes in `folder`, of all threads."""
    global _points
    points = CrashPoints(folder=folder, copies=copies)
    for path in folder.rglob("*"):
        points.synced(path.stat())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", _fsync_of(points, os.fsync))
        _install()
        _points = points
        try:
            yield points
        finally:
            _points = None


_points: CrashPoints | None = None
_installed = False


def _install() -> None:
    """An audit hook stays for the life of the process; without points it does nothing."""
    global _installed
    if not _installed:
        sys.addaudithook(_hook)
        _installed = True


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _points is None or not (event in _CHANGES or event == "open"):
        return
    path = arguments[0]
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITES):
        return
    if isinstance(path, str | bytes | os.PathLike):
        within = arguments[-1] if event in ("os.remove", "os.rmdir") else -1
        base = Path(os.readlink(f"/proc/self/fd/{within}")) if isinstance(within, int) and within >= 0 else Path()
        _points.reached(event, base / os.fsdecode(path))


def _fsync_of(points: CrashPoints, fsync: Callable[[int], None]) -> Callable[[int], None]:
    def watched(descriptor: int) -> None:
        points.reached("os.fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        facts = os.fstat(descriptor)
        fsync(descriptor)
        points.synced(facts)

    return watched
