"""The pool's side of its processes: the nursery, and one handle per worker that it forked."""

import asyncio
import json
import math
import os
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import cast

from services.reward import frames, nursery
from services.reward.graders import Permissions
from services.reward.worker import Limits
from services.runtime.errors import EngineError

START_S = 60.0
END_S = 10.0
LOAD_S = 60.0
# A worker killed by the clock was computing if it had used at least this share of its CPU seconds: ordinary answers
# need less, and the rest of the wall time it may have waited for a core of a busy machine.
CPU_SHARE_OF_ANSWER = 0.1
_NAMES = {one.value: one.name for one in signal.Signals}


class FaultKind(StrEnum):
    """Whose fault it was that a worker had to be replaced."""

    ANSWER = "answer"
    GRADER = "grader"
    NURSERY = "nursery"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why a worker gave no score."""

    kind: FaultKind
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a worker ended: by a signal, or with an exit code."""

    signal: int
    code: int
    cpu_s: float


class WorkerHandle:
    """One worker. After a Fault it is dead and may not be used again."""

    def __init__(
        self,
        number: int,
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        ended: asyncio.Future[Ended],
        owner: "Nursery",
    ) -> None:
        self._number = number
        self._reader, self._writer = streams
        self._ended = ended
        self._owner = owner
        self._cpu_s = 0.0
        self.items = 0

    async def send(self, job: object) -> None:
        """Hands over a job; a worker that is gone shows itself in `reply`."""
        with suppress(ConnectionError):
            self._writer.write(frames.encode(job))
            await self._writer.drain()

    async def ready(self, *, importing: bool, wall_s: float) -> Fault | None:
        """Waits until it has the job's graders; a fault if it died or hung meanwhile, which another worker may not.

        Waits LOAD_S instead of `wall_s` where modules may have to be imported. Raises EngineError if they cannot be
        imported here: that is no completion's fault.
        """
        started = asyncio.get_running_loop().time()
        reply = await self.reply(wall_s=LOAD_S if importing else wall_s, cpu_s=math.inf)
        if isinstance(reply, Fault):
            if not importing or asyncio.get_running_loop().time() - started < LOAD_S:
                return reply
            raise EngineError(f"the graders' modules are not imported within {LOAD_S:g} s")
        if reply["kind"] == "unloadable":
            raise EngineError(str(reply["reason"]))
        return None

    async def reply(self, *, wall_s: float, cpu_s: float) -> dict[str, object] | Fault:
        """The reply to the job's next item, or whose fault it is that there is none. Waits at most `wall_s`."""
        try:
            async with asyncio.timeout(wall_s):
                header = await self._reader.readexactly(frames.HEADER.size)
                (size,) = frames.HEADER.unpack(header)
                if size > frames.FRAME_BYTES_MAX:
                    return Fault(kind=FaultKind.GRADER, reason="the worker sent more than a score")
                message = cast("dict[str, object]", frames.decode(await self._reader.readexactly(size)))
                kind, self._cpu_s = message["kind"], float(cast("float", message["cpu_s"]))
        except TimeoutError:
            return await self._timed_out(wall_s, cpu_s)
        except (asyncio.IncompleteReadError, ConnectionError):
            return await self._died(cpu_s)
        except (ValueError, TypeError, KeyError):  # something that a grader wrote
            return Fault(kind=FaultKind.GRADER, reason="the worker sent no score")
        match kind:
            case "memory":
                return Fault(kind=FaultKind.ANSWER, reason="over the limit of memory")
            case "failed":
                return Fault(kind=FaultKind.GRADER, reason=str(message["reason"]))
            case "ready" | "unloadable":
                return message
            case _:
                self.items += 1
                return message

    def kill(self) -> None:
        """Ends the process at once; harmless if it has ended."""
        self._owner.kill(self._number)
        self._writer.close()

    async def _timed_out(self, wall_s: float, cpu_s: float) -> Fault:
        self._owner.kill(self._number)
        ended = await self._wait_ended()
        if ended is not None and ended.cpu_s - self._cpu_s >= CPU_SHARE_OF_ANSWER * cpu_s:
            return Fault(kind=FaultKind.ANSWER, reason=f"over the limit of {wall_s:g} s")
        return Fault(kind=FaultKind.GRADER, reason=f"the grader hung for {wall_s:g} s without computing")

    async def _died(self, cpu_s: float) -> Fault:
        ended = await self._wait_ended()
        if ended is None:
            return Fault(kind=FaultKind.NURSERY, reason="the worker and its nursery died")
        if ended.signal == signal.SIGPROF:
            return Fault(kind=FaultKind.ANSWER, reason=f"over the limit of {cpu_s:g} CPU seconds")
        if ended.code == nursery.EXIT_MEMORY:
            return Fault(kind=FaultKind.ANSWER, reason="over the limit of memory")
        how = _NAMES.get(ended.signal, f"signal {ended.signal}") if ended.signal else f"exit code {ended.code}"
        return Fault(kind=FaultKind.GRADER, reason=f"the worker died with {how}")

    async def _wait_ended(self) -> Ended | None:
        try:
            async with asyncio.timeout(END_S):
                return await asyncio.shield(self._ended)
        except (TimeoutError, EngineError):
            return None


class Nursery:
    """The process that forks workers. One per pool; a dead one is not used again."""

    def __init__(self, control: socket.socket, process: asyncio.subprocess.Process) -> None:
        self._control = control
        self._process = process
        self._ended: dict[int, asyncio.Future[Ended]] = {}
        self._numbers = 0
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.alive = True

    @property
    def pid(self) -> int:
        return self._process.pid

    @classmethod
    async def start(cls, limits: Limits, permissions: Permissions) -> "Nursery":
        """Starts it and waits until it can fork. Raises EngineError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        # The child finds the same modules as this process, a script's own folder included.
        path = os.pathsep.join(one for one in sys.path if one)
        # What an operator's grader prints is seen, although a worker's end flushes nothing.
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        process = await asyncio.create_subprocess_exec(
            *nursery.arguments(theirs, limits, permissions),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sys.__stderr__,  # `reward score --json` writes to stdout
            pass_fds=[theirs.fileno()],
            env=environment,
        )
        theirs.close()
        self = cls(ours, process)
        asyncio.get_running_loop().add_reader(ours.fileno(), self._on_control)
        try:
            async with asyncio.timeout(START_S):
                await self._ready
        except (TimeoutError, EngineError) as error:
            await self.close()
            raise EngineError("The grader processes do not start; is the package math-verify installed?") from error
        return self

    async def fork(self) -> WorkerHandle:
        """A fresh worker. Raises EngineError if the nursery is gone."""
        self._numbers += 1
        number = self._numbers
        ours, theirs = socket.socketpair()
        ended = self._ended[number] = asyncio.get_running_loop().create_future()
        # Nobody may ask how a worker ended that was killed while idle.
        ended.add_done_callback(lambda future: future.cancelled() or future.exception())
        try:
            command = json.dumps({"do": "fork", "worker": number}).encode()
            socket.send_fds(self._control, [command], [theirs.fileno()])
        except OSError as error:
            ours.close()
            raise EngineError("The grader processes are gone.") from error
        finally:
            theirs.close()
        return WorkerHandle(number, await asyncio.open_unix_connection(sock=ours), ended, self)

    def kill(self, number: int) -> None:
        """Kills a worker by its number; its end is reported like any other."""
        if number in self._ended:
            with suppress(OSError):
                self._control.send(json.dumps({"do": "kill", "worker": number}).encode())

    async def close(self) -> None:
        """Ends the nursery and with it every worker."""
        self._gone()
        try:
            async with asyncio.timeout(END_S):
                await self._process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    def _on_control(self) -> None:
        try:
            data = self._control.recv(nursery.CONTROL_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._gone()
            return
        message = json.loads(data)
        if not message:
            self._ready.set_result(None)
            return
        ended = self._ended.pop(message.pop("worker"), None)
        if ended is not None and not ended.done():
            ended.set_result(Ended(**message))

    def _gone(self) -> None:
        if not self.alive:
            return
        self.alive = False
        asyncio.get_running_loop().remove_reader(self._control.fileno())
        self._control.close()
        error = EngineError("The grader processes are gone.")
        for future in (self._ready, *self._ended.values()):
            if not future.done():
                future.set_exception(error)
                future.exception()
        self._ended.clear()
