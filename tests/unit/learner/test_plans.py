"""Any version from any other, in one plan, with the fewest bytes."""

from dataclasses import replace
from pathlib import Path

import pytest

from services.learner.plans import shortest_path, size_of
from services.learner.traffic import Traffic
from services.learner.versions import Version
from services.runtime.errors import ObjectGoneError
from services.wire.delta import Weights, root_of
from services.wire.types import ObjectRef, PlanStep, UpdateKind
from tests.unit.learner.weights_of_tests import Shop, carry_out, make_weights, nudged, open_shop


async def publish_history(shop: Shop, versions: int, changes: int = 200) -> list[Weights]:
    history: list[Weights] = [make_weights(1)]
    await shop.publisher.publish(0, history[0])
    for version in range(1, versions + 1):
        history.append(nudged(history[-1], version, changes))
        await shop.publisher.publish(version, history[-1])
    return history


def edge(base: str, target: str, size: int) -> PlanStep:
    kind = UpdateKind.DELTA if base else UpdateKind.KEYFRAME
    objects = (ObjectRef(object_id="0" * 64, size_bytes=size),)
    return PlanStep(kind=kind, base_root=base, target_root=target, target_version=0, objects=objects)


def test_the_shortest_path_may_start_from_nothing() -> None:
    edges = [edge("", "a", 100), edge("a", "b", 10), edge("b", "c", 10), edge("x", "c", 200), edge("", "c", 115)]
    assert [step.target_root for step in shortest_path(edges, "x", "c") or []] == ["c"]
    assert size_of((shortest_path(edges, "x", "c") or [])[0]) == 115
    assert [step.target_root for step in shortest_path(edges, "a", "c") or []] == ["b", "c"]
    assert shortest_path(edges[1:3], "x", "c") is None


async def test_one_version_behind_gets_that_delta_and_none_behind_gets_nothing(tmp_path: Path) -> None:
    shop = open_shop(tmp_path)
    history = await publish_history(shop, 2)
    plan = await shop.planner.plan(root_of(history[1]), 0)
    assert [(step.kind, step.target_version) for step in plan.steps] == [(UpdateKind.DELTA, 2)]
    assert (await shop.planner.plan(root_of(history[2]), 0)).steps == ()


@pytest.mark.parametrize("behind", [2, 5, 9])
async def test_several_versions_behind_get_one_squashed_delta_with_the_same_result(tmp_path: Path, behind: int) -> None:
    shop = open_shop(tmp_path)
    history = await publish_history(shop, 9)
    singles = sum(size_of(row.update) for row in shop.versions.rows.values() if row.update and row.number > 9 - behind)
    plan = await shop.planner.plan(root_of(history[9 - behind]), 0)
    assert len(plan.steps) == 1
    assert plan.total_bytes < singles
    result = carry_out(shop, plan, history[9 - behind])
    assert result is not None
    assert root_of(result) == root_of(history[9])


async def test_a_newcomer_gets_a_keyframe_of_the_newest_version(tmp_path: Path) -> None:
    shop = open_shop(tmp_path)
    history = await publish_history(shop, 3, changes=4000)
    plan = await shop.planner.plan("", 0)
    assert [step.kind for step in plan.steps] == [UpdateKind.KEYFRAME]
    result = carry_out(shop, plan, None)
    assert result is not None
    assert root_of(result) == root_of(history[3])
    assert (await shop.planner.plan("", 0)) == plan, "made once"


async def test_a_newcomer_takes_an_old_keyframe_and_a_delta_where_that_costs_little_more(tmp_path: Path) -> None:
    shop = open_shop(tmp_path)
    await publish_history(shop, 2, changes=5)
    plan = await shop.planner.plan("", 0)
    assert [step.kind for step in plan.steps] == [UpdateKind.KEYFRAME, UpdateKind.DELTA]
    assert [step.kind for step in (await shop.planner.plan("", 0, keyframe_only=True)).steps] == [UpdateKind.KEYFRAME]


async def test_an_unknown_root_gets_a_keyframe(tmp_path: Path) -> None:
    shop = open_shop(tmp_path)
    await publish_history(shop, 1, changes=4000)
    assert (await shop.planner.plan("f" * 64, 0)).steps[0].kind is UpdateKind.KEYFRAME


async def test_a_damaged_delta_is_never_planned_again(tmp_path: Path) -> None:
    shop = open_shop(tmp_path)
    history = await publish_history(shop, 2)
    update = shop.versions.rows[2].update
    assert update is not None
    path = shop.store.path_of(update.objects[0].object_id)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    plan = await shop.planner.plan(root_of(history[1]), 0)
    assert plan.steps[-1] != update
    result = carry_out(shop, plan, history[1])
    assert result is not None
    assert root_of(result) == root_of(history[2])


async def test_a_row_with_a_wrong_size_is_never_planned_again(tmp_path: Path) -> None:
    """A flipped bit in a number is a number."""
    shop = open_shop(tmp_path)
    history = await publish_history(shop, 2)
    row = shop.versions.rows[2]
    assert row.update is not None
    refs = tuple(replace(ref, size_bytes=ref.size_bytes ^ 8) for ref in row.update.objects)
    shop.versions.write(Version(manifest=row.manifest, update=replace(row.update, objects=refs)))
    plan = await shop.planner.plan(root_of(history[1]), 0)
    result = carry_out(shop, plan, history[1])
    assert result is not None
    assert root_of(result) == root_of(history[2])
    assert plan.total_bytes == sum(
        shop.store.path_of(r.object_id).stat().st_size for s in plan.steps for r in s.objects
    )


async def test_collected_versions_are_gone_and_their_receivers_get_a_keyframe(tmp_path: Path) -> None:
    shop = open_shop(tmp_path, keep_versions=2)
    history = await publish_history(shop, 6)
    shop.now_s[0] = 1e6  # long after every use
    before = len(list((tmp_path / "objects").glob("??/*")))
    await shop.planner.collect((), Traffic(0.0))
    assert sorted(shop.versions.rows) == [5, 6]
    assert len(list((tmp_path / "objects").glob("??/*"))) == 2 < before
    with pytest.raises(ObjectGoneError, match="version 3"):
        await shop.planner.plan("", 3)
    plan = await shop.planner.plan(root_of(history[0]), 0)
    assert [step.kind for step in plan.steps] == [UpdateKind.KEYFRAME]


async def test_xc_deltas_are_chained_because_they_do_not_fold(tmp_path: Path) -> None:
    shop = open_shop(tmp_path, codec="xc")
    history = await publish_history(shop, 3)
    plan = await shop.planner.plan(root_of(history[0]), 0)
    assert len(plan.steps) == 3
    result = carry_out(shop, plan, history[0])
    assert result is not None
    assert root_of(result) == root_of(history[3])
