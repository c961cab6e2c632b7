"""A reference answer that cannot be graded is an error of the data set, never a reward."""

import pytest

from services.reward.graders import Permissions, build, check_gold
from services.reward.graders.base import Grader
from services.reward.scorer import ScoreRequest
from services.reward.spec import GraderSpec
from services.runtime.errors import ScoreError

MATH = (GraderSpec(name="math"),)


def math_grader() -> Grader:
    return build(MATH, Permissions())[0].grader


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "   ",
        "####",
        "reasoning #### ",
        "\\boxed{}",
        "\\frac{1}{",
        "7}{",
        "\\boxed{5",
        "=",
        "1 2",
        "�",
        "5\x00",
        "10^{10^{10}}",
        "(10^9)!",
        "9" * 5000,
        "(" * 100 + "1" + ")" * 100,
        "x" * 3000,
        "\\int_0^1 x dx",
        "Janet sells the other 9 eggs for 2 dollars each",
        "So the answer is that she sold 18 clips.",
    ],
    ids=lambda answer: ascii(answer)[:40],
)
def test_an_unusable_reference_answer_is_refused_with_a_reason(answer: str) -> None:
    reason = check_gold(answer, MATH)
    assert reason is not None
    assert reason.startswith("The reference answer")
    with pytest.raises(ScoreError, match="reference answer"):
        math_grader().grade(ScoreRequest(prompt="", answer=answer, completion=f"\\boxed{{{answer}}}"))


@pytest.mark.parametrize(
    "answer",
    [
        "5",
        "1,234",
        "$18",
        "a #### 72",
        "so $\\boxed{\\frac{3}{4}}$",
        "(1,2]",
        "\\{1,2\\}",
        "x^2+1",
        "B",
        "Monday",
        "\\text{even}",
        "50\\%",
        "90^\\circ",
        "3:2",
        "101_2",
        "2^{100}",
        "\\begin{pmatrix}1\\\\2\\end{pmatrix}",
        "x \\in [0,1]",
        "\\frac{\\sqrt{3}}{2}",
    ],
)
def test_a_usable_reference_answer_is_accepted_and_equals_itself(answer: str) -> None:
    assert check_gold(answer, MATH) is None
    box = answer if "boxed" in answer or "####" in answer else f"\\boxed{{{answer}}}"
    assert math_grader().grade(ScoreRequest(prompt="", answer=answer, completion=box)).reward == 1.0


def test_a_choice_grader_refuses_a_reference_answer_that_is_no_option() -> None:
    spec = GraderSpec(name="math", options={"extract": "choice"})
    assert check_gold("12", [spec]) is not None
    assert check_gold("B", [spec]) is None


def test_exact_and_regex_refuse_an_empty_reference_answer() -> None:
    assert check_gold(" ", [GraderSpec(name="exact")]) is not None
    assert check_gold(" ", [GraderSpec(name="regex", options={"pattern": "(\\d+)"})]) is not None
    assert check_gold("", [GraderSpec(name="regex", options={"pattern": "\\d+"})]) is None
    assert check_gold("", [GraderSpec(name="format")]) is None
