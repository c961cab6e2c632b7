"""The disk of the learner's state: what cannot wait for another process is written again until there is room.

    refused ─► full, NOT_SERVING, one error in the log ─► tried again ─► written ─► SERVING

Groups are refused to their samplers meanwhile, which keep them; the step under way waits. Nothing is lost, and the
learner goes on by itself. Any other fault of the disk ends the process.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from services.runtime.backoff import set_within
from services.runtime.errors import DiskFullError
from services.runtime.log import get_logger

_RETRY_S = 5.0
_FORGOTTEN_S = 60.0
"""A refused write that was not tried again for this long says no more that the disk is full."""
_T = TypeVar("_T")

_log = get_logger("learner.disk")


class DiskRoom:
    """`stopping` ends the waiting: what was not written raises then, and the process ends."""

    def __init__(self, stopping: asyncio.Event | None = None) -> None:
        self._stopping = stopping or asyncio.Event()
        self._refused: dict[str, float] = {}
        """What waits, and when it was refused last."""
        self._changed = asyncio.Event()

    @property
    def full(self) -> bool:
        return bool(self._refused)

    def refused(self, what: str, error: DiskFullError) -> None:
        """`what` could not be written."""
        if what not in self._refused:
            _log.error("disk_full", waits=what, error=error)
            self._changed.set()
        self._refused[what] = time.monotonic()

    def written(self, what: str) -> None:
        """`what` could be written."""
        if what in self._refused:
            del self._refused[what]
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
                await set_within(self._stopping, _RETRY_S)
            else:
                self.written(what)
                return result

    async def change(self) -> bool:
        """*Waits for* news, or until what was refused is long ago; *produces* whether the disk is full now."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_FORGOTTEN_S if self._refused else None):
                await self._changed.wait()
        self._changed.clear()
        since_s = time.monotonic() - _FORGOTTEN_S
        for what in [what for what, refused_s in self._refused.items() if refused_s < since_s]:
            self.written(what)
        return self.full
