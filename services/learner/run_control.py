"""Pause, resume and stop, as the training loop sees them."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

_T = TypeVar("_T")


class RunControl:
    """`stopping` is set once, by an operator or a signal; `on_stop` hears of an operator's, with the reason."""

    def __init__(self, stopping: asyncio.Event, on_stop: Callable[[str], None]) -> None:
        self.stopping = stopping
        self.asked = False
        """An operator asked for the end, so that samplers are to end too; a signal may be a restart."""
        self._on_stop = on_stop
        self._running = asyncio.Event()
        self._running.set()

    @property
    def paused(self) -> bool:
        return not self._running.is_set()

    def pause(self) -> None:
        self._running.clear()

    def resume(self) -> None:
        self._running.set()

    def stop(self, reason: str) -> None:
        self.asked = True
        self._on_stop(reason)
        self.stopping.set()

    async def wait_until_running(self) -> None:
        """*Waits for* the end of a pause, or a stop; *on cancel* nothing is lost."""
        await unless_set(self.stopping, self._running.wait())


async def unless_set(event: asyncio.Event, work: Awaitable[_T]) -> _T | None:
    """*Waits for* `work`, or for `event`, whichever is first; *produces* the result, or None with `work` cancelled; *on
    cancel* `work` is cancelled too. A result that is there when the event is set is not lost."""
    task = asyncio.ensure_future(work)
    stop = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, stop):
            one.cancel()
        await asyncio.gather(task, stop, return_exceptions=True)
