"""What is there of an update goes on its way while the rest is made; the version counts once it is announced."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from heterorl.v1 import weights_pb2
from services.runtime import failpoints
from services.runtime.errors import StorageError
from services.sampler.object_cache import ObjectCache
from services.wire.delta import layout as layout_module
from services.wire.delta import root_of
from services.wire.types import ObjectRef
from tests.support.gated_store import Gate, gated, own
from tests.support.weight_site import Following, following, learner_site, relay_site, tampering
from tests.unit.learner.weights_of_tests import make_weights, nudged

PARTS = 5


@pytest.fixture(autouse=True)
def several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_module, "CHUNK_ELEMENTS", 2000)
    monkeypatch.setattr(layout_module, "PART_BYTES", 16_000)


class Fetches:
    """Which objects each sampler has fetched."""

    def __init__(self) -> None:
        self._fetch = ObjectCache.fetch
        self._news = asyncio.Event()
        self._done: set[tuple[Path, str]] = set()

    async def count(self, cache: ObjectCache, ref: ObjectRef, *words: Any, **more: Any) -> Path:
        path = await self._fetch(cache, ref, *words, **more)
        self._done.add((path.parent, ref.object_id))
        self._news.set()
        return path

    async def reach(self, sampler: Following, gate: Gate, objects: int) -> None:
        """Returns once the sampler has so many of the objects that the gate let through."""
        async with asyncio.timeout(10):
            while sum((sampler.folder, ref.object_id) in self._done for ref in gate.kept) < objects:
                self._news.clear()
                await self._news.wait()


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> Fetches:
    counter = Fetches()

    async def fetch(cache: ObjectCache, *words: Any, **more: Any) -> Path:
        return await counter.count(cache, *words, **more)

    monkeypatch.setattr(ObjectCache, "fetch", fetch)
    return counter


async def test_what_is_made_is_fetched_before_the_version_is_announced(tmp_path: Path, fetches: Fetches) -> None:
    async with learner_site(tmp_path / "learner") as site:
        await site.publisher.publish(0, weights := make_weights(1))
        async with following(tmp_path / "s", site.address, site.public_key) as sampler:
            for version in (1, 2, 3):
                weights = nudged(weights, version)
                with gated(site, 3) as gate:
                    publishing = asyncio.create_task(site.publisher.publish(version, weights))
                    await fetches.reach(sampler, gate, 3)
                    assert sampler.follower.version == version - 1
                    assert sampler.tally.fetch is None, "it waits for the learner"
                    gate.open()
                    await publishing
                assert len(gate.kept) == PARTS
                assert await sampler.reach(version) == root_of(weights)
        assert site.planner.plans == []
        receiver = site.traffic.of("eu-1")
        assert receiver.versions_fetched == 4
        assert receiver.bytes_sent == sum(site.update_bytes(version) for version in range(4))


async def test_an_update_that_is_given_up_leaves_the_old_version(tmp_path: Path, fetches: Fetches) -> None:
    async with learner_site(tmp_path / "learner") as site:
        await site.publisher.publish(0, weights := make_weights(1))
        async with following(tmp_path / "s", site.address, site.public_key) as sampler:
            await site.publisher.publish(1, weights := nudged(weights, 1))
            await sampler.reach(1)
            failpoints.arm("publish.after_objects=1*error->off")
            try:
                with gated(site, 3) as gate:
                    publishing = asyncio.create_task(site.publisher.publish(2, nudged(weights, 2)))
                    await fetches.reach(sampler, gate, 3)
                    gate.open()
                    with pytest.raises(StorageError):
                        await publishing
            finally:
                failpoints.arm("")
            await site.publisher.publish(2, weights := nudged(weights, 3))
            assert await sampler.reach(2) == root_of(weights)
            assert [version for version, _ in sampler.engine.loaded] == [0, 1, 2]
            assert (sampler.tally.versions_refused, sampler.tally.keyframes_refetched) == (0, 0)


async def test_a_learner_that_goes_away_meanwhile_is_followed_when_it_is_back(tmp_path: Path, fetches: Fetches) -> None:
    async with AsyncExitStack() as first_life:
        site = await first_life.enter_async_context(learner_site(tmp_path / "learner"))
        await site.publisher.publish(0, first := make_weights(1))
        async with following(tmp_path / "s", site.address, site.public_key, held=own(first)) as sampler:
            with gated(site, 2) as gate:
                publishing = asyncio.create_task(site.publisher.publish(1, second := nudged(first, 1)))
                await fetches.reach(sampler, gate, 2)
                await first_life.aclose()
                gate.open()
                await publishing
            port = site.address.port
            async with learner_site(tmp_path / "learner", port=port, epoch=2) as again:
                await again.publisher.restore(1, second, root_of(second))
                assert await sampler.reach(1) == root_of(second)


async def test_late_and_fresh_samplers_and_those_of_a_relay_take_part(tmp_path: Path, fetches: Fetches) -> None:
    async with (
        learner_site(tmp_path / "learner") as site,
        relay_site(tmp_path / "relay", site.address) as relay,
    ):
        await site.publisher.publish(0, first := make_weights(1))
        with gated(site, 3) as gate:
            publishing = asyncio.create_task(site.publisher.publish(1, second := nudged(first, 1)))
            async with (
                following(tmp_path / "late", site.address, site.public_key, held=own(first), name="late") as late,
                following(
                    tmp_path / "far", site.address, site.public_key, held=own(first), name="far", relay=relay.address
                ) as far,
                following(tmp_path / "fresh", site.address, site.public_key, name="fresh") as fresh,
            ):
                for sampler in (late, far, fresh):
                    await fetches.reach(sampler, gate, 3)
                gate.open()
                await publishing
                assert await late.reach(1) == await far.reach(1) == await fresh.reach(1) == root_of(second)
        assert site.planner.plans == []
        assert site.traffic.of("far").bytes_sent == 0


async def test_a_version_that_changed_no_bit_does_not_wait_for_the_one_that_is_made(
    tmp_path: Path, fetches: Fetches
) -> None:
    async with learner_site(tmp_path / "learner") as site:
        await site.publisher.publish(0, first := make_weights(1))
        async with following(tmp_path / "s", site.address, site.public_key) as sampler:
            await site.publisher.publish(1, first)
            with gated(site, 3) as gate:
                publishing = asyncio.create_task(site.publisher.publish(2, second := nudged(first, 1)))
                await sampler.reach(1)
                await fetches.reach(sampler, gate, 3)
                gate.open()
                await publishing
                assert await sampler.reach(2) == root_of(second)


def of_absurd_size(one: weights_pb2.WatchPolicyResponse) -> None:
    one.coming.objects[-1].size_bytes = 1 << 60


def unknown(one: weights_pb2.WatchPolicyResponse) -> None:
    one.coming.objects[-1].object_id = "0" * 64


def a_path(one: weights_pb2.WatchPolicyResponse) -> None:
    one.coming.objects[-1].object_id = "../" + "0" * 61


def elsewhere(one: weights_pb2.WatchPolicyResponse) -> None:
    one.coming.target_root = "0" * 64


def with_a_gap(one: weights_pb2.WatchPolicyResponse) -> None:
    one.coming.first += 1


def another_first(one: weights_pb2.WatchPolicyResponse) -> None:
    one.coming.objects[0].object_id, one.coming.objects[0].size_bytes = LAST


LAST = ("", 0)


@pytest.mark.parametrize("lie", [of_absurd_size, unknown, a_path, elsewhere, with_a_gap, another_first])
async def test_a_coming_update_that_is_not_what_it_should_be_costs_nothing_but_itself(
    tmp_path: Path, lie: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with learner_site(tmp_path / "learner") as site, tampering(site.address) as (address, service):
        await site.publisher.publish(0, weights := make_weights(1))
        async with following(tmp_path / "s", address, site.public_key) as sampler:
            await site.publisher.publish(1, weights := nudged(weights, 1))
            await sampler.reach(1)
            update = site.versions.rows[1].update
            assert update is not None
            monkeypatch.setitem(globals(), "LAST", (update.objects[0].object_id, update.objects[0].size_bytes))

            def announce(one: weights_pb2.WatchPolicyResponse) -> weights_pb2.WatchPolicyResponse:
                if one.HasField("coming"):
                    lie(one)  # type: ignore[operator]
                return one

            service.announcement = announce
            for version in (2, 3):
                await site.publisher.publish(version, weights := nudged(weights, version))
                assert await sampler.reach(version) == root_of(weights)
            assert [version for version, _ in sampler.engine.loaded] == [0, 1, 2, 3]
            assert (sampler.tally.versions_refused, sampler.tally.keyframes_refetched) == (0, 0)
