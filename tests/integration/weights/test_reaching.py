"""From wherever a sampler is, one plan leads to the newest version."""

import asyncio
from pathlib import Path

import pytest

from heterorl.v1 import weights_pb2
from heterorl.v1.weights_pb2_grpc import WeightServiceStub
from services.learner import made_updates
from services.learner.object_store import GRACE_S
from services.wire.delta import BitTensor, Weights, layout, root_of
from services.wire.types import UpdateKind
from tests.support.gate import Gate
from tests.support.weight_site import LearnerSite, OldWeightService, dial, following, learner_site
from tests.unit.learner.weights_of_tests import make_weights, nudged


async def publish(site: LearnerSite, count: int) -> list[Weights]:
    """Version 0 and `count` more."""
    first = make_weights(1)
    await site.publisher.publish(0, first)
    return [first, *await publish_after(site, first, 0, count)]


async def publish_after(site: LearnerSite, weights: Weights, version: int, count: int = 1) -> list[Weights]:
    """`count` versions that follow on `version`."""
    history: list[Weights] = [weights]
    for number in range(version + 1, version + count + 1):
        history.append(nudged(history[-1], number, 20))
        await site.publisher.publish(number, history[-1])
    return history[1:]


def damaged(weights: Weights) -> Weights:
    """With one wrong bit."""
    bits = weights["a.weight"].bits.copy()
    bits[5] ^= 0x40
    return {**weights, "a.weight": BitTensor(dtype="BF16", shape=(bits.size,), bits=bits)}


async def test_a_sampler_a_hundred_versions_behind_arrives_with_one_squashed_delta(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner", keep_versions=128) as site:
        history = await publish(site, 100)
        held = (history[0], 0, root_of(history[0]))
        async with following(tmp_path / "s", site.address, site.public_key, held=held) as sampler:
            assert await sampler.reach(100) == root_of(history[-1])
            (plan,) = site.planner.plans
            assert [(step.kind, step.target_version) for step in plan.steps] == [(UpdateKind.DELTA, 100)]
            assert [version for version, _ in sampler.engine.loaded] == [0, 100]


async def test_a_plan_of_several_deltas_counts_as_the_version_that_it_leads_to(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner", codec="xc") as site:
        history = await publish(site, 3)
        held = (history[0], 0, root_of(history[0]))
        async with following(tmp_path / "s", site.address, site.public_key, held=held) as sampler:
            assert await sampler.reach(3) == root_of(history[3])
        (plan,) = site.planner.plans
        assert [step.target_version for step in plan.steps] == [1, 2, 3]
        receiver = site.traffic.of("eu-1")
        assert (receiver.versions_fetched, receiver.bytes_sent) == (1, plan.total_bytes)
        assert receiver.bytes_full == plan.target.decoded.full_bytes


async def test_a_fresh_sampler_arrives_with_one_plan(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner") as site:
        history = await publish(site, 3)
        async with following(tmp_path / "s", site.address, site.public_key) as sampler:
            assert await sampler.reach(3) == root_of(history[-1])
            assert len(site.planner.plans) == 1
            assert sampler.sources.received_bytes["learner"] == site.planner.plans[0].total_bytes


async def test_a_sampler_whose_copy_is_damaged_arrives_with_one_keyframe(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner") as site:
        history = await publish(site, 2)
        held = (damaged(history[1]), 1, root_of(history[1]))
        async with following(tmp_path / "s", site.address, site.public_key, held=held) as sampler:
            assert await sampler.reach(2) == root_of(history[2])
            assert [step.kind for step in site.planner.plans[-1].steps] == [UpdateKind.KEYFRAME]
            assert sampler.tally.keyframes_refetched == 1
            assert [root for _, root in sampler.engine.loaded][1:] == [root_of(history[2])]


async def test_a_keyframe_that_takes_longer_than_a_step_heals_a_damaged_copy_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(made_updates.iter_encode)
    monkeypatch.setattr(made_updates, "iter_encode", gate)
    monkeypatch.setattr(made_updates, "KEYFRAME_PATIENCE_S", 0.05)
    async with learner_site(tmp_path / "learner") as site:
        history = await publish(site, 2)
        held = (damaged(history[1]), 1, root_of(history[1]))
        async with following(tmp_path / "s", site.address, site.public_key, held=held) as sampler:
            await gate.begun()
            more = await publish_after(site, history[2], 2)
            gate.open()
            assert await sampler.reach(3) == root_of(more[-1])
            assert [version for version, _ in sampler.engine.loaded] == [1, 2, 3]
            assert [plan.target.decoded.version for plan in site.planner.plans][-1] == 2
            assert gate.calls == 1


async def test_a_sampler_ahead_of_a_restored_learner_goes_back_with_one_plan(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner") as site:
        history = await publish(site, 6)
    async with learner_site(tmp_path / "learner", epoch=2) as restored:
        await restored.publisher.restore(3, history[3], root_of(history[3]))
        held = (history[6], 6, root_of(history[6]))
        async with following(tmp_path / "s", restored.address, restored.public_key, held=held) as sampler:
            async with asyncio.timeout(20):
                async with sampler.follower._loaded:
                    await sampler.follower._loaded.wait_for(lambda: sampler.follower.version == 3)
            assert sampler.follower.root == root_of(history[3])
            assert len(restored.planner.plans) == 1
            other = await publish_after(restored, nudged(history[3], 99, 30), 3)
            await sampler.reach(4)
            assert sampler.follower.root == root_of(other[-1])


async def test_the_rest_of_a_plan_is_kept_for_a_slow_sampler_that_is_at_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile other samplers join and get keyframes of newer versions, of which only the last one is kept."""
    monkeypatch.setattr(layout, "CHUNK_ELEMENTS", 4096)
    monkeypatch.setattr(layout, "PART_BYTES", 8192)
    async with learner_site(tmp_path / "learner", keep_versions=2) as site, dial(site.address) as channel:
        await site.publisher.publish(0, weights := make_weights(1))
        stub = WeightServiceStub(channel)
        plan = await stub.GetPlan(weights_pb2.GetPlanRequest())
        refs = plan.steps[0].objects
        assert len(refs) > 4
        for version, ref in enumerate(refs, 1):
            request = weights_pb2.FetchObjectRequest(object_id=ref.object_id)
            assert sum([len(chunk.data) async for chunk in stub.FetchObject(request)]) == ref.size_bytes
            await site.publisher.publish(version, weights := nudged(weights, version, 8000))
            await site.planner.plan("", 0)
            site.now_s[0] += 0.9 * GRACE_S
            await site.planner.collect((), site.traffic)
        site.now_s[0] += 2 * GRACE_S
        await site.planner.collect((), site.traffic)
        gone = [ref for ref in refs if not site.store.path_of(ref.object_id).exists()]
        assert len(gone) == len(refs), "nobody is on the way to them any more"


async def test_an_object_that_was_collected_under_way_leads_to_a_new_plan(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner", keep_versions=2, kind=OldWeightService) as site:
        history = await publish(site, 1)
        async with following(tmp_path / "s", site.address, site.public_key) as sampler:
            await sampler.reach(1)
            planned = asyncio.Event()
            answer = site.planner.plan

            async def plan_then_collect(have_root: str, want_version: int, keyframe_only: bool = False):
                plan = await answer(have_root, want_version, keyframe_only)
                if not planned.is_set():
                    planned.set()
                    for step in plan.steps:
                        for ref in step.objects:
                            site.store.path_of(ref.object_id).unlink()
                return plan

            site.planner.plan = plan_then_collect  # type: ignore[method-assign]
            more = await publish_after(site, history[-1], 1)
            assert await sampler.reach(2) == root_of(more[-1])
            assert planned.is_set()
            assert len(site.planner.plans) == 3, "the first version, the one whose object went, the one after"
