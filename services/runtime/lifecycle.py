"""How a process starts, drains and ends.

    run(main) ── signals ──► drain event ── main returns ──► exit code 0
       │            └─ a second signal ends the process at once
       ├─ systemd: READY, STATUS, STOPPING, WATCHDOG
       └─ an exception anywhere ──► the one error that explains it, raised for `services.cli` to print

`main` runs under one TaskGroup: `process.tasks`. A task that fails cancels the others, and `main`.
"""

import asyncio
import contextlib
import errno
import os
import secrets
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import cast

from services.runtime import failpoints, systemd
from services.runtime.errors import ConfigError, ExhaustedError, FencedError, HeteroRLError, RefusedError
from services.runtime.log import Logger, get_logger

_DECISIVE = (FencedError, RefusedError, ConfigError)
"""Errors that restarting does not heal: they win over the failures that they cause elsewhere in a group."""
_NO_MEMORY = "there is not enough memory: free some, or use a larger machine"


class Process:
    """What `main` gets: its tasks, its drain event, and its voice towards systemd and a terminal."""

    def __init__(self, tasks: asyncio.TaskGroup, log: Logger) -> None:
        self.tasks = tasks
        self.drain = asyncio.Event()
        """Set by the first SIGTERM, SIGINT or SIGHUP, or by `request_drain`: finish what is in flight, then return."""
        self._log = log

    def say(self, text: str) -> None:
        """A line for a person or a script, unless the terminal has gone."""
        if not self.drain.is_set():
            print(text, flush=True)

    def ready(self, status: str) -> None:
        """The process serves: systemd starts what waits for it."""
        systemd.notify("READY=1", f"STATUS={status}")

    def status(self, status: str) -> None:
        """One line for `systemctl status`."""
        systemd.notify(f"STATUS={status}")

    def request_drain(self, reason: str) -> None:
        """Begins the drain; the second call changes nothing."""
        if not self.drain.is_set():
            self._log.info("drain_started", reason=reason)
            systemd.notify("STOPPING=1", f"STATUS=draining: {reason}")
            self.drain.set()


def run(main: Callable[[Process], Coroutine[object, object, None]], name: str) -> int:
    """Runs `main` to its end and returns 0. `name` is for the log: "learner".

    Raises the HeteroRLError that explains a failure, found inside exception groups. A fault of ours (any other
    exception) is logged with its traceback under an id, and becomes a HeteroRLError that names the id.
    """
    log = get_logger(name)
    try:
        asyncio.run(_supervise(main, log))
    except Exception as error:  # the end of the process: nothing above could do better
        raise explain(error, log) from error
    return 0


async def _supervise(main: Callable[[Process], Awaitable[None]], log: Logger) -> None:
    failpoints.arm_from_environment()
    loop = asyncio.get_running_loop()
    async with asyncio.TaskGroup() as tasks:
        process = Process(tasks, log)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, _on_signal, process, number)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
            # The terminal went away. The kernel and the shell may both say so: the second one means no more.
            loop.add_signal_handler(signal.SIGHUP, process.request_drain, signal.SIGHUP.name)
        interval_s = systemd.watchdog_interval_s()
        watchdog = tasks.create_task(_watch(interval_s)) if interval_s is not None else None
        await main(process)
        if watchdog is not None:
            watchdog.cancel()


def _on_signal(process: Process, number: signal.Signals) -> None:
    if process.drain.is_set():
        with contextlib.suppress(OSError):  # the terminal may have gone
            print(f"second {number.name}: ending at once", file=sys.stderr, flush=True)
        os._exit(128 + number)
    process.request_drain(number.name)


async def _watch(interval_s: float) -> None:
    """Tells systemd that the event loop turns. It runs on the loop: a blocked loop is what it must not outlive."""
    while True:
        systemd.notify("WATCHDOG=1")
        await asyncio.sleep(interval_s)


def explain(error: BaseException, log: Logger) -> HeteroRLError:
    """The one error of ours behind `error`: a decisive one if there is one, else the first that happened."""
    leaves = list(_leaves(error))
    decisive = [leaf for leaf in leaves if isinstance(leaf, _DECISIVE)]
    first = (decisive or leaves)[0]
    for other in leaves:
        if other is not first:
            log.error("also_failed", exc_info=None if isinstance(other, HeteroRLError) else other, error=other)
    if isinstance(first, HeteroRLError):
        return first
    if (sentence := _what_the_host_lacks(first)) is not None:
        return ExhaustedError(sentence)
    # The message may travel to a peer: what the exception says stays in the log.
    identifier = secrets.token_hex(4)
    log.error("internal_error", exc_info=first, error_id=identifier)
    return HeteroRLError(f"internal error {identifier}: the log has its traceback")


def _what_the_host_lacks(error: BaseException) -> str | None:
    """One sentence for a limit of this host that was met, which is no fault of ours; None for anything else."""
    said = str(error) if isinstance(error, RuntimeError) else ""
    if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
        return "the GPU has not enough memory: lower a learner's batch.micro_batch_tokens, or use a larger one"
    if isinstance(error, MemoryError) or "allocate memory" in said:  # torch's, of the machine
        return _NO_MEMORY
    if said == "can't start new thread":
        return "no more threads can be started: raise the limit of processes (ulimit -u, TasksMax=) or of memory"
    match error.errno if isinstance(error, OSError) else None:
        case errno.EMFILE | errno.ENFILE:
            return "no more files can be opened: raise the limit of open files (ulimit -n, LimitNOFILE=)"
        case errno.EAGAIN:
            return "the host refused for now, most often more processes: raise the limit of them (ulimit -u, TasksMax=)"
        case errno.ENOMEM:
            return _NO_MEMORY
        case _:
            return None


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for member in cast("BaseExceptionGroup[BaseException]", error).exceptions:
            yield from _leaves(member)
    else:
        yield error
