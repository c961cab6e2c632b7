"""Objects fetched from a relay or the learner, on disk under their names.

state_dir/objects/<sha256>        whole and verified
state_dir/objects/<sha256>.part   what has come so far: a cut fetch goes on from here
"""

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from services.runtime import failpoints
from services.runtime.errors import CorruptObjectError, HeteroRLError, StorageError, UnavailableError
from services.runtime.files import storage_errors
from services.runtime.log import get_logger
from services.sampler.weight_sources import WeightSource, WeightSources
from services.wire.objects import file_digest
from services.wire.types import ObjectRef

if TYPE_CHECKING:
    from hashlib import _Hash  # pyright: ignore[reportPrivateUsage] - the type of sha256() has no public name in 3.11

_log = get_logger("sampler.objects")


class ObjectCache:
    """Fetches one object at a time; keeps at most `max_bytes`, oldest first out."""

    def __init__(self, directory: Path, sources: WeightSources, max_bytes: int) -> None:
        self._directory = directory
        self._sources = sources
        self._max_bytes = max_bytes
        with storage_errors(f"make folder {directory}"):
            directory.mkdir(parents=True, exist_ok=True)

    async def fetch(self, ref: ObjectRef, received: Callable[[int], None]) -> Path:
        """The file of a verified object. `received` is told the bytes of each chunk as it arrives.

        Raises UnavailableError (cut, stalled, a chunk damaged: what came whole is kept, call again), ObjectGoneError
        (ask for a new plan), CorruptObjectError (not the object's bytes: they are removed), StorageError.
        """
        path = self._directory / ref.object_id
        if await asyncio.to_thread(_holds, path, ref):
            return path
        while True:
            source = self._sources.current
            try:
                await self._fetch_from(source, path, ref, received)
            except HeteroRLError as error:
                if not self._sources.failed(source, error):
                    raise
            else:
                return path

    async def _fetch_from(
        self, source: WeightSource, path: Path, ref: ObjectRef, received: Callable[[int], None]
    ) -> None:
        part = path.with_suffix(".part")
        with storage_errors(f"write {part}"):
            resumed, digest = await self._fetch_rest(source, part, ref, received)
            if resumed and digest != ref.object_id:
                # What lay on disk may be a relay's, or damaged: judge the source by bytes of its own alone.
                _log.warning("part_discarded", object_id=ref.object_id)
                part.unlink()
                _, digest = await self._fetch_rest(source, part, ref, received)
            if digest != ref.object_id:
                part.unlink()
                raise CorruptObjectError("a fetched object does not have its digest: a keyframe is fetched")
            failpoints.hit("fetch.before_rename")
            part.replace(path)

    def evict(self, keep: Collection[str]) -> None:
        """Removes the oldest files beyond max_bytes, and parts of objects that nobody wants; never those in `keep`."""
        files = [file for file in self._directory.iterdir() if file.stem not in keep]
        kept: list[tuple[float, int, Path]] = []
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                status = file.stat()
                kept.append((status.st_mtime, status.st_size, file))
        total = sum(size for _, size, _ in kept)
        for _, size, file in sorted(kept):
            if total > self._max_bytes or file.suffix == ".part":
                with contextlib.suppress(FileNotFoundError):
                    file.unlink()
                total -= size

    async def _fetch_rest(
        self, source: WeightSource, part: Path, ref: ObjectRef, received: Callable[[int], None]
    ) -> tuple[bool, str]:
        """Completes the part: (whether some of it was there before, the digest of all). Hashing as bytes come costs no
        time on a link; what the disk does to them later is found by the update's own check digest."""
        offset, digest = await asyncio.to_thread(_prepare, part, ref)
        resumed = offset > 0
        if offset == ref.size_bytes:
            return resumed, digest.hexdigest()
        with part.open("ab") as file:
            async with contextlib.aclosing(source.reader.read(ref.object_id, offset)) as chunks:
                async for data in chunks:
                    if offset + len(data) > ref.size_bytes:
                        raise UnavailableError("a chunk goes beyond its object")
                    await asyncio.to_thread(_append, file.fileno(), data, digest)
                    offset += len(data)
                    received(len(data))
                    self._sources.received_bytes[source.name] += len(data)
                    if offset == ref.size_bytes:
                        break
        if offset < ref.size_bytes:
            raise UnavailableError("the fetch ended before the object did")
        return resumed, digest.hexdigest()


def _prepare(part: Path, ref: ObjectRef) -> tuple[int, "_Hash"]:
    """Makes the file; returns where to go on, and the hash so far. A part that is longer than the object is not its
    beginning."""
    part.touch()
    if part.stat().st_size > ref.size_bytes:
        os.truncate(part, 0)
    with part.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return file.tell(), digest


def _append(descriptor: int, data: bytes, digest: "_Hash") -> None:
    view = memoryview(data)
    while view:
        written = os.write(descriptor, view)
        if written == 0:
            raise StorageError("the object cache takes no more bytes: free disk space")
        view = view[written:]
    digest.update(data)


def _holds(path: Path, ref: ObjectRef) -> bool:
    """Whether the file is the object; damage on disk is found here, and the file removed."""
    try:
        data_matches = path.stat().st_size == ref.size_bytes and file_digest(path) == ref.object_id
    except FileNotFoundError:
        return False
    if not data_matches:
        path.unlink()
    return data_matches
