"""A child of vLLM that dies or hangs is replaced; what it owed is made again, on the right version."""

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from services.runtime.errors import ConfigError, EngineError, InputMissingError
from services.sampler.config import EngineSection, VllmSection
from services.sampler.engine_vllm import VllmEngine
from services.sampler.vllm_child.staging import Staging
from services.wire.delta import root_of
from tests.support.engine_conformance import TinyPolicy, asking
from tests.vllm.conftest import Engines, eager


async def test_groups_in_flight_at_a_kill_are_made_again_on_the_same_version(
    engine: VllmEngine, policy: TinyPolicy
) -> None:
    await engine.load(policy.other_weights, 4, root_of(policy.other_weights))
    expected = await engine.generate(asking(seed=21, completions=8, tokens=50))
    restarts, first_pid = engine.restarts, engine.child_pid
    assert first_pid is not None
    call = asyncio.create_task(engine.generate(asking(seed=21, completions=8, tokens=50)))
    await asyncio.sleep(0)
    os.kill(first_pid, signal.SIGKILL)  # what the kernel does to a process that is out of memory
    again = await call
    assert [drawn.token_ids for drawn in again.completions] == [drawn.token_ids for drawn in expected.completions]
    assert again.policy_version == 4
    assert again.policy_root == root_of(policy.other_weights)
    assert engine.restarts == restarts + 1
    assert engine.child_pid not in (None, first_pid)


async def test_a_load_during_which_the_child_dies_is_done_by_the_next_child(
    engine: VllmEngine, policy: TinyPolicy
) -> None:
    before = await engine.generate(asking())
    pid = engine.child_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    load = asyncio.create_task(engine.load(policy.other_weights, 4, root_of(policy.other_weights)))
    in_flight = asyncio.create_task(engine.generate(asking()))
    await asyncio.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    assert (await in_flight).completions == before.completions
    assert await load < 5
    after = await engine.generate(asking())
    assert after.policy_version == 4
    assert after.completions != before.completions


async def test_a_load_that_fails_leaves_the_old_version_on_a_fresh_child(
    engine: VllmEngine, policy: TinyPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await engine.generate(asking())
    restarts = engine.restarts
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\0" * 100)
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "update", lambda *_: damaged)
        with pytest.raises(EngineError, match="failed to load"):
            await engine.load(policy.other_weights, 4, root_of(policy.other_weights))
    after = await engine.generate(asking())
    assert replace(after, seconds=0.0) == replace(before, seconds=0.0)
    assert engine.restarts == restarts + 1


async def test_a_child_that_hangs_is_killed_and_replaced(in_flight: VllmEngine, policy: TinyPolicy) -> None:
    await in_flight.load(policy.other_weights, 4, root_of(policy.other_weights))
    expected = await in_flight.generate(asking())
    pid = in_flight.child_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    again = await in_flight.generate(asking())
    assert replace(again, seconds=0.0) == replace(expected, seconds=0.0)
    assert in_flight.restarts == 1
    assert in_flight.child_pid != pid


def libraries_of(pid: int | None) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


async def test_vllm_runs_in_a_process_without_grpc(engine: VllmEngine) -> None:
    assert "libtorch" in libraries_of(engine.child_pid)
    assert "cygrpc" not in libraries_of(engine.child_pid)


async def test_settings_and_folders_that_cannot_work_are_named(tmp_path: Path, policy: TinyPolicy) -> None:
    with pytest.raises(ConfigError, match="not JSON"):
        VllmEngine(EngineSection(vllm=VllmSection(arguments="{")), tmp_path)
    with pytest.raises(ConfigError, match="may not set logprobs_mode"):
        VllmEngine(EngineSection(vllm=VllmSection(arguments='{"logprobs_mode": "raw_logprobs"}')), tmp_path)
    engine = VllmEngine(EngineSection(), tmp_path)
    with pytest.raises(EngineError, match="start it first"):
        await engine.generate(asking())
    with pytest.raises(InputMissingError, match=r"config\.json"):
        await engine.start(tmp_path, policy.weights, 0, "")


async def test_a_request_that_vllm_would_answer_otherwise_is_refused(engine: VllmEngine) -> None:
    for temperature in (0.001, 2.5):
        with pytest.raises(ConfigError, match="temperature"):
            await engine.generate(asking(temperature=temperature))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (eager(kv_cache_gb=1_000_000), r"memory|cache"),
        (eager(quantization="no_such"), "quantization"),
        (eager(max_model_len=1_000_000), "max_model_len|context"),
    ],
    ids=["cache", "quantization", "length"],
)
async def test_what_does_not_fit_or_does_not_exist_is_a_configuration_error(
    engines: Engines, policy: TinyPolicy, settings: VllmSection, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        await engines.start(policy, policy.weights, 0, settings)
    assert "\n" not in str(caught.value)
    assert engines.started.pop().child_pid is None
