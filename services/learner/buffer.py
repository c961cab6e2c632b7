"""Accepted groups that wait for a step, and the one place that decides staleness.

`take` is the guarantee: every group that leaves has 0 <= learner_version - group.policy_version <= max_staleness, in
versions of the step that trains it, whatever pacing and admission did before.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum


class DropReason(StrEnum):
    STALE = "STALE_IN_BUFFER"
    FUTURE = "FUTURE_VERSION"
    TOO_OLD = "TOO_OLD"
    """Waited longer than max_age_s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingGroup:
    """`payload` is the serialised ScoredGroup: decoded groups take some ten times its memory."""

    id: int
    """Row of the journal; rises in order of arrival."""
    sampler_id: str
    lease_number: int
    policy_version: int
    payload: bytes
    arrived: float
    """Seconds on the learner's monotonic clock; starts anew when the learner restarts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    group: PendingGroup
    reason: DropReason


class GroupBuffer:
    """`on_drop` is awaited with the groups that `take` found unfit; they have left the buffer by then."""

    def __init__(
        self,
        *,
        max_staleness: int,
        max_age_s: float,
        clock: Callable[[], float],
        on_drop: Callable[[tuple[Dropped, ...]], Awaitable[None]],
    ) -> None:
        self._max_staleness = max_staleness
        self._max_age_s = max_age_s
        self._clock = clock
        self._on_drop = on_drop
        self._groups: dict[int, PendingGroup] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, groups: Iterable[PendingGroup]) -> None:
        """Adding a group that is here already changes nothing."""
        for group in groups:
            self._groups.setdefault(group.id, group)
        self._changed.set()

    async def take(self, count: int, learner_version: int) -> tuple[PendingGroup, ...]:
        """Waits until `count` groups are fit for a step from `learner_version`, and removes them: oldest policy first.

        Unfit groups are dropped at that moment. Cancelling it loses nothing: removal and return are one moment.
        """
        while True:
            self._changed.clear()
            if dropped := self._drop_unfit(learner_version):
                await self._on_drop(dropped)
                continue  # the buffer may have changed meanwhile
            if len(self._groups) >= count:
                break
            await self._changed.wait()
        oldest = sorted(self._groups.values(), key=lambda group: (group.policy_version, group.id))[:count]
        for group in oldest:
            del self._groups[group.id]
        return tuple(oldest)

    def _drop_unfit(self, learner_version: int) -> tuple[Dropped, ...]:
        dropped = tuple(
            Dropped(group=group, reason=reason)
            for group in self._groups.values()
            if (reason := self._unfit(group, learner_version)) is not None
        )
        for drop in dropped:
            del self._groups[drop.group.id]
        return dropped

    def _unfit(self, group: PendingGroup, learner_version: int) -> DropReason | None:
        staleness = learner_version - group.policy_version
        if staleness < 0:
            return DropReason.FUTURE
        if staleness > self._max_staleness:
            return DropReason.STALE
        if self._max_age_s and self._clock() - group.arrived > self._max_age_s:
            return DropReason.TOO_OLD
        return None
