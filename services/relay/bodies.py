"""Objects that somebody reads now: each is filled once, from disk or from upstream, and read by any number.

    reading(id) ─► first one: verified on disk? ── yes ─► complete at once
                        │                          no ──► one fetch from upstream ─► part on disk ─► digest ─► object
                   others: the same body                         └ grows: readers follow as bytes arrive

Readers get all bytes but the last chunk while they come; the last only once the digest is known to be right. So nobody
ever gets the whole of an object that is not what its name says.
"""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Protocol

from services.relay.disk_cache import DiskCache, Part
from services.runtime.backoff import Backoff
from services.runtime.errors import ExhaustedError, HeteroRLError, ObjectGoneError, StorageError, UnavailableError
from services.runtime.lifecycle import explain
from services.runtime.log import get_logger

_DOWNLOADS = 4
"""Objects fetched at the same time: enough to fill a link, few enough to bound memory."""

_log = get_logger("relay.objects")


class ObjectSource(Protocol):
    """Where objects come from."""

    def fetch(self, object_id: str, offset: int) -> AsyncGenerator[bytes]:
        """The bytes from `offset` to the object's end, each chunk checked. Raises HeteroRLError."""
        ...

    def size_of(self, object_id: str) -> int | None:
        """The object's bytes; None where upstream did not say."""
        ...


class Body:
    """The bytes of one object as far as they are here."""

    def __init__(self, object_id: str) -> None:
        self.object_id = object_id
        self.descriptor = -1
        self.readable_bytes = 0
        self.complete = False
        self.readers = 0
        self.holds = 0
        self._failure: HeteroRLError | None = None
        self._changed = asyncio.Event()

    async def beyond(self, offset: int) -> int:
        """Waits for a byte at `offset` or for the object's end; returns the bytes that can be read. Raises what ended
        the fetch."""
        while self._failure is None and not self.complete and self.readable_bytes <= offset:
            await self._changed.wait()
        if self._failure is not None:
            raise self._failure
        return self.readable_bytes

    def grow(self, readable_bytes: int) -> None:
        self.readable_bytes = readable_bytes
        self._wake()

    def finish(self, size_bytes: int) -> None:
        self.readable_bytes, self.complete = size_bytes, True
        self._wake()

    def fail(self, error: HeteroRLError) -> None:
        self._failure = error
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class Bodies:
    """Single flight: one body per object, whoever asks. `on_gone` hears of objects that upstream no longer has."""

    def __init__(
        self,
        *,
        cache: DiskCache,
        source: ObjectSource,
        patience_s: float,
        on_gone: Callable[[str], None],
        backoff: Callable[[], Backoff] = Backoff,
    ) -> None:
        self._cache = cache
        self._source = source
        self._patience_s = patience_s
        self._on_gone = on_gone
        self._backoff = backoff
        self._live: dict[str, Body] = {}
        self._filling: dict[asyncio.Task[None], Body] = {}
        self._slots = asyncio.Semaphore(_DOWNLOADS)
        self.hits = 0
        """Objects that were served from disk."""
        self.misses = 0
        """Objects that were fetched from upstream."""

    @asynccontextmanager
    async def reading(self, object_id: str) -> AsyncGenerator[Body]:
        """The object's body, kept open while the block runs."""
        body = self._live.get(object_id)
        if body is None:
            body = self._live[object_id] = Body(object_id)
            task = asyncio.create_task(self._fill(body))
            self._filling[task] = body
            task.add_done_callback(self._filled)
        body.readers += 1
        try:
            yield body
        finally:
            body.readers -= 1
            self._close_if_idle(body)

    async def close(self) -> None:
        """Ends fetches under way."""
        tasks = list(self._filling)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _fill(self, body: Body) -> None:
        """*Waits for* the disk or upstream; *produces* the body's bytes. It goes on when its readers leave: the site
        will ask again, and an object is at most one shard. *On cancel* (the relay ends) the part is left behind."""
        try:
            opened = await asyncio.to_thread(self._cache.open, body.object_id)
            if opened is None:
                await self._download(body)
                return
            body.holds += 1
            body.descriptor = opened.descriptor
            self.hits += 1
            body.finish(opened.size_bytes)
        except Exception as error:  # a task's end: its readers must not wait for ever
            if isinstance(error, ObjectGoneError):
                self._on_gone(body.object_id)
            if isinstance(error, StorageError | ExhaustedError):  # samplers only go elsewhere: a person must hear of it
                _log.warning("object_not_served", object_id=body.object_id, error=error)
            body.fail(explain(error, _log))
            self._live.pop(body.object_id, None)  # the next reader tries again

    async def _download(self, body: Body) -> None:
        async with self._slots:
            part = await asyncio.to_thread(self._cache.begin, body.object_id, self._source.size_of(body.object_id))
            body.holds += 1
            self.misses += 1
            body.descriptor = os.open(part.path, os.O_RDONLY | os.O_CLOEXEC)
            await self._receive(part, body)
            await asyncio.to_thread(self._cache.keep, part)
            body.finish(part.size_bytes)

    async def _receive(self, part: Part, body: Body) -> None:
        """Upstream may break off any number of times, as long as there is progress within `patience_s`."""
        backoff = self._backoff()
        body.grow(part.settled_bytes)
        last_progress_s = time.monotonic()
        while True:
            try:
                async with aclosing(self._source.fetch(part.object_id, part.size_bytes)) as chunks:
                    async for data in chunks:
                        await asyncio.to_thread(self._cache.append, part, data)
                        body.grow(part.settled_bytes)
                        last_progress_s = time.monotonic()
                        backoff.reset()
            except UnavailableError as error:
                if time.monotonic() - last_progress_s > self._patience_s:
                    raise
                _log.info("upstream_fetch_cut", object_id=body.object_id, offset=part.size_bytes, error=error)
                await asyncio.sleep(backoff.next_delay_s())
            else:
                return

    def _filled(self, task: asyncio.Task[None]) -> None:
        self._close_if_idle(self._filling.pop(task))

    def _close_if_idle(self, body: Body) -> None:
        if body.readers or body in self._filling.values():
            return
        if self._live.get(body.object_id) is body:
            del self._live[body.object_id]
        if body.descriptor >= 0:
            os.close(body.descriptor)
            body.descriptor = -1
        for _ in range(body.holds):
            self._cache.release(body.object_id)
        body.holds = 0
