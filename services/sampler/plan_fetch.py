"""The objects of a plan on their way to disk: several at a time, so that no link waits for a question's way.

    refs ─► [small ones together, large ones two at a time] ─► ObjectCache ─► files of step 0 ─► files of step 1 …

A step's files are there before all of the plan is: it is applied while the next ones come.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from services.sampler.object_cache import ObjectCache
from services.sampler.tally import Tally
from services.wire.types import FetchProgress, ObjectRef, Plan, PlanStep

_LARGE_AT_ONCE = 2
"""While one object ends and the next is asked for, the other fills the link."""
_MOST_AT_ONCE = 12
"""A server takes 16 calls from a connection, and announcements and plans go there too."""
_SMALL_BYTES = 8 << 20
"""So much is asked for at once, in any number of objects: a delta has one for each 64 MiB of the model."""
_SPEED_GAIN = 0.3
_SPEED_WINDOW_S = 0.5


class PlanFetch:
    """Made by `fetching`."""

    def __init__(self, cache: ObjectCache, plan: Plan, tally: Tally, channels: int) -> None:
        refs = {ref.object_id: ref for step in plan.steps for ref in step.objects}
        self._cache = cache
        self._large_at_once = max(_LARGE_AT_ONCE, channels)
        self._changed = asyncio.Condition()
        self._begun = 0
        self._under_way: list[int] = []
        """Sizes."""
        self.last_came_s = time.monotonic()
        """When the newest object was there."""
        self._progress = _Progress(tally, plan)
        # Many objects go whole, each by one channel; few are cut into a range for each channel.
        lanes = [number if len(refs) >= channels else None for number in range(len(refs))]
        self._tasks = {
            ref.object_id: asyncio.create_task(self._fetch(number, ref, lane))
            for number, (ref, lane) in enumerate(zip(refs.values(), lanes, strict=True))
        }

    async def file(self, ref: ObjectRef) -> Path:
        """One object. Raises what ObjectCache.fetch raises."""
        return await self._tasks[ref.object_id]

    async def files(self, step: PlanStep) -> list[Path]:
        """The step's objects, in order. Raises what ObjectCache.fetch raises for any of them."""
        return await asyncio.gather(*(self._tasks[ref.object_id] for ref in step.objects))

    async def end(self) -> None:
        """Ends what is under way; what came stays on disk."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _fetch(self, number: int, ref: ObjectRef, lane: int | None) -> Path:
        async with self._changed:
            await self._changed.wait_for(lambda: self._begun == number and self._has_room(ref.size_bytes))
            self._begun += 1
            self._under_way.append(ref.size_bytes)
            self._changed.notify_all()
        path = await self._cache.fetch(
            ref, lambda size: self._progress.received(ref, size), lane=lane, self_checked=True
        )
        self._progress.finished(ref)
        self.last_came_s = time.monotonic()
        async with self._changed:
            self._under_way.remove(ref.size_bytes)
            self._changed.notify_all()
        return path

    def _has_room(self, size_bytes: int) -> bool:
        under_way = len(self._under_way)
        small = under_way < _MOST_AT_ONCE and sum(self._under_way) + size_bytes <= _SMALL_BYTES
        return small or under_way < self._large_at_once


@asynccontextmanager
async def fetching(cache: ObjectCache, plan: Plan, tally: Tally, channels: int) -> AsyncGenerator[PlanFetch]:
    """Fetches while the block runs; `tally` hears of bytes and speed, and of the time until the last object came."""
    cache.evict([ref.object_id for step in plan.steps for ref in step.objects])
    fetch = PlanFetch(cache, plan, tally, channels)
    try:
        yield fetch
    finally:
        await fetch.end()


class _Progress:
    """Bytes of a plan as they come, with a smoothed speed."""

    def __init__(self, tally: Tally, plan: Plan) -> None:
        self._tally = tally
        self._version = plan.target.decoded.version
        self._total = plan.total_bytes
        self._done = 0
        self._of: dict[str, int] = {}
        self._counted_s = time.monotonic()
        self._speed = 0.0
        self._window_bytes = 0
        self._window_start = time.monotonic()
        self._show()

    def received(self, ref: ObjectRef, size: int) -> None:
        """Chunks come in bursts: speed is that of half a second, smoothed."""
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

    def _count(self, ref: ObjectRef, done: int) -> None:
        self._done += done - self._of.get(ref.object_id, 0)
        self._of[ref.object_id] = done
        now = time.monotonic()
        self._tally.fetch_s += now - self._counted_s
        self._counted_s = now
        self._show()

    def _show(self) -> None:
        self._tally.fetch = FetchProgress(
            target_version=self._version, bytes_done=self._done, bytes_total=self._total, bytes_per_s=self._speed
        )
