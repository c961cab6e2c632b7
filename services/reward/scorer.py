"""What a score is, and the seam that the in-process pool and the client of the reward service both fill."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from services.reward.spec import GraderSpec


class Status(StrEnum):
    """Whether a score may be used as a reward."""

    OK = "ok"
    """Graded."""
    ANSWER_TIMEOUT = "answer_timeout"
    """The answer itself used up the limits of CPU time or memory: reward 0, to be trained on."""
    INFRASTRUCTURE_FAILURE = "infrastructure_failure"
    """The grader failed twice. There is no reward: generate or score again, then drop the group and count it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """One completion with what it is graded against."""

    prompt: str
    answer: str
    completion: str
    metadata: Mapping[str, object] = field(default_factory=dict[str, object])


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One grader's share: `reward` before it is multiplied by `weight`. Over the wire `grader` is math#2 for the second
    of a name."""

    grader: str
    reward: float
    weight: float
    extracted: str | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """`reward` is the sum of weight x reward over `parts`; without a meaning if `status` is INFRASTRUCTURE_FAILURE.

    `extracted` and `reason` are the first grader's that has them; `seconds` is wall time in the worker.
    """

    reward: float
    extracted: str | None
    reason: str
    seconds: float
    status: Status
    parts: tuple[Part, ...] = ()


class Scorer(Protocol):
    """Scores the completions of one prompt."""

    async def score_group(self, requests: Sequence[ScoreRequest], graders: Sequence[GraderSpec]) -> Sequence[Score]:
        """One score for each request, in order.

        Raises ScoreError if the reference answer or a grader's options cannot be used: no completion is to blame.
        """
        ...
