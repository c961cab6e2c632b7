"""Keyframes and squashed deltas take their time: nobody else waits for them, and none is made twice or for nothing."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.learner import made_updates
from services.learner.traffic import Traffic
from services.runtime.errors import StorageError, UnavailableError
from services.wire.delta import Weights, root_of
from services.wire.delta import layout as layout_module
from services.wire.types import Plan, UpdateKind
from tests.support.gate import Gate
from tests.unit.learner.test_plans import publish_history
from tests.unit.learner.weights_of_tests import Shop, carry_out, nudged, open_shop


@pytest.fixture
def folding(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(made_updates.iter_fold)
    monkeypatch.setattr(made_updates, "iter_fold", gate)
    yield gate
    gate.open()


@pytest.fixture
def encoding(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(made_updates.iter_encode)
    monkeypatch.setattr(made_updates, "iter_encode", gate)
    yield gate
    gate.open()


async def made(shop: Shop) -> None:
    """Waits for all that is under way."""
    while shop.planner._made._under_way:
        await asyncio.wait({making.task for making in shop.planner._made._under_way.values()})
        await asyncio.sleep(0)  # what they call when they are done comes in the next round


def reaches(shop: Shop, plan: Plan, have: Weights | None, want: Weights) -> bool:
    result = carry_out(shop, plan, have)
    return result is not None and root_of(result) == root_of(want)


async def test_what_is_made_for_one_who_gave_up_is_there_when_it_asks_again(tmp_path: Path, folding: Gate) -> None:
    """A GetPlan whose deadline passes: a policy of 8B parameters takes longer than any."""
    shop = open_shop(tmp_path)
    history = await publish_history(shop, 5)
    asking = asyncio.create_task(shop.planner.plan(root_of(history[0]), 0))
    await folding.begun()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    folding.open()
    plan = await shop.planner.plan(root_of(history[0]), 0)
    assert len(plan.steps) == 1
    assert folding.calls == 1
    assert reaches(shop, plan, history[0], history[5])


async def test_who_needs_nothing_made_and_the_collection_do_not_wait(tmp_path: Path, folding: Gate) -> None:
    shop = open_shop(tmp_path)
    history = await publish_history(shop, 5)
    far_behind = asyncio.create_task(shop.planner.plan(root_of(history[0]), 0))
    await folding.begun()
    async with asyncio.timeout(5):
        plan = await shop.planner.plan(root_of(history[4]), 0)
        await shop.planner.collect((), Traffic(0.0))
    assert reaches(shop, plan, history[4], history[5])
    assert not far_behind.done()
    folding.open()
    assert reaches(shop, await far_behind, history[0], history[5])


async def test_where_squashing_takes_long_the_single_deltas_do(
    tmp_path: Path, folding: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = open_shop(tmp_path)
    history = await publish_history(shop, 5)
    monkeypatch.setattr(made_updates, "SQUASH_PATIENCE_S", 0.01)
    plan = await shop.planner.plan(root_of(history[0]), 0)
    assert [step.target_version for step in plan.steps] == [1, 2, 3, 4, 5]
    assert reaches(shop, plan, history[0], history[5])
    folding.open()
    await made(shop)
    assert len((await shop.planner.plan(root_of(history[0]), 0)).steps) == 1


async def test_no_queue_of_squashing_grows(tmp_path: Path, folding: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = open_shop(tmp_path)
    history = await publish_history(shop, 6)
    monkeypatch.setattr(made_updates, "SQUASH_PATIENCE_S", 0.01)
    plans = [await shop.planner.plan(root_of(history[have]), 0) for have in range(5)]
    assert [len(plan.steps) for plan in plans] == [6, 5, 4, 3, 2]
    assert len(shop.planner._made._under_way) == made_updates.MOST_UNDER_WAY
    folding.open()
    await made(shop)
    assert folding.calls == made_updates.MOST_UNDER_WAY


async def test_a_keyframe_that_takes_longer_than_a_step_reaches_who_asked_for_it(
    tmp_path: Path, encoding: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = open_shop(tmp_path)
    history = await publish_history(shop, 2, changes=4000)
    monkeypatch.setattr(made_updates, "KEYFRAME_PATIENCE_S", 0.01)
    with pytest.raises(UnavailableError, match="ask again"):
        await shop.planner.plan("", 0, keyframe_only=True)
    history.append(nudged(history[-1], 3, 4000))
    await shop.publisher.publish(3, history[-1])
    with pytest.raises(UnavailableError, match="ask again"):
        await shop.planner.plan("", 0, keyframe_only=True)
    monkeypatch.setattr(made_updates, "KEYFRAME_PATIENCE_S", 20.0)
    asking = asyncio.create_task(shop.planner.plan("", 0, keyframe_only=True))
    newcomer = asyncio.create_task(shop.planner.plan("", 0))
    await asyncio.sleep(0)
    encoding.open()
    plan = await asking
    assert (plan.target.decoded.version, [step.kind for step in plan.steps]) == (2, [UpdateKind.KEYFRAME])
    assert encoding.calls == 1, "one for all who asked meanwhile"
    assert reaches(shop, plan, None, history[2])
    assert reaches(shop, await newcomer, None, history[3])


async def test_a_longer_way_does_while_a_keyframe_is_made(
    tmp_path: Path, encoding: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = open_shop(tmp_path)
    history = await publish_history(shop, 1, changes=4000)
    monkeypatch.setattr(made_updates, "KEYFRAME_PATIENCE_S", 0.01)
    plan = await shop.planner.plan("", 0)
    assert [step.kind for step in plan.steps] == [UpdateKind.KEYFRAME, UpdateKind.DELTA]
    assert reaches(shop, plan, None, history[1])
    assert encoding.calls == 1
    encoding.open()


async def test_what_is_read_for_an_update_is_not_collected_meanwhile(tmp_path: Path, folding: Gate) -> None:
    shop = open_shop(tmp_path, keep_versions=2)
    history = await publish_history(shop, 6)
    asking = asyncio.create_task(shop.planner.plan(root_of(history[0]), 0))
    await folding.begun()
    shop.now_s[0] = 1e6  # long after every use
    await shop.planner.collect((), Traffic(0.0))
    assert sorted(shop.versions.rows) == [5, 6]
    folding.open()
    assert reaches(shop, await asking, history[0], history[6])


async def test_a_full_disk_ends_the_making_and_the_next_one_who_asks_begins_anew(
    tmp_path: Path, encoding: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = open_shop(tmp_path)
    history = await publish_history(shop, 1, changes=4000)
    encoding.open()

    def full(_: bytes) -> None:
        raise StorageError("cannot write: no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shop.store, "put", full)
        with pytest.raises(StorageError):
            await shop.planner.plan("", 0, keyframe_only=True)
    assert reaches(shop, await shop.planner.plan("", 0, keyframe_only=True), None, history[1])
    assert encoding.calls == 2


async def test_a_process_that_ends_does_not_wait_for_the_rest(
    tmp_path: Path, encoding: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout_module, "CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr(layout_module, "PART_BYTES", 2000)
    shop = open_shop(tmp_path)
    await publish_history(shop, 1, changes=4000)
    stored: list[bytes] = []
    put = shop.store.put
    monkeypatch.setattr(shop.store, "put", lambda part: (stored.append(part), put(part))[1])
    asking = asyncio.create_task(shop.planner.plan("", 0, keyframe_only=True))
    await encoding.begun()
    (making,) = shop.planner._made._under_way.values()
    making.task.cancel()  # as asyncio.run does at its end
    await asyncio.wait({making.task, asking})
    encoding.open()
    await asyncio.get_running_loop().shutdown_default_executor()
    assert stored == []
    assert asking.cancelled()
