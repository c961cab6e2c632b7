"""Versions become durable before they are announced, and survive a restart."""

import asyncio
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from services.learner import publisher
from services.learner.object_store import ObjectStore
from services.runtime import failpoints
from services.runtime.errors import HeteroRLError, StorageError
from services.wire.delta import compiled, layout, root_of
from services.wire.delta.part import read_info
from services.wire.types import ObjectRef, PlanStep
from tests.unit.learner.weights_of_tests import carry_out, make_weights, nudged, open_shop


async def test_version_zero_is_a_keyframe_and_the_next_a_small_delta(tmp_path: Path) -> None:
    shop = open_shop(tmp_path)
    first, second = make_weights(1), nudged(make_weights(1), 2)
    zero = await shop.publisher.publish(0, first)
    one = await shop.publisher.publish(1, second)
    assert zero.root == root_of(first)
    assert one.root == root_of(second)
    assert one.update_bytes < zero.update_bytes / 10
    manifest = shop.publisher.latest.version.manifest.decoded
    assert (manifest.version, manifest.parent_root, manifest.changed) == (1, zero.root, 400)


async def test_encoding_gives_way_to_training_and_nothing_else_does(tmp_path: Path) -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    niceness: list[int] = []
    shop = open_shop(tmp_path)
    make = shop.publisher._make

    def made(*arguments: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            niceness.append(pool.submit(os.getpriority, os.PRIO_PROCESS, 0).result())
        return make(*arguments)

    shop.publisher._make = made  # type: ignore[method-assign]
    await shop.publisher.publish(0, make_weights(1))
    assert niceness == [min(19, before + 5) if sys.platform == "linux" else before]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


async def test_only_for_a_large_policy_is_the_comparison_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_kernels", None)
    weights = make_weights(1)
    small, large = open_shop(tmp_path / "small"), open_shop(tmp_path / "large")
    await small.publisher.publish(0, weights)
    await small.publisher.publish(1, nudged(weights, 2))
    assert compiled._kernels is None
    monkeypatch.setattr(publisher, "_COMPILED_FROM_BYTES", 1)
    await large.publisher.publish(0, weights)
    await large.publisher.publish(1, nudged(weights, 2))  # after it, on the same thread
    assert compiled._kernels is not None
    assert large.publisher.latest.version.root == small.publisher.latest.version.root


async def test_a_failure_before_the_row_leaves_the_old_version_and_its_baseline(tmp_path: Path) -> None:
    shop = open_shop(tmp_path)
    weights = make_weights(1)
    await shop.publisher.publish(0, weights)
    failpoints.arm("publish.after_objects=1*error->off")
    try:
        with pytest.raises(StorageError):
            await shop.publisher.publish(1, nudged(weights, 2))
    finally:
        failpoints.arm("")
    assert shop.publisher.latest.version.number == 0
    assert list(open_shop(tmp_path).versions.rows) == [0]
    other = nudged(weights, 3)
    await shop.publisher.publish(1, other)
    plan = await shop.planner.plan(root_of(weights), 0)
    assert carry_out(shop, plan, weights) is not None


async def test_objects_are_told_of_while_the_disk_works_and_the_version_once_they_are_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = open_shop(tmp_path)
    weights = make_weights(1)
    await shop.publisher.publish(0, weights)
    disk = threading.Event()
    synced: list[str] = []

    def sync(ref: ObjectRef) -> None:
        assert disk.wait(30)
        ObjectStore.sync(shop.store, ref)
        synced.append(ref.object_id)

    monkeypatch.setattr(shop.store, "sync", sync)
    news = await shop.publisher.wait_for_news(None)
    publishing = asyncio.create_task(shop.publisher.publish(1, nudged(weights, 2)))
    async with asyncio.timeout(30):
        told = await shop.publisher.wait_for_news(news)
    assert told.coming is not None
    assert told.version.number == 0
    assert all(shop.store.is_sound(ref) for ref in told.coming.objects), "a reader gets it at once"
    assert not synced
    assert not publishing.done()
    disk.set()
    await publishing
    assert synced == [ref.object_id for ref in told.coming.objects]
    assert shop.publisher.latest.version.number == 1


async def test_weights_that_did_not_change_make_a_version_without_an_update(tmp_path: Path) -> None:
    shop = open_shop(tmp_path)
    weights = make_weights(1)
    await shop.publisher.publish(0, weights)
    await shop.publisher.publish(1, nudged(weights, 2, changes=0))
    later = nudged(weights, 3)
    await shop.publisher.publish(2, later)
    await shop.publisher.publish(3, nudged(later, 4))
    plan = await shop.planner.plan(root_of(weights), 0)
    assert len(plan.steps) == 1, "deltas around it still fold into one"
    result = carry_out(shop, plan, weights)
    assert result is not None
    assert root_of(result) == plan.target.decoded.root


@pytest.mark.parametrize("root_last", [False, True])
async def test_the_root_is_in_each_part_where_somebody_needs_it_there(
    tmp_path: Path, root_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "CHUNK_ELEMENTS", 2000)
    monkeypatch.setattr(layout, "PART_BYTES", 16_000)
    shop = open_shop(tmp_path, root_last=root_last)
    await shop.publisher.publish(0, first := make_weights(1))
    told: list[PlanStep | None] = []
    tell = shop.publisher._tell

    def hear(coming: PlanStep | None) -> None:
        told.append(coming)
        tell(coming)

    monkeypatch.setattr(shop.publisher, "_tell", hear)
    await shop.publisher.publish(1, second := nudged(first, 2))
    update = shop.versions.rows[1].update
    assert update is not None
    roots = [read_info(shop.store.path_of(ref.object_id).read_bytes()).target_root for ref in update.objects]
    early = "" if root_last else root_of(second)
    assert roots == [early] * (len(roots) - 1) + [root_of(second)]
    assert len(roots) > 2
    assert [coming.target_root for coming in told if coming is not None] == roots
    await shop.publisher.publish(2, nudged(second, 3, changes=0))
    assert [coming for coming in told[len(roots) + 1 :] if coming is not None] == [], "nothing changed"
    assert shop.versions.rows[2].update is None


async def test_watchers_get_the_newest_version_and_skip_what_came_between(tmp_path: Path) -> None:
    shop = open_shop(tmp_path)
    weights = make_weights(1)
    await shop.publisher.publish(0, weights)
    seen = await shop.publisher.wait_for_news(None)
    waiting = asyncio.create_task(shop.publisher.wait_for_news(seen))
    await asyncio.sleep(0)
    assert not waiting.done()
    for version in (1, 2, 3):
        weights = nudged(weights, version)
        await shop.publisher.publish(version, weights)
    await waiting
    news = await shop.publisher.wait_for_news(seen)
    assert (news.version.number, news.coming) == (3, None)


async def test_a_restore_forgets_later_versions_and_announces_under_the_new_epoch(tmp_path: Path) -> None:
    shop = open_shop(tmp_path)
    history = [make_weights(1)]
    await shop.publisher.publish(0, history[0])
    for version in (1, 2, 3):
        history.append(nudged(history[-1], version))
        await shop.publisher.publish(version, history[-1])
    again = open_shop(tmp_path, epoch=2)
    await again.publisher.restore(2, history[2], root_of(history[2]))
    manifest = again.publisher.latest.version.manifest.decoded
    assert (manifest.version, manifest.learner_epoch, manifest.parent_root) == (2, 2, "")
    assert sorted(again.versions.rows) == [0, 1, 2]
    ahead = await again.planner.plan(root_of(history[3]), 0)
    assert [step.kind.name for step in ahead.steps] == ["KEYFRAME"], "one that is ahead is placed by its root"


async def test_damaged_checkpoint_weights_are_refused(tmp_path: Path) -> None:
    shop = open_shop(tmp_path)
    with pytest.raises(HeteroRLError, match="damaged"):
        await shop.publisher.restore(0, make_weights(1), root_of(make_weights(2)))
