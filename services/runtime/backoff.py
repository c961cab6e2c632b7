"""The wait between attempts to reach a peer: exponential, with full jitter, and cut short by a drain."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeAlias

WaitFor: TypeAlias = Callable[[asyncio.Event, float], Awaitable[bool]]


async def set_within(event: asyncio.Event, timeout_s: float) -> bool:
    """Waits until `event` is set, at most `timeout_s`; whether it is set."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return event.is_set()
    return True


class Backoff:
    """Delays drawn uniformly from 0 to min(ceiling, base · 2^attempt).

    Full jitter spreads a hundred samplers that lost the same learner; without it they return in one wave.
    """

    def __init__(
        self,
        base_s: float = 0.5,
        ceiling_s: float = 10.0,
        uniform: Callable[[float, float], float] = random.uniform,
        wait_for: WaitFor = set_within,
    ) -> None:
        self._base_s = base_s
        self._ceiling_s = ceiling_s
        self._uniform = uniform
        self._wait_for = wait_for
        self.attempts = 0
        """Delays drawn since the last `reset`."""

    def reset(self) -> None:
        """The peer answered: the next delay is a short one."""
        self.attempts = 0

    def next_delay_s(self) -> float:
        """Draws a delay and counts the attempt."""
        bound_s = min(self._ceiling_s, self._base_s * 2 ** min(self.attempts, 30))
        self.attempts += 1
        return self._uniform(0.0, bound_s)

    async def wait(self, interrupt: asyncio.Event) -> bool:
        """Waits one delay, or until `interrupt` is set; returns whether it was: then stop trying."""
        return await self._wait_for(interrupt, self.next_delay_s())
