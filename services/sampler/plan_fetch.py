"""The objects of a plan on their way to disk: so that no link waits for a question's way.

    refs ─► [the next one when little is left of those before] ─► ObjectCache ─► files of step 0 ─► files of step 1 …

A step's files are there before all of the plan is: it is applied while the next ones come. Nor need all be named at the
beginning: of an update that is still being made each object is added when it is there.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from services.sampler.object_cache import ObjectCache
from services.sampler.pushed import PushedObjects
from services.sampler.tally import Tally
from services.wire.types import FetchProgress, ObjectRef, Plan, PlanStep

_AHEAD_BYTES = 4 << 20
_AHEAD_S = 0.25
"""The next object is asked for when so little is left of those under way: the longest round trip at the speed that was
seen, so that the link is never empty; no more, because objects that come together come late together."""
_MOST_AHEAD_BYTES = 64 << 20
_MOST_AT_ONCE = 12
"""A server takes 16 calls from a connection, and announcements and plans go there too."""
_LEAST_S = 0.05
_SPEED_GAIN = 0.3
_SPEED_WINDOW_S = 0.5


class PlanFetch:
    """Made by `fetching` and `fetching_as_named`."""

    def __init__(self, cache: ObjectCache, progress: "_Progress", channels: int, pushed: PushedObjects | None) -> None:
        self._cache = cache
        self._progress = progress
        self._channels = channels
        self._pushed = pushed
        self._refs: dict[str, ObjectRef] = {}
        self._waiting: deque[ObjectRef] = deque()
        self._begun = 0
        self._changed = asyncio.Event()
        self._under_way: dict[str, asyncio.Task[Path]] = {}
        self._files: dict[str, asyncio.Future[Path]] = {}
        self._beginning = asyncio.create_task(self._begin_each())
        self.last_came_s = time.monotonic()
        """When the newest object was there."""

    def add(self, refs: Iterable[ObjectRef]) -> None:
        """To be fetched after those before. One that is named again is not."""
        for ref in refs:
            self._cache.want(ref.object_id)
            if ref.object_id not in self._refs:
                self._refs[ref.object_id] = ref
                self._files[ref.object_id] = asyncio.Future()
                self._waiting.append(ref)
                self._progress.add(ref)
        self._changed.set()

    async def file(self, ref: ObjectRef) -> Path:
        """One object. Raises what ObjectCache.fetch raises."""
        return await self._files[ref.object_id]

    async def files(self, step: PlanStep) -> list[Path]:
        """The step's objects, in order. Raises what ObjectCache.fetch raises for any of them."""
        return await asyncio.gather(*(self._files[ref.object_id] for ref in step.objects))

    async def end(self) -> None:
        """Ends what is under way; what came stays on disk."""
        self._beginning.cancel()
        await asyncio.wait((self._beginning,))
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for file in self._files.values():
            if not file.cancel() and not file.cancelled():
                file.exception()  # nobody may have waited for it

    async def _begin_each(self) -> None:
        while True:
            while not (self._waiting and self._has_room()):
                self._changed.clear()
                await self._changed.wait()
            ref = self._waiting.popleft()
            # Many objects go whole, each by one channel; few are cut into a range for each channel.
            lane = None if len(self._refs) < self._channels else self._begun
            self._begun += 1
            task = asyncio.create_task(self._fetch(ref, lane))
            self._under_way[ref.object_id] = task
            task.add_done_callback(partial(self._ended, ref))

    async def _fetch(self, ref: ObjectRef, lane: int | None) -> Path:
        if self._pushed is not None and await self._pushed.come(ref):
            self._received(ref, ref.size_bytes)
        return await self._cache.fetch(ref, partial(self._received, ref), lane=lane, self_checked=True)

    def _has_room(self) -> bool:
        most = min(_MOST_AHEAD_BYTES, max(_AHEAD_BYTES, int(_AHEAD_S * self._progress.pace)))
        few = sum(self._progress.left(self._refs[name]) for name in self._under_way) <= most
        return len(self._under_way) < self._channels or (few and len(self._under_way) < _MOST_AT_ONCE)

    def _ended(self, ref: ObjectRef, task: asyncio.Task[Path]) -> None:
        del self._under_way[ref.object_id]
        self._changed.set()
        file = self._files[ref.object_id]
        if file.done() or task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._progress.finished(ref)
            self.last_came_s = time.monotonic()
            file.set_result(task.result())
        else:
            file.set_exception(error)

    def _received(self, ref: ObjectRef, size_bytes: int) -> None:
        self._progress.received(ref, size_bytes)
        self._changed.set()


@asynccontextmanager
async def fetching(
    cache: ObjectCache, plan: Plan, tally: Tally, channels: int, pushed: PushedObjects | None = None
) -> AsyncGenerator[PlanFetch]:
    """Fetches while the block runs; `tally` hears of bytes and speed, and of the time until the last object came.
    `pushed`: who may be bringing them."""
    refs = [ref for step in plan.steps for ref in step.objects]
    cache.evict([ref.object_id for ref in refs])
    progress = _Progress(tally, plan.target.decoded.version)
    fetch = PlanFetch(cache, progress, channels, pushed)
    fetch.add(refs)
    try:
        yield fetch
    finally:
        await fetch.end()


@asynccontextmanager
async def fetching_as_named(
    cache: ObjectCache, refs: Iterable[ObjectRef], version: int, tally: Tally, channels: int, pushed: PushedObjects
) -> AsyncGenerator[PlanFetch]:
    """As `fetching`; more objects are added in the block. While it waits for them nothing is being fetched."""
    cache.evict([ref.object_id for ref in refs])
    fetch = PlanFetch(cache, _Progress(tally, version, growing=True), channels, pushed)
    fetch.add(refs)
    try:
        yield fetch
    finally:
        await fetch.end()


class _Progress:
    """Bytes of a plan as they come, with a smoothed speed."""

    def __init__(self, tally: Tally, version: int, *, growing: bool = False) -> None:
        self._tally = tally
        self._version = version
        self._growing = growing
        self._total = 0
        self._done = 0
        self._of: dict[str, int] = {}
        self._counted_s = time.monotonic()
        self._speed = 0.0
        self._window_bytes = 0
        self._window_start = time.monotonic()
        self._came = 0
        self._first_came_s = 0.0
        self._show()

    @property
    def pace(self) -> float:
        """Bytes a second since the first of them; 0 while that says nothing."""
        passed_s = time.monotonic() - self._first_came_s
        return self._came / passed_s if self._came and passed_s > _LEAST_S else 0.0

    def add(self, ref: ObjectRef) -> None:
        """One more object to come. Time in which there was none is not counted."""
        if self._done == self._total:
            self._counted_s = self._window_start = time.monotonic()
            self._window_bytes = self._came = 0
        self._total += ref.size_bytes
        self._show()

    def received(self, ref: ObjectRef, size: int) -> None:
        """Chunks come in bursts: speed is that of half a second, smoothed."""
        if not self._came:
            self._first_came_s = time.monotonic()
        self._came += size
        self._window_bytes += size
        passed_s = time.monotonic() - self._window_start
        if passed_s >= _SPEED_WINDOW_S:
            speed = self._window_bytes / passed_s
            self._speed = speed if not self._speed else self._speed + _SPEED_GAIN * (speed - self._speed)
            self._window_bytes, self._window_start = 0, time.monotonic()
        self._tally.weights_bytes += size
        self._count(ref, self._of.get(ref.object_id, 0) + size)

    def finished(self, ref: ObjectRef) -> None:
        """Counts an object as done, whether it came now or lay on disk."""
        self._count(ref, ref.size_bytes)

    def left(self, ref: ObjectRef) -> int:
        """Bytes of an object that have not come."""
        return ref.size_bytes - self._of.get(ref.object_id, 0)

    def _count(self, ref: ObjectRef, done: int) -> None:
        self._done += done - self._of.get(ref.object_id, 0)
        self._of[ref.object_id] = done
        now = time.monotonic()
        self._tally.fetch_s += now - self._counted_s
        self._counted_s = now
        self._show()

    def _show(self) -> None:
        progress = FetchProgress(
            target_version=self._version, bytes_done=self._done, bytes_total=self._total, bytes_per_s=self._speed
        )
        self._tally.fetch = None if self._growing and self._done == self._total else progress
