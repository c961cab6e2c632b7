"""The objects of an update that is being made: named bit by bit, then announced whole, or given up."""

import asyncio
from dataclasses import replace

import pytest

from services.sampler.arrivals import Arrivals
from services.wire.types import Announcement, Coming, ObjectRef, PlanStep, SignedManifest, UpdateKind
from tests.support.scripted_learner import manifest_of

BASE, TARGET = "b" * 64, "d" * 64
REFS = tuple(ObjectRef(object_id=f"{number:064x}", size_bytes=10) for number in range(4))
FULL_BYTES = 1000


def coming(first: int, stop: int) -> Coming:
    return Coming(base_root=BASE, target_root=TARGET, target_version=2, first=first, objects=REFS[first:stop])


def told(first: int, stop: int) -> Announcement:
    return Announcement(manifest=signed(1, BASE), update=None, coming=coming(first, stop))


def signed(version: int, root: str) -> SignedManifest:
    return SignedManifest(manifest=b"", signature=b"", decoded=manifest_of(version, root))


def whole(refs: tuple[ObjectRef, ...] = REFS) -> Announcement:
    update = PlanStep(kind=UpdateKind.DELTA, base_root=BASE, target_root=TARGET, target_version=2, objects=refs)
    return Announcement(manifest=signed(2, TARGET), update=update)


async def all_of(arrivals: Arrivals) -> list[ObjectRef]:
    found: list[ObjectRef] = []
    while (ref := await arrivals.object(len(found))) is not None:
        found.append(ref)
    return found


async def test_objects_are_named_as_they_come_and_end_with_the_announcement() -> None:
    arrivals = Arrivals(coming(0, 1), FULL_BYTES)
    named: list[ObjectRef] = []
    arrivals.tell(named.extend)
    assert named == [REFS[0]]
    taking = asyncio.create_task(all_of(arrivals))
    arrivals.hear(told(1, 3))
    assert named == list(REFS[:3])
    await asyncio.sleep(0)
    assert not taking.done()
    arrivals.hear(whole())
    assert await taking == named == list(REFS)
    assert arrivals.over
    assert arrivals.plan is not None
    assert arrivals.plan.steps[0].objects == REFS


async def test_a_new_connection_names_them_from_the_first_again() -> None:
    arrivals = Arrivals(coming(0, 2), FULL_BYTES)
    arrivals.hear(told(0, 3))
    arrivals.hear(whole())
    assert await all_of(arrivals) == list(REFS)


OTHERS = [
    Announcement(manifest=signed(1, BASE), update=None),
    Announcement(manifest=signed(1, BASE), update=None, coming=replace(coming(0, 1), target_root="e" * 64)),
    Announcement(manifest=signed(1, BASE), update=None, coming=replace(coming(0, 1), base_root="e" * 64)),
    told(3, 4),
    Announcement(manifest=signed(1, BASE), update=None, coming=replace(coming(2, 3), target_version=3)),
    Announcement(manifest=signed(2, "e" * 64), update=None, coming=coming(2, 3)),
    whole(REFS[1:]),
    replace(whole(), update=replace(whole().update, target_root="e" * 64)),  # type: ignore[type-var]
    Announcement(manifest=signed(1, BASE), update=None, coming=replace(coming(0, 1), objects=REFS[2:])),
    replace(told(2, 2), coming=replace(coming(2, 2), objects=(ObjectRef(object_id="f" * 64, size_bytes=1 << 40),))),
]


async def test_the_root_may_be_named_late() -> None:
    arrivals = Arrivals(replace(coming(0, 1), target_root=""), FULL_BYTES)
    arrivals.hear(replace(told(1, 3), coming=replace(coming(1, 3), target_root="")))
    arrivals.hear(told(3, 4))
    arrivals.hear(replace(told(0, 1), coming=replace(coming(0, 1), target_root="")))
    arrivals.hear(whole())
    assert await all_of(arrivals) == list(REFS)
    assert arrivals.plan is not None


@pytest.mark.parametrize("other", OTHERS)
async def test_anything_else_gives_it_up(other: Announcement) -> None:
    arrivals = Arrivals(coming(0, 2), FULL_BYTES)
    taking = asyncio.create_task(all_of(arrivals))
    await asyncio.sleep(0)
    arrivals.hear(other)
    assert await taking in ([], list(REFS[:2]))
    assert arrivals.over
    assert arrivals.plan is None
    assert await arrivals.object(0) is None


async def test_an_announcement_of_more_than_the_weights_is_no_plan() -> None:
    huge = ObjectRef(object_id="f" * 64, size_bytes=1 << 40)
    arrivals = Arrivals(coming(0, 4), FULL_BYTES)
    arrivals.hear(whole((*REFS, huge)))
    assert arrivals.plan is None
    assert await all_of(arrivals) == []
