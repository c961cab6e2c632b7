"""The child process from the parent's side: started, spoken to, and seen when it ends or hangs."""

import asyncio
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import cast

from services.reward import frames
from services.sampler.vllm_child.messages import Command, Report

_READ_BYTES = 1 << 20


class ChildEndedError(Exception):
    """The child is gone; the message says how. Never leaves the engine."""


class VllmProcess:
    """One child. `stuck_s`: it counts as hanging when it owes something and has not said anything for so long."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        stuck_s: float,
    ) -> None:
        self._process = process
        self._reader, self._writer = streams
        self._stuck_s = stuck_s
        self._stuck = False
        self._owes_since: float | None = None

    @classmethod
    async def spawn(cls, environment: Mapping[str, str], stuck_s: float) -> "VllmProcess":
        """A fresh interpreter (nothing of grpc is inherited), in a process group of its own with its workers."""
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours, limit=_READ_BYTES)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "services.sampler.vllm_child",
                str(theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the sampler: groups in flight are still to be finished
            )
        except BaseException:
            await _close(writer)
            raise
        finally:
            theirs.close()
        return cls(process, (reader, writer), stuck_s)

    @property
    def pid(self) -> int:
        return self._process.pid

    def owes(self, something: bool) -> None:
        """Whether an answer is due: only then is silence a hang."""
        if not something:
            self._owes_since = None
        elif self._owes_since is None:
            self._owes_since = time.monotonic()

    def send(self, command: Command) -> None:
        """Does not wait; what is sent to a child that has gone is lost, and `receive` tells."""
        if not self._writer.is_closing():
            self._writer.write(frames.encode(command))

    async def receive(self) -> Report:
        """The next report. Raises ChildEndedError; cancelling loses nothing but must not be followed by a call."""
        try:
            header = await self._reader.readexactly(frames.HEADER.size)
            (size,) = cast("tuple[int]", frames.HEADER.unpack(header))
            report = cast("Report", frames.decode(await self._reader.readexactly(size)))
        except (asyncio.IncompleteReadError, ConnectionError, ValueError, struct.error):
            raise ChildEndedError(await self._ending()) from None
        if self._owes_since is not None:
            self._owes_since = time.monotonic()
        return report

    async def watch(self) -> None:
        """For ever: kills the child when it hangs, which ends `receive`."""
        while True:
            await asyncio.sleep(self._stuck_s / 4)
            if self._silent():
                # This loop itself may have stood still: what has arrived meanwhile is read first.
                await asyncio.sleep(min(1.0, self._stuck_s / 4))
                if self._silent():
                    self._stuck = True
                    self.kill()

    def kill(self) -> None:
        """SIGKILL to the child and its workers."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def hang_up(self) -> int:
        """Closes the socket, which ends the child as the parent's death would. Returns its exit code."""
        await _close(self._writer)
        return await self._process.wait()

    async def close(self, grace_s: float) -> None:
        """Asks it to end, kills it after `grace_s`, and reaps it."""
        self.send({"kind": "stop"})
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._process.wait()
        self.kill()
        await self._process.wait()
        await _close(self._writer)

    def _silent(self) -> bool:
        return self._owes_since is not None and time.monotonic() - self._owes_since > self._stuck_s

    async def _ending(self) -> str:
        """How it ended. It ends soon: its end of the socket is closed; workers that outlive it are killed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(10):
                await self._process.wait()
        self.kill()
        code = await self._process.wait()
        await _close(self._writer)
        if self._stuck:
            return f"made no progress for {self._stuck_s:g} s and was killed"
        if code == -signal.SIGKILL:
            return "was killed (out of memory?)"
        return f"ended with {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()
