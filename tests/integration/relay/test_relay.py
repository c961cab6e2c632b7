"""The relay between a real publisher and real followers."""

import asyncio
import hashlib
import logging
import time
from collections.abc import Generator
from pathlib import Path

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from grpc_status import rpc_status

from heterorl.v1 import weights_pb2
from heterorl.v1.weights_pb2_grpc import WeightServiceStub
from services.lab.wan import LinkProfile, WanLink
from services.relay.link import Link
from services.runtime.address import Address
from services.runtime.errors import StorageError
from services.wire.channel import open_channel
from services.wire.convert import from_plan, from_signed
from services.wire.delta import root_of
from services.wire.identity import Identity, Role
from services.wire.types import ObjectRef
from tests.support.weight_site import ANY_PORT, LearnerSite, dial, following, learner_site, relay_site
from tests.unit.learner.weights_of_tests import make_weights, nudged

LINK = LinkProfile(rate_bit_s=1e9)


async def fetch(stub: object, object_id: str, offset: int = 0, length: int = 0) -> bytes:
    assert isinstance(stub, WeightServiceStub)
    request = weights_pb2.FetchObjectRequest(object_id=object_id, offset=offset, length=length)
    return b"".join([chunk.data async for chunk in stub.FetchObject(request, timeout=20)])


def only_object(site: LearnerSite, version: int = 0) -> ObjectRef:
    update = site.versions.rows[version].update
    assert update is not None
    return update.objects[0]


async def test_who_asks_for_what_only_a_learner_sends_can_tell_that_it_is_not_here(tmp_path: Path) -> None:
    async with (
        learner_site(tmp_path / "learner") as site,
        relay_site(tmp_path / "relay", site.address) as relay,
        dial(relay.address) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError, match="ask the learner") as caught:
            await WeightServiceStub(channel).FollowUpdate(weights_pb2.FollowUpdateRequest(), timeout=10).read()
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_manifests_pass_unchanged_and_only_the_newest_is_kept(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner") as site, relay_site(tmp_path / "relay", site.address) as relay:
        await site.publisher.publish(0, weights := make_weights(1))
        async with dial(relay.address) as channel:
            watch = WeightServiceStub(channel).WatchPolicy(weights_pb2.WatchPolicyRequest(run_id="run"))
            first = (await watch.read()).manifest
            for version in range(1, 6):
                await site.publisher.publish(version, weights := nudged(weights, version))
            newest = site.publisher.latest.version.manifest
            received = [first]
            async with asyncio.timeout(10):
                while received[-1].manifest != newest.manifest:
                    received.append((await watch.read()).manifest)
            assert received[-1].signature == newest.signature
            relay.process.request_drain("enough")
            assert await watch.read() is grpc.aio.EOF


async def test_a_relay_refuses_other_runs_and_other_roles(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner") as site, relay_site(tmp_path / "relay", site.address) as relay:
        await site.publisher.publish(0, make_weights(1))
        async with dial(relay.address) as channel:
            stub = WeightServiceStub(channel)
            await stub.WatchPolicy(weights_pb2.WatchPolicyRequest()).read()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GetPlan(weights_pb2.GetPlanRequest(run_id="another"))
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        async with open_channel(relay.address, None, "control", Identity(role=Role.MONITOR, id="m")) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await WeightServiceStub(channel).GetPlan(weights_pb2.GetPlanRequest())
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_fetch_resumes_at_any_offset_from_upstream_and_from_disk(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner") as site, relay_site(tmp_path / "relay", site.address) as relay:
        await site.publisher.publish(0, make_weights(1, 600_000))
        ref = only_object(site)
        async with dial(relay.address) as channel:
            stub = WeightServiceStub(channel)
            ends = await asyncio.gather(
                *(fetch(stub, ref.object_id, ref.size_bytes - back) for back in (9, 700_000, 0))
            )
            whole = await fetch(stub, ref.object_id)
            assert hashlib.sha256(whole).hexdigest() == ref.object_id
            assert ends == [whole[-9:], whole[-700_000:], b""]
            assert await fetch(stub, ref.object_id, 1000, 5) == whole[1000:1005]
            for object_id, offset, code in (
                (ref.object_id, ref.size_bytes + 1, grpc.StatusCode.OUT_OF_RANGE),
                ("../../etc/passwd", 0, grpc.StatusCode.INVALID_ARGUMENT),
                ("0" * 64, 0, grpc.StatusCode.NOT_FOUND),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await fetch(stub, object_id, offset)
                assert caught.value.code() is code


async def test_samplers_that_ask_the_same_are_answered_by_one_question(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner") as site, relay_site(tmp_path / "relay", site.address) as relay:
        await site.publisher.publish(0, weights := make_weights(1))
        await site.publisher.publish(1, nudged(weights, 1, 3000))
        async with dial(relay.address) as channel:
            stub = WeightServiceStub(channel)
            await stub.WatchPolicy(weights_pb2.WatchPolicyRequest()).read()
            request = weights_pb2.GetPlanRequest(want_version=1)
            answers = await asyncio.gather(*(stub.GetPlan(request) for _ in range(6)))
            assert all(answer == answers[0] for answer in answers)
            assert len(site.planner.plans) == 1
            assert await stub.GetPlan(weights_pb2.GetPlanRequest(want_version=1, keyframe_only=True)) is not None
            assert len(site.planner.plans) == 2, "another question"
            with pytest.raises(grpc.aio.AioRpcError, match="64 lower-case hex digits"):
                await stub.GetPlan(weights_pb2.GetPlanRequest(want_version=1, have_root="a" * 100_000))
            assert len(site.planner.plans) == 2, "what could be remembered for nothing is not asked for"


async def test_with_upstream_away_what_is_known_is_served_and_the_rest_says_when_to_come_back(tmp_path: Path) -> None:
    async with (
        learner_site(tmp_path / "learner") as site,
        WanLink(ANY_PORT, site.address, LINK) as link,
        relay_site(tmp_path / "relay", link.address, connect={"patience_s": 0.2}) as relay,
        dial(relay.address) as channel,
    ):
        await site.publisher.publish(0, weights := make_weights(1))
        await site.publisher.publish(1, nudged(weights, 1))
        stub = WeightServiceStub(channel)
        await stub.WatchPolicy(weights_pb2.WatchPolicyRequest()).read()
        known = await stub.GetPlan(weights_pb2.GetPlanRequest(want_version=1))
        (step, *_) = from_plan(known).steps
        data = await fetch(stub, step.objects[0].object_id)
        link.cut()
        link.reset()
        assert await stub.GetPlan(weights_pb2.GetPlanRequest(want_version=1)) == known
        assert await fetch(stub, step.objects[0].object_id) == data
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetPlan(weights_pb2.GetPlanRequest(want_version=1, keyframe_only=True), timeout=30)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        status = rpc_status.from_call(caught.value)
        assert status is not None
        assert any(detail.Is(RetryInfo.DESCRIPTOR) for detail in status.details)
        link.heal()


async def test_a_damaged_cache_file_is_dropped_and_fetched_again(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner") as site, relay_site(tmp_path / "relay", site.address) as relay:
        await site.publisher.publish(0, make_weights(1))
        ref = only_object(site)
        async with dial(relay.address) as channel:
            stub = WeightServiceStub(channel)
            whole = await fetch(stub, ref.object_id)
            path = tmp_path / "relay" / "objects" / ref.object_id
            path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
            assert await fetch(stub, ref.object_id) == whole
            assert path.read_bytes() == whole


async def test_a_restarted_relay_serves_from_its_disk(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner") as site:
        await site.publisher.publish(0, make_weights(1))
        ref = only_object(site)
        for _ in range(2):
            async with relay_site(tmp_path / "relay", site.address) as relay, dial(relay.address) as channel:
                assert len(await fetch(WeightServiceStub(channel), ref.object_id)) == ref.size_bytes
        site.store.path_of(ref.object_id).unlink()
        async with relay_site(tmp_path / "relay", site.address) as relay, dial(relay.address) as channel:
            assert len(await fetch(WeightServiceStub(channel), ref.object_id)) == ref.size_bytes


async def test_an_object_larger_than_the_cache_is_refused_and_removes_nothing(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner") as site:
        await site.publisher.publish(0, weights := make_weights(1, 3_000_000))
        await site.publisher.publish(1, nudged(weights, 1))
        async with (
            relay_site(tmp_path / "relay", site.address, cache={"max_bytes": 1 << 20}) as relay,
            dial(relay.address) as channel,
        ):
            stub = WeightServiceStub(channel)
            await stub.WatchPolicy(weights_pb2.WatchPolicyRequest()).read()
            small = only_object(site, 1).object_id
            await fetch(stub, small)
            plan = from_plan(await stub.GetPlan(weights_pb2.GetPlanRequest(want_version=1, keyframe_only=True)))
            large = max((ref for step in plan.steps for ref in step.objects), key=lambda ref: ref.size_bytes)
            assert large.size_bytes > 1 << 20
            with pytest.raises(grpc.aio.AioRpcError, match=r"larger than cache.max_bytes") as caught:
                await fetch(stub, large.object_id)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert [path.name for path in (tmp_path / "relay" / "objects").iterdir()] == [small]


class Heard(logging.Handler):
    """What the relay says about its upstream: (level, event, reason)."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: asyncio.Queue[tuple[str, str, str]] = asyncio.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() in ("upstream_not_reached", "upstream_reached"):
            reason = record.__dict__["heterorl_facts"].get("reason", "")
            self.lines.put_nowait((record.levelname, record.getMessage(), reason))


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Generator[Heard]:
    monkeypatch.setattr(Link.__init__, "__kwdefaults__", {**Link.__init__.__kwdefaults__, "warn_after_s": 0.1})
    handler, logger = Heard(), logging.getLogger("heterorl.relay.upstream")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


async def test_the_log_says_that_upstream_is_not_reached_why_and_when_it_is(tmp_path: Path, heard: Heard) -> None:
    async with learner_site(tmp_path / "learner") as site:
        address = site.address
    async with asyncio.timeout(60), relay_site(tmp_path / "relay", address):
        level, event, reason = await heard.lines.get()
        assert (level, event) == ("WARNING", "upstream_not_reached")
        assert "Connection refused" in reason
        async with learner_site(tmp_path / "learner", port=address.port):
            assert (await heard.lines.get())[:2] == ("INFO", "upstream_reached"), "before its first version"
        assert (await heard.lines.get())[:2] == ("WARNING", "upstream_not_reached")


async def test_the_log_says_that_upstream_is_no_learner(tmp_path: Path, heard: Heard) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    address = Address(host="127.0.0.1", port=server.sockets[0].getsockname()[1])
    async with asyncio.timeout(60), server, relay_site(tmp_path / "relay", address):
        level, event, reason = await heard.lines.get()
        assert (level, event) == ("WARNING", "upstream_not_reached")
        assert "http1" in reason


async def test_two_relays_do_not_share_a_cache(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner") as site, relay_site(tmp_path / "relay", site.address):
        with pytest.raises(ExceptionGroup) as caught:
            async with relay_site(tmp_path / "relay", site.address):
                pass
        assert caught.group_contains(StorageError, match="in use by process")


async def test_a_sampler_falls_back_to_the_learner_and_comes_back_to_the_relay(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner") as site:
        await site.publisher.publish(0, weights := make_weights(1))
        async with relay_site(tmp_path / "relay", site.address) as relay:
            port = relay.address.port
            async with following(
                tmp_path / "s", site.address, site.public_key, relay=relay.address, aside_s=0.5
            ) as sampler:
                assert sampler.sources.received_bytes["learner"] == 0
                relay.process.request_drain("stopped for a while")
                await asyncio.sleep(0.1)
                for version in (1, 2):
                    began = time.monotonic()
                    await site.publisher.publish(version, weights := nudged(weights, version))
                    assert await sampler.reach(version) == site.root
                    assert time.monotonic() - began < 15
                assert sampler.sources.fallbacks >= 1
                alone = sampler.sources.received_bytes["learner"]
                assert alone > 0
                listen = {"address": str(Address(host="127.0.0.1", port=port))}
                async with relay_site(tmp_path / "relay", site.address, listen=listen):
                    by_relay, version = sampler.sources.received_bytes["relay"], 3
                    async with asyncio.timeout(30):
                        while sampler.sources.received_bytes["relay"] == by_relay:
                            await site.publisher.publish(version, weights := nudged(weights, version))
                            await sampler.reach(version)
                            version += 1
                    assert sampler.follower.root == site.root
                    assert sampler.tally.keyframes_refetched == 0


async def test_a_relay_follows_a_learner_that_restarts_and_goes_back(tmp_path: Path) -> None:
    weights = [make_weights(1), nudged(make_weights(1), 1)]
    async with learner_site(tmp_path / "learner") as site:
        for version in (0, 1):
            await site.publisher.publish(version, weights[version])
        address = site.address
    async with relay_site(tmp_path / "relay", address) as relay, dial(relay.address) as channel:
        stub = WeightServiceStub(channel)
        watch = stub.WatchPolicy(weights_pb2.WatchPolicyRequest())
        for epoch, version in ((2, 1), (3, 0)):
            async with learner_site(tmp_path / "learner", port=address.port, epoch=epoch) as site:
                await site.publisher.restore(version, weights[version], root_of(weights[version]))
                async with asyncio.timeout(30):
                    announced = from_signed((await watch.read()).manifest).decoded
                assert (announced.learner_epoch, announced.version) == (epoch, version)
                plan = from_plan(await stub.GetPlan(weights_pb2.GetPlanRequest()))
                assert (plan.target.decoded.learner_epoch, plan.target.decoded.root) == (epoch, site.root)
        watch.cancel()
