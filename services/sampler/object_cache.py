"""Objects fetched from a relay or the learner, on disk under their names.

state_dir/objects/<sha256>         whole and verified
state_dir/objects/<sha256>…part    what has come so far (object_ranges.py): a cut fetch goes on from here
state_dir/objects/<sha256>.pushed  one that nobody asked for, while it is written
"""

import asyncio
import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from services.runtime import failpoints
from services.runtime.errors import CorruptObjectError, HeteroRLError, StorageError, UnavailableError
from services.runtime.files import storage_errors
from services.runtime.log import get_logger
from services.sampler.object_ranges import PART_SUFFIX, Progress, Range, begin, discard, join, ranges_of
from services.sampler.weight_sources import SourceName, WeightSources
from services.wire.object_reader import ObjectReader
from services.wire.objects import file_digest, object_id_of
from services.wire.types import ObjectRef

_log = get_logger("sampler.objects")
_MOST_FILES = 1024
"""Of a policy whose updates are small, thousands fit into any number of bytes; each is looked at before a fetch."""


class ObjectCache:
    """Keeps at most `max_bytes` and _MOST_FILES, oldest first out. Different objects may be fetched at once."""

    def __init__(self, directory: Path, sources: WeightSources, max_bytes: int) -> None:
        self._directory = directory
        self._sources = sources
        self._max_bytes = max_bytes
        self._wanted: set[str] = set()
        with storage_errors(f"make folder {directory}"):
            directory.mkdir(parents=True, exist_ok=True)

    async def fetch(
        self, ref: ObjectRef, received: Callable[[int], None], *, lane: int | None = None, self_checked: bool = False
    ) -> Path:
        """The file of a verified object. `received` is told the bytes of each chunk as it arrives. `lane` is the number
        of the channel that it comes by; None: each channel brings a range of it.

        `self_checked`: whoever uses the file finds every wrong byte in it, as apply_update does by a faster digest than
        SHA-256, which takes longer than all else that is done with a byte. Chunks are checked as ever, and if the file
        is asked for again it is hashed.

        Raises UnavailableError (cut, stalled, a chunk damaged: what came whole is kept, call again), ObjectGoneError
        (ask for a new plan), CorruptObjectError (not the object's bytes: they are removed), StorageError.
        """
        path = self._directory / ref.object_id
        if await asyncio.to_thread(_holds, path, ref):
            return path
        while True:
            source = self._sources.current
            try:
                readers = source.readers if lane is None else (source.readers[lane % len(source.readers)],)
                fetch = _Fetch(source=source.name, readers=readers, ref=ref, received=received, hashed=not self_checked)
                await self._fetch_from(fetch, path)
            except StorageError:
                self._remove_unwanted(0)  # a full disk: the next try finds what room there is
                raise
            except HeteroRLError as error:
                if not self._sources.failed(source, error):
                    raise
            else:
                return path

    async def _fetch_from(self, fetch: "_Fetch", path: Path) -> None:
        ref = fetch.ref
        ranges = ranges_of(path, ref.size_bytes, len(fetch.readers))
        with storage_errors(f"write {ranges[0].path}"):
            resumed, digest = await self._fetch_rest(fetch, ranges)
            if resumed and digest not in (ref.object_id, None):
                # What lay on disk may be a relay's, or damaged: judge the source by bytes of its own alone.
                _log.warning("part_discarded", object_id=ref.object_id)
                discard(ranges)
                _, digest = await self._fetch_rest(fetch, ranges)
            if digest not in (ref.object_id, None):
                discard(ranges)
                raise CorruptObjectError("a fetched object does not have its digest: a keyframe is fetched")
            failpoints.hit("fetch.before_rename")
            ranges[0].path.replace(path)

    def put(self, ref: ObjectRef, data: bytes) -> None:
        """Takes an object that nobody asked for. Blocks. Raises CorruptObjectError for other bytes, StorageError."""
        if object_id_of(data) != ref.object_id:
            raise CorruptObjectError("an object that nobody asked for does not have its digest: it is fetched")
        path = self._directory / ref.object_id
        coming = path.with_name(f"{path.name}.pushed")
        with storage_errors(f"write {coming}"):
            coming.write_bytes(data)
            coming.replace(path)

    def evict(self, keep: Collection[str]) -> None:
        """Removes the oldest files beyond the bounds, and parts of objects that nobody wants; never those in `keep`,
        which stay wanted until the next call."""
        self._wanted = set(keep)
        self._remove_unwanted(self._max_bytes)

    def want(self, object_id: str) -> None:
        """One more that is not removed until the next `evict`."""
        self._wanted.add(object_id)

    def _remove_unwanted(self, room: int) -> None:
        with storage_errors(f"tidy {self._directory}"):
            self._directory.mkdir(parents=True, exist_ok=True)  # a person may have removed it, to make room
            files = [file for file in self._directory.iterdir() if file.name.partition(".")[0] not in self._wanted]
            kept: list[tuple[float, int, Path]] = []
            for file in files:
                with contextlib.suppress(FileNotFoundError):
                    status = file.stat()
                    kept.append((status.st_mtime, status.st_size, file))
            total, most = sum(size for _, size, _ in kept), len(kept) - _MOST_FILES
            for place, (_, size, file) in enumerate(sorted(kept)):
                if total > room or place < most or file.suffix == PART_SUFFIX:
                    with contextlib.suppress(FileNotFoundError):
                        file.unlink()
                    total -= size

    async def _fetch_rest(self, fetch: "_Fetch", ranges: list[Range]) -> tuple[bool, str | None]:
        """Completes all ranges at the same time: (whether some of it was there before, the digest of all or None).
        What the disk does to the bytes later is found by the update's own digest. What was there before is hashed in
        any case: it may be another source's, and wrong."""
        hashed = fetch.hashed or any(part.path.exists() for part in ranges)
        parts = [await asyncio.to_thread(begin, part, hashed) for part in ranges]
        resumed = any(part.offset > part.range.start for part in parts)
        digest = parts[0].digest
        tasks = [
            asyncio.create_task(self._fetch_range(fetch, reader, part))
            for reader, part in zip(fetch.readers, parts, strict=False)
        ]
        try:
            await asyncio.gather(*tasks)
        finally:  # one that fails ends the others; what came stays
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if len(ranges) > 1:
            await asyncio.to_thread(join, ranges, digest)
        return resumed, None if digest is None else digest.hexdigest()

    async def _fetch_range(self, fetch: "_Fetch", reader: ObjectReader, part: Progress) -> None:
        """A chunk is hashed and written while the next one comes."""
        end, arrived = part.range.end, part.offset
        if arrived == end:
            return
        with part.range.path.open("ab") as file:
            rest = 0 if end == fetch.ref.size_bytes else end
            async with (
                _Writing(part, file.fileno()) as writing,
                contextlib.aclosing(reader.read(fetch.ref.object_id, arrived, rest)) as chunks,
            ):
                async for data in chunks:
                    arrived += len(data)
                    if arrived > end:
                        raise UnavailableError("a chunk goes beyond its object")
                    fetch.received(len(data))
                    self._sources.received_bytes[fetch.source] += len(data)
                    await writing.put(data)
                    if arrived == end:
                        break
        if arrived < end:
            raise UnavailableError("the fetch ended before the object did")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fetch:
    """An object, the channels that it comes by, and who hears of its bytes."""

    source: SourceName
    readers: tuple[ObjectReader, ...]
    ref: ObjectRef
    received: Callable[[int], None]
    hashed: bool


class _Writing:
    """Puts the chunks of a range on disk in a thread, one behind the network. Its end waits for what was put, even when
    cancelled: no byte that came is lost, and the file stays open until nobody writes to it."""

    def __init__(self, part: Progress, descriptor: int) -> None:
        self._part = part
        self._descriptor = descriptor
        self._last: asyncio.Future[None] | None = None

    async def put(self, data: bytes) -> None:
        """Takes the chunk, and waits for the one before. Raises what writing that one raised."""
        before = self._last
        self._last = asyncio.ensure_future(self._append(before, data))
        if before is not None:
            await asyncio.shield(before)

    async def _append(self, before: asyncio.Future[None] | None, data: bytes) -> None:
        if before is not None:
            await before
        await asyncio.to_thread(self._part.append, self._descriptor, data)

    async def __aenter__(self) -> "_Writing":
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._last is None:
            return
        try:
            await asyncio.shield(self._last)
        except asyncio.CancelledError:
            await asyncio.wait([self._last])
            raise


def _holds(path: Path, ref: ObjectRef) -> bool:
    """Whether the file is the object; damage on disk is found here, and the file removed."""
    with storage_errors(f"read {path}"):
        try:
            data_matches = path.stat().st_size == ref.size_bytes and file_digest(path) == ref.object_id
        except FileNotFoundError:
            return False
        if not data_matches:
            path.unlink(missing_ok=True)
    return data_matches
