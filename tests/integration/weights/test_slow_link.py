"""A link on which one chunk takes longer than the stall limit, and a relay that sends next to nothing."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc

from heterorl.v1 import weights_pb2
from services.lab.wan import LinkProfile, WanLink
from services.wire.objects import chunk_of
from tests.support.weight_site import ANY_PORT, Fetched, Tampering, following, learner_site, tampering
from tests.unit.learner.weights_of_tests import make_weights

CRAWLING = LinkProfile(rate_bit_s=1.5e6, queue_s=0.01)


async def test_an_object_arrives_in_pieces_when_a_chunk_takes_too_long(tmp_path: Path) -> None:
    async with (
        learner_site(tmp_path / "learner") as site,
        tampering(site.address) as (address, service),
        WanLink(ANY_PORT, address, CRAWLING) as link,
    ):
        await site.publisher.publish(0, make_weights(1, 300_000))
        update = site.versions.rows[0].update
        assert update is not None
        size = sum(ref.size_bytes for ref in update.objects)
        assert size * 8 / CRAWLING.rate_bit_s > 2.0, "one chunk, for longer than two stall limits"
        async with following(tmp_path / "s", link.address, site.public_key, stall_s=1.0) as sampler:
            assert sampler.follower.root == site.root
            assert sampler.sources.received_bytes["learner"] == size
        assert service.fetches[0].length == 0
        assert 0 < service.fetches[1].length <= 64 << 10
        assert service.fetches[-1].offset > 0, "what came is not asked for again"


class Dripping(Tampering):
    async def FetchObject(
        self, request: weights_pb2.FetchObjectRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[Fetched]:
        async for one in super().FetchObject(request, context):
            for place in range(len(one.data)):
                drop = chunk_of(one.offset + place, one.data[place : place + 1])
                yield Fetched(offset=drop.offset, data=drop.data, crc32c=drop.crc32c)
                await asyncio.sleep(0.02)


async def test_a_relay_that_sends_a_byte_now_and_then_is_left_for_the_learner(tmp_path: Path) -> None:
    async with (
        learner_site(tmp_path / "learner") as site,
        tampering(site.address, Dripping) as (relay, _),
    ):
        await site.publisher.publish(0, make_weights(1))
        async with following(tmp_path / "s", site.address, site.public_key, relay=relay, stall_s=0.5) as sampler:
            assert sampler.follower.root == site.root
            assert sampler.sources.fallbacks == 1
            assert 1 < sampler.sources.received_bytes["relay"] < 100


class CutOffWhileLarge(Tampering):
    async def FetchObject(
        self, request: weights_pb2.FetchObjectRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[Fetched]:
        if not 0 < request.length <= 64 << 10:
            self.fetches.append(request)
            await asyncio.sleep(0.2)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Stream removed (ping timeout)")
        async for one in super().FetchObject(request, context):
            yield one


async def test_a_connection_that_is_given_up_before_a_chunk_came_asks_for_less(tmp_path: Path) -> None:
    """Behind a long queue the answer to a ping comes as late as the chunks do: asked for as much again, they would be
    lost with the next connection, and so on."""
    async with (
        learner_site(tmp_path / "learner") as site,
        tampering(site.address, CutOffWhileLarge) as (address, service),
    ):
        await site.publisher.publish(0, make_weights(1, 40_000))
        async with following(tmp_path / "s", address, site.public_key, stall_s=8.0) as sampler:
            assert sampler.follower.root == site.root
        assert service.fetches[0].length == 0
        assert service.fetches[-1].length <= 64 << 10
