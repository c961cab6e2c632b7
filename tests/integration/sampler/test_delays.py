"""The `[delay]` section in a real sampler, over real gRPC: in real seconds, and never longer than a drain allows."""

import asyncio
import signal
import time
from pathlib import Path

import pytest

from heterorl.v1.weights_pb2_grpc import WeightServiceStub
from services.learner.config import LearnerConfig
from services.runtime.backoff import Backoff
from services.sampler.delays import DelayKind, DelayModel, Delays
from services.sampler.follower import Follower
from services.sampler.object_cache import ObjectCache
from services.sampler.tally import Tally
from services.sampler.weight_sources import WeightSources
from services.wire.signing import ManifestSigner
from tests.integration.sampler.test_app import POLICY, running_sampler, spooled
from tests.integration.sampler.test_follower import RecordingEngine, changed, weights_of
from tests.support.learner_in_process import running_learner, small_config
from tests.support.scripted_learner import RUN_ID, ScriptedWeights, serving

DELAY_S = 0.4


async def test_a_version_is_used_so_much_later_and_those_between_are_skipped(tmp_path: Path) -> None:
    signer = ManifestSigner.load_or_create(tmp_path / "key.pem")
    server, engine, weights = ScriptedWeights(signer), RecordingEngine(), weights_of(1)
    await server.publish(weights)
    model = DelayModel(kind=DelayKind.CONSTANT, mean_s=DELAY_S, min_s=0.0)
    async with serving(weights=server) as served, asyncio.TaskGroup() as tasks, asyncio.timeout(20):
        sources = WeightSources(WeightServiceStub(served.channel))
        follower = Follower(
            sources=sources,
            cache=ObjectCache(tmp_path / "objects", sources, 1 << 20),
            tally=Tally(),
            run_id=RUN_ID,
            public_key=signer.public_key,
            news=asyncio.Event(),
            backoff=Backoff(uniform=lambda _, longest: 0.02 * longest),
            delays=Delays(model, 0, "eu-1", "weights"),
        )
        running = [tasks.create_task(follower.watch())]
        started = time.monotonic()
        await follower._note_loaded(await follower.first())
        assert time.monotonic() - started < DELAY_S  # a sampler that joins does not wait
        running.append(tasks.create_task(follower.follow(engine)))  # pyright: ignore[reportArgumentType]
        for at in range(3):
            published = time.monotonic()
            weights = changed(weights, at)
            await server.publish(weights)
            while follower.held.version < at + 1 and at == 0:  # noqa: ASYNC110 - nothing announces a fetch
                await asyncio.sleep(0.01)
            assert follower.version == 0
            started = published if at == 0 else started
        await follower.reached(1)
        first_s = time.monotonic() - started
        await follower.reached(3)
        second_s = time.monotonic() - started
        for task in running:
            task.cancel()
    assert [version for version, _ in engine.loaded] == [1, 3]
    assert first_s >= DELAY_S
    assert second_s >= 2 * DELAY_S


@pytest.mark.timeout(300)
async def test_groups_are_held_back_beyond_the_leases_and_a_drain_sends_them(tmp_path: Path) -> None:
    config: LearnerConfig = small_config(
        tmp_path,
        POLICY,
        run={"id": "test", "state_dir": tmp_path / "learner", "steps": 100_000},
        sampling={"group_size": 4, "max_completion_tokens": 8},
        lease={"ahead": 8.0},
    )
    delay = ("kind=constant", "mean_s=900", "min_s=0")
    arguments = ("--leases=1", *(f"--delay.rollouts.{pair}" for pair in delay))
    async with (
        running_learner(config) as learner,
        running_sampler(learner.address, tmp_path / "s", *arguments) as sampler,
    ):
        assert (await sampler.event("delayed_on_purpose"))["rollouts"] == "constant"
        async with asyncio.timeout(120):
            await sampler.event("version_loaded")
            while (samples := await sampler.scrape())["groups_scored_total",] < 3:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.1)
        assert samples.get(("verdicts_total", "accepted"), 0) == 0
        assert spooled(sampler.state) == 0
        sampler.process.send_signal(signal.SIGTERM)
        drained = await sampler.event("sampler_drained")
        assert drained["left_in_spool"] == 0
        assert int(str(drained["groups"])) >= 3
        code, _ = await sampler.ended()
        assert code == 0
