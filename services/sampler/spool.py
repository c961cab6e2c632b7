"""Scored groups on disk until the learner has them: `SpoolFile` on a thread of its own, with its limits as events.

append ──► below 80 %: all goes on │ from 80 %: `leasing_room` clears │ from 100 %, or disk full: `room` clears
acknowledged ──► delete_through ──► the events come back
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from services.runtime.errors import DiskFullError
from services.runtime.log import get_logger
from services.sampler.spool_file import SpoolFile
from services.wire.types import GroupEnvelope

_log = get_logger("sampler.spool")
_LEASING_SHARE = 0.8
RETRY_S = 5.0
"""A disk that was full is tried again."""
_T = TypeVar("_T")


class Spool:
    """Open with `await Spool.open(...)`, then `bind` it to the run that the learner names."""

    def __init__(self, file: SpoolFile, thread: ThreadPoolExecutor, max_bytes: int) -> None:
        self._file = file
        self._thread = thread
        self.max_bytes = max_bytes
        """Budget of payload bytes."""
        self._owed_seq = 0
        """Acknowledged through here, but the disk was too full to forget it; 0 for nothing."""
        self._refused = 0
        """Groups that wait for room on the disk."""
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

    async def bind(self, run_id: str, sampler_id: str) -> None:
        """Groups of another run, or of another sampler, are set aside, never submitted."""
        await self._call(lambda: self._file.bind(run_id, sampler_id))
        await self._measure()

    async def append(self, payload: bytes) -> int:
        """Returns the group's seq when it is durable. While the disk is full it waits and tries again: the group is
        never lost, and `room` is clear meanwhile. Raises StorageError when the disk fails."""
        seq = await self._append(payload)
        self.groups += 1
        self.bytes += len(payload)
        self.first_seq = self.first_seq or seq
        self.next_seq = seq + 1
        self._signal()
        self.grew.set()
        return seq

    async def _append(self, payload: bytes) -> int:
        """Whoever waits for the disk tries again; a lease that is lost meanwhile ends it, and must not leave `room`
        clear with nobody to try."""
        waiting = False
        try:
            while True:
                try:
                    seq = await self._call(lambda: self._file.append(payload))
                except DiskFullError as error:
                    if not waiting:
                        waiting = True
                        self._wait_begins(error)
                    await asyncio.sleep(RETRY_S)
                else:
                    return seq
        finally:
            if waiting:
                self._refused -= 1
                self._signal()
                _log.info("spool_waits_no_more", groups=self._refused)

    async def read_from(self, seq: int, max_bytes: int) -> list[GroupEnvelope]:
        """Groups in order from `seq`; one at least if there is one."""
        return await self._call(lambda: self._file.read_from(seq, max_bytes))

    async def delete_through(self, seq: int) -> None:
        """Only an acknowledgement may lead here. A disk too full even for that keeps the groups until `forget_owed`."""
        if self.first_seq and seq >= self.first_seq:
            try:
                await self._call(lambda: self._file.delete_through(seq))
            except DiskFullError as error:
                if not self._owed_seq:
                    _log.warning("spool_cannot_forget", error=error, retry_s=RETRY_S)
                self._owed_seq = max(self._owed_seq, seq)
                return
            if seq >= self._owed_seq:
                self._owed_seq = 0
            await self._measure()

    @property
    def owes(self) -> bool:
        """Whether acknowledged groups are still there."""
        return self._owed_seq > 0

    async def forget_owed(self) -> None:
        """Tries again."""
        await self.delete_through(self._owed_seq)

    async def renumber(self) -> None:
        """See SpoolFile.renumber."""
        await self._call(self._file.renumber)
        self._owed_seq = 0
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
        full = self._refused > 0 or self.bytes >= self.max_bytes
        _switch(self.room, not full)
        _switch(self.empty, self.groups == 0)
        _switch(self.leasing_room, not full and self.bytes < _LEASING_SHARE * self.max_bytes)

    def _wait_begins(self, error: DiskFullError) -> None:
        if not self._refused:
            _log.error("spool_cannot_write", error=error, retry_s=RETRY_S)
        self._refused += 1
        self._signal()


def _switch(event: asyncio.Event, on: bool) -> None:
    (event.set if on else event.clear)()
