"""What every grader is: built once from its options, then asked for one verdict per completion."""

from dataclasses import dataclass
from typing import Protocol

from services.reward.scorer import ScoreRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A grader's finding, with the text that it took for the answer."""

    reward: float
    extracted: str | None
    reason: str


class Grader(Protocol):
    """Runs inside a worker process that may be killed at any moment; keeps no state between completions."""

    def check_answer(self, answer: str) -> str | None:
        """Why this reference answer cannot be graded, or None. A data set is checked with it before a run."""
        ...

    def grade(self, request: ScoreRequest) -> Verdict:
        """The finding for one completion.

        Raises ScoreError if the reference answer is unusable; any other exception counts as a failure of the grader,
        never as a reward of 0.
        """
        ...
