"""The cheapest way, in bytes, from the weights that a receiver holds to a version.

Roots are places, updates are one-way roads whose length is their size: a plan is a shortest path. A keyframe is a road
from nowhere (""). Stored deltas make the chain; two kinds of road are built on demand, once, and kept:

    keyframe of the newest version    where no road leads there, or every one is longer than a keyframe
    squashed delta                    where the shortest way has two or more deltas in a row

Receivers are placed by root, never by number: one that is ahead of a restored learner gets a plan like any other.
"""

import asyncio
import heapq
from collections.abc import Iterable, Sequence

from services.learner.config import PublishSection
from services.learner.object_store import ObjectStore
from services.learner.publisher import Publisher, Snapshot
from services.learner.versions import Version, VersionFiles
from services.runtime.errors import InvalidWeightsError, ObjectGoneError
from services.runtime.log import get_logger
from services.wire.delta import iter_encode
from services.wire.delta.fold import iter_fold
from services.wire.types import ObjectRef, Plan, PlanStep, UpdateKind

_WORTH_A_KEYFRAME = 1.05
"""A new keyframe is encoded for receivers without weights once an old one and its deltas are 5 % larger."""

_log = get_logger("learner.plans")


class Planner:
    """Answers GetPlan; owns the updates that are made on demand."""

    def __init__(
        self, *, store: ObjectStore, versions: VersionFiles, publisher: Publisher, settings: PublishSection, run_id: str
    ) -> None:
        self._store = store
        self._versions = versions
        self._publisher = publisher
        self._settings = settings
        self._run_id = run_id
        self._made: dict[tuple[str, str], PlanStep] = {}
        self._making = asyncio.Lock()

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
        async with self._making:
            while True:
                steps = await self._steps("" if keyframe_only else have_root, target, newest, keyframe_only)
                if await asyncio.to_thread(self._sound, steps):
                    return Plan(target=target.manifest, steps=tuple(steps))

    async def collect(self, also_keep: Iterable[str]) -> None:
        """*Waits for* plans being made and the disk; *produces* free space: versions beyond publish.keep_versions and
        on-demand updates to older versions are forgotten, and objects that nothing names are removed."""
        async with self._making:
            newest = self._publisher.latest.version
            oldest = newest.number - self._settings.keep_versions
            keyframes = [step for step in self._made.values() if step.kind is UpdateKind.KEYFRAME]
            last_keyframe = max(keyframes, key=lambda step: step.target_version, default=None)
            for key, step in list(self._made.items()):
                if step is not last_keyframe and step.target_root != newest.root:
                    del self._made[key]
            await asyncio.to_thread(self._versions.remove, [row for row in self._versions.rows if row <= oldest])
            await asyncio.to_thread(self._store.collect, {*self._kept_objects(), *also_keep})

    def _kept_objects(self) -> set[str]:
        return {ref.object_id for step in self._roads() for ref in step.objects}

    async def _steps(self, have_root: str, target: Version, newest: Snapshot, keyframe_only: bool) -> list[PlanStep]:
        roads = [road for road in self._roads() if not keyframe_only or road.target_root == target.root]
        if keyframe_only:
            roads = [road for road in roads if road.kind is UpdateKind.KEYFRAME]
        path = shortest_path(roads, have_root, target.root)
        if path is not None:
            deltas = [step for step in path if step.kind is UpdateKind.DELTA]
            if len(deltas) > 1 and await asyncio.to_thread(self._sound, deltas):
                roads += await self._squash(deltas)
                path = shortest_path(roads, have_root, target.root)
        if target.root == newest.version.root and (path is None or self._too_long(path)):
            roads.append(await self._keyframe(newest))
            path = shortest_path(roads, have_root, target.root)
        if path is None:
            raise ObjectGoneError(f"version {target.number} can no longer be reached: ask for the newest")
        return path

    def _too_long(self, path: Sequence[PlanStep]) -> bool:
        """Whether a fresh keyframe would be cheaper, judged by the size of the last one."""
        keyframes = [step for step in self._roads() if step.kind is UpdateKind.KEYFRAME]
        if not keyframes:
            return False
        size = size_of(max(keyframes, key=lambda step: step.target_version))
        return sum(map(size_of, path)) > size * _WORTH_A_KEYFRAME

    def _roads(self) -> list[PlanStep]:
        return [row.update for row in self._versions.rows.values() if row.update is not None] + [*self._made.values()]

    async def _keyframe(self, newest: Snapshot) -> PlanStep:
        key = ("", newest.version.root)
        if key not in self._made:
            objects = await asyncio.to_thread(self._encode_keyframe, newest)
            self._made[key] = _road(UpdateKind.KEYFRAME, "", newest.version.root, newest.version.number, objects)
            _log.info("keyframe_made", version=newest.version.number, bytes=size_of(self._made[key]))
        return self._made[key]

    def _encode_keyframe(self, newest: Snapshot) -> list[ObjectRef]:
        number, workers = newest.version.number, self._settings.workers
        parts = iter_encode(None, newest.weights, run_id=self._run_id, target_version=number, workers=workers)
        return [self._store.put(part) for part in parts]

    async def _squash(self, deltas: Sequence[PlanStep]) -> list[PlanStep]:
        """The folded delta, or none where they do not fold (XC needs its base to be read at all)."""
        first, last = deltas[0], deltas[-1]
        key = (first.base_root, last.target_root)
        if key not in self._made:
            try:
                objects = await asyncio.to_thread(self._fold, deltas)
            except InvalidWeightsError as error:
                _log.info("delta_not_squashed", deltas=len(deltas), to=last.target_version, reason=error)
                return []
            self._made[key] = _road(UpdateKind.DELTA, *key, last.target_version, objects)
            _log.info("delta_squashed", deltas=len(deltas), to=last.target_version, bytes=size_of(self._made[key]))
        return [self._made[key]]

    def _fold(self, deltas: Sequence[PlanStep]) -> list[ObjectRef]:
        updates = [[self._store.path_of(ref.object_id) for ref in step.objects] for step in deltas]
        return [self._store.put(part) for part in iter_fold(updates)]

    def _sound(self, steps: Sequence[PlanStep]) -> bool:
        """Whether every object is there; a road with a damaged or missing object is closed."""
        for step in steps:
            if not all(self._store.is_sound(ref.object_id) for ref in step.objects):
                self._close(step)
                return False
        return True

    def _close(self, step: PlanStep) -> None:
        _log.error("update_lost", kind=step.kind.name, to=step.target_version)
        for key, made in list(self._made.items()):
            if made == step:
                del self._made[key]
        for row in list(self._versions.rows.values()):
            if row.update == step:
                self._versions.write(Version(manifest=row.manifest, update=None))


def size_of(step: PlanStep) -> int:
    """Bytes of an update's objects."""
    return sum(ref.size_bytes for ref in step.objects)


def shortest_path(roads: Iterable[PlanStep], have_root: str, target_root: str) -> list[PlanStep] | None:
    """Fewest bytes from `have_root`, or from nothing, to `target_root` (Dijkstra); None where no way leads there."""
    leaving: dict[str, list[PlanStep]] = {}
    for road in roads:
        leaving.setdefault(road.base_root, []).append(road)
    best: dict[str, int] = {"": 0, have_root: 0}
    came_by: dict[str, PlanStep] = {}
    queue = [(0, root) for root in best]
    while queue:
        cost, root = heapq.heappop(queue)
        if root == target_root:
            return _walk_back(came_by, target_root)
        if cost > best[root]:
            continue
        for road in leaving.get(root, []):
            further = cost + size_of(road)
            if further < best.get(road.target_root, further + 1):
                best[road.target_root] = further
                came_by[road.target_root] = road
                heapq.heappush(queue, (further, road.target_root))
    return None


def _walk_back(came_by: dict[str, PlanStep], root: str) -> list[PlanStep]:
    path: list[PlanStep] = []
    while root in came_by:
        path.insert(0, came_by[root])
        root = came_by[root].base_root
    return path


def _road(kind: UpdateKind, base: str, target: str, version: int, objects: Sequence[ObjectRef]) -> PlanStep:
    return PlanStep(kind=kind, base_root=base, target_root=target, target_version=version, objects=tuple(objects))
