"""Content-addressed files under state_dir/objects: written once, verified when opened, collected when not needed.

    objects/ab/ab12…  ◄─ put ── publisher, plans          open ──► weight service (verified, held against collection)

All methods but `reading` block and may be called from any thread.
"""

import asyncio
import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from services.runtime.errors import CorruptObjectError, ObjectGoneError
from services.runtime.files import atomic_write_blocks, storage_errors, sync_directory
from services.runtime.log import get_logger
from services.wire.objects import MAX_CHUNK_BYTES, check_object_id, file_digest, object_ref_of
from services.wire.types import ObjectRef

GRACE_S = 900.0
"""An object that was put or read this recently is not collected: a plan that names it may still be under way."""

_FRESH = 8
"""Of those small objects that were written last the bytes are kept, 8 MiB at most."""

_log = get_logger("learner.objects")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenObject:
    """A verified object, open for `pread`. Close it through the store that opened it."""

    object_id: str
    size_bytes: int
    descriptor: int


class ObjectStore:
    """The learner's objects. `clock` is monotonic seconds."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory = directory
        self._clock = clock
        self._lock = threading.Lock()
        self._held: dict[str, int] = {}
        self._used_s: dict[str, float] = {}
        self._verified: dict[str, tuple[int, int, int]] = {}
        self._new_folders: set[Path] = set()
        """Whose names are not durable yet."""
        self._fresh: deque[tuple[str, bytes]] = deque(maxlen=_FRESH)
        with storage_errors(f"use folder {directory}"):
            directory.mkdir(parents=True, exist_ok=True)
            for left_over in directory.glob("*/.*.tmp"):
                left_over.unlink(missing_ok=True)
        sync_directory(directory)  # folders that a process made which was killed before it could

    def path_of(self, object_id: str) -> Path:
        """Where an object is kept, whether it is there or not. Raises BadInputError for anything but an id."""
        return self._directory / check_object_id(object_id)[:2] / object_id

    def put(self, data: bytes) -> ObjectRef:
        """Stores bytes durably and returns their name. A sound copy that is there already is kept."""
        ref = self.write(data)
        self.sync(ref)
        return ref

    def write(self, data: bytes) -> ObjectRef:
        """As `put`, but durable only after `sync`. If power is lost before that, `open` finds the damage."""
        ref = object_ref_of(data)
        path = self.path_of(ref.object_id)
        self._touch(ref.object_id)
        if not self.is_sound(ref):
            if not path.parent.is_dir():
                self._new_folders.add(path.parent)
                with storage_errors(f"make folder {path.parent}"):
                    path.parent.mkdir(exist_ok=True)
            atomic_write_blocks(path, (data,), durable=False)
            with storage_errors(f"read {path}"):
                self._verified[ref.object_id] = _state(path.stat())  # hashed above: not again for the first reader
        if ref.size_bytes <= MAX_CHUNK_BYTES:
            self._fresh.append((ref.object_id, data))
        return ref

    def fresh(self, object_id: str) -> bytes | None:
        """The bytes of a small object that was written just now: who is sent it unasked need not wait for the disk."""
        return next((data for name, data in tuple(self._fresh) if name == object_id), None)

    def sync(self, ref: ObjectRef) -> None:
        """Makes an object that was written durable. Raises StorageError: then it is not here any more, since the next
        sync would not say again that the disk has lost it."""
        path = self.path_of(ref.object_id)
        with storage_errors(f"sync {path}"):
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
                sync_directory(path.parent)
                if path.parent in self._new_folders:
                    sync_directory(self._directory)
                    self._new_folders.discard(path.parent)
            except OSError:
                self._verified.pop(ref.object_id, None)
                path.unlink(missing_ok=True)
                raise
            finally:
                os.close(descriptor)

    def is_sound(self, ref: ObjectRef) -> bool:
        """Whether the object is there, with its digest and this size; a damaged copy is removed, so that it is made
        again."""
        try:
            return self._verify(ref.object_id) == ref.size_bytes
        except (ObjectGoneError, CorruptObjectError):
            return False

    def open(self, object_id: str) -> OpenObject:
        """Opens a verified object and holds it against collection until `close`.

        Raises BadInputError (not an id), ObjectGoneError (not here), CorruptObjectError (damaged on disk; removed).
        """
        path = self.path_of(object_id)
        with self._lock:
            self._held[object_id] = self._held.get(object_id, 0) + 1
        try:
            size = self._verify(object_id)
            self._touch(object_id)
            with storage_errors(f"open {path}"):
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            self._release(object_id)
            raise
        return OpenObject(object_id=object_id, size_bytes=size, descriptor=descriptor)

    @asynccontextmanager
    async def reading(self, object_id: str) -> AsyncGenerator[OpenObject]:
        """As `open`, in a thread, until the block ends. *On cancel* while it is opened it is closed right after."""
        opening = asyncio.create_task(asyncio.to_thread(self.open, object_id))
        try:
            opened = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(self._close_unwanted)
            raise
        try:
            yield opened
        finally:
            self.close(opened)

    def close(self, opened: OpenObject) -> None:
        os.close(opened.descriptor)
        self._touch(opened.object_id)
        self._release(opened.object_id)

    def _close_unwanted(self, opening: asyncio.Task[OpenObject]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            self.close(opening.result())

    def in_use(self) -> set[str]:
        """Objects that are open, or were put or read lately."""
        with self._lock:
            now = self._clock()
            return {*self._held, *(name for name, used in self._used_s.items() if now - used < GRACE_S)}

    def collect(self, keep: Iterable[str]) -> int:
        """Removes what is not in `keep`, not open, and not used for GRACE_S. Returns the bytes freed."""
        wanted = set(keep)
        freed = 0
        with storage_errors(f"collect in {self._directory}"):
            for path in self._directory.glob("??/*"):
                if path.name in wanted or path.name.startswith(".") or not self._forget_if_unused(path.name):
                    continue  # a dot: one that is being written now
                with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                    size = path.stat().st_size
                    path.unlink()
                    freed += size
        return freed

    def _verify(self, object_id: str) -> int:
        """Size of a sound object. The digest is computed again only when the file on disk is another one."""
        path = self.path_of(object_id)
        with storage_errors(f"read {path}"):
            try:
                facts = path.stat()
            except FileNotFoundError:
                raise ObjectGoneError(f"object {object_id[:12]} was collected; ask for a new plan") from None
        state = _state(facts)
        if self._verified.get(object_id) != state:
            with storage_errors(f"read {path}"):
                digest = file_digest(path)
            if digest != object_id:
                path.unlink(missing_ok=True)
                _log.error("object_damaged", object_id=object_id, size_bytes=facts.st_size)
                raise CorruptObjectError(
                    f"object {object_id[:12]} was damaged on the learner's disk; ask for a new plan"
                )
            self._verified[object_id] = state
        return facts.st_size

    def _forget_if_unused(self, object_id: str) -> bool:
        with self._lock:
            recent = self._clock() - self._used_s.get(object_id, float("-inf")) < GRACE_S
            if recent or self._held.get(object_id):
                return False
            self._used_s.pop(object_id, None)
            self._verified.pop(object_id, None)
            return True

    def _touch(self, object_id: str) -> None:
        with self._lock:
            self._used_s[object_id] = self._clock()

    def _release(self, object_id: str) -> None:
        with self._lock:
            self._held[object_id] -= 1
            if not self._held[object_id]:
                del self._held[object_id]


def _state(facts: os.stat_result) -> tuple[int, int, int]:
    """Changes with every write to a file, or another file in its place."""
    return facts.st_ino, facts.st_mtime_ns, facts.st_size
