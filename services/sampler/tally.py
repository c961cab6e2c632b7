"""What a sampler process has done since it started: the numbers behind its heartbeats, log lines and metrics."""

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from services.sampler.idle import IdleTime
from services.wire.types import FetchProgress

_SPEED_WINDOW_S = 30.0


@dataclass(slots=True, kw_only=True)
class Tally:
    """Written by the part that does the work, read by heartbeats. One event loop, no locks."""

    groups: int = 0
    """Groups scored and spooled."""
    groups_generated: int = 0
    """Groups generated."""
    groups_scored: int = 0
    """Groups scored."""
    generation_s: float = 0.0
    """Seconds that groups spent in the engine; groups overlap."""
    scoring_s: float = 0.0
    """Seconds that groups spent at the graders; groups overlap."""
    tokens: int = 0
    """Completion tokens generated."""
    weights_bytes: int = 0
    """Bytes of weight objects received."""
    fetch_s: float = 0.0
    """Seconds spent fetching weight objects."""
    versions: int = 0
    """Versions loaded."""
    keyframes_refetched: int = 0
    """Keyframes asked for because the weights on hand did not lead to the announced root."""
    versions_refused: int = 0
    """Versions that were sound as bytes but must not be loaded: NaN, other names or shapes."""
    swap_pause_s: float = 0.0
    """Pause of the last swap."""
    swap_s: float = 0.0
    """All pauses."""
    reward_restarts: int = 0
    """Restarts of the reward service, or of its workers."""
    dropped: Counter[str] = field(default_factory=Counter[str])
    """Groups given up here, by reason."""
    verdicts: Counter[str] = field(default_factory=Counter[str])
    """The learner's verdicts, by code."""
    idle: IdleTime = field(default_factory=IdleTime)
    """When the engine had no work, and why."""
    fetch: FetchProgress | None = None
    """Transfer under way."""
    clock: Callable[[], float] = time.monotonic
    _recent: deque[tuple[float, int]] = field(default_factory=deque[tuple[float, int]])

    def generated(self, tokens: int, seconds: float) -> None:
        """Counts a group."""
        self.groups_generated += 1
        self.generation_s += seconds
        self.tokens += tokens
        self._recent.append((self.clock(), tokens))

    def scored(self, seconds: float) -> None:
        """Counts a group's scoring."""
        self.groups_scored += 1
        self.scoring_s += seconds

    def swapped(self, pause_s: float) -> None:
        """Counts a swap of weights."""
        self.swap_pause_s = pause_s
        self.swap_s += pause_s
        self.idle.swapped(pause_s)

    @property
    def tokens_per_s(self) -> float:
        """Completion tokens per second over the last half minute; 0 when there were none."""
        now = self.clock()
        while self._recent and self._recent[0][0] < now - _SPEED_WINDOW_S:
            self._recent.popleft()
        if len(self._recent) < 2:
            return 0.0
        # The first entry ends at the beginning of the measured time: its tokens lie before it.
        tokens = sum(count for _, count in self._recent) - self._recent[0][1]
        return tokens / max(1e-3, now - self._recent[0][0])
