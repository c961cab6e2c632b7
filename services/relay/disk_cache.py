"""The objects on the relay's disk: bounded by bytes, verified whenever one is opened, never trusted for being there.

DIR/<sha256>        whole; its bytes had this digest when they were kept
DIR/<sha256>.part   on its way from upstream; removed at a start, because its bytes can no longer be judged

Nothing is synced: a file that a power loss damaged is found when it is opened, dropped, and fetched again.
All methods block and may be called from any thread.
"""

import contextlib
import errno
import hashlib
import os
import stat
import tempfile
import threading
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from services.runtime.errors import CorruptObjectError, ExhaustedError, StorageError
from services.runtime.files import storage_errors
from services.runtime.log import get_logger
from services.wire.objects import check_object_id, is_object_id

if TYPE_CHECKING:
    from hashlib import _Hash  # pyright: ignore[reportPrivateUsage] - the type of sha256() has no public name in 3.11

_RETRY_S = 30.0

_log = get_logger("relay.cache")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenObject:
    """A verified object, open for `pread` by whoever asked; it closes the descriptor and then calls `release`."""

    descriptor: int
    size_bytes: int


@dataclass(slots=True, kw_only=True)
class Part:
    """The beginning of an object. One writer at a time."""

    object_id: str
    path: Path
    size_bytes: int = 0
    settled_bytes: int = 0
    """Bytes without the last chunk: what may be handed on before the digest is known."""
    digest: "_Hash" = field(default_factory=hashlib.sha256)


class DiskCache:
    """At most `max_bytes` in `directory`; least recently used first out, held ones never.

    Raises StorageError for a folder that cannot be used: not readable, not writable, or with something else in it.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._parts: dict[str, Part] = {}
        self._too_large: set[str] = set()
        """Objects that turned out to be, so that none of them empties the cache twice."""
        self.damaged = 0
        """Objects that were dropped because their bytes no longer had their digest."""
        self.evicted = 0
        with storage_errors(f"use folder {directory}"):
            directory.mkdir(parents=True, exist_ok=True)
            self._scan()
        with self._lock:
            self._make_room(0)
        with storage_errors(f"write in folder {directory}"), tempfile.TemporaryFile(dir=directory):
            pass  # found now, not when the first sampler asks

    @property
    def used_bytes(self) -> int:
        """Bytes of all objects and parts."""
        with self._lock:
            return sum(self._sizes.values())

    def open(self, object_id: str) -> OpenObject | None:
        """A verified object, held until `release`; None where it is not here, or was damaged and is dropped now.

        Raises BadInputError for anything but an id, StorageError.
        """
        path = self._path(object_id)
        self._hold(object_id)
        try:
            with storage_errors(f"read {path}"):
                opened = self._verified(path)
        except BaseException:
            self.release(object_id)
            raise
        if opened is None:
            self.release(object_id)
        return opened

    def begin(self, object_id: str, size_bytes: int | None = None) -> Part:
        """The part to go on with, or a new one; held until `release`. `size_bytes`: the object's, where it is known.

        Raises ExhaustedError for an object that is larger than the cache, StorageError.
        """
        path = self._path(object_id)
        if object_id in self._too_large or (size_bytes or 0) > self._max_bytes:
            raise self._larger_than_cache(object_id)
        with self._lock:
            self._held[object_id] += 1
            part = self._parts.get(object_id)
            if part is None:
                part = self._parts[object_id] = Part(object_id=object_id, path=path.with_suffix(".part"))
                self._sizes[part.path.name] = 0
        try:
            with storage_errors(f"write {part.path}"):
                self._directory.mkdir(parents=True, exist_ok=True)  # a person may have removed it, to make room
                part.path.touch()
                os.truncate(part.path, part.size_bytes)  # what a failed write left behind
        except BaseException:
            self.release(object_id)
            raise
        return part

    def append(self, part: Part, data: bytes) -> None:
        """Writes the next bytes. Raises ExhaustedError when everything in the cache is held, or the object is larger
        than the cache (its part is dropped then), StorageError."""
        if part.size_bytes + len(data) > self._max_bytes:
            self._too_large.add(part.object_id)
            with storage_errors(f"remove {part.path}"):
                self._drop(part)
            raise self._larger_than_cache(part.object_id)
        with self._lock:
            self._make_room(len(data))
            self._sizes[part.path.name] += len(data)  # before the write: two parts must not take the same room
        try:
            with storage_errors(f"write {part.path}"):
                self._write(part, data)
        except BaseException:
            with self._lock:
                self._sizes[part.path.name] -= len(data)
            raise
        part.digest.update(data)
        part.settled_bytes = part.size_bytes
        part.size_bytes += len(data)

    def keep(self, part: Part) -> None:
        """Makes a complete part an object. Raises CorruptObjectError, with the part removed, for any other bytes."""
        with storage_errors(f"keep {part.path}"):
            if part.digest.hexdigest() != part.object_id:
                self._drop(part)
                raise CorruptObjectError(
                    f"what upstream sent as object {part.object_id[:12]} has another digest: ask the learner"
                )
            part.path.replace(self._path(part.object_id))
        with self._lock:
            del self._parts[part.object_id]
            self._sizes[part.object_id] = self._sizes.pop(part.path.name)

    def release(self, object_id: str) -> None:
        """Ends one hold of `open` or `begin`. A part without a byte is dropped: any name can be asked for."""
        with self._lock:
            self._held[object_id] -= 1
            if self._held[object_id]:
                return
            del self._held[object_id]
            part = self._parts.get(object_id)
            if part is None or part.size_bytes:
                return
            del self._parts[object_id]
            del self._sizes[part.path.name]
            with contextlib.suppress(OSError):  # an empty file, which the next start removes
                part.path.unlink()

    def _path(self, object_id: str) -> Path:
        return self._directory / check_object_id(object_id)

    def _hold(self, object_id: str) -> None:
        with self._lock:
            self._held[object_id] += 1
            if object_id in self._sizes:
                self._sizes.move_to_end(object_id)

    def _verified(self, path: Path) -> OpenObject | None:
        """Hashes the very descriptor that will be read from. Raises OSError."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            with self._lock:
                self._sizes.pop(path.name, None)
            return None
        try:
            with os.fdopen(os.dup(descriptor), "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest == path.name:
                os.utime(path)  # the order of use outlives the process
                return OpenObject(descriptor=descriptor, size_bytes=os.fstat(descriptor).st_size)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        path.unlink(missing_ok=True)
        with self._lock:
            self._sizes.pop(path.name, None)
            self.damaged += 1
        _log.error("object_damaged", object_id=path.name)
        return None

    def _larger_than_cache(self, object_id: str) -> ExhaustedError:
        return ExhaustedError(
            f"object {object_id[:12]} is larger than cache.max_bytes ({self._max_bytes}): "
            "ask the learner; at the relay, raise cache.max_bytes",
            _RETRY_S,
        )

    def _write(self, part: Part, data: bytes) -> None:
        descriptor = os.open(part.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            view, offset = memoryview(data), part.size_bytes
            while view:
                try:
                    written = os.pwrite(descriptor, view, offset)
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._evict_all():
                        raise
                    continue
                view, offset = view[written:], offset + written
        finally:
            os.close(descriptor)

    def _drop(self, part: Part) -> None:
        part.path.unlink(missing_ok=True)
        with self._lock:
            self._parts.pop(part.object_id, None)
            self._sizes.pop(part.path.name, None)

    def _scan(self) -> None:
        found: list[tuple[int, str, int]] = []
        for path in self._directory.iterdir():
            if is_object_id(path.name):
                status = path.stat()
                if not stat.S_ISREG(status.st_mode):
                    raise StorageError(f"cannot use {path}: it is named like an object and is no file: remove it")
                found.append((status.st_mtime_ns, path.name, status.st_size))
            elif path.suffix == ".part":
                path.unlink()
        for _, name, size in sorted(found):
            self._sizes[name] = size

    def _make_room(self, size_bytes: int) -> None:
        """Under the lock. Raises ExhaustedError, with nothing removed, and StorageError."""
        held = sum(size for name, size in self._sizes.items() if self._held[name.removesuffix(".part")])
        if held + size_bytes > self._max_bytes:
            raise ExhaustedError(
                "the relay's cache is full of objects that are being fetched: raise cache.max_bytes", _RETRY_S
            )
        total = sum(self._sizes.values())
        while total + size_bytes > self._max_bytes and (freed := self._evict_one()) is not None:
            total -= freed

    def _evict_all(self) -> bool:
        """The disk is full, whatever our own bound says. Whether anything was removed."""
        with self._lock:
            removed = 0
            while self._evict_one() is not None:
                removed += 1
        if removed:
            _log.warning("disk_full", objects_removed=removed, cache=self._directory)
        return removed > 0

    def _evict_one(self) -> int | None:
        """Under the lock: removes the least recently used that nobody holds, and returns its size; None for none.
        Raises StorageError."""
        for name, size in self._sizes.items():
            object_id = name.removesuffix(".part")
            if not self._held[object_id]:
                with storage_errors(f"remove {self._directory / name}"):
                    (self._directory / name).unlink(missing_ok=True)
                del self._sizes[name]
                if name != object_id:
                    del self._parts[object_id]
                self.evicted += 1
                return size
        return None
