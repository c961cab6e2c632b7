"""Scored groups on disk until the learner has them: `SpoolFile` on a thread of its own, with its limits as events.

append ──► below 80 %: all goes on │ from 80 %: `leasing_room` clears │ from 100 %, or disk full: `room` clears
acknowledged ──► delete_through ──► the events come back
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from services.runtime.errors import StorageError
from services.runtime.log import get_logger
from services.sampler.spool_file import SpoolFile
from services.wire.types import GroupEnvelope

_log = get_logger("sampler.spool")
_LEASING_SHARE = 0.8
_RETRY_S = 5.0
_T = TypeVar("_T")


class Spool:
    """Open with `await Spool.open(...)`, then `bind` it to the run that the learner names."""

    def __init__(self, file: SpoolFile, thread: ThreadPoolExecutor, max_bytes: int) -> None:
        self._file = file
        self._thread = thread
        self.max_bytes = max_bytes
        """Budget of payload bytes."""
        self._disk_full = False
        self.groups = 0
        """Groups on disk."""
        self.bytes = 0
        """Their payload bytes."""
        self.first_seq = 0
        """Lowest seq on disk; 0 when empty."""
        self.next_seq = 1
        """Seq of the next group."""
        self.room = asyncio.Event()
        """Set while generating may go on."""
        self.leasing_room = asyncio.Event()
        """Set while leasing may go on."""
        self.empty = asyncio.Event()
        """Set while there are no groups."""
        self.grew = asyncio.Event()
        """Set by every append; the submitter clears it."""

    @classmethod
    async def open(cls, path: Path, max_bytes: int) -> "Spool":
        """Opens or makes the file; a damaged one is renamed and logged. Raises StorageError."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="spool")
        file = await asyncio.get_running_loop().run_in_executor(thread, SpoolFile, path)
        spool = cls(file, thread, max_bytes)
        await spool._measure()
        return spool

    @property
    def spool_id(self) -> str:
        return self._file.spool_id

    @property
    def run_id(self) -> str:
        """Run that the spool was last bound to; empty for none."""
        return self._file.run_id

    async def bind(self, run_id: str) -> None:
        """Groups of another run are set aside, never submitted."""
        await self._call(lambda: self._file.bind(run_id))
        await self._measure()

    async def append(self, payload: bytes) -> int:
        """Returns the group's seq when it is durable. While the disk is full it waits and tries again: the group is
        never lost, and `room` is clear meanwhile."""
        while True:
            try:
                seq = await self._call(lambda: self._file.append(payload))
            except StorageError as error:
                await self._wait_for_disk(error)
                continue
            if self._disk_full:
                _log.info("spool_writes_again")
            self._disk_full = False
            self.groups += 1
            self.bytes += len(payload)
            self.first_seq = self.first_seq or seq
            self.next_seq = seq + 1
            self._signal()
            self.grew.set()
            return seq

    async def read_from(self, seq: int, max_bytes: int) -> list[GroupEnvelope]:
        """Groups in order from `seq`; one at least if there is one."""
        return await self._call(lambda: self._file.read_from(seq, max_bytes))

    async def delete_through(self, seq: int) -> None:
        """Only an acknowledgement may lead here."""
        if self.first_seq and seq >= self.first_seq:
            await self._call(lambda: self._file.delete_through(seq))
            await self._measure()

    async def renumber(self) -> None:
        """See SpoolFile.renumber."""
        await self._call(self._file.renumber)
        await self._measure()

    async def close(self) -> None:
        await self._call(self._file.close)
        self._thread.shutdown()

    async def _call(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _measure(self) -> None:
        self.groups, self.bytes, self.first_seq, self.next_seq = await self._call(self._file.measure)
        self._signal()

    def _signal(self) -> None:
        full = self._disk_full or self.bytes >= self.max_bytes
        _switch(self.room, not full)
        _switch(self.empty, self.groups == 0)
        _switch(self.leasing_room, not full and self.bytes < _LEASING_SHARE * self.max_bytes)

    async def _wait_for_disk(self, error: StorageError) -> None:
        if not self._disk_full:
            _log.error("spool_cannot_write", error=error, retry_s=_RETRY_S)
        self._disk_full = True
        self._signal()
        await asyncio.sleep(_RETRY_S)


def _switch(event: asyncio.Event, on: bool) -> None:
    (event.set if on else event.clear)()
