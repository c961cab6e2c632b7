"""The sampler process.

    lock state_dir ─► own certificate ─► reward service ─► register ─► model files ─► first weights ─► engine
      └─► tasks: heartbeat · watch · follow · rollout · submit · reward supervision      (listens on Unix sockets only)

SIGTERM, or a drain asked for by the learner: no more leases → groups in flight finished or released → spool submitted,
for a bounded time → exit 0. What is not submitted stays in the spool for the next start.
"""

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc

from heterorl.v1.control_pb2_grpc import ControlServiceStub
from heterorl.v1.rollouts_pb2_grpc import RolloutServiceStub
from heterorl.v1.weights_pb2_grpc import WeightServiceStub
from services.reward.client import RewardClient
from services.runtime.address import Address, parse_target
from services.runtime.errors import ConfigError
from services.runtime.files import locked_directory
from services.runtime.lifecycle import Process
from services.runtime.log import get_logger
from services.sampler.config import SamplerConfig
from services.sampler.delays import DelayKind, Delays
from services.sampler.engine import Engine
from services.sampler.engine_transformers import TransformersEngine
from services.sampler.engine_vllm import VllmEngine
from services.sampler.follower import Follower
from services.sampler.heartbeat import Heartbeat
from services.sampler.local_health import Health, serve_health
from services.sampler.object_cache import ObjectCache
from services.sampler.prompts import PromptCodec
from services.sampler.reward_child import RewardChild
from services.sampler.rollout import Rollout, limits_for
from services.sampler.run_files import fetch_model_files
from services.sampler.scoring import GroupScorer, check_allowed, check_served, reward_graders
from services.sampler.session import LearnerSession
from services.sampler.spool import Spool
from services.sampler.submitter import Submitter
from services.sampler.tally import Tally
from services.sampler.telemetry import Vitals, metrics_served
from services.sampler.weight_sources import WeightSources
from services.wire.channel import open_channel
from services.wire.credentials import channel_credentials
from services.wire.expiry import tell_of_expiry
from services.wire.identity import Identity, Role, require_id

_log = get_logger("sampler")
_DRAIN_GROUPS_S = 60.0
_DRAIN_SPOOL_S = 30.0
_CACHE_BYTES = 256 << 20
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """Two channels, so that heartbeats do not queue behind weights ([M] 777 ms shared, 104 ms separate)."""

    learner: Address
    sampler_id: str
    control: grpc.aio.Channel
    bulk: tuple[grpc.aio.Channel, ...]
    relay: tuple[grpc.aio.Channel, ...]
    """To the relay of connect.weights, where there is one."""


async def run_sampler(config: SamplerConfig, process: Process) -> None:
    """The main coroutine. Raises HeteroRLError subclasses with the exit codes of docs/operations.md."""
    # Everything about this host that can be wrong is found before anything is dialled.
    learner = parse_target(config.connect.learner)
    relay_target = parse_target(config.connect.weights) if config.connect.weights else None
    credentials, identity = _credentials(config)
    engine = make_engine(config)
    async with AsyncExitStack() as stack:
        stack.enter_context(locked_directory(config.state_dir))
        control = open_channel(learner, credentials, "control", identity)
        stack.push_async_callback(control.close)

        def lanes(target: Address | None) -> tuple[grpc.aio.Channel, ...]:
            channels: list[grpc.aio.Channel] = []
            for _ in range(config.connect.channels if target is not None else 0):
                channels.append(open_channel(target or learner, credentials, "bulk", identity))
                stack.push_async_callback(channels[-1].close)
            return tuple(channels)

        bulk, relay = lanes(learner), lanes(relay_target)
        links = Links(learner=learner, sampler_id=identity.id, control=control, bulk=bulk, relay=relay)
        expiry = process.tasks.create_task(tell_of_expiry(None if credentials is None else config.tls))
        stack.callback(expiry.cancel)
        await _Sampler(config, links, process, engine, stack).run()


def make_engine(config: SamplerConfig) -> Engine:
    """The engine of engine.kind. Raises ConfigError when this host cannot run it."""
    settings = config.engine
    if settings.kind == "vllm":
        return VllmEngine(settings, config.state_dir)
    return TransformersEngine(
        device=settings.device,
        dtype=settings.dtype,
        max_batch_rows=settings.max_batch_rows,
        threads=settings.threads,
    )


def _credentials(config: SamplerConfig) -> tuple[grpc.ChannelCredentials | None, Identity]:
    """Raises RefusedError or ConfigError for a certificate that the learner would not take, and says why."""
    config.require_credentials()
    if config.connect.insecure or config.tls is None:
        return None, Identity(role=Role.SAMPLER, id=require_id(config.connect.sampler_id))
    credentials, identity = channel_credentials(config.tls)
    named = config.connect.sampler_id
    if named and named != identity.id:
        raise ConfigError(f"connect.sampler_id is {named}, and the certificate is for {identity}: they must agree")
    return credentials, identity


class _Sampler:
    """Wires the parts together. Whatever is started is put on `stack`, and ends in reverse order."""

    def __init__(
        self, config: SamplerConfig, links: Links, process: Process, engine: Engine, stack: AsyncExitStack
    ) -> None:
        self._config = config
        self._links = links
        self._process = process
        self._engine = engine
        self._stack = stack
        self._tally = Tally()
        delay, sampler_id = config.delay, links.sampler_id
        self._weight_delays = Delays(delay.weights, delay.seed, sampler_id, "weights")
        self._rollout_delays = Delays(delay.rollouts, delay.seed, sampler_id, "rollouts")
        kinds = (delay.weights.kind, delay.rollouts.kind)
        if any(kind is not DelayKind.NONE for kind in kinds):
            _log.warning("delayed_on_purpose", weights=kinds[0], rollouts=kinds[1], seed=delay.seed)
        self._control = ControlServiceStub(links.control)
        bulk, relay = ([WeightServiceStub(channel) for channel in ends] for ends in (links.bulk, links.relay))
        self._weights = WeightSources(bulk[0], relay[0] if relay else None, lanes=bulk[1:], relay_lanes=relay[1:])
        self._cache = ObjectCache(config.state_dir / "objects", self._weights, _CACHE_BYTES)

    async def run(self) -> None:
        config, stack = self._config, self._stack
        spool = await Spool.open(config.state_dir / "spool.db", config.spool.max_bytes)
        stack.push_async_callback(spool.close)
        health = await stack.enter_async_context(serve_health(_socket_path(config.state_dir, "health.sock")))
        scorer = await self._reward_client()
        session = LearnerSession(
            control=self._control,
            learner=self._links.learner,
            sampler_id=self._links.sampler_id,
            spool=spool,
            engine=lambda: self._engine.info,
            give_up_s=config.connect.give_up_s,
        )
        vitals = Vitals(tally=self._tally, spool=spool, session=session, engine=self._engine, weights=self._weights)
        stack.enter_context(metrics_served(config.metrics_address, config.state_dir, vitals.observe))
        # Ready from here on, for systemd: a host's boot does not wait for a learner that may start tomorrow.
        self._process.ready(f"waiting for the learner at {self._links.learner}")
        if not await self._unless_drained(session.register()):
            return
        graders, reward_service = reward_graders(session.settings.graders), config.reward.address
        if not reward_service:
            check_allowed(graders, config.reward)
        elif not await self._unless_drained(check_served(graders, scorer, reward_service)):
            return
        stack.push_async_callback(self._engine.close)
        await self._work(session, spool, scorer, health, vitals)

    async def _work(
        self, session: LearnerSession, spool: Spool, scorer: RewardClient, health: Health, vitals: Vitals
    ) -> None:
        """From a registered sampler to a drained one."""
        news = asyncio.Event()
        follower = Follower(
            sources=self._weights,
            cache=self._cache,
            tally=self._tally,
            run_id=session.session.run_id,
            public_key=session.settings.manifest_public_key,
            news=news,
            decode_workers=self._config.decode_threads,
            delays=self._weight_delays,
        )
        heartbeat = Heartbeat(
            control=self._control,
            session=session,
            follower=follower,
            spool=spool,
            tally=self._tally,
            engine=self._engine,
            drain=lambda: self._process.request_drain("asked for by the learner"),
            news=news,
        )
        vitals.follower = follower
        self._spawn(heartbeat.run())
        self._spawn(follower.watch())
        if not await self._unless_drained(self._load_model(session, follower)):
            return
        rollout = self._rollout(session, follower, spool, scorer, news)
        heartbeat.rollout = vitals.rollout = rollout
        submitter = Submitter(
            spool=spool,
            rollouts=RolloutServiceStub(self._links.control),
            session=session,
            tally=self._tally,
            acknowledged=rollout.acknowledged,
        )
        self._spawn(follower.follow(self._engine))
        self._spawn(submitter.run())
        self._spawn(rollout.run())
        await health.set_serving(True)
        self._process.status(f"working for run {session.session.run_id}")
        await self._process.drain.wait()
        await health.set_serving(False)
        heartbeat.draining = True
        news.set()
        await self._wind_down(rollout, spool)
        await heartbeat.beat()  # a learner that ends its run waits to hear that nothing is left here

    async def _reward_client(self) -> RewardClient:
        """Connected to the configured reward service, or to one that is started here."""
        settings = self._config.reward
        address = settings.address
        if not address:
            socket = _socket_path(self._config.state_dir, "reward.sock")
            child = RewardChild(socket=socket, settings=settings, tally=self._tally)
            await child.start()
            self._stack.push_async_callback(child.stop)
            self._spawn(child.supervise())
            address = child.address
        client = RewardClient(address)
        self._stack.push_async_callback(client.close)
        return client

    async def _load_model(self, session: LearnerSession, follower: Follower) -> None:
        self._model_dir = await fetch_model_files(session.settings, self._cache, self._config.state_dir)
        self._prompts = await asyncio.to_thread(PromptCodec, self._model_dir, session.settings.system_prompt)
        await follower.start(self._engine, self._model_dir)

    def _rollout(
        self, session: LearnerSession, follower: Follower, spool: Spool, scorer: RewardClient, news: asyncio.Event
    ) -> Rollout:
        settings = session.settings
        return Rollout(
            control=self._control,
            session=session,
            follower=follower,
            engine=self._engine,
            prompts=self._prompts,
            scorer=GroupScorer(scorer, reward_graders(settings.graders), self._config.reward.attempts),
            spool=spool,
            tally=self._tally,
            limits=limits_for(
                leases=self._config.leases,
                max_batch_rows=self._config.engine.max_batch_rows,
                group_size=settings.group_size,
            ),
            news=news,
            delays=self._rollout_delays,
        )

    async def _wind_down(self, rollout: Rollout, spool: Spool) -> None:
        """Bounded: a lease that is not done in time expires at the learner, a group waits in the spool."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_GROUPS_S):
                await rollout.finish()
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_SPOOL_S):
                await spool.empty.wait()
        _log.info("sampler_drained", groups=self._tally.groups, tokens=self._tally.tokens, left_in_spool=spool.groups)

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        """A task of the process: its failure ends the process, the end of `run` ends it."""
        task = self._process.tasks.create_task(work)
        self._stack.push_async_callback(_end, task)

    async def _unless_drained(self, work: Coroutine[object, object, None]) -> bool:
        """Whether `work` came to its end: a drain before there is anything to finish ends it."""
        task = asyncio.ensure_future(work)
        drain = asyncio.ensure_future(self._process.drain.wait())
        try:
            await asyncio.wait((task, drain), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
                return True
            return False
        finally:
            await _end(task)
            await _end(drain)


async def _end(task: asyncio.Future[_T]) -> None:
    """Cancels and waits; the task's own failure is its group's to tell."""
    task.cancel()
    await asyncio.wait((task,))


def _socket_path(state_dir: Path, name: str) -> Path:
    """Raises ConfigError when the path is longer than a Unix socket's may be."""
    path = (state_dir / name).absolute()
    if len(str(path).encode()) > 100:
        raise ConfigError(f"state_dir is too long a path for a Unix socket ({path}): set a shorter one")
    return path
