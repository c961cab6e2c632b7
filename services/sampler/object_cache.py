"""Objects fetched from a relay or the learner, on disk under their names.

state_dir/objects/<sha256>         whole and verified
state_dir/objects/<sha256>…part    what has come so far (object_ranges.py): a cut fetch goes on from here
"""

import asyncio
import contextlib
from collections.abc import Callable, Collection
from pathlib import Path

from services.runtime import failpoints
from services.runtime.errors import CorruptObjectError, HeteroRLError, StorageError, UnavailableError
from services.runtime.files import storage_errors
from services.runtime.log import get_logger
from services.sampler.object_ranges import PART_SUFFIX, Progress, Range, begin, discard, join, ranges_of
from services.sampler.weight_sources import SourceName, WeightSource, WeightSources
from services.wire.object_reader import ObjectReader
from services.wire.objects import file_digest
from services.wire.types import ObjectRef

_log = get_logger("sampler.objects")


class ObjectCache:
    """Fetches one object at a time; keeps at most `max_bytes`, oldest first out."""

    def __init__(self, directory: Path, sources: WeightSources, max_bytes: int) -> None:
        self._directory = directory
        self._sources = sources
        self._max_bytes = max_bytes
        self._wanted: Collection[str] = ()
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
            except StorageError:
                self._remove_unwanted(0)  # a full disk: the next try finds what room there is
                raise
            except HeteroRLError as error:
                if not self._sources.failed(source, error):
                    raise
            else:
                return path

    async def _fetch_from(
        self, source: WeightSource, path: Path, ref: ObjectRef, received: Callable[[int], None]
    ) -> None:
        ranges = ranges_of(path, ref.size_bytes, len(source.readers))
        with storage_errors(f"write {ranges[0].path}"):
            resumed, digest = await self._fetch_rest(source, ranges, ref, received)
            if resumed and digest != ref.object_id:
                # What lay on disk may be a relay's, or damaged: judge the source by bytes of its own alone.
                _log.warning("part_discarded", object_id=ref.object_id)
                discard(ranges)
                _, digest = await self._fetch_rest(source, ranges, ref, received)
            if digest != ref.object_id:
                discard(ranges)
                raise CorruptObjectError("a fetched object does not have its digest: a keyframe is fetched")
            failpoints.hit("fetch.before_rename")
            ranges[0].path.replace(path)

    def evict(self, keep: Collection[str]) -> None:
        """Removes the oldest files beyond max_bytes, and parts of objects that nobody wants; never those in `keep`,
        which stay wanted until the next call."""
        self._wanted = frozenset(keep)
        self._remove_unwanted(self._max_bytes)

    def _remove_unwanted(self, room: int) -> None:
        files = [file for file in self._directory.iterdir() if file.name.partition(".")[0] not in self._wanted]
        kept: list[tuple[float, int, Path]] = []
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                status = file.stat()
                kept.append((status.st_mtime, status.st_size, file))
        total = sum(size for _, size, _ in kept)
        for _, size, file in sorted(kept):
            if total > room or file.suffix == PART_SUFFIX:
                with contextlib.suppress(FileNotFoundError):
                    file.unlink()
                total -= size

    async def _fetch_rest(
        self, source: WeightSource, ranges: list[Range], ref: ObjectRef, received: Callable[[int], None]
    ) -> tuple[bool, str]:
        """Completes all ranges at the same time: (whether some of it was there before, the digest of all). Hashing as
        bytes come costs no time on a link; what the disk does to them later is found by the update's own digest."""
        parts = [await asyncio.to_thread(begin, part) for part in ranges]
        resumed = any(part.offset > part.range.start for part in parts)
        digest = parts[0].digest
        assert digest is not None, "the first range is hashed"
        tasks = [
            asyncio.create_task(self._fetch_range(source.name, reader, ref, part, received))
            for reader, part in zip(source.readers, parts, strict=False)
        ]
        try:
            await asyncio.gather(*tasks)
        finally:  # one that fails ends the others; what came stays
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if len(ranges) > 1:
            await asyncio.to_thread(join, ranges, digest)
        return resumed, digest.hexdigest()

    async def _fetch_range(
        self, source: SourceName, reader: ObjectReader, ref: ObjectRef, part: Progress, received: Callable[[int], None]
    ) -> None:
        end = part.range.end
        if part.offset == end:
            return
        with part.range.path.open("ab") as file:
            rest = 0 if end == ref.size_bytes else end
            async with contextlib.aclosing(reader.read(ref.object_id, part.offset, rest)) as chunks:
                async for data in chunks:
                    if part.offset + len(data) > end:
                        raise UnavailableError("a chunk goes beyond its object")
                    received(len(data))
                    self._sources.received_bytes[source] += len(data)
                    await _to_its_end(part.append, file.fileno(), data)
                    if part.offset == end:
                        break
        if part.offset < end:
            raise UnavailableError("the fetch ended before the object did")


async def _to_its_end(work: Callable[[int, bytes], None], descriptor: int, data: bytes) -> None:
    """Runs in a thread, and waits for it even when cancelled: the file stays open until nobody writes to it."""
    running = asyncio.ensure_future(asyncio.to_thread(work, descriptor, data))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


def _holds(path: Path, ref: ObjectRef) -> bool:
    """Whether the file is the object; damage on disk is found here, and the file removed."""
    try:
        data_matches = path.stat().st_size == ref.size_bytes and file_digest(path) == ref.object_id
    except FileNotFoundError:
        return False
    if not data_matches:
        path.unlink()
    return data_matches
