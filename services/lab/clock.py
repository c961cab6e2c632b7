"""Virtual time for asyncio: a loop whose clock jumps to the next timer as soon as nothing is left to do.

    every task waits ─► next timer at t ─► the clock says t ─► its task runs, in no time ─► …

So `asyncio.sleep(1800)` costs nothing, and what runs is ordinary asyncio code: production's buffer waits and wakes as
it does on the wall clock. One thread, no clock but this: the same program, the same run.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import TypeVar

_T = TypeVar("_T")


class VirtualDeadlockError(RuntimeError):
    """Every task waits for another one and no timer is set: in virtual time that lasts for ever."""


class _Jump(selectors.DefaultSelector):
    """Where asyncio would sleep until the next timer, adds that time to `now_s` instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if ready := super().select(0):
            return ready
        if timeout is None:
            raise VirtualDeadlockError("every task waits for another one, and no timer is set")
        self.now_s += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """`time()` starts at 0 and is in virtual seconds. No threads: work in one would take no virtual time at all."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now_s


def run_virtual(main: Coroutine[object, object, _T]) -> _T:
    """Runs `main` to its end in virtual time, as `asyncio.run` does in real time.

    Raises what `main` raises, and VirtualDeadlockError.
    """
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
