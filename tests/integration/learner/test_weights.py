"""WeightService over a real connection: announcements, plans, bytes, resume."""

import asyncio
import hashlib
from pathlib import Path

import grpc
import pytest

from heterorl.v1 import weights_pb2
from services.runtime.errors import SessionLostError
from services.wire.convert import from_signed
from services.wire.delta import layout
from services.wire.delta.part import read_info
from services.wire.errors import from_rpc_error
from services.wire.signing import verify
from services.wire.types import ROOT_IN_LAST_PART
from tests.support.learner_in_process import running_learner, small_config
from tests.support.scripted_sampler import ScriptedSampler, dial


def no_reward(answer: str, text: str) -> float:
    return float(len(text) % 2)


async def one_step(sampler: ScriptedSampler) -> None:
    """Work until the learner has made one more version."""
    version = sampler.version
    while sampler.version == version:
        leases = await sampler.lease(2)
        await sampler.submit([sampler.generate(lease) for lease in leases])
        await sampler.follow()


async def newest_of(sampler: ScriptedSampler) -> weights_pb2.WatchPolicyResponse:
    watch = sampler.weights_stub.WatchPolicy(weights_pb2.WatchPolicyRequest())
    newest = await watch.read()
    watch.cancel()
    assert isinstance(newest, weights_pb2.WatchPolicyResponse)
    return newest


async def test_a_watcher_gets_the_newest_version_at_once_and_each_signed_one_after(
    tmp_path: Path, policy_dir: Path
) -> None:
    async with running_learner(small_config(tmp_path, policy_dir)) as learner:
        sampler = await dial(learner.address, "eu-1", tmp_path / "s", no_reward)
        watch = sampler.weights_stub.WatchPolicy(weights_pb2.WatchPolicyRequest(run_id="test"))
        first = from_signed((await watch.read()).manifest)
        assert first.decoded.version == 0
        assert first.decoded.model_files_sha256 == sampler.settings.model_files_sha256
        verify(sampler.settings.manifest_public_key, first.manifest, first.signature)
        await sampler.follow()
        assert sampler.root == first.decoded.root
        await one_step(sampler)
        second = from_signed((await watch.read()).manifest)
        assert (second.decoded.version, second.decoded.parent_root) == (1, first.decoded.root)
        verify(sampler.settings.manifest_public_key, second.manifest, second.signature)
        watch.cancel()
        await sampler.close()


async def test_updates_are_made_so_that_every_sampler_can_read_them(
    tmp_path: Path, policy_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr(layout, "PART_BYTES", 8192)
    config = small_config(tmp_path, policy_dir, run={"steps": 50})
    async with running_learner(config) as learner:
        sampler = await dial(learner.address, "eu-1", tmp_path / "s", no_reward)
        await sampler.follow()
        named: list[list[bool]] = []
        for features in ((), (ROOT_IN_LAST_PART,)):
            await sampler.register(features)
            await sampler.heartbeat()
            newest = await newest_of(sampler)
            made_before = from_signed(newest.manifest).decoded.version + 1  # one may be on its way
            while not newest.update.target_version > made_before:  # 0 where a step changed nothing
                await one_step(sampler)
                newest = await newest_of(sampler)
            parts = [await sampler.fetch(ref.object_id) for ref in newest.update.objects]
            named.append([bool(read_info(part).target_root) for part in parts])
        assert len(named[0]) > 2
        assert named == [[True] * len(named[0]), [False] * (len(named[0]) - 1) + [True]]
        await sampler.close()


async def test_a_sampler_of_another_run_is_told_to_register_again(tmp_path: Path, policy_dir: Path) -> None:
    """And not that a setting is wrong: it would end for good, while its next start serves the new run."""
    async with running_learner(small_config(tmp_path, policy_dir)) as learner:
        sampler = await dial(learner.address, "eu-1", tmp_path / "s", no_reward)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await sampler.weights_stub.WatchPolicy(weights_pb2.WatchPolicyRequest(run_id="yesterday")).read()
        assert isinstance(from_rpc_error(caught.value), SessionLostError)
        await sampler.close()


async def test_a_fetch_resumes_at_any_offset(tmp_path: Path, policy_dir: Path) -> None:
    async with running_learner(small_config(tmp_path, policy_dir)) as learner:
        sampler = await dial(learner.address, "eu-1", tmp_path / "s", no_reward)
        ref = (await sampler.plan()).steps[0].objects[0]
        whole = await sampler.fetch(ref.object_id)
        assert hashlib.sha256(whole).hexdigest() == ref.object_id
        for offset in (0, 1, ref.size_bytes // 2, ref.size_bytes - 1, ref.size_bytes):
            assert await sampler.fetch(ref.object_id, offset) == whole[offset:]
        assert await sampler.fetch(ref.object_id, 10, 5) == whole[10:15]
        await sampler.close()


@pytest.mark.parametrize(
    ("object_id", "offset", "code"),
    [
        ("../../etc/passwd", 0, grpc.StatusCode.INVALID_ARGUMENT),
        ("0" * 64, 0, grpc.StatusCode.NOT_FOUND),
        ("", 1 << 40, grpc.StatusCode.OUT_OF_RANGE),
    ],
)
async def test_a_fetch_that_cannot_be_has_its_own_code(
    tmp_path: Path, policy_dir: Path, object_id: str, offset: int, code: grpc.StatusCode
) -> None:
    async with running_learner(small_config(tmp_path, policy_dir)) as learner:
        sampler = await dial(learner.address, "eu-1", tmp_path / "s", no_reward)
        known = (await sampler.plan()).steps[0].objects[0].object_id
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await sampler.fetch(object_id or known, offset)
        assert caught.value.code() is code
        await sampler.close()


async def test_a_damaged_object_is_never_served_and_the_next_plan_avoids_it(tmp_path: Path, policy_dir: Path) -> None:
    config = small_config(tmp_path, policy_dir)
    async with running_learner(config) as learner:
        sampler = await dial(learner.address, "eu-1", tmp_path / "s", no_reward)
        ref = (await sampler.plan()).steps[0].objects[0]
        path = config.run.state_dir / "objects" / ref.object_id[:2] / ref.object_id
        data = bytearray(path.read_bytes())
        data[100] ^= 0xFF
        path.write_bytes(bytes(data))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await sampler.fetch(ref.object_id)
        assert caught.value.code() in (grpc.StatusCode.DATA_LOSS, grpc.StatusCode.NOT_FOUND)
        await sampler.follow()
        assert sampler.root
        await sampler.close()


async def test_samplers_that_fetch_at_once_are_counted_apart(tmp_path: Path, policy_dir: Path) -> None:
    config = small_config(tmp_path, policy_dir)
    async with running_learner(config) as learner:
        samplers = [await dial(learner.address, f"s-{n}", tmp_path / f"s{n}", no_reward) for n in range(3)]
        await asyncio.gather(*(sampler.follow() for sampler in samplers))
        assert len({sampler.root for sampler in samplers}) == 1
        learner.process.request_drain("enough")
        await learner.ended
        for sampler in samplers:
            await sampler.close()
    text = (config.run.state_dir / "summary.json").read_text()
    assert all(f'"bytes_received": {sampler.bytes_received}' in text for sampler in samplers)
