"""The objects of an update while the learner is still making it, so that it is fetched and decoded meanwhile.

    coming ─► refs … ─► coming ─► refs … ─► announcement of the version with this update ─► plan
                                 └─► anything else: given up, and the version is followed as if nothing had come

Nothing here is believed: what the objects make is used once a signed manifest has its root.
"""

import asyncio
from collections.abc import Callable, Iterable

from services.wire.types import TABLES_BYTES, Announcement, Coming, ObjectRef, Plan, PlanStep


class Arrivals:
    """Of one update, which begins with `coming`. `most_bytes` is the size of the whole weights."""

    def __init__(self, coming: Coming, most_bytes: int) -> None:
        self.base_root = coming.base_root
        self.target_version = coming.target_version
        self._target_root = coming.target_root
        """Empty while the learner does not know it."""
        self.plan: Plan | None = None
        """The whole of it, once it is announced; None where it was given up."""
        self.over = False
        """Whether no more will come."""
        self._left_bytes = most_bytes + TABLES_BYTES
        self.refs: tuple[ObjectRef, ...] = ()
        """Those that were named."""
        self._named: Callable[[Iterable[ObjectRef]], None] = _nobody
        self._news = asyncio.Event()
        self._add(coming.objects)

    def tell(self, named: Callable[[Iterable[ObjectRef]], None]) -> None:
        """`named` hears of each object at once: of those so far now."""
        self._named = named
        named(self.refs)

    def hear(self, announcement: Announcement) -> None:
        """Takes what belongs to this update; anything else ends it."""
        update, coming = announcement.update, announcement.coming
        known = len(self.refs)
        if (
            coming is not None
            and self._is_ours(coming)
            and announcement.manifest.decoded.root == self.base_root
            and coming.first <= known
            and _agree(coming.objects, self.refs[coming.first :])
        ):
            self._target_root = self._target_root or coming.target_root
            self._add(coming.objects[known - coming.first :])
            return
        if update is not None and self._is_ours(update) and update.objects[:known] == self.refs:
            self._add(update.objects[known:])
            self.plan = None if self.over else Plan(target=announcement.manifest, steps=(update,))
        self.give_up()

    def _is_ours(self, update: Coming | PlanStep) -> bool:
        if self._target_root and update.target_root not in ("", self._target_root):
            return False
        return (update.base_root, update.target_version) == (self.base_root, self.target_version)

    def give_up(self) -> None:
        """Nothing more will come, unless the plan is there."""
        self.over = True
        self._news.set()

    async def object(self, number: int) -> ObjectRef | None:
        """*Waits for* the object of that number to be named; *produces* it, or None where there is none."""
        while number >= len(self.refs) and not self.over:
            self._news.clear()
            await self._news.wait()
        given_up = self.over and self.plan is None
        return None if given_up or number >= len(self.refs) else self.refs[number]

    def _add(self, refs: tuple[ObjectRef, ...]) -> None:
        self._left_bytes -= sum(ref.size_bytes for ref in refs)
        if self._left_bytes < 0:
            self.give_up()
            return
        self.refs += refs
        self._named(refs)
        self._news.set()


def _agree(named: Iterable[ObjectRef], known: Iterable[ObjectRef]) -> bool:
    """Whether objects that are named again are the same: an update that was given up is made again under its number."""
    return all(one == other for one, other in zip(named, known, strict=False))


def _nobody(_: Iterable[ObjectRef]) -> None: ...
