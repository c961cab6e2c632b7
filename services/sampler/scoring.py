"""Groups to scores: what the wire says about graders in the reward package's terms, and retries of grader failures."""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from services.reward.client import RewardClient
from services.reward.graders import Permissions, build
from services.reward.scorer import Score, Scorer, ScoreRequest, Status
from services.reward.spec import GraderSpec
from services.runtime.backoff import Backoff
from services.runtime.errors import ConfigError, EngineError, ExhaustedError, ScoreError, UnavailableError
from services.runtime.log import get_logger
from services.sampler.config import RewardSection
from services.wire import types as t

_log = get_logger("sampler.scoring")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupScores:
    """One score per completion, all of them usable."""

    scores: tuple[Score, ...]
    seconds: float


def reward_graders(specs: Sequence[t.GraderSpec]) -> tuple[GraderSpec, ...]:
    """The run's graders. Raises ScoreError when options are not a JSON object."""
    return tuple(
        GraderSpec(name=spec.name, weight=spec.weight, options=_json_object(spec.options_json)) for spec in specs
    )


def check_allowed(graders: Sequence[GraderSpec], settings: RewardSection) -> None:
    """Raises ConfigError for graders that a reward service started here would refuse.

    Found out group by group, every prompt would count as one with a bad reference answer."""
    permissions = Permissions(code="isolated" if settings.allow_code else "refused", python=settings.allow_python)
    try:
        build(graders, permissions)
    except ScoreError as error:
        raise ConfigError(
            f"this sampler cannot score for this run: {error} Here that is reward.allow_code, reward.allow_python"
        ) from error


async def check_served(graders: Sequence[GraderSpec], client: RewardClient, address: str) -> None:
    """As check_allowed, for the reward service at `address`, which has its own permissions and may be of another
    release. One that does not answer yet is asked with each group."""
    try:
        await client.check(graders)
    except ScoreError as error:
        raise ConfigError(
            f"this sampler cannot score for this run: {error} So says the reward service at {address}: start it again "
            "with what it must allow; if it is of another release, with this one"
        ) from error
    except (UnavailableError, ExhaustedError, EngineError) as error:
        _log.warning("graders_not_checked", reward=address, error=error)


class GroupScorer:
    """Scores groups with the run's graders; a failing grader is tried `attempts` times."""

    def __init__(self, scorer: Scorer, graders: Sequence[GraderSpec], attempts: int) -> None:
        self._scorer = scorer
        self._graders = graders
        self._attempts = attempts

    async def score(self, prompt: t.Prompt, completions: Sequence[str]) -> GroupScores:
        """Raises ScoreError (the reference answer cannot be graded), EngineError (the grader failed every time)."""
        metadata = _json_object(prompt.metadata_json)
        requests = [
            ScoreRequest(prompt=prompt.text, answer=prompt.answer, completion=text, metadata=metadata)
            for text in completions
        ]
        started = time.monotonic()
        backoff = Backoff()
        failure = "the grader failed"
        for attempt in range(self._attempts):
            if attempt:
                await asyncio.sleep(backoff.next_delay_s())
            try:
                scores = await self._scorer.score_group(requests, self._graders)
            except (UnavailableError, ExhaustedError, EngineError) as error:
                failure = str(error)
                continue
            if all(score.status is not Status.INFRASTRUCTURE_FAILURE for score in scores):
                return GroupScores(scores=tuple(scores), seconds=time.monotonic() - started)
            failure = next(score.reason for score in scores if score.status is Status.INFRASTRUCTURE_FAILURE)
        raise EngineError(f"scoring failed {self._attempts} times: {failure}")


def _json_object(text: str) -> Mapping[str, object]:
    try:
        value: object = json.loads(text or "{}")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ScoreError("grader options or a prompt's metadata are not a JSON object: the learner sent bad settings")
    return cast("dict[str, object]", value)
