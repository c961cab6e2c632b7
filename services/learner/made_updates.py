"""Updates that are made because somebody asked: a keyframe of the newest version, several deltas squashed into one.

    asked ─► under way? wait for it : begin ─► encode on threads, object by object ─► kept for all who ask later

Making one takes seconds to minutes, by the size of the policy. It goes on when the one who asked gives up, so that it
is there when the same one asks again; and who needs none of them waits for none of them.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from services.learner.config import PublishSection
from services.learner.object_store import ObjectStore
from services.learner.publisher import Snapshot
from services.learner.versions import Version
from services.runtime.errors import InvalidWeightsError, UnavailableError
from services.runtime.log import get_logger
from services.wire.delta import iter_encode
from services.wire.delta.fold import iter_fold
from services.wire.types import ObjectRef, PlanStep, UpdateKind

SQUASH_PATIENCE_S = 10.0
"""A caller waits this long for a squashed delta, then takes the single deltas: they do as well and are only larger."""
KEYFRAME_PATIENCE_S = 20.0
"""A caller waits this long for a keyframe before it is told to ask again: less than the deadline of its call."""
OWED_S = 300.0
"""A caller that was told to ask again, and does so within this time, gets that keyframe though newer versions exist."""
MOST_UNDER_WAY = 2
"""No squashed delta is begun while this many updates are under way: a sampler that is always far behind would queue
ever more of them."""

_log = get_logger("learner.updates")
_Key = tuple[str, str]
"""Base root ("" for a keyframe) and target root."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Making:
    """An update that is being made."""

    task: asyncio.Task[None]
    version: Version | None
    """What a keyframe leads to."""
    sources: tuple[str, ...]
    """Objects that are read for it."""


class MadeUpdates:
    """Makes one at a time."""

    def __init__(self, store: ObjectStore, settings: PublishSection, run_id: str) -> None:
        self._store = store
        self._settings = settings
        self._run_id = run_id
        self._made: dict[_Key, PlanStep] = {}
        self._under_way: dict[_Key, _Making] = {}
        self._owed: list[tuple[float, Version]] = []
        """Until when, and versions whose keyframes were not ready in time: one for each that was told to ask again."""
        self._turn = asyncio.Lock()

    @property
    def steps(self) -> list[PlanStep]:
        """Those that are ready."""
        return list(self._made.values())

    @property
    def sources(self) -> set[str]:
        """Objects that are being read to make another."""
        return {object_id for making in self._under_way.values() for object_id in making.sources}

    async def keyframe(self, newest: Snapshot) -> Version:
        """*Waits for* a keyframe of the newest version, or the one that is being made already; *produces* the version
        that it leads to; *on cancel* it is made all the same.

        Raises UnavailableError where it takes long: whoever asks again gets that one, though the newest version may be
        another by then, and never ready in time. Raises StorageError.
        """
        version = newest.version
        self._owed = [(until, known) for until, known in self._owed if until > time.monotonic()]
        for owed in self._owed:
            if ("", owed[1].root) in self._made:
                self._owed.remove(owed)
                return owed[1]
        under_way = next((making for making in self._under_way.values() if making.version is not None), None)
        if under_way is None:
            if ("", version.root) in self._made:
                return version

            def encode() -> Iterator[bytes]:
                number, workers = version.number, self._settings.workers
                return iter_encode(None, newest.weights, run_id=self._run_id, target_version=number, workers=workers)

            under_way = self._begin(("", version.root), UpdateKind.KEYFRAME, version.number, encode, version)
        assert under_way.version is not None
        if not await _ready(under_way.task, KEYFRAME_PATIENCE_S):
            self._owed.append((time.monotonic() + OWED_S, under_way.version))
            raise UnavailableError("a keyframe is being made, which takes its time: ask again")
        return under_way.version

    async def squash(self, deltas: Sequence[PlanStep]) -> None:
        """*Waits for* the one delta that does what these consecutive ones do, some seconds; *produces* one step more,
        if it is ready then and they fold: XC deltas do not; *on cancel* it is made all the same. Raises
        CorruptObjectError for a damaged one, StorageError."""
        first, last = deltas[0], deltas[-1]
        key = (first.base_root, last.target_root)
        if key in self._made:
            return
        updates = [[self._store.path_of(ref.object_id) for ref in step.objects] for step in deltas]
        sources = [ref.object_id for step in deltas for ref in step.objects]
        if key not in self._under_way and len(self._under_way) >= MOST_UNDER_WAY:
            return
        making = self._under_way.get(key) or self._begin(
            key,
            UpdateKind.DELTA,
            last.target_version,
            lambda: iter_fold(updates, self._settings.workers),
            None,
            sources,
        )
        with contextlib.suppress(InvalidWeightsError):  # they do not fold
            await _ready(making.task, SQUASH_PATIENCE_S)

    def forget(self, step: PlanStep) -> None:
        """One whose objects are damaged or gone."""
        for key, made in list(self._made.items()):
            if made == step:
                del self._made[key]

    def forget_older(self, newest_root: str) -> None:
        """Those that lead elsewhere, but the last keyframe."""
        keyframes = [step for step in self._made.values() if step.kind is UpdateKind.KEYFRAME]
        last_keyframe = max(keyframes, key=lambda step: step.target_version, default=None)
        for key, step in list(self._made.items()):
            if step is not last_keyframe and step.target_root != newest_root:
                del self._made[key]

    def _begin(
        self,
        key: _Key,
        kind: UpdateKind,
        number: int,
        encode: Callable[[], Iterator[bytes]],
        version: Version | None,
        sources: Iterable[str] = (),
    ) -> _Making:
        def ended(task: asyncio.Task[None]) -> None:
            del self._under_way[key]
            error = None if task.cancelled() else task.exception()
            if error is not None:
                # Of deltas that do not fold: xc, or cut in parts of another size.
                say = _log.info if isinstance(error, InvalidWeightsError) else _log.warning
                say("update_not_made", kind=kind.name, to=number, error=error)

        task = asyncio.create_task(self._make(key, kind, number, encode))
        task.add_done_callback(ended)
        making = self._under_way[key] = _Making(task=task, version=version, sources=tuple(sources))
        return making

    async def _make(self, key: _Key, kind: UpdateKind, number: int, encode: Callable[[], Iterator[bytes]]) -> None:
        stopped = threading.Event()

        def store_all() -> tuple[ObjectRef, ...]:
            refs: list[ObjectRef] = []
            for part in encode():
                if stopped.is_set():
                    break
                refs.append(self._store.put(part))
            return tuple(refs)

        async with self._turn:
            try:
                objects = await asyncio.to_thread(store_all)
            except asyncio.CancelledError:
                stopped.set()  # the process ends: the thread, too, with the part that it is at
                raise
        base, target = key
        step = PlanStep(kind=kind, base_root=base, target_root=target, target_version=number, objects=objects)
        self._made[key] = step
        _log.info("update_made", kind=kind.name, to=number, bytes=sum(ref.size_bytes for ref in objects))


async def _ready(task: asyncio.Task[None], patience_s: float) -> bool:
    """Whether it ended in time; raises what ended it. The task is never cancelled."""
    done, _ = await asyncio.wait({task}, timeout=patience_s)
    if done:
        task.result()
    return bool(done)
