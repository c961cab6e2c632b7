"""Weights over links that are cut, heal, and reset at any byte."""

import asyncio
import random
import time
from pathlib import Path

import pytest

from services.lab.wan import LinkProfile, WanLink
from services.wire.delta import root_of
from tests.support.weight_site import ANY_PORT, following, learner_site, relay_site
from tests.unit.learner.weights_of_tests import make_weights, nudged

SLOW = LinkProfile(delay_s=0.005, rate_bit_s=8e6, queue_s=0.01)


async def when_delivered(link: WanLink, more_bytes: int) -> None:
    """Waits until the link has brought so many bytes more to the sampler."""
    goal = link.counters.bytes_down + more_bytes
    async with asyncio.timeout(20):
        while link.counters.bytes_down < goal:  # noqa: ASYNC110 - the link announces nothing
            await asyncio.sleep(0.002)


async def test_a_cut_holds_a_fetch_back_and_healing_ends_it_without_a_byte_twice(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner") as site, WanLink(ANY_PORT, site.address, SLOW) as link:
        await site.publisher.publish(0, make_weights(1, 400_000))
        begun = asyncio.create_task(when_delivered(link, 200_000))
        begun.add_done_callback(lambda _: link.cut())
        healed = asyncio.get_running_loop().create_future()
        begun.add_done_callback(
            lambda _: asyncio.get_running_loop().call_later(1.0, lambda: (link.heal(), healed.set_result(None)))
        )
        async with following(tmp_path / "s", link.address, site.public_key) as sampler:
            assert begun.done()
            assert healed.done()
            assert sampler.follower.root == site.root
            assert sampler.sources.received_bytes["learner"] == site.update_bytes(0)


@pytest.mark.usefixtures("small_chunks")
async def test_resets_at_random_bytes_cost_no_more_than_the_chunk_they_fall_in(tmp_path: Path) -> None:
    draws = random.Random(7)
    async with learner_site(tmp_path / "learner") as site, WanLink(ANY_PORT, site.address, SLOW) as link:
        await site.publisher.publish(0, make_weights(1, 200_000))

        async def reset_now_and_then() -> int:
            count = 0
            while True:
                await when_delivered(link, draws.randrange(5_000, 120_000))
                link.reset()
                count += 1

        resets = asyncio.create_task(reset_now_and_then())
        async with following(tmp_path / "s", link.address, site.public_key) as sampler:
            resets.cancel()
            assert sampler.follower.root == site.root
            assert link.counters.connections > 2
            assert sampler.sources.received_bytes["learner"] == site.update_bytes(0)


async def test_a_stalled_link_is_given_up_and_taken_up_again_where_it_was(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner") as site, WanLink(ANY_PORT, site.address, SLOW) as link:
        await site.publisher.publish(0, weights := make_weights(1, 400_000))
        async with following(tmp_path / "s", link.address, site.public_key, stall_s=0.5) as sampler:
            await site.publisher.publish(1, weights := nudged(weights, 1, 150_000))
            await when_delivered(link, 20_000)
            link.cut()
            await asyncio.sleep(1.0)
            link.heal()
            assert await sampler.reach(1) == root_of(weights)
            assert sampler.tally.keyframes_refetched == 0


async def test_a_slow_sampler_skips_versions_and_delays_no_other(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner") as site, WanLink(ANY_PORT, site.address, SLOW) as link:
        await site.publisher.publish(0, weights := make_weights(1))
        async with (
            following(tmp_path / "near", site.address, site.public_key, name="near") as near,
            following(tmp_path / "far", link.address, site.public_key, name="far") as far,
        ):
            link.cut()
            for version in range(1, 9):
                await site.publisher.publish(version, weights := nudged(weights, version))
                await near.reach(version)
            assert far.follower.version == 0
            link.heal()
            assert await far.reach(8) == root_of(weights)
            assert [version for version, _ in near.engine.loaded] == list(range(9))
            assert len(far.engine.loaded) < 5


async def test_one_copy_crosses_the_link_for_a_site_of_four(tmp_path: Path) -> None:
    async with (
        learner_site(tmp_path / "learner") as site,
        WanLink(ANY_PORT, site.address, SLOW) as link,
        relay_site(tmp_path / "relay", link.address) as relay,
    ):
        await site.publisher.publish(0, weights := make_weights(1, 200_000))
        async with asyncio.TaskGroup() as tasks:
            arrived = asyncio.Barrier(4)

            async def one(name: str) -> None:
                folder = tmp_path / name
                async with following(folder, site.address, site.public_key, relay=relay.address, name=name) as sampler:
                    await arrived.wait()
                    if name == "s0":
                        await site.publisher.publish(1, nudged(weights, 1))
                    assert await sampler.reach(1) == site.root
                    assert sampler.sources.fallbacks == 0
                    assert sampler.sources.received_bytes["learner"] == 0

            for number in range(4):
                tasks.create_task(one(f"s{number}"))
        assert site.traffic.of("relay").bytes_sent == site.update_bytes(0) + site.update_bytes(1)
        assert site.traffic.bytes_sent == site.traffic.of("relay").bytes_sent


@pytest.mark.usefixtures("small_chunks")
async def test_four_channels_fetch_disjoint_ranges_and_resume_each_where_it_was(tmp_path: Path) -> None:
    draws = random.Random(8)
    async with learner_site(tmp_path / "learner") as site, WanLink(ANY_PORT, site.address, SLOW) as link:
        await site.publisher.publish(0, make_weights(1, 900_000))

        async def reset_now_and_then() -> None:
            while True:
                await when_delivered(link, draws.randrange(100_000, 600_000))
                link.reset()

        resets = asyncio.create_task(reset_now_and_then())
        async with following(tmp_path / "s", link.address, site.public_key, channels=4) as sampler:
            resets.cancel()
            assert sampler.follower.root == site.root
            assert sampler.sources.received_bytes["learner"] == site.update_bytes(0), "no byte twice"
            assert link.counters.connections > 4 + 2
            assert [path for path in sampler.folder.iterdir() if path.suffix == ".part"] == []


@pytest.mark.usefixtures("small_chunks")
async def test_a_receivers_channels_share_its_byte_budget_and_receivers_do_not(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner", max_mbit_s=8.0) as site:
        await site.publisher.publish(0, make_weights(1, 600_000))
        began = time.monotonic()
        async with following(tmp_path / "a", site.address, site.public_key, name="a", channels=2):
            least_s = site.update_bytes(0) * 8 / 8e6
            alone_s = time.monotonic() - began
            assert alone_s > 0.95 * least_s
        async with (
            following(tmp_path / "b", site.address, site.public_key, name="b") as b,
            following(tmp_path / "c", site.address, site.public_key, name="c") as c,
        ):
            assert b.follower.root == c.follower.root == site.root
        assert site.traffic.of("b").free_at_s > site.traffic.of("a").free_at_s + 0.95 * least_s
        assert site.traffic.of("a").bytes_sent == site.traffic.of("c").bytes_sent == site.update_bytes(0)
