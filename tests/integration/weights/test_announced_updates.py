"""A version is announced with its update: no plan is asked for where that suffices, and one is where it does not."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from heterorl.v1 import weights_pb2
from services.wire.delta import BitTensor, root_of
from services.wire.types import UpdateKind
from tests.support.weight_site import OldWeightService, following, learner_site, relay_site, tampering
from tests.unit.learner.weights_of_tests import make_weights, nudged

Announced = weights_pb2.WatchPolicyResponse


async def test_versions_are_followed_without_a_plan_and_counted(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner") as site:
        await site.publisher.publish(0, weights := make_weights(1))
        async with following(tmp_path / "s", site.address, site.public_key) as sampler:
            for version in (1, 2, 3):
                await site.publisher.publish(version, weights := nudged(weights, version))
                assert await sampler.reach(version) == root_of(weights)
        assert site.planner.plans == []
        receiver = site.traffic.of("eu-1")
        assert receiver.versions_fetched == 4
        assert receiver.bytes_sent == sum(site.update_bytes(version) for version in range(4))


async def test_whoever_does_not_hold_the_base_asks_for_a_plan(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner") as site:
        await site.publisher.publish(0, first := make_weights(1))
        await site.publisher.publish(1, second := nudged(first, 1))
        await site.publisher.publish(2, nudged(second, 2))
        held = (first, 0, root_of(first))
        async with following(tmp_path / "behind", site.address, site.public_key, held=held) as sampler:
            assert await sampler.reach(2) == site.root
        async with following(tmp_path / "fresh", site.address, site.public_key) as sampler:
            assert sampler.follower.root == site.root
        assert [plan.steps[0].kind for plan in site.planner.plans] == [UpdateKind.DELTA, UpdateKind.KEYFRAME]


async def test_a_learner_that_announces_no_updates_is_asked_for_plans(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner", kind=OldWeightService) as site:
        await site.publisher.publish(0, weights := make_weights(1))
        async with following(tmp_path / "s", site.address, site.public_key) as sampler:
            await site.publisher.publish(1, nudged(weights, 1))
            assert await sampler.reach(1) == site.root
        assert len(site.planner.plans) == 2


async def test_a_restored_version_is_announced_with_the_way_there_or_none(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner") as site:
        await site.publisher.publish(0, first := make_weights(1))
        await site.publisher.publish(1, second := nudged(first, 1))
    async with learner_site(tmp_path / "learner", epoch=2) as restored:
        await restored.publisher.restore(1, second, root_of(second))
        held = (first, 0, root_of(first))
        async with following(tmp_path / "s", restored.address, restored.public_key, held=held) as sampler:
            assert await sampler.reach(1) == root_of(second)
            assert sampler.tally.keyframes_refetched == 0


async def test_a_relay_passes_announced_updates_on(tmp_path: Path) -> None:
    async with (
        learner_site(tmp_path / "learner") as site,
        relay_site(tmp_path / "relay", site.address) as relay,
    ):
        await site.publisher.publish(0, weights := make_weights(1))
        async with following(tmp_path / "s", relay.address, site.public_key) as sampler:
            await site.publisher.publish(1, nudged(weights, 1))
            assert await sampler.reach(1) == site.root
        assert site.planner.plans == []
        assert site.traffic.of("relay").bytes_sent == site.update_bytes(0) + site.update_bytes(1)


def of_another_kind(one: Announced) -> None:
    one.update.kind = weights_pb2.UPDATE_KIND_UNSPECIFIED


def elsewhere(one: Announced) -> None:
    one.update.target_root = "0" * 64


def longer(one: Announced) -> None:
    one.update.objects[0].size_bytes += 1


def of_absurd_size(one: Announced) -> None:
    one.update.objects[0].size_bytes = (1 << 64) - 1


def of_absurd_count(one: Announced) -> None:
    for number in range(20_000):
        one.update.objects.add(object_id=f"{number:064x}", size_bytes=1)


def of_absurd_count_of_nothing(one: Announced) -> None:
    for number in range(20_000):
        one.update.objects.add(object_id=f"{number:064x}")


def empty(one: Announced) -> None:
    del one.update.objects[:]


def a_path(one: Announced) -> None:
    one.update.objects[0].object_id = "../" + "0" * 61


def unknown(one: Announced) -> None:
    one.update.objects[0].object_id = "0" * 64


def of_the_last_version(one: Announced) -> None:
    """A real object of another size: what comes is not what was announced."""
    one.update.objects[0].object_id = LAST[0]


def of_other_weights(one: Announced) -> None:
    """A real object, rightly described; only its root is another one. Without a signature the manifest agrees."""
    manifest = weights_pb2.Manifest.FromString(one.manifest.manifest)
    one.update.objects[0].object_id, size = LAST
    one.update.objects[0].size_bytes = manifest.update_bytes = size
    one.manifest.manifest = manifest.SerializeToString()


def a_keyframe_in_name(one: Announced) -> None:
    one.update.kind = weights_pb2.UPDATE_KIND_KEYFRAME


LAST = ("", 0)
LIES = [
    *(of_another_kind, elsewhere, longer, of_absurd_size, of_absurd_count, of_absurd_count_of_nothing, empty, a_path),
    *(unknown, of_the_last_version, of_other_weights),
]


@pytest.mark.parametrize("lie", LIES)
async def test_an_update_that_is_not_what_it_should_be_leads_to_one_plan(
    tmp_path: Path, lie: Callable[[Announced], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with learner_site(tmp_path / "learner") as site, tampering(site.address) as (address, service):
        await site.publisher.publish(0, weights := make_weights(1))
        key = b"" if lie is of_other_weights else site.public_key
        async with following(tmp_path / "s", address, key) as sampler:
            await site.publisher.publish(1, weights := nudged(weights, 1, 50))
            await sampler.reach(1)
            update = site.versions.rows[1].update
            assert update is not None
            monkeypatch.setitem(globals(), "LAST", (update.objects[0].object_id, update.objects[0].size_bytes))

            def announce(one: Announced) -> Announced:
                if one.HasField("update"):
                    lie(one)
                return one

            service.announcement = announce
            await site.publisher.publish(2, weights := nudged(weights, 2, 90))
            assert await sampler.reach(2) == root_of(weights)
            assert [plan.keyframe_only for plan in service.plans] == [False]
            assert (sampler.tally.versions_refused, sampler.tally.keyframes_refetched) == (0, 0)
            assert [version for version, _ in sampler.engine.loaded] == [0, 1, 2]


async def test_a_delta_that_is_called_a_keyframe_is_only_a_wrong_name(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner") as site, tampering(site.address) as (address, service):
        await site.publisher.publish(0, weights := make_weights(1))
        async with following(tmp_path / "s", address, site.public_key) as sampler:
            service.announcement = lambda one: (a_keyframe_in_name(one), one)[1]
            await site.publisher.publish(1, nudged(weights, 1))
            assert await sampler.reach(1) == site.root


async def test_an_announced_object_that_is_gone_leads_to_a_plan_around_it(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner") as site, tampering(site.address) as (address, service):
        await site.publisher.publish(0, weights := make_weights(1))
        async with following(tmp_path / "s", address, site.public_key) as sampler:

            def lose(one: Announced) -> Announced:
                site.store.path_of(one.update.objects[0].object_id).unlink(missing_ok=True)
                return one

            service.announcement = lose
            await site.publisher.publish(1, nudged(weights, 1))
            assert await sampler.reach(1) == site.root
            assert [step.kind for step in site.planner.plans[0].steps] == [UpdateKind.KEYFRAME]
            assert sampler.tally.versions_refused == 0


async def test_an_announced_version_with_nan_is_refused_and_the_next_one_taken(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner") as site:
        await site.publisher.publish(0, weights := make_weights(1))
        async with following(tmp_path / "s", site.address, site.public_key) as sampler:
            bits = weights["a.weight"].bits.copy()
            bits[3] = np.uint16(0x7FC0)
            bad = {**weights, "a.weight": BitTensor(dtype="BF16", shape=weights["a.weight"].shape, bits=bits)}
            await site.publisher.publish(1, bad)
            await site.publisher.publish(2, nudged(weights, 1))
            assert await sampler.reach(2) == site.root
            assert [version for version, _ in sampler.engine.loaded] == [0, 2]
