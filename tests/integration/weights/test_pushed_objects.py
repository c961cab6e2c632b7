"""Small objects of the next update come without a question; what does not come, or comes wrong, is fetched."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from heterorl.v1 import types_pb2, weights_pb2
from services.learner import object_store, weight_service
from services.runtime import failpoints
from services.runtime.address import Address
from services.runtime.errors import StorageError
from services.sampler import pushed
from services.sampler.object_cache import ObjectCache
from services.sampler.policy_watch import PolicyWatch
from services.wire.delta import layout as layout_module
from services.wire.delta import root_of
from services.wire.types import Announcement, ObjectRef
from tests.support.gated_store import gated, own
from tests.support.weight_site import LearnerSite, Tampering, following, learner_site, relay_site, tampering
from tests.unit.learner.weights_of_tests import make_weights, nudged

PARTS = 5


@pytest.fixture(autouse=True)
def several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_module, "CHUNK_ELEMENTS", 2000)
    monkeypatch.setattr(layout_module, "PART_BYTES", 16_000)


@pytest.fixture(autouse=True, params=[0, 8], ids=["from disk", "from memory"])
def kept_in_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_FRESH", request.param)


class Pushing(Tampering):
    """Forwards FollowUpdate too; `push` changes what it sends."""

    push: Callable[[weights_pb2.FollowUpdateResponse], weights_pb2.FollowUpdateResponse] = staticmethod(lambda one: one)
    off: int = 0
    """So many questions are answered with nothing."""

    def __init__(self, upstream: Address) -> None:
        super().__init__(upstream)
        self.follows = 0
        self._asked = asyncio.Event()

    async def asked(self, times: int = 1) -> None:
        """Returns once a sampler waits for the next update: from then on it comes unasked."""
        async with asyncio.timeout(10):
            while self.follows < times:
                self._asked.clear()
                await self._asked.wait()

    def _count(self) -> None:
        self.follows += 1
        self._asked.set()

    async def FollowUpdate(
        self, request: weights_pb2.FollowUpdateRequest, context: object
    ) -> AsyncIterator[weights_pb2.FollowUpdateResponse]:
        self._count()
        if self.follows > self.off:
            async for message in self._stub.FollowUpdate(request):
                yield self.push(message)

    def fetched(self, site: LearnerSite, *versions: int) -> int:
        """How many objects of these versions' updates were asked for."""
        ids = {ref.object_id for version in versions for ref in objects_of(site, version)}
        return len({fetch.object_id for fetch in self.fetches} & ids)


@asynccontextmanager
async def pushing(site: LearnerSite) -> AsyncGenerator[tuple[Address, Pushing]]:
    async with tampering(site.address, Pushing) as (address, service):
        assert isinstance(service, Pushing)
        yield address, service


def objects_of(site: LearnerSite, version: int) -> tuple[ObjectRef, ...]:
    update = site.versions.rows[version].update
    assert update is not None
    return update.objects


class Puts:
    """The pushed objects that came, and who waits for so many."""

    def __init__(self) -> None:
        self._put = ObjectCache.put
        self._news = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.names: list[str] = []

    def note(self, cache: ObjectCache, ref: ObjectRef, data: bytes) -> None:
        self._put(cache, ref, data)
        self.names.append(ref.object_id)
        self._loop.call_soon_threadsafe(self._news.set)

    async def reach(self, objects: int) -> None:
        async with asyncio.timeout(10):
            while len(self.names) < objects:
                self._news.clear()
                await self._news.wait()


@pytest.fixture
async def puts(monkeypatch: pytest.MonkeyPatch) -> Puts:
    counter = Puts()
    monkeypatch.setattr(ObjectCache, "put", lambda cache, ref, data: counter.note(cache, ref, data))
    return counter


async def test_an_update_comes_whole_without_one_question(tmp_path: Path, puts: Puts) -> None:
    async with learner_site(tmp_path / "learner") as site, pushing(site) as (address, service):
        await site.publisher.publish(0, weights := make_weights(1))
        async with following(tmp_path / "s", address, site.public_key, held=own(weights)) as sampler:
            await service.asked()
            for version in (1, 2, 3):
                before = sampler.tally.weights_bytes
                with gated(site, 3) as gate:
                    publishing = asyncio.create_task(
                        site.publisher.publish(version, weights := nudged(weights, version))
                    )
                    await puts.reach(PARTS * (version - 1) + 3)
                    assert sampler.follower.version == version - 1
                    gate.open()
                    await publishing
                assert await sampler.reach(version) == root_of(weights)
                assert sampler.tally.weights_bytes - before == site.update_bytes(version)
            assert service.fetched(site, 1, 2, 3) == 0
            assert sampler.sources.received_bytes["learner"] == sum(site.update_bytes(n) for n in (1, 2, 3))
        assert site.planner.plans == []


async def test_the_learner_counts_what_it_pushes(tmp_path: Path, puts: Puts) -> None:
    async with learner_site(tmp_path / "learner") as site, pushing(site) as (address, service):
        await site.publisher.publish(0, weights := make_weights(1))
        async with following(tmp_path / "s", address, site.public_key, held=own(weights)) as sampler:
            await service.asked()
            await site.publisher.publish(1, weights := nudged(weights, 1))
            await sampler.reach(1)
            receiver = site.traffic.of("eu-1")
            assert len(puts.names) == PARTS
            assert (receiver.versions_fetched, receiver.bytes_sent) == (1, site.update_bytes(1))


async def test_larger_objects_are_fetched_and_the_others_still_come(
    tmp_path: Path, puts: Puts, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with learner_site(tmp_path / "learner") as site, pushing(site) as (address, service):
        await site.publisher.publish(0, weights := make_weights(1))
        await site.publisher.publish(1, weights := nudged(weights, 1))
        sizes = sorted(ref.size_bytes for ref in objects_of(site, 1))
        for module in (weight_service, pushed):
            monkeypatch.setattr(module, "MAX_CHUNK_BYTES", sizes[0] - 1)
        async with following(tmp_path / "s", address, site.public_key) as sampler:
            await service.asked()
            weights = nudged(weights, 2, changes=600)
            weights["a.weight"] = (await sampler.follower.first()).weights["a.weight"]
            await site.publisher.publish(2, weights)
            assert await sampler.reach(2) == root_of(weights)
            small = {ref.object_id for ref in objects_of(site, 2) if ref.size_bytes < sizes[0]}
            assert 0 < len(small) < PARTS
            assert set(puts.names) == small
            assert service.fetched(site, 2) == PARTS - len(small)


async def test_what_was_named_before_is_fetched_and_only_the_rest_is_pushed(
    tmp_path: Path, puts: Puts, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with learner_site(tmp_path / "learner") as site, pushing(site) as (address, service):
        service.off = 1
        go_on, named = asyncio.Event(), asyncio.Event()
        hear = PolicyWatch._announce

        def announce(watch: PolicyWatch, announcement: Announcement) -> None:
            hear(watch, announcement)
            if watch.arrivals is not None and len(watch.arrivals.refs) == 3:
                named.set()

        monkeypatch.setattr(PolicyWatch, "_announce", announce)
        service.before = lambda _: go_on.wait()
        await site.publisher.publish(0, weights := make_weights(1))
        async with following(tmp_path / "s", address, site.public_key, held=own(weights)) as sampler:
            await service.asked()
            await site.publisher.publish(1, weights := nudged(weights, 1))
            with gated(site, 3) as gate:
                publishing = asyncio.create_task(site.publisher.publish(2, weights := nudged(weights, 2)))
                await asyncio.to_thread(gate.wait_for, 3)
                async with asyncio.timeout(10):
                    await named.wait()
                go_on.set()
                await sampler.reach(1)
                gate.open()
                await publishing
                assert await sampler.reach(2) == root_of(weights)
            assert puts.names == [ref.object_id for ref in gate.kept[3:]]
            assert service.fetched(site, 2) == 3


async def test_an_update_that_is_given_up_is_followed_by_the_next(tmp_path: Path, puts: Puts) -> None:
    async with learner_site(tmp_path / "learner") as site, pushing(site) as (address, service):
        await site.publisher.publish(0, weights := make_weights(1))
        async with following(tmp_path / "s", address, site.public_key, held=own(weights)) as sampler:
            await service.asked()
            failpoints.arm("publish.after_objects=1*error->off")
            try:
                with gated(site, 3) as gate:
                    publishing = asyncio.create_task(site.publisher.publish(1, nudged(weights, 1)))
                    await puts.reach(3)
                    gate.open()
                    with pytest.raises(StorageError):
                        await publishing
            finally:
                failpoints.arm("")
            await service.asked(2)
            await site.publisher.publish(1, weights := nudged(weights, 2))
            assert await sampler.reach(1) == root_of(weights)
            # Before them came those that were given up.
            assert puts.names[-PARTS:] == [ref.object_id for ref in objects_of(site, 1)], "again from the first"
            await site.publisher.publish(2, weights := nudged(weights, 3))
            assert await sampler.reach(2) == root_of(weights)
            assert service.fetched(site, 2) == 0


async def test_relays_and_several_channels_are_asked_instead(tmp_path: Path, puts: Puts) -> None:
    async with learner_site(tmp_path / "learner") as site, relay_site(tmp_path / "relay", site.address) as relay:
        await site.publisher.publish(0, weights := make_weights(1))
        async with (
            following(tmp_path / "r", site.address, site.public_key, name="r", relay=relay.address) as far,
            following(tmp_path / "c", site.address, site.public_key, name="c", channels=2) as wide,
        ):
            await site.publisher.publish(1, weights := nudged(weights, 1))
            assert await far.reach(1) == await wide.reach(1) == root_of(weights)
            assert puts.names == []


Sent = weights_pb2.FollowUpdateResponse


def other_bytes(one: Sent) -> Sent:
    one.data = one.data[:-1] + bytes((one.data[-1] ^ 1,))
    return one


def another_size(one: Sent) -> Sent:
    one.data += b"x"
    return one


def a_path(one: Sent) -> Sent:
    one.object.object_id = "../" + "0" * 61
    return one


def nothing(_: Sent) -> Sent:
    return Sent()


def not_what_was_made(_: Sent) -> Sent:
    return Sent(object=types_pb2.ObjectRef(object_id="0" * 64, size_bytes=3), data=b"xyz")


@pytest.mark.parametrize("lie", [other_bytes, another_size, a_path, nothing, not_what_was_made])
async def test_what_comes_wrong_is_fetched(
    tmp_path: Path, lie: Callable[[Sent], Sent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushed, "_PATIENCE_S", 0.2)
    async with learner_site(tmp_path / "learner") as site, pushing(site) as (address, service):
        service.push = lie
        await site.publisher.publish(0, weights := make_weights(1))
        async with following(tmp_path / "s", address, site.public_key, held=own(weights)) as sampler:
            for version in (1, 2):
                await site.publisher.publish(version, weights := nudged(weights, version))
                assert await sampler.reach(version) == root_of(weights)
            assert service.fetched(site, 1, 2) == 2 * PARTS
            assert (sampler.tally.versions_refused, sampler.tally.keyframes_refetched) == (0, 0)


async def test_a_flood_is_cut_off_at_the_size_of_the_weights(tmp_path: Path, puts: Puts) -> None:
    async with learner_site(tmp_path / "learner") as site, tampering(site.address, Flooding) as (address, _):
        await site.publisher.publish(0, weights := make_weights(1))
        async with following(tmp_path / "s", address, site.public_key, held=own(weights)) as sampler:
            await site.publisher.publish(1, weights := nudged(weights, 1))
            assert await sampler.reach(1) == root_of(weights)
            assert len(puts.names) * Flooding.BYTES <= 2 * 20_000 + Flooding.BYTES


class Flooding(Tampering):
    """Never stops."""

    BYTES = 10_000

    async def FollowUpdate(self, request: object, context: grpc.aio.ServicerContext) -> AsyncIterator[Sent]:
        for number in range(1 << 20):
            name = types_pb2.ObjectRef(object_id=f"{number:064x}", size_bytes=self.BYTES)
            yield Sent(object=name, data=bytes(self.BYTES))


async def test_a_link_that_is_too_slow_for_it_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushed, "_PATIENCE_S", 0.05)
    async with learner_site(tmp_path / "learner") as site, tampering(site.address, Silent) as (address, service):
        assert isinstance(service, Silent)
        await site.publisher.publish(0, weights := make_weights(1))
        async with following(tmp_path / "s", address, site.public_key, held=own(weights)) as sampler:
            await service.asked()
            for version in (1, 2):
                await site.publisher.publish(version, weights := nudged(weights, version))
                assert await sampler.reach(version) == root_of(weights)
            assert service.follows == 1


class Silent(Pushing):
    """Takes the question and says nothing."""

    async def FollowUpdate(self, request: object, context: grpc.aio.ServicerContext) -> AsyncIterator[Sent]:
        self._count()
        await asyncio.Event().wait()
        yield Sent()


class Skipping(Pushing):
    """Sends all but the first object of each update, and never ends."""

    async def FollowUpdate(self, request: weights_pb2.FollowUpdateRequest, context: object) -> AsyncIterator[Sent]:
        self._count()
        first = True
        async for message in self._stub.FollowUpdate(request):
            if not first:
                yield message
            first = False
        await asyncio.Event().wait()


async def test_an_object_that_was_left_out_is_not_waited_for(tmp_path: Path) -> None:
    async with learner_site(tmp_path / "learner") as site, tampering(site.address, Skipping) as (address, service):
        assert isinstance(service, Skipping)
        await site.publisher.publish(0, weights := make_weights(1))
        async with following(tmp_path / "s", address, site.public_key, held=own(weights)) as sampler:
            await service.asked()
            await site.publisher.publish(1, weights := nudged(weights, 1))
            assert await sampler.reach(1) == root_of(weights)
            await site.publisher.publish(2, weights := nudged(weights, 2))
            assert await sampler.reach(2) == root_of(weights)
            assert service.fetched(site, 1, 2) == 2
            assert service.follows >= 2, "patience did not end: another update was followed"


async def test_a_cache_that_cannot_be_tidied_loses_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tidy = ObjectCache.evict

    def evict(cache: ObjectCache, keep: Collection[str]) -> None:
        if not keep:
            raise StorageError("cannot tidy: Permission denied")
        tidy(cache, keep)

    monkeypatch.setattr(ObjectCache, "evict", evict)
    async with learner_site(tmp_path / "learner") as site:
        await site.publisher.publish(0, weights := make_weights(1))
        async with following(tmp_path / "s", site.address, site.public_key) as sampler:
            await site.publisher.publish(1, weights := nudged(weights, 1))
            assert await sampler.reach(1) == root_of(weights)


async def test_a_full_disk_is_for_the_fetch_to_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(cache: ObjectCache, ref: ObjectRef, data: bytes) -> None:
        raise StorageError("cannot write: No space left on device")

    monkeypatch.setattr(ObjectCache, "put", full)
    async with learner_site(tmp_path / "learner") as site, pushing(site) as (address, service):
        await site.publisher.publish(0, weights := make_weights(1))
        async with following(tmp_path / "s", address, site.public_key, held=own(weights)) as sampler:
            await site.publisher.publish(1, weights := nudged(weights, 1))
            assert await sampler.reach(1) == root_of(weights)
            assert service.fetched(site, 1) == PARTS
