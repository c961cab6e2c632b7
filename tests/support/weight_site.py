"""The real parts that move weights, in the test's own process: publisher and WeightService, relay, followers.

learner_site ── (WanLink) ── relay_site ── (WanLink) ── following
                             tampering: a proxy that forwards everything and changes what it is told to
"""

import asyncio
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from heterorl.v1 import weights_pb2, weights_pb2_grpc
from services.learner import weight_service as learner_service
from services.learner.config import PublishSection
from services.learner.object_store import ObjectStore
from services.learner.plans import Planner
from services.learner.publisher import Publisher, RunFacts
from services.learner.traffic import Traffic
from services.learner.versions import VersionFiles
from services.learner.weight_service import WeightService
from services.relay import weight_service as relay_service
from services.relay.app import run_relay
from services.relay.config import RelayConfig
from services.runtime.address import Address, parse_target
from services.runtime.backoff import Backoff
from services.runtime.lifecycle import Process
from services.runtime.log import get_logger
from services.sampler.follower import Follower, HeldPolicy
from services.sampler.object_cache import ObjectCache
from services.sampler.tally import Tally
from services.sampler.weight_sources import WeightSources
from services.wire.channel import open_channel
from services.wire.delta import BitTensor, Weights, root_of
from services.wire.identity import Identity, Role
from services.wire.interceptors import server_interceptors
from services.wire.objects import read_chunk
from services.wire.server import bind, build_server
from services.wire.signing import ManifestSigner
from services.wire.types import Plan

RUN_ID = "run"
ANY_PORT = Address(host="127.0.0.1", port=0)
RULES = {
    f"/heterorl.v1.WeightService/{method}": frozenset({Role.SAMPLER, Role.RELAY})
    for method in ("WatchPolicy", "GetPlan", "FetchObject", "FollowUpdate")
}
Fetched = weights_pb2.FetchObjectResponse


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSite:
    """What publishes, and where it is served."""

    address: Address
    store: ObjectStore
    versions: VersionFiles
    publisher: Publisher
    planner: "RecordingPlanner"
    traffic: Traffic
    public_key: bytes
    now_s: list[float]
    """The store's clock: [seconds]."""

    @property
    def root(self) -> str:
        return self.publisher.latest.version.root

    def update_bytes(self, version: int) -> int:
        """Of the update that was made for `version`."""
        update = self.versions.rows[version].update
        assert update is not None
        return sum(ref.size_bytes for ref in update.objects)


@contextmanager
def chunks_of(size_bytes: int) -> Generator[None]:
    """Learner and relay send chunks of this size, so that small objects have boundaries to be cut at."""
    modules = (learner_service, relay_service)
    for module in modules:
        module.read_chunk = functools.partial(read_chunk, size=size_bytes)  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in modules:
            module.read_chunk = read_chunk


class RecordingPlanner(Planner):
    """Keeps what it answered: each is what one GetPlan got."""

    plans: list[Plan]

    async def plan(self, have_root: str, want_version: int, keyframe_only: bool = False) -> Plan:
        self.plans.append(await super().plan(have_root, want_version, keyframe_only))
        return self.plans[-1]


class OldWeightService(WeightService):
    """Of a release that announces versions without their updates, and only when they are made."""

    async def WatchPolicy(
        self, request: weights_pb2.WatchPolicyRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[weights_pb2.WatchPolicyResponse]:
        told = b""
        async for message in super().WatchPolicy(request, context):
            if message.manifest.manifest != told:
                told = message.manifest.manifest
                yield weights_pb2.WatchPolicyResponse(manifest=message.manifest)

    async def FollowUpdate(self, request: weights_pb2.FollowUpdateRequest, context: grpc.aio.ServicerContext) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "unknown method")


@asynccontextmanager
async def learner_site(
    folder: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    epoch: int = 1,
    stall_s: float = 60.0,
    credentials: grpc.ServerCredentials | None = None,
    kind: type[WeightService] = WeightService,
    **settings: object,
) -> AsyncGenerator[LearnerSite]:
    """A learner's half of WeightService on `folder`; on the same folder again, it is restarted."""
    section = PublishSection.model_validate({"workers": 1, **settings})
    now_s = [0.0]
    store = ObjectStore(folder / "objects", clock=lambda: now_s[0])
    versions = VersionFiles(folder / "versions")
    signer = ManifestSigner.load_or_create(folder / "key.pem")
    facts = RunFacts(run_id=RUN_ID, learner_epoch=epoch, model_files_sha256="")
    publisher = Publisher(
        store=store, versions=versions, facts=facts, signer=signer, settings=section, root_last=lambda: True
    )
    planner = RecordingPlanner(store=store, versions=versions, publisher=publisher, settings=section, run_id=RUN_ID)
    planner.plans = []
    traffic, drain = Traffic(section.max_mbit_s), asyncio.Event()
    service = kind(
        run_id=RUN_ID, publisher=publisher, planner=planner, store=store, traffic=traffic, drain=drain, stall_s=stall_s
    )
    server = build_server("learner", server_interceptors(RULES))
    weights_pb2_grpc.add_WeightServiceServicer_to_server(service, server)
    address = bind(server, Address(host=host, port=port), credentials)
    await server.start()
    try:
        yield LearnerSite(
            address=address,
            store=store,
            versions=versions,
            publisher=publisher,
            planner=planner,
            traffic=traffic,
            public_key=signer.public_key,
            now_s=now_s,
        )
    finally:
        drain.set()
        await server.stop(0.2)


@dataclass(frozen=True, slots=True, kw_only=True)
class RelaySite:
    """`process.request_drain` is what a signal does."""

    address: Address
    process: Process


@asynccontextmanager
async def relay_site(folder: Path, upstream: Address, **changes: Mapping[str, object]) -> AsyncGenerator[RelaySite]:
    """The real app without TLS; `changes` are keys of sections."""
    tree: dict[str, dict[str, object]] = {
        "connect": {"upstream": str(upstream), "insecure": True, "patience_s": 3.0},
        "listen": {"address": "127.0.0.1:0", "insecure": True},
        "cache": {"dir": folder},
    }
    for section, keys in changes.items():
        tree[section] = {**tree.get(section, {}), **keys}
    config = RelayConfig.model_validate(tree)
    ready: asyncio.Future[tuple[Process, str]] = asyncio.get_running_loop().create_future()

    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            process = Process(tasks, get_logger("relay"))
            process.ready = lambda status: ready.set_result((process, status))  # type: ignore[method-assign]
            await run_relay(config, process)

    ended = asyncio.create_task(main())
    await asyncio.wait((ended, ready), return_when=asyncio.FIRST_COMPLETED)
    if ended.done():
        ended.result()
    process, status = await ready
    try:
        yield RelaySite(address=parse_target(status.rsplit(" ", 1)[1]), process=process)
    finally:
        process.request_drain("the test is over")
        await ended


@dataclass(slots=True)
class RecordingEngine:
    """Keeps what it is given; proves each root again."""

    loaded: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])

    async def load(self, weights: Mapping[str, BitTensor], version: int, root: str) -> float:
        assert root_of(weights) == root
        self.loaded.append((version, root))
        return 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Following:
    """A sampler's half. `folder` holds its object cache."""

    follower: Follower
    engine: RecordingEngine
    tally: Tally
    sources: WeightSources
    cache: ObjectCache
    folder: Path

    async def reach(self, version: int, timeout_s: float = 30.0) -> str:
        """The root, once `version` is loaded."""
        async with asyncio.timeout(timeout_s):
            await self.follower.reached(version)
        return self.follower.root


def dial(address: Address, name: str = "eu-1", credentials: grpc.ChannelCredentials | None = None) -> grpc.aio.Channel:
    """A sampler's bulk channel."""
    return open_channel(address, credentials, "bulk", Identity(role=Role.SAMPLER, id=name))


@asynccontextmanager
async def following(
    folder: Path,
    learner: Address,
    public_key: bytes,
    *,
    relay: Address | None = None,
    name: str = "eu-1",
    aside_s: float = 30.0,
    stall_s: float = 30.0,
    channels: int = 1,
    held: tuple[Weights, int, str] | None = None,
) -> AsyncGenerator[Following]:
    """Follows until the block ends; begins with `held` (weights, version, root), or the first that it gets."""
    channel = dial(learner, name)
    lanes = [dial(learner, name) for _ in range(channels - 1)]
    relay_channel = None if relay is None else dial(relay, name)
    stub = None if relay_channel is None else weights_pb2_grpc.WeightServiceStub(relay_channel)
    sources = WeightSources(
        weights_pb2_grpc.WeightServiceStub(channel),
        stub,
        lanes=[weights_pb2_grpc.WeightServiceStub(lane) for lane in lanes],
        aside_s=aside_s,
        stall_s=stall_s,
    )
    tally = Tally()
    cache = ObjectCache(folder, sources, 1 << 30)
    follower = Follower(
        sources=sources,
        cache=cache,
        tally=tally,
        run_id=RUN_ID,
        public_key=public_key,
        news=asyncio.Event(),
        backoff=Backoff(uniform=lambda _, longest: 0.02 * longest),
    )
    engine = RecordingEngine()
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(follower.watch())]
            async with asyncio.timeout(60):
                await _begin(follower, engine, held)
            running.append(tasks.create_task(follower.follow(engine)))
            yield Following(follower=follower, engine=engine, tally=tally, sources=sources, cache=cache, folder=folder)
            for task in running:
                task.cancel()
    finally:
        for opened in (channel, *lanes):
            await opened.close()
        if relay_channel is not None:
            await relay_channel.close()


async def _begin(follower: Follower, engine: RecordingEngine, held: tuple[Weights, int, str] | None) -> None:
    if held is None:
        first = await follower.first()
        await engine.load(first.weights, first.version, first.root)
    else:
        weights, version, root = held
        first = follower._held = HeldPolicy(weights=weights, version=version, root=root)
        engine.loaded.append((version, root))  # not proved: it may be meant to be damaged
    await follower._note_loaded(first)


async def _at_once(_: object) -> None: ...


class Tampering(weights_pb2_grpc.WeightServiceServicer):
    """Forwards everything to `upstream`. `tamper` gets all chunks of a fetch; `plan` changes a plan, `announcement` an
    announcement; a fetch waits for `before`."""

    def __init__(self, upstream: Address) -> None:
        self._channel = dial(upstream)
        self._stub = weights_pb2_grpc.WeightServiceStub(self._channel)
        self.tamper: Callable[[list[Fetched]], list[Fetched]] = lambda chunks: chunks
        self.plan: Callable[[weights_pb2.GetPlanResponse], weights_pb2.GetPlanResponse] = lambda plan: plan
        self.announcement: Callable[[weights_pb2.WatchPolicyResponse], weights_pb2.WatchPolicyResponse] = lambda one: (
            one
        )
        self.before: Callable[[weights_pb2.FetchObjectRequest], Awaitable[object]] = _at_once
        self.fetches: list[weights_pb2.FetchObjectRequest] = []
        self.plans: list[weights_pb2.GetPlanRequest] = []

    async def WatchPolicy(
        self, request: weights_pb2.WatchPolicyRequest, context: object
    ) -> AsyncIterator[weights_pb2.WatchPolicyResponse]:
        async for message in self._stub.WatchPolicy(request):
            yield self.announcement(message)

    async def GetPlan(
        self, request: weights_pb2.GetPlanRequest, context: grpc.aio.ServicerContext
    ) -> weights_pb2.GetPlanResponse:
        self.plans.append(request)
        return self.plan(await self._stub.GetPlan(request))

    async def FetchObject(
        self, request: weights_pb2.FetchObjectRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[Fetched]:
        self.fetches.append(request)
        await self.before(request)
        try:
            chunks = [chunk async for chunk in self._stub.FetchObject(request)]
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details() or "", tuple(error.trailing_metadata()))
        for chunk in self.tamper(chunks):
            yield chunk

    async def close(self) -> None:
        await self._channel.close()


@asynccontextmanager
async def tampering(upstream: Address, kind: type[Tampering] = Tampering) -> AsyncGenerator[tuple[Address, Tampering]]:
    """A hostile relay, or a hostile learner without its key."""
    service = kind(upstream)
    server = grpc.aio.server()
    weights_pb2_grpc.add_WeightServiceServicer_to_server(service, server)
    address = bind(server, ANY_PORT, None)
    await server.start()
    try:
        yield address, service
    finally:
        await server.stop(0)
        await service.close()
