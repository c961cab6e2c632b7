"""Objects fetched from a relay or the learner, on disk under their names.

state_dir/objects/<sha256>        whole and verified
state_dir/objects/<sha256>.part   what has come so far: a cut fetch goes on from here
"""

import asyncio
import os
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

import grpc

from heterorl.v1 import weights_pb2
from services.runtime import failpoints
from services.runtime.errors import CorruptObjectError, HeteroRLError, StorageError, UnavailableError
from services.runtime.files import storage_errors
from services.runtime.log import get_logger
from services.sampler.weight_sources import WeightSource, WeightSources
from services.wire.errors import from_rpc_error
from services.wire.objects import Chunk, file_digest, verify_chunk
from services.wire.types import ObjectRef

_STALL_S = 30.0

_log = get_logger("sampler.objects")


class ObjectCache:
    """Fetches one object at a time; keeps at most `max_bytes`, oldest first out."""

    def __init__(self, directory: Path, sources: WeightSources, max_bytes: int, stall_s: float = _STALL_S) -> None:
        self._directory = directory
        self._sources = sources
        self._max_bytes = max_bytes
        self._stall_s = stall_s
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
            resumed = await self._fetch_rest(source, part, ref, received)
            if resumed and await asyncio.to_thread(file_digest, part) != ref.object_id:
                # What lay on disk may be a relay's, or damaged: judge the source by bytes of its own alone.
                _log.warning("part_discarded", object_id=ref.object_id)
                part.unlink()
                await self._fetch_rest(source, part, ref, received)
            if await asyncio.to_thread(file_digest, part) != ref.object_id:
                part.unlink()
                raise CorruptObjectError("a fetched object does not have its digest: a keyframe is fetched")
            failpoints.hit("fetch.before_rename")
            part.replace(path)

    def evict(self, keep: Collection[str]) -> None:
        """Removes the oldest files beyond max_bytes, and parts of objects that nobody wants; never those in `keep`."""
        files = [file for file in self._directory.iterdir() if file.stem not in keep]
        kept: list[tuple[float, int, Path]] = []
        for file in files:
            with suppress(FileNotFoundError):
                status = file.stat()
                kept.append((status.st_mtime, status.st_size, file))
        total = sum(size for _, size, _ in kept)
        for _, size, file in sorted(kept):
            if total > self._max_bytes or file.suffix == ".part":
                with suppress(FileNotFoundError):
                    file.unlink()
                total -= size

    async def _fetch_rest(
        self, source: WeightSource, part: Path, ref: ObjectRef, received: Callable[[int], None]
    ) -> bool:
        """Completes the part; whether some of it was there before."""
        offset = start = await asyncio.to_thread(_prepare, part, ref)
        with part.open("ab") as file:
            request = weights_pb2.FetchObjectRequest(object_id=ref.object_id, offset=offset)
            call = source.stub.FetchObject(request, wait_for_ready=source.wait_for_ready)
            try:
                while offset < ref.size_bytes:
                    async with asyncio.timeout(self._stall_s):
                        message = await call.read()
                    if not isinstance(message, weights_pb2.FetchObjectResponse):
                        raise UnavailableError("the fetch ended before the object did")
                    _check(message, offset, ref)
                    await asyncio.to_thread(_append, file.fileno(), message.data)
                    offset += len(message.data)
                    received(len(message.data))
                    self._sources.received_bytes[source.name] += len(message.data)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from None
            except TimeoutError:
                raise UnavailableError(f"no weights came for {self._stall_s:.0f} s") from None
            finally:
                call.cancel()
        return start > 0


def _prepare(part: Path, ref: ObjectRef) -> int:
    """Makes the file; returns where to go on. A part that is longer than the object is not its beginning."""
    part.touch()
    size = part.stat().st_size
    if size > ref.size_bytes:
        os.truncate(part, 0)
        return 0
    return size


def _check(message: weights_pb2.FetchObjectResponse, offset: int, ref: ObjectRef) -> None:
    """Raises UnavailableError for a chunk that cannot be used: the fetch goes on from the bytes before it."""
    try:
        verify_chunk(Chunk(offset=message.offset, data=message.data, crc32c=message.crc32c), offset)
    except CorruptObjectError as error:
        raise UnavailableError(f"a chunk cannot be used: {error}") from error
    if not message.data or offset + len(message.data) > ref.size_bytes:
        raise UnavailableError("a chunk is empty or goes beyond its object")


def _append(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = os.write(descriptor, view)
        if written == 0:
            raise StorageError("the object cache takes no more bytes: free disk space")
        view = view[written:]


def _holds(path: Path, ref: ObjectRef) -> bool:
    """Whether the file is the object; damage on disk is found here, and the file removed."""
    try:
        data_matches = path.stat().st_size == ref.size_bytes and file_digest(path) == ref.object_id
    except FileNotFoundError:
        return False
    if not data_matches:
        path.unlink()
    return data_matches
