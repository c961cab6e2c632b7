"""The objects of a plan over real channels: how many at a time, by which channel, and what ends them."""

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from heterorl.v1 import weights_pb2
from heterorl.v1.weights_pb2_grpc import WeightServiceStub
from services.runtime.errors import ObjectGoneError
from services.sampler.object_cache import ObjectCache
from services.sampler.plan_fetch import fetching
from services.sampler.tally import Tally
from services.sampler.weight_sources import WeightSources
from services.wire.types import ObjectRef, Plan, PlanStep, UpdateKind
from tests.support.weight_site import LearnerSite, Tampering, dial, learner_site, tampering
from tests.unit.learner.weights_of_tests import make_weights


@dataclass(slots=True, kw_only=True)
class Bench:
    site: LearnerSite
    service: Tampering
    cache: ObjectCache
    tally: Tally
    channels: int

    def plan(self, *sizes: int) -> Plan:
        """One step for each size, of one object of random bytes."""
        refs = [self.site.store.put(os.urandom(size)) for size in sizes]
        return Plan(target=self.site.publisher.latest.version.manifest, steps=tuple(step_of(ref) for ref in refs))


def step_of(*refs: ObjectRef) -> PlanStep:
    return PlanStep(kind=UpdateKind.DELTA, base_root="", target_root="", target_version=1, objects=refs)


@asynccontextmanager
async def bench(folder: Path, channels: int) -> AsyncGenerator[Bench]:
    async with AsyncExitStack() as stack:
        site = await stack.enter_async_context(learner_site(folder / "learner"))
        await site.publisher.publish(0, make_weights(1))
        address, service = await stack.enter_async_context(tampering(site.address))
        stubs: list[WeightServiceStub] = []
        for _ in range(channels):
            channel = dial(address)
            stack.push_async_callback(channel.close)
            stubs.append(WeightServiceStub(channel))
        cache = ObjectCache(folder / "cache", WeightSources(stubs[0], lanes=stubs[1:]), 1 << 30)
        yield Bench(site=site, service=service, cache=cache, tally=Tally(), channels=channels)


async def take(here: Bench, plan: Plan) -> list[list[bytes]]:
    async with fetching(here.cache, plan, here.tally, here.channels) as fetch:
        return [[path.read_bytes() for path in await fetch.files(step)] for step in plan.steps]


async def test_a_steps_files_are_there_before_the_whole_plan_is(tmp_path: Path) -> None:
    async with bench(tmp_path, 1) as here:
        plan = here.plan(1000, 2000, 3000)
        gate = asyncio.Event()
        last = plan.steps[-1].objects[0].object_id

        async def hold_the_last_back(request: weights_pb2.FetchObjectRequest) -> None:
            if request.object_id == last:
                await gate.wait()

        here.service.before = hold_the_last_back
        async with fetching(here.cache, plan, here.tally, 1) as fetch:
            for step in plan.steps[:2]:
                (path,) = await fetch.files(step)
                assert path.stat().st_size == step.objects[0].size_bytes
            assert here.tally.fetch is not None
            assert (here.tally.fetch.bytes_done, here.tally.fetch.bytes_total) == (3000, 6000)
            gate.set()
            await fetch.files(plan.steps[2])
            assert here.tally.fetch.bytes_done == 6000


async def test_many_objects_go_whole_and_one_is_cut_into_a_range_for_each_channel(tmp_path: Path) -> None:
    async with bench(tmp_path, 3) as here:
        await take(here, here.plan(*[800_000] * 3))
        assert [request.offset for request in here.service.fetches] == [0, 0, 0]
        here.service.fetches.clear()
        await take(here, here.plan(900_000))
        assert sorted(request.offset for request in here.service.fetches) == [0, 300_000, 600_000]


@pytest.mark.parametrize("part", ["part", "300000.part", "600000.part"])
async def test_wrong_bytes_of_any_range_that_lay_on_disk_are_fetched_again(tmp_path: Path, part: str) -> None:
    async with bench(tmp_path, 3) as here:
        plan = here.plan(900_000)
        ref = plan.steps[0].objects[0]
        (here.cache._directory / f"{ref.object_id}.{part}").write_bytes(b"a relay's" * 100)
        assert await take(here, plan) == [[here.site.store.path_of(ref.object_id).read_bytes()]]


async def test_an_object_that_is_named_twice_is_fetched_once(tmp_path: Path) -> None:
    async with bench(tmp_path, 1) as here:
        ref = here.site.store.put(b"same" * 500)
        plan = Plan(target=here.site.publisher.latest.version.manifest, steps=(step_of(ref, ref), step_of(ref)))
        assert await take(here, plan) == [[b"same" * 500] * 2, [b"same" * 500]]
        assert len(here.service.fetches) == 1


async def test_one_that_fails_ends_the_others_and_what_came_stays(tmp_path: Path) -> None:
    async with bench(tmp_path, 1) as here:
        plan = here.plan(1000, 2000, 3000)
        here.site.store.path_of(plan.steps[1].objects[0].object_id).unlink()
        with pytest.raises(ObjectGoneError):
            await take(here, plan)
        first = plan.steps[0].objects[0]
        assert (here.cache._directory / first.object_id).stat().st_size == first.size_bytes
