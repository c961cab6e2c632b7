"""Whether the run's graders can read every reference answer of its data sets: asked when a learner starts.

The learner itself knows nothing of graders, and samplers would find such an item only when they score its first group.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from services.reward.graders import Permissions, check_gold
from services.reward.spec import GraderSpec
from services.runtime.errors import BadInputError
from services.runtime.log import get_logger
from services.wire.types import Prompt

_log = get_logger("learner.answers")
_ELSEWHERE = frozenset({"python", "code"})
"""Graders that only a sampler's host may run, and that read an answer in their own way."""


def check_answers(
    data: Sequence[tuple[Path, Sequence[Prompt]]],
    graders: Iterable[GraderSpec],
    budget_s: float | None,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """How many reference answers were read: all, or what was done within budget_s (symbolic answers take milliseconds).

    Raises BadInputError, naming file and prompt, for the first that no grader could compare with; ScoreError for
    graders or options that do not exist.
    """
    specs = [spec for spec in graders if spec.name not in _ELSEWHERE]
    started, checked = clock(), 0
    for path, prompts in data:
        for number, prompt in enumerate(prompts, start=1):
            if budget_s is not None and clock() - started > budget_s:
                _log.warning("answers_not_all_checked", checked=checked, seconds=budget_s)
                return checked
            try:
                reason = check_gold(prompt.answer, specs, Permissions())
            except ModuleNotFoundError as error:  # a learner's host needs no graders
                _log.warning("answers_not_checked", missing=error.name)
                return checked
            if reason is not None:
                raise BadInputError(f"{path}, prompt {number} ({prompt.text!r:.60}): {reason} Mend or remove it.")
            checked += 1
    return checked
