from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from services.reward.client import RewardClient
from services.reward.scorer import ScoreRequest, Status
from services.reward.spec import GraderSpec
from services.runtime.errors import ScoreError
from services.sampler.config import RewardSection
from services.sampler.reward_child import RewardChild
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


async def test_a_child_calls_functions_of_allowed_modules_and_runs_programs_in_its_sandbox(tmp_path: Path) -> None:
    async with scoring(tmp_path, RewardSection(allow_code=True, allow_python=("json", GRADERS))) as client:
        (score,) = await client.score_group([request("abc")], [LENGTH])
        assert (score.status, score.reward) == (Status.OK, 3.0)
        (score,) = await client.score_group([request("def add(a, b): return a + b", ADD)], [CODE])
        # A host without namespaces says so; it neither refuses the grader nor runs the program without them.
        assert score.reward == 1.0 or score.status is Status.INFRASTRUCTURE_FAILURE
