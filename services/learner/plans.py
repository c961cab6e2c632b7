"""The cheapest updates, in bytes, from the weights that a receiver holds to a version.

A directed graph: roots are nodes, updates are edges weighted by their bytes, a plan is a shortest path. A keyframe is
an edge from the empty root "". Stored deltas make a chain; two kinds of edge are made on demand (made_updates.py):

    keyframe of the newest version    where no path leads there, or every one is longer than a keyframe
    squashed delta                    where the shortest path has two or more deltas in a row

Receivers are placed by root, never by number: one that is ahead of a restored learner gets a plan like any other.
"""

import asyncio
import heapq
from collections.abc import Iterable, Sequence

from services.learner.config import PublishSection
from services.learner.made_updates import MadeUpdates
from services.learner.object_store import ObjectStore
from services.learner.publisher import Publisher, Snapshot
from services.learner.traffic import Traffic
from services.learner.versions import Version, VersionFiles
from services.runtime.errors import ObjectGoneError, UnavailableError
from services.runtime.log import get_logger
from services.wire.types import Plan, PlanStep, UpdateKind

_WORTH_A_KEYFRAME = 1.05
"""A new keyframe is encoded for receivers without weights once an old one and its deltas are 5 % larger."""

_log = get_logger("learner.plans")


class Planner:
    """Answers GetPlan."""

    def __init__(
        self, *, store: ObjectStore, versions: VersionFiles, publisher: Publisher, settings: PublishSection, run_id: str
    ) -> None:
        self._store = store
        self._versions = versions
        self._publisher = publisher
        self._settings = settings
        self._made = MadeUpdates(store, settings, run_id)
        self._changing = asyncio.Lock()
        """Of what is on disk; never held while an update is made."""

    async def plan(self, have_root: str, want_version: int, keyframe_only: bool = False) -> Plan:
        """The plan to `want_version` (0: the newest). `have_root` may be empty or unknown here.

        Raises ObjectGoneError for a version that does not exist or can no longer be reached.
        """
        newest = self._publisher.latest
        target = newest.version if want_version == 0 else self._versions.rows.get(want_version)
        if target is None:
            raise ObjectGoneError(f"version {want_version} is not to be had: ask for the newest")
        if have_root == target.root and not keyframe_only:
            return Plan(target=target.manifest, steps=())
        while True:
            if keyframe_only:
                target, steps = await self._keyframe(target, newest)
            else:
                steps = await self._steps(have_root, target, newest)
            broken = await asyncio.to_thread(self._first_broken, steps)
            if broken is None:
                return Plan(target=target.manifest, steps=tuple(steps))
            await self._forget(broken)

    async def collect(self, also_keep: Iterable[str], traffic: Traffic) -> None:
        """*Waits for* the disk; *produces* free space: versions beyond publish.keep_versions and on-demand updates to
        older versions are forgotten, and objects that nothing names are removed, but those that some receiver of
        `traffic` is on its way to."""
        async with self._changing:
            newest = self._publisher.latest.version
            oldest = newest.number - self._settings.keep_versions
            self._made.forget_older(newest.root)
            await asyncio.to_thread(self._versions.remove, [row for row in self._versions.rows if row <= oldest])
            named = {ref.object_id for step in self._edges() for ref in step.objects}
            on_the_way = traffic.companions(self._store.in_use())
            await asyncio.to_thread(self._store.collect, {*named, *self._made.sources, *also_keep, *on_the_way})

    async def _steps(self, have_root: str, target: Version, newest: Snapshot) -> list[PlanStep]:
        path = shortest_path(self._edges(), have_root, target.root)
        if path is not None:
            deltas = [step for step in path if step.kind is UpdateKind.DELTA]
            if len(deltas) > 1 and await asyncio.to_thread(self._first_broken, deltas) is None:
                await self._made.squash(deltas)
                path = shortest_path(self._edges(), have_root, target.root)
        if target.root == newest.version.root and (path is None or self._too_long(path)):
            try:
                await self._made.keyframe(newest)
            except UnavailableError:
                if path is None:
                    raise
            path = shortest_path(self._edges(), have_root, target.root)
        if path is None:
            raise ObjectGoneError(f"version {target.number} can no longer be reached: ask for the newest")
        return path

    async def _keyframe(self, target: Version, newest: Snapshot) -> tuple[Version, list[PlanStep]]:
        """For one who trusts nothing else: of the target; where one of an earlier version was being made, of that."""
        if target.root == newest.version.root and self._keyframe_to(target) is None:
            target = await self._made.keyframe(newest)
        step = self._keyframe_to(target)
        if step is None:
            raise ObjectGoneError(f"version {target.number} can no longer be reached: ask for the newest")
        return target, [step]

    def _keyframe_to(self, target: Version) -> PlanStep | None:
        keyframes = [edge for edge in self._keyframes() if edge.target_root == target.root]
        return min(keyframes, key=size_of, default=None)

    def _keyframes(self) -> list[PlanStep]:
        return [step for step in self._edges() if step.kind is UpdateKind.KEYFRAME]

    def _too_long(self, path: Sequence[PlanStep]) -> bool:
        """Whether a fresh keyframe would be cheaper, judged by the size of the last one."""
        last = max(self._keyframes(), key=lambda step: step.target_version, default=None)
        return last is not None and sum(map(size_of, path)) > size_of(last) * _WORTH_A_KEYFRAME

    def _edges(self) -> list[PlanStep]:
        return [row.update for row in self._versions.rows.values() if row.update is not None] + self._made.steps

    def _first_broken(self, steps: Sequence[PlanStep]) -> PlanStep | None:
        """The first that lacks an object, or has a damaged one."""
        return next((step for step in steps if not all(self._store.is_sound(ref) for ref in step.objects)), None)

    async def _forget(self, step: PlanStep) -> None:
        """No plan has this update again."""
        _log.error("update_lost", kind=step.kind.name, to=step.target_version)
        self._made.forget(step)
        async with self._changing:
            for row in list(self._versions.rows.values()):
                if row.update == step:
                    await asyncio.to_thread(self._versions.write, Version(manifest=row.manifest, update=None))


def size_of(step: PlanStep) -> int:
    """Bytes of an update's objects."""
    return sum(ref.size_bytes for ref in step.objects)


def shortest_path(edges: Iterable[PlanStep], have_root: str, target_root: str) -> list[PlanStep] | None:
    """Fewest bytes from `have_root`, or from nothing, to `target_root` (Dijkstra); None where no path leads there."""
    leaving: dict[str, list[PlanStep]] = {}
    for edge in edges:
        leaving.setdefault(edge.base_root, []).append(edge)
    best: dict[str, int] = {"": 0, have_root: 0}
    came_by: dict[str, PlanStep] = {}
    queue = [(0, root) for root in best]
    while queue:
        cost, root = heapq.heappop(queue)
        if root == target_root:
            return _walk_back(came_by, target_root)
        if cost > best[root]:
            continue
        for edge in leaving.get(root, []):
            further = cost + size_of(edge)
            if further < best.get(edge.target_root, further + 1):
                best[edge.target_root] = further
                came_by[edge.target_root] = edge
                heapq.heappush(queue, (further, edge.target_root))
    return None


def _walk_back(came_by: dict[str, PlanStep], root: str) -> list[PlanStep]:
    path: list[PlanStep] = []
    while root in came_by:
        path.insert(0, came_by[root])
        root = came_by[root].base_root
    return path
