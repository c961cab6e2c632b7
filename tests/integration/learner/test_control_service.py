"""Registration, heartbeats and leases over a real server."""

import asyncio
from pathlib import Path

import grpc
import pytest

from services.learner import control_service
from services.runtime.errors import BadInputError, FencedError, HeteroRLError, MismatchError, RefusedError
from services.wire.convert import from_run_settings
from services.wire.errors import from_rpc_error
from services.wire.types import ROOT_IN_LAST_PART, Directive, LeasePurpose
from tests.integration.learner.learner_of_tests import running_learner, sampler
from tests.support.data_side import RUN_SETTINGS, dataset, envelope, group_for, root, settings


async def error_of(call: object) -> HeteroRLError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def test_registration_hands_out_the_settings_of_the_run(tmp_path: Path) -> None:
    async with running_learner(tmp_path) as learner, sampler(learner) as one:
        response = await one.register()
        assert from_run_settings(response.settings) == RUN_SETTINGS
        assert (response.heartbeat_interval_ms, response.session_ttl_ms) == (10_000, 30_000)
        assert (one.session.learner_epoch, one.session.session_epoch) == (1, 2)


async def test_registration_refuses_what_cannot_work_together(tmp_path: Path) -> None:
    async with running_learner(tmp_path) as learner, sampler(learner) as one:
        assert isinstance(await error_of(one.register(protocol_min=2, protocol_max=3)), MismatchError)
        assert isinstance(await error_of(one.register(model_files_sha256="00" * 32)), MismatchError)
        assert isinstance(await error_of(one.register(sampler_id="us-1")), RefusedError)
        assert isinstance(await error_of(one.register(sampler_id="../x")), BadInputError)
        assert isinstance(await error_of(one.register(spool_id="x" * 65)), BadInputError)


async def test_registration_says_what_a_sampler_can(tmp_path: Path) -> None:
    async with running_learner(tmp_path) as learner, sampler(learner) as one:
        await one.register()
        assert not learner.plane.sessions.all_can(ROOT_IN_LAST_PART)
        await one.register(features=[ROOT_IN_LAST_PART, "of a later build"])
        assert learner.plane.sessions.all_can(ROOT_IN_LAST_PART)


async def test_the_newest_registration_wins_and_the_older_process_is_fenced(tmp_path: Path) -> None:
    async with running_learner(tmp_path) as learner, sampler(learner) as old, sampler(learner) as new:
        await learner.plane.advance(0, root(0))
        assert isinstance(await error_of(old.heartbeat([])), FencedError)
        assert isinstance(await error_of(old.lease(1)), FencedError)
        assert isinstance(await error_of(old.release([])), FencedError)
        assert len(await new.lease(1)) == 1


async def test_a_message_in_the_name_of_another_sampler_is_refused(tmp_path: Path) -> None:
    async with running_learner(tmp_path) as learner, sampler(learner) as one, sampler(learner, "us-1") as two:
        one.session = two.session
        for call in (one.heartbeat([]), one.lease(1), one.release([])):
            assert isinstance(await error_of(call), RefusedError)


async def test_an_expired_lease_is_granted_to_another_sampler_and_told_as_lost(tmp_path: Path) -> None:
    async with running_learner(tmp_path) as learner, sampler(learner) as one, sampler(learner, "us-1") as two:
        await learner.plane.advance(0, root(0))
        kept, lost = await one.lease(2)
        for _ in range(4):
            learner.clock.advance(20)
            assert not (await one.heartbeat([kept])).lost_lease_ids
            await two.heartbeat([])
        taken = (await two.lease(1))[0]
        assert taken.prompt == lost.prompt
        assert list((await one.heartbeat([kept, lost])).lost_lease_ids) == [lost.lease_id]


async def test_a_waiting_call_gets_what_another_sampler_gives_back(tmp_path: Path) -> None:
    given = settings(groups_per_step=1, max_staleness=0)
    async with running_learner(tmp_path, given) as learner, sampler(learner) as one, sampler(learner, "us-1") as two:
        await learner.plane.advance(0, root(0))
        held = await one.lease(5)
        assert len(held) == 1
        assert (await two.lease_response(1)).reason == "pacing"
        waiting = asyncio.create_task(two.lease(1, wait_ms=10_000))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await one.release(held)
        async with asyncio.timeout(2):
            assert (await waiting)[0].prompt == held[0].prompt


async def test_a_prompt_that_is_too_long_is_never_granted_again(tmp_path: Path) -> None:
    async with running_learner(tmp_path) as learner, sampler(learner) as one:
        await learner.plane.advance(0, root(0))
        first = await one.lease(1)
        await one.release(first, "prompt_too_long")
        await one.release(first, "prompt_too_long")
        seen = {lease.prompt.prompt_id for lease in await one.lease(4)}
        assert len(seen) == 4
        assert first[0].prompt.prompt_id not in seen


async def test_a_sampler_with_weights_that_a_restored_learner_has_not_made_gets_no_leases(tmp_path: Path) -> None:
    async with running_learner(tmp_path) as learner, sampler(learner) as one:
        for version in (0, 1):
            await learner.plane.advance(version, root(version))
        for version in (1, 9):
            assert (await one.lease_response(1, version=version)).reason == "weights", "before its first report"
        for version, held in ((9, root(9)), (1, root(9))):
            await one.heartbeat([], version, held)
            assert (await one.lease_response(1, version=version)).reason == "weights"
        await one.heartbeat([], 1, root(1))
        assert len(await one.lease(1)) == 1


async def test_a_call_that_waits_for_the_first_report_is_answered_when_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_service, "_PAUSE_WAIT_S", 20.0)
    async with running_learner(tmp_path) as learner, sampler(learner) as one:
        for version in (0, 1):
            await learner.plane.advance(version, root(version))
        waiting = asyncio.create_task(one.lease_response(1, version=1, wait_ms=20_000))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await one.heartbeat([], 1, root(1))
        async with asyncio.timeout(10):
            await waiting
        assert len(await one.lease(1, version=1)) == 1


async def test_pause_drain_and_evict_reach_the_sampler(tmp_path: Path) -> None:
    async with running_learner(tmp_path) as learner, sampler(learner) as one:
        sessions = learner.plane.sessions
        await learner.plane.advance(0, root(0))
        sessions.paused = True
        assert (await one.heartbeat([])).directive == Directive.PAUSE.value
        assert (await one.lease_response(1)).reason == "paused"
        sessions.paused = False
        assert (await one.heartbeat([])).directive == Directive.CONTINUE.value
        held = (await one.lease(1))[0]
        sessions.find("eu-1").draining = True
        assert (await one.heartbeat([held])).directive == Directive.DRAIN.value
        assert (await one.lease_response(1)).reason == "draining"
        await sessions.evict("eu-1")
        assert isinstance(await error_of(one.heartbeat([])), RefusedError)
        async with sampler(learner, "us-1") as two:
            assert (await two.lease(1))[0].prompt == held.prompt
    async with running_learner(tmp_path) as learner:
        with pytest.raises(grpc.aio.AioRpcError, match="evicted"):
            async with sampler(learner):
                pass
        await learner.plane.sessions.evict("eu-1", allow=True)
        async with sampler(learner) as one:
            assert one.session.session_epoch == 2


async def test_zero_leases_are_a_fault_of_the_caller(tmp_path: Path) -> None:
    async with running_learner(tmp_path) as learner, sampler(learner) as one:
        assert isinstance(await error_of(one.lease(0)), BadInputError)
        assert (await one.lease_response(1)).reason == "pacing"  # no version is out yet


async def test_a_restarted_learner_grants_nothing_twice_and_gives_leases_back_to_who_names_them(tmp_path: Path) -> None:
    async with running_learner(tmp_path) as learner, sampler(learner) as one:
        await learner.plane.advance(0, root(0))
        working, forgotten, answered = await one.lease(3)
        await (await one.open_stream()).verdicts_for(envelope(1, group_for(answered)))
    async with running_learner(tmp_path) as learner, sampler(learner) as one, sampler(learner, "us-1") as two:
        await learner.plane.advance(0, root(0))
        assert not (await one.heartbeat([working])).lost_lease_ids
        fresh = await two.lease(1)
        assert len(fresh) == 1
        assert fresh[0].prompt not in {working.prompt, forgotten.prompt, answered.prompt}
        for _ in range(3):
            learner.clock.advance(25)
            await one.heartbeat([working])
            await two.heartbeat(fresh)
        assert [lease.prompt for lease in await two.lease(1)] == [forgotten.prompt]
        stream = await one.open_stream()
        assert (await stream.verdicts_for(envelope(2, group_for(working))))[0].code.name == "ACCEPTED"


async def test_an_evaluation_is_shared_between_samplers_and_ends_with_its_accuracy(tmp_path: Path) -> None:
    async with running_learner(tmp_path) as learner, sampler(learner) as one, sampler(learner, "us-1") as two:
        plane = learner.plane
        await plane.advance(0, root(0))
        started = await plane.evaluate(dataset(tmp_path).prompts[:4], samples=3)
        mine, yours = await one.lease(10), await two.lease(10)
        assert (len(mine), len(yours)) == (2, 2)
        assert {lease.purpose for lease in mine} == {LeasePurpose.EVAL}
        assert mine[0].group_size == 3
        first, second = await one.open_stream(), await two.open_stream()
        verdicts = await first.verdicts_for(*(envelope(n, group_for(m, reward=1.0)) for n, m in enumerate(mine, 1)))
        assert {v.code.name for v in verdicts} == {"ACCEPTED"}
        await two.release([yours[0]], "bad_gold")
        await second.verdicts_for(envelope(1, group_for(yours[1], reward=0.0)))
        async with asyncio.timeout(5):
            result = await started.result()
        assert (result.accuracy, result.prompts, result.given_up) == (pytest.approx(2 / 3), 3, 1)
        assert (plane.tally.evaluated, plane.tally.acknowledged, len(plane.buffer)) == (3, 0, 0)
        late = await second.verdicts_for(envelope(2, group_for(yours[0])))
        assert late[0].code.name == "LEASE_LOST"
        assert plane.tally.dropped == {}


@pytest.mark.parametrize("data", [b"\xff\xff", b"\x0a\x80\x80\x80\x80\x10", b"\x0a\x02\xff\xfe", b"\x0b" * 10_000])
async def test_bytes_that_do_not_parse_are_bad_input_for_unary_calls_and_streams(tmp_path: Path, data: bytes) -> None:
    async with running_learner(tmp_path) as learner, grpc.aio.insecure_channel(str(learner.address)) as channel:
        unary = channel.unary_unary("/heterorl.v1.ControlService/Register")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await unary(data, timeout=10)
        stream = channel.stream_stream("/heterorl.v1.RolloutService/SubmitGroups")(timeout=10)
        await stream.write(data)
        with pytest.raises(grpc.aio.AioRpcError) as cut:
            await stream.read()
        for error in (caught.value, cut.value):
            assert isinstance(from_rpc_error(error), BadInputError), error
            assert "do not parse" in (error.details() or "")
