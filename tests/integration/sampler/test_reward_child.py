from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from services.reward.client import RewardClient
from services.reward.scorer import ScoreRequest, Status
from services.reward.spec import GraderSpec
from services.runtime.errors import ConfigError, ScoreError
from services.sampler.config import RewardSection
from services.sampler.reward_child import RewardChild
from services.sampler.scoring import check_served
from services.sampler.tally import Tally

GRADERS = "tests.integration.reward.graders_of_tests"
LENGTH = GraderSpec(name="python", options={"callable": f"{GRADERS}:length"})
CODE = GraderSpec(name="code")
ADD = '{"calls": [{"function": "add", "arguments": [1, 2], "value": 3}]}'


@asynccontextmanager
async def scoring(folder: Path, settings: RewardSection) -> AsyncIterator[RewardClient]:
    child = RewardChild(socket=folder / "r.sock", settings=settings, tally=Tally())
    await child.start()
    client = RewardClient(child.address, timeout_s=60)
    try:
        yield client
    finally:
        await client.close()
        await child.stop()


def request(completion: str, answer: str = "") -> ScoreRequest:
    return ScoreRequest(prompt="", answer=answer, completion=completion)


async def test_a_child_calls_no_functions_and_runs_no_programs_unless_it_is_allowed(tmp_path: Path) -> None:
    async with scoring(tmp_path, RewardSection()) as client:
        with pytest.raises(ScoreError, match="--allow-python"):
            await client.score_group([request("abc")], [LENGTH])
        with pytest.raises(ScoreError, match="--allow-code"):
            await client.score_group([request("def add(a, b): return a + b", ADD)], [CODE])


@pytest.mark.parametrize(
    "grader", [CODE, LENGTH, GraderSpec(name="newer"), GraderSpec(name="exact", options={"newer": 1})]
)
async def test_graders_that_a_reward_service_refuses_are_found_out_at_the_start(
    tmp_path: Path, grader: GraderSpec
) -> None:
    """Found out group by group, every prompt would count as one with a bad reference answer."""
    async with scoring(tmp_path, RewardSection()) as client:
        await check_served([GraderSpec(name="math")], client, "unix:///r.sock")
        with pytest.raises(ConfigError, match=r"cannot score for this run: .* So says the reward service at unix:///r"):
            await check_served([grader], client, "unix:///r.sock")


async def test_a_reward_service_that_does_not_answer_yet_is_asked_with_each_group(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = RewardClient(f"unix://{tmp_path}/none.sock", timeout_s=0.2)
    await check_served([CODE], client, "unix:///none.sock")
    await client.close()
    assert "graders_not_checked" in caplog.text


async def test_a_child_calls_functions_of_allowed_modules_and_runs_programs_in_its_sandbox(tmp_path: Path) -> None:
    async with scoring(tmp_path, RewardSection(allow_code=True, allow_python=("json", GRADERS))) as client:
        (score,) = await client.score_group([request("abc")], [LENGTH])
        assert (score.status, score.reward) == (Status.OK, 3.0)
        (score,) = await client.score_group([request("def add(a, b): return a + b", ADD)], [CODE])
        # A host without namespaces says so; it neither refuses the grader nor runs the program without them.
        assert score.reward == 1.0 or score.status is Status.INFRASTRUCTURE_FAILURE
