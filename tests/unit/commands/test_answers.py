"""Reference answers are read when a learner starts."""

from collections.abc import Sequence
from itertools import count
from pathlib import Path

import pytest

from services.commands.answers import check_answers
from services.reward.spec import GraderSpec
from services.runtime.errors import BadInputError, ScoreError
from services.wire.types import Prompt

MATH = (GraderSpec(name="math"),)
TRAIN, HELD_OUT = Path("train.jsonl"), Path("eval.jsonl")


def prompts(*answers: str) -> Sequence[Prompt]:
    return [
        Prompt(prompt_id=str(number), text=f"What is {number}?", answer=answer) for number, answer in enumerate(answers)
    ]


def test_the_first_answer_that_cannot_be_graded_is_named_by_file_and_place() -> None:
    data = [(TRAIN, prompts("1", "2")), (HELD_OUT, prompts("so #### 72", "\\frac{1}{"))]
    with pytest.raises(BadInputError, match=r"eval\.jsonl, prompt 2 \('What is 1\?'\): .*cannot be graded"):
        check_answers(data, MATH, None)


def test_good_answers_are_all_read() -> None:
    assert check_answers([(TRAIN, prompts("1", "\\sqrt{2}")), (HELD_OUT, prompts("Monday"))], MATH, None) == 3


def test_what_only_samplers_may_run_is_left_to_them() -> None:
    graders = (GraderSpec(name="python", options={"callable": "a.b:c"}), GraderSpec(name="code"))
    assert check_answers([(TRAIN, prompts("{"))], graders, None) == 1


def test_a_grader_that_does_not_exist_is_named_before_anything_is_read() -> None:
    with pytest.raises(ScoreError, match="mathh"):
        check_answers([(TRAIN, prompts("1"))], (GraderSpec(name="mathh"),), None)


def test_a_budget_ends_it_and_the_run_may_start() -> None:
    seconds = count()
    data = [(TRAIN, prompts("1", "2", "3", "4", "\\frac{1}{"))]
    assert check_answers(data, MATH, 2.5, lambda: float(next(seconds))) == 2
