"""Pause, resume and stop, as the training loop sees them."""

import asyncio
from collections.abc import Callable, Coroutine


class RunControl:
    """`stopping` is set once, by an operator or a signal; `on_stop` hears of an operator's, with the reason."""

    def __init__(self, stopping: asyncio.Event, on_stop: Callable[[str], None]) -> None:
        self.stopping = stopping
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
        self._on_stop(reason)
        self.stopping.set()

    async def wait_until_running(self) -> None:
        """*Waits for* the end of a pause, or a stop; *on cancel* nothing is lost."""
        await first_of(self._running.wait(), self.stopping.wait())


async def first_of(*waits: Coroutine[None, None, object]) -> None:
    """Waits for the first of several, and cancels the others; raises what it raised."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
