"""How much work may be out, and for which version: so that stale groups are not made.

Room.    Groups out or waiting <= floor((max_staleness * ahead + 1) * groups_per_step). With max_staleness = 0 that is
         the step in progress and nothing else.
Arrival. A group granted now is trained max(its sampler's usual delay / time of a step, groups waiting / groups per
         step) versions later. So its policy must be at least  version - max_staleness + that many  now. A sampler too
         slow for any version gets nothing, except when fewer than one step's groups are out or waiting: then no version
         can pass it by. A pause of the learner counts as a slow step, so a starving learner admits all.

Both only save work. The guarantee is `buffer.GroupBuffer.take`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

_WEIGHT = 0.3
"""Of the newest measurement in the running means."""
_MOST_SAMPLERS = 1024
"""Whose delays are remembered, those that delivered last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PacingRules:
    groups_per_step: int
    max_staleness: int
    ahead: float

    @property
    def room(self) -> int:
        """Groups that may be out or waiting."""
        return math.floor((self.max_staleness * self.ahead + 1) * self.groups_per_step)


class Pacing:
    def __init__(self, rules: PacingRules, clock: Callable[[], float]) -> None:
        self.rules = rules
        self._clock = clock
        self._step_s: float | None = None
        self._advanced_at: float | None = None
        self._delays: dict[str, float] = {}

    def advanced(self) -> None:
        """A version was published."""
        now = self._clock()
        if self._advanced_at is not None:
            self._step_s = _mean(self._step_s, now - self._advanced_at)
        self._advanced_at = now

    def delivered(self, sampler_id: str, delay_s: float) -> None:
        """A group arrived `delay_s` after it was granted."""
        self._delays[sampler_id] = _mean(self._delays.pop(sampler_id, None), delay_s)
        if len(self._delays) > _MOST_SAMPLERS:
            del self._delays[next(iter(self._delays))]

    def needed_version(self, sampler_id: str, version: int, out: int, waiting: int) -> int | None:
        """Oldest policy that a group granted now may be written with; None when it would be stale in any case."""
        passing = 0
        if out + waiting >= self.rules.groups_per_step:
            passing = self._versions_passing(sampler_id, waiting)
        return max(0, version - self.rules.max_staleness + passing) if passing <= self.rules.max_staleness else None

    def _versions_passing(self, sampler_id: str, waiting: int) -> int:
        queue = waiting / self.rules.groups_per_step
        if self._step_s is None or self._advanced_at is None:
            return math.floor(queue)
        step_s = max(self._step_s, self._clock() - self._advanced_at, 1e-3)
        return math.floor(max(queue, self._delays.get(sampler_id, 0.0) / step_s))


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT * (new - old)
