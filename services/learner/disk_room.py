"""The disk of the learner's state: what cannot wait for another process is written again until there is room.

    refused ─► full, NOT_SERVING, one error in the log ─► tried again ─► written ─► SERVING

Groups are refused to their samplers meanwhile, which keep them; the step under way waits. Nothing is lost, and the
learner goes on by itself. Any other fault of the disk ends the process.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from services.runtime.errors import DiskFullError
from services.runtime.log import get_logger

_RETRY_S = 5.0
_T = TypeVar("_T")

_log = get_logger("learner.disk")


class DiskRoom:
    """`stopping` ends the waiting: what was not written raises then, and the process ends."""

    def __init__(self, stopping: asyncio.Event | None = None) -> None:
        self._stopping = stopping or asyncio.Event()
        self._refused: set[str] = set()
        self._changed = asyncio.Event()

    @property
    def full(self) -> bool:
        return bool(self._refused)

    def refused(self, what: str, error: DiskFullError) -> None:
        """`what` could not be written."""
        if what not in self._refused:
            self._refused.add(what)
            _log.error("disk_full", waits=what, error=error)
            self._changed.set()

    def written(self, what: str) -> None:
        """It was."""
        if what in self._refused:
            self._refused.discard(what)
            _log.info("disk_has_room", waited=what)
            self._changed.set()

    async def until_written(self, what: str, write: Callable[[], Awaitable[_T]]) -> _T:
        """*Waits for* `write` to succeed, begun anew whenever the disk was full; *produces* its result; *on cancel* as
        `write`. Raises its other errors, and DiskFullError once the process is to stop."""
        while True:
            try:
                result = await write()
            except DiskFullError as error:
                self.refused(what, error)
                if self._stopping.is_set():
                    raise
                with suppress(TimeoutError):
                    async with asyncio.timeout(_RETRY_S):
                        await self._stopping.wait()
            else:
                self.written(what)
                return result

    async def change(self) -> bool:
        """*Waits for* news; *produces* whether the disk is full now."""
        await self._changed.wait()
        self._changed.clear()
        return self.full
