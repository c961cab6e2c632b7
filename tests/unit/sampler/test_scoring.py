from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from services.reward.scorer import Score, ScoreRequest, Status
from services.reward.spec import GraderSpec
from services.runtime.errors import EngineError, ScoreError, UnavailableError
from services.sampler.scoring import GroupScorer, reward_graders
from services.wire import types as t

PROMPT = t.Prompt(prompt_id="p", text="1+1=", answer="2", metadata_json='{"level": 3}')


def scored(status: Status = Status.OK, reward: float = 1.0) -> Score:
    return Score(reward=reward, extracted="2", reason="", seconds=0.0, status=status)


@dataclass(slots=True)
class FakeScorer:
    """Answers with what `answers` holds, in order."""

    answers: list[Sequence[Score] | Exception]
    requests: list[Sequence[ScoreRequest]] = field(default_factory=list[Sequence[ScoreRequest]])

    async def score_group(self, requests: Sequence[ScoreRequest], graders: Sequence[GraderSpec]) -> Sequence[Score]:
        self.requests.append(requests)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.runtime.backoff.Backoff.next_delay_s", lambda _: 0.0)


async def test_a_failing_grader_is_tried_again_and_its_failure_is_never_a_reward() -> None:
    broken = [scored(), scored(Status.INFRASTRUCTURE_FAILURE)]
    scorer = FakeScorer([UnavailableError("gone"), broken, [scored(), scored()]])
    result = await GroupScorer(scorer, (), attempts=3).score(PROMPT, ["2", "3"])
    assert [score.status for score in result.scores] == [Status.OK, Status.OK]
    assert [request.completion for request in scorer.requests[0]] == ["2", "3"]
    assert scorer.requests[0][0].metadata == {"level": 3}


async def test_after_the_last_attempt_the_group_has_no_reward() -> None:
    scorer = FakeScorer([[scored(Status.INFRASTRUCTURE_FAILURE)]] * 2)
    with pytest.raises(EngineError, match="scoring failed 2 times"):
        await GroupScorer(scorer, (), attempts=2).score(PROMPT, ["2"])


async def test_an_answer_that_used_up_its_limits_is_a_score_of_zero() -> None:
    scorer = FakeScorer([[scored(Status.ANSWER_TIMEOUT, 0.0)]])
    result = await GroupScorer(scorer, (), attempts=1).score(PROMPT, ["10^10^10"])
    assert result.scores[0].reward == 0.0


async def test_an_answer_that_cannot_be_graded_is_not_tried_again() -> None:
    scorer = FakeScorer([ScoreError("no gold")])
    with pytest.raises(ScoreError):
        await GroupScorer(scorer, (), attempts=3).score(PROMPT, ["2"])
    assert len(scorer.requests) == 1


def test_grader_options_must_be_a_json_object() -> None:
    assert reward_graders([t.GraderSpec(name="math", weight=0.5, options_json='{"a": 1}')])[0].options == {"a": 1}
    with pytest.raises(ScoreError):
        reward_graders([t.GraderSpec(name="math", options_json="[1]")])
