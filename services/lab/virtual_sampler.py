"""Samplers under virtual time: they draw real completions from real weights, and lie only about the hour.

Bulletin (newest version) ─► follow: wait delay.weights ─► held version
Desk (pacing, buffer) ◄───── generate: wait for room, draw, wait delay.rollouts, deliver
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from services.lab.contestants import Drawer, Drawn, Snapshot, finish_reasons
from services.lab.sum_tasks import Problems, SumTask
from services.learner.buffer import GroupBuffer, PendingGroup
from services.learner.pacing import Pacing, PacingRules
from services.learner.work import seed_of
from services.sampler.delays import Delays
from services.wire.convert import encode_group
from services.wire.types import Completion, LeasePurpose, ScoredGroup


class Bulletin:
    """The newest version, and those that somebody may still ask for."""

    def __init__(self, keep_versions: int) -> None:
        self._keep = keep_versions
        self._weights: dict[int, Snapshot] = {}
        self._changed = asyncio.Condition()
        self.version = -1

    async def publish(self, version: int, weights: Snapshot) -> None:
        self._weights[version] = weights
        self._weights.pop(version - self._keep, None)
        self.version = version
        async with self._changed:
            self._changed.notify_all()

    async def newer_than(self, version: int) -> int:
        """Waits for a version after `version`; returns the newest."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.version > version)
        return self.version

    def weights(self, version: int) -> Snapshot:
        return self._weights[version]


class Desk:
    """The learner's side of groups: numbers, room, and the buffer that decides what is trained."""

    def __init__(self, buffer: GroupBuffer, rules: PacingRules, clock: Callable[[], float]) -> None:
        self._buffer = buffer
        self._clock = clock
        self._rules = rules
        self._changed = asyncio.Condition()
        self._next_id = 0
        self.pacing = Pacing(rules, clock)
        self.out = 0
        """Groups that samplers work on, or that are on their way."""
        self.in_training = 0
        """Groups of the step in progress: as in production they take room until the version they lead to is out."""

    async def changed(self) -> None:
        """To be called after whatever makes room."""
        async with self._changed:
            self._changed.notify_all()

    async def grant(self, sampler_id: str, held: Callable[[], int], newest: Callable[[], int], count: int) -> None:
        """Waits until there is room for `count` groups and the sampler's version will not be stale on arrival."""

        def allowed() -> bool:
            waiting = len(self._buffer) + self.in_training
            if self.out + waiting and self.out + waiting + count > self._rules.room:
                return False
            needed = self.pacing.needed_version(sampler_id, newest(), self.out, waiting)
            return held() >= 0 and needed is not None and held() >= needed

        async with self._changed:
            await self._changed.wait_for(allowed)
            self.out += count

    async def deliver(self, sampler_id: str, groups: list[ScoredGroup], granted_at: float) -> None:
        """Groups arrive, `granted_at` on the clock when they were granted."""
        self.out -= len(groups)
        self.pacing.delivered(sampler_id, self._clock() - granted_at)
        self.add(sampler_id, groups)
        await self.changed()

    def add(self, sampler_id: str, groups: list[ScoredGroup]) -> None:
        """Puts groups into the buffer as production does: serialised."""
        pending: list[PendingGroup] = []
        for group in groups:
            self._next_id += 1
            pending.append(
                PendingGroup(
                    id=self._next_id,
                    sampler_id=sampler_id,
                    lease_number=self._next_id,
                    policy_version=group.policy_version,
                    payload=encode_group(group),
                    arrived=self._clock(),
                )
            )
        self._buffer.add(pending)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scribe:
    """Draws and grades whole groups."""

    task: SumTask
    drawer: Drawer
    group_size: int
    seed: int

    def write(self, count: int, key: str, version: int, weights: Snapshot) -> list[ScoredGroup]:
        """`count` groups under `weights`; problems and draws hang on the seed and `key` alone."""
        problems = self.task.draw(count, seed_of(self.seed, f"problems:{key}"))
        seed = seed_of(self.seed, f"draws:{key}")
        self.drawer.load(weights)
        drawn = self.drawer.draw(problems, self.group_size, seed)
        return scored_groups(self.task, problems, drawn, version=version, key=key, seed=seed)


def scored_groups(
    task: SumTask, problems: Problems, drawn: Drawn, *, version: int, key: str, seed: int
) -> list[ScoredGroup]:
    """Graded draws in the form in which a sampler submits them."""
    rows = zip(
        drawn.tokens_BT.tolist(),
        drawn.logprobs_BT.clamp(max=0.0).tolist(),
        drawn.length_B.tolist(),
        task.rewards(problems, drawn.tokens_BT, drawn.length_B).tolist(),
        finish_reasons(drawn),
        strict=True,
    )
    completions = [
        Completion(
            token_ids=tuple(ids[:length]),
            sampler_logprobs=tuple(logprobs[:length]),
            reward=reward,
            finish_reason=reason,
        )
        for ids, logprobs, length, reward, reason in rows
    ]
    prompts = problems.prompts_PL.tolist()
    size = len(completions) // len(prompts)
    return [
        ScoredGroup(
            lease_id=f"{key}.{index}",
            prompt_id=f"{key}.{index}",
            purpose=LeasePurpose.TRAIN,
            policy_version=version,
            policy_root="",
            prompt_token_ids=tuple(prompt),
            completions=tuple(completions[index * size : (index + 1) * size]),
            generation_s=0.0,
            scoring_s=0.0,
            temperature=1.0,
            seed=seed,
        )
        for index, prompt in enumerate(prompts)
    ]


async def run_lagging(scribe: Scribe, bulletin: Bulletin, desk: Desk, *, lag_versions: int, count: int) -> None:
    """For ever: for each version `count` groups, drawn from the policy of `lag_versions` before it (the first one in
    the beginning). Staleness is then exactly min(version, lag_versions)."""
    version = -1
    while True:
        version = await bulletin.newer_than(version)
        old = max(0, version - lag_versions)
        desk.add("lagging", scribe.write(count, f"v{version}", old, bulletin.weights(old)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """How far away a sampler is."""

    weights: Delays
    rollouts: Delays


class VirtualSampler:
    """`batch_s` is the virtual time in which it writes `count` groups, all begun under one version."""

    def __init__(
        self, sampler_id: str, scribe: Scribe, bulletin: Bulletin, desk: Desk, link: Link, *, count: int, batch_s: float
    ) -> None:
        self._id, self._scribe, self._bulletin, self._desk, self._link = sampler_id, scribe, bulletin, desk, link
        self._count, self._batch_s = count, batch_s
        self._held: tuple[int, Snapshot] = (-1, {})

    async def run(self) -> None:
        """For ever. *Consumes* versions and room; *waits for* its delays; *produces* groups."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow())
            tasks.create_task(self._generate(tasks))

    async def _follow(self) -> None:
        """As production's follower: one version at a time, then the newest; what came between is skipped. The first
        version is there when a sampler joins."""
        while True:
            version = await self._bulletin.newer_than(self._held[0])
            weights = self._bulletin.weights(version)
            if self._held[0] >= 0:
                await asyncio.sleep(self._link.weights.next_s())
            self._held = (version, weights)
            await self._desk.changed()

    async def _generate(self, tasks: asyncio.TaskGroup) -> None:
        loop, written = asyncio.get_running_loop(), 0
        while True:
            await self._desk.grant(self._id, lambda: self._held[0], lambda: self._bulletin.version, self._count)
            granted_at, (version, weights) = loop.time(), self._held
            await asyncio.sleep(self._batch_s)
            groups = self._scribe.write(self._count, f"{self._id}.{written}", version, weights)
            written += 1
            tasks.create_task(self._send(groups, granted_at))

    async def _send(self, groups: list[ScoredGroup], granted_at: float) -> None:
        """Batches travel independently: a late one does not hold up the next."""
        await asyncio.sleep(self._link.rollouts.next_s())
        await self._desk.deliver(self._id, groups, granted_at)


def staleness_histogram(counts: Mapping[int, int]) -> dict[str, int]:
    """For JSON: keys in order."""
    return {str(versions): counts[versions] for versions in sorted(counts)}
