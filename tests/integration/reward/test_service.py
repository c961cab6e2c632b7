"""The reward service on real sockets: unary and stream, errors as statuses, limits of messages, drain."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from heterorl.v1 import reward_pb2, reward_pb2_grpc, types_pb2
from services.reward.client import RewardClient
from services.reward.pool import Pool
from services.reward.scorer import ScoreRequest, Status
from services.reward.service import PENDING_COMPLETIONS_MAX, STREAM_GROUPS_MAX, RewardServicer
from services.reward.spec import GraderSpec
from services.runtime.errors import BadInputError, ExhaustedError, ScoreError, UnavailableError
from services.wire.interceptors import ErrorInterceptor
from services.wire.server import bind_unix, build_server

pytestmark = pytest.mark.asyncio(loop_scope="module")
MATH = (GraderSpec(name="math"),)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def target(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    async with Pool(workers=2) as pool:
        server = build_server("reward", [ErrorInterceptor()])
        reward_pb2_grpc.add_RewardServiceServicer_to_server(RewardServicer(pool), server)
        address = bind_unix(server, tmp_path_factory.mktemp("s") / "r.sock")
        await server.start()
        yield address
        await server.stop(0)


@pytest_asyncio.fixture(loop_scope="module")
async def client(target: str) -> AsyncIterator[RewardClient]:
    client = RewardClient(target, timeout_s=60)
    yield client
    await client.close()


def requests(answer: str, *completions: str) -> list[ScoreRequest]:
    return [ScoreRequest(prompt="p", answer=answer, completion=one) for one in completions]


async def test_a_group_comes_back_as_the_pool_scores_it(client: RewardClient) -> None:
    graders = [
        *MATH,
        GraderSpec(name="format", weight=0.5),
        GraderSpec(name="math", weight=-1.0, options={"extract": "hash"}),
    ]
    scores = await client.score_group(requests("7", "\\boxed{7}", "7", "none"), graders)
    assert [one.reward for one in scores] == [1.5, 1.0, 0.0]
    assert [(part.grader, part.reward, part.weight) for part in scores[0].parts] == [
        ("math", 1.0, 1.0),
        ("format", 1.0, 0.5),
        ("math#2", 0.0, -1.0),
    ]
    assert scores[0].extracted == "7"
    assert scores[2].extracted is None
    assert all(one.status is Status.OK and one.reason for one in scores)
    assert await client.score_group([], MATH) == []


async def test_hostile_text_passes_through_the_wire(client: RewardClient) -> None:
    hostile = ["7", "\ud800 7", "\x00", "9" * 10_000_000, "\U0001f600" * 550_000, "\\boxed{10^{10^{10}}}"]
    scores = await client.score_group(requests("7", *hostile), MATH)
    assert [one.reward for one in scores] == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert "longer than" in scores[3].reason
    assert "longer than" in scores[4].reason


async def test_a_group_larger_than_one_message_is_scored_whole_and_in_order(client: RewardClient) -> None:
    completions = [f"{'x ' * 90_000}#### {one}" for one in range(40)]
    scores = await client.score_group(requests("17", *completions), MATH)
    assert [one.reward for one in scores] == [float(one == 17) for one in range(40)]


async def test_errors_arrive_as_what_they_were(client: RewardClient) -> None:
    with pytest.raises(ScoreError, match="did you mean math"):
        await client.score_group(requests("7", "7"), [GraderSpec(name="mth")])
    with pytest.raises(ScoreError, match="reference answer is empty"):
        await client.score_group(requests("", "7"), MATH)
    with pytest.raises(ScoreError, match="names no grader"):
        await client.score_group(requests("7", "7"), [])
    with pytest.raises(BadInputError, match="at most 8192 completions, not 8193"):
        await client.score_group(requests("7", *["7"] * (PENDING_COMPLETIONS_MAX + 1)), MATH)


async def test_a_service_with_all_that_it_can_hold_asks_to_send_later(client: RewardClient) -> None:
    most = asyncio.create_task(client.score_group(requests("7", *["7"] * PENDING_COMPLETIONS_MAX), MATH))

    async def ask_beside() -> None:
        while not most.done():
            await client.score_group(requests("7", "7"), MATH)
        await most  # refused itself, where the small one came first

    with pytest.raises(ExhaustedError, match="send later"):
        await ask_beside()
    most.cancel()


async def test_options_that_are_not_json_are_bad_input(target: str) -> None:
    async with grpc.aio.insecure_channel(target) as channel:
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        for broken in ("{", "[]", "[" * 100_000):
            spec = types_pb2.GraderSpec(name="math", weight=1, options_json=broken)
            with pytest.raises(grpc.aio.AioRpcError, match="JSON") as caught:
                await stub.ScoreGroup(reward_pb2.ScoreGroupRequest(answer="7", completions=["7"], graders=[spec]))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_stream_answers_every_request_by_its_id_and_survives_a_bad_one(target: str) -> None:
    spec = types_pb2.GraderSpec(name="math", weight=1)

    async def groups() -> AsyncIterator[reward_pb2.ScoreGroupsRequest]:
        for one in range(200):
            answer = "" if one == 50 else str(one)
            request = reward_pb2.ScoreGroupRequest(answer=answer, completions=[str(one), "x"], graders=[spec])
            yield reward_pb2.ScoreGroupsRequest(request_id=one, request=request)

    async with grpc.aio.insecure_channel(target) as channel:
        call = reward_pb2_grpc.RewardServiceStub(channel).ScoreGroups(groups())
        answers = {answer.request_id: answer async for answer in call}
    assert sorted(answers) == list(range(200))
    assert "reference answer is empty" in answers.pop(50).error
    for answer in answers.values():
        assert not answer.error
        assert [score.reward for score in answer.response.scores] == [1.0, 0.0]


async def test_a_client_that_leaves_its_stream_does_not_disturb_the_next(target: str, client: RewardClient) -> None:
    spec = types_pb2.GraderSpec(name="math", weight=1)
    async with grpc.aio.insecure_channel(target) as channel:
        call = reward_pb2_grpc.RewardServiceStub(channel).ScoreGroups()
        request = reward_pb2.ScoreGroupRequest(answer="7", completions=["7"] * 500, graders=[spec])
        await call.write(reward_pb2.ScoreGroupsRequest(request_id=1, request=request))
        call.cancel()
    assert [one.reward for one in await client.score_group(requests("7", "7", "8"), MATH)] == [1.0, 0.0]


async def test_a_cancelled_stream_ends_though_nobody_takes_its_answers() -> None:
    asked: list[int] = []

    async def groups() -> AsyncIterator[reward_pb2.ScoreGroupsRequest]:
        for one in range(4 * STREAM_GROUPS_MAX):
            asked.append(one)
            yield reward_pb2.ScoreGroupsRequest(request_id=one, request=reward_pb2.ScoreGroupRequest())

    async with Pool(workers=1) as pool, asyncio.timeout(20):
        stream = RewardServicer(pool).ScoreGroups(groups(), None)
        await anext(stream)
        before = 0
        while len(asked) > before:
            before = len(asked)
            await asyncio.sleep(0.2)
        assert before < 4 * STREAM_GROUPS_MAX
        await stream.aclose()


async def test_no_service_is_unavailable_in_time(tmp_path: Path) -> None:
    client = RewardClient(f"unix://{tmp_path}/absent.sock", timeout_s=0.5)
    with pytest.raises(UnavailableError):
        await client.score_group(requests("7", "7"), MATH)
    await client.close()


@pytest.mark.parametrize("words", [["serve"], []], ids=["serve", "plain"])
async def test_the_command_serves_is_healthy_and_drains_on_sigterm(tmp_path: Path, words: list[str]) -> None:
    target = f"unix://{tmp_path}/r.sock"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.cli", "reward", *words, "--listen", target, "--workers", "1")
    )
    client = RewardClient(target, timeout_s=90)
    try:
        assert (await client.score_group(requests("7", "7"), MATH))[0].reward == 1.0
        async with grpc.aio.insecure_channel(target) as channel:
            reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        in_flight = asyncio.ensure_future(client.score_group(requests("7", *["\\boxed{\\sqrt{49}}"] * 200), MATH))
        await asyncio.wait([in_flight], timeout=0.05)
        process.send_signal(signal.SIGTERM)
        assert all(one.reward == 1.0 for one in await in_flight)
        assert await asyncio.wait_for(process.wait(), 60) == 0
    finally:
        await client.close()
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert not (tmp_path / "r.sock").exists()


async def test_a_socket_that_cannot_be_removed_does_not_turn_a_drain_into_a_fault(tmp_path: Path) -> None:
    socket = tmp_path / "r.sock"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.cli", "reward", "serve", "--listen", f"unix://{socket}", "--workers=1"),
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        channel = grpc.aio.insecure_channel(f"unix:{socket}")
        health = health_pb2_grpc.HealthStub(channel)
        await health.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=30)
        await channel.close()
        socket.unlink()
        socket.mkdir()
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            _, told = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0
    assert b"socket_not_removed" in told
