"""Chunks and plans that are not what was asked for: found, never loaded, fetched again."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from heterorl.v1 import weights_pb2
from services.wire.delta import BitTensor, encode_keyframe, root_of
from tests.support.weight_site import Fetched, OldWeightService, Tampering, following, learner_site, tampering
from tests.unit.learner.weights_of_tests import make_weights, nudged

pytestmark = pytest.mark.usefixtures("small_chunks")


def chunk(offset: int, data: bytes) -> Fetched:
    return Fetched(offset=offset, data=data, crc32c=google_crc32c.value(data))


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def truncated(chunks: list[Fetched]) -> list[Fetched]:
    return chunks[:-1]


def appended(chunks: list[Fetched]) -> list[Fetched]:
    end = chunks[-1].offset + len(chunks[-1].data)
    return [*chunks, chunk(end, b"more")]


def too_long(chunks: list[Fetched]) -> list[Fetched]:
    return [*chunks[:-1], chunk(chunks[-1].offset, chunks[-1].data + b"more")]


def swapped(chunks: list[Fetched]) -> list[Fetched]:
    return [*chunks[:-2], chunks[-1], chunks[-2]]


def misplaced(chunks: list[Fetched]) -> list[Fetched]:
    return [chunk(one.offset + 1, one.data) for one in chunks]


def flipped_on_the_way(chunks: list[Fetched]) -> list[Fetched]:
    last = chunks[-1]
    return [*chunks[:-1], Fetched(offset=last.offset, data=flipped(last.data), crc32c=last.crc32c)]


def forged(chunks: list[Fetched]) -> list[Fetched]:
    """A wrong bit under a right checksum: only the digest tells."""
    return [chunk(one.offset, flipped(one.data)) for one in chunks]


def empty(chunks: list[Fetched]) -> list[Fetched]:
    return [chunk(0, b""), *chunks]


FAULTS = [truncated, too_long, swapped, misplaced, flipped_on_the_way, forged, empty]


def once(service: Tampering, fault: Callable[[list[Fetched]], list[Fetched]]) -> None:
    """The next fetch is tampered with, later ones are not."""

    def tamper(chunks: list[Fetched]) -> list[Fetched]:
        service.tamper = lambda sound: sound
        return fault(chunks)

    service.tamper = tamper


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_damaged_fetch_is_found_and_the_right_weights_follow(
    tmp_path: Path, fault: Callable[[list[Fetched]], list[Fetched]]
) -> None:
    async with learner_site(tmp_path / "learner") as site, tampering(site.address) as (address, service):
        weights = make_weights(1)
        await site.publisher.publish(0, weights)
        once(service, fault)
        async with following(tmp_path / "s", address, site.public_key) as sampler:
            assert len(service.fetches) == 2
            assert len(service.plans) == 1, "the announced update is tried once"
            assert sampler.tally.keyframes_refetched == 0
            assert (service.fetches[1].offset == 0) == (fault in (forged, misplaced, empty))
            once(service, fault)
            await site.publisher.publish(1, weights := nudged(weights, 1, 800))
            assert await sampler.reach(1) == root_of(weights)
            assert sampler.tally.keyframes_refetched == 0


async def test_a_fetch_that_is_forged_twice_leads_to_a_keyframe(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner") as site, tampering(site.address) as (address, service):
        await site.publisher.publish(0, weights := make_weights(1))
        async with following(tmp_path / "s", address, site.public_key) as sampler:
            twice = [forged, forged]
            service.tamper = lambda chunks: twice.pop()(chunks) if twice else chunks
            await site.publisher.publish(1, weights := nudged(weights, 1, 800))
            assert await sampler.reach(1) == root_of(weights)
            assert [plan.keyframe_only for plan in service.plans] == [False, True]
            assert sampler.tally.keyframes_refetched == 1


async def test_bytes_after_an_objects_end_are_not_taken(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner") as site, tampering(site.address) as (address, service):
        await site.publisher.publish(0, make_weights(1))
        service.tamper = appended
        async with following(tmp_path / "s", address, site.public_key) as sampler:
            assert sampler.follower.root == site.root
            assert sampler.sources.received_bytes["learner"] == site.update_bytes(0)


async def test_a_relay_that_forges_bytes_is_left_for_the_learner(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner") as site, tampering(site.address) as (relay, service):
        await site.publisher.publish(0, weights := make_weights(1))
        service.tamper = forged
        async with following(tmp_path / "s", site.address, site.public_key, relay=relay) as sampler:
            assert sampler.follower.root == site.root
            assert sampler.sources.fallbacks == 1
            assert sampler.tally.keyframes_refetched == 0, "the fault was the relay's, not the version's"
            assert sampler.sources.received_bytes["learner"] == site.update_bytes(0)
            fetches = len(service.fetches)
            await site.publisher.publish(1, nudged(weights, 1))
            assert await sampler.reach(1) == site.root
            assert len(service.fetches) == fetches, "it is not asked again so soon"


async def test_a_relay_that_withholds_versions_is_left_for_the_learner(tmp_path: Path) -> None:
    learner = learner_site(tmp_path / "learner", kind=OldWeightService)
    async with learner as site, tampering(site.address) as (relay, service):
        await site.publisher.publish(0, weights := make_weights(1))
        async with following(tmp_path / "s", site.address, site.public_key, relay=relay) as sampler:
            old = weights_pb2.GetPlanResponse(target={"manifest": site.publisher.latest.version.manifest.manifest})
            old.target.signature = site.publisher.latest.version.manifest.signature
            service.plan = lambda _: old
            await site.publisher.publish(1, nudged(weights, 1))
            assert await sampler.reach(1) == site.root
            assert sampler.sources.fallbacks == 1


async def test_a_relay_whose_plan_leads_elsewhere_spoils_neither_version_nor_copy(tmp_path: Path) -> None:
    """It names real objects, of other weights: every digest is right, only the root is not."""
    learner = learner_site(tmp_path / "learner", kind=OldWeightService)
    async with learner as site, tampering(site.address) as (relay, service):
        await site.publisher.publish(0, weights := make_weights(1))
        async with following(tmp_path / "s", site.address, site.public_key, relay=relay) as sampler:
            await site.publisher.publish(1, first := nudged(weights, 1))
            await sampler.reach(1)
            foreign = site.versions.rows[1].update
            assert foreign is not None

            def other_objects(plan: weights_pb2.GetPlanResponse) -> weights_pb2.GetPlanResponse:
                plan.steps[0].objects[0].object_id = foreign.objects[0].object_id
                plan.steps[0].objects[0].size_bytes = foreign.objects[0].size_bytes
                return plan

            service.plan = other_objects
            await site.publisher.publish(2, nudged(first, 2))
            assert await sampler.reach(2) == site.root
            assert sampler.sources.fallbacks == 1
            assert (sampler.tally.versions_refused, sampler.tally.keyframes_refetched) == (0, 0)


async def test_a_relay_that_sends_a_few_bytes_for_a_gigabyte_costs_no_memory(tmp_path: Path) -> None:
    """A sound keyframe of other weights, on the way to the right ones."""
    size = 64 << 20
    bomb = encode_keyframe(
        {"a": BitTensor(dtype="U8", shape=(size,), bits=np.zeros(size, np.uint8))}, run_id="run", version=0
    )
    learner = learner_site(tmp_path / "learner", kind=OldWeightService)
    async with learner as site, tampering(site.address) as (relay, service):
        await site.publisher.publish(0, weights := make_weights(1))
        ref = site.store.put(bomb.parts[0])
        async with following(tmp_path / "s", site.address, site.public_key, relay=relay) as sampler:

            def by_way_of_others(plan: weights_pb2.GetPlanResponse) -> weights_pb2.GetPlanResponse:
                plan.steps[0].base_root = bomb.info.target_root
                way = weights_pb2.PlanStep(kind=weights_pb2.UPDATE_KIND_KEYFRAME, target_root=bomb.info.target_root)
                way.objects.add(object_id=ref.object_id, size_bytes=ref.size_bytes)
                plan.steps.insert(0, way)
                return plan

            service.plan = by_way_of_others
            tracemalloc.start()
            try:
                await site.publisher.publish(1, nudged(weights, 1))
                assert await sampler.reach(1) == site.root
                peak_bytes = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert peak_bytes < size / 4
            assert sampler.sources.fallbacks == 1
            assert (sampler.tally.versions_refused, sampler.tally.keyframes_refetched) == (0, 0)


async def test_a_relay_without_the_signing_key_cannot_make_a_version_up(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner") as site, learner_site(tmp_path / "impostor") as impostor:
        await site.publisher.publish(0, make_weights(1))
        await impostor.publisher.publish(0, make_weights(2))
        async with following(tmp_path / "s", site.address, site.public_key, relay=impostor.address) as sampler:
            assert sampler.follower.root == site.root != impostor.root
            assert sampler.sources.fallbacks == 1
