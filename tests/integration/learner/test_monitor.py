"""MonitorService and AdminService over a real connection, and who may call them."""

import asyncio
import urllib.request
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from heterorl.v1 import admin_pb2, admin_pb2_grpc, monitor_pb2, monitor_pb2_grpc, types_pb2
from services.runtime.address import parse_target
from services.wire.channel import open_channel
from services.wire.identity import Identity, Role
from tests.support.learner_in_process import running_learner, small_config
from tests.support.scripted_sampler import dial


def half(answer: str, text: str) -> float:
    return float(len(text) % 2)


@asynccontextmanager
async def channel_of(address: str, role: Role) -> AsyncGenerator[grpc.aio.Channel]:
    channel = open_channel(parse_target(address), None, "control", Identity(role=role, id="someone"))
    yield channel
    await channel.close()


async def test_the_status_shows_the_run_and_its_samplers(tmp_path: Path, policy_dir: Path) -> None:
    async with (
        running_learner(small_config(tmp_path, policy_dir)) as learner,
        channel_of(learner.address, Role.MONITOR) as channel,
    ):
        sampler = await dial(learner.address, "eu-1", tmp_path / "s", half)
        await sampler.follow()
        sampler.lease_ids = ["x" * 200] * 16_000  # of two such samplers a status with them could not be sent
        await sampler.heartbeat()
        monitor = monitor_pb2_grpc.MonitorServiceStub(channel)
        status = (await monitor.GetStatus(monitor_pb2.GetStatusRequest(), timeout=10)).status
        assert (status.run_id, status.policy_version) == ("test", 0)
        assert status.phase == monitor_pb2.LEARNER_PHASE_WAITING_FOR_GROUPS
        assert [one.sampler_id for one in status.samplers] == ["eu-1"]
        assert status.samplers[0].report.policy_root == status.policy_root == sampler.root
        assert status.ByteSize() < 10_000
        assert status.samplers[0].bytes_sent == status.weights_bytes_sent == sampler.bytes_received
        assert status.weights_bytes_full > status.weights_bytes_sent
        await sampler.close()


async def test_steps_are_replayed_and_then_followed_until_the_learner_ends(tmp_path: Path, policy_dir: Path) -> None:
    async with (
        running_learner(small_config(tmp_path, policy_dir)) as learner,
        channel_of(learner.address, Role.MONITOR) as channel,
    ):
        monitor = monitor_pb2_grpc.MonitorServiceStub(channel)
        sampler = await dial(learner.address, "eu-1", tmp_path / "s", half)
        working = asyncio.create_task(sampler.work())
        live = [one async for one in monitor.WatchSteps(monitor_pb2.WatchStepsRequest(from_step=2))]
        assert [one.step for one in live] == [2, 3]
        assert {"loss", "reward_mean", "grad_norm"} <= set(live[0].metrics)
        await working
        await sampler.close()


async def test_a_status_watch_ends_with_the_last_state(tmp_path: Path, policy_dir: Path) -> None:
    async with (
        running_learner(small_config(tmp_path, policy_dir)) as learner,
        channel_of(learner.address, Role.MONITOR) as channel,
    ):
        monitor = monitor_pb2_grpc.MonitorServiceStub(channel)
        watch = aiter(monitor.WatchStatus(monitor_pb2.WatchStatusRequest(interval_ms=100)))
        first = await anext(watch)
        assert first.status.phase == monitor_pb2.LEARNER_PHASE_WAITING_FOR_GROUPS
        learner.process.request_drain("enough")
        states = [one.status.phase async for one in watch]
        assert states[-1] == monitor_pb2.LEARNER_PHASE_FINISHING


async def test_an_operator_pauses_resumes_and_stops(tmp_path: Path, policy_dir: Path) -> None:
    config = small_config(tmp_path, policy_dir)
    async with running_learner(config) as learner, channel_of(learner.address, Role.ADMIN) as channel:
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        sampler = await dial(learner.address, "eu-1", tmp_path / "s", half)
        await sampler.follow()
        await admin.Pause(admin_pb2.PauseRequest(reason="test"), timeout=10)
        assert await sampler.lease(2, wait_ms=100) == []
        await admin.Resume(admin_pb2.ResumeRequest(), timeout=10)
        assert len(await sampler.lease(2)) == 2
        await admin.Stop(admin_pb2.StopRequest(reason="test"), timeout=10)
        while not sampler.draining:
            await sampler.heartbeat()
        await sampler.heartbeat()
        await asyncio.wait_for(learner.ended, 20)
        assert (config.run.state_dir / "summary.json").exists()
        await sampler.close()


async def test_a_pause_shows_although_no_group_comes(tmp_path: Path, policy_dir: Path) -> None:
    async with (
        running_learner(small_config(tmp_path, policy_dir)) as learner,
        channel_of(learner.address, Role.ADMIN) as channel,
    ):
        admin, monitor = admin_pb2_grpc.AdminServiceStub(channel), monitor_pb2_grpc.MonitorServiceStub(channel)
        await admin.Pause(admin_pb2.PauseRequest(), timeout=10)
        paused = (await monitor.GetStatus(monitor_pb2.GetStatusRequest(), timeout=10)).status
        await admin.Resume(admin_pb2.ResumeRequest(), timeout=10)
        resumed = (await monitor.GetStatus(monitor_pb2.GetStatusRequest(), timeout=10)).status
        assert paused.phase == monitor_pb2.LEARNER_PHASE_PAUSED
        assert resumed.phase == monitor_pb2.LEARNER_PHASE_WAITING_FOR_GROUPS


async def test_draining_and_evicting_name_a_sampler(tmp_path: Path, policy_dir: Path) -> None:
    async with (
        running_learner(small_config(tmp_path, policy_dir)) as learner,
        channel_of(learner.address, Role.ADMIN) as channel,
    ):
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await admin.DrainSampler(admin_pb2.DrainSamplerRequest(sampler_id="nobody"), timeout=10)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        sampler = await dial(learner.address, "eu-1", tmp_path / "s", half)
        await admin.DrainSampler(admin_pb2.DrainSamplerRequest(sampler_id="eu-1"), timeout=10)
        await sampler.heartbeat()
        assert sampler.draining
        await admin.EvictSampler(admin_pb2.EvictSamplerRequest(sampler_id="eu-1"), timeout=10)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await sampler.plan()
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        monitor = monitor_pb2_grpc.MonitorServiceStub(channel)
        status = (await monitor.GetStatus(monitor_pb2.GetStatusRequest(), timeout=10)).status
        assert status.samplers[0].evicted
        assert status.samplers[0].state != types_pb2.SAMPLER_STATE_UNSPECIFIED
        await sampler.close()


async def test_a_monitor_may_look_and_nothing_else(tmp_path: Path, policy_dir: Path) -> None:
    async with (
        running_learner(small_config(tmp_path, policy_dir)) as learner,
        channel_of(learner.address, Role.MONITOR) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await admin_pb2_grpc.AdminServiceStub(channel).Stop(admin_pb2.StopRequest(), timeout=10)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_prometheus_can_scrape_the_same_state(tmp_path: Path, policy_dir: Path) -> None:
    config = small_config(
        tmp_path, policy_dir, listen={"address": "127.0.0.1:0", "insecure": True, "metrics_address": "127.0.0.1:0"}
    )
    async with running_learner(config) as learner:
        sampler = await dial(learner.address, "eu-1", tmp_path / "s", half)
        address = (config.run.state_dir / "metrics_address").read_text().strip()
        page = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://{address}/metrics").read().decode())
        assert 'heterorl_learner_sampler_last_seen_seconds{sampler="eu-1"}' in page
        assert "heterorl_learner_groups_acknowledged_total 0.0" in page
        await sampler.close()
