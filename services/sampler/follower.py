"""Follows the learner's policy: what is announced is fetched, decoded and verified while generating goes on.

    PolicyWatch ─► newest target ─► way to it ─► FetchObject ─► apply ─► root, signature, finite ─► engine.load
                   (older ones are skipped)         └ cut: resume      └ wrong: discard, keyframe, count
    way: the announced update, tried once, where it starts from what is held; else GetPlan(have root)
    an update that starts from what is held is fetched and decoded from its first object on, while it is made
    (Arrivals); its small objects come without being asked for (PushedObjects)

Guarantee: the engine never holds weights whose root is not that of a manifest with a good signature.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc

from heterorl.v1 import weights_pb2
from services.runtime import failpoints
from services.runtime.backoff import Backoff
from services.runtime.errors import (
    BadInputError,
    CorruptObjectError,
    EngineError,
    ExhaustedError,
    HeteroRLError,
    InvalidWeightsError,
    ObjectGoneError,
    StorageError,
    UnavailableError,
)
from services.runtime.log import get_logger
from services.sampler.arrivals import Arrivals
from services.sampler.decoding import Decoding
from services.sampler.delays import NO_DELAYS, Delays
from services.sampler.engine import Engine
from services.sampler.object_cache import ObjectCache
from services.sampler.plan_fetch import fetching, fetching_as_named
from services.sampler.policy_watch import RETRIED, PolicyWatch
from services.sampler.pushed import PushedObjects
from services.sampler.tally import Tally
from services.sampler.weight_sources import WeightSource, WeightSources
from services.wire.convert import from_plan
from services.wire.delta import BitTensor, WrongBaseError
from services.wire.errors import peer_error
from services.wire.types import Manifest, Plan

_log = get_logger("sampler.follower")
_PLAN_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldPolicy:
    """Verified weights in host memory: the base of the next delta, and what an engine is restarted from."""

    weights: Mapping[str, BitTensor]
    version: int
    root: str


class Follower:
    """`run_id` and `public_key` (empty: manifests are unsigned) come from the registration. `news` is set when a
    version was loaded. `delays` are those of [delay] weights: how long a fetched version waits before it is used."""

    def __init__(
        self,
        *,
        sources: WeightSources,
        cache: ObjectCache,
        tally: Tally,
        run_id: str,
        public_key: bytes,
        news: asyncio.Event,
        decode_workers: int = 1,
        backoff: Backoff | None = None,
        delays: Delays = NO_DELAYS,
    ) -> None:
        self._delays = delays
        self._sources = sources
        self._watch = PolicyWatch(sources, run_id, public_key)
        self._cache = cache
        self._tally = tally
        self._run_id = run_id
        self._news = news
        self._decoding = Decoding(decode_workers)
        self._pushed = PushedObjects(sources, cache, run_id)
        self._backoff = backoff or Backoff()
        self._held: HeldPolicy | None = None
        self._trying: Manifest | None = None
        """What the plan under way leads to; the target may be newer by now."""
        self._keyframe_only = False
        self._refused: set[str] = set()
        self._loaded = asyncio.Condition()
        self.version = -1
        """Version that the engine generates with; -1 before the first."""
        self.root = ""
        """Its root."""
        self.swapping = False
        """Whether the engine stands still for a swap."""

    @property
    def held(self) -> HeldPolicy:
        assert self._held is not None, "fetch the first version first"
        return self._held

    async def watch(self) -> None:
        """As PolicyWatch.run."""
        await self._watch.run()

    async def first(self) -> HeldPolicy:
        """The first verified weights, however long they take. Raises as `watch` does."""
        while self._held is None:
            await self._watch.news()
            await self._try_to_catch_up()
        return self._held

    async def start(self, engine: Engine, model_dir: Path) -> None:
        """Builds the engine from the first weights. Raises as Engine.start does."""
        held = await self.first()
        await engine.start(model_dir, held.weights, held.version, held.root)
        await self._note_loaded(held)

    async def follow(self, engine: Engine) -> None:
        """For ever: loads each target that differs from what the engine has; slow samplers skip versions."""
        await self._decoding.prepare(self.held.weights)
        try:
            await self._expect_next()
            while True:
                await self._watch.news()
                before = self.held
                if not await self._try_to_catch_up():
                    continue
                await self._expect_next()
                if (self.version, self.root) != (self.held.version, self.held.root):
                    await asyncio.sleep(self._delays.next_s())
                    in_engine = self.root == before.root
                    loaded = await self._load(engine, self.held)
                    if loaded and in_engine and before.weights is not self.held.weights:
                        # An engine that kept the old version would still need it.
                        await self._decoding.recycle(before.weights, self.held.weights)
        finally:
            await self._pushed.end()

    async def reached(self, version: int) -> None:
        """Waits until the engine generates with `version` or a later one."""
        async with self._loaded:
            await self._loaded.wait_for(lambda: self.version >= version)

    async def _try_to_catch_up(self) -> bool:
        """One way to the target, from GetPlan to verified weights. False: it failed, and will be tried again."""
        target, held_root = self._watch.target, "" if self._held is None else self._held.root
        if target is not None and target.root in self._refused:
            return False  # the old version serves on, and only another version is worth a try
        source = self._sources.current
        announced = None if self._keyframe_only else self._watch.take_offered(held_root)
        error: HeteroRLError
        local = True
        try:
            self._held = await self._catch_up(source, announced)
            self._backoff.reset()
            if self._ahead(self._held) is not None or (target is not None and self._held.version < target.version):
                self._watch.again()
            return True
        except grpc.aio.AioRpcError as rpc_error:
            error, local = peer_error(rpc_error), False
        except HeteroRLError as found:
            error = found
        finally:
            self._tally.fetch = None
        # A peer's storage error arrives as UnavailableError: this one is our own disk's, whoever brings the bytes.
        if not isinstance(error, StorageError) and self._sources.failed(source, error):
            self._watch.again()  # at once, from the learner: a relay's plan judges neither the version nor our copy
        elif announced is not None and not isinstance(error, UnavailableError | ExhaustedError | StorageError):
            _log.warning("announced_update_dropped", error=error)
            self._watch.again()  # at once, with a plan: this judges neither the version nor our copy
        elif isinstance(error, RETRIED):
            await self._prepare_retry(error)
        elif local and isinstance(error, InvalidWeightsError):
            self._refuse(error)
        elif local and isinstance(error, BadInputError):
            await self._prepare_retry(error)
        else:
            raise error
        return False

    async def _expect_next(self) -> None:
        """The learner may send the next update as it is made, where what is held is the newest version."""
        held, target = self.held, self._watch.target
        if target is not None and target.root == held.root:
            arrivals = self._ahead(held)
            await self._pushed.follow(held.root, () if arrivals is None else arrivals.refs, target.full_bytes)

    def _refuse(self, error: InvalidWeightsError) -> None:
        """The version itself is bad."""
        self._tally.versions_refused += 1
        manifest = self._trying
        _log.error("version_refused", version=None if manifest is None else manifest.version, error=error)
        if manifest is not None:
            self._refused.add(manifest.root)

    async def _prepare_retry(self, error: HeteroRLError) -> None:
        if isinstance(error, CorruptObjectError | WrongBaseError):
            self._keyframe_only = True
            self._tally.keyframes_refetched += 1
        wait_s = self._backoff.next_delay_s()
        _log.warning("following_failed", error=error, keyframe=self._keyframe_only, retry_s=round(wait_s, 2))
        await asyncio.sleep(wait_s)
        self._watch.again()

    async def _catch_up(self, source: WeightSource, announced: Plan | None) -> HeldPolicy:
        """With what was announced, or a plan of `source`. Raises AioRpcError, BadInputError and its subclasses,
        UnavailableError for a plan to an older version than the announced one, and what ObjectCache.fetch raises."""
        held, target = self._held, self._watch.target
        assert target is not None, "something was announced"
        if held is not None and held.root == target.root:  # a step that changed no bit still makes a version
            arrivals = self._ahead(held)
            if arrivals is not None and held.version == target.version:
                return await self._arrive(source, arrivals, held)
            return HeldPolicy(weights=held.weights, version=target.version, root=held.root)
        started = time.monotonic()
        plan = announced or await self._plan(source, held, target)
        manifest = self._check_plan(plan, target, held)
        planned = time.monotonic()
        pushed = None if announced is None else self._pushed
        async with fetching(self._cache, plan, self._tally, len(source.readers), pushed) as fetch:
            weights = await self._decoding.carry_out(plan, fetch, None if held is None else held.weights)
        plan_from = source.name if announced is None else "announcement"
        return self._fetched(source, plan, manifest, weights, plan_from, started, planned, fetch.last_came_s)

    def _ahead(self, held: HeldPolicy) -> Arrivals | None:
        """The update that is being made, where it starts from what is held."""
        arrivals = None if self._keyframe_only else self._watch.arrivals
        return arrivals if arrivals is not None and arrivals.base_root == held.root else None

    async def _arrive(self, source: WeightSource, arrivals: Arrivals, held: HeldPolicy) -> HeldPolicy:
        """With an update from its first object on; what is held, where it is given up, or bad: when its version is
        announced, that is followed as any other. Raises as `_catch_up`."""
        started = time.monotonic()
        try:
            refs, channels = arrivals.refs, len(source.readers)
            version, pushed = arrivals.target_version, self._pushed
            async with fetching_as_named(self._cache, refs, version, self._tally, channels, pushed) as fetch:
                arrivals.tell(fetch.add)
                weights = await self._decoding.while_it_is_made(arrivals, fetch, held.weights)
                if arrivals.plan is None:
                    _log.info("coming_update_given_up", version=arrivals.target_version)
                    await self._decoding.level(held.weights)
                    return held
                manifest = self._check_plan(arrivals.plan, arrivals.plan.target.decoded, held)
                if weights is None:
                    weights = await self._decoding.carry_out(arrivals.plan, fetch, held.weights, early=False)
        except (BadInputError, ObjectGoneError) as error:
            _log.warning("coming_update_dropped", version=arrivals.target_version, error=error)
            if arrivals.plan is not None:
                self._watch.take_offered(held.root)  # it has been tried: a plan is asked for
            self._watch.again()
            return held
        finally:
            if self._watch.arrivals is arrivals:
                self._watch.give_up_arrivals()
        return self._fetched(source, arrivals.plan, manifest, weights, "coming", started, started, fetch.last_came_s)

    def _check_plan(self, plan: Plan, target: Manifest, held: HeldPolicy | None) -> Manifest:
        """The manifest of a plan that may be carried out."""
        manifest = self._trying = self._watch.check_signed(plan.target)
        # A keyframe may take longer than a step: that of an earlier version heals our copy too.
        least = target.learner_epoch, 0 if self._keyframe_only else target.version
        if (manifest.learner_epoch, manifest.version) < least:
            raise UnavailableError(f"a plan leads to version {manifest.version}, and {target.version} is announced")
        if manifest.root in self._refused:
            raise InvalidWeightsError(f"version {manifest.version} has been refused before")
        _check_chain(plan, manifest, held)
        return manifest

    def _fetched(
        self,
        source: WeightSource,
        plan: Plan,
        manifest: Manifest,
        weights: Mapping[str, BitTensor],
        plan_from: str,
        started: float,
        planned: float,
        last_came: float,
    ) -> HeldPolicy:
        failpoints.hit("follow.after_apply")
        self._keyframe_only = False
        self._sources.worked(source)
        try:
            self._cache.evict(())
        except StorageError as error:  # these weights are proved all the same
            _log.warning("object_cache_not_tidied", error=error)
        _log.info(
            "version_fetched",
            version=manifest.version,
            root=manifest.root,
            base_version=None if self._held is None else self._held.version,
            plan_from=plan_from,
            fetched_from=source.name,
            steps="+".join(step.kind.name.lower() for step in plan.steps),
            bytes=plan.total_bytes,
            seconds=round(time.monotonic() - started, 3),
            plan_s=round(planned - started, 3),
            fetch_s=round(last_came - planned, 3),
            apply_s=round(time.monotonic() - last_came, 3),
        )
        return HeldPolicy(weights=weights, version=manifest.version, root=manifest.root)

    async def _plan(self, source: WeightSource, held: HeldPolicy | None, target: Manifest) -> Plan:
        """A relay may not have heard of the newest version yet, so it is told which one is wanted."""
        request = weights_pb2.GetPlanRequest(
            run_id=self._run_id,
            have_root=held.root if held is not None and not self._keyframe_only else "",
            have_version=0 if held is None else held.version,
            want_version=target.version if source.is_relay else 0,
            keyframe_only=self._keyframe_only,
        )
        answer = await source.stub.GetPlan(request, timeout=_PLAN_TIMEOUT_S, wait_for_ready=source.wait_for_ready)
        return from_plan(answer)

    async def _load(self, engine: Engine, held: HeldPolicy) -> bool:
        """False: the engine keeps the version that it has."""
        self.swapping = True
        try:
            self._tally.swapped(await engine.load(held.weights, held.version, held.root))
        except (InvalidWeightsError, EngineError) as error:
            self._tally.versions_refused += 1
            self._refused.add(held.root)
            _log.error("load_failed", version=held.version, error=error)
            return False
        finally:
            self.swapping = False
        await self._note_loaded(held)
        return True

    async def _note_loaded(self, held: HeldPolicy) -> None:
        async with self._loaded:
            self.version, self.root = held.version, held.root
            self._loaded.notify_all()
        self._news.set()
        self._tally.versions += 1
        _log.info(
            "version_loaded",
            version=held.version,
            root=held.root,
            swap_pause_ms=round(1000 * self._tally.swap_pause_s, 1),
        )


def _check_chain(plan: Plan, manifest: Manifest, held: HeldPolicy | None) -> None:
    """The steps lead from what is held to the signed root, without a hole. Raises CorruptObjectError."""
    root = "" if held is None else held.root
    for step in plan.steps:
        if step.base_root not in ("", root):
            raise CorruptObjectError("a plan's steps do not follow on each other: a keyframe is fetched")
        root = step.target_root
    if root != manifest.root:
        raise CorruptObjectError("a plan does not end at its own target: a keyframe is fetched")
