"""The waits of one reconnect loop: doubling from 0.5 to 10 s, each drawn over its whole range (full jitter), so that
many samplers do not come back at the same moment."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

LOWEST_S = 0.5
HIGHEST_S = 10.0


@dataclass(slots=True)
class Backoff:
    """`draw` gives numbers in [0, 1)."""

    draw: Callable[[], float] = random.random
    _ceiling_s: float = field(default=LOWEST_S, init=False)

    def next_s(self) -> float:
        """Seconds to wait before the next try."""
        wait = self._ceiling_s * self.draw()
        self._ceiling_s = min(HIGHEST_S, 2 * self._ceiling_s)
        return wait

    def reset(self) -> None:
        """After a try that worked."""
        self._ceiling_s = LOWEST_S
